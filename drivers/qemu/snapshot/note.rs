//! What is written down before each change, so that it can be finished or undone by whoever finds it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::snapshots::{Capture, CreatedSnapshot, DiskPart, ExistingSnapshot, MemoryMode};
use virt_model::driver::{DriverError, StoredFile};

/// The last note of an operation.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "operation", rename_all = "kebab-case")]
pub enum Note {
    /// Internal: the snapshot may be in any of the images.
    CreateInternal(CreateInternal),
    /// External: files may be there, and the guest may stand on them.
    CreateExternal(CreateExternal),
    /// The running guest is being loaded.
    Load {
        /// The job.
        job: String,
        snapshot: NotedSnapshot,
        /// It is done.
        #[serde(default)]
        loaded: bool,
    },
    /// The guest stands aside, or is about to.
    Park,
    /// Images are being brought to a snapshot.
    Revert(Revert),
    /// Data is being removed.
    Delete(Delete),
    /// The machine is being saved.
    Save(Save),
}

/// A snapshot, as far as it is needed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NotedSnapshot {
    pub name: String,
    /// Its definition.
    pub def: String,
    pub disks: Vec<DiskPart>,
    pub memory: MemoryMode,
    pub record: serde_json::Value,
}

impl NotedSnapshot {
    /// As it is written down.
    pub fn of(snapshot: &ExistingSnapshot) -> NotedSnapshot {
        NotedSnapshot {
            name: snapshot.name.clone(),
            def: snapshot.def.write(Form::STORED),
            disks: snapshot.disks.clone(),
            memory: snapshot.memory.clone(),
            record: snapshot.record.clone(),
        }
    }

    /// As it is read again.
    pub fn read(self) -> Result<ExistingSnapshot, DriverError> {
        let NotedSnapshot { name, def, disks, memory, record } = self;
        let def = Arc::new(DomainDef::parse(&def).map_err(DriverError::Config)?);
        // What a note is of is made whole, and not started from.
        Ok(ExistingSnapshot { name, memory, disks, merging: BTreeSet::new(), def, cpu: None, record })
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CreateInternal {
    pub name: String,
    /// The CPUs ran, and go on if it comes to nothing.
    pub resume: bool,
    /// They do not once it is complete.
    #[serde(default)]
    pub stay: bool,
    /// virtd has them pause for it. Otherwise QEMU does that, and has them go on: whoever pauses the guest meanwhile means it.
    #[serde(default = "yes")]
    pub paused: bool,
    pub images: Vec<PathBuf>,
    /// Copies made beside.
    pub copies: Vec<PathBuf>,
    /// It is complete: what it came to.
    pub done: Option<Record>,
}

/// As earlier notes mean it that do not say it.
fn yes() -> bool {
    true
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CreateExternal {
    pub name: String,
    /// As above.
    pub resume: bool,
    /// As above.
    #[serde(default)]
    pub stay: bool,
    /// The guest's file systems are frozen.
    pub frozen: bool,
    pub overlays: Vec<Overlay>,
    /// The file that memory is written to, and the one that it becomes.
    pub memory: Option<(PathBuf, PathBuf)>,
    pub copies: Vec<PathBuf>,
    /// Memory, copies and overlays are there: from here on the guest may stand on the overlays.
    pub complete: Option<Record>,
}

/// An overlay that is made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Overlay {
    pub target: String,
    pub path: PathBuf,
    pub block: bool,
    pub format: String,
    pub base: PathBuf,
    pub base_format: String,
    /// How much of its tables may be held in memory, in bytes; as of the disk if that is not said.
    #[serde(default)]
    pub cache: Option<u64>,
    /// We make it, and remove it if it comes to nothing.
    pub ours: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Save {
    /// The file that is written, and the one that it becomes.
    pub part: PathBuf,
    pub file: PathBuf,
    /// The number of what is written in its file system, once it has been made.
    #[serde(default)]
    pub number: Option<u64>,
    /// The CPUs ran, and go on if it comes to nothing.
    pub resume: bool,
    /// It is whole: from here on the machine is saved.
    pub complete: bool,
    /// The guest has gone on by then: what is whole stays, whatever the guest does.
    #[serde(default)]
    pub goes_on: bool,
    /// A client has given the file by descriptor: it has no name, and only whoever has it open reaches it.
    #[serde(default)]
    pub given: bool,
    /// Of its memory alone: QEMU has its guest stand and go on by itself.
    #[serde(default)]
    pub memory_only: bool,
}

/// What is kept with a snapshot.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Record {
    /// How the variables were captured: `internal`, or a file.
    #[serde(default)]
    pub nvram: Option<Part>,
    /// The same for the TPM's state.
    #[serde(default)]
    pub tpm: Option<Part>,
    /// How long the file of its memory is.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Overlays that reverts to it have made: ours to remove when nothing needs them.
    #[serde(default)]
    pub reverts: Vec<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// In its own image.
    Internal,
    /// In the memory.
    Memory,
    /// In a file or folder.
    File(PathBuf),
}

impl Part {
    /// The file or folder, if that is where it is.
    pub fn into_file(self) -> Option<PathBuf> {
        if let Part::File(file) = self { Some(file) } else { None }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Revert {
    pub snapshot: NotedSnapshot,
    pub aside: Aside,
}

/// What a revert keeps until it is settled.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Aside {
    /// Images in which the state before is kept as a snapshot of its own.
    pub images: Vec<PathBuf>,
    /// Those of them that may have been changed since; `None` in notes that do not say it.
    #[serde(default)]
    pub begun: Option<Vec<PathBuf>>,
    /// The name of that, which nothing else ever had.
    #[serde(default = "once_fixed")]
    pub tag: String,
    /// Names of what earlier reverts kept there, and could not remove.
    #[serde(default)]
    pub strays: Vec<String>,
    /// Overlays that were made.
    pub made: Vec<Overlay>,
    /// Files that nothing needs once the revert stays.
    pub abandoned: Vec<PathBuf>,
    /// Copies: what they are of, and where they are.
    pub copies: Vec<(PathBuf, PathBuf)>,
}

/// In notes that say no name.
fn once_fixed() -> String {
    "virtd-undo".to_owned()
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Delete {
    pub snapshot: NotedSnapshot,
    /// What is merged, in this order.
    pub merges: Vec<Merge>,
    /// Overlays that nothing stands on.
    pub unlinks: Vec<PathBuf>,
    /// Which files the overlays were when it was looked whether they may go: none other goes. Nothing where an earlier virtd has
    /// noted it.
    #[serde(default)]
    pub judged: Option<Vec<StoredFile>>,
    /// The merge whose disk has been made whole while the guest stood: both files hold the same.
    pub synced: Option<String>,
    /// The guest stands for that, and is to go on.
    #[serde(default)]
    pub resume: bool,
    /// Merges that are done.
    pub merged: Vec<String>,
}

/// One overlay that goes into what it stands on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Merge {
    pub target: String,
    pub overlay: PathBuf,
    pub format: String,
    pub base: PathBuf,
    pub base_format: String,
    /// Files that stand on the overlay, with their formats: from then on they stand on the base.
    pub above: Vec<(PathBuf, String)>,
    /// It is in the chain of the machine as it is now.
    pub live: bool,
}

pub fn written(note: &Note) -> Result<serde_json::Value, DriverError> {
    serde_json::to_value(note).map_err(|e| DriverError::Internal(e.to_string()))
}

/// What a creation came to.
pub fn taken(record: Record, def: Option<Arc<DomainDef>>) -> CreatedSnapshot {
    let how = |part: &Option<Part>| {
        Some(match part.as_ref()? {
            Part::Internal => Capture::Internal,
            Part::Memory => Capture::Memory,
            Part::File(file) => Capture::File(file.clone()),
        })
    };
    let (nvram, tpm) = (how(&record.nvram), how(&record.tpm));
    // Plain data always becomes JSON.
    CreatedSnapshot { record: serde_json::to_value(record).unwrap_or_default(), def, nvram, tpm }
}

/// What we kept with a snapshot; nothing for one that was restored without it.
pub fn record_of(snapshot: &ExistingSnapshot) -> Record {
    serde_json::from_value(snapshot.record.clone()).unwrap_or_default()
}
