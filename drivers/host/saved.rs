//! The file that a saved machine is kept in: one header, what is told of it, its configuration, then the hypervisor's own
//! stream. `docs/SAVED-STATE.md` is the description of the format, byte by byte; a test holds the oldest file there is.
//!
//! ```text
//!   Draft::begin ─▶ Pump (hypervisor's pipe ─▶ file, counted and summed) ─▶ Draft::finish: only now there is a header
//!   Draft::announce ─▶ the same into a pipe ─▶ write_tail: what only then is known
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
/// In the header: the stream is packed by zstd.
const PACKED: u32 = 1;
/// The same: the stream's length and checksum, and how disks looked, are not in the header but at the file's end.
const TAILED: u32 = 2;
/// How the last bytes of a file with a tail begin, and how many there are.
const TAIL: (&[u8; 8], usize) = (b"VIRTTAIL", 40);
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
    /// Where the file begins in what it is written to.
    base: u64,
    stream: u64,
    packed: bool,
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
    /// Where the stream begins.
    stream: u64,
    written: Written,
    packed: bool,
    /// A client has given it: nobody else is to have the descriptor.
    given: bool,
}

impl Draft {
    /// The same from `base` on in a file that stands anywhere; `packed`: the stream will be, by zstd. Writes nothing.
    pub fn begin_at(base: u64, telling: &Telling, configuration: &str, packed: bool) -> io::Result<Draft> {
        let texts = serde_json::to_vec(telling)?.len() + configuration.len();
        Ok(Draft { base, stream: begins(texts), packed })
    }

    /// Where the stream goes.
    pub fn stream_at(&self) -> u64 {
        self.base + self.stream
    }

    /// Writes what comes before the stream into what cannot be gone back in. What is not known yet follows the stream
    /// ([`write_tail`]).
    pub fn announce(to: &mut impl Write, telling: &Telling, configuration: &str, packed: bool) -> io::Result<()> {
        let mut texts = serde_json::to_vec(telling)?;
        let told = texts.len();
        texts.extend_from_slice(configuration.as_bytes());
        let (stream, manner) = (begins(texts.len()), if packed { PACKED | TAILED } else { TAILED });
        let lengths = (told as u64, configuration.len() as u64, stream);
        let header = header(manner, lengths, Written { length: 0, sum: 0 }, &texts);
        texts.resize(usize::try_from(stream).map_err(io::Error::other)? - HEADER, 0);
        to.write_all(&header)?;
        to.write_all(&texts)
    }

    /// Leaves room for all that comes before the stream, in a file that is empty, and stands there. `telling` is the longest that
    /// may be told.
    pub fn begin(file: &mut impl Seek, telling: &Telling, configuration: &str) -> io::Result<Draft> {
        let draft = Draft::begin_at(0, telling, configuration, false)?;
        file.seek(SeekFrom::Start(draft.stream))?;
        Ok(draft)
    }

    /// Writes what comes before the stream, and has the whole file on disk. Before this it is no saved machine.
    pub fn finish(self, file: &File, telling: &Telling, configuration: &str, written: Written) -> io::Result<()> {
        let mut texts = serde_json::to_vec(telling)?;
        let told = texts.len() as u64;
        texts.extend_from_slice(configuration.as_bytes());
        if HEADER as u64 + texts.len() as u64 > self.stream {
            return Err(io::Error::other("more is told of the machine than there was room left for"));
        }
        let lengths = (told, configuration.len() as u64, self.stream);
        let header = header(if self.packed { PACKED } else { 0 }, lengths, written, &texts);
        file.write_all_at(&texts, self.base + HEADER as u64)?;
        file.sync_data()?;
        file.write_all_at(&header, self.base)?;
        file.sync_all()
    }
}

/// Where the stream begins behind that many bytes of texts.
fn begins(texts: usize) -> u64 {
    (HEADER as u64 + texts as u64).next_multiple_of(ALIGNMENT)
}

/// `lengths`: of the telling and the configuration, and where the stream begins.
fn header(manner: u32, lengths: (u64, u64, u64), written: Written, texts: &[u8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&manner.to_le_bytes());
    put(&mut header, 16, lengths.0);
    put(&mut header, 24, lengths.1);
    put(&mut header, 32, lengths.2);
    put(&mut header, 40, written.length);
    put(&mut header, 48, written.sum);
    let sum = sum_of(&header, texts);
    put(&mut header, SUM_AT, sum);
    header
}

/// Writes what follows the stream in what could not be gone back in: how the disks looked, then the end.
pub fn write_tail(to: &mut impl Write, disks: &[DiskLook], written: Written) -> io::Result<()> {
    let disks = serde_json::to_vec(disks)?;
    let mut end = [0; TAIL.1];
    end[..8].copy_from_slice(TAIL.0);
    put(&mut end, 8, disks.len() as u64);
    put(&mut end, 16, written.length);
    put(&mut end, 24, written.sum);
    let sum = sum_of(&end, &disks);
    put(&mut end, 32, sum);
    to.write_all(&disks)?;
    to.write_all(&end)
}

/// What a file of that length says at its end of the stream that begins there, and of disks.
fn read_tail(file: &File, stream: u64, length: u64) -> Result<(Written, Vec<DiskLook>), Unusable> {
    let unfinished = || wrong("it is cut off: its end is missing");
    let mut end = [0; TAIL.1];
    let at = length.checked_sub(end.len() as u64).filter(|at| *at >= stream).ok_or_else(unfinished)?;
    file.read_exact_at(&mut end, at)?;
    let (told, written) = (get(&end, 8), Written { length: get(&end, 16), sum: get(&end, 24) });
    let whole = stream.checked_add(written.length).and_then(|whole| whole.checked_add(told));
    if end[..8] != *TAIL.0 || told > MOST_TOLD || whole != Some(at) {
        return Err(unfinished());
    }
    let mut disks = vec![0; usize::try_from(told).map_err(io::Error::other)?];
    file.read_exact_at(&mut disks, at - told)?;
    let noted = get(&end, 32);
    put(&mut end, 32, 0);
    if sum_of(&end, &disks) != noted {
        return Err(wrong("its end has been changed"));
    }
    let disks = serde_json::from_slice(&disks);
    Ok((written, disks.map_err(|e| Unusable::Wrong(format!("what it tells of its disks cannot be read: {e}")))?))
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
    /// The same of what a client has given, which begins there.
    pub fn read_given(file: File, base: u64) -> Result<Saved, Unusable> {
        Ok(Saved { given: true, ..Saved::read_at(file, base)? })
    }

    /// Reads all that comes before the stream, and holds it to its checksum and the file's length.
    pub fn read(file: File) -> Result<Saved, Unusable> {
        Saved::read_at(file, 0)
    }

    fn read_at(file: File, base: u64) -> Result<Saved, Unusable> {
        let length = file.metadata()?.len().saturating_sub(base);
        let mut header = [0; HEADER];
        let begun = read_at_most(&file, base, &mut header)?;
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
        let manner = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
        if manner & !(PACKED | TAILED) != 0 {
            return Err(wrong("it was written in a way that this virtd does not know"));
        }
        let (told, configured, stream) = (get(&header, 16), get(&header, 24), get(&header, 32));
        let mut written = Written { length: get(&header, 40), sum: get(&header, 48) };
        let most = (MOST_TOLD, Limits::STORED.size as u64);
        if told > most.0 || configured > most.1 || stream < HEADER as u64 + told + configured {
            return Err(wrong("its header has been changed"));
        }
        let whole = stream.saturating_add(written.length);
        if length != whole && manner & TAILED == 0 {
            return Err(cut_off(length, whole));
        }
        let mut texts = vec![0; usize::try_from(told + configured).map_err(io::Error::other)?];
        if length < stream {
            return Err(cut_off(length, stream));
        }
        file.read_exact_at(&mut texts, base + HEADER as u64)?;
        let noted = get(&header, SUM_AT);
        put(&mut header, SUM_AT, 0);
        if sum_of(&header, &texts) != noted {
            return Err(wrong("its header or its configuration has been changed"));
        }
        let configuration = texts.split_off(usize::try_from(told).map_err(io::Error::other)?);
        let mut telling: Telling = serde_json::from_slice(&texts)
            .map_err(|e| Unusable::Wrong(format!("what it tells of the machine cannot be read: {e}")))?;
        let configuration = String::from_utf8(configuration).map_err(|_| wrong("its configuration is no text"))?;
        let stream = base + stream;
        if manner & TAILED != 0 {
            (written, telling.disks) = read_tail(&file, stream, base + length)?;
        }
        let (file, packed) = (ClosedAside::of(file), manner & PACKED != 0);
        Ok(Saved { telling, configuration, file, stream, written, packed, given: false })
    }

    /// How long the stream is, in bytes.
    pub fn length(&self) -> u64 {
        self.written.length
    }

    /// Whether its stream is packed by zstd.
    pub fn is_packed(&self) -> bool {
        self.packed
    }

    /// Whether a hypervisor may read the stream from the file itself.
    pub fn is_plain(&self) -> bool {
        !self.packed && !self.given
    }

    /// Moves the stream on to its end, and holds it to its checksum once more: it may have been changed since it was verified.
    /// `go_on` is asked as in [`pump`].
    pub fn pour<E: From<io::Error> + From<Unusable>>(
        &self,
        to: &mut impl Write,
        go_on: impl FnMut(u64) -> Result<(), E>,
    ) -> Result<(), E> {
        match pump(&mut Stream { saved: self, at: 0 }, to, go_on)? == self.written {
            true => Ok(()),
            false => Err(wrong("the memory in it has been changed").into()),
        }
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
        let draft = Draft { packed: self.packed, ..Draft::begin(&mut to, &self.telling, configuration)? };
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

fn sum_of(header: &[u8], texts: &[u8]) -> u64 {
    let mut hasher = XxHash64::with_seed(0);
    hasher.write(header);
    hasher.write(texts);
    hasher.finish()
}

fn put(header: &mut [u8], at: usize, number: u64) {
    header[at..at + 8].copy_from_slice(&number.to_le_bytes());
}

fn get(header: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&header[at..at + 8]);
    u64::from_le_bytes(bytes)
}

/// How many bytes there were of those that were wanted, from there on.
fn read_at_most(file: &File, base: u64, bytes: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < bytes.len() {
        match file.read_at(&mut bytes[got..], base + got as u64) {
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
