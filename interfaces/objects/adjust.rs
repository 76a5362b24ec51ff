//! What changes on a machine without plugging, as the bus has it.

use super::domain::{affect, patience};
use crate::bus::call::{Call, Options, Outcome};
use std::sync::Arc;
use virt_service::{Domain, LETTING_GO};

/// `SetVCPUs`
pub async fn set_vcpus(domain: Arc<Domain>, call: Call) -> Outcome {
    let (count, mut options): (u32, Options) = call.read()?;
    let (maximum, patience) = (options.flag("maximum")?, patience(&mut options)?.unwrap_or(LETTING_GO));
    domain.set_vcpus(call.caller(), count, maximum, affect(options)?, patience).await?;
    call.done()
}

/// `SetMemory`
pub async fn set_memory(domain: Arc<Domain>, call: Call) -> Outcome {
    let (bytes, mut options): (u64, Options) = call.read()?;
    let maximum = options.flag("maximum")?;
    domain.set_memory(call.caller(), bytes, maximum, affect(options)?).await?;
    call.done()
}

/// `SetMemoryStatsPeriod`
pub async fn set_memory_stats_period(domain: Arc<Domain>, call: Call) -> Outcome {
    let (seconds, options): (u32, Options) = call.read()?;
    domain.set_memory_stats_period(call.caller(), seconds, affect(options)?).await?;
    call.done()
}
