//! `Disks`.

use super::pack::{Entry, Key};
use virt_model::device::Disk;
use virt_model::device::disk::DiskDevice;
use virt_model::device::source::DiskSource;

pub(super) fn entry(disk: &Disk) -> Entry {
    let source = disk.source.as_ref().map(place).unwrap_or_default();
    let layers = std::iter::successors(disk.backing.as_deref(), |layer| layer.backing.as_deref());
    let backing: Vec<String> = layers.filter_map(|layer| layer.source.as_ref()).map(place).collect();
    let format = disk.meant_format();
    Entry::default()
        .text(Key::Target, Some(&disk.target.dev))
        .text(Key::Device, Some(disk.device().as_str()))
        .text(Key::Bus, disk.target.bus.map(|bus| bus.as_str()))
        .text(Key::Type, Some(disk.kind().as_str()))
        .text(Key::Source, Some(&source))
        .text(Key::Format, Some(format).filter(|_| !source.is_empty()))
        .text(Key::Serial, disk.serial.as_deref())
        .text(Key::Alias, disk.info.alias())
        .flag(Key::Readonly, disk.readonly || disk.device() == DiskDevice::Cdrom)
        .flag(Key::Shareable, disk.shareable)
        .number(Key::BootOrder, disk.info.boot_order())
        .texts(Key::Backing, &backing)
}

/// Where content comes from: a path, or an address without what is asked there, which may be secret. Of an image that a client has
/// given by descriptor it is what that client calls it.
fn place(source: &DiskSource) -> String {
    let name = source.name.as_deref().unwrap_or_default();
    if let Some(protocol) = source.protocol {
        let hosts = source.hosts.iter().map(|host| {
            let name = host.name.as_deref().or(host.socket.as_deref()).unwrap_or_default();
            // An address of IPv6 has colons of its own.
            let name = if name.contains(':') { format!("[{name}]") } else { name.to_owned() };
            host.port.map_or(name.clone(), |port| format!("{name}:{port}"))
        });
        let hosts: Vec<String> = hosts.collect();
        let between = if name.is_empty() || name.starts_with('/') { "" } else { "/" };
        return format!("{protocol}://{}{between}{name}", hosts.join(","));
    }
    source.file.as_deref().or(source.dev.as_deref()).unwrap_or(name).to_owned()
}
