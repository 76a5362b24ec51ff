//! Board, firmware, memory, clock, and how the process presents itself.

use super::args::{List, Props, on_off};
use super::cpu::{vcpu_name, vcpu_place};
use super::disk::with_backing;
use super::memory::RAM;
use super::{Builder, list};
use crate::qemu::complete::Board;
use crate::qemu::plan::Nvram;
use std::path::PathBuf;
use virt_model::calendar::date;
use virt_model::device::ControllerKind;
use virt_model::device::memory::MemoryModel;
use virt_model::device::sound::SoundModel;
use virt_model::device::watchdog::{WatchdogAction, WatchdogModel};
use virt_model::domain::clock::{ClockBasis, ClockOffset, TickPolicy, Timer, TimerName, TimerTrack};
use virt_model::domain::features::{IoapicDriver, Smm, State};
use virt_model::domain::os::{AcpiTableKind, LoaderKind};
use virt_model::domain::{DomainDef, LifecycleAction};

/// What follows where the guest's watchdogs bite; `None` if it has none.
pub fn watchdog_action(def: &DomainDef) -> Option<&'static str> {
    def.devices.watchdogs.first().map(|watchdog| match watchdog.action.unwrap_or_default() {
        WatchdogAction::Dump => "pause",
        other => other.as_str(),
    })
}

impl Builder<'_> {
    pub(super) fn machine(&mut self) {
        let name = List::default().set("guest", &self.def.name).set("debug-threads", "on");
        self.args.pair("-name", name);
        self.args.flag("-S");
        let flash = self.flash();
        let machine = self.board_options(flash);
        self.args.pair("-machine", machine);
        let accelerator = self.accelerator();
        self.args.pair("-accel", accelerator);
    }

    fn accelerator(&self) -> List {
        let features = self.def.features.as_ref();
        if self.kvm {
            let ring =
                features.and_then(|f| f.kvm.as_ref()?.dirty_ring.as_ref()).filter(|ring| ring.state != Some(false));
            return list("kvm").maybe("dirty-ring-size", ring.and_then(|ring| ring.size));
        }
        let cache = features.and_then(|f| f.tcg.as_ref()?.tb_cache);
        list("tcg").maybe("tb-size", cache.map(|size| size.0.div_ceil(1024)))
    }

    fn board_options(&self, flash: Option<(String, Option<String>)>) -> List {
        let features = self.def.features.as_ref();
        let on = |state: Option<&State>| state.map(State::is_on);
        let (code, vars) = flash.unzip();
        let dump = self.def.memory.as_ref().and_then(|m| m.dump_core).unwrap_or(false);
        let irqchip = features.and_then(|f| f.ioapic.as_ref()?.driver).map(|driver| match driver {
            IoapicDriver::Kvm => "on",
            IoapicDriver::Qemu => "split",
        });
        let speaker = self.def.devices.sounds.iter().find(|s| s.model == SoundModel::Pcspk);
        let machine = self.def.os.kind.machine.as_deref().unwrap_or("pc");
        let backing = self.def.memory_backing.as_ref();
        let nvdimm = self.def.devices.memories.iter().any(|device| device.model == MemoryModel::Nvdimm);
        let list = list(machine)
            .set("usb", "off")
            .maybe_on_off("vmport", on(features.and_then(|f| f.vmport.as_ref())))
            .maybe_on_off("smm", features.and_then(|f| f.smm.as_ref()).map(Smm::is_on))
            .maybe("kernel_irqchip", irqchip.filter(|_| self.kvm))
            .set("dump-guest-core", on_off(dump))
            .maybe("memory-backend", self.def.numa_cells().is_empty().then_some(RAM))
            .maybe_on_off("i8042", on(features.and_then(|f| f.ps2.as_ref())))
            .maybe("mem-merge", backing.is_some_and(|b| b.nosharepages).then_some("off"))
            .maybe("graphics", self.def.os.bios.as_ref().and_then(|b| b.useserial).filter(|s| *s).map(|_| "off"))
            .maybe("nvdimm", nvdimm.then_some("on"))
            .maybe("pflash0", code)
            .maybe("pflash1", vars.flatten())
            .maybe("pcspk-audiodev", speaker.and_then(|s| self.audiodev(s.audio.as_ref())));
        let hpet = self.timer(TimerName::Hpet).and_then(|timer| timer.present);
        list.maybe_on_off("hpet", hpet).set("acpi", on_off(features.is_some_and(|f| f.acpi)))
    }

    /// The firmware's images; gives the nodes of code and variables.
    fn flash(&mut self) -> Option<(String, Option<String>)> {
        let loader = self.def.os.loader.as_ref()?;
        let path = loader.path.as_deref()?;
        if loader.kind != Some(LoaderKind::Pflash) {
            self.args.pair("-bios", path);
            self.read_whole(path);
            return None;
        }
        let format = loader.format.as_deref().unwrap_or("raw");
        self.open_image(path, false);
        self.flash_nodes("pflash0", path, format, true);
        if loader.secure == Some(true) {
            self.args.pair("-global", list("driver=cfi.pflash01").set("property", "secure").set("value", "on"));
        }
        let nvram = self.def.os.nvram.as_ref();
        let vars = nvram.and_then(|nvram| Some((nvram, nvram.path.as_deref()?)));
        if let Some((nvram, path)) = vars {
            self.open_image(path, true);
            let format = nvram.format.as_deref().unwrap_or("raw");
            self.flash_nodes("pflash1", path, format, false);
            let from = nvram.template_format.as_deref().unwrap_or(format);
            let template = nvram.template.as_ref().map(|template| (PathBuf::from(template), from.to_owned()));
            self.nvram = Some(Nvram { path: PathBuf::from(path), format: format.to_owned(), template });
        }
        Some(("pflash0".to_owned(), vars.map(|_| "pflash1".to_owned())))
    }

    fn flash_nodes(&mut self, node: &str, path: &str, format: &str, read_only: bool) {
        let storage = format!("{node}-storage");
        let file = Props::new("driver", "file").set("filename", path).set("node-name", &*storage);
        self.args.blockdev(file.set("auto-read-only", true).set("discard", "unmap"));
        let image = Props::new("node-name", node).set("read-only", read_only).set("driver", format);
        self.args.blockdev(with_backing(image.set("file", storage), format, None));
    }

    pub(super) fn resources(&mut self) {
        self.memory();
        let ((online, plugged), all) = (self.def.vcpus_at_boot(), self.def.maximum_vcpus());
        let fixed = online.len() - plugged.len();
        let topology = self.def.cpu.as_ref().and_then(|cpu| cpu.topology.as_ref());
        let (sockets, dies, cores, threads) =
            topology.map_or((all, 1, 1, 1), |t| (t.sockets, t.dies.unwrap_or(1), t.cores, t.threads));
        let smp = list(&fixed.to_string()).set("maxcpus", all).set("sockets", sockets).set("dies", dies);
        self.args.pair("-smp", smp.set("cores", cores).set("threads", threads));
        let kind = super::plugged_cpu(self.def, self.caps);
        for n in plugged {
            let props = Props::device(&kind).set("id", vcpu_name(n));
            self.args.device(vcpu_place(self.def, n).into_iter().fold(props, |props, (key, n)| props.set(key, n)));
        }
        self.args.pair("-uuid", self.def.uuid.to_string());
        let tseg = self.def.features.as_ref().and_then(|f| f.smm.as_ref()?.tseg.as_ref()?.mib().ok());
        if let Some(mib) = tseg {
            self.args.pair("-global", format!("mch.extended-tseg-mbytes={mib}"));
        }
    }

    /// The monitors: ours, and a spare one for people.
    pub(super) fn service(&mut self) {
        self.args.flag("-no-user-config");
        self.args.flag("-nodefaults");
        let display = self.display();
        self.args.pair("-display", display);
        let main = list("socket").set("id", "mon").set("fd", self.place.monitor_fd);
        self.args.pair("-chardev", main.set("server", "on").set("wait", "off"));
        self.args.pair("-mon", list("chardev=mon").set("mode", "control"));
        let path = self.place.runtime_dir.join("monitor2.sock");
        let spare = list("socket").set("id", "mon2").set("path", path.display());
        self.args.pair("-chardev", spare.set("server", "on").set("wait", "off"));
        self.args.pair("-mon", list("chardev=mon2").set("mode", "control"));
        self.args.pair("-pidfile", self.place.runtime_dir.join("qemu.pid").to_string_lossy());
    }

    fn timer(&self, name: TimerName) -> Option<&Timer> {
        self.def.clock.as_ref()?.timers.iter().find(|timer| timer.name == name)
    }

    pub(super) fn clock(&mut self) {
        let rtc = self.timer(TimerName::Rtc);
        let catchup = rtc.is_some_and(|t| t.tickpolicy == Some(TickPolicy::Catchup));
        let follows = rtc.and_then(|t| t.track).map(|track| match track {
            TimerTrack::Guest => "vm",
            TimerTrack::Realtime => "rt",
            TimerTrack::Wall | TimerTrack::Boot => "host",
        });
        let list = List::default().set("base", self.clock_base()).maybe("clock", follows);
        self.args.pair("-rtc", list.maybe("driftfix", catchup.then_some("slew")));
        // Without KVM missed ticks of the PIT are always delayed, and there is no property to say so.
        let pit = self.timer(TimerName::Pit).and_then(|t| t.tickpolicy).filter(|_| self.kvm);
        if let Some(policy) = pit {
            self.args.pair("-global", format!("kvm-pit.lost_tick_policy={policy}"));
        }
        self.sleep_states();
    }

    /// What the real-time clock shows at start.
    fn clock_base(&mut self) -> String {
        let Some(clock) = &self.def.clock else { return "utc".to_owned() };
        match clock.offset {
            ClockOffset::Utc => "utc".to_owned(),
            ClockOffset::Localtime => "localtime".to_owned(),
            ClockOffset::Timezone => {
                self.env.push(("TZ".to_owned(), clock.timezone.clone().unwrap_or_default()));
                "localtime".to_owned()
            }
            ClockOffset::Absolute => date(clock.start.unwrap_or(0)),
            ClockOffset::Variable => {
                let basis = match clock.basis.unwrap_or_default() {
                    ClockBasis::Utc => self.place.now,
                    ClockBasis::Localtime => self.place.now.saturating_add(self.place.east_of_utc),
                };
                date(basis.saturating_add(clock.ahead().unwrap_or(0)))
            }
        }
    }

    fn sleep_states(&mut self) {
        let chip = if self.board == Board::Q35 { "ICH9-LPC" } else { "PIIX4_PM" };
        let Some(pm) = &self.def.pm else { return };
        for (state, enabled) in [("disable_s3", &pm.suspend_to_mem), ("disable_s4", &pm.suspend_to_disk)] {
            if let Some(enabled) = enabled.as_ref().and_then(|e| e.enabled) {
                self.args.pair("-global", format!("{chip}.{state}={}", u8::from(!enabled)));
            }
        }
    }

    pub(super) fn boot(&mut self) {
        let os = &self.def.os;
        let menu = os.bootmenu.as_ref();
        let boot = List::default()
            .maybe_on_off("menu", menu.and_then(|m| m.enable))
            .maybe("splash-time", menu.and_then(|m| m.timeout_ms))
            .maybe("reboot-timeout", os.bios.as_ref().and_then(|b| b.reboot_timeout_ms));
        self.args.pair("-boot", boot.set("strict", "on"));
        for (option, path) in [("-kernel", &os.kernel), ("-initrd", &os.initrd)] {
            if let Some(path) = path.as_deref().filter(|path| !path.is_empty()) {
                self.args.pair(option, path);
                self.read_whole(path);
            }
        }
        if let Some(cmdline) = &os.cmdline {
            self.args.pair("-append", cmdline.as_str());
        }
        for table in os.acpi.iter().flat_map(|acpi| &acpi.tables) {
            let signature = match table.kind {
                AcpiTableKind::Slic => Some("SLIC"),
                AcpiTableKind::Msdm => Some("MSDM"),
                AcpiTableKind::Raw | AcpiTableKind::Rawset => None,
            };
            self.args.pair("-acpitable", List::default().maybe("sig", signature).set("file", &table.path));
            self.read_whole(&table.path);
        }
        let holes = [(ControllerKind::Pci, 0)].into_iter().filter_map(|(kind, n)| self.controller(kind, n)?.pcihole64);
        let host = if self.board == Board::Q35 { "q35-pcihost" } else { "i440FX-pcihost" };
        for hole in holes.collect::<Vec<_>>() {
            self.args.pair("-global", format!("{host}.pci-hole64-size={}K", hole.0));
        }
        self.actions();
    }

    /// What QEMU does by itself; everything that ends a guest is left standing for the service to decide.
    fn actions(&mut self) {
        let reboot = if self.def.on_reboot == LifecycleAction::Restart { "reset" } else { "shutdown" };
        let watchdog = watchdog_action(self.def);
        let actions = List::default().set("reboot", reboot).set("shutdown", "pause").set("panic", "pause");
        self.args.pair("-action", actions.maybe("watchdog", watchdog));
        if self.def.devices.watchdogs.iter().any(|w| w.model == WatchdogModel::Itco) {
            self.args.pair("-global", "ICH9-LPC.noreboot=off");
        }
    }

    /// The fence around the process, and log lines with a time.
    pub(super) fn fence(&mut self) {
        if self.place.sandbox && self.caps.sandbox {
            let fence = ["obsolete", "elevateprivileges", "spawn", "resourcecontrol"];
            let fence = fence.into_iter().fold(list("on"), |list, what| list.set(what, "deny"));
            self.args.pair("-sandbox", fence);
        }
        if self.def.features.as_ref().and_then(|f| f.vmcoreinfo.as_ref()).is_some_and(State::is_on) {
            self.args.device(Props::device("vmcoreinfo"));
        }
        self.args.pair("-msg", "timestamp=on");
    }
}
