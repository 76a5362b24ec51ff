//! Machines whose disks are volumes of pools: resolved when they start, used both ways, and told beforehand what is missing.

use crate::common::client::{Client, Domain, Options, Refusal, options};
use crate::common::snapshots::Player;
use crate::common::{Daemon, Setup, have};
use std::path::{Path, PathBuf};
use zbus::{Message, ObjectPath, OwnedObjectPath, Variant};

const POOL: &str = "org.virt.StoragePool";
const VOLUME: &str = "org.virt.StorageVolume";

/// A machine with that disk.
fn machine(name: &str, source: &str) -> String {
    format!(
        "<domain type='test'><name>{name}</name><memory>65536</memory><vcpu>1</vcpu><os><type>hvm</type></os><devices>\
         <disk type='volume'><source {source}/><target dev='vda' bus='virtio'/></disk></devices></domain>"
    )
}

/// A pool that is built and started; its path on the bus, and its folder.
async fn pool(client: &Client, name: &str, folder: &Path) -> (String, PathBuf) {
    let xml = format!("<pool type='dir'><name>{name}</name><target><path>{}</path></target></pool>", folder.display());
    let member = "org.virt.Manager.Storage.DefineStoragePool";
    let reply = client.call("/org/virt", member, &(xml, options([]))).await.expect("defined");
    let path: OwnedObjectPath = reply.body().deserialize().expect("o");
    does(client, path.as_str(), "Start", options([("build", true.into())])).await.expect("started");
    (path.to_string(), folder.to_owned())
}

async fn does(client: &Client, pool: &str, method: &str, options: Options<'_>) -> Result<Message, Refusal> {
    client.call(pool, &format!("{POOL}.{method}"), &(options,)).await
}

async fn add(client: &Client, pool: &str, name: &str, options: Options<'_>) -> String {
    let reply = client.call(pool, &format!("{POOL}.AddVolume"), &(name, 1u64 << 20, options)).await.expect("made");
    let (path, _job): (OwnedObjectPath, OwnedObjectPath) = reply.body().deserialize().expect("oo");
    path.to_string()
}

async fn users(client: &Client, path: &str, interface: &str) -> Vec<(String, String)> {
    let users: Vec<(ObjectPath<'static>, String, String)> = client.property(path, interface, "Users").await;
    users.into_iter().map(|(_, place, how)| (place, how)).collect()
}

fn user(how: &str) -> (String, String) {
    ("vda".to_owned(), how.to_owned())
}

async fn stored_xml(domain: &Domain) -> String {
    let reply = domain.call("GetXML", &(options([("inactive", true.into())]),)).await.expect("told");
    reply.body().deserialize().expect("s")
}

fn refused<T>(result: Result<T, Refusal>, error: &str, why: &str) {
    let Err((name, text)) = result else { panic!("it is done: {why}") };
    assert!(name.ends_with(error) && text.contains(why), "{name}: {text}");
}

/// What is found of a machine with such a disk.
async fn told(client: &Client, source: &str) -> String {
    let body = (machine("none", source), options([]));
    let reply = client.call("/org/virt", "org.virt.Manager.ValidateDomain", &body).await.expect("told");
    let told: Vec<(String, u32, u32, String)> = reply.body().deserialize().expect("findings");
    told.into_iter().map(|(_, _, _, text)| text).collect::<Vec<_>>().join("\n")
}

/// Beforehand, and when it is needed.
async fn what_is_missing_is_told(client: &Client) {
    assert_eq!(told(client, "pool='images' volume='web.img'").await, "");
    for (source, error, why) in [
        ("pool='images' volume='gone'", "NoSuchVolume", "pool 'images' has no volume 'gone'"),
        ("pool='images' volume='../web.img'", "NoSuchVolume", "pool 'images' has no volume '../web.img'"),
        ("pool='nowhere' volume='web.img'", "NoSuchPool", "nowhere"),
    ] {
        assert!(told(client, source).await.contains(why), "{source}: {}", told(client, source).await);
        let none = client.define(&machine("none", source)).await.expect("stored all the same");
        refused(none.run("Start").await, error, why);
        none.run("Undefine").await.expect("undefined");
    }
    assert!(told(client, "pool='images'").await.contains("needs <source pool='…' volume='…'/>"));
}

async fn a_device_is_resolved_likewise(client: &Client, web: &Domain, images: &str, folder: &Path) {
    let second = add(client, images, "more.img", options([])).await;
    let disk = |volume: &str| {
        format!("<disk type='volume'><source pool='images' volume='{volume}'/><target dev='vdb' bus='virtio'/></disk>")
    };
    let live = || options([("live", true.into()), ("config", true.into())]);
    refused(web.call("AttachDevice", &(disk("gone"), live())).await, "NoSuchVolume", "disk 'vdb'");
    web.call("AttachDevice", &(disk("more.img"), live())).await.expect("plugged in");
    let more = folder.join("more.img").display().to_string();
    assert!(web.xml().await.contains(&format!("file='{more}'")) && !stored_xml(web).await.contains("file="));
    assert!(!web.property::<bool>("ConfigChanged").await);
    let copied = async |name: &str| client.call(&second, &format!("{VOLUME}.Clone"), &(name, options([]))).await;
    refused(copied("copy.img").await, "InUse", "domain 'web'");
    web.call("DetachDevice", &(disk("more.img"), live())).await.expect("unplugged");
    // What a guest only reads is copied meanwhile.
    let read_only = disk("more.img").replace("<target", "<readonly/><target");
    web.call("AttachDevice", &(&*read_only, live())).await.expect("plugged in");
    copied("copy.img").await.expect("copied");
    web.call("DetachDevice", &(read_only, live())).await.expect("unplugged");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_a_machines_disk() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let (images, folder) = pool(&client, "images", &daemon.folder().join("images")).await;
    let volume = add(&client, &images, "web.img", options([])).await;
    let file = folder.join("web.img").display().to_string();

    what_is_missing_is_told(&client).await;

    // Both ways it is known who uses it, and a path that a client has given is none.
    let web =
        client.define(&machine("web", "pool='images' volume='web.img' file='/etc/shadow'")).await.expect("defined");
    assert_eq!(users(&client, &volume, VOLUME).await, [user("config")]);
    assert_eq!(users(&client, &images, POOL).await, [user("config")]);
    refused(does_volume(&client, &volume, "Delete").await, "InUse", "domain 'web' (vda, config)");
    assert!(!web.xml().await.contains("file="), "{}", web.xml().await);
    web.run("Start").await.expect("started");
    let xml = web.xml().await;
    let wanted = "<disk type='volume'>";
    assert!(xml.contains(wanted) && xml.contains("pool='images'") && xml.contains("volume='web.img'"), "{xml}");
    assert!(xml.contains(&format!("file='{file}'")) && xml.contains("<driver type='raw'/>"), "{xml}");
    assert!(!stored_xml(&web).await.contains("file=") && !stored_xml(&web).await.contains("<driver"));
    assert!(!web.property::<bool>("ConfigChanged").await, "what the volume says of itself is no change");
    assert_eq!(users(&client, &volume, VOLUME).await, [user("live"), user("config")]);
    refused(does_volume(&client, &volume, "Wipe").await, "InUse", "vda, live");

    a_device_is_resolved_likewise(&client, &web, &images, &folder).await;

    // A folder's pool just turns inactive, which no guest notices; the next start needs it.
    refused(does(&client, &images, "Undefine", options([])).await, "OperationInvalid", "active");
    does(&client, &images, "Destroy", options([])).await.expect("stopped");
    let forced = options([("force", true.into())]);
    refused(does(&client, &images, "Undefine", forced).await, "InUse", "domain 'web' (vda, live)");
    web.run("Destroy").await.expect("ended");
    refused(does(&client, &images, "Undefine", options([])).await, "InUse", "domain 'web' (vda, config)");
    refused(web.run("Start").await, "OperationInvalid", "pool 'images' is inactive");
    assert!(told(&client, "pool='images' volume='web.img'").await.contains("start it first"));
    let with_pool = || options([("start-dependencies", Variant::from(true))]);
    web.call("Start", &(with_pool(),)).await.expect("both are started");
    assert_eq!(client.property::<String>(&images, POOL, "State").await, "running");

    // The next virtd opens the pool again, and who starts a machine meanwhile waits for it.
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let web = Domain { client: client.clone(), path: web.path };
    web.is_looked_after().await;
    web.run("Start").await.expect("started");
    assert_eq!(users(&client, &volume, VOLUME).await, [user("live"), user("config")]);
    let storage = options([("storage", Variant::from(vec!["vda"]))]);
    web.run("Destroy").await.expect("ended");
    refused(web.call("Undefine", &(storage,)).await, "OperationInvalid", "delete it there");
    web.run("Undefine").await.expect("undefined");
    assert!(folder.join("web.img").exists() && users(&client, &volume, VOLUME).await.is_empty());
}

async fn does_volume(client: &Client, volume: &str, method: &str) -> Result<Message, Refusal> {
    client.call(volume, &format!("{VOLUME}.{method}"), &(options([]),)).await
}

/// What a volume is, its pool says: format and base; its header is not asked.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_brings_its_format_and_its_base() {
    if !have(&["qemu-img"]) {
        return;
    }
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let (images, folder) = pool(&client, "images", &daemon.folder().join("images")).await;
    let base = add(&client, &images, "base", options([("format", "qcow2".into())])).await;
    let thin = ("thin", options([("thin", true.into())]));
    client.call(&base, &format!("{VOLUME}.Clone"), &thin).await.expect("cloned");

    let web = client.define(&machine("web", "pool='images' volume='thin'")).await.expect("defined");
    web.run("Start").await.expect("started");
    let xml = web.xml().await;
    assert!(xml.contains("<driver type='qcow2'/>") && xml.contains("<format type='qcow2'/>"), "{xml}");
    assert!(xml.contains(&format!("<source file='{}'/>", folder.join("base").display())), "{xml}");
    assert!(!web.property::<bool>("ConfigChanged").await);
    refused(does_volume(&client, &base, "Wipe").await, "InUse", "web");
    web.run("Destroy").await.expect("ended");
    // At rest it is snapshotted where its volume is, and there alone.
    let player = Player { domain: web };
    player.take("s").await;
    assert!(player.xml("s").await.contains(&format!("file='{}'", folder.join("thin").display())));
    player.call("s", "Revert", options([])).await.expect("reverted");
    player.call("s", "Delete", options([])).await.expect("deleted");
    does(&client, &images, "Destroy", options([])).await.expect("stopped");
    let one = "<domainsnapshot><name>t</name></domainsnapshot>";
    refused(player.create(one, options([])).await, "OperationInvalid", "pool 'images' is inactive");
    does(&client, &images, "Start", options([])).await.expect("started");
    player.domain.run("Undefine").await.expect("undefined");
}

/// What starts with the host: pools before machines, each once; who starts a machine meanwhile waits for its pool.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_starts_with_the_host_has_its_pool() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let (books, _) = pool(&client, "books", &daemon.folder().join("books")).await;
    let (images, _) = pool(&client, "images", &daemon.folder().join("images")).await;
    let mut machines = Vec::new();
    for name in ["web", "db", "had"] {
        add(&client, &images, &format!("{name}.img"), options([])).await;
        let xml = machine(name, &format!("pool='images' volume='{name}.img'"));
        machines.push(client.define(&xml).await.expect("defined").path);
    }
    let [web, db, had] = &machines[..] else { unreachable!("three") };
    let set = "org.freedesktop.DBus.Properties.Set";
    for (path, interface) in [(&books, POOL), (&images, POOL), (web, "org.virt.Domain"), (had, "org.virt.Domain")] {
        client.call(path, set, &(interface, "Autostart", Variant::from(true))).await.expect("set");
    }
    for pool in [&books, &images] {
        does(&client, pool, "Destroy", options([])).await.expect("stopped");
    }
    daemon.kill_virtd().await;
    // As after a boot of which an earlier virtd has started one machine, which somebody has stopped since.
    let run = daemon.root().join("run/virt");
    std::fs::remove_file(run.join("autostarted")).expect("the mark of this boot");
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("a boot");
    let uuid = had.rsplit_once("/_").expect("a uuid").1.replace('_', "-");
    std::fs::write(run.join("autostarting"), format!("{boot}{uuid}\n")).expect("written");
    let goes_on = daemon.folder().join("goes-on");
    daemon.at_step(1, &format!("until [ -e {} ]; do sleep 0.05; done", goes_on.display()));
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let domain = |path: &str| Domain { client: client.clone(), path: path.to_owned() };
    let (web, db, had) = (domain(web), domain(db), domain(had));
    let mut watch = client.watch().await;
    let starts = db.run("Start");
    let told = async {
        assert_ne!(client.property::<String>(&images, POOL, "State").await, "running", "the other pool is first");
        std::fs::write(&goes_on, "").expect("written");
    };
    tokio::join!(starts, told).0.expect("it waits for its pool");
    while web.state().await.0 != "running" {
        watch.next().await;
    }
    assert_eq!(client.property::<String>(&images, POOL, "State").await, "running");
    assert_eq!(had.state().await.0, "shutoff", "it has had its turn");
}

/// What a machine's disk stands on is named as its disk is.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_what_a_machines_disk_stands_on() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let (images, folder) = pool(&client, "images", &daemon.folder().join("images")).await;
    let volume = add(&client, &images, "base.img", options([("format", "qcow2".into())])).await;
    let base = format!("file='{}'", folder.join("base.img").display());
    let overlay = |volume: &str| {
        let below = format!("<backingStore type='volume'><source pool='images' volume='{volume}'/></backingStore>");
        machine("web", "file='/nowhere/web.qcow2'")
            .replace("type='volume'><source", &format!("type='file'><driver name='qemu' type='qcow2'/>{below}<source"))
    };
    let body = (overlay("gone"), options([]));
    let reply = client.call("/org/virt", "org.virt.Manager.ValidateDomain", &body).await.expect("told");
    let told: Vec<(String, u32, u32, String)> = reply.body().deserialize().expect("findings");
    assert!(
        told.iter().any(|(_, _, _, text)| text.contains("disk 'vda': pool 'images' has no volume 'gone'")),
        "{told:?}"
    );
    let web = client.define(&overlay("gone")).await.expect("stored all the same");
    refused(web.run("Start").await, "NoSuchVolume", "pool 'images' has no volume 'gone'");
    web.run("Undefine").await.expect("undefined");

    let web = client.define(&overlay("base.img")).await.expect("defined");
    assert_eq!(users(&client, &volume, VOLUME).await, [user("config")]);
    refused(does_volume(&client, &volume, "Delete").await, "InUse", "domain 'web' (vda, config)");
    does(&client, &images, "Destroy", options([])).await.expect("stopped");
    refused(web.run("Start").await, "OperationInvalid", "pool 'images' is inactive");
    web.call("Start", &(options([("start-dependencies", true.into())]),)).await.expect("started, and its pool");
    assert!(web.xml().await.contains(&base), "{}", web.xml().await);
    assert!(!stored_xml(&web).await.contains(&base) && !web.property::<bool>("ConfigChanged").await);
    let both = [user("config"), user("live")];
    assert!(users(&client, &volume, VOLUME).await.iter().all(|user| both.contains(user)));
    refused(does_volume(&client, &volume, "Wipe").await, "InUse", "domain 'web'");
    web.run("Destroy").await.expect("stopped");
    web.run("Undefine").await.expect("undefined");
    does_volume(&client, &volume, "Delete").await.expect("nobody needs it");
}
