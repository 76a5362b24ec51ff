//! Devices of a guest that runs: plugged in with what they stand on, and taken out with it.
//!
//! ```text
//!  attach:  taken from the host ─▶ files lent ─▶ objects, nodes, character devices, cables ─▶ controller it sits on ─▶ device
//!  detach:  device ─▶ DEVICE_DELETED ─▶ the same backwards ─▶ given back to the host ─▶ files given back
//! ```
//!
//! What QEMU is told is made of the arguments of a start (`command/one.rs`). Who finds a guest asks QEMU which devices it has: what
//! is not there any more, or has never come to be, is reported as gone, and then taken away with all that it stood on.

mod beside;
mod host;
mod into;
mod lent;
mod out;
mod place;

use super::command::keeps_its_place;
use super::instance::Body;
use super::qmp::Qmp;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;

#[cfg(test)]
pub use into::{leave_what_stays, take_back};

/// Where QEMU has devices by their names.
const DEVICES: &str = "/machine/peripheral";
/// Where it has objects by theirs.
const OBJECTS: &str = "/objects";

/// The names that QEMU has there.
async fn names_at(body: &Body, path: &str) -> Result<BTreeSet<String>, DriverError> {
    Ok(names_in(&body.ask("qom-list", json!({ "path": path })).await?))
}

fn names_in(told: &Value) -> BTreeSet<String> {
    let names = told.as_array().into_iter().flatten().filter_map(|one| one["name"].as_str());
    names.map(str::to_owned).collect()
}

/// The devices of a machine that QEMU has under their names for as long as they are there.
pub fn that_can_go(def: &DomainDef) -> Vec<String> {
    let all = def.devices.all().into_iter().filter(|device| keeps_its_place(device).is_none());
    all.filter_map(|device| device.info().0.alias().map(str::to_owned)).collect()
}

/// Which of these devices a QEMU does not have.
pub async fn missing(monitor: &Qmp, aliases: &[String]) -> Result<Vec<String>, DriverError> {
    let there = names_in(&monitor.execute("qom-list", json!({ "path": DEVICES })).await?);
    Ok(aliases.iter().filter(|alias| !there.contains(*alias)).cloned().collect())
}

/// QEMU's refusals of what no machine of that kind can do.
fn refused(alias: &str, error: DriverError) -> DriverError {
    match error {
        DriverError::Hypervisor(why) if why.contains("does not support hot") || why.contains("not hotpluggable") => {
            DriverError::Unsupported(format!("'{alias}': {why}"))
        }
        other => other,
    }
}
