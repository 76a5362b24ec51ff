//! What is on a device: libblkid says it, as a tool without rights, of a copy of those bytes in which it looks.

use super::apart;
use super::behind::Behind;
use super::image::{Images, not_run};
use super::tool::{Bounds, Rights, finish, tame};
use super::wall::Wall;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use virt_model::driver::DriverError;

/// So much of the beginning of a device, and of its end, is copied: there what is on it says so.
const EDGE: u64 = 4 << 20;
/// So much is copied at once.
const PIECE: u64 = 1 << 20;
const BOUNDS: Bounds = Bounds { data: Some(256 << 20), cpu: Some(10), files: Some(64) };
/// The user and the group that have nothing.
const NOBODY: u32 = 65534;
/// How the tool ends when it has recognised nothing, and, with words of why, when it could not look.
const NOTHING: i32 = 2;
/// How it ends when it has recognised several things that exclude each other.
const SEVERAL: i32 = 8;

/// What is on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signs {
    /// Nothing: its edges are blank.
    Nothing,
    /// Something that nobody knows: of some things only what is between the edges says what they are.
    Unknown,
    /// A file system of that type.
    FileSystem(String),
    /// A partition table of that format, and nothing else.
    Table(String),
    /// Something else, called so for people.
    Other(String),
}

impl Images {
    /// What is on a device that is open, and called `path`. Nothing is written. Blocks.
    pub fn recognise(&self, device: &File, path: &Path) -> Result<Signs, DriverError> {
        let failed = |e: io::Error| DriverError::Storage(format!("cannot read {}: {e}", path.display()));
        let (edges, are_blank) = edges(device).map_err(failed)?;
        self.stop.check()?;
        let mut command = Command::new("blkid");
        // What it was told before is in a file of the host's, and is not asked.
        command.args(["-p", "-c", "/dev/null", "-o", "export", "/proc/self/fd/0"]).env("LC_ALL", "C");
        command.stdin(Stdio::from(edges)).stdout(Stdio::piped()).stderr(Stdio::piped());
        let done = self.confine_reader(&mut command).and_then(|behind| {
            let done = apart::without(|| behind.enter().and_then(|()| finish(&mut command, &self.stop, false)));
            done.map_err(|e| behind.why(e))
        });
        let done = done.map_err(|e| not_run("blkid", "blkid is not installed (Debian has it in util-linux)", e))?;
        let words = String::from_utf8_lossy(&done.stderr);
        match done.status.code() {
            Some(0) => Ok(signs(&String::from_utf8_lossy(&done.stdout))),
            Some(NOTHING) if words.trim().is_empty() => Ok(if are_blank { Signs::Nothing } else { Signs::Unknown }),
            Some(SEVERAL) => Ok(Signs::Other("more than one thing".to_owned())),
            _ => Err(failed(io::Error::other(words.trim().to_owned()))),
        }
    }

    /// Has the tool run as nobody where tools would have root's rights: behind the wall that it makes itself then it does not find
    /// what it is to read, and says that that is nothing.
    fn confine_reader(&self, command: &mut Command) -> io::Result<Behind> {
        match self.lender.user() {
            None if rustix::process::geteuid().is_root() => {
                tame(command, Some(Rights::of_group(NOBODY, NOBODY)), BOUNDS);
                Ok(Behind::ByThread(Wall::default()))
            }
            _ => self.confine(command, BOUNDS),
        }
    }
}

/// A file in memory that is as long as the device, and holds what is at its edges; and whether that is nothing.
fn edges(mut device: &File) -> io::Result<(File, bool)> {
    let length = device.seek(SeekFrom::End(0))?;
    let copy = File::from(memfd_create("edges", MemfdFlags::CLOEXEC)?);
    copy.set_len(length)?;
    let begins = EDGE.min(length);
    let (mut piece, mut are_blank) = (vec![0; PIECE as usize], true);
    for (from, to) in [(0, begins), (length.saturating_sub(EDGE).max(begins), length)] {
        for at in (from..to).step_by(PIECE as usize) {
            let piece = &mut piece[..(to - at).min(PIECE) as usize];
            device.read_exact_at(piece, at)?;
            // What holds nothing takes no memory.
            if piece.iter().any(|byte| *byte != 0) {
                are_blank = false;
                copy.write_all_at(piece, at)?;
            }
        }
    }
    Ok((copy, are_blank))
}

/// What the tool's words say, each a name and a value.
fn signs(words: &str) -> Signs {
    let value = |name: &str| words.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    match (value("TYPE"), value("USAGE"), value("PTTYPE")) {
        (Some(kind), Some("filesystem"), _) => Signs::FileSystem(kind.to_owned()),
        (Some(kind), ..) => Signs::Other(kind.to_owned()),
        (None, _, Some(kind)) => Signs::Table(kind.to_owned()),
        (None, ..) => Signs::Other("something without a type".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::lender::Lender;
    use uuid::Uuid;

    #[test]
    fn what_is_on_a_device_is_recognised_and_nothing_is_written() {
        if Command::new("blkid").arg("-V").output().is_err() {
            return eprintln!("SKIPPED: blkid is not installed");
        }
        let images = Images::new(Lender::Ours, Uuid::nil(), None);
        let of = |fill: &dyn Fn(&File)| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(4 << 30).unwrap();
            fill(&file);
            images.recognise(&file, Path::new("/dev/x")).unwrap()
        };
        assert_eq!(of(&|_| ()), Signs::Nothing);
        let swap = of(&|file| {
            // Its version and its last page.
            file.write_all_at(&[1, 0, 0, 0, 0xff, 0x0f, 0, 0], 1024).unwrap();
            file.write_all_at(b"SWAPSPACE2", 4086).unwrap();
        });
        assert_eq!(swap, Signs::Other("swap".to_owned()));
        let btrfs = of(&|file| file.write_all_at(b"_BHRfS_M", (64 << 10) + 64).unwrap());
        assert_eq!(btrfs, Signs::FileSystem("btrfs".to_owned()));
        let table = of(&|file| {
            file.write_all_at(&[0, 0, 2, 0, 0x83, 0, 3, 0, 1, 0, 0, 0, 0, 8, 0, 0], 446).unwrap();
            file.write_all_at(&[0x55, 0xaa], 510).unwrap();
        });
        assert_eq!(table, Signs::Table("dos".to_owned()));
        // What it is says a table of its own, which is behind 3 GiB there: 8 sectors to a cluster, and the cluster of that table.
        let ntfs = of(&|file| {
            file.write_all_at(b"\xeb\x52\x90NTFS    \0\x02\x08", 0).unwrap();
            file.write_all_at(&[0xf8], 21).unwrap();
            file.write_all_at(&(8_u64 << 20).to_le_bytes(), 40).unwrap();
            file.write_all_at(&786_432_u64.to_le_bytes(), 48).unwrap();
            file.write_all_at(&[0xf6], 64).unwrap();
            file.write_all_at(&[0x55, 0xaa], 510).unwrap();
        });
        assert_ne!(ntfs, Signs::Nothing);
        assert_eq!(of(&|file| file.write_all_at(b"x", (4 << 30) - 1).unwrap()), Signs::Unknown);
    }

    #[test]
    fn the_tools_words_are_read() {
        let said = |words: &str| signs(words);
        assert_eq!(said("DEVNAME=x\nTYPE=ext4\nUSAGE=filesystem\n"), Signs::FileSystem("ext4".to_owned()));
        assert_eq!(said("TYPE=crypto_LUKS\nUSAGE=crypto\n"), Signs::Other("crypto_LUKS".to_owned()));
        assert_eq!(said("PTTYPE=gpt\n"), Signs::Table("gpt".to_owned()));
    }
}
