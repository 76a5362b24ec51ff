//! What a QEMU binary can do on this host, asked of the binary itself, once, and remembered.
//!
//! A binary is asked again when its file, the directory of its modules, or what we ask has changed. Whether KVM is usable
//! is the host's state and never comes from the cache on disk.

mod document;
mod host;
mod probe;
mod site;

pub use document::document;
pub use host::Host;
pub use site::{End, Site, VHOST_VSOCK, program};

use super::firmware::{self, Firmware};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use virt_model::driver::DriverError;

/// Raised whenever the questions or their answers' meaning change, so that older cache files are left unread.
const CACHE_FORMAT: u32 = 1;
/// Answers kept in memory; with more, those that nobody waits for are forgotten.
const MOST_KNOWN: usize = 64;

/// Where distributions put QEMU's modules; as installing firmware, installing one changes what a binary can do without changing the binary.
pub(super) const MODULE_DIRS: [&str; 4] =
    ["/usr/lib/x86_64-linux-gnu/qemu", "/usr/lib/aarch64-linux-gnu/qemu", "/usr/lib/qemu", "/usr/lib64/qemu"];

/// How many binaries are asked at once: everybody may name one.
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

    /// Whether there is a device type of this name.
    pub fn has_device(&self, name: &str) -> bool {
        self.devices.contains(name)
    }

    /// Whether the version is at least this one.
    pub fn at_least(&self, major: u32, minor: u32) -> bool {
        (self.version.0, self.version.1) >= (major, minor)
    }
}

/// Where QEMU for an architecture (in libvirt's words) is looked for when a definition names no emulator.
pub fn default_emulator(arch: &str) -> PathBuf {
    let name = match arch {
        "i686" => "i386",
        "ppc64le" => "ppc64",
        "armv7l" => "arm",
        other => other,
    };
    let found = ["/usr/bin", "/usr/local/bin"].iter().map(|dir| Path::new(dir).join(format!("qemu-system-{name}")));
    let mut found = found.filter(|path| path.exists());
    found.next().unwrap_or_else(|| PathBuf::from(format!("/usr/bin/qemu-system-{name}")))
}

/// Asks binaries what they can do, each once. One per driver.
pub struct Prober {
    cache_dir: Option<PathBuf>,
    state_dir: PathBuf,
    tls_dir: PathBuf,
    user: Option<(u32, u32)>,
    known: Mutex<HashMap<PathBuf, Arc<Slot>>>,
    places: tokio::sync::Semaphore,
}

/// One binary's answer. Whoever holds the lock asks; the others wait for that answer, good or bad.
type Slot = tokio::sync::Mutex<Option<Answer>>;

struct Answer {
    when: Instant,
    stamp: Stamp,
    host_kvm: Result<(), String>,
    site: Site,
    outcome: Result<Arc<Capabilities>, DriverError>,
}

/// What must be unchanged for an answer to stay good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    format: u32,
    size: u64,
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
    /// binaries are run as; then only binaries are run that nobody but root can have put there, and that go by QEMU's
    /// name: whoever may read may name one.
    pub fn new(cache_dir: Option<PathBuf>, user: Option<(u32, u32)>) -> Self {
        let places = tokio::sync::Semaphore::new(AT_ONCE);
        Prober { cache_dir, state_dir: PathBuf::new(), tls_dir: PathBuf::new(), user, known: Mutex::default(), places }
    }

    /// The same for a virtd that keeps there what belongs to guests.
    pub fn keeping_in(self, state_dir: &Path) -> Self {
        Prober { state_dir: state_dir.to_owned(), ..self }
    }

    /// The same for a host whose certificates are there.
    pub fn certified_in(self, tls_dir: &Path) -> Self {
        Prober { tls_dir: tls_dir.to_owned(), ..self }
    }

    /// What the binary can do. The first call takes a fraction of a second; concurrent ones share it. Errors name the
    /// binary: it is missing, is not QEMU, or did not answer in time.
    pub async fn probe(&self, binary: &Path) -> Result<Arc<Capabilities>, DriverError> {
        let asked = Instant::now();
        let stamp = self.stamp(binary)?;
        let binary = &one_spelling(binary);
        let slot = self.slot(binary);
        let mut answer = slot.lock().await;
        let (host_kvm, site) = (host::kvm(), Site::read(&self.state_dir, &self.tls_dir));
        if let Some(known) = answer.as_ref()
            && known.stamp == stamp
            && known.host_kvm == host_kvm
            && known.site == site
            && (known.outcome.is_ok() || known.when >= asked)
        {
            return known.outcome.clone();
        }
        let learnt = self.learn(binary, &stamp, &host_kvm).await;
        let outcome = learnt.map(|capabilities| Arc::new(Capabilities { site: site.clone(), ..capabilities }));
        *answer = Some(Answer { when: Instant::now(), stamp, host_kvm, site, outcome: outcome.clone() });
        outcome
    }

    /// As [`Prober::probe`], but a binary that cannot be asked is [`Capabilities::absent`]: enough to store a definition.
    pub async fn probe_or_absent(&self, binary: &Path) -> Arc<Capabilities> {
        match self.probe(binary).await {
            Ok(capabilities) => capabilities,
            Err(error) => {
                let site = Site::read(&self.state_dir, &self.tls_dir);
                Arc::new(Capabilities { site, ..Capabilities::absent(binary, error.to_string()) })
            }
        }
    }

    fn slot(&self, binary: &Path) -> Arc<Slot> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST_KNOWN && !known.contains_key(binary) {
            known.retain(|_, slot| Arc::strong_count(slot) > 1);
        }
        known.entry(binary.to_owned()).or_default().clone()
    }

    async fn learn(
        &self,
        binary: &Path,
        stamp: &Stamp,
        host_kvm: &Result<(), String>,
    ) -> Result<Capabilities, DriverError> {
        let _place = self.places.acquire().await;
        let mut capabilities = match self.load(binary, stamp) {
            Some(kept) => kept,
            None => {
                let asked = probe::ask(binary, self.user).await?;
                if let Err(error) = self.save(binary, stamp, &asked) {
                    tracing::warn!(binary = %binary.display(), %error, "capabilities could not be cached");
                }
                asked
            }
        };
        capabilities.host = Host::read();
        capabilities.firmware = firmware::read_all(&firmware::FOLDERS.map(Path::new));
        capabilities.bridge_helper = super::tap::helper();
        capabilities.kvm = match host_kvm {
            Err(why) => Err(why.clone()),
            Ok(()) if !capabilities.kvm_built_in => Err(format!("{} was built without KVM", binary.display())),
            Ok(()) => probe::kvm_enabled(binary, self.user).await,
        };
        Ok(capabilities)
    }

    fn stamp(&self, binary: &Path) -> Result<Stamp, DriverError> {
        let refuse = |why: &str| DriverError::Storage(format!("emulator {}: {why}", binary.display()));
        if !binary.is_absolute() {
            return Err(refuse("the path is not absolute"));
        }
        let name = binary.file_name().unwrap_or_default().to_string_lossy();
        if self.user.is_some() && !name.contains("qemu") && !name.contains("kvm") {
            return Err(refuse("its name does not say that it is a QEMU; make a link that does"));
        }
        let meta = std::fs::metadata(binary).map_err(|e| refuse(&e.to_string()))?;
        if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
            return Err(refuse("not an executable file"));
        }
        if self.user.is_some() && !only_root_writes(binary) {
            return Err(refuse(
                "the file or a directory above it can be changed by others than root; install it system-wide",
            ));
        }
        let dirs = MODULE_DIRS.iter().chain(&firmware::FOLDERS);
        let modules = dirs.filter_map(|dir| Some((PathBuf::from(dir), mtime(&std::fs::metadata(dir).ok()?))));
        Ok(Stamp { format: CACHE_FORMAT, size: meta.len(), changed: mtime(&meta), modules: modules.collect() })
    }

    fn cache_file(&self, binary: &Path) -> Option<PathBuf> {
        let name = binary.to_str()?.trim_start_matches('/').replace('/', "-");
        (name.len() < 200).then(|| self.cache_dir.as_ref().map(|dir| dir.join(format!("{name}.json"))))?
    }

    fn load(&self, binary: &Path, stamp: &Stamp) -> Option<Capabilities> {
        let text = std::fs::read(self.cache_file(binary)?).ok()?;
        let file: CacheFile = serde_json::from_slice(&text).ok()?;
        (file.stamp == *stamp && file.capabilities.binary == binary).then_some(file.capabilities)
    }

    fn save(&self, binary: &Path, stamp: &Stamp, capabilities: &Capabilities) -> std::io::Result<()> {
        let Some(path) = self.cache_file(binary) else { return Ok(()) };
        let dir = path.parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(dir)?;
        let file = CacheFile { stamp: stamp.clone(), capabilities: capabilities.clone() };
        let mut temporary = tempfile::NamedTempFile::new_in(dir)?;
        temporary.write_all(&serde_json::to_vec(&file)?)?;
        temporary.persist(path)?;
        Ok(())
    }
}

/// The path without links and dots in its directory, so that a binary has few names to be asked and remembered under. The
/// last part stays: some programs go by it.
fn one_spelling(binary: &Path) -> PathBuf {
    let named = binary.parent().zip(binary.file_name());
    let spelt = named.and_then(|(dir, name)| Some(dir.canonicalize().ok()?.join(name)));
    spelt.unwrap_or_else(|| binary.to_owned())
}

fn mtime(meta: &std::fs::Metadata) -> (i64, i64) {
    (meta.mtime(), meta.mtime_nsec())
}

/// Whether nobody but root can replace this file or a directory on the way to it, as named and as linked.
fn only_root_writes(path: &Path) -> bool {
    let Ok(real) = path.canonicalize() else { return false };
    path.ancestors().chain(real.ancestors()).all(|part| {
        std::fs::metadata(part).is_ok_and(|meta| {
            let sticky_dir = meta.is_dir() && meta.mode() & 0o1000 != 0;
            meta.uid() == 0 && (meta.mode() & 0o022 == 0 || sticky_dir)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn says_why_a_binary_cannot_be_asked() {
        let dir = tempfile::tempdir().unwrap();
        let prober = Prober::new(None, None);
        let missing = prober.probe(&dir.path().join("none")).await.unwrap_err().to_string();
        assert!(missing.contains("none: No such file"), "{missing}");
        let relative = prober.probe(Path::new("qemu")).await.unwrap_err().to_string();
        assert!(relative.contains("not absolute"), "{relative}");
        let words = script(dir.path(), "words", "#!/bin/sh\necho 'no such machine' >&2; exit 1\n");
        let words = prober.probe(&words).await.unwrap_err().to_string();
        assert!(words.ends_with("no such machine"), "{words}");
        let absent = prober.probe_or_absent(Path::new("/nowhere/qemu")).await;
        assert!(absent.absent.as_ref().unwrap().contains("/nowhere/qemu"));
    }

    #[tokio::test]
    async fn runs_nothing_that_others_could_have_put_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = script(dir.path(), "qemu", "#!/bin/sh\n");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        let prober = Prober::new(None, Some((65534, 65534)));
        let error = prober.probe(&path).await.unwrap_err().to_string();
        assert!(error.contains("others than root"), "{error}");
        let error = prober.probe(Path::new("/bin/true")).await.unwrap_err().to_string();
        assert!(error.contains("its name"), "{error}");
    }

    #[tokio::test]
    async fn other_spellings_of_a_path_are_not_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let prober = Prober::new(Some(dir.path().join("cache")), None);
        let asked = dir.path().join("asked");
        let text = format!("#!/bin/sh\necho >> {}\nexit 1\n", asked.display());
        let path = script(dir.path(), "qemu", &text);
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        let stamp = prober.stamp(&path).unwrap();
        prober.save(&path, &stamp, &Capabilities::absent(&path, "kept".into())).unwrap();
        for odd in ["sub/../qemu", "sub/../sub/../qemu", ".//qemu"] {
            assert_eq!(prober.probe(&dir.path().join(odd)).await.unwrap().binary, path);
        }
        assert_eq!(prober.known.lock().unwrap().len(), 1);
        assert!(!asked.exists());
    }

    #[tokio::test]
    async fn asks_once_and_remembers() {
        let binary = default_emulator("x86_64");
        if !binary.exists() {
            eprintln!("SKIPPED: {} is not installed", binary.display());
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let prober = Prober::new(Some(dir.path().join("cache")), None);
        let (first, second) = tokio::join!(prober.probe(&binary), prober.probe(&binary));
        let first = first.unwrap();
        assert!(Arc::ptr_eq(&first, &second.unwrap()), "concurrent probes share one answer");
        assert!(first.at_least(5, 2) && first.arch == "x86_64" && first.commands.contains("query-status"));
        assert!(first.machine("q35").is_some_and(|m| m.name.starts_with("pc-q35-") && m.max_cpus > 1));
        assert!(first.has_device("virtio-blk-pci") && first.objects.contains("rng-random"));
        assert!(first.chardevs.contains("pty") && first.cpus.iter().any(|c| c == "qemu64"));
        let again = Prober::new(Some(dir.path().join("cache")), None).probe(&binary).await.unwrap();
        assert_eq!(*first, *again, "read from the cache file");
    }

    #[tokio::test]
    async fn a_changed_binary_is_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let prober = Prober::new(Some(dir.path().to_owned()), None);
        let path = script(dir.path(), "qemu", "#!/bin/sh\n");
        let stamp = prober.stamp(&path).unwrap();
        prober.save(&path, &stamp, &Capabilities::absent(&path, "kept".into())).unwrap();
        assert_eq!(prober.load(&path, &stamp).unwrap().absent.unwrap(), "kept");
        script(dir.path(), "qemu", "#!/bin/sh\n# longer\n");
        assert!(prober.load(&path, &prober.stamp(&path).unwrap()).is_none());
    }
}
