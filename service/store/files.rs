//! Files of our own: read as far as they may be, and replaced in one step, those of one folder together.

use crate::error::{Error, Result};
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use serde::{Serialize, de::DeserializeOwned};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// The largest file of our own that is read, in bytes.
const MAX_FILE: u64 = 64 << 20;

/// A plain file's content, as far as one of our own is read.
pub(super) fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
    let file = fs::File::options().read(true).custom_flags(flags.bits()).open(path)?;
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(io::Error::other("it is no plain file"));
    }
    let mut content = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_FILE {
        return Err(io::Error::other(format!("it has more than {MAX_FILE} bytes")));
    }
    Ok(content)
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = read_bytes(path).map_err(|e| Error::from_io("read", path, &e))?;
    serde_json::from_slice(&text).map_err(|e| Error::StorageFailed(format!("cannot read {}: {e}", path.display())))
}

pub(super) fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(|e| Error::Internal(e.to_string()))
}

pub(super) fn replace_json(path: &Path, value: &impl Serialize) -> Result<()> {
    replace(path, &json(value)?)
}

/// How the name of a file begins that has not replaced its predecessor yet.
const UNFINISHED: &str = ".new-";

/// Removes what a write left that was cut off.
pub(super) fn remove_unfinished(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Replaces a file in one step, mode 0600.
pub(super) fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let (folder, name) = (path.parent(), path.file_name().and_then(|name| name.to_str()));
    let (folder, name) = (folder.unwrap_or(Path::new("/")), name.unwrap_or_default());
    change_all(folder, &[(name, content)], &[])
}

/// A file of our own that whoever looks finds already, and that the host may lose with its power still.
#[derive(Debug)]
pub(crate) struct Unsynced {
    path: PathBuf,
    file: fs::File,
}

impl Unsynced {
    /// Blocks until the disk has it.
    pub fn sync(self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::from_io("write", &self.path, &e))?;
        sync_folder(self.path.parent().unwrap_or(Path::new("/")))
    }
}

/// Replaces a file in one step, mode 0600, for whoever looks from now on.
pub(super) fn replace_at_once(path: &Path, content: &[u8]) -> Result<Unsynced> {
    let write = || {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(folder)?;
        file.write_all(content)?;
        file.persist(path).map_err(|e| e.error)
    };
    let file = write().map_err(|e| Error::from_io("write", path, &e))?;
    Ok(Unsynced { path: path.to_owned(), file })
}

/// Replaces files of one folder, each in one step and in this order, mode 0600, and then removes those of `gone`, in this
/// order. When this returns, all of that is on disk: what is written together costs little more than one of it. One that is
/// there already as it is to be is left alone.
pub(super) fn change_all(folder: &Path, files: &[(&str, &[u8])], gone: &[&str]) -> Result<()> {
    let differs =
        |(name, content): &&(&str, &[u8])| !read_bytes(&folder.join(name)).is_ok_and(|there| there == *content);
    let changed: Vec<(&str, &[u8])> = files.iter().filter(differs).copied().collect();
    Draft::write(folder, &changed)?.put(gone)
}

/// Files of one folder that are on disk and not in their places yet. Dropped before that, they are gone.
#[derive(Debug)]
pub(super) struct Draft {
    folder: PathBuf,
    files: Vec<(String, tempfile::NamedTempFile)>,
}

impl Draft {
    /// Writes them, mode 0600. Blocks until the disk has them.
    pub fn write(folder: &Path, files: &[(&str, &[u8])]) -> Result<Draft> {
        let failed = |name: &str, e: io::Error| Error::from_io("write", &folder.join(name), &e);
        let mut written = Vec::new();
        for (name, content) in files {
            let write = || {
                let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(folder)?;
                file.write_all(content)?;
                Ok(file)
            };
            written.push(((*name).to_owned(), write().map_err(|e| failed(name, e))?));
        }
        if written.len() > 1 {
            // The disk begins with all of them before it is waited for the first: one step of its journal then holds them all.
            written.iter().for_each(|(_, file)| begin_to_write(file.as_file()));
        }
        for (name, file) in &written {
            file.as_file().sync_data().map_err(|e| failed(name, e))?;
        }
        Ok(Draft { folder: folder.to_owned(), files: written })
    }

    /// Puts them in their places, in their order, and removes those of `gone`. Blocks until that is on disk.
    pub fn put(self, gone: &[&str]) -> Result<()> {
        for (name, file) in self.files {
            let place = self.folder.join(name);
            file.persist(&place).map_err(|e| Error::from_io("write", &place, &e.error))?;
        }
        for name in gone {
            unlink(&self.folder.join(name))?;
        }
        sync_folder(&self.folder)
    }
}

/// Has the kernel begin to write a file to disk. That it does is only quicker, and waited for afterwards.
fn begin_to_write(file: &fs::File) {
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    let synced = fs::File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|e| Error::from_io("sync the folder", folder, &e))
}

/// Removes a file; one that is not there is fine.
pub(super) fn remove(path: &Path) -> Result<()> {
    if unlink(path)? { sync_folder(path.parent().unwrap_or(Path::new("/"))) } else { Ok(()) }
}

/// The same, on disk only with the next change of its folder. Whether it was there.
pub(super) fn unlink(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        removed => removed.map(|()| true).map_err(|e| Error::from_io("remove", path, &e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn what_is_replaced_at_once_is_found_before_it_is_synced() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        for content in [b"1", b"2"] {
            let unsynced = replace_at_once(&path, content).expect("written");
            assert_eq!(fs::read(&path).expect("it is there"), content);
            unsynced.sync().expect("on disk");
        }
        let about = fs::metadata(&path).expect("it is there");
        assert_eq!((about.mode() & 0o777, fs::read_dir(folder.path()).expect("a folder").count()), (0o600, 1));
    }

    #[test]
    fn what_is_there_as_it_is_to_be_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let inode = |name: &str| fs::metadata(at(name)).expect("it is there").ino();
        change_all(folder.path(), &[("a", b"1"), ("b", b"1"), ("c", b"1")], &[]).expect("written");
        let before = (inode("a"), inode("b"));
        change_all(folder.path(), &[("a", b"1"), ("b", b"2")], &["c"]).expect("written");
        assert_eq!(inode("a"), before.0);
        assert_ne!(inode("b"), before.1);
        assert_eq!(fs::read(at("b")).expect("it is there"), b"2");
        assert!(!at("c").exists());
        change_all(folder.path(), &[], &["c"]).expect("what is not there need not go");
    }

    #[test]
    fn what_fails_takes_nothing_away() {
        let folder = tempfile::tempdir().expect("a folder");
        change_all(folder.path(), &[("a", b"1")], &[]).expect("written");
        let long = "x".repeat(300);
        assert!(change_all(folder.path(), &[(&long, b"2")], &["a"]).is_err());
        assert!(folder.path().join("a").exists(), "it goes last");
        let entries = fs::read_dir(folder.path()).expect("a folder").count();
        assert_eq!(entries, 1, "and nothing unfinished is left");
    }
}
