//! Statistics in the words of the bus.

use std::collections::HashMap;
use virt_model::driver::stats::{
    CpuStats, DirtyRateStats, DiskStats, GroupStats, InterfaceStats, IothreadStats, MemoryStats, Packets, PerfStats,
    ThreadStats, Transfers, VcpuStats,
};
use virt_service::Stats;
use zbus::Variant;

/// An `a{sv}`.
pub type Numbers = HashMap<&'static str, Variant<'static>>;

/// The answer to `GetStats`.
pub fn told(stats: &Stats) -> Numbers {
    let mut told = Numbers::from([("sampled-at", Variant::from(stats.sampled_at_usec))]);
    if let Some((state, reason)) = stats.state {
        let words = [("state", Variant::from(state.as_str())), ("reason", Variant::from(reason.as_str()))];
        told.insert("state", Variant::from(Numbers::from(words)));
    }
    told.extend(stats.groups.iter().map(|group| named(group)));
    told
}

/// A group under its name.
fn named(group: &GroupStats) -> (&'static str, Variant<'static>) {
    match group {
        GroupStats::Cpu(stats) => ("cpu", Variant::from(numbers(cpu(stats)))),
        GroupStats::Memory(stats) => ("memory", Variant::from(numbers(memory(stats)))),
        GroupStats::Vcpus(all) => ("vcpus", each(all, vcpu)),
        GroupStats::Disks(all) => ("disks", each(all, disk)),
        GroupStats::Interfaces(all) => ("interfaces", each(all, interface)),
        GroupStats::Iothreads(all) => ("iothreads", each(all, iothread)),
        GroupStats::DirtyRate(stats) => ("dirty-rate", Variant::from(numbers(dirty_rate(stats)))),
        GroupStats::Perf(stats) => ("perf", Variant::from(numbers(perf(stats)))),
    }
}

fn each<T>(all: &[T], told: fn(&T) -> Numbers) -> Variant<'static> {
    Variant::from(all.iter().map(told).collect::<Vec<Numbers>>())
}

fn numbers(pairs: impl IntoIterator<Item = (&'static str, u64)>) -> Numbers {
    pairs.into_iter().map(|(key, number)| (key, Variant::from(number))).collect()
}

/// Those that are known.
fn known<const N: usize>(pairs: [(&'static str, Option<u64>); N]) -> impl Iterator<Item = (&'static str, u64)> {
    pairs.into_iter().filter_map(|(key, number)| Some((key, number?)))
}

fn cpu(stats: &CpuStats) -> [(&'static str, u64); 3] {
    let time = stats.user_usec.saturating_add(stats.system_usec);
    [("time-usec", time), ("user-usec", stats.user_usec), ("system-usec", stats.system_usec)]
}

fn memory(stats: &MemoryStats) -> impl Iterator<Item = (&'static str, u64)> {
    let said = stats.guest.unwrap_or_default();
    let guest = known([
        ("available", said.available),
        ("unused", said.unused),
        ("usable", said.usable),
        ("swap-in", said.swap_in),
        ("swap-out", said.swap_out),
        ("major-faults", said.major_faults),
        ("minor-faults", said.minor_faults),
        ("disk-caches", said.disk_caches),
        ("last-update", stats.guest.map(|guest| guest.said_at_usec)),
    ]);
    [("actual", stats.actual), ("rss", stats.rss)].into_iter().chain(guest)
}

fn dirty_rate(stats: &DirtyRateStats) -> [(&'static str, u64); 2] {
    [("bytes-per-second", stats.bytes_per_second), ("period-usec", stats.period_usec)]
}

fn perf(stats: &PerfStats) -> impl Iterator<Item = (&'static str, u64)> {
    let events = stats.events.iter().map(|(event, count)| (event.as_str(), *count));
    [("period-usec", stats.period_usec)].into_iter().chain(events)
}

fn thread(stats: &ThreadStats) -> [(&'static str, Variant<'static>); 2] {
    [("time-usec", Variant::from(stats.time_usec)), ("wait-usec", Variant::from(stats.wait_usec))]
}

fn vcpu(stats: &VcpuStats) -> Numbers {
    let state = if stats.thread.is_some() { "running" } else { "offline" };
    let mut told = Numbers::from([("number", Variant::from(stats.number)), ("state", Variant::from(state))]);
    if let Some(used) = &stats.thread {
        told.extend(thread(used));
        told.insert("halted", Variant::from(used.sleeps));
    }
    told
}

fn iothread(stats: &IothreadStats) -> Numbers {
    let mut told = Numbers::from([("number", Variant::from(stats.number))]);
    told.extend(thread(&stats.thread));
    told
}

fn disk(stats: &DiskStats) -> Numbers {
    let sizes = known([("allocation", stats.allocation), ("capacity", stats.capacity), ("physical", stats.physical)]);
    let mut told = numbers(sizes);
    told.insert("target", Variant::from(stats.target.clone()));
    if let Some(traffic) = &stats.traffic {
        let Transfers { requests, bytes, time_usec } = traffic.read;
        told.extend(numbers([("read-requests", requests), ("read-bytes", bytes), ("read-time-usec", time_usec)]));
        let Transfers { requests, bytes, time_usec } = traffic.write;
        told.extend(numbers([("write-requests", requests), ("write-bytes", bytes), ("write-time-usec", time_usec)]));
        told.extend(numbers([("flush-requests", traffic.flush_requests), ("flush-time-usec", traffic.flush_usec)]));
        told.extend(numbers([("errors", traffic.errors), ("threshold", traffic.threshold)]));
    }
    told
}

fn interface(stats: &InterfaceStats) -> Numbers {
    let mac = stats.mac.map(|mac| mac.to_string()).unwrap_or_default();
    let target = stats.target.clone().unwrap_or_default();
    let mut told = Numbers::from([("mac", Variant::from(mac)), ("target", Variant::from(target))]);
    if let Some((received, sent)) = stats.traffic {
        let Packets { bytes, packets, errors, drops } = received;
        told.extend(numbers([
            ("rx-bytes", bytes),
            ("rx-packets", packets),
            ("rx-errors", errors),
            ("rx-drops", drops),
        ]));
        let Packets { bytes, packets, errors, drops } = sent;
        told.extend(numbers([
            ("tx-bytes", bytes),
            ("tx-packets", packets),
            ("tx-errors", errors),
            ("tx-drops", drops),
        ]));
    }
    told
}
