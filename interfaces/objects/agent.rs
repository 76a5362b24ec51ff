//! What the agent in a guest is asked, of `org.virt.Domain`.

use super::job::{finish, no_wait};
use crate::bus::call::{self, Call, Options, Outcome};
use std::collections::HashMap;
use std::sync::Arc;
use virt_model::driver::agent::{GuestFact, GuestFacts, Program};
use virt_service::{Domain, ExecOptions};
use zbus::Variant;

/// `AgentCommand`
pub async fn command(domain: Arc<Domain>, call: Call) -> Outcome {
    let body = call.body();
    let (command, mut options): (&str, Options) = call::read(&body)?;
    let timeout_usec = options.long("timeout-usec")?;
    options.end()?;
    call.reply(&domain.agent_command(call.caller(), command, timeout_usec).await?)
}

/// `GetInterfaceAddresses`
pub async fn addresses(domain: Arc<Domain>, call: Call) -> Outcome {
    let (source, options): (String, Options) = call.read()?;
    options.end()?;
    call.reply(&domain.interface_addresses(call.caller(), &source).await?)
}

/// `GetGuestInfo`
pub async fn info(domain: Arc<Domain>, call: Call) -> Outcome {
    let (groups, options): (Vec<String>, Options) = call.read()?;
    options.end()?;
    call.reply(&facts(domain.guest_info(call.caller(), &groups).await?))
}

/// `GetTime`
pub async fn time(domain: Arc<Domain>, call: Call) -> Outcome {
    call.reply(&domain.guest_time(call.caller()).await?)
}

/// `SetTime`
pub async fn set_time(domain: Arc<Domain>, call: Call) -> Outcome {
    let (usec, mut options): (u64, Options) = call.read()?;
    let sync = options.flag("sync")?;
    options.end()?;
    domain.set_guest_time(call.caller(), (!sync).then_some(usec)).await?;
    call.done()
}

/// `SetUserPassword`
pub async fn set_user_password(domain: Arc<Domain>, call: Call) -> Outcome {
    let body = call.body();
    let (user, password, mut options): (&str, &str, Options) = call::read(&body)?;
    let crypted = options.flag("crypted")?;
    options.end()?;
    domain.set_user_password(call.caller(), user, password, crypted).await?;
    call.done()
}

/// `FreezeFilesystems`
pub async fn freeze(domain: Arc<Domain>, call: Call) -> Outcome {
    let (mountpoints, options): (Vec<String>, Options) = call.read()?;
    options.end()?;
    call.reply(&domain.freeze(call.caller(), mountpoints).await?)
}

/// `ThawFilesystems`
pub async fn thaw(domain: Arc<Domain>, call: Call) -> Outcome {
    call.options()?.end()?;
    call.reply(&domain.thaw(call.caller()).await?)
}

/// `TrimFilesystems`
pub async fn trim(domain: Arc<Domain>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let minimum = options.long("minimum-bytes")?.unwrap_or(0);
    options.end()?;
    call.reply(&domain.trim(call.caller(), minimum).await?)
}

/// `GuestExec`
pub async fn exec(domain: Arc<Domain>, call: Call) -> Outcome {
    let (argv, mut options): (Vec<String>, Options) = call.read()?;
    let program = Program {
        argv,
        env: options.texts("env")?,
        stdin: call.file(&mut options, "stdin")?,
        stdout: call.file(&mut options, "stdout")?,
        stderr: call.file(&mut options, "stderr")?,
    };
    let wanted = ExecOptions {
        program,
        timeout_usec: options.long("timeout-usec")?,
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    };
    let no_wait = no_wait(options)?;
    let (ticket, status) = domain.guest_exec(call.caller(), wanted).await?;
    let job = finish(ticket, no_wait).await?;
    let status = if no_wait { None } else { status.get().copied() };
    call.reply(&(status.unwrap_or(-1), job))
}

/// `SuspendGuest`
pub async fn suspend_guest(domain: Arc<Domain>, call: Call) -> Outcome {
    let (target, options): (String, Options) = call.read()?;
    options.end()?;
    domain.suspend_guest(call.caller(), &target).await?;
    call.done()
}

/// What an agent tells, in the types of the bus.
fn facts(told: GuestFacts) -> HashMap<&'static str, Variant<'static>> {
    told.into_iter().map(|(key, told)| (key, fact(told))).collect()
}

fn fact(told: GuestFact) -> Variant<'static> {
    match told {
        GuestFact::Text(text) => Variant::from(text),
        GuestFact::Flag(flag) => Variant::from(flag),
        GuestFact::Number(number) => Variant::from(number),
        GuestFact::Offset(offset) => Variant::from(offset),
        GuestFact::Load(load) => Variant::from(load),
        GuestFact::Texts(texts) => Variant::from(texts),
        GuestFact::Addresses(addresses) => Variant::from(addresses),
        GuestFact::Facts(told) => Variant::from(facts(told)),
        GuestFact::Each(all) => Variant::from(all.into_iter().map(facts).collect::<Vec<_>>()),
    }
}
