//! The guest's agent, as far as it is needed here: it freezes file systems and thaws them.

use crate::qemu::peer;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use virt_model::device::chardev::CharKind;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;

/// The name of the agent's channel.
pub const CHANNEL: &str = "org.qemu.guest_agent.0";
/// How long an agent may take to say that it is there.
const HELLO: Duration = Duration::from_secs(5);
/// How long it may take to freeze: every file system is written out first.
const FREEZE: Duration = Duration::from_secs(60);

/// The longest answer that is listened to, in bytes: whoever is in the guest decides how much is said.
const LONGEST: u64 = 1 << 20;

/// An agent that answers.
pub struct Agent(BufReader<UnixStream>);

/// Where the agent of a live definition is reached.
pub fn socket(def: &DomainDef) -> Option<PathBuf> {
    let channels = &mut def.devices.channels.iter();
    let channel = channels.find(|channel| channel.target.name.as_deref() == Some(CHANNEL))?;
    (channel.source.kind == CharKind::Unix).then(|| channel.source.path().map(PathBuf::from))?
}

impl Agent {
    /// Reaches the agent by way of the guest's process `pid`, and makes sure that what it says is an answer to what is asked.
    pub async fn connect(path: &Path, pid: i32) -> Result<Agent, DriverError> {
        let stream = peer::connect(path, pid).await;
        let stream = stream.map_err(|e| DriverError::AgentUnavailable(e.to_string()))?;
        let mut agent = Agent(BufReader::new(stream));
        let number = u32::from(std::process::id() as u16) << 8 | 0x5a;
        let hello = async {
            // 0xff ends whatever half line is left of an earlier talk.
            agent.send(b"\xff").await?;
            agent
                .send(json!({ "execute": "guest-sync", "arguments": { "id": number } }).to_string().as_bytes())
                .await?;
            while agent.answer().await?["return"] != json!(number) {}
            Ok(())
        };
        match tokio::time::timeout(HELLO, hello).await {
            Ok(Ok(())) => Ok(agent),
            Ok(Err(e)) => Err(e),
            Err(_) => Err(DriverError::AgentUnavailable(
                "no guest agent is connected: install qemu-guest-agent in the guest and let it run".to_owned(),
            )),
        }
    }

    /// Freezes the guest's file systems.
    pub async fn freeze(&mut self) -> Result<(), DriverError> {
        self.ask("guest-fsfreeze-freeze").await
    }

    /// Thaws them.
    pub async fn thaw(&mut self) -> Result<(), DriverError> {
        self.ask("guest-fsfreeze-thaw").await
    }

    async fn ask(&mut self, command: &str) -> Result<(), DriverError> {
        let asked = async {
            self.send(json!({ "execute": command }).to_string().as_bytes()).await?;
            self.answer().await
        };
        let answer = tokio::time::timeout(FREEZE, asked).await;
        let answer = answer.map_err(|_| gone(format!("the guest agent did not answer '{command}' in time")))??;
        match answer["error"]["desc"].as_str() {
            None => Ok(()),
            Some(why) => Err(gone(format!("the guest agent refused '{command}': {why}"))),
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), DriverError> {
        let sent = self.0.get_mut().write_all(&[bytes, b"\n"].concat()).await;
        sent.map_err(|e| gone(format!("the guest agent cannot be asked: {e}")))
    }

    async fn answer(&mut self) -> Result<Value, DriverError> {
        loop {
            let mut line = Vec::new();
            let read = (&mut self.0).take(LONGEST).read_until(b'\n', &mut line).await;
            match read.map_err(|e| gone(format!("the guest agent cannot be heard: {e}")))? {
                0 => return Err(gone("the guest agent has gone".to_owned())),
                _ if line.ends_with(b"\n") => {}
                bytes if bytes as u64 == LONGEST => {
                    return Err(gone(format!(
                        "the guest agent said {LONGEST} bytes without an end: look after qemu-guest-agent in the guest"
                    )));
                }
                _ => return Err(gone("the guest agent has gone in the midst of an answer".to_owned())),
            }
            let text: Vec<u8> = line.into_iter().filter(|byte| *byte != 0xff).collect();
            if let Ok(answer) = serde_json::from_slice(&text) {
                return Ok(answer);
            }
        }
    }
}

fn gone(why: String) -> DriverError {
    DriverError::AgentUnavailable(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_without_an_end_is_given_up() {
        let (ours, mut guests) = UnixStream::pair().unwrap();
        let babble = tokio::spawn(async move { while guests.write_all(&[b'x'; 64 << 10]).await.is_ok() {} });
        let why = Agent(BufReader::new(ours)).answer().await.unwrap_err().to_string();
        assert!(why.contains("without an end"), "{why}");
        babble.await.unwrap();
    }
}
