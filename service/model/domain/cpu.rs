//! `<cpu>`: model, features, topology, NUMA cells.

use super::memory::Sharing;
use super::part::{Flat, element};
use super::size::{Kib, scaled};
use super::value::{CpuSet, choices, complain};
use crate::xml::{Element, Finding};

choices! {
    /// How the model is chosen.
    pub enum CpuMode {
        Custom = "custom", HostModel = "host-model", HostPassthrough = "host-passthrough", Maximum = "maximum",
    }
}

choices! {
    /// How strictly model and features are held to.
    pub enum CpuMatch { Exact = "exact", Minimum = "minimum", Strict = "strict", }
}

choices! {
    /// What is compared with what the hypervisor made of it.
    pub enum CpuCheck { None = "none", Partial = "partial", Full = "full", }
}

choices! {
    /// Whether a near model will do.
    pub enum Fallback { Allow = "allow", Forbid = "forbid", }
}

choices! {
    /// What is asked of a feature.
    pub enum FeaturePolicy {
        Require = "require", Force = "force", Optional = "optional", Disable = "disable", Forbid = "forbid",
    }
}

element! {
    /// `<cpu>`
    pub struct Cpu {
        /// `custom` if absent and a model is given.
        attr "mode" => mode: Option<CpuMode>,
        /// How strictly it is held to.
        attr "match" => matching: Option<CpuMatch>,
        /// What is checked at start.
        attr "check" => check: Option<CpuCheck>,
        /// Only features that can migrate.
        on_off "migratable" => migratable: Option<bool>,
        /// `<model>`
        child "model" => model: Option<CpuModel>,
        /// `<vendor>`
        leaf "vendor" => vendor: Option<String>,
        /// `<topology>`
        child "topology" => topology: Option<Topology>,
        /// `<cache>`
        child "cache" => cache: Option<CpuCache>,
        /// `<maxphysaddr>`
        child "maxphysaddr" => address_width: Option<AddressWidth>,
        /// Each `<feature>`.
        children "feature" => features: Vec<CpuFeature>,
        /// `<numa>`
        child "numa" => numa: Option<Numa>,
    }
}

impl Cpu {
    /// The same with model and features as a hypervisor made them of it: caches, widths, topology and cells stay.
    pub fn expanded(&self, made: &Cpu) -> Cpu {
        Cpu {
            mode: made.mode,
            matching: made.matching,
            check: made.check,
            migratable: made.migratable,
            model: made.model.clone(),
            vendor: made.vendor.clone(),
            features: made.features.clone(),
            ..self.clone()
        }
    }
}

choices! {
    /// Which caches the guest is told of.
    pub enum CacheMode { Emulate = "emulate", Passthrough = "passthrough", Disable = "disable", }
}

element! {
    /// `<cpu><cache>`
    pub struct CpuCache {
        /// Which level; all if absent.
        attr "level" => level: Option<u32>,
        /// The host's or made up.
        need "mode" => mode: CacheMode,
    }
}

choices! {
    /// Where the width comes from.
    pub enum WidthMode { Passthrough = "passthrough", Emulate = "emulate", }
}

element! {
    /// `<cpu><maxphysaddr>`: the width of physical addresses.
    pub struct AddressWidth {
        /// Where it comes from.
        need "mode" => mode: WidthMode,
        /// In bits.
        attr "bits" => bits: Option<u32>,
        /// At most, in bits.
        attr "limit" => limit: Option<u32>,
    }
}

element! {
    /// `<cpu><numa>`
    pub struct Numa {
        /// The guest's cells.
        children "cell" => cells: Vec<NumaCell>,
    }
}

element! {
    /// `<numa><cell>`
    pub struct NumaCell {
        /// From 0; its place in the list if absent.
        attr "id" => id: Option<u32>,
        /// Its vCPUs.
        attr "cpus" => cpus: Option<CpuSet>,
        /// Its memory.
        flat => memory: CellMemory,
        /// Who sees what is written to it.
        attr "memAccess" => access: Option<Sharing>,
        /// Its content is thrown away at the end.
        yes_no "discard" => discard: Option<bool>,
        /// `<distances>`
        child "distances" => distances: Option<Distances>,
    }
}

/// `memory` and `unit` of a cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CellMemory(pub Kib);

impl Flat for CellMemory {
    fn take(at: &mut Element, log: &mut Vec<Finding>) -> Self {
        let unit = at.take_attr("unit").map_or_else(|| "KiB".to_owned(), |unit| unit.value);
        let Some(size) = at.take_attr("memory") else {
            complain(log, &at.at, "<cell> needs the attribute 'memory'");
            return CellMemory::default();
        };
        match scaled(&size.value, &unit) {
            Ok(bytes) => CellMemory(Kib(bytes.div_ceil(1024) as u64)),
            Err(expected) => {
                complain(log, &size.at, expected);
                CellMemory::default()
            }
        }
    }

    fn put(&self, to: &mut Element) {
        to.set_attr("memory", self.0.0.to_string());
        to.set_attr("unit", "KiB");
    }
}

element! {
    /// `<cell><distances>`
    pub struct Distances {
        /// To each of the others, and to itself (10).
        children "sibling" => siblings: Vec<Sibling>,
    }
}

element! {
    /// `<distances><sibling>`
    pub struct Sibling {
        /// The other cell.
        need "id" => id: u32,
        /// 10 to 255.
        need "value" => value: u32,
    }
}

element! {
    /// `<cpu><model>`
    pub struct CpuModel {
        /// Whether a near one will do.
        attr "fallback" => fallback: Option<Fallback>,
        /// The maker the guest is told of, twelve characters.
        attr "vendor_id" => vendor_id: Option<String>,
        /// Its name; empty for host models.
        text => name: Option<String>,
    }
}

element! {
    /// `<cpu><topology>`; the product is the number of vCPUs.
    pub struct Topology {
        /// Sockets.
        need "sockets" => sockets: u32,
        /// Dies per socket.
        attr "dies" => dies: Option<u32>,
        /// Clusters per die.
        attr "clusters" => clusters: Option<u32>,
        /// Cores per die or cluster.
        need "cores" => cores: u32,
        /// Threads per core.
        need "threads" => threads: u32,
    }
}

impl Topology {
    /// vCPUs it makes.
    pub fn product(&self) -> u64 {
        [self.sockets, self.dies.unwrap_or(1), self.clusters.unwrap_or(1), self.cores, self.threads]
            .into_iter()
            .fold(1, |product: u64, n| product.saturating_mul(n.into()))
    }
}

element! {
    /// `<cpu><feature>`
    pub struct CpuFeature {
        /// What is asked; `require` if absent.
        attr "policy" => policy: Option<FeaturePolicy>,
        /// Its name.
        need "name" => name: String,
    }
}
