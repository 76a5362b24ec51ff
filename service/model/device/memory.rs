//! `<memory>` among devices: memory that is plugged in.

use super::DeviceInfo;
use crate::domain::memory::Sharing;
use crate::domain::part::element;
use crate::domain::size::Kib;
use crate::domain::value::{CpuSet, choices};
use uuid::Uuid;

choices! {
    /// The device.
    pub enum MemoryModel {
        Dimm = "dimm", Nvdimm = "nvdimm", VirtioPmem = "virtio-pmem", VirtioMem = "virtio-mem", SgxEpc = "sgx-epc",
    }
}

element! {
    /// `<memory>`
    pub struct MemoryDevice {
        /// The device.
        need "model" => model: MemoryModel,
        /// Who sees what is written to it.
        attr "access" => access: Option<Sharing>,
        /// Its content is thrown away at the end.
        yes_no "discard" => discard: Option<bool>,
        /// Of an NVDIMM.
        leaf "uuid" => uuid: Option<Uuid>,
        /// `<source>`
        child "source" => source: Option<MemoryDeviceSource>,
        /// `<target>`
        must "target" => target: MemoryTarget,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

element! {
    /// `<memory><source>`: what it is made of on the host.
    pub struct MemoryDeviceSource {
        /// Huge pages of this size.
        child "pagesize" => page_size: Option<Kib>,
        /// The host's NUMA nodes.
        leaf "nodemask" => nodemask: Option<CpuSet>,
        /// The file that holds it.
        leaf "path" => path: Option<String>,
        /// Alignment of that.
        child "alignsize" => align_size: Option<Kib>,
        /// The file is persistent memory.
        flag "pmem" => pmem: bool,
    }
}

element! {
    /// `<memory><target>`: what the guest sees.
    pub struct MemoryTarget {
        /// How much.
        must "size" => size: Kib,
        /// The guest's NUMA cell.
        leaf "node" => node: Option<u32>,
        /// `<label>`: of an NVDIMM.
        child "label" => label: Option<MemoryLabel>,
        /// Granularity, of virtio-mem.
        child "block" => block: Option<Kib>,
        /// How much the guest is to have of it, of virtio-mem.
        child "requested" => requested: Option<Kib>,
        /// The guest cannot write to it.
        flag "readonly" => readonly: bool,
    }
}

element! {
    /// `<target><label>`
    pub struct MemoryLabel {
        /// Its area.
        must "size" => size: Kib,
    }
}
