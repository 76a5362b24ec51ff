//! A bounded number of places, given to those who wait in turn: whoever has many waiting holds up only itself. Who needs
//! several at once, as for bytes, waits until so many are free, and is not passed by those who need fewer.

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
    waiting: HashMap<K, VecDeque<Waiting<K>>>,
    /// Who waits, in turn.
    order: VecDeque<K>,
}

#[derive(Debug)]
struct Waiting<K: Eq + Hash + Clone> {
    count: usize,
    place: oneshot::Sender<FairPlace<K>>,
}

/// A place taken, or several; given to the next on drop.
#[derive(Debug)]
pub struct FairPlace<K: Eq + Hash + Clone> {
    places: Arc<FairPlaces<K>>,
    key: K,
    count: usize,
}

impl<K: Eq + Hash + Clone> FairPlaces<K> {
    /// So many places, of which one has at most `each`.
    pub fn new(places: usize, each: usize) -> Arc<FairPlaces<K>> {
        let (taken, waiting, order) = (HashMap::new(), HashMap::new(), VecDeque::new());
        Arc::new(FairPlaces { state: Mutex::new(State { free: places, each, taken, waiting, order }) })
    }

    /// Waits for a place.
    pub async fn take(self: &Arc<Self>, key: &K) -> FairPlace<K> {
        self.take_some(key, 1).await
    }

    /// A place, if one is to be had at once. Who is not given one does not stand in line for it.
    pub fn take_now(self: &Arc<Self>, key: &K) -> Option<FairPlace<K>> {
        let mut state = self.lock();
        let is_free = state.waiting.is_empty() && state.may_have(key, 1);
        is_free.then(|| {
            state.give(key, 1);
            self.place(key, 1)
        })
    }

    /// Waits for so many places at once; for all that one may have, if that is less.
    pub async fn take_some(self: &Arc<Self>, key: &K, count: usize) -> FairPlace<K> {
        let (wait, count) = {
            let mut state = self.lock();
            let count = count.min(state.each);
            if state.waiting.is_empty() && state.may_have(key, count) {
                state.give(key, count);
                return self.place(key, count);
            }
            let (place, wait) = oneshot::channel();
            state.queue(key, Waiting { count, place });
            (wait, count)
        };
        self.serve();
        // The sending side is dropped only with `self`, which is held here.
        wait.await.unwrap_or_else(|_| self.place(key, count))
    }

    fn place(self: &Arc<Self>, key: &K, count: usize) -> FairPlace<K> {
        FairPlace { places: self.clone(), key: key.clone(), count }
    }

    /// Gives what is free to those whose turn it is.
    fn serve(self: &Arc<Self>) {
        loop {
            let next = self.lock().next();
            let Some((key, next)) = next else { return };
            // Those who have given up are passed here: there may be many of them.
            if next.place.is_closed() {
                self.lock().give_back(&key, next.count);
                continue;
            }
            // Should it give up just now, the place comes back with the value and is dropped, which serves the one after.
            drop(next.place.send(self.place(&key, next.count)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash + Clone> State<K> {
    /// Whether its share has room for so many more.
    fn is_below_share(&self, key: &K, count: usize) -> bool {
        self.taken.get(key).is_none_or(|taken| taken + count <= self.each)
    }

    fn may_have(&self, key: &K, count: usize) -> bool {
        self.free >= count && self.is_below_share(key, count)
    }

    fn give(&mut self, key: &K, count: usize) {
        self.free -= count;
        *self.taken.entry(key.clone()).or_default() += count;
    }

    fn give_back(&mut self, key: &K, count: usize) {
        self.free += count;
        if let Some(taken) = self.taken.get_mut(key) {
            *taken -= count;
            if *taken == 0 {
                self.taken.remove(key);
            }
        }
    }

    fn queue(&mut self, key: &K, waiting: Waiting<K>) {
        let line = self.waiting.entry(key.clone()).or_default();
        if line.is_empty() {
            self.order.push_back(key.clone());
        }
        // Of those who have given up nothing is kept.
        line.retain(|one| !one.place.is_closed());
        line.push_back(waiting);
    }

    /// The first in turn whose share has room, if there are places enough for it; it has them from now on.
    fn next(&mut self) -> Option<(K, Waiting<K>)> {
        let wanted = |key: &K| self.waiting.get(key)?.front().map(|first| first.count);
        let (at, count) = self
            .order
            .iter()
            .enumerate()
            .filter_map(|(at, key)| Some((at, wanted(key)?)))
            .find(|(at, count)| self.is_below_share(&self.order[*at], *count))?;
        if count > self.free {
            return None;
        }
        let key = self.order.remove(at)?;
        let line = self.waiting.get_mut(&key)?;
        let first = line.pop_front()?;
        if line.is_empty() {
            self.waiting.remove(&key);
        } else {
            self.order.push_back(key.clone());
        }
        self.give(&key, count);
        Some((key, first))
    }
}

impl<K: Eq + Hash + Clone> Drop for FairPlace<K> {
    fn drop(&mut self) {
        self.places.lock().give_back(&self.key, self.count);
        self.places.serve();
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
    async fn however_many_have_given_up_nothing_is_kept_of_them_and_the_next_is_served() {
        let places = FairPlaces::new(1, 1);
        let held = places.take(&0).await;
        assert!(places.take_now(&0).is_none() && places.take_now(&1).is_none());
        assert!(places.lock().waiting.is_empty(), "who takes a place now or never does not wait");
        for _ in 0..1000 {
            assert!(now(&mut Box::pin(places.take(&0))).await.is_none());
        }
        assert_eq!(places.lock().waiting[&0].len(), 1);
        // As many users as it takes to fill a stack.
        for user in 1..50_000 {
            assert!(now(&mut Box::pin(places.take(&user))).await.is_none());
        }
        let mut last = Box::pin(places.take(&0));
        assert!(now(&mut last).await.is_none());
        drop(held);
        drop(now(&mut last).await.expect("it is its turn"));
        assert_eq!(places.lock().free, 1);
        assert!(places.lock().taken.is_empty() && places.lock().waiting.is_empty());
        assert!(places.take_now(&1).is_some());
    }

    #[tokio::test]
    async fn who_needs_many_waits_for_them_and_is_not_passed() {
        let places = FairPlaces::new(10, 8);
        let (first, second) = (places.take_some(&1, 6).await, places.take_some(&2, 3).await);
        let mut many = Box::pin(places.take_some(&2, 5));
        let mut few = Box::pin(places.take(&3));
        assert!(
            now(&mut many).await.is_none() && now(&mut few).await.is_none(),
            "a place is free, and it is not its turn"
        );
        drop(first);
        let many = now(&mut many).await.expect("five of seven");
        let few = now(&mut few).await.expect("and another");
        let mut all = Box::pin(places.take_some(&1, 100));
        assert!(now(&mut all).await.is_none());
        drop((second, many, few));
        drop(now(&mut all).await.expect("all that one may have"));
        assert_eq!(places.lock().free, 10);
        assert!(places.lock().taken.is_empty() && places.lock().waiting.is_empty());
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
