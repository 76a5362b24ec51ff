//! The guest's memory on its way into a file: QEMU writes it into a pipe, and a thread of the machine's moves it on.
//!
//! A file system may hold that thread for ever, and QEMU waits in its write while nobody reads: then no guest goes on. So whoever
//! gives up closes the pipe wherever the thread is. QEMU's write fails, its guest goes on, and the thread ends when it is let go.

use super::super::instance::Body;
use super::files::stored;
use super::packed::{self, Zstd};
use super::{Operation, lock};
use crate::host::out::Out;
use crate::host::saved::{Written, pump};
use crate::host::tool::Tool;
use crate::host::workers::{ClosedAside, Errand, PATIENCE, Stop};
use rustix::pipe::fcntl_setpipe_size;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use virt_model::driver::DriverError;
use virt_model::driver::saved::MemoryFormat;
use virt_model::driver::snapshots::Journal;

/// What the pipe between QEMU and us is to hold, in bytes; less will do.
const PIPE: usize = 1 << 20;
/// How often it is looked whether the file still takes what it is given.
const LOOK: Duration = Duration::from_secs(1);

/// What QEMU writes.
#[derive(Clone, Copy)]
pub(super) enum Stream {
    /// Memory and devices. The CPUs stand; where it is given up they go on, if they are to (`resume`).
    Machine { resume: bool },
    /// Memory alone, for which QEMU has them stand, and go on, by itself.
    Memory(MemoryFormat),
}

/// The end of the pipe that is read, until somebody closes it.
struct Outlet {
    /// Whoever reads holds it for that long, and nobody while a file is written.
    end: Mutex<Option<Arc<File>>>,
    /// Since when the file has been taking one piece.
    taking: Mutex<Option<Instant>>,
}

impl Outlet {
    fn of(end: File) -> Outlet {
        Outlet { end: Mutex::new(Some(Arc::new(end))), taking: Mutex::default() }
    }

    /// Nobody reads from it any more, but for a read that has begun: that ends with what QEMU writes next, or closes.
    fn close(&self) {
        lock(&self.end).take();
    }

    /// Returns once the file has taken nothing for so long.
    async fn until_stuck(&self, patience: Duration, look: Duration) {
        while lock(&self.taking).is_none_or(|since| since.elapsed() < patience) {
            tokio::time::sleep(look).await;
        }
    }
}

/// What the thread reads.
struct Source<'a>(&'a Outlet);

impl Read for Source<'_> {
    fn read(&mut self, piece: &mut [u8]) -> io::Result<usize> {
        let end = lock(&self.0.end).clone();
        end.ok_or(io::ErrorKind::BrokenPipe)?.as_ref().read(piece)
    }
}

/// What it writes.
struct Sink<'a, W>(&'a Outlet, W);

impl<W: Write> Write for Sink<'_, W> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        *lock(&self.0.taking) = Some(Instant::now());
        let taken = self.1.write(piece);
        *lock(&self.0.taking) = None;
        taken
    }

    fn flush(&mut self) -> io::Result<()> {
        self.1.flush()
    }
}

impl Operation {
    /// Has QEMU write its memory into `out` from `at` on, which is called `shown`, packed if it is to be. Where it is given up, because it is cancelled or the file takes
    /// nothing any more, the CPUs go on before this returns, if they are to.
    pub(super) async fn move_memory(
        &self,
        body: &Body,
        (out, at, shown): (&Out, u64, &Path),
        stream: Stream,
        zstd: Option<Zstd>,
        journal: &Arc<dyn Journal>,
    ) -> Result<Written, DriverError> {
        let (read, write, packer) = way(zstd)?;
        let (outlet, out) = (Arc::new(Outlet::of(File::from(read))), out.clone());
        // It has no limit in time but that each piece comes to its end, and QEMU its own.
        let unwanted = CancellationToken::new();
        let errand = Errand::new(self.machine.def.uuid, shown.display().to_string());
        let errand = Errand { limit: Duration::MAX, ..errand.until(&unwanted) };
        let (moves, what) = (outlet.clone(), shown.to_owned());
        let pumped = self.workers.run(errand, move |stop| {
            let writer = out.writer(at, stop).map_err(|e| stored(&what, &e));
            let moved = writer.and_then(|to| pump_until(&moves, to, &what, stop));
            moves.close();
            moved
        });
        let mut pumped = pin!(pumped);
        let mut sent = pin!(async {
            let (line, end) = (body.line()?, ClosedAside::of(write.into()));
            match stream {
                Stream::Machine { .. } => line.write_memory(end, journal).await,
                Stream::Memory(format) => line.dump_memory(format.as_str(), end, journal).await,
            }
        });
        let (mut moved, mut written) = (None, None);
        let why = loop {
            if let (Some(_), Some(_)) = (&moved, &written) {
                break None;
            }
            tokio::select! {
                done = &mut pumped, if moved.is_none() => moved = Some(done),
                done = &mut sent, if written.is_none() => written = Some(done),
                () = journal.cancelled().cancelled() => break Some(DriverError::Cancelled),
                () = outlet.until_stuck(PATIENCE, LOOK) => break Some(stuck(shown)),
            }
        };
        let why = match (why, moved, written) {
            (None, Some(moved), Some(written)) => return is_packed(packer, why_not(moved, written)).await,
            (why, moved, written) => {
                outlet.close();
                // QEMU writes to that one, which may hold much that nobody reads.
                drop(packer);
                // It ends with QEMU's write, and what is asked next waits for its answer.
                if written.is_none() {
                    let _ = sent.await;
                }
                self.let_go(body, stream).await?;
                unwanted.cancel();
                if moved.is_none() {
                    let _ = pumped.await;
                }
                why.unwrap_or(DriverError::Cancelled)
            }
        };
        Err(why)
    }

    /// Has QEMU end what nobody reads any more, and its guest go on.
    async fn let_go(&self, body: &Body, stream: Stream) -> Result<(), DriverError> {
        match stream {
            Stream::Machine { resume } => {
                body.line()?.end_migration().await?;
                self.go_on(resume).await
            }
            Stream::Memory(_) => self.dump_ends().await,
        }
    }
}

/// The end that we read, the one that QEMU writes to, and who packs what goes through.
fn way(zstd: Option<Zstd>) -> Result<(OwnedFd, OwnedFd, Option<Tool>), DriverError> {
    let (read, write) = packed::ends()?;
    // An unprivileged user may have had all that they may have.
    let _ = fcntl_setpipe_size(&write, PIPE);
    let Some(zstd) = zstd else { return Ok((read, write, None)) };
    let (ready, to) = packed::ends()?;
    Ok((ready, write, Some(zstd.start(false, read, to)?)))
}

/// What has been moved is whole only if who packs it has come to its end.
async fn is_packed(packer: Option<Tool>, moved: Result<Written, DriverError>) -> Result<Written, DriverError> {
    let Some(packer) = packer else { return moved };
    match packer.succeeds().await {
        true => moved,
        false => moved.and(Err(DriverError::Hypervisor("zstd could not pack the memory".to_owned()))),
    }
}

/// What came of both ends.
fn why_not(pumped: Result<Written, DriverError>, sent: Result<(), DriverError>) -> Result<Written, DriverError> {
    match (pumped, sent) {
        (Ok(moved), Ok(())) => Ok(moved),
        // QEMU only sees that nobody reads any more.
        (Err(why), Err(DriverError::Hypervisor(_)) | Ok(())) => Err(why),
        (_, Err(why)) => Err(why),
    }
}

fn stuck(file: &Path) -> DriverError {
    let (file, seconds) = (file.display(), PATIENCE.as_secs());
    DriverError::TimedOut(format!("{file}: its file system has taken nothing for {seconds} s; choose another one"))
}

/// Moves memory on until it ends, or nobody wants it any more.
fn pump_until(outlet: &Outlet, to: impl Write, what: &Path, stop: &Stop) -> Result<Written, DriverError> {
    enum Why {
        Io(io::Error),
        Stopped(DriverError),
    }
    impl From<io::Error> for Why {
        fn from(error: io::Error) -> Why {
            Why::Io(error)
        }
    }
    let moved = pump(&mut Source(outlet), &mut Sink(outlet, to), |_| stop.check().map_err(Why::Stopped));
    moved.map_err(|why| match why {
        Why::Stopped(error) => error,
        Why::Io(error) => match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                DriverError::NoSpace(format!("{}: {error}", what.display()))
            }
            _ => stored(what, &error),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (File, File) {
        let (read, write) = rustix::pipe::pipe().unwrap();
        (File::from(read), File::from(write))
    }

    /// Finding 3: the thread is held by its file, and QEMU's write ends all the same.
    #[tokio::test]
    async fn who_writes_is_let_go_though_the_file_takes_nothing() {
        let (memory, mut qemu) = pair();
        // A file that takes nothing: a pipe that nobody reads.
        let (held, file) = pair();
        let outlet = Arc::new(Outlet::of(memory));
        let moves = outlet.clone();
        let thread = std::thread::spawn(move || pump_until(&moves, file, Path::new("/dead"), &Stop::default()));
        let writing = std::thread::spawn(move || {
            loop {
                if let Err(error) = qemu.write_all(&[7; 4096]) {
                    return error.kind();
                }
            }
        });
        outlet.until_stuck(Duration::from_millis(20), Duration::from_millis(1)).await;
        assert!(!writing.is_finished(), "it waits for somebody to read");
        outlet.close();
        assert_eq!(writing.join().unwrap(), io::ErrorKind::BrokenPipe);
        assert!(!thread.is_finished(), "the file still takes nothing");
        drop(held);
        thread.join().unwrap().unwrap_err();
    }
}
