//! Who stands on which image, over all machines: what runs, what is stored, and what each snapshot froze. Whoever is about to
//! write an image, or to remove it, asks here first.
//!
//! Two paths are one file if they are the same text, or were last seen to lead to one inode. A file system that does not answer
//! costs its own machine this second comparison, and nobody else anything.

use crate::error::{Error, Result};
use crate::lock::lock;
use crate::object::{ObjectKind, ObjectRef, Usage, User};
use crate::volumes::by_name;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use uuid::Uuid;
use virt_model::device::Disk;
use virt_model::device::disk::{BackingStore, DiskDevice, StoreFormat};
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::DiskMode;
use virt_model::snapshot::SnapshotDef;
use virt_model::xml::Finding;

/// How long paths may take to tell which files they are.
const LOOK: Duration = Duration::from_secs(2);
/// Threads that may wait at a time for folders that do not answer.
const LOOKS: usize = 64;
/// How many of them look for one who asks.
const THREADS: usize = 4;

/// What to do about a disk that others stand on.
pub(crate) const FROZEN: &str = "put an overlay of its own on it (qemu-img create -b), name what the machine stood on last, or \
    revert to or delete the snapshot";

/// A chain of images that somebody needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    /// The machine; nil where it is none.
    pub domain: Uuid,
    /// Who, for people: `domain 'web' (disk 'vda')`.
    pub whose: String,
    /// From the topmost image down.
    pub files: Vec<PathBuf>,
    /// What it is needed for.
    pub kind: ChainKind,
}

/// What a chain is needed for: by that it is known which of its images must stay as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ChainKind {
    /// It is a machine's disk, of which the topmost image may be written.
    Disk,
    /// It is a disk that a guest which runs only reads.
    ReadDisk,
    /// A block copy writes it, which is in no configuration.
    Copy,
    /// A snapshot needs what is below its topmost image, and that image, too, if it is `frozen`.
    Snapshot { name: Arc<str>, frozen: bool },
    /// It is a volume and what that was put on.
    Volume,
    /// A machine is about to have this one image.
    Begun,
}

impl Chain {
    /// Of a volume that was put on another.
    pub fn of_volume(whose: String, file: PathBuf, base: PathBuf) -> Chain {
        Chain { domain: Uuid::nil(), whose, files: vec![file, base], kind: ChainKind::Volume }
    }

    /// The first of its images that must stay as it is, and with it all below.
    fn fixed(&self) -> usize {
        match self.kind {
            ChainKind::Disk | ChainKind::Volume | ChainKind::Snapshot { frozen: false, .. } => 1,
            ChainKind::ReadDisk | ChainKind::Copy | ChainKind::Begun | ChainKind::Snapshot { frozen: true, .. } => 0,
        }
    }

    /// The first of its images that it cannot do without if this becomes of them.
    fn needed(&self, fate: Fate) -> usize {
        match (fate, &self.kind) {
            // A volume may be removed with all that needs it.
            (Fate::Written, _) | (Fate::Removed, ChainKind::Volume) => self.fixed(),
            (Fate::Removed, _) => 0,
        }
    }

    /// The snapshot that needs it, if that is one.
    pub fn snapshot(&self) -> Option<&Arc<str>> {
        match &self.kind {
            ChainKind::Snapshot { name, .. } => Some(name),
            _ => None,
        }
    }
}

/// The images of a disk: what is asked of all machines' disks, without the rest of their configurations.
#[derive(Clone, Debug)]
pub(crate) struct DiskImages {
    /// The disk's target, e.g. `vda`.
    pub target: Box<str>,
    /// From the topmost image down. That of a volume may be known by its name alone (`volumes::by_name`).
    pub files: Box<[PathBuf]>,
}

/// What is to become of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is written.
    Written,
    /// It is removed.
    Removed,
}

/// All machines of this host, as far as their images are concerned.
pub(crate) trait Machines: Send + Sync {
    /// The chains that they need, but for those of the machine `except`: what runs, what is stored, and snapshots.
    fn chains(&self, except: Option<Uuid>) -> Vec<Chain>;

    /// Of them those of guests that run.
    fn running_chains(&self) -> Vec<Chain>;

    /// The overlays that snapshots have laid on disks.
    fn overlays(&self) -> Vec<Overlay>;

    /// What a machine is called today.
    fn name_of(&self, machine: Uuid) -> Option<String>;
}

/// See the module.
pub(crate) struct Images {
    machines: Arc<dyn Machines>,
    /// Which files paths lead to, as last seen.
    files: Mutex<HashMap<PathBuf, FileNumber>>,
    /// Paths at which somebody looks.
    looking: Mutex<HashSet<PathBuf>>,
    looks: Arc<Semaphore>,
    /// Files that are about to be written by what is under way, and by what.
    taken: Mutex<Vec<(PathBuf, String)>>,
    /// Images that machines are about to have, and do not show yet.
    begun: Mutex<Vec<Arc<Begun>>>,
    /// What others than machines need of images.
    others: OnceLock<Box<dyn Fn() -> Vec<Chain> + Send + Sync>>,
}

/// A file by its file system and its number there.
type FileNumber = (u64, u64);

/// Images that a machine is about to have, and which machine.
type Begun = (Vec<PathBuf>, String);

/// While this lives a machine is about to have some images.
pub(crate) struct Begins(Arc<Images>, Arc<Begun>);

impl Drop for Begins {
    fn drop(&mut self) {
        lock(&self.0.begun).retain(|begun| !Arc::ptr_eq(begun, &self.1));
    }
}

/// A file that nobody else writes while this lives, and which it was.
pub(crate) struct Taken(Arc<Images>, PathBuf, Option<FileNumber>);

impl Drop for Taken {
    fn drop(&mut self) {
        // By now it may be another file, or none.
        self.0.forget(&self.1, self.2);
        lock(&self.0.taken).retain(|(file, _)| *file != self.1);
    }
}

impl Images {
    pub fn of(machines: Arc<dyn Machines>) -> Arc<Images> {
        let looks = Arc::new(Semaphore::new(LOOKS));
        let (files, looking) = (Mutex::default(), Mutex::default());
        let (taken, begun) = (Mutex::default(), Mutex::default());
        Arc::new(Images { machines, files, looking, looks, taken, begun, others: OnceLock::new() })
    }

    /// Who uses something, for people: `domain 'web' (vda, live)`.
    pub fn called(&self, user: &User) -> String {
        let named = user.object.uuid().map(|uuid| {
            let name = self.machines.name_of(uuid);
            ObjectKind::Domain.named(&name.unwrap_or_else(|| uuid.to_string()))
        });
        let who = named.unwrap_or_else(|| "another process".to_owned());
        match &*user.place {
            "" => format!("{who} ({})", user.how),
            place => format!("{who} ({place}, {})", user.how),
        }
    }

    /// Takes a file, which need not be there, to write it: until the result is dropped `whose` is named to whoever else would take
    /// it, or start a machine on it. Error: whose it is already.
    pub async fn take(self: &Arc<Self>, file: &Path, whose: String) -> Result<Taken, String> {
        let folder = file.parent().unwrap_or(file);
        self.look(HashSet::new(), &[file.to_owned(), folder.to_owned()]).await;
        let mut taken = lock(&self.taken);
        if let Some((_, whose)) = taken.iter().find(|(other, _)| self.same_place(other, file)) {
            return Err(whose.clone());
        }
        taken.push((file.to_owned(), whose));
        let number = lock(&self.files).get(file).copied();
        Ok(Taken(self.clone(), file.to_owned(), number))
    }

    /// From now on these chains, which are no machines', are asked for, too. To be called once.
    pub fn also(&self, chains: impl Fn() -> Vec<Chain> + Send + Sync + 'static) {
        _ = self.others.set(Box::new(chains));
    }

    /// A machine is about to have these images, until the result is dropped. To be called before it is asked who needs them, as
    /// who [takes](Images::take) one asks afterwards: of two that begin at once one sees the other.
    pub fn begins(self: &Arc<Self>, files: Vec<PathBuf>, whose: String) -> Begins {
        let begun = Arc::new((files, whose));
        lock(&self.begun).push(begun.clone());
        Begins(self.clone(), begun)
    }

    /// Refuses a file, which need not be there, that would be in or below one of these folders of virtd's own, by whatever name: it
    /// would take the place of what is kept there.
    pub async fn refuse_below(self: &Arc<Self>, file: &Path, folders: &[PathBuf]) -> Result<()> {
        let above: Vec<&Path> = file.ancestors().skip(1).collect();
        let named = above.iter().map(|folder| folder.to_path_buf());
        self.look(HashSet::new(), &named.chain(folders.iter().cloned()).collect::<Vec<_>>()).await;
        let same = |folder: &&PathBuf| above.iter().any(|above| self.same(above, folder));
        match folders.iter().find(same) {
            None => Ok(()),
            Some(folder) => Err(Error::InvalidArgument(format!(
                "{}: {} is virtd's own folder; choose a file elsewhere, or let virtd keep it there (ManagedSave)",
                file.display(),
                folder.display()
            ))),
        }
    }

    /// Which of `these` are one of `files`, by whatever name.
    pub async fn among(self: &Arc<Self>, these: &[PathBuf], files: &[PathBuf]) -> HashSet<PathBuf> {
        self.look(HashSet::new(), &[these, files].concat()).await;
        let is_one = |one: &&PathBuf| files.iter().any(|file| self.same(one, file));
        these.iter().filter(is_one).cloned().collect()
    }

    /// Whether two paths are one file, or one name in one folder.
    fn same_place(&self, one: &Path, other: &Path) -> bool {
        let folders = || one.parent().zip(other.parent()).is_some_and(|(one, other)| self.same(one, other));
        self.same(one, other) || one.file_name() == other.file_name() && folders()
    }

    /// Looks where paths lead that have not been looked at, and anew at `afresh`. A folder that does not answer keeps its own
    /// thread, and what is in other folders is looked at all the same.
    async fn look(self: &Arc<Self>, known: HashSet<PathBuf>, afresh: &[PathBuf]) {
        let new: Vec<PathBuf> = {
            let files = lock(&self.files);
            known.into_iter().filter(|path| !files.contains_key(path)).collect()
        };
        // What it is asked for comes first.
        let folders = by_folder(afresh.to_vec()).chain(by_folder(new)).collect::<VecDeque<_>>();
        let threads = folders.len().min(THREADS);
        let folders = Arc::new(Mutex::new(folders));
        let mut looks = JoinSet::new();
        for _ in 0..threads {
            let Ok(permit) = self.looks.clone().try_acquire_owned() else { break };
            let (images, folders) = (self.clone(), folders.clone());
            looks.spawn_blocking(move || {
                let _permit = permit;
                loop {
                    let Some(paths) = lock(&folders).pop_front() else { return };
                    paths.into_iter().for_each(|path| images.look_at(path));
                }
            });
        }
        let all = async { while looks.join_next().await.is_some() {} };
        _ = tokio::time::timeout(LOOK, all).await;
        looks.detach_all();
    }

    /// Looks where a path leads; one that somebody waits for is left to them, and leads where it did. Blocks.
    fn look_at(&self, path: PathBuf) {
        if !lock(&self.looking).insert(path.clone()) {
            return;
        }
        #[allow(clippy::disallowed_methods, reason = "in one of few threads, which may be left behind")]
        let found = std::fs::metadata(&path).ok().map(|data| (data.dev(), data.ino()));
        match found {
            Some(found) => _ = lock(&self.files).insert(path.clone(), found),
            None => _ = lock(&self.files).remove(&path),
        }
        lock(&self.looking).remove(&path);
    }

    /// Where a path led, and what it led to: the file may be gone, and its number another's.
    fn forget(&self, path: &Path, was: Option<FileNumber>) {
        let mut files = lock(&self.files);
        let is = files.get(path).copied();
        files.retain(|known, at| known != path && Some(*at) != was && Some(*at) != is);
    }

    /// Whether two paths are one file, as far as it is known.
    fn same(&self, one: &Path, other: &Path) -> bool {
        let files = lock(&self.files);
        one == other || files.get(one).is_some_and(|one| Some(one) == files.get(other))
    }
}

/// The paths of each folder together.
fn by_folder(paths: Vec<PathBuf>) -> impl Iterator<Item = Vec<PathBuf>> {
    let mut folders: BTreeMap<PathBuf, Vec<PathBuf>> = BTreeMap::new();
    for path in paths {
        folders.entry(path.parent().unwrap_or(&path).to_owned()).or_default().push(path);
    }
    folders.into_values()
}

impl Images {
    /// Who needs these files as they are, each file with everybody. `except`: a machine that has asked itself.
    pub async fn users_of(
        self: &Arc<Self>,
        files: &[PathBuf],
        fate: Fate,
        except: Option<Uuid>,
    ) -> BTreeMap<PathBuf, Vec<String>> {
        if files.is_empty() {
            return BTreeMap::new();
        }
        let chains = self.all_chains(except);
        let having = self.having(&chains, files, |chain| chain.needed(fate)).await;
        let mut users: BTreeMap<PathBuf, Vec<String>> =
            having.into_iter().map(|(file, chains)| (file, each_once(chains))).collect();
        if fate == Fate::Written {
            for (taken, whose) in lock(&self.taken).iter() {
                for file in files.iter().filter(|file| self.same_place(taken, file)) {
                    users.entry(file.clone()).or_default().push(whose.clone());
                }
            }
        }
        users
    }

    /// Refuses to change files that somebody needs as they are. `deed` begins the sentence: `cannot start domain 'web'`.
    pub async fn refuse_in_use(
        self: &Arc<Self>,
        deed: &str,
        files: &[PathBuf],
        fate: Fate,
        except: Option<Uuid>,
        remedy: &str,
    ) -> Result<()> {
        match self.users_of(files, fate, except).await.into_iter().next() {
            None => Ok(()),
            Some((file, users)) => {
                let (file, users) = (file.display(), users.join(", "));
                Err(Error::InUse(format!("{deed}: {file} is what {users} stands on; {remedy}")))
            }
        }
    }

    /// Refuses to change files that are in one of the chains that count, wherever they are in it. What volumes stand on counts, but
    /// where both are layers of `own`.
    pub async fn refuse_in_chains(
        self: &Arc<Self>,
        deed: &str,
        files: &[PathBuf],
        own: &[PathBuf],
        counts: impl Fn(&Chain) -> bool + Send,
        remedy: &str,
    ) -> Result<()> {
        let mut chains = self.all_chains(None);
        chains.retain(counts);
        let having = self.having(&chains, files, |_| 0).await;
        let is_own = |chain: &Chain| {
            let mut pairs = own.windows(2);
            chain.kind == ChainKind::Volume
                && pairs.any(|pair| chain.files.iter().zip(pair).all(|(one, own)| self.same(one, own)))
        };
        let users = each_once(having.into_values().flatten().filter(|chain| !is_own(chain)));
        match users.is_empty() {
            true => Ok(()),
            false => Err(Error::InUse(format!("{deed}: {} needs its layers as they are; {remedy}", users.join(", ")))),
        }
    }

    /// Who stands on a file: for people, each once. To be [written](Fate::Written) it must be what nobody stands on; to be
    /// [removed](Fate::Removed) it must be in no chain of a snapshot, and below no volume.
    pub async fn who_stands_on(self: &Arc<Self>, file: &Path, fate: Fate) -> Vec<String> {
        let mut chains = self.all_chains(None);
        if fate == Fate::Removed {
            chains.retain(|chain| chain.snapshot().is_some() || chain.kind == ChainKind::Volume);
        }
        self.holders(&chains, file, |chain| chain.needed(fate)).await
    }

    /// The snapshots that could not be reverted to without a file.
    pub async fn snapshot_users(self: &Arc<Self>, file: &Path) -> BTreeSet<User> {
        let mut chains = self.machines.chains(None);
        chains.retain(|chain| chain.snapshot().is_some());
        let having = self.having(&chains, &[file.to_owned()], |_| 0).await;
        let users = having.into_values().flatten().filter_map(|chain| {
            let object = ObjectRef::Snapshot(chain.domain, chain.snapshot()?.clone());
            Some(User { object, place: String::new(), how: Usage::Snapshot })
        });
        users.collect()
    }

    /// The machines that have a file among their images, by whatever name: for people, each once. `running`: those alone that
    /// run, or begin to, or write it.
    pub async fn machines_on(self: &Arc<Self>, file: &Path, running: bool) -> Vec<String> {
        let mut chains = self.begun_chains();
        chains.extend(self.machines.running_chains());
        let others = self.machines.chains(None).into_iter().filter(|chain| chain.snapshot().is_none());
        chains.extend(others.filter(|chain| !running || chain.kind == ChainKind::Copy));
        self.holders(&chains, file, |_| 0).await
    }

    /// The guests that write a file, by whatever name, or begin to: for people, each once.
    pub async fn writers_of(self: &Arc<Self>, file: &Path) -> Vec<String> {
        let mut chains = self.begun_chains();
        let mut running = self.machines.running_chains();
        running.iter_mut().for_each(|chain| chain.files.truncate(chain.fixed()));
        chains.append(&mut running);
        chains.extend(self.machines.chains(None).into_iter().filter(|chain| chain.kind == ChainKind::Copy));
        self.holders(&chains, file, |_| 0).await
    }

    /// First these are asked, then those that show what they have: in between they become such.
    fn begun_chains(&self) -> Vec<Chain> {
        let begun = lock(&self.begun);
        let files = begun.iter().flat_map(|begun| begun.0.iter().map(move |file| (begun.1.clone(), file.clone())));
        let chain = |(whose, file)| Chain { domain: Uuid::nil(), whose, files: vec![file], kind: ChainKind::Begun };
        files.map(chain).collect()
    }

    /// All chains that are needed: machines', but for those of the machine `except`, and others'.
    fn all_chains(&self, except: Option<Uuid>) -> Vec<Chain> {
        let mut chains = self.machines.chains(except);
        chains.extend(self.others.get().into_iter().flat_map(|others| others()));
        chains
    }

    /// The chains that have one of these files, by whatever name, from the layer on that `first` says: by the file.
    async fn having<'a>(
        self: &Arc<Self>,
        chains: &'a [Chain],
        files: &[PathBuf],
        first: impl Fn(&Chain) -> usize + Send,
    ) -> BTreeMap<PathBuf, Vec<&'a Chain>> {
        let known = chains.iter().flat_map(|chain| chain.files.iter().cloned()).collect();
        self.look(known, files).await;
        // By another name that was looked at before now; what had that number may have gone since.
        let is_stale = |one: &&PathBuf| files.iter().any(|file| *one != file && self.same(one, file));
        let stale: BTreeSet<&PathBuf> = chains.iter().flat_map(|chain| &chain.files).filter(is_stale).collect();
        if !stale.is_empty() {
            self.look(HashSet::new(), &stale.into_iter().cloned().collect::<Vec<_>>()).await;
        }
        let mut having: BTreeMap<PathBuf, Vec<&'a Chain>> = BTreeMap::new();
        for file in files {
            let has = |chain: &&Chain| chain.files.iter().skip(first(chain)).any(|one| self.same(one, file));
            let chains: Vec<&Chain> = chains.iter().filter(has).collect();
            if !chains.is_empty() {
                having.insert(file.clone(), chains);
            }
        }
        having
    }

    /// Whose chains have a file: for people, each once.
    async fn holders(
        self: &Arc<Self>,
        chains: &[Chain],
        file: &Path,
        first: impl Fn(&Chain) -> usize + Send,
    ) -> Vec<String> {
        each_once(self.having(chains, &[file.to_owned()], first).await.into_values().flatten())
    }

    /// What an image tool or a hypervisor says of an image that is locked, with the disk that it is, among the chains of whoever
    /// was told so, and the machine that has it open. Looks at no file.
    pub fn with_owner_of_lock(&self, own: impl Fn() -> Vec<Chain>, error: DriverError) -> DriverError {
        let told = |text: String| {
            let Some(image) = locked_image(&text).map(PathBuf::from) else { return text };
            let holds = |chain: &Chain| chain.files.iter().any(|file| self.same(file, &image));
            let disk =
                own().into_iter().find(holds).map(|chain| format!("{} is of {}, and ", image.display(), chain.whose));
            let running = self.machines.running_chains().into_iter();
            let owners: Vec<String> = running.filter(holds).map(|chain| chain.whose).collect();
            let owner = match owners.is_empty() {
                true => "another program has it open (fuser tells which)".to_owned(),
                false => format!("{} has it open", owners.join(", ")),
            };
            format!("{text}; {}{owner}", disk.unwrap_or_default())
        };
        match error {
            DriverError::Storage(text) => DriverError::Storage(told(text)),
            DriverError::Hypervisor(text) => DriverError::Hypervisor(told(text)),
            other => other,
        }
    }

    /// The disks of a configuration that would be written though somebody needs them as they are: it can be stored, and not
    /// be started.
    pub async fn frozen_in(self: &Arc<Self>, def: &DomainDef) -> Vec<Finding> {
        let mut findings = Vec::new();
        let users = self.users_of(&written_by(def), Fate::Written, None).await;
        for disk in def.devices.disks.iter().filter(|disk| is_written(disk)) {
            if let Some((path, users)) = disk.path().and_then(|path| Some((path, users.get(Path::new(path))?))) {
                let text = format!("{path} is what {} stands on, and cannot be written: {FROZEN}", users.join(", "));
                findings.push(Finding::unsupported(&disk.at, text));
            }
        }
        findings
    }

    /// Writes down, below disks whose document ends sooner, what snapshots have recorded that their overlays stand on.
    pub fn declare(&self, def: &mut Arc<DomainDef>) {
        if def.devices.disks.iter().any(is_open_ended) {
            declare_in(def, &self.recorded());
        }
    }

    /// The overlays that all machines' snapshots have laid on their disks.
    pub fn recorded(&self) -> Vec<Overlay> {
        self.machines.overlays()
    }
}

/// Whose chains these are, each once.
fn each_once<'a>(chains: impl IntoIterator<Item = &'a Chain>) -> Vec<String> {
    let mut users: Vec<String> = Vec::new();
    for chain in chains {
        if !users.contains(&chain.whose) {
            users.push(chain.whose.clone());
        }
    }
    users
}

/// The image of which QEMU or its tools say that it is locked.
fn locked_image(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once("using the image [")?;
    rest.split_once("]?").map(|(image, _)| image)
}

/// An overlay that was made for a snapshot, and what it was laid on.
#[derive(Clone, Debug)]
pub(crate) struct Overlay {
    file: PathBuf,
    on: BackingStore,
}

/// The same as [`Images::declare`] where the records have been gathered.
pub(crate) fn declare_in(def: &mut Arc<DomainDef>, recorded: &[Overlay]) {
    for index in 0..def.devices.disks.len() {
        let disk = &def.devices.disks[index];
        if !is_open_ended(disk) {
            continue;
        }
        let mut declared = disk.clone();
        declare(&mut declared, recorded);
        // Only then is it another definition than the one that others share.
        if declared.backing != disk.backing {
            Arc::make_mut(def).devices.disks[index] = declared;
        }
    }
}

/// Whether nothing says where the chain of a disk ends.
fn is_open_ended(disk: &Disk) -> bool {
    if disk.is_empty() {
        return false;
    }
    let mut layer = disk.backing.as_deref();
    while let Some(store) = layer {
        if store.is_end() {
            return false;
        }
        layer = store.backing.as_deref();
    }
    true
}

/// Adds to a disk's chain what is recorded below its last layer, and below that.
fn declare(disk: &mut Disk, recorded: &[Overlay]) {
    let Some(mut last) = disk.path().map(PathBuf::from) else { return };
    let mut seen = HashSet::new();
    let mut end = &mut disk.backing;
    loop {
        if end.is_none() {
            let found = recorded.iter().find(|overlay| overlay.file == last && seen.insert(last.clone()));
            let Some(found) = found else { return };
            *end = Some(Box::new(found.on.clone()));
        }
        let Some(store) = end else { return };
        let Some(path) = store.path() else { return };
        last = path.into();
        end = &mut store.backing;
    }
}

/// The images that a guest with this configuration writes.
pub(crate) fn written_by(def: &DomainDef) -> Vec<PathBuf> {
    written_of(def, |_| true)
}

/// Those of them that are of these disks.
pub(crate) fn written_of(def: &DomainDef, is_meant: impl Fn(&Disk) -> bool) -> Vec<PathBuf> {
    let written = def.devices.disks.iter().filter(|disk| is_meant(disk) && is_written(disk));
    written.filter_map(|disk| disk.path().map(PathBuf::from)).collect()
}

fn is_written(disk: &Disk) -> bool {
    !disk.readonly && disk.transient.is_none() && disk.device() != DiskDevice::Cdrom
}

/// The images of each disk of a configuration that has any.
pub(crate) fn images_of(def: &DomainDef) -> impl Iterator<Item = DiskImages> {
    let disks = def.devices.disks.iter();
    let images = disks.map(|disk| {
        // Of a volume whose place is not said its name stands for it.
        let named = disk.volume().filter(|_| disk.path().is_none()).map(|(pool, volume)| by_name(pool, volume));
        let files = named.into_iter().chain(disk.files()).collect();
        DiskImages { target: (*disk.target.dev).into(), files }
    });
    images.filter(|disk| !disk.files.is_empty())
}

/// The chain of a disk; `whose` says whose it is.
pub(crate) fn chains_of(domain: Uuid, whose: &str, disk: &DiskImages, into: &mut Vec<Chain>) {
    let whose = format!("{whose} (disk '{}')", disk.target);
    if !into.iter().any(|chain| chain.whose == whose && *chain.files == *disk.files) {
        into.push(Chain { domain, whose, files: disk.files.to_vec(), kind: ChainKind::Disk });
    }
}

/// The chains that a snapshot needs: what it froze, and what lies below an image that holds it.
pub(crate) fn chains_of_snapshot(domain: Uuid, name: &str, def: &SnapshotDef, into: &mut Vec<Chain>) {
    for (disk, mode) in parts(def) {
        let frozen = match mode {
            // A merge that has begun makes the frozen file the machine's own again, wherever the rest of it stands.
            DiskMode::External { .. } if def.merging.contains(&disk.target.dev) => false,
            DiskMode::External { .. } | DiskMode::Remote { .. } => true,
            DiskMode::Internal => false,
            DiskMode::No | DiskMode::Manual => continue,
        };
        let whose = format!("snapshot '{}' of domain '{name}' (disk '{}')", def.name, disk.target.dev);
        let kind = ChainKind::Snapshot { name: (*def.name).into(), frozen };
        into.push(Chain { domain, whose, files: disk.files(), kind });
    }
}

/// The overlays that a snapshot laid on its disks.
pub(crate) fn overlays_of(def: &SnapshotDef, into: &mut Vec<Overlay>) {
    for (disk, mode) in parts(def) {
        let DiskMode::External { path, .. } = mode else { continue };
        let format = disk.meant_format().to_owned();
        let on = BackingStore {
            kind: Some(disk.kind()),
            format: Some(StoreFormat { name: format, ..StoreFormat::default() }),
            source: disk.frozen_source(),
            backing: disk.backing.clone(),
            ..BackingStore::default()
        };
        into.push(Overlay { file: path.clone(), on });
    }
}

/// A snapshot's disks, each with how it took part.
fn parts(def: &SnapshotDef) -> impl Iterator<Item = (&Disk, &DiskMode)> {
    let disks = def.domain.iter().flat_map(|domain| &domain.devices.disks);
    disks.filter_map(|disk| Some((disk, &def.disks.iter().find(|part| part.target == disk.target.dev)?.mode)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(xml: &str) -> Disk {
        let xml = format!(
            "<domain type='test'><name>a</name><uuid>6f1c0d5e-6b1f-4c57-9c0e-0d0c3e6f9c01</uuid><memory>1</memory>\
             <os><type>hvm</type></os><devices><disk>{xml}<target dev='vda'/></disk></devices></domain>"
        );
        DomainDef::parse(&xml).unwrap().devices.disks.remove(0)
    }

    fn overlay(file: &str, on: &str) -> Overlay {
        let mut laid = disk(&format!("<driver type='qcow2'/><source file='{on}'/>"));
        laid.stand_on(Path::new(file), false, "qcow2");
        let mut on = *laid.backing.unwrap();
        on.backing = None;
        Overlay { file: file.into(), on }
    }

    /// Machines with these chains, none of which runs.
    struct Stored(Vec<Chain>);

    impl Machines for Stored {
        fn chains(&self, _: Option<Uuid>) -> Vec<Chain> {
            self.0.clone()
        }

        fn running_chains(&self) -> Vec<Chain> {
            Vec::new()
        }

        fn overlays(&self) -> Vec<Overlay> {
            Vec::new()
        }

        fn name_of(&self, _: Uuid) -> Option<String> {
            None
        }
    }

    fn of_machine(whose: &str, files: &[&Path]) -> Chain {
        let files = files.iter().map(|file| file.to_path_buf()).collect();
        Chain { domain: Uuid::from_u128(1), whose: whose.to_owned(), files, kind: ChainKind::Disk }
    }

    #[tokio::test]
    async fn a_base_of_other_volumes_is_not_committed_into_and_what_stands_on_it_is_told() {
        let [a, b, base] = ["/p/a", "/p/b", "/p/base"].map(PathBuf::from);
        let images = Images::of(Arc::new(Stored(vec![of_machine("m", &[&a, &base])])));
        let others = Arc::new(Mutex::new(vec![Chain::of_volume("volume a".into(), a.clone(), base.clone())]));
        let asked = others.clone();
        images.also(move || lock(&asked).clone());
        let own = [a.clone(), base.clone()];
        let commit = async || images.refuse_in_chains("no", &own, &own, |chain| chain.domain.is_nil(), "").await;
        commit().await.unwrap();
        lock(&others).push(Chain::of_volume("volume b".into(), b.clone(), base.clone()));
        let refused = commit().await.unwrap_err().to_string();
        assert!(refused.contains("volume b") && !refused.contains("volume a"), "{refused}");
        assert_eq!(images.who_stands_on(&base, Fate::Written).await, ["m", "volume a", "volume b"]);
        // What is below a machine's disk may be taken from it where its configuration does not count, and from no volume.
        assert_eq!(images.who_stands_on(&base, Fate::Removed).await, ["volume a", "volume b"]);
        for own in [&a, &b] {
            assert!(images.who_stands_on(own, Fate::Removed).await.is_empty());
            assert!(images.who_stands_on(own, Fate::Written).await.is_empty());
        }
    }

    #[tokio::test]
    async fn what_a_path_leads_to_is_looked_at_anew_when_it_is_another_file() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (link, file) = (at("link"), at("file"));
        std::fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        let images = Images::of(Arc::new(Stored(vec![of_machine("m", &[&link])])));
        assert_eq!(images.machines_on(&file, false).await, ["m"]);
        let taken = images.take(&file, "work".to_owned()).await.unwrap_or_else(|by| panic!("{by}"));
        std::fs::write(at("new"), "new").unwrap();
        std::fs::rename(at("new"), &file).unwrap();
        drop(taken);
        assert_eq!(images.machines_on(&file, false).await, ["m"], "it leads there still");
        // Somebody else moves it away, and its number is another name's.
        std::fs::rename(&file, at("other")).unwrap();
        assert!(images.machines_on(&at("other"), false).await.is_empty(), "it leads nowhere");
    }

    #[test]
    fn a_locked_image_is_found_in_qemus_words() {
        let text = "Failed to get \"write\" lock\nIs another process using the image [/images/a b]?";
        assert_eq!(locked_image(text), Some("/images/a b"));
        assert_eq!(locked_image("No such file or directory"), None);
    }

    #[test]
    fn what_was_recorded_of_overlays_completes_a_document_that_ends_sooner() {
        let recorded = [overlay("/c", "/b"), overlay("/b", "/a"), overlay("/x", "/y"), overlay("/y", "/x")];
        let declared = |xml: &str| {
            let mut disk = disk(xml);
            declare(&mut disk, &recorded);
            disk.files().iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(declared("<source file='/c'/>"), "/c /b /a");
        assert_eq!(declared("<source file='/c'/><backingStore/>"), "/c", "what is said counts");
        let below = "<backingStore type='file'><format type='qcow2'/><source file='/b'/></backingStore>";
        assert_eq!(declared(&format!("<source file='/other'/>{below}")), "/other /b /a");
        assert_eq!(declared("<source file='/a'/>"), "/a");
        assert_eq!(declared("<source file='/x'/>"), "/x /y /x", "no loop");
    }
}
