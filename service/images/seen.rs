//! Which files paths lead to, as they were last seen to. A file system that does not answer costs its own paths this
//! knowledge, and nobody else anything.

use crate::lock::lock;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// How long paths may take to tell which files they are.
const LOOK: Duration = Duration::from_secs(2);
/// Threads that may wait at a time for folders that do not answer.
const LOOKS: usize = 64;
/// How many of them look for one who asks.
const THREADS: usize = 4;
/// A folder that was changed less than that ago may have been changed again with the same time.
const SETTLED: Duration = Duration::from_secs(2);
/// So many paths, in so many folders, are remembered to be missing.
const MOST_MISSING: usize = 16_384;
const MOST_FOLDERS: usize = 256;

/// Stands for a file system where a number is that of a block device, which may have several names in several of them.
const DEVICES: u64 = u64::MAX;

/// A file by its file system and its number there.
pub(super) type FileNumber = (u64, u64);

/// See the module.
pub(super) struct Seen {
    files: Mutex<HashMap<PathBuf, FileNumber>>,
    /// Folders in which there was no file for some paths.
    folders: Mutex<HashMap<PathBuf, MissingFiles>>,
    /// Paths at which somebody looks.
    looking: Mutex<HashSet<PathBuf>>,
    /// Folders at whose paths somebody looks.
    looking_in: Mutex<HashSet<PathBuf>>,
    looks: Arc<Semaphore>,
}

/// A folder and what was not there. While the folder stays as it was, it still is not.
struct MissingFiles {
    /// `None`: that cannot be told.
    was: Option<Stamp>,
    missing: HashSet<PathBuf>,
}

/// By which a folder is known not to have been changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stamp {
    Missing,
    Changed(FileNumber, i64, i64),
}

impl Stamp {
    /// What a folder has now; `None` if it cannot be told from what it may have in a moment. Blocks.
    fn of(folder: &Path) -> Option<Stamp> {
        #[allow(clippy::disallowed_methods, reason = "in one of few threads, which may be left behind")]
        let found = std::fs::metadata(folder);
        match found {
            Ok(data) => {
                let changed = UNIX_EPOCH + Duration::from_secs(data.mtime().try_into().ok()?);
                let age = SystemTime::now().duration_since(changed).ok()?;
                let stamp = Stamp::Changed((data.dev(), data.ino()), data.mtime(), data.mtime_nsec());
                (age > SETTLED).then_some(stamp)
            }
            Err(error) => (error.kind() == ErrorKind::NotFound).then_some(Stamp::Missing),
        }
    }
}

impl Default for Seen {
    fn default() -> Seen {
        let (looking, looking_in) = (Mutex::default(), Mutex::default());
        let looks = Arc::new(Semaphore::new(LOOKS));
        Seen { files: Mutex::default(), folders: Mutex::default(), looking, looking_in, looks }
    }
}

impl Seen {
    /// What a path leads to, as far as it is known.
    pub fn number_of(&self, path: &Path) -> Option<FileNumber> {
        lock(&self.files).get(path).copied()
    }

    /// Whether it is known what a path leads to, or that there is nothing.
    pub fn knows(&self, path: &Path) -> bool {
        let is_missing = || {
            let folders = lock(&self.folders);
            folders.get(folder_of(path)).is_some_and(|folder| folder.missing.contains(path))
        };
        self.number_of(path).is_some() || is_missing()
    }

    /// Whether two paths are one file, as far as it is known.
    pub fn same(&self, one: &Path, other: &Path) -> bool {
        let files = lock(&self.files);
        one == other || files.get(one).is_some_and(|one| Some(one) == files.get(other))
    }

    /// Whether two paths are one file, or one name in one folder.
    pub fn same_place(&self, one: &Path, other: &Path) -> bool {
        let folders = || one.parent().zip(other.parent()).is_some_and(|(one, other)| self.same(one, other));
        self.same(one, other) || one.file_name() == other.file_name() && folders()
    }

    /// Where a path led, and what it led to: the file may be gone, and its number another's.
    pub fn forget(&self, path: &Path, was: Option<FileNumber>) {
        let mut files = lock(&self.files);
        let is = files.get(path).copied();
        files.retain(|known, at| known != path && Some(*at) != was && Some(*at) != is);
    }

    /// Looks anew where these paths lead, and those that led nowhere, where they may lead somewhere by now. A folder that does
    /// not answer keeps its own thread, and what is in other folders is looked at all the same.
    pub async fn look(self: &Arc<Self>, paths: &[PathBuf]) {
        // What it is asked for comes first.
        let mut folders: VecDeque<(PathBuf, Vec<PathBuf>)> = by_folder(paths).collect();
        folders.extend(lock(&self.folders).keys().map(|folder| (folder.clone(), Vec::new())));
        let threads = folders.len().min(THREADS);
        let folders = Arc::new(Mutex::new(folders));
        let mut looks = JoinSet::new();
        for _ in 0..threads {
            let Ok(permit) = self.looks.clone().try_acquire_owned() else { break };
            let (seen, folders) = (self.clone(), folders.clone());
            looks.spawn_blocking(move || {
                let _permit = permit;
                loop {
                    let Some((folder, paths)) = lock(&folders).pop_front() else { return };
                    seen.look_in(folder, paths);
                }
            });
        }
        let all = async { while looks.join_next().await.is_some() {} };
        _ = tokio::time::timeout(LOOK, all).await;
        looks.detach_all();
    }

    /// Looks at paths in a folder, and at those that were not there when it was another. Blocks.
    fn look_in(&self, folder: PathBuf, mut paths: Vec<PathBuf>) {
        let whole = alone(&self.looking_in, &folder, || {
            let stamp = Stamp::of(&folder);
            let before = lock(&self.folders).remove(&folder);
            let (same, changed): (Option<MissingFiles>, Option<MissingFiles>) = match before {
                Some(before) if before.was.is_some() && before.was == stamp => (Some(before), None),
                before => (None, before),
            };
            paths.extend(changed.into_iter().flat_map(|changed| changed.missing));
            let (mut missing, mut was) = (same.map(|same| same.missing).unwrap_or_default(), stamp);
            for path in std::mem::take(&mut paths) {
                missing.remove(&path);
                if let Some(is_link) = self.look_at(&path) {
                    missing.insert(path);
                    // What a link leads to may come without a change of the folder.
                    was = was.filter(|_| !is_link);
                }
            }
            self.keep(&folder, MissingFiles { was, missing });
        });
        if whole.is_none() {
            // Somebody else looks at the folder, and may have to wait for another path in it.
            paths.iter().for_each(|path| _ = self.look_at(path));
        }
    }

    /// Keeps what is missing in a folder, of a bounded number of paths.
    fn keep(&self, path: &Path, folder: MissingFiles) {
        let mut folders = lock(&self.folders);
        let all = folders.values().map(|folder| folder.missing.len()).sum::<usize>() + folder.missing.len();
        if folders.len() >= MOST_FOLDERS || all > MOST_MISSING {
            folders.clear();
        } else if !folder.missing.is_empty() {
            folders.insert(path.to_owned(), folder);
        }
    }

    /// Looks where a path leads; one that somebody waits for is left to them, and leads where it did. If there is no file:
    /// whether there is a link. Blocks.
    fn look_at(&self, path: &Path) -> Option<bool> {
        #[allow(clippy::disallowed_methods, reason = "in one of few threads, which may be left behind")]
        alone(&self.looking, path, || {
            let found = std::fs::metadata(path).map(|data| match data.file_type().is_block_device() {
                true => (DEVICES, data.rdev()),
                false => (data.dev(), data.ino()),
            });
            let is_missing = found.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound);
            match found {
                Ok(found) => _ = lock(&self.files).insert(path.to_owned(), found),
                Err(_) => _ = lock(&self.files).remove(path),
            }
            is_missing.then(|| std::fs::symlink_metadata(path).is_ok())
        })?
    }
}

/// Does what may have to wait for a path, unless it is among those for which somebody waits.
fn alone<T>(waiting: &Mutex<HashSet<PathBuf>>, path: &Path, work: impl FnOnce() -> T) -> Option<T> {
    if !lock(waiting).insert(path.to_owned()) {
        return None;
    }
    let done = work();
    lock(waiting).remove(path);
    Some(done)
}

/// The paths of each folder together.
fn by_folder(paths: &[PathBuf]) -> impl Iterator<Item = (PathBuf, Vec<PathBuf>)> {
    let mut folders: BTreeMap<PathBuf, Vec<PathBuf>> = BTreeMap::new();
    for path in paths {
        folders.entry(folder_of(path).to_owned()).or_default().push(path.clone());
    }
    folders.into_iter()
}

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, FileTimes};

    fn changed_at(folder: &Path, time: SystemTime) {
        File::open(folder).unwrap().set_times(FileTimes::new().set_modified(time)).unwrap();
    }

    #[tokio::test]
    async fn what_is_missing_is_found_when_its_folder_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let (file, seen) = (dir.path().join("image"), Arc::<Seen>::default());
        let long_ago = SystemTime::now() - Duration::from_secs(60);
        changed_at(dir.path(), long_ago);
        seen.look(std::slice::from_ref(&file)).await;
        assert!(seen.knows(&file) && seen.number_of(&file).is_none());
        File::create(&file).unwrap();
        // As if nothing had come: it is not looked for.
        changed_at(dir.path(), long_ago);
        seen.look(&[]).await;
        assert!(seen.number_of(&file).is_none());
        changed_at(dir.path(), long_ago + Duration::from_secs(1));
        seen.look(&[]).await;
        assert!(seen.number_of(&file).is_some());
        // Nothing there is missing any more.
        assert!(lock(&seen.folders).is_empty());
    }

    #[tokio::test]
    async fn what_may_come_without_a_trace_is_looked_for_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let [fresh, links, other] = ["fresh", "links", "other"].map(|name| dir.path().join(name));
        [&fresh, &links, &other].into_iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
        let [file, link, late] = [fresh.join("image"), links.join("image"), dir.path().join("late/image")];
        std::os::unix::fs::symlink(other.join("target"), &link).unwrap();
        let now = SystemTime::now();
        changed_at(&fresh, now);
        changed_at(&links, now - Duration::from_secs(60));
        let seen = Arc::<Seen>::default();
        seen.look(&[file.clone(), link.clone(), late.clone()]).await;
        File::create(&file).unwrap();
        changed_at(&fresh, now);
        File::create(other.join("target")).unwrap();
        std::fs::create_dir(dir.path().join("late")).unwrap();
        File::create(&late).unwrap();
        seen.look(&[]).await;
        assert!([file, link, late].iter().all(|path| seen.number_of(path).is_some()));
    }

    #[test]
    fn what_is_remembered_of_what_is_missing_is_bounded() {
        let seen = Seen::default();
        let missing = |folder: &str, many: usize| MissingFiles {
            was: Some(Stamp::Missing),
            missing: (0..many).map(|n| PathBuf::from(format!("{folder}/{n}"))).collect(),
        };
        for n in 0..2 * MOST_FOLDERS {
            let folder = format!("/{n}");
            seen.keep(Path::new(&folder), missing(&folder, 1));
        }
        assert!(lock(&seen.folders).len() <= MOST_FOLDERS);
        seen.keep(Path::new("/many"), missing("/many", MOST_MISSING));
        seen.keep(Path::new("/more"), missing("/more", 1));
        assert!(lock(&seen.folders).values().map(|folder| folder.missing.len()).sum::<usize>() <= MOST_MISSING);
    }
}
