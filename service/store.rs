//! What is kept on disk, and where. Every file is replaced in one step: written beside, synced, renamed, folder synced. What
//! belongs together in one folder is written together: all are synced, then renamed in order, and the folder is synced once.
//!
//! ```text
//!  <state>/domains/<uuid>.xml     the stored configuration, with passwords; its presence makes a domain persistent
//!  <state>/domains/<uuid>.json    what XML has no word for: owner, autostart (written first); and what is to be known of a
//!                                 configuration that cannot be read: name, driver
//!  <state>/networks/, pools/, secrets/   the same of those kinds: see `store/documents.rs`
//!  <state>/snapshots/<uuid>/      a domain's snapshots: see `store/snapshots.rs`
//!  <state>/saved/<uuid>.virtsave  a domain's managed save, which its driver writes and reads: see `store/managed.rs`
//!  <state>/runs                   how often virtd has been started: no job's number is used again
//!  <runtime>/status/<uuid>.json   what runs: live configuration, id, the driver's record
//!  <runtime>/ended/<uuid>.json    how its last guest ended, if that was since the host booted
//!  <runtime>/guests/<uuid>/       the driver's sockets
//!  <runtime>/pools/               the documents with which storage pools are active
//!  <runtime>/autostart{ing,ed}     what has been started with the host since it booted: see `store/autostart.rs`
//!  <log>/<uuid>.log               the hypervisor's own output
//! ```
//!
//! What could not be read again is not written: whoever stores a document learns here that the reader would refuse it.

mod autostart;
mod documents;
mod managed;
mod nodedev;
mod snapshots;

pub(crate) use autostart::Autostarting;
pub(crate) use documents::{Documents, Folder, FoundDocument};
pub(crate) use snapshots::{Backup, BlockRecord, Current, Deed, Intent, Loaded, Record};

use crate::error::{Error, Result};
use crate::lock::lock;
use crate::stored::StoredDef;
use crate::time::now_usec;
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use uuid::Uuid;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::{Adjustment, Recorder};
use virt_model::state::{DomainState, StateReason};
use virt_model::xml::{Limits, unreadable};

/// The folders of one virtd.
#[derive(Clone, Debug)]
pub struct Paths {
    /// What outlives the host's reboots.
    pub state: PathBuf,
    /// What does not.
    pub runtime: PathBuf,
    /// The hypervisors' output.
    pub log: PathBuf,
}

/// What XML has no word for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Note {
    pub owner: u32,
    pub autostart: bool,
    /// As in the configuration; empty in older notes.
    #[serde(default)]
    pub name: String,
    /// Whose it is; empty in older notes.
    #[serde(default)]
    pub driver: String,
}

/// A stored configuration as it was found.
#[derive(Debug)]
pub(crate) struct Stored {
    pub uuid: Uuid,
    pub note: Note,
    pub found: Found,
}

/// What a stored configuration says.
#[derive(Debug)]
pub(crate) enum Found {
    Sound {
        name: String,
        kind: String,
        stored: Box<StoredDef>,
    },
    /// Why it cannot be used, and its name and type as far as they can be made out.
    Broken {
        why: String,
        name: Option<String>,
        kind: Option<String>,
    },
}

/// More jobs than a virtd can have begun when it ends: nearly three years of ten a second.
const JOBS_OF_A_RUN: u64 = 1_000_000_000;

/// The largest file of our own that is read, in bytes.
const MAX_FILE: u64 = 64 << 20;

/// Why a domain is shut off, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ended {
    pub reason: StateReason,
    pub since_usec: u64,
}

impl Ended {
    /// Of one that has not run since the host booted; `managed_save`: it has one.
    pub fn never(managed_save: bool) -> Ended {
        let reason = if managed_save { StateReason::Saved } else { StateReason::Unknown };
        Ended { reason, since_usec: now_usec() }
    }
}

/// What is known of a running guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub driver: String,
    pub id: u32,
    pub owner: u32,
    pub state: DomainState,
    pub reason: StateReason,
    pub since_usec: u64,
    /// The bus name whose departure ends the guest; empty for a caller without one, who is gone by now.
    pub autodestroy: Option<String>,
    /// The live configuration, with passwords.
    pub live: String,
    /// What the guest was asked to let go of, by its name, and the element that then goes from what is stored, too.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub leaving: BTreeMap<String, Option<String>>,
    /// What is being changed on it without being plugged: until `live` says so, or it is as before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adjusting: Option<Adjusting>,
    /// The driver's own; absent until the driver has something to lose.
    pub record: Option<serde_json::Value>,
}

/// What is being changed on a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Adjusting {
    /// The live configuration as it is to be, with passwords.
    pub after: String,
    /// In what the guest is to follow.
    pub what: Vec<Adjustment>,
    /// What is to be stored beside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<StoredChange>,
    /// The device that it is being given: once it has that, all that may be missing is what is to be stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The guest has followed, and `live` says so: all that may be missing is what is to be stored.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub followed: bool,
}

/// A stored configuration and what comes in its place, as texts with passwords.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StoredChange {
    pub before: String,
    pub after: String,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Store {
    paths: Paths,
}

impl Store {
    /// Makes the folders. Where they are on a file system that cannot be written, what is there is served, and each change that
    /// would have to be kept is refused when it comes to that.
    pub fn open(paths: Paths) -> Result<Store> {
        let store = Store { paths };
        let documents = Folder::ALL.map(|folder| (store.documents(folder).folder().to_owned(), 0o700));
        for (folder, mode) in documents.into_iter().chain([
            (store.paths.state.join("snapshots"), 0o711),
            (store.managed_saves(), 0o700),
            (store.paths.runtime.join("status"), 0o700),
            (store.paths.runtime.join("ended"), 0o700),
            (store.active_pools().folder().to_owned(), 0o700),
            (store.paths.runtime.join("guests"), 0o711),
            (store.detached_folder(), 0o700),
            (store.paths.log.clone(), 0o700),
        ]) {
            let made = fs::DirBuilder::new()
                .recursive(true)
                .mode(if mode == 0o700 { 0o755 } else { mode })
                .create(&folder)
                .and_then(|()| fs::set_permissions(&folder, fs::Permissions::from_mode(mode)))
                .and_then(|()| remove_unfinished(&folder));
            match made {
                Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                    tracing::error!("{}; what is there is served", Error::from_io("write to", &folder, &e));
                }
                made => made.map_err(|e| Error::from_io("make the folder", &folder, &e))?,
            }
        }
        Ok(store)
    }

    /// The folders in which nobody else makes files: of what is kept, those first that are in another.
    pub fn own_folders(&self) -> Vec<PathBuf> {
        let documents = Folder::ALL.map(|folder| self.documents(folder).folder().to_owned());
        let rest = [self.paths.state.join("snapshots"), self.paths.state.clone()];
        [self.managed_saves()].into_iter().chain(documents).chain(rest).collect()
    }

    /// The documents of a kind of object.
    pub fn documents(&self, folder: Folder) -> Documents {
        Documents(self.paths.state.join(folder.name()))
    }

    /// The documents with which storage pools are active, since the host booted.
    pub fn active_pools(&self) -> Documents {
        Documents(self.paths.runtime.join("pools"))
    }

    /// Stores a configuration and its note.
    pub fn save_definition(&self, uuid: Uuid, stored: &StoredDef, note: &Note) -> Result<()> {
        self.definitions().save(uuid, &stored.text(), note)
    }

    pub fn save_note(&self, uuid: Uuid, note: &Note) -> Result<()> {
        self.definitions().save_note(uuid, note)
    }

    /// Removes a configuration, then what goes with it. On failure it is there still; of what goes with it, what cannot be
    /// removed now means nothing without it.
    pub fn remove_definition(&self, uuid: Uuid) -> Result<()> {
        self.definitions().remove(uuid)?;
        remove(&self.ended_file(uuid)).unwrap_or_else(|e| tracing::warn!(%uuid, "{e}"));
        Ok(())
    }

    /// All configurations with their notes. One that cannot be read is logged and left alone, and is among them.
    pub fn load_definitions(&self) -> Result<Vec<Stored>> {
        let uuids = self.definitions().uuids()?;
        let readers = std::thread::available_parallelism().map_or(1, usize::from);
        let share = uuids.len().div_ceil(readers).max(1);
        let found = std::thread::scope(|scope| {
            let read = |share: &[Uuid]| share.iter().map(|uuid| self.load_definition(*uuid)).collect::<Vec<_>>();
            let readers: Vec<_> = uuids.chunks(share).map(|share| scope.spawn(move || read(share))).collect();
            let found = readers.into_iter().map(|reader| reader.join());
            found.map(|found| found.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked))).collect::<Vec<_>>()
        });
        self.definitions().remove_lonely_notes();
        Ok(found.into_iter().flatten().collect())
    }

    fn load_definition(&self, uuid: Uuid) -> Stored {
        let note = self.definitions().load_note(uuid);
        let found = read_definition(&self.definitions().document(uuid), uuid);
        if let Found::Broken { why, .. } = &found {
            tracing::error!(%uuid, "its stored configuration is left alone: {why}");
        }
        Stored { uuid, note, found }
    }

    /// All guests that ran when virtd was last here, or may have: what was noted of each, or why that cannot be read; nothing
    /// where there only is a driver's folder, so that its start had begun.
    pub fn load_statuses(&self) -> Result<BTreeMap<Uuid, Option<Result<Status>>>> {
        let noted = uuids(&self.paths.runtime.join("status"), "json")?;
        let mut found: BTreeMap<Uuid, Option<Result<Status>>> =
            noted.into_iter().map(|uuid| (uuid, Some(read_json(&self.status(uuid))))).collect();
        for uuid in uuids(&self.paths.runtime.join("guests"), "")? {
            found.entry(uuid).or_insert(None);
        }
        Ok(found)
    }

    /// A status file, not yet written.
    pub fn status_file(&self, uuid: Uuid, status: Status) -> Arc<StatusFile> {
        self.status_file_as(uuid, Kept { status, start: None })
    }

    /// The status of a guest that is being started; [`StatusFile::started`] ends that.
    pub fn status_file_of_start(&self, uuid: Uuid, status: Status) -> Arc<StatusFile> {
        self.status_file_as(uuid, Kept { status, start: Some(None) })
    }

    fn status_file_as(&self, uuid: Uuid, kept: Kept) -> Arc<StatusFile> {
        let (path, saved) = (self.status(uuid), self.managed_save(uuid));
        Arc::new(StatusFile { path, saved, kept: Mutex::new(Some(kept)), marked: watch::Sender::default() })
    }

    /// Makes the driver's folder for one guest. What an earlier guest may have left in it is the driver's to remove.
    pub fn make_runtime_dir(&self, uuid: Uuid) -> Result<PathBuf> {
        let folder = self.runtime_dir(uuid);
        let made = match fs::DirBuilder::new().mode(0o711).create(&folder) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        };
        made.and_then(|()| fs::set_permissions(&folder, fs::Permissions::from_mode(0o711)))
            .map_err(|e| Error::from_io("make the folder", &folder, &e))?;
        Ok(folder)
    }

    pub fn runtime_dir(&self, uuid: Uuid) -> PathBuf {
        self.paths.runtime.join("guests").join(uuid.to_string())
    }

    pub fn log_file(&self, uuid: Uuid) -> PathBuf {
        self.paths.log.join(format!("{uuid}.log"))
    }

    /// How the last guest of a domain ended; `None` if it had none since the host booted.
    pub fn ended(&self, uuid: Uuid) -> Option<Ended> {
        read_json(&self.ended_file(uuid)).ok()
    }

    /// Keeps how a guest ended, or (with `None`) that nobody will ask any more.
    pub fn save_ended(&self, uuid: Uuid, ended: Option<Ended>) -> Result<()> {
        match ended {
            Some(ended) => replace_json(&self.ended_file(uuid), &ended),
            None => remove(&self.ended_file(uuid)),
        }
    }

    /// Forgets a guest that has gone: its folder, which the driver has emptied as far as it could, then its status.
    pub fn forget_guest(&self, uuid: Uuid) {
        let folder = self.runtime_dir(uuid);
        match fs::remove_dir(&folder) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%uuid, "{}", Error::from_io("remove", &folder, &e));
            }
            _ => {}
        }
        if let Err(e) = remove(&self.status(uuid)) {
            tracing::warn!(%uuid, "{e}");
        }
    }

    /// A number below those of all jobs of this run of virtd, and above those of all runs before. To be asked once a run.
    pub fn last_job(&self) -> u64 {
        let file = self.paths.state.join("runs");
        // Where that is not known, the seconds since the epoch are more than all runs there were.
        let seconds = now_usec() / 1_000_000;
        let run = match fs::read_to_string(&file) {
            Ok(text) => text.trim().parse::<u64>().unwrap_or(seconds),
            Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
            Err(_) => seconds,
        };
        let counted = replace(&file, run.saturating_add(1).to_string().as_bytes());
        let run = counted.map(|()| run).unwrap_or_else(|e| {
            tracing::warn!("{e}; the jobs of this run are numbered by the time");
            run.max(seconds)
        });
        run.saturating_mul(JOBS_OF_A_RUN)
    }

    fn definitions(&self) -> Documents {
        self.documents(Folder::Domains)
    }

    fn ended_file(&self, uuid: Uuid) -> PathBuf {
        self.paths.runtime.join("ended").join(format!("{uuid}.json"))
    }

    fn status(&self, uuid: Uuid) -> PathBuf {
        self.paths.runtime.join("status").join(format!("{uuid}.json"))
    }
}

/// The status of one guest, on disk and in memory.
#[derive(Debug)]
pub(crate) struct StatusFile {
    path: PathBuf,
    /// Its managed save, if there is one.
    saved: PathBuf,
    /// `None` once the guest has gone.
    kept: Mutex<Option<Kept>>,
    /// Its guest goes on from its managed save, which is kept.
    marked: watch::Sender<bool>,
}

#[derive(Clone, Debug)]
struct Kept {
    status: Status,
    /// While it is being started: the configuration that is written with the driver's next record, which can be read again.
    start: Option<Option<String>>,
}

impl StatusFile {
    /// Changes it and writes it. On failure it is as before. Nothing is written of a guest that has gone, nor a
    /// configuration that could not be read again: then the one before it, which could, is what finds the guest.
    pub fn update(&self, change: impl FnOnce(&mut Status)) -> Result<()> {
        self.write(|kept| {
            let before = kept.status.live.clone();
            change(&mut kept.status);
            if kept.status.live == before { Ok(()) } else { can_be_read_again(&kept.status.live) }
        })
    }

    /// The guest runs as `live` from now on. What is kept already is not written again.
    pub fn runs_as(&self, live: String) -> Result<()> {
        if lock(&self.kept).as_ref().is_some_and(|kept| kept.status.live == live) {
            return Ok(());
        }
        self.update(|status| {
            status.live = live;
            status.adjusting.iter_mut().for_each(|adjusting| adjusting.followed = false);
        })
    }

    /// The same after the guest has followed in what is being changed on it.
    pub fn runs_as_adjusted(&self, live: String) -> Result<()> {
        self.update(|status| {
            status.live = live;
            status.adjusting.iter_mut().for_each(|adjusting| adjusting.followed = true);
        })
    }

    /// The guest is about to be given a device, with which it runs as `live`; `noted`: what follows then.
    pub fn is_given(&self, live: String, noted: Option<Adjusting>) -> Result<()> {
        self.update(|status| (status.live, status.adjusting) = (live, noted))
    }

    /// What is being changed on the guest.
    pub fn adjusting(&self) -> Option<Adjusting> {
        lock(&self.kept).as_ref().and_then(|kept| kept.status.adjusting.clone())
    }

    /// The guest is up, and runs as `live`: gives since when, in µs since 1970. Writes that only where the driver's last
    /// record was not written with the same configuration; on failure the file is as before, and the time is now.
    pub fn started(&self, live: String) -> (u64, Result<()>) {
        let since_usec = {
            let mut kept = lock(&self.kept);
            let Some(kept) = kept.as_mut() else { return (now_usec(), Ok(())) };
            let said = kept.start.take().flatten();
            if said.is_some() && kept.status.record.is_some() && kept.status.live == live {
                return (kept.status.since_usec, Ok(()));
            }
            now_usec()
        };
        let written = self.update(|status| (status.live, status.since_usec) = (live, since_usec));
        (since_usec, written)
    }

    fn write(&self, change: impl FnOnce(&mut Kept) -> Result<()>) -> Result<()> {
        let mut kept = lock(&self.kept);
        let Some(mut changed) = kept.clone() else { return Ok(()) };
        change(&mut changed)?;
        replace_json(&self.path, &changed.status)?;
        *kept = Some(changed);
        Ok(())
    }

    /// The guest has gone: nothing is written from now on, nor is its managed save marked as used. Blocks while something is being
    /// written.
    pub fn close(&self) {
        lock(&self.kept).take();
    }

    /// Whether it has been kept that its guest goes on from its managed save; and, in time, that it has been.
    pub fn marked(&self) -> watch::Receiver<bool> {
        self.marked.subscribe()
    }
}

fn can_be_read_again(live: &str) -> Result<()> {
    let read = DomainDef::parse_within(live, Limits::STORED);
    let refused =
        |findings: Vec<_>| Error::OperationUnsupported(format!("what runs cannot be kept: {}", unreadable(&findings)));
    read.map(drop).map_err(refused)
}

impl Recorder for StatusFile {
    fn goes_on(&self) -> io::Result<()> {
        {
            // Whoever has closed it knows from then on what has become of the managed save.
            let kept = lock(&self.kept);
            if kept.is_none() {
                return Err(io::Error::other("its start has been given up"));
            }
            managed::is_used(&self.saved).map_err(|e| io::Error::other(e.to_string()))?;
        }
        self.marked.send_replace(true);
        managed::step_of_start(&self.saved);
        Ok(())
    }

    fn record(&self, record: serde_json::Value) -> io::Result<()> {
        let written = self.write(|kept| {
            kept.status.record = Some(record);
            if let Some(said) = &kept.start {
                kept.status.live = said.clone().unwrap_or_else(|| kept.status.live.clone());
                kept.status.since_usec = now_usec();
            }
            Ok(())
        });
        managed::step_of_start(&self.saved);
        written.map_err(|e| io::Error::other(e.to_string()))
    }

    fn will_run(&self, live: &DomainDef) {
        let Some(id) = lock(&self.kept).as_ref().map(|kept| kept.status.id) else { return };
        let text = DomainDef { id: Some(id), ..live.clone() }.write(Form::LIVE);
        // What cannot be kept is told when the start has returned.
        if can_be_read_again(&text).is_ok()
            && let Some(kept) = lock(&self.kept).as_mut()
        {
            kept.start = kept.start.take().map(|_| Some(text));
        }
    }
}

fn uuids(folder: &Path, extension: &str) -> Result<Vec<Uuid>> {
    let failed = |e: io::Error| Error::from_io("read", folder, &e);
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().unwrap_or_default() != extension {
            continue;
        }
        match path.file_stem().and_then(|s| s.to_str()).and_then(|s| Uuid::try_parse(s).ok()) {
            Some(uuid) => found.push(uuid),
            None => tracing::warn!("{} is not one of virtd's files; it is left alone", path.display()),
        }
    }
    found.sort();
    Ok(found)
}

/// A stored configuration, or why it cannot be used.
fn read_definition(path: &Path, uuid: Uuid) -> Found {
    let text = match read_bytes(path) {
        Ok(text) => text,
        Err(e) => {
            let why = Error::from_io("read", path, &e).to_string();
            return Found::Broken { why, name: None, kind: None };
        }
    };
    let text = String::from_utf8_lossy(&text);
    match DomainDef::parse_within(&text, Limits::STORED) {
        Ok(def) if def.uuid == uuid => {
            let stored = Box::new(StoredDef::new(&def, &text));
            Found::Sound { name: def.name, kind: def.kind, stored }
        }
        Ok(def) => {
            let why = format!("{} holds the domain {}", path.display(), def.uuid);
            Found::Broken { why, name: Some(def.name), kind: Some(def.kind) }
        }
        Err(findings) => {
            let first = findings.first().map(ToString::to_string).unwrap_or_default();
            let (def, _) = DomainDef::parse_leniently_within(&text, Limits::STORED);
            let (name, kind) = def.map(|def| (def.name, def.kind)).unzip();
            let why = format!("{} cannot be read: {first}", path.display());
            Found::Broken { why, name: name.filter(|name| !name.is_empty()), kind }
        }
    }
}

/// A plain file's content, as far as one of our own is read.
fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
    let file = fs::File::options().read(true).custom_flags(flags.bits()).open(path)?;
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(io::Error::other("it is no plain file"));
    }
    let mut content = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_FILE {
        return Err(io::Error::other(format!("it has more than {MAX_FILE} bytes")));
    }
    Ok(content)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = read_bytes(path).map_err(|e| Error::from_io("read", path, &e))?;
    serde_json::from_slice(&text).map_err(|e| Error::StorageFailed(format!("cannot read {}: {e}", path.display())))
}

fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(|e| Error::Internal(e.to_string()))
}

fn replace_json(path: &Path, value: &impl Serialize) -> Result<()> {
    replace(path, &json(value)?)
}

/// How the name of a file begins that has not replaced its predecessor yet.
const UNFINISHED: &str = ".new-";

/// Removes what a write left that was cut off.
fn remove_unfinished(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Runs file work where it may block.
pub(crate) async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(Error::Internal(format!("file work failed: {e}"))),
    }
}

/// Replaces a file in one step, mode 0600.
fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let (folder, name) = (path.parent(), path.file_name().and_then(|name| name.to_str()));
    let (folder, name) = (folder.unwrap_or(Path::new("/")), name.unwrap_or_default());
    change_all(folder, &[(name, content)], &[])
}

/// Replaces files of one folder, each in one step and in this order, mode 0600, and then removes those of `gone`, in this order. When this returns, all
/// of that is on disk: what is written together costs little more than one of it. One that is there already as it is to be
/// is left alone.
fn change_all(folder: &Path, files: &[(&str, &[u8])], gone: &[&str]) -> Result<()> {
    let failed = |name: &str, e: io::Error| Error::from_io("write", &folder.join(name), &e);
    let mut written = Vec::new();
    for (name, content) in files {
        if read_bytes(&folder.join(name)).is_ok_and(|there| there == *content) {
            continue;
        }
        let write = || {
            let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(folder)?;
            file.write_all(content)?;
            Ok(file)
        };
        written.push((*name, write().map_err(|e| failed(name, e))?));
    }
    if written.len() > 1 {
        // The disk begins with all of them before it is waited for the first: one step of its journal then holds them all.
        written.iter().for_each(|(_, file)| begin_to_write(file.as_file()));
    }
    for (name, file) in &written {
        file.as_file().sync_data().map_err(|e| failed(name, e))?;
    }
    for (name, file) in written {
        file.persist(folder.join(name)).map_err(|e| failed(name, e.error))?;
    }
    for name in gone {
        unlink(&folder.join(name))?;
    }
    sync_folder(folder)
}

/// Has the kernel begin to write a file to disk. That it does is only quicker, and waited for afterwards.
fn begin_to_write(file: &fs::File) {
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

fn sync_folder(folder: &Path) -> Result<()> {
    let synced = fs::File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|e| Error::from_io("sync the folder", folder, &e))
}

/// Removes a file; one that is not there is fine.
fn remove(path: &Path) -> Result<()> {
    if unlink(path)? { sync_folder(path.parent().unwrap_or(Path::new("/"))) } else { Ok(()) }
}

/// The same, on disk only with the next change of its folder. Whether it was there.
fn unlink(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        removed => removed.map(|()| true).map_err(|e| Error::from_io("remove", path, &e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn what_is_there_as_it_is_to_be_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let inode = |name: &str| fs::metadata(at(name)).expect("it is there").ino();
        change_all(folder.path(), &[("a", b"1"), ("b", b"1"), ("c", b"1")], &[]).expect("written");
        let before = (inode("a"), inode("b"));
        change_all(folder.path(), &[("a", b"1"), ("b", b"2")], &["c"]).expect("written");
        assert_eq!(inode("a"), before.0);
        assert_ne!(inode("b"), before.1);
        assert_eq!(fs::read(at("b")).expect("it is there"), b"2");
        assert!(!at("c").exists());
        change_all(folder.path(), &[], &["c"]).expect("what is not there need not go");
    }

    #[test]
    fn what_fails_takes_nothing_away() {
        let folder = tempfile::tempdir().expect("a folder");
        change_all(folder.path(), &[("a", b"1")], &[]).expect("written");
        let long = "x".repeat(300);
        assert!(change_all(folder.path(), &[(&long, b"2")], &["a"]).is_err());
        assert!(folder.path().join("a").exists(), "it goes last");
        let entries = fs::read_dir(folder.path()).expect("a folder").count();
        assert_eq!(entries, 1, "and nothing unfinished is left");
    }

    /// What a guest runs as is on disk with the driver's record, and nothing more is written once it is up.
    #[test]
    fn what_a_guest_will_run_as_is_written_with_the_record() {
        let (folder, file, mut live) = start();
        live.title = Some("as it runs".into());
        file.will_run(&live);
        file.record(1.into()).expect("written");
        let written = inode(&file);
        live.id = Some(7);
        let (since_usec, kept) = file.started(live.write(Form::LIVE));
        kept.expect("kept");
        assert_eq!(inode(&file), written, "nothing is written twice");
        let on_disk = status(&file);
        assert_eq!((on_disk.live, on_disk.since_usec), (live.write(Form::LIVE), since_usec));
        assert!(since_usec > 1, "since it is up, and not since it was wanted");
        // From now on the driver's record changes that alone.
        file.update(|status| (status.live, status.since_usec) = (live_named("later"), 2)).expect("written");
        file.record(2.into()).expect("written");
        let on_disk = status(&file);
        assert_eq!((on_disk.live, on_disk.since_usec, on_disk.record), (live_named("later"), 2, Some(2.into())));
        drop(folder);
    }

    #[test]
    fn what_a_guest_runs_as_is_written_when_it_is_up_if_it_was_not_said_before() {
        for said in [None, Some("other"), Some("toy")] {
            let (folder, file, live) = start();
            file.record(1.into()).expect("written");
            // After the last record: it is not on disk.
            said.iter().for_each(|name| file.will_run(&DomainDef { name: (*name).into(), ..live.clone() }));
            let (since_usec, kept) = file.started(live_named("toy"));
            kept.expect("kept");
            let on_disk = status(&file);
            assert_eq!((on_disk.live, on_disk.since_usec), (live_named("toy"), since_usec), "{said:?}");
            drop(folder);
        }
    }

    /// A start that is given up may still be about to mark its managed save: what is found then stays so.
    #[test]
    fn nothing_is_marked_for_a_start_that_has_been_given_up() {
        let (folder, file, _) = start();
        fs::write(&file.saved, b"saved").expect("written");
        file.close();
        assert!(file.goes_on().is_err());
        assert!(file.saved.exists() && !*file.marked().borrow());
        drop(folder);
        let (folder, file, _) = start();
        fs::write(&file.saved, b"saved").expect("written");
        file.goes_on().expect("it is wanted");
        assert!(!file.saved.exists() && *file.marked().borrow());
        drop(folder);
    }

    #[test]
    fn what_could_not_be_read_again_is_not_written() {
        let (folder, file, live) = start();
        let mut wrong = live.clone();
        wrong.name = "a/b\0".into();
        file.will_run(&wrong);
        file.record(1.into()).expect("written");
        assert_eq!(status(&file).live, live.write(Form::LIVE));
        let (_, kept) = file.started(wrong.write(Form::LIVE));
        assert!(kept.is_err());
        assert_eq!(status(&file).live, live.write(Form::LIVE));
        drop(folder);
    }

    const XML: &str = "<domain type='test'><name>toy</name><uuid>00000000-0000-0000-0000-000000000001</uuid>\
                       <memory>65536</memory><os><type>hvm</type></os></domain>";

    /// The status of a guest that is about to be started, since 1 µs.
    fn start() -> (tempfile::TempDir, Arc<StatusFile>, DomainDef) {
        let folder = tempfile::tempdir().expect("a folder");
        let live = DomainDef::parse_within(XML, Limits::STORED).expect("a definition");
        let status = Status {
            driver: "test".into(),
            id: 7,
            owner: 0,
            state: DomainState::Running,
            reason: StateReason::Booted,
            since_usec: 1,
            autodestroy: None,
            live: live.write(Form::LIVE),
            leaving: BTreeMap::new(),
            adjusting: None,
            record: None,
        };
        let kept = Mutex::new(Some(Kept { status, start: Some(None) }));
        let file = Arc::new(StatusFile {
            path: folder.path().join("status.json"),
            saved: folder.path().join("0.virtsave"),
            kept,
            marked: watch::Sender::default(),
        });
        (folder, file, live)
    }

    fn live_named(name: &str) -> String {
        let live = DomainDef::parse_within(XML, Limits::STORED).expect("a definition");
        DomainDef { id: Some(7), name: name.into(), ..live }.write(Form::LIVE)
    }

    fn status(file: &StatusFile) -> Status {
        serde_json::from_slice(&fs::read(&file.path).expect("it is there")).expect("a status")
    }

    fn inode(file: &StatusFile) -> u64 {
        fs::metadata(&file.path).expect("it is there").ino()
    }
}
