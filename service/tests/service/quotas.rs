//! How much of storage each user may have: nobody gets more, whatever is done at the same time, and nothing is left of what is
//! refused.

use crate::world::{World, xml};
use std::io::Seek;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virt_model::driver::GivenFile;
use virt_model::driver::storage::Part;
use virt_service::authz::{Action, Caller};
use virt_service::error::Error;
use virt_service::{
    AddVolume, CloneVolume, CreateVolume, Domain, NewCapacity, Pool, Quota, ResizeOptions, StartPool, Volume,
};

const MIB: u64 = 1 << 20;

/// A world with a pool that is started.
async fn world(folder: &Path) -> (World, Arc<Pool>) {
    let world = World::open(folder).await;
    let pool = pool(&world, "images", &folder.join("images")).await;
    (world, pool)
}

async fn pool(world: &World, name: &str, folder: &Path) -> Arc<Pool> {
    let xml = format!("<pool type='dir'><name>{name}</name><target><path>{}</path></target></pool>", folder.display());
    let pool = world.service.define_pool(&world.alice(), &xml).await.unwrap();
    let start = StartPool { build: true, ..StartPool::default() };
    pool.start(&world.alice(), start).await.unwrap().done().await.unwrap();
    pool
}

/// With the content of a file, in that format.
fn holding(format: &str, file: &std::fs::File) -> AddVolume {
    let create = CreateVolume { content: Some(given(file)), ..CreateVolume::default() };
    AddVolume { format: Some(format.to_owned()), create, ..AddVolume::default() }
}

fn given(file: &std::fs::File) -> GivenFile {
    GivenFile::new(file.try_clone().unwrap().into(), drop)
}

async fn add(pool: &Arc<Pool>, caller: &Caller, name: &str, mib: u64) -> Result<Volume, Error> {
    add_as(pool, caller, name, mib, AddVolume::default()).await
}

async fn add_as(pool: &Arc<Pool>, caller: &Caller, name: &str, mib: u64, options: AddVolume) -> Result<Volume, Error> {
    let (volume, ticket) = pool.add_volume(caller, name, mib * MIB, options).await?;
    ticket.done().await.map(|()| volume)
}

async fn resize(volume: Volume, caller: &Caller, mib: u64) -> Result<(), Error> {
    let to = NewCapacity { capacity: mib * MIB, shrink: true, allocate: false, cancel_on_disconnect: false };
    volume.resize(caller, to).await?.done().await
}

async fn upload(volume: Volume, caller: &Caller, file: &std::fs::File, part: Option<Part>) -> Result<(), Error> {
    volume.upload(caller, given(file), part, false, false).await?.done().await
}

/// How many volumes a user has, and of how many MiB.
async fn has(world: &World, uid: u32) -> (u32, u64) {
    let caller = Caller { uid, ..world.alice() };
    let Quota { volumes, bytes, .. } = world.service.quota(&caller, uid).await.unwrap();
    assert_eq!(bytes % MIB, 0, "{bytes}");
    (volumes, bytes / MIB)
}

#[track_caller]
fn refused<T>(done: Result<T, Error>, why: &str) {
    match done.map(drop).unwrap_err() {
        Error::LimitsExceeded(text) => assert!(text.contains(why), "{text}"),
        error => panic!("{error}"),
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder.join("images")).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn nobody_but_root_has_more_volumes_than_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let (world, pool) = world(folder.path()).await;
    let (alice, root) = (world.alice(), Caller { uid: 0, ..world.alice() });
    for name in ["a", "b", "c"] {
        add(&pool, &alice, name, 1).await.unwrap();
    }
    refused(add(&pool, &alice, "d", 0).await, "cannot make volume 'd': user 1000 has 3 volumes, and may have 3");
    let thin = pool.find_volume("a").unwrap().clone_to(&alice, "d", CloneVolume::default()).await;
    refused(thin, "has 3 volumes");
    let xml = "<volume><name>d</name><capacity>0</capacity></volume>";
    refused(pool.create_volume(&alice, xml, CreateVolume::default()).await, "has 3 volumes");
    let check = pool.check_create_volume(&alice, xml, Default::default()).await.unwrap();
    refused(check.refusal.map_or(Ok(()), Err), "has 3 volumes");
    assert_eq!((names(folder.path()), has(&world, 1000).await), (vec!["a".into(), "b".into(), "c".into()], (3, 3)));
    // It is each user's own, and another pool's volumes are theirs, too.
    let other = self::pool(&world, "other", &folder.path().join("other")).await;
    refused(add(&other, &alice, "a", 0).await, "has 3 volumes");
    add(&pool, &Caller { uid: 1001, ..world.alice() }, "theirs", 1).await.unwrap();
    assert_eq!((has(&world, 1000).await, has(&world, 1001).await), ((3, 3), (1, 1)));
    for name in ["r1", "r2", "r3", "r4"] {
        add(&pool, &root, name, 100).await.unwrap();
    }
    let quota = world.service.quota(&root, 0).await.unwrap();
    assert!(quota.volumes >= 4 && quota.volumes_limit.is_none() && quota.bytes_limit.is_none(), "{quota:?}");
    // Who deletes one may have another.
    let delete = pool.find_volume("a").unwrap().delete(&alice, false, false, false);
    delete.await.unwrap().done().await.unwrap();
    add(&other, &alice, "a", 1).await.unwrap();
    refused(add(&pool, &alice, "d", 0).await, "has 3 volumes");
}

/// Both are asked for before the first is there.
#[tokio::test]
async fn of_two_at_once_one_has_the_last() {
    let folder = tempfile::tempdir().unwrap();
    let (world, pool) = world(folder.path()).await;
    let alice = world.alice();
    add(&pool, &alice, "a", 1).await.unwrap();
    add(&pool, &alice, "b", 1).await.unwrap();
    let (c, d) = tokio::join!(add(&pool, &alice, "c", 1), add(&pool, &alice, "d", 1));
    assert!(c.is_ok() != d.is_ok(), "{c:?} {d:?}");
    refused(c.and(d), "user 1000 has 3 volumes, and may have 3");
    assert_eq!(has(&world, 1000).await, (3, 3));
    // Two that grow at once.
    let (a, b) = (pool.find_volume("a").unwrap(), pool.find_volume("b").unwrap());
    let (a, b) = tokio::join!(resize(a, &alice, 2), resize(b, &alice, 2));
    assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
    refused(a.and(b), "there is no room for 1048576 more");
    assert_eq!(has(&world, 1000).await, (3, 4));
    // What failed is given back.
    for name in ["a", "b"] {
        resize(pool.find_volume(name).unwrap(), &alice, 1).await.unwrap();
    }
    assert_eq!(has(&world, 1000).await, (3, 3));
}

#[tokio::test]
async fn capacity_has_a_limit_however_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    let (world, pool) = world(folder.path()).await;
    let (alice, root) = (world.alice(), Caller { uid: 0, ..world.alice() });
    refused(add(&pool, &alice, "a", 5).await, "has volumes of 0 bytes, and may have 4194304");
    add(&pool, &alice, "a", 3).await.unwrap();
    refused(resize(pool.find_volume("a").unwrap(), &alice, 5).await, "cannot resize volume 'a': user 1000");
    refused(pool.find_volume("a").unwrap().clone_to(&alice, "b", CloneVolume::default()).await, "no room for");
    // A stream is refused as soon as it is too long, and an image where its header says so.
    let long = tempfile::tempfile().unwrap();
    long.set_len(64 * MIB).unwrap();
    refused(add_as(&pool, &alice, "b", 0, holding("raw", &long)).await, "cannot make volume 'b': user 1000");
    let read = (&long).stream_position().unwrap();
    assert!(read < 8 * MIB, "{read} bytes were read");
    let image = tempfile::tempfile().unwrap();
    image.write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
    image.write_all_at(&(1u64 << 40).to_be_bytes(), 24).unwrap();
    image.set_len(MIB).unwrap();
    refused(add_as(&pool, &alice, "b", 0, holding("qcow2", &image)).await, "there is no room for 1099511627776 more");
    assert_eq!((names(folder.path()), has(&world, 1000).await), (vec!["a".to_owned()], (1, 3)));
    (&long).rewind().unwrap();
    refused(
        upload(pool.find_volume("a").unwrap(), &alice, &long, None).await,
        "cannot overwrite volume 'a': user 1000",
    );
    assert_eq!(std::fs::metadata(folder.path().join("images/a")).unwrap().len(), 3 * MIB);
    // In place nothing grows, and what is as long as there is room for is taken.
    long.set_len(4 * MIB).unwrap();
    (&long).rewind().unwrap();
    upload(pool.find_volume("a").unwrap(), &alice, &long, Some(Part { offset: 0, length: Some(MIB) })).await.unwrap();
    (&long).rewind().unwrap();
    upload(pool.find_volume("a").unwrap(), &alice, &long, None).await.unwrap();
    assert_eq!(has(&world, 1000).await, (1, 4));
    // Whose it is counts, not who does it; root may do it, and what takes nothing more is never refused.
    let bob = Caller { uid: 1001, ..world.alice() };
    refused(resize(pool.find_volume("a").unwrap(), &bob, 5).await, "user 1000");
    resize(pool.find_volume("a").unwrap(), &root, 9).await.unwrap();
    assert_eq!((has(&world, 1000).await, has(&world, 1001).await), ((1, 9), (0, 0)));
    resize(pool.find_volume("a").unwrap(), &alice, 8).await.unwrap();
    refused(add(&pool, &alice, "b", 1).await, "has volumes of 8388608 bytes");
    add(&pool, &alice, "b", 0).await.unwrap();
}

#[tokio::test]
async fn who_asks_for_somebody_else_needs_permission() {
    let folder = tempfile::tempdir().unwrap();
    let (world, pool) = world(folder.path()).await;
    let (alice, bob) = (world.alice(), Caller { uid: 1001, ..world.alice() });
    add(&pool, &alice, "a", 1).await.unwrap();
    world.notary.refuses.store(true, Ordering::Relaxed);
    world.notary.asked.lock().unwrap().clear();
    let quota = world.service.quota(&alice, 1000).await.unwrap();
    let wanted = Quota { volumes: 1, volumes_limit: Some(3), bytes: MIB, bytes_limit: Some(4 * MIB) };
    assert_eq!((quota, world.notary.asked.lock().unwrap().len()), (wanted, 0));
    assert!(matches!(world.service.quota(&bob, 1000).await, Err(Error::AccessDenied(_))));
    world.notary.refuses.store(false, Ordering::Relaxed);
    assert_eq!(world.service.quota(&bob, 1000).await.unwrap(), wanted);
    let asked = world.notary.asked.lock().unwrap();
    assert!(
        asked.iter().all(|(action, about)| *action == Action::StorageRead && about.owner == Some(1000)),
        "{asked:?}"
    );
    assert_eq!(asked.len(), 2);
}

/// A guest with that volume as its disk. The driver keeps in mind what it is told, and leaves the file alone.
async fn guest_on(world: &World, volume: &str) -> Arc<Domain> {
    let disk = format!(
        "<devices><disk type='volume'><source pool='images' volume='{volume}'/><target dev='vda' bus='virtio'/></disk></devices>"
    );
    let domain = world.service.define(&world.alice(), &xml("web", &disk), false).await.unwrap();
    world.start(&domain).await.unwrap();
    domain
}

async fn resize_disk(domain: &Arc<Domain>, caller: &Caller, bytes: u64, shrink: bool) -> Result<(), Error> {
    let how = ResizeOptions { shrink, ..ResizeOptions::default() };
    domain.block_resize(caller, "vda", bytes, how).await?.done().await
}

#[tokio::test]
async fn a_volume_that_a_guest_resizes_has_the_same_limit() {
    let folder = tempfile::tempdir().unwrap();
    let (world, pool) = world(folder.path()).await;
    let (alice, root) = (world.alice(), Caller { uid: 0, ..world.alice() });
    add(&pool, &alice, "a", 1).await.unwrap();
    let domain = guest_on(&world, "a").await;
    refused(resize_disk(&domain, &alice, 5 * MIB, true).await, "cannot resize volume 'a': user 1000");
    resize_disk(&domain, &root, 5 * MIB, true).await.unwrap();
    resize_disk(&domain, &alice, 2 * MIB, true).await.unwrap();
    assert_eq!(has(&world, 1000).await, (1, 1), "nothing stays taken");
}

#[tokio::test]
async fn a_volume_of_a_guest_is_resized_through_that_guest() {
    let folder = tempfile::tempdir().unwrap();
    let (world, pool) = world(folder.path()).await;
    let alice = world.alice();
    add(&pool, &alice, "a", 1).await.unwrap();
    let domain = guest_on(&world, "a").await;
    resize_disk(&domain, &alice, MIB, true).await.unwrap();
    let volume = || pool.find_volume("a").unwrap();
    resize(volume(), &alice, 3).await.unwrap();
    let less = resize_disk(&domain, &alice, 2 * MIB, false).await.unwrap_err().to_string();
    assert!(less.contains("3145728 bytes"), "the guest knows: {less}");
    refused(resize(volume(), &alice, 5).await, "cannot resize volume 'a': user 1000");
    for (to, why) in [
        (NewCapacity { capacity: MIB / 2, shrink: true, allocate: false, cancel_on_disconnect: false }, "would lose"),
        (NewCapacity { capacity: 4 * MIB, shrink: false, allocate: true, cancel_on_disconnect: false }, "allocate"),
    ] {
        match volume().resize(&alice, to).await.unwrap().done().await.unwrap_err() {
            Error::OperationInvalid(text) => {
                assert!(text.contains("domain 'web' (disk 'vda') runs on it") && text.contains(why), "{text}")
            }
            error => panic!("{error}"),
        }
    }
    assert_eq!(std::fs::metadata(folder.path().join("images/a")).unwrap().len(), MIB, "nobody but the guest did it");
    // Without the guest it is done here.
    domain.destroy(&alice, Default::default()).await.unwrap();
    resize(volume(), &alice, 2).await.unwrap();
    assert_eq!(std::fs::metadata(folder.path().join("images/a")).unwrap().len(), 2 * MIB);
}
