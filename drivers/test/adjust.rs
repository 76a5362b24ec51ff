//! What changes on a played guest without anything being plugged: it does at once what it is asked, and what its definition says is
//! what is so. Only of vCPUs, which a guest that is paused keeps until it goes on, it remembers more.

use super::guest::Machine;
use crate::qemu::command::vcpu_name;
use std::time::Instant;
use virt_model::domain::DomainDef;
use virt_model::driver::{Adjustment, DeviceEvent, DriverError, DriverEvent};

impl Machine {
    /// See [`virt_model::driver::Driver::adjust`].
    pub async fn adjust(&self, before: &DomainDef, def: &DomainDef, what: &Adjustment) -> Result<(), DriverError> {
        self.listens().await?;
        match what {
            Adjustment::Memory => {
                let bytes = def.current_memory_kib().saturating_mul(1024);
                if bytes != before.current_memory_kib().saturating_mul(1024) {
                    self.report(DriverEvent::Device(DeviceEvent::BalloonChanged { bytes }));
                }
                Ok(())
            }
            Adjustment::Vcpus(patience) => {
                let until = Instant::now() + *patience;
                let wanted = def.vcpus_at_boot().0;
                let going: Vec<u32> = self.with_vcpus(|there| {
                    let going = there.difference(&wanted).copied().collect();
                    there.extend(&wanted);
                    going
                });
                for number in going.into_iter().rev() {
                    self.detach(&vcpu_name(number), until.saturating_duration_since(Instant::now())).await?;
                    self.with_vcpus(|there| there.remove(&number));
                }
                Ok(())
            }
            Adjustment::MemoryStats
            | Adjustment::Limits
            | Adjustment::Throttle(_)
            | Adjustment::Link(_)
            | Adjustment::Bridge(_)
            | Adjustment::Password(..)
            | Adjustment::Listen(_)
            | Adjustment::Bandwidth(_)
            | Adjustment::Medium { .. }
            | Adjustment::Filter(_) => Ok(()),
        }
    }

    /// Writes into `def` which vCPUs it has.
    pub fn tell_vcpus(&self, def: &mut DomainDef) {
        let there = self.with_vcpus(|there| there.clone());
        if def.vcpus_at_boot().0 != there {
            def.set_online_vcpus(&there);
        }
    }
}
