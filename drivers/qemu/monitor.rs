//! QEMU's long work: jobs, migration to a file and dumps of memory, awaited by events, cancelled when nobody wants them any more.

use super::instance::Body;
use super::known::Holds;
use super::qmp::Qmp;
use super::report::Reporter;
use crate::host::workers::{ClosedAside, PATIENCE};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::Journal;

/// QEMU may be at work on a snapshot, deaf, for as long.
pub const DEAF: Duration = Duration::from_secs(3600);
/// How often progress is asked for.
const LOOK: Duration = Duration::from_millis(250);
/// How long a guest stands at the most for what it wrote last to be copied.
const STANDING: Duration = Duration::from_secs(10);
/// How often it is asked whether that is so.
const MOMENT: Duration = Duration::from_millis(5);
/// What memory is called while it goes through a descriptor.
const CHANNEL: &str = "virtd-memory";
/// What a guest does while QEMU dumps its memory, and goes on by itself.
const DUMPING: &str = "save-vm";

/// How a job stands.
#[derive(Debug, PartialEq, Eq)]
pub enum JobStatus {
    /// There is none of that name.
    Absent,
    /// At work.
    Running,
    /// Waits to be completed.
    Ready,
    /// Ended, well or not.
    Ended(Result<(), String>),
}

/// A QEMU that is talked to, and heard.
pub struct Monitor {
    monitor: Arc<Qmp>,
    reporter: Arc<Reporter>,
}

impl Body {
    /// The line to its QEMU.
    pub fn line(&self) -> Result<Monitor, DriverError> {
        Ok(Monitor { monitor: self.monitor()?, reporter: self.reporter.clone() })
    }

    /// Gives a command that may have to wait for a QEMU that is deaf meanwhile.
    pub async fn patiently(&self, command: &str, arguments: Value) -> Result<Value, DriverError> {
        self.line()?.patiently(command, arguments).await
    }

    /// What `read` finds in what QEMU says to a question, or has said and still holds.
    pub async fn known<T: Send + Sync + 'static>(
        &self,
        question: (&str, Value),
        holds: Holds,
        read: impl FnOnce(&Value) -> T,
    ) -> Result<Arc<T>, DriverError> {
        Ok(self.monitor()?.known(question, holds, DEAF, read).await?)
    }

    /// Gives a command that QEMU does at once. One that is deaf keeps nobody waiting for longer than any command.
    pub async fn ask(&self, command: &str, arguments: Value) -> Result<Value, DriverError> {
        Ok(self.monitor()?.execute(command, arguments).await?)
    }
}

impl Monitor {
    /// A line to a QEMU that is just being started.
    pub fn new(monitor: Arc<Qmp>, reporter: Arc<Reporter>) -> Monitor {
        Monitor { monitor, reporter }
    }

    /// Gives a command that may have to wait for a QEMU that is deaf meanwhile.
    pub async fn patiently(&self, command: &str, arguments: Value) -> Result<Value, DriverError> {
        self.with_fds(command, arguments, Vec::new()).await
    }

    async fn with_fds(&self, command: &str, arguments: Value, fds: Vec<ClosedAside>) -> Result<Value, DriverError> {
        self.monitor.execute_with(command, arguments, fds, DEAF).await.map_err(DriverError::from)
    }

    /// Gives a command a file, as [`Monitor::patiently`] does without.
    pub async fn give(&self, command: &str, arguments: Value, file: ClosedAside) -> Result<Value, DriverError> {
        self.with_fds(command, arguments, vec![file]).await
    }

    /// Waits until all these jobs have ended well. `progress` is told how far they are together. Error: the first that fails, or
    /// `Cancelled`; the others are at work then.
    pub async fn all_ended(
        &self,
        command: &str,
        ids: &[String],
        progress: &(dyn Fn(u64, u64) + Send + Sync),
        cancel: &CancellationToken,
    ) -> Result<(), DriverError> {
        loop {
            let before = self.reporter.heard().jobs;
            let told = self.patiently("query-jobs", json!({})).await?;
            let ours = |job: &&Value| ids.iter().any(|id| job["id"] == **id);
            let jobs: Vec<&Value> = told.as_array().into_iter().flatten().filter(ours).collect();
            // These are QEMU's numbers, and may be any.
            let sum = |key: &str| jobs.iter().filter_map(|job| job[key].as_u64()).fold(0, u64::saturating_add);
            progress(sum("current-progress"), sum("total-progress"));
            if let Some((id, why)) = jobs.iter().find_map(|job| Some((job["id"].as_str()?, job["error"].as_str()?))) {
                return Err(failed(command, &format!("the job '{id}': {why}")));
            }
            if jobs.len() < ids.len() {
                return Err(failed(command, "a job has ended, and nobody knows how"));
            }
            if jobs.iter().all(|job| job["status"] == "concluded") {
                return Ok(());
            }
            let news = self.reporter.until(|heard| heard.closed || heard.jobs > before);
            tokio::select! {
                _ = tokio::time::timeout(LOOK, news) => {}
                () = cancel.cancelled() => return Err(DriverError::Cancelled),
            }
        }
    }

    /// Runs a job to its end. `journal`: where progress goes, and whether it is still wanted.
    pub async fn job(
        &self,
        command: &str,
        id: &str,
        arguments: Value,
        journal: Option<&Arc<dyn Journal>>,
    ) -> Result<(), DriverError> {
        let before = self.reporter.heard().jobs;
        self.begin(command, id, arguments).await?;
        // What takes moments is asked about once, when it says that it has ended.
        match self.settled_since(Some(before), id, journal).await? {
            JobStatus::Ended(ended) => {
                self.forget(id).await;
                ended.map_err(|why| failed(command, &why))
            }
            _ => Ok(()),
        }
    }

    /// Begins a job.
    pub async fn begin(&self, command: &str, id: &str, mut arguments: Value) -> Result<(), DriverError> {
        arguments["job-id"] = json!(id);
        match self.patiently(command, arguments.clone()).await {
            // What an earlier virtd left has the name.
            Err(_) if !matches!(self.standing(id, None).await?, JobStatus::Absent) => {
                self.dismiss(id).await;
                self.patiently(command, arguments).await.map(drop)
            }
            begun => begun.map(drop),
        }
    }

    /// Waits until a job has ended, or is ready.
    pub async fn settled(&self, id: &str, journal: Option<&Arc<dyn Journal>>) -> Result<JobStatus, DriverError> {
        self.settled_since(None, id, journal).await
    }

    /// The same for one that has just begun, when so many changes of jobs had been `heard`: it is asked about only when there
    /// has been another, or none for a while.
    async fn settled_since(
        &self,
        mut heard: Option<u64>,
        id: &str,
        journal: Option<&Arc<dyn Journal>>,
    ) -> Result<JobStatus, DriverError> {
        let never = CancellationToken::new();
        let cancelled = journal.map_or(&never, |journal| journal.cancelled());
        let mut asked_to_stop = false;
        loop {
            let before = match heard.take() {
                Some(before) => before,
                None => {
                    let before = self.reporter.heard().jobs;
                    match self.standing(id, journal).await? {
                        JobStatus::Running => before,
                        standing if !asked_to_stop => return Ok(standing),
                        _ => {
                            // Or the next one of that name would be taken for it.
                            self.dismiss(id).await;
                            return Err(DriverError::Cancelled);
                        }
                    }
                }
            };
            let news = self.reporter.until(|heard| heard.closed || heard.jobs > before);
            tokio::select! {
                _ = tokio::time::timeout(LOOK, news) => {}
                () = cancelled.cancelled(), if !asked_to_stop => {
                    // Not every job can be; then its end is waited for.
                    asked_to_stop = self.patiently("job-cancel", json!({ "id": id })).await.is_ok();
                    if !asked_to_stop {
                        return self.to_its_end(id, journal).await;
                    }
                }
            }
        }
    }

    /// Waits for the end of a job that will come to it by itself.
    pub async fn ended(&self, id: &str) -> Result<Result<(), String>, DriverError> {
        loop {
            let before = self.reporter.heard().jobs;
            match self.standing(id, None).await? {
                JobStatus::Ended(ended) => return Ok(ended),
                JobStatus::Absent => return Ok(Ok(())),
                JobStatus::Running | JobStatus::Ready => {}
            }
            let news = self.reporter.until(|heard| heard.closed || heard.jobs > before);
            let _ = tokio::time::timeout(LOOK, news).await;
        }
    }

    /// Waits until a job has ended, or is ready, whether anybody wants it any more or not.
    pub async fn to_its_end(&self, id: &str, journal: Option<&Arc<dyn Journal>>) -> Result<JobStatus, DriverError> {
        loop {
            let before = self.reporter.heard().jobs;
            match self.standing(id, journal).await? {
                JobStatus::Running => {}
                standing => return Ok(standing),
            }
            let news = self.reporter.until(|heard| heard.closed || heard.jobs > before);
            let _ = tokio::time::timeout(LOOK, news).await;
        }
    }

    /// How a job stands now.
    pub async fn standing(&self, id: &str, journal: Option<&Arc<dyn Journal>>) -> Result<JobStatus, DriverError> {
        let Some(job) = self.told_of(id).await? else { return Ok(JobStatus::Absent) };
        if let Some(journal) = journal {
            let (done, total) = progress_in(&job);
            // Those of snapshots inside images count steps.
            match job["type"].as_str().is_some_and(|of| of.starts_with("snapshot-")) {
                true => journal.part_done(done, total),
                false => journal.progress(done, total),
            }
        }
        Ok(status_in(&job))
    }

    /// The same with the progress that it has made: what is done, and all.
    pub async fn progress_of(&self, id: &str) -> Result<(JobStatus, u64, u64), DriverError> {
        let Some(job) = self.told_of(id).await? else { return Ok((JobStatus::Absent, 0, 0)) };
        let (done, total) = progress_in(&job);
        Ok((status_in(&job), done, total))
    }

    async fn told_of(&self, id: &str) -> Result<Option<Value>, DriverError> {
        let jobs = self.patiently("query-jobs", json!({})).await?;
        Ok(jobs.as_array().into_iter().flatten().find(|job| job["id"] == id).cloned())
    }

    /// Why a block job has failed that QEMU does not know any more.
    pub fn why_block_job_failed(&self, id: &str) -> Option<String> {
        self.reporter.why_block_job_failed(id)
    }

    /// How many changes of jobs have been heard.
    pub fn jobs_heard(&self) -> u64 {
        self.reporter.heard().jobs
    }

    /// Waits until there has been another change of a job, or QEMU has gone; `look`: or its progress is worth to be asked for.
    pub async fn news_of_jobs(&self, before: u64, look: bool) {
        let news = self.reporter.until(|heard| heard.closed || heard.jobs > before);
        match look {
            true => _ = tokio::time::timeout(LOOK, news).await,
            false => news.await,
        }
    }

    /// How many bytes the second image of a job that writes to two is behind the first.
    pub async fn behind(&self, id: &str) -> Result<u64, DriverError> {
        let jobs = self.patiently("query-block-jobs", json!({})).await?;
        let found = jobs.as_array().into_iter().flatten().find(|job| job["device"] == id);
        let number = |key: &str| found.and_then(|job| job[key].as_u64()).unwrap_or_default();
        Ok(number("len").saturating_sub(number("offset")))
    }

    /// Whether what the guest, which stands, wrote last has gone over in time.
    pub async fn has_gone_over(&self, id: &str) -> Result<bool, DriverError> {
        let begun = Instant::now();
        while self.behind(id).await? > 0 {
            if begun.elapsed() > STANDING {
                return Ok(false);
            }
            // No event tells of it.
            tokio::time::sleep(MOMENT).await;
        }
        Ok(true)
    }

    /// Has a job that writes to two images which hold the `same`, whose guest stands, change over to the second; that is written
    /// down before, and the job has ended then. The inner error: it is certain that it has not.
    pub async fn change_over(
        &self,
        id: &str,
        same: impl AsyncFnOnce() -> Result<(), DriverError>,
    ) -> Result<Result<(), String>, DriverError> {
        same().await?;
        match self.patiently("block-job-complete", json!({ "device": id })).await {
            Ok(_) => self.ended(id).await,
            Err(DriverError::Hypervisor(why)) => Ok(Err(why)),
            Err(error) => Err(error),
        }
    }

    /// Ends a job that is of no use any more, and forgets it.
    pub async fn give_up(&self, id: &str) {
        if self.patiently("job-cancel", json!({ "id": id })).await.is_ok() {
            let _ = self.ended(id).await;
        }
        self.dismiss(id).await;
    }

    /// Forgets a job that has ended; one that is not there is fine.
    pub async fn dismiss(&self, id: &str) {
        if matches!(self.standing(id, None).await, Ok(JobStatus::Ended(_))) {
            self.forget(id).await;
        }
    }

    /// Forgets a job that is known to have ended. Its name is free for whatever is begun from now on.
    async fn forget(&self, id: &str) {
        self.monitor.tell("job-dismiss", json!({ "id": id })).await;
    }

    /// Gives up a migration that may be under way, and waits until QEMU has ended it, one way or the other: before that it lets
    /// no guest go on. Error: `TimedOut` where it does not end.
    pub async fn end_migration(&self) -> Result<(), DriverError> {
        // In its last moments it cannot be cancelled, and ends by itself.
        match self.patiently("migrate_cancel", json!({})).await {
            Err(DriverError::Gone) => return Ok(()),
            Err(error) => {
                tracing::warn!(%error, "a migration that nobody wants is not given up, and its end is waited for")
            }
            Ok(_) => {}
        }
        let ended = async {
            loop {
                let before = self.reporter.heard().jobs;
                let told = match self.patiently("query-migrate", json!({})).await {
                    Err(DriverError::Gone) => return Ok(()),
                    told => told?,
                };
                match told["status"].as_str() {
                    None | Some("none" | "completed" | "cancelled" | "failed") => return Ok(()),
                    Some(_) => {}
                }
                let news = self.reporter.until(|heard| heard.closed || heard.jobs > before);
                let _ = tokio::time::timeout(LOOK, news).await;
            }
        };
        match tokio::time::timeout(PATIENCE, ended).await {
            Ok(ended) => ended,
            Err(_) => Err(DriverError::TimedOut("QEMU does not end a migration that was given up".to_owned())),
        }
    }

    /// Writes the guest's memory and device state to a file. The CPUs stand when it is done.
    pub async fn write_memory(&self, file: ClosedAside, journal: &Arc<dyn Journal>) -> Result<(), DriverError> {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.patiently("migrate-set-capabilities", events).await?;
        self.patiently("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 40 })).await?;
        self.with_fds("getfd", json!({ "fdname": CHANNEL }), vec![file]).await?;
        if let Err(error) = self.patiently("migrate", json!({ "uri": format!("fd:{CHANNEL}") })).await {
            // Whoever reads at its other end would wait for more.
            let _ = self.patiently("closefd", json!({ "fdname": CHANNEL })).await;
            return Err(error);
        }
        let mut asked_to_stop = false;
        loop {
            let before = self.reporter.heard().jobs;
            let told = self.patiently("query-migrate", json!({})).await?;
            let number = |key: &str| told["ram"][key].as_u64().unwrap_or_default();
            let (sent, rest) = (number("transferred"), number("remaining"));
            journal.progress(sent, sent + rest);
            match told["status"].as_str().unwrap_or_default() {
                "completed" => return Ok(()),
                "cancelled" => return Err(DriverError::Cancelled),
                "failed" => {
                    let why = told["error-desc"].as_str().unwrap_or("the memory could not be written");
                    return Err(failed("migrate", why));
                }
                _ => {}
            }
            let news = self.reporter.until(|heard| heard.closed || heard.jobs > before);
            tokio::select! {
                _ = tokio::time::timeout(LOOK, news) => {}
                () = journal.cancelled().cancelled(), if !asked_to_stop => {
                    asked_to_stop = true;
                    self.patiently("migrate_cancel", json!({})).await?;
                }
            }
        }
    }

    /// Writes the guest's memory alone to a file, in that format. QEMU has the CPUs stand for it, and lets them go on by itself:
    /// see [`Monitor::end_dump`]. It is given up by who reads at the other end: then it fails.
    pub async fn dump_memory(
        &self,
        format: &str,
        file: ClosedAside,
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        let begun = self.reporter.heard().jobs;
        self.reporter.why_dump_failed();
        self.with_fds("getfd", json!({ "fdname": CHANNEL }), vec![file]).await?;
        let protocol = format!("fd:{CHANNEL}");
        let how = json!({ "paging": false, "protocol": protocol, "detach": true, "format": format });
        if let Err(error) = self.patiently("dump-guest-memory", how).await {
            // Whoever reads at its other end would wait for more. QEMU may have closed it itself.
            let _ = self.patiently("closefd", json!({ "fdname": CHANNEL })).await;
            return Err(error);
        }
        journal.step("dumping");
        loop {
            let before = self.reporter.heard().jobs;
            let told = self.patiently("query-dump", json!({})).await?;
            let number = |key: &str| told[key].as_u64().unwrap_or_default();
            journal.progress(number("completed"), number("total"));
            match told["status"].as_str().unwrap_or_default() {
                "completed" => return Ok(()),
                "active" => {}
                _ => {
                    // Only the event says why, and it comes a little later.
                    let said = self.reporter.until(|heard| heard.closed || heard.jobs > begun);
                    let _ = tokio::time::timeout(LOOK, said).await;
                    let why = self.reporter.why_dump_failed();
                    return Err(failed(
                        "dump-guest-memory",
                        why.as_deref().unwrap_or("the memory could not be written"),
                    ));
                }
            }
            let news = self.reporter.until(|heard| heard.closed || heard.jobs > before);
            let _ = tokio::time::timeout(LOOK, news).await;
        }
    }

    /// Waits until QEMU has ended a dump of memory that may be under way, as it does by itself once nobody reads any more, and has
    /// let its guest go on, if that ran. Error: `TimedOut` where it does not end.
    pub async fn end_dump(&self) -> Result<(), DriverError> {
        let ended = async {
            loop {
                let before = self.reporter.heard();
                let dump = self.patiently("query-dump", json!({})).await?;
                let guest = self.patiently("query-status", json!({})).await?;
                if dump["status"] != "active" && guest["status"] != DUMPING {
                    return Ok(());
                }
                let news = self
                    .reporter
                    .until(|heard| heard.closed || heard.jobs > before.jobs || heard.resumes > before.resumes);
                let _ = tokio::time::timeout(LOOK, news).await;
            }
        };
        match tokio::time::timeout(PATIENCE, ended).await {
            Ok(Err(DriverError::Gone)) => Ok(()),
            Ok(ended) => ended,
            Err(_) => Err(DriverError::TimedOut("QEMU does not end a dump that was given up".to_owned())),
        }
    }

    /// Loads memory and device state from a file into a QEMU that waits for it. The CPUs stand then.
    pub async fn read_memory(&self, file: ClosedAside) -> Result<(), DriverError> {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.patiently("migrate-set-capabilities", events).await?;
        self.with_fds("getfd", json!({ "fdname": CHANNEL }), vec![file]).await?;
        self.patiently("migrate-incoming", json!({ "uri": format!("fd:{CHANNEL}") })).await?;
        loop {
            let before = self.reporter.heard().jobs;
            let told = self.patiently("query-migrate", json!({})).await?;
            match told["status"].as_str().unwrap_or_default() {
                "completed" => return Ok(()),
                "failed" => {
                    let why = told["error-desc"].as_str().unwrap_or("the memory could not be read");
                    return Err(failed("migrate-incoming", why));
                }
                _ => {}
            }
            let news = self.reporter.until(|heard| heard.closed || heard.jobs > before);
            let _ = tokio::time::timeout(LOOK, news).await;
        }
    }
}

fn status_in(job: &Value) -> JobStatus {
    match job["status"].as_str().unwrap_or_default() {
        "concluded" => JobStatus::Ended(job["error"].as_str().map_or(Ok(()), |why| Err(why.to_owned()))),
        "ready" | "standby" | "pending" => JobStatus::Ready,
        _ => JobStatus::Running,
    }
}

fn progress_in(job: &Value) -> (u64, u64) {
    let number = |key: &str| job[key].as_u64().unwrap_or_default();
    (number("current-progress"), number("total-progress"))
}

/// Whether it was for want of room.
pub fn is_full(why: &str) -> bool {
    why.contains("No space left") || why.contains("quota exceeded")
}

/// What QEMU said of work that failed.
pub fn failed(command: &str, why: &str) -> DriverError {
    let text = format!("{command}: {why}");
    if is_full(why) { DriverError::NoSpace(text) } else { DriverError::Hypervisor(text) }
}

#[cfg(test)]
#[path = "monitor_tests.rs"]
mod tests;
