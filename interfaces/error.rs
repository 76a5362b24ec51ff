//! What a call can be refused with, under its name on the bus.
//!
//! Two families: `org.virt.Error.*` and the denials come from the service, in one exhaustive match; the standard
//! `org.freedesktop.DBus.Error.*` are raised by the dispatcher for what never reaches the service.

use std::fmt;
use virt_model::xml::plainly;
use virt_service::error::Error as ServiceError;

/// An error as a caller sees it: a name and one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The error's name on the bus.
    pub name: &'static str,
    /// The sentence.
    pub text: String,
}

macro_rules! standard {
    ($($(#[$meta:meta])* $function:ident = $name:literal;)+) => {
        impl Error {
            $($(#[$meta])* pub fn $function(text: impl Into<String>) -> Error {
                Error { name: concat!("org.freedesktop.DBus.Error.", $name), text: sayable(text.into()) }
            })+
        }
    };
}

standard! {
    /// No object at this path.
    unknown_object = "UnknownObject";
    /// The object has no such interface.
    unknown_interface = "UnknownInterface";
    /// The interface has no such method.
    unknown_method = "UnknownMethod";
    /// The interface has no such property.
    unknown_property = "UnknownProperty";
    /// The property cannot be written.
    read_only = "PropertyReadOnly";
    /// The arguments are not what the method takes.
    invalid_args = "InvalidArgs";
    /// More than a caller's share, or more than a message can hold.
    limits = "LimitsExceeded";
    /// Something about the host, not about the call.
    failed = "Failed";
}

impl Error {
    /// An option's key or value, or an argument's, is not understood.
    pub fn argument(text: impl Into<String>) -> Error {
        ServiceError::InvalidArgument(text.into()).into()
    }

    /// A bug in virtd.
    pub fn internal(text: impl Into<String>) -> Error {
        ServiceError::Internal(text.into()).into()
    }
}

/// The name on the bus of what the service says.
pub fn name(error: &ServiceError) -> &'static str {
    match error {
        ServiceError::NoSuchDomain { .. } => "org.virt.Error.NoSuchDomain",
        ServiceError::DomainExists(_) => "org.virt.Error.DomainExists",
        ServiceError::SnapshotExists(_) => "org.virt.Error.SnapshotExists",
        ServiceError::NoSuchSnapshot { .. } => "org.virt.Error.NoSuchSnapshot",
        ServiceError::CheckpointExists(_) => "org.virt.Error.CheckpointExists",
        ServiceError::NoSuchCheckpoint { .. } => "org.virt.Error.NoSuchCheckpoint",
        ServiceError::NoSuchNetwork { .. } => "org.virt.Error.NoSuchNetwork",
        ServiceError::NetworkExists(_) => "org.virt.Error.NetworkExists",
        ServiceError::NoSuchPool { .. } => "org.virt.Error.NoSuchPool",
        ServiceError::PoolExists(_) => "org.virt.Error.PoolExists",
        ServiceError::NoSuchVolume(_) => "org.virt.Error.NoSuchVolume",
        ServiceError::VolumeExists(_) => "org.virt.Error.VolumeExists",
        ServiceError::NoSuchSecret(_) => "org.virt.Error.NoSuchSecret",
        ServiceError::SecretExists(_) => "org.virt.Error.SecretExists",
        ServiceError::SecretMissing(_) => "org.virt.Error.SecretMissing",
        ServiceError::NoSuchNodeDevice(_) => "org.virt.Error.NoSuchNodeDevice",
        ServiceError::NetworkFailed(_) => "org.virt.Error.NetworkFailed",
        ServiceError::NoSuchDevice(_) => "org.virt.Error.NoSuchDevice",
        ServiceError::SnapshotBroken(_) => "org.virt.Error.SnapshotBroken",
        ServiceError::AbiIncompatible(_) => "org.virt.Error.AbiIncompatible",
        ServiceError::RevertRisky(_) => "org.virt.Error.RevertRisky",
        ServiceError::InUse(_) => "org.virt.Error.InUse",
        ServiceError::InvalidArgument(_) => "org.virt.Error.InvalidArgument",
        ServiceError::ConfigInvalid(_) => "org.virt.Error.ConfigInvalid",
        ServiceError::ConfigUnsupported(_) => "org.virt.Error.ConfigUnsupported",
        ServiceError::OperationInvalid(_) => "org.virt.Error.OperationInvalid",
        ServiceError::OperationUnsupported(_) => "org.virt.Error.OperationUnsupported",
        ServiceError::Busy { .. } => "org.virt.Error.Busy",
        ServiceError::Cancelled(_) => "org.virt.Error.Cancelled",
        ServiceError::HostUnreachable(_) => "org.virt.Error.HostUnreachable",
        ServiceError::TimedOut(_) => "org.virt.Error.TimedOut",
        ServiceError::AgentUnavailable(_) => "org.virt.Error.AgentUnavailable",
        ServiceError::AgentFailed(_) => "org.virt.Error.AgentFailed",
        ServiceError::HypervisorFailed { .. } => "org.virt.Error.HypervisorFailed",
        ServiceError::StorageFailed(_) => "org.virt.Error.StorageFailed",
        ServiceError::NoSpace(_) => "org.virt.Error.NoSpace",
        ServiceError::Internal(_) => "org.virt.Error.Internal",
        ServiceError::LimitsExceeded(_) => "org.freedesktop.DBus.Error.LimitsExceeded",
        ServiceError::AccessDenied(_) => "org.freedesktop.DBus.Error.AccessDenied",
        ServiceError::InteractionRequired(_) => "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
    }
}

impl From<ServiceError> for Error {
    fn from(error: ServiceError) -> Error {
        Error::from(&error)
    }
}

impl From<&ServiceError> for Error {
    fn from(error: &ServiceError) -> Error {
        Error { name: name(error), text: sayable(error.to_string()) }
    }
}

/// A text may come from outside and hold what the bus cannot carry.
fn sayable(text: String) -> String {
    plainly(&text).into_owned()
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.text)
    }
}

impl std::error::Error for Error {}
