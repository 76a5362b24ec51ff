//! What is left out of which form: runtime facts, secrets, what only this host adds.

use super::{DomainDef, Form};
use crate::device::chardev::CharKind;
use crate::device::controller::{Controller, ControllerKind, ControllerModel};
use crate::device::disk::Disk;
use crate::device::display::{Graphics, GraphicsKind, ListenKind};
use crate::device::interface::Interface;
use crate::device::source::DiskSource;
use crate::xml::Element;

impl DomainDef {
    /// A copy with what `form` leaves out taken out.
    pub fn in_form(&self, form: Form) -> DomainDef {
        let mut def = self.clone();
        if form.inactive {
            def.forget_runtime();
        }
        if !form.secure {
            def.hide_secrets();
        }
        if form.migratable {
            def.devices.controllers.retain(|controller| !is_implied(controller));
        }
        def
    }

    /// Whether it says where volumes are.
    pub fn places_volumes(&self) -> bool {
        self.devices.disks.iter().any(|disk| disk.chain().any(|layer| layer.volume.is_some() && layer.path.is_some()))
    }

    /// Takes out where volumes are: that is found out whenever it is wanted. What has been frozen, or saved, keeps it, as it is of
    /// that very file.
    pub fn forget_places_of_volumes(&mut self) {
        let forget = |source: Option<&mut DiskSource>| source.into_iter().for_each(|source| source.forget_place());
        for disk in &mut self.devices.disks {
            if disk.volume().is_some() {
                forget(disk.source.as_mut());
            }
            disk.each_below(|store| {
                if store.volume().is_some() {
                    forget(store.source.as_mut());
                }
            });
        }
    }

    /// Takes out what only holds while the guest runs.
    fn forget_runtime(&mut self) {
        self.id = None;
        for info in self.devices.infos_mut() {
            info.alias = info.alias.take().filter(|alias| alias.is_user());
        }
        for source in self.devices.char_sources_mut() {
            source.tty = None;
            if source.kind == CharKind::Pty {
                source.set_path(None);
                source.sources.retain(|address| !address.rest.is_empty());
            }
        }
        self.devices.channels.iter_mut().for_each(|channel| channel.target.state = None);
        self.devices.disks.iter_mut().for_each(forget_disk);
        self.devices.interfaces.iter_mut().for_each(forget_interface);
        self.devices.graphics.iter_mut().for_each(forget_ports);
        let cid = self.devices.vsock.as_mut().and_then(|vsock| vsock.cid.as_mut());
        cid.filter(|cid| cid.auto == Some(true)).iter_mut().for_each(|cid| cid.address = None);
        self.devices.rest.elements.iter_mut().for_each(forget_untyped);
        let memories = self.devices.memories.iter_mut();
        memories.for_each(|device| device.target.rest.elements.retain(|element| element.name != "current"));
        self.rest.elements.iter_mut().filter(|element| element.name == "seclabel").for_each(forget_label);
    }
}

fn forget_disk(disk: &mut Disk) {
    disk.source.iter_mut().for_each(|source| source.index = None);
    disk.rest.elements.retain(|element| element.name != "mirror");
    disk.each_below(|store| {
        store.index = None;
        store.source.iter_mut().for_each(|source| source.index = None);
    });
}

fn forget_interface(interface: &mut Interface) {
    if let Some(target) = &mut interface.target {
        target.dev = target.dev.take().filter(|name| !is_generated(name));
    }
    let empty = |target: &crate::device::interface::InterfaceTarget| target.dev.is_none() && target.rest.is_empty();
    interface.target = interface.target.take().filter(|target| !empty(target));
    if let Some(source) = &mut interface.source {
        source.portid = None;
    }
    interface.leave_forward_device();
}

/// Names given to the host's devices at start.
fn is_generated(name: &str) -> bool {
    let prefixes = ["vnet", "vif", "macvtap", "macvlan"];
    prefixes
        .iter()
        .filter_map(|prefix| name.strip_prefix(prefix))
        .any(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

fn forget_ports(graphics: &mut Graphics) {
    if graphics.autoport == Some(true) {
        let vnc = graphics.kind == GraphicsKind::Vnc;
        graphics.port = vnc.then_some(-1);
        graphics.tls_port = None;
        graphics.websocket = graphics.websocket.map(|_| -1);
    }
    for listen in graphics.listens.iter_mut().filter(|listen| listen.kind == ListenKind::Network) {
        listen.address = None;
    }
    if graphics.listens.first().is_some_and(|listen| listen.kind == ListenKind::Network) {
        graphics.listen = None;
    }
}

/// The same for devices that are only kept.
fn forget_untyped(device: &mut Element) {
    let user = |element: &Element| element.attr("name").is_some_and(|name| name.starts_with("ua-"));
    device.nodes.retain(|node| node.as_element().is_none_or(|e| e.name != "alias" || user(e)));
}

fn forget_label(label: &mut Element) {
    label.take_child("imagelabel");
    if label.attr("type") == Some("dynamic") {
        label.take_child("label");
    }
}

/// The root of PCI is there on every host that has the machine.
fn is_implied(controller: &Controller) -> bool {
    let root = matches!(controller.model, Some(ControllerModel::PciRoot | ControllerModel::PcieRoot));
    let plain = controller.pcihole64.is_none() && controller.target.is_none() && controller.rest.is_empty();
    controller.kind == ControllerKind::Pci && controller.index() == 0 && root && plain
}
