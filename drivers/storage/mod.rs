//! Storage of this host: pools that are folders.
//!
//! ```text
//!  HostStorage ─open─▶ FolderPool ─ folder.rs   the folder that is held, and the files beneath it
//!                                  ─ look.rs     what a volume is, by its header
//!                                  ─ watch.rs    what changes, whoever changes it
//!                                  ─ draft.rs    a file that gets its name when all of it is on disk
//!                                  ─ fill.rs     what it holds
//!                                  ─ serve.rs    read, or written, by NBD
//! ```
//!
//! Each folder is far away: all of it is done in errands with a limit, and a folder that does not answer costs itself alone.

mod draft;
mod fill;
mod folder;
mod look;
mod serve;
pub mod table;
#[cfg(test)]
mod tests;
mod watch;

use crate::host::files::{Seen, What};
use crate::host::given::Most;
use crate::host::image::{Images, LentFromAfar};
use crate::host::lender::Lender;
use crate::host::nbd::Export;
use crate::host::resolve::Place;
use crate::host::workers::{Errand, Stop, Workers};
use crate::host::{given, lock};
use async_trait::async_trait;
use draft::Draft;
use fill::Pace;
use folder::{Beneath, PoolFolder};
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::mpsc;
use uuid::Uuid;
use virt_model::driver::storage::{
    Content, KnownFormats, NewSize, NewVolume, OpenPool, Part, PoolAbility, PoolChange, Reflink, Room, Served, Storage,
    Survey, VolumeAt, VolumeLook, Wiping, Work,
};
use virt_model::driver::{DriverError, GivenFile};
use virt_model::storage::pool::{PoolDef, PoolKind};
use virt_model::storage::source_formats;
use virt_model::storage::volume::VolumeDef;
use virt_model::xml::Finding;

/// How long who reads a volume may take nothing: nobody else may write it meanwhile.
const READER: Duration = Duration::from_secs(120);

/// What the key of an encrypted volume takes, as bytes that are written: the tool tries how much work it can be, for seconds of a
/// processor's time, which are long in coming on a busy host.
const KEY: u64 = 512 << 20;

/// By whose rights tools are run; asked anew for each, and may block.
pub type ToolRights = Arc<dyn Fn() -> Result<Lender, DriverError> + Send + Sync>;

/// What opens encrypted volumes, by the uuid or the usage of a secret; may block.
pub type Secrets = Arc<dyn Fn(&str) -> Result<Vec<u8>, DriverError> + Send + Sync>;

/// The storage of this host.
pub struct HostStorage {
    workers: Workers,
    rights: ToolRights,
    secrets: Secrets,
    /// A folder of ours.
    runtime: PathBuf,
    /// We act for others: who could have put a link somewhere counts.
    wary: bool,
    held: Held,
}

/// Which folder is which pool's, for as long as it is held: by its file system and number there.
#[derive(Clone, Default)]
struct Held(Arc<Mutex<HashMap<(u64, u64), Holder>>>);

/// Who holds a folder.
struct Holder {
    pool: Uuid,
    name: String,
    folder: Weak<PoolFolder>,
}

/// A pool whose volumes are the files in a folder.
pub struct FolderPool {
    pool: Uuid,
    path: PathBuf,
    folder: Arc<PoolFolder>,
    workers: Workers,
    rights: ToolRights,
    secrets: Secrets,
    runtime: PathBuf,
}

impl HostStorage {
    /// Whose tools run by those rights; `runtime`: a folder of ours, for what ends with us; `wary`: for others than us.
    pub fn new(rights: ToolRights, secrets: Secrets, runtime: &Path, wary: bool) -> HostStorage {
        let (workers, held, runtime) = (Workers::default(), Held::default(), runtime.to_owned());
        HostStorage { workers, rights, secrets, runtime, wary, held }
    }

    fn errand(def: &PoolDef, work: &dyn Work) -> Errand {
        Errand::new(def.uuid, path_of(def).display().to_string()).until(work.cancelled())
    }
}

#[async_trait]
impl Storage for HostStorage {
    fn kinds(&self) -> Vec<PoolAbility> {
        PoolKind::ALL.iter().map(|kind| ability(*kind)).collect()
    }

    fn check(&self, def: &PoolDef) -> Result<(), DriverError> {
        let Some(why) = lacks(def.kind) else {
            let findings = table::refused_of_pool(def);
            return if findings.is_empty() { Ok(()) } else { Err(DriverError::Config(findings)) };
        };
        Err(DriverError::Config(vec![Finding::unsupported(&def.at.attribute("type"), why)]))
    }

    fn check_volume(&self, def: &VolumeDef) -> Result<(), DriverError> {
        let findings = table::refused_of_volume(def);
        if findings.is_empty() { Ok(()) } else { Err(DriverError::Config(findings)) }
    }

    async fn build(&self, def: &PoolDef, overwrite: bool, work: &dyn Work) -> Result<(), DriverError> {
        self.check(def)?;
        if overwrite {
            let text =
                "a folder has nothing that is overwritten: build it without that, and delete its volumes".to_owned();
            return Err(DriverError::Argument(text));
        }
        let (path, wary, def) = (path_of(def), self.wary, def.clone());
        work.step();
        let errand = HostStorage::errand(&def, work);
        self.workers.run(errand, move |_| build(&path, &def, wary).map_err(|e| failed("make", &path, &e))).await
    }

    async fn delete(&self, def: &PoolDef, work: &dyn Work) -> Result<(), DriverError> {
        self.check(def)?;
        let (path, wary) = (path_of(def), self.wary);
        work.step();
        let errand = HostStorage::errand(def, work);
        self.workers.run(errand, move |_| remove_empty(&path, wary).map_err(|e| failed("remove", &path, &e))).await
    }

    async fn open(&self, def: &PoolDef, work: &dyn Work) -> Result<Arc<dyn OpenPool>, DriverError> {
        self.check(def)?;
        let (path, wary, pool) = (path_of(def), self.wary, def.uuid);
        let errand = HostStorage::errand(def, work);
        let shown = path.clone();
        let (held, name) = (self.held.clone(), def.name.clone());
        let open = move |_: &Arc<Stop>| {
            let folder = PoolFolder::open(&path, wary).map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => {
                    DriverError::Storage(format!("{}: there is no such folder; build the pool first", path.display()))
                }
                _ => failed("open", &path, &e),
            })?;
            let folder = Arc::new(folder);
            // What this pool is making itself is no rest of anything.
            if held.take(&folder, pool, &name, &path)? {
                folder.remove_unfinished().map_err(|e| failed("tidy", &path, &e))?;
            }
            Ok(folder)
        };
        let folder = self.workers.run(errand, open).await?;
        let (workers, rights, secrets) = (self.workers.clone(), self.rights.clone(), self.secrets.clone());
        let runtime = self.runtime.clone();
        Ok(Arc::new(FolderPool { pool, path: shown, folder, workers, rights, secrets, runtime }))
    }
}

impl Held {
    /// A pool takes a folder; whether it had not taken it before. Error: it is another pool's, which writes in it and keeps what is
    /// known of its files. Blocks.
    fn take(&self, folder: &Arc<PoolFolder>, pool: Uuid, name: &str, path: &Path) -> Result<bool, DriverError> {
        let which = folder.which().map_err(|e| failed("open", path, &e))?;
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|_, holder| holder.folder.strong_count() > 0);
        if let Some(other) = held.get(&which).filter(|holder| holder.pool != pool) {
            let (path, name) = (path.display(), &other.name);
            return Err(DriverError::Refused(format!(
                "{path}: that folder is pool '{name}' already: stop that one first"
            )));
        }
        let holder = Holder { pool, name: name.to_owned(), folder: Arc::downgrade(folder) };
        Ok(held.insert(which, holder).is_none())
    }
}

/// What can be done with pools of that kind.
fn ability(kind: PoolKind) -> PoolAbility {
    let lacks = lacks(kind);
    let (volume_formats, features): (&[_], &[_]) = match lacks {
        None => (
            &["raw", "qcow2", "luks"],
            &["create", "thin-clone", "reflink", "resize", "shrink", "upload", "wipe", "watch"],
        ),
        Some(_) => (&[], &[]),
    };
    let lacks = lacks.map(str::to_owned);
    PoolAbility { kind, lacks, volume_formats, source_formats: source_formats(kind), features }
}

/// Why pools of that kind are not started, if so.
fn lacks(kind: PoolKind) -> Option<&'static str> {
    match kind {
        PoolKind::Dir => None,
        _ => Some("pools of this type are kept and shown, and not started here: only 'dir' is"),
    }
}

fn path_of(def: &PoolDef) -> PathBuf {
    PathBuf::from(def.target_path().unwrap_or_default())
}

/// That somebody may not have so much is told as it is.
fn too_many(error: &io::Error) -> Option<DriverError> {
    match error.get_ref()?.downcast_ref::<DriverError>() {
        Some(DriverError::TooMany(why)) => Some(DriverError::TooMany(why.clone())),
        _ => None,
    }
}

/// What went wrong, in words for people.
fn failed(deed: &str, path: &Path, error: &io::Error) -> DriverError {
    if let Some(too_many) = too_many(error) {
        return too_many;
    }
    let text = format!("cannot {deed} {}: {error}", path.display());
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => DriverError::NoSpace(text),
        Some(libc::EEXIST) => DriverError::Exists(format!("{}: there is something of that name", path.display())),
        _ => DriverError::Storage(text),
    }
}

/// Makes the folder, if it is not there, as its definition says; one that is there stays as it is.
fn build(path: &Path, def: &PoolDef, wary: bool) -> io::Result<()> {
    match Seen::at(path).what {
        What::Folder => return Ok(()),
        What::Nothing => {}
        _ => return Err(io::Error::new(io::ErrorKind::NotADirectory, "what is there is no folder")),
    }
    if let Some(above) = path.parent() {
        Place::make_folders(above, wary)?;
    }
    let wanted = def.target.as_ref().and_then(|target| target.permissions.as_ref());
    let mode = wanted.and_then(|wanted| wanted.mode).map_or(0o711, |mode| mode.0);
    let place = Place::resolve(path, wary)?;
    let folder = place.make_folder(0o700)?;
    if def.features.as_ref().and_then(|features| features.cow.as_ref()).and_then(|cow| cow.state) == Some(false) {
        draft::without_copies(&folder)?;
    }
    draft::give(&folder, wanted.and_then(|wanted| wanted.owner()), wanted.and_then(|wanted| wanted.group()))?;
    folder.set_mode(mode)?;
    place.sync_folder()
}

/// Removes a folder in which nothing is.
fn remove_empty(path: &Path, wary: bool) -> io::Result<()> {
    let place = Place::resolve(path, wary)?;
    match rustix::fs::unlinkat(place.folder_fd(), place.name(), rustix::fs::AtFlags::REMOVEDIR) {
        Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(rustix::io::Errno::NOTEMPTY | rustix::io::Errno::EXIST) => {
            Err(io::Error::other("there are files in it: delete its volumes, and move away what else there is"))
        }
        removed => removed.map_err(io::Error::from).and_then(|()| place.sync_folder()),
    }
}

impl FolderPool {
    /// One that takes moments.
    fn errand(&self, what: &str) -> Errand {
        Errand::new(self.pool, self.path.join(what).display().to_string())
    }

    /// One that moves bytes; it stands in the way of no other of this pool.
    fn long(&self, what: &str, bytes: u64, work: &dyn Work) -> Errand {
        Errand { guest: Uuid::new_v4(), ..self.errand(what).of(bytes).until(work.cancelled()) }
    }

    /// Its image and all that it stands on, each with its format.
    fn chain(&self, volume: &VolumeAt) -> Vec<(PathBuf, String)> {
        let own = (self.path.join(&volume.name), volume.format.clone());
        [own].into_iter().chain(volume.below.iter().cloned()).collect()
    }

    /// Does something to a volume, in an errand: the file is that one still.
    async fn with<T: Send + 'static>(
        &self,
        errand: Errand,
        deed: &'static str,
        volume: &VolumeAt,
        act: impl FnOnce(&Beneath, &Arc<Stop>) -> io::Result<T> + Send + 'static,
    ) -> Result<T, DriverError> {
        let (folder, volume, path) = (self.folder.clone(), volume.clone(), self.path.join(&volume.name));
        let run = move |stop: &Arc<Stop>| {
            let found = folder.beneath(&volume.name).map_err(|e| failed(deed, &path, &e))?;
            let file = judged(found, &volume, &path)?;
            act(&file, stop).map_err(|e| told(deed, &path, &e, stop))
        };
        self.workers.run(errand, run).await
    }

    /// The tool for images, by whose rights it is to run. Blocks.
    fn images(rights: &ToolRights, pool: Uuid, stop: &Arc<Stop>) -> Result<Images, DriverError> {
        Ok(Images::new(rights()?, pool, None).within(stop))
    }

    /// Fills a draft with what needs no client.
    async fn fill(&self, draft: &Arc<Draft>, new: Arc<NewVolume>, work: &Arc<dyn Work>) -> Result<(), DriverError> {
        let bytes = match &new.content {
            Content::Empty if new.preallocation.writes_all() => new.capacity,
            Content::Empty | Content::Overlay { .. } => new.allocation,
            _ => new.capacity.max(1 << 30),
        };
        let bytes = if new.secret.is_some() { bytes.max(KEY) } else { bytes };
        let errand = self.long(&new.name, bytes, &**work);
        let (draft, rights, secrets, pool) = (draft.clone(), self.rights.clone(), self.secrets.clone(), self.pool);
        let (work, path) = (work.clone(), self.path.join(&new.name));
        let run = move |stop: &Arc<Stop>| {
            let pace = Pace::new(&work, stop);
            if fill::by_tool(&new) {
                let images = FolderPool::images(&rights, pool, stop)?;
                let secret = new.secret.as_deref().map(|name| secrets(name)).transpose()?;
                return fill::with_tool(&draft, &new, secret.as_deref(), &images);
            }
            fill::plainly(&draft, &new, &pace).map_err(|e| match e.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::EXDEV | libc::EINVAL) if is_reflink(&new) => {
                    DriverError::Unsupported(format!(
                        "{}: its file system cannot share blocks with what is copied; use reflink 'auto'",
                        path.display()
                    ))
                }
                _ => told("make", &path, &e, stop),
            })
        };
        self.workers.run(errand, run).await
    }

    /// Fills a draft with what a client gives; how long that is.
    async fn pour(
        &self,
        draft: &Draft,
        (name, format): (&str, &str),
        from: GivenFile,
        work: &Arc<dyn Work>,
    ) -> Result<u64, DriverError> {
        let (tell, path) = (telling_all(work, format), self.path.join(name));
        let poured = given::pour_in(from, draft.file().clone(), 0, Most::All, false, work.cancelled(), tell).await;
        poured.map_err(|e| of_client_unless_cancelled(&path, &e, work))
    }
}

fn is_reflink(new: &NewVolume) -> bool {
    matches!(new.content, Content::Copy { reflink: Reflink::Always, .. })
}

/// What a client gave cannot be read, or what it holds cannot be written.
fn of_client(path: &Path, error: &io::Error) -> DriverError {
    if let Some(too_many) = too_many(error) {
        return too_many;
    }
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => failed("write", path, error),
        _ => DriverError::Argument(format!("the descriptor that was given: {error}")),
    }
}

/// The same, unless nobody wants it any more.
fn of_client_unless_cancelled(path: &Path, error: &io::Error, work: &Arc<dyn Work>) -> DriverError {
    if work.cancelled().is_cancelled() { DriverError::Cancelled } else { of_client(path, error) }
}

/// What went wrong, unless it was told to stop.
fn told(deed: &str, path: &Path, error: &io::Error, stop: &Stop) -> DriverError {
    stop.check().err().unwrap_or_else(|| failed(deed, path, error))
}

/// Tells how far it is with a client's file. A thread that waits for a client for ever keeps nothing of the work.
fn telling(work: &Arc<dyn Work>, total: u64) -> impl Fn(u64) + Send + 'static {
    let work = Arc::downgrade(work);
    move |done| work.upgrade().into_iter().for_each(|work| work.progress(done, total))
}

/// The same where what is read is all that a volume holds: a raw one has that capacity, which may be too much for its owner.
fn telling_all(work: &Arc<dyn Work>, format: &str) -> impl Fn(u64) -> io::Result<()> + Send + 'static {
    let (work, is_raw) = (Arc::downgrade(work), format == "raw");
    move |done| {
        let Some(work) = work.upgrade() else { return Ok(()) };
        work.progress(done, 0);
        if is_raw { work.grows(done).map_err(io::Error::other) } else { Ok(()) }
    }
}

/// How many bytes of a volume of that length are there from where a part begins. Error: that part is not all in it.
fn room_in(volume: &VolumeAt, length: u64, part: &Part) -> Result<u64, DriverError> {
    let room = length.checked_sub(part.offset).filter(|room| part.length.is_none_or(|wanted| wanted <= *room));
    room.ok_or_else(|| DriverError::Argument(format!("'{}' has {length} bytes: that part is not in it", volume.name)))
}

/// The file of a volume, if it is that one still.
fn judged(found: Option<Beneath>, volume: &VolumeAt, path: &Path) -> Result<Beneath, DriverError> {
    let Some(file) = found else {
        return Err(DriverError::Storage(format!("{}: there is no such volume any more", path.display())));
    };
    match file.id() == volume.id {
        true => Ok(file),
        false => Err(DriverError::Refused(format!("{}: another file has that name by now; try again", path.display()))),
    }
}

#[async_trait]
impl OpenPool for FolderPool {
    fn real_path(&self) -> &Path {
        self.folder.real()
    }

    async fn survey(&self, known: &KnownFormats) -> Result<Survey, DriverError> {
        let (folder, known, path) = (self.folder.clone(), known.clone(), self.path.clone());
        let run = move |_: &Arc<Stop>| {
            folder
                .is_there(&path)
                .and_then(|()| look::survey(&folder, &path, &known))
                .map_err(|e| failed("read", &path, &e))
        };
        self.workers.run(self.errand(""), run).await
    }

    async fn look(&self, names: Vec<String>, known: &KnownFormats) -> Result<Vec<VolumeLook>, DriverError> {
        let (folder, known, path) = (self.folder.clone(), known.clone(), self.path.clone());
        let run = move |_: &Arc<Stop>| {
            let looks = names.iter().filter_map(|name| look::volume(&folder, name, &path, &known).transpose());
            looks.collect::<io::Result<_>>().map_err(|e| failed("read", &path, &e))
        };
        self.workers.run(self.errand(""), run).await
    }

    async fn room(&self) -> Result<Room, DriverError> {
        let (folder, path) = (self.folder.clone(), self.path.clone());
        self.workers.run(self.errand(""), move |_| folder.room().map_err(|e| failed("read", &path, &e))).await
    }

    async fn follow(&self) -> Result<Option<mpsc::Receiver<PoolChange>>, DriverError> {
        let (folder, path) = (self.folder.clone(), self.path.clone());
        let begun =
            self.workers.run(self.errand(""), move |_| watch::begin(&folder).map_err(|e| failed("watch", &path, &e)));
        Ok(Some(begun.await?))
    }

    async fn create(&self, mut new: NewVolume, work: Arc<dyn Work>) -> Result<VolumeLook, DriverError> {
        fill::check(&new)?;
        let (folder, path, name, nocow) = (self.folder.clone(), self.path.join(&new.name), new.name.clone(), new.nocow);
        work.step();
        let begin = move |_: &Arc<Stop>| {
            if folder.has(&name).map_err(|e| failed("make", &path, &e))? {
                return Err(failed("make", &path, &io::Error::from_raw_os_error(libc::EEXIST)));
            }
            Draft::begin(&folder, nocow).map_err(|e| failed("make", &path, &e))
        };
        let draft = Arc::new(self.workers.run(self.errand(&new.name).until(work.cancelled()), begin).await?);
        match std::mem::replace(&mut new.content, Content::Empty) {
            Content::Given(from) => {
                let length = self.pour(&draft, (&new.name, &new.format), from, &work).await?;
                let (draft, format, capacity, work) = (draft.clone(), new.format.clone(), new.capacity, work.clone());
                let errand = self.errand(&new.name).until(work.cancelled());
                let judge = move |_: &Arc<Stop>| work.grows(fill::accept(&draft, &format, length, capacity)?);
                self.workers.run(errand, judge).await?;
            }
            content => {
                new.content = content;
                return self.filled(draft, Arc::new(new), work).await;
            }
        }
        self.finish(draft, &new, work).await
    }

    async fn resize(&self, volume: &VolumeAt, to: NewSize, work: Arc<dyn Work>) -> Result<(), DriverError> {
        if to.capacity < volume.capacity && !to.shrink {
            let text =
                format!("'{}' has {} bytes, and would lose what is behind; say shrink", volume.name, volume.capacity);
            return Err(DriverError::Argument(text));
        }
        let errand = self.long(&volume.name, if to.allocate { to.capacity } else { 0 }, &*work);
        work.step();
        if volume.format == "raw" {
            return self
                .with(errand, "resize", volume, move |file, stop| fill::resize(file, to, &Pace::new(&work, stop)))
                .await;
        }
        if to.allocate {
            return Err(DriverError::Unsupported("only raw volumes are allocated when they are resized".to_owned()));
        }
        if volume.format == "luks" {
            return Err(DriverError::Unsupported(
                "an encrypted volume is resized by the guest that it is a disk of".to_owned(),
            ));
        }
        let (chain, rights, pool) = (self.chain(volume), self.rights.clone(), self.pool);
        let (folder, volume) = (self.folder.clone(), volume.clone());
        let run = move |stop: &Arc<Stop>| {
            let _until_the_end = work;
            let path = &chain[0].0;
            judged(folder.beneath(&volume.name).map_err(|e| failed("resize", path, &e))?, &volume, path)?;
            let images = FolderPool::images(&rights, pool, stop)?;
            let wants: Vec<_> = chain.iter().enumerate().map(|(depth, (path, _))| (path.clone(), depth == 0)).collect();
            let _lent = images.lend(&wants)?;
            images.resize(&chain, to.capacity, to.shrink)
        };
        self.workers.run(errand, run).await
    }

    async fn wipe(&self, volume: &VolumeAt, how: Wiping, work: Arc<dyn Work>) -> Result<(), DriverError> {
        if !volume.below.is_empty() {
            let text = format!(
                "'{}' stands on another image, and what it shows is there: delete it, or flatten a clone",
                volume.name
            );
            return Err(DriverError::Refused(text));
        }
        if !matches!(&*volume.format, "raw" | "qcow2") {
            let text = format!("a volume of format '{}' would be none any more: delete it", volume.format);
            return Err(DriverError::Unsupported(text));
        }
        work.step();
        let errand = self.long(&volume.name, volume.capacity.max(1 << 30), &*work);
        let (tells, wiped) = (work.clone(), volume.clone());
        self.with(errand.clone(), "wipe", volume, move |file, stop| fill::wipe(file, how, &Pace::new(&tells, stop)))
            .await?;
        if volume.format == "raw" {
            return Ok(());
        }
        work.step();
        let (path, rights, pool) = (self.path.join(&wiped.name), self.rights.clone(), self.pool);
        let run = move |stop: &Arc<Stop>| {
            let _until_the_end = work;
            let images = FolderPool::images(&rights, pool, stop)?;
            let _lent = images.lend(&[(path.clone(), true)])?;
            images.create(&path, &wiped.format, wiped.capacity)
        };
        self.workers.run(self.errand(&volume.name), run).await
    }

    async fn upload(
        &self,
        volume: &VolumeAt,
        from: GivenFile,
        part: Option<Part>,
        sparse: bool,
        work: Arc<dyn Work>,
    ) -> Result<(), DriverError> {
        given::check(&from, given::Use::Read).map_err(|e| of_client(&self.path, &e))?;
        match part {
            Some(part) => self.upload_part(volume, from, part, sparse, work).await,
            None => self.replace(volume, from, sparse, work).await,
        }
    }

    async fn download(
        &self,
        volume: &VolumeAt,
        to: GivenFile,
        part: Option<Part>,
        sparse: bool,
        work: Arc<dyn Work>,
    ) -> Result<(), DriverError> {
        given::check(&to, given::Use::Write).map_err(|e| of_client(&self.path, &e))?;
        let errand = self.errand(&volume.name).until(work.cancelled());
        let from = self.with(errand, "read", volume, |file, _| Ok((file.to_read()?, file.length()))).await?;
        let (file, length) = (Arc::new(from.0), from.1);
        let part = part.unwrap_or(Part { offset: 0, length: None });
        let total = part.length.unwrap_or(room_in(volume, length, &part)?);
        let poured = given::pour_out(file, part.offset, total, to, sparse, READER, telling(&work, total));
        tokio::select! {
            poured = poured => poured.map(drop).map_err(|e| of_client(&self.path.join(&volume.name), &e)),
            () = work.cancelled().cancelled() => Err(DriverError::Cancelled),
        }
    }

    async fn delete(&self, volume: &VolumeAt, work: Arc<dyn Work>) -> Result<(), DriverError> {
        work.step();
        let (folder, volume, path) = (self.folder.clone(), volume.clone(), self.path.join(&volume.name));
        let errand = self.errand(&volume.name);
        let kept = work.clone();
        let run = move |_: &Arc<Stop>| {
            let _until_the_end = kept;
            let Some(found) = folder.beneath(&volume.name).map_err(|e| failed("delete", &path, &e))? else {
                return Ok(());
            };
            judged(Some(found), &volume, &path)?;
            folder.remove(&volume.name).map_err(|e| failed("delete", &path, &e))
        };
        self.workers.run(errand, run).await?;
        work.step();
        Ok(())
    }

    async fn hold(&self, volume: &VolumeAt) -> Result<GivenFile, DriverError> {
        let file = self.with(self.errand(&volume.name), "read", volume, |file, _| file.to_hold()).await?;
        Ok(GivenFile::new(file, |file| crate::host::apart::close(file, || {})))
    }

    async fn serve(&self, volume: &VolumeAt, writable: bool) -> Result<Served, DriverError> {
        let chain: Vec<_> = self.chain(volume);
        let (folder, at, rights, pool) = (self.folder.clone(), volume.clone(), self.rights.clone(), self.pool);
        let lends = move |stop: &Arc<Stop>| {
            let path = &chain[0].0;
            judged(folder.beneath(&at.name).map_err(|e| failed("serve", path, &e))?, &at, path)?;
            let images = FolderPool::images(&rights, pool, stop)?;
            let wants: Vec<_> =
                chain.iter().enumerate().map(|(depth, (path, _))| (path.clone(), writable && depth == 0)).collect();
            let lent = images.lend(&wants)?;
            Ok((Export { images, chain, writable }, LentFromAfar::from(lent)))
        };
        let (export, lent) = self.workers.run(self.errand(&volume.name), lends).await?;
        serve::begin(export, lent, self.runtime.join("nbd.sock")).await
    }

    async fn is_open_elsewhere(&self, name: &str, written: bool) -> Result<bool, DriverError> {
        let (folder, path, name) = (self.folder.clone(), self.path.join(name), name.to_owned());
        let errand = self.errand(&name);
        let run = move |_: &Arc<Stop>| {
            let held = folder.beneath(&name).and_then(|found| match found {
                Some(found) => lock::is_held(found.to_read()?.get()?, written),
                None => Ok(false),
            });
            held.map_err(|e| failed("look at", &path, &e))
        };
        self.workers.run(errand, run).await
    }

    async fn close(&self) -> Result<(), DriverError> {
        // A folder was not made usable, but found so.
        Ok(())
    }
}

impl FolderPool {
    /// Fills a draft and finishes it.
    async fn filled(
        &self,
        draft: Arc<Draft>,
        new: Arc<NewVolume>,
        work: Arc<dyn Work>,
    ) -> Result<VolumeLook, DriverError> {
        self.fill(&draft, new.clone(), &work).await?;
        self.finish(draft, &new, work).await
    }

    /// Gives a draft its owner, mode and name.
    async fn finish(&self, draft: Arc<Draft>, new: &NewVolume, work: Arc<dyn Work>) -> Result<VolumeLook, DriverError> {
        let (folder, path, name) = (self.folder.clone(), self.path.clone(), new.name.clone());
        let (owner, mode, format, secret) = (new.owner, new.mode, new.format.clone(), new.secret.clone());
        let errand = self.long(&name, new.capacity, &*work);
        let run = move |stop: &Arc<Stop>| {
            let full = path.join(&name);
            let named = draft.settle(owner, mode).and_then(|()| {
                stop.check().map_err(io::Error::other)?;
                work.names(draft.id()?, &name, &format, secret.as_deref()).map_err(io::Error::other)?;
                work.step();
                draft.name(&name)?;
                work.step();
                look::made(&folder, &name, &path, &format)
            });
            named.map_err(|e| told("make", &full, &e, stop))
        };
        self.workers.run(errand, run).await
    }

    /// Another file takes the place of a volume, when all of it is there.
    async fn replace(
        &self,
        volume: &VolumeAt,
        from: GivenFile,
        sparse: bool,
        work: Arc<dyn Work>,
    ) -> Result<(), DriverError> {
        let path = self.path.join(&volume.name);
        work.step();
        let (folder, errand) = (self.folder.clone(), self.errand(&volume.name).until(work.cancelled()));
        let shown = path.clone();
        let begin = move |_: &Arc<Stop>| Draft::begin(&folder, false).map_err(|e| failed("write", &shown, &e));
        let draft = Arc::new(self.workers.run(errand, begin).await?);
        let tell = telling_all(&work, &volume.format);
        let poured = given::pour_in(from, draft.file().clone(), 0, Most::All, sparse, work.cancelled(), tell).await;
        let length = poured.map_err(|e| of_client_unless_cancelled(&path, &e, &work))?;
        let errand = self.long(&volume.name, length, &*work);
        let volume_at = volume.clone();
        self.with(errand, "write", volume, move |file, stop| {
            let capacity = fill::accept(&draft, &volume_at.format, length, 0).map_err(io::Error::other)?;
            work.grows(capacity).map_err(io::Error::other)?;
            let (uid, gid, mode) = file.permissions();
            draft.settle((Some(uid), Some(gid)), mode)?;
            stop.check().map_err(io::Error::other)?;
            // All that they write from then on would be lost.
            if lock::is_held(file.to_read()?.get()?, true)? {
                return Err(io::Error::other("somebody has opened it meanwhile (fuser tells who)"));
            }
            work.names(draft.id()?, &volume_at.name, &volume_at.format, None).map_err(io::Error::other)?;
            work.step();
            draft.take_place_of(&volume_at.name)?;
            work.step();
            Ok(())
        })
        .await
    }

    async fn upload_part(
        &self,
        volume: &VolumeAt,
        from: GivenFile,
        part: Part,
        sparse: bool,
        work: Arc<dyn Work>,
    ) -> Result<(), DriverError> {
        let errand = self.errand(&volume.name).until(work.cancelled());
        let (file, length) =
            self.with(errand, "write", volume, |file, _| Ok((file.to_write()?, file.length()))).await?;
        let room = room_in(volume, length, &part)?;
        let (wanted, most) = match part.length {
            Some(wanted) => (wanted, Most::First(wanted)),
            None => (room, Most::Within(room)),
        };
        let file = Arc::new(file);
        work.step();
        let (tell, path) = (telling(&work, wanted), self.path.join(&volume.name));
        let tell = move |done| {
            tell(done);
            Ok(())
        };
        let poured = given::pour_in(from, file.clone(), part.offset, most, sparse, work.cancelled(), tell).await;
        let count = poured.map_err(|e| of_client_unless_cancelled(&path, &e, &work))?;
        if part.length.is_some() && count < wanted {
            let text = format!("the descriptor that was given: it has {count} bytes, and {wanted} were to be written");
            return Err(DriverError::Argument(text));
        }
        let errand = self.long(&volume.name, wanted, &*work);
        let sync = move |_: &Arc<Stop>| {
            let _until_the_end = work;
            file.get().and_then(|file| file.sync_all()).map_err(|e| failed("write", &path, &e))
        };
        self.workers.run(errand, sync).await
    }
}
