//! The kernel's table of what is mounted where.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

/// What is mounted where, for virtd.
pub const TABLE: &str = "/proc/self/mountinfo";
/// How each pool's file system is mounted: nothing on it is run, or is a device.
const FLAGS: [&str; 3] = ["nosuid", "nodev", "noexec"];

/// A line of the kernel's table of mounts.
#[derive(Debug, PartialEq, Eq)]
pub struct Line {
    /// The mount's own number.
    pub id: u64,
    /// The numbers of the device that the file system has for its files.
    pub device: (u32, u32),
    /// Which folder of the file system it is.
    pub root: PathBuf,
    /// Where it is mounted.
    pub at: PathBuf,
    /// How the mount is held back.
    pub options: String,
    /// Of which type it is.
    pub kind: String,
    /// Where the file system comes from, in words that who mounts it chooses.
    pub source: PathBuf,
}

impl Line {
    /// In what it is not mounted as a pool's file system is. `is_whole`: that folder of it is all that was asked for.
    pub fn lacks(&self, is_whole: bool) -> Option<String> {
        let missing: Vec<&str> =
            FLAGS.into_iter().filter(|flag| !self.options.split(',').any(|one| one == *flag)).collect();
        match (is_whole, &*missing) {
            (false, _) => Some(format!("from its folder {}, and not whole", self.root.display())),
            (true, []) => None,
            (true, missing) => Some(format!("without {}", missing.join(", "))),
        }
    }
}

/// The table as it is now.
pub fn table() -> io::Result<Vec<u8>> {
    fs::read(TABLE)
}

/// The lines of the table, without those that cannot be read: nobody's mount keeps others from being found.
pub fn lines(table: &[u8]) -> impl Iterator<Item = Line> {
    table.split(|byte| *byte == b'\n').filter_map(read)
}

/// `36 35 98:0 /root /mnt opts shared:1 - ext4 /dev/sda1 rw`
fn read(line: &[u8]) -> Option<Line> {
    let mut words = line.split(|byte| *byte == b' ');
    let mut word = || words.next();
    let text = |word: &[u8]| Some(std::str::from_utf8(word).ok()?.to_owned());
    let id = text(word()?)?.parse().ok()?;
    word()?;
    let device = text(word()?)?;
    let (major, minor) = device.split_once(':')?;
    let (root, at, options) = (plain(word()?), plain(word()?), text(word()?)?);
    while word()? != b"-" {}
    let (kind, source) = (text(word()?)?, plain(word()?));
    Some(Line { id, device: (major.parse().ok()?, minor.parse().ok()?), root, at, options, kind, source })
}

/// Blanks are told by their numbers there, each of three digits.
fn plain(mut word: &[u8]) -> PathBuf {
    let mut plain = Vec::new();
    while let [first, rest @ ..] = word {
        let number = match rest {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if *first == b'\\' => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        plain.push(number.unwrap_or(*first));
        word = if number.is_some() { &rest[3..] } else { rest };
    }
    OsString::from_vec(plain).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt as _;

    #[test]
    fn the_kernels_table_is_read() {
        let table = b"36 35 98:0 / /mnt/a\\040b rw,nosuid shared:1 - ext4 /dev/loop0 rw\n\
            37 35 0:50 / /home/u/\xff rw - fuse.x \xfe rw\n\
            none of these\n\
            38 35 98:1 /sub\\134 /mnt/c rw,nosuid,nodev,noexec,relatime - ext4 /dev/loop1 rw\n";
        let lines: Vec<Line> = lines(table).collect();
        let wanted = Line {
            id: 36,
            device: (98, 0),
            root: "/".into(),
            at: "/mnt/a b".into(),
            options: "rw,nosuid".to_owned(),
            kind: "ext4".to_owned(),
            source: "/dev/loop0".into(),
        };
        assert_eq!((lines.len(), &lines[0]), (3, &wanted));
        assert_eq!(lines[1].at.as_os_str().as_bytes(), b"/home/u/\xff");
        assert_eq!(lines[0].lacks(true).unwrap(), "without nodev, noexec");
        assert_eq!(lines[2].lacks(false).unwrap(), "from its folder /sub\\, and not whole");
        assert_eq!(lines[2].lacks(true), None);
        assert_eq!(read(b"36 35 98:0"), None);
    }
}
