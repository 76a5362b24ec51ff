//! Who needs a pool or a volume: machines by their disks and snapshots, volumes that stand on others, and who has an image open and
//! is none of ours. Nothing in use is taken away.

use super::{Pool, State};
use crate::error::{Error, Result};
use crate::facts::VolumeFacts;
use crate::images::Fate;
use crate::lock::lock;
use crate::object::{ObjectKind, ObjectRef, Usage, User};
use crate::volumes;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is known of a verb of which nothing is done.
#[derive(Debug, Default)]
pub struct StorageCheck {
    /// Why it would be refused.
    pub refusal: Option<Error>,
    /// Who needs what it would take away or change.
    pub users: Vec<User>,
    /// What could no longer be started, or reverted to.
    pub breaks: Vec<ObjectRef>,
    /// What becomes of which file, and its bytes.
    pub files: Vec<(String, &'static str, u64)>,
    /// Bytes that are free then.
    pub frees: u64,
    /// Bytes that are taken then.
    pub needs: u64,
}

impl Pool {
    /// Who needs a volume at that path: machines, and other volumes.
    pub(super) fn users_at(&self, path: &Path) -> Vec<User> {
        let real = self.real_name(path);
        let mut users = Vec::new();
        for path in [path].into_iter().chain(real.as_deref()) {
            users.extend(self.shared.image_users.of(path));
            users.extend(self.pools.standing_on(path));
        }
        if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
            users.extend(self.shared.image_users.of(&volumes::by_name(&self.name, name)));
        }
        users.sort();
        users.dedup();
        users
    }

    /// Who needs something below a folder.
    pub(super) fn users_below(&self, folder: &Path) -> Vec<User> {
        let mut users = self.shared.image_users.below(folder);
        if let Some(real) = self.real_of(folder) {
            users.extend(self.shared.image_users.below(&real));
            users.sort();
            users.dedup();
        }
        users
    }

    /// What a file of it is called without links on the way, if that is another name.
    fn real_name(&self, path: &Path) -> Option<PathBuf> {
        Some(self.real_of(path.parent()?)?.join(path.file_name()?))
    }

    /// Where its folder leads, if that is elsewhere.
    fn real_of(&self, folder: &Path) -> Option<PathBuf> {
        let known = lock(&self.real);
        let (target, real) = known.as_ref()?;
        (target == folder && real != folder).then(|| real.clone())
    }

    /// Whether a folder is that of its volumes.
    pub(super) fn is_in(&self, folder: &Path) -> bool {
        let target = self.target();
        target == folder
            || folder == volumes::pool_by_name(&self.name)
            || self.real_of(&target).as_deref() == Some(folder)
    }

    /// Whether a folder is in that of its volumes, however deep.
    pub(super) fn is_above(&self, folder: &Path) -> bool {
        if lock(&self.state).shares_folder() {
            return false;
        }
        let target = self.target();
        let real = self.real_of(&target);
        !target.as_os_str().is_empty() && [Some(target), real].iter().flatten().any(|above| folder.starts_with(above))
    }

    /// Who needs this pool.
    pub(super) fn users(&self) -> Vec<User> {
        self.users_of(&lock(&self.state))
    }

    /// The same of one that is so.
    pub(super) fn users_of(&self, state: &State) -> Vec<User> {
        let target = state.target();
        // Of a pool without a folder of the host's all would be below.
        let mut users = match (state.shares_folder(), target.is_absolute()) {
            (true, _) => state.volumes.keys().flat_map(|name| self.users_at(&target.join(&**name))).collect(),
            (false, true) => self.users_below(&target),
            (false, false) => Vec::new(),
        };
        users.extend(self.shared.image_users.below(&volumes::pool_by_name(&self.name)));
        users.sort();
        users.dedup();
        users
    }

    /// Refuses what would take away what these need, of those that count.
    pub(super) fn refuse_users(&self, deed: &str, users: &[User], counts: impl Fn(&User) -> bool) -> Result<()> {
        let named: Vec<String> = users.iter().filter(|user| counts(user)).map(|user| self.called(user)).collect();
        match named.is_empty() {
            true => Ok(()),
            false => {
                Err(Error::InUse(format!("cannot {deed} pool '{}': it is used by {}", self.name, named.join(", "))))
            }
        }
    }

    /// Who uses something, for people.
    pub(super) fn called(&self, user: &User) -> String {
        match &user.object {
            ObjectRef::Volume(_, name) => format!("{} ({})", ObjectKind::Volume.named(name), user.how),
            ObjectRef::Foreign => "another process (fuser tells which)".to_owned(),
            _ => self.shared.images.called(user),
        }
    }

    /// Who needs a volume, looked up now: strangers, too.
    pub(super) async fn users_now(&self, name: &str) -> Result<Vec<User>> {
        let mut users = self.users_at(&self.target().join(name));
        let strangers = self.opened()?.is_open_elsewhere(name, true).await.map_err(|e| self.failed("look at", e))?;
        // A guest of ours has it open itself.
        if strangers && !users.iter().any(|user| user.how == Usage::Live) {
            users.push(User { object: ObjectRef::Foreign, place: String::new(), how: Usage::Foreign });
        }
        Ok(users)
    }

    /// Refuses to change or remove the file of a volume that somebody needs, snapshots and strangers included.
    pub(super) async fn refuse_in_use(
        &self,
        deed: &str,
        name: &str,
        fate: Fate,
        counts: impl Fn(&User) -> bool,
    ) -> Result<()> {
        let users = self.users_now(name).await?;
        self.refuse_used(deed, name, fate, &users, counts).await
    }

    /// The same where its users have been looked up.
    pub(super) async fn refuse_used(
        &self,
        deed: &str,
        name: &str,
        fate: Fate,
        users: &[User],
        counts: impl Fn(&User) -> bool,
    ) -> Result<()> {
        let path = self.target().join(name);
        let volume = ObjectKind::Volume.named(name);
        let named: Vec<String> = users.iter().filter(|user| counts(user)).map(|user| self.called(user)).collect();
        if !named.is_empty() {
            return Err(Error::InUse(format!("cannot {deed} {volume}: it is used by {}", named.join(", "))));
        }
        // By other names of its file, and those that are about to have it.
        let stored = counts(&User { object: ObjectRef::Foreign, place: String::new(), how: Usage::Config });
        let machines = self.shared.images.machines_on(&path, !stored).await;
        if !machines.is_empty() {
            return Err(Error::InUse(format!("cannot {deed} {volume}: it is used by {}", machines.join(", "))));
        }
        // What snapshots froze, what block jobs write, and what stands on it and is no volume of an active pool.
        let chains = self.shared.images.who_stands_on(&path, fate).await;
        match chains.is_empty() {
            true => Ok(()),
            false => Err(Error::InUse(format!("cannot {deed} {volume}: it is what {} stands on", chains.join(", ")))),
        }
    }

    /// All that is published of a volume.
    pub(super) fn volume_facts(&self, state: &State, name: &Arc<str>) -> Option<VolumeFacts> {
        let row = state.volumes.get(name)?;
        let look = &row.look;
        let noted = state.noted.get(&look.id);
        let path = state.target().join(&**name);
        let place = look.backing.as_ref().and_then(|backing| backing.place.clone());
        let backing = place.as_ref().and_then(|place| self.known_volume(state, place));
        let mut problems = Vec::new();
        let mut problem = |token: &'static str, text: String| problems.push((token, text));
        if let Some(why) = &look.broken {
            problem("broken", why.clone());
        }
        if look.has_data_file {
            problem("data-file", super::volume::DATA_FILE.to_owned());
        }
        if look.backing.is_some() && backing.is_none() {
            problem(
                "backing-outside",
                "what it stands on is no volume of an active pool, and is not followed".to_owned(),
            );
        }
        let mut users = self.users_at(&path);
        if row.writers > 0 {
            users.push(User { object: ObjectRef::Foreign, place: String::new(), how: Usage::Foreign });
        }
        let incomplete = noted.is_some_and(|noted| noted.incomplete);
        if incomplete {
            problem("incomplete", "what was written to it was cut off: write it again, or delete it".to_owned());
        }
        let volume_state = match () {
            () if row.is_busy() => "busy",
            () if look.broken.is_some() => "broken",
            () if incomplete => "incomplete",
            () => "ready",
        };
        Some(VolumeFacts {
            pool: self.uuid,
            name: name.to_string(),
            path: path.display().to_string(),
            key: look.key.clone().unwrap_or_else(|| path.display().to_string()),
            kind: state.volume_kind().as_str(),
            format: look.format.clone(),
            capacity: look.capacity,
            allocation: look.allocation,
            backing_path: look.backing.as_ref().map_or_else(String::new, |backing| backing.text.clone()),
            backing_place: place,
            backing,
            encrypted: look.encrypted,
            state: volume_state,
            owner: noted.map_or(look.permissions.0, |noted| noted.owner),
            users: users.into(),
            problems,
        })
    }

    /// The volume at a path. Of another pool only the pool is looked at: its volumes have a lock of their own.
    fn known_volume(&self, state: &State, path: &Path) -> Option<ObjectRef> {
        let name = path.file_name()?.to_str()?;
        if path.parent() == Some(&*state.target()) {
            let (name, _) = state.volumes.get_key_value(name)?;
            return Some(ObjectRef::Volume(self.uuid, name.clone()));
        }
        self.pools.indexed(path)
    }
}
