//! Who may have how much at work: every call that is more than a look at a row passes here.
//!
//! ```text
//!  call ──admit──▶ waiting (per sender, in order) ──next──▶ running ──ended──▶
//!                    │ until its user is known, below its sender's and its user's share, and its reader keeps up
//! ```
//!
//! All limits are checked when a call arrives, and a call without a reply counts like any other. Senders take turns, so
//! one with hundreds of calls holds up only itself. Nothing here waits: the dispatch loop calls it.
//!
//! **Readers.** A bus keeps what a client has not read yet, and counts it against us: dbus-daemon stops listening to a
//! service of which it holds 127 MiB. So a sender that has been answered with [`Limits::unread`] bytes is looked at by
//! the dispatcher; while it does not read, its calls wait here, the quick ones too. Should its queue fill up even so, its
//! calls are dropped without an answer, which it would not read.

use std::collections::VecDeque;
use std::collections::hash_map::{Entry, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio_util::sync::CancellationToken;
use zbus::Message;

/// What a message costs beside its bytes.
const OVERHEAD: usize = 512;

/// How much is how many.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Calls of one sender at work.
    pub running: usize,
    /// Calls of one sender in its queue.
    pub waiting: usize,
    /// Bytes of all those.
    pub bytes: usize,
    /// Calls of one user at work.
    pub running_of_user: usize,
    /// Calls of one user in queues.
    pub waiting_of_user: usize,
    /// Calls at work in all.
    pub running_in_all: usize,
    /// Bytes in all.
    pub bytes_in_all: usize,
    /// Bytes of answers after which a sender's reading is looked at; `None`: never.
    pub unread: Option<usize>,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            running: 64,
            waiting: 512,
            bytes: 16 << 20,
            running_of_user: 512,
            waiting_of_user: 4096,
            running_in_all: 2048,
            bytes_in_all: 128 << 20,
            unread: None,
        }
    }
}

/// What became of a call.
#[derive(Debug, PartialEq, Eq)]
pub enum Admission {
    /// It is in the queue; [`Gate::next`] will bring it.
    Queued,
    /// The same, and the sender is new: somebody must find out who it is.
    Stranger,
    /// There is no room, and why.
    Refused(String),
    /// There is no room, and no point in saying so.
    Dropped,
}

/// How a sender stands when a call of it comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing is in its way.
    Free,
    /// Its queue is full.
    Full,
    /// Its calls wait for its reading.
    Held,
}

/// A call whose turn has come. Give it back to [`Gate::ended`].
#[derive(Debug)]
pub struct Work {
    /// The call.
    pub message: Message,
    /// Its sender.
    pub sender: Arc<str>,
    /// Its sender's user.
    pub uid: u32,
    /// Fires when its sender has left.
    pub departed: CancellationToken,
}

/// The gate.
#[derive(Debug, Default)]
pub struct Gate {
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    senders: HashMap<Arc<str>, Sender>,
    users: HashMap<u32, User>,
    /// Senders that have calls waiting, in turn.
    turns: VecDeque<Arc<str>>,
    running: usize,
    bytes: usize,
}

#[derive(Debug, Default)]
struct Sender {
    departed: CancellationToken,
    uid: Option<u32>,
    asked: bool,
    running: usize,
    waiting: VecDeque<Message>,
    bytes: usize,
    unread: usize,
    held: bool,
}

#[derive(Debug, Default)]
struct User {
    running: usize,
    waiting: usize,
}

impl Gate {
    /// A gate with these limits.
    pub fn new(limits: Limits) -> Gate {
        Gate { limits, state: Mutex::default() }
    }

    /// Takes a call in, or not.
    pub fn admit(&self, sender: &str, message: Message) -> Admission {
        let mut state = self.lock();
        let State { senders, users, turns, bytes, .. } = &mut *state;
        let name: Arc<str> = senders.get_key_value(sender).map_or_else(|| sender.into(), |(name, _)| name.clone());
        let line = senders.entry(name.clone()).or_default();
        let cost = message.data().len() + OVERHEAD;
        let user = line.uid.map(|uid| users.entry(uid).or_default());
        let refused = self.refusal(line, user.as_deref(), *bytes, cost);
        match refused {
            Some(_) if line.held => return Admission::Dropped,
            Some(why) => return Admission::Refused(why),
            None => {}
        }
        if let Some(user) = user {
            user.waiting += 1;
        }
        if line.waiting.is_empty() {
            turns.push_back(name);
        }
        line.waiting.push_back(message);
        line.bytes += cost;
        *bytes += cost;
        let known = line.asked || line.uid.is_some();
        line.asked = true;
        if known { Admission::Queued } else { Admission::Stranger }
    }

    /// Why a call of `cost` bytes may not come in.
    fn refusal(&self, line: &Sender, user: Option<&User>, bytes: usize, cost: usize) -> Option<String> {
        let limits = &self.limits;
        if line.waiting.len() >= limits.waiting {
            return Some(format!(
                "{} calls of this client are waiting already; wait for answers before calling again",
                limits.waiting
            ));
        }
        if line.bytes + cost > limits.bytes {
            return Some(format!("the calls of this client that wait for answers exceed {} bytes", limits.bytes));
        }
        if user.is_some_and(|user| user.waiting >= limits.waiting_of_user) {
            return Some(format!("{} calls of this user are waiting already", limits.waiting_of_user));
        }
        let full = bytes + cost > limits.bytes_in_all;
        full.then(|| "virtd holds as many calls as it may; try again later".to_owned())
    }

    /// A sender's user is now known; or cannot be, and its calls are forgotten and returned.
    pub fn identified(&self, sender: &str, uid: Option<u32>) -> Vec<Message> {
        let mut state = self.lock();
        let State { senders, users, .. } = &mut *state;
        let Some(line) = senders.get_mut(sender) else { return Vec::new() };
        match uid {
            Some(uid) => {
                if line.uid.replace(uid).is_none() {
                    users.entry(uid).or_default().waiting += line.waiting.len();
                }
                Vec::new()
            }
            None => state.forget(sender),
        }
    }

    /// The next call that may begin.
    pub fn next(&self) -> Option<Work> {
        let mut state = self.lock();
        for _ in 0..state.turns.len() {
            let sender = state.turns.pop_front()?;
            let work = state.begin(&sender, &self.limits);
            if state.senders.get(&sender).is_some_and(|line| !line.waiting.is_empty()) {
                state.turns.push_back(sender);
            }
            if work.is_some() {
                return work;
            }
        }
        None
    }

    /// A call is done.
    pub fn ended(&self, sender: &str, uid: u32, size: usize) {
        let mut state = self.lock();
        let cost = size + OVERHEAD;
        state.running -= 1;
        state.bytes = state.bytes.saturating_sub(cost);
        state.release(uid, |user| user.running -= 1);
        if let Some(line) = state.senders.get_mut(sender) {
            line.running -= 1;
            line.bytes = line.bytes.saturating_sub(cost);
        }
    }

    /// A sender has left: its queue goes. What is at work ends by itself.
    pub fn left(&self, sender: &str) {
        self.lock().forget(sender);
    }

    /// The connection has ended.
    pub fn all_left(&self) {
        let mut state = self.lock();
        let senders: Vec<_> = state.senders.keys().cloned().collect();
        for sender in senders {
            state.forget(&sender);
        }
    }

    /// A sender is there, since a call of it has just been read. How it stands.
    pub fn meet(&self, sender: &str) -> Standing {
        let mut state = self.lock();
        match state.senders.get(sender) {
            Some(line) if line.held => Standing::Held,
            Some(line) if line.waiting.len() >= self.limits.waiting => Standing::Full,
            Some(_) => Standing::Free,
            None => {
                if self.limits.unread.is_some() {
                    state.senders.insert(sender.into(), Sender::default());
                }
                Standing::Free
            }
        }
    }

    /// A sender was answered with so many bytes. True: it is held from now on, see whether it reads.
    pub fn answered(&self, sender: &str, size: usize) -> bool {
        let Some(limit) = self.limits.unread else { return false };
        let mut state = self.lock();
        let Some(line) = state.senders.get_mut(sender) else { return false };
        line.unread += size + OVERHEAD;
        let begins = line.unread > limit && !line.held;
        line.held |= begins;
        begins
    }

    /// A held sender has only so many bytes left to read. True: that will do, its calls go on.
    pub fn drained(&self, sender: &str, left: usize) -> bool {
        let limit = self.limits.unread.unwrap_or(usize::MAX);
        let mut state = self.lock();
        let Some(line) = state.senders.get_mut(sender) else { return true };
        line.held = left > limit / 2;
        line.unread = left;
        !line.held
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes the sender's first call out of its queue, if it may begin.
    fn begin(&mut self, sender: &Arc<str>, limits: &Limits) -> Option<Work> {
        let line = self.senders.get_mut(sender)?;
        let uid = line.uid?;
        let user = self.users.entry(uid).or_default();
        let share = line.running < limits.running && user.running < limits.running_of_user;
        if line.held || !share || self.running >= limits.running_in_all {
            return None;
        }
        let message = line.waiting.pop_front()?;
        line.running += 1;
        user.running += 1;
        user.waiting -= 1;
        self.running += 1;
        Some(Work { message, sender: sender.clone(), uid, departed: line.departed.clone() })
    }

    /// Drops a sender and its queue; its calls at work stay counted in all.
    fn forget(&mut self, sender: &str) -> Vec<Message> {
        let Some(line) = self.senders.remove(sender) else { return Vec::new() };
        line.departed.cancel();
        self.turns.retain(|name| **name != *sender);
        let waiting: usize = line.waiting.iter().map(|message| message.data().len() + OVERHEAD).sum();
        self.bytes = self.bytes.saturating_sub(waiting);
        if let Some(uid) = line.uid {
            self.release(uid, |user| user.waiting -= line.waiting.len());
        }
        line.waiting.into()
    }

    /// Gives back part of a user's share, and forgets a user who has none left.
    fn release(&mut self, uid: u32, give_back: impl FnOnce(&mut User)) {
        if let Entry::Occupied(mut user) = self.users.entry(uid) {
            give_back(user.get_mut());
            if user.get().running == 0 && user.get().waiting == 0 {
                user.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Message {
        Message::method_call("/", "Ping").build(&()).unwrap()
    }

    fn gate(limits: Limits) -> Gate {
        Gate::new(limits)
    }

    fn small() -> Limits {
        Limits { running: 2, waiting: 3, ..Limits::default() }
    }

    #[test]
    fn a_sender_has_its_share_and_no_more() {
        let gate = gate(small());
        assert_eq!(gate.admit("a", call()), Admission::Stranger);
        assert!(gate.next().is_none(), "nobody runs before it is known who asks");
        gate.identified("a", Some(1000));
        let (one, two) = (gate.next(), {
            gate.admit("a", call());
            gate.next()
        });
        assert!(one.is_some() && two.is_some());
        for _ in 0..3 {
            assert_eq!(gate.admit("a", call()), Admission::Queued);
        }
        assert!(matches!(gate.admit("a", call()), Admission::Refused(_)));
        assert!(gate.next().is_none());
        let one = one.unwrap();
        gate.ended("a", one.uid, one.message.data().len());
        assert!(gate.next().is_some());
        assert_eq!(gate.admit("a", call()), Admission::Queued);
    }

    #[test]
    fn senders_take_turns() {
        let gate = gate(Limits { running_in_all: 1, ..Limits::default() });
        for sender in ["a", "a", "a", "b", "c"] {
            gate.admit(sender, call());
            gate.identified(sender, Some(7));
        }
        let mut order = String::new();
        while let Some(work) = gate.next() {
            order.push_str(&work.sender);
            gate.ended(&work.sender, work.uid, work.message.data().len());
        }
        assert_eq!(order, "abcaa");
    }

    #[test]
    fn a_user_cannot_fill_the_house_with_connections() {
        let gate = gate(Limits { running_of_user: 3, ..Limits::default() });
        for number in 0..10 {
            gate.admit(&format!(":1.{number}"), call());
            gate.identified(&format!(":1.{number}"), Some(1000));
        }
        let running: Vec<_> = std::iter::from_fn(|| gate.next()).collect();
        assert_eq!(running.len(), 3);
        gate.admit("other", call());
        gate.identified("other", Some(1001));
        assert_eq!(gate.next().map(|work| work.uid), Some(1001));
    }

    #[test]
    fn leaving_gives_everything_back() {
        let gate = gate(Limits { bytes: 4096, bytes_in_all: 4096, ..Limits::default() });
        gate.admit("a", call());
        gate.identified("a", Some(1));
        let work = gate.next().unwrap();
        while gate.admit("a", call()) == Admission::Queued {}
        assert!(matches!(gate.admit("b", call()), Admission::Refused(_)));
        gate.left("a");
        assert!(gate.next().is_none() && work.departed.is_cancelled());
        gate.ended("a", work.uid, work.message.data().len());
        let state = gate.lock();
        assert_eq!((state.bytes, state.running, state.users.len(), state.turns.len()), (0, 0, 0, 0));
        drop(state);
        assert_eq!(gate.admit("b", call()), Admission::Stranger);
    }

    #[test]
    fn who_does_not_read_waits() {
        let gate = gate(Limits { unread: Some(2000), waiting: 1, ..Limits::default() });
        assert_eq!(gate.meet("a"), Standing::Free);
        assert!(!gate.answered("a", 1000));
        assert!(gate.answered("a", 1000));
        assert_eq!(gate.meet("a"), Standing::Held);
        assert!(!gate.answered("a", 1000), "it is looked at once");
        gate.admit("a", call());
        gate.identified("a", Some(1));
        assert!(gate.next().is_none());
        assert_eq!(gate.admit("a", call()), Admission::Dropped);
        assert!(!gate.drained("a", 1500) && gate.drained("a", 100));
        assert!(gate.next().is_some());
    }
}
