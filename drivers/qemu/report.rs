//! From the monitor to the service: keeps what the guest does, and reports what changes, in order.

use super::events::{Guest, Outcome};
use super::qmp::{Event, Listener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};
use virt_model::driver::{Condition, DeviceEvent, DriverEvent, EventSink, Exit};
use virt_model::state::Suspended;

/// Events kept while it is not known what the guest does. A guest that causes more meanwhile loses the later ones, and
/// its condition is asked for anyway.
const MAX_HELD: usize = 1024;
/// The longest name of a device that is passed on.
const LONGEST_NAME: usize = 256;

/// The one who reports.
pub struct Reporter {
    inner: Mutex<Inner>,
    /// Counts everything heard, for those who wait for something.
    heard: watch::Sender<Heard>,
    /// A guest has powered off that is to reboot.
    pub reboot: Notify,
}

struct Inner {
    guest: Guest,
    /// `None` once the guest has gone.
    sink: Option<EventSink>,
    /// Events since the connection, while it is not known what the guest does.
    held: Option<Vec<Event>>,
    agent: AgentPort,
    /// Stops and starts of the CPUs are ours, and of no interest to anybody.
    quiet: bool,
    /// Why its monitor was given up, though it was there.
    given_up: Option<String>,
    /// The device that the guest is asked to let go of.
    leaving: Option<Leaving>,
}

/// A device on its way out, while somebody waits for that.
struct Leaving {
    alias: String,
    /// Whether it has gone; the guest may refuse.
    gone: Option<bool>,
}

/// The port of the guest's agent.
struct AgentPort {
    /// QEMU's name of its device; `None`: there is none.
    device: Option<String>,
    /// Whether it is open inside, if that is known.
    open: Option<bool>,
}

/// What has been heard so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heard {
    /// RESETs.
    pub resets: u64,
    /// RESUMEs and WAKEUPs.
    pub resumes: u64,
    /// Jobs and migrations that became something else, and are not just passing through it.
    pub jobs: u64,
    /// Times that the agent may have been cut off: its port was opened or closed, or the guest was reset, slept or powered off.
    pub cuts: u64,
    /// Trays that have opened or closed.
    pub trays: u64,
    /// Devices that have gone, or were not let go of.
    pub devices: u64,
    /// The monitor has been lost.
    pub closed: bool,
}

impl Reporter {
    /// Reports on `guest` to `sink`; `agent` is QEMU's name of the device that is the port of its agent.
    pub fn new(guest: Guest, sink: EventSink, agent: Option<String>) -> Arc<Self> {
        let agent = AgentPort { device: agent, open: Some(false) };
        let inner = Mutex::new(Inner {
            guest,
            sink: Some(sink),
            held: None,
            agent,
            quiet: false,
            given_up: None,
            leaving: None,
        });
        Arc::new(Reporter { inner, heard: watch::Sender::default(), reboot: Notify::new() })
    }

    /// The ears for a monitor.
    pub fn ears(self: &Arc<Self>) -> Ears {
        Ears(self.clone())
    }

    /// Holds events back until [`Reporter::found`] says what the guest does.
    pub fn hold(&self) {
        let mut inner = self.lock();
        inner.held = Some(Vec::new());
        if inner.agent.device.is_some() {
            inner.agent.open = None;
        }
    }

    /// QEMU's name of the back end of the agent's port, if there is one.
    pub fn agent_back_end(&self) -> Option<String> {
        self.lock().agent.device.as_ref().map(|device| format!("char{device}"))
    }

    /// From now on that is QEMU's name of the device of the agent's port. Nobody has a new one open yet.
    pub fn agent_is_at(&self, device: Option<String>) {
        let mut inner = self.lock();
        if inner.agent.device != device {
            inner.agent.device = device;
            inner.agent_is(false);
        }
    }

    /// Whether an agent has its port open inside the guest, if that is known.
    pub fn agent_is_connected(&self) -> Option<bool> {
        self.lock().agent.open
    }

    /// QEMU was asked whether the agent's port is open: it is told what was so before all events that are still to be heard.
    pub fn agent_found(&self, open: bool) {
        let mut inner = self.lock();
        if inner.agent.open.is_none() {
            inner.agent_is(open);
        }
    }

    /// The guest was just asked what it does; what was held back is heard now. `aloud`: a difference is reported.
    pub fn found(&self, condition: Condition, aloud: bool) {
        let mut inner = self.lock();
        let news = inner.guest.found_again(condition);
        inner.send(news.filter(|_| aloud));
        for event in inner.held.take().unwrap_or_default() {
            self.take(&mut inner, &event);
        }
    }

    /// Looks at or changes what the guest does.
    pub fn guest<T>(&self, work: impl FnOnce(&mut Guest) -> T) -> T {
        work(&mut self.lock().guest)
    }

    /// Does the same and reports what came of it.
    pub fn settle(&self, work: impl FnOnce(&mut Guest) -> Option<DriverEvent>) {
        let mut inner = self.lock();
        let event = work(&mut inner.guest);
        inner.send(event);
    }

    /// From now on stops and starts of the CPUs are not reported; or they are again.
    pub fn be_quiet(&self, quiet: bool) {
        self.lock().quiet = quiet;
    }

    /// The last report.
    pub fn exited(&self, exit: Exit) {
        let mut inner = self.lock();
        inner.send(Some(DriverEvent::Exited(exit)));
        inner.sink = None;
    }

    /// Why the monitor was given up, if that was for what came from it.
    pub fn given_up(&self) -> Option<String> {
        self.lock().given_up.clone()
    }

    /// Somebody waits for that device to go, as long as what is returned is kept: until then its end is no report.
    pub fn awaits(self: &Arc<Self>, alias: &str) -> Awaited {
        self.lock().leaving = Some(Leaving { alias: alias.to_owned(), gone: None });
        Awaited(self.clone())
    }

    /// Reports devices of which it was found that they have gone.
    pub fn have_gone(&self, aliases: Vec<String>) {
        let mut inner = self.lock();
        aliases.into_iter().for_each(|alias| inner.send(Some(DriverEvent::DeviceGone(alias))));
    }

    /// What has been heard so far.
    pub fn heard(&self) -> Heard {
        *self.heard.borrow()
    }

    /// Waits until what has been heard is so.
    pub async fn until(&self, so: impl FnMut(&Heard) -> bool) {
        // Cannot fail: the sender is ours.
        let _ = self.heard.subscribe().wait_for(so).await;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, event: &Event) {
        let mut inner = self.lock();
        let port = event.name == "VSERPORT_CHANGE" && inner.agent.device.as_deref() == event.data["id"].as_str();
        if port && inner.agent.device.is_some() {
            inner.agent_is(event.data["open"] == true);
        }
        match &mut inner.held {
            Some(held) if held.len() < MAX_HELD => held.push(event.clone()),
            Some(_) => {}
            None => self.take(&mut inner, event),
        }
        drop(inner);
        let cut = port || matches!(event.name.as_str(), "RESET" | "SHUTDOWN" | "SUSPEND" | "SUSPEND_DISK");
        self.heard.send_modify(|heard| heard.cuts += u64::from(cut));
        self.heard.send_modify(|heard| match event.name.as_str() {
            "RESET" => heard.resets += 1,
            "RESUME" | "WAKEUP" => heard.resumes += 1,
            "JOB_STATUS_CHANGE" if passing(event) => {}
            "JOB_STATUS_CHANGE" | "MIGRATION" => heard.jobs += 1,
            "DEVICE_TRAY_MOVED" => heard.trays += 1,
            "DEVICE_DELETED" | "DEVICE_UNPLUG_GUEST_ERROR" | "MEM_UNPLUG_ERROR" => heard.devices += 1,
            _ => {}
        });
    }

    fn take(&self, inner: &mut Inner, event: &Event) {
        inner.device(event);
        match inner.guest.take(event) {
            Some(Outcome::Report(DriverEvent::Suspended(Suspended::Paused) | DriverEvent::Resumed)) if inner.quiet => {}
            Some(Outcome::Report(report)) => inner.send(Some(report)),
            Some(Outcome::Reboot) => self.reboot.notify_one(),
            None => {}
        }
    }
}

/// Whether a job goes on by itself from what it has become: nobody waits for that, and it is over when it is asked for.
fn passing(event: &Event) -> bool {
    event.data["status"]
        .as_str()
        .is_some_and(|status| matches!(status, "created" | "running" | "waiting" | "pending" | "aborting" | "null"))
}

impl Inner {
    /// What is said of a device: to who waits for it, else to everybody.
    fn device(&mut self, event: &Event) {
        let gone = match event.name.as_str() {
            "DEVICE_DELETED" => true,
            "DEVICE_UNPLUG_GUEST_ERROR" | "MEM_UNPLUG_ERROR" => false,
            _ => return,
        };
        // Parts of devices have no name; and nobody gives a device one of such a length.
        let alias = event.data["device"].as_str().filter(|alias| alias.len() <= LONGEST_NAME);
        let Some(alias) = alias.map(str::to_owned) else { return };
        match self.leaving.as_mut().filter(|leaving| leaving.alias == alias) {
            Some(leaving) => _ = leaving.gone.get_or_insert(gone),
            None if gone => self.send(Some(DriverEvent::DeviceGone(alias))),
            None => self.send(Some(DriverEvent::Device(DeviceEvent::RemovalFailed { alias }))),
        }
    }

    fn agent_is(&mut self, open: bool) {
        if self.agent.open != Some(open) {
            self.agent.open = Some(open);
            self.send(Some(DriverEvent::AgentChanged));
        }
    }

    fn send(&mut self, event: Option<DriverEvent>) {
        if let (Some(sink), Some(event)) = (&self.sink, event) {
            sink.send(event);
        }
    }
}

/// Somebody waits for a device to go.
pub struct Awaited(Arc<Reporter>);

impl Awaited {
    /// Whether it has gone, once that is known: `Some(false)` if the guest refused.
    pub fn gone(&self) -> Option<bool> {
        self.0.lock().leaving.as_ref().and_then(|leaving| leaving.gone)
    }

    /// Waits until that is known, or nothing is heard any more.
    pub async fn settled(&self) -> Option<bool> {
        self.0.until(|heard| heard.closed || self.gone().is_some()).await;
        self.gone()
    }

    /// Nobody waits any more. What has come of it since is who waited's to know, and is not reported.
    pub fn taken(self) -> Option<bool> {
        self.0.lock().leaving.take().and_then(|leaving| leaving.gone)
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        if let Some(Leaving { alias, gone: Some(true) }) = inner.leaving.take() {
            inner.send(Some(DriverEvent::DeviceGone(alias)));
        }
    }
}

/// Hears one monitor for the reporter.
pub struct Ears(Arc<Reporter>);

impl Listener for Ears {
    fn event(&mut self, event: Event) {
        self.0.hear(&event);
    }

    fn closed(&mut self, why: Option<&str>) {
        self.0.lock().given_up = why.map(str::to_owned);
        self.0.heard.send_modify(|heard| heard.closed = true);
    }
}
