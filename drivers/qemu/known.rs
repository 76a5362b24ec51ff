//! What QEMU has said and would say again. An answer holds until QEMU is told to change something, or reports that something
//! has happened; for so long it is neither asked for nor read anew.

use serde_json::Value;
use std::any::Any;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Different questions whose answers are kept: a handful are asked this way.
const KEPT: usize = 8;

/// Values that a kept answer may have in it, each text counted by its length: more than a machine with a hundred disks needs. A QEMU that was
/// taken over may say megabytes, which are asked for anew each time.
const LARGEST: usize = 64 << 10;

/// What somebody has read in an answer.
type Read = Arc<dyn Any + Send + Sync>;

/// How long an answer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// Until anything may have changed.
    UntilAnyChange,
    /// Until other nodes may read other files: what guests and snapshots inside images do changes nothing of that.
    UntilNodesChange,
}

/// What happened, or may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeOf {
    Anything,
    /// Which node reads which file is as before.
    AnythingButNodes,
}

/// How virtd's jobs on snapshots inside images are called: they change no node.
const SNAPSHOT_JOB: &str = "virtd-snapshot-";

impl ChangeOf {
    /// What a command may change.
    pub fn by_command(command: &str) -> ChangeOf {
        match command {
            "stop"
            | "cont"
            | "snapshot-save"
            | "snapshot-load"
            | "snapshot-delete"
            | "job-dismiss"
            | "blockdev-snapshot-delete-internal-sync"
            | "getfd"
            | "closefd" => ChangeOf::AnythingButNodes,
            _ => ChangeOf::Anything,
        }
    }

    /// What an event may tell of. A job that works on nodes has changed them when it tells of its end, not when it is forgotten.
    pub fn by_event(name: &str, data: &Value) -> ChangeOf {
        let of_snapshot = || data["id"].as_str().is_some_and(|id| id.starts_with(SNAPSHOT_JOB));
        match name {
            "STOP" | "RESUME" | "RESET" | "RTC_CHANGE" => ChangeOf::AnythingButNodes,
            "JOB_STATUS_CHANGE" if of_snapshot() => ChangeOf::AnythingButNodes,
            _ => ChangeOf::Anything,
        }
    }
}

/// The answers of one QEMU.
#[derive(Default)]
pub struct Known {
    /// How often something may have changed.
    changes: AtomicU64,
    /// How often of that nodes.
    of_nodes: AtomicU64,
    answers: Mutex<HashMap<String, (Holds, u64, Read)>>,
    /// Commands that change no node and whose replies nobody waits for, by the numbers of their replies.
    unwaited: Mutex<BTreeSet<u64>>,
}

impl Known {
    /// Whether a command changes nothing.
    pub fn is_question(command: &str) -> bool {
        command.starts_with("query-") || matches!(command, "qom-get" | "qom-list")
    }

    /// Something may have changed.
    pub fn changed(&self, what: ChangeOf) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        if what == ChangeOf::Anything {
            self.of_nodes.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Nobody waits for the reply of that number, to a command that changes that.
    pub fn unwaited(&self, id: u64, what: ChangeOf) {
        if what == ChangeOf::AnythingButNodes {
            self.unwaited.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
        }
    }

    /// A reply has come that nobody waits for.
    pub fn replied(&self, id: Option<u64>) {
        let mut unwaited = self.unwaited.lock().unwrap_or_else(PoisonError::into_inner);
        let nodes_stay = id.is_some_and(|id| unwaited.remove(&id));
        self.changed(if nodes_stay { ChangeOf::AnythingButNodes } else { ChangeOf::Anything });
    }

    /// How often something may have changed until now on which such an answer depends: what [`Known::keep`] is told of an answer
    /// that is yet to come.
    pub fn changes(&self, holds: Holds) -> u64 {
        match holds {
            Holds::UntilAnyChange => &self.changes,
            Holds::UntilNodesChange => &self.of_nodes,
        }
        .load(Ordering::SeqCst)
    }

    /// What was read in the answer to a question, if that still holds.
    pub fn answer<T: Send + Sync + 'static>(&self, question: &str) -> Option<Arc<T>> {
        let answers = self.answers();
        let (holds, changes, read) = answers.get(question)?;
        if *changes == self.changes(*holds) { read.clone().downcast().ok() } else { None }
    }

    /// Keeps what was read in the answer to a question that was asked after so many changes, and none that does not hold any more.
    pub fn keep<T: Send + Sync + 'static>(
        &self,
        question: String,
        (holds, changes): (Holds, u64),
        answer: &Value,
        read: Arc<T>,
    ) {
        let mut answers = self.answers();
        answers.retain(|_, (holds, changes, _)| *changes == self.changes(*holds));
        if changes == self.changes(holds) && answers.len() < KEPT && left_of(answer, LARGEST).is_some() {
            answers.insert(question, (holds, changes, read));
        }
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<String, (Holds, u64, Read)>> {
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

    const ANY: Holds = Holds::UntilAnyChange;
    const NODES: Holds = Holds::UntilNodesChange;

    #[test]
    fn what_is_larger_than_any_machine_needs_is_not_kept() {
        let known = Known::default();
        let large =
            [json!(vec![json!({ "": 0 }); LARGEST / 2]), json!("x".repeat(LARGEST)), json!({ "x".repeat(LARGEST): 0 })];
        for answer in large {
            known.keep("query-a".to_owned(), (ANY, known.changes(ANY)), &answer, Arc::new(1));
            assert_eq!(known.answer::<i32>("query-a"), None);
        }
        known.keep("query-a".to_owned(), (ANY, known.changes(ANY)), &json!(vec![json!({ "": 0 }); 100]), Arc::new(1));
        assert_eq!(known.answer("query-a"), Some(Arc::new(1)));
        assert_eq!(known.answer::<String>("query-a"), None, "who reads it otherwise asks anew");
    }

    #[test]
    fn an_answer_holds_until_something_may_have_changed() {
        let known = Known::default();
        let before = known.changes(ANY);
        let keep = || known.keep("query-a".to_owned(), (ANY, before), &Value::from(1), Arc::new(1));
        keep();
        assert_eq!(known.answer("query-a"), Some(Arc::new(1)));
        assert_eq!(known.answer::<i32>("query-b"), None);
        known.changed(ChangeOf::AnythingButNodes);
        assert_eq!(known.answer::<i32>("query-a"), None);
        // What was asked before the change does not tell of what is so after it.
        keep();
        assert_eq!(known.answer::<i32>("query-a"), None);
    }

    #[test]
    fn which_node_reads_what_holds_until_that_may_have_changed() {
        let known = Known::default();
        let keep = || known.keep("query-a".to_owned(), (NODES, known.changes(NODES)), &Value::from(1), Arc::new(1));
        let job = |id: &str| ChangeOf::by_event("JOB_STATUS_CHANGE", &json!({ "id": id, "status": "concluded" }));
        keep();
        for what in [ChangeOf::by_command("cont"), ChangeOf::by_event("STOP", &json!({})), job("virtd-snapshot-save")] {
            known.changed(what);
            assert_eq!(known.answer("query-a"), Some(Arc::new(1)));
        }
        known.unwaited(7, ChangeOf::by_command("job-dismiss"));
        known.replied(Some(7));
        assert_eq!(known.answer("query-a"), Some(Arc::new(1)));
        // A reply that comes too late is of nobody knows what.
        known.replied(Some(7));
        assert_eq!(known.answer::<i32>("query-a"), None);
        let events = ["DEVICE_DELETED", "BLOCK_JOB_COMPLETED"].map(|name| ChangeOf::by_event(name, &json!({})));
        for what in events.into_iter().chain([ChangeOf::by_command("blockdev-add"), job("virtd-block-vda")]) {
            keep();
            known.changed(what);
            assert_eq!(known.answer::<i32>("query-a"), None);
        }
    }

    #[test]
    fn what_only_asks_changes_nothing() {
        assert!(["query-block", "qom-get", "qom-list"].iter().all(|command| Known::is_question(command)));
        assert!(
            !["blockdev-add", "qom-set", "human-monitor-command"].iter().any(|command| Known::is_question(command))
        );
    }
}
