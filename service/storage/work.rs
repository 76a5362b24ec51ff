//! What the host's storage tells of the work that it does: how far it has come, and which file it makes.

use super::Pool;
use super::notes::{Noted, NotedSecret};
use super::quota::Reserved;
use crate::fail_point;
use crate::images::Taken;
use crate::job::Job;
use crate::lock::lock;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use virt_model::driver::DriverError;
use virt_model::driver::storage::{FileId, Work};

/// How often the progress of a job is told.
const PACE: Duration = Duration::from_millis(250);

/// A job, as the host's storage sees it.
pub(super) struct JobWork {
    job: Arc<Job>,
    pool: Arc<Pool>,
    /// Whose the volumes are that it makes.
    owner: u32,
    /// What a volume that it makes stands on.
    base: Mutex<Option<PathBuf>>,
    told: Mutex<Option<Instant>>,
    /// What it changes may be changed already.
    begun: AtomicBool,
    /// Files that are not free before it has ended, and each thread of it that may still change one.
    held: Mutex<Vec<Arc<Taken>>>,
    /// What is taken of what an owner may have, for as long.
    reserved: Mutex<Option<Reserved>>,
}

impl JobWork {
    pub(super) fn new(job: Arc<Job>, pool: Arc<Pool>, owner: u32) -> Arc<JobWork> {
        Arc::new(JobWork {
            job,
            pool,
            owner,
            base: Mutex::default(),
            told: Mutex::default(),
            begun: AtomicBool::default(),
            held: Mutex::default(),
            reserved: Mutex::default(),
        })
    }

    /// A file is not free before it has ended.
    pub(super) fn holds(&self, taken: impl Into<Arc<Taken>>) {
        lock(&self.held).push(taken.into());
    }

    /// That is taken before it has ended, and each thread of it that may still make something.
    pub(super) fn has_reserved(&self, reserved: Reserved) {
        *lock(&self.reserved) = Some(reserved);
    }

    /// Whether what it changes may be changed already.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::SeqCst)
    }

    /// What it makes is put on that.
    pub(super) fn puts_on(&self, base: Option<PathBuf>) {
        *lock(&self.base) = base;
    }
}

impl Work for JobWork {
    fn progress(&self, done: u64, total: u64) {
        self.begun.store(true, Ordering::SeqCst);
        let mut told = lock(&self.told);
        // Of a client's stream nobody knows how long it is: it may come byte by byte.
        if (total == 0 || done < total) && told.is_some_and(|told| told.elapsed() < PACE) {
            return;
        }
        *told = Some(Instant::now());
        self.job.progress(done, total);
    }

    fn step(&self) {
        fail_point::reached();
    }

    fn grows(&self, capacity: u64) -> Result<(), DriverError> {
        let reserved = lock(&self.reserved);
        reserved.as_ref().map_or(Ok(()), |reserved| reserved.grow(capacity)).map_err(DriverError::TooMany)
    }

    fn names(&self, id: FileId, name: &str, format: &str, secret: Option<&str>) -> Result<(), DriverError> {
        // What takes the place of a volume stays its owner's, and what opened that may open it still.
        let (owner, before) = self.pool.noted_of(name).unwrap_or((self.owner, None));
        let secret = secret.map(|named| NotedSecret { volume: name.to_owned(), named: named.to_owned() }).or(before);
        let base = lock(&self.base).clone();
        let stands = base.as_ref().map(|_| name.into());
        let noted = Noted { format: format.to_owned(), owner, base, stands, secret, ..Noted::default() };
        self.pool.note(id, Some(noted)).map_err(|e| DriverError::Storage(e.to_string()))
    }

    fn cancelled(&self) -> &CancellationToken {
        self.job.cancel_token()
    }
}

/// Work of virtd's own, which nobody follows.
pub(super) struct OwnWork(pub CancellationToken);

impl Work for OwnWork {
    fn progress(&self, _: u64, _: u64) {}

    fn step(&self) {
        fail_point::reached();
    }

    fn grows(&self, _: u64) -> Result<(), DriverError> {
        Ok(())
    }

    fn names(&self, _: FileId, _: &str, _: &str, _: Option<&str>) -> Result<(), DriverError> {
        Ok(())
    }

    fn cancelled(&self) -> &CancellationToken {
        &self.0
    }
}
