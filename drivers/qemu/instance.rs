//! One running QEMU: what can be asked of it, and its end.
//!
//! Whatever ends the process, `watch` sees it by the pidfd: it waits for the monitor's last events, gives back what the
//! guest had, and reports `Exited` as the last thing.

use super::agent::{self, Port};
use super::changes::{Claims, SYSFS, Undoing, undo};
use super::companion::{Companions, GRACE, Living, end_all, how};
use super::consoles::Consoles;
use super::log::Log;
use super::make;
use super::plan::Loss;
use super::qmp::{COMMAND_TIMEOUT, Qmp};
use super::record::Keeper;
use super::report::Reporter;
use crate::agent::{Agent, PowerChange};
use crate::host::access::Ledger;
use crate::host::filter;
use crate::host::process::{End, Process};
use crate::host::usage::ThreadNumbers;
use crate::host::workers::blocking;
use crate::network::OwnNetwork;
use crate::network::inside::Request;
use async_trait::async_trait;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use uuid::Uuid;
use virt_model::device::chardev::Channel;
use virt_model::device::{CharSource, Graphics};
use virt_model::domain::DomainDef;
use virt_model::domain::cpu::Cpu;
use virt_model::driver::agent::{CardAddresses, GuestAgent};
use virt_model::driver::{ConsoleOptions, DriverError, Exit, Instance, Screen, ShutdownMode};

/// How long QEMU may take to end when it is told to.
const TERM_PATIENCE: Duration = Duration::from_secs(3);
/// How long the kernel may take to end a process that is killed.
const KILL_PATIENCE: Duration = Duration::from_secs(20);
/// How long a process may live on without its monitor.
const MONITOR_GRACE: Duration = Duration::from_secs(2);
/// How long the last events of a process that has gone are waited for.
const LAST_EVENTS: Duration = Duration::from_secs(1);
/// How long a guest runs without a reset before its firmware is taken to be done.
const FIRMWARE: Duration = Duration::from_secs(3);
/// How long giving back files may keep the guest's end from being told.
pub const CLEARING: Duration = Duration::from_secs(5);

/// How often it is looked whether a guest prints more than is kept.
const LOG_LOOK: Duration = Duration::from_millis(500);

/// A running QEMU. Dropping it leaves the guest alone.
pub struct QemuInstance {
    body: Arc<Body>,
    tasks: Vec<AbortHandle>,
}

/// What the verbs and the watching tasks share.
pub struct Body {
    /// The guest's uuid.
    pub uuid: Uuid,
    /// Its process.
    pub process: Process,
    /// What runs beside it.
    pub companions: Companions,
    /// Why it was ended: a companion it cannot be without has gone, or its monitor was given up.
    pub lost: Mutex<Option<String>>,
    /// Its monitor; `None` while it does not answer.
    pub monitor: Mutex<Option<Arc<Qmp>>>,
    /// Why its monitor is not used though it answers.
    pub withheld: Mutex<Option<String>>,
    /// What it is heard doing.
    pub reporter: Arc<Reporter>,
    /// What is kept of it on disk.
    pub keeper: Arc<Keeper>,
    /// What it prints.
    pub log: Log,
    /// What it must give back.
    pub leavings: Leavings,
    /// A reboot ends it: QEMU was told to power off instead.
    pub ends_on_reboot: bool,
    /// Its end was asked for.
    pub requested: AtomicBool,
    /// It has gone, and everybody was told.
    pub gone: watch::Sender<bool>,
    /// One change to the CPUs at a time.
    pub turn: tokio::sync::Mutex<()>,
    /// The agent in the guest.
    pub agent: Port,
    /// One picture of its screens at a time.
    pub drawing: tokio::sync::Mutex<()>,
    /// Keys of one call at a time.
    pub pressing: tokio::sync::Mutex<()>,
    /// What its consoles say, and who is there.
    pub consoles: Consoles,
    /// What its threads are called outside its namespace.
    pub threads: Mutex<ThreadNumbers>,
    /// Waits for the firmware to be done with a reset of ours.
    pub settling: Mutex<Option<AbortHandle>>,
}

/// What a guest leaves behind on the host.
#[derive(Clone)]
pub struct Leavings {
    /// Whose they are.
    pub uuid: Uuid,
    /// Where its sockets are.
    pub runtime_dir: PathBuf,
    /// Where the files are noted that were lent to it.
    pub ledger: Option<Arc<Ledger>>,
    /// Which guest has which of the host's devices.
    pub claims: Claims,
    /// Where its cards of networks are plugged in, if not on the host.
    pub own_network: Option<OwnNetwork>,
}

impl Leavings {
    /// Our monitor's socket.
    pub fn monitor(&self) -> PathBuf {
        self.runtime_dir.join("monitor.sock")
    }

    /// The folder where QEMU makes what it makes; it belongs to QEMU's user.
    pub fn own_dir(&self) -> PathBuf {
        self.runtime_dir.join("qemu")
    }

    /// Gives back devices, removes sockets, then gives back files: those may be on a file system that does not answer, and
    /// nothing else waits for it. Blocks.
    pub fn clear(&self, undoing: &Undoing) {
        undo(&undoing.changes, Path::new(SYSFS), self.uuid);
        self.claims.release(self.uuid);
        if undoing.filtered {
            self.sweep_filters();
        }
        self.own_network.iter().for_each(OwnNetwork::is_left);
        super::tune::clear(self.uuid);
        super::room::clear(&self.own_dir());
        if let Err(error) = make::empty(&self.runtime_dir, self.ledger.is_some()) {
            tracing::warn!(uuid = %self.uuid, %error, "something of the guest's is still there");
        }
        if let Some(ledger) = &self.ledger {
            ledger.give_back(self.uuid);
        }
    }

    /// Takes away the filters of cards that have gone. Blocks.
    pub fn sweep_filters(&self) {
        let swept = match &self.own_network {
            None => filter::sweep().map_err(|error| error.to_string()),
            Some(own) if own.holder().is_some() => {
                own.ask(&Request::SweepFilters).map(drop).map_err(|error| error.to_string())
            }
            // They have gone with the namespaces; on the host such a guest has none.
            Some(_) => Ok(()),
        };
        swept.unwrap_or_else(|why| tracing::warn!(uuid = %self.uuid, %why, "filters of cards that have gone stay"));
    }
}

impl QemuInstance {
    /// An instance of a process that runs, watched from now on.
    pub fn new(body: Body) -> Self {
        let body = Arc::new(body);
        let watching = tokio::spawn(watch(body.clone())).abort_handle();
        let beside = body.companions.all().into_iter();
        let guards = beside.map(|living| tokio::spawn(guard(Arc::downgrade(&body), living)).abort_handle());
        let bounding = tokio::spawn(bound_log(body.clone())).abort_handle();
        let transcripts = body.consoles.transcripts().into_iter();
        let shortening = transcripts.map(|one| tokio::spawn(async move { one.stay_short().await }).abort_handle());
        QemuInstance { tasks: guards.chain([watching, bounding]).chain(shortening).collect(), body }
    }

    /// What is shared with the tasks.
    pub fn body(&self) -> &Arc<Body> {
        &self.body
    }

    /// The same, with a task of its own that goes on in the background.
    pub fn with_task<F: Future<Output = ()> + Send + 'static>(mut self, task: impl FnOnce(Arc<Body>) -> F) -> Self {
        self.tasks.push(tokio::spawn(task(self.body.clone())).abort_handle());
        self
    }
}

impl Drop for QemuInstance {
    fn drop(&mut self) {
        let settling = self.body.settling.lock().unwrap_or_else(PoisonError::into_inner).take();
        settling.iter().for_each(AbortHandle::abort);
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

#[async_trait]
impl Instance for QemuInstance {
    async fn shutdown(&self, mode: ShutdownMode) -> Result<(), DriverError> {
        self.body.change_power(mode, PowerChange::Off).await
    }

    async fn reboot(&self, mode: ShutdownMode) -> Result<(), DriverError> {
        self.body.change_power(mode, PowerChange::Reboot).await
    }

    async fn reset(&self) -> Result<(), DriverError> {
        self.body.in_turn(Body::reset(&self.body)).await
    }

    async fn suspend(&self) -> Result<(), DriverError> {
        self.body.in_turn(self.body.execute("stop", json!({}))).await.map(drop)
    }

    async fn resume(&self) -> Result<(), DriverError> {
        self.body.in_turn(self.body.resume()).await
    }

    async fn inject_nmi(&self) -> Result<(), DriverError> {
        self.body.in_turn(self.body.execute("inject-nmi", json!({}))).await.map(drop)
    }

    async fn wake_up(&self) -> Result<(), DriverError> {
        self.body.in_turn(self.body.wake_up()).await
    }

    async fn screenshot(&self, screen: &Screen) -> Result<OwnedFd, DriverError> {
        self.body.screenshot(screen).await
    }

    async fn open_graphics(&self, graphics: &Graphics, skip_auth: bool) -> Result<OwnedFd, DriverError> {
        self.body.open_graphics(graphics, skip_auth).await
    }

    async fn open_channel(&self, channel: &Channel) -> Result<OwnedFd, DriverError> {
        self.body.open_channel(channel).await
    }

    async fn open_console(
        &self,
        alias: &str,
        source: &CharSource,
        options: ConsoleOptions,
    ) -> Result<OwnedFd, DriverError> {
        self.body.open_console(alias, source, options).await
    }

    async fn send_keys(&self, keys: &[u8], hold: Option<Duration>) -> Result<(), DriverError> {
        self.body.send_keys(keys, hold).await
    }

    fn agent_connected(&self) -> bool {
        self.body.reporter.agent_is_connected() == Some(true)
    }

    fn is_open(&self, channel: &Channel) -> bool {
        channel.info.alias().is_some_and(|alias| self.body.reporter.is_open(alias))
    }

    fn agent(&self) -> Result<Arc<dyn GuestAgent>, DriverError> {
        Ok(Arc::new(Agent(self.body.clone())))
    }

    async fn neighbours(&self, live: &DomainDef) -> Result<Vec<CardAddresses>, DriverError> {
        agent::neighbours(live, self.body.leavings.own_network.as_ref()).await
    }

    fn expanded_cpu(&self) -> Option<Cpu> {
        self.body.keeper.cpu()
    }

    async fn destroy(&self, graceful: bool) -> Result<(), DriverError> {
        self.body.destroy(graceful).await
    }
}

impl Body {
    /// Gives a monitor command.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, DriverError> {
        let monitor = self.monitor()?;
        monitor.execute(command, arguments).await.map_err(DriverError::from)
    }

    /// What its threads are called outside its namespace, as far as it is known.
    pub fn thread_numbers(&self) -> MutexGuard<'_, ThreadNumbers> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn monitor(&self) -> Result<Arc<Qmp>, DriverError> {
        if *self.gone.borrow() {
            return Err(DriverError::Gone);
        }
        let monitor = self.monitor.lock().unwrap_or_else(PoisonError::into_inner).clone();
        monitor.ok_or_else(|| {
            let withheld = self.withheld.lock().unwrap_or_else(PoisonError::into_inner).clone();
            DriverError::TimedOut(withheld.unwrap_or_else(|| "QEMU does not answer on its monitor".to_owned()))
        })
    }

    /// Does one change to the CPUs when its turn comes. Waiting for the turn counts as time QEMU took.
    async fn in_turn<T>(&self, work: impl Future<Output = Result<T, DriverError>>) -> Result<T, DriverError> {
        let turn = timeout(COMMAND_TIMEOUT, self.turn.lock()).await;
        let _turn = turn.map_err(|_| DriverError::TimedOut("QEMU is still busy with an earlier command".into()))?;
        work.await
    }

    /// The next power-off is to be a reboot, or is not any more; returns what was so before.
    pub async fn expect_reboot(&self, reboot: bool) -> Result<bool, DriverError> {
        let before = self.reporter.guest(|guest| {
            let before = guest.reboot_expected();
            guest.expect_reboot(reboot);
            before
        });
        if before != reboot {
            self.keeper.change(move |record| record.rebooting = reboot).await?;
        }
        Ok(before)
    }

    pub async fn press_power_button(&self, reboot: bool) -> Result<(), DriverError> {
        let before = self.expect_reboot(reboot).await?;
        let pressed = self.execute("system_powerdown", json!({})).await;
        if pressed.is_err() {
            self.reporter.guest(|guest| guest.expect_reboot(before));
        }
        pressed.map(drop)
    }

    pub async fn resume(&self) -> Result<(), DriverError> {
        if !self.reporter.guest(|guest| guest.is_asleep()) {
            return self.execute("cont", json!({})).await.map(drop);
        }
        let before = self.reporter.heard().resumes;
        self.execute("system_wakeup", json!({})).await?;
        let woken = timeout(COMMAND_TIMEOUT, self.reporter.until(|heard| heard.closed || heard.resumes > before));
        woken.await.map_err(|_| DriverError::TimedOut("the guest did not wake up".into()))
    }

    async fn reset(self: &Arc<Self>) -> Result<(), DriverError> {
        let asleep = self.reporter.guest(|guest| guest.is_asleep());
        // Else QEMU would take its own reset for a reboot, and power off.
        if self.ends_on_reboot {
            self.execute("set-action", json!({ "reboot": "reset" })).await?;
            self.end_on_reboot_again();
        }
        self.reset_machine().await?;
        if asleep {
            self.execute("cont", json!({})).await?;
        }
        Ok(())
    }

    /// Makes reboots end the guest again, when its firmware is done: SeaBIOS resets the machine a few times more by itself,
    /// which cannot be told from the guest's doing.
    pub fn end_on_reboot_again(self: &Arc<Self>) {
        let settling = tokio::spawn(settle(Arc::downgrade(self))).abort_handle();
        let before = self.settling.lock().unwrap_or_else(PoisonError::into_inner).replace(settling);
        if let Some(before) = before {
            before.abort();
        }
    }

    /// Resets, and waits until QEMU has done it: what is asked next, it does afterwards.
    async fn reset_machine(&self) -> Result<(), DriverError> {
        let before = self.reporter.heard().resets;
        self.execute("system_reset", json!({})).await?;
        let done = timeout(COMMAND_TIMEOUT, self.reporter.until(|heard| heard.closed || heard.resets > before)).await;
        match done {
            Err(_) => Err(DriverError::TimedOut("QEMU did not reset the machine in time".into())),
            Ok(()) if self.reporter.heard().resets > before => Ok(()),
            Ok(()) => Err(DriverError::Gone),
        }
    }

    /// The second half of an asked-for reboot: the guest has powered off, and is to go on.
    pub async fn finish_reboot(self: &Arc<Self>) {
        let again = async {
            self.reset().await?;
            self.execute("cont", json!({})).await
        };
        if let Err(error) = self.in_turn(again).await {
            tracing::warn!(uuid = %self.uuid, %error, "the guest powered off to reboot, but could not be reset");
            self.reporter.settle(|guest| guest.reboot_failed());
        }
        if let Err(error) = self.keeper.change(|record| record.rebooting = false).await {
            tracing::warn!(uuid = %self.uuid, %error, "after a restart of virtd a power-off may be taken for a reboot");
        }
    }

    /// Ends the process: SIGTERM lets QEMU flush its disks, SIGKILL ends one that does not listen.
    pub async fn destroy(&self, graceful: bool) -> Result<(), DriverError> {
        self.requested.store(true, Ordering::SeqCst);
        self.signal(Signal::TERM)?;
        if self.has_gone_within(TERM_PATIENCE).await {
            return Ok(());
        }
        if graceful {
            self.requested.store(false, Ordering::SeqCst);
            let seconds = TERM_PATIENCE.as_secs();
            return Err(DriverError::TimedOut(format!("QEMU did not end within {seconds} s of being told to")));
        }
        self.signal(Signal::KILL)?;
        match self.has_gone_within(KILL_PATIENCE).await {
            true => Ok(()),
            false => Err(DriverError::TimedOut(
                "QEMU was killed, but the kernel has not let go of it: a device or file system does not answer".into(),
            )),
        }
    }

    fn signal(&self, signal: Signal) -> Result<(), DriverError> {
        let sent = self.process.signal(signal);
        sent.map_err(|e| DriverError::Internal(format!("cannot signal QEMU: {e}")))
    }

    /// Whether it has been told to end.
    pub fn is_asked_to_end(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    /// Its QEMU does not talk any more: whether its process has gone, too, or does so in a moment.
    pub async fn is_gone_soon(&self) -> bool {
        self.has_gone_within(KILL_PATIENCE).await
    }

    async fn has_gone_within(&self, patience: Duration) -> bool {
        let mut gone = self.gone.subscribe();
        timeout(patience, gone.wait_for(|gone| *gone)).await.is_ok()
    }

    /// The process lives and its monitor has gone: nobody can see it or talk to it any more.
    async fn lost_monitor(&self) -> (End, bool) {
        if let Ok(end) = timeout(MONITOR_GRACE, self.process.ended()).await {
            return (end, false);
        }
        match self.reporter.given_up() {
            Some(why) => {
                tracing::error!(uuid = %self.uuid, "QEMU's monitor is given up, as {why}; QEMU is killed");
                let what = format!("QEMU's monitor was given up, as {why}, and QEMU killed");
                self.lost.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
            }
            None => tracing::error!(uuid = %self.uuid, "QEMU has closed its monitor and lives on; it is killed"),
        }
        if let Err(error) = self.process.signal(Signal::KILL) {
            tracing::error!(uuid = %self.uuid, %error, "QEMU cannot be killed");
        }
        (self.process.ended().await, true)
    }

    async fn exit(self: &Arc<Self>, end: End, lost_monitor: bool) -> Exit {
        if self.requested.load(Ordering::SeqCst) {
            return Exit::Requested;
        }
        let log = self.log.clone();
        let words = blocking(move || log.last_words()).await.unwrap_or_default();
        if let Some(why) = self.lost.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Exit::Died(join(&why, &words));
        }
        if lost_monitor {
            return Exit::Died(join("QEMU closed its monitor and had to be killed", &words));
        }
        // Where events could not be heard, the code or the words tell.
        let told = self.reporter.guest(|guest| guest.is_ending()) || words.contains("terminating on signal");
        match end {
            End::Code(0) => Exit::Orderly,
            End::Unknown if told => Exit::Orderly,
            End::Code(code) => Exit::Died(join(&format!("QEMU ended with code {code}"), &words)),
            End::Signal(number) => Exit::Died(join(&format!("QEMU was ended by signal {number}"), &words)),
            End::Unknown => Exit::Died(words),
        }
    }
}

/// Waits until the guest has run for a while without a reset, then lets reboots end it.
async fn settle(body: Weak<Body>) {
    while let Some(body) = body.upgrade().filter(|body| !*body.gone.borrow()) {
        let before = body.reporter.heard().resets;
        let again = timeout(FIRMWARE, body.reporter.until(|heard| heard.closed || heard.resets > before)).await;
        if body.reporter.heard().closed {
            return;
        }
        if again.is_ok() || !body.reporter.guest(|guest| guest.is_running()) {
            continue;
        }
        match body.execute("set-action", json!({ "reboot": "shutdown" })).await {
            Err(DriverError::TimedOut(_)) => {}
            Err(error) => return tracing::warn!(uuid = %body.uuid, %error, "a reboot will not end this guest"),
            Ok(_) => return,
        }
    }
}

/// Keeps what a guest prints bounded for as long as it runs.
async fn bound_log(body: Arc<Body>) {
    let (mut gone, mut told) = (body.gone.subscribe(), false);
    while timeout(LOG_LOOK, gone.wait_for(|gone| *gone)).await.is_err() {
        if !body.log.is_too_long() {
            continue;
        }
        let log = body.log.clone();
        let cut = blocking(move || log.cut()).await.unwrap_or(Ok(()));
        if !std::mem::replace(&mut told, true) {
            tracing::warn!(uuid = %body.uuid, error = ?cut.err(), "QEMU prints more than is kept; its log is cut, as often as need be");
        }
    }
}

/// Watches a companion for as long as the guest runs.
pub async fn guard(body: Weak<Body>, companion: Arc<Living>) {
    let end = companion.process.ended().await;
    let Some(body) = body.upgrade().filter(|body| body.companions.has(&companion)) else { return };
    if timeout(GRACE, body.process.ended()).await.is_ok() {
        return;
    }
    let what = format!("{} {} while the guest runs", companion.recorded.name, how(end));
    match companion.recorded.loss {
        Loss::Bear => {
            tracing::error!(uuid = %body.uuid, "{what}; the guest goes on without it until it is started anew")
        }
        Loss::Fatal => {
            tracing::error!(uuid = %body.uuid, "{what}; the guest cannot be without it and is ended");
            *body.lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(what);
            if let Err(error) = body.signal(Signal::KILL) {
                tracing::error!(uuid = %body.uuid, %error, "QEMU cannot be killed");
            }
        }
    }
}

/// Watches a guest to its end.
async fn watch(body: Arc<Body>) {
    let (end, lost_monitor) = loop {
        tokio::select! {
            end = body.process.ended() => break (end, false),
            () = body.reporter.reboot.notified() => {
                let body = body.clone();
                tokio::spawn(async move { body.finish_reboot().await });
            }
            () = body.reporter.until(|heard| heard.closed) => break body.lost_monitor().await,
        }
    };
    if body.monitor.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
        // What it said last is still in the socket.
        let _ = timeout(LAST_EVENTS, body.reporter.until(|heard| heard.closed)).await;
    }
    end_all(&body.companions.close()).await;
    let (leavings, keeper) = (body.leavings.clone(), body.keeper.clone());
    let clearing = blocking(move || {
        leavings.clear(&keeper.close());
    });
    if timeout(CLEARING, clearing).await.is_err() {
        tracing::warn!(uuid = %body.uuid, "giving back the guest's files takes long and goes on in the background");
    }
    let exit = body.exit(end, lost_monitor).await;
    body.reporter.exited(exit);
    body.gone.send_replace(true);
}

/// What happened, and the words that go with it, if any.
pub fn join(what: &str, words: &str) -> String {
    if words.is_empty() { what.to_owned() } else { format!("{what}: {words}") }
}

#[cfg(test)]
#[path = "instance_tests.rs"]
mod tests;
