//! Control groups: what of the host the processes of one guest may use. Version 1 (a tree for each controller) and version 2
//! (one tree), as this host has them mounted.
//!
//! Groups are made below our own, so that whoever limits virtd limits its guests too. Version 2 allows no process in a group
//! that has groups with limits below it, so virtd itself moves into one called `virtd` first.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the kernel shows them.
const MOUNT: &str = "/sys/fs/cgroup";

/// As much memory as a group can be allowed: the kernel takes it for no limit.
pub const UNLIMITED: u64 = 9_223_372_036_854_771_712;
/// How long a period is where nothing is said.
const USUAL_PERIOD: u64 = 100_000;

/// What a group may use. Sizes in bytes, times in microseconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Limits {
    /// Weight of CPU time beside other groups.
    pub cpu_shares: Option<u64>,
    /// CPU time of the whole group.
    pub cpu: Quota,
    /// Memory, never more.
    pub memory: Option<u64>,
    /// Memory, while the host needs it.
    pub memory_soft: Option<u64>,
    /// Memory and swap.
    pub memory_and_swap: Option<u64>,
    /// Weight of I/O beside other groups.
    pub io_weight: Option<u32>,
    /// By device.
    pub io: Vec<IoLimits>,
}

/// CPU time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// How long a period is.
    pub period_us: Option<u64>,
    /// What may be run in one; negative: no limit.
    pub quota_us: Option<i64>,
}

impl Quota {
    /// Whether nothing is said.
    pub fn is_none(self) -> bool {
        self == Quota::default()
    }

    /// The same, where what `before` says and this does not is as the kernel has it by itself.
    pub fn lifting(self, before: Quota) -> Quota {
        Quota {
            period_us: self.period_us.or(before.period_us.map(|_| USUAL_PERIOD)),
            quota_us: self.quota_us.or(before.quota_us.map(|_| -1)),
        }
    }
}

/// I/O of one device.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IoLimits {
    /// The device.
    pub path: PathBuf,
    /// Weight beside other groups.
    pub weight: Option<u32>,
    /// Operations and bytes a second: reads, writes, bytes read, bytes written.
    pub rates: [Option<u64>; 4],
}

/// The trees as they are mounted, and our own place in each.
pub struct Trees {
    mount: PathBuf,
    own: String,
}

/// The group of one guest.
pub struct Group {
    version: Version,
    name: String,
}

/// Where a guest's groups are made.
enum Version {
    /// Controllers and our place in each.
    One(Vec<(&'static str, PathBuf)>),
    /// Our place in the one tree.
    Two(Unified),
}

/// Our place in the tree of version 2.
struct Unified {
    folder: PathBuf,
    /// We have moved into a group of our own in it.
    moved_aside: bool,
}

const CONTROLLERS: [&str; 4] = ["cpu", "memory", "blkio", "pids"];

impl Trees {
    /// Those of this host.
    pub fn of_host() -> Trees {
        Trees::at(Path::new(MOUNT), &fs::read_to_string("/proc/self/cgroup").unwrap_or_default())
    }

    /// Those mounted at `mount`; `own` is what the kernel says of our place.
    pub fn at(mount: &Path, own: &str) -> Trees {
        Trees { mount: mount.to_owned(), own: own.to_owned() }
    }

    /// The group called `name`, which may not exist yet.
    pub fn group(&self, name: &str) -> Group {
        let unified = self.mount.join("cgroup.controllers").exists();
        let version = if unified { self.base() } else { Version::One(self.controllers()) };
        Group { version, name: name.to_owned() }
    }

    /// What the weight of a group is where nothing is said.
    pub fn usual_shares(&self) -> u64 {
        if self.mount.join("cgroup.controllers").exists() { 100 } else { 1024 }
    }

    /// Our place in the one tree of version 2, or what was before we moved aside.
    fn base(&self) -> Version {
        let path = self.own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
        let before = path.strip_suffix("/virtd");
        let folder = self.mount.join(before.unwrap_or(path).trim_start_matches('/'));
        Version::Two(Unified { folder, moved_aside: before.is_some() })
    }

    fn controllers(&self) -> Vec<(&'static str, PathBuf)> {
        let own = |controller: &&'static str| {
            let mut lines = self.own.lines().map(|line| line.splitn(3, ':').collect::<Vec<_>>());
            let line = lines.find(|words| words.len() == 3 && words[1].split(',').any(|word| word == *controller))?;
            // Controllers mounted together have a link each.
            let tree = self.mount.join(controller);
            tree.exists().then(|| (*controller, tree.join(line[2].trim_start_matches('/'))))
        };
        CONTROLLERS.iter().filter_map(own).collect()
    }
}

impl Group {
    /// Makes the group, sets what is said in `limits`, and puts the process into it. Errors name the file, and so the
    /// controller that is missing.
    pub fn hold(&self, pid: i32, limits: &Limits) -> io::Result<()> {
        match &self.version {
            Version::One(controllers) => self.hold_one(controllers, pid, limits),
            Version::Two(place) => self.hold_two(place, pid, limits),
        }
    }

    /// Puts the process into the group and bounds what it may take of the host where nobody has said what: threads, of all
    /// processes of the group, and bytes of memory. Errors name what could not be set; what could is.
    pub fn bound(&self, pid: i32, threads: u64, memory: u64) -> io::Result<()> {
        self.bound_member(Some(("cgroup.procs", pid)), threads, memory)
    }

    /// Holds those that are in it already to other bounds.
    pub fn bound_anew(&self, threads: u64, memory: u64) -> io::Result<()> {
        self.bound_member(None, threads, memory)
    }

    /// The same for the calling thread and the processes that it makes from now on, which are never anywhere else: the
    /// kernel moves a process only once all processors have let go of it, which may take 10 ms. `false`: groups of version 2
    /// take whole processes, and nothing was done.
    pub fn bound_thread(&self, threads: u64, memory: u64) -> io::Result<bool> {
        match &self.version {
            Version::One(_) => self.bound_member(Some(("tasks", 0)), threads, memory).map(|()| true),
            Version::Two(_) => Ok(false),
        }
    }

    /// `member`: in which file of the group it is named, and how; `None` is nobody more.
    fn bound_member(&self, member: Option<(&str, i32)>, threads: u64, memory: u64) -> io::Result<()> {
        let bounds =
            [("pids", "pids.max", "pids.max", threads), ("memory", "memory.limit_in_bytes", "memory.max", memory)];
        let mut missed = Vec::new();
        for (controller, one, two, most) in bounds {
            let bounded = match &self.version {
                Version::One(controllers) => place(controllers, controller).and_then(|place| {
                    let folder = place.join(&self.name);
                    make(&folder)?;
                    write(&folder.join(one), most)?;
                    member.map_or(Ok(()), |(file, member)| write(&folder.join(file), member))
                }),
                Version::Two(place) => self.own_folder(place).and_then(|folder| {
                    write(&place.folder.join("cgroup.subtree_control"), format!("+{controller}"))?;
                    write(&folder.join(two), most)
                }),
            };
            missed.extend(bounded.err().map(|error| error.to_string()));
        }
        if let (Version::Two(place), Some((file, member))) = (&self.version, member) {
            let within = write(&place.folder.join(&self.name).join(file), member);
            missed.extend(within.err().map(|error| error.to_string()));
        }
        if missed.is_empty() { Ok(()) } else { Err(io::Error::other(missed.join("; "))) }
    }

    /// Limits the CPU time of one thread of the process held.
    pub fn hold_thread(&self, name: &str, thread: i32, quota: Quota) -> io::Result<()> {
        match &self.version {
            Version::One(controllers) => {
                let guest = place(controllers, "cpu")?.join(&self.name);
                let folder = guest.join(name);
                // Where nothing is said of the whole guest its group is not there yet.
                make(&guest)?;
                make(&folder)?;
                cpu_one(&folder, quota)?;
                write(&folder.join("tasks"), thread)
            }
            Version::Two(place) => {
                let folder = place.folder.join(&self.name).join(name);
                make(&folder)?;
                write(&folder.join("cgroup.type"), "threaded")?;
                write(&place.folder.join(&self.name).join("cgroup.subtree_control"), "+cpu")?;
                cpu_two(&folder, quota)?;
                write(&folder.join("cgroup.threads"), thread)
            }
        }
    }

    /// To what the kernel holds the group, of what is said in `said`; I/O is left out.
    pub fn read(&self, said: &Limits) -> io::Result<Limits> {
        let from = |controller: &str, files: [&str; 2]| match &self.version {
            Version::One(controllers) => read_number(&place(controllers, controller)?.join(&self.name), files[0]),
            Version::Two(place) => read_number(&place.folder.join(&self.name), files[1]),
        };
        let number =
            |said: Option<u64>, controller: &str, files: [&str; 2]| said.map(|_| from(controller, files)).transpose();
        let mut read = Limits {
            cpu_shares: number(said.cpu_shares, "cpu", ["cpu.shares", "cpu.weight"])?,
            cpu: if said.cpu.is_none() { said.cpu } else { self.read_quota(Path::new(""), said.cpu)? },
            memory: number(said.memory, "memory", ["memory.limit_in_bytes", "memory.max"])?,
            memory_soft: number(said.memory_soft, "memory", ["memory.soft_limit_in_bytes", "memory.high"])?,
            memory_and_swap: number(
                said.memory_and_swap,
                "memory",
                ["memory.memsw.limit_in_bytes", "memory.swap.max"],
            )?,
            ..Limits::default()
        };
        if matches!(self.version, Version::Two(_)) {
            // There swap is counted by itself.
            read.memory_and_swap = read.memory_and_swap.map(|swap| swap.saturating_add(read.memory.unwrap_or(0)));
        }
        Ok(read)
    }

    /// To what the kernel holds one thread, of what is said. Error: `NotFound` if there is no such group.
    pub fn read_thread(&self, name: &str, said: Quota) -> io::Result<Quota> {
        self.read_quota(Path::new(name), said)
    }

    fn read_quota(&self, inner: &Path, said: Quota) -> io::Result<Quota> {
        let (period, quota) = match &self.version {
            Version::One(controllers) => {
                let folder = place(controllers, "cpu")?.join(&self.name).join(inner);
                (read_text(&folder, "cpu.cfs_period_us")?, read_text(&folder, "cpu.cfs_quota_us")?)
            }
            Version::Two(place) => {
                let text = read_text(&place.folder.join(&self.name).join(inner), "cpu.max")?;
                let (quota, period) = text.split_once(' ').unwrap_or((&text, ""));
                (period.to_owned(), quota.to_owned())
            }
        };
        // Version 2 says `max`, which is no number.
        let quota = quota.parse().unwrap_or(-1);
        Ok(Quota {
            period_us: said.period_us.and_then(|_| period.parse().ok()),
            quota_us: said.quota_us.map(|_| quota),
        })
    }

    /// Removes the group and those of its threads. A group that is not there, or that is still used, is left.
    pub fn remove(&self) {
        let places = match &self.version {
            Version::One(controllers) => controllers.iter().map(|(_, place)| place.join(&self.name)).collect(),
            Version::Two(place) => vec![place.folder.join(&self.name)],
        };
        for place in places {
            let inner = fs::read_dir(&place).into_iter().flatten().flatten().map(|entry| entry.path());
            inner.filter(|path| path.is_dir()).for_each(|path| drop(fs::remove_dir(path)));
            let _ = fs::remove_dir(&place);
        }
    }

    fn hold_one(&self, controllers: &[(&'static str, PathBuf)], pid: i32, limits: &Limits) -> io::Result<()> {
        let folder = |controller: &str| {
            let folder = place(controllers, controller)?.join(&self.name);
            make(&folder)?;
            Ok::<_, io::Error>(folder)
        };
        if limits.cpu_shares.is_some() || !limits.cpu.is_none() {
            let cpu = folder("cpu")?;
            set(&cpu, "cpu.shares", limits.cpu_shares)?;
            cpu_one(&cpu, limits.cpu)?;
            write(&cpu.join("cgroup.procs"), pid)?;
        }
        if limits.memory.or(limits.memory_soft).or(limits.memory_and_swap).is_some() {
            let memory = folder("memory")?;
            // That of both is never less: it makes room for what may be more than before.
            set(&memory, "memory.memsw.limit_in_bytes", limits.memory_and_swap.map(|_| -1))?;
            set(&memory, "memory.limit_in_bytes", limits.memory)?;
            set(&memory, "memory.soft_limit_in_bytes", limits.memory_soft)?;
            set(&memory, "memory.memsw.limit_in_bytes", limits.memory_and_swap)?;
            write(&memory.join("cgroup.procs"), pid)?;
        }
        if limits.io_weight.is_some() || !limits.io.is_empty() {
            let blkio = folder("blkio")?;
            let weight = ["blkio.weight", "blkio.bfq.weight"].into_iter().find(|file| blkio.join(file).exists());
            set(&blkio, weight.unwrap_or("blkio.weight"), limits.io_weight)?;
            limits.io.iter().try_for_each(|io| io_one(&blkio, io))?;
            write(&blkio.join("cgroup.procs"), pid)?;
        }
        Ok(())
    }

    /// The group in the one tree, made; we are aside.
    fn own_folder(&self, place: &Unified) -> io::Result<PathBuf> {
        if place.folder != Path::new(MOUNT) && !place.moved_aside {
            let aside = place.folder.join("virtd");
            make(&aside)?;
            write(&aside.join("cgroup.procs"), 0)?;
        }
        let folder = place.folder.join(&self.name);
        make(&folder)?;
        Ok(folder)
    }

    fn hold_two(&self, place: &Unified, pid: i32, limits: &Limits) -> io::Result<()> {
        let folder = self.own_folder(place)?;
        let cpu = limits.cpu_shares.is_some() || !limits.cpu.is_none();
        let memory = limits.memory.or(limits.memory_soft).or(limits.memory_and_swap).is_some();
        let io = limits.io_weight.is_some() || !limits.io.is_empty();
        let wanted = [("+cpu", cpu), ("+memory", memory), ("+io", io)];
        for (controller, _) in wanted.into_iter().filter(|(_, wanted)| *wanted) {
            write(&place.folder.join("cgroup.subtree_control"), controller)?;
        }
        set(&folder, "cpu.weight", limits.cpu_shares)?;
        cpu_two(&folder, limits.cpu)?;
        set(&folder, "memory.max", limits.memory)?;
        set(&folder, "memory.high", limits.memory_soft)?;
        let swap = limits.memory_and_swap.map(|both| both.saturating_sub(limits.memory.unwrap_or(0)));
        set(&folder, "memory.swap.max", swap)?;
        set(&folder, "io.weight", limits.io_weight.map(|weight| format!("default {weight}")))?;
        limits.io.iter().try_for_each(|io| io_two(&folder, io))?;
        write(&folder.join("cgroup.procs"), pid)
    }
}

fn place<'a>(controllers: &'a [(&'static str, PathBuf)], name: &str) -> io::Result<&'a Path> {
    let found = controllers.iter().find(|(controller, _)| *controller == name).map(|(_, place)| &**place);
    found.ok_or_else(|| {
        io::Error::new(io::ErrorKind::Unsupported, format!("this host has no cgroup controller '{name}'"))
    })
}

fn cpu_one(folder: &Path, quota: Quota) -> io::Result<()> {
    set(folder, "cpu.cfs_period_us", quota.period_us)?;
    set(folder, "cpu.cfs_quota_us", quota.quota_us.map(|quota| quota.max(-1)))
}

fn cpu_two(folder: &Path, quota: Quota) -> io::Result<()> {
    let most =
        quota.quota_us.map_or_else(|| "max".to_owned(), |n| if n < 0 { "max".to_owned() } else { n.to_string() });
    let period = quota.period_us.map(|period| format!(" {period}")).unwrap_or_default();
    set(folder, "cpu.max", (!quota.is_none()).then(|| format!("{most}{period}")))
}

fn io_one(folder: &Path, io: &IoLimits) -> io::Result<()> {
    let device = device_number(&io.path)?;
    let files = ["read_iops_device", "write_iops_device", "read_bps_device", "write_bps_device"];
    for (file, rate) in files.into_iter().zip(io.rates) {
        set(folder, &format!("blkio.throttle.{file}"), rate.map(|rate| format!("{device} {rate}")))?;
    }
    set(folder, "blkio.weight_device", io.weight.map(|weight| format!("{device} {weight}")))
}

fn io_two(folder: &Path, io: &IoLimits) -> io::Result<()> {
    let device = device_number(&io.path)?;
    for (key, rate) in ["riops", "wiops", "rbps", "wbps"].into_iter().zip(io.rates) {
        set(folder, "io.max", rate.map(|rate| format!("{device} {key}={rate}")))?;
    }
    set(folder, "io.weight", io.weight.map(|weight| format!("{device} {weight}")))
}

/// `major:minor` of a block device.
fn device_number(path: &Path) -> io::Result<String> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let meta = fs::metadata(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
    if !meta.file_type().is_block_device() {
        let why = format!("{} is not a block device", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    Ok(format!("{}:{}", rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())))
}

fn make(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(io::Error::new(e.kind(), format!("{}: {e}", folder.display())))
        }
        _ => Ok(()),
    }
}

fn set(folder: &Path, file: &str, value: Option<impl std::fmt::Display>) -> io::Result<()> {
    value.map_or(Ok(()), |value| write(&folder.join(file), value))
}

fn read_text(folder: &Path, file: &str) -> io::Result<String> {
    let file = folder.join(file);
    let text = fs::read_to_string(&file).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", file.display())))?;
    Ok(text.trim().to_owned())
}

fn read_number(folder: &Path, file: &str) -> io::Result<u64> {
    let text = read_text(folder, file)?;
    if text == "max" {
        Ok(UNLIMITED)
    } else {
        text.parse().map_err(|_| io::Error::other(format!("{file} says '{text}'")))
    }
}

fn write(file: &Path, value: impl std::fmt::Display) -> io::Result<()> {
    let open = fs::File::options().write(true).open(file);
    let written = open.and_then(|mut file| io::Write::write_all(&mut file, value.to_string().as_bytes()));
    written.map_err(|e| io::Error::new(e.kind(), format!("{} = {value}: {e}", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Limits = Limits {
        cpu_shares: Some(512),
        cpu: Quota { period_us: Some(100_000), quota_us: Some(-1) },
        memory: Some(1 << 30),
        memory_soft: Some(1 << 29),
        memory_and_swap: Some(3 << 30),
        io_weight: Some(300),
        io: Vec::new(),
    };

    /// Files as the kernel would show them in a new group.
    fn files(folder: &Path, names: &[&str]) {
        fs::create_dir_all(folder).unwrap();
        names.iter().for_each(|name| fs::write(folder.join(name), "").unwrap());
    }

    fn said(folder: &Path, file: &str) -> String {
        fs::read_to_string(folder.join(file)).unwrap()
    }

    #[test]
    fn version_one_has_a_tree_for_each_controller() {
        let mount = tempfile::tempdir().unwrap();
        let at = |path: &str| mount.path().join(path);
        files(&at("cpu/own/guest"), &["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cgroup.procs"]);
        files(&at("cpu/own/guest/vcpu0"), &["cpu.cfs_period_us", "cpu.cfs_quota_us", "tasks"]);
        let memory =
            ["memory.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.memsw.limit_in_bytes", "cgroup.procs"];
        files(&at("memory/guest"), &memory);
        files(&at("blkio/guest"), &["blkio.bfq.weight", "cgroup.procs"]);
        let trees = Trees::at(mount.path(), "3:cpu,cpuacct:/own\n2:memory:/\n1:blkio:/\n0::/\n");
        let group = trees.group("guest");
        group.hold(42, &ALL).unwrap();
        group.hold_thread("vcpu0", 43, Quota { period_us: None, quota_us: Some(5000) }).unwrap();
        let cpu = at("cpu/own/guest");
        assert_eq!((said(&cpu, "cpu.shares"), said(&cpu, "cpu.cfs_quota_us")), ("512".into(), "-1".into()));
        assert_eq!(said(&cpu, "cgroup.procs"), "42");
        assert_eq!((said(&cpu, "vcpu0/cpu.cfs_quota_us"), said(&cpu, "vcpu0/tasks")), ("5000".into(), "43".into()));
        assert_eq!(said(&at("memory/guest"), "memory.memsw.limit_in_bytes"), (3_u64 << 30).to_string());
        assert_eq!(said(&at("blkio/guest"), "blkio.bfq.weight"), "300");
        let poor = Trees::at(mount.path(), "2:memory:/\n").group("guest");
        assert!(poor.hold(42, &ALL).unwrap_err().to_string().contains("no cgroup controller 'cpu'"));
    }

    #[test]
    fn every_guest_is_bounded_in_threads_and_memory() {
        let mount = tempfile::tempdir().unwrap();
        let at = |path: &str| mount.path().join(path);
        files(&at("pids/own/guest"), &["pids.max", "cgroup.procs"]);
        files(&at("memory/guest"), &["memory.limit_in_bytes", "cgroup.procs"]);
        let group = Trees::at(mount.path(), "3:pids:/own\n2:memory:/\n").group("guest");
        group.bound(42, 1000, 1 << 30).unwrap();
        assert_eq!(
            (said(&at("pids/own/guest"), "pids.max"), said(&at("pids/own/guest"), "cgroup.procs")),
            ("1000".into(), "42".into())
        );
        assert_eq!(said(&at("memory/guest"), "memory.limit_in_bytes"), (1_u64 << 30).to_string());
        // One that is missing keeps the other from nothing.
        let poor = Trees::at(mount.path(), "3:pids:/own\n").group("guest");
        let error = poor.bound(43, 900, 1).unwrap_err().to_string();
        assert!(error.contains("no cgroup controller 'memory'"), "{error}");
        assert_eq!(said(&at("pids/own/guest"), "cgroup.procs"), "43");
        let base = at("slice");
        fs::write(at("cgroup.controllers"), "").unwrap();
        files(&base, &["cgroup.subtree_control"]);
        files(&base.join("virtd"), &["cgroup.procs"]);
        files(&base.join("guest"), &["pids.max", "memory.max", "cgroup.procs"]);
        Trees::at(mount.path(), "0::/slice\n").group("guest").bound(44, 7, 9).unwrap();
        assert_eq!(
            (said(&base.join("guest"), "pids.max"), said(&base.join("guest"), "memory.max")),
            ("7".into(), "9".into())
        );
    }

    #[test]
    fn a_thread_is_bounded_with_all_that_it_makes_where_groups_take_threads() {
        let mount = tempfile::tempdir().unwrap();
        let at = |path: &str| mount.path().join(path);
        files(&at("pids/guest"), &["pids.max", "tasks"]);
        files(&at("memory/guest"), &["memory.limit_in_bytes", "tasks"]);
        let group = Trees::at(mount.path(), "3:pids:/\n2:memory:/\n").group("guest");
        assert!(group.bound_thread(1000, 1 << 30).unwrap());
        for (folder, file, most) in [("pids", "pids.max", 1000), ("memory", "memory.limit_in_bytes", 1 << 30)] {
            let folder = at(folder).join("guest");
            assert_eq!((said(&folder, file), said(&folder, "tasks")), (most.to_string(), "0".into()));
        }
        let poor = Trees::at(mount.path(), "2:memory:/\n").group("guest");
        assert!(poor.bound_thread(1, 1).unwrap_err().to_string().contains("no cgroup controller 'pids'"));
        fs::write(at("cgroup.controllers"), "").unwrap();
        assert!(!Trees::at(mount.path(), "0::/\n").group("guest").bound_thread(1, 1).unwrap());
        assert!(!at("guest").exists(), "a whole process is for the other call");
    }

    #[test]
    fn version_two_has_one_tree_and_we_move_aside() {
        let mount = tempfile::tempdir().unwrap();
        let base = mount.path().join("system.slice/virtd.service");
        fs::write(mount.path().join("cgroup.controllers"), "cpu").unwrap();
        files(&base, &["cgroup.subtree_control"]);
        files(&base.join("virtd"), &["cgroup.procs"]);
        let all =
            ["cpu.weight", "cpu.max", "memory.max", "memory.high", "memory.swap.max", "io.weight", "cgroup.procs"];
        files(&base.join("guest"), &all);
        files(&base.join("guest"), &["cgroup.subtree_control"]);
        files(&base.join("guest/vcpu0"), &["cgroup.type", "cpu.max", "cgroup.threads"]);
        for own in ["0::/system.slice/virtd.service\n", "0::/system.slice/virtd.service/virtd\n"] {
            let group = Trees::at(mount.path(), own).group("guest");
            group.hold(42, &ALL).unwrap();
            group.hold_thread("vcpu0", 43, Quota { period_us: Some(1000), quota_us: Some(500) }).unwrap();
        }
        let guest = base.join("guest");
        assert_eq!((said(&guest, "cpu.max"), said(&guest, "cpu.weight")), ("max 100000".into(), "512".into()));
        assert_eq!(said(&guest, "memory.swap.max"), (2_u64 << 30).to_string());
        assert_eq!(said(&guest, "io.weight"), "default 300");
        assert_eq!(
            (said(&guest, "vcpu0/cpu.max"), said(&guest, "vcpu0/cgroup.threads")),
            ("500 1000".into(), "43".into())
        );
        assert_eq!(said(&base, "virtd/cgroup.procs"), "0");
    }
}
