//! What was changed on the host for one guest, which guest has what, and how it is undone when the guest has gone.
//!
//! Each change stands in the guest's record before it is made. So whoever was killed in between, the next virtd undoes it;
//! undoing what was not done yet, or what is undone already, does nothing.

use crate::host::macvtap::Macvtap;
use crate::host::pci::Pci;
use crate::host::vf::{Function, Terms};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use uuid::Uuid;
use virt_model::driver::DriverError;

pub use crate::host::SYSFS;

/// A change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// A PCI device was taken from the host.
    Detached {
        /// Its address, as in `0000:06:00.0`.
        pci: String,
        /// A driver of the host's had it.
        driven: bool,
    },
    /// A network card holds one of its virtual functions to something.
    Held {
        /// Which one.
        function: Function,
        /// To what.
        terms: Terms,
        /// What it was held to before.
        before: Terms,
    },
    /// A network device was made.
    Made(Macvtap),
}

impl Change {
    /// Makes it. On error it may be half made: it is to be undone. Blocks.
    pub fn make(&self, sysfs: &Path) -> Result<(), DriverError> {
        match self {
            Change::Detached { pci, .. } => Pci::below(sysfs)
                .detach(pci)
                .map_err(|e| DriverError::Unsupported(format!("PCI device {pci} cannot be taken from the host: {e}"))),
            Change::Held { function, terms, .. } => {
                let what = "the address and VLAN of the host's card cannot be set";
                function.hold(terms).map_err(|e| DriverError::Unsupported(format!("{what}: {e}")))
            }
            Change::Made(link) => {
                let what = format!("no network device '{}' on '{}'", link.name, link.below);
                link.make().map_err(|e| DriverError::Hypervisor(format!("{what}: {e}")))
            }
        }
    }

    fn undo(&self, sysfs: &Path) -> std::io::Result<()> {
        match self {
            Change::Detached { pci, driven } => Pci::below(sysfs).give_back(pci, *driven),
            Change::Held { function, before, .. } => function.hold(before),
            Change::Made(link) => link.remove(),
        }
    }
}

/// What is to be undone on the host when a guest has gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Undoing {
    /// What was changed, in this order.
    pub changes: Vec<Change>,
    /// What passes some of its cards was filtered: that is made with the devices, and swept away when they have gone.
    pub filtered: bool,
}

/// Undoes all, the last first. What cannot be undone is logged. Blocks.
pub fn undo(changes: &[Change], sysfs: &Path, uuid: Uuid) {
    for change in changes.iter().rev() {
        if let Err(error) = change.undo(sysfs) {
            tracing::error!(%uuid, ?change, %error, "what was changed on the host for a guest cannot be undone");
        }
    }
}

/// What one device of a guest's has of the host's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPart {
    /// The device's name in the guest's definition.
    pub alias: String,
    /// What the guest has to itself for it, in words; another of its devices may have it, too.
    pub claims: Vec<String>,
    /// What is changed on the host for it, in this order.
    pub changes: Vec<Change>,
    /// Device files that its QEMU is lent for it.
    pub files: Vec<PathBuf>,
}

impl HostPart {
    /// All that is claimed for these.
    pub fn claims_of<'a>(parts: impl IntoIterator<Item = &'a HostPart>) -> Vec<String> {
        parts.into_iter().flat_map(|part| part.claims.clone()).collect()
    }

    /// All that is changed for these, in order.
    pub fn changes_of<'a>(parts: impl IntoIterator<Item = &'a HostPart>) -> Vec<Change> {
        parts.into_iter().flat_map(|part| part.changes.clone()).collect()
    }
}

/// Devices of the host that one guest has to itself.
#[derive(Clone, Debug, Default)]
pub struct Claims(Arc<Mutex<BTreeMap<String, Holder>>>);

/// Who has one.
#[derive(Clone, Debug)]
struct Holder {
    uuid: Uuid,
    who: String,
}

impl Claims {
    /// Claims all of `devices` for a guest, or none: the error names who has one of them.
    pub fn take(&self, uuid: Uuid, name: &str, devices: &[String]) -> Result<(), DriverError> {
        self.take_for(Holder { uuid, who: format!("domain '{name}'") }, devices)
    }

    /// The same for as long as the result lives, for `who` is no guest.
    pub fn hold(&self, who: String, devices: &[String]) -> Result<HeldClaim, DriverError> {
        // Nobody's machine has this number.
        let uuid = Uuid::new_v4();
        self.take_for(Holder { uuid, who }, devices)?;
        Ok(HeldClaim { claims: self.clone(), uuid })
    }

    fn take_for(&self, holder: Holder, devices: &[String]) -> Result<(), DriverError> {
        let mut claims = self.lock();
        let other = |device: &&String| claims.get(*device).is_some_and(|known| known.uuid != holder.uuid);
        if let Some(device) = devices.iter().find(other) {
            let who = claims.get(device).map(|known| known.who.clone()).unwrap_or_default();
            return Err(DriverError::Refused(format!("{device} is in use by {who}")));
        }
        claims.extend(devices.iter().map(|device| (device.clone(), holder.clone())));
        Ok(())
    }

    /// An IOMMU group, as it is claimed.
    pub fn group(number: &str) -> String {
        format!("IOMMU group {number}")
    }

    /// Gives up all that a guest has.
    pub fn release(&self, uuid: Uuid) {
        self.release_except(uuid, &[]);
    }

    /// Gives up all that a guest has, but `kept`.
    pub fn release_except(&self, uuid: Uuid, kept: &[String]) {
        self.lock().retain(|device, holder| holder.uuid != uuid || kept.contains(device));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Holder>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A claim that ends with this.
#[derive(Debug)]
pub struct HeldClaim {
    claims: Claims,
    uuid: Uuid,
}

impl Drop for HeldClaim {
    fn drop(&mut self) {
        self.claims.release(self.uuid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_one_guests_until_that_has_gone() {
        let (claims, one, two) = (Claims::default(), Uuid::from_u128(1), Uuid::from_u128(2));
        let group = vec!["IOMMU group 7".to_owned()];
        claims.take(one, "web", &group).unwrap();
        claims.take(one, "web", &group).unwrap();
        let why = claims.take(two, "db", &["USB device 001:004".to_owned(), group[0].clone()]).unwrap_err();
        assert_eq!(why.to_string(), "IOMMU group 7 is in use by domain 'web'");
        let stick = ["USB device 001:004".to_owned()];
        claims.take(one, "web", &stick).unwrap();
        claims.release_except(one, &group);
        claims.take(two, "db", &stick).unwrap();
        claims.take(two, "db", &group).unwrap_err();
        claims.release(one);
        claims.take(two, "db", &group).unwrap();
    }

    #[test]
    fn what_has_gone_needs_no_undoing() {
        let dir = tempfile::tempdir().unwrap();
        let change = Change::Detached { pci: "0000:06:00.0".into(), driven: true };
        change.undo(dir.path()).unwrap();
        let kept = serde_json::to_value(&change).unwrap();
        assert_eq!(kept.to_string(), r#"{"detached":{"driven":true,"pci":"0000:06:00.0"}}"#);
    }
}
