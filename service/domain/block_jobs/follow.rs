//! A block job that has begun, to its end: followed without the turn, concluded or given up with it. What nobody follows, because
//! virtd or the guest has ended, is taken up again or settled.

use super::{BlockEntry, Creation, Domain, Notes};
use crate::authz::Caller;
use crate::domain::config::Update;
use crate::domain::state::Guest;
use crate::error::{Error, Result};
use crate::fail_point;
use crate::frames::Changeable as _;
use crate::job::Job;
use crate::lock::lock;
use crate::shared::AGAIN;
use crate::store::on_disk;
use crate::turn::TurnGuard;
use crate::verb::{self, Verb};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tokio_util::sync::CancellationToken;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::block_jobs::{BlockJob, BlockNotes as _, BlockStage, BlockStanding, Held};
use virt_model::driver::snapshots::Machine;

/// A block job that has begun.
pub(super) struct Followed {
    pub job: BlockJob,
    /// What ran then.
    pub live: Arc<DomainDef>,
    pub guest: Guest,
    pub held: Held,
    pub _stay: Creation,
}

/// Why nobody goes on following.
enum Seen {
    /// It is to be concluded.
    ToConclude,
    Cancelled,
    Ended(DriverError),
}

/// The images of a chain that have another below them than before, or none any more, each with that.
fn on_another_base(was: &[PathBuf], is: &[PathBuf]) -> Vec<(PathBuf, Option<PathBuf>)> {
    let below = |chain: &[PathBuf], file: &PathBuf| {
        let at = chain.iter().position(|one| one == file)?;
        Some(chain.get(at + 1).cloned())
    };
    let moved = is.iter().filter_map(|file| {
        let (before, now) = (below(was, file)?, below(is, file)?);
        (before != now).then(|| (file.clone(), now))
    });
    moved.collect()
}

impl Domain {
    /// Follows a block job to its end. One that is cancelled ends soon, whatever does not answer: then it is given up in the background.
    pub(super) async fn follow_block_job(self: &Arc<Self>, followed: Followed, job: Arc<Job>) -> Result<()> {
        job.outlives_virtd();
        let what = self.of_disk(&followed.job);
        let mut work = tokio::spawn(self.clone().follow_to_the_end(followed, job.clone()));
        tokio::select! {
            done = &mut work => done.unwrap_or_else(|e| Err(Error::Internal(e.to_string()))),
            () = job.given_up() => Err(Error::Cancelled(format!(
                "{what} was cancelled, and another change of the domain is under way, or its hypervisor or its storage does not \
                 answer: it is given up after that, and nothing else is done with that disk before"
            ))),
        }
    }

    async fn follow_to_the_end(self: Arc<Self>, followed: Followed, job: Arc<Job>) -> Result<()> {
        let Followed { job: block, live, guest, held, _stay } = followed;
        let (turn, why) = loop {
            let seen = self.see_it_through(&block, &guest, &job).await;
            let seen = match seen {
                Seen::Cancelled => {
                    // The turn may be somebody else's for a while: what it costs ends now.
                    let cancelled = self.block_jobs()?.cancel_block_job(guest.instance.as_ref(), &block).await;
                    cancelled.err().filter(|e| !matches!(e, DriverError::Gone)).map_or(Seen::Cancelled, Seen::Ended)
                }
                seen => seen,
            };
            let turn = self.turn_for_its_end(&block).await?;
            if self
                .block_entry(&block.target)
                .and_then(|entry| entry.follower)
                .is_none_or(|(number, _)| number != job.id())
            {
                // Whoever had the turn before has seen to it, and there may be a newer one of that disk.
                return Err(self.has_been_settled(&block));
            }
            let why = match seen {
                Seen::ToConclude if job.cancel_token().is_cancelled() => DriverError::Cancelled,
                Seen::ToConclude => {
                    match self.conclude_block_job(&block, &job).await {
                        Ok(true) => DriverError::Internal("its images were not changed over".to_owned()),
                        Ok(false) => {
                            // The guest writes too much; others have the turn until it is tried again.
                            drop(turn);
                            let _ = tokio::time::timeout(AGAIN.0, job.cancel_token().cancelled()).await;
                            continue;
                        }
                        Err(error) => error,
                    }
                }
                Seen::Cancelled => DriverError::Cancelled,
                Seen::Ended(error) => error,
            };
            break (turn, why);
        };
        let done = self.settle_or_try_again(&block, Some(live)).await;
        drop(held);
        self.all_told().await;
        drop(turn);
        match done {
            Ok(true) => Ok(()),
            Ok(false) => Err(match why {
                DriverError::Cancelled => Error::Cancelled(format!("{} was cancelled", self.of_disk(&block))),
                why => self.driver_failed(block.operation(), why),
            }),
            Err(error) => Err(error),
        }
    }

    /// Waits until there is something to be done about it.
    async fn see_it_through(&self, block: &BlockJob, guest: &Guest, job: &Arc<Job>) -> Seen {
        let driver = match self.driver.block_jobs() {
            Some(driver) => driver,
            None => return Seen::Ended(DriverError::Gone),
        };
        let cancel = job.cancel_token();
        let progress = |done, total| job.progress(done, total);
        let guest = guest.instance.as_ref();
        let told = tokio::select! {
            biased;
            () = cancel.cancelled() => return Seen::Cancelled,
            told = driver.follow_block_job(guest, block, false, &progress) => told,
        };
        match told {
            Ok(BlockStanding::Ready) => {}
            Ok(BlockStanding::Ended(why)) => return Seen::Ended(failure(block, why)),
            Err(error) => return Seen::Ended(error),
        }
        let finishing = self.block_entry(&block.target).is_some_and(|entry| entry.record.stage.finishing);
        if !block.waits_to_be_finished() || finishing {
            return Seen::ToConclude;
        }
        if let Some(entry) = lock(&self.state).block_jobs.get_mut(&block.target) {
            entry.ready = true;
        }
        self.changes_in_document();
        job.ready();
        tokio::select! {
            biased;
            () = cancel.cancelled() => Seen::Cancelled,
            () = job.finish_token().cancelled() => Seen::ToConclude,
            told = driver.follow_block_job(guest, block, true, &progress) => match told {
                Ok(BlockStanding::Ended(why)) => Seen::Ended(failure(block, why)),
                Ok(BlockStanding::Ready) => Seen::ToConclude,
                Err(error) => Seen::Ended(error),
            },
        }
    }

    /// The turn, however long others have it.
    async fn turn_for_its_end(&self, block: &BlockJob) -> Result<TurnGuard> {
        let word = format!("the end of a {}", block.operation());
        loop {
            match self.take_turn(&word, &CancellationToken::new()).await {
                Err(Error::Busy { .. }) => {}
                turn => return turn,
            }
        }
    }

    async fn conclude_block_job(self: &Arc<Self>, block: &BlockJob, job: &Arc<Job>) -> Result<bool, DriverError> {
        let (domain, target) = (self.clone(), block.target.clone());
        let notes = Notes { domain, target, job: Some(job.clone()) };
        if self.block_entry(&block.target).is_none() || self.guest().is_err() {
            return Err(DriverError::Gone);
        }
        notes.keep(BlockStage { finishing: true, ..notes.stage() }).await?;
        let machine = self.machine().await.map_err(|e| DriverError::Refused(e.to_string()))?;
        let driver = self.driver.block_jobs().ok_or(DriverError::Gone)?;
        driver.conclude_block_job(&machine, block, &notes).await
    }

    /// Which images count is seen, the configurations follow, and what is of no use goes. `live`: what ran, if nothing is left of the
    /// machine. Says whether the disk stands on what it was to stand on. For who has the turn; repeatable.
    pub(super) async fn settle_block_job(
        self: &Arc<Self>,
        block: &BlockJob,
        live: Option<Arc<DomainDef>>,
    ) -> Result<bool> {
        // Whoever had the turn before may have seen to it.
        let Some(entry) = self.block_entry(&block.target) else { return Err(self.has_been_settled(block)) };
        let (stage, removes) = (entry.record.stage, entry.record.removes);
        let driver = self.block_jobs()?;
        let machine = self.machine_or(live.clone()).await?;
        let done = driver.settle_block_job(&machine, block, stage.same).await;
        let done = done.map_err(|e| self.driver_failed(&format!("settle the {} of", block.operation()), e))?;
        fail_point::reached();
        if done {
            self.configurations_follow(block).await?;
            fail_point::reached();
            // Layers have gone, and bitmaps with them.
            self.looks_at_checkpoints();
        }
        let (notes, unkept) = (self.block_notes(&block.target), |e| self.driver_failed(block.operation(), e));
        if !done && (stage.same || stage.resume) {
            // What it had counts again: that is written down before anything new is written there.
            notes.keep(BlockStage { same: false, ..stage }).await.map_err(unkept)?;
        }
        if let (true, Ok(guest)) = (stage.resume, self.guest()) {
            // It was stopped for this alone.
            let resumed = guest.instance.resume().await;
            resumed
                .or_else(|e| if matches!(e, DriverError::Gone) { Ok(()) } else { Err(e) })
                .map_err(|e| self.driver_failed("resume", e))?;
            notes.keep(BlockStage { resume: false, ..notes.stage() }).await.map_err(unkept)?;
        }
        let remove = if done { self.to_be_removed(removes).await } else { Vec::new() };
        let machine = self.machine_or(live).await?;
        let cleaned = driver.clean_up_block_job(&machine, block, done, stage, remove).await;
        cleaned.map_err(|e| self.driver_failed(&format!("clean up after the {} of", block.operation()), e))?;
        fail_point::reached();
        self.forget_block_job(&block.target).await?;
        fail_point::reached();
        Ok(done)
    }

    fn has_been_settled(&self, block: &BlockJob) -> Error {
        Error::OperationInvalid(format!("{}: its guest has ended", self.of_disk(block)))
    }

    /// The same; what cannot be done now is tried again and again, whatever else is done meanwhile.
    pub(super) async fn settle_or_try_again(
        self: &Arc<Self>,
        block: &BlockJob,
        live: Option<Arc<DomainDef>>,
    ) -> Result<bool> {
        let done = self.settle_block_job(block, live.clone()).await;
        if done.is_err()
            && let Some(entry) = lock(&self.state).block_jobs.get_mut(&block.target)
        {
            (entry.follower, entry.ready, entry.to_settle) = (None, false, true);
        }
        if done.is_err() {
            self.changes_in_document();
            self.settles_later(block, live);
        }
        done
    }

    fn settles_later(self: &Arc<Self>, block: &BlockJob, live: Option<Arc<DomainDef>>) {
        let Ok(stay) = Creation::begin(self) else { return };
        let (domain, block, mut pause) = (self.clone(), block.clone(), AGAIN.0);
        let word = format!("the end of a {}", block.operation());
        tokio::spawn(async move {
            let is_left = || {
                let entry = domain.block_entry(&block.target);
                entry.is_some_and(|entry| entry.to_settle && entry.record.job == block)
            };
            while is_left() {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(AGAIN.1);
                let Some(_turn) = domain.turn.try_take(&word, &CancellationToken::new()) else { continue };
                if !is_left() {
                    break;
                }
                let (uuid, what) = (domain.uuid, domain.of_disk(&block));
                match domain.settle_block_job(&block, live.clone()).await {
                    Ok(_) => tracing::info!(%uuid, "{what} has come to its end"),
                    Err(error) => tracing::warn!(%uuid, %error, "{what} is still not at its end"),
                }
            }
            drop(stay);
        });
    }

    /// The machine; of one of which nothing is left what it was.
    async fn machine_or(&self, live: Option<Arc<DomainDef>>) -> Result<Machine> {
        match (self.machine().await, live) {
            (Err(Error::NoSuchDomain { .. }), Some(def)) => {
                Ok(Machine { def, guest: None, running: false, folder: PathBuf::new() })
            }
            (machine, _) => machine,
        }
    }

    /// What runs and what is stored name what the disk stands on now.
    async fn configurations_follow(&self, block: &BlockJob) -> Result<()> {
        let (live, stored) = self.configurations()?;
        let mut moved = Vec::new();
        let mut follow = |def: Option<Arc<DomainDef>>, is_stored: bool| {
            let before = def?;
            let mut declared = before.clone();
            match &live {
                // What is stored names volumes alone: they stand on what those of the guest stand on.
                Some(live) if is_stored => Arc::make_mut(&mut declared).take_what_volumes_gave(live),
                None if is_stored => self.shared.volumes.plug_what_is_there(&mut declared),
                _ => {}
            }
            self.shared.images.declare(&mut declared);
            let index = declared.devices.disks.iter().position(|disk| block.is_about(disk))?;
            let mut disk = declared.devices.disks[index].clone();
            let was = disk.files();
            block.apply_to(&mut disk);
            for one in on_another_base(&was, &disk.files()) {
                // What runs and what is stored name the same images as a rule.
                if !moved.contains(&one) {
                    moved.push(one);
                }
            }
            let mut after = DomainDef::clone(&before);
            after.devices.disks[index].take_images_of(&disk);
            Some(Arc::new(after))
        };
        let (live, stored) = (follow(live.clone(), false), follow(stored, true));
        // First what pools have noted: while the configurations say what was, all of it is done again.
        let shared = self.shared.clone();
        on_disk(move || shared.volumes.stand_on(&moved)).await?;
        self.put_configurations(live, stored, Update::Part).await
    }

    /// Sees to block jobs that nobody follows: with the guest they are taken up again, without it they are settled. For who has the
    /// turn, before anything that an image or a configuration in two minds would be the worse for.
    pub(in crate::domain) async fn looks_after_block_jobs(self: &Arc<Self>) -> Result<()> {
        let (entries, guest) = {
            let state = lock(&self.state);
            if state.block_jobs.is_empty() || state.sought.is_some() {
                return Ok(());
            }
            (state.block_jobs.values().cloned().collect::<Vec<_>>(), state.guest.clone())
        };
        for entry in entries {
            let block = entry.record.job.clone();
            match &guest {
                Some(_) if entry.to_settle => {}
                Some(guest) if entry.follower.is_none_or(|(_, of)| of != guest.id) => {
                    self.take_up(entry, guest.clone()).await?;
                }
                Some(_) => {}
                None => {
                    let done = self.settle_block_job(&block, None).await?;
                    let story =
                        if done { "its disk stands on what it was to stand on" } else { "its disk is as before" };
                    tracing::warn!(uuid = %self.uuid, name = self.name(), "{} was cut off: {story}", self.of_disk(&block));
                }
            }
        }
        Ok(())
    }

    /// The guest is there, and its block job, as far as it has come: it is a job again.
    async fn take_up(self: &Arc<Self>, entry: BlockEntry, guest: Guest) -> Result<()> {
        let block = entry.record.job.clone();
        let (caller, verb) = (crate::shared::virtd_itself(), verb_of(&block));
        let machine = self.machine().await?;
        let held = self.block_jobs()?.take_up_block_job(&machine, &block).await.unwrap_or_else(|error| {
            tracing::warn!(uuid = %self.uuid, %error, "an image may not be accessible to the end of its block job");
            Held::default()
        });
        let stay = Creation::begin(self)?;
        let cancel = CancellationToken::new();
        let (job, _) = self.shared.jobs.open_again(entry.record.uid, self.reference(), verb.word, cancel);
        if let Some(entry) = lock(&self.state).block_jobs.get_mut(&block.target) {
            (entry.follower, entry.ready) = (Some((job.id(), guest.id)), false);
        }
        self.changes_in_document();
        tracing::info!(uuid = %self.uuid, name = self.name(), "{} goes on as job {}", self.of_disk(&block), job.id());
        let followed = Followed { job: block, live: machine.def, guest, held, _stay: stay };
        tokio::spawn(self.clone().goes_on(caller, verb, followed, Arc::new(job)));
        Ok(())
    }

    async fn goes_on(self: Arc<Self>, caller: Caller, verb: &'static Verb, followed: Followed, job: Arc<Job>) {
        let begun = Instant::now();
        job.running();
        let result = self.follow_block_job(followed, job.clone()).await;
        self.log(&caller, verb, begun, result.as_ref().err());
        job.finish_shared(result);
    }
}

fn verb_of(block: &BlockJob) -> &'static Verb {
    let all = [&verb::BLOCK_PULL, &verb::BLOCK_COMMIT, &verb::BLOCK_COPY];
    all.into_iter().find(|verb| verb.word == block.operation()).unwrap_or(&verb::BLOCK_COPY)
}

/// Why it ended, in the hypervisor's words.
fn failure(block: &BlockJob, why: Option<String>) -> DriverError {
    match why {
        Some(why) if why.contains("No space left") => {
            DriverError::NoSpace(format!("disk '{}': {why}, where its new image is", block.target))
        }
        Some(why) => DriverError::Hypervisor(why),
        None => DriverError::Refused("somebody else has ended it".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_that_have_another_below_them_are_found() {
        let chain = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        let was = chain(&["top", "mid", "base"]);
        let moved = |is: &[&str]| on_another_base(&was, &chain(is));
        assert_eq!(moved(&["top", "base"]), [("top".into(), Some("base".into()))], "a commit or a pull");
        assert_eq!(moved(&["top"]), [("top".into(), None)], "all is pulled");
        assert_eq!(moved(&["copy", "mid", "base"]), [], "a new image is noted when it is made");
        assert_eq!(moved(&["mid", "base"]), [], "what was topmost is committed");
    }
}
