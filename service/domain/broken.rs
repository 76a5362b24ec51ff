//! A machine whose own files cannot be read: it stays on the bus and says why, what runs of it can be stopped, and it can
//! be defined anew or given up. Nothing else is done to what nobody knows.

use super::Domain;
use super::state::State;
use crate::authz::Action;
use crate::error::{Error, Result};
use crate::lock::lock;

impl State {
    /// Why this machine's files cannot be used; empty where they can.
    pub(super) fn why_broken(&self) -> String {
        let lost = self.sought.as_ref().and_then(|sought| sought.why.as_ref());
        let lost = lost.map(|why| format!("its guest could not be looked at: {why}")).or(self.unread.clone());
        self.broken.clone().or_else(|| self.snapshots.why_broken()).or(lost).unwrap_or_default()
    }

    /// Refuses to do anything with files that cannot be read.
    pub(super) fn sound(&self) -> Result<()> {
        if let Some(why) = &self.broken {
            let text = format!("domain '{}' is broken: {why}; define it anew, or undefine it", self.name);
            return Err(Error::OperationInvalid(text));
        }
        if let Some(why) = self.snapshots.why_broken() {
            let text = format!(
                "domain '{}' is broken: {why}; mend that and restart virtd, or undefine it with snapshots-metadata",
                self.name
            );
            return Err(Error::OperationInvalid(text));
        }
        Ok(())
    }

    /// The same for one kind of change: what runs can be stopped, and what is broken given up. Reads look for themselves.
    pub(super) fn sound_for(&self, action: Action) -> Result<()> {
        match action {
            Action::Read | Action::ReadSecure | Action::Stop | Action::Suspend | Action::Delete => Ok(()),
            _ => self.sound(),
        }
    }
}

impl Domain {
    /// See [`State::sound`].
    pub(super) fn sound(&self) -> Result<()> {
        lock(&self.state).sound()
    }
}
