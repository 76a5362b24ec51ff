//! Which kind of address a device can have.

use super::rows::{Row, holds};
use crate::domain::value::complain;
use crate::xml::{Element, Finding, Place, shorten};

/// A row: of those elements, under those conditions, an `<address>` is of one of those types.
pub(super) struct Seat {
    of: &'static str,
    when: &'static [&'static str],
    kinds: &'static [&'static str],
    what: &'static str,
}

const fn seat(
    of: &'static str,
    when: &'static [&'static str],
    kinds: &'static [&'static str],
    what: &'static str,
) -> Seat {
    Seat { of, when, kinds, what }
}

/// A place on PCI, or what other boards have for that.
const PCI: &[&str] = &["pci", "ccw", "virtio-mmio", "spapr-vio"];
const USB: &[&str] = &["usb"];
const NONE: &[&str] = &[];

pub(super) const ROWS: &[Seat] = &[
    seat("devices/rng|filesystem|crypto|vsock|shmem", &[], PCI, "this device"),
    seat("devices/memballoon", &["@model!=none"], PCI, "a balloon"),
    seat("devices/interface", &["model/@type?rtl8139!=usb-net|ne2k_isa"], PCI, "a network card"),
    seat("devices/interface", &["model/@type=usb-net"], USB, "a card of model 'usb-net'"),
    seat("devices/video", &["model/@type=ramfb|none"], NONE, "a screen that is no card"),
    seat("devices/video", &["model/@type!=ramfb|none"], PCI, "a video card"),
    seat("devices/iommu", &["@model=intel"], NONE, "an IOMMU of model='intel'"),
    seat("devices/iommu", &["@model=virtio"], &["pci"], "an IOMMU of model='virtio'"),
    seat("devices/sound", &["@model=usb"], USB, "a sound card of model='usb'"),
    seat("devices/sound", &["@model=pcspk"], NONE, "the beeper"),
    seat("devices/sound", &["@model=ich6|ich7|ich9|ac97|es1370|virtio"], PCI, "this sound card"),
    seat("devices/watchdog", &["@model=i6300esb"], &["pci"], "a watchdog of model='i6300esb'"),
    seat("devices/watchdog", &["@model=itco"], NONE, "a watchdog of model='itco'"),
    seat("devices/panic", &["@model?isa=isa"], &["isa"], "a panic device of model='isa'"),
    seat("devices/panic", &["@model=pvpanic"], &["pci"], "a panic device of model='pvpanic'"),
    seat("devices/panic", &["@model=hyperv"], NONE, "a panic device of model='hyperv'"),
    seat("devices/input", &["@bus=usb"], USB, "an input on bus='usb'"),
    seat("devices/input", &["@bus=ps2"], NONE, "an input on bus='ps2'"),
    seat("devices/input", &["@bus=virtio"], PCI, "an input on bus='virtio'"),
    seat("devices/hub|redirdev", &[], USB, "this device"),
    seat("devices/hostdev", &["@type=usb"], USB, "a USB device"),
    seat("devices/hostdev", &["@type=pci"], &["pci"], "a PCI device"),
    seat("devices/hostdev", &["@type=scsi"], &["drive"], "a SCSI device"),
    seat("devices/serial", &["target/@type=isa-serial|isa-debug"], &["isa"], "this serial port"),
    seat("devices/serial", &["target/@type=usb-serial"], USB, "a serial port of type='usb-serial'"),
    seat("devices/serial", &["target/@type=pci-serial"], &["pci"], "a serial port of type='pci-serial'"),
    seat("devices/parallel", &[], &["isa"], "a parallel port"),
    seat("devices/channel", &["target/@type=virtio"], &["virtio-serial"], "a channel of type='virtio'"),
    seat("devices/channel", &["target/@type=guestfwd"], NONE, "a channel of type='guestfwd'"),
    seat("devices/console", &["target/@type=virtio"], &["virtio-serial"], "a console of type='virtio'"),
    seat("devices/smartcard", &[], &["ccid"], "a smartcard"),
    seat("devices/controller", &["@type=ccid"], USB, "a smartcard reader"),
    seat("devices/controller", &["@type=usb|scsi|sata|virtio-serial|ide|pci"], PCI, "this controller"),
    seat("devices/memory", &["@model=dimm|nvdimm"], &["dimm"], "this memory"),
    seat("devices/memory", &["@model=virtio-mem|virtio-pmem"], PCI, "this memory"),
];

impl Row for Seat {
    fn of(&self) -> &'static str {
        self.of
    }

    fn look(&self, element: &Element, at: &Place, log: &mut Vec<Finding>) {
        if !self.when.iter().all(|condition| holds(element, condition)) {
            return;
        }
        for address in element.elements().filter(|child| child.name == "address") {
            // What is plugged in later has no place yet.
            let Some(kind) = address.attr("type").filter(|kind| *kind != "unassigned") else { continue };
            if !self.kinds.contains(&kind) {
                let kind = shorten(kind);
                let message = match self.kinds.first() {
                    Some(right) => format!(
                        "{} is at an address of type='{right}', not of type='{kind}': say so, or leave it out",
                        self.what
                    ),
                    None => format!("{} has no address of type='{kind}', nor any other: leave it out", self.what),
                };
                complain(log, &address.place_below(at), message);
            }
        }
    }
}
