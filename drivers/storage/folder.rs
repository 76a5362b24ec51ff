//! The folder of a pool, held, and the files beneath it: a name leads to what is in the folder itself, or to nothing.

use crate::host::acl::through;
use crate::host::apart::apart;
use crate::host::resolve::Found;
use crate::host::workers::ClosedAside;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, StatxFlags};
use rustix::fs::{fstat, fstatvfs, openat, openat2, statat, statx, unlinkat};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use virt_model::driver::storage::{FileId, Room};
use virt_model::storage::{UNFINISHED, check_volume_name};
use virt_model::xml::is_deceptive;

/// More names than these are not read: a folder of so many is none for volumes.
const MOST: usize = 200_000;

/// So long ago in seconds, a day, nobody who still makes a volume has last written to it.
const LATE: i64 = 24 * 60 * 60;

/// A pool's folder, and where it is without links.
#[derive(Debug)]
pub struct PoolFolder(OwnedFd, PathBuf);

/// A file in it that can be a volume.
#[derive(Debug)]
pub struct Beneath {
    fd: OwnedFd,
    stat: Stat,
    id: FileId,
}

impl PoolFolder {
    /// Finds and holds it. `wary`: a link of somebody's leads only to what is theirs.
    pub fn open(path: &Path, wary: bool) -> io::Result<PoolFolder> {
        let found = Found::resolve(path)?;
        if let Some(chooser) = found.choosers.iter().find(|uid| wary && **uid != found.stat.st_uid) {
            let why = format!("user {chooser} chose this folder of user {}'s by a link", found.stat.st_uid);
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = apart(openat(rustix::fs::CWD, through(&found.fd), flags, Mode::empty())?)?;
        Ok(PoolFolder(fd, found.real))
    }

    /// Where it is, without links, as it was found.
    pub fn real(&self) -> &Path {
        &self.1
    }

    /// Which folder it is: its file system, and its number there.
    pub fn which(&self) -> io::Result<(u64, u64)> {
        let stat = fstat(&self.0)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// Whether the path still leads to it.
    pub fn is_there(&self, path: &Path) -> io::Result<()> {
        match self.is(&Found::resolve(path)?)? {
            true => Ok(()),
            false => Err(io::Error::other("another folder has its name by now: stop the pool, and start it again")),
        }
    }

    /// The same where that is no error. Error: that cannot be told.
    pub fn has_path(&self, path: &Path) -> io::Result<bool> {
        match Found::resolve(path) {
            Ok(found) => self.is(&found),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn is(&self, found: &Found) -> io::Result<bool> {
        let ours = fstat(&self.0)?;
        Ok((ours.st_dev, ours.st_ino) == (found.stat.st_dev, found.stat.st_ino))
    }

    /// The names in it that a volume could have, and how many nobody could write.
    pub fn names(&self) -> io::Result<(Vec<String>, u32)> {
        let (mut names, mut unnameable) = (Vec::new(), 0);
        for entry in Dir::read_from(&self.0)?.take(MOST) {
            let entry = entry?;
            if !matches!(entry.file_type(), FileType::RegularFile | FileType::Unknown) {
                continue;
            }
            match entry.file_name().to_str() {
                Ok(name) if name.starts_with(UNFINISHED) || is_left_by_nfs(name) => {}
                Ok(name) if check_volume_name(name).is_ok() && !name.chars().any(is_deceptive) => {
                    names.push(name.to_owned())
                }
                _ => unnameable += 1,
            }
        }
        Ok((names, unnameable))
    }

    /// The file of that name, if there is one that can be a volume: a plain file in the folder itself. It is not opened.
    pub fn beneath(&self, name: &str) -> io::Result<Option<Beneath>> {
        if check_volume_name(name).is_err() || is_left_by_nfs(name) {
            return Ok(None);
        }
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match openat2(&self.0, name, flags, Mode::empty(), resolve) {
            Err(Errno::NOENT | Errno::LOOP | Errno::XDEV) => return Ok(None),
            fd => apart(fd?)?,
        };
        let stat = fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Ok(None);
        }
        let id = id_of(&fd)?;
        Ok(Some(Beneath { fd, stat, id }))
    }

    /// Whether anything has that name.
    pub fn has(&self, name: &str) -> io::Result<bool> {
        match statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(false),
            stat => Ok(stat.map(|_| true)?),
        }
    }

    /// How much room there is.
    pub fn room(&self) -> io::Result<Room> {
        let room = fstatvfs(&self.0)?;
        let bytes = |blocks: u64| blocks.saturating_mul(room.f_frsize);
        let (capacity, free) = (bytes(room.f_blocks), bytes(room.f_bfree));
        Ok(Room { capacity, allocation: capacity.saturating_sub(free), available: bytes(room.f_bavail) })
    }

    /// Whether somebody may be at work on it, by its server's clock or ours.
    fn was_written_of_late(&self, name: &std::ffi::CStr) -> io::Result<bool> {
        let stat = match statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(true),
            stat => stat?,
        };
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec;
        Ok(now.saturating_sub(stat.st_mtime) < LATE)
    }

    /// Removes what has that name, for good.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.0, name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            removed => Ok(removed.and_then(|()| rustix::fs::fsync(&self.0))?),
        }
    }

    /// Removes what was being made when somebody was killed. `others_too`: another host may be making volumes in it now, so what was
    /// written of late stays.
    pub fn remove_unfinished(&self, others_too: bool) -> io::Result<()> {
        for entry in Dir::read_from(&self.0)?.take(MOST) {
            let entry = entry?;
            if entry.file_name().to_bytes().starts_with(UNFINISHED.as_bytes()) {
                if others_too && self.was_written_of_late(entry.file_name())? {
                    continue;
                }
                match unlinkat(&self.0, entry.file_name(), AtFlags::empty()) {
                    Err(Errno::NOENT | Errno::ISDIR) => {}
                    removed => removed?,
                }
            }
        }
        Ok(())
    }
}

/// Whether NFS has called a file so that was removed while it is open: it goes when it is closed.
fn is_left_by_nfs(name: &str) -> bool {
    let number = name.strip_prefix(".nfs");
    number.is_some_and(|number| number.len() == 24 && number.bytes().all(|digit| digit.is_ascii_hexdigit()))
}

/// Which file it is.
pub fn id_of(file: &impl AsFd) -> io::Result<FileId> {
    let told = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::INO | StatxFlags::BTIME)?;
    let is_known = told.stx_mask & StatxFlags::BTIME.bits() != 0;
    let seconds = u64::try_from(told.stx_btime.tv_sec).unwrap_or_default();
    let born = seconds.saturating_mul(1_000_000_000) + u64::from(told.stx_btime.tv_nsec);
    Ok(FileId { number: told.stx_ino, born: if is_known { born } else { 0 } })
}

impl AsFd for PoolFolder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Beneath {
    /// What the kernel says of it.
    pub fn stat(&self) -> &Stat {
        &self.stat
    }

    /// Which file it is.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Its length in bytes.
    pub fn length(&self) -> u64 {
        self.stat.st_size.unsigned_abs()
    }

    /// Its owner, group and mode.
    pub fn permissions(&self) -> (u32, u32, u32) {
        (self.stat.st_uid, self.stat.st_gid, self.stat.st_mode & 0o7777)
    }

    /// Opens it to be read.
    pub fn to_read(&self) -> io::Result<ClosedAside> {
        self.open(OFlags::RDONLY)
    }

    /// Opens it to be read and written.
    pub fn to_write(&self) -> io::Result<ClosedAside> {
        self.open(OFlags::RDWR)
    }

    /// The same, for somebody else to close.
    pub fn to_hold(&self) -> io::Result<OwnedFd> {
        self.open_as(OFlags::RDONLY)
    }

    fn open(&self, way: OFlags) -> io::Result<ClosedAside> {
        Ok(ClosedAside::of(File::from(self.open_as(way)?)))
    }

    fn open_as(&self, way: OFlags) -> io::Result<OwnedFd> {
        let flags = way | OFlags::NONBLOCK | OFlags::CLOEXEC;
        apart(openat(rustix::fs::CWD, through(&self.fd), flags, Mode::empty())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nfs_keeps_of_a_removed_file_is_no_volume() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".nfs0123456789abcdef01234567", ".nfs0123", "a.img"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let folder = PoolFolder::open(dir.path(), false).unwrap();
        let mut names = folder.names().unwrap().0;
        names.sort();
        assert_eq!(names, [".nfs0123", "a.img"]);
        assert!(folder.beneath(".nfs0123456789abcdef01234567").unwrap().is_none());
        assert!(folder.beneath(".nfs0123").unwrap().is_some());
    }

    #[test]
    fn what_another_host_may_be_making_stays_for_a_day() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(format!("{UNFINISHED}{name}"));
        let make = || {
            for (name, hours) in [("new", 0), ("late", 23), ("old", 25)] {
                let file = File::create(at(name)).unwrap();
                file.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(hours * 3600)).unwrap();
            }
        };
        let left = || ["new", "late", "old"].into_iter().filter(|name| at(name).exists()).collect::<Vec<_>>();
        let folder = PoolFolder::open(dir.path(), false).unwrap();
        make();
        folder.remove_unfinished(true).unwrap();
        assert_eq!(left(), ["new", "late"]);
        folder.remove_unfinished(false).unwrap();
        assert_eq!(left(), [""; 0]);
    }
}
