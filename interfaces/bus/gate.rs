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
#[path = "gate_tests.rs"]
mod tests;
