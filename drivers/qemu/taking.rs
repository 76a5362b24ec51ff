//! What a guest takes of the host's for its devices: claimed, then in its record, then changed; before it starts, and when a device is
//! plugged into it. Given up again when a device has gone.

use super::changes::{Change, Claims, HostPart, SYSFS, undo};
use super::hostdev;
use super::instance::Body;
use super::plan::{HostFile, Tap};
use super::record::Keeper;
use crate::host::macvtap::Macvtap;
use crate::host::workers::blocking;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use uuid::Uuid;
use virt_model::device::interface::InterfaceKind;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;

/// How long the host may take to have back what a device had of it.
const GIVING_BACK: Duration = Duration::from_secs(10);

/// What is taken.
#[derive(Debug, Default)]
pub struct Taking {
    /// Of each device that takes something.
    parts: Vec<HostPart>,
    /// The network devices that do not go with their descriptors, by their place among all that the guest's cards have.
    pub links: BTreeMap<usize, Macvtap>,
}

impl Taking {
    /// Claims all that the devices of `def` need, whose USB devices have been found; `taps` are those that its cards ask for. On
    /// failure some of it may be claimed. Blocks.
    pub fn claim(
        def: &DomainDef,
        taps: &[Tap],
        uuid: Uuid,
        claims: &Claims,
        sysfs: &Path,
    ) -> Result<Taking, DriverError> {
        let mut parts = hostdev::parts(def, sysfs);
        claims.take(uuid, &def.name, &HostPart::claims_of(&parts))?;
        let links = hostdev::links(taps, uuid, &def.name, claims)?;
        hostdev::plan(def, sysfs, &mut parts)?;
        let direct = def.devices.interfaces.iter().filter(|card| card.kind == InterfaceKind::Direct);
        parts.extend(direct.zip(links.values()).map(|(card, link)| HostPart {
            alias: card.info.alias().unwrap_or_default().to_owned(),
            claims: vec![hostdev::link_claim(link)],
            changes: vec![Change::Made(link.clone())],
            files: Vec::new(),
        }));
        Ok(Taking { parts, links })
    }

    /// Has it stand in the record, and then changes the host; waits until that has settled down. On failure some of it may be
    /// changed: what the record says is to be undone.
    pub async fn make(&self, keeper: &Arc<Keeper>) -> Result<(), DriverError> {
        if self.parts.is_empty() {
            return Ok(());
        }
        let parts = self.parts.clone();
        keeper.change(move |record| record.host_parts.extend(parts)).await?;
        let changes = HostPart::changes_of(&self.parts);
        if !changes.is_empty() {
            blocking(move || changes.iter().try_for_each(|change| change.make(Path::new(SYSFS)))).await??;
            hostdev::settle().await;
        }
        Ok(())
    }

    /// What QEMU must be able to open for them.
    pub fn files(&self) -> Vec<HostFile> {
        let files: BTreeSet<PathBuf> = self.parts.iter().flat_map(|part| part.files.clone()).collect();
        files.into_iter().map(hostdev::node).collect()
    }
}

impl Body {
    /// Undoes what was changed on the host for that device, which has gone or never came to be, and gives up what the guest had to
    /// itself for it alone. Gives the files that it alone was lent.
    pub async fn gives_up(&self, alias: &str) -> Vec<PathBuf> {
        let Some((part, rest)) = self.keeper.without(alias) else { return Vec::new() };
        let (uuid, mut free) = (self.uuid, Vec::new());
        if let Some(HostPart { changes, files, .. }) = part {
            let undone = blocking(move || undo(&changes, Path::new(SYSFS), uuid));
            // The kernel takes a device from vfio when its QEMU has closed it.
            let late = || DriverError::TimedOut("the kernel takes long to give it back".to_owned());
            let undone = timeout(GIVING_BACK, undone).await.unwrap_or_else(|_| Err(late()));
            let name = alias.to_owned();
            let forgotten = self.keeper.change(move |record| record.host_parts.retain(|part| part.alias != name)).await;
            if let Err(error) = undone.and(forgotten) {
                tracing::warn!(%uuid, alias, %error, "what it had of the host's is given up when the guest ends");
                return Vec::new();
            }
            let needed = |file: &PathBuf| rest.host_parts.iter().any(|part| part.files.contains(file));
            free = files.into_iter().filter(|file| !needed(file)).collect();
        }
        self.leavings.claims.release_except(uuid, &rest.all_claims());
        free
    }
}
