//! A domain's snapshots: which there are, and the operations on them. What they do to images and guests is the driver's
//! matter (`virt_model::driver::snapshots`); what is kept and told of them, ours.
//!
//! ```text
//!  plan (no change) ─▶ job ─▶ turn ─▶ plan again ─▶ intent on disk ─▶ driver ─▶ configurations ─▶ record ─▶ intent gone
//!                                                       └── killed: recover.rs finishes or undoes it at the next start
//! ```

mod create;
mod delete;
mod journal;
mod plan;
mod recover;
mod redefine;
mod revert;
pub(super) mod set;

pub use create::{CreateCheck, CreateOptions};
pub use delete::DeleteOptions;
pub use plan::{Force, Plan, RevertOptions};

use super::Domain;
use super::state::State;
use crate::authz::{Action, Caller};
use crate::error::{Error, Result};
use crate::images;
use crate::job::Job;
use crate::lock::lock;
use crate::store::{Record, on_disk};
use crate::verb;
pub(in crate::domain) use journal::DomainJournal;
pub(in crate::domain) use plan::told;
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use virt_model::domain::DomainDef;
use virt_model::driver::snapshots::{DiskMode, DiskPart, ExistingSnapshot, FileFate, Machine, Snapshots};
use virt_model::snapshot::SnapshotDef;
use virt_model::state::DomainState;
use virt_model::xml::Finding;

/// The word for what becomes of a file.
fn fate(what: FileFate) -> &'static str {
    match what {
        FileFate::Created => "created",
        FileFate::Merged => "merged",
        FileFate::Deleted => "deleted",
    }
}

impl Domain {
    /// The names of its snapshots, in the order of their creation; only roots or leaves if that is asked.
    pub fn snapshots(&self, roots: bool, leaves: bool) -> Result<Vec<String>> {
        self.still_here()?;
        let state = lock(&self.state);
        let tree = &state.snapshots.tree;
        let parents: HashSet<&str> = tree.iter().filter_map(|node| node.parent.as_deref()).collect();
        let is_leaf = |name: &str| !parents.contains(name);
        let kept = tree.iter().filter(|node| !roots || node.parent.is_none());
        Ok(kept.filter(|node| !leaves || is_leaf(&node.name)).map(|node| node.name.clone()).collect())
    }

    /// Whether it has a snapshot of that name.
    pub fn has_snapshot(&self, name: &str) -> Result<()> {
        self.snapshot(name).map(drop)
    }

    /// A snapshot's document.
    pub async fn snapshot_xml(&self, caller: &Caller, name: &str, secure: bool) -> Result<String> {
        self.snapshot(name)?;
        self.allow_snapshot(caller, verb::SNAPSHOT_XML.action, name).await?;
        if secure {
            self.allow_snapshot(caller, Action::ReadSecure, name).await?;
        }
        let (mut record, parent) = {
            let state = lock(&self.state);
            let node = state.snapshots.tree.get(name).ok_or_else(|| state.no_snapshot(name))?;
            (Record::clone(&node.content), node.parent.clone())
        };
        if let Ok(def) = &mut record.def {
            def.parent = parent;
        }
        record.document(secure).map_err(Error::SnapshotBroken)
    }

    fn snapshot(&self, name: &str) -> Result<Arc<Record>> {
        let state = lock(&self.state);
        state.still_here()?;
        state.snapshots.get(name).ok_or_else(|| state.no_snapshot(name))
    }

    /// The same with what it says; `SnapshotBroken` if that cannot be used, `OperationUnsupported` where it is of what no driver
    /// here makes.
    fn usable_snapshot(&self, name: &str) -> Result<(Arc<Record>, SnapshotDef)> {
        let record = self.snapshot(name)?;
        match &record.def {
            Ok(def) => {
                if let Some((target, shown)) = def.disks.iter().find_map(remote) {
                    return Err(Error::OperationUnsupported(format!(
                        "snapshot '{name}' of domain '{}': the overlay of disk '{target}' is on a server ({shown}), and is \
                         neither gone back to nor merged here; delete it with metadata-only",
                        self.name()
                    )));
                }
                Ok((record.clone(), def.clone()))
            }
            Err(why) => Err(Error::SnapshotBroken(format!(
                "snapshot '{name}' of domain '{}' cannot be used: {why}; redefine it, or delete it with metadata-only",
                self.name()
            ))),
        }
    }

    /// The driver's part.
    pub(super) fn takes_snapshots(&self) -> Result<&dyn Snapshots> {
        self.driver.snapshots().ok_or_else(|| {
            let (name, driver) = (self.name(), self.driver.name());
            Error::OperationUnsupported(format!("domain '{name}': the driver '{driver}' cannot take snapshots"))
        })
    }

    /// The machine as the driver is to see it: what runs, or what is stored.
    pub(in crate::domain) async fn machine(&self) -> Result<Machine> {
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        let folder = on_disk(move || shared.store.snapshot_files(uuid)).await?;
        self.machine_in(folder)
    }

    fn machine_in(&self, folder: PathBuf) -> Result<Machine> {
        let (guest, running, stored) = {
            let state = lock(&self.state);
            state.still_here()?;
            if let Some(sought) = &state.sought {
                return Err(sought.refusal(&state.name));
            }
            state.sound()?;
            let running = matches!(state.state, DomainState::Running | DomainState::Idle);
            (state.guest.clone(), running, state.stored.clone())
        };
        let (def, guest) = match (guest, stored) {
            (Some(guest), _) => (guest.live, Some(guest.instance)),
            (None, Some(stored)) => {
                let mut def = self.shared.readings.of(&stored)?;
                self.shared.volumes.plug_what_is_there(&mut def);
                (def, None)
            }
            (None, None) => return Err(Error::NoSuchDomain { what: "name", value: self.name() }),
        };
        let mut machine = Machine { def, guest, running, folder };
        self.shared.images.declare(&mut machine.def);
        Ok(machine)
    }

    /// What is wrong below the disks of a configuration: files that were written after a snapshot of this machine had frozen
    /// them. The guest may find its disks damaged. That is told and nothing is refused for it: what stands on them now is all
    /// that there is.
    pub(crate) async fn changed_below(&self, def: &DomainDef) -> Vec<Finding> {
        let layers = def.devices.disks.iter().flat_map(|disk| disk.chain().skip(1).map(move |layer| (disk, layer)));
        let layers: Vec<_> =
            layers.filter_map(|(disk, layer)| Some((disk, layer, PathBuf::from(layer.path?)))).collect();
        if layers.is_empty() || lock(&self.state).snapshots.tree.is_empty() {
            return Vec::new();
        }
        let (Ok(driver), Ok(machine)) = (self.takes_snapshots(), self.machine().await) else { return Vec::new() };
        let files = layers.iter().map(|(_, _, file)| file.clone()).collect();
        let changed = match driver.changed_since_frozen(&machine, files).await {
            Ok(changed) => changed,
            Err(error) => {
                tracing::warn!(uuid = %self.uuid, name = self.name(), %error, "whether its frozen files have changed is not known");
                return Vec::new();
            }
        };
        let changed = layers.into_iter().filter(|(_, _, file)| changed.contains(file));
        let told = changed.map(|(disk, layer, file)| {
            let (target, file) = (&disk.target.dev, file.display());
            let text = format!(
                "disk '{target}' stands on {file}, which has been written since a snapshot froze it: the guest may find its \
                 file systems damaged; put the file back as it was, or check them"
            );
            Finding::warning(layer.at, text)
        });
        told.collect()
    }

    /// A snapshot as the driver is to see it.
    fn kept(&self, record: &Record, def: &SnapshotDef, machine: &Machine) -> ExistingSnapshot {
        self.kept_on(record, def, machine, &self.shared.images.recorded())
    }

    /// The same where it is known what snapshots have recorded of overlays.
    fn kept_on(
        &self,
        record: &Record,
        def: &SnapshotDef,
        machine: &Machine,
        recorded: &[images::Overlay],
    ) -> ExistingSnapshot {
        let mut machine = def.domain.as_ref().unwrap_or(&machine.def).clone();
        images::declare_in(&mut machine, recorded);
        ExistingSnapshot {
            name: def.name.clone(),
            memory: def.memory.clone(),
            disks: def.disks.clone(),
            merging: def.merging.clone(),
            def: machine,
            cpu: def.cpu.clone(),
            record: record.record.clone(),
        }
    }

    /// All others, as the driver is to see them.
    fn others(&self, name: &str, machine: &Machine) -> Arc<[Arc<ExistingSnapshot>]> {
        let records: Vec<Arc<Record>> = {
            let state = lock(&self.state);
            let others = state.snapshots.tree.iter().filter(|node| node.name != name);
            others.map(|node| node.content.clone()).collect()
        };
        let recorded = self.shared.images.recorded();
        let kept =
            |record: &Arc<Record>| Some(Arc::new(self.kept_on(record, record.def.as_ref().ok()?, machine, &recorded)));
        records.iter().filter_map(kept).collect()
    }

    /// Whether there are any of which it is not known what they stand on.
    fn has_unreadable(&self) -> bool {
        lock(&self.state).snapshots.tree.iter().any(|node| node.content.def.is_err())
    }

    /// The journal of what is done in a job.
    pub(in crate::domain) fn journal(self: &Arc<Self>, deed: crate::store::Deed, job: &Arc<Job>) -> Arc<DomainJournal> {
        self.journal_of(deed, Some(job.clone()), job.cancel_token())
    }

    pub(in crate::domain) fn journal_of(
        self: &Arc<Self>,
        deed: crate::store::Deed,
        job: Option<Arc<Job>>,
        cancel: &CancellationToken,
    ) -> Arc<DomainJournal> {
        let open = lock(&self.state).snapshots.open.clone();
        Arc::new(DomainJournal::new(self.clone(), deed, open, job, cancel.clone()))
    }

    /// Stores a record.
    async fn save_record(&self, record: Record) -> Result<()> {
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        on_disk(move || shared.store.save_snapshot(uuid, &record)).await
    }

    async fn save_current(&self, name: Option<String>) -> Result<()> {
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        on_disk(move || shared.store.save_current_snapshot(uuid, name.as_deref())).await
    }
}

/// The disk, and what is shown of its overlay, where that is on a server.
fn remote(part: &DiskPart) -> Option<(&str, &str)> {
    match &part.mode {
        DiskMode::Remote { shown } => Some((&part.target, shown)),
        _ => None,
    }
}

impl State {
    pub(super) fn no_snapshot(&self, name: &str) -> Error {
        let snapshot = virt_model::xml::shorten(name);
        Error::NoSuchSnapshot { domain: self.name.clone(), snapshot }
    }
}
