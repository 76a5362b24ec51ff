//! `org.virt.Network` and `org.virt.Manager.Network`: translation between the bus and networks.

use super::secret::users;
use super::snapshot::verdict;
use super::{Lifecycle, Members, Published, paths, properties, told};
use crate::bus::answers::no_object;
use crate::bus::call::{self, Call, Options, Outcome};
use crate::bus::rows::{Facts, Object, Objects};
use crate::bus::table::Offer;
use crate::error::Error;
use std::collections::HashMap;
use std::sync::Arc;
use uuid::Uuid;
use virt_model::driver::network::Lease;
use virt_service::facts::{NetworkFacts, ObjectFacts};
use virt_service::object::ObjectRef;
use virt_service::verb;
use virt_service::{CheckedNetwork, HostEntry, Network, Service};
use zbus::{ObjectPath, Variant};

/// The interface.
pub const INTERFACE: &str = "org.virt.Network";

/// The interface of the manager that has to do with networks.
pub const MANAGER: &str = "org.virt.Manager.Network";

properties! {
    f: NetworkFacts {
        "Name" = Str(&f.name);
        "UUID" = Str(&f.uuid.to_string());
        "Active" = Bool(f.active);
        "Persistent" = Bool(f.persistent);
        "Autostart" = Bool(f.autostart);
        "ConfigChanged" = Bool(f.config_changed);
        "Owner" = U32(f.owner);
        "Problems" = Pairs(&f.problems);
        "Users" = Users(&users(&f.users));
        "Mode" = Str(f.mode);
        "Bridge" = Str(&f.bridge);
        "Addresses" = Strs(&words(&f.addresses));
        "DomainName" = Str(&f.domain_name);
        "ForwardDevices" = Strs(&words(&f.forward_devices));
        "MTU" = U32(f.mtu);
        "Hosts" = Hosts(&f.hosts);
        "Leases" = Leases(&leases(f));
        "Broken" = Str(&f.broken);
    }
}

fn words(all: &[String]) -> Vec<&str> {
    all.iter().map(String::as_str).collect()
}

fn leases(facts: &NetworkFacts) -> Vec<(&str, &str, &str, String)> {
    let shown = facts.leases.iter();
    shown.map(|lease| (&*lease.mac, &*lease.address, &*lease.host_name, machine(lease.domain))).collect()
}

/// The path of a machine, or the one that is none.
fn machine(uuid: Option<Uuid>) -> String {
    uuid.map_or_else(|| paths::of(&ObjectRef::Foreign), paths::domain)
}

/// See [`super::published`].
pub fn published(facts: &Arc<NetworkFacts>) -> Published {
    let object = Object::new(paths::of(&ObjectRef::Network(facts.uuid)), INTERFACE, row(facts));
    Published {
        object: object.of(Facts::Other(ObjectFacts::Network(facts.clone()))),
        lifecycle: Some(Lifecycle {
            manager: MANAGER,
            member: "NetworkLifecycle",
            names: vec![facts.uuid.to_string(), facts.name.clone()],
            detailed: true,
        }),
    }
}

/// What there is for each member of the manager's interface.
pub fn offer_of_manager(service: &Arc<Service>) -> Offer {
    Members::new(service, |service, _| Ok(service.clone()))
        .method(&verb::DEFINE_NETWORK, define)
        .method(&verb::CREATE_NETWORK, create)
        .method(&verb::GET_NETWORK, get)
        .method(&verb::GET_NETWORK_BY_NAME, get_by_name)
        .method(&verb::LIST_NETWORKS, list)
        .method(&verb::VALIDATE_NETWORK, validate)
        .offer(MANAGER, &[], &[("NetworkLifecycle", "ossss")])
}

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    Members::new(service, find)
        .method(&verb::NETWORK_START, start)
        .method(&verb::CHECK_START, check_start)
        .method(&verb::NETWORK_DESTROY, destroy)
        .method(&verb::CHECK_DESTROY, check_destroy)
        .method(&verb::NETWORK_UPDATE, update)
        .method(&verb::SET_HOST, set_host)
        .method(&verb::REMOVE_HOST, remove_host)
        .method(&verb::GET_LEASES, get_leases)
        .method(&verb::NETWORK_XML, get_xml)
        .method(&verb::NETWORK_UNDEFINE, undefine)
        .method(&verb::NETWORK_CHECK_UNDEFINE, check_undefine)
        .method(&verb::NETWORK_CAN, can)
        .setter(&verb::NETWORK_AUTOSTART, set_autostart)
        .offer(INTERFACE, FIELDS, &[("Lifecycle", "ss")])
}

fn find(service: &Arc<Service>, call: &Call) -> Result<Arc<Network>, Error> {
    let found = match paths::object(call.path()) {
        Some(ObjectRef::Network(uuid)) => service.network(uuid),
        _ => None,
    };
    found.ok_or_else(|| no_object(call.path()))
}

fn path(network: &Network) -> Result<ObjectPath<'static>, Error> {
    paths::argument(paths::of(&ObjectRef::Network(network.uuid())))
}

async fn define(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    options.end()?;
    call.reply(&path(&*service.define_network(call.caller(), xml).await?)?)
}

async fn create(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    options.end()?;
    call.reply(&path(&*service.create_network(call.caller(), xml).await?)?)
}

async fn get(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let uuid: &str = call::read(&body)?;
    call.reply(&path(&*service.network_by_uuid(uuid)?)?)
}

async fn get_by_name(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let name: &str = call::read(&body)?;
    call.reply(&path(&*service.network_by_name(name)?)?)
}

async fn validate(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    options.end()?;
    let findings = service.validate_network(call.caller(), xml).await?;
    call.reply(&findings.iter().map(told::finding).collect::<Vec<_>>())
}

/// Path, name, uuid, state, persistent.
type Entry = (ObjectPath<'static>, String, String, &'static str, bool);

async fn list(_: Arc<Service>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let (active, persistent) = (options.flag_if_given("active")?, options.flag_if_given("persistent")?);
    options.end()?;
    call.listing(move |objects: &Objects| {
        let networks = objects.below("/org/virt/network").filter_map(|object| match &object.facts {
            Facts::Other(ObjectFacts::Network(facts)) => {
                let wanted = active.is_none_or(|active| active == facts.active)
                    && persistent.is_none_or(|persistent| persistent == facts.persistent);
                let path = paths::argument(object.path.to_string()).ok().filter(|_| wanted)?;
                let state = if facts.active { "active" } else { "inactive" };
                Some((path, facts.name.clone(), facts.uuid.to_string(), state, facts.persistent))
            }
            _ => None,
        });
        networks.collect::<Vec<Entry>>()
    })
}

async fn start(network: Arc<Network>, call: Call) -> Outcome {
    call.options()?.end()?;
    network.start(call.caller()).await?;
    call.done()
}

async fn check_start(network: Arc<Network>, call: Call) -> Outcome {
    call.options()?.end()?;
    let checked = network.check_start(call.caller()).await?;
    call.reply(&of_check(&checked)?)
}

async fn destroy(network: Arc<Network>, call: Call) -> Outcome {
    let force = forced(call.options()?)?;
    network.destroy(call.caller(), force).await?;
    call.done()
}

async fn check_destroy(network: Arc<Network>, call: Call) -> Outcome {
    let force = forced(call.options()?)?;
    let checked = network.check_destroy(call.caller(), force).await?;
    call.reply(&of_check(&checked)?)
}

async fn update(network: Arc<Network>, call: Call) -> Outcome {
    let body = call.body();
    let (command, section, xml, mut options): (&str, &str, &str, Options) = call::read(&body)?;
    let parent = match options.integer("parent-index")? {
        None | Some(-1) => None,
        Some(number) => Some(usize::try_from(number).map_err(|_| {
            Error::argument(format!(
                "'parent-index' counts from 0, or is -1 for the first that fits; it is not {number}"
            ))
        })?),
    };
    options.end()?;
    network.update(call.caller(), command, section, xml, parent).await?;
    call.done()
}

async fn set_host(network: Arc<Network>, call: Call) -> Outcome {
    let body = call.body();
    let (mac, address, name, options): (&str, &str, &str, Options) = call::read(&body)?;
    options.end()?;
    network.set_host(call.caller(), HostEntry::read(mac, address, name)?).await?;
    call.done()
}

async fn remove_host(network: Arc<Network>, call: Call) -> Outcome {
    let body = call.body();
    let (mac, options): (&str, Options) = call::read(&body)?;
    options.end()?;
    network.remove_host(call.caller(), mac).await?;
    call.done()
}

async fn get_leases(network: Arc<Network>, call: Call) -> Outcome {
    call.options()?.end()?;
    let leases = network.leases(call.caller()).await?;
    let told =
        leases.into_iter().map(|(lease, domain)| lease_told(lease, domain)).collect::<Result<Vec<_>, Error>>()?;
    call.reply(&told)
}

fn lease_told(lease: Lease, domain: Option<Uuid>) -> Result<HashMap<&'static str, Variant<'static>>, Error> {
    let mut told = HashMap::from([
        ("mac", Variant::from(lease.mac.map(|mac| mac.to_string()).unwrap_or_default())),
        ("address", Variant::from(lease.address.to_string())),
        ("prefix", Variant::from(u32::from(lease.prefix))),
        ("hostname", Variant::from(lease.host_name)),
        ("domain", Variant::from(paths::argument(machine(domain))?)),
        ("expires", Variant::from(lease.expires)),
    ]);
    lease.client_id.into_iter().for_each(|id| _ = told.insert("client-id", Variant::from(id)));
    lease.iaid.into_iter().for_each(|iaid| _ = told.insert("iaid", Variant::from(iaid)));
    Ok(told)
}

async fn get_xml(network: Arc<Network>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let inactive = options.flag("inactive")?;
    options.end()?;
    call.reply(&network.xml(call.caller(), inactive).await?)
}

async fn undefine(network: Arc<Network>, call: Call) -> Outcome {
    let force = forced(call.options()?)?;
    network.undefine(call.caller(), force).await?;
    call.done()
}

async fn check_undefine(network: Arc<Network>, call: Call) -> Outcome {
    let force = forced(call.options()?)?;
    let checked = network.check_undefine(call.caller(), force).await?;
    call.reply(&of_check(&checked)?)
}

fn of_check(checked: &CheckedNetwork) -> Result<HashMap<&'static str, Variant<'static>>, Error> {
    let users: Vec<(ObjectPath<'static>, String, &'static str)> = checked
        .users
        .iter()
        .map(|user| Ok((paths::argument(paths::of(&user.object))?, user.place.clone(), user.how.as_str())))
        .collect::<Result<_, Error>>()?;
    Ok(verdict(checked.refusal.as_ref()).into_iter().chain([("users", Variant::from(users))]).collect())
}

fn forced(mut options: Options) -> Result<bool, Error> {
    let force = options.flag("force")?;
    options.end()?;
    Ok(force)
}

async fn can(network: Arc<Network>, call: Call) -> Outcome {
    let method: String = call.read()?;
    call.reply(&network.can(call.caller(), &method).await?)
}

async fn set_autostart(network: Arc<Network>, call: Call) -> Outcome {
    let on = bool::try_from(call.value()?).map_err(|error| Error::invalid_args(error.to_string()))?;
    network.set_autostart(call.caller(), on).await?;
    call.done()
}
