//! `org.virt.Domain`: translation between the bus and the service's domains.

use super::job::{finish, no_wait};
use super::options::{affect, patience};
use super::{Members, adjust, agent, checkpoint, disks, long_properties, paths, snapshot, stats};
use crate::bus::answers::no_object;
use crate::bus::call::{self, Call, Options, Outcome};
use crate::bus::rows::{Facts, Object};
use crate::bus::table::Offer;
use crate::bus::wire::Field;
use crate::error::Error;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use virt_model::domain::Form;
use virt_model::driver::saved::{Compression, MemoryFormat};
use virt_model::driver::{ConsoleOptions, MediumExchange, ShutdownMode};
use virt_model::xml::shorten;
use virt_service::facts::DomainFacts;
use virt_service::verb::{self, Ask, Verb};
use virt_service::{
    Affect, ApplyOptions, Domain, DumpOptions, LETTING_GO, ManagedSaveOptions, POWERING_OFF, Resumption, SaveOptions,
    Service, StartOptions, StatsOptions, UndefineCheck, UndefineOptions, Wanted,
};
use zbus::Variant;
use zbus::wire::Fd;

/// The interface.
pub const INTERFACE: &str = "org.virt.Domain";

long_properties! {
    f: DomainFacts {
        "Name" = Str(&f.name);
        "UUID" = Str(&f.uuid.to_string());
        "Id" = U32(f.id);
        "Driver" = Str(f.driver);
        "Host" = Str(&f.host);
        "Reachable" = Bool(f.reachable);
        "State" = Str(f.state.as_str());
        "StateReason" = Str(f.reason.as_str());
        "StateSince" = U64(f.since_usec);
        "Active" = Bool(f.active);
        "Persistent" = Bool(f.persistent);
        "Autostart" = Bool(f.autostart);
        "Title" = Str(&f.config.title);
        "Description" = Str(&f.config.description);
        "OSType" = Str(&f.config.os_type);
        "VCPUs" = U32(f.config.vcpus);
        "MaximumVCPUs" = U32(f.config.maximum_vcpus);
        "Memory" = U64(f.config.memory);
        "MaximumMemory" = U64(f.config.maximum_memory);
        "HasManagedSave" = Bool(f.has_managed_save);
        "AgentConnected" = Bool(f.agent_connected);
        "ConfigChanged" = Bool(f.config_changed());
        "CurrentSnapshot" = Path(&paths::snapshot_or_none(f.uuid, f.current_snapshot.as_deref()));
        "SnapshotCount" = U32(f.snapshot_count);
        "Owner" = U32(f.owner);
        "Broken" = Str(&f.broken);
    } {
        "Disks": "aa{sv}";
        "Interfaces": "aa{sv}";
        "Graphics": "aa{sv}";
        "Consoles": "aa{sv}";
        "Channels": "aa{sv}";
        "HostDevices": "aa{sv}";
        "Firmware": "a{sv}";
        "TPM": "a{sv}";
        "OperatingSystem": "s";
        "BootOrder": "as";
        "Snapshots": "ao";
        "PendingChanges": "a(sss)";
    }
}

/// What is published of a domain.
pub fn object(facts: &Arc<DomainFacts>) -> Object {
    let path = paths::domain(facts.uuid);
    Object::new(path, INTERFACE, row(facts)).of(Facts::Domain(facts.clone()))
}

/// Signals and their types.
const SIGNALS: &[Field] = &[
    ("Lifecycle", "ss"),
    ("DeviceAdded", "s"),
    ("DeviceRemoved", "s"),
    ("DeviceRemovalFailed", "s"),
    ("MediumChanged", "ss"),
    ("DiskIoError", "sss"),
    ("BlockThreshold", "stt"),
    ("WatchdogFired", "s"),
    ("MemoryFailure", "ssa{sv}"),
    ("BalloonChanged", "t"),
];

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    let themes = [running, inside, document, devices, adjusting, moments];
    let members = themes.iter().fold(Members::new(service, find), |members, theme| theme(members));
    let ask = |members: Members<_>, (verb, ask): &'static (&'static Verb, Ask)| {
        members.method(verb, move |domain: Arc<Domain>, call: Call| async move {
            domain.ask(call.caller(), verb, *ask).await?;
            call.done()
        })
    };
    verb::ASKS.iter().fold(members, ask).offer(INTERFACE, FIELDS, SIGNALS)
}

/// Its start, its end, and what is kept of it between them.
fn running(members: Members<Arc<Domain>>) -> Members<Arc<Domain>> {
    members
        .method(&verb::START, start)
        .method(&verb::SHUTDOWN, shutdown)
        .method(&verb::REBOOT, reboot)
        .method(&verb::RESET, reset)
        .method(&verb::DESTROY, destroy)
        .method(&verb::SUSPEND, suspend)
        .method(&verb::RESUME, resume)
        .method(&verb::SAVE, save)
        .method(&verb::CORE_DUMP, core_dump)
        .method(&verb::MANAGED_SAVE, managed_save)
        .method(&verb::MANAGED_SAVE_REMOVE, remove_managed_save)
        .method(&verb::MANAGED_SAVE_XML, managed_save_xml)
        .method(&verb::APPLY_PENDING, apply_pending)
}

/// What reaches into the guest: displays, consoles, its agent.
fn inside(members: Members<Arc<Domain>>) -> Members<Arc<Domain>> {
    members
        .method(&verb::SCREENSHOT, screenshot)
        .method(&verb::OPEN_GRAPHICS, open_graphics)
        .method(&verb::OPEN_CHANNEL, open_channel)
        .method(&verb::OPEN_CONSOLE, open_console)
        .method(&verb::SEND_KEY, send_key)
        .method(&verb::AGENT_COMMAND, agent::command)
        .method(&verb::GET_ADDRESSES, agent::addresses)
        .method(&verb::GET_GUEST_INFO, agent::info)
        .method(&verb::GET_TIME, agent::time)
        .method(&verb::SET_TIME, agent::set_time)
        .method(&verb::SET_USER_PASSWORD, agent::set_user_password)
        .method(&verb::FREEZE, agent::freeze)
        .method(&verb::THAW, agent::thaw)
        .method(&verb::TRIM, agent::trim)
        .method(&verb::GUEST_EXEC, agent::exec)
        .method(&verb::SUSPEND_GUEST, agent::suspend_guest)
}

/// What is stored of it, and what is told.
fn document(members: Members<Arc<Domain>>) -> Members<Arc<Domain>> {
    members
        .method(&verb::UNDEFINE, undefine)
        .method(&verb::CHECK_UNDEFINE, check_undefine)
        .method(&verb::RENAME, rename)
        .method(&verb::SET_TITLE, set_title)
        .method(&verb::SET_DESCRIPTION, set_description)
        .method(&verb::SET_METADATA, set_metadata)
        .method(&verb::GET_XML, get_xml)
        .method(&verb::GET_METADATA, get_metadata)
        .method(&verb::GET_STATS, get_stats)
        .method(&verb::BLOCK_INFO, block_info)
        .method(&verb::CAN, can)
        .setter(&verb::AUTOSTART, set_autostart)
}

/// Its devices and their images.
fn devices(members: Members<Arc<Domain>>) -> Members<Arc<Domain>> {
    members
        .method(&verb::ATTACH_DEVICE, attach_device)
        .method(&verb::DETACH_DEVICE, detach_device)
        .method(&verb::DETACH_DEVICE_ALIAS, detach_device_alias)
        .method(&verb::CHANGE_MEDIUM, change_medium)
        .method(&verb::SET_BLOCK_THRESHOLD, disks::set_threshold)
        .method(&verb::BLOCK_RESIZE, disks::resize)
        .method(&verb::BLOCK_PULL, disks::pull)
        .method(&verb::BLOCK_COMMIT, disks::commit)
        .method(&verb::BLOCK_COPY, disks::copy)
        .method(&verb::UPDATE_DEVICE, update_device)
}

/// What changes of it without plugging.
fn adjusting(members: Members<Arc<Domain>>) -> Members<Arc<Domain>> {
    members
        .method(&verb::SET_LINK, set_link)
        .method(&verb::SET_VCPUS, adjust::set_vcpus)
        .method(&verb::SET_MEMORY, adjust::set_memory)
        .method(&verb::SET_MEMORY_STATS_PERIOD, adjust::set_memory_stats_period)
        .method(&verb::SET_BLOCK_THROTTLE, adjust::set_block_throttle)
        .method(&verb::GET_BLOCK_THROTTLE, adjust::block_throttle)
        .method(&verb::SET_BANDWIDTH, adjust::set_bandwidth)
        .method(&verb::GET_BANDWIDTH, adjust::bandwidth)
        .method(&verb::SET_SCHEDULER, adjust::set_scheduler)
        .method(&verb::GET_SCHEDULER, adjust::scheduler)
        .method(&verb::SET_MEMORY_PARAMETERS, adjust::set_memory_parameters)
        .method(&verb::GET_MEMORY_PARAMETERS, adjust::memory_parameters)
        .method(&verb::SET_GRAPHICS_PASSWORD, adjust::set_graphics_password)
}

/// Moments that are kept: snapshots, checkpoints, backups.
fn moments(members: Members<Arc<Domain>>) -> Members<Arc<Domain>> {
    members
        .method(&verb::CREATE_SNAPSHOT, create_snapshot)
        .method(&verb::CHECK_CREATE, check_create_snapshot)
        .method(&verb::LIST_SNAPSHOTS, list_snapshots)
        .method(&verb::GET_SNAPSHOT, get_snapshot)
        .method(&verb::CREATE_CHECKPOINT, checkpoint::create)
        .method(&verb::BACKUP_BEGIN, checkpoint::backup_begin)
        .method(&verb::OPEN_BACKUP, checkpoint::open_backup)
        .method(&verb::LIST_CHECKPOINTS, checkpoint::list)
        .method(&verb::GET_CHECKPOINT, checkpoint::get)
}

fn find(service: &Arc<Service>, call: &Call) -> Result<Arc<Domain>, Error> {
    paths::uuid(call.path()).and_then(|uuid| service.get(uuid)).ok_or_else(|| no_object(call.path()))
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

async fn save(domain: Arc<Domain>, call: Call) -> Outcome {
    let body = call.body();
    let (file, mut options): (&str, Options) = call::read(&body)?;
    let save = SaveOptions {
        then: resumption(&mut options)?,
        xml: options.text("xml")?,
        given: call.file(&mut options, "fd")?.map(Arc::new),
        compression: compression(&mut options)?,
        bypass_cache: options.flag("bypass-cache")?,
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    };
    let no_wait = no_wait(options)?;
    let ticket = domain.save(call.caller(), file, save).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

async fn core_dump(domain: Arc<Domain>, call: Call) -> Outcome {
    let body = call.body();
    let (file, mut options): (&str, Options) = call::read(&body)?;
    let dump = DumpOptions {
        crash: options.flag("crash")?,
        reset: options.flag("reset")?,
        memory_only: memory_format(&mut options)?,
        live: options.flag("live")?,
        given: call.file(&mut options, "fd")?.map(Arc::new),
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    };
    let no_wait = no_wait(options)?;
    let ticket = domain.core_dump(call.caller(), file, dump).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

/// How a machine's memory is to be packed in its file.
fn compression(options: &mut Options) -> Result<Compression, Error> {
    let Some(word) = options.text("compression")? else { return Ok(Compression::None) };
    Compression::parse(&word)
        .ok_or_else(|| Error::argument(format!("'compression' is '{}', which is none of none, zstd", shorten(&word))))
}

/// How memory alone is to be dumped; `None`: not alone.
fn memory_format(options: &mut Options) -> Result<Option<MemoryFormat>, Error> {
    let alone = options.flag("memory-only")?;
    let Some(word) = options.text("format")? else { return Ok(alone.then_some(MemoryFormat::Elf)) };
    let format = MemoryFormat::parse(&word).ok_or_else(|| {
        let all = MemoryFormat::ALL.map(MemoryFormat::as_str).join(", ");
        Error::argument(format!("'format' is '{}', which is none of {all}", shorten(&word)))
    });
    format.map(Some)
}

async fn managed_save(domain: Arc<Domain>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let save = ManagedSaveOptions {
        then: resumption(&mut options)?,
        compression: compression(&mut options)?,
        bypass_cache: options.flag("bypass-cache")?,
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    };
    let no_wait = no_wait(options)?;
    let ticket = domain.managed_save(call.caller(), save).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

async fn remove_managed_save(domain: Arc<Domain>, call: Call) -> Outcome {
    domain.remove_managed_save(call.caller()).await?;
    call.done()
}

async fn managed_save_xml(domain: Arc<Domain>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let secure = options.flag("secure")?;
    options.end()?;
    call.reply(&domain.managed_save_xml(call.caller(), secure).await?)
}

/// What is wanted of a guest's CPUs once it has been restored.
pub fn resumption(options: &mut Options) -> Result<Resumption, Error> {
    Ok(Resumption { paused: options.flag("paused")?, running: options.flag("running")? })
}

async fn screenshot(domain: Arc<Domain>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let screen = options.number("screen")?.unwrap_or(0);
    options.end()?;
    let picture = domain.screenshot(call.caller(), screen).await?;
    call.reply(&(Fd::from(picture), "image/png"))
}

async fn open_graphics(domain: Arc<Domain>, call: Call) -> Outcome {
    let (index, mut options): (u32, Options) = call.read()?;
    let skip_auth = options.flag("skip-auth")?;
    options.end()?;
    let connection = domain.open_graphics(call.caller(), index, skip_auth).await?;
    call.reply(&Fd::from(connection))
}

async fn open_channel(domain: Arc<Domain>, call: Call) -> Outcome {
    let (name, options): (String, Options) = call.read()?;
    options.end()?;
    let connection = domain.open_channel(call.caller(), &name).await?;
    call.reply(&Fd::from(connection))
}

async fn open_console(domain: Arc<Domain>, call: Call) -> Outcome {
    let (device, mut options): (String, Options) = call.read()?;
    let wanted = ConsoleOptions { log: options.flag("log")?, force: options.flag("force")? };
    options.end()?;
    let connection = domain.open_console(call.caller(), &device, wanted).await?;
    call.reply(&Fd::from(connection))
}

async fn send_key(domain: Arc<Domain>, call: Call) -> Outcome {
    let (codeset, hold_usec, keys): (String, u64, Vec<u32>) = call.read()?;
    domain.send_key(call.caller(), &codeset, hold_usec, &keys).await?;
    call.done()
}

async fn apply_pending(domain: Arc<Domain>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let apply = ApplyOptions {
        patience: patience(&mut options)?.unwrap_or(POWERING_OFF),
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    };
    let no_wait = no_wait(options)?;
    let ticket = domain.apply_pending(call.caller(), apply).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

async fn undefine(domain: Arc<Domain>, call: Call) -> Outcome {
    if let Some(ticket) = domain.undefine(call.caller(), undefine_options(call.options()?)?).await? {
        ticket.done().await?;
    }
    call.done()
}

async fn check_undefine(domain: Arc<Domain>, call: Call) -> Outcome {
    let checked = domain.check_undefine(call.caller(), &undefine_options(call.options()?)?).await?;
    let verdict = snapshot::verdict(checked.as_ref().err());
    let UndefineCheck { removed, files } = checked.unwrap_or_default();
    let removed: Vec<String> = removed.iter().map(|path| path.display().to_string()).collect();
    let removal = [("removed", Variant::from(removed)), ("files", Variant::from(files))];
    let answer: HashMap<_, _> = verdict.into_iter().chain(removal).collect();
    call.reply(&answer)
}

fn undefine_options(mut options: Options) -> Result<UndefineOptions, Error> {
    let remove = UndefineOptions {
        managed_save: options.flag("managed-save")?,
        snapshots_metadata: options.flag("snapshots-metadata")?,
        snapshots: options.flag("snapshots")?,
        checkpoints_metadata: options.flag("checkpoints-metadata")?,
        nvram: options.flag("nvram")?,
        storage: options.texts("storage")?,
    };
    options.end()?;
    Ok(remove)
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

async fn get_stats(domain: Arc<Domain>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let groups = options.texts("groups")?;
    options.end()?;
    let told = domain.stats(call.caller(), &StatsOptions::named(&groups)?).await?;
    call.reply(&stats::told(&told))
}

async fn block_info(domain: Arc<Domain>, call: Call) -> Outcome {
    let target: String = call.read()?;
    let disk = domain.block_info(call.caller(), &target).await?;
    let known = |size: Option<u64>| size.unwrap_or(0);
    // One structure.
    call.reply(&((known(disk.capacity), known(disk.allocation), known(disk.physical)),))
}

async fn attach_device(domain: Arc<Domain>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, mut options): (&str, Options) = call::read(&body)?;
    let images = call.files(&mut options, "fds")?;
    call.reply(&domain.attach_device(call.caller(), xml, affect(options)?, images).await?)
}

async fn detach_device(domain: Arc<Domain>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    let (affect, patience) = detachment(options)?;
    domain.detach_device(call.caller(), &verb::DETACH_DEVICE, Wanted::Like(xml), affect, patience).await?;
    call.done()
}

async fn detach_device_alias(domain: Arc<Domain>, call: Call) -> Outcome {
    let (alias, options): (String, Options) = call.read()?;
    let (affect, patience) = detachment(options)?;
    domain.detach_device(call.caller(), &verb::DETACH_DEVICE_ALIAS, Wanted::Named(&alias), affect, patience).await?;
    call.done()
}

/// Which configurations lose a device, and how long its guest may take.
fn detachment(mut options: Options) -> Result<(Affect, Duration), Error> {
    let patience = patience(&mut options)?.unwrap_or(LETTING_GO);
    Ok((affect(options)?, patience))
}

async fn change_medium(domain: Arc<Domain>, call: Call) -> Outcome {
    let (target, file, mut options): (String, String, Options) = call.read()?;
    let how = MediumExchange { force: options.flag("force")?, patience: patience(&mut options)? };
    let image = call.file(&mut options, "fd")?;
    domain.change_file(call.caller(), &target, &file, affect(options)?, how, image).await?;
    call.done()
}

async fn set_link(domain: Arc<Domain>, call: Call) -> Outcome {
    let (card, up, options): (String, bool, Options) = call.read()?;
    domain.set_link(call.caller(), &card, up, affect(options)?).await?;
    call.done()
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
    let path = paths::argument(paths::snapshot_or_none(domain.uuid(), name.as_deref()))?;
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
    let found = names.iter().map(|name| paths::argument(paths::snapshot(domain.uuid(), name)));
    call.reply(&found.collect::<Result<Vec<_>, _>>()?)
}

async fn get_snapshot(domain: Arc<Domain>, call: Call) -> Outcome {
    let name: String = call.read()?;
    domain.has_snapshot(&name)?;
    call.reply(&paths::argument(paths::snapshot(domain.uuid(), &name))?)
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
        start_dependencies: options.flag("start-dependencies")?,
    };
    Ok((start, no_wait(options)?))
}

fn mode(mut options: Options) -> Result<ShutdownMode, Error> {
    let mode = match options.text("mode")?.as_deref() {
        None | Some("default") => ShutdownMode::Default,
        Some("acpi") => ShutdownMode::Acpi,
        Some("agent") => ShutdownMode::Agent,
        Some(other) => {
            let text = format!("option 'mode' is 'default', 'agent' or 'acpi', not '{}'", shorten(other));
            return Err(Error::argument(text));
        }
    };
    options.end()?;
    Ok(mode)
}
