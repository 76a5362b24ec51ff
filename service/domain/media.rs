//! What lies in a drive: changed while the guest runs, in what is stored, or both.

use super::adjust::LiveChange;
use super::{Affect, Domain, absolute, given};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::images;
use crate::lock::lock;
use crate::verb::{self, Verb};
use std::sync::Arc;
use virt_model::device::Disk;
use virt_model::device::disk::{DiskDevice, DiskKind};
use virt_model::domain::one_device::first_not_in;
use virt_model::domain::part::Part as _;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::{Adjustment, DeviceEvent, GivenFile, MediumChange, MediumExchange};
use virt_model::xml::{Element, Finding, shorten};

impl Domain {
    /// Puts a file, by its absolute path, into the drive `target`; an empty path takes the medium out. What is below `/dev` is a
    /// drive or disk of the host's.
    /// Errors: `OperationInvalid` or, if the caller has said how long, `TimedOut`, where the guest keeps its tray locked.
    pub async fn change_file(
        self: &Arc<Self>,
        caller: &Caller,
        target: &str,
        file: &str,
        affect: Affect,
        how: MediumExchange,
        image: Option<GivenFile>,
    ) -> Result<()> {
        let (affect, image) = given::one(affect, image.into_iter().collect())?;
        if image.is_some() && file.is_empty() {
            let text = "a descriptor is of an image: give the path that is shown for it";
            return Err(Error::InvalidArgument(text.to_owned()));
        }
        self.short(caller, &verb::CHANGE_MEDIUM, async {
            let (live, stored) = self.affected(&verb::CHANGE_MEDIUM, affect)?;
            let def = live.or(stored).ok_or_else(|| self.vanished())?;
            let disk = def.devices.disks.iter().find(|disk| disk.target.dev == target);
            let disk = disk.ok_or_else(|| {
                Error::NoSuchDevice(format!("domain '{}' has no disk '{}'", self.name(), shorten(target)))
            })?;
            let kind = if file.starts_with("/dev/") { DiskKind::Block } else { DiskKind::File };
            let mut device = Element::new("disk").with_attr("type", kind.as_str());
            device.set_attr("device", disk.device().as_str());
            if !file.is_empty() {
                absolute(file)?;
                let attribute = if kind == DiskKind::Block { "dev" } else { "file" };
                device.push(Element::new("source").with_attr(attribute, file));
            }
            device.push(Element::new("target").with_attr("dev", target));
            self.put_medium(&verb::CHANGE_MEDIUM, &device, affect, how, image).await
        })
        .await
    }

    /// Puts what an element says into the drive that it means, and tells that.
    pub(super) async fn put_medium(
        self: &Arc<Self>,
        verb: &'static Verb,
        device: &Element,
        affect: Affect,
        how: MediumExchange,
        image: Option<Arc<GivenFile>>,
    ) -> Result<()> {
        let (live, stored) = self.to_be_adjusted(verb, affect).await?;
        let before = live.clone();
        let name = self.name();
        given::names_none(&name, device)?;
        let mut live = live.map(|def| with_medium(&name, &def, device, true)).transpose()?;
        if let Some((def, target)) = &mut live {
            let drive = def.devices.disks.iter_mut().find(|disk| disk.target.dev == *target);
            self.take_images(drive.ok_or_else(|| self.vanished())?, image.as_ref()).await?;
        }
        // Said before it is asked, as of what is plugged in.
        let _coming = live.as_ref().map(|(def, _)| self.awaits(def));
        let written = live.as_ref().map(|(def, target)| images::written_of(def, |disk| disk.target.dev == *target));
        let deed = format!("cannot put that into domain '{name}'");
        let _begins = self.reserve_images(&deed, "into which it is put", written.unwrap_or_default()).await?;
        let mut stored = stored.map(|def| with_medium(&name, &def, device, false)).transpose()?;
        if let Some((stored, _)) = &mut stored {
            let completed = self.driver.learn_and_complete(stored).await;
            completed.map_err(|e| Error::from_driver(&self.name(), "update a device of", e))?;
        }
        let (live, target) = live.unzip();
        let is_empty = |def: &DomainDef| {
            def.devices.disks.iter().any(|disk| Some(&disk.target.dev) == target.as_ref() && disk.is_empty())
        };
        let reason = if live.as_ref().is_some_and(is_empty) { MediumChange::Ejected } else { MediumChange::Changed };
        let what = target.iter().map(|target| Adjustment::Medium {
            target: target.clone(),
            how: Some(how),
            image: image.clone(),
        });
        let what = what.collect();
        let live = before.zip(live).map(|(before, after)| LiveChange { before, after, what });
        self.put_changed(verb, live, stored.map(|(def, _)| Arc::new(def))).await?;
        if let (Some(target), Some(guest)) = (&target, lock(&self.state).guest.as_mut()) {
            guest.ejected.remove(target);
        }
        target.into_iter().for_each(|target| self.tell_device(DeviceEvent::MediumChanged { target, reason }));
        Ok(())
    }

    /// The guest itself has opened the tray of a drive: what lay in it, it does not have any more. That is told once, until
    /// another medium is put in.
    pub(super) fn tray_opened(&self, alias: &str) {
        let Some(live) = self.live() else { return };
        let drive = live.disk_named(alias).filter(|disk| !disk.is_empty());
        if let Some(drive) = drive {
            let target = drive.target.dev.clone();
            // It may open and close it as often as it likes.
            let news = lock(&self.state).guest.as_mut().is_some_and(|guest| guest.ejected.insert(target.clone()));
            if !news {
                return;
            }
            self.tell_device(DeviceEvent::MediumChanged { target, reason: MediumChange::GuestEjected });
        }
    }
}

/// The definition with another medium in a drive, and which drive that is. The device may be as `GetXML` shows it of what
/// `runs` or of what is stored, whichever `def` is.
fn with_medium(name: &str, def: &DomainDef, device: &Element, runs: bool) -> Result<(DomainDef, String)> {
    let target = device.child("target").and_then(|target| target.attr("dev")).unwrap_or_default().to_owned();
    let is_it = |disk: &&Disk| disk.target.dev == target;
    let before = def
        .devices
        .disks
        .iter()
        .find(is_it)
        .ok_or_else(|| Error::NoSuchDevice(format!("domain '{name}' has no disk '{}'", shorten(&target))))?;
    let refuse = |what: &str| {
        Err(Error::OperationUnsupported(format!("domain '{name}', disk '{target}': {what} while it is there")))
    };
    if !matches!(before.device(), DiskDevice::Cdrom | DiskDevice::Floppy) {
        return refuse("it is no drive whose medium can be changed");
    }
    let asked = asked(def, &target, device, runs)?;
    let mut after = before.clone();
    after.kind = asked.kind;
    after.source.clone_from(&asked.source);
    after.backing.clone_from(&asked.backing);
    if let Some(format) = asked.format().map(str::to_owned) {
        after.driver.get_or_insert_default().format = Some(format);
    } else if after.volume().is_some() {
        // It is the volume's, and not that of what lay in the drive.
        after.driver.iter_mut().for_each(|driver| driver.format = None);
    }
    if let Some(other) = first_not_in(&asked.write("disk"), &after.write("disk")) {
        return refuse(&format!("only its medium can be changed, and {other} is not what it has"));
    }
    let mut def = def.clone();
    def.devices.disks.iter_mut().filter(|disk| disk.target.dev == target).for_each(|disk| *disk = after.clone());
    Ok((def, target))
}

/// The device as the document says it, held to the format and to what else the machine has. Whether the tray stands open is
/// no part of that, nor is of a machine that is stored what only one that runs has.
fn asked(def: &DomainDef, target: &str, device: &Element, runs: bool) -> Result<Disk> {
    let mut tree = def.tree();
    let devices = tree.elements_mut().filter(|element| element.name == "devices");
    for there in devices.flat_map(Element::elements_mut).filter(|element| element.name == "disk") {
        if there.child("target").and_then(|target| target.attr("dev")) == Some(target) {
            let mut new = device.clone();
            new.elements_mut()
                .filter(|element| element.name == "target")
                .for_each(|target| _ = target.take_attr("tray"));
            // What it is called, and where it sits, stays; a document need not say it.
            for kept in ["alias", "address", "boot"] {
                if new.child(kept).is_none()
                    && let Some(element) = there.child(kept)
                {
                    new.push(element.clone());
                }
            }
            *there = new;
        }
    }
    let mut read = DomainDef::from_tree(tree).map_err(Error::ConfigInvalid)?;
    read.keep_hidden(&[def]).map_err(Error::ConfigInvalid)?;
    if !runs {
        read = read.in_form(Form::STORED);
    }
    let found = read.devices.disks.into_iter().find(|disk| disk.target.dev == target);
    found.ok_or_else(|| Error::ConfigInvalid(vec![Finding::invalid(&device.at, "the disk has no target")]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use virt_model::xml;

    fn machine(drive: &str) -> DomainDef {
        let text = format!("<domain type='qemu'><name>d</name><memory>1</memory><devices>{drive}</devices></domain>");
        let mut def = DomainDef::parse(&text).expect("a machine");
        def.fill_defaults();
        def
    }

    fn drive(more: &str, source: &str, tray: &str) -> String {
        format!(
            "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>{source}<backingStore/>\
             <target dev='sda' bus='sata'{tray}/><readonly/>{more}\
             <address type='drive' controller='0' bus='0' target='0' unit='0'/></disk>"
        )
    }

    #[test]
    fn x7_the_drive_as_it_is_shown_while_it_runs_is_the_stored_one() {
        let alias = "<alias name='sata0-0-0'/>";
        let (live, stored) = (machine(&drive(alias, "", "")), machine(&drive("", "", "")));
        let shown = drive(alias, "<source file='/new.iso' index='3'/>", " tray='open'");
        let device = xml::read(&shown, &[]).expect("a device");
        for (def, runs) in [(&live, true), (&stored, false)] {
            let (changed, target) = with_medium("d", def, &device, runs).expect("a change of the medium alone");
            assert_eq!(target, "sda");
            let disk = &changed.devices.disks[0];
            assert_eq!(disk.path(), Some("/new.iso"));
            assert_eq!(disk.info.alias(), def.devices.disks[0].info.alias());
            assert_eq!(disk.target.tray, None);
        }
    }

    #[test]
    fn x7_a_drive_that_sits_elsewhere_is_another() {
        let stored = machine(&drive("", "", ""));
        let device = xml::read(&drive("", "", "").replace("unit='0'", "unit='1'"), &[]).expect("a device");
        let error = with_medium("d", &stored, &device, false).expect_err("more than its medium would change");
        assert!(error.to_string().contains("unit='1' of <address> is not what it has"), "{error}");
    }
}
