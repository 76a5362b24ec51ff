//! Machines that are saved in a file, memory and configuration, and restored from it; and memory alone, for who debugs: what a
//! driver does for that.
//!
//! ```text
//!  save     check ─▶ save ─▶ the file is complete, the guest stands ─▶ the service ends it
//!  restore  read ─▶ the service knows whose it is ─▶ verify ─▶ start, from that
//!  killed   Snapshots::recover: the journal's last note ─▶ saved, or the guest goes on and nothing is left of the file
//! ```

use super::operation::{Journal, Machine};
use super::{DriverError, GivenFile};
use crate::domain::DomainDef;
use crate::domain::cpu::Cpu;
use async_trait::async_trait;
use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// What a driver can do with saved machines; what was cut off is made whole by [`super::snapshots::Snapshots::recover`].
#[async_trait]
pub trait SavedMachines: Send + Sync {
    /// Refuses what `save` would refuse before it changes anything. Changes nothing.
    async fn check_save(&self, machine: &Machine, request: &SaveRequest) -> Result<(), DriverError>;

    /// Writes memory and configuration to a file that is there when it is complete and on disk, and not before, in place of a
    /// plain file of that name. Then the guest stands, and is only good to be ended; nothing is reported of that. On failure, or
    /// when the journal is cancelled, no file is left that it made, and the guest runs if it ran.
    async fn save(
        &self,
        machine: &Machine,
        request: &SaveRequest,
        journal: Arc<dyn Journal>,
    ) -> Result<(), DriverError>;

    /// What the last note of a save that is half done becomes before its guest is let go on: from then on what was written is of
    /// no use, complete or not, and whoever makes the save whole removes it; whether that one lets the guest go on is said by
    /// `resumes`. Changes nothing by itself.
    fn taken_back(&self, note: serde_json::Value, resumes: bool) -> Result<serde_json::Value, DriverError>;

    /// Makes whole a save that was cut off, from the last note of its journal, where nothing else is left of the machine: what is
    /// complete gets its name, what is not is removed. Says what was done, for people.
    async fn settle_save(&self, machine: Uuid, note: serde_json::Value) -> Result<String, DriverError>;

    /// Opens a file, and holds what it says of the machine, and its length, to what was written. Beside that it gives its
    /// configuration: a `<domain>` with all that is secret, as long as the file says, so whoever asks bounds how many are there.
    /// `machine`: whose file it is, if that is known before. Errors: `Argument` if it is no
    /// saved machine or not whole, `Unsupported` for one of another program, `Storage` if it cannot be read.
    async fn read_saved(&self, from: SavedFile, machine: Option<Uuid>) -> Result<(SavedState, String), DriverError>;

    /// Puts another `configuration` in the place of the one in that file, which is a copy with all else as it was, and has that on
    /// disk. On failure the file is as it was. Errors as of `read_saved`; `Refused` if another file has come to be there.
    async fn reconfigure_saved(&self, saved: &SavedState, configuration: String) -> Result<(), DriverError>;

    /// Holds the memory in it to its checksum, what wrote it to what is here, and the disks of `def` that it names to how they
    /// looked. `progress` is told bytes, done and in all. Errors: `Argument` if it has been changed or was written by what cannot be
    /// read here, `Refused` names a disk that has changed.
    async fn verify_saved(
        &self,
        saved: &SavedState,
        def: &DomainDef,
        progress: Arc<dyn Fn(u64, u64) + Send + Sync>,
        cancel: &CancellationToken,
    ) -> Result<(), DriverError>;
}

/// What is shown as the name of what a client has given by descriptor.
pub const GIVEN: &str = "what was given by descriptor";

/// Where a machine was saved.
#[derive(Clone, Debug)]
pub enum SavedFile {
    /// In the file of that path, absolute.
    At(PathBuf),
    /// In what a client has open: from where it stands on.
    Given(Arc<GivenFile>),
}

/// How a machine's memory is packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// It is not.
    #[default]
    None,
    /// By zstd.
    Zstd,
}

impl Compression {
    /// The one that is called so.
    pub fn parse(word: &str) -> Option<Compression> {
        match word {
            "none" => Some(Compression::None),
            "zstd" => Some(Compression::Zstd),
            _ => None,
        }
    }
}

/// A machine that is to be saved.
#[derive(Clone, Debug)]
pub struct SaveRequest {
    /// The file: absolute, or what is shown of one that is given.
    pub file: PathBuf,
    /// What a client has open, to be written instead.
    pub given: Option<Arc<GivenFile>>,
    /// How its memory is packed.
    pub compression: Compression,
    /// It goes past the page cache.
    pub bypass_cache: bool,
    /// The configuration that is kept in it.
    pub def: Arc<DomainDef>,
    /// Its CPUs are to stand when it has been restored.
    pub paused: bool,
    /// It goes on, if its CPUs ran, as soon as its memory is written, and does not end: the file is a dump.
    pub goes_on: bool,
    /// Its memory alone is written, in that format; nothing is restored from it. Only of one that goes on.
    pub memory_only: Option<MemoryFormat>,
}

/// How memory alone is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryFormat {
    /// As an ELF core file: all of it.
    Elf,
    /// As kdump does, each page packed by zlib.
    KdumpZlib,
    /// The same by LZO.
    KdumpLzo,
    /// The same by snappy.
    KdumpSnappy,
    /// As Windows does, of a Windows that helps.
    WinDmp,
}

impl MemoryFormat {
    /// All of them.
    pub const ALL: [MemoryFormat; 5] = [
        MemoryFormat::Elf,
        MemoryFormat::KdumpZlib,
        MemoryFormat::KdumpLzo,
        MemoryFormat::KdumpSnappy,
        MemoryFormat::WinDmp,
    ];

    /// What it is called.
    pub fn as_str(self) -> &'static str {
        match self {
            MemoryFormat::Elf => "elf",
            MemoryFormat::KdumpZlib => "kdump-zlib",
            MemoryFormat::KdumpLzo => "kdump-lzo",
            MemoryFormat::KdumpSnappy => "kdump-snappy",
            MemoryFormat::WinDmp => "win-dmp",
        }
    }

    /// The one that is called so.
    pub fn parse(word: &str) -> Option<MemoryFormat> {
        MemoryFormat::ALL.into_iter().find(|format| format.as_str() == word)
    }
}

/// A saved machine, whose file is open.
#[derive(Clone)]
pub struct SavedState {
    /// Where it was found.
    pub file: PathBuf,
    /// Whether its CPUs are to stand.
    pub paused: bool,
    /// The CPU that the guest had, where the configuration leaves that open.
    pub cpu: Option<Cpu>,
    /// What the driver holds of it.
    pub held: Arc<dyn Any + Send + Sync>,
}
