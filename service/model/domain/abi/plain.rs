//! The form in which two definitions are compared: without what only holds while the guest runs, without what every reader
//! adds again, and with one way of saying what can be said in two.

use crate::device::address::{Address, AddressKind, PciAddress};
use crate::device::controller::{Controller, ControllerKind, ControllerModel};
use crate::device::input::{Input, InputBus, InputKind};
use crate::domain::part::Part;
use crate::domain::{DomainDef, Form};
use crate::xml::Element;

/// Both definitions as trees in that form.
pub fn pair(source: &DomainDef, target: &DomainDef) -> (Element, Element) {
    let (mut source, mut target) = (plain(source), plain(target));
    share_vcpus(&mut source, &target);
    share_vcpus(&mut target, &source);
    (source, target)
}

fn plain(def: &DomainDef) -> Element {
    let mut def = def.in_form(Form { inactive: true, secure: false, migratable: true });
    if let Some(vcpu) = &mut def.vcpu {
        vcpu.current = vcpu.current.filter(|current| *current != vcpu.count);
    }
    if def.os.loader.as_ref().is_some_and(|loader| loader.path.is_some()) {
        def.os.firmware = None;
    }
    def.devices.controllers.retain(|controller| !is_usual_usb(controller));
    def.devices.inputs.retain(|input| !is_board_input(input));
    let mut tree = def.tree();
    tree.elements_mut().filter(|e| e.name == "devices").flat_map(Element::elements_mut).for_each(plain_device);
    tree.elements_mut().filter(|e| e.name == "cpu").for_each(number_cells);
    tree
}

/// The USB controller of the i440fx board, at its own place.
fn is_usual_usb(controller: &Controller) -> bool {
    let own = PciAddress { slot: 1, function: 2, ..PciAddress::default() };
    let address = controller.info.address.as_ref().map(|address| &address.kind);
    let at_home = match address {
        None | Some(AddressKind::Pci(None)) => true,
        Some(AddressKind::Pci(Some(pci))) => pci.place() == own.place(),
        Some(_) => false,
    };
    let model = matches!(controller.model, None | Some(ControllerModel::Piix3Uhci));
    let plain = controller.ports.is_none() && controller.master.is_none() && controller.rest.is_empty();
    controller.kind == ControllerKind::Usb && controller.index() == 0 && model && at_home && plain
}

/// Mouse and keyboard of a PC are on the board whether they are listed or not.
fn is_board_input(input: &Input) -> bool {
    let kind = matches!(input.kind, InputKind::Mouse | InputKind::Keyboard);
    kind && input.bus == Some(InputBus::Ps2) && input.info.address.is_none() && input.rest.is_empty()
}

/// Addresses of devices that are only kept are written as those of all others; a vsock's number may be the host's choice.
fn plain_device(device: &mut Element) {
    for address in device.elements_mut().filter(|e| e.name == "address") {
        *address = Address::read(std::mem::take(address), &mut Vec::new()).write("address");
    }
    if device.name == "vsock" {
        let chosen = |cid: &&mut Element| cid.name == "cid" && cid.attr("auto") == Some("yes");
        device.elements_mut().filter(chosen).for_each(|cid| drop(cid.take_attr("address")));
    }
}

/// NUMA cells without a number are counted.
fn number_cells(cpu: &mut Element) {
    let numa = cpu.elements_mut().filter(|e| e.name == "numa");
    let cells = numa.flat_map(Element::elements_mut).filter(|e| e.name == "cell");
    for (number, cell) in cells.enumerate().filter(|(_, cell)| cell.attr("id").is_none()) {
        cell.set_attr("id", number.to_string());
    }
}

/// A document that does not list its vCPUs has the first ones online for good and the others to be plugged in: what `like`
/// lists is filled in.
fn share_vcpus(tree: &mut Element, like: &Element) {
    let (Some(vcpu), None, Some(listed)) = (tree.child("vcpu"), tree.child("vcpus"), like.child("vcpus")) else {
        return;
    };
    let number = |text: &str| text.trim().parse::<u32>().ok();
    let online = vcpu.attr("current").and_then(number).or_else(|| number(&vcpu.text())).unwrap_or(u32::MAX);
    let yes_no = |yes: bool| if yes { "yes" } else { "no" };
    let mut filled = Element::new("vcpus");
    for id in listed.elements().filter_map(|vcpu| vcpu.attr("id")) {
        let here = number(id).is_some_and(|id| id < online);
        let vcpu = Element::new("vcpu").with_attr("id", id).with_attr("enabled", yes_no(here));
        filled.push(vcpu.with_attr("hotpluggable", yes_no(!here)));
    }
    tree.push(filled);
}
