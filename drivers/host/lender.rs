//! How a guest's processes come to the host's files: they are lent to a user of the guest's own, or the guest runs as we do.

use super::access::{Ledger, LentFile, Want};
use super::user::RunAs;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use uuid::Uuid;
use virt_model::driver::DriverError;

/// By which rights a guest's processes open files.
#[derive(Clone)]
pub enum Lender {
    /// By ours: nothing is lent.
    Ours,
    /// By that user's, to whom the ledger lends what they may not open else.
    To(RunAs, Arc<Ledger>),
}

impl Lender {
    /// Whom the guest's processes run as, if not as we do.
    pub fn user(&self) -> Option<&RunAs> {
        self.pair().map(|(user, _)| user)
    }

    /// What is lent is in there.
    pub fn ledger(&self) -> Option<&Arc<Ledger>> {
        self.pair().map(|(_, ledger)| ledger)
    }

    /// We act for others, so whose a link or a folder is counts: see [`super::resolve::Place::resolve`].
    pub fn is_wary(&self) -> bool {
        self.pair().is_some()
    }

    fn pair(&self) -> Option<(&RunAs, &Arc<Ledger>)> {
        match self {
            Lender::Ours => None,
            Lender::To(user, ledger) => Some((user, ledger)),
        }
    }

    /// The files of `wants` as `guest` gets them, in that order: all of them, or none and the error names the one that it
    /// cannot have. By our rights, what is not there is left out. Blocks.
    pub fn lend(&self, guest: Uuid, wants: &[Want]) -> Result<Vec<LentFile>, DriverError> {
        match self {
            Lender::Ours => ours(wants),
            Lender::To(user, ledger) => ledger.lend(user, guest, wants),
        }
    }

    /// The same for files that a running guest needs in addition: what it was lent before stays so in any case. Blocks.
    pub fn lend_more(&self, guest: Uuid, wants: &[Want]) -> Result<Vec<LentFile>, DriverError> {
        match self {
            Lender::Ours => ours(wants),
            Lender::To(user, ledger) => ledger.lend_more(user, guest, wants),
        }
    }

    /// Takes back what `guest` was lent; see [`Ledger::give_back`]. Blocks.
    pub fn give_back(&self, guest: Uuid) {
        self.ledger().into_iter().for_each(|ledger| ledger.give_back(guest));
    }

    /// The same of these files alone. Blocks.
    pub fn give_back_these(&self, guest: Uuid, paths: &[PathBuf]) {
        self.ledger().into_iter().for_each(|ledger| ledger.give_back_these(guest, paths, &BTreeSet::new()));
    }

    /// A number for somebody who borrows for `guest` beside the guest itself, until they leave.
    pub fn join(&self, guest: Uuid) -> Uuid {
        self.ledger().map_or_else(Uuid::new_v4, |ledger| ledger.join(guest))
    }

    /// Takes back what was lent under that number, which is free again. Blocks.
    pub fn leave(&self, number: Uuid) {
        self.give_back(number);
        self.ledger().into_iter().for_each(|ledger| ledger.leave(number));
    }
}

fn ours(wants: &[Want]) -> Result<Vec<LentFile>, DriverError> {
    let find = |want: &Want| {
        let found = LentFile::ours(&want.path, want.write);
        found.map_err(|e| DriverError::Storage(format!("{}: {e}", want.path.display()))).transpose()
    };
    wants.iter().filter_map(find).collect()
}
