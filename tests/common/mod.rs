//! The whole daemon for tests: a private bus, a real polkitd, virtd, users, and guests to run.
//!
//! ```text
//! test process ──┬── tests/private-bus ── dbus-daemon, polkitd     (a mount namespace of their own)
//!                ├── virtd, as often as the test likes             (started in that namespace)
//!                └── connections of its own, as any user           (over DIR/run/bus)
//! ```
//!
//! However the test ends, a panic or SIGKILL included, tests/private-bus sees its standard input end and kills all that is
//! in the namespace. Where something is missing a constructor says `SKIPPED: why` and gives `None`; ./check counts these.

#![allow(dead_code)] // each test binary uses a part

pub mod checkpoints;
pub mod client;
#[allow(dead_code, reason = "not every test sits at a console")]
pub mod console;
#[allow(dead_code, reason = "most tests cut nothing off")]
pub mod cut_off;
pub mod dead;
pub mod deaf;
pub mod guest;
pub mod pools;
pub mod snapshots;
pub mod stats;
pub mod users;
pub mod watchdog;

use futures_util::StreamExt as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use users::User;

/// How long anything may take before the test fails; generous, for a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long a call may take before it fails, whatever the test would allow it: one that nobody answers keeps no test for ever.
const ANSWERED: Duration = Duration::from_secs(360);

/// Says why a test does not run, past the test runner's capture.
pub fn skip(why: &str) {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED: {name}: {why}");
}

/// Whether all of these programs are there; says which is not.
pub fn have(programs: &[&str]) -> bool {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin:/usr/lib/polkit-1";
    let missing = programs.iter().find(|program| !std::env::split_paths(&path).any(|dir| dir.join(program).exists()));
    if let Some(program) = missing {
        skip(&format!("{program} is not installed"));
    }
    missing.is_none()
}

/// What the kernel says of a process' memory under this word, in KiB.
pub fn memory_of(pid: u32, word: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix(word)).expect("a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Whether we are root; says so if not.
pub fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip("needs root: a system bus, polkit and QEMU under another user");
    }
    root
}

/// What makes one system bus differ from another.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// polkit rules, JavaScript.
    pub rules: String,
    /// The bus policy; empty for `dbus-policy/org.virt.conf`.
    pub bus_policy: String,
    /// It has a network namespace of its own.
    pub own_network: bool,
}

impl Setup {
    /// With the shipped example rules.
    pub fn with_example_rules() -> Setup {
        Setup { rules: read_project_file("polkit/50-org.virt.example.rules"), ..Setup::default() }
    }
}

/// A private bus and, once started, a virtd on it.
pub struct Daemon {
    kind: &'static str,
    own_network: bool,
    /// Whom virtd runs as, if not as the user that runs the tests.
    user: Option<User>,
    /// virtd is run in a folder that shows all that there is, where the kernel gives nobody user namespaces.
    chroot: Option<PathBuf>,
    keeper: std::process::Child,
    virtd: Option<tokio::process::Child>,
    folder: tempfile::TempDir,
    /// Goes last: it watches the end, too.
    _watchdog: watchdog::Watchdog,
}

impl Daemon {
    /// A system bus with polkitd and a running virtd.
    pub async fn on_system_bus(setup: Setup) -> Option<Daemon> {
        let mut daemon = Daemon::system_bus(setup)?;
        daemon.start_virtd().await;
        Some(daemon)
    }

    /// A session bus and a running virtd, all as the user that runs the tests.
    pub async fn on_session_bus() -> Option<Daemon> {
        let mut daemon = Daemon::session_bus()?;
        daemon.start_virtd().await;
        Some(daemon)
    }

    /// A session bus, and virtd to be run as another user, who has no rights; all in a network namespace of their own, where
    /// that user may have ends of network devices. Nobody is on it.
    pub fn session_bus_of(user: User) -> Option<Daemon> {
        if !root() || !have(&["unshare", "nsenter", "setpriv", "dbus-daemon"]) {
            return None;
        }
        let folder = new_folder();
        std::fs::write(folder.path().join("users"), users::list()).unwrap();
        let mut daemon = Daemon::with_bus("session", folder, true)?;
        std::fs::create_dir(daemon.root()).unwrap();
        std::os::unix::fs::chown(daemon.root(), Some(user.uid), Some(user.uid)).unwrap();
        daemon.user = Some(user);
        Some(daemon)
    }

    /// From the next start on virtd of [`Daemon::session_bus_of`] can have no user namespaces.
    pub fn take_user_namespaces(&mut self) {
        let all = self.folder.path().join("all");
        std::fs::create_dir(&all).unwrap();
        let mounted = self.inside("mount").args(["--rbind", "/"]).arg(&all).status().unwrap();
        assert!(mounted.success(), "{mounted}");
        self.chroot = Some(all);
    }

    /// A system bus with polkitd, nobody on it.
    pub fn system_bus(setup: Setup) -> Option<Daemon> {
        if !root() || !have(&["unshare", "nsenter", "setpriv", "dbus-daemon", "gdbus", "polkitd"]) {
            return None;
        }
        let folder = new_folder();
        std::fs::write(folder.path().join("users"), users::list()).unwrap();
        std::fs::create_dir(folder.path().join("rules")).unwrap();
        std::fs::write(folder.path().join("rules/50-test.rules"), &setup.rules).unwrap();
        if !setup.bus_policy.is_empty() {
            std::fs::write(folder.path().join("policy.conf"), &setup.bus_policy).unwrap();
        }
        Daemon::with_bus("system", folder, setup.own_network)
    }

    /// A session bus, nobody on it.
    pub fn session_bus() -> Option<Daemon> {
        if !have(&["unshare", "nsenter", "dbus-daemon"]) {
            return None;
        }
        Daemon::with_bus("session", new_folder(), false)
    }

    fn with_bus(kind: &'static str, folder: tempfile::TempDir, own_network: bool) -> Option<Daemon> {
        let mut keeper = Command::new(project_file("tests/private-bus"))
            .args(own_network.then_some("--net"))
            .arg(kind)
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let watchdog = watchdog::Watchdog::new(folder.path(), keeper.id());
        let mut answer = String::new();
        BufReader::new(keeper.stdout.take().unwrap()).read_line(&mut answer).unwrap();
        if answer.trim() != "ready" {
            let output = keeper.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            if text.contains("unshare failed") {
                skip(&format!("namespaces are not allowed here: {}", text.trim()));
                return None;
            }
            panic!("no private bus: {text}");
        }
        Some(Daemon { kind, own_network, user: None, chroot: None, keeper, virtd: None, folder, _watchdog: watchdog })
    }

    /// Starts virtd and returns when it has the name, and has looked after every machine that was not whole.
    pub async fn start_virtd(&mut self) {
        self.start_virtd_with(&[]).await;
        let client = client::Client { connection: self.connect().await };
        let domains = client.domains().await;
        futures_util::future::join_all(domains.iter().map(client::Domain::is_looked_after)).await;
    }

    /// Starts virtd with further arguments and returns when it has the name: what was cut off may still be finished then.
    pub async fn start_virtd_with(&mut self, arguments: &[&str]) {
        assert!(self.virtd.is_none(), "one virtd at a time");
        let log =
            std::fs::File::options().create(true).append(true).open(self.folder.path().join("virtd.log")).unwrap();
        let virtd = self.program();
        let mut command = match self.user {
            None => self.inside(&virtd),
            Some(user) => {
                let mut command = match &self.chroot {
                    None => self.inside("setpriv"),
                    Some(all) => {
                        let mut command = self.inside("chroot");
                        command.arg(all).arg("setpriv");
                        command
                    }
                };
                command.arg(format!("--reuid={}", user.uid)).arg(format!("--regid={}", user.uid));
                command.args(["--clear-groups", "--inh-caps=-all", "--", &virtd]);
                command
            }
        };
        command.arg(format!("--{}", self.kind)).arg("--root").arg(self.root()).args(arguments);
        command.env("VIRTD_AT_STEP", self.step_plan());
        // What a test puts there is found before the host's own tools.
        let tools = self.folder.path().join("tools");
        if tools.exists() {
            command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", tools.display()));
        }
        if self.folder.path().join("journal").exists() {
            let stream = log.metadata().unwrap();
            command.env("JOURNAL_STREAM", format!("{}:{}", stream.dev(), stream.ino()));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut virtd = tokio::process::Command::from(command).spawn().unwrap();
        let named = tokio::select! {
            named = tokio::time::timeout(PATIENCE, self.name_appears()) => named.is_ok(),
            _ = virtd.wait() => false,
        };
        assert!(named, "virtd did not take its name:\n{}", self.log());
        self.virtd = Some(virtd);
    }

    /// virtd's program where whoever is to run it may: its network's dnsmasq, or a user without rights. Where it was built may be a
    /// home that is closed, and it is copied then.
    fn program(&self) -> String {
        let built = PathBuf::from(std::env::var_os("VIRTD").unwrap_or_else(|| env!("CARGO_BIN_EXE_virtd").into()));
        let built = std::fs::canonicalize(&built).unwrap_or_else(|error| panic!("{}: {error}", built.display()));
        let is_open = |path: &Path| std::fs::metadata(path).is_ok_and(|data| data.permissions().mode() & 0o001 != 0);
        let is_open = built.ancestors().all(is_open);
        let program = if is_open { built.clone() } else { self.folder.path().join("virtd") };
        if !program.exists() {
            // A file that is open for writing in this process runs in no other, while a third is just being made.
            let copied = Command::new("cp").args(["--link", "--force"]).args([&built, &program]).status().unwrap();
            let elsewhere = || Command::new("cp").args([&built, &program]).status().unwrap();
            assert!(copied.success() || elsewhere().success(), "{} is not copied", built.display());
        }
        program.to_str().expect("text").to_owned()
    }

    async fn name_appears(&self) {
        let connection = self.connect().await;
        let bus = zbus::fdo::DBusProxy::new(&connection).await.unwrap();
        let mut changes = bus.receive_name_owner_changed_with_args(&[(0, "org.virt")]).await.unwrap();
        if !bus.name_has_owner("org.virt".try_into().unwrap()).await.unwrap() {
            changes.next().await;
        }
    }

    /// Stands in for systemd's journal, before virtd is started: its socket. Needs root.
    pub fn journal(&self) -> std::os::unix::net::UnixDatagram {
        let folder = self.folder.path().join("journal");
        std::fs::create_dir(&folder).unwrap();
        let socket = std::os::unix::net::UnixDatagram::bind(folder.join("socket")).unwrap();
        let script =
            "mount -t tmpfs none /run && mkdir -p /run/systemd/journal && mount --bind \"$0\" /run/systemd/journal";
        let mounted = self.inside("sh").args(["-c", script]).arg(&folder).status().unwrap();
        assert!(mounted.success(), "{mounted}");
        socket
    }

    /// SIGKILLs virtd and waits until it has gone. Guests stay.
    pub async fn kill_virtd(&mut self) {
        self.virtd.take().expect("no virtd to kill").kill().await.unwrap();
    }

    /// What the QEMU of the only guest answers on its monitor while no virtd has it.
    pub fn asks_qemu(&self, questions: &[&str]) -> Vec<serde_json::Value> {
        let guests = std::fs::read_dir(self.root().join("run/virt/guests")).expect("its folder");
        let socket = guests.flatten().map(|guest| guest.path().join("monitor.sock")).next().expect("a guest");
        let mut line = std::os::unix::net::UnixStream::connect(socket).expect("its monitor");
        line.set_read_timeout(Some(PATIENCE)).expect("a limit");
        let mut lines = BufReader::new(line.try_clone().expect("a copy")).lines();
        let mut ask = |question: &str| {
            line.write_all(question.as_bytes()).expect("asked");
            loop {
                let told: serde_json::Value =
                    serde_json::from_str(&lines.next().expect("a line").expect("read")).expect("JSON");
                if told.get("return").is_some() || told.get("error").is_some() {
                    return told;
                }
            }
        };
        ask("{\"execute\":\"qmp_capabilities\"}\n");
        questions.iter().map(|question| ask(&format!("{question}\n"))).collect()
    }

    /// Runs a shell command at the `number`-th step of what is done to snapshots from now on.
    pub fn at_step(&self, number: u32, command: &str) {
        std::fs::write(self.step_plan(), format!("{number} {command}")).unwrap();
    }

    /// Whether that has happened; if it has not, it will not any more.
    pub fn step_came(&self) -> bool {
        std::fs::remove_file(self.step_plan()).is_err()
    }

    fn step_plan(&self) -> PathBuf {
        self.folder.path().join("at-step")
    }

    /// Waits until virtd has died.
    pub async fn virtd_died(&mut self) {
        let mut virtd = self.virtd.take().expect("no virtd that could have died");
        tokio::time::timeout(PATIENCE, virtd.wait()).await.expect("virtd does not die").unwrap();
    }

    /// SIGTERMs virtd and gives its exit status. Guests stay.
    pub async fn stop_virtd(&mut self) -> std::process::ExitStatus {
        let mut virtd = self.virtd.take().expect("no virtd to stop");
        let pid = nix::unistd::Pid::from_raw(virtd.id().unwrap().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        tokio::time::timeout(PATIENCE, virtd.wait()).await.expect("virtd does not end on SIGTERM").unwrap()
    }

    /// Ends polkitd, for good; the private bus starts no services.
    pub fn kill_polkitd(&self) {
        let pid = std::fs::read_to_string(self.folder.path().join("polkitd.pid")).unwrap();
        let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    /// virtd's process.
    pub fn virtd_pid(&self) -> u32 {
        self.virtd.as_ref().and_then(tokio::process::Child::id).expect("no virtd")
    }

    /// What virtd has in memory, in KiB.
    pub fn memory_kib(&self) -> u64 {
        memory_of(self.virtd_pid(), "VmRSS:")
    }

    /// The same without what it maps of files: of its own program the kernel has there what it likes.
    pub fn own_memory_kib(&self) -> u64 {
        memory_of(self.virtd_pid(), "RssAnon:")
    }

    /// The most that virtd has ever had in memory, in KiB.
    pub fn peak_memory_kib(&self) -> u64 {
        memory_of(self.virtd_pid(), "VmHWM:")
    }

    /// What virtd has taken of the processors, all its threads together.
    pub fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.virtd_pid())).expect("it runs");
        let fields = stat.rsplit(") ").next().expect("fields").split(' ').skip(11).take(2);
        let ticks: u64 = fields.map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
        let a_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().expect("ticks");
        Duration::from_millis(ticks * 1000 / a_second.cast_unsigned())
    }

    /// How many descriptors virtd has.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.virtd_pid())).expect("it runs").count()
    }

    /// The QEMU process that runs this daemon's guest of that name, if there is one.
    pub fn qemu_of(&self, name: &str) -> Option<nix::unistd::Pid> {
        let (guest, ours) = (format!("guest={name},"), self.root().to_string_lossy().into_owned());
        let mut found = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
            let command = std::fs::read(entry.path().join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).into_owned();
            let pid = entry.file_name().to_str()?.parse().ok()?;
            (command.contains(&guest) && command.contains(&ours)).then(|| nix::unistd::Pid::from_raw(pid))
        });
        let first = found.next();
        assert!(found.next().is_none(), "two QEMU for {name}");
        first
    }

    /// Waits until no process runs that guest.
    pub async fn qemu_gone(&self, name: &str) {
        if let Some(pid) = self.qemu_of(name) {
            let pidfd = rustix::process::pidfd_open(
                rustix::process::Pid::from_raw(pid.as_raw()).unwrap(),
                rustix::process::PidfdFlags::NONBLOCK,
            );
            // One that has gone meanwhile has no pidfd.
            let Ok(pidfd) = pidfd else { return };
            // SAFETY: the descriptor is owned by the wrapper and lives as long.
            let pidfd = unsafe { tokio::io::unix::AsyncFd::register(pidfd) }.unwrap();
            tokio::time::timeout(PATIENCE, pidfd.readable()).await.expect("QEMU ends").unwrap().retain_ready();
        }
    }

    /// Whether whoever runs QEMU on this bus may open /dev/kvm; says so if not.
    pub fn lends_kvm(&self) -> bool {
        if self.kind == "session" {
            return true;
        }
        let mut test = self.inside("setpriv");
        test.args([
            "--reuid=virt-qemu",
            "--regid=kvm",
            "--clear-groups",
            "--",
            "test",
            "-r",
            "/dev/kvm",
            "-a",
            "-w",
            "/dev/kvm",
        ]);
        let lent = test.status().unwrap().success();
        if !lent {
            skip("group kvm may not open /dev/kvm, and no node that it may open can be made here");
        }
        lent
    }

    /// The folder given to `virtd --root`.
    pub fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// A folder for the test's own files; everybody may pass through it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What virtd has written so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("virtd.log")).unwrap_or_default()
    }

    /// Waits until virtd has said that in its log, so many times in all.
    pub async fn has_logged(&self, words: &str, times: usize) {
        let file = self.folder.path().join("virtd.log");
        guest::until(&file, || self.log().matches(words).count() >= times).await;
    }

    /// `system` or `session`.
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// The bus, for anyone outside the namespace.
    pub fn address(&self) -> String {
        format!("unix:path={}/run/bus", self.folder.path().display())
    }

    /// A connection of the user that runs the tests.
    pub async fn connect(&self) -> zbus::Connection {
        zbus::connection::Builder::address(self.address().as_str()).method_timeout(ANSWERED).build().await.unwrap()
    }

    /// A connection of `user` from this process.
    pub async fn connect_as(&self, user: &User) -> zbus::Connection {
        let socket = users::connect_as(user, self.folder.path()).unwrap();
        zbus::connection::Builder::unix_stream(socket).user_id(user.uid).method_timeout(ANSWERED).build().await.unwrap()
    }

    /// A command in the namespace, with a clean environment, as the user that runs the tests.
    pub fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        if !nix::unistd::geteuid().is_root() {
            command.args(["--user", "--preserve-credentials"]);
        }
        command.args(self.own_network.then_some("--net"));
        command.args(["--mount", "--uts", "--root", "--wd", "--target", &self.keeper.id().to_string(), "--", program]);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
        if self.kind == "session" {
            command.env("DBUS_SESSION_BUS_ADDRESS", self.address());
        }
        command
    }

    /// A command in the namespace as `user`; the system bus is where it always is.
    pub fn as_user(&self, user: &User, program: &str) -> Command {
        let mut command = self.inside("setpriv");
        command.arg(format!("--reuid={}", user.name)).arg(format!("--regid={}", user.name));
        command.args(["--init-groups", "--inh-caps=-all", "--", program]);
        command
    }

    /// Runs busctl as `user` and gives its output, or what it said of the error.
    pub fn busctl(&self, user: &User, arguments: &[&str]) -> Result<String, String> {
        let output = self.as_user(user, "busctl").arg("--system").args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "---- virtd said ----\n{}", self.log());
        }
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// A file of the project.
pub fn project_file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// What is in a file of the project.
pub fn read_project_file(path: &str) -> String {
    std::fs::read_to_string(project_file(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A short path, since sockets stand below it, that everybody may pass through.
fn new_folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("virt-").tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    folder
}
