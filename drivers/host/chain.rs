//! What an image's header says of other files: its backing file, a file for its data, the format of what is below.
//!
//! It is read to be held against what a definition says, never to be followed. The header is read here, and not asked of
//! `qemu-img`, which would have to be run with rights over the file. Headers of raw images are not read: a guest writes them.

use super::resolve::Found;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

/// The longest name of a file there is in a header.
const MAX_NAME: u32 = 1023;
/// Extensions end, at the latest, with the first cluster; ours are looked for in so many bytes.
const MAX_HEADER: u64 = 1 << 16;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE: u32 = 0x4441_5441;
/// An incompatible feature of qcow2: its data is in another file.
const HAS_DATA_FILE: u64 = 1 << 2;
/// Features of qed: it has a backing file; which is raw.
const QED_BACKING: u64 = 1;
const QED_RAW: u64 = 4;
/// Of vmdk's text beside its data, at most so much is read.
const MAX_TEXT: u64 = 20 * 512;

/// What a header says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// What it names as its backing file, as it is written there.
    pub backing: Option<String>,
    /// The format of that, where the header says it.
    pub backing_format: Option<String>,
    /// This format has a place for that, and whoever reads an image without it guesses.
    pub tells_format: bool,
    /// A file with the image's own data; empty if it is named by nobody.
    pub data: Option<String>,
}

impl Header {
    /// Of the image at `path`; `None` if there is no such file, or nothing that can have a header. What is no image of that
    /// format says nothing. Blocks, where the file system does not answer without end.
    pub fn read(path: &Path, format: &str) -> io::Result<Option<Header>> {
        if !matches!(format, "qcow2" | "qcow" | "qed" | "vmdk") {
            return Ok(None);
        }
        let found = match Found::resolve(path) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
            found => found?,
        };
        let Some(file) = found.image()? else { return Ok(None) };
        Header::of(&file, format).map(Some)
    }

    /// The same of one that is open.
    pub fn of(file: &File, format: &str) -> io::Result<Header> {
        match format {
            "qed" => qed(file),
            "vmdk" => vmdk(file),
            "qcow" | "qcow2" => qcow(file),
            _ => Ok(Header::default()),
        }
    }
}

/// How images of a format begin: so many bytes in, one of these.
type Sign = (&'static str, u64, &'static [&'static [u8]]);

/// The longest of them, in bytes.
const LONGEST_SIGN: usize = 16;

const SIGNS: &[Sign] = &[
    ("qcow2", 0, &[b"QFI\xfb\0\0\0\x02", b"QFI\xfb\0\0\0\x03"]),
    ("qcow", 0, &[b"QFI\xfb\0\0\0\x01"]),
    ("qed", 0, &[b"QED\0"]),
    ("vdi", 64, &[b"\x7f\x10\xda\xbe"]),
    ("vhdx", 0, &[b"vhdxfile"]),
    ("parallels", 0, &[b"WithoutFreeSpace", b"WithouFreSpacExt"]),
    ("luks", 0, &[b"LUKS\xba\xbe"]),
    ("vmdk", 0, &[b"KDMV", b"COWD", b"# Disk Descripto"]),
    ("vpc", 0, &[b"conectix"]),
    ("iso", 0x8001, &[b"CD001"]),
];

/// Formats of which not all images begin so.
const UNSURE: &[&str] = &["vmdk", "vpc", "iso"];

/// The sign that all images of a format bear; there may be none.
fn sign_of(format: &str) -> Option<&'static Sign> {
    SIGNS.iter().find(|(name, ..)| *name == format && !UNSURE.contains(name))
}

/// Whether what is at `path` bears the sign of a format's images; a format without one, and what is neither a plain file nor
/// a block device, may be anything. Blocks, where the file system does not answer without end.
pub fn bears_sign_of(path: &Path, format: &str) -> io::Result<bool> {
    if sign_of(format).is_none() {
        return Ok(true);
    }
    let Some(file) = Found::resolve(path)?.image()? else { return Ok(true) };
    is_of_format(&file, format)
}

/// The same of an image that is open.
pub fn is_of_format(file: &File, format: &str) -> io::Result<bool> {
    sign_of(format).map_or(Ok(true), |sign| bears(file, sign))
}

/// The format of an image by its sign, if it has one.
pub fn format_of(file: &File) -> io::Result<Option<&'static str>> {
    // Nearly all signs are in what is read at once.
    let mut begins = [0u8; 128];
    let read = read_some(file, &mut begins, 0)?;
    for sign in SIGNS {
        let at = usize::try_from(sign.1).unwrap_or(usize::MAX);
        let bears = match at.saturating_add(LONGEST_SIGN) <= begins.len() {
            true => begins[..read].get(at..).is_some_and(|rest| is_begun_by(rest, sign)),
            false => bears(file, sign)?,
        };
        if bears {
            return Ok(Some(sign.0));
        }
    }
    Ok(None)
}

fn bears(file: &File, sign: &Sign) -> io::Result<bool> {
    let mut begins = [0u8; LONGEST_SIGN];
    let read = read_some(file, &mut begins, sign.1)?;
    Ok(is_begun_by(&begins[..read], sign))
}

fn is_begun_by(bytes: &[u8], (.., signs): &Sign) -> bool {
    signs.iter().any(|sign| bytes.starts_with(sign))
}

/// What a guest sees of the image at `path`, in bytes, where its header says that; `None` for what is no such image. Blocks, where
/// the file system does not answer without end.
pub fn virtual_size(path: &Path, format: &str) -> io::Result<Option<u64>> {
    if format != "qcow2" {
        return Ok(None);
    }
    let Some(file) = Found::resolve(path)?.image()? else { return Ok(None) };
    let mut fixed = [0u8; 32];
    let whole = read_some(&file, &mut fixed, 0)? == fixed.len() && fixed.starts_with(b"QFI\xfb");
    Ok(whole.then(|| be64(&fixed, 24)))
}

/// Of the qcow family. The first version says no formats.
fn qcow(file: &File) -> io::Result<Header> {
    let mut fixed = [0u8; 104];
    if read_some(file, &mut fixed, 0)? < 48 || !fixed.starts_with(b"QFI\xfb") {
        return Ok(Header::default());
    }
    let version = be32(&fixed, 4);
    let (offset, length) = (be64(&fixed, 8), be32(&fixed, 16));
    let backing = if offset == 0 { None } else { Some(name(file, offset, length)?) };
    let mut header = Header { backing, tells_format: version > 1, ..Header::default() };
    if version > 1 {
        let first = if version == 2 { 72 } else { u64::from(be32(&fixed, 100)) };
        extensions(file, first, &mut header)?;
    }
    if version > 2 && be64(&fixed, 72) & HAS_DATA_FILE != 0 {
        header.data.get_or_insert_default();
    }
    Ok(header)
}

/// What follows the fixed part of a qcow2 header.
fn extensions(file: &File, mut at: u64, header: &mut Header) -> io::Result<()> {
    while at < MAX_HEADER {
        let mut extension = [0u8; 8];
        if read_some(file, &mut extension, at)? < 8 {
            return Ok(());
        }
        let (kind, length) = (be32(&extension, 0), be32(&extension, 4));
        match kind {
            0 => return Ok(()),
            BACKING_FORMAT => header.backing_format = Some(name(file, at + 8, length)?),
            DATA_FILE => header.data = Some(name(file, at + 8, length)?),
            _ => {}
        }
        at += 8 + u64::from(length).next_multiple_of(8);
    }
    Ok(())
}

/// It says no format but raw.
fn qed(file: &File) -> io::Result<Header> {
    let mut fixed = [0u8; 64];
    if read_some(file, &mut fixed, 0)? < 64 || !fixed.starts_with(b"QED\0") || le64(&fixed, 16) & QED_BACKING == 0 {
        return Ok(Header::default());
    }
    let raw = le64(&fixed, 16) & QED_RAW != 0;
    Ok(Header {
        backing: Some(name(file, le32(&fixed, 56).into(), le32(&fixed, 60))?),
        backing_format: raw.then(|| "raw".to_owned()),
        ..Header::default()
    })
}

/// Of one file that holds its own data; what is a text that names files has its data elsewhere.
fn vmdk(file: &File) -> io::Result<Header> {
    let mut fixed = [0u8; 64];
    let elsewhere = Header { data: Some(String::new()), ..Header::default() };
    if read_some(file, &mut fixed, 0)? < 64 {
        return Ok(elsewhere);
    }
    match &fixed[..4] {
        b"COWD" => Ok(Header::default()),
        b"KDMV" if le64(&fixed, 12) == 0 => Ok(elsewhere),
        b"KDMV" => {
            let (at, length) = (le64(&fixed, 28).saturating_mul(512), le64(&fixed, 36).saturating_mul(512));
            let mut text = vec![0; usize::try_from(length.min(MAX_TEXT)).unwrap_or_default()];
            let read = if at == 0 { 0 } else { read_some(file, &mut text, at)? };
            let text = String::from_utf8_lossy(&text[..read]);
            let parent = text.split_once("parentFileNameHint=\"").and_then(|(_, rest)| rest.split_once('"'));
            Ok(Header { backing: parent.map(|(name, _)| plain_text(name)).transpose()?, ..Header::default() })
        }
        _ => Ok(elsewhere),
    }
}

/// Where a name from a header leads, as QEMU would read it; `None` for what is no local file (`json:…`, `nbd:…`).
pub fn place(name: &str, image: &Path) -> Option<PathBuf> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let scheme = name.split_once(':').is_some_and(|(scheme, _)| !scheme.contains('/'));
    (!name.is_empty() && !scheme).then(|| image.parent().unwrap_or(Path::new("/")).join(name))
}

/// Whether two paths are one, whatever is there: neither is looked at.
pub fn is_same_path(one: &Path, other: &Path) -> bool {
    plain(one) == plain(other)
}

/// Without `.` and, as far as that can be told from the text, `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir if plain.file_name().is_some() => _ = plain.pop(),
            part => plain.push(part),
        }
    }
    plain
}

fn name(file: &File, at: u64, length: u32) -> io::Result<String> {
    if length > MAX_NAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its header names a file by more than 1023 bytes"));
    }
    let mut name = vec![0u8; length as usize];
    let read = read_some(file, &mut name, at)?;
    plain_text(String::from_utf8_lossy(&name[..read]).trim_end_matches('\0'))
}

/// A name as it is, if people can read it: QEMU would end it at the first zero, and nobody could be shown it.
fn plain_text(name: &str) -> io::Result<String> {
    match name.chars().any(char::is_control) {
        true => Err(io::Error::new(io::ErrorKind::InvalidData, "its header names a file with control characters")),
        false => Ok(name.to_owned()),
    }
}

/// Reads as much as there is.
pub fn read_some(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read_at(&mut buffer[read..], at.saturating_add(read as u64)) {
            Ok(0) => break,
            Ok(count) => read += count,
            // Beyond what a file can have: there is nothing.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break,
            Err(e) => return Err(e),
        }
    }
    Ok(read)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    be32(bytes, at).swap_bytes()
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at + 4)) << 32 | u64::from(le32(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn qemu_img(dir: &Path, args: &[&str]) -> bool {
        match Command::new("qemu-img").args(args).current_dir(dir).output() {
            Ok(output) => {
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                true
            }
            Err(_) => {
                eprintln!("SKIPPED: qemu-img is not installed");
                false
            }
        }
    }

    fn of(path: &Path, format: &str) -> Header {
        Header::read(path, format).unwrap().unwrap()
    }

    #[test]
    fn a_header_tells_backing_file_format_and_data_file() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        if !qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "base", "1M"]) {
            return;
        }
        let overlay = |format: &str, base_format: &str, name: &str| {
            let options = ["create", "-q", "-f", format, "-b", "base", "-F", base_format, name];
            qemu_img(dir.path(), &options);
            of(&at(name), format)
        };
        let told = Header { tells_format: true, ..Header::default() };
        assert_eq!(of(&at("base"), "qcow2"), told);
        let (backing, format) = (Some("base".to_owned()), Some("qcow2".to_owned()));
        let on_base = Header { backing: backing.clone(), backing_format: format, ..told.clone() };
        assert_eq!(overlay("qcow2", "qcow2", "top"), on_base);
        qemu_img(dir.path(), &["amend", "-f", "qcow2", "-o", "compat=0.10", "top"]);
        assert_eq!(of(&at("top"), "qcow2"), on_base, "of the second version, too");
        assert_eq!(overlay("qed", "raw", "qed").backing_format.as_deref(), Some("raw"));
        assert_eq!(overlay("qed", "qcow2", "qed2"), Header { backing: backing.clone(), ..Header::default() });
        assert_eq!(overlay("qcow", "qcow2", "old"), Header { backing, ..Header::default() });
        qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", "data_file=data", "split", "1M"]);
        assert_eq!(of(&at("split"), "qcow2"), Header { data: Some("data".to_owned()), ..told });
    }

    #[test]
    fn a_vmdk_tells_its_parent_and_whether_its_data_is_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        if !qemu_img(dir.path(), &["create", "-q", "-f", "vmdk", "whole", "1M"]) {
            return;
        }
        assert_eq!(of(&at("whole"), "vmdk"), Header::default());
        qemu_img(dir.path(), &["create", "-q", "-f", "vmdk", "-b", "whole", "-F", "vmdk", "top"]);
        assert_eq!(of(&at("top"), "vmdk").backing.as_deref(), Some("whole"));
        qemu_img(dir.path(), &["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "flat", "1M"]);
        assert_eq!(of(&at("flat"), "vmdk").data.as_deref(), Some(""));
    }

    #[test]
    fn what_is_no_image_names_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        for bytes in [&b""[..], b"QFI", &[0; 512]] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(of(&path, "qcow2"), Header::default());
        }
        std::fs::write(&path, [b"QFI\xfb".as_slice(), &[0xff; 4096]].concat()).unwrap();
        assert!(Header::read(&path, "qcow2").is_err());
        let mut zero = [0u8; 128];
        zero[..8].copy_from_slice(b"QFI\xfb\0\0\0\x02");
        (zero[15], zero[19]) = (104, 3);
        zero[104..107].copy_from_slice(b"a\0b");
        std::fs::write(&path, zero).unwrap();
        assert!(Header::read(&path, "qcow2").unwrap_err().to_string().contains("control characters"));
        assert_eq!(Header::read(&path, "raw").unwrap(), None, "the header of a raw disk is the guest's");
        assert_eq!(Header::read(dir.path(), "qcow2").unwrap(), None);
        assert_eq!(Header::read(&dir.path().join("none"), "qcow2").unwrap(), None);
    }

    #[test]
    fn a_pipe_in_an_images_place_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert_eq!(Header::read(&path, "qcow2").unwrap(), None);
    }

    #[test]
    fn only_local_files_have_a_place() {
        let image = Path::new("/images/top.qcow2");
        assert_eq!(place("base.img", image), Some("/images/base.img".into()));
        assert_eq!(place("/other/a:b.img", image), Some("/other/a:b.img".into()));
        assert_eq!(place("file:../x", image), Some("/images/../x".into()));
        for name in ["nbd://host/export", "json:{\"driver\":\"nbd\"}", ""] {
            assert_eq!(place(name, image), None);
        }
        assert!(is_same_path(Path::new("/images/../x"), Path::new("/x")));
        assert!(is_same_path(Path::new("/images/./a//b"), Path::new("/images/a/b")));
        assert!(!is_same_path(Path::new("/images/x"), Path::new("/x")));
    }
}
