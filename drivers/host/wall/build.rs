//! The calling thread goes behind a new wall.

use super::attach::{Origin, Root, Tree};
use super::sys::{self, Hold};
use super::unprivileged::PTMX;
use super::{Folder, Wall};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, chmodat, fstat, makedev, mkdirat, mknodat, openat, symlinkat};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

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

/// Takes the calling thread, and no other, behind the wall. On error the thread is of no use any more.
pub fn enter(wall: &Wall) -> io::Result<()> {
    let trees = trees(wall, Origin::Held)?;
    let mut flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC;
    flags.set(CloneFlags::CLONE_NEWNET, !wall.network);
    unshare(flags).map_err(|e| explain("namespaces of its own", io::Error::from(e)))?;
    keep_to_itself()?;
    raise(wall, &trees, Origin::Held)
}

/// Takes this process, which has one thread and all but mounts of its own, behind the wall. On error it is of no use any more.
pub fn enter_copy(wall: &Wall) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| explain("mounts of its own", io::Error::from(e)))?;
    keep_to_itself()?;
    let trees = trees(wall, Origin::Copied)?;
    raise(wall, &trees, Origin::Copied)
}

/// What is mounted here from now on is here alone.
fn keep_to_itself() -> io::Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|e| explain("mounts of its own (in a chroot, mount its folder onto itself first)", io::Error::from(e)))
}

/// Makes a root of these trees, and goes into it.
fn raise(wall: &Wall, trees: &[Tree], origin: Origin) -> io::Result<()> {
    let root = new_root().map_err(|e| explain("an empty root", e))?;
    links(&root).and_then(|()| terminal_maker(&root, origin)).map_err(|e| explain("links", e))?;
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
    pivot(&root).map_err(|e| explain("a root of its own", e))
}

pub fn explain(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("it cannot be given {what}: {error}"))
}

/// Everything that is to be there, made while paths still mean what they mean to us; what contains others comes first.
fn trees(wall: &Wall, origin: Origin) -> io::Result<Vec<Tree>> {
    let read_only = Hold { read_only: true, no_devices: true, no_programs: false };
    let data = Hold { no_programs: true, ..read_only };
    let mut trees = Vec::new();
    let stores = STORES.iter().filter(|store| wall.programs.iter().any(|program| program.starts_with(store)));
    for path in PROGRAMS.iter().filter(|path| !Path::new(path).is_symlink()).chain(stores) {
        trees.extend(host(Path::new(path), read_only)?);
    }
    for program in wall
        .programs
        .iter()
        .filter(|program| !program.starts_with("/usr") && !STORES.iter().any(|s| program.starts_with(s)))
    {
        trees.extend(host(&home_of(program), read_only)?);
    }
    let settings = SETTINGS.iter().chain(NETWORK.iter().filter(|_| wall.network));
    for path in settings {
        trees.extend(host(Path::new(path), data)?);
    }
    trees.extend(host(Path::new(if wall.kernel { "/sys" } else { "/sys/devices/system" }), data)?);
    for path in DEVICES {
        trees.extend(host(Path::new(path), Hold { no_programs: true, ..Hold::default() })?);
    }
    for path in &wall.nodes {
        trees.extend(host(path, Hold { no_programs: true, ..Hold::default() })?);
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
