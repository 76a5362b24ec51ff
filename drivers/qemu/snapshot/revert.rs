//! Going back to a snapshot: in the running process, or by bringing the images there.

use super::create::written;
use super::jobs::failed;
use super::nodes::Nodes;
use super::note::{Aside, Held, HeldDisk, HeldMemory, HeldMode, Note, Overlay, Part, Record, Revert};
use super::{Image, Operation, cannot, pairs, parts};
use serde_json::json;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::device::disk::BackingStore;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{
    DiskMode, DiskPart, FileChange, FileFate, Journal, Kept, Kin, MemoryMode, RevertPlan, Reverted,
};

/// The name under which images keep what they held before a revert, until that is settled.
const UNDO: &str = "virtd-undo";
/// How a file of QEMU's memory begins.
const MAGIC: &[u8; 4] = b"QEVM";

/// The definition as it is written down.
const KEPT: Form = Form { inactive: true, secure: true, migratable: false };

impl Operation {
    pub(super) async fn check_revert(
        &self,
        snapshot: &Kept,
        kin: &Kin,
        in_place: bool,
    ) -> Result<RevertPlan, DriverError> {
        let (record, name) = (record_of(snapshot), &snapshot.name);
        if in_place {
            self.keeps_what_is_written("going back within the running guest")?;
        }
        let images = self.held_images(snapshot, &record);
        self.not_frozen(snapshot, &images, kin)?;
        let holds = self.holders(name, &images).await?;
        for (image, found) in images.iter().zip(&holds) {
            let image = image.display();
            match found.len() {
                1 => {}
                0 => {
                    return Err(DriverError::Storage(format!(
                        "{image} does not hold the snapshot '{name}' any more; delete it with metadata-only"
                    )));
                }
                n => return Err(DriverError::Storage(format!("{image} holds {n} snapshots named '{name}'"))),
            }
        }
        if snapshot.memory == MemoryMode::Internal && !in_place {
            let has_memory = holds.first().and_then(|found| found.first()).is_some_and(|bytes| *bytes != Some(0));
            if !has_memory {
                return Err(DriverError::Storage(format!("the images hold no memory for the snapshot '{name}'")));
            }
        }
        if let MemoryMode::External(file) = &snapshot.memory {
            check_memory_file(file)?;
        }
        for part in [&record.nvram, &record.tpm].into_iter().flatten() {
            if let Part::File(file) = part
                && !file.exists()
            {
                return Err(DriverError::Storage(format!("{}: what was copied is not there any more", file.display())));
            }
        }
        let mut files = Vec::new();
        for overlay in self.new_overlays(snapshot)? {
            if !overlay.base.exists() {
                let (target, base) = (&overlay.target, overlay.base.display());
                return Err(DriverError::Storage(format!("disk '{target}': the frozen file {base} is not there")));
            }
            files.push(FileChange { path: overlay.path, what: FileFate::Created, bytes: 200 << 10 });
        }
        for path in self.abandoned(snapshot, kin) {
            files.push(FileChange { bytes: super::size(&path), path, what: FileFate::Deleted });
        }
        Ok(RevertPlan { files })
    }

    /// The images in which the snapshot is.
    pub(super) fn held_images(&self, snapshot: &Kept, record: &Record) -> Vec<Image> {
        super::internal_images(&snapshot.def, &snapshot.disks, record.nvram == Some(Part::Internal))
    }

    /// An image that another snapshot's overlay stands on is never written.
    fn not_frozen(&self, snapshot: &Kept, images: &[Image], kin: &Kin) -> Result<(), DriverError> {
        for other in &kin.others {
            for (disk, _) in
                pairs(&other.def, &other.disks).filter(|(_, p)| matches!(p.mode, DiskMode::External { .. }))
            {
                let frozen = chain(disk.path(), disk.backing.as_deref());
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

    /// For each image the snapshots of that name, with their bytes of memory where they are known.
    async fn holders(&self, name: &str, images: &[Image]) -> Result<Vec<Vec<Option<u64>>>, DriverError> {
        if let Some(body) = &self.body {
            let nodes = Nodes::of(body).await?;
            let open = |image: &Image| nodes.image(image, "qcow2");
            if images.iter().all(|image| open(image).is_some()) {
                let count = |image: &Image| {
                    let names = open(image).map(|node| node.snapshots.clone()).unwrap_or_default();
                    names.iter().filter(|inner| *inner == name).map(|_| None).collect()
                };
                return Ok(images.iter().map(count).collect());
            }
        }
        let (all, name) = (images.to_vec(), name.to_owned());
        let files = all.iter().map(|image| (image.clone(), false)).collect();
        self.with_lent(files, move |images| {
            let told = all.iter().map(|image| {
                let inner = images.info(image, "qcow2")?.snapshots.into_iter().filter(|inner| inner.name == name);
                Ok(inner.map(|inner| Some(inner.vm_state_size)).collect())
            });
            told.collect()
        })
        .await
    }

    pub(super) async fn load(&self, snapshot: &Kept, journal: &Arc<dyn Journal>) -> Result<(), DriverError> {
        let body = self.body.as_ref().ok_or(DriverError::Gone)?;
        let job = "virtd-snapshot-load";
        let note = |loaded| written(&Note::Load { job: job.to_owned(), snapshot: held(snapshot), loaded });
        journal.note(note(false)?).await?;
        body.patiently("stop", json!({})).await?;
        journal.point_of_no_return();
        let line = body.line()?;
        let nodes = Nodes::ask(&line).await?.of_images(&self.held_images(snapshot, &record_of(snapshot)))?;
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
        snapshot: &Kept,
        kin: &Kin,
        journal: &Arc<dyn Journal>,
    ) -> Result<Reverted, DriverError> {
        let record = record_of(snapshot);
        let mut aside = Aside {
            images: self.held_images(snapshot, &record),
            made: self.new_overlays(snapshot)?,
            abandoned: self.abandoned(snapshot, kin),
            copies: Vec::new(),
        };
        for (part, original) in self.copied_parts(snapshot, &record) {
            let kept = self.machine.folder.join(format!(".undo.{part}"));
            aside.copies.push((original, kept));
        }
        let note = Revert { snapshot: held(snapshot), aside };
        journal.note(written(&Note::Revert(note.clone()))?).await?;
        let brought = self.bring_back(snapshot, &record, &note.aside, journal).await;
        if let Err(error) = brought {
            self.put_back(&note.aside).await?;
            return Err(error);
        }
        Ok(self.reverted(snapshot, record, note.aside, kin))
    }

    /// The copies that are put in place: what part, and the file or folder it is a copy of.
    fn copied_parts(&self, snapshot: &Kept, record: &Record) -> Vec<(&'static str, PathBuf)> {
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
        snapshot: &Kept,
        record: &Record,
        aside: &Aside,
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        for image in &aside.images {
            let (image, name, lent) = (image.clone(), snapshot.name.clone(), vec![(image.clone(), true)]);
            self.with_lent(lent, move |images| {
                let kept = images.info(&image, "qcow2")?.snapshots.iter().any(|inner| inner.name == UNDO);
                if kept { Ok(()) } else { images.take(&image, UNDO) }?;
                images.apply(&image, &name)
            })
            .await?;
            journal.step("image");
        }
        for overlay in &aside.made {
            let _ = std::fs::remove_file(&overlay.path);
            self.make_overlay(overlay.clone(), None).await?;
            journal.step("overlay");
        }
        for ((part, original), (_, kept)) in self.copied_parts(snapshot, record).into_iter().zip(&aside.copies) {
            let from = match if part == "nvram" { &record.nvram } else { &record.tpm } {
                Some(Part::File(file)) => file.clone(),
                _ => continue,
            };
            let kept = kept.clone();
            self.with_images(move |_| {
                if original.exists() && !kept.exists() {
                    parts::copy(&original, &kept)?;
                }
                parts::copy(&from, &original)
            })
            .await?;
            journal.step("part");
        }
        Ok(())
    }

    pub(super) fn reverted(&self, snapshot: &Kept, mut record: Record, aside: Aside, kin: &Kin) -> Reverted {
        let mut def = snapshot.def.clone();
        let mut disks = snapshot.disks.clone();
        for overlay in &aside.made {
            for disk in def.devices.disks.iter_mut().filter(|disk| disk.target.dev == overlay.target) {
                disk.stand_on(&overlay.path, overlay.block, &overlay.format);
            }
            for part in disks.iter_mut().filter(|part| part.target == overlay.target) {
                let DiskMode::External { path, .. } = &mut part.mode else { continue };
                if aside.abandoned.contains(path) || !path.exists() && !needed(path, kin) {
                    // What it made is gone with the work that is given up: the new overlay takes its place.
                    path.clone_from(&overlay.path);
                } else {
                    record.reverts.push(overlay.path.clone());
                }
            }
        }
        Reverted {
            def,
            disks,
            record: serde_json::to_value(record).unwrap_or_default(),
            aside: serde_json::to_value(aside).unwrap_or_default(),
        }
    }

    pub(super) async fn settle(&self, reverted: &Reverted, stay: bool) -> Result<(), DriverError> {
        let aside: Aside = serde_json::from_value(reverted.aside.clone()).unwrap_or_default();
        if !stay {
            return self.put_back(&aside).await;
        }
        self.forget_in_images(UNDO, &aside.images, false).await?;
        let copies = aside.copies.into_iter().map(|(_, kept)| kept);
        self.remove_files(aside.abandoned.into_iter().chain(copies).collect()).await;
        Ok(())
    }

    /// What was before counts again.
    pub(super) async fn put_back(&self, aside: &Aside) -> Result<(), DriverError> {
        for image in &aside.images {
            let (image, lent) = (image.clone(), vec![(image.clone(), true)]);
            self.with_lent(lent, move |images| {
                if images.info(&image, "qcow2")?.snapshots.iter().any(|inner| inner.name == UNDO) {
                    images.apply(&image, UNDO)?;
                    images.forget(&image, UNDO)?;
                }
                Ok(())
            })
            .await?;
        }
        for (original, kept) in aside.copies.clone() {
            self.with_images(move |_| if kept.exists() { parts::copy(&kept, &original) } else { Ok(()) }).await?;
        }
        let made = aside.made.iter().filter(|overlay| overlay.ours).map(|overlay| overlay.path.clone());
        self.remove_files(made.chain(aside.copies.iter().map(|(_, kept)| kept.clone())).collect()).await;
        Ok(())
    }

    /// Fresh overlays on the files that an external snapshot froze.
    fn new_overlays(&self, snapshot: &Kept) -> Result<Vec<Overlay>, DriverError> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut overlays = Vec::new();
        for (disk, part) in pairs(&snapshot.def, &snapshot.disks) {
            let DiskMode::External { path: first, block, .. } = &part.mode else { continue };
            let target = &part.target;
            if *block {
                return Err(cannot(format!(
                    "disk '{target}' has its overlay on a block device, and no other device to go back on is known"
                )));
            }
            let base = PathBuf::from(disk.path().unwrap_or_default());
            let stem = base.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let place = |time: u64| first.with_file_name(format!("{stem}.{time}"));
            let path = (now..).map(place).find(|path| !path.exists()).unwrap_or_default();
            overlays.push(Overlay {
                target: target.clone(),
                path,
                block: false,
                format: "qcow2".to_owned(),
                base_format: disk.format().unwrap_or("raw").to_owned(),
                base,
                ours: true,
            });
        }
        Ok(overlays)
    }

    /// Overlays with work that is given up by the revert, and that nothing else needs.
    fn abandoned(&self, snapshot: &Kept, kin: &Kin) -> Vec<PathBuf> {
        let own = snapshot.disks.iter().filter_map(|part| match &part.mode {
            DiskMode::External { path, block: false, .. } => Some(path.clone()),
            _ => None,
        });
        let records = kin.others.iter().map(record_of).chain([record_of(snapshot)]);
        let reverts: BTreeSet<PathBuf> = records.flat_map(|record| record.reverts).collect();
        let tops = self.machine.def.devices.disks.iter().filter_map(|disk| disk.path().map(PathBuf::from));
        let mut files: Vec<PathBuf> = own.chain(tops.filter(|top| reverts.contains(top))).collect();
        files.retain(|file| file.exists() && !needed(file, kin));
        files.dedup();
        files
    }
}

/// Whether another snapshot, or the stored configuration, names the file.
pub(super) fn needed(file: &Path, kin: &Kin) -> bool {
    let named = |def: &DomainDef| {
        def.devices.disks.iter().any(|disk| chain(disk.path(), disk.backing.as_deref()).iter().any(|one| one == file))
    };
    let made = |part: &DiskPart| matches!(&part.mode, DiskMode::External { path, .. } if path == file);
    kin.others.iter().any(|other| named(&other.def) || other.disks.iter().any(made))
}

/// A disk's file and all below it.
pub(super) fn chain(path: Option<&str>, mut below: Option<&BackingStore>) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = path.map(PathBuf::from).into_iter().collect();
    while let Some(layer) = below {
        let source = layer.source.as_ref().and_then(|source| source.path(layer.kind.unwrap_or_default()));
        files.extend(source.map(PathBuf::from));
        below = layer.backing.as_deref();
    }
    files
}

/// What we kept with a snapshot; nothing for one that was restored without it.
pub(super) fn record_of(snapshot: &Kept) -> Record {
    serde_json::from_value(snapshot.record.clone()).unwrap_or_default()
}

fn check_memory_file(file: &Path) -> Result<(), DriverError> {
    let mut magic = [0; 4];
    let read = File::open(file).and_then(|mut file| file.read_exact(&mut magic));
    match read {
        Err(e) => Err(DriverError::Storage(format!("{}: {e}", file.display()))),
        Ok(()) if magic != *MAGIC => Err(DriverError::Storage(format!("{} holds no memory", file.display()))),
        Ok(()) => Ok(()),
    }
}

/// A snapshot as it is written down.
pub(super) fn held(snapshot: &Kept) -> Held {
    let disks = snapshot.disks.iter().map(|part| HeldDisk {
        target: part.target.clone(),
        mode: match &part.mode {
            DiskMode::No => HeldMode::No,
            DiskMode::Internal => HeldMode::Internal,
            DiskMode::Manual => HeldMode::Manual,
            DiskMode::External { path, block, format } => {
                HeldMode::External { path: path.clone(), block: *block, format: format.clone() }
            }
        },
    });
    Held {
        name: snapshot.name.clone(),
        def: snapshot.def.write(KEPT),
        disks: disks.collect(),
        memory: match &snapshot.memory {
            MemoryMode::No => HeldMemory::No,
            MemoryMode::Internal => HeldMemory::Internal,
            MemoryMode::External(file) => HeldMemory::External(file.clone()),
        },
        record: snapshot.record.clone(),
    }
}

/// The same, read again.
pub(super) fn kept(held: Held) -> Result<Kept, DriverError> {
    let def = DomainDef::parse(&held.def).map_err(DriverError::Config)?;
    let disks = held.disks.into_iter().map(|disk| DiskPart {
        target: disk.target,
        mode: match disk.mode {
            HeldMode::No => DiskMode::No,
            HeldMode::Internal => DiskMode::Internal,
            HeldMode::Manual => DiskMode::Manual,
            HeldMode::External { path, block, format } => DiskMode::External { path, block, format },
        },
    });
    Ok(Kept {
        name: held.name,
        memory: match held.memory {
            HeldMemory::No => MemoryMode::No,
            HeldMemory::Internal => MemoryMode::Internal,
            HeldMemory::External(file) => MemoryMode::External(file),
        },
        disks: disks.collect(),
        merging: BTreeSet::new(),
        def,
        record: held.record,
    })
}
