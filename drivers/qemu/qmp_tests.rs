//! The wire against a QEMU made of two ends of a socket.

use super::*;
use std::io::Read;
use std::os::fd::AsRawFd;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines as TokioLines};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob", "telepathy"], "extra": 1}}"#;

/// What the listener heard, with `None` for the end.
struct Ear(mpsc::UnboundedSender<Option<Event>>);

impl Listener for Ear {
    fn event(&mut self, event: Event) {
        let _ = self.0.send(Some(event));
    }
    fn closed(&mut self, why: Option<&str>) {
        if let Some(why) = why {
            let _ = self.0.send(Some(Event { name: "given up".to_owned(), data: json!(why) }));
        }
        let _ = self.0.send(None);
    }
}

/// The other end.
struct Fake {
    commands: TokioLines<BufReader<OwnedReadHalf>>,
    out: OwnedWriteHalf,
}

impl Fake {
    fn new(stream: UnixStream) -> Fake {
        let (read, out) = stream.into_split();
        Fake { commands: BufReader::new(read).lines(), out }
    }

    async fn say(&mut self, line: &str) {
        self.out.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    /// The next command: its name and its id.
    async fn hear(&mut self) -> (String, u64) {
        let line = self.commands.next_line().await.unwrap().expect("a command");
        let command: Value = serde_json::from_str(&line).unwrap();
        (command["execute"].as_str().unwrap().to_owned(), command["id"].as_u64().unwrap())
    }

    async fn answer(&mut self, id: u64, value: Value) {
        self.say(&json!({ "return": value, "id": id }).to_string()).await;
    }
}

async fn pair() -> (Qmp, Fake, mpsc::UnboundedReceiver<Option<Event>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (tell, heard) = mpsc::unbounded_channel();
    let mut fake = Fake::new(theirs);
    let play = async {
        fake.say(GREETING).await;
        let (command, id) = fake.hear().await;
        assert_eq!(command, "qmp_capabilities");
        fake.answer(id, json!({})).await;
    };
    let (qmp, ()) = tokio::join!(Qmp::negotiate(ours, Ear(tell), Duration::from_secs(5)), play);
    let Ok(qmp) = qmp else { panic!("negotiated") };
    (qmp, fake, heard)
}

#[tokio::test]
async fn replies_find_their_callers_in_any_order() {
    let (qmp, mut fake, _heard) = pair().await;
    let play = async {
        let (first, a) = fake.hear().await;
        let (second, b) = fake.hear().await;
        fake.answer(b, json!(second)).await;
        fake.answer(a, json!(first)).await;
    };
    let (one, two, ()) = tokio::join!(qmp.execute("one", json!({})), qmp.execute("two", json!({})), play);
    assert_eq!((one.unwrap(), two.unwrap()), (json!("one"), json!("two")));
}

#[tokio::test]
async fn an_event_is_heard_before_a_reply_that_follows_it() {
    let (qmp, mut fake, mut heard) = pair().await;
    let play = async {
        let (_, id) = fake.hear().await;
        fake.say(r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#).await;
        fake.answer(id, json!({})).await;
    };
    let (done, ()) = tokio::join!(qmp.execute("stop", json!({})), play);
    done.unwrap();
    assert_eq!(heard.try_recv().unwrap().unwrap().name, "STOP");
}

#[tokio::test]
async fn refusals_carry_qemus_words() {
    let (qmp, mut fake, _heard) = pair().await;
    let play = async {
        let (_, id) = fake.hear().await;
        fake.say(&format!(r#"{{"id": {id}, "error": {{"class": "NewClass", "desc": "no such thing"}}}}"#)).await;
    };
    let (done, ()) = tokio::join!(qmp.execute("cont", json!({})), play);
    let refused =
        QmpError::Refused { command: "cont".into(), class: "NewClass".into(), message: "no such thing".into() };
    assert_eq!(done.unwrap_err(), refused);
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_disturbs_nobody() {
    let (qmp, mut fake, _heard) = pair().await;
    assert_eq!(qmp.execute("slow", json!({})).await.unwrap_err(), QmpError::TimedOut("slow".into()));
    let play = async {
        let (_, late) = fake.hear().await;
        let (_, id) = fake.hear().await;
        fake.answer(late, json!("late")).await;
        fake.answer(id, json!("in time")).await;
        fake.answer(id, json!("twice")).await;
        fake.answer(9999, json!("for nobody")).await;
    };
    let (done, ()) = tokio::join!(qmp.execute("next", json!({})), play);
    assert_eq!(done.unwrap(), json!("in time"));
    assert!(qmp.waiting.lock().as_ref().unwrap().is_empty());
}

#[tokio::test]
async fn garbage_half_lines_and_the_unknown_are_passed_over() {
    let (qmp, mut fake, mut heard) = pair().await;
    let play = async {
        let (_, id) = fake.hear().await;
        fake.say("this is no JSON").await;
        fake.say("").await;
        fake.say("[1, 2]").await;
        fake.say(r#"{"event": "NEVER_HEARD_OF", "data": {"new": [1]}}"#).await;
        fake.say(r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#).await;
        let line = json!({ "return": { "status": "running" }, "id": id }).to_string();
        for byte in line.as_bytes() {
            fake.out.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        fake.out.write_all(b"\n").await.unwrap();
    };
    let (done, ()) = tokio::join!(qmp.execute("query-status", json!({})), play);
    assert_eq!(done.unwrap(), json!({ "status": "running" }));
    assert_eq!(heard.try_recv().unwrap().unwrap().name, "NEVER_HEARD_OF");
}

/// M2: what a line may cost is bounded, and whoever sends a longer one is no QEMU.
#[tokio::test]
async fn a_line_without_end_ends_the_connection_with_the_reason() {
    let (qmp, mut fake, mut heard) = pair().await;
    let play = async {
        fake.hear().await;
        let (chunk, mut sent) = (vec![b'x'; 1 << 20], 0);
        while fake.out.write_all(&chunk).await.is_ok() {
            sent += chunk.len();
            assert!(sent <= 3 * MAX_LINE, "somebody reads all this");
        }
    };
    let (done, ()) = tokio::join!(qmp.execute("any", json!({})), play);
    assert_eq!(done.unwrap_err(), QmpError::Closed);
    let why = heard.recv().await.unwrap().unwrap();
    assert!(why.name == "given up" && why.data.as_str().unwrap().contains("longer than"), "{why:?}");
    assert_eq!(heard.recv().await.unwrap(), None);
}

#[tokio::test]
async fn a_long_line_is_read() {
    let (qmp, mut fake, _heard) = pair().await;
    let play = async {
        let (_, id) = fake.hear().await;
        fake.answer(id, json!("x".repeat(MAX_LINE - 100))).await;
    };
    let (done, ()) = tokio::join!(qmp.execute("any", json!({})), play);
    assert_eq!(done.unwrap().as_str().unwrap().len(), MAX_LINE - 100);
}

/// M2: lines without sense are not read for ever, and fill no log.
#[tokio::test]
async fn nothing_but_garbage_ends_the_connection() {
    let (_qmp, mut fake, mut heard) = pair().await;
    let play = async { while fake.out.write_all(b"garbage\n").await.is_ok() {} };
    let hear = async {
        let why = heard.recv().await.unwrap().unwrap();
        assert!(why.data.as_str().unwrap().contains("no JSON"), "{why:?}");
    };
    tokio::join!(play, hear);
}

#[tokio::test]
async fn the_end_of_the_stream_fails_every_caller() {
    let (qmp, mut fake, mut heard) = pair().await;
    let play = async move {
        fake.hear().await;
        fake.hear().await;
        fake.out.write_all(b"{\"return\": {}, \"id\":").await.unwrap();
    };
    let (one, two, ()) = tokio::join!(qmp.execute("one", json!({})), qmp.execute("two", json!({})), play);
    assert_eq!((one.unwrap_err(), two.unwrap_err()), (QmpError::Closed, QmpError::Closed));
    assert_eq!(heard.recv().await.unwrap(), None);
    assert_eq!(qmp.execute("three", json!({})).await.unwrap_err(), QmpError::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_monitor_that_says_nothing_is_given_up() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let (tell, _heard) = mpsc::unbounded_channel();
    let hello = Qmp::negotiate(ours, Ear(tell), Duration::from_secs(2)).await;
    assert_eq!(hello.err(), Some(QmpError::TimedOut("greeting".into())));
}

#[tokio::test]
async fn what_does_not_speak_qmp_is_refused() {
    for greeting in ["SSH-2.0-OpenSSH", "{}", "\"QMP\""] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (tell, _heard) = mpsc::unbounded_channel();
        let mut fake = Fake::new(theirs);
        fake.say(greeting).await;
        let hello = Qmp::negotiate(ours, Ear(tell), Duration::from_secs(5)).await;
        assert!(matches!(hello.err(), Some(QmpError::Connect(_))), "{greeting}");
    }
}

#[tokio::test]
async fn descriptors_go_with_their_command() {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let (qmp, fake, _heard) = pair().await;
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, b"through the wire").unwrap();
    let sent = OwnedFd::from(file);
    assert!(sent.as_raw_fd() > 2);
    let ours = qmp.execute_with("getfd", json!({ "fdname": "x" }), vec![sent], Duration::from_millis(300));
    let play = async {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let stream: &UnixStream = fake.out.as_ref();
        let read = || {
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut line = [0u8; 512];
            let mut parts = [std::io::IoSliceMut::new(&mut line)];
            recvmsg(stream, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
            let mut fds = ancillary.drain().filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            Ok(fds.next())
        };
        stream.async_io(Interest::READABLE, read).await.unwrap().expect("a descriptor")
    };
    let (_, got) = tokio::join!(ours, play);
    let mut file = std::fs::File::from(got);
    std::io::Seek::rewind(&mut file).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "through the wire");
}

#[tokio::test]
async fn dropping_the_connection_closes_it() {
    let (qmp, mut fake, _heard) = pair().await;
    drop(qmp);
    assert_eq!(fake.commands.next_line().await.unwrap(), None);
}

#[tokio::test]
async fn nothing_is_said_of_no_arguments() {
    let (qmp, mut fake, _heard) = pair().await;
    let play = async {
        let mut lines = Vec::new();
        for _ in 0..3 {
            let line = fake.commands.next_line().await.unwrap().expect("a command");
            let command: Value = serde_json::from_str(&line).unwrap();
            fake.answer(command["id"].as_u64().unwrap(), json!({})).await;
            lines.push(command.get("arguments").cloned());
        }
        lines
    };
    let asked = async {
        qmp.execute("none", json!({})).await.unwrap();
        qmp.execute("some", json!({ "none": {} })).await.unwrap();
        qmp.tell("none", json!({})).await;
    };
    let ((), arguments) = tokio::join!(asked, play);
    assert_eq!(arguments, [None, Some(json!({ "none": {} })), None]);
}

#[tokio::test]
async fn what_is_told_is_sent_before_what_is_asked_and_its_answer_is_nobodys() {
    let (qmp, mut fake, _heard) = pair().await;
    qmp.tell("told", json!({})).await;
    let play = async {
        let (told, a) = fake.hear().await;
        let (asked, b) = fake.hear().await;
        fake.answer(a, json!("told")).await;
        fake.answer(b, json!("asked")).await;
        (told, asked)
    };
    let (answer, heard) = tokio::join!(qmp.execute("asked", json!({})), play);
    assert_eq!(answer.unwrap(), json!("asked"));
    assert_eq!(heard, ("told".to_owned(), "asked".to_owned()));
}
