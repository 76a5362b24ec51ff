//! Where a device goes: what comes with it, and what cannot be plugged into a machine that runs.

use crate::host::wall;
use crate::host::workers::blocking;
use crate::qemu::capabilities::Capabilities;
use crate::qemu::command::{self, OneDevice, keeps_its_place};
use crate::qemu::complete::{Board, name_new_devices};
use crate::qemu::given;
use crate::qemu::instance::Body;
use crate::qemu::launch::MONITOR_FD;
use crate::qemu::{QemuDriver, check};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use virt_model::device::chardev::{CharKind, SocketMode};
use virt_model::device::controller::ControllerModel;
use virt_model::device::{Channel, ControllerKind, Device};
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::xml::{Finding, refusals};

impl QemuDriver {
    /// Gives the one device that `def` has more than `before` its place and name.
    pub(in crate::qemu) async fn place_one(
        &self,
        body: &Body,
        before: &DomainDef,
        def: &mut DomainDef,
    ) -> Result<String, DriverError> {
        let caps = self.learnt_for(def).await;
        self.complete_for(def, &caps)?;
        name_new_devices(def);
        let new = New::of(before, def)?;
        let own = body.leavings.own_dir();
        for channel in &mut def.devices.channels {
            give_socket(channel, &new.alias, &own)?;
        }
        refusals(check::check(&given::as_shown(def), &caps)).map_err(DriverError::Config)?;
        let (inner, with, without) = (self.0.clone(), def.clone(), before.clone());
        let missing = blocking(move || {
            let mut missing: Vec<Finding> = inner.missing_on_host(&with);
            if !missing.is_empty() {
                let known: Vec<String> = inner.missing_on_host(&without).into_iter().map(|one| one.message).collect();
                missing.retain(|one| !known.contains(&one.message));
            }
            missing
        });
        refusals(missing.await?).map_err(DriverError::Config)?;
        let parts = new.parts(def, &caps, &own)?;
        self.can_be_reached(body, &parts).await?;
        Ok(new.alias)
    }

    /// Refuses what is reached by the host's network where QEMU has a network of its own.
    async fn can_be_reached(&self, body: &Body, parts: &[OneDevice]) -> Result<(), DriverError> {
        let Some(pid) = body.keeper.process_id().filter(|_| parts.iter().any(|part| part.by_network)) else {
            return Ok(());
        };
        let apart = blocking(move || wall::has_own_network(pid)).await?;
        match apart.map_err(|e| DriverError::Internal(format!("the guest's QEMU cannot be looked at: {e}")))? {
            false => Ok(()),
            true => Err(DriverError::Unsupported(
                "it is reached by the network of the host, and this guest was started without, as it had nothing that needs \
                 it; put it into the stored configuration and start the guest again, or use a bridge"
                    .to_owned(),
            )),
        }
    }
}

/// What a definition has more than another.
pub struct New {
    /// The device that is asked for.
    pub alias: String,
    /// Controllers that come with it, in the order of their numbers.
    pub controllers: Vec<String>,
}

impl New {
    /// Refuses what is not exactly one device that can be plugged, where it can be.
    fn of(before: &DomainDef, def: &DomainDef) -> Result<New, DriverError> {
        let places = |def: &DomainDef| -> BTreeMap<String, String> {
            let told = def.devices.infos().into_iter();
            told.filter_map(|(info, _)| {
                Some((info.alias()?.to_owned(), format!("{:?}", info.address.as_ref().map(|address| &address.kind))))
            })
            .collect()
        };
        let (old, now) = (places(before), places(def));
        if let Some((moved, _)) = old.iter().find(|(alias, place)| now.get(*alias) != Some(place)) {
            return Err(DriverError::Unsupported(format!("'{moved}' would have to move for it, and the guest has it")));
        }
        let new = || def.devices.all().into_iter().filter(|device| is_new(&old, device));
        let controllers: Vec<Device> = new().filter(|device| matches!(device, Device::Controller(_))).collect();
        let mut others = new().filter(|device| !matches!(device, Device::Controller(_) | Device::Console(_)));
        let device = match (others.next(), others.next(), &controllers[..]) {
            (Some(device), None, _) => device,
            (None, None, [controller]) => *controller,
            _ => {
                return Err(DriverError::Unsupported(
                    "one device is plugged in at a time, of a kind that has a place on a bus".to_owned(),
                ));
            }
        };
        let alias = device.info().0.alias().unwrap_or_default().to_owned();
        for new in [&device].into_iter().chain(&controllers) {
            can_be_plugged(def, new, new.info().0.alias() == Some(&alias))?;
        }
        let beside = controllers.iter().filter_map(|one| one.info().0.alias().map(str::to_owned));
        let controllers = beside.filter(|name| *name != alias).collect();
        Ok(New { alias, controllers })
    }

    /// What QEMU is told for each: what others sit on first.
    pub fn parts(&self, def: &DomainDef, caps: &Capabilities, own: &Path) -> Result<Vec<OneDevice>, DriverError> {
        let place = command::Place::now(own, MONITOR_FD, false);
        let all = self.controllers.iter().chain([&self.alias]);
        let part = |alias: &String| {
            let part = command::one_device(def, caps, &place, alias);
            part.map_err(|why| DriverError::Unsupported(format!("'{alias}' cannot be plugged in: {why}")))
        };
        all.map(part).collect()
    }
}

fn is_new(old: &BTreeMap<String, String>, device: &Device) -> bool {
    device.info().0.alias().is_none_or(|alias| !old.contains_key(alias))
}

/// The controllers that come with a device.
pub fn controllers_beside(before: &DomainDef, def: &DomainDef, alias: &str) -> Vec<String> {
    let known: BTreeSet<&str> = before.devices.infos().into_iter().filter_map(|(info, _)| info.alias()).collect();
    let new = def.devices.controllers.iter().filter_map(|controller| controller.info.alias());
    new.filter(|name| !known.contains(name) && *name != alias).map(str::to_owned).collect()
}

/// Refuses a device that cannot be plugged, or not there. `asked`: it is what is asked for, not what comes with it.
fn can_be_plugged(def: &DomainDef, device: &Device, asked: bool) -> Result<(), DriverError> {
    let alias = device.info().0.alias().unwrap_or_default();
    if let Some(why) = keeps_its_place(device) {
        return Err(match asked {
            true => DriverError::Unsupported(format!("'{alias}' cannot be plugged into a machine that runs: {why}")),
            false => DriverError::Refused(format!(
                "there is no free place for it: it would need the controller '{alias}', and {why}; unplug something, or add \
                 the controller to the stored configuration and start the guest again"
            )),
        });
    }
    let Some(pci) = device.info().0.pci() else { return Ok(()) };
    let refuse = |why: &str| Err(DriverError::Unsupported(format!("'{alias}' cannot be plugged in at {pci}: {why}")));
    let bus =
        def.devices.controllers.iter().find(|bus| bus.kind == ControllerKind::Pci && bus.index() == u32::from(pci.bus));
    let fixed = bus.and_then(|bus| bus.target.as_ref()).and_then(|target| target.hotplug) == Some(false);
    match bus.and_then(|bus| bus.model) {
        _ if pci.function > 0 || pci.multifunction == Some(true) => {
            refuse("a device of several functions is there at the start")
        }
        Some(ControllerModel::PcieRoot) if Board::of(def) == Board::Q35 => {
            refuse("what sits on the root of PCI Express is there at the start; leave the address out")
        }
        _ if fixed => refuse("that port has hotplug='off'"),
        _ => Ok(()),
    }
}

/// A channel without a place of its own has its socket in the guest's folder.
fn give_socket(channel: &mut Channel, alias: &str, own: &Path) -> Result<(), DriverError> {
    let unnamed = channel.source.kind == CharKind::Unix && channel.source.path().is_none();
    if !unnamed || channel.info.alias() != Some(alias) {
        return Ok(());
    }
    if !alias.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
        return Err(DriverError::Unsupported(
            "a channel's alias has letters, digits, '-', '_' and '.' in it".to_owned(),
        ));
    }
    let path = own.join(format!("{alias}.sock")).to_string_lossy().into_owned();
    channel.source.set_path(Some(path));
    channel.source.sources.iter_mut().for_each(|source| _ = source.mode.get_or_insert(SocketMode::Bind));
    Ok(())
}
