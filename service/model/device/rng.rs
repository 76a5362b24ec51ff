//! `<rng>`: where a guest gets randomness.

use super::chardev::{CharAddress, CharKind, CharSource, Log, Protocol};
use super::{DeviceInfo, PlainDriver, VirtioModel};
use crate::domain::part::element;
use crate::domain::value::choices;

element! {
    /// `<rng>`
    pub struct Rng {
        /// Generation.
        need "model" => model: VirtioModel,
        /// `<rate>`
        child "rate" => rate: Option<RngRate>,
        /// `<backend>`
        must "backend" => backend: RngBackend,
        /// `<driver>`
        child "driver" => driver: Option<PlainDriver>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

element! {
    /// `<rate>`
    pub struct RngRate {
        /// In each period.
        need "bytes" => bytes: u32,
        /// In milliseconds; 1000 if absent.
        attr "period" => period_ms: Option<u32>,
    }
}

choices! {
    /// Where randomness comes from.
    pub enum RngKind { Random = "random", Egd = "egd", Builtin = "builtin", }
}

element! {
    /// `<rng><backend>`
    pub struct RngBackend {
        /// Where from.
        need "model" => model: RngKind,
        /// Of `random`: the file.
        text => path: Option<String>,
        /// Of `egd`: what leads to the daemon.
        attr "type" => kind: Option<CharKind>,
        /// Of `egd`: where it is.
        children "source" => sources: Vec<CharAddress>,
        /// Of `egd`: what is spoken.
        child "protocol" => protocol: Option<Protocol>,
        /// Of `egd`: a file with all that passes.
        child "log" => log: Option<Log>,
    }
}

impl RngBackend {
    /// What leads to an entropy daemon.
    pub fn daemon(&self) -> CharSource {
        let (sources, protocol, log) = (self.sources.clone(), self.protocol.clone(), self.log.clone());
        CharSource { sources, protocol, log, ..CharSource::new(self.kind.unwrap_or_default()) }
    }
}
