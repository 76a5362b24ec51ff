//! Real guests whose save or managed start comes to nothing, or to its end much later: storage that stops answering, names that are
//! taken meanwhile, and what is killed while a guest goes on from what was saved of it.

use super::saved::{another, has_managed_save, managed_file, managed_save, refused, restore, save, saved_as, ticking};
use crate::common::client::{Client, Domain, options};
use crate::common::cut_off::Victims;
use crate::common::dead::{Dead, Fading};
use crate::common::{Daemon, PATIENCE};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::time::timeout;
use zbus::{OwnedObjectPath, Variant};

/// Steps of a save: its file is complete, and that is noted.
const NOTED: u32 = 8;
/// Its memory is written, and the rest of the file is not.
const WRITTEN: u32 = 6;
/// The guest stands, and its memory is about to be written.
const STANDS: u32 = 5;

/// Waits for what nobody tells of.
async fn until(what: &str, so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < PATIENCE * 2, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A save that waits at that step until the result is given back its file.
async fn held_at(daemon: &Daemon, step: u32, domain: &Domain, file: &Path) -> (OwnedObjectPath, PathBuf) {
    let (held, go) = (daemon.folder().join("held"), daemon.folder().join("go"));
    let _ = (std::fs::remove_file(&held), std::fs::remove_file(&go));
    daemon.at_step(step, &format!("touch {}; until [ -e {} ]; do sleep 0.02; done", held.display(), go.display()));
    let arguments = (file.to_str().expect("a text"), options([("no-wait", Variant::from(true))]));
    let reply = domain.call("Save", &arguments).await.expect("accepted");
    // Not only begun: a process that is being made closes what virtd has open, and waits for a file system that has stopped.
    until("the step does not come", || held.exists()).await;
    (reply.body().deserialize().expect("o"), go)
}

/// A save in which `command` is run when all is written and noted, which kills virtd.
async fn cut_off(daemon: &mut Daemon, domain: &Domain, file: &Path, command: &str) {
    daemon.at_step(NOTED, command);
    let (text, none) = (file.to_str().expect("a text"), options([]));
    domain.client.ask(&domain.path, "org.virt.Domain.Save", &(text, none)).await;
    assert!(daemon.step_came());
    daemon.virtd_died().await;
}

async fn job_ends(client: &Client, job: &OwnedObjectPath) -> (String, String) {
    let begun = Instant::now();
    loop {
        let state: String = client.property(job.as_str(), "org.virt.Job", "State").await;
        if !["pending", "running"].contains(&state.as_str()) {
            let message: String = client.property(job.as_str(), "org.virt.Job", "ErrorMessage").await;
            return (state, message);
        }
        assert!(begun.elapsed() < PATIENCE * 5, "the job does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Finding 3: the thread that writes is held, and QEMU with it, until somebody closes the pipe between them.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_that_stops_answering_leaves_the_guest_running() {
    let Some((daemon, domain, tick)) = ticking("faded").await else { return };
    let Some(fading) = Fading::mount(&daemon, "fading") else { return };
    let client = domain.client.clone();
    let (file, elsewhere) = (fading.folder.join("faded.save"), daemon.folder().join("faded.save"));
    let mut watch = client.watch().await;
    for cancelled in [true, false] {
        let (job, go) = held_at(&daemon, STANDS, &domain, &file).await;
        fading.stops();
        std::fs::write(&go, "").expect("written");
        fading.is_waited_for();
        if !cancelled {
            // What virtd has open there keeps no other machine's process from being made.
            let (other, _) = another(&daemon, "beside").await.expect("as the first");
            other.run("Destroy").await.expect("destroyed");
        }
        if cancelled {
            client.call(job.as_str(), "org.virt.Job.Cancel", &()).await.expect("asked");
        }
        let (state, message) = job_ends(&client, &job).await;
        assert_eq!(state, if cancelled { "cancelled" } else { "failed" }, "{message}");
        assert!(cancelled || message.contains(file.to_str().expect("a text")) && message.contains("30 s"), "{message}");
        // It has not answered since.
        tick.goes_on().await;
        assert_eq!(domain.state().await.0, "running");
        domain.bare("Suspend").await.expect("what stops it waits for nothing");
        domain.bare("Resume").await.expect("nor what lets it go on");
        assert_eq!(watch.lifecycle(&domain.path).await, "suspended paused");
        assert_eq!(watch.lifecycle(&domain.path).await, "resumed unpaused");
        fading.answers();
        until("what was written stays", || fading.names().is_empty()).await;
        tick.goes_on().await;
    }
    timeout(PATIENCE, domain.is_looked_after()).await.expect("it is whole");
    save(&domain, &elsewhere, &[]).await.expect("saved");
    assert_eq!(watch.lifecycle(&domain.path).await, "stopped saved", "nothing else was told");
    restore(&client, &elsewhere, &[]).await.expect("restored");
    tick.goes_on().await;
    domain.run("Destroy").await.expect("destroyed");
}

/// All is written, and then it cannot be told whether it has its name.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_save_is_half_done_can_go_on() {
    let Some((daemon, domain, tick)) = ticking("halfdone").await else { return };
    let Some(fading) = Fading::mount(&daemon, "fading") else { return };
    let client = domain.client.clone();
    let file = fading.folder.join("halfdone.save");
    let mut watch = client.watch().await;
    for resumed in [true, false] {
        let (job, go) = held_at(&daemon, NOTED, &domain, &file).await;
        fading.stops();
        std::fs::write(&go, "").expect("written");
        let (state, message) = job_ends(&client, &job).await;
        assert_eq!(state, "failed");
        assert!(message.contains("resumed") && message.contains("halfdone.save"), "{message}");
        assert_eq!(watch.lifecycle(&domain.path).await, "suspended paused", "that it stands is told");
        if resumed {
            domain.bare("Resume").await.expect("it goes on, and was not saved");
            assert_eq!(watch.lifecycle(&domain.path).await, "resumed unpaused");
            tick.goes_on().await;
            fading.answers();
            until("what was written stays", || fading.names().is_empty()).await;
            tick.goes_on().await;
            timeout(PATIENCE, domain.is_looked_after()).await.expect("it is whole");
        } else {
            fading.answers();
            assert_eq!(watch.lifecycle(&domain.path).await, "stopped saved", "it comes to its end by itself");
            assert_eq!(fading.names(), ["halfdone.save"]);
        }
    }
    assert_eq!(domain.state().await, ("shutoff".into(), "saved".into()));
}

/// Findings 1, 2 and 4: what becomes of its file when all is written and noted.
#[tokio::test(flavor = "multi_thread")]
async fn what_happens_to_the_file_of_a_save_leaves_the_guest_running() {
    let Some((mut daemon, domain, tick)) = ticking("theirs").await else { return };
    let file = daemon.folder().join("theirs.save");
    let (shown, part) = (file.display().to_string(), format!("{}.*", file.display()));
    let mut watch = domain.client.watch().await;
    daemon.at_step(NOTED, &format!("mkdir {shown}"));
    refused(save(&domain, &file, &[]).await, "StorageFailed", &["theirs.save", "no plain file"]);
    assert_eq!(saved_as(&file), std::slice::from_ref(&file), "only the folder is there");
    tick.goes_on().await;
    std::fs::remove_dir(&file).expect("as it was made");
    daemon.at_step(NOTED, &format!("rm {part}"));
    refused(save(&domain, &file, &[]).await, "StorageFailed", &["neither", "theirs.save"]);
    assert_eq!(saved_as(&file), Vec::<PathBuf>::new());
    tick.goes_on().await;
    // A disk of another machine comes to be there while it is written.
    let kept = daemon.folder().join("other.qcow2");
    std::fs::copy(&tick.disk, &kept).expect("copied");
    let whole = std::fs::read(&kept).expect("read");
    let (job, go) = held_at(&daemon, STANDS, &domain, &kept).await;
    let other = tick.xml.replace("<name>theirs<", "<name>other<").replace("theirs.qcow2", "other.qcow2");
    let other = domain.client.define(&other).await.expect("defined");
    std::fs::write(&go, "").expect("written");
    let (state, message) = job_ends(&domain.client, &job).await;
    assert!(state == "failed" && message.contains("domain 'other'"), "{state}: {message}");
    tick.goes_on().await;
    assert!(std::fs::read(&kept).expect("there") == whole, "it is not replaced");
    other.run("Undefine").await.expect("undefined");
    domain.bare("Suspend").await.expect("suspended");
    assert_eq!(watch.lifecycle(&domain.path).await, "suspended paused", "nothing was told of all that");
    domain.bare("Resume").await.expect("resumed");
    // The same where virtd is killed then: the next one finds neither of its names.
    let killed = format!("rm {part}; kill -9 {}", daemon.virtd_pid());
    cut_off(&mut daemon, &domain, &file, &killed).await;
    daemon.start_virtd().await;
    let domain = Domain { client: Client { connection: daemon.connect().await }, path: domain.path };
    assert_eq!(domain.state().await.0, "running");
    tick.goes_on().await;
    assert_eq!(saved_as(&file), Vec::<PathBuf>::new());
    domain.run("Destroy").await.expect("destroyed");
}

/// What is complete can neither be named nor removed, and virtd was killed: as long as that is so nobody lets the guest go on but
/// whoever takes the save back, and nobody does so twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_stands_while_what_was_saved_of_it_may_still_be_named() {
    let Some((mut daemon, domain, tick)) = ticking("stuck").await else { return };
    let folder = daemon.folder().join("stuck");
    std::fs::create_dir(&folder).expect("made");
    let (file, shown) = (folder.join("stuck.save"), folder.display());
    let read_only = format!("mount --bind {shown} {shown} && mount -o remount,bind,ro {shown}");
    let killed = format!("{read_only}; kill -9 {}", daemon.virtd_pid());
    cut_off(&mut daemon, &domain, &file, &killed).await;
    daemon.start_virtd().await;
    let domain = Domain { client: Client { connection: daemon.connect().await }, path: domain.path };
    until("it is not tried", || daemon.log().contains("is still half done")).await;
    assert_eq!(domain.state().await.0, "paused");
    refused(domain.run("Undefine").await, "OperationInvalid", &["being saved"]);
    domain.bare("Resume").await.expect("it goes on, and was not saved");
    tick.goes_on().await;
    assert_eq!(saved_as(&file).len(), 1, "it cannot be removed");
    domain.bare("Suspend").await.expect("suspended");
    assert!(daemon.inside("umount").arg(&folder).status().expect("umount").success());
    until("what was written stays", || saved_as(&file).is_empty()).await;
    timeout(PATIENCE, domain.is_looked_after()).await.expect("it is whole");
    assert_eq!(domain.state().await.0, "paused", "whoever has stopped it lets it go on");
    domain.bare("Resume").await.expect("resumed");
    tick.goes_on().await;
    domain.run("Destroy").await.expect("destroyed");
    assert_eq!(domain.state().await, ("shutoff".into(), "destroyed".into()));
}

/// It is ended while the file gets its end: it was not saved.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_destroyed_before_its_save_is_complete_is_not_saved() {
    let Some((daemon, domain, _tick)) = ticking("ended").await else { return };
    let file = daemon.folder().join("ended.save");
    let mut watch = domain.client.watch().await;
    let (job, go) = held_at(&daemon, WRITTEN, &domain, &file).await;
    domain.run("Destroy").await.expect("destroyed");
    assert_eq!(watch.lifecycle(&domain.path).await, "stopped destroyed");
    std::fs::write(&go, "").expect("written");
    let (state, message) = job_ends(&domain.client, &job).await;
    assert_ne!(state, "succeeded", "{message}");
    assert_eq!(saved_as(&file), Vec::<PathBuf>::new());
    assert_eq!(domain.state().await, ("shutoff".into(), "destroyed".into()));
}

/// Finding 7.
#[tokio::test(flavor = "multi_thread")]
async fn two_machines_are_not_saved_in_one_file() {
    let Some((daemon, first, tick)) = ticking("first").await else { return };
    let Some((second, other)) = another(&daemon, "second").await else { return };
    let (file, link) = (daemon.folder().join("both.save"), daemon.folder().join("link"));
    std::os::unix::fs::symlink(daemon.folder(), &link).expect("linked");
    let (job, go) = held_at(&daemon, STANDS, &first, &file).await;
    for path in [&file, &link.join("both.save")] {
        refused(save(&second, path, &[]).await, "InUse", &["both.save", "domain 'first'"]);
    }
    other.goes_on().await;
    std::fs::write(&go, "").expect("written");
    assert_eq!(job_ends(&first.client, &job).await.0, "succeeded");
    restore(&first.client, &file, &[]).await.expect("it is the first one's");
    tick.goes_on().await;
    save(&second, &file, &[]).await.expect("it is free again");
    first.run("Destroy").await.expect("destroyed");
}

/// Finding 10: of the machine only its save is left, on storage that does not answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_uuid_is_not_used_again_before_its_save_is_whole() {
    let Some((mut daemon, domain, tick)) = ticking("left").await else { return };
    let storage = daemon.folder().join("storage");
    std::fs::create_dir(&storage).expect("made");
    let (file, uuid) = (storage.join("left.save"), domain.property::<String>("UUID").await);
    domain.run("Undefine").await.expect("undefined");
    let qemu = daemon.qemu_of(&tick.name).expect("it runs");
    let killed = format!("kill -9 {qemu} {}", daemon.virtd_pid());
    cut_off(&mut daemon, &domain, &file, &killed).await;
    let Some(mut dead) = Dead::mount_over(&daemon, storage.clone()) else { return };
    daemon.start_virtd_with(&[]).await;
    let client = Client { connection: daemon.connect().await };
    // It is there until that is known.
    assert_eq!(client.domains().await.len(), 1);
    daemon.kill_virtd().await;
    // That it had a guest is forgotten by now.
    daemon.start_virtd_with(&[]).await;
    let client = Client { connection: daemon.connect().await };
    let xml = tick.xml.replace("<name>", &format!("<uuid>{uuid}</uuid><name>"));
    refused(client.define(&xml).await, "Busy", &[&uuid, "cut off"]);
    assert!(client.domains().await.is_empty());
    dead.let_go();
    assert!(daemon.inside("umount").arg(&storage).status().expect("umount").success());
    until("it gets its name", || file.exists()).await;
    let domain = client.define(&xml).await.expect("defined");
    restore(&client, &file, &[]).await.expect("it is complete");
    tick.goes_on().await;
    domain.run("Destroy").await.expect("destroyed");
}

/// What an earlier machine of that uuid has left is told of, and is as good as it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_managed_save_that_is_there_already_is_told_of_when_its_machine_is_defined() {
    let Some((daemon, domain, tick)) = ticking("earlier").await else { return };
    let uuid: String = domain.property("UUID").await;
    let file = managed_file(&daemon, &uuid);
    managed_save(&domain, &[]).await.expect("saved");
    let whole = std::fs::read(&file).expect("read");
    domain.call("Undefine", &(options([("managed-save", Variant::from(true))]),)).await.expect("undefined");
    std::fs::write(&file, whole).expect("as a backup brings it back");
    let xml = tick.xml.replace("<name>", &format!("<uuid>{uuid}</uuid><name>"));
    let domain = domain.client.define(&xml).await.expect("defined");
    assert!(has_managed_save(&domain).await);
    assert!(daemon.log().contains("there is a managed save of it already"), "{}", daemon.log());
    let mut watch = domain.client.watch().await;
    domain.run("Start").await.expect("started");
    assert_eq!(watch.lifecycle(&domain.path).await, "started restored");
    tick.goes_on().await;
    domain.run("Destroy").await.expect("destroyed");
}

/// More steps than a start from a managed save has.
const STEPS: u32 = 20;

/// A start from a managed save in the midst of which virtd or QEMU is killed, at each step there is: afterwards the file is whole
/// and nobody has gone on from it, or it is gone and, if its QEMU was not killed, the guest runs. No guest goes on twice.
async fn start_killed_at_every_step(victims: Victims) {
    let Some((mut daemon, mut domain, tick)) = ticking("again").await else { return };
    let uuid: String = domain.property("UUID").await;
    let file = managed_file(&daemon, &uuid);
    let status = daemon.root().join(format!("run/virt/status/{uuid}.json"));
    // Of what is not made yet nothing is killed.
    let qemu = format!("$(sed -n 's/.*\"pid\": *\\([0-9]*\\).*/\\1/p' {} | head -n 1)", status.display());
    for step in 1..STEPS {
        managed_save(&domain, &[]).await.expect("saved");
        let (before, boots) = tick.counted().expect("it counted");
        let virtd = daemon.virtd_pid();
        let hit = daemon.folder().join("hit");
        let _ = std::fs::remove_file(&hit);
        let killed = format!("kill -9 {qemu} 2>/dev/null && touch {}", hit.display());
        let killed = match victims {
            Victims::Virtd => format!("kill -9 {virtd}"),
            Victims::Qemu => killed,
            Victims::Both => format!("{killed}; kill -9 {virtd}"),
        };
        daemon.at_step(step, &killed);
        let path = domain.path.clone();
        let done = domain.client.ask(&path, "org.virt.Domain.Start", &(options([]),)).await;
        if !daemon.step_came() {
            assert!(done && step > 5, "such a start has fewer steps than thought: {step}");
            println!("{victims:?} killed at each of {} steps", step - 1);
            domain.run("Destroy").await.expect("destroyed");
            return;
        }
        if victims != Victims::Qemu {
            daemon.virtd_died().await;
            daemon.start_virtd().await;
            domain = Domain { client: Client { connection: daemon.connect().await }, path };
        }
        domain.is_looked_after().await;
        let ended = async {
            while hit.exists() && domain.state().await.0 != "shutoff" {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, ended).await.expect("its end is told");
        let (state, _) = domain.state().await;
        let (has, there) = (has_managed_save(&domain).await, saved_as(&file));
        assert_eq!(has, there == [file.clone()], "{state} with {there:?} at {step}");
        assert!(has || there.is_empty(), "{state} with {there:?} at {step}");
        match state.as_str() {
            "running" => {
                assert!(!has && !hit.exists(), "it runs beside its save at {step}");
                tick.counts_to(before + 1).await;
                assert_eq!(tick.counted().expect("it counts").1, boots, "it has not booted, at {step}");
            }
            "shutoff" if has => {
                // A QEMU that has been made begins its log anew.
                let count = tick.counted().map_or(before, |(count, _)| count);
                assert!(count <= before, "it has gone on, and would once more, at {step}");
                domain.run("Start").await.expect("it is as good as before");
                tick.counts_to(before + 1).await;
                assert_eq!(tick.counted().expect("it counts").1, boots, "it has not booted, at {step}");
            }
            "shutoff" => {
                assert!(hit.exists(), "it is lost at {step}");
                domain.run("Start").await.expect("it boots");
                tick.goes_on().await;
            }
            other => panic!("it is {other} at {step}"),
        }
    }
    panic!("such a start has more than {STEPS} steps");
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_while_a_guest_goes_on_from_its_managed_save() {
    start_killed_at_every_step(Victims::Virtd).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_killed_while_it_goes_on_from_its_managed_save() {
    start_killed_at_every_step(Victims::Qemu).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_killed_while_a_guest_goes_on_from_its_managed_save() {
    start_killed_at_every_step(Victims::Both).await;
}
