//! Callers that ask for more than their share: they are bounded, virtd stays small, and others are answered.

use crate::common::client::{Client, options};
use crate::common::deaf::{Deaf, call};
use crate::common::users::{ALICE, BOB, User};
use crate::common::{Daemon, PATIENCE, Setup, read_project_file};
use crate::subscribed::{moment, subscribe, until_gone};
use std::time::{Duration, Instant};
use zbus::message::Flags;
use zbus::{Connection, Message};

const CALLS: usize = 100_000;

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
    let flood = tokio::task::spawn_blocking(move || (deaf.flood(CALLS, make), deaf));
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

/// Some hundred machines with long descriptions, so that a listing of them is large.
async fn inventory(daemon: &Daemon, machines: usize) {
    let root = Client { connection: daemon.connect().await };
    let text = "x".repeat(4000);
    for number in 0..machines {
        let xml = format!(
            "<domain type='test'><name>m{number}</name><description>{text}</description><memory>65536</memory>\
             <os><type>hvm</type></os></domain>"
        );
        root.define(&xml).await.expect("defined");
    }
}

/// Whether virtd had to make a new connection to the bus.
fn connected_anew(daemon: &Daemon) -> bool {
    daemon.log().contains("connected anew")
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

fn list_all() -> Message {
    call("/org/virt", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects").build(&()).unwrap()
}

/// H1: what is unread is counted over all connections, so the bus never has as much of ours as it takes.
#[tokio::test(flavor = "multi_thread")]
async fn twenty_callers_that_read_no_listings() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    inventory(&daemon, 250).await;
    let bob = daemon.connect_as(&BOB).await;
    let before = daemon.memory_kib();
    let mut deaf: Vec<_> = (0..20).map(|_| Deaf::connect(&daemon, &ALICE)).collect();
    let flood = tokio::task::spawn_blocking(move || {
        for _ in 0..300 {
            deaf.iter_mut().for_each(|one| assert!(one.send(&list_all())));
        }
        deaf
    });
    let (mut slowest, mut asked) = (Duration::ZERO, 0);
    while !flood.is_finished() || asked < 200 {
        slowest = slowest.max(answers(&bob).await);
        asked += 1;
    }
    let deaf = flood.await.unwrap();
    let client = Client { connection: bob };
    client.call("/org/virt", "org.virt.Manager.ListDomains", &options([])).await.expect("another user's listing");
    let most = daemon.peak_memory_kib();
    println!("virtd {before} KiB before, {most} at most; {asked} answers, {slowest:?} at most");
    assert!(!connected_anew(&daemon), "the bus had too much of ours");
    assert!(most < before + (128 << 10), "virtd grew from {before} to {most} KiB");
    drop(deaf);
}

fn open_metrics() -> Message {
    call("/org/virt", "org.virt.Manager", "OpenMetrics").build(&options([])).unwrap()
}

/// How many descriptors the bus keeps for clients of a user that do not read them.
async fn unread_descriptors(root: &Connection, user: &User) -> u32 {
    let bus = zbus::fdo::DBusProxy::new(root).await.unwrap();
    let mut all = 0;
    for name in bus.list_names().await.unwrap() {
        let of_user = bus.get_connection_unix_user(name.clone().into()).await.is_ok_and(|uid| uid == user.uid);
        if of_user && name.starts_with(':') {
            let (service, interface) = ("org.freedesktop.DBus", Some("org.freedesktop.DBus.Debug.Stats"));
            let path = "/org/freedesktop/DBus";
            let stats = root.call_method(Some(service), path, interface, "GetConnectionStats", &name.as_str()).await;
            let stats = stats.unwrap();
            let body = stats.body();
            let stats: std::collections::HashMap<&str, zbus::Variant<'_>> = body.deserialize().unwrap();
            all += stats["OutgoingFDs"].downcast_ref::<u32>().unwrap();
        }
    }
    all
}

/// A bus reads nothing more from whoever has sent 64 descriptors that it still keeps for others.
#[tokio::test(flavor = "multi_thread")]
async fn callers_that_do_not_read_the_descriptors_they_asked_for() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let (root, bob) = (daemon.connect().await, daemon.connect_as(&BOB).await);
    let mut deaf: Vec<_> = (0..3).map(|_| Deaf::connect(&daemon, &ALICE)).collect();
    // Some hundred answers lie in a socket before the bus keeps any.
    let flood = tokio::task::spawn_blocking(move || {
        deaf.iter_mut().for_each(|one| assert_eq!(one.flood(550, open_metrics), 550));
        deaf
    });
    let deaf = tokio::time::timeout(PATIENCE, flood).await.expect("the bus takes all of it").unwrap();
    let client = Client { connection: bob.clone() };
    let (begun, mut most, mut rounds) = (Instant::now(), 0, 0);
    // As much as a user may have, and a hundred answers to another beside it.
    while most < 8 || rounds < 100 {
        assert!(begun.elapsed() < 3 * PATIENCE, "after {rounds} rounds the bus keeps no more than {most}");
        most = most.max(unread_descriptors(&root, &ALICE).await);
        tokio::time::timeout(PATIENCE, answers(&bob)).await.expect("others are answered");
        let none = options([]);
        let opened = client.call("/org/virt", "org.virt.Manager.OpenMetrics", &none);
        tokio::time::timeout(PATIENCE, opened).await.expect("others are answered").expect("with descriptors, too");
        rounds += 1;
    }
    assert_eq!(most, 8, "of a user");
    assert!(!connected_anew(&daemon), "the bus had too much of ours");
    drop(deaf);
    // Whoever reads has as many as it likes.
    let alice = Client { connection: daemon.connect_as(&ALICE).await };
    for _ in 0..20 {
        alice.call("/org/virt", "org.virt.Manager.OpenMetrics", &options([])).await.expect("it reads");
    }
}

/// H1: descriptors that no member takes never get to us: the bus refuses them, so nobody can use up ours.
#[tokio::test(flavor = "multi_thread")]
async fn callers_that_send_descriptors() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let bob = daemon.connect_as(&BOB).await;
    answers(&bob).await;
    let before = daemon.descriptors();
    let mut deaf: Vec<_> = (0..8).map(|_| Deaf::connect(&daemon, &ALICE)).collect();
    for _ in 0..100 {
        for one in &mut deaf {
            assert!(one.send_descriptors(16), "the bus ended the connection");
        }
        answers(&bob).await;
        assert!(daemon.descriptors() < before + 16, "{} descriptors, {before} before", daemon.descriptors());
    }
}

/// H1: calls are bounded in bytes, and at the socket.
#[tokio::test(flavor = "multi_thread")]
async fn callers_that_send_thirty_mebibytes() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let bob = daemon.connect_as(&BOB).await;
    answers(&bob).await;
    let before = daemon.memory_kib();
    let large = call("/org/virt", "org.virt.Manager", "GetDomainByName").build(&"x".repeat(30 << 20)).unwrap();
    let mut deaf: Vec<_> = (0..4).map(|_| Deaf::connect(&daemon, &ALICE)).collect();
    let flood = tokio::task::spawn_blocking(move || {
        for _ in 0..8 {
            // The bus may have no room for more.
            for one in &mut deaf {
                one.send(&large);
            }
        }
        deaf
    });
    while !flood.is_finished() {
        answers(&bob).await;
    }
    let (_deaf, most) = (flood.await.unwrap(), daemon.peak_memory_kib());
    println!("virtd {before} KiB before, {most} at most");
    assert!(most < before + (64 << 10), "virtd grew from {before} to {most} KiB");
    let client = Client { connection: bob };
    let large = "x".repeat(14 << 20);
    let (name, _) = client.named(&large).await.err().expect("no such call is read");
    assert_eq!(name, "org.freedesktop.DBus.Error.LimitsExceeded");
}

/// A bus that keeps little, so that it does not take long until it has too much of ours.
fn small_bus() -> Setup {
    let limits = "<limit name=\"max_incoming_bytes\">1000000</limit><limit name=\"max_outgoing_bytes\">1000000</limit>";
    let policy = read_project_file("dbus-policy/org.virt.conf");
    Setup { bus_policy: policy.replace("</busconfig>", &format!("{limits}</busconfig>")), ..Setup::default() }
}

/// H1, M4: a listener that does not read stops our connection; then there is another, with the same name and all state.
#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_does_not_read_costs_a_connection_and_no_more() {
    let Some(daemon) = Daemon::on_system_bus(small_bus()).await else { return };
    let root = Client { connection: daemon.connect().await };
    let xml = "<domain type='test'><name>web</name><memory>65536</memory><os><type>hvm</type></os></domain>";
    let domain = root.define(xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    let (stays, leaves) = (daemon.connect_as(&BOB).await, daemon.connect_as(&BOB).await);
    let [stays, leaves] = [stays, leaves].map(|connection| Client { connection });
    let kept = subscribe(&stays, &[]).await.expect("begun");
    let left = subscribe(&leaves, &[]).await.expect("begun");
    let mut deaf = Deaf::connect(&daemon, &ALICE);
    deaf.listen();
    let mut changes = 0;
    while !connected_anew(&daemon) {
        // Calls that were under way then have no answer, and the next ones wait for it.
        let text = format!("{changes:04000}");
        let body = (text, options([]));
        let done = domain.client.ask(&domain.path, "org.virt.Domain.SetDescription", &body);
        let _ = tokio::time::timeout(Duration::from_secs(1), done).await;
        changes += 1;
        assert!(changes < 5000, "the bus takes all of it");
    }
    let bus = zbus::fdo::DBusProxy::new(&root.connection).await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !bus.name_has_owner("org.virt".try_into().unwrap()).await.unwrap() {
        assert!(Instant::now() < deadline, "the name is not taken again");
    }
    assert_eq!(root.named("web").await.expect("there").state().await.0, "running");
    // Who had begun something by the former connection has it still, until it leaves.
    let mut told = stays.watch().await;
    assert_eq!(moment(&mut told).await.0, kept);
    leaves.connection.close().await.expect("left");
    until_gone(&mut told, &left).await;
    drop(told);
    println!("a new connection after {changes} changes");
    // The listener has all that the bus keeps for it; from now on it costs nothing.
    for number in 0..1000 {
        let text = format!("{number:04000}");
        domain.call("SetDescription", &(text, options([]))).await.expect("changed");
    }
    assert_eq!(daemon.log().matches("connected anew").count(), 1);
}
