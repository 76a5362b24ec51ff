//! Files that snapshots are made of: where they may be, whether there is room, and how they come to be.

use super::super::make;
use super::note::record_of;
use super::note::{Part, Record};
use super::survey::Survey;
use super::{Operation, cannot};
use crate::host::files::{Seen, What, open_plain};
use crate::host::resolve::Place;
use crate::host::storage;
use rustix::fs::FileType;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;
use virt_model::driver::snapshots::{ExistingSnapshot, MemoryMode};
use virt_model::driver::{DriverError, StoredFile};

/// About what an overlay takes in which nothing has been written, in bytes.
pub const OVERLAY: u64 = 200 << 10;
/// What must be free beside what is counted, in bytes.
pub const RESERVE: u64 = 16 << 20;

/// How a file of QEMU's memory begins.
const MAGIC: &[u8; 4] = b"QEVM";

/// Records may have been restored by anybody, from a document that says what it likes. What they tell of files is held to
/// what we would have made ourselves before root reads, replaces or removes one of them.
impl Operation {
    /// Where a part of the machine is copied to.
    pub(super) fn copy_place(&self, name: &str, part: &str) -> PathBuf {
        self.machine.folder.join(format!("{name}.{part}"))
    }

    /// What was kept with a snapshot, without copies that are not ours.
    pub(super) fn own_record_of(&self, snapshot: &ExistingSnapshot) -> Record {
        let mut record = record_of(snapshot);
        for (part, kept) in [("nvram", &mut record.nvram), ("tpm", &mut record.tpm)] {
            kept.take_if(|kept| !self.is_own(&snapshot.name, part, kept));
        }
        record
    }

    fn is_own(&self, name: &str, part: &str, kept: &Part) -> bool {
        !matches!(kept, Part::File(file) if *file != self.copy_place(name, part))
    }

    /// Whether what was copied is there, and whether it can be put back.
    pub(super) fn check_copies(&self, snapshot: &ExistingSnapshot, survey: &Survey) -> Result<(), DriverError> {
        let record = record_of(snapshot);
        for (part, kept) in [("nvram", &record.nvram), ("tpm", &record.tpm)] {
            let Some(kept @ Part::File(file)) = kept else { continue };
            let shown = file.display();
            if !self.is_own(&snapshot.name, part, kept) {
                let place = self.copy_place(&snapshot.name, part);
                return Err(DriverError::Storage(format!(
                    "{shown} is not where copies are kept; bring it to {}, and restore the snapshot's record with that",
                    place.display()
                )));
            }
            if !survey.is_there(file) {
                return Err(DriverError::Storage(format!("{shown}: what was copied is not there any more")));
            }
        }
        for (_, original) in self.copied_parts(snapshot, &record) {
            if !self.may_replace(&original, survey) {
                let original = original.display();
                return Err(DriverError::Refused(format!(
                    "{original} is in the way of what was copied, and is neither this machine's nor of QEMU's user; \
                     move it away"
                )));
            }
        }
        Ok(())
    }

    /// What is looked at for that.
    pub(super) fn copies_and_originals(&self, snapshot: &ExistingSnapshot) -> Vec<PathBuf> {
        let record = record_of(snapshot);
        let originals = self.copied_parts(snapshot, &record).into_iter().map(|(_, original)| original);
        originals.chain(["nvram", "tpm"].map(|part| self.copy_place(&snapshot.name, part))).collect()
    }

    /// Nothing is there, or something of this machine's, or of QEMU's user.
    fn may_replace(&self, original: &Path, survey: &Survey) -> bool {
        let Some(user) = self.images.lender.user() else { return true };
        let there = survey.at(original);
        !there.named
            || there.is_there() && [user.uid, user.common].contains(&there.owner)
            || self.own_parts().iter().any(|own| own == original)
    }

    /// What goes with a snapshot beside its disks, as far as it is there: its memory, as it was judged, and its copies.
    pub(super) async fn leavings(
        &self,
        snapshot: &ExistingSnapshot,
    ) -> Result<(Option<StoredFile>, Vec<PathBuf>), DriverError> {
        let record = self.own_record_of(snapshot);
        let memory = match &snapshot.memory {
            MemoryMode::External(file) => Some(file.clone()),
            _ => None,
        };
        let copies: Vec<PathBuf> =
            [record.nvram, record.tpm].into_iter().flatten().filter_map(Part::into_file).collect();
        let Some(what) = memory.iter().chain(&copies).next().cloned() else { return Ok((None, Vec::new())) };
        self.with_images(&what, move |images| {
            let memory = memory.and_then(|file| judge_memory(&file, images.lender.is_wary()));
            let copies = copies.into_iter().filter(|file| Seen::at(file).is_there());
            Ok((memory, copies.collect()))
        })
        .await
    }

    /// Holds a file to be one that memory was written to, all of it where it is known how much that was.
    pub(super) async fn check_memory(&self, file: &Path, bytes: Option<u64>) -> Result<(), DriverError> {
        let path = file.to_owned();
        let opened = self.with_images(file, move |images| open_memory(&path, bytes, images.lender.is_wary()));
        opened.await.map(drop)
    }

    /// Those of the files that are plain ones, as they are now.
    pub(super) async fn judged(&self, files: Vec<PathBuf>) -> Result<Vec<StoredFile>, DriverError> {
        let Some(what) = files.first().cloned() else { return Ok(Vec::new()) };
        self.with_images(&what, move |images| {
            let wary = images.lender.is_wary();
            Ok(files.iter().filter_map(|file| storage::judge_open(file, wary).ok().flatten()).collect())
        })
        .await
    }

    /// Removes files that are of no use to anybody; says so where that fails. A folder only where our copies are.
    pub(super) async fn remove_files(&self, files: Vec<PathBuf>) {
        self.remove_judged(Vec::new(), files).await;
    }

    /// The same, and before that files of which none goes that is another than the one that was judged.
    pub(super) async fn remove_judged(&self, judged: Vec<StoredFile>, files: Vec<PathBuf>) {
        let folder = self.machine.folder.clone();
        let Some(what) = judged.iter().map(|file| &file.path).chain(&files).next().cloned() else { return };
        let removed = self.with_images(&what, move |images| {
            let wary = images.lender.is_wary();
            let judged = judged.iter().map(|file| storage::remove_open(file, wary));
            let files = files.iter().map(|file| match file.parent() == Some(&folder) {
                true => make::remove(file, wary),
                false => make::remove_file(file, wary),
            });
            for error in judged.chain(files).filter_map(Result::err) {
                tracing::warn!(%error, "a file of no use is still there");
            }
            Ok(())
        });
        if let Err(error) = removed.await {
            tracing::warn!(%error, "files of no use are still there");
        }
    }
}

/// The file, if memory was written to it: it is that very one that may be removed.
fn judge_memory(file: &Path, wary: bool) -> Option<StoredFile> {
    let stat = rustix::fs::fstat(open_memory(file, None, wary).ok()?).ok()?;
    let (identity, bytes) = ((stat.st_dev, stat.st_ino), stat.st_size.unsigned_abs());
    Some(StoredFile { path: file.to_owned(), identity, bytes })
}

/// Opens a file that memory was written to, to be read from its beginning; any other is refused at once, as is one that is
/// not all there where it is known how many `bytes` that is. Blocks no longer than its file system does.
pub fn open_memory(file: &Path, bytes: Option<u64>, wary: bool) -> Result<File, DriverError> {
    let read = || -> io::Result<([u8; 4], u64, File)> {
        let mut magic = [0; 4];
        let opened = open_plain(file, wary)?;
        let (length, opened) = (opened.length(), opened.into_file());
        opened.read_exact_at(&mut magic, 0)?;
        Ok((magic, length, opened))
    };
    let (magic, length, opened) = read().map_err(|e| stored(file, &e))?;
    let shown = file.display();
    match bytes {
        _ if magic != *MAGIC => Err(DriverError::Storage(format!("{shown} holds no memory"))),
        Some(bytes) if bytes != length => Err(DriverError::Storage(format!(
            "{shown} has {length} bytes, and {bytes} were written; bring back the whole file"
        ))),
        _ => Ok(opened),
    }
}

/// A file that is to be made: nothing is there, or nothing in it, and its folder is.
pub fn check_free_place(path: &Path, there: &Seen, what: &str) -> Result<(), DriverError> {
    match there.what {
        What::Plain if there.length == 0 => Ok(()),
        What::Nothing if there.has_folder => Ok(()),
        What::Nothing => Err(cannot(format!("{what}: {} is in a folder that is not there", path.display()))),
        _ => Err(cannot(format!("{what}: {} is there already; choose another file", path.display()))),
    }
}

/// Refuses what would not fit.
pub fn check_space(path: &Path, there: &Seen, bytes: u64) -> Result<(), DriverError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let Some(free) = there.free.filter(|free| *free < bytes) else { return Ok(()) };
    Err(DriverError::NoSpace(format!(
        "{}: {} MiB are free there, and at least {} MiB are needed",
        folder.display(),
        free >> 20,
        bytes >> 20
    )))
}

/// Where a file is made that becomes `path` when it is complete: a name that nothing has.
pub fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".virtd-{}", Uuid::new_v4()));
    path.with_file_name(name)
}

/// Why a file cannot be made.
pub fn stored(path: &Path, error: &io::Error) -> DriverError {
    DriverError::Storage(format!("{}: {error}", path.display()))
}

/// It is complete: on disk, and under its name. How long it is.
pub fn finished(part: &Path, path: &Path, wary: bool) -> Result<u64, DriverError> {
    let done = || {
        let (from, to) = (Place::resolve(part, wary)?, Place::resolve(path, wary)?);
        let file = from.open_plain()?;
        let length = file.length();
        file.into_file().sync_all()?;
        from.rename_to(&to)?;
        to.sync_folder()?;
        Ok(length)
    };
    done().map_err(|e: io::Error| stored(path, &e))
}

/// An empty file, where nothing is, or an empty file. Its owner is whose the base is.
pub fn make_empty(path: &Path, base: &Path, wary: bool) -> Result<(), DriverError> {
    match make::image_beside(path, base, wary) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && is_empty(path, wary) => Ok(()),
        made => made.map(drop).map_err(|e| stored(path, &e)),
    }
}

fn is_empty(path: &Path, wary: bool) -> bool {
    let there = Place::resolve(path, wary).and_then(|place| place.stat());
    there.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_size == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    #[test]
    fn memory_goes_only_as_it_was_judged() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("memory"), b"QEVM and more").unwrap();
        let judged = judge_memory(&at("memory"), false).unwrap();
        assert_eq!((&judged.path, judged.bytes), (&at("memory"), 13));
        std::fs::rename(at("memory"), at("moved")).unwrap();
        std::fs::write(at("memory"), b"QEVM of another").unwrap();
        storage::remove_open(&judged, false).unwrap();
        assert!(at("memory").exists(), "that is another's");
        std::fs::rename(at("moved"), at("memory")).unwrap();
        storage::remove_open(&judged, false).unwrap();
        assert!(!at("memory").exists());
        std::fs::write(at("memory"), b"something else").unwrap();
        assert_eq!(judge_memory(&at("memory"), false), None);
    }

    /// H3: the file of a snapshot's memory changes places with a pipe, again and again.
    #[test]
    fn a_pipe_in_place_of_memory_keeps_nobody_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (file, memory, pipe) = (at("memory"), at("real"), at("pipe"));
        std::fs::write(&memory, b"QEVM and more").unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, 0o644.into(), 0).unwrap();
        std::fs::hard_link(&memory, &file).unwrap();
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    for one in [&pipe, &memory] {
                        std::fs::hard_link(one, at("next")).unwrap();
                        std::fs::rename(at("next"), &file).unwrap();
                        // Nothing happens where both are the same.
                        let _ = std::fs::remove_file(at("next"));
                    }
                }
            });
            let (tell, told) = std::sync::mpsc::channel();
            let (path, looks) = (file.clone(), 200);
            std::thread::spawn(move || {
                for _ in 0..looks {
                    let _ = tell.send(open_memory(&path, Some(13), false).map(drop).map_err(|e| e.to_string()));
                }
            });
            for _ in 0..looks {
                let opened = told.recv_timeout(Duration::from_secs(60));
                ended.store(opened.is_err(), Ordering::Relaxed);
                if let Err(why) = opened.expect("nobody waits for the pipe's other end") {
                    assert!(why.ends_with("it is no plain file"), "{why}");
                }
            }
            ended.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn memory_is_all_there_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory");
        std::fs::write(&file, b"QEVM and more").unwrap();
        open_memory(&file, None, false).unwrap();
        let short = open_memory(&file, Some(14), false).unwrap_err().to_string();
        assert!(short.contains("13 bytes, and 14 were written"), "{short}");
        std::fs::write(&file, b"text").unwrap();
        assert!(open_memory(&file, None, false).unwrap_err().to_string().ends_with("holds no memory"));
    }
}
