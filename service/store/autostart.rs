//! What has been started with the host since it booted, so that each has its turn once: `<runtime>/autostarting` lists what has had
//! it while others are still to have theirs, `<runtime>/autostarted` says that all have.

use super::{Store, remove, replace};
use crate::error::Result;
use crate::lock::lock;
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use uuid::Uuid;

/// See the module.
#[derive(Debug)]
pub(crate) struct Autostarting {
    list: PathBuf,
    mark: PathBuf,
    /// Names the boot that these files are of.
    boot: String,
    had: Mutex<BTreeSet<Uuid>>,
}

impl Store {
    /// What is known of it; nothing if all have had their turn. Blocks.
    pub fn autostarting(&self) -> Option<Autostarting> {
        let [list, mark] = ["autostarting", "autostarted"].map(|name| self.paths.runtime.join(name));
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
        if fs::read_to_string(&mark).is_ok_and(|of| of.trim() == boot) {
            return None;
        }
        let text = fs::read_to_string(&list).unwrap_or_default();
        let mut lines = text.lines();
        let of_this_boot = lines.next() == Some(boot.as_str());
        let had = lines.filter(|_| of_this_boot).filter_map(|line| line.parse().ok()).collect();
        Some(Autostarting { list, mark, boot, had: Mutex::new(had) })
    }
}

impl Autostarting {
    /// Whether an object has had its turn.
    pub fn has_had(&self, uuid: Uuid) -> bool {
        lock(&self.had).contains(&uuid)
    }

    /// An object has had its turn, whatever came of it. Blocks.
    pub fn note(&self, uuid: Uuid) -> Result<()> {
        let mut had = lock(&self.had);
        had.insert(uuid);
        let lines: String = had.iter().map(|uuid| format!("{uuid}\n")).collect();
        replace(&self.list, format!("{}\n{lines}", self.boot).as_bytes())
    }

    /// All have had theirs. Blocks.
    pub fn finish(&self) -> Result<()> {
        replace(&self.mark, self.boot.as_bytes())?;
        remove(&self.list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Paths;

    #[test]
    fn a_turn_is_had_once_a_boot() {
        let folder = tempfile::tempdir().expect("a folder");
        let [state, runtime, log] = ["state", "run", "log"].map(|name| folder.path().join(name));
        let open = || {
            Store::open(Paths { state: state.clone(), runtime: runtime.clone(), log: log.clone() }).expect("a store")
        };
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        open().autostarting().expect("nothing is started yet").note(one).expect("noted");
        let begun = open().autostarting().expect("not all is started");
        assert!(begun.has_had(one) && !begun.has_had(two));
        // What an earlier boot began is begun anew.
        let list = runtime.join("autostarting");
        let text = fs::read_to_string(&list).expect("a list");
        fs::write(&list, text.replacen(text.lines().next().expect("a boot"), "another", 1)).expect("written");
        assert!(!open().autostarting().expect("another boot").has_had(one));
        begun.note(two).and_then(|()| begun.finish()).expect("noted");
        assert!(open().autostarting().is_none());
        assert!(fs::read_to_string(&list).is_err(), "the list is gone");
    }
}
