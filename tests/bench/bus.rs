//! virtd on the private bus of the tests, with its runtime folder in memory, as on a real host.

use crate::common::client::{Client, Domain, options};
use crate::common::{Daemon, Setup};
use std::path::Path;

/// What a benchmark gives.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A virtd and a client of it.
pub struct Bench {
    /// Bus and virtd.
    pub daemon: Daemon,
    /// The client.
    pub client: Client,
    _run: tempfile::TempDir,
}

impl Bench {
    /// Starts both, with the definitions of `stored` (a folder, moved) as virtd's.
    pub async fn start(stored: Option<&Path>) -> Result<Bench> {
        Bench::on(Daemon::session_bus().ok_or("there is no private bus")?, stored).await
    }

    /// The same on a system bus, where guests have walls and users of their own; nothing where there can be none.
    pub async fn start_system() -> Result<Option<Bench>> {
        match Daemon::system_bus(Setup::default()) {
            Some(daemon) => Bench::on(daemon, None).await.map(Some),
            None => Ok(None),
        }
    }

    /// The same in a network of its own, where libvirt's service for the bus may be, too.
    pub async fn start_network() -> Result<Option<Bench>> {
        let policy = std::fs::read_to_string("dbus-policy/org.virt.conf")?;
        let libvirt = "<policy user=\"root\"><allow own=\"org.libvirt\"/><allow send_destination=\"org.libvirt\"/></policy></busconfig>";
        let bus_policy = policy.replace("</busconfig>", libvirt);
        match Daemon::system_bus(Setup { bus_policy, own_network: true, ..Setup::default() }) {
            Some(daemon) => Bench::on(daemon, None).await.map(Some),
            None => Ok(None),
        }
    }

    async fn on(mut daemon: Daemon, stored: Option<&Path>) -> Result<Bench> {
        let state = daemon.root().join("var/lib/virt");
        std::fs::create_dir_all(&state)?;
        if let Some(stored) = stored {
            std::fs::rename(stored, state.join("domains"))?;
        }
        let run = tempfile::tempdir_in("/dev/shm")?;
        std::os::unix::fs::symlink(run.path(), daemon.root().join("run"))?;
        daemon.start_virtd_with(&["--log-level", "warn"]).await;
        let client = Client { connection: daemon.connect().await };
        Ok(Bench { daemon, client, _run: run })
    }

    /// Defines a domain.
    pub async fn define(&self, xml: &str) -> Domain {
        self.client.define(xml).await.expect("defined")
    }
}

/// Removes a domain.
pub async fn undefine(domain: &Domain) {
    domain.call("Undefine", &(options([]),)).await.expect("undefined");
}
