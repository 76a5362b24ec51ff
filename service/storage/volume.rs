//! One volume: a name in a pool, with a turn of its own, so that what takes hours keeps no other volume waiting.

use super::notes::{Noted, NotedSecret};
use super::work::JobWork;
use super::{Pool, StorageCheck};
use crate::authz::{Action, Caller, Subject};
use crate::error::{Error, Result};
use crate::frames::{self, Changeable};
use crate::images::{Fate, GuestDisk, Taken};
use crate::job::Ticket;
use crate::lock::lock;
use crate::object::{ObjectKind, ObjectRef, Usage, User};
use crate::shared::Shared;
use crate::store::on_disk;
use crate::turn::Turn;
use crate::uses::{Need, Needed};
use crate::verb::{self, Verb};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use tokio_util::sync::CancellationToken;
use virt_model::device::source::{Encryption, EncryptionFormat, SecretKind, SecretRef};
use virt_model::driver::storage::{NewSize, OpenPool, Part, VolumeAt, VolumeLook, Wiping, Work as _};
use virt_model::driver::{DriverError, GivenFile};
use virt_model::secret::SecretName;
use virt_model::storage::volume::{VolumeBacking, VolumeDef, VolumeKind, VolumeTarget};
use virt_model::storage::{Bytes, FileMode, FormatDoc, Permissions};

/// Why a volume with a data file is not used.
pub(super) const DATA_FILE: &str = "part of what it holds is in a file beside it, which is not followed";

/// A volume of a pool.
pub struct Volume {
    pub(super) pool: Arc<Pool>,
    pub(super) name: Arc<str>,
    turn: Arc<Turn>,
    /// It is being made, and need not be there.
    is_new: bool,
}

/// The size that a volume is to get.
#[derive(Clone, Copy, Debug)]
pub struct NewCapacity {
    /// What a guest sees, in bytes.
    pub capacity: u64,
    /// It may become smaller.
    pub shrink: bool,
    /// What is new is taken at once.
    pub allocate: bool,
    /// It is cancelled when its caller leaves.
    pub cancel_on_disconnect: bool,
}

impl Changeable for Volume {
    const KIND: ObjectKind = ObjectKind::Volume;

    fn shared(&self) -> &Arc<Shared> {
        &self.pool.shared
    }

    fn turn(&self) -> &Arc<Turn> {
        &self.turn
    }

    fn reference(&self) -> ObjectRef {
        ObjectRef::Volume(self.pool.uuid, self.name.clone())
    }

    fn name(&self) -> String {
        self.name.to_string()
    }

    fn subject(&self) -> Subject {
        let subject = super::subject(&self.pool.name, self.pool.uuid).with("volume_name", &*self.name);
        if self.is_new {
            // Whoever owns what has the name now owns nothing of what is to be made.
            return subject;
        }
        let state = lock(&self.pool.state);
        match state.volumes.get(&self.name) {
            Some(row) => {
                subject.owned_by(state.noted.get(&row.look.id).map_or(row.look.permissions.0, |noted| noted.owner))
            }
            None => subject,
        }
    }

    fn still_here(&self) -> Result<()> {
        match self.is_new || lock(&self.pool.state).volumes.contains_key(&self.name) {
            true => self.pool.still_here(),
            false => Err(self.pool.no_volume(&self.name)),
        }
    }

    fn sound_for(&self, action: Action) -> Result<()> {
        self.pool.sound_for(action)
    }

    fn applies(&self, verb: &Verb) -> Result<()> {
        self.pool.applies(verb)
    }

    const UNDONE_LATER: &str = "its storage does not answer: what was begun is undone when it does";
}

impl Pool {
    /// The volume of that name, if there is one.
    pub fn volume(self: &Arc<Self>, name: &str) -> Option<Volume> {
        let name = lock(&self.state).volumes.get_key_value(name)?.0.clone();
        Some(self.handle(name, false))
    }

    /// The volume that has such a key beside its path, if there is one: those of files have none.
    pub(super) fn volume_with_key(self: &Arc<Self>, key: &str) -> Option<Volume> {
        let name = {
            let state = lock(&self.state);
            if state.volume_kind() != VolumeKind::Block {
                return None;
            }
            let row = state.volumes.iter().find(|(_, row)| row.look.key.as_deref() == Some(key))?;
            row.0.clone()
        };
        Some(self.handle(name, false))
    }

    /// The same by its name. Error: there is none.
    pub fn find_volume(self: &Arc<Self>, name: &str) -> Result<Volume> {
        self.volume(name).ok_or_else(|| self.no_volume(name))
    }

    /// A volume that is to be made.
    pub(super) fn new_volume(self: &Arc<Self>, name: &str) -> Volume {
        self.handle(name.into(), true)
    }

    fn handle(self: &Arc<Self>, name: Arc<str>, is_new: bool) -> Volume {
        let mut turns = lock(&self.turns);
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = turns.get(&name).and_then(Weak::upgrade).unwrap_or_default();
        turns.insert(name.clone(), Arc::downgrade(&turn));
        Volume { pool: self.clone(), name, turn, is_new }
    }

    pub(super) fn no_volume(&self, name: &str) -> Error {
        let name = virt_model::xml::shorten(name);
        Error::NoSuchVolume(format!("pool '{}' has no volume '{name}'", self.name))
    }
}

impl Volume {
    /// Which object it is.
    pub fn object(&self) -> ObjectRef {
        self.reference()
    }

    /// Its pool.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// What a method would meet now: `yes`, `no`, `challenge` or `na`. Never prompts.
    /// Error: `InvalidArgument` for a name that is no method of a volume.
    pub async fn can(&self, caller: &Caller, member: &str) -> Result<&'static str> {
        let verb = verb::find("org.virt.StorageVolume", verb::VOLUME, member)?;
        Ok(frames::can(self, caller, verb).await)
    }

    /// Its document.
    pub async fn xml(&self, caller: &Caller) -> Result<String> {
        frames::beside(self, caller, &verb::VOLUME_XML, async {
            let (look, noted) = (self.look()?, self.pool.noted_of(&self.name));
            let secret = noted.and_then(|(_, secret)| secret);
            let kind = lock(&self.pool.state).volume_kind();
            Ok(document(kind, &look, &self.path(), secret.as_ref()).write())
        })
        .await
    }

    /// What is known of it.
    pub(super) fn look(&self) -> Result<VolumeLook> {
        let state = lock(&self.pool.state);
        let row = state.volumes.get(&self.name).map(|row| row.look.clone());
        drop(state);
        row.ok_or_else(|| self.pool.no_volume(&self.name))
    }

    /// Where it is.
    pub(super) fn path(&self) -> PathBuf {
        self.pool.target().join(&*self.name)
    }

    /// As the host's storage finds it: with what it stands on, as far as that is volumes.
    pub(super) fn at(&self) -> Result<VolumeAt> {
        let look = self.look()?;
        if look.has_data_file {
            return Err(self.refuse(DATA_FILE));
        }
        if let Some(why) = &look.broken {
            return Err(self.refuse(why));
        }
        let (mut below, mut next) = (Vec::new(), look.backing.clone());
        let mut noted = self.pool.noted_base(&look);
        while let Some(backing) = next {
            const DEEPEST: usize = 200;
            let outside = || self.refuse("what it stands on is no volume of an active pool, and is not followed");
            let place = backing.place.ok_or_else(outside)?;
            let (pool, name) = self.pool.pools.volume_at(&place).ok_or_else(outside)?;
            if noted.as_ref() != Some(&place) {
                let text = "nobody noted what it says to stand on, which is not followed: put a new volume on that (AddVolume \
                            with backing)";
                return Err(self.refuse(text));
            }
            let base = pool.find_volume(&name)?.look()?;
            if base.has_data_file || base.broken.is_some() || below.len() >= DEEPEST {
                return Err(self.refuse("something that it stands on cannot be used"));
            }
            noted = pool.noted_base(&base);
            below.push((place, base.format));
            next = base.backing;
        }
        Ok(VolumeAt { name: self.name.to_string(), id: look.id, format: look.format, capacity: look.capacity, below })
    }

    fn refuse(&self, why: &str) -> Error {
        Error::StorageFailed(format!("volume '{}' of pool '{}' cannot be used: {why}", self.name, self.pool.name))
    }

    pub(super) fn failed(&self, deed: &str, error: DriverError) -> Error {
        match error {
            DriverError::Exists(text) => Error::VolumeExists(format!("cannot {deed} volume '{}': {text}", self.name)),
            error => Error::from_driver_of(ObjectKind::Volume, &self.name, deed, error),
        }
    }

    /// Removes it. `force`: also where stored configurations name it; `with_snapshots`: also with snapshots in it.
    pub async fn delete(self, caller: &Caller, force: bool, with_snapshots: bool, departs: bool) -> Result<Ticket> {
        self.job(caller, &verb::VOLUME_DELETE, departs, move |volume, work| async move {
            work.holds(volume.alone("delete").await?);
            let users = volume.pool.users_now(&volume.name).await?;
            volume.refuse_to_delete(&users, force, with_snapshots).await?;
            let (open, at) = (volume.pool.opened()?, volume.only()?);
            open.delete(&at, work).await.map_err(|e| volume.failed("delete", e))?;
            let pool = volume.pool.clone();
            on_disk(move || pool.note(at.id, None)).await
        })
        .await
    }

    async fn refuse_to_delete(&self, users: &[User], force: bool, with_snapshots: bool) -> Result<()> {
        let counts = |user: &User| !force || user.how != Usage::Config;
        self.pool.refuse_used("delete", &self.name, Fate::Removed, users, counts).await?;
        let others = self.snapshots_of_it();
        if !others.is_empty() {
            let (name, others) = (&self.name, others.join(", "));
            let text = format!("cannot delete volume '{name}': it is the origin of {others}; delete those first");
            return Err(Error::InUse(text));
        }
        let look = self.look()?;
        if look.snapshots > 0 && !with_snapshots {
            let (count, name) = (look.snapshots, &self.name);
            let text = format!(
                "cannot delete volume '{name}': {count} snapshots are in it, which would go, too; say with-snapshots"
            );
            return Err(Error::OperationInvalid(text));
        }
        Ok(())
    }

    /// The volumes of its pool that would go with it, for people.
    fn snapshots_of_it(&self) -> Vec<String> {
        let state = lock(&self.pool.state);
        let these = state.volumes.iter().filter(|(_, row)| row.look.origin.as_deref() == Some(&*self.name));
        these.map(|(name, _)| ObjectKind::Volume.named(name)).collect()
    }

    /// What deleting it would meet.
    pub async fn check_delete(&self, caller: &Caller, force: bool, with_snapshots: bool) -> Result<StorageCheck> {
        frames::beside(self, caller, &verb::CHECK_VOLUME_DELETE, async {
            let (look, path) = (self.look()?, self.path());
            // Everybody may ask.
            let _place = self.pool.checks.take(&caller.uid).await;
            let (mut users, refusal) = match self.pool.users_now(&self.name).await {
                Ok(users) => {
                    let refusal = self.refuse_to_delete(&users, force, with_snapshots).await.err();
                    (users, refusal)
                }
                // Where it cannot be looked, the refusal says so.
                Err(error) => (self.pool.users_at(&path), Some(error)),
            };
            users.extend(self.shared().images.snapshot_users(&path).await);
            let broken = users.iter().filter(|user| matches!(user.how, Usage::Config | Usage::Snapshot));
            let breaks: BTreeSet<ObjectRef> = broken.map(|user| user.object.clone()).collect();
            let files = vec![(path.display().to_string(), "deleted", look.allocation)];
            let breaks = breaks.into_iter().collect();
            Ok(StorageCheck { refusal, users, breaks, files, frees: look.allocation, needs: 0 })
        })
        .await
    }

    /// Gives it another size.
    pub async fn resize(self, caller: &Caller, to: NewCapacity) -> Result<Ticket> {
        let by = caller.uid;
        self.job(caller, &verb::VOLUME_RESIZE, to.cancel_on_disconnect, move |volume, work| async move {
            if let Some(guest) = volume.shared().images.guest_on(&volume.path()).await {
                work.has_reserved(volume.reserve_more("resize", by, to.capacity)?);
                return volume.resize_through(guest, to, &work).await;
            }
            work.holds(volume.alone("resize").await?);
            volume.refuse_to_change("resize").await?;
            work.has_reserved(volume.reserve_more("resize", by, to.capacity)?);
            let size = NewSize { capacity: to.capacity, shrink: to.shrink, allocate: to.allocate };
            let resized = volume.pool.opened()?.resize(&volume.at()?, size, work).await;
            resized.map_err(|e| volume.failed("resize", e))
        })
        .await
    }

    /// Has the guest that runs on it resize it, which then sees that. A device is resized only while no guest has it: one that
    /// started again before what is new is blank would lose what it wrote there.
    async fn resize_through(&self, guest: GuestDisk, to: NewCapacity, work: &Arc<JobWork>) -> Result<()> {
        let (now, name, images) = (self.look()?.capacity, &self.name, &self.shared().images);
        let text = |why: &str| format!("cannot resize volume '{name}': {} runs on it, and {why}", guest.whose);
        if lock(&self.pool.state).volume_kind() == VolumeKind::Block {
            let why = "a volume that is a device is resized only while no guest has it; shut it down first";
            return Err(Error::InUse(text(why)));
        }
        let refuse = |why: &str| Err(Error::OperationInvalid(text(why)));
        if to.capacity < now {
            return refuse("would lose what is behind; shut it down first");
        }
        if to.allocate {
            return refuse(
                "blocks are taken for it only while nobody writes it; leave out allocate, or shut it down first",
            );
        }
        images.resize_through(&guest, to.capacity, work.cancelled()).await
    }

    /// Overwrites all that it holds.
    pub async fn wipe(self, caller: &Caller, how: Wiping, departs: bool) -> Result<Ticket> {
        self.job(caller, &verb::VOLUME_WIPE, departs, move |volume, work| async move {
            work.holds(volume.alone("wipe").await?);
            volume.refuse_to_change("wipe").await?;
            volume.refuse_to_lose_by_wiping()?;
            let (open, at) = (volume.pool.opened()?, volume.whole()?);
            let wiped = volume.overwritten(&at, &work, open.wipe(&at, how, work.clone())).await;
            wiped.map_err(|e| volume.failed("wipe", e))
        })
        .await
    }

    /// Has it hold what a client gives.
    pub async fn upload(
        self,
        caller: &Caller,
        from: GivenFile,
        part: Option<Part>,
        sparse: bool,
        departs: bool,
    ) -> Result<Ticket> {
        let by = caller.uid;
        self.job(caller, &verb::VOLUME_UPLOAD, departs, move |volume, work| async move {
            work.holds(volume.alone("overwrite").await?);
            volume.refuse_to_change("overwrite").await?;
            let open = volume.pool.opened()?;
            let in_place = part.is_some() || lock(&volume.pool.state).volume_kind() == VolumeKind::Block;
            let at = if in_place { volume.whole()? } else { volume.only()? };
            // How much is new is known when it has been read.
            work.has_reserved(volume.reserve_more("overwrite", by, 0)?);
            let upload = open.upload(&at, from, part, sparse, work.clone());
            let written = if in_place { volume.overwritten(&at, &work, upload).await } else { upload.await };
            written.map_err(|e| volume.failed("overwrite", e))?;
            if in_place { Ok(()) } else { volume.is_replaced(&at).await }
        })
        .await
    }

    /// Writes what it holds into what a client gives.
    pub async fn download(
        self,
        caller: &Caller,
        to: GivenFile,
        part: Option<Part>,
        sparse: bool,
        departs: bool,
    ) -> Result<Ticket> {
        let (volume, verb) = (Arc::new(self), &verb::VOLUME_DOWNLOAD);
        let owner = caller.uid;
        let begin = move |volume: Arc<Volume>, job| async move {
            volume.applies(verb)?;
            let work = JobWork::new(job, volume.pool.clone(), owner);
            work.holds(volume.kept("read").await?);
            volume.refuse_while_written("read").await?;
            Ok::<_, Error>((volume.pool.opened()?, volume.whole()?, work))
        };
        // It is kept as it is: who reads it need not keep others who do from their turn, for as long as a client likes.
        let read = move |volume: Arc<Volume>, _, (open, at, work): (Arc<dyn OpenPool>, VolumeAt, Arc<JobWork>)| async move {
            volume.is_busy(true);
            let read = open.download(&at, to, part, sparse, work.clone()).await;
            volume.ends(read.map_err(|e| volume.failed("read", e))).await
        };
        frames::accepted(&*volume, caller, verb, async {
            frames::allow(&*volume, caller, verb.action).await?;
            Ok(volume.opens_job(caller, verb, departs)?.run_beyond(begin, read))
        })
        .await
    }

    /// Has it alone until the result is dropped: nobody else works on its file, and no machine begins to write it. Who has it
    /// already is asked for afterwards.
    pub(super) async fn alone(&self, deed: &str) -> Result<Taken> {
        self.had_by(deed, format!("the work on volume '{}' ({deed}), which is under way,", self.name)).await
    }

    /// The same, and `whose` it is meanwhile, for people.
    pub(super) async fn had_by(&self, deed: &str, whose: String) -> Result<Taken> {
        let taken = self.shared().images.take(&self.path(), whose).await;
        taken.map_err(|by| Error::InUse(format!("cannot {deed} volume '{}': {by} has it", self.name)))
    }

    /// Keeps it as it is until the result is dropped, for who has another's turn: what is done to it is waited for.
    pub(super) async fn kept_for(&self, deed: &str) -> Result<Arc<Taken>> {
        let _turn = frames::take_turn(self, deed, &CancellationToken::new()).await?;
        self.kept(deed).await
    }

    /// The same for who has its turn. Others who read it keep it, too.
    pub(super) async fn kept(&self, deed: &str) -> Result<Arc<Taken>> {
        if let Some(kept) = lock(&self.pool.kept).get(&self.name).and_then(Weak::upgrade) {
            return Ok(kept);
        }
        let whose = format!("what reads volume '{}' (OpenNBD, Download, or what is just made of it)", self.name);
        let taken = Arc::new(self.had_by(deed, whose).await?);
        let mut kept = lock(&self.pool.kept);
        kept.retain(|_, kept| kept.strong_count() > 0);
        kept.insert(self.name.clone(), Arc::downgrade(&taken));
        Ok(taken)
    }

    /// Refuses to change it while a guest has it, or something stands on it.
    pub(super) async fn refuse_to_change(&self, deed: &str) -> Result<()> {
        let counts = |user: &User| user.how != Usage::Config;
        self.pool.refuse_in_use(deed, &self.name, Fate::Written, counts).await
    }

    /// Refuses to read it while somebody writes it: what is read would be of no one moment.
    pub(super) async fn refuse_while_written(&self, deed: &str) -> Result<()> {
        let open = self.pool.opened()?;
        let strangers = open.is_open_elsewhere(&self.name, false).await.map_err(|e| self.failed("look at", e))?;
        let mut writers = self.shared().images.writers_of(&self.path()).await;
        if strangers && writers.is_empty() {
            writers.push("another process (fuser tells which)".to_owned());
        }
        match writers.is_empty() {
            true => Ok(()),
            false => Err(Error::InUse(format!(
                "cannot {deed} volume '{}': it is written by {}",
                self.name,
                writers.join(", ")
            ))),
        }
    }

    /// The same without what it stands on, which then need be no volume.
    pub(super) fn only(&self) -> Result<VolumeAt> {
        let look = self.look()?;
        let below =
            look.backing.iter().filter_map(|backing| Some((backing.place.clone()?, backing.format.clone()?))).collect();
        Ok(VolumeAt { name: self.name.to_string(), id: look.id, format: look.format, capacity: look.capacity, below })
    }

    /// The same of one whose content is in its own file.
    fn whole(&self) -> Result<VolumeAt> {
        let look = self.look()?;
        if look.has_data_file {
            return Err(self.refuse(DATA_FILE));
        }
        let mut at = self.only()?;
        if look.broken.is_some() {
            // Somebody was killed while it was written, and its header may have gone.
            let noted = lock(&self.pool.state).noted.get(&at.id).map_or(0, |noted| noted.capacity);
            at.capacity = if noted > 0 { noted } else { at.capacity };
        }
        Ok(at)
    }

    /// Refuses to wipe what would not be the same afterwards, only empty.
    fn refuse_to_lose_by_wiping(&self) -> Result<()> {
        let look = self.look()?;
        let why = match () {
            () if look.backing.is_some() => {
                "it stands on another image, and what it shows is there: delete it, or flatten a clone"
            }
            () if look.snapshots > 0 => "snapshots are in it, which would go, too: delete it, or those first",
            () if look.encrypted && look.format == "qcow2" => "it is encrypted, and would not be any more: delete it",
            () => return Ok(()),
        };
        Err(Error::OperationInvalid(format!("cannot wipe volume '{}': {why}", self.name)))
    }

    /// Overwrites it in place. What is cut off then is noted first, and that is taken back when it is done, or when nothing was
    /// written.
    async fn overwritten(
        &self,
        at: &VolumeAt,
        work: &JobWork,
        writes: impl Future<Output = std::result::Result<(), DriverError>>,
    ) -> std::result::Result<(), DriverError> {
        let (before, owner) = {
            let state = lock(&self.pool.state);
            let owner = state.volumes.get(&self.name).map_or(0, |row| row.look.permissions.0);
            (state.noted.get(&at.id).cloned(), owner)
        };
        let note = async |noted: Option<Noted>| {
            let (pool, id) = (self.pool.clone(), at.id);
            let noted = on_disk(move || pool.note(id, noted)).await;
            noted.map_err(|e| DriverError::Storage(e.to_string()))
        };
        let noted =
            || before.clone().unwrap_or(Noted { format: at.format.clone(), owner, probed: true, ..Noted::default() });
        note(Some(Noted { incomplete: true, capacity: at.capacity, ..noted() })).await?;
        let written = writes.await;
        match &written {
            // What its header says is believed as before.
            Ok(()) => note(before.filter(|noted| !noted.probed).map(whole)).await?,
            Err(_) if !work.has_begun() => note(before).await?,
            Err(_) => {}
        }
        written
    }

    /// The file that it was is not needed any more, nor a secret for its sake.
    async fn is_replaced(&self, before: &VolumeAt) -> Result<()> {
        let noted = lock(&self.pool.state).noted.get(&before.id).filter(|noted| noted.secret.is_some()).cloned();
        let Some(noted) = noted else { return Ok(()) };
        let (pool, id) = (self.pool.clone(), before.id);
        on_disk(move || pool.note(id, Some(Noted { secret: None, ..noted }))).await
    }

    /// A secret with which it is being made is not forgotten meanwhile, until the result is dropped.
    pub(super) fn needs(self: &Arc<Self>, secret: Option<&str>) -> Needing {
        let what = secret.map(|named| Needed::Secret(SecretName::of_volume(named)));
        let needs: Vec<Need> = what.into_iter().map(|what| Need { what, place: "".into() }).collect();
        self.pool.shared.uses.are(self.reference(), &needs, &[]);
        Needing(self.clone())
    }

    /// Looks at it anew, as far as that can be done.
    pub(super) async fn is_looked_at(&self) {
        if let Err(error) = self.pool.look_at(vec![self.name.to_string()]).await {
            tracing::warn!(uuid = %self.pool.uuid, volume = &*self.name, %error, "a volume cannot be looked at");
        }
    }

    /// Begins a job: permission, the state, the record. While it is done the volume is busy, and then it is looked at.
    pub(super) async fn job<F>(
        self,
        caller: &Caller,
        verb: &'static Verb,
        departs: bool,
        work: impl FnOnce(Arc<Volume>, Arc<JobWork>) -> F + Send + 'static,
    ) -> Result<Ticket>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let volume = Arc::new(self);
        frames::accepted(&*volume, caller, verb, async {
            frames::allow(&*volume, caller, verb.action).await?;
            volume.begin(caller, verb, departs, work)
        })
        .await
    }

    /// The same where permission has been asked.
    pub(super) fn begin<F>(
        self: &Arc<Self>,
        caller: &Caller,
        verb: &'static Verb,
        departs: bool,
        work: impl FnOnce(Arc<Volume>, Arc<JobWork>) -> F + Send + 'static,
    ) -> Result<Ticket>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let owner = caller.uid;
        Ok(self.opens_job(caller, verb, departs)?.run(move |volume, job| async move {
            volume.applies(verb)?;
            let told = JobWork::new(job, volume.pool.clone(), owner);
            volume.is_busy(true);
            let done = work(volume.clone(), told.clone()).await;
            volume.ends(done).await
        }))
    }

    fn opens_job(
        self: &Arc<Self>,
        caller: &Caller,
        verb: &'static Verb,
        departs: bool,
    ) -> Result<frames::OpenJob<Volume>> {
        let change = frames::change(self, caller, verb);
        if change.has_turn() {
            self.applies(verb)?;
        }
        change.open(departs)
    }

    /// A job has done its work. What is done is done, whether it can be looked at or not.
    async fn ends(&self, done: Result<()>) -> Result<()> {
        self.is_looked_at().await;
        self.is_busy(false);
        done
    }

    fn is_busy(&self, busy: bool) {
        let touched = [self.name.clone()].into();
        let count = |jobs: usize| if busy { jobs + 1 } else { jobs.saturating_sub(1) };
        self.pool.commit_volumes(Vec::new(), touched, |state| {
            state.volumes.get_mut(&self.name).into_iter().for_each(|row| row.jobs = count(row.jobs));
        });
    }

    /// Refuses to read images that a guest writes: what is read would be of no one moment.
    pub(super) async fn refuse_written(&self, deed: &str, files: &[PathBuf]) -> Result<()> {
        for file in files {
            let writers = self.shared().images.writers_of(file).await;
            if !writers.is_empty() {
                let (name, file, writers) = (&self.name, file.display(), writers.join(", "));
                return Err(Error::InUse(format!("cannot {deed} volume '{name}': {file} is written by {writers}")));
            }
        }
        Ok(())
    }

    /// What it stands on; who reads it through that may read each of these, too.
    pub(super) async fn below_for(&self, caller: &Caller) -> Result<Vec<PathBuf>> {
        let below: Vec<PathBuf> = self.at()?.below.into_iter().map(|(path, _)| path).collect();
        for path in &below {
            let (pool, name) = self.pool.pools.volume_at(path).ok_or_else(|| self.changed_below())?;
            frames::allow(&pool.find_volume(&name)?, caller, Action::VolumeContent).await?;
        }
        Ok(below)
    }

    /// Refuses when it stands on something else than what was asked about.
    pub(super) fn still_on(&self, below: &[PathBuf]) -> Result<()> {
        match self.at()?.below.iter().map(|(path, _)| path).eq(below) {
            true => Ok(()),
            false => Err(self.changed_below()),
        }
    }

    fn changed_below(&self) -> Error {
        Error::OperationInvalid(format!("volume '{}' stands on something else by now; try again", self.name))
    }

    /// What it is open for, to be copied.
    pub(super) async fn opened(&self) -> Result<GivenFile> {
        let open: Arc<dyn OpenPool> = self.pool.opened()?;
        open.hold(&self.whole()?).await.map_err(|e| self.failed("read", e))
    }
}

/// What is noted of a file of which nothing is cut off.
fn whole(noted: Noted) -> Noted {
    Noted { incomplete: false, capacity: 0, ..noted }
}

/// A volume needs a secret for as long as this is there.
pub(super) struct Needing(Arc<Volume>);

impl Drop for Needing {
    fn drop(&mut self) {
        self.0.pool.shared.uses.are(self.0.reference(), &[], &[]);
    }
}

/// How documents name a secret.
fn reference_to(secret: &NotedSecret) -> SecretRef {
    let kind = Some(SecretKind::Passphrase);
    match SecretName::of_volume(&secret.named) {
        SecretName::Uuid(uuid) => SecretRef { kind, uuid: Some(uuid), ..SecretRef::default() },
        SecretName::Usage(_, usage) => SecretRef { kind, usage: Some(usage.into()), ..SecretRef::default() },
    }
}

/// The document of a volume that is there.
fn document(kind: VolumeKind, look: &VolumeLook, path: &Path, secret: Option<&NotedSecret>) -> VolumeDef {
    let format = |name: &str| Some(FormatDoc { kind: name.to_owned(), ..FormatDoc::default() });
    let (owner, group, mode) = look.permissions;
    let permissions = Permissions {
        mode: Some(FileMode(mode)),
        owner: Some(owner.into()),
        group: Some(group.into()),
        ..Permissions::default()
    };
    let text = path.display().to_string();
    let encryption = look.encrypted.then(|| Encryption {
        format: EncryptionFormat::Luks,
        secrets: secret.map(reference_to).into_iter().collect(),
        ..Encryption::default()
    });
    let target = VolumeTarget {
        path: Some(text.clone()),
        // As in libvirt's documents: what is encrypted by LUKS alone is raw.
        format: format(if look.format == "luks" { "raw" } else { &look.format }),
        permissions: Some(permissions),
        encryption,
        ..VolumeTarget::default()
    };
    let backing = look.backing.as_ref().map(|backing| VolumeBacking {
        path: Some(backing.place.as_ref().map_or_else(|| backing.text.clone(), |place| place.display().to_string())),
        format: backing.format.as_deref().and_then(format),
        ..VolumeBacking::default()
    });
    VolumeDef {
        kind: Some(kind),
        name: look.name.clone(),
        key: look.key.clone().or(Some(text)),
        capacity: Some(Bytes(look.capacity)),
        allocation: Some(Bytes(look.allocation)),
        physical: Some(Bytes(look.physical)),
        target: Some(target),
        backing,
        ..VolumeDef::default()
    }
}
