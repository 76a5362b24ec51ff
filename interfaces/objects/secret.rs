//! `org.virt.Secret` and `org.virt.Manager.Secret`: translation between the bus and secrets. Nothing of a value is published.

use super::snapshot::verdict;
use super::{Lifecycle, Members, Published, paths, properties};
use crate::bus::answers::no_object;
use crate::bus::call::{self, Call, Options, Outcome};
use crate::bus::rows::{Facts, Object, Objects};
use crate::bus::table::Offer;
use crate::error::Error;
use std::collections::HashMap;
use std::sync::Arc;
use virt_service::facts::{ObjectFacts, SecretFacts};
use virt_service::object::{ObjectRef, User};
use virt_service::verb;
use virt_service::{Secret, Service};
use zbus::wire::Fd;
use zbus::{ObjectPath, Variant};

/// The interface.
pub const INTERFACE: &str = "org.virt.Secret";

/// The interface of the manager that has to do with secrets.
pub const MANAGER: &str = "org.virt.Manager.Secret";

properties! {
    f: SecretFacts {
        "UUID" = Str(&f.uuid.to_string());
        "UsageType" = Str(f.usage_type);
        "UsageID" = Str(&f.usage_id);
        "Description" = Str(&f.description);
        "Ephemeral" = Bool(f.ephemeral);
        "Private" = Bool(f.private);
        "HasValue" = Bool(f.has_value);
        "ValueChanged" = U64(f.value_changed_usec);
        "Protection" = Str(f.protection);
        "Owner" = U32(f.owner);
        "Users" = Users(&users(&f.users));
        "Broken" = Str(&f.broken);
    }
}

/// See [`super::published`].
pub fn published(facts: &Arc<SecretFacts>) -> Published {
    let object = Object::new(paths::of(&ObjectRef::Secret(facts.uuid)), INTERFACE, row(facts));
    Published {
        object: object.of(Facts::Other(ObjectFacts::Secret(facts.clone()))),
        lifecycle: Some(Lifecycle {
            manager: MANAGER,
            member: "SecretLifecycle",
            names: vec![facts.uuid.to_string()],
            detailed: false,
        }),
    }
}

/// Users as they are shown on the bus, wherever objects have some.
pub fn users(users: &[User]) -> Vec<(String, &str, &'static str)> {
    users.iter().map(|user| (paths::of(&user.object), &*user.place, user.how.as_str())).collect()
}

/// What there is for each member of the manager's interface.
pub fn offer_of_manager(service: &Arc<Service>) -> Offer {
    Members::new(service, |service, _| Ok(service.clone()))
        .method(&verb::DEFINE_SECRET, define)
        .method(&verb::GET_SECRET, get)
        .method(&verb::GET_SECRET_BY_USAGE, get_by_usage)
        .method(&verb::LIST_SECRETS, list)
        .offer(MANAGER, &[], &[("SecretLifecycle", "oss")])
}

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    Members::new(service, find)
        .method(&verb::SET_VALUE, set_value)
        .method(&verb::SET_VALUE_FROM_FD, set_value_from_fd)
        .method(&verb::GET_VALUE, get_value)
        .method(&verb::SECRET_XML, get_xml)
        .method(&verb::UNDEFINE_SECRET, undefine)
        .method(&verb::CHECK_UNDEFINE_SECRET, check_undefine)
        .method(&verb::SECRET_CAN, can)
        .offer(INTERFACE, FIELDS, &[("Lifecycle", "ss")])
}

fn find(service: &Arc<Service>, call: &Call) -> Result<Arc<Secret>, Error> {
    let found = match paths::object(call.path()) {
        Some(ObjectRef::Secret(uuid)) => service.secret(uuid),
        _ => None,
    };
    found.ok_or_else(|| no_object(call.path()))
}

fn path(secret: &Secret) -> Result<ObjectPath<'static>, Error> {
    paths::argument(paths::of(&ObjectRef::Secret(secret.uuid())))
}

async fn define(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    options.end()?;
    call.reply(&path(&*service.define_secret(call.caller(), xml).await?)?)
}

async fn get(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let uuid: &str = call::read(&body)?;
    call.reply(&path(&*service.secret_by_uuid(uuid)?)?)
}

async fn get_by_usage(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (kind, id): (&str, &str) = call::read(&body)?;
    call.reply(&path(&*service.secret_by_usage(kind, id)?)?)
}

/// Path, uuid, type and what it is for.
type Entry = (ObjectPath<'static>, String, &'static str, String);

async fn list(_: Arc<Service>, call: Call) -> Outcome {
    call.options()?.end()?;
    call.listing(|objects: &Objects| {
        let secrets = objects.below("/org/virt/secret").filter_map(|object| match &object.facts {
            Facts::Other(ObjectFacts::Secret(facts)) => {
                let path = paths::argument(object.path.to_string()).ok()?;
                Some((path, facts.uuid.to_string(), facts.usage_type, facts.usage_id.clone()))
            }
            _ => None,
        });
        secrets.collect::<Vec<Entry>>()
    })
}

async fn set_value(secret: Arc<Secret>, call: Call) -> Outcome {
    let body = call.body();
    let (value, options): (&[u8], Options) = call::read(&body)?;
    options.end()?;
    secret.set_value(call.caller(), value.to_vec().into()).await?;
    call.done()
}

async fn set_value_from_fd(secret: Arc<Secret>, call: Call) -> Outcome {
    let file = {
        let body = call.body();
        let (file, options): (Fd<'_>, Options) = call::read(&body)?;
        options.end()?;
        call.given("fd", file)?
    };
    secret.set_value_from(call.caller(), file).await?;
    call.done()
}

async fn get_value(secret: Arc<Secret>, call: Call) -> Outcome {
    call.options()?.end()?;
    let value = secret.value(call.caller()).await?;
    call.reply(&value.bytes())
}

async fn get_xml(secret: Arc<Secret>, call: Call) -> Outcome {
    call.options()?.end()?;
    call.reply(&secret.xml(call.caller()).await?)
}

async fn undefine(secret: Arc<Secret>, call: Call) -> Outcome {
    let force = forced(call.options()?)?;
    secret.undefine(call.caller(), force).await?;
    call.done()
}

async fn check_undefine(secret: Arc<Secret>, call: Call) -> Outcome {
    let force = forced(call.options()?)?;
    let checked = secret.check_undefine(call.caller(), force).await?;
    let users: Vec<(ObjectPath<'static>, String, &'static str)> = checked
        .users
        .iter()
        .map(|user| Ok((paths::argument(paths::of(&user.object))?, user.place.clone(), user.how.as_str())))
        .collect::<Result<_, Error>>()?;
    let answer: HashMap<&'static str, Variant<'static>> =
        verdict(checked.refusal.as_ref()).into_iter().chain([("users", Variant::from(users))]).collect();
    call.reply(&answer)
}

fn forced(mut options: Options) -> Result<bool, Error> {
    let force = options.flag("force")?;
    options.end()?;
    Ok(force)
}

async fn can(secret: Arc<Secret>, call: Call) -> Outcome {
    let method: String = call.read()?;
    call.reply(&secret.can(call.caller(), &method).await?)
}
