//! Files that are removed for good: judged once, and removed only while they are what was judged. Everything here blocks.

use super::lock::is_open;
use super::resolve::Place;
use rustix::fs::FileType;
use std::io;
use std::path::Path;
use virt_model::driver::{DriverError, Removable, StoredFile};

/// What is at `path`, if it can be removed: a plain file that nobody has open. `wary` as in [`Place::resolve`].
pub fn judge(path: &Path, wary: bool) -> Removable {
    Ok(find(path, wary)?.map(|(_, file)| file))
}

/// The same of a file that its machine has open.
pub fn judge_open(path: &Path, wary: bool) -> Removable {
    Ok(see(path, wary)?.map(|(_, file)| file))
}

/// As [`judge`], with the place where it was judged.
fn find(path: &Path, wary: bool) -> Result<Option<(Place, StoredFile)>, String> {
    let Some(found) = see(path, wary)? else { return Ok(None) };
    let shown = path.display();
    if is_open(path).map_err(|e| format!("{shown}: {e}"))? {
        return Err(format!("somebody has {shown} open (fuser tells who)"));
    }
    Ok(Some(found))
}

/// A plain file, whoever has it open.
fn see(path: &Path, wary: bool) -> Result<Option<(Place, StoredFile)>, String> {
    let shown = path.display();
    let found = Place::resolve(path, wary).and_then(|place| place.stat().map(|stat| (place, stat)));
    let (place, stat) = match found {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        found => found.map_err(|e| format!("{shown}: {e}"))?,
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Symlink => return Err(format!("{shown} is a link: name the file that it leads to")),
        _ => return Err(format!("{shown} is no plain file: remove it by hand")),
    }
    let (identity, bytes) = ((stat.st_dev, stat.st_ino), stat.st_size.unsigned_abs());
    Ok(Some((place, StoredFile { path: path.to_owned(), identity, bytes })))
}

/// Removes it, if it is there and still that file. Errors: it cannot be, or somebody has opened it.
pub fn remove(file: &StoredFile, wary: bool) -> Result<(), DriverError> {
    remove_found(find(&file.path, wary), file)
}

/// The same, whoever still has it open: they are not harmed.
pub fn remove_open(file: &StoredFile, wary: bool) -> Result<(), DriverError> {
    remove_found(see(&file.path, wary), file)
}

fn remove_found(found: Result<Option<(Place, StoredFile)>, String>, file: &StoredFile) -> Result<(), DriverError> {
    let shown = file.path.display();
    match found.map_err(DriverError::Storage)? {
        Some((place, found)) if found.identity == file.identity => {
            place.remove_file_if_there().map_err(|e| DriverError::Storage(format!("{shown}: {e}")))
        }
        Some(_) => {
            tracing::warn!("{shown} is another file by now, and is not removed");
            Ok(())
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_was_judged_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("a"), "image").unwrap();
        let judged = judge(&at("a"), false).unwrap().unwrap();
        assert_eq!((&judged.path, judged.bytes), (&at("a"), 5));
        // Another file has its name by now.
        std::fs::write(at("b"), "another").unwrap();
        std::fs::rename(at("b"), at("a")).unwrap();
        remove(&judged, false).unwrap();
        assert_eq!(std::fs::read_to_string(at("a")).unwrap(), "another");
        let judged = judge(&at("a"), false).unwrap().unwrap();
        remove(&judged, false).unwrap();
        assert!(!at("a").exists());
        remove(&judged, false).unwrap();
        assert_eq!(judge(&at("a"), false), Ok(None));
    }

    #[test]
    fn a_link_a_folder_and_a_pipe_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "").unwrap();
        symlink(at("file"), at("link")).unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(judge(&at("link"), false).unwrap_err().contains("is a link"));
        for odd in ["folder", "pipe"] {
            assert!(judge(&at(odd), false).unwrap_err().contains("is no plain file"), "{odd}");
        }
    }
}
