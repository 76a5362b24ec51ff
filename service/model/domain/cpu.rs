//! `<cpu>`: model, features, topology.

use super::part::element;
use super::value::choices;

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
        /// Each `<feature>`.
        children "feature" => features: Vec<CpuFeature>,
    }
}

element! {
    /// `<cpu><model>`
    pub struct CpuModel {
        /// Whether a near one will do.
        attr "fallback" => fallback: Option<Fallback>,
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
