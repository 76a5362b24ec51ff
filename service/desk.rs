//! Where documents are read: so many at once, whoever sends how many.
//!
//! A document costs many times its size while it is read, completed and checked, and callers choose how many and how large
//! they are. So whoever is to read one takes a [`Seat`] first, and keeps it as long as what was read is there:
//!
//! - At the seats of one user lie documents of so many bytes together ([`Reading::bytes_per_user`]); a larger one lies there
//!   alone. The rest waits, in turn.
//! - Of these, two of a user and as many in all as there are CPUs are being read, where that may block.
//!
//! A person who is asked for a password while a seat is held keeps nobody else from one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How much is read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Documents in all.
    pub at_once: usize,
    /// Documents of one user.
    pub per_user: usize,
    /// Bytes of documents that one user has read and not yet dealt with, or is reading.
    pub bytes_per_user: usize,
}

impl Default for Reading {
    fn default() -> Reading {
        let at_once = std::thread::available_parallelism().map_or(1, usize::from);
        Reading { at_once, per_user: 2, bytes_per_user: 1 << 20 }
    }
}

/// Documents are counted in pieces of so many bytes.
const PIECE: usize = 1024;

/// The desk.
#[derive(Debug)]
pub(crate) struct Desk {
    limits: Reading,
    readers: Semaphore,
    users: Mutex<HashMap<u32, Arc<User>>>,
}

#[derive(Debug)]
struct User {
    room: Arc<Semaphore>,
    readers: Semaphore,
}

/// A place at the desk. Given back on drop.
#[derive(Debug)]
pub(crate) struct Seat {
    desk: Arc<Desk>,
    uid: u32,
    user: Option<Arc<User>>,
    _room: Option<OwnedSemaphorePermit>,
}

impl Desk {
    pub fn new(limits: Reading) -> Arc<Desk> {
        Arc::new(Desk { limits, readers: Semaphore::new(limits.at_once), users: Mutex::default() })
    }

    /// Waits for a seat for documents of a user, of so many bytes together.
    pub async fn seat(self: &Arc<Desk>, uid: u32, bytes: usize) -> Seat {
        let all = (self.limits.bytes_per_user / PIECE).max(1);
        let user = self.lock().entry(uid).or_insert_with(|| Arc::new(self.user(all))).clone();
        let room = user.room.clone();
        let mut seat = Seat { desk: self.clone(), uid, user: Some(user), _room: None };
        let pieces = bytes.div_ceil(PIECE).clamp(1, all);
        // Cannot fail: the semaphore is never closed.
        seat._room = room.acquire_many_owned(u32::try_from(pieces).unwrap_or(u32::MAX)).await.ok();
        seat
    }

    fn user(&self, pieces: usize) -> User {
        User { room: Arc::new(Semaphore::new(pieces)), readers: Semaphore::new(self.limits.per_user) }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Arc<User>>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// What `read` makes of a document.
    pub async fn read<T: Send + 'static>(&self, xml: &str, read: fn(&str) -> T) -> T {
        let text = xml.to_owned();
        self.work(move || read(&text)).await
    }

    /// Does what takes time with documents, when it is its turn. May block.
    pub async fn work<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let _of_user = match &self.user {
            Some(user) => user.readers.acquire().await.ok(),
            None => None,
        };
        let _of_all = self.desk.readers.acquire().await.ok();
        crate::aside(work).await
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut users = self.desk.lock();
        self.user = None;
        if users.get(&self.uid).is_some_and(|user| Arc::strong_count(user) == 1) {
            users.remove(&self.uid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    const LIMITS: Reading = Reading { at_once: 3, per_user: 2, bytes_per_user: 4 * PIECE };

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
                let seat = desk.seat(number as u32 % 4, 1).await;
                seat.work(move || of_all.during(|| of_user.during(std::thread::yield_now))).await;
            });
        }
        while let Some(done) = reading.join_next().await {
            done.unwrap();
        }
        assert!(of_all.1.load(SeqCst) <= 3, "{}", of_all.1.load(SeqCst));
        assert!(of_users.iter().all(|user| (1..=2).contains(&user.1.load(SeqCst))));
        assert!(desk.lock().is_empty(), "nothing is kept of who has left");
    }

    #[tokio::test]
    async fn what_was_read_counts_until_the_seat_is_left() {
        let desk = Desk::new(LIMITS);
        let large = desk.seat(1, 100 * PIECE).await;
        let mut second = Box::pin(desk.seat(1, 1));
        assert!(futures_now(&mut second).await.is_none(), "a large document lies alone");
        let other = desk.seat(2, 100 * PIECE).await;
        drop(large);
        let second = second.await;
        let third = desk.seat(1, 3 * PIECE).await;
        assert!(futures_now(&mut Box::pin(desk.seat(1, 1))).await.is_none());
        drop((second, third, other));
        assert!(desk.lock().is_empty());
    }

    async fn futures_now<T>(future: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
        tokio::time::timeout(std::time::Duration::ZERO, future).await.ok()
    }

    #[tokio::test]
    async fn a_bug_in_reading_is_the_callers_and_leaves_the_turn() {
        let desk = Desk::new(Reading { at_once: 1, per_user: 1, ..LIMITS });
        let failing = desk.clone();
        let failed = tokio::spawn(async move { failing.seat(1, 1).await.work(|| panic!("a bug")).await });
        assert!(failed.await.is_err());
        assert_eq!(desk.seat(1, 1).await.work(|| 7).await, 7);
    }
}
