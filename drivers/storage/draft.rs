//! A file that is being made: it has no name until all of it is on disk, so that whoever is killed leaves nothing. Where a file
//! system has no files without a name, it has one that is never listed, and is removed when the pool is started.

use super::folder::{PoolFolder, id_of};
use crate::host::acl::through;
use crate::host::apart::apart;
use crate::host::threads;
use crate::host::workers::ClosedAside;
use rustix::fs::{AtFlags, Gid, IFlags, Mode, OFlags, RenameFlags, Uid};
use rustix::fs::{
    fchmod, fchown, fsync, ioctl_getflags, ioctl_setflags, linkat, openat, renameat, renameat_with, unlinkat,
};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use uuid::Uuid;
use virt_model::driver::storage::FileId;
use virt_model::storage::UNFINISHED;

/// See the module.
pub struct Draft {
    file: Arc<ClosedAside>,
    folder: Arc<PoolFolder>,
    /// The name that it has for now, if it has one.
    unfinished: Mutex<Option<String>>,
}

impl Draft {
    /// Makes an empty one. Blocks.
    pub fn begin(folder: &Arc<PoolFolder>, nocow: bool) -> io::Result<Draft> {
        let private = Mode::RUSR | Mode::WUSR;
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let (fd, unfinished) = match openat(folder, ".", flags, private) {
            Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
                let name = format!("{UNFINISHED}{}", Uuid::new_v4());
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                (openat(folder, &name, flags, private)?, Some(name))
            }
            fd => (fd?, None),
        };
        let file = Arc::new(ClosedAside::of(File::from(apart(fd)?)));
        let draft = Draft { file, folder: folder.clone(), unfinished: Mutex::new(unfinished) };
        if nocow {
            without_copies(draft.file.get()?)?;
        }
        Ok(draft)
    }

    /// The file.
    pub fn file(&self) -> &Arc<ClosedAside> {
        &self.file
    }

    /// Which file it is.
    pub fn id(&self) -> io::Result<FileId> {
        id_of(self.file.get()?)
    }

    /// Gives it its owner and mode, and has all of it on disk. Who runs it never does so with its owner's rights. Blocks.
    pub fn settle(&self, owner: (Option<u32>, Option<u32>), mode: u32) -> io::Result<()> {
        let file = self.file.get()?;
        let us = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        give(file, owner.0.or(Some(us.0)), owner.1.or(Some(us.1)))?;
        fchmod(file, Mode::from_raw_mode(mode & 0o777))?;
        file.sync_all()
    }

    /// Gives it its name, where nothing is. Blocks.
    pub fn name(&self, name: &str) -> io::Result<()> {
        let mut unfinished = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        match &*unfinished {
            Some(from) => match renameat_with(&self.folder, from, &self.folder, name, RenameFlags::NOREPLACE) {
                // NFS has no word for that; a second name is not given where one is.
                Err(Errno::INVAL) => self.give_second(from, name)?,
                renamed => renamed?,
            },
            None => self.link(name)?,
        }
        *unfinished = None;
        Ok(fsync(&self.folder)?)
    }

    /// Gives it its name beside the one that it has for now, which goes: if that fails, when the pool is started.
    fn give_second(&self, from: &str, name: &str) -> io::Result<()> {
        match linkat(&self.folder, from, &self.folder, name, AtFlags::empty()) {
            // A server that was asked twice, since its first reply was lost, says so of what it has done itself.
            Err(Errno::EXIST) if self.has_name(name) => {}
            linked => linked?,
        }
        if let Err(error) = unlinkat(&self.folder, from, AtFlags::empty()) {
            let folder = self.folder.real().display();
            tracing::warn!("{folder}: '{name}' is called '{from}', too, until the pool is started again: {error}");
        }
        Ok(())
    }

    fn has_name(&self, name: &str) -> bool {
        let found = self.folder.beneath(name).ok().flatten();
        found.is_some_and(|found| self.id().is_ok_and(|id| id == found.id()))
    }

    /// Gives it a name that another file has, which is gone then. Blocks.
    pub fn take_place_of(&self, name: &str) -> io::Result<()> {
        let mut unfinished = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        if unfinished.is_none() {
            let interim = format!("{UNFINISHED}{}", Uuid::new_v4());
            self.link(&interim)?;
            *unfinished = Some(interim);
        }
        if let Some(from) = &*unfinished {
            renameat(&self.folder, from, &self.folder, name)?;
        }
        *unfinished = None;
        Ok(fsync(&self.folder)?)
    }

    fn link(&self, name: &str) -> io::Result<()> {
        let from = through(self.file.get()?);
        Ok(linkat(rustix::fs::CWD, from, &self.folder, name, AtFlags::SYMLINK_FOLLOW)?)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let unfinished = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (Some(name), folder) = (unfinished, self.folder.clone()) else { return };
        // The next start of the pool removes it else.
        let _ = threads::run(move || {
            let _ = unlinkat(&folder, name, AtFlags::empty());
        });
    }
}

/// Makes somebody the owner of a file, where that is said.
pub fn give(file: &impl AsFd, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
    Ok(fchown(file, uid.map(Uid::from_raw), gid.map(Gid::from_raw))?)
}

/// Its file system is not to lay what is overwritten elsewhere. One that never does has no word for it.
pub fn without_copies(file: &impl AsFd) -> io::Result<()> {
    let set = ioctl_getflags(file).and_then(|flags| ioctl_setflags(file, flags | IFlags::NOCOW));
    match set {
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::NOSYS) => Ok(()),
        set => Ok(set?),
    }
}
