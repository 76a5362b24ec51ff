//! What polkit has lately said yes to.

use super::lock;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// How long a yes is good for.
const GOOD_FOR: Duration = Duration::from_secs(5);

/// How many are kept; beyond, the old ones go first, then the newcomer.
const KEPT: usize = 4096;

/// Answers that were yes.
pub struct Memory<K> {
    state: Mutex<State<K>>,
}

struct State<K> {
    good_until: HashMap<K, Instant>,
    /// Counts how often all was forgotten: an answer to a question from before is not kept.
    epoch: u64,
}

impl<K> Default for Memory<K> {
    fn default() -> Self {
        Memory { state: Mutex::new(State { good_until: HashMap::new(), epoch: 0 }) }
    }
}

impl<K: Eq + Hash> Memory<K> {
    /// Whether this was a yes a moment ago.
    pub fn holds(&self, key: &K) -> bool {
        lock(&self.state).good_until.get(key).is_some_and(|until| Instant::now() < *until)
    }

    /// The moment at which a question is asked, for [`Memory::keep`].
    pub fn now(&self) -> u64 {
        lock(&self.state).epoch
    }

    /// Keeps a yes to a question asked at `epoch`.
    pub fn keep(&self, key: K, epoch: u64) {
        let mut state = lock(&self.state);
        if state.epoch != epoch {
            return;
        }
        let now = Instant::now();
        if state.good_until.len() >= KEPT {
            state.good_until.retain(|_, until| now < *until);
        }
        if state.good_until.len() < KEPT {
            state.good_until.insert(key, now + GOOD_FOR);
        }
    }

    /// Forgets all, and whatever is being asked right now.
    pub fn forget(&self) {
        let mut state = lock(&self.state);
        state.epoch += 1;
        state.good_until.clear();
    }
}
