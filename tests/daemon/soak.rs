//! Hostile clients of three users, all at once: virtd stays small, and whoever else calls is answered.
//!
//! Runs for some seconds, or for as many as `SOAK_SECONDS` says, with all kinds of hostile clients or those that
//! `SOAK_KINDS` names, with commas; prints what it measured. `VIRTD` names another virtd to be tried, a release build.

use crate::common::client::{Client, options};
use crate::common::deaf::{Deaf, call};
use crate::common::users::{ADMIN, ALICE, BOB, OPERATOR, User};
use crate::common::{Daemon, PATIENCE, Setup};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use zbus::Message;
use zbus::message::Flags;

/// How long it goes on, in seconds, unless the environment says otherwise.
const SECONDS: u64 = 5;
/// How much memory virtd may take, in KiB.
const MEMORY: u64 = 128 << 10;

/// What hostile clients of one kind are.
struct Kind {
    name: &'static str,
    user: User,
    clients: usize,
    /// Between two rounds of what they do.
    pause: Duration,
    /// What one of them does, again and again; `false` if nobody takes it.
    deed: fn(&mut Deaf) -> bool,
}

const fn kind(name: &'static str, user: User, clients: usize, pause: u64, deed: fn(&mut Deaf) -> bool) -> Kind {
    Kind { name, user, clients, pause: Duration::from_millis(pause), deed }
}

const HOSTILE: &[Kind] = &[
    kind("listings", ALICE, 20, 0, list),
    kind("documents", ALICE, 4, 50, documents),
    kind("costly", BOB, 2, 50, costly),
    kind("large", BOB, 2, 50, large),
    kind("too-large", BOB, 1, 500, too_large),
    kind("texts", OPERATOR, 3, 20, texts),
    kind("descriptors", BOB, 4, 1, descriptors),
    kind("silent", OPERATOR, 2, 1, silence),
    kind("listeners", OPERATOR, 8, 1000, listen),
];

fn seconds() -> u64 {
    std::env::var("SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SECONDS)
}

/// Sends what is made once.
fn send(client: &mut Deaf, message: &'static OnceLock<Message>, make: fn() -> Message) -> bool {
    client.send(message.get_or_init(make))
}

fn looked_up(name: &str) -> Message {
    call("/org/virt", "org.virt.Manager", "GetDomainByName").build(&name).unwrap()
}

fn document(part: &str) -> Message {
    let none = std::collections::HashMap::<&str, zbus::Variant<'_>>::new();
    let xml =
        format!("<domain type='test'><name>x</name><memory>65536</memory><os><type>hvm</type></os>{part}</domain>");
    call("/org/virt", "org.virt.Manager", "ValidateDomain").build(&(xml, none)).unwrap()
}

/// Reads no listings.
fn list(client: &mut Deaf) -> bool {
    static CALL: OnceLock<Message> = OnceLock::new();
    let make = || call("/org/virt", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects").build(&()).unwrap();
    send(client, &CALL, make)
}

/// Sends calls of nearly as much as a bus carries.
fn large(client: &mut Deaf) -> bool {
    static CALL: OnceLock<Message> = OnceLock::new();
    send(client, &CALL, || looked_up(&"x".repeat(31 << 20)))
}

/// Sends calls of what no bus carries, which ends the connection.
fn too_large(client: &mut Deaf) -> bool {
    static CALL: OnceLock<Message> = OnceLock::new();
    send(client, &CALL, || looked_up(&"x".repeat(100 << 20)))
}

/// Sends texts of nearly as much as is read.
fn texts(client: &mut Deaf) -> bool {
    static CALL: OnceLock<Message> = OnceLock::new();
    send(client, &CALL, || looked_up(&"x".repeat(11 << 20)))
}

/// Sends calls with descriptors.
fn descriptors(client: &mut Deaf) -> bool {
    client.send_descriptors(16)
}

/// Has documents of half a MiB read.
fn documents(client: &mut Deaf) -> bool {
    static CALL: OnceLock<Message> = OnceLock::new();
    let make = || document(&format!("<metadata>{}</metadata>", "<a:b xmlns:a='urn:a'/>".repeat(20_000)));
    send(client, &CALL, make)
}

/// Has documents read that are as large as they may be, and full of what costs most.
fn costly(client: &mut Deaf) -> bool {
    static CALL: OnceLock<Message> = OnceLock::new();
    let make = || {
        let attributes: String = (0..30).map(|number| format!("a{number}='' ")).collect();
        let element = format!("<b {attributes}/>");
        document(&element.repeat((8 << 20) / element.len() - 1))
    };
    send(client, &CALL, make)
}

/// Calls without wanting answers.
fn silence(client: &mut Deaf) -> bool {
    static CALL: OnceLock<Message> = OnceLock::new();
    let silent = || call("/org/virt", "org.virt.Manager", "GetDomainByName").with_flags(Flags::NO_REPLY_EXPECTED);
    client.send(CALL.get_or_init(|| silent().build(&"nobody").unwrap()))
}

/// Listens to all that is told, and calls nothing.
fn listen(client: &mut Deaf) -> bool {
    client.listen();
    true
}

/// Clients of a kind, until `end`; says how often they did what they do.
fn hostile(daemon: &Arc<Daemon>, kind: &'static Kind, end: Instant) -> std::thread::JoinHandle<usize> {
    let daemon = daemon.clone();
    std::thread::spawn(move || {
        let mut all: Vec<_> = (0..kind.clients).map(|_| Deaf::connect(&daemon, &kind.user)).collect();
        let mut done = 0;
        while Instant::now() < end {
            for client in &mut all {
                if (kind.deed)(client) {
                    done += 1;
                } else if let Some(new) = Deaf::try_connect(&daemon, &kind.user) {
                    *client = new;
                }
            }
            std::thread::sleep(kind.pause);
        }
        done
    })
}

/// How long the calls of one kind took, and when each was answered.
#[derive(Default)]
struct Times(BTreeMap<&'static str, Vec<(Duration, Instant)>>);

impl Times {
    fn add(&mut self, what: &'static str, begun: Instant) {
        self.0.entry(what).or_default().push((begun.elapsed(), Instant::now()));
    }

    fn answered(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (what, times) in &self.0 {
            let mut sorted = times.clone();
            sorted.sort_unstable();
            let (half, (most, when)) = (sorted[sorted.len() / 2].0, sorted[sorted.len() - 1]);
            let ago = when.elapsed().as_secs();
            let count = times.len();
            writeln!(
                f,
                "{what:>24}: {count:>6} answers, half within {half:>9.1?}, the slowest after {most:>9.1?} ({ago} s ago)"
            )?;
        }
        Ok(())
    }
}

/// What one who has done nothing calls, and how long each took. `each` is done after each answer.
async fn bystander(client: &Client, end: Instant, mut each: impl FnMut()) -> Times {
    let mut times = Times::default();
    let document = "<domain type='test'><name>y</name><uuid>9f6c0e5a-7f0a-4d0c-8b1e-1f1f5a3c2b10</uuid>\
                    <memory>65536</memory><os><type>hvm</type></os></domain>";
    let manager = |member: &str| format!("org.virt.Manager.{member}");
    while Instant::now() < end {
        for member in ["Ping", "Get", "Introspect", "GetDomainByName", "ListDomains", "ValidateDomain", "DefineDomain"]
        {
            let begun = Instant::now();
            let called = async {
                match member {
                    "Ping" => client.call("/org/virt", "org.freedesktop.DBus.Peer.Ping", &()).await,
                    "Get" => {
                        let property = ("org.virt.Manager", "Version");
                        client.call("/org/virt", "org.freedesktop.DBus.Properties.Get", &property).await
                    }
                    "Introspect" => {
                        client.call("/org/virt", "org.freedesktop.DBus.Introspectable.Introspect", &()).await
                    }
                    "GetDomainByName" => client.call("/org/virt", &manager(member), &"m0").await,
                    "ListDomains" => client.call("/org/virt", &manager(member), &options([])).await,
                    _ => client.call("/org/virt", &manager(member), &(document, options([]))).await,
                }
            };
            let result = tokio::time::timeout(PATIENCE, called).await;
            match result.unwrap_or_else(|_| panic!("{member} was not answered within {PATIENCE:?}")) {
                Ok(_) => times.add(member, begun),
                // A bus that has no room for a call says so itself, and when we are on it by another connection.
                Err((name, text)) => {
                    let excused = ["LimitsExceeded", "NoReply", "ServiceUnknown"];
                    assert!(excused.iter().any(|word| name.ends_with(word)), "{member}: {name}: {text}");
                    times.add("refused by the bus", begun);
                }
            }
            each();
        }
    }
    times
}

/// The same of the bus itself, and of another service on it that has nothing to do: so long does the bus take. It takes
/// little of a large message at a time, so one that others ask for stands in the way: what polkit enumerates has some
/// dozens of KiB.
async fn beside(connection: zbus::Connection, end: Instant) -> Times {
    let mut times = Times::default();
    let bus = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "GetId");
    let polkit = ("org.freedesktop.PolicyKit1", "/org/freedesktop/PolicyKit1/Authority");
    let idle = (polkit.0, polkit.1, "org.freedesktop.DBus.Peer", "Ping");
    while Instant::now() < end {
        for (what, (name, path, interface, member)) in [("bus: GetId", bus), ("polkit: Ping", idle)] {
            let begun = Instant::now();
            connection.call_method(Some(name), path, Some(interface), member, &()).await.expect(what);
            times.add(what, begun);
        }
        let (begun, interface) = (Instant::now(), Some("org.freedesktop.PolicyKit1.Authority"));
        let call = connection.call_method(Some(polkit.0), polkit.1, interface, "EnumerateActions", &"C");
        call.await.expect("actions");
        times.add("polkit: EnumerateActions", begun);
    }
    times
}

/// A machine that changes all the time, so that there is something to tell; how often it did.
async fn changes(client: Client, end: Instant) -> usize {
    let domain = client.named("m1").await.expect("there");
    let mut changes = 0;
    while Instant::now() < end {
        let body = (format!("{changes:03900}"), options([]));
        if domain.client.ask(&domain.path, "org.virt.Domain.SetDescription", &body).await {
            changes += 1;
        }
    }
    changes
}

/// A virtd that has something to list.
async fn with_machines() -> Option<(Arc<Daemon>, Client)> {
    let daemon = Daemon::on_system_bus(Setup::with_example_rules()).await?;
    let root = Client { connection: daemon.connect().await };
    for number in 0..100 {
        let xml = format!(
            "<domain type='test'><name>m{number}</name><description>{}</description><memory>65536</memory>\
             <os><type>hvm</type></os></domain>",
            "x".repeat(4000)
        );
        root.define(&xml).await.expect("defined");
    }
    Some((Arc::new(daemon), root))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_clients_of_three_users() {
    let Some((daemon, root)) = with_machines().await else { return };
    let (memory, descriptors_before) = (daemon.memory_kib(), daemon.descriptors());
    let end = Instant::now() + Duration::from_secs(seconds());
    let kinds = std::env::var("SOAK_KINDS").ok();
    let crowd: Vec<_> = HOSTILE
        .iter()
        .filter(|kind| kinds.as_ref().is_none_or(|kinds| kinds.split(',').any(|name| name == kind.name)))
        .map(|kind| (kind.name, hostile(&daemon, kind, end)))
        .collect();
    let changing = tokio::spawn(changes(root, end));
    let idle = tokio::spawn(beside(daemon.connect_as(&ADMIN).await, end));
    let client = Client { connection: daemon.connect_as(&ADMIN).await };
    let mut most = descriptors_before;
    let times = bystander(&client, end, || most = most.max(daemon.descriptors())).await;
    let (idle, changes) = (idle.await.unwrap(), changing.await.unwrap());
    for (name, clients) in crowd {
        println!("{name}: {}", clients.join().unwrap());
    }
    let peak = daemon.peak_memory_kib();
    println!("virtd: {memory} KiB before, {peak} at most; {descriptors_before} descriptors before, {most} at most");
    println!("another user, while {changes} changes were told:\n{times}{idle}");
    assert!(peak < MEMORY, "virtd took {peak} KiB, of which it had {memory} before");
    assert!(most < descriptors_before + 64, "virtd has {most} descriptors");
    assert!(times.answered() > 0);
}
