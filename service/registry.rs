//! Domains by uuid, name and id. Names are claimed before a domain is stored, so two callers cannot both have one.
//!
//! The maps are locked under a domain's state, never the other way round.

use crate::domain::Domain;
use crate::error::{Error, Result};
use crate::lock::lock;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use uuid::Uuid;

/// See the module.
#[derive(Default)]
pub(crate) struct Registry {
    maps: Mutex<Maps>,
}

#[derive(Default)]
struct Maps {
    domains: HashMap<Uuid, Arc<Domain>>,
    names: HashMap<String, Uuid>,
    /// Of domains that are being made: claimed, and not findable yet.
    claimed: HashSet<Uuid>,
    owned: HashMap<u32, usize>,
}

/// What a name and uuid were found to mean.
pub(crate) enum Claimed {
    /// The domain that has both.
    Existing(Arc<Domain>),
    /// Nobody's until now; the caller's to fill or to give back.
    New,
}

impl Registry {
    pub fn get(&self, uuid: Uuid) -> Option<Arc<Domain>> {
        lock(&self.maps).domains.get(&uuid).cloned()
    }

    pub fn by_name(&self, name: &str) -> Option<Arc<Domain>> {
        let maps = lock(&self.maps);
        maps.names.get(name).and_then(|uuid| maps.domains.get(uuid)).cloned()
    }

    pub fn by_id(&self, id: u32) -> Option<Arc<Domain>> {
        if id == 0 {
            return None;
        }
        self.all().into_iter().find(|domain| domain.id() == id)
    }

    pub fn all(&self) -> Vec<Arc<Domain>> {
        lock(&self.maps).domains.values().cloned().collect()
    }

    /// Whether name and uuid belong together, changing nothing.
    pub fn look(&self, uuid: Uuid, name: &str) -> Result<Option<Arc<Domain>>> {
        let maps = lock(&self.maps);
        maps.look(uuid, name)
    }

    /// Finds the domain, or reserves the name for a new one of `owner`, who may have `limit`.
    pub fn claim(&self, uuid: Uuid, name: &str, owner: u32, limit: usize) -> Result<Claimed> {
        let mut maps = lock(&self.maps);
        if let Some(domain) = maps.look(uuid, name)? {
            return Ok(Claimed::Existing(domain));
        }
        let owned = maps.owned.entry(owner).or_default();
        if owner != 0 && *owned >= limit {
            return Err(Error::LimitsExceeded(format!(
                "user {owner} has {owned} domains, which is the limit; undefine one first"
            )));
        }
        *owned += 1;
        maps.names.insert(name.to_owned(), uuid);
        maps.claimed.insert(uuid);
        Ok(Claimed::New)
    }

    /// Makes a claimed domain findable.
    pub fn insert(&self, domain: Arc<Domain>) {
        let mut maps = lock(&self.maps);
        maps.claimed.remove(&domain.uuid());
        maps.domains.insert(domain.uuid(), domain);
    }

    /// Reserves a second name for a domain that is about to be renamed.
    pub fn claim_name(&self, uuid: Uuid, name: &str) -> Result<()> {
        let mut maps = lock(&self.maps);
        if let Some(other) = maps.names.get(name) {
            return Err(taken_name(name, *other));
        }
        maps.names.insert(name.to_owned(), uuid);
        Ok(())
    }

    /// Drops one of the names of a domain.
    pub fn drop_name(&self, name: &str) {
        lock(&self.maps).names.remove(name);
    }

    /// Forgets a domain.
    pub fn remove(&self, uuid: Uuid, name: &str, owner: u32) {
        let mut maps = lock(&self.maps);
        maps.domains.remove(&uuid);
        maps.claimed.remove(&uuid);
        maps.names.remove(name);
        maps.disown(owner);
    }
}

impl Maps {
    fn look(&self, uuid: Uuid, name: &str) -> Result<Option<Arc<Domain>>> {
        match (self.names.get(name), self.domains.get(&uuid)) {
            (Some(known), _) if *known != uuid => Err(taken_name(name, *known)),
            (_, None) if self.claimed.contains(&uuid) => Err(Error::DomainExists(format!(
                "domain '{}' with uuid {uuid} is just being defined by another call",
                self.name_of(uuid)
            ))),
            (None, Some(_)) => Err(Error::DomainExists(format!(
                "uuid {uuid} belongs to domain '{}', not '{name}'; use Rename, or another uuid",
                self.name_of(uuid)
            ))),
            (_, found) => Ok(found.cloned()),
        }
    }

    /// As the names say it: to ask the domain would be to lock its state, under which others lock these maps.
    fn name_of(&self, uuid: Uuid) -> &str {
        self.names.iter().find(|(_, of)| **of == uuid).map_or("", |(name, _)| name)
    }

    fn disown(&mut self, owner: u32) {
        if let Some(owned) = self.owned.get_mut(&owner) {
            *owned = owned.saturating_sub(1);
        }
    }
}

fn taken_name(name: &str, uuid: Uuid) -> Error {
    Error::DomainExists(format!(
        "domain '{name}' exists already, with uuid {uuid}; give that uuid to change it, or choose another name"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_claimed_under_one_name() {
        let registry = Registry::default();
        let uuid = Uuid::from_u128(7);
        assert!(matches!(registry.claim(uuid, "web", 1000, 9), Ok(Claimed::New)));
        for name in ["web", "shop"] {
            assert!(matches!(registry.claim(uuid, name, 1000, 9), Err(Error::DomainExists(_))), "{name}");
        }
        registry.remove(uuid, "web", 1000);
        assert!(matches!(registry.claim(uuid, "shop", 1000, 9), Ok(Claimed::New)));
    }
}
