//! Undefining: the configuration goes, and with it what only this domain could use, as far as whoever asks wants that.
//!
//! ```text
//!  plan: all that stands in the way, in one sentence
//!    ├─ nothing but records ─▶ at once
//!    └─ snapshots with their data, storage ─▶ a job: each snapshot as it is deleted by itself
//!         ─▶ plan again ─▶ intent on disk ─▶ each file ─▶ belongings ─▶ definition ─▶ records, and the intent with them
//! ```
//!
//! From the intent on it goes to its end, whatever is killed.

use super::Domain;
use super::snapshots::{DomainJournal, told};
use crate::authz::{Action, Caller};
use crate::error::{Error, Result};
use crate::images::Fate;
use crate::job::{Job, Ticket};
use crate::lock::lock;
use crate::store::{Deed, on_disk};
use crate::verb;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::device::Disk;
use virt_model::device::disk::{DiskDevice, DiskKind};
use virt_model::domain::DomainDef;
use virt_model::driver::snapshots::{FileChange, FileFate, Journal as _};
use virt_model::driver::{DomainEnd, StoredFile};
use virt_model::state::{Lifecycle, Undefined};

/// What goes along with a stored configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UndefineOptions {
    /// The managed save.
    pub managed_save: bool,
    /// The snapshots' metadata.
    pub snapshots_metadata: bool,
    /// The snapshots with their data.
    pub snapshots: bool,
    /// The checkpoints' metadata.
    pub checkpoints_metadata: bool,
    /// The firmware variables and the state of a TPM.
    pub nvram: bool,
    /// Images: targets of disks, or files of theirs.
    pub storage: Vec<String>,
}

/// What an undefine would do to the host's files.
#[derive(Clone, Debug, Default)]
pub struct UndefineCheck {
    /// Files and folders that would be there no more.
    pub removed: Vec<PathBuf>,
    /// Of its images and its snapshots' files: path, what becomes of it, bytes.
    pub files: Vec<(String, &'static str, u64)>,
}

/// An undefine that has been thought through.
struct Planned {
    stored: Arc<DomainDef>,
    belongings: Vec<PathBuf>,
    managed_save: Option<PathBuf>,
    /// In the order in which they are deleted.
    snapshots: Vec<String>,
    /// What becomes of the snapshots' files.
    files: Vec<FileChange>,
    storage: Vec<StoredFile>,
}

impl UndefineOptions {
    /// Whether it takes its time.
    fn is_long(&self) -> bool {
        self.snapshots || !self.storage.is_empty()
    }

    fn check(&self) -> Result<()> {
        if self.snapshots && self.snapshots_metadata {
            let text =
                "'snapshots' removes them with their data, and 'snapshots-metadata' leaves that: give one of them";
            return Err(Error::InvalidArgument(text.to_owned()));
        }
        Ok(())
    }
}

impl Domain {
    /// Removes the stored configuration. An active domain goes on as a transient one. Where snapshots go with their data, or
    /// storage goes, that is a job: its ticket is given back, and answers at its end.
    pub async fn undefine(self: &Arc<Self>, caller: &Caller, options: UndefineOptions) -> Result<Option<Ticket>> {
        if options.is_long() {
            let ticket = self.accepted(caller, &verb::UNDEFINE, self.accept_undefine(caller, options));
            return ticket.await.map(Some);
        }
        self.short(caller, &verb::UNDEFINE, async {
            let planned = self.plan_undefine(&options).await?;
            // First what may fail, and may be tried again while the configuration still says where it is.
            self.remove_belongings(&planned.stored).await?;
            self.drop_managed_save().await?;
            let (shared, uuid) = (self.shared.clone(), self.uuid);
            on_disk(move || {
                shared.store.forget_snapshots(uuid)?;
                shared.store.remove_definition(uuid)
            })
            .await?;
            self.is_undefined().await;
            Ok(None)
        })
        .await
    }

    async fn accept_undefine(self: &Arc<Self>, caller: &Caller, options: UndefineOptions) -> Result<Ticket> {
        self.allow(caller, verb::UNDEFINE.action).await?;
        self.may_remove(caller, &options).await?;
        self.applies(&verb::UNDEFINE)?;
        self.plan_undefine(&options).await?;
        let job = self.change(caller, &verb::UNDEFINE).open(false)?;
        Ok(job.run(async move |domain, job| domain.undefine_with_data(&options, &job).await))
    }

    /// Whoever removes snapshots may delete them one by one; whoever removes images may name any file of the host in a
    /// configuration.
    async fn may_remove(&self, caller: &Caller, options: &UndefineOptions) -> Result<()> {
        if options.snapshots {
            self.allow(caller, Action::Snapshot).await?;
        }
        if !options.storage.is_empty() {
            self.allow(caller, Action::Define).await?;
        }
        Ok(())
    }

    async fn undefine_with_data(self: &Arc<Self>, options: &UndefineOptions, job: &Arc<Job>) -> Result<()> {
        self.applies(&verb::UNDEFINE)?;
        let planned = self.plan_undefine(options).await?;
        self.delete_these(&planned.snapshots, false, job).await?;
        // What stood on overlays stands on other files by now.
        let Planned { stored, storage, .. } = self.plan_undefine(options).await?;
        if job.cancel_token().is_cancelled() {
            let text = format!("undefining '{}' was cancelled; what is gone of its snapshots stays so", self.name());
            return Err(Error::Cancelled(text));
        }
        job.past_return();
        let journal = self.journal(Deed::Undefine { storage: storage.clone() }, job);
        journal.begin().await?;
        let mut gone = Vec::new();
        for file in &storage {
            if let Err(error) = self.driver.remove_storage(&stored, file).await {
                journal.end().await?;
                let error = Error::from_driver(&self.name(), "undefine", error);
                return Err(still_there(error, &gone));
            }
            gone.push(file.path.display().to_string());
            journal.step("file");
        }
        self.remove_all_but_files(&stored, &journal).await
    }

    /// The storage is gone: what remains. On failure the intent stays, and whoever takes the turn next finishes it.
    async fn remove_all_but_files(self: &Arc<Self>, stored: &DomainDef, journal: &DomainJournal) -> Result<()> {
        self.remove_belongings(stored).await?;
        self.drop_managed_save().await?;
        journal.step("belongings");
        // The intent lies among the records, and goes last.
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        on_disk(move || shared.store.remove_definition(uuid)).await?;
        journal.step("definition");
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        on_disk(move || shared.store.forget_snapshots(uuid)).await?;
        self.is_undefined().await;
        journal.step("records");
        Ok(())
    }

    /// One that was cut off: what it had not removed goes, but for what another machine has come to stand on.
    pub(super) async fn finish_undefine(
        self: &Arc<Self>,
        storage: Vec<StoredFile>,
        journal: &Arc<DomainJournal>,
    ) -> Result<String> {
        let stored = self.stored()?.ok_or_else(|| self.vanished())?;
        let paths: Vec<PathBuf> = storage.iter().map(|file| file.path.clone()).collect();
        let kept = self.shared.images.users_of(&paths, Fate::Removed, Some(self.uuid)).await;
        for file in storage.iter().filter(|file| !kept.contains_key(&file.path)) {
            let removed = self.driver.remove_storage(&stored, file).await;
            removed.map_err(|e| Error::from_driver(&self.name(), "undefine", e))?;
        }
        self.remove_all_but_files(&stored, journal).await?;
        let left: Vec<String> = kept.iter().map(|(file, who)| whose(file, who)).collect();
        Ok(match left.is_empty() {
            true => "it is undefined, and its storage removed".to_owned(),
            false => format!("it is undefined, and its storage removed, but for {}", left.join(", ")),
        })
    }

    /// Nothing is stored any more: that is told.
    async fn is_undefined(&self) {
        self.all_told().await.commit(|state| {
            state.snapshots.forget();
            state.checkpoints.forget();
            state.gives_backup_up();
            state.stored = None;
            state.broken = None;
            state.autostart = false;
            state.pending = Arc::default();
            state.leave_if_nothing_left();
            vec![Lifecycle::Undefined(Undefined::Removed)]
        });
    }

    /// What `undefine` would remove of the host's files with the same options, or why it would be refused. Changes nothing.
    /// Errors: denied.
    pub async fn check_undefine(&self, caller: &Caller, options: &UndefineOptions) -> Result<Result<UndefineCheck>> {
        self.allow(caller, verb::CHECK_UNDEFINE.action).await?;
        if !options.storage.is_empty() {
            // Whether a file is there is told to those who may name it.
            self.allow(caller, Action::Define).await?;
        }
        Ok(self.plan_undefine(options).await.map(|planned| {
            let deleted = |file: StoredFile| FileChange { path: file.path, what: FileFate::Deleted, bytes: file.bytes };
            let files: Vec<FileChange> =
                planned.files.into_iter().chain(planned.storage.into_iter().map(deleted)).collect();
            let gone = files.iter().filter(|file| file.what != FileFate::Created).map(|file| file.path.clone());
            let own = planned.belongings.into_iter().chain(planned.managed_save);
            UndefineCheck { removed: own.chain(gone).collect(), files: told(&files) }
        }))
    }

    /// Refuses to undefine while there is something that only this domain can use and that is not to go with it, or that cannot:
    /// all of that in one sentence.
    async fn plan_undefine(&self, options: &UndefineOptions) -> Result<Planned> {
        options.check()?;
        self.host_can(&verb::UNDEFINE)?;
        let (live, stored) = self.configurations()?;
        let stored = stored.ok_or_else(|| self.vanished())?;
        let belongings = self.driver.belongings(&stored).await;
        let mut bars = self.bars(live.is_some(), &belongings, options);
        let managed_save = self.managed_save_file().await.map(|file| file.path);
        let (snapshots, files, storage) = (Vec::new(), Vec::new(), Vec::new());
        let mut planned = Planned { stored, belongings, managed_save, snapshots, files, storage };
        if options.is_long() && live.is_some() {
            bars.push(
                "it runs and stands on its disks; shut it down before they, or snapshots in them, are removed".into(),
            );
        } else if options.is_long() {
            self.sound()?;
            if options.snapshots {
                planned.snapshots = self.all_deepest_first();
                let (files, refusals) = self.plan_deletes(&planned.snapshots).await?;
                bars.extend(refusals.iter().map(ToString::to_string));
                planned.files = files;
            }
            let storage = self.plan_storage(&planned.stored, &options.storage, &planned.files, &mut bars).await?;
            planned.storage = storage;
        }
        match bars.is_empty() {
            true => Ok(planned),
            false => {
                let text = format!("cannot undefine domain '{}': {}", self.name(), bars.join("; and "));
                Err(Error::OperationInvalid(text))
            }
        }
    }

    /// What stands in the way by what is known of it alone.
    fn bars(&self, active: bool, belongings: &[PathBuf], options: &UndefineOptions) -> Vec<String> {
        let (snapshots, checkpoints, broken, saved) = {
            let state = lock(&self.state);
            let checkpoints = state.checkpoints.all().len();
            (state.snapshots.count(), checkpoints, state.snapshots.why_broken(), state.managed_save)
        };
        let named = belongings.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" and ");
        let mut bars = Vec::new();
        if snapshots > 0 && !options.snapshots_metadata && !options.snapshots {
            let (s, them) = if snapshots == 1 { ("", "it") } else { ("s", "them") };
            bars.push(format!(
                "it has {snapshots} snapshot{s}; pass snapshots-metadata to forget {them} (images keep what they hold), or \
                 snapshots to remove {them} with what they hold"
            ));
        }
        if checkpoints > 0 && !options.checkpoints_metadata {
            let (s, them) = if checkpoints == 1 { ("", "it") } else { ("s", "them") };
            bars.push(format!(
                "it has {checkpoints} checkpoint{s}; pass checkpoints-metadata to forget {them} (bitmaps stay in images), or \
                 delete {them} first"
            ));
        }
        if let Some(why) = broken.filter(|_| !options.snapshots_metadata) {
            bars.push(format!("{why}; pass snapshots-metadata to forget its snapshots"));
        }
        if self.is_being_saved() {
            let remedy = "resume it, or wait until its storage answers";
            bars.push(format!("it is being saved, and that would be forgotten before it is whole; {remedy}"));
        }
        if let Err(why) = lock(&self.state).backup_can_be_given_up(active) {
            bars.push(why.to_string());
        }
        if let Err(why) = self.disks_are_idle(None) {
            bars.push(why.to_string());
        }
        if saved && !options.managed_save {
            bars.push("it has a managed save; pass managed-save to remove it with it".to_owned());
        }
        if !belongings.is_empty() && !options.nvram {
            bars.push(format!(
                "it has firmware variables or the state of a TPM in {named}; pass nvram to remove them with it"
            ));
        }
        if !belongings.is_empty() && options.nvram && active {
            bars.push(format!("it runs and uses {named}; shut it down before they are removed"));
        }
        bars
    }

    /// The files that are to go, as they are now; what keeps any of them goes to `bars`. `before`: what the deletion of
    /// snapshots does first.
    async fn plan_storage(
        &self,
        stored: &Arc<DomainDef>,
        wanted: &[String],
        before: &[FileChange],
        bars: &mut Vec<String>,
    ) -> Result<Vec<StoredFile>> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let mut stored = stored.clone();
        self.shared.images.declare(&mut stored);
        let gone: BTreeSet<&Path> =
            before.iter().filter(|file| file.what != FileFate::Created).map(|file| &*file.path).collect();
        let mut paths: Vec<PathBuf> = Vec::new();
        for name in wanted {
            let disk = of_disk(&stored, name).ok_or_else(|| {
                let text = format!("'{name}' is neither a disk of domain '{}' nor a file of its disks", stored.name);
                Error::InvalidArgument(text)
            })?;
            match file_of(disk, name, &gone) {
                Ok(path) => paths.extend(path.filter(|path| !paths.contains(path))),
                Err(why) => bars.push(why),
            }
        }
        bars.extend(stays_above(&stored, &paths, &gone));
        let users = self.shared.images.users_of(&paths, Fate::Removed, Some(self.uuid)).await;
        bars.extend(users.iter().map(|(file, who)| whose(file, who)));
        let judged = self.driver.storage(&stored, &paths).await;
        let judged = judged.map_err(|e| Error::from_driver(&self.name(), "undefine", e))?;
        let mut files = Vec::new();
        for file in judged {
            match file {
                Ok(file) => files.extend(file),
                Err(why) => bars.push(why),
            }
        }
        Ok(files)
    }

    /// Removes firmware variables and the state of a TPM, and what else its driver knows to be kept for it, before the
    /// configuration that names them; not while it runs.
    async fn remove_belongings(&self, stored: &DomainDef) -> Result<()> {
        if self.live().is_some() {
            return Ok(());
        }
        let removed = self.driver.remove_belongings(stored, DomainEnd::Undefined).await;
        removed.map_err(|e| Error::from_driver(&self.name(), "undefine", e))
    }
}

/// The disk of that target, or of that file.
fn of_disk<'a>(def: &'a DomainDef, name: &str) -> Option<&'a Disk> {
    let disks = &def.devices.disks;
    let by_target = disks.iter().find(|disk| disk.target.dev == name);
    by_target.or_else(|| disks.iter().find(|disk| disk.files().iter().any(|file| file == Path::new(name))))
}

/// The file that is meant, once those that are `gone` are; `None` if it is one of them. Error: what keeps it.
fn file_of(disk: &Disk, name: &str, gone: &BTreeSet<&Path>) -> Result<Option<PathBuf>, String> {
    let target = &disk.target.dev;
    if disk.readonly || matches!(disk.device(), DiskDevice::Cdrom | DiskDevice::Floppy) {
        return Err(format!(
            "disk '{target}' is read-only, or a medium in a drive, and not the machine's alone: leave it out"
        ));
    }
    if disk.shareable {
        return Err(format!("disk '{target}' is shared with other machines: leave it out"));
    }
    let named = disk.chain().find(|layer| layer.path == Some(name)).and_then(|layer| layer.volume);
    if let Some((pool, volume)) = disk.volume().or(named) {
        let what = if disk.volume().is_some() { "is" } else { "stands on" };
        return Err(format!("disk '{target}' {what} volume '{volume}' of pool '{pool}': delete it there"));
    }
    if disk.kind() != DiskKind::File {
        return Err(format!("disk '{target}' is no file but type='{}': remove it where it is kept", disk.kind()));
    }
    // Volumes among them are their pools'.
    let own = disk.chain().filter(|layer| layer.volume.is_none());
    let files: Vec<PathBuf> = own.filter_map(|layer| layer.path.map(PathBuf::from)).collect();
    let named = files.iter().find(|file| *file == Path::new(name));
    let left = |file: &&PathBuf| !gone.contains(file.as_path());
    Ok(match named {
        Some(file) => Some(file).filter(left),
        None => files.iter().find(left),
    }
    .cloned())
}

/// What would be left of this machine's own disks without what it stands on.
fn stays_above(def: &DomainDef, removed: &[PathBuf], gone: &BTreeSet<&Path>) -> Vec<String> {
    let goes = |file: &Path| gone.contains(file) || removed.iter().any(|one| one == file);
    let chains = def.devices.disks.iter().map(Disk::files);
    let pairs = chains.flat_map(|files| files.clone().into_iter().zip(files.into_iter().skip(1)));
    let bare = pairs.filter(|(above, below)| removed.contains(below) && !goes(above));
    bare.map(|(above, below)| {
        format!("{} is what {} stands on, which stays: name that, too", below.display(), above.display())
    })
    .collect()
}

fn whose(file: &Path, users: &[String]) -> String {
    format!("{} is what {} stands on", file.display(), users.join(", "))
}

/// The failure of an undefine that has removed something.
fn still_there(error: Error, gone: &[String]) -> Error {
    match error {
        Error::StorageFailed(text) if !gone.is_empty() => {
            let gone = gone.join(", ");
            Error::StorageFailed(format!("{text}; the machine is still defined, but {gone} has been removed"))
        }
        error => error,
    }
}
