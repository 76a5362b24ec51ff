//! What is done to a device of the host: taken from the host's driver, given back, reset. What it was before is on disk first. Of
//! devices that are made and ended, `made.rs`.

use super::HostDevice;
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::frames;
use crate::images::Taken;
use crate::object::{ObjectKind, ObjectRef, Usage, User};
use crate::store::on_disk;
use crate::verb;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use virt_model::driver::DriverError;
use virt_model::driver::host_devices::DetachedDevice;
use virt_model::nodedev::{NodeDevice, pci_name};

/// Why there is no verb that stores how a device is made.
pub(crate) const NOT_STORED: &str = "this virtd stores no devices; CreateNodeDevice makes one until the host boots, and 'mdevctl define' stores one for good";

/// How long whoever only reads waits for a device.
const PATIENCE: Duration = Duration::from_secs(10);

/// What `Detach` would meet.
#[derive(Clone, Debug, Default)]
pub struct DetachCheck {
    /// Why it would be refused, if it would.
    pub refusal: Option<Error>,
    /// Who uses the device, or what would go with it.
    pub users: Arc<[User]>,
    /// What of the host would go with it.
    pub host_uses: Vec<(&'static str, String)>,
    /// What is handed over with it: the other devices of its IOMMU group.
    pub siblings: Vec<Arc<str>>,
}

impl HostDevice {
    /// Its document, as it is now.
    pub async fn xml(self: &Arc<Self>, caller: &Caller) -> Result<String> {
        frames::beside(&**self, caller, &verb::NODE_DEVICE_XML, async {
            let device = self.clone();
            self.look(caller, "read", async move { Ok(device.now().await?.document()) }).await
        })
        .await
    }

    /// What calling a method would meet: `yes`, `no`, `challenge`, `na`. Error: `InvalidArgument` for a name that is none.
    pub async fn can(&self, caller: &Caller, member: &str) -> Result<&'static str> {
        let verb = verb::find("org.virt.NodeDevice", verb::NODE_DEVICE, member)?;
        Ok(frames::can(self, caller, verb).await)
    }

    /// Takes it from the host's driver and keeps it for guests.
    pub async fn detach(self: &Arc<Self>, caller: &Caller, driver: Option<&str>) -> Result<()> {
        frames::short(self, caller, &verb::DETACH, async {
            known_driver(driver)?;
            let device = self.now().await?;
            self.applies_to(&device, &verb::DETACH)?;
            let _taken = self.take_disks(&device, "detach").await?;
            self.refuses_detach(&device, &self.users_with(&device).await?, &self.host_uses(&device).await?)?;
            let noted = self.noted().await?;
            let before = before_detaching(&device, noted.clone());
            self.note(Some(before.clone())).await?;
            let host = &self.devices()?.host;
            let done = host.detach(&device).await;
            if let Err(error) = &done {
                if matches!(error, DriverError::Refused(_)) {
                    // It was not touched: what was noted of it counts.
                    self.note(noted).await?;
                } else if host.reattach(&device, Some(&before)).await.is_ok() {
                    self.note(None).await?;
                } else {
                    // The next verb undoes it first, as the next virtd would.
                    self.is_cut_off(before)?;
                }
            }
            self.look_again().await;
            done.map_err(|error| self.failed("detach", error))
        })
        .await
    }

    /// Gives it back to the host.
    pub async fn reattach(self: &Arc<Self>, caller: &Caller) -> Result<()> {
        frames::short(self, caller, &verb::REATTACH, async {
            let device = self.now().await?;
            self.applies_to(&device, &verb::REATTACH)?;
            self.refuses_live("reattach", &self.users_with(&device).await?)?;
            let before = self.noted().await?;
            let done = self.devices()?.host.reattach(&device, before.as_ref()).await;
            if done.is_ok() {
                self.note(None).await?;
            }
            self.look_again().await;
            done.map_err(|error| self.failed("reattach", error))
        })
        .await
    }

    /// Resets it.
    pub async fn reset(self: &Arc<Self>, caller: &Caller) -> Result<()> {
        frames::short(self, caller, &verb::RESET_DEVICE, async {
            let device = self.now().await?;
            self.applies_to(&device, &verb::RESET_DEVICE)?;
            self.refuses_live("reset", &self.users_with(&device).await?)?;
            if !device.pci().is_some_and(|pci| pci.resets) {
                let text = format!("cannot reset node device '{}': it has no way to be reset by itself", self.name);
                return Err(Error::OperationUnsupported(text));
            }
            self.devices()?.host.reset(&device).await.map_err(|error| self.failed("reset", error))
        })
        .await
    }

    /// What `detach` would meet.
    pub async fn check_detach(self: &Arc<Self>, caller: &Caller, driver: Option<&str>) -> Result<DetachCheck> {
        frames::beside(&**self, caller, &verb::CHECK_DETACH, async {
            known_driver(driver)?;
            let device = self.clone();
            self.look(caller, "check", async move { device.checked().await }).await
        })
        .await
    }

    async fn checked(&self) -> Result<DetachCheck> {
        let device = self.now().await?;
        let (users, host_uses) = (self.users_with(&device).await?, self.host_uses(&device).await?);
        let allowed = self.applies_to(&device, &verb::DETACH);
        let members = device.pci().and_then(|pci| pci.group.as_ref()).map(|group| group.members.clone());
        let siblings = members.unwrap_or_default().into_iter().map(pci_name).filter(|name| *name != self.name);
        Ok(DetachCheck {
            refusal: allowed.and_then(|()| self.refuses_detach(&device, &users, &host_uses)).err(),
            users,
            siblings: self.devices()?.there(siblings),
            host_uses,
        })
    }

    /// Looks at it for somebody who may only read. One that does not answer keeps one of the user's places until it does, so that
    /// nobody has more threads wait than that.
    async fn look<T: Send + 'static>(
        &self,
        caller: &Caller,
        deed: &str,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let devices = self.devices()?;
        let looked = async {
            let place = devices.looks.take(&caller.uid).await;
            let looked = tokio::spawn(async move {
                let _place = place;
                work.await
            });
            looked.await.unwrap_or_else(|error| Err(Error::Internal(error.to_string())))
        };
        timeout(PATIENCE, looked).await.unwrap_or_else(|_| {
            let (name, seconds) = (&self.name, PATIENCE.as_secs());
            Err(Error::TimedOut(format!(
                "cannot {deed} node device '{name}': no answer within {seconds} s; its driver in the kernel may hang (dmesg)"
            )))
        })
    }

    /// Undoes a detaching that was cut off. What is detached stays so. For who has the turn.
    pub(super) async fn undo(&self, before: &DetachedDevice) -> Result<()> {
        let device = self.now().await?;
        if device.detached() {
            return Ok(());
        }
        let done = self.devices()?.host.reattach(&device, Some(before)).await;
        done.map_err(|error| self.failed("reattach", error))?;
        tracing::info!(device = %self.name, "its detaching was cut off; the host has it again");
        self.look_again().await;
        self.note(None).await
    }

    /// Has nobody use the disks that go with a device until the result is dropped: before it is looked at who has them, so that who
    /// starts later is refused.
    pub(super) async fn take_disks(&self, device: &NodeDevice, deed: &str) -> Result<Vec<Taken>> {
        let mut taken = Vec::new();
        let disks = self.devices()?.host.disks(device).await;
        for disk in disks.map_err(|error| self.failed(deed, error))? {
            let whose = format!("whoever is to {deed} node device '{}'", self.name);
            let has_it = |by| format!("cannot {deed} node device '{}': {by} has {}", self.name, disk.display());
            let took = self.shared.images.take(&disk, whose).await;
            taken.push(took.map_err(|by| Error::InUse(has_it(by)))?);
        }
        Ok(taken)
    }

    /// The device as it is now.
    pub(super) async fn now(&self) -> Result<NodeDevice> {
        let read = self.devices()?.host.read(&self.name).await.map_err(|error| self.failed("read", error))?;
        read.ok_or_else(|| Error::NoSuchNodeDevice(self.name.to_string()))
    }

    pub(super) async fn users_with(&self, device: &NodeDevice) -> Result<Arc<[User]>> {
        self.devices()?.users_with(device).await.map_err(|error| self.failed("check", error))
    }

    pub(super) async fn host_uses(&self, device: &NodeDevice) -> Result<Vec<(&'static str, String)>> {
        self.devices()?.host.host_uses(device).await.map_err(|error| self.failed("check", error))
    }

    fn refuses_detach(&self, device: &NodeDevice, users: &[User], host_uses: &[(&'static str, String)]) -> Result<()> {
        let why = match device.assignable() {
            "yes" => None,
            "bridge" => Some("it is a bridge, which carries other devices"),
            "no-iommu" => Some(
                "it is in no IOMMU group: switch the IOMMU on in the host's firmware, and for its kernel (intel_iommu=on)",
            ),
            _ => Some("the host has no driver vfio-pci: load the module (modprobe vfio-pci)"),
        };
        if let Some(why) = why {
            let text = format!("cannot detach node device '{}': {why}", self.name);
            return Err(Error::OperationUnsupported(text));
        }
        self.refuses_live("detach", users)?;
        self.refuses_host_uses("detach", host_uses)
    }

    /// Refuses what the host would notice.
    pub(super) fn refuses_host_uses(&self, deed: &str, host_uses: &[(&'static str, String)]) -> Result<()> {
        if host_uses.is_empty() {
            return Ok(());
        }
        let named: Vec<String> = host_uses.iter().map(|(kind, what)| format!("the {kind} {what}")).collect();
        let (name, named) = (&self.name, named.join(", "));
        Err(Error::InUse(format!("cannot {deed} node device '{name}': the host would lose {named}; remove that first")))
    }

    /// Refuses what a guest that runs would notice.
    pub(super) fn refuses_live(&self, deed: &str, users: &[User]) -> Result<()> {
        let live = users.iter().filter(|user| user.how == Usage::Live);
        let mut named: Vec<String> = live.map(|user| self.user_name(&user.object)).collect();
        named.dedup();
        if named.is_empty() {
            return Ok(());
        }
        let (name, named) = (&self.name, named.join(", "));
        Err(Error::InUse(format!(
            "cannot {deed} node device '{name}': {named} has it or what would go with it; shut that down, or detach it there"
        )))
    }

    fn user_name(&self, user: &ObjectRef) -> String {
        let found = user.domain().zip(self.devices().ok()).and_then(|(uuid, devices)| devices.domains.get(uuid));
        ObjectKind::Domain.named(&found.map(|domain| domain.name()).unwrap_or_default())
    }

    /// What is noted of it on disk.
    async fn noted(&self) -> Result<Option<DetachedDevice>> {
        let (shared, name) = (self.shared.clone(), self.name.clone());
        on_disk(move || Ok(shared.store.detached_device(&name))).await
    }

    /// Keeps what it was before it was detached, or that it is not.
    async fn note(&self, before: Option<DetachedDevice>) -> Result<()> {
        let (shared, name) = (self.shared.clone(), self.name.clone());
        on_disk(move || match before {
            Some(before) => shared.store.note_detached(&name, &before),
            None => shared.store.forget_detached(&name),
        })
        .await
    }

    pub(super) fn failed(&self, deed: &str, error: DriverError) -> Error {
        match error {
            DriverError::Refused(why) => Error::InUse(format!("cannot {deed} node device '{}': {why}", self.name)),
            DriverError::Hypervisor(why) => {
                Error::HypervisorFailed { what: format!("cannot {deed} node device '{}'", self.name), why }
            }
            error => Error::from_driver_of(ObjectKind::NodeDevice, &self.name, deed, error),
        }
    }
}

/// What a device is before it is detached. Where nobody has it, an earlier detaching may have left it so: what was `noted` then is
/// what the host is to have again.
fn before_detaching(device: &NodeDevice, noted: Option<DetachedDevice>) -> DetachedDevice {
    let now = DetachedDevice { driver: device.driver.clone() };
    if now.driver.is_some() { now } else { noted.unwrap_or(now) }
}

/// Which driver is to have it: there is one.
fn known_driver(driver: Option<&str>) -> Result<()> {
    match driver {
        None | Some("vfio" | "vfio-pci") => Ok(()),
        Some(other) => Err(Error::InvalidArgument(format!(
            "option 'driver' is vfio-pci, which is what there is without it, not '{}'",
            virt_model::xml::shorten(other)
        ))),
    }
}
