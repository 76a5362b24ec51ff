//! One change at a time: the right to change one object, first come, first served, given back on drop.

use crate::lock::lock;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

/// How long a change waits for its turn before it is refused as `Busy`.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How long what is given up may take to end before nobody waits for it any more.
pub const GRACE: Duration = Duration::from_secs(5);

/// Resolves when what `give_up` gives up has had its time to end.
pub(crate) async fn past_grace(give_up: &CancellationToken) {
    give_up.cancelled().await;
    tokio::time::sleep(GRACE).await;
}

/// The right to change one domain.
#[derive(Debug, Default)]
pub struct Turn {
    queue: Arc<tokio::sync::Mutex<()>>,
    holder: Mutex<Option<Holder>>,
}

#[derive(Debug)]
struct Holder {
    what: String,
    give_up: CancellationToken,
    place: Weak<Possession>,
}

/// A turn taken; given back when it and all its shares have been dropped.
#[derive(Debug)]
pub struct TurnGuard(Arc<Possession>);

#[derive(Debug)]
struct Possession {
    turn: Arc<Turn>,
    _guard: OwnedMutexGuard<()>,
}

impl Turn {
    /// Takes the turn if nobody has it or waits for it. `what` is shown to those who then find it taken; `give_up` is
    /// fired when a destroy wants through.
    pub fn try_take(self: &Arc<Self>, what: &str, give_up: &CancellationToken) -> Option<TurnGuard> {
        let place = self.queue.clone().try_lock_owned().ok()?;
        Some(self.held_by(what, give_up, place))
    }

    /// Waits for the turn, [`PATIENCE`] at most. Error: who has it.
    pub async fn take(self: &Arc<Self>, what: &str, give_up: &CancellationToken) -> Result<TurnGuard, String> {
        match tokio::time::timeout(PATIENCE, self.queue.clone().lock_owned()).await {
            Ok(place) => Ok(self.held_by(what, give_up, place)),
            Err(_) => Err(lock(&self.holder).as_ref().map_or_else(String::new, |h| h.what.clone())),
        }
    }

    /// Waits, however long it takes, until nobody has the turn who has it or waits for it now.
    pub async fn is_free(&self) {
        drop(self.queue.lock().await);
    }

    /// Asks whoever has the turn to give it up.
    pub fn ask_to_give_up(&self) {
        if let Some(holder) = lock(&self.holder).as_ref() {
            holder.give_up.cancel();
        }
    }

    /// A share in the turn that is held now, for work that may outlast its holder's interest in it: nobody else gets the turn
    /// before that work has ended, too. With it comes what fires when a destroy wants through. `None`: nobody holds it.
    pub fn share(&self) -> Option<(TurnGuard, CancellationToken)> {
        let holder = lock(&self.holder);
        let holder = holder.as_ref()?;
        Some((TurnGuard(holder.place.upgrade()?), holder.give_up.clone()))
    }

    fn held_by(self: &Arc<Self>, what: &str, give_up: &CancellationToken, guard: OwnedMutexGuard<()>) -> TurnGuard {
        let place = Arc::new(Possession { turn: self.clone(), _guard: guard });
        let (what, give_up, place_of) = (what.to_owned(), give_up.clone(), Arc::downgrade(&place));
        *lock(&self.holder) = Some(Holder { what, give_up, place: place_of });
        TurnGuard(place)
    }
}

impl TurnGuard {
    /// Changes what those who wait are told.
    pub fn rename(&self, what: String) {
        if let Some(holder) = lock(&self.0.turn.holder).as_mut() {
            holder.what = what;
        }
    }
}

impl Drop for Possession {
    fn drop(&mut self) {
        *lock(&self.turn.holder) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn turns_are_first_come_first_served() {
        let turn = Arc::new(Turn::default());
        let never = CancellationToken::new();
        let first = turn.try_take("save", &never).expect("free");
        assert!(turn.try_take("start", &never).is_none());
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut waiting = Vec::new();
        for n in 0..3 {
            let (turn, never, order) = (turn.clone(), never.clone(), order.clone());
            waiting.push(tokio::spawn(async move {
                let held = turn.take("x", &never).await.expect("in time");
                lock(&order).push(n);
                drop(held);
            }));
            tokio::task::yield_now().await;
        }
        drop(first);
        for task in waiting {
            task.await.expect("no panic");
        }
        assert_eq!(*lock(&order), [0, 1, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_too_long_is_told_who_has_it() {
        let turn = Arc::new(Turn::default());
        let never = CancellationToken::new();
        let _held = turn.try_take("save (job 7)", &never).expect("free");
        assert_eq!(turn.take("start", &never).await.expect_err("busy"), "save (job 7)");
    }

    #[tokio::test]
    async fn a_holder_can_be_asked_to_give_up() {
        let turn = Arc::new(Turn::default());
        let give_up = CancellationToken::new();
        let held = turn.try_take("save", &give_up).expect("free");
        turn.ask_to_give_up();
        assert!(give_up.is_cancelled());
        drop(held);
        turn.ask_to_give_up();
    }

    #[tokio::test]
    async fn a_turn_is_free_when_its_last_share_has_gone() {
        let turn = Arc::new(Turn::default());
        assert!(turn.share().is_none());
        let held = turn.try_take("start", &CancellationToken::new()).expect("free");
        let (share, give_up) = turn.share().expect("held");
        drop(held);
        assert!(turn.try_take("save", &CancellationToken::new()).is_none());
        turn.ask_to_give_up();
        assert!(give_up.is_cancelled());
        drop(share);
        assert!(turn.try_take("save", &CancellationToken::new()).is_some());
    }
}
