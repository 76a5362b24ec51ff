//! What snapshots must not cost: nothing that the user has, and nothing that another snapshot stands on, is lost by taking
//! one or by going back to it.

use crate::common::client::{Client, options};
use crate::common::guest::{LoopDevice, Tick};
use crate::common::snapshots::{Player, with};
use crate::common::users::ADMIN;
use crate::common::{Daemon, PATIENCE, Setup, skip};
use serde_json::json;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
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
async fn a_chain_that_is_declared_stays_below_its_overlays() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "cloud", "") else { return };
    let golden = daemon.folder().join("golden.qcow2");
    std::fs::rename(&tick.disk, &golden).expect("moved");
    img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"], &[&golden, &tick.disk]);
    let content = std::fs::read(&golden).expect("read");
    let below = format!(
        "<backingStore type='file'><format type='qcow2'/><source file='{}'/><backingStore/></backingStore>",
        golden.display()
    );
    let player = defined(&daemon, &tick.xml.replace("<target dev='vda'", &format!("{below}<target dev='vda'"))).await;
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
async fn b1_a_number_for_a_name_is_no_other_snapshot() {
    let Some((_daemon, player, tick)) = tick("number").await else { return };
    for name in ["2", "1000000"] {
        let (error, why) = player.create(&named(name), options([])).await.expect_err("a number");
        assert!(error.ends_with("ConfigUnsupported") && why.contains("number"), "{error}: {why}");
    }
    // A date is none that an image counts to.
    player.take("20261128").await;
    player.call("20261128", "Delete", options([])).await.expect("deleted");
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
    let Some(device) = LoopDevice::of(&file) else { return };
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

/// Whether a guest writes nothing for half a second at the `number`-th step of what is done to snapshots next.
struct Still(PathBuf);

impl Still {
    fn at_step(daemon: &Daemon, tick: &Tick, number: u32) -> Still {
        let proof = daemon.folder().join("stood");
        let (serial, shown) = (tick.serial.display(), proof.display());
        let look = format!("a=$(stat -c %s {serial}); sleep 0.5; [ $a = $(stat -c %s {serial}) ] && touch {shown}");
        daemon.at_step(number, &look);
        Still(proof)
    }

    fn stood(&self) -> bool {
        self.0.exists()
    }
}

/// Overlays for tick's own disk, and a second disk that the caller copies.
async fn by_hand(daemon: &Daemon, tick: &Tick) -> Player {
    let second = tick.disk.with_file_name(format!("{}-second.qcow2", tick.name));
    new_image(&second);
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
         <target dev='vdb' bus='virtio'/></disk><serial ",
        second.display()
    );
    let player = defined(daemon, &tick.xml.replace("<serial ", &disk)).await;
    player.domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    player
}

const BY_HAND: &str = "<domainsnapshot><name>hand</name><disks><disk name='vda' snapshot='external'/>\
                       <disk name='vdb' snapshot='manual'/></disks></domainsnapshot>";

#[tokio::test(flavor = "multi_thread")]
async fn disks_copied_by_hand_are_of_the_time_of_the_others() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "hand", "") else { return };
    let player = by_hand(&daemon, &tick).await;
    let quiesce = with([("disk-only", true), ("quiesce", true)]);
    let (error, why) = player.create(BY_HAND, quiesce).await.expect_err("never thawed");
    assert!(error.ends_with("ConfigUnsupported") && why.contains("leave out quiesce"), "{error}: {why}");
    let reply = player.domain.call("CheckCreateSnapshot", &(BY_HAND, disk_only())).await.expect("told");
    let plan: std::collections::HashMap<String, zbus::OwnedVariant> = reply.body().deserialize().expect("a{sv}");
    assert_eq!(*plan["pauses-guest"], zbus::Variant::from(true));
    // Right before the disks are switched.
    let still = Still::at_step(&daemon, &tick, 5);
    player.create(BY_HAND, disk_only()).await.expect("taken");
    assert!(still.stood(), "the guest writes between its disks");
    assert_eq!(player.domain.state().await.0, "paused");
    player.domain.bare("Resume").await.expect("resumed");
    tick.goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_to_stand_stands_when_virtd_was_killed_meanwhile() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "stands", "") else { return };
    let player = by_hand(&daemon, &tick).await;
    // When they have been switched.
    daemon.at_step(6, &format!("kill -9 {}", daemon.virtd_pid()));
    assert!(!player.try_create(BY_HAND, disk_only()).await);
    assert!(daemon.step_came());
    daemon.virtd_died().await;
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let player = Player { domain: client.named("stands").await.expect("still there") };
    assert_eq!(player.domain.property::<u32>("SnapshotCount").await, 1);
    assert_eq!(player.domain.state().await.0, "paused");
    player.domain.bare("Resume").await.expect("resumed");
    tick.goes_on().await;

    // One that was to end, when its memory had been captured.
    let memory = tick.disk.with_extension("memory");
    let xml = format!("<domainsnapshot><name>end</name><memory file='{}'/></domainsnapshot>", memory.display());
    daemon.at_step(8, &format!("kill -9 {}", daemon.virtd_pid()));
    assert!(!player.try_create(&xml, with([("halt", true)])).await);
    assert!(daemon.step_came());
    daemon.virtd_died().await;
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let player = Player { domain: client.named("stands").await.expect("still there") };
    assert_eq!(player.domain.property::<u32>("SnapshotCount").await, 2);
    assert_ne!(player.domain.state().await.0, "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_copied_beside_the_disks_is_of_their_time() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    if !crate::common::have(&["swtpm", "swtpm_setup"]) {
        return;
    }
    let Some(tick) = Tick::new(&daemon, "beside", "") else { return };
    let tpm = "<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm></devices>";
    let player = defined(&daemon, &tick.xml.replace("</devices>", tpm)).await;
    player.domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    let mut watch = player.domain.client.watch().await;
    // When the TPM's state has been copied.
    let still = Still::at_step(&daemon, &tick, 5);
    player.create(&named("quiet"), disk_only()).await.expect("taken");
    assert!(still.stood(), "the guest writes between its TPM and its disks");
    assert!(player.xml("quiet").await.contains("quiet.tpm"), "its state is not copied");
    tick.goes_on().await;
    player.domain.bare("Suspend").await.expect("suspended");
    assert_eq!(watch.until(&player.domain.path, "suspended paused").await, ["suspended paused"]);
    player.domain.run("Destroy").await.expect("destroyed");

    // A record that says that its copy is elsewhere.
    let uuid: String = player.domain.property("UUID").await;
    daemon.kill_virtd().await;
    let record = daemon.root().join("var/lib/virt/snapshots").join(uuid).join("quiet.xml");
    let text = std::fs::read_to_string(&record).expect("its record");
    let precious = daemon.folder().join("precious");
    std::fs::create_dir(&precious).expect("a folder");
    std::fs::write(precious.join("file"), "").expect("written");
    let kept = record.with_file_name(".files").join("quiet.tpm");
    assert!(kept.is_dir() && text.contains(&*kept.to_string_lossy()), "{text}");
    std::fs::write(&record, text.replace(&*kept.to_string_lossy(), &precious.to_string_lossy())).expect("written");
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let player = Player { domain: client.named("beside").await.expect("still there") };
    let (_, why) = player.call("quiet", "Revert", options([])).await.expect_err("not ours");
    assert!(why.contains("is not where copies are kept"), "{why}");
    player.call("quiet", "Delete", options([])).await.expect("deleted");
    assert!(precious.join("file").exists(), "a record says what is removed");
}

#[tokio::test]
async fn a_memory_file_is_removed_only_if_it_is_one_and_loaded_only_whole() {
    let Some((daemon, player, tick)) = tick("memory").await else { return };
    player.domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    let memory = tick.disk.with_extension("memory");
    let xml = format!(
        "<domainsnapshot><name>full</name><memory snapshot='external' file='{}'/></domainsnapshot>",
        memory.display()
    );
    player.create(&xml, options([])).await.expect("taken");
    let whole = std::fs::read(&memory).expect("read");
    std::fs::write(&memory, &whole[..whole.len() - 4096]).expect("written");
    let (_, why) = player.call("full", "Revert", with([("force", true)])).await.expect_err("cut off");
    assert!(why.contains("bring back the whole file"), "{why}");
    assert_eq!(player.domain.state().await.0, "running");
    tick.goes_on().await;

    let precious = daemon.folder().join("precious");
    std::fs::create_dir(&precious).expect("a folder");
    std::fs::write(precious.join("file"), "").expect("written");
    let document = player.xml("full").await;
    for victim in [precious.clone(), precious.join("file")] {
        let other = document.replace(&*memory.to_string_lossy(), &victim.to_string_lossy());
        if player.create(&other, with([("redefine", true)])).await.is_ok() {
            player.call("full", "Delete", options([])).await.expect("deleted");
        }
        assert!(precious.join("file").exists(), "a document says what is removed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_ends_before_its_variables_are_captured_leaves_no_snapshot() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    if !Path::new("/usr/share/qemu/firmware").exists() {
        return skip("there is no UEFI firmware (Debian has it in ovmf)");
    }
    let Some(tick) = Tick::new(&daemon, "ends", "") else { return };
    let firmware = "<os firmware='efi'><firmware><feature enabled='no' name='secure-boot'/></firmware><type ";
    let player = defined(&daemon, &tick.xml.replace("<os><type ", firmware)).await;
    player.domain.run("Start").await.expect("started");
    let before = player.domain.xml().await;
    assert!(before.contains("format='qcow2'"), "{before}");
    // Right before the disks are switched.
    daemon.at_step(4, &format!("kill -9 {}", daemon.qemu_of("ends").expect("it runs")));
    player.create(&named("late"), disk_only()).await.expect_err("it has ended");
    assert!(daemon.step_came());
    assert_eq!(player.domain.property::<u32>("SnapshotCount").await, 0);
    assert!(!tick.disk.with_file_name("ends.late").exists());
    assert_eq!(sources(&player).await, [tick.disk]);
}

#[tokio::test]
async fn a_revert_waits_for_nobody_elses_work_on_a_disk() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "job", "") else { return };
    let (socket, copy) = (daemon.folder().join("second-monitor"), daemon.folder().join("copy"));
    let own = format!(
        "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><qemu:arg value='-qmp'/>\
         <qemu:arg value='unix:{},server=on,wait=off'/></qemu:commandline></domain>",
        socket.display()
    );
    let player = defined(&daemon, &tick.xml.replace("</domain>", &own)).await;
    player.domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    player.take("one").await;
    let stream = tokio::net::UnixStream::connect(&socket).await.expect("a second monitor");
    let mut monitor = BufReader::new(stream);
    let mirror = json!({ "device": "vda-format", "job-id": "somebodys", "target": copy, "sync": "full", "speed": 1 });
    for (command, arguments) in [("qmp_capabilities", json!({})), ("drive-mirror", mirror)] {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        monitor.get_mut().write_all(text.as_bytes()).await.expect("asked");
        let mut answer = String::new();
        while !answer.contains("\"return\"") {
            answer.clear();
            let told = tokio::time::timeout(PATIENCE, monitor.read_line(&mut answer)).await;
            assert_ne!(told.expect("an answer in time").expect("told"), 0);
            assert!(!answer.contains("\"error\""), "{answer}");
        }
    }
    let (error, why) = player.call("one", "Revert", options([])).await.expect_err("somebody is at work");
    assert!(error.ends_with("OperationInvalid") && why.contains("'somebodys'"), "{error}: {why}");
    assert_eq!(player.domain.state().await.0, "running");
    tick.goes_on().await;
}

#[tokio::test]
async fn a_revert_without_room_for_its_overlays_is_not_begun() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "narrow", "") else { return };
    let room = daemon.folder().join("room");
    std::fs::create_dir(&room).expect("a folder");
    let inside =
        |program: &str, arguments: &[&str]| daemon.inside(program).args(arguments).status().expect("it runs").success();
    let shown = room.display().to_string();
    assert!(inside("mount", &["-t", "tmpfs", "-o", "size=4m", "none", &shown]));
    let (from, disk) = (tick.disk.display().to_string(), format!("{shown}/narrow.qcow2"));
    assert!(inside("cp", &[&from, &disk]));
    let player = defined(&daemon, &tick.xml.replace(&from, &disk)).await;
    player.create(&named("one"), disk_only()).await.expect("taken");
    inside("sh", &["-c", &format!("dd if=/dev/zero of={shown}/filler bs=16k 2>/dev/null")]);
    let plan = player.check("one", "CheckRevert", options([])).await;
    assert_eq!(*plan["possible"], zbus::Variant::from(false));
    let (error, why) = player.call("one", "Revert", options([])).await.expect_err("no room");
    assert!(error.ends_with("NoSpace"), "{error}: {why}");
    assert!(inside("rm", &[&format!("{shown}/filler")]));
    player.call("one", "Revert", options([])).await.expect("reverted");
}

#[tokio::test]
async fn with_qemu_as_another_user_all_is_lent_and_given_back() {
    let Some(daemon) = Daemon::on_system_bus(Setup::with_example_rules()).await else { return };
    let Some(tick) = Tick::new(&daemon, "lent", "") else { return };
    for file in [&tick.disk, &tick.serial] {
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600)).expect("set");
    }
    let client = Client { connection: daemon.connect_as(&ADMIN).await };
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    player.domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    player.take("inner").await;
    let memory = tick.disk.with_extension("memory");
    let xml = format!("<domainsnapshot><name>full</name><memory file='{}'/></domainsnapshot>", memory.display());
    player.create(&xml, options([])).await.expect("taken");
    player.create(&named("disk"), disk_only()).await.expect("taken");
    tick.goes_on().await;
    player.call("full", "Revert", with([("force", true)])).await.expect("reverted");
    tick.goes_on().await;
    player.call("disk", "Delete", options([])).await.expect("deleted");
    player.domain.run("Destroy").await.expect("destroyed");
    player.call("full", "Delete", options([])).await.expect("merged");
    player.call("inner", "Revert", options([])).await.expect("reverted");
    tick.goes_on().await;
    player.domain.run("Destroy").await.expect("destroyed");
    daemon.qemu_gone("lent").await;
    assert_eq!(sources(&player).await, std::slice::from_ref(&tick.disk));
    assert!(!memory.exists());
    let data = std::fs::metadata(&tick.disk).expect("there");
    assert_eq!((data.uid(), data.mode() & 0o777), (0, 0o600), "it is still lent");
}
