//! Jobs: one change at a time per domain, and the record of the long ones.

use crate::error::Error;
use uuid::Uuid;

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
