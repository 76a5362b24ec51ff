//! How hypervisors are moved. One folder each.

#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod agent;
pub mod base64;
pub mod host;
pub mod qemu;
pub mod storage;
pub mod test;

use std::path::PathBuf;
use std::sync::Arc;
use virt_model::driver::Driver;
use virt_model::driver::storage::Storage;

/// What drivers must know of this virtd.
#[derive(Clone, Debug)]
pub struct DriverConfig {
    /// For what can be found out again, e.g. `/var/cache/virt`.
    pub cache_dir: PathBuf,
    /// For what must outlive a reboot of the host, e.g. `/var/lib/virt`.
    pub state_dir: PathBuf,
    /// Where the administrator keeps secrets, a file each, e.g. `/etc/virt/secrets`.
    pub secrets_dir: PathBuf,
    /// Where the administrator keeps the host's certificates, e.g. `/etc/virt/tls`.
    pub tls_dir: PathBuf,
    /// We serve everybody on this host, as root: hypervisors run as a user of their own.
    pub system: bool,
    /// That user.
    pub qemu_user: String,
    /// Their group, if not their own.
    pub qemu_group: Option<String>,
    /// KVM is used where it works; otherwise `type='kvm'` is refused, whatever works.
    pub kvm: bool,
    /// Threads that a guest's processes may have beside its vCPUs.
    pub guest_threads: u64,
    /// Bytes that they may use beyond the guest's memory and a quarter of it.
    pub guest_overhead: u64,
}

impl DriverConfig {
    /// The usual user and group; everything below `dir`.
    pub fn below(dir: &std::path::Path, system: bool) -> Self {
        DriverConfig {
            cache_dir: dir.join("cache"),
            state_dir: dir.join("state"),
            secrets_dir: dir.join("secrets"),
            tls_dir: dir.join("tls"),
            system,
            qemu_user: "virt-qemu".to_owned(),
            qemu_group: None,
            kvm: true,
            guest_threads: 1024,
            guest_overhead: 2 << 30,
        }
    }
}

/// Every driver there is.
pub fn all(config: DriverConfig) -> Vec<Arc<dyn Driver>> {
    with_storage(config).0
}

/// The same, and the storage of this host.
pub fn with_storage(config: DriverConfig) -> (Vec<Arc<dyn Driver>>, Arc<dyn Storage>) {
    let qemu = qemu::QemuDriver::new(&config);
    let secrets = config.secrets_dir.clone();
    let secrets = Arc::new(move |name: &str| host::secret::read(&secrets, &qemu::command::source::file_name(name)));
    let wary = config.system && nix::unistd::geteuid().is_root();
    let storage = storage::HostStorage::new(qemu.tool_rights(), secrets, wary);
    (vec![Arc::new(qemu), Arc::new(test::TestDriver::default())], Arc::new(storage))
}
