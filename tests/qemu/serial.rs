//! Consoles of real guests: what they say is kept, one client at a time hears it and types.

use crate::common::client::{Client, Domain, Refusal};
use crate::common::console::Console;
use crate::common::guest::Tick;
use crate::common::users::{ADMIN, BOB, OPERATOR};
use crate::common::{Daemon, PATIENCE, Setup};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Bytes of a line of the guest's when it counts.
const LINE: usize = 9;

fn refused(answer: Result<Console, Refusal>, error: &str, word: &str) {
    let Err((name, text)) = answer else { panic!("it is not refused for {word}") };
    assert!(name.ends_with(error) && text.contains(word), "{name}: {text}");
}

/// What the guest counts is heard from the next line on, without a gap: the last number of so many.
#[track_caller]
fn counts(console: &mut Console, lines: usize) -> u32 {
    let mut begun = String::new();
    while !begun.ends_with('\n') {
        begun += &console.hears(1);
    }
    counts_on(console, lines, None)
}

/// The same after `last`, where that is known.
#[track_caller]
fn counts_on(console: &mut Console, lines: usize, mut last: Option<u32>) -> u32 {
    let heard = console.hears(lines * LINE);
    for line in heard.lines() {
        let number = u32::from_str_radix(line, 16).unwrap_or_else(|_| panic!("'{line}' after {last:x?}"));
        assert!(last.is_none_or(|last| number == last + 1), "{number:x} after {last:x?}");
        last = Some(number);
    }
    last.expect("a line")
}

/// Ends the counting: what the guest says then is what it is told.
#[track_caller]
fn stops_counting(console: &mut Console) {
    console.types("-=");
    while console.hears(1) != "=" {}
}

/// Where QEMU keeps what the guest says, as those see it that live where virtd does.
async fn transcript(daemon: &Daemon, domain: &Domain) -> PathBuf {
    let uuid: String = domain.property("UUID").await;
    daemon.root().join("run/virt/guests").join(uuid).join("qemu/serial0.said")
}

/// The same as it is seen from here.
fn seen_from_here(daemon: &Daemon, path: &Path) -> PathBuf {
    let root = PathBuf::from(format!("/proc/{}/root", daemon.virtd_pid()));
    root.join(path.strip_prefix("/").expect("absolute"))
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn kept(path: &Path) -> u64 {
    std::fs::metadata(path).expect("it is there").blocks() * 512
}

async fn machine(daemon: &Daemon) -> Option<Domain> {
    let devices = "<serial type='pty'><log file='LOG'/><target port='1'/></serial>\
                   <serial type='file'><source path='LOG2'/><target port='2'/></serial>\
                   <console type='pty'><target type='virtio'/></console>";
    let log = daemon.folder().join("own.log").display().to_string();
    let devices = devices.replace("LOG2", &format!("{log}.2")).replace("LOG", &log);
    let mut guest = Tick::keys(daemon, "says", &devices)?;
    let file = format!("<serial type='file'><source path='{}'/>", guest.serial.display());
    guest.xml = guest.xml.replace(&file, "<serial type='pty'>");
    let client = Client { connection: daemon.connect_as(&ADMIN).await };
    let domain = client.define(&guest.xml).await.expect("defined");
    refused(Console::open(&domain, "", &["log"]).await, "OperationInvalid", "start it first");
    domain.run("Start").await.expect("started");
    Some(domain)
}

/// Who may not is refused, and each console says what cannot be done with it.
async fn consoles_are_told_apart(daemon: &Daemon, domain: &Domain) {
    let unsupported = "OperationUnsupported";
    refused(Console::open(domain, "serial1", &["log"]).await, unsupported, "<log file>");
    Console::open(domain, "serial1", &[]).await.expect("opened").is_silent();
    refused(Console::open(domain, "serial2", &[]).await, unsupported, "type='file'");
    Console::open(domain, "console0", &["log"]).await.expect("opened").is_silent();
    refused(Console::open(domain, "console9", &[]).await, "NoSuchDevice", "'console9'");
    let seen_by =
        async |user| Domain { client: Client { connection: daemon.connect_as(user).await }, ..domain.clone() };
    let theirs = Console::open(&seen_by(&BOB).await, "", &["log"]).await;
    refused(theirs, "InteractiveAuthorizationRequired", "org.virt.domain.console");
    Console::open(&seen_by(&OPERATOR).await, "", &["log"]).await.expect("opened");
}

/// Late or early, slow or quick: each client hears every byte once.
async fn clients_hear_it_count(domain: &Domain, said: &Path) {
    let mut first = Console::open(domain, "", &[]).await.expect("opened");
    first.types("+");
    counts(&mut first, 8000);
    let mut second = Console::open(domain, "serial0", &["log", "force"]).await.expect("opened");
    counts(&mut second, 12_000);
    drop(second);
    // One that reads nothing, while the guest says more than is kept.
    let deaf = Console::open(domain, "", &["log"]).await.expect("it is free");
    let before = std::fs::metadata(said).expect("it is there").len();
    until("it goes on", || std::fs::metadata(said).expect("it is there").len() > before + (512 << 10)).await;
    refused(Console::open(domain, "", &[]).await, "Busy", "console 'serial0' of domain 'says'");
    let mut third = Console::open(domain, "", &["force", "log"]).await.expect("opened");
    let last = counts(&mut third, 2000);
    assert!(u64::from(last) * LINE as u64 > before + (256 << 10), "it stood still");
    let heard = deaf.hears_to_the_end();
    assert!(heard.len() > LINE * 1000, "it finds what was on its way");
    // Nothing is kept for who has left.
    drop(third);
    until("it is made shorter", || kept(said) < 400 << 10).await;
}

#[tokio::test]
async fn a_guest_is_heard_from_its_boot_on_and_typed_at_whatever_becomes_of_virtd_and_of_clients() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::with_example_rules()).await else { return };
    let Some(domain) = machine(&daemon).await else { return };
    let mut console = Console::open(&domain, "serial0", &["log"]).await.expect("opened");
    assert_eq!(console.hears(6), "ready\n");
    console.types("hello");
    assert_eq!(console.hears(5), "hello");
    drop(console);
    for round in 0..20 {
        let mut console = Console::open(&domain, "", &[]).await.expect("it is free");
        if round % 4 == 0 {
            console.types("!");
        }
    }
    consoles_are_told_apart(&daemon, &domain).await;

    // Another virtd finds what was said, and nobody connected.
    let console = Console::open(&domain, "", &["log"]).await.expect("opened");
    daemon.kill_virtd().await;
    assert!(console.hears_to_the_end().starts_with("ready\nhello"));
    daemon.start_virtd().await;
    let mut console = Console::open(&domain, "", &["log"]).await.expect("opened");
    assert_eq!(console.hears(16), "ready\nhello!!!!!");
    drop(console);

    let said = transcript(&daemon, &domain).await;
    clients_hear_it_count(&domain, &seen_from_here(&daemon, &said)).await;
    let mut console = Console::open(&domain, "", &["log"]).await.expect("opened");
    let last = counts(&mut console, 1000);
    daemon.kill_virtd().await;
    console.hears_to_the_end();
    daemon.start_virtd().await;
    let mut console = Console::open(&domain, "", &["log"]).await.expect("opened");
    assert!(counts(&mut console, 10_000) > last, "it goes on");
    stops_counting(&mut console);
    console.types("end");
    assert_eq!(console.hears(3), "end");
    domain.run("Destroy").await.expect("destroyed");
    assert_eq!(console.hears_to_the_end(), "");

    // One whose transcript is gone, as of a guest that an earlier virtd started: what is said now is heard all the same.
    domain.run("Start").await.expect("started");
    let mut console = Console::open(&domain, "", &["log"]).await.expect("opened");
    assert_eq!(console.hears(6), "ready\n", "nothing of the boot before");
    daemon.kill_virtd().await;
    assert!(daemon.inside("rm").arg(&said).status().expect("run").success(), "removed");
    daemon.start_virtd().await;
    refused(Console::open(&domain, "", &["log"]).await, "OperationUnsupported", "an earlier virtd");
    let mut console = Console::open(&domain, "", &[]).await.expect("opened");
    console.types("+");
    counts_on(&mut console, 2000, Some(0));
    stops_counting(&mut console);
    domain.run("Destroy").await.expect("destroyed");
    assert_eq!(console.hears_to_the_end(), "");
}
