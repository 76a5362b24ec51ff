//! Files that were lent to guests before the host booted, given back where that may wait for their file systems.

use crate::host::access::{Due, Ledger};
use crate::host::workers::{Errand, Workers};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::Semaphore;
use uuid::Uuid;
use virt_model::driver::DriverError;

/// Machines whose files are given back at once.
const AT_ONCE: usize = 16;

/// Gives back all that is due, each machine's files on threads of that machine's. A file that does not answer in time keeps
/// the rest of its machine's until virtd starts anew, and nobody else's.
pub async fn give_back_due(ledger: Arc<Ledger>, workers: Workers) {
    let mut machines: BTreeMap<Uuid, Vec<Due>> = BTreeMap::new();
    for due in ledger.due() {
        machines.entry(due.guest).or_default().push(due);
    }
    let places = Arc::new(Semaphore::new(AT_ONCE));
    for (guest, files) in machines {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let (ledger, workers) = (ledger.clone(), workers.clone());
        tokio::spawn(async move {
            let _place = place;
            for due in files {
                let (path, ledger) = (due.path.display().to_string(), ledger.clone());
                let give_back = move |_: &_| {
                    let given = ledger.give_back_one(&due);
                    given.map_err(|e| DriverError::Storage(format!("{}: {e}", due.path.display())))
                };
                let Err(error) = workers.run(Errand::new(guest, &*path), give_back).await else { continue };
                tracing::warn!(uuid = %guest, path, %error, "a file that was lent before the host booted is not given back");
                if matches!(error, DriverError::TimedOut(_)) {
                    return;
                }
            }
        });
    }
}
