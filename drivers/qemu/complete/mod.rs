//! Completes a machine: what the definition leaves open is chosen once, so that the stored definition says all of it and
//! the guest finds the same machine at every start.
//!
//! Every step keeps what is there, so completing a completed definition changes nothing.
//!
//! ```text
//!  defaults ─▶ controllers ─▶ disks, USB, virtio-serial on their controllers ─▶ PCI, with its bridges
//!                                        at start only: aliases, ports, socket paths (live)
//! ```

mod buses;
mod controllers;
mod defaults;
mod live;
mod pci;

pub use live::{Chosen, go_live, name_devices, name_new_devices};

use super::capabilities::Capabilities;
use super::firmware;
use virt_model::domain::DomainDef;
use virt_model::domain::os::Nvram;
use virt_model::xml::{Finding, FindingKind};

/// The boards whose devices we know how to lay out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Board {
    /// PCI Express, `pc-q35-…`.
    Q35,
    /// PCI, `pc-i440fx-…`.
    I440fx,
    /// Any other: nothing is chosen for it, and `check` refuses it.
    Other,
}

impl Board {
    /// The board of a definition.
    pub fn of(def: &DomainDef) -> Board {
        let arch = def.os.kind.arch.as_deref().unwrap_or("x86_64");
        let machine = def.os.kind.machine.as_deref().unwrap_or("pc");
        match machine {
            _ if !matches!(arch, "x86_64" | "i686") => Board::Other,
            "q35" => Board::Q35,
            name if name.starts_with("pc-q35-") => Board::Q35,
            "pc" => Board::I440fx,
            name if name.starts_with("pc-i440fx-") => Board::I440fx,
            _ => Board::Other,
        }
    }
}

/// Fills in what must never change again: the board's version, the emulator, default devices, controllers, addresses. What
/// is there is kept. Errors are about the document: an address given twice, a bus that cannot be. `def` is then to be
/// thrown away.
pub fn complete(def: &mut DomainDef, caps: &Capabilities) -> Result<(), Vec<Finding>> {
    let mut log = Vec::new();
    defaults::machine(def, caps);
    def.os.nvram.iter_mut().for_each(Nvram::say_path_as_text);
    firmware::choose(def, &caps.firmware);
    let board = Board::of(def);
    if board != Board::Other {
        controllers::pci_root(def, board);
    }
    defaults::fill(def, caps);
    if board != Board::Other {
        controllers::check_numbers(def, &mut log);
        controllers::built_in(def, board);
        buses::disks(def, board, &mut log);
        buses::virtio_serial(def, &mut log);
        buses::smartcards(def);
        controllers::for_drives(def, board);
        buses::usb(def, board, &mut log);
        buses::memory_slots(def, &mut log);
        pci::assign(def, board, &mut log);
    }
    // What was chosen may not go with what was said.
    if log.is_empty() {
        log = def.contradictions();
        log.retain(|finding| finding.kind == FindingKind::Invalid);
    }
    if log.is_empty() { Ok(()) } else { Err(log) }
}
