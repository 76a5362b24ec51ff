//! Object paths, and back.

use crate::bus::wire::{escape, unescape};
use crate::error::Error;
use uuid::Uuid;
use virt_service::object::ObjectRef;
use zbus::ObjectPath;

const DOMAINS: &str = "/org/virt/domain/_";
const SNAPSHOTS: &str = "/snapshot/";
const CHECKPOINTS: &str = "/checkpoint/";
const NETWORKS: &str = "/org/virt/network/_";
const POOLS: &str = "/org/virt/pool/_";
const VOLUMES: &str = "/volume/";
const SECRETS: &str = "/org/virt/secret/_";
/// The object that manages the devices of the host, which are below it.
pub const NODE_DEVICES: &str = "/org/virt/nodedev";
const HOSTS: &str = "/org/virt/host/";
const JOBS: &str = "/org/virt/job/";
const SUBSCRIPTIONS: &str = "/org/virt/stats/";

/// The path of an object; `/` for what is none of virtd's.
pub fn of(object: &ObjectRef) -> String {
    match object {
        ObjectRef::Foreign => "/".to_owned(),
        ObjectRef::Domain(uuid) => domain(*uuid),
        ObjectRef::Snapshot(domain, name) => snapshot(*domain, name),
        ObjectRef::Network(uuid) => by_uuid(NETWORKS, *uuid),
        ObjectRef::Pool(uuid) => by_uuid(POOLS, *uuid),
        ObjectRef::Volume(pool, name) => format!("{}{VOLUMES}{}", by_uuid(POOLS, *pool), escape(name)),
        ObjectRef::Secret(uuid) => by_uuid(SECRETS, *uuid),
        ObjectRef::NodeDevice(name) => format!("{NODE_DEVICES}/{}", escape(name)),
        ObjectRef::Host(name) => format!("{HOSTS}{}", escape(name)),
    }
}

/// The object whose path has this form; it need not exist.
pub fn object(path: &str) -> Option<ObjectRef> {
    if let Some((domain, name)) = snapshot_name(path) {
        return Some(ObjectRef::Snapshot(domain, name.into()));
    }
    if let Some((pool, name)) = path.split_once(VOLUMES) {
        return Some(ObjectRef::Volume(uuid_below(POOLS, pool)?, unescape(name)?.into()));
    }
    if let Some(name) = path.strip_prefix(NODE_DEVICES).and_then(|rest| rest.strip_prefix('/')) {
        return Some(ObjectRef::NodeDevice(unescape(name)?.into()));
    }
    if let Some(name) = path.strip_prefix(HOSTS) {
        return Some(ObjectRef::Host(unescape(name)?.into()));
    }
    let domain = uuid(path).map(ObjectRef::Domain);
    domain
        .or_else(|| uuid_below(NETWORKS, path).map(ObjectRef::Network))
        .or_else(|| uuid_below(POOLS, path).map(ObjectRef::Pool))
        .or_else(|| uuid_below(SECRETS, path).map(ObjectRef::Secret))
}

/// The path of an object that has a uuid: that with `-` written as `_`.
fn by_uuid(folder: &str, uuid: Uuid) -> String {
    format!("{folder}{}", uuid.to_string().replace('-', "_"))
}

fn uuid_below(folder: &str, path: &str) -> Option<Uuid> {
    let label = path.strip_prefix(folder)?;
    Uuid::try_parse(&label.replace('_', "-")).ok()
}

/// The path of a domain.
pub fn domain(uuid: Uuid) -> String {
    by_uuid(DOMAINS, uuid)
}

/// The uuid of the domain at a path.
pub fn uuid(path: &str) -> Option<Uuid> {
    uuid_below(DOMAINS, path)
}

/// The path of a domain's snapshot.
pub fn snapshot(domain_uuid: Uuid, name: &str) -> String {
    format!("{}{SNAPSHOTS}{}", domain(domain_uuid), escape(name))
}

/// The uuid of the domain, and the name of its snapshot, at a path.
pub fn snapshot_name(path: &str) -> Option<(Uuid, String)> {
    let (domain, label) = path.split_once(SNAPSHOTS)?;
    Some((uuid(domain)?, unescape(label)?))
}

/// The path of a domain's snapshot; `/` for none.
pub fn snapshot_or_none(domain: Uuid, name: Option<&str>) -> String {
    name.map_or_else(|| "/".to_owned(), |name| snapshot(domain, name))
}

/// The path of a domain's checkpoint.
pub fn checkpoint(domain_uuid: Uuid, name: &str) -> String {
    format!("{}{CHECKPOINTS}{}", domain(domain_uuid), escape(name))
}

/// The uuid of the domain, and the name of its checkpoint, at a path.
pub fn checkpoint_name(path: &str) -> Option<(Uuid, String)> {
    let (domain, label) = path.split_once(CHECKPOINTS)?;
    Some((uuid(domain)?, unescape(label)?))
}

/// The path of a job's object.
pub fn job(id: u64) -> String {
    format!("{JOBS}{id}")
}

/// The number of the job at a path.
pub fn job_number(path: &str) -> Option<u64> {
    path.strip_prefix(JOBS)?.parse().ok()
}

/// The path of a subscription to statistics.
pub fn subscription(number: u64) -> String {
    format!("{SUBSCRIPTIONS}{number}")
}

/// The number of the subscription at a path.
pub fn subscription_number(path: &str) -> Option<u64> {
    path.strip_prefix(SUBSCRIPTIONS)?.parse().ok()
}

/// A path that was made here, as an argument of a reply.
pub fn argument(path: String) -> Result<ObjectPath<'static>, Error> {
    ObjectPath::try_from(path).map_err(|error| Error::internal(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_the_object_and_back() {
        let id = Uuid::from_u128(0x4dea_22b3_1d52_d8f3_2516_782e_98ab_3fa0);
        assert_eq!(domain(id), "/org/virt/domain/_4dea22b3_1d52_d8f3_2516_782e98ab3fa0");
        assert_eq!(uuid(&domain(id)), Some(id));
        assert_eq!(uuid("/org/virt/domain/_x"), None);
        assert_eq!(snapshot_name(&snapshot(id, "a b")), Some((id, "a b".to_owned())));
        assert_eq!(checkpoint_name(&checkpoint(id, "a b")), Some((id, "a b".to_owned())));
        assert_eq!((snapshot_name(&checkpoint(id, "a")), checkpoint_name(&snapshot(id, "a"))), (None, None));
        assert_eq!(job_number(&job(7)), Some(7));
        let label = "_4dea22b3_1d52_d8f3_2516_782e98ab3fa0";
        for (one, path) in [
            (ObjectRef::Domain(id), format!("/org/virt/domain/{label}")),
            (ObjectRef::Snapshot(id, "a b".into()), format!("/org/virt/domain/{label}/snapshot/a_20b")),
            (ObjectRef::Network(id), format!("/org/virt/network/{label}")),
            (ObjectRef::Pool(id), format!("/org/virt/pool/{label}")),
            (ObjectRef::Volume(id, "a.img".into()), format!("/org/virt/pool/{label}/volume/a_2eimg")),
            (ObjectRef::Secret(id), format!("/org/virt/secret/{label}")),
            (ObjectRef::NodeDevice("pci_0".into()), "/org/virt/nodedev/pci_5f0".to_owned()),
            (ObjectRef::Host("lab-1".into()), "/org/virt/host/lab_2d1".to_owned()),
        ] {
            assert_eq!((of(&one), object(&path)), (path.clone(), Some(one)), "{path}");
        }
        assert_eq!((of(&ObjectRef::Foreign), object("/")), ("/".to_owned(), None));
        assert_eq!((subscription_number(&subscription(7)), subscription_number(&job(7))), (Some(7), None));
    }
}
