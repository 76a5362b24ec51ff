//! Pools that are the partitions of a disk, with the kernel's own on loop devices: made, found, nobody else's meanwhile, and as before
//! or done wherever virtd is killed.

use crate::common::client::{Client, Refusal, descriptor, options};
use crate::common::guest::LoopDevice;
use crate::common::pools::{POOL, Pool, STORAGE, VOLUME, Volume, machine};
use crate::common::{Daemon, Setup, have};
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;
const EFI: &str = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";

async fn daemon() -> Option<Daemon> {
    match have(&["losetup", "blkid", "sfdisk", "partx", "mkfs.ext4"]) {
        true => Daemon::on_system_bus(Setup::default()).await,
        false => None,
    }
}

/// A disk of the test's.
struct Disk(LoopDevice);

impl Disk {
    fn new(daemon: &Daemon) -> Option<Disk> {
        let file = daemon.folder().join("disk");
        fs::File::create(&file).expect("a file").set_len(64 * MIB).expect("its length");
        LoopDevice::with_partitions(&file).map(Disk)
    }

    fn path(&self) -> &Path {
        &self.0.0
    }

    fn name(&self, number: u32) -> String {
        format!("{}p{number}", self.path().file_name().unwrap().to_str().unwrap())
    }

    fn partition(&self, number: u32) -> PathBuf {
        Path::new("/dev").join(self.name(number))
    }

    fn document(&self, format: &str) -> String {
        format!(
            "<pool type='disk'><name>p</name><uuid>0f3a1d0e-6c51-4b2b-8d7c-0f0a2f6c7f13</uuid><source><device path='{}'/>\
             <format type='{format}'/></source></pool>",
            self.path().display()
        )
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let disk = fs::File::options().write(true).open(self.path()).expect("a disk");
        disk.write_all_at(bytes, at).expect("written");
        disk.sync_all().expect("on disk");
    }

    /// What the tool says of it, or does to it.
    fn sfdisk(&self, before: &[&str], after: &[&str]) -> String {
        let mut command = Command::new("sfdisk");
        let done = command.args(before).arg(self.path()).args(after).output().expect("sfdisk");
        let said = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
        assert!(done.status.success(), "{before:?}: {said}");
        said
    }

    /// Number, begin and length of each partition in the table, in bytes.
    fn table(&self) -> Vec<(u32, u64, u64)> {
        assert!(self.sfdisk(&["--verify"], &[]).contains("No errors detected"));
        let said: serde_json::Value = serde_json::from_str(&self.sfdisk(&["--json"], &[])).expect("JSON");
        let all = said["partitiontable"]["partitions"].as_array().cloned().unwrap_or_default();
        let number = |node: &str| node.rsplit_once('p').unwrap().1.parse().unwrap();
        let of = |one: &serde_json::Value| {
            let sectors = |name: &str| one[name].as_u64().unwrap() * 512;
            (number(one["node"].as_str().unwrap()), sectors("start"), sectors("size"))
        };
        let mut all: Vec<_> = all.iter().map(of).collect();
        all.sort();
        all
    }

    /// The same as the kernel has them.
    fn known(&self) -> Vec<(u32, u64, u64)> {
        let own = Path::new("/sys/class/block").join(self.path().file_name().unwrap());
        let of = |number: u32| {
            let said = |name: &str| {
                let told = fs::read_to_string(own.join(self.name(number)).join(name)).ok()?;
                told.trim().parse::<u64>().ok()
            };
            Some((number, said("start")? * 512, said("size")? * 512))
        };
        (1..10).filter_map(of).collect()
    }

    fn holds(&self, number: u32) -> Vec<u8> {
        fs::read(self.partition(number)).expect("its device")
    }
}

fn refused(said: Result<impl Sized, Refusal>, name: &str, why: &str) {
    let refusal = said.map(drop).expect_err(why);
    assert!(refusal.0.ends_with(name) && refusal.1.contains(why), "{why}: {refusal:?}");
}

fn file_of(bytes: &[u8]) -> fs::File {
    let file = tempfile::tempfile().expect("a file");
    file.write_all_at(bytes, 0).expect("written");
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_gets_a_table_only_where_nothing_is_on_it() {
    let Some(daemon) = daemon().await else { return };
    let client = Client { connection: daemon.connect().await };
    let Some(disk) = Disk::new(&daemon) else { return };
    let overwrite = || options([("overwrite", true.into())]);
    let dos = Pool::of(&client, &disk.document("dos"), Path::new("/dev")).await;
    assert_eq!(dos.get::<String>("Target").await, "/dev");
    refused(dos.run("Start", options([])).await, "StorageFailed", "build the pool first");
    // It only boots, or is a file system that begins as a table does.
    let mut sector = vec![0; 512];
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    disk.write(0, &sector);
    refused(dos.run("Build", options([])).await, "OperationInvalid", "on it");
    refused(dos.run("Start", options([])).await, "StorageFailed", "");
    sector[..62].copy_from_slice(
        b"\xeb\x3c\x90MSDOS5.0\x00\x02\x04\x01\x00\x02\x00\x02\x00\x80\xf8\x20\x00\x20\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x80\x00\x29\x01\x02\x03\x04NO NAME    FAT16   ",
    );
    disk.write(0, &sector);
    refused(dos.run("Build", options([])).await, "OperationInvalid", "there is vfat on it");
    refused(dos.run("Start", options([])).await, "StorageFailed", "there is vfat on it");
    let raw = client.define(&machine("raw", disk.path(), "raw")).await.expect("defined");
    refused(dos.run("Build", overwrite()).await, "InUse", "domain 'raw'");
    raw.run("Undefine").await.expect("undefined");
    dos.run("Build", overwrite()).await.expect("made");
    assert!(disk.sfdisk(&["--dump"], &[]).contains("label: dos"));
    dos.run("Build", options([])).await.expect("it is made");
    dos.run("Start", options([])).await.expect("started");
    let made = dos.add(&disk.name(1), 2 * MIB, options([])).await.expect("made");
    assert!(made.get::<String>("Key").await.ends_with("-01"));
    dos.run("Destroy", options([])).await.expect("stopped");
    assert_eq!((disk.known(), disk.table()), (vec![(1, MIB, 2 * MIB)], vec![(1, MIB, 2 * MIB)]));
    refused(dos.run("Build", options([])).await, "OperationInvalid", "a partition table (dos)");
    refused(dos.run("Delete", options([])).await, "OperationInvalid", "has 1 partitions");
    // A stored machine has one of its partitions, whatever that is called.
    let link = daemon.folder().join("link");
    std::os::unix::fs::symlink(disk.partition(1), &link).expect("a link");
    let raw = client.define(&machine("raw", &link, "raw")).await.expect("defined");
    refused(dos.run("Build", overwrite()).await, "InUse", "domain 'raw'");
    raw.run("Undefine").await.expect("undefined");
    // One with others in it, and one that protects a table that is not there.
    for (kind, why) in [("5", "extended"), ("ee", "")] {
        disk.sfdisk(&["--no-reread", "--no-tell-kernel", "--part-type"], &["1", kind]);
        refused(dos.run("Start", options([])).await, "StorageFailed", why);
    }
    dos.run("Build", overwrite()).await.expect("made anew");
    assert!(disk.known().is_empty() && disk.table().is_empty());
    dos.run("Delete", options([])).await.expect("removed");
    dos.run("Delete", options([])).await.expect("it is gone");
    let told = Command::new("blkid").args(["-p"]).arg(disk.path()).output().expect("blkid");
    assert!(told.stdout.is_empty(), "{told:?}");
    let text = disk.document("unknown");
    let call = client.call("/org/virt", &format!("{STORAGE}.ValidateStoragePool"), &(text, options([]))).await;
    let found: Vec<(String, u32, u32, String)> = call.expect("validated").body().deserialize().expect("findings");
    assert!(found.iter().any(|(.., text)| text.contains("say which partition table")), "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_are_made_changed_and_removed_and_are_nobody_elses() {
    let Some(daemon) = daemon().await else { return };
    let client = Client { connection: daemon.connect().await };
    let Some(disk) = Disk::new(&daemon) else { return };
    let pool = Pool::of(&client, &disk.document("gpt"), Path::new("/dev")).await;
    pool.run("Build", options([])).await.expect("made");
    let find = async || {
        let found = client.call("/org/virt", &format!("{STORAGE}.FindSources"), &("disk", "")).await.expect("found");
        found.body().deserialize::<String>().expect("s")
    };
    let source = format!("<device path='{}'/>", disk.path().display());
    assert!(find().await.contains(&source), "{}", find().await);
    pool.run("Start", options([])).await.expect("started");
    assert_eq!(pool.get::<Vec<String>>("Features").await, ["create", "resize", "shrink", "upload", "wipe"]);
    assert_eq!(pool.get::<u64>("Available").await, 62 * MIB);
    let whole = client.define(&machine("whole", disk.path(), "raw")).await.expect("defined");
    refused(whole.run("Start").await, "InUse", "pool 'p'");
    whole.run("Undefine").await.expect("undefined");
    disk.write(MIB, &vec![b'x'; 40 << 20]);
    refused(pool.add("web", MIB, options([])).await, "InvalidArgument", "it is called as its device");
    refused(pool.add(&disk.name(1), 63 * MIB, options([])).await, "NoSpace", "");
    refused(pool.add(&disk.name(129), MIB, options([])).await, "InvalidArgument", "128 partitions at most");
    let two = pool.add(&disk.name(2), 8 * MIB - 1, options([])).await.expect("made");
    refused(pool.add(&disk.name(2), MIB, options([])).await, "VolumeExists", "");
    assert_eq!(two.get::<String>("Path").await, disk.partition(2).display().to_string());
    assert_eq!(two.get::<String>("Type").await, "block");
    assert!(disk.sfdisk(&["--dump"], &[]).contains(&two.get::<String>("Key").await.to_uppercase()));
    assert_eq!(disk.holds(2), vec![0; 8 << 20], "nothing of what was there before");
    let content = vec![b'y'; (1 << 20) + 5];
    let with = options([("content", descriptor(&file_of(&content)).into())]);
    let one = pool.add(&disk.name(1), 2 * MIB, with).await.expect("made");
    let held = disk.holds(1);
    assert!(held.starts_with(&content) && held[content.len()..].iter().all(|byte| *byte == 0));
    assert_eq!(disk.known(), [(1, 9 * MIB, 2 * MIB), (2, MIB, 8 * MIB)]);
    assert_eq!(disk.known(), disk.table());
    let mut behind = [0];
    fs::File::open(disk.path()).unwrap().read_exact_at(&mut behind, 11 * MIB).unwrap();
    assert_eq!(&behind, b"x", "what is nobody's is not touched");
    is_a_disk_of_a_machine(&client, &pool, &disk, &two).await;
    is_resized_and_filled(&disk, &one, &two).await;
    what_the_host_uses_is_not_changed(&daemon, &pool, &disk, &two).await;
    // Of another system, which stays so whatever is done to others.
    disk.sfdisk(&["--no-reread", "--no-tell-kernel", "--part-type"], &["2", EFI]);
    one.run("Delete", options([])).await.expect("deleted");
    assert_eq!(disk.sfdisk(&["--part-type"], &["2"]).trim(), EFI);
    assert_eq!((disk.known(), disk.known()), (disk.table(), vec![(2, MIB, 8 * MIB)]));
    // One without a device goes, too.
    assert!(Command::new("partx").args(["--delete", "--nr", "2"]).arg(disk.path()).status().expect("partx").success());
    pool.run("Refresh", options([])).await.expect("refreshed");
    assert_eq!(two.get::<String>("State").await, "broken");
    two.run("Delete", options([])).await.expect("deleted");
    assert!(disk.table().is_empty() && pool.list().await.is_empty());
    pool.run("Destroy", options([])).await.expect("stopped");
    pool.run("Delete", options([])).await.expect("removed");
    assert!(!find().await.contains(&source));
}

async fn is_a_disk_of_a_machine(client: &Client, pool: &Pool, disk: &Disk, two: &Volume) {
    let xml = machine("web", disk.path(), "raw").replace("type='file'", "type='volume'");
    let source = format!("<source pool='p' volume='{}'/>", disk.name(2));
    let xml = xml.replace(&format!("<source file='{}'/>", disk.path().display()), &source);
    let web = client.define(&xml).await.expect("defined");
    web.run("Start").await.expect("started");
    assert!(web.xml().await.contains(&format!("dev='{}'", disk.partition(2).display())), "{}", web.xml().await);
    refused(two.run("Delete", options([])).await, "InUse", "domain 'web'");
    refused(two.with("Resize", &(16 * MIB, options([]))).await, "InUse", "only while no guest has it");
    assert_eq!(pool.get::<Vec<(zbus::ObjectPath<'static>, String, String)>>("Users").await.len(), 2, "live and config");
    web.run("Destroy").await.expect("ended");
    refused(two.run("Delete", options([])).await, "InUse", "domain 'web'");
    web.run("Undefine").await.expect("undefined");
}

async fn is_resized_and_filled(disk: &Disk, one: &Volume, two: &Volume) {
    refused(two.with("Resize", &(9 * MIB, options([]))).await, "NoSpace", "not so much free");
    one.with("Resize", &(4 * MIB, options([]))).await.expect("grown");
    assert_eq!((disk.known()[0], disk.known()), ((1, 9 * MIB, 4 * MIB), disk.table()));
    assert!(disk.holds(1)[2 << 20..].iter().all(|byte| *byte == 0));
    refused(one.with("Resize", &(3 * MIB, options([]))).await, "InvalidArgument", "say shrink");
    one.with("Resize", &(3 * MIB, options([("shrink", true.into())]))).await.expect("reduced");
    assert_eq!((disk.known()[0], disk.known()), ((1, 9 * MIB, 3 * MIB), disk.table()));
    assert_eq!(one.get::<u64>("Capacity").await, 3 * MIB);
    one.run("Wipe", options([])).await.expect("wiped");
    assert_eq!(disk.holds(1), vec![0; 3 << 20]);
    one.with("Upload", &(descriptor(&file_of(b"abc")), options([]))).await.expect("uploaded");
    assert!(disk.holds(1).starts_with(b"abc\0"));
    let to = file_of(b"");
    one.with("Download", &(descriptor(&to), options([("length", 3u64.into())]))).await.expect("fetched");
    let mut read = [0; 3];
    to.read_exact_at(&mut read, 0).expect("read");
    assert_eq!(&read, b"abc");
}

/// What is mounted, or open elsewhere, keeps its place, and who has it is named.
async fn what_the_host_uses_is_not_changed(daemon: &Daemon, pool: &Pool, disk: &Disk, two: &Volume) {
    let held = fs::File::open(disk.partition(2)).expect("open");
    refused(two.run("Delete", options([])).await, "InUse", "has that partition open");
    drop(held);
    let folder = daemon.folder().join("mounted");
    fs::create_dir(&folder).expect("a folder");
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(disk.partition(1)).status().expect("mkfs");
    assert!(made.success());
    let mounted = daemon.inside("mount").arg(disk.partition(1)).arg(&folder).status().expect("mount");
    assert!(mounted.success());
    let text = format!("{} is mounted on {}", disk.partition(1).display(), folder.display());
    refused(pool.add(&disk.name(3), MIB, options([])).await, "InUse", &text);
    refused(two.run("Delete", options([])).await, "InUse", &text);
    assert!(daemon.inside("umount").arg(&folder).status().expect("umount").success());
    assert_eq!(disk.known(), disk.table());
}

/// Whatever step virtd is killed at: a volume is as before or as after, and the kernel has what the table says.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_is_as_before_or_as_after_wherever_virtd_is_killed() {
    let Some(mut daemon) = daemon().await else { return };
    let client = Client { connection: daemon.connect().await };
    let Some(disk) = Disk::new(&daemon) else { return };
    let mut pool = Pool::of(&client, &disk.document("gpt"), Path::new("/dev")).await;
    pool.run("Start", options([("build", true.into())])).await.expect("started");
    let none = || options([]);
    for (verb, before, after) in [("AddVolume", 0, 2), ("Resize", 2, 4), ("Delete", 2, 0)] {
        for step in 1.. {
            assert!(step < 30, "{verb} never ends");
            if let Ok(left) = pool.volume(&disk.name(1)).await {
                left.run("Delete", none()).await.expect("deleted");
            }
            disk.write(MIB, &[b'x'; 4 << 20]);
            if before > 0 {
                pool.add(&disk.name(1), before * MIB, none()).await.expect("made");
            }
            let volume = pool.volume(&disk.name(1)).await.map(|volume| volume.path).unwrap_or_default();
            daemon.at_step(step, &format!("kill -9 {}", daemon.virtd_pid()));
            let ask = &pool.client;
            let did = match verb {
                "AddVolume" => {
                    ask.ask(&pool.path, &format!("{POOL}.AddVolume"), &(disk.name(1), after * MIB, none())).await
                }
                "Resize" => ask.ask(&volume, &format!("{VOLUME}.Resize"), &(after * MIB, none())).await,
                _ => ask.ask(&volume, &format!("{VOLUME}.Delete"), &(none(),)).await,
            };
            let ends = !daemon.step_came();
            if !ends {
                daemon.virtd_died().await;
                daemon.start_virtd().await;
                pool.client = Client { connection: daemon.connect().await };
                let mut watch = pool.client.watch().await;
                while pool.get::<String>("State").await != "running" {
                    watch.next().await;
                }
            }
            let table = disk.table();
            assert_eq!(table, disk.known(), "{verb} at {step}");
            let mebibytes = table.first().map_or(0, |(_, _, bytes)| bytes / MIB);
            assert!(mebibytes == before || mebibytes == after, "{verb} at {step}: {table:?}");
            assert!(mebibytes == 0 || disk.holds(1).iter().all(|byte| *byte == 0), "{verb} at {step}");
            let listed: Vec<u64> = pool.list().await.into_iter().map(|(.., capacity)| capacity / MIB).collect();
            assert_eq!(listed, table.iter().map(|(_, _, bytes)| bytes / MIB).collect::<Vec<_>>(), "{verb} at {step}");
            if ends {
                assert!(did && mebibytes == after, "{verb} is not done though nobody was killed");
                break;
            }
        }
    }
}
