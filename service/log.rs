//! The lines of the log that somebody looks for: who did what to which object, how that went, and what became of a guest.
//! Each is a sentence, and tells the same in fields; each kind has a target of its own, by which the journal's
//! `MESSAGE_ID` is told.

use crate::authz::Caller;
use crate::error::Error;
use crate::object::ObjectKind;
use crate::time::millis;
use crate::verb::Verb;
use std::time::Instant;
use uuid::Uuid;
use virt_model::state::Lifecycle;

/// The target of what was asked for and is done.
pub const DONE: &str = "virt_service::done";

/// The target of what was asked for and refused, or not done in the end.
pub const FAILED: &str = "virt_service::failed";

/// The target of what happened to a guest.
pub const GUEST: &str = "virt_service::guest";

/// What a verb does, without the word behind which its object would be named: that stands in front.
fn deed(verb: &Verb) -> &'static str {
    verb.word.strip_suffix(" of").unwrap_or(verb.word)
}

/// A caller's verb was done to an object.
pub(crate) fn done(kind: ObjectKind, uuid: Option<Uuid>, name: &str, caller: &Caller, verb: &Verb, begun: Instant) {
    let (caller_uid, action, duration_ms) = (caller.uid, deed(verb), millis(begun));
    let (kind, uuid) = (kind.word(), uuid.map(tracing::field::display));
    tracing::info!(
        target: DONE, uuid, name, caller_uid, action, duration_ms,
        "{kind} {name:?}: {action} by uid {caller_uid}: done in {duration_ms} ms"
    );
}

/// A caller's verb was not done to an object.
pub(crate) fn failed(
    kind: ObjectKind,
    uuid: Option<Uuid>,
    name: &str,
    caller: &Caller,
    verb: &Verb,
    begun: Instant,
    error: &Error,
) {
    let (caller_uid, action, duration_ms, error) = (caller.uid, deed(verb), millis(begun), error.public());
    let (kind, uuid) = (kind.word(), uuid.map(tracing::field::display));
    tracing::warn!(
        target: FAILED, uuid, name, caller_uid, action, duration_ms,
        "{kind} {name:?}: {action} by uid {caller_uid}: failed in {duration_ms} ms: {error}"
    );
}

/// A caller's verb came to no object.
pub(crate) fn refused(caller: &Caller, verb: &Verb, begun: Instant, error: &Error) {
    let (caller_uid, action, duration_ms, error) = (caller.uid, deed(verb), millis(begun), error.public());
    tracing::warn!(
        target: FAILED, caller_uid, action, duration_ms,
        "{action} by uid {caller_uid}: failed in {duration_ms} ms: {error}"
    );
}

/// Something happened to a guest.
pub(crate) fn guest(uuid: Uuid, name: &str, event: Lifecycle) {
    let (word, detail) = event.words();
    tracing::info!(target: GUEST, %uuid, name, event = word, detail, "domain {name:?}: {word} ({detail})");
}
