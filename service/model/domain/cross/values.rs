//! What stands at one place can be no more and no less than this.

use super::rows::{Row, any, holds, select};
use crate::device::filter::{is_address, is_address_of_any_family, is_ipv6_address, is_mac};
use crate::domain::value::complain;
use crate::xml::{Element, Finding, Place, shorten};

/// What a value is held to.
enum Rule {
    /// A whole number from the first to the second.
    Number(i128, i128),
    /// A power of two from the first to the second.
    Power(i128, i128),
    /// A text of some form, and that form in words.
    Form(fn(&str) -> bool, &'static str),
}

/// A row: of those elements, under those conditions, what the selector leads to.
pub(super) struct Value {
    of: &'static str,
    when: &'static [&'static str],
    at: &'static str,
    rule: Rule,
    what: &'static str,
}

const fn value(
    of: &'static str,
    when: &'static [&'static str],
    at: &'static str,
    rule: Rule,
    what: &'static str,
) -> Value {
    Value { of, when, at, rule, what }
}

use Rule::{Form, Number, Power};

/// As much as QEMU counts in a second.
const MOST_A_SECOND: i128 = 1_000_000_000_000_000;
const U16: i128 = 65_535;
const U32: i128 = 4_294_967_295;
const U64: i128 = 18_446_744_073_709_551_615;

const CHARACTER: &str = "devices/serial|parallel|console|channel|redirdev";
const CHARACTER_SOURCE: &str = "devices/serial|parallel|console|channel|redirdev/source";
const AUDIO_END: &str = "devices/audio/input|output";

pub(super) const ROWS: &[Value] = &[
    value("os/bootmenu", &[], "@timeout", Number(0, U16), "time in milliseconds to show a boot menu"),
    value("os/bios", &[], "@rebootTimeout", Number(-1, U16), "time in milliseconds before booting is tried again"),
    value(
        "sysinfo/bios/entry",
        &["@name=date"],
        ".",
        Form(is_date, "mm/dd/yyyy, such as 01/31/2026"),
        "date of a BIOS",
    ),
    value("iothreadids/iothread", &[], "@thread_pool_max", Number(1, 2_147_483_647), "size of a thread pool"),
    value("defaultiothread", &[], "@thread_pool_max", Number(1, 2_147_483_647), "size of a thread pool"),
    value("vcpus/vcpu", &[], "@order", Number(1, U32), "turn at being plugged"),
    value("cpu/maxphysaddr", &[], "@bits", Number(32, 52), "width of addresses"),
    value("cpu/maxphysaddr", &[], "@limit", Number(32, 52), "width of addresses"),
    value("clock/timer", &[], "@frequency", Number(1, U64), "frequency"),
    value("devices/*", &["address/@type=pci"], "address/@domain", Number(0, 0), "PCI domain of a PC"),
    // Disks.
    value("devices/disk/driver", &[], "@queues", Number(1, 1024), "number of queues"),
    value("devices/disk/driver", &[], "@queue_size", Power(4, 1024), "size of a queue"),
    value("devices/disk/target", &[], "@rotation_rate", Number(0, U16), "rate of rotations a minute"),
    value("devices/disk/geometry", &[], "@cyls", Number(1, U16), "number of cylinders"),
    value("devices/disk/geometry", &[], "@heads", Number(1, 255), "number of heads"),
    value("devices/disk/geometry", &[], "@secs", Number(1, 255), "number of sectors"),
    value(
        "devices/interface/filterref/parameter",
        &["@name=IP"],
        "@value",
        Form(is_address, "an IPv4 address, such as 192.168.122.7"),
        "address of a filter",
    ),
    value(
        "devices/interface/filterref/parameter",
        &["@name=IPV6"],
        "@value",
        Form(is_ipv6_address, "an IPv6 address, such as fd00::7"),
        "address of a filter",
    ),
    value(
        "devices/interface/filterref/parameter",
        &["@name=DHCPSERVER"],
        "@value",
        Form(is_address_of_any_family, "an address, such as 192.168.122.1 or fd00::1"),
        "address of a filter",
    ),
    value(
        "devices/interface/filterref/parameter",
        &["@name=MAC"],
        "@value",
        Form(is_mac, "a hardware address, such as 52:54:00:12:34:56"),
        "hardware address of a filter",
    ),
    value(
        "devices/interface/filterref/parameter",
        &["@name=GATEWAY_MAC"],
        "@value",
        Form(is_mac, "a hardware address, such as 52:54:00:12:34:56"),
        "hardware address of a filter",
    ),
    value("devices/disk/source/host", &[], "@port", Number(1, U16), "TCP port"),
    value(
        "devices/disk",
        &["target/@bus=ide", "address/@type=drive"],
        "address/@bus",
        Number(0, 1),
        "channel of an IDE controller",
    ),
    value(
        "devices/disk",
        &["target/@bus=ide", "address/@type=drive"],
        "address/@target",
        Number(0, 0),
        "target on IDE",
    ),
    value(
        "devices/disk",
        &["target/@bus=ide", "address/@type=drive"],
        "address/@unit",
        Number(0, 1),
        "unit of an IDE channel",
    ),
    value(
        "devices/disk",
        &["target/@bus=sata", "address/@type=drive"],
        "address/@bus",
        Number(0, 0),
        "bus of a SATA controller",
    ),
    value(
        "devices/disk",
        &["target/@bus=sata", "address/@type=drive"],
        "address/@target",
        Number(0, 0),
        "target on SATA",
    ),
    value(
        "devices/disk",
        &["target/@bus=sata", "address/@type=drive"],
        "address/@unit",
        Number(0, 5),
        "port of a SATA controller",
    ),
    value(
        "devices/disk",
        &["target/@bus=fdc", "address/@type=drive"],
        "address/@controller",
        Number(0, 0),
        "floppy controller",
    ),
    value(
        "devices/disk",
        &["target/@bus=fdc", "address/@type=drive"],
        "address/@bus",
        Number(0, 0),
        "bus of a floppy controller",
    ),
    value(
        "devices/disk",
        &["target/@bus=fdc", "address/@type=drive"],
        "address/@target",
        Number(0, 0),
        "target on a floppy controller",
    ),
    value(
        "devices/disk",
        &["target/@bus=fdc", "address/@type=drive"],
        "address/@unit",
        Number(0, 1),
        "unit of a floppy controller",
    ),
    value(
        "devices/disk",
        &["target/@bus=scsi", "address/@type=drive"],
        "address/@target",
        Number(0, 255),
        "SCSI target",
    ),
    value(
        "devices/disk",
        &["target/@bus=scsi", "address/@type=drive"],
        "address/@unit",
        Number(0, 16_383),
        "SCSI unit",
    ),
    value("devices/disk/iotune", &[], "total_bytes_sec", Number(0, MOST_A_SECOND), "number of bytes a second"),
    value("devices/disk/iotune", &[], "read_bytes_sec", Number(0, MOST_A_SECOND), "number of bytes a second"),
    value("devices/disk/iotune", &[], "write_bytes_sec", Number(0, MOST_A_SECOND), "number of bytes a second"),
    value("devices/disk/iotune", &[], "total_iops_sec", Number(0, MOST_A_SECOND), "number of operations a second"),
    value("devices/disk/iotune", &[], "read_iops_sec", Number(0, MOST_A_SECOND), "number of operations a second"),
    value("devices/disk/iotune", &[], "write_iops_sec", Number(0, MOST_A_SECOND), "number of operations a second"),
    // Controllers.
    value("devices/controller", &["@type=virtio-serial"], "@ports", Number(1, 511), "number of ports"),
    value("devices/controller", &[], "target/@chassisNr", Number(1, 255), "number of a chassis"),
    value("devices/controller", &[], "target/@chassis", Number(0, 255), "number of a chassis"),
    value("devices/controller", &[], "target/@busNr", Number(1, 254), "number of a bus"),
    value("devices/controller", &[], "driver/@queues", Number(1, 1024), "number of queues"),
    value("devices/controller", &[], "driver/@max_sectors", Number(1, U32), "number of sectors"),
    value(
        "devices/controller",
        &[],
        "master/@startport",
        Form(|port| matches!(port, "0" | "2" | "4"), "0, 2 or 4"),
        "first port of a companion",
    ),
    // Network cards.
    value("devices/interface/mtu", &[], "@size", Number(68, U16), "MTU"),
    value("devices/interface/driver", &[], "@rx_queue_size", Power(256, 1024), "size of a queue"),
    value("devices/interface/driver", &[], "@tx_queue_size", Power(256, 1024), "size of a queue"),
    value("devices/interface/source", &[], "@port", Number(1, U16), "port"),
    value("devices/interface/source/local", &[], "@port", Number(1, U16), "port"),
    value("devices/interface/portForward/range", &[], "@start", Number(1, U16), "port"),
    value("devices/interface/portForward/range", &[], "@end", Number(1, U16), "port"),
    value("devices/interface/portForward/range", &[], "@to", Number(1, U16), "port"),
    // Character devices.
    value(
        CHARACTER_SOURCE,
        &[],
        "@service",
        Form(is_service, "a number from 0 to 65535, or the name of a service"),
        "port",
    ),
    value(CHARACTER, &[], "source/reconnect/@timeout", Number(1, U32), "number of seconds to wait before trying again"),
    value(
        "devices/serial",
        &["target/@type?isa-serial=isa-serial"],
        "target/@port",
        Number(0, 3),
        "serial port of a PC",
    ),
    value("devices/parallel", &[], "target/@port", Number(0, 2), "parallel port of a PC"),
    // Screens and sound.
    value("devices/video/model", &["@type=virtio|qxl"], "@heads", Number(1, 16), "number of screens"),
    value("devices/video/model", &["@type=qxl"], "@vram", Number(1024, U32), "amount of memory in KiB"),
    value("devices/video/model", &["@type=qxl"], "@vgamem", Power(1024, 1 << 22), "amount of memory in KiB"),
    value("devices/video/model/resolution", &[], "@x", Number(1, 32_768), "width of a screen"),
    value("devices/video/model/resolution", &[], "@y", Number(1, 32_768), "height of a screen"),
    value("devices/audio", &[], "@id", Number(1, U32), "number of an <audio>"),
    value("devices/audio", &[], "@timerPeriod", Number(1, U32), "time in microseconds"),
    value(AUDIO_END, &[], "@voices", Number(1, U32), "number of voices"),
    value(AUDIO_END, &[], "@bufferLength", Number(1, U32), "time in microseconds"),
    value(AUDIO_END, &[], "@bufferCount", Number(1, U32), "number of buffers"),
    value(AUDIO_END, &[], "settings/@frequency", Number(1, U32), "frequency"),
    value(AUDIO_END, &[], "settings/@channels", Number(1, U32), "number of channels"),
    // Small devices.
    value("devices/rng/rate", &[], "@bytes", Number(1, U32), "number of bytes"),
    value("devices/rng/rate", &[], "@period", Number(1, U32), "time in milliseconds"),
    value("devices/crypto/backend", &[], "@queues", Number(1, 1024), "number of queues"),
    value("devices/shmem/msi", &[], "@vectors", Number(1, U32), "number of interrupts"),
    value("devices/filesystem/driver", &[], "@queue", Power(1, 1024), "size of a queue"),
];

impl Row for Value {
    fn of(&self) -> &'static str {
        self.of
    }

    fn look(&self, element: &Element, at: &Place, log: &mut Vec<Finding>) {
        if !self.when.iter().all(|condition| holds(element, condition)) {
            return;
        }
        // Nearly all values fit, and nothing is to be said of them.
        if !any(element, self.at, &mut |text| !self.rule.fits(text)) {
            return;
        }
        for (place, text) in select(element, at, self.at).into_iter().filter(|(_, text)| !self.rule.fits(text)) {
            let expected = self.rule.expected();
            complain(log, &place, format!("'{}' is no {}: {expected}", shorten(&text), self.what));
        }
    }
}

impl Rule {
    fn fits(&self, text: &str) -> bool {
        match *self {
            Number(least, most) => whole(text).is_some_and(|n| (least..=most).contains(&n)),
            Power(least, most) => whole(text).is_some_and(|n| n.count_ones() == 1 && (least..=most).contains(&n)),
            Form(is, _) => is(text),
        }
    }

    /// What to do about a value that does not fit.
    fn expected(&self) -> String {
        match self {
            Number(least, most) if least == most => format!("it is {least}"),
            Number(least, most) => format!("give a number from {least} to {most}"),
            Power(least, most) => format!("give a power of two from {least} to {most}"),
            Form(_, form) => format!("give {form}"),
        }
    }
}

fn whole(text: &str) -> Option<i128> {
    match text.strip_prefix("0x") {
        Some(digits) => i128::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// As SMBIOS has it.
fn is_date(text: &str) -> bool {
    let parts: Vec<&str> = text.split('/').collect();
    let digits =
        |part: &str, counts: &[usize]| counts.contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit());
    let number = |part: &str| part.parse::<u32>().unwrap_or(0);
    let [month, day, year] = parts.as_slice() else { return false };
    digits(month, &[2])
        && digits(day, &[2])
        && digits(year, &[2, 4])
        && (1..=12).contains(&number(month))
        && (1..=31).contains(&number(day))
        && (year.len() == 2 || number(year) >= 1900)
}

/// A port's number, or a name that the host knows it by.
fn is_service(text: &str) -> bool {
    match text.parse::<i64>() {
        Ok(number) => (0..=65_535).contains(&number),
        Err(_) => {
            !text.is_empty()
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'+'))
        }
    }
}
