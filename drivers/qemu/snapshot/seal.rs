//! What a client has given becomes a saved machine with the last that is written there: its header, or its end in a pipe.
//!
//! From just before that until the note says that it is complete, its guest must not go on unless the file is none again. Only
//! the descriptor reaches it, so that is kept here for whoever makes the save whole; a virtd that is killed loses it.

use super::files::stored;
use super::{Operation, lock};
use crate::host::out::Out;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::driver::saved::GIVEN;
use virt_model::driver::snapshots::Journal;

/// By machine, what may be a saved machine by now though no note says it.
pub type Sealing = Arc<Mutex<BTreeMap<Uuid, Out>>>;

impl Operation {
    /// The last of it is about to be written: from here on it cannot be cancelled.
    pub(super) fn seal(&self, out: &Out, journal: &Arc<dyn Journal>) -> Result<(), DriverError> {
        if journal.cancelled().is_cancelled() {
            return Err(DriverError::Cancelled);
        }
        journal.point_of_no_return();
        self.goes_to_its_end();
        lock(&self.sealing).insert(self.machine.def.uuid, out.clone());
        Ok(())
    }

    /// Whether the last of it has been begun, and no note says that it is complete.
    pub(super) fn is_sealing(&self) -> bool {
        lock(&self.sealing).contains_key(&self.machine.def.uuid)
    }

    /// It is noted as complete.
    pub(super) fn is_sealed(&self) {
        lock(&self.sealing).remove(&self.machine.def.uuid);
    }

    /// Empties it, if the last of it has been begun. As long as that fails the guest is not to go on.
    pub(super) async fn unseal(&self) -> Result<(), DriverError> {
        let Some(out) = lock(&self.sealing).get(&self.machine.def.uuid).cloned() else { return Ok(()) };
        self.with_images(Path::new(GIVEN), move |_| out.empty().map_err(|e| stored(Path::new(GIVEN), &e))).await?;
        self.is_sealed();
        Ok(())
    }
}
