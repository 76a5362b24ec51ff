//! `<memory>`, `<maxMemory>`, `<memoryBacking>`, `<numatune>`: how much memory there is and what it is made of. `<vcpu>`,
//! `<iothreads>`: how many threads.

use super::part::element;
use super::size::Kib;
use super::value::{CpuSet, choices};

element! {
    /// `<memory>`: RAM at boot.
    pub struct Memory {
        /// Include guest memory in QEMU's own core dumps.
        on_off "dumpCore" => dump_core: Option<bool>,
        /// How much.
        flat => size: Kib,
    }
}

choices! {
    /// Who places vCPUs on the host's CPUs.
    pub enum Placement { Static = "static", Auto = "auto", }
}

element! {
    /// `<vcpu>`
    pub struct Vcpu {
        /// Who places them.
        attr "placement" => placement: Option<Placement>,
        /// The host's CPUs that all of the guest runs on, where nothing else is said.
        attr "cpuset" => cpus: Option<CpuSet>,
        /// Online at boot; all if absent.
        attr "current" => current: Option<u32>,
        /// The most there can be.
        need_text => count: u32,
    }
}

element! {
    /// `<vcpus>`: each vCPU by itself.
    pub struct Vcpus {
        /// In the document's order.
        children "vcpu" => vcpus: Vec<VcpuState>,
    }
}

element! {
    /// `<vcpus><vcpu>`
    pub struct VcpuState {
        /// From 0.
        need "id" => id: u32,
        /// Online at boot.
        yes_no "enabled" => enabled: Option<bool>,
        /// Can be taken away again.
        yes_no "hotpluggable" => hotpluggable: Option<bool>,
        /// The turn at being plugged.
        attr "order" => order: Option<u32>,
    }
}

element! {
    /// `<maxMemory>`: how far memory can grow.
    pub struct MaxMemory {
        /// Places for memory devices.
        need "slots" => slots: u32,
        /// How much in all.
        flat => size: Kib,
    }
}

element! {
    /// `<memoryBacking>`: what the memory is made of on the host.
    pub struct MemoryBacking {
        /// `<hugepages>`
        child "hugepages" => hugepages: Option<Hugepages>,
        /// The host does not merge equal pages.
        flag "nosharepages" => nosharepages: bool,
        /// It is never swapped out.
        flag "locked" => locked: bool,
        /// `<source>`
        child "source" => source: Option<MemorySource>,
        /// `<access>`
        child "access" => access: Option<MemoryAccess>,
        /// `<allocation>`
        child "allocation" => allocation: Option<MemoryAllocation>,
        /// Its content is thrown away at the end, not written back.
        flag "discard" => discard: bool,
    }
}

element! {
    /// `<hugepages>`
    pub struct Hugepages {
        /// Sizes; the host's usual one if none is given.
        children "page" => pages: Vec<Hugepage>,
    }
}

element! {
    /// `<hugepages><page>`
    pub struct Hugepage {
        /// How large.
        attr "size" => size: Option<u64>,
        /// In what unit; KiB if absent.
        attr "unit" => unit: Option<String>,
        /// For which of the guest's NUMA cells; the others if absent.
        attr "nodeset" => nodeset: Option<CpuSet>,
    }
}

impl Hugepage {
    /// In KiB; the error is a sentence.
    pub fn kib(&self) -> Result<u64, String> {
        let size = self.size.ok_or("a size is needed")?;
        let bytes = super::size::scaled(&size.to_string(), self.unit.as_deref().unwrap_or("KiB"))?;
        u64::try_from(bytes / 1024).map_err(|_| "this is more than can be counted".to_owned())
    }
}

choices! {
    /// What memory is made of.
    pub enum MemorySourceKind { Anonymous = "anonymous", File = "file", Memfd = "memfd", }
}

element! {
    /// `<memoryBacking><source>`
    pub struct MemorySource {
        /// What it is made of.
        need "type" => kind: MemorySourceKind,
    }
}

choices! {
    /// Who sees what is written to it.
    pub enum Sharing { Private = "private", Shared = "shared", }
}

element! {
    /// `<memoryBacking><access>`
    pub struct MemoryAccess {
        /// Who sees what is written.
        need "mode" => mode: Sharing,
    }
}

choices! {
    /// When pages are taken from the host.
    pub enum AllocationMode { Ondemand = "ondemand", Immediate = "immediate", }
}

element! {
    /// `<memoryBacking><allocation>`
    pub struct MemoryAllocation {
        /// When.
        attr "mode" => mode: Option<AllocationMode>,
        /// By how many threads.
        attr "threads" => threads: Option<u32>,
    }
}

choices! {
    /// How the host's NUMA nodes are used.
    pub enum NumaMode {
        Strict = "strict", Preferred = "preferred", Interleave = "interleave", Restrictive = "restrictive",
    }
}

element! {
    /// `<numatune>`
    pub struct Numatune {
        /// `<memory>`: of all that has no rule of its own.
        child "memory" => memory: Option<NumaMemory>,
        /// `<memnode>`: of one of the guest's cells.
        children "memnode" => nodes: Vec<NumaNode>,
    }
}

element! {
    /// `<numatune><memory>`
    pub struct NumaMemory {
        /// How; strict if absent.
        attr "mode" => mode: Option<NumaMode>,
        /// Which of the host's nodes.
        attr "nodeset" => nodeset: Option<CpuSet>,
        /// `auto`: numad says which.
        attr "placement" => placement: Option<Placement>,
    }
}

element! {
    /// `<numatune><memnode>`
    pub struct NumaNode {
        /// The guest's cell.
        need "cellid" => cell: u32,
        /// How.
        need "mode" => mode: NumaMode,
        /// Which of the host's nodes.
        need "nodeset" => nodeset: CpuSet,
    }
}

element! {
    /// `<iothreadids>`
    pub struct IothreadIds {
        /// In the document's order.
        children "iothread" => threads: Vec<Iothread>,
    }
}

element! {
    /// `<iothread>`: a thread for disks' I/O.
    pub struct Iothread {
        /// From 1.
        need "id" => id: u32,
        /// Workers kept at the least.
        attr "thread_pool_min" => pool_min: Option<u32>,
        /// Workers at the most.
        attr "thread_pool_max" => pool_max: Option<u32>,
        /// `<poll>`
        child "poll" => poll: Option<IothreadPoll>,
    }
}

element! {
    /// `<iothread><poll>`: for how long it polls, in nanoseconds.
    pub struct IothreadPoll {
        /// At the most; 0: never.
        attr "max" => max_ns: Option<u64>,
        /// Factor by which it grows.
        attr "grow" => grow: Option<u64>,
        /// Divisor by which it shrinks.
        attr "shrink" => shrink: Option<u64>,
    }
}

element! {
    /// `<defaultiothread>`: the thread for all else.
    pub struct DefaultIothread {
        /// Workers kept at the least.
        attr "thread_pool_min" => pool_min: Option<u32>,
        /// Workers at the most.
        attr "thread_pool_max" => pool_max: Option<u32>,
    }
}
