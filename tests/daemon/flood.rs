//! Callers that ask for more than their share: they are bounded, virtd stays small, and others are answered.

use crate::common::users::{ALICE, BOB, User};
use crate::common::{Daemon, PATIENCE, Setup};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use zbus::message::Flags;
use zbus::{Connection, Message};

const CALLS: usize = 100_000;

/// A client by hand, that reads nothing after it has said hello.
struct Deaf(UnixStream);

impl Deaf {
    fn connect(daemon: &Daemon, user: &User) -> Deaf {
        let mut socket = crate::common::users::connect_as(user, daemon.folder()).unwrap();
        let uid: String = user.uid.to_string().bytes().map(|digit| format!("{digit:02x}")).collect();
        socket.write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes()).unwrap();
        let mut answer = [0; 512];
        assert!(socket.read(&mut answer).unwrap() > 0);
        socket.write_all(b"BEGIN\r\n").unwrap();
        let hello = Message::method_call("/org/freedesktop/DBus", "Hello").destination("org.freedesktop.DBus");
        socket.write_all(hello.interface("org.freedesktop.DBus").build(&()).unwrap().data()).unwrap();
        assert!(socket.read(&mut answer).unwrap() > 0);
        socket.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        Deaf(socket)
    }

    /// Sends the same call again and again, as long as anybody takes it.
    fn flood(&mut self, make: impl Fn() -> Message) -> usize {
        for sent in 0..CALLS {
            if self.0.write_all(make().data()).is_err() {
                return sent;
            }
        }
        CALLS
    }
}

fn call(path: &'static str, interface: &'static str, member: &'static str) -> zbus::message::Builder<'static> {
    Message::method_call(path, member).destination("org.virt").interface(interface)
}

fn introspect() -> Message {
    call("/org/virt", "org.freedesktop.DBus.Introspectable", "Introspect").build(&()).unwrap()
}

fn read_properties() -> Message {
    call("/org/virt", "org.freedesktop.DBus.Properties", "GetAll").build(&"org.virt.Manager").unwrap()
}

fn validate_in_silence() -> Message {
    let options = std::collections::HashMap::<&str, zbus::Variant<'_>>::new();
    let builder = call("/org/virt", "org.virt.Manager", "ValidateDomain").with_flags(Flags::NO_REPLY_EXPECTED);
    builder.build(&("<domain type='test'><name>x</name></domain>", options)).unwrap()
}

/// How long virtd takes to answer somebody else.
async fn answers(client: &Connection) -> Duration {
    let begun = Instant::now();
    let interface = Some("org.freedesktop.DBus.Properties");
    client.call_method(Some("org.virt"), "/org/virt", interface, "GetAll", &"org.virt.Manager").await.unwrap();
    begun.elapsed()
}

/// Floods from one user while another goes on; says what it cost.
async fn flooded_by(make: fn() -> Message) -> Option<()> {
    let daemon = Daemon::on_system_bus(Setup::default()).await?;
    let bob = daemon.connect_as(&BOB).await;
    answers(&bob).await;
    let before = daemon.memory_kib();
    let mut deaf = Deaf::connect(&daemon, &ALICE);
    let flood = tokio::task::spawn_blocking(move || (deaf.flood(make), deaf));
    let (mut most, mut slowest, mut asked) = (before, Duration::ZERO, 0);
    while !flood.is_finished() {
        slowest = slowest.max(answers(&bob).await);
        most = most.max(daemon.memory_kib());
        asked += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (sent, deaf) = flood.await.unwrap();
    slowest = slowest.max(answers(&bob).await);
    println!(
        "{sent} calls sent; virtd {before} KiB before, {most} at most; {asked} answers meanwhile, {slowest:?} at most"
    );
    assert!(most < before + (40 << 10), "virtd grew from {before} to {most} KiB");
    assert!(slowest < PATIENCE, "others waited {slowest:?}");
    drop(deaf);
    Some(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_reads_no_properties() {
    flooded_by(read_properties).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_reads_no_large_answers() {
    flooded_by(introspect).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_wants_no_answers() {
    flooded_by(validate_in_silence).await;
}
