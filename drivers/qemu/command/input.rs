//! Mice, tablets, keyboards, and the host's own devices that become the guest's.

use super::args::Props;
use super::{Builder, id, virtio};
use virt_model::device::Input;
use virt_model::device::input::{InputBus, InputKind};

impl Builder<'_> {
    pub(super) fn inputs(&mut self) {
        let def = self.def;
        for input in &def.devices.inputs {
            self.input(input);
        }
    }

    pub(super) fn input(&mut self, input: &Input) {
        let path = input.source.as_ref().and_then(|source| source.path());
        path.iter().for_each(|path| self.open(path, true));
        if input.kind == InputKind::Evdev {
            self.event_device(input);
            return;
        }
        let Some(device) = input_device(input) else { return };
        let place = if input.bus == Some(InputBus::Usb) { self.usb(&input.info) } else { self.pci(&input.info) };
        let shared = input.driver.as_ref().map(|driver| virtio(&driver.virtio)).unwrap_or_default();
        let props = Props::device(device).set("id", id(&input.info)).maybe("evdev", path);
        self.args.device(props.extend(shared).extend(place));
    }

    /// A device of the host's, grabbed for the guest; no device that the guest could tell from its own.
    fn event_device(&mut self, input: &Input) {
        let Some(source) = &input.source else { return };
        let toggle = source.grab_toggle.map(|toggle| toggle.as_str());
        let props = Props::new("qom-type", "input-linux").set("id", id(&input.info)).maybe("evdev", source.path());
        let props = props.maybe("repeat", source.repeat).maybe("grab_all", source.grab.map(|_| true));
        self.args.object(props.maybe("grab-toggle", toggle));
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
