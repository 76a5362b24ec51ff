//! `org.virt.Job`: translation between the bus and the service's jobs.

use crate::bus::answers::no_object;
use crate::bus::call::{Call, Handler, Outcome, signal};
use crate::bus::rows::{Facts, Object};
use crate::bus::table::Offer;
use crate::bus::wire::{Body, Field, Row, Value};
use crate::domain;
use crate::error::Error;
use std::sync::Arc;
use virt_service::Service;
use virt_service::job::{JobFacts, JobState};
use zbus::Message;

/// The interface.
pub const INTERFACE: &str = "org.virt.Job";

const FOLDER: &str = "/org/virt/job/";

const FIELDS: &[Field] = &[
    ("Domain", "o"),
    ("State", "s"),
    ("Operation", "s"),
    ("StartedAt", "t"),
    ("Progress", "d"),
    ("BytesDone", "t"),
    ("BytesTotal", "t"),
    ("Cancellable", "b"),
    ("RequesterUid", "u"),
    ("ErrorName", "s"),
    ("ErrorMessage", "s"),
];

/// The path of a job's object.
pub fn path(id: u64) -> String {
    format!("{FOLDER}{id}")
}

/// The number of the job at a path.
pub fn number(path: &str) -> Option<u64> {
    path.strip_prefix(FOLDER)?.parse().ok()
}

/// What is published of a job.
pub fn object(facts: &Arc<JobFacts>) -> Object {
    let (name, text) = error(facts);
    let values = [
        Value::Path(&domain::path(facts.domain)),
        Value::Str(facts.state.as_str()),
        Value::Str(facts.operation),
        Value::U64(facts.started_usec),
        Value::F64(facts.progress),
        Value::U64(facts.bytes_done),
        Value::U64(facts.bytes_total),
        Value::Bool(facts.cancellable),
        Value::U32(facts.requester_uid),
        Value::Str(name),
        Value::Str(&text),
    ];
    let row = Row::new(FIELDS, &values);
    Object { path: path(facts.id).into(), interface: INTERFACE, row, facts: Facts::Job(facts.clone()) }
}

/// Whether a job's end has been published.
pub fn has_ended(object: &Object) -> bool {
    matches!(&object.facts, Facts::Job(facts) if facts.state.is_final())
}

/// The signal of a job's end.
pub fn finished(facts: &JobFacts) -> Result<Message, Error> {
    let (name, text) = error(facts);
    let mut body = Body::default();
    body.u32((facts.state == JobState::Succeeded).into());
    body.text(name);
    body.text(&text);
    signal(&path(facts.id), INTERFACE, "Finished", "bss", &body)
}

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    let (service, events) = (service.clone(), service.events().clone());
    let methods = vec![Handler::change("Cancel", events, move |call| cancel(service.clone(), call))];
    Offer { interface: INTERFACE, methods, setters: Vec::new(), fields: FIELDS, signals: &[("Finished", "bss")] }
}

async fn cancel(service: Arc<Service>, call: Call) -> Outcome {
    let id = number(call.path()).ok_or_else(|| no_object(call.path()))?;
    service.cancel_job(call.caller(), id).await?;
    call.done()
}

/// Name and text of what ended it, both empty while nothing has.
fn error(facts: &JobFacts) -> (&'static str, String) {
    let error = facts.error.as_ref().map(Error::from);
    error.map_or_else(|| ("", String::new()), |error| (error.name, error.text))
}
