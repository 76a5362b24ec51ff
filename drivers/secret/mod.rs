//! Secrets' values at rest and in use: sealed by `systemd-creds` where that works, else in a file of mode 0600; ephemeral ones in
//! memory alone.
//!
//! ```text
//!  keep ──▶ systemd-creds encrypt --name=<uuid> ──▶ <folder>/<uuid>.value ──▶ systemd-creds decrypt ──▶ value ──▶ memfd
//!             (fails: as it is, mode 0600)
//! ```
//!
//! The name is sealed with the value: a file that somebody has put in the place of another is not opened. What a machine names is
//! looked up here, too, and where no such secret is defined, in the files that the administrator keeps (`host/secret.rs`).

mod sealed;

use crate::host::given::{self, Use};
use crate::host::workers::blocking;
use crate::host::{own_file, secret};
use async_trait::async_trait;
use sealed::{Sealed, seal, unseal};
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::OnceCell;
use uuid::Uuid;
use virt_model::driver::secrets::{KeptValue, LARGEST_SECRET, Protection, SecretKeeper, SecretValue};
use virt_model::driver::{DriverError, GivenFile};
use virt_model::lock::lock;
use virt_model::secret::{SecretName, UsageKind};
use zeroize::Zeroizing;

/// What to do about a secret that is not there.
const REMEDY: &str = "define it and set its value (DefineSecret of org.virt.Manager.Secret, SetValue)";

/// How long a client's descriptor may take to come to its end.
const READ: Duration = Duration::from_secs(30);

/// See the module.
pub struct Vault {
    /// Where values are kept.
    folder: PathBuf,
    /// Where the administrator keeps some, a file each.
    files: PathBuf,
    /// How values are sealed here, once that was found out.
    means: OnceCell<Protection>,
    memory: Mutex<HashMap<Uuid, (SecretValue, u64)>>,
    /// What is defined, by what it is for.
    defined: Mutex<HashMap<Uuid, (UsageKind, String)>>,
    /// Held while a value is replaced or forgotten.
    changes: tokio::sync::Mutex<()>,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vault").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl Vault {
    /// Keeps values in `folder`, which the service makes, and reads those that the administrator keeps in `files`.
    pub fn new(folder: PathBuf, files: PathBuf) -> Arc<Vault> {
        Arc::new(Vault {
            folder,
            files,
            means: OnceCell::new(),
            memory: Mutex::default(),
            defined: Mutex::default(),
            changes: tokio::sync::Mutex::default(),
        })
    }

    /// Where the administrator keeps some, a file each.
    pub fn administrators_folder(&self) -> &Path {
        &self.files
    }

    /// The value of the secret that a machine names. Errors: `NoSuchSecret`, `SecretMissing`, `Storage`.
    pub async fn named(self: &Arc<Self>, name: &SecretName) -> Result<SecretValue, DriverError> {
        let missing = || has_no_value(name);
        if let Some(uuid) = self.find(name) {
            return self.value(uuid).await?.ok_or_else(missing);
        }
        let (vault, of) = (self.clone(), name.clone());
        let read = blocking(move || vault.in_file(&of)).await?;
        match self.find(name) {
            // It has just been taken in from its file.
            Some(uuid) if read.is_err() => self.value(uuid).await?.ok_or_else(missing),
            _ => read,
        }
    }

    /// Why a machine that names this secret could not be started, if so. `only`: it takes secrets of that kind, and those that are for
    /// nothing in particular. Blocks for files of virtd's own and the administrator's.
    pub fn lacks(&self, name: &SecretName, only: Option<UsageKind>) -> Option<DriverError> {
        let Some(uuid) = self.find(name) else {
            return self.in_file(name).err().filter(|_| self.find(name).is_none());
        };
        if let Some(other) = only.and_then(|only| self.is_of_another_kind(uuid, only)) {
            return Some(DriverError::NotPossible(format!("the secret {name} {other}")));
        }
        match self.kept(uuid) {
            Ok(Some(_)) => None,
            Ok(None) => Some(has_no_value(name)),
            Err(error) => Some(error),
        }
    }

    /// The secret of that name: of the kind that is wanted, or else the only one for that.
    fn find(&self, name: &SecretName) -> Option<Uuid> {
        let defined = lock(&self.defined);
        let (kind, id) = match name {
            SecretName::Uuid(uuid) => return defined.contains_key(uuid).then_some(*uuid),
            SecretName::Usage(kind, id) => (*kind, &**id),
        };
        let all: Vec<_> = defined.iter().filter(|(_, (_, of))| of == id && !id.is_empty()).collect();
        let exact = all.iter().find(|(_, (of, _))| *of == kind);
        exact.or(if let [one] = &all[..] { Some(one) } else { None }).map(|(uuid, _)| **uuid)
    }

    /// What a secret is, and what to do, if it is neither of that kind nor for nothing in particular.
    fn is_of_another_kind(&self, uuid: Uuid, only: UsageKind) -> Option<String> {
        let kind = lock(&self.defined).get(&uuid)?.0;
        let other = kind != only && kind != UsageKind::None;
        other.then(|| format!("is of type '{kind}', and one of type '{only}' is needed here: name another"))
    }

    /// The administrator's file of that name.
    fn in_file(&self, name: &SecretName) -> Result<SecretValue, DriverError> {
        let file = secret::file_of(name);
        secret::read(&self.files, &file).map(SecretValue::from).map_err(|error| match error {
            DriverError::Storage(_) if !secret::is_there(&self.files, &file) => {
                DriverError::NoSuchSecret(format!("there is no secret {name}: {REMEDY}"))
            }
            error => error,
        })
    }

    fn file(&self, uuid: Uuid) -> PathBuf {
        self.folder.join(format!("{uuid}.value"))
    }

    /// How values are sealed on this host. That is tried once, with nothing; but that they are not is not remembered: what seals
    /// them may come late.
    async fn means(&self) -> Protection {
        let tried = self.means.get_or_try_init(|| async {
            match sealed::means().await {
                Protection::File => Err(Protection::File),
                sealed => Ok(sealed),
            }
        });
        tried.await.copied().unwrap_or_else(|unsealed| unsealed)
    }
}

#[async_trait]
impl SecretKeeper for Vault {
    async fn protection(&self, ephemeral: bool) -> Protection {
        if ephemeral { Protection::Memory } else { self.means().await }
    }

    fn kept(&self, uuid: Uuid) -> Result<Option<KeptValue>, DriverError> {
        if let Some((_, changed_usec)) = lock(&self.memory).get(&uuid) {
            return Ok(Some(KeptValue { protection: Protection::Memory, changed_usec: *changed_usec }));
        }
        Ok(sealed_in(&self.file(uuid))?.map(|sealed| sealed.about()))
    }

    async fn keep(
        &self,
        uuid: Uuid,
        value: SecretValue,
        ephemeral: bool,
        changed_usec: u64,
    ) -> Result<KeptValue, DriverError> {
        let _change = self.changes.lock().await;
        if ephemeral {
            lock(&self.memory).insert(uuid, (value, changed_usec));
            self.remove(uuid).await?;
            return Ok(KeptValue { protection: Protection::Memory, changed_usec });
        }
        let sealed = seal(self.means().await, uuid, &value, changed_usec).await?;
        let about = sealed.about();
        let path = self.file(uuid);
        blocking(move || own_file::replace_json(&path, &sealed, true).map_err(|e| storage(&path, &e))).await??;
        lock(&self.memory).remove(&uuid);
        Ok(about)
    }

    async fn value(&self, uuid: Uuid) -> Result<Option<SecretValue>, DriverError> {
        if let Some((value, _)) = lock(&self.memory).get(&uuid) {
            return Ok(Some(value.clone()));
        }
        let path = self.file(uuid);
        match blocking(move || sealed_in(&path)).await?? {
            None => Ok(None),
            Some(sealed) => unseal(uuid, &sealed).await.map(Some),
        }
    }

    async fn forget(&self, uuid: Uuid) -> Result<(), DriverError> {
        let _change = self.changes.lock().await;
        lock(&self.memory).remove(&uuid);
        self.remove(uuid).await
    }

    async fn read(&self, file: GivenFile) -> Result<SecretValue, DriverError> {
        let useless = |why: &dyn fmt::Display| DriverError::Argument(format!("the descriptor cannot be read: {why}"));
        given::check(&file, Use::Read).map_err(|e| useless(&e))?;
        let read = tokio::time::timeout(READ, given::read_all(file, LARGEST_SECRET)).await;
        let read = read.map_err(|_| useless(&"it does not come to its end"))?.map_err(|e| useless(&e))?;
        let much = || DriverError::Argument(format!("the value has more than {LARGEST_SECRET} bytes"));
        read.map(SecretValue::from).ok_or_else(much)
    }

    fn all_kept(&self) -> Vec<Uuid> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let uuids = entries.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Uuid::try_parse(name.strip_suffix(".value")?).ok()
        });
        uuids.collect()
    }

    fn is_defined(&self, uuid: Uuid, kind: UsageKind, id: &str) {
        lock(&self.defined).insert(uuid, (kind, id.to_owned()));
    }

    fn is_undefined(&self, uuid: Uuid) {
        lock(&self.defined).remove(&uuid);
    }

    fn files(&self) -> Vec<(SecretName, Result<SecretValue, String>)> {
        let read = |file: String| {
            let name = secret::name_of(&file)?;
            Some((name, secret::read(&self.files, &file).map(SecretValue::from).map_err(|e| e.to_string())))
        };
        secret::all(&self.files).into_iter().filter_map(read).collect()
    }

    fn remove_file(&self, name: &SecretName) -> Result<(), DriverError> {
        let path = self.files.join(secret::file_of(name));
        own_file::remove(&path).map_err(|e| storage(&path, &e))
    }
}

impl Vault {
    async fn remove(&self, uuid: Uuid) -> Result<(), DriverError> {
        let path = self.file(uuid);
        blocking(move || own_file::remove(&path).map_err(|e| storage(&path, &e))).await?
    }
}

/// What is in a file, if that is there. Blocks.
fn sealed_in(path: &Path) -> Result<Option<Sealed>, DriverError> {
    match own_file::read(path, 4 * LARGEST_SECRET as u64) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(storage(path, &e)),
        Ok(text) => serde_json::from_slice(&Zeroizing::new(text)).map(Some).map_err(|e| storage(path, &e)),
    }
}

fn has_no_value(name: &SecretName) -> DriverError {
    DriverError::SecretMissing(format!("the secret {name} has no value: set one (SetValue)"))
}

fn storage(path: &Path, error: &dyn fmt::Display) -> DriverError {
    DriverError::Storage(format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const VALUE: &[u8] = b"open sesame, please";

    fn vault(folder: &Path) -> Arc<Vault> {
        for name in ["kept", "files"] {
            std::fs::create_dir_all(folder.join(name)).unwrap();
        }
        Vault::new(folder.join("kept"), folder.join("files"))
    }

    #[tokio::test]
    async fn a_value_is_kept_sealed_and_survives_its_vault() {
        let folder = tempfile::tempdir().unwrap();
        let (uuid, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let kept = vault(folder.path()).keep(uuid, VALUE.to_vec().into(), false, 7).await.unwrap();
        let file = folder.path().join(format!("kept/{uuid}.value"));
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let text = std::fs::read_to_string(&file).unwrap();
        if kept.protection != Protection::File {
            let plain = crate::base64::encode(VALUE);
            assert!(!text.contains("sesame") && !text.contains(&plain), "{text}");
        }
        let next = vault(folder.path());
        assert_eq!(next.kept(uuid).unwrap(), Some(kept));
        assert_eq!(next.value(uuid).await.unwrap().unwrap().bytes(), VALUE);
        assert_eq!(next.all_kept(), [uuid]);
        if kept.protection != Protection::File {
            // The name is sealed with it.
            std::fs::copy(&file, folder.path().join(format!("kept/{other}.value"))).unwrap();
            assert!(matches!(next.value(other).await, Err(DriverError::Storage(_))));
            next.forget(other).await.unwrap();
        }
        next.forget(uuid).await.unwrap();
        assert!(next.value(uuid).await.unwrap().is_none() && next.all_kept().is_empty() && !file.exists());
        next.forget(uuid).await.expect("it need not be there");
    }

    #[tokio::test]
    async fn an_ephemeral_value_is_never_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let (vault, uuid) = (vault(folder.path()), Uuid::from_u128(1));
        vault.keep(uuid, VALUE.to_vec().into(), false, 7).await.unwrap();
        let kept = vault.keep(uuid, b"another".to_vec().into(), true, 8).await.unwrap();
        assert_eq!(kept, KeptValue { protection: Protection::Memory, changed_usec: 8 });
        assert!(vault.all_kept().is_empty(), "what was on disk has gone");
        assert_eq!(vault.value(uuid).await.unwrap().unwrap().bytes(), b"another");
    }

    #[tokio::test]
    async fn machines_find_what_is_defined_and_then_the_administrators_files() {
        let folder = tempfile::tempdir().unwrap();
        let (vault, uuid) = (vault(folder.path()), Uuid::from_u128(1));
        let usage = |kind| SecretName::Usage(kind, "/srv/a.img".into());
        let missing = vault.named(&usage(UsageKind::Volume)).await.unwrap_err();
        assert!(matches!(&missing, DriverError::NoSuchSecret(text) if text.contains("'/srv/a.img'")), "{missing}");
        assert!(matches!(vault.lacks(&usage(UsageKind::Volume), None), Some(DriverError::NoSuchSecret(_))));
        let file = folder.path().join("files/%2Fsrv%2Fa.img");
        std::fs::write(&file, "from a file\n").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(vault.named(&usage(UsageKind::Volume)).await.unwrap().bytes(), b"from a file");
        let found = vault.files();
        assert_eq!(found[0].0, SecretName::Usage(UsageKind::Volume, "/srv/a.img".into()));
        vault.is_defined(uuid, UsageKind::Volume, "/srv/a.img");
        assert!(matches!(vault.named(&SecretName::Uuid(uuid)).await, Err(DriverError::SecretMissing(_))));
        assert!(matches!(vault.lacks(&usage(UsageKind::Volume), None), Some(DriverError::SecretMissing(_))));
        vault.keep(uuid, VALUE.to_vec().into(), false, 7).await.unwrap();
        assert_eq!(vault.named(&usage(UsageKind::Ceph)).await.unwrap().bytes(), VALUE, "the only one for that");
        assert!(vault.lacks(&usage(UsageKind::Volume), None).is_none());
        let by_uuid = SecretName::Uuid(uuid);
        let other = vault.lacks(&by_uuid, Some(UsageKind::Vtpm)).map(|lack| lack.to_string()).unwrap_or_default();
        assert!(other.contains("is of type 'volume'") && vault.lacks(&by_uuid, None).is_none(), "{other}");
        vault.is_defined(Uuid::from_u128(2), UsageKind::Iscsi, "/srv/a.img");
        assert_eq!(vault.named(&usage(UsageKind::Volume)).await.unwrap().bytes(), VALUE, "of the kind that is wanted");
        vault.is_undefined(uuid);
        vault.is_undefined(Uuid::from_u128(2));
        vault.remove_file(&usage(UsageKind::Volume)).unwrap();
        assert!(vault.files().is_empty());
    }
}
