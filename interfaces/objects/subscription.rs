//! `org.virt.StatsSubscription`: statistics at an interval, told to the client that wants them.

use super::{Members, paths, stats};
use crate::bus::Line;
use crate::bus::answers::no_object;
use crate::bus::call::{Call, Outcome};
use crate::bus::rows::Object;
use crate::bus::table::Offer;
use crate::bus::wire::Row;
use crate::error::Error;
use std::sync::Arc;
use virt_service::verb;
use virt_service::{MachineStats, Service, Subscription};
use zbus::{Message, ObjectPath};

/// The interface.
pub const INTERFACE: &str = "org.virt.StatsSubscription";

/// What is published of a subscription.
pub fn object(number: u64) -> Object {
    Object::new(paths::subscription(number), INTERFACE, Row::new(&[], &[]))
}

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    Members::new(service, find).method(&verb::CLOSE, close).offer(INTERFACE, &[], &[("Stats", "ta(oa{sv})")])
}

/// The service, and the number of a subscription that it may have.
type Found = (Arc<Service>, u64);

fn find(service: &Arc<Service>, call: &Call) -> Result<Found, Error> {
    let number = paths::subscription_number(call.path()).ok_or_else(|| no_object(call.path()))?;
    Ok((service.clone(), number))
}

async fn close((service, number): Found, call: Call) -> Outcome {
    service.unsubscribe(call.caller(), number)?;
    call.done()
}

/// So many machines are told in one signal; of more, there are several of one moment.
const TOGETHER: usize = 256;
/// With more than so many it may be a large one.
const FEW: usize = 16;

/// Tells the numbers of each moment, until the subscription ends.
pub async fn run(mut subscription: Subscription, line: Line) {
    let path = paths::subscription(subscription.number());
    while let Some((when, machines)) = subscription.next().await {
        // Of no machines, too: it is told that there are none.
        let parts = machines.chunks(TOGETHER).chain(machines.is_empty().then_some(&machines[..]));
        for part in parts {
            let made = line.tell(part.len() > FEW, || signal(&path, &line, when, part)).await;
            if let Err(error) = made {
                tracing::warn!(%error, path, "statistics could not be told");
            }
        }
    }
    line.end();
}

fn signal(path: &str, line: &Line, when: u64, machines: &[MachineStats]) -> Result<Message, Error> {
    let values = machines.iter().map(|one| Ok((paths::argument(paths::domain(one.uuid))?, stats::told(&one.stats))));
    let values: Vec<(ObjectPath<'static>, stats::Numbers)> = values.collect::<Result<_, Error>>()?;
    let builder = line.addressed(Message::signal(path, INTERFACE, "Stats"));
    builder.build(&(when, values)).map_err(|error| Error::internal(error.to_string()))
}
