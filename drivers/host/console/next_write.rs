//! Waits for the next write to a file, whoever writes it, without looking again and again.
//!
//! One inotify serves all, since a user may have few of them (128), and each watch ends with the first write that it tells of:
//! a file that nobody waits for costs nothing, however often it is written, and one that is waited for costs as often as its
//! waiter likes.

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

use crate::host::acl::through;

/// How long is waited where the kernel cannot watch the file (any more).
const BLIND: Duration = Duration::from_millis(500);

/// The next write to a file, from the moment when this was made.
pub struct NextWrite(Option<CancellationToken>);

impl NextWrite {
    /// That to this file. What was written before is found by looking at the file after this call.
    pub fn to(file: &impl AsFd) -> NextWrite {
        static WATCH: OnceLock<Option<Arc<Watch>>> = OnceLock::new();
        let watch = WATCH.get_or_init(|| {
            let begun = Watch::begin();
            begun.inspect_err(|error| tracing::warn!(%error, "consoles are looked at twice a second")).ok()
        });
        NextWrite(watch.as_ref().and_then(|watch| watch.add(file)))
    }

    /// Returns when the file has been written, or may have been.
    pub async fn done(self) {
        match self.0 {
            Some(written) => written.cancelled().await,
            None => tokio::time::sleep(BLIND).await,
        }
    }
}

/// One that is told by whoever writes.
impl From<CancellationToken> for NextWrite {
    fn from(written: CancellationToken) -> NextWrite {
        NextWrite(Some(written))
    }
}

struct Watch {
    inotify: OwnedFd,
    /// By the numbers of the watches.
    awaited: Mutex<HashMap<i32, CancellationToken>>,
}

impl Watch {
    fn begin() -> std::io::Result<Arc<Watch>> {
        let inotify = inotify::init(CreateFlags::CLOEXEC)?;
        let watch = Arc::new(Watch { inotify, awaited: Mutex::default() });
        let reads = watch.clone();
        // A thread of its own: the watch serves whatever runtime its users run in.
        std::thread::Builder::new().name("next-write".into()).spawn(move || reads.read())?;
        Ok(watch)
    }

    fn add(&self, file: &impl AsFd) -> Option<CancellationToken> {
        // Held over the call: the kernel gives a file that is watched already the number that it has.
        let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
        let number = inotify::add_watch(&self.inotify, through(file), WatchFlags::MODIFY | WatchFlags::ONESHOT).ok()?;
        Some(awaited.entry(number).or_default().clone())
    }

    fn read(&self) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(&self.inotify, &mut buffer);
        loop {
            let number = match reader.next() {
                Ok(event) => event.wd(),
                Err(Errno::INTR) => continue,
                // Nothing is known any more: all are to look for themselves.
                Err(_) => -1,
            };
            let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
            // Whatever is told of a watch (also that the kernel has removed it) ends the wait. A negative number: some were lost.
            match number {
                0.. => awaited.remove(&number).iter().for_each(CancellationToken::cancel),
                _ => awaited.drain().for_each(|(_, written)| written.cancel()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    #[tokio::test]
    async fn each_write_ends_the_waits_that_began_before_it() {
        let (mut one, other) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        for _ in 0..100 {
            let (first, second, others) = (NextWrite::to(&one), NextWrite::to(&one), NextWrite::to(&other));
            assert!(first.0.is_some() && second.0.is_some(), "it is watched");
            one.write_all(b"x").unwrap();
            tokio::join!(first.done(), second.done());
            assert!(!others.0.as_ref().unwrap().is_cancelled(), "nobody wrote that");
            other.write_all_at(b"y", 0).unwrap();
            others.done().await;
        }
    }

    /// Nobody waits any more for a file that is gone.
    #[tokio::test]
    async fn the_end_of_a_file_ends_the_wait() {
        let file = tempfile::tempfile().unwrap();
        let next = NextWrite::to(&file);
        drop(file);
        next.done().await;
    }
}
