//! Documents that clients give, until they are domains: read, permitted, completed, checked, and their names claimed.

use crate::Service;
use crate::authz::{Action, Answer, Caller, Subject};
use crate::desk::Seat;
use crate::domain::{Domain, DomainSeed, StartOptions};
use crate::error::{Error, Result};
use crate::facts::ConfigFacts;
use crate::job::Ticket;
use crate::log;
use crate::registry::{Claimed, check_new_name};
use crate::store::{DraftToCome, Ended, Note, on_disk};
use crate::stored::StoredDef;
use crate::verb::{self, Verb};
use std::sync::Arc;
use std::time::Instant;
use virt_model::domain::DomainDef;
use virt_model::driver::{Driver, DriverError};
use virt_model::xml::add_findings;
use virt_model::xml::{Finding, FindingKind, Limits, refusals};

impl Service {
    /// Stores a configuration: a new domain, or another configuration for the one with its uuid and name. `validate`
    /// refuses what could not run on this host. On failure nothing is stored.
    pub async fn define(&self, caller: &Caller, xml: &str, validate: bool) -> Result<Arc<Domain>> {
        let begun = Instant::now();
        let result = self.define_inner(caller, xml, validate).await;
        self.log(caller, &verb::DEFINE, begun, &result);
        if let Ok(domain) = &result {
            self.shared.frozen_disks.look_at(&self.shared, domain.stored().ok().flatten());
        }
        result
    }

    async fn define_inner(&self, caller: &Caller, xml: &str, validate: bool) -> Result<Arc<Domain>> {
        let accepted = self.accept(caller, xml, &[&verb::DEFINE], Purpose::Keep { validate }).await?;
        let Accepted { def, stored, driver, claimed, draft } = accepted;
        match claimed {
            Claimed::Existing(domain) => {
                domain.redefine(&def, stored).await?;
                Ok(domain)
            }
            Claimed::New => {
                let domain = self.new_domain(caller, driver, &def, Some(stored.clone())).await?;
                if let Err(e) = domain.store_first(stored, draft).await {
                    self.domains.remove(def.uuid, &def.name, caller.uid);
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
        let (def, domain) = self.accept_to_start(caller, xml, &[&verb::CREATE, &verb::START]).await?;
        let ticket = domain.launch(caller, Some(def), options).await?;
        Ok((domain, ticket))
    }

    /// The domain of a document that is to be started, for whoever may do all of `verbs`: the inactive one of its uuid and name, or
    /// a new one. Nobody has found that yet, so it is there to be started; if it comes to nothing, it goes by itself.
    pub(crate) async fn accept_to_start(
        &self,
        caller: &Caller,
        xml: &str,
        verbs: &[&Verb],
    ) -> Result<(Arc<DomainDef>, Arc<Domain>)> {
        let Accepted { def, driver, claimed, .. } = self.accept(caller, xml, verbs, Purpose::Start).await?;
        let domain = match claimed {
            Claimed::Existing(domain) => domain,
            Claimed::New => {
                let domain = self.new_domain(caller, driver, &def, None).await?;
                self.domains.insert(domain.clone());
                domain
            }
        };
        Ok((def, domain))
    }

    /// Everything that `define` would refuse and everything that could not run on this host. Changes nothing.
    pub async fn validate(&self, caller: &Caller, xml: &str) -> Result<Vec<Finding>> {
        self.allow(caller, &verb::VALIDATE, &Subject::default()).await?;
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let (def, mut findings) = seat.read(xml, DomainDef::parse_leniently).await;
        let seat = seat.read_through().await;
        let Some(mut def) = def else { return Ok(findings) };
        def.forget_places_of_volumes();
        let Some(driver) = self.shared.driver_for(&def.kind) else {
            add_findings(&mut findings, vec![self.no_driver(&def.kind)]);
            return Ok(findings);
        };
        let completed = match self.may_name_files(caller, &def, &**driver).await {
            true => driver.learn_and_complete(&mut def).await,
            false => driver.complete(&mut def).await,
        };
        match completed {
            Ok(()) => {}
            Err(DriverError::Config(found)) => add_findings(&mut findings, found),
            Err(e) => return Err(Error::from_driver(&def.name, "validate", e)),
        }
        add_findings(&mut findings, driver.check(&def).await);
        add_findings(&mut findings, self.shared.volumes.missing_in(&def));
        let mut def = Arc::new(def);
        self.shared.images.declare(&mut def);
        if self.may_name_files(caller, &def, &**driver).await {
            add_findings(&mut findings, driver.look(&def).await.unwrap_or_default());
            add_findings(&mut findings, unmet(&**driver, &def).await);
            add_findings(&mut findings, self.shared.images.frozen_in(&def).await);
            if let Ok(Some(existing)) = self.domains.look(def.uuid, &def.name) {
                add_findings(&mut findings, existing.changed_below(&def).await);
            }
        }
        let conflict = self.domains.look(def.uuid, &def.name);
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
            && let Err(Error::ConfigInvalid(found)) = readable(written(&def, &seat).await, &seat).await
        {
            add_findings(&mut findings, found);
        }
        if let Err(conflict) = conflict {
            findings.push(Finding::anywhere(FindingKind::Invalid, "/name", conflict.to_string()));
        }
        Ok(findings)
    }

    /// Whether files that a document names may be looked at for whoever gave it. Asks nobody.
    async fn may_name_files(&self, caller: &Caller, def: &DomainDef, driver: &dyn Driver) -> bool {
        let existing = self.domains.look(def.uuid, &def.name).ok().flatten();
        // What is allowed with a machine of another host says nothing of files of this one.
        let existing = existing.filter(|domain| domain.takes_documents().is_ok());
        let subject = existing.map_or_else(|| subject_of(def, driver), |domain| domain.subject());
        self.may_all(caller, verb::DEFINE.action.as_slice(), &subject).await
    }

    /// What `start` would run, in the hypervisor's own terms.
    pub async fn native(&self, caller: &Caller, xml: &str, format: &str) -> Result<Vec<String>> {
        self.allow(caller, &verb::NATIVE, &Subject::default()).await?;
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let mut def = seat.read(xml, DomainDef::parse).await.map_err(Error::ConfigInvalid)?;
        let _seat = seat.read_through().await;
        let driver = self.driver_for(&def.kind)?;
        let completed = match self.may_name_files(caller, &def, &*driver).await {
            true => driver.learn_and_complete(&mut def).await,
            false => driver.complete(&mut def).await,
        };
        let mut def = Arc::new(def);
        self.shared.volumes.plug(&mut def)?;
        let translated = match completed {
            Ok(()) => driver.native(&def, format).await,
            Err(e) => Err(e),
        };
        translated.map_err(|e| match e {
            DriverError::Unsupported(text) => Error::InvalidArgument(text),
            e => Error::from_driver(&def.name, "translate", e),
        })
    }

    /// Reads a document, asks for permission for all of `verbs`, completes it, and claims its name and uuid.
    async fn accept(&self, caller: &Caller, xml: &str, verbs: &[&Verb], purpose: Purpose) -> Result<Accepted> {
        let mut seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let mut def = seat.read(xml, DomainDef::parse).await.map_err(Error::ConfigInvalid)?;
        let driver = self.driver_for(&def.kind)?;
        let existing = self.domains.look(def.uuid, &def.name)?;
        let subject = existing.as_ref().map_or_else(|| subject_of(&def, &*driver), |domain| domain.subject());
        let native = def.has_native_arguments().then_some(Action::Native);
        let actions: Vec<Action> = verbs.iter().filter_map(|verb| verb.action).chain(native).collect();
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
        let seat = Arc::new(seat.read_through().await);
        def.forget_places_of_volumes();
        existing.as_ref().map_or(Ok(()), |domain| domain.takes_documents())?;
        if existing.is_none() {
            new_name(&def).map_err(|finding| Error::ConfigInvalid(vec![finding]))?;
        }
        keep_hidden(&mut def, existing.as_deref()).map_err(Error::ConfigInvalid)?;
        driver.learn_and_complete(&mut def).await.map_err(|e| match e {
            DriverError::Config(findings) if findings.iter().all(|f| f.kind == FindingKind::Invalid) => {
                Error::ConfigInvalid(findings)
            }
            e => Error::from_driver(&def.name, "define", e),
        })?;
        let mut def = Arc::new(def);
        self.shared.images.declare(&mut def);
        let validate = purpose == Purpose::Keep { validate: true };
        let text = written(&def, &seat).await;
        // It is written while it is looked at. One that is there already may change until it is its turn.
        let limit = self.shared.limits.domains_per_user;
        let is_new = existing.is_none() && self.domains.has_room(caller.uid, limit);
        let drafts = is_new && purpose == Purpose::Keep { validate: false };
        let draft = drafts.then(|| self.draft(caller, &*driver, &def, (text.clone(), seat.clone())));
        // What can be refused without a look at files is refused before.
        let looks = async { if validate { Ok(()) } else { self.look(&*driver, &def).await } };
        // The looks come first: what is small is read again at once, while they are under way.
        let ((), (stored, read)) = tokio::try_join!(looks, readable(text, &seat))?;
        self.shared.readings.keep(&stored, Arc::new(read));
        let stored = Arc::new(stored);
        if validate {
            refuse(driver.check(&def).await)?;
            refuse(self.shared.volumes.missing_in(&def))?;
            refuse(unmet(&*driver, &def).await)?;
            refuse(self.shared.images.frozen_in(&def).await)?;
            self.look(&*driver, &def).await?;
        }
        if existing.is_none() {
            self.shared.is_settled(def.uuid).await?;
        }
        let claimed = self.domains.claim_as_seen(def.uuid, &def.name, caller.uid, limit, existing.as_ref())?;
        Ok(Accepted { def, stored, driver, claimed, draft })
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

    /// A domain that is not in the registry yet; its name is claimed.
    async fn new_domain(
        &self,
        caller: &Caller,
        driver: Arc<dyn Driver>,
        def: &DomainDef,
        stored: Option<Arc<StoredDef>>,
    ) -> Result<Arc<Domain>> {
        let note = Note { owner: caller.uid, ..Note::default() };
        let (shared, uuid, stays) = (self.shared.clone(), def.uuid, stored.is_some());
        // A domain of that uuid may have left some.
        let left = move || {
            let saved = stays && shared.store.managed_save_bytes(uuid).is_some();
            Ok((shared.store.load_snapshots(uuid)?, saved))
        };
        let (snapshots, managed_save) = match on_disk(left).await {
            Ok(left) => left,
            Err(e) => {
                self.domains.remove(uuid, &def.name, caller.uid);
                return Err(e);
            }
        };
        let config = stored.as_ref().map_or_else(|| Arc::new(ConfigFacts::of(def)), |stored| stored.config.clone());
        let (name, broken) = (def.name.clone(), None);
        if managed_save {
            tracing::warn!(%uuid, name, "there is a managed save of it already, of an earlier domain: its next start goes on from that");
        }
        let ended = Ended::never(managed_save);
        let hosted = None;
        let seed =
            DomainSeed { uuid, name, config, stored, broken, driver, note, ended, managed_save, snapshots, hosted };
        Ok(Domain::new(&self.shared, &self.domains, seed))
    }

    /// Begins to write what is stored first of a domain, which keeps its seat until that is on disk; nobody waits for it.
    fn draft(
        &self,
        caller: &Caller,
        driver: &dyn Driver,
        def: &DomainDef,
        (text, seat): (String, Arc<Seat>),
    ) -> DraftToCome {
        let note = Note::of(caller.uid, &def.name, driver);
        let (shared, uuid) = (self.shared.clone(), def.uuid);
        tokio::task::spawn_blocking(move || {
            let _seat = seat;
            shared.store.draft_definition(uuid, text, &note)
        })
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

/// A document that may be a domain's configuration.
struct Accepted {
    def: Arc<DomainDef>,
    /// The same as it would be stored.
    stored: Arc<StoredDef>,
    driver: Arc<dyn Driver>,
    /// Its name and uuid.
    claimed: Claimed<Domain>,
    /// Its first text and note, which are being written.
    draft: Option<DraftToCome>,
}

/// What becomes of a document.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// It is stored; `validate`: only what could run.
    Keep { validate: bool },
    /// It is run.
    Start,
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
    crate::domain::domain_subject(driver, &def.name, def.uuid)
}

/// Refuses a document whose name looks like another.
fn new_name(def: &DomainDef) -> Result<(), Finding> {
    check_new_name("domain", &def.name).map_err(|e| Finding::invalid(&def.at.child("name"), e.to_string()))
}

/// Puts back what somebody who was not shown all of a domain's configuration means to keep of it.
fn keep_hidden(def: &mut DomainDef, existing: Option<&Domain>) -> Result<(), Vec<Finding>> {
    let known = existing.map_or_else(|| Ok(Vec::new()), Domain::known);
    let known = known.map_err(|e| vec![Finding::anywhere(FindingKind::Invalid, "/", e.to_string())])?;
    def.keep_hidden(&known.iter().map(|def| &**def).collect::<Vec<_>>())
}

/// The configuration as it is stored.
async fn written(def: &Arc<DomainDef>, seat: &Seat) -> String {
    let def = def.clone();
    seat.work(move || StoredDef::text_of(&def)).await
}

/// That, with what is read of it; refuses what could not be read again as it would be stored and shown.
async fn readable(text: String, seat: &Seat) -> Result<(StoredDef, DomainDef)> {
    let read = seat.work(move || StoredDef::read_back(&text, Limits::ACCEPTED)).await;
    read.map_err(|message| Error::ConfigInvalid(vec![Finding::anywhere(FindingKind::Invalid, "/", message)]))
}
