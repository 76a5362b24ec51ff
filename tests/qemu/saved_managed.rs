//! Machines that are saved for their next start: it goes on from what was saved, or says why it cannot.

use crate::common::client::{Client, Domain, Watch, options};
use crate::common::snapshots::Player;
use crate::common::users::ALICE;
use crate::common::{Daemon, Setup};
use crate::saved::{another, has_managed_save, managed_file, managed_save, refused, restore, save, saved_as, ticking};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::Command;
use zbus::{OwnedVariant, Variant};

async fn can(domain: &Domain, method: &str) -> String {
    domain.call("Can", &(method,)).await.expect("told").body().deserialize().expect("a text")
}

/// What comes with the next change of the domain's state: `State` and, if that changes, `HasManagedSave`.
async fn next_state(watch: &mut Watch, path: &str) -> (String, Option<bool>) {
    loop {
        let message = watch.next().await;
        let header = message.header();
        if header.member().is_none_or(|it| it != "PropertiesChanged") || header.path().is_none_or(|it| it != path) {
            continue;
        }
        let (_, mut values, _): (String, HashMap<String, OwnedVariant>, Vec<String>) =
            message.body().deserialize().expect("sa{sv}as");
        let Some(state) = values.remove("State") else { continue };
        let has = values.remove("HasManagedSave").map(|has| bool::try_from(has).expect("b"));
        return (state.try_into().expect("s"), has);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_start_goes_on_from_a_managed_save() {
    let Some((daemon, domain, tick)) = ticking("managed").await else { return };
    let file = managed_file(&daemon, &domain.property::<String>("UUID").await);
    let (mut told, mut watch) = (domain.client.watch().await, domain.client.watch().await);
    assert_eq!(
        (can(&domain, "ManagedSave").await, can(&domain, "ManagedSaveRemove").await),
        ("yes".into(), "na".into())
    );
    managed_save(&domain, &[]).await.expect("saved");
    assert_eq!(watch.lifecycle(&domain.path).await, "stopped saved");
    assert_eq!(next_state(&mut told, &domain.path).await, ("shutoff".into(), Some(true)), "in one");
    assert_eq!(domain.state().await, ("shutoff".into(), "saved".into()));
    assert_eq!(std::fs::metadata(&file).expect("it is there").mode() & 0o7777, 0o600);
    assert_eq!(saved_as(&file), std::slice::from_ref(&file), "nothing else is there");
    let kept: String = domain.run("GetManagedSaveXML").await.expect("told").body().deserialize().expect("s");
    assert!(kept.contains("<name>managed</name>") && kept.contains("managed.qcow2"), "{kept}");
    assert_eq!(
        (can(&domain, "ManagedSave").await, can(&domain, "ManagedSaveRemove").await),
        ("na".into(), "yes".into())
    );
    let (before, boots) = tick.counted().expect("it counted");

    domain.run("Start").await.expect("started");
    assert_eq!(watch.lifecycle(&domain.path).await, "started restored");
    assert_eq!(next_state(&mut told, &domain.path).await, ("running".into(), Some(false)), "in one");
    assert_eq!(domain.state().await, ("running".into(), "restored".into()));
    tick.counts_to(before + 2).await;
    assert_eq!(tick.counted().expect("it counts").1, boots, "it has not booted");
    assert_eq!(saved_as(&file), Vec::<PathBuf>::new(), "it is used up");
    for verb in ["GetManagedSaveXML", "ManagedSaveRemove"] {
        let done = if verb == "ManagedSaveRemove" { domain.bare(verb).await } else { domain.run(verb).await };
        refused(done, "OperationInvalid", &["managed save"]);
    }
    // What its CPUs do is as was wanted; what is wanted of the start is added.
    let flag = |key: &'static str| (key, Variant::from(true));
    refused(managed_save(&domain, &[flag("paused"), flag("running")]).await, "InvalidArgument", &["paused", "running"]);
    for unknown in ["compression", "live", "xml"] {
        refused(managed_save(&domain, &[flag(unknown)]).await, "InvalidArgument", &[unknown]);
    }
    managed_save(&domain, &[flag("paused")]).await.expect("saved");
    domain.run("Start").await.expect("started");
    managed_save(&domain, &[flag("running")]).await.expect("one that stands is saved, too");
    domain.call("Start", &(options([flag("paused")]),)).await.expect("started");
    managed_save(&domain, &[flag("running")]).await.expect("saved");
    domain.run("Start").await.expect("started");
    tick.goes_on().await;
    domain.run("Destroy").await.expect("destroyed");
    let told = ["started restored", "suspended restored", "stopped saved"];
    let wanted = ["stopped saved"].into_iter().chain(told).chain(told).chain(["started restored", "stopped destroyed"]);
    assert_eq!(watch.until(&domain.path, "stopped destroyed").await, wanted.collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_go_with_a_managed_save_is_refused() {
    let Some((daemon, domain, tick)) = ticking("beside").await else { return };
    let client = domain.client.clone();
    let uuid: String = domain.property("UUID").await;
    let kept = managed_file(&daemon, &uuid);
    let file = daemon.folder().join("beside.save");
    save(&domain, &file, &[]).await.expect("saved");
    assert!(!has_managed_save(&domain).await, "that is not virtd's to keep");
    restore(&client, &file, &[]).await.expect("restored");
    managed_save(&domain, &[]).await.expect("saved");
    assert!(has_managed_save(&domain).await);
    refused(restore(&client, &file, &[]).await, "OperationInvalid", &["managed save", "ManagedSaveRemove"]);
    let xml = tick.xml.replace("<name>", &format!("<uuid>{uuid}</uuid><name>"));
    let created = client.call("/org/virt", "org.virt.Manager.CreateDomain", &(&xml, options([]))).await;
    refused(created, "OperationInvalid", &["managed save", "Start"]);
    refused(domain.call("Rename", &("other", options([]))).await, "OperationInvalid", &["managed save"]);
    let anew = domain.call("Start", &(options([("reset-nvram", Variant::from(true))]),)).await;
    refused(anew, "OperationInvalid", &["reset-nvram", "force-boot"]);
    refused(domain.run("Undefine").await, "OperationInvalid", &["managed-save"]);
    let with_it = || options([("managed-save", Variant::from(true))]);
    let told = domain.call("CheckUndefine", &(with_it(),)).await.expect("told");
    let told: HashMap<String, OwnedVariant> = told.body().deserialize().expect("a{sv}");
    let removed: Vec<String> = told["removed"].clone().try_into().expect("as");
    assert_eq!(removed, [kept.to_str().expect("a text")]);
    assert!(kept.exists() && has_managed_save(&domain).await, "nothing of that has changed anything");

    domain.bare("ManagedSaveRemove").await.expect("removed");
    assert!(!kept.exists() && !has_managed_save(&domain).await);
    let mut watch = client.watch().await;
    domain.run("Start").await.expect("started");
    assert_eq!(watch.lifecycle(&domain.path).await, "started booted");
    tick.counts_to(3).await;
    managed_save(&domain, &[]).await.expect("saved");
    domain.call("Undefine", &(with_it(),)).await.expect("undefined");
    assert!(!kept.exists() && client.domains().await.is_empty());
    // A transient machine would leave nobody who could go on from it.
    let domain = client.define(&xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    domain.run("Undefine").await.expect("undefined");
    refused(managed_save(&domain, &[]).await, "OperationInvalid", &["transient"]);
    assert_eq!(can(&domain, "ManagedSave").await, "na");
    domain.run("Destroy").await.expect("destroyed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_managed_save_that_cannot_be_loaded_is_named_and_kept() {
    let Some((daemon, domain, tick)) = ticking("kept").await else { return };
    let file = managed_file(&daemon, &domain.property::<String>("UUID").await);
    let shown = file.to_str().expect("a text");
    managed_save(&domain, &[]).await.expect("saved");
    let (whole, disk) = (std::fs::read(&file).expect("read"), std::fs::read(&tick.disk).expect("read"));
    let mut watch = domain.client.watch().await;
    let mut changed = whole.clone();
    let last = changed.len() - 100;
    changed[last] ^= 1;
    for (bytes, word) in [(&whole[..whole.len() - 1], "cut off"), (&changed[..], "changed"), (b"no", "no machine")] {
        std::fs::write(&file, bytes).expect("written");
        refused(domain.run("Start").await, "InvalidArgument", &[shown, word, "force-boot"]);
        assert!(has_managed_save(&domain).await && std::fs::read(&file).expect("read") == bytes, "it is kept");
    }
    std::fs::remove_file(&file).expect("removed");
    refused(domain.run("Start").await, "StorageFailed", &[shown, "force-boot"]);
    std::fs::write(&file, &whole).expect("as it was");
    let taken = Command::new("qemu-img").args(["snapshot", "-c", "beside"]).arg(&tick.disk).status();
    assert!(taken.expect("qemu-img").success());
    refused(domain.run("Start").await, "OperationInvalid", &["vda", "force-boot"]);
    assert_eq!(domain.state().await, ("shutoff".into(), "saved".into()));
    // So has one that a snapshot has frozen.
    std::fs::write(&tick.disk, &disk).expect("as it was");
    let player = Player { domain: domain.clone() };
    let outside = options([("name", Variant::from("outside")), ("disk-only", Variant::from(true))]);
    player.create("", outside).await.expect("taken");
    refused(domain.run("Start").await, "OperationInvalid", &["vda", "outside", "force-boot"]);
    player.call("outside", "Delete", options([])).await.expect("deleted");
    // As the disk was, it is as good as before; what was written to it since, only a boot can go with.
    std::fs::write(&tick.disk, &disk).expect("as it was");
    domain.call("Start", &(options([("paused", Variant::from(true))]),)).await.expect("started");
    assert_eq!(watch.lifecycle(&domain.path).await, "started restored", "and nothing was told before");
    managed_save(&domain, &[]).await.expect("saved");
    let taken = Command::new("qemu-img").args(["snapshot", "-c", "beside"]).arg(&tick.disk).status();
    assert!(taken.expect("qemu-img").success());
    let mut watch = domain.client.watch().await;
    domain.call("Start", &(options([("force-boot", Variant::from(true))]),)).await.expect("booted");
    assert_eq!(watch.lifecycle(&domain.path).await, "started booted");
    assert!(!file.exists() && !has_managed_save(&domain).await);
    domain.run("Destroy").await.expect("destroyed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_starts_with_the_host_goes_on_from_its_managed_save() {
    let Some((mut daemon, domain, tick)) = ticking("host").await else { return };
    let file = managed_file(&daemon, &domain.property::<String>("UUID").await);
    let autostart = ("org.virt.Domain", "Autostart", Variant::from(true));
    domain.client.call(&domain.path, "org.freedesktop.DBus.Properties.Set", &autostart).await.expect("set");
    managed_save(&domain, &[]).await.expect("saved");
    let (before, boots) = tick.counted().expect("it counted");
    // What the host knew since it booted is gone.
    daemon.kill_virtd().await;
    std::fs::remove_dir_all(daemon.root().join("run/virt")).expect("removed");
    daemon.start_virtd().await;
    tick.counts_to(before + 2).await;
    assert_eq!(tick.counted().expect("it counts").1, boots, "it has not booted");
    let domain = Domain { client: Client { connection: daemon.connect().await }, path: domain.path };
    domain.is_looked_after().await;
    assert_eq!(domain.state().await, ("running".into(), "restored".into()));
    assert!(!file.exists() && !has_managed_save(&domain).await);
    domain.run("Destroy").await.expect("destroyed");
}

/// virtd may be killed after the guest runs and before its file is gone; and while the machine is off, which changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_virtd_that_finds_a_guest_beside_its_managed_save_removes_that() {
    let Some((mut daemon, domain, tick)) = ticking("found").await else { return };
    let file = managed_file(&daemon, &domain.property::<String>("UUID").await);
    let again = async |daemon: &Daemon| Domain {
        client: Client { connection: daemon.connect().await },
        path: domain.path.clone(),
    };
    managed_save(&domain, &[]).await.expect("saved");
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    let later = again(&daemon).await;
    assert!(has_managed_save(&later).await, "it is found again");
    assert_eq!(later.state().await, ("shutoff".into(), "saved".into()));
    let kept = std::fs::read(&file).expect("read");
    later.run("Start").await.expect("started");
    tick.goes_on().await;
    daemon.kill_virtd().await;
    std::fs::write(&file, kept).expect("as if it had not gone yet");
    daemon.start_virtd().await;
    let later = again(&daemon).await;
    assert_eq!(later.state().await, ("running".into(), "restored".into()));
    assert!(!file.exists() && !has_managed_save(&later).await);
    tick.goes_on().await;
    later.run("Destroy").await.expect("destroyed");
    assert!(!has_managed_save(&later).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revert_removes_a_managed_save() {
    let Some((daemon, domain, tick)) = ticking("reverted").await else { return };
    let file = managed_file(&daemon, &domain.property::<String>("UUID").await);
    let player = Player { domain: domain.clone() };
    player.take("running").await;
    domain.run("Destroy").await.expect("destroyed");
    player.take("off").await;
    for (name, after) in [("off", "shutoff"), ("running", "running")] {
        if domain.property::<String>("State").await == "shutoff" {
            domain.run("Start").await.expect("started");
            tick.counts_to(3).await;
        }
        managed_save(&domain, &[]).await.expect("saved");
        let told = player.check(name, "CheckRevert", options([])).await;
        let files: Vec<(String, String, u64)> = told["files"].clone().try_into().expect("a(sst)");
        let bytes = std::fs::metadata(&file).expect("it is there").len();
        let goes = (file.to_str().expect("a text").to_owned(), "deleted".to_owned(), bytes);
        assert!(files.contains(&goes), "{name}: {files:?}");
        if name == "off" {
            refused(player.call(name, "Revert", options([])).await, "RevertRisky", &["managed-save"]);
            assert!(file.exists() && has_managed_save(&domain).await);
            let force = options([("force", Variant::from(vec!["managed-save"]))]);
            player.call(name, "Revert", force).await.expect("reverted");
        } else {
            player.call(name, "Revert", options([])).await.expect("its memory takes the place of what was saved");
        }
        assert_eq!(domain.property::<String>("State").await, after);
        assert!(!file.exists() && !has_managed_save(&domain).await, "{name}");
    }
    domain.run("Destroy").await.expect("destroyed");
}

/// Whoever may not save may not do so for the next start either; the configuration of then is read as today's is.
#[tokio::test(flavor = "multi_thread")]
async fn on_the_system_bus_a_managed_save_needs_no_right_to_define() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let Some((domain, tick)) = another(&daemon, "wallsaved").await else { return };
    let file = managed_file(&daemon, &domain.property::<String>("UUID").await);
    let stranger = Client { connection: daemon.connect_as(&ALICE).await };
    let theirs = Domain { client: stranger.clone(), path: domain.path.clone() };
    let (name, text) = managed_save(&theirs, &[]).await.expect_err("denied");
    assert!(text.contains("org.virt.domain.save"), "{name}: {text}");
    managed_save(&domain, &[]).await.expect("saved");
    let made = std::fs::metadata(&file).expect("it is there");
    assert_eq!((made.mode() & 0o7777, made.uid()), (0o600, 0));
    let (name, text) = theirs.bare("ManagedSaveRemove").await.expect_err("denied");
    assert!(text.contains("org.virt.domain.save"), "{name}: {text}");
    let secret = ("secure", Variant::from(true));
    let (name, text) = theirs.call("GetManagedSaveXML", &(options([secret]),)).await.expect_err("denied");
    assert!(text.contains("org.virt.domain.read-secure"), "{name}: {text}");
    domain.run("Start").await.expect("started");
    tick.goes_on().await;
    assert!(!file.exists());
    domain.run("Destroy").await.expect("destroyed");
}
