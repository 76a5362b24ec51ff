//! Volumes that machines have as disks: in one place a pool and a name become the file that a driver opens. What is stored says the
//! names alone; what runs says both, and what an earlier start has said is of no account.

use crate::authz::Caller;
use crate::error::{Error, Result};
use std::fmt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use uuid::Uuid;
use virt_model::device::Disk;
use virt_model::device::disk::{BackingStore, DiskKind, StoreFormat};
use virt_model::device::source::{DiskSource, Encryption, EncryptionFormat, SecretKind, SecretRef};
use virt_model::domain::DomainDef;
use virt_model::storage::volume::VolumeKind;
use virt_model::xml::Finding;

/// How long a machine that starts waits for networks and pools that do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What is answered later.
pub(crate) type Answer<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

/// Whoever keeps volumes.
pub(crate) trait VolumeKeeper: Send + Sync {
    /// Where a volume of that name is, or would be.
    fn place(&self, pool: &str, volume: &str) -> Option<VolumePlace>;

    /// The images of a volume that is there, its own first; what it stands on only if `whole`.
    /// Errors: `NoSuchPool`, `NoSuchVolume`, `OperationInvalid` if the pool is not active, `StorageFailed` if it stands on what is
    /// not followed.
    fn find(&self, pool: &str, volume: &str, whole: bool) -> Result<Vec<VolumeImage>>;

    /// A file, if it is a volume's of which virtd has noted what it stands on, stands on that from now on, or on nothing. Blocks.
    /// Error: `StorageFailed`.
    fn stands_on(&self, file: &Path, base: Option<&Path>) -> Result<()>;

    /// Starts a pool that is inactive, for a caller who may.
    fn start(&self, caller: Caller, pool: String) -> Answer<'_>;

    /// Refuses a file that is to be made below the folder of a pool that is lost: what is there now is no folder of the pool's.
    /// Error: `OperationInvalid`.
    fn refuse_lost(&self, file: &Path) -> Result<()>;

    /// Does `work`, which gives a file a capacity of so many bytes, as `by` has asked: if it is a volume's, what that is more is
    /// taken before of what its owner may have, and it is looked at afterwards. Errors: `LimitsExceeded`, or that of the work.
    fn resizes<'a>(&'a self, file: PathBuf, by: u32, capacity: u64, work: Answer<'a>) -> Answer<'a>;

    /// Waits, for a while, until it is known whether a pool that is starting starts.
    fn settles(&self, pool: String) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// Where a volume is, and what it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VolumePlace {
    pub path: PathBuf,
    pub kind: VolumeKind,
}

impl VolumePlace {
    /// Has a source of a disk lead there, and nowhere else.
    fn put_into(&self, source: &mut DiskSource) {
        let path = Some(self.path.to_string_lossy().into_owned());
        (source.file, source.dev) = if self.kind == VolumeKind::Block { (None, path) } else { (path, None) };
    }

    /// What a disk there is.
    fn disk_kind(&self) -> DiskKind {
        if self.kind == VolumeKind::Block { DiskKind::Block } else { DiskKind::File }
    }
}

/// An image of a volume, or of what that stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VolumeImage {
    /// Where it is.
    pub place: VolumePlace,
    /// The volume's format.
    pub format: String,
    /// It can be read with a secret only.
    pub encrypted: bool,
    /// That secret, if it is known: its uuid, or what it is for.
    pub secret: Option<String>,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Volumes(OnceLock<Box<dyn VolumeKeeper>>);

impl fmt::Debug for Volumes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Volumes")
    }
}

/// By which a volume is known whose place is not: no image has such a path.
pub(crate) fn by_name(pool: &str, volume: &str) -> PathBuf {
    PathBuf::from(format!("\0{pool}/{volume}"))
}

/// The pool and the volume, or the pool alone, of an image that is known [by its name](by_name).
fn name_of(image: &Path) -> Option<&str> {
    image.to_str()?.strip_prefix('\0')
}

/// What is above all of that pool.
pub(crate) fn pool_by_name(pool: &str) -> PathBuf {
    PathBuf::from(format!("\0{pool}"))
}

fn pools_of(def: &DomainDef) -> Vec<String> {
    let volumes = def.devices.disks.iter().flat_map(Disk::volumes);
    let mut pools: Vec<String> = volumes.map(|(pool, _)| pool.to_owned()).collect();
    pools.sort();
    pools.dedup();
    pools
}

fn has_volumes(def: &DomainDef) -> bool {
    def.devices.disks.iter().any(has_volume)
}

fn has_volume(disk: &Disk) -> bool {
    disk.volumes().next().is_some()
}

impl Volumes {
    /// From now on volumes are asked for there.
    pub fn kept_by(&self, keeper: Box<dyn VolumeKeeper>) {
        let _ = self.0.set(keeper);
    }

    /// Starts the pools that a machine needs, those that are not active, if the caller may.
    pub async fn start_for(&self, caller: &Caller, def: &DomainDef) -> Result<()> {
        let Some(keeper) = self.0.get() else { return Ok(()) };
        for pool in pools_of(def) {
            keeper.start(caller.clone(), pool).await?;
        }
        Ok(())
    }

    /// Waits for pools of a machine that are just starting, for each at most [`PATIENCE`].
    pub async fn settle_for(&self, def: &DomainDef) {
        let Some(keeper) = self.0.get() else { return };
        for pool in pools_of(def) {
            keeper.settles(pool).await;
        }
    }

    /// Images stand on others from now on, or on nothing. Blocks. Error: as of [`VolumeKeeper::stands_on`].
    pub fn stand_on(&self, moved: &[(PathBuf, Option<PathBuf>)]) -> Result<()> {
        let Some(keeper) = self.0.get() else { return Ok(()) };
        moved.iter().try_for_each(|(file, base)| keeper.stands_on(file, base.as_deref()))
    }

    /// See [`VolumeKeeper::refuse_lost`].
    pub fn refuse_lost(&self, file: &Path) -> Result<()> {
        self.0.get().map_or(Ok(()), |keeper| keeper.refuse_lost(file))
    }

    /// See [`VolumeKeeper::resizes`].
    pub async fn resizes<'a>(&'a self, file: PathBuf, by: u32, capacity: u64, work: Answer<'a>) -> Result<()> {
        match self.0.get() {
            Some(keeper) => keeper.resizes(file, by, capacity, work).await,
            None => work.await,
        }
    }

    /// The path of an image that is known by its name, or as it is.
    pub fn path_of(&self, image: &Path) -> Option<PathBuf> {
        let Some(named) = name_of(image) else { return Some(image.to_owned()) };
        let (pool, volume) = named.split_once('/')?;
        self.0.get()?.place(pool, volume).map(|place| place.path)
    }

    /// Where those images are; `None` where all are known by their paths.
    pub fn places_of(&self, images: &[PathBuf]) -> Option<Vec<PathBuf>> {
        let is_named = images.iter().any(|image| name_of(image).is_some());
        is_named.then(|| images.iter().map(|image| self.path_of(image).unwrap_or_else(|| image.clone())).collect())
    }

    /// Says in a definition where its volumes are, or would be, and nothing else of them.
    pub fn place(&self, def: &mut Arc<DomainDef>) {
        let Some(keeper) = self.0.get().filter(|_| has_volumes(def)) else { return };
        let place = |(pool, volume): (&str, &str)| keeper.place(pool, volume);
        for disk in &mut Arc::make_mut(def).devices.disks {
            if let Some(place) = disk.volume().map(place) {
                put_or_forget(place, disk.source.get_or_insert_default());
            }
            disk.each_below(|store| {
                if let Some(place) = store.volume().map(place) {
                    put_or_forget(place, store.source.get_or_insert_default());
                }
            });
        }
    }

    /// Has a definition say of its volumes what a driver needs to open them. Errors: as [`VolumeKeeper::find`].
    pub fn plug(&self, def: &mut Arc<DomainDef>) -> Result<()> {
        if !has_volumes(def) {
            return Ok(());
        }
        let name = def.name.clone();
        Arc::make_mut(def).devices.disks.iter_mut().try_for_each(|disk| self.plug_disk(&name, disk))
    }

    /// The same, as far as that is possible.
    pub fn plug_what_is_there(&self, def: &mut Arc<DomainDef>) {
        let mut plugged = def.clone();
        match self.plug(&mut plugged) {
            Ok(()) => *def = plugged,
            Err(_) => self.place(def),
        }
    }

    /// The same of one disk, and of what it says that it stands on. What its document says counts more than what a volume says of itself.
    pub fn plug_disk(&self, domain: &str, disk: &mut Disk) -> Result<()> {
        let whose = format!("domain '{domain}', disk '{}'", disk.target.dev);
        if let Some(volume) = disk.volume() {
            let said = Said { format: disk.format(), key: disk.encryption().is_some(), below: disk.backing.is_some() };
            let found = self.plugged(&whose, volume, said)?;
            disk.driver.get_or_insert_default().format.get_or_insert(found.format);
            disk.backing = disk.backing.take().or(found.below);
            let source = disk.source.get_or_insert_default();
            found.place.put_into(source);
            source.encryption = source.encryption.take().or(found.key);
        }
        let mut plugged = Ok(());
        disk.each_below(|store| {
            if plugged.is_ok() {
                plugged = self.plug_layer(&whose, store);
            }
        });
        plugged
    }

    fn plug_layer(&self, whose: &str, store: &mut BackingStore) -> Result<()> {
        let Some(volume) = store.volume() else { return Ok(()) };
        let key = store.source.as_ref().is_some_and(|source| source.encryption.is_some());
        let format = store.format.as_ref().map(|format| &*format.name);
        let found = self.plugged(whose, volume, Said { format, key, below: store.backing.is_some() })?;
        store.format.get_or_insert_with(|| StoreFormat { name: found.format, ..StoreFormat::default() });
        // The chain is told to its end.
        store.backing = store.backing.take().or(found.below).or_else(|| Some(Box::default()));
        let source = store.source.get_or_insert_default();
        found.place.put_into(source);
        source.encryption = source.encryption.take().or(found.key);
        Ok(())
    }

    /// What a volume says of itself, where that is not `said`.
    fn plugged(&self, whose: &str, (pool, volume): (&str, &str), said: Said<'_>) -> Result<Plugged> {
        let keeper = self.0.get().ok_or_else(|| Error::NoSuchPool { what: "name", value: pool.to_owned() })?;
        let found = keeper.find(pool, volume, !said.below).map_err(|error| match error {
            Error::OperationInvalid(text) => Error::OperationInvalid(format!("{whose}: {text}")),
            Error::NoSuchVolume(text) => Error::NoSuchVolume(format!("{whose}: {text}")),
            Error::StorageFailed(text) => Error::StorageFailed(format!("{whose}: {text}")),
            error => error,
        })?;
        let Some((own, below)) = found.split_first() else {
            return Err(Error::Internal(format!("{whose}: its volume has no image")));
        };
        let format = opened_as(&own.format);
        let as_it_is = said.format.is_none_or(|said| said == format);
        let unnamed = || {
            let text = format!(
                "{whose}: volume '{volume}' of pool '{pool}' is encrypted, and nobody has said with which secret: name it in \
                 <source> (<encryption format='luks'><secret type='passphrase' uuid='…'/></encryption>)"
            );
            Error::OperationInvalid(text)
        };
        let key = match own.encrypted && as_it_is && !said.key {
            true => Some(key_of(own).ok_or_else(unnamed)?),
            false => None,
        };
        let below = match !said.below && !below.is_empty() {
            true => Some(layers(below).ok_or_else(unnamed)?),
            false => None,
        };
        Ok(Plugged { place: own.place.clone(), format: format.to_owned(), key, below })
    }

    /// What of a machine's volumes is missing now.
    pub fn missing_in(&self, def: &DomainDef) -> Vec<Finding> {
        let disks = def.devices.disks.iter().filter(|disk| has_volume(disk));
        let missing = disks.filter_map(|disk| {
            let error = self.plug_disk(&def.name, &mut disk.clone()).err()?;
            let at = disk.source.as_ref().map_or(&disk.at, |source| &source.at);
            Some(Finding::unsupported(at, error.to_string()))
        });
        missing.collect()
    }
}

/// What a document says itself of a volume.
struct Said<'a> {
    format: Option<&'a str>,
    /// How it is encrypted.
    key: bool,
    /// What it stands on.
    below: bool,
}

/// What a driver needs to open a volume.
struct Plugged {
    place: VolumePlace,
    format: String,
    key: Option<Encryption>,
    below: Option<Box<BackingStore>>,
}

/// Has a source of a disk lead to where its volume is, or nowhere while that is not known.
fn put_or_forget(place: Option<VolumePlace>, source: &mut DiskSource) {
    match place {
        Some(place) => place.put_into(source),
        None => source.forget_place(),
    }
}

/// The word by which machines say a volume's format.
fn opened_as(format: &str) -> &str {
    // What is encrypted is said beside it.
    if format == "luks" { "raw" } else { format }
}

fn key_of(image: &VolumeImage) -> Option<Encryption> {
    let named = image.secret.as_deref()?;
    let uuid = Uuid::try_parse(named).ok();
    let usage = uuid.is_none().then(|| named.to_owned());
    let secret = SecretRef { kind: Some(SecretKind::Passphrase), uuid, usage, ..SecretRef::default() };
    Some(Encryption { format: EncryptionFormat::Luks, secrets: vec![secret], ..Encryption::default() })
}

/// What a volume stands on, to its end. `None`: something of it is encrypted, and its secret is not known.
fn layers(below: &[VolumeImage]) -> Option<Box<BackingStore>> {
    let mut chain = Box::<BackingStore>::default();
    for image in below.iter().rev() {
        let encryption = if image.encrypted { Some(key_of(image)?) } else { None };
        let mut source = DiskSource { encryption, ..DiskSource::default() };
        image.place.put_into(&mut source);
        chain = Box::new(BackingStore {
            kind: Some(image.place.disk_kind()),
            format: Some(StoreFormat { name: opened_as(&image.format).to_owned(), ..StoreFormat::default() }),
            source: Some(source),
            backing: Some(chain),
            ..BackingStore::default()
        });
    }
    Some(chain)
}

#[cfg(test)]
#[path = "volumes_tests.rs"]
mod tests;
