//! Completing a machine, held to its promises over machines put together at random: nothing that was given moves, no two
//! devices have one place, completing again changes nothing, and what is complete has a command line.

mod qemu;

use proptest::prelude::*;
use qemu::{DIR, caps, message, place};
use std::collections::HashSet;
use virt_drivers::qemu::check::{check, checked_command};
use virt_drivers::qemu::complete::complete;
use virt_model::device::AddressKind;
use virt_model::domain::{DomainDef, Form};
use virt_model::xml::FindingKind;

const STORED: Form = Form::STORED;

/// Devices that any PC can have; `{n}` is a letter of its own.
const DEVICES: &[&str] = &[
    "<disk type='file'><source file='/d{n}'/><target dev='vd{n}' bus='virtio'/>{pci}</disk>",
    "<disk type='file'><source file='/d{n}'/><target dev='sd{n}' bus='scsi'/></disk>",
    "<disk type='file'><source file='/d{n}'/><target dev='sd{n}' bus='sata'/></disk>",
    "<disk type='file'><source file='/d{n}'/><target dev='sd{n}' bus='usb'/></disk>",
    "<disk type='file' device='cdrom'><target dev='sd{n}' bus='sata'/></disk>",
    "<interface type='user'><model type='virtio'/>{pci}</interface>",
    "<interface type='user'><model type='e1000'/>{pci}</interface>",
    "<interface type='user'><model type='rtl8139'/></interface>",
    "<controller type='usb' model='nec-xhci'/>",
    "<controller type='scsi' model='virtio-scsi'/>",
    "<controller type='virtio-serial'/>",
    "<channel type='unix'><target type='virtio' name='{n}'/></channel>",
    "<channel type='unix'><target type='virtio' name='{n}'/><address type='virtio-serial' controller='1' port='2'/></channel>",
    "<serial type='pty'/>",
    "<console type='pty'><target type='virtio'/></console>",
    "<input type='tablet' bus='usb'/>",
    "<input type='keyboard' bus='virtio'/>",
    "<input type='mouse' bus='usb'><address type='usb' bus='0' port='2'/></input>",
    "<sound model='ich9'/>",
    "<sound model='ac97'>{pci}</sound>",
    "<video><model type='qxl'/></video>",
    "<video><model type='virtio'/>{pci}</video>",
    "<graphics type='vnc'/>",
    "<graphics type='spice'/>",
    "<redirdev bus='usb' type='tcp'><source mode='connect' host='127.0.0.1' service='4000'/></redirdev>",
    "<rng model='virtio'><backend model='builtin'/>{pci}</rng>",
    "<watchdog model='i6300esb'/>",
];

const Q35_DEVICES: &[&str] = &[
    "<controller type='pci' model='pcie-root-port'/>",
    "<controller type='pci' model='pcie-to-pci-bridge'/>",
    "<controller type='usb' index='7' model='ich9-ehci1'/><controller type='usb' index='7' model='ich9-uhci1'><master startport='0'/></controller>",
];

prop_compose! {
    /// A machine, now and then with a PCI address given.
    fn machine()(q35 in any::<bool>(), picks in prop::collection::vec((any::<prop::sample::Index>(), prop::option::weighted(0.2, (0u8..4, 0u8..32))), 0..40)) -> String {
        let kinds: Vec<&str> = DEVICES.iter().chain(Q35_DEVICES.iter().filter(|_| q35)).copied().collect();
        let devices = picks.iter().enumerate().map(|(n, (index, given))| {
            let letters = format!("{}{}", char::from(b'a' + (n / 26) as u8), char::from(b'a' + (n % 26) as u8));
            let pci = given.map_or(String::new(), |(bus, slot)| format!("<address type='pci' bus='{bus}' slot='{slot}'/>"));
            index.get(&kinds).replace("{n}", &letters).replace("{pci}", &pci)
        });
        let (board, devices) = (if q35 { "q35" } else { "pc" }, devices.collect::<String>());
        format!("<domain type='qemu'><name>m</name><memory unit='MiB'>64</memory><os><type arch='x86_64' machine='{board}'>hvm</type></os>\
                 <features><acpi/></features><devices>{devices}</devices></domain>")
    }
}

/// Every given PCI address, by the place of its device in the document.
fn given(def: &DomainDef) -> HashSet<(String, (u16, u8, u8, u8))> {
    let infos = def.devices.infos();
    infos.iter().filter_map(|(info, at)| Some((at.path.to_string(), info.pci()?.place()))).collect()
}

fn assert_places_are_unique(def: &DomainDef) {
    let mut seen = HashSet::new();
    for (info, _) in def.devices.infos() {
        let place = match info.address.as_ref().map(|a| &a.kind) {
            Some(AddressKind::Pci(Some(pci))) => format!("pci {:?}", pci.place()),
            Some(AddressKind::Usb(usb)) => format!("usb {} {:?}", usb.bus, usb.port),
            Some(AddressKind::VirtioSerial(port)) => format!("serial {} {:?}", port.controller, port.port),
            _ => continue,
        };
        assert!(seen.insert(place.clone()), "{place} is given twice");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn machines_are_completed_once_and_for_all(xml in machine()) {
        let caps = caps();
        // What the document alone shows to be wrong, and clashes with what the board has, are refused and tested elsewhere.
        let Ok(def) = DomainDef::parse(&xml) else { return Ok(()) };
        let mut done = def.clone();
        if let Err(findings) = complete(&mut done, &caps) {
            prop_assert!(!findings.is_empty());
            return Ok(());
        }
        prop_assert!(given(&done).is_superset(&given(&def)), "what is given stays");
        assert_places_are_unique(&done);
        let mut again = done.clone();
        complete(&mut again, &caps).unwrap();
        prop_assert_eq!(again.write(STORED), done.write(STORED));
        let mut stored = DomainDef::parse(&done.write(STORED)).map_err(|f| TestCaseError::fail(message(&f)))?;
        complete(&mut stored, &caps).unwrap();
        prop_assert_eq!(stored.write(STORED), done.write(STORED));
        let refused = check(&done, &caps).iter().any(|finding| finding.kind != FindingKind::Warning);
        prop_assert_eq!(checked_command(&done, &caps, &place(DIR)).is_err(), refused);
    }
}
