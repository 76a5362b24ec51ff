//! `<tpm>`: a chip that measures and keeps keys.

use super::DeviceInfo;
use super::chardev::SocketMode;
use crate::domain::part::element;
use crate::domain::value::choices;
use uuid::Uuid;

choices! {
    /// The guest's interface.
    pub enum TpmModel {
        Tis = "tpm-tis", Crb = "tpm-crb", Spapr = "tpm-spapr", SpaprProxy = "spapr-tpm-proxy",
    }
}

element! {
    /// `<tpm>`
    pub struct Tpm {
        /// The guest's interface.
        attr "model" => model: Option<TpmModel>,
        /// `<backend>`
        must "backend" => backend: TpmBackend,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

choices! {
    /// Who plays the chip.
    pub enum TpmKind { Passthrough = "passthrough", Emulator = "emulator", External = "external", }
}

choices! {
    /// Which specification.
    pub enum TpmVersion { V1_2 = "1.2", V2_0 = "2.0", }
}

element! {
    /// `<tpm><backend>`
    pub struct TpmBackend {
        /// Who plays the chip.
        need "type" => kind: TpmKind,
        /// Which specification.
        attr "version" => version: Option<TpmVersion>,
        /// Keep its state for a transient domain.
        yes_no "persistent_state" => persistent_state: Option<bool>,
        /// How much the emulator logs.
        attr "debug" => debug: Option<u32>,
        /// `<encryption>`: of the emulator's state.
        child "encryption" => encryption: Option<TpmEncryption>,
        /// `<device>`: of `passthrough`, the host's.
        child "device" => device: Option<TpmDevice>,
        /// `<active_pcr_banks>`
        child "active_pcr_banks" => banks: Option<PcrBanks>,
        /// `<source>`: where an emulator keeps its state, or an external one listens.
        child "source" => source: Option<TpmSource>,
    }
}

element! {
    /// `<tpm><backend><encryption>`
    pub struct TpmEncryption {
        /// The secret with the pass phrase.
        need "secret" => secret: Uuid,
    }
}

element! {
    /// `<tpm><backend><device>`
    pub struct TpmDevice {
        /// A device of the host's.
        need "path" => path: String,
    }
}

element! {
    /// `<active_pcr_banks>`: the algorithms in which the chip measures.
    pub struct PcrBanks {
        /// SHA-1
        flag "sha1" => sha1: bool,
        /// SHA-256
        flag "sha256" => sha256: bool,
        /// SHA-384
        flag "sha384" => sha384: bool,
        /// SHA-512
        flag "sha512" => sha512: bool,
    }
}

impl PcrBanks {
    /// Their names, in order.
    pub fn names(&self) -> Vec<&'static str> {
        let all = [("sha1", self.sha1), ("sha256", self.sha256), ("sha384", self.sha384), ("sha512", self.sha512)];
        all.into_iter().filter(|(_, active)| *active).map(|(name, _)| name).collect()
    }
}

choices! {
    /// What a TPM's source is.
    pub enum TpmSourceKind { Dir = "dir", File = "file", Unix = "unix", }
}

element! {
    /// `<tpm><backend><source>`
    pub struct TpmSource {
        /// What it is.
        attr "type" => kind: Option<TpmSourceKind>,
        /// Of a socket: who listens.
        attr "mode" => mode: Option<SocketMode>,
        /// Where it is.
        attr "path" => path: Option<String>,
    }
}
