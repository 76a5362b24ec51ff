//! Dumping a guest's memory alone, for debuggers, in a format of QEMU's.
//!
//! As with a save QEMU never has the file, and what is killed leaves a complete one or none (`save.rs`). But here it is QEMU that has
//! its guest stand while it writes, and that lets it go on, also when nobody reads any more: so a guest goes on at once though
//! virtd has been killed.
//!
//! ```text
//!  note ─▶ file beside ─▶ QEMU: stop ─▶ pipe: memory ─▶ QEMU: cont ─▶ on disk ─▶ note: complete ─▶ its name
//! ```

use super::super::instance::Body;
use super::Operation;
use super::files::stored;
use super::note::{Note, Save, written};
use super::pipe::Stream;
use super::save::{Begun, Content, begin};
use crate::host::out::Out;
use serde_json::json;
use std::sync::Arc;
use virt_model::domain::features::State;
use virt_model::driver::DriverError;
use virt_model::driver::saved::{MemoryFormat, SaveRequest};
use virt_model::driver::snapshots::Journal;

impl Operation {
    /// Refuses a format that this QEMU or this machine has not, and a file that cannot be made.
    pub(super) async fn check_dump(
        &self,
        body: &Body,
        request: &SaveRequest,
        format: MemoryFormat,
    ) -> Result<(), DriverError> {
        let word = format.as_str();
        let told = body.patiently("query-dump-guest-memory-capability", json!({})).await?;
        let formats: Vec<&str> =
            told["formats"].as_array().into_iter().flatten().filter_map(|one| one.as_str()).collect();
        if !formats.contains(&word) {
            let formats = formats.join(", ");
            return Err(DriverError::Unsupported(format!(
                "memory is not dumped in the format '{word}' by the QEMU that it runs in, which has these: {formats}"
            )));
        }
        let features = self.machine.def.features.as_ref();
        let says_where = features.and_then(|features| features.vmcoreinfo.as_ref()).is_some_and(State::is_on);
        if format == MemoryFormat::WinDmp && !says_where {
            return Err(DriverError::Unsupported(
                "memory is dumped in the format 'win-dmp' only of a Windows whose driver says where its headers are, and the \
                 machine has no device for that: give it <features><vmcoreinfo state='on'/></features>, or choose another \
                 format"
                    .to_owned(),
            ));
        }
        self.nobody_else_works().await?;
        let bytes = self.machine.def.memory_kib() << 10;
        // All of it, or as little as memory that was never written is packed into.
        self.has_place(request, if format == MemoryFormat::Elf { bytes } else { bytes / 64 }).await
    }

    /// Makes the file beside, and notes which that is.
    pub(super) async fn begin_dump(
        &self,
        request: &SaveRequest,
        format: MemoryFormat,
        note: &mut Save,
        journal: &Arc<dyn Journal>,
    ) -> Result<Begun, DriverError> {
        let (wanted, wants, wary) = (note.clone(), request.clone(), self.images.lender.is_wary());
        let (held, out) = self.with_images(&note.part, move |_| begin(&wanted, &wants, wary)).await?;
        journal.step("file");
        note.number = held.as_ref().and_then(|held| held.number());
        journal.note(written(&Note::Save(note.clone()))?).await?;
        Ok(Begun { held, out, content: Content::Memory(format) })
    }

    /// Writes the memory, and has it on disk. The guest has gone on by then.
    pub(super) async fn write_dump(
        &self,
        body: &Body,
        note: &Save,
        out: &Out,
        format: MemoryFormat,
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        let moved = self
            .move_memory(body, (out, out.base().unwrap_or(0), &note.file), Stream::Memory(format), None, journal)
            .await;
        let moved = moved.map_err(|error| match error {
            // It looks at what the guest has said before it writes anything.
            DriverError::Hypervisor(why) if format == MemoryFormat::WinDmp => DriverError::Unsupported(format!(
                "the guest has not said what is needed for a dump in the format 'win-dmp' ({why}): choose another format"
            )),
            error => error,
        })?;
        self.dump_ends().await?;
        journal.step("memory");
        let (out, part) = (out.clone(), note.part.clone());
        let synced = self.with_images_of(&note.part, moved.length, move |_| out.sync().map_err(|e| stored(&part, &e)));
        self.unless_cancelled(synced, false, journal).await
    }

    /// Waits until QEMU writes no more, and has let its guest go on.
    pub(super) async fn dump_ends(&self) -> Result<(), DriverError> {
        let Some(body) = &self.body else { return Ok(()) };
        match body.line() {
            Ok(line) => line.end_dump().await,
            Err(DriverError::Gone) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
