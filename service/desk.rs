//! Where documents are read: so many at once, whoever sends how many.
//!
//! A document costs many times its size while it is read, completed and checked, and callers choose how many and how large
//! they are. So whoever is to read one takes a [`Seat`] first, and keeps it as long as what was read is there:
//!
//! - There are some seats for documents as people write them ([`Reading::small`]), of which one user has a few, and a single
//!   seat for those that cost more. Users take turns at both, and what is at one never waits for the other. So memory is
//!   bounded over all users.
//! - What has been read may wait for files of the host that do not answer. A small document gives its seat back before that,
//!   and takes as many bytes as it costs of what there is for all of them ([`Seat::read_through`]): a user whose storage
//!   hangs can have others read.
//! - Of what has a seat, two of a user and as many in all as there are CPUs are being read, where that may block. One user
//!   never has all CPUs, unless there is but one.
//!
//! A document in a file is read from there by a few at a time, before it is known how large it is ([`Desk::reads_file`]).
//!
//! Nobody keeps a seat while a person is asked for a password: [`Seat::waits_for_nobody`].

use crate::authz::Caller;
use crate::fair::{FairPlace, FairPlaces};
use std::sync::Arc;
use virt_model::xml::Limits;

/// How much is read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Documents in all.
    pub at_once: usize,
    /// Documents of one user.
    pub per_user: usize,
    /// Seats for small documents that are being read: in all, and of one user.
    pub small: (usize, usize),
    /// What small documents that have been read and are dealt with may take, in bytes: in all, and of one user.
    pub dealt_with: (usize, usize),
}

impl Default for Reading {
    fn default() -> Reading {
        let at_once = std::thread::available_parallelism().map_or(1, usize::from);
        // On a small host one user's two would be all there are.
        let per_user = at_once.saturating_sub(1).clamp(1, 2);
        Reading { at_once, per_user, small: (16, 4), dealt_with: (12 << 20, 4 << 20) }
    }
}

/// Files with documents in them that are there at once: in all, and of one user.
const FILES: (usize, usize) = (4, 2);
/// What a small document may take while it is dealt with, in bytes.
const SMALL: usize = 512 << 10;
/// How often a document's text is there while it is dealt with: as given, as read, as it would be kept.
const COPIES: usize = 3;
/// What a piece of the tree takes beside its text, in bytes.
const PIECE: usize = 128;
/// What a machine takes that is made of the least document, in bytes.
const LEAST: usize = 32 << 10;

/// The desk.
#[derive(Debug)]
pub(crate) struct Desk {
    readers: Arc<FairPlaces<u32>>,
    small: Arc<FairPlaces<u32>>,
    large: Arc<FairPlaces<u32>>,
    dealt_with: Arc<FairPlaces<u32>>,
    files: Arc<FairPlaces<u32>>,
}

/// A place at the desk. Given back on drop.
#[derive(Debug)]
pub(crate) struct Seat {
    desk: Arc<Desk>,
    uid: u32,
    cost: usize,
    _place: FairPlace<u32>,
}

impl Desk {
    pub fn new(limits: Reading) -> Arc<Desk> {
        let (seats, each) = limits.small;
        Arc::new(Desk {
            readers: FairPlaces::new(limits.at_once, limits.per_user),
            small: FairPlaces::new(seats, each),
            large: FairPlaces::new(1, 1),
            dealt_with: FairPlaces::new(limits.dealt_with.0, limits.dealt_with.1),
            files: FairPlaces::new(FILES.0, FILES.1),
        })
    }

    /// Waits until a user may have a file read that holds a document, of which nobody knows the size before. To be kept as long as
    /// what was read is there; a seat may be taken meanwhile, and never the other way round.
    pub async fn reads_file(&self, uid: u32) -> FairPlace<u32> {
        self.files.take(&uid).await
    }

    /// Waits for a seat for documents of a user.
    pub async fn seat(self: &Arc<Desk>, uid: u32, documents: &[&str]) -> Seat {
        let cost = cost(documents);
        let seats = if cost > SMALL { &self.large } else { &self.small };
        Seat { desk: self.clone(), uid, cost, _place: seats.take(&uid).await }
    }
}

/// What documents take while they are dealt with, in bytes, or more than is small. A tag is an element and perhaps a text, a
/// sign of equality an attribute.
fn cost(documents: &[&str]) -> usize {
    let text: usize = documents.iter().map(|text| COPIES * text.len()).sum();
    if text > SMALL {
        return text;
    }
    let count = |text: &str, of: u8| text.bytes().filter(|byte| *byte == of).count();
    let pieces = documents.iter().map(|text| (2 * count(text, b'<') + count(text, b'=')).min(Limits::ACCEPTED.pieces));
    text + PIECE * pieces.sum::<usize>()
}

impl Seat {
    /// What `read` makes of a document.
    pub async fn read<T: Send + 'static>(&self, xml: &str, read: fn(&str) -> T) -> T {
        let text = xml.to_owned();
        self.work(move || read(&text)).await
    }

    /// Does what takes time with documents, when it is its turn. May block.
    pub async fn work<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let _turn = self.desk.readers.take(&self.uid).await;
        aside(work).await
    }

    /// The document has been read: from here on it may wait for what does not answer. A large one keeps its seat.
    pub async fn read_through(self) -> Seat {
        if self.is_large() {
            return self;
        }
        let place = self.desk.dealt_with.take_some(&self.uid, self.cost + LEAST).await;
        Seat { _place: place, ..self }
    }

    fn is_large(&self) -> bool {
        self.cost > SMALL
    }

    /// The caller as one for whom nobody is asked while this seat is kept, if it is the only one of its kind.
    pub fn waits_for_nobody(&self, caller: &Caller) -> Caller {
        Caller { interactive: caller.interactive && !self.is_large(), ..caller.clone() }
    }
}

/// Computes on a thread of its own.
pub(crate) async fn aside<T: Send + 'static>(compute: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(compute).await {
        Ok(result) => result,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    const LIMITS: Reading = Reading { at_once: 3, per_user: 2, small: (4, 2), dealt_with: (8 * PLACE, 4 * PLACE) };
    /// What a document of one element takes.
    const PLACE: usize = LEAST + COPIES * 4 + 2 * PIECE;

    /// What is going on, and the most that ever was.
    #[derive(Default)]
    struct Count(AtomicUsize, AtomicUsize);

    impl Count {
        fn during<T>(&self, work: impl FnOnce() -> T) -> T {
            self.1.fetch_max(self.0.fetch_add(1, SeqCst) + 1, SeqCst);
            let done = work();
            self.0.fetch_sub(1, SeqCst);
            done
        }
    }

    /// M3: documents are read a few at a time, however many are sent.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_few_are_read_at_once() {
        let (desk, of_all) = (Desk::new(LIMITS), Arc::<Count>::default());
        let of_users: Vec<_> = (0..4).map(|_| Arc::<Count>::default()).collect();
        let mut reading = tokio::task::JoinSet::new();
        for number in 0..200 {
            let (desk, of_all, of_user) = (desk.clone(), of_all.clone(), of_users[number % 4].clone());
            reading.spawn(async move {
                let seat = desk.seat(number as u32 % 4, &["<a/>"]).await;
                seat.work(move || of_all.during(|| of_user.during(std::thread::yield_now))).await;
            });
        }
        while let Some(done) = reading.join_next().await {
            done.unwrap();
        }
        assert!(of_all.1.load(SeqCst) <= 3, "{}", of_all.1.load(SeqCst));
        assert!(of_users.iter().all(|user| (1..=2).contains(&user.1.load(SeqCst))));
    }

    /// W1: what waits for dead storage keeps no other document of the same user from being read.
    #[tokio::test]
    async fn what_waits_for_files_keeps_none_from_being_read() {
        let desk = Desk::new(LIMITS);
        let mut waiting = Vec::new();
        for _ in 0..4 {
            waiting.push(desk.seat(1, &["<a/>"]).await.read_through().await);
        }
        let seat = desk.seat(1, &["<a/>"]).await;
        assert_eq!(seat.work(|| 7).await, 7);
        // There is an end to that: the fifth waits, at its seat, for one of its own user's.
        let mut fifth = Box::pin(seat.read_through());
        assert!(now(&mut fifth).await.is_none());
        drop(waiting.pop());
        assert!(now(&mut fifth).await.is_some());
    }

    #[tokio::test]
    async fn one_large_document_is_there_at_a_time_and_keeps_no_small_one_waiting() {
        let desk = Desk::new(LIMITS);
        let text = "x".repeat(SMALL);
        let costly = "<a b=''/>".repeat(SMALL / 100);
        let large = desk.seat(1, &[&text]).await;
        let documents = [costly.as_str()];
        let mut second = Box::pin(desk.seat(2, &documents));
        assert!(now(&mut second).await.is_none());
        let small = (desk.seat(1, &["<a/>"]).await, desk.seat(2, &["<a/>", "<b/>"]).await);
        drop(large);
        drop((second.await, small));
    }

    #[tokio::test]
    async fn users_take_turns_and_nobody_has_all_seats() {
        let desk = Desk::new(LIMITS);
        let _first = (desk.seat(1, &["<a/>"]).await, desk.seat(1, &["<a/>"]).await);
        let mut third = Box::pin(desk.seat(1, &["<a/>"]));
        assert!(now(&mut third).await.is_none());
        assert!(now(&mut Box::pin(desk.seat(2, &["<a/>"]))).await.is_some());
    }

    /// However many files are to be read, a few are there, and one user's never are all of them.
    #[tokio::test]
    async fn a_few_files_are_there_at_once() {
        let desk = Desk::new(LIMITS);
        let (first, _second) = (desk.reads_file(1).await, desk.reads_file(1).await);
        let mut third = Box::pin(desk.reads_file(1));
        assert!(now(&mut third).await.is_none());
        let _others = (desk.reads_file(2).await, desk.reads_file(3).await);
        let mut fifth = Box::pin(desk.reads_file(4));
        assert!(now(&mut fifth).await.is_none());
        drop(first);
        assert!(now(&mut fifth).await.is_some() || now(&mut third).await.is_some());
    }

    async fn now<T>(future: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
        tokio::time::timeout(std::time::Duration::ZERO, future).await.ok()
    }

    #[tokio::test]
    async fn a_bug_in_reading_is_the_callers_and_leaves_the_turn() {
        let desk = Desk::new(Reading { at_once: 1, per_user: 1, ..LIMITS });
        let failing = desk.clone();
        let failed = tokio::spawn(async move { failing.seat(1, &["<a/>"]).await.work(|| panic!("a bug")).await });
        assert!(failed.await.is_err());
        assert_eq!(desk.seat(1, &["<a/>"]).await.work(|| 7).await, 7);
    }
}
