//! How a file of a disk looked, so that one that has become another since is recognised: its number in its file system, its
//! length, and where it has been written since, some of its content. A mere `touch` changes nothing of that.
//!
//! Not all of it is read: the first two mebibytes, in which an image's own tables and a disk's partitions and superblocks
//! begin, and some pieces all over the rest. What is written between those alone goes unnoticed.

use super::resolve::Found;
use rustix::fs::FileType;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::hash::Hasher;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use twox_hash::XxHash64;

/// Bytes at the beginning that are looked at.
const HEAD: u64 = 2 << 20;
/// Pieces of the rest.
const PIECES: u64 = 64;
/// Bytes of each.
const PIECE: usize = 16 << 10;

/// How a file looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// Its number in its file system; of a device, 0.
    pub inode: u64,
    /// Its length in bytes.
    pub length: u64,
    /// A checksum (XXH64) of what was looked at of its content.
    pub sample: u64,
}

/// What is different about a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is not there.
    Gone,
    /// Another file has its place.
    Replaced,
    /// It has another length.
    Resized,
    /// It has been written.
    Rewritten,
}

impl Change {
    /// What has become of it, for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Change::Gone => "is not there any more",
            Change::Replaced => "is another file than it was",
            Change::Resized => "has another length than it had",
            Change::Rewritten => "has been written since",
        }
    }
}

impl Look {
    /// The longest that one is when it is written down.
    pub const LONGEST: Look = Look { inode: u64::MAX, length: u64::MAX, sample: u64::MAX };

    /// Of what an image can be in; nothing where something else is there. Blocks.
    pub fn at(path: &Path) -> io::Result<Option<Look>> {
        let found = Found::resolve(path)?;
        let Some(file) = found.image()? else { return Ok(None) };
        let device = found.kind() == FileType::BlockDevice;
        let length = if device { length_of_device(&file)? } else { u64::try_from(found.stat.st_size).unwrap_or(0) };
        let inode = if device { 0 } else { found.stat.st_ino };
        Ok(Some(Look { inode, length, sample: sample(&file, length)? }))
    }

    /// What is different about the file now. Blocks.
    pub fn change(&self, path: &Path) -> io::Result<Option<Change>> {
        let now = match Look::at(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Some(Change::Gone)),
            Err(e) => return Err(e),
            Ok(None) => return Ok(Some(Change::Replaced)),
            Ok(Some(now)) => now,
        };
        Ok(match now {
            _ if now.inode != self.inode => Some(Change::Replaced),
            _ if now.length != self.length => Some(Change::Resized),
            _ if now.sample != self.sample => Some(Change::Rewritten),
            _ => None,
        })
    }
}

fn length_of_device(mut file: &File) -> io::Result<u64> {
    io::Seek::seek(&mut file, io::SeekFrom::End(0))
}

/// The checksum of what is looked at in a file of that length.
fn sample(file: &File, length: u64) -> io::Result<u64> {
    let (mut hasher, mut piece) = (XxHash64::with_seed(0), vec![0; PIECE]);
    let head = HEAD.min(length);
    let rest = length - head;
    let beginning = (0..head).step_by(PIECE);
    let spread = (0..PIECES).map(|n| head + rest / PIECES * n).take(if rest == 0 { 0 } else { usize::MAX });
    for at in beginning.chain(spread) {
        let mut got = 0;
        while got < piece.len() {
            match file.read_at(&mut piece[got..], at + got as u64) {
                Ok(0) => break,
                Ok(more) => got += more,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        hasher.write(&piece[..got]);
    }
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_touch_is_no_change_and_a_write_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        std::fs::write(&disk, vec![7; 5 << 20]).unwrap();
        let look = Look::at(&disk).unwrap().unwrap();
        let again = File::options().write(true).open(&disk).unwrap();
        again.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(60)).unwrap();
        assert_eq!(look.change(&disk).unwrap(), None);
        for at in [0, (2 << 20) - 1, 2 << 20] {
            again.write_all_at(b"x", at).unwrap();
            assert_eq!(look.change(&disk).unwrap(), Some(Change::Rewritten), "{at}");
            again.write_all_at(&[7], at).unwrap();
            assert_eq!(look.change(&disk).unwrap(), None, "{at}");
        }
        again.set_len(6 << 20).unwrap();
        assert_eq!(look.change(&disk).unwrap(), Some(Change::Resized));
        std::fs::copy(&disk, dir.path().join("copy")).unwrap();
        std::fs::rename(dir.path().join("copy"), &disk).unwrap();
        assert_eq!(look.change(&disk).unwrap(), Some(Change::Replaced));
        std::fs::remove_file(&disk).unwrap();
        assert_eq!(look.change(&disk).unwrap(), Some(Change::Gone));
        rustix::fs::mknodat(rustix::fs::CWD, &disk, FileType::Fifo, 0o644.into(), 0).unwrap();
        assert_eq!(look.change(&disk).unwrap(), Some(Change::Replaced), "nobody waits for its other end");
    }
}
