//! What is chosen for a network and must be no other's: its bridge's name, and its net. One chooses at a time, and what was chosen
//! counts from then on, though it is stored only later.

use crate::lock::lock;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use tokio::sync::MutexGuard;
use uuid::Uuid;
use virt_model::network::NetworkDef;

/// See the module.
#[derive(Default)]
pub(crate) struct Choices {
    turn: tokio::sync::Mutex<()>,
    made: Mutex<Made>,
}

/// Choices that are not stored yet, each by a number of its own.
#[derive(Default)]
struct Made {
    last: u64,
    all: HashMap<u64, Arc<NetworkDef>>,
}

impl Choices {
    /// The right to choose. Nothing else is waited for with it but what is looked up for that.
    pub async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// What was chosen for others than `uuid`, and may not be stored yet.
    pub fn of_others(&self, uuid: Uuid) -> Vec<Arc<NetworkDef>> {
        lock(&self.made).all.values().filter(|def| def.uuid != uuid).cloned().collect()
    }

    /// That was chosen: it counts until the result is dropped. By then it is stored, or not wanted.
    pub fn keep(self: &Arc<Self>, def: Arc<NetworkDef>) -> Choice {
        let mut made = lock(&self.made);
        made.last += 1;
        let number = made.last;
        made.all.insert(number, def);
        Choice { of: self.clone(), number }
    }
}

/// See [`Choices::keep`].
pub(crate) struct Choice {
    of: Arc<Choices>,
    number: u64,
}

impl Drop for Choice {
    fn drop(&mut self) {
        lock(&self.of.made).all.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_chosen_is_others_no_more_until_it_is_given_up() {
        let choices = Arc::new(Choices::default());
        let def = Arc::new(NetworkDef { uuid: Uuid::from_u128(1), ..NetworkDef::default() });
        let (first, second) = (choices.keep(def.clone()), choices.keep(def.clone()));
        assert!(choices.of_others(Uuid::from_u128(1)).is_empty(), "its own");
        drop(first);
        assert_eq!(choices.of_others(Uuid::from_u128(2)), [def], "the second stands when the first is given up");
        drop(second);
        assert!(choices.of_others(Uuid::from_u128(2)).is_empty());
    }
}
