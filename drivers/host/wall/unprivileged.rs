//! Walls that need no root: in a user namespace, of whoever we are.
//!
//! ```text
//!   us ──vfork──▶ maker: namespaces of users, processes, IPC, the network ──vfork──▶ child of ours: mounts, locks ─▶ work
//! ```
//!
//! Only a process with one thread may go into a user namespace, so the wall is made between [`vfork`] and exec.

use super::super::access::LentFile;
use super::super::process::reap_unheld;
use super::super::vfork::{Kin, die_with, vfork};
use super::attach::{Origin, Root, Tree};
use super::build::{self, explain};
use super::{Maker, Wall};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getpid, kill_process, waitid};
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

/// That descriptor; `None` where there is no such device.
pub fn terminals() -> Option<OwnedFd> {
    openat(CWD, "/dev/ptmx", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// Makes a process behind the wall, a child of ours and the first of its own process namespace, which does `work`; that is told
/// whether all of the wall could be made. `born` is called there first, with the number that it has among ours. Returns when it has
/// run a program or ended ([`vfork`]); error: there is no such process, and why.
pub fn fork(
    wall: &Wall,
    born: impl FnOnce(libc::pid_t),
    work: impl FnOnce(io::Result<()>) -> Infallible,
) -> io::Result<libc::pid_t> {
    let (us, child) = (getpid(), AtomicI32::new(0));
    let mut made = Err(io::Error::other("the process that was to make it was killed"));
    let live = |number| {
        child.store(number, Ordering::Release);
        born(number);
        match work(go_behind(wall)) {}
    };
    let maker = vfork(Kin::Child, |_| {
        made = die_with(Some(us)).and_then(|()| namespaces(wall)).and_then(|()| vfork(Kin::Sibling, live));
    })?;
    reap(maker);
    // Whoever killed the maker let us go on while the child may still have what we have on our stack.
    if let (Err(_), Some(child)) = (&made, Pid::from_raw(child.into_inner())) {
        let _ = kill_process(child, Signal::KILL);
        let _ = waitid(WaitId::Pid(child), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
    }
    made
}

/// Everything of its own but mounts, which need its first process.
fn namespaces(wall: &Wall) -> io::Result<()> {
    let mut flags = CloneFlags::CLONE_NEWIPC;
    flags.set(CloneFlags::CLONE_NEWPID, !wall.no_processes);
    flags.set(CloneFlags::CLONE_NEWNET, !wall.network);
    with_user(flags)
}

/// Takes the calling process, which has one thread, into a network of its own and a user namespace whose network that is.
pub fn own_network() -> io::Result<()> {
    with_user(CloneFlags::CLONE_NEWNET)
}

/// Those namespaces, of a user namespace of its own.
fn with_user(flags: CloneFlags) -> io::Result<()> {
    // SAFETY: they have no conditions.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    unshare(CloneFlags::CLONE_NEWUSER | flags).map_err(|e| explain("namespaces of its own", io::Error::from(e)))?;
    // Whoever is somebody here is the same within; of others there is nobody.
    let write = |file: &str, text: String| {
        let written = File::options().write(true).open(format!("/proc/self/{file}"));
        let written = written.and_then(|mut file| file.write_all(text.as_bytes()));
        written.map_err(|e| explain(&format!("a user ({file})"), e))
    };
    write("setgroups", "deny".to_owned())?;
    write("uid_map", format!("{user} {user} 1"))?;
    write("gid_map", format!("{group} {group} 1"))
}

/// Takes the calling process, which has one thread, behind a wall without processes of its own.
pub fn enter(wall: &Wall) -> io::Result<()> {
    namespaces(wall)?;
    go_behind(wall)
}

fn go_behind(wall: &Wall) -> io::Result<()> {
    build::enter_copy(wall)?;
    wall.lock()?;
    give_up_capabilities();
    Ok(())
}

/// The next program has none, root's of a user namespace neither.
fn give_up_capabilities() {
    // The last of them is not known: the kernel refuses what is beyond it.
    for right in 0..=63 {
        // SAFETY: changes a property of this process.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, right, 0, 0, 0) };
    }
}

/// Why no such wall can be made on this host, if so; found out once.
pub fn obstacle() -> Option<&'static str> {
    static FOUND: OnceLock<Option<String>> = OnceLock::new();
    let find = || {
        let wall = Wall { maker: Maker::Own, ..Wall::default() };
        let mut ready = Ok(());
        let tried = fork(
            &wall,
            |_| (),
            |made| {
                ready = made;
                // SAFETY: ends this process, and runs nothing of what its thread would run at an end.
                unsafe { libc::_exit(0) }
            },
        );
        tried.map(reap).and(ready).err().map(|e| e.to_string())
    };
    FOUND.get_or_init(find).as_deref()
}

/// As [`super::show`], to a process in a user namespace, whose user and mount namespaces these are.
pub fn show(user: &OwnedFd, mounts: &OwnedFd, files: &[LentFile]) -> io::Result<()> {
    let work = || {
        setns(user, CloneFlags::CLONE_NEWUSER)?;
        // A copy of our mounts that is its user's: mounts can be made of it, and put where it sees them.
        unshare(CloneFlags::CLONE_NEWNS)?;
        let trees = files.iter().map(|file| Tree::of(file, Origin::Copied)).collect::<io::Result<Vec<_>>>()?;
        setns(mounts, CloneFlags::CLONE_NEWNS)?;
        let root = Root(openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?);
        root.attach_new(&trees, files)
    };
    let mut shown = Err(io::Error::other("the process that was to show it failed"));
    // With our descriptors: none of our files is closed at its end.
    let us = getpid();
    reap(vfork(Kin::ChildWithOurFiles, |_| shown = die_with(Some(us)).and_then(|()| work()))?);
    shown
}

/// Waits for the end of a child that is about to end.
fn reap(child: libc::pid_t) {
    Pid::from_raw(child).into_iter().for_each(reap_unheld);
}
