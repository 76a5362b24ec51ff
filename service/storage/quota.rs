//! How much each user has of storage: volumes, and bytes of their capacity. A volume counts as it is published, and before that from
//! the moment at which it is to be made or to grow. What that takes is checked and taken in one step: of two who want the last of it,
//! one has it.

use super::Volume;
use super::set::VolumeName;
use crate::Service;
use crate::authz::{Caller, Subject};
use crate::error::{Error, Result};
use crate::facts::VolumeFacts;
use crate::lock::lock;
use crate::shared::Limits;
use crate::verb;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// How much of storage a user has, and may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Volumes that they own.
    pub volumes: u32,
    /// How many those may be; `None`: any number.
    pub volumes_limit: Option<u32>,
    /// The capacity of those together, in bytes.
    pub bytes: u64,
    /// How much that may be; `None`: any number.
    pub bytes_limit: Option<u64>,
}

/// What all users have.
#[derive(Default)]
pub(super) struct Holdings(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    /// Volumes as they were last published.
    volumes: HashMap<VolumeName, Share>,
    /// What those are together, by their owner.
    sums: HashMap<u32, Sum>,
    /// What is to be made or to grow, by the number of whoever does that.
    taken: HashMap<u64, (VolumeName, Share)>,
    last_number: u64,
}

/// What one volume is of what its owner may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Share {
    owner: u32,
    /// In bytes.
    capacity: u64,
}

/// What somebody has. Headers say what they like, so that the bytes may be more than 64 bits hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    volumes: u64,
    bytes: u128,
}

/// How much somebody may have.
#[derive(Clone, Copy, Debug)]
struct Most {
    volumes: u32,
    /// `None`: any number.
    bytes: Option<u64>,
}

impl Most {
    fn of(limits: &Limits) -> Most {
        Most { volumes: limits.volumes_per_user, bytes: limits.storage_per_user }
    }
}

/// What is taken for a volume. It counts until this is dropped, which is when the volume has been looked at.
pub(super) struct Reserved {
    holdings: Arc<Holdings>,
    number: u64,
    most: Option<Most>,
}

impl Holdings {
    /// A volume is published so, or is not there any more.
    pub fn records(&self, volume: VolumeName, now: Option<&VolumeFacts>) {
        let now = now.map(|facts| Share { owner: facts.owner, capacity: facts.capacity });
        let entries = &mut *lock(&self.0);
        let before = match now {
            Some(share) => entries.volumes.insert(volume, share),
            None => entries.volumes.remove(&volume),
        };
        if let Some(Share { owner, capacity }) = now {
            let sum = entries.sums.entry(owner).or_default();
            *sum = Sum { volumes: sum.volumes + 1, bytes: sum.bytes + u128::from(capacity) };
        }
        if let Some(Share { owner, capacity }) = before {
            let sum = entries.sums.entry(owner).or_default();
            *sum = Sum { volumes: sum.volumes - 1, bytes: sum.bytes - u128::from(capacity) };
            if sum.volumes == 0 {
                entries.sums.remove(&owner);
            }
        }
    }

    /// Takes a share, if its owner may have so `most`. Error: why not.
    fn take(
        self: &Arc<Self>,
        volume: VolumeName,
        share: Share,
        most: Option<Most>,
    ) -> std::result::Result<Reserved, String> {
        let entries = &mut *lock(&self.0);
        entries.refuse_more(&volume, share, most)?;
        entries.last_number += 1;
        entries.taken.insert(entries.last_number, (volume, share));
        Ok(Reserved { holdings: self.clone(), number: entries.last_number, most })
    }

    fn of(&self, owner: u32) -> Sum {
        lock(&self.0).of(owner, None)
    }
}

impl Entries {
    /// What somebody has, with what is taken for them, and with a volume of that capacity beside.
    fn of(&self, owner: u32, more: Option<(&VolumeName, u64)>) -> Sum {
        let mut sum = self.sums.get(&owner).copied().unwrap_or_default();
        let taken = self.taken.values().filter(|(_, share)| share.owner == owner);
        // What is taken for a volume that is there already is only what it grows by.
        let mut wanted: HashMap<&VolumeName, u64> = HashMap::new();
        for (volume, capacity) in taken.map(|(volume, share)| (volume, share.capacity)).chain(more) {
            let most = wanted.entry(volume).or_default();
            *most = capacity.max(*most);
        }
        for (volume, capacity) in wanted {
            let there = self.volumes.get(volume).filter(|share| share.owner == owner);
            sum.volumes += u64::from(there.is_none());
            sum.bytes += u128::from(capacity.saturating_sub(there.map_or(0, |share| share.capacity)));
        }
        sum
    }

    /// Refuses what its owner may not have. What takes nothing more is not refused, whatever they have.
    fn refuse_more(&self, volume: &VolumeName, wanted: Share, most: Option<Most>) -> std::result::Result<(), String> {
        let (Share { owner, capacity }, Some(most)) = (wanted, most) else { return Ok(()) };
        let (has, would) = (self.of(owner, None), self.of(owner, Some((volume, capacity))));
        if would.volumes > has.volumes.max(most.volumes.into()) {
            let (has, most) = (has.volumes, most.volumes);
            return Err(format!("user {owner} has {has} volumes, and may have {most}; delete one first"));
        }
        match most.bytes {
            Some(most) if would.bytes > has.bytes.max(most.into()) => {
                let (has, more) = (has.bytes, would.bytes - has.bytes);
                Err(format!(
                    "user {owner} has volumes of {has} bytes, and may have {most}: there is no room for {more} more; \
                     delete or shrink one first"
                ))
            }
            _ => Ok(()),
        }
    }
}

impl Reserved {
    /// The volume is to have that capacity. Error: why its owner may not have so much; what was taken before is taken still.
    pub fn grow(&self, capacity: u64) -> std::result::Result<(), String> {
        let entries = &mut *lock(&self.holdings.0);
        let Some((volume, share)) = entries.taken.get(&self.number).filter(|(_, share)| share.capacity < capacity)
        else {
            return Ok(());
        };
        entries.refuse_more(volume, Share { capacity, ..*share }, self.most)?;
        if let Some((_, share)) = entries.taken.get_mut(&self.number) {
            share.capacity = capacity;
        }
        Ok(())
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        lock(&self.holdings.0).taken.remove(&self.number);
    }
}

impl Volume {
    /// Takes what it is to be of what `owner` may have. Root may have what it likes, and `by` root others may, too.
    pub(super) fn reserve(&self, deed: &str, by: u32, owner: u32, capacity: u64) -> Result<Reserved> {
        let most = (by != 0 && owner != 0).then(|| Most::of(&self.pool.shared.limits));
        let taken = self.pool.pools.holdings.take(self.full_name(), Share { owner, capacity }, most);
        taken.map_err(|why| Error::LimitsExceeded(format!("cannot {deed} volume '{}': {why}", self.name)))
    }

    /// The same of one that is there, and whose owner it stays.
    pub(super) fn reserve_more(&self, deed: &str, by: u32, capacity: u64) -> Result<Reserved> {
        let (owner, _) = self.pool.noted_of(&self.name).ok_or_else(|| self.pool.no_volume(&self.name))?;
        self.reserve(deed, by, owner, capacity)
    }

    fn full_name(&self) -> VolumeName {
        (self.pool.uuid, self.name.clone())
    }
}

impl Service {
    /// How much of storage a user has in active pools, with what is being made, and may have. Who asks for somebody else needs
    /// permission to read.
    pub async fn quota(&self, caller: &Caller, uid: u32) -> Result<Quota> {
        if caller.uid != uid {
            self.allow(caller, &verb::GET_QUOTA, &Subject::default().owned_by(uid)).await?;
        }
        let (has, most) = (self.pools.holdings.of(uid), (uid != 0).then(|| Most::of(&self.shared.limits)));
        Ok(Quota {
            volumes: u32::try_from(has.volumes).unwrap_or(u32::MAX),
            volumes_limit: most.map(|most| most.volumes),
            bytes: u64::try_from(has.bytes).unwrap_or(u64::MAX),
            bytes_limit: most.and_then(|most| most.bytes),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    const MOST: Option<Most> = Some(Most { volumes: 2, bytes: Some(100) });

    fn named(name: &str) -> VolumeName {
        (Uuid::from_u128(7), name.into())
    }

    fn share(owner: u32, capacity: u64) -> Share {
        Share { owner, capacity }
    }

    fn there(holdings: &Holdings, name: &str, owner: u32, capacity: u64) {
        let facts = VolumeFacts {
            key: String::new(),
            kind: "file",
            pool: Uuid::from_u128(7),
            name: name.to_owned(),
            path: String::new(),
            format: String::new(),
            capacity,
            allocation: 0,
            backing_path: String::new(),
            backing_place: None,
            backing: None,
            encrypted: false,
            state: "ready",
            owner,
            users: Vec::new().into(),
            problems: Vec::new(),
        };
        holdings.records(named(name), Some(&facts));
    }

    fn has(holdings: &Holdings, owner: u32) -> (u64, u128) {
        let sum = holdings.of(owner);
        (sum.volumes, sum.bytes)
    }

    /// What is taken and what is there by then is one volume, whatever is told first.
    #[test]
    fn a_volume_counts_once() {
        let holdings = Arc::new(Holdings::default());
        let taken = holdings.take(named("a"), share(1000, 60), MOST).unwrap();
        assert_eq!(has(&holdings, 1000), (1, 60));
        there(&holdings, "a", 1000, 60);
        assert_eq!(has(&holdings, 1000), (1, 60));
        drop(taken);
        assert_eq!(has(&holdings, 1000), (1, 60));
        // It grows, and becomes smaller, and another's.
        let taken = holdings.take(named("a"), share(1000, 100), MOST).unwrap();
        assert_eq!(has(&holdings, 1000), (1, 100));
        drop(taken);
        assert_eq!(has(&holdings, 1000), (1, 60));
        there(&holdings, "a", 1000, 10);
        assert_eq!(has(&holdings, 1000), (1, 10));
        there(&holdings, "a", 1001, 10);
        assert_eq!((has(&holdings, 1000), has(&holdings, 1001)), ((0, 0), (1, 10)));
        holdings.records(named("a"), None);
        assert_eq!(has(&holdings, 1001), (0, 0));
        let entries = lock(&holdings.0);
        assert!(entries.sums.is_empty() && entries.taken.is_empty() && entries.volumes.is_empty());
    }

    #[test]
    fn what_takes_nothing_more_is_not_refused() {
        let holdings = Arc::new(Holdings::default());
        let why = |taken: std::result::Result<Reserved, String>| taken.map(drop).unwrap_err();
        for name in ["a", "b", "c"] {
            there(&holdings, name, 1000, u64::MAX);
        }
        drop(holdings.take(named("a"), share(1000, 50), MOST).unwrap());
        assert!(why(holdings.take(named("d"), share(1000, 0), MOST)).contains("has 3 volumes, and may have 2"));
        drop(holdings.take(named("d"), share(1001, 0), MOST).unwrap());
        drop(holdings.take(named("d"), share(1000, u64::MAX), None).unwrap());
        holdings.records(named("c"), None);
        holdings.records(named("b"), None);
        there(&holdings, "a", 1000, 90);
        assert!(why(holdings.take(named("b"), share(1000, 11), MOST)).contains("no room for 11 more"));
        let taken = holdings.take(named("b"), share(1000, 5), MOST).unwrap();
        taken.grow(10).unwrap();
        assert!(taken.grow(11).unwrap_err().contains("no room for 1 more"));
        assert_eq!(has(&holdings, 1000), (2, 100));
    }
}
