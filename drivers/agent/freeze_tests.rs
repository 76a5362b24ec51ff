//! What becomes of a freeze whose agent refuses, freezes nothing, says nothing, or is not there when it is to thaw.

use super::{Agent, Line, Talk, Terms, Turns};
use async_trait::async_trait;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::Instant;
use virt_model::driver::DriverError;
use virt_model::driver::agent::GuestAgent;

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

#[tokio::test(start_paused = true)]
async fn a_program_is_looked_after_until_it_has_ended_however_long_the_agent_is_away() {
    let runs = || Does::Says(json!({ "return": { "exited": false } }));
    let ended = Does::Says(json!({ "return": { "exited": true, "exitcode": 4 } }));
    let (agent, _) = agent([Does::Says(json!({ "return": { "pid": 7 } })), runs(), Does::IsNotThere, runs(), ended]);
    let words = ["/bin/x".to_owned()];
    let process = agent.exec(&words, &[]).await.unwrap();
    assert_eq!((process, agent.exit_status(process).await.unwrap()), (7, 4));
    assert!(matches!(agent.exit_status(process).await, Err(DriverError::Gone)));
}
