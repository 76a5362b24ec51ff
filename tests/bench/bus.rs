//! A private bus with a virtd on it.

use std::error::Error;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use zbus::fdo::DBusProxy;
use zbus::names::BusName;

/// What a call gives.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Bus, virtd and a connection; all end with it.
pub struct Daemon {
    /// A client's connection.
    pub connection: zbus::Connection,
    /// virtd's process.
    pub pid: u32,
    virtd: Child,
    bus: Child,
    folder: tempfile::TempDir,
    _run: tempfile::TempDir,
}

impl Daemon {
    /// Starts both, with the files of `preloaded` (a folder, or nothing) as virtd's state.
    pub async fn start(preloaded: &str) -> Result<Daemon> {
        let folder = tempfile::tempdir()?;
        if !preloaded.is_empty() {
            let state = folder.path().join("root/var/lib/virt");
            std::fs::create_dir_all(&state)?;
            std::fs::rename(preloaded, state.join("domains"))?;
        }
        // As on a real host, where /run is in memory and /var is not.
        std::fs::create_dir_all(folder.path().join("root"))?;
        let run = tempfile::tempdir_in("/dev/shm")?;
        std::os::unix::fs::symlink(run.path(), folder.path().join("root/run"))?;
        let (bus, address) = start_bus(folder.path())?;
        let virtd = Command::new(env!("CARGO_BIN_EXE_virtd"))
            .args(["--session", "--log-level", "warn", "--root"])
            .arg(folder.path().join("root"))
            .env("DBUS_SESSION_BUS_ADDRESS", &address)
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(folder.path().join("virtd.log"))?)
            .spawn()?;
        let connection = zbus::connection::Builder::address(address.as_str()).build().await?;
        let daemon = Daemon { connection, pid: virtd.id(), virtd, bus, folder, _run: run };
        daemon.wait_for_name().await?;
        Ok(daemon)
    }

    async fn wait_for_name(&self) -> Result<()> {
        use futures_util::StreamExt as _;
        let proxy = DBusProxy::new(&self.connection).await?;
        let mut changes = proxy.receive_name_owner_changed_with_args(&[(0, "org.virt")]).await?;
        if !proxy.name_has_owner(BusName::try_from("org.virt")?).await? {
            changes.next().await;
        }
        Ok(())
    }

    /// A folder for what a benchmark needs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Calls a method of virtd.
    pub async fn call<B>(&self, path: &str, interface: &str, method: &str, body: &B) -> Result<zbus::Message>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        Ok(self.connection.call_method(Some("org.virt"), path, Some(interface), method, body).await?)
    }

    /// Calls a method of a domain that takes only options.
    pub async fn domain(&self, path: &str, method: &str) -> Result<zbus::Message> {
        self.call(path, "org.virt.Domain", method, &(no_options(),)).await
    }

    /// Defines a domain and returns its path.
    pub async fn define(&self, xml: &str) -> Result<String> {
        let reply = self.call("/org/virt", "org.virt.Manager", "DefineDomain", &(xml, no_options())).await?;
        Ok(reply.body().deserialize::<zbus::ObjectPath<'_>>()?.to_string())
    }

    /// Resident memory of virtd, in KiB.
    pub fn resident_kib(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        for child in [&mut self.virtd, &mut self.bus] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// An empty `a{sv}`.
pub fn no_options() -> std::collections::HashMap<&'static str, zbus::Variant<'static>> {
    std::collections::HashMap::new()
}

fn start_bus(folder: &Path) -> Result<(Child, String)> {
    let socket: PathBuf = folder.join("bus");
    let mut bus = Command::new("dbus-daemon")
        .args(["--session", "--nofork", "--nopidfile", "--print-address=1"])
        .arg(format!("--address=unix:path={}", socket.display()))
        .stdout(Stdio::piped())
        .spawn()?;
    let mut address = String::new();
    BufReader::new(bus.stdout.take().ok_or("no output")?).read_line(&mut address)?;
    Ok((bus, address.trim().to_owned()))
}
