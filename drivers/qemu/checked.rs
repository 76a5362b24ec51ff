//! A definition of which it is known that this QEMU can run it on this host: it was looked at, or is what became of one that was.

use virt_model::domain::DomainDef;

/// Only [`super::check`] makes one, and the command line is built of nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Checked<'a>(&'a DomainDef);

impl<'a> Checked<'a> {
    /// For [`super::check`] alone.
    pub(super) fn of(def: &'a DomainDef) -> Checked<'a> {
        Checked(def)
    }

    /// The definition.
    pub fn def(self) -> &'a DomainDef {
        self.0
    }
}
