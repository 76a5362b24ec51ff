//! The agent of a guest in memory: it speaks the agents' protocol, and does what makes sense of a guest that is none. One is there
//! where the definition has a channel for it, as long as the guest runs.

use super::guest::{Asked, Machine};
use crate::agent::talk::HELLO;
use crate::agent::{Line, Talk, Terms, no_channel, not_connected};
use crate::base64;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use virt_model::driver::DriverError;

/// File systems that such a guest has.
const MOUNTED: [&str; 2] = ["/", "/home"];

/// Programs that such a guest has, which print nothing: each ends with its place here, but the last.
const SILENT: [&str; 3] = ["true", "false", "sleep"];
/// What programs have printed is kept of so many.
const KEPT: usize = 64;

/// What an agent answers.
enum Answer {
    Return(Value),
    Error(&'static str, String),
    Nothing,
}

#[async_trait]
impl Line for Arc<Machine> {
    async fn talk(&self, terms: Terms) -> Result<Talk, DriverError> {
        if !self.has_agent() {
            return Err(no_channel());
        }
        if !self.lives() {
            return Err(DriverError::Gone);
        }
        if !self.agent_is_connected() {
            return Err(not_connected());
        }
        let machine = self.clone();
        let reach = async {
            let pair = UnixStream::pair();
            let (ours, theirs) = pair.map_err(|error| DriverError::AgentUnavailable(error.to_string()))?;
            tokio::spawn(serve(machine, theirs));
            Ok(ours)
        };
        Talk::begin(self.turns(), reach, terms).await
    }

    async fn is_cut_off(&self) {
        // It hangs up itself.
        std::future::pending().await
    }

    async fn has_ended(&self) {
        self.has_gone().await;
    }

    fn is_frozen(&self) -> bool {
        self.kept_frozen()
    }

    async fn keep_frozen(&self, frozen: bool) -> Result<(), DriverError> {
        self.set_kept_frozen(frozen);
        Ok(())
    }
}

/// Serves one talk to its end.
async fn serve(machine: Arc<Machine>, stream: UnixStream) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match stream.read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        // A guest that sleeps or has powered off hears nothing; one that stands answers when it goes on.
        let on = tokio::time::timeout(2 * HELLO, machine.goes_on());
        if machine.listens().await.is_err() || on.await != Ok(true) {
            return;
        }
        let text = line.strip_prefix(b"\xff").unwrap_or(&line);
        let request: Value = serde_json::from_slice(text).unwrap_or_default();
        let command = request["execute"].as_str().unwrap_or_default();
        let answer = match answer(&machine, command, &request["arguments"]) {
            Answer::Return(value) => json!({ "return": value }),
            Answer::Error(class, desc) => json!({ "error": { "class": class, "desc": desc } }),
            Answer::Nothing => continue,
        };
        let sentinel = if command == "guest-sync-delimited" { &b"\xff"[..] } else { b"" };
        let said = [sentinel, answer.to_string().as_bytes(), b"\n"].concat();
        if stream.get_mut().write_all(&said).await.is_err() {
            return;
        }
    }
}

fn answer(machine: &Machine, command: &str, arguments: &Value) -> Answer {
    let frozen = machine.frozen();
    let while_frozen = ["guest-sync", "guest-sync-delimited", "guest-ping", "guest-info", "guest-fsfreeze-thaw"];
    if frozen > 0 && !while_frozen.contains(&command) {
        return Answer::Error("GenericError", format!("Command {command} has been disabled: file systems are frozen"));
    }
    Answer::Return(match command {
        "guest-sync" | "guest-sync-delimited" => arguments["id"].clone(),
        "guest-ping" => json!({}),
        "guest-info" => json!({ "version": "7.2.0", "supported_commands": [] }),
        "guest-get-osinfo" => json!({ "id": "test", "name": "Test", "pretty-name": "Test 1", "version-id": "1" }),
        "guest-get-host-name" => json!({ "host-name": machine.name() }),
        "guest-get-timezone" => json!({ "zone": "UTC", "offset": 0 }),
        "guest-get-users" => json!([{ "user": "test", "login-time": 1.5 }]),
        "guest-get-fsinfo" => {
            MOUNTED.iter().map(|place| json!({ "name": "vda1", "mountpoint": place, "type": "test" })).collect()
        }
        "guest-network-get-interfaces" => interfaces(machine),
        "guest-get-time" => json!(nanoseconds(machine)),
        "guest-set-time" => set_time(machine, arguments),
        "guest-set-user-password" if arguments["username"] == "test" => json!({}),
        "guest-set-user-password" => return Answer::Error("GenericError", "there is only the user test".to_owned()),
        "guest-fsfreeze-freeze" => json!(machine.freeze(MOUNTED.len())),
        "guest-fsfreeze-freeze-list" => {
            let wanted = arguments["mountpoints"].as_array().map(Vec::as_slice).unwrap_or_default();
            json!(machine.freeze(MOUNTED.iter().filter(|place| wanted.contains(&json!(place))).count()))
        }
        "guest-fsfreeze-thaw" => {
            machine.freeze(0);
            json!(frozen)
        }
        "guest-exec" => match begin(machine, arguments) {
            Some(number) => json!({ "pid": number }),
            None => return Answer::Error("GenericError", "there is no such program".to_owned()),
        },
        "guest-exec-status" => match arguments["pid"].as_u64() {
            // It sleeps for ever.
            Some(2) => json!({ "exited": false }),
            Some(number) if number > 2 => match machine.printed().remove(&number) {
                Some(printed) if printed.is_empty() => json!({ "exited": true, "exitcode": 0 }),
                Some(printed) => json!({ "exited": true, "exitcode": 0, "out-data": base64::encode(&printed) }),
                None => return Answer::Error("GenericError", "there is no such process".to_owned()),
            },
            status => json!({ "exited": true, "exitcode": status }),
        },
        "guest-fstrim" => json!({ "paths": MOUNTED.map(|place| json!({ "path": place, "trimmed": 0 })) }),
        "guest-shutdown" => {
            machine.is_asked(if arguments["mode"] == "reboot" { Asked::Reboot } else { Asked::Shutdown });
            return Answer::Nothing;
        }
        "guest-suspend-ram" => {
            machine.fall_asleep();
            return Answer::Nothing;
        }
        _ => return Answer::Error("CommandNotFound", format!("The command {command} has not been found")),
    })
}

/// Runs a program, if there is one of that name; its number. What `echo` and `cat` print is there at once.
fn begin(machine: &Machine, arguments: &Value) -> Option<u64> {
    let name = arguments["path"].as_str()?.rsplit('/').next()?;
    let printed = match name {
        "echo" => {
            let words = arguments["arg"].as_array().map(Vec::as_slice).unwrap_or_default();
            let words: Vec<_> = words.iter().filter_map(Value::as_str).collect();
            (words.join(" ") + "\n").into_bytes()
        }
        "cat" => base64::decode(arguments["input-data"].as_str().unwrap_or_default(), usize::MAX)?.0,
        silent => return SILENT.iter().position(|program| *program == silent).map(|number| number as u64),
    };
    let mut kept = machine.printed();
    let number = kept.last_key_value().map_or(3, |(last, _)| last + 1);
    kept.insert(number, if arguments["capture-output"] == true { printed } else { Vec::new() });
    if kept.len() > KEPT {
        kept.pop_first();
    }
    Some(number)
}

/// Its cards, with an address for each.
fn interfaces(machine: &Machine) -> Value {
    let cards = machine.macs().iter().enumerate();
    let each = cards.map(|(number, mac)| {
        let address =
            json!({ "ip-address": format!("192.0.2.{}", number + 1), "ip-address-type": "ipv4", "prefix": 24 });
        json!({ "name": format!("eth{number}"), "hardware-address": mac, "ip-addresses": [address] })
    });
    each.collect()
}

/// What its clock says: that of the host, and by how much it was set ahead of that.
fn nanoseconds(machine: &Machine) -> i64 {
    host_nanoseconds().saturating_add(machine.clock_ahead())
}

fn host_nanoseconds() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

fn set_time(machine: &Machine, arguments: &Value) -> Value {
    let ahead = arguments["time"].as_i64().map(|time| time.saturating_sub(host_nanoseconds()));
    machine.set_clock_ahead(ahead.unwrap_or_default());
    json!({})
}
