//! Hostile clients of three users, all at once: virtd stays small, and whoever else calls is answered.
//!
//! Runs for some seconds, or for as many as `SOAK_SECONDS` says; prints what it measured.

use crate::common::client::{Client, options};
use crate::common::deaf::{Deaf, call};
use crate::common::users::{ALICE, BOB, OPERATOR, QEMU, User};
use crate::common::{Daemon, PATIENCE, Setup};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};
use zbus::Message;
use zbus::message::Flags;

/// How long it goes on, in seconds, unless the environment says otherwise.
const SECONDS: u64 = 5;
/// How much virtd may grow, in KiB, when it is built for debugging: 40 to 170 MiB have been seen. 128 MiB are wanted.
const GROWTH: u64 = 384 << 10;

/// What one hostile client does, again and again; `false` if nobody takes it.
type Deed = fn(&mut Deaf) -> bool;

fn seconds() -> u64 {
    std::env::var("SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SECONDS)
}

fn with(body: &str, member: &'static str) -> Message {
    let none = std::collections::HashMap::<&str, zbus::Variant<'_>>::new();
    call("/org/virt", "org.virt.Manager", member).build(&(body, none)).unwrap()
}

/// Reads no listings.
fn list(client: &mut Deaf) -> bool {
    client.send(&call("/org/virt", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects").build(&()).unwrap())
}

/// Sends calls of nearly as much as a bus carries; or what no bus carries, which ends the connection.
fn large(client: &mut Deaf) -> bool {
    client.send(&call("/org/virt", "org.virt.Manager", "GetDomainByName").build(&"x".repeat(31 << 20)).unwrap())
}

fn too_large(client: &mut Deaf) -> bool {
    client.send(&call("/org/virt", "org.virt.Manager", "GetDomainByName").build(&"x".repeat(100 << 20)).unwrap())
}

/// Sends calls with descriptors.
fn descriptors(client: &mut Deaf) -> bool {
    client.send_descriptors(16)
}

/// Has documents of half a MiB read.
fn documents(client: &mut Deaf) -> bool {
    let metadata = "<a:b xmlns:a='urn:a'/>".repeat(20_000);
    let xml = format!(
        "<domain type='test'><name>x</name><metadata>{metadata}</metadata><memory>65536</memory>\
         <os><type>hvm</type></os></domain>"
    );
    client.send(&with(&xml, "ValidateDomain"))
}

/// Calls without wanting answers.
fn silence(client: &mut Deaf) -> bool {
    let silent = call("/org/virt", "org.virt.Manager", "GetDomainByName").with_flags(Flags::NO_REPLY_EXPECTED);
    client.send(&silent.build(&"nobody").unwrap())
}

/// Listens to all that is told, and calls nothing.
fn listen(client: &mut Deaf) -> bool {
    client.listen();
    true
}

/// Clients of `user` that do `deed` until `end`, each with a pause between; says how often they did.
fn hostile(
    daemon: &Arc<Daemon>,
    user: User,
    clients: usize,
    pause: u64,
    deed: Deed,
    end: Instant,
) -> std::thread::JoinHandle<usize> {
    let daemon = daemon.clone();
    std::thread::spawn(move || {
        let mut all: Vec<_> = (0..clients).map(|_| Deaf::connect(&daemon, &user)).collect();
        let mut done = 0;
        while Instant::now() < end {
            for client in &mut all {
                if deed(client) {
                    done += 1;
                } else if let Some(new) = Deaf::try_connect(&daemon, &user) {
                    *client = new;
                }
            }
            std::thread::sleep(Duration::from_millis(pause));
        }
        done
    })
}

/// One who has done nothing, calling as people do; gives the slowest answer and how many there were.
async fn bystander(client: &Client, end: Instant) -> (Duration, &'static str, usize) {
    let (mut slowest, mut which, mut answered) = (Duration::ZERO, "", 0);
    let document = "<domain type='test'><name>y</name><memory>65536</memory><os><type>hvm</type></os></domain>";
    while Instant::now() < end {
        for member in ["Introspect", "GetDomainByName", "ListDomains", "ValidateDomain"] {
            let begun = Instant::now();
            let called = async {
                match member {
                    "Introspect" => {
                        client.call("/org/virt", "org.freedesktop.DBus.Introspectable.Introspect", &()).await.map(drop)
                    }
                    "GetDomainByName" => client.named("m0").await.map(drop),
                    "ListDomains" => {
                        client.call("/org/virt", "org.virt.Manager.ListDomains", &options([])).await.map(drop)
                    }
                    _ => {
                        let body = (document, options([]));
                        client.call("/org/virt", "org.virt.Manager.ValidateDomain", &body).await.map(drop)
                    }
                }
            };
            let result = tokio::time::timeout(PATIENCE, called).await;
            match result.unwrap_or_else(|_| panic!("{member} was not answered within {PATIENCE:?}")) {
                Ok(()) => answered += 1,
                // A bus that has no room for a call says so itself, and when we are on it by another connection.
                Err((name, text)) => {
                    let excused = ["LimitsExceeded", "NoReply", "ServiceUnknown"];
                    assert!(excused.iter().any(|word| name.ends_with(word)), "{member}: {name}: {text}");
                }
            }
            if begun.elapsed() > slowest {
                (slowest, which) = (begun.elapsed(), member);
            }
        }
    }
    (slowest, which, answered)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_clients_of_three_users() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let daemon = Arc::new(daemon);
    let root = Client { connection: daemon.connect().await };
    for number in 0..100 {
        let xml = format!(
            "<domain type='test'><name>m{number}</name><description>{}</description><memory>65536</memory>\
             <os><type>hvm</type></os></domain>",
            "x".repeat(4000)
        );
        root.define(&xml).await.expect("defined");
    }
    let (memory, descriptors_before) = (daemon.memory_kib(), daemon.descriptors());
    let end = Instant::now() + Duration::from_secs(seconds());
    let crowd = [
        ("listings", hostile(&daemon, ALICE, 20, 0, list, end)),
        ("documents", hostile(&daemon, ALICE, 4, 50, documents, end)),
        ("calls of 31 MiB", hostile(&daemon, BOB, 2, 50, large, end)),
        ("calls of 100 MiB", hostile(&daemon, BOB, 1, 500, too_large, end)),
        ("descriptors", hostile(&daemon, BOB, 4, 1, descriptors, end)),
        ("silent calls", hostile(&daemon, OPERATOR, 2, 1, silence, end)),
        ("listeners", hostile(&daemon, OPERATOR, 8, 1000, listen, end)),
    ];
    let most = Arc::new(AtomicUsize::new(0));
    let (counted, watched) = (most.clone(), daemon.clone());
    let watching = tokio::spawn(async move {
        while Instant::now() < end {
            counted.fetch_max(watched.descriptors(), Relaxed);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let changing = tokio::spawn(async move {
        let domain = root.named("m1").await.expect("there");
        let mut changes = 0;
        while Instant::now() < end {
            let body = (format!("{changes:03900}"), options([]));
            if domain.client.ask(&domain.path, "org.virt.Domain.SetDescription", &body).await {
                changes += 1;
            }
        }
        changes
    });
    let client = Client { connection: daemon.connect_as(&QEMU).await };
    let (slowest, which, answered) = bystander(&client, end).await;
    watching.await.unwrap();
    let changes = changing.await.unwrap();
    for (what, clients) in crowd {
        println!("{what}: {}", clients.join().unwrap());
    }
    let (peak, most) = (daemon.peak_memory_kib(), most.load(Relaxed));
    println!("virtd: {memory} KiB before, {peak} at most; {descriptors_before} descriptors before, {most} at most");
    println!("another user: {answered} answers, the slowest ({which}) after {slowest:?}; {changes} changes were told");
    assert!(peak < memory + GROWTH, "virtd grew from {memory} to {peak} KiB");
    assert!(most < descriptors_before + 64, "virtd has {most} descriptors");
    assert!(answered > 0);
}
