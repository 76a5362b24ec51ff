//! Capturing in files beside images: overlays that take the writes from now on, memory in a file of its own.

use super::super::instance::Body;
use super::super::make;
use super::checkpoints::{go_on_with, sound};
use super::files::{beside, check_free_place, finished, make_empty, stored};
use super::note::{CreateExternal, Note, Overlay, Part, Record, taken, written};
use super::{Image, Operation, cannot, pairs, parts, undone};
use crate::agent;
use crate::host::files::{Seen, What};
use crate::host::image::Images;
use crate::host::workers::ClosedAside;
use crate::qemu::block::Nodes;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::device::Disk;
use virt_model::device::disk::MetadataCache;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{CreatedSnapshot, DiskMode, Journal, MemoryMode, SnapshotRequest};

impl Operation {
    /// New overlays take the writes, the memory goes to a file.
    pub(super) async fn create_external(
        &self,
        request: &SnapshotRequest,
        journal: &Arc<dyn Journal>,
    ) -> Result<CreatedSnapshot, DriverError> {
        let survey = self.survey(self.own_parts()).await?;
        let (mut record, copies) = (self.record(request, &survey), self.copies(request, &survey));
        let stands = self.stands_for(request, &copies);
        let mut note = CreateExternal {
            name: request.name.clone(),
            resume: self.machine.running && (request.memory != MemoryMode::No || stands),
            stay: request.stay_paused,
            frozen: request.quiesce,
            overlays: self.overlays(request)?,
            memory: match &request.memory {
                MemoryMode::External(path) => Some((beside(path), path.clone())),
                _ => None,
            },
            copies: copies.iter().map(|(_, to)| to.clone()).collect(),
            complete: None,
        };
        journal.note(written(&Note::CreateExternal(note.clone()))?).await?;
        // That it stands for a moment is nobody's business.
        let _quiet = self.body.as_ref().filter(|_| stands && !request.stay_paused).map(Quiet::keep);
        let captured = self.capture_external(request, &mut note, &mut record, copies, journal).await;
        if let Err(error) = captured {
            return Err(undone(error, self.undo_external(&note).await));
        }
        // What is frozen can be thawed only while it runs.
        let goes_on = note.resume && (!request.stay_paused || note.frozen);
        if goes_on {
            self.go_on_if_it_can(true).await;
            journal.step("resumed");
        }
        self.thaw(&note).await;
        self.stand(request.stay_paused && self.machine.running && (goes_on || !note.resume)).await;
        self.note_frozen(self.frozen_below(&note.overlays)).await;
        Ok(taken(record, Some(self.standing_on(&note.overlays))))
    }

    async fn capture_external(
        &self,
        request: &SnapshotRequest,
        note: &mut CreateExternal,
        record: &mut Record,
        copies: Vec<(PathBuf, PathBuf)>,
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        if request.quiesce {
            agent::freeze(self.agent()?).await?;
            journal.step("frozen");
        }
        if let (Some(body), Some((part, file))) = (&self.body, note.memory.clone()) {
            if self.machine.running && !request.live {
                body.patiently("stop", json!({})).await?;
                journal.step("stopped");
            }
            let (target, shown) = (part.clone(), part.clone());
            let new_file = move |images: &Arc<Images>| make::new_file(&target, images.lender.is_wary());
            let what = file.clone();
            let memory =
                self.with_images(&what, move |images| new_file(images).map_err(|e| stored(&shown, &e))).await?;
            body.line()?.write_memory(ClosedAside::of(memory), journal).await?;
            let bytes = self.machine.def.memory_kib() << 10;
            let finish = move |images: &Arc<Images>| finished(&part, &file, images.lender.is_wary());
            let finished = self.with_images_of(&what, bytes, finish);
            record.memory_bytes = Some(finished.await?);
            journal.step("memory");
        }
        if !request.reuse_external {
            self.make_overlays(note, journal).await?;
        }
        if let Some(body) = self.body.as_ref().filter(|_| self.stands_for(request, &copies)) {
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
    fn overlays(&self, request: &SnapshotRequest) -> Result<Vec<Overlay>, DriverError> {
        let mut overlays = Vec::new();
        for (disk, part) in pairs(&self.machine.def, &request.disks) {
            let DiskMode::External { path, block, format } = &part.mode else { continue };
            let target = &part.target;
            let base = disk.path().ok_or_else(|| cannot(format!("disk '{target}' has no file to stand on")))?;
            overlays.push(Overlay {
                target: target.clone(),
                path: path.clone(),
                block: *block,
                format: format.clone(),
                base: PathBuf::from(base),
                base_format: disk.meant_format().to_owned(),
                cache: request.caches.get(target).copied(),
                ours: !request.reuse_external && !block,
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
            if self.body.is_none() {
                self.keep_bitmaps(overlay.clone()).await?;
            }
            journal.step("overlay");
        }
        Ok(())
    }

    /// The overlay of a machine that is off goes on with the bitmaps of its base.
    async fn keep_bitmaps(&self, overlay: Overlay) -> Result<(), DriverError> {
        if (&*overlay.format, &*overlay.base_format) != ("qcow2", "qcow2") {
            return Ok(());
        }
        let Overlay { base, path, .. } = overlay;
        let lent = vec![(base.clone(), false)];
        let held = self.with_lent(lent, move |images| Ok(images.info(&base, "qcow2")?.bitmaps())).await?;
        // Each is a program's run: many would take longer than one errand may.
        for bitmap in sound(&held) {
            let (overlay, bitmap) = (path.clone(), bitmap.clone());
            self.with_lent(vec![(path.clone(), true)], move |images| images.add_bitmap(&overlay, &bitmap)).await?;
        }
        Ok(())
    }

    /// Makes one overlay; `size` if it is known.
    pub(super) async fn make_overlay(&self, overlay: Overlay, size: Option<u64>) -> Result<(), DriverError> {
        let what = overlay.path.clone();
        self.with_images(&what, move |images| {
            if overlay.ours {
                make_empty(&overlay.path, &overlay.base, images.lender.is_wary())?;
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
                let mut disk = disk.ok_or_else(|| DriverError::Internal("a disk is lost".to_owned()))?.clone();
                overlay.limit_cache(&mut disk);
                let (below, name) = (nodes.of_disk(&disk)?, nodes.free_name(&overlay.target));
                for node in
                    super::super::command::overlay_nodes(&disk, &overlay.path, overlay.block, &overlay.format, &name)
                {
                    let node_name = node["node-name"].as_str().unwrap_or_default().to_owned();
                    body.patiently("blockdev-add", node).await?;
                    added.push(node_name);
                }
                let top = format!("{name}-format");
                actions.push(json!({ "type": "blockdev-snapshot", "data": { "node": below.name, "overlay": top } }));
                if overlay.format == "qcow2" {
                    actions.extend(go_on_with(below, &top));
                }
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
        let thawed = match self.agent() {
            Ok(line) => agent::thaw(line).await,
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
                overlay.limit_cache(disk);
            }
        }
        now
    }
}

impl Overlay {
    /// Has a disk hold as much of this overlay's tables as was asked for.
    fn limit_cache(&self, disk: &mut Disk) {
        if let Some(bytes) = self.cache {
            disk.driver.get_or_insert_default().metadata_cache = Some(MetadataCache::of(bytes));
        }
    }
}

/// Whether an overlay can be made, or is there, at its place.
pub(super) fn check_overlay(
    target: &str,
    path: &Path,
    there: &Seen,
    block: bool,
    reuse: bool,
) -> Result<(), DriverError> {
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

/// While it lives, nobody is told that a guest stops and goes on.
pub(super) struct Quiet(Arc<Body>);

impl Quiet {
    pub(super) fn keep(body: &Arc<Body>) -> Quiet {
        body.reporter.be_quiet(true);
        Quiet(body.clone())
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        self.0.reporter.be_quiet(false);
    }
}
