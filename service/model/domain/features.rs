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
        child "smm" => smm: Option<Smm>,
        /// `<pmu>`
        child "pmu" => pmu: Option<State>,
        /// `<vmcoreinfo>`
        child "vmcoreinfo" => vmcoreinfo: Option<State>,
        /// `<ioapic>`
        child "ioapic" => ioapic: Option<Ioapic>,
        /// `<pvspinlock>`: the guest's kernel does not spin on a lock whose holder does not run.
        child "pvspinlock" => pvspinlock: Option<State>,
        /// `<tcg>`
        child "tcg" => tcg: Option<TcgFeatures>,
        /// `<ps2>`: its keyboard controller.
        child "ps2" => ps2: Option<State>,
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
        child "tlbflush" => tlbflush: Option<Tlbflush>,
        /// `<ipi>`
        child "ipi" => ipi: Option<State>,
        /// `<evmcs>`
        child "evmcs" => evmcs: Option<State>,
        /// `<avic>`
        child "avic" => avic: Option<State>,
        /// `<emsr_bitmap>`
        child "emsr_bitmap" => emsr_bitmap: Option<State>,
        /// `<xmm_input>`
        child "xmm_input" => xmm_input: Option<State>,
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
    /// `<tlbflush>`
    pub struct Tlbflush {
        /// On or off.
        on_off "state" => state: Option<bool>,
        /// From nested guests.
        child "direct" => direct: Option<State>,
        /// Of parts.
        child "extended" => extended: Option<State>,
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
        /// vCPUs have CPUs of their own: the guest need not care for others.
        child "hint-dedicated" => hint_dedicated: Option<State>,
        /// The guest may ask the host not to poll.
        child "poll-control" => poll_control: Option<State>,
        /// Interrupts between CPUs without an exit each.
        child "pv-ipi" => pv_ipi: Option<State>,
        /// `<dirty-ring>`
        child "dirty-ring" => dirty_ring: Option<DirtyRing>,
    }
}

element! {
    /// `<kvm><dirty-ring>`: how changed pages are tracked.
    pub struct DirtyRing {
        /// On or off.
        on_off "state" => state: Option<bool>,
        /// Entries, a power of two.
        attr "size" => size: Option<u32>,
    }
}

element! {
    /// `<smm>`
    pub struct Smm {
        /// As said; on if absent.
        on_off "state" => state: Option<bool>,
        /// `<tseg>`: its memory, beyond what the board has by itself.
        child "tseg" => tseg: Option<Tseg>,
    }
}

impl Smm {
    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.state.unwrap_or(true)
    }
}

element! {
    /// `<smm><tseg>`: in MiB, unless it says another unit.
    pub struct Tseg {
        /// The unit.
        attr "unit" => unit: Option<String>,
        /// The number.
        need_text => number: String,
    }
}

impl Tseg {
    /// In MiB; the error is a sentence.
    pub fn mib(&self) -> Result<u64, String> {
        let bytes = super::size::scaled(&self.number, self.unit.as_deref().unwrap_or("MiB"))?;
        u64::try_from(bytes >> 20).map_err(|_| format!("{} is more than can be counted", self.number))
    }
}

element! {
    /// `<features><tcg>`: of emulation.
    pub struct TcgFeatures {
        /// Memory for translated code.
        child "tb-cache" => tb_cache: Option<super::size::Kib>,
    }
}
