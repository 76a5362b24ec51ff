//! Lines that a client has just left. They stay open for a while, read by nobody, and the next client takes them over: a
//! hypervisor that sees a line closed may look only now and then whether somebody has opened it again, and what is typed
//! waits for so long.

use super::talk::drain;
use super::{Stream, is_closed};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::JoinHandle;

/// How long a line stays open that a client has left. Long enough for a hypervisor that looks once a second to hear what was
/// typed last; not for ever, as whoever else opens the terminal is to hear it all.
const KEPT: Duration = Duration::from_secs(5);

/// Those of a guest, by its consoles.
#[derive(Clone, Default)]
pub struct Lines(Arc<Mutex<HashMap<String, Kept>>>);

struct Kept {
    line: Arc<Stream>,
    drained: JoinHandle<()>,
}

impl Lines {
    /// Takes that console's line over, if it is open still.
    pub async fn take(&self, console: &str) -> Option<Arc<Stream>> {
        let Kept { line, drained } = self.all().remove(console)?;
        drained.abort();
        // Afterwards nobody else reads what the guest says.
        let _ = drained.await;
        (!is_closed(&line)).then_some(line)
    }

    /// Keeps a line open until it is taken, its other end is closed, or time is up. Within the runtime.
    pub fn keep(&self, console: &str, line: Arc<Stream>) {
        let (lines, name, kept) = (self.clone(), console.to_owned(), line.clone());
        let mut all = self.all();
        let drained = tokio::spawn(async move {
            let _ = tokio::time::timeout(KEPT, drain(&kept, |_| true)).await;
            lines.close(&name, &kept);
        });
        all.insert(console.to_owned(), Kept { line, drained });
    }

    /// There is no such console any more.
    pub fn forget(&self, console: &str) {
        if let Some(kept) = self.all().remove(console) {
            kept.drained.abort();
        }
    }

    fn close(&self, console: &str, line: &Arc<Stream>) {
        let mut all = self.all();
        if all.get(console).is_some_and(|kept| Arc::ptr_eq(&kept.line, line)) {
            all.remove(console);
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::stream;
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    fn line() -> (Arc<Stream>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Arc::new(stream(ours.into()).unwrap()), theirs)
    }

    #[tokio::test]
    async fn a_line_is_taken_over_once_and_is_closed_when_it_is_forgotten() {
        let lines = Lines::default();
        let (line, mut guest) = line();
        lines.keep("serial0", line.clone());
        assert!(lines.take("serial1").await.is_none());
        let taken = lines.take("serial0").await.unwrap();
        assert!(Arc::ptr_eq(&taken, &line) && lines.take("serial0").await.is_none());
        drop((line, taken));
        assert_eq!(guest.read(&mut [0]).unwrap(), 0, "nobody has it any more");

        let (line, mut guest) = self::line();
        lines.keep("serial0", line);
        lines.forget("serial0");
        assert!(lines.take("serial0").await.is_none());
        tokio::task::spawn_blocking(move || assert_eq!(guest.read(&mut [0]).unwrap(), 0)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_said_meanwhile_is_read_and_the_line_is_closed_in_the_end() {
        let lines = Lines::default();
        let (line, mut guest) = line();
        lines.keep("serial0", line);
        guest.write_all(&[b'.'; 4096]).unwrap();
        tokio::time::sleep(KEPT * 2).await;
        assert!(lines.take("serial0").await.is_none());
    }
}
