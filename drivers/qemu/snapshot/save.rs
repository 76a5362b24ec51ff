//! Saving a machine in a file of the format in [`crate::host::saved`].
//!
//! QEMU never has the file: it writes its stream into a pipe, and a thread of the machine's moves that on, counting. So whatever
//! is killed, there is a file beside the wanted one that has no header yet, or a complete one.
//!
//! ```text
//!  note ─▶ file beside ─▶ stop ─▶ pipe: memory ─▶ header ─▶ note: complete ─▶ its name ─▶ (the service ends the guest)
//!    └── undone: it is removed, the guest goes on ──┘        └── finished: named, if it is not yet; the guest ends
//! ```

use super::super::expanded;
use super::super::instance::Body;
use super::external::Quiet;
use super::files::{RESERVE, beside, check_space, stored};
use super::naming::{Naming, Written};
use super::note::{Note, Save, written};
use super::packed::Zstd;
use super::pipe::Stream;
use super::{Operation, cannot, undone};
use crate::host::files::{Seen, What};
use crate::host::look::Look;
use crate::host::out::Out;
use crate::host::saved::{DiskLook, Draft, Telling, write_tail};
use crate::host::workers::{Errand, Workers};
use serde_json::{Value, json};
use std::io;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use uuid::Uuid;
use virt_model::domain::Form;
use virt_model::driver::saved::{Compression, GIVEN, MemoryFormat, SaveRequest};
use virt_model::driver::snapshots::{Journal, Recovered};
use virt_model::driver::{DriverError, DriverEvent};
use virt_model::state::Suspended;

impl Operation {
    /// Refuses a machine that cannot be saved, and a file that cannot be made.
    pub(super) async fn check_save(&self, request: &SaveRequest) -> Result<(), DriverError> {
        let Some(body) = &self.body else { return Err(DriverError::Gone) };
        if let Some(format) = request.memory_only {
            return self.check_dump(body, request, format).await;
        }
        let disks = &self.machine.def.devices.disks;
        if let Some(disk) = disks.iter().find(|disk| disk.transient.is_some()) {
            let target = &disk.target.dev;
            return Err(cannot(format!(
                "disk '{target}' throws away what is written to it, and nothing that could be restored would be left"
            )));
        }
        self.nobody_else_works().await?;
        if let Some(why) = self.keeps_memory(body).await? {
            return Err(DriverError::Refused(format!("its memory cannot be saved: {why}")));
        }
        if self.is_sent(body).await? {
            return Err(DriverError::Refused(
                "its memory has been written to a file already, and it has been paused since: resume it for a moment"
                    .to_owned(),
            ));
        }
        self.packer(request).await?;
        self.has_place(request, (self.machine.def.memory_kib() << 10) / 64).await
    }

    /// Refuses a file that cannot be made, or where there is no room for so many bytes.
    pub(super) async fn has_place(&self, request: &SaveRequest, bytes: u64) -> Result<(), DriverError> {
        if let Some(given) = request.given.clone() {
            let judge = move |_: &_| Out::given(&given, false).map(drop);
            return self.with_images(&request.file, judge).await;
        }
        let (file, least) = (request.file.clone(), bytes.saturating_add(RESERVE));
        self.with_images(&request.file, move |_| {
            let there = Seen::at(&file);
            check_place(&file, &there)?;
            check_space(&file, &there, least)
        })
        .await
    }

    /// What packs the memory, if it is to be packed.
    async fn packer(&self, request: &SaveRequest) -> Result<Option<Zstd>, DriverError> {
        match request.compression {
            Compression::None => Ok(None),
            Compression::Zstd => Zstd::find(&self.images.lender).await.map(Some),
        }
    }

    /// Saves it. The guest stands afterwards, and nobody has been told.
    pub(super) async fn save(&self, request: &SaveRequest, journal: &Arc<dyn Journal>) -> Result<(), DriverError> {
        let mut note = Save {
            part: beside(&request.file),
            file: request.file.clone(),
            number: None,
            resume: self.machine.running,
            complete: false,
            goes_on: request.goes_on,
            memory_only: request.memory_only.is_some(),
            given: request.given.is_some(),
        };
        let zstd = self.packer(request).await?;
        journal.note(written(&Note::Save(note.clone()))?).await?;
        // Whether it comes to its end or goes on as before: that it stood is nobody's business.
        let quiet = self.body.as_ref().map(Quiet::keep);
        let begun = match request.memory_only {
            None => self.begin_saved(request, &mut note, journal).await,
            Some(format) => self.begin_dump(request, format, &mut note, journal).await,
        };
        let begun = match begun {
            Ok(begun) => begun,
            Err(error) => return Err(undone(error, self.undo_save(&note, None, quiet, Some(journal)).await)),
        };
        let error = match self.write_saved(&mut note, (&begun, zstd), journal).await {
            Ok(()) => match self.name_saved(&note, begun.held.clone()).await {
                Ok(Naming::Named) => {
                    journal.step("named");
                    return Ok(());
                }
                Ok(Naming::Beside(error)) => error,
                Ok(Naming::Lost) => lost(&note),
                // It may have its name: only who looks again can tell.
                Err(error) if note.goes_on => return Err(named_later(&error)),
                Err(error) => return Err(self.stands_half_done(&error, quiet)),
            },
            Err(error) => error,
        };
        if note.complete {
            // Whoever finds the other note looks for what is removed now, and finds that it is not there.
            note.complete = false;
            let noted = async { journal.note(written(&Note::Save(note.clone()))?).await };
            if let Err(why) = noted.await {
                // What may be noted as complete must not be there any more when the guest goes on: nobody goes on from it too.
                if self.remove_saved(&note, begun.held.clone()).await.is_err() {
                    return Err(if note.goes_on { named_later(&why) } else { self.stands_half_done(&why, quiet) });
                }
            }
        }
        if let Err(why) = self.unseal().await {
            return Err(self.stands_half_done(&why, quiet));
        }
        let undo = self.undo_save(&note, begun.held, quiet, Some(journal)).await;
        // What a client has given is to be nothing that looks like a part of a machine.
        let emptied =
            self.with_images(&note.file, move |_| begun.out.empty().map_err(|e| stored(Path::new(GIVEN), &e)));
        if note.given
            && let Err(error) = emptied.await
        {
            tracing::debug!(uuid = %self.machine.def.uuid, %error, "what was begun stays in a file of a client");
        }
        Err(undone(error, undo))
    }

    /// What was written is complete, and whether it has its name is not known: the guest stands for so long, and that is told.
    fn stands_half_done(&self, error: &DriverError, quiet: Option<Quiet>) -> DriverError {
        drop(quiet);
        if let Some(body) = self.body.as_ref().filter(|_| self.machine.running) {
            body.reporter.settle(|_| Some(DriverEvent::Suspended(Suspended::Paused)));
        }
        DriverError::HalfDone(format!(
            "all of it is written, and it is not known yet whether it stays ({error}): that is looked at again and again; until \
             then the guest stands, and if it is resumed, it goes on and what was written is removed"
        ))
    }

    /// Makes the file beside, notes which that is, and has the guest stand.
    async fn begin_saved(
        &self,
        request: &SaveRequest,
        note: &mut Save,
        journal: &Arc<dyn Journal>,
    ) -> Result<Begun, DriverError> {
        let body = self.body.as_ref().ok_or(DriverError::Gone)?;
        let configuration = request.def.write(Form::STORED);
        let telling = self.telling(body, request).await?;
        let wary = self.images.lender.is_wary();
        let (part, room, text) = (note.part.clone(), at_most(&telling), configuration.clone());
        let (wanted, wants) = (note.clone(), request.clone());
        let begun = self.with_images(&note.part, move |_| {
            let (held, out) = begin(&wanted, &wants, wary)?;
            let packed = wants.compression == Compression::Zstd;
            let draft = out.base().map(|base| Draft::begin_at(base, &room, &text, packed)).transpose();
            Ok((held, out, draft.map_err(|e| stored(&part, &e))?))
        });
        let (held, out, draft) = begun.await?;
        journal.step("file");
        note.number = held.as_ref().and_then(|held| held.number());
        let begun = Begun { held, out, content: Content::Machine { draft, telling, configuration } };
        journal.note(written(&Note::Save(note.clone()))?).await?;
        if self.machine.running {
            body.patiently("stop", json!({})).await?;
            journal.step("stopped");
        }
        Ok(begun)
    }

    /// Writes all of it, and notes that it is complete; that may be on disk where this fails and the note says it.
    async fn write_saved(
        &self,
        note: &mut Save,
        (begun, zstd): (&Begun, Option<Zstd>),
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        let body = self.body.as_ref().ok_or(DriverError::Gone)?;
        match &begun.content {
            Content::Machine { draft, telling, configuration } => {
                let parts = (&begun.out, draft.as_ref(), telling, &**configuration);
                self.write_machine(body, note, (parts, zstd), journal).await?;
            }
            Content::Memory(format) => self.write_dump(body, note, &begun.out, *format, journal).await?,
        }
        journal.step("complete");
        let sealing = self.is_sealing();
        if !sealing && journal.cancelled().is_cancelled() {
            return Err(DriverError::Cancelled);
        }
        // That was asked before all was written, which may be long ago.
        if !note.given {
            journal.may_replace(&note.file).await?;
        }
        journal.point_of_no_return();
        self.goes_to_its_end();
        note.complete = true;
        let noted = journal.note(written(&Note::Save(note.clone()))?).await;
        match noted {
            // Whoever reads has all of it, and nothing takes that back.
            Err(error) if sealing && begun.out.base().is_none() => {
                tracing::warn!(uuid = %self.machine.def.uuid, %error, "it is saved in a pipe, and that cannot be noted");
            }
            noted => noted?,
        }
        self.is_sealed();
        Ok(())
    }

    /// Writes memory and devices behind the header, and that.
    async fn write_machine(
        &self,
        body: &Body,
        note: &Save,
        ((out, draft, telling, configuration), zstd): (Parts<'_>, Option<Zstd>),
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        let stream = Stream::Machine { resume: note.resume };
        if draft.is_none() {
            let (out, telling, text, packed) = (out.clone(), telling.clone(), configuration.to_owned(), zstd.is_some());
            let announced = self.with_images(&note.file, move |images| {
                // Of disks it is told at the end, when QEMU has let go of them.
                let telling = Telling { disks: Vec::new(), ..telling };
                let mut to = out.writer(0, &images.stop).map_err(|e| stored(Path::new(GIVEN), &e))?;
                Draft::announce(&mut to, &telling, &text, packed).map_err(|e| stored(Path::new(GIVEN), &e))
            });
            self.unless_cancelled(announced, note.resume, journal).await?;
        }
        let at = draft.map_or(0, Draft::stream_at);
        let moved = self.move_memory(body, (out, at, &note.file), stream, zstd, journal).await?;
        match note.goes_on {
            true => self.go_on(note.resume).await?,
            false => journal.memory_written(),
        }
        journal.step("memory");
        let part = note.part.clone();
        let bytes = self.machine.def.memory_kib() << 10;
        let (out, draft, telling, configuration) =
            (out.clone(), draft.cloned(), telling.clone(), configuration.to_owned());
        let (to, shown) = (out.clone(), part.clone());
        let settled = self.with_images_of(&note.part, bytes, move |_| {
            // QEMU has let go of its images: as they are now they stay.
            let looked = telling.disks.into_iter().map(looked).collect::<Result<Vec<_>, DriverError>>()?;
            to.settle().map_err(|e| stored(&shown, &e))?;
            Ok(Telling { disks: looked.into_iter().flatten().collect(), ..telling })
        });
        let telling = self.unless_cancelled(settled, note.resume, journal).await?;
        let last = out.clone();
        let finished = self.with_images_of(&note.part, bytes, move |images| {
            let finish = || match draft {
                Some(draft) => {
                    draft.finish(out.file.get()?, &telling, &configuration, moved).and_then(|()| out.leave())
                }
                None => write_tail(&mut out.writer(0, &images.stop)?, &telling.disks, moved),
            };
            finish().map_err(|e| stored(&part, &e))
        });
        if note.given && !note.goes_on {
            self.seal(&last, journal)?;
            return finished.await;
        }
        self.unless_cancelled(finished, note.resume, journal).await
    }

    /// Waits for work on files. Where that is cancelled the guest goes on at once, if it is to, whenever the file system answers.
    pub(super) async fn unless_cancelled<T>(
        &self,
        work: impl Future<Output = Result<T, DriverError>>,
        resume: bool,
        journal: &Arc<dyn Journal>,
    ) -> Result<T, DriverError> {
        let mut work = pin!(work);
        tokio::select! {
            done = &mut work => return done,
            () = journal.cancelled().cancelled() => {}
        }
        journal.save_given_up();
        self.go_on(resume).await?;
        let _ = work.await;
        Err(DriverError::Cancelled)
    }

    /// What is told of the machine, its disks not looked at yet.
    async fn telling(&self, body: &Body, request: &SaveRequest) -> Result<Telling, DriverError> {
        let told = body.patiently("query-version", json!({})).await?;
        let number = |part: &str| u32::try_from(told["qemu"][part].as_u64().unwrap_or(0)).unwrap_or(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let disks = self.machine.def.devices.disks.iter();
        let files = disks.flat_map(|disk| disk.files().into_iter().map(|path| (disk.target.dev.clone(), path)));
        Ok(Telling {
            driver: "qemu".to_owned(),
            version: (number("major"), number("minor"), number("micro")),
            saved_usec: u64::try_from(now.as_micros()).unwrap_or(u64::MAX),
            paused: request.paused,
            cpu: body.keeper.cpu().map(|cpu| expanded::written(&cpu)),
            disks: files.map(|(target, path)| DiskLook { target, path, look: Look::LONGEST }).collect(),
        })
    }

    /// A file that is complete gets its name, if it has it not yet. An error says nothing of which name it has then.
    async fn name_saved(&self, note: &Save, held: Option<Arc<Written>>) -> Result<Naming, DriverError> {
        if note.given {
            return Ok(Naming::Named);
        }
        let note = note.clone();
        self.with_images(&note.file.clone(), move |images| found(&note, held, images.lender.is_wary())?.name()).await
    }

    /// Lets the guest go on, if it ran, and then removes what was written: that may be where nobody answers. Not for what may be
    /// noted as complete.
    async fn undo_save(
        &self,
        note: &Save,
        held: Option<Arc<Written>>,
        quiet: Option<Quiet>,
        journal: Option<&Arc<dyn Journal>>,
    ) -> Result<(), DriverError> {
        self.goes_to_its_end();
        self.unseal().await?;
        journal.iter().for_each(|journal| journal.save_given_up());
        let gone_on = match note.memory_only {
            true => self.dump_ends().await,
            false => self.go_on(self.machine.running || note.resume).await,
        };
        drop(quiet);
        gone_on.and(self.remove_saved(note, held).await)
    }

    /// Removes what was written, wherever it is.
    async fn remove_saved(&self, note: &Save, held: Option<Arc<Written>>) -> Result<(), DriverError> {
        if note.given {
            return self.unseal().await;
        }
        let (what, note) = (note.part.clone(), note.clone());
        self.with_images(&what, move |images| found(&note, held, images.lender.is_wary())?.remove()).await
    }

    /// What is complete is named, or removed before its guest goes on: as long as it is neither, the guest stands.
    pub(super) async fn recover_save(&self, note: Save) -> Result<Recovered, DriverError> {
        let file = note.file.display();
        if note.complete && (note.goes_on || !self.has_gone_on().await?) {
            match self.name_saved(&note, None).await? {
                Naming::Named => return Ok(Recovered::Saved(note.file)),
                Naming::Beside(error) if self.body.is_none() => return Err(error),
                Naming::Beside(error) => {
                    self.remove_saved(&note, None).await?;
                    tracing::warn!(uuid = %self.machine.def.uuid, %error, "its guest goes on");
                }
                Naming::Lost if self.body.is_none() => return Ok(Recovered::Undone { story: lost(&note).to_string() }),
                Naming::Lost => {}
            }
        }
        if let Some(body) = self.body.as_ref().filter(|_| !note.memory_only) {
            // Its memory goes nowhere: whoever took it is no more.
            body.line()?.end_migration().await?;
        }
        self.undo_save(&note, None, None, None).await?;
        Ok(Recovered::Undone { story: format!("nothing of {file} is left") })
    }

    /// Whether the guest runs: what was saved of it is not what it is any more.
    async fn has_gone_on(&self) -> Result<bool, DriverError> {
        let Some(body) = &self.body else { return Ok(false) };
        match body.patiently("query-status", json!({})).await {
            Ok(told) => Ok(told["status"] == "running"),
            Err(DriverError::Gone) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Why the memory of the guest is good for nothing elsewhere, if so.
    pub(super) async fn keeps_memory(&self, body: &Body) -> Result<Option<String>, DriverError> {
        if let Some(why) = super::super::hostdev::keeps_memory_here(&self.machine.def) {
            return Ok(Some(why));
        }
        let told = body.patiently("query-migrate", json!({})).await?;
        let blockers: Vec<&str> =
            told["blocked-reasons"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        Ok((!blockers.is_empty()).then(|| blockers.join("; ")))
    }

    /// Whether its memory has been written to a file, and its guest has not gone on since: QEMU does not write it again.
    pub(super) async fn is_sent(&self, body: &Body) -> Result<bool, DriverError> {
        Ok(body.patiently("query-status", json!({})).await?["status"] == "postmigrate")
    }
}

/// What is written to, what comes before the stream where that can be gone back in, and what is told.
type Parts<'a> = (&'a Out, Option<&'a Draft>, &'a Telling, &'a str);

/// Makes the file beside, or takes what was given: what is behind its beginning is lost from then on. Blocks.
pub(super) fn begin(
    note: &Save,
    request: &SaveRequest,
    wary: bool,
) -> Result<(Option<Arc<Written>>, Out), DriverError> {
    if let Some(given) = &request.given {
        let out = Out::given(given, request.bypass_cache)?;
        out.empty().map_err(|e| stored(Path::new(GIVEN), &e))?;
        return Ok((None, out));
    }
    let mut held = Written::find(note, wary)?;
    let out = Out::made(held.create()?, request.bypass_cache);
    Ok((Some(Arc::new(held)), out))
}

/// A file that is being written.
pub(super) struct Begun {
    /// Its names; a client's file has none.
    pub held: Option<Arc<Written>>,
    pub out: Out,
    pub content: Content,
}

/// What is to be in it.
pub(super) enum Content {
    /// The machine: what comes before its stream. What cannot be gone back in has no draft.
    Machine { draft: Option<Draft>, telling: Telling, configuration: String },
    /// Its memory alone.
    Memory(MemoryFormat),
}

/// What is held of it, or else what its note means now. Blocks.
fn found(note: &Save, held: Option<Arc<Written>>, wary: bool) -> Result<Arc<Written>, DriverError> {
    match held {
        Some(held) => Ok(held),
        None => Written::find(note, wary).map(Arc::new),
    }
}

/// What was complete is under neither of its names.
fn lost(note: &Save) -> DriverError {
    let (part, file) = (note.part.display(), note.file.display());
    DriverError::Storage(format!("what was saved is neither {part} nor {file}: somebody has moved or removed it"))
}

/// A dump is complete, its guest goes on, and whether it has its name is not known.
fn named_later(error: &DriverError) -> DriverError {
    DriverError::HalfDone(format!(
        "all of it is written, and the guest goes on; it is not known yet whether it is named ({error}): that is looked at again \
         and again"
    ))
}

/// The note of a save whose guest is to go on, or has: what was written is of no use from then on, complete or not; but for a
/// dump, which is complete whatever the guest does. `resumes`: whoever makes it whole lets the guest go on.
pub fn taken_back(note: serde_json::Value, resumes: bool) -> Result<serde_json::Value, DriverError> {
    match serde_json::from_value(note) {
        Ok(Note::Save(note)) => {
            let complete = note.complete && note.goes_on;
            written(&Note::Save(Save { complete, resume: resumes, ..note }))
        }
        Ok(_) => Err(DriverError::Internal("a note of something else".to_owned())),
        Err(e) => Err(DriverError::Internal(format!("the note of a save cannot be read: {e}"))),
    }
}

/// Makes a save whole of which only its note is left. `wary`: as root among others.
pub async fn settle(
    workers: &Workers,
    machine: Uuid,
    note: serde_json::Value,
    wary: bool,
) -> Result<String, DriverError> {
    let note = serde_json::from_value(note);
    let note = note.map_err(|e| DriverError::Internal(format!("the note of a save cannot be read: {e}")))?;
    let Note::Save(note) = note else { return Err(DriverError::Internal("a note of something else".to_owned())) };
    let errand = Errand::new(machine, note.file.display().to_string());
    let settled = workers.run(errand, move |_| {
        let file = note.file.display();
        if note.given {
            let told = if note.complete { "it is saved in" } else { "it is not saved whole in" };
            return Ok(format!("{told} {file}"));
        }
        let found = Written::find(&note, wary)?;
        match note.complete {
            true => match found.name()? {
                Naming::Named => Ok(format!("it is saved in {file}")),
                Naming::Beside(error) => Err(error),
                Naming::Lost => Ok(lost(&note).to_string()),
            },
            false => found.remove().map(|()| format!("nothing of {file} is left")),
        }
    });
    settled.await
}

/// A plain file, or nothing, and its folder is there.
fn check_place(file: &Path, there: &Seen) -> Result<(), DriverError> {
    let shown = file.display();
    match there.what {
        What::Plain => Ok(()),
        What::Nothing if there.has_folder => Ok(()),
        What::Nothing => Err(DriverError::Storage(format!("{shown}: the folder that it is to be in is not there"))),
        What::Folder => Err(DriverError::Argument(format!("{shown} is a folder; name a file in it"))),
        What::Block | What::Other => {
            Err(DriverError::Argument(format!("{shown} is no plain file, and is not replaced; choose another file")))
        }
    }
}

/// The longest that may come to be told of a machine.
fn at_most(telling: &Telling) -> Telling {
    let longest = |disk: &DiskLook| DiskLook { look: Look::LONGEST, ..disk.clone() };
    Telling { disks: telling.disks.iter().map(longest).collect(), ..telling.clone() }
}

/// A disk's file as it is now. A name that leads to no file and no device any more is not told of.
fn looked(disk: DiskLook) -> Result<Option<DiskLook>, DriverError> {
    match Look::at(&disk.path) {
        Ok(look) => Ok(look.map(|look| DiskLook { look, ..disk })),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(stored(&disk.path, &e)),
    }
}
