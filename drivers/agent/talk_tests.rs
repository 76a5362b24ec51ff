//! Talks with agents that are hostile, broken or slow: what a real one does too seldom.

use super::talk::{Command, HELLO, Talk, Terms, Turns};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::Instant;
use virt_model::driver::DriverError;

const LONG: Duration = Duration::from_secs(3600);

/// The guest's end of a talk.
struct Guest(BufReader<UnixStream>);

impl Guest {
    /// What is asked next.
    async fn hears(&mut self) -> Value {
        let mut line = Vec::new();
        self.0.read_until(b'\n', &mut line).await.expect("a request");
        serde_json::from_slice(line.strip_prefix(b"\xff").unwrap_or(&line)).expect("JSON")
    }

    async fn says(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).await.expect("taken");
    }

    /// Answers the first question of a talk as an agent does, after saying that.
    async fn synchronises_after(&mut self, noise: &[u8]) {
        let hello = self.hears().await;
        assert_eq!(hello["execute"], "guest-sync-delimited");
        let answer = format!("{}\n", json!({ "return": hello["arguments"]["id"] }));
        self.says(&[noise, answer.as_bytes()].concat()).await;
    }
}

/// Begins a talk with a guest that does this at first.
async fn begin<F: Future<Output = Guest>>(
    turns: &Turns,
    terms: Terms,
    first: impl FnOnce(Guest) -> F,
) -> (Result<Talk, DriverError>, Guest) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let talk = Talk::begin(turns, async { Ok(ours) }, terms);
    tokio::join!(talk, first(Guest(BufReader::new(theirs))))
}

/// A talk that has begun.
async fn talk(turns: &Turns, within: Duration) -> (Talk, Guest) {
    let (talk, guest) = begin(turns, Terms::within(within), |mut guest| async {
        guest.synchronises_after(b"\xff").await;
        guest
    })
    .await;
    (talk.expect("begun"), guest)
}

fn why(error: &DriverError) -> String {
    error.to_string()
}

#[tokio::test]
async fn what_is_left_of_an_earlier_talk_is_not_taken_for_an_answer() {
    let left = b"{\"return\": \"late\"}\n{\"return\": 17}\nhalf a line {\"ret\xff{\"return\": 3}\n\0\0[[[\n\xff";
    let (begun, mut guest) = begin(&Turns::default(), Terms::within(LONG), |mut guest| async {
        guest.synchronises_after(left).await;
        guest
    })
    .await;
    let mut talk = begun.expect("begun");
    let (asked, ()) = tokio::join!(talk.ask("guest-get-time", json!({})), async {
        assert_eq!(guest.hears().await["execute"], "guest-get-time");
        guest.says(b"nonsense\n[]\n7\n{}\n{\"return\": 5}\n").await;
    });
    assert_eq!(asked.expect("answered"), json!(5));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_says_nothing_or_another_number_is_none() {
    for said in [&b""[..], b"\xff{\"return\": 1}\n"] {
        let before = Instant::now();
        let (begun, _guest) = begin(&Turns::default(), Terms::within(LONG), |mut guest| async {
            guest.says(said).await;
            guest
        })
        .await;
        let error = begun.expect_err("it did not answer");
        assert!(matches!(error, DriverError::AgentUnavailable(_)), "{error}");
        assert_eq!(before.elapsed().as_secs(), HELLO.as_secs());
    }
}

#[tokio::test]
async fn an_answer_without_an_end_is_given_up() {
    let turns = Turns::default();
    for piece in [vec![b'x'; 64 << 10], vec![b'\n'; 64 << 10], b"{}\n".repeat(20 << 10)] {
        let (mut talk, guest) = talk(&turns, LONG).await;
        let babble = tokio::spawn(async move {
            let mut stream = guest.0.into_inner();
            while stream.write_all(&piece).await.is_ok() {}
        });
        let error = talk.ask("guest-ping", json!({})).await.expect_err("no answer");
        assert!(why(&error).contains("more than is listened to"), "{error}");
        drop(talk);
        babble.await.expect("it hears that we have hung up");
    }
}

#[tokio::test(start_paused = true)]
async fn depth_is_bounded_where_it_is_understood_and_harmless_where_it_is_not() {
    let deep = |depth: usize| format!("{{\"return\": {}{}}}\n", "[".repeat(depth), "]".repeat(depth));
    let turns = Turns::default();
    let (mut one, mut guest) = talk(&turns, Duration::from_millis(500)).await;
    let (asked, ()) = tokio::join!(one.ask("guest-info", json!({})), async {
        guest.hears().await;
        guest.says(deep(100_000).as_bytes()).await;
    });
    assert!(matches!(asked, Err(DriverError::TimedOut(_))), "{asked:?}");
    drop(one);
    let (mut other, mut guest) = talk(&turns, LONG).await;
    let command = Command::read(r#"{"execute": "guest-info"}"#).expect("a command");
    let (handed_on, ()) = tokio::join!(other.hand_on(&command), async {
        guest.hears().await;
        guest.says(b"{\"return\": \"\xc3\"}\n").await;
        guest.says(deep(100_000).as_bytes()).await;
    });
    assert_eq!(handed_on.expect("as it is"), deep(100_000).trim());
}

#[tokio::test]
async fn its_own_error_is_told_with_its_class_and_cannot_deceive() {
    let turns = Turns::default();
    let (mut talk, mut guest) = talk(&turns, LONG).await;
    let long = "x".repeat(100_000);
    let said = json!({ "error": { "class": "CommandNotFound", "desc": format!("no\u{202e}\u{7}{long}") } });
    let (asked, ()) = tokio::join!(talk.ask("guest-x", json!({})), async {
        guest.hears().await;
        guest.says(format!("{said}\n").as_bytes()).await;
    });
    let error = asked.expect_err("refused");
    assert!(matches!(&error, DriverError::AgentFailed { class, .. } if class == "CommandNotFound"), "{error}");
    let text = why(&error);
    assert!(text.contains("CommandNotFound: no\\u{202e}\\u{7}xxx") && text.len() < 400, "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_hung_agent_keeps_others_waiting_for_a_moment_only_and_is_heard_again_after_it() {
    let turns = Turns::default();
    let (mut hung, mut guest) = talk(&turns, Duration::from_secs(60)).await;
    let command = Command::read(r#"{"execute": "guest-x", "arguments": {"a": 1}}"#).expect("a command");
    let begun = Instant::now();
    let (late, busy) = tokio::join!(hung.hand_on(&command), async {
        let busy = begin(&turns, Terms::within(LONG), |guest| async { guest }).await.0.expect_err("it is busy");
        (busy, begun.elapsed())
    });
    assert!(matches!(&busy.0, DriverError::TimedOut(text) if text.contains("busy")), "{}", busy.0);
    assert_eq!(busy.1.as_secs(), HELLO.as_secs());
    let late = late.expect_err("it does not answer");
    assert!(matches!(&late, DriverError::TimedOut(text) if text.contains("'guest-x'")), "{late}");
    assert_eq!(begun.elapsed().as_secs(), 60);
    assert_eq!(guest.hears().await, json!({ "execute": "guest-x", "arguments": { "a": 1 } }));
    drop(hung);
    assert_eq!(guest.0.read(&mut [0]).await.expect("an end"), 0, "it hangs up");
    // What it answers at last comes before what the next talk is answered.
    let (next, mut guest) = begin(&turns, Terms::within(LONG), |mut guest| async {
        guest.synchronises_after(b"{\"return\": \"of guest-x\"}\n\xff").await;
        guest
    })
    .await;
    let mut next = next.expect("begun");
    let (asked, ()) = tokio::join!(next.ask("guest-ping", json!({})), async {
        guest.hears().await;
        guest.says(b"{\"return\": {}}\n").await;
    });
    assert_eq!(asked.expect("answered"), json!({}));
}

#[tokio::test(start_paused = true)]
async fn what_cannot_wait_does_not() {
    let turns = Turns::default();
    let (mut hung, _guest) = talk(&turns, LONG).await;
    let before = Instant::now();
    let hung = async move { hung.ask("guest-x", json!({})).await };
    let urgent = begin(&turns, Terms::within(LONG).urgent(), |mut guest| async {
        guest.synchronises_after(b"\xff").await;
        guest
    });
    // In this order: one is under way, one waits, and then comes who cannot.
    let (given_up, (waits, _), (urgent, _)) =
        tokio::join!(hung, begin(&turns, Terms::within(LONG), |guest| async { guest }), urgent);
    assert!(matches!(&given_up, Err(DriverError::TimedOut(text)) if text.contains("given up")), "{given_up:?}");
    assert!(matches!(&waits, Err(DriverError::TimedOut(text)) if text.contains("busy")), "{waits:?}");
    urgent.expect("begun");
    assert_eq!(before.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn what_answers_only_if_it_fails_is_waited_for_until_that_is_known() {
    let tell = async |answers: fn(u64) -> String| {
        let turns = Turns::default();
        let (talk, mut guest) = talk(&turns, LONG).await;
        let (told, ()) = tokio::join!(talk.tell("guest-shutdown", json!({}), HELLO), async {
            assert_eq!(guest.hears().await["execute"], "guest-shutdown");
            let number = guest.hears().await["arguments"]["id"].as_u64().expect("a number");
            guest.says(answers(number).as_bytes()).await;
            if answers(0).is_empty() {
                drop(guest);
            }
        });
        told
    };
    tell(|number| format!("{{\"return\": {number}}}\n")).await.expect("it does it");
    tell(|_| String::new()).await.expect("it has gone to do it");
    tell(|_| "{\"return\": 1}\n".to_owned()).await.expect("it says nothing more");
    let refused = tell(|_| "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n".to_owned()).await;
    assert!(matches!(refused, Err(DriverError::AgentFailed { .. })), "{refused:?}");
}

#[test]
fn what_is_no_command_is_refused_without_a_word_of_it() {
    for (text, word) in [
        ("secret", "line 1"),
        ("[\"secret\"]", "object"),
        ("{}", "'execute'"),
        ("{\"execute\": {\"secret\": 1}}", "'execute'"),
        ("{\"execute\": \"x\", \"id\": \"secret\"}", "'id'"),
    ] {
        let error = Command::read(text).expect_err(text);
        assert!(matches!(error, DriverError::Argument(_)), "{error}");
        assert!(why(&error).contains(word) && !why(&error).contains("secret"), "{error}");
    }
}
