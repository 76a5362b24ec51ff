//! Volumes through the bus: what is made holds what it is to hold, what is in use stays, and whoever is killed leaves nothing half.

use crate::common::client::{Client, Refusal, descriptor, options};
use crate::common::pools::{Pool, Volume, document, machine};
use crate::common::{Daemon, Setup, have};
use crate::storage::{pattern, same};
use std::fs;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use zbus::wire::Fd;
use zbus::{ObjectPath, OwnedObjectPath};

/// A file as it is given to virtd.
fn opened(file: &Path) -> Fd<'static> {
    descriptor(&fs::File::open(file).expect("a file"))
}

/// Of what a guest stands on others are made, and nobody else's disk is committed into it.
async fn what_disks_stand_on_is_not_written(daemon: &Daemon, client: &Client, pool: &Pool, source: &Path) {
    let volume = async |name: &str| pool.volume(name).await.expect(name);
    let (b, d, top) = (volume("b.img").await, volume("d.qcow2").await, volume("top.qcow2").await);
    let below = format!(
        "<backingStore type='file'><format type='qcow2'/><source file='{}'/><backingStore/></backingStore><target",
        pool.at("d.qcow2").display()
    );
    let xml = machine("web", &pool.at("top.qcow2"), "qcow2").replace("<target", &below);
    let web = client.define(&xml).await.expect("defined");
    web.run("Start").await.expect("started");
    d.with("Clone", &("thin.qcow2", options([("thin", true.into())]))).await.expect("it is only read");
    volume("thin.qcow2").await.run("Delete", options([])).await.expect("deleted");
    let refused = top.with("Clone", &("thin.qcow2", options([("thin", true.into())]))).await.expect_err("written");
    assert!(refused.0.ends_with("InUse") && refused.1.contains("domain 'web' (disk 'vda')"), "{refused:?}");
    let refused = web.call("BlockCommit", &("vda", "", "", options([]))).await.expect_err("another stands on it");
    assert!(refused.0.ends_with("InUse") && refused.1.contains("volume 'copy.qcow2' of pool"), "{refused:?}");
    assert!(!refused.1.contains("volume 'top.qcow2'"), "{refused:?}");
    web.run("Destroy").await.expect("ended");
    web.run("Undefine").await.expect("undefined");
    // What a disk stands on is not written, where that is a file of nobody's, either.
    let below = format!(
        "<backingStore type='file'><format type='raw'/><source file='{}'/><backingStore/></backingStore><target",
        pool.at("b.img").display()
    );
    let xml = machine("web", &daemon.folder().join("elsewhere.qcow2"), "qcow2").replace("<target", &below);
    let web = client.define(&xml).await.expect("defined");
    for refused in [b.run("Wipe", options([])).await, b.with("Upload", &(opened(source), options([]))).await] {
        let refused = refused.expect_err("a disk stands on it");
        assert!(refused.0.ends_with("InUse") && refused.1.contains("domain 'web' (disk 'vda')"), "{refused:?}");
    }
    assert!(same(source, &pool.at("b.img")));
    web.run("Undefine").await.expect("undefined");
}

/// As it is, converted, thin, and flattened again.
async fn is_cloned(pool: &Pool, a: &Volume, source: &Path) {
    for (name, wanted) in [("b.img", options([])), ("c.img", options([("reflink", "never".into())]))] {
        a.with("Clone", &(name, wanted)).await.expect(name);
        assert!(same(source, &pool.at(name)), "{name}");
    }
    a.with("Clone", &("d.qcow2", options([("format", "qcow2".into())]))).await.expect("converted");
    let d = pool.volume("d.qcow2").await.expect("there");
    assert_eq!(d.get::<String>("Format").await, "qcow2");
    d.with("Clone", &("top.qcow2", options([("thin", true.into())]))).await.expect("thin");
    let top = pool.volume("top.qcow2").await.expect("there");
    assert_eq!(top.get::<ObjectPath<'static>>("BackingVolume").await.as_str(), d.path);
    assert_eq!(d.users().await, [(top.path.clone(), String::new(), "backing".to_owned())]);
    let held = d.run("Delete", options([("force", true.into())])).await.expect_err("a volume stands on it");
    assert!(held.0.ends_with("InUse") && held.1.contains("volume 'top.qcow2' (backing)"), "{held:?}");
    let flat = || options([("flatten", true.into()), ("format", "raw".into())]);
    top.with("Clone", &("flat.img", flat())).await.expect("flattened");
    assert!(same(source, &pool.at("flat.img")));
    // What is put on another is noted where it is made, and what a header says is nobody's wish.
    top.with("Clone", &("copy.qcow2", options([]))).await.expect("copied");
    let copy = pool.volume("copy.qcow2").await.expect("there");
    copy.with("Clone", &("flat2.img", flat())).await.expect("flattened");
    assert!(same(source, &pool.at("flat2.img")));
    let header = opened(&pool.at("top.qcow2"));
    let forged = options([("format", "qcow2".into()), ("content", header.into())]);
    let forged = pool.add("forged.qcow2", 0, forged).await.expect("made");
    for (name, wanted) in [("flat3.img", flat()), ("thin.qcow2", options([("thin", true.into())]))] {
        let refused = forged.with("Clone", &(name, wanted)).await.map(|_| ()).expect_err("it leads to another's");
        assert!(refused.0.ends_with("StorageFailed") && refused.1.contains("nobody noted"), "{refused:?}");
    }
}

async fn a_snapshot_keeps_its_volume(pool: &Pool) {
    let kept = pool.add("s.qcow2", 1 << 20, options([("format", "qcow2".into())])).await.expect("made");
    let taken = Command::new("qemu-img").args(["snapshot", "-c", "one"]).arg(pool.at("s.qcow2")).status();
    assert!(taken.expect("it runs").success());
    pool.run("Refresh", options([])).await.expect("refreshed");
    let refused = kept.run("Wipe", options([])).await.expect_err("a snapshot would go");
    assert!(refused.0.ends_with("OperationInvalid") && refused.1.contains("snapshots are in it"), "{refused:?}");
    kept.run("Delete", options([("with-snapshots", true.into())])).await.expect("deleted");
}

/// And another size. Of what is refused nothing is written, and nothing is incomplete.
async fn it_takes_other_content(pool: &Pool, b: &Volume, source: &Path) {
    let smaller = b.with("Resize", &(512u64, options([]))).await.expect_err("it would lose something");
    assert!(smaller.1.contains("say shrink"), "{smaller:?}");
    b.with("Resize", &(4u64 << 20, options([("allocate", true.into())]))).await.expect("resized");
    assert_eq!(b.get::<u64>("Capacity").await, 4 << 20);
    b.run("Wipe", options([])).await.expect("wiped");
    assert!(fs::read(pool.at("b.img")).unwrap().iter().all(|byte| *byte == 0));
    b.with("Upload", &(opened(source), options([("sparse", true.into())]))).await.expect("uploaded");
    assert!(same(source, &pool.at("b.img")));
    assert_eq!(b.get::<u64>("Capacity").await, (3 << 20) + 512);
    let mut part = tempfile::tempfile().expect("a file");
    fs::File::write_all_at(&part, b"abc", 0).expect("written");
    b.with("Upload", &(descriptor(&part), options([("offset", 100u64.into()), ("length", 3u64.into())])))
        .await
        .expect("a part");
    assert_eq!(b.get::<String>("State").await, "ready");
    let (ear, mouth) = std::io::pipe().expect("a pipe");
    drop(mouth);
    let empty = descriptor(&fs::File::from(std::os::fd::OwnedFd::from(ear)));
    for (from, at) in [(descriptor(&part), 1u64 << 40), (empty, 0)] {
        let wanted = options([("offset", at.into()), ("length", 3u64.into())]);
        let refused = b.with("Upload", &(from, wanted)).await.expect_err("it cannot be");
        assert!(refused.0.ends_with("InvalidArgument"), "{refused:?}");
        assert_eq!(b.get::<String>("State").await, "ready");
    }
    part.set_len(0).expect("empty");
    part.rewind().expect("at its beginning");
    b.with("Download", &(descriptor(&part), options([("offset", 99u64.into()), ("length", 5u64.into())])))
        .await
        .expect("a part");
    let mut read = Vec::new();
    part.rewind().expect("at its beginning");
    part.read_to_end(&mut read).expect("read");
    assert_eq!(&read[1..4], b"abc");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_made_holds_what_it_is_to_hold() {
    if !have(&["qemu-img"]) {
        return;
    }
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let pool = Pool::started(&daemon, &client, "images").await;
    let source = daemon.folder().join("source");
    pattern(&source, (3 << 20) + 512);
    // Imported in one step.
    let xml = "<volume><name>a.img</name><capacity>0</capacity></volume>";
    let a = pool.create(xml, options([("content", opened(&source).into())])).await.expect("made");
    assert!(same(&source, &pool.at("a.img")));
    assert_eq!((a.get::<u64>("Capacity").await, a.get::<String>("State").await), ((3 << 20) + 512, "ready".to_owned()));
    let taken = pool.add("a.img", 1, options([])).await.map(|_| ()).expect_err("the name is taken");
    assert!(taken.0.ends_with("VolumeExists"), "{taken:?}");
    is_cloned(&pool, &a, &source).await;
    let on_base = client.define(&machine("web", &pool.at("d.qcow2"), "qcow2")).await.expect("defined");
    let refused = on_base.run("Start").await.expect_err("it would write what volumes stand on");
    assert!(refused.0.ends_with("InUse") && refused.1.contains("of pool 'images'"), "{refused:?}");
    // Files stay where they are when their pool is stopped.
    pool.run("Destroy", options([])).await.expect("stopped");
    let refused = on_base.run("Start").await.expect_err("they stand on it still");
    assert!(refused.0.ends_with("InUse") && refused.1.contains("of pool 'images'"), "{refused:?}");
    on_base.run("Undefine").await.expect("undefined");
    pool.run("Start", options([])).await.expect("started");
    what_disks_stand_on_is_not_written(&daemon, &client, &pool, &source).await;
    let b = pool.volume("b.img").await.expect("there");
    a_snapshot_keeps_its_volume(&pool).await;
    it_takes_other_content(&pool, &b, &source).await;
    let xml: String = b.run("GetXML", options([])).await.expect("told").body().deserialize().expect("s");
    assert!(xml.contains("<name>b.img</name>") && xml.contains("<format type='raw'/>"), "{xml}");
    let on_d = ["top.qcow2", "copy.qcow2", "forged.qcow2"];
    for name in on_d.iter().chain(&["d.qcow2", "flat.img", "flat2.img", "c.img", "b.img", "a.img"]) {
        pool.volume(name).await.expect(name).run("Delete", options([])).await.expect(name);
    }
    assert!(pool.names().is_empty() && pool.list().await.is_empty(), "{:?}", pool.names());
}

/// Who undefines what opens a volume loses what it holds.
#[tokio::test(flavor = "multi_thread")]
async fn the_secret_of_a_volume_is_in_use() {
    if !have(&["qemu-img"]) {
        return;
    }
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let pool = Pool::started(&daemon, &client, "images").await;
    let uuid = "0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f";
    let xml = format!("<secret><uuid>{uuid}</uuid></secret>");
    let reply = client.call("/org/virt", "org.virt.Manager.Secret.DefineSecret", &(xml, options([]))).await;
    let secret: OwnedObjectPath = reply.expect("defined").body().deserialize().expect("o");
    let value = (b"open sesame".as_slice(), options([]));
    client.call(secret.as_str(), "org.virt.Secret.SetValue", &value).await.expect("set");
    let wanted = options([("format", "luks".into()), ("secret", uuid.into())]);
    let volume = pool.add("x", 1 << 20, wanted).await.expect("made");
    let xml: String = volume.run("GetXML", options([])).await.expect("told").body().deserialize().expect("s");
    assert!(xml.contains(&format!("<secret type='passphrase' uuid='{uuid}'/>")), "{xml}");
    volume.with("Clone", &("y", options([]))).await.expect("what opens the one opens the other");
    volume.run("Delete", options([])).await.expect("deleted");
    let refused = async |client: &Client| {
        let undefined = client.call(secret.as_str(), "org.virt.Secret.Undefine", &(options([]),)).await;
        let refused = undefined.expect_err("it is used");
        assert!(refused.0.ends_with("InUse") && refused.1.contains("volume 'y' of the pool"), "{refused:?}");
        assert!(!refused.1.contains("'x'"), "{refused:?}");
    };
    refused(&client).await;
    // A pool that is stopped has its volumes still.
    pool.run("Destroy", options([])).await.expect("stopped");
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    refused(&client).await;
    let pool = Pool { client: client.clone(), ..pool };
    pool.run("Start", options([])).await.expect("started");
    pool.volume("y").await.expect("there").run("Delete", options([])).await.expect("deleted");
    client.call(secret.as_str(), "org.virt.Secret.Undefine", &(options([]),)).await.expect("undefined");
}

/// Nothing in use is taken away, and who uses it is told by itself.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_machine_uses_stays() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let pool = Pool::started(&daemon, &client, "images").await;
    let volume = pool.add("web.img", 1 << 20, options([])).await.expect("made");
    assert!(volume.users().await.is_empty());
    let disk = pool.at("web.img");
    let machine = client.define(&machine("web", &disk, "raw")).await.expect("defined");
    let user = |how: &str| (machine.path.clone(), "vda".to_owned(), how.to_owned());
    assert_eq!(volume.users().await, [user("config")]);
    let refused = volume.run("Delete", options([])).await.expect_err("it is a disk");
    assert!(refused.0.ends_with("InUse") && refused.1.contains("domain 'web' (vda, config)"), "{refused:?}");
    let check = volume.check("CheckDelete", options([])).await;
    assert!(!bool::try_from(check["possible"].try_clone().unwrap()).unwrap());
    let breaks = Vec::<ObjectPath<'_>>::try_from(check["breaks"].try_clone().unwrap()).unwrap();
    assert_eq!(breaks.iter().map(|path| path.as_str()).collect::<Vec<_>>(), [&*machine.path]);
    // Whoever has something deeper in its folder uses the pool.
    let deep = client.define(&self::machine("deep", &pool.at("sub/deep.img"), "raw")).await.expect("defined");
    let users: Vec<(ObjectPath<'static>, String, String)> = pool.get("Users").await;
    assert!(users.iter().any(|(object, ..)| object.as_str() == deep.path), "{users:?}");
    deep.run("Undefine").await.expect("undefined");
    machine.run("Start").await.expect("started");
    assert_eq!(volume.users().await, [user("live"), user("config")]);
    for (method, wanted) in [("Delete", options([("force", true.into())])), ("Wipe", options([]))] {
        let refused = volume.run(method, wanted).await.expect_err(method);
        assert!(refused.0.ends_with("InUse") && refused.1.contains("vda, live"), "{refused:?}");
    }
    let refused = volume.with("Clone", &("copy", options([]))).await.expect_err("it is written");
    assert!(refused.0.ends_with("InUse"), "{refused:?}");
    pool.run("Destroy", options([])).await.expect("a folder is no mount");
    let refused = pool.run("Undefine", options([("force", true.into())])).await.expect_err("a guest runs on it");
    assert!(refused.0.ends_with("InUse"), "{refused:?}");
    pool.run("Start", options([])).await.expect("started");
    machine.run("Destroy").await.expect("ended");
    let volume = pool.volume("web.img").await.expect("there");
    volume.run("Delete", options([("force", true.into())])).await.expect("deleted");
    assert!(pool.names().is_empty());
}

/// What is done to a volume and what a machine does to it exclude each other until the end, whatever its file is called.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_at_work_is_no_machines_disk() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let store = daemon.folder().join("store");
    fs::create_dir(&store).expect("a folder");
    for link in ["images", "link"] {
        std::os::unix::fs::symlink(&store, daemon.folder().join(link)).expect("a link");
    }
    let pool = Pool::define(&client, "images", &daemon.folder().join("images")).await;
    pool.run("Start", options([])).await.expect("started");
    let volume = pool.add("web.img", 1 << 20, options([])).await.expect("made");
    let disk = daemon.folder().join("link/web.img");
    let web = client.define(&machine("web", &disk, "raw")).await.expect("defined");
    let in_use = |refused: Refusal, by: &str| {
        assert!(refused.0.ends_with("InUse") && refused.1.contains(by), "{refused:?}");
    };
    in_use(volume.run("Delete", options([])).await.expect_err("it is a disk"), "domain 'web' (disk 'vda')");
    let other = client.define(&machine("other", &store.join("web.img"), "raw")).await.expect("defined");
    assert_eq!(volume.users().await, [(other.path.clone(), "vda".to_owned(), "config".to_owned())]);
    // A new file takes its place, and is their disk all the same.
    let whole = tempfile::tempfile().expect("a file");
    whole.set_len(1 << 20).expect("its length");
    volume.with("Upload", &(descriptor(&whole), options([]))).await.expect("uploaded");
    other.run("Undefine").await.expect("undefined");
    in_use(volume.run("Delete", options([])).await.expect_err("it is a disk"), "domain 'web' (disk 'vda')");
    // Who reads it, however long, keeps no other reader waiting.
    let (ear, mouth) = std::io::pipe().expect("a pipe");
    let mouth = fs::File::from(std::os::fd::OwnedFd::from(mouth));
    let reply = volume.with("Download", &(descriptor(&mouth), options([("no-wait", true.into())]))).await;
    let reading: OwnedObjectPath = reply.expect("accepted").body().deserialize().expect("o");
    drop(mouth);
    // What has come through is of a file that is held.
    let begins = move || {
        let mut ear = ear;
        ear.read_exact(&mut [0]).expect("a byte");
        ear
    };
    let ear = tokio::task::spawn_blocking(begins).await.expect("read");
    volume.with("Clone", &("copy.img", options([]))).await.expect("it is kept as it is for both");
    in_use(web.run("Start").await.expect_err("it is read"), "what reads volume 'web.img'");
    let mut watch = client.watch().await;
    drop(ear);
    let is_read = async || {
        let state: String = client.property(reading.as_str(), "org.virt.Job", "State").await;
        matches!(&*state, "waiting" | "running")
    };
    while is_read().await {
        watch.next().await;
    }
    let (ear, mut mouth) = std::io::pipe().expect("a pipe");
    let ear = fs::File::from(std::os::fd::OwnedFd::from(ear));
    let wanted = options([("offset", 0u64.into()), ("no-wait", true.into())]);
    volume.with("Upload", &(descriptor(&ear), wanted)).await.expect("accepted");
    drop(ear);
    // A pipe holds less: when all of it has gone in, the upload is under way.
    let written = tokio::task::spawn_blocking(move || mouth.write_all(&[1; 256 << 10]).map(|()| mouth));
    let mouth = written.await.expect("no panic").expect("taken");
    in_use(web.run("Start").await.expect_err("it is written"), "the work on volume 'web.img'");
    drop(mouth);
    // It has its turn when the upload has ended.
    volume.with("Resize", &(2u64 << 20, options([]))).await.expect("resized");
    web.run("Start").await.expect("started");
    in_use(volume.run("Wipe", options([])).await.expect_err("a guest has it"), "domain 'web' (disk 'vda')");
}

/// Whatever step virtd is killed at: the old or the new, whole, and nothing beside it.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_killed_leaves_nothing_half() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let mut pool = Pool::started(&daemon, &client, "images").await;
    let (old, new) = (daemon.folder().join("old"), daemon.folder().join("new"));
    pattern(&old, 1 << 20);
    pattern(&new, (2 << 20) + 5);
    for verb in ["create", "clone", "upload", "delete", "define"] {
        for step in 1.. {
            assert!(step < 30, "{verb} never ends");
            fs::copy(&old, pool.at("base")).expect("copied");
            let _ = fs::remove_file(pool.at("made"));
            pool.run("Refresh", options([])).await.expect("refreshed");
            daemon.at_step(step, &format!("kill -9 {}", daemon.virtd_pid()));
            let base = pool.volume("base").await.expect("there");
            let content = || descriptor(&fs::File::open(&new).expect("a file"));
            let none = options([]);
            let did = match verb {
                "create" => {
                    let body = ("made", 0u64, options([("content", content().into())]));
                    client_asks(&pool.client, &pool.path, "org.virt.StoragePool.AddVolume", &body).await
                }
                "clone" => client_asks(&pool.client, &base.path, "org.virt.StorageVolume.Clone", &("made", none)).await,
                "upload" => {
                    client_asks(&pool.client, &base.path, "org.virt.StorageVolume.Upload", &(content(), none)).await
                }
                "delete" => client_asks(&pool.client, &base.path, "org.virt.StorageVolume.Delete", &(none,)).await,
                _ => {
                    let uuid = "<uuid>0f3a1d0e-6c51-4b2b-8d7c-0f0a2f6c7f11</uuid><target>";
                    let xml = document("another", &daemon.folder().join("another")).replace("<target>", uuid);
                    client_asks(&pool.client, "/org/virt", "org.virt.Manager.Storage.DefineStoragePool", &(xml, none))
                        .await
                }
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
            let names = pool.names();
            assert!(names.iter().all(|name| matches!(&**name, "base" | "made")), "{verb} at {step}: {names:?}");
            let wanted = if verb == "clone" { &old } else { &new };
            assert!(!pool.at("made").exists() || same(&pool.at("made"), wanted), "{verb} at {step}: it is half");
            let base = pool.at("base");
            match verb {
                "upload" => assert!(same(&base, &old) || same(&base, &new), "{verb} at {step}: it is half"),
                "delete" => assert!(!base.exists() || same(&base, &old), "{verb} at {step}: it is half"),
                _ => assert!(same(&base, &old), "{verb} at {step}"),
            }
            let listed: Vec<String> = pool.list().await.into_iter().map(|(name, ..)| name).collect();
            assert_eq!(listed, names, "{verb} at {step}");
            if ends {
                assert!(did, "{verb} is not done though nobody was killed");
                break;
            }
        }
    }
}

/// Whether it was done; it is fine if nobody is there to answer any more.
async fn client_asks<B>(client: &Client, path: &str, member: &str, body: &B) -> bool
where
    B: serde::Serialize + zbus::wire::DynamicType,
{
    client.ask(path, member, body).await
}
