//! What changes on a guest that runs without anything being plugged ([`Adjustment`]): asked of QEMU or of the kernel, and read back
//! from there.

mod bandwidth;
mod filter;
mod limits;
mod listen;
mod throttle;
pub mod vcpus;

use super::QemuDriver;
use super::command::password_commands;
use super::instance::Body;
use super::tune::Bounds;
use serde_json::{Value, json};
use std::sync::Arc;
use virt_model::device::Interface;
use virt_model::device::display::Connected;
use virt_model::domain::DomainDef;
use virt_model::driver::{Adjustment, DriverError};

impl QemuDriver {
    /// See [`virt_model::driver::Driver::adjust`].
    pub(super) async fn adjust_guest(
        &self,
        body: &Arc<Body>,
        before: &DomainDef,
        def: &mut DomainDef,
        what: &Adjustment,
    ) -> Result<(), DriverError> {
        match what {
            Adjustment::Memory => ask_balloon(body, def).await,
            Adjustment::MemoryStats => set_stats_period(body, def).await,
            Adjustment::Limits => {
                let bounds = Bounds::of(def, self.0.bounds.0, self.0.bounds.1);
                limits::adjust(body, before, def, bounds).await
            }
            Adjustment::Throttle(target) => throttle::adjust(body, before, def, target).await,
            Adjustment::Bandwidth(card) => bandwidth::adjust(body, before, def, card).await,
            Adjustment::Filter(card) => filter::adjust(body, before, def, card).await,
            Adjustment::Bridge(card) => bandwidth::change_bridge(body, before, def, card).await,
            Adjustment::Link(card) => set_link(body, bandwidth::card_of(def, card)?).await,
            Adjustment::Listen(index) => listen::adjust(body, before, def, *index).await,
            Adjustment::Password(index, connected) => set_password(body, before, def, *index, *connected).await,
            Adjustment::Medium { target, how: Some(how), image } => {
                self.change_medium(body, def, target, *how, image.as_deref()).await
            }
            Adjustment::Medium { target, how: None, .. } => self.put_back_medium(body, before, def, target).await,
            Adjustment::Vcpus(patience) => self.adjust_vcpus(body, before, def, *patience).await,
        }
    }

    /// See [`virt_model::driver::Driver::look_at`].
    pub(super) async fn look_at_guest(
        &self,
        body: &Arc<Body>,
        def: &mut DomainDef,
        what: &Adjustment,
    ) -> Result<(), DriverError> {
        match what {
            Adjustment::Vcpus(_) => {
                let present = vcpus::present(body, def).await?;
                def.set_online_vcpus(&present);
                Ok(())
            }
            Adjustment::Limits => limits::look(body, def).await,
            Adjustment::Throttle(target) => throttle::look(body, def, target).await,
            Adjustment::Bandwidth(card) => bandwidth::look(body, def, card).await,
            // What is so of them QEMU does not tell, or tells in its statistics.
            Adjustment::Memory
            | Adjustment::MemoryStats
            | Adjustment::Link(_)
            | Adjustment::Bridge(_)
            | Adjustment::Filter(_)
            | Adjustment::Listen(_)
            | Adjustment::Password(..)
            | Adjustment::Medium { .. } => Ok(()),
        }
    }
}

async fn set_link(body: &Body, card: &Interface) -> Result<(), DriverError> {
    let arguments = json!({ "name": card.info.alias().unwrap_or_default(), "up": card.link_up() });
    body.execute("set_link", arguments).await.map(drop)
}

/// Gives a display another password; one that was good for a time only is good for ever where nothing is said.
async fn set_password(
    body: &Body,
    before: &DomainDef,
    def: &DomainDef,
    index: usize,
    connected: Option<Connected>,
) -> Result<(), DriverError> {
    let commands = |def: &DomainDef, connected: Option<Connected>| {
        let Some(graphics) = def.devices.graphics.get(index) else { return Vec::new() };
        let mut commands = password_commands(graphics, connected.or(graphics.connected));
        if commands.len() == 1 {
            let arguments = json!({ "protocol": graphics.kind.as_str(), "time": "never" });
            commands.push(("expire_password".to_owned(), arguments));
        }
        commands
    };
    let tell = async |commands: Vec<(String, Value)>| {
        for (command, arguments) in commands {
            body.execute(&command, arguments).await.map_err(own_word)?;
        }
        Ok::<_, DriverError>(())
    };
    let told = tell(commands(def, connected)).await;
    if told.is_err()
        && let Err(error) = tell(commands(before, None)).await
    {
        tracing::warn!(uuid = %body.uuid, %error, "a display may have its new password");
    }
    told
}

/// Asks the guest for memory, or to take it back; it does that in its time.
async fn ask_balloon(body: &Body, def: &DomainDef) -> Result<(), DriverError> {
    balloon(def)?;
    let bytes = def.current_memory_kib().saturating_mul(1024);
    body.execute("balloon", json!({ "value": bytes })).await.map(drop)
}

async fn set_stats_period(body: &Body, def: &DomainDef) -> Result<(), DriverError> {
    let path = format!("/machine/peripheral/{}", balloon(def)?);
    let period = def.devices.memballoon.iter().filter_map(|one| one.stats.as_ref()).map(|stats| stats.period).next();
    let arguments =
        json!({ "path": path, "property": "guest-stats-polling-interval", "value": period.unwrap_or_default() });
    body.execute("qom-set", arguments).await.map(drop)
}

/// QEMU's name of the balloon.
fn balloon(def: &DomainDef) -> Result<&str, DriverError> {
    let name = def.devices.memballoon.as_ref().and_then(|balloon| balloon.info.alias());
    name.ok_or_else(|| DriverError::Unsupported("it has no balloon that QEMU knows by a name".to_owned()))
}

/// What QEMU refuses of values is told as a refusal of those, not as a failure of its own.
fn own_word(error: DriverError) -> DriverError {
    match error {
        DriverError::Hypervisor(why) => DriverError::Unsupported(why),
        other => other,
    }
}
