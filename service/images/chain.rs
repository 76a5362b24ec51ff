//! Chains of images, and which of its images a machine, or a snapshot, has in one.

use crate::volumes::by_name;
use std::path::PathBuf;
use std::sync::Arc;
use uuid::Uuid;
use virt_model::device::Disk;
use virt_model::device::disk::DiskDevice;
use virt_model::domain::DomainDef;
use virt_model::driver::snapshots::DiskMode;
use virt_model::snapshot::SnapshotDef;

/// A chain of images that somebody needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    /// The machine; nil where it is none.
    pub domain: Uuid,
    /// Who, for people: `domain 'web' (disk 'vda')`.
    pub whose: String,
    /// From the topmost image down.
    pub files: Vec<PathBuf>,
    /// What it is needed for.
    pub kind: ChainKind,
}

/// What a chain is needed for: by that it is known which of its images must stay as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ChainKind {
    /// It is a machine's disk, of which the topmost image may be written.
    Disk,
    /// It is a disk that a guest which runs only reads.
    ReadDisk,
    /// A block copy writes it, which is in no configuration.
    Copy,
    /// A snapshot needs what is below its topmost image, and that image, too, if it is `frozen`.
    Snapshot { name: Arc<str>, frozen: bool },
    /// It is a volume and what that was put on.
    Volume,
    /// A machine is about to have this one image.
    Begun,
}

impl ChainKind {
    /// The first of its images that must stay as it is, and with it all below.
    pub(super) fn fixed(&self) -> usize {
        match self {
            ChainKind::Disk | ChainKind::Volume | ChainKind::Snapshot { frozen: false, .. } => 1,
            ChainKind::ReadDisk | ChainKind::Copy | ChainKind::Begun | ChainKind::Snapshot { frozen: true, .. } => 0,
        }
    }

    /// The first of its images that it cannot do without if this becomes of them.
    pub(super) fn needed(&self, fate: Fate) -> usize {
        match (fate, self) {
            // A volume may be removed with all that needs it.
            (Fate::Written, _) | (Fate::Removed, ChainKind::Volume) => self.fixed(),
            (Fate::Removed, _) => 0,
        }
    }
}

impl Chain {
    /// Of a volume that was put on another.
    pub fn of_volume(whose: String, file: PathBuf, base: PathBuf) -> Chain {
        Chain { domain: Uuid::nil(), whose, files: vec![file, base], kind: ChainKind::Volume }
    }

    pub(super) fn show(&self, to: Shown<'_>) {
        to(&KeptChain { domain: self.domain, whose: &|| self.whose.clone(), files: &self.files, kind: &self.kind });
    }

    /// The snapshot that needs it, if that is one.
    pub fn snapshot(&self) -> Option<&Arc<str>> {
        match &self.kind {
            ChainKind::Snapshot { name, .. } => Some(name),
            _ => None,
        }
    }
}

/// The images of a disk: what is asked of all machines' disks, without the rest of their configurations.
#[derive(Clone, Debug)]
pub(crate) struct DiskImages {
    /// The disk's target, e.g. `vda`.
    pub target: Box<str>,
    /// From the topmost image down. That of a volume may be known by its name alone (`volumes::by_name`).
    pub files: Box<[PathBuf]>,
}

/// What is to become of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is written.
    Written,
    /// It is removed.
    Removed,
}

/// A chain where it is kept: what it is for people is put together where somebody needs it only.
pub(crate) struct KeptChain<'a> {
    /// As in [`Chain`].
    pub domain: Uuid,
    /// As in [`Chain`].
    pub whose: &'a dyn Fn() -> String,
    /// As in [`Chain`].
    pub files: &'a [PathBuf],
    /// As in [`Chain`].
    pub kind: &'a ChainKind,
}

impl KeptChain<'_> {
    /// A copy of it.
    pub fn to_chain(&self) -> Chain {
        Chain { domain: self.domain, whose: (self.whose)(), files: self.files.to_vec(), kind: self.kind.clone() }
    }
}

/// Who is shown each of some chains.
pub(crate) type Shown<'a> = &'a mut dyn FnMut(&KeptChain<'_>);

/// The images that a guest with this configuration writes.
pub(crate) fn written_by(def: &DomainDef) -> Vec<PathBuf> {
    written_of(def, |_| true)
}

/// Those of them that are of these disks.
pub(crate) fn written_of(def: &DomainDef, is_meant: impl Fn(&Disk) -> bool) -> Vec<PathBuf> {
    let written = def.devices.disks.iter().filter(|disk| is_meant(disk) && is_written(disk));
    written.filter_map(|disk| disk.path().map(PathBuf::from)).collect()
}

pub(super) fn is_written(disk: &Disk) -> bool {
    !disk.readonly && disk.transient.is_none() && disk.device() != DiskDevice::Cdrom
}

/// The images of each disk of a configuration that has any.
pub(crate) fn images_of(def: &DomainDef) -> impl Iterator<Item = DiskImages> {
    let disks = def.devices.disks.iter();
    let images = disks.map(|disk| {
        let files = disk.chain().filter_map(|layer| match (layer.path, layer.volume) {
            (Some(path), _) => Some(path.into()),
            // Of a volume whose place is not said its name stands for it.
            (None, Some((pool, volume))) => Some(by_name(pool, volume)),
            (None, None) => None,
        });
        let files = files.collect();
        DiskImages { target: (*disk.target.dev).into(), files }
    });
    images.filter(|disk| !disk.files.is_empty())
}

/// Shows the chain of a disk; `whose` says whose it is.
pub(crate) fn show_disk(domain: Uuid, whose: &str, target: &str, files: &[PathBuf], kind: &ChainKind, to: Shown<'_>) {
    to(&KeptChain { domain, whose: &|| format!("{whose} (disk '{target}')"), files, kind });
}

/// Shows the chains that a snapshot needs: what it froze, and what lies below an image that holds it.
pub(crate) fn show_snapshot(domain: Uuid, name: &str, def: &SnapshotDef, to: Shown<'_>) {
    for (disk, mode) in parts(def) {
        let target = &disk.target.dev;
        let frozen = match mode {
            // A merge that has begun makes the frozen file the machine's own again, wherever the rest of it stands.
            DiskMode::External { .. } if def.merging.contains(target) => false,
            DiskMode::External { .. } | DiskMode::Remote { .. } => true,
            DiskMode::Internal => false,
            DiskMode::No | DiskMode::Manual => continue,
        };
        let whose = format!("snapshot '{}' of domain '{name}'", def.name);
        let kind = ChainKind::Snapshot { name: (*def.name).into(), frozen };
        show_disk(domain, &whose, target, &disk.files(), &kind, to);
    }
}

/// A snapshot's disks, each with how it took part.
pub(super) fn parts(def: &SnapshotDef) -> impl Iterator<Item = (&Disk, &DiskMode)> {
    let disks = def.domain.iter().flat_map(|domain| &domain.devices.disks);
    disks.filter_map(|disk| Some((disk, &def.disks.iter().find(|part| part.target == disk.target.dev)?.mode)))
}
