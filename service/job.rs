//! Jobs: one change at a time per domain, and the record of the long ones.
//!
//! Two things with two meanings. A [`Turn`] is the right to change one domain: first come, first served, given back on
//! drop. A [`Job`] is what the bus shows of long work: it outlives its caller, can be cancelled, and stays readable for
//! ten minutes after its end.
//!
//! ```text
//!  waiting ──▶ running ──▶ succeeded | failed | cancelled ──(10 min, or 256 younger ones)──▶ forgotten
//!     └─────────────────────────────▶ failed (Busy) | cancelled
//! ```

use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::events::{Event, Events};
use crate::shared::now_usec;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{OwnedMutexGuard, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How long a change waits for its turn before it is refused as `Busy`.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How long an ended job stays readable.
pub const READABLE: Duration = Duration::from_secs(600);

/// How many ended jobs are kept at the most.
pub const KEPT: usize = 256;

/// The right to change one domain.
#[derive(Debug, Default)]
pub struct Turn {
    queue: Arc<tokio::sync::Mutex<()>>,
    holder: Mutex<Option<Holder>>,
}

#[derive(Debug)]
struct Holder {
    what: String,
    give_up: CancellationToken,
    place: Weak<Place>,
}

/// A turn taken; given back when it and all its shares have been dropped.
#[derive(Debug)]
pub struct Held(Arc<Place>);

#[derive(Debug)]
struct Place {
    turn: Arc<Turn>,
    _guard: OwnedMutexGuard<()>,
}

impl Turn {
    /// Takes the turn if nobody has it or waits for it. `what` is shown to those who then find it taken; `give_up` is
    /// fired when a destroy wants through.
    pub fn try_take(self: &Arc<Self>, what: &str, give_up: &CancellationToken) -> Option<Held> {
        let place = self.queue.clone().try_lock_owned().ok()?;
        Some(self.held_by(what, give_up, place))
    }

    /// Waits for the turn, [`PATIENCE`] at most. Error: who has it.
    pub async fn take(self: &Arc<Self>, what: &str, give_up: &CancellationToken) -> Result<Held, String> {
        match tokio::time::timeout(PATIENCE, self.queue.clone().lock_owned()).await {
            Ok(place) => Ok(self.held_by(what, give_up, place)),
            Err(_) => Err(lock(&self.holder).as_ref().map_or_else(String::new, |h| h.what.clone())),
        }
    }

    /// Waits, however long it takes, until nobody has the turn who has it or waits for it now.
    pub async fn is_free(&self) {
        drop(self.queue.lock().await);
    }

    /// Asks whoever has the turn to give it up.
    pub fn ask_to_give_up(&self) {
        if let Some(holder) = lock(&self.holder).as_ref() {
            holder.give_up.cancel();
        }
    }

    /// A share in the turn that is held now, for work that may outlast its holder's interest in it: nobody else gets the turn
    /// before that work has ended, too. With it comes what fires when a destroy wants through. `None`: nobody holds it.
    pub fn share(&self) -> Option<(Held, CancellationToken)> {
        let holder = lock(&self.holder);
        let holder = holder.as_ref()?;
        Some((Held(holder.place.upgrade()?), holder.give_up.clone()))
    }

    fn held_by(self: &Arc<Self>, what: &str, give_up: &CancellationToken, guard: OwnedMutexGuard<()>) -> Held {
        let place = Arc::new(Place { turn: self.clone(), _guard: guard });
        let (what, give_up, place_of) = (what.to_owned(), give_up.clone(), Arc::downgrade(&place));
        *lock(&self.holder) = Some(Holder { what, give_up, place: place_of });
        Held(place)
    }
}

impl Held {
    /// Changes what those who wait are told.
    pub fn rename(&self, what: String) {
        if let Some(holder) = lock(&self.0.turn.holder).as_mut() {
            holder.what = what;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *lock(&self.turn.holder) = None;
    }
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// For its turn.
    Waiting,
    /// At work.
    Running,
    /// Done.
    Succeeded,
    /// Not done; the error says why.
    Failed,
    /// Not done, since somebody asked for that.
    Cancelled,
}

impl JobState {
    /// The word on the bus.
    pub fn as_str(self) -> &'static str {
        match self {
            JobState::Waiting => "waiting",
            JobState::Running => "running",
            JobState::Succeeded => "succeeded",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more will happen to it.
    pub fn is_final(self) -> bool {
        matches!(self, JobState::Succeeded | JobState::Failed | JobState::Cancelled)
    }
}

/// All that is published of a job.
#[derive(Clone, Debug)]
pub struct JobFacts {
    /// Its number, from 1, never used again while virtd runs.
    pub id: u64,
    /// The domain it works on.
    pub domain: Uuid,
    /// Where it stands.
    pub state: JobState,
    /// `start`, `save`, …
    pub operation: &'static str,
    /// Microseconds since the epoch.
    pub started_usec: u64,
    /// 0 to 1, -1 while unknown.
    pub progress: f64,
    /// Bytes done.
    pub bytes_done: u64,
    /// Bytes in all, 0 while unknown.
    pub bytes_total: u64,
    /// Whether `Cancel` would be heard.
    pub cancellable: bool,
    /// Who asked for it.
    pub requester_uid: u32,
    /// Why it failed or was cancelled.
    pub error: Option<Error>,
}

/// All jobs of this virtd: those under way and those that ended a short while ago.
#[derive(Debug)]
pub struct Jobs {
    events: Events,
    per_user: usize,
    table: Mutex<Table>,
    unfinished: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct Table {
    last: u64,
    entries: BTreeMap<u64, Entry>,
    /// Those that have ended, in the order of their ends.
    ended: VecDeque<(u64, Instant)>,
}

#[derive(Debug)]
struct Entry {
    facts: JobFacts,
    cancel: CancellationToken,
}

impl Jobs {
    /// None yet. `per_user` bounds the unfinished jobs of any user but root.
    pub fn new(events: Events, per_user: usize) -> Arc<Jobs> {
        Arc::new(Jobs { events, per_user, table: Mutex::default(), unfinished: watch::channel(0).0 })
    }

    /// Begins the record of a job that waits for its turn; `cancel` fires when it is to stop.
    /// Error: `LimitsExceeded` if the caller has too many under way.
    pub fn open(
        self: &Arc<Self>,
        caller: &Caller,
        domain: Uuid,
        operation: &'static str,
        cancel: CancellationToken,
    ) -> Result<(Job, Ticket)> {
        let mut table = lock(&self.table);
        let unfinished =
            table.entries.values().filter(|e| !e.facts.state.is_final() && e.facts.requester_uid == caller.uid).count();
        if caller.uid != 0 && unfinished >= self.per_user {
            return Err(Error::LimitsExceeded(format!(
                "user {} has {unfinished} jobs under way, which is the limit; wait for one to end",
                caller.uid
            )));
        }
        table.last += 1;
        let id = table.last;
        let facts = JobFacts {
            id,
            domain,
            state: JobState::Waiting,
            operation,
            started_usec: now_usec(),
            progress: -1.0,
            bytes_done: 0,
            bytes_total: 0,
            cancellable: true,
            requester_uid: caller.uid,
            error: None,
        };
        self.events.send(Event::Job(Arc::new(facts.clone())));
        self.unfinished.send_modify(|n| *n += 1);
        table.entries.insert(id, Entry { facts, cancel: cancel.clone() });
        let (outcome, wait) = oneshot::channel();
        Ok((Job { id, jobs: self.clone(), cancel, outcome: Mutex::new(Some(outcome)) }, Ticket { id, outcome: wait }))
    }

    /// Their numbers, oldest first.
    pub fn list(&self) -> Vec<u64> {
        lock(&self.table).entries.keys().copied().collect()
    }

    /// What is published of one.
    pub fn facts(&self, id: u64) -> Option<JobFacts> {
        lock(&self.table).entries.get(&id).map(|e| e.facts.clone())
    }

    /// Asks a job to stop; it ends as soon as it can. Error: `OperationInvalid` if it has ended.
    pub fn cancel(&self, id: u64) -> Result<()> {
        match lock(&self.table).entries.get(&id) {
            Some(e) if !e.facts.state.is_final() && e.facts.cancellable => e.cancel.cancel(),
            Some(e) if e.facts.state.is_final() => {
                let text = format!("job {id} ({}) has ended; there is nothing to cancel", e.facts.operation);
                return Err(Error::OperationInvalid(text));
            }
            Some(e) => {
                let text = format!("job {id} ({}) is past the point where it can be cancelled", e.facts.operation);
                return Err(Error::OperationInvalid(text));
            }
            None => return Err(Error::OperationInvalid(format!("there is no job {id}"))),
        }
        Ok(())
    }

    /// Waits until no job is under way.
    pub async fn idle(&self) {
        let mut unfinished = self.unfinished.subscribe();
        let _ = unfinished.wait_for(|n| *n == 0).await;
    }

    /// How far it has come, in bytes.
    fn progress(&self, id: u64, done: u64, total: u64) {
        self.change(id, |facts| {
            // What was cancelled may go on for a while by itself.
            if facts.state.is_final() {
                return;
            }
            facts.bytes_done = done;
            facts.bytes_total = total;
            if total > 0 {
                facts.progress = (done as f64 / total as f64).clamp(0.0, 1.0);
            }
        });
    }

    /// From here on it can only go to its end.
    fn past_return(&self, id: u64) {
        self.change(id, |facts| facts.cancellable = false);
    }

    fn change(&self, id: u64, change: impl FnOnce(&mut JobFacts)) {
        let mut table = lock(&self.table);
        if let Some(entry) = table.entries.get_mut(&id) {
            change(&mut entry.facts);
            self.events.send(Event::Job(Arc::new(entry.facts.clone())));
        }
    }

    fn ended(self: &Arc<Self>, id: u64) {
        self.unfinished.send_modify(|n| *n -= 1);
        let (oldest, first) = {
            let mut table = lock(&self.table);
            table.ended.push_back((id, Instant::now()));
            let oldest = if table.ended.len() > KEPT { table.ended.pop_front() } else { None };
            (oldest, table.ended.len() == 1)
        };
        if let Some((oldest, _)) = oldest {
            self.forget(oldest);
        }
        if first {
            tokio::spawn(forget_in_time(Arc::downgrade(self)));
        }
    }

    fn forget(&self, id: u64) {
        if lock(&self.table).entries.remove(&id).is_some() {
            self.events.send(Event::JobGone(id));
        }
    }
}

/// Forgets ended jobs when their time has come, until there are none.
async fn forget_in_time(jobs: Weak<Jobs>) {
    loop {
        let next = jobs.upgrade().and_then(|jobs| lock(&jobs.table).ended.front().copied());
        let Some((id, since)) = next else { return };
        tokio::time::sleep_until(since + READABLE).await;
        let Some(jobs) = jobs.upgrade() else { return };
        let due = lock(&jobs.table).ended.pop_front_if(|(front, _)| *front == id);
        if due.is_some() {
            jobs.forget(id);
        }
    }
}

/// One job at work. Dropped without [`Job::finish`] (its task panicked), it counts as failed.
#[derive(Debug)]
pub struct Job {
    id: u64,
    jobs: Arc<Jobs>,
    cancel: CancellationToken,
    outcome: Mutex<Option<oneshot::Sender<Result<()>>>>,
}

impl Job {
    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Fires when the job is to stop.
    pub fn cancel_token(&self) -> &CancellationToken {
        &self.cancel
    }

    /// What those who wait for the domain are told has it.
    pub fn label(&self, operation: &str) -> String {
        format!("{operation} (job {})", self.id)
    }

    /// Its turn has come.
    pub fn running(&self) {
        self.jobs.change(self.id, |facts| facts.state = JobState::Running);
    }

    /// How far it has come, in bytes.
    pub fn progress(&self, done: u64, total: u64) {
        self.jobs.progress(self.id, done, total);
    }

    /// Whether it is not past the point from which it can only go to its end.
    pub fn can_be_cancelled(&self) -> bool {
        self.jobs.facts(self.id).is_some_and(|facts| facts.cancellable)
    }

    /// From here on it can only go to its end.
    pub fn past_return(&self) {
        self.jobs.past_return(self.id);
    }

    /// Done or not. A failure after a cancellation counts as cancelled. The end is published before the ticket answers.
    pub fn finish(self, result: Result<()>) {
        self.end(result);
    }

    /// The same for one that others hold, too.
    pub fn finish_shared(self: Arc<Self>, result: Result<()>) {
        self.end(result);
    }

    fn end(&self, result: Result<()>) {
        let Some(outcome) = lock(&self.outcome).take() else { return };
        self.jobs.change(self.id, |facts| {
            facts.state = match &result {
                Ok(()) => JobState::Succeeded,
                Err(Error::Cancelled(_)) => JobState::Cancelled,
                Err(_) => JobState::Failed,
            };
            facts.cancellable = false;
            // Everybody reads it: who asked is told more by the ticket.
            facts.error = result.as_ref().err().map(Error::public);
            if result.is_ok() {
                facts.progress = 1.0;
            }
        });
        let _ = outcome.send(result);
        // Ends the tasks that would still cancel it.
        self.cancel.cancel();
        self.jobs.ended(self.id);
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.end(Err(Error::Internal(format!("job {} ended without a result; the log says more", self.id))));
    }
}

/// A job as its caller holds it.
#[derive(Debug)]
pub struct Ticket {
    /// The job's number.
    pub id: u64,
    outcome: oneshot::Receiver<Result<()>>,
}

impl Ticket {
    /// Waits for the end. Dropping the ticket does not stop the job.
    pub async fn done(self) -> Result<()> {
        self.outcome.await.unwrap_or_else(|_| Err(Error::Internal("the job vanished".to_owned())))
    }
}

/// Locks; a panic elsewhere while it was held left whole values behind, since no holder can fail half-way.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Caller {
        Caller { bus_name: None, uid: 0, interactive: false, departed: CancellationToken::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn turns_are_first_come_first_served() {
        let turn = Arc::new(Turn::default());
        let never = CancellationToken::new();
        let first = turn.try_take("save", &never).expect("free");
        assert!(turn.try_take("start", &never).is_none());
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut waiting = Vec::new();
        for n in 0..3 {
            let (turn, never, order) = (turn.clone(), never.clone(), order.clone());
            waiting.push(tokio::spawn(async move {
                let held = turn.take("x", &never).await.expect("in time");
                lock(&order).push(n);
                drop(held);
            }));
            tokio::task::yield_now().await;
        }
        drop(first);
        for task in waiting {
            task.await.expect("no panic");
        }
        assert_eq!(*lock(&order), [0, 1, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_too_long_is_told_who_has_it() {
        let turn = Arc::new(Turn::default());
        let never = CancellationToken::new();
        let _held = turn.try_take("save (job 7)", &never).expect("free");
        assert_eq!(turn.take("start", &never).await.expect_err("busy"), "save (job 7)");
    }

    #[tokio::test]
    async fn a_holder_can_be_asked_to_give_up() {
        let turn = Arc::new(Turn::default());
        let give_up = CancellationToken::new();
        let held = turn.try_take("save", &give_up).expect("free");
        turn.ask_to_give_up();
        assert!(give_up.is_cancelled());
        drop(held);
        turn.ask_to_give_up();
    }

    #[tokio::test]
    async fn a_turn_is_free_when_its_last_share_has_gone() {
        let turn = Arc::new(Turn::default());
        assert!(turn.share().is_none());
        let held = turn.try_take("start", &CancellationToken::new()).expect("free");
        let (share, give_up) = turn.share().expect("held");
        drop(held);
        assert!(turn.try_take("save", &CancellationToken::new()).is_none());
        turn.ask_to_give_up();
        assert!(give_up.is_cancelled());
        drop(share);
        assert!(turn.try_take("save", &CancellationToken::new()).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn an_ended_job_is_readable_for_ten_minutes() {
        let (events, _reader) = Events::channel();
        let jobs = Jobs::new(events, 4);
        let (job, ticket) = jobs.open(&root(), Uuid::nil(), "start", CancellationToken::new()).expect("opened");
        job.finish(Err(Error::Cancelled("stopped".to_owned())));
        let id = ticket.id;
        assert!(matches!(ticket.done().await, Err(Error::Cancelled(_))));
        assert_eq!(jobs.facts(id).expect("kept").state, JobState::Cancelled);
        tokio::time::sleep(READABLE - Duration::from_secs(1)).await;
        assert!(jobs.facts(id).is_some());
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(jobs.facts(id).is_none());
    }

    #[tokio::test]
    async fn only_the_last_256_ended_jobs_are_kept() {
        let (events, _reader) = Events::channel();
        let jobs = Jobs::new(events, 4);
        for _ in 0..KEPT + 10 {
            jobs.open(&root(), Uuid::nil(), "start", CancellationToken::new()).expect("opened").0.finish(Ok(()));
        }
        assert_eq!(jobs.list().len(), KEPT);
        assert_eq!(jobs.list()[0], 11);
    }

    #[tokio::test]
    async fn a_job_that_ends_late_is_kept_like_others() {
        let (events, _reader) = Events::channel();
        let jobs = Jobs::new(events, 4);
        let (long, _) = jobs.open(&root(), Uuid::nil(), "save", CancellationToken::new()).expect("opened");
        for _ in 0..KEPT {
            jobs.open(&root(), Uuid::nil(), "start", CancellationToken::new()).expect("opened").0.finish(Ok(()));
        }
        long.finish(Ok(()));
        assert_eq!((jobs.list().len(), jobs.list()[0]), (KEPT, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn each_ended_job_has_its_own_time() {
        let (events, _reader) = Events::channel();
        let jobs = Jobs::new(events, 4);
        let end_one =
            || jobs.open(&root(), Uuid::nil(), "start", CancellationToken::new()).expect("opened").0.finish(Ok(()));
        for expected in [1, 3, 5] {
            end_one();
            tokio::time::sleep(READABLE / 2).await;
            end_one();
            assert_eq!(jobs.list(), [expected, expected + 1]);
            tokio::time::sleep(READABLE / 2 + Duration::from_secs(1)).await;
            assert_eq!(jobs.list(), [expected + 1]);
            tokio::time::sleep(READABLE).await;
            assert!(jobs.list().is_empty());
        }
    }

    #[tokio::test]
    async fn jobs_per_user_are_bounded() {
        let (events, _reader) = Events::channel();
        let jobs = Jobs::new(events, 2);
        let caller = Caller { uid: 1000, ..root() };
        let one = jobs.open(&caller, Uuid::nil(), "start", CancellationToken::new()).expect("first");
        let _two = jobs.open(&caller, Uuid::nil(), "start", CancellationToken::new()).expect("second");
        assert!(matches!(
            jobs.open(&caller, Uuid::nil(), "start", CancellationToken::new()),
            Err(Error::LimitsExceeded(_))
        ));
        one.0.finish(Ok(()));
        jobs.open(&caller, Uuid::nil(), "start", CancellationToken::new()).expect("room again");
    }

    #[tokio::test]
    async fn a_job_whose_task_vanished_has_failed() {
        let (events, _reader) = Events::channel();
        let jobs = Jobs::new(events, 2);
        let (job, ticket) = jobs.open(&root(), Uuid::nil(), "start", CancellationToken::new()).expect("opened");
        drop(job);
        assert!(matches!(ticket.done().await, Err(Error::Internal(_))));
    }
}
