//! `HostDevices`, `Firmware`, `TPM`, `OperatingSystem` and `BootOrder`.

use super::osinfo;
use super::pack::{Entry, Key};
use virt_model::device::{Device, Hostdev, Tpm};
use virt_model::domain::DomainDef;
use virt_model::domain::os::{FirmwareKind, LoaderKind, Os};
use virt_model::domain::value::Value as _;

/// The namespace in which tools note which operating system is in a machine.
const LIBOSINFO: &str = "http://libosinfo.org/xmlns/libvirt/domain/1.0";

pub(super) fn host_device(device: &Hostdev) -> Entry {
    let usb = |(bus, device): (u32, u32)| format!("{bus}:{device}");
    let address = device.pci().map(|place| place.to_string()).or_else(|| device.usb().map(usb));
    let source = device.source.as_ref();
    let vendor = source.and_then(|source| source.vendor.as_ref()).map(|vendor| vendor.id.to_text());
    let product = source.and_then(|source| source.product.as_ref()).map(|product| product.id.to_text());
    Entry::default()
        .text(Key::Alias, device.info.alias())
        .text(Key::Type, Some(device.kind.as_str()))
        .text(Key::Address, address.as_deref())
        .text(Key::Vendor, vendor.as_deref())
        .text(Key::Product, product.as_deref())
}

/// None where the machine has a board whose own firmware nobody names.
pub(super) fn firmware(os: &Os) -> Option<Entry> {
    let loader = os.loader.as_ref();
    let is_pc = matches!(os.kind.arch.as_deref(), None | Some("x86_64" | "i686"));
    let by_loader = match loader.filter(|loader| loader.path.is_some()).map(|loader| loader.kind) {
        Some(Some(LoaderKind::Pflash)) => Some(FirmwareKind::Efi),
        Some(_) => Some(FirmwareKind::Bios),
        None => Some(FirmwareKind::Bios).filter(|_| is_pc && os.kind.name == "hvm"),
    };
    let kind = os.firmware.or(by_loader)?;
    let features = os.features.iter().flat_map(|listed| &listed.features);
    let mut secure_boot = features.filter(|feature| feature.name == "secure-boot").map(|one| one.enabled == Some(true));
    let secure_boot = secure_boot.next().or(loader.and_then(|loader| loader.secure)).unwrap_or(false);
    let store = os.nvram.as_ref().and_then(|nvram| nvram.path.as_deref());
    let entry = Entry::default().text(Key::Type, Some(kind.as_str())).text(Key::Nvram, store);
    Some(entry.flag(Key::SecureBoot, Some(secure_boot).filter(|_| kind == FirmwareKind::Efi)))
}

pub(super) fn tpm(tpm: &Tpm) -> Entry {
    Entry::default()
        .text(Key::Model, tpm.model.map(|model| model.as_str()))
        .text(Key::Version, tpm.backend.version.map(|version| version.as_str()))
}

/// What a tool has noted that is in the machine: its short name, or its URI where that is not known here.
pub(super) fn operating_system(def: &DomainDef) -> Option<Entry> {
    let noted = def.metadata(LIBOSINFO)?;
    let noted = virt_model::xml::read(&noted, &[]).ok()?;
    let id = noted.elements().find_map(|os| os.attr("id").filter(|_| os.name.rsplit(':').next() == Some("os")))?;
    let short = osinfo::short_id(id);
    Some(Entry::default().text(Key::Name, short.as_deref().or(Some(id))))
}

/// Targets, hardware addresses and, of others, aliases, where devices have an order of their own; else the classes of devices.
pub(super) fn boot_order(def: &DomainDef) -> Option<Entry> {
    let named = |device: Device<'_>| match device {
        Device::Disk(disk) => Some(disk.target.dev.clone()),
        Device::Interface(card) => card.mac().map(|mac| mac.to_string()),
        Device::Hostdev(device) if device.info.alias().is_none() => device.pci().map(|place| place.to_string()),
        other => other.info().0.alias().map(str::to_owned),
    };
    let all = def.devices.all().into_iter();
    let mut ordered: Vec<(u32, Option<String>)> =
        all.filter_map(|device| Some((device.info().0.boot_order()?, named(device)))).collect();
    ordered.sort_by_key(|(order, _)| *order);
    let order: Vec<String> = match ordered.is_empty() {
        true => def.os.boot.iter().map(|boot| boot.dev.as_str().to_owned()).collect(),
        false => ordered.into_iter().filter_map(|(_, name)| name).collect(),
    };
    (!order.is_empty()).then(|| Entry::default().texts(Key::Name, &order))
}
