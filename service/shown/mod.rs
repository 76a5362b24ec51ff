//! What is shown of a machine's devices, so that a client needs no XML: a list of dictionaries for each kind, in the document's
//! order. Never anything that is secret: everybody on the bus may read it. A key of which nothing is known is left out.
//!
//! It is made of the typed definition when that becomes known, and kept packed (`pack.rs`).

mod consoles;
mod disks;
mod interfaces;
mod machine;
mod osinfo;
mod pack;
pub(crate) mod text;

pub use pack::Said;

use pack::{Packer, Unpacked};
use virt_model::domain::DomainDef;

/// What is shown of one configuration.
#[derive(Clone, PartialEq, Eq)]
pub struct Shown(Box<[u8]>);

/// A kind of what is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "called as the properties are")]
pub enum Section {
    Disks,
    Interfaces,
    Graphics,
    Consoles,
    Channels,
    HostDevices,
    Firmware,
    Tpm,
    OperatingSystem,
    BootOrder,
}

/// What is said of one device.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a>(Unpacked<'a>);

impl Shown {
    /// Of a definition.
    pub fn of(def: &DomainDef) -> Shown {
        // In the order of `Section`.
        let packer = Packer::default()
            .section(def.devices.disks.iter().map(disks::entry))
            .section(def.devices.interfaces.iter().map(interfaces::entry))
            .section((0..).zip(&def.devices.graphics).map(|(index, display)| consoles::display(index, display)))
            .section(def.devices.all_consoles().map(consoles::console))
            .section(def.devices.channels.iter().map(consoles::channel))
            .section(def.devices.hostdevs.iter().map(machine::host_device))
            .section(machine::firmware(&def.os))
            .section(def.devices.tpms.first().map(machine::tpm))
            .section(machine::operating_system(def))
            .section(machine::boot_order(def));
        Shown(packer.finish())
    }

    /// The devices of a kind. Of what there is one of: one, or none.
    pub fn entries(&self, section: Section) -> impl Iterator<Item = Entry<'_>> {
        let mut all = Unpacked(&self.0);
        let before = (0..section as usize).all(|_| all.part().is_some());
        let mut entries = all.part().filter(|_| before).unwrap_or(Unpacked(&[]));
        std::iter::from_fn(move || entries.part().map(Entry))
    }

    /// The only thing that is said in a section.
    pub fn only(&self, section: Section) -> Option<Said<'_>> {
        self.entries(section).next()?.next().map(|(_, said)| said)
    }
}

impl Default for Shown {
    fn default() -> Self {
        Shown::of(&DomainDef::default())
    }
}

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shown({} bytes)", self.0.len())
    }
}

impl<'a> Iterator for Entry<'a> {
    type Item = (&'static str, Said<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        self.0.value()
    }
}

#[cfg(test)]
mod tests;
