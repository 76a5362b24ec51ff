//! The event stream: what the service tells of every change, in the order in which it happened.
//!
//! One channel with one reader (the publisher). It has no bound of its own: who changes something waits until that has been
//! published, guests report at a pace (`domain/reports.rs`), and a bus that takes nothing is left after some seconds, so
//! what lies here is no more than what is under way. A domain sends while it holds its state, so the order of one
//! domain's events is the order of its changes. [`Events::flush`] returns when everything sent before it has been
//! published: that is how a reply waits for its signals.

use crate::facts::{CheckpointFacts, DomainFacts, JobFacts, ObjectFacts, SnapshotFacts};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;
use virt_model::driver::DeviceEvent;
use virt_model::state::Lifecycle;

/// What happened to an object of a kind that is no domain: the words of the event and its detail.
pub type Happened = (&'static str, &'static str);

/// One change.
#[derive(Debug)]
pub enum Event {
    /// A snapshot is new or changed.
    Snapshot(Arc<SnapshotFacts>),
    /// A snapshot is no more.
    SnapshotGone(Arc<SnapshotFacts>),
    /// A checkpoint is new or changed.
    Checkpoint(Arc<CheckpointFacts>),
    /// A checkpoint is no more.
    CheckpointGone(Arc<CheckpointFacts>),
    /// A domain is new or changed: all its facts now, and what happened, in order. Told as one.
    Domain(Arc<DomainFacts>, Vec<Lifecycle>),
    /// A domain has ceased to exist, after these last events.
    DomainGone(Arc<DomainFacts>, Vec<Lifecycle>),
    /// An object of another kind is new or changed, and what happened to it, in order. Told as one.
    Object(ObjectFacts, Vec<Happened>),
    /// The same of one that has ceased to exist.
    ObjectGone(ObjectFacts, Vec<Happened>),
    /// Something has happened to a device of a domain.
    Device(Uuid, DeviceEvent),
    /// A job is new or changed; `finished` in its state is told once.
    Job(Arc<JobFacts>),
    /// A job's record was dropped.
    JobGone(u64),
    /// A client has begun to listen to statistics, under this number.
    Subscription(u64),
    /// It has ended.
    SubscriptionGone(u64),
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
