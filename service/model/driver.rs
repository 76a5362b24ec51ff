//! The contract between the service and a hypervisor: [`Driver`], [`Instance`], and what an instance reports.
//!
//! The service owns what a domain is called, whether it is stored, who may touch it and whose turn it is. A driver moves
//! a guest and reports what befalls it. Everything a driver reports of one guest comes through one channel, in the order
//! in which it happened, with [`DriverEvent::Exited`] last, exactly once.

pub mod adjust;
pub mod agent;
pub mod backup;
pub mod block_jobs;
pub mod checkpoints;
pub mod devices;
pub mod given;
pub mod host_devices;
pub mod inventory;
pub mod network;
pub mod operation;
pub mod reports;
pub mod saved;
pub mod secrets;
pub mod snapshots;
pub mod stats;
pub mod storage;

use crate::device::chardev::Channel;
use crate::device::{CharSource, Disk, Graphics};
use crate::domain::DomainDef;
use crate::domain::cpu::Cpu;
use crate::state::{PmSuspended, ShutdownBy, Suspended};
use crate::xml::{Finding, refusals};
pub use adjust::Adjustment;
use async_trait::async_trait;
pub use devices::{Attachment, Detachment, DeviceEvent, IoAction, IoFailure, MediumChange, MediumExchange};
pub use given::GivenFile;
pub use reports::{EventSink, EventStream, reports};
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// A hypervisor that can run domains.
#[async_trait]
pub trait Driver: Send + Sync {
    /// The name on the bus, e.g. `qemu`.
    fn name(&self) -> &'static str;

    /// The members of `org.virt.Domain` that it has no way to do, whatever the domain: they answer `OperationUnsupported`,
    /// and `Can` says `na`.
    fn lacks(&self) -> &'static [&'static str] {
        &[]
    }

    /// The `<domain type='…'>` values it serves.
    fn types(&self) -> &'static [&'static str];

    /// Learns what the programs that `def` names can do, by running them: only for whoever may define machines. Everything
    /// else that is asked about a definition is answered from what is known by then; neither is a program that it names run
    /// for that, nor a file opened. What cannot be learnt is told by `check`.
    async fn learn(&self, def: &DomainDef) {
        let _ = def;
    }

    /// Fills in what a definition leaves open and must never change again: the emulator, the machine's versioned name,
    /// addresses, controllers. Called once, when a definition is stored or a transient domain is created; it keeps what
    /// is there. Errors are [`DriverError::Config`], and `def` is then to be thrown away.
    async fn complete(&self, def: &mut DomainDef) -> Result<(), DriverError>;

    /// The same for whoever may define machines: [`Driver::learn`] is done first.
    async fn learn_and_complete(&self, def: &mut DomainDef) -> Result<(), DriverError> {
        self.learn(def).await;
        self.complete(def).await
    }

    /// Everything in `def` that this driver on this host could not run now, in document order; what contradicts itself in it is
    /// among that. Empty: `start` would go as far as the hypervisor. Changes nothing.
    async fn check(&self, def: &DomainDef) -> Vec<Finding>;

    /// What the images that `def` names say against it: headers that name other files than the definition does. Opens them,
    /// so it is only for whoever may name files of the host; what is not there says nothing. Changes nothing.
    /// Errors: `TimedOut` if a file system does not answer.
    async fn look(&self, def: &DomainDef) -> Result<Vec<Finding>, DriverError> {
        let _ = def;
        Ok(Vec::new())
    }

    /// Whether all files and devices of the host are there that a start of `def` opens; the error names one that is not.
    /// `restored`: it starts from a snapshot, which brings the firmware's variables along. Changes nothing.
    async fn has_files(&self, def: &DomainDef, restored: bool) -> Result<(), DriverError> {
        let _ = (def, restored);
        Ok(())
    }

    /// What a start of `def`, from power off, would be refused for, as [`Driver::check`] and [`Driver::has_files`] tell it; what
    /// the programs that it names can do is learnt before. To be asked for whoever may start it, just before that: what was
    /// looked at is handed on to the start, which need not look again. Changes nothing.
    async fn can_start(&self, def: &DomainDef) -> Result<Accepted, DriverError> {
        self.learn(def).await;
        refusals(self.check(def).await).map_err(DriverError::Config)?;
        self.has_files(def, false).await?;
        Ok(Accepted::default())
    }

    /// What a start of `def` needs of the host and does not find now: files that are not there, cannot be opened, or are images
    /// of another format, and, as a warning, ports that others have. Looks at files, so it is only for whoever may name
    /// files of the host. Changes nothing. Errors: `TimedOut` if a file system does not answer.
    async fn unmet(&self, def: &DomainDef) -> Result<Vec<Finding>, DriverError> {
        let _ = def;
        Ok(Vec::new())
    }

    /// What `start` would run, in the hypervisor's own terms; `format` is e.g. `qemu-argv`.
    async fn native(&self, def: &DomainDef, format: &str) -> Result<Vec<String>, DriverError>;

    /// The `<capabilities>` document of host and driver.
    async fn capabilities(&self) -> Result<String, DriverError>;

    /// The `<domainCapabilities>` document: what machines of one kind can have on this host. No program that a caller could
    /// choose is run for it. Errors: `NotPossible` where no such machine runs here, `Unsupported` if this driver has no such
    /// document.
    async fn domain_capabilities(&self, wanted: &MachineChoice) -> Result<String, DriverError> {
        let _ = wanted;
        Err(DriverError::Unsupported(format!("the driver '{}' has no document of what machines can have", self.name())))
    }

    /// What is on disk of this guest alone, outlives its runs and is no disk: firmware variables, the state of a TPM. Of
    /// what cannot be looked at it is told that it is there.
    async fn belongings(&self, def: &DomainDef) -> Vec<PathBuf>;

    /// Removes of them what goes with that end of the domain; the guest does not run. A driver that makes none leaves what
    /// is there.
    async fn remove_belongings(&self, _def: &DomainDef, _end: DomainEnd) -> Result<(), DriverError> {
        Ok(())
    }

    /// The files of a machine's disks at these paths, as they are now, each as far as it can be removed: a plain file that
    /// nobody has open. `Ok(None)`: there is nothing. An inner error says why that one cannot be. Changes nothing.
    /// Errors: `TimedOut` if a file system does not answer; `Unsupported` by a driver whose machines have no files.
    async fn storage(&self, def: &DomainDef, files: &[PathBuf]) -> Result<Vec<Removable>, DriverError> {
        let _ = (def, files);
        Err(DriverError::Unsupported("this driver removes no images".to_owned()))
    }

    /// Removes one of them. What has its place by now is another file, and stays; so does one that somebody has opened since:
    /// that is an error.
    async fn remove_storage(&self, def: &DomainDef, file: &StoredFile) -> Result<(), DriverError> {
        let _ = def;
        Err(DriverError::Unsupported(format!("this driver removes no images, and not {}", file.path.display())))
    }

    /// Snapshots, where the driver has them.
    fn snapshots(&self) -> Option<&dyn snapshots::Snapshots> {
        None
    }

    /// Checkpoints, where the driver has them. One that does has snapshots, too: what was cut off is made whole there.
    fn checkpoints(&self) -> Option<&dyn checkpoints::Checkpoints> {
        None
    }

    /// Backups, where the driver has them. One that does has checkpoints, too.
    fn backups(&self) -> Option<&dyn backup::Backups> {
        None
    }

    /// Machines saved in files, where the driver has them. One that does has snapshots, too: what was cut off is made whole there.
    fn saved_machines(&self) -> Option<&dyn saved::SavedMachines> {
        None
    }

    /// Work on the disks of guests that run, where the driver can do it.
    fn block_jobs(&self) -> Option<&dyn block_jobs::BlockJobs> {
        None
    }

    /// The machines that a host keeps by itself, if this driver is one for such a host. It has none of ours then, and
    /// [`inventory::Inventory::start`] is what starts those.
    fn inventory(&self) -> Option<&dyn inventory::Inventory> {
        None
    }

    /// Starts a guest with its CPUs running (or standing, if [`Launch::paused`]). Returns once that is so. On failure, or
    /// when [`Launch::cancel`] fires (then [`DriverError::Cancelled`]), no trace of the guest is left: no process,
    /// no runtime file, no permission given away. A start emits neither `Resumed` nor `Suspended`.
    async fn start(&self, launch: Launch) -> Result<Running, DriverError>;

    /// Judges an image that a client has given by descriptor for a disk of that machine's guest, and gives the name by which the guest is to
    /// know it ([`DiskSource`](crate::device::source::DiskSource), `given`). Changes nothing.
    /// Errors: `Argument` for what is no image that such a disk can have; `Refused` if somebody else has it open.
    async fn judge_image(&self, machine: Uuid, disk: &Disk, image: &Arc<GivenFile>) -> Result<String, DriverError> {
        let _ = (machine, image);
        let target = &disk.target.dev;
        Err(DriverError::Unsupported(format!("this driver takes no image by descriptor for '{target}'")))
    }

    /// Gives the device that `def` has more than `before`, which `guest` runs with, its place and its name, which is returned; with
    /// it may come a controller that it sits on. Changes nothing on the host.
    /// Errors: `Unsupported` and `Refused` name what cannot be plugged into a machine that runs, or has no place there.
    async fn place_device(
        &self,
        guest: &dyn Instance,
        before: &DomainDef,
        def: &mut DomainDef,
    ) -> Result<String, DriverError> {
        let _ = (guest, before, def);
        Err(DriverError::Unsupported("this driver plugs nothing into guests that run".to_owned()))
    }

    /// Plugs in the device of that name, as `def` says it with all that [`Driver::place_device`] has added to `before`. What is
    /// known of it only then, a terminal say, is written into `def`. On failure `def` is what the guest has then: `before`, with
    /// what could not be taken back; after `TimedOut` it is what the guest may have, of which is reported later what it has not got
    /// ([`DriverEvent::DeviceGone`]).
    async fn attach_device(
        &self,
        guest: &dyn Instance,
        def: &mut DomainDef,
        device: Attachment<'_>,
    ) -> Result<(), DriverError> {
        let _ = (guest, def);
        Err(DriverError::Unsupported(format!("this driver cannot plug in '{}'", device.alias)))
    }

    /// Asks the guest to let go of a device, waits until it has, and takes away what the device had of the host's.
    /// Errors: `TimedOut` after `patience`, `Refused` if the guest refuses; it has the device still. If it lets go of it later,
    /// that is reported ([`DriverEvent::DeviceGone`]).
    async fn detach_device(&self, guest: &dyn Instance, device: Detachment<'_>) -> Result<(), DriverError> {
        let _ = guest;
        Err(DriverError::Unsupported(format!("this driver cannot unplug '{}'", device.alias)))
    }

    /// Whether the guest does not have that device of `def` any more; then what it had of the host's is taken away, if that is
    /// not done yet.
    async fn is_detached(&self, guest: &dyn Instance, def: &DomainDef, alias: &str) -> Result<bool, DriverError> {
        let _ = (guest, def, alias);
        Ok(false)
    }

    /// Has the guest follow `def`, which is other than `before`, what it runs with, in what is named. On failure `def` is what the
    /// guest has then: `before`, but that some vCPUs may have come or gone, and that of a medium that is put back the drive may be empty.
    /// Errors: `Unsupported` names what cannot change while this machine runs; `TimedOut` if the guest keeps vCPUs: it may let go
    /// of them later, which is reported ([`DriverEvent::VcpusChanged`]); `Refused` or, if the caller has said how long,
    /// `TrayLocked` if it keeps the tray of a drive locked.
    async fn adjust(
        &self,
        guest: &dyn Instance,
        before: &DomainDef,
        def: &mut DomainDef,
        what: &Adjustment,
    ) -> Result<(), DriverError> {
        let _ = (guest, before, def);
        Err(DriverError::Unsupported(format!("this driver cannot change {what} while the guest runs")))
    }

    /// Writes into `def`, what the guest runs with, what is so in truth of what is named.
    async fn look_at(&self, guest: &dyn Instance, def: &mut DomainDef, what: &Adjustment) -> Result<(), DriverError> {
        let _ = (guest, def);
        Err(DriverError::Unsupported(format!("this driver cannot tell {what} of a guest that runs")))
    }

    /// A group of numbers of a machine: of its guest, or with `None` of one that is off, which has those of its disks only. May
    /// take as long as the hypervisor or the storage does: who asks waits for less, and others share the answer. Changes nothing.
    /// Errors: `Gone` if the guest has ended; `TimedOut` where nothing answers.
    async fn stats(
        &self,
        def: &DomainDef,
        guest: Option<&dyn Instance>,
        asked: stats::StatQuestion,
    ) -> Result<stats::GroupStats, DriverError> {
        let _ = (def, guest, asked);
        Err(DriverError::Unsupported(format!("the driver '{}' has no statistics", self.name())))
    }

    /// Whether its guests go on without virtd.
    fn guests_outlive_virtd(&self) -> bool {
        true
    }

    /// Finds a guest that outlived the last virtd, from what [`Recorder::record`] was last given; where that is null, or cannot
    /// be used, from what else there is of it on the host. A guest whose start was cut off is ended, and `None` returned, as
    /// for one that has gone; either way its leavings are cleaned up, and a file system that does not answer is left to do
    /// so in the background. `None` is never returned of a guest that may run.
    async fn reconnect(&self, found: Reconnect) -> Result<Option<Reconnected>, DriverError>;
}

/// Which machine is asked about; what is left open is the driver's to choose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MachineChoice {
    /// E.g. `x86_64`: the host's own if it is left open.
    pub arch: Option<String>,
    /// E.g. `q35`: what a definition gets that names none.
    pub machine: Option<String>,
    /// The `<domain type='…'>`: the fastest that runs here.
    pub kind: Option<String>,
}

/// A file that is to be removed with its machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredFile {
    /// Absolute.
    pub path: PathBuf,
    /// Which file it is: the number of its file system, and its own there.
    pub identity: (u64, u64),
    /// Its length.
    pub bytes: u64,
}

/// A file that can be removed; nothing if there is none, or why it cannot be.
pub type Removable = Result<Option<StoredFile>, String>;

/// How a domain ceases to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainEnd {
    /// It was undefined together with what belongs to it: all of it goes.
    Undefined,
    /// It was transient, and its guest has ended: the state of a TPM goes unless the definition keeps it.
    Transient,
}

/// What a driver has looked at when a start was accepted, in its own terms; nothing, where it keeps nothing of that.
#[derive(Default)]
pub struct Accepted(pub Option<Box<dyn Any + Send + Sync>>);

/// What `start` needs to know.
pub struct Launch {
    /// The completed definition.
    pub def: Arc<DomainDef>,
    /// What [`Driver::can_start`] has given for it, if that was asked.
    pub accepted: Accepted,
    /// Leave the CPUs standing.
    pub paused: bool,
    /// Make the firmware variables anew from their template.
    pub reset_nvram: bool,
    /// Memory to start from; a driver that cannot refuses it.
    pub from: Option<snapshots::StartFrom>,
    /// An existing directory for sockets and the like, mode 0711. What an earlier guest has left in it is the driver's to
    /// remove, before a start and when the guest has gone; then the service removes the directory.
    pub runtime_dir: PathBuf,
    /// Where the hypervisor's own output goes; appended to, bounded by the driver at each start.
    pub log_file: PathBuf,
    /// Where the driver's record goes.
    pub recorder: Arc<dyn Recorder>,
    /// Where reports go.
    pub events: EventSink,
    /// Fires when the start is no longer wanted.
    pub cancel: CancellationToken,
}

/// Keeps what a driver must know to find its guest again.
pub trait Recorder: Send + Sync {
    /// Replaces the driver's record, durably, before it returns. A driver records before there is anything to lose: the
    /// first time before the hypervisor can run a single instruction.
    fn record(&self, record: serde_json::Value) -> std::io::Result<()>;

    /// Says as what the guest will run, as far as that is known before it does: that is kept with the next record. Of a start
    /// only, and at most once; whoever says nothing has it kept when the start has returned. Blocks.
    fn will_run(&self, _live: &DomainDef) {}

    /// Keeps, durably, that the guest goes on from the saved machine that it is started from: what was saved is used up from then
    /// on, whatever becomes of this guest. To be called when that has been loaded, and before the first instruction; once more by
    /// whoever finds such a guest and cannot tell whether that was done. On failure the guest must not go on. Blocks.
    fn goes_on(&self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What `start` hands back.
pub struct Running {
    /// The living guest.
    pub instance: Arc<dyn Instance>,
    /// The definition as it runs: `launch.def` plus runtime facts (terminals, ports). Its `id` is the service's matter.
    pub live: Arc<DomainDef>,
}

/// What `reconnect` needs to know.
pub struct Reconnect {
    /// The definition that ran when last seen.
    pub live: Arc<DomainDef>,
    /// What was last recorded; null if that cannot be read.
    pub record: serde_json::Value,
    /// What it did when last seen; what `reconnect` returns if it lives and does not answer.
    pub last: Condition,
    /// As in [`Launch`].
    pub runtime_dir: PathBuf,
    /// As in [`Launch`].
    pub log_file: PathBuf,
    /// As in [`Launch`].
    pub recorder: Arc<dyn Recorder>,
    /// As in [`Launch`]; reports begin after `reconnect` has returned.
    pub events: EventSink,
}

/// What `reconnect` hands back.
pub struct Reconnected {
    /// The living guest.
    pub instance: Arc<dyn Instance>,
    /// What it does now, asked of the hypervisor.
    pub condition: Condition,
    /// It was loaded from what was saved of it, and it is not kept yet that it goes on ([`Recorder::goes_on`]): the driver sees to
    /// that, and lets it run no instruction before.
    pub unmarked: bool,
}

/// What a guest is found doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// CPUs run.
    Running,
    /// CPUs stand, for this reason if it can be told.
    Suspended(Suspended),
    /// The guest has powered off; the instance still stands.
    PoweredOff,
    /// The guest has panicked and stands still.
    Panicked,
    /// The guest sleeps.
    PmSuspended(PmSuspended),
}

/// One running guest. Methods may be called concurrently; each returns an error rather than wait without end
/// ([`DriverError::TimedOut`]). What they cause is reported through the sink *before* they return.
#[async_trait]
pub trait Instance: Any + Send + Sync {
    /// Asks the guest to power off. Returns when asked, not when done.
    async fn shutdown(&self, mode: ShutdownMode) -> Result<(), DriverError>;

    /// Asks the guest to reboot. Returns when asked.
    async fn reboot(&self, mode: ShutdownMode) -> Result<(), DriverError>;

    /// Resets the machine, as with its button. Also brings back a guest that was [`DriverEvent::PoweredOff`] or
    /// [`DriverEvent::Panicked`]: its CPUs then stand at the reset vector until `resume`.
    async fn reset(&self) -> Result<(), DriverError>;

    /// Stops the CPUs; reports `Suspended(Paused)`.
    async fn suspend(&self) -> Result<(), DriverError>;

    /// Lets the CPUs go on; reports `Resumed`.
    async fn resume(&self) -> Result<(), DriverError>;

    /// Sends the guest's CPUs a non-maskable interrupt. Returns when it is sent.
    async fn inject_nmi(&self) -> Result<(), DriverError> {
        Err(DriverError::Unsupported("this driver cannot send a non-maskable interrupt".to_owned()))
    }

    /// Wakes a guest that sleeps; reports `Woken`. Returns when it is awake. Error: `Refused` if it does not sleep.
    async fn wake_up(&self) -> Result<(), DriverError> {
        Err(DriverError::Unsupported("this driver cannot wake guests".to_owned()))
    }

    /// A picture of what a screen shows, a PNG file in memory that stands at its beginning and that nobody can change any more.
    async fn screenshot(&self, _screen: &Screen) -> Result<OwnedFd, DriverError> {
        Err(DriverError::Unsupported("this driver cannot take screenshots".to_owned()))
    }

    /// A connection to the display that a `<graphics>` of the live definition offers. With `skip_auth` it asks for no password.
    /// Error: `Unsupported` if no client can be connected to that one.
    async fn open_graphics(&self, _graphics: &Graphics, _skip_auth: bool) -> Result<OwnedFd, DriverError> {
        Err(DriverError::Unsupported("this driver cannot open displays".to_owned()))
    }

    /// A connection to the host's end of a channel of the live definition. Errors: `Unsupported` if no client can be connected to
    /// that one, `Refused` while another is.
    async fn open_channel(&self, _channel: &Channel) -> Result<OwnedFd, DriverError> {
        Err(DriverError::Unsupported("this driver cannot open channels".to_owned()))
    }

    /// A connection to a console of the live definition, whose host's end is a terminal: what the guest says there, and what it
    /// is told. Errors: `Unsupported` if no client can be connected to that one, or nothing is kept of it that `options` ask for;
    /// `Refused` while another client is there.
    async fn open_console(
        &self,
        _alias: &str,
        _source: &CharSource,
        _options: ConsoleOptions,
    ) -> Result<OwnedFd, DriverError> {
        Err(DriverError::Unsupported("this driver cannot open consoles".to_owned()))
    }

    /// Presses keys all at once, by their numbers ([`crate::keys`]), and lets them go after `hold`, or as it does by itself. Returns
    /// when they are pressed.
    async fn send_keys(&self, _keys: &[u8], _hold: Option<Duration>) -> Result<(), DriverError> {
        Err(DriverError::Unsupported("this driver cannot send keys".to_owned()))
    }

    /// Whether an agent has its port open inside the guest, as far as is known.
    fn agent_connected(&self) -> bool {
        false
    }

    /// Whether something in the guest has a channel of the live definition open, as far as is known.
    fn is_open(&self, _channel: &Channel) -> bool {
        false
    }

    /// The guest's agent. Error: `AgentUnavailable` if the guest has no port for one.
    fn agent(&self) -> Result<Arc<dyn agent::GuestAgent>, DriverError> {
        Err(DriverError::Unsupported("this driver does not speak to guest agents".to_owned()))
    }

    /// What the neighbours, those of the host or of the user's own network, tell of the addresses of its cards, whose live
    /// definition is `live`.
    async fn neighbours(&self, _live: &DomainDef) -> Result<Vec<agent::CardAddresses>, DriverError> {
        Ok(Vec::new())
    }

    /// The CPU that the guest has, where its definition leaves that to the host and the hypervisor: a named model, and all its
    /// features. `None` where the definition says it all, or it is not known.
    fn expanded_cpu(&self) -> Option<Cpu> {
        None
    }

    /// Ends the guest and returns when its process has gone; `Exited` has then been reported. A hypervisor that does not
    /// listen is killed, unless `graceful`: then [`DriverError::TimedOut`] and the guest is as before. Works whatever
    /// else hangs.
    async fn destroy(&self, graceful: bool) -> Result<(), DriverError>;
}

/// How a console is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsoleOptions {
    /// What was kept of it comes first.
    pub log: bool,
    /// A client that is there is put out.
    pub force: bool,
}

/// One of a guest's screens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Screen {
    /// The alias of the card that draws it.
    pub card: String,
    /// Which of the card's it is, from 0 on.
    pub head: u32,
}

/// How a guest is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownMode {
    /// The guest agent, if it answers soon; else the ACPI power button.
    Default,
    /// The ACPI power button.
    Acpi,
    /// The guest agent.
    Agent,
}

/// What an instance reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DriverEvent {
    /// CPUs stopped.
    Suspended(Suspended),
    /// CPUs go on.
    Resumed,
    /// Somebody else has stopped the CPUs: the host that keeps the machine was not asked for it by us.
    SuspendedByOthers,
    /// Somebody else lets the CPUs go on, likewise.
    ResumedByOthers,
    /// The guest fell asleep.
    PmSuspended(PmSuspended),
    /// The guest woke up.
    Woken,
    /// The guest has powered off (or rebooted, where `on_reboot` says that ends it: `rebooting`). The instance still
    /// stands, CPUs still; the service decides by `on_poweroff`/`on_reboot` and calls `destroy`, or `reset` and `resume`.
    PoweredOff {
        /// Who did it.
        by: ShutdownBy,
        /// It was a reboot.
        rebooting: bool,
    },
    /// The guest panicked and stands still; the service decides by `on_crash`.
    Panicked,
    /// [`Instance::agent_connected`] or [`Instance::is_open`] says something else now.
    PortsChanged,
    /// The guest has let go of the device of that name, which nobody waits for; see [`Driver::is_detached`].
    DeviceGone(String),
    /// vCPUs have come or gone, which nobody waits for: [`Driver::look_at`] tells which there are.
    VcpusChanged,
    /// The guest itself has opened the tray of the drive of that name.
    TrayOpened(String),
    /// Something else has happened to a device.
    Device(DeviceEvent),
    /// The process has gone. Always the last report, exactly once.
    Exited(Exit),
}

impl DriverEvent {
    /// Whether it says nothing of what the guest does: where too much is said, it is what is left out.
    pub fn is_of_a_device(&self) -> bool {
        matches!(
            self,
            DriverEvent::DeviceGone(_)
                | DriverEvent::VcpusChanged
                | DriverEvent::TrayOpened(_)
                | DriverEvent::Device(_)
        )
    }
}

/// How a guest's process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// `destroy` was called.
    Requested,
    /// Somebody else has ended it by force.
    Forced,
    /// It ended in order without `destroy` (a signal from outside, `quit` on another monitor).
    Orderly,
    /// It died; with its last words, empty if it had none.
    Died(String),
}

/// Why a driver did not do what it was asked. Texts name the cause and, where there is one, the remedy; the service adds
/// the domain's name.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DriverError {
    /// Parts of the configuration that cannot be run; never empty.
    #[error("{}", .0.iter().map(|f| f.message.as_str()).collect::<Vec<_>>().join("; "))]
    Config(Vec<Finding>),
    /// What is asked for cannot be had of this machine, whatever its state: another request may be.
    #[error("{0}")]
    NotPossible(String),
    /// This hypervisor cannot do it, now or at all.
    #[error("{0}")]
    Unsupported(String),
    /// What a caller gave is not what is asked for: a file that is none of the kind.
    #[error("{0}")]
    Argument(String),
    /// The guest has no agent that answers.
    #[error("{0}")]
    AgentUnavailable(String),
    /// The guest's agent refused or failed.
    #[error("the guest agent says {class}: {text}")]
    AgentFailed {
        /// The class of its error, e.g. `CommandNotFound`.
        class: String,
        /// Its own words.
        text: String,
    },
    /// The hypervisor refused or failed; ends with its own last words.
    #[error("{0}")]
    Hypervisor(String),
    /// The hypervisor did not answer in time.
    #[error("{0}")]
    TimedOut(String),
    /// The host that keeps the machine does not answer: says which, since when and why.
    #[error("{0}")]
    Unreachable(String),
    /// The guest has kept a drive's tray locked as long as the caller has given it: what lies in it has not changed.
    #[error("{0}")]
    TrayLocked(String),
    /// A file or device could not be used.
    #[error("{0}")]
    Storage(String),
    /// A secret that is named is not there; says what to do.
    #[error("{0}")]
    NoSuchSecret(String),
    /// A secret that is named has no value; says what to do.
    #[error("{0}")]
    SecretMissing(String),
    /// The file system is full, or would be.
    #[error("{0}")]
    NoSpace(String),
    /// What was to be made is there already, or something else of its name.
    #[error("{0}")]
    Exists(String),
    /// An image already holds a snapshot of that name.
    #[error("{0}")]
    SnapshotExists(String),
    /// It would be more than can be looked after.
    #[error("{0}")]
    TooMany(String),
    /// Not in the state that guest or images are in; says what to do.
    #[error("{0}")]
    Refused(String),
    /// Somebody uses it, who is named.
    #[error("{0}")]
    InUse(String),
    /// It failed, and what had been done is there still: `recover` undoes or finishes it.
    #[error("{0}")]
    HalfDone(String),
    /// The guest has gone.
    #[error("the guest has ended")]
    Gone,
    /// The start was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// A bug, or the host failing in a way nobody planned for.
    #[error("{0}")]
    Internal(String),
}
