//! What QEMU has said and would say again. An answer holds until QEMU is told to change something, or reports that something
//! has happened; for so long it is not asked anew.

use serde_json::Value;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Different questions whose answers are kept: a handful are asked this way.
const KEPT: usize = 8;

/// Values that a kept answer may have in it, each text counted by its length: more than a machine with a hundred disks needs. A QEMU that was
/// taken over may say megabytes, which are asked for anew each time.
const LARGEST: usize = 64 << 10;

/// The answers of one QEMU.
#[derive(Default)]
pub struct Known {
    /// How often something may have changed.
    changes: AtomicU64,
    answers: Mutex<HashMap<String, (u64, Arc<Value>)>>,
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

    /// The answer to a question, if it still holds.
    pub fn answer(&self, question: &str) -> Option<Arc<Value>> {
        let answers = self.answers();
        let (changes, answer) = answers.get(question)?;
        (*changes == self.changes()).then(|| answer.clone())
    }

    /// Keeps the answer to a question that was asked after so many changes, and none that does not hold any more.
    pub fn keep(&self, question: String, changes: u64, answer: Arc<Value>) {
        let now = self.changes();
        let mut answers = self.answers();
        answers.retain(|_, (changes, _)| *changes == now);
        if changes == now && answers.len() < KEPT && left_of(&answer, LARGEST).is_some() {
            answers.insert(question, (changes, answer));
        }
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<String, (u64, Arc<Value>)>> {
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
            known.keep("query-a".to_owned(), known.changes(), Arc::new(answer));
            assert_eq!(known.answer("query-a"), None);
        }
        known.keep("query-a".to_owned(), known.changes(), Arc::new(json!(vec![json!({ "": 0 }); 100])));
        assert!(known.answer("query-a").is_some());
    }

    #[test]
    fn an_answer_holds_until_something_may_have_changed() {
        let known = Known::default();
        let before = known.changes();
        known.keep("query-a".to_owned(), before, Arc::new(Value::from(1)));
        assert_eq!(known.answer("query-a").as_deref(), Some(&Value::from(1)));
        assert_eq!(known.answer("query-b"), None);
        known.changed();
        assert_eq!(known.answer("query-a"), None);
        // What was asked before the change does not tell of what is so after it.
        known.keep("query-a".to_owned(), before, Arc::new(Value::from(1)));
        assert_eq!(known.answer("query-a"), None);
    }

    #[test]
    fn what_only_asks_changes_nothing() {
        assert!(["query-block", "qom-get", "qom-list"].iter().all(|command| Known::is_question(command)));
        assert!(
            !["blockdev-add", "qom-set", "human-monitor-command"].iter().any(|command| Known::is_question(command))
        );
    }
}
