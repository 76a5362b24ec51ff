//! The event stream: what the service tells of every change, in the order in which it happened.
//!
//! One channel with one reader (the publisher). It has no bound of its own: who changes something waits until that has been
//! published, guests report at a pace (`domain/reports.rs`), and a bus that takes nothing is left after some seconds, so
//! what lies here is no more than what is under way. A domain sends while it holds its state, so the order of one
//! domain's events is the order of its changes. [`Events::flush`] returns when everything sent before it has been
//! published: that is how a reply waits for its signals.

use crate::job::JobFacts;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;
use virt_model::state::{DomainState, Lifecycle, StateReason};

/// All that is published of a domain, at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct DomainFacts {
    /// Name; unique on this host.
    pub name: String,
    /// Identity, for ever.
    pub uuid: Uuid,
    /// Of the running guest; 0 when inactive.
    pub id: u32,
    /// The driver's name.
    pub driver: &'static str,
    /// What it does.
    pub state: DomainState,
    /// Why.
    pub reason: StateReason,
    /// Since when: microseconds since the epoch.
    pub since_usec: u64,
    /// Has a stored configuration.
    pub persistent: bool,
    /// Starts with the host.
    pub autostart: bool,
    /// Of what runs while active.
    pub title: String,
    /// Of what runs while active.
    pub description: String,
    /// `hvm` and the like.
    pub os_type: String,
    /// Present.
    pub vcpus: u32,
    /// Possible.
    pub maximum_vcpus: u32,
    /// Bytes.
    pub memory: u64,
    /// Bytes.
    pub maximum_memory: u64,
    /// A managed save image exists.
    pub has_managed_save: bool,
    /// The stored configuration differs from what runs.
    pub config_changed: bool,
    /// Name of the current snapshot.
    pub current_snapshot: Option<String>,
    /// Number of snapshots.
    pub snapshot_count: u32,
    /// The uid that defined it.
    pub owner: u32,
    /// Empty, or why its files cannot be used.
    pub broken: String,
}

/// All that is published of a snapshot, at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct SnapshotFacts {
    /// Whose it is.
    pub domain: Uuid,
    /// Unique among the domain's.
    pub name: String,
    /// Empty, or why its record cannot be used.
    pub broken: String,
    /// For people.
    pub description: String,
    /// Microseconds since the epoch.
    pub created_usec: u64,
    /// What the guest did; empty if the record is broken.
    pub state: &'static str,
    /// The snapshot before it.
    pub parent: Option<String>,
    /// Those after it, in the order of their creation.
    pub children: Vec<String>,
    /// A new snapshot would be its child.
    pub is_current: bool,
    /// `no`, `internal`, `external`.
    pub memory: &'static str,
    /// Target, mode, file.
    pub disks: Vec<(String, &'static str, String)>,
}

/// One change.
#[derive(Debug)]
pub enum Event {
    /// A snapshot is new or changed.
    Snapshot(Arc<SnapshotFacts>),
    /// A snapshot is no more.
    SnapshotGone(Arc<SnapshotFacts>),
    /// A domain is new or changed: all its facts now, and what happened, in order. Told as one.
    Domain(Arc<DomainFacts>, Vec<Lifecycle>),
    /// A domain has ceased to exist, after these last events.
    DomainGone(Arc<DomainFacts>, Vec<Lifecycle>),
    /// A job is new or changed; `finished` in its state is told once.
    Job(Arc<JobFacts>),
    /// A job's record was dropped.
    JobGone(u64),
    /// Everything before it has been sent when this is answered.
    Flush(oneshot::Sender<()>),
}

/// The sending side.
#[derive(Clone, Debug)]
pub struct Events(mpsc::UnboundedSender<Event>);

impl Events {
    /// A new stream.
    pub fn channel() -> (Events, mpsc::UnboundedReceiver<Event>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Events(sender), receiver)
    }

    /// Tells of a change. Without a reader (virtd is closing) nobody is told.
    pub fn send(&self, event: Event) {
        let _ = self.0.send(event);
    }

    /// Waits until everything sent before has been published.
    pub async fn flush(&self) {
        let (done, wait) = oneshot::channel();
        self.send(Event::Flush(done));
        let _ = wait.await;
    }
}
