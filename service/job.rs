//! The record of long work, as the bus shows it: a [`Job`] outlives its caller, can be cancelled, and stays readable for
//! a while after its end.
//!
//! ```text
//!  waiting ──▶ running ──▶ succeeded | failed | cancelled ──(10 min, or 32 younger ones)──▶ forgotten
//!     └─────────────────────────────▶ failed (Busy) | cancelled
//! ```
//!
//! Work that goes on until somebody finishes it says that it is [ready](Job::ready), and waits until [that is asked
//! for](Job::finish_token).

use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::events::{Event, Events};
use crate::facts::{JobFacts, JobState};
use crate::lock::lock;
use crate::object::ObjectRef;
use crate::time::now_usec;
use crate::turn::past_grace;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long an ended job stays readable.
pub const READABLE: Duration = Duration::from_secs(600);

/// How many ended jobs are kept at the most.
pub const KEPT: usize = 32;

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
    /// Fires when work that is ready is to be finished.
    finish: CancellationToken,
    /// Fires when it is ready, or has ended.
    settled: CancellationToken,
    /// Fires when it has ended.
    over: CancellationToken,
    /// Nobody waits for it when virtd ends: the next one finds it again.
    outlives_virtd: bool,
}

impl Jobs {
    /// None yet. `per_user` bounds the unfinished jobs of any user but root; the first one's number follows `last`.
    pub fn new(events: Events, per_user: usize, last: u64) -> Arc<Jobs> {
        let table = Mutex::new(Table { last, ..Table::default() });
        Arc::new(Jobs { events, per_user, table, unfinished: watch::channel(0).0 })
    }

    /// Begins the record of a job that waits for its turn; `cancel` fires when it is to stop.
    /// Error: `LimitsExceeded` if the caller has too many under way.
    pub fn open(
        self: &Arc<Self>,
        caller: &Caller,
        object: ObjectRef,
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
        Ok(self.enter(&mut table, caller.uid, object, operation, cancel))
    }

    /// Begins the record of work that was found under way, which the user `uid` asked an earlier virtd for: no limit holds it up.
    pub fn open_again(
        self: &Arc<Self>,
        uid: u32,
        object: ObjectRef,
        operation: &'static str,
        cancel: CancellationToken,
    ) -> (Job, Ticket) {
        self.enter(&mut lock(&self.table), uid, object, operation, cancel)
    }

    fn enter(
        self: &Arc<Self>,
        table: &mut Table,
        uid: u32,
        object: ObjectRef,
        operation: &'static str,
        cancel: CancellationToken,
    ) -> (Job, Ticket) {
        table.last += 1;
        let id = table.last;
        let facts = JobFacts {
            id,
            object,
            state: JobState::Waiting,
            operation,
            started_usec: now_usec(),
            progress: -1.0,
            bytes_done: 0,
            bytes_total: 0,
            cancellable: true,
            ready: false,
            requester_uid: uid,
            error: None,
        };
        self.events.send(Event::Job(Arc::new(facts.clone())));
        self.unfinished.send_modify(|n| *n += 1);
        let [finish, settled, over] = std::array::from_fn(|_| CancellationToken::new());
        let (own_cancel, own_finish, own_settled) = (cancel.clone(), finish.clone(), settled.clone());
        let entry =
            Entry { facts, cancel: own_cancel, finish: own_finish, settled: own_settled, over, outlives_virtd: false };
        table.entries.insert(id, entry);
        let (outcome, wait) = oneshot::channel();
        let job = Job { id, jobs: self.clone(), cancel, finish, outcome: Mutex::new(Some(outcome)) };
        (job, Ticket { id, settled, outcome: wait })
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

    /// Asks a job that is ready to finish, and waits for its end if `wait`.
    /// Errors: `OperationInvalid` if it is not ready, what it failed with.
    pub async fn ask_to_finish(&self, id: u64, wait: bool) -> Result<()> {
        let over = match lock(&self.table).entries.get(&id) {
            Some(e) if e.facts.ready => {
                e.finish.cancel();
                e.over.clone()
            }
            Some(e) if e.facts.state.is_final() => {
                let text = format!("job {id} ({}) has ended; there is nothing to finish", e.facts.operation);
                return Err(Error::OperationInvalid(text));
            }
            Some(e) => {
                let text = format!(
                    "job {id} ({}) is not ready to be finished: wait until its property Ready is true, which it never is where \
                     work ends by itself",
                    e.facts.operation
                );
                return Err(Error::OperationInvalid(text));
            }
            None => return Err(Error::OperationInvalid(format!("there is no job {id}"))),
        };
        if wait {
            over.cancelled().await;
            // It may be forgotten by now, if many others have ended since.
            return self.facts(id).and_then(|facts| facts.error).map_or(Ok(()), Err);
        }
        Ok(())
    }

    /// Asks all jobs of an operation to stop.
    pub(crate) fn cancel_all(&self, operation: &str) {
        let table = lock(&self.table);
        let all = table.entries.values().filter(|entry| entry.facts.operation == operation);
        all.for_each(|entry| entry.cancel.cancel());
    }

    /// Waits until no job is under way, but for those that outlive this virtd.
    pub async fn idle(&self) {
        let mut unfinished = self.unfinished.subscribe();
        let _ = unfinished.wait_for(|n| *n == 0).await;
    }

    /// How far it has come, in bytes or in something else.
    fn progress(&self, id: u64, done: u64, total: u64, in_bytes: bool) {
        self.change(id, |facts| {
            // What was cancelled may go on for a while by itself.
            if facts.state.is_final() {
                return;
            }
            (facts.bytes_done, facts.bytes_total) = if in_bytes { (done, total) } else { (0, 0) };
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
        let outlives = lock(&self.table).entries.get(&id).is_some_and(|entry| entry.outlives_virtd);
        self.unfinished.send_modify(|n| *n -= usize::from(!outlives));
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
    finish: CancellationToken,
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

    /// Fires when the work, which has been [ready](Job::ready), is to be finished.
    pub fn finish_token(&self) -> &CancellationToken {
        &self.finish
    }

    /// It has come so far that it waits for somebody to finish it.
    pub fn ready(&self) {
        self.jobs.change(self.id, |facts| facts.ready = !facts.state.is_final());
        lock(&self.jobs.table).entries.get(&self.id).inspect(|entry| entry.settled.cancel());
    }

    /// From here on nobody waits for it when virtd ends: the next virtd finds it again.
    pub fn outlives_virtd(&self) {
        let mut table = lock(&self.jobs.table);
        let entry = table.entries.get_mut(&self.id).filter(|entry| !entry.facts.state.is_final());
        if entry.is_some_and(|entry| !std::mem::replace(&mut entry.outlives_virtd, true)) {
            self.jobs.unfinished.send_modify(|n| *n -= 1);
        }
    }

    /// What those who wait for its object are told has it.
    pub fn label(&self, operation: &str) -> String {
        format!("{operation} (job {})", self.id)
    }

    /// Its turn has come.
    pub fn running(&self) {
        self.jobs.change(self.id, |facts| facts.state = JobState::Running);
    }

    /// How far it has come, in bytes.
    pub fn progress(&self, done: u64, total: u64) {
        self.jobs.progress(self.id, done, total, true);
    }

    /// How much of it is done, of `total`, where that is not counted in bytes.
    pub fn part_done(&self, done: u64, total: u64) {
        self.jobs.progress(self.id, done, total, false);
    }

    /// Whether it is not past the point from which it can only go to its end.
    pub fn can_be_cancelled(&self) -> bool {
        self.jobs.facts(self.id).is_some_and(|facts| facts.cancellable)
    }

    /// Resolves when nobody waits for its work any more: it was cancelled, and the work has had its time to end. One that can
    /// only go to its end is never given up.
    pub async fn given_up(&self) {
        past_grace(self.cancel_token()).await;
        if !self.can_be_cancelled() {
            std::future::pending::<()>().await;
        }
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
            (facts.cancellable, facts.ready) = (false, false);
            // Everybody reads it: who asked is told more by the ticket.
            facts.error = result.as_ref().err().map(Error::public);
            if result.is_ok() {
                facts.progress = 1.0;
            }
        });
        let _ = outcome.send(result);
        lock(&self.jobs.table).entries.get(&self.id).inspect(|entry| {
            entry.over.cancel();
            entry.settled.cancel();
        });
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
    settled: CancellationToken,
    outcome: oneshot::Receiver<Result<()>>,
}

impl Ticket {
    /// Waits for the end. Dropping the ticket does not stop the job.
    pub async fn done(self) -> Result<()> {
        self.outcome.await.unwrap_or_else(|_| Err(Error::Internal("the job vanished".to_owned())))
    }

    /// Waits until it is ready, or has ended.
    pub async fn ready_or_done(mut self) -> Result<()> {
        self.settled.cancelled().await;
        match self.outcome.try_recv() {
            Ok(result) => result,
            Err(oneshot::error::TryRecvError::Empty) => Ok(()),
            Err(oneshot::error::TryRecvError::Closed) => self.done().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Caller {
        Caller { bus_name: None, uid: 0, interactive: false, departed: CancellationToken::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn an_ended_job_is_readable_for_ten_minutes() {
        let (events, _reader) = Events::channel();
        let jobs = Jobs::new(events, 4, 0);
        let (job, ticket) = jobs.open(&root(), ObjectRef::Foreign, "start", CancellationToken::new()).expect("opened");
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
    async fn only_the_last_32_ended_jobs_are_kept() {
        let (events, _reader) = Events::channel();
        let jobs = Jobs::new(events, 4, 0);
        for _ in 0..KEPT + 10 {
            jobs.open(&root(), ObjectRef::Foreign, "start", CancellationToken::new()).expect("opened").0.finish(Ok(()));
        }
        assert_eq!(jobs.list(), (11..=42).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_job_that_ends_late_is_kept_like_others() {
        let (events, _reader) = Events::channel();
        let jobs = Jobs::new(events, 4, 0);
        let (long, _) = jobs.open(&root(), ObjectRef::Foreign, "save", CancellationToken::new()).expect("opened");
        for _ in 0..KEPT {
            jobs.open(&root(), ObjectRef::Foreign, "start", CancellationToken::new()).expect("opened").0.finish(Ok(()));
        }
        long.finish(Ok(()));
        assert_eq!((jobs.list().len(), jobs.list()[0]), (KEPT, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn each_ended_job_has_its_own_time() {
        let (events, _reader) = Events::channel();
        let jobs = Jobs::new(events, 4, 0);
        let end_one = || {
            jobs.open(&root(), ObjectRef::Foreign, "start", CancellationToken::new()).expect("opened").0.finish(Ok(()))
        };
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
        let jobs = Jobs::new(events, 2, 0);
        let caller = Caller { uid: 1000, ..root() };
        let one = jobs.open(&caller, ObjectRef::Foreign, "start", CancellationToken::new()).expect("first");
        let _two = jobs.open(&caller, ObjectRef::Foreign, "start", CancellationToken::new()).expect("second");
        assert!(matches!(
            jobs.open(&caller, ObjectRef::Foreign, "start", CancellationToken::new()),
            Err(Error::LimitsExceeded(_))
        ));
        one.0.finish(Ok(()));
        jobs.open(&caller, ObjectRef::Foreign, "start", CancellationToken::new()).expect("room again");
    }

    #[tokio::test]
    async fn a_job_is_finished_when_it_is_ready_and_never_before() {
        let (events, _reader) = Events::channel();
        let jobs = Jobs::new(events, 2, 0);
        let (job, ticket) =
            jobs.open(&root(), ObjectRef::Foreign, "block-copy", CancellationToken::new()).expect("opened");
        let id = ticket.id;
        assert!(matches!(jobs.ask_to_finish(id, false).await, Err(Error::OperationInvalid(_))));
        assert!(!job.finish_token().is_cancelled());
        job.running();
        job.ready();
        assert!(jobs.facts(id).expect("there").ready);
        jobs.ask_to_finish(id, false).await.expect("asked");
        assert!(job.finish_token().is_cancelled());
        let waits = tokio::spawn({
            let jobs = jobs.clone();
            async move { jobs.ask_to_finish(id, true).await }
        });
        tokio::task::yield_now().await;
        job.finish(Err(Error::StorageFailed("no room".to_owned())));
        assert!(matches!(waits.await.expect("no panic"), Err(Error::StorageFailed(_))));
        let facts = jobs.facts(id).expect("kept");
        assert_eq!((facts.ready, facts.state), (false, JobState::Failed));
        assert!(matches!(jobs.ask_to_finish(id, true).await, Err(Error::OperationInvalid(_))));
    }

    #[tokio::test]
    async fn work_that_was_found_is_its_users_again_and_held_up_by_no_limit() {
        let (events, _reader) = Events::channel();
        let jobs = Jobs::new(events, 0, 6);
        let (job, _ticket) = jobs.open_again(1000, ObjectRef::Foreign, "block-copy", CancellationToken::new());
        let facts = jobs.facts(job.id()).expect("there");
        assert_eq!((facts.id, facts.requester_uid, facts.state), (7, 1000, JobState::Waiting));
    }

    #[tokio::test]
    async fn a_job_whose_task_vanished_has_failed() {
        let (events, _reader) = Events::channel();
        let jobs = Jobs::new(events, 2, 0);
        let (job, ticket) = jobs.open(&root(), ObjectRef::Foreign, "start", CancellationToken::new()).expect("opened");
        drop(job);
        assert!(matches!(ticket.done().await, Err(Error::Internal(_))));
    }
}
