//! `org.virt.StorageVolume`: translation between the bus and volumes.

use super::job::{finish, no_wait};
use super::options::{choice, job_options};
use super::secret::users;
use super::{Members, Published, paths, properties, told};
use crate::bus::answers::no_object;
use crate::bus::call::{self, Call, Options, Outcome};
use crate::bus::rows::{Facts, Object};
use crate::bus::table::Offer;
use crate::error::Error;
use std::sync::Arc;
use virt_model::driver::storage::{Part, Reflink, Wiping};
use virt_model::xml::shorten;
use virt_service::error::Error as ServiceError;
use virt_service::facts::{ObjectFacts, VolumeFacts};
use virt_service::object::ObjectRef;
use virt_service::verb;
use virt_service::{CloneVolume, NewCapacity, Service, Volume};
use zbus::ObjectPath;
use zbus::wire::Fd;

/// The interface.
pub const INTERFACE: &str = "org.virt.StorageVolume";

properties! {
    f: VolumeFacts {
        "Name" = Str(&f.name);
        "Pool" = Path(&paths::of(&ObjectRef::Pool(f.pool)));
        "Key" = Str(&f.key);
        "Path" = Str(&f.path);
        "Type" = Str(f.kind);
        "Format" = Str(&f.format);
        "Capacity" = U64(f.capacity);
        "Allocation" = U64(f.allocation);
        "BackingPath" = Str(&f.backing_path);
        "BackingVolume" = Path(&paths::of(f.backing.as_ref().unwrap_or(&ObjectRef::Foreign)));
        "Encrypted" = Bool(f.encrypted);
        "State" = Str(f.state);
        "Owner" = U32(f.owner);
        "Users" = Users(&users(&f.users));
        "Problems" = Pairs(&f.problems);
    }
}

/// See [`super::published`].
pub fn published(facts: &Arc<VolumeFacts>) -> Published {
    let path = paths::of(&ObjectRef::Volume(facts.pool, facts.name.as_str().into()));
    let object = Object::new(path, INTERFACE, row(facts));
    Published { object: object.of(Facts::Other(ObjectFacts::Volume(facts.clone()))), lifecycle: None }
}

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    Members::new(service, find)
        .method(&verb::VOLUME_DELETE, delete)
        .method(&verb::CHECK_VOLUME_DELETE, check_delete)
        .method(&verb::VOLUME_CLONE, clone)
        .method(&verb::VOLUME_RESIZE, resize)
        .method(&verb::VOLUME_WIPE, wipe)
        .method(&verb::VOLUME_UPLOAD, upload)
        .method(&verb::VOLUME_DOWNLOAD, download)
        .method(&verb::OPEN_NBD, open_nbd)
        .method(&verb::VOLUME_XML, get_xml)
        .method(&verb::VOLUME_CAN, can)
        .offer(INTERFACE, FIELDS, &[])
}

/// A volume, and where pools are found that a call names.
struct Found {
    volume: Volume,
    service: Arc<Service>,
}

fn find(service: &Arc<Service>, call: &Call) -> Result<Found, Error> {
    let volume = found(service, call.path()).ok_or_else(|| no_object(call.path()))?;
    Ok(Found { volume, service: service.clone() })
}

fn found(service: &Arc<Service>, path: &str) -> Option<Volume> {
    match paths::object(path) {
        Some(ObjectRef::Volume(pool, name)) => service.pool(pool)?.volume(&name),
        _ => None,
    }
}

/// The volume that an option names.
pub fn at(service: &Arc<Service>, path: &str) -> Result<Volume, Error> {
    let missing = || ServiceError::NoSuchVolume(format!("there is no volume at '{}'", shorten(path)));
    Ok(found(service, path).ok_or_else(missing)?)
}

/// The path of a volume.
pub fn path(volume: &Volume) -> Result<ObjectPath<'static>, Error> {
    paths::argument(paths::of(&volume.object()))
}

async fn delete(found: Found, call: Call) -> Outcome {
    let mut options = call.options()?;
    let (force, with_snapshots) = (options.flag("force")?, options.flag("with-snapshots")?);
    let (departs, no_wait) = job_options(options)?;
    let ticket = found.volume.delete(call.caller(), force, with_snapshots, departs).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

async fn check_delete(found: Found, call: Call) -> Outcome {
    let mut options = call.options()?;
    let (force, with_snapshots) = (options.flag("force")?, options.flag("with-snapshots")?);
    options.end()?;
    call.reply(&told::storage_check(found.volume.check_delete(call.caller(), force, with_snapshots).await?)?)
}

async fn clone(found: Found, call: Call) -> Outcome {
    let body = call.body();
    let (name, mut options): (&str, Options) = call::read(&body)?;
    let pool = options.path("pool")?;
    let wanted = CloneVolume {
        pool: pool.map(|path| pool_at(&found.service, &path)).transpose()?,
        format: options.text("format")?,
        thin: options.flag("thin")?,
        reflink: choice(&mut options, "reflink", Reflink::ALL)?,
        flatten: options.flag("flatten")?,
        secret: options.text("secret")?,
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    };
    let no_wait = no_wait(options)?;
    let (volume, ticket) = found.volume.clone_to(call.caller(), name, wanted).await?;
    call.reply(&(path(&volume)?, finish(ticket, no_wait).await?))
}

fn pool_at(service: &Arc<Service>, path: &str) -> Result<Arc<virt_service::Pool>, Error> {
    let found = match paths::object(path) {
        Some(ObjectRef::Pool(uuid)) => service.pool(uuid),
        _ => None,
    };
    Ok(found.ok_or_else(|| ServiceError::NoSuchPool { what: "path", value: shorten(path) })?)
}

async fn resize(found: Found, call: Call) -> Outcome {
    let body = call.body();
    let (capacity, mut options): (u64, Options) = call::read(&body)?;
    let (shrink, allocate) = (options.flag("shrink")?, options.flag("allocate")?);
    let (cancel_on_disconnect, no_wait) = job_options(options)?;
    let to = NewCapacity { capacity, shrink, allocate, cancel_on_disconnect };
    let ticket = found.volume.resize(call.caller(), to).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

async fn wipe(found: Found, call: Call) -> Outcome {
    let mut options = call.options()?;
    let how = choice(&mut options, "algorithm", Wiping::ALL)?;
    let (departs, no_wait) = job_options(options)?;
    let ticket = found.volume.wipe(call.caller(), how, departs).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

/// The part of a volume that is meant, if it is not all of it, and whether holes stay holes.
fn part(options: &mut Options) -> Result<(Option<Part>, bool), Error> {
    let (offset, length) = (options.long("offset")?, options.long("length")?);
    let part = (offset.is_some() || length.is_some()).then(|| Part { offset: offset.unwrap_or_default(), length });
    Ok((part, options.flag("sparse")?))
}

async fn upload(found: Found, call: Call) -> Outcome {
    let (file, (part, sparse), (departs, no_wait)) = {
        let body = call.body();
        let (file, mut options): (Fd<'_>, Options) = call::read(&body)?;
        (call.given("fd", file)?, part(&mut options)?, job_options(options)?)
    };
    let ticket = found.volume.upload(call.caller(), file, part, sparse, departs).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

async fn download(found: Found, call: Call) -> Outcome {
    let (file, (part, sparse), (departs, no_wait)) = {
        let body = call.body();
        let (file, mut options): (Fd<'_>, Options) = call::read(&body)?;
        (call.given("fd", file)?, part(&mut options)?, job_options(options)?)
    };
    let ticket = found.volume.download(call.caller(), file, part, sparse, departs).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

async fn open_nbd(found: Found, call: Call) -> Outcome {
    let mut options = call.options()?;
    let read_only = options.flag_if_given("read-only")?.unwrap_or(true);
    options.end()?;
    call.reply(&Fd::from(found.volume.open_nbd(call.caller(), read_only).await?))
}

async fn get_xml(found: Found, call: Call) -> Outcome {
    call.options()?.end()?;
    call.reply(&found.volume.xml(call.caller()).await?)
}

async fn can(found: Found, call: Call) -> Outcome {
    let method: String = call.read()?;
    call.reply(&found.volume.can(call.caller(), &method).await?)
}
