//! All secrets: definitions until they are secrets, look-up, and what is found when virtd starts.

use super::{Note, Secret, Secrets, State, key, subject};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::fail_point;
use crate::frames::{self, Changeable as _};
use crate::log;
use crate::registry::Claimed;
use crate::shared::{Shared, virtd_itself};
use crate::store::{Folder, FoundDocument, on_disk};
use crate::{Service, verb};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use uuid::Uuid;
use virt_model::driver::secrets::KeptValue;
use virt_model::secret::{SecretDef, SecretName, UsageKind};
use virt_model::xml::{Finding, shorten};

impl Service {
    /// The secret with this uuid, written with or without dashes.
    pub fn secret_by_uuid(&self, uuid: &str) -> Result<Arc<Secret>> {
        let parsed = crate::read_uuid(uuid)?;
        let missing = || Error::NoSuchSecret(format!("no secret with uuid '{}'", shorten(uuid)));
        self.secret(parsed).ok_or_else(missing)
    }

    /// The secret with this uuid, if there is one.
    pub fn secret(&self, uuid: Uuid) -> Option<Arc<Secret>> {
        self.secrets.get(uuid)
    }

    /// The secret that is for this.
    pub fn secret_by_usage(&self, kind: &str, id: &str) -> Result<Arc<Secret>> {
        if !UsageKind::ALL.iter().any(|known| known.as_str() == kind && *known != UsageKind::None) {
            let known: Vec<_> = UsageKind::ALL[1..].iter().map(|kind| kind.as_str()).collect();
            let text = format!("a secret's type is one of {}, not '{}'", known.join(", "), shorten(kind));
            return Err(Error::InvalidArgument(text));
        }
        let missing = || Error::NoSuchSecret(format!("no secret of type '{kind}' for '{}'", shorten(id)));
        self.secrets.by_name(&format!("{kind} {id}")).ok_or_else(missing)
    }

    /// Defines a secret, or changes what is said of one. Its value stays as it is.
    pub async fn define_secret(&self, caller: &Caller, xml: &str) -> Result<Arc<Secret>> {
        let (verb, begun) = (&verb::DEFINE_SECRET, Instant::now());
        let result = self.define_secret_inner(caller, xml).await;
        match &result {
            Ok(secret) => frames::log_of(&**secret, caller, verb, begun, None),
            Err(error) => log::refused(caller, verb, begun, error),
        }
        result
    }

    async fn define_secret_inner(&self, caller: &Caller, xml: &str) -> Result<Arc<Secret>> {
        // What the administrator keeps for the same comes first, else it would be whose this one is.
        self.taken_in.cancelled().await;
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let read = |xml: &str| SecretDef::parse(xml).map(|def| (def.write_readable().err(), def));
        let (unreadable, def) = seat.read(xml, read).await.map_err(Error::ConfigInvalid)?;
        if let Some(why) = unreadable {
            return Err(Error::InvalidArgument(format!("secret {}: {why}", def.uuid)));
        }
        let name = key(&def);
        let broken = self.secrets.get(def.uuid).filter(|secret| secret.is_broken() && *secret.key() != *name);
        if let Some(broken) = broken {
            // Its name is not known, or may be another: its uuid alone says which one is meant.
            self.allow(caller, &verb::DEFINE_SECRET, &broken.subject()).await?;
            self.allow(caller, &verb::DEFINE_SECRET, &subject(&def)).await?;
            broken.redefine(def).await?;
            return Ok(broken);
        }
        let existing = self.secrets.look(def.uuid, &name)?;
        let about = existing.as_ref().map_or_else(|| subject(&def), |secret| secret.subject());
        self.allow(caller, &verb::DEFINE_SECRET, &about).await?;
        let limit = self.shared.limits.others_per_user;
        match self.secrets.claim_as_seen(def.uuid, &name, caller.uid, limit, existing.as_ref())? {
            Claimed::Existing(secret) => {
                secret.redefine(def).await?;
                Ok(secret)
            }
            Claimed::New => {
                let uuid = def.uuid;
                let made = create(&self.shared, &self.secrets, def, caller.uid, None).await;
                made.inspect_err(|_| self.secrets.remove(uuid, &name, caller.uid))
            }
        }
    }
}

/// A new secret, whose name and uuid are claimed; `value` is kept of it already.
pub(super) async fn create(
    shared: &Arc<Shared>,
    secrets: &Arc<Secrets>,
    def: SecretDef,
    owner: u32,
    value: Option<KeptValue>,
) -> Result<Arc<Secret>> {
    let (uuid, ephemeral, keeper) = (def.uuid, def.is_ephemeral(), &shared.host.secrets);
    if value.is_none() {
        // Of an earlier secret of that uuid nothing is left.
        let failed = |e| Error::from_driver_of(crate::object::ObjectKind::Secret, &key(&def), "define", e);
        keeper.forget(uuid).await.map_err(failed)?;
    }
    if !ephemeral {
        let (on, text, note) = (shared.clone(), def.to_xml(), Note::of(owner, &def));
        on_disk(move || on.store.documents(Folder::Secrets).save(uuid, &text, &note)).await?;
    }
    fail_point::reached();
    let protection = keeper.protection(ephemeral).await.as_str();
    let secret = enter(shared, secrets, def, None, owner, value, protection);
    secret.commit(vec![("defined", "added")], |_| {});
    Ok(secret)
}

/// Registers a secret.
fn enter(
    shared: &Arc<Shared>,
    secrets: &Arc<Secrets>,
    def: SecretDef,
    broken: Option<String>,
    owner: u32,
    value: Option<KeptValue>,
    protection: &'static str,
) -> Arc<Secret> {
    let (uuid, kind) = (def.uuid, def.kind());
    let protection = value.map_or(protection, |kept| kept.protection.as_str());
    shared.host.secrets.is_defined(uuid, kind, def.id());
    let key = Mutex::new(Arc::from(key(&def)));
    let state = State { def: Arc::new(def), broken, value, protection, gone: false, facts: None };
    let secret = Arc::new(Secret {
        uuid,
        owner,
        key,
        shared: shared.clone(),
        secrets: secrets.clone(),
        turn: Arc::default(),
        state: Mutex::new(state),
    });
    secrets.insert(secret.clone());
    secret
}

/// Fills the registry from disk. One whose document cannot be used is there, and says so; values without a document are forgotten.
pub(crate) async fn load(shared: &Arc<Shared>, secrets: &Arc<Secrets>) -> Result<()> {
    let on = shared.clone();
    let found = on_disk(move || on.store.documents(Folder::Secrets).load::<Note>()).await?;
    let known: BTreeSet<Uuid> = found.iter().map(|one| one.uuid).collect();
    let on = shared.clone();
    let kept = on_disk(move || Ok(on.host.secrets.all_kept())).await?;
    for lonely in kept.into_iter().filter(|uuid| !known.contains(uuid)) {
        tracing::warn!(uuid = %lonely, "a value is forgotten whose secret is undefined, or was never defined whole");
        if let Err(error) = shared.host.secrets.forget(lonely).await {
            tracing::error!(uuid = %lonely, %error, "a value without a secret is there still");
        }
    }
    for FoundDocument { uuid, text, note } in found {
        let read = text.and_then(|text| {
            let why = |findings: Vec<Finding>| findings.first().map(ToString::to_string).unwrap_or_default();
            SecretDef::parse(&text).map_err(why)
        });
        let other = |def: &SecretDef| format!("its file holds the secret {}", def.uuid);
        let read = read.and_then(|def| if def.uuid == uuid { Ok(def) } else { Err(other(&def)) });
        let read = read.and_then(|def| match secrets.look(uuid, &key(&def)) {
            Ok(_) => Ok(def),
            Err(e) => Err(e.to_string()),
        });
        let (def, broken) = match read {
            Ok(def) => (def, None),
            Err(why) => {
                tracing::error!(%uuid, "the document of this secret is left alone: {why}");
                let kind = UsageKind::ALL.iter().find(|kind| kind.as_str() == note.kind).copied().unwrap_or_default();
                let mut stands_for = SecretDef::of(uuid, kind, &note.id);
                if secrets.look(uuid, &key(&stands_for)).is_err() {
                    stands_for = SecretDef::of(uuid, UsageKind::None, "");
                }
                // Whatever it was: its value is told to nobody.
                stands_for.private = Some(true);
                (stands_for, Some(why))
            }
        };
        let on = shared.clone();
        let value = on_disk(move || {
            let kept = on.host.secrets.kept(uuid);
            kept.map_err(|e| Error::StorageFailed(format!("its value cannot be read: {e}")))
        });
        let (value, broken) = match value.await {
            Ok(value) => (value, broken),
            Err(e) => (None, broken.or(Some(e.to_string()))),
        };
        secrets.claim(uuid, &key(&def), note.owner, usize::MAX)?;
        // How one would be kept is told later: whoever tells it may wait for a TPM.
        enter(shared, secrets, def, broken, note.owner, value, "").look_at_users();
    }
    listen(shared, secrets);
    Ok(())
}

/// Tells how values would be kept of those that have none.
pub(crate) async fn tell_protection(shared: &Arc<Shared>, secrets: &Arc<Secrets>) {
    let all = secrets.all();
    if !all.is_empty() {
        let protection = shared.host.secrets.protection(false).await.as_str();
        all.iter().for_each(|secret| secret.would_be_kept_by(protection));
    }
}

/// Tells secrets whenever machines name others.
fn listen(shared: &Arc<Shared>, secrets: &Arc<Secrets>) {
    let all = Arc::downgrade(secrets);
    shared.uses.listen(move |changed| {
        let Some(secrets) = all.upgrade() else { return };
        for needed in changed {
            let crate::uses::Needed::Secret(name) = needed else { continue };
            match name {
                SecretName::Uuid(uuid) => secrets.get(*uuid).iter().for_each(|secret| secret.look_at_users()),
                SecretName::Usage(_, id) => {
                    let for_it = UsageKind::ALL.iter().filter_map(|kind| secrets.by_name(&format!("{kind} {id}")));
                    for_it.for_each(|secret| secret.look_at_users());
                }
            }
        }
    });
}

/// Whoever runs this virtd: what it takes in of its own accord is theirs.
pub(super) fn own_uid() -> u32 {
    virtd_itself().uid
}
