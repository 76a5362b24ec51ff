//! A domain in the frames of verbs (`frames.rs`), which are methods of it here.

use super::Domain;
use crate::authz::{Action, Caller, Subject};
use crate::error::{Error, Result};
pub(super) use crate::frames::cancel_when_gone;
use crate::frames::{self, Changeable};
use crate::lock::lock;
use crate::object::{ObjectKind, ObjectRef};
use crate::shared::Shared;
use crate::turn::{Turn, TurnGuard};
use crate::verb::Verb;
use std::sync::Arc;
use std::time::Instant;
use tokio_util::sync::CancellationToken;

/// A verb that is accepted, and whose job is to be begun.
pub(super) type Change = frames::Change<Domain>;

impl Changeable for Domain {
    const KIND: ObjectKind = ObjectKind::Domain;

    const UNDONE_LATER: &str = "its hypervisor or its storage does not answer: what was begun is undone when it does, or when \
                                the domain is destroyed";

    fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn turn(&self) -> &Arc<Turn> {
        &self.turn
    }

    fn reference(&self) -> ObjectRef {
        ObjectRef::Domain(self.uuid)
    }

    fn name(&self) -> String {
        self.name()
    }

    fn subject(&self) -> Subject {
        self.subject()
    }

    fn still_here(&self) -> Result<()> {
        self.still_here()
    }

    fn sound_for(&self, action: Action) -> Result<()> {
        lock(&self.state).sound_for(action)
    }

    fn applies(&self, verb: &Verb) -> Result<()> {
        self.applies(verb)
    }

    async fn recovers(self: &Arc<Self>) -> Result<()> {
        self.finish_interrupted().await
    }

    async fn recovers_soon(self: &Arc<Self>) -> Result<()> {
        self.finish_interrupted_soon().await
    }

    async fn settles(&self, cancelled: bool) {
        if cancelled {
            self.wants_no_guest().await;
        }
        // Where the guest was paused for it and went on, that is published before the reply.
        self.all_told().await;
    }
}

impl Domain {
    /// See [`frames::allow`].
    pub(crate) async fn allow(&self, caller: &Caller, action: impl Into<Option<Action>>) -> Result<()> {
        frames::allow(self, caller, action).await
    }

    /// The same for the snapshot `name`; of a domain whose own files cannot be used, that is said when its machine is looked at.
    pub(super) async fn allow_snapshot(
        &self,
        caller: &Caller,
        action: impl Into<Option<Action>>,
        name: &str,
    ) -> Result<()> {
        frames::allow_for(self, caller, action.into(), &self.snapshot_subject(name)).await
    }

    /// See [`frames::beside`].
    pub(super) async fn beside<T>(
        &self,
        caller: &Caller,
        verb: &Verb,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        frames::beside(self, caller, verb, work).await
    }

    /// See [`frames::short`].
    pub(super) async fn short<T>(
        self: &Arc<Self>,
        caller: &Caller,
        verb: &Verb,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        frames::short(self, caller, verb, work).await
    }

    /// See [`frames::change`].
    pub(super) fn change(self: &Arc<Self>, caller: &Caller, verb: &'static Verb) -> Change {
        frames::change(self, caller, verb)
    }

    pub(super) async fn take_turn(&self, word: &str, give_up: &CancellationToken) -> Result<TurnGuard> {
        frames::take_turn(self, word, give_up).await
    }

    /// The refusal of who has waited for what is mended first.
    pub(super) fn busy_with(&self, job: String) -> Error {
        Error::Busy { object: ObjectKind::Domain.named(&self.name()), job }
    }

    /// See [`frames::logged`].
    pub(crate) async fn logged<T>(
        &self,
        caller: &Caller,
        verb: &Verb,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        frames::logged(self, caller, verb, work).await
    }

    /// See [`frames::accepted`].
    pub(super) async fn accepted<T>(
        &self,
        caller: &Caller,
        verb: &Verb,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        frames::accepted(self, caller, verb, work).await
    }

    pub(crate) fn log(&self, caller: &Caller, verb: &Verb, begun: Instant, failure: Option<&Error>) {
        frames::log_of(self, caller, verb, begun, failure);
    }
}
