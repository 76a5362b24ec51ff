//! `<features>`: what the board and the hypervisor show the guest.

use super::part::element;
use super::value::choices;

element! {
    /// `<features>`
    pub struct Features {
        /// `<acpi/>`
        flag "acpi" => acpi: bool,
        /// `<apic>`
        child "apic" => apic: Option<Apic>,
        /// `<pae/>`
        flag "pae" => pae: bool,
        /// `<hyperv>`
        child "hyperv" => hyperv: Option<Hyperv>,
        /// `<kvm>`
        child "kvm" => kvm: Option<KvmFeatures>,
        /// `<vmport>`: VMware's backdoor port.
        child "vmport" => vmport: Option<State>,
        /// `<smm>`
        child "smm" => smm: Option<State>,
        /// `<pmu>`
        child "pmu" => pmu: Option<State>,
        /// `<vmcoreinfo>`
        child "vmcoreinfo" => vmcoreinfo: Option<State>,
        /// `<ioapic>`
        child "ioapic" => ioapic: Option<Ioapic>,
    }
}

element! {
    /// A feature that is on or off; on if the element is there and does not say.
    pub struct State {
        /// As said.
        on_off "state" => state: Option<bool>,
    }
}

impl State {
    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.state.unwrap_or(true)
    }
}

element! {
    /// `<apic>`
    pub struct Apic {
        /// End of interrupt shortcut.
        on_off "eoi" => eoi: Option<bool>,
    }
}

choices! {
    /// Who emulates the I/O APIC.
    pub enum IoapicDriver { Kvm = "kvm", Qemu = "qemu", }
}

element! {
    /// `<ioapic>`
    pub struct Ioapic {
        /// Who emulates it.
        attr "driver" => driver: Option<IoapicDriver>,
    }
}

choices! {
    /// Whether single enlightenments are listed.
    pub enum HypervMode { Custom = "custom", Passthrough = "passthrough", }
}

element! {
    /// `<hyperv>`: enlightenments for Windows guests.
    pub struct Hyperv {
        /// All the host has, or those listed.
        attr "mode" => mode: Option<HypervMode>,
        /// `<relaxed>`
        child "relaxed" => relaxed: Option<State>,
        /// `<vapic>`
        child "vapic" => vapic: Option<State>,
        /// `<spinlocks>`
        child "spinlocks" => spinlocks: Option<Spinlocks>,
        /// `<vpindex>`
        child "vpindex" => vpindex: Option<State>,
        /// `<runtime>`
        child "runtime" => runtime: Option<State>,
        /// `<synic>`
        child "synic" => synic: Option<State>,
        /// `<stimer>`
        child "stimer" => stimer: Option<Stimer>,
        /// `<reset>`
        child "reset" => reset: Option<State>,
        /// `<vendor_id>`
        child "vendor_id" => vendor_id: Option<VendorId>,
        /// `<frequencies>`
        child "frequencies" => frequencies: Option<State>,
        /// `<reenlightenment>`
        child "reenlightenment" => reenlightenment: Option<State>,
        /// `<tlbflush>`
        child "tlbflush" => tlbflush: Option<State>,
        /// `<ipi>`
        child "ipi" => ipi: Option<State>,
        /// `<evmcs>`
        child "evmcs" => evmcs: Option<State>,
        /// `<avic>`
        child "avic" => avic: Option<State>,
    }
}

element! {
    /// `<spinlocks>`
    pub struct Spinlocks {
        /// On or off.
        on_off "state" => state: Option<bool>,
        /// Attempts before the hypervisor is told.
        attr "retries" => retries: Option<u32>,
    }
}

element! {
    /// `<stimer>`
    pub struct Stimer {
        /// On or off.
        on_off "state" => state: Option<bool>,
        /// Direct delivery.
        child "direct" => direct: Option<State>,
    }
}

element! {
    /// `<vendor_id>`
    pub struct VendorId {
        /// On or off.
        on_off "state" => state: Option<bool>,
        /// At most 12 characters.
        attr "value" => value: Option<String>,
    }
}

element! {
    /// `<features><kvm>`
    pub struct KvmFeatures {
        /// KVM does not tell the guest that it is there.
        child "hidden" => hidden: Option<State>,
    }
}
