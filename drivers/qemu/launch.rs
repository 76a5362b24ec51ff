//! Starting a QEMU: everything it needs, its companions, then the process, then its monitor, then its CPUs; and all of it
//! undone when a step fails or the start is cancelled.

use super::agent::{self, Port};
use super::beside::{self, DESCRIPTORS, Side, storage, unshown};
use super::block::Nodes;
use super::capabilities::BUILD;
use super::changes::{Claims, SYSFS};
use super::companion::{self, Companions, Gifts, Living};
use super::consoles::Consoles;
use super::events::Guest;
use super::expanded;
use super::hostdev;
use super::instance::{Body, Leavings, QemuInstance, join};
use super::live;
use super::log::Log;
use super::make;
use super::monitor::Monitor;
use super::plan::{Command, Companion, Expected, HostFile, MemorySource, Role, Secret, SecretContent, VSOCK_FD};
use super::qmp::{COMMAND_TIMEOUT, Qmp};
use super::record::{Keeper, Phase, Record};
use super::report::Reporter;
use super::room;
use super::snapshot::open_memory;
use super::spawn::{Job, spawn_one};
use super::takeover::take_over;
use super::taking::Taking;
use super::tune::{Bounds, Tuning};
use super::wall;
use crate::host::access::{LentFile, Want};
use crate::host::files::Program;
use crate::host::lender::Lender;
use crate::host::listen::listen;
use crate::host::process::Process;
use crate::host::secret;
use crate::host::tap::name_of;
use crate::host::wall::GroundToCome;
use crate::host::workers::blocking;
use crate::host::workers::{ClosedAside, Errand, Stop, Workers};
use crate::network::OwnNetwork;
use crate::secret::Vault;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::domain::cpu::Cpu;
use virt_model::driver::{DriverError, EventSink, Recorder};

/// The descriptor at which QEMU finds its monitor.
pub const MONITOR_FD: RawFd = 3;
/// How long QEMU may take until it says hello; it has opened its images by then.
const HELLO: Duration = Duration::from_secs(60);
/// How long a killed QEMU may take to be gone.
const REAP: Duration = Duration::from_secs(10);

/// A start.
pub struct Start {
    /// The guest's uuid.
    pub uuid: Uuid,
    /// Its name, for people who read the log.
    pub name: String,
    /// Its QEMU, as it was judged.
    pub program: Arc<Program>,
    /// What is run.
    pub command: Command,
    /// The machine that it is, its USB devices found on the host.
    pub started: DomainDef,
    /// The kernel's half of its vsock.
    pub vsock: Option<OwnedFd>,
    /// Which guest has which of the host's devices.
    pub claims: Claims,
    /// Where its cards of networks are plugged in, if not on the host.
    pub own_network: Option<OwnNetwork>,
    /// Leave the CPUs standing.
    pub paused: bool,
    /// Make the firmware variables anew.
    pub reset_nvram: bool,
    /// What it starts from, if not from power off.
    pub from: Option<MemorySource>,
    /// The CPU that what it starts from had, which the command gives it again.
    pub pinned: Option<Cpu>,
    /// See [`Body::ends_on_reboot`].
    pub ends_on_reboot: bool,
    /// Where its threads run and what they may use.
    pub tuning: Tuning,
    /// What it may use where the definition does not say.
    pub bounds: Bounds,
    /// Who keeps secrets.
    pub secrets: Arc<Vault>,
    /// As in `DriverConfig`: there is room for what disks throw away.
    pub state_dir: PathBuf,
    /// Who looks at files.
    pub workers: Workers,
    /// By whose rights QEMU opens files.
    pub lender: Lender,
    /// As in `Launch`.
    pub runtime_dir: PathBuf,
    /// As in `Launch`.
    pub log_file: PathBuf,
    /// As in `Launch`.
    pub recorder: Arc<dyn Recorder>,
    /// As in `Launch`.
    pub events: EventSink,
    /// As in `Launch`.
    pub cancel: CancellationToken,
}

/// A guest that is up.
pub struct Up {
    /// It.
    pub instance: QemuInstance,
    /// What `query-chardev` says; nothing where no terminal is to be learnt from it.
    pub devices: Value,
    /// The names of the network devices that are its cards' ends on the host, in the order of the cards that have one.
    pub links: Vec<String>,
}

/// What a QEMU that is up has told: by its monitor, what `query-chardev` says.
type Answers = (Arc<Qmp>, Value);

/// How far it has come.
#[derive(Default)]
struct Made {
    companions: Vec<Living>,
    process: Option<Process>,
    log: Option<Log>,
}

/// What `prepare` makes.
struct Prepared {
    log: Log,
    output: Arc<File>,
    gifts: Gifts,
    companions: Vec<(Companion, Gifts)>,
    /// What they were lent.
    lent: Vec<LentFile>,
}

impl Start {
    /// Starts it, to run as `live`. The `ground` of QEMU's wall is made while all else is prepared, where root makes the wall.
    pub async fn run(self, ground: Option<GroundToCome>, live: Arc<DomainDef>) -> Result<Up, DriverError> {
        let start = Arc::new(self);
        let keeper = Arc::new(Keeper::new(start.recorder.clone(), start.record()));
        let mut made = Made::default();
        match start.attempt((ground, live), &keeper, &mut made).await {
            Ok(up) => Ok(up),
            Err(error) => Err(start.undo(error, made, keeper).await),
        }
    }

    fn record(&self) -> Record {
        Record {
            phase: Phase::Starting,
            uuid: self.uuid,
            exe: self.command.program.clone(),
            monitor: self.leavings().monitor(),
            log_start: 0,
            process: None,
            companions: Vec::new(),
            host_parts: Vec::new(),
            changes: Vec::new(),
            filtered: false,
            claims: Vec::new(),
            rebooting: false,
            frozen: false,
            cpu: None,
        }
    }

    fn leavings(&self) -> Leavings {
        let ledger = self.lender.ledger().cloned();
        let (runtime_dir, claims) = (self.runtime_dir.clone(), self.claims.clone());
        Leavings { uuid: self.uuid, runtime_dir, ledger, claims, own_network: self.own_network.clone() }
    }

    async fn attempt(
        self: &Arc<Self>,
        (ground, live): (Option<GroundToCome>, Arc<DomainDef>),
        keeper: &Arc<Keeper>,
        made: &mut Made,
    ) -> Result<Up, DriverError> {
        let secrets = self.hand(&self.command.secrets).await?;
        let (start, own) = (self.clone(), self.leavings().own_dir());
        let begun = async {
            match self.lender.is_wary() {
                // From then on something may be lent.
                true => keeper.change(|_| {}).await,
                false => Ok(()),
            }
        };
        // Neither is left alone with what the other has failed with.
        let (prepared, begun) = tokio::join!(self.afar(&own, move |stop| start.prepare(stop)), begun);
        let mut prepared = begun.and(prepared)?;
        prepared.gifts.extend(secrets);
        made.log = Some(prepared.log.clone());
        let taken = self.take_devices(keeper).await?;
        super::tap::note_filters(keeper, &self.command.taps).await?;
        let mut links = Vec::new();
        for (n, tap) in self.command.taps.iter().enumerate() {
            let ends = super::tap::open(tap, taken.links.get(&n), self.own_network.as_ref()).await?;
            links.push(ends.first().and_then(|(_, end)| name_of(end)).unwrap_or_default());
            prepared.gifts.extend(ends);
        }
        prepared.lent = self.lend(taken.files()).await?;
        self.companions(keeper, &mut prepared, made).await?;
        self.still_wanted()?;
        let process = made.process.insert(self.spawn_qemu(keeper, prepared, ground).await?);
        let reporter = Reporter::new(Guest::starting(), self.events.clone(), agent::device(&self.started));
        // Most of what follows is waiting for QEMU.
        let recorder = self.recorder.clone();
        let said = tokio::spawn(blocking(move || recorder.will_run(&live)));
        let (monitor, devices) = tokio::select! {
            up = self.bring_up(&reporter, keeper, said) => up?,
            _ = process.ended() => return Err(DriverError::Gone),
            () = self.cancel.cancelled() => return Err(DriverError::Cancelled),
            why = lost_companion(&made.companions, process) => return Err(why),
        };
        self.still_wanted()?;
        let instance = self.instance(keeper, made, reporter, monitor)?;
        Ok(Up { instance, devices, links })
    }

    /// Works on files where that may block; `what` is shown to people if it does not answer. The work is told to stop when
    /// nobody waits for it any more.
    async fn afar<T: Send + 'static>(
        &self,
        what: &Path,
        work: impl FnOnce(&Stop) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let errand = Errand::new(self.uuid, what.display().to_string()).until(&self.cancel);
        self.workers.run(errand, move |stop| work(stop)).await
    }

    /// Secrets that a process is to find, each in an open file in memory.
    async fn hand(&self, secrets: &[Secret]) -> Result<Gifts, DriverError> {
        let mut handed = Vec::new();
        for secret in secrets {
            let content = match &secret.content {
                SecretContent::Kept(name) => self.secrets.named(name).await?,
                SecretContent::Said(text) => text.clone().into_bytes().into(),
            };
            let file = secret::handed(content.bytes());
            let file = file.map_err(|e| DriverError::Internal(format!("a secret cannot be handed over: {e}")))?;
            handed.push((secret.fd, file));
        }
        Ok(handed)
    }

    fn still_wanted(&self) -> Result<(), DriverError> {
        if self.cancel.is_cancelled() { Err(DriverError::Cancelled) } else { Ok(()) }
    }

    /// Folders, log, firmware variables, monitor socket. Blocks.
    fn prepare(&self, stop: &Stop) -> Result<Prepared, DriverError> {
        let user = self.lender.user();
        let own = self.leavings().own_dir();
        room::clear(&own);
        if let Err(error) = make::empty(&self.runtime_dir, user.is_some()) {
            tracing::warn!(uuid = %self.uuid, %error, "something of an earlier guest's is still there");
        }
        let made = make::empty_folder(&own, None).and_then(|()| match user {
            Some(user) => room::make(&own, user, &self.started),
            None => Ok(()),
        });
        made.map_err(|e| storage(&own, &e))?;
        if let Some(nvram) = &self.command.nvram {
            make::variables(nvram, self.reset_nvram, user, stop)?;
            if let Some(user) = user {
                take_over(&nvram.path, user, &self.state_dir, self.uuid).map_err(|e| storage(&nvram.path, &e))?;
            }
        }
        for file in self.command.files.iter().filter(|file| file.create) {
            make::output(&file.path, user).map_err(|e| storage(&file.path, &e))?;
        }
        let (log, output) = Log::begin(&self.log_file, &self.headline()).map_err(|e| storage(&self.log_file, &e))?;
        let monitor = self.leavings().monitor();
        let listener = listen(&monitor, None).map_err(|e| storage(&monitor, &e))?;
        let mut prepared = Prepared {
            log,
            output: Arc::new(output),
            gifts: vec![(MONITOR_FD, listener)],
            companions: Vec::new(),
            lent: Vec::new(),
        };
        if let Some(vsock) = &self.vsock {
            let copy = vsock.try_clone();
            prepared.gifts.push((VSOCK_FD, copy.map_err(|e| DriverError::Internal(format!("<vsock>: {e}")))?));
        }
        for fd in &self.command.scratch {
            let scratch = make::scratch(&self.state_dir, user).map_err(|e| storage(&self.state_dir, &e))?;
            prepared.gifts.push((*fd, scratch));
        }
        for companion in self.command.companions.iter().filter(|companion| companion.is_wanted()) {
            let (own, qemus) =
                companion.prepare(user, &self.state_dir, self.uuid).map_err(|(path, e)| storage(&path, &e))?;
            prepared.gifts.extend(qemus);
            prepared.companions.push((companion.clone(), own));
        }
        Ok(prepared)
    }

    fn headline(&self) -> String {
        let line = |program: &Path, args: &[String]| {
            let args: Vec<String> = args.iter().map(|word| quote(word)).collect();
            format!("{} {}", program.display(), args.join(" "))
        };
        let qemu = line(&self.command.program, &self.command.args);
        let beside: String =
            self.command.companions.iter().map(|c| format!("\n--- beside it: {}", line(&c.program, &c.args))).collect();
        let line = format!("--- start of {} ({}): {qemu}{beside}", self.name, self.uuid);
        self.started.black_out(&line)
    }

    /// Takes from the host the devices that the guest has to itself, and makes those that outlive it.
    async fn take_devices(self: &Arc<Self>, keeper: &Arc<Keeper>) -> Result<Taking, DriverError> {
        if hostdev::takes_nothing(&self.started, &self.command.taps) {
            return Ok(Taking::default());
        }
        let start = self.clone();
        let claim =
            move || Taking::claim(&start.started, &start.command.taps, start.uuid, &start.claims, Path::new(SYSFS));
        let taking = blocking(claim).await??;
        taking.make(keeper).await?;
        self.still_wanted().map(|()| taking)
    }

    /// Makes the files accessible, `devices` among them. A file system that does not answer cannot keep a start from being cancelled.
    async fn lend(self: &Arc<Self>, devices: Vec<HostFile>) -> Result<Vec<LentFile>, DriverError> {
        let lender = self.lender.clone();
        let beside = self.command.companions.iter().filter(|c| !c.privileged).flat_map(|c| &c.files);
        let wants: Vec<Want> = self.command.files.iter().chain(&devices).chain(beside).map(want).collect();
        if wants.is_empty() {
            return Ok(Vec::new());
        }
        let what = wants.first().map(|want| want.path.clone()).unwrap_or_default();
        let uuid = self.uuid;
        let errand = Errand::new(uuid, what.display().to_string()).until(&self.cancel);
        let expected: BTreeMap<PathBuf, Expected> =
            self.command.files.iter().map(|file| (file.path.clone(), file.expected)).collect();
        let lend = move |stop: &Arc<Stop>| {
            let lent = lender.lend(uuid, &wants)?;
            // What is judged here is what QEMU gets, whatever had that path before.
            let judge = |file: &LentFile| {
                let expected = expected.get(&file.path).copied().unwrap_or(Expected::Anything);
                expected.judge(&file.path, file.kind().into())
            };
            lent.iter().try_for_each(judge)?;
            // One that was left behind gives back what it got.
            stop.check().inspect_err(|_| lender.give_back(uuid))?;
            Ok(lent)
        };
        self.workers.run(errand, lend).await
    }

    /// Starts what runs beside QEMU, in order, and waits for those that make something.
    async fn companions(
        self: &Arc<Self>,
        keeper: &Arc<Keeper>,
        prepared: &mut Prepared,
        made: &mut Made,
    ) -> Result<(), DriverError> {
        let side = Arc::new(Side {
            uuid: self.uuid,
            lender: self.lender.clone(),
            own: self.leavings().own_dir(),
            bounds: self.bounds,
            output: prepared.output.clone(),
        });
        for (companion, mut gifts) in std::mem::take(&mut prepared.companions) {
            self.still_wanted()?;
            gifts.extend(self.hand(&companion.secrets).await?);
            let living = side.start(keeper, &companion, gifts, prepared.lent.clone()).await?;
            made.companions.push(living);
            let within = match &companion.role {
                Role::Beside(_) => continue,
                Role::Step { within } | Role::Maker { within, .. } => *within,
            };
            if let Some(step) = made.companions.last() {
                tokio::select! {
                    done = companion::finish(step, within) => done.map_err(DriverError::Hypervisor)?,
                    () = self.cancel.cancelled() => return Err(DriverError::Cancelled),
                }
            }
            if let Role::Maker { work, made: what, .. } = companion.role {
                let wary = self.lender.is_wary();
                self.afar(&what.clone(), move |_| make::rename(&work, &what, wary)).await?;
            }
            made.companions.pop();
            keeper.change(|record| _ = record.companions.pop()).await?;
        }
        Ok(())
    }

    /// Makes QEMU's process.
    async fn spawn_qemu(
        self: &Arc<Self>,
        keeper: &Arc<Keeper>,
        prepared: Prepared,
        ground: Option<GroundToCome>,
    ) -> Result<Process, DriverError> {
        let (start, lent) = (self.clone(), prepared.lent);
        let wall = move || {
            let own = start.leavings().own_dir();
            let wall = wall::of_qemu(beside::mason(&start.lender), &start.started, &start.command, &lent, &own);
            wall.map_err(|e| unshown("QEMU", &e))
        };
        let job = Job {
            program: self.command.program.clone(),
            judged: Some(self.program.clone()),
            args: self.command.args.clone(),
            env: beside::environment(&self.leavings().own_dir(), &self.command.env),
            output: prepared.output,
            gifts: prepared.gifts,
            user: self.lender.user().cloned(),
            lock_limit: self.command.lock_limit,
            descriptors: Some(DESCRIPTORS),
            // It writes images, memory in files and dumps, which may have any length: the limit counts for all files alike.
            file_limit: None,
            privileged: false,
            bounds: self.bounds(),
            ground,
        };
        let log_start = prepared.log.start();
        let (_, process) = spawn_one(keeper, job, wall, move |record, process| {
            record.phase = Phase::Spawned;
            record.process = Some(process);
            record.log_start = log_start;
        })
        .await?;
        Ok(process)
    }

    /// What its processes may take of the host, where they have a user of their own.
    fn bounds(&self) -> Option<(Uuid, Bounds)> {
        self.lender.user().map(|_| (self.uuid, self.bounds))
    }

    /// From the process to running CPUs. When `said` has ended, what it will run as is with the recorder.
    async fn bring_up(
        &self,
        reporter: &Arc<Reporter>,
        keeper: &Arc<Keeper>,
        said: JoinHandle<Result<(), DriverError>>,
    ) -> Result<Answers, DriverError> {
        let begun = Instant::now();
        let left = || HELLO.saturating_sub(begun.elapsed());
        let greeted = Qmp::connect(&self.leavings().monitor(), reporter.ears(), HELLO).await?;
        let (monitor, cpu, within) = match self.only_runs() {
            true => (Arc::new(greeted.ready_in_time().await), None, left()),
            false => {
                let monitor = Arc::new(greeted.ready(left()).await?);
                let cpu = self.make_ready(&monitor, reporter, keeper).await?;
                (monitor, cpu, COMMAND_TIMEOUT)
            }
        };
        let ask = async |command: &str| monitor.execute_with(command, json!({}), Vec::new(), within).await;
        let devices = async {
            match live::has_terminals(&self.started) {
                true => ask("query-chardev").await.map_err(DriverError::from),
                false => Ok(Value::Null),
            }
        };
        let cpu = cpu.map(|cpu| expanded::written(&cpu));
        let kept = async {
            let _ = said.await;
            keeper.change(|record| (record.phase, record.cpu) = (Phase::Running, cpu)).await
        };
        let runs = async {
            if self.paused {
                reporter.guest(Guest::stands);
                return Ok(());
            }
            ask("cont").await.map(drop).map_err(DriverError::from)
        };
        // QEMU is slow to answer at first: all is asked at once.
        let devices = match self.from {
            // Whoever finds it kept and not running yet lets it run.
            None => tokio::try_join!(devices, runs, kept)?.0,
            Some(_) => {
                let (devices, ()) = tokio::try_join!(devices, runs)?;
                kept.await?;
                devices
            }
        };
        Ok((monitor, devices))
    }

    /// Whether its QEMU, which its command line makes whole, has nothing more to be told than to let it run.
    fn only_runs(&self) -> bool {
        let is_whole = self.command.nodes.is_empty() && self.command.setup.is_empty() && self.tuning.is_none();
        is_whole && self.from.is_none() && !self.paused && !expanded::is_open(&self.started)
    }

    /// Gives a QEMU that answers all that it is to have before its CPUs run. The CPU that it has made of what was left open, if
    /// that is to be kept.
    async fn make_ready(
        &self,
        monitor: &Arc<Qmp>,
        reporter: &Arc<Reporter>,
        keeper: &Arc<Keeper>,
    ) -> Result<Option<Cpu>, DriverError> {
        if !self.command.nodes.is_empty() {
            // Servers may be slow to answer, as they may be before a QEMU answers.
            let line = Monitor::new(monitor.clone(), reporter.clone());
            let build = async {
                for node in &self.command.nodes {
                    line.patiently("blockdev-add", node.clone()).await?;
                }
                line.patiently(BUILD, json!({})).await
            };
            let late = || DriverError::Hypervisor(format!("QEMU did not open its disks within {} s", HELLO.as_secs()));
            timeout(HELLO, build).await.map_err(|_| late())??;
        }
        if let Some(source) = &self.from {
            source.load(&Monitor::new(monitor.clone(), reporter.clone()), self).await?;
        }
        for (command, arguments) in &self.command.setup {
            monitor.execute(command, arguments.clone()).await?;
        }
        if let Some(pid) = keeper.process_id().filter(|_| !self.tuning.is_none()) {
            self.tuning.apply(self.uuid, pid, monitor).await?;
        }
        let cpu = match &self.pinned {
            None if expanded::is_open(&self.started) => expanded::ask(monitor, &self.command.args, &self.started).await,
            pinned => pinned.clone(),
        };
        if let Some(MemorySource::Stream(_)) = &self.from {
            self.is_loaded(keeper, cpu.as_ref()).await?;
        }
        Ok(cpu)
    }

    /// It holds what was saved of the guest: whoever finds it from now on lets it go on, and nobody starts from that again.
    async fn is_loaded(&self, keeper: &Arc<Keeper>, cpu: Option<&Cpu>) -> Result<(), DriverError> {
        self.still_wanted()?;
        let cpu = cpu.map(expanded::written);
        keeper.change(|record| (record.phase, record.cpu) = (Phase::Loaded, cpu)).await?;
        goes_on(self.recorder.clone()).await
    }

    fn instance(
        &self,
        keeper: &Arc<Keeper>,
        made: &mut Made,
        reporter: Arc<Reporter>,
        monitor: Arc<Qmp>,
    ) -> Result<QemuInstance, DriverError> {
        let lost = || DriverError::Internal("a start lost its process".into());
        Ok(QemuInstance::new(Body {
            uuid: self.uuid,
            log: made.log.clone().ok_or_else(lost)?,
            process: made.process.take().ok_or_else(lost)?,
            companions: Companions::of(std::mem::take(&mut made.companions)),
            lost: Mutex::default(),
            monitor: Mutex::new(Some(monitor)),
            reporter,
            keeper: keeper.clone(),
            leavings: self.leavings(),
            ends_on_reboot: self.ends_on_reboot,
            requested: AtomicBool::new(false),
            gone: watch::Sender::new(false),
            turn: tokio::sync::Mutex::default(),
            agent: Port::of(&self.started),
            drawing: tokio::sync::Mutex::default(),
            pressing: tokio::sync::Mutex::default(),
            consoles: Consoles::of(&self.started, &self.leavings()),
            threads: Mutex::default(),
            settling: Mutex::default(),
            withheld: Mutex::default(),
        }))
    }

    /// Leaves no trace; tells why, with QEMU's last words if it has ended by itself.
    async fn undo(&self, error: DriverError, made: Made, keeper: Arc<Keeper>) -> DriverError {
        if let Some(process) = &made.process {
            // The monitor may be lost a moment before the process.
            let ended = matches!(error, DriverError::Gone) && timeout(REAP, process.ended()).await.is_ok();
            if !ended {
                let killed = process.signal(Signal::KILL);
                if killed.is_err() || timeout(REAP, process.ended()).await.is_err() {
                    tracing::error!(uuid = %self.uuid, "a QEMU whose start failed cannot be ended");
                }
            }
        }
        companion::end_all(&made.companions).await;
        let (leavings, log) = (self.leavings(), made.log);
        let cleared = blocking(move || {
            leavings.clear(&keeper.close());
            log.map(|log| log.last_words()).unwrap_or_default()
        });
        // A file system that does not answer must not keep the failure from being told.
        let words = timeout(REAP, cleared).await.ok().and_then(Result::ok).unwrap_or_default();
        match error {
            DriverError::Gone => DriverError::Hypervisor(join("QEMU ended before the guest was up", &words)),
            DriverError::Hypervisor(what) if made.process.is_some() || !made.companions.is_empty() => {
                DriverError::Hypervisor(join(&what, &words))
            }
            other => other,
        }
    }
}

impl MemorySource {
    async fn load(&self, line: &Monitor, start: &Start) -> Result<(), DriverError> {
        match self {
            MemorySource::Images { name, images } => {
                let nodes = Nodes::ask(line).await?;
                nodes.unmistakable(name, images)?;
                let nodes = nodes.of_images(images)?;
                let arguments = json!({ "tag": name, "vmstate": nodes.first(), "devices": nodes });
                line.job("snapshot-load", "virtd-snapshot-load", arguments, None).await
            }
            MemorySource::File { path, bytes } => {
                let (file, bytes, wary) = (path.clone(), *bytes, start.lender.is_wary());
                let opened = start.afar(path, move |_| open_memory(&file, bytes, wary)).await?;
                line.read_memory(ClosedAside::of(opened)).await
            }
            MemorySource::Stream(saved) if !saved.is_plain() => start.pour(saved, line).await,
            MemorySource::Stream(saved) => {
                let copy = saved.stream().map_err(|e| DriverError::Internal(format!("a saved machine: {e}")))?;
                line.read_memory(copy).await
            }
        }
    }
}

/// Has it kept that a guest goes on from what was saved of it, before it does.
pub async fn goes_on(recorder: Arc<dyn Recorder>) -> Result<(), DriverError> {
    let kept = blocking(move || recorder.goes_on()).await?;
    kept.map_err(|e| DriverError::Storage(format!("that the guest goes on cannot be kept, so it does not: {e}")))
}

pub fn want(file: &HostFile) -> Want {
    Want { path: file.path.clone(), write: file.write, device: file.device }
}

/// Why a start fails whose companion has gone; nothing while all are there. QEMU's own end, which takes them along, is told
/// first.
async fn lost_companion(companions: &[Living], process: &Process) -> DriverError {
    let why = companion::first_lost(companions).await;
    match timeout(companion::GRACE, process.ended()).await {
        Ok(_) => DriverError::Gone,
        Err(_) => DriverError::Hypervisor(why),
    }
}

/// As a shell would read it.
fn quote(word: &str) -> String {
    match word.contains(|c: char| !c.is_ascii_alphanumeric() && !"-_=,./:+@".contains(c)) {
        true => format!("'{}'", word.replace('\'', "'\\''")),
        false => word.to_owned(),
    }
}

#[cfg(test)]
#[path = "launch_tests.rs"]
mod tests;
