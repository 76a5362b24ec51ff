//! How hypervisors are moved, and networks made. One folder each.

#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod agent;
pub mod base64;
pub mod host;
pub mod mirror;
#[allow(clippy::disallowed_methods, reason = "folders of ours, and the kernel's own files below /proc")]
pub mod network;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys and /proc, and udev's notes")]
pub mod nodedev;
pub mod qemu;
#[allow(clippy::disallowed_methods, reason = "files of virtd itself, and the administrator's")]
pub mod secret;
pub mod storage;
pub mod test;

use std::path::PathBuf;
use std::sync::Arc;
use virt_model::driver::Driver;
use virt_model::driver::inventory::HostProfile;
use virt_model::driver::storage::Storage;
use virt_model::secret::SecretName;

/// What drivers must know of this virtd.
#[derive(Clone, Debug)]
pub struct DriverConfig {
    /// For what can be found out again, e.g. `/var/cache/virt`.
    pub cache_dir: PathBuf,
    /// For what ends with virtd, e.g. `/run/virt`.
    pub runtime_dir: PathBuf,
    /// For what must outlive a reboot of the host, e.g. `/var/lib/virt`.
    pub state_dir: PathBuf,
    /// Who keeps the values of secrets; the administrator may keep some in files, e.g. in `/etc/virt/secrets`.
    pub secrets: Arc<secret::Vault>,
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
    /// The devices of the host that guests have to themselves.
    pub claims: qemu::Claims,
    /// Where the networks of a user without root are; their guests' cards are plugged in there.
    pub own_network: Option<network::OwnNetwork>,
}

impl DriverConfig {
    /// The usual user and group; everything below `dir`.
    pub fn below(dir: &std::path::Path, system: bool) -> Self {
        DriverConfig {
            cache_dir: dir.join("cache"),
            runtime_dir: dir.join("run"),
            state_dir: dir.join("state"),
            secrets: secret::Vault::new(dir.join("state/secrets"), dir.join("secrets")),
            tls_dir: dir.join("tls"),
            system,
            qemu_user: "virt-qemu".to_owned(),
            qemu_group: None,
            kvm: true,
            guest_threads: 1024,
            guest_overhead: 2 << 30,
            claims: qemu::Claims::default(),
            own_network: None,
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
    let vault = config.secrets.clone();
    let secrets = Arc::new(move |name: &str| {
        // It is asked in a thread of its own.
        let value = tokio::runtime::Handle::current().block_on(vault.named(&SecretName::of_volume(name)));
        value.map(|value| value.bytes().to_vec())
    });
    let wary = config.system && nix::unistd::geteuid().is_root();
    let storage = storage::HostStorage::new(qemu.tool_rights(), secrets, &config.runtime_dir, wary);
    storage.clear_leftovers();
    (vec![Arc::new(qemu), Arc::new(test::TestDriver::default())], Arc::new(storage))
}

/// The products whose hosts can be configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Product {
    /// A host that is held in memory, and has one machine.
    Test,
}

/// The driver of a host that keeps its machines by itself.
pub fn of_host(product: Product, profile: HostProfile) -> Arc<dyn Driver> {
    match product {
        Product::Test => Arc::new(mirror::Mirror::new(test::TestHost::with_a_machine().connection(), profile)),
    }
}
