//! What domains say of the images that they need: for those who are about to write one (`crate::images`).

use super::{Domain, Domains};
use crate::error::Error;
use crate::images::{Chain, Machines, Overlay, chains_of, chains_of_snapshot, images_of, overlays_of};
use crate::lock::lock;
use uuid::Uuid;
use virt_model::driver::DriverError;

impl Machines for Domains {
    fn chains(&self, except: Option<Uuid>) -> Vec<Chain> {
        let others = self.all().into_iter().filter(|domain| Some(domain.uuid) != except);
        others.flat_map(|domain| domain.chains()).collect()
    }

    fn running_chains(&self) -> Vec<Chain> {
        self.all().iter().flat_map(|domain| domain.running_chains()).collect()
    }

    fn overlays(&self) -> Vec<Overlay> {
        self.all().iter().flat_map(|domain| domain.overlays()).collect()
    }
}

impl Domain {
    /// What the driver said while it was to `deed` this domain. Of an image that is locked it is told who has it.
    pub(super) fn driver_failed(&self, deed: &str, error: DriverError) -> Error {
        Error::from_driver(&self.name(), deed, self.shared.images.with_owner_of_lock(|| self.chains(), error))
    }

    /// The chains of images that it needs: what runs, what is stored, and its snapshots.
    fn chains(&self) -> Vec<Chain> {
        let state = lock(&self.state);
        let whose = format!("domain '{}'", state.name);
        let mut chains = Vec::new();
        if let Some(guest) = &state.guest {
            images_of(&guest.live).for_each(|disk| chains_of(self.uuid, &whose, &disk, &mut chains));
        }
        if let Some(stored) = &state.stored {
            stored.disks.iter().for_each(|disk| chains_of(self.uuid, &whose, disk, &mut chains));
        }
        state.snapshots.defs().for_each(|def| chains_of_snapshot(self.uuid, &state.name, def, &mut chains));
        chains
    }

    /// Of them those of the guest that runs.
    fn running_chains(&self) -> Vec<Chain> {
        let state = lock(&self.state);
        let mut chains = Vec::new();
        if let Some(guest) = &state.guest {
            let whose = format!("domain '{}'", state.name);
            images_of(&guest.live).for_each(|disk| chains_of(self.uuid, &whose, &disk, &mut chains));
        }
        chains
    }

    /// The overlays that its snapshots have laid on its disks.
    fn overlays(&self) -> Vec<Overlay> {
        let state = lock(&self.state);
        let mut overlays = Vec::new();
        state.snapshots.defs().for_each(|def| overlays_of(def, &mut overlays));
        overlays
    }
}
