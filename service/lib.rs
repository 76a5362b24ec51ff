//! What virtd does: domains, jobs, permissions, events and what is kept on disk. Knows no bus and no hypervisor.

#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod authz;
mod boot;
mod compare;
mod desk;
mod domain;
pub mod error;
pub mod events;
pub mod facts;
pub mod fair;
#[allow(clippy::disallowed_methods, reason = "only asks which inode a path leads to, few at a time, with a limit")]
mod images;
pub mod job;
mod lock;
pub mod log;
mod registry;
mod shared;
#[allow(clippy::disallowed_methods, reason = "the folders of virtd itself")]
mod store;
mod time;
mod turn;
pub mod verb;

pub use desk::Reading;
pub use domain::{
    Affect, CreateCheck, CreateOptions, DeleteOptions, Domain, Force, Plan, RevertOptions, StartOptions,
    UndefineOptions,
};
pub use shared::{Callers, Limits};
pub use store::Paths;

use authz::{Action, Answer, Authority, Caller, Subject};
use desk::Seat;
use domain::DomainSeed;
use error::{Error, Result};
use events::{Event, Events};
use job::{Jobs, Ticket};
use registry::Claimed;
use shared::Shared;
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::{Ended, Note, Store, on_disk};
use time::now_usec;
use tokio::sync::mpsc;
use uuid::Uuid;
use verb::Verb;
use virt_model::domain::{DomainDef, add_findings};
use virt_model::driver::{Driver, DriverError, MachineChoice};
use virt_model::state::StateReason;
use virt_model::xml::{Finding, FindingKind, refusals, shorten};

/// What a service needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its folders; made where they are missing.
    pub paths: Paths,
    /// How much a user may have.
    pub limits: Limits,
}

/// How long `close` waits for jobs under way.
const CLOSING: Duration = Duration::from_secs(10);

/// All domains of one host.
pub struct Service {
    shared: Arc<Shared>,
}

impl Service {
    /// Loads what is stored and finds the guests that run. The receiver's first events are one `Event::Domain` per domain;
    /// when they have been flushed, what is published is true.
    /// Errors: `StorageFailed` if the folders cannot be used.
    pub async fn open(
        settings: Settings,
        drivers: Vec<Arc<dyn Driver>>,
        authority: Arc<dyn Authority>,
        callers: Arc<dyn Callers>,
    ) -> Result<(Arc<Service>, mpsc::UnboundedReceiver<Event>)> {
        let (events, receiver) = Events::channel();
        let store = Store::open(settings.paths)?;
        let shared = Shared::new(drivers, authority, callers, events, store, settings.limits);
        boot::load(&shared).await?;
        Ok((Arc::new(Service { shared }), receiver))
    }

    /// Starts the domains that start with the host, once since it booted. To be called when the bus knows us.
    pub async fn begin_work(&self) -> Result<()> {
        boot::autostart(&self.shared).await
    }

    /// The stream of changes.
    pub fn events(&self) -> &Events {
        &self.shared.events
    }

    /// The jobs under way and lately ended.
    pub fn jobs(&self) -> &Arc<Jobs> {
        &self.shared.jobs
    }

    /// The drivers' names.
    pub fn drivers(&self) -> Vec<&'static str> {
        self.shared.drivers.iter().map(|driver| driver.name()).collect()
    }

    /// The domain with this uuid, if there is one.
    pub fn get(&self, uuid: Uuid) -> Option<Arc<Domain>> {
        self.shared.registry.get(uuid)
    }

    /// The domain with this uuid, written with or without dashes.
    pub fn by_uuid(&self, uuid: &str) -> Result<Arc<Domain>> {
        let parsed = Uuid::try_parse(uuid).map_err(|_| {
            Error::InvalidArgument(format!("'{}' is not a uuid of 32 hexadecimal digits", shorten(uuid)))
        })?;
        self.get(parsed).ok_or_else(|| Error::NoSuchDomain { what: "uuid", value: shorten(uuid) })
    }

    /// The domain with this name.
    pub fn by_name(&self, name: &str) -> Result<Arc<Domain>> {
        let found = self.shared.registry.by_name(name);
        found.ok_or_else(|| Error::NoSuchDomain { what: "name", value: shorten(name) })
    }

    /// The running domain with this id.
    pub fn by_id(&self, id: u32) -> Result<Arc<Domain>> {
        let found = self.shared.registry.by_id(id);
        found.ok_or_else(|| Error::NoSuchDomain { what: "id", value: id.to_string() })
    }

    /// Stores a configuration: a new domain, or another configuration for the one with its uuid and name. `validate`
    /// refuses what could not run on this host. On failure nothing is stored.
    pub async fn define(&self, caller: &Caller, xml: &str, validate: bool) -> Result<Arc<Domain>> {
        let begun = Instant::now();
        let result = self.define_inner(caller, xml, validate).await;
        self.log(caller, &verb::DEFINE, begun, &result);
        if let Ok(domain) = &result {
            self.warn_of_frozen(domain.clone());
        }
        result
    }

    /// Writes to the log which disks of a machine that has been defined could not be written, were it started. In the
    /// background: files are looked at for it.
    fn warn_of_frozen(&self, domain: Arc<Domain>) {
        let shared = self.shared.clone();
        tokio::spawn(async move {
            let Some(def) = domain.stored() else { return };
            for finding in shared.frozen_in(&def).await {
                tracing::warn!(uuid = %def.uuid, name = def.name, "{finding}");
            }
        });
    }

    async fn define_inner(&self, caller: &Caller, xml: &str, validate: bool) -> Result<Arc<Domain>> {
        let (def, driver, claimed) = self.accept(caller, xml, &[Action::Define], validate).await?;
        match claimed {
            Claimed::Existing(domain) => {
                domain.redefine(def).await?;
                Ok(domain)
            }
            Claimed::New => {
                let domain = self.new_domain(caller, driver, def.clone(), true).await?;
                let (name, uuid) = (def.name.clone(), def.uuid);
                if let Err(e) = domain.store(def).await {
                    self.shared.registry.remove(uuid, &name, caller.uid);
                    return Err(e);
                }
                domain.add();
                Ok(domain)
            }
        }
    }

    /// Starts a transient domain, or the inactive persistent one of that uuid and name with this configuration. The
    /// ticket answers when it runs; if it does not come to that, a domain that was not there before is not there after.
    pub async fn create(&self, caller: &Caller, xml: &str, options: StartOptions) -> Result<(Arc<Domain>, Ticket)> {
        let begun = Instant::now();
        let result = self.create_inner(caller, xml, options).await;
        if let Err(e) = &result {
            log::refused(caller, &verb::CREATE, begun, e);
        }
        result
    }

    async fn create_inner(&self, caller: &Caller, xml: &str, options: StartOptions) -> Result<(Arc<Domain>, Ticket)> {
        let (def, driver, claimed) = self.accept(caller, xml, &[Action::Define, Action::Start], false).await?;
        match claimed {
            Claimed::Existing(domain) => {
                let ticket = domain.launch(caller, Some(def), options).await?;
                Ok((domain, ticket))
            }
            Claimed::New => {
                let domain = self.new_domain(caller, driver, def.clone(), false).await?;
                self.shared.registry.insert(domain.clone());
                // Nobody has found it yet, so it is there to be started; if it comes to nothing, it goes by itself.
                let ticket = domain.launch(caller, Some(def), options).await?;
                Ok((domain, ticket))
            }
        }
    }

    /// Everything that `define` would refuse and everything that could not run on this host. Changes nothing.
    pub async fn validate(&self, caller: &Caller, xml: &str) -> Result<Vec<Finding>> {
        self.shared.authority.check(caller, Action::Read, &Subject::default()).await?;
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let (def, mut findings) = seat.read(xml, DomainDef::parse_leniently).await;
        let seat = seat.read_through().await;
        let Some(mut def) = def else { return Ok(findings) };
        let Some(driver) = self.shared.driver_for(&def.kind) else {
            add_findings(&mut findings, vec![self.no_driver(&def.kind)]);
            return Ok(findings);
        };
        if self.may_name_files(caller, &def, &**driver).await {
            driver.learn(&def).await;
        }
        match driver.complete(&mut def).await {
            Ok(()) => {}
            Err(DriverError::Config(found)) => add_findings(&mut findings, found),
            Err(e) => return Err(Error::from_driver(&def.name, "validate", e)),
        }
        add_findings(&mut findings, driver.check(&def).await);
        let mut def = Arc::new(def);
        self.shared.declare(&mut def);
        if self.may_name_files(caller, &def, &**driver).await {
            add_findings(&mut findings, driver.look(&def).await.unwrap_or_default());
            add_findings(&mut findings, unmet(&**driver, &def).await);
            add_findings(&mut findings, self.shared.frozen_in(&def).await);
            if let Ok(Some(existing)) = self.shared.registry.look(def.uuid, &def.name) {
                add_findings(&mut findings, existing.changed_below(&def).await);
            }
        }
        let conflict = self.shared.registry.look(def.uuid, &def.name);
        let existing = conflict.as_ref().ok().and_then(Option::as_deref);
        if let (true, Err(finding)) = (existing.is_none(), new_name(&def)) {
            add_findings(&mut findings, vec![finding]);
        }
        // On a copy: what is told of the document is told of it as it was given.
        if let Err(found) = keep_hidden(&mut DomainDef::clone(&def), existing) {
            add_findings(&mut findings, found);
        }
        // What is refused as it is, is not kept: whether it could be read again then is not worth the room.
        if findings.iter().all(|finding| finding.kind != FindingKind::Invalid)
            && let Err(Error::ConfigInvalid(found)) = readable(def, &seat).await
        {
            add_findings(&mut findings, found);
        }
        if let Err(conflict) = conflict {
            findings.push(Finding::anywhere(FindingKind::Invalid, "/name", conflict.to_string()));
        }
        Ok(findings)
    }

    /// What calling a method of `org.virt.Manager` would meet: `yes`, `no` or `challenge`. Never prompts.
    /// Error: `InvalidArgument` for a name that is none.
    pub async fn can(&self, caller: &Caller, member: &str) -> Result<&'static str> {
        let Some(action) = verb::find("org.virt.Manager", verb::MANAGER, member)?.action else { return Ok("yes") };
        Ok(self.shared.authority.can(caller, action, &Subject::default()).await.as_str())
    }

    /// Whether files that a document names may be looked at for whoever gave it. Asks nobody.
    async fn may_name_files(&self, caller: &Caller, def: &DomainDef, driver: &dyn Driver) -> bool {
        let existing = self.shared.registry.look(def.uuid, &def.name).ok().flatten();
        let subject = existing.map_or_else(|| subject_of(def, driver), |domain| domain.subject());
        self.shared.authority.can(caller, Action::Define, &subject).await == Answer::Yes
    }

    /// What `start` would run, in the hypervisor's own terms.
    pub async fn native(&self, caller: &Caller, xml: &str, format: &str) -> Result<Vec<String>> {
        self.shared.authority.check(caller, Action::Read, &Subject::default()).await?;
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let mut def = seat.read(xml, DomainDef::parse).await.map_err(Error::ConfigInvalid)?;
        let _seat = seat.read_through().await;
        let driver = self.driver_for(&def.kind)?;
        if self.may_name_files(caller, &def, &*driver).await {
            driver.learn(&def).await;
        }
        let translated = match driver.complete(&mut def).await {
            Ok(()) => driver.native(&def, format).await,
            Err(e) => Err(e),
        };
        translated.map_err(|e| match e {
            DriverError::Unsupported(text) => Error::InvalidArgument(text),
            e => Error::from_driver(&def.name, "translate", e),
        })
    }

    /// The `<capabilities>` document of a driver.
    pub async fn capabilities(&self, driver: &str) -> Result<String> {
        let told = self.driver_named(driver)?.capabilities().await;
        told.map_err(|e| Error::HypervisorFailed { what: format!("driver '{driver}'"), why: e.to_string() })
    }

    /// The `<domainCapabilities>` document of a kind of machine; the first driver's, if none is named.
    pub async fn domain_capabilities(&self, driver: Option<&str>, wanted: &MachineChoice) -> Result<String> {
        let found = match driver {
            Some(name) => self.driver_named(name)?,
            None => {
                let first = self.shared.drivers.first();
                first.ok_or_else(|| Error::OperationUnsupported("this virtd has no drivers".to_owned()))?
            }
        };
        found.domain_capabilities(wanted).await.map_err(|e| match e {
            DriverError::NotPossible(why) => Error::ConfigUnsupported(why),
            DriverError::Unsupported(why) => Error::OperationUnsupported(why),
            e => Error::HypervisorFailed { what: format!("driver '{}'", found.name()), why: e.to_string() },
        })
    }

    fn driver_named(&self, name: &str) -> Result<&Arc<dyn Driver>> {
        self.shared.driver_named(name).ok_or_else(|| {
            let known = self.drivers().join(", ");
            Error::InvalidArgument(format!("there is no driver '{}', only {known}", shorten(name)))
        })
    }

    /// Cancels a job: one's own, or with permission another's.
    pub async fn cancel_job(&self, caller: &Caller, id: u64) -> Result<()> {
        let Some(facts) = self.shared.jobs.facts(id) else {
            return Err(Error::OperationInvalid(format!("there is no job {id}; it may have ended a while ago")));
        };
        let domain = self.get(facts.domain);
        let cancel = async {
            if facts.requester_uid != caller.uid {
                let subject = domain.as_ref().map(|domain| domain.subject()).unwrap_or_default();
                self.shared.authority.check(caller, Action::Job, &subject).await?;
            }
            self.shared.jobs.cancel(id)
        };
        match &domain {
            Some(domain) => domain.logged(caller, &verb::CANCEL, cancel).await,
            None => cancel.await,
        }
    }

    /// Lets jobs under way end, for a while. Guests go on.
    pub async fn close(&self) {
        if tokio::time::timeout(CLOSING, self.shared.jobs.idle()).await.is_err() {
            tracing::warn!("closing with jobs under way; the next start of virtd finishes or ends them");
        }
    }

    /// Reads, authorizes and completes a document, and claims its name and uuid.
    async fn accept(
        &self,
        caller: &Caller,
        xml: &str,
        actions: &[Action],
        validate: bool,
    ) -> Result<(Arc<DomainDef>, Arc<dyn Driver>, Claimed)> {
        let mut seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let mut def = seat.read(xml, DomainDef::parse).await.map_err(Error::ConfigInvalid)?;
        let driver = self.driver_for(&def.kind)?;
        let existing = self.shared.registry.look(def.uuid, &def.name)?;
        let subject = existing.as_ref().map_or_else(|| subject_of(&def, &*driver), |domain| domain.subject());
        let native = def.has_native_arguments().then_some(Action::Native);
        let actions: Vec<Action> = actions.iter().copied().chain(native).collect();
        if caller.interactive && !self.may_all(caller, &actions, &subject).await {
            // Somebody is asked, who may take minutes: the document is put away and read again.
            let uuid = def.uuid;
            drop((def, seat));
            self.ask_for_all(caller, &actions, &subject).await?;
            seat = self.shared.desk.seat(caller.uid, &[xml]).await;
            def = seat.read(xml, DomainDef::parse).await.map_err(Error::ConfigInvalid)?;
            // One without a uuid was given one, of which was spoken.
            def.uuid = uuid;
        } else {
            self.ask_for_all(caller, &actions, &subject).await?;
        }
        let seat = seat.read_through().await;
        if existing.is_none() {
            new_name(&def).map_err(|finding| Error::ConfigInvalid(vec![finding]))?;
        }
        keep_hidden(&mut def, existing.as_deref()).map_err(Error::ConfigInvalid)?;
        driver.learn(&def).await;
        driver.complete(&mut def).await.map_err(|e| match e {
            DriverError::Config(findings) if findings.iter().all(|f| f.kind == FindingKind::Invalid) => {
                Error::ConfigInvalid(findings)
            }
            e => Error::from_driver(&def.name, "define", e),
        })?;
        let mut def = Arc::new(def);
        self.shared.declare(&mut def);
        let def = readable(def, &seat).await?;
        if validate {
            refuse(driver.check(&def).await)?;
            refuse(unmet(&*driver, &def).await)?;
        }
        self.look(&*driver, &def).await?;
        let claimed = self.claim(caller, &def, existing.as_ref())?;
        Ok((def, driver, claimed))
    }

    /// Whether a caller may do all of this. Asks nobody.
    async fn may_all(&self, caller: &Caller, actions: &[Action], subject: &Subject) -> bool {
        for action in actions {
            if self.shared.authority.can(caller, *action, subject).await != Answer::Yes {
                return false;
            }
        }
        true
    }

    /// Asks for permission for all of this; error: the first that is refused.
    async fn ask_for_all(&self, caller: &Caller, actions: &[Action], subject: &Subject) -> Result<()> {
        for action in actions {
            self.shared.authority.check(caller, *action, subject).await?;
        }
        Ok(())
    }

    /// Refuses images that say something else than the definition. Permission to name files has been given.
    async fn look(&self, driver: &dyn Driver, def: &DomainDef) -> Result<()> {
        match driver.look(def).await {
            Ok(findings) => refuse(findings),
            // It is looked at again when it starts.
            Err(error) => {
                tracing::warn!(uuid = %def.uuid, name = def.name, %error, "it is defined without a look at its images");
                Ok(())
            }
        }
    }

    /// Claims name and uuid. Permission was asked for `existing`, or for a new domain, and that may have taken a person's
    /// time: what has come or gone meanwhile is another domain, for which it does not hold.
    fn claim(&self, caller: &Caller, def: &DomainDef, existing: Option<&Arc<Domain>>) -> Result<Claimed> {
        let meanwhile = |what: &str| format!("domain '{}' was {what} by another call meanwhile; try again", def.name);
        match self.shared.registry.claim(def.uuid, &def.name, caller.uid, self.shared.limits.domains_per_user)? {
            Claimed::Existing(domain) if existing.is_some_and(|known| Arc::ptr_eq(known, &domain)) => {
                Ok(Claimed::Existing(domain))
            }
            Claimed::Existing(_) => Err(Error::DomainExists(meanwhile("defined"))),
            Claimed::New if existing.is_none() => Ok(Claimed::New),
            Claimed::New => {
                self.shared.registry.remove(def.uuid, &def.name, caller.uid);
                Err(Error::OperationInvalid(meanwhile("removed")))
            }
        }
    }

    /// A domain that is not in the registry yet; its name is claimed.
    async fn new_domain(
        &self,
        caller: &Caller,
        driver: Arc<dyn Driver>,
        def: Arc<DomainDef>,
        persistent: bool,
    ) -> Result<Arc<Domain>> {
        let note = Note { owner: caller.uid, ..Note::default() };
        let ended = Ended { reason: StateReason::Unknown, since_usec: now_usec() };
        let (shared, uuid) = (self.shared.clone(), def.uuid);
        // A transient domain of that uuid may have left some.
        let snapshots = match on_disk(move || shared.store.load_snapshots(uuid)).await {
            Ok(snapshots) => snapshots,
            Err(e) => {
                self.shared.registry.remove(uuid, &def.name, caller.uid);
                return Err(e);
            }
        };
        Ok(Domain::new(
            self.shared.clone(),
            DomainSeed { def, persistent, broken: None, driver, note, ended, snapshots },
        ))
    }

    fn driver_for(&self, kind: &str) -> Result<Arc<dyn Driver>> {
        match self.shared.driver_for(kind) {
            Some(driver) => Ok(driver.clone()),
            None => Err(Error::ConfigUnsupported(self.no_driver(kind).message)),
        }
    }

    fn no_driver(&self, kind: &str) -> Finding {
        let types: Vec<&str> = self.shared.drivers.iter().flat_map(|driver| driver.types()).copied().collect();
        Finding {
            kind: FindingKind::Unsupported,
            line: 1,
            column: 1,
            path: "/@type".to_owned(),
            message: format!("no driver serves domains of type '{kind}', only {}", types.join(", ")),
        }
    }

    fn log(&self, caller: &Caller, verb: &Verb, begun: Instant, result: &Result<Arc<Domain>>) {
        match result {
            Ok(domain) => domain.log(caller, verb, begun, None),
            Err(e) => log::refused(caller, verb, begun, e),
        }
    }
}

/// What a machine needs of the host and is not there now. Permission to name files has been given.
async fn unmet(driver: &dyn Driver, def: &DomainDef) -> Vec<Finding> {
    let looked = driver.unmet(def).await;
    looked.unwrap_or_else(|error| vec![Finding::anywhere(FindingKind::Unsupported, "/", error.to_string())])
}

/// Refuses what a check found, warnings apart.
fn refuse(findings: Vec<Finding>) -> Result<()> {
    refusals(findings).map_err(|found| match &found[..] {
        [first, ..] if found.iter().all(|finding| finding.kind != FindingKind::Invalid) => {
            Error::ConfigUnsupported(first.to_string())
        }
        _ => Error::ConfigInvalid(found),
    })
}

/// What polkit is told of a domain that is about to be defined.
fn subject_of(def: &DomainDef, driver: &dyn Driver) -> Subject {
    Subject {
        driver: driver.name().to_owned(),
        domain_name: def.name.clone(),
        domain_uuid: Some(def.uuid),
        owner: None,
        snapshot_name: None,
    }
}

/// Refuses a name that looks like another. Those that are there already keep theirs.
pub(crate) fn check_new_name(what: &str, name: &str) -> Result<()> {
    let refused = virt_model::xml::check_new_name(name);
    refused.map_err(|why| Error::InvalidArgument(format!("the name '{}' of a {what} {why}", shorten(name))))
}

/// The same for a whole document.
fn new_name(def: &DomainDef) -> Result<(), Finding> {
    check_new_name("domain", &def.name).map_err(|e| Finding::invalid(&def.at.child("name"), e.to_string()))
}

/// Puts back what somebody who was not shown all of a domain's configuration means to keep of it.
fn keep_hidden(def: &mut DomainDef, existing: Option<&Domain>) -> Result<(), Vec<Finding>> {
    let known = existing.map(Domain::known).unwrap_or_default();
    def.keep_hidden(&known.iter().map(|def| &**def).collect::<Vec<_>>())
}

/// Gives back a configuration that can be read again as it would be stored and shown; refuses any other.
async fn readable(def: Arc<DomainDef>, seat: &Seat) -> Result<Arc<DomainDef>> {
    let readable = seat.work(move || match store::acceptable(&def) {
        Ok(()) => Ok(def),
        Err(message) => Err(Error::ConfigInvalid(vec![Finding::anywhere(FindingKind::Invalid, "/", message)])),
    });
    readable.await
}

/// Computes on a thread of its own.
async fn aside<T: Send + 'static>(compute: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(compute).await {
        Ok(result) => result,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}
