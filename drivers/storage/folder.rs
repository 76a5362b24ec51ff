//! The folder of a pool, held, and the files beneath it: a name leads to what is in the folder itself, or to nothing.

use crate::host::acl::through;
use crate::host::apart::apart;
use crate::host::resolve::Found;
use crate::host::workers::ClosedAside;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, StatxFlags};
use rustix::fs::{NFS_SUPER_MAGIC, fstat, fstatfs, fstatvfs, openat, openat2, statat, statx, unlinkat};
use rustix::io::Errno;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use uuid::Uuid;
use virt_model::driver::storage::{FileId, Room};
use virt_model::storage::{UNFINISHED, check_volume_name, is_left_by_nfs};
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
        if check_volume_name(name).is_err() {
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

    /// Whether another host may be at work on it. `now`: by the clock of who keeps the folder, which may not be ours. What has two names
    /// has its own already, and what it was called meanwhile nobody needs.
    fn may_be_worked_on(&self, name: &CStr, now: i64) -> io::Result<bool> {
        let stat = match statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(true),
            stat => stat?,
        };
        Ok(stat.st_nlink < 2 && now.saturating_sub(stat.st_mtime) < LATE)
    }

    /// What the clock of who keeps the folder says, in seconds: it dates a file that is made for that.
    fn clock(&self) -> io::Result<i64> {
        let name = format!("{UNFINISHED}{}", Uuid::new_v4());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = apart(openat(&self.0, &name, flags, Mode::RUSR | Mode::WUSR)?)?;
        let stat = fstat(&file);
        drop(file);
        unlinkat(&self.0, &name, AtFlags::empty())?;
        Ok(stat?.st_mtime)
    }

    /// Removes what has that name, for good.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.0, name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            removed => Ok(removed.and_then(|()| rustix::fs::fsync(&self.0))?),
        }
    }

    /// Removes what was being made when somebody was killed. `others_too`: another host may be making volumes in it now, so what was
    /// written of late stays. What cannot be removed stays, too, and is not listed. Error: it cannot be told what is there.
    pub fn remove_unfinished(&self, others_too: bool) -> io::Result<()> {
        let mut unfinished = Vec::new();
        for entry in Dir::read_from(&self.0)?.take(MOST) {
            let entry = entry?;
            if entry.file_name().to_bytes().starts_with(UNFINISHED.as_bytes()) {
                unfinished.push(entry.file_name().to_owned());
            }
        }
        if unfinished.is_empty() {
            return Ok(());
        }
        let now = others_too.then(|| self.clock()).transpose();
        for name in unfinished {
            let removed = match &now {
                Ok(Some(now)) => self.may_be_worked_on(&name, *now).map(|stays| !stays),
                Ok(None) => Ok(true),
                Err(e) => Err(io::Error::new(e.kind(), format!("nothing can be made beside it: {e}"))),
            };
            let removed = removed.and_then(|goes| match goes {
                true => Ok(unlinkat(&self.0, &name, AtFlags::empty())?),
                false => Ok(()),
            });
            match removed {
                Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::IsADirectory) => {
                    tracing::warn!("{}: {name:?} was never finished, and cannot be removed: {e}", self.1.display());
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Which file it is. NFS may not say when one was born: its handle is another one then for each file that has had that number.
pub fn id_of(file: &impl AsFd) -> io::Result<FileId> {
    let told = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::INO | StatxFlags::BTIME)?;
    let is_known = told.stx_mask & StatxFlags::BTIME.bits() != 0;
    let seconds = u64::try_from(told.stx_btime.tv_sec).unwrap_or_default();
    let born = seconds.saturating_mul(1_000_000_000) + u64::from(told.stx_btime.tv_nsec);
    let born = match is_known {
        true => born,
        false if fstatfs(file)?.f_type == NFS_SUPER_MAGIC => handle_of(file).unwrap_or_default(),
        false => 0,
    };
    Ok(FileId { number: told.stx_ino, born })
}

/// A number that stands for the handle that a file's server knows it by; `None`: nobody tells it.
fn handle_of(file: &impl AsFd) -> Option<u64> {
    let mut told = Handle { length: MOST_OF_A_HANDLE, kind: 0, bytes: [0; MOST_OF_A_HANDLE as usize] };
    let mut mount = 0;
    // SAFETY: `told` is laid out as the kernel's `file_handle`, and says how many bytes follow it.
    let done = unsafe {
        let fd = file.as_fd().as_raw_fd();
        libc::name_to_handle_at(fd, c"".as_ptr(), (&raw mut told).cast(), &mut mount, libc::AT_EMPTY_PATH)
    };
    let bytes = told.bytes.get(..told.length as usize).filter(|_| done == 0)?;
    Some(number_of(bytes))
}

/// The same number for the same bytes in each version of virtd: it is stored (FNV-1a). Never 0.
fn number_of(bytes: &[u8]) -> u64 {
    let mixed = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, mixed).max(1)
}

/// The most bytes that the kernel gives for one.
const MOST_OF_A_HANDLE: u32 = 128;

/// The kernel's `file_handle`.
#[repr(C)]
struct Handle {
    length: u32,
    kind: i32,
    bytes: [u8; MOST_OF_A_HANDLE as usize],
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
        std::fs::hard_link(at("new"), dir.path().join("volume")).unwrap();
        folder.remove_unfinished(true).unwrap();
        assert_eq!(left(), ["late"]);
        folder.remove_unfinished(false).unwrap();
        assert_eq!(left(), [""; 0]);
        assert_eq!(folder.names().unwrap().0, ["volume"]);
    }

    #[test]
    fn the_clock_of_a_folder_leaves_nothing_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let now = PoolFolder::open(dir.path(), false).unwrap().clock().unwrap();
        let ours = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec;
        assert!((now - ours).abs() < 60, "{now} {ours}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_handle_has_always_the_same_number() {
        let (of_a, of_nothing) = (number_of(b"a"), number_of(b""));
        assert_eq!((of_a, of_nothing), (0xaf63_dc4c_8601_ec8c, 0xcbf2_9ce4_8422_2325));
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| File::create(dir.path().join(name)).unwrap());
        // A file system may have none.
        if let (Some(one_is), Some(other_is)) = (handle_of(&one), handle_of(&other)) {
            assert_ne!(one_is, other_is);
            assert_eq!(handle_of(&one), Some(one_is));
        }
    }
}
