//! Threads for work on guests' files, which may be on a file system that never answers.
//!
//! Nothing that follows the path of a guest's file runs on a thread of the runtime, or of its pool for blocking work: it
//! runs here, as one errand with a time limit, and comes back as a value. Each machine has few places, for errands at a
//! time; the threads are kept for all (`threads`). One that does not come back keeps its machine's place, whose further
//! errands are refused until it does; other machines go on.
//!
//! ```text
//!   run ─▶ a place among the machine's own ─▶ thread ─▶ its result
//!                                               └─ limit or cancel ─▶ its tool is killed ─▶ its result, or it is left behind
//! ```

use super::threads;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::driver::DriverError;

/// How long guests' files may take to be looked at. A file system that has not answered by then counts as dead.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Storage that moves fewer bytes a second counts as dead.
const SLOWEST: u64 = 1 << 20;
/// How long a tool that writes may go on after it was told to stop, and so end in order.
const GRACE: Duration = Duration::from_secs(5);
/// How long a thread whose tool has been killed may take to come back.
const REAPING: Duration = Duration::from_secs(2);
/// Errands of one machine at once; the next one waits.
const OF_ONE_MACHINE: usize = 4;
/// Errands of all machines at once, those included that never come back.
const OF_ALL: usize = 2048;

/// How long work may take that reads or writes that many bytes.
pub fn patience(bytes: u64) -> Duration {
    PATIENCE + Duration::from_secs(bytes / SLOWEST)
}

/// The places of all machines. Clones share them.
#[derive(Clone, Default)]
pub struct Workers(Arc<Mutex<HashMap<Uuid, Arc<Machine>>>>);

/// What is to be done.
#[derive(Clone)]
pub struct Errand {
    /// Whose files they are.
    pub guest: Uuid,
    /// What it is about, for people: the path of a file.
    pub what: String,
    /// How long it may take.
    pub limit: Duration,
    /// Fires when it is no longer wanted.
    pub cancel: CancellationToken,
}

/// The errands of one machine.
struct Machine {
    places: Arc<Semaphore>,
    /// What those are about that were left behind, and since when.
    lost: Mutex<HashMap<Uuid, (String, Instant)>>,
}

/// How an errand is told to stop.
#[derive(Default)]
pub struct Stop(Mutex<Stopping>);

#[derive(Default)]
struct Stopping {
    level: Level,
    /// The tool that runs, and whether it writes.
    tool: Option<(Pid, bool)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    #[default]
    No,
    /// What only reads is killed, and nothing is begun any more.
    Asked,
    /// Everything is killed.
    Forced,
}

impl Errand {
    /// One that takes moments, unless the storage is dead.
    pub fn new(guest: Uuid, what: impl Into<String>) -> Errand {
        Errand { guest, what: what.into(), limit: PATIENCE, cancel: CancellationToken::new() }
    }

    /// The same for work on that many bytes.
    pub fn of(self, bytes: u64) -> Errand {
        Errand { limit: patience(bytes), ..self }
    }

    /// The same with the right to cancel it.
    pub fn until(self, cancel: &CancellationToken) -> Errand {
        Errand { cancel: cancel.clone(), ..self }
    }
}

impl Workers {
    /// Runs `work` in a thread of the machine's. Errors beside its own: `TimedOut` when it did not come back in time, or
    /// an earlier one of this machine has not yet; `Cancelled`. A thread that is left behind goes on when its file system
    /// answers, and ends at its next look at [`Stop`].
    pub async fn run<T: Send + 'static>(
        &self,
        errand: Errand,
        work: impl FnOnce(&Arc<Stop>) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let machine = self.machine(errand.guest)?;
        let done = self.run_for(&machine, &errand, work).await;
        drop(machine);
        self.tidy(errand.guest);
        done
    }

    async fn run_for<T: Send + 'static>(
        &self,
        machine: &Arc<Machine>,
        errand: &Errand,
        work: impl FnOnce(&Arc<Stop>) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        machine.answers(errand)?;
        let begun = Instant::now();
        let place = tokio::select! {
            place = timeout(errand.limit, machine.places.clone().acquire_owned()) => place,
            () = errand.cancel.cancelled() => return Err(DriverError::Cancelled),
        };
        let Ok(Ok(place)) = place else { return Err(late(errand)) };
        // It may have been left behind by those who went before.
        machine.answers(errand)?;
        let stop = Arc::new(Stop::default());
        let mut result = self.begin(errand, place, stop.clone(), work)?;
        let left = errand.limit.saturating_sub(begun.elapsed());
        let why = tokio::select! {
            done = timeout(left, &mut result) => match done {
                Ok(done) => return done.unwrap_or_else(|_| Err(failed(errand))),
                Err(_) => late(errand),
            },
            () = errand.cancel.cancelled() => DriverError::Cancelled,
        };
        for (level, patience) in [(Level::Asked, GRACE), (Level::Forced, REAPING)] {
            stop.raise(level);
            match timeout(patience, &mut result).await {
                // What is done is done.
                Ok(Ok(Ok(done))) => return Ok(done),
                Ok(_) => return Err(why),
                Err(_) => {}
            }
        }
        machine.leave_behind(errand, result);
        Err(why)
    }

    /// Starts the thread. It holds its place until it ends.
    fn begin<T: Send + 'static>(
        &self,
        errand: &Errand,
        place: OwnedSemaphorePermit,
        stop: Arc<Stop>,
        work: impl FnOnce(&Arc<Stop>) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<T, DriverError>>, DriverError> {
        let (hand_over, result) = oneshot::channel();
        let (workers, guest, runtime) = (self.clone(), errand.guest, tokio::runtime::Handle::current());
        let begun = threads::run(move || {
            let _within = runtime.enter();
            let _ = hand_over.send(work(&stop));
            drop(place);
            workers.tidy(guest);
        });
        begun.map_err(|e| DriverError::Internal(format!("{}: no thread to look at it: {e}", errand.what)))?;
        Ok(result)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Machine>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn machine(&self, guest: Uuid) -> Result<Arc<Machine>, DriverError> {
        let mut machines = self.lock();
        let busy: usize = machines.values().map(|machine| machine.busy()).sum();
        if busy >= OF_ALL {
            return Err(DriverError::TimedOut(format!("{busy} threads wait for files of guests; try again later")));
        }
        Ok(machines.entry(guest).or_insert_with(|| Arc::new(Machine::new())).clone())
    }

    /// Forgets a machine without errands.
    fn tidy(&self, guest: Uuid) {
        let mut machines = self.lock();
        // One that somebody is about to use is held by them as well.
        if machines.get(&guest).is_some_and(|machine| Arc::strong_count(machine) == 1 && machine.busy() == 0) {
            machines.remove(&guest);
        }
    }
}

impl Machine {
    fn new() -> Machine {
        Machine { places: Arc::new(Semaphore::new(OF_ONE_MACHINE)), lost: Mutex::default() }
    }

    fn busy(&self) -> usize {
        OF_ONE_MACHINE - self.places.available_permits().min(OF_ONE_MACHINE)
    }

    fn lost(&self) -> MutexGuard<'_, HashMap<Uuid, (String, Instant)>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses an errand while an earlier one has not come back: it may still change files when it does.
    fn answers(&self, errand: &Errand) -> Result<(), DriverError> {
        let lost = self.lost();
        let Some((what, since)) = lost.values().min_by_key(|(_, since)| *since) else { return Ok(()) };
        let seconds = since.elapsed().as_secs();
        Err(DriverError::TimedOut(format!(
            "{}: not looked at, since the storage of {what} has not answered for {seconds} s; try again when it does",
            errand.what
        )))
    }

    /// Counts a thread as lost until it comes back.
    fn leave_behind<T: Send + 'static>(self: &Arc<Self>, errand: &Errand, result: oneshot::Receiver<T>) {
        let (machine, number, what) = (self.clone(), Uuid::new_v4(), &errand.what);
        tracing::warn!(uuid = %errand.guest, "{what} does not answer; this machine's files are left alone until it does");
        machine.lost().insert(number, (errand.what.clone(), Instant::now()));
        tokio::spawn(async move {
            let _ = result.await;
            machine.lost().remove(&number);
        });
    }
}

impl Stop {
    /// Refuses to begin anything new once the errand is to stop.
    pub fn check(&self) -> Result<(), DriverError> {
        if self.lock().level == Level::No { Ok(()) } else { Err(DriverError::Cancelled) }
    }

    /// Lets the tool that runs be killed when the errand is to stop; until what is returned is dropped, and that must be before the
    /// tool is reaped. `writes`: it is given time to end in order.
    pub fn watch(&self, tool: Pid, writes: bool) -> Watched<'_> {
        let mut stopping = self.lock();
        stopping.tool = Some((tool, writes));
        stopping.kill();
        Watched(self)
    }

    fn raise(&self, level: Level) {
        let mut stopping = self.lock();
        stopping.level = stopping.level.max(level);
        stopping.kill();
    }

    fn lock(&self) -> MutexGuard<'_, Stopping> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stopping {
    fn kill(&self) {
        if let Some((tool, writes)) = self.tool
            && (self.level == Level::Forced || self.level == Level::Asked && !writes)
        {
            let _ = kill_process(tool, Signal::KILL);
        }
    }
}

/// A tool that can be killed.
pub struct Watched<'a>(&'a Stop);

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.0.lock().tool = None;
    }
}

fn late(errand: &Errand) -> DriverError {
    let seconds = errand.limit.as_secs();
    DriverError::TimedOut(format!("{} did not answer within {seconds} s; look at its file system", errand.what))
}

fn failed(errand: &Errand) -> DriverError {
    DriverError::Internal(format!("{}: the work on it was cut off", errand.what))
}

/// A file that is closed in a thread of its own: that may wait for a file system as long as a write does.
#[derive(Debug)]
pub struct ClosedAside(Option<std::fs::File>);

impl ClosedAside {
    /// Of a file that is open.
    pub fn of(file: std::fs::File) -> ClosedAside {
        ClosedAside(Some(file))
    }

    /// The file.
    pub fn get(&self) -> std::io::Result<&std::fs::File> {
        self.0.as_ref().ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }
}

impl Drop for ClosedAside {
    fn drop(&mut self) {
        let Some(file) = self.0.take() else { return };
        if let Err(error) = threads::run(move || drop(file)) {
            tracing::warn!(%error, "no thread to close a file in");
        }
    }
}

/// Runs what blocks where it may: in a [thread](threads) of its own, within the runtime. The runtime's own pool is for what always ends.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, DriverError> {
    let (hand_over, done) = tokio::sync::oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    let begun = threads::run(move || {
        let _within = runtime.enter();
        let _ = hand_over.send(work());
    });
    begun.map_err(|e| DriverError::Internal(format!("no thread for work on files: {e}")))?;
    done.await.map_err(|_| DriverError::Internal("work on files was cut off".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    use std::sync::mpsc;

    fn errand(guest: u128, limit: Duration) -> Errand {
        Errand { limit, ..Errand::new(Uuid::from_u128(guest), "/dead/disk") }
    }

    /// Work that comes back when it is let go.
    fn stuck() -> (mpsc::Sender<()>, impl FnOnce(&Arc<Stop>) -> Result<(), DriverError> + Send + 'static) {
        let (let_go, held) = mpsc::channel::<()>();
        (let_go, move |_: &Arc<Stop>| held.recv().map_err(|_| DriverError::Gone))
    }

    #[tokio::test]
    async fn dead_storage_of_one_machine_costs_that_machine_alone() {
        let workers = Workers::default();
        let (let_go, work) = stuck();
        let limit = Duration::from_millis(10);
        let late = workers.run(errand(1, limit), work).await.unwrap_err();
        assert!(matches!(&late, DriverError::TimedOut(text) if text.contains("/dead/disk")), "{late}");
        let refused = workers.run(errand(1, PATIENCE), |_| Ok(())).await.unwrap_err();
        assert!(matches!(&refused, DriverError::TimedOut(text) if text.contains("has not answered")), "{refused}");
        workers.run(errand(2, PATIENCE), |_| Ok(())).await.unwrap();
        let_go.send(()).unwrap();
        // When it comes back, the machine is as before.
        while workers.run(errand(1, PATIENCE), |_| Ok(())).await.is_err() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn no_more_threads_wait_than_a_machine_has_places() {
        let workers = Workers::default();
        let mut holds = Vec::new();
        let mut waiting = Vec::new();
        for _ in 0..OF_ONE_MACHINE {
            let (let_go, work) = stuck();
            let workers = workers.clone();
            holds.push(let_go);
            waiting.push(tokio::spawn(async move { workers.run(errand(1, PATIENCE), work).await }));
        }
        while workers.lock().get(&Uuid::from_u128(1)).is_none_or(|machine| machine.busy() < OF_ONE_MACHINE) {
            tokio::task::yield_now().await;
        }
        let refused = workers.run(errand(1, Duration::from_millis(10)), |_| Ok(())).await.unwrap_err();
        assert!(matches!(refused, DriverError::TimedOut(_)), "{refused}");
        holds.iter().for_each(|hold| hold.send(()).unwrap());
        for one in waiting {
            one.await.unwrap().unwrap();
        }
        workers.run(errand(1, PATIENCE), |_| Ok(())).await.unwrap();
        assert!(workers.lock().len() <= 1);
    }

    #[tokio::test]
    async fn a_tool_is_killed_when_it_is_no_longer_wanted() {
        let workers = Workers::default();
        let cancel = CancellationToken::new();
        let (started, begun) = oneshot::channel();
        let work = move |stop: &Arc<Stop>| {
            let mut child = std::process::Command::new("sleep").arg("3600").spawn().map_err(|_| DriverError::Gone)?;
            let watched = stop.watch(Pid::from_child(&child), false);
            let _ = started.send(());
            let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            waitid(WaitId::Pid(Pid::from_child(&child)), ended).map_err(|_| DriverError::Gone)?;
            drop(watched);
            child.wait().map_err(|_| DriverError::Gone)?;
            Err::<(), _>(DriverError::Storage("killed".into()))
        };
        let errand = errand(1, PATIENCE).until(&cancel);
        let running = tokio::spawn({
            let workers = workers.clone();
            async move { workers.run(errand, work).await }
        });
        begun.await.unwrap();
        cancel.cancel();
        assert!(matches!(running.await.unwrap(), Err(DriverError::Cancelled)));
    }
}
