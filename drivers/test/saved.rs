//! Guests in memory, saved in files of the format that all have, so that clients meet them as they are: of the guest there is a word
//! in it, and no memory.

use super::guest::Machine as Guest;
use super::{TestDriver, our_machine};
use crate::host::apart;
use crate::host::files::{Seen, What};
use crate::host::out::Out;
use crate::host::resolve::{Found, Place};
use crate::host::saved::{Draft, Saved, Telling, Unusable, pump, write_tail};
use crate::host::workers::{Errand, Stop};
use async_trait::async_trait;
use rustix::fs::{SeekFrom, seek};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::saved::{Compression, GIVEN, SaveRequest, SavedFile, SavedMachines, SavedState};
use virt_model::driver::snapshots::{Journal, Machine, Recovered};
use virt_model::driver::{DriverError, GivenFile};

/// What is in the place of a guest's memory.
const STREAM: &[u8] = b"a guest that is played";

/// How far a save is.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Note {
    /// What is written, and what it becomes; of what a client has given there is neither.
    save: Option<(PathBuf, PathBuf)>,
    /// It is whole.
    complete: bool,
    /// It is a dump: the guest goes on.
    goes_on: bool,
}

impl Note {
    fn written(&self) -> Result<serde_json::Value, DriverError> {
        serde_json::to_value(self).map_err(|e| DriverError::Internal(e.to_string()))
    }

    /// Makes whole what is left of it. Blocks.
    fn settle(&self) -> Result<(), DriverError> {
        let Some((part, file)) = &self.save else { return Ok(()) };
        let settle = || {
            let (from, to) = (Place::resolve(part, is_wary())?, Place::resolve(file, is_wary())?);
            match (from.stat(), self.complete) {
                (Err(e), _) if e.kind() == io::ErrorKind::NotFound => Ok(()),
                (Err(e), _) => Err(e),
                (Ok(_), true) => from.rename_to(&to).and_then(|()| to.sync_folder()),
                (Ok(_), false) => from.remove_file(),
            }
        };
        settle().map_err(|e| stored(file, &e))
    }
}

/// Whether we act for others.
fn is_wary() -> bool {
    nix::unistd::geteuid().is_root()
}

fn stored(file: &Path, error: &io::Error) -> DriverError {
    DriverError::Storage(format!("{}: {error}", file.display()))
}

#[async_trait]
impl SavedMachines for TestDriver {
    async fn check_save(&self, machine: &Machine, request: &SaveRequest) -> Result<(), DriverError> {
        guest(machine)?.listens().await?;
        if request.memory_only.is_some() {
            return Err(DriverError::Unsupported(
                "a guest that is played has no memory that could be dumped".to_owned(),
            ));
        }
        if request.compression != Compression::None {
            return Err(DriverError::Unsupported("the test driver packs nothing: leave out 'compression'".to_owned()));
        }
        let request = request.clone();
        let errand = Errand::new(machine.def.uuid, request.file.display().to_string());
        self.0.workers.run(errand, move |_| check_place(&request)).await
    }

    async fn save(
        &self,
        machine: &Machine,
        request: &SaveRequest,
        journal: Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        let guest = guest(machine)?;
        let part = format!("{}.virtd-{}", request.file.display(), Uuid::new_v4());
        let save = request.given.is_none().then(|| (PathBuf::from(part), request.file.clone()));
        let mut note = Note { save, complete: false, goes_on: request.goes_on };
        journal.note(note.written()?).await?;
        guest.stand_still(true);
        let done = self.write(machine, request, &mut note, &journal).await;
        if done.is_err() || request.goes_on {
            journal.save_given_up();
            guest.stand_still(!machine.running);
        }
        if done.is_err() {
            note.complete = false;
            journal.note(note.written()?).await?;
            let errand = Errand::new(machine.def.uuid, request.file.display().to_string());
            self.0.workers.run(errand, move |_| note.settle()).await?;
        }
        done
    }

    fn taken_back(&self, note: serde_json::Value, _: bool) -> Result<serde_json::Value, DriverError> {
        let mut note = read_note(note)?;
        note.complete &= note.goes_on;
        note.written()
    }

    async fn settle_save(&self, machine: Uuid, note: serde_json::Value) -> Result<String, DriverError> {
        let note = read_note(note)?;
        let told = if note.complete { "it is saved" } else { "nothing of it is left" };
        self.0.workers.run(Errand::new(machine, "what was saved"), move |_| note.settle()).await?;
        Ok(told.to_owned())
    }

    async fn read_saved(&self, from: SavedFile, machine: Option<Uuid>) -> Result<(SavedState, String), DriverError> {
        let path = match &from {
            SavedFile::At(path) => path.clone(),
            SavedFile::Given(_) => PathBuf::from(GIVEN),
        };
        let errand = Errand::new(machine.unwrap_or_else(Uuid::new_v4), path.display().to_string());
        let read = self.0.workers.run(errand, move |_| {
            let read = match &from {
                SavedFile::At(path) => {
                    let found = Found::resolve(path).and_then(|found| found.plain(is_wary()));
                    Saved::read(found.map_err(|e| stored(path, &e))?.into_file())
                }
                SavedFile::Given(given) => opened(given),
            };
            let mut saved = read.map_err(|why| unusable(&path, why))?;
            let configuration = std::mem::take(&mut saved.configuration);
            let state = SavedState { file: path, paused: saved.telling.paused, cpu: None, held: Arc::new(saved) };
            Ok((state, configuration))
        });
        read.await
    }

    async fn reconfigure_saved(&self, saved: &SavedState, _configuration: String) -> Result<(), DriverError> {
        let file = saved.file.display();
        Err(DriverError::Unsupported(format!("{file}: the test driver changes no file in which a machine was saved")))
    }

    async fn verify_saved(
        &self,
        saved: &SavedState,
        def: &DomainDef,
        progress: Arc<dyn Fn(u64, u64) + Send + Sync>,
        _cancel: &CancellationToken,
    ) -> Result<(), DriverError> {
        let path = saved.file.clone();
        let held = saved.held.clone().downcast::<Saved>();
        let held = held.map_err(|_| DriverError::Internal("a saved machine of another driver".to_owned()))?;
        if held.telling.driver != "test" {
            let (path, driver) = (path.display(), &held.telling.driver);
            return Err(DriverError::Argument(format!("{path}: it was saved by the driver '{driver}'")));
        }
        let errand = Errand::new(def.uuid, path.display().to_string()).of(held.length());
        let verified = self.0.workers.run(errand, move |_| {
            let total = held.length();
            let verified = held.verify::<Unusable>(|done| {
                progress(done, total);
                Ok(())
            });
            verified.map_err(|why| unusable(&path, why))
        });
        verified.await
    }
}

impl TestDriver {
    /// Writes all of it, and gives it its name.
    async fn write(
        &self,
        machine: &Machine,
        request: &SaveRequest,
        note: &mut Note,
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        let (wanted, begun) = (request.clone(), note.clone());
        let errand = Errand::new(machine.def.uuid, request.file.display().to_string()).until(journal.cancelled());
        self.0.workers.run(errand, move |stop| write_file(&wanted, &begun, stop)).await?;
        if !request.goes_on {
            journal.memory_written();
        }
        if journal.cancelled().is_cancelled() {
            return Err(DriverError::Cancelled);
        }
        if request.given.is_none() {
            journal.may_replace(&request.file).await?;
        }
        journal.point_of_no_return();
        note.complete = true;
        journal.note(note.written()?).await?;
        let (named, errand) = (note.clone(), Errand::new(machine.def.uuid, request.file.display().to_string()));
        self.0.workers.run(errand, move |_| named.settle()).await
    }

    /// What is left of a save whose virtd was killed: its guest has ended with that.
    pub(super) async fn recover_save(
        &self,
        machine: Uuid,
        note: serde_json::Value,
    ) -> Option<Result<Recovered, DriverError>> {
        let note: Note = serde_json::from_value(note).ok()?;
        let saved = note.save.as_ref().map_or_else(|| PathBuf::from(GIVEN), |(_, file)| file.clone());
        let complete = note.complete;
        let settled = self.0.workers.run(Errand::new(machine, "what was saved"), move |_| note.settle()).await;
        Some(settled.map(|()| match complete {
            true => Recovered::Saved(saved),
            false => Recovered::Undone { story: format!("nothing of {} is left", saved.display()) },
        }))
    }
}

fn guest(machine: &Machine) -> Result<Arc<Guest>, DriverError> {
    machine.guest.as_deref().map_or(Err(DriverError::Gone), our_machine)
}

fn read_note(note: serde_json::Value) -> Result<Note, DriverError> {
    serde_json::from_value(note).map_err(|e| DriverError::Internal(format!("the note of a save cannot be read: {e}")))
}

/// A plain file, or nothing, and its folder is there; or something that a client has open and can be written to. Blocks.
fn check_place(request: &SaveRequest) -> Result<(), DriverError> {
    if let Some(given) = &request.given {
        return Out::given(given, false).map(drop);
    }
    let (file, there) = (&request.file, Seen::at(&request.file));
    match there.what {
        What::Plain => Ok(()),
        What::Nothing if there.has_folder => Ok(()),
        What::Nothing => {
            let file = file.display();
            Err(DriverError::Storage(format!("{file}: the folder that it is to be in is not there")))
        }
        _ => Err(DriverError::Argument(format!("{} is no plain file; choose another file", file.display()))),
    }
}

/// Blocks.
fn write_file(request: &SaveRequest, note: &Note, stop: &Stop) -> Result<(), DriverError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let telling = Telling {
        driver: "test".to_owned(),
        version: (0, 0, 0),
        saved_usec: u64::try_from(now.as_micros()).unwrap_or(u64::MAX),
        paused: request.paused,
        cpu: None,
        disks: Vec::new(),
    };
    let text = request.def.write(Form::STORED);
    let out = match (&request.given, &note.save) {
        (Some(given), _) => Out::given(given, request.bypass_cache)?,
        (None, Some((part, _))) => {
            let made = Place::resolve(part, is_wary()).and_then(|place| place.create(0o600));
            Out::made(made.map_err(|e| stored(part, &e))?, request.bypass_cache)
        }
        (None, None) => return Err(DriverError::Internal("a save without a file".to_owned())),
    };
    let write = || {
        out.empty()?;
        let Some(base) = out.base() else {
            let mut pipe = out.writer(0, stop)?;
            Draft::announce(&mut pipe, &telling, &text, false)?;
            let written = pump::<io::Error>(&mut &*STREAM, &mut pipe, |_| Ok(()))?;
            return write_tail(&mut pipe, &telling.disks, written);
        };
        let draft = Draft::begin_at(base, &telling, &text, false)?;
        let written = pump::<io::Error>(&mut &*STREAM, &mut out.writer(draft.stream_at(), stop)?, |_| Ok(()))?;
        draft.finish(out.file.get()?, &telling, &text, written)?;
        out.leave()
    };
    write().map_err(|e| stored(&request.file, &e))
}

/// Blocks.
fn opened(given: &GivenFile) -> Result<Saved, Unusable> {
    let base = seek(given, SeekFrom::Current(0)).map_err(io::Error::from)?;
    Saved::read_given(apart::copy(given.as_fd())?.into(), base)
}

fn unusable(path: &Path, why: Unusable) -> DriverError {
    let text = format!("{}: {why}", path.display());
    match why {
        Unusable::Wrong(_) => DriverError::Argument(text),
        Unusable::Foreign(_) => DriverError::Unsupported(text),
        Unusable::Io(_) => DriverError::Storage(text),
    }
}
