//! PCI devices of the host on their way to a guest and back: from the host's driver to vfio-pci, and again.
//!
//! ```text
//!  host's driver ─▶ driver_override=vfio-pci, unbind, probe ─▶ vfio-pci ─▶ override gone, unbind, probe ─▶ host's driver
//! ```
//!
//! What shares an IOMMU group can reach each other's memory, so that the kernel hands over a group altogether or not at all.

use std::io;
use std::path::{Path, PathBuf};

pub use virt_model::nodedev::VFIO;

/// Where the kernel has a file for each IOMMU group that is handed over, and one for all.
pub const VFIO_NODES: &str = "/dev/vfio";

/// The one for all.
pub fn vfio_of_all() -> PathBuf {
    Path::new(VFIO_NODES).join("vfio")
}

/// Drivers of which the kernel knows that they do not touch memory; a device without a driver does not either.
const HARMLESS: [&str; 4] = [VFIO, "pci-stub", "pcieport", "shpchp"];

/// The PCI devices of a host.
#[derive(Clone, Debug)]
pub struct Pci {
    sysfs: PathBuf,
    write: fn(&Path, &str) -> io::Result<()>,
}

impl Pci {
    /// Those that a sysfs at `sysfs` shows.
    pub fn below(sysfs: &Path) -> Pci {
        Pci { sysfs: sysfs.to_owned(), write: |path, text| std::fs::write(path, text) }
    }

    fn device(&self, address: &str) -> PathBuf {
        self.sysfs.join("bus/pci/devices").join(address)
    }

    /// The driver that has the device, if any has.
    pub fn driver(&self, address: &str) -> Option<String> {
        name_of_link(&self.device(address).join("driver"))
    }

    /// The number of its IOMMU group.
    pub fn group(&self, address: &str) -> Option<String> {
        name_of_link(&self.device(address).join("iommu_group"))
    }

    /// Of a virtual function of a network card: the card's own device, and which of its functions it is.
    pub fn function_of(&self, address: &str) -> Option<(String, u32)> {
        let card = self.device(address).join("physfn");
        let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten();
        // A card that switches shows a port for each of its functions beside its own.
        let is_port = |device: &Path| {
            std::fs::read_to_string(device.join("phys_port_name")).is_ok_and(|port| port.contains("vf"))
        };
        let own = entries(&card.join("net")).filter(|entry| !is_port(&entry.path()));
        let mut names: Vec<String> = own.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        let number = entries(&card).find_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix("virtfn")?.parse().ok()?;
            (name_of_link(&entry.path())? == address).then_some(number)
        });
        names.into_iter().next().zip(number)
    }

    /// Why the device cannot be handed to a guest; with `managed`, by taking it from its driver. `own` are all that the
    /// guest gets.
    pub fn objection(&self, address: &str, managed: bool, own: &[String]) -> Option<String> {
        if !self.device(address).exists() {
            return Some(format!("there is no PCI device {address} on this host"));
        }
        let Some(group) = self.group(address) else {
            return Some(format!(
                "PCI device {address} is in no IOMMU group: switch the IOMMU on in the host's firmware, and for its \
                 kernel (intel_iommu=on)"
            ));
        };
        let driver = self.driver(address);
        if managed && !self.sysfs.join("bus/pci/drivers").join(VFIO).exists() {
            return Some(format!("the host has no driver {VFIO}: load the module (modprobe {VFIO})"));
        }
        if !managed && driver.as_deref() != Some(VFIO) {
            let now = driver.map_or_else(|| "has no driver".to_owned(), |driver| format!("is driven by '{driver}'"));
            return Some(format!(
                "PCI device {address} {now}: use managed='yes', or bind it to {VFIO} (driverctl set-override {address} {VFIO})"
            ));
        }
        let peers = self.peers(&group).into_iter().filter(|peer| peer != address && !own.contains(peer));
        let busy = peers.filter_map(|peer| Some((self.driver(&peer)?, peer)));
        let (driver, peer) = busy.into_iter().find(|(driver, _)| !HARMLESS.contains(&&**driver))?;
        Some(format!(
            "PCI device {peer} is in the same IOMMU group as {address}, and driven by '{driver}': hand it to the guest as \
             well, or bind it to {VFIO}"
        ))
    }

    /// All devices of a group, sorted.
    pub fn peers(&self, group: &str) -> Vec<String> {
        let folder = self.sysfs.join("kernel/iommu_groups").join(group).join("devices");
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut peers: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        peers.sort();
        peers
    }

    /// Takes the device from its driver and gives it to vfio-pci. On error it may be without a driver: give it back. Blocks.
    pub fn detach(&self, address: &str) -> io::Result<()> {
        let device = self.device(address);
        self.put(&device.join("driver_override"), VFIO)?;
        if self.driver(address).is_some() {
            self.put(&device.join("driver/unbind"), address)?;
        }
        self.put(&self.sysfs.join("bus/pci/drivers_probe"), address)?;
        match self.driver(address) {
            Some(driver) if driver == VFIO => Ok(()),
            _ => Err(io::Error::other(format!("{VFIO} did not take it"))),
        }
    }

    /// Resets the device. Blocks.
    pub fn reset(&self, address: &str) -> io::Result<()> {
        self.put(&self.device(address).join("reset"), "1")
    }

    /// Gives a device back to the host, whose driver it had if `driven`. Does nothing to one that has gone, or that
    /// somebody has given to another driver meanwhile. Blocks while a process holds it.
    pub fn give_back(&self, address: &str, driven: bool) -> io::Result<()> {
        let device = self.device(address);
        if !device.exists() {
            return Ok(());
        }
        let choice = device.join("driver_override");
        if std::fs::read_to_string(&choice).is_ok_and(|driver| driver.trim() == VFIO) {
            self.put(&choice, "\n")?;
        }
        match self.driver(address) {
            Some(driver) if driver != VFIO => return Ok(()),
            Some(_) => self.put(&device.join("driver/unbind"), address)?,
            None => {}
        }
        if driven { self.put(&self.sysfs.join("bus/pci/drivers_probe"), address) } else { Ok(()) }
    }

    fn put(&self, path: &Path, text: &str) -> io::Result<()> {
        (self.write)(path, text).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
    }
}

/// The last part of where a link of the kernel's leads.
pub(crate) fn name_of_link(link: &Path) -> Option<String> {
    Some(std::fs::read_link(link).ok()?.file_name()?.to_str()?.to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A host with devices in groups, each with its driver, and a kernel that does what it is told.
    pub(crate) fn host(devices: &[(&str, &str, Option<&str>)]) -> (tempfile::TempDir, Pci) {
        let dir = tempfile::tempdir().unwrap();
        let sysfs = dir.path();
        for driver in [VFIO, "e1000e", "nouveau"] {
            std::fs::create_dir_all(sysfs.join("bus/pci/drivers").join(driver)).unwrap();
        }
        for (address, group, driver) in devices {
            let device = sysfs.join("bus/pci/devices").join(address);
            std::fs::create_dir_all(&device).unwrap();
            let group = sysfs.join("kernel/iommu_groups").join(group);
            std::fs::create_dir_all(group.join("devices").join(address)).unwrap();
            symlink(&group, device.join("iommu_group")).unwrap();
            if let Some(driver) = driver {
                symlink(sysfs.join("bus/pci/drivers").join(driver), device.join("driver")).unwrap();
            }
        }
        let pci = Pci { sysfs: sysfs.to_owned(), write: kernel };
        (dir, pci)
    }

    /// What Linux does when these files are written. All of the host's own devices are e1000e.
    fn kernel(path: &Path, text: &str) -> io::Result<()> {
        match path.file_name().unwrap().to_str().unwrap() {
            "unbind" => std::fs::remove_file(path.parent().unwrap()),
            "drivers_probe" => {
                let bus = path.parent().unwrap();
                let device = bus.join("devices").join(text);
                let said = std::fs::read_to_string(device.join("driver_override")).unwrap_or_default();
                let driver = if said.trim().is_empty() { "e1000e" } else { said.trim() };
                symlink(bus.join("drivers").join(driver), device.join("driver"))
            }
            "driver_override" | "reset" => std::fs::write(path, text),
            other => panic!("{other}"),
        }
    }

    const CARD: &str = "0000:06:00.0";

    #[test]
    fn a_card_goes_to_the_guest_and_comes_back() {
        let (_dir, pci) = host(&[(CARD, "7", Some("e1000e"))]);
        assert_eq!(pci.objection(CARD, true, &[]), None);
        pci.detach(CARD).unwrap();
        assert_eq!(pci.driver(CARD).as_deref(), Some(VFIO));
        assert_eq!(pci.objection(CARD, false, &[]), None, "now it could be had without being managed");
        pci.give_back(CARD, true).unwrap();
        assert_eq!(pci.driver(CARD).as_deref(), Some("e1000e"));
        pci.give_back(CARD, true).unwrap();
        assert_eq!(pci.driver(CARD).as_deref(), Some("e1000e"), "again changes nothing");
        pci.give_back("0000:07:00.0", true).unwrap();
    }

    #[test]
    fn a_card_without_a_driver_has_none_afterwards() {
        let (_dir, pci) = host(&[(CARD, "7", None)]);
        pci.detach(CARD).unwrap();
        pci.give_back(CARD, false).unwrap();
        assert_eq!(pci.driver(CARD), None);
    }

    #[test]
    fn a_detaching_that_was_cut_off_is_undone() {
        let (dir, pci) = host(&[(CARD, "7", Some("e1000e"))]);
        let device = dir.path().join("bus/pci/devices").join(CARD);
        std::fs::write(device.join("driver_override"), VFIO).unwrap();
        std::fs::remove_file(device.join("driver")).unwrap();
        pci.give_back(CARD, true).unwrap();
        assert_eq!(pci.driver(CARD).as_deref(), Some("e1000e"));
        assert_eq!(std::fs::read_to_string(device.join("driver_override")).unwrap(), "\n");
    }

    #[test]
    fn what_cannot_be_handed_over_is_named_with_the_remedy() {
        let sound = "0000:06:00.1";
        let (dir, pci) = host(&[(CARD, "7", Some("nouveau")), (sound, "7", Some("e1000e"))]);
        let why = |address: &str, managed, own: &[&str]| {
            let own: Vec<String> = own.iter().map(|s| (*s).to_owned()).collect();
            pci.objection(address, managed, &own).unwrap_or_default()
        };
        assert_eq!(why("0000:09:00.0", true, &[]), "there is no PCI device 0000:09:00.0 on this host");
        let peer = why(CARD, true, &[CARD]);
        assert!(peer.starts_with("PCI device 0000:06:00.1 is in the same IOMMU group") && peer.contains("'e1000e'"));
        assert_eq!(why(CARD, true, &[CARD, sound]), "");
        let unmanaged = why(CARD, false, &[CARD, sound]);
        assert!(unmanaged.contains("is driven by 'nouveau': use managed='yes'"), "{unmanaged}");
        std::fs::remove_dir(dir.path().join("bus/pci/drivers/vfio-pci")).unwrap();
        assert!(why(CARD, true, &[CARD, sound]).contains("modprobe vfio-pci"));
        std::fs::remove_file(dir.path().join("bus/pci/devices").join(CARD).join("iommu_group")).unwrap();
        assert!(why(CARD, true, &[]).contains("is in no IOMMU group: switch the IOMMU on"));
    }
}
