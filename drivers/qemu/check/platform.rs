//! Accelerator, board, firmware, CPU, clock.

use super::Check;
use crate::qemu::command::{enlightenments, is_exact, is_of_the_system, is_same_feature, knows_feature};
use crate::qemu::complete::Board;
use crate::qemu::firmware;
use virt_model::device::board::PanicModel;
use virt_model::domain::LifecycleAction;
use virt_model::domain::clock::{Clock, ClockOffset, TickPolicy, Timer, TimerName, TimerTrack};
use virt_model::domain::cpu::{Cpu, CpuMatch, CpuMode, FeaturePolicy};
use virt_model::domain::features::Smm;
use virt_model::domain::memory::Placement;
use virt_model::domain::os::LoaderKind;

const NO_EFFECT: &str = "has no effect without KVM (type='qemu')";

impl Check<'_> {
    pub(super) fn platform(&mut self) {
        self.accelerator();
        self.machine();
        self.firmware();
        self.size();
        self.processor();
        self.paravirtual();
        self.clock();
        self.lifecycle();
    }

    fn accelerator(&mut self) {
        let place = self.def.at.attribute("type");
        match (&*self.def.kind, &self.caps.kvm) {
            ("kvm", Err(why)) => {
                let why = format!("type='kvm' cannot be run: {why}; use type='qemu' for emulation, or another host");
                self.refuse(&place, why);
            }
            ("kvm" | "qemu", _) => {}
            (other, _) => {
                self.refuse(&place, format!("the QEMU driver runs type='kvm' and type='qemu', not '{other}'"))
            }
        }
        if !self.caps.at_least(6, 2) {
            let (major, minor, _) = self.caps.version;
            let place = self.def.devices.at.child("emulator");
            self.refuse(&place, format!("QEMU {major}.{minor} is too old, 6.2 or newer is needed"));
        }
    }

    fn machine(&mut self) {
        let kind = &self.def.os.kind;
        if kind.name != "hvm" {
            self.refuse(&kind.at, format!("the QEMU driver runs os type 'hvm', not '{}'", kind.name));
        }
        let arch = kind.arch.as_deref().unwrap_or("x86_64");
        let emulated = if self.caps.arch == "i386" { "i686" } else { &*self.caps.arch };
        if arch != emulated && (arch, emulated) != ("i686", "x86_64") {
            let binary = self.caps.binary.display();
            self.refuse(&kind.at.attribute("arch"), format!("{binary} emulates {emulated}, not {arch}"));
        }
        let machine = kind.machine.as_deref().unwrap_or_default();
        let place = kind.at.attribute("machine");
        if self.caps.machine(machine).is_none() {
            let binary = self.caps.binary.display();
            self.refuse(
                &place,
                format!("{binary} has no machine '{machine}'; the alias 'q35' or 'pc' names its newest"),
            );
        } else if self.board == Board::Other {
            self.refuse(&place, format!("machine '{machine}' is not supported yet, only pc-q35-… and pc-i440fx-… are"));
        }
    }

    fn firmware(&mut self) {
        let os = &self.def.os;
        let found = os.loader.as_ref().is_some_and(|loader| loader.path.is_some());
        if let Some(why) = firmware::missing(self.def, &self.caps.firmware) {
            self.refuse(&os.at.attribute("firmware"), why);
        }
        let smm = self.def.features.as_ref().and_then(|f| f.smm.as_ref()).is_some_and(Smm::is_on);
        if let Some(loader) = &os.loader {
            let flash = loader.kind == Some(LoaderKind::Pflash);
            let unsaid = loader.path.is_none() && os.firmware.is_none();
            let how = "<loader> needs a path, or <os firmware='efi'> to pick one";
            self.refuse_if(unsaid, &loader.at, how);
            let writable = flash && loader.readonly == Some(false);
            self.refuse_if(
                writable,
                &loader.at.attribute("readonly"),
                "firmware code that the guest may write is not supported",
            );
            let secure = loader.secure == Some(true);
            let can = flash && smm && self.board == Board::Q35;
            self.refuse_if(
                secure && !can,
                &loader.at.attribute("secure"),
                "secure='yes' needs type='pflash', a q35 machine and <smm state='on'/>",
            );
            let odd = loader.format.as_deref().is_some_and(|f| !matches!(f, "raw" | "qcow2"));
            self.refuse_if(odd, &loader.at.attribute("format"), "firmware images are raw or qcow2");
        }
        if let Some(nvram) = &os.nvram {
            let flash = os.loader.as_ref().is_some_and(|l| l.kind == Some(LoaderKind::Pflash));
            self.refuse_if(
                !flash && (found || os.firmware.is_none()),
                &nvram.at,
                "<nvram> needs <loader type='pflash'> with a path",
            );
            let bare = nvram.path.is_none() && nvram.template.is_none() && found;
            let how = "<nvram> needs a path or a template: no descriptor of firmware names this loader";
            self.refuse_if(bare, &nvram.at, how);
            let format = nvram.format.as_deref().unwrap_or("raw");
            self.refuse_if(
                !matches!(format, "raw" | "qcow2"),
                &nvram.at.attribute("format"),
                "variable stores are raw or qcow2",
            );
            let template = nvram.template_format.as_deref().unwrap_or("raw");
            self.refuse_if(
                !matches!(template, "raw" | "qcow2"),
                &nvram.at.attribute("templateFormat"),
                "templates of variable stores are raw or qcow2",
            );
        }
        let orphan = os.kernel.is_none() && (os.initrd.is_some() || os.cmdline.is_some());
        self.refuse_if(orphan, &os.at, "<initrd> and <cmdline> need a <kernel>");
    }

    fn size(&mut self) {
        let memory = self.def.memory.as_ref().map_or_else(|| self.def.at.child("memory"), |m| m.at.clone());
        self.refuse_if(self.def.memory_kib() == 0, &memory, "a guest needs memory");
        let vcpu = self.def.vcpu.as_ref().map_or_else(|| self.def.at.child("vcpu"), |v| v.at.clone());
        let most = self.def.os.kind.machine.as_deref().and_then(|name| self.caps.machine(name)).map(|m| m.max_cpus);
        if let Some(most) = most.filter(|most| self.def.maximum_vcpus() > *most) {
            self.refuse(&vcpu, format!("this machine takes at most {most} CPUs"));
        }
        let auto = self.def.vcpu.as_ref().is_some_and(|v| v.placement == Some(Placement::Auto));
        self.refuse_if(auto, &vcpu.attribute("placement"), "placement='auto' needs numad and is not supported yet");
        if let Some(topology) = self.def.cpu.as_ref().and_then(|cpu| cpu.topology.as_ref()) {
            let fits = topology.product() == u64::from(self.def.maximum_vcpus());
            self.refuse_if(!fits, &topology.at, "the product of the topology is not the number of vCPUs");
            let clusters = topology.clusters.unwrap_or(1) > 1;
            self.refuse_if(clusters, &topology.at.attribute("clusters"), "PC machines have no CPU clusters");
        }
    }

    fn processor(&mut self) {
        let Some(cpu) = &self.def.cpu else { return };
        let place = cpu.at.attribute("mode");
        match cpu.mode.unwrap_or_default() {
            CpuMode::Custom => {
                let name = cpu.model.as_ref().and_then(|m| m.name.as_deref()).unwrap_or("qemu64");
                let host_only = name == "host" && !self.kvm;
                if !self.caps.cpus.iter().any(|known| known == name) || host_only {
                    let at = cpu.model.as_ref().map_or(&cpu.at, |m| &m.at);
                    self.refuse(at, format!("{} has no CPU model '{name}'", self.caps.binary.display()));
                } else {
                    self.blockers(cpu, name);
                }
            }
            CpuMode::Maximum => {}
            mode => {
                let message = format!("mode='{mode}' stands for the largest emulated CPU without KVM (type='qemu')");
                self.warn_if(!self.kvm, &place, &message);
            }
        }
        let strict = cpu.matching == Some(CpuMatch::Strict);
        let how =
            "the guest gets this CPU and no other, or does not start; what else the host's CPU has is not looked at";
        self.warn_if(strict && self.kvm, &cpu.at.attribute("match"), how);
        if let Some(vendor) = &cpu.vendor {
            let host = &self.caps.host.vendor;
            if vendor != host && self.kvm {
                let message = format!("this host's CPU is made by {host}, not by {vendor}");
                self.refuse(&cpu.at.child("vendor"), message);
            }
        }
        for feature in &cpu.features {
            let word = feature.name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
            let odd = !word || feature.name.is_empty();
            self.refuse_if(odd, &feature.at, "this is not the name of a CPU feature");
            let wanted = matches!(feature.policy, None | Some(FeaturePolicy::Require | FeaturePolicy::Force));
            let own = is_of_the_system(&feature.name);
            let how = "the guest's system turns it on by itself: it is left out";
            self.warn_if(own && wanted, &feature.at, how);
            if wanted && !own && !odd && !knows_feature(self.caps, &feature.name) {
                let binary = self.caps.binary.display();
                let remedy = "leave it out, or say policy='optional' or 'disable'";
                self.refuse(&feature.at, format!("{binary} has no CPU feature '{}': {remedy}", feature.name));
            }
        }
    }

    /// What this host's KVM cannot tell a guest of Hyper-V, as far as it was asked.
    fn hyperv(&mut self) {
        let def = self.def;
        let Some(known) = self.caps.kvm_hyperv.as_ref().filter(|_| self.kvm) else { return };
        let lacks = |name: &str| match name {
            "hv-passthrough" => false,
            // These are no more than words, where there is any of it.
            "hv-spinlocks" | "hv-vendor-id" => known.is_empty(),
            name => !known.contains(name),
        };
        let how = |name: &str| format!("KVM of this host has no '{name}': leave it out");
        if let Some(hyperv) = def.features.as_ref().and_then(|features| features.hyperv.as_ref()) {
            for (name, _) in enlightenments(hyperv).into_iter().filter(|(name, _)| lacks(name)) {
                let element = name.trim_start_matches("hv-").replace('-', "_");
                self.refuse(&hyperv.at.child(&element), how(name));
            }
        }
        let timers = def.clock.iter().flat_map(|clock| &clock.timers);
        let clock = |timer: &&Timer| timer.name == TimerName::Hypervclock && timer.present == Some(true);
        for timer in timers.filter(clock).filter(|_| lacks("hv-time")) {
            self.refuse(&timer.at, how("hv-time"));
        }
        let panics = def.devices.panics.iter().filter(|panic| panic.model == Some(PanicModel::Hyperv));
        for panic in panics.filter(|_| lacks("hv-crash")) {
            self.refuse(&panic.at.attribute("model"), how("hv-crash"));
        }
    }

    /// What a model has that its guest would not get here.
    fn blockers(&mut self, cpu: &Cpu, model: &str) {
        let off = |name: &str| {
            let left_out = |policy| matches!(policy, Some(FeaturePolicy::Disable | FeaturePolicy::Forbid));
            cpu.features.iter().any(|feature| left_out(feature.policy) && is_same_feature(&feature.name, name))
        };
        let lacks: Vec<&str> = self.caps.blockers(self.kvm, model).filter(|name| !off(name)).collect();
        if lacks.is_empty() {
            return;
        }
        let place = cpu.model.as_ref().map_or(&cpu.at, |model| &model.at);
        let whose = if self.kvm { "KVM of this host" } else { "emulation" };
        let lacks = format!("{whose} cannot give a '{model}' all that it has: {}", lacks.join(", "));
        if is_exact(cpu) {
            let how = "name another model, or these with policy='disable'";
            self.refuse(place, format!("{lacks}; {how}"));
        } else {
            self.warn_if(true, place, &format!("{lacks}; the guest does not get these"));
        }
    }

    fn paravirtual(&mut self) {
        self.hyperv();
        let Some(features) = self.def.features.as_ref().filter(|_| !self.kvm) else { return };
        if let Some(hyperv) = &features.hyperv {
            self.warn_if(true, &hyperv.at, &format!("<hyperv> {NO_EFFECT}"));
        }
        if let Some(kvm) = &features.kvm {
            self.warn_if(true, &kvm.at, &format!("<kvm> {NO_EFFECT}"));
        }
        if let Some(ioapic) = &features.ioapic {
            self.warn_if(true, &ioapic.at, &format!("<ioapic> {NO_EFFECT}"));
        }
        if let Some(apic) = features.apic.as_ref().filter(|apic| apic.eoi.is_some()) {
            self.warn_if(true, &apic.at, &format!("'eoi' {NO_EFFECT}"));
        }
    }

    fn clock(&mut self) {
        let Some(clock) = &self.def.clock else { return };
        self.clock_offset(clock);
        for timer in &clock.timers {
            let policy = timer.tickpolicy;
            let (known, present) = match timer.name {
                TimerName::Rtc => (
                    matches!(policy, None | Some(TickPolicy::Delay | TickPolicy::Catchup)),
                    timer.present != Some(false),
                ),
                TimerName::Pit => (
                    matches!(policy, None | Some(TickPolicy::Delay | TickPolicy::Discard)),
                    timer.present != Some(false),
                ),
                TimerName::Hpet => (policy.is_none(), true),
                TimerName::Kvmclock | TimerName::Hypervclock => {
                    let message = format!("timer '{}' {NO_EFFECT}", timer.name);
                    self.warn_if(!self.kvm && timer.present == Some(true), &timer.at, &message);
                    (policy.is_none(), true)
                }
                TimerName::Tsc => {
                    let message = format!("timer 'tsc' {NO_EFFECT}");
                    self.warn_if(!self.kvm, &timer.at, &message);
                    let mode = timer.mode.is_some();
                    self.refuse_if(mode, &timer.at.attribute("mode"), "a mode of the time stamp counter is for Xen");
                    (policy.is_none(), timer.present != Some(false))
                }
                name => {
                    self.refuse(&timer.at, format!("PC machines of QEMU have no timer '{name}'"));
                    continue;
                }
            };
            let track = match timer.name {
                TimerName::Rtc => timer.track == Some(TimerTrack::Boot),
                _ => timer.track.is_some(),
            };
            let how = "only the timer 'rtc' follows something else, and that is 'guest', 'wall' or 'realtime'";
            self.refuse_if(track, &timer.at.attribute("track"), how);
            let frequency = timer.frequency.is_some() && timer.name != TimerName::Tsc;
            self.refuse_if(frequency, &timer.at.attribute("frequency"), "only the timer 'tsc' has a frequency");
            let discards = timer.name == TimerName::Pit && policy == Some(TickPolicy::Discard) && !self.kvm;
            let name = timer.name;
            self.refuse_if(
                !known || discards,
                &timer.at.attribute("tickpolicy"),
                &format!("timer '{name}' cannot have this tickpolicy here"),
            );
            self.refuse_if(!present, &timer.at.attribute("present"), &format!("timer '{name}' cannot be left out"));
        }
    }

    fn clock_offset(&mut self, clock: &Clock) {
        let place = &clock.at;
        let variable = clock.offset == ClockOffset::Variable;
        let moved = clock.adjustment.as_deref().is_some_and(|text| text != "reset");
        let how = "seconds of adjustment are for offset='variable'";
        self.refuse_if(moved && !variable, &place.attribute("adjustment"), how);
        let number = variable && clock.ahead().is_none();
        self.refuse_if(number, &place.attribute("adjustment"), "this is a number of seconds");
        self.refuse_if(
            clock.basis.is_some() && !variable,
            &place.attribute("basis"),
            "a basis is for offset='variable'",
        );
        let zone = clock.offset == ClockOffset::Timezone;
        let named = clock.timezone.as_deref().is_some_and(|zone| !zone.is_empty());
        self.refuse_if(zone != named, &place.attribute("timezone"), "offset='timezone' goes with a timezone");
        let absolute = clock.offset == ClockOffset::Absolute;
        self.refuse_if(
            absolute != clock.start.is_some(),
            &place.attribute("start"),
            "offset='absolute' goes with a start",
        );
    }

    fn lifecycle(&mut self) {
        let actions =
            [("on_poweroff", self.def.on_poweroff), ("on_reboot", self.def.on_reboot), ("on_crash", self.def.on_crash)];
        for (name, action) in actions {
            let reason = match action {
                LifecycleAction::RenameRestart => "renaming a domain that restarts is not supported",
                LifecycleAction::CoredumpDestroy | LifecycleAction::CoredumpRestart => {
                    "dumping a guest's memory is not supported yet"
                }
                _ => continue,
            };
            self.refuse(&self.def.at.child(name), format!("<{name}>{action}</{name}>: {reason}"));
        }
    }
}
