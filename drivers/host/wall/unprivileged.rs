//! Walls that need no root: in a user namespace, of whoever we are.
//!
//! ```text
//!   us ──fork──▶ maker: namespaces of users, processes, IPC, the network ──clone──▶ child of ours: mounts, locks ─▶ work
//!    ◀── number ───┘ (ends)
//! ```
//!
//! Only a process with one thread may go into a user namespace, so the wall is made between fork and exec. The C library keeps
//! its heap in order across a fork, and nothing of what is done there takes another lock that a thread of ours might hold.

use super::super::access::LentFile;
use super::attach::{Origin, Root, Tree};
use super::build::{self, explain};
use super::{Maker, Wall};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::AssertUnwindSafe;
use std::ptr;
use std::sync::OnceLock;

/// The descriptor of the host's maker of terminals, an `O_PATH` one, which a process behind such a wall has: a node of its own
/// would do nothing there, and a mount of the host's finds no terminals beside it.
pub const PTMX: RawFd = 198;

/// That descriptor; `None` where there is no such device.
pub fn terminals() -> Option<OwnedFd> {
    openat(CWD, "/dev/ptmx", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// What the maker says first: it made the child, whose number follows, or why it did not.
const MADE: u8 = 0;
const FAILED: u8 = 1;

/// Makes a process behind the wall, a child of ours and the first of its own process namespace, which does `work`; that is told
/// whether all of the wall could be made. Threads of ours other than the calling one do not exist there.
pub fn fork(wall: &Wall, work: impl FnOnce(io::Result<()>) -> Infallible) -> io::Result<libc::pid_t> {
    let (mut said, say) = pipe()?;
    // SAFETY: what the child does is said above; it never returns.
    let maker = match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        0 => make(wall, (said, say), work),
        maker => maker,
    };
    drop(say);
    let mut word = [FAILED, 0, 0, 0, 0];
    let heard = said.read_exact(&mut word);
    let made = match word {
        [MADE, number @ ..] if heard.is_ok() => Ok(i32::from_ne_bytes(number)),
        _ => {
            let mut why = String::from_utf8_lossy(&word[1..]).into_owned();
            said.read_to_string(&mut why)?;
            Err(io::Error::other(why.trim_matches(['\0', ' ']).to_owned()))
        }
    };
    reap(maker);
    made
}

/// The maker's whole life.
fn make(wall: &Wall, (said, mut say): (File, File), work: impl FnOnce(io::Result<()>) -> Infallible) -> ! {
    drop(said);
    let why = match namespaces(wall) {
        Ok(()) => hand_on(&mut say, || match work(go_behind(wall)) {}),
        Err(why) => why,
    };
    let _ = say.write_all(&[&[FAILED][..], format!("{why:<4}").as_bytes()].concat());
    // SAFETY: ends this process, and runs nothing of what its copy of us would have run at an end.
    unsafe { libc::_exit(0) }
}

/// Makes a child of the calling process' parent, which does `work`, says so, and ends the calling process, which has one thread: its
/// memory is the child's, instead of a copy of it that would be made and thrown away. What `work` borrows stays as it is by that.
/// Returns only where there is no child, and why.
fn hand_on<W: FnOnce()>(say: &mut File, work: W) -> io::Error {
    let end = say.as_raw_fd();
    let work = Box::into_raw(Box::new(move || {
        // SAFETY: the child has a table of its own, and this is the maker's to say.
        unsafe { libc::close(end) };
        work();
    }));
    let stack = match Stack::new() {
        Ok(stack) => ManuallyDrop::new(stack),
        Err(why) => return why,
    };
    let flags = libc::CLONE_VM | libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: the stack is nobody else's, and the box is made for this process alone.
    match unsafe { libc::clone(live_in(work), stack.top(), flags, work.cast()) } {
        -1 => io::Error::last_os_error(),
        child => {
            // The memory is the child's: nothing of it is changed from here on.
            let [a, b, c, d] = child.to_ne_bytes();
            let _ = say.write_all(&[MADE, a, b, c, d]);
            // SAFETY: as above.
            unsafe { libc::_exit(0) }
        }
    }
}

/// What a process lives by that is made with `work`, a box that is its own.
fn live_in<W: FnOnce()>(_work: *mut W) -> extern "C" fn(*mut libc::c_void) -> libc::c_int {
    extern "C" fn live<W: FnOnce()>(work: *mut libc::c_void) -> libc::c_int {
        // SAFETY: it was made of a box, for this process alone.
        let work = unsafe { Box::from_raw(work.cast::<W>()) };
        let _ = std::panic::catch_unwind(AssertUnwindSafe(work));
        0
    }
    live::<W>
}

/// The stack of a process that has another's memory; beyond its end is nothing.
struct Stack(*mut libc::c_void);

impl Stack {
    /// Bytes of it, and of what is beyond its end.
    const SIZE: usize = 1 << 20;
    const BEYOND: usize = 1 << 16;

    fn new() -> io::Result<Stack> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK | libc::MAP_NORESERVE;
        // SAFETY: new memory, whose first part is then nobody's.
        unsafe {
            let all = Stack::BEYOND + Stack::SIZE;
            let stack = match libc::mmap(ptr::null_mut(), all, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) {
                libc::MAP_FAILED => return Err(io::Error::last_os_error()),
                stack => Stack(stack),
            };
            match libc::mprotect(stack.0, Stack::BEYOND, libc::PROT_NONE) {
                0 => Ok(stack),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }

    /// Where it begins: it grows down.
    fn top(&self) -> *mut libc::c_void {
        // SAFETY: the end of that memory.
        unsafe { self.0.byte_add(Stack::BEYOND + Stack::SIZE) }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: it is nobody's any more.
        unsafe { libc::munmap(self.0, Stack::BEYOND + Stack::SIZE) };
    }
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
        in_child(|| Ok(()), |work| fork(&wall, work)).err().map(|e| e.to_string())
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
    aside(|| shown = work())?;
    shown
}

/// Runs `work` in a process of its own, in which the calling thread goes on as it were: with our memory and our descriptors, and
/// with namespaces of its own. Nothing is copied for it, and none of our files is closed at its end, which is waited for.
fn aside(work: impl FnOnce()) -> io::Result<()> {
    let work = Box::into_raw(Box::new(move || {
        // SAFETY: changes a property of this process, which ends with the thread that it goes on for.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
        work();
    }));
    let (stack, flags) = (Stack::new()?, libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_VFORK | libc::SIGCHLD);
    // What is to be done on a signal is ours to do, not that process'.
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: the calling thread stands still until it has ended, and the stack and the box are its own.
    let child = match unsafe { libc::clone(live_in(work), stack.top(), flags, work.cast()) } {
        -1 => {
            let why = io::Error::last_os_error();
            // SAFETY: nobody else has it.
            drop(unsafe { Box::from_raw(work) });
            Err(why)
        }
        child => {
            reap(child);
            Ok(())
        }
    };
    before.thread_set_mask()?;
    child
}

/// Runs `work` in a process that `fork` makes, unless that says why not, and waits for its end; gives what either failed with.
fn in_child(
    work: impl FnOnce() -> io::Result<()>,
    fork: impl FnOnce(Box<dyn FnOnce(io::Result<()>) -> Infallible + '_>) -> io::Result<libc::pid_t>,
) -> io::Result<()> {
    let (mut said, mut say) = pipe()?;
    let child = {
        let say = &mut say;
        fork(Box::new(move |ready| {
            if let Err(why) = ready.and_then(|()| work()) {
                let _ = say.write_all(why.to_string().as_bytes());
            }
            // SAFETY: ends this process, and runs nothing of what its copy of us would have run at an end.
            unsafe { libc::_exit(0) }
        }))?
    };
    drop(say);
    let mut why = String::new();
    let read = said.read_to_string(&mut why);
    reap(child);
    read?;
    if why.is_empty() { Ok(()) } else { Err(io::Error::other(why)) }
}

fn pipe() -> io::Result<(File, File)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((read.into(), write.into()))
}

/// Waits for the end of a child that is about to end.
fn reap(child: libc::pid_t) {
    if let Some(child) = rustix::process::Pid::from_raw(child) {
        let _ =
            rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty()));
    }
}
