//! The configuration: read, redefine, rename, autostart, title, description, metadata.

use super::Domain;
use super::state::{Compared, State};
use crate::authz::{Action, Caller};
use crate::error::{Error, Result};
use crate::events::Event;
use crate::lock::lock;
use crate::shown::text::PUBLISHED;
use crate::store::{DraftToCome, Note, on_disk};
use crate::stored::StoredDef;
use crate::verb::{self, Verb};
use std::sync::Arc;
use std::time::Duration;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::{DomainEnd, DriverError};
use virt_model::state::{Defined, Lifecycle, Undefined};
use virt_model::xml::{Element, Limits, shorten};

/// What runs and what is stored.
pub(super) type Configurations = (Option<Arc<DomainDef>>, Option<Arc<DomainDef>>);

/// Which configuration a change is for. Neither: what runs, and the stored one if there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affect {
    /// What runs.
    pub live: bool,
    /// What is stored.
    pub config: bool,
}

/// What a change of configurations is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Update {
    /// A change of its own, published as an update of the definition.
    Whole,
    /// Part of something else, which is published as that.
    Part,
}

/// How long the removal of what belongs to a guest may keep its end from being told.
const REMOVAL: Duration = Duration::from_secs(5);

impl Domain {
    /// The configuration: of what runs while it runs, unless `form.inactive` asks for what the next start would use.
    pub async fn xml(&self, caller: &Caller, form: Form) -> Result<String> {
        match form.secure {
            true => self.allow(caller, Action::ReadSecure).await?,
            false => self.allow(caller, verb::GET_XML.action).await?,
        }
        let (live, stored) = {
            let state = lock(&self.state);
            let document = state.guest.as_ref().map(|guest| guest.document.clone()).unwrap_or_default();
            let mirrors = Domain::mirrors(&state.block_jobs);
            (state.live().map(|live| (with_mirrors(live, mirrors), document)), state.stored.clone())
        };
        if live.is_none() || form.inactive {
            self.sound()?;
        }
        match (live, stored) {
            (Some((live, document)), _) if form == Form::default() => {
                Ok(document.get_or_init(|| live.write(form)).clone())
            }
            (Some((mut live, _)), None) if form.inactive && live.places_volumes() => {
                Arc::make_mut(&mut live).forget_places_of_volumes();
                Ok(live.write(form))
            }
            (Some((live, _)), None) => Ok(live.write(form)),
            (Some((live, _)), Some(_)) if !form.inactive => Ok(live.write(form)),
            (_, Some(stored)) => match stored.shown(form) {
                Some(text) => Ok(text),
                None => Ok(stored.shown_of(form, &*self.shared.readings.of(&stored)?)),
            },
            (None, None) => Err(self.vanished()),
        }
    }

    /// The metadata element of a namespace: of what runs, or with `config` of what is stored.
    pub async fn metadata(&self, caller: &Caller, uri: &str, affect: Affect) -> Result<String> {
        self.allow(caller, verb::GET_METADATA.action).await?;
        if affect.live && affect.config {
            return Err(Error::InvalidArgument("give 'live' or 'config', not both: one text is returned".to_owned()));
        }
        let (live, stored) = self.configurations()?;
        if live.is_none() || affect.config {
            self.sound()?;
        }
        let def = match affect {
            Affect { live: true, .. } => Some(live.ok_or_else(|| self.not_active("the live metadata"))?),
            Affect { config: true, .. } => Some(stored.ok_or_else(|| self.not_stored("the stored metadata"))?),
            _ => live.or(stored),
        };
        def.ok_or_else(|| self.vanished())?.metadata(uri).ok_or_else(|| {
            Error::InvalidArgument(format!(
                "domain '{}' has no metadata in the namespace '{}'",
                self.name(),
                shorten(uri)
            ))
        })
    }

    /// Replaces the stored configuration by a completed one of the same uuid and name.
    pub(crate) async fn redefine(self: &Arc<Self>, def: &DomainDef, stored: Arc<StoredDef>) -> Result<()> {
        let _turn = self.take_turn(verb::DEFINE.word, &tokio_util::sync::CancellationToken::new()).await?;
        if self.sound().is_ok() {
            self.finish_interrupted_soon().await?;
        }
        self.fits(def, &self.name())?;
        let first = {
            let mut state = lock(&self.state);
            state.still_here()?;
            state.being_stored = true;
            state.stored.is_none()
        };
        if let Err(e) = self.store(stored.clone(), &def.name).await {
            lock(&self.state).being_stored = false;
            self.drop_if_nothing_left();
            return Err(e);
        }
        let told = Lifecycle::Defined(if first { Defined::Added } else { Defined::Updated });
        let compared = self.compared(None, Some(stored.clone())).await;
        self.all_told().await.commit(|state| {
            state.will_have(compared);
            state.has_stored(stored, told)
        });
        Ok(())
    }

    /// Refuses a definition that cannot be this domain's, whose name is `name`.
    pub(super) fn fits(&self, def: &DomainDef, name: &str) -> Result<()> {
        if def.name != name {
            let text = format!("domain '{}' was renamed to '{name}' meanwhile; try again", def.name);
            return Err(Error::DomainExists(text));
        }
        self.is_of_its_driver(def, name)
    }

    /// Refuses a definition that is another driver's; the domain's name is `name`.
    pub(super) fn is_of_its_driver(&self, def: &DomainDef, name: &str) -> Result<()> {
        if !self.driver.types().contains(&def.kind.as_str()) {
            let driver = self.driver.name();
            let text = format!("domain '{name}' belongs to the driver '{driver}'; undefine it before its type changes");
            return Err(Error::OperationInvalid(text));
        }
        Ok(())
    }

    /// Removes what goes with the end of a transient domain whose guest `live` was.
    pub(super) async fn forget_transient(&self, live: &DomainDef) {
        let transient = {
            let state = lock(&self.state);
            state.stored.is_none() && !state.being_stored && state.creations == 0
        };
        if !transient {
            return;
        }
        let removed = tokio::time::timeout(REMOVAL, self.driver.remove_belongings(live, DomainEnd::Transient)).await;
        if let Err(error) = removed.unwrap_or_else(|_| Err(DriverError::TimedOut("that takes long".to_owned()))) {
            tracing::warn!(uuid = %self.uuid, name = self.name(), %error, "what belongs to it is not removed yet");
        }
    }

    /// Gives an inactive, persistent domain another name; one of another host has it there, too.
    pub async fn rename(self: &Arc<Self>, caller: &Caller, name: &str) -> Result<()> {
        self.short(caller, &verb::RENAME, async {
            lock(&self.state).renames_no_managed_save()?;
            let def = self.stored()?.ok_or_else(|| self.vanished())?;
            crate::registry::check_new_name("domain", name)?;
            let renamed = renamed(&def, name)?;
            if let Some(at) = &self.hosted {
                return self.rename_at_host(at, name).await;
            }
            let stored = self.to_store(renamed).await?;
            self.domains.claim_name(self.uuid, name)?;
            if let Err(e) = self.store(stored.clone(), name).await {
                self.domains.drop_name(name);
                return Err(e);
            }
            self.commit_rename(name, stored).await;
            self.domains.drop_name(&def.name);
            Ok(())
        })
        .await
    }

    /// Tells of a rename: the old name goes, the new one comes.
    async fn commit_rename(&self, name: &str, stored: Arc<StoredDef>) {
        let told = self.all_told().await;
        self.shared.events.send(Event::Domain(self.facts(), vec![Lifecycle::Undefined(Undefined::Renamed)]));
        told.commit(|state| {
            name.clone_into(&mut state.name);
            state.has_stored(stored, Lifecycle::Defined(Defined::Renamed))
        });
    }

    /// Starts it with the host, or no longer.
    pub async fn set_autostart(self: &Arc<Self>, caller: &Caller, autostart: bool) -> Result<()> {
        self.short(caller, &verb::AUTOSTART, async {
            let note = Note { autostart, ..lock(&self.state).note(self.owner, &*self.driver) };
            let (shared, uuid) = (self.shared.clone(), self.uuid);
            on_disk(move || shared.store.save_note(uuid, &note)).await?;
            self.all_told().await.commit(|state| {
                state.autostart = autostart;
                Vec::new()
            });
            Ok(())
        })
        .await
    }

    /// Sets the title; an empty one removes it. Error: `InvalidArgument` if it has a line break.
    pub async fn set_title(self: &Arc<Self>, caller: &Caller, title: &str, affect: Affect) -> Result<()> {
        if title.contains(['\n', '\r']) {
            return Err(Error::InvalidArgument("a title is one line; use the description for more".to_owned()));
        }
        refuse_long("title", title)?;
        let title = (!title.is_empty()).then(|| title.to_owned());
        self.edit(caller, &verb::SET_TITLE, affect, |def| {
            def.title.clone_from(&title);
            Ok(())
        })
        .await
    }

    /// Sets the description; an empty one removes it.
    pub async fn set_description(self: &Arc<Self>, caller: &Caller, text: &str, affect: Affect) -> Result<()> {
        refuse_long("description", text)?;
        let text = (!text.is_empty()).then(|| text.to_owned());
        self.edit(caller, &verb::SET_DESCRIPTION, affect, |def| {
            def.description.clone_from(&text);
            Ok(())
        })
        .await
    }

    /// Replaces the metadata element of the namespace `uri`; empty `xml` removes it.
    pub async fn set_metadata(
        self: &Arc<Self>,
        caller: &Caller,
        xml: &str,
        prefix: &str,
        uri: &str,
        affect: Affect,
    ) -> Result<()> {
        let xml = (!xml.is_empty()).then_some(xml);
        self.edit(caller, &verb::SET_METADATA, affect, |def| {
            def.set_metadata(uri, prefix, xml).map_err(|finding| Error::ConfigInvalid(vec![finding]))
        })
        .await
    }

    /// Changes the definitions that `affect` means, all or none.
    async fn edit(
        self: &Arc<Self>,
        caller: &Caller,
        verb: &'static Verb,
        affect: Affect,
        change: impl Fn(&mut DomainDef) -> Result<()> + Send + Sync,
    ) -> Result<()> {
        self.short(caller, verb, async {
            let (live, stored) = self.to_be_adjusted(verb, affect).await?;
            let before = live.clone();
            let changed = |mut def: Arc<DomainDef>| -> Result<Arc<DomainDef>> {
                change(Arc::make_mut(&mut def))?;
                check_text(&def)?;
                Ok(def)
            };
            let (live, stored) = (live.map(changed).transpose()?, stored.map(changed).transpose()?);
            self.put_both(verb, before, live, stored).await
        })
        .await
    }

    /// Makes these the configurations of what runs and of what is stored, first on disk, then in what is published; `None`
    /// stays as it is. On failure both are as before.
    pub(super) async fn put_configurations(
        &self,
        live: Option<Arc<DomainDef>>,
        stored: Option<Arc<DomainDef>>,
        update: Update,
    ) -> Result<()> {
        let stored = match stored {
            Some(def) => Some((def.name.clone(), self.to_store(def).await?)),
            None => None,
        };
        self.put_written(live, stored, update).await
    }

    /// The same with what is stored as it is to be on disk, and its name.
    pub(super) async fn put_written(
        &self,
        live: Option<Arc<DomainDef>>,
        stored: Option<(String, Arc<StoredDef>)>,
        update: Update,
    ) -> Result<()> {
        let kept = async {
            if let Some(live) = &live {
                self.keep_live(live).await?;
            }
            let Some((name, stored)) = &stored else { return Ok(()) };
            let put = self.store(stored.clone(), name).await;
            if let (Err(_), Some(_), Some(before)) = (&put, &live, self.live()) {
                self.keep_live(&before).await.unwrap_or_else(|e| tracing::warn!(uuid = %self.uuid, "{e}"));
            }
            put
        };
        let will_be = stored.as_ref().map(|(_, stored)| stored.clone());
        let (kept, compared) = tokio::join!(kept, self.compared(live.clone(), will_be));
        kept?;
        let stored = stored.map(|(_, stored)| stored);
        self.all_told().await.commit(|state| {
            state.will_have(compared);
            let events = state.edited(live, stored);
            if update == Update::Whole { events } else { Vec::new() }
        });
        Ok(())
    }

    /// What its configurations say with these in the place of its own, while nobody waits for its state; nothing if none runs.
    async fn compared(&self, live: Option<Arc<DomainDef>>, stored: Option<Arc<StoredDef>>) -> Option<Compared> {
        let (live, stored) = {
            let state = lock(&self.state);
            (live.or_else(|| state.live().cloned())?, stored.or_else(|| state.stored.clone()))
        };
        Some(crate::desk::aside(move || Compared::of(live, stored)).await)
    }

    /// The definitions a change is for: live, stored.
    pub(super) fn affected(&self, verb: &Verb, affect: Affect) -> Result<Configurations> {
        let (live, stored) = self.configurations()?;
        if affect.live && live.is_none() {
            return Err(self.not_active(&format!("something to {} in what runs", verb.word)));
        }
        if affect.config && stored.is_none() {
            return Err(self.not_stored(&format!("something to {} in what is stored", verb.word)));
        }
        let both = !affect.live && !affect.config;
        Ok((live.filter(|_| both || affect.live), stored.filter(|_| both || affect.config)))
    }

    /// A configuration as it is to be stored. Error: `OperationUnsupported` if it could not be read again.
    pub(super) async fn to_store(&self, def: Arc<DomainDef>) -> Result<Arc<StoredDef>> {
        let name = def.name.clone();
        let written = crate::desk::aside(move || StoredDef::write(&def, Limits::STORED)).await;
        let (stored, read) = written.map_err(|why| {
            let name = shorten(&name);
            Error::OperationUnsupported(format!("the configuration of domain '{name}' is not kept: {why}"))
        })?;
        self.shared.readings.keep(&stored, Arc::new(read));
        Ok(Arc::new(stored))
    }

    /// Puts a stored configuration on disk, in which it has this name.
    pub(crate) async fn store(&self, stored: Arc<StoredDef>, name: &str) -> Result<()> {
        let note = Note { name: name.to_owned(), ..lock(&self.state).note(self.owner, &*self.driver) };
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        let status = self.guest().ok().map(|guest| guest.status);
        let save = move || {
            status.map_or(Ok(()), |status| status.will_store(&stored.text()))?;
            shared.store.save_definition(uuid, &stored, &note)
        };
        on_disk(save).await
    }

    /// Puts the first that is stored of it on disk; `draft` is that, being written.
    pub(crate) async fn store_first(&self, stored: Arc<StoredDef>, draft: Option<DraftToCome>) -> Result<()> {
        let drafted = match draft {
            Some(draft) => draft.await.ok().transpose()?,
            None => None,
        };
        let note = lock(&self.state).note(self.owner, &*self.driver);
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        on_disk(move || shared.store.put_definition(drafted, uuid, &stored, &note)).await
    }

    /// Notes the configuration of what runs; a guest that has just ended needs no note.
    pub(super) async fn keep_live(&self, live: &DomainDef) -> Result<()> {
        let Ok(guest) = self.guest() else { return Ok(()) };
        let (status, text) = (guest.status, live.write(Form::LIVE));
        on_disk(move || status.runs_as(text)).await
    }

    /// What runs.
    pub(super) fn live(&self) -> Option<Arc<DomainDef>> {
        lock(&self.state).live().cloned()
    }

    /// What is stored.
    pub(crate) fn stored(&self) -> Result<Option<Arc<DomainDef>>> {
        Ok(self.configurations()?.1)
    }

    /// Its configurations, that first which a new one takes the place of.
    pub(crate) fn known(&self) -> Result<Vec<Arc<DomainDef>>> {
        let (live, stored) = self.configurations()?;
        Ok(stored.into_iter().chain(live).collect())
    }

    /// What runs and what is stored.
    pub(super) fn configurations(&self) -> Result<Configurations> {
        let (live, stored) = {
            let state = lock(&self.state);
            (state.live().cloned(), state.stored.clone())
        };
        Ok((live, stored.map(|stored| self.shared.reading_of(&stored)).transpose()?))
    }

    fn not_active(&self, what: &str) -> Error {
        Error::OperationInvalid(format!(
            "domain '{}' is shut off and does not have {what}; start it first",
            self.name()
        ))
    }

    fn not_stored(&self, what: &str) -> Error {
        Error::OperationInvalid(format!(
            "domain '{}' is transient and does not have {what}; define it first",
            self.name()
        ))
    }

    pub(super) fn vanished(&self) -> Error {
        Error::NoSuchDomain { what: "name", value: self.name() }
    }
}

impl State {
    pub(super) fn has_stored(&mut self, stored: Arc<StoredDef>, told: Lifecycle) -> Vec<Lifecycle> {
        self.stored = Some(stored);
        self.broken = None;
        self.being_stored = false;
        self.compare_configs();
        vec![told]
    }

    pub(super) fn edited(&mut self, live: Option<Arc<DomainDef>>, stored: Option<Arc<StoredDef>>) -> Vec<Lifecycle> {
        if let (Some(guest), Some(live)) = (self.guest.as_mut(), live) {
            (guest.live, guest.document) = (live, Arc::default());
        }
        match stored {
            Some(stored) => self.has_stored(stored, Lifecycle::Defined(Defined::Updated)),
            None => {
                self.compare_configs();
                Vec::new()
            }
        }
    }
}

/// What runs, with what block jobs write beside its disks.
fn with_mirrors(live: &Arc<DomainDef>, mirrors: Vec<(String, Element)>) -> Arc<DomainDef> {
    let mut shown = live.clone();
    for (target, mirror) in mirrors {
        let disks = &mut Arc::make_mut(&mut shown).devices.disks;
        disks
            .iter_mut()
            .filter(|disk| disk.target.dev == target)
            .for_each(|disk| disk.rest.elements.push(mirror.clone()));
    }
    shown
}

/// The definition under another name, which is held to the rules a document's name is held to.
fn renamed(def: &Arc<DomainDef>, name: &str) -> Result<Arc<DomainDef>> {
    let mut def = def.clone();
    if def.name == name {
        return Err(Error::InvalidArgument(format!("domain '{name}' has that name already")));
    }
    name.clone_into(&mut Arc::make_mut(&mut def).name);
    check_text(&def)?;
    Ok(def)
}

/// Refuses a text that would not be published whole.
fn refuse_long(what: &str, text: &str) -> Result<()> {
    if text.len() > PUBLISHED {
        let text =
            format!("a {what} set here has at most {PUBLISHED} bytes, not {}; define the domain for more", text.len());
        return Err(Error::InvalidArgument(text));
    }
    Ok(())
}

/// Holds what a caller put in to the rules of a document: it must read back as what was meant.
fn check_text(def: &DomainDef) -> Result<()> {
    match DomainDef::parse(&def.write(Form::STORED)) {
        Ok(read) if (&read.title, &read.description) != (&def.title, &def.description) => {
            let text = "the text has control characters, which XML cannot hold; leave them out";
            Err(Error::InvalidArgument(text.to_owned()))
        }
        Ok(read) if read.name == def.name => Ok(()),
        Ok(_) => Err(Error::InvalidArgument(format!("'{}' cannot be a domain's name", def.name))),
        Err(findings) => {
            Err(Error::InvalidArgument(findings.first().map_or_else(String::new, |finding| finding.message.clone())))
        }
    }
}
