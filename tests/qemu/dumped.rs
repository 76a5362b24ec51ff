//! Real guests that are dumped in files and go on.

use crate::common::Daemon;
use crate::common::client::{Client, Domain, Refusal, options};
use crate::common::cut_off::{Steps, Victims};
use crate::common::guest::Tick;
use crate::saved::{another, refused, restore, saved_as, saved_xml, ticking};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use zbus::Variant;

/// More steps than a dump has.
const STEPS: u32 = 20;

async fn dump(domain: &Domain, file: &Path, how: &[&'static str]) -> Result<(), Refusal> {
    let how = options(how.iter().map(|key| (*key, Variant::from(true))));
    domain.call("CoreDump", &(file.to_str().expect("a text"), how)).await.map(drop)
}

/// Of its memory alone.
pub async fn dump_memory(domain: &Domain, file: &Path, format: &str, how: &[&'static str]) -> Result<(), Refusal> {
    let how = how.iter().map(|key| (*key, Variant::from(true))).chain([("format", Variant::from(format))]);
    domain.call("CoreDump", &(file.to_str().expect("a text"), options(how))).await.map(drop)
}

/// Holds it to be the memory of a guest of 16 MiB, all of it.
fn is_elf(file: &Path) {
    let dumped = std::fs::read(file).expect("it is there");
    assert!(dumped.starts_with(b"\x7fELF"), "{:?}", dumped.get(..16));
    // What is beside the memory: the firmware, the display.
    assert!((16 << 20..64 << 20).contains(&dumped.len()), "{} bytes", dumped.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_on_that_is_dumped_and_nothing_is_told_of_it() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "dumped", "") else { return };
    let client = Client { connection: daemon.connect().await };
    let xml = tick.xml.replace("<acpi/>", "<acpi/><vmcoreinfo state='on'/>");
    let domain = client.define(&xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    let file = daemon.folder().join("dumped.dump");
    std::fs::write(&file, "what was there before").expect("written");
    let mut watch = client.watch().await;
    // It has what a Windows would tell QEMU by, and is none.
    refused(dump_memory(&domain, &file, "win-dmp", &[]).await, "OperationUnsupported", &["win-dmp", "vmcoreinfo note"]);
    assert_eq!(std::fs::read(&file).expect("it is there"), b"what was there before");
    dump(&domain, &file, &[]).await.expect("dumped");
    assert_eq!(domain.state().await, ("running".into(), "booted".into()));
    tick.goes_on().await;
    assert!(saved_xml(&client, &file, false).await.expect("it is a saved machine").contains("<name>dumped</name>"));
    // Again, and again the guest's memory can be written.
    dump(&domain, &file, &[]).await.expect("dumped");
    assert_eq!(saved_as(&file), std::slice::from_ref(&file), "nothing else is left");
    tick.goes_on().await;
    domain.bare("Suspend").await.expect("suspended");
    assert_eq!(watch.lifecycle(&domain.path).await, "suspended paused", "nothing was told before");
    refused(restore(&client, &file, &[]).await, "OperationInvalid", &["active"]);
    domain.bare("Resume").await.expect("resumed");
    assert_eq!(watch.lifecycle(&domain.path).await, "resumed unpaused");

    // One that stands stands on, and is there again from its file, whose disks nobody has written.
    domain.bare("Suspend").await.expect("suspended");
    dump(&domain, &file, &[]).await.expect("dumped");
    assert_eq!(domain.state().await, ("paused".into(), "user".into()));
    let (before, boots) = tick.counted().expect("it counted");
    domain.run("Destroy").await.expect("destroyed");
    restore(&client, &file, &[("running", Variant::from(true))]).await.expect("restored");
    tick.counts_to(before + 2).await;
    assert_eq!(tick.counted().expect("it counts").1, boots, "it has not booted");
    // By now it has.
    let memory = daemon.folder().join("ended.elf");
    dump_memory(&domain, &memory, "elf", &["crash"]).await.expect("dumped");
    assert_eq!(domain.state().await, ("shutoff".into(), "crashed".into()));
    is_elf(&memory);
    refused(restore(&client, &file, &[]).await, "OperationInvalid", &["vda"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_dumped_is_reset_or_ends_as_is_wanted() {
    let Some((mut daemon, domain, tick)) = ticking("crashes").await else { return };
    let file = daemon.folder().join("crashes.dump");
    refused(dump(&domain, &file, &["crash", "reset"]).await, "InvalidArgument", &["'crash' and 'reset'"]);
    refused(dump(&domain, &file, &["live"]).await, "OperationUnsupported", &["live"]);
    refused(dump(&domain, &file, &["memory-only", "live"]).await, "OperationUnsupported", &["live"]);
    refused(dump_memory(&domain, &file, "zip", &[]).await, "InvalidArgument", &["'format'", "kdump-zlib"]);
    refused(dump_memory(&domain, &file, "win-dmp", &[]).await, "OperationUnsupported", &["vmcoreinfo"]);
    refused(dump_memory(&domain, &tick.disk, "elf", &[]).await, "InUse", &["cannot dump", "crashes"]);
    refused(dump_memory(&domain, daemon.folder(), "elf", &[]).await, "InvalidArgument", &["folder"]);
    refused(dump(&domain, &file, &["alive"]).await, "InvalidArgument", &["live"]);
    refused(dump(&domain, Path::new("relative"), &[]).await, "InvalidArgument", &["absolute"]);
    refused(dump(&domain, &tick.disk, &[]).await, "InUse", &["crashes"]);
    assert!(saved_as(&file).is_empty(), "nothing is left of what was refused");
    let domain = its_memory_is_dumped(&mut daemon, domain, &tick).await;
    let boots = tick.counted().expect("it counts").1;
    let mut watch = domain.client.watch().await;
    dump(&domain, &file, &["reset"]).await.expect("dumped");
    tick.boots_to(boots + 1).await;
    dump(&domain, &file, &["crash"]).await.expect("dumped");
    assert_eq!(watch.lifecycle(&domain.path).await, "stopped crashed", "and nothing before");
    assert_eq!(domain.state().await, ("shutoff".into(), "crashed".into()));
    saved_xml(&domain.client, &file, false).await.expect("it is kept");
    refused(dump(&domain, &file, &[]).await, "OperationInvalid", &["start it first"]);
}

/// In each format, and in the midst of which virtd is killed. The guest goes on, and nothing is told of it.
async fn its_memory_is_dumped(daemon: &mut Daemon, mut domain: Domain, tick: &Tick) -> Domain {
    let file = daemon.folder().join("memory");
    std::fs::write(&file, "what was there before").expect("written");
    let mut watch = domain.client.watch().await;
    dump(&domain, &file, &["memory-only"]).await.expect("dumped");
    is_elf(&file);
    assert_eq!(std::fs::metadata(&file).expect("it is there").permissions().mode() & 0o7777, 0o600);
    tick.goes_on().await;
    dump_memory(&domain, &file, "kdump-zlib", &[]).await.expect("dumped");
    assert!(std::fs::read(&file).expect("it is there").starts_with(b"makedumpfile\0"), "flattened");
    assert_eq!(domain.state().await, ("running".into(), "booted".into()));
    domain.bare("Suspend").await.expect("suspended");
    assert_eq!(watch.lifecycle(&domain.path).await, "suspended paused", "nothing was told before");
    // One that stands stands on.
    dump_memory(&domain, &file, "elf", &[]).await.expect("dumped");
    is_elf(&file);
    assert_eq!(domain.state().await, ("paused".into(), "user".into()));
    domain.bare("Resume").await.expect("resumed");
    assert_eq!(watch.lifecycle(&domain.path).await, "resumed unpaused");
    tick.goes_on().await;
    refused(saved_xml(&domain.client, &file, false).await, "InvalidArgument", &["memory"]);

    let mut steps = Steps::of("a dump of memory", Victims::Virtd, 6..STEPS);
    loop {
        let step = steps.next();
        let file = daemon.folder().join(format!("memory-{step}"));
        steps.kill(daemon, &tick.name);
        let arguments = (file.to_str().expect("a text"), options([("format", Variant::from("elf"))]));
        let done = domain.client.ask(&domain.path, "org.virt.Domain.CoreDump", &arguments).await;
        if !steps.struck(daemon, done).await {
            return domain;
        }
        // Nobody has to help it.
        tick.goes_on().await;
        daemon.start_virtd().await;
        domain.client = Client { connection: daemon.connect().await };
        domain.is_looked_after().await;
        let there = saved_as(&file);
        assert!(there.is_empty() || there == [file.clone()], "{there:?} at {step}");
        steps.is_done(!there.is_empty());
        if !there.is_empty() {
            is_elf(&file);
        }
        steps.is_as_it_was(&domain, tick).await;
    }
}

/// A dump in the midst of which virtd or QEMU is killed, at each step there is: the file is complete or there is none, and the
/// guest runs unless it was killed itself.
async fn killed_at_every_step(victims: Victims) {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let mut steps = Steps::of("a dump", victims, 6..STEPS);
    loop {
        let step = steps.next();
        let name = format!("dump{step}");
        let Some((mut domain, tick)) = another(&daemon, &name).await else { return };
        let file = daemon.folder().join(format!("{name}.dump"));
        steps.kill(&daemon, &tick.name);
        let arguments = (file.to_str().expect("a text"), options([]));
        let done = domain.client.ask(&domain.path, "org.virt.Domain.CoreDump", &arguments).await;
        if !steps.came(&mut daemon, &mut domain, done).await {
            return;
        }
        domain.is_looked_after().await;
        let there = saved_as(&file);
        assert!(there.is_empty() || there == [file.clone()], "{there:?} at {step}");
        steps.is_done(!there.is_empty());
        if !there.is_empty() {
            saved_xml(&domain.client, &file, false).await.expect("what is there is complete");
        }
        steps.is_as_it_was(&domain, &tick).await;
        if !victims.have_qemu() {
            domain.run("Destroy").await.expect("destroyed");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_while_it_dumps() {
    killed_at_every_step(Victims::Virtd).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_killed_while_it_is_dumped() {
    killed_at_every_step(Victims::Qemu).await;
}
