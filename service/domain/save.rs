//! Saving: memory and configuration go to a file, and the guest ends. Restoring: a guest that starts from such a file.
//!
//! ```text
//!  save     permission ─▶ checks ─▶ job: note on disk ─▶ driver: the file is complete, the guest stands ─▶ it ends ─▶ note gone
//!  restore  permission ─▶ driver: what the file says ─▶ a domain of that ─▶ job: its checksum, its disks ─▶ start, from it
//! ```
//!
//! What is killed meanwhile is made whole as an operation on snapshots is (`snapshots/recover.rs`): the guest goes on and nothing
//! is left of the file, or the file is complete and the guest off.

use super::Domain;
use super::change::Change;
use super::lifecycle::{Creation, Origin, StartOptions};
use crate::authz::{Action, Caller};
use crate::desk::aside;
use crate::error::{Error, Result};
use crate::images::{Fate, Taken, written_by};
use crate::job::{Job, Ticket};
use crate::lock::lock;
use crate::store::{Deed, Intent};
use crate::verb::{self, Verb};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::domain::abi::Strictness;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::saved::{Compression, GIVEN, MemoryFormat, SaveRequest, SavedMachines, SavedState};
use virt_model::driver::snapshots::{Journal as _, Machine};
use virt_model::driver::{DriverError, GivenFile};
use virt_model::state::{DomainState, StateReason, Stopped};
use virt_model::xml::{FindingKind, Limits, refusals, shorten};

/// What is wanted of a guest's CPUs once it has been restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resumption {
    /// They are to stand.
    pub paused: bool,
    /// They are to run.
    pub running: bool,
}

impl Resumption {
    /// Refuses both at once.
    pub(crate) fn check(self) -> Result<()> {
        match self.paused && self.running {
            true => {
                Err(Error::InvalidArgument("'paused' and 'running' exclude each other: give one of them".to_owned()))
            }
            false => Ok(()),
        }
    }

    /// Whether they are to stand, where they do `otherwise` if nothing is wanted.
    pub(crate) fn stands(self, otherwise: bool) -> bool {
        self.paused || otherwise && !self.running
    }
}

/// How a domain is saved.
#[derive(Clone, Debug, Default)]
pub struct SaveOptions {
    /// What its CPUs do when it is restored: what they do now, if neither is wanted.
    pub then: Resumption,
    /// The configuration that is kept, in place of what runs; no guest would notice.
    pub xml: Option<String>,
    /// What the caller has open, to be written in place of a file by its path.
    pub given: Option<Arc<GivenFile>>,
    /// How its memory is packed.
    pub compression: Compression,
    /// It goes past the page cache.
    pub bypass_cache: bool,
    /// Cancel when the caller leaves the bus.
    pub cancel_on_disconnect: bool,
}

/// What becomes of a domain that is dumped. Unless one of these is wanted it goes on.
#[derive(Clone, Debug, Default)]
pub struct DumpOptions {
    /// It ends as crashed.
    pub crash: bool,
    /// It is reset.
    pub reset: bool,
    /// Of its memory alone, in that format.
    pub memory_only: Option<MemoryFormat>,
    /// It is to run meanwhile.
    pub live: bool,
    /// What the caller has open, to be written in place of a file by its path.
    pub given: Option<Arc<GivenFile>>,
    /// Cancel when the caller leaves the bus.
    pub cancel_on_disconnect: bool,
}

/// What a save is to come to.
pub(super) struct Target {
    pub file: PathBuf,
    /// Written instead.
    pub given: Option<Arc<GivenFile>>,
    pub compression: Compression,
    pub bypass_cache: bool,
    /// It is the managed save.
    pub managed: bool,
    /// The guest does not end: it is a dump.
    pub dump: bool,
    /// Its memory alone is written, in that format.
    pub memory_only: Option<MemoryFormat>,
    /// The configuration that is kept in place of what runs.
    pub kept: Option<Arc<DomainDef>>,
}

impl Target {
    /// What is done, in words.
    fn deed(&self) -> &'static str {
        if self.dump { "dump" } else { "save" }
    }
}

/// A save that has been thought through.
struct Planned {
    machine: Machine,
    request: SaveRequest,
}

/// An absolute path that a caller gave.
pub(crate) fn absolute(file: &str) -> Result<PathBuf> {
    let path = Path::new(file);
    match path.is_absolute() && path.file_name().is_some() && !file.ends_with('/') && !file.contains('\0') {
        true => Ok(path.to_owned()),
        false if file.is_empty() => {
            Err(Error::InvalidArgument("the file is missing: give its absolute path".to_owned()))
        }
        false => Err(Error::InvalidArgument(format!("'{}' is not the absolute path of a file", shorten(file)))),
    }
}

/// The path that a caller gave, or what is shown of what they gave by descriptor.
pub(crate) fn path_or_given(file: &str, given: bool) -> Result<PathBuf> {
    match given {
        false => absolute(file),
        true if file.is_empty() => Ok(PathBuf::from(GIVEN)),
        true => Err(Error::InvalidArgument(
            "a path and a descriptor ('fd') exclude each other: give an empty path, or no descriptor".to_owned(),
        )),
    }
}

impl Domain {
    /// Saves the guest in a file, and ends it. Returns when that is accepted; the ticket answers when the guest has ended. On
    /// failure it goes on as before, and nothing is left of the file.
    pub async fn save(self: &Arc<Self>, caller: &Caller, file: &str, options: SaveOptions) -> Result<Ticket> {
        self.accepted(caller, &verb::SAVE, async {
            self.allow(caller, verb::SAVE.action).await?;
            options.then.check()?;
            let file = self.may_write(caller, file, options.given.is_some()).await?;
            let change = self.change(caller, &verb::SAVE);
            let kept = match &options.xml {
                Some(xml) => Some(self.read_to_keep(caller, xml).await?),
                None => None,
            };
            let SaveOptions { given, compression, bypass_cache, .. } = options;
            let target =
                Target { file, given, compression, bypass_cache, managed: false, dump: false, memory_only: None, kept };
            self.accept_save(change, &verb::SAVE, target, options.then, options.cancel_on_disconnect).await
        })
        .await
    }

    /// Writes the guest in a file as [`Domain::save`] does, and lets it go on, or has become of it what is wanted. Returns when that
    /// is accepted; the ticket answers when the file is complete and that has been done.
    pub async fn core_dump(self: &Arc<Self>, caller: &Caller, file: &str, options: DumpOptions) -> Result<Ticket> {
        self.accepted(caller, &verb::CORE_DUMP, async {
            self.allow(caller, verb::CORE_DUMP.action).await?;
            if options.crash && options.reset {
                let text = "'crash' and 'reset' exclude each other: give one of them";
                return Err(Error::InvalidArgument(text.to_owned()));
            }
            if options.live {
                let why = match options.memory_only {
                    Some(_) => {
                        "what is written of the memory of a guest that runs meanwhile ('live') would not fit together"
                    }
                    None => "a guest that runs meanwhile ('live') would leave no machine to go on with",
                };
                let text = format!("cannot dump domain '{}': {why}; leave that option out", self.name());
                return Err(Error::OperationUnsupported(text));
            }
            let file = self.may_write(caller, file, options.given.is_some()).await?;
            if options.crash || options.reset {
                self.allow(caller, Action::Stop).await?;
            }
            let change = self.change(caller, &verb::CORE_DUMP);
            let target = Target {
                file,
                given: options.given.clone(),
                compression: Compression::None,
                bypass_cache: false,
                managed: false,
                dump: true,
                memory_only: options.memory_only,
                kept: None,
            };
            if change.has_turn() {
                self.applies(&verb::CORE_DUMP)?;
                self.plan_save(&target, Resumption::default()).await?;
            }
            let job = change.open(options.cancel_on_disconnect)?;
            Ok(job.run(async move |domain, job| {
                domain.applies(&verb::CORE_DUMP)?;
                let planned = domain.plan_save(&target, Resumption::default()).await?;
                domain.save_planned(planned, &target, &job).await?;
                domain.after_dump(options).await
            }))
        })
        .await
    }

    /// Where a caller has a machine written who may save it. A path names any file of the host, as a configuration does, and needs
    /// what that needs; what is given by descriptor is read by whoever gave it, with all that is secret.
    async fn may_write(&self, caller: &Caller, file: &str, given: bool) -> Result<PathBuf> {
        let file = path_or_given(file, given)?;
        if given {
            self.allow(caller, Action::ReadSecure).await?;
        } else {
            self.allow(caller, Action::Define).await?;
            self.shared.images.refuse_below(&file, &self.shared.store.own_folders()).await?;
        }
        Ok(file)
    }

    /// What is wanted of a guest that has been dumped. It may have ended meanwhile, which is as well.
    async fn after_dump(self: &Arc<Self>, wanted: DumpOptions) -> Result<()> {
        let Ok(guest) = self.guest() else { return Ok(()) };
        match wanted {
            DumpOptions { crash: true, .. } => self.end_as(guest, Stopped::Crashed).await,
            DumpOptions { reset: true, .. } => {
                let reset = guest.instance.reset().await;
                reset.map_err(|e| self.driver_failed("reset after its dump", e))
            }
            _ => Ok(()),
        }
    }

    /// What all saves are from here on, `verb` being which.
    pub(super) async fn accept_save(
        self: &Arc<Self>,
        change: Change,
        verb: &'static Verb,
        target: Target,
        then: Resumption,
        departs: bool,
    ) -> Result<Ticket> {
        if change.has_turn() {
            self.applies(verb)?;
            self.plan_save(&target, then).await?;
        }
        let job = change.open(departs)?;
        Ok(job.run(async move |domain, job| {
            domain.applies(verb)?;
            let planned = domain.plan_save(&target, then).await?;
            domain.save_planned(planned, &target, &job).await
        }))
    }

    /// The driver's part.
    pub(super) fn saves(&self) -> Result<&dyn SavedMachines> {
        self.driver.saved_machines().ok_or_else(|| {
            let (name, driver) = (self.name(), self.driver.name());
            Error::OperationUnsupported(format!(
                "domain '{name}': the driver '{driver}' neither saves nor dumps machines"
            ))
        })
    }

    /// A document that is to be kept in place of what runs: completed, and held against that by [`Domain::plan_save`].
    async fn read_to_keep(&self, caller: &Caller, xml: &str) -> Result<Arc<DomainDef>> {
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let mut def = seat.read(xml, DomainDef::parse).await.map_err(Error::ConfigInvalid)?;
        let _seat = seat.read_through().await;
        let known = self.known()?;
        let known: Vec<&DomainDef> = known.iter().map(|def| &**def).collect();
        def.keep_hidden(&known).map_err(Error::ConfigInvalid)?;
        if def.has_native_arguments() {
            self.allow(caller, Action::Native).await?;
        }
        self.driver.complete(&mut def).await.map_err(|e| self.driver_failed("save", e))?;
        Ok(Arc::new(def))
    }

    /// What a save would be; refuses what cannot be. Changes nothing.
    async fn plan_save(&self, target: &Target, then: Resumption) -> Result<Planned> {
        let saves = self.saves()?;
        let machine = self.machine().await?;
        // A dump of memory alone opens no image.
        if target.memory_only.is_none() {
            self.is_not_frozen()?;
            self.is_not_backed_up()?;
            self.opens_no_given_image(target.deed())?;
            self.disks_are_idle(None)?;
        }
        let def = match &target.kept {
            None => machine.def.clone(),
            Some(kept) => {
                let differences = machine.def.compare_abi(kept, Strictness::Running);
                self.same_machine(&differences, "the document given for it")?;
                kept.clone()
            }
        };
        if target.memory_only.is_none() {
            self.can_be_read_again(&def, target).await?;
        }
        let standing = lock(&self.state).state == DomainState::Paused;
        let file = target.file.clone();
        if target.given.is_none() {
            self.refuse_to_replace(target.deed(), &file).await?;
        }
        let (paused, goes_on, memory_only) = (then.stands(standing), target.dump, target.memory_only);
        let (given, compression, bypass_cache) = (target.given.clone(), target.compression, target.bypass_cache);
        let request = SaveRequest { file, given, compression, bypass_cache, def, paused, goes_on, memory_only };
        saves.check_save(&machine, &request).await.map_err(|e| self.driver_failed(target.deed(), e))?;
        Ok(Planned { machine, request })
    }

    /// Refuses a configuration that whoever starts from the file would not take.
    async fn can_be_read_again(&self, def: &Arc<DomainDef>, target: &Target) -> Result<()> {
        let (managed, deed) = (target.managed, target.deed());
        let limits = if managed { Limits::STORED } else { Limits::ACCEPTED };
        let kept = def.clone();
        let readable = aside(move || kept.write_readable(Form::STORED, limits).map(drop)).await;
        readable.map_err(|why| {
            let remedy = if managed { "" } else { "; keep it by ManagedSave, or give a smaller one (xml)" };
            Error::OperationUnsupported(format!(
                "cannot {deed} domain '{}': its configuration could not be read again: {why}{remedy}",
                self.name()
            ))
        })
    }

    /// Refuses a file that a machine stands on.
    pub(super) async fn refuse_to_replace(&self, deed: &str, file: &Path) -> Result<()> {
        let deed = format!("cannot {deed} domain '{}'", self.name());
        let remedy = "choose another file";
        self.shared.images.refuse_in_use(&deed, &[file.to_owned()], Fate::Removed, None, remedy).await
    }

    /// From now on nobody else saves in that file, until the result is dropped.
    async fn take_target(&self, deed: &str, file: &Path) -> Result<Taken> {
        let whose = format!("the {deed} of domain '{}', which is under way,", self.name());
        let taken = self.shared.images.take(file, whose).await;
        taken.map_err(|by| {
            let (name, file) = (self.name(), file.display());
            Error::InUse(format!("cannot {deed} domain '{name}': {file} is what {by} writes; choose another file"))
        })
    }

    /// A guest whose save is half done is to go on, or is stopped by whoever may: what was written is of no use from then on, and
    /// only if it `resumes` is it let go on once more by whoever makes the save whole. That is on disk before it runs.
    pub(super) async fn takes_back_save(&self, resumes: bool) -> Result<()> {
        match (self.open_intent(), self.guest()) {
            (Some(intent @ Intent { deed: Deed::Save { .. }, .. }), Ok(_)) => {
                self.keep_intent(self.taken_back(intent, resumes)?).await
            }
            _ => Ok(()),
        }
    }

    fn taken_back(&self, intent: Intent, resumes: bool) -> Result<Intent> {
        let Intent { deed, note } = intent;
        let note = note.map(|note| self.saves()?.taken_back(note, resumes).map_err(|e| self.driver_failed("save", e)));
        Ok(Intent { deed, note: note.transpose()? })
    }

    /// Has on disk what is meant to become of a save that is half done, before it is made whole: what the last attempt has written
    /// may not be there. One whose guest runs is taken back.
    pub(super) async fn keep_save(&self, intent: Intent) -> Result<Intent> {
        let runs = lock(&self.state).state == DomainState::Running;
        let intent = if runs { self.taken_back(intent, false)? } else { intent };
        self.keep_intent(intent.clone()).await?;
        Ok(intent)
    }

    /// Refuses `what` where the guest would notice.
    pub(super) fn same_machine(
        &self,
        differences: &[virt_model::domain::abi::AbiDifference],
        what: &str,
    ) -> Result<()> {
        if differences.is_empty() {
            return Ok(());
        }
        let all: Vec<String> = differences.iter().map(ToString::to_string).collect();
        let (name, count, all) = (self.name(), all.len(), all.join("; "));
        let text = format!("domain '{name}': in {what} the guest would notice {count} differences: {all}");
        Err(Error::AbiIncompatible(text))
    }

    async fn save_planned(self: &Arc<Self>, planned: Planned, wanted: &Target, job: &Arc<Job>) -> Result<()> {
        let Planned { machine, request } = planned;
        let (managed, dump) = (wanted.managed, wanted.dump);
        let guest = self.guest()?;
        // A transient domain must not go before the note that it leaves.
        let _stay = Creation::begin(self)?;
        let target = match request.given {
            Some(_) => None,
            None => Some(self.take_target(wanted.deed(), &request.file).await?),
        };
        let journal = self.journal(Deed::Save { file: request.file.clone(), managed, dump }, job);
        journal.begin().await?;
        if let Err(e) = self.saves()?.save(&machine, &request, journal.clone()).await {
            self.expect_no_end(guest.id);
            self.is_not_saved().await;
            journal.end_after_failure(&e).await;
            // If it is half done.
            self.looks_again(target);
            return Err(self.driver_failed(wanted.deed(), e));
        }
        if !dump {
            self.end_saved().await?;
        }
        journal.step("ended");
        journal.end().await
    }

    /// What ended while it was being saved, and as if it had been, is not: there is no file.
    pub(super) async fn is_not_saved(&self) {
        self.all_told().await;
        let told_so = {
            let state = lock(&self.state);
            state.guest.is_none() && state.reason == StateReason::Saved
        };
        if told_so {
            self.is_off(StateReason::Failed).await;
        }
    }

    /// The file is complete: the guest, if it is there still, is to go; it may have ended in any way.
    async fn end_saved(self: &Arc<Self>) -> Result<()> {
        if let Ok(guest) = self.guest() {
            self.end_as(guest, Stopped::Saved).await?;
        }
        if !lock(&self.state).is_known_as_saved() {
            self.is_off(StateReason::Saved).await;
        }
        Ok(())
    }

    /// The same where it was cut off.
    pub(super) async fn finish_save(self: &Arc<Self>, file: &Path) -> Result<String> {
        let _stay = Creation::begin(self)?;
        self.end_saved().await?;
        Ok(format!("'{}' is saved in {}", self.name(), file.display()))
    }

    /// The same of a transient domain that has gone with its guest: only the file is left.
    pub(super) async fn settle_save(&self, note: Option<serde_json::Value>) -> Result<String> {
        let Some(note) = note else { return Ok("nothing had been changed".to_owned()) };
        let settled = self.saves()?.settle_save(self.uuid, note).await;
        settled.map_err(|e| Error::from_driver(&self.name(), "make whole the save of", e))
    }

    /// Starts this domain, which is off, from what was saved. Returns when that is accepted; on failure it is off as before.
    pub(crate) async fn launch_saved(
        self: &Arc<Self>,
        caller: &Caller,
        def: Arc<DomainDef>,
        saved: SavedState,
        options: StartOptions,
    ) -> Result<Ticket> {
        let creation = Creation::begin(self)?;
        let change = self.change(caller, &verb::RESTORE);
        if change.has_turn() {
            self.applies(&verb::START)?;
            self.refuse_over_managed_save()?;
            self.can_be_restored(&*self.def_to_start(Some(&def))?, verb::RESTORE.word).await?;
        }
        let job = change.open(options.cancel_on_disconnect)?;
        let starts = job.has_turn().then(|| self.will_start(job.cancel_token()));
        self.announce_transient();
        let caller = caller.clone();
        Ok(job.run(async move |domain, job| {
            let _creation = creation;
            let cancel = job.cancel_token();
            let _starts = starts.unwrap_or_else(|| domain.will_start(cancel));
            domain.refuse_over_managed_save()?;
            domain.start_saved(&caller, def, saved, options, verb::RESTORE.word, &job).await
        }))
    }

    /// The start itself, which is called `word`.
    pub(super) async fn start_saved(
        self: &Arc<Self>,
        caller: &Caller,
        def: Arc<DomainDef>,
        saved: SavedState,
        options: StartOptions,
        word: &str,
        job: &Arc<Job>,
    ) -> Result<()> {
        let def = self.def_to_start(Some(&def))?;
        self.can_be_restored(&def, word).await?;
        self.refuse_frozen_since(&def, word).await?;
        let progress = {
            let job = job.clone();
            Arc::new(move |done, total| job.progress(done, total))
        };
        let verified = self.saves()?.verify_saved(&saved, &def, progress, job.cancel_token()).await;
        verified.map_err(|e| Error::from_driver(&def.name, word, e))?;
        self.start_guest(def, caller, options, Origin::Saved(Box::new(saved)), job.cancel_token()).await
    }

    /// Refuses a machine of whose disks a snapshot of its own has frozen one since it was saved: it would go on writing that.
    async fn refuse_frozen_since(&self, def: &Arc<DomainDef>, word: &str) -> Result<()> {
        let (images, mut def) = (&self.shared.images, def.clone());
        images.declare(&mut def);
        let written = written_by(&def);
        let others = images.users_of(&written, Fate::Written, Some(self.uuid)).await;
        let all = images.users_of(&written, Fate::Written, None).await;
        let Some((file, users)) = all.into_iter().find(|(file, _)| !others.contains_key(file)) else { return Ok(()) };
        let disk = def.devices.disks.iter().find(|disk| disk.files().contains(&file));
        let (name, target) = (&def.name, disk.map_or("", |disk| &disk.target.dev));
        let (file, users) = (file.display(), users.join(", "));
        Err(Error::OperationInvalid(format!(
            "cannot {word} domain '{name}': disk '{target}' is not as it was when the machine was saved: {file} is what {users} \
             stands on by now; delete that snapshot, or start the machine without its memory (Start with force-boot)"
        )))
    }

    /// Refuses what cannot run here with what was saved.
    async fn can_be_restored(&self, def: &DomainDef, word: &str) -> Result<()> {
        let able = match refusals(self.driver.check(def).await) {
            Ok(()) => self.driver.has_files(def, true).await,
            Err(findings) => Err(DriverError::Config(
                findings.into_iter().filter(|finding| finding.kind != FindingKind::Warning).collect(),
            )),
        };
        able.map_err(|e| Error::from_driver(&def.name, word, e))
    }
}
