//! QEMU: a process per guest, made from the definition, moved over its monitor.
//!
//! ```text
//!   definition ─complete─▶ ─check─▶ ─command─▶ argv ─launch─▶ process + monitor = instance ─▶ reports
//!   record ────────────────find──────────────────────────────▶        "
//! ```

mod adjust;
mod agent;
mod beside;
mod block;
pub mod capabilities;
mod changes;
pub mod check;
pub mod checked;
pub mod command;
pub mod companion;
pub mod complete;
mod console;
mod consoles;
mod declared;
mod domain_capabilities;
mod driver;
mod events;
mod expanded;
mod find;
#[allow(clippy::disallowed_methods, reason = "the descriptors of this host's distribution")]
pub mod firmware;
mod format;
pub mod given;
mod hostdev;
mod instance;
mod known;
mod launch;
mod lending;
mod live;
#[allow(clippy::disallowed_methods, reason = "a folder that only root writes")]
mod log;
mod make;
mod media;
mod monitor;
mod needs;
mod peer;
pub mod plan;
mod plug;
mod privileges;
mod qmp;
mod record;
mod report;
mod room;
mod snapshot;
mod spawn;
mod stats;
#[allow(clippy::disallowed_methods, reason = "goes through a folder by its descriptor, and our own state")]
mod takeover;
mod taking;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys, /proc and /dev")]
pub mod tap;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys, /proc and /dev")]
mod tune;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /proc")]
mod unnoted;
mod wall;

use crate::DriverConfig;
use crate::host::lender::Lender;
use crate::host::wall::{Ground, GroundToCome};
use crate::host::workers::blocking;
use crate::host::workers::{Errand, Workers};
use crate::network::OwnNetwork;
use crate::secret::Vault;
use capabilities::{Asked, Capabilities, Prober, default_emulator};
pub use changes::Claims;
use changes::SYSFS;
use complete::{Chosen, go_live};
use instance::{Body, Leavings, QemuInstance};
use launch::{MONITOR_FD, Start};
use live::Ports;
use privileges::Privileges;
use std::any::Any;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use virt_model::domain::{DomainDef, LifecycleAction};
use virt_model::driver::{DriverError, Instance, Launch, Running};
use virt_model::secret::{SecretName, SecretUser};
use virt_model::xml::{Finding, FindingKind};

/// Drives QEMU on this host.
#[derive(Clone)]
pub struct QemuDriver(Arc<Inner>);

struct Inner {
    prober: Arc<Prober>,
    ports: Ports,
    claims: Claims,
    own_network: Option<OwnNetwork>,
    privileges: Privileges,
    /// Who keeps secrets.
    secrets: Arc<Vault>,
    /// Where is what belongs to guests and has no other place.
    state_dir: PathBuf,
    /// Who looks at guests' files.
    workers: Workers,
    /// What machines can have, by kind and name of the machine, and whose capabilities that is of.
    offers: Arc<tokio::sync::Mutex<Offers>>,
    /// Threads and bytes of a guest, beside what its machine has.
    bounds: (u64, u64),
    /// What clients have given to be written, and is not settled.
    sealing: snapshot::Sealing,
}

/// By what a start was accepted: the emulator as it was judged, which is held, by which parts of the definition it was found, and
/// the definition that it can run.
struct Judged {
    by: (Option<String>, Option<String>),
    asked: Asked,
    passed: check::Passed,
}

/// A start that has not begun.
struct Beginning {
    start: Start,
    /// The ground of QEMU's wall, which is being made, where root makes the wall.
    ground: Option<GroundToCome>,
    /// The machine that it makes.
    live: Arc<DomainDef>,
    /// They are kept free for it meanwhile.
    ports: live::Reserved,
}

/// Documents by architecture, kind and machine, each with what it was made of.
type Offers = HashMap<(String, String, String), (Arc<Capabilities>, String)>;

impl QemuDriver {
    /// A driver for this host. Reads the ledger of lent files; what was lent before the host booted is given back in the
    /// background, where there is a runtime to do it in.
    pub fn new(config: &DriverConfig) -> QemuDriver {
        let privileges = Privileges::new(config);
        let prober = Prober::new(Some(config.cache_dir.clone()), privileges.to_probe()).keeping_in(&config.state_dir);
        let workers = Workers::default();
        let prober = prober.certified_in(&config.tls_dir).with_kvm(config.kvm).working_with(&workers);
        if let Some(ledger) = privileges.ledger()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(lending::give_back_due(ledger.clone(), workers.clone()));
        }
        QemuDriver(Arc::new(Inner {
            prober: Arc::new(prober),
            workers,
            ports: Ports::default(),
            claims: config.claims.clone(),
            own_network: config.own_network.clone(),
            offers: Arc::default(),
            privileges,
            secrets: config.secrets.clone(),
            state_dir: config.state_dir.clone(),
            bounds: (config.guest_threads, config.guest_overhead),
            sealing: snapshot::Sealing::default(),
        }))
    }

    async fn capabilities_for(&self, def: &DomainDef) -> Arc<Capabilities> {
        self.0.prober.known(&emulator(def).await).await
    }

    /// The same for whoever may define machines: the emulator is asked, if need be.
    async fn learnt_for(&self, def: &DomainDef) -> Arc<Capabilities> {
        match &def.devices.emulator {
            Some(path) => self.0.prober.learn_of(def.uuid, Path::new(path)).await,
            None => self.0.prober.learn_of_own(def.uuid, arch_of(def)).await,
        }
    }

    fn complete_for(&self, def: &mut DomainDef, caps: &Capabilities) -> Result<(), DriverError> {
        complete::complete(def, caps).map_err(DriverError::Config)?;
        firmware::place_variables(def, &self.0.state_dir);
        Ok(())
    }

    /// What a start needs of the host's files and does not find, as far as that can be told: images always, the rest where
    /// its command can be built. `restored`: it starts from a snapshot.
    async fn lacks_files(
        &self,
        def: &DomainDef,
        caps: Arc<Capabilities>,
        restored: bool,
    ) -> Result<(Vec<needs::Unmet>, Result<(), Vec<Finding>>), DriverError> {
        let own = guests_dir(def);
        let (as_us, mut here) = (self.0.privileges.are_ours(), def.clone());
        let errand = Errand::new(def.uuid, "the files of the machine");
        let looked = self.0.workers.run(errand, move |_| {
            let places = hostdev::find_usb(&mut here, Path::new(SYSFS), restored).unwrap_or_default();
            let place = command::Place::now(&own, MONITOR_FD, !as_us);
            let command = check::checked_command(&places.written_into(&here), &caps, &place);
            let lacks = needs::unmet(&here, command.as_ref().ok(), &own, restored, as_us);
            Ok((lacks, command.map(drop)))
        });
        looked.await
    }

    /// Refuses what a start from power off would be refused for.
    async fn passes(&self, def: &DomainDef, caps: Arc<Capabilities>) -> Result<check::Passed, DriverError> {
        let (inner, here) = (self.0.clone(), def.clone());
        let errand = Errand::new(def.uuid, "the files of the machine");
        self.0.workers.run(errand, move |_| inner.accept(here, caps)).await
    }

    /// By whose rights tools run that work for no guest.
    pub fn tool_rights(&self) -> crate::storage::ToolRights {
        let inner = self.0.clone();
        Arc::new(move || inner.privileges.tools())
    }

    /// The secrets that it names and cannot have, each with the device that needs it.
    async fn lacks_secrets(&self, def: &DomainDef) -> Result<Vec<(SecretUser, DriverError)>, DriverError> {
        let named = def.secret_names();
        if named.is_empty() {
            return Ok(Vec::new());
        }
        let vault = self.0.secrets.clone();
        let lacking = move |(user, name): (SecretUser, SecretName)| {
            let lack = vault.lacks(&name, user.only_takes())?;
            Some((user, lack))
        };
        blocking(move || named.into_iter().filter_map(lacking).collect()).await
    }

    /// As [`Privileges::lender`], which may block: the database of users may be far away. `process` is its QEMU, if it runs.
    async fn lender(&self, def: &DomainDef, process: Option<i32>) -> Result<Lender, DriverError> {
        if self.0.privileges.are_ours() {
            return Ok(Lender::Ours);
        }
        let (inner, machine, kvm) = (self.0.clone(), def.uuid, def.kind == "kvm");
        blocking(move || inner.privileges.lender(machine, kvm, process)).await?
    }

    async fn make(
        &self,
        launch: Launch,
        cancel: CancellationToken,
    ) -> Result<(QemuInstance, Arc<DomainDef>), DriverError> {
        let Beginning { start, ground, mut live, ports: _ports } = self.starting(launch, cancel).await?;
        let launch::Up { instance, devices, links } = start.run(ground, live.clone()).await?;
        let running = Arc::make_mut(&mut live);
        live::set_terminals(running, &devices);
        live::name_links(running, links);
        Ok((instance, live))
    }

    /// What its QEMU can do: as it was judged when the start was accepted, or as it is now.
    async fn asked_for(&self, def: &DomainDef, judged: Option<&Judged>) -> Result<Asked, DriverError> {
        match judged {
            Some(judged) => Ok(judged.asked.clone()),
            None => self.0.prober.probe(def.uuid, &emulator(def).await).await,
        }
    }

    /// A start that has not begun.
    async fn starting(&self, launch: Launch, cancel: CancellationToken) -> Result<Beginning, DriverError> {
        let judged = launch.accepted.0.as_ref().and_then(|accepted| accepted.downcast_ref::<Judged>());
        let judged = judged.filter(|judged| judged.by == names_emulator(&launch.def));
        let Asked { capabilities: caps, program } = tokio::select! {
            asked = self.asked_for(&launch.def, judged) => asked?,
            () = cancel.cancelled() => return Err(DriverError::Cancelled),
        };
        let lender = self.lender(&launch.def, None).await?;
        let ground = lender.is_wary().then(Ground::begin).transpose();
        let ground = ground.map_err(|e| beside::unshown("QEMU", &e))?;
        let passed = judged.map(|judged| &judged.passed).filter(|passed| passed.is(&launch.def));
        let mut live = DomainDef::clone(&launch.def);
        let restored = launch.from.is_some();
        live::leave_out_missing_media(&mut live, restored, &self.0.workers).await?;
        declared::hold(&self.0.workers, &live).await?;
        let has_none = live.devices.hostdevs.is_empty() && live.devices.vsock.is_none();
        let seek = move || {
            let places = hostdev::find_usb(&mut live, Path::new(SYSFS), restored).map_err(DriverError::Config)?;
            let vsock = live::open_vsock(&mut live)?;
            Ok::<_, DriverError>((live, places, vsock))
        };
        // What a machine has none of is not looked for on the host.
        let (mut live, usb, vsock) = if has_none { seek()? } else { blocking(seek).await?? };
        let claims = self.0.claims.clone();
        let (runtime_dir, own_network) = (launch.runtime_dir.clone(), self.0.own_network.clone());
        let leavings = Leavings { uuid: live.uuid, runtime_dir, ledger: None, claims, own_network };
        let own_dir = leavings.own_dir();
        let mut ports = self.0.ports.reserve();
        let mut free_port = |address: &str, port| ports.take(address, port);
        let encrypts = caps.site.certificates(capabilities::End::Server).is_ok();
        go_live(&mut live, &mut Chosen { runtime_dir: &own_dir, encrypts, free_port: &mut free_port })
            .map_err(DriverError::Config)?;
        let place = command::Place::now(&own_dir, MONITOR_FD, lender.is_wary());
        let mut started = usb.written_into(&live);
        let pinned = launch.from.as_ref().and_then(|from| from.cpu().cloned());
        if let Some(then) = &pinned {
            started.cpu = Some(command::pinned(started.cpu.as_ref(), then, &caps));
        }
        let command = match passed {
            Some(passed) => passed.command(&started, &place),
            None => check::checked_command(&started, &caps, &place),
        };
        let mut command = command.map_err(DriverError::Config)?;
        let from = launch.from.map(snapshot::source).transpose()?;
        if let Some(plan::MemorySource::File { .. } | plan::MemorySource::Stream(_)) = &from {
            command.args.extend(["-incoming".to_owned(), "defer".to_owned()]);
        }
        let start = Start {
            from,
            pinned,
            uuid: live.uuid,
            name: live.name.clone(),
            program,
            command,
            paused: launch.paused,
            reset_nvram: launch.reset_nvram,
            ends_on_reboot: ends_on_reboot(&live),
            tuning: tune::Tuning::of(&live),
            bounds: tune::Bounds::of(&live, self.0.bounds.0, self.0.bounds.1),
            started,
            vsock,
            claims: self.0.claims.clone(),
            own_network: self.0.own_network.clone(),
            secrets: self.0.secrets.clone(),
            state_dir: caps.site.state_dir.clone(),
            workers: self.0.workers.clone(),
            lender,
            runtime_dir: launch.runtime_dir,
            log_file: launch.log_file,
            recorder: launch.recorder,
            events: launch.events,
            cancel,
        };
        Ok(Beginning { start, ground, live: Arc::new(live), ports })
    }
}

impl Inner {
    /// Devices and users of the host that `def` needs and that are not there. Blocks.
    fn missing_on_host(&self, def: &DomainDef) -> Vec<Finding> {
        let mut found = hostdev::findings(def, Path::new(SYSFS));
        found.extend(tap::findings(def, Path::new(SYSFS), self.own_network.is_some()));
        if let Err(error) = self.privileges.check() {
            found.push(Finding::anywhere(FindingKind::Unsupported, "/", error.to_string()));
        }
        found
    }

    /// See [`QemuDriver::passes`]; the command line is built once for all that looks at it. Blocks.
    fn accept(&self, def: DomainDef, caps: Arc<Capabilities>) -> Result<check::Passed, DriverError> {
        let (own, as_us, mut here) = (guests_dir(&def), self.privileges.are_ours(), def.clone());
        let places = hostdev::find_usb(&mut here, Path::new(SYSFS), false).unwrap_or_default();
        let place = command::Place::now(&own, MONITOR_FD, !as_us);
        let missing = self.missing_on_host(&def);
        let passed = check::pass(def, &places.written_into(&here), caps, &place, missing);
        let (passed, command) = passed.map_err(DriverError::Config)?;
        if let Some(lack) = needs::unmet(&here, Some(&command), &own, false, as_us).into_iter().next() {
            return Err(lack.error());
        }
        let taken = needs::taken_ports(&here).into_iter().next();
        taken.map_or(Ok(passed), |port| Err(DriverError::Refused(port.message)))
    }

    /// What may be on disk of that guest alone. What an earlier definition of it had made is among it; the folder of a TPM
    /// that a definition names is not: whoever named it may keep more in it.
    fn belongings(&self, def: &DomainDef) -> Vec<PathBuf> {
        let named = def.os.nvram.as_ref().and_then(|nvram| nvram.path.as_ref()).map(PathBuf::from);
        let mut all: Vec<PathBuf> = named.into_iter().collect();
        for path in firmware::variables_below(&self.state_dir, def.uuid) {
            if !all.contains(&path) {
                all.push(path);
            }
        }
        all.push(command::tpm_state(&self.state_dir, def.uuid));
        all
    }
}

/// A started guest on its way to whoever asked for it; ended if they have gone.
struct Delivery(Option<(Arc<QemuInstance>, Arc<DomainDef>)>);

impl Delivery {
    fn accept(mut self) -> Result<Running, DriverError> {
        let (instance, live) = self.0.take().ok_or_else(|| DriverError::Internal("delivered twice".into()))?;
        Ok(Running { instance, live })
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if let Some((instance, _)) = self.0.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move {
                if let Err(error) = instance.destroy(false).await {
                    tracing::error!(%error, "a guest that nobody waited for cannot be ended");
                }
            });
        }
    }
}

/// Where the sockets of a guest are with the installed virtd; those of another `--root` are known when it starts.
fn guests_dir(def: &DomainDef) -> PathBuf {
    Path::new("/run/virt/guests").join(def.uuid.to_string()).join("qemu")
}

/// By what [`emulator`] finds it.
fn names_emulator(def: &DomainDef) -> (Option<String>, Option<String>) {
    (def.devices.emulator.clone(), def.os.kind.arch.clone())
}

async fn emulator(def: &DomainDef) -> PathBuf {
    if let Some(path) = &def.devices.emulator {
        return PathBuf::from(path);
    }
    let arch = arch_of(def).to_owned();
    blocking(move || default_emulator(&arch)).await.unwrap_or_default()
}

fn arch_of(def: &DomainDef) -> &str {
    def.os.kind.arch.as_deref().unwrap_or(std::env::consts::ARCH)
}

/// The guest, as this driver's.
fn our_body(guest: &dyn Instance) -> Result<&Arc<Body>, DriverError> {
    let any: &dyn Any = guest;
    let ours = any.downcast_ref::<QemuInstance>();
    Ok(ours.ok_or_else(|| DriverError::Internal("a guest of another driver".to_owned()))?.body())
}

/// Whether QEMU is told to power off where the guest reboots.
fn ends_on_reboot(def: &DomainDef) -> bool {
    def.on_reboot != LifecycleAction::Restart
}

#[cfg(test)]
mod reach_tests;
