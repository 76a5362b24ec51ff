//! The frames in which every verb runs, whatever kind of object it is done to: permission, turn, state, the work, the line in the
//! log. What differs between verbs is read from their rows (`verb.rs`), and what differs between kinds from [`Changeable`].
//!
//! ```text
//!  beside: permission ─▶ state ─▶ work ─▶ log
//!  short:  permission ─▶ turn ─▶ recovery ─▶ state ─▶ work ─▶ log
//!  job:    permission ─▶ turn, if it is free ─▶ record of the job ─▶ the caller's reply, or its wait for the end
//!                                                       └─▶ turn ─▶ recovery ─▶ work ─▶ log ─▶ end of the job
//!                                                           (what begins and goes on gives the turn back in between)
//! ```

use crate::authz::{Action, Caller, Subject};
use crate::error::{Error, Result};
use crate::job::{Job, Ticket};
use crate::log;
use crate::object::{ObjectKind, ObjectRef};
use crate::shared::Shared;
use crate::turn::{Turn, TurnGuard};
use crate::verb::Verb;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

/// What verbs are done to.
pub(crate) trait Changeable: Send + Sync + 'static {
    /// Its kind.
    const KIND: ObjectKind;

    /// What all objects share.
    fn shared(&self) -> &Arc<Shared>;

    /// The right to change it.
    fn turn(&self) -> &Arc<Turn>;

    /// Which object it is.
    fn reference(&self) -> ObjectRef;

    /// Its name today.
    fn name(&self) -> String;

    /// What polkit is told of it.
    fn subject(&self) -> Subject;

    /// An object may go while somebody waits for it.
    fn still_here(&self) -> Result<()>;

    /// Refuses what cannot be done to an object whose own files cannot be used.
    fn sound_for(&self, action: Action) -> Result<()>;

    /// Refuses a verb that has no meaning in the state in which it is.
    fn applies(&self, verb: &Verb) -> Result<()>;

    /// Finishes or undoes what was cut off, before anything else begins. For who has the turn.
    fn recovers(self: &Arc<Self>) -> impl Future<Output = Result<()>> + Send {
        async { Ok(()) }
    }

    /// The same for a verb whose caller waits for the answer.
    fn recovers_soon(self: &Arc<Self>) -> impl Future<Output = Result<()>> + Send {
        self.recovers()
    }

    /// The work of a job has ended, and its turn is given back.
    fn settles(self: &Arc<Self>, _cancelled: bool) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// Why a job that was cancelled goes on by itself, and until when.
    const UNDONE_LATER: &str = "what it waits for does not answer: what was begun is undone when it does";
}

/// An object by its name, as errors say it.
fn named<O: Changeable>(object: &O) -> String {
    O::KIND.named(&object.name())
}

/// Asks whether `caller` may do `action`, that of a verb's row or what is needed beside it. Refuses an object that has gone,
/// or whose own files cannot be used. `None` is for everybody.
pub(crate) async fn allow<O: Changeable>(object: &O, caller: &Caller, action: impl Into<Option<Action>>) -> Result<()> {
    let action = action.into();
    allow_for(object, caller, action, &object.subject()).await?;
    action.map_or(Ok(()), |action| object.sound_for(action))
}

/// The same about a part of it, without a look at its files.
pub(crate) async fn allow_for<O: Changeable>(
    object: &O,
    caller: &Caller,
    action: Option<Action>,
    subject: &Subject,
) -> Result<()> {
    object.still_here()?;
    if let Some(action) = action {
        object.shared().authority.check(caller, action, subject).await?;
        object.still_here()?;
    }
    Ok(())
}

/// What `Can` says of a verb: `yes`, `no`, `challenge` (a person would be asked) or `na` (not in this state). Never prompts.
pub(crate) async fn can<O: Changeable>(object: &O, caller: &Caller, verb: &Verb) -> &'static str {
    let Some(action) = verb.action else { return "yes" };
    if object.applies(verb).and_then(|()| object.sound_for(action)).is_err() {
        return "na";
    }
    object.shared().authority.can(caller, action, &object.subject()).await.as_str()
}

/// A verb that changes nothing that others could be at: it goes on beside whatever is done to the object, and keeps nobody
/// waiting. The state was one in which the verb has a meaning; `work` must bear that it is another meanwhile.
pub(crate) async fn beside<O: Changeable, T>(
    object: &O,
    caller: &Caller,
    verb: &Verb,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let work = Box::pin(work);
    logged(object, caller, verb, async {
        allow(object, caller, verb.action).await?;
        object.applies(verb)?;
        work.await
    })
    .await
}

/// A short verb: its caller waits for the end. `work` has the turn, and the state is one in which the verb has a meaning.
pub(crate) async fn short<O: Changeable, T>(
    object: &Arc<O>,
    caller: &Caller,
    verb: &Verb,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    // On the heap: in a debug build each frame would move it once more.
    let work = Box::pin(work);
    logged(&**object, caller, verb, async {
        allow(&**object, caller, verb.action).await?;
        let _turn = take_turn(&**object, verb.word, &CancellationToken::new()).await?;
        if verb.waits_for_recovery() {
            object.recovers_soon().await?;
        }
        object.applies(verb)?;
        work.await
    })
    .await
}

/// The first step of a long verb whose permission has been asked. If nobody has the turn, the change has it: what then can
/// be checked is checked before [`Change::open`].
pub(crate) fn change<O: Changeable>(object: &Arc<O>, caller: &Caller, verb: &'static Verb) -> Change<O> {
    let cancel = CancellationToken::new();
    let turn = object.turn().try_take(verb.word, &cancel);
    Change { object: object.clone(), caller: caller.clone(), verb, cancel, turn }
}

/// The turn, which is waited for. Error: `Busy`.
pub(crate) async fn take_turn<O: Changeable>(object: &O, word: &str, give_up: &CancellationToken) -> Result<TurnGuard> {
    let turn = object.turn().take(word, give_up).await;
    let turn = turn.map_err(|job| Error::Busy { object: named(object), job })?;
    object.still_here()?;
    Ok(turn)
}

/// Does `work`, and writes the line in the log that says who did what to this object, how it went and how long it took.
pub(crate) async fn logged<O: Changeable, T>(
    object: &O,
    caller: &Caller,
    verb: &Verb,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let begun = Instant::now();
    let result = accepted(object, caller, verb, work).await?;
    log_of(object, caller, verb, begun, None);
    Ok(result)
}

/// The same for a long verb until it is accepted: from then on its job writes that line.
pub(crate) async fn accepted<O: Changeable, T>(
    object: &O,
    caller: &Caller,
    verb: &Verb,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let begun = Instant::now();
    work.await.inspect_err(|e| log_of(object, caller, verb, begun, Some(e)))
}

/// That line.
pub(crate) fn log_of<O: Changeable>(object: &O, caller: &Caller, verb: &Verb, begun: Instant, failure: Option<&Error>) {
    let (uuid, name) = (object.reference().uuid(), object.name());
    match failure {
        None => log::done(O::KIND, uuid, &name, caller, verb, begun),
        Some(error) => log::failed(O::KIND, uuid, &name, caller, verb, begun, error),
    }
}

/// A verb that is accepted, and whose job is to be begun.
pub(crate) struct Change<O> {
    object: Arc<O>,
    caller: Caller,
    verb: &'static Verb,
    cancel: CancellationToken,
    turn: Option<TurnGuard>,
}

/// A job that is on record, and whose work is still to be given.
pub(crate) struct OpenJob<O> {
    change: Change<O>,
    job: Arc<Job>,
    ticket: Ticket,
}

impl<O: Changeable> Change<O> {
    /// Whether it has the turn already.
    pub fn has_turn(&self) -> bool {
        self.turn.is_some()
    }

    /// Puts the job on record. `departs`: it is cancelled when its caller leaves the bus.
    /// Error: `LimitsExceeded` if the caller has too many jobs under way.
    pub fn open(self, departs: bool) -> Result<OpenJob<O>> {
        let (jobs, reference) = (&self.object.shared().jobs, self.object.reference());
        let (job, ticket) = jobs.open(&self.caller, reference, self.verb.word, self.cancel.clone())?;
        if departs {
            cancel_when_gone(&self.caller, &self.cancel);
        }
        Ok(OpenJob { job: Arc::new(job), ticket, change: self })
    }

    /// What it waits for may never answer. A job that is cancelled ends soon all the same: the work goes on by itself, to be
    /// undone when it is answered, and the turn is not free before that has ended.
    async fn run<F, T>(self, job: &Arc<Job>, work: impl FnOnce(Arc<O>, Arc<Job>) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let Change { object, verb, turn, .. } = self;
        let cancelled = || Error::Cancelled(format!("the {} of {} was cancelled", verb.word, named(&*object)));
        let turn = match turn {
            Some(turn) => turn,
            None => tokio::select! {
                turn = take_turn(&*object, verb.word, job.cancel_token()) => turn?,
                () = job.cancel_token().cancelled() => return Err(cancelled()),
            },
        };
        turn.rename(job.label(verb.word));
        job.running();
        object.recovers().await?;
        let (doer, of, work) = (object.clone(), job.clone(), work(object.clone(), job.clone()));
        let mut work = tokio::spawn(async move {
            let done = work.await;
            doer.settles(of.cancel_token().is_cancelled()).await;
            drop(turn);
            done
        });
        tokio::select! {
            done = &mut work => done.unwrap_or_else(|e| Err(Error::Internal(e.to_string()))),
            () = job.given_up() => Err(undone_later(&*object, verb)),
        }
    }
}

/// From now on nobody waits for work that was cancelled: those who want the turn are told what has it.
fn undone_later<O: Changeable>(object: &O, verb: &Verb) -> Error {
    let word = verb.word;
    if let Some((turn, _)) = object.turn().share() {
        turn.rename(format!("undoing a {word} that was cancelled"));
    }
    let (object, why) = (named(object), O::UNDONE_LATER);
    Error::Cancelled(format!("the {word} of {object} was cancelled, and {why}, and nothing else begins before"))
}

impl<O: Changeable> OpenJob<O> {
    /// Whether it has the turn already.
    pub fn has_turn(&self) -> bool {
        self.change.has_turn()
    }

    /// Fires when the job is to end.
    pub fn cancel_token(&self) -> &CancellationToken {
        &self.change.cancel
    }

    /// Does `work` when its turn has come; whatever `work` has taken along is dropped before the job ends.
    pub fn run<F>(self, work: impl FnOnce(Arc<O>, Arc<Job>) -> F + Send + 'static) -> Ticket
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let OpenJob { change, job, ticket } = self;
        tokio::spawn(async move {
            let (begun, object, caller, verb) =
                (Instant::now(), change.object.clone(), change.caller.clone(), change.verb);
            let result = change.run(&job, work).await;
            log_of(&*object, &caller, verb, begun, result.as_ref().err());
            job.finish_shared(result);
        });
        ticket
    }

    /// The same where the turn is given back when `begin` is done, and `rest` follows what goes on from there.
    pub fn run_beyond<F, G, T>(
        self,
        begin: impl FnOnce(Arc<O>, Arc<Job>) -> F + Send + 'static,
        rest: impl FnOnce(Arc<O>, Arc<Job>, T) -> G + Send + 'static,
    ) -> Ticket
    where
        F: Future<Output = Result<T>> + Send + 'static,
        G: Future<Output = Result<()>> + Send + 'static,
        T: Send + 'static,
    {
        let OpenJob { change, job, ticket } = self;
        tokio::spawn(async move {
            let (begun, object, caller, verb) =
                (Instant::now(), change.object.clone(), change.caller.clone(), change.verb);
            let begins = move |object: Arc<O>, job: Arc<Job>| {
                let begun = begin(object.clone(), job.clone());
                async move {
                    let begun = begun.await?;
                    Ok(Rest(Some(Box::pin(rest(object, job, begun)))))
                }
            };
            let result = match change.run(&job, begins).await {
                Ok(rest) => rest.done().await,
                Err(error) => Err(error),
            };
            log_of(&*object, &caller, verb, begun, result.as_ref().err());
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
pub(crate) fn cancel_when_gone(caller: &Caller, cancel: &CancellationToken) {
    let (departed, cancel) = (caller.departed.clone(), cancel.clone());
    tokio::spawn(async move {
        if cancel.run_until_cancelled(departed.cancelled()).await.is_some() {
            cancel.cancel();
        }
    });
}
