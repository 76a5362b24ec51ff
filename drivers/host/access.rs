//! Files lent to the hypervisor's user while a guest runs, and given back afterwards.
//!
//! A file that the user cannot open gets one more entry in its access control list; owner, group and everybody else keep
//! what they had. Why not change the owner, as libvirt does: an entry can be taken away without knowing what was before,
//! guests of different users can share a file, and the file's owner keeps it. Directories are never changed: a guest finds
//! its files behind its wall ([`super::wall`]), and there are no others on the way to them.
//!
//! The ledger on disk says which files are lent to which guests. It is written before a file is lent and after it is
//! given back, so a virtd that is killed in between lends nothing for ever: the guest's record makes the next virtd give
//! back what its start had taken, and a reboot of the host, which no guest survives, gives back everything. A file is found
//! again by its handle, so that one which was renamed meanwhile is given back too.
//!
//! Whose files may be lent: see [`super::resolve`]. A backing file named in an image's header counts as chosen by the
//! image's owner.

use super::acl::{Acl, READ, WRITE, through};
use super::chain::{Behind, behind};
use super::handle::Handle;
use super::process::boot_id;
use super::resolve::{Found, is_still, may_open};
use super::user::RunAs;
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use uuid::Uuid;
use virt_model::driver::DriverError;

/// Files of one guest, images that stand on one another included.
const MAX_FILES: usize = 512;

/// A file a guest needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// Where it is.
    pub path: PathBuf,
    /// To be written, too.
    pub write: bool,
    /// It is an image, and the files its header names are needed as well.
    pub backing: bool,
    /// It is a device that the guest has to itself, and may be a character device.
    pub device: bool,
}

/// A file that a guest may open, as it was judged.
#[derive(Clone, Debug)]
pub struct LentFile {
    /// Where it was named.
    pub path: PathBuf,
    /// An `O_PATH` descriptor of it.
    pub fd: Arc<OwnedFd>,
    /// To be written, too.
    pub write: bool,
    kind: FileType,
}

impl LentFile {
    /// What is at `path`, to be opened with the rights that it has: nothing is lent. `None` if nothing is there. A link of
    /// somebody's leads only to what is theirs.
    pub fn unlent(path: &Path, write: bool) -> io::Result<Option<LentFile>> {
        let found = match Found::resolve(path) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
            found => found?,
        };
        if let Some(chooser) = found.choosers.iter().find(|uid| **uid != found.stat.st_uid) {
            let why = format!("{}: user {chooser} chose this by a link", path.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let kind = found.kind();
        Ok(Some(LentFile { path: path.to_owned(), fd: Arc::new(found.fd), write, kind }))
    }

    /// Plain file, block device, …
    pub fn kind(&self) -> FileType {
        self.kind
    }
}

/// Which files are lent to which guests. All methods block.
pub struct Ledger {
    file: PathBuf,
    books: Mutex<Books>,
    /// Who borrows for a guest beside the guest itself.
    beside: Mutex<BTreeSet<Uuid>>,
}

/// What is on disk.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Books {
    boot_id: String,
    loans: Vec<Loan>,
}

/// One lent file.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Loan {
    path: PathBuf,
    dev: u64,
    ino: u64,
    /// Where it is whatever it is called, if its file system can say.
    #[serde(default)]
    handle: Option<Handle>,
    /// To whom, where a holder does not say it: all guests had one user once.
    uid: u32,
    /// Its list before, and with our entries, in the kernel's form.
    before: Vec<u8>,
    after: Vec<u8>,
    /// For which guests.
    holders: BTreeMap<Uuid, Holder>,
}

/// For whom, and whether to be written.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Holder {
    /// By the user of the loan.
    Common(bool),
    /// By a user of its own.
    Own { uid: u32, write: bool },
}

/// A file that must be lent.
struct Need {
    found: Found,
    path: PathBuf,
    write: bool,
    /// It is lent; else the user may open it without.
    lent: bool,
}

impl Need {
    fn file(self) -> LentFile {
        let kind = self.found.kind();
        LentFile { path: self.path, fd: Arc::new(self.found.fd), write: self.write, kind }
    }
}

impl Ledger {
    /// Opens the ledger `access.json` in `dir`. What was lent before the host booted is given back. A ledger that cannot be
    /// read, as a host that lost power may leave it, is put aside: no guest should have to wait for its repair.
    pub fn open(dir: &Path) -> io::Result<Ledger> {
        std::fs::create_dir_all(dir)?;
        let file = dir.join("access.json");
        let books = match std::fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text).or_else(|error| put_aside(&file, &error))?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Books::default(),
            Err(e) => return Err(e),
        };
        let ledger = Ledger { file, books: Mutex::new(books), beside: Mutex::default() };
        ledger.turn_over()?;
        Ok(ledger)
    }

    /// Makes every file of `wants` accessible to `user` for `guest`, or none: then the error names the file and the remedy.
    /// What is returned are they and what their headers name, lent or open to the user anyway.
    pub fn lend(&self, user: &RunAs, guest: Uuid, wants: &[Want]) -> Result<Vec<LentFile>, DriverError> {
        // Whatever may hang on a file system that does not answer is done first, without the lock.
        let mut survey = Survey { ledger: self, user, needs: Vec::new(), seen: BTreeSet::new() };
        for want in wants {
            survey.collect(want, None)?;
        }
        let needs = survey.needs;
        let lent = self.enter(user, guest, &needs).and_then(|()| verify(user, &needs));
        if lent.is_err() {
            self.give_back(guest);
        }
        lent.map(|()| needs.into_iter().map(Need::file).collect())
    }

    /// The same for files that a running guest needs in addition: what it was lent before stays so in any case.
    pub fn lend_more(&self, user: &RunAs, guest: Uuid, wants: &[Want]) -> Result<Vec<LentFile>, DriverError> {
        let mut survey = Survey { ledger: self, user, needs: Vec::new(), seen: BTreeSet::new() };
        for want in wants {
            survey.collect(want, None)?;
        }
        let needs = survey.needs;
        let held = |loan: &Loan| loan.holders.contains_key(&guest);
        let before: BTreeSet<(u64, u64)> =
            self.lock().loans.iter().filter(|loan| held(loan)).map(|loan| (loan.dev, loan.ino)).collect();
        let lent = self.enter(user, guest, &needs).and_then(|()| verify(user, &needs));
        if lent.is_err() {
            let mut books = self.lock();
            let new = books.loans.iter_mut().filter(|loan| !before.contains(&(loan.dev, loan.ino)));
            new.for_each(|loan| _ = loan.holders.remove(&guest));
            if let Err(error) = self.settle(&mut books) {
                tracing::warn!(%guest, %error, "the ledger of lent files cannot be written");
            }
        }
        lent.map(|()| needs.into_iter().map(Need::file).collect())
    }

    /// Takes back what `guest` was lent. What cannot be taken back is logged and kept in the ledger.
    pub fn give_back(&self, guest: Uuid) {
        let mine = |loan: &&Loan| loan.holders.contains_key(&guest);
        let paths: Vec<PathBuf> = self.lock().loans.iter().filter(mine).map(|loan| loan.path.clone()).collect();
        if paths.is_empty() {
            return;
        }
        // As above: a file system that hangs does so here.
        paths.iter().for_each(|path| drop(std::fs::symlink_metadata(path)));
        let mut books = self.lock();
        books.loans.iter_mut().for_each(|loan| _ = loan.holders.remove(&guest));
        if let Err(error) = self.settle(&mut books) {
            tracing::warn!(%guest, %error, "the ledger of lent files cannot be written");
        }
    }

    /// A number for somebody who borrows for `guest` beside the guest itself, until they leave. The lowest that nobody has:
    /// what is still lent to one who was killed is given back by the next one.
    pub fn join(&self, guest: Uuid) -> Uuid {
        let mut beside = self.beside.lock().unwrap_or_else(PoisonError::into_inner);
        let mut number = !guest.as_u128();
        while !beside.insert(Uuid::from_u128(number)) {
            number = number.wrapping_add(1);
        }
        Uuid::from_u128(number)
    }

    /// The number is free again.
    pub fn leave(&self, number: Uuid) {
        self.beside.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back everything that was lent before the host booted.
    fn turn_over(&self) -> io::Result<()> {
        let mut books = self.lock();
        let now = boot_id()?;
        if books.boot_id != now {
            books.boot_id = now;
            books.loans.iter_mut().for_each(|loan| loan.holders.clear());
            self.settle(&mut books)?;
        }
        Ok(())
    }

    fn is_lent(&self, found: &Found) -> bool {
        self.lock().loans.iter().any(|loan| loan.is(found))
    }

    /// Enters the needs into the ledger, then lends them.
    fn enter(&self, user: &RunAs, guest: Uuid, needs: &[Need]) -> Result<(), DriverError> {
        let needs: Vec<&Need> = needs.iter().filter(|need| need.lent).collect();
        if needs.is_empty() {
            return Ok(());
        }
        let mut books = self.lock();
        for need in &needs {
            let loan = loan(&mut books, user, need).map_err(|e| refuse_io(user, &need.found.real, &e))?;
            let before = loan.holders.get(&guest).is_some_and(|holder| holder.writes());
            loan.holders.insert(guest, Holder::Own { uid: user.uid, write: before || need.write });
            loan.plan(&need.found.fd).map_err(|e| refuse_io(user, &need.found.real, &e))?;
        }
        self.save(&books, true).map_err(|e| DriverError::Storage(format!("{}: {e}", self.file.display())))?;
        for need in needs {
            let set = books.loans.iter().find(|loan| loan.is(&need.found)).map(|loan| loan.apply(&need.found.fd));
            set.unwrap_or(Ok(())).map_err(|e| refuse_io(user, &need.found.real, &e))?;
        }
        Ok(())
    }

    /// Makes every loan what its holders need, drops those without holders, and saves.
    fn settle(&self, books: &mut Books) -> io::Result<()> {
        books.loans.retain_mut(|loan| match loan.settle() {
            Ok(()) => !loan.holders.is_empty(),
            Err(error) => {
                tracing::warn!(path = %loan.path.display(), %error, "a lent file cannot be given back");
                true
            }
        });
        // Lost with a host that loses power, it is done again when the host is back.
        self.save(books, false)
    }

    /// Replaces the file; `durably`: a host that loses power has all of it, or what was there before.
    fn save(&self, books: &Books, durably: bool) -> io::Result<()> {
        let dir = self.file.parent().unwrap_or(Path::new("/"));
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(&serde_json::to_vec(books)?)?;
        if durably {
            file.as_file().sync_all()?;
        }
        file.persist(&self.file)?;
        Ok(())
    }
}

/// Begins anew, and says what may have to be done by hand.
fn put_aside(file: &Path, error: &serde_json::Error) -> io::Result<Books> {
    let aside = file.with_extension("broken");
    std::fs::rename(file, &aside)?;
    let aside = aside.display();
    tracing::error!(
        "the ledger of lent files cannot be read ({error}); it is kept as {aside}, and what it says was lent stays lent"
    );
    Ok(Books::default())
}

/// The loan of a file, a new one if it is not lent yet.
fn loan<'a>(books: &'a mut Books, user: &RunAs, need: &Need) -> io::Result<&'a mut Loan> {
    let at = match books.loans.iter().position(|loan| loan.is(&need.found)) {
        Some(at) => at,
        None => {
            let before = Acl::of(&need.found.fd)?.to_bytes();
            books.loans.push(Loan {
                path: need.found.real.clone(),
                dev: need.found.stat.st_dev,
                ino: need.found.stat.st_ino,
                handle: Handle::of(&need.found.fd).ok(),
                uid: user.uid,
                after: before.clone(),
                before,
                holders: BTreeMap::new(),
            });
            books.loans.len() - 1
        }
    };
    books.loans.get_mut(at).ok_or_else(|| io::Error::other("the loan is lost"))
}

/// What has been found out about the files of one guest.
struct Survey<'a> {
    ledger: &'a Ledger,
    user: &'a RunAs,
    needs: Vec<Need>,
    seen: BTreeSet<(PathBuf, bool)>,
}

impl Survey<'_> {
    /// Adds what `want` needs.
    fn collect(&mut self, want: &Want, chosen_by: Option<u32>) -> Result<(), DriverError> {
        let failed = |e: io::Error| DriverError::Storage(format!("{}: {e}", want.path.display()));
        let found = Found::resolve(&want.path).map_err(failed)?;
        if !self.seen.insert((want.path.clone(), want.write)) {
            return Ok(());
        }
        if self.seen.len() > MAX_FILES {
            return Err(DriverError::Storage(format!("{}: too many images stand on one another", want.path.display())));
        }
        let open = self.user.reach(|| may_open(&found.fd, want.write)).map_err(failed)?;
        let (owner, next) = (found.stat.st_uid, if want.backing { named_in(&found, want)? } else { Vec::new() });
        let lent = !open || self.ledger.is_lent(&found);
        if lent {
            let own = want.device && found.kind() == FileType::CharacterDevice;
            if let Some(why) = found.objection(chosen_by, own) {
                return Err(refuse(self.user, &want.path, &why));
            }
        }
        self.needs.push(Need { found, path: want.path.clone(), write: want.write, lent });
        next.iter().try_for_each(|want| self.collect(want, Some(owner)))
    }
}

/// The files that an image's header names.
fn named_in(found: &Found, want: &Want) -> Result<Vec<Want>, DriverError> {
    if !matches!(found.kind(), FileType::RegularFile | FileType::BlockDevice) {
        return Ok(Vec::new());
    }
    let read = || {
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(through(&found.fd))?;
        behind(&file, &want.path)
    };
    let named = read().map_err(|e| DriverError::Storage(format!("{}: {e}", want.path.display())))?;
    let as_want = |b: Behind| Want { path: b.path, write: b.data && want.write, backing: !b.data, device: false };
    Ok(named.into_iter().map(as_want).collect())
}

/// Whether the user can open them now; if not, why not.
fn verify(user: &RunAs, needs: &[Need]) -> Result<(), DriverError> {
    for Need { found, write, .. } in needs.iter().filter(|need| need.lent) {
        if !user.reach(|| may_open(&found.fd, *write)).map_err(|e| refuse_io(user, &found.real, &e))? {
            return Err(refuse(user, &found.real, "its own permissions or its file system forbid it"));
        }
    }
    Ok(())
}

fn refuse(user: &RunAs, path: &Path, why: &str) -> DriverError {
    let (path, user) = (path.display(), &user.name);
    DriverError::Storage(format!("{path} cannot be opened to user '{user}', who runs QEMU: {why}"))
}

fn refuse_io(user: &RunAs, path: &Path, error: &io::Error) -> DriverError {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => {
            let group = user.gid;
            let remedy = format!("make it accessible by owner or group (chgrp {group} …)");
            refuse(user, path, &format!("its file system keeps no access control lists; {remedy}"))
        }
        _ => refuse(user, path, &error.to_string()),
    }
}

impl Loan {
    fn is(&self, found: &Found) -> bool {
        (self.dev, self.ino) == (found.stat.st_dev, found.stat.st_ino)
    }

    /// Works out the list that the holders need.
    fn plan(&mut self, fd: &OwnedFd) -> io::Result<()> {
        let now = Acl::of(fd)?;
        let ours = [&self.before, &self.after].contains(&&now.to_bytes());
        // Somebody else has changed it meanwhile: that is what will remain.
        let before = match ours {
            true => Acl::from_bytes(&self.before)?,
            false => self.users()?.into_iter().fold(now, |list, uid| list.without_user(uid)),
        };
        let mut wanted: BTreeMap<u32, u16> = BTreeMap::new();
        for holder in self.holders.values() {
            let perm = if holder.writes() { READ | WRITE } else { READ };
            *wanted.entry(holder.uid(self.uid)).or_default() |= perm;
        }
        let after = wanted.into_iter().fold(before.clone(), |list, (uid, perm)| list.with_user(uid, perm));
        (self.before, self.after) = (before.to_bytes(), after.to_bytes());
        Ok(())
    }

    /// Who has an entry of ours.
    fn users(&self) -> io::Result<Vec<u32>> {
        let before = Acl::from_bytes(&self.before)?.users();
        let after = Acl::from_bytes(&self.after)?.users();
        let holders = self.holders.values().map(|holder| holder.uid(self.uid));
        Ok(after.into_iter().chain(holders).filter(|uid| !before.contains(uid)).collect())
    }

    fn apply(&self, fd: &OwnedFd) -> io::Result<()> {
        Acl::from_bytes(&self.after)?.set(fd)
    }

    /// Plans and applies; a file that has gone needs nothing.
    fn settle(&mut self) -> io::Result<()> {
        let Some(fd) = self.find()? else { return Ok(()) };
        self.plan(&fd)?;
        self.apply(&fd)
    }

    /// The file, where it was or by its handle.
    fn find(&self) -> io::Result<Option<OwnedFd>> {
        if is_still(&self.path, self.dev, self.ino) {
            let fd = openat(CWD, &self.path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
            if self.is_behind(&fd)? {
                return Ok(Some(fd));
            }
        }
        let Some(fd) = self.handle.as_ref().and_then(|handle| handle.open(&self.path, self.dev)) else {
            return Ok(None);
        };
        Ok(self.is_behind(&fd)?.then_some(fd))
    }

    fn is_behind(&self, fd: &OwnedFd) -> io::Result<bool> {
        let stat = fstat(fd)?;
        Ok((stat.st_dev, stat.st_ino) == (self.dev, self.ino))
    }
}

impl Holder {
    fn uid(self, common: u32) -> u32 {
        if let Holder::Own { uid, .. } = self { uid } else { common }
    }

    fn writes(self) -> bool {
        match self {
            Holder::Common(write) | Holder::Own { write, .. } => write,
        }
    }
}

#[cfg(test)]
#[path = "access_tests.rs"]
mod tests;
