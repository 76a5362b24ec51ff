//! The objects of one kind by uuid and name. Names are claimed before an object is stored, so two callers cannot both have one.
//!
//! The maps are locked under an object's state, never the other way round.

use crate::error::{Error, Result};
use crate::lock::lock;
use crate::object::ObjectKind;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use uuid::Uuid;
use virt_model::xml::shorten;

/// What is in a registry.
pub(crate) trait Object {
    /// The kind.
    const KIND: ObjectKind;

    /// How the name of one that is there is changed.
    const RENAMED_BY: &str = "Undefine and define";

    /// Its identity.
    fn uuid(&self) -> Uuid;

    /// The error of who wants a name or uuid that another has.
    fn exists(text: String) -> Error;
}

/// See the module.
pub(crate) struct Registry<T> {
    maps: Mutex<Maps<T>>,
}

struct Maps<T> {
    objects: HashMap<Uuid, Arc<T>>,
    names: HashMap<String, Uuid>,
    /// Of objects that are being made: claimed, and not findable yet.
    claimed: HashSet<Uuid>,
    owned: HashMap<u32, usize>,
}

impl<T> Default for Registry<T> {
    fn default() -> Registry<T> {
        let (objects, names) = (HashMap::new(), HashMap::new());
        Registry { maps: Mutex::new(Maps { objects, names, claimed: HashSet::new(), owned: HashMap::new() }) }
    }
}

/// What a name and uuid were found to mean.
pub(crate) enum Claimed<T> {
    /// The object that has both.
    Existing(Arc<T>),
    /// Nobody's until now; the caller's to fill or to give back.
    New,
}

impl<T: Object> Registry<T> {
    pub fn get(&self, uuid: Uuid) -> Option<Arc<T>> {
        lock(&self.maps).objects.get(&uuid).cloned()
    }

    pub fn by_name(&self, name: &str) -> Option<Arc<T>> {
        let maps = lock(&self.maps);
        maps.names.get(name).and_then(|uuid| maps.objects.get(uuid)).cloned()
    }

    pub fn all(&self) -> Vec<Arc<T>> {
        lock(&self.maps).objects.values().cloned().collect()
    }

    /// Whether name and uuid belong together, changing nothing.
    pub fn look(&self, uuid: Uuid, name: &str) -> Result<Option<Arc<T>>> {
        let maps = lock(&self.maps);
        maps.look(uuid, name)
    }

    /// Whether `owner`, who may have `limit`, may have one more now.
    pub fn has_room(&self, owner: u32, limit: usize) -> bool {
        lock(&self.maps).has_room(owner, limit)
    }

    /// Finds the object, or reserves the name for a new one of `owner`, who may have `limit`.
    pub fn claim(&self, uuid: Uuid, name: &str, owner: u32, limit: usize) -> Result<Claimed<T>> {
        let mut maps = lock(&self.maps);
        if let Some(object) = maps.look(uuid, name)? {
            return Ok(Claimed::Existing(object));
        }
        if !maps.has_room(owner, limit) {
            return Err(Error::LimitsExceeded(format!(
                "user {owner} has {} {}s, which is the limit; undefine one first",
                maps.owned.get(&owner).copied().unwrap_or_default(),
                T::KIND.word()
            )));
        }
        *maps.owned.entry(owner).or_default() += 1;
        maps.names.insert(name.to_owned(), uuid);
        maps.claimed.insert(uuid);
        Ok(Claimed::New)
    }

    /// The same for who found `seen` before, and has asked for permission for that, or for a new object. That may have taken a
    /// person's time: what has come or gone meanwhile is another object, for which it does not hold, and nothing is claimed.
    pub fn claim_as_seen(
        &self,
        uuid: Uuid,
        name: &str,
        owner: u32,
        limit: usize,
        seen: Option<&Arc<T>>,
    ) -> Result<Claimed<T>> {
        let meanwhile = |what: &str| format!("{} was {what} by another call meanwhile; try again", T::KIND.named(name));
        match (self.claim(uuid, name, owner, limit)?, seen) {
            (Claimed::Existing(now), Some(before)) if Arc::ptr_eq(&now, before) => Ok(Claimed::Existing(now)),
            (Claimed::Existing(_), _) => Err(T::exists(meanwhile("defined"))),
            (Claimed::New, None) => Ok(Claimed::New),
            (Claimed::New, Some(_)) => {
                self.remove(uuid, name, owner);
                Err(Error::OperationInvalid(meanwhile("removed")))
            }
        }
    }

    /// Makes a claimed object findable.
    pub fn insert(&self, object: Arc<T>) {
        let mut maps = lock(&self.maps);
        maps.claimed.remove(&object.uuid());
        maps.objects.insert(object.uuid(), object);
    }

    /// Refuses a name that an object has, or is about to have.
    pub fn name_is_free(&self, name: &str) -> Result<()> {
        lock(&self.maps).names.get(name).map_or(Ok(()), |other| Err(taken_name::<T>(name, *other)))
    }

    /// Reserves a second name for an object that is about to be renamed.
    pub fn claim_name(&self, uuid: Uuid, name: &str) -> Result<()> {
        let mut maps = lock(&self.maps);
        if let Some(other) = maps.names.get(name) {
            return Err(taken_name::<T>(name, *other));
        }
        maps.names.insert(name.to_owned(), uuid);
        Ok(())
    }

    /// Drops one of the names of an object.
    pub fn drop_name(&self, name: &str) {
        lock(&self.maps).names.remove(name);
    }

    /// Forgets an object.
    pub fn remove(&self, uuid: Uuid, name: &str, owner: u32) {
        let mut maps = lock(&self.maps);
        maps.objects.remove(&uuid);
        maps.claimed.remove(&uuid);
        maps.names.remove(name);
        maps.disown(owner);
    }
}

impl<T: Object> Maps<T> {
    fn has_room(&self, owner: u32, limit: usize) -> bool {
        owner == 0 || self.owned.get(&owner).is_none_or(|owned| *owned < limit)
    }

    fn look(&self, uuid: Uuid, name: &str) -> Result<Option<Arc<T>>> {
        match (self.names.get(name), self.objects.get(&uuid)) {
            (Some(known), _) if *known != uuid => Err(taken_name::<T>(name, *known)),
            (_, None) if self.claimed.contains(&uuid) => Err(T::exists(format!(
                "{} with uuid {uuid} is just being defined by another call",
                T::KIND.named(self.name_of(uuid))
            ))),
            (None, Some(_)) => Err(T::exists(format!(
                "uuid {uuid} belongs to {}, not '{name}'; use {}, or another uuid",
                T::KIND.named(self.name_of(uuid)),
                T::RENAMED_BY
            ))),
            (_, found) => Ok(found.cloned()),
        }
    }

    /// As the names say it: to ask the object would be to lock its state, under which others lock these maps.
    fn name_of(&self, uuid: Uuid) -> &str {
        self.names.iter().find(|(_, of)| **of == uuid).map_or("", |(name, _)| name)
    }

    fn disown(&mut self, owner: u32) {
        if let Some(owned) = self.owned.get_mut(&owner) {
            *owned = owned.saturating_sub(1);
        }
    }
}

fn taken_name<T: Object>(name: &str, uuid: Uuid) -> Error {
    let object = T::KIND.named(name);
    T::exists(format!("{object} exists already, with uuid {uuid}; give that uuid to change it, or choose another name"))
}

/// Refuses a name that looks like another. Those that are there already keep theirs.
pub(crate) fn check_new_name(what: &str, name: &str) -> Result<()> {
    let refused = virt_model::xml::check_new_name(name);
    refused.map_err(|why| Error::InvalidArgument(format!("the name '{}' of a {what} {why}", shorten(name))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Domain;

    #[test]
    fn a_uuid_is_claimed_under_one_name() {
        let registry = Registry::<Domain>::default();
        let uuid = Uuid::from_u128(7);
        assert!(matches!(registry.claim(uuid, "web", 1000, 9), Ok(Claimed::New)));
        for name in ["web", "shop"] {
            assert!(matches!(registry.claim(uuid, name, 1000, 9), Err(Error::DomainExists(_))), "{name}");
        }
        registry.remove(uuid, "web", 1000);
        assert!(matches!(registry.claim(uuid, "shop", 1000, 9), Ok(Claimed::New)));
    }
}
