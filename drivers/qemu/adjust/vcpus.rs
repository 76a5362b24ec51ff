//! vCPUs plugged into and out of a guest that runs.

use crate::qemu::QemuDriver;
use crate::qemu::command::{vcpu_name, vcpu_place};
use crate::qemu::instance::Body;
use crate::qemu::qmp::Qmp;
use crate::qemu::tune::{ThreadKind, Tuning};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;

/// QEMU 7.2 frees what it still uses of an emulated vCPU: it dies of "corrupted double-linked list" with the next one that comes, or at once.
const EMULATED: &str = "vCPUs that are emulated are not taken out while the guest runs, as QEMU damages its own memory by that and the \
                        guest would be lost; set them in the stored configuration and start the guest anew, or give it type='kvm'";

impl QemuDriver {
    pub(super) async fn adjust_vcpus(
        &self,
        body: &Arc<Body>,
        before: &DomainDef,
        def: &mut DomainDef,
        patience: Duration,
    ) -> Result<(), DriverError> {
        let ((there, _), (wanted, _)) = (before.vcpus_at_boot(), def.vcpus_at_boot());
        let (until, emulated) = (Instant::now() + patience, def.kind != "kvm");
        let changed = async {
            if emulated && !there.is_subset(&wanted) {
                return Err(DriverError::Unsupported(EMULATED.to_owned()));
            }
            plug_in(body, def, wanted.difference(&there).copied().collect()).await?;
            for number in there.iter().rev().filter(|number| !wanted.contains(number)) {
                let left = until.saturating_duration_since(Instant::now());
                body.lets_go(&vcpu_name(*number), left).await.map_err(not_yet)?;
            }
            Ok(())
        };
        let changed: Result<(), DriverError> = changed.await;
        if changed.is_err() {
            def.clone_from(before);
            if let Ok(present) = present(body, before).await
                && present != there
            {
                def.set_online_vcpus(&present);
            }
        }
        changed
    }
}

/// Plugs in vCPUs; each of them runs where it is to, and uses what it may, from the moment that it is there.
async fn plug_in(body: &Arc<Body>, def: &DomainDef, numbers: BTreeSet<u32>) -> Result<(), DriverError> {
    if numbers.is_empty() {
        return Ok(());
    }
    let slots = body.execute("query-hotpluggable-cpus", json!({})).await.map_err(|error| match error {
        DriverError::Hypervisor(why) => DriverError::Unsupported(format!(
            "vCPUs come and go only while it is off: its machine type plugs none ({why})"
        )),
        other => other,
    })?;
    for number in &numbers {
        let slot = slots.as_array().into_iter().flatten().find(|slot| is_of(slot, def, *number));
        let slot = slot.filter(|slot| slot["vcpus-count"] == 1).ok_or_else(|| {
            DriverError::Unsupported(format!(
                "vCPU {number} cannot be plugged in by itself: its machine has no place for that"
            ))
        })?;
        // It is there if it was to go, and the guest has not let go of it.
        if slot["qom-path"].is_null() {
            let mut arguments = slot["props"].clone();
            arguments["driver"] = slot["type"].clone();
            arguments["id"] = Value::from(vcpu_name(*number));
            body.execute("device_add", arguments).await?;
        }
    }
    let mut tuning = Tuning::of(def);
    tuning.limits = Default::default();
    tuning.threads.retain(|kind, _| matches!(kind, ThreadKind::Vcpu(number) if numbers.contains(number)));
    match body.keeper.process_id().filter(|_| !tuning.is_none()) {
        Some(pid) => tuning.apply(body.uuid, pid, &*body.monitor()?).await,
        None => Ok(()),
    }
}

/// The board takes vCPUs back once a system has told it that it knows how.
fn not_yet(error: DriverError) -> DriverError {
    match error {
        DriverError::Hypervisor(why) if why.contains("unplug request for not supported device type") => {
            DriverError::Refused("its guest runs no system that can let go of vCPUs, or not yet".to_owned())
        }
        other => other,
    }
}

/// Whether that is where the vCPU of this number is plugged in. QEMU leaves out what all vCPUs have in common.
fn is_of(slot: &Value, def: &DomainDef, number: u32) -> bool {
    let place = vcpu_place(def, number);
    place.into_iter().all(|(key, value)| slot["props"][key].as_u64().unwrap_or_default() == u64::from(value))
}

/// The vCPUs that the guest has: those of its board at least, whatever QEMU says. Numbers that the definition has none of are not
/// listened to.
pub async fn present(body: &Body, def: &DomainDef) -> Result<BTreeSet<u32>, DriverError> {
    present_by(&*body.monitor()?, def).await
}

/// The same, of whom that monitor is.
pub async fn present_by(monitor: &Qmp, def: &DomainDef) -> Result<BTreeSet<u32>, DriverError> {
    let told = monitor.execute("query-cpus-fast", json!({})).await?;
    Ok(there(&told, def))
}

fn there(told: &Value, def: &DomainDef) -> BTreeSet<u32> {
    let numbers = told.as_array().into_iter().flatten().filter_map(|cpu| cpu["cpu-index"].as_u64()?.try_into().ok());
    let (mut board, plugged) = def.vcpus_at_boot();
    board.retain(|number| !plugged.contains(number));
    numbers.filter(|number| *number < def.maximum_vcpus()).chain(board).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_is_plugged_where_its_number_says() {
        let text = "<domain type='qemu'><name>d</name><memory>1</memory><vcpu current='1'>8</vcpu>\
                    <cpu><topology sockets='2' dies='1' cores='2' threads='2'/></cpu></domain>";
        let def = DomainDef::parse(text).expect("a machine");
        let slot = |socket: u32, core: u32, thread: u32| json!({ "props": { "socket-id": socket, "core-id": core, "thread-id": thread }, "vcpus-count": 1 });
        assert!(is_of(&slot(0, 0, 0), &def, 0) && is_of(&slot(0, 1, 1), &def, 3) && is_of(&slot(1, 0, 1), &def, 5));
        assert!(!is_of(&slot(1, 0, 1), &def, 1));
    }

    #[test]
    fn the_boards_vcpus_are_there_whatever_qemu_says() {
        let text = "<domain type='qemu'><name>d</name><memory>1</memory><vcpu current='2'>4</vcpu></domain>";
        let mut def = DomainDef::parse(text).expect("a machine");
        def.set_vcpus(3, true).expect("one more");
        let told = |numbers: &[u32]| numbers.iter().map(|n| json!({ "cpu-index": n })).collect::<Value>();
        assert_eq!(there(&told(&[2, 7]), &def), BTreeSet::from([0, 1, 2]));
        assert_eq!(there(&told(&[0, 1]), &def), BTreeSet::from([0, 1]), "what was plugged in may have gone");
    }
}
