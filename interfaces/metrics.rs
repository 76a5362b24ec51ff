//! One scrape in the text of OpenMetrics 1.0: a family of numbers after the other, each with its lines for all machines.

use std::fmt::Write as _;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe;
use tokio::time::timeout;
use virt_model::driver::stats::{
    DiskStats, DiskTraffic, GroupStats, GuestMemory, InterfaceStats, Packets, ThreadStats, VcpuStats,
};
use virt_model::state::DomainState;
use virt_service::{MachineStats, Scrape};

/// What ends it.
const END: &str = "# EOF\n";

/// How long a reader may take nothing.
const UNREAD: Duration = Duration::from_secs(10);

/// Writes a scrape to whoever reads at the other end. It is given up where nobody does: the text then lacks its end.
pub async fn hand_over(scrape: Scrape, mut pipe: pipe::Sender) {
    for piece in pieces(&scrape.machines) {
        let mut rest = piece.as_bytes();
        while !rest.is_empty() {
            match timeout(UNREAD, pipe.write(rest)).await {
                Ok(Ok(count)) if count > 0 => rest = &rest[count..],
                _ => return,
            }
        }
    }
}

/// What its numbers are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// They only grow, as long as the guest is the same.
    Counter,
    /// They are as they are.
    Gauge,
}

/// A number.
enum Number {
    Whole(u64),
    /// In microseconds, told in seconds.
    Usec(u64),
}

/// A line: a label beside the machine's own, if there is one, and a number.
type Line = (Option<(&'static str, String)>, Number);

/// A family: its name without prefix, kind, help, and how its lines are found.
type Family = (&'static str, Kind, &'static str, fn(&MachineStats) -> Vec<Line>);

const FAMILIES: &[Family] = &[
    ("state", Kind::Gauge, "1 for the state that the machine is in.", state),
    ("sampled_timestamp_seconds", Kind::Gauge, "Nothing told of the machine is older.", |machine| {
        vec![(None, Number::Usec(machine.stats.sampled_at_usec))]
    }),
    ("cpu_seconds", Kind::Counter, "CPU time of the host that the guest has taken.", |machine| {
        cpu(machine, |user, system| user.saturating_add(system))
    }),
    ("cpu_user_seconds", Kind::Counter, "The part of it in hypervisor and guest.", |machine| {
        cpu(machine, |user, _| user)
    }),
    ("cpu_system_seconds", Kind::Counter, "The part of it in the host's kernel.", |machine| {
        cpu(machine, |_, system| system)
    }),
    ("memory_actual_bytes", Kind::Gauge, "Memory that the guest has.", |machine| memory(machine).0),
    ("memory_rss_bytes", Kind::Gauge, "Memory of the host that the hypervisor takes.", |machine| memory(machine).1),
    ("memory_available_bytes", Kind::Gauge, "Memory that the guest's system can use, as it says.", |machine| {
        said(machine, |guest| guest.available)
    }),
    ("memory_unused_bytes", Kind::Gauge, "Memory that nothing is in, as the guest says.", |machine| {
        said(machine, |guest| guest.unused)
    }),
    ("memory_usable_bytes", Kind::Gauge, "Memory that programs could have, as the guest says.", |machine| {
        said(machine, |guest| guest.usable)
    }),
    ("vcpu_seconds", Kind::Counter, "Time that a virtual CPU has run.", |machine| {
        vcpus(machine, |used| used.time_usec)
    }),
    ("vcpu_wait_seconds", Kind::Counter, "Time that it has waited for a CPU of the host.", |machine| {
        vcpus(machine, |used| used.wait_usec)
    }),
    ("disk_read_bytes", Kind::Counter, "Bytes read from a disk.", |machine| {
        traffic(machine, |disk| Number::Whole(disk.read.bytes))
    }),
    ("disk_written_bytes", Kind::Counter, "Bytes written to a disk.", |machine| {
        traffic(machine, |disk| Number::Whole(disk.write.bytes))
    }),
    ("disk_read_requests", Kind::Counter, "Reads of a disk.", |machine| {
        traffic(machine, |disk| Number::Whole(disk.read.requests))
    }),
    ("disk_write_requests", Kind::Counter, "Writes to a disk.", |machine| {
        traffic(machine, |disk| Number::Whole(disk.write.requests))
    }),
    ("disk_flush_requests", Kind::Counter, "Flushes of a disk.", |machine| {
        traffic(machine, |disk| Number::Whole(disk.flush_requests))
    }),
    ("disk_read_seconds", Kind::Counter, "Time that reads took, all together.", |machine| {
        traffic(machine, |disk| Number::Usec(disk.read.time_usec))
    }),
    ("disk_write_seconds", Kind::Counter, "Time that writes took, all together.", |machine| {
        traffic(machine, |disk| Number::Usec(disk.write.time_usec))
    }),
    ("disk_flush_seconds", Kind::Counter, "Time that flushes took, all together.", |machine| {
        traffic(machine, |disk| Number::Usec(disk.flush_usec))
    }),
    ("disk_errors", Kind::Counter, "Requests to a disk that failed.", |machine| {
        traffic(machine, |disk| Number::Whole(disk.errors))
    }),
    ("disk_capacity_bytes", Kind::Gauge, "Size of a disk as the guest sees it.", |machine| {
        size(machine, |disk| disk.capacity)
    }),
    ("disk_allocation_bytes", Kind::Gauge, "What its image takes on the host's storage.", |machine| {
        size(machine, |disk| disk.allocation)
    }),
    ("disk_physical_bytes", Kind::Gauge, "Length of its image.", |machine| size(machine, |disk| disk.physical)),
    ("interface_received_bytes", Kind::Counter, "Bytes that the guest received.", |machine| {
        received(machine, |packets| packets.bytes)
    }),
    ("interface_received_packets", Kind::Counter, "Packets that the guest received.", |machine| {
        received(machine, |packets| packets.packets)
    }),
    ("interface_received_errors", Kind::Counter, "Packets to the guest that were spoilt.", |machine| {
        received(machine, |packets| packets.errors)
    }),
    ("interface_received_drops", Kind::Counter, "Packets to the guest that were dropped.", |machine| {
        received(machine, |packets| packets.drops)
    }),
    ("interface_sent_bytes", Kind::Counter, "Bytes that the guest sent.", |machine| {
        sent(machine, |packets| packets.bytes)
    }),
    ("interface_sent_packets", Kind::Counter, "Packets that the guest sent.", |machine| {
        sent(machine, |packets| packets.packets)
    }),
    ("interface_sent_errors", Kind::Counter, "Packets of the guest that were spoilt.", |machine| {
        sent(machine, |packets| packets.errors)
    }),
    ("interface_sent_drops", Kind::Counter, "Packets of the guest that were dropped.", |machine| {
        sent(machine, |packets| packets.drops)
    }),
];

/// The text, a family at a time, so that never all of it is there; [`END`] is its last piece.
fn pieces(machines: &[MachineStats]) -> impl Iterator<Item = String> {
    FAMILIES.iter().map(|family| text(family, machines)).chain([END.to_owned()])
}

fn text((name, kind, help, lines): &Family, machines: &[MachineStats]) -> String {
    let (word, ending) = match kind {
        Kind::Counter => ("counter", "_total"),
        Kind::Gauge => ("gauge", ""),
    };
    let mut text = format!("# TYPE virt_domain_{name} {word}\n");
    if let Some(unit) = ["seconds", "bytes"].iter().find(|unit| name.ends_with(**unit)) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# UNIT virt_domain_{name} {unit}");
    }
    let _ = writeln!(text, "# HELP virt_domain_{name} {help}");
    for machine in machines {
        let labels = format!("name=\"{}\",uuid=\"{}\"", escaped(&machine.name), machine.uuid);
        for (label, number) in lines(machine) {
            let _ = write!(text, "virt_domain_{name}{ending}{{{labels}");
            if let Some((label, value)) = label {
                let _ = write!(text, ",{label}=\"{}\"", escaped(&value));
            }
            let _ = match number {
                Number::Whole(number) => writeln!(text, "}} {number}"),
                Number::Usec(usec) => writeln!(text, "}} {}.{:06}", usec / 1_000_000, usec % 1_000_000),
            };
        }
    }
    text
}

/// A label's value as it is written.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn groups(machine: &MachineStats) -> impl Iterator<Item = &GroupStats> {
    machine.stats.groups.iter().map(|group| &**group)
}

fn state(machine: &MachineStats) -> Vec<Line> {
    let line = |(state, _): (DomainState, _)| (Some(("state", state.as_str().to_owned())), Number::Whole(1));
    machine.stats.state.map(line).into_iter().collect()
}

fn cpu(machine: &MachineStats, usec: fn(u64, u64) -> u64) -> Vec<Line> {
    let line = |group: &GroupStats| match group {
        GroupStats::Cpu(cpu) => Some((None, Number::Usec(usec(cpu.user_usec, cpu.system_usec)))),
        _ => None,
    };
    groups(machine).filter_map(line).collect()
}

/// Lines of the memory: what the guest has, and what that takes.
fn memory(machine: &MachineStats) -> (Vec<Line>, Vec<Line>) {
    let known = groups(machine).find_map(|group| match group {
        GroupStats::Memory(memory) => Some((Number::Whole(memory.actual), Number::Whole(memory.rss))),
        _ => None,
    });
    known.map_or_else(Default::default, |(actual, rss)| (vec![(None, actual)], vec![(None, rss)]))
}

fn said(machine: &MachineStats, number: fn(&GuestMemory) -> Option<u64>) -> Vec<Line> {
    let line = |group: &GroupStats| match group {
        GroupStats::Memory(memory) => Some((None, Number::Whole(number(memory.guest.as_ref()?)?))),
        _ => None,
    };
    groups(machine).filter_map(line).collect()
}

fn vcpus(machine: &MachineStats, usec: fn(&ThreadStats) -> u64) -> Vec<Line> {
    let all = groups(machine).filter_map(|group| match group {
        GroupStats::Vcpus(vcpus) => Some(vcpus),
        _ => None,
    });
    let line =
        |vcpu: &VcpuStats| Some((Some(("vcpu", vcpu.number.to_string())), Number::Usec(usec(vcpu.thread.as_ref()?))));
    all.flatten().filter_map(line).collect()
}

/// A line for each disk of which the number is known.
fn disks(machine: &MachineStats, number: impl Fn(&DiskStats) -> Option<Number>) -> Vec<Line> {
    let all = groups(machine).filter_map(|group| match group {
        GroupStats::Disks(disks) => Some(disks),
        _ => None,
    });
    all.flatten().filter_map(|disk| Some((Some(("target", disk.target.clone())), number(disk)?))).collect()
}

fn traffic(machine: &MachineStats, number: fn(&DiskTraffic) -> Number) -> Vec<Line> {
    disks(machine, |disk| disk.traffic.as_ref().map(number))
}

fn size(machine: &MachineStats, bytes: fn(&DiskStats) -> Option<u64>) -> Vec<Line> {
    disks(machine, |disk| bytes(disk).map(Number::Whole))
}

/// A line for each card whose packets are counted: received, or sent.
fn packets(machine: &MachineStats, sent: bool, number: fn(&Packets) -> u64) -> Vec<Line> {
    let all = groups(machine).filter_map(|group| match group {
        GroupStats::Interfaces(cards) => Some(cards),
        _ => None,
    });
    let line = |card: &InterfaceStats| {
        let (to_guest, from_guest) = card.traffic?;
        let counted = if sent { from_guest } else { to_guest };
        Some((Some(("target", card.target.clone()?)), Number::Whole(number(&counted))))
    };
    all.flatten().filter_map(line).collect()
}

fn received(machine: &MachineStats, number: fn(&Packets) -> u64) -> Vec<Line> {
    packets(machine, false, number)
}

fn sent(machine: &MachineStats, number: fn(&Packets) -> u64) -> Vec<Line> {
    packets(machine, true, number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use virt_model::driver::stats::{CpuStats, Transfers};
    use virt_model::state::StateReason;
    use virt_service::Stats;

    #[test]
    fn a_scrape_reads_as_open_metrics_do() {
        let read = Transfers { requests: 1, bytes: 2, time_usec: 3_000_004 };
        let disk = DiskStats {
            target: "vda".into(),
            traffic: Some(DiskTraffic { read, ..DiskTraffic::default() }),
            capacity: Some(7),
            ..DiskStats::default()
        };
        let cpu = CpuStats { user_usec: 1_000_000, system_usec: 500_000 };
        let stats = Stats {
            sampled_at_usec: 1_700_000_000_000_001,
            state: Some((DomainState::Running, StateReason::Booted)),
            groups: vec![Arc::new(GroupStats::Cpu(cpu)), Arc::new(GroupStats::Disks(vec![disk]))],
        };
        let uuid = "6b8eb9b0-0f3c-4a9b-8d26-4d7d4c2c1f01".parse().unwrap();
        let text: String = pieces(&[MachineStats { name: "a\"\\b".into(), uuid, stats }]).collect();
        let labels = format!("name=\"a\\\"\\\\b\",uuid=\"{uuid}\"");
        for lines in [
            format!(
                "# TYPE virt_domain_state gauge\n# HELP virt_domain_state 1 for the state that the machine is in.\n\
                 virt_domain_state{{{labels},state=\"running\"}} 1\n"
            ),
            format!(
                "# TYPE virt_domain_cpu_seconds counter\n# UNIT virt_domain_cpu_seconds seconds\n# HELP virt_domain_cpu_seconds \
                 CPU time of the host that the guest has taken.\nvirt_domain_cpu_seconds_total{{{labels}}} 1.500000\n"
            ),
            format!("\nvirt_domain_disk_read_bytes_total{{{labels},target=\"vda\"}} 2\n"),
            format!("\nvirt_domain_disk_read_seconds_total{{{labels},target=\"vda\"}} 3.000004\n"),
            format!("\nvirt_domain_disk_capacity_bytes{{{labels},target=\"vda\"}} 7\n"),
            format!("\nvirt_domain_sampled_timestamp_seconds{{{labels}}} 1700000000.000001\n"),
        ] {
            assert!(text.contains(&lines), "{lines}\nis not in\n{text}");
        }
        assert!(text.ends_with("\n# EOF\n") && !text.contains("virt_domain_disk_physical_bytes{"), "{text}");
    }

    #[test]
    fn each_family_has_a_name_type_and_help_of_its_own() {
        let text: String = pieces(&[]).collect();
        let named = |word: &str| -> Vec<&str> {
            let lines = text.lines().filter_map(|line| line.strip_prefix(word)?.split_whitespace().next());
            lines.collect()
        };
        let (types, helps) = (named("# TYPE "), named("# HELP "));
        assert_eq!(types, helps);
        let different: std::collections::BTreeSet<&&str> = types.iter().collect();
        assert_eq!(different.len(), FAMILIES.len());
    }
}
