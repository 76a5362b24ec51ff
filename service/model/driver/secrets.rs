//! Secrets' values: how they are kept is the host's, which of them there are is the service's.

use super::{DriverError, GivenFile};
use crate::secret::{SecretName, UsageKind};
use async_trait::async_trait;
use std::fmt;
use std::sync::Arc;
use uuid::Uuid;
use zeroize::Zeroizing;

/// The largest value, in bytes.
pub const LARGEST_SECRET: usize = 64 << 10;

/// A secret's value: never printed, and zeroed when the last who has it lets go.
#[derive(Clone, Default)]
pub struct SecretValue(Arc<Zeroizing<Vec<u8>>>);

impl SecretValue {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for SecretValue {
    fn from(bytes: Vec<u8>) -> SecretValue {
        SecretValue(Arc::new(Zeroizing::new(bytes)))
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(a secret's value)")
    }
}

/// How a value is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Sealed to this host's TPM.
    Tpm2,
    /// Sealed by a key of this host.
    HostKey,
    /// In a file that only virtd may read.
    File,
    /// In memory, as long as virtd runs.
    Memory,
}

impl Protection {
    /// All of them.
    pub const ALL: [Protection; 4] = [Protection::Tpm2, Protection::HostKey, Protection::File, Protection::Memory];

    /// The word on the bus, and on disk.
    pub fn as_str(self) -> &'static str {
        match self {
            Protection::Tpm2 => "tpm2",
            Protection::HostKey => "host-key",
            Protection::File => "file",
            Protection::Memory => "memory",
        }
    }
}

/// What is known of a value that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptValue {
    /// How it is kept.
    pub protection: Protection,
    /// When it was set: microseconds since the epoch.
    pub changed_usec: u64,
}

/// Keeps values, and gives them to drivers whose machines name them.
#[async_trait]
pub trait SecretKeeper: Send + Sync {
    /// How a value would be kept that is set now.
    async fn protection(&self, ephemeral: bool) -> Protection;

    /// What is kept of a secret. Blocks for a file of virtd's own.
    fn kept(&self, uuid: Uuid) -> Result<Option<KeptValue>, DriverError>;

    /// Keeps a value in the place of whatever was kept before; on failure that is kept still. `changed_usec`: it is set then.
    async fn keep(
        &self,
        uuid: Uuid,
        value: SecretValue,
        ephemeral: bool,
        changed_usec: u64,
    ) -> Result<KeptValue, DriverError>;

    /// The value, if there is one.
    async fn value(&self, uuid: Uuid) -> Result<Option<SecretValue>, DriverError>;

    /// Forgets a value; there need not be one.
    async fn forget(&self, uuid: Uuid) -> Result<(), DriverError>;

    /// What a client gives, read to its end: that is waited for some seconds.
    async fn read(&self, file: GivenFile) -> Result<SecretValue, DriverError>;

    /// The secrets of which something is kept. Blocks for a folder of virtd's own.
    fn all_kept(&self) -> Vec<Uuid>;

    /// From now on machines may name this secret, by its uuid or what it is for.
    fn is_defined(&self, uuid: Uuid, kind: UsageKind, id: &str);

    /// From now on there is no such secret.
    fn is_undefined(&self, uuid: Uuid);

    /// Values in files that the administrator has put beside the configuration: by what such a file is named, the secret, and the value
    /// or why it cannot be read. Blocks for these files.
    fn files(&self) -> Vec<(SecretName, Result<SecretValue, String>)>;

    /// Removes such a file. Blocks.
    fn remove_file(&self, name: &SecretName) -> Result<(), DriverError>;
}
