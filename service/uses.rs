//! What machines and pools need of objects of other kinds, over all of them: which disk, or volume, names which secret. Each says
//! what it needs whenever that changes; who keeps such objects asks here who uses them, and is told of changes.

use crate::lock::lock;
use crate::object::{ObjectRef, Usage, User};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Mutex;
use virt_model::domain::DomainDef;
use virt_model::secret::SecretName;

/// What is needed. A kind that machines name is a row here, a line in [`needs_of`], and a listener.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Needed {
    /// A secret.
    Secret(SecretName),
    /// A network, by its name.
    Network(Box<str>),
}

/// One thing that somebody needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// What.
    pub what: Needed,
    /// Where: the target of a disk, `tpm`, the address of a card, the kind of a display, the name of a volume.
    pub place: Box<str>,
}

/// All that a definition needs.
pub(crate) fn needs_of(def: &DomainDef) -> Box<[Need]> {
    let secrets = def.secret_names().into_iter();
    let secrets = secrets.map(|(user, name)| Need { what: Needed::Secret(name), place: user.place().into() });
    let networks =
        def.named_networks().map(|(name, place)| Need { what: Needed::Network(name.into()), place: place.into() });
    secrets.chain(networks).collect()
}

type Listener = Box<dyn Fn(&BTreeSet<Needed>) + Send + Sync>;

/// See the module.
#[derive(Default)]
pub(crate) struct Uses {
    /// By who needs them. It is held for moments, and nothing else is locked meanwhile.
    needs: Mutex<HashMap<ObjectRef, Vec<(Usage, Need)>>>,
    listeners: Mutex<Vec<Listener>>,
}

impl fmt::Debug for Uses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Uses")
    }
}

impl Uses {
    /// From now on what has changed of what is needed is told to `listener`, while a machine's state is locked.
    pub fn listen(&self, listener: impl Fn(&BTreeSet<Needed>) + Send + Sync + 'static) {
        lock(&self.listeners).push(Box::new(listener));
    }

    /// What somebody needs from now on, by what runs and by what is stored.
    pub fn are(&self, user: ObjectRef, live: &[Need], stored: &[Need]) {
        let changed: BTreeSet<Needed> = {
            let mut needs = lock(&self.needs);
            if live.is_empty() && stored.is_empty() && !needs.contains_key(&user) {
                return;
            }
            let by = |usage: Usage, of: &[Need]| of.iter().map(|need| (usage, need.clone())).collect::<Vec<_>>();
            let now = [by(Usage::Live, live), by(Usage::Config, stored)].concat();
            let before = match now.is_empty() {
                true => needs.remove(&user),
                false => needs.insert(user, now.clone()),
            };
            let before = before.unwrap_or_default();
            let only = |these: &[(Usage, Need)], others: &[(Usage, Need)]| {
                let different = these.iter().filter(|one| !others.contains(one));
                different.map(|(_, need)| need.what.clone()).collect::<Vec<_>>()
            };
            only(&now, &before).into_iter().chain(only(&before, &now)).collect()
        };
        if !changed.is_empty() {
            lock(&self.listeners).iter().for_each(|listener| listener(&changed));
        }
    }

    /// Who needs one of these, and where, in an order that does not change.
    pub fn of(&self, wanted: impl Fn(&Needed) -> bool) -> Vec<User> {
        let needs = lock(&self.needs);
        let all = needs.iter().flat_map(|(user, needs)| needs.iter().map(move |(how, need)| (user, how, need)));
        let users = all.filter(|(_, _, need)| wanted(&need.what)).map(|(user, how, need)| User {
            object: user.clone(),
            place: need.place.to_string(),
            how: *how,
        });
        let mut users: Vec<User> = users.collect();
        users.sort();
        users.dedup();
        users
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use uuid::Uuid;

    #[test]
    fn what_changes_is_told_and_who_uses_it_is_known() {
        let uses = Uses::default();
        let told = Arc::new(Mutex::new(Vec::new()));
        let heard = told.clone();
        uses.listen(move |changed| lock(&heard).push(changed.len()));
        let (one, other) =
            (Needed::Secret(SecretName::Uuid(Uuid::from_u128(1))), ObjectRef::Domain(Uuid::from_u128(7)));
        let need = |place: &str| Need { what: one.clone(), place: place.into() };
        uses.are(other.clone(), &[], &[]);
        uses.are(other.clone(), &[], &[need("vda")]);
        uses.are(other.clone(), &[need("vda")], &[need("vda")]);
        uses.are(other.clone(), &[need("vda")], &[need("vda")]);
        let user = |how| User { object: other.clone(), place: "vda".into(), how };
        assert_eq!(uses.of(|needed| *needed == one), [user(Usage::Live), user(Usage::Config)]);
        uses.are(other.clone(), &[], &[]);
        assert!(uses.of(|_| true).is_empty());
        assert_eq!(*lock(&told), [1, 1, 1], "what stays as it is is not told");
    }
}
