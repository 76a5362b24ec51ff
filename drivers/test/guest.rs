//! A guest in memory: one lock, and no task but those of who is at its consoles.
//!
//! ```text
//!   Running ◀──resume/suspend──▶ Standing ◀──reset── PoweredOff, Panicked
//!      │ ▲                                             ▲
//!      │ └─wake── Asleep ◀─fall asleep─┐               │
//!      └───────────────────────────────┴── power off, panic
//!   any ──destroy, die──▶ Gone
//! ```

use super::consoles::Consoles;
use super::lock;
use async_trait::async_trait;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use virt_model::device::CharSource;
use virt_model::domain::{DomainDef, LifecycleAction};
use virt_model::driver::{ConsoleOptions, DriverError, DriverEvent, EventSink, Exit, Instance, ShutdownMode};
use virt_model::state::{PmSuspended, ShutdownBy, Suspended};

/// A guest.
pub struct Machine {
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
}

struct State {
    mode: Mode,
    sink: Option<EventSink>,
    /// The guest does nothing about its power button.
    deaf: bool,
    /// What it was last asked.
    asked: Option<Asked>,
    /// How often its machine was reset.
    resets: u32,
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
    pub fn new(paused: bool, def: &DomainDef, sink: EventSink) -> Self {
        let mode = if paused { Mode::Standing } else { Mode::Running };
        Machine {
            state: Mutex::new(State { mode, sink: Some(sink), deaf: false, asked: None, resets: 0 }),
            listening: watch::Sender::new(true),
            ends_on_reboot: def.on_reboot != LifecycleAction::Restart,
            begun: Instant::now(),
            samples: AtomicU32::new(0),
            consoles: Consoles::default(),
            ended: CancellationToken::new(),
        }
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
        lock(&self.state).end(exit);
        self.ended.cancel();
    }

    /// Waits while the hypervisor does not listen, as long as QEMU's driver would.
    pub async fn listens(&self) -> Result<(), DriverError> {
        let mut listening = self.listening.subscribe();
        let heard = tokio::time::timeout(super::control::PATIENCE, listening.wait_for(|listening| *listening)).await;
        match heard {
            Ok(_) if self.lives() => Ok(()),
            Ok(_) => Err(DriverError::Gone),
            Err(_) => Err(DriverError::TimedOut("the hypervisor did not answer in time".into())),
        }
    }

    async fn ask(&self, mode: ShutdownMode, what: Asked) -> Result<(), DriverError> {
        if mode == ShutdownMode::Agent {
            return Err(DriverError::Unsupported("guests of the test driver have no agent".into()));
        }
        self.listens().await?;
        let mut state = lock(&self.state);
        state.asked = Some(what);
        match what {
            // A guest that stands or sleeps does not see its power button.
            _ if state.deaf || state.mode != Mode::Running => {}
            Asked::Shutdown => state.power_off(ShutdownBy::Guest, false),
            Asked::Reboot => state.resets += 1,
            Asked::Interrupted => {}
        }
        Ok(())
    }
}

impl State {
    fn tell(&self, event: DriverEvent) {
        if let Some(sink) = &self.sink {
            sink.send(event);
        }
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
pub struct TestInstance(pub std::sync::Arc<Machine>);

#[async_trait]
impl Instance for TestInstance {
    async fn shutdown(&self, mode: ShutdownMode) -> Result<(), DriverError> {
        self.0.ask(mode, Asked::Shutdown).await
    }

    async fn reboot(&self, mode: ShutdownMode) -> Result<(), DriverError> {
        self.0.ask(mode, Asked::Reboot).await
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
        self.0.ask(ShutdownMode::Default, Asked::Interrupted).await
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
        let mut state = lock(&self.0.state);
        match state.mode {
            Mode::Standing => state.become_(Mode::Running, DriverEvent::Resumed),
            Mode::Asleep => state.become_(Mode::Running, DriverEvent::Woken),
            Mode::PoweredOff => return Err(DriverError::Hypervisor("the machine must be reset first".into())),
            _ => {}
        }
        Ok(())
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
