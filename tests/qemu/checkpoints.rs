//! Checkpoints of real guests: bitmaps in their images, over restarts, snapshots and whatever is killed.

use crate::common::Daemon;
use crate::common::checkpoints::{breaks, call, create, get, list};
use crate::common::client::{Client, Domain, options};
use crate::common::cut_off::{Steps, Victims};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use crate::disks_moved::{copy_to, finish};
use crate::saved::{another, refused, ticking};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// More steps than a checkpoint has.
const STEPS: u32 = 20;

/// The bitmaps that an image holds which nobody has open, each with its flags.
fn bitmaps(image: &Path) -> BTreeMap<String, String> {
    let told = Command::new("qemu-img").args(["info", "--output=json"]).arg(image).output().expect("qemu-img runs");
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let told: serde_json::Value = serde_json::from_slice(&told.stdout).expect("JSON");
    let all = told["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    all.iter().map(|one| (one["name"].as_str().expect("a name").to_owned(), one["flags"].to_string())).collect()
}

async fn broken(domain: &Domain, name: &str) -> String {
    get::<String>(domain, name, "Broken").await
}

/// What a deleted checkpoint has left in a frozen layer keeps nobody from leaving that, and what another needs does.
async fn what_is_needed_stays(player: &Player, tick: &Tick) {
    let domain = &player.domain;
    player.call("off", "Delete", with([("metadata-only", true)])).await.expect("forgotten");
    assert_eq!(bitmaps(&tick.disk).into_keys().collect::<Vec<_>>(), ["one"]);
    domain.run("Start").await.expect("started");
    tick.goes_on().await;
    create(domain, "four").await.expect("created");
    let copy = copy_to(&tick.disk.with_extension("copy"), "qcow2");
    let refusals = [
        domain.call("BlockCopy", &("vda", copy.as_str(), options([]))).await,
        domain.call("BlockCommit", &("vda", "", "", options([]))).await,
    ];
    for refusal in refusals {
        refused(refusal, "OperationInvalid", &["checkpoint 'four'", "delete it"]);
    }
    call(domain, "four", "Delete", options([])).await.expect("deleted");
    finish(domain, domain.call("BlockCommit", &("vda", "", "", options([]))).await).await;
    finish(domain, domain.call("BlockCopy", &("vda", copy.as_str(), options([]))).await).await;
    tick.goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bitmaps_outlive_virtd_the_guest_and_snapshots() {
    let Some((mut daemon, domain, tick)) = ticking("kept").await else { return };
    create(&domain, "one").await.expect("created");
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    let domain = Domain { client: Client { connection: daemon.connect().await }, path: domain.path };
    domain.is_looked_after().await;
    domain.run("Destroy").await.expect("destroyed");
    assert_eq!(bitmaps(&tick.disk)["one"], "[\"auto\"]", "it is put away in order");

    // An overlay goes on with it, made while the machine is off, or while it runs.
    let player = Player { domain: domain.clone() };
    let overlay = |name: &str| {
        let file = tick.disk.with_extension(name);
        let xml = format!(
            "<domainsnapshot><name>{name}</name><disks><disk name='vda' snapshot='external'><source file='{}'/></disk></disks>\
             </domainsnapshot>",
            file.display()
        );
        (xml, file)
    };
    let (off, off_file) = overlay("off");
    player.create(&off, with([("disk-only", true)])).await.expect("taken");
    assert_eq!(bitmaps(&off_file).into_keys().collect::<Vec<_>>(), ["one"]);
    domain.run("Start").await.expect("started");
    let (on, on_file) = overlay("on");
    player.create(&on, with([("disk-only", true)])).await.expect("taken");
    create(&domain, "two").await.expect("created");
    let (name, why) = create(&domain, "two").await.expect_err("it is there");
    assert!(name.ends_with("CheckpointExists"), "{why}");
    domain.run("Destroy").await.expect("destroyed");
    assert_eq!(bitmaps(&on_file).into_keys().collect::<Vec<_>>(), ["one", "two"]);
    domain.run("Start").await.expect("started");
    tick.goes_on().await;

    // Where it began is merged away: that one is broken, and named; what began below tells all that was merged.
    let mut watch = domain.client.watch().await;
    player.call("on", "Delete", options([])).await.expect("deleted");
    let why = breaks(&mut watch, &domain, "two").await;
    assert!(why.contains("'vda'"), "{why}");
    assert_eq!(broken(&domain, "one").await, "");
    call(&domain, "two", "Delete", options([])).await.expect("deleted");

    // QEMU is killed: what it had in memory is lost.
    let qemu = daemon.qemu_of(&tick.name).expect("it runs");
    nix::sys::signal::kill(qemu, nix::sys::signal::Signal::SIGKILL).expect("killed");
    let why = breaks(&mut watch, &domain, "one").await;
    assert!(why.contains("inconsistent") && why.contains("'one'"), "{why}");
    domain.run("Start").await.expect("started");
    create(&domain, "three").await.expect("created beside it");
    assert!(!broken(&domain, "one").await.is_empty() && broken(&domain, "three").await.is_empty());
    call(&domain, "one", "Delete", options([])).await.expect("deleted while it runs");
    domain.run("Destroy").await.expect("destroyed");
    call(&domain, "three", "Delete", options([])).await.expect("deleted while it is off");
    assert_eq!(bitmaps(&off_file).len(), 0);
    assert_eq!(list(&domain).await.len(), 0);

    what_is_needed_stays(&player, &tick).await;
}

/// What is not a qcow2 image is refused by name, and leaves nothing.
#[tokio::test]
async fn an_image_that_keeps_no_bitmap_is_named() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(mut tick) = Tick::new(&daemon, "raw", "") else { return };
    let raw = daemon.folder().join("other.raw");
    std::fs::write(&raw, vec![0; 1 << 20]).expect("written");
    let disk = format!(
        "<disk type='file'><driver type='raw'/><source file='{}'/><target dev='vdb' bus='virtio'/></disk></devices>",
        raw.display()
    );
    tick.xml = tick.xml.replace("</devices>", &disk);
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&tick.xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    let (name, why) = create(&domain, "one").await.expect_err("a raw disk");
    assert!(name.ends_with("ConfigInvalid") && why.contains("'vdb'") && why.contains("checkpoint='no'"), "{why}");
    let only = "<domaincheckpoint><disks><disk name='vda' checkpoint='bitmap'/></disks></domaincheckpoint>";
    crate::common::checkpoints::create_as(&domain, only).await.expect("created of one");
}

/// A checkpoint is created, or deleted, and virtd or QEMU killed at each step there is: it is there or not, and what is told of
/// it is what the image says.
async fn killed_at_every_step(victims: Victims, deletes: bool) {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let what = if deletes { "a deletion" } else { "a creation" };
    let mut steps = Steps::of(what, victims, 3..STEPS);
    loop {
        let step = steps.next();
        let Some((mut domain, tick)) = another(&daemon, &format!("cut{step}")).await else { return };
        if deletes {
            create(&domain, "one").await.expect("created");
        }
        let mut watch = domain.client.watch().await;
        steps.kill(&daemon, &tick.name);
        let path = domain.path.clone();
        let done = match deletes {
            true => {
                let one = crate::common::checkpoints::path(&domain, "one");
                domain.client.ask(&one, "org.virt.Checkpoint.Delete", &(options([]),)).await
            }
            false => {
                let xml = "<domaincheckpoint><name>one</name></domaincheckpoint>";
                domain.client.ask(&path, "org.virt.Domain.CreateCheckpoint", &(xml, options([]))).await
            }
        };
        if !steps.came(&mut daemon, &mut domain, done).await {
            return;
        }
        domain.is_looked_after().await;
        let there = !list(&domain).await.is_empty();
        steps.is_done(there != deletes);
        if victims == Victims::Virtd {
            if there {
                assert_eq!(broken(&domain, "one").await, "", "at {step}");
            }
            domain.run("Destroy").await.expect("destroyed");
            assert_eq!(bitmaps(&tick.disk).contains_key("one"), there, "at {step}");
        } else {
            while !watch.lifecycle(&domain.path).await.starts_with("stopped") {}
            // What QEMU had not put away is lost, and a checkpoint says so.
            if there {
                let why = breaks(&mut watch, &domain, "one").await;
                assert!(why.contains("'one'"), "at {step}: {why}");
            }
            assert!(domain.property::<String>("Broken").await.is_empty(), "at {step}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_while_a_checkpoint_is_created() {
    killed_at_every_step(Victims::Virtd, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_while_a_checkpoint_is_deleted() {
    killed_at_every_step(Victims::Virtd, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_killed_while_a_checkpoint_is_created() {
    killed_at_every_step(Victims::Qemu, false).await;
}
