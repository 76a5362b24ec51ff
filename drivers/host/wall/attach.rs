//! Mounts put into the tree behind the wall, each at the path that it has outside.

use super::super::access::LentFile;
use super::sys::{self, Hold};
use rustix::fs::{
    CWD, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags, fstat, fstatvfs, mkdirat, mknodat, openat, openat2,
};
use rustix::mount::{UnmountFlags, unmount};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use super::super::acl::through;

/// The root behind the wall.
pub struct Root(pub OwnedFd);

/// What is to be there.
pub struct Tree {
    /// A mount that is nowhere yet.
    pub mount: OwnedFd,
    /// Where it is to be.
    pub at: PathBuf,
    /// It is a folder.
    pub folder: bool,
}

/// How what was judged is found where its mount is made: only a file that was found in a mount namespace can be mounted there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It was found in this namespace: by its descriptor.
    Held,
    /// This namespace is a copy of the one it was found in: by its path, and it must be the same file.
    Copied,
}

impl Origin {
    /// A mount of what is behind `fd`, which was found at `path`; with those below it if `deep`.
    pub fn mount(self, fd: &OwnedFd, path: &Path, deep: bool, hold: Hold) -> io::Result<OwnedFd> {
        match self {
            Origin::Held => sys::clone(fd, deep, hold),
            Origin::Copied => {
                let found = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
                let (judged, here) = (fstat(fd)?, fstat(&found)?);
                if (judged.st_dev, judged.st_ino) != (here.st_dev, here.st_ino) {
                    return Err(io::Error::other("it was replaced while it was looked at; try again"));
                }
                // A folder's mounts belong to it: without them what they cover would be seen, which the kernel refuses.
                let folder = FileType::from_raw_mode(here.st_mode).is_dir();
                sys::clone(&found, deep || folder, hold)
            }
        }
    }
}

impl Tree {
    /// A lent file.
    pub fn of(file: &LentFile, origin: Origin) -> io::Result<Tree> {
        let hold = Hold {
            read_only: !file.write,
            no_devices: !matches!(file.kind(), FileType::BlockDevice | FileType::CharacterDevice),
            no_programs: true,
        };
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", file.path.display()));
        let mount = origin.mount(&file.fd, &file.path, false, hold).map_err(named)?;
        Ok(Tree { mount, at: file.path.clone(), folder: file.kind() == FileType::Directory })
    }
}

impl Root {
    /// Puts it where it is to be, in place of another file that is there.
    pub fn attach(&self, tree: &Tree) -> io::Result<()> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", tree.at.display()));
        self.make_way(tree).map_err(named)?;
        let at = self.place(&tree.at, tree.folder).map_err(named)?;
        sys::put(&tree.mount, &at).map_err(named)
    }

    /// Puts those that are not there yet where they are to be; each is of the file in the same place of `files`.
    pub fn attach_new(&self, trees: &[Tree], files: &[LentFile]) -> io::Result<()> {
        trees
            .iter()
            .zip(files)
            .filter(|(tree, file)| !self.has(&tree.at, file))
            .try_for_each(|(tree, _)| self.attach(tree))
    }

    /// Whether that very file is at `path`, writable if it is to be written.
    fn has(&self, path: &Path, file: &LentFile) -> bool {
        let same = || {
            let there = self.find(path)?;
            let (there, stat) = (fstatvfs(&there)?, fstat(&there)?);
            let wanted = fstat(&*file.fd)?;
            let read_only = there.f_flag.contains(StatVfsMountFlags::RDONLY);
            Ok::<_, io::Error>(
                (stat.st_dev, stat.st_ino) == (wanted.st_dev, wanted.st_ino) && !(file.write && read_only),
            )
        };
        same().unwrap_or(false)
    }

    /// Takes away what was mounted there before: only what is on top would be seen, but it would stay held.
    fn make_way(&self, tree: &Tree) -> io::Result<()> {
        let Ok(there) = self.find(&tree.at) else { return Ok(()) };
        let stat = fstat(&there)?;
        let own = fstat(&self.0)?.st_dev == stat.st_dev;
        if own || tree.folder || FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return Ok(());
        }
        let gone = match unmount(through(&there), UnmountFlags::DETACH) {
            // Among its processes we are none; then its root is ours.
            Err(rustix::io::Errno::NOENT) => unmount(&tree.at, UnmountFlags::DETACH),
            gone => gone,
        };
        // What lies in a larger mount, e.g. in /usr, is covered.
        match gone {
            Err(rustix::io::Errno::INVAL) => Ok(()),
            gone => Ok(gone?),
        }
    }

    /// What is at `path`, links in it followed within the root.
    fn find(&self, path: &Path) -> io::Result<OwnedFd> {
        let within = path.strip_prefix("/").unwrap_or(path);
        let within = if within.as_os_str().is_empty() { Path::new(".") } else { within };
        Ok(openat2(&self.0, within, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)?)
    }

    /// The same; folders and the file itself are made where there is nothing.
    pub fn place(&self, path: &Path, folder: bool) -> io::Result<OwnedFd> {
        let (mut so_far, mut at) = (PathBuf::from("/"), self.find(Path::new("/"))?);
        let mut parts = path.components().peekable();
        while let Some(part) = parts.next() {
            match part {
                Component::Normal(name) => {
                    so_far.push(name);
                    at = match self.find(&so_far) {
                        Err(e) if e.kind() == io::ErrorKind::NotFound => {
                            let made = match parts.peek().is_some() || folder {
                                true => mkdirat(&at, name, Mode::from(0o755)),
                                false => mknodat(&at, name, FileType::RegularFile, Mode::from(0o644), 0),
                            };
                            made?;
                            self.find(&so_far)?
                        }
                        found => found?,
                    };
                }
                Component::ParentDir => {
                    so_far.push("..");
                    at = self.find(&so_far)?;
                }
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
        Ok(at)
    }
}
