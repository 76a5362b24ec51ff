//! `<memory>`, `<currentMemory>`, `<vcpu>`, `<iothreads>`: how much of the machine there is.

use super::part::element;
use super::value::{Kib, choices};

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
        /// Online at boot; all if absent.
        attr "current" => current: Option<u32>,
        /// The most there can be.
        need_text => count: u32,
    }
}
