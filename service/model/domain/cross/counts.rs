//! Of which a machine, or a device, has one.

use super::{Log, never_if};
use crate::device::chardev::{CharKind, CharSource, SerialKind, SocketMode};
use crate::device::disk::DiskBus;
use crate::device::display::{GraphicsKind, VideoKind};
use crate::domain::DomainDef;
use crate::domain::listening::fixed_ports;
use crate::domain::value::complain;
use crate::xml::{Finding, Place};
use std::collections::BTreeSet;

/// Serial ports that a PC has addresses for.
const ISA_PORTS: usize = 4;

pub(super) fn check(def: &DomainDef, log: &mut Log) {
    screens(def, log);
    listeners(def, log);
    let devices = &def.devices;
    devices.serials.iter().for_each(|d| one_source("serial", &d.source, log));
    devices.parallels.iter().for_each(|d| one_source("parallel", &d.source, log));
    devices.consoles.iter().for_each(|d| one_source("console", &d.source, log));
    devices.channels.iter().for_each(|d| one_source("channel", &d.source, log));
    devices.redirdevs.iter().for_each(|d| one_source("redirdev", &d.source, log));
    serial_ports(def, log);
    disk_names(def, log);
    let mut panics = BTreeSet::new();
    for panic in &devices.panics {
        let again = !panics.insert(panic.model.unwrap_or_default());
        never_if(again, &panic.at, "a machine has one panic device of each model: leave one out", log);
    }
    let mut watchdogs = BTreeSet::new();
    for watchdog in &devices.watchdogs {
        let again = !watchdogs.insert(watchdog.model);
        never_if(again, &watchdog.at, "a machine has one watchdog of each model: leave one out", log);
    }
}

fn screens(def: &DomainDef, log: &mut Log) {
    let videos = &def.devices.videos;
    for second in videos.iter().filter(|video| video.model.primary == Some(true)).skip(1) {
        let place = second.model.at.attribute("primary");
        complain(log, &place, "one card is the first that firmware shows: leave out primary='yes' here");
    }
    for none in videos.iter().filter(|video| video.model.kind == VideoKind::None && videos.len() > 1) {
        complain(log, &none.model.at, "type='none' says that there is no card: leave it out, or the others");
    }
    let draws = |kind: GraphicsKind, on: Option<bool>| kind == GraphicsKind::EglHeadless || on == Some(true);
    let screens = def.devices.graphics.iter();
    let drawn = screens.filter(|g| draws(g.kind, g.gl.as_ref().and_then(|gl| gl.enable)));
    for second in drawn.skip(1) {
        complain(
            log,
            &second.at,
            "one screen of a guest draws with OpenGL: turn it off for the others (<gl enable='no'/>)",
        );
    }
}

/// No two of a machine listen at one place. A definition whose displays would is refused; one whose other devices would
/// can be stored, and not started.
fn listeners(def: &DomainDef, log: &mut Log) {
    let all = fixed_ports(def);
    for (n, second) in all.iter().enumerate() {
        let Some(first) = all[..n].iter().find(|first| first.collides(second)) else { continue };
        let (port, whose) = (second.port, &first.whose);
        if first.of_display && second.of_display {
            complain(log, &second.place, format!("port {port} is used twice: give another, or -1 to have one chosen"));
        } else {
            let message = format!("TCP port {port} is what {whose} of this machine listens on: name another");
            log.push(Finding::unsupported(&second.place, message));
        }
    }
}

fn one_source(element: &str, source: &CharSource, log: &mut Log) {
    if source.kind != CharKind::Udp {
        if let Some(second) = source.sources.get(1) {
            complain(log, &second.at, format!("a <{element} type='{}'> has one <source>: leave this out", source.kind));
        }
        return;
    }
    let mut modes = BTreeSet::new();
    for end in &source.sources {
        let again = !modes.insert(end.mode.unwrap_or(SocketMode::Connect) == SocketMode::Bind);
        let message = "type='udp' has one <source mode='connect'> and one mode='bind': leave this out";
        never_if(again, &end.at, message, log);
    }
}

fn serial_ports(def: &DomainDef, log: &mut Log) {
    let mut seen = BTreeSet::new();
    let kind =
        |s: &&crate::device::Serial| s.target.as_ref().and_then(|t| t.kind).unwrap_or_default() == SerialKind::Isa;
    for (n, serial) in def.devices.serials.iter().filter(kind).enumerate() {
        let many =
            "a PC has four serial ports of type='isa-serial': use type='pci-serial', or a console of type='virtio'";
        never_if(n >= ISA_PORTS, &serial.at, many, log);
        let Some(target) = &serial.target else { continue };
        let again = target.port.is_some_and(|port| !seen.insert(port));
        never_if(again, &target.at.attribute("port"), "two serial ports have this number: give another", log);
    }
}

fn disk_names(def: &DomainDef, log: &mut Log) {
    for disk in &def.devices.disks {
        let name = &disk.target.dev;
        let bare = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let known = ["vd", "sd", "hd", "fd"].iter().any(|prefix| bare.len() > 2 && bare.starts_with(prefix));
        let elsewhere = matches!(disk.target.bus, Some(DiskBus::Xen | DiskBus::Uml | DiskBus::Nvme));
        if known && !elsewhere && bare.len() < name.len() {
            partition(&disk.target.at.attribute("dev"), name, bare, log);
        }
    }
}

fn partition(at: &Place, name: &str, bare: &str, log: &mut Log) {
    let (name, bare) = (crate::xml::shorten(name), crate::xml::shorten(bare));
    complain(log, at, format!("'{name}' is the name of a partition, and the guest gets a disk: call it '{bare}'"));
}
