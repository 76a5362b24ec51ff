//! virtd, the daemon: reads its arguments, joins drivers, service and bus, and waits for its end.
//!
//! The name is requested when the tree is true, as far as that can be told without waiting for a guest: whoever can find virtd
//! finds that, and what a guest or its storage keeps waiting goes on behind it. When virtd ends, guests go on.

#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

use clap::Parser;
use futures_util::StreamExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use virt_drivers::DriverConfig;
use virt_drivers::network::{HostNetworks, OwnNetwork, inside, leases};
use virt_drivers::nodedev::LinuxDevices;
use virt_drivers::test::TestNetworks;
use virt_model::driver::network::NetworkDriver;
use virt_service::authz::Authority;
use virt_service::{Host, Service, Settings};
use virtd::caller::Callers;
use virtd::firewalld::Firewalld;
use virtd::link::Link;
use virtd::polkit::{Bus, Polkit};
use virtd::session::OwnerOnly;
use virtd::settings::{Arguments, Config, Folders, Kind, NetworksBy, QemuConfig, UseKvm};
use virtd::{End, Server, Serving};

/// How long the bus may take to take the last signals.
const PATIENCE: Duration = Duration::from_secs(30);

/// As many descriptors as we may have at once, where we are allowed as many: more than any number of guests needs, and
/// few enough for programs that close each of them one by one.
const DESCRIPTORS: u64 = 64 << 10;

/// With fewer descriptors than this not one guest can be started.
const FEWEST_DESCRIPTORS: u64 = 512;

/// How long work on files may go on when all else has ended.
const FILES: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    // dnsmasq runs us when it has given an address.
    if leases::tell() {
        return ExitCode::SUCCESS;
    }
    // So do we, where a user without root has networks.
    if let Some(end) = inside::run() {
        return end;
    }
    let arguments = Arguments::parse();
    spare_memory();
    virtd::log::begin(arguments.log_level);
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let ended = runtime.map_err(|error| error.to_string()).and_then(|runtime| {
        let ended = runtime.block_on(run(&arguments));
        // Not dropped: that would wait for a thread in a file system that does not answer.
        runtime.shutdown_timeout(FILES);
        ended
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Has the allocator give back what a large document took, and keep no pool of its own for each thread: what is freed would
/// otherwise stay ours, once for each.
fn spare_memory() {
    // SAFETY: sets numbers of the allocator, before there is another thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 20);
    }
}

/// Serves until a signal or the end of the connection; the latter is an error, for a supervisor to start us again.
async fn run(arguments: &Arguments) -> Result<(), String> {
    raise_descriptors()?;
    let stop = stop()?;
    let folders = Folders::new(arguments, |name| std::env::var_os(name).map(Into::into))?;
    let config = Config::read(&folders.config.join("virtd.toml"))?;
    let other_hosts = config.hosts()?;
    let link = Link::connect(arguments.kind()).await?;
    link.refuse_if_taken().await?;
    let _lock = folders.lock()?;
    let callers = Callers::new(link.connection.clone());
    let (authority, polkit) = authority(arguments.kind(), &link).await?;
    let program = std::env::current_exe().ok();
    let own_network = OwnNetwork::new(&folders.runtime, program.as_deref());
    let driver_config = driver_config(arguments.kind(), config.qemu, &folders, own_network);
    let secrets = driver_config.secrets.clone();
    let devices = LinuxDevices::new(driver_config.claims.clone(), driver_config.system);
    let networks: Arc<dyn NetworkDriver> = match config.networks.driver {
        NetworksBy::Host => Arc::new(host_networks(arguments.kind(), &folders, program).await),
        NetworksBy::Memory => Arc::<TestNetworks>::default(),
    };
    let (drivers, storage) = virt_drivers::with_storage(driver_config);
    let host = Host { secrets, storage, networks };
    let settings = Settings { paths: folders.paths(), limits: config.limits.into() };
    let opened = Service::open(settings, drivers, host, authority, Arc::new(callers.clone())).await;
    let (service, events) = opened.map_err(|error| error.to_string())?;
    service.follow_host(devices).await;
    service.follow_other_hosts(other_hosts).await.map_err(|error| error.to_string())?;
    let server = Server::new(&service, events).await?;
    let serving = server.serve_bus(&link.connection, link.intake.clone(), callers.clone());
    callers.listen().await.map_err(|error| format!("the bus does not tell who leaves: {error}"))?;
    link.take_name().await?;
    service.begin_work().await.map_err(|error| error.to_string())?;
    tell(sd_notify::NotifyState::Ready);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "serving");
    let mut served = Served { kind: arguments.kind(), link, server, serving, callers, polkit };
    tokio::select! {
        why = served.ended() => return Err(why),
        () = stop => {}
    }
    tell(sd_notify::NotifyState::Stopping);
    tracing::info!("ending; guests go on");
    service.close().await;
    service.events().flush().await;
    let _ = tokio::time::timeout(PATIENCE, served.serving.sent()).await;
    Ok(())
}

/// Networks of this host; on the system bus their bridges are in a zone of firewalld's, where that runs.
async fn host_networks(kind: Kind, folders: &Folders, program: Option<PathBuf>) -> HostNetworks {
    let networks = HostNetworks::new(&folders.runtime, &folders.state, program);
    if kind == Kind::Session {
        return networks;
    }
    match Firewalld::connect().await {
        Ok(firewalld) => networks.with_zones(Arc::new(firewalld)),
        Err(error) => {
            tracing::warn!(%error, "networks' bridges are put into no zone of firewalld's");
            networks
        }
    }
}

/// The bus, as long as we are on it.
struct Served {
    kind: Kind,
    link: Link,
    server: Server,
    serving: Serving,
    callers: Callers,
    polkit: Option<(Arc<Bus>, Arc<Polkit>)>,
}

impl Served {
    /// Waits until the bus is not served any more, whatever can be done about that; why.
    async fn ended(&mut self) -> String {
        loop {
            match self.serving.ended().await {
                End::Stalled => tracing::warn!("the bus takes nothing any more; connecting anew"),
                why => return why.to_string(),
            }
            if let Err(why) = self.connect_anew().await {
                return why;
            }
            tracing::warn!(
                "connected anew; what was told meanwhile is lost, and who listens sees the name change hands"
            );
        }
    }

    /// Another connection takes the place of the one that has ended; all else stays.
    async fn connect_anew(&mut self) -> Result<(), String> {
        let link = Link::connect(self.kind).await?;
        let former = std::mem::replace(&mut self.link, link);
        let Link { connection, intake } = &self.link;
        self.callers.go_on_by(connection.clone());
        if let Some((bus, polkit)) = &self.polkit {
            bus.go_on_by(connection).await.map_err(|error| deaf_to_polkit(&error))?;
            heed_changes(bus, polkit).await?;
            polkit.forget();
        }
        self.serving = self.server.serve_bus(connection, intake.clone(), self.callers.clone());
        self.callers.listen().await.map_err(|error| format!("the bus does not tell who leaves: {error}"))?;
        self.link.take_name_over(&former).await
    }
}

/// polkit on the system bus; on a session bus the user that virtd runs as.
async fn authority(kind: Kind, link: &Link) -> Result<(Arc<dyn Authority>, Option<(Arc<Bus>, Arc<Polkit>)>), String> {
    if kind == Kind::Session {
        return Ok((Arc::new(OwnerOnly { uid: nix::unistd::geteuid().as_raw() }), None));
    }
    let bus = Arc::new(Bus::new(&link.connection).await.map_err(|error| deaf_to_polkit(&error))?);
    let polkit = Arc::new(Polkit::new(bus.clone()));
    heed_changes(&bus, &polkit).await?;
    Ok((polkit.clone(), Some((bus, polkit))))
}

/// Has polkit's answers forgotten when its rules may have changed, as long as the connection lasts.
async fn heed_changes(bus: &Bus, polkit: &Arc<Polkit>) -> Result<(), String> {
    let mut changes = bus.changes().await.map_err(|error| deaf_to_polkit(&error))?;
    let forgetful = polkit.clone();
    tokio::spawn(async move {
        while changes.next().await.is_some() {
            forgetful.forget();
        }
    });
    Ok(())
}

fn deaf_to_polkit(error: &zbus::Error) -> String {
    format!("polkit cannot be listened to: {error}")
}

/// Lets us have more descriptors than a process usually may: every guest takes some. Error: there are too few.
fn raise_descriptors() -> Result<(), String> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let limits = getrlimit(Resource::RLIMIT_NOFILE);
    let (soft, hard) = limits.map_err(|error| format!("the limit of descriptors cannot be read: {error}"))?;
    let wanted = hard.min(DESCRIPTORS).max(soft);
    if wanted < FEWEST_DESCRIPTORS {
        return Err(format!(
            "virtd may have {wanted} descriptors and needs {FEWEST_DESCRIPTORS}; raise LimitNOFILE= of its unit, or 'ulimit -n'"
        ));
    }
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, wanted, hard) {
        tracing::warn!(%error, soft, "the number of descriptors could not be raised");
    }
    Ok(())
}

/// What the drivers are told. On a session bus QEMU runs as we do.
fn driver_config(kind: Kind, qemu: QemuConfig, folders: &Folders, own_network: Option<OwnNetwork>) -> DriverConfig {
    DriverConfig {
        cache_dir: folders.cache.clone(),
        runtime_dir: folders.runtime.clone(),
        state_dir: folders.state.clone(),
        secrets: virt_drivers::secret::Vault::new(folders.state.join("secrets"), folders.config.join("secrets")),
        tls_dir: folders.config.join("tls"),
        system: kind == Kind::System,
        qemu_user: qemu.user,
        qemu_group: qemu.group,
        kvm: qemu.kvm == UseKvm::Auto,
        guest_threads: qemu.threads,
        guest_overhead: qemu.overhead_mib.saturating_mul(1 << 20),
        claims: virt_drivers::qemu::Claims::default(),
        own_network,
    }
}

/// A request to end. Listens from now on, so one that comes before anybody waits is not lost, nor ends virtd in disorder.
fn stop() -> Result<impl Future<Output = ()>, String> {
    let listen = |kind| signal(kind).map_err(|error| error.to_string());
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Tells systemd, if it is there.
fn tell(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "systemd could not be told");
    }
}
