//! What a QEMU binary can do on this host, asked of the binary itself, once, and remembered.
//!
//! A binary is run because somebody who may define machines named it, or because it is where the system keeps its QEMU.
//! Whoever may only read is told what is known of a binary by then ([`Prober::known`]); what they name is not looked at.
//!
//! A binary is asked again when its file, the directory of its modules, or what we ask has changed. Whether KVM is usable
//! is the host's state and never comes from the cache on disk.

mod document;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys, /proc and /dev")]
mod host;
mod probe;
#[allow(clippy::disallowed_methods, reason = "this host's own programs and certificates, which no caller names")]
mod site;

pub use document::document;
pub use host::{Host, KVM};
pub use probe::plain_features;
pub use site::{End, Site, VHOST_VSOCK, bridge_helper, program};

use super::firmware::{self, Firmware};
use crate::host::files::{Program, Seen, open_plain};
use crate::host::own_file::replace_json;
use crate::host::resolve::{Found, Place};
use crate::host::workers::blocking;
use crate::host::workers::{Errand, Workers};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::lock::lock;

/// Raised whenever the questions or their answers' meaning change, so that older cache files are left unread.
const CACHE_FORMAT: u32 = 4;
/// The longest answers that are kept, in bytes.
const MAX_CACHE: u64 = 16 << 20;
/// Answers kept in memory; with more, those that nobody waits for are forgotten.
const MOST_KNOWN: usize = 64;

/// Where distributions put QEMU's modules; as installing firmware, installing one changes what a binary can do without changing the binary.
pub(super) const MODULE_DIRS: [&str; 4] =
    ["/usr/lib/x86_64-linux-gnu/qemu", "/usr/lib/aarch64-linux-gnu/qemu", "/usr/lib/qemu", "/usr/lib64/qemu"];

/// How many binaries are asked at once.
const AT_ONCE: usize = 8;

/// What one QEMU binary can do on this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Capabilities {
    /// The binary that was asked.
    pub binary: PathBuf,
    /// Why it could not be asked; all else is then empty.
    pub absent: Option<String>,
    /// Major, minor, micro.
    pub version: (u32, u32, u32),
    /// The distributor's version string, may be empty.
    pub package: String,
    /// What it emulates, in QEMU's words, e.g. `x86_64`.
    pub arch: String,
    /// The boards, newest alias targets among them.
    pub machines: Vec<Machine>,
    /// Device types, e.g. `virtio-net-pci`.
    pub devices: BTreeSet<String>,
    /// Types for `-object`, e.g. `rng-random`.
    pub objects: BTreeSet<String>,
    /// Character device backends, e.g. `pty`, `spicevmc`.
    pub chardevs: BTreeSet<String>,
    /// CPU models for `-cpu`.
    pub cpus: Vec<String>,
    /// Of them, those that QEMU intends to drop.
    #[serde(default)]
    pub deprecated_cpus: BTreeSet<String>,
    /// What keeps a CPU model from being all that it is, where it is emulated.
    #[serde(default)]
    pub emulated_blockers: Blockers,
    /// The same with KVM; empty where that does not work.
    #[serde(skip)]
    pub kvm_blockers: Blockers,
    /// What KVM of this host can tell a guest of Hyper-V, in QEMU's words; `None` where it was not asked.
    #[serde(skip)]
    pub kvm_hyperv: Option<BTreeSet<String>>,
    /// CPU features for `-cpu`, and other settings of a CPU that are on or off; empty where the binary does not list them.
    #[serde(default)]
    pub cpu_features: BTreeSet<String>,
    /// Of them, those that a guest can see, each by one name; empty where the binary does not tell.
    #[serde(default)]
    pub plain_cpu_features: BTreeSet<String>,
    /// QMP commands.
    pub commands: BTreeSet<String>,
    /// Groups of command line options, e.g. `sandbox`.
    pub options: BTreeSet<String>,
    /// Audio backends; empty where the binary does not list them.
    pub audio: BTreeSet<String>,
    /// Whether SPICE works, its module included.
    pub spice: bool,
    /// Whether it can fence itself in with seccomp.
    pub sandbox: bool,
    /// Why KVM is not really usable, if it is not.
    #[serde(skip, default = "kvm_unknown")]
    pub kvm: Result<(), String>,
    /// Whether the binary was built with KVM.
    pub kvm_built_in: bool,
    /// The host's processor.
    #[serde(skip)]
    pub host: Host,
    /// The host's firmware, in the order in which it is tried.
    #[serde(skip)]
    pub firmware: Vec<Firmware>,
    /// QEMU's setuid helper that plugs guests into bridges, if it is installed.
    #[serde(skip)]
    pub bridge_helper: Option<PathBuf>,
    /// What is there beside it.
    #[serde(skip)]
    pub site: Site,
}

fn kvm_unknown() -> Result<(), String> {
    Err("KVM has not been tried yet".to_owned())
}

/// Features, by the CPU models that have them and cannot have them here.
pub type Blockers = BTreeMap<String, BTreeSet<String>>;

/// A board.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// E.g. `pc-q35-7.2`.
    pub name: String,
    /// E.g. `q35`.
    pub alias: Option<String>,
    /// How many CPUs it takes.
    pub max_cpus: u32,
    /// Whether it is taken when none is named.
    pub is_default: bool,
    /// Whether QEMU intends to drop it.
    pub deprecated: bool,
}

impl Capabilities {
    /// Stands for a binary that cannot be asked: nothing is known but why.
    pub fn absent(binary: &Path, why: String) -> Self {
        Capabilities {
            binary: binary.to_owned(),
            kvm: Err(why.clone()),
            absent: Some(why),
            version: (0, 0, 0),
            package: String::new(),
            arch: String::new(),
            machines: Vec::new(),
            devices: BTreeSet::new(),
            objects: BTreeSet::new(),
            chardevs: BTreeSet::new(),
            cpus: Vec::new(),
            deprecated_cpus: BTreeSet::new(),
            emulated_blockers: Blockers::new(),
            kvm_blockers: Blockers::new(),
            kvm_hyperv: None,
            cpu_features: BTreeSet::new(),
            plain_cpu_features: BTreeSet::new(),
            commands: BTreeSet::new(),
            options: BTreeSet::new(),
            audio: BTreeSet::new(),
            spice: false,
            sandbox: false,
            kvm_built_in: false,
            host: Host::default(),
            firmware: Vec::new(),
            bridge_helper: None,
            site: Site::default(),
        }
    }

    /// The board called `name`, by its own name or an alias.
    pub fn machine(&self, name: &str) -> Option<&Machine> {
        let own = self.machines.iter().find(|m| m.name == name);
        own.or_else(|| self.machines.iter().find(|m| m.alias.as_deref() == Some(name)))
    }

    /// The features that a CPU model has and that a guest would not get, with or without KVM.
    pub fn blockers(&self, kvm: bool, model: &str) -> impl Iterator<Item = &str> {
        let blockers = if kvm { &self.kvm_blockers } else { &self.emulated_blockers };
        blockers.get(model).into_iter().flatten().map(String::as_str)
    }

    /// Whether there is a device type of this name.
    pub fn has_device(&self, name: &str) -> bool {
        self.devices.contains(name)
    }

    /// Whether the version is at least this one.
    pub fn at_least(&self, major: u32, minor: u32) -> bool {
        (self.version.0, self.version.1) >= (major, minor)
    }

    /// Whether it can be told of block nodes before it makes the devices that use them; versions before may know the
    /// command, and not then.
    pub fn takes_nodes_early(&self) -> bool {
        self.at_least(7, 2) && self.commands.contains(BUILD)
    }
}

/// The command that lets a QEMU make its devices that has waited.
pub const BUILD: &str = "x-exit-preconfig";

/// Where the system keeps its QEMU.
const OWN_DIRS: [&str; 2] = ["/usr/bin", "/usr/local/bin"];
/// Other names that distributions have for it.
const OWN_ALIASES: [&str; 3] = ["/usr/bin/kvm", "/usr/bin/qemu-kvm", "/usr/libexec/qemu-kvm"];
/// How its name begins there.
const OWN_NAME: &str = "qemu-system-";

/// Where QEMU for an architecture (in libvirt's words) is looked for when a definition names no emulator.
pub fn default_emulator(arch: &str) -> PathBuf {
    let there = own_emulators(arch).find(|path| is_systems_own(path) && Seen::at(path).is_there());
    there.unwrap_or_else(|| first_own_emulator(arch))
}

/// Where the system's own is looked for first.
fn first_own_emulator(arch: &str) -> PathBuf {
    own_emulators(arch).next().unwrap_or_default()
}

/// Where the system may keep its own, in the order in which it is looked for.
fn own_emulators(arch: &str) -> impl Iterator<Item = PathBuf> {
    let name = match arch {
        "i686" => "i386",
        "ppc64le" => "ppc64",
        "armv7l" => "arm",
        other => other,
    };
    let name = format!("{OWN_NAME}{name}");
    OWN_DIRS.iter().map(move |dir| Path::new(dir).join(&name))
}

/// Whether it is where the system keeps its QEMU: no caller has chosen it.
fn is_systems_own(binary: &Path) -> bool {
    if OWN_ALIASES.iter().any(|own| binary.as_os_str() == *own) {
        return true;
    }
    let name = binary.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix(OWN_NAME));
    let plain = |arch: &str| arch.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let folder = |dir: &str| name.is_some_and(|name| binary.as_os_str() == &*format!("{dir}/{OWN_NAME}{name}"));
    name.is_some_and(plain) && OWN_DIRS.iter().any(|dir| folder(dir))
}

/// Asks binaries what they can do, each once. One per driver.
pub struct Prober {
    cache_dir: Option<PathBuf>,
    site: site::Reader,
    user: Option<(u32, u32)>,
    /// Whether KVM is tried.
    tries_kvm: bool,
    workers: Workers,
    known: Mutex<HashMap<PathBuf, Arc<Slot>>>,
    /// Other ways to write the paths of those known.
    spellings: Mutex<HashMap<PathBuf, PathBuf>>,
    places: tokio::sync::Semaphore,
}

/// One binary's answer. Whoever holds the lock asks; the others wait for that answer, good or bad.
type Slot = tokio::sync::Mutex<Option<Answer>>;

struct Answer {
    when: Instant,
    /// `None` of one that may not be asked.
    stamp: Option<Stamp>,
    host_kvm: HostKvm,
    site: Site,
    outcome: Result<Arc<Capabilities>, DriverError>,
}

/// Since when the host's half of KVM is as it is; else why there is none.
type HostKvm = Result<(i64, i64), String>;

/// A binary that has been asked.
#[derive(Clone, Debug)]
pub struct Asked {
    /// What it can do.
    pub capabilities: Arc<Capabilities>,
    /// The file that was judged.
    pub program: Arc<Program>,
}

/// A binary that may be asked, and the host it is asked on.
struct Judged {
    program: Program,
    stamp: Stamp,
    /// Its path without links and dots in its directory, so that a binary has few names to be asked and remembered under.
    /// The last part stays: some programs go by it.
    binary: PathBuf,
    host_kvm: HostKvm,
    site: Site,
}

/// What must be unchanged for an answer to stay good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    format: u32,
    size: u64,
    inode: u64,
    changed: (i64, i64),
    modules: BTreeMap<PathBuf, (i64, i64)>,
}

#[derive(Serialize, Deserialize)]
struct CacheFile {
    stamp: Stamp,
    capabilities: Capabilities,
}

impl Prober {
    /// `cache_dir`: where answers outlive us (made when missing; nothing is kept without it). `user`: the uid and gid that
    /// binaries are run as; then only binaries are run that nobody but root can have put there, and that go by QEMU's name.
    pub fn new(cache_dir: Option<PathBuf>, user: Option<(u32, u32)>) -> Self {
        Prober {
            cache_dir,
            site: site::Reader::new(user.is_some()),
            user,
            tries_kvm: true,
            workers: Workers::default(),
            known: Mutex::default(),
            spellings: Mutex::default(),
            places: tokio::sync::Semaphore::new(AT_ONCE),
        }
    }

    /// The same for a virtd that keeps there what belongs to guests.
    pub fn keeping_in(self, state_dir: &Path) -> Self {
        Prober { site: self.site.keeping_in(state_dir), ..self }
    }

    /// The same for a host whose certificates are there.
    pub fn certified_in(self, tls_dir: &Path) -> Self {
        Prober { site: self.site.certified_in(tls_dir), ..self }
    }

    /// The same for a host where KVM is used, if it is there, or not used at all.
    pub fn with_kvm(self, tries_kvm: bool) -> Self {
        Prober { tries_kvm, ..self }
    }

    /// The same with these threads to look at files.
    pub fn working_with(self, workers: &Workers) -> Self {
        Prober { workers: workers.clone(), ..self }
    }

    /// What the binary can do; it is run if that is not known. Only for whoever may define machines: `guest` is whose
    /// definition names it. The first call takes a fraction of a second; concurrent ones share it. Errors name the binary:
    /// it is missing, is not QEMU, or did not answer in time.
    pub async fn probe(self: &Arc<Self>, guest: Uuid, binary: &Path) -> Result<Asked, DriverError> {
        let asked = Instant::now();
        let (prober, named) = (self.clone(), binary.to_owned());
        let errand = Errand::new(guest, format!("emulator {}", binary.display()));
        let judged = self.workers.run(errand, move |_| prober.judge(&named)).await;
        let judged = match judged {
            Ok(judged) => judged,
            Err(error) => {
                // Of the system's own nobody needs to be told later, and anybody may have asked for any kind of them.
                if !is_systems_own(binary) {
                    let (host_kvm, site, outcome) = (Ok((0, 0)), Site::default(), Err(error.clone()));
                    let answer = Answer { when: Instant::now(), stamp: None, host_kvm, site, outcome };
                    *self.slot(binary, binary).lock().await = Some(answer);
                }
                return Err(error);
            }
        };
        let Judged { program, stamp, binary: spelt, host_kvm, site } = judged;
        let program = Arc::new(program);
        let slot = self.slot(&spelt, binary);
        let mut answer = slot.lock().await;
        let known = answer.as_ref().filter(|known| {
            let same = known.stamp.as_ref() == Some(&stamp) && known.host_kvm == host_kvm && known.site == site;
            same && (known.outcome.is_ok() || known.when >= asked)
        });
        let outcome = match known {
            Some(known) => known.outcome.clone(),
            None => {
                let learnt = self.learn(&program, &spelt, &stamp, &host_kvm).await;
                let outcome = learnt.map(|caps| Arc::new(Capabilities { site: site.clone(), ..caps }));
                let stamp = Some(stamp);
                *answer = Some(Answer { when: Instant::now(), stamp, host_kvm, site, outcome: outcome.clone() });
                outcome
            }
        };
        outcome.map(|capabilities| Asked { capabilities, program })
    }

    /// The same where a binary that cannot be asked is [`Capabilities::absent`]: enough to store a definition.
    pub async fn learn_of(self: &Arc<Self>, guest: Uuid, binary: &Path) -> Arc<Capabilities> {
        let asked = self.probe(guest, binary).await;
        self.or_absent(binary, asked.map(|asked| asked.capabilities)).await
    }

    /// The same of the system's own for machines of `arch`. Where it is the first that is looked for, that costs one look.
    pub async fn learn_of_own(self: &Arc<Self>, guest: Uuid, arch: &str) -> Arc<Capabilities> {
        let first = first_own_emulator(arch);
        let asked = self.probe(guest, &first).await.map(|asked| asked.capabilities);
        let arch = arch.to_owned();
        match asked.is_ok() {
            true => self.or_absent(&first, asked).await,
            false => match blocking(move || default_emulator(&arch)).await.unwrap_or_default() {
                // What could not be asked is not asked once more.
                own if own == first => self.or_absent(&own, asked).await,
                own => self.learn_of(guest, &own).await,
            },
        }
    }

    /// What is known of the binary, for everybody: neither is it run, nor its path followed, unless it is where the system
    /// keeps its QEMU. One of which nothing is known is as one that cannot be asked.
    pub async fn known(self: &Arc<Self>, binary: &Path) -> Arc<Capabilities> {
        let known = match is_systems_own(binary) {
            true => self.probe(Uuid::nil(), binary).await.map(|asked| asked.capabilities),
            false => self.remembered(binary).await,
        };
        self.or_absent(binary, known).await
    }

    async fn or_absent(
        self: &Arc<Self>,
        binary: &Path,
        known: Result<Arc<Capabilities>, DriverError>,
    ) -> Arc<Capabilities> {
        match known {
            Ok(capabilities) => capabilities,
            Err(error) => {
                let prober = self.clone();
                let site = blocking(move || prober.site.read()).await.unwrap_or_default();
                Arc::new(Capabilities { site, ..Capabilities::absent(binary, error.to_string()) })
            }
        }
    }

    /// What the binary could do when it was asked last; nothing where that is not in memory. Waits for nothing, and looks at no file.
    pub fn last_known(&self, binary: &Path) -> Option<Arc<Capabilities>> {
        let spelling = lock(&self.spellings).get(binary).cloned();
        let slot = lock(&self.known).get(spelling.as_deref().unwrap_or(binary)).cloned()?;
        let answer = slot.try_lock().ok()?;
        answer.as_ref()?.outcome.clone().ok()
    }

    /// What was learnt of the binary before, by this virtd or an earlier one.
    async fn remembered(self: &Arc<Self>, binary: &Path) -> Result<Arc<Capabilities>, DriverError> {
        let spelling = lock(&self.spellings).get(binary).cloned();
        let spelt = spelling.unwrap_or_else(|| binary.to_owned());
        let slot = lock(&self.known).get(&spelt).cloned();
        if let Some(slot) = slot
            && let Some(answer) = &*slot.lock().await
        {
            return answer.outcome.clone();
        }
        let prober = self.clone();
        let kept = blocking(move || {
            let mut kept = prober.load(&spelt)?.capabilities;
            prober.add_host(&mut kept);
            kept.kvm = if kept.kvm_built_in { prober.host_kvm().map(drop) } else { Err(without_kvm(&spelt)) };
            kept.site = prober.site.read();
            Some(Arc::new(kept))
        });
        kept.await?.ok_or_else(|| {
            DriverError::Unsupported(format!(
                "emulator {}: nothing is known of it yet; whoever may define machines makes it known by defining one with it",
                binary.display()
            ))
        })
    }

    fn slot(&self, spelt: &Path, named: &Path) -> Arc<Slot> {
        if spelt != named {
            let mut spellings = lock(&self.spellings);
            if spellings.len() >= MOST_KNOWN {
                spellings.clear();
            }
            spellings.insert(named.to_owned(), spelt.to_owned());
        }
        let mut known = lock(&self.known);
        if known.len() >= MOST_KNOWN && !known.contains_key(spelt) {
            known.retain(|_, slot| Arc::strong_count(slot) > 1);
        }
        known.entry(spelt.to_owned()).or_default().clone()
    }

    async fn learn(
        self: &Arc<Self>,
        program: &Arc<Program>,
        binary: &Path,
        stamp: &Stamp,
        host_kvm: &HostKvm,
    ) -> Result<Capabilities, DriverError> {
        let _place = self.places.acquire().await;
        let (prober, path) = (self.clone(), binary.to_owned());
        let kept = blocking(move || prober.load(&path)).await?;
        let mut capabilities = match kept.filter(|kept| kept.stamp == *stamp) {
            Some(kept) => kept.capabilities,
            None => {
                let asked = probe::ask(program, binary, self.user).await?;
                let file = CacheFile { stamp: stamp.clone(), capabilities: asked.clone() };
                let (prober, path) = (self.clone(), binary.to_owned());
                if let Err(error) = blocking(move || prober.save(&path, &file)).await? {
                    tracing::warn!(binary = %binary.display(), %error, "capabilities could not be cached");
                }
                asked
            }
        };
        let prober = self.clone();
        capabilities = blocking(move || {
            prober.add_host(&mut capabilities);
            capabilities
        })
        .await?;
        capabilities.kvm = match host_kvm {
            Err(why) => Err(why.clone()),
            Ok(_) if !capabilities.kvm_built_in => Err(without_kvm(binary)),
            Ok(_) => match probe::with_kvm(program, &capabilities.arch, self.user).await {
                Ok(kvm) => {
                    (capabilities.kvm_blockers, capabilities.kvm_hyperv) = (kvm.blockers, kvm.hyperv);
                    Ok(())
                }
                Err(why) => Err(why),
            },
        };
        Ok(capabilities)
    }

    /// Whether the host's half of KVM is there, and is to be used. Blocks.
    fn host_kvm(&self) -> HostKvm {
        match self.tries_kvm {
            true => host::kvm(),
            false => Err("it is turned off in virtd.toml ([qemu] kvm = \"off\")".to_owned()),
        }
    }

    /// What the host says of itself. Blocks.
    fn add_host(&self, capabilities: &mut Capabilities) {
        capabilities.host = Host::read();
        capabilities.firmware = firmware::read_all(&firmware::FOLDERS.map(Path::new));
        capabilities.bridge_helper = site::bridge_helper();
    }

    /// Finds and holds a binary that may be asked, and looks at the host. Blocks.
    fn judge(&self, binary: &Path) -> Result<Judged, DriverError> {
        let refuse = |why: &str| DriverError::Storage(format!("emulator {}: {why}", binary.display()));
        if !binary.is_absolute() {
            return Err(refuse("the path is not absolute"));
        }
        let name = binary.file_name().unwrap_or_default();
        let says_so = ["qemu", "kvm"].iter().any(|word| name.to_string_lossy().contains(word));
        if self.user.is_some() && !says_so {
            return Err(refuse("its name does not say that it is a QEMU; make a link that does"));
        }
        let program = Program::at(binary, self.user.is_some()).map_err(|e| refuse(&e.to_string()))?;
        let folder = binary.parent().map(Found::resolve).transpose().map_err(|e| refuse(&e.to_string()))?;
        let spelt = folder.map_or_else(|| binary.to_owned(), |folder| folder.real.join(name));
        let stat = program.stat();
        // They are the system's own and only looked at from outside: nothing in them is opened for what this says.
        let dirs = MODULE_DIRS.iter().chain(&firmware::FOLDERS);
        let modules = dirs.filter_map(|dir| Some((PathBuf::from(dir), mtime(&rustix::fs::stat(*dir).ok()?))));
        let stamp = Stamp {
            format: CACHE_FORMAT,
            size: stat.st_size as u64,
            inode: stat.st_ino,
            changed: mtime(stat),
            modules: modules.collect(),
        };
        let site = self.site.read();
        Ok(Judged { program, stamp, binary: spelt, host_kvm: self.host_kvm(), site })
    }

    fn cache_file(&self, binary: &Path) -> Option<PathBuf> {
        let name = binary.to_str()?.trim_start_matches('/').replace('/', "-");
        (name.len() < 200).then(|| self.cache_dir.as_ref().map(|dir| dir.join(format!("{name}.json"))))?
    }

    /// What was kept of the binary, whatever it is by now.
    fn load(&self, binary: &Path) -> Option<CacheFile> {
        let text = open_plain(&self.cache_file(binary)?, false).and_then(|file| file.read_all(MAX_CACHE)).ok()?;
        let file: CacheFile = serde_json::from_slice(&text).ok()?;
        (file.stamp.format == CACHE_FORMAT && file.capabilities.binary == binary).then_some(file)
    }

    fn save(&self, binary: &Path, file: &CacheFile) -> std::io::Result<()> {
        let Some(path) = self.cache_file(binary) else { return Ok(()) };
        let dir = path.parent().unwrap_or(Path::new("/"));
        Place::make_folders(dir, self.user.is_some())?;
        // Found out again where it is lost.
        replace_json(&path, file, false)
    }
}

fn without_kvm(binary: &Path) -> String {
    format!("{} was built without KVM", binary.display())
}

fn mtime(stat: &rustix::fs::Stat) -> (i64, i64) {
    (stat.st_mtime, stat.st_mtime_nsec as i64)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
