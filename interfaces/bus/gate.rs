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
//! **Shares.** Calls at work are bounded in all, so are bytes, of calls that wait or run and of answers that are unread; and
//! no user may have more of them than it leaves to others. Senders whose user nobody has asked for yet count as one user.
//!
//! **Readers.** A bus keeps what a client has not read yet, and counts it against us: dbus-daemon stops listening to a
//! service of which it holds 127 MiB. So a sender that has been answered with [`Unread::of_sender`] bytes, or whose user
//! has more unread than its share, is looked at by the dispatcher; while it does not read, its calls wait here, the quick
//! ones too. Should its queue fill up even so, its calls are dropped without an answer, which it would not read. What it
//! was answered counts as unread until the bus says otherwise.
//!
//! **Descriptors.** A bus counts those that it keeps for clients against us, too, and dbus-daemon reads nothing more from us
//! while it has 64 ([`Descriptors`] is how many we let it have). An answer with one waits for its place, and other calls of
//! its sender do not; whoever was sent one is looked at until it has read it. And those that calls bring to us are taken in
//! only where [`Gate::brings`] has places for them, which they have until they are closed.

use super::source::Brought;
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
    /// Calls at work in all, of which no user has more than it leaves to others.
    pub running_in_all: usize,
    /// Bytes in all, of which no user has more than it leaves to others.
    pub bytes_in_all: usize,
    /// How much may be unread; `None`: it is not looked at.
    pub unread: Option<Unread>,
    /// Descriptors that calls have brought, and that are open here.
    pub brought: Descriptors,
}

/// How much of our answers may be unread.
#[derive(Clone, Copy, Debug)]
pub struct Unread {
    /// By one sender, before its reading is looked at.
    pub of_sender: usize,
    /// By one sender whose user nobody has asked for yet.
    pub of_stranger: usize,
    /// In all, of which no user has more than it leaves to others. One of the largest answers can come on top: that which
    /// is being made. It is little, as a busy bus takes some KiB of ours at a time, and who reads waits behind who does not.
    pub in_all: usize,
    /// The same of descriptors.
    pub descriptors: Descriptors,
}

/// How many descriptors there may be.
#[derive(Clone, Copy, Debug)]
pub struct Descriptors {
    /// Of one sender.
    pub of_sender: usize,
    /// Of all senders of one user.
    pub of_user: usize,
    /// In all, of which no user has more than it leaves to others.
    pub in_all: usize,
}

impl Descriptors {
    /// Those that may be unread: half of what dbus-daemon takes from one connection (`max_incoming_unix_fds`, 64 on a system
    /// bus) before it stops reading from it.
    const UNREAD: Descriptors = Descriptors { of_sender: 4, of_user: 8, in_all: 32 };
    /// Those that may be here: of one sender as many as dbus-daemon lets a message have.
    const BROUGHT: Descriptors = Descriptors { of_sender: 16, of_user: 32, in_all: 128 };
}

/// What the bus keeps for a client that has not read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Bytes of messages.
    pub bytes: usize,
    /// Descriptors that go with them.
    pub descriptors: usize,
}

impl Default for Unread {
    fn default() -> Unread {
        Unread { of_sender: 1 << 20, of_stranger: 256 << 10, in_all: 4 << 20, descriptors: Descriptors::UNREAD }
    }
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
            bytes_in_all: 32 << 20,
            unread: None,
            brought: Descriptors::BROUGHT,
        }
    }
}

/// A call with the files that it has brought.
#[derive(Debug)]
pub struct Incoming {
    /// The call.
    pub message: Message,
    /// The files, if it has brought some.
    pub brought: Option<Brought>,
}

impl From<Message> for Incoming {
    fn from(message: Message) -> Incoming {
        Incoming { message, brought: None }
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
    /// The files that it has brought.
    pub brought: Option<Brought>,
    /// Its sender.
    pub sender: Arc<str>,
    /// Its sender's user.
    pub uid: u32,
    /// Fires when its sender has left.
    pub departed: CancellationToken,
}

/// The gate; all its copies are one.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    limits: Limits,
    state: Arc<Mutex<State>>,
}

/// The place of a descriptor that a call has brought; given back when it is dropped.
#[derive(Debug)]
pub struct FilePlace {
    number: u64,
    state: Arc<Mutex<State>>,
}

impl Drop for FilePlace {
    fn drop(&mut self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).brought.remove(&self.number);
    }
}

#[derive(Debug, Default)]
struct State {
    senders: HashMap<Arc<str>, Sender>,
    /// By uid; `None` is whoever is not known yet.
    users: HashMap<Option<u32>, User>,
    /// Senders that have calls waiting, in turn.
    turns: VecDeque<Arc<str>>,
    running: usize,
    /// Of calls that wait or run.
    bytes: usize,
    /// Of answers.
    unread: usize,
    /// Of answers that are unread.
    descriptors: usize,
    /// Descriptors that calls have brought, each with whose it is as far as that is known.
    brought: HashMap<u64, (Arc<str>, Option<u32>)>,
    /// The number of the last of these.
    last_brought: u64,
}

#[derive(Debug, Default)]
struct Sender {
    departed: CancellationToken,
    uid: Option<u32>,
    asked: bool,
    running: usize,
    waiting: VecDeque<Incoming>,
    bytes: usize,
    unread: usize,
    held: bool,
    descriptors: usize,
    /// Of these, those that it was sent since it was last looked at.
    descriptors_since: usize,
    /// Somebody looks whether it reads.
    watched: bool,
}

#[derive(Debug, Default)]
struct User {
    running: usize,
    waiting: usize,
    bytes: usize,
    unread: usize,
    descriptors: usize,
}

impl Gate {
    /// A gate with these limits.
    pub fn new(limits: Limits) -> Gate {
        Gate { limits, state: Arc::default() }
    }

    /// Takes a call in, or not.
    pub fn admit(&self, sender: &str, call: impl Into<Incoming>) -> Admission {
        let call = call.into();
        let mut state = self.lock();
        let State { senders, users, turns, bytes, .. } = &mut *state;
        let name: Arc<str> = senders.get_key_value(sender).map_or_else(|| sender.into(), |(name, _)| name.clone());
        let line = senders.entry(name.clone()).or_default();
        let cost = call.message.data().len() + OVERHEAD;
        match self.refusal(line, users.get(&line.uid).unwrap_or(&User::default()), *bytes, cost) {
            Some(_) if line.held => return Admission::Dropped,
            Some(why) => return Admission::Refused(why),
            None => {}
        }
        let user = users.entry(line.uid).or_default();
        if line.waiting.is_empty() {
            turns.push_back(name);
        }
        line.waiting.push_back(call);
        line.bytes += cost;
        user.waiting += 1;
        user.bytes += cost;
        *bytes += cost;
        let known = line.asked || line.uid.is_some();
        line.asked = true;
        if known { Admission::Queued } else { Admission::Stranger }
    }

    /// Why a call of `cost` bytes may not come in.
    fn refusal(&self, line: &Sender, user: &User, bytes: usize, cost: usize) -> Option<String> {
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
        if user.waiting >= limits.waiting_of_user {
            return Some(format!("{} calls of this user are waiting already", limits.waiting_of_user));
        }
        if bytes + cost > limits.bytes_in_all {
            return Some("virtd holds as many calls as it may; try again later".to_owned());
        }
        let left = limits.bytes_in_all - bytes - cost;
        (user.bytes + cost > left).then(|| {
            "the calls of this user that wait for answers take more than its share; wait for answers before calling again"
                .to_owned()
        })
    }

    /// A sender's user is now known; or cannot be, and its calls are forgotten and returned.
    pub fn identified(&self, sender: &str, uid: Option<u32>) -> Vec<Incoming> {
        let mut state = self.lock();
        match uid {
            Some(uid) => {
                state.becomes_known(sender, uid);
                Vec::new()
            }
            None => state.forget(sender),
        }
    }

    /// Whether somebody must find out who a sender is; said once.
    pub fn is_to_be_asked_for(&self, sender: &str) -> bool {
        let mut state = self.lock();
        let Some(line) = state.senders.get_mut(sender) else { return false };
        !std::mem::replace(&mut line.asked, true) && line.uid.is_none()
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
        state.release(Some(uid), |user| {
            user.running -= 1;
            user.bytes = user.bytes.saturating_sub(cost);
        });
        if let Some(line) = state.senders.get_mut(sender) {
            line.running -= 1;
            line.bytes = line.bytes.saturating_sub(cost);
        }
    }

    /// A sender has left: its queue goes. What is at work ends by itself.
    pub fn left(&self, sender: &str) {
        // What its calls have brought gives its places back behind the lock.
        let forgotten = self.lock().forget(sender);
        drop(forgotten);
    }

    /// The connection has ended.
    pub fn all_left(&self) {
        let forgotten: Vec<_> = {
            let mut state = self.lock();
            let senders: Vec<_> = state.senders.keys().cloned().collect();
            senders.iter().flat_map(|sender| state.forget(sender)).collect()
        };
        drop(forgotten);
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
        let cost = size + OVERHEAD;
        let State { senders, users, unread, .. } = &mut *state;
        let Some(line) = senders.get_mut(sender) else { return false };
        let user = users.entry(line.uid).or_default();
        line.unread += cost;
        user.unread += cost;
        *unread += cost;
        let own = if line.uid.is_some() { limit.of_sender } else { limit.of_stranger };
        let begins = !line.held && (line.unread > own || user.unread > limit.in_all.saturating_sub(*unread));
        line.held |= begins;
        begins && !std::mem::replace(&mut line.watched, true)
    }

    /// Whether a sender's answers wait until it has read. One that has left may be answered: nobody keeps that.
    pub fn is_held(&self, sender: &str) -> bool {
        self.lock().senders.get(sender).is_some_and(|line| line.held)
    }

    /// Whether a sender may be answered with so many descriptors. True: they count from now on; answer, and then see whether
    /// it reads ([`Gate::is_to_be_watched`]). False: it, or its user, has to read first.
    pub fn takes_descriptors(&self, sender: &str, count: usize) -> bool {
        let Some(Unread { descriptors: limit, .. }) = self.limits.unread else { return true };
        let mut state = self.lock();
        let State { senders, users, descriptors, .. } = &mut *state;
        let Some(line) = senders.get_mut(sender) else { return true };
        let user = users.entry(line.uid).or_default();
        let share = limit.of_user.min(limit.in_all.saturating_sub(*descriptors));
        let takes = line.descriptors < limit.of_sender && user.descriptors < share;
        if takes {
            line.descriptors += count;
            line.descriptors_since += count;
            user.descriptors += count;
            *descriptors += count;
        }
        let uid = line.uid;
        state.release(uid, |_| ());
        takes
    }

    /// A call of a sender brings so many descriptors: places for all of them, or none. Those whose user is not known yet are of
    /// one user.
    pub fn brings(&self, sender: &str, count: usize) -> Option<Vec<FilePlace>> {
        let limit = self.limits.brought;
        let mut state = self.lock();
        let line = state.senders.get_key_value(sender);
        let uid = line.and_then(|(_, line)| line.uid);
        let name = line.map_or_else(|| sender.into(), |(name, _)| name.clone());
        let of_sender = state.brought.values().filter(|(of, _)| **of == *sender).count();
        let of_user = state.brought.values().filter(|(_, known)| *known == uid).count();
        let left = limit.in_all.saturating_sub(state.brought.len() + count);
        if of_sender + count > limit.of_sender || of_user + count > limit.of_user.min(left) {
            return None;
        }
        let places = (0..count).map(|_| {
            state.last_brought += 1;
            let number = state.last_brought;
            state.brought.insert(number, (name.clone(), uid));
            FilePlace { number, state: self.state.clone() }
        });
        Some(places.collect())
    }

    /// Whether somebody must see whether a sender, which was sent descriptors, reads them; said once.
    pub fn is_to_be_watched(&self, sender: &str) -> bool {
        let mut state = self.lock();
        let line = state.senders.get_mut(sender).filter(|line| line.descriptors > 0);
        line.is_some_and(|line| !std::mem::replace(&mut line.watched, true))
    }

    /// A watched sender is about to be looked at: how many descriptors it may have unread, by what it was sent.
    pub fn looks_at(&self, sender: &str) -> usize {
        let mut state = self.lock();
        let line = state.senders.get_mut(sender);
        line.map_or(0, |line| {
            line.descriptors_since = 0;
            line.descriptors
        })
    }

    /// Of a watched sender the bus keeps so much. True: that will do, its calls go on, and it is watched no more.
    pub fn drained(&self, sender: &str, left: Backlog) -> bool {
        let Some(limit) = self.limits.unread else { return true };
        let mut state = self.lock();
        let State { senders, users, unread, descriptors, .. } = &mut *state;
        let Some(line) = senders.get_mut(sender) else { return true };
        let user = users.entry(line.uid).or_default();
        user.unread = (user.unread + left.bytes).saturating_sub(line.unread);
        *unread = (*unread + left.bytes).saturating_sub(line.unread);
        line.unread = left.bytes;
        // Whether the bus had those already that were sent while it was asked, nobody knows.
        let kept = left.descriptors + line.descriptors_since;
        user.descriptors = (user.descriptors + kept).saturating_sub(line.descriptors);
        *descriptors = (*descriptors + kept).saturating_sub(line.descriptors);
        line.descriptors = kept;
        let too_much = left.bytes > limit.of_sender / 2 || user.unread > limit.in_all.saturating_sub(*unread);
        line.held &= too_much;
        line.watched = line.held || kept > 0;
        let (uid, done) = (line.uid, !line.watched);
        state.release(uid, |_| ());
        done
    }

    /// How many bytes a watched sender may have unread, by what it was answered.
    pub fn unread(&self, sender: &str) -> usize {
        self.lock().senders.get(sender).map_or(0, |line| line.unread)
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
        let user = self.users.entry(line.uid).or_default();
        let left = limits.running_in_all.saturating_sub(self.running);
        let share = line.running < limits.running && user.running < limits.running_of_user.min(left);
        if line.held || !share {
            return None;
        }
        let Incoming { message, brought } = line.waiting.pop_front()?;
        line.running += 1;
        user.running += 1;
        user.waiting -= 1;
        self.running += 1;
        Some(Work { message, brought, sender: sender.clone(), uid, departed: line.departed.clone() })
    }

    /// What a sender has counted for a stranger's counts for its user.
    fn becomes_known(&mut self, sender: &str, uid: u32) {
        let Some(line) = self.senders.get_mut(sender) else { return };
        if line.uid.is_some() {
            return;
        }
        line.uid = Some(uid);
        for (_, known) in self.brought.values_mut().filter(|(of, _)| **of == *sender) {
            *known = Some(uid);
        }
        let (waiting, bytes, unread) = (line.waiting.len(), line.bytes, line.unread);
        let descriptors = line.descriptors;
        let user = self.users.entry(Some(uid)).or_default();
        user.waiting += waiting;
        user.bytes += bytes;
        user.unread += unread;
        user.descriptors += descriptors;
        self.release(None, |user| user.give_back(waiting, bytes, Backlog { bytes: unread, descriptors }));
    }

    /// Drops a sender and its queue; its calls at work stay counted.
    fn forget(&mut self, sender: &str) -> Vec<Incoming> {
        let Some(line) = self.senders.remove(sender) else { return Vec::new() };
        line.departed.cancel();
        self.turns.retain(|name| **name != *sender);
        let waiting: usize = line.waiting.iter().map(|call| call.message.data().len() + OVERHEAD).sum();
        self.bytes = self.bytes.saturating_sub(waiting);
        self.unread = self.unread.saturating_sub(line.unread);
        self.descriptors = self.descriptors.saturating_sub(line.descriptors);
        let unread = Backlog { bytes: line.unread, descriptors: line.descriptors };
        self.release(line.uid, |user| user.give_back(line.waiting.len(), waiting, unread));
        line.waiting.into()
    }

    /// Gives back part of a user's share, and forgets a user who has none left.
    fn release(&mut self, uid: Option<u32>, give_back: impl FnOnce(&mut User)) {
        if let Entry::Occupied(mut user) = self.users.entry(uid) {
            give_back(user.get_mut());
            let User { running, waiting, unread, descriptors, .. } = user.get();
            if (*running, *waiting, *unread, *descriptors) == (0, 0, 0, 0) {
                user.remove();
            }
        }
    }
}

impl User {
    fn give_back(&mut self, waiting: usize, bytes: usize, unread: Backlog) {
        self.waiting = self.waiting.saturating_sub(waiting);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.unread = self.unread.saturating_sub(unread.bytes);
        self.descriptors = self.descriptors.saturating_sub(unread.descriptors);
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
        let limits = Limits { bytes: 4096, bytes_in_all: 8192, unread: Some(Unread::default()), ..Limits::default() };
        let gate = gate(limits);
        gate.admit("a", call());
        gate.identified("a", Some(1));
        gate.answered("a", 100);
        assert!(gate.takes_descriptors("a", 1));
        let work = gate.next().unwrap();
        while gate.admit("a", call()) == Admission::Queued {}
        gate.left("a");
        assert!(gate.next().is_none() && work.departed.is_cancelled());
        gate.ended("a", work.uid, work.message.data().len());
        let state = gate.lock();
        assert_eq!((state.bytes, state.unread, state.descriptors, state.running), (0, 0, 0, 0));
        assert_eq!((state.users.len(), state.turns.len(), state.senders.len()), (0, 0, 0));
        drop(state);
        assert_eq!(gate.admit("b", call()), Admission::Stranger);
    }

    /// As many calls as the user's senders, of which each has a few, may bring in.
    fn fill(gate: &Gate, uid: u32) -> usize {
        let mut taken = 0;
        for number in 0.. {
            let sender = format!("{uid}.{number}");
            let before = taken;
            gate.admit(&sender, call());
            gate.identified(&sender, Some(uid));
            while gate.admit(&sender, call()) == Admission::Queued {
                taken += 1;
            }
            if taken == before {
                break;
            }
        }
        gate.lock().users.get(&Some(uid)).map_or(0, |user| user.bytes)
    }

    #[test]
    fn bytes_are_bounded_over_all_senders_and_something_is_left_for_the_next_user() {
        const ALL: usize = 64 << 10;
        let gate = gate(Limits { bytes: 4096, bytes_in_all: ALL, ..Limits::default() });
        let first = fill(&gate, 1);
        // One call of theirs may have come in while nobody knew whose it was.
        assert!(first > ALL / 2 - 2048 && first < ALL / 2 + 1024, "{first}");
        let second = fill(&gate, 2);
        assert!(second > ALL / 4 - 2048 && second < ALL / 4 + 1024, "{second}");
        let third = fill(&gate, 3);
        assert!(third > ALL / 8 - 2048 && third < ALL / 8 + 1024, "{third}");
        assert!(gate.lock().bytes <= ALL);
    }

    #[test]
    fn senders_nobody_knows_yet_are_one_user() {
        const ALL: usize = 64 << 10;
        let gate = gate(Limits { bytes_in_all: ALL, ..Limits::default() });
        let refused =
            (0..1000).find(|number| matches!(gate.admit(&format!(":{number}"), call()), Admission::Refused(_)));
        assert!(refused.is_some());
        assert!(gate.lock().bytes <= ALL / 2);
        // Whose user is found counts for it from then on, and nobody more for the others.
        gate.identified(":0", Some(7));
        assert_eq!(gate.admit(":1001", call()), Admission::Stranger);
        assert!(gate.lock().users[&Some(7)].bytes > 0);
    }

    fn unread(of_sender: usize, in_all: usize) -> Limits {
        let unread = Unread { of_sender, of_stranger: of_sender, in_all, ..Unread::default() };
        Limits { unread: Some(unread), waiting: 1, ..Limits::default() }
    }

    fn kept(bytes: usize, descriptors: usize) -> Backlog {
        Backlog { bytes, descriptors }
    }

    #[test]
    fn descriptors_that_are_brought_are_bounded_of_senders_of_users_and_in_all() {
        let gate = gate(Limits::default());
        let Descriptors { of_sender, of_user, in_all } = Descriptors::BROUGHT;
        let known = |sender: &str, uid| {
            gate.admit(sender, call());
            gate.identified(sender, Some(uid));
        };
        assert!(gate.brings("a", of_sender + 1).is_none());
        let mut held = gate.brings("a", of_sender).unwrap();
        assert!(gate.brings("a", 1).is_none(), "these are a's");
        held.extend(gate.brings("b", of_user - of_sender).unwrap());
        assert!(gate.brings("c", 1).is_none(), "whose user is not known is of one user");
        known("a", 1);
        held.extend(gate.brings("c", of_sender).unwrap());
        known("d", 1);
        held.extend(gate.brings("d", of_user - of_sender).unwrap());
        assert!(gate.brings("d", 1).is_none());
        for uid in 2..6 {
            known(&uid.to_string(), uid);
            held.extend((0..of_sender).map_while(|_| gate.brings(&uid.to_string(), 1)).flatten());
        }
        assert!(held.len() > in_all / 2 && held.len() < in_all, "{}", held.len());
        known("e", 50);
        assert_eq!(gate.brings("e", 1).map(|places| places.len()), Some(1), "others leave some");
        // Who has left still has them, until they are closed.
        gate.left("d");
        assert_eq!(gate.lock().brought.len(), held.len());
        held.clear();
        assert!(gate.lock().brought.is_empty() && gate.brings("d", of_sender).is_some());
    }

    #[test]
    fn who_leaves_with_calls_that_wait_gives_their_places_back() {
        let gate = gate(Limits::default());
        let brings = |sender: &str| {
            let places = gate.brings(sender, 2).unwrap().into_iter().map(Arc::new).collect();
            let brought = Some(Brought { files: Vec::new(), places });
            gate.admit(sender, Incoming { message: call(), brought });
        };
        ["a", "b", "c"].into_iter().for_each(brings);
        assert_eq!(gate.lock().brought.len(), 6);
        gate.left("a");
        assert_eq!(gate.lock().brought.len(), 4);
        drop(gate.identified("b", None));
        assert_eq!(gate.lock().brought.len(), 2);
        gate.all_left();
        assert!(gate.lock().brought.is_empty());
    }

    /// So many descriptors, one by one, until a sender gets no more.
    fn sent_descriptors(gate: &Gate, sender: &str, uid: u32) -> usize {
        gate.meet(sender);
        gate.identified(sender, Some(uid));
        (0..100).find(|_| !gate.takes_descriptors(sender, 1)).unwrap()
    }

    #[test]
    fn descriptors_that_are_unread_are_bounded_of_senders_of_users_and_in_all() {
        let gate = gate(unread(1 << 20, 4 << 20));
        let Descriptors { of_sender, of_user, in_all } = Descriptors::UNREAD;
        assert_eq!(sent_descriptors(&gate, "a", 1), of_sender);
        assert!(gate.is_to_be_watched("a") && !gate.is_to_be_watched("a"), "it is looked at once");
        assert!(!gate.is_held("a"), "what brings no descriptor goes on");
        assert_eq!((sent_descriptors(&gate, "b", 1), sent_descriptors(&gate, "c", 1)), (of_user - of_sender, 0));
        let others: usize = (2..40).map(|uid| sent_descriptors(&gate, &uid.to_string(), uid)).sum();
        assert!(others + of_user > in_all / 2 && others + of_user <= in_all, "{others}");
        assert!(gate.lock().descriptors <= in_all);
    }

    #[test]
    fn who_has_read_its_descriptors_gets_more_and_so_does_its_user() {
        let gate = gate(unread(1 << 20, 4 << 20));
        assert_eq!((sent_descriptors(&gate, "a", 1), sent_descriptors(&gate, "b", 1)), (4, 4));
        assert!(gate.is_to_be_watched("a"));
        assert_eq!(gate.looks_at("a"), 4);
        assert!(!gate.drained("a", kept(0, 3)), "it is looked at until it has read them all");
        assert_eq!((sent_descriptors(&gate, "c", 1), sent_descriptors(&gate, "a", 1)), (1, 0));
        assert_eq!(gate.looks_at("a"), 3);
        assert!(gate.drained("a", Backlog::default()));
        // One that is sent while the bus is asked is not forgotten.
        gate.looks_at("a");
        assert!(gate.takes_descriptors("a", 1));
        assert!(!gate.drained("a", Backlog::default()));
        assert_eq!(gate.looks_at("a"), 1);
        assert!(gate.drained("a", Backlog::default()) && !gate.is_to_be_watched("a"));
        assert_eq!(gate.lock().descriptors, 5, "of the others");
    }

    #[test]
    fn who_does_not_read_waits() {
        let gate = gate(unread(2000, 1 << 20));
        assert_eq!(gate.meet("a"), Standing::Free);
        assert!(!gate.answered("a", 1000));
        assert!(gate.answered("a", 1000));
        assert_eq!(gate.meet("a"), Standing::Held);
        assert!(gate.is_held("a") && gate.unread("a") > 2000);
        assert!(!gate.answered("a", 1000), "it is looked at once");
        gate.admit("a", call());
        gate.identified("a", Some(1));
        assert!(gate.next().is_none());
        assert_eq!(gate.admit("a", call()), Admission::Dropped);
        assert!(!gate.drained("a", kept(1500, 0)) && gate.drained("a", kept(100, 0)));
        assert!(gate.next().is_some() && !gate.is_held("a"));
    }

    #[test]
    fn what_is_unread_is_bounded_over_all_connections_of_a_user() {
        const ALL: usize = 1 << 20;
        let gate = gate(unread(100 << 10, ALL));
        let answer = |sender: &str, uid| {
            gate.meet(sender);
            gate.identified(sender, Some(uid));
            gate.answered(sender, 50 << 10)
        };
        let held = (0..100).find(|number| answer(&format!("a{number}"), 1));
        assert!(held.is_some_and(|number| number <= 11), "{held:?}");
        assert!(!answer("b", 2), "another user's senders go on");
        // The connections that were not held are, with their next answer.
        assert!(answer("a0", 1));
        assert!(!gate.drained("a0", kept(51 << 10, 0)), "it has read nothing");
        for number in (0..=held.unwrap()).rev() {
            gate.drained(&format!("a{number}"), Backlog::default());
        }
        assert!(!gate.is_held("a0") && gate.lock().unread < 60 << 10);
    }

    #[test]
    fn who_is_not_known_is_asked_for_before_it_has_much() {
        let mut limits = unread(1 << 20, 8 << 20);
        limits.unread.as_mut().unwrap().of_stranger = 4096;
        let gate = gate(limits);
        gate.meet("a");
        assert!(gate.answered("a", 5000) && gate.is_to_be_asked_for("a") && !gate.is_to_be_asked_for("a"));
        gate.identified("a", Some(1));
        assert!(gate.drained("a", kept(5000, 0)));
        assert!(!gate.answered("a", 5000));
    }
}
