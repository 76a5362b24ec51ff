//! `<controller>`: what devices are plugged into.

use super::{DeviceInfo, VirtioDriver};
use crate::domain::part::element;
use crate::domain::size::Kib;
use crate::domain::value::choices;

choices! {
    /// The bus it offers.
    pub enum ControllerKind {
        Ide = "ide", Fdc = "fdc", Scsi = "scsi", Sata = "sata", VirtioSerial = "virtio-serial", Ccid = "ccid",
        Usb = "usb", Pci = "pci", Xenbus = "xenbus", Isa = "isa", Nvme = "nvme",
    }
}

choices! {
    /// Which controller; each kind has its own words.
    pub enum ControllerModel {
        // pci
        PciRoot = "pci-root", PcieRoot = "pcie-root", PciBridge = "pci-bridge", DmiToPciBridge = "dmi-to-pci-bridge",
        PcieToPciBridge = "pcie-to-pci-bridge", PcieRootPort = "pcie-root-port",
        PcieSwitchUpstreamPort = "pcie-switch-upstream-port", PcieSwitchDownstreamPort = "pcie-switch-downstream-port",
        PciExpanderBus = "pci-expander-bus", PcieExpanderBus = "pcie-expander-bus",
        // scsi
        Auto = "auto", Buslogic = "buslogic", Lsilogic = "lsilogic", Lsisas1068 = "lsisas1068", Vmpvscsi = "vmpvscsi",
        IbmVscsi = "ibmvscsi", VirtioScsi = "virtio-scsi", Lsisas1078 = "lsisas1078",
        VirtioTransitional = "virtio-transitional", VirtioNonTransitional = "virtio-non-transitional",
        Ncr53c90 = "ncr53c90", Dc390 = "dc390", Am53c974 = "am53c974",
        // usb
        Piix3Uhci = "piix3-uhci", Piix4Uhci = "piix4-uhci", Ehci = "ehci", Ich9Ehci1 = "ich9-ehci1",
        Ich9Uhci1 = "ich9-uhci1", Ich9Uhci2 = "ich9-uhci2", Ich9Uhci3 = "ich9-uhci3", Vt82c686bUhci = "vt82c686b-uhci",
        PciOhci = "pci-ohci", NecXhci = "nec-xhci", Qusb1 = "qusb1", Qusb2 = "qusb2", QemuXhci = "qemu-xhci", None = "none",
        // ide
        Piix3 = "piix3", Piix4 = "piix4", Ich6 = "ich6",
        // virtio-serial
        Virtio = "virtio",
    }
}

element! {
    /// `<controller>`
    pub struct Controller {
        /// The bus it offers.
        need "type" => kind: ControllerKind,
        /// Which of its kind, from 0; the next free if absent.
        attr "index" => index: Option<u32>,
        /// Which controller.
        attr "model" => model: Option<ControllerModel>,
        /// virtio-serial: how many ports. USB: ports of an xhci.
        attr "ports" => ports: Option<u32>,
        /// virtio-serial: interrupt vectors; -1: the usual number.
        attr "vectors" => vectors: Option<i32>,
        /// PCI root: size of the 64-bit hole.
        child "pcihole64" => pcihole64: Option<Kib>,
        /// PCI: what QEMU calls it.
        child "model" => pci_model: Option<PciModel>,
        /// PCI: numbers within the topology.
        child "target" => target: Option<PciTarget>,
        /// USB: first port of a companion.
        child "master" => master: Option<Master>,
        /// `<driver>`
        child "driver" => driver: Option<ControllerDriver>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

element! {
    /// `<controller><model>`
    pub struct PciModel {
        /// QEMU's name of the device, e.g. `pcie-root-port`.
        need "name" => name: String,
    }
}

element! {
    /// `<controller><target>`
    pub struct PciTarget {
        /// pci-bridge: chassis number.
        attr "chassisNr" => chassis_nr: Option<u32>,
        /// Root port: chassis.
        attr "chassis" => chassis: Option<u32>,
        /// Root port: port, written in hexadecimal.
        attr "port" => port: Option<HexByte>,
        /// Whether devices can be plugged while the guest runs.
        on_off "hotplug" => hotplug: Option<bool>,
        /// Root port: memory kept for devices to be plugged, in KiB.
        attr "memReserve" => mem_reserve_kib: Option<u64>,
    }
}

/// A byte, written as `0x8`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HexByte(pub u8);

impl crate::domain::value::Value for HexByte {
    fn from_text(text: &str) -> Result<Self, String> {
        u8::from_text(text).map(HexByte)
    }

    fn to_text(&self) -> String {
        super::hex(self.0, 1)
    }
}

element! {
    /// `<controller><master>`
    pub struct Master {
        /// First port of the master this companion serves.
        need "startport" => startport: u32,
    }
}

element! {
    /// `<controller><driver>`
    pub struct ControllerDriver {
        /// Number of queues (virtio-scsi).
        attr "queues" => queues: Option<u32>,
        /// The thread that does its I/O (virtio-scsi).
        attr "iothread" => iothread: Option<u32>,
        /// Commands under way on one disk at the most (virtio-scsi).
        attr "cmd_per_lun" => cmd_per_lun: Option<u32>,
        /// Sectors moved by one command at the most (virtio-scsi).
        attr "max_sectors" => max_sectors: Option<u32>,
        /// The host's kernel takes notice of requests (virtio-scsi).
        on_off "ioeventfd" => ioeventfd: Option<bool>,
        /// What virtio devices share.
        flat => virtio: VirtioDriver,
    }
}

impl Controller {
    /// A controller of that kind, number and model.
    pub fn new(kind: ControllerKind, index: u32, model: Option<ControllerModel>) -> Controller {
        Controller { kind, index: Some(index), model, ..Controller::default() }
    }

    /// Ports that a USB controller of this model has.
    pub fn usb_ports(&self) -> u32 {
        match self.model {
            Some(ControllerModel::QemuXhci | ControllerModel::NecXhci) => self.ports.unwrap_or(4),
            Some(ControllerModel::Ich9Ehci1 | ControllerModel::Ehci) => 6,
            Some(ControllerModel::PciOhci) => 3,
            _ => 2,
        }
    }

    /// The number, 0 if not said.
    pub fn index(&self) -> u32 {
        self.index.unwrap_or(0)
    }
}
