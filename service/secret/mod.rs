//! One secret: what it is for, whether it has a value, and who names it. The value itself is its keeper's (`SecretKeeper`).
//!
//! ```text
//!  define ─▶ document and note on disk ─▶ told          set value ─▶ kept by the keeper ─▶ told
//!  undefine ─▶ document gone ─▶ value gone ─▶ told      (a value without a document is forgotten when virtd starts)
//! ```

mod manage;
mod taken_in;

pub(crate) use manage::{load, tell_protection};
pub(crate) use taken_in::take_in_files;

use crate::authz::{Action, Caller, Subject};
use crate::error::{Error, Result};
use crate::events::{Event, Happened};
use crate::facts::{ObjectFacts, SecretFacts};
use crate::fail_point;
use crate::frames::{self, Changeable};
use crate::lock::lock;
use crate::object::{ObjectKind, ObjectRef, Usage, User};
use crate::registry::{Object, Registry};
use crate::shared::Shared;
use crate::shown::text::published;
use crate::store::{Folder, on_disk};
use crate::time::now_usec;
use crate::turn::Turn;
use crate::uses::Needed;
use crate::verb::{self, Verb, When};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::driver::secrets::{KeptValue, LARGEST_SECRET, SecretValue};
use virt_model::driver::{DriverError, GivenFile};
use virt_model::secret::{SecretDef, SecretName};

/// All secrets of this host.
pub(crate) type Secrets = Registry<Secret>;

/// A secret, from its definition to its end.
pub struct Secret {
    uuid: Uuid,
    owner: u32,
    /// What it is called in the registry: see [`key`]. Only that of a broken one changes, when it is defined anew.
    key: Mutex<Arc<str>>,
    shared: Arc<Shared>,
    secrets: Arc<Secrets>,
    turn: Arc<Turn>,
    state: Mutex<State>,
}

struct State {
    def: Arc<SecretDef>,
    /// Why its document cannot be used: `def` then only stands for it.
    broken: Option<String>,
    value: Option<KeptValue>,
    /// How a value would be kept that is set now.
    protection: &'static str,
    gone: bool,
    /// As last published.
    facts: Option<Arc<SecretFacts>>,
}

/// What XML has no word for, and what is to be known of a secret whose document cannot be read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Note {
    owner: u32,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    id: String,
}

impl Note {
    fn of(owner: u32, def: &SecretDef) -> Note {
        Note { owner, kind: def.kind().as_str().to_owned(), id: def.id().to_owned() }
    }
}

/// What is known of undefining a secret, of which nothing is done.
#[derive(Debug)]
pub struct CheckedUndefine {
    /// Why it would be refused.
    pub refusal: Option<Error>,
    /// Who names it.
    pub users: Arc<[User]>,
}

/// What a secret is called in the registry: nothing else may be for the same.
fn key(def: &SecretDef) -> String {
    match def.id() {
        "" => def.uuid.to_string(),
        id => format!("{} {id}", def.kind()),
    }
}

/// What polkit is told of a secret, or of one that is about to be defined.
fn subject(def: &SecretDef) -> Subject {
    Subject::default().with("secret_uuid", def.uuid.to_string()).with("secret_usage", def.id())
}

impl Object for Secret {
    const KIND: ObjectKind = ObjectKind::Secret;

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn exists(text: String) -> Error {
        Error::SecretExists(text)
    }
}

impl Changeable for Secret {
    const KIND: ObjectKind = ObjectKind::Secret;

    fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn turn(&self) -> &Arc<Turn> {
        &self.turn
    }

    fn reference(&self) -> ObjectRef {
        ObjectRef::Secret(self.uuid)
    }

    fn name(&self) -> String {
        self.key().to_string()
    }

    fn subject(&self) -> Subject {
        subject(&lock(&self.state).def).owned_by(self.owner)
    }

    fn still_here(&self) -> Result<()> {
        match lock(&self.state).gone {
            true => Err(Error::NoSuchSecret(format!("no secret with uuid '{}'", self.uuid))),
            false => Ok(()),
        }
    }

    fn sound_for(&self, action: Action) -> Result<()> {
        match &lock(&self.state).broken {
            Some(why) if !matches!(action, Action::SecretDefine | Action::SecretDelete) => {
                Err(Error::OperationInvalid(format!(
                    "secret '{}' is broken: {why}; define it anew, or undefine it",
                    self.key()
                )))
            }
            _ => Ok(()),
        }
    }

    fn applies(&self, verb: &Verb) -> Result<()> {
        if verb.when != When::HasValue {
            return Ok(());
        }
        let state = lock(&self.state);
        if state.def.is_private() {
            let text = format!("the value of secret '{}' is private: it is told to nobody, root included", self.key());
            return Err(Error::AccessDenied(text));
        }
        match state.value {
            Some(_) => Ok(()),
            None => {
                Err(Error::SecretMissing(format!("secret '{}' has no value: set one first (SetValue)", self.key())))
            }
        }
    }
}

impl Secret {
    /// Its identity.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn key(&self) -> Arc<str> {
        lock(&self.key).clone()
    }

    /// Whether its document or its value cannot be read.
    fn is_broken(&self) -> bool {
        lock(&self.state).broken.is_some()
    }

    /// What a method would meet now: `yes`, `no`, `challenge` or `na`. Never prompts.
    /// Error: `InvalidArgument` for a name that is no method of a secret.
    pub async fn can(&self, caller: &Caller, member: &str) -> Result<&'static str> {
        let verb = verb::find("org.virt.Secret", verb::SECRET, member)?;
        Ok(frames::can(self, caller, verb).await)
    }

    /// Its document.
    pub async fn xml(&self, caller: &Caller) -> Result<String> {
        frames::beside(self, caller, &verb::SECRET_XML, async { Ok(lock(&self.state).def.to_xml()) }).await
    }

    /// Sets its value, of at most 64 KiB.
    pub async fn set_value(self: &Arc<Self>, caller: &Caller, value: SecretValue) -> Result<()> {
        frames::short(self, caller, &verb::SET_VALUE, self.keep(value)).await
    }

    /// The same, read to its end from what a client gives.
    pub async fn set_value_from(self: &Arc<Self>, caller: &Caller, file: GivenFile) -> Result<()> {
        let keeper = self.shared.host.secrets.clone();
        frames::short(self, caller, &verb::SET_VALUE_FROM_FD, async {
            let value = keeper.read(file).await.map_err(|e| self.failed("set the value of", e))?;
            self.keep(value).await
        })
        .await
    }

    async fn keep(&self, value: SecretValue) -> Result<()> {
        if value.bytes().len() > LARGEST_SECRET {
            let text = format!("the value of secret '{}' would have more than {LARGEST_SECRET} bytes", self.key());
            return Err(Error::InvalidArgument(text));
        }
        self.opens_no_state()?;
        let ephemeral = lock(&self.state).def.is_ephemeral();
        let kept = self.shared.host.secrets.keep(self.uuid, value, ephemeral, now_usec()).await;
        fail_point::reached();
        let kept = kept.map_err(|e| self.failed("set the value of", e))?;
        self.commit(vec![("value-changed", "")], |state| state.has_value(kept));
        Ok(())
    }

    /// Refuses another value where the one that is there opens the state of a TPM, which nothing else does.
    fn opens_no_state(&self) -> Result<()> {
        if lock(&self.state).value.is_none() {
            return Ok(());
        }
        let opened: Vec<String> = self
            .users()
            .iter()
            .filter(|user| user.place == "tpm")
            .map(|user| self.shared.images.called(user))
            .collect();
        if opened.is_empty() {
            return Ok(());
        }
        let text = format!(
            "the value of secret '{}' opens the state of the TPM of {}, and another would not; take it out there first",
            self.key(),
            opened.join(", ")
        );
        Err(Error::InUse(text))
    }

    /// Its value, if that is not private.
    pub async fn value(&self, caller: &Caller) -> Result<SecretValue> {
        frames::beside(self, caller, &verb::GET_VALUE, async {
            let value = self.shared.host.secrets.value(self.uuid).await;
            let missing = || Error::SecretMissing(format!("secret '{}' has no value", self.key()));
            value.map_err(|e| self.failed("read the value of", e))?.ok_or_else(missing)
        })
        .await
    }

    /// Forgets it, with its value. `force`: also where stored configurations name it.
    pub async fn undefine(self: &Arc<Self>, caller: &Caller, force: bool) -> Result<()> {
        frames::short(self, caller, &verb::UNDEFINE_SECRET, async {
            self.is_not_used(force)?;
            let (shared, uuid) = (self.shared.clone(), self.uuid);
            on_disk(move || shared.store.documents(Folder::Secrets).remove(uuid)).await?;
            fail_point::reached();
            if let Err(error) = self.shared.host.secrets.forget(uuid).await {
                tracing::error!(%uuid, %error, "the value of a secret that is undefined is there still");
            }
            fail_point::reached();
            self.commit(vec![("undefined", "removed")], |state| state.gone = true);
            Ok(())
        })
        .await
    }

    /// What undefining it would meet.
    pub async fn check_undefine(&self, caller: &Caller, force: bool) -> Result<CheckedUndefine> {
        frames::beside(self, caller, &verb::CHECK_UNDEFINE_SECRET, async {
            Ok(CheckedUndefine { refusal: self.is_not_used(force).err(), users: self.users() })
        })
        .await
    }

    /// Nothing in use is taken away.
    fn is_not_used(&self, force: bool) -> Result<()> {
        let users = self.users();
        let holds = |user: &&User| !force || user.how != Usage::Config;
        let volume = |name: &str, pool: &Uuid| format!("volume '{name}' of the pool with uuid '{pool}'");
        let called = |user: &User| match &user.object {
            ObjectRef::Pool(pool) => volume(&user.place, pool),
            ObjectRef::Volume(pool, name) => volume(name, pool),
            _ => self.shared.images.called(user),
        };
        let named: Vec<String> = users.iter().filter(holds).map(called).collect();
        if named.is_empty() {
            return Ok(());
        }
        let text = format!("secret '{}' is used by {}; take it out there first", self.key(), named.join(", "));
        Err(Error::InUse(text))
    }

    /// Who names it.
    fn users(&self) -> Arc<[User]> {
        let def = lock(&self.state).def.clone();
        self.users_of(&def)
    }

    fn users_of(&self, def: &SecretDef) -> Arc<[User]> {
        let means_it = |needed: &Needed| match needed {
            Needed::Secret(SecretName::Uuid(uuid)) => *uuid == self.uuid,
            Needed::Secret(SecretName::Usage(_, usage)) => !def.id().is_empty() && **usage == *def.id(),
            Needed::Network(_) => false,
        };
        self.shared.uses.of(means_it).into()
    }

    /// Changes it, and tells what came of it, as one.
    fn commit(&self, events: Vec<Happened>, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        if state.gone {
            return;
        }
        change(&mut state);
        let facts = Arc::new(self.facts_of(&state));
        if state.facts.as_deref() == Some(&*facts) && events.is_empty() {
            return;
        }
        state.facts = Some(facts.clone());
        let told = match state.gone {
            false => Event::Object(ObjectFacts::Secret(facts), events),
            true => Event::ObjectGone(ObjectFacts::Secret(facts), events),
        };
        self.shared.events.send(told);
        if state.gone {
            self.shared.host.secrets.is_undefined(self.uuid);
            // Only now: whoever takes its uuid after it must not be told of before its end is.
            self.secrets.remove(self.uuid, &self.key(), self.owner);
        }
    }

    fn facts_of(&self, state: &State) -> SecretFacts {
        let def = &state.def;
        SecretFacts {
            uuid: self.uuid,
            usage_type: def.kind().as_str(),
            usage_id: def.id().to_owned(),
            description: published(def.description.as_deref().unwrap_or_default()).to_owned(),
            ephemeral: def.is_ephemeral(),
            private: def.is_private(),
            has_value: state.value.is_some(),
            value_changed_usec: state.value.map(|kept| kept.changed_usec).unwrap_or_default(),
            protection: state.protection,
            owner: self.owner,
            users: self.users_of(def),
            broken: published(state.broken.as_deref().unwrap_or_default()).to_owned(),
        }
    }

    /// Who names it may be others now.
    fn look_at_users(&self) {
        self.commit(Vec::new(), |_| {});
    }

    /// How a value would be kept that is set now, if that was not known.
    fn would_be_kept_by(&self, protection: &'static str) {
        self.commit(Vec::new(), |state| {
            if state.protection.is_empty() {
                state.protection = protection;
            }
        });
    }

    /// Takes another document. Permission has been asked.
    async fn redefine(self: &Arc<Self>, def: SecretDef) -> Result<()> {
        let _turn = frames::take_turn(&**self, verb::DEFINE_SECRET.word, &CancellationToken::new()).await?;
        let (before, value, broken) = {
            let state = lock(&self.state);
            (state.def.clone(), state.value, state.broken.is_some())
        };
        // A value that cannot be read now may be read later.
        let has_value = value.is_some() || broken && self.has_unreadable_value().await;
        // What stands for a document that cannot be read is private: nobody knows whether that was.
        let lifts = |was: bool, is: bool| has_value && was && !is;
        for (what, was, is) in [
            ("private", before.is_private(), def.is_private()),
            ("ephemeral", before.is_ephemeral(), def.is_ephemeral()),
        ] {
            if lifts(was, is) {
                let text =
                    format!("secret '{}' is {what} and has a value: undefine it, and define it anew", self.key());
                return Err(Error::OperationInvalid(text));
            }
        }
        let renamed = self.takes_name(key(&def).into(), broken)?;
        let ephemeral = def.is_ephemeral();
        let (shared, uuid, text, note) = (self.shared.clone(), self.uuid, def.to_xml(), Note::of(self.owner, &def));
        let moved = match value.filter(|_| ephemeral && !before.is_ephemeral()) {
            Some(kept) => {
                let value = self.shared.host.secrets.value(uuid).await.map_err(|e| self.failed("define", e))?;
                value.map(|value| (value, kept.changed_usec))
            }
            None => None,
        };
        on_disk(move || match ephemeral {
            true => shared.store.documents(Folder::Secrets).remove(uuid),
            false => shared.store.documents(Folder::Secrets).save(uuid, &text, &note),
        })
        .await?;
        fail_point::reached();
        let keeper = &self.shared.host.secrets;
        let kept = match moved {
            Some((value, changed)) => {
                Some(keeper.keep(uuid, value, true, changed).await.map_err(|e| self.failed("define", e))?)
            }
            None => value,
        };
        let protection = keeper.protection(ephemeral).await.as_str();
        renamed.stays(&def);
        self.commit(vec![("defined", "updated")], |state| {
            (state.def, state.broken, state.protection) = (Arc::new(def), None, protection);
            state.value = kept;
            kept.into_iter().for_each(|kept| state.has_value(kept));
        });
        Ok(())
    }

    /// Whether there is a value of which nothing can be told.
    async fn has_unreadable_value(&self) -> bool {
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        on_disk(move || Ok(shared.host.secrets.kept(uuid).is_err())).await.unwrap_or(true)
    }

    /// Has the name that a document gives it, if that is another: only of one that was broken is it unknown.
    fn takes_name(self: &Arc<Self>, name: Arc<str>, broken: bool) -> Result<Renaming> {
        let mut renaming = Renaming { secret: self.clone(), name, other: false };
        if *renaming.name == *self.key() {
            return Ok(renaming);
        }
        if !broken {
            // It was broken when this call began, and another call has defined it since.
            let text = format!("secret '{}' was defined by another call meanwhile; try again", self.key());
            return Err(Error::SecretExists(text));
        }
        self.secrets.claim_name(self.uuid, &renaming.name)?;
        renaming.other = true;
        Ok(renaming)
    }

    fn failed(&self, deed: &str, error: DriverError) -> Error {
        Error::from_driver_of(ObjectKind::Secret, &self.key(), deed, error)
    }
}

/// A name that a secret is about to have; given back unless it stays.
struct Renaming {
    secret: Arc<Secret>,
    name: Arc<str>,
    /// Whether it is another than the one before.
    other: bool,
}

impl Renaming {
    /// The definition has succeeded.
    fn stays(mut self, def: &SecretDef) {
        if std::mem::take(&mut self.other) {
            let before = std::mem::replace(&mut *lock(&self.secret.key), self.name.clone());
            self.secret.secrets.drop_name(&before);
            self.secret.shared.host.secrets.is_defined(self.secret.uuid, def.kind(), def.id());
        }
    }
}

impl Drop for Renaming {
    fn drop(&mut self) {
        if self.other {
            self.secret.secrets.drop_name(&self.name);
        }
    }
}

impl State {
    fn has_value(&mut self, kept: KeptValue) {
        (self.value, self.protection) = (Some(kept), kept.protection.as_str());
    }
}
