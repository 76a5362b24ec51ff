//! What QEMU itself prints: a file per domain, bounded at each start, and its last lines for errors.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A log that has grown beyond this is put aside at the next start, in place of the one put aside before.
const MAX_LOG: u64 = 1 << 20;
/// Of last words, this much is kept.
const MAX_WORDS: usize = 1024;

/// The part of a log that belongs to one start.
#[derive(Clone, Debug)]
pub struct Log {
    path: PathBuf,
    /// Where this start's output begins.
    start: u64,
}

impl Log {
    /// Opens the log for a new start: `headline` goes before the process' own output. The file is for QEMU to append to.
    pub fn begin(path: &Path, headline: &str) -> io::Result<(Log, File)> {
        if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.len() > MAX_LOG) {
            let mut aside = path.as_os_str().to_owned();
            aside.push(".old");
            std::fs::rename(path, aside)?;
        }
        let mut options = File::options();
        let mut file = options.append(true).create(true).mode(0o640).custom_flags(libc::O_NOFOLLOW).open(path)?;
        writeln!(file, "{headline}")?;
        let start = file.seek(SeekFrom::End(0))?;
        Ok((Log { path: path.to_owned(), start }, file))
    }

    /// The log of a start that began at `start`.
    pub fn found(path: &Path, start: u64) -> Log {
        Log { path: path.to_owned(), start }
    }

    /// Where this start's output begins.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The last lines since the start, without time stamps; empty if there are none. Blocks.
    pub fn last_words(&self) -> String {
        self.tail().map(|bytes| words(&bytes)).unwrap_or_default()
    }

    fn tail(&self) -> io::Result<Vec<u8>> {
        let mut file = File::open(&self.path)?;
        let end = file.seek(SeekFrom::End(0))?;
        // Room for the time stamps that are cut off.
        let from = self.start.max(end.saturating_sub(2 * MAX_WORDS as u64));
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(2 * MAX_WORDS as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// As many of the last lines as fit, one at least.
fn words(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<String> = text.lines().map(clean).filter(|line| !line.is_empty() && !is_chatter(line)).collect();
    let mut room = MAX_WORDS;
    let fits = |line: &&String| match room.checked_sub(line.len() + 1) {
        Some(rest) => {
            room = rest;
            true
        }
        None => false,
    };
    let mut last: Vec<&String> = lines.iter().rev().take_while(fits).collect();
    last.reverse();
    match (last.is_empty(), lines.last()) {
        (true, Some(long)) => long.chars().take(MAX_WORDS / 4).collect(),
        _ => last.iter().map(|line| line.as_str()).collect::<Vec<_>>().join("\n"),
    }
}

/// What QEMU says when all is well.
fn is_chatter(line: &str) -> bool {
    line.starts_with("char device redirected to ")
}

/// A line without time stamp and control characters.
fn clean(line: &str) -> String {
    let stamped = line.split_once(' ').filter(|(stamp, _)| {
        stamp.len() > 20
            && stamp.ends_with('Z')
            && stamp.starts_with(|c: char| c.is_ascii_digit())
            && stamp.contains('T')
    });
    let line = stamped.map_or(line, |(_, rest)| rest);
    line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_those_of_this_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.log");
        let (_, mut file) = Log::begin(&path, "first").unwrap();
        writeln!(file, "old words").unwrap();
        let (log, mut file) = Log::begin(&path, "second").unwrap();
        assert_eq!(log.last_words(), "");
        writeln!(file, "2026-07-07T12:00:00.123456Z qemu-system-x86_64: -m 16: no\x1b memory").unwrap();
        writeln!(file, "and so it ends").unwrap();
        assert_eq!(log.last_words(), "qemu-system-x86_64: -m 16: no  memory\nand so it ends");
        assert_eq!(Log::found(&path, log.start()).last_words(), log.last_words());
    }

    #[test]
    fn last_words_are_few() {
        let many: String = (0..1000).map(|n| format!("line {n}\n")).collect();
        let kept = words(many.as_bytes());
        assert!(kept.len() <= MAX_WORDS && kept.ends_with("line 999") && kept.starts_with("line "), "{kept}");
        assert!(words(&[b'x'; 5000]).len() <= MAX_WORDS);
        assert_eq!(words(b"\xff\xfe\n\n"), "\u{fffd}\u{fffd}");
    }

    #[test]
    fn a_long_log_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.log");
        std::fs::write(&path, vec![b'x'; (MAX_LOG + 1) as usize]).unwrap();
        let (_, file) = Log::begin(&path, "new").unwrap();
        assert_eq!(file.metadata().unwrap().len(), 4);
        assert!(dir.path().join("web.log.old").exists());
    }

    #[test]
    fn a_missing_log_has_no_words() {
        assert_eq!(Log::found(Path::new("/nowhere/web.log"), 0).last_words(), "");
    }
}
