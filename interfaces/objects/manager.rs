//! `org.virt.Manager`: look up, list, define, create.

use super::domain::{resumption, start_options};
use super::job::{finish, no_wait};
use super::{Members, paths, properties, subscription, told};
use crate::bus::answers::ROOT;
use crate::bus::call::{self, Call, Options, Outcome};
use crate::bus::rows::{Object, Objects};
use crate::bus::table::Offer;
use crate::bus::wire::Row;
use crate::error::Error;
use crate::metrics;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::pipe;
use virt_model::driver::MachineChoice;
use virt_model::driver::storage::PoolAbility;
use virt_model::state::DomainState;
use virt_model::xml::shorten;
use virt_service::facts::DomainFacts;
use virt_service::object::ObjectRef;
use virt_service::verb;
use virt_service::{Domain, RestoreOptions, Service, StatsOptions, SubscribeOptions};
use zbus::ObjectPath;
use zbus::wire::Fd;

/// The interface.
pub const INTERFACE: &str = "org.virt.Manager";

properties! {
    f: ManagerFacts<'_> {
        "Version" = Str(env!("CARGO_PKG_VERSION"));
        "Drivers" = Strs(f.drivers);
        "Hosts" = Paths(&f.hosts);
    }
}

/// All that is published of the service as a whole.
struct ManagerFacts<'a> {
    drivers: &'a [&'a str],
    hosts: Vec<String>,
}

/// What is published of the service as a whole: its drivers, other hosts and kinds of pools.
pub fn object(drivers: &[&str], hosts: &[String], pools: &[PoolAbility]) -> Object {
    let hosts = hosts.iter().map(|name| paths::of(&ObjectRef::Host(name.as_str().into()))).collect();
    Object {
        others: Box::new([
            (super::network::MANAGER, Row::new(&[], &[])),
            (super::secret::MANAGER, Row::new(&[], &[])),
            (super::nodedev::MANAGER, Row::new(&[], &[])),
            (super::pool::MANAGER, super::storage::properties_of(pools)),
        ]),
        ..Object::new(ROOT, INTERFACE, row(&ManagerFacts { drivers, hosts }))
    }
}

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    Members::new(service, |service, _| Ok(service.clone()))
        .method(&verb::DEFINE, define_domain)
        .method(&verb::CREATE, create_domain)
        .method(&verb::RESTORE, restore_domain)
        .method(&verb::SAVED_XML, get_saved_xml)
        .method(&verb::SET_SAVED_XML, set_saved_xml)
        .method(&verb::GET_DOMAIN, get_domain)
        .method(&verb::GET_BY_NAME, get_domain_by_name)
        .method(&verb::GET_BY_ID, get_domain_by_id)
        .method(&verb::LIST, list_domains)
        .method(&verb::VALIDATE, validate_domain)
        .method(&verb::COMPARE, compare_domains)
        .method(&verb::NATIVE, domain_to_native)
        .method(&verb::JOBS, get_jobs)
        .method(&verb::CAPABILITIES, get_capabilities)
        .method(&verb::DOMAIN_CAPABILITIES, get_domain_capabilities)
        .method(&verb::OPEN_METRICS, open_metrics)
        .method(&verb::SUBSCRIBE_STATS, subscribe_stats)
        .method(&verb::MANAGER_CAN, can)
        .offer(INTERFACE, FIELDS, &[("DomainLifecycle", "ossss")])
}

async fn define_domain(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, mut options): (&str, Options) = call::read(&body)?;
    let validate = options.flag("validate")?;
    options.end()?;
    let domain = service.define(call.caller(), xml, validate).await?;
    call.reply(&path(&domain)?)
}

async fn create_domain(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    let (options, no_wait) = start_options(options)?;
    let (domain, ticket) = service.create(call.caller(), xml, options).await?;
    call.reply(&(path(&domain)?, finish(ticket, no_wait).await?))
}

async fn restore_domain(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (file, mut options): (&str, Options) = call::read(&body)?;
    let restore = RestoreOptions {
        then: resumption(&mut options)?,
        xml: options.text("xml")?,
        given: call.file(&mut options, "fd")?.map(Arc::new),
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    };
    let no_wait = no_wait(options)?;
    let (domain, ticket) = service.restore(call.caller(), file, restore).await?;
    call.reply(&(path(&domain)?, finish(ticket, no_wait).await?))
}

async fn get_saved_xml(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (file, mut options): (&str, Options) = call::read(&body)?;
    let secure = options.flag("secure")?;
    options.end()?;
    call.reply(&service.saved_xml(call.caller(), file, secure).await?)
}

async fn set_saved_xml(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (file, xml, options): (&str, &str, Options) = call::read(&body)?;
    options.end()?;
    service.set_saved_xml(call.caller(), file, xml).await?;
    call.done()
}

async fn get_domain(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let uuid: &str = call::read(&body)?;
    call.reply(&path(&*service.by_uuid(uuid)?)?)
}

async fn get_domain_by_name(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let name: &str = call::read(&body)?;
    call.reply(&path(&*service.by_name(name)?)?)
}

async fn get_domain_by_id(service: Arc<Service>, call: Call) -> Outcome {
    let id: u32 = call.read()?;
    call.reply(&path(&*service.by_id(id)?)?)
}

async fn list_domains(service: Arc<Service>, call: Call) -> Outcome {
    let filter = Filter::read(call.options()?, &service)?;
    call.listing(move |objects| inventory(objects, &filter))
}

async fn validate_domain(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    options.end()?;
    let findings = service.validate(call.caller(), xml).await?;
    call.reply(&findings.iter().map(told::finding).collect::<Vec<_>>())
}

async fn compare_domains(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (source, target, options): (&str, &str, Options) = call::read(&body)?;
    options.end()?;
    let differences = service.compare(call.caller(), source, target).await?;
    let told: Vec<_> = differences.into_iter().map(|found| (found.path, found.source, found.target)).collect();
    call.reply(&(told.is_empty(), told))
}

async fn domain_to_native(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, format): (&str, &str) = call::read(&body)?;
    call.reply(&service.native(call.caller(), xml, format).await?)
}

async fn get_jobs(_: Arc<Service>, call: Call) -> Outcome {
    call.listing(|objects| {
        let jobs = objects.below("/org/virt/job").filter_map(|object| paths::job_number(&object.path));
        let mut numbers: Vec<u64> = jobs.collect();
        numbers.sort_unstable();
        numbers.into_iter().filter_map(|id| paths::argument(paths::job(id)).ok()).collect::<Vec<_>>()
    })
}

async fn get_capabilities(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let driver: &str = call::read(&body)?;
    call.reply(&service.capabilities(driver).await?)
}

async fn get_domain_capabilities(service: Arc<Service>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let driver = options.text("driver")?;
    let wanted = MachineChoice {
        arch: options.text("arch")?,
        machine: options.text("machine")?,
        kind: options.text("virttype")?,
    };
    options.end()?;
    call.reply(&service.domain_capabilities(driver.as_deref(), &wanted).await?)
}

async fn open_metrics(service: Arc<Service>, call: Call) -> Outcome {
    call.options()?.end()?;
    let scrape = service.scrape(call.caller()).await?;
    let failed = |error: std::io::Error| Error::internal(format!("there is no pipe to be had: {error}"));
    let (ours, theirs) = pipe::pipe().map_err(failed)?;
    let theirs = theirs.into_blocking_fd().map_err(failed)?;
    tokio::spawn(metrics::hand_over(scrape, ours));
    call.reply(&Fd::from(theirs))
}

async fn subscribe_stats(service: Arc<Service>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let mut wanted = SubscribeOptions::default();
    if let Some(usec) = options.long("interval-usec")? {
        wanted.interval = Duration::from_micros(usec);
    }
    wanted.groups = StatsOptions::named(&options.texts("groups")?)?;
    let named = options.paths("domains")?;
    options.end()?;
    let unknown = |path: &str| virt_service::error::Error::NoSuchDomain { what: "path", value: shorten(path) };
    let uuids = named.iter().map(|path| paths::uuid(path).ok_or_else(|| unknown(path)));
    wanted.domains = uuids.collect::<Result<_, _>>()?;
    let begun = service.subscribe(call.caller(), wanted).await?;
    // The object is there when its path is known.
    service.events().flush().await;
    let reply = call.reply(&paths::argument(paths::subscription(begun.number()))?);
    if let Some(line) = call.line() {
        tokio::spawn(subscription::run(begun, line));
    }
    reply
}

async fn can(service: Arc<Service>, call: Call) -> Outcome {
    let method: String = call.read()?;
    call.reply(&service.can(call.caller(), &method).await?)
}

/// Which domains `ListDomains` is to list.
struct Filter {
    active: Option<bool>,
    persistent: Option<bool>,
    state: Option<DomainState>,
    driver: Option<&'static str>,
    /// Empty: of our own.
    host: Option<String>,
}

impl Filter {
    fn read(mut options: Options, service: &Service) -> Result<Filter, Error> {
        let filter = Filter {
            active: options.flag_if_given("active")?,
            persistent: options.flag_if_given("persistent")?,
            state: options.text("state")?.map(|word| state(&word)).transpose()?,
            driver: options.text("driver")?.map(|name| driver(&name, &service.drivers())).transpose()?,
            host: options.text("host")?.map(|name| host(name, service)).transpose()?,
        };
        options.end()?;
        Ok(filter)
    }

    fn keeps(&self, facts: &DomainFacts) -> bool {
        self.active.is_none_or(|active| facts.active == active)
            && self.persistent.is_none_or(|persistent| facts.persistent == persistent)
            && self.state.is_none_or(|state| facts.state == state)
            && self.driver.is_none_or(|driver| facts.driver == driver)
            && self.host.as_ref().is_none_or(|host| *facts.host == **host)
    }
}

fn state(word: &str) -> Result<DomainState, Error> {
    DomainState::ALL.iter().find(|state| state.as_str() == word).copied().ok_or_else(|| {
        let known: Vec<_> = DomainState::ALL.iter().map(|state| state.as_str()).collect();
        Error::argument(format!("option 'state' is one of {}, not '{word}'", known.join(", ")))
    })
}

fn driver(name: &str, known: &[&'static str]) -> Result<&'static str, Error> {
    known.iter().find(|driver| **driver == name).copied().ok_or_else(|| {
        Error::argument(format!("option 'driver' is one of {}, not '{}'", known.join(", "), shorten(name)))
    })
}

fn host(name: String, service: &Service) -> Result<String, Error> {
    if name.is_empty() { Ok(name) } else { Ok(service.other_host(&name)?.name().to_string()) }
}

/// Path, name, uuid, state, persistent.
type Entry = (ObjectPath<'static>, String, String, &'static str, bool);

fn inventory(objects: &Objects, filter: &Filter) -> Vec<Entry> {
    let domains = objects.below("/org/virt/domain").filter_map(|object| Some((object, object.domain()?)));
    let kept = domains.filter(|(_, facts)| filter.keeps(facts));
    kept.filter_map(|(object, facts)| {
        let path = ObjectPath::try_from(object.path.to_string()).ok()?;
        Some((path, facts.name.clone(), facts.uuid.to_string(), facts.state.as_str(), facts.persistent))
    })
    .collect()
}

fn path(domain: &Domain) -> Result<ObjectPath<'static>, Error> {
    paths::argument(paths::domain(domain.uuid()))
}
