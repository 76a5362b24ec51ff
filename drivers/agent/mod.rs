//! QEMU's guest agent, as it is spoken to whoever connects a guest with the host: one talk at a time, and what it tells taken for
//! what somebody in the guest may have made up.

mod exec;
pub mod talk;
mod told;

#[cfg(test)]
mod freeze_tests;
#[cfg(test)]
mod talk_tests;

pub use talk::{Talk, Terms, Turns};

use crate::base64;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::sleep;
use virt_model::device::chardev::Channel;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::agent::{CardAddresses, GuestAgent, GuestFacts, InfoGroup, Program, Sleep};

/// The name of the agent's channel.
pub const CHANNEL: &str = "org.qemu.guest_agent.0";

/// How long what is usual may take.
const USUAL: Duration = Duration::from_secs(20);
/// How long an agent may take to freeze: every file system is written out first.
pub const FREEZE: Duration = Duration::from_secs(60);
/// How long it may take to trim.
const TRIM: Duration = Duration::from_secs(300);
/// How long an agent may take to be heard of, where there is another way, or it is asked again.
const SOON: Duration = Duration::from_secs(2);
/// How long it is waited until file systems are tried to be thawed again: at first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));
/// How often it is looked whether a program has ended: at first, and at last.
const LOOKS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));
/// How long the failure of what answers only when it fails is waited for.
const FAILURE: Duration = Duration::from_secs(5);

/// The agent's channel of a definition.
pub fn channel(def: &DomainDef) -> Option<&Channel> {
    def.devices.channels.iter().find(|channel| channel.target.name.as_deref() == Some(CHANNEL))
}

/// The refusal of a machine that has none.
pub fn no_channel() -> DriverError {
    let text =
        "the domain has no channel for a guest agent: add <channel type='unix'> with the target org.qemu.guest_agent.0";
    DriverError::AgentUnavailable(text.to_owned())
}

/// The refusal of one that has, while nobody in the guest has opened it.
pub fn not_connected() -> DriverError {
    let text = "no guest agent is connected: install qemu-guest-agent in the guest and let it run";
    DriverError::AgentUnavailable(text.to_owned())
}

/// The way to the agent of one guest.
#[async_trait]
pub trait Line: Send + Sync {
    /// Begins to talk.
    async fn talk(&self, terms: Terms) -> Result<Talk, DriverError>;

    /// Returns when the agent may have been cut off, so that nothing more is to be heard of it: its guest sleeps, is reset, or ends.
    async fn is_cut_off(&self);

    /// Returns when the guest has ended.
    async fn has_ended(&self);

    /// Whether a client has had file systems frozen.
    fn is_frozen(&self) -> bool;

    /// Keeps that a client has, or has not: durably, so that whoever finds the guest thaws it.
    async fn keep_frozen(&self, frozen: bool) -> Result<(), DriverError>;
}

/// The agent at the end of a line.
pub struct Agent<L>(pub L);

/// What a guest is asked to do to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerChange {
    /// Power off.
    Off,
    /// Reboot.
    Reboot,
}

/// Asks the agent to power off or reboot its guest. `soon`: it is given up soon, as there is another way.
pub async fn change_power(line: &impl Line, what: PowerChange, soon: bool) -> Result<(), DriverError> {
    let mode = match what {
        PowerChange::Off => "powerdown",
        PowerChange::Reboot => "reboot",
    };
    let terms = Terms::within(USUAL);
    tell(line, if soon { terms.soon(SOON) } else { terms }, "guest-shutdown", json!({ "mode": mode })).await
}

/// Tells an agent to do what it answers only if it fails, and waits until that is known.
async fn tell(line: &impl Line, terms: Terms, command: &str, arguments: Value) -> Result<(), DriverError> {
    let talk = line.talk(terms).await?;
    tokio::select! {
        done = talk.tell(command, arguments, FAILURE) => done,
        () = line.is_cut_off() => Ok(()),
    }
}

/// Freezes all file systems that can be. Error: `Refused` while a client has some frozen.
pub async fn freeze(line: &impl Line) -> Result<(), DriverError> {
    refuse_if_frozen(line)?;
    line.talk(Terms::within(FREEZE)).await?.ask("guest-fsfreeze-freeze", json!({})).await.map(drop)
}

/// Thaws all file systems, whatever else the agent is asked; says how many.
pub async fn thaw(line: &impl Line) -> Result<u32, DriverError> {
    let mut talk = line.talk(Terms::within(FREEZE).urgent()).await?;
    Ok(told::count(&talk.ask("guest-fsfreeze-thaw", json!({})).await?))
}

/// Refuses to freeze what is frozen.
fn refuse_if_frozen(line: &impl Line) -> Result<(), DriverError> {
    match line.is_frozen() {
        true => Err(DriverError::Refused("its file systems are frozen already: thaw them first".to_owned())),
        false => Ok(()),
    }
}

impl<L: Line> Agent<L> {
    async fn ask(&self, command: &str, arguments: Value, within: Duration) -> Result<Value, DriverError> {
        self.0.talk(Terms::within(within)).await?.ask(command, arguments).await
    }
}

#[async_trait]
impl<L: Line> GuestAgent for Agent<L> {
    async fn command(&self, command: &str, within: Duration) -> Result<String, DriverError> {
        let command = talk::Command::read(command)?;
        self.0.talk(Terms::within(within)).await?.hand_on(&command).await
    }

    async fn addresses(&self) -> Result<Vec<CardAddresses>, DriverError> {
        Ok(told::cards(&self.ask("guest-network-get-interfaces", json!({}), USUAL).await?))
    }

    async fn info(&self, groups: &[InfoGroup]) -> Result<GuestFacts, DriverError> {
        let all = groups.is_empty();
        let mut talk = self.0.talk(Terms::within(USUAL)).await?;
        let mut facts = GuestFacts::new();
        for group in if all { InfoGroup::ALL } else { groups } {
            match talk.ask(told::command(*group), json!({})).await {
                Ok(answer) => facts.extend(told::group(*group, &answer).map(|fact| (group.as_str(), fact))),
                // What this agent does not have, or cannot find out in its guest.
                Err(DriverError::AgentFailed { .. }) if all => {}
                Err(error) => return Err(error),
            }
        }
        Ok(facts)
    }

    async fn time(&self) -> Result<u64, DriverError> {
        Ok(told::microseconds(&self.ask("guest-get-time", json!({}), USUAL).await?))
    }

    async fn set_time(&self, usec: Option<u64>) -> Result<(), DriverError> {
        let nanoseconds = usec.map(|usec| usec.checked_mul(1000).filter(|time| i64::try_from(*time).is_ok()));
        let arguments = match nanoseconds {
            None => json!({}),
            Some(Some(time)) => json!({ "time": time }),
            Some(None) => {
                return Err(DriverError::Argument("the time is further off than a guest's clock goes".to_owned()));
            }
        };
        self.ask("guest-set-time", arguments, USUAL).await.map(drop)
    }

    async fn set_password(&self, user: &str, password: &str, crypted: bool) -> Result<(), DriverError> {
        let password = base64::encode(password.as_bytes());
        let arguments = json!({ "username": user, "password": password, "crypted": crypted });
        self.ask("guest-set-user-password", arguments, USUAL).await.map(drop)
    }

    async fn freeze(&self, mountpoints: &[String]) -> Result<u32, DriverError> {
        refuse_if_frozen(&self.0)?;
        let mut talk = self.0.talk(Terms::within(FREEZE)).await?;
        self.0.keep_frozen(true).await?;
        let frozen = match mountpoints {
            [] => talk.ask("guest-fsfreeze-freeze", json!({})).await,
            some => talk.ask("guest-fsfreeze-freeze-list", json!({ "mountpoints": some })).await,
        };
        drop(talk);
        match frozen.map(|frozen| told::count(&frozen)) {
            // An agent that froze none does not take itself for one that did; one that fails has thawed what it froze.
            none @ (Ok(0) | Err(DriverError::AgentFailed { .. })) => self.0.keep_frozen(false).await.and(none),
            other => other,
        }
    }

    async fn thaw(&self) -> Result<u32, DriverError> {
        let thawed = thaw(&self.0).await?;
        self.0.keep_frozen(false).await?;
        Ok(thawed)
    }

    fn is_frozen(&self) -> bool {
        self.0.is_frozen()
    }

    async fn thaw_at_last(&self) -> Result<(), DriverError> {
        let mut pause = PAUSES.0;
        while self.0.is_frozen() {
            match self.thaw().await {
                Ok(_) => return Ok(()),
                Err(DriverError::Gone) => return Err(DriverError::Gone),
                Err(error) => tracing::warn!(%error, "a guest's file systems are still frozen; they are to be thawed"),
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
        Ok(())
    }

    async fn trim(&self, minimum: u64) -> Result<u32, DriverError> {
        let arguments = json!({ "minimum": i64::try_from(minimum).unwrap_or(i64::MAX) });
        Ok(told::trimmed(&self.ask("guest-fstrim", arguments, TRIM).await?))
    }

    async fn run(&self, program: Program) -> Result<i32, DriverError> {
        self.run_program(program).await
    }

    async fn sleep(&self, how: Sleep) -> Result<(), DriverError> {
        let command = match how {
            Sleep::Memory => "guest-suspend-ram",
            Sleep::Disk => "guest-suspend-disk",
            Sleep::Hybrid => "guest-suspend-hybrid",
        };
        tell(&self.0, Terms::within(USUAL), command, json!({})).await
    }
}
