//! Snapshots of real guests: memory proved by a counter that goes back, disks by what they hold.

use crate::common::Daemon;
use crate::common::client::{Client, options};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use std::path::{Path, PathBuf};
use std::process::Command;
use zbus::Variant;

/// A daemon and a defined tick guest.
async fn tick(name: &str) -> Option<(Daemon, Player, Tick)> {
    let daemon = Daemon::on_session_bus().await?;
    let tick = Tick::new(&daemon, name, "")?;
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&tick.xml).await.expect("defined");
    Some((daemon, Player { domain }, tick))
}

/// The names of snapshots inside an image.
fn inside(image: &Path) -> Vec<String> {
    let told = Command::new("qemu-img").args(["info", "-U", "--output=json"]).arg(image).output().expect("qemu-img");
    let told: serde_json::Value = serde_json::from_slice(&told.stdout).expect("JSON");
    let inner = told["snapshots"].as_array().into_iter().flatten();
    inner.filter_map(|one| one["name"].as_str().map(str::to_owned)).collect()
}

/// Holds an image that nobody has open to be sound.
fn is_sound(image: &Path) {
    let checked = Command::new("qemu-img").args(["check", "-q"]).arg(image).output().expect("qemu-img");
    assert!(checked.status.success(), "{}: {}", image.display(), String::from_utf8_lossy(&checked.stderr));
}

/// The files beside an image whose names begin as its own, sorted.
fn beside(image: &Path) -> Vec<PathBuf> {
    let stem = image.file_stem().expect("a name").to_string_lossy().into_owned();
    let entries = std::fs::read_dir(image.parent().expect("a folder")).expect("a folder");
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    found.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&stem)));
    found.retain(|path| path.extension().is_none_or(|extension| extension != "serial"));
    found.sort();
    found
}

#[tokio::test]
async fn a_counter_goes_back_with_its_disk_in_the_same_process() {
    let Some((daemon, player, tick)) = tick("back").await else { return };
    player.domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    player.take("three").await;
    let process = daemon.qemu_of(&tick.name).expect("it runs");
    let (taken, _) = tick.counted().expect("it counted");
    tick.counts_to(taken + 8).await;
    player.call("three", "Revert", options([])).await.expect("reverted");
    tick.goes_back_below(taken + 4).await;
    assert_eq!(daemon.qemu_of(&tick.name), Some(process), "the same process");
    assert_eq!(player.domain.state().await, ("running".to_owned(), "from-snapshot".to_owned()));
    assert_eq!(inside(&tick.disk), ["three"]);

    // Deleted while it runs; then off, and back from there.
    player.take("more").await;
    player.call("three", "Delete", options([])).await.expect("deleted");
    assert_eq!(inside(&tick.disk), ["more"]);
    let (later, _) = tick.counted().expect("it counts");
    player.domain.run("Destroy").await.expect("destroyed");
    player.call("more", "Revert", options([])).await.expect("reverted");
    tick.goes_back_below(later + 6).await;
    assert_eq!(inside(&tick.disk), ["more"], "nothing kept aside is left");
    player.domain.run("Destroy").await.expect("destroyed");
    player.call("more", "Delete", options([])).await.expect("deleted");
    assert!(inside(&tick.disk).is_empty());
    is_sound(&tick.disk);
}

#[tokio::test]
async fn overlays_take_the_writes_and_go_again() {
    let Some((_daemon, player, tick)) = tick("outside").await else { return };
    player.domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    let memory = tick.disk.with_file_name("outside-memory");
    let xml = format!(
        "<domainsnapshot><name>full</name><memory snapshot='external' file='{}'/></domainsnapshot>",
        memory.display()
    );
    player.create(&xml, options([])).await.expect("taken");
    let (taken, boots) = tick.counted().expect("it counted");
    let overlay = tick.disk.with_file_name("outside.full");
    assert!(overlay.exists() && memory.exists());
    assert!(player.domain.xml().await.contains("outside.full"));
    tick.counts_to(taken + 5).await;
    player
        .create("<domainsnapshot><name>disk</name></domainsnapshot>", with([("disk-only", true)]))
        .await
        .expect("taken");
    assert_eq!(player.get::<String>("disk", "State").await, "disk-snapshot");
    let second = tick.disk.with_file_name("outside.disk");
    assert!(second.exists() && player.domain.xml().await.contains("outside.disk"));
    tick.counts_to(taken + 8).await;

    // Back to memory in a file: a new process.
    let (name, why) = player.call("full", "Revert", options([])).await.expect_err("a new process");
    assert!(name.ends_with("RevertRisky") && why.contains("new-process"), "{why}");
    player.call("full", "Revert", with([("force", true)])).await.expect("forced");
    tick.goes_back_below(taken + 4).await;
    assert_eq!(tick.counted().map(|(_, boots)| boots), Some(boots), "not booted again");
    tick.counts_to(taken + 6).await;

    // Merged while it runs, and when it is off.
    player.call("disk", "Delete", options([])).await.expect("deleted");
    assert!(!second.exists());
    player.call("full", "Delete", options([])).await.expect("merged");
    assert!(!overlay.exists() && !memory.exists());
    assert!(player.domain.xml().await.contains("outside.qcow2"));
    let (now, _) = tick.counted().expect("it counts");
    tick.counts_to(now + 2).await;
    player.domain.run("Destroy").await.expect("destroyed");
    assert_eq!(beside(&tick.disk), std::slice::from_ref(&tick.disk), "nothing is left");
    is_sound(&tick.disk);
    player.domain.run("Start").await.expect("it boots");
    tick.boots_to(boots + 1).await;
}

#[tokio::test]
async fn a_domain_that_is_off_has_snapshots_inside_and_outside() {
    let Some((_daemon, player, tick)) = tick("off").await else { return };
    player.take("inner").await;
    assert_eq!(inside(&tick.disk), ["inner"]);
    let before = std::fs::read(&tick.disk).expect("read");
    player.domain.run("Start").await.expect("started");
    tick.boots_to(1).await;
    tick.counts_to(3).await;
    player.domain.run("Destroy").await.expect("destroyed");
    assert_ne!(std::fs::read(&tick.disk).expect("read"), before);
    player.call("inner", "Revert", options([])).await.expect("reverted");
    assert_eq!(player.domain.state().await, ("shutoff".to_owned(), "from-snapshot".to_owned()));
    is_sound(&tick.disk);
    player
        .create("<domainsnapshot><name>outer</name></domainsnapshot>", with([("disk-only", true)]))
        .await
        .expect("taken");
    assert!(player.domain.xml().await.contains("off.outer"));
    let (name, why) = player.call("inner", "Revert", options([])).await.expect_err("frozen");
    assert!(name.ends_with("OperationUnsupported") && why.contains("'outer'"), "{why}");
    player.domain.run("Start").await.expect("started");
    // The count of boots is on the disk: it was taken back with it.
    tick.boots_to(1).await;
    player.domain.run("Destroy").await.expect("destroyed");
    player.call("outer", "Delete", options([])).await.expect("merged");
    assert!(player.domain.xml().await.contains("off.qcow2"));
    player.call("inner", "Delete", options([])).await.expect("deleted");
    assert_eq!(beside(&tick.disk), std::slice::from_ref(&tick.disk));
    is_sound(&tick.disk);
}

#[tokio::test]
async fn what_would_lose_data_is_refused() {
    let Some((_daemon, player, tick)) = tick("traps").await else { return };
    player.domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    let disk_only = || with([("disk-only", true)]);
    player.create("<domainsnapshot><name>outer</name></domainsnapshot>", disk_only()).await.expect("taken");
    player.take("inner").await;
    let overlay = tick.disk.with_file_name("traps.outer");
    assert_eq!(inside(&overlay), ["inner"]);
    let (name, why) = player.call("outer", "Delete", options([])).await.expect_err("would lose it");
    assert!(name.ends_with("OperationUnsupported") && why.contains("'inner'"), "{why}");
    // A name that only the image knows.
    player.call("inner", "Delete", with([("metadata-only", true)])).await.expect("forgotten");
    let (name, why) =
        player.create("<domainsnapshot><name>inner</name></domainsnapshot>", options([])).await.expect_err("there");
    assert!(name.ends_with("SnapshotExists") && why.contains("traps.outer"), "{why}");
    // A file that is in the way.
    let second = tick.disk.with_file_name("traps.second");
    std::fs::write(&second, "precious").expect("written");
    let (name, why) =
        player.create("<domainsnapshot><name>second</name></domainsnapshot>", disk_only()).await.expect_err("there");
    assert!(name.ends_with("ConfigUnsupported") && why.contains("traps.second"), "{why}");
    assert_eq!(std::fs::read(&second).expect("read"), b"precious");
    let (now, _) = tick.counted().expect("it counts");
    tick.counts_to(now + 2).await;
}

#[tokio::test]
async fn what_a_disk_throws_away_is_in_no_snapshot() {
    let Some((_daemon, player, tick)) = tick("forgets").await else { return };
    player.create("<domainsnapshot><name>before</name></domainsnapshot>", options([])).await.expect("taken");
    let uuid: String = player.domain.property("UUID").await;
    let changed = tick.xml.replacen("<target dev='vda'", "<transient/><target dev='vda'", 1);
    let changed = changed.replace("<name>", &format!("<uuid>{uuid}</uuid><name>"));
    player.domain.client.define(&changed).await.expect("redefined");
    player.domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    let one = "<domainsnapshot><name>one</name></domainsnapshot>";
    for wish in [options([]), with([("disk-only", true)])] {
        let (name, why) = player.create(one, wish).await.expect_err("it would be of nothing");
        assert!(name.ends_with("ConfigUnsupported") && why.contains("throws away what is written"), "{name}: {why}");
    }
    player.domain.run("Destroy").await.expect("destroyed");
    player.call("before", "Revert", options([])).await.expect("reverted");
    is_sound(&tick.disk);
}

#[tokio::test]
async fn an_edit_that_breaks_the_guests_abi_is_refused_and_forced() {
    let Some((_daemon, player, tick)) = tick("abi").await else { return };
    player.domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    player.take("small").await;
    let (taken, _) = tick.counted().expect("it counted");
    player.domain.run("Destroy").await.expect("destroyed");
    let uuid: String = player.domain.property("UUID").await;
    let larger = tick.xml.replace("<memory unit='MiB'>16", "<memory unit='MiB'>32");
    let larger = larger.replace("<name>", &format!("<uuid>{uuid}</uuid><name>"));
    player.domain.client.define(&larger).await.expect("redefined");
    player.domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    let (name, why) = player.call("small", "Revert", options([])).await.expect_err("another machine");
    assert!(name.ends_with("RevertRisky") && why.contains("/memory") && why.contains("16384"), "{why}");
    let accepted = options([("force", Variant::from(vec!["abi-changed", "new-process"]))]);
    player.call("small", "Revert", accepted).await.expect("forced");
    tick.counts_to(taken + 1).await;
    assert!(player.domain.xml().await.contains("<memory unit='KiB'>16384"));
    assert!(!player.domain.property::<bool>("ConfigChanged").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_leaves_everything_as_it_was() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "full", "") else { return };
    let room = daemon.folder().join("room");
    std::fs::create_dir(&room).expect("a folder");
    let mounted = daemon.inside("mount").args(["-t", "tmpfs", "-o", "size=48m", "none"]).arg(&room).status();
    assert!(mounted.expect("mount").success());
    let disk = room.join("full.qcow2");
    assert!(daemon.inside("cp").arg(&tick.disk).arg(&disk).status().expect("cp").success());
    let client = Client { connection: daemon.connect().await };
    let xml = tick.xml.replace(&*tick.disk.to_string_lossy(), &disk.to_string_lossy());
    let player = Player { domain: client.define(&xml).await.expect("defined") };
    player.domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    let filler = room.join("filler");
    let fill = format!("dd if=/dev/zero of={} bs=64k 2>/dev/null", filler.display());
    let internal = "<domainsnapshot><name>new</name></domainsnapshot>".to_owned();
    let external = format!(
        "<domainsnapshot><name>new</name><memory snapshot='external' file='{}'/></domainsnapshot>",
        room.join("memory").display()
    );
    // When all has been checked: noted, and where virtd has the guest pause for it, paused.
    for (step, xml) in [(2, internal), (3, external)] {
        daemon.at_step(step, &fill);
        let (name, why) = player.create(&xml, options([])).await.expect_err("no room");
        assert!(daemon.step_came());
        assert!(name.ends_with("NoSpace") || name.ends_with("HypervisorFailed"), "{name}: {why}");
        assert_eq!(player.domain.property::<u32>("SnapshotCount").await, 0);
        assert_eq!(player.domain.state().await.0, "running");
        tick.goes_on().await;
        assert!(daemon.inside("rm").arg(&filler).status().expect("rm").success());
        let listed = daemon.inside("ls").arg(&room).output().expect("ls");
        assert_eq!(String::from_utf8_lossy(&listed.stdout).trim(), "full.qcow2", "nothing is left");
    }
    // With nothing free it is not even begun.
    assert!(!daemon.inside("sh").args(["-c", &fill]).status().expect("sh").success());
    let (name, why) = player.create("<domainsnapshot/>", options([])).await.expect_err("no room");
    assert!(name.ends_with("NoSpace") && why.contains("MiB are needed"), "{name}: {why}");
    assert!(daemon.inside("rm").arg(&filler).status().expect("rm").success());
    player.take("now").await;
    tick.goes_on().await;
    player.domain.run("Destroy").await.expect("destroyed");
    let checked = daemon.inside("qemu-img").args(["check", "-q"]).arg(&disk).status().expect("qemu-img");
    assert!(matches!(checked.code(), Some(0 | 3)), "{checked}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cancelled_leaves_nothing() {
    let Some((daemon, player, tick)) = tick("cancelled").await else { return };
    player.domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    let file = tick.disk.with_extension("memory");
    let external = format!(
        "<domainsnapshot><name>out</name><memory snapshot='external' file='{}'/></domainsnapshot>",
        file.display()
    );
    for xml in ["<domainsnapshot><name>in</name></domainsnapshot>", &external] {
        // It waits there for as long as it takes to be cancelled.
        daemon.at_step(3, "sleep 1");
        let reply = player.domain.call("CreateSnapshot", &(xml, with([("no-wait", true)]))).await.expect("accepted");
        let (_, job): (zbus::OwnedObjectPath, zbus::OwnedObjectPath) = reply.body().deserialize().expect("oo");
        let mut watch = player.domain.client.watch().await;
        player.domain.client.call(job.as_str(), "org.virt.Job.Cancel", &()).await.expect("asked");
        while player.domain.client.property::<String>(job.as_str(), "org.virt.Job", "State").await == "running" {
            watch.next().await;
        }
        let state: String = player.domain.client.property(job.as_str(), "org.virt.Job", "State").await;
        assert_eq!(state, "cancelled", "{xml}");
        assert_eq!(player.domain.property::<u32>("SnapshotCount").await, 0);
        tick.goes_on().await;
        assert_eq!(player.domain.state().await.0, "running");
        assert!(inside(&tick.disk).is_empty());
        assert_eq!(beside(&tick.disk), std::slice::from_ref(&tick.disk));
    }
}

#[tokio::test]
async fn the_other_ways_to_take_one() {
    let Some((_daemon, player, tick)) = tick("ways").await else { return };
    player.domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    // Without a record.
    let bare = with([("no-metadata", true), ("disk-only", true)]);
    let path = player.create("<domainsnapshot><name>bare</name></domainsnapshot>", bare).await.expect("taken");
    assert_eq!((path.as_str(), player.domain.property::<u32>("SnapshotCount").await), ("/", 0));
    assert!(player.domain.xml().await.contains("ways.bare"));
    // On an overlay that the caller has made.
    let own = tick.disk.with_file_name("ways.own");
    let base = tick.disk.with_file_name("ways.bare");
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-u", "-b"])
        .args([&base, &own])
        .arg("1M")
        .status();
    assert!(status.expect("qemu-img").success());
    let xml = format!(
        "<domainsnapshot><name>reused</name><disks><disk name='vda'><source file='{}'/></disk></disks></domainsnapshot>",
        own.display()
    );
    player.create(&xml, with([("disk-only", true), ("reuse-external", true)])).await.expect("taken");
    tick.goes_on().await;
    // While it runs, but for the end.
    let memory = tick.disk.with_extension("live-memory");
    let xml = format!("<domainsnapshot><name>live</name><memory file='{}'/></domainsnapshot>", memory.display());
    player.create(&xml, with([("live", true)])).await.expect("taken");
    tick.goes_on().await;
    // Where the caller copies every disk nothing is done, and the guest is not left standing for it.
    let manual =
        "<domainsnapshot><name>manual</name><disks><disk name='vda' snapshot='manual'/></disks></domainsnapshot>";
    let (error, why) = player.create(manual, with([("disk-only", true)])).await.expect_err("nothing to be done");
    assert!(error.ends_with("ConfigUnsupported") && why.contains("at least one external disk"), "{error}: {why}");
    tick.goes_on().await;
    // And off.
    let mut watch = player.domain.client.watch().await;
    player.create("<domainsnapshot><name>last</name></domainsnapshot>", with([("halt", true)])).await.expect("taken");
    let events = watch.until(&player.domain.path, "stopped from-snapshot").await;
    assert_eq!(events, ["suspended paused", "stopped from-snapshot"]);
    assert_eq!(player.domain.state().await, ("shutoff".to_owned(), "from-snapshot".to_owned()));
    player.call("last", "Revert", options([])).await.expect("reverted");
    tick.goes_on().await;
}

#[tokio::test]
async fn a_tree_of_them_comes_and_goes_in_any_order() {
    let Some((_daemon, player, tick)) = tick("tree").await else { return };
    player.domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    player.grows_and_shrinks(12).await;
    assert!(inside(&tick.disk).is_empty());
    player.domain.run("Destroy").await.expect("destroyed");
    is_sound(&tick.disk);
}

#[tokio::test]
async fn x10_an_overlay_holds_as_much_of_its_tables_in_memory_as_it_is_told() {
    let Some((daemon, player, tick)) = tick("tables").await else { return };
    player.domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    let cache = |bytes: &str| format!("<metadata_cache><max_size unit='bytes'>{bytes}</max_size></metadata_cache>");
    let document = |cache: &str| {
        format!(
            "<domainsnapshot><name>small</name><disks><disk name='vda' snapshot='external'>\
             <driver type='qcow2'>{cache}</driver></disk></disks></domainsnapshot>"
        )
    };
    let disk_only = || with([("disk-only", true)]);
    let (name, why) = player.create(&document(&cache("many")), disk_only()).await.expect_err("no number");
    assert!(name.ends_with("ConfigInvalid") && why.contains("/disks/disk/driver/metadata_cache"), "{name}: {why}");
    player.create(&document(&cache("262144")), disk_only()).await.expect("taken");
    assert!(player.xml("small").await.contains("<max_size unit='bytes'>262144</max_size>"));
    assert!(player.domain.xml().await.contains("<max_size unit='bytes'>262144</max_size>"));
    tick.goes_on().await;
    // The next start says so, too.
    player.domain.run("Destroy").await.expect("destroyed");
    player.domain.run("Start").await.expect("started");
    let process = daemon.qemu_of(&tick.name).expect("it runs");
    let words = std::fs::read_to_string(format!("/proc/{process}/cmdline")).expect("its arguments");
    assert!(words.contains("\"cache-size\":262144"), "{words}");
    tick.goes_on().await;
    player.domain.run("Destroy").await.expect("destroyed");
}
