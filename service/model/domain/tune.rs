//! `<cputune>`, `<memtune>`, `<blkiotune>`: what of the host a guest may use.

use super::part::element;
use super::size::Kib;
use super::value::{CpuSet, choices};

element! {
    /// `<cputune>`
    pub struct Cputune {
        /// Weight beside other guests.
        leaf "shares" => shares: Option<u64>,
        /// Of each vCPU, in microseconds.
        leaf "period" => period_us: Option<u64>,
        /// What each vCPU may run in a period; negative: no limit.
        leaf "quota" => quota_us: Option<i64>,
        /// Of the whole guest.
        leaf "global_period" => global_period_us: Option<u64>,
        /// Of the whole guest.
        leaf "global_quota" => global_quota_us: Option<i64>,
        /// Of all but vCPUs and I/O threads.
        leaf "emulator_period" => emulator_period_us: Option<u64>,
        /// Of all but vCPUs and I/O threads.
        leaf "emulator_quota" => emulator_quota_us: Option<i64>,
        /// Of each I/O thread.
        leaf "iothread_period" => iothread_period_us: Option<u64>,
        /// Of each I/O thread.
        leaf "iothread_quota" => iothread_quota_us: Option<i64>,
        /// Where vCPUs run.
        children "vcpupin" => vcpus: Vec<VcpuPin>,
        /// Where all but vCPUs and I/O threads runs.
        child "emulatorpin" => emulator: Option<EmulatorPin>,
        /// Where I/O threads run.
        children "iothreadpin" => iothreads: Vec<IothreadPin>,
        /// How vCPUs are scheduled.
        children "vcpusched" => vcpu_scheduling: Vec<VcpuScheduling>,
        /// How all but vCPUs and I/O threads is scheduled.
        child "emulatorsched" => emulator_scheduling: Option<EmulatorScheduling>,
        /// How I/O threads are scheduled.
        children "iothreadsched" => iothread_scheduling: Vec<IothreadScheduling>,
    }
}

element! {
    /// `<vcpupin>`
    pub struct VcpuPin {
        /// Which vCPU.
        need "vcpu" => vcpu: u32,
        /// The host's CPUs.
        need "cpuset" => cpus: CpuSet,
    }
}

element! {
    /// `<emulatorpin>`
    pub struct EmulatorPin {
        /// The host's CPUs.
        need "cpuset" => cpus: CpuSet,
    }
}

element! {
    /// `<iothreadpin>`
    pub struct IothreadPin {
        /// Which I/O thread.
        need "iothread" => iothread: u32,
        /// The host's CPUs.
        need "cpuset" => cpus: CpuSet,
    }
}

choices! {
    /// The kernel's scheduling policies.
    pub enum Policy { Batch = "batch", Idle = "idle", Fifo = "fifo", Rr = "rr", }
}

element! {
    /// `<vcpusched>`
    pub struct VcpuScheduling {
        /// Which vCPUs.
        need "vcpus" => vcpus: CpuSet,
        /// The policy.
        need "scheduler" => policy: Policy,
        /// 1 to 99, of `fifo` and `rr`.
        attr "priority" => priority: Option<i32>,
    }
}

element! {
    /// `<emulatorsched>`
    pub struct EmulatorScheduling {
        /// The policy.
        need "scheduler" => policy: Policy,
        /// 1 to 99, of `fifo` and `rr`.
        attr "priority" => priority: Option<i32>,
    }
}

element! {
    /// `<iothreadsched>`
    pub struct IothreadScheduling {
        /// Which I/O threads.
        need "iothreads" => iothreads: CpuSet,
        /// The policy.
        need "scheduler" => policy: Policy,
        /// 1 to 99, of `fifo` and `rr`.
        attr "priority" => priority: Option<i32>,
    }
}

element! {
    /// `<memtune>`: of the guest's process on the host.
    pub struct Memtune {
        /// Never more.
        child "hard_limit" => hard: Option<Kib>,
        /// Not more while the host needs memory.
        child "soft_limit" => soft: Option<Kib>,
        /// Never more, swap included.
        child "swap_hard_limit" => swap_hard: Option<Kib>,
    }
}

element! {
    /// `<blkiotune>`
    pub struct Blkiotune {
        /// Weight beside other guests.
        leaf "weight" => weight: Option<u32>,
        /// By the host's devices.
        children "device" => devices: Vec<BlkioDevice>,
    }
}

element! {
    /// `<blkiotune><device>`
    pub struct BlkioDevice {
        /// The host's device.
        leaf "path" => path: Option<String>,
        /// Weight beside other guests.
        leaf "weight" => weight: Option<u32>,
        /// Reads a second.
        leaf "read_iops_sec" => reads: Option<u64>,
        /// Writes a second.
        leaf "write_iops_sec" => writes: Option<u64>,
        /// Bytes read a second.
        leaf "read_bytes_sec" => bytes_read: Option<u64>,
        /// Bytes written a second.
        leaf "write_bytes_sec" => bytes_written: Option<u64>,
    }
}
