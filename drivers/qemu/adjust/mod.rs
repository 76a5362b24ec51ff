//! What changes on a guest that runs without anything being plugged ([`Adjustment`]): asked of QEMU or of the kernel, and read back
//! from there.

mod bandwidth;
mod limits;
mod throttle;
pub mod vcpus;

use super::QemuDriver;
use super::instance::Body;
use super::tune::Bounds;
use serde_json::json;
use std::sync::Arc;
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
            Adjustment::Bandwidth(card) => bandwidth::adjust(before, def, card).await,
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
            Adjustment::Bandwidth(card) => bandwidth::look(def, card).await,
            Adjustment::Memory | Adjustment::MemoryStats => {
                Err(DriverError::Unsupported(format!("{what} stands in its statistics")))
            }
        }
    }
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
