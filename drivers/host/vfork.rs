//! Processes that have our memory until they run a program or end: nothing of it is copied for them, and what they find out they
//! leave in it.
//!
//! ```text
//!   a thread of ours ──clone──▶ stands still ─────────────────────────────────▶ goes on
//!                         └───▶ the process, as that thread, on another stack ──┴─▶ its program, or nothing
//! ```
//!
//! Such a process may do what its thread may, and take the locks that it may take. Three things are different. What it has not
//! dropped before it runs a program stays with us for ever. Whoever kills it must know that it holds no lock. And the C library's
//! calls that change the user would change that of our threads: it makes the kernel's.

use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use std::io;
use std::panic::AssertUnwindSafe;
use std::ptr;

/// Whose such a process is, and what it has of ours beside our memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kin {
    /// A child of the calling process, with a copy of its table of descriptors.
    Child,
    /// The same of the calling process' parent.
    Sibling,
    /// A child that opens and closes our descriptors.
    ChildWithOurFiles,
}

/// Makes a process that does `work`, and ends when that returns; gives its number, as `work` is given it. Returns when the process
/// has run a program or ended; in the latter case nobody has reaped it. Folder, limits, namespaces and signal handlers are its own,
/// and no signal reaches it until it lets them. Blocks, as long as the process hangs in the kernel too.
pub fn vfork<W: FnOnce(libc::pid_t)>(kin: Kin, work: W) -> io::Result<libc::pid_t> {
    let stack = Stack::new()?;
    let mut life = Life { number: 0, work: Some(work) };
    let flags = match kin {
        Kin::Child => 0,
        Kin::Sibling => libc::CLONE_PARENT,
        Kin::ChildWithOurFiles => libc::CLONE_FILES,
    };
    let flags = flags | libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PARENT_SETTID | libc::SIGCHLD;
    // What is to be done on a signal is ours to do, not that process'.
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: this thread stands still until the process has another memory or none, and the stack and the life are the
    // process' alone.
    let made = unsafe {
        let life = &raw mut life;
        match libc::clone(live::<W>, stack.top(), flags, life.cast(), &raw mut (*life).number) {
            -1 => Err(io::Error::last_os_error()),
            number => Ok(number),
        }
    };
    before.thread_set_mask()?;
    made
}

/// The calling process ends when the thread that made it does. Error: it has no parent `maker` any more; `None`: none that it sees,
/// as the first of a process namespace.
pub fn die_with(maker: Option<Pid>) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // The maker may have ended before.
    if getppid() == maker { Ok(()) } else { Err(io::Error::other("who made it has ended")) }
}

/// What a process lives by.
struct Life<W> {
    /// Its number, written by the kernel before it runs.
    number: libc::pid_t,
    work: Option<W>,
}

extern "C" fn live<W: FnOnce(libc::pid_t)>(life: *mut libc::c_void) -> libc::c_int {
    // SAFETY: whoever made this process has it on its stack, and does not touch it while this one may.
    let life = unsafe { &mut *life.cast::<Life<W>>() };
    let (number, work) = (life.number, life.work.take());
    let _ = std::panic::catch_unwind(AssertUnwindSafe(|| work.map(|work| work(number))));
    0
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{WaitOptions, waitpid};

    fn end(number: libc::pid_t) -> Option<i32> {
        waitpid(Pid::from_raw(number), WaitOptions::empty()).unwrap().unwrap().1.exit_status()
    }

    #[test]
    fn what_it_finds_out_is_in_our_memory_when_it_has_ended() {
        let (mut found, ours) = (String::new(), std::process::id());
        let number = vfork(Kin::Child, |number| {
            let file = std::fs::File::open("/dev/null");
            found = format!("{number} {} {}", std::process::id(), file.is_ok());
        });
        let number = number.unwrap();
        assert_eq!(found, format!("{number} {number} true"));
        assert_eq!((end(number), std::process::id()), (Some(0), ours));
    }

    #[test]
    fn a_panic_there_ends_it_alone() {
        let number = vfork(Kin::Child, |_| assert_eq!(std::process::id(), 0)).unwrap();
        assert_eq!(end(number), Some(0));
    }

    #[test]
    fn one_that_is_killed_lets_its_thread_go_on() {
        let mut lives = false;
        // SAFETY: ends this process.
        let number = vfork(Kin::Child, |_| unsafe {
            libc::kill(libc::getpid(), libc::SIGKILL);
            lives = true;
        });
        assert_eq!(end(number.unwrap()), None, "a signal ended it");
        assert!(!lives);
    }
}
