//! Volumes that are made: by a document, by a few words, and as clones of others. What is asked for becomes one request to the
//! host's storage, and its file has a name only when all of it is there.

use super::{Pool, StorageCheck, Volume};
use crate::authz::{Action, Caller};
use crate::error::{Error, Result};
use crate::frames::{self, Changeable as _};
use crate::job::Ticket;
use crate::lock::lock;
use crate::object::ObjectKind;
use crate::verb;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::device::source::{EncryptionFormat, SecretRef};
use virt_model::driver::GivenFile;
use virt_model::driver::storage::{Content, NewVolume, Preallocation, Qcow2Options, Reflink, Work as _};
use virt_model::secret::{SecretName, UsageKind};
use virt_model::storage::check_volume_name;
use virt_model::storage::volume::VolumeDef;

/// What `CreateVolume` is told beside the document.
#[derive(Debug, Default)]
pub struct CreateVolume {
    /// How much is laid out at once.
    pub preallocate: Preallocation,
    /// What it is to hold.
    pub content: Option<GivenFile>,
    /// It is cancelled when its caller leaves.
    pub cancel_on_disconnect: bool,
}

/// What `AddVolume` is told beside name and capacity.
#[derive(Debug, Default)]
pub struct AddVolume {
    /// `raw` if not said.
    pub format: Option<String>,
    /// What it stands on.
    pub backing: Option<Volume>,
    /// What is taken at once, in bytes.
    pub allocation: u64,
    /// The uuid, or the usage, of the secret that opens it.
    pub secret: Option<String>,
    /// Of qcow2, in bytes.
    pub cluster_size: Option<u64>,
    /// The rest.
    pub create: CreateVolume,
}

/// What `Clone` is told beside the name.
#[derive(Default)]
pub struct CloneVolume {
    /// The pool that it is to be in; the same if not said.
    pub pool: Option<Arc<Pool>>,
    /// Its format; the same if not said.
    pub format: Option<String>,
    /// It stands on the volume that is cloned.
    pub thin: bool,
    /// Whether blocks are shared.
    pub reflink: Reflink,
    /// It stands on nothing.
    pub flatten: bool,
    /// The uuid, or the usage, of the secret that opens it.
    pub secret: Option<String>,
    /// It is cancelled when its caller leaves.
    pub cancel_on_disconnect: bool,
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "volume '{}'", self.name)
    }
}

/// What is to be made, before anything that it needs is opened.
struct Wanted {
    new: NewVolume,
    /// What it stands on.
    base: Option<Volume>,
    /// What opens it.
    secret: Option<String>,
}

impl Wanted {
    /// What a guest is to see, in bytes, as far as that is not read yet.
    fn capacity(&self) -> Result<u64> {
        match &self.base {
            Some(base) if self.new.capacity == 0 => Ok(base.look()?.capacity),
            _ => Ok(self.new.capacity),
        }
    }
}

impl Pool {
    /// Makes a volume of a document.
    pub async fn create_volume(
        self: &Arc<Self>,
        caller: &Caller,
        xml: &str,
        options: CreateVolume,
    ) -> Result<(Volume, Ticket)> {
        let departs = options.cancel_on_disconnect;
        let wanted = self.wanted(caller, xml, options).await?;
        self.make(caller, &verb::CREATE_VOLUME, wanted, departs).await
    }

    /// What `CreateVolume` would meet.
    pub async fn check_create_volume(
        self: &Arc<Self>,
        caller: &Caller,
        xml: &str,
        preallocate: Preallocation,
    ) -> Result<StorageCheck> {
        let options = CreateVolume { preallocate, ..CreateVolume::default() };
        frames::beside(&**self, caller, &verb::CHECK_CREATE_VOLUME, async {
            let wanted = match self.wanted(caller, xml, options).await {
                Ok(wanted) => wanted,
                Err(refusal) => return Ok(StorageCheck { refusal: Some(refusal), ..StorageCheck::default() }),
            };
            let new = &wanted.new;
            let needs = if new.preallocation.writes_all() { new.capacity } else { new.allocation };
            let reserves = || {
                let capacity = wanted.capacity()?;
                self.new_volume(&new.name).reserve("make", caller.uid, caller.uid, capacity).map(drop)
            };
            let refusal = self.refuse_to_make(&new.name, needs).and_then(|()| reserves()).err();
            let files = vec![(self.target().join(&new.name).display().to_string(), "created", needs)];
            Ok(StorageCheck { refusal, files, needs, ..StorageCheck::default() })
        })
        .await
    }

    /// Makes a volume of a few words.
    pub async fn add_volume(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        capacity: u64,
        options: AddVolume,
    ) -> Result<(Volume, Ticket)> {
        check_volume_name(name).map_err(Error::InvalidArgument)?;
        let CreateVolume { preallocate, content, cancel_on_disconnect } = options.create;
        let format = options.format.unwrap_or_else(|| "raw".to_owned());
        let mut new = empty(name, &format, capacity);
        (new.allocation, new.preallocation) = (options.allocation, preallocate);
        new.qcow2.cluster_size = options.cluster_size;
        new.content = content.map_or(Content::Empty, Content::Given);
        let wanted = Wanted { new, base: options.backing, secret: options.secret };
        self.make(caller, &verb::ADD_VOLUME, wanted, cancel_on_disconnect).await
    }

    /// What a document asks for.
    async fn wanted(self: &Arc<Self>, caller: &Caller, xml: &str, options: CreateVolume) -> Result<Wanted> {
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let def = seat.read(xml, VolumeDef::parse).await.map_err(Error::ConfigInvalid)?;
        let kind = lock(&self.state).running().kind;
        let checked = self.shared.host.storage.check_volume(kind, &def);
        checked.map_err(|e| Error::from_driver_of(ObjectKind::Volume, &def.name, "make", e))?;
        let unsupported = |why: String| Error::ConfigUnsupported(format!("cannot make volume '{}': {why}", def.name));
        if def.kind.is_some_and(|said| said != kind.volume_kind()) {
            return Err(unsupported(format!("in a pool of type '{kind}' each is of type '{}'", kind.volume_kind())));
        }
        let target = def.target.as_ref();
        let own = self.target().join(&def.name);
        if let Some(path) = target.and_then(|target| target.path.as_deref()).filter(|path| Path::new(path) != own) {
            return Err(unsupported(format!("its path follows from the pool, and is {}, not {path}", own.display())));
        }
        let encryption = target.and_then(|target| target.encryption.as_ref());
        if encryption.is_some_and(|how| !matches!(how.format, EncryptionFormat::Luks | EncryptionFormat::Default)) {
            return Err(unsupported("volumes are encrypted by luks".to_owned()));
        }
        let secret = encryption.and_then(|how| how.secrets.first()).and_then(named_by);
        if encryption.is_some() && secret.is_none() {
            let text = "say with which <secret> it is encrypted: by its uuid, or by the usage of one for volumes";
            return Err(unsupported(text.to_owned()));
        }
        let format = match (def.format(), encryption.is_some()) {
            ("raw", true) => "luks",
            (format, _) => format,
        };
        let mut new = empty(&def.name, format, def.capacity());
        new.preallocation = options.preallocate;
        if let Some(target) = target {
            let features = target.features.as_ref();
            new.qcow2 = Qcow2Options {
                compat: target.compat.clone(),
                cluster_size: target.cluster_size.map(|size| size.0),
                lazy_refcounts: features.is_some_and(|features| features.lazy_refcounts),
                extended_l2: features.is_some_and(|features| features.extended_l2),
            };
            new.nocow = target.nocow;
            if let Some(permissions) = &target.permissions {
                new.owner = (permissions.owner(), permissions.group());
                new.mode = permissions.mode.map_or(new.mode, |mode| mode.0);
            }
        }
        new.content = options.content.map_or(Content::Empty, Content::Given);
        let base = def.backing().map(|(path, format)| self.base(path, format)).transpose()?;
        Ok(Wanted { new, base, secret })
    }

    /// The volume that a document says one is to stand on.
    fn base(&self, path: &str, format: Option<&str>) -> Result<Volume> {
        let outside =
            || Error::StorageFailed(format!("{path} is no volume of an active pool, and nothing is put on it"));
        let (pool, name) = self.pools.volume_at(Path::new(path)).ok_or_else(outside)?;
        let volume = pool.find_volume(&name)?;
        let known = volume.look()?.format;
        match format.filter(|format| **format != known) {
            None => Ok(volume),
            Some(format) => {
                Err(Error::InvalidArgument(format!("volume '{name}' is of format '{known}', not '{format}'")))
            }
        }
    }

    /// Refuses a name that is taken, and what does not fit.
    fn refuse_to_make(&self, name: &str, needs: u64) -> Result<()> {
        let state = lock(&self.state);
        if state.volumes.contains_key(name) {
            return Err(Error::VolumeExists(format!("pool '{}' has a volume '{name}' already", self.name)));
        }
        match needs > state.room.available {
            true => Err(Error::NoSpace(format!(
                "cannot make volume '{name}': {needs} bytes are needed in pool '{}', and {} are free",
                self.name, state.room.available
            ))),
            false => Ok(()),
        }
    }

    /// Begins to make a volume.
    async fn make(
        self: &Arc<Self>,
        caller: &Caller,
        verb: &'static verb::Verb,
        wanted: Wanted,
        departs: bool,
    ) -> Result<(Volume, Ticket)> {
        let volume = Arc::new(self.new_volume(&wanted.new.name));
        let ticket = frames::accepted(&*volume, caller, verb, async {
            frames::allow(&*volume, caller, verb.action).await?;
            if !is_plain(wanted.new.owner, caller) {
                frames::allow(&**self, caller, Action::StorageDefine).await?;
            }
            self.applies(verb)?;
            let Wanted { mut new, base, secret } = wanted;
            let mut below = Vec::new();
            if let Some(base) = &base {
                // Who stands on a volume reads it.
                frames::allow(base, caller, Action::VolumeContent).await?;
                below = base.below_for(caller).await?;
                stand_on(&mut new, base)?;
            }
            new.secret = secret;
            self.refuse_to_make(&new.name, if new.preallocation.writes_all() { new.capacity } else { new.allocation })?;
            let reserved = volume.reserve("make", caller.uid, caller.uid, new.capacity)?;
            volume.begin(caller, verb, departs, move |volume, work| async move {
                work.has_reserved(reserved);
                if let Some(base) = &base {
                    work.holds(base.kept_for("put something on").await?);
                    base.refuse_written("put something on", &[base.path()]).await?;
                    base.still_on(&below)?;
                    stand_on(&mut new, base)?;
                    work.puts_on(Some(base.path()));
                }
                volume.pool.refuse_to_make(&new.name, 0)?;
                let _needed = volume.needs(new.secret.as_deref());
                let made = volume.pool.opened()?.create(new, work).await;
                made.map(drop).map_err(|e| volume.failed("make", e))
            })
        })
        .await?;
        Ok((self.new_volume(&volume.name), ticket))
    }
}

impl Volume {
    /// Makes a volume that holds the same.
    pub async fn clone_to(self, caller: &Caller, name: &str, options: CloneVolume) -> Result<(Volume, Ticket)> {
        check_volume_name(name).map_err(Error::InvalidArgument)?;
        let verb = &verb::VOLUME_CLONE;
        let pool = options.pool.clone().unwrap_or_else(|| self.pool.clone());
        let volume = Arc::new(pool.new_volume(name));
        let (departs, source) = (options.cancel_on_disconnect, Arc::new(self));
        let ticket = frames::accepted(&*source, caller, verb, async {
            frames::allow(&*source, caller, verb.action).await?;
            frames::allow(&*volume, caller, Action::VolumeCreate).await?;
            source.pool.applies(verb)?;
            pool.applies(verb)?;
            pool.refuse_to_make(name, 0)?;
            source.refuse_while_written("clone").await?;
            // What cannot be is refused before there is a job; the job looks anew, when nothing else is done to what it reads.
            let new = source.copy_of(name, &options).await?;
            let reads_below = !matches!(new.content, Content::Copy { .. });
            let below = if reads_below { source.below_for(caller).await? } else { Vec::new() };
            let reserved = volume.reserve("make", caller.uid, caller.uid, new.capacity)?;
            let source = source.clone();
            volume.begin(caller, verb, departs, move |volume, work| async move {
                work.has_reserved(reserved);
                work.holds(source.kept_for("clone").await?);
                source.refuse_while_written("clone").await?;
                if reads_below {
                    source.still_on(&below)?;
                    source.refuse_written("clone", &below).await?;
                }
                let new = source.copy_of(&volume.name, &options).await?;
                // It may have grown since it was looked at.
                work.grows(new.capacity).map_err(|e| volume.failed("make", e))?;
                work.puts_on(match &new.content {
                    Content::Overlay { base, .. } => Some(base.clone()),
                    Content::Copy { .. } => source.pool.noted_base(&source.look()?),
                    _ => None,
                });
                volume.pool.refuse_to_make(&new.name, 0)?;
                let _needed = volume.needs(new.secret.as_deref());
                let made = volume.pool.opened()?.create(new, work).await;
                made.map(drop).map_err(|e| volume.failed("make", e))
            })
        })
        .await?;
        Ok((pool.new_volume(name), ticket))
    }

    /// What is to be made: bytes as they are where that is enough, and else what a guest would see.
    async fn copy_of(&self, name: &str, options: &CloneVolume) -> Result<NewVolume> {
        let look = self.look()?;
        let usual = if options.thin { "qcow2" } else { &look.format };
        let format = options.format.as_deref().unwrap_or(usual);
        let mut new = empty(name, format, look.capacity);
        new.secret = options.secret.clone();
        let plain = options.reflink == Reflink::Auto;
        if options.thin {
            if options.flatten || !plain || look.encrypted {
                let text = "a thin clone stands on its volume, which is not encrypted: neither flatten nor reflink";
                return Err(Error::InvalidArgument(text.to_owned()));
            }
            stand_on(&mut new, self)?;
            return Ok(new);
        }
        let as_it_is =
            format == look.format && !(options.flatten && look.backing.is_some()) && options.secret.is_none();
        if as_it_is {
            new.content = Content::Copy { from: self.opened().await?, reflink: options.reflink };
            // What opens the one opens the other.
            let noted = self.pool.noted_of(&self.name).and_then(|(_, secret)| secret);
            new.secret = noted.map(|secret| secret.named);
            return Ok(new);
        }
        if !plain {
            let text = "blocks are shared by copies as they are: leave out format, flatten and secret, or reflink";
            return Err(Error::InvalidArgument(text.to_owned()));
        }
        if look.encrypted {
            let text = format!("volume '{}' is encrypted, and is copied as it is only", self.name);
            return Err(Error::OperationUnsupported(text));
        }
        let at = self.at()?;
        let chain: Vec<(PathBuf, String)> = [(self.path(), at.format)].into_iter().chain(at.below).collect();
        new.content = Content::Converted { chain };
        Ok(new)
    }
}

/// Whether it would be the caller's own, or virtd's as without a word. Files of others are an administrator's to make.
fn is_plain((user, group): (Option<u32>, Option<u32>), caller: &Caller) -> bool {
    let (us, ours) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    user.is_none_or(|uid| uid == us || uid == caller.uid) && group.is_none_or(|gid| gid == ours)
}

/// A volume that stands on another.
fn stand_on(new: &mut NewVolume, base: &Volume) -> Result<()> {
    let at = base.at()?;
    if base.look()?.encrypted {
        return Err(Error::OperationUnsupported(format!("volume '{}' is encrypted: nothing is put on it", base.name)));
    }
    if matches!(new.content, Content::Given(_)) {
        return Err(Error::InvalidArgument("a volume holds what is given, or stands on another".to_owned()));
    }
    if new.capacity == 0 {
        new.capacity = at.capacity;
    }
    new.content = Content::Overlay { base: base.path(), format: at.format };
    Ok(())
}

/// One that holds nothing.
fn empty(name: &str, format: &str, capacity: u64) -> NewVolume {
    NewVolume {
        name: name.to_owned(),
        format: format.to_owned(),
        capacity,
        allocation: 0,
        preallocation: Preallocation::Off,
        qcow2: Qcow2Options::default(),
        nocow: false,
        owner: (None, None),
        mode: 0o600,
        secret: None,
        content: Content::Empty,
    }
}

/// The word by which a document names the secret of a volume ([`SecretName::of_volume`]).
fn named_by(secret: &SecretRef) -> Option<String> {
    match SecretName::of(secret, UsageKind::Volume)? {
        SecretName::Uuid(uuid) => Some(uuid.to_string()),
        SecretName::Usage(UsageKind::Volume, usage) => Some(usage.into()),
        SecretName::Usage(..) => None,
    }
}
