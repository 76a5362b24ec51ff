//! POSIX access control lists, as the kernel keeps them in `system.posix_acl_access`.
//!
//! A file without a list has one all the same: the three entries of its mode. Setting such a list sets the mode.

use rustix::fs::{XattrFlags, fstat, getxattr, setxattr};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

const NAME: &str = "system.posix_acl_access";
const VERSION: u32 = 2;
/// Entries the kernel takes at most in 64 KiB.
const MAX_BYTES: usize = 65536;

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
const NO_ID: u32 = u32::MAX;

/// Read.
pub const READ: u16 = 4;
/// Write.
pub const WRITE: u16 = 2;

/// A list in the kernel's order: by tag, then id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl(Vec<Entry>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    tag: u16,
    id: u32,
    perm: u16,
}

impl Acl {
    /// The list of the file behind `fd`, which may be an `O_PATH` one.
    pub fn of(fd: impl AsFd) -> io::Result<Acl> {
        let mut buffer = vec![0u8; MAX_BYTES];
        match getxattr(through(&fd), NAME, &mut buffer[..]) {
            Ok(length) => Acl::from_bytes(&buffer[..length]),
            Err(rustix::io::Errno::NODATA) => Ok(Acl::from_mode(fstat(&fd)?.st_mode)),
            Err(e) => Err(e.into()),
        }
    }

    /// Makes it the list of the file behind `fd`.
    pub fn set(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(setxattr(through(&fd), NAME, &self.to_bytes(), XattrFlags::empty())?)
    }

    /// The list a mode stands for.
    pub fn from_mode(mode: u32) -> Acl {
        let entry = |tag, shift: u32| Entry { tag, id: NO_ID, perm: (mode >> shift & 7) as u16 };
        Acl(vec![entry(USER_OBJ, 6), entry(GROUP_OBJ, 3), entry(OTHER, 0)])
    }

    /// The kernel's form.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            bytes.extend(entry.tag.to_le_bytes());
            bytes.extend(entry.perm.to_le_bytes());
            bytes.extend(entry.id.to_le_bytes());
        }
        bytes
    }

    /// From the kernel's form.
    pub fn from_bytes(bytes: &[u8]) -> io::Result<Acl> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, "unexpected form of an access control list");
        let (version, entries) = bytes.split_first_chunk::<4>().ok_or_else(invalid)?;
        if u32::from_le_bytes(*version) != VERSION || entries.len() % 8 != 0 {
            return Err(invalid());
        }
        let read = |e: &[u8]| Entry {
            tag: u16::from_le_bytes([e[0], e[1]]),
            perm: u16::from_le_bytes([e[2], e[3]]),
            id: u32::from_le_bytes([e[4], e[5], e[6], e[7]]),
        };
        Ok(Acl(entries.chunks_exact(8).map(read).collect()))
    }

    /// As it is, and `uid` may do `perm` besides. Nobody else can do more than before: where the mask must grow, whoever
    /// was held back by it is now held back by their own entry.
    pub fn with_user(&self, uid: u32, perm: u16) -> Acl {
        let mask = self.perm(MASK, NO_ID);
        let mut entries = self.0.clone();
        if let Some(mask) = mask {
            entries.iter_mut().filter(|e| matches!(e.tag, USER | GROUP | GROUP_OBJ)).for_each(|e| e.perm &= mask);
        }
        entries.retain(|e| e.tag != MASK);
        let perm = perm | entries.iter().find(|e| (e.tag, e.id) == (USER, uid)).map_or(0, |e| e.perm);
        entries.retain(|e| (e.tag, e.id) != (USER, uid));
        entries.push(Entry { tag: USER, id: uid, perm });
        let group = self.perm(GROUP_OBJ, NO_ID).unwrap_or(0);
        entries.push(Entry { tag: MASK, id: NO_ID, perm: mask.unwrap_or(group) | perm });
        entries.sort_unstable();
        Acl(entries)
    }

    /// As it is, without the entry of `uid`; what remains of a list made only for it is a plain mode.
    pub fn without_user(&self, uid: u32) -> Acl {
        let mut entries = self.0.clone();
        entries.retain(|e| (e.tag, e.id) != (USER, uid));
        if !entries.iter().any(|e| matches!(e.tag, USER | GROUP)) {
            entries.retain(|e| e.tag != MASK);
        }
        Acl(entries)
    }

    /// Who has an entry.
    pub fn users(&self) -> Vec<u32> {
        self.0.iter().filter(|e| e.tag == USER).map(|e| e.id).collect()
    }

    /// Whether `uid` has an entry.
    #[cfg(test)]
    pub fn names(&self, uid: u32) -> bool {
        self.perm(USER, uid).is_some()
    }

    fn perm(&self, tag: u16, id: u32) -> Option<u16> {
        self.0.iter().find(|e| (e.tag, e.id) == (tag, id)).map(|e| e.perm)
    }
}

/// The file behind a descriptor that is only a place, by a path that nobody can bend.
pub fn through(fd: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/thread-self/fd/{}", fd.as_fd().as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_user_is_added_and_removed_without_trace() {
        for mode in [0o600, 0o640, 0o444, 0o000] {
            let before = Acl::from_mode(mode);
            let after = before.with_user(999, READ | WRITE);
            assert_eq!(after.perm(USER, 999), Some(6));
            assert_eq!(after.perm(GROUP_OBJ, NO_ID), before.perm(GROUP_OBJ, NO_ID));
            assert_eq!(after.without_user(999), before);
            assert_eq!(Acl::from_bytes(&after.to_bytes()).unwrap(), after);
        }
    }

    #[test]
    fn nobody_else_gains_when_the_mask_grows() {
        let held_back = Acl(vec![
            Entry { tag: USER_OBJ, id: NO_ID, perm: 6 },
            Entry { tag: USER, id: 1000, perm: 7 },
            Entry { tag: GROUP_OBJ, id: NO_ID, perm: 6 },
            Entry { tag: MASK, id: NO_ID, perm: 4 },
            Entry { tag: OTHER, id: NO_ID, perm: 0 },
        ]);
        let after = held_back.with_user(999, READ | WRITE);
        assert_eq!((after.perm(USER, 1000), after.perm(GROUP_OBJ, NO_ID)), (Some(4), Some(4)));
        assert_eq!(after.perm(MASK, NO_ID), Some(6));
        let both = after.with_user(5, READ).without_user(999);
        assert!(both.names(5) && both.names(1000) && !both.names(999));
    }

    #[test]
    fn garbage_is_refused() {
        for bytes in [&[][..], &[1, 0, 0, 0], &[2, 0, 0, 0, 1]] {
            assert!(Acl::from_bytes(bytes).is_err());
        }
    }

    #[test]
    fn the_kernel_agrees() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o640)).unwrap();
        let before = Acl::of(file.as_file()).unwrap();
        assert_eq!(before, Acl::from_mode(0o640));
        let after = before.with_user(12345, READ | WRITE);
        match after.set(file.as_file()) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return eprintln!("SKIPPED: no access control lists in {}", file.path().display());
            }
            set => set.unwrap(),
        }
        assert_eq!(Acl::of(file.as_file()).unwrap(), after);
        before.set(file.as_file()).unwrap();
        assert_eq!(Acl::of(file.as_file()).unwrap(), before);
        assert_eq!(file.as_file().metadata().unwrap().permissions().mode() & 0o777, 0o640);
    }
}
