//! A definition of which it is known that this QEMU can run it on this host.

use virt_model::domain::DomainDef;

/// Only [`super::check`] makes one, and the command line is built of nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Checked<'a>(&'a DomainDef);

impl<'a> Checked<'a> {
    /// For [`super::check`] alone, which builds the command line in one place.
    pub(super) fn of(def: &'a DomainDef) -> Checked<'a> {
        Checked(def)
    }

    /// The definition.
    pub fn def(self) -> &'a DomainDef {
        self.0
    }
}
