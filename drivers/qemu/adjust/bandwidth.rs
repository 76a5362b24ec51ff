//! What passes a guest's network card: shaped at the host's end by the kernel, as at a start.

use crate::host::filter::{self, FilterPlan};
use crate::host::tap::{Rate, TapPlan, change_limit, change_plug, is_held, limit_of};
use crate::host::workers::blocking;
use crate::network::OwnNetwork;
use crate::network::inside::{Answer, Request};
use crate::qemu::command::tap_plan;
use crate::qemu::instance::Body;
use std::io;
use virt_model::device::Interface;
use virt_model::device::interface::{self, InterfaceKind};
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;

/// What is on its way to the guest, and from it.
const DIRECTIONS: [bool; 2] = [true, false];

/// Has the kernel hold the card that is known by that to what `def` says.
pub async fn adjust(body: &Body, before: &DomainDef, def: &DomainDef, known: &str) -> Result<(), DriverError> {
    let (card, was) = (card_of(def, known)?, card_of(before, known)?);
    let (device, direct) = (device_of(body, card).await?, card.kind == InterfaceKind::Direct);
    let changes = DIRECTIONS.map(|to_guest| (to_guest, rate_of(was, to_guest), rate_of(card, to_guest)));
    let changes: Vec<_> = changes.into_iter().filter(|(_, old, new)| old != new).collect();
    let place = Place::of(body, card);
    blocking(move || {
        // What is on its way to a guest without a bridge comes in at the host's end.
        let change = |to_guest: bool, rate: Option<Rate>| place.change_limit(&device, rate, to_guest != direct);
        for (done, (to_guest, old, new)) in changes.iter().enumerate() {
            if let Err(error) = change(*to_guest, *new) {
                let undone =
                    [(*to_guest, *old)].into_iter().chain(changes[..done].iter().map(|(to, old, _)| (*to, *old)));
                for (to_guest, old) in undone {
                    change(to_guest, old)
                        .unwrap_or_else(|error| tracing::warn!(%error, "a limit of a network card stays"));
                }
                let what = format!("the network device '{device}' cannot be limited: {error}");
                return Err(DriverError::Hypervisor(what));
            }
        }
        Ok(())
    })
    .await?
}

/// Plugs the cable of the card into the bridge that `def` says.
pub async fn change_bridge(body: &Body, before: &DomainDef, def: &DomainDef, known: &str) -> Result<(), DriverError> {
    let (card, was) = (card_of(def, known)?, card_of(before, known)?);
    let device = device_of(body, card).await?;
    let place = Place::of(body, card);
    if place.0.is_none() && !nix::unistd::geteuid().is_root() {
        let why = "its host's end was made by QEMU's helper: only virtd on the system bus plugs it into another bridge";
        return Err(DriverError::Unsupported(why.to_owned()));
    }
    let (new, old) = (tap_plan(card, 1), tap_plan(was, 1));
    let plugged = blocking(move || {
        place.change_plug(&device, &new).inspect_err(|_| {
            if let Err(error) = place.change_plug(&device, &old) {
                tracing::error!(%error, "'{device}' is in no bridge any more");
            }
        })
    });
    plugged.await?.map_err(|e| DriverError::Hypervisor(format!("a network card cannot be plugged elsewhere: {e}")))
}

/// Writes into `def` to what the kernel holds the card.
pub async fn look(body: &Body, def: &mut DomainDef, known: &str) -> Result<(), DriverError> {
    let card = card_of(def, known)?;
    let direct = card.kind == InterfaceKind::Direct;
    // Where nothing is said nothing is held, whatever the host's end is.
    let said = DIRECTIONS.map(|to_guest| rate_of(card, to_guest));
    if said == [None, None] {
        return Ok(());
    }
    let device = device_of(body, card).await?;
    let place = Place::of(body, card);
    let held = blocking(move || DIRECTIONS.map(|to_guest| place.limit_of(&device, to_guest != direct)));
    let held = held.await?.into_iter().collect::<Result<Vec<_>, _>>();
    let held =
        held.map_err(|e| DriverError::Hypervisor(format!("the limits of a network card cannot be read: {e}")))?;
    let Some(card) = def.devices.interfaces.iter_mut().find(|card| card.is_known_as(known)) else { return Ok(()) };
    let limits = card.bandwidth.get_or_insert_default();
    for ((to_guest, held), said) in DIRECTIONS.into_iter().zip(held).zip(said) {
        let direction = if to_guest { &mut limits.inbound } else { &mut limits.outbound };
        *direction = held.map(|held| as_said(held, said));
    }
    Ok(())
}

/// What the kernel holds it to, in the words of the definition: it keeps and tells less than it is given, and peaks and bursts that
/// are not said have values, too.
fn as_said(held: Rate, said: Option<Rate>) -> interface::Rate {
    let near =
        |held: u64, said: Option<u64>| said.filter(|said| held.abs_diff(*said) <= *said / 100 + 1).unwrap_or(held);
    let average = near(held.average, said.map(|said| said.average));
    let more = |held: Option<u64>, said: Option<u64>, usual: u64| {
        held.map(|held| near(held, said)).filter(|held| said.is_some() || held.abs_diff(usual) > usual / 100 + 1)
    };
    interface::Rate {
        average: Some(average),
        peak: more(held.peak, said.and_then(|said| said.peak), average),
        burst: more(held.burst, said.and_then(|said| said.burst), average.max(64)),
        ..interface::Rate::default()
    }
}

/// Where the host's end of a card is: on the host, or in the user's own network.
pub(super) struct Place(Option<OwnNetwork>);

impl Place {
    pub(super) fn of(body: &Body, card: &Interface) -> Place {
        Place(OwnNetwork::of_card(body.leavings.own_network.as_ref(), card).cloned())
    }

    fn ask(own: &OwnNetwork, request: &Request) -> io::Result<Answer> {
        own.ask(request).map(|(answer, _)| answer).map_err(|error| io::Error::other(error.to_string()))
    }

    fn change_limit(&self, device: &str, rate: Option<Rate>, leaving: bool) -> io::Result<()> {
        let Some(own) = &self.0 else { return change_limit(device, rate, leaving) };
        Place::ask(own, &Request::ChangeLimit { device: device.to_owned(), rate, leaving }).map(drop)
    }

    fn limit_of(&self, device: &str, leaving: bool) -> io::Result<Option<Rate>> {
        let Some(own) = &self.0 else { return limit_of(device, leaving) };
        match Place::ask(own, &Request::LimitOf { device: device.to_owned(), leaving })? {
            Answer::Limit(held) => Ok(held),
            _ => Err(io::Error::other("another question was answered")),
        }
    }

    pub(super) fn change_filter(&self, device: &str, plan: Option<&FilterPlan>) -> io::Result<()> {
        let Some(own) = &self.0 else { return filter::change(device, plan) };
        Place::ask(own, &Request::ChangeFilter { device: device.to_owned(), plan: plan.cloned() }).map(drop)
    }

    fn change_plug(&self, device: &str, plan: &TapPlan) -> io::Result<()> {
        let Some(own) = &self.0 else { return change_plug(device, plan) };
        Place::ask(own, &Request::ChangePlug { device: device.to_owned(), plan: plan.clone() }).map(drop)
    }
}

/// The card that is known by that.
pub fn card_of<'a>(def: &'a DomainDef, known: &str) -> Result<&'a Interface, DriverError> {
    let card = def.devices.interfaces.iter().find(|card| card.is_known_as(known));
    card.ok_or_else(|| DriverError::Internal("a network card is lost".to_owned()))
}

/// The host's end, as long as it is this guest's: a QEMU that has closed it has given its name to the next.
pub(super) async fn device_of(body: &Body, card: &Interface) -> Result<String, DriverError> {
    let name = card.target.as_ref().and_then(|target| target.dev.clone()).filter(|_| card.has_host_end());
    let name = name.ok_or_else(|| {
        DriverError::Unsupported("its host's end has no name: it is no network device of virtd's".to_owned())
    })?;
    // One without a bridge stays until virtd removes it.
    if card.kind == InterfaceKind::Direct {
        return Ok(name);
    }
    let (device, pid) = (name.clone(), body.keeper.process_id().ok_or(DriverError::Gone)?);
    match blocking(move || is_held(&device, pid)).await? {
        Ok(true) => Ok(name),
        Ok(false) => Err(DriverError::Refused(format!(
            "its QEMU does not have the network device '{name}' any more; detach the card and attach it again"
        ))),
        Err(e) => {
            Err(DriverError::Hypervisor(format!("whether QEMU has the network device '{name}' cannot be told: {e}")))
        }
    }
}

fn rate_of(card: &Interface, to_guest: bool) -> Option<Rate> {
    let [inbound, outbound] = Rate::both(card.bandwidth.as_ref());
    if to_guest { inbound } else { outbound }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_rounds_is_told_as_it_was_said() {
        let rate = |average: u64, peak: u64, burst: u64| Rate { average, peak: Some(peak), burst: Some(burst) };
        let said = Rate { average: 1_234_567, peak: None, burst: Some(99) };
        let told = as_said(rate(1_234_500, 1_234_500, 100), Some(said));
        assert_eq!((told.average, told.peak, told.burst), (Some(1_234_567), None, Some(99)));
        let told = as_said(rate(500, 900, 64), Some(Rate { average: 1000, peak: None, burst: None }));
        assert_eq!((told.average, told.peak, told.burst), (Some(500), Some(900), Some(64)), "somebody else's doing");
    }
}
