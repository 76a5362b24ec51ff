//! What is said of any device: its number on the board, its ROM.

use super::Check;
use crate::qemu::complete::Board;
use std::collections::BTreeSet;
use virt_model::device::controller::ControllerModel;
use virt_model::device::{Controller, ControllerKind};

/// The firmware's tables count in a few bits.
const MOST_ACPI: u32 = 16_383;

impl Check<'_> {
    pub(super) fn places(&mut self) {
        let built_in: BTreeSet<String> = self.built_in().map(|c| c.at.path.to_string()).collect();
        let mut numbers = BTreeSet::new();
        for (info, place) in self.def.devices.infos() {
            let on_pci = info.pci().is_some() && !built_in.contains(&place.path.to_string());
            if let Some(acpi) = &info.acpi {
                self.refuse_if(
                    !on_pci,
                    &acpi.at,
                    "only PCI devices have a number of firmware's, and none of the board's own",
                );
                let tables = self.def.features.as_ref().is_some_and(|features| features.acpi);
                self.refuse_if(!tables, &acpi.at, "a number of firmware's needs <acpi/> in <features>");
                let fits = (1..=MOST_ACPI).contains(&acpi.index);
                self.refuse_if(!fits, &acpi.at.attribute("index"), "numbers of firmware's are 1 to 16383");
                let again = !numbers.insert(acpi.index);
                self.refuse_if(again, &acpi.at.attribute("index"), "there are two devices with this number");
            }
            if let Some(rom) = &info.rom {
                self.refuse_if(!on_pci, &rom.at, "only PCI devices have a ROM, and none of the board's own");
                let relative = rom.file.as_deref().is_some_and(|file| !file.starts_with('/'));
                self.refuse_if(relative, &rom.at.attribute("file"), "the path must be absolute");
                let none = rom.enabled == Some(false) && (rom.file.is_some() || rom.bar.is_some());
                self.refuse_if(none, &rom.at, "a ROM with enabled='no' has neither bar nor file");
            }
        }
    }

    /// Controllers that are there whatever the command line says.
    fn built_in(&self) -> impl Iterator<Item = &Controller> {
        let root = |c: &Controller| matches!(c.model, Some(ControllerModel::PciRoot | ControllerModel::PcieRoot));
        let own = move |c: &&Controller| match c.kind {
            ControllerKind::Pci => root(c),
            ControllerKind::Ide | ControllerKind::Fdc => true,
            ControllerKind::Sata => self.board == Board::Q35 && c.index() == 0,
            _ => false,
        };
        self.def.devices.controllers.iter().filter(own)
    }
}
