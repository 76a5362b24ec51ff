//! A guest in memory: one lock, and no task but those of who is at its consoles.
//!
//! ```text
//!   Running ◀──resume/suspend──▶ Standing ◀──reset── PoweredOff, Panicked
//!      │ ▲                                             ▲
//!      │ └─wake── Asleep ◀─fall asleep─┐               │
//!      └───────────────────────────────┴── power off, panic
//!   any ──destroy, die──▶ Gone
//! ```

use super::checkpoints::Tracked;
use super::consoles::Consoles;
use super::lock;
use crate::agent::{self, Agent, PowerChange, Turns, change_power};
use crate::qemu::command::{is_vcpu, vcpu_name};
use async_trait::async_trait;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::device::{Channel, CharSource};
use virt_model::domain::{DomainDef, LifecycleAction};
use virt_model::driver::agent::GuestAgent;
use virt_model::driver::{
    ConsoleOptions, DeviceEvent, DriverError, DriverEvent, EventSink, Exit, Instance, ShutdownMode,
};
use virt_model::state::{PmSuspended, ShutdownBy, Suspended};

/// How long a hypervisor that does not listen is waited for.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A guest.
pub struct Machine {
    /// Whose guest it is.
    pub uuid: Uuid,
    state: Mutex<State>,
    /// Whether the hypervisor listens.
    listening: watch::Sender<bool>,
    ends_on_reboot: bool,
    begun: Instant,
    /// How often it was asked for numbers.
    samples: AtomicU32,
    consoles: Consoles,
    /// Fires when it has ended.
    ended: CancellationToken,
    /// Counts devices that it has let go of.
    let_go: watch::Sender<u32>,
    agent: TestAgent,
    /// The bitmaps in its images.
    tracked: Arc<Tracked>,
}

/// What there is of its agent.
struct TestAgent {
    /// The guest has a port for one.
    has_port: bool,
    turns: Turns,
    /// The guest's name for itself, and its cards.
    name: String,
    macs: Vec<String>,
    /// How many file systems are frozen.
    frozen: Mutex<usize>,
    /// It is kept that some are to be thawed.
    kept_frozen: AtomicBool,
    /// By how many nanoseconds its clock was set ahead.
    clock_ahead: AtomicI64,
    /// What programs have printed of whose end the agent was not asked yet, by their numbers.
    printed: Mutex<BTreeMap<u64, Vec<u8>>>,
}

struct State {
    mode: Mode,
    sink: Option<EventSink>,
    /// Tells of what the sink is told.
    changes: watch::Sender<()>,
    /// The guest does nothing about its power button.
    deaf: bool,
    /// What it was last asked.
    asked: Option<Asked>,
    /// How often its machine was reset.
    resets: u32,
    /// The numbers of its vCPUs.
    vcpus: BTreeSet<u32>,
    /// Devices that it is to let go of, when it runs; of each, whether somebody waits for that.
    leaving: BTreeMap<String, bool>,
    /// The names of the channels that programs in it have open.
    open: BTreeSet<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Running,
    Standing,
    PoweredOff,
    Panicked,
    Asleep,
    Gone,
}

/// What a guest can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// To power off.
    Shutdown,
    /// To reboot.
    Reboot,
    /// To look up, by an interrupt that it cannot mask.
    Interrupted,
}

impl Machine {
    pub fn new(paused: bool, def: &DomainDef, sink: EventSink, tracked: Arc<Tracked>) -> Self {
        let mode = if paused { Mode::Standing } else { Mode::Running };
        Machine {
            uuid: def.uuid,
            state: Mutex::new(State {
                mode,
                sink: Some(sink),
                changes: watch::Sender::new(()),
                deaf: false,
                asked: None,
                resets: 0,
                vcpus: def.vcpus_at_boot().0,
                leaving: BTreeMap::new(),
                open: BTreeSet::new(),
            }),
            listening: watch::Sender::new(true),
            ends_on_reboot: def.on_reboot != LifecycleAction::Restart,
            begun: Instant::now(),
            samples: AtomicU32::new(0),
            consoles: Consoles::default(),
            ended: CancellationToken::new(),
            tracked,
            let_go: watch::Sender::new(0),
            agent: TestAgent {
                has_port: agent::channel(def).is_some(),
                turns: Turns::default(),
                name: def.name.clone(),
                macs: def.devices.interfaces.iter().filter_map(|card| Some(card.mac()?.to_string())).collect(),
                frozen: Mutex::default(),
                kept_frozen: AtomicBool::new(false),
                clock_ahead: AtomicI64::new(0),
                printed: Mutex::default(),
            },
        }
    }

    /// Has the CPUs stand or go on, of which nothing is told.
    pub fn stand_still(&self, stands: bool) {
        let mut state = lock(&self.state);
        match (state.mode, stands) {
            (Mode::Running, true) => state.mode = Mode::Standing,
            (Mode::Standing, false) => state.mode = Mode::Running,
            _ => {}
        }
    }

    /// Asks the guest to let go of a device: at once if it runs, else when it runs again.
    pub async fn detach(&self, alias: &str, patience: Duration) -> Result<(), DriverError> {
        self.listens().await?;
        let mut let_go = self.let_go.subscribe();
        {
            let mut state = lock(&self.state);
            if state.mode == Mode::Running {
                state.leaving.remove(alias);
                return Ok(());
            }
            state.leaving.insert(alias.to_owned(), true);
        }
        let gone = || !lock(&self.state).leaving.contains_key(alias);
        let _ = tokio::time::timeout(patience, let_go.wait_for(|_| gone() || !self.lives())).await;
        if !self.lives() {
            return Err(DriverError::Gone);
        }
        match lock(&self.state).leaving.get_mut(alias) {
            None => Ok(()),
            Some(awaited) => {
                *awaited = false;
                Err(DriverError::TimedOut(format!("the guest did not let go of '{alias}' in time, and has it still")))
            }
        }
    }

    /// Whether the guest has let go of a device that it was asked for.
    pub fn has_let_go(&self, alias: &str) -> bool {
        !lock(&self.state).leaving.contains_key(alias)
    }

    /// It runs again, and does what it was asked meanwhile.
    fn lets_go(&self) {
        let mut state = lock(&self.state);
        if state.mode == Mode::Running {
            for (alias, awaited) in std::mem::take(&mut state.leaving) {
                match is_vcpu(&alias) {
                    _ if awaited => {}
                    true => {
                        state.vcpus.retain(|number| vcpu_name(*number) != alias);
                        state.tell(DriverEvent::VcpusChanged);
                    }
                    false => state.tell(DriverEvent::DeviceGone(alias)),
                }
            }
        }
        drop(state);
        self.let_go.send_modify(|count| *count += 1);
    }

    /// Looks at or changes which vCPUs it has.
    pub fn with_vcpus<T>(&self, work: impl FnOnce(&mut BTreeSet<u32>) -> T) -> T {
        work(&mut lock(&self.state).vcpus)
    }

    pub fn lives(&self) -> bool {
        lock(&self.state).mode != Mode::Gone
    }

    pub fn set_deaf(&self, deaf: bool) {
        lock(&self.state).deaf = deaf;
    }

    pub fn set_listening(&self, listening: bool) {
        self.listening.send_replace(listening);
    }

    pub fn asked(&self) -> Option<Asked> {
        lock(&self.state).asked
    }

    pub fn resets(&self) -> u32 {
        lock(&self.state).resets
    }

    /// How long it has been there.
    pub fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Counts that it was asked for numbers.
    pub fn is_sampled(&self) {
        self.samples.fetch_add(1, Ordering::Relaxed);
    }

    pub fn samples(&self) -> u32 {
        self.samples.load(Ordering::Relaxed)
    }

    /// The guest powers off, or reboots where that ends it.
    pub fn power_off(&self, by: ShutdownBy, rebooting: bool) {
        lock(&self.state).power_off(by, rebooting);
    }

    /// The guest reboots by itself.
    pub fn guest_reboots(&self) {
        let mut state = lock(&self.state);
        match self.ends_on_reboot {
            true => state.power_off(ShutdownBy::Guest, true),
            false => state.resets += 1,
        }
    }

    pub fn panic(&self) {
        let mut state = lock(&self.state);
        if matches!(state.mode, Mode::Running | Mode::Standing) {
            state.become_(Mode::Panicked, DriverEvent::Panicked);
        }
    }

    /// The CPUs stop for a reason of their own.
    pub fn report(&self, event: DriverEvent) {
        lock(&self.state).tell(event);
    }

    pub fn stop(&self, why: Suspended) {
        let mut state = lock(&self.state);
        if state.mode == Mode::Running {
            state.become_(Mode::Standing, DriverEvent::Suspended(why));
        }
    }

    pub fn fall_asleep(&self) {
        let mut state = lock(&self.state);
        if state.mode == Mode::Running {
            state.become_(Mode::Asleep, DriverEvent::PmSuspended(PmSuspended::Memory));
        }
    }

    pub fn wake(&self) {
        let mut state = lock(&self.state);
        if state.mode == Mode::Asleep {
            state.become_(Mode::Running, DriverEvent::Woken);
        }
    }

    pub fn end(&self, exit: Exit) {
        if matches!(exit, Exit::Died(_)) && self.lives() {
            self.tracked.are_in_doubt();
        }
        lock(&self.state).end(exit);
        self.ended.cancel();
        self.lets_go();
    }

    /// Waits while the hypervisor does not listen, as long as QEMU's driver would.
    pub async fn listens(&self) -> Result<(), DriverError> {
        let mut listening = self.listening.subscribe();
        let heard = tokio::time::timeout(PATIENCE, listening.wait_for(|listening| *listening)).await;
        match heard {
            Ok(_) if self.lives() => Ok(()),
            Ok(_) => Err(DriverError::Gone),
            Err(_) => Err(DriverError::TimedOut("the hypervisor did not answer in time".into())),
        }
    }

    fn resume(&self) -> Result<(), DriverError> {
        let mut state = lock(&self.state);
        match state.mode {
            Mode::Standing => state.become_(Mode::Running, DriverEvent::Resumed),
            Mode::Asleep => state.become_(Mode::Running, DriverEvent::Woken),
            Mode::PoweredOff => return Err(DriverError::Hypervisor("the machine must be reset first".into())),
            _ => {}
        }
        Ok(())
    }

    pub fn has_agent(&self) -> bool {
        self.agent.has_port
    }

    /// Whether its agent is there: as long as the guest has not ended, whether its CPUs run or stand.
    pub fn agent_is_connected(&self) -> bool {
        self.agent.has_port && matches!(lock(&self.state).mode, Mode::Running | Mode::Standing | Mode::Asleep)
    }

    /// Whether a program in it has that channel open; that of its agent is open while that is there.
    pub fn is_open(&self, channel: &Channel) -> bool {
        let name = channel.target.name.as_deref().unwrap_or_default();
        name == agent::CHANNEL && self.agent_is_connected() || lock(&self.state).open.contains(name)
    }

    /// A program in it opens the channel of that name, or closes it.
    pub fn open(&self, name: &str, open: bool) {
        let mut state = lock(&self.state);
        match open {
            true => _ = state.open.insert(name.to_owned()),
            false => _ = state.open.remove(name),
        }
        state.tell(DriverEvent::PortsChanged);
    }

    /// Waits while its CPUs stand; whether they run then.
    pub async fn goes_on(&self) -> bool {
        let mut changes = lock(&self.state).changes.subscribe();
        loop {
            let mode = lock(&self.state).mode;
            if mode != Mode::Standing {
                return mode == Mode::Running;
            }
            if changes.changed().await.is_err() {
                return false;
            }
        }
    }

    pub fn turns(&self) -> &Turns {
        &self.agent.turns
    }

    pub fn name(&self) -> &str {
        &self.agent.name
    }

    pub fn macs(&self) -> &[String] {
        &self.agent.macs
    }

    pub fn frozen(&self) -> usize {
        *lock(&self.agent.frozen)
    }

    /// So many file systems are frozen from now on.
    pub fn freeze(&self, count: usize) -> usize {
        *lock(&self.agent.frozen) = count;
        count
    }

    /// What programs have printed.
    pub fn printed(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
        lock(&self.agent.printed)
    }

    /// Something has happened to a device.
    pub fn tells_of_device(&self, event: DeviceEvent) {
        lock(&self.state).tell(DriverEvent::Device(event));
    }

    /// Returns when it has ended.
    pub async fn has_gone(&self) {
        self.ended.cancelled().await;
    }

    pub fn kept_frozen(&self) -> bool {
        self.agent.kept_frozen.load(Ordering::SeqCst)
    }

    pub fn set_kept_frozen(&self, frozen: bool) {
        self.agent.kept_frozen.store(frozen, Ordering::SeqCst);
    }

    pub fn clock_ahead(&self) -> i64 {
        self.agent.clock_ahead.load(Ordering::SeqCst)
    }

    pub fn set_clock_ahead(&self, nanoseconds: i64) {
        self.agent.clock_ahead.store(nanoseconds, Ordering::SeqCst);
    }

    async fn change_power(self: &Arc<Self>, mode: ShutdownMode, what: PowerChange) -> Result<(), DriverError> {
        let by_agent = mode == ShutdownMode::Agent || mode == ShutdownMode::Default && self.agent_is_connected();
        if by_agent {
            match change_power(self, what, mode == ShutdownMode::Default).await {
                Err(_) if mode == ShutdownMode::Default => {}
                done => return done,
            }
        }
        let asked = match what {
            PowerChange::Off => Asked::Shutdown,
            PowerChange::Reboot => Asked::Reboot,
        };
        self.ask(asked).await
    }

    async fn ask(&self, what: Asked) -> Result<(), DriverError> {
        self.listens().await?;
        self.is_asked(what);
        Ok(())
    }

    /// The guest is asked, and does it or not.
    pub fn is_asked(&self, what: Asked) {
        let mut state = lock(&self.state);
        state.asked = Some(what);
        match what {
            // A guest that stands or sleeps does not see its power button.
            _ if state.deaf || state.mode != Mode::Running => {}
            Asked::Shutdown => state.power_off(ShutdownBy::Guest, false),
            Asked::Reboot => state.resets += 1,
            Asked::Interrupted => {}
        }
    }
}

impl State {
    fn tell(&self, event: DriverEvent) {
        if let Some(sink) = &self.sink {
            sink.send(event);
        }
        self.changes.send_replace(());
    }

    fn become_(&mut self, mode: Mode, event: DriverEvent) {
        self.mode = mode;
        self.tell(event);
    }

    fn power_off(&mut self, by: ShutdownBy, rebooting: bool) {
        if matches!(self.mode, Mode::Running | Mode::Standing | Mode::Asleep) {
            self.become_(Mode::PoweredOff, DriverEvent::PoweredOff { by, rebooting });
        }
    }

    fn end(&mut self, exit: Exit) {
        if self.mode != Mode::Gone {
            self.become_(Mode::Gone, DriverEvent::Exited(exit));
            self.sink = None;
        }
    }
}

/// What the service holds of a guest.
pub struct TestInstance(pub Arc<Machine>);

#[async_trait]
impl Instance for TestInstance {
    async fn shutdown(&self, mode: ShutdownMode) -> Result<(), DriverError> {
        self.0.change_power(mode, PowerChange::Off).await
    }

    async fn reboot(&self, mode: ShutdownMode) -> Result<(), DriverError> {
        self.0.change_power(mode, PowerChange::Reboot).await
    }

    async fn reset(&self) -> Result<(), DriverError> {
        self.0.listens().await?;
        let mut state = lock(&self.0.state);
        state.resets += 1;
        match state.mode {
            Mode::PoweredOff | Mode::Panicked => state.mode = Mode::Standing,
            Mode::Asleep => state.become_(Mode::Running, DriverEvent::Woken),
            _ => {}
        }
        Ok(())
    }

    async fn inject_nmi(&self) -> Result<(), DriverError> {
        self.0.ask(Asked::Interrupted).await
    }

    fn agent_connected(&self) -> bool {
        self.0.agent_is_connected()
    }

    fn is_open(&self, channel: &Channel) -> bool {
        self.0.is_open(channel)
    }

    fn agent(&self) -> Result<Arc<dyn GuestAgent>, DriverError> {
        Ok(Arc::new(Agent(self.0.clone())))
    }

    async fn wake_up(&self) -> Result<(), DriverError> {
        self.0.listens().await?;
        self.0.wake();
        Ok(())
    }

    async fn open_console(
        &self,
        alias: &str,
        _source: &CharSource,
        options: ConsoleOptions,
    ) -> Result<OwnedFd, DriverError> {
        self.0.consoles.open(alias, options, self.0.ended.clone()).await
    }

    async fn suspend(&self) -> Result<(), DriverError> {
        self.0.listens().await?;
        self.0.stop(Suspended::Paused);
        Ok(())
    }

    async fn resume(&self) -> Result<(), DriverError> {
        self.0.listens().await?;
        let resumed = self.0.resume();
        self.0.lets_go();
        resumed
    }

    async fn destroy(&self, graceful: bool) -> Result<(), DriverError> {
        if graceful && !*self.0.listening.borrow() {
            return Err(DriverError::TimedOut("the hypervisor did not end in time".into()));
        }
        self.0.end(Exit::Requested);
        // Whoever waits for the hypervisor to listen learns that it has gone.
        self.0.set_listening(true);
        Ok(())
    }
}
