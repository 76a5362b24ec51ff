//! `org.virt.NodeDevice`: the devices of the host, and what `org.virt.Manager.NodeDevice` says of them.

use super::secret::users;
use super::snapshot::verdict;
use super::{Lifecycle, Members, Published, paths, properties};
use crate::bus::answers::no_object;
use crate::bus::call::{self, Call, Options, Outcome};
use crate::bus::rows::{Facts, Object, Objects};
use crate::bus::table::Offer;
use crate::error::Error;
use std::collections::HashMap;
use std::sync::Arc;
use virt_service::facts::{NodeDeviceFacts, ObjectFacts};
use virt_service::object::ObjectRef;
use virt_service::verb;
use virt_service::{DetachCheck, HostDevice, Service};
use zbus::{ObjectPath, Variant};

/// The interface.
pub const INTERFACE: &str = "org.virt.NodeDevice";

/// The interface of the manager that has to do with devices of the host.
pub const MANAGER: &str = "org.virt.Manager.NodeDevice";

properties! {
    f: NodeDeviceFacts {
        "Name" = Str(&f.device.name);
        "Parent" = Path(&f.device.parent.as_ref().map_or_else(|| "/".to_owned(), path));
        "Class" = Str(f.device.class());
        "Capabilities" = Strs(&f.device.capabilities());
        "SysPath" = Str(&f.device.sys_path);
        "DevNodes" = Strs(&f.device.nodes.iter().map(String::as_str).collect::<Vec<_>>());
        "Driver" = Str(f.device.driver.as_deref().unwrap_or_default());
        "Vendor" = Str(&f.device.vendor.name);
        "Product" = Str(&f.device.product.name);
        "Address" = Str(&f.device.address());
        "IOMMUGroup" = I32(f.device.group().map_or(-1, |group| i32::try_from(group).unwrap_or(i32::MAX)));
        "Detached" = Bool(f.device.detached());
        "Assignable" = Str(f.device.assignable());
        "Users" = Users(&users(&f.users));
        "Active" = Bool(true);
        "Persistent" = Bool(false);
        "Autostart" = Bool(false);
    }
}

fn path(name: &Arc<str>) -> String {
    paths::of(&ObjectRef::NodeDevice(name.clone()))
}

/// See [`super::published`].
pub fn published(facts: &Arc<NodeDeviceFacts>) -> Published {
    let object = Object::new(path(&facts.device.name), INTERFACE, row(facts));
    Published {
        object: object.of(Facts::Other(ObjectFacts::NodeDevice(facts.clone()))),
        lifecycle: Some(Lifecycle {
            manager: MANAGER,
            member: "NodeDeviceLifecycle",
            names: vec![facts.device.name.to_string()],
            detailed: false,
        }),
    }
}

/// What there is for each member of a device.
pub fn offer(service: &Arc<Service>) -> Offer {
    Members::new(service, find)
        .method(&verb::DETACH, detach)
        .method(&verb::REATTACH, reattach)
        .method(&verb::RESET_DEVICE, reset)
        .method(&verb::CHECK_DETACH, check_detach)
        .method(&verb::DESTROY_DEVICE, destroy)
        .method(&verb::NODE_DEVICE_XML, get_xml)
        .method(&verb::NODE_DEVICE_CAN, can)
        .offer(INTERFACE, FIELDS, &[("Lifecycle", "ss")])
}

/// What there is for each member of the manager's interface.
pub fn offer_manager(service: &Arc<Service>) -> Offer {
    Members::new(service, |service, _| Ok(service.clone()))
        .method(&verb::LIST_NODE_DEVICES, list)
        .method(&verb::GET_NODE_DEVICE, get)
        .method(&verb::GET_NODE_DEVICE_BY_WWN, get_by_wwn)
        .method(&verb::CREATE_NODE_DEVICE, create)
        .method(&verb::DEFINE_NODE_DEVICE, define)
        .offer(MANAGER, &[], &[("NodeDeviceLifecycle", "oss")])
}

fn find(service: &Arc<Service>, call: &Call) -> Result<Arc<HostDevice>, Error> {
    match paths::object(call.path()) {
        Some(ObjectRef::NodeDevice(name)) => service.node_device(&name).map_err(|_| no_object(call.path())),
        _ => Err(no_object(call.path())),
    }
}

async fn detach(device: Arc<HostDevice>, call: Call) -> Outcome {
    let driver = driver(call.options()?)?;
    device.detach(call.caller(), driver.as_deref()).await?;
    call.done()
}

fn driver(mut options: Options) -> Result<Option<String>, Error> {
    let driver = options.text("driver")?;
    options.end()?;
    Ok(driver)
}

async fn reattach(device: Arc<HostDevice>, call: Call) -> Outcome {
    call.options()?.end()?;
    device.reattach(call.caller()).await?;
    call.done()
}

async fn reset(device: Arc<HostDevice>, call: Call) -> Outcome {
    call.options()?.end()?;
    device.reset(call.caller()).await?;
    call.done()
}

async fn destroy(device: Arc<HostDevice>, call: Call) -> Outcome {
    call.options()?.end()?;
    device.destroy(call.caller()).await?;
    call.done()
}

async fn check_detach(device: Arc<HostDevice>, call: Call) -> Outcome {
    let driver = driver(call.options()?)?;
    let check = device.check_detach(call.caller(), driver.as_deref()).await?;
    call.reply(&told(check)?)
}

fn told(check: DetachCheck) -> Result<HashMap<&'static str, Variant<'static>>, Error> {
    let argument = |path: String| paths::argument(path);
    let users =
        users(&check.users).into_iter().map(|(object, place, how)| Ok((argument(object)?, place.to_owned(), how)));
    let users: Vec<(ObjectPath<'static>, String, &'static str)> = users.collect::<Result<_, Error>>()?;
    let siblings = check.siblings.iter().map(|name| argument(path(name)));
    let siblings: Vec<ObjectPath<'static>> = siblings.collect::<Result<_, Error>>()?;
    let rest = [
        ("users", Variant::from(users)),
        ("siblings", Variant::from(siblings)),
        ("host-uses", Variant::from(check.host_uses)),
    ];
    Ok(verdict(check.refusal.as_ref()).into_iter().chain(rest).collect())
}

async fn get_xml(device: Arc<HostDevice>, call: Call) -> Outcome {
    call.options()?.end()?;
    call.reply(&device.xml(call.caller()).await?)
}

async fn can(device: Arc<HostDevice>, call: Call) -> Outcome {
    let method: String = call.read()?;
    call.reply(&device.can(call.caller(), &method).await?)
}

async fn list(_: Arc<Service>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let (class, capability) = (options.text("class")?, options.text("capability")?);
    options.end()?;
    call.listing(move |objects| inventory(objects, class.as_deref(), capability.as_deref()))
}

/// Path, name, class, the parent's name.
type Entry = (ObjectPath<'static>, String, &'static str, String);

fn inventory(objects: &Objects, class: Option<&str>, capability: Option<&str>) -> Vec<Entry> {
    let devices = objects.below(paths::NODE_DEVICES).filter_map(|object| match &object.facts {
        Facts::Other(ObjectFacts::NodeDevice(facts)) => Some((object, &facts.device)),
        _ => None,
    });
    let kept = devices.filter(|(_, device)| {
        class.is_none_or(|class| device.class() == class)
            && capability.is_none_or(|capability| device.capabilities().contains(&capability))
    });
    kept.filter_map(|(object, device)| {
        let path = ObjectPath::try_from(object.path.to_string()).ok()?;
        let parent = device.parent.as_deref().unwrap_or_default();
        Some((path, device.name.to_string(), device.class(), parent.to_owned()))
    })
    .collect()
}

async fn get(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let name: &str = call::read(&body)?;
    call.reply(&paths::argument(path(service.node_device(name)?.name()))?)
}

async fn get_by_wwn(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (node, port): (&str, &str) = call::read(&body)?;
    call.reply(&paths::argument(path(service.node_device_by_wwn(node, port)?.name()))?)
}

async fn create(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    options.end()?;
    let made = service.create_node_device(call.caller(), xml).await?;
    call.reply(&paths::argument(path(made.name()))?)
}

async fn define(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (_, options): (&str, Options) = call::read(&body)?;
    options.end()?;
    match service.define_node_device(call.caller()).await? {}
}
