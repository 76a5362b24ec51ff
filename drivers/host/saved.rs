//! The file that a saved machine is kept in: one header, what is told of it, its configuration, then the hypervisor's own
//! stream. `docs/SAVED-STATE.md` is the description of the format, byte by byte; a test holds the oldest file there is.
//!
//! ```text
//!   Draft::begin ─▶ Pump (hypervisor's pipe ─▶ file, counted and summed) ─▶ Draft::finish: only now there is a header
//!   read: header, telling and configuration, held to their checksum ─▶ verify: the stream, to its own ─▶ stream
//! ```

use super::workers::ClosedAside;
use rustix::fs::{Stat, fstat};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::hash::Hasher;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use twox_hash::XxHash64;
use virt_model::xml::Limits;

/// How a file begins.
const MAGIC: &[u8; 8] = b"VIRTSAVE";
/// The version that is written, and the newest that is read.
const VERSION: u32 = 1;
/// Bytes of the header.
const HEADER: usize = 64;
/// Where in the header its own checksum is.
const SUM_AT: usize = 56;
/// The stream begins at a multiple of this, in bytes.
const ALIGNMENT: u64 = 4096;
/// What is told of a machine may be no longer, in bytes.
const MOST_TOLD: u64 = 4 << 20;
/// Bytes that are moved at once.
const PIECE: usize = 1 << 20;

/// How files begin that others made, and what they are.
const FOREIGN: &[(&[u8], &str)] = &[
    (b"LibvirtQemudSave", "a file that libvirt has saved a machine in"),
    (b"LibvirtQemudPart", "a file that libvirt was saving a machine in when it was cut off"),
];

/// What is told of a machine beside its configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Telling {
    /// Whose stream it is: a driver's name.
    pub driver: String,
    /// The version of the hypervisor that wrote it: major, minor, micro.
    pub version: (u32, u32, u32),
    /// When, in microseconds since the epoch.
    pub saved_usec: u64,
    /// Whether its CPUs are to stand when it has been restored.
    pub paused: bool,
    /// The CPU that it had, as `<cpu>`, where the configuration leaves that to the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// How the files of its disks looked.
    #[serde(default)]
    pub disks: Vec<DiskLook>,
}

/// How one file of a disk looked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLook {
    /// The disk: `vda`.
    pub target: String,
    /// The file, absolute.
    pub path: PathBuf,
    /// How it looked.
    pub look: super::look::Look,
}

/// Why a file is not taken for a saved machine.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// It is none, or not whole; says what is wrong.
    #[error("{0}")]
    Wrong(String),
    /// Another program has made it.
    #[error("it is {0}, which virtd does not read")]
    Foreign(&'static str),
    /// It could not be read.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A file whose header is still to be written.
#[derive(Clone, Debug)]
pub struct Draft {
    stream: u64,
}

/// A stream that has been written: its length in bytes, and its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes.
    pub length: u64,
    /// XXH64.
    pub sum: u64,
}

/// A file whose header, telling and configuration are sound.
#[derive(Debug)]
pub struct Saved {
    /// What is told of the machine.
    pub telling: Telling,
    /// Its configuration: a `<domain>` with all that is secret.
    pub configuration: String,
    file: ClosedAside,
    stream: u64,
    written: Written,
}

impl Draft {
    /// Leaves room for all that comes before the stream, in a file that is empty, and stands there. `telling` is the longest that
    /// may be told.
    pub fn begin(file: &mut impl Seek, telling: &Telling, configuration: &str) -> io::Result<Draft> {
        let texts = serde_json::to_vec(telling)?.len() + configuration.len();
        let stream = (HEADER as u64 + texts as u64).next_multiple_of(ALIGNMENT);
        file.seek(SeekFrom::Start(stream))?;
        Ok(Draft { stream })
    }

    /// Writes what comes before the stream, and has the whole file on disk. Before this it is no saved machine.
    pub fn finish(self, file: &File, telling: &Telling, configuration: &str, written: Written) -> io::Result<()> {
        let mut texts = serde_json::to_vec(telling)?;
        let told = texts.len() as u64;
        texts.extend_from_slice(configuration.as_bytes());
        if HEADER as u64 + texts.len() as u64 > self.stream {
            return Err(io::Error::other("more is told of the machine than there was room left for"));
        }
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        put(&mut header, 16, told);
        put(&mut header, 24, configuration.len() as u64);
        put(&mut header, 32, self.stream);
        put(&mut header, 40, written.length);
        put(&mut header, 48, written.sum);
        let sum = sum_of(&header, &texts);
        put(&mut header, SUM_AT, sum);
        file.write_all_at(&texts, HEADER as u64)?;
        file.sync_data()?;
        file.write_all_at(&header, 0)?;
        file.sync_all()
    }
}

/// Moves a stream to its end, and tells how long it was. `go_on` is asked between any two pieces.
pub fn pump<E: From<io::Error>>(
    from: &mut impl Read,
    to: &mut impl Write,
    mut go_on: impl FnMut(u64) -> Result<(), E>,
) -> Result<Written, E> {
    let (mut hasher, mut length, mut piece) = (XxHash64::with_seed(0), 0, vec![0; PIECE]);
    loop {
        go_on(length)?;
        let got = match from.read(&mut piece) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            got => got?,
        };
        if got == 0 {
            return Ok(Written { length, sum: hasher.finish() });
        }
        hasher.write(&piece[..got]);
        to.write_all(&piece[..got])?;
        length += got as u64;
    }
}

impl Saved {
    /// Reads all that comes before the stream, and holds it to its checksum and the file's length.
    pub fn read(file: File) -> Result<Saved, Unusable> {
        let length = file.metadata()?.len();
        let mut header = [0; HEADER];
        let begun = read_at_most(&file, &mut header)?;
        if let Some((_, what)) = FOREIGN.iter().find(|(magic, _)| header[..begun].starts_with(magic)) {
            return Err(Unusable::Foreign(what));
        }
        if header[..begun.min(8)] != MAGIC[..begun.min(8)] || begun < 8 {
            return Err(wrong("it is no machine that virtd has saved, or one that was never completed"));
        }
        if begun < HEADER {
            return Err(cut_off(length, HEADER as u64));
        }
        let version = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        if version != VERSION {
            return Err(Unusable::Wrong(format!(
                "it is of version {version} of the format, and this virtd reads version {VERSION}"
            )));
        }
        if header[12..16] != [0; 4] {
            return Err(wrong("it was written in a way that this virtd does not know"));
        }
        let (told, configured, stream) = (get(&header, 16), get(&header, 24), get(&header, 32));
        let written = Written { length: get(&header, 40), sum: get(&header, 48) };
        let most = (MOST_TOLD, Limits::STORED.size as u64);
        if told > most.0 || configured > most.1 || stream < HEADER as u64 + told + configured {
            return Err(wrong("its header has been changed"));
        }
        let whole = stream.saturating_add(written.length);
        if length != whole {
            return Err(cut_off(length, whole));
        }
        let mut texts = vec![0; usize::try_from(told + configured).map_err(io::Error::other)?];
        file.read_exact_at(&mut texts, HEADER as u64)?;
        let noted = get(&header, SUM_AT);
        put(&mut header, SUM_AT, 0);
        if sum_of(&header, &texts) != noted {
            return Err(wrong("its header or its configuration has been changed"));
        }
        let configuration = texts.split_off(usize::try_from(told).map_err(io::Error::other)?);
        let telling = serde_json::from_slice(&texts)
            .map_err(|e| Unusable::Wrong(format!("what it tells of the machine cannot be read: {e}")))?;
        let configuration = String::from_utf8(configuration).map_err(|_| wrong("its configuration is no text"))?;
        Ok(Saved { telling, configuration, file: ClosedAside::of(file), stream, written })
    }

    /// How long the stream is, in bytes.
    pub fn length(&self) -> u64 {
        self.written.length
    }

    /// How long the file is, in bytes.
    pub fn bytes(&self) -> u64 {
        self.stream + self.written.length
    }

    /// What the kernel says of the file.
    pub fn stat(&self) -> io::Result<Stat> {
        Ok(fstat(self.file.get()?)?)
    }

    /// Writes the same machine with another configuration into a file that is empty. The stream is held to its checksum; `go_on` is
    /// asked as in [`pump`]. On failure what is in that file is no saved machine.
    pub fn copy_with<E: From<io::Error> + From<Unusable>>(
        &self,
        to: &File,
        configuration: &str,
        go_on: impl FnMut(u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut to, mut from) = (to, Stream { saved: self, at: 0 });
        let draft = Draft::begin(&mut to, &self.telling, configuration)?;
        let copied = pump(&mut from, &mut to, go_on)?;
        if copied != self.written {
            return Err(wrong("the memory in it has been changed").into());
        }
        Ok(draft.finish(to, &self.telling, configuration, copied)?)
    }

    /// Reads the stream to its end and holds it to its checksum. `go_on` is asked between any two pieces, with how many bytes
    /// have been read.
    pub fn verify<E: From<Unusable>>(&self, mut go_on: impl FnMut(u64) -> Result<(), E>) -> Result<(), E> {
        let (mut hasher, mut at, mut piece) = (XxHash64::with_seed(0), 0, vec![0; PIECE]);
        while at < self.written.length {
            go_on(at)?;
            let most = piece.len().min(usize::try_from(self.written.length - at).unwrap_or(usize::MAX));
            let read = self.file.get().and_then(|file| file.read_at(&mut piece[..most], self.stream + at));
            let got = match read {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                got => got.map_err(Unusable::Io)?,
            };
            if got == 0 {
                return Err(cut_off(self.stream + at, self.stream + self.written.length).into());
            }
            hasher.write(&piece[..got]);
            at += got as u64;
        }
        match hasher.finish() == self.written.sum {
            true => Ok(()),
            false => Err(wrong("the memory in it has been changed").into()),
        }
    }

    /// The file, standing where the stream begins. All that are given share one place in it: it is to be read once.
    pub fn stream(&self) -> io::Result<ClosedAside> {
        let copy = ClosedAside::of(self.file.get()?.try_clone()?);
        copy.get()?.seek(SeekFrom::Start(self.stream))?;
        Ok(copy)
    }
}

/// The stream in a file, which another reader of that file does not move.
struct Stream<'a> {
    saved: &'a Saved,
    at: u64,
}

impl Read for Stream<'_> {
    fn read(&mut self, piece: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.saved.written.length - self.at).unwrap_or(usize::MAX);
        let most = piece.len().min(left);
        let got = self.saved.file.get()?.read_at(&mut piece[..most], self.saved.stream + self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}

fn wrong(what: &str) -> Unusable {
    Unusable::Wrong(what.to_owned())
}

fn cut_off(has: u64, wanted: u64) -> Unusable {
    match has < wanted {
        true => Unusable::Wrong(format!("it is cut off: it has {has} bytes of {wanted}")),
        false => Unusable::Wrong(format!("it has been changed: it has {has} bytes, and {wanted} were written")),
    }
}

fn sum_of(header: &[u8; HEADER], texts: &[u8]) -> u64 {
    let mut hasher = XxHash64::with_seed(0);
    hasher.write(header);
    hasher.write(texts);
    hasher.finish()
}

fn put(header: &mut [u8; HEADER], at: usize, number: u64) {
    header[at..at + 8].copy_from_slice(&number.to_le_bytes());
}

fn get(header: &[u8; HEADER], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&header[at..at + 8]);
    u64::from_le_bytes(bytes)
}

/// How many bytes there were of those that were wanted, from the file's beginning on.
fn read_at_most(file: &File, bytes: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < bytes.len() {
        match file.read_at(&mut bytes[got..], got as u64) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}

#[cfg(test)]
#[path = "saved_tests.rs"]
mod tests;
