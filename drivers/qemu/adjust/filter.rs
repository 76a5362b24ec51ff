//! What may pass a guest's network card: the rules at the host's end, as a start makes them, exchanged in one step.

use super::bandwidth::{Place, card_of, device_of};
use crate::host::filter::FilterPlan;
use crate::host::workers::blocking;
use crate::qemu::command::tap_plan;
use crate::qemu::instance::Body;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;

/// Has the kernel hold the card that is known by that to the filter that `def` says, or to none. On failure it is held to what it was
/// held to before: nftables takes all of it or nothing. Where that was none, whoever undoes the change lifts it: here a filter that
/// comes back would be taken away.
pub async fn adjust(body: &Body, before: &DomainDef, def: &DomainDef, known: &str) -> Result<(), DriverError> {
    let (card, was) = (card_of(def, known)?, card_of(before, known)?);
    let device = device_of(body, card).await?;
    let plan = |card| tap_plan(card, 1).filter;
    let (new, old): (Option<FilterPlan>, Option<FilterPlan>) = (plan(card), plan(was));
    if new.is_some() {
        body.keeper.change(|record| record.filtered = true).await?;
    }
    let place = Place::of(body, card);
    let filtered = blocking(move || {
        place.change_filter(&device, new.as_ref()).inspect_err(|_| {
            // One that is told too late may have been done.
            if let Some(old) = &old
                && let Err(error) = place.change_filter(&device, Some(old))
            {
                tracing::error!(%error, "'{device}' may have the filter that was refused");
            }
        })
    });
    filtered.await?.map_err(|e| DriverError::Hypervisor(format!("a network card cannot have another filter: {e}")))
}
