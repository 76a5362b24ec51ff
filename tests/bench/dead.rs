//! Answers beside a file system that never answers, while as many calls wait for it as one user may have at work; and how
//! soon a virtd that is killed then is there again. Who measures is a process of its own, as another user's client is: the
//! one whose calls wait has hundreds of them to look after. It calls another service on the same bus as well: what those calls
//! take longer is none of virtd's doing.

use crate::bus::Result;
use crate::common::client::{Client, Domain};
use crate::common::dead::{Dead, Doomed, MEMBERS};
use crate::common::users::BOB;
use crate::common::{Daemon, Setup};
use crate::{line, percentile, row};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Machines whose files do not answer, each named by every member: more calls than one user may have at work.
const MACHINES: usize = 40;
/// Connections of that user, of which none may have all those calls at work.
const CONNECTIONS: usize = 10;
/// How often what takes moments is measured, and what starts a guest.
const ROUNDS: (usize, usize) = (200, 10);

/// One user may do all.
const RULES: &str =
    "polkit.addRule(function(action, subject) { if (subject.user == 'virt-bob') return polkit.Result.YES; });\n";

/// What others measure: the name of what they do, and how long it took.
type Measured = Vec<(&'static str, Vec<Duration>)>;

/// Before and with the calls that wait, side by side; then virtd is killed, and started with the dead still there.
pub async fn beside_dead_storage() -> Result<()> {
    let Some(mut daemon) = Daemon::system_bus(Setup { rules: RULES.to_owned(), ..Setup::default() }) else {
        return Ok(());
    };
    daemon.start_virtd_with(&["--log-level", "error"]).await;
    let root = Client { connection: daemon.connect().await };
    let others = [root.define(&crate::guests::xml("well")).await, root.define(TOY).await];
    let others = others.map(|one| one.expect("defined"));
    let storage = daemon.folder().join("storage");
    std::fs::create_dir(&storage)?;
    let mut callers = Vec::new();
    for _ in 0..CONNECTIONS {
        callers.push(Client { connection: daemon.connect_as(&BOB).await });
    }
    let mut machines = Vec::new();
    for number in 0..MACHINES {
        let Some(one) = Doomed::define(&callers[0], &storage, &format!("dead-{number}")).await else { return Ok(()) };
        machines.push(one);
    }
    daemon.kill_virtd().await;
    let alone = starts_within(&mut daemon).await;

    let before = measure(&daemon, &others).await?;
    let Some(mut dead) = Dead::mount_over(&daemon, storage) else { return Ok(()) };
    let mut waiting = call_everything(&callers, &machines).await;
    let spent = until_all_wait(&daemon).await;
    let beside = measure(&daemon, &others).await?;
    while waiting.try_join_next().is_some() {}
    line("Calls on a file system that never answers, unanswered then", waiting.len());
    line("Processor time of virtd until all of them waited", format!("{} ms", spent.as_millis()));
    for ((what, mut with), (_, mut without)) in beside.into_iter().zip(before) {
        for percent in [50, 99] {
            let figures = (percentile(&mut with, percent), percentile(&mut without, percent));
            row(&format!("{what}, with them and before (p{percent})"), figures.0, figures.1, 1.2);
        }
    }
    daemon.kill_virtd().await;
    waiting.shutdown().await;
    row("kill -9 and start to the name, with a dead file system", starts_within(&mut daemon).await, alone, 1.2);
    dead.let_go();
    Ok(())
}

/// Returns when virtd has nothing to do but wait, with the processor time that it took until then.
async fn until_all_wait(daemon: &Daemon) -> Duration {
    let (mut before, begun) = (daemon.processor_time(), daemon.processor_time());
    loop {
        // That a process has nothing to do is told by nobody.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = daemon.processor_time();
        if now - before <= Duration::from_millis(10) {
            return now - begun;
        }
        before = now;
    }
}

const TOY: &str = "<domain type='test'><name>toy</name><memory>65536</memory><os><type>hvm</type></os></domain>";

/// From virtd's start to its name.
async fn starts_within(daemon: &mut Daemon) -> Duration {
    let begun = Instant::now();
    daemon.start_virtd_with(&["--log-level", "error"]).await;
    begun.elapsed()
}

/// Names the dead by every member of every machine; returns when all calls have been sent.
async fn call_everything(callers: &[Client], machines: &[Doomed]) -> JoinSet<()> {
    let mut waiting = JoinSet::new();
    // Each member first of one machine, so that not all of them wait for one's turn.
    for (round, _) in MEMBERS.iter().enumerate() {
        for (number, machine) in machines.iter().enumerate() {
            let machine = machine.seen_by(&callers[number % callers.len()]);
            let member = MEMBERS[(round + number) % MEMBERS.len()];
            waiting.spawn(async move {
                // Whether it is refused at last, or for the quota, is not what is measured.
                let _ = machine.call(member).await;
            });
        }
    }
    tokio::task::yield_now().await;
    for client in callers {
        let _ = client.call("/org/virt", "org.freedesktop.DBus.Peer.Ping", &()).await;
    }
    waiting
}

/// What is measured, in the order in which [`measure_here`] tells it.
const MEASURED: [&str; 7] = [
    "Ping of polkitd",
    "Ping",
    "GetXML",
    "Get",
    "Suspend + Resume (QEMU)",
    "Suspend + Resume (test driver)",
    "Start + Destroy (QEMU)",
];

/// The argument that makes this program the client that measures; the bus and two machines follow it.
pub const CLIENT: &str = "client-of";

/// Has it measured by a client that does nothing else.
async fn measure(daemon: &Daemon, [guest, toy]: &[Domain; 2]) -> Result<Measured> {
    let mut client = tokio::process::Command::new(std::env::current_exe()?);
    client.args([CLIENT, &daemon.address(), &guest.path, &toy.path]).kill_on_drop(true);
    let told = client.stderr(std::process::Stdio::inherit()).output().await?;
    let mut measured: Measured = MEASURED.map(|what| (what, Vec::new())).into();
    for line in String::from_utf8(told.stdout)?.lines() {
        let (at, nanoseconds) = line.split_once(' ').ok_or("the client says something else")?;
        measured[at.parse::<usize>()?].1.push(Duration::from_nanos(nanoseconds.parse()?));
    }
    match told.status.success() && measured.iter().all(|(_, times)| !times.is_empty()) {
        true => Ok(measured),
        false => Err(format!("the client that measures has failed: {}", told.status).into()),
    }
}

/// Measures as that client, and says for each call which it was and the nanoseconds that it took.
pub async fn measure_here(arguments: &[String]) -> Result<()> {
    let [address, machines @ ..] = arguments else { return Err("a bus and two machines".into()) };
    let root = Client { connection: zbus::connection::Builder::address(address.as_str()).build().await? };
    let machines: [String; 2] = machines.to_vec().try_into().map_err(|_| "two machines")?;
    let machines = machines.map(|path| Domain { client: root.clone(), path });
    for (at, times) in times_of(&root, &machines).await.into_iter().enumerate() {
        times.iter().for_each(|time| println!("{at} {}", time.as_nanos()));
    }
    Ok(())
}

async fn times_of(root: &Client, [guest, toy]: &[Domain; 2]) -> [Vec<Duration>; MEASURED.len()] {
    let mut measured = MEASURED.map(|_| Vec::new());
    for machine in [guest, toy] {
        machine.run("Start").await.expect("started");
    }
    for _ in 0..ROUNDS.0 {
        let mut begun = Instant::now();
        let mut took = |at: usize| {
            measured[at].push(begun.elapsed());
            begun = Instant::now();
        };
        let polkit = (Some("org.freedesktop.PolicyKit1"), "/org/freedesktop/PolicyKit1/Authority");
        let peer = Some("org.freedesktop.DBus.Peer");
        root.connection.call_method(polkit.0, polkit.1, peer, "Ping", &()).await.expect("a pong");
        took(0);
        root.call("/org/virt", "org.freedesktop.DBus.Peer.Ping", &()).await.expect("a pong");
        took(1);
        guest.xml().await;
        took(2);
        guest.state().await;
        took(3);
        for (at, machine) in [(4, guest), (5, toy)] {
            for method in ["Suspend", "Resume"] {
                machine.bare(method).await.expect(method);
            }
            took(at);
        }
    }
    guest.run("Destroy").await.expect("destroyed");
    toy.run("Destroy").await.expect("destroyed");
    for _ in 0..ROUNDS.1 {
        let begun = Instant::now();
        guest.run("Start").await.expect("started");
        guest.run("Destroy").await.expect("destroyed");
        measured[6].push(begun.elapsed());
    }
    measured
}
