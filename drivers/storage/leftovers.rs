//! What was under way in a volume group when somebody was killed, or what could not be undone: it has LVM's tags that say so, and is
//! taken away, or back, when the pool is started, when it is refreshed, and before anything else is done to that volume.

use super::failed;
use super::group::Site;
use crate::host::lvm::{Change, LogicalName, LogicalVolume, Lvm};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use virt_model::driver::DriverError;

/// Volumes of a group that are being made or resized by us, by their names: none of them is a leftover.
#[derive(Debug, Default)]
pub struct UnderWay(Mutex<BTreeSet<String>>);

/// A volume is under way as long as this is there.
pub struct Begun(Arc<UnderWay>, String);

impl UnderWay {
    /// Error: it is under way already.
    pub fn begin(self: &Arc<Self>, name: &LogicalName) -> Result<Begun, DriverError> {
        let is_new = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_string());
        match is_new {
            true => Ok(Begun(self.clone(), name.to_string())),
            false => Err(DriverError::Exists(format!(
                "volume '{name}' is being made or resized; try again when that has ended"
            ))),
        }
    }

    /// Whether it is under way.
    pub fn has(&self, name: &LogicalName) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(name.as_str())
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

/// Whether its tags say that something was under way with a volume.
pub fn is_leftover(volume: &LogicalVolume) -> bool {
    volume.is_unfinished || volume.grown_from.is_some()
}

/// Takes away what was being made in a group, and gives what was growing the size that it had. What cannot be so now stays, with its
/// tags, and is told in the log. Blocks. Error: the group cannot be read.
pub fn tidy(site: &Site, lvm: &Lvm) -> Result<(), DriverError> {
    for volume in lvm.volumes(&site.group)?.into_iter().filter(is_leftover) {
        let Ok(_begun) = site.under_way.begin(&volume.name) else { continue };
        // It may have been finished since it was looked at.
        let undone = site.named(lvm, &volume.name).and_then(|now| match now.is_unfinished {
            true => lvm.change(&site.group, &Change::Remove(&now.key)),
            false => shrink_back(site, lvm, &now),
        });
        if let Err(error) = undone {
            let (name, group) = (&volume.name, &site.group);
            tracing::warn!(%error, "volume '{name}' of volume group '{group}' stays as it was cut off until its pool is refreshed");
        }
    }
    Ok(())
}

/// Gives a volume that was growing the size that it had; any other is as it is. Blocks. Error: somebody has it open, and it is as
/// before.
pub fn shrink_back(site: &Site, lvm: &Lvm, volume: &LogicalVolume) -> Result<(), DriverError> {
    let Some(before) = volume.grown_from else { return Ok(()) };
    if volume.bytes > before {
        let path = site.path.join(volume.name.as_str());
        let is_open =
            || site.device(volume, "look at")?.is_open_elsewhere(true).map_err(|e| failed("look at", &path, &e));
        if volume.is_active && is_open()? {
            return Err(DriverError::Refused(format!(
                "{}: it was growing when that was cut off, and somebody has it open (fuser tells who): close it there, and refresh \
                 the pool",
                path.display()
            )));
        }
        lvm.change(&site.group, &Change::Reduce(&volume.name, before))?;
    }
    lvm.change(&site.group, &Change::MarkBlank(&volume.name, before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_under_way_for_one_at_a_time_and_until_that_ends() {
        let (under_way, name) = (Arc::<UnderWay>::default(), LogicalName::new("a").unwrap());
        let begun = under_way.begin(&name).unwrap();
        let refused = under_way.begin(&name).err().unwrap().to_string();
        assert!(refused.contains("being made or resized"), "{refused}");
        assert!(under_way.has(&name));
        drop(begun);
        assert!(!under_way.has(&name) && under_way.begin(&name).is_ok());
    }
}
