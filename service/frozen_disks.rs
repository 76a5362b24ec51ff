//! Warnings of disks that are stored and could not be written, were their machines started: they are written to the log, for whoever
//! defines a machine may mean to put that right.
//!
//! Each look goes over all machines. So what is defined meanwhile is looked at together, by the next one.

use crate::lock::lock;
use crate::shared::Shared;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use virt_model::domain::DomainDef;

/// How long a definition waits for others that are looked at with it.
const TOGETHER: Duration = Duration::from_millis(200);

/// Configurations that are still to be looked at; `None`: nobody looks.
#[derive(Debug, Default)]
pub(crate) struct FrozenDisks(Mutex<Option<Vec<Arc<DomainDef>>>>);

impl FrozenDisks {
    /// Has a configuration that has been stored looked at, in the background.
    pub fn look_at(&self, shared: &Arc<Shared>, def: Option<Arc<DomainDef>>) {
        let Some(def) = def else { return };
        let mut waiting = lock(&self.0);
        if let Some(waiting) = &mut *waiting {
            // What it is defined as now counts.
            waiting.retain(|other| other.uuid != def.uuid);
            return waiting.push(def);
        }
        *waiting = Some(vec![def]);
        tokio::spawn(look(shared.clone()));
    }

    /// Those that have come since; `None` if there are none: from then on nobody looks.
    fn take(&self) -> Option<Vec<Arc<DomainDef>>> {
        let mut waiting = lock(&self.0);
        let come = waiting.take().filter(|come| !come.is_empty());
        *waiting = come.is_some().then(Vec::new);
        come
    }
}

async fn look(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(TOGETHER).await;
        let Some(defs) = shared.frozen_disks.take() else { return };
        for (def, finding) in shared.images.frozen_in_any(&defs).await {
            tracing::warn!(uuid = %def.uuid, name = def.name, "{finding}");
        }
    }
}
