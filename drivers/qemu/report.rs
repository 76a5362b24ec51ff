//! From the monitor to the service: keeps what the guest does, and reports what changes, in order.

use super::command::is_vcpu;
use super::events::{Guest, Outcome};
use super::qmp::{Event, Listener};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};
use virt_model::driver::{Condition, DeviceEvent, DriverEvent, EventSink, Exit, IoAction, IoFailure};
use virt_model::state::Suspended;
use virt_model::xml::shorten;

/// Events kept while it is not known what the guest does. A guest that causes more meanwhile loses the later ones, and
/// its condition is asked for anyway.
const MAX_HELD: usize = 1024;
/// The longest name of a device that is passed on.
const LONGEST_NAME: usize = 256;
/// More ports than any machine has.
const MOST_PORTS: usize = 4096;

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
    /// The devices of the ports that are open inside the guest, as far as is known.
    open_ports: BTreeSet<String>,
    /// Those of which something was heard since the connection; as `held`.
    fresh_ports: Option<BTreeSet<String>>,
    /// Stops and starts of the CPUs are ours, and of no interest to anybody.
    quiet: bool,
    /// Why its monitor was given up, though it was there.
    given_up: Option<String>,
    /// The device that the guest is asked to let go of.
    leaving: Option<Leaving>,
    /// The drive whose tray we move.
    moving: Option<String>,
    /// Why the last dump of memory has failed.
    dump_failed: Option<String>,
    /// The block job that failed last, and why.
    block_job_failed: Option<(String, String)>,
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
    /// Jobs and migrations that became something else, and are not just passing through it; dumps of memory that ended.
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
            open_ports: BTreeSet::new(),
            fresh_ports: None,
            quiet: false,
            given_up: None,
            leaving: None,
            moving: None,
            dump_failed: None,
            block_job_failed: None,
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
        inner.fresh_ports = Some(BTreeSet::new());
        if inner.agent.device.is_some() {
            inner.agent.open = None;
        }
    }

    /// From now on that is QEMU's name of the device of the agent's port. Nobody has a new one open yet.
    pub fn agent_is_at(&self, device: Option<String>) {
        let mut inner = self.lock();
        if inner.agent.device != device {
            inner.agent.device = device;
            inner.agent_is(false);
        }
    }

    /// The guest has no other ports than those devices. Nobody has a new one open yet.
    pub fn ports_are(&self, devices: &BTreeSet<&str>) {
        let mut inner = self.lock();
        let before = inner.open_ports.len();
        inner.open_ports.retain(|port| devices.contains(&**port));
        if inner.open_ports.len() != before {
            inner.send(Some(DriverEvent::PortsChanged));
        }
    }

    /// QEMU was asked which ports are open: those of which something was heard meanwhile are as that said.
    pub fn ports_found(&self, open: impl IntoIterator<Item = String>) {
        let mut inner = self.lock();
        let fresh = inner.fresh_ports.take().unwrap_or_default();
        let heard = inner.open_ports.iter().filter(|port| fresh.contains(*port)).cloned();
        let found = open.into_iter().filter(|port| !fresh.contains(port)).take(MOST_PORTS);
        let now = heard.collect::<BTreeSet<_>>().into_iter().chain(found).collect();
        if std::mem::replace(&mut inner.open_ports, now) != inner.open_ports {
            inner.send(Some(DriverEvent::PortsChanged));
        }
    }

    /// Whether the port of that device is open inside the guest, as far as is known.
    pub fn is_open(&self, device: &str) -> bool {
        self.lock().open_ports.contains(device)
    }

    /// Whether an agent has its port open inside the guest, if that is known.
    pub fn agent_is_connected(&self) -> Option<bool> {
        self.lock().agent.open
    }

    /// QEMU was asked whether the agent's port is open: it is told what was so before all events that are still to be heard.
    pub fn agent_found(&self, is_open: impl FnOnce(&str) -> bool) {
        let mut inner = self.lock();
        if let (None, Some(device)) = (inner.agent.open, inner.agent.device.clone()) {
            inner.agent_is(is_open(&device));
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

    /// From now on it is us who move the tray of that drive, as long as what is returned is kept.
    pub fn moves_tray(self: &Arc<Self>, drive: &str) -> TrayMoved {
        self.lock().moving = Some(drive.to_owned());
        TrayMoved(self.clone())
    }

    /// Reports devices of which it was found that they have gone.
    pub fn have_gone(&self, aliases: Vec<String>) {
        let mut inner = self.lock();
        aliases.into_iter().for_each(|alias| inner.send(Some(gone(alias))));
    }

    /// Reports that the guest has other vCPUs than it was known to have.
    pub fn has_other_vcpus(&self) {
        self.lock().send(Some(DriverEvent::VcpusChanged));
    }

    /// Why the last dump of memory has failed, if QEMU has said it since this was asked.
    pub fn why_dump_failed(&self) -> Option<String> {
        self.lock().dump_failed.take()
    }

    /// Why the block job of that name has failed, if QEMU has said it since this was asked.
    pub fn why_block_job_failed(&self, id: &str) -> Option<String> {
        self.lock().block_job_failed.take_if(|(failed, _)| failed == id).map(|(_, why)| why)
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
        inner.port(event);
        let port = event.name == "VSERPORT_CHANGE" && inner.agent.device.as_deref() == event.data["id"].as_str();
        if port && inner.agent.device.is_some() {
            inner.agent_is(event.data["open"] == true);
        }
        if let ("BLOCK_JOB_COMPLETED", Some(id), Some(why)) =
            (event.name.as_str(), event.data["device"].as_str(), event.data["error"].as_str())
        {
            inner.block_job_failed = Some((shorten(id), shorten(why)));
        }
        if event.name == "DUMP_COMPLETED" {
            inner.dump_failed = event.data["error"].as_str().map(shorten);
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
            "JOB_STATUS_CHANGE" | "MIGRATION" | "DUMP_COMPLETED" => heard.jobs += 1,
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

/// How block jobs are called that virtd concludes.
pub const BLOCK_JOB: &str = "virtd-block-";

/// Whether a job goes on by itself from what it has become: nobody waits for that, and it is over when it is asked for.
fn passing(event: &Event) -> bool {
    let ours_to_finish = event.data["id"].as_str().is_some_and(|id| id.starts_with(BLOCK_JOB));
    let status = event.data["status"].as_str().filter(|status| *status != "pending" || !ours_to_finish);
    status.is_some_and(|status| matches!(status, "created" | "running" | "waiting" | "pending" | "aborting" | "null"))
}

impl Inner {
    /// What is said of a device: to who waits for it, else to everybody.
    fn device(&mut self, event: &Event) {
        if event.name == "DEVICE_TRAY_MOVED" {
            let drive = event.data["id"].as_str().filter(|drive| drive.len() <= LONGEST_NAME);
            let theirs = drive.filter(|drive| self.moving.as_deref() != Some(drive) && event.data["tray-open"] == true);
            theirs.into_iter().for_each(|drive| self.send(Some(DriverEvent::TrayOpened(drive.to_owned()))));
            return;
        }
        if let Some(told) = told_of_device(event) {
            self.send(Some(DriverEvent::Device(told)));
        }
        let gone = match event.name.as_str() {
            "DEVICE_DELETED" => true,
            "DEVICE_UNPLUG_GUEST_ERROR" | "MEM_UNPLUG_ERROR" => false,
            _ => return,
        };
        // Parts of devices have no name; and nobody gives a device one of such a length.
        let alias = event.data["device"].as_str().filter(|alias| alias.len() <= LONGEST_NAME);
        let Some(alias) = alias.map(str::to_owned) else { return };
        match self.leaving.as_mut().filter(|leaving| leaving.alias == alias) {
            // One that has refused may let go all the same.
            Some(leaving) => leaving.gone = Some(gone || leaving.gone == Some(true)),
            None if gone => self.send(Some(self::gone(alias))),
            None => self.send(Some(DriverEvent::Device(DeviceEvent::RemovalFailed { alias }))),
        }
    }

    /// A port has been opened or closed.
    fn port(&mut self, event: &Event) {
        let device = event.data["id"].as_str().filter(|device| device.len() <= LONGEST_NAME);
        let Some(device) = device.filter(|_| event.name == "VSERPORT_CHANGE") else { return };
        if let Some(fresh) = self.fresh_ports.as_mut().filter(|fresh| fresh.len() < MOST_PORTS) {
            fresh.insert(device.to_owned());
        }
        let changed = match event.data["open"] == true {
            true => self.open_ports.len() < MOST_PORTS && self.open_ports.insert(device.to_owned()),
            false => self.open_ports.remove(device),
        };
        if changed {
            self.send(Some(DriverEvent::PortsChanged));
        }
    }

    fn agent_is(&mut self, open: bool) {
        if self.agent.open != Some(open) {
            self.agent.open = Some(open);
            self.send(Some(DriverEvent::PortsChanged));
        }
    }

    fn send(&mut self, event: Option<DriverEvent>) {
        if let (Some(sink), Some(event)) = (&self.sink, event) {
            sink.send(event);
        }
    }
}

/// What is reported of what has gone.
fn gone(alias: String) -> DriverEvent {
    if is_vcpu(&alias) { DriverEvent::VcpusChanged } else { DriverEvent::DeviceGone(alias) }
}

/// What is passed on as it comes.
fn told_of_device(event: &Event) -> Option<DeviceEvent> {
    let word = |key: &str| event.data[key].as_str().filter(|word| word.len() <= LONGEST_NAME).unwrap_or_default();
    match event.name.as_str() {
        "BLOCK_IO_ERROR" => {
            let action = match word("action") {
                "stop" => IoAction::Pause,
                "report" => IoAction::Report,
                _ => IoAction::None,
            };
            let reason = if event.data["nospace"] == true { IoFailure::NoSpace } else { IoFailure::Failed };
            Some(DeviceEvent::IoError { target: word("node-name").to_owned(), action, reason })
        }
        "BLOCK_WRITE_THRESHOLD" => Some(DeviceEvent::WrittenBeyond {
            target: word("node-name").to_owned(),
            threshold: event.data["write-threshold"].as_u64()?,
            excess: event.data["amount-exceeded"].as_u64()?,
        }),
        "WATCHDOG" => Some(DeviceEvent::WatchdogFired { action: word("action").to_owned() }),
        "MEMORY_FAILURE" => Some(DeviceEvent::MemoryFailure {
            recipient: word("recipient").to_owned(),
            action: word("action").to_owned(),
            action_required: event.data["flags"]["action-required"] == true,
            recursive: event.data["flags"]["recursive"] == true,
        }),
        "BALLOON_CHANGE" => Some(DeviceEvent::BalloonChanged { bytes: event.data["actual"].as_u64()? }),
        _ => None,
    }
}

/// We move a tray.
pub struct TrayMoved(Arc<Reporter>);

impl Drop for TrayMoved {
    fn drop(&mut self) {
        self.0.lock().moving = None;
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
            inner.send(Some(gone(alias)));
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use virt_model::driver::{MediumChange, reports};

    fn event(name: &str, data: serde_json::Value) -> Event {
        Event { name: name.to_owned(), data }
    }

    fn reporter() -> (Arc<Reporter>, virt_model::driver::EventStream) {
        let (sink, stream) = reports();
        (Reporter::new(Guest::found(Condition::Running), sink, None), stream)
    }

    #[tokio::test]
    async fn a_device_that_somebody_waits_for_is_theirs_and_any_other_is_reported() {
        let (reporter, mut stream) = reporter();
        let deleted = |alias: &str| event("DEVICE_DELETED", json!({ "device": alias, "path": "/x" }));
        let awaited = reporter.awaits("net1");
        reporter.hear(&event("DEVICE_DELETED", json!({ "path": "/x/virtio-backend" })));
        reporter.hear(&deleted("net0"));
        assert_eq!(stream.try_recv(), Ok(DriverEvent::DeviceGone("net0".to_owned())));
        assert_eq!(awaited.gone(), None);
        reporter.hear(&deleted("net1"));
        assert_eq!(awaited.settled().await, Some(true));
        assert_eq!(awaited.taken(), Some(true));
        assert!(stream.is_empty(), "who waited tells of it");

        // The guest refuses.
        let awaited = reporter.awaits("net2");
        reporter.hear(&event("DEVICE_UNPLUG_GUEST_ERROR", json!({ "device": "net2", "path": "/x" })));
        assert_eq!(awaited.settled().await, Some(false));
        reporter.hear(&deleted("net2"));
        reporter.hear(&event("DEVICE_UNPLUG_GUEST_ERROR", json!({ "device": "net2", "path": "/x" })));
        assert_eq!(awaited.taken(), Some(true), "it has let go all the same");
        let awaited = reporter.awaits("net2");
        reporter.hear(&event("DEVICE_UNPLUG_GUEST_ERROR", json!({ "device": "net2", "path": "/x" })));
        // Whoever waited has left; then it went.
        drop(awaited);
        reporter.hear(&event("DEVICE_UNPLUG_GUEST_ERROR", json!({ "device": "net2", "path": "/x" })));
        let refused = DeviceEvent::RemovalFailed { alias: "net2".to_owned() };
        assert_eq!(stream.try_recv(), Ok(DriverEvent::Device(refused)));
        let awaited = reporter.awaits("net3");
        reporter.hear(&deleted("net3"));
        drop(awaited);
        assert_eq!(stream.try_recv(), Ok(DriverEvent::DeviceGone("net3".to_owned())), "nobody took it");
        reporter.hear(&deleted(&"x".repeat(LONGEST_NAME + 1)));
        assert!(stream.is_empty(), "no device has such a name");
    }

    #[test]
    fn a_tray_that_the_guest_opens_is_told_and_one_that_we_move_is_not() {
        let (reporter, mut stream) = reporter();
        let moved =
            |open: bool| event("DEVICE_TRAY_MOVED", json!({ "device": "", "id": "sata0-0-0", "tray-open": open }));
        let ours = reporter.moves_tray("sata0-0-0");
        reporter.hear(&moved(true));
        reporter.hear(&moved(false));
        drop(ours);
        assert!(stream.is_empty());
        reporter.hear(&moved(true));
        reporter.hear(&moved(false));
        assert_eq!(stream.try_recv(), Ok(DriverEvent::TrayOpened("sata0-0-0".to_owned())));
        assert!(stream.is_empty());
        assert_eq!(MediumChange::GuestEjected.as_str(), "guest-ejected");
    }

    #[test]
    fn what_befalls_disks_watchdog_and_balloon_is_told() {
        let (reporter, mut stream) = reporter();
        let error = json!({ "device": "", "node-name": "vda-format", "operation": "write", "action": "report",
            "nospace": true, "reason": "No space left on device" });
        reporter.hear(&event("BLOCK_IO_ERROR", error));
        reporter.hear(&event("WATCHDOG", json!({ "action": "none" })));
        let flags = json!({ "action-required": true, "recursive": false });
        let failure = json!({ "recipient": "guest", "action": "inject", "flags": flags });
        reporter.hear(&event("MEMORY_FAILURE", failure));
        reporter.hear(&event("BALLOON_CHANGE", json!({ "actual": 1 << 30 })));
        let (action, reason) = (IoAction::Report, IoFailure::NoSpace);
        let told = [
            DeviceEvent::IoError { target: "vda-format".to_owned(), action, reason },
            DeviceEvent::WatchdogFired { action: "none".to_owned() },
            DeviceEvent::MemoryFailure {
                recipient: "guest".to_owned(),
                action: "inject".to_owned(),
                action_required: true,
                recursive: false,
            },
            DeviceEvent::BalloonChanged { bytes: 1 << 30 },
        ];
        for event in told {
            assert_eq!(stream.try_recv(), Ok(DriverEvent::Device(event)));
        }
    }
}
