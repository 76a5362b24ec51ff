//! What snapshots must not cost: nothing that the user has, and nothing that another snapshot stands on, is lost by taking
//! one or by going back to it.

use crate::common::client::{Client, options};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use crate::common::{Daemon, skip};
use std::path::{Path, PathBuf};
use std::process::Command;
use virt_model::domain::DomainDef;

/// A daemon and a defined tick guest.
async fn tick(name: &str) -> Option<(Daemon, Player, Tick)> {
    let daemon = Daemon::on_session_bus().await?;
    let tick = Tick::new(&daemon, name, "")?;
    let player = defined(&daemon, &tick.xml).await;
    Some((daemon, player, tick))
}

async fn defined(daemon: &Daemon, xml: &str) -> Player {
    let client = Client { connection: daemon.connect().await };
    Player { domain: client.define(xml).await.expect("defined") }
}

fn named(name: &str) -> String {
    format!("<domainsnapshot><name>{name}</name></domainsnapshot>")
}

/// Overlays that the caller names: (disk, file).
fn overlays(name: &str, disks: &[(&str, &Path)]) -> String {
    let disks =
        disks.iter().map(|(target, file)| format!("<disk name='{target}'><source file='{}'/></disk>", file.display()));
    format!("<domainsnapshot><name>{name}</name><disks>{}</disks></domainsnapshot>", disks.collect::<String>())
}

fn disk_only<'a>() -> crate::common::client::Options<'a> {
    with([("disk-only", true)])
}

fn img(arguments: &[&str], files: &[&Path]) {
    let done = Command::new("qemu-img").args(arguments).args(files).output().expect("qemu-img");
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A small image of nothing.
fn new_image(file: &Path) {
    img(&["create", "-q", "-f", "qcow2"], &[file, Path::new("1M")]);
}

/// Fills a part of an image that tick does not use.
fn write(image: &Path, pattern: u8) {
    let mut write = Command::new("qemu-io");
    write.args(["-f", "qcow2", "-c", &format!("write -P {pattern} 512k 64k")]).arg(image);
    let done = write.output().expect("qemu-io");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Whether that part is filled so.
fn holds(image: &Path, pattern: u8) -> bool {
    let mut read = Command::new("qemu-io");
    read.args(["-U", "-r", "-f", "qcow2", "-c", &format!("read -P {pattern} 512k 64k")]).arg(image);
    let told = read.output().expect("qemu-io");
    told.status.success() && !String::from_utf8_lossy(&told.stdout).contains("verification failed")
}

/// The names of snapshots inside an image.
fn inside(image: &Path) -> Vec<String> {
    let told = Command::new("qemu-img").args(["info", "-U", "--output=json"]).arg(image).output().expect("qemu-img");
    let told: serde_json::Value = serde_json::from_slice(&told.stdout).expect("JSON");
    let inner = told["snapshots"].as_array().into_iter().flatten();
    inner.filter_map(|one| one["name"].as_str().map(str::to_owned)).collect()
}

/// The files of a domain's disks.
async fn sources(player: &Player) -> Vec<PathBuf> {
    let def = DomainDef::parse(&player.domain.xml().await).expect("a domain");
    def.devices.disks.iter().filter_map(|disk| disk.path().map(PathBuf::from)).collect()
}

#[tokio::test]
async fn a_chain_that_only_the_image_knows_stays_below_its_overlays() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "cloud", "") else { return };
    let golden = daemon.folder().join("golden.qcow2");
    std::fs::rename(&tick.disk, &golden).expect("moved");
    img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"], &[&golden, &tick.disk]);
    let content = std::fs::read(&golden).expect("read");
    let player = defined(&daemon, &tick.xml).await;
    let before = player.domain.xml().await;
    player.create(&named("off"), disk_only()).await.expect("taken");
    player.domain.run("Start").await.expect("started");
    // Its very program is in the golden image.
    tick.boots_to(1).await;
    player.create(&named("on"), disk_only()).await.expect("taken");
    player.domain.run("Destroy").await.expect("destroyed");
    player.domain.run("Start").await.expect("started");
    tick.boots_to(2).await;
    player.domain.run("Destroy").await.expect("destroyed");
    for name in ["on", "off"] {
        player.call(name, "Delete", options([])).await.expect("deleted");
    }
    assert_eq!(player.domain.xml().await, before);
    player.domain.run("Start").await.expect("started");
    tick.boots_to(3).await;
    assert_eq!(std::fs::read(&golden).expect("read"), content);
}

#[tokio::test]
async fn a_number_for_a_name_is_no_other_snapshot() {
    let Some((_daemon, player, tick)) = tick("number").await else { return };
    for name in ["2", "123456789"] {
        let (error, why) = player.create(&named(name), options([])).await.expect_err("a number");
        assert!(error.ends_with("ConfigUnsupported") && why.contains("number"), "{error}: {why}");
    }
    // Two whose numbers are each other's names, as somebody else may have made them.
    player.take("one").await;
    let document = player.xml("one").await;
    player.call("one", "Delete", options([])).await.expect("deleted");
    for (name, pattern) in [("2", 0x22), ("1", 0x11)] {
        write(&tick.disk, pattern);
        img(&["snapshot", "-c", name], &[&tick.disk]);
        let xml = document.replace("<name>one</name>", &format!("<name>{name}</name>"));
        player.create(&xml, with([("redefine", true)])).await.expect("restored");
    }
    write(&tick.disk, 0x33);
    for (name, pattern) in [("1", 0x11), ("2", 0x22), ("1", 0x11)] {
        player.call(name, "Revert", options([])).await.expect("reverted");
        assert!(holds(&tick.disk, pattern), "'{name}' is another");
    }
    player.call("1", "Delete", options([])).await.expect("deleted");
    assert_eq!(inside(&tick.disk), ["2"]);
    // Names that nobody chose are numbers, too.
    player.create("<domainsnapshot/>", options([])).await.expect("taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_revert_left_is_never_put_back() {
    let Some((daemon, player, tick)) = tick("undo").await else { return };
    player.domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    player.take("good").await;
    player.domain.run("Destroy").await.expect("destroyed");
    let (error, why) = player.create(&named("virtd-undo"), options([])).await.expect_err("ours");
    assert!(error.ends_with("ConfigUnsupported") && why.contains("reverts"), "{error}: {why}");
    write(&tick.disk, 0x11);
    for name in ["virtd-undo", "virtd-undo-7f1e9e0c-58b7-4a8c-9c35-2f2d3a1b6f10"] {
        img(&["snapshot", "-c", name], &[&tick.disk]);
    }
    write(&tick.disk, 0x77);
    // The images are brought back, and then the guest cannot be loaded.
    let disk = tick.disk.display().to_string();
    daemon.at_step(4, &format!("qemu-img snapshot -d good '{disk}'"));
    player.call("good", "Revert", options([])).await.expect_err("it is gone");
    assert!(daemon.step_came());
    assert!(holds(&tick.disk, 0x77), "the state before the revert is lost");
    // What is not ours stays.
    player.take("new").await;
    player.call("new", "Revert", options([])).await.expect("reverted");
    assert!(holds(&tick.disk, 0x77));
    assert_eq!(inside(&tick.disk), ["virtd-undo", "new"]);
}

#[tokio::test]
async fn a_revert_removes_no_overlay_that_may_be_needed() {
    let Some((mut daemon, player, tick)) = tick("needed").await else { return };
    let uuid: String = player.domain.property("UUID").await;
    player.create(&named("one"), disk_only()).await.expect("taken");
    player.create(&named("two"), disk_only()).await.expect("taken");
    // A record that cannot be read stands on what nobody knows.
    let first = tick.disk.with_file_name("needed.one");
    daemon.kill_virtd().await;
    let record = daemon.root().join("var/lib/virt/snapshots").join(uuid).join("two.xml");
    let readable = std::fs::read(&record).expect("its record");
    std::fs::write(&record, "junk").expect("written");
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let player = Player { domain: client.named("needed").await.expect("still there") };
    assert_ne!(player.get::<String>("two", "Broken").await, "");
    player.call("one", "Revert", options([])).await.expect("reverted");
    assert!(first.exists(), "'two' stands on it");
    daemon.kill_virtd().await;
    std::fs::write(&record, readable).expect("written");
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let player = Player { domain: client.named("needed").await.expect("still there") };
    // An overlay with a snapshot inside that no record tells of.
    let top = sources(&player).await.remove(0);
    assert_ne!(top, first);
    img(&["snapshot", "-c", "foreign"], &[&top]);
    player.call("one", "Revert", options([])).await.expect("reverted");
    assert_ne!(sources(&player).await.remove(0), top);
    assert_eq!(inside(&top), ["foreign"]);
    // And one with nothing but work that is given up.
    let top = sources(&player).await.remove(0);
    player.call("one", "Revert", options([])).await.expect("reverted");
    assert!(!top.exists());
    player.call("two", "Revert", options([])).await.expect("reverted");
    player.domain.run("Start").await.expect("started");
    tick.boots_to(1).await;
}

#[tokio::test]
async fn each_disk_goes_back_to_an_overlay_of_its_own() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "pair", "") else { return };
    let images = ["x", "y"].map(|name| daemon.folder().join(name).join("d.qcow2"));
    for (image, pattern) in images.iter().zip([0xaa, 0xbb]) {
        std::fs::create_dir(image.parent().expect("a folder")).expect("a folder");
        new_image(image);
        write(image, pattern);
    }
    let disk = |(target, image): (&str, &PathBuf)| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
             <target dev='{target}' bus='virtio'/></disk>",
            image.display()
        )
    };
    let disks: String = ["vdb", "vdc"].into_iter().zip(&images).map(disk).collect();
    let player = defined(&daemon, &tick.xml.replace("<serial ", &format!("{disks}<serial "))).await;
    let own = ["o1", "o2"].map(|name| daemon.folder().join(name));
    let xml = overlays("both", &[("vdb", &own[0]), ("vdc", &own[1])]);
    player.create(&xml, disk_only()).await.expect("taken");
    player.call("both", "Revert", options([])).await.expect("reverted");
    let now = sources(&player).await;
    assert_ne!(now[1], now[2]);
    assert!(holds(&now[1], 0xaa) && holds(&now[2], 0xbb), "one disk has become the other");
}

#[tokio::test]
async fn a_block_device_that_the_caller_made_an_overlay_is_not_made_anew() {
    let Some((daemon, player, tick)) = tick("device").await else { return };
    let file = daemon.folder().join("device");
    std::fs::File::create(&file).expect("made").set_len(4 << 20).expect("grown");
    let made = Command::new("losetup").args(["--find", "--show"]).arg(&file).output();
    let Some(made) = made.ok().filter(|made| made.status.success()) else { return skip("no loop device to be had") };
    let device = Device(PathBuf::from(String::from_utf8_lossy(&made.stdout).trim()));
    img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"], &[&tick.disk, &device.0]);
    write(&device.0, 0x5a);
    let xml = format!(
        "<domainsnapshot><name>own</name><disks><disk name='vda' type='block'><source dev='{}'/></disk></disks>\
         </domainsnapshot>",
        device.0.display()
    );
    player.create(&xml, with([("disk-only", true), ("reuse-external", true)])).await.expect("taken");
    assert!(holds(&device.0, 0x5a), "what the caller had in it is lost");
}

/// A loop device, for a while.
struct Device(PathBuf);

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}
