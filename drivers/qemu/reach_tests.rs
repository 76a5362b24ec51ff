//! The table of `docs/SECURITY.md`, row by row: what a process reaches that is started in the place of a guest's QEMU.
//!
//! ```text
//!   machine A ── a process that stands there ◀──┐
//!   machine B ── a process that tries ──────────┴─▶ its log, a line a row ──▶ compared with the table
//! ```
//!
//! Both are this test program, behind the walls of two machines. Needs QEMU, and root for the system's.

use super::*;
use crate::host::files::Program;
use crate::host::process::Identity;
use crate::host::test_program;
use crate::qemu::plan::{Companion, Loss, Role};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;
use std::time::Duration;
use uuid::Uuid;
use virt_model::driver::{Driver, Recorder};

/// What tells the process in a guest's place what to do.
const TASK: &str = "VIRTD_IN_A_GUESTS_PLACE";
/// Longer than anything takes on a busy host.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Default)]
struct Disk(Mutex<Value>);

impl Recorder for Disk {
    fn record(&self, data: Value) -> io::Result<()> {
        *self.0.lock().unwrap() = data;
        Ok(())
    }
}

/// A machine whose QEMU is this program.
struct Machine {
    uuid: Uuid,
    disk: PathBuf,
    runtime: PathBuf,
    log: PathBuf,
    record: Arc<Disk>,
    cancel: CancellationToken,
    /// Its start has come to its end.
    ended: CancellationToken,
    task: tokio::task::JoinHandle<Option<DriverError>>,
}

impl Machine {
    /// Starts one that does `task`.
    async fn start(driver: &QemuDriver, dir: &Path, task: Value) -> Machine {
        Machine::start_beside(driver, dir, task, Vec::new()).await
    }

    /// Starts one that does `task`, with those companions.
    async fn start_beside(driver: &QemuDriver, dir: &Path, task: Value, companions: Vec<Companion>) -> Machine {
        let uuid = Uuid::new_v4();
        let (disk, runtime) = (dir.join(format!("{uuid}.img")), dir.join(format!("run-{uuid}")));
        std::fs::write(&disk, vec![0; 1 << 16]).unwrap();
        std::fs::set_permissions(&disk, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::create_dir(&runtime).unwrap();
        let xml = format!(
            "<domain type='qemu'><name>m-{uuid}</name><uuid>{uuid}</uuid><memory unit='MiB'>16</memory>
             <os><type arch='x86_64' machine='q35'>hvm</type></os><devices><disk type='file'><driver type='raw'/>
             <source file='{}'/><target dev='vda'/></disk></devices></domain>",
            disk.display()
        );
        let mut def = DomainDef::parse(&xml).unwrap();
        driver.complete(&mut def).await.unwrap();
        let (events, _) = virt_model::driver::reports();
        let (record, cancel, log) = (Arc::<Disk>::default(), CancellationToken::new(), dir.join(format!("{uuid}.log")));
        let launch = Launch {
            accepted: Default::default(),
            paused: false,
            reset_nvram: false,
            from: None,
            log_file: log.clone(),
            def: std::sync::Arc::new(def),
            runtime_dir: runtime.clone(),
            recorder: record.clone(),
            events,
            cancel: cancel.clone(),
        };
        let Beginning { mut start, ground, live, ports } = driver.starting(launch, cancel.clone()).await.unwrap();
        start.command.program = std::env::current_exe().unwrap();
        start.program = Arc::new(Program::at(&start.command.program, false).unwrap());
        start.command.companions = companions;
        start.command.args = ["--exact", "qemu::reach_tests::in_a_guests_place", "--nocapture", "--test-threads=1"]
            .map(str::to_owned)
            .to_vec();
        let mut task = task;
        task["disk"] = json!(disk);
        task["room"] = json!(runtime.join("qemu"));
        start.command.env.push((TASK.to_owned(), task.to_string()));
        let ended = CancellationToken::new();
        let ends = ended.clone().drop_guard();
        let task = tokio::spawn(async move {
            let (_ports, _ends) = (ports, ends);
            // It never says hello.
            start.run(ground, live).await.err()
        });
        Machine { uuid, disk, runtime, log, record, cancel, ended, task }
    }

    /// Waits until it has said `line`; gives all that it said.
    async fn says(&self, line: &str) -> String {
        let said = async {
            loop {
                // What is written after that look is told.
                let told = written_below(self.log.parent().unwrap());
                let ended = self.ended.is_cancelled();
                let said = std::fs::read_to_string(&self.log).unwrap_or_default();
                if said.lines().any(|one| one == line) || ended {
                    return said;
                }
                tokio::select! {
                    _ = told.readable() => {}
                    () = self.ended.cancelled() => {}
                }
            }
        };
        tokio::time::timeout(PATIENCE, said).await.unwrap_or_else(|_| panic!("it did not say '{line}'"))
    }

    fn identity(&self) -> Identity {
        serde_json::from_value(self.record.0.lock().unwrap()["process"].clone()).unwrap()
    }

    /// Ends it; gives why its start failed.
    async fn end(self) -> Option<DriverError> {
        self.cancel.cancel();
        self.task.await.unwrap()
    }
}

/// Tells of what comes to be, or is written, in the files of a folder.
fn written_below(folder: &Path) -> tokio::io::unix::AsyncFd<std::os::fd::OwnedFd> {
    use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
    let told = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
    add_watch(&told, folder, WatchFlags::CREATE | WatchFlags::MODIFY).unwrap();
    // SAFETY: the descriptor is owned by the wrapper and lives as long.
    unsafe { tokio::io::unix::AsyncFd::register(told) }.unwrap()
}

/// Row, and what the table says of it in that column.
fn table(column: usize) -> BTreeMap<String, String> {
    let page = include_str!("../../docs/SECURITY.md");
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let words = |line: &str| line.split('|').map(|word| word.trim().trim_matches('`').to_owned()).collect::<Vec<_>>();
    rows.map(words).map(|words| (words[1].clone(), words[column].clone())).collect()
}

async fn compare(system: bool) {
    if system && !nix::unistd::geteuid().is_root() || !Path::new("/usr/bin/qemu-system-x86_64").exists() {
        return eprintln!("SKIPPED: needs QEMU, and root for the system's");
    }
    if system && !matches!(nix::unistd::User::from_name("virt-qemu"), Ok(Some(_))) {
        return eprintln!("SKIPPED: there is no user virt-qemu");
    }
    // Guests inherit no more than we have: the row 'descriptors' is to be theirs.
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    assert!(most > beside::DESCRIPTORS, "this host gives its processes {most} descriptors; raise that (ulimit -Hn)");
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let config = DriverConfig { guest_overhead: 192 << 20, ..DriverConfig::below(dir.path(), system) };
    let driver = QemuDriver::new(&config);
    std::fs::write(dir.path().join("public"), "for everybody").unwrap();
    std::fs::set_permissions(dir.path().join("public"), std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::create_dir_all(config.secrets.administrators_folder()).unwrap();
    std::fs::write(config.secrets.administrators_folder().join("key"), "secret").unwrap();
    let name = Uuid::new_v4().to_string();
    let _abstract = UnixListener::bind_addr(&abstract_address(&name)).unwrap();
    // SAFETY: plain calls; the segment is marked to go at once, when nobody has it.
    let segment = unsafe { libc::shmget(libc::IPC_PRIVATE, 4096, libc::IPC_CREAT | 0o666) };
    assert!(segment >= 0);

    let victim = Machine::start(&driver, dir.path(), json!({ "do": "stand" })).await;
    let said = victim.says("standing").await;
    assert!(said.lines().any(|line| line == "standing"), "{said}");
    let address = said.lines().find_map(|line| line.strip_prefix("secret at ")).unwrap().to_owned();
    let task = json!({
        "do": "try", "pid": victim.identity().pid, "address": address, "other_disk": victim.disk,
        "other_room": victim.runtime.join("qemu"), "other_monitor": victim.runtime.join("monitor.sock"),
        "virtd": std::process::id(), "state": config.state_dir, "secrets": config.secrets.administrators_folder(),
        "public": dir.path().join("public"), "abstract": name, "segment": segment, "all": system,
    });
    let attacker = Machine::start(&driver, dir.path(), task).await;
    let said = attacker.says("done").await;
    // SAFETY: as above.
    unsafe { libc::shmctl(segment, libc::IPC_RMID, std::ptr::null_mut()) };
    assert!(Identity::open(&victim.identity()).unwrap().is_some(), "the other has been ended");
    assert!(std::fs::read(&victim.disk).unwrap().iter().all(|byte| *byte == 0), "the other's disk has been written");
    let (one, other) = (victim.uuid, attacker.uuid);
    assert_ne!(one, other);
    attacker.end().await;
    victim.end().await;
    let seen: BTreeMap<String, String> = said
        .lines()
        .filter_map(|line| line.strip_prefix("row ")?.split_once(' '))
        .map(|(row, what)| (row.to_owned(), what.to_owned()))
        .collect();
    let mut differ = Vec::new();
    for (row, wanted) in table(if system { 3 } else { 4 }) {
        let seen = seen.get(&row).map_or("not tried", String::as_str);
        let fine = match &*wanted {
            "denied" => seen == "denied",
            "given" => seen.starts_with("reached"),
            "same user" => true,
            _ => false,
        };
        if !fine {
            differ.push(format!("{row}: the table says '{wanted}', and it was {seen}"));
        }
    }
    let rows = table(3);
    differ.extend(seen.keys().filter(|row| !rows.contains_key(*row)).map(|row| format!("{row} is not in the table")));
    assert!(differ.is_empty(), "{}\n{said}", differ.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_over_qemu_reaches_what_the_table_says() {
    compare(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_session_bus_it_reaches_what_the_table_says() {
    if let Some(why) = crate::host::wall::obstacle() {
        return eprintln!("SKIPPED: needs user namespaces: {why}");
    }
    if !nix::unistd::geteuid().is_root() {
        return compare(false).await;
    }
    // Nobody's session is not root's.
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = dir.path().join("tests");
    test_program::copy_of_ours(&program);
    let mut command = std::process::Command::new(&program);
    command.args(["--exact", "qemu::reach_tests::on_a_session_bus_it_reaches_what_the_table_says", "--nocapture"]);
    let ran = command.uid(NOBODY).gid(NOBODY).current_dir("/").output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success() && said.contains("1 passed") && !said.contains("SKIPPED"), "{said}");
}

/// Rule 1 for what runs beside QEMU: root runs nothing that others could have put there.
#[tokio::test(flavor = "multi_thread")]
async fn a_companion_that_others_can_change_is_not_run() {
    if !nix::unistd::geteuid().is_root() || !Path::new("/usr/bin/qemu-system-x86_64").exists() {
        return eprintln!("SKIPPED: needs root and QEMU");
    }
    if !matches!(nix::unistd::User::from_name("virt-qemu"), Ok(Some(_))) {
        return eprintln!("SKIPPED: there is no user virt-qemu");
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let driver = QemuDriver::new(&DriverConfig::below(dir.path(), true));
    let (program, mark) = (dir.path().join("virtiofsd"), dir.path().join("ran"));
    test_program::script(&program, &format!("echo > {}", mark.display()));
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o757)).unwrap();
    let beside = Companion::new("virtiofsd", Role::Beside(Loss::Bear));
    let companion = Companion { program: program.clone(), privileged: true, ..beside };
    let machine = Machine::start_beside(&driver, dir.path(), json!({ "do": "stand" }), vec![companion]).await;
    machine.says("standing").await;
    let refused = machine.end().await.unwrap().to_string();
    let why = "can be changed by others than root; install it system-wide";
    assert!(refused.starts_with(program.to_str().unwrap()) && refused.contains(why), "{refused}");
    assert!(!mark.exists());
}

fn abstract_address(name: &str) -> std::os::unix::net::SocketAddr {
    use std::os::linux::net::SocketAddrExt;
    std::os::unix::net::SocketAddr::from_abstract_name(name.as_bytes()).unwrap()
}

/// Does nothing, unless it is run where a guest's QEMU would be.
#[test]
fn in_a_guests_place() {
    let Ok(task) = std::env::var(TASK) else { return };
    let task: Value = serde_json::from_str(&task).unwrap();
    match task["do"].as_str() {
        Some("stand") => stand(&task),
        _ => attack(&task),
    }
}

/// Has what others would like to have, and stays.
fn stand(task: &Value) {
    let secret: &'static [u8] = Box::leak(Box::new(*b"the other guest's memory"));
    let _socket = UnixListener::bind(path(task, "room").join("own.sock")).unwrap();
    println!("\nsecret at {}\nstanding", secret.as_ptr() as usize);
    loop {
        std::thread::park();
    }
}

fn path(task: &Value, key: &str) -> PathBuf {
    PathBuf::from(task[key].as_str().unwrap())
}

/// Ways to reach what a row names; each tells whether it got there.
type Ways<'a> = Vec<(&'static str, Box<dyn FnOnce() -> bool + 'a>)>;

fn attack(task: &Value) {
    for (row, ways) in rows(task) {
        let reached: Vec<&str> = ways.into_iter().filter_map(|(name, way)| way().then_some(name)).collect();
        match reached.is_empty() {
            true => println!("\nrow {row} denied"),
            false => println!("\nrow {row} reached by {}", reached.join(", ")),
        }
    }
    println!("\ndone");
}

fn way<'a>(name: &'static str, way: impl FnOnce() -> bool + 'a) -> (&'static str, Box<dyn FnOnce() -> bool + 'a>) {
    (name, Box::new(way))
}

fn readable(path: impl AsRef<Path>) -> bool {
    let path = path.as_ref();
    std::fs::read_dir(path).is_ok()
        || std::fs::File::open(path).is_ok()
        || File::options().write(true).open(path).is_ok()
}

use std::fs::File;

fn rows(task: &Value) -> Vec<(&'static str, Ways<'_>)> {
    let pid = task["pid"].as_i64().unwrap() as i32;
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let inside = move |path: PathBuf| root.join(path.strip_prefix("/").unwrap());
    let mut rows = vec![
        (
            "own-disk",
            vec![way("its path", move || File::options().read(true).write(true).open(path(task, "disk")).is_ok())],
        ),
        ("own-room", vec![way("a file", move || std::fs::write(path(task, "room").join("file"), "x").is_ok())]),
        (
            "other-disk",
            vec![way("its path", move || readable(path(task, "other_disk"))), {
                let there = inside(path(task, "other_disk"));
                way("the other's root", move || readable(there))
            }],
        ),
        ("other-memory", vec![way("/proc", move || peek(pid, task).is_ok())]),
        ("other-traced", traced(pid, task)),
        ("other-room", {
            let room = path(task, "other_room");
            let there = inside(room.clone());
            vec![
                way("a look", move || readable(room)),
                way("the other's root", move || readable(there)),
                way("its socket", move || UnixStream::connect(path(task, "other_room").join("own.sock")).is_ok()),
                way("its monitor", move || UnixStream::connect(path(task, "other_monitor")).is_ok()),
            ]
        }),
        ("other-seen", vec![way("/proc", move || Path::new(&format!("/proc/{pid}/status")).exists())]),
        ("signals", {
            let virtd = task["virtd"].as_i64().unwrap() as i32;
            // Where it has processes of its own it is their first.
            let own = std::process::id() as i32;
            let others = [pid, virtd, 1].into_iter().filter(|whom| *whom != own);
            // SAFETY: signal 0 does nothing.
            others.map(|whom| way("kill", move || unsafe { libc::kill(whom, 0) == 0 })).collect()
        }),
        (
            "state",
            vec![
                way("its folder", move || readable(path(task, "state"))),
                way("uids", move || readable(path(task, "state").join("uids.json"))),
                way("secrets", move || readable(path(task, "secrets").join("key"))),
            ],
        ),
    ];
    rows.push(("descriptors", vec![way("copies", || copies(TOO_MANY) == TOO_MANY)]));
    rows.extend(host_rows(task));
    rows.extend(kernel_rows());
    rows.push(("threads", vec![way("processes", || children(5000) == 5000)]));
    // A host's /run and memory are not to be tried out where nothing stands in the way.
    if task["all"] == true {
        rows.extend(filling_rows(task));
    }
    rows
}

fn peek(pid: i32, task: &Value) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let address: u64 = task["address"].as_str().unwrap().parse().unwrap();
    let mut byte = [0];
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut byte, address)
}

fn traced<'a>(pid: i32, task: &Value) -> Ways<'a> {
    let address: usize = task["address"].as_str().unwrap().parse().unwrap();
    // SAFETY: the other is held and let go; the byte lives across the call.
    vec![
        way("ptrace", move || unsafe {
            let held = libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) == 0;
            if held {
                libc::ptrace(libc::PTRACE_DETACH, pid, 0, 0);
            }
            held
        }),
        way("process_vm_readv", move || unsafe {
            let mut byte = 0u8;
            let to = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
            let from = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: 1 };
            libc::process_vm_readv(pid, &to, 1, &from, 1, 0) == 1
        }),
    ]
}

fn host_files(task: &Value) -> Ways<'_> {
    let fixed = [
        "/etc/passwd",
        "/etc/shadow",
        "/root",
        "/home",
        "/var/lib",
        "/var/log",
        "/boot",
        "/run/virt",
        "/sys/fs",
        "/proc/sys",
    ];
    // The program is there: folders above it are.
    let program = std::env::current_exe().unwrap();
    let others = fixed.into_iter().filter(|file| !program.starts_with(file));
    let mut ways: Ways = others.map(|file| way(file, move || readable(file))).collect();
    ways.push(way("what everybody may read", move || readable(path(task, "public"))));
    ways
}

fn devices(task: &Value) -> Ways<'_> {
    let nodes = [
        "/dev/kvm",
        "/dev/vda",
        "/dev/sda",
        "/dev/mem",
        "/dev/kmsg",
        "/dev/net/tun",
        "/dev/vhost-net",
        "/dev/fuse",
        "/dev/tty",
        "/dev/console",
    ];
    let mut ways: Ways = nodes.into_iter().map(|node| way(node, move || Path::new(node).exists())).collect();
    ways.push(way("a node of its own", move || {
        use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
        let node = path(task, "room").join("node");
        mknodat(CWD, &node, FileType::CharacterDevice, Mode::RWXU, makedev(1, 1)).is_ok()
    }));
    ways
}

fn host_rows(task: &Value) -> Vec<(&'static str, Ways<'_>)> {
    let socket = |family| {
        // SAFETY: makes a descriptor, which is closed.
        unsafe {
            let fd = libc::socket(family, libc::SOCK_DGRAM, 0);
            libc::close(fd);
            fd >= 0
        }
    };
    let segment = task["segment"].as_i64().unwrap() as i32;
    vec![
        ("host-files", host_files(task)),
        ("devices", devices(task)),
        (
            "bus",
            vec![
                way("the system bus", || UnixStream::connect("/run/dbus/system_bus_socket").is_ok()),
                way("an abstract socket", move || {
                    UnixStream::connect_addr(&abstract_address(task["abstract"].as_str().unwrap())).is_ok()
                }),
            ],
        ),
        (
            "network",
            vec![
                way("a socket", move || socket(libc::AF_INET)),
                way("version 6", move || socket(libc::AF_INET6)),
                way("netlink", move || socket(libc::AF_NETLINK)),
            ],
        ),
        // SAFETY: a segment is attached where the kernel likes.
        (
            "ipc",
            vec![way("shmat", move || unsafe {
                libc::shmat(segment, std::ptr::null(), libc::SHM_RDONLY) as isize != -1
            })],
        ),
        (
            "odd-sockets",
            [libc::AF_ALG, libc::AF_PACKET, libc::AF_VSOCK]
                .map(|family| way("a socket", move || socket(family)))
                .into_iter()
                .collect(),
        ),
    ]
}

fn kernel_rows<'a>() -> Vec<(&'static str, Ways<'a>)> {
    /// A system call that fails with an error of its own where it is let through: its arguments are nonsense.
    fn let_through(number: i64, arguments: [usize; 5], refusals: &[i32]) -> bool {
        let [a, b, c, d, e] = arguments;
        // SAFETY: none of the calls below writes to memory of ours with these arguments.
        let done = unsafe { libc::syscall(number, a, b, c, d, e) };
        done >= 0 || !refusals.contains(&io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }
    let refused = [libc::EPERM, libc::ENOSYS];
    let call = move |name, number, arguments| way(name, move || let_through(number, arguments, &refused));
    let unshare = |flag: i32| call("unshare", libc::SYS_unshare, [flag as usize, 0, 0, 0, 0]);
    vec![
        (
            "kernel",
            vec![
                call("io_uring", libc::SYS_io_uring_setup, [1, 0, 0, 0, 0]),
                call("bpf", libc::SYS_bpf, [usize::MAX, 0, 0, 0, 0]),
                call("keyctl", libc::SYS_keyctl, [usize::MAX, 0, 0, 0, 0]),
                call("add_key", libc::SYS_add_key, [0, 0, 0, 0, 0]),
                call("perf", libc::SYS_perf_event_open, [0, 0, 0, 0, 0]),
                call("userfaultfd", libc::SYS_userfaultfd, [usize::MAX, 0, 0, 0, 0]),
            ],
        ),
        (
            "namespaces",
            vec![
                unshare(libc::CLONE_NEWUSER),
                unshare(libc::CLONE_NEWNET),
                unshare(libc::CLONE_NEWNS),
                call("setns", libc::SYS_setns, [usize::MAX, 0, 0, 0, 0]),
                call("clone3", libc::SYS_clone3, [0, 0, 0, 0, 0]),
                // SAFETY: a child would end at once.
                way("clone", || unsafe {
                    match libc::syscall(libc::SYS_clone, libc::CLONE_NEWUSER | libc::SIGCHLD, 0, 0, 0, 0) {
                        0 => libc::_exit(0),
                        made => made > 0,
                    }
                }),
            ],
        ),
        (
            "mounts",
            vec![
                call("mount", libc::SYS_mount, [0, 0, 0, 0, 0]),
                call("umount", libc::SYS_umount2, [0, 0, 0, 0, 0]),
                call("open_tree", libc::SYS_open_tree, [usize::MAX, 0, 0, 0, 0]),
                call("fsopen", libc::SYS_fsopen, [0, 0, 0, 0, 0]),
                call("chroot", libc::SYS_chroot, [0, 0, 0, 0, 0]),
            ],
        ),
        (
            "privileges",
            vec![
                way("what it has", || {
                    let status = std::fs::read_to_string("/proc/self/status").unwrap();
                    let value = |key| status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim();
                    value("NoNewPrivs:") != "1"
                }),
                way("set-user-id programs", || {
                    let su =
                        std::process::Command::new("/usr/bin/mount").args(["-t", "tmpfs", "none", "/usr"]).status();
                    su.is_ok_and(|status| status.success())
                }),
            ],
        ),
    ]
}

fn filling_rows(task: &Value) -> Vec<(&'static str, Ways<'_>)> {
    let room = path(task, "room");
    vec![
        ("fill-room", {
            let (bytes, names) = (room.join("large"), room);
            vec![
                way("bytes", move || {
                    let mut file = File::create(&bytes).unwrap();
                    let filled = (0..32).all(|_| file.write_all(&[1; 1 << 20]).is_ok());
                    std::fs::remove_file(bytes).unwrap();
                    filled
                }),
                way("names", move || {
                    let made = (0..2000).take_while(|n| File::create(names.join(format!("n{n}"))).is_ok()).count();
                    (0..made).for_each(|n| std::fs::remove_file(names.join(format!("n{n}"))).unwrap());
                    made == 2000
                }),
            ]
        }),
        ("memory", vec![way("a child", takes_memory)]),
    ]
}

/// More descriptors than a process may have.
const TOO_MANY: usize = beside::DESCRIPTORS as usize + 1;

/// Makes up to that many copies of a descriptor, and closes them; how many there were.
fn copies(most: usize) -> usize {
    // SAFETY: plain calls; what is closed is what was made.
    unsafe {
        let made: Vec<i32> = (0..most).map(|_| libc::dup(0)).take_while(|fd| *fd >= 0).collect();
        made.iter().for_each(|fd| assert_eq!(libc::close(*fd), 0));
        made.len()
    }
}

/// Makes up to that many processes, which all end with the pipe that they read; how many there were.
fn children(most: usize) -> usize {
    let mut ends = [0; 2];
    // SAFETY: plain calls; the children make none but these.
    unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        let mut made = 0;
        while made < most {
            match libc::fork() {
                -1 => break,
                0 => {
                    libc::close(ends[1]);
                    let mut byte = 0u8;
                    libc::read(ends[0], (&raw mut byte).cast(), 1);
                    libc::_exit(0);
                }
                _ => made += 1,
            }
        }
        libc::close(ends[1]);
        libc::close(ends[0]);
        for _ in 0..made {
            libc::wait(std::ptr::null_mut());
        }
        made
    }
}

/// Whether a child may write to half a GiB more than its machine has.
fn takes_memory() -> bool {
    let mut ends = [0; 2];
    // SAFETY: plain calls; the child writes to memory that it was given, and ends.
    unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        if libc::fork() == 0 {
            const SIZE: usize = 768 << 20;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let at = libc::mmap(std::ptr::null_mut(), SIZE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if at != libc::MAP_FAILED {
                for page in (0..SIZE).step_by(4096) {
                    at.cast::<u8>().add(page).write_volatile(1);
                }
                libc::write(ends[1], b"!".as_ptr().cast(), 1);
            }
            libc::_exit(0);
        }
        libc::close(ends[1]);
        let mut said = Vec::new();
        File::from_raw_fd(ends[0]).read_to_end(&mut said).unwrap();
        libc::wait(std::ptr::null_mut());
        !said.is_empty()
    }
}
