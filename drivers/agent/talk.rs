//! One talk with an agent: begun by making sure that what is heard answers what is asked, bounded in time and size, and alone.
//!
//! ```text
//!  turn ─▶ connection ─▶ 0xff, guest-sync-delimited n ─▶ all before 0xff n is of an earlier talk ─▶ requests and answers
//! ```
//!
//! Whoever is in the guest decides what is said, how much, and when. A talk that fails, or is given up, hangs up; the next one
//! begins anew and hears nothing of it.

use super::told;
use crate::host::workers::blocking;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, OwnedMutexGuard, Semaphore, SemaphorePermit, watch};
use tokio::time::{Instant, timeout_at};
use virt_model::driver::DriverError;
use virt_model::xml::shorten;

/// How long an agent may take to say that it is there, the wait for an earlier talk's end among it.
pub const HELLO: Duration = Duration::from_secs(5);
/// So much is listened to at most until an answer is there, in bytes, where it is handed on as it is.
const LONGEST: u64 = 4 << 20;
/// The same where it is understood: that takes a multiple of it.
const LONGEST_TOLD: u64 = 1 << 20;
/// So many answers that are longer are heard or kept at once, of all guests.
static ROOM: Semaphore = Semaphore::const_new(1);
/// The end of whatever half line is left of an earlier talk, in both directions.
const SENTINEL: u8 = 0xff;

/// The turns of those who talk with one agent.
#[derive(Debug, Default)]
pub struct Turns {
    turn: Arc<Mutex<()>>,
    urgent: watch::Sender<u32>,
}

/// How long a talk may take.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// In all.
    within: Duration,
    /// Until the agent is heard, the wait for an earlier talk's end among it.
    patience: Duration,
    /// It cannot wait: the talk that is under way is given up, and those that wait begin none.
    urgent: bool,
}

impl Terms {
    /// What is usual.
    pub fn within(within: Duration) -> Terms {
        Terms { within, patience: HELLO, urgent: false }
    }

    /// The agent is given up soon.
    pub fn soon(self, patience: Duration) -> Terms {
        Terms { patience, ..self }
    }

    /// For what cannot wait.
    pub fn urgent(self) -> Terms {
        Terms { patience: 2 * HELLO, urgent: true, ..self }
    }
}

/// A talk.
#[derive(Debug)]
pub struct Talk {
    stream: BufReader<UnixStream>,
    until: Instant,
    /// Counts those who cannot wait for its end.
    urgent: watch::Receiver<u32>,
    _turn: OwnedMutexGuard<()>,
}

/// The room that a long answer takes, while it is held.
pub type Room = Option<SemaphorePermit<'static>>;

/// How much is listened to.
struct Ear {
    /// In bytes.
    left: u64,
    /// So much more once there is room for that.
    more: u64,
    room: Room,
}

impl Ear {
    fn of(left: u64) -> Ear {
        Ear { left, more: 0, room: None }
    }
}

/// Somebody who cannot wait, for as long as they do.
struct Urgent<'a>(&'a watch::Sender<u32>);

impl Drop for Urgent<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|waiting| *waiting -= 1);
    }
}

/// A command of a client's, as it is sent.
#[derive(Debug)]
pub struct Command {
    name: String,
    line: String,
}

/// An answer: what is returned, or why nothing is.
#[derive(Deserialize)]
struct Answer<T> {
    #[serde(rename = "return")]
    value: Option<T>,
    error: Option<Failure>,
}

#[derive(Deserialize)]
struct Failure {
    class: Option<String>,
    desc: Option<String>,
}

impl Command {
    /// Reads a command that somebody gave. Error: `Argument` if it is none.
    pub fn read(text: &str) -> Result<Command, DriverError> {
        let refuse = |why: String| Err(DriverError::Argument(format!("this is no command for a guest agent: {why}")));
        let command: Value = match serde_json::from_str(text) {
            Ok(command) => command,
            // Where it is wrong is told, and nothing of what it says: there may be passwords in it.
            Err(error) => return refuse(format!("it is no JSON (line {}, column {})", error.line(), error.column())),
        };
        let Some(members) = command.as_object() else { return refuse("it is no JSON object".to_owned()) };
        if let Some(key) = members.keys().find(|key| !matches!(key.as_str(), "execute" | "arguments")) {
            return refuse(format!("it has 'execute' and 'arguments', and no '{}'", shorten(key)));
        }
        match command["execute"].as_str() {
            Some(name) => Ok(Command { name: shorten(name), line: command.to_string() }),
            None => refuse("'execute' is to be its name".to_owned()),
        }
    }
}

impl Turns {
    /// Waits for the turn.
    async fn take(&self, urgent: bool, until: Instant) -> Result<OwnedMutexGuard<()>, DriverError> {
        let _urgent = urgent.then(|| {
            self.urgent.send_modify(|waiting| *waiting += 1);
            Urgent(&self.urgent)
        });
        let turn = timeout_at(until, self.turn.clone().lock_owned()).await;
        turn.ok().filter(|_| urgent || *self.urgent.borrow() == 0).ok_or_else(|| {
            let text = "the guest agent is busy with another command; try again when that has ended";
            DriverError::TimedOut(text.to_owned())
        })
    }
}

impl Talk {
    /// Begins to talk when it is our turn; `reach` connects. Error: `AgentUnavailable` if none answers, `TimedOut` if another talk
    /// does not end.
    pub async fn begin(
        turns: &Turns,
        reach: impl Future<Output = Result<UnixStream, DriverError>>,
        terms: Terms,
    ) -> Result<Talk, DriverError> {
        let Terms { within, patience, urgent } = terms;
        let (until, heard_by) = (Instant::now() + within, Instant::now() + patience.min(within));
        let turn = turns.take(urgent, heard_by).await?;
        let hello = async {
            let stream = BufReader::new(reach.await?);
            let mut talk = Talk { stream, until, urgent: turns.urgent.subscribe(), _turn: turn };
            talk.synchronise().await?;
            Ok(talk)
        };
        timeout_at(heard_by, hello).await.unwrap_or_else(|_| Err(silent()))
    }

    async fn synchronise(&mut self) -> Result<(), DriverError> {
        let number = number();
        let sync = json!({ "execute": "guest-sync-delimited", "arguments": { "id": number } }).to_string();
        self.send(&[&[SENTINEL], sync.as_bytes()].concat()).await?;
        let mut ear = Ear::of(LONGEST);
        loop {
            let line = self.line(&mut ear).await?;
            let Some(end) = line.iter().rposition(|byte| *byte == SENTINEL) else { continue };
            if answer::<u64>(&line[end + 1..]).is_some_and(|answer| answer.value == Some(number)) {
                return Ok(());
            }
        }
    }

    /// Asks; returns what it returns. Error: `TimedOut`, after which the talk is of no use.
    pub async fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, DriverError> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        let mut ear = Ear::of(LONGEST_TOLD);
        let line = self.exchange(command, &line, &mut ear, |line| answer::<Value>(line).is_some()).await?;
        let told = answer::<Value>(&line).ok_or_else(silent)?;
        told.result()
    }

    /// Asks what may be answered at length, up to so many bytes; returns what it returns, with the room that it takes. The talk is
    /// at its end.
    pub async fn ask_at_length<T: DeserializeOwned + Send + 'static>(
        mut self,
        command: &str,
        arguments: Value,
        longest: u64,
    ) -> Result<(T, Room), DriverError> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        let mut ear = Ear { more: longest.saturating_sub(LONGEST_TOLD), ..Ear::of(LONGEST_TOLD) };
        // What is long is read once, and not by the runtime.
        let is_answer = |line: &[u8]| line.len() as u64 > LONGEST_TOLD || answer::<T>(line).is_some();
        let line = self.exchange(command, &line, &mut ear, is_answer).await?;
        drop(self);
        let read = move || answer::<T>(&line);
        let told = if ear.room.is_some() { blocking(read).await? } else { read() };
        Ok((told.ok_or_else(silent)?.result()?, ear.room))
    }

    /// Asks what a client asks; returns the whole answer as it is.
    pub async fn hand_on(&mut self, command: &Command) -> Result<String, DriverError> {
        // What is only handed on is not understood: nothing is made of it, however deep it is.
        let is_answer = |line: &[u8]| str::from_utf8(line).is_ok() && answer::<IgnoredAny>(line).is_some();
        let line = self.exchange(&command.name, &command.line, &mut Ear::of(LONGEST), is_answer).await?;
        answer::<IgnoredAny>(&line).ok_or_else(silent)?.result()?;
        let text = String::from_utf8(line).map_err(|_| silent())?;
        Ok(text.trim().to_owned())
    }

    /// Asks what is answered only if it fails, and waits until that is known: what is asked next is answered, or the agent has gone,
    /// or says nothing for as long as `patience`.
    pub async fn tell(mut self, command: &str, arguments: Value, patience: Duration) -> Result<(), DriverError> {
        let next = number();
        let lines = [
            json!({ "execute": command, "arguments": arguments }),
            json!({ "execute": "guest-sync", "arguments": { "id": next } }),
        ];
        let until = self.until.min(Instant::now() + patience);
        let heard = timeout_at(until, async {
            self.send(lines.map(|line| line.to_string()).join("\n").as_bytes()).await?;
            let mut ear = Ear::of(LONGEST_TOLD);
            loop {
                // One that has gone does what it was asked.
                let Ok(line) = self.line(&mut ear).await else { return Ok(()) };
                match answer::<Value>(&line) {
                    Some(Answer { error: Some(failure), .. }) => return Err(failure.told()),
                    Some(Answer { value: Some(value), .. }) if value == json!(next) => return Ok(()),
                    _ => {}
                }
            }
        });
        heard.await.unwrap_or(Ok(()))
    }

    /// Sends a request and returns the first line that answers; others mean nothing.
    async fn exchange(
        &mut self,
        command: &str,
        request: &str,
        ear: &mut Ear,
        is_answer: impl Fn(&[u8]) -> bool,
    ) -> Result<Vec<u8>, DriverError> {
        let late = |_| {
            let text = format!("the guest agent did not answer '{command}' in time, and may still do it");
            Err(DriverError::TimedOut(text))
        };
        let mut urgent = self.urgent.clone();
        let (until, exchange) = (self.until, self.exchange_alone(request, ear, is_answer));
        tokio::select! {
            answer = timeout_at(until, exchange) => answer.unwrap_or_else(late),
            Ok(_) = urgent.wait_for(|waiting| *waiting > 0) => {
                let text = format!("'{command}' was given up, as the guest's file systems are to be thawed; it may still be done");
                Err(DriverError::TimedOut(text))
            }
        }
    }

    async fn exchange_alone(
        &mut self,
        request: &str,
        ear: &mut Ear,
        is_answer: impl Fn(&[u8]) -> bool,
    ) -> Result<Vec<u8>, DriverError> {
        self.send(request.as_bytes()).await?;
        loop {
            let line = self.line(ear).await?;
            if is_answer(&line) {
                return Ok(line);
            }
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), DriverError> {
        let sent = self.stream.get_mut().write_all(&[bytes, b"\n"].concat()).await;
        sent.map_err(|e| gone(format!("the guest agent cannot be asked: {e}")))
    }

    /// The next line.
    async fn line(&mut self, ear: &mut Ear) -> Result<Vec<u8>, DriverError> {
        let mut line = Vec::new();
        loop {
            let read = (&mut self.stream).take(ear.left).read_until(b'\n', &mut line).await;
            ear.left -= read.map_err(|e| gone(format!("the guest agent cannot be heard: {e}")))? as u64;
            match (line.last(), ear.left) {
                (Some(b'\n'), _) => return Ok(line),
                (_, 0) if ear.more > 0 => {
                    ear.room = ROOM.acquire().await.ok();
                    ear.left = std::mem::take(&mut ear.more);
                }
                (_, 0) => {
                    let text = "the guest agent says more than is listened to, and no answer: look after qemu-guest-agent in the guest";
                    return Err(gone(text.to_owned()));
                }
                (None, _) => return Err(gone("the guest agent has gone".to_owned())),
                (Some(_), _) => return Err(gone("the guest agent has gone in the midst of an answer".to_owned())),
            }
        }
    }
}

impl<T> Answer<T> {
    fn result(self) -> Result<T, DriverError> {
        match (self.error, self.value) {
            (Some(failure), _) => Err(failure.told()),
            (None, value) => value.ok_or_else(silent),
        }
    }
}

impl Failure {
    fn told(self) -> DriverError {
        let [class, text] = [self.class, self.desc].map(|text| told::plain(&text.unwrap_or_default()));
        DriverError::AgentFailed { class, text }
    }
}

/// An answer that is one; anything else means nothing.
fn answer<T: DeserializeOwned>(line: &[u8]) -> Option<Answer<T>> {
    let answer: Answer<T> = serde_json::from_slice(line).ok()?;
    (answer.value.is_some() || answer.error.is_some()).then_some(answer)
}

/// A number that no earlier talk had.
fn number() -> u64 {
    // Agents read it as an int64.
    u64::from(uuid::Uuid::new_v4().as_u128() as u32)
}

fn silent() -> DriverError {
    let text = "no guest agent answers: install qemu-guest-agent in the guest and let it run, or look after it there";
    gone(text.to_owned())
}

fn gone(why: String) -> DriverError {
    DriverError::AgentUnavailable(why)
}
