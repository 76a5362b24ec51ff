//! Real guests that are saved in files and restored from them.

use crate::common::client::{Client, Domain, Refusal, options};
use crate::common::cut_off::{Steps, Victims};
use crate::common::guest::Tick;
use crate::common::users::ALICE;
use crate::common::{Daemon, PATIENCE, Setup};
use crate::dumped::dump_memory;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use zbus::{OwnedObjectPath, Variant};

/// A daemon, a client of it and a tick guest that runs.
pub async fn ticking(name: &str) -> Option<(Daemon, Domain, Tick)> {
    let daemon = Daemon::on_session_bus().await?;
    let (domain, tick) = another(&daemon, name).await?;
    Some((daemon, domain, tick))
}

pub async fn another(daemon: &Daemon, name: &str) -> Option<(Domain, Tick)> {
    let tick = Tick::new(daemon, name, "")?;
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&tick.xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    Some((domain, tick))
}

pub async fn save(domain: &Domain, file: &Path, how: &[(&'static str, Variant<'_>)]) -> Result<(), Refusal> {
    let how = how.iter().map(|(key, value)| (*key, value.try_clone().expect("no descriptor")));
    domain.call("Save", &(file.to_str().expect("a text"), options(how))).await.map(drop)
}

pub async fn restore(client: &Client, file: &Path, how: &[(&'static str, Variant<'_>)]) -> Result<Domain, Refusal> {
    let how = how.iter().map(|(key, value)| (*key, value.try_clone().expect("no descriptor")));
    let arguments = (file.to_str().expect("a text"), options(how));
    let reply = client.call("/org/virt", "org.virt.Manager.RestoreDomain", &arguments).await?;
    let (path, _): (OwnedObjectPath, OwnedObjectPath) = reply.body().deserialize().expect("oo");
    Ok(Domain { client: client.clone(), path: path.to_string() })
}

pub async fn saved_xml(client: &Client, file: &Path, secure: bool) -> Result<String, Refusal> {
    let how = options([("secure", Variant::from(secure))]);
    let arguments = (file.to_str().expect("a text"), how);
    let reply = client.call("/org/virt", "org.virt.Manager.GetSavedXML", &arguments).await?;
    Ok(reply.body().deserialize().expect("s"))
}

async fn set_saved_xml(client: &Client, file: &Path, xml: &str) -> Result<(), Refusal> {
    let arguments = (file.to_str().expect("a text"), xml, options([]));
    client.call("/org/virt", "org.virt.Manager.SetSavedXML", &arguments).await.map(drop)
}

pub fn refused<T>(done: Result<T, Refusal>, name: &str, words: &[&str]) {
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
    let kept = daemon.root().join("var/lib/virt/saved");
    std::os::unix::fs::symlink(&kept, at("other")).expect("linked");
    for (path, name, word) in [
        (kept.join("of-another.virtsave"), "InvalidArgument", "virtd's own folder"),
        (at("other").join("of-another.virtsave"), "InvalidArgument", "virtd's own folder"),
        (daemon.root().join("var/lib/virt/own.save"), "InvalidArgument", "virtd's own folder"),
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

/// What is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Saved {
    Persistent,
    Transient,
    /// For its next start.
    Managed,
}

/// A save in the midst of which virtd or QEMU is killed, at each step there is: the guest runs and there is no file, or it is off
/// and the file is complete. With both of them a guest is lost whose file is not.
async fn killed_at_every_step(victims: Victims, saved: Saved) {
    let (transient, managed) = (saved == Saved::Transient, saved == Saved::Managed);
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let mut steps = Steps::of(format!("{saved:?}"), victims, 6..STEPS);
    loop {
        let step = steps.next();
        let name = format!("cut{step}");
        let Some((mut domain, tick)) = another(&daemon, &name).await else { return };
        let uuid: String = domain.property("UUID").await;
        let file = match managed {
            true => managed_file(&daemon, &uuid),
            false => daemon.folder().join(format!("{name}.save")),
        };
        if transient {
            domain.run("Undefine").await.expect("undefined");
        }
        steps.kill(&daemon, &tick.name);
        let path = domain.path.clone();
        let mut watch = domain.client.watch().await;
        let (text, none) = (file.to_str().expect("a text"), options([]));
        let done = match managed {
            true => domain.client.ask(&path, "org.virt.Domain.ManagedSave", &(none,)).await,
            false => domain.client.ask(&path, "org.virt.Domain.Save", &(text, none)).await,
        };
        if !steps.came(&mut daemon, &mut domain, done).await {
            return;
        }
        if !victims.have_virtd() {
            let last = watch.lifecycle(&domain.path).await;
            assert_eq!(last == "stopped saved", file.exists(), "{last} at {step}");
        }
        if transient && domain.client.domains().await.is_empty() {
            let there = left_of_transient(&domain.client, &file).await;
            assert!(victims == Victims::Both || there, "it ran, and is lost at {step}");
            continue;
        }
        domain.is_looked_after().await;
        if transient && domain.client.domains().await.is_empty() {
            assert_eq!(saved_as(&file), std::slice::from_ref(&file), "it ended as it was looked after, at {step}");
            continue;
        }
        runs_or_is_saved(&domain, &tick, &file, (victims, saved, step)).await;
    }
}

/// Whether a transient machine of which nothing else is left has a file, from which it comes back; there is nothing beside.
async fn left_of_transient(client: &Client, file: &Path) -> bool {
    let begun = Instant::now();
    while saved_as(file).iter().any(|path| *path != file) && begun.elapsed() < PATIENCE {
        // virtd tells nobody of such a machine.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let there = saved_as(file);
    assert!(there.is_empty() || there == [file], "{there:?}");
    if !there.is_empty() {
        let domain = restore(client, file, &[]).await.expect("what is there is complete");
        domain.run("Destroy").await.expect("destroyed");
    }
    !there.is_empty()
}

/// A machine whose save was cut off runs, and there is no file; or it is off, and goes on from a complete one. Then it is ended.
async fn runs_or_is_saved(domain: &Domain, tick: &Tick, file: &Path, cut: (Victims, Saved, u32)) {
    let (victims, saved, step) = cut;
    let managed = saved == Saved::Managed;
    let (state, reason) = domain.state().await;
    let there = saved_as(file);
    let has: bool = domain.property("HasManagedSave").await;
    assert_eq!(has, managed && !there.is_empty(), "{state} with {there:?} at {step}");
    match state.as_str() {
        "running" => {
            assert!(there.is_empty(), "it runs, and there is {there:?} at {step}");
            tick.goes_on().await;
            domain.run("Destroy").await.expect("destroyed");
        }
        "shutoff" if !there.is_empty() => {
            assert_eq!((&*reason, &there[..]), ("saved", &[file.to_owned()][..]), "at {step}");
            match managed {
                true => drop(domain.run("Start").await.expect("what is there is complete")),
                false => drop(restore(&domain.client, file, &[]).await.expect("what is there is complete")),
            }
            tick.goes_on().await;
            domain.run("Destroy").await.expect("destroyed");
        }
        "shutoff" => {
            assert!(victims != Victims::Virtd, "it ran, and is lost at {step}");
            assert_ne!(reason, "saved", "at {step}");
        }
        other => panic!("it is {other} at {step}"),
    }
}

/// What there is of a file of that name and beside it.
pub fn saved_as(file: &Path) -> Vec<PathBuf> {
    let begins = file.file_name().expect("a name").to_string_lossy();
    let entries = std::fs::read_dir(file.parent().expect("a folder")).expect("a folder");
    let names = entries.map(|entry| entry.expect("an entry").path());
    let is_it = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&*begins));
    names.filter(is_it).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_while_it_saves() {
    killed_at_every_step(Victims::Virtd, Saved::Persistent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_while_it_saves_a_transient_machine() {
    killed_at_every_step(Victims::Virtd, Saved::Transient).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_killed_at_once() {
    killed_at_every_step(Victims::Both, Saved::Persistent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_killed_at_once_with_a_transient_machine() {
    killed_at_every_step(Victims::Both, Saved::Transient).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_killed_while_it_is_saved() {
    killed_at_every_step(Victims::Qemu, Saved::Persistent).await;
}

/// QEMU of the system bus runs as another user, behind its wall: neither sees the file.
#[tokio::test(flavor = "multi_thread")]
async fn on_the_system_bus_only_root_has_the_file() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let secret = "<graphics type='vnc' port='-1' autoport='yes' passwd='hidden'/></devices>";
    let Some(tick) = Tick::new(&daemon, "walled", "") else { return };
    let client = Client { connection: daemon.connect().await };
    let xml = tick.xml.replace("</devices>", secret);
    let domain = client.define(&xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
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
        for denied in [
            save(&theirs, path, &[]).await,
            restore(&stranger, path, &[]).await.map(drop),
            set_saved_xml(&stranger, path, "<domain/>").await,
        ] {
            let (name, text) = denied.expect_err("denied");
            assert!(text.contains("org.virt.domain.save"), "{name}: {text}");
        }
        for (secure, right) in [(false, "define"), (true, "read-secure")] {
            let (name, text) = saved_xml(&stranger, path, secure).await.expect_err("denied");
            assert!(text.contains(&format!("org.virt.domain.{right}")), "{name}: {text}");
        }
    }
    save(&domain, &file, &[]).await.expect("saved");
    the_configuration_in_a_file_is_replaced(&domain, &tick, &file).await;
}

/// Of a machine that is off by now.
async fn the_configuration_in_a_file_is_replaced(domain: &Domain, tick: &Tick, file: &Path) {
    let client = &domain.client;
    let shown = saved_xml(client, file, false).await.expect("read");
    assert!(!shown.contains("hidden") && shown.contains("<name>walled</name>"), "{shown}");
    let whole = std::fs::read(file).expect("read");
    let larger = shown.replace("<memory unit='KiB'>16384", "<memory unit='KiB'>32768");
    refused(set_saved_xml(client, file, &larger).await, "AbiIncompatible", &["save", "memory"]);
    refused(set_saved_xml(client, file, "<domain").await, "ConfigInvalid", &[]);
    let kept = file.with_file_name("root/var/lib/virt/saved/none.virtsave");
    refused(set_saved_xml(client, &kept, &shown).await, "InvalidArgument", &["virtd's own folder"]);
    assert!(std::fs::read(file).expect("read") == whole, "what is refused changes nothing");
    let titled = shown.replace("<memory ", "<title>of then</title><memory ");
    set_saved_xml(client, file, &titled).await.expect("replaced");
    let now = saved_xml(client, file, true).await.expect("read");
    assert!(now.contains("<title>of then</title>") && now.contains("passwd='hidden'"), "{now}");
    let made = std::fs::metadata(file).expect("it is there");
    assert_eq!((made.mode() & 0o7777, made.uid()), (0o600, 0));
    assert_eq!(saved_as(file), [file.to_owned()], "and nothing beside it");
    restore(client, file, &[]).await.expect("restored");
    assert!(domain.xml().await.contains("<title>of then</title>"), "what runs has it");
    tick.goes_on().await;
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
    // When all has been checked and the file has been made: QEMU's dump of its memory fails in its midst.
    daemon.at_step(3, &fill);
    refused(dump_memory(&domain, &file, "elf", &[]).await, "NoSpace", &["full.save"]);
    assert!(daemon.step_came());
    tick.goes_on().await;
    let left = daemon.inside("ls").arg("-A").arg(&room).output().expect("ls");
    assert_eq!(String::from_utf8_lossy(&left.stdout).trim(), "filler", "nothing is left");
    refused(dump_memory(&domain, &file, "elf", &[]).await, "NoSpace", &["MiB are needed"]);
    assert!(daemon.inside("rm").arg(&filler).status().expect("rm").success());
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

/// Where virtd keeps the managed save of a machine.
pub fn managed_file(daemon: &Daemon, uuid: &str) -> PathBuf {
    daemon.root().join(format!("var/lib/virt/saved/{uuid}.virtsave"))
}

pub async fn managed_save(domain: &Domain, how: &[(&'static str, Variant<'_>)]) -> Result<(), Refusal> {
    let how = how.iter().map(|(key, value)| (*key, value.try_clone().expect("no descriptor")));
    domain.call("ManagedSave", &(options(how),)).await.map(drop)
}

pub async fn has_managed_save(domain: &Domain) -> bool {
    domain.property("HasManagedSave").await
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_while_it_saves_for_the_next_start() {
    killed_at_every_step(Victims::Virtd, Saved::Managed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_killed_at_once_with_a_managed_save() {
    killed_at_every_step(Victims::Both, Saved::Managed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_killed_while_it_is_saved_for_the_next_start() {
    killed_at_every_step(Victims::Qemu, Saved::Managed).await;
}
