//! The wire to QEMU: lines of JSON over a Unix socket, replies to whoever asked, events to one listener in order.
//!
//! ```text
//!  execute() ──▶ queue ──▶ writer ──▶ socket ──▶ reader ──▶ reply: wakes the caller with that id
//!                                                       └──▶ event: Listener::event, before any later reply
//! ```
//!
//! The listener is called by the reader itself, so whatever a command causes has been heard before the command returns.
//! What cannot be understood is passed over: a reply nobody waits for, an event nobody knows, a line that is no JSON.
//!
//! QEMU may have been taken over by its guest, so what it can cost is bounded: a line in length, lines in number a second,
//! lines that are no JSON in all. Whoever goes beyond that is no QEMU, and the connection is given up, as at the end of the
//! stream: every caller is told, and the listener hears why.

use super::known::{ChangeOf, Holds, Known};
use crate::host::workers::ClosedAside;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use virt_model::driver::DriverError;

/// How long a command may take unless its caller says otherwise.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);
/// What has QEMU take commands.
const NEGOTIATE: &str = "qmp_capabilities";
/// The longest line that is read, in bytes: what a machine with some hundred images answers is shorter. Understood, a line
/// takes a multiple of that.
const MAX_LINE: usize = 4 << 20;
/// Lines without sense until the connection is given up.
const MAX_GARBAGE: usize = 100;
/// So many lines take this long at least; a QEMU that says more waits.
const PACE: (usize, Duration) = (1000, Duration::from_millis(200));
/// Commands that may wait for a socket that takes nothing.
const QUEUE: usize = 64;
/// File descriptors that can go with one command.
const MAX_FDS: usize = 4;

/// Why a command has no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    /// The connection has ended.
    #[error("the monitor connection is closed")]
    Closed,
    /// No answer in time; the connection can still be used.
    #[error("QEMU did not answer '{0}' in time")]
    TimedOut(String),
    /// QEMU says no.
    #[error("{command}: {message}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's own error class, e.g. `GenericError`.
        class: String,
        /// QEMU's own words.
        message: String,
    },
    /// The socket could not be reached, or what answered is not QMP.
    #[error("monitor: {0}")]
    Connect(String),
}

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// e.g. `SHUTDOWN`.
    pub name: String,
    /// Its `data`, null if it has none.
    pub data: Value,
}

/// Who hears events. Called by the reader: must not block.
pub trait Listener: Send + 'static {
    /// Something happened.
    fn event(&mut self, event: Event);
    /// The stream has ended, or was given up for what came; nothing follows.
    fn closed(&mut self, _why: Option<&str>) {}
}

/// A negotiated connection. Dropping it closes it.
pub struct Qmp {
    queue: mpsc::Sender<Outgoing>,
    waiting: Arc<Waiting>,
    known: Arc<Known>,
    next: AtomicU64,
    reader: AbortHandle,
}

/// A line on its way out.
struct Outgoing {
    line: Vec<u8>,
    fds: Vec<ClosedAside>,
}

/// Callers by id; `None` once the stream has ended.
struct Waiting(Mutex<Option<HashMap<u64, oneshot::Sender<Value>>>>);

impl Qmp {
    /// Connects to the socket at `path`, is greeted, and hears events from then on. `within` bounds all of it: a QEMU whose monitor
    /// is taken accepts the connection and says nothing. A QEMU that is just beginning greets long before it takes commands.
    pub async fn connect(path: &Path, listener: impl Listener, within: Duration) -> Result<Greeted, QmpError> {
        let stream =
            UnixStream::connect(path).await.map_err(|e| QmpError::Connect(format!("{}: {e}", path.display())))?;
        in_time("greeting", within, Qmp::greeted(stream, listener)).await
    }

    /// On a stream that stands, with a QEMU that takes commands by the time this returns.
    pub async fn negotiate(stream: UnixStream, listener: impl Listener, within: Duration) -> Result<Qmp, QmpError> {
        let hello = async { Qmp::greeted(stream, listener).await?.ready(within).await };
        in_time("greeting", within, hello).await
    }

    async fn greeted(stream: UnixStream, listener: impl Listener) -> Result<Greeted, QmpError> {
        let (read, write) = stream.into_split();
        let mut lines = Lines::new(read);
        greeting(&mut lines).await?;
        Ok(Greeted(Qmp::run(lines, write, listener)))
    }

    fn run(lines: Lines, write: OwnedWriteHalf, listener: impl Listener) -> Qmp {
        let waiting = Arc::new(Waiting(Mutex::new(Some(HashMap::new()))));
        let known = Arc::<Known>::default();
        let (queue, outgoing) = mpsc::channel(QUEUE);
        tokio::spawn(write_lines(write, outgoing));
        let reader = tokio::spawn(read_lines(lines, waiting.clone(), known.clone(), listener)).abort_handle();
        Qmp { queue, waiting, known, next: AtomicU64::new(1), reader }
    }

    /// Runs a command and returns its `return`.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, Vec::new(), COMMAND_TIMEOUT).await
    }

    /// As [`Qmp::execute`], with file descriptors that go along and a time of its own.
    pub async fn execute_with(
        &self,
        command: &str,
        arguments: Value,
        fds: Vec<ClosedAside>,
        within: Duration,
    ) -> Result<Value, QmpError> {
        in_time(command, within, async { self.send(command, arguments, fds).await?.answer().await }).await
    }

    /// Gives a command that QEMU does after all that it was given before, also where that was refused.
    pub async fn send<'a>(
        &'a self,
        command: &'a str,
        arguments: Value,
        fds: Vec<ClosedAside>,
    ) -> Result<Sent<'a>, QmpError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        let place = self.waiting.enter(id, reply)?;
        let line = line(command, arguments, id);
        let changes = (!Known::is_question(command)).then(|| Change::begin(&self.known, command));
        self.queue.send(Outgoing { line, fds }).await.map_err(|_| QmpError::Closed)?;
        Ok(Sent { command, answer, _place: place, _changes: changes })
    }

    /// What `read` finds in what QEMU says to a question, or has said while nothing changed that it was told or reports
    /// ([`Known`]) on which that depends.
    pub async fn known<T: Send + Sync + 'static>(
        &self,
        (question, arguments): (&str, Value),
        holds: Holds,
        within: Duration,
        read: impl FnOnce(&Value) -> T,
    ) -> Result<Arc<T>, QmpError> {
        let name = format!("{question} {arguments} {holds:?}");
        if let Some(answer) = self.known.answer(&name) {
            return Ok(answer);
        }
        let changes = self.known.changes(holds);
        let answer = self.execute_with(question, arguments, Vec::new(), within).await?;
        let read = Arc::new(read(&answer));
        self.known.keep(name, (holds, changes), &answer, read.clone());
        Ok(read)
    }

    /// Gives a command whose answer nobody waits for: QEMU does it before all that is given afterwards.
    pub async fn tell(&self, command: &str, arguments: Value) {
        let _changes = Change::begin(&self.known, command);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.known.unwaited(id, ChangeOf::by_command(command));
        let line = line(command, arguments, id);
        // Where the stream has ended, all who wait are told that.
        let _ = timeout(COMMAND_TIMEOUT, self.queue.send(Outgoing { line, fds: Vec::new() })).await;
    }
}

/// A connection over which no command has gone.
pub struct Greeted(Qmp);

impl Greeted {
    /// Waits until QEMU takes commands.
    pub async fn ready(self, within: Duration) -> Result<Qmp, QmpError> {
        self.0.execute_with(NEGOTIATE, json!({}), Vec::new(), within).await?;
        Ok(self.0)
    }

    /// Has QEMU take commands when it comes to that: what it is given until then it does then, in that order.
    pub async fn ready_in_time(self) -> Qmp {
        self.0.tell(NEGOTIATE, json!({})).await;
        self.0
    }
}

/// What `work` comes to, if that is in time. Error: `TimedOut` that names the command.
pub async fn in_time<T>(
    command: &str,
    within: Duration,
    work: impl Future<Output = Result<T, QmpError>>,
) -> Result<T, QmpError> {
    timeout(within, work).await.unwrap_or_else(|_| Err(QmpError::TimedOut(command.to_owned())))
}

/// A command that QEMU was given, and has not answered.
pub struct Sent<'a> {
    command: &'a str,
    answer: oneshot::Receiver<Value>,
    _place: Place<'a>,
    _changes: Option<Change<'a>>,
}

impl Sent<'_> {
    /// Its `return`.
    pub async fn answer(self) -> Result<Value, QmpError> {
        let reply = self.answer.await.map_err(|_| QmpError::Closed)?;
        result(self.command, reply)
    }
}

/// A command that may change something: what was known before it is sent, or while it is done, does not hold any more.
struct Change<'a>(&'a Known, ChangeOf);

impl<'a> Change<'a> {
    fn begin(known: &'a Known, command: &str) -> Self {
        let what = ChangeOf::by_command(command);
        known.changed(what);
        Change(known, what)
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.0.changed(self.1);
    }
}

/// A command as it is sent.
fn line(command: &str, arguments: Value, id: u64) -> Vec<u8> {
    let mut words = json!({ "execute": command, "id": id });
    // QEMU reads its monitor byte by byte: nothing is said of none.
    if arguments.as_object().is_none_or(|arguments| !arguments.is_empty()) {
        words["arguments"] = arguments;
    }
    format!("{words}\r\n").into_bytes()
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// What a reply says.
fn result(command: &str, mut reply: Value) -> Result<Value, QmpError> {
    match reply.get("error") {
        None => Ok(reply.get_mut("return").map(Value::take).unwrap_or_default()),
        Some(error) => {
            let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            Err(QmpError::Refused { command: command.to_owned(), class: text("class"), message: text("desc") })
        }
    }
}

impl Waiting {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<Value>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the reply `id`, until the place is dropped.
    fn enter(&self, id: u64, reply: oneshot::Sender<Value>) -> Result<Place<'_>, QmpError> {
        self.lock().as_mut().ok_or(QmpError::Closed)?.insert(id, reply);
        Ok(Place(self, id))
    }

    fn leave(&self, id: u64) -> Option<oneshot::Sender<Value>> {
        self.lock().as_mut()?.remove(&id)
    }
}

/// A caller's place among those who wait; leaves nothing behind when the caller gives up.
struct Place<'a>(&'a Waiting, u64);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}

async fn greeting(lines: &mut Lines) -> Result<(), QmpError> {
    let line = lines.next().await.map_err(|why| why.map_or(QmpError::Closed, QmpError::Connect))?;
    let greeting: Value =
        serde_json::from_slice(&line).map_err(|e| QmpError::Connect(format!("unexpected greeting: {e}")))?;
    match greeting.get("QMP") {
        Some(_) => Ok(()),
        None => Err(QmpError::Connect("what answers does not speak QMP".into())),
    }
}

/// Reads to the end, then tells everyone.
async fn read_lines(mut lines: Lines, waiting: Arc<Waiting>, known: Arc<Known>, mut listener: impl Listener) {
    let (mut garbage, mut read, mut since) = (0, 0, Instant::now());
    let why = loop {
        let line = match lines.next().await {
            Ok(line) => line,
            Err(why) => break why,
        };
        match serde_json::from_slice::<Value>(&line) {
            Ok(message) => take(message, &waiting, &known, &mut listener),
            Err(error) if garbage == 0 => {
                garbage += 1;
                tracing::warn!(%error, "a line from QEMU is not JSON; more of them are not told of");
            }
            Err(_) if garbage == MAX_GARBAGE => break Some(format!("more than {MAX_GARBAGE} lines are no JSON")),
            Err(_) => garbage += 1,
        }
        read += 1;
        if read % PACE.0 == 0 {
            tokio::time::sleep(PACE.1.saturating_sub(since.elapsed())).await;
            since = Instant::now();
        }
    };
    lines.close();
    waiting.lock().take();
    listener.closed(why.as_deref());
}

fn take(mut message: Value, waiting: &Waiting, known: &Known, listener: &mut impl Listener) {
    if let Some(name) = message.get("event").and_then(Value::as_str).map(str::to_owned) {
        let data = message.get_mut("data").map(Value::take).unwrap_or_default();
        known.changed(ChangeOf::by_event(&name, &data));
        tracing::trace!(%name, %data, "event");
        return listener.event(Event { name, data });
    }
    let id = message.get("id").and_then(Value::as_u64);
    match id.and_then(|id| waiting.leave(id)) {
        // The caller may have gone this very moment: then nobody wants to know.
        Some(reply) => drop(reply.send(message)),
        None => {
            // It may be that of a change which was given up.
            known.replied(id);
            tracing::debug!("a reply from QEMU that nobody waits for");
        }
    }
}

async fn write_lines(socket: OwnedWriteHalf, mut outgoing: mpsc::Receiver<Outgoing>) {
    while let Some(Outgoing { line, mut fds }) = outgoing.recv().await {
        let mut sent = 0;
        while sent < line.len() {
            let stream: &UnixStream = socket.as_ref();
            let chunk = || Ok(send(stream, &line[sent..], &fds)?);
            match stream.async_io(Interest::WRITABLE, chunk).await {
                Ok(count) => sent += count,
                Err(_) => return, // the reader sees the end too, and tells everyone
            }
            fds.clear();
        }
    }
}

/// Sends what fits; the descriptors go with the first byte.
fn send(stream: &UnixStream, bytes: &[u8], fds: &[ClosedAside]) -> rustix::io::Result<usize> {
    let borrowed: Vec<_> = fds.iter().take(MAX_FDS).filter_map(|fd| Some(fd.get().ok()?.as_fd())).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
    }
    sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
}

/// Cuts a stream into lines, each at most [`MAX_LINE`] long.
struct Lines {
    stream: OwnedReadHalf,
    buffer: Vec<u8>,
    /// Bytes of `buffer` known to hold no line end.
    seen: usize,
}

impl Lines {
    fn new(stream: OwnedReadHalf) -> Self {
        Lines { stream, buffer: Vec::new(), seen: 0 }
    }

    /// The next line that is not empty, without its end. Error: there is none any more, as half a line is none; and why, if
    /// it is not that the stream has ended.
    async fn next(&mut self) -> Result<Vec<u8>, Option<String>> {
        loop {
            while let Some(line) = self.cut() {
                if !line.is_empty() {
                    return Ok(line);
                }
            }
            if self.seen > MAX_LINE {
                return Err(Some(format!("a line is longer than {MAX_LINE} bytes")));
            }
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) | Err(_) => return Err(None),
                Ok(_) => {}
            }
        }
    }

    /// Ends the connection in both directions, so that nobody at its other end waits to be read.
    fn close(&self) {
        let stream: &UnixStream = self.stream.as_ref();
        if let Err(error) = rustix::net::shutdown(stream, rustix::net::Shutdown::Both) {
            tracing::debug!(%error, "a monitor's socket could not be closed");
        }
    }

    /// Takes the first whole line out of the buffer.
    fn cut(&mut self) -> Option<Vec<u8>> {
        let Some(end) = self.buffer[self.seen..].iter().position(|b| *b == b'\n').map(|at| at + self.seen) else {
            self.seen = self.buffer.len();
            return None;
        };
        let rest = self.buffer.split_off(end + 1);
        let mut line = std::mem::replace(&mut self.buffer, rest);
        self.seen = 0;
        line.truncate(line.trim_ascii_end().len());
        Some(line)
    }
}

/// A monitor's failure in the contract's words.
impl From<QmpError> for DriverError {
    fn from(error: QmpError) -> DriverError {
        match error {
            QmpError::Closed => DriverError::Gone,
            QmpError::TimedOut(_) => DriverError::TimedOut(error.to_string()),
            QmpError::Refused { .. } | QmpError::Connect(_) => DriverError::Hypervisor(error.to_string()),
        }
    }
}

#[cfg(test)]
#[path = "qmp_tests.rs"]
mod tests;
