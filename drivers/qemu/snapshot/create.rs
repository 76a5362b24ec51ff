//! Taking a snapshot.

use super::super::declared;
use super::super::hostdev;
use super::super::instance::Body;
use super::super::make;
use super::agent::{Agent, socket};
use super::files::{OVERLAY, RESERVE, beside, check_free_place, check_space, finished, make_empty, stored};
use super::nodes::{Nodes, unmistakable};
use super::note::{CreateExternal, CreateInternal, Note, Overlay, Part, Record};
use super::revert::UNDO;
use super::survey::Survey;
use super::{Image, Operation, cannot, pairs, parts, undone};
use crate::host::files::{Seen, What};
use crate::host::image::{Images, InnerSnapshot};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::device::Disk;
use virt_model::device::disk::{DiskDevice, DiskKind};
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{
    Capture, CreatePlan, DiskMode, FileChange, FileFate, Journal, MemoryMode, Taken, Wish,
};
use virt_model::xml::{Finding, FindingKind};

impl Operation {
    pub(super) async fn check_create(&self, wish: &Wish) -> Result<CreatePlan, DriverError> {
        self.check_machine(wish).await?;
        self.check_chains(wish).await?;
        let survey = self.survey(self.concerned(wish)).await?;
        self.check_names(wish, &survey).await?;
        self.check_way_back(wish, &survey).await?;
        self.decide_create(wish, &survey)
    }

    /// All files that the snapshot would be made of, and those it is made from.
    fn concerned(&self, wish: &Wish) -> Vec<PathBuf> {
        let overlays = wish.disks.iter().filter_map(|part| match &part.mode {
            DiskMode::External { path, .. } => Some(path.clone()),
            _ => None,
        });
        let memory = match &wish.memory {
            MemoryMode::External(path) => Some(path.clone()),
            _ => None,
        };
        let images = super::internal_images(&self.machine.def, &wish.disks, true);
        overlays.chain(memory).chain(images).chain(self.own_parts()).collect()
    }

    /// What would be made, where everything that is there allows it.
    fn decide_create(&self, wish: &Wish, survey: &Survey) -> Result<CreatePlan, DriverError> {
        let mut files = Vec::new();
        let created = |path: &Path, bytes| FileChange { path: path.to_owned(), what: FileFate::Created, bytes };
        for (_, part) in pairs(&self.machine.def, &wish.disks) {
            let DiskMode::External { path, block, .. } = &part.mode else { continue };
            check_overlay(&part.target, path, &survey.at(path), *block, wish.reuse_external)?;
            if !wish.reuse_external && !block {
                files.push(created(path, OVERLAY));
            }
        }
        let memory = self.machine.def.memory_kib() << 10;
        if let MemoryMode::External(path) = &wish.memory {
            check_free_place(path, &survey.at(path), "the memory's file")?;
            check_space(path, &survey.at(path), memory / 64 + RESERVE)?;
            files.push(created(path, memory));
        }
        let copies = self.copies(wish, survey);
        files.extend(copies.iter().map(|(from, to)| created(to, survey.size(from))));
        if wish.memory == MemoryMode::Internal
            && let Some(image) = super::internal_images(&self.machine.def, &wish.disks, false).first()
        {
            check_space(image, &survey.at(image), RESERVE)?;
        }
        let pauses = wish.memory != MemoryMode::No && !wish.live || self.stands_for(wish, &copies);
        Ok(CreatePlan { files, pauses_guest: self.machine.running && pauses })
    }

    /// Whether machine and guest can be captured as they are.
    async fn check_machine(&self, wish: &Wish) -> Result<(), DriverError> {
        let def = &self.machine.def;
        let internal = pairs(def, &wish.disks).any(|(_, part)| part.mode == DiskMode::Internal);
        if !wish.leave_out_nvram
            && internal
            && let Some((path, format)) = parts::variables(def).find(|(_, format)| format != "qcow2")
        {
            return Err(DriverError::Unsupported(format!(
                "its firmware variables ({}, {format}) are not in qcow2 and cannot be captured inside their image; \
                 use disk-only, or leave out nvram",
                path.display()
            )));
        }
        if wish.memory != MemoryMode::No {
            self.keeps_what_is_written("memory without what it knows of its disk")?;
        }
        for (disk, part) in pairs(def, &wish.disks).filter(|(_, part)| part.mode != DiskMode::No) {
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
        if wish.quiesce && by_hand(wish) {
            return Err(cannot(
                "a disk is copied by hand while the guest stands, and file systems that are frozen then are never \
                 thawed: leave out quiesce",
            ));
        }
        let Some(body) = &self.body else { return Ok(()) };
        self.nobody_else_works().await?;
        if wish.memory != MemoryMode::No {
            if let Some(why) = hostdev::keeps_memory_here(def) {
                return Err(DriverError::Refused(format!("its memory cannot be captured: {why}; use disk-only")));
            }
            let told = body.patiently("query-migrate", json!({})).await?;
            let blockers: Vec<&str> =
                told["blocked-reasons"].as_array().into_iter().flatten().filter_map(|why| why.as_str()).collect();
            if !blockers.is_empty() {
                return Err(DriverError::Refused(format!("its memory cannot be captured: {}", blockers.join("; "))));
            }
            self.can_send_memory(body, wish).await?;
        }
        if wish.quiesce {
            self.agent().await?;
        }
        Ok(())
    }

    /// A QEMU whose memory has been written to a file, and whose guest has not gone on since, does not write it again.
    async fn can_send_memory(&self, body: &Body, wish: &Wish) -> Result<(), DriverError> {
        if !matches!(wish.memory, MemoryMode::External(_)) {
            return Ok(());
        }
        let status = body.patiently("query-status", json!({})).await?;
        match status["status"].as_str() {
            Some("postmigrate") => Err(DriverError::Refused(
                "its memory has been written to a file already, and it has been paused since: resume it for a moment, or \
                 take the snapshot with disk-only"
                    .to_owned(),
            )),
            _ => Ok(()),
        }
    }

    /// The images are what the definition says, and overlays that the caller has made are what they will be said to be.
    async fn check_chains(&self, wish: &Wish) -> Result<(), DriverError> {
        let def = &self.machine.def;
        let mut images = declared::images(def);
        for (disk, part) in pairs(def, &wish.disks).filter(|_| wish.reuse_external) {
            if let (DiskMode::External { path, format, .. }, Some(base)) = (&part.mode, disk.path()) {
                images.push(declared::Image {
                    whose: format!("disk '{}'", part.target),
                    path: path.clone(),
                    format: format.clone(),
                    below: declared::Below::File(base.into(), disk.format().unwrap_or("raw").to_owned()),
                    at: disk.at.clone(),
                });
            }
        }
        declared::hold_images(&self.workers, def.uuid, images).await
    }

    /// What is taken inside images can be gone back to.
    async fn check_way_back(&self, wish: &Wish, survey: &Survey) -> Result<(), DriverError> {
        let with_nvram = self.record(wish, survey).nvram == Some(Part::Internal);
        let images = super::internal_images(&self.machine.def, &wish.disks, with_nvram);
        self.hold_no_bitmaps(&images).await
    }

    /// A name that an image holds already would be two snapshots' afterwards.
    async fn check_names(&self, wish: &Wish, survey: &Survey) -> Result<(), DriverError> {
        let name = &wish.name;
        if name.starts_with(UNDO) {
            return Err(bad_name(format!(
                "a snapshot's name cannot begin with '{UNDO}', which names what reverts keep"
            )));
        }
        let inside = !super::internal_images(&self.machine.def, &wish.disks, false).is_empty()
            || self.record(wish, survey).nvram == Some(Part::Internal);
        if inside && may_be_number(name) {
            return Err(bad_name(format!(
                "'{name}' reads like the number of a snapshot in an image, which QEMU and its tools would take for it; \
                 choose a name with a letter"
            )));
        }
        for (image, inner) in self.held_in_images(wish, survey).await? {
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
        wish: &Wish,
        survey: &Survey,
    ) -> Result<Vec<(Image, Vec<InnerSnapshot>)>, DriverError> {
        let images = super::internal_images(&self.machine.def, &wish.disks, true);
        match &self.body {
            Some(body) => {
                let nodes = Nodes::of(body).await?;
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
    fn copies(&self, wish: &Wish, survey: &Survey) -> Vec<(PathBuf, PathBuf)> {
        let def = &self.machine.def;
        let mut copies = Vec::new();
        let internal = pairs(def, &wish.disks).any(|(_, part)| part.mode == DiskMode::Internal);
        let place = |part: &str| self.copy_place(&wish.name, part);
        if !wish.leave_out_nvram && !internal {
            // In the transaction of a running guest, qcow2 keeps them itself; not where its memory has been sent to a file:
            // QEMU has let go of its images then, takes nothing into them, and they can be copied as they are.
            let open = self.body.is_some() && !matches!(wish.memory, MemoryMode::External(_));
            let inside = |format: &str| open && format == "qcow2";
            let variables = parts::variables(def).filter(|(path, format)| !inside(format) && survey.is_there(path));
            copies.extend(variables.map(|(path, _)| (path, place("nvram"))));
        }
        if !wish.leave_out_tpm && wish.memory == MemoryMode::No {
            let state = parts::tpm(def, &self.state_dir).filter(|path| survey.is_there(path));
            copies.extend(state.map(|path| (path, place("tpm"))));
        }
        copies
    }

    pub(super) async fn create(&self, wish: &Wish, journal: &Arc<dyn Journal>) -> Result<Taken, DriverError> {
        let external = pairs(&self.machine.def, &wish.disks).any(|(_, p)| matches!(p.mode, DiskMode::External { .. }));
        // Of a running guest nothing is inside an image without its memory.
        let by_hand = self.body.is_some() && wish.memory == MemoryMode::No;
        if external || by_hand || matches!(wish.memory, MemoryMode::External(_)) {
            return self.create_external(wish, journal).await;
        }
        self.create_internal(wish, journal).await
    }

    /// How the parts beside disks and memory are captured.
    fn record(&self, wish: &Wish, survey: &Survey) -> Record {
        let def = &self.machine.def;
        let copies = self.copies(wish, survey);
        let copied = |suffix: &str| {
            let found = copies.iter().find(|(_, to)| to.extension().is_some_and(|extension| extension == suffix));
            found.map(|(_, to)| Part::File(to.clone()))
        };
        let inside = parts::variables(def).any(|(path, format)| format == "qcow2" && survey.is_there(&path));
        let nvram = copied("nvram").or((inside && !wish.leave_out_nvram).then_some(Part::Internal));
        let has_tpm = parts::tpm(def, &self.state_dir).is_some() && !wish.leave_out_tpm;
        let memory = (has_tpm && wish.memory != MemoryMode::No).then_some(Part::Memory);
        Record { nvram, tpm: copied("tpm").or(memory), ..Record::default() }
    }

    /// All of it inside the images.
    async fn create_internal(&self, wish: &Wish, journal: &Arc<dyn Journal>) -> Result<Taken, DriverError> {
        let survey = self.survey(self.own_parts()).await?;
        let (record, copies) = (self.record(wish, &survey), self.copies(wish, &survey));
        let with_nvram = record.nvram == Some(Part::Internal);
        let images = super::internal_images(&self.machine.def, &wish.disks, with_nvram);
        let resume = self.machine.running;
        let mut note = CreateInternal {
            name: wish.name.clone(),
            resume,
            stay: wish.stay_paused,
            images: images.clone(),
            copies: copies.iter().map(|(_, to)| to.clone()).collect(),
            done: None,
        };
        journal.note(written(&Note::CreateInternal(note.clone()))?).await?;
        let captured = async {
            self.copy_all(copies, journal).await?;
            match &self.body {
                Some(body) => self.save_in_images(body, wish, &images, journal).await?,
                None => self.take_in_images(wish, &images, journal).await?,
            }
            if journal.cancelled().is_cancelled() { Err(DriverError::Cancelled) } else { Ok(()) }
        };
        if let Err(error) = captured.await {
            return Err(undone(error, self.undo_internal(&note).await));
        }
        journal.point_of_no_return();
        self.goes_to_its_end();
        note.done = Some(record.clone());
        journal.note(written(&Note::CreateInternal(note))?).await?;
        self.go_on_if_it_can(resume && !wish.stay_paused).await;
        journal.step("resumed");
        Ok(taken(record, None))
    }

    async fn copy_all(&self, copies: Vec<(PathBuf, PathBuf)>, journal: &Arc<dyn Journal>) -> Result<(), DriverError> {
        for (from, to) in copies {
            let (what, bytes) = (from.clone(), self.size(&from).await?);
            self.with_images_of(&what, bytes, move |images| parts::copy(&from, &to, images.user.is_some())).await?;
            journal.step("copied");
        }
        Ok(())
    }

    async fn save_in_images(
        &self,
        body: &Arc<Body>,
        wish: &Wish,
        images: &[Image],
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        if self.machine.running {
            body.patiently("stop", json!({})).await?;
            journal.step("stopped");
        }
        let nodes = Nodes::of(body).await?.of_images(images)?;
        let arguments = json!({ "tag": wish.name, "vmstate": nodes.first(), "devices": nodes });
        body.line()?.job("snapshot-save", "virtd-snapshot-save", arguments, Some(journal)).await?;
        journal.step("saved");
        Ok(())
    }

    async fn take_in_images(
        &self,
        wish: &Wish,
        images: &[Image],
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        for image in images {
            let (name, image, file) = (wish.name.clone(), image.clone(), image.clone());
            let bytes = self.bookkeeping(&image).await?;
            self.with_lent_of(vec![(file, true)], bytes, move |images| images.take(&image, &name)).await?;
            journal.step("taken");
        }
        Ok(())
    }

    /// About the bytes that are written where all that an image holds is counted once more.
    pub(super) async fn bookkeeping(&self, image: &Path) -> Result<u64, DriverError> {
        // A dozen for each 64 KiB.
        Ok(self.size(image).await? >> 10)
    }

    /// Leaves nothing of an internal snapshot that came to nothing.
    pub(super) async fn undo_internal(&self, note: &CreateInternal) -> Result<(), DriverError> {
        self.goes_to_its_end();
        let removed = self.forget_in_images(&note.name, &note.images, false).await;
        self.remove_files(note.copies.clone()).await;
        let resumed = self.go_on(note.resume).await;
        removed.and(resumed)
    }

    /// Removes a snapshot from images, wherever it is.
    pub(super) async fn forget_in_images(
        &self,
        name: &str,
        images: &[Image],
        must_be_open: bool,
    ) -> Result<(), DriverError> {
        let frozen = self.still_frozen(images).await;
        let forgotten = self.forget_wherever(name, images, must_be_open).await;
        if !frozen.is_empty() {
            self.note_frozen(frozen).await;
        }
        forgotten
    }

    async fn forget_wherever(&self, name: &str, images: &[Image], must_be_open: bool) -> Result<(), DriverError> {
        if let Some(body) = &self.body {
            match self.forget_in_guest(body, name, images, must_be_open).await {
                Err(DriverError::Gone) if body.is_gone_soon().await => {}
                done => return done,
            }
        }
        let survey = self.survey(images.iter().cloned()).await?;
        let there: Vec<Image> = images.iter().filter(|image| survey.is_there(image)).cloned().collect();
        let bytes = there.iter().map(|image| survey.size(image) >> 10).sum();
        let (name, files) = (name.to_owned(), there.iter().map(|image| (image.clone(), true)).collect());
        let forget = move |images: &Arc<Images>| there.iter().try_for_each(|image| images.forget(image, &name));
        self.with_lent_of(files, bytes, forget).await
    }

    async fn forget_in_guest(
        &self,
        body: &Body,
        name: &str,
        images: &[Image],
        must_be_open: bool,
    ) -> Result<(), DriverError> {
        let nodes = Nodes::of(body).await?;
        let mut holders = Vec::new();
        for image in images {
            match nodes.image(image, "qcow2") {
                Some(node) if node.snapshots.iter().any(|inner| inner.name == name) => holders.push(node.name.clone()),
                Some(_) => {}
                None if must_be_open => {
                    let image = image.display();
                    return Err(DriverError::Refused(format!(
                        "{image}, which holds '{name}', is not what the running guest has open; shut it down first"
                    )));
                }
                None => {}
            }
        }
        if holders.is_empty() {
            return Ok(());
        }
        let arguments = json!({ "tag": name, "devices": holders });
        body.line()?.job("snapshot-delete", "virtd-snapshot-delete", arguments, None).await
    }

    /// New overlays take the writes, the memory goes to a file.
    async fn create_external(&self, wish: &Wish, journal: &Arc<dyn Journal>) -> Result<Taken, DriverError> {
        let survey = self.survey(self.own_parts()).await?;
        let (mut record, copies) = (self.record(wish, &survey), self.copies(wish, &survey));
        let stands = self.stands_for(wish, &copies);
        let mut note = CreateExternal {
            name: wish.name.clone(),
            resume: self.machine.running && (wish.memory != MemoryMode::No || stands),
            stay: wish.stay_paused,
            frozen: wish.quiesce,
            overlays: self.overlays(wish)?,
            memory: match &wish.memory {
                MemoryMode::External(path) => Some((beside(path), path.clone())),
                _ => None,
            },
            copies: copies.iter().map(|(_, to)| to.clone()).collect(),
            complete: None,
        };
        journal.note(written(&Note::CreateExternal(note.clone()))?).await?;
        // That it stands for a moment is nobody's business.
        let _quiet = self.body.as_ref().filter(|_| stands && !wish.stay_paused).map(Quiet::keep);
        let captured = self.capture_external(wish, &mut note, &mut record, copies, journal).await;
        if let Err(error) = captured {
            return Err(undone(error, self.undo_external(&note).await));
        }
        // What is frozen can be thawed only while it runs.
        let goes_on = note.resume && (!wish.stay_paused || note.frozen);
        if goes_on {
            self.go_on_if_it_can(true).await;
            journal.step("resumed");
        }
        self.thaw(&note).await;
        self.stand(wish.stay_paused && self.machine.running && (goes_on || !note.resume)).await;
        self.note_frozen(self.frozen_below(&note.overlays)).await;
        Ok(taken(record, Some(self.standing_on(&note.overlays))))
    }

    /// Whether a guest must not go on between its disks and what is copied beside them, by the caller or by us, where it
    /// does not stand for its memory.
    fn stands_for(&self, wish: &Wish, copies: &[(PathBuf, PathBuf)]) -> bool {
        self.machine.running && wish.memory == MemoryMode::No && (by_hand(wish) || !copies.is_empty())
    }

    /// The CPUs stop, if they are to: a disk is copied by hand now, or the guest is about to end.
    pub(super) async fn stand(&self, still: bool) {
        if let Some(body) = self.body.as_ref().filter(|_| still)
            && let Err(error) = body.patiently("stop", json!({})).await
        {
            tracing::error!(uuid = %self.machine.def.uuid, %error, "the guest was to stand still, and does not");
        }
    }

    async fn capture_external(
        &self,
        wish: &Wish,
        note: &mut CreateExternal,
        record: &mut Record,
        copies: Vec<(PathBuf, PathBuf)>,
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        if wish.quiesce {
            self.agent().await?.freeze().await?;
            journal.step("frozen");
        }
        if let (Some(body), Some((part, file))) = (&self.body, note.memory.clone()) {
            if self.machine.running && !wish.live {
                body.patiently("stop", json!({})).await?;
                journal.step("stopped");
            }
            let (target, shown) = (part.clone(), part.clone());
            let new_file = move |images: &Arc<Images>| make::new_file(&target, images.user.is_some());
            let what = file.clone();
            let memory =
                self.with_images(&what, move |images| new_file(images).map_err(|e| stored(&shown, &e))).await?;
            body.line()?.write_memory(memory, journal).await?;
            let bytes = self.machine.def.memory_kib() << 10;
            let finish = move |images: &Arc<Images>| finished(&part, &file, images.user.is_some());
            let finished = self.with_images_of(&what, bytes, finish);
            record.memory_bytes = Some(finished.await?);
            journal.step("memory");
        }
        if !wish.reuse_external {
            self.make_overlays(note, journal).await?;
        }
        if let Some(body) = self.body.as_ref().filter(|_| self.stands_for(wish, &copies)) {
            body.patiently("stop", json!({})).await?;
            journal.step("stopped");
        }
        self.copy_all(copies, journal).await?;
        if journal.cancelled().is_cancelled() {
            return Err(DriverError::Cancelled);
        }
        journal.point_of_no_return();
        self.goes_to_its_end();
        note.complete = Some(record.clone());
        journal.note(written(&Note::CreateExternal(note.clone()))?).await?;
        if let Some(body) = &self.body {
            let inner = record.nvram == Some(Part::Internal);
            match self.switch(body, note, inner).await {
                Ok(()) => {}
                // Whether it had changed over only what is inside can tell, all of it being one step; where nothing is,
                // an overlay without a change is as good as its base.
                Err(DriverError::Gone) if !body.is_gone_soon().await || self.is_inside(&note.name, record).await => {}
                Err(error) => {
                    // Nobody stands on them.
                    note.complete = None;
                    return Err(error);
                }
            }
            journal.step("switched");
        }
        Ok(())
    }

    /// Whether the variables' image holds what it was to hold; without doubt only if nobody has it open.
    pub(super) async fn is_inside(&self, name: &str, record: &Record) -> bool {
        if record.nvram != Some(Part::Internal) {
            return true;
        }
        let images: Vec<Image> = parts::variables(&self.machine.def).map(|(path, _)| path).collect();
        let (name, files) = (name.to_owned(), images.iter().map(|image| (image.clone(), false)).collect());
        let told = self.with_lent(files, move |tools| {
            let holds = |image: &Image| Ok(tools.info(image, "qcow2")?.snapshots.iter().any(|one| one.name == name));
            images.iter().map(holds).collect::<Result<Vec<bool>, DriverError>>()
        });
        // Overlays are not removed in doubt.
        !told.await.is_ok_and(|told| told.contains(&false))
    }

    /// The overlays that are to be.
    fn overlays(&self, wish: &Wish) -> Result<Vec<Overlay>, DriverError> {
        let mut overlays = Vec::new();
        for (disk, part) in pairs(&self.machine.def, &wish.disks) {
            let DiskMode::External { path, block, format } = &part.mode else { continue };
            let target = &part.target;
            let base = disk.path().ok_or_else(|| cannot(format!("disk '{target}' has no file to stand on")))?;
            overlays.push(Overlay {
                target: target.clone(),
                path: path.clone(),
                block: *block,
                format: format.clone(),
                base: PathBuf::from(base),
                base_format: disk.format().unwrap_or("raw").to_owned(),
                ours: !wish.reuse_external && !block,
            });
        }
        Ok(overlays)
    }

    /// Those that the caller has not made.
    async fn make_overlays(&self, note: &CreateExternal, journal: &Arc<dyn Journal>) -> Result<(), DriverError> {
        let nodes = match &self.body {
            Some(body) => Some(Nodes::of(body).await?),
            None => None,
        };
        for overlay in &note.overlays {
            let known = nodes.as_ref().and_then(|nodes| nodes.image(&overlay.base, &overlay.base_format));
            self.make_overlay(overlay.clone(), known.map(|node| node.virtual_size)).await?;
            journal.step("overlay");
        }
        Ok(())
    }

    /// Makes one overlay; `size` if it is known.
    pub(super) async fn make_overlay(&self, overlay: Overlay, size: Option<u64>) -> Result<(), DriverError> {
        let what = overlay.path.clone();
        self.with_images(&what, move |images| {
            if overlay.ours {
                make_empty(&overlay.path, &overlay.base, images.user.is_some())?;
            }
            let _lent = images.lend(&[(overlay.base.clone(), false), (overlay.path.clone(), true)])?;
            let size = match size {
                Some(size) => size,
                None => images.info(&overlay.base, &overlay.base_format)?.virtual_size,
            };
            images.overlay(&overlay.path, &overlay.format, &overlay.base, &overlay.base_format, size)
        })
        .await
    }

    /// All disks at once.
    async fn switch(&self, body: &Body, note: &CreateExternal, inner_variables: bool) -> Result<(), DriverError> {
        let mut actions = Vec::new();
        let mut added: Vec<String> = Vec::new();
        let prepared = async {
            let files: Vec<(PathBuf, bool)> = note.overlays.iter().map(|one| (one.path.clone(), true)).collect();
            if let Some((what, _)) = files.first().cloned() {
                self.with_images(&what, move |images| images.lend_to_guest(&files)).await?;
            }
            for overlay in &note.overlays {
                let nodes = Nodes::of(body).await?;
                let disk = self.machine.def.devices.disks.iter().find(|disk| disk.target.dev == overlay.target);
                let disk = disk.ok_or_else(|| DriverError::Internal("a disk is lost".to_owned()))?;
                let (below, name) = (nodes.of_disk(disk)?.name.clone(), nodes.free_name(&overlay.target));
                for node in
                    super::super::command::overlay_nodes(disk, &overlay.path, overlay.block, &overlay.format, &name)
                {
                    let node_name = node["node-name"].as_str().unwrap_or_default().to_owned();
                    body.patiently("blockdev-add", node).await?;
                    added.push(node_name);
                }
                let data = json!({ "node": below, "overlay": format!("{name}-format") });
                actions.push(json!({ "type": "blockdev-snapshot", "data": data }));
            }
            if inner_variables {
                let nodes = Nodes::of(body).await?;
                for (path, _) in parts::variables(&self.machine.def) {
                    let node = nodes.image(&path, "qcow2").map(|node| node.name.clone());
                    let data = json!({ "device": node, "name": note.name });
                    actions.push(json!({ "type": "blockdev-snapshot-internal-sync", "data": data }));
                }
            }
            if actions.is_empty() {
                return Ok(());
            }
            body.patiently("transaction", json!({ "actions": actions })).await.map(drop)
        };
        let done = prepared.await;
        if done.is_err() {
            for node in added.iter().rev() {
                let _ = body.patiently("blockdev-del", json!({ "node-name": node })).await;
            }
        }
        done
    }

    /// Leaves nothing of an external snapshot that came to nothing: nobody stands on its overlays.
    pub(super) async fn undo_external(&self, note: &CreateExternal) -> Result<(), DriverError> {
        self.goes_to_its_end();
        self.thaw(note).await;
        let ours = note.overlays.iter().filter(|overlay| overlay.ours).map(|overlay| overlay.path.clone());
        let memory = note.memory.iter().flat_map(|(part, file)| [part.clone(), file.clone()]);
        self.remove_files(ours.chain(memory).chain(note.copies.iter().cloned()).collect()).await;
        self.go_on(self.machine.running || note.resume).await
    }

    pub(super) async fn thaw(&self, note: &CreateExternal) {
        if !note.frozen {
            return;
        }
        let thawed = match self.agent().await {
            Ok(mut agent) => agent.thaw().await,
            Err(error) => Err(error),
        };
        if let Err(error) = thawed {
            let uuid = self.machine.def.uuid;
            tracing::error!(%uuid, %error, "the guest's file systems may still be frozen: thaw them in the guest");
        }
    }

    /// What the overlays have been laid on, and all below.
    pub(super) fn frozen_below(&self, overlays: &[Overlay]) -> Vec<PathBuf> {
        let laid = |disk: &&Disk| overlays.iter().any(|overlay| overlay.target == disk.target.dev);
        let disks = self.machine.def.devices.disks.iter().filter(laid);
        disks.flat_map(|disk| disk.files()).collect()
    }

    /// The machine with its disks on the overlays.
    pub(super) fn standing_on(&self, overlays: &[Overlay]) -> Arc<DomainDef> {
        let mut now = self.machine.def.clone();
        let def = Arc::make_mut(&mut now);
        for overlay in overlays {
            for disk in def.devices.disks.iter_mut().filter(|disk| disk.target.dev == overlay.target) {
                disk.stand_on(&overlay.path, overlay.block, &overlay.format);
            }
        }
        now
    }

    async fn agent(&self) -> Result<Agent, DriverError> {
        let socket = socket(&self.machine.def).ok_or_else(|| {
            DriverError::AgentUnavailable(
                "the domain has no channel for a guest agent: add <channel type='unix'> with the target \
                 org.qemu.guest_agent.0"
                    .to_owned(),
            )
        })?;
        Agent::connect(&socket).await
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
    async fn go_on_if_it_can(&self, on: bool) {
        if let Err(error) = self.go_on(on).await {
            tracing::error!(uuid = %self.machine.def.uuid, %error, "the guest stands after its snapshot, and cannot go on");
        }
    }
}

/// Whether an overlay can be made, or is there, at its place.
fn check_overlay(target: &str, path: &Path, there: &Seen, block: bool, reuse: bool) -> Result<(), DriverError> {
    let shown = path.display();
    match there.what {
        What::Nothing if block || reuse => {
            Err(cannot(format!("disk '{target}': there is no {shown} to be its overlay")))
        }
        What::Nothing => check_free_place(path, there, &format!("the overlay of disk '{target}'")),
        What::Block => Ok(()),
        _ if block => Err(cannot(format!("disk '{target}': {shown} is no block device"))),
        What::Plain if reuse || there.length == 0 => Ok(()),
        _ => Err(cannot(format!(
            "disk '{target}': {shown} is there already and is not empty; choose another file, or reuse-external"
        ))),
    }
}

/// Whether the caller copies a disk.
fn by_hand(wish: &Wish) -> bool {
    wish.disks.iter().any(|part| part.mode == DiskMode::Manual)
}

/// While it lives, nobody is told that a guest stops and goes on.
struct Quiet(Arc<Body>);

impl Quiet {
    fn keep(body: &Arc<Body>) -> Quiet {
        body.reporter.be_quiet(true);
        Quiet(body.clone())
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        self.0.reporter.be_quiet(false);
    }
}

pub(super) fn written(note: &Note) -> Result<serde_json::Value, DriverError> {
    serde_json::to_value(note).map_err(|e| DriverError::Internal(e.to_string()))
}

/// What a creation came to.
pub(super) fn taken(record: Record, def: Option<Arc<DomainDef>>) -> Taken {
    let how = |part: &Option<Part>| {
        Some(match part.as_ref()? {
            Part::Internal => Capture::Internal,
            Part::Memory => Capture::Memory,
            Part::File(file) => Capture::File(file.clone()),
        })
    };
    let (nvram, tpm) = (how(&record.nvram), how(&record.tpm));
    // Plain data always becomes JSON.
    Taken { record: serde_json::to_value(record).unwrap_or_default(), def, nvram, tpm }
}

/// Images number their snapshots from 1 on, one after the other. A time in seconds, as names are that nobody chose, is far
/// beyond that.
fn may_be_number(name: &str) -> bool {
    (1..10).contains(&name.len()) && !name.starts_with('0') && name.bytes().all(|byte| byte.is_ascii_digit())
}

/// A name that nothing can have here.
fn bad_name(message: String) -> DriverError {
    let (kind, path) = (FindingKind::Unsupported, "/name".to_owned());
    DriverError::Config(vec![Finding { kind, line: 0, column: 0, path, message }])
}
