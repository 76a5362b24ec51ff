//! `<input>`: mice, tablets, keyboards, and the host's own.

use super::{DeviceInfo, PlainDriver, VirtioModel};
use crate::domain::part::element;
use crate::domain::value::choices;

choices! {
    /// What it is.
    pub enum InputKind {
        Mouse = "mouse", Tablet = "tablet", Keyboard = "keyboard", Passthrough = "passthrough", Evdev = "evdev",
    }
}

choices! {
    /// What it is plugged into.
    pub enum InputBus {
        Ps2 = "ps2", Usb = "usb", Xen = "xen", Parallels = "parallels", Virtio = "virtio", None = "none",
    }
}

element! {
    /// `<input>`
    pub struct Input {
        /// What it is.
        need "type" => kind: InputKind,
        /// What it is plugged into.
        attr "bus" => bus: Option<InputBus>,
        /// Generation, of virtio.
        attr "model" => model: Option<VirtioModel>,
        /// `<driver>`
        child "driver" => driver: Option<PlainDriver>,
        /// `<source>`: the host's device.
        child "source" => source: Option<InputSource>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

choices! {
    /// What is grabbed.
    pub enum Grab { All = "all", }
}

choices! {
    /// The keys that take the device from the host to the guest and back.
    pub enum GrabToggle {
        CtrlCtrl = "ctrl-ctrl", AltAlt = "alt-alt", ShiftShift = "shift-shift", MetaMeta = "meta-meta",
        Scrolllock = "scrolllock", CtrlScrolllock = "ctrl-scrolllock",
    }
}

element! {
    /// `<input><source>`
    pub struct InputSource {
        /// Of `evdev`: the device.
        attr "dev" => dev: Option<String>,
        /// Of `passthrough`: the device.
        attr "evdev" => evdev: Option<String>,
        /// What is grabbed with it.
        attr "grab" => grab: Option<Grab>,
        /// The keys that take it to the guest and back.
        attr "grabToggle" => grab_toggle: Option<GrabToggle>,
        /// Keys repeat.
        on_off "repeat" => repeat: Option<bool>,
    }
}

impl InputSource {
    /// The device's path.
    pub fn path(&self) -> Option<&str> {
        self.dev.as_deref().or(self.evdev.as_deref())
    }
}
