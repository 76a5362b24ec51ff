//! All pools, and what of them is asked over all: which volumes stand on a file, and whose volume is at a path.

use super::quota::Holdings;
use super::{Pool, Volume};
use crate::facts::VolumeFacts;
use crate::images::Chain;
use crate::lock::lock;
use crate::object::{ObjectKind, ObjectRef, Usage, User};
use crate::registry::Registry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use uuid::Uuid;

/// A volume by its pool and its name there.
pub(super) type VolumeName = (Uuid, Arc<str>);

/// See the module.
#[derive(Default)]
pub(crate) struct Pools {
    pub registry: Registry<Pool>,
    /// Which volumes say that they stand on which file. It is held for moments, and nothing else is locked meanwhile.
    standing: Mutex<HashMap<PathBuf, BTreeMap<VolumeName, PathBuf>>>,
    /// Which volume is at which path, likewise.
    places: Mutex<HashMap<PathBuf, VolumeName>>,
    /// How much of storage each user has.
    pub(super) holdings: Arc<Holdings>,
    /// Counts how often what a pool is has changed.
    pub phases: watch::Sender<u64>,
}

impl Pools {
    /// A volume is as `now` says, and was as `before` said. Whose users, or whose base, are others than before.
    pub fn stands(
        &self,
        pool: Uuid,
        name: &Arc<str>,
        before: Option<&VolumeFacts>,
        now: Option<&VolumeFacts>,
    ) -> Vec<PathBuf> {
        self.holdings.records((pool, name.clone()), now);
        let Some(path) = now.or(before).map(|facts| PathBuf::from(&facts.path)) else { return Vec::new() };
        {
            let mut places = lock(&self.places);
            match now {
                Some(_) => _ = places.insert(path.clone(), (pool, name.clone())),
                // Another pool may have taken its place there.
                None if places.get(&path) == Some(&(pool, name.clone())) => _ = places.remove(&path),
                None => {}
            }
        }
        let mut standing = lock(&self.standing);
        let mut others = Vec::new();
        if before.is_none() != now.is_none() {
            others.extend(standing.get(&path).into_iter().flatten().map(|(_, path)| path.clone()));
        }
        let place = |facts: Option<&VolumeFacts>| facts.and_then(|facts| facts.backing_place.clone());
        let (was, is) = (place(before), place(now));
        if was == is {
            return others;
        }
        if let Some(all) = was.as_ref().and_then(|was| standing.get_mut(was)) {
            all.remove(&(pool, name.clone()));
        }
        standing.retain(|_, all| !all.is_empty());
        if let Some(is) = &is {
            standing.entry(is.clone()).or_default().insert((pool, name.clone()), path);
        }
        others.extend(was.into_iter().chain(is));
        others
    }

    /// The volumes that stand on a file.
    pub fn standing_on(&self, file: &Path) -> Vec<User> {
        let standing = lock(&self.standing);
        let all = standing.get(file).into_iter().flatten();
        all.map(|((pool, name), _)| User {
            object: ObjectRef::Volume(*pool, name.clone()),
            place: String::new(),
            how: Usage::Backing,
        })
        .collect()
    }

    /// The volumes that were put on others, each with its base.
    pub fn noted_chains(&self) -> Vec<Chain> {
        let mut chains = Vec::new();
        for pool in self.registry.all() {
            let target = pool.target();
            for (base, name) in pool.noted_bases() {
                let whose = format!("{} of pool '{}'", ObjectKind::Volume.named(&name), pool.name);
                chains.push(Chain::of_volume(whose, target.join(&*name), base));
            }
        }
        chains
    }

    /// The pool in which a file is a volume, and its name there.
    pub fn volume_at(&self, file: &Path) -> Option<(Arc<Pool>, Arc<str>)> {
        let (pool, name) = lock(&self.places).get(file)?.clone();
        Some((self.registry.get(pool)?, name))
    }

    /// The volume that a file is, by that path or by where its pool's leads.
    pub fn volume_of_file(&self, file: &Path) -> Option<Volume> {
        if let Some((pool, name)) = self.volume_at(file) {
            return pool.volume(&name);
        }
        let (folder, name) = (file.parent()?, file.file_name()?.to_str()?);
        self.registry.all().into_iter().filter(|pool| pool.is_in(folder)).find_map(|pool| pool.volume(name))
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Pool>> {
        self.registry.all()
    }

    /// The volume at a path, as far as it is published.
    pub fn indexed(&self, path: &Path) -> Option<ObjectRef> {
        lock(&self.places).get(path).map(|(pool, name)| ObjectRef::Volume(*pool, name.clone()))
    }

    /// Whoever uses these files may be others now.
    pub fn look_at_users<'a>(&self, files: impl IntoIterator<Item = &'a PathBuf>) {
        let mut by_folder: HashMap<&Path, BTreeSet<Arc<str>>> = HashMap::new();
        for file in files {
            let Some((folder, name)) = file.parent().zip(file.file_name().and_then(|name| name.to_str())) else {
                continue;
            };
            by_folder.entry(folder).or_default().insert(name.into());
        }
        if by_folder.is_empty() {
            return;
        }
        for pool in self.registry.all() {
            for (_, names) in by_folder.iter().filter(|(folder, _)| pool.is_in(folder)) {
                pool.commit_volumes(Vec::new(), names.clone(), |_| {});
            }
            // Who has an image in a folder of its folder uses the pool, and no volume.
            if by_folder.keys().any(|folder| !pool.is_in(folder) && pool.is_above(folder)) {
                pool.commit(Vec::new(), |_| {});
            }
        }
    }
}
