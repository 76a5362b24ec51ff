//! Memory, NUMA, vCPUs one by one, I/O threads.

use super::Check;
use crate::qemu::command::memory_device;
use crate::qemu::complete::Board;
use std::collections::BTreeSet;
use virt_model::device::MemoryDevice;
use virt_model::device::memory::MemoryModel;
use virt_model::domain::cpu::{CacheMode, CpuMode, WidthMode};
use virt_model::domain::memory::{AllocationMode, MemoryBacking, MemorySourceKind, NumaMode, Placement};

impl Check<'_> {
    pub(super) fn memory(&mut self) {
        let def = self.def;
        def.memory_backing.iter().for_each(|backing| self.backing(backing));
        self.numa_policy();
        self.growth();
        def.devices.memories.iter().for_each(|device| self.memory_device(device));
        self.each_vcpu();
        self.io_threads();
        self.caches();
    }

    fn backing(&mut self, backing: &MemoryBacking) {
        let source = backing.source.as_ref().map(|source| source.kind);
        let in_file = source == Some(MemorySourceKind::File);
        if let Some(pages) = &backing.hugepages {
            let how = "huge pages are taken from the kernel directly (memfd); leave out <source type='file'/>";
            self.refuse_if(in_file, &pages.at, how);
            for page in &pages.pages {
                if let Err(why) = page.kib() {
                    self.refuse(&page.at, why);
                }
            }
        }
        let unused = "without <source type='file'/> there is no content to discard";
        self.warn_if(backing.discard && !in_file, &backing.at.child("discard"), unused);
        if let Some(allocation) = &backing.allocation {
            let late = allocation.mode == Some(AllocationMode::Ondemand) || allocation.mode.is_none();
            let place = allocation.at.attribute("threads");
            let how = "threads are for mode='immediate'";
            self.refuse_if(allocation.threads.is_some() && late && backing.hugepages.is_none(), &place, how);
        }
    }

    fn numa_policy(&mut self) {
        let def = self.def;
        let Some(tune) = &def.numatune else { return };
        if let Some(memory) = &tune.memory {
            let auto = memory.placement == Some(Placement::Auto);
            self.refuse_if(auto, &memory.at.attribute("placement"), "placement='auto' needs numad: give a nodeset");
            self.numa_mode(memory.mode, &memory.at.attribute("mode"));
            let none = !auto && memory.nodeset.is_none();
            self.refuse_if(none, &memory.at, "<memory> in <numatune> needs a nodeset");
        }
        let cells: BTreeSet<u32> = (0..).zip(def.numa_cells()).map(|(n, cell)| cell.id.unwrap_or(n)).collect();
        for node in &tune.nodes {
            self.numa_mode(Some(node.mode), &node.at.attribute("mode"));
            let unknown = !cells.contains(&node.cell);
            self.refuse_if(
                unknown,
                &node.at.attribute("cellid"),
                "the guest has no such NUMA cell: <cpu> with <numa> makes them",
            );
        }
    }

    fn numa_mode(&mut self, mode: Option<NumaMode>, place: &virt_model::xml::Place) {
        let restrictive = mode == Some(NumaMode::Restrictive);
        self.refuse_if(restrictive, place, "mode='restrictive' is not supported: mode='strict' holds to the nodes");
    }

    fn growth(&mut self) {
        let def = self.def;
        let acpi = def.features.as_ref().is_some_and(|features| features.acpi);
        let devices = !def.devices.memories.is_empty();
        match &def.max_memory {
            Some(most) => {
                self.refuse_if(!acpi, &most.at, "<maxMemory> needs <acpi/> in <features>");
                self.refuse_if(
                    !(1..=256).contains(&most.slots),
                    &most.at.attribute("slots"),
                    "there are 1 to 256 slots",
                );
                let small = most.size.0 < def.memory_kib();
                self.refuse_if(small, &most.at, "<maxMemory> is less than <memory>");
            }
            None => {
                let place = def.at.child("maxMemory");
                self.refuse_if(devices, &place, "memory devices need <maxMemory> with slots");
            }
        }
        let all = devices && def.initial_memory_kib() == 0;
        self.refuse_if(
            all,
            &def.at.child("memory"),
            "<memory> counts memory devices in, and nothing is left to boot with",
        );
    }

    fn memory_device(&mut self, device: &MemoryDevice) {
        let place = &device.at;
        let model = device.model;
        if model == MemoryModel::SgxEpc {
            self.refuse(&place.attribute("model"), "memory for SGX enclaves is not supported");
            return;
        }
        self.need_device(place, memory_device(model));
        let path = device.source.as_ref().is_some_and(|source| source.path.is_some());
        let needs = matches!(model, MemoryModel::Nvdimm | MemoryModel::VirtioPmem);
        let why = format!("model='{model}' {} <source> with a <path>", if needs { "needs" } else { "has no" });
        self.refuse_if(path != needs, place, &why);
        let cells = self.def.numa_cells().len() as u32;
        let node = device.target.node;
        let lost = node.is_some_and(|node| node >= cells.max(1));
        self.refuse_if(
            lost,
            &device.target.at.child("node"),
            "the guest has no such NUMA cell: <cpu> with <numa> makes them",
        );
        let for_mem = device.target.block.is_some() || device.target.requested.is_some();
        let odd = for_mem && model != MemoryModel::VirtioMem;
        self.refuse_if(odd, &device.target.at, "<block> and <requested> are for model='virtio-mem'");
        let asked = device.target.requested.is_some_and(|asked| asked > device.target.size);
        self.refuse_if(asked, &device.target.at.child("requested"), "more is requested than there is");
        if let Some(source) = &device.source {
            let apart = (source.align_size.is_some() || source.pmem) && model != MemoryModel::Nvdimm;
            self.refuse_if(apart, &source.at, "<alignsize> and <pmem/> are for model='nvdimm'");
            let odd = source.align_size.is_some_and(|size| !size.0.is_power_of_two());
            self.refuse_if(odd, &source.at.child("alignsize"), "an alignment is a power of two");
        }
        let readonly = device.target.readonly && model != MemoryModel::Nvdimm;
        self.refuse_if(readonly, &device.target.at.child("readonly"), "only an NVDIMM can be read-only");
    }

    fn each_vcpu(&mut self) {
        let Some(all) = &self.def.vcpus_each else { return };
        let (online, plugged) = self.def.vcpus_at_boot();
        let (count, said) = (online.len(), self.def.vcpus());
        let why = format!("{count} vCPUs are enabled, and <vcpu current=…> says {said}: make them the same");
        self.refuse_if(u32::try_from(count) != Ok(said), &all.at, &why);
        let fixed = online.iter().filter(|n| !plugged.contains(n));
        let gap = fixed.zip(0..).find(|(n, expected)| *n != expected).map(|(n, _)| *n);
        for vcpu in &all.vcpus {
            let place = vcpu.at.attribute("hotpluggable");
            let never = vcpu.hotpluggable == Some(false) && !online.contains(&vcpu.id);
            self.refuse_if(never, &place, "a vCPU that is not enabled is one that can be plugged in");
            let first = vcpu.id == 0 && vcpu.hotpluggable == Some(true);
            self.refuse_if(first, &place, "vCPU 0 is the board's: say hotpluggable='no'");
            let how =
                "the vCPUs that are not plugged in are the first ones: say hotpluggable='yes', or enable those before";
            self.refuse_if(gap == Some(vcpu.id), &place, how);
        }
        if !plugged.is_empty() {
            let kind = crate::qemu::command::plugged_cpu(self.def, self.caps);
            self.need_device(&all.at, &kind);
        }
    }

    fn io_threads(&mut self) {
        let def = self.def;
        let newer = self.caps.at_least(7, 1);
        for thread in def.iothread_ids.iter().flat_map(|ids| &ids.threads) {
            let pool = thread.pool_min.is_some() || thread.pool_max.is_some();
            self.refuse_if(pool && !newer, &thread.at, "the size of a thread pool needs QEMU 7.1");
        }
        let main = def.default_iothread.as_ref().filter(|_| !newer);
        if let Some(main) = main {
            self.refuse(&main.at, "<defaultiothread> needs QEMU 7.1");
        }
    }

    fn caches(&mut self) {
        let Some(cpu) = &self.def.cpu else { return };
        let host = cpu.mode == Some(CpuMode::HostPassthrough) && self.kvm;
        if let Some(cache) = &cpu.cache {
            let level = cache.level.is_some_and(|level| level != 3 || cache.mode != CacheMode::Emulate);
            self.refuse_if(level, &cache.at.attribute("level"), "a level is said of mode='emulate' only, and is 3");
            let passes = cache.mode == CacheMode::Passthrough && !host;
            let how = "the host's caches are shown with <cpu mode='host-passthrough'> and type='kvm' only";
            self.refuse_if(passes, &cache.at.attribute("mode"), how);
        }
        if let Some(width) = &cpu.address_width {
            let emulated = width.mode == WidthMode::Emulate;
            self.refuse_if(emulated && width.bits.is_none(), &width.at, "mode='emulate' needs bits");
            self.refuse_if(emulated && width.limit.is_some(), &width.at, "a limit is for mode='passthrough'");
            self.refuse_if(!emulated && width.bits.is_some(), &width.at, "bits are for mode='emulate'");
            let how = "the host's width is shown with <cpu mode='host-passthrough'> and type='kvm' only";
            self.refuse_if(!emulated && !host, &width.at.attribute("mode"), how);
        }
        if let Some(vendor) = cpu.model.as_ref().and_then(|model| model.vendor_id.as_deref()) {
            let odd = vendor.len() != 12 || !vendor.is_ascii() || vendor.contains(',');
            let place = cpu.model.as_ref().map_or(&cpu.at, |model| &model.at).attribute("vendor_id");
            self.refuse_if(odd, &place, "a vendor id has twelve ASCII characters and no comma");
        }
    }

    pub(super) fn features_of_the_board(&mut self) {
        let Some(features) = &self.def.features else { return };
        let place = &features.at;
        if let Some(tseg) = features.smm.as_ref().and_then(|smm| smm.tseg.as_ref()) {
            let on = features.smm.as_ref().is_some_and(|smm| smm.is_on());
            let how = "<tseg> needs <smm state='on'> and a q35 machine";
            self.refuse_if(!on || self.board != Board::Q35, &tseg.at, how);
            match tseg.mib() {
                Ok(1..=65_534) => {}
                Ok(_) => self.refuse(&tseg.at, "this is 1 to 65534 MiB"),
                Err(why) => self.refuse(&tseg.at, why),
            }
        }
        let code = features.tcg.is_some() && self.kvm;
        self.refuse_if(code, &place.child("tcg"), "<tcg> is for emulation (type='qemu')");
        let locks = features.pvspinlock.is_some() && !self.kvm;
        self.warn_if(locks, &place.child("pvspinlock"), "<pvspinlock> has no effect without KVM (type='qemu')");
        let ring = features.kvm.as_ref().and_then(|kvm| kvm.dirty_ring.as_ref());
        if let Some(ring) = ring.filter(|ring| ring.state != Some(false)) {
            let odd = !ring.size.is_some_and(|n| n.is_power_of_two() && (1024..=65_536).contains(&n));
            self.refuse_if(odd, &ring.at.attribute("size"), "the ring's size is a power of two from 1024 to 65536");
        }
        if features.ps2.as_ref().is_some_and(|ps2| !ps2.is_on()) {
            self.refuse_if(!self.caps.at_least(7, 0), &place.child("ps2"), "leaving out PS/2 needs QEMU 7.0");
            let ps2 = |input: &&virt_model::device::Input| input.bus == Some(virt_model::device::input::InputBus::Ps2);
            let used = self.def.devices.inputs.iter().find(ps2);
            if let Some(input) = used {
                self.refuse(&input.at, "it is on PS/2, which <ps2 state='off'/> leaves out");
            }
        }
    }
}
