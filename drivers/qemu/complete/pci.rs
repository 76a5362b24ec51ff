//! Places on PCI and PCI Express, and the bridges that make room for them.
//!
//! ```text
//!  q35:    pcie-root ─ 01 video ─ 02.0 … pcie-root-ports, one device behind each ─ 1b sound ─ 1d USB 2 ─ 1f SATA (.2)
//!                                     └ pcie-to-pci-bridge: devices that are not PCI Express
//!  i440fx: pci-root ─ 01 IDE (.1), USB (.2) ─ 02 video ─ 03 … everything else ─ pci-bridges when it is full
//! ```
//!
//! Given places are kept, and refused if two devices have the same one. Nothing moves once it has a place.

use super::Board;
use super::controllers::is_companion;
use std::collections::{BTreeMap, BTreeSet};
use virt_model::device::controller::{ControllerModel, HexByte, PciModel, PciTarget};
use virt_model::device::{Address, AddressKind, Controller, ControllerKind, PciAddress};
use virt_model::domain::DomainDef;
use virt_model::domain::part::Part;
use virt_model::xml::{Finding, Place};

mod wish;

use wish::{Wish, visit};

/// Free root ports that a new PCI Express machine gets, so that devices can be plugged in while it runs.
const SPARE_PORTS: usize = 4;

/// Gives every PCI device its place.
pub fn assign(def: &mut DomainDef, board: Board, log: &mut Vec<Finding>) {
    let had_ports = def.devices.controllers.iter().any(|c| c.model == Some(ControllerModel::PcieRootPort));
    let mut layout = Layout::of(def, board, log);
    layout.add_named_buses(def);
    layout.take_given(def, log);
    layout.take_preferred(def);
    layout.place_bridges(def, log);
    layout.place_devices(def, log);
    if board == Board::Q35 && !had_ports {
        for _ in 0..SPARE_PORTS {
            if layout.new_root_port().is_none() {
                break;
            }
        }
    }
    def.devices.controllers.append(&mut layout.added);
    def.devices.controllers.iter_mut().for_each(describe_bridge);
    say_multifunction(def);
}

/// Where a slot has further functions, its first one says so, or the guest does not look for them.
fn say_multifunction(def: &mut DomainDef) {
    let all = def.devices.infos().into_iter().filter_map(|(info, _)| info.pci().copied());
    let shared: BTreeSet<(u16, u8, u8)> =
        all.filter(|pci| pci.function > 0).map(|pci| (pci.domain, pci.bus, pci.slot)).collect();
    for info in def.devices.infos_mut() {
        if let Some(AddressKind::Pci(Some(pci))) = info.address.as_mut().map(|address| &mut address.kind)
            && pci.function == 0
            && shared.contains(&(pci.domain, pci.bus, pci.slot))
        {
            pci.multifunction.get_or_insert(true);
        }
    }
}

/// What a bus takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bus {
    PciRoot,
    PcieRoot,
    /// One device, in slot 0.
    Port,
    /// 31 devices, not PCI Express.
    Conventional,
    /// Of a switch: its downstream ports.
    Switch,
    /// Of a kind for which nothing is chosen.
    Other,
}

impl Bus {
    fn of(model: Option<ControllerModel>) -> Bus {
        use ControllerModel::{
            DmiToPciBridge, PciBridge, PcieRootPort, PcieSwitchDownstreamPort, PcieSwitchUpstreamPort, PcieToPciBridge,
        };
        match model {
            Some(PcieSwitchUpstreamPort) => Bus::Switch,
            Some(ControllerModel::PciRoot) => Bus::PciRoot,
            Some(ControllerModel::PcieRoot) => Bus::PcieRoot,
            Some(PcieRootPort | PcieSwitchDownstreamPort) => Bus::Port,
            Some(PciBridge | PcieToPciBridge | DmiToPciBridge) => Bus::Conventional,
            _ => Bus::Other,
        }
    }

    fn has_slot(self, slot: u8) -> bool {
        match self {
            Bus::Port => slot == 0,
            Bus::Switch | Bus::Other => slot <= 31,
            _ => (1..=31).contains(&slot),
        }
    }
}

/// What is where.
struct Layout {
    board: Board,
    buses: BTreeMap<u8, Bus>,
    /// Functions in use: a bit each.
    taken: BTreeMap<(u8, u8), u8>,
    /// Slots of the root that hold root ports, where more of them fit.
    port_slots: Vec<u8>,
    added: Vec<Controller>,
}

impl Layout {
    fn of(def: &DomainDef, board: Board, log: &mut Vec<Finding>) -> Layout {
        let mut buses = BTreeMap::new();
        for controller in pci_controllers(def) {
            match u8::try_from(controller.index()) {
                Ok(index) => _ = buses.insert(index, Bus::of(controller.model)),
                Err(_) => log.push(Finding::invalid(&controller.at, "a PCI controller's index is at most 255")),
            }
        }
        let mut layout = Layout { board, buses, taken: BTreeMap::new(), port_slots: Vec::new(), added: Vec::new() };
        // What the board solders on: host bridge and, in one slot, its many small functions.
        let built_in: &[(u8, u8)] = match board {
            Board::Q35 => &[(0, 0xff), (31, 0b1111_1011)],
            _ => &[(0, 0xff), (1, 0b1111_1001)],
        };
        built_in.iter().for_each(|(slot, functions)| _ = layout.taken.insert((0, *slot), *functions));
        layout
    }

    /// A bus that an address names and no controller offers is added, as libvirt does.
    fn add_named_buses(&mut self, def: &mut DomainDef) {
        let mut highest = 0;
        visit(def, self.board, |info, _, _| highest = highest.max(info.pci().map_or(0, |pci| pci.bus)));
        let bridges = def.devices.controllers.iter().filter(|c| c.kind == ControllerKind::Pci);
        let highest = bridges.filter_map(|c| c.info.pci()).map(|pci| pci.bus).fold(highest, u8::max);
        // Nor is a number left out, so that none has to be added for a device that sits behind the gap.
        let highest = self.buses.keys().copied().fold(highest, u8::max);
        let model = if self.board == Board::Q35 { ControllerModel::PcieRootPort } else { ControllerModel::PciBridge };
        for index in 1..=highest {
            self.buses.entry(index).or_insert_with(|| {
                def.devices.controllers.push(Controller::new(ControllerKind::Pci, index.into(), Some(model)));
                Bus::of(Some(model))
            });
        }
    }

    /// Takes the places that the definition gives, bridges' own first.
    fn take_given(&mut self, def: &mut DomainDef, log: &mut Vec<Finding>) {
        for controller in pci_controllers(def) {
            if let Some(pci) = controller.info.pci().copied() {
                self.claim(pci, &controller.at, log);
                let shares = pci.multifunction == Some(true) && pci.function == 0 && pci.bus == 0;
                if shares && controller.model == Some(ControllerModel::PcieRootPort) {
                    self.port_slots.push(pci.slot);
                }
            }
        }
        visit(def, self.board, |info, wish, place| {
            if let Some(pci) = info.pci().copied() {
                match wish.built_in() {
                    Some(only) if only != (pci.bus, pci.slot, pci.function) => {
                        let (_, slot, function) = only;
                        let message = format!(
                            "the board's own controller is always at slot {slot}, function {function} of bus 0"
                        );
                        log.push(Finding::invalid(place, message));
                    }
                    _ => self.claim(pci, place, log),
                }
            }
        });
        for element in def.devices.untyped() {
            if let Some(pci) = untyped_pci(element) {
                self.claim(pci, &element.at, log);
            }
        }
    }

    fn claim(&mut self, pci: PciAddress, place: &Place, log: &mut Vec<Finding>) {
        let name = pci.to_string();
        if pci.domain != 0 {
            log.push(Finding::invalid(place, format!("PCI address {name}: there is only PCI domain 0")));
            return;
        }
        match self.buses.get(&pci.bus).copied() {
            None => log.push(Finding::invalid(place, format!("PCI address {name}: there is no PCI bus {}", pci.bus))),
            Some(bus) if !bus.has_slot(pci.slot) => {
                log.push(Finding::invalid(
                    place,
                    format!("PCI address {name}: bus {} has no slot {}", pci.bus, pci.slot),
                ));
            }
            Some(_) if !self.take(pci.bus, pci.slot, 1 << (pci.function & 7)) => {
                log.push(Finding::invalid(
                    place,
                    format!("PCI address {name} is taken by another device or by the board"),
                ));
            }
            Some(_) => {}
        }
    }

    /// Devices with a customary place get it while it is free.
    fn take_preferred(&mut self, def: &mut DomainDef) {
        let board = self.board;
        let mut usb2 = BTreeMap::new();
        for controller in def.devices.controllers.iter().filter(|c| c.kind == ControllerKind::Usb && is_companion(c)) {
            if let Some(pci) = controller.info.pci() {
                usb2.entry(controller.index()).or_insert((pci.bus, pci.slot));
            }
        }
        visit(def, board, |info, wish, _| {
            if info.pci().is_some() {
                return;
            }
            let place = match wish {
                Wish::BuiltIn(bus, slot, function) => {
                    self.take(bus, slot, 1 << function);
                    Some((bus, slot, function))
                }
                Wish::Preferred(slot, function, _) => {
                    let functions = if function == 0 { 0xff } else { 1 << function };
                    self.take(0, slot, functions).then_some((0, slot, function))
                }
                Wish::Usb2 { index, function } => {
                    let (bus, slot) = *usb2.entry(index).or_insert_with(|| self.usb2_slot());
                    self.take(bus, slot, 1 << function).then_some((bus, slot, function))
                }
                Wish::Express | Wish::Conventional | Wish::Root => None,
            };
            if let Some((bus, slot, function)) = place {
                let shared = matches!(wish, Wish::Usb2 { function: 0, .. });
                info.address = Some(address(bus, slot, function, shared));
            }
        });
    }

    fn usb2_slot(&self) -> (u8, u8) {
        let usual: &[u8] = if self.board == Board::Q35 { &[0x1d, 0x1a] } else { &[] };
        let mut slots = usual.iter().copied().chain(self.root_slots());
        (0, slots.find(|slot| self.is_free(0, *slot)).unwrap_or(0))
    }

    fn place_bridges(&mut self, def: &mut DomainDef, log: &mut Vec<Finding>) {
        let waiting = |c: &&mut Controller| c.kind == ControllerKind::Pci && c.index() > 0 && c.info.pci().is_none();
        for controller in def.devices.controllers.iter_mut().filter(waiting) {
            let place = match controller.model {
                Some(ControllerModel::PcieRootPort) if self.board == Board::Q35 => self.port_place(),
                Some(ControllerModel::PcieToPciBridge) if self.board == Board::Q35 => self.express(),
                Some(ControllerModel::PciBridge) => self.conventional(),
                Some(ControllerModel::DmiToPciBridge) if self.board == Board::Q35 => self.on_root(),
                Some(ControllerModel::PcieSwitchUpstreamPort) if self.board == Board::Q35 => self.express(),
                Some(ControllerModel::PcieSwitchDownstreamPort) if self.board == Board::Q35 => self.on_switch(),
                // Others are refused by `check`, and placed when they are supported.
                _ => continue,
            };
            match place {
                Some(address) => controller.info.address = Some(address),
                None => log.push(Finding::invalid(&controller.at, "there is no free PCI slot for this controller")),
            }
        }
    }

    fn place_devices(&mut self, def: &mut DomainDef, log: &mut Vec<Finding>) {
        visit(def, self.board, |info, wish, place| {
            if info.pci().is_some() {
                return;
            }
            let found = match wish {
                Wish::Express | Wish::Preferred(_, _, true) => self.express(),
                Wish::Conventional | Wish::Preferred(..) | Wish::Usb2 { .. } => self.conventional(),
                Wish::Root => self.on_root(),
                Wish::BuiltIn(..) => None,
            };
            match found {
                Some(address) => info.address = Some(address),
                None => log.push(Finding::invalid(place, "there is no free PCI slot for this device")),
            }
        });
    }

    /// A place for a PCI Express device: a root port of its own. On a PCI board, any slot.
    fn express(&mut self) -> Option<Address> {
        if self.board != Board::Q35 {
            return self.conventional();
        }
        let ports: Vec<u8> = self.buses.iter().filter(|(_, bus)| **bus == Bus::Port).map(|(n, _)| *n).collect();
        let free = ports.into_iter().find(|bus| self.is_free(*bus, 0));
        let bus = free.or_else(|| self.new_root_port())?;
        self.take(bus, 0, 0xff);
        Some(address(bus, 0, 0, false))
    }

    /// A slot of a switch.
    fn on_switch(&mut self) -> Option<Address> {
        let switches = self.buses.iter().filter(|(_, bus)| **bus == Bus::Switch);
        let mut slots = switches.flat_map(|(bus, _)| (0..=31).map(|slot| (*bus, slot)));
        let (bus, slot) = slots.find(|(bus, slot)| self.is_free(*bus, *slot))?;
        self.take(bus, slot, 0xff);
        Some(address(bus, slot, 0, false))
    }

    /// A slot of the root.
    fn on_root(&mut self) -> Option<Address> {
        let slot = self.root_slots().find(|slot| self.is_free(0, *slot))?;
        self.take(0, slot, 0xff);
        Some(address(0, slot, 0, false))
    }

    /// A place for a device that is not PCI Express; makes a bridge when there is none, or the last slot is reached.
    fn conventional(&mut self) -> Option<Address> {
        let mut free = self.free_conventional();
        let bridge_uses_slot = self.board == Board::I440fx;
        if free.len() <= usize::from(bridge_uses_slot) {
            self.new_bridge(free.first().copied())?;
            free = self.free_conventional();
        }
        let (bus, slot) = *free.first()?;
        self.take(bus, slot, 0xff);
        Some(address(bus, slot, 0, false))
    }

    fn free_conventional(&self) -> Vec<(u8, u8)> {
        let mut free = Vec::new();
        for (bus, kind) in &self.buses {
            match kind {
                Bus::PciRoot => free.extend(self.root_slots().map(|slot| (*bus, slot))),
                Bus::Conventional => free.extend((1..=31).map(|slot| (*bus, slot))),
                _ => {}
            }
        }
        free.retain(|(bus, slot)| self.is_free(*bus, *slot));
        free
    }

    fn new_bridge(&mut self, slot: Option<(u8, u8)>) -> Option<()> {
        let (model, place) = match self.board {
            Board::Q35 => (ControllerModel::PcieToPciBridge, self.express()?),
            _ => {
                let (bus, slot) = slot?;
                self.take(bus, slot, 0xff);
                (ControllerModel::PciBridge, address(bus, slot, 0, false))
            }
        };
        self.add(model, place).map(drop)
    }

    fn new_root_port(&mut self) -> Option<u8> {
        let place = self.port_place()?;
        self.add(ControllerModel::PcieRootPort, place)
    }

    fn add(&mut self, model: ControllerModel, place: Address) -> Option<u8> {
        let index = (1..=u8::MAX).find(|n| !self.buses.contains_key(n))?;
        self.buses.insert(index, Bus::of(Some(model)));
        let mut controller = Controller::new(ControllerKind::Pci, index.into(), Some(model));
        controller.info.address = Some(place);
        self.added.push(controller);
        Some(index)
    }

    /// The next function for a root port: eight share a slot.
    fn port_place(&mut self) -> Option<Address> {
        for slot in self.port_slots.clone() {
            let functions = self.taken.get(&(0, slot)).copied().unwrap_or(0);
            if let Some(function) = (1..8).find(|f| functions & (1 << f) == 0) {
                self.take(0, slot, 1 << function);
                return Some(address(0, slot, function, false));
            }
        }
        let slot = self.root_slots().find(|slot| self.is_free(0, *slot))?;
        self.take(0, slot, 1);
        self.port_slots.push(slot);
        Some(address(0, slot, 0, true))
    }

    /// Slots of the root in the order in which they are given away; the screen's own last.
    fn root_slots(&self) -> impl Iterator<Item = u8> + use<> {
        let first = if self.board == Board::Q35 { 2 } else { 3 };
        (first..=31).chain(1..first)
    }

    fn is_free(&self, bus: u8, slot: u8) -> bool {
        self.taken.get(&(bus, slot)).copied().unwrap_or(0) == 0
    }

    fn take(&mut self, bus: u8, slot: u8, functions: u8) -> bool {
        let taken = self.taken.entry((bus, slot)).or_insert(0);
        let free = *taken & functions == 0;
        *taken |= functions;
        free
    }
}

fn address(bus: u8, slot: u8, function: u8, shared: bool) -> Address {
    Address::pci(PciAddress { domain: 0, bus, slot, function, multifunction: shared.then_some(true) })
}

fn pci_controllers(def: &DomainDef) -> impl Iterator<Item = &Controller> {
    def.devices.controllers.iter().filter(|c| c.kind == ControllerKind::Pci)
}

/// The PCI address of a device that is only kept.
fn untyped_pci(element: &virt_model::xml::Element) -> Option<PciAddress> {
    let address = Address::read(element.child("address")?.clone(), &mut Vec::new());
    match address.kind {
        AddressKind::Pci(pci) => pci,
        _ => None,
    }
}

/// What QEMU calls the bridge, and its number on the chassis.
fn describe_bridge(controller: &mut Controller) {
    let name = match controller.model {
        Some(ControllerModel::PcieRootPort) => "pcie-root-port",
        Some(ControllerModel::PcieToPciBridge) => "pcie-pci-bridge",
        Some(ControllerModel::PciBridge) => "pci-bridge",
        Some(ControllerModel::DmiToPciBridge) => "i82801b11-bridge",
        Some(ControllerModel::PcieSwitchUpstreamPort) => "x3130-upstream",
        Some(ControllerModel::PcieSwitchDownstreamPort) => "xio3130-downstream",
        _ => return,
    };
    let index = controller.index();
    let place = controller.info.pci().copied().unwrap_or_default();
    controller.pci_model.get_or_insert_with(|| PciModel { name: name.to_owned(), ..PciModel::default() });
    match controller.model {
        Some(ControllerModel::PcieRootPort | ControllerModel::PcieSwitchDownstreamPort) => {
            let target = controller.target.get_or_insert_with(PciTarget::default);
            target.chassis.get_or_insert(index);
            target.port.get_or_insert(HexByte((place.slot << 3) | place.function));
        }
        Some(ControllerModel::PciBridge) => {
            controller.target.get_or_insert_with(PciTarget::default).chassis_nr.get_or_insert(index);
        }
        _ => {}
    }
}
