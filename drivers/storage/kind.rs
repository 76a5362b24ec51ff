//! The kinds of pool that this host has: each is a driver, found once here, and all that differs between them is its own.

use super::HostStorage;
use super::disk::Partitioned;
use super::folders::Folders;
use super::logical::Groups;
use async_trait::async_trait;
use std::sync::Arc;
use virt_model::driver::DriverError;
use virt_model::driver::storage::{OpenPool, PoolDevice, Work};
use virt_model::storage::pool::{PoolDef, PoolKind, PoolSource};
use virt_model::storage::volume::VolumeDef;
use virt_model::xml::Finding;

/// Pools of one kind.
#[async_trait]
pub trait PoolDriver: Sync {
    /// Why pools of that kind are root's virtd's alone, if so.
    fn only_for_root(&self) -> Option<&'static str>;

    /// Why none is started here, for what is not installed.
    fn lacks(&self, _: &HostStorage) -> Option<String> {
        None
    }

    /// The formats of volumes that are made.
    fn volume_formats(&self) -> &'static [&'static str];

    /// What it can come from.
    fn source_formats(&self) -> &'static [&'static str];

    /// The most that can be done with one.
    fn features(&self) -> &'static [&'static str];

    /// What of one cannot be, whatever is on the host.
    fn refused(&self, def: &PoolDef) -> Vec<Finding>;

    /// What of a volume's document cannot be in one.
    fn refused_of_volume(&self, _: &VolumeDef) -> Vec<Finding> {
        Vec::new()
    }

    /// Where it is searched for what one could come from.
    fn search(&self) -> Search;

    /// What one could come from; of the server that is `asked`, if it is searched [there](Search::Server).
    async fn find_sources(
        &self,
        host: &HostStorage,
        asked: Option<&PoolSource>,
    ) -> Result<Vec<PoolSource>, DriverError>;

    /// See [`Storage::build`](virt_model::driver::storage::Storage::build), and so on: it has been checked.
    async fn build(
        &self,
        host: &HostStorage,
        def: &PoolDef,
        overwrite: bool,
        work: &dyn Work,
    ) -> Result<(), DriverError>;

    /// The same.
    async fn delete(&self, host: &HostStorage, def: &PoolDef, work: &dyn Work) -> Result<(), DriverError>;

    /// The same.
    async fn open(&self, host: &HostStorage, def: &PoolDef, work: &dyn Work) -> Result<Arc<dyn OpenPool>, DriverError>;

    /// The same.
    async fn close(&self, host: &HostStorage, def: &PoolDef) -> Result<(), DriverError>;

    /// The same.
    async fn devices(&self, host: &HostStorage, def: &PoolDef) -> Result<Vec<PoolDevice>, DriverError>;
}

/// Where it is searched for what pools of a kind could come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Search {
    /// Nowhere.
    None,
    /// On this host.
    Host,
    /// At a server that is named.
    Server,
}

/// The driver of a kind; `None`: such pools are kept and shown, and not started here.
pub fn driver_of(kind: PoolKind) -> Option<&'static dyn PoolDriver> {
    Some(match kind {
        PoolKind::Dir => &Folders::Plain,
        PoolKind::Fs => &Folders::OnDevice,
        PoolKind::Netfs => &Folders::Shared,
        PoolKind::Logical => &Groups,
        PoolKind::Disk => &Partitioned,
        _ => return None,
    })
}

/// The kinds of which pools are started here, for people.
pub fn started_kinds() -> String {
    let all = PoolKind::ALL.iter().filter(|kind| driver_of(**kind).is_some());
    let named: Vec<String> = all.map(|kind| format!("'{kind}'")).collect();
    match named.split_last() {
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => String::new(),
    }
}
