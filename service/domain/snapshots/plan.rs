//! What a revert would do: the matrix of what runs, what the snapshot holds, and what is wanted, as one function.

use super::{Domain, fate};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::images;
use crate::lock::lock;
use crate::verb;
use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::domain::abi::{AbiDifference, Strictness};
use virt_model::domain::cpu::Cpu;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{
    DiskMode, ExistingSnapshot, FileChange, FileFate, Machine, MemoryMode, RevertPlan,
};
use virt_model::snapshot::{SnapshotDef, SnapshotState};
use virt_model::state::{Defined, DomainState, Lifecycle, Resumed, Started, Stopped, Suspended};
use virt_model::xml::refusals;

/// How a domain is reverted.
#[derive(Clone, Debug, Default)]
pub struct RevertOptions {
    /// It runs afterwards.
    pub running: bool,
    /// It stands afterwards.
    pub paused: bool,
    /// The firmware's variables are made anew.
    pub reset_nvram: bool,
    /// A new process is fine, whatever differs.
    pub respawn: bool,
    /// Which risks are accepted.
    pub force: Force,
    /// Cancel when the caller leaves the bus.
    pub cancel_on_disconnect: bool,
}

/// Which risks of a revert are accepted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Force {
    /// None.
    #[default]
    No,
    /// All that are reported.
    All,
    /// Just these.
    These(Vec<String>),
}

/// The guest would find its machine changed.
const ABI_CHANGED: &str = "abi-changed";
/// The process ends, and with it displays and connections.
const NEW_PROCESS: &str = "new-process";
/// There is a saved image that would no longer fit the disks.
const MANAGED_SAVE: &str = "managed-save";
/// What the snapshot froze has been written since: it is not what was taken.
const FROZEN_CHANGED: &str = "frozen-changed";
const RISKS: [&str; 4] = [ABI_CHANGED, NEW_PROCESS, MANAGED_SAVE, FROZEN_CHANGED];

/// What an operation would do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Tokens: what may be lost.
    pub risks: Vec<&'static str>,
    /// Those of them that the caller has not accepted.
    pub unaccepted: Vec<&'static str>,
    /// What the guest would notice.
    pub differences: Vec<AbiDifference>,
    /// A new process is started.
    pub starts_new_process: bool,
    /// What would be told, in order.
    pub events: Vec<Lifecycle>,
    /// Path, what becomes of it, bytes.
    pub files: Vec<(String, &'static str, u64)>,
    /// Frozen files that have been written since.
    pub changed: Vec<PathBuf>,
}

/// A revert that has been thought through.
pub(super) struct Planned {
    pub def: SnapshotDef,
    pub kept: ExistingSnapshot,
    pub machine: Machine,
    pub plan: Plan,
    /// Files that would be of no use, but for other machines.
    pub keep: Vec<PathBuf>,
    /// Have a guest afterwards, and whether it stands.
    pub active: Option<bool>,
    /// In the process that runs.
    pub in_place: bool,
}

impl Domain {
    /// What a revert would do; an error where it would be refused whatever is forced. Changes nothing.
    pub async fn check_revert(&self, caller: &Caller, name: &str, options: &RevertOptions) -> Result<Result<Plan>> {
        self.snapshot(name)?;
        self.allow_snapshot(caller, verb::CHECK_REVERT.action, name).await?;
        options.check()?;
        Ok(self.plan_revert(name, options).await.map(|planned| planned.plan))
    }

    pub(super) async fn plan_revert(&self, name: &str, options: &RevertOptions) -> Result<Planned> {
        self.takes_snapshots()?;
        let (record, def) = self.usable_snapshot(name)?;
        if let Some(target) = def.merging.first() {
            let domain = self.name();
            return Err(Error::OperationInvalid(format!(
                "cannot revert domain '{domain}' to '{name}': deleting it was cut off, and what disk '{target}' was frozen \
                 in has been written to; delete it again to finish the merge"
            )));
        }
        self.opens_no_given_image("revert")?;
        self.disks_are_idle(None)?;
        self.is_not_backed_up()?;
        let machine = self.machine().await?;
        let (domain_name, now, persistent, saved) = {
            let state = lock(&self.state);
            (state.name.clone(), state.state, state.stored.is_some(), state.managed_save)
        };
        let Some(taken) = def.domain.as_ref() else {
            let text = format!("'{name}' holds no configuration; redefine it with a full domain");
            return Err(Error::OperationInvalid(text));
        };
        let active = wanted(&def, options);
        if active.is_none() && !persistent {
            let text = format!("'{domain_name}' is transient: ask for running or paused");
            return Err(Error::OperationInvalid(text));
        }
        if options.reset_nvram {
            variables_can_be_reset(name, taken, active.is_some())?;
        }
        let to = renamed(taken, &domain_name);
        let differences = match &machine.guest {
            Some(guest) if def.has_memory() => differences(&machine.def, guest.expanded_cpu(), &to, def.cpu.as_ref()),
            _ => Vec::new(),
        };
        let kept = self.kept(&record, &def, &machine);
        let loads =
            machine.guest.is_some() && def.has_memory() && matches!(now, DomainState::Running | DomainState::Paused);
        let fits = differences.is_empty() && to.genid.is_none() && !options.reset_nvram && !options.respawn;
        let same_parts = same_disks(&machine.def, &to) && same_tpm_keys(&machine.def, &to);
        let in_place = loads && fits && def.memory == MemoryMode::Internal && same_parts;
        if active.is_some() && def.has_memory() {
            opens_its_tpm(name, &def, &machine.def, &to)?;
        }
        let mut risks = Vec::new();
        if !options.respawn && machine.guest.is_some() && now != DomainState::Crashed {
            risks.extend((!differences.is_empty()).then_some(ABI_CHANGED));
            risks.extend((active.is_some() && !in_place).then_some(NEW_PROCESS));
        }
        risks.extend((saved && !def.has_memory()).then_some(MANAGED_SAVE));
        let (mut checked, keep) = self.check_images(name, &kept, &machine, in_place).await?;
        checked.files.extend(self.managed_save_file().await);
        risks.extend((!checked.changed.is_empty()).then_some(FROZEN_CHANGED));
        if active.is_some() && !in_place {
            self.would_start(&with_cpu(&to, def.cpu.as_ref().filter(|_| def.has_memory()))).await?;
        }
        let unaccepted = risks.iter().copied().filter(|risk| !options.force.accepts(risk)).collect();
        let plan = Plan {
            risks,
            unaccepted,
            differences,
            starts_new_process: active.is_some() && !in_place,
            events: events(now, active, in_place, persistent),
            files: told(&checked.files),
            changed: checked.changed,
        };
        Ok(Planned { def, kept, machine, plan, keep, active, in_place })
    }

    /// What the driver would do, without the removal of what other machines stand on; and what that is.
    async fn check_images(
        &self,
        name: &str,
        kept: &ExistingSnapshot,
        machine: &Machine,
        in_place: bool,
    ) -> Result<(RevertPlan, Vec<PathBuf>)> {
        self.may_bring_back(name, kept).await?;
        let siblings = self.siblings(name, &[], machine)?;
        let checked = self.takes_snapshots()?.check_revert(machine, kept, &siblings, in_place).await;
        let mut checked = checked.map_err(|e| self.not_reverted(name, e))?;
        let keep = self.needed_elsewhere(&checked.files).await;
        checked.files.retain(|file| !keep.contains(&file.path));
        Ok((checked, keep))
    }

    /// Refuses to bring images back to a snapshot inside them that other machines stand on.
    async fn may_bring_back(&self, name: &str, kept: &ExistingSnapshot) -> Result<()> {
        let inside =
            |target: &str| kept.disks.iter().any(|part| part.target == target && part.mode == DiskMode::Internal);
        let disks = kept.def.devices.disks.iter().filter(|disk| inside(&disk.target.dev));
        let written: Vec<PathBuf> = disks.filter_map(|disk| disk.path().map(PathBuf::from)).collect();
        let deed = format!("cannot revert domain '{}' to snapshot '{name}'", self.name());
        let remedy = "make those images whole (qemu-img rebase -b \"\"), or undefine what needs them";
        self.shared.images.refuse_in_use(&deed, &written, images::Fate::Written, Some(self.uuid), remedy).await
    }

    /// Of the files that a revert would remove, those that another machine stands on: they stay.
    async fn needed_elsewhere(&self, files: &[FileChange]) -> Vec<PathBuf> {
        let removed = files.iter().filter(|file| file.what == FileFate::Deleted);
        let removed: Vec<PathBuf> = removed.map(|file| file.path.clone()).collect();
        self.shared.images.users_of(&removed, images::Fate::Removed, Some(self.uuid)).await.into_keys().collect()
    }

    /// The configuration to go back to is one that can be started here, and all that it needs of the host is there.
    async fn would_start(&self, def: &DomainDef) -> Result<()> {
        let able = match refusals(self.driver.check(def).await) {
            Ok(()) => self.driver.has_files(def, true).await,
            Err(findings) => Err(DriverError::Config(findings)),
        };
        able.map_err(|e| Error::from_driver(&def.name, "start the snapshot of", e))
    }

    /// Refuses a revert whose risks have not all been accepted.
    pub(super) fn accept_risks(&self, name: &str, plan: &Plan) -> Result<()> {
        if plan.unaccepted.is_empty() {
            return Ok(());
        }
        let domain = self.name();
        let mut whys = Vec::new();
        for risk in &plan.unaccepted {
            whys.push(match *risk {
                ABI_CHANGED => {
                    let all: Vec<String> = plan.differences.iter().map(ToString::to_string).collect();
                    let places = if all.len() == 1 { "one place".to_owned() } else { format!("{} places", all.len()) };
                    let all = all.join("; ");
                    format!("{ABI_CHANGED}: the guest would find its machine changed in {places}: {all}")
                }
                NEW_PROCESS => {
                    format!("{NEW_PROCESS}: its hypervisor process ends, and with it displays and connections")
                }
                FROZEN_CHANGED => {
                    let files: Vec<String> = plan.changed.iter().map(|file| file.display().to_string()).collect();
                    let files = files.join(", ");
                    format!("{FROZEN_CHANGED}: {files} has been written since it was frozen, and is not what was taken")
                }
                _ => format!("{MANAGED_SAVE}: its saved image is deleted, for it would not fit the disks"),
            });
        }
        Err(Error::RevertRisky(format!(
            "reverting '{domain}' to '{name}' has risks ({}); repeat with force, all of it or a list of these risks",
            whys.join(" · ")
        )))
    }

    pub(super) fn not_reverted(&self, name: &str, error: virt_model::driver::DriverError) -> Error {
        self.driver_failed(&format!("revert to snapshot '{name}'"), error)
    }
}

impl RevertOptions {
    /// Refuses what does not go together.
    pub(super) fn check(&self) -> Result<()> {
        if self.running && self.paused {
            return Err(Error::InvalidArgument("'running' and 'paused' exclude each other".to_owned()));
        }
        let Force::These(risks) = &self.force else { return Ok(()) };
        match risks.iter().find(|risk| !RISKS.contains(&risk.as_str())) {
            Some(risk) => {
                let known = RISKS.join(", ");
                Err(Error::InvalidArgument(format!("'force' lists risks, of {known}; '{risk}' is none")))
            }
            None => Ok(()),
        }
    }
}

impl Force {
    fn accepts(&self, risk: &str) -> bool {
        match self {
            Force::No => false,
            Force::All => true,
            Force::These(risks) => risks.iter().any(|accepted| accepted == risk),
        }
    }
}

/// Whether there are variables to be made anew, for a guest that is started then.
fn variables_can_be_reset(name: &str, taken: &DomainDef, starts: bool) -> Result<()> {
    if taken.os.nvram.is_none() {
        let text = format!("'{name}' has no firmware variables to be made anew; leave out reset-nvram");
        return Err(Error::ConfigUnsupported(text));
    }
    if !starts {
        let text = "reset-nvram has no effect on a domain that is not started: ask for running or paused";
        return Err(Error::OperationInvalid(text.to_owned()));
    }
    Ok(())
}

/// Whether to have a guest afterwards, and whether it stands.
fn wanted(def: &SnapshotDef, options: &RevertOptions) -> Option<bool> {
    match def.state {
        _ if options.running => Some(false),
        _ if options.paused => Some(true),
        SnapshotState::Domain(DomainState::Running) => Some(false),
        SnapshotState::Domain(DomainState::Paused) => Some(true),
        _ => None,
    }
}

pub(super) fn renamed(def: &Arc<DomainDef>, name: &str) -> Arc<DomainDef> {
    let mut def = def.clone();
    if def.name != name {
        name.clone_into(&mut Arc::make_mut(&mut def).name);
    }
    def
}

/// What the guest would notice; generation ids change at every start, so their values say nothing. Where it is known what
/// CPU it has and had, that is compared, and not what it was made of.
fn differences(now: &DomainDef, has: Option<Cpu>, to: &DomainDef, had: Option<&Cpu>) -> Vec<AbiDifference> {
    let both = has.as_ref().zip(had);
    let (now, mut to) = (with_cpu(now, both.map(|both| both.0)), with_cpu(to, both.map(|both| both.1)).into_owned());
    if to.genid.is_some() && now.genid.is_some() {
        to.genid.clone_from(&now.genid);
    }
    now.compare_abi(&to, Strictness::Running)
}

/// A machine with the CPU that a hypervisor made of its own, if that is known.
pub(super) fn with_cpu<'a>(def: &'a DomainDef, made: Option<&Cpu>) -> Cow<'a, DomainDef> {
    let Some(made) = made else { return Cow::Borrowed(def) };
    let cpu = def.cpu.clone().unwrap_or_default().expanded(made);
    Cow::Owned(DomainDef { cpu: Some(cpu), ..def.clone() })
}

/// Whether the running process has the images open that hold the snapshot.
fn same_disks(now: &DomainDef, to: &DomainDef) -> bool {
    let sources = |def: &DomainDef| -> Vec<(String, Option<String>)> {
        let disks = def.devices.disks.iter();
        let mut all: Vec<_> = disks.map(|disk| (disk.target.dev.clone(), disk.path().map(str::to_owned))).collect();
        all.sort();
        all
    };
    sources(now) == sources(to)
}

/// Whether the states of its TPMs are encrypted with the same secrets, if with any.
fn same_tpm_keys(now: &DomainDef, to: &DomainDef) -> bool {
    let keys = |def: &DomainDef| -> Vec<Option<Uuid>> {
        let tpms = def.devices.tpms.iter();
        tpms.map(|tpm| tpm.backend.encryption.as_ref().map(|encryption| encryption.secret)).collect()
    };
    keys(now) == keys(to)
}

/// Refuses a snapshot that holds what its TPM had in memory, encrypted with another secret than the state that lies beside it now.
fn opens_its_tpm(name: &str, def: &SnapshotDef, now: &DomainDef, to: &DomainDef) -> Result<()> {
    let has_state = def.captured.iter().any(|(part, _)| part == "tpm");
    if has_state || now.devices.tpms.is_empty() || same_tpm_keys(now, to) {
        return Ok(());
    }
    Err(Error::OperationInvalid(format!(
        "'{name}' holds memory of its TPM, whose state is encrypted with another secret now, or was: define the domain with the \
         <encryption> that it had then, and put back the TPM's state of that time"
    )))
}

/// What would be told, in order.
fn events(now: DomainState, active: Option<bool>, in_place: bool, persistent: bool) -> Vec<Lifecycle> {
    let mut events = Vec::new();
    let was_running = matches!(now, DomainState::Running | DomainState::Idle);
    let settled = |paused: bool| match paused {
        true => Lifecycle::Suspended(Suspended::FromSnapshot),
        false => Lifecycle::Resumed(Resumed::FromSnapshot),
    };
    match (in_place, active) {
        (true, Some(paused)) if paused == was_running => events.push(settled(paused)),
        (true, _) => {}
        (false, active) => {
            if now.is_active() {
                events.push(Lifecycle::Stopped(Stopped::FromSnapshot));
            }
            if let Some(paused) = active {
                events.extend([Lifecycle::Started(Started::FromSnapshot), settled(paused)]);
            }
        }
    }
    if persistent {
        events.push(Lifecycle::Defined(Defined::FromSnapshot));
    }
    events
}

pub(in crate::domain) fn told(files: &[FileChange]) -> Vec<(String, &'static str, u64)> {
    files.iter().map(|file| (file.path.to_string_lossy().into_owned(), fate(file.what), file.bytes)).collect()
}
