//! `org.virt.Host`: the hosts of other hypervisors.

use super::{Members, Published, paths, properties};
use crate::bus::answers::no_object;
use crate::bus::call::{Call, Outcome};
use crate::bus::rows::{Facts, Object};
use crate::bus::table::Offer;
use crate::error::Error;
use std::sync::Arc;
use virt_service::facts::{HostFacts, ObjectFacts};
use virt_service::object::ObjectRef;
use virt_service::verb;
use virt_service::{OtherHost, Service};

/// The interface.
pub const INTERFACE: &str = "org.virt.Host";

properties! {
    f: HostFacts {
        "Name" = Str(&f.name);
        "Driver" = Str(f.driver);
        "Address" = Str(&f.address);
        "Version" = Str(&f.version);
        "Error" = Str(&f.error);
        "Proof" = Str(f.proof);
        "Keeps" = Str("all");
        "State" = Str(f.state);
        "StateSince" = U64(f.since_usec);
        "Abilities" = Strs(&f.abilities);
        "Problems" = Strs(&f.problems.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

/// See [`super::published`].
pub fn published(facts: &Arc<HostFacts>) -> Published {
    let object = Object::new(paths::of(&ObjectRef::Host(facts.name.clone())), INTERFACE, row(facts));
    Published { object: object.of(Facts::Other(ObjectFacts::Host(facts.clone()))), lifecycle: None }
}

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    Members::new(service, find).method(&verb::RECONNECT, reconnect).method(&verb::REFRESH, refresh).offer(
        INTERFACE,
        FIELDS,
        &[],
    )
}

fn find(service: &Arc<Service>, call: &Call) -> Result<Arc<OtherHost>, Error> {
    match paths::object(call.path()) {
        Some(ObjectRef::Host(name)) => service.other_host(&name).map_err(|_| no_object(call.path())),
        _ => Err(no_object(call.path())),
    }
}

async fn reconnect(host: Arc<OtherHost>, call: Call) -> Outcome {
    host.reconnect(call.caller()).await?;
    call.done()
}

async fn refresh(host: Arc<OtherHost>, call: Call) -> Outcome {
    host.refresh(call.caller()).await?;
    call.done()
}
