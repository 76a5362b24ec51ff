//! What a network of several devices of the host's gives a card that is plugged into it.

use super::NetworkDef;
use super::forward::ForwardDevice;
use crate::device::interface::{Interface, InterfaceKind};

impl Interface {
    /// Goes out by a device of the host's that its network gives it, or is that device.
    pub fn take_forward_device(&mut self, network: &NetworkDef, device: &ForwardDevice) {
        self.leave_forward_device();
        let source = self.source.get_or_insert_default();
        if let Some(place) = device.address() {
            source.place = Some(place);
            self.kind = InterfaceKind::Hostdev;
            self.managed = Some(network.forward.as_ref().and_then(|forward| forward.managed) == Some(true));
        } else {
            source.dev.clone_from(&device.link);
            source.mode = Some(network.source_mode());
            self.kind = InterfaceKind::Direct;
        }
    }

    /// The device of the host's that its network has given it.
    pub fn forward_device(&self) -> Option<ForwardDevice> {
        let source = self.source.as_ref().filter(|_| self.network().is_some())?;
        match self.kind {
            InterfaceKind::Direct => source.dev.as_deref().map(ForwardDevice::link),
            InterfaceKind::Hostdev => self.host_card().map(ForwardDevice::pci),
            _ => None,
        }
    }
}
