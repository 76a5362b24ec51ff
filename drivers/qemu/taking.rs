//! What a guest takes of the host's for its devices: claimed, then in its record, then changed; before it starts, and when a device is
//! plugged into it. Given up again when a device has gone.

use super::changes::{Change, Claims, HostPart, SYSFS, undo};
use super::hostdev;
use super::instance::Body;
use super::plan::{HostFile, Tap};
use super::record::{Keeper, Record};
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
    /// itself for it alone. Gives the files that it alone was lent. What the host does not have back stays in the record, and is
    /// undone when the guest has ended.
    pub async fn gives_up(&self, alias: &str) -> Vec<PathBuf> {
        self.gives_up_within(GIVING_BACK, alias, Path::new(SYSFS)).await
    }

    /// The same on a host that `sysfs` shows, which may take so long.
    pub(super) async fn gives_up_within(&self, patience: Duration, alias: &str, sysfs: &Path) -> Vec<PathBuf> {
        let Some((part, rest)) = self.keeper.without(alias) else { return Vec::new() };
        let (uuid, mut free) = (self.uuid, Vec::new());
        if let Some(part) = part {
            if let Err(error) = self.is_undone(&part, &rest, patience, sysfs).await {
                tracing::warn!(%uuid, alias, %error, "what it had of the host's is given up when the guest ends");
                return Vec::new();
            }
            let needed = |file: &PathBuf| rest.host_parts.iter().any(|part| part.files.contains(file));
            free = part.files.into_iter().filter(|file| !needed(file)).collect();
        }
        self.leavings.claims.release_except(uuid, &rest.all_claims());
        free
    }

    /// Undoes what was changed for a device, of which the record says nothing afterwards; `rest` is the record without it. On failure
    /// it does still.
    async fn is_undone(
        &self,
        part: &HostPart,
        rest: &Record,
        patience: Duration,
        sysfs: &Path,
    ) -> Result<(), DriverError> {
        let (uuid, alias, changes) = (self.uuid, part.alias.clone(), part.changes.clone());
        // The kernel gives no device to a driver of the host's while the guest has another one of its IOMMU group.
        let has_rest = |other: &&HostPart| other.claims.iter().any(|claim| part.claims.contains(claim));
        if let Some(other) = rest.host_parts.iter().find(has_rest).map(|other| other.alias.clone()) {
            return self.keeper.change(move |record| record.hand_on_part(&alias, &other)).await;
        }
        let sysfs = sysfs.to_owned();
        let undone = timeout(patience, blocking(move || undo(&changes, &sysfs, uuid))).await;
        // The kernel takes a device from vfio when its QEMU has closed it.
        undone.map_err(|_| DriverError::TimedOut("the kernel takes long to give it back".to_owned()))??;
        self.keeper.change(move |record| _ = record.take_part(&alias)).await
    }
}
