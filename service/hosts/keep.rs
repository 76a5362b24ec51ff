//! Writes down what was seen of a host's machines, for the time in which it does not answer. Of each machine only the last is waiting
//! to be written: a host whose machines change faster than the disk takes it costs no more than one document of each.

use crate::store::{Documents, HostedChange, on_disk};
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use tokio::sync::watch;
use uuid::Uuid;

/// What is waiting to be written down.
#[derive(Default)]
struct Waiting {
    /// Of each machine the last.
    changes: BTreeMap<Uuid, HostedChange>,
    /// One more is being written.
    writing: bool,
}

/// Who writes down what was seen of one host's machines.
pub(super) struct Keeper(Option<Arc<watch::Sender<Waiting>>>);

impl Keeper {
    /// Writes it there, as long as it is not dropped; without documents nothing is kept.
    pub fn of(documents: Option<Documents>) -> Keeper {
        Keeper(documents.map(|documents| {
            let waiting = Arc::new(watch::Sender::default());
            tokio::spawn(writes(documents, Arc::downgrade(&waiting), waiting.subscribe()));
            waiting
        }))
    }

    /// Has that written by and by.
    pub fn keep(&self, change: HostedChange) {
        if let Some(waiting) = &self.0 {
            waiting.send_modify(|waiting| _ = waiting.changes.insert(change.uuid(), change));
        }
    }

    /// Returns when all is written.
    pub async fn all_kept(&self) {
        if let Some(waiting) = &self.0 {
            let mut now = waiting.subscribe();
            // Its sender is here.
            let _ = now.wait_for(|waiting| waiting.changes.is_empty() && !waiting.writing).await;
        }
    }
}

async fn writes(documents: Documents, waiting: Weak<watch::Sender<Waiting>>, mut now: watch::Receiver<Waiting>) {
    while now.wait_for(|waiting| !waiting.changes.is_empty()).await.map(drop).is_ok() {
        let Some(waiting) = waiting.upgrade() else { return };
        let mut next = None;
        waiting.send_modify(|waiting| {
            next = waiting.changes.pop_first();
            waiting.writing = next.is_some();
        });
        if let Some((_, change)) = next {
            let documents = documents.clone();
            if let Err(error) = on_disk(move || documents.keep_hosted(change)).await {
                tracing::warn!(%error, "what was last seen of a host's machine is not kept");
            }
        }
        waiting.send_modify(|waiting| waiting.writing = false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn of_each_machine_the_last_waits_and_without_a_folder_nothing_does() {
        let keeper = Keeper(Some(Arc::default()));
        for number in [1, 2, 1, 1] {
            keeper.keep(HostedChange::Gone(Uuid::from_u128(number)));
        }
        let waiting = keeper.0.as_ref().expect("one that keeps");
        assert_eq!(waiting.borrow().changes.len(), 2);
        let none = Keeper::of(None);
        none.keep(HostedChange::Gone(Uuid::from_u128(1)));
        none.all_kept().await;
    }
}
