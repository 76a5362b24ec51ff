//! A bounded number of places, given to those who wait in turn: whoever has many waiting holds up only itself.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// Places that are taken in turn. `K` says whose turn it is: a sender, a user.
#[derive(Debug)]
pub struct FairPlaces<K: Eq + Hash + Clone> {
    state: Mutex<State<K>>,
}

#[derive(Debug)]
struct State<K: Eq + Hash + Clone> {
    free: usize,
    /// The most places that one has at a time.
    each: usize,
    taken: HashMap<K, usize>,
    waiting: HashMap<K, VecDeque<oneshot::Sender<FairPlace<K>>>>,
    /// Who waits, in turn.
    order: VecDeque<K>,
}

/// A place taken; given to the next on drop.
#[derive(Debug)]
pub struct FairPlace<K: Eq + Hash + Clone> {
    places: Arc<FairPlaces<K>>,
    key: K,
}

impl<K: Eq + Hash + Clone> FairPlaces<K> {
    /// So many places, of which one has at most `each`.
    pub fn new(places: usize, each: usize) -> Arc<FairPlaces<K>> {
        let (taken, waiting, order) = (HashMap::new(), HashMap::new(), VecDeque::new());
        Arc::new(FairPlaces { state: Mutex::new(State { free: places, each, taken, waiting, order }) })
    }

    /// Waits for a place.
    pub async fn take(self: &Arc<Self>, key: &K) -> FairPlace<K> {
        let wait = {
            let mut state = self.lock();
            if state.may_have(key) {
                state.give(key);
                return FairPlace { places: self.clone(), key: key.clone() };
            }
            let (place, wait) = oneshot::channel();
            state.queue(key, place);
            wait
        };
        // The sending side is dropped only with `self`, which is held here.
        wait.await.unwrap_or_else(|_| FairPlace { places: self.clone(), key: key.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash + Clone> State<K> {
    fn may_have(&self, key: &K) -> bool {
        self.free > 0 && self.taken.get(key).is_none_or(|taken| *taken < self.each)
    }

    fn give(&mut self, key: &K) {
        self.free -= 1;
        *self.taken.entry(key.clone()).or_default() += 1;
    }

    fn give_back(&mut self, key: &K) {
        self.free += 1;
        if let Some(taken) = self.taken.get_mut(key) {
            *taken -= 1;
            if *taken == 0 {
                self.taken.remove(key);
            }
        }
    }

    fn queue(&mut self, key: &K, place: oneshot::Sender<FairPlace<K>>) {
        let line = self.waiting.entry(key.clone()).or_default();
        if line.is_empty() {
            self.order.push_back(key.clone());
        }
        line.push_back(place);
    }

    /// The next in turn who may have a place; it has it from now on.
    fn next(&mut self) -> Option<(K, oneshot::Sender<FairPlace<K>>)> {
        let at = (0..self.order.len()).find(|at| self.may_have(&self.order[*at]))?;
        let key = self.order.remove(at)?;
        let line = self.waiting.get_mut(&key)?;
        let place = line.pop_front();
        if line.is_empty() {
            self.waiting.remove(&key);
        } else {
            self.order.push_back(key.clone());
        }
        self.give(&key);
        place.map(|place| (key, place))
    }
}

impl<K: Eq + Hash + Clone> Drop for FairPlace<K> {
    fn drop(&mut self) {
        let next = {
            let mut state = self.places.lock();
            state.give_back(&self.key);
            state.next()
        };
        if let Some((key, next)) = next {
            // Should the next have given up, the place comes back with the value and is dropped, which serves the one after.
            drop(next.send(FairPlace { places: self.places.clone(), key }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn now<T>(future: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
        tokio::time::timeout(std::time::Duration::ZERO, future).await.ok()
    }

    #[tokio::test]
    async fn those_who_wait_take_turns_and_the_impatient_are_skipped() {
        let places = FairPlaces::new(1, 1);
        let held = places.take(&"a").await;
        let mut first = Box::pin(places.take(&"a"));
        let mut gone = Box::pin(places.take(&"a"));
        let mut other = Box::pin(places.take(&"b"));
        assert!(now(&mut first).await.is_none());
        assert!(now(&mut gone).await.is_none());
        assert!(now(&mut other).await.is_none());
        drop(held);
        let held = first.await;
        drop(gone);
        drop(held);
        let held = now(&mut other).await.expect("b comes before a's third");
        drop(held);
        assert_eq!(places.lock().free, 1);
        assert!(places.lock().taken.is_empty() && places.lock().waiting.is_empty(), "nothing is kept of who has left");
    }

    #[tokio::test]
    async fn one_has_no_more_than_its_share_though_places_are_free() {
        let places = FairPlaces::new(3, 2);
        let (one, two) = (places.take(&1).await, places.take(&1).await);
        let mut third = Box::pin(places.take(&1));
        assert!(now(&mut third).await.is_none());
        let other = now(&mut Box::pin(places.take(&2))).await.expect("another's place is free");
        drop(one);
        let third = now(&mut third).await.expect("its place is free again");
        drop((two, third, other));
        assert_eq!(places.lock().free, 3);
    }
}
