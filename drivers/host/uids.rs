//! A user id of its own for each machine, the same one for the machine's life.
//!
//! ```text
//!   /etc/subuid, virtd.toml ─▶ a range ─▶ uids.json on disk ─▶ the guest's processes
//! ```
//!
//! A number is on disk before anything belongs to it. It is free again when nothing of its machine is left, and the one
//! that was free for the longest time is given next.

use super::own_file::replace_json;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use uuid::Uuid;

/// Where ranges are reserved, a line each: name, first, how many.
const RESERVED: &str = "/etc/subuid";
/// What is taken where nothing is reserved: beyond what `useradd`, systemd and containers give out.
pub const USUAL: Range<u32> = 1_879_048_192..1_879_113_728;

/// Who has which number. All methods block.
pub struct Uids {
    file: PathBuf,
    range: Range<u32>,
    books: Mutex<Books>,
}

/// What is on disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Books {
    /// From here on one is looked for.
    next: u32,
    machines: BTreeMap<Uuid, u32>,
}

impl Uids {
    /// Opens `uids.json` in `dir`. A file that cannot be read is an error: two machines could get the same number.
    pub fn open(dir: &Path, range: Range<u32>) -> io::Result<Uids> {
        std::fs::create_dir_all(dir)?;
        let file = dir.join("uids.json");
        let books = match std::fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|e| io::Error::other(format!("{}: {e}; bring back a copy of it", file.display())))?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Books::default(),
            Err(e) => return Err(e),
        };
        Ok(Uids { file, range, books: Mutex::new(books) })
    }

    /// The number of that machine, on disk when this returns.
    pub fn of(&self, machine: Uuid) -> io::Result<u32> {
        let mut books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(uid) = books.machines.get(&machine).filter(|uid| self.range.contains(uid)) {
            return Ok(*uid);
        }
        let taken: BTreeSet<u32> = books.machines.values().copied().collect();
        let start = books.next.clamp(self.range.start, self.range.end);
        let free = (start..self.range.end).chain(self.range.start..start).find(|uid| !taken.contains(uid));
        let uid = free.ok_or_else(|| {
            let (first, count) = (self.range.start, self.range.len());
            io::Error::other(format!(
                "all {count} user ids from {first} on are taken: undefine machines, or reserve more in {RESERVED}"
            ))
        })?;
        let mut changed = books.clone();
        changed.next = uid + 1;
        changed.machines.insert(machine, uid);
        self.save(&changed)?;
        *books = changed;
        Ok(uid)
    }

    /// Nothing of that machine is left.
    pub fn free(&self, machine: Uuid) -> io::Result<()> {
        let mut books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = books.clone();
        if changed.machines.remove(&machine).is_some() {
            self.save(&changed)?;
            *books = changed;
        }
        Ok(())
    }

    /// Whether a machine could have that number.
    pub fn is_one(&self, uid: u32) -> bool {
        self.range.contains(&uid)
    }

    fn save(&self, books: &Books) -> io::Result<()> {
        replace_json(&self.file, books, true)
    }
}

/// The range reserved for `user` on this host; the usual one where none is. Errors name the line that is in the way.
pub fn range_of(user: &str) -> io::Result<Range<u32>> {
    match std::fs::read_to_string(RESERVED) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => range_in("", user),
        Err(e) => Err(io::Error::new(e.kind(), format!("{RESERVED}: {e}"))),
        Ok(text) => range_in(&text, user),
    }
}

fn range_in(text: &str, user: &str) -> io::Result<Range<u32>> {
    let entries: Vec<(&str, Range<u32>)> = text.lines().filter_map(entry).collect();
    let own = entries.iter().filter(|(name, _)| *name == user).map(|(_, range)| range.clone());
    let range = own.max_by_key(ExactSizeIterator::len).unwrap_or(USUAL);
    let overlap = |other: &Range<u32>| other.start < range.end && range.start < other.end;
    match entries.iter().find(|(name, other)| *name != user && overlap(other)) {
        None => Ok(range),
        Some((name, _)) => Err(io::Error::other(format!(
            "user ids from {} on are for guests, and {RESERVED} gives some of them to '{name}': reserve others for \
             '{user}' there (usermod --add-subuids)",
            range.start
        ))),
    }
}

fn entry(line: &str) -> Option<(&str, Range<u32>)> {
    let mut words = line.trim().splitn(3, ':');
    let (name, first, count) = (words.next()?, words.next()?.parse::<u32>().ok()?, words.next()?.parse::<u32>().ok()?);
    Some((name, first..first.saturating_add(count)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_keeps_its_number_and_nobody_else_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Uids::open(dir.path(), 100..103).unwrap();
        let machines: Vec<Uuid> = (0..4).map(|_| Uuid::new_v4()).collect();
        let given: Vec<u32> = machines[..3].iter().map(|machine| open().of(*machine).unwrap()).collect();
        assert_eq!(given, [100, 101, 102]);
        assert_eq!(open().of(machines[1]).unwrap(), 101, "after a restart");
        assert!(open().of(machines[3]).unwrap_err().to_string().contains("undefine machines"));
        open().free(machines[1]).unwrap();
        open().free(machines[1]).unwrap();
        assert_eq!(open().of(machines[3]).unwrap(), 101);
    }

    #[test]
    fn a_free_number_is_not_given_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let uids = Uids::open(dir.path(), 100..200).unwrap();
        let (one, other) = (Uuid::new_v4(), Uuid::new_v4());
        assert_eq!(uids.of(one).unwrap(), 100);
        uids.free(one).unwrap();
        assert_eq!(uids.of(other).unwrap(), 101, "what is left of the other's files is not its own");
    }

    #[test]
    fn books_that_cannot_be_read_are_not_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("uids.json"), "{").unwrap();
        assert!(Uids::open(dir.path(), USUAL).err().unwrap().to_string().contains("uids.json"));
    }

    #[test]
    fn ranges_are_read_as_they_are_reserved() {
        assert_eq!(range_in("", "virt-qemu").unwrap(), USUAL);
        let text = "a:100000:65536\n# no line\nvirt-qemu:200000:10\nvirt-qemu:300000:65536\n";
        assert_eq!(range_in(text, "virt-qemu").unwrap(), 300_000..365_536);
        let taken = format!("b:{}:1\n", USUAL.start + 5);
        let error = range_in(&taken, "virt-qemu").unwrap_err().to_string();
        assert!(error.contains("'b'") && error.contains("--add-subuids"), "{error}");
    }
}
