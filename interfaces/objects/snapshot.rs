//! `org.virt.Snapshot`: translation between the bus and a domain's snapshots.

use super::job::{finish, no_wait};
use super::{Members, paths, properties};
use crate::bus::answers::no_object;
use crate::bus::call::{Call, FlagOrTexts, Options, Outcome};
use crate::bus::rows::Object;
use crate::bus::table::Offer;
use crate::error::Error;
use std::collections::HashMap;
use std::sync::Arc;
use virt_service::error::Error as ServiceError;
use virt_service::facts::SnapshotFacts;
use virt_service::verb;
use virt_service::{CreateCheck, CreateOptions, DeleteOptions, Domain, Force, Plan, RevertOptions, Service};
use zbus::Variant;

/// The interface.
pub const INTERFACE: &str = "org.virt.Snapshot";

properties! {
    f: SnapshotFacts {
        "Name" = Str(&f.name);
        "Domain" = Path(&paths::domain(f.domain));
        "Broken" = Str(&f.broken);
        "Description" = Str(&f.description);
        "CreationTime" = U64(f.created_usec);
        "State" = Str(f.state);
        "Parent" = Path(&paths::snapshot_or_none(f.domain, f.parent.as_deref()));
        "Children" = Paths(&f.children.iter().map(|name| paths::snapshot(f.domain, name)).collect::<Vec<_>>());
        "IsCurrent" = Bool(f.is_current);
        "Memory" = Str(f.memory);
        "Disks" = Triples(&f.disks);
    }
}

/// What is published of a snapshot.
pub fn object(facts: &Arc<SnapshotFacts>) -> Object {
    let path = paths::snapshot(facts.domain, &facts.name);
    Object::new(path, INTERFACE, row(facts))
}

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    Members::new(service, find)
        .method(&verb::REVERT, revert)
        .method(&verb::CHECK_REVERT, check_revert)
        .method(&verb::DELETE, delete)
        .method(&verb::CHECK_DELETE, check_delete)
        .method(&verb::SNAPSHOT_XML, get_xml)
        .method(&verb::SNAPSHOT_CAN, can)
        .offer(INTERFACE, FIELDS, &[])
}

/// A domain, and the name of a snapshot that it may have.
type Found = (Arc<Domain>, String);

fn find(service: &Arc<Service>, call: &Call) -> Result<Found, Error> {
    let found = paths::snapshot_name(call.path()).and_then(|(domain, name)| Some((service.get(domain)?, name)));
    found.ok_or_else(|| no_object(call.path()))
}

async fn revert((domain, name): Found, call: Call) -> Outcome {
    let (options, no_wait) = revert_options(call.options()?)?;
    let ticket = domain.revert(call.caller(), &name, options).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

async fn check_revert((domain, name): Found, call: Call) -> Outcome {
    let (options, _) = revert_options(call.options()?)?;
    let checked = domain.check_revert(call.caller(), &name, &options).await?;
    let (plan, refusal) = checked.map_or_else(|refusal| (Plan::default(), Some(refusal)), |plan| (plan, None));
    call.reply(&told(plan, refusal.as_ref()))
}

async fn delete((domain, name): Found, call: Call) -> Outcome {
    let (options, no_wait) = delete_options(call.options()?)?;
    let ticket = domain.delete_snapshot(call.caller(), &name, options).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

async fn check_delete((domain, name): Found, call: Call) -> Outcome {
    let (options, _) = delete_options(call.options()?)?;
    let (plan, refusal) = domain.check_delete(call.caller(), &name, options).await?;
    call.reply(&told(plan, refusal.as_ref()))
}

async fn get_xml((domain, name): Found, call: Call) -> Outcome {
    let mut options = call.options()?;
    let secure = options.flag("secure")?;
    options.end()?;
    call.reply(&domain.snapshot_xml(call.caller(), &name, secure).await?)
}

async fn can((domain, name): Found, call: Call) -> Outcome {
    let method: String = call.read()?;
    call.reply(&domain.can_with_snapshot(call.caller(), &name, &method).await?)
}

/// The options of `CreateSnapshot`, and whether not to wait.
pub fn create_options(mut options: Options) -> Result<(CreateOptions, bool), Error> {
    let create = CreateOptions {
        name: options.text("name")?,
        description: options.text("description")?,
        disk_only: options.flag("disk-only")?,
        live: options.flag("live")?,
        quiesce: options.flag("quiesce")?,
        reuse_external: options.flag("reuse-external")?,
        halt: options.flag("halt")?,
        no_metadata: options.flag("no-metadata")?,
        redefine: options.flag("redefine")?,
        current: options.flag("current")?,
        validate: options.flag("validate")?,
        leave_out: options.texts("leave-out")?,
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    };
    Ok((create, no_wait(options)?))
}

fn revert_options(mut options: Options) -> Result<(RevertOptions, bool), Error> {
    let revert = RevertOptions {
        running: options.flag("running")?,
        paused: options.flag("paused")?,
        reset_nvram: options.flag("reset-nvram")?,
        respawn: options.flag("respawn")?,
        force: match options.flag_or_texts("force")? {
            None | Some(FlagOrTexts::Flag(false)) => Force::No,
            Some(FlagOrTexts::Flag(true)) => Force::All,
            Some(FlagOrTexts::Texts(risks)) => Force::These(risks),
        },
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    };
    Ok((revert, no_wait(options)?))
}

fn delete_options(mut options: Options) -> Result<(DeleteOptions, bool), Error> {
    let delete = DeleteOptions {
        children: options.flag("children")?,
        children_only: options.flag("children-only")?,
        metadata_only: options.flag("metadata-only")?,
        cancel_on_disconnect: options.flag("cancel-on-disconnect")?,
    };
    Ok((delete, no_wait(options)?))
}

type Answer = HashMap<&'static str, Variant<'static>>;

/// A file, what becomes of it, and its bytes.
type Files = Vec<(String, &'static str, u64)>;

/// Whether it is possible, and if not the error and why.
pub fn verdict(refusal: Option<&ServiceError>) -> [(&'static str, Variant<'static>); 3] {
    let error = refusal.map(Error::from);
    let (name, text) = error.map_or_else(Default::default, |error| (error.name, error.text));
    [("possible", Variant::from(refusal.is_none())), ("error", Variant::from(name)), ("reason", Variant::from(text))]
}

fn files(files: Files) -> (&'static str, Variant<'static>) {
    ("files", Variant::from(files))
}

/// The answer to `CheckCreateSnapshot`.
pub fn told_create(check: Result<CreateCheck, ServiceError>) -> Answer {
    let verdict = verdict(check.as_ref().err());
    let check = check.unwrap_or(CreateCheck { xml: String::new(), files: Vec::new(), pauses_guest: false });
    let rest =
        [("xml", Variant::from(check.xml)), files(check.files), ("pauses-guest", Variant::from(check.pauses_guest))];
    verdict.into_iter().chain(rest).collect()
}

/// The answer to `CheckRevert` and `CheckDelete`.
fn told(plan: Plan, refusal: Option<&ServiceError>) -> Answer {
    let verdict = verdict(refusal);
    let risks: Vec<String> = plan.risks.iter().map(|risk| (*risk).to_owned()).collect();
    let differences: Vec<(String, String, String)> =
        plan.differences.into_iter().map(|found| (found.path, found.source, found.target)).collect();
    let events: Vec<(&'static str, &'static str)> = plan.events.iter().map(|event| event.words()).collect();
    let rest = [
        ("needs-force", Variant::from(!plan.risks.is_empty())),
        ("risks", Variant::from(risks)),
        ("abi-differences", Variant::from(differences)),
        ("starts-new-process", Variant::from(plan.starts_new_process)),
        ("events", Variant::from(events)),
        files(plan.files),
    ];
    verdict.into_iter().chain(rest).collect()
}
