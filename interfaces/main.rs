//! virtd, the daemon: reads its arguments, joins drivers, service and bus, and waits for its end.
//!
//! The name is requested last: whoever can find virtd finds a tree that is true. When virtd ends, guests go on.

use clap::Parser;
use futures_util::StreamExt;
use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use virt_drivers::DriverConfig;
use virt_service::authz::Authority;
use virt_service::{Service, Settings};
use virtd::caller::Callers;
use virtd::polkit::{Bus, Polkit};
use virtd::session::OwnerOnly;
use virtd::settings::{Arguments, Config, Folders, Kind, QemuConfig};
use virtd::{BUS_NAME, Server};
use zbus::connection::Builder;
use zbus::{Connection, Message};

/// How many messages may lie between socket and dispatcher.
const QUEUED: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// How long the bus may take to let us in, and to take the last signals.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long work on files may go on when all else has ended.
const FILES: Duration = Duration::from_secs(5);

/// A thread's stack, in bytes, of which only what is used is taken: a definition is large, and a start within a revert
/// within a recovery holds several.
const STACK: usize = 16 << 20;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    virtd::log::begin(arguments.log_level);
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_stack_size(STACK).build();
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

/// Serves until a signal or the end of the connection; the latter is an error, for a supervisor to start us again.
async fn run(arguments: &Arguments) -> Result<(), String> {
    let stop = stop()?;
    let folders = Folders::new(arguments, |name| std::env::var_os(name).map(Into::into))?;
    let config = Config::read(&folders.config.join("virtd.toml"))?;
    let connection = connect(arguments.kind()).await?;
    refuse_if_taken(&connection).await?;
    let _lock = folders.lock()?;
    let callers = Callers::new(connection.clone());
    let authority = authority(arguments.kind(), &connection).await?;
    let drivers = virt_drivers::all(driver_config(arguments.kind(), config.qemu, &folders));
    let settings = Settings { paths: folders.paths(), limits: config.limits.into() };
    let opened = Service::open(settings, drivers, authority, Arc::new(callers.clone())).await;
    let (service, events) = opened.map_err(|error| error.to_string())?;
    let server = Server::new(&service, events).await?;
    let mut serving = server.serve_bus(&connection, callers.clone());
    callers.listen().await.map_err(|error| format!("the bus does not tell who leaves: {error}"))?;
    take_name(&connection).await?;
    service.begin_work().await.map_err(|error| error.to_string())?;
    tell(sd_notify::NotifyState::Ready);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "serving");
    tokio::select! {
        why = serving.ended() => return Err(why.to_owned()),
        () = stop => {}
    }
    tell(sd_notify::NotifyState::Stopping);
    tracing::info!("ending; guests go on");
    service.close().await;
    service.events().flush().await;
    let _ = tokio::time::timeout(PATIENCE, serving.sent()).await;
    Ok(())
}

async fn connect(kind: Kind) -> Result<Connection, String> {
    let builder = match kind {
        Kind::System => Builder::system(),
        Kind::Session => Builder::session(),
    };
    // A bus whose policy keeps us out may never answer.
    match tokio::time::timeout(PATIENCE, builder.max_queued(QUEUED).build()).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(format!("the bus cannot be reached: {error}")),
        Err(_) => Err("the bus does not answer; does its policy allow us?".to_owned()),
    }
}

/// polkit on the system bus; on a session bus the user that virtd runs as.
async fn authority(kind: Kind, connection: &Connection) -> Result<Arc<dyn Authority>, String> {
    if kind == Kind::Session {
        return Ok(Arc::new(OwnerOnly { uid: nix::unistd::geteuid().as_raw() }));
    }
    let text = |error: zbus::Error| format!("polkit cannot be listened to: {error}");
    let bus = Bus::new(connection).await.map_err(text)?;
    let mut changes = bus.changes().await.map_err(text)?;
    let polkit = Arc::new(Polkit::new(Arc::new(bus)));
    let forgetful = polkit.clone();
    tokio::spawn(async move {
        while changes.next().await.is_some() {
            forgetful.forget();
        }
    });
    Ok(polkit)
}

/// What the drivers are told. On a session bus QEMU runs as we do.
fn driver_config(kind: Kind, qemu: QemuConfig, folders: &Folders) -> DriverConfig {
    DriverConfig {
        cache_dir: folders.cache.clone(),
        state_dir: folders.state.clone(),
        secrets_dir: folders.config.with_file_name("secrets"),
        tls_dir: folders.config.with_file_name("tls"),
        system: kind == Kind::System,
        qemu_user: qemu.user,
        qemu_group: qemu.group,
        guest_threads: qemu.threads,
        guest_overhead: qemu.overhead_mib.saturating_mul(1 << 20),
    }
}

/// Another virtd's guests are not to be touched, so this is asked before anything is.
async fn refuse_if_taken(connection: &Connection) -> Result<(), String> {
    let answer = ask_bus(connection, "NameHasOwner", &BUS_NAME).await;
    match answer.and_then(|reply| reply.body().deserialize()) {
        Ok(false) => Ok(()),
        Ok(true) => Err(taken()),
        Err(error) => Err(format!("the bus does not say who has the name {BUS_NAME}: {error}")),
    }
}

/// Requests the name. Whoever has it keeps it.
async fn take_name(connection: &Connection) -> Result<(), String> {
    const DO_NOT_QUEUE: u32 = 4;
    const PRIMARY_OWNER: u32 = 1;
    let answer = ask_bus(connection, "RequestName", &(BUS_NAME, DO_NOT_QUEUE)).await;
    match answer.and_then(|reply| reply.body().deserialize()) {
        Ok(PRIMARY_OWNER) => Ok(()),
        Ok(_) => Err(taken()),
        Err(error) => Err(format!("the bus does not give us the name {BUS_NAME}: {error}")),
    }
}

fn taken() -> String {
    format!("the name {BUS_NAME} is taken; another virtd runs on this bus")
}

async fn ask_bus<B>(connection: &Connection, member: &str, body: &B) -> zbus::Result<Message>
where
    B: serde::Serialize + zbus::DynamicType,
{
    let (bus, path) = ("org.freedesktop.DBus", "/org/freedesktop/DBus");
    connection.call_method(Some(bus), path, Some(bus), member, body).await
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
