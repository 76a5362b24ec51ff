//! Threads for work that may block for ever: as many as there is such work at a time. One that has done its work waits a while for
//! more, as making a thread takes longer than most of that work.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::Duration;

/// Bytes of each thread's stack.
const STACK: usize = 2 << 20;
/// How long a thread waits for more work.
const KEPT: Duration = Duration::from_secs(10);
/// So many wait at most.
const MOST_IDLE: usize = 32;

type Work = Box<dyn FnOnce() + Send>;

/// Those that wait for work, the one that came last at the end.
static IDLE: Mutex<Vec<Idle>> = Mutex::new(Vec::new());

/// A thread that waits for work.
struct Idle {
    thread: ThreadId,
    give: SyncSender<Work>,
}

fn idle() -> MutexGuard<'static, Vec<Idle>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` in a thread that is its own until it ends; waits for nothing. What it changes of its thread it must change back.
/// Error: there is no thread to be had, and nothing is done.
pub fn run(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let work: Work = Box::new(work);
    let waiting = idle().pop();
    let work = match waiting {
        None => work,
        Some(waiting) => match waiting.give.send(work) {
            Ok(()) => return Ok(()),
            Err(unsent) => unsent.0,
        },
    };
    std::thread::Builder::new().name("files".to_owned()).stack_size(STACK).spawn(move || serve(work)).map(drop)
}

/// A thread's whole life.
fn serve(first: Work) {
    let (give, next) = sync_channel(1);
    let mut work = Some(first);
    while let Some(one) = work {
        one();
        work = more(&give, &next);
    }
}

/// What the calling thread is to do next; nothing if it is to end.
fn more(give: &SyncSender<Work>, next: &Receiver<Work>) -> Option<Work> {
    let thread = std::thread::current().id();
    {
        let mut idle = idle();
        if idle.len() >= MOST_IDLE {
            return None;
        }
        idle.push(Idle { thread, give: give.clone() });
    }
    match next.recv_timeout(KEPT) {
        Ok(work) => Some(work),
        Err(_) => is_taken(thread).then(|| next.recv().ok()).flatten(),
    }
}

/// Whether somebody has taken that thread from those that wait, and gives it work; else it is none of them any more.
fn is_taken(thread: ThreadId) -> bool {
    let mut idle = idle();
    let at = idle.iter().position(|one| one.thread == thread);
    at.map(|at| idle.remove(at)).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    fn says_who(to: &Sender<ThreadId>) -> impl FnOnce() + Send + 'static {
        let to = to.clone();
        move || to.send(std::thread::current().id()).unwrap()
    }

    #[test]
    fn work_that_never_ends_keeps_its_thread_and_nobody_else() {
        let (who, is_who) = channel();
        let (let_go, held) = channel::<()>();
        let stuck = says_who(&who);
        run(move || {
            stuck();
            let _ = held.recv();
        })
        .unwrap();
        let stuck = is_who.recv().unwrap();
        for _ in 0..MOST_IDLE * 2 {
            run(says_who(&who)).unwrap();
        }
        let others: Vec<ThreadId> = (0..MOST_IDLE * 2).map(|_| is_who.recv().unwrap()).collect();
        assert!(!others.contains(&stuck));
        assert!(idle().len() <= MOST_IDLE);
        drop(let_go);
    }

    #[test]
    fn a_thread_whose_work_fails_is_given_no_more() {
        let (who, is_who) = channel();
        let failing = says_who(&who);
        run(move || {
            failing();
            panic!("as it is to");
        })
        .unwrap();
        let failed = is_who.recv().unwrap();
        run(says_who(&who)).unwrap();
        assert_ne!(is_who.recv().unwrap(), failed);
    }
}
