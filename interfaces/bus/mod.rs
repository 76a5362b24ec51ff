//! How calls come in: one loop over the messages of a connection, a bus or a single peer alike.
//!
//! ```text
//!  socket ─▶ loop ─┬─ a look at a row ───────────────▶ outbox ─▶ socket
//!                  └─ all else ─▶ gate ─▶ task ─▶ handler ─▶ outbox
//! ```
//!
//! The loop decides what a call is by the table of members, answers reads on the spot and hands the rest to the gate.
//! It waits for two things only: the next message, and room towards the socket, so a peer that does not read its
//! answers is not read from. It never calls out; a handler may, for the loop goes on reading meanwhile.
//!
//! Every buffer on the way is bounded in bytes: what lies between socket and loop by `socket.rs`, what waits, runs or is
//! unread at the other end by `gate.rs`, over all senders, and what is on its way out by `outbox.rs`.
//!
//! A call without an interface is refused, as it is by the bus policy: which method it means would depend on what else
//! the object has.

pub mod answers;
pub mod call;
pub mod gate;
mod header;
pub mod outbox;
pub mod rows;
pub mod socket;
pub mod source;
pub mod table;
mod understand;
pub mod wire;

use crate::caller::{Callers, Reading};
use crate::error::Error;
use answers::fits;
use call::{Call, Outcome, Reply, refusal};
use futures_util::{FutureExt, StreamExt};
use gate::{Admission, Backlog, Gate, Incoming, Limits, Standing, Work};
use outbox::Outbox;
use rows::Rows;
use socket::Intake;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use table::Table;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use understand::{Deed, Look, names};
use virt_model::driver::GivenFile;
use virt_service::authz::Caller;
use virt_service::fair::{FairPlace, FairPlaces};
use zbus::message::{Flags, Header, Type};
use zbus::{Connection, Message, MessageStream};

/// How many large answers are made and sent at once: others stand behind each.
const LARGE_ANSWERS: usize = 1;

/// When a client that does not read is looked at for the second time, and how seldom at last: each time takes twice as long
/// as the time before.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(4));

/// What a client is taken to have read between two looks, on a bus that cannot tell.
const READ_UNSEEN: Backlog = Backlog { bytes: 256 << 10, descriptors: 4 };

/// How long an answer with descriptors waits for its caller, or its caller's user, to read those that were sent before.
const DESCRIPTORS_WAIT: Duration = Duration::from_secs(10);

/// Who is at the other end of a connection.
#[derive(Debug)]
pub enum Who {
    /// A bus with many clients.
    Bus(Callers),
    /// One peer, and its user, whom the socket tells.
    Peer(u32),
}

/// One connection's way in.
#[derive(Debug)]
pub struct Bus {
    table: Arc<Table>,
    rows: Arc<Rows>,
    intake: Arc<Intake>,
    outbox: Arc<Outbox>,
    current: Current,
    gate: Gate,
    who: Who,
    large_answers: Arc<FairPlaces<u32>>,
    /// A held sender has read enough, or the connection has ended.
    drained: Notify,
}

/// The two directions of a connection.
#[derive(Debug, Default)]
pub struct Ways {
    /// What comes in, if its socket is measured.
    pub intake: Arc<Intake>,
    /// What goes out.
    pub outbox: Arc<Outbox>,
    /// Who serves there.
    pub current: Current,
}

/// The one that serves a bus now: another takes its place when the connection is made anew.
pub type Current = Arc<Mutex<Weak<Bus>>>;

/// The way to one client, for what it is told beside answers.
#[derive(Clone, Debug)]
pub struct Line {
    current: Current,
    sender: Arc<str>,
    uid: u32,
    departed: CancellationToken,
}

impl Line {
    /// A signal for that client alone; a single peer needs no address.
    pub fn addressed<'m>(&self, signal: zbus::message::Builder<'m>) -> zbus::message::Builder<'m> {
        if self.sender.is_empty() { signal } else { signal.destination(self.sender.to_string()) }
    }

    /// Tells it something, unless it does not read what it was told before, or nobody is connected. `large`: it may be, and is made
    /// in its turn among large answers.
    pub async fn tell(&self, large: bool, make: impl FnOnce() -> Result<Message, Error>) -> Result<(), Error> {
        let Some(bus) = self.bus() else { return Ok(()) };
        let _place = match large {
            true => {
                let place = bus.large_answers.take(&self.uid).await;
                bus.outbox.room_for_large().await;
                Some(place)
            }
            false => None,
        };
        // By another connection than it called by, it is not known yet.
        bus.gate.meet(&self.sender);
        if self.departed.is_cancelled()
            || bus.gate.is_held(&self.sender)
            || bus.outbox.is_full()
            || bus.outbox.is_closed()
        {
            return Ok(());
        }
        let signal = make()?;
        let size = signal.data().len();
        fits(size)?;
        bus.outbox.push(signal);
        if bus.gate.answered(&self.sender, size) {
            bus.watch_reading(self.sender.to_string());
        }
        Ok(())
    }

    /// There is nothing more to tell.
    pub fn end(self) {
        // It may have been met after it had left.
        if self.departed.is_cancelled()
            && let Some(bus) = self.bus()
        {
            bus.gate.left(&self.sender);
        }
    }

    fn bus(&self) -> Option<Arc<Bus>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }
}

impl Bus {
    /// A way in for one connection.
    pub fn new(table: Arc<Table>, rows: Arc<Rows>, ways: Ways, who: Who, limits: Limits) -> Arc<Bus> {
        let Ways { intake, outbox, current } = ways;
        let (gate, large_answers) = (Gate::new(limits), FairPlaces::new(LARGE_ANSWERS, LARGE_ANSWERS));
        let drained = Notify::new();
        let bus = Arc::new(Bus { table, rows, intake, outbox, current, gate, who, large_answers, drained });
        *bus.current.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&bus);
        bus
    }

    /// Serves until the connection ends. Then all clients have left; unless the bus took nothing any more, since another
    /// connection to it is made then: what they asked for goes on, and its answers are lost.
    pub async fn run(self: Arc<Self>, mut stream: MessageStream) {
        let connection = Connection::from(&stream);
        let (table, gate) = (self.table.clone(), self.gate.clone());
        self.intake.begin(Box::new(move |call| {
            table.takes_files(call.interface, call.member).then(|| gate.brings(call.sender, call.descriptors)).flatten()
        }));
        let outbox = self.outbox.clone();
        let writer = tokio::spawn(async move { outbox.write_to(&connection).await });
        while let Some(Ok(message)) = stream.next().await {
            self.intake.taken(message.data().len());
            match message.message_type() {
                Type::MethodCall => self.take(message),
                Type::Signal => self.hear(&message),
                Type::MethodReturn | Type::Error => {}
            }
            self.outbox.room().await;
        }
        self.intake.end();
        self.outbox.close();
        self.drained.notify_waiters();
        if !self.intake.stalled() {
            self.gate.all_left();
            if let Who::Bus(callers) = &self.who {
                callers.all_left();
            }
        }
        let _ = writer.await;
    }

    /// A call has come in.
    fn take(self: &Arc<Self>, call: Message) {
        let standing = self.gate.meet(sender(&call.header()));
        let brought = self.intake.files(&call);
        if brought.is_none() && (socket::brought_descriptors(&call) || !call.data().fds().is_empty()) {
            return self.refuse_files(&call, standing);
        }
        let call = Incoming { message: call, brought };
        match standing {
            Standing::Held => return self.admit(call),
            // It would be refused, or be a look that nobody wants the answer of; a flood should cost no more than this.
            Standing::Full if !wants_reply(&call.message) => return,
            Standing::Free | Standing::Full => {}
        }
        match self.understand(&call.message) {
            Ok(Deed::Look(look)) => self.look(&call.message, look),
            Ok(Deed::Survey(_)) if !wants_reply(&call.message) => {}
            Ok(Deed::Survey(_) | Deed::Run(_)) => self.admit(call),
            Err(error) => self.refuse(&call.message, &error),
        }
    }

    /// Refuses a call whose descriptors were not taken. One that has no use for them is refused as well: they were not sent for
    /// nothing.
    fn refuse_files(self: &Arc<Self>, call: &Message, standing: Standing) {
        if standing == Standing::Held {
            return;
        }
        let header = call.header();
        let known = names(&header).is_ok_and(|(_, interface, member)| self.table.takes_files(interface, member));
        if !known {
            return self.refuse(call, &Error::invalid_args("this method takes no file descriptors"));
        }
        let sender = sender(&header);
        // Who is known has places of its own.
        if self.gate.is_to_be_asked_for(sender) {
            self.identify(sender.to_owned());
        }
        let text = "the descriptors of this call were not taken: too many that this client or others of its user sent are \
                    open, or virtd has too many files open; wait for answers, and call again";
        self.refuse(call, &Error::limits(text));
    }

    /// Puts a call in its sender's queue.
    fn admit(self: &Arc<Self>, call: Incoming) {
        let message = call.message.clone();
        let sender = sender(&message.header()).to_owned();
        match self.gate.admit(&sender, call) {
            Admission::Queued => self.start_next(),
            Admission::Stranger => self.identify(sender),
            Admission::Refused(why) => self.refuse(&message, &Error::limits(why)),
            Admission::Dropped => tracing::debug!(sender, "a call was dropped: its sender does not read"),
        }
    }

    /// Finds out whose the first call of a sender is, and lets it begin.
    fn identify(self: &Arc<Self>, sender: String) {
        let callers = match &self.who {
            Who::Bus(callers) => callers.clone(),
            Who::Peer(uid) => {
                self.gate.identified(&sender, Some(*uid));
                return self.start_next();
            }
        };
        let bus = self.clone();
        tokio::spawn(async move {
            let uid = callers.uid(&sender).await;
            for call in bus.gate.identified(&sender, uid) {
                bus.refuse(&call.message, &Error::failed("the bus does not say who sent this call"));
            }
            bus.start_next();
        });
    }

    /// Begins whatever may begin.
    fn start_next(self: &Arc<Self>) {
        while let Some(work) = self.gate.next() {
            tokio::spawn(self.clone().work(work));
        }
    }

    /// Does what a call asks for, answers, and makes room for the next.
    async fn work(self: Arc<Self>, mut work: Work) {
        let files = work.brought.as_mut().map(|brought| std::mem::take(&mut brought.files)).unwrap_or_default();
        let done = AssertUnwindSafe(self.perform(&work, files)).catch_unwind().await;
        if done.is_err() {
            self.refuse(&work.message, &Error::internal("a bug in virtd ended this call; its log has more"));
        }
        self.gate.ended(&work.sender, work.uid, work.message.data().len());
        self.start_next();
    }

    async fn perform(self: &Arc<Self>, work: &Work, files: Vec<GivenFile>) {
        let call = &work.message;
        let outcome = match self.understand(call) {
            Ok(Deed::Look(look)) => return self.look(call, look),
            Ok(Deed::Survey(look)) => self.survey(call, look),
            Ok(Deed::Run(handler)) => handler.run(self.call(work, files)).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(Reply::Ready(reply)) if !reply.data().fds().is_empty() => self.hand_over(work, reply).await,
            Ok(Reply::Ready(reply)) if reply.data().len() < outbox::LARGE => {
                self.reads(work).await;
                self.answer(call, Ok(reply));
            }
            Ok(Reply::Ready(reply)) => {
                let Some(_place) = self.place_for_large_answer(work).await else { return };
                self.answer(call, Ok(reply));
            }
            Ok(Reply::Listing(make)) => {
                let Some(_place) = self.place_for_large_answer(work).await else { return };
                self.rows.listing(make, |made| self.answer(call, made));
            }
            Err(error) => self.refuse(call, &error),
        }
    }

    /// Answers with descriptors, as soon as not too many are unread.
    async fn hand_over(self: &Arc<Self>, work: &Work, reply: Message) {
        let (call, count) = (&work.message, reply.data().fds().len());
        let waited = tokio::time::timeout(DESCRIPTORS_WAIT, async {
            self.reads(work).await;
            self.until_drained(work, || self.gate.takes_descriptors(&work.sender, count)).await;
        });
        if waited.await.is_err() {
            let text =
                "too many descriptors that this client or others of its user were sent are unread; read the answers";
            return self.refuse(call, &Error::limits(text));
        }
        self.answer(call, Ok(reply));
        if self.gate.is_to_be_watched(&work.sender) {
            self.watch_reading(work.sender.to_string());
        }
    }

    /// Waits until the caller has read what it was answered before, or has left.
    async fn reads(&self, work: &Work) {
        self.until_drained(work, || !self.gate.is_held(&work.sender)).await;
    }

    /// Waits until somebody has read so much that `enough`, or until the caller has left or the connection has ended.
    async fn until_drained(&self, work: &Work, enough: impl Fn() -> bool) {
        loop {
            let drained = self.drained.notified();
            if enough() || self.outbox.is_closed() {
                return;
            }
            tokio::select! {
                () = drained => {}
                () = work.departed.cancelled() => return,
            }
        }
    }

    /// The place at which large answers are made, for a caller that reads; it holds none while it does not.
    /// Users take turns. `None`: the caller has left, and others need not stand behind an answer that nobody gets.
    async fn place_for_large_answer(&self, work: &Work) -> Option<FairPlace<u32>> {
        loop {
            self.reads(work).await;
            let place = self.large_answers.take(&work.uid).await;
            self.outbox.room_for_large().await;
            if work.departed.is_cancelled() {
                return None;
            }
            if !self.gate.is_held(&work.sender) || self.outbox.is_closed() {
                return Some(place);
            }
        }
    }

    /// A call as its handler sees it.
    fn call(self: &Arc<Self>, work: &Work, files: Vec<GivenFile>) -> Call {
        let header = work.message.header();
        let caller = Caller {
            bus_name: matches!(self.who, Who::Bus(_)).then(|| work.sender.to_string()),
            uid: work.uid,
            interactive: header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH),
            departed: match &self.who {
                Who::Bus(callers) => callers.departure(&work.sender, &work.departed),
                Who::Peer(_) => work.departed.clone(),
            },
        };
        let path = header.path().map_or("", |path| path.as_str()).into();
        let (current, departed) = (self.current.clone(), caller.departed.clone());
        let line = Line { current, sender: work.sender.clone(), uid: work.uid, departed };
        Call::new(work.message.clone(), caller, path, files).on(line)
    }

    /// Answers from the rows; the answer is on its way before they can change.
    fn look(self: &Arc<Self>, call: &Message, look: Look) {
        if wants_reply(call) {
            let header = call.header();
            let path = header.path().map_or("", |path| path.as_str());
            self.rows.read(|objects| self.answer(call, self.seen(call, objects, path, look)));
        }
    }

    /// The same for what takes longer.
    fn survey(self: &Arc<Self>, call: &Message, look: Look) -> Outcome {
        let (bus, call) = (self.clone(), call.clone());
        Ok(Reply::Listing(Box::new(move |objects| {
            let header = call.header();
            bus.seen(&call, objects, header.path().map_or("", |path| path.as_str()), look)
        })))
    }

    fn seen(&self, call: &Message, objects: &rows::Objects, path: &str, look: Look) -> Result<Message, Error> {
        match look {
            Look::Ping => answers::ping(call),
            Look::MachineId => answers::machine_id(call),
            Look::Get => answers::get(call, objects, path),
            Look::GetAll => answers::get_all(call, objects, path),
            Look::ManagedObjects => answers::managed_objects(call, objects, path),
            Look::Introspect => answers::introspect(call, objects, &self.table, path),
        }
    }

    /// Sends an answer, unless it is too large or nobody wants it.
    fn answer(self: &Arc<Self>, call: &Message, made: Result<Message, Error>) {
        match made.and_then(|reply| fits(reply.data().len()).map(|()| reply)) {
            Ok(reply) => self.send(call, reply),
            Err(error) => self.refuse(call, &error),
        }
    }

    fn refuse(self: &Arc<Self>, call: &Message, error: &Error) {
        if !wants_reply(call) {
            return;
        }
        match refusal(&call.header(), error) {
            Ok(reply) => self.send(call, reply),
            Err(failed) => tracing::error!(%error, %failed, "a refusal could not be made"),
        }
    }

    fn send(self: &Arc<Self>, call: &Message, reply: Message) {
        if !wants_reply(call) {
            return;
        }
        let size = reply.data().len();
        self.outbox.push(reply);
        let header = call.header();
        if self.gate.answered(sender(&header), size) {
            self.watch_reading(sender(&header).to_owned());
        }
    }

    /// Lets a held sender go on once it has read enough, and answers with descriptors once there are fewer. What cannot be
    /// found out, it has not read.
    fn watch_reading(self: &Arc<Self>, sender: String) {
        let Who::Bus(callers) = &self.who else { return };
        let (bus, callers) = (self.clone(), callers.clone());
        if self.gate.is_to_be_asked_for(&sender) {
            self.identify(sender.clone());
        }
        tokio::spawn(async move {
            let mut pause = LOOK_AGAIN.0;
            while !bus.outbox.is_closed() {
                let descriptors = bus.gate.looks_at(&sender);
                // What the bus does not have yet, it cannot count.
                bus.outbox.sent_so_far().await;
                let reading = callers.reading(&sender).await;
                let bytes = bus.gate.unread(&sender);
                let left = match reading {
                    Reading::Left(left) => left,
                    Reading::NotNow => Backlog { bytes, descriptors },
                    Reading::Never => Backlog {
                        bytes: bytes.saturating_sub(READ_UNSEEN.bytes),
                        descriptors: descriptors.saturating_sub(READ_UNSEEN.descriptors),
                    },
                };
                let done = bus.gate.drained(&sender, left);
                bus.drained.notify_waiters();
                if done {
                    break;
                }
                bus.start_next();
                tokio::time::sleep(pause).await;
                let reads = left.descriptors < descriptors;
                pause = if reads { LOOK_AGAIN.0 } else { LOOK_AGAIN.1.min(2 * pause) };
            }
            bus.drained.notify_waiters();
            bus.start_next();
        });
    }

    /// A signal has come in; the only one that matters tells that a client has left.
    fn hear(self: &Arc<Self>, signal: &Message) {
        let header = signal.header();
        let Who::Bus(callers) = &self.who else { return };
        let from_bus = header.sender().is_some_and(|sender| sender.as_str() == "org.freedesktop.DBus");
        if !from_bus || header.member().is_none_or(|member| member.as_str() != "NameOwnerChanged") {
            return;
        }
        let body = signal.body();
        if let Ok((name, _, "")) = body.deserialize::<(&str, &str, &str)>() {
            // In this order: see `Callers::departure`.
            self.gate.left(name);
            callers.left(name);
            self.drained.notify_waiters();
            self.start_next();
        }
    }
}

fn sender<'h>(header: &'h Header<'_>) -> &'h str {
    header.sender().map_or("", |sender| sender.as_str())
}

fn wants_reply(call: &Message) -> bool {
    !call.primary_header().flags().contains(Flags::NO_REPLY_EXPECTED)
}

#[cfg(test)]
mod tests;
