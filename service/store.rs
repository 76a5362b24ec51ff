//! What is kept on disk, and where. Every file is replaced in one step: written beside, synced, renamed, folder synced. What
//! belongs together in one folder is written together: all are synced, then renamed in order, and the folder is synced once.
//!
//! ```text
//!  <state>/domains/<uuid>.xml     the stored configuration, with passwords; its presence makes a domain persistent
//!  <state>/domains/<uuid>.json    what XML has no word for: owner, autostart (written first); and what is to be known of a
//!                                 configuration that cannot be read: name, driver
//!  <state>/hosts/<name>/          what was last seen of other hosts' machines: see `store/hosts.rs`
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
mod files;
mod hosts;
mod managed;
mod nodedev;
mod snapshots;
mod status;

pub(crate) use autostart::Autostarting;
pub(crate) use documents::{Documents, DraftedDocument, Folder, FoundDocument};
pub(crate) use files::Unsynced;
pub(crate) use hosts::{HostedChange, HostedNote};
pub(crate) use snapshots::{Backup, BlockRecord, Current, Deed, Intent, Loaded, Record};
pub(crate) use status::{Adjusting, Status, StatusFile, StoredChange};

use crate::error::{Error, Result};
use crate::stored::StoredDef;
use crate::time::now_usec;
use files::{
    Draft, change_all, json, read_bytes, read_json, remove, remove_unfinished, replace, replace_at_once, replace_json,
    sync_folder, unlink,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::Driver;
use virt_model::state::StateReason;
use virt_model::xml::Limits;

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

/// A configuration's text and note that are being written.
pub(crate) type DraftToCome = tokio::task::JoinHandle<Result<DraftedDocument>>;

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

impl Note {
    /// Of a domain that has just been defined.
    pub fn of(owner: u32, name: &str, driver: &dyn Driver) -> Note {
        Note { owner, autostart: false, name: name.to_owned(), driver: driver.name().to_owned() }
    }
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

    /// Has a configuration's text and note on disk, for [`Store::put_definition`].
    pub fn draft_definition(&self, uuid: Uuid, text: String, note: &Note) -> Result<DraftedDocument> {
        self.definitions().draft(uuid, text, note)
    }

    /// As [`Store::save_definition`], of a domain of which none is stored; with what was drafted where that is the same.
    pub fn put_definition(
        &self,
        draft: Option<DraftedDocument>,
        uuid: Uuid,
        stored: &StoredDef,
        note: &Note,
    ) -> Result<()> {
        self.definitions().put(draft, uuid, &stored.text(), note)
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

/// Runs file work where it may block.
pub(crate) async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(Error::Internal(format!("file work failed: {e}"))),
    }
}
