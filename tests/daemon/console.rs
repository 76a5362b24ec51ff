//! Consoles of the test driver's machines: each says `booted`, and then what it is told.

use crate::common::client::{Client, Domain, Refusal};
use crate::common::console::Console;
use crate::common::{Daemon, PATIENCE};
use std::time::Instant;

const MACHINE: &str = "<domain type='test'><name>web</name><memory>65536</memory><os><type>hvm</type></os><devices>\
     <serial type='pty'><alias name='ua-first'/></serial>\
     <serial type='file'><source path='/web.log'/><alias name='ua-filed'/></serial>\
     <console type='pty'><target type='serial'/></console>\
     <console type='pty'><target type='virtio'/><alias name='ua-second'/></console></devices></domain>";

async fn started(daemon: &Daemon) -> Domain {
    let domain = Client { connection: daemon.connect().await }.define(MACHINE).await.expect("defined");
    refused(Console::open(&domain, "", &[]).await, "OperationInvalid", "start it first");
    domain.run("Start").await.expect("started");
    domain
}

fn refused(answer: Result<Console, Refusal>, error: &str, word: &str) {
    let Err((name, text)) = answer else { panic!("it is not refused for {word}") };
    assert!(name.ends_with(error) && text.contains(word), "{name}: {text}");
}

#[tokio::test]
async fn a_client_is_told_what_was_said_before_and_then_what_is_said_and_nobody_else_is() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = started(&daemon).await;
    let mut first = Console::open(&domain, "", &["log"]).await.expect("opened");
    assert_eq!(first.hears(8), "booted\r\n");
    first.types("one");
    assert_eq!(first.hears(3), "one");
    let busy = "console 'ua-first' of domain 'web' is busy with 'another client'";
    refused(Console::open(&domain, "ua-first", &["log"]).await, "Busy", busy);

    // Another console is another matter.
    let mut other = Console::open(&domain, "ua-second", &[]).await.expect("opened");
    other.is_silent();
    other.types("x");
    assert_eq!(other.hears(1), "x");

    let mut second = Console::open(&domain, "ua-first", &["force"]).await.expect("opened");
    assert_eq!(first.hears_to_the_end(), "");
    second.is_silent();
    second.types("two");
    second.is_done_typing();
    assert_eq!(second.hears(3), "two");
    refused(Console::open(&domain, "", &[]).await, "Busy", busy);
    let mut third = Console::open(&domain, "", &["log", "force"]).await.expect("opened");
    assert_eq!(third.hears(14), "booted\r\nonetwo");
    third.types("three");
    domain.run("Destroy").await.expect("destroyed");
    assert!(["", "three"].contains(&&*third.hears_to_the_end()), "it may have ended before it was told");
    assert_eq!(other.hears_to_the_end(), "");
}

#[tokio::test]
async fn what_is_no_console_or_option_is_refused() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = started(&daemon).await;
    refused(Console::open(&domain, "ua-none", &[]).await, "NoSuchDevice", "no serial port or console 'ua-none'");
    refused(Console::open(&domain, "ua-filed", &[]).await, "OperationUnsupported", "type='file'");
    refused(Console::open(&domain, "", &["safe"]).await, "InvalidArgument", "safe");
    Console::open(&domain, "ua-first", &[]).await.expect("nobody is there");
    let bare = MACHINE.replace("<name>web", "<name>bare").replace("pty", "null");
    let bare = domain.client.define(&bare).await.expect("defined");
    bare.run("Start").await.expect("started");
    refused(Console::open(&bare, "", &[]).await, "OperationUnsupported", "type='null'");
}

#[tokio::test]
async fn a_console_is_free_as_soon_as_its_client_has_left() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = started(&daemon).await;
    for _ in 0..40 {
        let mut console = Console::open(&domain, "", &[]).await.expect("it is free");
        console.types("a");
        // One that leaves at once, one that has heard nothing, one that types no more.
        Console::open(&domain, "", &["force"]).await.expect("opened");
        let console = Console::open(&domain, "", &["log"]).await.expect("it is free");
        console.is_done_typing();
    }
    // Nothing of them is left.
    let (before, begun) = (daemon.descriptors(), Instant::now());
    for _ in 0..10 {
        Console::open(&domain, "", &[]).await.expect("it is free").types("b");
    }
    while daemon.descriptors() > before + 2 {
        assert!(begun.elapsed() < PATIENCE, "{before} descriptors have become {}", daemon.descriptors());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// One that only types, and one that only reads later.
#[tokio::test]
async fn a_client_that_does_not_read_stops_nobody_and_costs_little() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = started(&daemon).await;
    let mut deaf = Console::open(&domain, "", &[]).await.expect("opened");
    let before = daemon.memory_kib();
    let said: String = (0..600_000).map(|line| format!("{line:07}\n")).collect();
    deaf.types(&said);
    // What is on its way into the guest when it is put out is heard there, or not.
    let mut next = Console::open(&domain, "", &["force", "log"]).await.expect("opened");
    let shown = next.hears(60 << 10);
    assert!(said.contains(&shown), "something else is shown");
    assert!(daemon.memory_kib() < before + (4 << 10), "{} KiB have become {}", before, daemon.memory_kib());
    next.types("=end=");
    let mut heard = shown;
    while !heard.ends_with("=end=") {
        heard += &next.hears(1);
    }
    // And it finds what it can still have, in its order.
    let deaf = deaf.hears_to_the_end();
    assert!(!deaf.is_empty() && said.contains(&deaf[..deaf.len().min(4096)]), "{}", deaf.len());
}
