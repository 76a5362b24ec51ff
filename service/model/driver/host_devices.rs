//! The devices of the host: who finds them, tells when they come and go, and takes them from the host's drivers.

use super::DriverError;
use crate::nodedev::{NewDevice, NodeDevice};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::mpsc;

/// What has become of the host's devices.
#[derive(Clone, Debug, PartialEq)]
pub enum DeviceNews {
    /// A device is there, or is otherwise than it was.
    Is(Arc<NodeDevice>),
    /// A device has gone.
    Gone(Arc<str>),
    /// All that are there now have been told.
    AllTold,
}

/// What a device was before it was taken from the host's driver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DetachedDevice {
    /// The driver that had it, if any had.
    pub driver: Option<String>,
}

/// See the module.
#[async_trait]
pub trait HostDevices: Send + Sync {
    /// Tells all devices there are, and from then on what becomes of them. To be called once.
    fn follow(self: Arc<Self>) -> mpsc::Receiver<DeviceNews>;

    /// The device as it is now; `None` if it has gone.
    async fn read(&self, name: &str) -> Result<Option<NodeDevice>, DriverError>;

    /// Why no device can be taken from the host's drivers, if none can.
    fn only_reads(&self) -> Option<&'static str> {
        None
    }

    /// What of the host would go with a device and its virtual functions: `mount`, `route`, `swap` or `link` (a network device on it), and which.
    async fn host_uses(&self, device: &NodeDevice) -> Result<Vec<(&'static str, String)>, DriverError>;

    /// The files in `/dev` of the disks that would go with a device, and of what is made of those.
    async fn disks(&self, device: &NodeDevice) -> Result<Vec<PathBuf>, DriverError>;

    /// Takes a device from the host's driver and keeps it for guests. On error it may be without a driver: give it back.
    /// Error: `Refused` if a guest has it, what is handed over with it or one of its virtual functions; it was not touched then.
    /// `TimedOut` if the kernel takes long: it goes on, and what others would do with the device is `Refused` until it has done.
    async fn detach(&self, device: &NodeDevice) -> Result<(), DriverError>;

    /// Gives a device back to the host; `before` as it was detached, if that is known. What is done already is fine.
    /// Error: as of `detach`; `Refused` also if another process has it.
    async fn reattach(&self, device: &NodeDevice, before: Option<&DetachedDevice>) -> Result<(), DriverError>;

    /// Has the kernel make a device of another one; its name, and what is to be told. On error there is none; but after `TimedOut`, where
    /// the kernel goes on, it may come later.
    async fn make(&self, parent: &NodeDevice, new: &NewDevice) -> Result<(Arc<str>, Vec<DeviceNews>), DriverError>;

    /// Has the kernel end a device that [was made](NodeDevice::is_made); what is to be told. Error: as of `make`; `Refused` if
    /// somebody has it.
    async fn end(&self, device: &NodeDevice) -> Result<Vec<DeviceNews>, DriverError>;

    /// Resets a device that no driver of the host's has. Error: as of `detach`.
    async fn reset(&self, device: &NodeDevice) -> Result<(), DriverError>;
}
