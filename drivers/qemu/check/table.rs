//! Which elements and attributes act, which are advisory, and why some that are known do not act. Whatever is in none of
//! these lists is refused by name.

use super::{Check, reasons};
use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;
use virt_model::xml::{Element, Place};

/// What becomes of an element or attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It does what it says.
    Acts,
    /// It is kept and shown, and asks for nothing at start; so is all below it. With the reason.
    Kept(&'static str),
    /// It is kept and shown, and a start is refused. With the reason.
    Refused(&'static str),
}

/// Elements that act, each with its attributes that do.
const ACTS: &[(&str, &str)] = &[
    ("", "type id"),
    ("name", ""),
    ("uuid", ""),
    ("memory", "unit dumpCore"),
    ("currentMemory", "unit"),
    ("maxMemory", "slots unit"),
    ("memoryBacking", ""),
    ("memoryBacking/hugepages", ""),
    ("memoryBacking/hugepages/page", "size unit nodeset"),
    ("memoryBacking/nosharepages", ""),
    ("memoryBacking/locked", ""),
    ("memoryBacking/source", "type"),
    ("memoryBacking/access", "mode"),
    ("memoryBacking/allocation", "mode threads"),
    ("memoryBacking/discard", ""),
    ("numatune", ""),
    ("numatune/memory", "mode nodeset placement"),
    ("numatune/memnode", "cellid mode nodeset"),
    ("cputune", ""),
    ("cputune/shares", ""),
    ("cputune/period", ""),
    ("cputune/quota", ""),
    ("cputune/global_period", ""),
    ("cputune/global_quota", ""),
    ("cputune/emulator_period", ""),
    ("cputune/emulator_quota", ""),
    ("cputune/iothread_period", ""),
    ("cputune/iothread_quota", ""),
    ("cputune/vcpupin", "vcpu cpuset"),
    ("cputune/emulatorpin", "cpuset"),
    ("cputune/iothreadpin", "iothread cpuset"),
    ("cputune/vcpusched", "vcpus scheduler priority"),
    ("cputune/emulatorsched", "scheduler priority"),
    ("cputune/iothreadsched", "iothreads scheduler priority"),
    ("memtune", ""),
    ("memtune/hard_limit", "unit"),
    ("memtune/soft_limit", "unit"),
    ("memtune/swap_hard_limit", "unit"),
    ("blkiotune", ""),
    ("blkiotune/weight", ""),
    ("blkiotune/device", ""),
    ("blkiotune/device/path", ""),
    ("blkiotune/device/weight", ""),
    ("blkiotune/device/read_iops_sec", ""),
    ("blkiotune/device/write_iops_sec", ""),
    ("blkiotune/device/read_bytes_sec", ""),
    ("blkiotune/device/write_bytes_sec", ""),
    ("vcpu", "current cpuset"),
    ("vcpus", ""),
    ("vcpus/vcpu", "id enabled hotpluggable order"),
    ("throttlegroups", ""),
    ("throttlegroups/throttlegroup", ""),
    ("iothreads", ""),
    ("iothreadids", ""),
    ("iothreadids/iothread", "id thread_pool_min thread_pool_max"),
    ("iothreadids/iothread/poll", "max grow shrink"),
    ("defaultiothread", "thread_pool_min thread_pool_max"),
    ("os", "firmware"),
    ("os/firmware", ""),
    ("os/firmware/feature", "enabled name"),
    ("os/type", "arch machine"),
    ("os/loader", "readonly secure type stateless format"),
    ("os/nvram", "template templateFormat format"),
    ("os/kernel", ""),
    ("os/initrd", ""),
    ("os/cmdline", ""),
    ("os/acpi", ""),
    ("os/acpi/table", "type"),
    ("os/boot", "dev"),
    ("os/bootmenu", "enable timeout"),
    ("os/bios", "useserial rebootTimeout"),
    ("os/smbios", "mode"),
    ("genid", ""),
    ("sysinfo", "type"),
    ("sysinfo/bios", ""),
    ("sysinfo/bios/entry", "name"),
    ("sysinfo/system", ""),
    ("sysinfo/system/entry", "name"),
    ("sysinfo/baseBoard", ""),
    ("sysinfo/baseBoard/entry", "name"),
    ("sysinfo/chassis", ""),
    ("sysinfo/chassis/entry", "name"),
    ("sysinfo/oemStrings", ""),
    ("sysinfo/oemStrings/entry", "file"),
    ("sysinfo/entry", "name file"),
    ("features", ""),
    ("features/acpi", ""),
    ("features/apic", "eoi"),
    ("features/hyperv", "mode"),
    ("features/hyperv/relaxed", "state"),
    ("features/hyperv/vapic", "state"),
    ("features/hyperv/spinlocks", "state retries"),
    ("features/hyperv/vpindex", "state"),
    ("features/hyperv/runtime", "state"),
    ("features/hyperv/synic", "state"),
    ("features/hyperv/stimer", "state"),
    ("features/hyperv/stimer/direct", "state"),
    ("features/hyperv/reset", "state"),
    ("features/hyperv/vendor_id", "state value"),
    ("features/hyperv/frequencies", "state"),
    ("features/hyperv/reenlightenment", "state"),
    ("features/hyperv/tlbflush", "state"),
    ("features/hyperv/tlbflush/direct", "state"),
    ("features/hyperv/tlbflush/extended", "state"),
    ("features/hyperv/emsr_bitmap", "state"),
    ("features/hyperv/xmm_input", "state"),
    ("features/hyperv/ipi", "state"),
    ("features/hyperv/evmcs", "state"),
    ("features/hyperv/avic", "state"),
    ("features/kvm", ""),
    ("features/kvm/hidden", "state"),
    ("features/kvm/hint-dedicated", "state"),
    ("features/kvm/poll-control", "state"),
    ("features/kvm/pv-ipi", "state"),
    ("features/kvm/dirty-ring", "state size"),
    ("features/pvspinlock", "state"),
    ("features/tcg", ""),
    ("features/tcg/tb-cache", "unit"),
    ("features/ps2", "state"),
    ("features/vmport", "state"),
    ("features/smm", "state"),
    ("features/smm/tseg", "unit"),
    ("features/pmu", "state"),
    ("features/vmcoreinfo", "state"),
    ("features/ioapic", "driver"),
    ("cpu", "mode match check migratable"),
    ("cpu/model", "vendor_id"),
    ("cpu/cache", "level mode"),
    ("cpu/maxphysaddr", "mode bits limit"),
    ("cpu/numa", ""),
    ("cpu/numa/cell", "id cpus memory unit memAccess discard"),
    ("cpu/numa/cell/distances", ""),
    ("cpu/numa/cell/distances/sibling", "id value"),
    ("cpu/vendor", ""),
    ("cpu/topology", "sockets dies clusters cores threads"),
    ("cpu/feature", "policy name"),
    ("clock", "offset adjustment basis timezone start"),
    ("clock/timer", "name tickpolicy present track frequency mode"),
    ("on_poweroff", ""),
    ("on_reboot", ""),
    ("on_crash", ""),
    ("pm", ""),
    ("pm/suspend-to-mem", "enabled"),
    ("pm/suspend-to-disk", "enabled"),
    ("devices", ""),
    ("devices/emulator", ""),
    ("devices/disk", "type device model"),
    (
        "devices/disk/driver",
        "name type cache error_policy rerror_policy io discard detect_zeroes iothread copy_on_read ioeventfd event_idx discard_no_unref queues queue_size iommu ats packed page_per_vq",
    ),
    ("devices/disk/driver/metadata_cache", ""),
    ("devices/disk/driver/metadata_cache/max_size", "unit"),
    ("devices/disk/source", "file dev pool volume protocol name query tls tlsHostname startupPolicy"),
    ("devices/disk/auth", "username"),
    ("devices/disk/auth/secret", "type uuid usage"),
    ("devices/disk/encryption", "format engine"),
    ("devices/disk/encryption/secret", "type uuid usage"),
    ("devices/disk/geometry", "cyls heads secs trans"),
    ("devices/disk/blockio", "logical_block_size physical_block_size discard_granularity"),
    ("devices/disk/iotune", ""),
    ("devices/disk/transient", ""),
    ("devices/disk/throttlefilters", ""),
    ("devices/disk/throttlefilters/throttlefilter", "group"),
    ("devices/disk/vendor", ""),
    ("devices/disk/product", ""),
    ("devices/disk/backingStore", "type"),
    ("devices/disk/backingStore/format", "type"),
    ("devices/disk/backingStore/format/metadata_cache", ""),
    ("devices/disk/backingStore/format/metadata_cache/max_size", "unit"),
    ("devices/disk/backingStore/source", "file dev protocol name query tls tlsHostname pool volume"),
    ("devices/disk/target", "dev bus removable rotation_rate dpofua"),
    ("devices/disk/readonly", ""),
    ("devices/disk/shareable", ""),
    ("devices/disk/serial", ""),
    ("devices/disk/wwn", ""),
    ("devices/controller", "type index model ports vectors"),
    ("devices/controller/pcihole64", "unit"),
    ("devices/controller/model", "name"),
    ("devices/controller/target", "chassisNr chassis port hotplug memReserve"),
    ("devices/controller/master", "startport"),
    ("devices/controller/driver", "queues iothread cmd_per_lun max_sectors ioeventfd iommu ats packed page_per_vq"),
    ("devices/filesystem", "type accessmode multidevs model fmode dmode"),
    ("devices/filesystem/driver", "type wrpolicy queue iommu ats packed page_per_vq"),
    ("devices/filesystem/binary", "path xattr"),
    ("devices/filesystem/binary/cache", "mode"),
    ("devices/filesystem/binary/sandbox", "mode"),
    ("devices/filesystem/binary/lock", "posix flock"),
    ("devices/filesystem/binary/thread_pool", "size"),
    ("devices/filesystem/binary/openfiles", "max"),
    ("devices/filesystem/source", "dir socket"),
    ("devices/filesystem/target", "dir"),
    ("devices/filesystem/readonly", ""),
    ("devices/interface", "type managed"),
    ("devices/interface/mac", "address"),
    ("devices/interface/source", "type network portgroup path bridge dev mode address port"),
    ("devices/interface/source/reconnect", "enabled timeout"),
    ("devices/interface/source/address", "type domain bus slot function"),
    ("devices/interface/source/local", "address port"),
    ("devices/interface/target", "dev managed"),
    ("devices/interface/bandwidth", ""),
    ("devices/interface/bandwidth/inbound", "average peak burst"),
    ("devices/interface/bandwidth/outbound", "average peak burst"),
    ("devices/interface/ip", "address family prefix"),
    ("devices/interface/backend", "type logFile"),
    ("devices/interface/tune", ""),
    ("devices/interface/tune/sndbuf", ""),
    ("devices/interface/port", "isolated"),
    ("devices/interface/vlan", "trunk"),
    ("devices/interface/vlan/tag", "id nativeMode"),
    ("devices/interface/filterref", "filter"),
    ("devices/interface/filterref/parameter", "name value"),
    ("devices/interface/coalesce", ""),
    ("devices/interface/coalesce/rx", ""),
    ("devices/interface/coalesce/rx/frames", "max"),
    ("devices/interface/portForward", "proto address dev"),
    ("devices/interface/portForward/range", "start end to exclude"),
    ("devices/interface/model", "type"),
    (
        "devices/interface/driver",
        "name txmode ioeventfd event_idx rss rss_hash_report queues rx_queue_size tx_queue_size iommu ats packed page_per_vq",
    ),
    ("devices/interface/driver/host", "csum gso tso4 tso6 ecn ufo mrg_rxbuf"),
    ("devices/interface/driver/guest", "csum tso4 tso6 ecn ufo"),
    ("devices/interface/link", "state"),
    ("devices/interface/mtu", "size"),
    ("devices/serial/target", "type port"),
    ("devices/serial/target/model", "name"),
    ("devices/parallel/target", "port"),
    ("devices/console/target", "type port"),
    ("devices/channel/target", "type name"),
    ("devices/channel/source/clipboard", "copypaste"),
    ("devices/channel/source/mouse", "mode"),
    ("devices/hostdev", "mode type managed"),
    ("devices/hostdev/source", "startupPolicy guestReset"),
    ("devices/hostdev/source/vendor", "id"),
    ("devices/hostdev/source/product", "id"),
    ("devices/hostdev/source/address", "type domain bus slot function device"),
    ("devices/hostdev/driver", "name"),
    ("devices/redirdev", "bus type"),
    ("devices/redirfilter", ""),
    ("devices/redirfilter/usbdev", "class vendor product version allow"),
    ("devices/smartcard", "mode type"),
    ("devices/input", "type bus model"),
    ("devices/input/driver", "iommu ats packed page_per_vq"),
    ("devices/input/source", "dev evdev grab grabToggle repeat"),
    (
        "devices/graphics",
        "type port tlsPort autoport websocket listen socket keymap passwd passwdValidTo connected sharePolicy powerControl p2p defaultMode",
    ),
    ("devices/graphics/listen", "type address network socket"),
    ("devices/graphics/channel", "name mode"),
    ("devices/graphics/image", "compression"),
    ("devices/graphics/jpeg", "compression"),
    ("devices/graphics/zlib", "compression"),
    ("devices/graphics/playback", "compression"),
    ("devices/graphics/gl", "enable rendernode"),
    ("devices/graphics/audio", "id"),
    ("devices/graphics/streaming", "mode"),
    ("devices/graphics/clipboard", "copypaste"),
    ("devices/graphics/mouse", "mode"),
    ("devices/graphics/filetransfer", "enable"),
    ("devices/sound", "model multichannel"),
    ("devices/sound/codec", "type"),
    ("devices/sound/audio", "id"),
    ("devices/audio", "id type serverName path timerPeriod tryMMap exclusive dspPolicy"),
    (
        "devices/audio/input",
        "mixingEngine fixedSettings voices bufferLength dev name streamName latency bufferCount tryPoll serverName clientName connectPorts exactName",
    ),
    ("devices/audio/input/settings", "frequency channels format"),
    (
        "devices/audio/output",
        "mixingEngine fixedSettings voices bufferLength dev name streamName latency bufferCount tryPoll serverName clientName connectPorts exactName",
    ),
    ("devices/audio/output/settings", "frequency channels format"),
    ("devices/video", ""),
    ("devices/video/driver", "iommu ats packed page_per_vq"),
    ("devices/video/model", "type ram vram vram64 vgamem heads primary blob edid"),
    ("devices/video/model/acceleration", "accel3d"),
    ("devices/video/model/resolution", "x y"),
    ("devices/tpm", "model"),
    ("devices/tpm/backend", "type version persistent_state debug"),
    ("devices/tpm/backend/encryption", "secret"),
    ("devices/tpm/backend/active_pcr_banks", ""),
    ("devices/tpm/backend/active_pcr_banks/sha1", ""),
    ("devices/tpm/backend/active_pcr_banks/sha256", ""),
    ("devices/tpm/backend/active_pcr_banks/sha384", ""),
    ("devices/tpm/backend/active_pcr_banks/sha512", ""),
    ("devices/tpm/backend/source", "type mode path"),
    ("devices/watchdog", "model action"),
    ("devices/memballoon", "model autodeflate freePageReporting"),
    ("devices/memballoon/stats", "period"),
    ("devices/memballoon/driver", "iommu ats packed page_per_vq"),
    ("devices/hub", "type"),
    ("devices/panic", "model"),
    ("devices/shmem", "name role"),
    ("devices/shmem/model", "type"),
    ("devices/shmem/size", "unit"),
    ("devices/shmem/server", "path"),
    ("devices/shmem/msi", "vectors ioeventfd"),
    ("devices/memory", "model access discard"),
    ("devices/memory/uuid", ""),
    ("devices/memory/source", ""),
    ("devices/memory/source/pagesize", "unit"),
    ("devices/memory/source/nodemask", ""),
    ("devices/memory/source/path", ""),
    ("devices/memory/source/alignsize", "unit"),
    ("devices/memory/source/pmem", ""),
    ("devices/memory/target", ""),
    ("devices/memory/target/size", "unit"),
    ("devices/memory/target/node", ""),
    ("devices/memory/target/label", ""),
    ("devices/memory/target/label/size", "unit"),
    ("devices/memory/target/block", "unit"),
    ("devices/memory/target/requested", "unit"),
    ("devices/memory/target/readonly", ""),
    ("devices/crypto", "model type"),
    ("devices/crypto/backend", "model queues"),
    ("devices/crypto/driver", "iommu ats packed page_per_vq"),
    ("devices/iommu", "model"),
    ("devices/iommu/driver", "intremap caching_mode eim iotlb aw_bits dma_translation"),
    ("devices/vsock", "model"),
    ("devices/vsock/cid", "auto address"),
    ("devices/vsock/driver", "iommu ats packed page_per_vq"),
    ("devices/rng", "model"),
    ("devices/rng/rate", "bytes period"),
    ("devices/rng/backend", "model type"),
    ("devices/rng/driver", "iommu ats packed page_per_vq"),
    ("qemu:commandline", ""),
    ("qemu:commandline/qemu:arg", "value"),
    ("qemu:commandline/qemu:env", "name value"),
];

/// What leads to a server and lets one in: the same for a disk and for each layer below it.
const SOURCE: &[(&str, &str)] = &[
    ("host", "name port transport socket"),
    ("snapshot", "name"),
    ("config", "file"),
    ("auth", "username"),
    ("auth/secret", "type uuid usage"),
    ("initiator", ""),
    ("initiator/iqn", "name"),
    ("encryption", "format engine"),
    ("encryption/secret", "type uuid usage"),
    ("ssl", "verify"),
    ("cookies", ""),
    ("cookies/cookie", "name"),
    ("readahead", "size"),
    ("timeout", "seconds"),
    ("reconnect", "delay"),
    ("identity", "username"),
];

/// Limits of a disk or of several: elements without attributes.
const IOTUNE: [&str; 2] = ["devices/disk/iotune/", "throttlegroups/throttlegroup/"];

/// The host's end of a serial port, console, channel or redirection: the same for all.
const CHARACTER: &[(&str, &str)] = &[
    ("", "type"),
    ("source", "mode host service path append channel tls"),
    ("source/reconnect", "enabled timeout"),
    ("protocol", "type"),
    ("log", "file append"),
];

/// What every device can have.
const DEVICE: &[(&str, &str)] = &[
    ("boot", "order"),
    ("alias", "name"),
    ("acpi", "index"),
    ("rom", "enabled bar file"),
    ("address", "type domain bus slot function multifunction controller target unit port iobase irq base"),
];

/// Kept, and nothing is asked of the driver.
const KEPT: &[(&str, &str)] = &[
    ("title", "for people"),
    ("description", "for people"),
    ("metadata", "for other programs"),
    ("vcpu/@placement", "static is what is done, auto is refused"),
    ("features/pae", "every CPU that is emulated has it"),
    ("cpu/model/@fallback", "a model is never replaced by another"),
    ("devices/disk/@snapshot", "for snapshots to come"),
    ("devices/disk/source/@index", "a name of the running guest's"),
    ("devices/disk/backingStore/@index", "a name of the running guest's"),
    ("devices/disk/target/@tray", "a state of the running guest's"),
    ("devices/disk/mirror", "a state of the running guest's"),
    ("devices/shmem/msi/@enabled", "interrupts of a doorbell are always used"),
    ("devices/interface/mac/@type", "where the address came from"),
    ("devices/interface/source/@portid", "a name of the running guest's"),
    ("devices/serial/@tty", "a name of the running guest's"),
    ("devices/console/@tty", "a name of the running guest's"),
    ("devices/memory/target/current", "a state of the running guest's"),
    ("devices/channel/target/@state", "a state of the running guest's"),
    ("devices/video/model/acceleration/@accel2d", "no card that is emulated has it"),
];

/// What is said of everything else.
const UNKNOWN: Standing = Standing::Refused("is not supported by the QEMU driver yet");

/// What becomes of the element or attribute (its last part begins with `@`) at a path without positions, e.g.
/// `devices/disk/driver/@cache`.
pub fn standing(path: &str) -> Standing {
    // A layer is described by the same words however deep it lies.
    if let Some((_, below)) = path.rsplit_once("/backingStore/backingStore") {
        return standing(&format!("devices/disk/backingStore{below}"));
    }
    if let Some(reason) = LISTED.kept.get(path) {
        return Standing::Kept(reason);
    }
    let (element, attribute) = parts(path);
    if LISTED.acts.get(element).is_some_and(|rows| rows.iter().any(|known| has(known, attribute))) {
        return Standing::Acts;
    }
    let below = |parent: &str| path.strip_prefix(parent).is_some_and(|inner| acts(SOURCE, inner));
    if below("devices/disk/source/") || below("devices/disk/backingStore/source/") {
        return Standing::Acts;
    }
    if IOTUNE.iter().find_map(|tune| path.strip_prefix(tune)).is_some_and(|limit| !limit.contains(['/', '@'])) {
        return Standing::Acts;
    }
    let Some((kind, inner)) = path.strip_prefix("devices/").map(|p| p.split_once('/').unwrap_or((p, ""))) else {
        return reasons::why(path).map_or(UNKNOWN, Standing::Refused);
    };
    let character = matches!(kind, "serial" | "parallel" | "console" | "channel" | "redirdev");
    // An entropy daemon is reached as the other end of a character device is.
    let daemon = path.strip_prefix("devices/rng/backend/").is_some_and(|inner| acts(CHARACTER, inner));
    if LISTED.devices.contains(kind) && (acts(DEVICE, inner) || character && acts(CHARACTER, inner) || daemon) {
        return Standing::Acts;
    }
    reasons::why(path).map_or(UNKNOWN, Standing::Refused)
}

/// The long lists, by what is looked for in them.
struct Listed {
    /// The reasons in [`KEPT`], by the paths.
    kept: HashMap<&'static str, &'static str>,
    /// The attributes in [`ACTS`], by the elements.
    acts: HashMap<&'static str, Vec<&'static str>>,
    /// The devices that have a row there.
    devices: HashSet<&'static str>,
}

static LISTED: LazyLock<Listed> = LazyLock::new(|| {
    let mut acts: HashMap<_, Vec<_>> = HashMap::new();
    ACTS.iter().for_each(|(element, attributes)| acts.entry(*element).or_default().push(*attributes));
    let devices = ACTS.iter().filter_map(|(element, _)| element.strip_prefix("devices/")?.split('/').next());
    Listed { kept: KEPT.iter().copied().collect(), acts, devices: devices.collect() }
});

fn acts(list: &[(&str, &str)], path: &str) -> bool {
    let (element, attribute) = parts(path);
    list.iter().any(|(known, attributes)| *known == element && has(attributes, attribute))
}

/// The element of a path, and the attribute that it leads to.
fn parts(path: &str) -> (&str, Option<&str>) {
    match path.rsplit_once('@') {
        Some((element, attribute)) => (element.trim_end_matches('/'), Some(attribute)),
        None => (path, None),
    }
}

/// Whether an attribute is among those of a row; without one, the element is meant.
fn has(attributes: &str, attribute: Option<&str>) -> bool {
    attribute.is_none_or(|attribute| attributes.split(' ').any(|known| known == attribute))
}

/// Holds every element and attribute of the definition against the lists.
pub(super) fn walk(check: &mut Check) {
    let tree = check.def.tree();
    look(check, &tree, "", &tree.origin);
}

fn look(check: &mut Check, element: &Element, path: &str, place: &Place) {
    for attribute in &element.attributes {
        let declares = attribute.name == "xmlns" || attribute.name.starts_with("xmlns:");
        let at = place.attribute(&attribute.name);
        if let (false, Standing::Refused(reason)) = (declares, standing(&join(path, &format!("@{}", attribute.name)))) {
            check.refuse(&at, sentence(&format!("'{}'", attribute.name), reason));
        }
    }
    for child in element.elements() {
        let child_path = join(path, &child.name);
        let at = child.place_below(place);
        match standing(&child_path) {
            Standing::Acts => look(check, child, &child_path, &at),
            Standing::Kept(_) => {}
            Standing::Refused(_) if is_what_we_do(child) => {}
            Standing::Refused(_) if is_foreign_label(child) => check.warn_if(true, &at, FOREIGN_LABEL),
            Standing::Refused(reason) => check.refuse(&at, sentence(&format!("<{}>", child.name), reason)),
        }
    }
}

/// A reason either goes on from its subject or is a sentence of its own.
fn sentence(subject: &str, reason: &str) -> String {
    let colon = if reason.starts_with("is ") { "" } else { ":" };
    format!("{subject}{colon} {reason}")
}

/// What is said of labels that no program here sets.
const FOREIGN_LABEL: &str = "labels of this security driver are kept for hosts that have it, and not set here";

/// Whether it is a label for a driver other than the one that says whom a guest runs as.
fn is_foreign_label(element: &Element) -> bool {
    element.name == "seclabel" && element.attr("model").is_none_or(|model| model != "dac")
}

/// Elements that libvirt writes of itself and that ask for no more than what is done anyway.
fn is_what_we_do(element: &Element) -> bool {
    let text = |name: &str| element.child(name).map(Element::text);
    match &*element.name {
        "resource" => text("partition").as_deref() == Some("/machine"),
        "seclabel" => match (element.attr("type"), element.attr("model")) {
            (Some("none"), _) => true,
            // A user of its own for the guest's process: what system mode does.
            (Some("dynamic"), Some("dac")) => true,
            _ => false,
        },
        _ => false,
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_list_names_is_refused() {
        assert_eq!(standing("devices/disk/driver/@cache"), Standing::Acts);
        assert_eq!(standing("@type"), Standing::Acts);
        assert_eq!(standing("devices/serial/source/@path"), Standing::Acts);
        assert_eq!(standing("devices/video/address/@slot"), Standing::Acts);
        assert_eq!(standing("devices/disk/backingStore/backingStore/backingStore/source/@file"), Standing::Acts);
        assert!(matches!(standing("title"), Standing::Kept(_)));
        for path in
            ["devices/disk/driver/iothreads", "cachetune", "devices/hostdev/@rawio", "devices/disk/source/@mode"]
        {
            assert!(matches!(standing(path), Standing::Refused(_)), "{path}");
        }
    }

    #[test]
    fn nothing_stands_in_two_lists() {
        for (path, _) in KEPT {
            assert!(!reasons::paths().any(|other| other == *path), "{path}");
            assert!(!acts(ACTS, path), "{path}");
        }
        for path in reasons::paths() {
            assert!(matches!(standing(path), Standing::Refused(_)), "{path} acts, so no reason against it is read");
        }
    }
}
