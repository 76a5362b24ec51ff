//! What changes on a machine without plugging, as the bus has it.

use super::options::{affect, patience};
use crate::bus::call::{Call, Options, Outcome};
use crate::error::Error;
use std::collections::HashMap;
use std::sync::Arc;
use virt_model::device::display::Connected;
use virt_model::domain::value::Value as _;
use virt_model::setting::{SettingKind, SettingValue, Settings};
use virt_model::xml::shorten;
use virt_service::{Domain, LETTING_GO, SettingsOf};
use zbus::Variant;

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

/// `SetBlockThrottle`
pub async fn set_block_throttle(domain: Arc<Domain>, call: Call) -> Outcome {
    let (target, values, options): (String, Options, Options) = call.read()?;
    set(&domain, &call, SettingsOf::Disk(target), values, options).await
}

/// `GetBlockThrottle`
pub async fn block_throttle(domain: Arc<Domain>, call: Call) -> Outcome {
    let (target, options): (String, Options) = call.read()?;
    get(&domain, &call, SettingsOf::Disk(target), options).await
}

/// `SetInterfaceBandwidth`
pub async fn set_bandwidth(domain: Arc<Domain>, call: Call) -> Outcome {
    let (card, values, options): (String, Options, Options) = call.read()?;
    set(&domain, &call, SettingsOf::Card(card), values, options).await
}

/// `GetInterfaceBandwidth`
pub async fn bandwidth(domain: Arc<Domain>, call: Call) -> Outcome {
    let (card, options): (String, Options) = call.read()?;
    get(&domain, &call, SettingsOf::Card(card), options).await
}

/// `SetSchedulerParameters`
pub async fn set_scheduler(domain: Arc<Domain>, call: Call) -> Outcome {
    let (values, options): (Options, Options) = call.read()?;
    set(&domain, &call, SettingsOf::Scheduler, values, options).await
}

/// `GetSchedulerParameters`
pub async fn scheduler(domain: Arc<Domain>, call: Call) -> Outcome {
    let options = call.options()?;
    get(&domain, &call, SettingsOf::Scheduler, options).await
}

/// `SetMemoryParameters`
pub async fn set_memory_parameters(domain: Arc<Domain>, call: Call) -> Outcome {
    let (values, options): (Options, Options) = call.read()?;
    set(&domain, &call, SettingsOf::Memory, values, options).await
}

/// `GetMemoryParameters`
pub async fn memory_parameters(domain: Arc<Domain>, call: Call) -> Outcome {
    let options = call.options()?;
    get(&domain, &call, SettingsOf::Memory, options).await
}

async fn set(domain: &Arc<Domain>, call: &Call, of: SettingsOf, values: Options, options: Options) -> Outcome {
    let given = settings(&of, values)?;
    domain.set_settings(call.caller(), of, given, affect(options)?).await?;
    call.done()
}

async fn get(domain: &Arc<Domain>, call: &Call, of: SettingsOf, options: Options) -> Outcome {
    let told = domain.settings(call.caller(), of, affect(options)?).await?;
    let variant = |value| match value {
        SettingValue::Number(number) => Variant::from(number),
        SettingValue::Signed(number) => Variant::from(number),
        SettingValue::Text(text) => Variant::from(text),
    };
    let told: HashMap<&str, Variant<'_>> = told.into_iter().map(|(key, value)| (key, variant(value))).collect();
    call.reply(&told)
}

/// The values of an `a{sv}`, each of the type of its key.
fn settings(of: &SettingsOf, mut values: Options) -> Result<Settings, Error> {
    let mut given = Settings::new();
    for (key, kind) in of.keys() {
        let value = match kind {
            SettingKind::Number => values.long(key)?.map(SettingValue::Number),
            SettingKind::Signed => values.signed(key)?.map(SettingValue::Signed),
            SettingKind::Text => values.text(key)?.map(SettingValue::Text),
        };
        given.extend(value.map(|value| (key, value)));
    }
    values.end()?;
    Ok(given)
}

/// `SetGraphicsPassword`
pub async fn set_graphics_password(domain: Arc<Domain>, call: Call) -> Outcome {
    let (index, password, mut options): (u32, String, Options) = call.read()?;
    let until = options.long("valid-until-usec")?;
    let connected = options.text("connected")?.map(|word| {
        Connected::from_text(&word).map_err(|expected| {
            Error::argument(format!("option 'connected' is '{}', and not {expected}", shorten(&word)))
        })
    });
    let connected = connected.transpose()?;
    domain.set_graphics_password(call.caller(), index, &password, until, connected, affect(options)?).await?;
    call.done()
}
