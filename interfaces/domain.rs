//! `org.virt.Domain`: translation between the bus and the service's domains.

use crate::bus::answers::no_object;
use crate::bus::call::{self, Call, Handler, Options, Outcome};
use crate::bus::rows::{Facts, Object};
use crate::bus::table::Offer;
use crate::bus::wire::{Field, Row, Value};
use crate::error::Error;
use crate::{job, snapshot};
use std::sync::Arc;
use uuid::Uuid;
use virt_model::domain::Form;
use virt_model::driver::ShutdownMode;
use virt_service::events::DomainFacts;
use virt_service::job::Ticket;
use virt_service::{Affect, Domain, Service, StartOptions, UndefineOptions};
use zbus::ObjectPath;

/// The interface.
pub const INTERFACE: &str = "org.virt.Domain";

const FOLDER: &str = "/org/virt/domain/_";

const FIELDS: &[Field] = &[
    ("Name", "s"),
    ("UUID", "s"),
    ("Id", "u"),
    ("Driver", "s"),
    ("State", "s"),
    ("StateReason", "s"),
    ("StateSince", "t"),
    ("Active", "b"),
    ("Persistent", "b"),
    ("Autostart", "b"),
    ("Title", "s"),
    ("Description", "s"),
    ("OSType", "s"),
    ("VCPUs", "u"),
    ("MaximumVCPUs", "u"),
    ("Memory", "t"),
    ("MaximumMemory", "t"),
    ("HasManagedSave", "b"),
    ("ConfigChanged", "b"),
    ("CurrentSnapshot", "o"),
    ("SnapshotCount", "u"),
    ("Owner", "u"),
    ("Broken", "s"),
];

/// The object's path: the uuid with `-` written as `_`.
pub fn path(uuid: Uuid) -> String {
    format!("{FOLDER}{}", uuid.to_string().replace('-', "_"))
}

/// The uuid of the object at a path.
pub fn uuid(path: &str) -> Option<Uuid> {
    let label = path.strip_prefix(FOLDER)?;
    Uuid::try_parse(&label.replace('_', "-")).ok()
}

/// What is published of a domain.
pub fn object(facts: &Arc<DomainFacts>) -> Object {
    let path = path(facts.uuid);
    let snapshot = facts.current_snapshot.as_ref();
    let snapshot = snapshot.map_or_else(|| "/".to_owned(), |name| snapshot::path(facts.uuid, name));
    let values = [
        Value::Str(&facts.name),
        Value::Str(&facts.uuid.to_string()),
        Value::U32(facts.id),
        Value::Str(facts.driver),
        Value::Str(facts.state.as_str()),
        Value::Str(facts.reason.as_str()),
        Value::U64(facts.since_usec),
        Value::Bool(facts.state.is_active()),
        Value::Bool(facts.persistent),
        Value::Bool(facts.autostart),
        Value::Str(&facts.title),
        Value::Str(&facts.description),
        Value::Str(&facts.os_type),
        Value::U32(facts.vcpus),
        Value::U32(facts.maximum_vcpus),
        Value::U64(facts.memory),
        Value::U64(facts.maximum_memory),
        Value::Bool(facts.has_managed_save),
        Value::Bool(facts.config_changed),
        Value::Path(&snapshot),
        Value::U32(facts.snapshot_count),
        Value::U32(facts.owner),
        Value::Str(&facts.broken),
    ];
    let row = Row::new(FIELDS, &values);
    Object { path: path.into(), interface: INTERFACE, row, facts: Facts::Domain(facts.clone()) }
}

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    let methods = vec![
        change(service, "Start", start),
        change(service, "Shutdown", shutdown),
        change(service, "Reboot", reboot),
        change(service, "Reset", reset),
        change(service, "Destroy", destroy),
        change(service, "Suspend", suspend),
        change(service, "Resume", resume),
        change(service, "Undefine", undefine),
        change(service, "Rename", rename),
        change(service, "SetTitle", set_title),
        change(service, "SetDescription", set_description),
        change(service, "SetMetadata", set_metadata),
        change(service, "UpdateDevice", update_device),
        change(service, "CreateSnapshot", create_snapshot),
        read(service, "CheckCreateSnapshot", check_create_snapshot),
        read(service, "ListSnapshots", list_snapshots),
        read(service, "GetSnapshot", get_snapshot),
        read(service, "GetXML", get_xml),
        read(service, "GetMetadata", get_metadata),
        read(service, "Can", can),
    ];
    let setters = vec![change(service, "Autostart", set_autostart)];
    Offer { interface: INTERFACE, methods, setters, fields: FIELDS, signals: &[("Lifecycle", "ss")] }
}

/// A member that changes nothing.
fn read<F>(service: &Arc<Service>, member: &'static str, run: fn(Arc<Domain>, Call) -> F) -> Handler
where
    F: Future<Output = Outcome> + Send + 'static,
{
    let service = service.clone();
    Handler::new(member, move |call| {
        let service = service.clone();
        async move { run(find(&service, &call)?, call).await }
    })
}

/// A member that may: its answer, good or bad, follows the signals of what it did.
fn change<F>(service: &Arc<Service>, member: &'static str, run: fn(Arc<Domain>, Call) -> F) -> Handler
where
    F: Future<Output = Outcome> + Send + 'static,
{
    let (service, events) = (service.clone(), service.events().clone());
    Handler::change(member, events, move |call| {
        let service = service.clone();
        async move { run(find(&service, &call)?, call).await }
    })
}

fn find(service: &Service, call: &Call) -> Result<Arc<Domain>, Error> {
    uuid(call.path()).and_then(|uuid| service.get(uuid)).ok_or_else(|| no_object(call.path()))
}

async fn start(domain: Arc<Domain>, call: Call) -> Outcome {
    let (options, no_wait) = start_options(call.options()?)?;
    let ticket = domain.start(call.caller(), options).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

async fn shutdown(domain: Arc<Domain>, call: Call) -> Outcome {
    domain.shutdown(call.caller(), mode(call.options()?)?).await?;
    call.done()
}

async fn reboot(domain: Arc<Domain>, call: Call) -> Outcome {
    domain.reboot(call.caller(), mode(call.options()?)?).await?;
    call.done()
}

async fn reset(domain: Arc<Domain>, call: Call) -> Outcome {
    domain.reset(call.caller()).await?;
    call.done()
}

async fn destroy(domain: Arc<Domain>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let graceful = options.flag("graceful")?;
    options.end()?;
    domain.destroy(call.caller(), graceful).await?;
    call.done()
}

async fn suspend(domain: Arc<Domain>, call: Call) -> Outcome {
    domain.suspend(call.caller()).await?;
    call.done()
}

async fn resume(domain: Arc<Domain>, call: Call) -> Outcome {
    domain.resume(call.caller()).await?;
    call.done()
}

async fn undefine(domain: Arc<Domain>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let remove = UndefineOptions {
        managed_save: options.flag("managed-save")?,
        snapshots_metadata: options.flag("snapshots-metadata")?,
        nvram: options.flag("nvram")?,
    };
    options.end()?;
    domain.undefine(call.caller(), remove).await?;
    call.done()
}

async fn rename(domain: Arc<Domain>, call: Call) -> Outcome {
    let (name, options): (String, Options) = call.read()?;
    options.end()?;
    domain.rename(call.caller(), &name).await?;
    call.done()
}

async fn set_title(domain: Arc<Domain>, call: Call) -> Outcome {
    let (text, options): (String, Options) = call.read()?;
    domain.set_title(call.caller(), &text, affect(options)?).await?;
    call.done()
}

async fn set_description(domain: Arc<Domain>, call: Call) -> Outcome {
    let (text, options): (String, Options) = call.read()?;
    domain.set_description(call.caller(), &text, affect(options)?).await?;
    call.done()
}

async fn set_metadata(domain: Arc<Domain>, call: Call) -> Outcome {
    let (xml, prefix, uri, options): (String, String, String, Options) = call.read()?;
    domain.set_metadata(call.caller(), &xml, &prefix, &uri, affect(options)?).await?;
    call.done()
}

async fn set_autostart(domain: Arc<Domain>, call: Call) -> Outcome {
    let autostart = bool::try_from(call.value()?).map_err(|error| Error::invalid_args(error.to_string()))?;
    domain.set_autostart(call.caller(), autostart).await?;
    call.done()
}

async fn get_xml(domain: Arc<Domain>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let form = Form {
        inactive: options.flag("inactive")?,
        secure: options.flag("secure")?,
        migratable: options.flag("migratable")?,
    };
    options.end()?;
    call.reply(&domain.xml(call.caller(), form).await?)
}

async fn get_metadata(domain: Arc<Domain>, call: Call) -> Outcome {
    let (uri, options): (String, Options) = call.read()?;
    call.reply(&domain.metadata(call.caller(), &uri, affect(options)?).await?)
}

async fn update_device(domain: Arc<Domain>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    domain.update_device(call.caller(), xml, affect(options)?).await?;
    call.done()
}

async fn create_snapshot(domain: Arc<Domain>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    let (create, no_wait) = snapshot::create_options(options)?;
    let (name, ticket) = domain.create_snapshot(call.caller(), xml, create).await?;
    let path = name.map_or_else(|| "/".to_owned(), |name| snapshot::path(domain.uuid(), &name));
    let path = ObjectPath::try_from(path).map_err(|error| Error::internal(error.to_string()))?;
    call.reply(&(path, finish(ticket, no_wait).await?))
}

async fn check_create_snapshot(domain: Arc<Domain>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    let (create, _) = snapshot::create_options(options)?;
    call.reply(&snapshot::told_create(domain.check_create_snapshot(call.caller(), xml, create).await?))
}

async fn list_snapshots(domain: Arc<Domain>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let (roots, leaves) = (options.flag("roots")?, options.flag("leaves")?);
    options.end()?;
    let names = domain.snapshots(roots, leaves)?;
    let paths = names.iter().filter_map(|name| ObjectPath::try_from(snapshot::path(domain.uuid(), name)).ok());
    call.reply(&paths.collect::<Vec<_>>())
}

async fn get_snapshot(domain: Arc<Domain>, call: Call) -> Outcome {
    let name: String = call.read()?;
    domain.has_snapshot(&name)?;
    let path = ObjectPath::try_from(snapshot::path(domain.uuid(), &name));
    call.reply(&path.map_err(|error| Error::internal(error.to_string()))?)
}

async fn can(domain: Arc<Domain>, call: Call) -> Outcome {
    let method: String = call.read()?;
    call.reply(&domain.can(call.caller(), &method).await?)
}

/// The options of `Start` and `CreateDomain`, and whether not to wait.
pub fn start_options(mut options: Options) -> Result<(StartOptions, bool), Error> {
    let start = StartOptions {
        paused: options.flag("paused")?,
        force_boot: options.flag("force-boot")?,
        reset_nvram: options.flag("reset-nvram")?,
        autodestroy: options.flag("autodestroy")?,
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    };
    let no_wait = options.flag("no-wait")?;
    options.end()?;
    Ok((start, no_wait))
}

/// Waits for a job, unless that is not wanted, and says which it is.
pub async fn finish(ticket: Ticket, no_wait: bool) -> Result<ObjectPath<'static>, Error> {
    let path = job::path(ticket.id);
    if !no_wait {
        ticket.done().await?;
    }
    ObjectPath::try_from(path).map_err(|error| Error::internal(error.to_string()))
}

fn mode(mut options: Options) -> Result<ShutdownMode, Error> {
    let mode = match options.text("mode")?.as_deref() {
        None => ShutdownMode::Default,
        Some("acpi") => ShutdownMode::Acpi,
        Some("agent") => ShutdownMode::Agent,
        Some(other) => return Err(Error::argument(format!("option 'mode' is 'acpi' or 'agent', not '{other}'"))),
    };
    options.end()?;
    Ok(mode)
}

fn affect(mut options: Options) -> Result<Affect, Error> {
    let affect = Affect { live: options.flag("live")?, config: options.flag("config")? };
    options.end()?;
    Ok(affect)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_the_uuid_and_back() {
        let id = Uuid::from_u128(0x4dea_22b3_1d52_d8f3_2516_782e_98ab_3fa0);
        assert_eq!(path(id), "/org/virt/domain/_4dea22b3_1d52_d8f3_2516_782e98ab3fa0");
        assert_eq!(uuid(&path(id)), Some(id));
        assert_eq!(uuid("/org/virt/domain/_x"), None);
    }
}
