//! Files that virtd opens itself: found once, judged by what the kernel says of the descriptor, and then that descriptor
//! is read, run, given away or removed, whatever its path has come to mean.
//!
//! ```text
//!   path ─Found::resolve─▶ Found ─plain──▶ Plain      to be read
//!                                ─folder─▶ Folder     to be gone through, emptied, given away
//!                                ─program▶ Program    to be run
//!   path ─Place::resolve─▶ Place ─create, make_folder, replace, remove …
//!   path ─Seen::at───────▶ Seen                       what is there, to decide by
//! ```
//!
//! `wary` everywhere: as root among others, who may own parts of the way; without it we are an ordinary user, whose files
//! these are. Nothing here waits for a pipe's other end. File systems may not answer: see [`super::workers`].

use super::acl::through;
use super::apart::apart;
use super::resolve::{Found, Place};
use rustix::fs::{Access, AtFlags, Dir, FileType, Gid, Mode, OFlags, RenameFlags, Stat, Uid};
use rustix::fs::{accessat, chownat, fstat, linkat, mkdirat, openat, renameat, renameat_with, statat, unlinkat};
use rustix::io::Errno;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// How long a folder may take to be emptied.
const EMPTYING: Duration = Duration::from_secs(20);
/// Names read from a folder at once.
const BATCH: usize = 1024;

/// A plain file, open to be read.
#[derive(Debug)]
pub struct Plain {
    file: File,
    stat: Stat,
}

/// A folder that is held.
#[derive(Debug)]
pub struct Folder(OwnedFd);

/// A program that is held: what was judged is what runs.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    path: PathBuf,
    stat: Stat,
    script: bool,
}

/// What is at a path, its links followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Nothing that can be reached.
    Nothing,
    /// A plain file.
    Plain,
    /// A folder.
    Folder,
    /// A block device.
    Block,
    /// A pipe, a socket, a character device.
    Other,
}

/// What a look at a path has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What is there.
    pub what: What,
    /// Something has that name, be it a link that leads nowhere.
    pub named: bool,
    /// Its length in bytes.
    pub length: u64,
    /// What it takes on disk, in bytes.
    pub allocated: u64,
    /// Its owner.
    pub owner: u32,
    /// Where it is, without links; the path itself if nothing is there.
    pub real: PathBuf,
    /// There is a folder for it to be in.
    pub has_folder: bool,
    /// Bytes that are free there; `None` if that cannot be told.
    pub free: Option<u64>,
}

/// Whether we could open what is at `path` to be read, or to be read and written; nothing is opened.
pub fn may_open(path: &Path, write: bool) -> io::Result<()> {
    let found = Found::resolve(path)?;
    let wanted = if write { Access::READ_OK | Access::WRITE_OK } else { Access::READ_OK };
    Ok(accessat(rustix::fs::CWD, through(&found.fd), wanted, AtFlags::EACCESS)?)
}

/// Opens a plain file to be read; anything else is refused at once.
pub fn open_plain(path: &Path, wary: bool) -> io::Result<Plain> {
    Found::resolve(path)?.plain(wary)
}

impl Found {
    /// Opens it to be read, if it is what an image can be in: a plain file or a block device. `None` if it is neither.
    pub fn image(&self) -> io::Result<Option<File>> {
        if !matches!(self.kind(), FileType::RegularFile | FileType::BlockDevice) {
            return Ok(None);
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Ok(Some(apart(openat(rustix::fs::CWD, through(&self.fd), flags, Mode::empty())?)?.into()))
    }

    /// Opens it to be read, if it is a plain file. `wary`: and whoever named it may have it read.
    pub fn plain(self, wary: bool) -> io::Result<Plain> {
        if let Some(why) = self.objection(None, false).filter(|_| wary) {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        if self.kind() != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no plain file"));
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = apart(openat(rustix::fs::CWD, through(&self.fd), flags, Mode::empty())?)?;
        Ok(Plain { stat: fstat(&file)?, file: file.into() })
    }

    /// Opens it as a folder.
    pub fn folder(&self) -> io::Result<Folder> {
        open_folder(&self.fd, OsStr::new(".")).map(Folder)
    }

    /// Holds it as a program that is to be run under the name `path`. `wary`: nobody but root may have been able to put it
    /// there, or any link or folder on the way to it.
    pub fn program(self, path: &Path, wary: bool) -> io::Result<Program> {
        let mode = self.stat.st_mode;
        if self.kind() != FileType::RegularFile || mode & 0o111 == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an executable file"));
        }
        if wary {
            let others = |what: String| {
                let why = format!("{what} can be changed by others than root; install it system-wide");
                io::Error::new(io::ErrorKind::PermissionDenied, why)
            };
            if let Some(user) = self.choosers.first() {
                return Err(others(format!("a link of user {user}'s on the way to it")));
            }
            if let Some(folder) = &self.exposed {
                return Err(others(format!("the folder {}", folder.display())));
            }
            if self.stat.st_uid != 0 || mode & 0o022 != 0 {
                return Err(others("it".to_owned()));
            }
        }
        let mut start = [0; 2];
        // One that may be run and not read is no script.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let readable = openat(rustix::fs::CWD, through(&self.fd), flags, Mode::empty()).map_err(io::Error::from);
        let script = readable.and_then(apart).is_ok_and(|file| File::from(file).read_exact(&mut start).is_ok())
            && start == *b"#!";
        Ok(Program { fd: self.fd, path: path.to_owned(), stat: self.stat, script })
    }
}

impl Plain {
    /// Its length in bytes, when it was opened.
    pub fn length(&self) -> u64 {
        self.stat.st_size as u64
    }

    /// What the kernel said of it when it was opened.
    pub fn stat(&self) -> &Stat {
        &self.stat
    }

    /// All of it; an error if it has more than `most` bytes.
    pub fn read_all(mut self, most: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        (&mut self.file).take(most + 1).read_to_end(&mut bytes)?;
        match bytes.len() as u64 > most {
            true => Err(io::Error::new(io::ErrorKind::InvalidData, format!("it has more than {most} bytes"))),
            false => Ok(bytes),
        }
    }

    /// The open file.
    pub fn into_file(self) -> File {
        self.file
    }
}

impl Read for Plain {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl Program {
    /// Finds and holds the program that `path` names, as [`Found::program`].
    pub fn at(path: &Path, wary: bool) -> io::Result<Program> {
        Found::resolve(path)?.program(path, wary)
    }

    /// The name under which it was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the kernel says of it.
    pub fn stat(&self) -> &Stat {
        &self.stat
    }

    /// Whether it is a text for an interpreter, which must be able to open it again: its descriptor then must stay open
    /// in the process that becomes it.
    pub fn is_script(&self) -> bool {
        self.script
    }

    /// A command that runs this very file, whatever its name means by then, with nothing of our environment. The program
    /// must be kept until the command has been started.
    pub fn command(&self) -> Command {
        let mut command = Command::new(through(&self.fd));
        command.arg0(&self.path).env_clear().current_dir("/");
        if self.script {
            let fd = self.fd.as_raw_fd();
            // SAFETY: between fork and exec one system call is made, on a descriptor that the child has as we have it.
            unsafe {
                command.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
                    -1 => Err(io::Error::last_os_error()),
                    _ => Ok(()),
                });
            }
        }
        command
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<FileType> for What {
    fn from(kind: FileType) -> What {
        match kind {
            FileType::RegularFile => What::Plain,
            FileType::Directory => What::Folder,
            FileType::BlockDevice => What::Block,
            _ => What::Other,
        }
    }
}

impl Seen {
    /// Looks at a path, which need not lead anywhere.
    pub fn at(path: &Path) -> Seen {
        let found = Found::resolve(path).ok();
        let folder = path.parent().and_then(|folder| Found::resolve(folder).ok());
        let folder = folder.filter(|folder| folder.kind() == FileType::Directory);
        let named = found.is_some() || {
            let entry = folder.as_ref().zip(path.file_name());
            entry.is_some_and(|(folder, name)| statat(&folder.fd, name, AtFlags::SYMLINK_NOFOLLOW).is_ok())
        };
        let free = folder.as_ref().and_then(|folder| folder.free().ok());
        let stat = found.as_ref().map(|found| found.stat);
        let what = found.as_ref().map_or(What::Nothing, |found| found.kind().into());
        Seen {
            what,
            named,
            length: stat.map_or(0, |stat| stat.st_size as u64),
            allocated: stat.map_or(0, |stat| stat.st_blocks as u64 * 512),
            owner: stat.map_or(0, |stat| stat.st_uid),
            real: found.map_or_else(|| path.to_owned(), |found| found.real),
            has_folder: folder.is_some(),
            free,
        }
    }

    /// As of a path that leads nowhere.
    pub fn nothing(path: &Path) -> Seen {
        Seen {
            what: What::Nothing,
            named: false,
            length: 0,
            allocated: 0,
            owner: 0,
            real: path.to_owned(),
            has_folder: false,
            free: None,
        }
    }

    /// Whether something is there.
    pub fn is_there(&self) -> bool {
        self.what != What::Nothing
    }
}

impl Found {
    /// Bytes that are free on the file system of a folder.
    fn free(&self) -> io::Result<u64> {
        let room = rustix::fs::fstatvfs(&self.folder()?.0)?;
        Ok(room.f_bavail.saturating_mul(room.f_frsize))
    }
}

impl Place {
    /// Makes a file, where nothing is; not even a link.
    pub fn create(&self, mode: u32) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(apart(openat(self.folder_fd(), self.name(), flags, Mode::from_raw_mode(mode))?)?.into())
    }

    /// Makes a file without a name in the same folder; `None` where its file system has none such.
    pub fn create_unnamed(&self, mode: u32) -> io::Result<Option<File>> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        match openat(self.folder_fd(), ".", flags, Mode::from_raw_mode(mode)) {
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => Ok(None),
            made => Ok(Some(apart(made?)?.into())),
        }
    }

    /// Gives a file that has no name this one, where nothing is.
    pub fn name_file(&self, file: &File) -> io::Result<()> {
        let (from, to) = (through(file), self.folder_fd());
        Ok(linkat(rustix::fs::CWD, from, to, self.name(), AtFlags::SYMLINK_FOLLOW)?)
    }

    /// Makes a folder, where nothing is, and holds it: an empty one of ours, whatever somebody may have put in its place.
    pub fn make_folder(&self, mode: u32) -> io::Result<Folder> {
        mkdirat(self.folder_fd(), self.name(), Mode::from_raw_mode(mode))?;
        let folder = self.open_folder()?;
        let ours = folder.stat()?.st_uid == rustix::process::geteuid().as_raw();
        match ours && folder.names(1)?.is_empty() {
            true => folder.set_mode(mode).map(|()| folder),
            false => Err(io::Error::new(io::ErrorKind::AlreadyExists, "something else was put in its place")),
        }
    }

    /// Makes the folders that are missing on the way to `path`, for everybody to pass through.
    pub fn make_folders(path: &Path, wary: bool) -> io::Result<()> {
        let missing: Vec<&Path> = path.ancestors().take_while(|folder| !Seen::at(folder).named).collect();
        for folder in missing.into_iter().rev() {
            match Place::resolve(folder, wary)?.make_folder(0o711) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// Opens the folder that is there, which is no link.
    pub fn open_folder(&self) -> io::Result<Folder> {
        open_folder(self.folder_fd(), self.name()).map(Folder)
    }

    /// Opens the plain file that is there itself, to be read.
    pub fn open_plain(&self) -> io::Result<Plain> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Found::of(openat(self.folder_fd(), self.name(), flags, Mode::empty())?, self.path())?.plain(false)
    }

    /// What is there itself, not what it may lead to.
    pub fn stat(&self) -> io::Result<Stat> {
        Ok(statat(self.folder_fd(), self.name(), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Moves what is there to another place, over what is there.
    pub fn rename_to(&self, other: &Place) -> io::Result<()> {
        Ok(renameat(self.folder_fd(), self.name(), other.folder_fd(), other.name())?)
    }

    /// Has on disk what was made, removed and renamed in its folder.
    pub fn sync_folder(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(open_folder(self.folder_fd(), OsStr::new("."))?)?)
    }

    /// Removes what is there: not a folder.
    pub fn remove_file(&self) -> io::Result<()> {
        Ok(unlinkat(self.folder_fd(), self.name(), AtFlags::empty())?)
    }

    /// The same; nothing need be there.
    pub fn remove_file_if_there(&self) -> io::Result<()> {
        match self.remove_file() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// Removes what is there: a folder with all that is in it, too.
    pub fn remove_all(&self) -> io::Result<()> {
        if FileType::from_raw_mode(self.stat()?.st_mode) != FileType::Directory {
            return self.remove_file();
        }
        self.open_folder()?.empty()?;
        Ok(unlinkat(self.folder_fd(), self.name(), AtFlags::REMOVEDIR)?)
    }
}

impl Folder {
    /// The place of that name in it.
    pub fn place(&self, name: &OsStr) -> io::Result<Place> {
        Ok(Place::in_folder(self.0.try_clone()?, name))
    }

    /// A path to it that nobody can bend.
    pub fn path(&self) -> PathBuf {
        through(&self.0)
    }

    /// What the kernel says of it.
    pub fn stat(&self) -> io::Result<Stat> {
        Ok(fstat(&self.0)?)
    }

    /// Makes somebody its owner.
    pub fn give(&self, uid: u32, gid: u32) -> io::Result<()> {
        Ok(rustix::fs::fchown(&self.0, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?)
    }

    /// Makes somebody the owner of what has that name in it; of a link itself, and not of what it leads to.
    pub fn give_entry(&self, name: &OsStr, uid: u32, gid: u32) -> io::Result<()> {
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        Ok(chownat(&self.0, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Sets its permissions.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        Ok(rustix::fs::fchmod(&self.0, Mode::from_raw_mode(mode))?)
    }

    /// Some of the names in it, at most so many, without `.` and `..`.
    pub fn names(&self, most: usize) -> io::Result<Vec<OsString>> {
        names(&self.0, most)
    }

    /// Removes all that is in it, however deep, with few descriptors and in bounded time: what is deep is first moved up.
    /// On failure some of it is there still, and the error says why.
    pub fn empty(&self) -> io::Result<()> {
        self.empty_until(Instant::now() + EMPTYING)
    }

    fn empty_until(&self, deadline: Instant) -> io::Result<()> {
        loop {
            let names = names(&self.0, BATCH)?;
            if names.is_empty() {
                return Ok(());
            }
            for name in names {
                in_time(deadline)?;
                match unlinkat(&self.0, &name, AtFlags::empty()) {
                    Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                    Err(rustix::io::Errno::ISDIR | rustix::io::Errno::PERM) => self.lift_out_of(&name, deadline)?,
                    Err(e) => return Err(e.into()),
                }
            }
        }
    }

    /// Removes a folder in this one, once its files are removed and its folders are in this one.
    fn lift_out_of(&self, name: &OsStr, deadline: Instant) -> io::Result<()> {
        let inner = match open_folder(&self.0, name) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            inner => inner?,
        };
        if fstat(&inner)?.st_dev != fstat(&self.0)?.st_dev {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another file system is mounted in it"));
        }
        loop {
            let names = names(&inner, BATCH)?;
            if names.is_empty() {
                break;
            }
            for name in names {
                in_time(deadline)?;
                match unlinkat(&inner, &name, AtFlags::empty()) {
                    Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                    Err(rustix::io::Errno::ISDIR | rustix::io::Errno::PERM) => {
                        let free = format!(".removed-{}", uuid::Uuid::new_v4());
                        renameat_with(&inner, &name, &self.0, free, RenameFlags::NOREPLACE)?;
                    }
                    Err(e) => return Err(e.into()),
                }
            }
        }
        match unlinkat(&self.0, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTEMPTY) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

fn in_time(deadline: Instant) -> io::Result<()> {
    match Instant::now() > deadline {
        true => Err(io::Error::new(io::ErrorKind::TimedOut, "there is too much in it")),
        false => Ok(()),
    }
}

/// Opens a folder that is in another one, and no link.
fn open_folder(at: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(at, name, flags, Mode::empty())?)
}

fn names(folder: &OwnedFd, most: usize) -> io::Result<Vec<OsString>> {
    let is_name = |name: &CString| !matches!(name.as_bytes(), b"." | b"..");
    let entries = Dir::read_from(folder)?.map(|entry| entry.map(|entry| entry.file_name().to_owned()));
    let names = entries.filter(|name| name.as_ref().map_or(true, is_name)).take(most);
    names.map(|name| Ok(OsStr::from_bytes(name?.as_bytes()).to_owned())).collect()
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
