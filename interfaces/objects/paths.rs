//! Object paths, and back.

use crate::bus::wire::{escape, unescape};
use crate::error::Error;
use uuid::Uuid;
use zbus::ObjectPath;

const DOMAINS: &str = "/org/virt/domain/_";
const SNAPSHOTS: &str = "/snapshot/";
const CHECKPOINTS: &str = "/checkpoint/";
const JOBS: &str = "/org/virt/job/";
const SUBSCRIPTIONS: &str = "/org/virt/stats/";

/// The path of a domain: its uuid with `-` written as `_`.
pub fn domain(uuid: Uuid) -> String {
    format!("{DOMAINS}{}", uuid.to_string().replace('-', "_"))
}

/// The uuid of the domain at a path.
pub fn uuid(path: &str) -> Option<Uuid> {
    let label = path.strip_prefix(DOMAINS)?;
    Uuid::try_parse(&label.replace('_', "-")).ok()
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
        assert_eq!((subscription_number(&subscription(7)), subscription_number(&job(7))), (Some(7), None));
    }
}
