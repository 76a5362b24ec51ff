//! Storage that never answers, and tools that never end: they cost the machine that has them, and nobody else (W1, W3).

use crate::common::client::{Client, Domain, options};
use crate::common::dead::Dead;
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use crate::common::{Daemon, PATIENCE, Setup};
use std::future::Future;
use std::time::Duration;
use tokio::time::timeout;

/// Calls at once, many more than this host has CPUs.
const MANY: usize = 12;

/// What is quick has an answer by then, however busy the host is.
async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), work).await.unwrap_or_else(|_| panic!("{what} waits for another's storage"))
}

/// A machine whose files are all in that folder.
fn machine(name: &str, dead: &Dead) -> String {
    let file = |what: &str| dead.file(&format!("{name}-{what}"));
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory><os><type arch='x86_64' machine='q35'>hvm\
         </type><loader readonly='yes' type='pflash'>{}</loader><nvram>{}</nvram></os><features><acpi/></features><devices>\
         <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
         <target dev='vda' bus='virtio'/></disk></devices></domain>",
        file("code.fd"),
        file("vars.fd"),
        file("disk.qcow2")
    )
}

async fn ping(client: &Client) {
    soon("Ping", client.call("/org/virt", "org.freedesktop.DBus.Peer.Ping", &())).await.expect("a pong");
}

/// Every member that looks at files, of a machine whose files cannot be looked at, as many at once as there are names.
fn calls_to_the_dead(dead: &Dead, domains: &[Domain]) -> Vec<tokio::task::JoinHandle<()>> {
    let mut calls = Vec::new();
    for domain in domains {
        let snapshot = format!(
            "<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{}'/></disk></disks>\
             </domainsnapshot>",
            dead.file("overlay")
        );
        let bodies = [("CheckCreateSnapshot", "disk-only"), ("CreateSnapshot", "disk-only")];
        for (method, option) in bodies {
            let (domain, snapshot) = (domain.clone(), snapshot.clone());
            calls.push(tokio::spawn(async move {
                let _ = domain.call(method, &(snapshot.as_str(), with([(option, true)]))).await;
            }));
        }
        let one = domain.clone();
        calls.push(tokio::spawn(async move {
            let _ = one.run("Start").await;
        }));
        let one = domain.clone();
        calls.push(tokio::spawn(async move {
            let _ = one.call("Undefine", &(with([("nvram", true)]),)).await;
        }));
    }
    calls
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_that_never_answers_costs_its_machines_alone() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let Some(mut dead) = Dead::mount(&daemon) else { return };
    let Some(tick) = Tick::new(&daemon, "alive", "") else { return };
    let root = Client { connection: daemon.connect().await };
    let alive = root.define(&tick.xml).await.expect("defined");
    // They may be looked at when they are defined, and are defined all the same.
    let define = |n: usize| {
        let (root, xml) = (root.clone(), machine(&format!("dead-{n}"), &dead));
        tokio::spawn(async move { root.define(&xml).await.expect("defined") })
    };
    let defining: Vec<_> = (0..MANY).map(define).collect();
    let mut domains = Vec::new();
    for one in defining {
        domains.push(timeout(PATIENCE * 5, one).await.expect("an answer").unwrap());
    }
    let calls = calls_to_the_dead(&dead, &domains);
    let emulator = format!(
        "<domain type='qemu'><name>e</name><memory>65536</memory><os><type>hvm</type></os><devices><emulator>{}</emulator>\
         </devices></domain>",
        dead.file("qemu")
    );
    let named = root.clone();
    let validated = tokio::spawn(async move {
        named.call("/org/virt", "org.virt.Manager.ValidateDomain", &(emulator.as_str(), options([]))).await
    });
    for _ in 0..3 {
        ping(&root).await;
        soon("a read", alive.xml()).await;
        soon("a read of a machine on dead storage", domains[0].xml()).await;
        soon("Start", alive.run("Start")).await.expect("started");
        tick.counts_to(1).await;
        let check = ("<domainsnapshot/>", with([("disk-only", true)]));
        soon("CheckCreateSnapshot", alive.call("CheckCreateSnapshot", &check)).await.expect("checked");
        soon("Destroy", alive.run("Destroy")).await.expect("destroyed");
    }
    // Whoever named the dead is told so in the end, and not let wait for ever.
    for call in calls {
        timeout(PATIENCE * 5, call).await.expect("a call to the dead has an answer").unwrap();
    }
    let told = timeout(PATIENCE * 5, validated).await.expect("an answer").unwrap();
    told.expect("findings");
    dead.let_go();
    ping(&root).await;
}

/// W3: a pipe as a disk keeps qemu-img waiting for its other end.
#[tokio::test(flavor = "multi_thread")]
async fn a_tool_that_never_ends_has_a_limit() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let Some(tick) = Tick::new(&daemon, "stuck", "") else { return };
    let root = Client { connection: daemon.connect().await };
    let domain = root.define(&tick.xml).await.expect("defined");
    let player = Player { domain: domain.clone() };
    std::fs::remove_file(&tick.disk).unwrap();
    let pipe = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &tick.disk, pipe, rustix::fs::Mode::from_raw_mode(0o666), 0).unwrap();
    let refused = timeout(PATIENCE * 3, player.create("<domainsnapshot/>", options([])));
    let refused = refused.await.expect("an answer").expect_err("nothing answers");
    assert!(refused.1.contains(&tick.disk.display().to_string()), "{refused:?}");
    // What it kept waiting is free again.
    std::fs::remove_file(&tick.disk).unwrap();
    std::fs::copy(crate::common::guest::tick_image().unwrap(), &tick.disk).unwrap();
    player.take("fine").await;
}
