//! Numbers of a played guest: it is always busy, and its disks and cards move some bytes each millisecond.

use super::guest::Machine;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::stats::{
    CpuStats, DirtyRateStats, DiskStats, DiskTraffic, GroupStats, InterfaceStats, MemoryStats, Packets, PerfEvent,
    PerfStats, StatGroup, ThreadStats, Transfers, VcpuStats,
};

/// What each disk holds, and what its image takes.
pub const CAPACITY: u64 = 1 << 30;
pub const ALLOCATION: u64 = 1 << 20;
/// What each guest writes of its memory in a second.
const DIRTIED: u64 = 1 << 20;

/// What the host counts is told at once; for everything else the hypervisor must listen.
pub async fn of_guest(machine: &Machine, def: &DomainDef, group: StatGroup) -> Result<GroupStats, DriverError> {
    machine.is_sampled();
    if !matches!(group, StatGroup::Cpu | StatGroup::Interfaces) {
        machine.listens().await?;
    }
    if !machine.lives() {
        return Err(DriverError::Gone);
    }
    let age = machine.age();
    let time_usec = u64::try_from(age.as_micros()).unwrap_or(u64::MAX);
    let moved = Transfers { requests: time_usec / 1000, bytes: time_usec / 1000 * 512, time_usec };
    let thread = ThreadStats { time_usec, wait_usec: 0, sleeps: false };
    Ok(match group {
        StatGroup::Cpu => GroupStats::Cpu(CpuStats { user_usec: time_usec, system_usec: 0 }),
        StatGroup::Memory => {
            let actual = def.current_memory_kib().saturating_mul(1024);
            GroupStats::Memory(MemoryStats { actual, rss: actual / 2, guest: None })
        }
        StatGroup::Vcpus => {
            let present = |number: u32| (number < def.vcpus()).then_some(thread);
            let vcpus = (0..def.maximum_vcpus()).map(|number| VcpuStats { number, thread: present(number) });
            GroupStats::Vcpus(vcpus.collect())
        }
        StatGroup::Disks => {
            let traffic = DiskTraffic { read: moved, write: moved, ..DiskTraffic::default() };
            GroupStats::Disks(disks(def, Some(traffic)))
        }
        StatGroup::Interfaces => {
            let packets = Packets { bytes: moved.bytes, packets: moved.requests, errors: 0, drops: 0 };
            let cards = def.devices.interfaces.iter().map(|card| InterfaceStats {
                mac: card.mac(),
                target: card.target.as_ref().and_then(|target| target.dev.clone()),
                traffic: Some((packets, packets)),
            });
            GroupStats::Interfaces(cards.collect())
        }
        StatGroup::Iothreads => GroupStats::Iothreads(Vec::new()),
        StatGroup::Perf => {
            let events = vec![(PerfEvent::ContextSwitches, moved.requests)];
            GroupStats::Perf(PerfStats { period_usec: 1_000_000, events })
        }
        StatGroup::DirtyRate => {
            GroupStats::DirtyRate(DirtyRateStats { bytes_per_second: DIRTIED, period_usec: 1_000_000 })
        }
    })
}

/// The sizes of the disks of a machine that is off.
pub fn at_rest(def: &DomainDef) -> GroupStats {
    GroupStats::Disks(disks(def, None))
}

fn disks(def: &DomainDef, traffic: Option<DiskTraffic>) -> Vec<DiskStats> {
    let played = def.devices.disks.iter().map(|disk| DiskStats {
        target: disk.target.dev.clone(),
        traffic,
        capacity: Some(CAPACITY),
        allocation: Some(ALLOCATION),
        physical: Some(ALLOCATION),
    });
    played.collect()
}
