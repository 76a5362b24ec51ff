//! The limits of disks: those of a throttle group, which the command line makes for each disk that has any and puts before its image as
//! a node. A disk that was started without one gets it when it is limited first, and keeps it.

use super::own_word;
use crate::qemu::block::{Nodes, below};
use crate::qemu::instance::Body;
use serde_json::{Value, json};
use virt_model::device::Disk;
use virt_model::device::disk::Iotune;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;

/// Has QEMU hold the disk of that target to what `def` says.
pub async fn adjust(body: &Body, before: &DomainDef, def: &DomainDef, target: &str) -> Result<(), DriverError> {
    let (disk, was) = (disk_of(def, target)?, disk_of(before, target)?);
    let group = Group(group_of(disk));
    let limits = group.limits(body).await?;
    match &limits {
        None if disk.iotune.is_none() => return Ok(()),
        Some(_) => group.set(body, all_limits(disk.iotune.as_ref())).await?,
        None => group.make(body, all_limits(disk.iotune.as_ref())).await?,
    }
    let put = put_before(body, disk, &group.0).await;
    match (&put, limits) {
        (Err(_), None) => group.remove(body).await,
        (Err(_), Some(limits)) => group.set(body, limits).await?,
        // Another one may still have disks, which QEMU says by refusing.
        (Ok(()), _) if group_of(was) != group.0 => Group(group_of(was)).remove(body).await,
        (Ok(()), _) => {}
    }
    put
}

/// Writes into `def` to what QEMU holds the disk of that target.
pub async fn look(body: &Body, def: &mut DomainDef, target: &str) -> Result<(), DriverError> {
    let limits = Group(group_of(disk_of(def, target)?)).limits(body).await?.unwrap_or_default();
    let Some(disk) = def.devices.disks.iter_mut().find(|disk| disk.target.dev == target) else { return Ok(()) };
    // The length of a burst that there is not has a value, too.
    let burst = |name: &str| limits[name.trim_end_matches("-length")].as_u64().unwrap_or_default() > 0;
    let mut tune = disk.iotune.take().unwrap_or_default();
    tune.set_limits(|name, said| {
        let held = limits[name].as_u64().filter(|_| !name.ends_with("-length") || said.is_some() || burst(name));
        held.filter(|held| *held > 0 || said.is_some())
    });
    let says = tune.group.is_some() || !tune.limits().is_empty();
    disk.iotune = says.then_some(tune);
    Ok(())
}

fn disk_of<'a>(def: &'a DomainDef, target: &str) -> Result<&'a Disk, DriverError> {
    let disk = def.devices.disks.iter().find(|disk| disk.target.dev == target);
    disk.ok_or_else(|| DriverError::Internal("a disk is lost".to_owned()))
}

/// QEMU's name of the group that holds a disk, as the command line gives it.
fn group_of(disk: &Disk) -> String {
    let own = disk.iotune.as_ref().and_then(|tune| tune.group.as_deref());
    format!("throttle-{}", own.unwrap_or(&disk.target.dev))
}

/// All limits in QEMU's words: whichever is not said is none.
fn all_limits(tune: Option<&Iotune>) -> Value {
    let all = tune.cloned().unwrap_or_default().all_limits();
    let none = |name: &str| u64::from(name.ends_with("-length"));
    all.into_iter().map(|(name, value)| (name.to_owned(), Value::from(value.unwrap_or(none(name))))).collect()
}

/// A throttle group of QEMU's, by its name.
struct Group(String);

impl Group {
    fn path(&self) -> String {
        format!("/objects/{}", self.0)
    }

    /// Its limits; `None`: there is no such group.
    async fn limits(&self, body: &Body) -> Result<Option<Value>, DriverError> {
        let told = body.execute("qom-get", json!({ "path": self.path(), "property": "limits" })).await;
        match told {
            Ok(limits) => Ok(Some(limits)),
            Err(DriverError::Hypervisor(why)) if why.contains("not found") => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn set(&self, body: &Body, limits: Value) -> Result<(), DriverError> {
        let arguments = json!({ "path": self.path(), "property": "limits", "value": limits });
        body.execute("qom-set", arguments).await.map(drop).map_err(own_word)
    }

    async fn make(&self, body: &Body, limits: Value) -> Result<(), DriverError> {
        let arguments = json!({ "qom-type": "throttle-group", "id": self.0, "limits": limits });
        body.execute("object-add", arguments).await.map(drop).map_err(own_word)
    }

    /// Removes it, unless it is used.
    async fn remove(&self, body: &Body) {
        if let Err(error) = body.execute("object-del", json!({ "id": self.0 })).await {
            tracing::debug!(uuid = %body.uuid, %error, "limits stay for who else has them");
        }
    }
}

/// Puts a node with the limits of that group before what lies in the drive, if something does.
async fn put_before(body: &Body, disk: &Disk, group: &str) -> Result<(), DriverError> {
    let alias = disk.info.alias().unwrap_or_default();
    let told = body.execute("query-block", json!({})).await?;
    // Of what is virtio the path is told of the device's inner part.
    let is_it = |one: &&Value| one["qdev"].as_str().is_some_and(|device| device.split('/').any(|part| part == alias));
    let drive = told.as_array().into_iter().flatten().find(is_it);
    let Some(top) = drive.and_then(|drive| drive["inserted"]["node-name"].as_str()) else { return Ok(()) };
    let nodes = Nodes::of(body).await?;
    let begin = top.rsplit_once('-').map_or(top, |(begin, _)| begin);
    let throttle = format!("{begin}-throttle");
    let there = |name: &str| nodes.0.iter().any(|node| node.name == name);
    let node =
        |below: &str| json!({ "driver": "throttle", "node-name": throttle, "throttle-group": group, "file": below });
    if !there(&throttle) {
        body.execute("blockdev-add", node(top)).await.map_err(own_word)?;
        let path = format!("/machine/peripheral/{alias}");
        let put = body.execute("qom-set", json!({ "path": path, "property": "drive", "value": throttle })).await;
        if put.is_err() {
            body.execute("blockdev-del", json!({ "node-name": throttle })).await?;
        }
        return put.map(drop).map_err(own_word);
    }
    let below = below(body, &throttle).await?;
    body.execute("blockdev-reopen", json!({ "options": [node(&below)] })).await.map(drop).map_err(own_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_said_is_lifted() {
        let tune = Iotune { ops: Some(7), ops_max: Some(9), ..Iotune::default() };
        let limits = all_limits(Some(&tune));
        assert_eq!((&limits["iops-total"], &limits["iops-total-max"]), (&json!(7), &json!(9)));
        assert_eq!((&limits["bps-read"], &limits["bps-read-max-length"]), (&json!(0), &json!(1)));
        assert_eq!(limits.as_object().map(serde_json::Map::len), Some(19));
    }
}
