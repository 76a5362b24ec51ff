//! A bounded number of places, given to senders in turn.

use super::lock;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use tokio::sync::oneshot;

/// Places that are taken in turn.
pub struct Turns {
    state: Mutex<State>,
}

struct State {
    free: usize,
    waiting: HashMap<String, VecDeque<oneshot::Sender<Turn>>>,
    /// Senders that wait, in turn.
    order: VecDeque<String>,
}

/// A place taken; given to the next on drop.
pub struct Turn(Arc<Turns>);

impl Turns {
    /// So many places.
    pub fn new(places: usize) -> Arc<Turns> {
        let state = State { free: places, waiting: HashMap::new(), order: VecDeque::new() };
        Arc::new(Turns { state: Mutex::new(state) })
    }

    /// Waits for a place. A sender with many waiting holds up only itself.
    pub async fn take(self: &Arc<Self>, sender: &str) -> Turn {
        let wait = {
            let mut state = lock(&self.state);
            if state.free > 0 {
                state.free -= 1;
                return Turn(self.clone());
            }
            let (place, wait) = oneshot::channel();
            state.queue(sender, place);
            wait
        };
        // The sending side is dropped only with `self`, which is held here.
        wait.await.unwrap_or_else(|_| Turn(self.clone()))
    }
}

impl State {
    fn queue(&mut self, sender: &str, place: oneshot::Sender<Turn>) {
        let line = self.waiting.entry(sender.to_owned()).or_default();
        if line.is_empty() {
            self.order.push_back(sender.to_owned());
        }
        line.push_back(place);
    }

    /// The next in turn.
    fn next(&mut self) -> Option<oneshot::Sender<Turn>> {
        let sender = self.order.pop_front()?;
        let line = self.waiting.get_mut(&sender)?;
        let place = line.pop_front();
        if line.is_empty() {
            self.waiting.remove(&sender);
        } else {
            self.order.push_back(sender);
        }
        place
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let next = {
            let mut state = lock(&self.0.state);
            let next = state.next();
            if next.is_none() {
                state.free += 1;
            }
            next
        };
        if let Some(next) = next {
            // Should the next have given up, the place comes back with the value and is dropped, which serves the one after.
            drop(next.send(Turn(self.0.clone())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn senders_take_turns_and_the_impatient_are_skipped() {
        let turns = Turns::new(1);
        let held = turns.take("a").await;
        let mut first = Box::pin(turns.take("a"));
        let mut gone = Box::pin(turns.take("a"));
        let mut other = Box::pin(turns.take("b"));
        assert!((&mut first).now_or_never().is_none());
        assert!((&mut gone).now_or_never().is_none());
        assert!((&mut other).now_or_never().is_none());
        drop(held);
        let held = first.await;
        drop(gone);
        drop(held);
        let held = other.now_or_never().expect("b comes before a's third");
        drop(held);
        assert_eq!(lock(&turns.state).free, 1);
    }
}
