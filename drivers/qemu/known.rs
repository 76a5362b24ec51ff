//! What QEMU has said and would say again. An answer holds until QEMU is told to change something, or reports that something
//! has happened; for so long it is neither asked for nor read anew.

use serde_json::Value;
use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Different questions whose answers are kept: a handful are asked this way.
const KEPT: usize = 8;

/// Values that a kept answer may have in it, each text counted by its length: more than a machine with a hundred disks needs. A QEMU that was
/// taken over may say megabytes, which are asked for anew each time.
const LARGEST: usize = 64 << 10;

/// What somebody has read in an answer.
type Read = Arc<dyn Any + Send + Sync>;

/// The answers of one QEMU.
#[derive(Default)]
pub struct Known {
    /// How often something may have changed.
    changes: AtomicU64,
    answers: Mutex<HashMap<String, (u64, Read)>>,
}

impl Known {
    /// Whether a command changes nothing.
    pub fn is_question(command: &str) -> bool {
        command.starts_with("query-") || matches!(command, "qom-get" | "qom-list")
    }

    /// Something may have changed.
    pub fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// How often something may have changed until now: what [`Known::keep`] is told of an answer that is yet to come.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }

    /// What was read in the answer to a question, if that still holds.
    pub fn answer<T: Send + Sync + 'static>(&self, question: &str) -> Option<Arc<T>> {
        let answers = self.answers();
        let (changes, read) = answers.get(question)?;
        if *changes == self.changes() { read.clone().downcast().ok() } else { None }
    }

    /// Keeps what was read in the answer to a question that was asked after so many changes, and none that does not hold any more.
    pub fn keep<T: Send + Sync + 'static>(&self, question: String, changes: u64, answer: &Value, read: Arc<T>) {
        let now = self.changes();
        let mut answers = self.answers();
        answers.retain(|_, (changes, _)| *changes == now);
        if changes == now && answers.len() < KEPT && left_of(answer, LARGEST).is_some() {
            answers.insert(question, (changes, read));
        }
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<String, (u64, Read)>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is left of so much room when a value has been put there, if it fits.
fn left_of(value: &Value, room: usize) -> Option<usize> {
    let room = room.checked_sub(1)?;
    match value {
        Value::String(text) => room.checked_sub(text.len()),
        Value::Array(values) => values.iter().try_fold(room, |room, value| left_of(value, room)),
        Value::Object(members) => {
            members.iter().try_fold(room, |room, (name, value)| left_of(value, room.checked_sub(name.len())?))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => Some(room),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_larger_than_any_machine_needs_is_not_kept() {
        let known = Known::default();
        let large =
            [json!(vec![json!({ "": 0 }); LARGEST / 2]), json!("x".repeat(LARGEST)), json!({ "x".repeat(LARGEST): 0 })];
        for answer in large {
            known.keep("query-a".to_owned(), known.changes(), &answer, Arc::new(1));
            assert_eq!(known.answer::<i32>("query-a"), None);
        }
        known.keep("query-a".to_owned(), known.changes(), &json!(vec![json!({ "": 0 }); 100]), Arc::new(1));
        assert_eq!(known.answer("query-a"), Some(Arc::new(1)));
        assert_eq!(known.answer::<String>("query-a"), None, "who reads it otherwise asks anew");
    }

    #[test]
    fn an_answer_holds_until_something_may_have_changed() {
        let known = Known::default();
        let before = known.changes();
        let keep = || known.keep("query-a".to_owned(), before, &Value::from(1), Arc::new(1));
        keep();
        assert_eq!(known.answer("query-a"), Some(Arc::new(1)));
        assert_eq!(known.answer::<i32>("query-b"), None);
        known.changed();
        assert_eq!(known.answer::<i32>("query-a"), None);
        // What was asked before the change does not tell of what is so after it.
        keep();
        assert_eq!(known.answer::<i32>("query-a"), None);
    }

    #[test]
    fn what_only_asks_changes_nothing() {
        assert!(["query-block", "qom-get", "qom-list"].iter().all(|command| Known::is_question(command)));
        assert!(
            !["blockdev-add", "qom-set", "human-monitor-command"].iter().any(|command| Known::is_question(command))
        );
    }
}
