//! A machine that has been saved is opened again: what its file says of it, and whether all of it is as it was written.

use super::super::expanded;
use super::files::stored;
use crate::host::apart;
use crate::host::resolve::Found;
use crate::host::saved::{Saved, Unusable};
use crate::host::workers::{Errand, Workers};
use rustix::fs::{FileType, OFlags, SeekFrom, fcntl_getfl, fstat, seek};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::saved::{GIVEN, SavedFile, SavedState};
use virt_model::driver::{DriverError, GivenFile};

/// Opens a file and reads what it says of the machine, and its configuration. `machine`: whose it is, if that is known; `wary`: as
/// root among others.
pub async fn read(
    workers: &Workers,
    from: SavedFile,
    machine: Option<Uuid>,
    wary: bool,
) -> Result<(SavedState, String), DriverError> {
    let path = match &from {
        SavedFile::At(path) => path.clone(),
        SavedFile::Given(_) => PathBuf::from(GIVEN),
    };
    let shown = path.display().to_string();
    // Where it is not known whose it is before it is read, nobody else's work waits for it.
    let errand = Errand::new(machine.unwrap_or_else(Uuid::new_v4), shown.clone());
    let read = workers.run(errand, move |_| {
        let saved = match from {
            SavedFile::Given(given) => opened(&given)?,
            SavedFile::At(_) => {
                let opened = Found::resolve(&path).and_then(|found| found.plain(wary));
                Saved::read(opened.map_err(|e| stored(&path, &e))?.into_file())
            }
        };
        let mut saved = saved.map_err(|why| unusable(&path, why))?;
        let cpu = match &saved.telling.cpu {
            None => None,
            Some(text) => {
                let unread = || DriverError::Argument(format!("{shown}: the CPU that it had cannot be read"));
                Some(expanded::read(text).ok_or_else(unread)?)
            }
        };
        let configuration = std::mem::take(&mut saved.configuration);
        let state = SavedState { file: path, paused: saved.telling.paused, cpu, held: Arc::new(saved) };
        Ok((state, configuration))
    });
    read.await
}

/// What a client has given, from where it stands on. Blocks, where its file system does not answer without end.
fn opened(given: &GivenFile) -> Result<Result<Saved, Unusable>, DriverError> {
    let refuse = |why: &str| Err(DriverError::Argument(format!("{GIVEN} {why}")));
    let failed = |e: io::Error| DriverError::Argument(format!("{GIVEN} cannot be used: {e}"));
    let flags = fcntl_getfl(given).map_err(|e| failed(e.into()))?;
    if flags.contains(OFlags::PATH) || flags & OFlags::RWMODE == OFlags::WRONLY {
        return refuse("cannot be read; open it for reading");
    }
    let stat = fstat(given).map_err(|e| failed(e.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return refuse("is no regular file: what was saved is read twice, first to hold it to its checksum");
    }
    let base = seek(given, SeekFrom::Current(0)).map_err(|e| failed(e.into()))?;
    let file = apart::copy(given.as_fd()).map_err(failed)?;
    Ok(Saved::read_given(file.into(), base))
}

/// What is held of it.
pub fn held(state: &SavedState) -> Result<Arc<Saved>, DriverError> {
    let held = state.held.clone().downcast::<Saved>();
    held.map_err(|_| DriverError::Internal("a saved machine of another driver".to_owned()))
}

/// The stream, to be loaded.
pub fn stream(state: &SavedState) -> Result<Arc<Saved>, DriverError> {
    held(state)
}

/// Holds it to what was written, to the QEMU of that version that is to load it, and the disks to how they looked.
pub async fn verify(
    workers: &Workers,
    state: &SavedState,
    def: &DomainDef,
    version: (u32, u32, u32),
    progress: Arc<dyn Fn(u64, u64) + Send + Sync>,
    cancel: &CancellationToken,
) -> Result<(), DriverError> {
    let (saved, path) = (held(state)?, state.file.clone());
    if saved.telling.driver != "qemu" {
        let (path, driver) = (path.display(), &saved.telling.driver);
        let text = format!("{path}: it was saved by the driver '{driver}', and not by QEMU");
        return Err(DriverError::Argument(text));
    }
    let wrote = saved.telling.version;
    if (wrote.0, wrote.1) > (version.0, version.1) {
        return Err(DriverError::Argument(format!(
            "{}: it was saved by QEMU {}.{} on another host or before, and what is here is QEMU {}.{}, which may not read it",
            path.display(),
            wrote.0,
            wrote.1,
            version.0,
            version.1
        )));
    }
    let named: Vec<PathBuf> = def.devices.disks.iter().flat_map(|disk| disk.files()).collect();
    let errand = Errand::new(def.uuid, path.display().to_string()).of(saved.length()).until(cancel);
    let looked = workers.run(errand, move |stop| {
        let mut seen = BTreeSet::new();
        for disk in saved.telling.disks.iter().filter(|disk| named.contains(&disk.path)) {
            stop.check()?;
            if !seen.insert(&disk.path) {
                let (path, twice) = (path.display(), disk.path.display());
                return Err(DriverError::Argument(format!("{path}: it tells twice how {twice} looked")));
            }
            let change = disk.look.change(&disk.path).map_err(|e| stored(&disk.path, &e))?;
            if let Some(change) = change {
                let (target, file, change) = (&disk.target, disk.path.display(), change.as_str());
                return Err(DriverError::Refused(format!(
                    "disk '{target}' is not as it was when the machine was saved: {file} {change}; put it back as it was, or \
                     start the machine anew, without its memory"
                )));
            }
        }
        let total = saved.length();
        saved
            .verify::<Interrupted>(|done| {
                progress(done, total);
                stop.check().map_err(Interrupted::Stopped)
            })
            .map_err(|why| interrupted(why, &path))
    });
    looked.await
}

/// Why the reading of a stream ended early.
pub enum Interrupted {
    /// It was told to, or something else than the file is at fault.
    Stopped(DriverError),
    /// The file is.
    Wrong(Unusable),
}

/// The same for people.
pub fn interrupted(why: Interrupted, path: &Path) -> DriverError {
    match why {
        Interrupted::Stopped(error) => error,
        Interrupted::Wrong(why) => unusable(path, why),
    }
}

impl From<io::Error> for Interrupted {
    fn from(error: io::Error) -> Interrupted {
        Interrupted::Wrong(Unusable::Io(error))
    }
}

impl From<Unusable> for Interrupted {
    fn from(why: Unusable) -> Interrupted {
        Interrupted::Wrong(why)
    }
}

fn unusable(path: &Path, why: Unusable) -> DriverError {
    let text = format!("{}: {why}", path.display());
    match why {
        Unusable::Wrong(_) => DriverError::Argument(text),
        Unusable::Foreign(_) => DriverError::Unsupported(text),
        Unusable::Io(e) if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            DriverError::NoSpace(text)
        }
        Unusable::Io(_) => DriverError::Storage(text),
    }
}
