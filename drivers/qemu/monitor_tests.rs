//! Jobs of a QEMU made of the other end of a socket: what is asked, and how often.

use super::*;
use crate::qemu::block::delete_snapshot;
use crate::qemu::events::Guest;
use async_trait::async_trait;
use std::collections::VecDeque;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use virt_model::driver::{Condition, reports};

const ID: &str = "virtd-snapshot-save";
const LIMIT: Duration = Duration::from_secs(60);

/// What QEMU says to a command: the answer, then what a job becomes.
type Turn = (&'static str, Value, &'static [&'static str]);

/// A journal whose work may not be wanted any more.
struct Wanted(CancellationToken);

#[async_trait]
impl Journal for Wanted {
    async fn note(&self, _note: Value) -> Result<(), DriverError> {
        Ok(())
    }
    fn captured(&self, _note: Value) {}
    async fn merging(&self, _targets: &[String]) -> Result<(), DriverError> {
        Ok(())
    }
    fn step(&self, _what: &str) {}
    fn progress(&self, _done: u64, _total: u64) {}
    fn part_done(&self, _done: u64, _total: u64) {}
    fn point_of_no_return(&self) {}
    fn cancelled(&self) -> &CancellationToken {
        &self.0
    }
}

fn journal(cancelled: bool) -> Arc<dyn Journal> {
    let token = CancellationToken::new();
    if cancelled {
        token.cancel();
    }
    Arc::new(Wanted(token))
}

/// A QEMU that is given these commands in this order, and no other; gives the arguments of each.
async fn qemu(turns: Vec<Turn>) -> (Monitor, JoinHandle<Vec<Value>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = BufReader::new(theirs);
    peer.get_mut().write_all(b"{\"QMP\": {}}\n").await.unwrap();
    let hello: Turn = ("qmp_capabilities", json!({ "return": {} }), &[]);
    let mut turns: VecDeque<Turn> = [hello].into_iter().chain(turns).collect();
    let played = tokio::spawn(async move {
        let (mut heard, mut line) = (Vec::new(), String::new());
        while let Some((command, mut answer, becomes)) = turns.pop_front() {
            line.clear();
            peer.read_line(&mut line).await.unwrap();
            let given: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(given["execute"], command);
            answer["id"] = given["id"].clone();
            let mut said = format!("{answer}\n");
            for status in becomes {
                let event = json!({ "event": "JOB_STATUS_CHANGE", "data": { "id": ID, "status": status } });
                said.push_str(&format!("{event}\n"));
            }
            peer.get_mut().write_all(said.as_bytes()).await.unwrap();
            heard.push(given["arguments"].clone());
        }
        line.clear();
        peer.read_line(&mut line).await.unwrap();
        assert_eq!(line, "", "nothing more is asked");
        heard.split_off(1)
    });
    let reporter = Reporter::new(Guest::found(Condition::Running), reports().0, None);
    let monitor = Qmp::negotiate(ours, reporter.ears(), LIMIT).await.expect("negotiated");
    (Monitor::new(Arc::new(monitor), reporter), played)
}

fn done() -> Value {
    json!({ "return": {} })
}

fn refused(why: &str) -> Value {
    json!({ "error": { "class": "GenericError", "desc": why } })
}

fn jobs(status: &str, error: Option<&str>) -> Value {
    let mut job = json!({ "id": ID, "type": "snapshot-save", "status": status });
    if let Some(error) = error {
        job["error"] = json!(error);
    }
    json!({ "return": [job] })
}

fn no_jobs() -> Value {
    json!({ "return": [] })
}

/// Runs a job, hangs up, and gives what came of it and the arguments of all commands.
async fn run(turns: Vec<Turn>, cancelled: bool) -> (Result<(), String>, Vec<Value>) {
    let (line, played) = qemu(turns).await;
    let journal = journal(cancelled);
    let job = line.job("snapshot-save", ID, json!({ "tag": "a" }), Some(&journal));
    let came_of_it = tokio::time::timeout(LIMIT, job).await.expect("it ends").map_err(|e| format!("{e:?}"));
    line.patiently("query-status", json!({})).await.expect("answered");
    drop(line);
    (came_of_it, tokio::time::timeout(LIMIT, played).await.expect("it hangs up").expect("as it was to be"))
}

const THROUGH: &[&str] = &["created", "running", "waiting", "pending", "concluded"];

#[tokio::test]
async fn a_job_is_asked_about_once_and_forgotten_before_anything_else_is_done() {
    let turns: Vec<Turn> = vec![
        ("snapshot-save", done(), THROUGH),
        ("query-jobs", jobs("concluded", None), &[]),
        ("job-dismiss", done(), &[]),
        ("query-status", done(), &[]),
    ];
    let (came_of_it, given) = run(turns, false).await;
    assert_eq!(came_of_it, Ok(()));
    assert_eq!(given[0], json!({ "tag": "a", "job-id": ID }));
    assert_eq!(given[2], json!({ "id": ID }));
}

#[tokio::test]
async fn a_job_that_failed_says_why_and_is_forgotten() {
    let turns: Vec<Turn> = vec![
        ("snapshot-save", done(), THROUGH),
        ("query-jobs", jobs("concluded", Some("No space left on device")), &[]),
        ("job-dismiss", done(), &[]),
        ("query-status", done(), &[]),
    ];
    let (came_of_it, _) = run(turns, false).await;
    assert_eq!(came_of_it, Err(r#"NoSpace("snapshot-save: No space left on device")"#.to_owned()));
}

#[tokio::test]
async fn a_name_in_use_by_a_job_that_has_ended_is_made_free() {
    let turns: Vec<Turn> = vec![
        ("snapshot-save", refused("Job ID 'virtd-snapshot-save' already in use"), &[]),
        ("query-jobs", jobs("concluded", None), &[]),
        ("query-jobs", jobs("concluded", None), &[]),
        ("job-dismiss", done(), &[]),
        ("snapshot-save", done(), THROUGH),
        ("query-jobs", jobs("concluded", None), &[]),
        ("job-dismiss", done(), &[]),
        ("query-status", done(), &[]),
    ];
    let (came_of_it, given) = run(turns, false).await;
    assert_eq!(came_of_it, Ok(()));
    assert_eq!(given[0], given[4], "the same is asked for again");
}

#[tokio::test]
async fn what_is_refused_for_another_reason_is_asked_for_once() {
    let turns: Vec<Turn> = vec![
        ("snapshot-save", refused("no such device"), &[]),
        ("query-jobs", no_jobs(), &[]),
        ("query-status", done(), &[]),
    ];
    let (came_of_it, _) = run(turns, false).await;
    assert_eq!(came_of_it, Err(r#"Hypervisor("snapshot-save: no such device")"#.to_owned()));
}

#[tokio::test]
async fn a_job_that_is_not_wanted_is_told_to_stop_and_forgotten() {
    let turns: Vec<Turn> = vec![
        ("snapshot-save", done(), &[]),
        ("job-cancel", done(), &["aborting", "concluded"]),
        ("query-jobs", jobs("concluded", None), &[]),
        ("query-jobs", jobs("concluded", None), &[]),
        ("job-dismiss", done(), &[]),
        ("query-status", done(), &[]),
    ];
    let (came_of_it, _) = run(turns, true).await;
    assert_eq!(came_of_it, Err("Cancelled".to_owned()));
}

#[tokio::test]
async fn a_job_that_cannot_be_stopped_goes_to_its_end() {
    let turns: Vec<Turn> = vec![
        ("snapshot-save", done(), &[]),
        ("job-cancel", refused("Job in state 'concluded' cannot accept command verb 'cancel'"), &[]),
        ("query-jobs", jobs("concluded", None), &[]),
        ("job-dismiss", done(), &[]),
        ("query-status", done(), &[]),
    ];
    let (came_of_it, _) = run(turns, true).await;
    assert_eq!(came_of_it, Ok(()));
}

#[tokio::test]
async fn a_snapshot_that_one_command_does_not_delete_is_deleted_by_a_job_in_what_is_left() {
    const ONE: &str = "blockdev-snapshot-delete-internal-sync";
    let of_the_job = json!({ "return": [{ "id": "virtd-snapshot-delete", "status": "concluded" }] });
    let node = |name: &str, holds: &str| {
        let inner = json!({ "id": "1", "name": holds, "vm-state-size": 0, "date-sec": 0, "date-nsec": 0 });
        json!({ "node-name": name, "drv": "qcow2", "file": name, "image": { "snapshots": [inner] } })
    };
    let nodes = json!({ "return": [node("a", "s"), node("b", "s"), node("c", "t"), node("d", "other")] });
    let (line, played) = qemu(vec![
        (ONE, done(), &[]),
        (ONE, refused("not the top of its chain"), &[]),
        ("query-named-block-nodes", nodes, &[]),
        ("snapshot-delete", done(), THROUGH),
        ("query-jobs", of_the_job, &[]),
        ("job-dismiss", done(), &[]),
        ("query-status", done(), &[]),
    ])
    .await;
    let nodes = ["a", "d", "b", "c"].map(str::to_owned).to_vec();
    tokio::time::timeout(LIMIT, delete_snapshot(&line, "s", nodes)).await.expect("it ends").expect("deleted");
    line.patiently("query-status", json!({})).await.expect("answered");
    drop(line);
    let given = tokio::time::timeout(LIMIT, played).await.expect("it hangs up").expect("as it was to be");
    assert_eq!(given[0], json!({ "device": "c", "name": "s" }));
    assert_eq!(given[1], json!({ "device": "b", "name": "s" }));
    // What does not hold it is not touched: a job is refused for what it cannot write.
    assert_eq!(given[3], json!({ "tag": "s", "devices": ["a", "b"], "job-id": "virtd-snapshot-delete" }));
}

#[tokio::test]
async fn a_dump_has_ended_when_its_guest_has_gone_on() {
    let (dump, guest) = (
        |status: &str| json!({ "return": { "status": status, "completed": 1, "total": 2 } }),
        |status: &str| json!({ "return": { "status": status } }),
    );
    let (line, played) = qemu(vec![
        ("query-dump", dump("active"), &[]),
        ("query-status", guest("save-vm"), &["concluded"]),
        ("query-dump", dump("failed"), &[]),
        ("query-status", guest("save-vm"), &["concluded"]),
        ("query-dump", dump("failed"), &[]),
        ("query-status", guest("running"), &[]),
        ("query-version", done(), &[]),
    ])
    .await;
    tokio::time::timeout(LIMIT, line.end_dump()).await.expect("it ends").expect("it has ended");
    line.patiently("query-version", json!({})).await.expect("answered");
    drop(line);
    tokio::time::timeout(LIMIT, played).await.expect("it hangs up").expect("as it was to be");
}
