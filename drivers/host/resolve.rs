//! From a path to the one file it means, in steps that nobody can bend, and whether its giver may give it.
//!
//! virtd runs as root and opens files to QEMU's user because XML names them. Who can change what a path means, by a
//! symbolic link or a hard link, must not gain by that what they could not give away themselves:
//!
//! - a symbolic link of root's leads anywhere; one of somebody else's only to files of the same owner;
//! - a file with several names is taken only where nobody but root or its owner could have made the name.

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat, statat};
use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use super::acl::through;

/// Symbolic links in one path; the kernel's own limit.
const MAX_LINKS: usize = 40;

/// A file, whatever its path comes to mean later.
#[derive(Debug)]
pub struct Found {
    /// An `O_PATH` descriptor.
    pub fd: OwnedFd,
    /// Where it is, without links.
    pub real: PathBuf,
    /// What it is.
    pub stat: Stat,
    /// Owners of links on the way, root left out: they chose this file.
    pub choosers: BTreeSet<u32>,
    /// Somebody who is neither root nor the file's owner could have put its name there.
    pub planted: bool,
    /// The first folder on the way in which others than root may make, rename or remove names, the sticky ones included.
    pub exposed: Option<PathBuf>,
}

impl Found {
    /// The file that `path` means now.
    pub fn resolve(path: &Path) -> io::Result<Found> {
        Walk::new(path)?.finish()
    }

    /// A file that is held already, and how it is shown.
    pub fn of(fd: OwnedFd, shown: PathBuf) -> io::Result<Found> {
        let stat = fstat(&fd)?;
        Ok(Found { fd, real: shown, stat, choosers: BTreeSet::new(), planted: false, exposed: None })
    }

    /// Why it must not be opened to somebody new, if so. `chosen_by` is who named the path, if that was not the XML;
    /// `own_device`: it may be a character device.
    pub fn objection(&self, chosen_by: Option<u32>, own_device: bool) -> Option<String> {
        let owner = self.stat.st_uid;
        let mut choosers = self.choosers.iter().copied().chain(chosen_by).filter(|uid| *uid != 0);
        if let Some(chooser) = choosers.find(|uid| *uid != owner) {
            return Some(format!("user {chooser} chose this file of user {owner}'s by a link or a backing file name"));
        }
        if self.stat.st_nlink > 1 && self.planted {
            return Some("it has several names, and others than its owner can make names where this one is".into());
        }
        match self.kind() {
            FileType::RegularFile | FileType::BlockDevice => None,
            FileType::CharacterDevice if own_device => None,
            FileType::CharacterDevice => {
                Some("it is a character device: put the user into the group that has it".into())
            }
            _ => Some("it is neither a plain file nor a block device".into()),
        }
    }

    /// Plain file, block device, …
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }
}

/// A place for a file, in a directory that is held: whoever bends the path later changes nothing.
#[derive(Debug)]
pub struct Place {
    dir: OwnedFd,
    name: OsString,
}

impl Place {
    /// The place that `path` means now; there may be nothing there. With `wary`, as root among others: a link of
    /// somebody's leads only to directories of the same owner.
    pub fn resolve(path: &Path, wary: bool) -> io::Result<Place> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "the path does not end with a name");
        let (dir, name) = path.parent().zip(path.file_name()).ok_or_else(invalid)?;
        let found = Found::resolve(dir)?;
        let owner = found.stat.st_uid;
        if let Some(chooser) = found.choosers.iter().find(|uid| wary && **uid != owner) {
            let why = format!("user {chooser} chose this directory of user {owner}'s by a link");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        Ok(Place { dir: found.fd, name: name.to_owned() })
    }

    /// The place of that name in a directory that is held.
    pub fn in_folder(dir: OwnedFd, name: &OsStr) -> Place {
        Place { dir, name: name.to_owned() }
    }

    /// The directory.
    pub fn folder_fd(&self) -> &OwnedFd {
        &self.dir
    }

    /// The last part of the path.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// The directory, by a path that nobody can bend.
    pub fn dir(&self) -> PathBuf {
        through(&self.dir)
    }

    /// The same for the file; only its last part may be a link.
    pub fn path(&self) -> PathBuf {
        self.dir().join(&self.name)
    }
}

/// A path being walked: where we are, and what is still to go.
struct Walk {
    at: OwnedFd,
    /// What the kernel said of it when it was opened.
    stat: Stat,
    parent: Option<Stat>,
    real: PathBuf,
    todo: VecDeque<OsString>,
    links: usize,
    choosers: BTreeSet<u32>,
    exposed: Option<PathBuf>,
}

impl Walk {
    fn new(path: &Path) -> io::Result<Walk> {
        if !path.is_absolute() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path is not absolute"));
        }
        let (at, stat) = root()?;
        let mut walk = Walk {
            at,
            stat,
            parent: None,
            real: "/".into(),
            todo: VecDeque::new(),
            links: 0,
            choosers: BTreeSet::new(),
            exposed: None,
        };
        walk.push(path);
        Ok(walk)
    }

    /// Puts a path before what is still to go.
    fn push(&mut self, path: &Path) {
        for part in path.components().rev() {
            match part {
                Component::Normal(name) => self.todo.push_front(name.to_owned()),
                Component::ParentDir => self.todo.push_front("..".into()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
    }

    fn finish(mut self) -> io::Result<Found> {
        while let Some(name) = self.todo.pop_front() {
            self.step(&name)?;
        }
        let stat = self.stat;
        let planted = self.parent.is_some_and(|dir| {
            let others_write = dir.st_mode & 0o022 != 0;
            others_write || (dir.st_uid != 0 && dir.st_uid != stat.st_uid)
        });
        Ok(Found { fd: self.at, real: self.real, stat, choosers: self.choosers, planted, exposed: self.exposed })
    }

    fn step(&mut self, name: &OsStr) -> io::Result<()> {
        let folder = self.stat;
        if self.exposed.is_none() && (folder.st_uid != 0 || folder.st_mode & 0o022 != 0) {
            self.exposed = Some(self.real.clone());
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let next = openat(&self.at, name, flags, Mode::empty())?;
        let stat = fstat(&next)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            return self.follow(&next, &stat);
        }
        if name == ".." {
            self.real.pop();
        } else {
            self.real.push(name);
        }
        self.parent = Some(folder);
        (self.at, self.stat) = (next, stat);
        Ok(())
    }

    fn follow(&mut self, link: &OwnedFd, stat: &Stat) -> io::Result<()> {
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(rustix::io::Errno::LOOP.into());
        }
        if stat.st_uid != 0 {
            self.choosers.insert(stat.st_uid);
        }
        let target = PathBuf::from(OsString::from_vec(readlinkat(link, "", Vec::new())?.into_bytes()));
        if target.is_absolute() {
            ((self.at, self.stat), self.parent, self.real) = (root()?, None, "/".into());
        }
        self.push(&target);
        Ok(())
    }
}

fn root() -> io::Result<(OwnedFd, Stat)> {
    let root = openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let stat = fstat(&root)?;
    Ok((root, stat))
}

/// Whether the calling thread, by its file system user, may read (and write) the file behind `fd`.
pub fn may_open(fd: &impl AsFd, write: bool) -> bool {
    let what = if write { libc::R_OK | libc::W_OK } else { libc::R_OK };
    let flags = libc::AT_EACCESS | libc::AT_EMPTY_PATH;
    // SAFETY: the string lives across the call. Raw, since libc's and rustix' accessat may decide by the process' user.
    unsafe { libc::syscall(libc::SYS_faccessat2, fd.as_fd().as_raw_fd(), c"".as_ptr(), what, flags) == 0 }
}

/// Whether `path` still is that file.
pub fn is_still(path: &Path, dev: u64, ino: u64) -> bool {
    statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (dev, ino))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};

    fn dir() -> tempfile::TempDir {
        tempfile::tempdir_in("/var/tmp").unwrap()
    }

    fn needs_root() -> bool {
        let root = nix::unistd::geteuid().is_root();
        if !root {
            eprintln!("SKIPPED: needs root");
        }
        !root
    }

    #[test]
    fn links_dots_and_directories_lead_to_the_real_file() {
        let dir = dir();
        std::fs::create_dir(dir.path().join("images")).unwrap();
        std::fs::write(dir.path().join("images/a.img"), "").unwrap();
        symlink("images", dir.path().join("link")).unwrap();
        symlink(dir.path().join("link/a.img"), dir.path().join("images/b.img")).unwrap();
        let found = Found::resolve(&dir.path().join("link/../images/./b.img")).unwrap();
        assert_eq!(found.real, dir.path().join("images/a.img").canonicalize().unwrap());
        assert!(is_still(&found.real, found.stat.st_dev, found.stat.st_ino));
    }

    #[test]
    fn what_leads_nowhere_is_an_error() {
        let dir = dir();
        symlink("loop", dir.path().join("loop")).unwrap();
        assert!(Found::resolve(&dir.path().join("loop")).is_err());
        assert!(Found::resolve(&dir.path().join("none")).is_err());
        assert!(Found::resolve(Path::new("relative")).is_err());
    }

    #[test]
    fn a_users_link_leads_only_to_their_own_files() {
        if needs_root() {
            return;
        }
        let dir = dir();
        let (own, secret) = (dir.path().join("own.img"), dir.path().join("secret"));
        for path in [&own, &secret] {
            std::fs::write(path, "").unwrap();
        }
        chown(&own, Some(1000), None).unwrap();
        for (target, fine) in [(&own, true), (&secret, false)] {
            let link = dir.path().join("link");
            symlink(target, &link).unwrap();
            lchown(&link, Some(1000), None).unwrap();
            assert_eq!(Found::resolve(&link).unwrap().objection(None, false).is_none(), fine, "{}", target.display());
            std::fs::remove_file(link).unwrap();
        }
        let named_in_an_image = Found::resolve(&secret).unwrap();
        assert!(named_in_an_image.objection(Some(1000), false).is_some());
        assert!(named_in_an_image.objection(Some(0), false).is_none());
    }

    #[test]
    fn a_users_link_leads_no_new_file_into_roots_directories() {
        if needs_root() {
            return;
        }
        let dir = dir();
        let (theirs, link) = (dir.path().join("theirs"), dir.path().join("theirs/link"));
        std::fs::create_dir(&theirs).unwrap();
        symlink(dir.path(), &link).unwrap();
        assert!(Place::resolve(&link.join("new"), true).is_ok(), "root's link");
        lchown(&link, Some(1000), None).unwrap();
        let refused = Place::resolve(&link.join("new"), true).unwrap_err();
        assert!(refused.to_string().contains("user 1000 chose"), "{refused}");
        chown(dir.path(), Some(1000), None).unwrap();
        let place = Place::resolve(&link.join("new"), true).unwrap();
        std::fs::write(place.path(), "").unwrap();
        assert!(dir.path().join("new").exists());
        assert!(Place::resolve(&dir.path().join(".."), true).is_err());
    }

    #[test]
    fn a_second_name_that_others_could_have_made_is_refused() {
        if needs_root() {
            return;
        }
        let dir = dir();
        let (secret, theirs) = (dir.path().join("secret"), dir.path().join("theirs"));
        std::fs::write(&secret, "").unwrap();
        std::fs::create_dir(&theirs).unwrap();
        std::fs::hard_link(&secret, theirs.join("disk.img")).unwrap();
        let objection = || Found::resolve(&theirs.join("disk.img")).unwrap().objection(None, false);
        assert_eq!(objection(), None, "root's directory");
        chown(&theirs, Some(1000), None).unwrap();
        assert!(objection().is_some());
        chown(&theirs, Some(0), None).unwrap();
        std::fs::set_permissions(&theirs, std::fs::Permissions::from_mode(0o1777)).unwrap();
        assert!(objection().is_some());
    }

    #[test]
    fn only_files_and_disks_are_given() {
        assert!(Found::resolve(Path::new("/dev/null")).unwrap().objection(None, false).is_some());
        assert!(Found::resolve(Path::new("/dev/null")).unwrap().objection(None, true).is_none(), "the guest's own");
        assert!(Found::resolve(Path::new("/")).unwrap().objection(None, false).is_some());
    }
}
