//! `org.virt.Checkpoint`: translation between the bus and a domain's checkpoints, and the backups that are made since them.

use super::job::no_wait;
use super::{Members, paths, properties};
use crate::bus::answers::no_object;
use crate::bus::call::{self, Call, Options, Outcome};
use crate::bus::rows::Object;
use crate::bus::table::Offer;
use crate::error::Error;
use std::sync::Arc;
use virt_service::facts::CheckpointFacts;
use virt_service::verb;
use virt_service::{BackupOptions, BackupTicket, DeleteCheckpoint, Domain, Service};
use zbus::wire::Fd;

/// The interface.
pub const INTERFACE: &str = "org.virt.Checkpoint";

properties! {
    f: CheckpointFacts {
        "Name" = Str(&f.name);
        "Domain" = Path(&paths::domain(f.domain));
        "CreationTime" = U64(f.created_usec);
        "Parent" = Path(&f.parent.as_ref().map_or_else(|| "/".to_owned(), |name| paths::checkpoint(f.domain, name)));
        "Children" = Paths(&f.children.iter().map(|name| paths::checkpoint(f.domain, name)).collect::<Vec<_>>());
        "Broken" = Str(&f.broken);
    }
}

/// What is published of a checkpoint.
pub fn object(facts: &Arc<CheckpointFacts>) -> Object {
    let path = paths::checkpoint(facts.domain, &facts.name);
    Object::new(path, INTERFACE, row(facts))
}

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    Members::new(service, find)
        .method(&verb::DELETE_CHECKPOINT, delete)
        .method(&verb::CHECKPOINT_XML, get_xml)
        .method(&verb::CHECKPOINT_CAN, can)
        .offer(INTERFACE, FIELDS, &[])
}

/// A domain, and the name of a checkpoint that it may have.
type Found = (Arc<Domain>, String);

fn find(service: &Arc<Service>, call: &Call) -> Result<Found, Error> {
    let found = paths::checkpoint_name(call.path()).and_then(|(domain, name)| Some((service.get(domain)?, name)));
    found.ok_or_else(|| no_object(call.path()))
}

/// `Domain.CreateCheckpoint`
pub async fn create(domain: Arc<Domain>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    options.end()?;
    let name = domain.create_checkpoint(call.caller(), xml).await?;
    call.reply(&paths::argument(paths::checkpoint(domain.uuid(), &name))?)
}

/// `Domain.BackupBegin`
pub async fn backup_begin(domain: Arc<Domain>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, checkpoint, mut options): (&str, &str, Options) = call::read(&body)?;
    let how = BackupOptions {
        bandwidth: options.long("bandwidth")?.unwrap_or_default(),
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    };
    let no_wait = no_wait(options)?;
    let BackupTicket { ticket, ready } = domain.begin_backup(call.caller(), (xml, checkpoint), how).await?;
    let job = paths::job(ticket.id);
    // One that can be read is not waited for any longer.
    if !no_wait && ready.await.is_err() {
        ticket.done().await?;
    }
    call.reply(&paths::argument(job)?)
}

/// `Domain.OpenBackup`
pub async fn open_backup(domain: Arc<Domain>, call: Call) -> Outcome {
    let (target, options): (String, Options) = call.read()?;
    options.end()?;
    let connection = domain.open_backup(call.caller(), &target).await?;
    call.reply(&Fd::from(connection))
}

/// `Domain.ListCheckpoints`
pub async fn list(domain: Arc<Domain>, call: Call) -> Outcome {
    call.options()?.end()?;
    let names = domain.checkpoints(call.caller()).await?;
    let found = names.iter().map(|name| paths::argument(paths::checkpoint(domain.uuid(), name)));
    call.reply(&found.collect::<Result<Vec<_>, _>>()?)
}

/// `Domain.GetCheckpoint`
pub async fn get(domain: Arc<Domain>, call: Call) -> Outcome {
    let name: String = call.read()?;
    domain.has_checkpoint(call.caller(), &name).await?;
    call.reply(&paths::argument(paths::checkpoint(domain.uuid(), &name))?)
}

async fn delete((domain, name): Found, call: Call) -> Outcome {
    let mut options = call.options()?;
    let how = DeleteCheckpoint { metadata_only: options.flag("metadata-only")? };
    options.end()?;
    domain.delete_checkpoint(call.caller(), &name, how).await?;
    call.done()
}

async fn get_xml((domain, name): Found, call: Call) -> Outcome {
    call.options()?.end()?;
    call.reply(&domain.checkpoint_xml(call.caller(), &name).await?)
}

async fn can((domain, name): Found, call: Call) -> Outcome {
    let method: String = call.read()?;
    call.reply(&domain.can_with_checkpoint(call.caller(), &name, &method).await?)
}
