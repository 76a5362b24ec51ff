//! A device is unplugged: the guest lets go of it, and what it stood on is taken away.

use super::{DEVICES, names_at, refused};
use crate::host::workers::blocking;
use crate::qemu::block::Nodes;
use crate::qemu::command::{self, never_leaves};
use crate::qemu::given;
use crate::qemu::instance::Body;
use crate::qemu::launch::MONITOR_FD;
use crate::qemu::plan::Tap;
use crate::qemu::qmp::COMMAND_TIMEOUT;
use crate::qemu::{QemuDriver, media};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use virt_model::device::{ControllerKind, Device};
use virt_model::domain::DomainDef;
use virt_model::driver::{Detachment, DriverError};

impl QemuDriver {
    /// Has the guest let go of a device, and takes away what it stood on.
    pub(in crate::qemu) async fn unplug(
        &self,
        body: &Arc<Body>,
        Detachment { def, alias, patience }: Detachment<'_>,
    ) -> Result<(), DriverError> {
        if let Some(why) = def.device_named(alias).as_ref().and_then(never_leaves) {
            return Err(DriverError::Unsupported(format!("'{alias}' stays as long as the machine runs: {why}")));
        }
        serves_nobody(def, alias)?;
        body.lets_go(alias, patience).await?;
        self.take_away(body, def, alias).await;
        Ok(())
    }

    /// Whether the guest has let go of a device; what it stood on is taken away then.
    pub(in crate::qemu) async fn has_gone(
        &self,
        body: &Arc<Body>,
        def: &DomainDef,
        alias: &str,
    ) -> Result<bool, DriverError> {
        if names_at(body, DEVICES).await?.contains(alias) {
            return Ok(false);
        }
        self.take_away(body, def, alias).await;
        Ok(true)
    }

    /// Takes away what a device stood on that has gone. What others stand on, too, stays.
    async fn take_away(&self, body: &Arc<Body>, def: &DomainDef, alias: &str) {
        let caps = self.learnt_for(def).await;
        let own = body.leavings.own_dir();
        let place = command::Place::now(&own, MONITOR_FD, false);
        let Ok(part) = command::one_device(def, &caps, &place, alias) else { return };
        if let Some(disk) = def.disk_named(alias) {
            let prefix = format!("{}-", disk.target.dev);
            let close = async {
                let nodes = Nodes::of(body).await.unwrap_or_default();
                let nodes = nodes.0.into_iter().map(|node| node.name).filter(|name| name.starts_with(&prefix));
                media::close(body, nodes.collect()).await;
                given::take_back(body, &disk.target.dev, None).await;
                // Limits that were lifted are said nowhere, and would stand in the way of the next disk of that name.
                let own = json!({ "id": format!("throttle-{}", disk.target.dev) });
                if let Err(error) = body.ask("object-del", own).await {
                    tracing::debug!(uuid = %body.uuid, alias, %error, "it has no limits of its own");
                }
            };
            if timeout(COMMAND_TIMEOUT, close).await.is_err() {
                tracing::warn!(uuid = %body.uuid, "QEMU is slow to close the images of '{alias}'; they may stay open");
            }
        }
        let undo = part.steps.iter().rev().filter_map(|step| step.undo.clone());
        for (command, arguments) in undo.filter(|(command, _)| !matches!(*command, "device_del" | "blockdev-del")) {
            let Err(error) = body.ask(command, arguments).await else { continue };
            tracing::debug!(uuid = %body.uuid, alias, %error, "something that a device stood on stays");
            if matches!(error, DriverError::TimedOut(_)) {
                break;
            }
        }
        let (console, name, dir) = (body.clone(), alias.to_owned(), own.clone());
        if let Err(error) = blocking(move || console.consoles.forget(&name, &dir)).await {
            tracing::warn!(uuid = %body.uuid, %error, "what '{alias}' said stays until the guest ends");
        }
        self.end_beside(body, &part.companions).await;
        body.removes_filters(alias, &part.taps).await;
        if let Ok(rest) =
            def.without_devices(|_, element| virt_model::domain::one_device::alias_of(element) == Some(alias))
        {
            body.has_agent_of(&rest);
            self.keeps_less_in_place(body, def, &rest).await;
            self.is_not_had(body, &rest, alias, part.files.into_iter().map(|file| file.path).collect()).await;
        }
    }
}

impl Body {
    /// Removes the filters of a device that has gone, or never came to be, if it had any of those network devices with one.
    pub(super) async fn removes_filters(&self, alias: &str, taps: &[Tap]) {
        if taps.iter().all(|tap| tap.plan.filter.is_none()) {
            return;
        }
        let leavings = self.leavings.clone();
        if let Err(error) = blocking(move || leavings.sweep_filters()).await {
            tracing::warn!(uuid = %self.uuid, %error, "the filter of '{alias}' stays until the guest ends");
        }
    }

    /// Asks the guest to let go of what QEMU has under that name, and waits until it has. Errors as of
    /// [`virt_model::driver::Driver::detach_device`].
    pub(in crate::qemu) async fn lets_go(&self, alias: &str, patience: Duration) -> Result<(), DriverError> {
        let awaited = self.reporter.awaits(alias);
        let mut answered = false;
        let goes = async {
            let asked = self.patiently("device_del", json!({ "id": alias })).await;
            answered = true;
            match asked {
                Ok(_) => Ok(awaited.settled().await),
                Err(DriverError::Hypervisor(why)) if why.contains("not found") => Ok(Some(true)),
                // It was asked before.
                Err(DriverError::Hypervisor(why)) if why.contains("in the process of unplug") => {
                    Ok(awaited.settled().await)
                }
                Err(error) => Err(refused(alias, error)),
            }
        };
        // QEMU may be deaf, so that its answer is waited for no longer than the guest.
        let (settled, in_time) = match timeout(patience, goes).await {
            Ok(settled) => (settled?, true),
            Err(_) => (None, false),
        };
        match awaited.taken().or(settled) {
            Some(true) => Ok(()),
            Some(false) => Err(DriverError::Refused(format!("the guest refuses to let go of '{alias}'"))),
            // Nobody says anything of it any more: QEMU is dying, if it has not gone yet.
            None if in_time || self.monitor().is_err() => Err(DriverError::Gone),
            None => {
                let seconds = patience.as_secs_f64();
                let what = match answered {
                    true => format!("the guest did not let go of '{alias}' within {seconds} s, and has it still"),
                    false => format!("QEMU did not answer within {seconds} s, and '{alias}' is in the guest still"),
                };
                Err(DriverError::TimedOut(format!("{what}; it may let go later, which is told then")))
            }
        }
    }
}

/// Refuses to take away a controller on which something sits.
fn serves_nobody(def: &DomainDef, alias: &str) -> Result<(), DriverError> {
    use virt_model::device::AddressKind;
    let Some(Device::Controller(controller)) = def.device_named(alias) else { return Ok(()) };
    let index = controller.index();
    let sits = |device: &Device| match (controller.kind, device.info().0.address.as_ref().map(|address| &address.kind))
    {
        (ControllerKind::Scsi, Some(AddressKind::Drive(drive))) => match device {
            Device::Disk(disk) => {
                disk.target.bus == Some(virt_model::device::disk::DiskBus::Scsi) && drive.controller == index
            }
            _ => false,
        },
        (ControllerKind::VirtioSerial, Some(AddressKind::VirtioSerial(port))) => port.controller == index,
        (ControllerKind::Usb, Some(AddressKind::Usb(port))) => port.bus == index,
        _ => false,
    };
    // A machine gets these by itself where they are missing, so that they are taken for the board's.
    if controller.kind == ControllerKind::Usb && index == 0 {
        return Err(DriverError::Unsupported(format!(
            "'{alias}' stays as long as the machine runs: it is the board's own"
        )));
    }
    match def.devices.all().into_iter().find(sits) {
        None => Ok(()),
        Some(device) => {
            let other = device.info().0.alias().unwrap_or_default();
            Err(DriverError::Refused(format!("'{other}' sits on '{alias}'; unplug that first")))
        }
    }
}
