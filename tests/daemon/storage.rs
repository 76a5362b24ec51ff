//! Storage pools through the bus: what others make in them appears by itself, and their files stay. And what tests of pools and volumes
//! share.

use crate::common::client::{Client, Options, Refusal, Watch, descriptor, options};
use crate::common::pools::{POOL, Pool, STORAGE, Volume, document};
use crate::common::users::BOB;
use crate::common::{Daemon, Setup};
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use zbus::{ObjectPath, OwnedObjectPath, OwnedVariant, Variant};

/// Something with holes that is nothing else.
pub fn pattern(path: &Path, bytes: u64) {
    let file = fs::File::create(path).expect("a file");
    file.set_len(bytes).expect("its length");
    for at in (0..bytes.saturating_sub(4096)).step_by(300_000) {
        let block: Vec<u8> = (0..4096u64).map(|i| ((i * 7 + at) % 251) as u8).collect();
        file.write_all_at(&block, at).expect("written");
    }
}

pub fn same(one: &Path, other: &Path) -> bool {
    fs::read(one).expect("one") == fs::read(other).expect("other")
}

/// Waits until an object has come or gone.
pub async fn until(watch: &mut Watch, member: &str, ends: &str) {
    loop {
        let message = watch.next().await;
        if message.header().member().is_none_or(|told| told.as_str() != member) {
            continue;
        }
        let body = message.body();
        let path = match member {
            "InterfacesAdded" => {
                let told: (ObjectPath<'_>, HashMap<String, HashMap<String, OwnedVariant>>) =
                    body.deserialize().expect(member);
                told.0.to_string()
            }
            _ => {
                let told: (ObjectPath<'_>, Vec<String>) = body.deserialize().expect(member);
                told.0.to_string()
            }
        };
        if path.ends_with(ends) {
            return;
        }
    }
}

/// Whether a pool of that name is there.
pub async fn is_there(client: &Client, name: &str) -> bool {
    match client.call("/org/virt", &format!("{STORAGE}.GetStoragePoolByName"), &(name,)).await {
        Ok(_) => true,
        Err((error, why)) => {
            assert!(error.ends_with("NoSuchPool"), "{error}: {why}");
            false
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_of_which_nothing_is_stored_ends_when_it_is_stopped() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let folder = daemon.folder().join("brief");
    let create = async |client: &Client, folder: &Path, options: Options<'_>| {
        let (member, body) = (format!("{STORAGE}.CreateStoragePool"), (document("brief", folder), options));
        let reply = client.call("/org/virt", &member, &body).await;
        let made: (OwnedObjectPath, OwnedObjectPath) = reply?.body().deserialize().expect("oo");
        Ok::<_, Refusal>(Pool { client: client.clone(), path: made.0.to_string(), folder: folder.to_owned() })
    };
    let refused = create(&client, &folder, options([])).await.map(|_| ()).expect_err("there is no folder");
    assert!(refused.0.ends_with("StorageFailed"), "{refused:?}");
    assert!(!is_there(&client, "brief").await, "nothing is left of it");
    let refused =
        create(&client, &folder, options([("overwrite", true.into())])).await.map(|_| ()).expect_err("of what?");
    assert!(refused.0.ends_with("InvalidArgument"), "{refused:?}");
    assert!(!is_there(&client, "brief").await);
    let pool = create(&client, &folder, options([("build", true.into())])).await.expect("started");
    assert!(pool.get::<String>("State").await == "running" && !pool.get::<bool>("Persistent").await);
    let autostart = (POOL, "Autostart", Variant::from(true));
    let refused = client.call(&pool.path, "org.freedesktop.DBus.Properties.Set", &autostart).await;
    let refused = refused.expect_err("nothing of it would be there");
    assert!(refused.0.ends_with("OperationInvalid") && refused.1.contains("nothing is stored"), "{refused:?}");
    let again = create(&client, &folder, options([])).await.map(|_| ()).expect_err("another one");
    assert!(again.0.ends_with("PoolExists"), "{again:?}");
    pool.add("kept", 1 << 20, options([("format", "qcow2".into())])).await.expect("made");
    let uuid: String = pool.get("UUID").await;
    let kept = [format!("run/virt/pools/{uuid}.xml"), format!("var/lib/virt/pools/{uuid}.volumes.json")];
    let kept = kept.map(|file| daemon.root().join(file));
    assert!(kept.iter().all(|file| file.exists()));
    // The next virtd knows it, and what it has made in it.
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let pool = Pool { client: client.clone(), ..pool };
    let mut watch = client.watch().await;
    while pool.get::<String>("State").await != "running" {
        watch.next().await;
    }
    assert!(!pool.get::<bool>("Persistent").await);
    assert_eq!(pool.list().await, [("kept".to_owned(), "qcow2".to_owned(), 1 << 20)]);
    pool.run("Destroy", options([])).await.expect("stopped");
    assert!(!is_there(&client, "brief").await && pool.names() == ["kept"]);
    assert!(kept.iter().all(|file| !file.exists()), "nothing of it is kept");
    // What is stored of one stays as it is, whatever it is started with.
    let stored = Pool::define(&client, "brief", &daemon.folder().join("elsewhere")).await;
    let known = document("brief", &folder)
        .replace("<target>", &format!("<uuid>{}</uuid><target>", stored.get::<String>("UUID").await));
    let begun = client.call("/org/virt", &format!("{STORAGE}.CreateStoragePool"), &(&known, options([]))).await;
    begun.expect("started");
    assert!(stored.get::<bool>("ConfigChanged").await && stored.get::<bool>("Persistent").await);
    assert_eq!(stored.get::<String>("Target").await, folder.display().to_string());
    stored.run("Destroy", options([])).await.expect("stopped");
    assert_eq!(stored.get::<String>("State").await, "inactive");
    stored.run("Undefine", options([])).await.expect("undefined");
    // One that runs is stored from now on.
    let pool = create(&client, &folder, options([])).await.expect("started");
    let uuid: String = pool.get("UUID").await;
    let known = document("brief", &folder).replace("<target>", &format!("<uuid>{uuid}</uuid><target>"));
    client.call("/org/virt", &format!("{STORAGE}.DefineStoragePool"), &(known, options([]))).await.expect("stored");
    assert!(pool.get::<bool>("Persistent").await && !pool.get::<bool>("ConfigChanged").await);
    pool.run("Destroy", options([])).await.expect("stopped");
    assert!(is_there(&client, "brief").await);
}

/// Defines the pool that the package ships as the package does, but for its folder: its path on the bus, and that folder.
fn ships_default(daemon: &Daemon) -> (String, PathBuf) {
    let (uuid, folder) = ("8f6e1a1e-2c4f-4b6b-9d5c-000000000001", daemon.folder().join("shipped"));
    fs::create_dir(&folder).expect("a folder");
    let shipped = include_str!("../../data/pools/default.xml").replace("@UUID@", uuid);
    let shipped = shipped.replace("/var/lib/virt-images", &folder.display().to_string());
    let pools = daemon.root().join("var/lib/virt/pools");
    fs::write(pools.join(format!("{uuid}.xml")), shipped).expect("written");
    fs::write(pools.join(format!("{uuid}.json")), "{\"owner\":0,\"autostart\":true}").expect("written");
    (format!("/org/virt/pool/_{}", uuid.replace('-', "_")), folder)
}

/// What somebody else makes appears by itself, and goes by itself.
async fn what_others_make_comes_and_goes(client: &Client, watch: &mut Watch, pool: &Pool) {
    pattern(&pool.at("dropped.img"), 1 << 20);
    until(watch, "InterfacesAdded", "/volume/dropped_2eimg").await;
    let file = pool.at("dropped.img").display().to_string();
    let reply = client.call("/org/virt", &format!("{STORAGE}.GetVolumeByPath"), &(file,)).await;
    let found: OwnedObjectPath = reply.expect("found").body().deserialize().expect("o");
    assert_eq!(found.as_str(), pool.volume("dropped.img").await.expect("there").path);
    fs::remove_file(pool.at("dropped.img")).expect("removed");
    until(watch, "InterfacesRemoved", "/volume/dropped_2eimg").await;
    let gone = pool.volume("dropped.img").await.map(|_| ()).expect_err("it is gone");
    assert!(gone.0.ends_with("NoSuchVolume"), "{gone:?}");
}

/// Stopped, it has no volumes, and its files stay, also when it is undefined.
async fn its_files_stay(pool: &Pool) {
    let active = pool.run("Undefine", options([])).await.expect_err("it is active");
    assert!(active.0.ends_with("OperationInvalid"), "{active:?}");
    pool.run("Destroy", options([])).await.expect("stopped");
    assert!(pool.list().await.is_empty() && pool.names() == ["kept"]);
    let full = pool.run("Delete", options([])).await.expect_err("a file is in it");
    assert!(full.1.contains("there are files in it"), "{full:?}");
    pool.run("Undefine", options([])).await.expect("undefined");
    assert!(pool.names() == ["kept"], "nothing is taken from the folder");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_is_defined_started_and_found_again() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let folder = daemon.folder().join("images");
    let mut watch = client.watch().await;
    let pool = Pool::define(&client, "images", &folder).await;
    until(&mut watch, "InterfacesAdded", &pool.path).await;
    assert_eq!(pool.get::<String>("State").await, "inactive");
    let (error, why) = pool.run("Start", options([])).await.expect_err("there is no folder");
    assert!(error.ends_with("StorageFailed") && why.contains("build the pool first"), "{why}");
    assert_eq!(pool.get::<String>("State").await, "inactive");
    pool.run("Start", options([("build", true.into())])).await.expect("started");
    assert_eq!(pool.get::<String>("State").await, "running");
    assert!(pool.get::<u64>("Capacity").await > 0 && pool.get::<bool>("Active").await);
    let bad = pool.run("Start", options([("biuld", true.into())])).await.expect_err("no such option");
    assert!(bad.0.ends_with("InvalidArgument") && bad.1.contains("was 'build' meant?"), "{}", bad.1);
    what_others_make_comes_and_goes(&client, &mut watch, &pool).await;
    // Found again, whoever was killed; and as it runs, whatever is stored meanwhile.
    pool.add("kept", 1 << 20, options([])).await.expect("made");
    let uuid: String = pool.get("UUID").await;
    let define = format!("{STORAGE}.DefineStoragePool");
    let anew = |folder: &Path| {
        let uuid = format!("<uuid>{uuid}</uuid><target>");
        (document("images", folder).replace("<target>", &uuid), options([]))
    };
    client.call("/org/virt", &define, &anew(&daemon.folder().join("elsewhere"))).await.expect("defined");
    assert!(pool.get::<bool>("ConfigChanged").await);
    client
        .call(&pool.path, "org.freedesktop.DBus.Properties.Set", &(POOL, "Autostart", Variant::from(true)))
        .await
        .expect("set");
    daemon.kill_virtd().await;
    let shipped = ships_default(&daemon);
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let pool = Pool { client: client.clone(), ..pool };
    let default = Pool { client: client.clone(), path: shipped.0, folder: shipped.1 };
    default.run("Start", options([])).await.expect("started");
    assert!(default.get::<String>("Name").await == "default" && default.get::<bool>("Autostart").await);
    assert!(pool.get::<bool>("Autostart").await);
    let mut watch = client.watch().await;
    while pool.get::<String>("State").await != "running" {
        watch.next().await;
    }
    assert_eq!(pool.list().await, [("kept".to_owned(), "raw".to_owned(), 1 << 20)]);
    assert_eq!(pool.get::<String>("Target").await, folder.display().to_string());
    assert!(pool.get::<bool>("ConfigChanged").await);
    client.call("/org/virt", &define, &anew(&folder)).await.expect("defined");
    assert!(!pool.get::<bool>("ConfigChanged").await);
    let xml: String = pool.run("GetXML", options([])).await.expect("told").body().deserialize().expect("s");
    assert!(xml.contains("<available unit='bytes'>"), "{xml}");
    // What is noted of formats is not begun anew where it cannot be read: a guest's header would be believed.
    let noted = daemon.root().join(format!("var/lib/virt/pools/{uuid}.volumes.json"));
    let right = fs::read(&noted).expect("noted");
    daemon.kill_virtd().await;
    fs::write(&noted, "[").expect("written");
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let pool = Pool { client: client.clone(), ..pool };
    assert_eq!(pool.get::<String>("State").await, "inactive");
    let refused = pool.run("Start", options([])).await.expect_err("it is broken");
    assert!(refused.1.contains("what is noted of its volumes"), "{refused:?}");
    client.call("/org/virt", &define, &anew(&folder)).await.expect_err("it cannot be read still");
    assert_eq!(fs::read(&noted).expect("there"), b"[");
    fs::write(&noted, &right).expect("written");
    client.call("/org/virt", &define, &anew(&folder)).await.expect("defined");
    pool.run("Start", options([])).await.expect("started");
    assert_eq!(pool.list().await, [("kept".to_owned(), "raw".to_owned(), 1 << 20)]);
    its_files_stay(&pool).await;
    let reply = client.call("/org/virt", &format!("{STORAGE}.GetStoragePoolByName"), &("images",)).await;
    assert!(reply.expect_err("gone").0.ends_with("NoSuchPool"));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_volumes_are_listed() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let pool = Pool::started(&daemon, &client, "images").await;
    pool.run("Destroy", options([])).await.expect("stopped");
    for number in 0..2000 {
        fs::write(pool.at(&format!("v{number:04}")), [1]).expect("written");
    }
    pool.run("Start", options([])).await.expect("started");
    assert_eq!((pool.get::<u32>("VolumeCount").await, pool.list().await.len()), (2000, 2000));
    pool.run("Refresh", options([])).await.expect("refreshed");
    assert!(daemon.own_memory_kib() < 32 << 10, "{} KiB", daemon.own_memory_kib());
    let types: HashMap<String, HashMap<String, OwnedVariant>> =
        client.property("/org/virt", STORAGE, "PoolTypes").await;
    assert!(bool::try_from(types["dir"]["supported"].try_clone().unwrap()).unwrap());
    assert!(!bool::try_from(types["zfs"]["supported"].try_clone().unwrap()).unwrap());
}

/// What only an administrator may do, nobody else does.
#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_is_refused_and_learns_nothing() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = Client { connection: daemon.connect().await };
    let pool = Pool::started(&daemon, &root, "images").await;
    let volume = pool.add("a.img", 1 << 20, options([])).await.expect("made");
    let other = Client { connection: daemon.connect_as(&BOB).await };
    let denied = |refused: Refusal| assert!(refused.0.ends_with("InteractiveAuthorizationRequired"), "{refused:?}");
    let xml = document("mine", Path::new("/etc"));
    denied(other.call("/org/virt", &format!("{STORAGE}.DefineStoragePool"), &(xml, options([]))).await.unwrap_err());
    let theirs = Pool { client: other.clone(), path: pool.path.clone(), folder: pool.folder.clone() };
    for method in ["Start", "Refresh", "Destroy", "Build", "Delete", "Undefine"] {
        denied(theirs.run(method, options([])).await.unwrap_err());
    }
    denied(theirs.add("b.img", 1, options([])).await.map(|_| ()).unwrap_err());
    let theirs = Volume { client: other, path: volume.path.clone() };
    for method in ["Delete", "Wipe"] {
        denied(theirs.run(method, options([])).await.unwrap_err());
    }
    denied(theirs.with("Clone", &("b.img", options([]))).await.map(|_| ()).unwrap_err());
    denied(theirs.with("Resize", &(1u64, options([]))).await.map(|_| ()).unwrap_err());
    let file = tempfile::tempfile().expect("a file");
    for method in ["Upload", "Download"] {
        denied(theirs.with(method, &(descriptor(&file), options([]))).await.map(|_| ()).unwrap_err());
    }
    assert_eq!(pool.names(), ["a.img"]);
}
