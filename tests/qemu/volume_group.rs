//! A pool that is a volume group, with the device mapper of a kernel of its own (`taken.rs` boots it): on a loop device, by the real
//! tool.

use crate::unwatched::{Unwatched, new_volume};
use std::fs;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use virt_drivers::host::lender::Lender;
use virt_drivers::storage::HostStorage;
use virt_model::driver::storage::{
    Content, KnownFormats, NewSize, NewVolume, OpenPool, Part, Reflink, Storage as _, VolumeAt, VolumeLook, Wiping,
    Work,
};
use virt_model::driver::{DriverError, GivenFile};
use virt_model::storage::pool::{PoolDef, PoolKind};

const MIB: u64 = 1 << 20;

fn work() -> Arc<dyn Work> {
    Arc::new(Unwatched::default())
}

fn run(command: &str) {
    let mut words = command.split_whitespace();
    let mut program = Command::new(words.next().expect("a program"));
    program.args(words);
    if command.starts_with("lvm ") {
        // There is no udev that would make devices.
        program.args(["--config", "activation { udev_sync=0 udev_rules=0 }"]);
    }
    let done = program.output().expect(command);
    assert!(done.status.success(), "{command}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A client's file with so many bytes of that kind.
fn given(byte: u8, bytes: u64) -> GivenFile {
    let mut file = tempfile::tempfile_in("/").expect("a file");
    file.write_all(&vec![byte; bytes as usize]).expect("written");
    std::io::Seek::rewind(&mut file).expect("its beginning");
    GivenFile::new(OwnedFd::from(file), drop)
}

fn definition(name: &str) -> PoolDef {
    let device = "<device path='/dev/loop1'/>";
    let xml = format!("<pool type='logical'><name>{name}</name><source>{device}<name>vg0</name></source></pool>");
    PoolDef::parse(&xml).expect("a pool")
}

/// What is on a volume, each byte once, with where that begins.
fn holds(path: &Path) -> Vec<(u64, u8)> {
    let all = fs::read(path).expect("its device");
    let mut runs: Vec<(u64, u8)> = Vec::new();
    for (number, block) in all.chunks(512).enumerate() {
        // Most are of one kind, which is seen at once.
        let kinds = if block == [block[0]; 512] { &block[..1] } else { block };
        for (at, byte) in kinds.iter().enumerate() {
            if runs.last().is_none_or(|(_, last)| last != byte) {
                runs.push(((number * 512 + at) as u64, *byte));
            }
        }
    }
    runs
}

async fn all(pool: &Arc<dyn OpenPool>) -> Vec<VolumeLook> {
    pool.survey(&KnownFormats::default()).await.expect("read").volumes
}

async fn at(pool: &Arc<dyn OpenPool>, name: &str) -> VolumeAt {
    let look = all(pool).await.into_iter().find(|look| look.name == name).expect(name);
    assert_eq!(look.broken, None);
    VolumeAt { name: look.name, id: look.id, format: look.format, capacity: look.capacity, below: Vec::new() }
}

/// It is made, filled, cut off, stopped and removed.
pub async fn is_a_pool() {
    let disk = tempfile::NamedTempFile::new_in("/").expect("a file");
    disk.as_file().set_len(64 * MIB).expect("its length");
    // What was on a device is on none of its volumes.
    for at in 0..64 {
        disk.as_file().write_all_at(&[0xee; MIB as usize], at * MIB).expect("written");
    }
    run(&format!("losetup /dev/loop1 {}", disk.path().display()));
    let storage =
        HostStorage::new(Arc::new(|| Ok(Lender::Ours)), Arc::new(|_| Ok(Vec::new())), Path::new("/run"), true);
    let def = definition("one");
    let refused = storage.open(&def, &*work()).await.err().expect("there is none");
    assert!(matches!(&refused, DriverError::Storage(why) if why.contains("build the pool first")), "{refused}");
    storage.build(&def, true, &*work()).await.expect("made");
    storage.build(&def, false, &*work()).await.expect("it is that already");
    let pool = storage.open(&def, &*work()).await.expect("active");
    let refused = storage.open(&definition("two"), &*work()).await.err().expect("it is another's");
    assert!(matches!(&refused, DriverError::Refused(why) if why.contains("pool 'one' already")), "{refused}");
    volumes_are_made(&pool).await;
    volumes_are_written(&pool).await;
    volumes_change_their_size(&pool).await;
    what_was_cut_off_is_as_before(&storage, &def, pool).await;
    drop(disk);
}

async fn volumes_are_made(pool: &Arc<dyn OpenPool>) {
    assert_eq!(all(pool).await, []);
    let made = pool.create(new_volume("a", 5 * MIB + 1, Content::Empty), work()).await.expect("made");
    let (name, key) = (made.name.as_str(), made.key.as_deref().expect("its uuid"));
    assert_eq!((name, key.len(), made.capacity, made.allocation), ("a", 38, 8 * MIB, 8 * MIB));
    assert_eq!((made.broken, made.permissions.0), (None, 0));
    assert_eq!(holds(Path::new("/dev/vg0/a")), [(0, 0)]);
    let filled = new_volume("b", 4 * MIB, Content::Given(given(7, MIB + 5)));
    pool.create(filled, work()).await.expect("made");
    assert_eq!(holds(Path::new("/dev/vg0/b")), [(0, 7), (MIB + 5, 0)]);
    let copied = Content::Copy { from: pool.hold(&at(pool, "b").await).await.expect("open"), reflink: Reflink::Auto };
    pool.create(new_volume("c", 4 * MIB, copied), work()).await.expect("copied");
    assert_eq!(holds(Path::new("/dev/vg0/c")), [(0, 7), (MIB + 5, 0)]);
    for (refused, why) in [
        (new_volume("a", MIB, Content::Empty), "has a volume 'a'"),
        (new_volume("big", 80 * MIB, Content::Empty), "nsufficient free space"),
        (new_volume("d", 4 * MIB, Content::Given(given(1, 4 * MIB + 1))), "the descriptor that was given"),
        (new_volume("-d", MIB, Content::Empty), "does not begin with -"),
        (new_volume("d", 0, Content::Empty), "say how large"),
        (NewVolume { format: "qcow2".to_owned(), ..new_volume("d", MIB, Content::Empty) }, "raw"),
    ] {
        let refused = pool.create(refused, work()).await.expect_err(why).to_string();
        assert!(refused.contains(why), "{why}: {refused}");
    }
    let names: Vec<String> = all(pool).await.into_iter().map(|look| look.name).collect();
    assert_eq!(names, ["a", "b", "c"]);
    let room = pool.room().await.expect("its room");
    assert_eq!((room.capacity, room.available), (60 * MIB, 44 * MIB));
}

async fn volumes_are_written(pool: &Arc<dyn OpenPool>) {
    let (b, path) = (at(pool, "b").await, Path::new("/dev/vg0/b"));
    pool.upload(&b, given(1, 4 * MIB), None, false, work()).await.expect("written");
    assert_eq!(holds(path), [(0, 1)]);
    pool.upload(&b, given(2, MIB), None, false, work()).await.expect("written");
    assert_eq!(holds(path), [(0, 2), (MIB, 0)]);
    let part = Some(Part { offset: 2 * MIB, length: Some(512) });
    pool.upload(&b, given(3, MIB), part, false, work()).await.expect("written");
    let now = [(0, 2), (MIB, 0), (2 * MIB, 3), (2 * MIB + 512, 0)];
    assert_eq!(holds(path), now);
    let refused = pool.upload(&b, given(3, 5 * MIB), None, false, work()).await.expect_err("it is too much");
    assert!(matches!(refused, DriverError::Argument(_)), "{refused}");
    assert_eq!(holds(path), now, "nothing was written");
    let file = tempfile::NamedTempFile::new_in("/").expect("a file");
    let to = GivenFile::new(OwnedFd::from(file.reopen().expect("open")), drop);
    pool.download(&b, to, Some(Part { offset: 2 * MIB, length: Some(MIB) }), false, work()).await.expect("read");
    assert_eq!(holds(file.path()), [(0, 3), (512, 0)]);
    pool.wipe(&b, Wiping::Zero, work()).await.expect("wiped");
    assert_eq!(holds(path), [(0, 0)]);
    assert!(!pool.is_open_elsewhere("b", true).await.expect("known"));
    let _alone = fs::File::open(path).expect("open");
    let refused = pool.close().await.expect_err("somebody has one open");
    assert!(matches!(&refused, DriverError::Refused(why) if why.contains("cannot be deactivated")), "{refused}");
    assert!(all(pool).await.iter().all(|look| look.broken.is_none()), "each is active as before");
}

async fn volumes_change_their_size(pool: &Arc<dyn OpenPool>) {
    let size = |capacity, shrink| NewSize { capacity, shrink, allocate: false };
    let path = Path::new("/dev/vg0/c");
    let c = at(pool, "c").await;
    pool.resize(&c, size(9 * MIB, false), work()).await.expect("extended");
    let c = at(pool, "c").await;
    assert_eq!((c.capacity, holds(path)), (12 * MIB, vec![(0, 7), (MIB + 5, 0)]));
    let refused = pool.resize(&c, size(4 * MIB, false), work()).await.expect_err("it would lose bytes");
    assert!(matches!(&refused, DriverError::Argument(why) if why.contains("say shrink")), "{refused}");
    pool.resize(&c, size(MIB, true), work()).await.expect("reduced");
    assert_eq!(at(pool, "c").await.capacity, 4 * MIB);
    let refused =
        pool.resize(&at(pool, "c").await, size(200 * MIB, false), work()).await.expect_err("there is no room");
    assert!(matches!(refused, DriverError::NoSpace(_)), "{refused}");
    assert_eq!((at(pool, "c").await.capacity, holds(path)), (4 * MIB, vec![(0, 7), (MIB + 5, 0)]));
}

/// As if virtd had been killed at each of its steps.
async fn what_was_cut_off_is_as_before(storage: &HostStorage, def: &PoolDef, pool: Arc<dyn OpenPool>) {
    let before = all(&pool).await;
    drop(pool);
    run("lvm lvcreate --yes --addtag virt-unfinished --name left --size 4m vg0");
    run("lvm lvchange --addtag virt-grown-from-4194304 vg0/c");
    run("lvm lvextend --size 8m vg0/c");
    run("lvm lvchange --addtag virt-grown-from-4194304 vg0/b");
    let pool = storage.open(def, &*work()).await.expect("open again");
    assert_eq!(all(&pool).await, before);
    assert!(!PathBuf::from("/dev/vg0/left").exists());
    pool.take_back().await.expect("it was active before");
    assert!(PathBuf::from("/dev/vg0/a").exists());
    let refused = storage.delete(def, &*work()).await.expect_err("it is not empty");
    assert!(matches!(&refused, DriverError::Refused(why) if why.contains("3 volumes")), "{refused}");
    for name in ["a", "b"] {
        pool.delete(&at(&pool, name).await, work()).await.expect("deleted");
    }
    let c = at(&pool, "c").await;
    pool.close().await.expect("not active any more");
    assert!(!PathBuf::from("/dev/vg0").exists());
    drop(pool);
    let found = storage.find_sources(PoolKind::Logical, None).await.expect("searched");
    assert_eq!(found.iter().map(|source| source.name.as_deref()).collect::<Vec<_>>(), [Some("vg0")]);
    storage.close(def).await.expect("it is not");
    let pool = storage.open(def, &*work()).await.expect("active again");
    assert_eq!(at(&pool, "c").await, c);
    pool.take_back().await.expect("it was not active before");
    assert!(!PathBuf::from("/dev/vg0/c").exists());
    drop(pool);
    let pool = storage.open(def, &*work()).await.expect("active again");
    pool.delete(&at(&pool, "c").await, work()).await.expect("deleted");
    pool.delete(&c, work()).await.expect("nothing need be there");
    pool.close().await.expect("not active any more");
    storage.delete(def, &*work()).await.expect("removed");
    storage.delete(def, &*work()).await.expect("it is gone");
    assert_eq!(storage.find_sources(PoolKind::Logical, None).await.expect("searched").len(), 0);
}
