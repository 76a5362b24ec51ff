//! What QEMU itself prints: a file per domain, bounded at each start and while it runs, and its last lines for errors.
//!
//! QEMU has the file itself and outlives virtd, so it can write as much as it likes, and not always is somebody there to
//! read it. But it can only append: whoever cuts the file makes room, and QEMU goes on at the new end.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A log that has grown beyond this is put aside at the next start, in place of the one put aside before.
const MAX_LOG: u64 = 1 << 20;
/// A log that has grown beyond this while its guest runs is cut.
const MAX_RUNNING: u64 = 4 << 20;
/// Of one that is cut, this much is put aside.
const KEPT: usize = 256 << 10;
/// Of last words, this much is kept.
const MAX_WORDS: usize = 1024;

/// The part of a log that belongs to one start.
#[derive(Clone, Debug)]
pub struct Log {
    path: PathBuf,
    /// Where this start's output begins, unless the file was cut since.
    start: u64,
    /// The file, to read and cut it; `None` if it is not there.
    file: Option<Arc<File>>,
}

impl Log {
    /// Opens the log for a new start: `headline` goes before the process' own output. The file is for QEMU to append to.
    pub fn begin(path: &Path, headline: &str) -> io::Result<(Log, File)> {
        if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.len() > MAX_LOG) {
            std::fs::rename(path, aside(path))?;
        }
        let mut options = File::options();
        let mut file = options.append(true).create(true).mode(0o640).custom_flags(libc::O_NOFOLLOW).open(path)?;
        writeln!(file, "{headline}")?;
        let start = file.seek(SeekFrom::End(0))?;
        Ok((Log::found(path, start), file))
    }

    /// The log of a start that began at `start`.
    pub fn found(path: &Path, start: u64) -> Log {
        let file = File::options().read(true).append(true).custom_flags(libc::O_NOFOLLOW).open(path);
        Log { path: path.to_owned(), start, file: file.ok().map(Arc::new) }
    }

    /// The file, for one more process to append to; `None` if it is not there.
    pub fn output(&self) -> Option<Arc<File>> {
        self.file.clone()
    }

    /// Whether more was printed than is to be kept while a guest runs.
    pub fn is_too_long(&self) -> bool {
        let size = self.file.as_ref().and_then(|file| file.metadata().ok()).map(|meta| meta.len());
        size.is_some_and(|size| size > MAX_RUNNING)
    }

    /// Puts the last lines aside, in place of what was put aside before, and empties the log. What is printed in that very
    /// moment may be lost. Error: it could not be emptied. Blocks.
    pub fn cut(&self) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let end = file.metadata()?.len();
        let mut last = vec![0; KEPT];
        let kept = file.read_at(&mut last, end.saturating_sub(KEPT as u64)).and_then(|count| {
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o640).custom_flags(libc::O_NOFOLLOW);
            options.open(aside(&self.path))?.write_all(&last[..count])
        });
        // A full disk is a reason to go on.
        file.set_len(0)?;
        let what = if kept.is_ok() { "its last lines were put aside" } else { "its last lines are lost" };
        writeln!(&**file, "virtd: this log had {end} bytes and was cut; {what}")
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
        // A log that was cut is this start's alone.
        let start = if self.start > end { 0 } else { self.start };
        // Room for the time stamps that are cut off.
        let from = start.max(end.saturating_sub(2 * MAX_WORDS as u64));
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(2 * MAX_WORDS as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// Where a log is put aside.
fn aside(path: &Path) -> PathBuf {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".old");
    aside.into()
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

    /// M2: a guest that prints without end does not fill the disk, and can be read for its last words even so.
    #[test]
    fn a_log_is_cut_while_somebody_writes_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.log");
        let (log, mut file) = Log::begin(&path, "first").unwrap();
        // The next virtd finds it.
        for log in [log.clone(), Log::found(&path, log.start())] {
            let line = "x".repeat(1023);
            while !log.is_too_long() {
                writeln!(file, "{line}").unwrap();
            }
            writeln!(file, "the end of it").unwrap();
            log.cut().unwrap();
            assert!(!log.is_too_long() && file.metadata().unwrap().len() < 200);
            let aside = std::fs::read(path.with_extension("log.old")).unwrap();
            assert!(aside.len() == KEPT && aside.ends_with(b"the end of it\n"));
            writeln!(file, "and so on").unwrap();
            assert!(log.last_words().ends_with("and so on"), "{}", log.last_words());
            assert!(std::fs::read(&path).unwrap().starts_with(b"virtd: this log had"), "it is written at its end");
        }
    }

    #[test]
    fn a_missing_log_has_no_words() {
        assert_eq!(Log::found(Path::new("/nowhere/web.log"), 0).last_words(), "");
    }
}
