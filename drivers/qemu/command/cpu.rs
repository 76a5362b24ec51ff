//! `-cpu`: model, features, what Windows and Linux guests are told of the hypervisor.

use super::Builder;
use super::args::{List, on_off};
use crate::qemu::capabilities::Capabilities;
use virt_model::device::board::PanicModel;
use virt_model::domain::DomainDef;
use virt_model::domain::clock::TimerName;
use virt_model::domain::cpu::{CacheMode, Cpu, CpuCheck, CpuFeature, CpuMatch, CpuMode, FeaturePolicy, WidthMode};
use virt_model::domain::features::{Hyperv, HypervMode, State};

impl Builder<'_> {
    pub(super) fn cpu(&mut self) {
        let mut list = self.model();
        let full = self.def.cpu.as_ref().is_some_and(is_exact);
        let features = self.def.cpu.iter().flat_map(|cpu| &cpu.features);
        for feature in features.filter(|feature| !is_of_the_system(&feature.name)) {
            let known = knows_feature(self.caps, &feature.name);
            let wanted = match feature.policy.unwrap_or(FeaturePolicy::Require) {
                FeaturePolicy::Require | FeaturePolicy::Force => true,
                // What QEMU does not know it does not show.
                _ if !known => continue,
                FeaturePolicy::Disable | FeaturePolicy::Forbid => false,
                // Asked for, and QEMU leaves it out where it cannot be had; but not when all must be had.
                FeaturePolicy::Optional if full => continue,
                FeaturePolicy::Optional => true,
            };
            list = list.set(&qemu_name(&feature.name), on_off(wanted));
        }
        if full {
            list = list.set("enforce", "on");
        }
        if self.kvm {
            list = self.paravirtual(list);
        }
        let features = self.def.features.as_ref();
        let list = self.caches_and_widths(list);
        let list = list.maybe_on_off("pmu", features.and_then(|f| f.pmu.as_ref()).map(State::is_on));
        self.args.pair("-cpu", list);
    }

    fn caches_and_widths(&self, list: List) -> List {
        let Some(cpu) = &self.def.cpu else { return list };
        let vendor = cpu.model.as_ref().and_then(|model| model.vendor_id.as_deref());
        let list = list.maybe("vendor", vendor);
        let list = match cpu.cache.as_ref().map(|cache| cache.mode) {
            None => list,
            Some(CacheMode::Emulate) => list.set("l3-cache", "on"),
            Some(CacheMode::Passthrough) => list.set("host-cache-info", "on"),
            Some(CacheMode::Disable) => list.set("l3-cache", "off").set("host-cache-info", "off"),
        };
        match cpu.address_width.as_ref().map(|width| (width.mode, width.bits, width.limit)) {
            None => list,
            Some((WidthMode::Emulate, bits, _)) => list.maybe("phys-bits", bits),
            Some((WidthMode::Passthrough, _, limit)) => {
                list.set("host-phys-bits", "on").maybe("host-phys-bits-limit", limit)
            }
        }
    }

    fn model(&self) -> List {
        let list = List::new(model_name(self.def));
        let Some(cpu) = self.def.cpu.as_ref().filter(|cpu| cpu.mode.unwrap_or_default() != CpuMode::Custom) else {
            return list;
        };
        list.maybe_on_off("migratable", cpu.migratable.or((cpu.mode == Some(CpuMode::HostModel)).then_some(true)))
    }

    /// What only exists with KVM. (`check` warns where it is asked for without.)
    fn paravirtual(&self, list: List) -> List {
        let features = self.def.features.as_ref();
        let clock = |name| {
            let timers = self.def.clock.iter().flat_map(|clock| &clock.timers);
            timers.filter(|timer| timer.name == name).find_map(|timer| timer.present)
        };
        let list = list
            .maybe_on_off("kvmclock", clock(TimerName::Kvmclock))
            .maybe_on_off("kvm-pv-eoi", features.and_then(|f| f.apic.as_ref()?.eoi))
            .maybe_on_off("hv-time", clock(TimerName::Hypervclock));
        let timers = self.def.clock.iter().flat_map(|clock| &clock.timers);
        let frequency = timers.filter(|timer| timer.name == TimerName::Tsc).find_map(|timer| timer.frequency);
        let list = list.maybe("tsc-frequency", frequency);
        let hidden = features.and_then(|f| f.kvm.as_ref()?.hidden.as_ref()).is_some_and(State::is_on);
        let list = list.maybe("kvm", hidden.then_some("off"));
        let kvm = features.and_then(|f| f.kvm.as_ref());
        let said = |state: Option<&State>| state.map(State::is_on);
        let list = list
            .maybe_on_off("kvm-hint-dedicated", said(kvm.and_then(|kvm| kvm.hint_dedicated.as_ref())))
            .maybe_on_off("kvm-poll-control", said(kvm.and_then(|kvm| kvm.poll_control.as_ref())))
            .maybe_on_off("kvm-pv-ipi", said(kvm.and_then(|kvm| kvm.pv_ipi.as_ref())))
            .maybe_on_off("kvm-pv-unhalt", said(features.and_then(|f| f.pvspinlock.as_ref())));
        let crashes = self.def.devices.panics.iter().any(|panic| panic.model == Some(PanicModel::Hyperv));
        let list = list.maybe("hv-crash", crashes.then_some("on"));
        match features.and_then(|f| f.hyperv.as_ref()) {
            Some(hyperv) => enlightenments(hyperv).into_iter().fold(list, |list, (name, value)| list.set(name, &value)),
            None => list,
        }
    }
}

/// QEMU's name of the model.
fn model_name(def: &DomainDef) -> &str {
    let cpu = def.cpu.as_ref();
    match cpu.and_then(|cpu| cpu.mode).unwrap_or_default() {
        CpuMode::Custom => cpu.and_then(|cpu| cpu.model.as_ref()?.name.as_deref()).unwrap_or("qemu64"),
        CpuMode::Maximum => "max",
        // Without KVM there is no host CPU to show; the most that can be emulated is the nearest to it.
        _ if def.kind == "kvm" => "host",
        _ => "max",
    }
}

/// What is plugged in for a vCPU that the board does not have at boot.
pub fn plugged_cpu(def: &DomainDef, caps: &Capabilities) -> String {
    format!("{}-{}-cpu", model_name(def), caps.arch)
}

/// QEMU's name of a vCPU that is plugged in.
pub fn vcpu_name(number: u32) -> String {
    format!("vcpu{number}")
}

/// Whether that is QEMU's name of a vCPU.
pub fn is_vcpu(name: &str) -> bool {
    name.strip_prefix("vcpu").is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Where the vCPU of that number sits, in QEMU's words.
pub fn vcpu_place(def: &DomainDef, number: u32) -> [(&'static str, u32); 4] {
    let topology = def.cpu.as_ref().and_then(|cpu| cpu.topology.as_ref());
    let (dies, cores, threads) =
        topology.map_or((1, 1, 1), |t| (t.dies.unwrap_or(1).max(1), t.cores.max(1), t.threads.max(1)));
    let (core, die) = (number / threads, number / threads / cores);
    [("socket-id", die / dies), ("die-id", die % dies), ("core-id", core % cores), ("thread-id", number % threads)]
}

/// What a guest is told of Hyper-V, in QEMU's words, each with its value.
pub fn enlightenments(hyperv: &Hyperv) -> Vec<(&'static str, String)> {
    let on = || "on".to_owned();
    if hyperv.mode == Some(HypervMode::Passthrough) {
        return vec![("hv-passthrough", on())];
    }
    let plain = [
        ("hv-relaxed", &hyperv.relaxed),
        ("hv-vapic", &hyperv.vapic),
        ("hv-vpindex", &hyperv.vpindex),
        ("hv-runtime", &hyperv.runtime),
        ("hv-synic", &hyperv.synic),
        ("hv-reset", &hyperv.reset),
        ("hv-frequencies", &hyperv.frequencies),
        ("hv-reenlightenment", &hyperv.reenlightenment),
        ("hv-ipi", &hyperv.ipi),
        ("hv-evmcs", &hyperv.evmcs),
        ("hv-avic", &hyperv.avic),
        ("hv-emsr-bitmap", &hyperv.emsr_bitmap),
        ("hv-xmm-input", &hyperv.xmm_input),
    ];
    let is_on = |state: Option<&State>| state.is_some_and(State::is_on);
    let plain = plain.into_iter().filter(|(_, state)| is_on(state.as_ref()));
    let mut told: Vec<(&'static str, String)> = plain.map(|(name, _)| (name, on())).collect();
    if let Some(flush) = hyperv.tlbflush.as_ref().filter(|flush| flush.state != Some(false)) {
        told.push(("hv-tlbflush", on()));
        told.extend(is_on(flush.direct.as_ref()).then(|| ("hv-tlbflush-direct", on())));
        told.extend(is_on(flush.extended.as_ref()).then(|| ("hv-tlbflush-ext", on())));
    }
    if let Some(spinlocks) = hyperv.spinlocks.as_ref().filter(|spinlocks| spinlocks.state != Some(false)) {
        told.push(("hv-spinlocks", format!("{:#x}", spinlocks.retries.unwrap_or(4095))));
    }
    if let Some(stimer) = hyperv.stimer.as_ref().filter(|stimer| stimer.state != Some(false)) {
        told.push(("hv-stimer", on()));
        told.extend(is_on(stimer.direct.as_ref()).then(|| ("hv-stimer-direct", on())));
    }
    let vendor = hyperv.vendor_id.as_ref().filter(|vendor| vendor.state != Some(false));
    told.extend(vendor.and_then(|vendor| Some(("hv-vendor-id", vendor.value.clone()?))));
    told
}

/// Whether the guest gets that CPU with all that it has, or does not start.
pub fn is_exact(cpu: &Cpu) -> bool {
    cpu.check == Some(CpuCheck::Full) || cpu.matching == Some(CpuMatch::Strict)
}

/// The CPU of a guest that is started from memory which was captured with `then`. Of a model that stands for all that can be
/// had, what is not named was not there; so what is there since is left out.
pub fn pinned(cpu: Option<&Cpu>, then: &Cpu, caps: &Capabilities) -> Cpu {
    let mut pinned = cpu.cloned().unwrap_or_default().expanded(then);
    let model = pinned.model.as_ref().and_then(|model| model.name.as_deref());
    if !matches!(model, Some("host" | "max")) {
        return pinned;
    }
    let is_named = |name: &String| pinned.features.iter().any(|feature| is_same_feature(&feature.name, name));
    let since = caps.plain_cpu_features.iter().filter(|name| !FOLLOW_TOPOLOGY.contains(&&***name) && !is_named(name));
    let without = |name: &String| CpuFeature {
        policy: Some(FeaturePolicy::Disable),
        name: name.clone(),
        ..CpuFeature::default()
    };
    let since: Vec<CpuFeature> = since.map(without).collect();
    pinned.features.extend(since);
    pinned
}

/// What QEMU turns on by the number of cores and threads, whatever it is told.
const FOLLOW_TOPOLOGY: [&str; 2] = ["ht", "cmp-legacy"];

/// Whether a definition means that feature, which QEMU calls so.
pub fn is_same_feature(name: &str, qemus: &str) -> bool {
    qemu_name(name) == qemus
}

/// Whether it shows what the guest's system has turned on, so that nobody can ask for it.
pub fn is_of_the_system(feature: &str) -> bool {
    matches!(feature, "osxsave" | "ospke")
}

/// Whether this QEMU has such a feature, as far as it tells.
pub fn knows_feature(caps: &Capabilities, feature: &str) -> bool {
    caps.cpu_features.is_empty() || caps.cpu_features.contains(&qemu_name(feature))
}

/// Names of features for which QEMU has its own word.
fn qemu_name(feature: &str) -> String {
    let name = match feature {
        "cx8" | "cx16" => feature,
        "sse4_1" => "sse4.1",
        "sse4_2" => "sse4.2",
        "pclmuldq" => "pclmulqdq",
        "ffxsr" => "fxsr-opt",
        "rdtscp" => "rdtscp",
        other => return other.replace('_', "-"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn cpu(text: &str) -> Cpu {
        let text = format!("<domain type='qemu'><name>d</name><memory>1</memory><vcpu>2</vcpu>{text}</domain>");
        DomainDef::parse(&text).unwrap().cpu.unwrap()
    }

    #[test]
    fn x11_what_a_cpu_that_is_the_largest_has_now_and_had_not_is_left_out() {
        let mut caps = Capabilities::absent(Path::new("/q"), String::new());
        caps.plain_cpu_features = ["aes", "ht", "new", "sse4.1"].map(str::to_owned).into();
        let now = cpu("<cpu mode='host-model'><topology sockets='1' cores='2' threads='1'/></cpu>");
        let then = cpu("<cpu mode='custom' match='exact' check='full'><model fallback='forbid'>max</model>\
             <feature policy='require' name='aes'/><feature policy='require' name='sse4_1'/></cpu>");
        let pinned = pinned(Some(&now), &then, &caps);
        assert_eq!(pinned.topology.as_ref().map(|topology| topology.cores), Some(2), "the rest is the definition's");
        let without: Vec<&CpuFeature> =
            pinned.features.iter().filter(|feature| feature.policy == Some(FeaturePolicy::Disable)).collect();
        assert_eq!(without.iter().map(|feature| &*feature.name).collect::<Vec<_>>(), ["new"]);
        // Of a model by name, what is not named is as the model has it.
        let named = cpu("<cpu mode='custom' match='exact' check='full'><model>Skylake-Client</model></cpu>");
        assert_eq!(super::pinned(Some(&now), &named, &caps).features.len(), 0);
    }
}
