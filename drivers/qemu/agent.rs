//! The agent in the guest of a running QEMU: where it is reached, whether it is there, and what is kept of what it was asked.

use super::instance::Body;
use super::peer;
use crate::agent::{Line, PowerChange, Talk, Terms, Turns, change_power, channel, no_channel, not_connected};
use crate::host::neighbours;
use crate::host::workers::blocking;
use crate::network::OwnNetwork;
use async_trait::async_trait;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::UnixStream;
use virt_model::device::Interface;
use virt_model::device::chardev::CharKind;
use virt_model::domain::DomainDef;
use virt_model::driver::agent::CardAddresses;
use virt_model::driver::{DriverError, ShutdownMode};

/// Where the agent of one guest is reached.
#[derive(Debug, Default)]
pub struct Port {
    /// Its socket; none if the guest has no port for an agent.
    socket: Mutex<Option<PathBuf>>,
    turns: Turns,
    /// Held by whoever follows the socket's path.
    reaching: Arc<tokio::sync::Mutex<()>>,
}

impl Port {
    /// That of a live definition.
    pub fn of(live: &DomainDef) -> Port {
        Port { socket: Mutex::new(socket(live)), ..Port::default() }
    }

    fn socket(&self) -> Option<PathBuf> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn is_of(&self, live: &DomainDef) {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = socket(live);
    }
}

fn socket(live: &DomainDef) -> Option<PathBuf> {
    let unix = channel(live).filter(|channel| channel.source.kind == CharKind::Unix);
    unix.and_then(|channel| channel.source.path().map(PathBuf::from))
}

/// What QEMU calls the device of the agent's port.
pub fn device(live: &DomainDef) -> Option<String> {
    channel(live)?.info.alias().map(str::to_owned)
}

/// What neighbours tell of the cards of a machine: the host's, and for cards in the user's own network those in there.
pub async fn neighbours(live: &DomainDef, own: Option<&OwnNetwork>) -> Result<Vec<CardAddresses>, DriverError> {
    let of_card = |card: &Interface| Some((card.mac()?, OwnNetwork::of_card(own, card).cloned()));
    let cards: Vec<_> = live.devices.interfaces.iter().filter_map(of_card).collect();
    let inside = cards.iter().find_map(|(_, own)| own.clone());
    let is_outside = cards.iter().any(|(_, own)| own.is_none());
    let ask = move || {
        let failed = |why: String| DriverError::Internal(format!("neighbours cannot be told: {why}"));
        let hosts = is_outside.then(neighbours::known).transpose().map_err(|error| failed(error.to_string()))?;
        // Where nobody holds that network any more, nothing is in there.
        let inside = inside.filter(|own| own.holder().is_some());
        let own = match inside.map(|own| own.neighbours()).transpose() {
            Err(error) if hosts.is_none() => return Err(failed(error.to_string())),
            own => own.unwrap_or_default(),
        };
        Ok((hosts.unwrap_or_default(), own.unwrap_or_default()))
    };
    let (hosts, in_own) = blocking(ask).await??;
    let told = cards.into_iter().map(|(mac, own)| {
        let known = if own.is_some() { &in_own } else { &hosts };
        let addresses = known.iter().filter(|(of, _)| *of == mac).map(|(_, address)| (address.to_string(), 0));
        CardAddresses { name: String::new(), mac: mac.to_string(), addresses: addresses.collect() }
    });
    Ok(told.filter(|card| !card.addresses.is_empty()).collect())
}

#[async_trait]
impl Line for Arc<Body> {
    async fn talk(&self, terms: Terms) -> Result<Talk, DriverError> {
        let socket = self.agent.socket().ok_or_else(no_channel)?;
        if *self.gone.borrow() {
            return Err(DriverError::Gone);
        }
        // Where nobody knows, as QEMU's monitor does not answer, its agent may.
        if self.reporter.agent_is_connected() == Some(false) {
            return Err(not_connected());
        }
        let pid = self.keeper.process_id().ok_or(DriverError::Gone)?;
        let reach = async {
            // The path is the definition's, and its file system may not answer: one thread of this guest waits for that.
            let alone = self.agent.reaching.clone().lock_owned().await;
            let path = socket.clone();
            let reached = blocking(move || {
                let reached = peer::reach(&path);
                drop(alone);
                reached
            });
            let stream = peer::is_of(&socket, pid, reached.await?.and_then(UnixStream::from_std));
            stream.map_err(|error| DriverError::AgentUnavailable(error.to_string()))
        };
        Talk::begin(&self.agent.turns, reach, terms).await
    }

    async fn is_cut_off(&self) {
        let before = self.reporter.heard().cuts;
        self.reporter.until(|heard| heard.closed || heard.cuts > before).await;
    }

    async fn has_ended(&self) {
        // Where nobody is left to tell, it has.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    fn is_frozen(&self) -> bool {
        self.keeper.is_frozen()
    }

    async fn keep_frozen(&self, frozen: bool) -> Result<(), DriverError> {
        self.keeper.change(move |record| record.frozen = frozen).await
    }
}

impl Body {
    /// The machine has become that, which may have other channels, another one for an agent among them.
    pub fn has_agent_of(&self, live: &DomainDef) {
        self.agent.is_of(live);
        self.reporter.agent_is_at(device(live));
        self.reporter.ports_are(&live.devices.channels.iter().filter_map(|channel| channel.info.alias()).collect());
    }

    /// Has the guest power off or reboot, by its agent or its power button.
    pub async fn change_power(self: &Arc<Self>, mode: ShutdownMode, what: PowerChange) -> Result<(), DriverError> {
        let connected = self.reporter.agent_is_connected() == Some(true);
        match mode {
            ShutdownMode::Agent => return self.agent_changes_power(what, false).await,
            ShutdownMode::Default if connected => match self.agent_changes_power(what, true).await {
                Err(error @ DriverError::Storage(_)) => return Err(error),
                Err(error) => tracing::debug!(uuid = %self.uuid, %error, "the guest is asked by its power button"),
                Ok(()) => return Ok(()),
            },
            ShutdownMode::Default | ShutdownMode::Acpi => {}
        }
        self.press_power_button(what == PowerChange::Reboot).await
    }

    /// Has the agent power off or reboot the guest. `soon`: it is given up soon, as there is another way.
    async fn agent_changes_power(self: &Arc<Self>, what: PowerChange, soon: bool) -> Result<(), DriverError> {
        if self.agent.socket().is_none() {
            return Err(no_channel());
        }
        // The guest does it by itself: what it was asked by ACPI before is past.
        self.expect_reboot(false).await?;
        change_power(self, what, soon).await
    }
}
