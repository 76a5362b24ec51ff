//! A real guest whose disk is a volume of a pool: it boots from it, virtd is killed, snapshots are taken inside it and beside it, and
//! nobody else writes it.

use crate::common::Daemon;
use crate::common::client::{Client, Domain, Options, Refusal, options};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use std::path::Path;
use zbus::{Message, ObjectPath, OwnedObjectPath};

const POOL: &str = "org.virt.StoragePool";
const VOLUME: &str = "org.virt.StorageVolume";
const SECRET: &str = "0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f";

async fn started_pool(client: &Client, folder: &Path) -> String {
    let xml = format!("<pool type='dir'><name>images</name><target><path>{}</path></target></pool>", folder.display());
    let member = "org.virt.Manager.Storage.DefineStoragePool";
    let reply = client.call("/org/virt", member, &(xml, options([]))).await.expect("defined");
    let path: OwnedObjectPath = reply.body().deserialize().expect("o");
    client.call(path.as_str(), &format!("{POOL}.Start"), &(options([]),)).await.expect("started");
    path.to_string()
}

async fn volume(client: &Client, pool: &str, name: &str) -> Result<String, Refusal> {
    let reply = client.call(pool, &format!("{POOL}.GetVolume"), &(name,)).await?;
    let path: OwnedObjectPath = reply.body().deserialize().expect("o");
    Ok(path.to_string())
}

async fn clone(client: &Client, volume: &str, name: &str, wanted: Options<'_>) -> Result<Message, Refusal> {
    client.call(volume, &format!("{VOLUME}.Clone"), &(name, wanted)).await
}

async fn users(client: &Client, volume: &str) -> Vec<String> {
    let users: Vec<(ObjectPath<'static>, String, String)> = client.property(volume, VOLUME, "Users").await;
    users.into_iter().map(|(_, place, how)| format!("{place} {how}")).collect()
}

/// The guest with that volume as its disk, under another name, with a port of its own.
fn on_volume(tick: &mut Tick, volume: &str) -> String {
    tick.xml =
        tick.xml.replace("<disk type='file'", "<disk type='volume'").replace("<driver name='qemu' type='qcow2'/>", "");
    let source = format!("<source file='{}'/>", tick.disk.display());
    tick.xml = tick.xml.replace(&source, &format!("<source pool='images' volume='{volume}'/>"));
    tick.xml.clone()
}

async fn boots_and_ends(client: &Client, daemon: &Daemon, name: &str) -> Option<Domain> {
    let mut tick = Tick::new(daemon, name, "")?;
    std::fs::remove_file(&tick.disk).expect("it has a volume");
    let domain = client.define(&on_volume(&mut tick, name)).await.expect("defined");
    domain.run("Start").await.expect("started");
    tick.counts_to(1).await;
    domain.run("Destroy").await.expect("destroyed");
    Some(domain)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_runs_on_a_volume() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let Some(mut tick) = Tick::new(&daemon, "tick", "") else { return };
    let client = Client { connection: daemon.connect().await };
    let folder = daemon.folder().join("images");
    std::fs::create_dir(&folder).expect("a folder");
    let disk = folder.join("tick.img");
    std::fs::rename(&tick.disk, &disk).expect("it is a volume");
    let pool = started_pool(&client, &folder).await;
    let own = volume(&client, &pool, "tick.img").await.expect("there");

    // Beside it one that stands on it, and one that is encrypted: each has what it needs from the pool.
    clone(&client, &own, "thin", options([("thin", true.into())])).await.expect("cloned");
    boots_and_ends(&client, &daemon, "thin").await.expect("tools").run("Undefine").await.expect("undefined");
    let thin = volume(&client, &pool, "thin").await.expect("there");
    client.call(&thin, &format!("{VOLUME}.Delete"), &(options([]),)).await.expect("deleted");
    let xml = format!("<secret><uuid>{SECRET}</uuid></secret>");
    let reply = client.call("/org/virt", "org.virt.Manager.Secret.DefineSecret", &(xml, options([]))).await;
    let secret: OwnedObjectPath = reply.expect("defined").body().deserialize().expect("o");
    let value = (b"open sesame".as_slice(), options([]));
    client.call(secret.as_str(), "org.virt.Secret.SetValue", &value).await.expect("set");
    clone(&client, &own, "sealed", options([("format", "luks".into()), ("secret", SECRET.into())]))
        .await
        .expect("cloned");
    boots_and_ends(&client, &daemon, "sealed").await.expect("tools").run("Undefine").await.expect("undefined");

    let mut player = Player { domain: client.define(&on_volume(&mut tick, "tick.img")).await.expect("defined") };
    player.domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    let mut second = Tick::new(&daemon, "second", "").expect("tools");
    let second = client.define(&on_volume(&mut second, "tick.img")).await.expect("defined");
    let (name, why) = second.run("Start").await.expect_err("the first one has it");
    assert!(why.contains("domain 'tick' (disk 'vda') has it open"), "{name}: {why}");
    second.run("Undefine").await.expect("undefined");

    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    player.domain.client = client.clone();
    player.domain.is_looked_after().await;
    tick.goes_on().await;
    let xml = player.domain.xml().await;
    assert!(xml.contains("volume='tick.img'") && xml.contains(&format!("file='{}'", disk.display())), "{xml}");
    assert_eq!(users(&client, &own).await, ["vda live", "vda config"]);

    // It grows through the guest, and is served to nobody meanwhile.
    let larger = client.property::<u64>(&own, VOLUME, "Capacity").await + (1 << 20);
    let resize = async |capacity: u64, how| client.call(&own, &format!("{VOLUME}.Resize"), &(capacity, how)).await;
    resize(larger, options([])).await.expect("resized");
    assert_eq!(client.property::<u64>(&own, VOLUME, "Capacity").await, larger);
    let (name, why) = resize(1 << 20, options([("shrink", true.into())])).await.expect_err("it runs");
    assert!(name.ends_with("OperationInvalid") && why.contains("domain 'tick' (disk 'vda') runs on it"), "{why}");
    for read_only in [true, false] {
        let how = (options([("read-only", read_only.into())]),);
        let (name, why) = client.call(&own, &format!("{VOLUME}.OpenNBD"), &how).await.expect_err("it is written");
        assert!(name.ends_with("InUse") && why.contains("domain 'tick'"), "{name}: {why}");
    }
    tick.goes_on().await;

    // Inside it, with memory; gone back to; and the same machine again.
    player.take("inside").await;
    let (counted, _) = tick.counted().expect("it counts");
    tick.counts_to(counted + 4).await;
    player.call("inside", "Revert", options([])).await.expect("reverted");
    tick.goes_back_below(counted + 4).await;
    assert!(player.domain.xml().await.contains("volume='tick.img'"));
    player.call("inside", "Delete", options([])).await.expect("deleted");

    // Beside it: the overlay is a volume of the pool, and the machine's disk.
    let mut watch = client.watch().await;
    player.create("<domainsnapshot><name>s</name></domainsnapshot>", with([("disk-only", true)])).await.expect("taken");
    let overlay = loop {
        if let Ok(overlay) = volume(&client, &pool, "tick.s").await {
            break overlay;
        }
        watch.next().await;
    };
    assert_eq!(users(&client, &overlay).await, ["vda live", "vda config"]);
    tick.goes_on().await;
    let gone = client.call(&own, &format!("{VOLUME}.Delete"), &(options([("force", true.into())]),)).await;
    assert!(gone.expect_err("the overlay stands on it").0.ends_with("InUse"));
    player.domain.run("Destroy").await.expect("destroyed");
    player.call("s", "Revert", options([])).await.expect("reverted");
    player.domain.run("Start").await.expect("started");
    tick.goes_on().await;
    player.domain.run("Destroy").await.expect("destroyed");
}
