//! A domain's snapshots on disk, in `<state>/snapshots/<uuid>/`:
//!
//! ```text
//!  <name>.xml    the document, with passwords and the driver's record in its <cookie>
//!  .current      the name of the current one, if one is
//!  .backup       a backup under way: who asked for it, and what it is
//!  .checkpoints/ <name>.json, one a checkpoint
//!  .jobs         block jobs under way
//!  .intent       an operation under way: written before its first change, removed after its last
//!  .files/       what the driver keeps: copies of firmware variables and of TPMs' states
//! ```

use super::{
    Store, Unsynced, change_all, json, read_bytes, read_json, remove, remove_unfinished, replace, replace_at_once,
    replace_json, sync_folder, unlink,
};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use uuid::Uuid;
use virt_model::checkpoint::CheckpointDef;
use virt_model::driver::StoredFile;
use virt_model::driver::backup::BackupRequest;
use virt_model::driver::block_jobs::{BlockJob, BlockStage};
use virt_model::snapshot::{SnapshotDef, SnapshotDoc};
use virt_model::xml::{Element, Limits, shorten};

/// The folder of the records of checkpoints.
const CHECKPOINTS: &str = ".checkpoints";

/// The file of a backup under way.
const BACKUP: &str = ".backup";

/// The file of an operation under way.
const INTENT: &str = ".intent";

/// The file that names the current one; where none is, there is no such file.
const CURRENT: &str = ".current";

/// The file of block jobs under way.
const JOBS: &str = ".jobs";

/// A record as it was found.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    /// Its name, or its file's where it cannot be read.
    pub name: String,
    /// What it says, or why it cannot be used.
    pub def: Result<SnapshotDef, String>,
    /// In which order they were created.
    pub order: u64,
    /// Microseconds since the epoch.
    pub created_usec: u64,
    /// The driver's own.
    pub record: serde_json::Value,
}

/// All there is of a domain.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    /// In the order of their creation.
    pub records: Vec<Record>,
    /// The current one.
    pub current: Option<String>,
    /// Its checkpoints, in the order of their creation.
    pub checkpoints: Vec<CheckpointDef>,
    /// A backup that an earlier virtd had begun.
    pub backup: Option<Backup>,
    /// What was cut off.
    pub intent: Option<Intent>,
    /// Block jobs that had begun and not ended, by their disks.
    pub block_jobs: BTreeMap<String, BlockRecord>,
    /// Why it is not known what there is, if so: nothing is then done to the machine's images.
    pub broken: Option<String>,
}

/// A block job under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct BlockRecord {
    pub job: BlockJob,
    /// Who has asked for it.
    pub uid: u32,
    pub stage: BlockStage,
    /// The files that are to be removed at its end, as they were when it began.
    #[serde(default)]
    pub removes: Vec<StoredFile>,
    /// Whose its machine is.
    #[serde(default)]
    pub driver: String,
}

/// An operation under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Intent {
    pub deed: Deed,
    /// The driver's last note; `None`: it has not changed anything.
    pub note: Option<serde_json::Value>,
}

/// A backup under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Backup {
    pub request: BackupRequest,
    /// Who asked for it.
    pub uid: u32,
    /// The hypervisor is at it; before that nothing of it is to be left.
    pub begun: bool,
    /// All of a push is written.
    #[serde(default)]
    pub complete: bool,
    /// The checkpoint that is created with it.
    pub checkpoint: Option<CheckpointDef>,
    /// Whose its machine is.
    #[serde(default)]
    pub driver: String,
}

/// Which snapshot is the current one.
#[derive(Clone, Debug)]
pub(crate) struct Current(pub Option<String>);

/// What it is to come to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Deed {
    /// The document as it will be, without what the driver adds.
    Create {
        xml: String,
        /// Keep a record.
        keep: bool,
        /// The guest ran.
        running: bool,
    },
    Revert {
        name: String,
        /// Have a guest afterwards, and whether it stands.
        active: Option<bool>,
        /// In the process that ran.
        in_place: bool,
        /// Its CPUs ran, too.
        ran: bool,
    },
    Delete {
        name: String,
    },
    /// The machine is saved in this file, and its guest ended.
    Save {
        file: PathBuf,
        /// It is its managed save.
        #[serde(default)]
        managed: bool,
        /// It is a dump: the guest does not end.
        #[serde(default)]
        dump: bool,
    },
    /// Bitmaps are to tell what is written from a moment on.
    Checkpoint {
        def: CheckpointDef,
    },
    /// They are to go.
    DeleteCheckpoint {
        name: String,
    },
    /// This guest powers off, by that time, and another is started with what is stored.
    Apply {
        id: u32,
        until_usec: u64,
    },
    /// The machine itself, with these files.
    Undefine {
        storage: Vec<StoredFile>,
    },
}

impl Store {
    /// Everything kept of a domain's snapshots. What cannot be read is among it, with the reason.
    pub fn load_snapshots(&self, uuid: Uuid) -> Result<Loaded> {
        let folder = self.snapshots(uuid);
        let entries = match fs::read_dir(&folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Loaded::default()),
            entries => entries.map_err(|e| Error::from_io("read", &folder, &e))?,
        };
        if let Err(e) = remove_unfinished(&folder) {
            tracing::warn!(%uuid, "{}", Error::from_io("tidy", &folder, &e));
        }
        let mut records: Vec<Record> = entries.filter_map(|entry| record(entry.ok()?.path())).collect();
        records.sort_by(|a, b| (a.order, a.created_usec, &a.name).cmp(&(b.order, b.created_usec, &b.name)));
        let (checkpoints, no_checkpoints) = match checkpoints(&folder.join(CHECKPOINTS)) {
            Ok(checkpoints) => (checkpoints, None),
            Err(e) => (Vec::new(), Some(format!("which checkpoints it has is not known: {e}"))),
        };
        let (current, no_current) = match current(&folder.join(CURRENT)) {
            Ok(current) => (current, None),
            Err(e) => (None, Some(format!("which of its snapshots is current is not known: {e}"))),
        };
        let (intent, no_intent) = match intent(&folder.join(INTENT)) {
            Ok(intent) => (intent, None),
            Err(e) => (None, Some(format!("an operation on its snapshots that was cut off cannot be finished: {e}"))),
        };
        let (block_jobs, no_jobs) = match self.block_jobs(uuid) {
            Ok(jobs) => (jobs, None),
            Err(e) => (BTreeMap::new(), Some(format!("block jobs of it cannot be taken up again: {e}"))),
        };
        let broken = no_intent.or(no_current).or(no_jobs).or(no_checkpoints);
        broken.iter().for_each(|why| tracing::error!(%uuid, "{why}"));
        let backup = read_if_there(&folder.join(BACKUP)).unwrap_or_else(|error| {
            tracing::error!(%uuid, %error, "a backup that was under way is left alone");
            None
        });
        Ok(Loaded { records, current, checkpoints, backup, intent, block_jobs, broken })
    }

    /// Removes what is left of snapshots that were being forgotten.
    pub fn finish_forgetting(&self) {
        let entries = fs::read_dir(self.paths.state.join("snapshots")).into_iter().flatten();
        let gone = entries.filter_map(|entry| Some(entry.ok()?.path()));
        for folder in gone.filter(|path| path.extension().is_some_and(|ending| ending == "gone")) {
            if let Err(e) = remove_folder(&folder) {
                tracing::warn!("{e}");
            }
        }
    }

    /// Which domains have snapshots on disk.
    pub fn domains_with_snapshots(&self) -> Vec<Uuid> {
        let entries = fs::read_dir(self.paths.state.join("snapshots")).into_iter().flatten();
        entries.filter_map(|entry| Uuid::try_parse(entry.ok()?.file_name().to_str()?).ok()).collect()
    }

    /// Stores a snapshot's record. Nothing is written of one that could not be read again.
    pub fn save_snapshot(&self, uuid: Uuid, record: &Record) -> Result<()> {
        self.save_snapshots(uuid, None, std::slice::from_ref(record), None)
    }

    /// The same of several, and which one is current; an intent comes to its place before them. When this returns all of that is on
    /// disk.
    pub fn save_snapshots(
        &self,
        uuid: Uuid,
        intent: Option<&Intent>,
        records: &[Record],
        current: Option<&Current>,
    ) -> Result<()> {
        self.make_snapshots(uuid)?;
        let mut files: Vec<(String, Vec<u8>)> = Vec::new();
        if let Some(intent) = intent {
            files.push((INTENT.to_owned(), json(intent)?));
        }
        for record in records {
            let Ok(def) = &record.def else { continue };
            let def = SnapshotDef { cookie: Some(cookie(record)), ..def.clone() };
            let text = def.write_readable(Limits::STORED).map_err(|why| {
                let name = shorten(&record.name);
                Error::OperationUnsupported(format!("the record of snapshot '{name}' is not kept: {why}"))
            })?;
            files.push((format!("{}.xml", record.name), text.into_bytes()));
        }
        let mut removed = Vec::new();
        match current {
            Some(Current(Some(name))) => files.push((CURRENT.to_owned(), name.clone().into_bytes())),
            Some(Current(None)) => removed.push(CURRENT),
            None => {}
        }
        let files: Vec<(&str, &[u8])> = files.iter().map(|(name, content)| (&**name, &**content)).collect();
        change_all(&self.snapshots(uuid), &files, &removed)
    }

    /// Removes the record of a snapshot, after the others say that it is gone and which one is current. What is only removed is on
    /// disk with the next [`Store::sync_snapshots`].
    pub fn remove_snapshot(&self, uuid: Uuid, changed: &[Record], current: Option<&Current>, name: &str) -> Result<()> {
        match current {
            Some(Current(None)) if changed.is_empty() => _ = unlink(&self.snapshots(uuid).join(CURRENT))?,
            None if changed.is_empty() => {}
            _ => self.save_snapshots(uuid, None, changed, current)?,
        }
        unlink(&self.snapshots(uuid).join(format!("{name}.xml"))).map(drop)
    }

    /// Stores the records of checkpoints.
    pub fn save_checkpoints(&self, uuid: Uuid, records: &[CheckpointDef]) -> Result<()> {
        self.make_snapshots(uuid)?;
        let folder = self.snapshots(uuid).join(CHECKPOINTS);
        make(&folder)?;
        let content = |record: &CheckpointDef| Ok((format!("{}.json", record.name), json(record)?));
        let files = records.iter().map(content).collect::<Result<Vec<_>>>()?;
        let files: Vec<(&str, &[u8])> = files.iter().map(|(name, content)| (&**name, &**content)).collect();
        change_all(&folder, &files, &[])
    }

    /// Removes the record of a checkpoint.
    pub fn remove_checkpoint(&self, uuid: Uuid, name: &str) -> Result<()> {
        let folder = self.snapshots(uuid).join(CHECKPOINTS);
        match unlink(&folder.join(format!("{name}.json")))? {
            true => sync_folder(&folder),
            false => Ok(()),
        }
    }

    /// Notes that a backup is under way, or how far it is.
    pub fn save_backup(&self, uuid: Uuid, backup: &Backup) -> Result<()> {
        self.make_snapshots(uuid)?;
        replace_json(&self.snapshots(uuid).join(BACKUP), backup)
    }

    /// The backup that is under way, if one is.
    pub fn backup(&self, uuid: Uuid) -> Result<Option<Backup>> {
        read_if_there(&self.snapshots(uuid).join(BACKUP))
    }

    /// It is no more.
    pub fn remove_backup(&self, uuid: Uuid) -> Result<()> {
        let folder = self.snapshots(uuid);
        match unlink(&folder.join(BACKUP))? {
            true => sync_folder(&folder),
            false => Ok(()),
        }
    }

    /// Notes which one is current.
    pub fn save_current_snapshot(&self, uuid: Uuid, name: Option<&str>) -> Result<()> {
        let file = self.snapshots(uuid).join(CURRENT);
        match name {
            None => remove(&file),
            Some(name) => {
                self.make_snapshots(uuid)?;
                replace(&file, name.as_bytes())
            }
        }
    }

    /// Notes what is about to be done.
    pub fn save_intent(&self, uuid: Uuid, intent: &Intent) -> Result<()> {
        self.make_snapshots(uuid)?;
        replace_json(&self.snapshots(uuid).join(INTENT), intent)
    }

    /// The same, found from now on, and on disk once it is synced.
    pub fn save_intent_at_once(&self, uuid: Uuid, intent: &Intent) -> Result<Unsynced> {
        self.make_snapshots(uuid)?;
        replace_at_once(&self.snapshots(uuid).join(INTENT), &json(intent)?)
    }

    /// The block jobs that are under way, by their disks.
    pub fn block_jobs(&self, uuid: Uuid) -> Result<BTreeMap<String, BlockRecord>> {
        read_if_there(&self.snapshots(uuid).join(JOBS)).map(Option::unwrap_or_default)
    }

    /// Keeps which block jobs are under way.
    pub fn save_block_jobs(&self, uuid: Uuid, jobs: &BTreeMap<String, BlockRecord>) -> Result<()> {
        let file = self.snapshots(uuid).join(JOBS);
        if jobs.is_empty() {
            return unlink(&file).map(drop);
        }
        self.make_snapshots(uuid)?;
        replace_json(&file, jobs)
    }

    /// It is done, or undone. To be followed by [`Store::sync_snapshots`].
    pub fn remove_intent(&self, uuid: Uuid) -> Result<()> {
        unlink(&self.snapshots(uuid).join(INTENT)).map(drop)
    }

    /// What has been removed is removed on disk, too.
    pub fn sync_snapshots(&self, uuid: Uuid) {
        let folder = self.snapshots(uuid);
        if folder.exists()
            && let Err(error) = sync_folder(&folder)
        {
            tracing::warn!(%uuid, %error, "what has ended may be found as cut off, should the host lose its power");
        }
    }

    /// Where the driver keeps what belongs to them; made if it is not there.
    pub fn snapshot_files(&self, uuid: Uuid) -> Result<PathBuf> {
        self.make_snapshots(uuid)?;
        let folder = self.snapshots(uuid).join(".files");
        make(&folder)?;
        Ok(folder)
    }

    /// Forgets all of a domain's snapshots, in one step; images stay as they are.
    pub fn forget_snapshots(&self, uuid: Uuid) -> Result<()> {
        let (folder, gone) = (self.snapshots(uuid), self.snapshots(uuid).with_extension("gone"));
        // What an earlier virtd was killed over.
        remove_folder(&gone)?;
        match fs::rename(&folder, &gone) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            renamed => {
                renamed.map_err(|e| Error::from_io("remove", &folder, &e))?;
                sync(&self.paths.state.join("snapshots"))?;
                remove_folder(&gone)
            }
        }
    }

    fn snapshots(&self, uuid: Uuid) -> PathBuf {
        self.paths.state.join("snapshots").join(uuid.to_string())
    }

    fn make_snapshots(&self, uuid: Uuid) -> Result<()> {
        make(&self.snapshots(uuid))
    }
}

/// The records in a folder of checkpoints, in the order of their creation. Of one that cannot be read its name is known.
fn checkpoints(folder: &Path) -> Result<Vec<CheckpointDef>> {
    let failed = |e: io::Error| Error::from_io("read", folder, &e);
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?.collect::<io::Result<Vec<_>>>().map_err(failed)?,
    };
    let mut all: Vec<CheckpointDef> = entries.iter().filter_map(|entry| checkpoint(&entry.path())).collect();
    all.sort_by(|a, b| (a.order, &a.name).cmp(&(b.order, &b.name)));
    Ok(all)
}

fn checkpoint(path: &Path) -> Option<CheckpointDef> {
    let name = path.file_name()?.to_str()?.strip_suffix(".json").filter(|name| !name.starts_with('.'))?.to_owned();
    let unread = |why: String| CheckpointDef { name: name.clone(), broken: Some(why), ..CheckpointDef::default() };
    Some(match read_json::<CheckpointDef>(path) {
        Ok(def) if def.name == name => def,
        Ok(def) => unread(format!("{} holds a checkpoint named '{}'", path.display(), shorten(&def.name))),
        Err(e) => unread(format!("its record cannot be read: {e}")),
    })
}

/// What was renamed in a folder stays so.
fn sync(folder: &Path) -> Result<()> {
    fs::File::open(folder).and_then(|held| held.sync_all()).map_err(|e| Error::from_io("sync", folder, &e))
}

fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::from_io("remove", folder, &e)),
        _ => Ok(()),
    }
}

fn make(folder: &Path) -> Result<()> {
    match fs::DirBuilder::new().mode(0o711).create(folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(Error::from_io("make the folder", folder, &e)),
        _ => Ok(()),
    }
}

/// The name of the current one.
fn current(file: &Path) -> Result<Option<String>> {
    let failed = |e: io::Error| Error::from_io("read", file, &e);
    match read_bytes(file) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        content => {
            let name = String::from_utf8(content.map_err(failed)?).map_err(|e| failed(io::Error::other(e)))?;
            Ok(Some(name).filter(|name| !name.is_empty()))
        }
    }
}

/// What was cut off, if something was. A file that ends too early is one that the disk did not have yet when the host lost its power
/// ([`Store::save_intent_at_once`]): what it said is done once more by whoever wants it, or was not begun.
fn intent(path: &Path) -> Result<Option<Intent>> {
    match read_if_there(path) {
        Err(_) if read_bytes(path).is_ok_and(|content| ends_too_early(&content)) => {
            tracing::warn!(
                "{} is cut off: the host lost its power when an operation on snapshots began",
                path.display()
            );
            Ok(None)
        }
        intent => intent,
    }
}

/// One of our own files, if there is one.
fn read_if_there<T: DeserializeOwned>(file: &Path) -> Result<Option<T>> {
    match fs::symlink_metadata(file) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        _ => read_json(file).map(Some),
    }
}

/// Whether a file of our own has not come to disk as a whole: file systems leave its end out, or full of zeros.
fn ends_too_early(content: &[u8]) -> bool {
    content.last().is_none_or(|last| *last == 0)
        || serde_json::from_slice::<serde::de::IgnoredAny>(content).is_err_and(|error| error.is_eof())
}

/// One file, if it is a record.
fn record(path: PathBuf) -> Option<Record> {
    let file = path.file_name()?.to_str()?;
    let name = file.strip_suffix(".xml").filter(|name| !name.starts_with('.'))?.to_owned();
    let def = read_record(&path, &name);
    let kept = def.as_ref().ok().and_then(|def| def.cookie.as_ref());
    let number = |what: &str| kept.and_then(|cookie| cookie.child(what)?.text().trim().parse::<u64>().ok());
    let created = def.as_ref().map_or(0, |def| def.created.saturating_mul(1_000_000));
    let driver = kept.and_then(|cookie| serde_json::from_str(&cookie.child("record")?.text()).ok());
    Some(Record {
        order: number("order").unwrap_or(u64::MAX),
        created_usec: number("created").unwrap_or(created),
        record: driver.unwrap_or_default(),
        name,
        def,
    })
}

fn read_record(path: &Path, name: &str) -> Result<SnapshotDef, String> {
    let text = read_bytes(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let text = String::from_utf8(text).map_err(|e| format!("{}: {e}", path.display()))?;
    let told = |findings: Vec<virt_model::xml::Finding>| {
        let first = findings.first().map_or_else(String::new, ToString::to_string);
        format!("snapshot file of '{name}' cannot be read: {first}")
    };
    let (def, _) = SnapshotDoc::parse_within(&text, Limits::STORED).and_then(SnapshotDoc::record).map_err(told)?;
    if def.name != name {
        return Err(format!("{} holds a snapshot named '{}'", path.display(), def.name));
    }
    Ok(def)
}

/// What we add to a document that is kept: to what another program, or another virtd, has added.
fn cookie(record: &Record) -> Element {
    let theirs = record.def.as_ref().ok().and_then(|def| def.cookie.clone());
    let mut cookie = theirs.unwrap_or_else(|| Element::new("cookie"));
    ["order", "created", "record"].into_iter().for_each(|ours| _ = cookie.take_children(ours));
    cookie.push(Element::new("order").with_text(record.order.to_string()));
    cookie.push(Element::new("created").with_text(record.created_usec.to_string()));
    cookie.push(Element::new("record").with_text(record.record.to_string()));
    cookie
}

impl Record {
    /// The driver's record that a restored document brought back, and when it was created.
    pub fn restored(def: SnapshotDef, order: u64) -> Record {
        let driver = def.cookie.as_ref().and_then(|cookie| serde_json::from_str(&cookie.child("record")?.text()).ok());
        let created = def.cookie.as_ref().and_then(|cookie| cookie.child("created")?.text().trim().parse().ok());
        let created_usec = created.filter(|usec: &u64| usec / 1_000_000 == def.created);
        Record {
            name: def.name.clone(),
            order,
            created_usec: created_usec.unwrap_or(def.created.saturating_mul(1_000_000)),
            record: driver.unwrap_or_default(),
            def: Ok(def),
        }
    }

    /// The document, for clients; the driver's record is in it, passwords only if `secure`.
    pub fn document(&self, secure: bool) -> Result<String, String> {
        let def = self.def.as_ref().map_err(Clone::clone)?;
        Ok(SnapshotDef { cookie: Some(cookie(self)), ..def.clone() }.write(secure, true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_intent_of_which_the_disk_had_nothing_is_none_and_one_that_is_damaged_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(INTENT);
        assert!(intent(&path).expect("none").is_none());
        for cut_off in ["", "{", "{\"deed\": \"Del\0\0\0"] {
            fs::write(&path, cut_off).expect("written");
            assert!(intent(&path).expect("none").is_none(), "{cut_off}");
        }
        for damaged in ["{}", "[]", "x"] {
            fs::write(&path, damaged).expect("written");
            assert!(intent(&path).is_err(), "{damaged}");
        }
        let kept = Intent { deed: Deed::Delete { name: "a".to_owned() }, note: None };
        replace_at_once(&path, &json(&kept).expect("JSON")).expect("written").sync().expect("on disk");
        assert!(
            matches!(intent(&path).expect("read"), Some(Intent { deed: Deed::Delete { name }, .. }) if name == "a")
        );
    }
}
