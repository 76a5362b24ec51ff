//! Finding a QEMU that outlived the last virtd, and being sure that it is the one.
//!
//! Boot id, process number and start time name the process; the monitor's peer is that process; and QEMU knows the uuid.
//! One that lives and does not answer is held all the same: it can be destroyed, and its monitor is sought until it
//! answers.

use super::adjust::vcpus;
use super::agent::{self, Port};
use super::changes::Undoing;
use super::companion::{Companions, Living, end_all};
use super::consoles::Consoles;
use super::events::{Guest, condition};
use super::instance::{Body, CLEARING, Leavings, QemuInstance};
use super::log::Log;
use super::peer;
use super::plan::Loss;
use super::plug;
use super::qmp::{Qmp, QmpError};
use super::record::{Keeper, Phase, Record};
use super::report::Reporter;
use super::unnoted;
use crate::host::process::{Identity, Process, kill};
use crate::host::workers::blocking;
use serde_json::{Value, json};
use std::borrow::Borrow;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::{Condition, DriverError, Reconnect, Reconnected, Recorder};
use virt_model::state::Suspended;

/// How long a monitor may take to answer before virtd goes on without it.
const CONTACT: Duration = Duration::from_secs(2);
/// What QEMU says of a guest whose CPUs have never run.
const NEVER_RAN: &str = "prelaunch";
/// How long a process whose monitor has gone may take to follow it.
const DYING: Duration = Duration::from_millis(500);
/// How long one that has not answered is listened to before it is called again.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long between calls, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// A guest that is looked for.
pub struct Search {
    /// What is known of it.
    pub found: Reconnect,
    /// See [`Body::ends_on_reboot`].
    pub ends_on_reboot: bool,
    /// What it may have left behind.
    pub leavings: Leavings,
}

impl Search {
    /// Finds it, or cleans up after it.
    pub async fn run(self) -> Result<Option<Reconnected>, DriverError> {
        let record = match serde_json::from_value::<Record>(self.found.record.clone()) {
            Ok(record) => record,
            Err(error) => {
                tracing::error!(uuid = %self.leavings.uuid, %error, "the guest's record cannot be read; its monitor is looked at");
                match self.unnoted().await? {
                    Some(record) => record,
                    None => return self.gone::<Living>(&[], Undoing::default()).await,
                }
            }
        };
        let opening = record.clone();
        let living = blocking(move || open(&opening)).await?;
        let living =
            living.map_err(|e| DriverError::Internal(format!("cannot look for the guest's processes: {e}")))?;
        let (qemu, companions) = living;
        let Some(fd) = qemu else { return self.gone(&companions, record.undoing()).await };
        let process = Process::new(fd);
        let process = process.map_err(|e| DriverError::Internal(format!("cannot watch QEMU: {e}")))?;
        self.adopt(record, process, companions).await
    }

    /// What can be known of a guest whose record cannot be read: its process, and no more. What was made beside it, or changed
    /// on the host for it, stays.
    async fn unnoted(&self) -> Result<Option<Record>, DriverError> {
        let (monitor, uuid) = (self.leavings.monitor(), self.leavings.uuid);
        let at = monitor.clone();
        let holder = blocking(move || unnoted::holder(&at, uuid)).await?;
        let holder = holder.map_err(|e| DriverError::Internal(format!("the guest's process cannot be told: {e}")))?;
        let Some(process) = holder else { return Ok(None) };
        let record = Record {
            phase: Phase::Running,
            uuid,
            exe: PathBuf::new(),
            monitor,
            log_start: 0,
            process: Some(process),
            companions: Vec::new(),
            host_parts: Vec::new(),
            changes: Vec::new(),
            filtered: false,
            claims: Vec::new(),
            rebooting: false,
            frozen: false,
            cpu: None,
        };
        // The next virtd finds it as it finds any other.
        let keeper = Arc::new(Keeper::new(self.found.recorder.clone(), record.clone()));
        if let Err(error) = keeper.change(|_| {}).await {
            tracing::warn!(%uuid, %error, "its guest is looked for again when virtd starts anew");
        }
        Ok(Some(record))
    }

    /// Cleans up after a guest that has gone. A file system that does not answer keeps nobody from learning that.
    async fn gone<L: Borrow<Living>>(
        self,
        companions: &[L],
        undoing: Undoing,
    ) -> Result<Option<Reconnected>, DriverError> {
        end_all(companions).await;
        let leavings = self.leavings.clone();
        match timeout(CLEARING, blocking(move || leavings.clear(&undoing))).await {
            Ok(cleared) => cleared?,
            Err(_) => {
                tracing::warn!(uuid = %self.leavings.uuid, "giving back the guest's files takes long and goes on in the background");
            }
        }
        Ok(None)
    }

    async fn adopt(
        self,
        record: Record,
        process: Process,
        companions: Vec<Living>,
    ) -> Result<Option<Reconnected>, DriverError> {
        if let Err(error) = self.leavings.claims.take(record.uuid, &self.found.live.name, &record.all_claims()) {
            tracing::error!(uuid = %record.uuid, %error, "two guests have the same device of the host's");
        }
        let mut guest = Guest::found(self.found.last);
        guest.expect_reboot(record.rebooting);
        let reporter = Reporter::new(guest, self.found.events.clone(), agent::device(&self.found.live));
        let caller = Caller {
            path: record.monitor.clone(),
            pid: record.process.as_ref().map_or(0, |identity| identity.pid),
            uuid: record.uuid,
            devices: plug::that_can_go(&self.found.live),
            has_ports: !self.found.live.devices.channels.is_empty(),
            reporter: reporter.clone(),
            live: self.found.live.clone(),
            is_to_run: record.phase == Phase::Running && self.found.last == Condition::Running,
        };
        let contact = tokio::select! {
            contact = caller.call(CONTACT) => contact,
            _ = process.ended() => return self.gone(&companions, record.undoing()).await,
        };
        let rebooting = record.rebooting;
        let loaded = (record.phase == Phase::Loaded)
            .then(|| Loaded { recorder: self.found.recorder.clone(), last: self.found.last });
        let body = self.body(record, process, companions, reporter.clone());
        let (monitor, status) = match contact {
            Ok(contact) => contact,
            Err(error) => {
                // One that is just dying closes its monitor first.
                if timeout(DYING, body.process.ended()).await.is_ok() {
                    let undoing = body.keeper.close();
                    return self.gone(&body.companions.close(), undoing).await;
                }
                tracing::warn!(uuid = %body.uuid, %error, "QEMU runs and does not answer; its monitor is sought on");
                return Ok(Some(sought(body, caller, loaded, self.found.last)));
            }
        };
        let status = match &loaded {
            None => status,
            Some(loaded) => match loaded.goes_on(&body, &monitor, status).await {
                Ok(status) => status,
                Err(error) => {
                    reporter.found(status, false);
                    body.is_withheld(&error);
                    return Ok(Some(sought(body, caller, Some(loaded.clone()), status)));
                }
            },
        };
        *body.monitor.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(monitor));
        reporter.found(status, false);
        let instance = QemuInstance::new(body);
        if self.ends_on_reboot {
            // The last virtd may have been killed in the midst of a reset.
            instance.body().end_on_reboot_again();
        }
        // It powered off to reboot while virtd was away.
        let condition = if rebooting && status == Condition::PoweredOff {
            reporter.guest(Guest::reboots_now);
            instance.body().finish_reboot().await;
            Condition::Running
        } else {
            status
        };
        Ok(Some(Reconnected { instance: Arc::new(instance), condition, unmarked: false }))
    }

    fn body(&self, record: Record, process: Process, companions: Vec<Living>, reporter: Arc<Reporter>) -> Body {
        Body {
            uuid: record.uuid,
            process,
            companions: Companions::of(companions),
            lost: Mutex::default(),
            monitor: Mutex::new(None),
            reporter,
            log: Log::found(&self.found.log_file, record.log_start),
            keeper: Arc::new(Keeper::new(self.found.recorder.clone(), record)),
            leavings: self.leavings.clone(),
            ends_on_reboot: self.ends_on_reboot,
            requested: AtomicBool::new(false),
            gone: watch::Sender::new(false),
            turn: tokio::sync::Mutex::default(),
            agent: Port::of(&self.found.live),
            drawing: tokio::sync::Mutex::default(),
            pressing: tokio::sync::Mutex::default(),
            consoles: Consoles::of(&self.found.live, &self.leavings),
            threads: Mutex::default(),
            settling: Mutex::default(),
            withheld: Mutex::default(),
        }
    }
}

/// The process of a guest that was up, and what runs beside it. One whose start was cut off is ended. Blocks.
fn open(record: &Record) -> std::io::Result<(Option<OwnedFd>, Vec<Living>)> {
    let qemu = record.process.as_ref().map(Identity::open).transpose()?.flatten();
    let (mut companions, mut lost) = (Vec::new(), Vec::new());
    for recorded in &record.companions {
        match recorded.open()? {
            Some(living) => companions.push(living),
            None => lost.push(recorded),
        }
    }
    let Some(fd) = qemu else { return Ok((None, companions)) };
    let uuid = record.uuid;
    if !matches!(record.phase, Phase::Loaded | Phase::Running) {
        tracing::info!(%uuid, "its start was cut off; its QEMU is ended");
    } else {
        lost.iter().for_each(|lost| tracing::error!(%uuid, "{} ended while virtd was away", lost.name));
        if lost.iter().all(|lost| lost.loss == Loss::Bear) {
            return Ok((Some(fd), companions));
        }
        tracing::error!(%uuid, "the guest cannot be without it and is ended");
    }
    kill(&fd);
    Ok((None, companions))
}

/// Who calls a monitor.
struct Caller {
    path: PathBuf,
    pid: i32,
    uuid: Uuid,
    /// Those that it had when last seen, and may have let go of since.
    devices: Vec<String>,
    /// Whether there are channels, which something in the guest may have open.
    has_ports: bool,
    reporter: Arc<Reporter>,
    /// As it ran when last seen.
    live: Arc<DomainDef>,
    /// Its CPUs ran, or are told to when its QEMU is ready.
    is_to_run: bool,
}

impl Caller {
    /// Calls, makes sure who answers, and asks what the guest does. What is heard is held back until that is told.
    async fn call(&self, within: Duration) -> Result<(Qmp, Condition), DriverError> {
        let call = async {
            self.reporter.hold();
            let stream = peer::connect(&self.path, self.pid).await?;
            let monitor = Qmp::negotiate(stream, self.reporter.ears(), within).await?;
            let known = monitor.execute("query-uuid", json!({})).await?;
            if known.get("UUID").and_then(Value::as_str) != Some(&self.uuid.to_string()) {
                return Err(DriverError::Internal("its QEMU knows itself by another uuid".into()));
            }
            let status = monitor.execute("query-status", json!({})).await?;
            let mut status = status.get("status").and_then(Value::as_str).unwrap_or_default();
            if self.is_to_run && status == NEVER_RAN {
                // The last virtd was cut off in the last step of its start.
                monitor.execute("cont", json!({})).await?;
                status = "running";
            }
            if self.has_ports {
                let all = monitor.execute("query-chardev", json!({})).await?;
                let all = all.as_array().map(Vec::as_slice).unwrap_or_default();
                let open = all.iter().filter(|one| one["frontend-open"] == true);
                // Each back end is called as its device.
                let open = open.filter_map(|one| one["label"].as_str()?.strip_prefix("char"));
                let open: Vec<String> = open.map(str::to_owned).collect();
                self.reporter.agent_found(|device| open.iter().any(|port| port == device));
                self.reporter.ports_found(open);
            }
            self.reporter.have_gone(plug::missing(&monitor, &self.devices).await?);
            // Some may have come or gone when the last virtd was cut off.
            if self.live.maximum_vcpus() > 1
                && vcpus::present_by(&monitor, &self.live).await? != self.live.vcpus_at_boot().0
            {
                self.reporter.has_other_vcpus();
            }
            Ok((monitor, condition(status)))
        };
        let late = || DriverError::from(QmpError::TimedOut("hello".into()));
        timeout(within, call).await.unwrap_or_else(|_| Err(late()))
    }
}

/// A guest of which the last virtd was cut off between loading what was saved of it and hearing that it goes on.
#[derive(Clone)]
struct Loaded {
    recorder: Arc<dyn Recorder>,
    /// What it did when last seen, or was to do.
    last: Condition,
}

impl Loaded {
    /// Lets it go on from where it was loaded, once it is kept that it does; nobody else has its monitor yet. Says what it does then.
    /// Error: that cannot be kept, so it is as it was found.
    async fn goes_on(&self, body: &Body, monitor: &Qmp, status: Condition) -> Result<Condition, DriverError> {
        super::launch::goes_on(self.recorder.clone()).await?;
        let on = async {
            // It stands as it was loaded, or went on and has stopped since: it was to run, and nobody has told it otherwise.
            let stands = matches!(status, Condition::Suspended(Suspended::Paused)) && self.last == Condition::Running;
            if stands {
                monitor.execute("cont", json!({})).await?;
            }
            Ok::<_, DriverError>(if stands { Condition::Running } else { status })
        };
        let status = on.await.unwrap_or_else(|error| {
            tracing::error!(uuid = %body.uuid, %error, "its guest was loaded from what was saved of it, and does not go on");
            status
        });
        if let Err(error) = body.keeper.change(|record| record.phase = Phase::Running).await {
            tracing::warn!(uuid = %body.uuid, %error, "the next virtd takes its guest for one that was loaded just now");
        }
        Ok(status)
    }
}

impl Body {
    /// Its monitor answers, and is not used until it is kept that its guest goes on.
    fn is_withheld(&self, error: &DriverError) {
        let why = format!(
            "its guest was loaded from what was saved of it, and stands: {error}; this is tried again and again"
        );
        tracing::error!(uuid = %self.uuid, "{why}");
        *self.withheld.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
    }
}

/// A guest that does this as far as is known, and whose monitor cannot be used yet: that is sought on.
fn sought(body: Body, caller: Caller, loaded: Option<Loaded>, condition: Condition) -> Reconnected {
    let unmarked = loaded.is_some();
    let instance = QemuInstance::new(body).with_task(|body| seek(body, caller, loaded));
    Reconnected { instance: Arc::new(instance), condition, unmarked }
}

/// Calls a monitor until it answers and may be used, then tells what the guest does.
async fn seek(body: Arc<Body>, caller: Caller, loaded: Option<Loaded>) {
    let mut pause = PAUSES.0;
    loop {
        let called = async {
            let (monitor, condition) = caller.call(PATIENCE).await?;
            let Some(loaded) = &loaded else { return Ok((monitor, condition)) };
            let on = loaded.goes_on(&body, &monitor, condition).await;
            on.map(|condition| (monitor, condition)).inspect_err(|error| body.is_withheld(error))
        };
        match called.await {
            Ok((monitor, condition)) => {
                tracing::info!(uuid = %body.uuid, "QEMU answers again");
                *body.monitor.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(monitor));
                if body.ends_on_reboot {
                    body.end_on_reboot_again();
                }
                return caller.reporter.found(condition, true);
            }
            Err(error) => tracing::debug!(uuid = %body.uuid, %error, "QEMU still does not answer"),
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}
