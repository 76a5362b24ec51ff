//! Images that more than one machine or snapshot stands on: none is written or removed under the others.

use crate::common::Daemon;
use crate::common::client::{Client, options};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use std::path::{Path, PathBuf};
use std::process::Command;
use zbus::OwnedVariant;

const UUID: &str = "5a1d4c3e-2b60-4f0c-9d5e-8f1f0e2b7c01";
const SNAPSHOT: &str = "<domainsnapshot><name>s</name></domainsnapshot>";

/// A daemon, a client, and a tick guest of a uuid that stays.
async fn tick(name: &str) -> Option<(Daemon, Client, Tick)> {
    let daemon = Daemon::on_session_bus().await?;
    let mut tick = Tick::new(&daemon, name, "")?;
    tick.xml = tick.xml.replace("<name>", &format!("<uuid>{UUID}</uuid><name>"));
    let client = Client { connection: daemon.connect().await };
    Some((daemon, client, tick))
}

fn qemu_img(arguments: &[&str], files: &[&Path]) {
    let done = Command::new("qemu-img").args(arguments).args(files).output().expect("qemu-img");
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A machine whose disk is an overlay that was made beside virtd, on these layers.
async fn clone_of(client: &Client, tick: &Tick, name: &str, layers: &[&Path]) -> (Player, PathBuf) {
    let clone = tick.disk.with_file_name(format!("{name}.clone"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"], &[layers[0], &clone]);
    let below = layers.iter().rev().fold("<backingStore/>".to_owned(), |below, layer| {
        let layer = layer.display();
        format!("<backingStore type='file'><format type='qcow2'/><source file='{layer}'/>{below}</backingStore>")
    });
    let serial = tick.serial.with_file_name(format!("{name}.serial"));
    std::fs::write(&serial, "").expect("made");
    let xml = tick.xml.replace(&format!("<uuid>{UUID}</uuid><name>{}<", tick.name), &format!("<name>{name}<"));
    let xml = xml.replace(&*tick.serial.to_string_lossy(), &serial.to_string_lossy());
    let xml = xml.replace(&format!("'{}'", tick.disk.display()), &format!("'{}'", clone.display()));
    let xml = xml.replace("<target dev='vda'", &format!("{below}<target dev='vda'"));
    (Player { domain: client.define(&xml).await.expect("defined") }, clone)
}

fn texts(told: &std::collections::HashMap<String, OwnedVariant>, key: &str) -> String {
    told.get(key).map(|value| format!("{value:?}")).unwrap_or_default()
}

#[tokio::test]
async fn an_overlay_that_another_machine_stands_on_outlives_a_revert_and_is_not_written() {
    let Some((_daemon, client, tick)) = tick("shared").await else { return };
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    player.create(SNAPSHOT, with([("disk-only", true)])).await.expect("taken");
    let overlay = tick.disk.with_extension("s");
    let (other, _) = clone_of(&client, &tick, "other", &[&overlay, &tick.disk]).await;
    let content = std::fs::read(&overlay).expect("read");

    let (name, why) = player.domain.run("Start").await.expect_err("others stand on its disk");
    assert_eq!(name, "org.virt.Error.InUse", "{why}");
    assert!(why.contains("domain 'other' (disk 'vda')") && why.contains(&*overlay.to_string_lossy()), "{why}");

    let told = player.check("s", "CheckRevert", options([])).await;
    assert!(!texts(&told, "files").contains("deleted"), "{told:?}");
    player.call("s", "Revert", options([])).await.expect("reverted");
    assert_eq!(std::fs::read(&overlay).expect("it is still there"), content);
    other.domain.run("Start").await.expect("it stands on what it stood on");
    other.domain.run("Destroy").await.expect("ended");
    player.domain.run("Start").await.expect("on an overlay of its own");
}

#[tokio::test]
async fn a_base_that_another_machine_stands_on_is_not_merged_over() {
    let Some((_daemon, client, tick)) = tick("golden").await else { return };
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    player.create(SNAPSHOT, with([("disk-only", true)])).await.expect("taken");
    let (other, _) = clone_of(&client, &tick, "other", &[&tick.disk]).await;
    let content = std::fs::read(&tick.disk).expect("read");
    let told = player.check("s", "CheckDelete", options([])).await;
    assert!(texts(&told, "reason").contains("domain 'other' (disk 'vda')"), "{told:?}");
    let (name, why) = player.call("s", "Delete", options([])).await.expect_err("others stand on the base");
    assert_eq!(name, "org.virt.Error.InUse", "{why}");
    assert!(why.contains("domain 'other' (disk 'vda')") && why.contains(&*tick.disk.to_string_lossy()), "{why}");
    assert_eq!(std::fs::read(&tick.disk).expect("read"), content);
    other.domain.run("Undefine").await.expect("undefined");
    player.call("s", "Delete", options([])).await.expect("merged, now that nobody needs it");
}

/// A frozen file that was written is recognised by who stands on it, too.
#[tokio::test]
async fn a_machine_that_stands_on_a_frozen_file_that_was_written_is_told_so_and_starts() {
    let Some((daemon, client, tick)) = tick("below").await else { return };
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    player.create(SNAPSHOT, with([("disk-only", true)])).await.expect("taken");
    let xml = player.domain.xml().await;
    let told = async || {
        let told = client.call("/org/virt", "org.virt.Manager.ValidateDomain", &(&*xml, options([]))).await;
        let told: Vec<(String, u32, u32, String)> = told.expect("told").body().deserialize().expect("findings");
        told.into_iter().filter(|one| one.3.contains("since a snapshot froze it")).collect::<Vec<_>>()
    };
    assert_eq!(told().await, []);
    player.domain.run("Start").await.expect("started");
    player.domain.run("Destroy").await.expect("destroyed");
    assert!(!daemon.log().contains("since a snapshot froze it"));
    let write = ["-f", "qcow2", "-c", "write -P 7 512k 64k"];
    assert!(Command::new("qemu-io").args(write).arg(&tick.disk).status().expect("qemu-io").success());
    let told = told().await;
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].0 == "warning" && told[0].3.contains(&*tick.disk.to_string_lossy()), "{told:?}");
    player.domain.run("Start").await.expect("nothing is refused");
    assert!(daemon.log().contains("since a snapshot froze it"), "the log tells it");
    player.domain.run("Destroy").await.expect("destroyed");
}

#[tokio::test]
async fn a_locked_image_is_told_with_disk_and_machine_that_has_it() {
    let Some((_daemon, client, tick)) = tick("first").await else { return };
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    player.domain.run("Start").await.expect("started");
    let second = tick.xml.replace(&format!("<uuid>{UUID}</uuid><name>first<"), "<name>second<");
    let second = second.replace("first.serial", "second.serial");
    std::fs::write(tick.serial.with_file_name("second.serial"), "").expect("made");
    let second = Player { domain: client.define(&second).await.expect("defined") };
    let told = |why: &str| {
        why.contains("of domain 'second' (disk 'vda')") && why.contains("domain 'first' (disk 'vda') has it open")
    };
    let (name, why) = second.domain.run("Start").await.expect_err("the first one has the disk");
    assert!(told(&why), "{name}: {why}");
    let (name, why) = second.create(SNAPSHOT, options([])).await.expect_err("the first one has the disk");
    assert!(told(&why) && !why.contains("json:"), "{name}: {why}");
}

#[tokio::test]
async fn a_frozen_file_is_not_written_by_a_machine_that_is_defined_on_it_again() {
    let Some((daemon, client, tick)) = tick("again").await else { return };
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    player.create(SNAPSHOT, with([("disk-only", true)])).await.expect("taken");
    let content = std::fs::read(&tick.disk).expect("read");
    // As tools do that define what they are told, each time.
    client.define(&tick.xml).await.expect("it is stored");
    let begun = std::time::Instant::now();
    while !daemon.log().contains("snapshot 's' of domain 'again' (disk 'vda') stands on, and cannot be written") {
        assert!(begun.elapsed() < crate::common::PATIENCE, "the log does not warn: {}", daemon.log());
        // Whoever reads a log is told by nobody.
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let told = client.call("/org/virt", "org.virt.Manager.ValidateDomain", &(&*tick.xml, options([]))).await;
    let told: Vec<(String, u32, u32, String)> = told.expect("told").body().deserialize().expect("findings");
    let refused = |one: &(String, u32, u32, String)| one.0 == "error" && one.3.contains("snapshot 's' of domain");
    assert!(told.iter().any(refused), "{told:?}");
    let again = client.path_from("DefineDomain", &(&*tick.xml, with([("validate", true)]))).await;
    let (name, why) = again.err().expect("it could not start");
    assert!(name.ends_with("ConfigUnsupported") && why.contains("snapshot 's' of domain"), "{name}: {why}");
    let (name, why) = player.domain.run("Start").await.expect_err("its disk is frozen");
    assert_eq!(name, "org.virt.Error.InUse", "{why}");
    assert!(why.contains("snapshot 's' of domain 'again'") && why.contains("revert to"), "{why}");
    let (name, why) = player.create(&SNAPSHOT.replace(">s<", ">inside<"), options([])).await.expect_err("frozen");
    assert_eq!(name, "org.virt.Error.InUse", "{why}");
    assert_eq!(std::fs::read(&tick.disk).expect("read"), content);

    let told = player.check("s", "CheckRevert", options([])).await;
    assert!(texts(&told, "possible").contains("true") && !texts(&told, "risks").contains("frozen"), "{told:?}");
    // Somebody writes it all the same.
    let write = ["-f", "qcow2", "-c", "write -P 7 512k 64k"];
    assert!(Command::new("qemu-io").args(write).arg(&tick.disk).status().expect("qemu-io").success());
    let told = player.check("s", "CheckRevert", options([])).await;
    assert!(texts(&told, "risks").contains("frozen-changed"), "{told:?}");
    let (name, why) = player.call("s", "Revert", options([])).await.expect_err("it is not what was taken");
    assert_eq!(name, "org.virt.Error.RevertRisky", "{why}");
    assert!(why.contains(&*tick.disk.to_string_lossy()), "{why}");
    player.call("s", "Revert", with([("force", true)])).await.expect("reverted");
    player.domain.run("Start").await.expect("on an overlay");
}

#[tokio::test]
async fn an_image_with_a_bitmap_has_no_snapshot_that_could_not_be_gone_back_to() {
    let Some((_daemon, client, tick)) = tick("bitmap").await else { return };
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    let add = || qemu_img(&["bitmap", "--add"], &[&tick.disk, Path::new("b")]);
    let remove = || qemu_img(&["bitmap", "--remove"], &[&tick.disk, Path::new("b")]);
    let command = format!("'qemu-img bitmap --remove {} b'", tick.disk.display());
    // Before it is taken, off and running.
    add();
    for started in [false, true] {
        if started {
            player.domain.run("Start").await.expect("started");
        }
        let told = player.domain.call("CheckCreateSnapshot", &(SNAPSHOT, options([]))).await.expect("told");
        let told: std::collections::HashMap<String, OwnedVariant> = told.body().deserialize().expect("a{sv}");
        assert!(texts(&told, "reason").contains(&command), "{told:?}");
        let (name, why) = player.create(SNAPSHOT, options([])).await.expect_err("no way back");
        assert!(why.contains("'b'") && why.contains(&command), "{name}: {why}");
    }
    player.domain.run("Destroy").await.expect("ended");
    remove();

    // After it was taken.
    player.take("s").await;
    add();
    let told = player.check("s", "CheckRevert", options([])).await;
    assert!(texts(&told, "possible").contains("false") && texts(&told, "reason").contains(&command), "{told:?}");
    let (name, why) = player.call("s", "Revert", options([])).await.expect_err("not with a bitmap");
    assert!(why.contains(&command), "{name}: {why}");
    player.domain.run("Start").await.expect("nothing was begun");
    player.domain.run("Destroy").await.expect("ended");
    remove();
    player.call("s", "Revert", options([])).await.expect("reverted");
    add();
    player.call("s", "Delete", options([])).await.expect("deleted, whatever bitmaps there are");
}
