//! `org.virt.StoragePool`: translation between the bus and storage pools.

use super::job::{finish, no_wait};
use super::options::{choice, job_options};
use super::secret::users;
use super::{Lifecycle, Members, Published, paths, properties, told, volume};
use crate::bus::answers::no_object;
use crate::bus::call::{self, Call, Options, Outcome};
use crate::bus::rows::{Facts, Object, Objects};
use crate::bus::table::Offer;
use crate::error::Error;
use std::sync::Arc;
use virt_model::driver::storage::Preallocation;
use virt_service::facts::{ObjectFacts, PoolFacts};
use virt_service::object::ObjectRef;
use virt_service::verb;
use virt_service::{AddVolume, CreateVolume, Pool, Service, StartPool, Volume};
use zbus::ObjectPath;

/// The interface.
pub const INTERFACE: &str = "org.virt.StoragePool";

/// The interface of the manager that has to do with storage.
pub const MANAGER: &str = "org.virt.Manager.Storage";

properties! {
    f: PoolFacts {
        "Name" = Str(&f.name);
        "UUID" = Str(&f.uuid.to_string());
        "Type" = Str(f.kind);
        "State" = Str(f.state);
        "Active" = Bool(f.active);
        "Persistent" = Bool(f.persistent);
        "Autostart" = Bool(f.autostart);
        "ConfigChanged" = Bool(f.config_changed);
        "Owner" = U32(f.owner);
        "Target" = Str(&f.target);
        "Capacity" = U64(f.room.capacity);
        "Allocation" = U64(f.room.allocation);
        "Available" = U64(f.room.available);
        "VolumeCount" = U32(f.volume_count);
        "Refreshed" = U64(f.refreshed_usec);
        "Features" = Strs(f.features);
        "Problems" = Pairs(&f.problems);
        "Users" = Users(&users(&f.users));
        "Broken" = Str(&f.broken);
    }
}

/// See [`super::published`].
pub fn published(facts: &Arc<PoolFacts>) -> Published {
    let object = Object::new(paths::of(&ObjectRef::Pool(facts.uuid)), INTERFACE, row(facts));
    Published {
        object: object.of(Facts::Other(ObjectFacts::Pool(facts.clone()))),
        lifecycle: Some(Lifecycle {
            manager: MANAGER,
            member: "StoragePoolLifecycle",
            names: vec![facts.uuid.to_string(), facts.name.clone()],
            detailed: true,
        }),
    }
}

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    Members::new(service, find)
        .method(&verb::POOL_START, start)
        .method(&verb::POOL_REFRESH, refresh)
        .method(&verb::POOL_DESTROY, destroy)
        .method(&verb::POOL_BUILD, build)
        .method(&verb::POOL_DELETE, delete)
        .method(&verb::CHECK_POOL_DELETE, check_delete)
        .method(&verb::CREATE_VOLUME, create_volume)
        .method(&verb::CHECK_CREATE_VOLUME, check_create_volume)
        .method(&verb::ADD_VOLUME, add_volume)
        .method(&verb::GET_VOLUME, get_volume)
        .method(&verb::LIST_VOLUMES, list_volumes)
        .method(&verb::POOL_XML, get_xml)
        .method(&verb::UNDEFINE_POOL, undefine)
        .method(&verb::CHECK_UNDEFINE_POOL, check_undefine)
        .method(&verb::POOL_CAN, can)
        .setter(&verb::POOL_AUTOSTART, set_autostart)
        .offer(INTERFACE, FIELDS, &[("Lifecycle", "ss")])
}

fn find(service: &Arc<Service>, call: &Call) -> Result<Found, Error> {
    let found = match paths::object(call.path()) {
        Some(ObjectRef::Pool(uuid)) => service.pool(uuid),
        _ => None,
    };
    let pool = found.ok_or_else(|| no_object(call.path()))?;
    Ok(Found { pool, service: service.clone() })
}

/// A pool, and where others are found that a call names.
struct Found {
    pool: Arc<Pool>,
    service: Arc<Service>,
}

/// The path of a pool.
pub fn path(pool: &Pool) -> Result<ObjectPath<'static>, Error> {
    paths::argument(paths::of(&ObjectRef::Pool(pool.uuid())))
}

async fn start(found: Found, call: Call) -> Outcome {
    let mut options = call.options()?;
    let start = start_options(&mut options)?;
    let no_wait = no_wait(options)?;
    let ticket = found.pool.start(call.caller(), start).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

/// How a pool is to be started.
pub fn start_options(options: &mut Options) -> Result<StartPool, Error> {
    Ok(StartPool {
        build: options.flag("build")?,
        overwrite: options.flag("overwrite")?,
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    })
}

async fn refresh(found: Found, call: Call) -> Outcome {
    let (departs, no_wait) = job_options(call.options()?)?;
    let ticket = found.pool.refresh(call.caller(), departs).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

async fn destroy(found: Found, call: Call) -> Outcome {
    call.options()?.end()?;
    found.pool.destroy(call.caller()).await?;
    call.done()
}

async fn build(found: Found, call: Call) -> Outcome {
    let mut options = call.options()?;
    let overwrite = options.flag("overwrite")?;
    let (departs, no_wait) = job_options(options)?;
    let ticket = found.pool.build(call.caller(), overwrite, departs).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

async fn delete(found: Found, call: Call) -> Outcome {
    let (departs, no_wait) = job_options(call.options()?)?;
    let ticket = found.pool.delete(call.caller(), departs).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

async fn check_delete(found: Found, call: Call) -> Outcome {
    call.options()?.end()?;
    call.reply(&told::storage_check(found.pool.check_delete(call.caller()).await?)?)
}

async fn create_volume(found: Found, call: Call) -> Outcome {
    let (made, no_wait) = {
        let body = call.body();
        let (xml, mut options): (&str, Options) = call::read(&body)?;
        let create = create_options(&call, &mut options)?;
        let no_wait = no_wait(options)?;
        (found.pool.create_volume(call.caller(), xml, create).await?, no_wait)
    };
    let (volume, ticket) = made;
    call.reply(&(volume::path(&volume)?, finish(ticket, no_wait).await?))
}

async fn check_create_volume(found: Found, call: Call) -> Outcome {
    let body = call.body();
    let (xml, mut options): (&str, Options) = call::read(&body)?;
    let preallocate = choice(&mut options, "preallocate", Preallocation::ALL)?;
    options.end()?;
    call.reply(&told::storage_check(found.pool.check_create_volume(call.caller(), xml, preallocate).await?)?)
}

async fn add_volume(found: Found, call: Call) -> Outcome {
    let (made, no_wait) = {
        let body = call.body();
        let (name, capacity, mut options): (&str, u64, Options) = call::read(&body)?;
        let backing = options.path("backing")?;
        let add = AddVolume {
            format: options.text("format")?,
            backing: backing.map(|path| volume::at(&found.service, &path)).transpose()?,
            allocation: options.long("allocation")?.unwrap_or_default(),
            secret: options.text("secret")?,
            cluster_size: options.long("cluster-size")?,
            create: create_options(&call, &mut options)?,
        };
        let no_wait = no_wait(options)?;
        (found.pool.add_volume(call.caller(), name, capacity, add).await?, no_wait)
    };
    let (volume, ticket) = made;
    call.reply(&(volume::path(&volume)?, finish(ticket, no_wait).await?))
}

fn create_options(call: &Call, options: &mut Options) -> Result<CreateVolume, Error> {
    Ok(CreateVolume {
        preallocate: choice(options, "preallocate", Preallocation::ALL)?,
        content: call.file(options, "content")?,
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    })
}

async fn get_volume(found: Found, call: Call) -> Outcome {
    let body = call.body();
    let name: &str = call::read(&body)?;
    let volume: Volume = found.pool.find_volume(name)?;
    call.reply(&volume::path(&volume)?)
}

/// Path, name, format, capacity, allocation.
type Entry = (ObjectPath<'static>, String, String, u64, u64);

async fn list_volumes(found: Found, call: Call) -> Outcome {
    call.options()?.end()?;
    let below = paths::of(&ObjectRef::Pool(found.pool.uuid()));
    call.listing(move |objects: &Objects| {
        let volumes = objects.below(&below).filter_map(|object| match &object.facts {
            Facts::Other(ObjectFacts::Volume(facts)) => {
                let path = paths::argument(object.path.to_string()).ok()?;
                Some((path, facts.name.clone(), facts.format.clone(), facts.capacity, facts.allocation))
            }
            _ => None,
        });
        volumes.collect::<Vec<Entry>>()
    })
}

async fn get_xml(found: Found, call: Call) -> Outcome {
    let mut options = call.options()?;
    let inactive = options.flag("inactive")?;
    options.end()?;
    call.reply(&found.pool.xml(call.caller(), inactive).await?)
}

async fn undefine(found: Found, call: Call) -> Outcome {
    let force = forced(call.options()?)?;
    found.pool.undefine(call.caller(), force).await?;
    call.done()
}

async fn check_undefine(found: Found, call: Call) -> Outcome {
    let force = forced(call.options()?)?;
    call.reply(&told::storage_check(found.pool.check_undefine(call.caller(), force).await?)?)
}

fn forced(mut options: Options) -> Result<bool, Error> {
    let force = options.flag("force")?;
    options.end()?;
    Ok(force)
}

async fn can(found: Found, call: Call) -> Outcome {
    let method: String = call.read()?;
    call.reply(&found.pool.can(call.caller(), &method).await?)
}

async fn set_autostart(found: Found, call: Call) -> Outcome {
    let autostart = bool::try_from(call.value()?).map_err(|error| Error::invalid_args(error.to_string()))?;
    found.pool.set_autostart(call.caller(), autostart).await?;
    call.done()
}
