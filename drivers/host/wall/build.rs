//! The calling thread goes behind a new wall.

use super::attach::{Origin, Root, Tree};
use super::sys::{self, Hold};
use super::{Folder, Wall};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, chmodat, fstat, makedev, mkdirat, mknodat, openat, symlinkat};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

/// The descriptor of the host's maker of terminals, an `O_PATH` one, which a process behind such a wall has: a node of its own
/// would do nothing there, and a mount of the host's finds no terminals beside it.
pub const PTMX: RawFd = 198;

/// Bytes and names in the root itself, which holds little but places to mount on.
const ROOT: &[(&str, &str)] = &[("mode", "0755"), ("size", "4m"), ("nr_inodes", "16k")];
/// The same of what is thrown away.
const SCRATCH: &[(&str, &str)] = &[("mode", "1777"), ("size", "64m"), ("nr_inodes", "1k")];
/// Where programs and their libraries are; links, where all is in /usr.
pub const PROGRAMS: [&str; 7] = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"];
/// Of distributions that have them elsewhere.
pub const STORES: [&str; 2] = ["/nix/store", "/gnu/store"];
/// What libraries and programs read of the host's configuration.
const SETTINGS: [&str; 11] = [
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/etc/localtime",
    "/etc/qemu",
    "/etc/sasl2",
    "/etc/gnutls",
    "/etc/crypto-policies",
    "/etc/fonts",
    "/etc/swtpm_setup.conf",
    "/etc/swtpm-localca.conf",
    "/etc/swtpm-localca.options",
];
/// What they read where there is a network.
const NETWORK: [&str; 8] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/ssl",
    "/etc/pki",
    "/etc/ca-certificates",
];
/// Devices that everybody may have.
const DEVICES: [&str; 6] = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/pts"];
/// The maker of terminals. A node of our own: the kernel looks for `pts` beside it, where a mount has nothing beside it.
const TERMINALS: (&str, u32, u32) = ("ptmx", 5, 2);

/// Mounts of their own, and in them a root with what is behind every wall. What else is behind one need not be known yet.
pub struct Ground {
    root: Root,
    /// The mounts, where another thread made them.
    mounts: Option<OwnedFd>,
}

/// A ground that is being made.
pub struct GroundToCome(mpsc::Receiver<io::Result<Ground>>);

impl Ground {
    /// Has one made in a thread of its own, by root's rights; waits for nothing. Error: there is no thread to be had.
    pub fn begin() -> io::Result<GroundToCome> {
        let (hand_over, made) = mpsc::channel();
        std::thread::Builder::new().name("wall".to_owned()).spawn(move || {
            let made = Ground::apart().and_then(|ground| {
                let mounts = openat(CWD, "/proc/thread-self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
                Ok(Ground { mounts: Some(mounts), ..ground })
            });
            let _ = hand_over.send(made);
        })?;
        Ok(GroundToCome(made))
    }

    /// Gives the calling thread, and no other, mounts of its own, and makes one in them.
    fn apart() -> io::Result<Ground> {
        own_mounts()?;
        Ground::make(Origin::Held)
    }

    /// Makes one in the mounts of the calling thread, which are its own. From then on its programs are covered.
    fn make(origin: Origin) -> io::Result<Ground> {
        let trees = common_trees()?;
        let root = new_root().map_err(|e| explain("an empty root", e))?;
        links(&root).and_then(|()| terminal_maker(&root, origin)).map_err(|e| explain("links", e))?;
        trees.iter().try_for_each(|tree| root.attach(tree))?;
        Ok(Ground { root, mounts: None })
    }

    /// The calling thread, and no other, has these mounts.
    fn enter(&self) -> io::Result<()> {
        let Some(mounts) = &self.mounts else { return Ok(()) };
        let entered = unshare(CloneFlags::CLONE_FS).and_then(|()| setns(mounts, CloneFlags::CLONE_NEWNS));
        entered.map_err(|e| explain("mounts of its own", io::Error::from(e)))
    }
}

impl GroundToCome {
    /// Waits for it, which takes moments.
    pub fn wait(self) -> io::Result<Ground> {
        self.0.recv().unwrap_or_else(|_| Err(io::Error::other("the thread that makes its mounts failed")))
    }
}

/// Takes the calling thread, and no other, behind the wall, on that ground or one of its own. On error the thread is of no use any
/// more.
pub fn enter(wall: &Wall, ground: Option<&Ground>) -> io::Result<()> {
    // Only here what was found here can be mounted.
    let trees = trees(wall, Origin::Held)?;
    let ground = match ground {
        Some(ground) => ground,
        None => &Ground::apart()?,
    };
    ground.enter()?;
    let mut flags = CloneFlags::CLONE_NEWIPC;
    flags.set(CloneFlags::CLONE_NEWNET, !wall.network);
    unshare(flags).map_err(|e| explain("namespaces of its own", io::Error::from(e)))?;
    raise(wall, &ground.root, &trees)
}

/// Takes this process, which has one thread and all but mounts of its own, behind the wall. On error it is of no use any more.
pub fn enter_copy(wall: &Wall) -> io::Result<()> {
    own_mounts()?;
    let trees = trees(wall, Origin::Copied)?;
    let ground = Ground::make(Origin::Copied)?;
    raise(wall, &ground.root, &trees)
}

/// What is mounted in the calling thread, or process, from now on is there alone.
fn own_mounts() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| explain("mounts of its own", io::Error::from(e)))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|e| explain("mounts of its own (in a chroot, mount its folder onto itself first)", io::Error::from(e)))
}

/// Puts these trees into a root, and goes into it.
fn raise(wall: &Wall, root: &Root, trees: &[Tree]) -> io::Result<()> {
    let held = Hold { no_devices: true, no_programs: true, read_only: false };
    if wall.scratch {
        // Before what may be below it.
        let scratch = sys::file_system("tmpfs", SCRATCH, held).map_err(|e| explain("/tmp", e))?;
        root.attach(&Tree { mount: scratch, at: "/tmp".into(), folder: true })?;
    }
    for tree in trees {
        root.attach(tree)?;
    }
    if !wall.no_processes {
        let only = [("hidepid", "invisible"), ("subset", "pid")];
        let proc = sys::file_system("proc", if wall.kernel { &only[..1] } else { &only }, held);
        let proc = proc.map_err(|e| explain("/proc", e))?;
        root.attach(&Tree { mount: proc, at: "/proc".into(), folder: true })?;
    }
    pivot(root).map_err(|e| explain("a root of its own", e))
}

pub fn explain(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("it cannot be given {what}: {error}"))
}

/// What is shown of the host and not written.
const READ_ONLY: Hold = Hold { read_only: true, no_devices: true, no_programs: false };
/// The same of what holds no programs.
const DATA: Hold = Hold { no_programs: true, ..READ_ONLY };
/// Devices.
const NODES: Hold = Hold { read_only: false, no_devices: false, no_programs: true };

/// What is behind every wall; made before there is a root, which lies upon programs.
fn common_trees() -> io::Result<Vec<Tree>> {
    let programs = PROGRAMS.iter().filter(|path| !Path::new(path).is_symlink()).map(|path| (path, READ_ONLY));
    let settings = SETTINGS.iter().map(|path| (path, DATA));
    let devices = DEVICES.iter().map(|path| (path, NODES));
    let all = programs.chain(settings).chain(devices);
    all.filter_map(|(path, hold)| host(Path::new(path), hold).transpose()).collect()
}

/// What is to be there beside that, made while paths still mean what they mean to us; what contains others comes first.
fn trees(wall: &Wall, origin: Origin) -> io::Result<Vec<Tree>> {
    let mut trees = Vec::new();
    for store in STORES.iter().filter(|store| wall.programs.iter().any(|program| program.starts_with(store))) {
        trees.extend(host(Path::new(store), READ_ONLY)?);
    }
    for program in wall
        .programs
        .iter()
        .filter(|program| !program.starts_with("/usr") && !STORES.iter().any(|s| program.starts_with(s)))
    {
        trees.extend(host(&home_of(program), READ_ONLY)?);
    }
    for path in NETWORK.iter().filter(|_| wall.network) {
        trees.extend(host(Path::new(path), DATA)?);
    }
    trees.extend(host(Path::new(if wall.kernel { "/sys" } else { "/sys/devices/system" }), DATA)?);
    for path in &wall.nodes {
        trees.extend(host(path, NODES)?);
    }
    for Folder { path, fd, write } in &wall.folders {
        let hold = Hold { read_only: !write, no_devices: true, no_programs: true };
        let mount = origin.mount(fd, path, true, hold).map_err(|e| explain(&path.display().to_string(), e))?;
        trees.push(Tree { mount, at: path.clone(), folder: true });
    }
    for file in &wall.files {
        trees.push(Tree::of(file, origin)?);
    }
    Ok(trees)
}

/// What is at `path` on the host, if anything is. Of root's places only: the path is followed.
fn host(path: &Path, hold: Hold) -> io::Result<Option<Tree>> {
    let opened = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let Ok(opened) = opened else { return Ok(None) };
    let folder = FileType::from_raw_mode(fstat(&opened)?.st_mode).is_dir();
    let mount = sys::clone(&opened, folder, hold).map_err(|e| explain(&path.display().to_string(), e))?;
    Ok(Some(Tree { mount, at: path.to_owned(), folder }))
}

/// What belongs to a program that is installed apart: the folder above its `bin`, else the program alone.
pub fn home_of(program: &Path) -> PathBuf {
    let bin = program.parent().filter(|dir| ["bin", "sbin", "libexec"].iter().any(|name| dir.ends_with(name)));
    let home = bin.and_then(Path::parent).filter(|home| home.components().count() > 2);
    home.unwrap_or(program).to_owned()
}

/// An empty root, mounted where it is in nobody's way: nothing is looked up by a path any more.
fn new_root() -> io::Result<Root> {
    let held = Hold { no_devices: false, no_programs: true, read_only: false };
    let root = sys::file_system("tmpfs", ROOT, held)?;
    let at = openat(CWD, "/usr", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    sys::put(&root, &at)?;
    Ok(Root(root))
}

/// The links that every program expects.
fn links(root: &Root) -> io::Result<()> {
    for path in PROGRAMS {
        if let Ok(target) = std::fs::read_link(path) {
            symlinkat(&target, &root.0, path.trim_start_matches('/'))?;
        }
    }
    let dev = root.place(Path::new("/dev"), true)?;
    for (name, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        symlinkat(target, &dev, name)?;
    }
    for folder in ["run", "var", "var/tmp"] {
        match mkdirat(&root.0, folder, Mode::from(0o755)) {
            Err(rustix::io::Errno::EXIST) => {}
            made => made?,
        }
    }
    Ok(())
}

/// The maker of terminals: root makes a node, and whoever makes a copy of the host's mounts a link to a descriptor of the
/// host's.
fn terminal_maker(root: &Root, origin: Origin) -> io::Result<()> {
    let dev = root.place(Path::new("/dev"), true)?;
    let (ptmx, major, minor) = TERMINALS;
    match origin {
        Origin::Copied => Ok(symlinkat(format!("/proc/self/fd/{PTMX}"), &dev, ptmx)?),
        Origin::Held => {
            mknodat(&dev, ptmx, FileType::CharacterDevice, Mode::from(0o666), makedev(major, minor))?;
            Ok(chmodat(&dev, ptmx, Mode::from(0o666), AtFlags::empty())?)
        }
    }
}

/// Makes it the root; what was the root before goes.
fn pivot(root: &Root) -> io::Result<()> {
    let at: &OwnedFd = &root.0;
    rustix::process::fchdir(at)?;
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}
