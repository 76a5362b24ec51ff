//! Who stands on which image, over all machines: what runs, what is stored, and what each snapshot froze. Whoever is about to
//! write an image, or to remove it, asks here first.
//!
//! Two paths are one file if they are the same text, or were last [seen] to lead to one inode.

mod chain;
mod overlays;
mod seen;
mod taken;

pub(crate) use chain::{
    Chain, ChainKind, DiskImages, Fate, KeptChain, Shown, images_of, show_disk, show_snapshot, written_by, written_of,
};
pub(crate) use overlays::{Overlay, declare_in, overlays_of};
pub(crate) use taken::Taken;

use crate::error::{Error, Result};
use crate::lock::lock;
use crate::object::{ObjectKind, ObjectRef, Usage, User};
use crate::volumes::Answer;
use chain::is_written;
use overlays::is_open_ended;
use seen::{FileNumber, Seen};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use taken::TakenFile;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::xml::Finding;

/// What to do about a disk that others stand on.
pub(crate) const FROZEN: &str = "put an overlay of its own on it (qemu-img create -b), name what the machine stood on last, or \
    revert to or delete the snapshot";

/// All machines of this host, as far as their images are concerned.
pub(crate) trait Machines: Send + Sync {
    /// Shows the chains that they need, but for those of the machine `except`: what runs, what is stored, and snapshots. One may be
    /// shown twice. While it is shown its machine may be locked.
    fn show_chains(&self, except: Option<Uuid>, to: Shown<'_>);

    /// Of them those of guests that run.
    fn show_running_chains(&self, to: Shown<'_>);

    /// The overlays that snapshots have laid on disks.
    fn overlays(&self) -> Vec<Overlay>;

    /// What a machine is called today.
    fn name_of(&self, machine: Uuid) -> Option<String>;

    /// Has a guest see so many bytes of a disk that is on that image, which it writes, once nothing else is done to it.
    fn resize_disk<'a>(&'a self, disk: &'a GuestDisk, size: u64, give_up: &'a CancellationToken) -> Answer<'a>;
}

/// A disk of a guest that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestDisk {
    /// The machine.
    pub machine: Uuid,
    /// Which disk it is, for people: `domain 'web' (disk 'vda')`.
    pub whose: String,
    /// The image that the guest writes, as it names it.
    pub image: PathBuf,
}

/// See the module.
pub(crate) struct Images {
    machines: Arc<dyn Machines>,
    seen: Arc<Seen>,
    /// Files that are about to be written by what is under way.
    taken: Mutex<Vec<TakenFile>>,
    /// Images that machines are about to have, and do not show yet.
    begun: Mutex<Vec<Arc<Begun>>>,
    /// What others than machines need of images.
    others: OnceLock<Box<dyn Fn() -> Vec<Chain> + Send + Sync>>,
}

/// Images that a machine is about to have, and which machine.
type Begun = (Vec<PathBuf>, String);

/// While this lives a machine is about to have some images.
pub(crate) struct Begins(Arc<Images>, Arc<Begun>);

impl Drop for Begins {
    fn drop(&mut self) {
        lock(&self.0.begun).retain(|begun| !Arc::ptr_eq(begun, &self.1));
    }
}

impl Images {
    pub fn of(machines: Arc<dyn Machines>) -> Arc<Images> {
        let (taken, begun) = (Mutex::default(), Mutex::default());
        Arc::new(Images { machines, seen: Arc::default(), taken, begun, others: OnceLock::new() })
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
        self.seen.look(&named.chain(folders.iter().cloned()).collect::<Vec<_>>()).await;
        let same = |folder: &&PathBuf| above.iter().any(|above| self.seen.same(above, folder));
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
        self.seen.look(&[these, files].concat()).await;
        let is_one = |one: &&PathBuf| files.iter().any(|file| self.seen.same(one, file));
        these.iter().filter(is_one).cloned().collect()
    }
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
        let every = |to: Shown<'_>| self.show_all_chains(except, to);
        let having = self.having(every, files, |kind| kind.needed(fate)).await;
        let mut users: BTreeMap<PathBuf, Vec<String>> =
            having.into_iter().map(|(file, chains)| (file, each_once(&chains))).collect();
        if fate == Fate::Written {
            for file in files {
                let takers = self.takers_of(file);
                if !takers.is_empty() {
                    users.entry(file.clone()).or_default().extend(takers);
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
                let has = if fate == Fate::Written { self.taken_text(&file, &users) } else { None };
                Err(Error::InUse(match has {
                    Some(has) => format!("{deed}: {has}"),
                    None => format!("{deed}: {} is what {} stands on; {remedy}", file.display(), users.join(", ")),
                }))
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
        let mut having = self.having(|to| self.show_all_chains(None, to), files, |_| 0).await;
        having.values_mut().for_each(|chains| chains.retain(&counts));
        let is_own = |chain: &Chain| {
            let mut pairs = own.windows(2);
            chain.kind == ChainKind::Volume
                && pairs.any(|pair| chain.files.iter().zip(pair).all(|(one, own)| self.seen.same(one, own)))
        };
        let users = each_once(having.values().flatten().filter(|chain| !is_own(chain)));
        match users.is_empty() {
            true => Ok(()),
            false => Err(Error::InUse(format!("{deed}: {} needs its layers as they are; {remedy}", users.join(", ")))),
        }
    }

    /// Who stands on a file: for people, each once. To be [written](Fate::Written) it must be what nobody stands on; to be
    /// [removed](Fate::Removed) it must be in no chain of a snapshot, and below no volume.
    pub async fn who_stands_on(self: &Arc<Self>, file: &Path, fate: Fate) -> Vec<String> {
        let mut chains = self.of_file(|to| self.show_all_chains(None, to), file, |kind| kind.needed(fate)).await;
        if fate == Fate::Removed {
            chains.retain(|chain| chain.snapshot().is_some() || chain.kind == ChainKind::Volume);
        }
        each_once(&chains)
    }

    /// The snapshots that could not be reverted to without a file.
    pub async fn snapshot_users(self: &Arc<Self>, file: &Path) -> BTreeSet<User> {
        let chains = self.of_file(|to| self.machines.show_chains(None, to), file, |_| 0).await;
        let users = chains.iter().filter_map(|chain| {
            let object = ObjectRef::Snapshot(chain.domain, chain.snapshot()?.clone());
            Some(User { object, place: String::new(), how: Usage::Snapshot })
        });
        users.collect()
    }

    /// The machines that have a file among their images, by whatever name: for people, each once. `running`: those alone that
    /// run, or begin to, or write it.
    pub async fn machines_on(self: &Arc<Self>, file: &Path, running: bool) -> Vec<String> {
        let every = |to: Shown<'_>| {
            self.show_begun_chains(to);
            self.machines.show_running_chains(to);
            self.machines.show_chains(None, &mut |chain| {
                let counts = match chain.kind {
                    ChainKind::Snapshot { .. } => false,
                    ChainKind::Copy => true,
                    _ => !running,
                };
                if counts {
                    to(chain);
                }
            });
        };
        each_once(&self.of_file(every, file, |_| 0).await)
    }

    /// The guests that write a file, by whatever name, or begin to: for people, each once.
    pub async fn writers_of(self: &Arc<Self>, file: &Path) -> Vec<String> {
        let every = |to: Shown<'_>| {
            self.show_begun_chains(to);
            self.machines.show_running_chains(&mut |chain| {
                let files = &chain.files[..chain.kind.fixed().min(chain.files.len())];
                to(&KeptChain { files, ..*chain });
            });
            self.machines.show_chains(None, &mut |chain| {
                if *chain.kind == ChainKind::Copy {
                    to(chain);
                }
            });
        };
        each_once(&self.of_file(every, file, |_| 0).await)
    }

    /// The disk of a guest that runs and writes a file, by whatever name, as that disk's own image.
    pub async fn guest_on(self: &Arc<Self>, file: &Path) -> Option<GuestDisk> {
        let every = |to: Shown<'_>| {
            self.machines.show_running_chains(&mut |chain| {
                let files = &chain.files[..chain.kind.fixed().min(chain.files.len())];
                to(&KeptChain { files, ..*chain });
            });
        };
        let chain = self.of_file(every, file, |_| 0).await.into_iter().next()?;
        let image = chain.files.into_iter().next()?;
        Some(GuestDisk { machine: chain.domain, whose: chain.whose, image })
    }

    /// See [`Machines::resize_disk`].
    pub async fn resize_through(&self, disk: &GuestDisk, size: u64, give_up: &CancellationToken) -> Result<()> {
        self.machines.resize_disk(disk, size, give_up).await
    }

    /// First these are shown, then those of machines that have them: in between they become such.
    fn show_begun_chains(&self, to: Shown<'_>) {
        for begun in lock(&self.begun).iter() {
            let (files, whose) = &**begun;
            to(&KeptChain { domain: Uuid::nil(), whose: &|| whose.clone(), files, kind: &ChainKind::Begun });
        }
    }

    /// All chains that are needed: machines', but for those of the machine `except`, and others'.
    fn show_all_chains(&self, except: Option<Uuid>, to: Shown<'_>) {
        self.machines.show_chains(except, to);
        self.others.get().into_iter().flat_map(|others| others()).for_each(|chain| chain.show(to));
    }

    /// The chains of all that `every` shows that have one of these files, by whatever name, from the layer on that `first` says: by
    /// the file.
    async fn having(
        self: &Arc<Self>,
        every: impl Fn(Shown<'_>) + Send,
        files: &[PathBuf],
        first: impl Fn(&ChainKind) -> usize + Send,
    ) -> BTreeMap<PathBuf, Vec<Chain>> {
        let mut unknown = HashSet::new();
        every(&mut |chain| {
            let new = chain.files.iter().filter(|file| !self.seen.knows(file));
            unknown.extend(new.cloned());
        });
        unknown.extend(files.iter().cloned());
        self.seen.look(&unknown.into_iter().collect::<Vec<_>>()).await;
        let mut having = self.seen_to_have(&every, files, &first);
        // By another name that was looked at before now; what had that number may have gone since.
        let stale: BTreeSet<PathBuf> = having
            .iter()
            .flat_map(|(file, chains)| {
                let by_other_name = chains.iter().flat_map(|chain| &chain.files).filter(move |one| *one != file);
                by_other_name.filter(|one| self.seen.same(one, file)).cloned()
            })
            .collect();
        if !stale.is_empty() {
            self.seen.look(&stale.into_iter().collect::<Vec<_>>()).await;
            having = self.seen_to_have(&every, files, &first);
        }
        having
    }

    /// The same by what was seen of them last.
    fn seen_to_have(
        &self,
        every: &impl Fn(Shown<'_>),
        files: &[PathBuf],
        first: &impl Fn(&ChainKind) -> usize,
    ) -> BTreeMap<PathBuf, Vec<Chain>> {
        let numbers = files.iter().filter_map(|file| Some((self.seen.number_of(file)?, file)));
        let mut by_number: HashMap<FileNumber, Vec<&PathBuf>> = HashMap::new();
        numbers.for_each(|(number, file)| by_number.entry(number).or_default().push(file));
        let by_path: HashSet<&PathBuf> = files.iter().collect();
        let mut having: BTreeMap<PathBuf, Vec<Chain>> = BTreeMap::new();
        every(&mut |chain| {
            for one in chain.files.iter().skip(first(chain.kind)) {
                let others = self.seen.number_of(one).and_then(|number| by_number.get(&number));
                let others = others.into_iter().flatten().copied().filter(|file| *file != one);
                for file in by_path.get(one).copied().into_iter().chain(others) {
                    let chains = having.entry(file.clone()).or_default();
                    let chain = chain.to_chain();
                    if !chains.contains(&chain) {
                        chains.push(chain);
                    }
                }
            }
        });
        having
    }

    /// The chains that have a file.
    async fn of_file(
        self: &Arc<Self>,
        every: impl Fn(Shown<'_>) + Send,
        file: &Path,
        first: impl Fn(&ChainKind) -> usize + Send,
    ) -> Vec<Chain> {
        self.having(every, &[file.to_owned()], first).await.into_values().flatten().collect()
    }

    /// What an image tool or a hypervisor says of an image that is locked, with the disk that it is, among the chains of whoever
    /// was told so, and the machine that has it open. Looks at no file.
    pub fn with_owner_of_lock(&self, own: impl Fn(Shown<'_>), error: DriverError) -> DriverError {
        let told = |text: String| {
            let Some(image) = locked_image(&text).map(PathBuf::from) else { return text };
            let of_image = |every: &dyn Fn(Shown<'_>)| {
                let mut whose = Vec::new();
                every(&mut |chain| {
                    if chain.files.iter().any(|file| self.seen.same(file, &image)) {
                        whose.push((chain.whose)());
                    }
                });
                whose
            };
            let disk = of_image(&own).into_iter().next();
            let disk = disk.map(|whose| format!("{} is of {whose}, and ", image.display()));
            let mut owners = of_image(&|to| self.machines.show_running_chains(to));
            owners.extend(self.takers_of(&image));
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
        self.frozen_in_any(&[def]).await.into_iter().map(|(_, finding)| finding).collect()
    }

    /// The same of several, each finding with its own.
    pub async fn frozen_in_any<'a, D: Deref<Target = DomainDef>>(
        self: &Arc<Self>,
        defs: &'a [D],
    ) -> Vec<(&'a D, Finding)> {
        let mut findings = Vec::new();
        let written: Vec<PathBuf> = defs.iter().flat_map(|def| written_by(def)).collect();
        let users = self.users_of(&written, Fate::Written, None).await;
        for def in defs {
            for disk in def.devices.disks.iter().filter(|disk| is_written(disk)) {
                if let Some((path, users)) = disk.path().and_then(|path| Some((path, users.get(Path::new(path))?))) {
                    let text = self.taken_text(Path::new(path), users).unwrap_or_else(|| {
                        format!("{path} is what {} stands on, and cannot be written: {FROZEN}", users.join(", "))
                    });
                    findings.push((def, Finding::unsupported(&disk.at, text)));
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Machines with these chains, none of which runs.
    struct Stored(Vec<Chain>);

    impl Machines for Stored {
        fn show_chains(&self, _: Option<Uuid>, to: Shown<'_>) {
            self.0.iter().for_each(|chain| chain.show(to));
        }

        fn show_running_chains(&self, _: Shown<'_>) {}

        fn overlays(&self) -> Vec<Overlay> {
            Vec::new()
        }

        fn name_of(&self, _: Uuid) -> Option<String> {
            None
        }

        fn resize_disk<'a>(&'a self, _: &'a GuestDisk, _: u64, _: &'a CancellationToken) -> Answer<'a> {
            Box::pin(async { Ok(()) })
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
    async fn a_device_is_taken_with_what_has_bytes_of_it() {
        let images = Images::of(Arc::new(Stored(Vec::new())));
        let [disk, one, two] = ["/dev/xa", "/dev/xa1", "/dev/xa2"].map(PathBuf::from);
        let take = async |file: &Path, others: &[&Path], whose: &str| {
            let others = others.iter().map(|other| other.to_path_buf()).collect();
            images.take_device(file, others, whose.to_owned()).await
        };
        let first = take(&one, &[&disk], "one").await.ok().unwrap();
        let second = take(&two, &[&disk], "two").await.ok().unwrap();
        assert_eq!(take(&disk, &[&one, &two], "disk").await.err().unwrap(), "one");
        assert_eq!(take(&disk, &[], "copy").await.err().unwrap(), "one");
        let users = images.users_of(&[disk.clone(), one.clone()], Fate::Written, None).await;
        assert_eq!(
            (&*users[&disk], &*users[&one]),
            (&["one".to_owned(), "two".to_owned()][..], &["one".to_owned()][..])
        );
        drop((first, second));
        let whole = take(&disk, &[&one, &two], "disk").await.ok().unwrap();
        assert_eq!(take(&one, &[&disk], "one").await.err().unwrap(), "disk");
        drop(whole);
        assert!(images.users_of(&[one], Fate::Written, None).await.is_empty());
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
}
