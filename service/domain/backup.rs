//! Backups of running machines: what their disks held at one moment.
//!
//! ```text
//!  plan ─▶ job ─▶ turn ─▶ plan again ─▶ record on disk ─▶ driver begins ─▶ checkpoint ─▶ record: begun ─▶ the turn is free
//!        push: written to its end; pull: ready, read by OpenBackup, until Finish ─▶ driver ends ─▶ record gone
//! ```
//!
//! A virtd that finds a record goes on with what is begun, as a job again, or takes away what is not, or whose guest has gone.

use super::save::absolute;
use super::state::State;
use super::{Creation, Domain};
use crate::authz::{Action, Caller};
use crate::error::{Error, Result};
use crate::fail_point;
use crate::frames::Changeable as _;
use crate::images::Fate;
use crate::job::{Job, Ticket};
use crate::left_behind;
use crate::lock::lock;
use crate::shared::AGAIN;
use crate::store::{Backup, on_disk};
use crate::time::now_usec;
use crate::turn::TurnGuard;
use crate::verb;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use virt_model::backup::BackupDoc;
use virt_model::checkpoint::{CheckpointDef, CheckpointDoc};
use virt_model::driver::DriverError;
use virt_model::driver::backup::{BackupRequest, Backups};
use virt_model::driver::snapshots::Machine;
use virt_model::xml::shorten;

/// How a backup is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct BackupOptions {
    /// Bytes a second at most, for each disk of a push; 0: as fast as it can be.
    pub bandwidth: u64,
    /// Cancel when the caller leaves the bus.
    pub cancel_on_disconnect: bool,
}

/// A backup that was accepted.
#[derive(Debug)]
pub struct BackupTicket {
    /// Answers when it has ended.
    pub ticket: Ticket,
    /// Answers before that when it can be read; one that is written never can.
    pub ready: oneshot::Receiver<()>,
}

/// What a backup is of a machine at a moment.
pub(super) struct CurrentBackup {
    request: Arc<BackupRequest>,
    /// What has it, for those who are refused.
    label: String,
    /// It can be read.
    open: bool,
    /// A job, or whoever has the turn, is at it; else it is tried again and again to end it.
    followed: bool,
    /// Only its record is to go: by now other files may be where its own were.
    ended: bool,
}

/// A backup that has been thought through.
struct Planned {
    machine: Machine,
    request: BackupRequest,
    checkpoint: Option<CheckpointDef>,
    /// Files that the caller named.
    named: Vec<PathBuf>,
}

impl CurrentBackup {
    /// One that an earlier virtd has begun, and that is looked after soon.
    pub(super) fn found(backup: &Backup) -> CurrentBackup {
        let label = "a backup that an earlier virtd began".to_owned();
        CurrentBackup { request: Arc::new(backup.request.clone()), label, open: false, followed: false, ended: false }
    }

    fn names(&self, target: &str) -> bool {
        self.request.disks.iter().any(|disk| disk.target == target)
    }
}

impl State {
    /// Refuses what a backup stands in the way of, for as long as it is under way.
    pub(super) fn is_not_backed_up(&self) -> Result<()> {
        match &self.backup {
            None => Ok(()),
            Some(backup) => Err(Error::Busy { object: format!("domain '{}'", self.name), job: backup.label.clone() }),
        }
    }

    /// The same for undefining. One that nobody is at may never come to its end: it is given up with a machine that is off.
    pub(super) fn backup_can_be_given_up(&self, active: bool) -> Result<()> {
        match &self.backup {
            Some(backup) if !active && !backup.followed => Ok(()),
            _ => self.is_not_backed_up(),
        }
    }

    /// Its records have gone: whoever tries to end it gives up.
    pub(super) fn gives_backup_up(&mut self) {
        let Some(backup) = self.backup.take() else { return };
        let files: Vec<String> = backup.request.disks.iter().map(|disk| disk.file.display().to_string()).collect();
        tracing::warn!(name = self.name, "undefined with a backup that did not end: {} may be left", files.join(", "));
    }

    /// Refuses a checkpoint while the end of a backup is still to be done, which may take away one of that name with its bitmaps.
    pub(super) fn no_backup_is_to_be_ended(&self) -> Result<()> {
        match &self.backup {
            Some(backup) if !backup.followed => self.is_not_backed_up(),
            _ => Ok(()),
        }
    }

    /// Refuses what is done to one disk, where a backup stands in the way.
    pub(super) fn disk_is_not_backed_up(&self, target: &str) -> Result<()> {
        match &self.backup {
            Some(backup) if backup.names(target) => Err(Error::Busy {
                object: format!("disk '{target}' of domain '{}'", self.name),
                job: backup.label.clone(),
            }),
            _ => Ok(()),
        }
    }
}

impl Domain {
    /// Refuses what a backup stands in the way of.
    pub(super) fn is_not_backed_up(&self) -> Result<()> {
        lock(&self.state).is_not_backed_up()
    }

    /// Backs up the running guest's disks as they are at one moment. Returns when that is accepted.
    pub async fn begin_backup(
        self: &Arc<Self>,
        caller: &Caller,
        (xml, checkpoint_xml): (&str, &str),
        options: BackupOptions,
    ) -> Result<BackupTicket> {
        let verb = &verb::BACKUP_BEGIN;
        self.accepted(caller, verb, async {
            self.allow(caller, verb.action).await?;
            let seat = self.shared.desk.seat(caller.uid, &[xml, checkpoint_xml]).await;
            let doc = seat.read(xml, BackupDoc::parse).await.map_err(Error::ConfigInvalid)?;
            let checkpoint = match checkpoint_xml {
                "" => None,
                xml => Some(seat.read(xml, CheckpointDoc::parse).await.map_err(Error::ConfigInvalid)?),
            };
            drop(seat);
            let change = self.change(caller, verb);
            self.applies(verb)?;
            // It changes nothing, but for checkpoints that turn out to be broken; the turn is needed for that alone.
            let planned = self.plan_backup(&doc, checkpoint.as_ref(), options, change.has_turn()).await?;
            if !planned.named.is_empty() {
                // They name any file of the host, as a configuration does.
                self.allow(caller, Action::Define).await?;
            }
            for file in &planned.named {
                absolute(&file.display().to_string())?;
                self.shared.images.refuse_below(file, &self.shared.store.own_folders()).await?;
            }
            let (tell, ready) = oneshot::channel();
            let (job, uid) = (change.open(options.cancel_on_disconnect)?, caller.uid);
            let begin = async move |domain: Arc<Domain>, job| {
                domain.applies(verb)?;
                let planned = domain.plan_backup(&doc, checkpoint.as_ref(), options, true).await?;
                domain.begins_backup(planned, uid, job, Some(tell)).await
            };
            let ticket = job.run_beyond(begin, async |_, _, rest| rest.await);
            Ok(BackupTicket { ticket, ready })
        })
        .await
    }

    /// The driver's part.
    fn backs_up(&self) -> Result<&dyn Backups> {
        self.driver.backups().ok_or_else(|| {
            let (name, driver) = (self.name(), self.driver.name());
            Error::OperationUnsupported(format!("domain '{name}': the driver '{driver}' makes no backups"))
        })
    }

    /// What a backup would be; refuses what cannot be. With `turn` it is looked whether the checkpoint can be trusted.
    async fn plan_backup(
        &self,
        doc: &BackupDoc,
        checkpoint: Option<&CheckpointDoc>,
        options: BackupOptions,
        turn: bool,
    ) -> Result<Planned> {
        let driver = self.backs_up()?;
        self.is_not_backed_up()?;
        if options.bandwidth > i64::MAX.cast_unsigned() {
            return Err(Error::InvalidArgument("'bandwidth' is more bytes a second than can be counted".to_owned()));
        }
        if turn {
            self.look_at_checkpoints().await?;
        }
        let machine = self.machine().await?;
        let since = doc.since().map(|name| self.checkpoint(name)).transpose()?;
        if let Some((name, why)) = since.as_ref().and_then(|since| Some((&since.name, since.broken.as_ref()?))) {
            return Err(Error::OperationInvalid(format!(
                "cannot back up domain '{}' since checkpoint '{name}', which is broken: {why}; make a full backup, and delete \
                 the checkpoint",
                self.name()
            )));
        }
        let called = (now_usec() / 1_000_000).to_string();
        let aligned = doc.align(&machine.def, since.as_deref(), &called).map_err(Error::ConfigInvalid)?;
        if aligned.pull && options.bandwidth > 0 {
            let text = "'bandwidth' is for what virtd writes; who reads a pull decides how fast";
            return Err(Error::InvalidArgument(text.to_owned()));
        }
        aligned.disks.iter().try_for_each(|disk| self.has_no_block_job(Some(&disk.target)))?;
        let checkpoint = match checkpoint {
            Some(doc) => Some(self.plan_checkpoint(doc, &machine).await?),
            None => None,
        };
        let files: Vec<PathBuf> = aligned.disks.iter().map(|disk| disk.file.clone()).collect();
        let deed = format!("cannot back up domain '{}'", self.name());
        self.shared.images.refuse_in_use(&deed, &files, Fate::Removed, None, "choose another file").await?;
        let request = BackupRequest {
            pull: aligned.pull,
            disks: aligned.disks,
            checkpoint: checkpoint.as_ref().map(|def| def.tracked.clone()).unwrap_or_default(),
            bandwidth: options.bandwidth,
        };
        driver.check_backup(&machine, &request).await.map_err(|e| self.not_backed_up(e))?;
        Ok(Planned { machine, request, checkpoint, named: aligned.named })
    }

    fn not_backed_up(&self, error: DriverError) -> Error {
        match error {
            DriverError::SnapshotExists(text) => Error::CheckpointExists(text),
            error => self.driver_failed("back up", error),
        }
    }

    /// Begins it, for who has the turn. What is returned is the rest of it, which needs no turn.
    async fn begins_backup(
        self: &Arc<Self>,
        planned: Planned,
        uid: u32,
        job: Arc<Job>,
        tell: Option<oneshot::Sender<()>>,
    ) -> Result<impl Future<Output = Result<()>> + Send + use<>> {
        self.is_as_configured().await?;
        let Planned { machine, request, checkpoint, .. } = planned;
        let mut backup = Backup {
            request: request.clone(),
            uid,
            begun: false,
            complete: false,
            checkpoint: checkpoint.clone(),
            driver: self.driver.name().to_owned(),
        };
        self.keep_backup(&backup).await?;
        let (request, label) = (Arc::new(request), job.label(verb::BACKUP_BEGIN.word));
        lock(&self.state).backup = Some(CurrentBackup { request, label, open: false, followed: true, ended: false });
        if let Err(error) = self.backs_up()?.make_backup_files(&machine, &backup.request).await {
            // Whatever is at those places is somebody else's.
            if let Err(error) = self.forget_backup().await {
                tracing::error!(uuid = %self.uuid, name = self.name(), %error, "the record of a backup that did not begin is left");
                self.ends_backup_later(None);
            }
            return Err(self.not_backed_up(error));
        }
        let begun = async {
            self.backs_up()?.begin_backup(&machine, &backup.request).await.map_err(|e| self.not_backed_up(e))?;
            fail_point::reached();
            if job.cancel_token().is_cancelled() {
                return Err(Error::Cancelled(format!("the backup of domain '{}' was cancelled", self.name())));
            }
            if let Some(def) = checkpoint {
                self.add_checkpoint(def).await?;
            }
            backup.begun = true;
            self.keep_backup(&backup).await
        };
        if let Err(error) = begun.await {
            backup.begun = false;
            // The log has it where that fails.
            let _ = self.ends_or_tries_again(machine, backup, false).await;
            return Err(error);
        }
        let domain = self.clone();
        Ok(async move { domain.goes_on_with_backup(machine, backup, &job, tell).await })
    }

    /// Waits for its end, and takes away what is of no use then.
    async fn goes_on_with_backup(
        self: Arc<Self>,
        machine: Machine,
        mut backup: Backup,
        job: &Arc<Job>,
        tell: Option<oneshot::Sender<()>>,
    ) -> Result<()> {
        job.outlives_virtd();
        let id = self.id();
        let done = match backup.request.pull {
            true => self.is_read(id, job, tell).await,
            false => {
                let progress = {
                    let job = job.clone();
                    Arc::new(move |done, total| job.progress(done, total))
                };
                let copied =
                    self.backs_up()?.copy_backup(&machine, &backup.request, progress, job.cancel_token()).await;
                match copied {
                    Ok(()) => {
                        backup.complete = true;
                        self.keep_backup(&backup).await
                    }
                    Err(error) => Err(self.not_backed_up(error)),
                }
            }
        };
        self.ends_or_tries_again(machine, backup, done.is_ok()).await?;
        done
    }

    /// It can be read, until somebody finishes it.
    async fn is_read(&self, id: u32, job: &Arc<Job>, tell: Option<oneshot::Sender<()>>) -> Result<()> {
        if let Some(backup) = lock(&self.state).backup.as_mut() {
            backup.open = true;
        }
        job.ready();
        // Whoever waited for that may have gone.
        let _ = tell.map(|tell| tell.send(()));
        let name = self.name();
        tokio::select! {
            () = job.finish_token().cancelled() => Ok(()),
            () = job.cancel_token().cancelled() => {
                Err(Error::Cancelled(format!("the backup of domain '{name}' was cancelled")))
            }
            () = self.until(|state| !state.runs(id)) => {
                let text = format!("the backup of domain '{name}' was not finished: its guest has ended");
                Err(Error::OperationInvalid(text))
            }
        }
    }

    /// Nothing of it is left but what is complete. What cannot be done now is tried again and again, and no other backup is begun before.
    async fn ends_or_tries_again(self: &Arc<Self>, machine: Machine, backup: Backup, complete: bool) -> Result<()> {
        let ended = self.ends_backup(&machine, &backup, complete).await;
        if let Err(error) = &ended {
            tracing::error!(uuid = %self.uuid, name = self.name(), %error, "something of a backup is left");
            self.ends_backup_later(Some((backup, complete)));
        }
        ended
    }

    /// `left`: what is to be ended; if nothing, only the record is to go.
    fn ends_backup_later(self: &Arc<Self>, left: Option<(Backup, bool)>) {
        let request = {
            let mut state = lock(&self.state);
            let Some(backup) = state.backup.as_mut() else { return };
            (backup.open, backup.followed) = (false, false);
            backup.label = "the end of a backup, which is tried again and again".to_owned();
            backup.request.clone()
        };
        // Of a machine that has gone, the next virtd finds the record.
        let Ok(stay) = Creation::begin(self) else { return };
        let (domain, mut pause) = (self.clone(), AGAIN.0);
        tokio::spawn(async move {
            while let Some(turn) = domain.turn_to_try_again(&request, &mut pause).await {
                let ended = match &left {
                    Some((backup, complete)) => domain.ends_backup_of_what_is_left(backup, *complete).await,
                    None => domain.forget_backup().await,
                };
                drop(turn);
                let (uuid, name) = (domain.uuid, domain.name());
                match ended {
                    Err(error) => tracing::warn!(%uuid, name, %error, "something of a backup is still left"),
                    Ok(()) => {
                        tracing::info!(%uuid, name, "nothing of the backup is left to be done");
                        break;
                    }
                }
            }
            drop(stay);
        });
    }

    /// The machine is what it is by now: it may have been started, or defined anew.
    async fn ends_backup_of_what_is_left(&self, backup: &Backup, complete: bool) -> Result<()> {
        let machine = self.machine_or_what_is_left().await?;
        self.ends_backup(&machine, backup, complete).await
    }

    /// The turn to look at this backup again, after a pause; `None`: nothing is left to be done about it.
    async fn turn_to_try_again(&self, request: &Arc<BackupRequest>, pause: &mut Duration) -> Option<TurnGuard> {
        let is_left = |state: &State| state.backup.as_ref().is_some_and(|one| Arc::ptr_eq(&one.request, request));
        loop {
            tokio::select! {
                () = tokio::time::sleep(*pause) => {}
                () = self.until(|state| !is_left(state)) => return None,
            }
            *pause = (*pause * 2).min(AGAIN.1);
            let turn = self.turn.try_take("the end of a backup", &CancellationToken::new());
            match turn {
                Some(turn) if is_left(&lock(&self.state)) => return Some(turn),
                _ => {}
            }
        }
    }

    /// The machine; of one of which nothing is left no more than whose it was, as its images may be others' by now.
    async fn machine_or_what_is_left(&self) -> Result<Machine> {
        match self.machine().await {
            Err(Error::NoSuchDomain { .. }) => Ok(left_behind::machine(self.uuid, &*self.driver)),
            machine => machine,
        }
    }

    /// See [`Domain::ends_or_tries_again`]. Of one that did not begin, or was cut off before that was written down, the checkpoint goes,
    /// too. Repeatable.
    async fn ends_backup(&self, machine: &Machine, backup: &Backup, complete: bool) -> Result<()> {
        if lock(&self.state).backup.as_ref().is_some_and(|backup| backup.ended) {
            return self.forget_backup().await;
        }
        if let (false, Some(def)) = (backup.begun, &backup.checkpoint) {
            let gone = self.takes_checkpoints()?.delete_checkpoint(machine, &def.tracked).await;
            gone.or_else(|e| if matches!(e, DriverError::Gone) { Ok(()) } else { Err(e) })
                .map_err(|e| self.driver_failed("undo the backup of", e))?;
            self.drop_checkpoint(&def.name).await?;
        }
        let (machine, request) = (machine.clone(), &backup.request);
        let alive = machine.guest.is_some() && self.guest().is_ok();
        let machine = if alive { machine } else { Machine { guest: None, running: false, ..machine } };
        let mut ended = self.backs_up()?.end_backup(&machine, request, complete).await;
        if let (Err(DriverError::Gone), true) = (&ended, alive) {
            // It has ended meanwhile: what is left is files.
            let machine = Machine { guest: None, running: false, ..machine };
            ended = self.backs_up()?.end_backup(&machine, request, complete).await;
        }
        fail_point::reached();
        ended.map_err(|e| self.driver_failed("end the backup of", e))?;
        if let Some(backup) = lock(&self.state).backup.as_mut() {
            backup.ended = true;
        }
        self.forget_backup().await
    }

    /// A connection to the backup of a disk, by its target or the name that it was given.
    pub async fn open_backup(&self, caller: &Caller, target: &str) -> Result<OwnedFd> {
        self.beside(caller, &verb::OPEN_BACKUP, async {
            let (open, request) = {
                let state = lock(&self.state);
                let backup = state.backup.as_ref().filter(|backup| backup.request.pull);
                let Some(backup) = backup else {
                    let text =
                        format!("domain '{}' has no backup that could be read; begin one with mode='pull'", state.name);
                    return Err(Error::OperationInvalid(text));
                };
                (backup.open, backup.request.clone())
            };
            if !open {
                let text = format!("the backup of domain '{}' is not ready yet", self.name());
                return Err(Error::OperationInvalid(text));
            }
            let disk = request.disks.iter().find(|disk| disk.target == target || disk.export == target);
            let disk = disk.ok_or_else(|| {
                Error::NoSuchDevice(format!("the backup of domain '{}' has no disk '{}'", self.name(), shorten(target)))
            })?;
            let machine = self.machine().await?;
            let opened = self.backs_up()?.open_backup(&machine, disk).await;
            opened.map_err(|e| self.driver_failed(verb::OPEN_BACKUP.word, e))
        })
        .await
    }

    /// What an earlier virtd has begun goes on as a job, or is taken away. For who has the turn, when it is known whether the guest
    /// runs.
    pub(crate) async fn takes_up_backup(self: &Arc<Self>) {
        let cut_off = {
            let state = lock(&self.state);
            state.backup.as_ref().filter(|_| !state.gone).map(|backup| backup.request.clone())
        };
        let Some(request) = cut_off else { return };
        let Err(error) = self.take_up_backup().await else { return };
        tracing::error!(uuid = %self.uuid, name = self.name(), %error, "a backup that was cut off is looked at again");
        let Ok(stay) = Creation::begin(self) else { return };
        let (domain, mut pause) = (self.clone(), AGAIN.0);
        tokio::spawn(async move {
            while let Some(turn) = domain.turn_to_try_again(&request, &mut pause).await {
                let done = domain.take_up_backup().await;
                drop(turn);
                if done.is_ok() {
                    break;
                }
            }
            drop(stay);
        });
    }

    async fn take_up_backup(self: &Arc<Self>) -> Result<()> {
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        let Some(backup) = on_disk(move || shared.store.backup(uuid)).await? else {
            lock(&self.state).backup = None;
            return Ok(());
        };
        let (machine, name) = (self.machine_or_what_is_left().await?, self.name());
        if backup.complete {
            if self.ends_or_tries_again(machine, backup, true).await.is_ok() {
                tracing::info!(%uuid, name, "a backup that was cut off is complete");
            }
            return Ok(());
        }
        let goes_on = match backup.begun && machine.guest.is_some() {
            true => match self.backs_up()?.is_backed_up(&machine, &backup.request).await {
                Err(DriverError::Gone) => false,
                told => told.map_err(|e| self.not_backed_up(e))?,
            },
            false => false,
        };
        if !goes_on {
            if self.ends_or_tries_again(machine, backup, false).await.is_ok() {
                tracing::warn!(%uuid, name, "a backup was cut off: nothing is left of it");
            }
            return Ok(());
        }
        let cancel = CancellationToken::new();
        let (job, _) = self.shared.jobs.open_again(backup.uid, self.reference(), verb::BACKUP_BEGIN.word, cancel);
        let (job, request) = (Arc::new(job), Arc::new(backup.request.clone()));
        let label = job.label(verb::BACKUP_BEGIN.word);
        lock(&self.state).backup = Some(CurrentBackup { request, label, open: false, followed: true, ended: false });
        job.running();
        tracing::info!(%uuid, name, "a backup goes on that an earlier virtd began");
        let domain = self.clone();
        tokio::spawn(async move {
            let done = domain.goes_on_with_backup(machine, backup, &job, None).await;
            job.finish_shared(done);
        });
        Ok(())
    }

    async fn keep_backup(&self, backup: &Backup) -> Result<()> {
        let (shared, uuid, kept) = (self.shared.clone(), self.uuid, backup.clone());
        on_disk(move || shared.store.save_backup(uuid, &kept)).await?;
        fail_point::reached();
        Ok(())
    }

    async fn forget_backup(&self) -> Result<()> {
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        on_disk(move || shared.store.remove_backup(uuid)).await?;
        lock(&self.state).backup = None;
        Ok(())
    }
}
