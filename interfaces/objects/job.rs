//! `org.virt.Job`: translation between the bus and the service's jobs.

use super::{Members, paths, properties};
use crate::bus::answers::no_object;
use crate::bus::call::{Call, Options, Outcome, signal};
use crate::bus::rows::{Facts, Object};
use crate::bus::table::Offer;
use crate::bus::wire::Body;
use crate::error::Error;
use std::sync::Arc;
use virt_service::Service;
use virt_service::facts::{JobFacts, JobState};
use virt_service::job::Ticket;
use virt_service::verb;
use zbus::{Message, ObjectPath};

/// The interface.
pub const INTERFACE: &str = "org.virt.Job";

properties! {
    f: JobFacts {
        "Domain" = Path(&f.object.domain().map_or_else(|| "/".to_owned(), paths::domain));
        "Object" = Path(&paths::of(&f.object));
        "State" = Str(f.state.as_str());
        "Operation" = Str(f.operation);
        "StartedAt" = U64(f.started_usec);
        "Progress" = F64(f.progress);
        "BytesDone" = U64(f.bytes_done);
        "BytesTotal" = U64(f.bytes_total);
        "Cancellable" = Bool(f.cancellable);
        "Ready" = Bool(f.ready);
        "RequesterUid" = U32(f.requester_uid);
        "ErrorName" = Str(error(f).0);
        "ErrorMessage" = Str(&error(f).1);
    }
}

/// What is published of a job.
pub fn object(facts: &Arc<JobFacts>) -> Object {
    let path = paths::job(facts.id);
    Object::new(path, INTERFACE, row(facts)).of(Facts::Job(facts.clone()))
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
    signal(&paths::job(facts.id), INTERFACE, "Finished", "bss", &body)
}

/// Waits for a job, unless that is not wanted, and says which it is.
pub async fn finish(ticket: Ticket, no_wait: bool) -> Result<ObjectPath<'static>, Error> {
    let path = paths::job(ticket.id);
    if !no_wait {
        ticket.done().await?;
    }
    paths::argument(path)
}

/// The same for work that waits to be finished: that is waited for.
pub async fn finish_or_ready(ticket: Ticket, no_wait: bool) -> Result<ObjectPath<'static>, Error> {
    let path = paths::job(ticket.id);
    if !no_wait {
        ticket.ready_or_done().await?;
    }
    paths::argument(path)
}

/// The last option of a verb that becomes a job: its caller does not wait for the end.
pub fn no_wait(mut options: Options) -> Result<bool, Error> {
    let no_wait = options.flag("no-wait")?;
    options.end()?;
    Ok(no_wait)
}

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    Members::new(service, find).method(&verb::CANCEL, cancel).method(&verb::FINISH, finish_work).offer(
        INTERFACE,
        FIELDS,
        &[("Finished", "bss")],
    )
}

/// The service, and the number of a job that it may have.
type Found = (Arc<Service>, u64);

fn find(service: &Arc<Service>, call: &Call) -> Result<Found, Error> {
    let id = paths::job_number(call.path()).ok_or_else(|| no_object(call.path()))?;
    Ok((service.clone(), id))
}

async fn cancel((service, id): Found, call: Call) -> Outcome {
    service.cancel_job(call.caller(), id).await?;
    call.done()
}

async fn finish_work((service, id): Found, call: Call) -> Outcome {
    let no_wait = no_wait(call.options()?)?;
    service.finish_job(call.caller(), id, !no_wait).await?;
    call.done()
}

/// Name and text of what ended it, both empty while nothing has.
fn error(facts: &JobFacts) -> (&'static str, String) {
    let error = facts.error.as_ref().map(Error::from);
    error.map_or_else(|| ("", String::new()), |error| (error.name, error.text))
}
