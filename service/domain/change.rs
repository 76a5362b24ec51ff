//! The frames in which every verb runs: permission, turn, state, the work, the line in the log. What differs between verbs
//! is read from their rows (`verb.rs`).
//!
//! ```text
//!  beside: permission ─▶ state ─▶ work ─▶ log
//!  short:  permission ─▶ turn ─▶ recovery ─▶ state ─▶ work ─▶ log
//!  job:    permission ─▶ turn, if it is free ─▶ record of the job ─▶ the caller's reply, or its wait for the end
//!                                                       └─▶ turn ─▶ recovery ─▶ work ─▶ log ─▶ end of the job
//!                                                           (what begins and goes on gives the turn back in between)
//! ```

use super::Domain;
use crate::authz::{Action, Caller, Subject};
use crate::error::{Error, Result};
use crate::job::{Job, Ticket};
use crate::lock::lock;
use crate::log;
use crate::turn::{GRACE, TurnGuard};
use crate::verb::Verb;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

/// A verb that is accepted, and whose job is to be begun.
pub(super) struct Change {
    domain: Arc<Domain>,
    caller: Caller,
    verb: &'static Verb,
    cancel: CancellationToken,
    turn: Option<TurnGuard>,
}

/// A job that is on record, and whose work is still to be given.
pub(super) struct OpenJob {
    change: Change,
    job: Arc<Job>,
    ticket: Ticket,
}

impl Domain {
    /// Asks whether `caller` may do `action`, that of a verb's row or what is needed beside it. Refuses a domain that has gone,
    /// or whose own files cannot be used. `None` is for everybody.
    pub(crate) async fn allow(&self, caller: &Caller, action: impl Into<Option<Action>>) -> Result<()> {
        let Some(action) = self.allow_for(caller, action.into(), &self.subject()).await? else { return Ok(()) };
        lock(&self.state).sound_for(action)
    }

    /// The same for the snapshot `name`; of a domain whose own files cannot be used, that is said when its machine is looked at.
    pub(super) async fn allow_snapshot(
        &self,
        caller: &Caller,
        action: impl Into<Option<Action>>,
        name: &str,
    ) -> Result<()> {
        self.allow_for(caller, action.into(), &self.snapshot_subject(name)).await.map(drop)
    }

    async fn allow_for(&self, caller: &Caller, action: Option<Action>, subject: &Subject) -> Result<Option<Action>> {
        self.still_here()?;
        if let Some(action) = action {
            self.shared.authority.check(caller, action, subject).await?;
            self.still_here()?;
        }
        Ok(action)
    }

    /// A verb that changes nothing that others could be at: it goes on beside whatever is done to the domain, and keeps nobody
    /// waiting. The state was one in which the verb has a meaning; `work` must bear that it is another meanwhile.
    pub(super) async fn beside<T>(
        &self,
        caller: &Caller,
        verb: &Verb,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let work = Box::pin(work);
        self.logged(caller, verb, async {
            self.allow(caller, verb.action).await?;
            self.applies(verb)?;
            work.await
        })
        .await
    }

    /// A short verb: its caller waits for the end. `work` has the turn, and the state is one in which the verb has a meaning.
    pub(super) async fn short<T>(
        self: &Arc<Self>,
        caller: &Caller,
        verb: &Verb,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        // On the heap: in a debug build each frame would move it once more.
        let work = Box::pin(work);
        self.logged(caller, verb, async {
            self.allow(caller, verb.action).await?;
            let _turn = self.take_turn(verb.word, &CancellationToken::new()).await?;
            if verb.waits_for_recovery() {
                self.finish_interrupted_soon().await?;
            }
            self.applies(verb)?;
            work.await
        })
        .await
    }

    /// The first step of a long verb whose permission has been asked. If nobody has the turn, the change has it: what then can
    /// be checked is checked before [`Change::open`].
    pub(super) fn change(self: &Arc<Self>, caller: &Caller, verb: &'static Verb) -> Change {
        let cancel = CancellationToken::new();
        let turn = self.turn.try_take(verb.word, &cancel);
        Change { domain: self.clone(), caller: caller.clone(), verb, cancel, turn }
    }

    pub(super) async fn take_turn(&self, word: &str, give_up: &CancellationToken) -> Result<TurnGuard> {
        let turn = self.turn.take(word, give_up).await.map_err(|job| self.busy_with(job))?;
        self.still_here()?;
        Ok(turn)
    }

    /// The refusal of who has waited for the turn, or for what is mended first.
    pub(super) fn busy_with(&self, job: String) -> Error {
        Error::Busy { object: format!("domain '{}'", self.name()), job }
    }

    /// From now on nobody waits for work that was cancelled: those who want the turn are told what has it.
    fn undone_later(&self, verb: &Verb) -> Error {
        let word = verb.word;
        if let Some((turn, _)) = self.turn.share() {
            turn.rename(format!("undoing a {word} that was cancelled"));
        }
        let domain = self.name();
        Error::Cancelled(format!(
            "the {word} of domain '{domain}' was cancelled, and its hypervisor or its storage does not answer: what was begun \
             is undone when it does, or when the domain is destroyed, and nothing else begins before"
        ))
    }

    /// Does `work`, and writes the line in the log that says who did what to this domain, how it went and how long it took.
    pub(crate) async fn logged<T>(
        &self,
        caller: &Caller,
        verb: &Verb,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let begun = Instant::now();
        let result = work.await;
        self.log(caller, verb, begun, result.as_ref().err());
        result
    }

    /// The same for a long verb until it is accepted: from then on its job writes that line.
    pub(super) async fn accepted<T>(
        &self,
        caller: &Caller,
        verb: &Verb,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let begun = Instant::now();
        work.await.inspect_err(|e| self.log(caller, verb, begun, Some(e)))
    }

    pub(crate) fn log(&self, caller: &Caller, verb: &Verb, begun: Instant, failure: Option<&Error>) {
        match failure {
            None => log::done(self.uuid, &self.name(), caller, verb, begun),
            Some(error) => log::failed(self.uuid, &self.name(), caller, verb, begun, error),
        }
    }
}

impl Change {
    /// Whether it has the turn already.
    pub fn has_turn(&self) -> bool {
        self.turn.is_some()
    }

    /// Puts the job on record. `departs`: it is cancelled when its caller leaves the bus.
    /// Error: `LimitsExceeded` if the caller has too many jobs under way.
    pub fn open(self, departs: bool) -> Result<OpenJob> {
        let (domain, verb) = (&self.domain, self.verb);
        let (job, ticket) = domain.shared.jobs.open(&self.caller, domain.uuid, verb.word, self.cancel.clone())?;
        if departs {
            cancel_when_gone(&self.caller, &self.cancel);
        }
        Ok(OpenJob { job: Arc::new(job), ticket, change: self })
    }

    /// What it waits for may never answer. A job that is cancelled ends soon all the same: the work goes on by itself, to be
    /// undone when it is answered, and the turn is not free before that has ended.
    async fn run<F, T>(self, job: &Arc<Job>, work: impl FnOnce(Arc<Domain>, Arc<Job>) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let Change { domain, verb, turn, .. } = self;
        let cancelled = || Error::Cancelled(format!("the {} of domain '{}' was cancelled", verb.word, domain.name()));
        let turn = match turn {
            Some(turn) => turn,
            None => tokio::select! {
                turn = domain.take_turn(verb.word, job.cancel_token()) => turn?,
                () = job.cancel_token().cancelled() => return Err(cancelled()),
            },
        };
        turn.rename(job.label(verb.word));
        job.running();
        domain.finish_interrupted().await?;
        let (doer, of, work) = (domain.clone(), job.clone(), work(domain.clone(), job.clone()));
        let mut work = tokio::spawn(async move {
            let done = work.await;
            if of.cancel_token().is_cancelled() {
                doer.wants_no_guest().await;
            }
            // Where the guest was paused for it and went on, that is published before the reply.
            doer.all_told().await;
            drop(turn);
            done
        });
        let given_up = async {
            job.cancel_token().cancelled().await;
            tokio::time::sleep(GRACE).await;
            if !job.can_be_cancelled() {
                // It goes to its end, and its job with it.
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            done = &mut work => done.unwrap_or_else(|e| Err(Error::Internal(e.to_string()))),
            () = given_up => Err(domain.undone_later(verb)),
        }
    }
}

impl OpenJob {
    /// Whether it has the turn already.
    pub fn has_turn(&self) -> bool {
        self.change.has_turn()
    }

    /// Fires when the job is to end.
    pub fn cancel_token(&self) -> &CancellationToken {
        &self.change.cancel
    }

    /// Does `work` when its turn has come; whatever `work` has taken along is dropped before the job ends.
    pub fn run<F>(self, work: impl FnOnce(Arc<Domain>, Arc<Job>) -> F + Send + 'static) -> Ticket
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let OpenJob { change, job, ticket } = self;
        tokio::spawn(async move {
            let (begun, domain, caller, verb) =
                (Instant::now(), change.domain.clone(), change.caller.clone(), change.verb);
            let result = change.run(&job, work).await;
            domain.log(&caller, verb, begun, result.as_ref().err());
            job.finish_shared(result);
        });
        ticket
    }
}

impl OpenJob {
    /// The same where the turn is given back when `begin` is done, and `rest` follows what goes on from there.
    pub fn run_beyond<F, G, T>(
        self,
        begin: impl FnOnce(Arc<Domain>, Arc<Job>) -> F + Send + 'static,
        rest: impl FnOnce(Arc<Domain>, Arc<Job>, T) -> G + Send + 'static,
    ) -> Ticket
    where
        F: Future<Output = Result<T>> + Send + 'static,
        G: Future<Output = Result<()>> + Send + 'static,
        T: Send + 'static,
    {
        let OpenJob { change, job, ticket } = self;
        tokio::spawn(async move {
            let (begun, domain, caller, verb) =
                (Instant::now(), change.domain.clone(), change.caller.clone(), change.verb);
            let begins = move |domain: Arc<Domain>, job: Arc<Job>| {
                let begun = begin(domain.clone(), job.clone());
                async move {
                    let begun = begun.await?;
                    Ok(Rest(Some(Box::pin(rest(domain, job, begun)))))
                }
            };
            let result = match change.run(&job, begins).await {
                Ok(rest) => rest.done().await,
                Err(error) => Err(error),
            };
            domain.log(&caller, verb, begun, result.as_ref().err());
            job.finish_shared(result);
        });
        ticket
    }
}

/// What follows what has begun. It is done even if nobody waits for it any more: a job that was cancelled, and ended before its
/// work had begun, leaves nothing that goes on without it.
struct Rest(Option<Pin<Box<dyn Future<Output = Result<()>> + Send>>>);

impl Rest {
    async fn done(mut self) -> Result<()> {
        match self.0.take() {
            Some(rest) => rest.await,
            None => Ok(()),
        }
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        let (Some(rest), Ok(runtime)) = (self.0.take(), Handle::try_current()) else { return };
        runtime.spawn(async move {
            if let Err(error) = rest.await {
                tracing::info!(%error, "what had begun when nobody waited for it any more has ended");
            }
        });
    }
}

/// Fires `cancel` when the caller leaves; ends with the job.
pub(super) fn cancel_when_gone(caller: &Caller, cancel: &CancellationToken) {
    let (departed, cancel) = (caller.departed.clone(), cancel.clone());
    tokio::spawn(async move {
        if cancel.run_until_cancelled(departed.cancelled()).await.is_some() {
            cancel.cancel();
        }
    });
}
