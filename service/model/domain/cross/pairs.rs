//! What does not stand beside what, and what is nothing without another thing.

use super::rows::{Row, holds, select};
use crate::xml::{Element, Finding, FindingKind, Place};

/// A row: elements for which all conditions hold are refused, at what the selector leads to.
pub(super) struct Pair {
    kind: FindingKind,
    of: &'static str,
    when: &'static [&'static str],
    at: &'static str,
    how: &'static str,
}

/// No machine is like this.
const fn never(of: &'static str, when: &'static [&'static str], at: &'static str, how: &'static str) -> Pair {
    Pair { kind: FindingKind::Invalid, of, when, at, how }
}

/// Others define such machines, and they do not start.
const fn no_start(of: &'static str, when: &'static [&'static str], at: &'static str, how: &'static str) -> Pair {
    Pair { kind: FindingKind::Unsupported, of, when, at, how }
}

/// It starts, and something of what is said has no effect.
const fn warned(of: &'static str, when: &'static [&'static str], at: &'static str, how: &'static str) -> Pair {
    Pair { kind: FindingKind::Warning, of, when, at, how }
}

const CHARACTER: &str = "devices/serial|parallel|console|channel|redirdev";
const NEEDS_VPINDEX: &str = "it counts virtual CPUs by their index: add <vpindex state='on'/>";

pub(super) const ROWS: &[Pair] = &[
    // Firmware.
    never(
        "os",
        &["loader/@stateless=yes", "nvram"],
        "nvram",
        "a loader with stateless='yes' keeps no variables: leave out <nvram> or stateless",
    ),
    never(
        "os",
        &["loader/@type=rom", "nvram"],
        "nvram",
        "a loader of type='rom' keeps no variables: leave out <nvram>, or use type='pflash'",
    ),
    never(
        "os",
        &["loader/@type=rom", "loader/@readonly=no"],
        "loader/@readonly",
        "a loader of type='rom' is not written: say readonly='yes', or nothing",
    ),
    never(
        "os",
        &["@firmware=bios", "nvram"],
        "nvram",
        "a BIOS keeps no variables in a file: leave out <nvram>, or use firmware='efi'",
    ),
    never(
        "os",
        &["@firmware=bios", "loader/@secure=yes"],
        "loader/@secure",
        "a BIOS does not boot securely: use firmware='efi'",
    ),
    never(
        "os",
        &["!@firmware", "firmware"],
        "firmware",
        "<firmware> says what firmware that is to be chosen must be able to do: add firmware='efi' to <os>, or leave it out",
    ),
    never(
        "os",
        &["nvram/@templateFormat", "!nvram/@template"],
        "nvram/@templateFormat",
        "it is the format of a template: add template='…', or leave it out",
    ),
    // CPU and time.
    warned(
        "",
        &["@type=kvm", "features/hyperv/synic/@state=on", "!features/hyperv/vpindex/@state=on"],
        "features/hyperv/synic",
        NEEDS_VPINDEX,
    ),
    warned(
        "",
        &["@type=kvm", "features/hyperv/tlbflush/@state=on", "!features/hyperv/vpindex/@state=on"],
        "features/hyperv/tlbflush",
        NEEDS_VPINDEX,
    ),
    warned(
        "",
        &["@type=kvm", "features/hyperv/ipi/@state=on", "!features/hyperv/vpindex/@state=on"],
        "features/hyperv/ipi",
        NEEDS_VPINDEX,
    ),
    warned(
        "",
        &["@type=kvm", "features/hyperv/stimer/@state=on", "!features/hyperv/synic/@state=on"],
        "features/hyperv/stimer",
        "its interrupts come by the synthetic controller: add <synic state='on'/>",
    ),
    warned(
        "",
        &["@type=kvm", "features/hyperv/stimer/@state=on", "!clock/timer/@name=hypervclock"],
        "features/hyperv/stimer",
        "it counts by the clock of Hyper-V: add <timer name='hypervclock' present='yes'/> to <clock>",
    ),
    warned(
        "",
        &["@type=kvm", "features/hyperv/evmcs/@state=on", "!features/hyperv/vapic/@state=on"],
        "features/hyperv/evmcs",
        "it needs the synthetic APIC: add <vapic state='on'/>",
    ),
    // Disks.
    never(
        "devices/disk",
        &["encryption", "source/encryption"],
        "encryption",
        "how the image is encrypted is said twice: leave out the <encryption> that is not in <source>",
    ),
    never(
        "devices/disk",
        &["auth", "source/auth"],
        "auth",
        "who asks the server is said twice: leave out the <auth> that is not in <source>",
    ),
    never(
        "devices/disk",
        &["shareable", "driver/@type?raw!=raw"],
        "shareable",
        "guests that write to one image at a time would destroy it unless it is raw: leave out <shareable/>, or use type='raw'",
    ),
    never("devices/disk", &["driver/@type=iso"], "driver/@type", "an ISO image is of type='raw'"),
    never(
        "devices/disk",
        &["@device=lun", "@type?file!=block|network|volume"],
        "@device",
        "a LUN is a device of the host's or of a server's: use type='block', or device='disk'",
    ),
    never(
        "devices/disk",
        &["target/@tray", "@device?disk!=cdrom|floppy"],
        "target/@tray",
        "only CD-ROM and floppy drives have a tray: leave it out",
    ),
    never(
        "devices/disk",
        &["@type=network", "source/@startupPolicy"],
        "source/@startupPolicy",
        "whether a server has the image is not looked at: leave it out",
    ),
    never(
        "devices/disk/source/host",
        &["@socket", "@transport?tcp!=unix"],
        "@socket",
        "a socket is for transport='unix'",
    ),
    never(
        "devices/disk/source/host",
        &["@name", "@transport=unix"],
        "@name",
        "transport='unix' goes by a socket: leave out the name",
    ),
    // Controllers.
    never(
        "devices/controller",
        &["pcihole64", "@model?pci-root!=pci-root|pcie-root"],
        "pcihole64",
        "the hole is one of the root of all PCI buses: leave it out here",
    ),
    never(
        "devices/controller",
        &["pcihole64", "@type!=pci"],
        "pcihole64",
        "the hole is one of the root of all PCI buses: leave it out here",
    ),
    never(
        "devices/controller",
        &["model", "@type!=pci"],
        "model",
        "a <model> is for controllers of type='pci': leave it out",
    ),
    never(
        "devices/controller",
        &["target", "@type!=pci"],
        "target",
        "a <target> is for controllers of type='pci': leave it out",
    ),
    never(
        "devices/controller",
        &["master", "@type!=usb"],
        "master",
        "a <master> is for controllers of type='usb': leave it out",
    ),
    never(
        "devices/controller",
        &["target/@chassisNr", "@model!=pci-bridge"],
        "target/@chassisNr",
        "chassisNr is for model='pci-bridge': leave it out",
    ),
    never(
        "devices/controller",
        &["target/@chassis", "@model!=pcie-root-port|pcie-switch-downstream-port"],
        "target/@chassis",
        "chassis is for ports of PCI Express: leave it out",
    ),
    never(
        "devices/controller",
        &["target/@port", "@model!=pcie-root-port|pcie-switch-downstream-port"],
        "target/@port",
        "port is for ports of PCI Express: leave it out",
    ),
    never(
        "devices/controller",
        &["target/@busNr", "@model!=pci-expander-bus|pcie-expander-bus"],
        "target/@busNr",
        "busNr is for model='pci-expander-bus' and 'pcie-expander-bus': leave it out",
    ),
    never(
        "devices/controller",
        &["target/node", "@model!=pci-root|pci-expander-bus|pcie-expander-bus"],
        "target/node",
        "<node> is for model='pci-expander-bus' and 'pcie-expander-bus': leave it out",
    ),
    never(
        "devices/controller",
        &[
            "target/@hotplug",
            "@model!=pcie-root-port|pcie-switch-downstream-port|pci-bridge|pci-root|pcie-to-pci-bridge",
        ],
        "target/@hotplug",
        "nothing is plugged into this controller: leave out hotplug",
    ),
    // Network cards.
    never(
        "devices/interface",
        &["@type!=user|vhostuser", "backend/@type=passt"],
        "backend/@type",
        "passt is for type='user'",
    ),
    never(
        "devices/interface",
        &["@type!=vhostuser|vdpa|network", "driver/@tx_queue_size=512|1024"],
        "driver/@tx_queue_size",
        "without a switch in a process of its own (type='vhostuser') a queue that sends has 256 entries: leave it out",
    ),
    never(
        "devices/interface/vlan",
        &["@trunk=no", "tag/@nativeMode"],
        "@trunk",
        "a nativeMode is for a trunk: say trunk='yes', or leave out nativeMode",
    ),
    // Character devices.
    never(
        CHARACTER,
        &["source/reconnect/@enabled=yes", "!source/reconnect/@timeout"],
        "source/reconnect",
        "<reconnect> needs a timeout, in seconds",
    ),
    never(
        CHARACTER,
        &["source/reconnect/@enabled=no", "source/reconnect/@timeout"],
        "source/reconnect/@timeout",
        "a timeout is for enabled='yes'",
    ),
    // Screens and sound.
    no_start(
        "devices/graphics",
        &["@type=spice", "gl/@enable=yes", "listen/@type=address|network"],
        "gl",
        "SPICE draws with OpenGL for a client on this host only: use <listen type='none'/> or type='socket'",
    ),
    never(
        "devices/graphics",
        &["@p2p=yes", "@address"],
        "@address",
        "with p2p='yes' there is no bus: leave out the address",
    ),
    never(
        "devices/sound",
        &["codec", "@model!=ich6|ich7|ich9"],
        "codec",
        "a <codec> is for model='ich6' and 'ich9': leave it out",
    ),
    never(
        "devices/audio/input|output",
        &["@mixingEngine=no", "@fixedSettings=yes"],
        "@fixedSettings",
        "settings are fixed by the mixing engine: say mixingEngine='yes', or leave out fixedSettings",
    ),
    no_start(
        "devices/audio/input|output",
        &["settings", "@fixedSettings=no"],
        "settings",
        "with fixedSettings='no' the guest's settings are taken: leave out <settings>",
    ),
    no_start(
        "devices/audio/input|output",
        &["settings", "@mixingEngine=no", "!@fixedSettings"],
        "settings",
        "without the mixing engine the guest's settings are taken: leave out <settings>",
    ),
    no_start("devices/video/model", &["@ram", "@type!=qxl"], "@ram", "ram is for type='qxl': leave it out"),
    no_start("devices/video/model", &["@vram64", "@type!=qxl"], "@vram64", "vram64 is for type='qxl': leave it out"),
    no_start("devices/video/model", &["@vgamem", "@type!=qxl"], "@vgamem", "vgamem is for type='qxl': leave it out"),
    never("devices/video/model", &["@blob=on", "@type!=virtio"], "@blob", "blob is for type='virtio': leave it out"),
    never(
        "devices/video/model",
        &["@edid", "@type!=virtio|vga|bochs"],
        "@edid",
        "edid is for type='virtio', 'vga' and 'bochs': leave it out",
    ),
    never(
        "devices/video/model",
        &["resolution", "@type!=virtio|vga|bochs|qxl|vbox|vmvga|gop"],
        "resolution",
        "a card of this type has no resolution of its own: leave it out, or use type='virtio'",
    ),
    never("devices/video/model", &["@primary=yes", "@type=none"], "@primary", "type='none' is no card: leave it out"),
    never(
        "devices/video",
        &["driver/@iommu", "model/@type!=virtio"],
        "driver/@iommu",
        "iommu is for type='virtio': leave it out",
    ),
    never(
        "devices/video",
        &["driver/@ats", "model/@type!=virtio"],
        "driver/@ats",
        "ats is for type='virtio': leave it out",
    ),
    never(
        "devices/video",
        &["driver/@packed", "model/@type!=virtio"],
        "driver/@packed",
        "packed is for type='virtio': leave it out",
    ),
    never(
        "devices/video",
        &["driver/@page_per_vq", "model/@type!=virtio"],
        "driver/@page_per_vq",
        "page_per_vq is for type='virtio': leave it out",
    ),
    // Small devices.
    never(
        "devices/tpm/backend",
        &["@type!=emulator", "@version"],
        "@version",
        "a version is for type='emulator': other TPMs are what they are",
    ),
    never(
        "devices/tpm/backend",
        &["@type!=emulator", "@persistent_state"],
        "@persistent_state",
        "persistent_state is for type='emulator': leave it out",
    ),
    never(
        "devices/tpm/backend",
        &["@type!=emulator", "active_pcr_banks"],
        "active_pcr_banks",
        "<active_pcr_banks> is for type='emulator': leave it out",
    ),
    never(
        "devices/memory",
        &["@model!=nvdimm", "target/label"],
        "target/label",
        "a <label> is for model='nvdimm': leave it out",
    ),
    never("devices/memory", &["@model=dimm", "uuid"], "uuid", "a <uuid> is for model='nvdimm': leave it out"),
    never(
        "devices/memory",
        &["@model=virtio-mem", "!target/block"],
        "target",
        "model='virtio-mem' needs a <block>, the size of its pieces",
    ),
    never(
        "devices/memory",
        &["@model=virtio-mem", "!target/requested"],
        "target",
        "model='virtio-mem' needs a <requested>, how much of it is used",
    ),
    never(
        "devices/memballoon",
        &["@model=none", "@autodeflate"],
        "@autodeflate",
        "there is no balloon: leave out autodeflate",
    ),
    never(
        "devices/memballoon",
        &["@model=none", "@freePageReporting"],
        "@freePageReporting",
        "there is no balloon: leave out freePageReporting",
    ),
    never("devices/hub", &["@type!=usb"], "@type", "there are USB hubs only: type='usb'"),
];

impl Row for Pair {
    fn of(&self) -> &'static str {
        self.of
    }

    fn look(&self, element: &Element, at: &Place, log: &mut Vec<Finding>) {
        if self.when.iter().all(|condition| holds(element, condition)) {
            let place = select(element, at, self.at).into_iter().next().map_or_else(|| at.clone(), |(place, _)| place);
            log.push(Finding::new(self.kind, &place, self.how));
        }
    }
}
