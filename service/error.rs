//! Everything the service refuses or fails at, as reasons a caller can act on.
//!
//! Each text is one sentence with object, cause and remedy; `interfaces/error.rs` gives each variant its name on the bus.

use crate::object::ObjectKind;
use virt_model::driver::DriverError;
use virt_model::xml::{Finding, FindingKind};

/// The service's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something was not done. Unless a variant says otherwise, nothing has changed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// No such domain.
    #[error("no domain with {what} '{value}'")]
    NoSuchDomain {
        /// `uuid`, `name` or `id`.
        what: &'static str,
        /// What was looked for.
        value: String,
    },
    /// Name or uuid is taken by another domain.
    #[error("{0}")]
    DomainExists(String),
    /// The domain, or one of its images, has a snapshot of that name.
    #[error("{0}")]
    SnapshotExists(String),
    /// The domain has no snapshot of that name.
    #[error("domain '{domain}' has no snapshot '{snapshot}'")]
    NoSuchSnapshot {
        /// The domain's name.
        domain: String,
        /// What was looked for.
        snapshot: String,
    },
    /// The domain has a checkpoint of that name, or one of its images such a bitmap.
    #[error("{0}")]
    CheckpointExists(String),
    /// The domain has no checkpoint of that name.
    #[error("domain '{domain}' has no checkpoint '{checkpoint}'")]
    NoSuchCheckpoint {
        /// The domain's name.
        domain: String,
        /// What was looked for.
        checkpoint: String,
    },
    /// No such network.
    #[error("no network with {what} '{value}'")]
    NoSuchNetwork {
        /// `uuid` or `name`.
        what: &'static str,
        /// What was looked for.
        value: String,
    },
    /// Name or uuid is taken by another network.
    #[error("{0}")]
    NetworkExists(String),
    /// No such storage pool.
    #[error("no pool with {what} '{value}'")]
    NoSuchPool {
        /// `uuid` or `name`.
        what: &'static str,
        /// What was looked for.
        value: String,
    },
    /// Name or uuid is taken by another storage pool.
    #[error("{0}")]
    PoolExists(String),
    /// No such volume; says where it was looked for.
    #[error("{0}")]
    NoSuchVolume(String),
    /// The pool has a volume of that name.
    #[error("{0}")]
    VolumeExists(String),
    /// No such secret.
    #[error("{0}")]
    NoSuchSecret(String),
    /// Uuid or usage is taken by another secret.
    #[error("{0}")]
    SecretExists(String),
    /// The secret is defined, and has no value.
    #[error("{0}")]
    SecretMissing(String),
    /// No such device of the host.
    #[error("the host has no device '{0}'")]
    NoSuchNodeDevice(String),
    /// A network could not be made or changed; ends with the kernel's or the tool's own words.
    #[error("{0}")]
    NetworkFailed(String),
    /// The domain has no such device.
    #[error("{0}")]
    NoSuchDevice(String),
    /// The record of a snapshot cannot be used.
    #[error("{0}")]
    SnapshotBroken(String),
    /// A guest would notice; lists every difference.
    #[error("{0}")]
    AbiIncompatible(String),
    /// A revert has risks that were not accepted; lists each.
    #[error("{0}")]
    RevertRisky(String),
    /// A file or another object that others need as it is; names each of them.
    #[error("{0}")]
    InUse(String),
    /// An argument, an option's key or value.
    #[error("{0}")]
    InvalidArgument(String),
    /// The document is not one that can be stored.
    #[error("{}", list(.0))]
    ConfigInvalid(Vec<Finding>),
    /// The document asks for what cannot be had.
    #[error("{0}")]
    ConfigUnsupported(String),
    /// Not in this state; says the state and what to do.
    #[error("{0}")]
    OperationInvalid(String),
    /// This hypervisor cannot, or this version of virtd.
    #[error("{0}")]
    OperationUnsupported(String),
    /// Another job has had the object for as long as we wait.
    #[error("{object} is busy with '{job}'; try again when that has ended, or cancel it")]
    Busy {
        /// What is to be changed: `domain 'web'`.
        object: String,
        /// The operation that holds it, and its job object if it has one.
        job: String,
    },
    /// The job was cancelled.
    #[error("{0}")]
    Cancelled(String),
    /// The host that keeps it does not answer; says which, since when and why.
    #[error("{0}")]
    HostUnreachable(String),
    /// The hypervisor did not answer.
    #[error("{0}")]
    TimedOut(String),
    /// No guest agent.
    #[error("{0}")]
    AgentUnavailable(String),
    /// The guest agent's own error, with its class.
    #[error("{0}")]
    AgentFailed(String),
    /// The hypervisor failed.
    #[error("{what}: {why}")]
    HypervisorFailed {
        /// What was not done.
        what: String,
        /// Why, with the hypervisor's own last words: they may quote what is secret in the configuration, and are for who
        /// asked.
        why: String,
    },
    /// A disk image or virtd's own files.
    #[error("{0}")]
    StorageFailed(String),
    /// The file system is full.
    #[error("{0}")]
    NoSpace(String),
    /// A caller has more than its share.
    #[error("{0}")]
    LimitsExceeded(String),
    /// polkit says no; names the action.
    #[error("{0}")]
    AccessDenied(String),
    /// polkit would ask a person, and the call does not allow it.
    #[error("{0}")]
    InteractionRequired(String),
    /// A bug.
    #[error("{0}")]
    Internal(String),
}

/// Whether the operating system's words say that there is no room for a file.
fn is_full(text: &str) -> bool {
    text.contains("No space left on device") || text.contains("Disk quota exceeded")
}

/// The first finding, and how many more there are.
fn list(findings: &[Finding]) -> String {
    match findings {
        [] => "the document is not valid".to_owned(),
        [one] => one.to_string(),
        [first, rest @ ..] => format!("{first} (and {} more; ValidateDomain lists them all)", rest.len()),
    }
}

impl Error {
    /// What a driver said while it was to `deed` domain `name`.
    pub fn from_driver(name: &str, deed: &str, error: DriverError) -> Error {
        Error::from_driver_of(ObjectKind::Domain, name, deed, error)
    }

    /// The same for the object `name` of any kind.
    pub fn from_driver_of(kind: ObjectKind, name: &str, deed: &str, error: DriverError) -> Error {
        let what = format!("cannot {deed} {}", kind.named(name));
        let text = format!("{what}: {error}");
        match error {
            DriverError::Config(findings) if findings.iter().any(|finding| finding.kind == FindingKind::Invalid) => {
                let told = |finding: Finding| Finding { message: format!("{what}: {}", finding.message), ..finding };
                Error::ConfigInvalid(findings.into_iter().map(told).collect())
            }
            // A full disk is one whoever ran into it.
            DriverError::Storage(_) | DriverError::Hypervisor(_) | DriverError::Internal(_) if is_full(&text) => {
                Error::NoSpace(text)
            }
            DriverError::Config(_) | DriverError::NotPossible(_) => Error::ConfigUnsupported(text),
            DriverError::Unsupported(_) => Error::OperationUnsupported(text),
            DriverError::Argument(_) => Error::InvalidArgument(text),
            DriverError::AgentUnavailable(_) => Error::AgentUnavailable(text),
            DriverError::AgentFailed { .. } => Error::AgentFailed(text),
            DriverError::Hypervisor(_) if kind == ObjectKind::Network => Error::NetworkFailed(text),
            DriverError::Hypervisor(_) if !matches!(kind, ObjectKind::Domain | ObjectKind::Host) => {
                Error::StorageFailed(text)
            }
            DriverError::Hypervisor(why) => {
                let why = why.lines().collect::<Vec<_>>().join("; ");
                Error::HypervisorFailed { what, why }
            }
            DriverError::TimedOut(_) | DriverError::TrayLocked(_) => Error::TimedOut(text),
            DriverError::Unreachable(_) => Error::HostUnreachable(text),
            DriverError::Storage(_) | DriverError::HalfDone(_) => Error::StorageFailed(text),
            DriverError::Exists(_) => Error::VolumeExists(text),
            DriverError::NoSuchSecret(_) => Error::NoSuchSecret(text),
            DriverError::SecretMissing(_) => Error::SecretMissing(text),
            DriverError::NoSpace(_) => Error::NoSpace(text),
            DriverError::SnapshotExists(_) => Error::SnapshotExists(text),
            DriverError::TooMany(_) => Error::LimitsExceeded(text),
            DriverError::Refused(_) => Error::OperationInvalid(text),
            DriverError::InUse(_) => Error::InUse(text),
            DriverError::Gone => Error::OperationInvalid(format!("{what}: it has just ended")),
            DriverError::Cancelled => {
                Error::Cancelled(format!("the attempt to {deed} {} was cancelled", kind.named(name)))
            }
            DriverError::Internal(_) => Error::Internal(text),
        }
    }

    /// The same for everybody: without what the hypervisor or the guest's agent itself said.
    pub fn public(&self) -> Error {
        match self {
            Error::HypervisorFailed { what, .. } => {
                let why = "its hypervisor failed; its own words are told to who asked, and stand in its log".to_owned();
                Error::HypervisorFailed { what: what.clone(), why }
            }
            Error::AgentFailed(_) => {
                let text = "the guest agent failed; its own words are told to who asked".to_owned();
                Error::AgentFailed(text)
            }
            other => other.clone(),
        }
    }

    /// What the operating system said of one of virtd's own files.
    pub fn from_io(what: &str, path: &std::path::Path, error: &std::io::Error) -> Error {
        let remedy = match error.kind() {
            std::io::ErrorKind::ReadOnlyFilesystem => "; nothing can be changed there until it can be written again",
            _ => "",
        };
        let text = format!("cannot {what} {}: {error}{remedy}", path.display());
        if error.kind() == std::io::ErrorKind::StorageFull || error.kind() == std::io::ErrorKind::QuotaExceeded {
            Error::NoSpace(text)
        } else {
            Error::StorageFailed(text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// S6: whoever ran into it, and with whichever file, a full disk is told as one.
    #[test]
    fn a_full_disk_is_told_as_one() {
        let full = std::io::Error::from_raw_os_error(28);
        for error in [
            DriverError::Storage(format!("/var/lib/virt/nvram/x.fd: {full}")),
            DriverError::Hypervisor(format!("qemu: cannot write: {full}")),
            DriverError::Internal(format!("cannot make /run/virt/guests/x: {full}")),
        ] {
            let told = Error::from_driver("web", "start", error);
            assert!(matches!(&told, Error::NoSpace(text) if text.contains("web")), "{told:?}");
        }
        let other = DriverError::Storage("/x: Permission denied (os error 13)".into());
        assert!(matches!(Error::from_driver("web", "start", other), Error::StorageFailed(_)));
    }

    #[test]
    fn a_tray_that_stays_locked_is_told_as_what_took_too_long() {
        let locked = DriverError::TrayLocked("the guest keeps it".into());
        assert!(matches!(Error::from_driver("web", "change the medium in", locked), Error::TimedOut(_)));
    }
}
