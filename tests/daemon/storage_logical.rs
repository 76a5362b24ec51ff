//! Pools that are volume groups, with the real tool on loop devices: made, found, removed, and nobody else's meanwhile. What needs a
//! device mapper, which not every kernel has, is done in a guest (`tests/qemu/volume_group.rs`).

use crate::common::client::{Client, options};
use crate::common::guest::LoopDevice;
use crate::common::pools::{Pool, STORAGE, machine};
use crate::common::{Daemon, Setup, have};
use std::fs;
use std::path::Path;
use std::process::Command;

async fn daemon() -> Option<Daemon> {
    match have(&["losetup", "blkid", "lvm"]) {
        true => Daemon::on_system_bus(Setup::default()).await,
        false => None,
    }
}

/// A blank device of the test's.
fn device(daemon: &Daemon, name: &str) -> Option<LoopDevice> {
    let file = daemon.folder().join(name);
    fs::File::create(&file).expect("a file").set_len(64 << 20).expect("its length");
    LoopDevice::of(&file)
}

/// The name of a group that no other test's is: all are the host's.
fn group() -> String {
    format!("virt-test-{}", std::process::id())
}

fn document(device: &Path, more: &str) -> String {
    format!(
        "<pool type='logical'><name>p</name><source><device path='{}'/><name>{}</name><format type='lvm2'/></source>{more}</pool>",
        device.display(),
        group()
    )
}

/// The groups that are there, for LVM itself.
fn groups() -> String {
    let mut command = Command::new("lvm");
    command.args(["vgs", "--noheadings", "--options", "vg_name"]).env("LVM_SUPPRESS_FD_WARNINGS", "1");
    String::from_utf8_lossy(&command.output().expect("lvm").stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_group_is_made_found_and_removed_and_is_nobody_elses() {
    let Some(daemon) = daemon().await else { return };
    let client = Client { connection: daemon.connect().await };
    let Some(device) = device(&daemon, "pv") else { return };
    let pool = Pool::of(&client, &document(&device.0, ""), daemon.folder()).await;
    assert_eq!(pool.get::<String>("Target").await, format!("/dev/{}", group()));
    assert_eq!(pool.get::<Vec<String>>("Features").await, ["create", "resize", "shrink", "upload", "wipe"]);
    let refused = pool.run("Start", options([])).await.expect_err("there is no such group");
    assert!(refused.0.ends_with("StorageFailed") && refused.1.contains("build the pool first"), "{refused:?}");
    // What is on the device stays, unless it is said.
    fs::write(daemon.folder().join("pv"), [b'x'; 4096]).expect("written");
    Command::new("truncate").args(["-s", "64M"]).arg(daemon.folder().join("pv")).status().expect("its length");
    let refused = pool.run("Build", options([])).await.expect_err("something is on it");
    assert!(refused.0.ends_with("OperationInvalid") && refused.1.contains("something unknown is on it"), "{refused:?}");
    let raw = client.define(&machine("raw", &device.0, "raw")).await.expect("defined");
    let refused = pool.run("Build", options([("overwrite", true.into())])).await.expect_err("a machine has it");
    assert!(refused.0.ends_with("InUse") && refused.1.contains("domain 'raw'"), "{refused:?}");
    assert!(!groups().contains(&group()));
    raw.run("Undefine").await.expect("undefined");
    pool.run("Build", options([("overwrite", true.into())])).await.expect("made");
    assert!(groups().contains(&group()));
    pool.run("Build", options([])).await.expect("it is made");
    let find = async || {
        let found = client.call("/org/virt", &format!("{STORAGE}.FindSources"), &("logical", "")).await.expect("found");
        found.body().deserialize::<String>().expect("s")
    };
    let source =
        format!("<device path='{}'/>\n    <name>{}</name>\n    <format type='lvm2'/>", device.0.display(), group());
    assert!(find().await.contains(&source), "{}", find().await);
    is_started_where_that_can_be(&pool, &client, &device).await;
    // A machine's disk is no source, and no pool.
    let raw = client.define(&machine("raw", &device.0, "raw")).await.expect("defined");
    assert!(!find().await.contains(&source), "it is a disk");
    raw.run("Start").await.expect("started");
    let refused = pool.run("Start", options([])).await.expect_err("a guest has it");
    assert!(refused.0.ends_with("InUse") && refused.1.contains("domain 'raw'"), "{refused:?}");
    let refused = pool.run("Delete", options([])).await.expect_err("the same");
    assert!(refused.0.ends_with("InUse") && groups().contains(&group()), "{refused:?}");
    raw.run("Destroy").await.expect("ended");
    pool.run("Delete", options([])).await.expect("removed");
    assert!(!groups().contains(&group()));
    pool.run("Delete", options([])).await.expect("it is gone");
    // Nothing says any more that it was LVM's.
    let told = Command::new("blkid").args(["-p"]).arg(&device.0).output().expect("blkid");
    assert!(!String::from_utf8_lossy(&told.stdout).contains("LVM"), "{told:?}");
}

/// On a kernel without a device mapper the error says so, and nothing is left.
async fn is_started_where_that_can_be(pool: &Pool, client: &Client, device: &LoopDevice) {
    let started = pool.run("Start", options([])).await;
    let Err(refused) = started else {
        let disk = client.define(&machine("late", &device.0, "raw")).await.expect("defined");
        let refused = disk.run("Start").await.expect_err("it is the pool's");
        assert!(refused.0.ends_with("InUse") && refused.1.contains("pool 'p'"), "{refused:?}");
        disk.run("Undefine").await.expect("undefined");
        pool.run("Destroy", options([])).await.expect("stopped");
        return;
    };
    assert!(refused.0.ends_with("OperationUnsupported") && refused.1.contains("no device mapper"), "{refused:?}");
    assert_eq!(pool.get::<String>("State").await, "inactive");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_volume_group_can_be_is_refused_by_name() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let validate = async |xml: &str| {
        let call = client.call("/org/virt", &format!("{STORAGE}.ValidateStoragePool"), &(xml, options([]))).await;
        let found: Vec<(String, u32, u32, String)> = call.expect("validated").body().deserialize().expect("findings");
        found.into_iter().map(|(.., text)| text).collect::<Vec<_>>().join("; ")
    };
    let sound = document(Path::new("/dev/sdz"), "");
    assert_eq!(validate(&sound).await, "");
    let named = |name: &str| format!("<pool type='logical'><name>p</name><source><name>{name}</name></source></pool>");
    for (xml, why) in [
        (named("-a"), "does not begin with -"),
        (named("a b"), "letters, digits and + _ . - alone"),
        (named("a/b"), "letters, digits"),
        (document(Path::new("sdz"), ""), "no absolute path"),
        (document(Path::new("/dev/sdz"), "<target><path>/srv</path></target>"), "not in /srv: leave it out"),
        (sound.replace("<source>", "<features><cow state='no'/></features><source>"), "no file system"),
    ] {
        let found = validate(&xml).await;
        assert!(found.contains(why), "{why}: {found}");
    }
}
