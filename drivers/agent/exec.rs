//! A program that an agent runs in its guest, with what it reads and prints:
//!
//! ```text
//!  stdin, read to its end ─▶ guest-exec ─▶ guest-exec-status, until it has ended ─▶ what it has printed, written
//! ```
//!
//! An agent takes all that a program reads at once, and gives what it has printed when it has ended. The agent is nobody's while a
//! client's file is waited for.

use super::talk::Room;
use super::{Agent, LOOKS, Line, SOON, Terms, USUAL, told};
use crate::base64;
use crate::host::given::{self, Patience, Use};
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde_json::json;
use std::fmt;
use std::io;
use std::time::Duration;
use tokio::time::sleep;
use virt_model::driver::agent::Program;
use virt_model::driver::{DriverError, GivenFile};

/// So much a program is given to read at most, in bytes.
const MOST_INPUT: usize = 1 << 20;
/// So much is kept of what it has printed on either, as agents do.
const MOST_OUTPUT: usize = 16 << 20;
/// The longest answer with both of that.
const LONGEST: u64 = 2 * (MOST_OUTPUT as u64 / 3 * 4) + (64 << 10);
/// How long a client may leave that unread.
const UNREAD: Patience = Patience { next: Duration::from_secs(30), all: Duration::from_secs(120) };

/// What an agent says of a program.
#[derive(serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Status {
    exited: bool,
    exitcode: Option<i64>,
    signal: Option<i64>,
    #[serde(default)]
    out_data: Printed,
    #[serde(default)]
    err_data: Printed,
    #[serde(default)]
    out_truncated: bool,
    #[serde(default)]
    err_truncated: bool,
}

/// What a program has printed, and whether that is all.
struct Printed {
    bytes: Vec<u8>,
    is_all: bool,
}

impl Default for Printed {
    fn default() -> Printed {
        Printed { bytes: Vec::new(), is_all: true }
    }
}

impl<'de> Deserialize<'de> for Printed {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Printed, D::Error> {
        struct Base64;
        impl Visitor<'_> for Base64 {
            type Value = Printed;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("base64")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Printed, E> {
                let (bytes, is_all) = base64::decode(text, MOST_OUTPUT).ok_or_else(|| E::custom("it is no base64"))?;
                Ok(Printed { bytes, is_all })
            }
        }
        from.deserialize_str(Base64)
    }
}

/// Where what a program prints goes.
struct Outlet {
    name: &'static str,
    file: Option<GivenFile>,
}

impl Outlet {
    fn new(name: &'static str, file: Option<GivenFile>) -> Result<Outlet, DriverError> {
        checked(name, file.as_ref(), Use::Write)?;
        Ok(Outlet { name, file })
    }

    /// Writes that. A client that has closed its end wants no more.
    async fn write(self, printed: Printed, status: i32) -> Result<(), DriverError> {
        let Some(file) = self.file else { return Ok(()) };
        let name = self.name;
        match given::write_all(file, printed.bytes, UNREAD).await {
            Ok(()) if !printed.is_all => Err(DriverError::AgentFailed {
                class: "OutputTruncated".to_owned(),
                text: format!(
                    "{name} is cut off, as no more than {MOST_OUTPUT} bytes are kept; the program ended with {status}"
                ),
            }),
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                let text = format!(
                    "nobody reads {name} any more, and the rest of it is lost; the program ended with {status}"
                );
                Err(DriverError::TimedOut(text))
            }
            Err(error) => {
                let text = format!("{name} cannot be written: {error}; the program ended with {status}");
                Err(DriverError::Storage(text))
            }
        }
    }
}

impl<L: Line> Agent<L> {
    /// Runs a program to its end; says how it ended.
    pub(super) async fn run_program(&self, program: Program) -> Result<i32, DriverError> {
        let Program { argv, env, stdin, stdout, stderr } = program;
        let (stdout, stderr) = (Outlet::new("stdout", stdout)?, Outlet::new("stderr", stderr)?);
        let captures = stdout.file.is_some() || stderr.file.is_some();
        let input = match stdin {
            None => Vec::new(),
            Some(file) => tokio::select! {
                input = read(file) => input?,
                () = self.0.has_ended() => return Err(DriverError::Gone),
            },
        };
        let process = self.begin(&argv, &env, &input, captures).await?;
        drop(input);
        let (mut ended, _room) = self.end_of(process, captures).await?;
        let status = told::exit_status(ended.exitcode, ended.signal);
        ended.out_data.is_all &= !ended.out_truncated;
        ended.err_data.is_all &= !ended.err_truncated;
        // Each as far as it goes, whatever becomes of the other.
        let (out, err) = tokio::join!(stdout.write(ended.out_data, status), stderr.write(ended.err_data, status));
        out.and(err).map(|()| status)
    }

    /// The number of what is begun.
    async fn begin(&self, argv: &[String], env: &[String], input: &[u8], captures: bool) -> Result<u64, DriverError> {
        let Some((program, rest)) = argv.split_first() else {
            return Err(DriverError::Argument("there is no program to be run".to_owned()));
        };
        let mut arguments = json!({ "path": program, "arg": rest });
        if !env.is_empty() {
            arguments["env"] = json!(env);
        }
        // One that is given nothing is at the end of that at once.
        if !input.is_empty() {
            arguments["input-data"] = base64::encode(input).into();
        }
        if captures {
            arguments["capture-output"] = true.into();
        }
        let begun = self.ask("guest-exec", arguments, USUAL).await?;
        let unknown = || DriverError::AgentUnavailable("the guest agent does not say what it has begun".to_owned());
        begun["pid"].as_u64().ok_or_else(unknown)
    }

    /// Waits for the end of a program.
    async fn end_of(&self, process: u64, captures: bool) -> Result<(Status, Room), DriverError> {
        let mut pause = LOOKS.0;
        loop {
            match self.status_of(process, captures).await {
                Ok((status, room)) if status.exited => return Ok((status, room)),
                // A guest that stands answers when it goes on.
                Ok(_) | Err(DriverError::TimedOut(_) | DriverError::AgentUnavailable(_)) => {}
                // While file systems are frozen an agent says nothing of it.
                Err(DriverError::AgentFailed { .. }) if self.0.is_frozen() => {}
                Err(error) => return Err(error),
            }
            // An agent tells of no end by itself.
            sleep(pause).await;
            pause = (pause * 2).min(LOOKS.1);
        }
    }

    /// Who else wants to talk waits longer than this does, but for what takes its time to be told.
    async fn status_of(&self, process: u64, captures: bool) -> Result<(Status, Room), DriverError> {
        let (within, longest) = if captures { (USUAL, LONGEST) } else { (SOON, 0) };
        let talk = self.0.talk(Terms::within(within).soon(SOON)).await?;
        talk.ask_at_length("guest-exec-status", json!({ "pid": process }), longest).await
    }
}

/// What a program is given to read.
async fn read(file: GivenFile) -> Result<Vec<u8>, DriverError> {
    checked("stdin", Some(&file), Use::Read)?;
    let input = given::read_all(file, MOST_INPUT).await;
    let input = input.map_err(|error| DriverError::Argument(format!("stdin cannot be read: {error}")))?;
    input.ok_or_else(|| {
        let text = format!("stdin has more than the {MOST_INPUT} bytes that a program can be given; nothing was run");
        DriverError::Argument(text)
    })
}

fn checked(name: &str, file: Option<&GivenFile>, what_for: Use) -> Result<(), DriverError> {
    let Some(file) = file else { return Ok(()) };
    let useless = |error| DriverError::Argument(format!("{name} is of no use: {error}; nothing was run"));
    given::check(file, what_for).map_err(useless)
}
