//! Inputs, watchdog, balloon, randomness.

use super::args::Props;
use super::{Builder, id, virtio};
use serde_json::json;
use virt_model::device::Input;
use virt_model::device::misc::{BalloonModel, InputBus, InputKind, RngKind, VirtioModel, WatchdogModel};

/// Files that everybody may read.
const PUBLIC: [&str; 2] = ["/dev/urandom", "/dev/random"];

impl Builder<'_> {
    pub(super) fn inputs(&mut self) {
        let def = self.def;
        for input in &def.devices.inputs {
            let path = input.source.as_ref().and_then(|source| source.path());
            path.iter().for_each(|path| self.open(path, true));
            if input.kind == InputKind::Evdev {
                self.event_device(input);
                continue;
            }
            let Some(device) = input_device(input) else { continue };
            let place = if input.bus == Some(InputBus::Usb) { self.usb(&input.info) } else { self.pci(&input.info) };
            let shared = input.driver.as_ref().map(|driver| virtio(&driver.virtio)).unwrap_or_default();
            let props = Props::device(device).set("id", id(&input.info)).maybe("evdev", path);
            self.args.device(props.extend(shared).extend(place));
        }
    }

    /// A device of the host's, grabbed for the guest; no device that the guest could tell from its own.
    fn event_device(&mut self, input: &Input) {
        let Some(source) = &input.source else { return };
        let toggle = source.grab_toggle.map(|toggle| toggle.as_str());
        let props = Props::new("qom-type", "input-linux").set("id", id(&input.info)).maybe("evdev", source.path());
        let props = props.maybe("repeat", source.repeat).maybe("grab_all", source.grab.map(|_| true));
        self.args.object(props.maybe("grab-toggle", toggle));
    }

    pub(super) fn watchdogs(&mut self) {
        let def = self.def;
        for watchdog in &def.devices.watchdogs {
            let device = match watchdog.model {
                WatchdogModel::I6300esb => "i6300esb",
                WatchdogModel::Ib700 => "ib700",
                // The chipset's own: switched on in `machine`.
                _ => continue,
            };
            let props = Props::device(device).set("id", id(&watchdog.info)).extend(self.pci(&watchdog.info));
            self.args.device(props);
        }
    }

    pub(super) fn balloon(&mut self) {
        let def = self.def;
        let Some(balloon) = &def.devices.memballoon else { return };
        let device = match balloon.model {
            BalloonModel::Virtio => "virtio-balloon-pci",
            BalloonModel::VirtioTransitional => "virtio-balloon-pci-transitional",
            BalloonModel::VirtioNonTransitional => "virtio-balloon-pci-non-transitional",
            BalloonModel::None | BalloonModel::Xen => return,
        };
        let name = id(&balloon.info);
        let props = Props::device(device)
            .set("id", name)
            .maybe("deflate-on-oom", balloon.autodeflate)
            .maybe("free-page-reporting", balloon.free_page_reporting)
            .extend(balloon.driver.as_ref().map(|d| virtio(&d.virtio)).unwrap_or_default());
        self.args.device(props.extend(self.pci(&balloon.info)));
        if let Some(stats) = &balloon.stats {
            let path = format!("/machine/peripheral/{name}");
            let arguments = json!({"path": path, "property": "guest-stats-polling-interval", "value": stats.period});
            self.setup.push(("qom-set".to_owned(), arguments));
        }
        let (now, all) = (def.current_memory_kib(), def.memory_kib());
        if now < all {
            self.setup.push(("balloon".to_owned(), json!({"value": now.saturating_mul(1024)})));
        }
    }

    pub(super) fn random(&mut self) {
        let def = self.def;
        for rng in &def.devices.rngs {
            let name = id(&rng.info);
            let object = format!("obj{name}");
            match rng.backend.model {
                RngKind::Egd => {
                    let chardev = self.back_end(&rng.backend.daemon(), name, None);
                    self.args.object(Props::new("qom-type", "rng-egd").set("id", &*object).set("chardev", chardev));
                }
                RngKind::Builtin => self.args.object(Props::new("qom-type", "rng-builtin").set("id", &*object)),
                _ => {
                    let path = rng.backend.path.as_deref().unwrap_or(PUBLIC[0]);
                    let props = Props::new("qom-type", "rng-random").set("id", &*object).set("filename", path);
                    self.args.object(props);
                    if !PUBLIC.contains(&path) {
                        self.open(path, false);
                    }
                }
            }
            let rate = rng.rate.as_ref();
            let props = Props::device(&format!("virtio-rng-pci{}", generation(rng.model)))
                .set("rng", object)
                .set("id", name)
                .maybe("max-bytes", rate.map(|r| r.bytes))
                .maybe("period", rate.map(|r| r.period_ms.unwrap_or(1000)))
                .extend(rng.driver.as_ref().map(|d| virtio(&d.virtio)).unwrap_or_default());
            self.args.device(props.extend(self.pci(&rng.info)));
        }
    }
}

pub(super) fn generation(model: VirtioModel) -> &'static str {
    match model {
        VirtioModel::Virtio => "",
        VirtioModel::Transitional => "-transitional",
        VirtioModel::NonTransitional => "-non-transitional",
    }
}

/// QEMU's name of an input device; PS/2 ones are part of the board.
pub fn input_device(input: &Input) -> Option<&'static str> {
    Some(match (input.bus?, input.kind) {
        (InputBus::Usb, InputKind::Tablet) => "usb-tablet",
        (InputBus::Usb, InputKind::Mouse) => "usb-mouse",
        (InputBus::Usb, InputKind::Keyboard) => "usb-kbd",
        (InputBus::Virtio, InputKind::Tablet) => "virtio-tablet-pci",
        (InputBus::Virtio, InputKind::Mouse) => "virtio-mouse-pci",
        (InputBus::Virtio, InputKind::Keyboard) => "virtio-keyboard-pci",
        (InputBus::Virtio, InputKind::Passthrough) => "virtio-input-host-pci",
        _ => return None,
    })
}
