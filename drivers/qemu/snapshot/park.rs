//! A running guest that stands aside: its process lets go of the images and keeps all else, so that they can be brought to
//! a snapshot before it ends. Where that fails they are put back, and it goes on.

use super::Operation;
use super::note::Note;
use super::note::written;
use crate::host::workers::ClosedAside;
use rustix::fs::{Mode, OFlags};
use serde_json::json;
use std::sync::Arc;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::Journal;

/// What QEMU does whose memory has been sent away: its images are closed for writing, and `cont` opens them again.
const PARKED: &str = "postmigrate";

impl Operation {
    /// Makes a running guest stand aside; nobody is told that it stands. `false`, and it runs as before, where it cannot:
    /// it has what cannot be sent, or stands already, and could not open its images again without running.
    pub(super) async fn park(&self, journal: &Arc<dyn Journal>) -> Result<bool, DriverError> {
        let Some(body) = self.body.as_ref().filter(|_| self.machine.running) else { return Ok(false) };
        let told = body.patiently("query-migrate", json!({})).await?;
        if told["blocked-reasons"].as_array().is_some_and(|reasons| !reasons.is_empty()) {
            return Ok(false);
        }
        journal.note(written(&Note::Park)?).await?;
        body.reporter.be_quiet(true);
        let sent = async {
            body.patiently("stop", json!({})).await?;
            journal.step("stopped");
            // Nobody needs what is sent.
            let nowhere = rustix::fs::open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
            let nowhere = nowhere.map_err(|e| DriverError::Storage(format!("/dev/null: {e}")))?;
            body.line()?.write_memory(ClosedAside::of(nowhere.into()), journal).await
        };
        match sent.await {
            Ok(()) => {
                journal.step("parked");
                Ok(true)
            }
            Err(error) => {
                self.unpark().await?;
                if matches!(error, DriverError::Cancelled | DriverError::Gone) { Err(error) } else { Ok(false) }
            }
        }
    }

    /// Lets a parked guest go on.
    pub(super) async fn unpark(&self) -> Result<(), DriverError> {
        let resumed = self.go_on(true).await;
        if let Some(body) = &self.body {
            body.reporter.be_quiet(false);
        }
        resumed
    }

    /// Whether it stands aside.
    pub(super) async fn is_parked(&self) -> Result<bool, DriverError> {
        let Some(body) = &self.body else { return Ok(false) };
        Ok(body.patiently("query-status", json!({})).await?["status"] == PARKED)
    }
}
