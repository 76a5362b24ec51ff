//! The managed saves of domains on disk, in `<state>/saved/`: one file each, which is there when it is complete. The drivers
//! write and read them; what is beside one belongs to a save that is under way, or was cut off.
//!
//! ```text
//!  <uuid>.virtsave        the next start goes on from it; a start that is cut off while it is loaded leaves it
//!  <uuid>.virtsave.used   a guest goes on from it, or did: it has this name before the first instruction, and is never used again
//! ```

use super::{Store, remove, sync_folder, unlink, uuids};
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// How the names of such files end.
const ENDING: &str = "virtsave";
/// How they end once a guest goes on from them.
const USED: &str = "virtsave.used";

/// A guest goes on from this one, if it is there: on disk when this returns.
pub(super) fn is_used(file: &Path) -> Result<()> {
    match fs::rename(file, file.with_extension(USED)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        renamed => {
            renamed.map_err(|e| Error::from_io("rename", file, &e))?;
            sync_folder(file.parent().unwrap_or(file)).inspect_err(|_| {
                // Nobody goes on from it now: it is as good as before.
                let _ = fs::rename(file.with_extension(USED), file);
            })
        }
    }
}

/// A step of a start from this one, for tests; others have none.
pub(super) fn step_of_start(file: &Path) {
    if cfg!(debug_assertions) && (file.exists() || file.with_extension(USED).exists()) {
        crate::fail_point::reached();
    }
}

impl Store {
    pub(super) fn managed_saves(&self) -> PathBuf {
        self.paths.state.join("saved")
    }

    /// Where the managed save of a domain is, if it has one.
    pub fn managed_save(&self, uuid: Uuid) -> PathBuf {
        self.managed_saves().join(format!("{uuid}.{ENDING}"))
    }

    /// Removes it, and one that is used; what is not there is fine.
    pub fn remove_managed_save(&self, uuid: Uuid) -> Result<()> {
        let file = self.managed_save(uuid);
        remove(&file.with_extension(USED))?;
        remove(&file)
    }

    /// Whether a guest has gone on from it, and it is there still.
    pub fn managed_save_is_used(&self, uuid: Uuid) -> bool {
        fs::symlink_metadata(self.managed_save(uuid).with_extension(USED)).is_ok()
    }

    /// Its length in bytes; `None` if it is not there.
    pub fn managed_save_bytes(&self, uuid: Uuid) -> Option<u64> {
        fs::symlink_metadata(self.managed_save(uuid)).ok().map(|about| about.len())
    }

    /// Which domains have one. Removes those that are used, and what saves left beside that nobody will finish: those of all
    /// domains but `unfinished`.
    pub fn load_managed_saves(&self, unfinished: &BTreeSet<Uuid>) -> Result<BTreeSet<Uuid>> {
        let folder = self.managed_saves();
        let failed = |e: io::Error| Error::from_io("read", &folder, &e);
        let entries = match fs::read_dir(&folder) {
            // It cannot be made where nothing can be written.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.ends_with(&format!(".{USED}")) {
                match unlink(&path) {
                    Ok(_) => tracing::warn!(
                        "{}: a guest has gone on from what was saved in it, so it is not used again, and removed",
                        path.display()
                    ),
                    Err(e) => {
                        tracing::error!("{e}; a guest has gone on from what was saved in it, and it is not used again")
                    }
                }
                continue;
            }
            let left_of = name.split_once(&format!(".{ENDING}.")).and_then(|(uuid, _)| Uuid::try_parse(uuid).ok());
            if left_of.is_some_and(|uuid| !unfinished.contains(&uuid)) {
                match unlink(&path) {
                    Ok(_) => tracing::warn!("{} was left by a save that was cut off, and is removed", path.display()),
                    Err(e) => tracing::warn!("{e}; it was left by a save that was cut off"),
                }
            }
        }
        Ok(uuids(&folder, ENDING)?.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Paths, Store};
    use std::collections::BTreeSet;
    use std::fs;
    use uuid::Uuid;

    /// Of what is beside managed saves that stays which a save that was cut off may still be finished with.
    #[test]
    fn what_nobody_finishes_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let store = Store::open(Paths { state: at("state"), runtime: at("run"), log: at("log") }).expect("opened");
        let (whole, open, left) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
        let part = |uuid: Uuid| at(&format!("state/saved/{uuid}.virtsave.virtd-{uuid}"));
        for file in [store.managed_save(whole), part(open), part(left), at("state/saved/notes.txt")] {
            fs::write(file, "what a driver has written").expect("written");
        }
        assert_eq!(store.load_managed_saves(&BTreeSet::from([open])).expect("read"), BTreeSet::from([whole]));
        assert_eq!((part(open).exists(), part(left).exists()), (true, false));
        assert!(at("state/saved/notes.txt").exists(), "it is not virtd's");
        assert_eq!(store.managed_save_bytes(whole), Some(25));
        store.remove_managed_save(whole).expect("removed");
        assert_eq!(store.managed_save_bytes(whole), None);
        store.remove_managed_save(whole).expect("what is not there need not go");
        fs::remove_dir_all(at("state/saved")).expect("removed");
        assert_eq!(store.load_managed_saves(&BTreeSet::new()).expect("none"), BTreeSet::new());
    }
}
