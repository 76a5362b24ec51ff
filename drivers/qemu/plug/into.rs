//! A device is plugged in: QEMU is told what it stands on, and then of the device, and what was done is taken back where one of
//! that fails.

use super::place::{New, controllers_beside};
use super::{DEVICES, OBJECTS, host, names_at, names_in, refused, that_can_go};
use crate::base64;
use crate::host::access::LentFile;
use crate::host::tap::name_of;
use crate::host::workers::ClosedAside;
use crate::qemu::command::{self, OneDevice, Step, fd_name};
use crate::qemu::given::{self, GivenImage};
use crate::qemu::instance::Body;
use crate::qemu::monitor::DEAF;
use crate::qemu::plan::{Companion, HostFile, SecretContent, Tap};
use crate::qemu::qmp::{COMMAND_TIMEOUT, in_time};
use crate::qemu::taking::Taking;
use crate::qemu::{QemuDriver, declared, live, tap};
use crate::secret::Vault;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::domain::DomainDef;
use virt_model::driver::{Attachment, DriverError};

/// What a device that is plugged in is given beforehand.
struct Provided {
    /// Of the host's devices.
    taking: Taking,
    /// All files.
    lent: Vec<LentFile>,
    /// Those that are no devices of the host's.
    files: Vec<PathBuf>,
}

impl QemuDriver {
    /// Plugs in a device, with the controllers that it brings. `sysfs`: where the kernel shows the host's devices.
    pub(in crate::qemu) async fn plug(
        &self,
        body: &Arc<Body>,
        def: &mut DomainDef,
        Attachment { before, alias, image }: Attachment<'_>,
        sysfs: &Path,
    ) -> Result<(), DriverError> {
        let (caps, held) = tokio::join!(self.learnt_for(def), declared::hold(&self.0.workers, def));
        held?;
        let new = New { alias: alias.to_owned(), controllers: controllers_beside(before, def, alias) };
        let started = host::found(def, alias, sysfs).await?;
        let parts = new.parts(&started, &caps, &body.leavings.own_dir())?;
        let beside: Vec<Companion> = parts.iter().flat_map(|part| part.companions.clone()).collect();
        let taps: Vec<Tap> = parts.iter().flat_map(|part| part.taps.clone()).collect();
        let provided = self.provide(body, before, (&started, alias), &parts, sysfs).await?;
        let mut done = Vec::new();
        let disk = def.disk_named(alias);
        let given = disk.and_then(GivenImage::of);
        // The guest may open an agent's port before QEMU has answered.
        body.has_agent_of(def);
        let plugged = async {
            if let Some((disk, image)) = disk.zip(image) {
                given::hand_over(body, disk, image).await?;
            }
            self.do_steps(body, def, (parts, &provided), &mut done).await
        };
        let link = match plugged.await {
            Ok(link) => link,
            Err(error) => {
                body.has_agent_of(before);
                take_back(body, done, &error).await;
                given::take_back_this(body, given).await;
                // A QEMU that does not answer may have the device, and stays with what that needs until it answers.
                if matches!(error, DriverError::TimedOut(_)) {
                    tells_what_did_not_come(body, before, def);
                } else {
                    self.end_beside(body, &beside).await;
                    leave_what_stays(body, before, def).await;
                    body.removes_filters(alias, &taps).await;
                    if grows(def, &started)
                        && let Err(error) = self.has_more_memory(body, def).await
                    {
                        tracing::warn!(uuid = %body.uuid, %error, "it may have the memory of a device that it did not get");
                    }
                    self.keeps_less_in_place(body, &started, def).await;
                }
                match def.device_named(alias) {
                    Some(_) => self.give_back(body, def, provided.files).await,
                    None => self.is_not_had(body, def, alias, provided.files).await,
                }
                return Err(refused(alias, error));
            }
        };
        let card = def.devices.interfaces.iter_mut().find(|card| card.info.alias() == Some(alias));
        if let (Some(card), Some(link)) = (card, link) {
            card.target.get_or_insert_default().dev = Some(link);
        }
        if live::has_terminals(def) {
            let devices = body.ask("query-chardev", json!({})).await.unwrap_or_default();
            live::set_terminals(def, &devices);
        }
        Ok(())
    }

    /// Takes from the host what a device of `started` needs, lends its files, and lets the guest's processes have what its machine
    /// has more. On failure nothing of that is so.
    async fn provide(
        &self,
        body: &Body,
        before: &DomainDef,
        (started, alias): (&DomainDef, &str),
        parts: &[OneDevice],
        sysfs: &Path,
    ) -> Result<Provided, DriverError> {
        let taps = parts.iter().flat_map(|part| part.taps.clone()).collect();
        let taking = self.takes(body, (started, alias), taps, sysfs).await?;
        let of_host = taking.files();
        let mut files: Vec<HostFile> = parts.iter().flat_map(|part| part.files.clone()).collect();
        files.retain(|file| !of_host.contains(file));
        let paths: Vec<PathBuf> = files.iter().map(|file| file.path.clone()).collect();
        let made = async {
            let lent = self.lend_to(body, started, [of_host, files].concat()).await?;
            if grows(before, started) {
                self.has_more_memory(body, started).await?;
            }
            Ok(lent)
        };
        match made.await {
            Ok(lent) => Ok(Provided { taking, lent, files: paths }),
            Err(error) => {
                self.is_not_had(body, before, alias, paths).await;
                Err(error)
            }
        }
    }

    /// Does what QEMU is told; what takes it back again is in `done`, on failure too. Gives the name of the network device that was
    /// made for it.
    async fn do_steps(
        &self,
        body: &Arc<Body>,
        def: &DomainDef,
        (parts, provided): (Vec<OneDevice>, &Provided),
        done: &mut Vec<(&'static str, Value)>,
    ) -> Result<Option<String>, DriverError> {
        let (mut link, mut cards) = (None, 0..);
        let mut shared = match parts.iter().flat_map(|part| &part.steps).any(Step::is_of_limits) {
            true => names_at(body, OBJECTS).await?,
            false => BTreeSet::new(),
        };
        shared.retain(|object| is_shared(def, object));
        for OneDevice { steps, taps, companions, scratch, .. } in parts {
            let mut given = Vec::new();
            let told = async {
                let mut gifts = Vec::new();
                for companion in &companions {
                    gifts.extend(self.start_beside(body, def, companion, &provided.lent).await?);
                }
                tap::note_filters(&body.keeper, &taps).await?;
                for plan in &taps {
                    let made = cards.next().and_then(|card| provided.taking.links.get(&card));
                    let opened = tap::open(plan, made, self.0.own_network.as_ref()).await?;
                    link = link.take().or_else(|| opened.iter().find_map(|(_, fd)| name_of(fd)));
                    gifts.extend(opened);
                }
                for (number, fd) in gifts {
                    let name = fd_name(number);
                    given.push(name.clone());
                    let fd = vec![ClosedAside::of(fd.into())];
                    let getfd = body.monitor()?;
                    getfd.execute_with("getfd", json!({ "fdname": name }), fd, COMMAND_TIMEOUT).await?;
                }
                for (set, target) in scratch {
                    self.give_scratch(body, def, (set, &target), done).await?;
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
        Ok(link)
    }

    /// Tells QEMU what the device stands on at once, and when all of that is there of the device itself, and of what follows.
    async fn tell(
        &self,
        body: &Arc<Body>,
        steps: Vec<Step>,
        shared: &BTreeSet<String>,
        done: &mut Vec<(&'static str, Value)>,
    ) -> Result<(), DriverError> {
        let (mut below, mut rest) = (Vec::new(), Vec::new());
        for step in steps {
            if step.is_of_limits() && step.arguments["id"].as_str().is_some_and(|id| shared.contains(id)) {
                continue;
            }
            let Step { command, mut arguments, undo, secret } = step;
            if let Some(content) = secret {
                let data = say_secret(&content, &self.0.secrets, arguments["format"] == "base64").await?;
                let said = arguments.as_object_mut();
                said.into_iter().for_each(|said| _ = said.remove("file"));
                (arguments["data"], arguments["format"]) = (Value::from(data), Value::from("base64"));
            }
            let is_below = rest.is_empty() && BELOW.contains(&command);
            if is_below { &mut below } else { &mut rest }.push(Step { command, arguments, undo, secret: None });
        }
        tell_at_once(body, below, done).await?;
        for one in rest {
            tell_at_once(body, vec![one], done).await?;
        }
        Ok(())
    }
}

/// What may be there without a device: where one of it is refused, no device has it.
const BELOW: [&str; 4] = ["object-add", "blockdev-add", "chardev-add", "netdev_add"];

/// Tells QEMU all of that, whose secrets are in it, and waits for its answers.
async fn tell_at_once(
    body: &Arc<Body>,
    all: Vec<Step>,
    done: &mut Vec<(&'static str, Value)>,
) -> Result<(), DriverError> {
    let monitor = body.monitor()?;
    let (mut told, mut failed) = (Vec::new(), None);
    for Step { command, arguments, undo, .. } in all {
        match in_time(command, COMMAND_TIMEOUT, monitor.send(command, arguments, Vec::new())).await {
            Ok(sent) => told.push((command, undo, sent)),
            Err(error) => {
                // It may be on its way.
                done.extend(undo);
                failed = Some(DriverError::from(error));
                break;
            }
        }
    }
    for (command, undo, sent) in told {
        // It opens what may lie on slow storage.
        let within = if command == "blockdev-add" { DEAF } else { COMMAND_TIMEOUT };
        let answered = match &failed {
            // What QEMU did not answer in time it may do when it answers again, and what it was told afterwards.
            Some(DriverError::TimedOut(why)) => Err(DriverError::TimedOut(why.clone())),
            _ => in_time(command, within, sent.answer()).await.map_err(DriverError::from),
        };
        if matches!(answered, Ok(_) | Err(DriverError::TimedOut(_))) {
            done.extend(undo);
        }
        failed = failed.or(answered.err());
    }
    failed.map_or(Ok(()), Err)
}

/// Takes back what was done. Of a QEMU that is deaf no answer is waited for: it does what it was told when it hears again.
pub async fn take_back(body: &Body, done: Vec<(&'static str, Value)>, why: &DriverError) {
    let mut deaf = matches!(why, DriverError::TimedOut(_));
    for (command, arguments) in done.into_iter().rev() {
        if deaf {
            let Ok(monitor) = body.monitor() else { return };
            monitor.tell(command, arguments).await;
        } else if let Err(error) = body.ask(command, arguments).await {
            tracing::warn!(uuid = %body.uuid, "{command}: {error}");
            deaf = matches!(error, DriverError::TimedOut(_));
        }
    }
}

/// Makes of `def` what the guest has: what it had `before`, and what QEMU has still of what was to come, as a guest without
/// an operating system lets go of nothing. A QEMU that does not answer may have all of it.
pub async fn leave_what_stays(body: &Body, before: &DomainDef, def: &mut DomainDef) {
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

/// Has it reported when QEMU answers again what of `def` it has not got, which it had not `before`.
fn tells_what_did_not_come(body: &Body, before: &DomainDef, def: &DomainDef) {
    let Ok(line) = body.line() else { return };
    let (known, reporter) = (that_can_go(before), body.reporter.clone());
    let new: Vec<String> = that_can_go(def).into_iter().filter(|alias| !known.contains(alias)).collect();
    tokio::spawn(async move {
        // What it was told before it does before it answers this.
        let told = loop {
            match line.patiently("qom-list", json!({ "path": DEVICES })).await {
                Err(DriverError::TimedOut(_)) => {}
                told => break told,
            }
        };
        if let Ok(told) = told {
            let there = names_in(&told);
            reporter.have_gone(new.into_iter().filter(|alias| !there.contains(alias)).collect());
        }
    });
}

/// Whether a guest's processes need more of the host's memory, or must keep more of it in place, for one machine than for another.
fn grows(from: &DomainDef, to: &DomainDef) -> bool {
    to.memory_kib() > from.memory_kib() || command::lock_limit(to) > command::lock_limit(from)
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

/// A secret in base64. `as_it_is`: it is said so already.
async fn say_secret(content: &SecretContent, vault: &Arc<Vault>, as_it_is: bool) -> Result<String, DriverError> {
    let value = match content {
        SecretContent::Kept(name) => vault.named(name).await?,
        SecretContent::Said(text) => text.clone().into_bytes().into(),
    };
    match as_it_is {
        true => String::from_utf8(value.bytes().to_vec())
            .map_err(|_| DriverError::Storage("a secret is not in base64".to_owned())),
        false => Ok(base64::encode(value.bytes())),
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
