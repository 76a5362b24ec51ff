//! What is kept on disk to find a QEMU again, and when.
//!
//! ```text
//!   starting ──────▶ spawned ──────▶ loaded ───────────▶ running
//!   before anything  before QEMU     from a saved        CPUs run, or are told to when QEMU is ready,
//!   is lent          runs            machine only        or stand as asked
//! ```
//! A guest whose record says neither `loaded` nor `running` was cut off in its start: the next virtd ends it. One that is `loaded` may
//! have gone on from what was saved of it, which is not used again: the next virtd lets it go on. One that is `running` is let run
//! where its CPUs have never run: its QEMU may have been just at its beginning, and where it does not come to its end, the guest has
//! ended.

use super::changes::{Change, HostPart, Undoing};
use super::companion::Recorded;
use super::expanded;
use crate::host::process::Identity;
use crate::host::workers::blocking;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use uuid::Uuid;
use virt_model::domain::cpu::Cpu;
use virt_model::driver::{DriverError, Recorder};

/// How far a start has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Files may have been lent.
    Starting,
    /// There is a process.
    Spawned,
    /// It holds what was saved of the guest, which goes on from there with the next command.
    Loaded,
    /// The guest is up, or will be as soon as its QEMU is ready: nobody has more to do for that.
    Running,
}

/// The record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// How far its start has come.
    pub phase: Phase,
    /// The guest's uuid, which its QEMU must know.
    pub uuid: Uuid,
    /// The program, for people.
    pub exe: PathBuf,
    /// Where our monitor is.
    pub monitor: PathBuf,
    /// Where the output of this start begins in the log.
    pub log_start: u64,
    /// From `spawned` on.
    pub process: Option<Identity>,
    /// What runs beside it, from before `spawned` on.
    #[serde(default)]
    pub companions: Vec<Recorded>,
    /// What each of its devices has of the host's, or is just being given.
    #[serde(default)]
    pub host_parts: Vec<HostPart>,
    /// What an older virtd has changed on the host for it, which did not say for which device.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<Change>,
    /// What passes some of its cards is filtered, or is just about to be.
    #[serde(default)]
    pub filtered: bool,
    /// What it has to itself by that virtd.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub claims: Vec<String>,
    /// The next power-off is half of a reboot.
    #[serde(default)]
    pub rebooting: bool,
    /// A client has had file systems of the guest frozen, and they are to be thawed.
    #[serde(default)]
    pub frozen: bool,
    /// The CPU that QEMU made of what the definition leaves open, as an element.
    #[serde(default)]
    pub cpu: Option<String>,
}

impl Record {
    /// All that is to be undone when it has gone.
    pub fn undoing(&self) -> Undoing {
        let changes = self.changes.iter().cloned().chain(HostPart::changes_of(&self.host_parts)).collect();
        Undoing { changes, filtered: self.filtered }
    }

    /// All that it has of the host's to itself.
    pub fn all_claims(&self) -> Vec<String> {
        self.claims.iter().cloned().chain(HostPart::claims_of(&self.host_parts)).collect()
    }

    /// Has that device have nothing of the host's any more, and gives what it had. An earlier device of its name may have left some of it.
    pub fn take_part(&mut self, alias: &str) -> Option<HostPart> {
        let all = std::mem::take(&mut self.host_parts).into_iter();
        let (of_it, others): (Vec<_>, Vec<_>) = all.partition(|part| part.alias == alias);
        self.host_parts = others;
        of_it.into_iter().reduce(|part, more| HostPart {
            alias: part.alias,
            claims: [part.claims, more.claims].concat(),
            changes: [part.changes, more.changes].concat(),
            files: [part.files, more.files].concat(),
        })
    }

    /// Has that device have nothing of the host's any more; what was changed for it is undone with what was changed for the `other` one.
    pub fn hand_on_part(&mut self, alias: &str, other: &str) {
        let changes = self.take_part(alias).map(|part| part.changes).unwrap_or_default();
        match self.host_parts.iter_mut().find(|part| part.alias == other) {
            // Of a device that came back to the guest meanwhile, what was changed first is undone last.
            Some(heir) => heir.changes.splice(0..0, changes).for_each(drop),
            None => self.changes.extend(changes),
        }
    }
}

/// The record and its way to disk; writes one at a time, and none any more once it is closed.
pub struct Keeper {
    recorder: Arc<dyn Recorder>,
    record: Mutex<Option<Record>>,
}

impl Keeper {
    /// Keeps `record`, which is on disk or will be with the first change.
    pub fn new(recorder: Arc<dyn Recorder>, record: Record) -> Self {
        Keeper { recorder, record: Mutex::new(Some(record)) }
    }

    /// Changes the record, durably. Blocks.
    pub fn update(&self, change: impl FnOnce(&mut Record)) -> std::io::Result<()> {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(record) = record.as_mut() else { return Ok(()) };
        change(record);
        self.recorder.record(serde_json::to_value(&*record)?)
    }

    /// As [`Keeper::update`], from a task.
    pub async fn change(
        self: &Arc<Self>,
        change: impl FnOnce(&mut Record) + Send + 'static,
    ) -> Result<(), DriverError> {
        let keeper = self.clone();
        let written = blocking(move || keeper.update(change)).await?;
        written.map_err(|e| DriverError::Storage(format!("the guest's record cannot be written: {e}")))
    }

    /// The number of QEMU's process, once there is one.
    pub fn process_id(&self) -> Option<i32> {
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.as_ref()?.process.as_ref().map(|process| process.pid)
    }

    /// Whether a client has had file systems of the guest frozen.
    pub fn is_frozen(&self) -> bool {
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.as_ref().is_some_and(|record| record.frozen)
    }

    /// The CPU that QEMU made of what the definition leaves open, if that is known.
    pub fn cpu(&self) -> Option<Cpu> {
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        expanded::read(record.as_ref()?.cpu.as_ref()?)
    }

    /// What that device has of the host's, if anything, and the record as it is without that; nothing once it is closed.
    pub fn without(&self, alias: &str) -> Option<(Option<HostPart>, Record)> {
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rest = record.as_ref()?.clone();
        Some((rest.take_part(alias), rest))
    }

    /// The guest has gone: nothing is written from now on. What is to be undone is returned. Blocks while something is being
    /// written.
    pub fn close(&self) -> Undoing {
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner).take();
        record.map(|record| record.undoing()).unwrap_or_default()
    }
}
