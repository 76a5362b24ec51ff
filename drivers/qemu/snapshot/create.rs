//! Taking a snapshot.

use super::super::declared;
use super::super::instance::Body;
use super::external::check_overlay;
use super::files::{OVERLAY, RESERVE, check_free_place, check_space};
use super::note::{Part, Record};
use super::revert::UNDO;
use super::survey::Survey;
use super::{Image, Operation, cannot, pairs, parts};
use crate::agent::talk::HELLO;
use crate::agent::{Line, Terms};
use crate::host::image::InnerSnapshot;
use crate::qemu::block::{Nodes, unmistakable};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::device::disk::{DiskDevice, DiskKind};
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{
    CreatePlan, CreatedSnapshot, DiskMode, FileChange, FileFate, Journal, MemoryMode, SnapshotRequest,
};

impl Operation {
    pub(super) async fn check_create(&self, request: &SnapshotRequest) -> Result<CreatePlan, DriverError> {
        let files = async { tokio::try_join!(self.check_chains(request), self.survey(self.concerned(request))) };
        let (_, nodes, (_, survey)) = tokio::try_join!(self.check_machine(request), self.nodes(), files)?;
        self.check_names(request, &survey, nodes.as_ref()).await?;
        self.check_way_back(request, &survey, nodes.as_ref()).await?;
        self.overlays_have_room(request, nodes.as_ref()).await?;
        self.decide_create(request, &survey)
    }

    /// All files that the snapshot would be made of, and those it is made from.
    fn concerned(&self, request: &SnapshotRequest) -> Vec<PathBuf> {
        let overlays = request.disks.iter().filter_map(|part| match &part.mode {
            DiskMode::External { path, .. } => Some(path.clone()),
            _ => None,
        });
        let memory = match &request.memory {
            MemoryMode::External(path) => Some(path.clone()),
            _ => None,
        };
        let images = super::internal_images(&self.machine.def, &request.disks, true);
        overlays.chain(memory).chain(images).chain(self.own_parts()).collect()
    }

    /// What would be made, where everything that is there allows it.
    fn decide_create(&self, request: &SnapshotRequest, survey: &Survey) -> Result<CreatePlan, DriverError> {
        let mut files = Vec::new();
        let created = |path: &Path, bytes| FileChange { path: path.to_owned(), what: FileFate::Created, bytes };
        for (_, part) in pairs(&self.machine.def, &request.disks) {
            let DiskMode::External { path, block, .. } = &part.mode else { continue };
            check_overlay(&part.target, path, &survey.at(path), *block, request.reuse_external)?;
            if !request.reuse_external && !block {
                files.push(created(path, OVERLAY));
            }
        }
        let memory = self.machine.def.memory_kib() << 10;
        if let MemoryMode::External(path) = &request.memory {
            check_free_place(path, &survey.at(path), "the memory's file")?;
            check_space(path, &survey.at(path), memory / 64 + RESERVE)?;
            files.push(created(path, memory));
        }
        let copies = self.copies(request, survey);
        files.extend(copies.iter().map(|(from, to)| created(to, survey.size(from))));
        if request.memory == MemoryMode::Internal
            && let Some(image) = super::internal_images(&self.machine.def, &request.disks, false).first()
        {
            check_space(image, &survey.at(image), RESERVE)?;
        }
        let pauses = request.memory != MemoryMode::No && !request.live || self.stands_for(request, &copies);
        Ok(CreatePlan { files, pauses_guest: self.machine.running && pauses })
    }

    /// Whether machine and guest can be captured as they are.
    async fn check_machine(&self, request: &SnapshotRequest) -> Result<(), DriverError> {
        let def = &self.machine.def;
        let internal = pairs(def, &request.disks).any(|(_, part)| part.mode == DiskMode::Internal);
        if !request.leave_out_nvram
            && internal
            && let Some((path, format)) = parts::variables(def).find(|(_, format)| format != "qcow2")
        {
            return Err(DriverError::Unsupported(format!(
                "its firmware variables ({}, {format}) are not in qcow2 and cannot be captured inside their image; \
                 use disk-only, or leave out nvram",
                path.display()
            )));
        }
        if request.memory != MemoryMode::No {
            self.keeps_what_is_written("memory without what it knows of its disk")?;
        }
        for (disk, part) in pairs(def, &request.disks).filter(|(_, part)| part.mode != DiskMode::No) {
            let target = &part.target;
            if self.machine.running && disk.transient.is_some() {
                return Err(cannot(format!("disk '{target}' throws away what is written: leave it out")));
            }
            if disk.device() == DiskDevice::Lun {
                return Err(cannot(format!("disk '{target}' is a device of the host's passed through: leave it out")));
            }
            let local = matches!(disk.kind(), DiskKind::File | DiskKind::Block);
            if !local && part.mode != DiskMode::Manual {
                return Err(cannot(format!("disk '{target}' is on a server, and is captured by hand only")));
            }
        }
        if request.quiesce && by_hand(request) {
            return Err(cannot(
                "a disk is copied by hand while the guest stands, and file systems that are frozen then are never \
                 thawed: leave out quiesce",
            ));
        }
        let Some(body) = &self.body else { return Ok(()) };
        let kept_here = async {
            match request.memory {
                MemoryMode::No => Ok(None),
                _ => self.keeps_memory(body).await,
            }
        };
        // What QEMU is asked goes to it at once.
        let can_send = self.can_send_memory(body, request);
        let (alone, kept_here, can_send) = tokio::join!(self.nobody_else_works(), kept_here, can_send);
        alone?;
        if let Some(why) = kept_here? {
            return Err(DriverError::Refused(format!("its memory cannot be captured: {why}; use disk-only")));
        }
        can_send?;
        if request.quiesce {
            self.agent()?.talk(Terms::within(HELLO)).await?;
        }
        Ok(())
    }

    /// A QEMU whose memory has been written to a file, and whose guest has not gone on since, does not write it again.
    async fn can_send_memory(&self, body: &Body, request: &SnapshotRequest) -> Result<(), DriverError> {
        if request.memory == MemoryMode::No {
            return Ok(());
        }
        match self.is_sent(body).await? {
            true => Err(DriverError::Refused(
                "its memory has been written to a file already, and it has been paused since: resume it for a moment, or \
                 take the snapshot with disk-only"
                    .to_owned(),
            )),
            false => Ok(()),
        }
    }

    /// The images are what the definition says, and overlays that the caller has made are what they will be said to be.
    async fn check_chains(&self, request: &SnapshotRequest) -> Result<(), DriverError> {
        let def = &self.machine.def;
        let mut images = declared::images(def);
        for (disk, part) in pairs(def, &request.disks).filter(|_| request.reuse_external) {
            if let (DiskMode::External { path, format, .. }, Some(base)) = (&part.mode, disk.path()) {
                images.push(declared::Image {
                    whose: format!("disk '{}'", part.target),
                    path: path.clone(),
                    format: format.clone(),
                    below: declared::Below::File(base.into(), disk.meant_format().to_owned()),
                    at: disk.at.clone(),
                });
            }
        }
        declared::hold_images(&self.workers, def.uuid, images).await
    }

    /// What is taken inside images can be gone back to.
    async fn check_way_back(
        &self,
        request: &SnapshotRequest,
        survey: &Survey,
        nodes: Option<&Nodes>,
    ) -> Result<(), DriverError> {
        let with_nvram = self.record(request, survey).nvram == Some(Part::Internal);
        let images = super::internal_images(&self.machine.def, &request.disks, with_nvram);
        self.hold_no_bitmaps(&images, nodes).await
    }

    /// A name that an image holds already would be two snapshots' afterwards.
    async fn check_names(
        &self,
        request: &SnapshotRequest,
        survey: &Survey,
        nodes: Option<&Nodes>,
    ) -> Result<(), DriverError> {
        let name = &request.name;
        if name.starts_with(UNDO) {
            return Err(cannot(format!("a snapshot's name cannot begin with '{UNDO}', which names what reverts keep")));
        }
        let inside = !super::internal_images(&self.machine.def, &request.disks, false).is_empty()
            || self.record(request, survey).nvram == Some(Part::Internal);
        let held = self.held_in_images(request, survey, nodes).await?;
        if inside && may_be_number(name, held.iter().flat_map(|(_, inner)| inner)) {
            return Err(cannot(format!(
                "'{name}' is the number of a snapshot in an image, or may be one day: QEMU and its tools would take it for \
                 that; choose a name with a letter, or a date of eight digits"
            )));
        }
        for (image, inner) in held {
            if inside {
                unmistakable(name, &image, &inner)?;
            }
            if inner.iter().any(|inner| inner.name == *name) {
                let image = image.display();
                return Err(DriverError::SnapshotExists(format!(
                    "{image} holds a snapshot '{name}' that no record tells of; choose another name, or remove it with \
                     qemu-img"
                )));
            }
        }
        Ok(())
    }

    async fn held_in_images(
        &self,
        request: &SnapshotRequest,
        survey: &Survey,
        nodes: Option<&Nodes>,
    ) -> Result<Vec<(Image, Vec<InnerSnapshot>)>, DriverError> {
        let images = super::internal_images(&self.machine.def, &request.disks, true);
        match nodes {
            Some(nodes) => {
                let inner = |image: &Image| nodes.image(image, "qcow2").map(|node| node.snapshots.clone());
                Ok(images.iter().filter_map(|image| Some((image.clone(), inner(image)?))).collect())
            }
            None => {
                let there: Vec<Image> = images.into_iter().filter(|image| survey.is_there(image)).collect();
                let files = there.iter().map(|image| (image.clone(), false)).collect();
                let told = self.with_lent(files, move |images| {
                    let inner = |image: &Image| Ok(images.info(image, "qcow2")?.snapshots);
                    there.into_iter().map(|image| inner(&image).map(|inner| (image, inner))).collect()
                });
                told.await
            }
        }
    }

    /// What is copied beside the images: from, to.
    pub(super) fn copies(&self, request: &SnapshotRequest, survey: &Survey) -> Vec<(PathBuf, PathBuf)> {
        let def = &self.machine.def;
        let mut copies = Vec::new();
        let internal = pairs(def, &request.disks).any(|(_, part)| part.mode == DiskMode::Internal);
        let place = |part: &str| self.copy_place(&request.name, part);
        if !request.leave_out_nvram && !internal {
            // In the transaction of a running guest, qcow2 keeps them itself; not where its memory has been sent to a file:
            // QEMU has let go of its images then, takes nothing into them, and they can be copied as they are.
            let open = self.body.is_some() && !matches!(request.memory, MemoryMode::External(_));
            let inside = |format: &str| open && format == "qcow2";
            let variables = parts::variables(def).filter(|(path, format)| !inside(format) && survey.is_there(path));
            copies.extend(variables.map(|(path, _)| (path, place("nvram"))));
        }
        if !request.leave_out_tpm && request.memory == MemoryMode::No {
            let state = parts::tpm(def, &self.state_dir).filter(|path| survey.is_there(path));
            copies.extend(state.map(|path| (path, place("tpm"))));
        }
        copies
    }

    pub(super) async fn create(
        &self,
        request: &SnapshotRequest,
        journal: &Arc<dyn Journal>,
    ) -> Result<CreatedSnapshot, DriverError> {
        let external =
            pairs(&self.machine.def, &request.disks).any(|(_, p)| matches!(p.mode, DiskMode::External { .. }));
        // Of a running guest nothing is inside an image without its memory.
        let by_hand = self.body.is_some() && request.memory == MemoryMode::No;
        if external || by_hand || matches!(request.memory, MemoryMode::External(_)) {
            return self.create_external(request, journal).await;
        }
        self.create_internal(request, journal).await
    }

    /// How the parts beside disks and memory are captured.
    pub(super) fn record(&self, request: &SnapshotRequest, survey: &Survey) -> Record {
        let def = &self.machine.def;
        let copies = self.copies(request, survey);
        let copied = |suffix: &str| {
            let found = copies.iter().find(|(_, to)| to.extension().is_some_and(|extension| extension == suffix));
            found.map(|(_, to)| Part::File(to.clone()))
        };
        let inside = parts::variables(def).any(|(path, format)| format == "qcow2" && survey.is_there(&path));
        let nvram = copied("nvram").or((inside && !request.leave_out_nvram).then_some(Part::Internal));
        let has_tpm = parts::tpm(def, &self.state_dir).is_some() && !request.leave_out_tpm;
        let memory = (has_tpm && request.memory != MemoryMode::No).then_some(Part::Memory);
        Record { nvram, tpm: copied("tpm").or(memory), ..Record::default() }
    }

    /// Whether a guest must not go on between its disks and what is copied beside them, by the caller or by us, where it
    /// does not stand for its memory.
    pub(super) fn stands_for(&self, request: &SnapshotRequest, copies: &[(PathBuf, PathBuf)]) -> bool {
        self.machine.running && request.memory == MemoryMode::No && (by_hand(request) || !copies.is_empty())
    }

    /// The CPUs stop, if they are to: a disk is copied by hand now, or the guest is about to end.
    pub(super) async fn stand(&self, still: bool) {
        if let Some(body) = self.body.as_ref().filter(|_| still)
            && let Err(error) = body.patiently("stop", json!({})).await
        {
            tracing::error!(uuid = %self.machine.def.uuid, %error, "the guest was to stand still, and does not");
        }
    }

    /// The way to the guest's agent.
    pub(super) fn agent(&self) -> Result<&Arc<Body>, DriverError> {
        self.body.as_ref().ok_or(DriverError::Gone)
    }

    /// Lets the CPUs run, if they are to and there are any; those of a guest that has ended are past that.
    pub(super) async fn go_on(&self, on: bool) -> Result<(), DriverError> {
        match &self.body {
            Some(body) if on => match body.patiently("cont", json!({})).await {
                Ok(_) | Err(DriverError::Gone) => Ok(()),
                Err(error) => Err(error),
            },
            _ => Ok(()),
        }
    }

    /// The same where the snapshot is complete whether the guest goes on or not.
    pub(super) async fn go_on_if_it_can(&self, on: bool) {
        if let Err(error) = self.go_on(on).await {
            tracing::error!(uuid = %self.machine.def.uuid, %error, "the guest stands after its snapshot, and cannot go on");
        }
    }
}

/// Whether the caller copies a disk.
fn by_hand(request: &SnapshotRequest) -> bool {
    request.disks.iter().any(|part| part.mode == DiskMode::Manual)
}

/// More snapshots than are taken in one image from now on.
const MOST_TO_COME: u64 = 1_000_000;

/// Whether an image that holds these has given that number to a snapshot, or may do so: images number their snapshots from 1
/// on, one after the other. Dates, and times in seconds, as names are that nobody chose, are far beyond that.
fn may_be_number<'a>(name: &str, held: impl Iterator<Item = &'a InnerSnapshot>) -> bool {
    let plain = !name.starts_with('0') && name.bytes().all(|byte| byte.is_ascii_digit());
    let number = name.parse().ok().filter(|_| plain);
    let last = held.filter_map(|inner| inner.id.parse::<u64>().ok()).max().unwrap_or(0);
    number.is_some_and(|number: u64| number <= last.saturating_add(MOST_TO_COME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b1_only_what_an_image_may_count_to_is_a_number() {
        let inner = |id: &str| InnerSnapshot { id: id.into(), ..InnerSnapshot::default() };
        let held = [inner("3"), inner("20261127")];
        let is = |name: &str, held: &[InnerSnapshot]| may_be_number(name, held.iter());
        for name in ["1", "4", "2026", "123456"] {
            assert!(is(name, &[]), "{name}");
        }
        for name in ["20261128", "1795403655", "007", "", "2026-11-28", "99999999999999999999"] {
            assert!(!is(name, &held[..1]), "{name}");
        }
        assert!(is("20261128", &held), "somebody has made it count so far");
    }
}
