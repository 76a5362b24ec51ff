//! What a volume holds: laid out, copied, overwritten. What needs to understand a format is done by `qemu-img`, which has no rights
//! of ours and finds the file without a name; all else is done here.

use super::draft::{Draft, give};
use super::folder::{Beneath, PoolFolder};
use super::look;
use crate::host::apart::apart;
use crate::host::chain::format_of;
use crate::host::given::next_data;
use crate::host::image::{Images, TOOL_OUTPUT, named};
use crate::host::workers::Stop;
use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom, copy_file_range, fallocate, ioctl_ficlone, openat, seek};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use virt_model::driver::DriverError;
use virt_model::driver::storage::{Content, NewSize, NewVolume, Preallocation, Reflink, Wiping, Work};

/// So much is moved between two looks at whether it is still wanted.
const PIECE: usize = 1 << 20;
/// So much the kernel copies between them.
const SPAN: u64 = 64 << 20;
/// How often a tool may fail at what it fails at by chance.
const TRIES: usize = 4;
/// What it says then: it measures how long a key takes, and cannot on some hosts.
const BY_CHANCE: &str = "Unable to get accurate CPU usage";

/// Tells how far it is, and whether it is still wanted.
pub struct Pace<'a> {
    work: &'a Arc<dyn Work>,
    stop: &'a Arc<Stop>,
}

impl<'a> Pace<'a> {
    /// Of work within an errand.
    pub fn new(work: &'a Arc<dyn Work>, stop: &'a Arc<Stop>) -> Pace<'a> {
        Pace { work, stop }
    }

    fn at(&self, done: u64, total: u64) -> io::Result<()> {
        self.stop.check().map_err(io::Error::other)?;
        self.work.progress(done, total);
        Ok(())
    }
}

/// Refuses what cannot be made.
pub fn check(new: &NewVolume) -> Result<(), DriverError> {
    let refuse = |text: String| Err(DriverError::Argument(text));
    let name = &new.name;
    match (&*new.format, &new.content) {
        ("raw", Content::Overlay { .. }) => return refuse(format!("'{name}': a raw volume stands on nothing")),
        ("luks", Content::Overlay { .. }) => return refuse(format!("'{name}': an encrypted volume stands on nothing")),
        ("raw" | "qcow2" | "luks", _) => {}
        // It is not made here, and stays what it is.
        (_, Content::Given(_) | Content::Copy { .. }) => {}
        (format, _) => {
            return Err(DriverError::Unsupported(format!(
                "'{name}': volumes of format '{format}' are not made: raw, qcow2, luks"
            )));
        }
    }
    let makes_luks = new.format == "luks" && !matches!(new.content, Content::Given(_) | Content::Copy { .. });
    if makes_luks && new.secret.is_none() {
        return refuse(format!("'{name}' is to be encrypted: say with which secret"));
    }
    if new.format == "raw" && new.secret.is_some() {
        return refuse(format!("'{name}' is raw, and cannot be encrypted: format luks can"));
    }
    if new.format != "qcow2" && new.qcow2 != Default::default() {
        return refuse(format!("'{name}': compat, cluster size and features are those of qcow2"));
    }
    match new.preallocation {
        Preallocation::Metadata if new.format != "qcow2" => {
            refuse(format!("'{name}': only qcow2 has metadata to lay out"))
        }
        Preallocation::Off => Ok(()),
        _ if !matches!(new.content, Content::Empty | Content::Converted { .. }) => {
            refuse(format!("'{name}': only an empty volume is laid out at once"))
        }
        _ if new.allocation > 0 => refuse(format!("'{name}': say either how much is allocated, or preallocate")),
        _ => Ok(()),
    }?;
    match new.allocation > 0 && (new.format != "raw" || !matches!(new.content, Content::Empty)) {
        true => refuse(format!("'{name}': only of an empty raw volume a part is allocated")),
        false => Ok(()),
    }
}

/// Whether the tool makes it.
pub fn by_tool(new: &NewVolume) -> bool {
    match new.content {
        Content::Empty => new.format != "raw",
        Content::Overlay { .. } | Content::Converted { .. } => true,
        Content::Given(_) | Content::Copy { .. } => false,
    }
}

/// Makes what is in a draft by the tool, to which it belongs meanwhile. Blocks.
pub fn with_tool(draft: &Draft, new: &NewVolume, secret: Option<&[u8]>, images: &Images) -> Result<(), DriverError> {
    let lends = match &new.content {
        Content::Converted { chain } => chain.iter().map(|(path, _)| (path.clone(), false)).collect(),
        _ => Vec::new(),
    };
    let _lent = if lends.is_empty() { None } else { Some(images.lend(&lends)?) };
    let file = draft.file().get().map_err(|e| DriverError::Storage(e.to_string()))?;
    if let Some(user) = images.lender.user() {
        give(file, Some(user.uid), Some(user.gid)).map_err(|e| DriverError::Storage(format!("'{}': {e}", new.name)))?;
    }
    let mut tries = 0;
    loop {
        tries += 1;
        match images.make(&new.name, file, arguments(new), secret) {
            Err(DriverError::Storage(text)) if tries < TRIES && text.contains(BY_CHANCE) => {}
            made => return made,
        }
    }
}

/// What the tool is told; its output is the volume.
fn arguments(new: &NewVolume) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    let mut say = |words: &[&str]| arguments.extend(words.iter().map(OsString::from));
    let options = options(new);
    let secret: &[&str] = match new.secret {
        Some(_) => &["--object", "secret,id=key,format=raw,file=/dev/stdin"],
        None => &[],
    };
    let options: Vec<&str> = if options.is_empty() { Vec::new() } else { vec!["-o", &options] };
    match &new.content {
        Content::Converted { chain } => {
            say(&["convert", "-q"]);
            say(secret);
            say(&["-O", &new.format]);
            say(&options);
            arguments.push(named(chain));
            arguments.push(TOOL_OUTPUT.into());
        }
        content => {
            say(&["create", "-q"]);
            say(secret);
            say(&["-f", &new.format]);
            say(&options);
            if let Content::Overlay { base, format } = content {
                say(&["-u", "-F", format, "-b"]);
                arguments.push(base.into());
            }
            arguments.extend([TOOL_OUTPUT.into(), new.capacity.to_string().into()]);
        }
    }
    arguments
}

/// Options of its format.
fn options(new: &NewVolume) -> String {
    let mut options: Vec<String> = Vec::new();
    let wanted = &new.qcow2;
    options.extend(wanted.compat.as_ref().map(|version| format!("compat={version}")));
    options.extend(wanted.cluster_size.map(|bytes| format!("cluster_size={bytes}")));
    let flags = [("lazy_refcounts", wanted.lazy_refcounts), ("extended_l2", wanted.extended_l2)];
    options.extend(flags.iter().filter(|(_, on)| *on).map(|(name, _)| format!("{name}=on")));
    if new.preallocation != Preallocation::Off && new.format != "raw" {
        options.push(format!("preallocation={}", new.preallocation));
    }
    match &*new.format {
        "luks" => options.push("key-secret=key".to_owned()),
        "qcow2" if new.secret.is_some() => options.push("encrypt.format=luks,encrypt.key-secret=key".to_owned()),
        _ => {}
    }
    options.join(",")
}

/// Makes what is in a draft without a tool. Blocks.
pub fn plainly(draft: &Draft, new: &NewVolume, pace: &Pace) -> io::Result<()> {
    let file = draft.file().get()?;
    match &new.content {
        Content::Copy { from, reflink } => copy(from, file, *reflink, pace),
        _ => lay_out(file, new, pace),
    }
}

/// Makes an empty raw volume.
fn lay_out(file: &File, new: &NewVolume, pace: &Pace) -> io::Result<()> {
    file.set_len(new.capacity)?;
    match new.preallocation {
        Preallocation::Full => overwrite(file, 0..new.capacity, &mut io::repeat(0), pace),
        Preallocation::Falloc => allocate(file, 0, new.capacity, pace),
        Preallocation::Off | Preallocation::Metadata => allocate(file, 0, new.allocation.min(new.capacity), pace),
    }
}

/// Takes blocks for a part of a file, which stays as it is.
fn allocate(file: &File, from: u64, to: u64, pace: &Pace) -> io::Result<()> {
    let mut at = from;
    while at < to {
        pace.at(at - from, to - from)?;
        let length = (to - at).min(SPAN * 16);
        fallocate(file, FallocateFlags::KEEP_SIZE, at, length)?;
        at += length;
    }
    Ok(())
}

/// Overwrites a part of a file with what is read.
fn overwrite(file: &File, part: Range<u64>, with: &mut impl Read, pace: &Pace) -> io::Result<()> {
    let (mut piece, mut at, length) = (vec![0; PIECE], part.start, part.end - part.start);
    while at < part.end {
        pace.at(at - part.start, length)?;
        let count = (part.end - at).min(PIECE as u64) as usize;
        with.read_exact(&mut piece[..count])?;
        file.write_all_at(&piece[..count], at)?;
        at += count as u64;
    }
    pace.at(length, length)
}

/// Whether files in a folder can share blocks: its file system is asked with two that hold nothing and have no names. Blocks.
pub fn shares_blocks(folder: &PoolFolder) -> bool {
    let file = || {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        apart(openat(folder, ".", flags, Mode::RUSR | Mode::WUSR)?)
    };
    file().and_then(|one| Ok(ioctl_ficlone(file()?, one)?)).is_ok()
}

/// How long a file is, or a block device.
pub fn length_of(file: &impl AsFd) -> io::Result<u64> {
    Ok(seek(file, SeekFrom::End(0))?)
}

/// Has nothing in a part of a block device, whatever was there: the kernel does that as fast as the device can. Blocks.
pub fn blank(device: &File, from: u64, to: u64, pace: &Pace) -> io::Result<()> {
    // No device has larger blocks.
    const BLOCK: u64 = 4096;
    let begins = from.next_multiple_of(BLOCK).min(to);
    device.write_all_at(&vec![0; begins.saturating_sub(from) as usize], from)?;
    let mut at = begins;
    while at < to {
        pace.at(at - from, to - from)?;
        let count = (to - at).min(SPAN);
        fallocate(device, FallocateFlags::ZERO_RANGE, at, count)?;
        at += count;
    }
    Ok(())
}

/// Has a part of a block device hold what a file does, and nothing behind that. Blocks.
pub fn copy_into(from: &impl AsFd, device: &File, part: Range<u64>, pace: &Pace) -> io::Result<()> {
    let (length, room) = (length_of(from)?, part.end - part.start);
    if length > room {
        let text = format!("what is copied has {length} bytes by now, and {room} are there for it");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    overwrite(device, part.start..part.start + length, &mut ReadAt { from, at: 0 }, pace)?;
    blank(device, part.start + length, part.end, pace)?;
    device.sync_all()
}

/// Reads a file from its beginning, wherever somebody else reads it.
struct ReadAt<'a, T> {
    from: &'a T,
    at: u64,
}

impl<T: AsFd> Read for ReadAt<'_, T> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = rustix::io::pread(self.from, into, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// Copies a file: its holes stay holes.
fn copy(from: &impl AsFd, to: &File, reflink: Reflink, pace: &Pace) -> io::Result<()> {
    if reflink != Reflink::Never {
        match ioctl_ficlone(to, from) {
            Ok(()) => return Ok(()),
            Err(e) if reflink == Reflink::Always => return Err(e.into()),
            Err(_) => {}
        }
    }
    let length = length_of(from)?;
    to.set_len(length)?;
    let mut at = 0;
    while let Some((begin, end)) = next_data(from, at, length)? {
        at = begin;
        while at < end {
            pace.at(at, length)?;
            let count = copy_some(from, to, at, (end - at).min(SPAN), reflink)?;
            if count == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "what is copied became shorter meanwhile"));
            }
            at += count;
        }
    }
    pace.at(length, length)
}

/// Copies some of it; how much. The kernel may share blocks where it copies itself.
fn copy_some(from: &impl AsFd, to: &File, at: u64, length: u64, reflink: Reflink) -> io::Result<u64> {
    let length = usize::try_from(length).unwrap_or(PIECE);
    if reflink != Reflink::Never {
        let (mut here, mut there) = (at, at);
        match copy_file_range(from, Some(&mut here), to, Some(&mut there), length) {
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
            copied => return Ok(copied? as u64),
        }
    }
    let mut piece = vec![0; length.min(PIECE)];
    let count = rustix::io::pread(from, &mut piece, at)?;
    to.write_all_at(&piece[..count], at)?;
    Ok(count as u64)
}

/// Judges what a client gave: it is of the format that it is to be of. A raw one becomes as long as it is wanted. Returns what a
/// guest sees of it, in bytes. Blocks.
pub fn accept(draft: &Draft, format: &str, length: u64, capacity: u64) -> Result<u64, DriverError> {
    let storage = |e: io::Error| DriverError::Storage(e.to_string());
    let file = draft.file().get().map_err(storage)?;
    if format == "raw" {
        if capacity > length {
            file.set_len(capacity).map_err(storage)?;
        }
        return Ok(capacity.max(length));
    }
    match format_of(file).map_err(storage)? {
        Some(begins) if begins == format => look::capacity(file, format, length).map_err(storage),
        _ => Err(DriverError::Argument(format!("what was given does not begin as an image of format '{format}' does"))),
    }
}

/// Gives a raw volume another size. Blocks.
pub fn resize(file: &Beneath, to: NewSize, pace: &Pace) -> io::Result<()> {
    let file = file.to_write()?;
    let file = file.get()?;
    // Whoever copies a file takes no lock: it may have grown since it was looked at.
    let length = file.metadata()?.len();
    if to.capacity < length && !to.shrink {
        let text = format!("it has {length} bytes by now, and would lose what is behind; say shrink");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    if to.allocate && to.capacity > length {
        // First what can fail, so that it is as before then.
        allocate(file, length, to.capacity, pace).inspect_err(|_| _ = file.set_len(length))?;
    }
    // Not if it has been cancelled meanwhile.
    pace.at(length, to.capacity.max(length))?;
    file.set_len(to.capacity)?;
    file.sync_all()
}

/// Overwrites all of a volume of that length. Blocks.
pub fn wipe(file: &File, length: u64, how: Wiping, pace: &Pace) -> io::Result<()> {
    match how {
        Wiping::Zero => overwrite(file, 0..length, &mut io::repeat(0), pace)?,
        Wiping::Random => overwrite(file, 0..length, &mut random()?, pace)?,
        Wiping::Discard => discard(file, length, pace)?,
    }
    file.sync_all()
}

/// Gives back all blocks of a file, which stays as long as it is.
fn discard(file: &File, length: u64, pace: &Pace) -> io::Result<()> {
    let mut at = 0;
    while at < length {
        pace.at(at, length)?;
        let count = (length - at).min(SPAN * 16);
        fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, count)?;
        at += count;
    }
    pace.at(length, length)
}

#[allow(clippy::disallowed_methods, reason = "the kernel's own")]
fn random() -> io::Result<File> {
    File::open("/dev/urandom")
}
