//! What a volume is: by what is known of it, and else by how it begins. Of a header so much is read as says how large the image is
//! and what it stands on; what it names is never opened.

use super::folder::{Beneath, PoolFolder};
use crate::host::chain::{self, Header, format_of, read_some};
use std::fs::File;
use std::io;
use std::path::Path;
use virt_model::driver::storage::{BackingLook, KnownFormats, Survey, VolumeLook};

/// All volumes, and how much room there is.
pub fn survey(folder: &PoolFolder, path: &Path, known: &KnownFormats) -> io::Result<Survey> {
    let (names, unnameable) = folder.names()?;
    let looks = names.iter().filter_map(|name| volume(folder, name, path, known).transpose());
    Ok(Survey { volumes: looks.collect::<io::Result<_>>()?, unnameable, room: folder.room()? })
}

/// The volume of that name, if there is one; `path` is the pool's.
pub fn volume(folder: &PoolFolder, name: &str, path: &Path, known: &KnownFormats) -> io::Result<Option<VolumeLook>> {
    let Some(file) = folder.beneath(name)? else { return Ok(None) };
    Ok(Some(of(&file, name, path, known.get(&file.id()).map(|format| &**format))))
}

/// One that has just been made, in a format that is known.
pub fn made(folder: &PoolFolder, name: &str, path: &Path, format: &str) -> io::Result<VolumeLook> {
    let gone = || io::Error::new(io::ErrorKind::NotFound, "somebody removed it as soon as it was made");
    let file = folder.beneath(name)?.ok_or_else(gone)?;
    Ok(of(&file, name, path, Some(format)))
}

fn of(file: &Beneath, name: &str, path: &Path, known: Option<&str>) -> VolumeLook {
    let stat = file.stat();
    let mut look = VolumeLook {
        name: name.to_owned(),
        id: file.id(),
        format: known.unwrap_or("raw").to_owned(),
        capacity: file.length(),
        allocation: stat.st_blocks.unsigned_abs() * 512,
        physical: file.length(),
        permissions: file.permissions(),
        ..VolumeLook::default()
    };
    // What is known to be raw has no header: its guest writes what is there.
    if known != Some("raw") {
        // It is closed here: whoever looks may wait.
        let told = file.to_hold().and_then(|file| header(&File::from(file), known, &path.join(name), &mut look));
        look.broken = told.err().map(|e| format!("its header cannot be read: {e}"));
    }
    look
}

/// Reads what its header says.
fn header(file: &File, known: Option<&str>, path: &Path, look: &mut VolumeLook) -> io::Result<()> {
    let begins = format_of(file)?;
    let format = known.or(begins).unwrap_or("raw");
    format.clone_into(&mut look.format);
    if begins != Some(format) && !chain::is_of_format(file, format)? {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it does not begin as {format} does")));
    }
    look.capacity = capacity(file, format, look.physical)?;
    look.encrypted = format == "luks" || format == "qcow2" && be32(file, 32)? != 0;
    look.snapshots = if format == "qcow2" { be32(file, 60)? } else { 0 };
    let header = Header::of(file, format)?;
    look.has_data_file = header.data.is_some();
    look.backing = header.backing.map(|text| BackingLook {
        place: chain::place(&text, path),
        format: header.backing_format,
        text,
    });
    Ok(())
}

/// What a guest sees of it, in bytes; its length, where its header does not say it.
pub fn capacity(file: &File, format: &str, length: u64) -> io::Result<u64> {
    Ok(match format {
        "qcow2" | "qcow" => be64(file, 24)?,
        "qed" => le64(file, 48)?,
        "vdi" => le64(file, 0x170)?,
        "vpc" => be64(file, 48)?,
        "vmdk" if format_begins(file, b"KDMV")? => le64(file, 12)?.saturating_mul(512),
        // The first version says where its payload begins in sectors; the second says it in a text.
        "luks" if be32(file, 4)? & 0xffff == 1 => length.saturating_sub(u64::from(be32(file, 104)?) * 512),
        _ => length,
    })
}

fn format_begins(file: &File, sign: &[u8; 4]) -> io::Result<bool> {
    let mut begins = [0u8; 4];
    Ok(read_some(file, &mut begins, 0)? == 4 && begins == *sign)
}

fn be32(file: &File, at: u64) -> io::Result<u32> {
    Ok((be64(file, at)? >> 32) as u32)
}

/// Zeroes stay where there is nothing.
fn be64(file: &File, at: u64) -> io::Result<u64> {
    let mut bytes = [0u8; 8];
    read_some(file, &mut bytes, at)?;
    Ok(u64::from_be_bytes(bytes))
}

fn le64(file: &File, at: u64) -> io::Result<u64> {
    be64(file, at).map(u64::swap_bytes)
}
