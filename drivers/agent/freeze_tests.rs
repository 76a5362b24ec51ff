//! What becomes of a freeze whose agent refuses, freezes nothing, says nothing, or is not there when it is to thaw; and of programs.

use super::{Agent, Line, Talk, Terms, Turns};
use crate::base64;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::Instant;
use virt_model::driver::agent::{GuestAgent, Program};
use virt_model::driver::{DriverError, GivenFile};

/// What the agent does in one talk, when it is asked for more than its name.
enum Does {
    Says(Value),
    Nothing,
    IsNotThere,
    HasEnded,
}

#[derive(Default)]
struct Fake {
    turns: Turns,
    script: Mutex<VecDeque<Does>>,
    /// What was kept of it, in order.
    kept: Mutex<Vec<bool>>,
}

#[async_trait]
impl Line for Arc<Fake> {
    async fn talk(&self, terms: Terms) -> Result<Talk, DriverError> {
        let said = match self.script.lock().unwrap().pop_front() {
            Some(Does::Says(said)) => Some(said),
            Some(Does::Nothing) => None,
            Some(Does::IsNotThere) => return Err(super::not_connected()),
            Some(Does::HasEnded) | None => return Err(DriverError::Gone),
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let mut theirs = BufReader::new(theirs);
            let mut line = Vec::new();
            theirs.read_until(b'\n', &mut line).await.unwrap();
            let hello: Value = serde_json::from_slice(&line[1..]).unwrap();
            let answer = format!("{}\n", json!({ "return": hello["arguments"]["id"] }));
            theirs.get_mut().write_all(&[b"\xff", answer.as_bytes()].concat()).await.unwrap();
            theirs.read_until(b'\n', &mut line).await.unwrap();
            match said {
                Some(said) => theirs.get_mut().write_all(format!("{said}\n").as_bytes()).await.unwrap(),
                // Until we hang up.
                None => _ = theirs.read_until(b'\n', &mut line).await,
            }
        });
        Talk::begin(&self.turns, async { Ok(ours) }, terms).await
    }

    async fn is_cut_off(&self) {
        std::future::pending().await
    }

    async fn has_ended(&self) {
        std::future::pending().await
    }

    fn is_frozen(&self) -> bool {
        self.kept.lock().unwrap().last() == Some(&true)
    }

    async fn keep_frozen(&self, frozen: bool) -> Result<(), DriverError> {
        self.kept.lock().unwrap().push(frozen);
        Ok(())
    }
}

fn agent(script: impl IntoIterator<Item = Does>) -> (Agent<Arc<Fake>>, Arc<Fake>) {
    let fake = Arc::new(Fake { script: Mutex::new(script.into_iter().collect()), ..Fake::default() });
    (Agent(fake.clone()), fake)
}

fn kept(fake: &Fake) -> Vec<bool> {
    fake.kept.lock().unwrap().clone()
}

#[tokio::test]
async fn it_is_kept_before_anything_is_frozen_and_not_where_nothing_is() {
    let (one, fake) = agent([Does::Says(json!({ "return": 2 })), Does::Says(json!({ "return": 2 }))]);
    assert_eq!(one.freeze(&[]).await.unwrap(), 2);
    assert!(matches!(one.freeze(&[]).await, Err(DriverError::Refused(_))), "without asking");
    assert_eq!((one.thaw().await.unwrap(), kept(&fake)), (2, vec![true, false]));

    let (none, fake) = agent([Does::Says(json!({ "return": 0 }))]);
    assert_eq!((none.freeze(&[]).await.unwrap(), kept(&fake)), (0, vec![true, false]));
    let failure = json!({ "error": { "class": "GenericError", "desc": "no" } });
    let (fails, fake) = agent([Does::Says(failure)]);
    assert!(matches!(fails.freeze(&[]).await, Err(DriverError::AgentFailed { .. })));
    assert_eq!(kept(&fake), [true, false]);
    let (absent, fake) = agent([Does::IsNotThere]);
    assert!(matches!(absent.freeze(&[]).await, Err(DriverError::AgentUnavailable(_))));
    assert!(kept(&fake).is_empty(), "nothing was asked");
}

#[tokio::test(start_paused = true)]
async fn what_may_be_frozen_is_thawed_at_last() {
    let thawed = || Does::Says(json!({ "return": 1 }));
    let (hung, fake) = agent([Does::Nothing, Does::IsNotThere, Does::Nothing, thawed()]);
    let before = Instant::now();
    assert!(matches!(hung.freeze(&[]).await, Err(DriverError::TimedOut(_))));
    assert!(hung.is_frozen(), "it may be");
    hung.thaw_at_last().await.unwrap();
    assert_eq!(kept(&fake), [true, false]);
    assert!(before.elapsed() < Duration::from_secs(200), "{:?}", before.elapsed());
    hung.thaw_at_last().await.expect("nothing is frozen, so nothing is asked");

    let (gone, _) = agent([Does::Says(json!({ "return": 1 })), Does::IsNotThere, Does::HasEnded]);
    gone.freeze(&[]).await.unwrap();
    assert!(matches!(gone.thaw_at_last().await, Err(DriverError::Gone)), "it ends with its guest");
}

/// What an agent says of a program that runs, and of one that has ended.
fn runs() -> Does {
    Does::Says(json!({ "return": { "exited": false } }))
}

fn begun() -> Does {
    Does::Says(json!({ "return": { "pid": 7 } }))
}

fn program(stdout: Option<GivenFile>) -> Program {
    Program { argv: vec!["/bin/x".to_owned()], stdout, ..Program::default() }
}

#[tokio::test(start_paused = true)]
async fn a_program_is_looked_after_until_it_has_ended_however_long_the_agent_is_away() {
    let ended = Does::Says(json!({ "return": { "exited": true, "exitcode": 4 } }));
    let (agent, _) = agent([begun(), runs(), Does::IsNotThere, runs(), ended, begun(), runs()]);
    assert_eq!(agent.run(program(None)).await.unwrap(), 4);
    assert!(matches!(agent.run(program(None)).await, Err(DriverError::Gone)));
}

#[tokio::test]
async fn what_a_program_prints_may_be_long_and_is_not_cut_off_in_silence() {
    const MOST: usize = 16 << 20;
    let said = |bytes: usize, truncated: bool| {
        let printed = base64::encode(&vec![b'x'; bytes]);
        Does::Says(
            json!({ "return": { "exited": true, "exitcode": 3, "out-data": printed, "out-truncated": truncated } }),
        )
    };
    for (said, wanted, is_all) in [
        (said(3, false), 3, true),
        (said(1 << 20, false), 1 << 20, true),
        (said(3, true), 3, false),
        (said(MOST + 1, false), MOST, false),
    ] {
        let (ear, mouth) = std::io::pipe().unwrap();
        let reading = std::thread::spawn(move || std::io::read_to_string(ear).unwrap().len());
        let (agent, _) = agent([begun(), runs(), said]);
        let ended = agent.run(program(Some(GivenFile::new(mouth.into(), drop)))).await;
        assert_eq!(reading.join().unwrap(), wanted);
        match ended {
            Ok(status) => assert!(is_all && status == 3),
            Err(error) => assert!(!is_all && error.to_string().contains("stdout is cut off"), "{error}"),
        }
    }
}
