//! Files lent to the hypervisor's user while a guest runs, and given back afterwards.
//!
//! A file that the user cannot open gets one more entry in its access control list; owner, group and everybody else keep
//! what they had. Why not change the owner, as libvirt does: an entry can be taken away without knowing what was before,
//! guests of different users can share a file, and the file's owner keeps it. Directories are never changed: a guest finds
//! its files behind its wall ([`super::wall`]), and there are no others on the way to them.
//!
//! The ledger on disk says which files are lent to which guests. It is written before a file is lent and after it is
//! given back, so a virtd that is killed in between lends nothing for ever: the guest's record makes the next virtd give
//! back what its start had taken, and a reboot of the host, which no guest survives, makes everything due
//! ([`Ledger::due`]). A file is found again by its handle, so that one which was renamed meanwhile is given back too.
//!
//! ```text
//!   books (in memory and on disk): held for moments, never while a guest's file is touched
//!   the turn of a file: held while its list is read, worked out and set; waits for that file's file system, nobody else's
//! ```
//!
//! Whose files may be lent: see [`super::resolve`]. What an image's header names is not lent: the chain of a disk is what
//! its definition says.

use super::acl::{Acl, READ, WRITE};
use super::handle::Handle;
use super::own_file::replace_json;
use super::process::boot_id;
use super::resolve::{Found, is_still, may_open};
use super::user::RunAs;
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use uuid::Uuid;
use virt_model::driver::DriverError;

/// Files of one guest.
const MAX_FILES: usize = 512;

/// A file a guest needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// Where it is.
    pub path: PathBuf,
    /// To be written, too.
    pub write: bool,
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

    /// What is at `path`, for a process with our own rights: whatever that means to us, it may mean to it. `None` if nothing is
    /// there. Errors name no path.
    pub fn ours(path: &Path, write: bool) -> io::Result<Option<LentFile>> {
        let fd = match openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
            fd => fd?,
        };
        let kind = FileType::from_raw_mode(fstat(&fd)?.st_mode);
        Ok(Some(LentFile { path: path.to_owned(), fd: Arc::new(fd), write, kind }))
    }

    /// Plain file, block device, …
    pub fn kind(&self) -> FileType {
        self.kind
    }
}

/// A file, whatever it is called: its device and its number there.
type FileId = (u64, u64);

/// A file that was lent before the host booted.
#[derive(Clone, Debug)]
pub struct Due {
    /// To whose guest.
    pub guest: Uuid,
    /// Where it was.
    pub path: PathBuf,
    file: FileId,
}

/// Which files are lent to which guests. All methods but [`Ledger::due`] block, and those that lend and give back do so for
/// as long as the file systems of the files that they are about.
pub struct Ledger {
    file: PathBuf,
    books: Mutex<Books>,
    /// Whose access control lists are just being changed: each by one at a time.
    turns: Mutex<HashMap<FileId, Weak<Mutex<()>>>>,
    due: Mutex<Vec<Due>>,
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
    /// The list that we gave it last, which may not be `after` yet.
    #[serde(default)]
    set: Vec<u8>,
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
    /// Opens the ledger `access.json` in `dir`. What was lent before the host booted is due. A ledger that cannot be read, as
    /// a host that lost power may leave it, is put aside: no guest should have to wait for its repair. No file of a guest's is
    /// touched.
    pub fn open(dir: &Path) -> io::Result<Ledger> {
        std::fs::create_dir_all(dir)?;
        let file = dir.join("access.json");
        let mut books = match std::fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text).or_else(|error| put_aside(&file, &error))?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Books::default(),
            Err(e) => return Err(e),
        };
        let due = books.turn_over(boot_id()?);
        Ok(Ledger {
            file,
            books: Mutex::new(books),
            turns: Mutex::default(),
            due: Mutex::new(due),
            beside: Mutex::default(),
        })
    }

    /// What nobody has any more and was not given back, since the host has booted meanwhile, or it could not be. Each is told
    /// once, for [`Ledger::give_back_one`].
    pub fn due(&self) -> Vec<Due> {
        std::mem::take(&mut *self.due.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Gives back one file that is due, to those who have not borrowed it anew. If that fails it stays in the ledger, and is
    /// due when that is opened again.
    pub fn give_back_one(&self, due: &Due) -> io::Result<()> {
        self.settle(due.file, None)?;
        self.save(&self.lock(), false)
    }

    /// Makes every file of `wants` accessible to `user` for `guest`, or none: then the error names the file and the remedy.
    /// What is returned are they and what their headers name, lent or open to the user anyway.
    pub fn lend(&self, user: &RunAs, guest: Uuid, wants: &[Want]) -> Result<Vec<LentFile>, DriverError> {
        self.lend_beside(BTreeSet::new(), user, guest, wants)
    }

    /// The same for files that a running guest needs in addition: what it was lent before stays so in any case.
    pub fn lend_more(&self, user: &RunAs, guest: Uuid, wants: &[Want]) -> Result<Vec<LentFile>, DriverError> {
        let before = self.lock().of(guest);
        self.lend_beside(before, user, guest, wants)
    }

    /// Lends `wants`; where that fails, all that `guest` was lent is taken back, except `kept`.
    fn lend_beside(
        &self,
        kept: BTreeSet<FileId>,
        user: &RunAs,
        guest: Uuid,
        wants: &[Want],
    ) -> Result<Vec<LentFile>, DriverError> {
        let mut survey = Survey { ledger: self, user, needs: Vec::new(), seen: BTreeSet::new() };
        for want in wants {
            survey.collect(want)?;
        }
        let needs = survey.needs;
        let lent = self.enter(user, guest, &needs).and_then(|()| verify(user, &needs));
        if lent.is_err() {
            self.take_back(guest, |file| !kept.contains(file));
        }
        lent.map(|()| needs.into_iter().map(Need::file).collect())
    }

    /// Takes back what `guest` was lent. What cannot be taken back is logged and kept in the ledger.
    pub fn give_back(&self, guest: Uuid) {
        self.take_back(guest, |_| true);
    }

    /// The same of these files alone, unless they are `kept` under another name. What is kept and lent under its own name is
    /// another file and not looked at: its storage may not answer.
    pub fn give_back_these(&self, guest: Uuid, paths: &[PathBuf], kept: &BTreeSet<PathBuf>) {
        let file = |path: &PathBuf| Found::resolve(path).ok().map(|found| (found.stat.st_dev, found.stat.st_ino));
        let these: BTreeSet<FileId> = paths.iter().filter_map(file).collect();
        let others: BTreeSet<PathBuf> = {
            let books = self.lock();
            let others = books.loans.iter().filter(|loan| loan.holders.contains_key(&guest));
            others.filter(|loan| !these.contains(&loan.file())).map(|loan| loan.path.clone()).collect()
        };
        let kept: BTreeSet<FileId> = kept.difference(&others).filter_map(file).collect();
        self.take_back(guest, |file| these.contains(file) && !kept.contains(file));
    }

    fn take_back(&self, guest: Uuid, which: impl Fn(&FileId) -> bool) {
        let mut files = Vec::new();
        for loan in self.lock().loans.iter_mut().filter(|loan| which(&loan.file())) {
            if loan.holders.remove(&guest).is_some() {
                files.push((loan.file(), loan.path.clone()));
            }
        }
        if files.is_empty() {
            return;
        }
        for (file, path) in files {
            if let Err(error) = self.settle(file, None) {
                tracing::warn!(path = %path.display(), %error, "a lent file cannot be given back");
            }
        }
        // Lost with a host that loses power, it is done again when the host is back.
        if let Err(error) = self.save(&self.lock(), false) {
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

    fn is_lent(&self, found: &Found) -> bool {
        self.lock().loans.iter().any(|loan| loan.is(found))
    }

    /// Enters the needs into the ledger, then lends them.
    fn enter(&self, user: &RunAs, guest: Uuid, needs: &[Need]) -> Result<(), DriverError> {
        let needs: Vec<&Need> = needs.iter().filter(|need| need.lent).collect();
        if needs.is_empty() {
            return Ok(());
        }
        let lists = needs.iter().map(|need| {
            let list = Acl::of(&need.found.fd).map_err(|e| refuse_io(user, &need.found.real, &e));
            list.map(|list| (*need, list.to_bytes(), Handle::of(&need.found.fd).ok()))
        });
        let lists: Vec<_> = lists.collect::<Result<_, _>>()?;
        let mut books = self.lock();
        for (need, list, handle) in lists {
            let loan = books.loan(user, need, list, handle);
            let before = loan.holders.get(&guest).is_some_and(|holder| holder.writes());
            loan.holders.insert(guest, Holder::Own { uid: user.uid, write: before || need.write });
            // Our entries are known to whoever reads the ledger, also if we come no further.
            loan.plan(None).map_err(|e| refuse_io(user, &need.found.real, &e))?;
        }
        self.save(&books, true).map_err(|e| DriverError::Storage(format!("{}: {e}", self.file.display())))?;
        drop(books);
        for need in needs {
            let file = (need.found.stat.st_dev, need.found.stat.st_ino);
            self.settle(file, Some(&need.found.fd)).map_err(|e| refuse_io(user, &need.found.real, &e))?;
        }
        Ok(())
    }

    /// Gives a file the list that its holders need, and drops its loan if it has none. It is found by its loan if `held` is
    /// `None`; one that has gone needs nothing. Waits for its file system, with its turn and no other lock.
    fn settle(&self, file: FileId, held: Option<&OwnedFd>) -> io::Result<()> {
        let turn = self.turn(file);
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(loan) = self.lock().loans.iter().find(|loan| loan.file() == file).cloned() else { return Ok(()) };
        let found = if held.is_none() { loan.find()? } else { None };
        if let Some(fd) = held.or(found.as_ref()) {
            let now = Acl::of(fd)?;
            let planned = {
                let mut books = self.lock();
                let loan = books.loans.iter_mut().find(|loan| loan.file() == file);
                let Some(loan) = loan else { return Ok(()) };
                loan.plan(Some(now))?;
                Acl::from_bytes(&loan.after)?
            };
            planned.set(fd)?;
            let mut books = self.lock();
            books.loans.iter_mut().filter(|loan| loan.file() == file).for_each(|loan| loan.set = planned.to_bytes());
        }
        // Somebody may have borrowed it meanwhile, and waits for its turn.
        self.lock().loans.retain(|loan| loan.file() != file || !loan.holders.is_empty());
        Ok(())
    }

    /// The turn of a file.
    fn turn(&self, file: FileId) -> Arc<Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = turns.get(&file).and_then(Weak::upgrade).unwrap_or_default();
        turns.insert(file, Arc::downgrade(&turn));
        turn
    }

    /// Replaces the file; `durably`: a host that loses power has all of it, or what was there before.
    fn save(&self, books: &Books, durably: bool) -> io::Result<()> {
        replace_json(&self.file, books, durably)
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

impl Books {
    /// Takes everything from guests that ran before the host booted. What nobody has is due.
    fn turn_over(&mut self, boot_id: String) -> Vec<Due> {
        let booted = self.boot_id != boot_id;
        let mut due = Vec::new();
        for loan in &mut self.loans {
            // Whose it was is lost where giving back was begun and not finished.
            let guest = loan.holders.keys().next().copied().unwrap_or_default();
            if booted {
                loan.holders.clear();
            }
            if loan.holders.is_empty() {
                due.push(Due { guest, path: loan.path.clone(), file: loan.file() });
            }
        }
        self.boot_id = boot_id;
        due
    }

    /// What a guest was lent.
    fn of(&self, guest: Uuid) -> BTreeSet<FileId> {
        self.loans.iter().filter(|loan| loan.holders.contains_key(&guest)).map(Loan::file).collect()
    }

    /// The loan of a file, a new one if it is not lent yet; `list` is what it has now.
    fn loan(&mut self, user: &RunAs, need: &Need, list: Vec<u8>, handle: Option<Handle>) -> &mut Loan {
        let at = self.loans.iter().position(|loan| loan.is(&need.found)).unwrap_or(self.loans.len());
        if at == self.loans.len() {
            self.loans.push(Loan {
                path: need.found.real.clone(),
                dev: need.found.stat.st_dev,
                ino: need.found.stat.st_ino,
                handle,
                uid: user.uid,
                after: list.clone(),
                set: list.clone(),
                before: list,
                holders: BTreeMap::new(),
            });
        }
        &mut self.loans[at]
    }
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
    fn collect(&mut self, want: &Want) -> Result<(), DriverError> {
        let failed = |e: io::Error| DriverError::Storage(format!("{}: {e}", want.path.display()));
        let found = Found::resolve(&want.path).map_err(failed)?;
        if !self.seen.insert((want.path.clone(), want.write)) {
            return Ok(());
        }
        if self.seen.len() > MAX_FILES {
            return Err(DriverError::Storage(format!(
                "{}: a guest has at most {MAX_FILES} files",
                want.path.display()
            )));
        }
        let open = self.user.reach(|| may_open(&found.fd, want.write)).map_err(failed)?;
        let lent = !open || self.ledger.is_lent(&found);
        if lent {
            let own = want.device && found.kind() == FileType::CharacterDevice;
            if let Some(why) = found.objection(None, own) {
                return Err(refuse(self.user, &want.path, &why));
            }
        }
        self.needs.push(Need { found, path: want.path.clone(), write: want.write, lent });
        Ok(())
    }
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
    fn file(&self) -> FileId {
        (self.dev, self.ino)
    }

    fn is(&self, found: &Found) -> bool {
        self.file() == (found.stat.st_dev, found.stat.st_ino)
    }

    /// Works out the list that the holders need; `now` is the one that the file has, if somebody may have changed it.
    fn plan(&mut self, now: Option<Acl>) -> io::Result<()> {
        let before = match now {
            // Somebody else has changed it meanwhile: that is what will remain.
            Some(now) if ![&self.before, &self.after, &self.set].contains(&&now.to_bytes()) => {
                self.users()?.into_iter().fold(now, |list, uid| list.without_user(uid))
            }
            _ => Acl::from_bytes(&self.before)?,
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
