//! What leaves a connection: one queue in the order in which answers and signals were made, and one writer.
//!
//! Putting a message in never waits, so signals that were put in before an answer are on the socket before it. Whoever
//! can wait (the dispatch loop before the next call, a task before a large answer, the publisher before a change) waits
//! for room first, which only the reader at the other end of the socket can give. A large answer waits until little lies
//! here: a bus that is busy takes some KiB of ours at a time, and every other answer stands behind it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use zbus::{Connection, Message};

/// Above this many bytes there is no room.
const FULL: usize = 8 << 20;
/// Above this many bytes there is no room for a large answer; what is smaller is none.
pub const LARGE: usize = 128 << 10;
/// A peer that leaves this much unread is given up. The bus itself is waited for instead.
const LOST: usize = 64 << 20;
/// One write carries at most so many messages, and ends after so many bytes.
const BATCH: (usize, usize) = (128, 256 << 10);

/// The queue.
#[derive(Debug, Default)]
pub struct Outbox {
    queue: Mutex<Queue>,
    filled: Notify,
    emptied: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    messages: VecDeque<Message>,
    bytes: usize,
    closed: bool,
    /// Messages that were ever put in, and those of them that are written.
    pushed: u64,
    written: u64,
}

impl Outbox {
    /// Puts a message at the end. After the end of the connection it is dropped.
    pub fn push(&self, message: Message) {
        let mut queue = self.lock();
        if queue.closed {
            return;
        }
        queue.bytes += message.data().len();
        queue.pushed += 1;
        queue.messages.push_back(message);
        drop(queue);
        self.filled.notify_one();
    }

    /// Waits until there is room, or nobody there to send to.
    pub async fn room(&self) {
        self.less_than(FULL).await;
    }

    /// Waits until there is room for a large answer, or nobody there to send to.
    pub async fn room_for_large(&self) {
        self.less_than(LARGE).await;
    }

    async fn less_than(&self, bytes: usize) {
        loop {
            let emptied = self.emptied.notified();
            if self.has_less_than(bytes) {
                return;
            }
            emptied.await;
        }
    }

    /// Waits until all is sent, or nobody there to send to.
    pub async fn sent(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.lock().bytes == 0 {
                return;
            }
            emptied.await;
        }
    }

    /// Waits until what is here now is sent, whatever comes behind it, or nobody there to send to.
    pub async fn sent_so_far(&self) {
        let last = self.lock().pushed;
        loop {
            let emptied = self.emptied.notified();
            let Queue { closed, written, .. } = *self.lock();
            if closed || written >= last {
                return;
            }
            emptied.await;
        }
    }

    /// Whether so much lies unread that the peer must be given up.
    pub fn is_lost(&self) -> bool {
        self.lock().bytes > LOST
    }

    /// Whether there is no room.
    pub fn is_full(&self) -> bool {
        !self.has_less_than(FULL)
    }

    /// Whether nothing is sent any more.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Sends no more.
    pub fn close(&self) {
        let mut queue = self.lock();
        *queue = Queue { closed: true, ..Queue::default() };
        drop(queue);
        self.filled.notify_one();
        self.emptied.notify_waiters();
    }

    /// Writes until the connection or the outbox is closed. Everything that was put in before `close` was not sent yet
    /// is lost, as with any connection that ends.
    pub async fn write_to(&self, connection: &Connection) {
        loop {
            let (mut batch, bytes) = self.batch();
            let messages = batch.len() as u64;
            if batch.is_empty() {
                if self.lock().closed {
                    return;
                }
                self.filled.notified().await;
                continue;
            }
            let mut sent = connection.send_all(&batch).await;
            if matches!(sent, Err(zbus::Error::Unsupported)) {
                tracing::warn!("the bus passes no descriptors on; an answer with one is lost");
                batch.retain(|message| message.data().fds().is_empty());
                sent = connection.send_all(&batch).await;
            }
            if let Err(error) = sent {
                tracing::debug!(%error, "connection cannot be written to");
                return self.close();
            }
            drop(batch);
            let mut queue = self.lock();
            queue.bytes = queue.bytes.saturating_sub(bytes);
            queue.written += messages;
            drop(queue);
            self.emptied.notify_waiters();
        }
    }

    /// How much lies here.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        self.lock().bytes
    }

    /// What lies here.
    #[cfg(test)]
    pub fn waiting(&self) -> Vec<Message> {
        self.lock().messages.iter().cloned().collect()
    }

    fn has_less_than(&self, bytes: usize) -> bool {
        let queue = self.lock();
        queue.closed || queue.bytes < bytes
    }

    /// Takes what one write should carry; its bytes count until they are written.
    fn batch(&self) -> (Vec<Message>, usize) {
        let mut queue = self.lock();
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < BATCH.0 && bytes < BATCH.1 {
            let Some(message) = queue.messages.pop_front() else { break };
            bytes += message.data().len();
            batch.push(message);
        }
        (batch, bytes)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
