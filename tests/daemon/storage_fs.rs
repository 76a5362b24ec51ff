//! Pools that are file systems on devices, with the kernel's own on loop devices: mounted as long as they are started, whoever is
//! killed meanwhile, and lost when somebody else unmounts them.

use crate::common::client::{Client, Refusal, options};
use crate::common::pools::{POOL, Pool, STORAGE, machine};
use crate::common::users::BOB;
use crate::common::{Daemon, Setup, have, skip};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const MAKERS: [(&str, &str, u64); 3] = [("ext4", "-F", 64), ("xfs", "-f", 300), ("btrfs", "-f", 128)];

/// A block device of the test's, on a file with holes.
struct LoopDevice {
    path: String,
}

impl LoopDevice {
    /// One of so many mebibytes; `None` if there are none here (and says so).
    fn new(daemon: &Daemon, name: &str, mebibytes: u64) -> Option<LoopDevice> {
        let file = daemon.folder().join(format!("{name}.img"));
        fs::File::create(&file).expect("a file").set_len(mebibytes << 20).expect("its length");
        let made = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().expect("losetup");
        if !made.status.success() {
            skip(&format!("no loop devices here: {}", String::from_utf8_lossy(&made.stderr).trim()));
            return None;
        }
        Some(LoopDevice { path: String::from_utf8_lossy(&made.stdout).trim().to_owned() })
    }

    /// One with a file system of that type on it.
    fn formatted(daemon: &Daemon, kind: &str) -> Option<LoopDevice> {
        let (_, force, mebibytes) = MAKERS.into_iter().find(|(known, ..)| *known == kind).expect("a known type");
        let device = LoopDevice::new(daemon, kind, mebibytes)?;
        let made = Command::new(format!("mkfs.{kind}")).args(["-q", force, &device.path]).output().expect("mkfs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Some(device)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // What is still mounted goes with the namespace, and it with that.
        let _ = Command::new("losetup").args(["--detach", &self.path]).status();
    }
}

async fn daemon() -> Option<Daemon> {
    match have(&["losetup", "blkid", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"]) {
        true => Daemon::on_system_bus(Setup::default()).await,
        false => None,
    }
}

fn document(name: &str, device: &str, format: &str, folder: &Path) -> String {
    format!(
        "<pool type='fs'><name>{name}</name><source><device path='{device}'/><format type='{format}'/></source>\
         <target><path>{}</path></target></pool>",
        folder.display()
    )
}

/// A pool on that device, whose folder is there.
async fn defined(daemon: &Daemon, client: &Client, name: &str, device: &LoopDevice, format: &str) -> Pool {
    let folder = daemon.folder().join(name);
    fs::create_dir(&folder).expect("a folder");
    let seen = seen(daemon, &folder);
    Pool::of(client, &document(name, &device.path, format, &folder), &seen).await
}

/// Where this test finds what virtd has at a path: it is in another namespace.
fn seen(daemon: &Daemon, path: &Path) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root{}", daemon.virtd_pid(), path.display()))
}

/// What is mounted there, for virtd: with which options, each of which type.
fn mounts(daemon: &Daemon, name: &str) -> Vec<String> {
    let table = daemon.inside("cat").arg("/proc/self/mountinfo").output().expect("the table").stdout;
    let at = format!(" {} ", daemon.folder().join(name).display());
    String::from_utf8_lossy(&table).lines().filter(|line| line.contains(&at)).map(str::to_owned).collect()
}

fn unmount(daemon: &Daemon, name: &str, lazily: bool) {
    let mut umount = daemon.inside("umount");
    umount.args(lazily.then_some("--lazy")).arg(daemon.folder().join(name));
    assert!(umount.status().expect("umount").success());
}

/// Waits until the pool is in that state.
async fn comes_to(pool: &Pool, state: &str) {
    let mut watch = pool.client.watch().await;
    while pool.get::<String>("State").await != state {
        watch.next().await;
    }
}

/// The same pool as the next virtd has it.
async fn found_again(daemon: &mut Daemon, pool: Pool, name: &str) -> Pool {
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let pool = Pool { client, folder: seen(daemon, &daemon.folder().join(name)), ..pool };
    let mut watch = pool.client.watch().await;
    while pool.get::<String>("State").await == "starting" {
        watch.next().await;
    }
    pool
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_is_mounted_as_long_as_its_pool_is_started() {
    let Some(mut daemon) = daemon().await else { return };
    for (kind, ..) in MAKERS {
        let client = Client { connection: daemon.connect().await };
        let Some(device) = LoopDevice::formatted(&daemon, kind) else { return };
        let format = if kind == "xfs" { kind } else { "auto" };
        let pool = defined(&daemon, &client, kind, &device, format).await;
        assert!(mounts(&daemon, kind).is_empty());
        pool.run("Start", options([])).await.expect(kind);
        let mounted = mounts(&daemon, kind);
        assert!(mounted.len() == 1 && mounted[0].contains(&format!(" - {kind} ")), "{mounted:?}");
        assert!(mounted[0].contains("nosuid,nodev,noexec"), "{mounted:?}");
        let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(&pool.folder).expect("a folder")) & 0o7777;
        assert_eq!(mode, 0o711, "as long as nothing is in it it is as the definition says");
        let features: Vec<String> = pool.get("Features").await;
        assert_eq!(features.iter().any(|feature| feature == "reflink"), kind != "ext4", "{kind}: {features:?}");
        let volume = pool.add("a.img", 1 << 20, options([])).await.expect("made");
        let shared = volume.with("Clone", &("b.img", options([("reflink", "always".into())]))).await;
        assert_eq!(shared.is_ok(), kind != "ext4", "{kind}: {shared:?}");
        // The next virtd finds it as it is.
        daemon.kill_virtd().await;
        let pool = found_again(&mut daemon, pool, kind).await;
        assert_eq!((pool.get::<String>("State").await.as_str(), mounts(&daemon, kind)), ("running", mounted));
        pool.volume("a.img").await.expect("there");
        pool.run("Destroy", options([])).await.expect("stopped");
        assert!(mounts(&daemon, kind).is_empty() && pool.names().is_empty());
        pool.run("Start", options([])).await.expect("started");
        pool.volume("a.img").await.expect("there").run("Delete", options([])).await.expect("deleted");
        pool.run("Destroy", options([])).await.expect("stopped");
        pool.run("Undefine", options([])).await.expect("undefined");
    }
}

/// Nothing is written below the folder that is left.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_that_somebody_else_unmounts_is_lost_and_mounted_again() {
    let Some(daemon) = daemon().await else { return };
    let client = Client { connection: daemon.connect().await };
    let Some(device) = LoopDevice::formatted(&daemon, "ext4") else { return };
    let pool = defined(&daemon, &client, "fs", &device, "ext4").await;
    pool.run("Start", options([])).await.expect("started");
    pool.add("a.img", 1 << 20, options([])).await.expect("made");
    unmount(&daemon, "fs", true);
    comes_to(&pool, "inaccessible").await;
    let problems: Vec<(String, String)> = pool.get("Problems").await;
    assert!(
        problems.len() == 1 && problems[0].0 == "inaccessible" && problems[0].1.contains(&device.path),
        "{problems:?}"
    );
    let refused = pool.add("b.img", 1 << 20, options([])).await.map(|_| ()).expect_err("it is lost");
    assert!(refused.0.ends_with("OperationInvalid"), "{refused:?}");
    assert!(pool.names().is_empty(), "nothing is below the empty folder");
    let web = client.define(&machine("web", &daemon.folder().join("fs/a.img"), "raw")).await.expect("defined");
    let snapshot = "<domainsnapshot><disks><disk name='vda' snapshot='external'/></disks></domainsnapshot>";
    let refused = web.call("CreateSnapshot", &(snapshot, options([("disk-only", true.into())]))).await.map(drop);
    let refused = refused.expect_err("its overlay would be there");
    assert!(refused.1.contains("pool 'fs' is inaccessible"), "{refused:?}");
    pool.run("Refresh", options([])).await.expect("mounted again");
    assert_eq!((pool.get::<String>("State").await.as_str(), mounts(&daemon, "fs").len()), ("running", 1));
    assert_eq!(pool.list().await, [("a.img".to_owned(), "raw".to_owned(), 1 << 20)]);
    // Who stops it when it is lost finds nothing to unmount.
    unmount(&daemon, "fs", true);
    comes_to(&pool, "inaccessible").await;
    pool.run("Destroy", options([])).await.expect("stopped");
    // What is mounted there already is taken, if it is the pool's own.
    let mount = |what: &[&str]| {
        let mounted = daemon.inside("mount").args(what).arg(daemon.folder().join("fs")).status().expect("mount");
        assert!(mounted.success());
    };
    mount(&["-t", "tmpfs", "strangers"]);
    let refused = pool.run("Start", options([])).await.expect_err("something else is there");
    assert!(refused.0.ends_with("OperationInvalid") && refused.1.contains("strangers is mounted there"), "{refused:?}");
    unmount(&daemon, "fs", false);
    // As others mount it there is more in it than a pool's files.
    mount(&[&device.path]);
    let refused = pool.run("Start", options([])).await.expect_err("programs of it could be run");
    assert!(refused.1.contains("is mounted there without nosuid, nodev, noexec"), "{refused:?}");
    assert_eq!(mounts(&daemon, "fs").len(), 1);
    unmount(&daemon, "fs", false);
    mount(&["-o", "nosuid,nodev,noexec", &device.path]);
    pool.run("Start", options([])).await.expect("it is mounted");
    assert_eq!(mounts(&daemon, "fs").len(), 1);
    pool.run("Destroy", options([])).await.expect("stopped");
    assert!(mounts(&daemon, "fs").is_empty());
}

/// What could be a pool, for who looks for one: not what is used already.
#[tokio::test(flavor = "multi_thread")]
async fn devices_with_a_file_system_that_nobody_uses_are_found() {
    let Some(daemon) = daemon().await else { return };
    let client = Client { connection: daemon.connect().await };
    let Some(device) = LoopDevice::formatted(&daemon, "xfs") else { return };
    let Some(empty) = LoopDevice::new(&daemon, "empty", 64) else { return };
    let find = async |kind: &str, xml: &str| {
        let found = client.call("/org/virt", &format!("{STORAGE}.FindSources"), &(kind, xml)).await?;
        Ok::<String, Refusal>(found.body().deserialize().expect("s"))
    };
    let source = format!("<device path='{}'/>\n    <format type='xfs'/>", device.path);
    let found = find("fs", "").await.expect("found");
    assert!(found.starts_with("<sources>") && found.contains(&source), "{found}");
    assert!(!found.contains(&format!("'{}'", empty.path)), "{found}");
    let raw = client.define(&machine("raw", Path::new(&device.path), "raw")).await.expect("defined");
    assert!(!find("fs", "").await.expect("found").contains(&source), "it is a disk");
    raw.run("Undefine").await.expect("undefined");
    let pool = defined(&daemon, &client, "fs", &device, "auto").await;
    pool.run("Start", options([])).await.expect("started");
    assert!(!find("fs", "").await.expect("found").contains(&source), "it is mounted");
    pool.run("Destroy", options([])).await.expect("stopped");
    assert!(find("fs", "").await.expect("found").contains(&source));
    // All devices are read for it.
    let bob = Client { connection: daemon.connect_as(&BOB).await };
    let refused = bob.call("/org/virt", &format!("{STORAGE}.FindSources"), &("fs", "")).await.map(drop);
    assert!(refused.as_ref().is_err_and(|refused| refused.1.contains("org.virt.storage.define")), "{refused:?}");
    for (kind, xml, wanted) in [
        ("fs", "<source/>", "InvalidArgument"),
        ("vfs", "", "InvalidArgument"),
        ("dir", "", "OperationUnsupported"),
        ("disk", "<source/>", "InvalidArgument"),
        ("iscsi", "", "OperationUnsupported"),
        ("logical", "<source/>", "InvalidArgument"),
    ] {
        let refused = find(kind, xml).await.expect_err(kind);
        assert!(refused.0.ends_with(wanted), "{kind}: {refused:?}");
    }
    let types: std::collections::HashMap<String, std::collections::HashMap<String, zbus::OwnedVariant>> =
        client.property("/org/virt", STORAGE, "PoolTypes").await;
    let says = |kind: &str| bool::try_from(types[kind]["find-sources"].try_clone().unwrap()).unwrap();
    assert!(says("fs") && says("logical") && says("disk") && !says("dir") && !says("iscsi"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_in_use_is_mounted_or_unmounted() {
    let Some(daemon) = daemon().await else { return };
    let client = Client { connection: daemon.connect().await };
    let Some(device) = LoopDevice::formatted(&daemon, "ext4") else { return };
    let pool = defined(&daemon, &client, "fs", &device, "auto").await;
    // A guest that writes the device would meet the kernel there.
    let raw = client.define(&machine("raw", Path::new(&device.path), "raw")).await.expect("defined");
    let link = daemon.folder().join("link");
    std::os::unix::fs::symlink(&device.path, &link).expect("a link");
    raw.run("Start").await.expect("started");
    let refused = pool.run("Start", options([])).await.expect_err("a guest has it");
    assert!(refused.0.ends_with("InUse") && refused.1.contains("domain 'raw'"), "{refused:?}");
    assert!(mounts(&daemon, "fs").is_empty() && pool.get::<String>("State").await == "inactive");
    raw.run("Destroy").await.expect("ended");
    // Nobody's mount keeps it from being found, whatever that is called.
    let strange = daemon.folder().join(std::ffi::OsStr::from_bytes(b"\xff"));
    fs::create_dir(&strange).expect("a folder");
    let mounted = daemon.inside("mount").args(["-t", "tmpfs", "none"]).arg(&strange).status().expect("mount");
    assert!(mounted.success());
    pool.run("Start", options([])).await.expect("started");
    // Now it is the pool's, by whatever name.
    let by_link = client.define(&machine("by-link", &link, "raw")).await.expect("defined");
    for machine in [&raw, &by_link] {
        let refused = machine.run("Start").await.expect_err("the pool has it");
        assert!(refused.0.ends_with("InUse") && refused.1.contains("pool 'fs'"), "{refused:?}");
    }
    // On one device there is one pool, wherever it is mounted.
    let other = defined(&daemon, &client, "other", &device, "auto").await;
    let refused = other.run("Start", options([])).await.expect_err("it is another pool's");
    assert!(refused.0.ends_with("InUse") && refused.1.contains("pool 'fs'"), "{refused:?}");
    assert!(mounts(&daemon, "other").is_empty(), "nothing is left of that");
    // Neither is taken away while a guest runs on it, or somebody has a file open.
    pool.add("web.img", 1 << 20, options([])).await.expect("made");
    let web = client.define(&machine("web", &daemon.folder().join("fs/web.img"), "raw")).await.expect("defined");
    web.run("Start").await.expect("started");
    let refused = pool.run("Destroy", options([])).await.expect_err("a guest runs on it");
    assert!(refused.0.ends_with("InUse") && refused.1.contains("domain 'web'"), "{refused:?}");
    web.run("Destroy").await.expect("ended");
    let mut reader = daemon.inside("tail");
    reader.args(["-c", "1", "-f"]).arg(daemon.folder().join("fs/web.img")).stdout(Stdio::piped());
    let mut reader = reader.spawn().expect("tail");
    // Its first word: the file is open.
    std::io::Read::read_exact(reader.stdout.as_mut().expect("its words"), &mut [0]).expect("a byte");
    let refused = pool.run("Destroy", options([])).await.expect_err("it is busy");
    assert!(refused.0.ends_with("OperationInvalid") && refused.1.contains("fuser -vm"), "{refused:?}");
    pool.add("more.img", 1 << 20, options([])).await.expect("it is as before");
    reader.kill().expect("killed");
    reader.wait().expect("ended");
    pool.run("Destroy", options([])).await.expect("stopped");
    assert!(mounts(&daemon, "fs").is_empty());
    let types: std::collections::HashMap<String, std::collections::HashMap<String, zbus::OwnedVariant>> =
        client.property("/org/virt", STORAGE, "PoolTypes").await;
    assert!(bool::try_from(types["fs"]["supported"].try_clone().unwrap()).unwrap());
}

/// What is mounted stays under who runs on it, though the next virtd cannot open it.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_the_next_virtd_cannot_open_is_inaccessible_and_stays_mounted() {
    let Some(mut daemon) = daemon().await else { return };
    let client = Client { connection: daemon.connect().await };
    let Some(device) = LoopDevice::formatted(&daemon, "ext4") else { return };
    let pool = defined(&daemon, &client, "fs", &device, "auto").await;
    pool.run("Start", options([])).await.expect("started");
    client.define(&machine("raw", Path::new(&device.path), "raw")).await.expect("defined");
    let remount = |daemon: &Daemon, how: &str| {
        let mut mount = daemon.inside("mount");
        mount.args(["-o", &format!("remount,bind,{how}")]).arg(daemon.folder().join("fs"));
        assert!(mount.status().expect("mount").success());
    };
    remount(&daemon, "nosuid,noexec,dev");
    daemon.kill_virtd().await;
    let pool = found_again(&mut daemon, pool, "fs").await;
    assert_eq!(pool.get::<String>("State").await, "inaccessible");
    assert_eq!(mounts(&daemon, "fs").len(), 1);
    let raw = pool.client.named("raw").await.expect("it is defined");
    let refused = raw.run("Start").await.expect_err("the pool has it");
    assert!(refused.0.ends_with("InUse") && refused.1.contains("pool 'fs'"), "{refused:?}");
    let refused = pool.run("Destroy", options([])).await.expect_err("it is mounted otherwise");
    assert!(refused.1.contains("without nodev"), "{refused:?}");
    remount(&daemon, "nosuid,noexec,nodev");
    pool.run("Refresh", options([])).await.expect("it is as it was");
    assert_eq!(pool.get::<String>("State").await, "running");
    pool.run("Destroy", options([])).await.expect("stopped");
    assert!(mounts(&daemon, "fs").is_empty());
    raw.run("Start").await.expect("it is free");
}

/// Whatever step virtd is killed at, the pool is mounted and running, or neither.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_is_mounted_and_running_or_neither_wherever_virtd_is_killed() {
    let Some(mut daemon) = daemon().await else { return };
    let client = Client { connection: daemon.connect().await };
    let Some(device) = LoopDevice::formatted(&daemon, "ext4") else { return };
    let mut pool = defined(&daemon, &client, "fs", &device, "auto").await;
    for (verb, wanted) in [("Start", "running"), ("Destroy", "inactive")] {
        for step in 1.. {
            assert!(step < 20, "{verb} never ends");
            let before = if wanted == "running" { "Destroy" } else { "Start" };
            // It may be so already.
            let _ = pool.run(before, options([])).await;
            assert_ne!(pool.get::<String>("State").await, wanted, "{verb} at {step}");
            daemon.at_step(step, &format!("kill -9 {}", daemon.virtd_pid()));
            let did = pool.client.ask(&pool.path, &format!("{POOL}.{verb}"), &(options([]),)).await;
            let ends = !daemon.step_came();
            if !ends {
                daemon.virtd_died().await;
                pool = found_again(&mut daemon, pool, "fs").await;
            }
            let (state, mounted) = (pool.get::<String>("State").await, mounts(&daemon, "fs").len());
            assert!(
                matches!((&*state, mounted), ("running", 1) | ("inactive", 0)),
                "{verb} at {step}: {state}, {mounted}"
            );
            if ends {
                assert!(did && state == wanted, "{verb} is not done though nobody was killed: {state}");
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_is_made_and_nothing_is_overwritten_unasked() {
    let Some(mut daemon) = daemon().await else { return };
    let client = Client { connection: daemon.connect().await };
    let Some(device) = LoopDevice::new(&daemon, "empty", 128) else { return };
    let folder = daemon.folder().join("fs");
    let of = async |client: &Client, daemon: &Daemon, format: &str| {
        let uuid = "<uuid>0f3a1d0e-6c51-4b2b-8d7c-0f0a2f6c7f12</uuid><source>";
        let mode = "</path><permissions><mode>0750</mode></permissions>";
        let xml = document("fs", &device.path, format, &folder).replace("<source>", uuid).replace("</path>", mode);
        Pool::of(client, &xml, &seen(daemon, &folder)).await
    };
    let build = |overwrite: bool| options([("overwrite", overwrite.into())]);
    let pool = of(&client, &daemon, "auto").await;
    let refused = pool.run("Build", build(false)).await.expect_err("of which type?");
    assert!(refused.0.ends_with("InvalidArgument") && refused.1.contains("<format type="), "{refused:?}");
    assert!(!folder.exists(), "nothing was made");
    fs::create_dir(&folder).expect("a folder");
    let refused = pool.run("Start", options([])).await.expect_err("nothing is on it");
    assert!(refused.1.contains("there is no file system on it; build the pool first"), "{refused:?}");
    let pool = of(&client, &daemon, "btrfs").await;
    // What nobody knows is not nothing.
    let writes = |byte: u8| {
        let opened = fs::OpenOptions::new().write(true).open(&device.path).expect("the device");
        std::os::unix::fs::FileExt::write_all_at(&opened, &[byte], 5000).expect("written");
    };
    writes(1);
    let refused = pool.run("Build", build(false)).await.expect_err("something is on it");
    assert!(refused.0.ends_with("OperationInvalid") && refused.1.contains("something unknown is on it"), "{refused:?}");
    writes(0);
    pool.run("Start", options([("build", true.into())])).await.expect("built and started");
    let made = std::os::unix::fs::MetadataExt::mode(&fs::metadata(&pool.folder).expect("a folder"));
    assert_eq!(made & 0o7777, 0o750, "the folder of volumes is as the definition says");
    pool.add("a.img", 1 << 20, options([])).await.expect("made");
    pool.run("Destroy", options([])).await.expect("stopped");
    for refused in [pool.run("Build", build(false)).await, pool.run("Start", options([("build", true.into())])).await] {
        let refused = refused.expect_err("something is on it");
        assert!(refused.0.ends_with("OperationInvalid") && refused.1.contains("there is btrfs on it"), "{refused:?}");
    }
    let raw = client.define(&machine("raw", Path::new(&device.path), "raw")).await.expect("defined");
    let refused = pool.run("Build", build(true)).await.expect_err("it is a disk");
    assert!(refused.0.ends_with("InUse") && refused.1.contains("domain 'raw'"), "{refused:?}");
    raw.run("Undefine").await.expect("undefined");
    let elsewhere = daemon.folder().join("elsewhere");
    fs::create_dir(&elsewhere).expect("a folder");
    assert!(daemon.inside("mount").arg(&device.path).arg(&elsewhere).status().expect("mount").success());
    let refused = pool.run("Build", build(true)).await.expect_err("it is mounted");
    assert!(refused.0.ends_with("OperationInvalid") && refused.1.contains("the host uses it"), "{refused:?}");
    unmount(&daemon, "elsewhere", false);
    pool.run("Start", options([])).await.expect("started");
    assert_eq!(pool.list().await.len(), 1, "nothing is lost");
    pool.run("Destroy", options([])).await.expect("stopped");
    // Whoever is killed leaves what can be built again.
    let mut pool = of(&client, &daemon, "ext4").await;
    for step in 1.. {
        assert!(step < 10, "Build never ends");
        daemon.at_step(step, &format!("kill -9 {}", daemon.virtd_pid()));
        let did = pool.client.ask(&pool.path, &format!("{POOL}.Build"), &(build(true),)).await;
        if !daemon.step_came() {
            assert!(did, "it is not done though nobody was killed");
            break;
        }
        daemon.virtd_died().await;
        pool = found_again(&mut daemon, pool, "fs").await;
        assert!(pool.get::<String>("State").await == "inactive" && mounts(&daemon, "fs").is_empty());
    }
    pool.run("Start", options([])).await.expect("started");
    assert!(pool.list().await.is_empty() && mounts(&daemon, "fs")[0].contains(" - ext4 "));
    pool.run("Destroy", options([])).await.expect("stopped");
    pool.run("Delete", options([])).await.expect("removed");
    assert!(!folder.exists());
}
