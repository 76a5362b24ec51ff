//! Devices of a guest that runs: plugged in with what they stand on, and taken out with it.
//!
//! ```text
//!  attach:  files lent ─▶ objects, nodes, character devices, cables ─▶ controller it sits on ─▶ device
//!  detach:  device ─▶ DEVICE_DELETED ─▶ the same backwards ─▶ files given back
//! ```
//!
//! What QEMU is told is made of the arguments of a start (`command/one.rs`). Who finds a guest asks QEMU which devices it has: what
//! is not there any more, or has never come to be, is reported as gone, and then taken away with all that it stood on.

use super::block::Nodes;
use super::capabilities::Capabilities;
use super::command::{self, OneDevice, Step, fd_name, keeps_its_place};
use super::complete::{Board, name_new_devices};
use super::given::{self, GivenImage};
use super::instance::Body;
use super::launch::{self, MONITOR_FD};
use super::plan::{HostFile, SecretContent};
use super::qmp::{COMMAND_TIMEOUT, Qmp};
use super::{QemuDriver, check, declared, live, make, media, needs, tap};
use crate::base64;
use crate::host::secret;
use crate::host::wall;
use crate::host::workers::{ClosedAside, Errand, blocking};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use virt_model::device::chardev::{CharKind, SocketMode};
use virt_model::device::controller::ControllerModel;
use virt_model::device::{Channel, ControllerKind, Device};
use virt_model::domain::DomainDef;
use virt_model::driver::{DriverError, GivenFile};
use virt_model::xml::{Finding, refusals};

/// Where QEMU has devices by their names.
const DEVICES: &str = "/machine/peripheral";
/// Where it has objects by theirs.
const OBJECTS: &str = "/objects";

impl QemuDriver {
    /// Gives the one device that `def` has more than `before` its place and name.
    pub(super) async fn place_one(
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
            let known: Vec<String> = inner.missing_on_host(&without).into_iter().map(|one| one.message).collect();
            let mut missing: Vec<Finding> = inner.missing_on_host(&with);
            missing.retain(|one| !known.contains(&one.message));
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

    /// Plugs in the device of that name, with the controllers that it brings.
    pub(super) async fn plug(
        &self,
        body: &Arc<Body>,
        before: &DomainDef,
        def: &mut DomainDef,
        alias: &str,
        image: Option<Arc<GivenFile>>,
    ) -> Result<(), DriverError> {
        let caps = self.learnt_for(def).await;
        declared::hold(&self.0.workers, def).await?;
        let new = New { alias: alias.to_owned(), controllers: controllers_beside(before, def, alias) };
        let parts = new.parts(def, &caps, &body.leavings.own_dir())?;
        let files: Vec<HostFile> = parts.iter().flat_map(|part| part.files.clone()).collect();
        self.lend_to(body, def, files.clone()).await?;
        let mut done = Vec::new();
        let disk = def.devices.disks.iter().find(|disk| disk.info.alias() == Some(alias));
        let given = disk.and_then(GivenImage::of);
        // The guest may open an agent's port before QEMU has answered.
        body.has_agent_of(def);
        let plugged = async {
            if let Some((disk, image)) = disk.zip(image) {
                given::hand_over(body, disk, &image).await?;
            }
            self.do_steps(body, def, parts, &mut done).await
        };
        if let Err(error) = plugged.await {
            body.has_agent_of(before);
            take_back(body, done, &error).await;
            given::take_back_this(body, given).await;
            if !matches!(error, DriverError::TimedOut(_)) {
                leave_what_stays(body, before, def).await;
            }
            self.give_back(body, def, files.into_iter().map(|file| file.path).collect()).await;
            return Err(refused(alias, error));
        }
        if live::has_terminals(def) {
            let devices = ask(body, "query-chardev", json!({})).await.unwrap_or_default();
            live::set_terminals(def, &devices);
        }
        Ok(())
    }

    /// Does what QEMU is told; what takes it back again is in `done`, on failure too.
    async fn do_steps(
        &self,
        body: &Arc<Body>,
        def: &DomainDef,
        parts: Vec<OneDevice>,
        done: &mut Vec<(&'static str, Value)>,
    ) -> Result<(), DriverError> {
        let mut shared = names_at(body, OBJECTS).await?;
        shared.retain(|object| is_shared(def, object));
        for OneDevice { steps, taps, .. } in parts {
            let mut given = Vec::new();
            let told = async {
                for plan in &taps {
                    for (number, fd) in tap::open(plan, None).await? {
                        let name = fd_name(number);
                        given.push(name.clone());
                        let fd = vec![ClosedAside::of(fd.into())];
                        let getfd = body.monitor()?;
                        getfd.execute_with("getfd", json!({ "fdname": name }), fd, COMMAND_TIMEOUT).await?;
                    }
                }
                self.tell(body, steps, &shared, done).await
            };
            let told: Result<(), DriverError> = told.await;
            if told.is_err()
                && let Ok(monitor) = body.monitor()
            {
                // Those that QEMU has not taken up.
                for name in given {
                    monitor.tell("closefd", json!({ "fdname": name })).await;
                }
            }
            told?;
        }
        Ok(())
    }

    async fn tell(
        &self,
        body: &Arc<Body>,
        steps: Vec<Step>,
        shared: &BTreeSet<String>,
        done: &mut Vec<(&'static str, Value)>,
    ) -> Result<(), DriverError> {
        for Step { command, mut arguments, undo, secret } in steps {
            let group = command == "object-add" && arguments["qom-type"] == "throttle-group";
            if group && arguments["id"].as_str().is_some_and(|id| shared.contains(id)) {
                continue;
            }
            if let Some(content) = secret {
                let folder = self.0.secrets_dir.clone();
                let as_it_is = arguments["format"] == "base64";
                let data = blocking(move || say_secret(&content, &folder, as_it_is)).await??;
                let said = arguments.as_object_mut();
                said.into_iter().for_each(|said| _ = said.remove("file"));
                (arguments["data"], arguments["format"]) = (Value::from(data), Value::from("base64"));
            }
            let told = match command {
                // It opens what may lie on slow storage.
                "blockdev-add" => body.patiently(command, arguments).await,
                _ => ask(body, command, arguments).await,
            };
            // QEMU may do it when it answers again.
            if matches!(told, Ok(_) | Err(DriverError::TimedOut(_))) {
                done.extend(undo);
            }
            told?;
        }
        Ok(())
    }

    /// Makes files accessible to a running guest in addition to what it has.
    pub(super) async fn lend_to(&self, body: &Body, def: &DomainDef, files: Vec<HostFile>) -> Result<(), DriverError> {
        let process = body.keeper.process_id();
        let lender = self.lender(def, process).await?;
        let guest = def.uuid;
        let what = files.first().map(|file| file.path.display().to_string()).unwrap_or_default();
        let lend = move |_: &_| {
            for file in files.iter().filter(|file| file.create) {
                let made = make::output(&file.path, lender.user());
                made.map_err(|e| DriverError::Storage(format!("{}: {e}", file.path.display())))?;
            }
            needs::are_as_expected(&files)?;
            let wants = files.iter().map(launch::want).collect::<Vec<_>>();
            let files = lender.lend_more(guest, &wants)?;
            let shown = process.map_or(Ok(()), |process| wall::show(process, &files));
            shown.map_err(|e| DriverError::Storage(format!("the guest cannot be shown a file: {e}")))
        };
        self.0.workers.run(Errand::new(guest, what), lend).await
    }

    /// Gives back files that nothing else in `rest` needs. A file system that does not answer keeps them lent until the end.
    pub(super) async fn give_back(&self, body: &Body, rest: &DomainDef, files: Vec<PathBuf>) {
        let Some(ledger) = self.0.privileges.ledger().cloned() else { return };
        let caps = self.learnt_for(rest).await;
        let own = body.leavings.own_dir();
        let Ok(needed) =
            check::checked_command(&given::as_shown(rest), &caps, &command::Place::now(&own, MONITOR_FD, true))
        else {
            return;
        };
        let beside = needed.companions.iter().flat_map(|companion| &companion.files);
        let needed: BTreeSet<PathBuf> = needed.files.iter().chain(beside).map(|file| file.path.clone()).collect();
        let free: Vec<PathBuf> = files.into_iter().filter(|path| !needed.contains(path)).collect();
        let Some(first) = free.first() else { return };
        let (errand, guest) = (Errand::new(rest.uuid, first.display().to_string()), rest.uuid);
        let given = self.0.workers.run(errand, move |_| {
            ledger.give_back_these(guest, &free, &needed);
            Ok(())
        });
        if let Err(error) = given.await {
            tracing::warn!(uuid = %guest, %error, "what a device had is given back when the guest ends");
        }
    }

    /// Has the guest let go of a device, and takes away what it stood on.
    pub(super) async fn unplug(
        &self,
        body: &Arc<Body>,
        def: &DomainDef,
        alias: &str,
        patience: Duration,
    ) -> Result<(), DriverError> {
        let all = def.devices.all();
        let device = all.into_iter().find(|device| device.info().0.alias() == Some(alias));
        if let Some(why) = device.as_ref().and_then(keeps_its_place) {
            return Err(DriverError::Unsupported(format!("'{alias}' stays as long as the machine runs: {why}")));
        }
        serves_nobody(def, alias)?;
        let awaited = body.reporter.awaits(alias);
        let mut answered = false;
        let goes = async {
            let asked = body.patiently("device_del", json!({ "id": alias })).await;
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
        let settled = timeout(patience, goes).await.unwrap_or(Ok(None))?;
        match awaited.taken().or(settled) {
            Some(true) => {}
            Some(false) => return Err(DriverError::Refused(format!("the guest refuses to let go of '{alias}'"))),
            None if body.monitor().is_err() => return Err(DriverError::Gone),
            None => {
                let seconds = patience.as_secs_f64();
                let what = match answered {
                    true => format!("the guest did not let go of '{alias}' within {seconds} s, and has it still"),
                    false => format!("QEMU did not answer within {seconds} s, and '{alias}' is in the guest still"),
                };
                return Err(DriverError::TimedOut(format!(
                    "{what}; it may let go later, which is told by DeviceRemoved"
                )));
            }
        }
        self.take_away(body, def, alias).await;
        Ok(())
    }

    /// Whether the guest has let go of a device; what it stood on is taken away then.
    pub(super) async fn has_gone(&self, body: &Arc<Body>, def: &DomainDef, alias: &str) -> Result<bool, DriverError> {
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
        if let Some(disk) = def.devices.disks.iter().find(|disk| disk.info.alias() == Some(alias)) {
            let prefix = format!("{}-", disk.target.dev);
            let close = async {
                let nodes = Nodes::of(body).await.unwrap_or_default();
                let nodes = nodes.0.into_iter().map(|node| node.name).filter(|name| name.starts_with(&prefix));
                media::close(body, nodes.collect()).await;
                given::take_back(body, &disk.target.dev, None).await;
            };
            if timeout(COMMAND_TIMEOUT, close).await.is_err() {
                tracing::warn!(uuid = %body.uuid, "QEMU is slow to close the images of '{alias}'; they may stay open");
            }
        }
        let undo = part.steps.iter().rev().filter_map(|step| step.undo.clone());
        for (command, arguments) in undo.filter(|(command, _)| !matches!(*command, "device_del" | "blockdev-del")) {
            let Err(error) = ask(body, command, arguments).await else { continue };
            tracing::debug!(uuid = %body.uuid, alias, %error, "something that a device stood on stays");
            if matches!(error, DriverError::TimedOut(_)) {
                break;
            }
        }
        let (console, name, dir) = (body.clone(), alias.to_owned(), own.clone());
        if let Err(error) = blocking(move || console.consoles.forget(&name, &dir)).await {
            tracing::warn!(uuid = %body.uuid, %error, "what '{alias}' said stays until the guest ends");
        }
        if let Ok(rest) =
            def.without_devices(|_, element| virt_model::domain::one_device::alias_of(element) == Some(alias))
        {
            body.has_agent_of(&rest);
            self.give_back(body, &rest, part.files.into_iter().map(|file| file.path).collect()).await;
        }
    }
}

/// Takes back what was done. Of a QEMU that is deaf no answer is waited for: it does what it was told when it hears again.
pub(super) async fn take_back(body: &Body, done: Vec<(&'static str, Value)>, why: &DriverError) {
    let mut deaf = matches!(why, DriverError::TimedOut(_));
    for (command, arguments) in done.into_iter().rev() {
        if deaf {
            let Ok(monitor) = body.monitor() else { return };
            monitor.tell(command, arguments).await;
        } else if let Err(error) = ask(body, command, arguments).await {
            tracing::warn!(uuid = %body.uuid, "{command}: {error}");
            deaf = matches!(error, DriverError::TimedOut(_));
        }
    }
}

/// Makes of `def` what the guest has: what it had `before`, and what QEMU has still of what was to come, as a guest without
/// an operating system lets go of nothing. A QEMU that does not answer may have all of it.
pub(super) async fn leave_what_stays(body: &Body, before: &DomainDef, def: &mut DomainDef) {
    let there = match names_at(body, DEVICES).await {
        Ok(there) => there,
        Err(DriverError::Gone) => return def.clone_from(before),
        Err(_) => return,
    };
    let known: BTreeSet<&str> = before.devices.infos().into_iter().filter_map(|(info, _)| info.alias()).collect();
    let gone = |alias: &str| !known.contains(alias) && !there.contains(alias);
    match def.without_devices(|_, element| virt_model::domain::one_device::alias_of(element).is_some_and(gone)) {
        Ok(rest) => *def = rest,
        Err(_) => def.clone_from(before),
    }
}

/// Whether that is the object with limits that several disks share, so that it may be there.
fn is_shared(def: &DomainDef, object: &str) -> bool {
    let disks = def.devices.disks.iter();
    let mut groups = disks.flat_map(|disk| {
        let own = disk.iotune.as_ref().and_then(|tune| tune.group.as_deref());
        let filters = disk.throttle_filters.iter().flat_map(|filters| &filters.filters);
        own.into_iter().chain(filters.map(|filter| &*filter.group))
    });
    groups.any(|group| object.strip_prefix("throttle-") == Some(group))
}

/// Gives a command that QEMU does at once. One that is deaf keeps nobody waiting for longer than any command.
async fn ask(body: &Body, command: &str, arguments: Value) -> Result<Value, DriverError> {
    Ok(body.monitor()?.execute(command, arguments).await?)
}

/// The names that QEMU has there.
async fn names_at(body: &Body, path: &str) -> Result<BTreeSet<String>, DriverError> {
    Ok(names_in(&ask(body, "qom-list", json!({ "path": path })).await?))
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

/// What a definition has more than another.
struct New {
    alias: String,
    /// Controllers that come with it, in the order of their numbers.
    controllers: Vec<String>,
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
    fn parts(&self, def: &DomainDef, caps: &Capabilities, own: &Path) -> Result<Vec<OneDevice>, DriverError> {
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

fn controllers_beside(before: &DomainDef, def: &DomainDef, alias: &str) -> Vec<String> {
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

/// Refuses to take away a controller on which something sits.
fn serves_nobody(def: &DomainDef, alias: &str) -> Result<(), DriverError> {
    use virt_model::device::AddressKind;
    let Some(controller) = def.devices.controllers.iter().find(|one| one.info.alias() == Some(alias)) else {
        return Ok(());
    };
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

/// QEMU's refusals of what no machine of that kind can do.
fn refused(alias: &str, error: DriverError) -> DriverError {
    match error {
        DriverError::Hypervisor(why) if why.contains("does not support hot") || why.contains("not hotpluggable") => {
            DriverError::Unsupported(format!("'{alias}': {why}"))
        }
        other => other,
    }
}

/// A secret in base64. `as_it_is`: it is said so already.
fn say_secret(content: &SecretContent, folder: &Path, as_it_is: bool) -> Result<String, DriverError> {
    let bytes = match content {
        SecretContent::Kept(name) => secret::read(folder, name)?,
        SecretContent::Said(text) => text.clone().into_bytes(),
    };
    match as_it_is {
        true => String::from_utf8(bytes).map_err(|_| DriverError::Storage("a secret is not in base64".to_owned())),
        false => Ok(base64::encode(&bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_limits_that_several_disks_share_may_be_there_already() {
        let disk = |target: &str, group: &str| {
            format!(
                "<disk type='file'><source file='/{target}'/><target dev='{target}' bus='virtio'/>\
                 <iotune><total_iops_sec>9</total_iops_sec>{group}</iotune></disk>"
            )
        };
        let disks = disk("vda", "<group_name>slow</group_name>") + &disk("vdb", "");
        let text = format!("<domain type='qemu'><name>d</name><memory>1</memory><devices>{disks}</devices></domain>");
        let def = DomainDef::parse(&text).unwrap();
        let shared = ["throttle-slow", "throttle-vdb", "slow", "vda-key"].map(|object| is_shared(&def, object));
        assert_eq!(shared, [true, false, false, false]);
    }
}
