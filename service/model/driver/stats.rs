//! What a machine uses, has and does at a moment, in numbers: what [`super::Driver::stats`] gives, a group at a time. Sizes are
//! bytes, durations microseconds; what counts begins with the guest and only grows.

use crate::domain::value::Mac;

/// Numbers that are asked for, and taken, together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StatGroup {
    /// CPU time of the whole guest.
    Cpu,
    /// Memory.
    Memory,
    /// Each vCPU.
    Vcpus,
    /// Each disk.
    Disks,
    /// Each network card.
    Interfaces,
    /// Each I/O thread.
    Iothreads,
    /// How quickly the guest writes its memory.
    DirtyRate,
    /// What the host's CPUs and kernel count of the threads of its vCPUs.
    Perf,
}

impl StatGroup {
    /// All of them.
    pub const ALL: &[StatGroup] = &[
        StatGroup::Cpu,
        StatGroup::Memory,
        StatGroup::Vcpus,
        StatGroup::Disks,
        StatGroup::Interfaces,
        StatGroup::Iothreads,
        StatGroup::DirtyRate,
        StatGroup::Perf,
    ];

    /// Its word on the bus.
    pub fn as_str(self) -> &'static str {
        match self {
            StatGroup::Cpu => "cpu",
            StatGroup::Memory => "memory",
            StatGroup::Vcpus => "vcpus",
            StatGroup::Disks => "disks",
            StatGroup::Interfaces => "interfaces",
            StatGroup::Iothreads => "iothreads",
            StatGroup::DirtyRate => "dirty-rate",
            StatGroup::Perf => "perf",
        }
    }

    /// Whether its numbers take as long as it is looked on, which costs the guest time.
    pub fn is_looked_on(self) -> bool {
        matches!(self, StatGroup::DirtyRate | StatGroup::Perf)
    }
}

/// What a driver is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StatQuestion {
    /// The numbers.
    pub group: StatGroup,
    /// Whoever asks may have the host's files opened that the definition names: of a machine that is off, capacities may stand
    /// in them.
    pub may_open: bool,
}

/// The numbers of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupStats {
    /// CPU time of the whole guest.
    Cpu(CpuStats),
    /// Memory.
    Memory(MemoryStats),
    /// Each vCPU that there can be, in their order.
    Vcpus(Vec<VcpuStats>),
    /// Each disk, in the order of the definition.
    Disks(Vec<DiskStats>),
    /// Each network card, in the order of the definition.
    Interfaces(Vec<InterfaceStats>),
    /// Each I/O thread, in their order.
    Iothreads(Vec<IothreadStats>),
    /// How quickly the guest writes its memory.
    DirtyRate(DirtyRateStats),
    /// What the host's CPUs and kernel count of the threads of its vCPUs.
    Perf(PerfStats),
}

/// CPU time that the guest has taken of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// In the hypervisor and its guest.
    pub user_usec: u64,
    /// In the host's kernel.
    pub system_usec: u64,
}

/// Memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// What the guest has.
    pub actual: u64,
    /// What the hypervisor takes of the host's memory.
    pub rss: u64,
    /// What the guest says itself; `None` while it has said nothing.
    pub guest: Option<GuestMemory>,
}

/// What a guest says of its memory; what it does not say is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestMemory {
    /// When it said so, in microseconds since the epoch.
    pub said_at_usec: u64,
    /// All that its system can use.
    pub available: Option<u64>,
    /// What nothing is in.
    pub unused: Option<u64>,
    /// What programs could have without anything being swapped out.
    pub usable: Option<u64>,
    /// What was read from its swap.
    pub swap_in: Option<u64>,
    /// What was written to its swap.
    pub swap_out: Option<u64>,
    /// Page faults that had to wait for storage.
    pub major_faults: Option<u64>,
    /// Those that had not.
    pub minor_faults: Option<u64>,
    /// What of its disks is kept in memory.
    pub disk_caches: Option<u64>,
}

/// A vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuStats {
    /// From 0 on.
    pub number: u32,
    /// Its thread on the host; `None` while it is not plugged in.
    pub thread: Option<ThreadStats>,
}

/// A thread of the host's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadStats {
    /// What it has run.
    pub time_usec: u64,
    /// What it has waited for a CPU of the host's.
    pub wait_usec: u64,
    /// It sleeps.
    pub sleeps: bool,
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// Its name in the definition, e.g. `vda`.
    pub target: String,
    /// What was asked of it; `None` while the machine is off.
    pub traffic: Option<DiskTraffic>,
    /// What the guest sees; `None` if that cannot be told, or a drive is empty.
    pub capacity: Option<u64>,
    /// What its image takes on the host's storage.
    pub allocation: Option<u64>,
    /// How long its image is.
    pub physical: Option<u64>,
}

/// What was asked of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskTraffic {
    /// What was read.
    pub read: Transfers,
    /// What was written.
    pub write: Transfers,
    /// How often it was asked to have all on storage.
    pub flush_requests: u64,
    /// How long that took.
    pub flush_usec: u64,
    /// Requests that failed.
    pub errors: u64,
    /// The offset in the image whose first writing is told; 0: none.
    pub threshold: u64,
}

/// Requests in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfers {
    /// How many.
    pub requests: u64,
    /// What was moved.
    pub bytes: u64,
    /// How long they took, all together.
    pub time_usec: u64,
}

/// A network card.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceStats {
    /// Its hardware address.
    pub mac: Option<Mac>,
    /// The host's end of its cable, where that is a device of the host's.
    pub target: Option<String>,
    /// What went through, as the guest sees it: received, sent. `None` where nobody counts.
    pub traffic: Option<(Packets, Packets)>,
}

/// Packets in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packets {
    /// What was in them.
    pub bytes: u64,
    /// How many.
    pub packets: u64,
    /// Those that were spoilt.
    pub errors: u64,
    /// Those that were dropped.
    pub drops: u64,
}

/// How quickly a guest writes its memory: as much as a copy of it has to follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirtyRateStats {
    /// Of different pages, as far as the hypervisor's grain tells.
    pub bytes_per_second: u64,
    /// For how long it was looked on.
    pub period_usec: u64,
}

/// What the host has counted of the threads of a guest's vCPUs, of all together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PerfStats {
    /// For how long it was looked on.
    pub period_usec: u64,
    /// Each event that the host counts, and how often it came in that time.
    pub events: Vec<(PerfEvent, u64)>,
}

/// Something that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PerfEvent {
    /// Of the CPU's clock.
    Cycles,
    /// That were carried out.
    Instructions,
    /// To the CPU's last cache.
    CacheReferences,
    /// That were not in it.
    CacheMisses,
    /// Instructions that go on elsewhere.
    Branches,
    /// Those that the CPU had not foreseen.
    BranchMisses,
    /// Memory that was not there.
    PageFaults,
    /// Another thread had the CPU.
    ContextSwitches,
    /// To another CPU.
    CpuMigrations,
    /// Of the guest from its CPU to KVM.
    KvmExits,
}

impl PerfEvent {
    /// Its word on the bus.
    pub fn as_str(self) -> &'static str {
        match self {
            PerfEvent::Cycles => "cycles",
            PerfEvent::Instructions => "instructions",
            PerfEvent::CacheReferences => "cache-references",
            PerfEvent::CacheMisses => "cache-misses",
            PerfEvent::Branches => "branches",
            PerfEvent::BranchMisses => "branch-misses",
            PerfEvent::PageFaults => "page-faults",
            PerfEvent::ContextSwitches => "context-switches",
            PerfEvent::CpuMigrations => "cpu-migrations",
            PerfEvent::KvmExits => "kvm-exits",
        }
    }
}

/// An I/O thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IothreadStats {
    /// From 1 on.
    pub number: u32,
    /// Its thread on the host.
    pub thread: ThreadStats,
}
