//! Why some of what is known does not act, where there is more to say than that it is not supported yet.

/// Reasons, each with the elements and attributes that it keeps from acting. What does act is not looked up here.
const REASONS: &[(&str, &[&str])] = &[
    (
        "is for containers, the QEMU driver runs machines",
        &[
            "os/init",
            "os/initarg",
            "os/initenv",
            "os/initdir",
            "os/inituser",
            "os/initgroup",
            "idmap",
            "features/capabilities",
            "features/privnet",
            "lxc:namespace",
            "devices/filesystem/driver/@format",
            "devices/filesystem/driver/@name",
            "devices/filesystem/source/@file",
            "devices/filesystem/source/@dev",
            "devices/filesystem/source/@name",
            "devices/filesystem/source/@usage",
            "devices/filesystem/source/@units",
            "devices/filesystem/space_hard_limit",
            "devices/filesystem/space_soft_limit",
            "devices/interface/route",
            "devices/interface/guest",
            "devices/filesystem/idmap",
            "devices/hostdev/source/block",
            "devices/hostdev/source/char",
            "devices/hostdev/source/interface",
            "devices/hostdev/ip",
            "devices/hostdev/route",
        ],
    ),
    (
        "is for Xen",
        &[
            "bootloader",
            "bootloader_args",
            "features/hap",
            "features/viridian",
            "features/xen",
            "xen:commandline",
            "devices/disk/backenddomain",
            "devices/interface/backenddomain",
            "devices/controller/@maxGrantFrames",
            "devices/controller/@maxEventChannels",
            "devices/video/driver/@vgaconf",
            "devices/hostdev/source/@writeFiltering",
        ],
    ),
    (
        "is for bhyve",
        &[
            "devices/serial/source/@master",
            "devices/serial/source/@slave",
            "devices/parallel/source/@master",
            "devices/parallel/source/@slave",
            "devices/console/source/@master",
            "devices/console/source/@slave",
            "devices/channel/source/@master",
            "devices/channel/source/@slave",
            "devices/redirdev/source/@master",
            "devices/redirdev/source/@slave",
            "devices/rng/backend/source/@master",
            "devices/rng/backend/source/@slave",
            "bhyve:commandline",
            "features/msrs",
        ],
    ),
    (
        "is for VMware",
        &[
            "vmware:datacenterpath",
            "vmware:moref",
            "devices/interface/mac/@check",
            "devices/interface/source/@switchid",
            "devices/interface/source/@portgroupid",
            "devices/interface/source/@connectionid",
        ],
    ),
    (
        "is for other processors than those of PCs",
        &[
            "os/dtb",
            "features/gic",
            "features/hpt",
            "features/htm",
            "features/nested-hv",
            "features/ccf-assist",
            "features/cfpc",
            "features/sbbc",
            "features/ibs",
            "features/ras",
            "features/aia",
            "cpu/@deprecated_features",
            "devices/nvram",
            "keywrap",
            "devices/disk/boot/@loadparm",
        ],
    ),
    (
        "is of a description of the host",
        &["cpu/arch", "sysinfo/processor", "sysinfo/memory_device", "sysinfo/oemStrings/entry/@name"],
    ),
    ("is not supported: there is no manager of locks here", &["on_lockfailure", "devices/lease"]),
    (
        "is not supported: the host's cache and memory bandwidth are not divided among guests",
        &["cputune/cachetune", "cputune/memorytune"],
    ),
    ("is not supported: every guest has a control group of its own below virtd's", &["resource"]),
    (
        "is not supported: every control group above the guest's would have to guarantee it; use <memoryBacking> with <locked/>",
        &["memtune/min_guarantee"],
    ),
    ("is not supported: events are counted by the host's perf, which finds the guest by its process", &["perf"]),
    ("is not supported: QEMU's process would leave one behind that nobody waits for", &["features/async-teardown"]),
    (
        "needs a newer QEMU than this driver knows",
        &[
            "os/shim",
            "os/root",
            "hwuuid",
            "devices/sound/@streams",
            "devices/sound/driver",
            "devices/memory/target/@dynamicMemslots",
            "os/varstore",
            "devices/disk/driver/iothreads",
            "devices/disk/driver/statistics",
            "devices/controller/driver/iothreads",
            "devices/hostdev/driver/@iommufd",
            "devices/disk/source/dataStore",
            "devices/disk/backingStore/source/dataStore",
        ],
    ),
    ("QEMU decides by itself how fast it makes up for missed ticks: leave it out", &["clock/timer/catchup"]),
    (
        "is for disks of device='lun', which are not supported: the guest would command the host's device",
        &[
            "devices/disk/@rawio",
            "devices/disk/@sgio",
            "devices/disk/source/reservations",
            "devices/disk/backingStore/source/reservations",
        ],
    ),
    ("every transient disk has its image for itself", &["devices/disk/transient/@shareBacking"]),
    (crate::qemu::given::NOT_STORED, &["devices/disk/source/@fdgroup", "devices/disk/backingStore/source/@fdgroup"]),
    (
        "is of volumes of iscsi pools, which are not supported: leave it out",
        &["devices/disk/source/@mode", "devices/disk/backingStore/source/@mode"],
    ),
    (
        "only disks, and what they stand on, are named as volumes: give the path",
        &["devices/filesystem/source/@pool", "devices/filesystem/source/@volume"],
    ),
    (
        "is for making images: an image that is there says itself how it is encrypted",
        &[
            "devices/disk/encryption/cipher",
            "devices/disk/encryption/ivgen",
            "devices/disk/source/encryption/cipher",
            "devices/disk/source/encryption/ivgen",
            "devices/disk/backingStore/source/encryption/cipher",
            "devices/disk/backingStore/source/encryption/ivgen",
        ],
    ),
    (
        "QEMU logs in by the keys of the agent that its user has, and to hosts that its user knows",
        &[
            "devices/disk/source/identity/@keyfile",
            "devices/disk/source/identity/@agentsock",
            "devices/disk/source/knownHosts",
            "devices/disk/backingStore/source/identity/@keyfile",
            "devices/disk/backingStore/source/identity/@agentsock",
            "devices/disk/backingStore/source/knownHosts",
        ],
    ),
    (
        "is for protocol='nfs', which is not supported: mount it",
        &[
            "devices/disk/source/identity/@user",
            "devices/disk/source/identity/@group",
            "devices/disk/backingStore/source/identity/@user",
            "devices/disk/backingStore/source/identity/@group",
        ],
    ),
    (
        "is for servers in a process of their own (vhostuser)",
        &[
            "devices/disk/source/reconnect/@enabled",
            "devices/disk/source/reconnect/@timeout",
            "devices/disk/backingStore/source/reconnect/@enabled",
            "devices/disk/backingStore/source/reconnect/@timeout",
            "devices/video/driver/@name",
            "devices/video/model/acceleration/@rendernode",
        ],
    ),
    ("which address a bridge lets through is said on the bridge", &["devices/interface/@trustGuestRxFilters"]),
    (
        "no programs are run for a guest as root: name a device that is there, with <target managed='no'/>",
        &["devices/interface/script", "devices/interface/downscript"],
    ),
    (
        "devices are made by /dev/net/tun and /dev/vhost-net",
        &["devices/interface/backend/@tap", "devices/interface/backend/@vhost"],
    ),
    (
        "is of a machine that runs: a network's address is looked up at each start",
        &["devices/graphics/listen/@fromConfig"],
    ),
    (
        "is for windows on a desktop beside the guest, which are not supported: use vnc, spice or dbus",
        &[
            "devices/graphics/@display",
            "devices/graphics/@xauth",
            "devices/graphics/@fullscreen",
            "devices/graphics/@multiUser",
            "devices/graphics/@replaceUser",
            "devices/graphics/@username",
        ],
    ),
    (
        "a rate that a network keeps free is not kept: say average and peak",
        &["devices/interface/bandwidth/inbound/@floor"],
    ),
    ("virtual ports (Open vSwitch and the like) are not supported yet", &["devices/interface/virtualport"]),
    ("a TPM of the host's cannot be handed to a guest: use type='emulator'", &["devices/tpm/backend/device"]),
    ("is the choice of a newer swtpm", &["devices/tpm/backend/profile"]),
    (
        "is for channels of type='guestfwd', which are not supported: use the network, or type='virtio'",
        &["devices/channel/target/@address", "devices/channel/target/@port"],
    ),
    ("is for a newer passt", &["devices/interface/backend/@hostname", "devices/interface/backend/@fqdn"]),
    (
        "QEMU does not configure the host",
        &["devices/interface/ip/@peer", "devices/interface/source/ip", "devices/interface/source/route"],
    ),
    (
        "is supported with type='file' and <source file='…'/>, which is the same as the path as text",
        &["os/nvram/@type", "os/nvram/source"],
    ),
    (
        "is for IOMMUs of other models than 'intel' and 'virtio', which are not supported",
        &[
            "devices/iommu/driver/@xtsup",
            "devices/iommu/driver/@passthrough",
            "devices/iommu/driver/@pciBus",
            "devices/iommu/driver/@accel",
            "devices/iommu/driver/@ats",
            "devices/iommu/driver/@ril",
            "devices/iommu/driver/@pasid",
            "devices/iommu/driver/@oas",
        ],
    ),
    (
        "is the desktop's own setting: use type='pulseaudio' or another that says where it plays",
        &["devices/audio/@driver", "devices/audio/@runtimeDir"],
    ),
    (
        "is for host devices of other types than 'pci' and 'usb', which are not supported",
        &[
            "devices/hostdev/@sgio",
            "devices/hostdev/@rawio",
            "devices/hostdev/@model",
            "devices/hostdev/@display",
            "devices/hostdev/@ramfb",
            "devices/hostdev/source/@protocol",
            "devices/hostdev/source/@name",
            "devices/hostdev/source/@wwpn",
            "devices/hostdev/source/adapter",
            "devices/hostdev/source/host",
            "devices/hostdev/source/auth",
            "devices/hostdev/source/initiator",
            "devices/hostdev/source/address/@controller",
            "devices/hostdev/source/address/@target",
            "devices/hostdev/source/address/@unit",
            "devices/hostdev/source/address/@uuid",
            "devices/hostdev/driver/@iommu",
            "devices/hostdev/driver/@ats",
            "devices/hostdev/driver/@packed",
            "devices/hostdev/driver/@page_per_vq",
            "devices/hostdev/readonly",
            "devices/hostdev/shareable",
        ],
    ),
    (
        "QEMU's arguments are written by its version: there are no capabilities to add or take away",
        &["qemu:capabilities"],
    ),
    ("devices are changed by <qemu:commandline>: -set, or -global", &["qemu:override"]),
    ("is not supported: what is deprecated is in QEMU's log", &["qemu:deprecation"]),
    ("whom a guest runs as is decided for all guests alike; labels of other models than 'dac' are kept", &["seclabel"]),
];

/// The same for what every device can have, by the way from the device.
const OF_DEVICES: &[(&str, &str)] = &[
    ("boot/@loadparm", "is for other processors than those of PCs"),
    ("address/zpci", "is for other processors than those of PCs"),
    ("address/@cssid", "is for other processors than those of PCs"),
    ("address/@ssid", "is for other processors than those of PCs"),
    ("address/@devno", "is for other processors than those of PCs"),
    ("address/@reg", "is for other processors than those of PCs"),
    ("address/@uuid", "is of an address that PCs do not have"),
    ("address/@device", "is of an address that PCs do not have"),
    ("source/clipboard", "is for <channel type='qemu-vdagent'>"),
    ("source/mouse", "is for <channel type='qemu-vdagent'>"),
    ("source/@tlsFromConfig", "is of another host's configuration: tls='yes' says it here"),
    (
        "source/seclabel",
        "whose files a guest gets is decided for all of its files alike; labels of other models than 'dac' are kept",
    ),
    ("rom/loadfile", "is no word of QEMU's"),
];

/// Why the element or attribute at that path does not act, if there is more to say.
pub(super) fn why(path: &str) -> Option<&'static str> {
    let found = REASONS.iter().find(|(_, paths)| paths.contains(&path)).map(|(reason, _)| *reason);
    let inner = path.strip_prefix("devices/").and_then(|path| Some(path.split_once('/')?.1));
    let of_any = || inner.and_then(|inner| OF_DEVICES.iter().find(|(way, _)| *way == inner)).map(|(_, reason)| *reason);
    found.or_else(of_any)
}

/// All that reasons are given for.
#[cfg(test)]
pub(super) fn paths() -> impl Iterator<Item = &'static str> {
    REASONS.iter().flat_map(|(_, paths)| paths.iter().copied())
}
