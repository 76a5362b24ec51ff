//! A pool whose volumes are the files in a folder: what is done to each.

use super::draft::Draft;
use super::fill::{self, Pace};
use super::folder::Beneath;
use super::held::HeldFolder;
use super::mounts::{self, Mountable};
use super::{Secrets, ToolRights, failed, look, serve, share, watch};
use crate::host::image::{Images, LentFromAfar};
use crate::host::lock;
use crate::host::nbd::Export;
use crate::host::workers::{Errand, Stop, Workers};
use async_trait::async_trait;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::mpsc;
use uuid::Uuid;
use virt_model::driver::storage::{
    Content, KnownFormats, NewSize, NewVolume, OpenPool, Part, PoolChange, Reflink, Room, Served, Survey, VolumeAt,
    VolumeLook, Wiping, Work,
};
use virt_model::driver::{DriverError, GivenFile};

/// What the key of an encrypted volume takes, as bytes that are written: the tool tries how much work it can be, for seconds of a
/// processor's time, which are long in coming on a busy host.
const KEY: u64 = 512 << 20;

/// A pool whose volumes are the files in a folder.
pub struct FolderPool {
    pub(super) pool: Uuid,
    /// As its definition has it.
    pub(super) path: PathBuf,
    /// Where it is, without links on the way, as it was found.
    pub(super) real: PathBuf,
    pub(super) folder: HeldFolder,
    /// What is mounted there, if the folder is that of a file system of its own.
    pub(super) mounted: Option<Arc<Mountable>>,
    /// It was mounted when the pool was opened, and not before.
    pub(super) made_mount: bool,
    /// What can be done with it.
    pub(super) features: &'static [&'static str],
    pub(super) workers: Workers,
    pub(super) rights: ToolRights,
    pub(super) secrets: Secrets,
    pub(super) runtime: PathBuf,
}

impl FolderPool {
    /// One that takes moments.
    pub(super) fn errand(&self, what: &str) -> Errand {
        Errand::new(self.pool, self.path.join(what).display().to_string())
    }

    /// One that moves bytes; it stands in the way of no other of this pool.
    pub(super) fn long(&self, what: &str, bytes: u64, work: &dyn Work) -> Errand {
        Errand { guest: Uuid::new_v4(), ..self.errand(what).of(bytes).until(work.cancelled()) }
    }

    /// Its image and all that it stands on, each with its format.
    fn chain(&self, volume: &VolumeAt) -> Vec<(PathBuf, String)> {
        let own = (self.path.join(&volume.name), volume.format.clone());
        [own].into_iter().chain(volume.below.iter().cloned()).collect()
    }

    /// Does something to a volume, in an errand: the file is that one still.
    pub(super) async fn with<T: Send + 'static>(
        &self,
        errand: Errand,
        deed: &'static str,
        volume: &VolumeAt,
        act: impl FnOnce(&Beneath, &Arc<Stop>) -> io::Result<T> + Send + 'static,
    ) -> Result<T, DriverError> {
        let (folder, volume, path) = (self.folder.get()?, volume.clone(), self.path.join(&volume.name));
        let run = move |stop: &Arc<Stop>| {
            let found = folder.beneath(&volume.name).map_err(|e| failed(deed, &path, &e))?;
            let file = judged(found, &volume, &path)?;
            act(&file, stop).map_err(|e| told(deed, &path, &e, stop))
        };
        self.workers.run(errand, run).await
    }

    /// The tool for images, by whose rights it is to run. Blocks.
    pub(super) fn images(rights: &ToolRights, pool: Uuid, stop: &Arc<Stop>) -> Result<Images, DriverError> {
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
}

fn is_reflink(new: &NewVolume) -> bool {
    matches!(new.content, Content::Copy { reflink: Reflink::Always, .. })
}

/// What went wrong, unless it was told to stop.
fn told(deed: &str, path: &Path, error: &io::Error, stop: &Stop) -> DriverError {
    stop.check().err().unwrap_or_else(|| failed(deed, path, error))
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
        &self.real
    }

    fn features(&self) -> &'static [&'static str] {
        self.features
    }

    async fn survey(&self, known: &KnownFormats) -> Result<Survey, DriverError> {
        let (folder, known, path) = (self.folder.get()?, known.clone(), self.path.clone());
        let run = move |_: &Arc<Stop>| {
            folder
                .is_there(&path)
                .and_then(|()| look::survey(&folder, &path, &known))
                .map_err(|e| failed("read", &path, &e))
        };
        self.workers.run(self.errand(""), run).await
    }

    async fn look(&self, names: Vec<String>, known: &KnownFormats) -> Result<Vec<VolumeLook>, DriverError> {
        let (folder, known, path) = (self.folder.get()?, known.clone(), self.path.clone());
        let run = move |_: &Arc<Stop>| {
            let looks = names.iter().filter_map(|name| look::volume(&folder, name, &path, &known).transpose());
            looks.collect::<io::Result<_>>().map_err(|e| failed("read", &path, &e))
        };
        self.workers.run(self.errand(""), run).await
    }

    async fn room(&self) -> Result<Room, DriverError> {
        let (folder, path) = (self.folder.get()?, self.path.clone());
        self.workers.run(self.errand(""), move |_| folder.room().map_err(|e| failed("read", &path, &e))).await
    }

    async fn follow(&self) -> Result<Option<mpsc::Receiver<PoolChange>>, DriverError> {
        let (folder, path, mounted) = (self.folder.get()?, self.path.clone(), self.mounted.is_some());
        let begin = move |_: &Arc<Stop>| {
            let begun = watch::begin(&folder).and_then(|(tell, told)| {
                let mounts = mounted.then(watch::mounts).transpose()?;
                Ok((told, mounts.map(|mounts| (tell, mounts))))
            });
            begun.map_err(|e| failed("watch", &path, &e))
        };
        let (told, mounts) = self.workers.run(self.errand(""), begin).await?;
        if let Some((mountable, (tell, mounts))) = self.mounted.clone().zip(mounts) {
            let (workers, errand) = (self.workers.clone(), self.errand(""));
            tokio::spawn(mounts::tell_lost(
                mounts,
                tell,
                workers,
                errand,
                mountable,
                self.path.clone(),
                self.folder.clone(),
            ));
        }
        Ok(Some(told))
    }

    async fn create(&self, mut new: NewVolume, work: Arc<dyn Work>) -> Result<VolumeLook, DriverError> {
        fill::check(&new)?;
        let (folder, path, name, nocow) = (self.folder.get()?, self.path.join(&new.name), new.name.clone(), new.nocow);
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
        let (folder, volume) = (self.folder.get()?, volume.clone());
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
        let wipe = move |file: &Beneath, stop: &Arc<Stop>| {
            fill::wipe(file.to_write()?.get()?, file.length(), how, &Pace::new(&tells, stop))
        };
        self.with(errand.clone(), "wipe", volume, wipe).await?;
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
        self.receive(volume, from, part, sparse, work).await
    }

    async fn download(
        &self,
        volume: &VolumeAt,
        to: GivenFile,
        part: Option<Part>,
        sparse: bool,
        work: Arc<dyn Work>,
    ) -> Result<(), DriverError> {
        self.send(volume, to, part, sparse, work).await
    }

    async fn delete(&self, volume: &VolumeAt, work: Arc<dyn Work>) -> Result<(), DriverError> {
        work.step();
        let (folder, volume, path) = (self.folder.get()?, volume.clone(), self.path.join(&volume.name));
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
        let (folder, at, rights, pool) = (self.folder.get()?, volume.clone(), self.rights.clone(), self.pool);
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
        let (folder, path, name) = (self.folder.get()?, self.path.join(name), name.to_owned());
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

    async fn take_back(&self) -> Result<(), DriverError> {
        if self.made_mount { self.close().await } else { Ok(()) }
    }

    async fn close(&self) -> Result<(), DriverError> {
        // A folder was not made usable, but found so.
        let Some(mountable) = self.mounted.clone() else { return Ok(()) };
        let (folder, path) = (self.folder.clone(), self.path.clone());
        let (runtime, pool) = (self.runtime.clone(), self.pool);
        let close = move |stop: &Arc<Stop>| {
            share::clear_aside(&runtime, pool);
            mounts::close(&mountable, &folder, &path, stop)
        };
        self.workers.run(Errand { limit: mounts::PATIENCE, ..self.errand("") }, close).await
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
        let (folder, path, name) = (self.folder.get()?, self.path.clone(), new.name.clone());
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
}
