//! USB devices of the host: which there are, and which one a definition means.

use std::path::{Path, PathBuf};

/// A device that is plugged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UsbDevice {
    /// From 1.
    pub bus: u32,
    /// The number it has until it is unplugged.
    pub device: u32,
    /// Who made it.
    pub vendor: u16,
    /// What it is.
    pub product: u16,
}

/// By what a definition names a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsbName {
    /// Vendor and product.
    pub ids: Option<(u16, u16)>,
    /// Bus and device number.
    pub place: Option<(u32, u32)>,
}

impl std::fmt::Display for UsbName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.ids, self.place) {
            (Some((vendor, product)), None) => write!(f, "{vendor:04x}:{product:04x}"),
            (Some((vendor, product)), Some((bus, device))) => {
                write!(f, "{vendor:04x}:{product:04x} at bus {bus}, device {device}")
            }
            (None, Some((bus, device))) => write!(f, "at bus {bus}, device {device}"),
            (None, None) => write!(f, "without a name"),
        }
    }
}

/// Where QEMU opens a device.
pub fn node(bus: u32, device: u32) -> PathBuf {
    PathBuf::from(format!("/dev/bus/usb/{bus:03}/{device:03}"))
}

/// All devices that a sysfs at `sysfs` shows, sorted.
pub fn devices(sysfs: &Path) -> Vec<UsbDevice> {
    let entries = std::fs::read_dir(sysfs.join("bus/usb/devices")).into_iter().flatten().flatten();
    let mut found: Vec<UsbDevice> = entries.filter_map(|entry| read(&entry.path())).collect();
    found.sort();
    found
}

/// Interfaces of devices stand among them, and have no numbers.
fn read(folder: &Path) -> Option<UsbDevice> {
    let text = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let id = |name: &str| u16::from_str_radix(text(name)?.trim(), 16).ok();
    let number = |name: &str| text(name)?.trim().parse().ok();
    let (vendor, product) = (id("idVendor")?, id("idProduct")?);
    Some(UsbDevice { bus: number("busnum")?, device: number("devnum")?, vendor, product })
}

/// The one device of that name; `None` if it is not plugged in. Of two equal ones none is meant: the error asks which.
pub fn find(devices: &[UsbDevice], name: &UsbName) -> Result<Option<UsbDevice>, String> {
    let fits = |found: &&UsbDevice| {
        name.ids.is_none_or(|ids| ids == (found.vendor, found.product))
            && name.place.is_none_or(|place| place == (found.bus, found.device))
    };
    let fitting: Vec<&UsbDevice> = devices.iter().filter(fits).collect();
    match fitting.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(**one)),
        [first, ..] => Err(format!(
            "there are {} USB devices {name}: say which one, e.g. <address bus='{}' device='{}'/>",
            fitting.len(),
            first.bus,
            first.device
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plug(sysfs: &Path, port: &str, text: [&str; 4]) {
        let folder = sysfs.join("bus/usb/devices").join(port);
        std::fs::create_dir_all(&folder).unwrap();
        for (name, text) in ["busnum", "devnum", "idVendor", "idProduct"].iter().zip(text) {
            std::fs::write(folder.join(name), format!("{text}\n")).unwrap();
        }
    }

    #[test]
    fn a_device_is_found_by_either_name_and_of_two_equal_ones_neither() {
        let dir = tempfile::tempdir().unwrap();
        assert!(devices(dir.path()).is_empty(), "a host without USB");
        plug(dir.path(), "1-1", ["1", "4", "046d", "c52b"]);
        plug(dir.path(), "1-2.3", ["1", "5", "0951", "1666"]);
        std::fs::create_dir_all(dir.path().join("bus/usb/devices/1-1:1.0")).unwrap();
        let found = devices(dir.path());
        assert_eq!(found.len(), 2);
        let stick = UsbName { ids: Some((0x0951, 0x1666)), place: None };
        assert_eq!(find(&found, &stick).unwrap().map(|d| (d.bus, d.device)), Some((1, 5)));
        let place = UsbName { ids: None, place: Some((1, 4)) };
        assert_eq!(find(&found, &place).unwrap().map(|d| d.vendor), Some(0x046d));
        let other = UsbName { place: Some((1, 4)), ..stick };
        assert_eq!(find(&found, &other), Ok(None), "another device is at that place");
        plug(dir.path(), "2-1", ["2", "2", "0951", "1666"]);
        let why = find(&devices(dir.path()), &stick).unwrap_err();
        assert_eq!(why, "there are 2 USB devices 0951:1666: say which one, e.g. <address bus='1' device='5'/>");
        assert_eq!(node(1, 5), Path::new("/dev/bus/usb/001/005"));
    }
}
