//! Real guests for tests: the boot sector of `tests/guests/tick.S`, run by QEMU without KVM; `kvmtick.S` beside it, run with
//! KVM; and a Linux.

use super::{Daemon, PATIENCE, have, project_file, skip};
use rustix::fs::inotify;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tokio::io::unix::AsyncFd;

/// A bootable image of tick, made once and kept below `target/`. `None` if tools are missing (and says so).
pub fn tick_image() -> Option<PathBuf> {
    have(&["qemu-system-x86_64", "qemu-img", "as", "ld"])
        .then(|| assembled("tick", "tick", include_str!("../guests/tick.S"), include_str!("../guests/make-tick")))
}

/// A bootable image of keys, which prints what its keyboard says. `None` if tools are missing (and says so).
fn keys_image() -> Option<PathBuf> {
    have(&["qemu-system-x86_64", "qemu-img", "as", "ld"])
        .then(|| assembled("keys", "tick", include_str!("../guests/keys.S"), include_str!("../guests/make-tick")))
}

/// The guest of that name as the script `make-MAKER` makes it of its source, kept below `target/`.
fn assembled(name: &str, maker: &str, source: &str, script: &str) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    (source, script).hash(&mut hasher);
    let guest = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{:016x}", hasher.finish()));
    if !guest.exists() {
        // Several tests may come here at once: each makes its own, and the last rename stands.
        let own = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap().into_temp_path();
        let status =
            Command::new(project_file(&format!("tests/guests/make-{maker}"))).arg(&own).arg(name).status().unwrap();
        assert!(status.success(), "make-{maker} failed");
        own.persist(&guest).unwrap();
    }
    guest
}

/// The firmware that kvmtick starts with.
const QBOOT: &str = "/usr/share/qemu/qboot.rom";

/// Whether guests can have KVM here: QEMU, run as we are, is asked. Says why if not.
fn have_kvm() -> bool {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        skip(&format!("/dev/kvm does not open: {error}"));
        return false;
    }
    let questions = ["qmp_capabilities", "query-kvm", "quit"].map(|verb| format!("{{\"execute\":\"{verb}\"}}\n"));
    let mut qemu = Command::new("timeout");
    qemu.args(["60", "qemu-system-x86_64", "-machine", "none,accel=kvm", "-nodefaults", "-S", "-display", "none"]);
    qemu.args(["-qmp", "stdio"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut qemu = qemu.spawn().unwrap();
    // One that has ended already says why below.
    let _ = qemu.stdin.take().unwrap().write_all(questions.concat().as_bytes());
    let told = qemu.wait_with_output().unwrap();
    let works = String::from_utf8_lossy(&told.stdout).contains("\"enabled\": true");
    if !works {
        skip(&format!("QEMU cannot use KVM: {}", String::from_utf8_lossy(&told.stderr).trim()));
    }
    works
}

/// The Linux guest: its kernel and initrd, made once from Debian packages and kept below `target/`. `None` if tools are
/// missing (and says so).
pub fn lin_files() -> Option<(PathBuf, PathBuf)> {
    if !have(&["qemu-system-x86_64", "apt-get", "dpkg-deb", "xz", "ldd"]) {
        return None;
    }
    let mut hasher = DefaultHasher::new();
    include_str!("../guests/make-lin").hash(&mut hasher);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("lin-{:016x}", hasher.finish()));
    if !folder.exists() {
        let own = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let status = Command::new(project_file("tests/guests/make-lin")).arg(own.path()).status().unwrap();
        assert!(status.success(), "make-lin failed");
        // Somebody else may have been as fast: theirs is as good.
        let _ = std::fs::rename(own.path(), &folder);
    }
    Some((folder.join("vmlinuz"), folder.join("initrd.img")))
}

/// Waits until something is so that comes with a write to a file, or with names that come to a folder or go from it.
pub async fn until(path: &Path, is: impl Fn() -> bool) {
    let waited = async {
        loop {
            // What happens after that look is told.
            let told = watched(path);
            if is() {
                return;
            }
            let _ = told.readable().await;
        }
    };
    let in_time = tokio::time::timeout(super::PATIENCE, waited).await;
    in_time.unwrap_or_else(|_| panic!("what is awaited of {} does not come", path.display()));
}

/// Tells of writes to a file, or of what becomes of the names in a folder.
fn watched(file: &Path) -> AsyncFd<std::os::fd::OwnedFd> {
    use inotify::WatchFlags as Of;
    let writes = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).unwrap();
    inotify::add_watch(&writes, file, Of::MODIFY | Of::CREATE | Of::DELETE | Of::MOVED_TO).unwrap();
    // SAFETY: the descriptor is owned by the wrapper and lives as long.
    unsafe { AsyncFd::register(writes) }.unwrap()
}

/// Waits until a guest writes to that file; one that has done so just now is not missed for long.
pub async fn written(file: &Path) {
    let writes = watched(file);
    let _ = tokio::time::timeout(std::time::Duration::from_millis(500), writes.readable()).await;
}

/// A tick of its own: disk, serial log, XML.
pub struct Tick {
    /// The domain's name.
    pub name: String,
    /// What to define.
    pub xml: String,
    /// Its disk.
    pub disk: PathBuf,
    /// What it prints.
    pub serial: PathBuf,
}

impl Tick {
    /// In `daemon`'s folder; `extra` goes into the XML as it is. `None` if tools are missing.
    pub fn new(daemon: &Daemon, name: &str, extra: &str) -> Option<Tick> {
        let image = tick_image()?;
        let tick = Tick::with(daemon, name, "qemu", "", extra);
        std::fs::copy(image, &tick.disk).unwrap();
        Some(tick)
    }

    /// A keys, which has these devices, too, and prints each byte that its keyboard sends.
    pub fn keys(daemon: &Daemon, name: &str, devices: &str) -> Option<Tick> {
        let image = keys_image()?;
        let mut guest = Tick::with(daemon, name, "qemu", "", "");
        guest.xml = guest.xml.replace("</devices>", &format!("{devices}</devices>"));
        std::fs::copy(image, &guest.disk).unwrap();
        Some(guest)
    }

    /// A kvmtick, which runs with KVM: as a tick, but its disk is blank and its boots are those of one process. `None` if
    /// tools or KVM are missing, for QEMU's user too where `daemon` is on a system bus (and says so).
    pub fn with_kvm(daemon: &Daemon, name: &str) -> Option<Tick> {
        if !have(&["qemu-system-x86_64", "qemu-img", "as", "ld", "timeout"]) || !have_kvm() || !daemon.lends_kvm() {
            return None;
        }
        if !Path::new(QBOOT).exists() {
            skip(&format!("{QBOOT} is not installed"));
            return None;
        }
        let kernel = daemon.folder().join(format!("{name}.elf"));
        let image = assembled(
            "kvmtick",
            "kvmtick",
            include_str!("../guests/kvmtick.S"),
            include_str!("../guests/make-kvmtick"),
        );
        std::fs::copy(image, &kernel).unwrap();
        let boots = format!("<loader type='rom'>{QBOOT}</loader><kernel>{}</kernel>", kernel.display());
        let cpu = "<cpu mode='host-passthrough'><feature policy='disable' name='arch-capabilities'/></cpu>";
        let tick = Tick::with(daemon, name, "kvm", &boots, cpu);
        let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&tick.disk).arg("1M").status();
        assert!(made.unwrap().success(), "qemu-img failed");
        Some(tick)
    }

    /// One of that kind, whose `<os>` also has `boots`, and which also has `extra`. Its disk is still to be made.
    fn with(daemon: &Daemon, name: &str, kind: &str, boots: &str, extra: &str) -> Tick {
        let file = |ending: &str| daemon.folder().join(format!("{name}.{ending}"));
        let (disk, serial) = (file("qcow2"), file("serial"));
        std::fs::write(&serial, "").unwrap();
        let xml = format!(
            "<domain type='{kind}'><name>{name}</name><memory unit='MiB'>16</memory>\
             <os><type arch='x86_64' machine='q35'>hvm</type>{boots}</os><features><acpi/></features>{extra}<devices>\
             <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/></disk>\
             <serial type='file'><source path='{}'/><target port='0'/></serial></devices></domain>",
            disk.display(),
            serial.display()
        );
        Tick { name: name.to_owned(), xml, disk, serial }
    }

    /// The last whole line that it printed, as (counter, boots).
    pub fn counted(&self) -> Option<(u32, u32)> {
        let text = std::fs::read_to_string(&self.serial).unwrap_or_default();
        let whole = &text[..text.rfind('\n')?];
        let mut words = whole.lines().last()?.split_whitespace();
        let mut number = |letter: char| {
            u32::from_str_radix(words.next()?.trim_start_matches(['E', 'P']).strip_prefix(letter)?, 16).ok()
        };
        Some((number('C')?, number('B')?))
    }

    /// Waits until it has counted to at least `counter`.
    pub async fn counts_to(&self, counter: u32) {
        self.says(|(count, _)| count >= counter).await;
    }

    /// Waits until it counts on from now.
    pub async fn goes_on(&self) {
        let now = std::fs::metadata(&self.serial).map_or(0, |data| data.len());
        self.says(|_| std::fs::metadata(&self.serial).is_ok_and(|data| data.len() > now + 32)).await;
    }

    /// Waits until its counter has gone back, below `counter`.
    pub async fn goes_back_below(&self, counter: u32) {
        self.says(|(count, _)| count < counter).await;
    }

    /// Waits until it has booted `boots` times and counts again, and its disk knows of that: it writes after each line.
    pub async fn boots_to(&self, boots: u32) {
        self.says(|(count, booted)| booted >= boots && count >= 2).await;
    }

    /// Waits until its last whole line is as wanted.
    async fn says(&self, wanted: impl Fn((u32, u32)) -> bool) {
        self.prints(|_| self.counted().is_some_and(&wanted)).await;
    }

    /// Waits until all that it has printed is as wanted.
    pub async fn prints(&self, wanted: impl Fn(&str) -> bool) {
        let (writes, until) = (watched(&self.serial), tokio::time::Instant::now() + PATIENCE);
        let printed = || std::fs::read_to_string(&self.serial).unwrap_or_default();
        while !wanted(&printed()) {
            let written = tokio::time::timeout_at(until, writes.readable()).await;
            let mut written = written.unwrap_or_else(|_| {
                let told = printed();
                panic!("{} said last {:?}", self.name, told.lines().rev().take(8).collect::<Vec<_>>())
            });
            let written = written.as_mut().unwrap();
            let _ = written.try_io(|writes| Ok(rustix::io::read(writes, &mut [0; 4096])?));
        }
    }
}

/// A block device, for a while: a loop device over a file.
pub struct LoopDevice(pub PathBuf);

impl LoopDevice {
    /// `None` where there are none (and says so).
    pub fn of(file: &Path) -> Option<LoopDevice> {
        LoopDevice::with(file, &[])
    }

    /// The same, of which the kernel looks for partitions.
    pub fn with_partitions(file: &Path) -> Option<LoopDevice> {
        LoopDevice::with(file, &["--partscan"])
    }

    fn with(file: &Path, options: &[&str]) -> Option<LoopDevice> {
        let made = Command::new("losetup").args(["--find", "--show"]).args(options).arg(file).output();
        let Some(made) = made.ok().filter(|made| made.status.success()) else {
            skip("no loop device to be had");
            return None;
        };
        Some(LoopDevice(PathBuf::from(String::from_utf8_lossy(&made.stdout).trim())))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}
