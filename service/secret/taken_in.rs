//! Secrets in files that the administrator has put beside the configuration, as earlier versions had them: each becomes a secret of
//! its own when virtd has started, once, and the file goes. That may wait for a TPM, and virtd has its name already.
//!
//! Value, then document, then the file goes: whatever is cut off, the value is in one of both places, and the next start goes on.
//! The file goes only when what is kept was opened again, and is the same: there may be no other copy of it.

use super::manage::{create, own_uid};
use super::{Secrets, key};
use crate::error::Result;
use crate::fail_point;
use crate::frames::take_turn;
use crate::lock::lock;
use crate::registry::Claimed;
use crate::shared::Shared;
use crate::store::on_disk;
use crate::time::now_usec;
use crate::uses::Needed;
use crate::verb;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::driver::secrets::{SecretKeeper, SecretValue};
use virt_model::secret::{SecretDef, SecretName, UsageKind};

/// What became of a file.
enum Fate {
    /// It is a secret now.
    TakenIn,
    /// It was one already, with that value.
    Known,
    /// There is one, with another value.
    Other,
    /// There is one without a value, which is not private.
    Open(Uuid),
}

/// Takes in all that there are. One that cannot be is left alone, and that is said.
pub(crate) async fn take_in_files(shared: &Arc<Shared>, secrets: &Arc<Secrets>) {
    let on = shared.clone();
    let files = match on_disk(move || Ok(on.host.secrets.files())).await {
        Ok(files) => files,
        Err(error) => return tracing::error!("the secrets that the administrator keeps are left alone: {error}"),
    };
    for (name, value) in files {
        let taken = match value {
            Ok(value) => take_in(shared, secrets, &name, value).await,
            Err(why) => Err(DriverError::Storage(why)),
        };
        let gone = match taken {
            Ok(Fate::Other) => {
                tracing::warn!(
                    "the secret {name} has a value of its own: the file of that name is left alone, and means nothing"
                );
                continue;
            }
            Ok(Fate::Open(uuid)) => {
                tracing::warn!(
                    "the file of the secret {name} is left alone: there is a secret of that name, {uuid}, which is not private, \
                     and its readers would have what the administrator keeps; define that one with private='yes', or undefine \
                     it, and restart virtd"
                );
                continue;
            }
            Ok(Fate::TakenIn) => {
                tracing::info!(
                    "the secret {name} is taken from its file: from now on it is kept by virtd (org.virt.Secret)"
                );
                remove(shared, &name).await
            }
            Ok(Fate::Known) => remove(shared, &name).await,
            Err(error) => {
                tracing::warn!("the file of the secret {name} is left alone: {error}");
                continue;
            }
        };
        if let Err(error) = gone {
            tracing::warn!("the file of the secret {name}, which is kept by virtd now, is there still: {error}");
        }
    }
}

async fn remove(shared: &Arc<Shared>, name: &SecretName) -> Result<()> {
    fail_point::reached();
    let (on, name) = (shared.clone(), name.clone());
    on_disk(move || {
        let removed = on.host.secrets.remove_file(&name);
        removed.map_err(|e| crate::error::Error::StorageFailed(e.to_string()))
    })
    .await
}

async fn take_in(
    shared: &Arc<Shared>,
    secrets: &Arc<Secrets>,
    name: &SecretName,
    value: SecretValue,
) -> Result<Fate, DriverError> {
    let keeper = &shared.host.secrets;
    let existing = match name {
        SecretName::Uuid(uuid) => secrets.get(*uuid),
        SecretName::Usage(_, id) => UsageKind::ALL.iter().find_map(|kind| secrets.by_name(&format!("{kind} {id}"))),
    };
    let refused = |e: crate::error::Error| DriverError::Internal(e.to_string());
    if let Some(secret) = existing {
        let turn = take_turn(&*secret, verb::SET_VALUE.word, &CancellationToken::new()).await;
        let _turn = turn.map_err(refused)?;
        return match keeper.value(secret.uuid).await? {
            Some(own) if own.bytes() == value.bytes() => Ok(Fate::Known),
            Some(_) => Ok(Fate::Other),
            // In memory alone it would end with virtd.
            None if secret.is_broken() || lock(&secret.state).def.is_ephemeral() => Ok(Fate::Other),
            // Nobody could read the file by the bus.
            None if !lock(&secret.state).def.is_private() => Ok(Fate::Open(secret.uuid)),
            None => {
                secret.keep(value.clone()).await.map_err(refused)?;
                opens(keeper, secret.uuid, &value).await?;
                Ok(Fate::TakenIn)
            }
        };
    }
    let def = match name {
        SecretName::Uuid(uuid) => SecretDef::of(*uuid, UsageKind::None, ""),
        SecretName::Usage(_, id) => SecretDef::of(Uuid::new_v4(), wanted_kind(shared, id), id),
    };
    // Nobody could read the file by the bus.
    let description = Some("taken from the file in which the administrator kept it".to_owned());
    let def = SecretDef { private: Some(true), description, ..def };
    def.write_readable().map_err(DriverError::Argument)?;
    let (uuid, called, owner) = (def.uuid, key(&def), own_uid());
    if !matches!(secrets.claim(uuid, &called, owner, usize::MAX).map_err(refused)?, Claimed::New) {
        return Ok(Fate::Other);
    }
    let made = async {
        let kept = keeper.keep(uuid, value.clone(), false, now_usec()).await?;
        fail_point::reached();
        opens(keeper, uuid, &value).await?;
        create(shared, secrets, def, owner, Some(kept)).await.map_err(refused)
    };
    made.await.inspect_err(|_| secrets.remove(uuid, &called, owner))?;
    Ok(Fate::TakenIn)
}

/// Whether what is kept of a value is the same when it is opened again. Error: what to do if it is not.
async fn opens(keeper: &Arc<dyn SecretKeeper>, uuid: Uuid, value: &SecretValue) -> Result<(), DriverError> {
    match keeper.value(uuid).await? {
        Some(own) if own.bytes() == value.bytes() => Ok(()),
        _ => Err(DriverError::Storage("its value is not the same when it is read again; set it (SetValue)".to_owned())),
    }
}

/// The kind of secret that machines want where they name this usage. Whoever else wants it finds it, the only one of that usage.
fn wanted_kind(shared: &Shared, id: &str) -> UsageKind {
    let named = |kind: &&UsageKind| {
        let wanted = SecretName::Usage(**kind, id.into());
        !shared.uses.of(|needed| *needed == Needed::Secret(wanted.clone())).is_empty()
    };
    UsageKind::ALL.iter().find(named).copied().unwrap_or(UsageKind::Volume)
}
