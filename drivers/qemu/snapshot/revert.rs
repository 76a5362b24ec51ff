//! Going back to a snapshot: in the running process, or by bringing the images there.

use super::super::make;
use super::files::{OVERLAY, check_space};
use super::note::{Aside, Note, NotedSnapshot, Overlay, Part, Record, Revert};
use super::note::{record_of, written};
use super::{Image, Operation, cannot, pairs, parts, undone};
use crate::host::files::Seen;
use crate::host::image::{ImageInfo, InnerSnapshot, without_bitmaps};
use crate::host::lock;
use crate::host::resolve::Place;
use crate::qemu::block::{Nodes, unmistakable};
use crate::qemu::monitor::failed;
use rustix::fs::FileType;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{
    DiskMode, DiskPart, ExistingSnapshot, FileChange, FileFate, Journal, MemoryMode, RevertPlan, Reverted, Siblings,
};

/// How the names begin under which images keep what they held before a revert, until that is settled. Each revert has one
/// of its own: what an earlier one left behind must never be taken for what was before a later one.
pub(super) const UNDO: &str = "virtd-undo";

impl Operation {
    pub(super) async fn check_revert(
        &self,
        snapshot: &ExistingSnapshot,
        siblings: &Siblings,
        in_place: bool,
    ) -> Result<RevertPlan, DriverError> {
        self.nobody_else_works().await?;
        let record = record_of(snapshot);
        if in_place {
            self.keeps_what_is_written("going back within the running guest")?;
        }
        let images = self.held_images(snapshot, &record);
        self.not_frozen(snapshot, &images, siblings)?;
        self.check_held(snapshot, &images).await?;
        let nodes = self.nodes().await?;
        self.hold_no_bitmaps(&images, nodes.as_ref()).await?;
        if let Some(nodes) = nodes.filter(|_| in_place) {
            nodes.of_images(&images)?;
        }
        if let MemoryMode::External(file) = &snapshot.memory {
            self.check_memory(file, record.memory_bytes).await?;
        }
        let (overlays, abandoned) = (self.new_overlays(snapshot).await?, self.abandoned(snapshot, siblings).await);
        let concerned = overlays.iter().flat_map(|overlay| [overlay.path.clone(), overlay.base.clone()]);
        let survey = concerned.chain(abandoned.iter().cloned()).chain(self.copies_and_originals(snapshot));
        let survey = self.survey(survey).await?;
        self.check_copies(snapshot, &survey)?;
        let mut files = Vec::new();
        for overlay in overlays {
            if !survey.is_there(&overlay.base) {
                let (target, base) = (&overlay.target, overlay.base.display());
                return Err(DriverError::Storage(format!("disk '{target}': the frozen file {base} is not there")));
            }
            check_space(&overlay.path, &survey.at(&overlay.path), OVERLAY)?;
            files.push(FileChange { path: overlay.path, what: FileFate::Created, bytes: OVERLAY });
        }
        for path in abandoned {
            files.push(FileChange { bytes: survey.size(&path), path, what: FileFate::Deleted });
        }
        let changed = self.changed_since_frozen(frozen_by(snapshot)).await?;
        Ok(RevertPlan { files, changed })
    }

    /// Whether the images hold the snapshot, once each, and its memory.
    async fn check_held(&self, snapshot: &ExistingSnapshot, images: &[Image]) -> Result<(), DriverError> {
        let name = &snapshot.name;
        for (number, (image, inner)) in images.iter().zip(self.inner(images).await?).enumerate() {
            if snapshot.memory == MemoryMode::Internal {
                unmistakable(name, image, &inner)?;
            }
            let image = image.display();
            let found: Vec<&InnerSnapshot> = inner.iter().filter(|inner| inner.name == *name).collect();
            match found[..] {
                [one] if number == 0 && snapshot.memory == MemoryMode::Internal && one.vm_state_size == 0 => {
                    return Err(DriverError::Storage(format!("the images hold no memory for the snapshot '{name}'")));
                }
                [_] => {}
                [] => {
                    return Err(DriverError::Storage(format!(
                        "{image} does not hold the snapshot '{name}' any more; delete it with metadata-only"
                    )));
                }
                _ => {
                    return Err(DriverError::Storage(format!(
                        "{image} holds {} snapshots named '{name}'; remove the wrong one with qemu-img",
                        found.len()
                    )));
                }
            }
        }
        Ok(())
    }

    /// The images in which the snapshot is.
    pub(super) fn held_images(&self, snapshot: &ExistingSnapshot, record: &Record) -> Vec<Image> {
        super::internal_images(&snapshot.def, &snapshot.disks, record.nvram == Some(Part::Internal))
    }

    /// An image that another snapshot's overlay stands on is never written.
    fn not_frozen(
        &self,
        snapshot: &ExistingSnapshot,
        images: &[Image],
        siblings: &Siblings,
    ) -> Result<(), DriverError> {
        for other in siblings.others.iter() {
            for (disk, _) in pairs(&other.def, &other.disks).filter(|(_, p)| p.mode.is_external()) {
                let frozen = disk.files();
                if let Some(image) = images.iter().find(|image| frozen.contains(*image)) {
                    return Err(DriverError::Unsupported(format!(
                        "{} holds '{}' and is what the external snapshot '{}' stands on; delete that first",
                        image.display(),
                        snapshot.name,
                        other.name
                    )));
                }
            }
        }
        Ok(())
    }

    /// Refuses images that could not be brought to a snapshot inside them for the bitmaps that they hold.
    pub(super) async fn hold_no_bitmaps(&self, images: &[Image], nodes: Option<&Nodes>) -> Result<(), DriverError> {
        let open = |image: &Image| nodes.and_then(|nodes| nodes.image(image, "qcow2"));
        for image in images {
            open(image).map_or(Ok(()), |node| without_bitmaps(image, &node.bitmaps))?;
        }
        let closed: Vec<Image> = images.iter().filter(|image| open(image).is_none()).cloned().collect();
        let files = closed.iter().map(|image| (image.clone(), false)).collect();
        self.with_lent(files, move |images| {
            closed.iter().try_for_each(|image| without_bitmaps(image, &images.info(image, "qcow2")?.bitmaps()))
        })
        .await
    }

    /// For each image what it holds.
    async fn inner(&self, images: &[Image]) -> Result<Vec<Vec<InnerSnapshot>>, DriverError> {
        if let Some(body) = &self.body {
            let nodes = Nodes::of(body).await?;
            let open = |image: &Image| nodes.image(image, "qcow2");
            if images.iter().all(|image| open(image).is_some()) {
                let inner = |image: &Image| open(image).map(|node| node.snapshots.clone()).unwrap_or_default();
                return Ok(images.iter().map(inner).collect());
            }
        }
        let (all, files) = (images.to_vec(), images.iter().map(|image| (image.clone(), false)).collect());
        self.with_lent(files, move |images| {
            all.iter().map(|image| Ok(images.info(image, "qcow2")?.snapshots)).collect()
        })
        .await
    }

    pub(super) async fn load(
        &self,
        snapshot: &ExistingSnapshot,
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        let body = self.body.as_ref().ok_or(DriverError::Gone)?;
        let job = "virtd-snapshot-load";
        let note = |loaded| written(&Note::Load { job: job.to_owned(), snapshot: NotedSnapshot::of(snapshot), loaded });
        journal.note(note(false)?).await?;
        body.patiently("stop", json!({})).await?;
        journal.point_of_no_return();
        // It may have taken its time to stand.
        if journal.cancelled().is_cancelled() {
            return Err(DriverError::Cancelled);
        }
        let line = body.line()?;
        let (nodes, images) = (Nodes::ask(&line).await?, self.held_images(snapshot, &record_of(snapshot)));
        nodes.unmistakable(&snapshot.name, &images)?;
        let nodes = nodes.of_images(&images)?;
        let arguments = json!({ "tag": snapshot.name, "vmstate": nodes.first(), "devices": nodes });
        // The job is forgotten only when what became of it is written down.
        line.begin("snapshot-load", job, arguments).await?;
        let loaded = line.ended(job).await?.map_err(|why| failed("snapshot-load", &why));
        if loaded.is_ok() {
            journal.note(note(true)?).await?;
        }
        line.dismiss(job).await;
        loaded
    }

    pub(super) async fn revert_images(
        &self,
        snapshot: &ExistingSnapshot,
        siblings: &Siblings,
        journal: &Arc<dyn Journal>,
    ) -> Result<Reverted, DriverError> {
        let record = self.own_record_of(snapshot);
        let images = self.held_images(snapshot, &record);
        let mut aside = Aside {
            strays: self.strays(&images).await?,
            tag: format!("{UNDO}-{}", Uuid::new_v4()),
            images,
            made: self.new_overlays(snapshot).await?,
            abandoned: self.abandoned(snapshot, siblings).await,
            copies: Vec::new(),
            begun: Some(Vec::new()),
        };
        for (part, original) in self.copied_parts(snapshot, &record) {
            let kept = self.machine.folder.join(format!(".undo.{part}"));
            aside.copies.push((original, kept));
        }
        let mut note = Revert { snapshot: NotedSnapshot::of(snapshot), aside };
        journal.note(written(&Note::Revert(note.clone()))?).await?;
        let brought = self.bring_back(snapshot, &record, &mut note, journal).await;
        if let Err(error) = brought {
            return Err(undone(error, self.put_back(&note.aside).await));
        }
        self.reverted(snapshot, record, note.aside, siblings).await
    }

    /// What earlier reverts kept in the images and could not remove: it goes when this one stays.
    async fn strays(&self, images: &[Image]) -> Result<Vec<String>, DriverError> {
        let (all, files) = (images.to_vec(), images.iter().map(|image| (image.clone(), false)).collect());
        self.with_lent(files, move |images| {
            let mut strays = BTreeSet::new();
            for image in &all {
                let inner = images.info(image, "qcow2")?.snapshots;
                strays.extend(inner.into_iter().map(|inner| inner.name).filter(|name| is_ours(name)));
            }
            Ok(strays.into_iter().collect())
        })
        .await
    }

    /// The copies that are put in place: what part, and the file or folder it is a copy of.
    pub(super) fn copied_parts(&self, snapshot: &ExistingSnapshot, record: &Record) -> Vec<(&'static str, PathBuf)> {
        let mut found = Vec::new();
        if let Some(Part::File(_)) = &record.nvram {
            found.extend(parts::variables(&snapshot.def).map(|(path, _)| ("nvram", path)));
        }
        if let Some(Part::File(_)) = &record.tpm {
            found.extend(parts::tpm(&snapshot.def, &self.state_dir).map(|path| ("tpm", path)));
        }
        found
    }

    /// Every step can be done again.
    pub(super) async fn bring_back(
        &self,
        snapshot: &ExistingSnapshot,
        record: &Record,
        note: &mut Revert,
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        for image in note.aside.images.clone() {
            let (tag, lent, at) = (note.aside.tag.clone(), vec![(image.clone(), true)], image.clone());
            let bytes = self.bookkeeping(&image).await?;
            self.with_lent_of(lent.clone(), bytes, move |images| {
                let info = images.info(&at, "qcow2")?;
                without_bitmaps(&at, &info.bitmaps())?;
                if info.snapshots.iter().any(|inner| inner.name == tag) { Ok(()) } else { images.take(&at, &tag) }
            })
            .await?;
            if let Some(begun) = &mut note.aside.begun {
                begun.push(image.clone());
                journal.note(written(&Note::Revert(note.clone()))?).await?;
            }
            let name = snapshot.name.clone();
            self.with_lent_of(lent, bytes, move |images| images.apply(&image, &name)).await?;
            journal.step("image");
        }
        let aside = &note.aside;
        for overlay in &aside.made {
            // Half of it may be there from a time before.
            let path = overlay.path.clone();
            self.with_images(&overlay.path, move |images| make::remove_file(&path, images.lender.is_wary())).await?;
            self.make_overlay(overlay.clone(), None).await?;
            journal.step("overlay");
        }
        for ((part, original), (_, kept)) in self.copied_parts(snapshot, record).into_iter().zip(&aside.copies) {
            let from = match if part == "nvram" { &record.nvram } else { &record.tpm } {
                Some(Part::File(file)) => file.clone(),
                _ => continue,
            };
            let (kept, what) = (kept.clone(), original.clone());
            self.with_images(&what, move |images| {
                let wary = images.lender.is_wary();
                if Seen::at(&original).is_there() && !Seen::at(&kept).is_there() {
                    parts::copy(&original, &kept, wary)?;
                }
                parts::copy(&from, &original, wary)
            })
            .await?;
            journal.step("part");
        }
        Ok(())
    }

    pub(super) async fn reverted(
        &self,
        snapshot: &ExistingSnapshot,
        mut record: Record,
        aside: Aside,
        siblings: &Siblings,
    ) -> Result<Reverted, DriverError> {
        let first = snapshot.disks.iter().filter_map(|part| match &part.mode {
            DiskMode::External { path, .. } => Some(path.clone()),
            _ => None,
        });
        let survey = self.survey(first).await?;
        let mut now = snapshot.def.clone();
        let def = Arc::make_mut(&mut now);
        let mut disks = snapshot.disks.clone();
        for overlay in &aside.made {
            for disk in def.devices.disks.iter_mut().filter(|disk| disk.target.dev == overlay.target) {
                disk.stand_on(&overlay.path, overlay.block, &overlay.format);
            }
            for part in disks.iter_mut().filter(|part| part.target == overlay.target) {
                let DiskMode::External { path, .. } = &mut part.mode else { continue };
                if aside.abandoned.contains(path) || !survey.is_there(path) && !needed(path, siblings) {
                    // What it made is gone with the work that is given up: the new overlay takes its place.
                    path.clone_from(&overlay.path);
                } else {
                    record.reverts.push(overlay.path.clone());
                }
            }
        }
        Ok(Reverted {
            def: now,
            disks,
            record: serde_json::to_value(record).unwrap_or_default(),
            aside: serde_json::to_value(aside).unwrap_or_default(),
        })
    }

    pub(super) async fn roll_back_revert(&self, reverted: &Reverted) -> Result<(), DriverError> {
        self.put_back(&aside_of(reverted)).await
    }

    pub(super) async fn commit_revert(&self, reverted: &Reverted) -> Result<(), DriverError> {
        let aside = aside_of(reverted);
        for name in aside.strays.iter().chain([&aside.tag]) {
            self.forget_in_images(name, &aside.images, false).await?;
        }
        let copies = aside.copies.into_iter().map(|(_, kept)| kept);
        let mut useless = Vec::new();
        for file in aside.abandoned {
            // The guest that ran has ended, and what runs now stands on another: this is somebody else's.
            match self.is_open(&file).await {
                true => tracing::warn!(file = %file.display(), "an overlay is left where it is: somebody has it open"),
                false => useless.push(file),
            }
        }
        self.remove_files(useless.into_iter().chain(copies).collect()).await;
        Ok(())
    }

    /// What was before counts again.
    pub(super) async fn put_back(&self, aside: &Aside) -> Result<(), DriverError> {
        self.goes_to_its_end();
        for image in &aside.images {
            let (image, tag, lent) = (image.clone(), aside.tag.clone(), vec![(image.clone(), true)]);
            // What was not begun is as it was, and why it could not be begun may be in the way of this, too.
            let begun = aside.begun.as_ref().is_none_or(|begun| begun.contains(&image));
            let bytes = self.bookkeeping(&image).await?;
            self.with_lent_of(lent, 2 * bytes, move |images| {
                if images.info(&image, "qcow2")?.snapshots.iter().any(|inner| inner.name == tag) {
                    if begun { images.apply(&image, &tag) } else { Ok(()) }?;
                    images.forget(&image, &tag)?;
                }
                Ok(())
            })
            .await?;
        }
        for (original, kept) in aside.copies.clone() {
            let what = kept.clone();
            self.with_images(&what, move |images| match Seen::at(&kept).is_there() {
                true => parts::copy(&kept, &original, images.lender.is_wary()),
                false => Ok(()),
            })
            .await?;
        }
        let made = aside.made.iter().filter(|overlay| overlay.ours).map(|overlay| overlay.path.clone());
        self.remove_files(made.chain(aside.copies.iter().map(|(_, kept)| kept.clone())).collect()).await;
        Ok(())
    }

    /// Fresh overlays on the files that an external snapshot froze, under names that nothing has.
    async fn new_overlays(&self, snapshot: &ExistingSnapshot) -> Result<Vec<Overlay>, DriverError> {
        let mut overlays = Vec::new();
        for (disk, part) in pairs(&snapshot.def, &snapshot.disks) {
            let DiskMode::External { path: first, block, .. } = &part.mode else { continue };
            let target = &part.target;
            if *block {
                return Err(cannot(format!(
                    "disk '{target}' has its overlay on a block device, and no other device to go back on is known"
                )));
            }
            overlays.push(Overlay {
                target: target.clone(),
                path: first.clone(),
                block: false,
                format: "qcow2".to_owned(),
                base_format: disk.meant_format().to_owned(),
                base: PathBuf::from(disk.path().unwrap_or_default()),
                cache: None,
                ours: true,
            });
        }
        let Some(what) = overlays.first().map(|overlay| overlay.path.clone()) else { return Ok(overlays) };
        self.with_images(&what, move |_| {
            find_names(&mut overlays);
            Ok(overlays)
        })
        .await
    }

    /// Overlays with work that is given up by the revert, and that nothing else needs: no other snapshot, as far as all
    /// can be read, and no snapshot inside them that nobody has a record of.
    async fn abandoned(&self, snapshot: &ExistingSnapshot, siblings: &Siblings) -> Vec<PathBuf> {
        if siblings.unreadable {
            return Vec::new();
        }
        let tops: BTreeSet<&str> = self.machine.def.devices.disks.iter().filter_map(|disk| disk.path()).collect();
        let mut files = Vec::new();
        for (disk, part) in pairs(&snapshot.def, &snapshot.disks) {
            if let (DiskMode::External { path, block: false, format }, Some(base)) = (&part.mode, disk.path()) {
                files.push((path.clone(), format.clone(), PathBuf::from(base)));
            }
        }
        for one in siblings.others.iter().map(|other| &**other).chain([snapshot]) {
            let made = self.own_reverts(one).await.into_iter();
            let top = made.filter(|(file, _)| file.to_str().is_some_and(|file| tops.contains(file)));
            files.extend(top.map(|(file, base)| (file, "qcow2".to_owned(), base)));
        }
        let mut abandoned = Vec::new();
        for (file, format, base) in files {
            let is_new = !abandoned.contains(&file) && !needed(&file, siblings);
            if is_new && self.is_mere_overlay(&file, &format, &base).await {
                abandoned.push(file);
            }
        }
        abandoned
    }

    /// Whether somebody has an image open; a guest of this machine's own, too.
    pub(super) async fn is_open(&self, file: &Path) -> bool {
        let (what, file) = (file, file.to_owned());
        let told = self.with_images(what, move |_| Ok(lock::is_open(&file).unwrap_or(false)));
        told.await.unwrap_or(true)
    }

    /// Overlays that reverts to a snapshot have made, each with what it stands on. A record may have been restored by
    /// anybody: what does not stand on a file that this snapshot froze is not among them.
    pub(super) async fn own_reverts(&self, snapshot: &ExistingSnapshot) -> Vec<(PathBuf, PathBuf)> {
        let frozen = pairs(&snapshot.def, &snapshot.disks).filter(|(_, p)| matches!(p.mode, DiskMode::External { .. }));
        let frozen: Vec<PathBuf> = frozen.filter_map(|(disk, _)| disk.path().map(PathBuf::from)).collect();
        let mut own = Vec::new();
        for file in record_of(snapshot).reverts {
            let base = self.overlay_at(&file, "qcow2").await.and_then(|info| info.full_backing_filename);
            if let Some(base) = base.filter(|base| frozen.contains(base)) {
                own.push((file, base));
            }
        }
        own
    }

    /// Whether a file is an overlay on that base.
    pub(super) async fn stands_on(&self, file: &Path, format: &str, base: &Path) -> bool {
        let told = self.overlay_at(file, format).await;
        told.is_some_and(|info| info.full_backing_filename.as_deref() == Some(base))
    }

    /// The same, and it holds nothing but what was written since.
    async fn is_mere_overlay(&self, file: &Path, format: &str, base: &Path) -> bool {
        let told = self.overlay_at(file, format).await;
        told.is_some_and(|info| info.full_backing_filename.as_deref() == Some(base) && info.snapshots.is_empty())
    }

    /// What a plain file says of itself; `None` if it is no such file, or no such image.
    async fn overlay_at(&self, file: &Path, format: &str) -> Option<ImageInfo> {
        let (file, format) = (file.to_owned(), format.to_owned());
        let what = file.clone();
        let told = self.with_images(&what, move |images| {
            let there = Place::resolve(&file, false).and_then(|place| place.stat());
            if !there.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile) {
                return Ok(None);
            }
            let _lent = images.lend(&[(file.clone(), false)])?;
            images.info(&file, &format).map(Some)
        });
        told.await.ok().flatten()
    }
}

/// Gives each overlay a name that nothing has, beside the first overlay that stood on its base. Blocks.
fn find_names(overlays: &mut [Overlay]) {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut chosen = BTreeSet::new();
    for overlay in overlays {
        let stem = overlay.base.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let place = |time: u64| overlay.path.with_file_name(format!("{stem}.{time}"));
        let is_free = |path: &PathBuf| !chosen.contains(path) && !Seen::at(path).named;
        overlay.path = (now..).map(place).find(is_free).unwrap_or_default();
        chosen.insert(overlay.path.clone());
    }
}

/// Whether another snapshot, or another machine, names the file.
pub(super) fn needed(file: &Path, siblings: &Siblings) -> bool {
    let named = |def: &DomainDef| def.devices.disks.iter().any(|disk| disk.files().iter().any(|one| one == file));
    let made = |part: &DiskPart| matches!(&part.mode, DiskMode::External { path, .. } if path == file);
    siblings.keep.iter().any(|kept| kept == file)
        || siblings.others.iter().any(|other| named(&other.def) || other.disks.iter().any(made))
}

/// What a snapshot's overlays have been laid on, and all below.
fn frozen_by(snapshot: &ExistingSnapshot) -> Vec<PathBuf> {
    let outside = pairs(&snapshot.def, &snapshot.disks).filter(|(_, p)| matches!(p.mode, DiskMode::External { .. }));
    outside.flat_map(|(disk, _)| disk.files()).collect()
}

/// What was kept aside for a revert.
fn aside_of(reverted: &Reverted) -> Aside {
    serde_json::from_value(reverted.aside.clone()).unwrap_or_default()
}

/// Whether a name inside an image is one that a revert has made.
fn is_ours(name: &str) -> bool {
    let rest = name.strip_prefix(UNDO).and_then(|rest| rest.strip_prefix('-'));
    rest.is_some_and(|rest| Uuid::try_parse(rest).is_ok())
}
