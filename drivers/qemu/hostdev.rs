//! Devices of this host that a definition names: whether they can be had, which one is meant, and what their guest needs.
//!
//! What is here depends on the host at this moment, other than `check`, which knows only what it can.

use super::changes::{Change, Claims, HostPart};
use super::plan::{Expected, HostFile, Tap};
use crate::host::files::Program;
use crate::host::macvtap::{self, Macvtap};
use crate::host::pci::{Pci, VFIO, VFIO_NODES, vfio_of_all};
use crate::host::tool::Tool;
use crate::host::usb::{self, UsbName};
use crate::host::vf::{Function, Terms};
use crate::host::workers::blocking;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::time::timeout;
use uuid::Uuid;
use virt_model::device::disk::StartupPolicy;
use virt_model::device::hostdev::{HostAddress, HostdevKind};
use virt_model::device::{Hostdev, Interface};
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::xml::{Finding, Place};

/// How long the host may take to settle down after a device has changed its driver.
const SETTLED: Duration = Duration::from_secs(10);

/// A PCI device that a definition names.
struct Wanted {
    /// The name of the guest's device, where it has one.
    alias: String,
    address: String,
    managed: bool,
    /// What it is held to, as a virtual function of a network card.
    terms: Option<Terms>,
    place: Place,
}

/// Every PCI device that `def` names.
fn pci_devices(def: &DomainDef) -> Vec<Wanted> {
    let wanted = |device: &Hostdev| {
        let managed = device.managed == Some(true);
        let alias = device.info.alias().unwrap_or_default().to_owned();
        Some(Wanted { alias, address: device.pci()?.to_string(), managed, terms: None, place: device.at.clone() })
    };
    let card = |card: &Interface| {
        let managed = card.managed == Some(true);
        let vlan = card.vlan.as_ref().and_then(|vlan| vlan.tags.first()).map_or(0, |tag| tag.id);
        let terms = Some(Terms { mac: card.mac()?.to_string(), vlan });
        let alias = card.info.alias().unwrap_or_default().to_owned();
        Some(Wanted { alias, address: card.host_card()?.to_string(), managed, terms, place: card.at.clone() })
    };
    let cards = def.devices.interfaces.iter().filter_map(card);
    def.devices.hostdevs.iter().filter_map(wanted).chain(cards).collect()
}

/// Everything of the host's devices that keeps `def` from running now. Blocks.
pub fn findings(def: &DomainDef, sysfs: &Path) -> Vec<Finding> {
    let mut log = on_pci(def, &Pci::below(sysfs));
    // As a start would.
    if let Err(more) = find_usb(&mut def.clone(), sysfs, false) {
        log.extend(more);
    }
    log
}

fn on_pci(def: &DomainDef, pci: &Pci) -> Vec<Finding> {
    let wanted = pci_devices(def);
    let own: Vec<String> = wanted.iter().map(|device| device.address.clone()).collect();
    let refused = wanted.iter().filter_map(|device| {
        let why = pci.objection(&device.address, device.managed, &own).or_else(|| no_function(device, pci))?;
        Some(Finding::unsupported(&device.place, why))
    });
    refused.collect()
}

/// Why nobody can set its hardware address.
fn no_function(device: &Wanted, pci: &Pci) -> Option<String> {
    let missing = device.terms.is_some() && pci.function_of(&device.address).is_none();
    missing.then(|| {
        let address = &device.address;
        format!("PCI device {address} is no virtual function of a network card: hand it over as a <hostdev>, which keeps its own hardware address")
    })
}

/// Where the USB devices of a definition are now, in the definition's order. A device has another number when it is plugged
/// in again, so that nobody keeps this.
#[derive(Debug, Default)]
pub struct UsbPlaces(Vec<Option<HostAddress>>);

impl UsbPlaces {
    /// The definition that is started.
    pub fn written_into(self, def: &DomainDef) -> DomainDef {
        let mut def = def.clone();
        for (device, place) in def.devices.hostdevs.iter_mut().zip(self.0) {
            if let (Some(source), Some(place)) = (&mut device.source, place) {
                source.address = Some(place);
            }
        }
        def
    }
}

/// Finds the USB devices of `def`. One that is missing is left out of it where its policy says so; of a machine whose state
/// is `restored` it stays, and waits for the host's device. Errors: what is missing, or meant twice. Blocks.
pub fn find_usb(def: &mut DomainDef, sysfs: &Path, restored: bool) -> Result<UsbPlaces, Vec<Finding>> {
    if !def.devices.hostdevs.iter().any(|device| device.kind == HostdevKind::Usb) {
        return Ok(UsbPlaces::default());
    }
    let plugged = usb::devices(sysfs);
    let (mut log, mut places) = (Vec::new(), Vec::new());
    def.devices.hostdevs.retain(|device| {
        let Some(name) = usb_name(device) else {
            places.push(None);
            return true;
        };
        let policy = device.source.as_ref().and_then(|source| source.startup_policy).unwrap_or_default();
        let lenient = policy == StartupPolicy::Optional || restored && policy == StartupPolicy::Requisite;
        let found = usb::find(&plugged, &name).unwrap_or_else(|why| {
            log.push(Finding::unsupported(&device.at, why));
            None
        });
        if found.is_none() && log.is_empty() {
            if lenient {
                tracing::info!(uuid = %def.uuid, "the USB device {name} is not plugged in; the guest starts without it");
                if !restored {
                    return false;
                }
            } else {
                log.push(Finding::unsupported(&device.at, format!("the USB device {name} is not plugged in")));
            }
        }
        places.push(found.map(|found| HostAddress::usb(found.bus, found.device)));
        true
    });
    if log.is_empty() { Ok(UsbPlaces(places)) } else { Err(log) }
}

fn usb_name(device: &Hostdev) -> Option<UsbName> {
    let source = device.source.as_ref().filter(|_| device.kind == HostdevKind::Usb)?;
    let ids = source.vendor.as_ref().zip(source.product.as_ref());
    let name = UsbName { ids: ids.map(|(vendor, product)| (vendor.id.0, product.id.0)), place: device.usb() };
    (name != UsbName::default()).then_some(name)
}

/// Whether a machine has no device of the host's to itself, and none made for it that outlives it.
pub fn takes_nothing(def: &DomainDef, taps: &[Tap]) -> bool {
    let named = !pci_devices(def).is_empty() || def.devices.hostdevs.iter().any(|device| device.usb().is_some());
    !named && taps.iter().all(|tap| tap.plan.direct.is_none())
}

/// What each of its devices needs to have for itself alone; its USB devices have been found. Blocks.
pub fn parts(def: &DomainDef, sysfs: &Path) -> Vec<HostPart> {
    let pci = Pci::below(sysfs);
    let on_pci = pci_devices(def).into_iter().map(|device| HostPart {
        alias: device.alias,
        claims: pci.group(&device.address).map(|group| Claims::group(&group)).into_iter().collect(),
        ..HostPart::default()
    });
    let on_usb = def.devices.hostdevs.iter().filter_map(|device| {
        let (bus, number) = device.usb()?;
        Some(HostPart {
            alias: device.info.alias().unwrap_or_default().to_owned(),
            claims: vec![format!("the USB device at bus {bus}, device {number}")],
            files: vec![usb::node(bus, number)],
            ..HostPart::default()
        })
    });
    on_pci.chain(on_usb).collect()
}

/// Says in `parts` what is changed on the host for them, and which files QEMU needs for that; or why it cannot be. Blocks.
pub fn plan(def: &DomainDef, sysfs: &Path, parts: &mut [HostPart]) -> Result<(), DriverError> {
    let pci = Pci::below(sysfs);
    let log = on_pci(def, &pci);
    if !log.is_empty() {
        return Err(DriverError::Config(log));
    }
    // They begin with those on PCI, in this order.
    for (device, part) in pci_devices(def).into_iter().zip(parts) {
        if let Some((terms, (card, number))) = device.terms.zip(pci.function_of(&device.address)) {
            let function = Function { card, number };
            let before = function
                .terms()
                .map_err(|e| DriverError::Unsupported(format!("PCI device {}: {e}", device.address)))?;
            part.changes.push(Change::Held { function, terms, before });
        }
        let driver = pci.driver(&device.address);
        if device.managed && driver.as_deref() != Some(VFIO) {
            part.changes.push(Change::Detached { pci: device.address.clone(), driven: driver.is_some() });
        }
        let group = pci.group(&device.address).unwrap_or_default();
        part.files.extend([Path::new(VFIO_NODES).join(group), vfio_of_all()]);
    }
    Ok(())
}

/// The network devices on devices of the host's that `taps` ask for, each by its place among them; names that were left open
/// are chosen, and all of them claimed. Blocks.
pub fn links(taps: &[Tap], uuid: Uuid, name: &str, claims: &Claims) -> Result<BTreeMap<usize, Macvtap>, DriverError> {
    let mut links: BTreeMap<usize, Macvtap> = BTreeMap::new();
    for (n, plan) in taps.iter().map(|tap| &tap.plan).enumerate() {
        let Some(direct) = &plan.direct else { continue };
        let mut link = Macvtap {
            name: plan.name.clone().unwrap_or_default(),
            below: direct.below.clone(),
            mode: direct.mode.to_owned(),
            mac: direct.mac.clone(),
            mtu: plan.mtu,
        };
        let claim = |link: &Macvtap| claims.take(uuid, name, &[link_claim(link)]);
        if plan.name.is_some() {
            claim(&link)?;
        } else {
            let own: Vec<&String> = links.values().map(|link| &link.name).collect();
            let free = macvtap::free_name(|free| {
                free.clone_into(&mut link.name);
                !own.contains(&&link.name) && claim(&link).is_ok()
            });
            link.name = free.ok_or_else(|| DriverError::Refused("no name is free for a network device".to_owned()))?;
        }
        links.insert(n, link);
    }
    Ok(links)
}

/// Its name, which no other guest may have.
pub fn link_claim(link: &Macvtap) -> String {
    format!("the network device '{}'", link.name)
}

/// Why the guest's memory cannot be captured: what is in the host's hardware is nowhere else.
pub fn keeps_memory_here(def: &DomainDef) -> Option<String> {
    let names: Vec<String> = pci_devices(def).into_iter().map(|device| device.address).collect();
    (!names.is_empty()).then(|| format!("part of its state is in the host's PCI device {}", names.join(" and ")))
}

/// A device file that the guest has to itself.
pub fn node(path: PathBuf) -> HostFile {
    HostFile { path, write: true, create: false, device: true, expected: Expected::Anything }
}

/// Waits until the host's udev has given new device files their owners: what it does later would undo what is lent.
pub async fn settle() {
    // Only root gives a guest devices of the host.
    let found = blocking(|| Program::at(&super::capabilities::program("udevadm", true)?, true).ok());
    let Ok(Some(program)) = found.await else { return };
    let mut command = program.command();
    command.arg("settle").arg(format!("--timeout={}", SETTLED.as_secs()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // Where no udev runs there is nobody to wait for.
    if let Ok(tool) = Tool::start(command) {
        let _ = timeout(SETTLED, tool.succeeds()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pci::tests::host;

    fn machine(devices: &str) -> DomainDef {
        DomainDef::parse(&format!(
            "<domain type='kvm'><name>m</name><memory>65536</memory><os><type>hvm</type></os>\
             <devices>{devices}</devices></domain>"
        ))
        .unwrap()
    }

    fn card(managed: &str, function: u8) -> String {
        format!(
            "<hostdev type='pci' managed='{managed}'><source><address bus='6' function='{function}'/></source></hostdev>"
        )
    }

    fn stick(policy: &str) -> String {
        let ids = "<vendor id='0x0951'/><product id='0x1666'/>";
        format!("<hostdev type='usb'><source startupPolicy='{policy}'>{ids}</source></hostdev>")
    }

    fn plug(sysfs: &Path, number: u32) {
        let folder = sysfs.join(format!("bus/usb/devices/1-{number}"));
        std::fs::create_dir_all(&folder).unwrap();
        for (file, text) in
            [("busnum", "1"), ("devnum", &number.to_string()), ("idVendor", "0951"), ("idProduct", "1666")]
        {
            std::fs::write(folder.join(file), text).unwrap();
        }
    }

    fn words(findings: &[Finding]) -> String {
        findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn a_card_with_two_functions_is_taken_altogether() {
        let (dir, _) = host(&[("0000:06:00.0", "7", Some("nouveau")), ("0000:06:00.1", "7", Some("vfio-pci"))]);
        let def = machine(&(card("yes", 0) + &card("no", 1)));
        assert_eq!(findings(&def, dir.path()), []);
        let mut parts = parts(&def, dir.path());
        assert_eq!(HostPart::claims_of(&parts), ["IOMMU group 7", "IOMMU group 7"]);
        plan(&def, dir.path(), &mut parts).unwrap();
        assert_eq!(HostPart::changes_of(&parts), [Change::Detached { pci: "0000:06:00.0".into(), driven: true }]);
        for part in parts {
            assert_eq!(part.files, [Path::new("/dev/vfio/7"), Path::new("/dev/vfio/vfio")]);
        }
        let why = keeps_memory_here(&def).unwrap();
        assert_eq!(why, "part of its state is in the host's PCI device 0000:06:00.0 and 0000:06:00.1");
    }

    #[test]
    fn a_card_that_cannot_be_had_is_refused_where_it_stands() {
        let (dir, _) = host(&[("0000:06:00.0", "7", Some("nouveau"))]);
        let def = machine(&(card("no", 0) + &card("yes", 3)));
        let DriverError::Config(refused) = plan(&def, dir.path(), &mut parts(&def, dir.path())).unwrap_err() else {
            panic!()
        };
        let found = words(&refused);
        assert!(found.contains("/devices/hostdev[1]: PCI device 0000:06:00.0 is driven by 'nouveau'"), "{found}");
        assert!(found.contains("/devices/hostdev[2]: there is no PCI device 0000:06:00.3"), "{found}");
        assert_eq!(words(&findings(&def, dir.path())), found);
    }

    #[test]
    fn a_card_of_its_own_is_a_virtual_function() {
        let (dir, pci) = host(&[("0000:06:00.0", "7", Some("vfio-pci"))]);
        let def = machine(
            "<interface type='hostdev'><mac address='52:54:00:00:00:01'/><source><address type='pci' bus='6'/></source>\
             <vlan><tag id='42'/></vlan></interface>",
        );
        let found = words(&findings(&def, dir.path()));
        assert!(found.contains("/devices/interface: PCI device 0000:06:00.0 is no virtual function"), "{found}");
        let card = dir.path().join("bus/pci/devices/0000:05:00.0");
        std::fs::create_dir_all(card.join("net/ens1f0")).unwrap();
        std::fs::create_dir_all(card.join("net/aport3")).unwrap();
        std::fs::write(card.join("net/aport3/phys_port_name"), "pf0vf3\n").unwrap();
        let function = dir.path().join("bus/pci/devices/0000:06:00.0");
        std::os::unix::fs::symlink(&function, card.join("virtfn3")).unwrap();
        std::os::unix::fs::symlink(&card, function.join("physfn")).unwrap();
        assert_eq!(pci.function_of("0000:06:00.0"), Some(("ens1f0".to_owned(), 3)));
        assert_eq!(findings(&def, dir.path()), []);
        let why = plan(&def, dir.path(), &mut parts(&def, dir.path())).unwrap_err().to_string();
        assert!(why.starts_with("PCI device 0000:06:00.0: ip -json link show dev ens1f0"), "asked: {why}");
        assert!(keeps_memory_here(&def).is_some());
    }

    #[test]
    fn a_stick_is_found_where_it_is_plugged_in_and_its_place_is_nobodys_to_keep() {
        let dir = tempfile::tempdir().unwrap();
        plug(dir.path(), 4);
        let mut def = machine(&stick("mandatory"));
        let started = find_usb(&mut def, dir.path(), false).unwrap().written_into(&def);
        assert_eq!(started.devices.hostdevs[0].usb(), Some((1, 4)));
        let parts = parts(&started, dir.path());
        assert_eq!(HostPart::claims_of(&parts), ["the USB device at bus 1, device 4"]);
        assert_eq!(parts[0].files, [Path::new("/dev/bus/usb/001/004")]);
        assert_eq!(def.devices.hostdevs[0].usb(), None);
        plug(dir.path(), 5);
        let found = words(&findings(&def, dir.path()));
        assert!(found.contains("there are 2 USB devices 0951:1666: say which one"), "{found}");
    }

    #[test]
    fn a_missing_stick_is_what_its_policy_says() {
        let dir = tempfile::tempdir().unwrap();
        let left = |policy: &str, restored| {
            let mut def = machine(&(stick(policy) + &card("no", 0)));
            find_usb(&mut def, dir.path(), restored).map(|_| def.devices.hostdevs.len()).map_err(|why| words(&why))
        };
        assert_eq!(left("optional", false), Ok(1));
        assert_eq!(left("optional", true), Ok(2), "its port is part of what is restored");
        assert_eq!(left("requisite", true), Ok(2));
        for (policy, restored) in [("requisite", false), ("mandatory", false), ("mandatory", true)] {
            let why = left(policy, restored).unwrap_err();
            assert!(why.contains("/devices/hostdev[1]: the USB device 0951:1666 is not plugged in"), "{why}");
        }
    }
}
