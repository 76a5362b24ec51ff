//! What virtd is told at its start: the command line, the configuration file, and the folders that follow from both.

use clap::{Args, Parser, ValueEnum};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use virt_drivers::Product;
use virt_model::driver::Driver;
use virt_model::driver::inventory::HostProfile;
use virt_model::xml::shorten;
use virt_service::{Limits, Paths};

/// Virtual machines as D-Bus objects.
#[derive(Debug, Parser)]
#[command(name = "virtd", version)]
pub struct Arguments {
    #[command(flatten)]
    bus: BusArguments,

    /// Keep configuration, state, logs and runtime files below this folder
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,

    /// How much to log
    #[arg(long, value_enum, default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,
}

#[derive(Args, Debug)]
#[group(multiple = false)]
struct BusArguments {
    /// Serve the system bus (the default)
    #[arg(long)]
    system: bool,

    /// Serve the session bus, for one user, without polkit
    #[arg(long)]
    session: bool,
}

/// How much to log.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[allow(missing_docs, reason = "the words say it")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    /// The filter for our own crates; others speak from warnings on.
    pub fn filter(self) -> String {
        let level = format!("{self:?}").to_lowercase();
        format!("warn,virtd={level},virt_service={level},virt_drivers={level},virt_model={level}")
    }
}

/// Which bus is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// For all users; polkit decides.
    System,
    /// For one user.
    Session,
}

impl Arguments {
    /// Which bus is served.
    pub fn kind(&self) -> Kind {
        if self.bus.session { Kind::Session } else { Kind::System }
    }
}

/// `virtd.toml`. Every key may be left out; one that is not known is an error.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// `[qemu]`
    pub qemu: QemuConfig,
    /// `[limits]`
    pub limits: LimitsConfig,
    /// `[[host]]`, each
    pub host: Vec<HostConfig>,
    /// `[networks]`
    pub networks: NetworksConfig,
}

/// A host of another hypervisor.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct HostConfig {
    /// What it is called.
    pub name: String,
    /// Who speaks to it.
    pub driver: Product,
    /// Nothing is done to its machines.
    #[serde(default)]
    pub read_only: bool,
    /// Seconds from one question what it has to the next, where it does not tell by itself.
    pub poll: Option<u64>,
    /// Seconds that it may take to answer.
    pub timeout: Option<u64>,
    /// Seconds that virtd's start waits for it.
    pub connect_wait: Option<u64>,
}

/// The shortest and the longest that each of those may be; virtd's start must have an end before somebody gives it up.
const TIMES: [(&str, u64, u64); 3] = [("poll", 1, 3600), ("timeout", 1, 3600), ("connect-wait", 0, 30)];

impl HostConfig {
    /// What its driver is told. Error: the key that is wrong, and why.
    pub fn profile(&self) -> Result<HostProfile, String> {
        let usual = HostProfile::named(&self.name);
        let wrong = |what: String| Err(format!("[[host]] '{}': {what}", shorten(&self.name)));
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if !(1..=32).contains(&self.name.len()) || !self.name.bytes().all(fits) {
            return wrong("its name is 1 to 32 of a-z, 0-9 and -".to_owned());
        }
        for ((key, least, most), seconds) in TIMES.into_iter().zip([self.poll, self.timeout, self.connect_wait]) {
            if seconds.is_some_and(|seconds| !(least..=most).contains(&seconds)) {
                return wrong(format!("{key} is {least} to {most} seconds"));
            }
        }
        let seconds = |given: Option<u64>, usual| given.map_or(usual, Duration::from_secs);
        Ok(HostProfile {
            read_only: self.read_only,
            poll: seconds(self.poll, usual.poll),
            timeout: seconds(self.timeout, usual.timeout),
            connect_wait: seconds(self.connect_wait, usual.connect_wait),
            ..usual
        })
    }
}

/// What networks are made of.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct NetworksConfig {
    /// Who makes them.
    pub driver: NetworksBy,
}

/// Who makes networks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworksBy {
    /// Of the host's bridges, rules and servers.
    #[default]
    Host,
    /// In memory, as the test driver makes machines: nothing of them is on the host, and they end with virtd.
    Memory,
}

/// Who runs QEMU on the system bus.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct QemuConfig {
    /// The user.
    pub user: String,
    /// The group, if not the user's own.
    pub group: Option<String>,
    /// Whether guests may have KVM.
    pub kvm: UseKvm,
    /// Threads that a guest's processes may have beside its vCPUs.
    pub threads: u64,
    /// MiB that they may use beyond the guest's memory and a quarter of it.
    pub overhead_mib: u64,
}

/// Whether guests may have KVM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UseKvm {
    /// Where KVM and QEMU say that it works.
    #[default]
    Auto,
    /// Never: a machine of `type='kvm'` is refused.
    Off,
}

/// How much any user but root may have.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct LimitsConfig {
    /// Domains owned.
    pub domains_per_user: usize,
    /// Jobs under way.
    pub jobs_per_user: usize,
    /// Volumes owned.
    pub volumes_per_user: u32,
    /// The capacity of those together, in bytes; any number, if not said.
    pub storage_per_user: Option<u64>,
}

impl Default for QemuConfig {
    fn default() -> Self {
        QemuConfig { user: "virt-qemu".to_owned(), group: None, kvm: UseKvm::Auto, threads: 1024, overhead_mib: 2048 }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        let Limits { domains_per_user, jobs_per_user, volumes_per_user, storage_per_user, .. } = Limits::default();
        LimitsConfig { domains_per_user, jobs_per_user, volumes_per_user, storage_per_user }
    }
}

impl From<LimitsConfig> for Limits {
    fn from(config: LimitsConfig) -> Limits {
        let LimitsConfig { domains_per_user, jobs_per_user, volumes_per_user, storage_per_user } = config;
        Limits { domains_per_user, jobs_per_user, volumes_per_user, storage_per_user, ..Limits::default() }
    }
}

impl Config {
    /// The drivers of the hosts, in their order. Error: a sentence that names the host.
    pub fn hosts(&self) -> Result<Vec<Arc<dyn Driver>>, String> {
        let mut names = BTreeSet::new();
        let made = self.host.iter().map(|host| {
            let profile = host.profile()?;
            match names.insert(&host.name) {
                true => Ok(virt_drivers::of_host(host.driver, profile)),
                false => Err(format!("[[host]] '{}': another one has that name; give each its own", host.name)),
            }
        });
        made.collect()
    }

    /// Reads `file`; one that is not there says nothing. Error: a sentence that names the file, and the line if it is
    /// the text that is wrong.
    pub fn read(file: &Path) -> Result<Config, String> {
        match std::fs::read_to_string(file) {
            Ok(text) => toml::from_str(&text).map_err(|error| format!("{}: {error}", file.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Config::default()),
            Err(error) => Err(format!("{} cannot be read: {error}", file.display())),
        }
    }
}

/// Where everything is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folders {
    /// `virtd.toml`
    pub config: PathBuf,
    /// Definitions.
    pub state: PathBuf,
    /// What does not outlive the host's boot.
    pub runtime: PathBuf,
    /// The hypervisors' output.
    pub log: PathBuf,
    /// What can be found out again.
    pub cache: PathBuf,
}

impl Folders {
    /// Those of this command line; `variable` looks into the environment.
    /// Error: the environment of a session does not say where they are.
    pub fn new(arguments: &Arguments, variable: impl Fn(&str) -> Option<PathBuf>) -> Result<Folders, String> {
        match (&arguments.root, arguments.kind()) {
            (Some(root), _) => Ok(Folders::below(root)),
            (None, Kind::System) => Ok(Folders::below(Path::new("/"))),
            (None, Kind::Session) => Folders::of_user(variable),
        }
    }

    /// As the service wants them.
    pub fn paths(&self) -> Paths {
        Paths { state: self.state.clone(), runtime: self.runtime.clone(), log: self.log.clone() }
    }

    /// Keeps other virtds out of these folders while the result lives. Error: one is there already.
    pub fn lock(&self) -> Result<Flock<File>, String> {
        let path = self.runtime.join("lock");
        let made = std::fs::create_dir_all(&self.runtime).and_then(|()| File::create(&path));
        let file = made.map_err(|error| format!("{} cannot be made: {error}", path.display()))?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
            Errno::EWOULDBLOCK => format!("another virtd keeps its runtime files in {}", self.runtime.display()),
            error => format!("{} cannot be locked: {error}", path.display()),
        })
    }

    fn below(root: &Path) -> Folders {
        Folders {
            config: root.join("etc/virt"),
            state: root.join("var/lib/virt"),
            runtime: root.join("run/virt"),
            log: root.join("var/log/virt"),
            cache: root.join("var/cache/virt"),
        }
    }

    fn of_user(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<Folders, String> {
        // A relative path in these variables is to be ignored, says their specification.
        let given = |name: &str| variable(name).filter(|path| path.is_absolute());
        let home = given("HOME");
        let base = |name: &str, default: &str| {
            let folder = given(name).or_else(|| Some(home.as_ref()?.join(default)));
            folder.map(|folder| folder.join("virt")).ok_or(format!("neither {name} nor HOME is set"))
        };
        let state = base("XDG_STATE_HOME", ".local/state")?;
        let runtime = given("XDG_RUNTIME_DIR").ok_or("XDG_RUNTIME_DIR is not set; give --root instead")?;
        Ok(Folders {
            config: base("XDG_CONFIG_HOME", ".config")?,
            runtime: runtime.join("virt"),
            log: state.join("log"),
            state,
            cache: base("XDG_CACHE_HOME", ".cache")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Arguments {
        Arguments::try_parse_from([&["virtd"], words].concat()).unwrap()
    }

    #[test]
    fn the_system_bus_is_the_default() {
        assert_eq!(parse(&[]).kind(), Kind::System);
        assert_eq!(parse(&["--session"]).kind(), Kind::Session);
        assert!(Arguments::try_parse_from(["virtd", "--system", "--session"]).is_err());
    }

    #[test]
    fn folders_are_below_root_for_both() {
        for kind in ["--system", "--session"] {
            let folders = Folders::new(&parse(&[kind, "--root", "/t"]), |_| None).unwrap();
            assert_eq!(folders.runtime, Path::new("/t/run/virt"));
            assert_eq!(folders.config, Path::new("/t/etc/virt"));
        }
        assert_eq!(Folders::new(&parse(&[]), |_| None).unwrap().state, Path::new("/var/lib/virt"));
    }

    #[test]
    fn a_session_goes_by_its_environment() {
        let environment = |name: &str| match name {
            "HOME" => Some("/home/a".into()),
            "XDG_RUNTIME_DIR" => Some("/run/user/1".into()),
            "XDG_CACHE_HOME" => Some("relative".into()),
            _ => None,
        };
        let folders = Folders::new(&parse(&["--session"]), environment).unwrap();
        assert_eq!(folders.state, Path::new("/home/a/.local/state/virt"));
        assert_eq!(folders.runtime, Path::new("/run/user/1/virt"));
        assert_eq!(folders.cache, Path::new("/home/a/.cache/virt"));
        assert!(Folders::new(&parse(&["--session"]), |_| None).is_err());
    }

    #[test]
    fn folders_have_one_virtd() {
        let root = tempfile::tempdir().unwrap();
        let folders = Folders::below(root.path());
        let first = folders.lock().unwrap();
        assert!(folders.lock().unwrap_err().contains("another virtd"));
        drop(first);
        folders.lock().unwrap();
    }

    #[test]
    fn a_host_has_a_name_of_its_own_and_keys_that_its_driver_uses() {
        let read =
            |text: &str| toml::from_str::<Config>(text).map_err(|e| e.to_string()).and_then(|c| c.hosts().map(drop));
        let host = |rest: &str| format!("[[host]]\nname = \"lab\"\ndriver = \"test\"\n{rest}\n");
        for (text, why) in [
            (host("url = \"https://lab\""), "url"),
            (host("poll = 0"), "poll is 1 to 3600"),
            (host("connect-wait = 31"), "connect-wait is 0 to 30"),
            (host(&host("")), "another one has that name"),
            (host("").replace("lab", "Lab"), "'Lab': its name is"),
            (host("").replace("lab", &"x".repeat(33)), "its name is"),
            (host("").replace("test", "vbox"), "vbox"),
        ] {
            let error = read(&text).expect_err(why);
            assert!(error.contains(why), "{error}");
        }
        assert_eq!(read(&host("read-only = true\nconnect-wait = 0")), Ok(()));
    }

    #[test]
    fn the_file_says_what_it_says_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("virtd.toml");
        assert_eq!(Config::read(&file).unwrap(), Config::default());
        std::fs::write(&file, "[qemu]\nuser = \"q\"\nkvm = \"off\"\n[limits]\njobs-per-user = 3\n").unwrap();
        let config = Config::read(&file).unwrap();
        assert_eq!((config.qemu.user.as_str(), config.qemu.group, config.qemu.kvm), ("q", None, UseKvm::Off));
        assert_eq!(config.limits.jobs_per_user, 3);
        assert_eq!(config.networks.driver, NetworksBy::Host);
        std::fs::write(&file, "[networks]\ndriver = \"memory\"\n").unwrap();
        assert_eq!(Config::read(&file).unwrap().networks.driver, NetworksBy::Memory);
        std::fs::write(&file, "[networks]\ndriver = \"libvirt\"\n").unwrap();
        let error = Config::read(&file).unwrap_err();
        assert!(error.contains("host") && error.contains("memory"), "{error}");
        std::fs::write(&file, "[qemu]\nkvm = \"on\"\n").unwrap();
        let error = Config::read(&file).unwrap_err();
        assert!(error.contains("auto") && error.contains("off"), "{error}");
        std::fs::write(&file, "[[host]]\nname = \"lab\"\ndriver = \"test\"\npoll = 9\n").unwrap();
        let config = Config::read(&file).unwrap();
        assert_eq!(config.host[0].profile().unwrap().poll, Duration::from_secs(9));
        assert_eq!(config.hosts().unwrap().len(), 1);
        std::fs::write(&file, "[limits]\njobs = 3\n").unwrap();
        let error = Config::read(&file).unwrap_err();
        assert!(error.contains("virtd.toml") && error.contains("jobs"), "{error}");
    }
}
