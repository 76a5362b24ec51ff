//! What is tried: each word of the format, and the smallest piece of a definition that says it.

use virt_model::device::VirtioModel;
use virt_model::device::board::{CryptoBackendModel, CryptoKind, CryptoModel, PanicModel};
use virt_model::device::chardev::{CharKind, RedirBus};
use virt_model::device::disk::{DiskBus, DiskDevice};
use virt_model::device::display::{GraphicsKind, VideoKind};
use virt_model::device::filesystem::FilesystemDriverKind;
use virt_model::device::hostdev::{HostdevKind, HostdevMode};
use virt_model::device::interface::BackendKind;
use virt_model::device::rng::RngKind;
use virt_model::device::source::StartupPolicy;
use virt_model::device::tpm::{TpmKind, TpmModel, TpmVersion};
use virt_model::domain::memory::MemorySourceKind;
use virt_model::domain::os::{FirmwareKind, LoaderKind};

/// Pieces of a definition.
#[derive(Default)]
pub struct Parts {
    /// Attributes of `<os>`.
    pub os_attributes: String,
    /// In `<os>`.
    pub os: String,
    /// In `<features>`.
    pub features: String,
    /// In the definition itself.
    pub top: String,
    /// In `<devices>`.
    pub devices: String,
}

/// An `<enum>` of the document: the words that there are, and what says one.
pub struct Choice {
    /// As in the document.
    pub name: &'static str,
    /// All that the format has.
    pub values: fn() -> Vec<&'static str>,
    /// What says one.
    pub part: fn(&str) -> Parts,
}

/// An element of the document with its choices.
pub struct Section {
    /// The element's name.
    pub name: &'static str,
    /// In libvirt's order.
    pub choices: &'static [Choice],
}

fn devices(devices: String) -> Parts {
    Parts { devices, ..Parts::default() }
}

fn os(os: String) -> Parts {
    Parts { os, ..Parts::default() }
}

fn features(features: &str) -> Parts {
    Parts { features: features.to_owned(), ..Parts::default() }
}

fn top(top: &str) -> Parts {
    Parts { top: top.to_owned(), ..Parts::default() }
}

/// A machine with that `<cpu>`.
pub fn cpu(cpu: &str) -> Parts {
    top(cpu)
}

/// All words of a kind of the model's.
macro_rules! words {
    ($kind:ident) => {
        || $kind::ALL.iter().map(|one| one.as_str()).collect()
    };
}

fn yes_or_no() -> Vec<&'static str> {
    vec!["yes", "no"]
}

fn on_or_off() -> Vec<&'static str> {
    vec!["on", "off"]
}

/// Who picks the firmware.
pub const FIRMWARE: Choice = Choice {
    name: "firmware",
    values: words!(FirmwareKind),
    part: |kind| Parts { os_attributes: format!(" firmware='{kind}'"), ..Parts::default() },
};

/// Of firmware that is named.
pub const LOADER: [Choice; 3] = [
    Choice {
        name: "type",
        values: words!(LoaderKind),
        part: |kind| match kind {
            "pflash" => os("<loader type='pflash' readonly='yes'>/code</loader><nvram>/vars</nvram>".to_owned()),
            kind => os(format!("<loader type='{kind}'>/code</loader>")),
        },
    },
    Choice {
        name: "readonly",
        values: yes_or_no,
        part: |word| os(format!("<loader type='pflash' readonly='{word}'>/code</loader><nvram>/vars</nvram>")),
    },
    Choice {
        name: "secure",
        values: yes_or_no,
        part: |word| Parts {
            features: "<smm state='on'/>".to_owned(),
            ..os(format!("<loader type='pflash' readonly='yes' secure='{word}'>/code</loader><nvram>/vars</nvram>"))
        },
    },
];

/// Modes of a CPU but `custom`.
pub const CPU_MODES: [(&str, Option<Choice>); 3] = [
    (
        "host-passthrough",
        Some(Choice {
            name: "hostPassthroughMigratable",
            values: on_or_off,
            part: |word| cpu(&format!("<cpu mode='host-passthrough' migratable='{word}'/>")),
        }),
    ),
    (
        "maximum",
        Some(Choice {
            name: "maximumMigratable",
            values: on_or_off,
            part: |word| cpu(&format!("<cpu mode='maximum' migratable='{word}'/>")),
        }),
    ),
    ("host-model", None),
];

/// Where memory comes from.
pub const MEMORY_BACKING: Section = Section {
    name: "memoryBacking",
    choices: &[Choice {
        name: "sourceType",
        values: words!(MemorySourceKind),
        part: |kind| top(&format!("<memoryBacking><source type='{kind}'/></memoryBacking>")),
    }],
};

/// A disk of that kind on that bus.
fn disk(device: &str, bus: &str, attributes: &str) -> Parts {
    let (kind, source) = if device == "lun" { ("block", "dev='/dev/disk'") } else { ("file", "file='/disk'") };
    let target = match bus {
        "ide" => "hda",
        "fdc" => "fda",
        "virtio" => "vda",
        _ => "sda",
    };
    devices(format!(
        "<disk type='{kind}' device='{device}'{attributes}><driver name='qemu' type='raw'/><source {source}/>\
         <target dev='{target}' bus='{bus}'/></disk>"
    ))
}

const DISK: Section = Section {
    name: "disk",
    choices: &[
        Choice {
            name: "diskDevice",
            values: words!(DiskDevice),
            part: |device| match device {
                "floppy" => disk(device, "fdc", ""),
                "lun" => disk(device, "scsi", ""),
                "cdrom" => disk(device, "sata", ""),
                device => disk(device, "virtio", ""),
            },
        },
        Choice {
            name: "bus",
            values: words!(DiskBus),
            part: |bus| disk(if bus == "fdc" { "floppy" } else { "disk" }, bus, ""),
        },
        Choice {
            name: "model",
            values: words!(VirtioModel),
            part: |model| disk("disk", "virtio", &format!(" model='{model}'")),
        },
    ],
};

const HOSTDEV: Section = Section {
    name: "hostdev",
    choices: &[
        Choice { name: "mode", values: words!(HostdevMode), part: |mode| usb_hostdev(mode, "") },
        Choice {
            name: "startupPolicy",
            values: words!(StartupPolicy),
            part: |policy| usb_hostdev("subsystem", &format!(" startupPolicy='{policy}'")),
        },
        Choice { name: "subsysType", values: words!(HostdevKind), part: hostdev },
        Choice { name: "capsType", values: Vec::new, part: |_| Parts::default() },
        Choice {
            name: "pciBackend",
            values: || vec!["vfio", "kvm", "xen"],
            part: |driver| pci_hostdev(&format!("<driver name='{driver}'/>")),
        },
    ],
};

fn usb_hostdev(mode: &str, attributes: &str) -> Parts {
    devices(format!(
        "<hostdev mode='{mode}' type='usb'><source{attributes}><vendor id='0x1234'/><product id='0x1234'/></source></hostdev>"
    ))
}

fn pci_hostdev(more: &str) -> Parts {
    devices(format!(
        "<hostdev mode='subsystem' type='pci' managed='no'>{more}<source>\
         <address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source></hostdev>"
    ))
}

fn hostdev(kind: &str) -> Parts {
    match kind {
        "usb" => usb_hostdev("subsystem", ""),
        "pci" => pci_hostdev(""),
        kind => devices(format!("<hostdev mode='subsystem' type='{kind}'/>")),
    }
}

/// That end of a character device, with what it needs.
fn channel(kind: &str) -> Parts {
    let (name, source, beside) = match kind {
        "spicevmc" => ("com.redhat.spice.0", "", "<graphics type='spice' autoport='yes'/>"),
        "spiceport" => ("a.b", "<source channel='a.b'/>", "<graphics type='spice' autoport='yes'/>"),
        "dbus" => ("a.b", "<source channel='a.b'/>", "<graphics type='dbus'/>"),
        "qemu-vdagent" => {
            ("com.redhat.spice.0", "<source><clipboard copypaste='yes'/></source>", "<graphics type='vnc'/>")
        }
        "unix" => ("a.b", "<source mode='bind'/>", ""),
        "tcp" => ("a.b", "<source mode='bind' host='127.0.0.1' service='4555'/><protocol type='raw'/>", ""),
        "udp" => ("a.b", "<source mode='connect' host='127.0.0.1' service='4555'/>", ""),
        "file" | "pipe" | "dev" => ("a.b", "<source path='/dev/end'/>", ""),
        _ => ("a.b", "", ""),
    };
    devices(format!("<channel type='{kind}'>{source}<target type='virtio' name='{name}'/></channel>{beside}"))
}

fn tpm(model: &str, kind: &str, version: &str) -> Parts {
    let source = match kind {
        "passthrough" => "<device path='/dev/tpm0'/>",
        "external" => "<source type='unix' mode='connect' path='/tpm.sock'/>",
        _ => "",
    };
    devices(format!("<tpm model='{model}'><backend type='{kind}'{version}>{source}</backend></tpm>"))
}

/// A folder that is shared with the guest.
fn filesystem(driver: &str) -> Parts {
    // Who serves it shares the guest's memory.
    let shared = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";
    Parts {
        top: if driver == "virtiofs" { shared.to_owned() } else { String::new() },
        ..devices(format!(
            "<filesystem type='mount' accessmode='passthrough'><driver type='{driver}'/><source dir='/share'/>\
             <target dir='share'/></filesystem>"
        ))
    }
}

/// What each kind of device can be, in libvirt's order.
pub const DEVICES: &[Section] = &[
    DISK,
    Section {
        name: "graphics",
        choices: &[Choice {
            name: "type",
            values: words!(GraphicsKind),
            part: |kind| devices(format!("<graphics type='{kind}'/>")),
        }],
    },
    Section {
        name: "video",
        choices: &[Choice {
            name: "modelType",
            values: words!(VideoKind),
            part: |kind| devices(format!("<video><model type='{kind}'/></video>")),
        }],
    },
    HOSTDEV,
    Section {
        name: "rng",
        choices: &[
            Choice {
                name: "model",
                values: words!(VirtioModel),
                part: |model| {
                    devices(format!("<rng model='{model}'><backend model='random'>/dev/urandom</backend></rng>"))
                },
            },
            Choice {
                name: "backendModel",
                values: words!(RngKind),
                part: |kind| {
                    let source = match kind {
                        "random" => "/dev/urandom",
                        "egd" => "<source mode='connect' host='127.0.0.1' service='4555'/>",
                        _ => "",
                    };
                    let how = if kind == "egd" { " type='tcp'" } else { "" };
                    devices(format!("<rng model='virtio'><backend model='{kind}'{how}>{source}</backend></rng>"))
                },
            },
        ],
    },
    Section {
        name: "filesystem",
        choices: &[Choice { name: "driverType", values: words!(FilesystemDriverKind), part: filesystem }],
    },
    Section {
        name: "tpm",
        choices: &[
            Choice { name: "model", values: words!(TpmModel), part: |model| tpm(model, "emulator", "") },
            Choice { name: "backendModel", values: words!(TpmKind), part: |kind| tpm("tpm-tis", kind, "") },
            Choice {
                name: "backendVersion",
                values: words!(TpmVersion),
                part: |version| tpm("tpm-tis", "emulator", &format!(" version='{version}'")),
            },
        ],
    },
    Section {
        name: "redirdev",
        choices: &[Choice {
            name: "bus",
            values: words!(RedirBus),
            part: |bus| {
                let screen = "<graphics type='spice' autoport='yes'/>";
                devices(format!("{screen}<redirdev bus='{bus}' type='spicevmc'/>"))
            },
        }],
    },
    Section { name: "channel", choices: &[Choice { name: "type", values: words!(CharKind), part: channel }] },
    Section {
        name: "crypto",
        choices: &[
            Choice { name: "model", values: words!(CryptoModel), part: |model| crypto(model, "qemu", "builtin") },
            Choice { name: "type", values: words!(CryptoKind), part: |kind| crypto("virtio", kind, "builtin") },
            Choice {
                name: "backendModel",
                values: words!(CryptoBackendModel),
                part: |backend| crypto("virtio", "qemu", backend),
            },
        ],
    },
    Section {
        name: "interface",
        choices: &[Choice {
            name: "backendType",
            values: words!(BackendKind),
            part: |kind| match kind {
                "default" => devices("<interface type='user'/>".to_owned()),
                kind => devices(format!("<interface type='user'><backend type='{kind}'/></interface>")),
            },
        }],
    },
    Section {
        name: "panic",
        choices: &[Choice {
            name: "model",
            values: words!(PanicModel),
            part: |model| devices(format!("<panic model='{model}'/>")),
        }],
    },
    Section {
        name: "console",
        choices: &[Choice {
            name: "type",
            values: words!(CharKind),
            part: |kind| {
                let source = match kind {
                    "file" | "pipe" | "dev" => "<source path='/dev/end'/>",
                    "unix" => "<source mode='connect' path='/end.sock'/>",
                    "tcp" => "<source mode='bind' host='127.0.0.1' service='4555'/><protocol type='raw'/>",
                    "udp" => "<source mode='connect' host='127.0.0.1' service='4555'/>",
                    _ => "",
                };
                devices(format!("<console type='{kind}'>{source}<target type='virtio'/></console>"))
            },
        }],
    },
];

fn crypto(model: &str, kind: &str, backend: &str) -> Parts {
    devices(format!("<crypto model='{model}' type='{kind}'><backend model='{backend}'/></crypto>"))
}

/// An element of the document that is there or not, and what asks for it.
pub type Feature = (&'static str, fn() -> Parts);

/// What a machine has or has not, in libvirt's order.
pub const FEATURES: &[Feature] = &[
    ("gic", || features("<gic version='2'/>")),
    ("vmcoreinfo", || features("<vmcoreinfo state='on'/>")),
    ("genid", || top("<genid>43dc0cf8-809b-4adb-9bea-a9abb5f3d90e</genid>")),
    ("backingStoreInput", || {
        devices(
            "<disk type='file'><driver name='qemu' type='qcow2'/><source file='/top'/><target dev='vda' bus='virtio'/>\
             <backingStore type='file'><format type='raw'/><source file='/base'/><backingStore/></backingStore></disk>"
                .to_owned(),
        )
    }),
    ("s390-pv", || top("<launchSecurity type='s390-pv'/>")),
    ("sev", || top("<launchSecurity type='sev'><policy>0x0001</policy></launchSecurity>")),
    ("sgx", || devices("<memory model='sgx-epc'><target><size unit='MiB'>16</size></target></memory>".to_owned())),
];

/// What a guest can be told of Hyper-V.
pub const HYPERV: Section = Section {
    name: "hyperv",
    choices: &[Choice {
        name: "features",
        values: || {
            vec![
                "relaxed",
                "vapic",
                "spinlocks",
                "vpindex",
                "runtime",
                "synic",
                "stimer",
                "reset",
                "vendor_id",
                "frequencies",
                "reenlightenment",
                "tlbflush",
                "ipi",
                "evmcs",
                "avic",
                "emsr_bitmap",
                "xmm_input",
            ]
        },
        part: |feature| {
            let more = match feature {
                "spinlocks" => " retries='4095'",
                "vendor_id" => " value='virt'",
                _ => "",
            };
            features(&format!("<hyperv mode='custom'><{feature} state='on'{more}/></hyperv>"))
        },
    }],
};
