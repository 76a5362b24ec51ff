//! Memory: what it is made of on the host, the guest's NUMA cells, memory devices. I/O threads.

use super::args::{List, Props, on_off};
use super::{Builder, id, list};
use serde_json::{Value, json};
use virt_model::device::AddressKind;
use virt_model::device::memory::{MemoryDevice, MemoryModel};
use virt_model::domain::cpu::NumaCell;
use virt_model::domain::memory::{AllocationMode, Hugepages, MemorySourceKind, NumaMode, Sharing};
use virt_model::domain::value::CpuSet;

/// The name of the main memory's backend on every PC board.
pub(super) const RAM: &str = "pc.ram";

/// What one piece of memory is made of.
#[derive(Default)]
struct Make {
    shared: Option<bool>,
    discard: bool,
    page_kib: Option<u64>,
    /// A file or folder it is kept in.
    path: Option<String>,
    /// It is taken from the host piece by piece, by its device.
    by_device: bool,
    /// A file's alignment in memory.
    align_kib: Option<u64>,
    /// The file is persistent memory of the host's.
    persistent: bool,
    policy: Option<(NumaMode, CpuSet)>,
}

impl Builder<'_> {
    pub(super) fn memory(&mut self) {
        let def = self.def;
        let most = def.max_memory.as_ref();
        let size = List::default().set("size", format!("{}k", def.initial_memory_kib()));
        let size = size.maybe("slots", most.map(|most| most.slots));
        self.args.pair("-m", size.maybe("maxmem", most.map(|most| format!("{}k", most.size.0))));
        if def.numa_cells().is_empty() {
            let make = self.make(None);
            self.backend(RAM, def.initial_memory_kib(), make);
        }
        for (n, cell) in (0..).zip(def.numa_cells()) {
            self.cell(cell.id.unwrap_or(n), cell);
        }
        for (n, cell) in (0..).zip(def.numa_cells()) {
            for sibling in cell.distances.iter().flat_map(|distances| &distances.siblings) {
                let dist = list("dist").set("src", cell.id.unwrap_or(n)).set("dst", sibling.id);
                self.args.pair("-numa", dist.set("val", sibling.value));
            }
        }
        let locked = def.memory_backing.as_ref().is_some_and(|backing| backing.locked);
        self.args.pair("-overcommit", List::default().set("mem-lock", on_off(locked)));
        self.io_threads();
    }

    fn cell(&mut self, number: u32, cell: &NumaCell) {
        let mut make = self.make(Some(number));
        make.shared = cell.access.map(|access| access == Sharing::Shared).or(make.shared);
        make.discard = cell.discard.unwrap_or(make.discard);
        let name = format!("ram-node{number}");
        self.backend(&name, cell.memory.0.0, make);
        let mut node = list("node").set("nodeid", number);
        for range in cell.cpus.iter().flat_map(ranges) {
            node = node.set("cpus", range);
        }
        self.args.pair("-numa", node.set("memdev", name));
    }

    /// What the memory of a cell is made of; of all of it, if there are none.
    fn make(&self, cell: Option<u32>) -> Make {
        let def = self.def;
        let backing = def.memory_backing.as_ref();
        let source = backing.and_then(|b| b.source.as_ref()).map(|source| source.kind);
        let tune = def.numatune.as_ref();
        let own = tune.and_then(|tune| tune.nodes.iter().find(|node| Some(node.cell) == cell));
        let all = tune.and_then(|tune| tune.memory.as_ref());
        let policy = match own {
            Some(node) => Some((node.mode, node.nodeset.clone())),
            None => all.and_then(|all| Some((all.mode.unwrap_or_default(), all.nodeset.clone()?))),
        };
        Make {
            shared: backing.and_then(|b| b.access.as_ref()).map(|access| access.mode == Sharing::Shared),
            discard: backing.is_some_and(|b| b.discard),
            page_kib: backing.and_then(|b| page_kib(b.hugepages.as_ref()?, cell)),
            path: (source == Some(MemorySourceKind::File))
                .then(|| self.place.runtime_dir.to_string_lossy().into_owned()),
            by_device: false,
            align_kib: None,
            persistent: false,
            policy,
        }
    }

    fn backend(&mut self, name: &str, kib: u64, make: Make) {
        let memfd = self.def.memory_backing.as_ref().and_then(|b| b.source.as_ref()).map(|source| source.kind)
            == Some(MemorySourceKind::Memfd);
        let kind = match &make.path {
            Some(_) => "memory-backend-file",
            // Whoever shares it gets it by a descriptor.
            None if memfd || make.page_kib.is_some() || make.shared == Some(true) => "memory-backend-memfd",
            None => "memory-backend-ram",
        };
        let props = Props::new("qom-type", kind).set("id", name).set("size", kib.saturating_mul(1024));
        let props = props.maybe("mem-path", make.path.as_deref()).maybe("share", make.shared);
        let props = props.maybe("align", make.align_kib.map(|kib| kib.saturating_mul(1024)));
        let props = props.maybe("pmem", make.persistent.then_some(true));
        let in_file = kind == "memory-backend-file";
        let props = props.maybe("discard-data", (make.discard && in_file).then_some(true));
        let huge = make.page_kib.map(|kib| kib.saturating_mul(1024));
        let props = props.maybe("hugetlb", huge.map(|_| true)).maybe("hugetlbsize", huge.filter(|size| *size > 0));
        let props = match make.by_device {
            true => props.set("reserve", false),
            false => self.allocation(props, huge.is_some()),
        };
        self.args.object(match make.policy {
            Some((mode, nodes)) => props.set("host-nodes", numbers(&nodes)).set("policy", policy(mode)),
            None => props,
        });
    }

    /// Huge pages are taken at once: a guest must not die for want of one later.
    fn allocation(&self, props: Props, huge: bool) -> Props {
        let allocation = self.def.memory_backing.as_ref().and_then(|backing| backing.allocation.as_ref());
        let at_once = match allocation.and_then(|allocation| allocation.mode) {
            Some(AllocationMode::Immediate) => Some(true),
            Some(AllocationMode::Ondemand) => None,
            None => huge.then_some(true),
        };
        let threads = allocation.and_then(|allocation| allocation.threads).filter(|_| at_once == Some(true));
        props.maybe("prealloc", at_once).maybe("prealloc-threads", threads)
    }

    pub(super) fn memory_devices(&mut self) {
        let def = self.def;
        for device in &def.devices.memories {
            self.memory_device(device);
        }
    }

    pub(super) fn memory_device(&mut self, device: &MemoryDevice) {
        let name = id(&device.info);
        let memory = format!("mem{name}");
        let source = device.source.as_ref();
        let mut make = self.make(device.target.node);
        make.shared = device.access.map(|access| access == Sharing::Shared).or(make.shared);
        make.discard = device.discard.unwrap_or(make.discard);
        make.page_kib = source.and_then(|s| s.page_size).map(|size| size.0).or(make.page_kib);
        if let Some(nodes) = source.and_then(|s| s.nodemask.clone()) {
            make.policy = Some((NumaMode::Strict, nodes));
        }
        make.by_device = device.model == MemoryModel::VirtioMem;
        if let Some(path) = source.and_then(|s| s.path.clone()) {
            self.open(&path, !device.target.readonly);
            make.path = Some(path);
            make.page_kib = None;
            make.align_kib = source.and_then(|s| s.align_size).map(|size| size.0);
            make.persistent = source.is_some_and(|s| s.pmem);
        }
        self.backend(&memory, device.target.size.0, make);
        let props = Props::device(memory_device(device.model)).maybe("node", device.target.node);
        let props = props.set("memdev", memory).set("id", name);
        let bytes = |kib: u64| kib.saturating_mul(1024);
        let target = &device.target;
        let props = match device.model {
            MemoryModel::VirtioMem => props
                .maybe("block-size", target.block.map(|size| bytes(size.0)))
                .maybe("requested-size", target.requested.map(|size| bytes(size.0))),
            MemoryModel::Nvdimm => props
                .maybe("label-size", target.label.as_ref().map(|label| bytes(label.size.0)))
                .maybe("uuid", device.uuid.map(|uuid| uuid.to_string()))
                .maybe("unarmed", target.readonly.then_some(true)),
            _ => props,
        };
        let place = match device.info.address.as_ref().map(|a| &a.kind) {
            Some(AddressKind::Dimm(dimm)) => Props::default().maybe("slot", dimm.slot).maybe("addr", dimm.base),
            _ => self.pci(&device.info),
        };
        self.args.device(props.extend(place));
    }

    fn io_threads(&mut self) {
        let def = self.def;
        for number in def.iothread_numbers() {
            let given = def.iothread_ids.iter().flat_map(|ids| &ids.threads).find(|thread| thread.id == number);
            let poll = given.and_then(|thread| thread.poll.as_ref());
            let object = Props::new("qom-type", "iothread").set("id", format!("iothread{number}"));
            let object = object
                .maybe("thread-pool-min", given.and_then(|thread| thread.pool_min))
                .maybe("thread-pool-max", given.and_then(|thread| thread.pool_max))
                .maybe("poll-max-ns", poll.and_then(|poll| poll.max_ns))
                .maybe("poll-grow", poll.and_then(|poll| poll.grow))
                .maybe("poll-shrink", poll.and_then(|poll| poll.shrink));
            self.args.object(object);
        }
        if let Some(main) = &def.default_iothread {
            let object = Props::new("qom-type", "main-loop").set("id", "main-loop");
            let object = object.maybe("thread-pool-min", main.pool_min).maybe("thread-pool-max", main.pool_max);
            self.args.object(object);
        }
    }
}

/// The size of a cell's huge pages in KiB, 0 for the host's usual one; `None` if it has small ones.
pub fn page_kib(pages: &Hugepages, cell: Option<u32>) -> Option<u64> {
    if pages.pages.is_empty() {
        return Some(0);
    }
    let of_cell = |nodes: &CpuSet| nodes.0.contains(&cell.unwrap_or(0));
    let own = pages.pages.iter().find(|page| page.nodeset.as_ref().is_some_and(of_cell));
    let page = own.or_else(|| pages.pages.iter().find(|page| page.nodeset.is_none()))?;
    page.kib().ok()
}

/// The device type.
pub fn memory_device(model: MemoryModel) -> &'static str {
    match model {
        MemoryModel::Dimm => "pc-dimm",
        MemoryModel::Nvdimm => "nvdimm",
        MemoryModel::VirtioPmem => "virtio-pmem-pci",
        MemoryModel::VirtioMem => "virtio-mem-pci",
        MemoryModel::SgxEpc => "sgx-epc",
    }
}

fn policy(mode: NumaMode) -> &'static str {
    match mode {
        NumaMode::Preferred => "preferred",
        NumaMode::Interleave => "interleave",
        NumaMode::Strict | NumaMode::Restrictive => "bind",
    }
}

fn numbers(nodes: &CpuSet) -> Value {
    json!(nodes.0)
}

/// `0-3`, `8`
fn ranges(set: &CpuSet) -> Vec<String> {
    use virt_model::domain::value::Value as _;
    set.to_text().split(',').map(str::to_owned).collect()
}
