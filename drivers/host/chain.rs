//! The files behind an image: what a qcow2 header names as backing file and as external data file.
//!
//! The header is read here, and not asked of `qemu-img`, which would have to be run with rights over the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 4] = b"QFI\xfb";
/// The longest backing file name there is.
const MAX_NAME: u32 = 1023;
/// Extensions end, at the latest, with the first cluster, which has at least 512 bytes; ours are looked for in so many.
const MAX_HEADER: u64 = 1 << 16;
const DATA_FILE: u32 = 0x4441_5441;

/// A file that an image's header names.
#[derive(Debug, PartialEq, Eq)]
pub struct Behind {
    /// Where it is.
    pub path: PathBuf,
    /// It holds the image's own data, else it is what the image stands on.
    pub data: bool,
}

/// The files that the image names, whose own path (as QEMU is told it) is `image`. Not an image, none.
pub fn behind(file: &File, image: &Path) -> io::Result<Vec<Behind>> {
    let mut header = [0u8; 104];
    if read_some(file, &mut header, 0)? < 72 || !header.starts_with(MAGIC) {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let (offset, length) = (u64_at(&header, 8), u32_at(&header, 16));
    if offset != 0 && length <= MAX_NAME {
        let mut name = vec![0u8; length as usize];
        file.read_exact_at(&mut name, offset)?;
        found.extend(place(&name, image).map(|path| Behind { path, data: false }));
    }
    if let Some(name) = data_file(file, &header)? {
        found.extend(place(&name, image).map(|path| Behind { path, data: true }));
    }
    Ok(found)
}

/// The name in the extension for an external data file.
fn data_file(file: &File, header: &[u8; 104]) -> io::Result<Option<Vec<u8>>> {
    if u32_at(header, 4) < 3 {
        return Ok(None);
    }
    let mut at = u64::from(u32_at(header, 100));
    while at < MAX_HEADER {
        let mut extension = [0u8; 8];
        if read_some(file, &mut extension, at)? < 8 {
            return Ok(None);
        }
        let (kind, length) = (u32_at(&extension, 0), u32_at(&extension, 4));
        match kind {
            0 => return Ok(None),
            DATA_FILE if length <= MAX_NAME => {
                let mut name = vec![0u8; length as usize];
                file.read_exact_at(&mut name, at + 8)?;
                return Ok(Some(name));
            }
            _ => at += 8 + u64::from(length).next_multiple_of(8),
        }
    }
    Ok(None)
}

/// A name from a header as a path; `None` for what is no local file (`json:…`, `nbd:…`).
fn place(name: &[u8], image: &Path) -> Option<PathBuf> {
    let name = std::str::from_utf8(name).ok()?.trim_end_matches('\0');
    let name = name.strip_prefix("file:").unwrap_or(name);
    let scheme = name.split_once(':').is_some_and(|(scheme, _)| !scheme.contains('/'));
    (!name.is_empty() && !scheme).then(|| image.parent().unwrap_or(Path::new("/")).join(name))
}

fn read_some(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read_at(&mut buffer[read..], at + read as u64)? {
            0 => break,
            count => read += count,
        }
    }
    Ok(read)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
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

    fn of(path: &Path) -> Vec<Behind> {
        behind(&File::open(path).unwrap(), path).unwrap()
    }

    #[test]
    fn names_backing_and_data_files() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        if !qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "base.qcow2", "1M"]) {
            return;
        }
        qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
        qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "split.qcow2", "1M"]);
        assert_eq!(of(&at("base.qcow2")), []);
        assert_eq!(of(&at("top.qcow2")), [Behind { path: at("base.qcow2"), data: false }]);
        assert_eq!(of(&at("split.qcow2")), [Behind { path: at("data.raw"), data: true }]);
    }

    #[test]
    fn what_is_no_image_names_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let endless = [MAGIC.as_slice(), &[0xff; 4096]].concat();
        for bytes in [&b""[..], b"QFI", &[0; 512], &endless] {
            let path = dir.path().join("image");
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(of(&path), []);
        }
    }

    #[test]
    fn only_local_files_count() {
        let image = Path::new("/images/top.qcow2");
        assert_eq!(place(b"base.img", image), Some("/images/base.img".into()));
        assert_eq!(place(b"/other/a:b.img", image), Some("/other/a:b.img".into()));
        assert_eq!(place(b"file:../x", image), Some("/images/../x".into()));
        for name in [&b"nbd://host/export"[..], b"json:{\"driver\":\"nbd\"}", b"", b"\xff"] {
            assert_eq!(place(name, image), None);
        }
    }
}
