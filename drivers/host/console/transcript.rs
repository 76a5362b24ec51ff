//! What a console has said: a file that somebody else appends to, and that is kept short while it grows.
//!
//! ```text
//!   0 ─── hole ───┬── kept, at least SHOWN ──┬── end ─▶ the guest goes on
//!                 └ beginning: all below is punched out
//! ```
//!
//! A place in the file means the same byte for good, so whoever reads knows what was read, at any pace and over restarts of
//! virtd. The file's writer may have been taken over by its guest, and do with it what it likes: what is read then is as
//! wrong as what such a guest says, and no more.

use super::next_write::NextWrite;
use rustix::fs::{CWD, FallocateFlags, MemfdFlags, Mode, OFlags, SeekFrom, fallocate, memfd_create, openat, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Whoever comes late is shown so many bytes.
pub const SHOWN: u64 = 64 << 10;
/// So many more are kept before the file is made shorter.
const SLACK: u64 = 192 << 10;
/// Holes begin and end at multiples of this, which are multiples of every page size.
const STEP: u64 = 64 << 10;
/// How often a file that grows is looked at.
const PACE: Duration = Duration::from_millis(100);
/// Nobody reads.
const NOBODY: u64 = u64::MAX;

/// The file.
pub struct Transcript {
    file: File,
    /// A client that is so many bytes behind loses what is before them.
    behind: u64,
    beginning: AtomicU64,
    /// Up to where the client has read.
    read_to: AtomicU64,
    /// Of one in memory, whoever waits for the next write to it: of such files the kernel tells nobody.
    waiting: Option<Mutex<CancellationToken>>,
}

impl Transcript {
    /// The file that a hypervisor writes. Error: there is none, or something that is none.
    pub fn open(path: &Path, behind: u64) -> io::Result<Transcript> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(openat(CWD, path, flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no plain file"));
        }
        // What an earlier virtd has punched out. Whoever writes has a place of their own in the file.
        let beginning = match seek(&file, SeekFrom::Data(0)) {
            Ok(beginning) => beginning,
            Err(Errno::NXIO) => file.metadata()?.len(),
            Err(_) => 0,
        };
        Ok(Transcript::of(file, behind, beginning))
    }

    /// One in memory, for what virtd itself reads of a console.
    pub fn in_memory(behind: u64) -> io::Result<Transcript> {
        let file = memfd_create("console", MemfdFlags::CLOEXEC)?.into();
        Ok(Transcript { waiting: Some(Mutex::default()), ..Transcript::of(file, behind, 0) })
    }

    fn of(file: File, behind: u64, beginning: u64) -> Transcript {
        let (beginning, read_to) = (AtomicU64::new(beginning), AtomicU64::new(NOBODY));
        Transcript { file, behind, beginning, read_to, waiting: None }
    }

    /// Appends; for one in memory.
    pub fn append(&self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.end()?)?;
        if let Some(waiting) = &self.waiting {
            std::mem::take(&mut *waiting.lock().unwrap_or_else(PoisonError::into_inner)).cancel();
        }
        Ok(())
    }

    /// How far it has come.
    pub fn end(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Where somebody begins who comes late.
    pub fn shown_from(&self) -> io::Result<u64> {
        let end = self.end()?;
        Ok(end.saturating_sub(SHOWN).max(self.beginning.load(Ordering::SeqCst)).min(end))
    }

    /// The next bytes from `at` on, which is moved behind them; there may be none though more follow.
    pub fn read<'b>(&self, at: &mut u64, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
        // It may be shorter than it was: see above.
        *at = (*at).max(self.beginning.load(Ordering::SeqCst)).min(self.end()?);
        let count = self.file.read_at(buffer, *at)?;
        // What was punched out meanwhile has been read as nothing.
        let lost = self.beginning.load(Ordering::SeqCst).saturating_sub(*at);
        let lost = usize::try_from(lost).unwrap_or(count).min(count);
        *at += count as u64;
        Ok(&buffer[lost..count])
    }

    /// Up to there nobody needs it any more for the client's sake; `None`: there is no client.
    pub fn is_read_to(&self, at: Option<u64>) {
        self.read_to.store(at.unwrap_or(NOBODY), Ordering::SeqCst);
    }

    /// The next write to it.
    pub fn next_write(&self) -> NextWrite {
        match &self.waiting {
            Some(waiting) => waiting.lock().unwrap_or_else(PoisonError::into_inner).clone().into(),
            None => NextWrite::to(&self.file),
        }
    }

    /// Keeps it short for as long as it grows.
    pub async fn stay_short(&self) {
        loop {
            let written = self.next_write();
            if let Err(error) = self.shorten() {
                tracing::debug!(%error, "what a console has said cannot be made shorter");
            }
            written.done().await;
            tokio::time::sleep(PACE).await;
        }
    }

    /// Punches out what is neither shown to whoever comes late nor still to be read.
    fn shorten(&self) -> io::Result<()> {
        let (end, beginning) = (self.end()?, self.beginning.load(Ordering::SeqCst));
        if end < beginning {
            self.beginning.store(0, Ordering::SeqCst);
        } else if end - beginning <= SHOWN + SLACK {
            return Ok(());
        }
        let unread = self.read_to.load(Ordering::SeqCst).max(end.saturating_sub(self.behind));
        let until = end.saturating_sub(SHOWN).min(unread) / STEP * STEP;
        if until <= self.beginning.load(Ordering::SeqCst) {
            return Ok(());
        }
        // First: whoever reads just now knows what is not there.
        self.beginning.store(until, Ordering::SeqCst);
        let holes = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, holes, 0, until) {
            Err(Errno::OPNOTSUPP) => {
                // Where there are no holes the file begins anew: its writer appends.
                self.file.set_len(0)?;
                self.beginning.store(0, Ordering::SeqCst);
                Ok(())
            }
            punched => Ok(punched?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    fn said(lines: std::ops::Range<u32>) -> Vec<u8> {
        lines.flat_map(|line| format!("{line:08}\n").into_bytes()).collect()
    }

    fn read_all(transcript: &Transcript, mut at: u64) -> Vec<u8> {
        let (mut all, mut buffer) = (Vec::new(), vec![0; 10_000]);
        while at < transcript.end().unwrap() {
            all.extend_from_slice(transcript.read(&mut at, &mut buffer).unwrap());
        }
        all
    }

    #[test]
    fn it_stays_short_and_shows_what_was_said_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("said");
        std::fs::write(&path, "").unwrap();
        let open = || Transcript::open(&path, 1 << 20).unwrap();
        let transcript = open();
        assert_eq!(transcript.shown_from().unwrap(), 0);
        let mut all = Vec::new();
        for round in 0..40 {
            let more = said(round * 10_000..(round + 1) * 10_000);
            transcript.append(&more).unwrap();
            all.extend(more);
            transcript.shorten().unwrap();
            let kept = std::fs::metadata(&path).unwrap().blocks() * 512;
            assert!(kept <= SHOWN + SLACK + STEP, "{kept} bytes are kept");
        }
        // The next virtd, too.
        for transcript in [transcript, open()] {
            let from = transcript.shown_from().unwrap();
            assert_eq!(from, all.len() as u64 - SHOWN);
            assert!(read_all(&transcript, from) == all[from as usize..], "something else is shown");
        }
    }

    #[test]
    fn a_reader_loses_nothing_until_it_is_far_behind() {
        let transcript = Transcript::in_memory(512 << 10).unwrap();
        transcript.append(&said(0..50_000)).unwrap();
        transcript.is_read_to(Some(9));
        transcript.shorten().unwrap();
        assert!(read_all(&transcript, 9) == said(1..50_000), "it is not the same");
        transcript.append(&said(50_000..100_000)).unwrap();
        transcript.shorten().unwrap();
        let all = said(0..100_000);
        let rest = read_all(&transcript, 9);
        assert!(rest.len() >= 512 << 10 && rest.len() < (512 << 10) + STEP as usize, "{}", rest.len());
        assert!(all.ends_with(&rest), "no byte that was never said");
        transcript.is_read_to(None);
        transcript.shorten().unwrap();
        assert!(read_all(&transcript, 0).len() < (SHOWN + STEP) as usize);
    }

    #[test]
    fn a_file_that_its_writer_spoils_is_borne() {
        let transcript = Transcript::in_memory(512 << 10).unwrap();
        transcript.append(&said(0..100_000)).unwrap();
        transcript.shorten().unwrap();
        transcript.file.set_len(5).unwrap();
        let mut at = 900_000;
        assert_eq!(transcript.read(&mut at, &mut [0; 100]).unwrap(), b"");
        assert_eq!(at, 5);
        transcript.shorten().unwrap();
        assert_eq!(transcript.shown_from().unwrap(), 0);
        transcript.append(b"anew").unwrap();
        assert_eq!(transcript.read(&mut at, &mut [0; 100]).unwrap(), b"anew");
        // As large as a file can be, and nothing in it.
        transcript.file.set_len(i64::MAX as u64).unwrap();
        transcript.shorten().unwrap();
        let mut at = transcript.shown_from().unwrap();
        assert_eq!(transcript.read(&mut at, &mut [1; 10]).unwrap(), [0; 10]);
    }

    #[test]
    fn what_is_no_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        rustix::fs::mknodat(CWD, at("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", at("link")).unwrap();
        for name in ["none", "fifo", "link", "."] {
            assert!(Transcript::open(&at(name), 0).is_err(), "{name}");
        }
    }

    #[tokio::test]
    async fn it_is_made_shorter_by_itself() {
        let transcript = Transcript::in_memory(512 << 10).unwrap();
        let shortened = async {
            while transcript.beginning.load(Ordering::SeqCst) == 0 {
                tokio::task::yield_now().await;
            }
        };
        transcript.append(&said(0..10)).unwrap();
        tokio::select! {
            () = transcript.stay_short() => {}
            () = async {
                tokio::task::yield_now().await;
                transcript.append(&said(10..100_000)).unwrap();
                shortened.await;
            } => {}
        }
        assert!(read_all(&transcript, 0).len() < (SHOWN + STEP) as usize);
    }
}
