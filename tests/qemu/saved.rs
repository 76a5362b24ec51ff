//! Real guests that are saved in files and restored from them.

use crate::common::client::{Client, Domain, Refusal, options};
use crate::common::guest::Tick;
use crate::common::users::ALICE;
use crate::common::{Daemon, PATIENCE, Setup};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use zbus::{OwnedObjectPath, Variant};

/// A daemon, a client of it and a tick guest that runs.
async fn ticking(name: &str) -> Option<(Daemon, Domain, Tick)> {
    let daemon = Daemon::on_session_bus().await?;
    let (domain, tick) = another(&daemon, name).await?;
    Some((daemon, domain, tick))
}

async fn another(daemon: &Daemon, name: &str) -> Option<(Domain, Tick)> {
    let tick = Tick::new(daemon, name, "")?;
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&tick.xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    Some((domain, tick))
}

async fn save(domain: &Domain, file: &Path, how: &[(&'static str, Variant<'_>)]) -> Result<(), Refusal> {
    let how = how.iter().map(|(key, value)| (*key, value.try_clone().expect("no descriptor")));
    domain.call("Save", &(file.to_str().expect("a text"), options(how))).await.map(drop)
}

async fn restore(client: &Client, file: &Path, how: &[(&'static str, Variant<'_>)]) -> Result<Domain, Refusal> {
    let how = how.iter().map(|(key, value)| (*key, value.try_clone().expect("no descriptor")));
    let arguments = (file.to_str().expect("a text"), options(how));
    let reply = client.call("/org/virt", "org.virt.Manager.RestoreDomain", &arguments).await?;
    let (path, _): (OwnedObjectPath, OwnedObjectPath) = reply.body().deserialize().expect("oo");
    Ok(Domain { client: client.clone(), path: path.to_string() })
}

fn refused<T>(done: Result<T, Refusal>, name: &str, words: &[&str]) {
    let (got, text) = done.err().unwrap_or_else(|| panic!("it was done, and not {name}"));
    assert_eq!(got, format!("org.virt.Error.{name}"), "{text}");
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
}

/// What is in the folder of the disk beside what a tick has.
fn strays(tick: &Tick) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(tick.disk.parent().expect("a folder")).expect("a folder");
    let names = entries.map(|entry| entry.expect("an entry").path());
    names.filter(|path| path.to_string_lossy().contains(".save")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_on_where_it_was_saved() {
    let Some((daemon, domain, tick)) = ticking("saved").await else { return };
    let client = domain.client.clone();
    let file = daemon.folder().join("saved.save");
    std::fs::write(&file, "what was there before").expect("written");
    let mut watch = client.watch().await;
    save(&domain, &file, &[]).await.expect("saved");
    assert_eq!(watch.lifecycle(&domain.path).await, "stopped saved");
    assert_eq!(domain.state().await, ("shutoff".into(), "saved".into()));
    assert_eq!(strays(&tick), std::slice::from_ref(&file), "nothing else is left");
    let (before, boots) = tick.counted().expect("it counted");

    let again = restore(&client, &file, &[]).await.expect("restored");
    assert_eq!(again.path, domain.path);
    assert_eq!(watch.lifecycle(&domain.path).await, "started restored");
    assert_eq!(domain.state().await, ("running".into(), "restored".into()));
    tick.counts_to(before + 2).await;
    assert_eq!(tick.counted().expect("it counts").1, boots, "it has not booted");
    assert!(file.exists(), "the file stays");
    refused(restore(&client, &file, &[]).await, "OperationInvalid", &["active"]);
    assert_eq!(domain.property::<u32>("SnapshotCount").await, 0);
    domain.run("Destroy").await.expect("destroyed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_stands_or_runs_as_is_wanted() {
    let Some((daemon, domain, tick)) = ticking("stands").await else { return };
    let client = domain.client.clone();
    let file = daemon.folder().join("stands.save");
    let (paused, running) = (("paused", Variant::from(true)), ("running", Variant::from(true)));
    refused(save(&domain, &file, &[paused, running]).await, "InvalidArgument", &["paused", "running"]);
    let (paused, running) = (|| ("paused", Variant::from(true)), || ("running", Variant::from(true)));
    save(&domain, &file, &[paused()]).await.expect("saved");
    let mut watch = client.watch().await;
    restore(&client, &file, &[]).await.expect("restored");
    assert_eq!(watch.lifecycle(&domain.path).await, "started restored");
    assert_eq!(watch.lifecycle(&domain.path).await, "suspended restored");
    assert_eq!(domain.state().await, ("paused".into(), "restored".into()));
    // One that stands is saved as it stands; what is wanted of the restore wins.
    save(&domain, &file, &[]).await.expect("saved");
    assert_eq!(watch.lifecycle(&domain.path).await, "stopped saved");
    restore(&client, &file, &[running()]).await.expect("restored");
    assert_eq!(watch.lifecycle(&domain.path).await, "started restored");
    tick.goes_on().await;
    domain.run("Destroy").await.expect("destroyed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_no_longer_defined_is_transient() {
    let Some((daemon, domain, tick)) = ticking("transient").await else { return };
    let client = domain.client.clone();
    let file = daemon.folder().join("transient.save");
    let uuid: String = domain.property("UUID").await;
    save(&domain, &file, &[]).await.expect("saved");
    domain.run("Undefine").await.expect("undefined");
    // Another memory would be noticed, another title is not.
    let other = tick.xml.replace("<name>", &format!("<uuid>{uuid}</uuid><name>"));
    let larger = other.replace("<memory unit='MiB'>16", "<memory unit='MiB'>32");
    let done = restore(&client, &file, &[("xml", Variant::from(larger))]).await;
    refused(done, "AbiIncompatible", &["memory"]);
    assert!(client.domains().await.is_empty(), "a failed restore leaves no domain");
    let titled = other.replace("<memory ", "<title>restored</title><memory ");
    let domain = restore(&client, &file, &[("xml", Variant::from(titled))]).await.expect("restored");
    assert_eq!(domain.property::<String>("UUID").await, uuid);
    assert_eq!(domain.property::<String>("Title").await, "restored");
    assert!(!domain.property::<bool>("Persistent").await);
    tick.goes_on().await;
    // A transient one goes with its guest, and comes back from its file.
    save(&domain, &file, &[]).await.expect("saved");
    assert!(client.domains().await.is_empty());
    let domain = restore(&client, &file, &[]).await.expect("restored");
    tick.goes_on().await;
    domain.run("Destroy").await.expect("destroyed");
    assert!(client.domains().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_saved_machine_is_refused_before_a_process_is_made() {
    let Some((daemon, domain, _tick)) = ticking("files").await else { return };
    let client = domain.client.clone();
    let at = |name: &str| daemon.folder().join(name);
    let file = at("files.save");
    for (path, name, word) in [
        (daemon.folder().to_owned(), "InvalidArgument", "folder"),
        (PathBuf::from("/dev/null"), "InvalidArgument", "no plain file"),
        (PathBuf::from("relative"), "InvalidArgument", "absolute"),
        (PathBuf::new(), "InvalidArgument", "missing"),
        (at("none/files.save"), "StorageFailed", "folder"),
    ] {
        refused(save(&domain, &path, &[]).await, name, &[word]);
    }
    assert_eq!(domain.state().await.0, "running");
    save(&domain, &file, &[]).await.expect("saved");
    let whole = std::fs::read(&file).expect("read");
    let mut watch = client.watch().await;
    let mut changed = whole.clone();
    let last = changed.len() - 100;
    changed[last] ^= 1;
    let mut configured = whole.clone();
    configured[300] ^= 1;
    for (name, bytes, error, word) in [
        ("cut", &whole[..whole.len() - 1], "InvalidArgument", "cut off"),
        ("short", &whole[..20], "InvalidArgument", "cut off"),
        ("changed", &changed[..], "InvalidArgument", "changed"),
        ("configured", &configured[..], "InvalidArgument", "changed"),
        ("text", b"no saved machine at all", "InvalidArgument", "no machine"),
        ("libvirt", b"LibvirtQemudSave\x02\x00\x00\x00 and more", "OperationUnsupported", "libvirt"),
    ] {
        std::fs::write(at(name), bytes).expect("written");
        let shown = at(name);
        let done = restore(&client, &shown, &[]).await;
        refused(done, error, &[word, shown.to_str().expect("a text")]);
    }
    refused(restore(&client, &at("nothing"), &[]).await, "StorageFailed", &["nothing"]);
    assert_eq!(domain.state().await, ("shutoff".into(), "saved".into()));
    restore(&client, &file, &[]).await.expect("the whole one is restored");
    assert_eq!(watch.lifecycle(&domain.path).await, "started restored", "and nothing was started before");
    domain.run("Destroy").await.expect("destroyed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_has_changed_is_named() {
    let Some((daemon, domain, tick)) = ticking("changed").await else { return };
    let client = domain.client.clone();
    let file = daemon.folder().join("changed.save");
    save(&domain, &file, &[]).await.expect("saved");
    // A mere touch is no change.
    assert!(Command::new("touch").arg(&tick.disk).status().expect("touch").success());
    restore(&client, &file, &[]).await.expect("restored");
    tick.goes_on().await;
    save(&domain, &file, &[]).await.expect("saved");
    let before = std::fs::read(&tick.disk).expect("read");
    let taken = Command::new("qemu-img").args(["snapshot", "-c", "beside"]).arg(&tick.disk).status();
    assert!(taken.expect("qemu-img").success());
    refused(restore(&client, &file, &[]).await, "OperationInvalid", &["vda", "length", "without its memory"]);
    std::fs::write(&tick.disk, &before).expect("as it was");
    restore(&client, &file, &[("paused", Variant::from(true))]).await.expect("it is as it was");
    save(&domain, &file, &[]).await.expect("saved");
    let disk = std::fs::File::options().write(true).open(&tick.disk).expect("opened");
    std::os::unix::fs::FileExt::write_all_at(&disk, b"other", before.len() as u64 - 600).expect("written");
    refused(restore(&client, &file, &[]).await, "OperationInvalid", &["vda", "written"]);
    assert_eq!(domain.state().await, ("shutoff".into(), "saved".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_that_fails_or_is_refused_leaves_the_guest_running() {
    let Some((daemon, domain, tick)) = ticking("fails").await else { return };
    let file = daemon.folder().join("fails.save");
    let uuid: String = domain.property("UUID").await;
    let other = tick.xml.replace("<name>", &format!("<uuid>{uuid}</uuid><name>"));
    let larger = other.replace("<memory unit='MiB'>16", "<memory unit='MiB'>32");
    let mut watch = domain.client.watch().await;
    refused(save(&domain, &file, &[("xml", Variant::from(larger))]).await, "AbiIncompatible", &["memory"]);
    refused(save(&domain, &tick.disk, &[]).await, "InUse", &["fails"]);
    // Its QEMU stops in the midst of it, and it is given up.
    let qemu = daemon.qemu_of(&tick.name).expect("it runs");
    daemon.at_step(4, &format!("kill -STOP {qemu}"));
    let arguments = (file.to_str().expect("a text"), options([("no-wait", Variant::from(true))]));
    let reply = domain.call("Save", &arguments).await.expect("accepted");
    let job: OwnedObjectPath = reply.body().deserialize().expect("o");
    let begun = Instant::now();
    while !daemon.step_came() && begun.elapsed() < PATIENCE {
        // The step is virtd's, which tells nobody of it.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    domain.client.call(job.as_str(), "org.virt.Job.Cancel", &()).await.expect("asked");
    nix::sys::signal::kill(qemu, nix::sys::signal::Signal::SIGCONT).expect("it goes on");
    tick.goes_on().await;
    domain.is_looked_after().await;
    let ended: String = domain.client.property(job.as_str(), "org.virt.Job", "State").await;
    assert_eq!(ended, "cancelled");
    assert!(strays(&tick).is_empty(), "{:?}", strays(&tick));
    // And it can be saved all the same.
    save(&domain, &file, &[]).await.expect("saved");
    assert_eq!(watch.lifecycle(&domain.path).await, "stopped saved", "nothing else was told");
}

/// More steps than a save has.
const STEPS: u32 = 20;

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victims {
    Virtd,
    Qemu,
    Both,
}

/// A save in the midst of which virtd or QEMU is killed, at each step there is: the guest runs and there is no file, or it is off
/// and the file is complete. With both of them a guest is lost whose file is not.
async fn killed_at_every_step(victims: Victims, transient: bool) {
    let kills_virtd = victims != Victims::Qemu;
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    for step in 1..STEPS {
        let name = format!("cut{step}");
        let Some((mut domain, tick)) = another(&daemon, &name).await else { return };
        let file = daemon.folder().join(format!("{name}.save"));
        let qemu = daemon.qemu_of(&tick.name).expect("it runs");
        if transient {
            domain.run("Undefine").await.expect("undefined");
        }
        let virtd = daemon.virtd_pid();
        let killed = match victims {
            Victims::Virtd => format!("kill -9 {virtd}"),
            Victims::Qemu => format!("kill -9 {qemu}"),
            Victims::Both => format!("kill -9 {qemu} {virtd}"),
        };
        daemon.at_step(step, &killed);
        let (path, arguments) = (domain.path.clone(), (file.to_str().expect("a text").to_owned(), options([])));
        let mut watch = domain.client.watch().await;
        let done = domain.client.ask(&path, "org.virt.Domain.Save", &arguments).await;
        if !daemon.step_came() {
            assert!(done && step > 6, "a save has fewer steps than thought: {step}");
            println!("{victims:?} killed at each of {} steps", step - 1);
            return;
        }
        if kills_virtd {
            daemon.virtd_died().await;
            daemon.start_virtd().await;
            domain = Domain { client: Client { connection: daemon.connect().await }, path };
        } else {
            let last = watch.lifecycle(&domain.path).await;
            assert_eq!(last == "stopped saved", file.exists(), "{last} at {step}");
        }
        if transient && domain.client.domains().await.is_empty() {
            let begun = Instant::now();
            while saved_as(&tick, &name).iter().any(|path| *path != file) && begun.elapsed() < PATIENCE {
                // virtd tells nobody of a machine of which nothing else is left.
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            let there = saved_as(&tick, &name);
            assert!(there.is_empty() || there == [file.clone()], "{there:?} at {step}");
            assert!(victims == Victims::Both || !there.is_empty(), "it ran, and is lost at {step}");
            if !there.is_empty() {
                let domain = restore(&domain.client, &file, &[]).await.expect("what is there is complete");
                domain.run("Destroy").await.expect("destroyed");
            }
            continue;
        }
        domain.is_looked_after().await;
        if transient && domain.client.domains().await.is_empty() {
            assert_eq!(
                saved_as(&tick, &name),
                std::slice::from_ref(&file),
                "it ended as it was looked after, at {step}"
            );
            continue;
        }
        let (state, reason) = domain.state().await;
        let there = saved_as(&tick, &name);
        match state.as_str() {
            "running" => {
                assert!(there.is_empty(), "it runs, and there is {there:?} at {step}");
                tick.goes_on().await;
                domain.run("Destroy").await.expect("destroyed");
            }
            "shutoff" if !there.is_empty() => {
                assert_eq!((&*reason, &there[..]), ("saved", std::slice::from_ref(&file)), "at {step}");
                restore(&domain.client, &file, &[]).await.expect("what is there is complete");
                tick.goes_on().await;
                domain.run("Destroy").await.expect("destroyed");
            }
            "shutoff" => assert!(victims != Victims::Virtd, "it ran, and is lost at {step}"),
            other => panic!("it is {other} at {step}"),
        }
    }
    panic!("a save has more than {STEPS} steps");
}

/// What there is of a file of that name and beside it.
fn saved_as(tick: &Tick, name: &str) -> Vec<PathBuf> {
    let begins = format!("{name}.save");
    let is_it = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&begins));
    strays(tick).into_iter().filter(is_it).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_while_it_saves() {
    killed_at_every_step(Victims::Virtd, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_while_it_saves_a_transient_machine() {
    killed_at_every_step(Victims::Virtd, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_killed_at_once() {
    killed_at_every_step(Victims::Both, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_killed_at_once_with_a_transient_machine() {
    killed_at_every_step(Victims::Both, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_killed_while_it_is_saved() {
    killed_at_every_step(Victims::Qemu, false).await;
}

/// QEMU of the system bus runs as another user, behind its wall: neither sees the file.
#[tokio::test(flavor = "multi_thread")]
async fn on_the_system_bus_only_root_has_the_file() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let Some((domain, tick)) = another(&daemon, "walled").await else { return };
    let file = daemon.folder().join("walled.save");
    save(&domain, &file, &[]).await.expect("saved");
    let made = std::fs::metadata(&file).expect("it is there");
    assert_eq!((made.mode() & 0o7777, made.uid()), (0o600, 0));
    restore(&domain.client, &file, &[]).await.expect("restored");
    tick.goes_on().await;
    // Whoever may not is told so, whatever is there.
    let stranger = Client { connection: daemon.connect_as(&ALICE).await };
    let theirs = Domain { client: stranger.clone(), path: domain.path.clone() };
    for path in [&file, &daemon.folder().join("none")] {
        for denied in [save(&theirs, path, &[]).await, restore(&stranger, path, &[]).await.map(drop)] {
            let (name, text) = denied.expect_err("denied");
            assert!(text.contains("org.virt.domain.save"), "{name}: {text}");
        }
    }
    domain.run("Destroy").await.expect("destroyed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_leaves_the_guest_running_and_no_file() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some((domain, tick)) = another(&daemon, "full").await else { return };
    let room = daemon.folder().join("room");
    std::fs::create_dir(&room).expect("made");
    let mounted = daemon.inside("mount").args(["-t", "tmpfs", "-o", "size=48m", "none"]).arg(&room).status();
    assert!(mounted.expect("mount").success());
    let (file, filler) = (room.join("full.save"), room.join("filler"));
    let fill = format!("dd if=/dev/zero of={} bs=64k 2>/dev/null", filler.display());
    let mut watch = domain.client.watch().await;
    // When all has been checked and the guest stands.
    daemon.at_step(4, &fill);
    refused(save(&domain, &file, &[]).await, "NoSpace", &["full.save"]);
    assert!(daemon.step_came());
    tick.goes_on().await;
    let left = daemon.inside("ls").arg("-A").arg(&room).output().expect("ls");
    assert_eq!(String::from_utf8_lossy(&left.stdout).trim(), "filler", "nothing is left");
    // With nothing free it is not even begun.
    refused(save(&domain, &file, &[]).await, "NoSpace", &["MiB are needed"]);
    domain.run("Destroy").await.expect("destroyed");
    assert_eq!(watch.lifecycle(&domain.path).await, "stopped destroyed", "nothing else was told");
}
