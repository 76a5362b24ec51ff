//! What clients give a volume, and take of it, by descriptor: each waits for its client alone.

use super::draft::Draft;
use super::pool::FolderPool;
use super::{failed, fill, too_many};
use crate::host::given::Most;
use crate::host::workers::{ClosedAside, Stop};
use crate::host::{given, lock};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use virt_model::driver::storage::{Part, VolumeAt, Work};
use virt_model::driver::{DriverError, GivenFile};

/// How long who reads a volume may take nothing: nobody else may write it meanwhile.
const READER: Duration = Duration::from_secs(120);

impl FolderPool {
    /// Fills a draft with what a client gives; how long that is.
    pub(super) async fn pour(
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

    /// Writes what a client gave into a volume, or a part of it.
    pub(super) async fn receive(
        &self,
        volume: &VolumeAt,
        from: GivenFile,
        part: Option<Part>,
        sparse: bool,
        work: Arc<dyn Work>,
    ) -> Result<(), DriverError> {
        check_given(&self.path, &from, given::Use::Read)?;
        match part {
            Some(part) => self.upload_part(volume, from, part, sparse, work).await,
            None => self.replace(volume, from, sparse, work).await,
        }
    }

    /// Writes what a volume holds, or a part of it, into what a client gave.
    pub(super) async fn send(
        &self,
        volume: &VolumeAt,
        to: GivenFile,
        part: Option<Part>,
        sparse: bool,
        work: Arc<dyn Work>,
    ) -> Result<(), DriverError> {
        check_given(&self.path, &to, given::Use::Write)?;
        let errand = self.errand(&volume.name).until(work.cancelled());
        let from = self.with(errand, "read", volume, |file, _| Ok((file.to_read()?, file.length()))).await?;
        let to_client =
            Flow { name: &volume.name, path: self.path.join(&volume.name), length: from.1, part, work: &work };
        to_client.out(Arc::new(from.0), to, sparse).await
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
        let (folder, errand) = (self.folder.get()?, self.errand(&volume.name).until(work.cancelled()));
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
        let path = self.path.join(&volume.name);
        let file = Arc::new(file);
        work.step();
        let from_client = Flow { name: &volume.name, path: path.clone(), length, part: Some(part), work: &work };
        let written = from_client.into(from, file.clone(), sparse).await?;
        let errand = self.long(&volume.name, written, &*work);
        let sync = move |_: &Arc<Stop>| {
            let _until_the_end = work;
            file.get().and_then(|file| file.sync_all()).map_err(|e| failed("write", &path, &e))
        };
        self.workers.run(errand, sync).await
    }
}

/// What is moved between a client and what a volume holds, in place.
pub(super) struct Flow<'a> {
    /// The volume.
    pub name: &'a str,
    /// Where that is.
    pub path: PathBuf,
    /// How long it is, in bytes.
    pub length: u64,
    /// The part that is meant; all of it, if not said.
    pub part: Option<Part>,
    /// What it is done for.
    pub work: &'a Arc<dyn Work>,
}

impl Flow<'_> {
    /// How many bytes are there from where the part begins. Error: it is not all in the volume.
    fn room(&self, part: &Part) -> Result<u64, DriverError> {
        let room = self.length.checked_sub(part.offset);
        room.filter(|room| part.length.is_none_or(|wanted| wanted <= *room)).ok_or_else(|| {
            DriverError::Argument(format!("'{}' has {} bytes: that part is not in it", self.name, self.length))
        })
    }

    /// Writes what a client gives into the volume; how much that was. It is not synced.
    pub async fn into(self, from: GivenFile, file: Arc<ClosedAside>, sparse: bool) -> Result<u64, DriverError> {
        self.into_what(from, (file, 0), sparse).await
    }

    /// The same into a volume that is in a disk from there on.
    pub async fn into_at(self, from: GivenFile, disk: Arc<ClosedAside>, begin: u64) -> Result<u64, DriverError> {
        self.into_what(from, (disk, begin), false).await
    }

    async fn into_what(
        self,
        from: GivenFile,
        (file, begin): (Arc<ClosedAside>, u64),
        sparse: bool,
    ) -> Result<u64, DriverError> {
        let part = self.part.unwrap_or_default();
        let room = self.room(&part)?;
        let (wanted, most) = match part.length {
            Some(wanted) => (wanted, Most::First(wanted)),
            None => (room, Most::Within(room)),
        };
        let tell = telling(self.work, wanted);
        let tell = move |done| {
            tell(done);
            Ok(())
        };
        let poured = given::pour_in(from, file, begin + part.offset, most, sparse, self.work.cancelled(), tell).await;
        let count = poured.map_err(|e| of_client_unless_cancelled(&self.path, &e, self.work))?;
        if part.length.is_some() && count < wanted {
            let text = format!("the descriptor that was given: it has {count} bytes, and {wanted} were to be written");
            return Err(DriverError::Argument(text));
        }
        Ok(count)
    }

    /// Writes what the volume holds into what a client gave.
    pub async fn out(self, file: Arc<ClosedAside>, to: GivenFile, sparse: bool) -> Result<(), DriverError> {
        let part = self.part.unwrap_or_default();
        let total = part.length.unwrap_or(self.room(&part)?);
        let poured = given::pour_out(file, part.offset, total, to, sparse, READER, telling(self.work, total));
        tokio::select! {
            poured = poured => poured.map(drop).map_err(|e| of_client(&self.path, &e)),
            () = self.work.cancelled().cancelled() => Err(DriverError::Cancelled),
        }
    }
}

/// Refuses what a client gave, where it cannot be for that.
pub(super) fn check_given(path: &Path, given: &GivenFile, for_what: given::Use) -> Result<(), DriverError> {
    given::check(given, for_what).map_err(|e| of_client(path, &e))
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
