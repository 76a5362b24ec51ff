//! A hypervisor held in memory, for `<domain type='test'>`: no process, no file, but seen from the service it
//! behaves as QEMU does. Its guests end with virtd.
//!
//! A guest that is asked to power off does so at once, unless [`GuestControl`] told it not to: that is how tests make
//! guests crash, hang, ignore what they are asked, and die.

mod adjust;
mod agent;
mod backup;
mod block_jobs;
mod checkpoints;
mod consoles;
mod control;
mod guest;
mod host;
mod nbd;
mod networks;
mod saved;
mod snapshots;
mod stats;

pub use control::GuestControl;
pub use guest::Asked;
pub use host::{TestConnection, TestHost};
pub use networks::TestNetworks;

use crate::host::files::Seen;
use crate::host::workers::{Errand, Workers, blocking};
use crate::qemu::complete::{name_devices, name_new_devices};
use crate::qemu::given;
use async_trait::async_trait;
use checkpoints::Tracked;
use guest::{Machine, TestInstance};
use std::any::Any;
use std::collections::{BTreeSet, HashMap};
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};
use uuid::Uuid;
use virt_model::device::Disk;
use virt_model::domain::DomainDef;
use virt_model::driver::backup::Backups;
use virt_model::driver::block_jobs::BlockJobs;
use virt_model::driver::checkpoints::Checkpoints;
use virt_model::driver::saved::SavedMachines;
use virt_model::driver::snapshots::{Snapshots, StartFrom};
use virt_model::driver::stats::{GroupStats, StatQuestion};
use virt_model::driver::{
    Adjustment, Attachment, Detachment, Driver, DriverError, GivenFile, Instance, Launch, Reconnect, Reconnected,
    Removable, Running, StoredFile,
};
use virt_model::lock::lock;
use virt_model::xml::add_findings;
use virt_model::xml::{Finding, FindingKind, shorten};

/// Memory and vCPUs that the host claims to have.
const MEMORY_KIB: u64 = 1 << 30;
const CPUS: u32 = 512;

/// The hypervisor. Clones are the same one.
#[derive(Clone, Default)]
pub struct TestDriver(Arc<Inner>);

#[derive(Default)]
struct Inner {
    guests: Mutex<HashMap<Uuid, Weak<Machine>>>,
    plans: Mutex<HashMap<Uuid, Plan>>,
    /// Domains whose recovery waits for its notice.
    recoveries: Mutex<HashMap<Uuid, Arc<tokio::sync::Notify>>>,
    /// A plan is being followed.
    followed: tokio::sync::Notify,
    /// The snapshots that a domain's images hold.
    images: Mutex<HashMap<Uuid, BTreeSet<String>>>,
    /// The bitmaps in a domain's images.
    tracked: Mutex<HashMap<Uuid, Arc<Tracked>>>,
    /// What is done to disks, by machine and target.
    block_jobs: Mutex<HashMap<(Uuid, String), block_jobs::PlayedJob>>,
    /// Offsets of disks whose first writing is told.
    thresholds: Mutex<HashMap<(Uuid, String), u64>>,
    /// Sizes of disks that have been given another one.
    sizes: Mutex<HashMap<(Uuid, String), u64>>,
    /// Domains that are backed up, each with its readers.
    backups: Mutex<HashMap<Uuid, backup::Readers>>,
    workers: Workers,
}

/// The guest, as this driver's.
fn our_machine(guest: &dyn Instance) -> Result<Arc<Machine>, DriverError> {
    let any: &dyn Any = guest;
    let ours = any.downcast_ref::<TestInstance>();
    Ok(ours.ok_or_else(|| DriverError::Internal("a guest of another driver".to_owned()))?.0.clone())
}

/// What a test wants of the next start of a domain.
enum Plan {
    /// It waits to be cancelled, or let go.
    Hang(Arc<tokio::sync::Notify>),
    /// It fails.
    Fail(DriverError),
}

impl TestDriver {
    /// The guest of that domain, if one runs.
    pub fn guest(&self, uuid: Uuid) -> Option<GuestControl> {
        let machine = lock(&self.0.guests).get(&uuid)?.upgrade()?;
        machine.lives().then(|| GuestControl::new(machine))
    }

    /// The next start of that domain waits until it is cancelled or the returned notice is given.
    pub fn hang_start(&self, uuid: Uuid) -> Arc<tokio::sync::Notify> {
        let notice = Arc::new(tokio::sync::Notify::new());
        lock(&self.0.plans).insert(uuid, Plan::Hang(notice.clone()));
        notice
    }

    /// The recovery of what was done to that domain's snapshots waits until the returned notice is given.
    pub fn hang_recovery(&self, uuid: Uuid) -> Arc<tokio::sync::Notify> {
        let notice = Arc::new(tokio::sync::Notify::new());
        lock(&self.0.recoveries).insert(uuid, notice.clone());
        notice
    }

    /// Waits until the start is under way that was to hang, or to fail.
    pub async fn follows_plan(&self, uuid: Uuid) {
        loop {
            let followed = self.0.followed.notified();
            if !lock(&self.0.plans).contains_key(&uuid) {
                return;
            }
            followed.await;
        }
    }

    /// The next start of that domain fails.
    pub fn fail_start(&self, uuid: Uuid, error: DriverError) {
        lock(&self.0.plans).insert(uuid, Plan::Fail(error));
    }

    /// How many guests run.
    pub fn running(&self) -> usize {
        lock(&self.0.guests).values().filter_map(Weak::upgrade).filter(|machine| machine.lives()).count()
    }

    /// The bitmaps in that domain's images.
    fn tracked(&self, uuid: Uuid) -> Arc<Tracked> {
        lock(&self.0.tracked).entry(uuid).or_default().clone()
    }

    async fn follow_plan(&self, launch: &Launch) -> Result<(), DriverError> {
        let plan = lock(&self.0.plans).remove(&launch.def.uuid);
        self.0.followed.notify_waiters();
        match plan {
            Some(Plan::Hang(notice)) => tokio::select! {
                () = launch.cancel.cancelled() => Err(DriverError::Cancelled),
                () = notice.notified() => Ok(()),
            },
            Some(Plan::Fail(error)) => Err(error),
            None if launch.cancel.is_cancelled() => Err(DriverError::Cancelled),
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Driver for TestDriver {
    fn name(&self) -> &'static str {
        "test"
    }

    fn types(&self) -> &'static [&'static str] {
        &["test"]
    }

    fn lacks(&self) -> &'static [&'static str] {
        &["Screenshot", "OpenGraphics", "OpenChannel", "SendKey"]
    }

    async fn complete(&self, _def: &mut DomainDef) -> Result<(), DriverError> {
        Ok(())
    }

    async fn check(&self, def: &DomainDef) -> Vec<Finding> {
        let finding = |path: &str, message: String| Finding::anywhere(FindingKind::Unsupported, path, message);
        let mut findings = Vec::new();
        if def.memory_kib() > MEMORY_KIB {
            findings.push(finding("/memory", format!("this host has no more than {MEMORY_KIB} KiB")));
        }
        if def.maximum_vcpus() > CPUS {
            findings.push(finding("/vcpu", format!("this host has no more than {CPUS} CPUs")));
        }
        if def.devices.disks.iter().any(Disk::is_given) {
            findings.push(finding("/devices/disk/source/@fdgroup", given::NOT_STORED.to_owned()));
        }
        if def.has_native_arguments() {
            findings.push(finding("/qemu:commandline", "the test driver runs no program to give arguments to".into()));
        }
        add_findings(&mut findings, def.contradictions());
        findings
    }

    async fn native(&self, _def: &DomainDef, format: &str) -> Result<Vec<String>, DriverError> {
        Err(DriverError::Unsupported(format!(
            "the test driver runs nothing that could be shown as '{}'",
            shorten(format)
        )))
    }

    async fn capabilities(&self) -> Result<String, DriverError> {
        let mut text =
            String::from("<capabilities>\n\n  <host>\n    <cpu>\n      <arch>x86_64</arch>\n    </cpu>\n  </host>\n\n");
        text.push_str(
            "  <guest>\n    <os_type>hvm</os_type>\n    <arch name='x86_64'>\n      <wordsize>64</wordsize>\n",
        );
        // Writing to a string cannot fail.
        let _ = writeln!(text, "      <machine maxCpus='{CPUS}'>testbox</machine>\n      <domain type='test'/>");
        text.push_str("    </arch>\n  </guest>\n\n</capabilities>\n");
        Ok(text)
    }

    async fn start(&self, launch: Launch) -> Result<Running, DriverError> {
        let uuid = launch.def.uuid;
        let findings = self.check(&launch.def).await;
        if !findings.is_empty() {
            return Err(DriverError::Config(findings));
        }
        let recorder = launch.recorder.clone();
        let record = serde_json::json!({ "driver": "test", "uuid": uuid });
        let recorded = tokio::task::spawn_blocking(move || recorder.record(record)).await;
        let recorded = recorded.map_err(|e| DriverError::Internal(e.to_string()))?;
        recorded.map_err(|e| DriverError::Storage(format!("the guest's record cannot be written: {e}")))?;
        self.follow_plan(&launch).await?;
        if let Some(StartFrom::Saved(_)) = &launch.from {
            let recorder = launch.recorder.clone();
            let kept = blocking(move || recorder.goes_on()).await?;
            kept.map_err(|e| DriverError::Storage(format!("that the guest goes on cannot be kept: {e}")))?;
        }
        let machine = Arc::new(Machine::new(launch.paused, &launch.def, launch.events, self.tracked(uuid)));
        let mut guests = lock(&self.0.guests);
        if guests.len() > 64 && guests.len() == guests.capacity() {
            guests.retain(|_, machine| machine.strong_count() > 0);
        }
        guests.insert(uuid, Arc::downgrade(&machine));
        let mut live = launch.def;
        name_devices(Arc::make_mut(&mut live));
        Ok(Running { instance: Arc::new(TestInstance(machine)), live })
    }

    /// A machine that is played has room for all that has a name.
    async fn place_device(
        &self,
        guest: &dyn Instance,
        before: &DomainDef,
        def: &mut DomainDef,
    ) -> Result<String, DriverError> {
        our_machine(guest)?.listens().await?;
        name_new_devices(def);
        let known: BTreeSet<&str> = before.devices.infos().into_iter().filter_map(|(info, _)| info.alias()).collect();
        let mut names = def.devices.infos().into_iter().filter_map(|(info, _)| info.alias());
        let new = names.rfind(|alias| !known.contains(alias)).map(str::to_owned);
        new.ok_or_else(|| DriverError::Unsupported("it has no name".to_owned()))
    }

    async fn attach_device(
        &self,
        guest: &dyn Instance,
        def: &mut DomainDef,
        device: Attachment<'_>,
    ) -> Result<(), DriverError> {
        let plugged = our_machine(guest)?.listens().await;
        plugged.inspect_err(|_| def.clone_from(device.before))
    }

    /// It is judged as if it were to be used, and then let go of.
    async fn judge_image(&self, machine: Uuid, disk: &Disk, image: &Arc<GivenFile>) -> Result<String, DriverError> {
        given::judge(&self.0.workers, machine, disk, image).await
    }

    /// A guest that is paused keeps its devices until it goes on.
    async fn detach_device(&self, guest: &dyn Instance, device: Detachment<'_>) -> Result<(), DriverError> {
        our_machine(guest)?.detach(device.alias, device.patience).await
    }

    async fn is_detached(&self, guest: &dyn Instance, _def: &DomainDef, alias: &str) -> Result<bool, DriverError> {
        Ok(our_machine(guest)?.has_let_go(alias))
    }

    async fn adjust(
        &self,
        guest: &dyn Instance,
        before: &DomainDef,
        def: &mut DomainDef,
        what: &Adjustment,
    ) -> Result<(), DriverError> {
        let machine = our_machine(guest)?;
        let adjusted = machine.adjust(before, def, what).await;
        if adjusted.is_err() {
            def.clone_from(before);
            machine.tell_vcpus(def);
        }
        adjusted
    }

    async fn look_at(&self, guest: &dyn Instance, def: &mut DomainDef, _what: &Adjustment) -> Result<(), DriverError> {
        let machine = our_machine(guest)?;
        machine.listens().await?;
        machine.tell_vcpus(def);
        Ok(())
    }

    async fn belongings(&self, def: &DomainDef) -> Vec<PathBuf> {
        let named = def.os.nvram.as_ref().and_then(|nvram| nvram.path.as_ref()).map(PathBuf::from);
        let Some(path) = named else { return Vec::new() };
        let (looked_at, errand) = (path.clone(), Errand::new(def.uuid, path.display().to_string()));
        let there = self.0.workers.run(errand, move |_| Ok(Seen::at(&looked_at).named)).await;
        if there.unwrap_or(true) { vec![path] } else { Vec::new() }
    }

    /// They are played, as the images are.
    async fn storage(&self, _def: &DomainDef, files: &[PathBuf]) -> Result<Vec<Removable>, DriverError> {
        let played = |path: &PathBuf| Ok(Some(StoredFile { path: path.clone(), identity: (0, 0), bytes: 0 }));
        Ok(files.iter().map(played).collect())
    }

    async fn remove_storage(&self, _def: &DomainDef, _file: &StoredFile) -> Result<(), DriverError> {
        Ok(())
    }

    async fn stats(
        &self,
        def: &DomainDef,
        guest: Option<&dyn Instance>,
        asked: StatQuestion,
    ) -> Result<GroupStats, DriverError> {
        let mut told = match guest {
            Some(guest) => stats::of_guest(&*our_machine(guest)?, def, asked.group).await?,
            None => stats::at_rest(def),
        };
        if let GroupStats::Disks(disks) = &mut told {
            for disk in disks.iter_mut() {
                disk.capacity = self.resized(def.uuid, &disk.target).or(disk.capacity);
                let threshold = self.threshold(def.uuid, &disk.target);
                disk.traffic.iter_mut().for_each(|traffic| traffic.threshold = threshold);
            }
        }
        Ok(told)
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn backups(&self) -> Option<&dyn Backups> {
        Some(self)
    }

    fn checkpoints(&self) -> Option<&dyn Checkpoints> {
        Some(self)
    }

    fn block_jobs(&self) -> Option<&dyn BlockJobs> {
        Some(self)
    }

    fn saved_machines(&self) -> Option<&dyn SavedMachines> {
        Some(self)
    }

    fn guests_outlive_virtd(&self) -> bool {
        false
    }

    async fn reconnect(&self, _found: Reconnect) -> Result<Option<Reconnected>, DriverError> {
        Ok(None)
    }
}
