//! Quotas of storage through the bus: as the configuration says, counted anew by the next virtd, and told to whom they concern.

use crate::common::client::{Client, options};
use crate::common::users::{ALICE, BOB};
use crate::common::{Daemon, Setup};
use std::collections::HashMap;
use std::fs;
use zbus::{OwnedObjectPath, OwnedVariant};

const STORAGE: &str = "org.virt.Manager.Storage";
const POOL: &str = "org.virt.StoragePool";

/// Volumes and their limit, bytes and their limit.
type Told = (u32, u32, u64, u64);

async fn quota(client: &Client, uid: u32) -> Result<Told, (String, String)> {
    let reply = client.call("/org/virt", &format!("{STORAGE}.GetQuota"), &(uid,)).await?;
    let mut told: HashMap<String, OwnedVariant> = reply.body().deserialize().expect("a{sv}");
    let mut value = |key: &str| told.remove(key).expect("told");
    let volumes = (u32::try_from(value("volumes")).expect("u"), u32::try_from(value("volumes-limit")).expect("u"));
    let bytes = (u64::try_from(value("bytes")).expect("t"), u64::try_from(value("bytes-limit")).expect("t"));
    assert!(told.is_empty(), "{told:?}");
    Ok((volumes.0, volumes.1, bytes.0, bytes.1))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_says_how_much_a_user_may_have() {
    let rules = r#"polkit.addRule(function (action, subject) {
        if (subject.user == "virt-alice" && action.id.indexOf("org.virt.volume.") == 0) { return polkit.Result.YES; }
        if (subject.user == "virt-bob" && action.id == "org.virt.storage.read") { return polkit.Result.NO; }
    });"#;
    let Some(mut daemon) = Daemon::system_bus(Setup { rules: rules.to_owned(), ..Setup::default() }) else { return };
    let config = daemon.root().join("etc/virt");
    fs::create_dir_all(&config).expect("a folder");
    fs::write(config.join("virtd.toml"), "[limits]\nvolumes-per-user = 3\nstorage-per-user = 4194304\n")
        .expect("written");
    daemon.start_virtd().await;
    let root = Client { connection: daemon.connect().await };
    let alice = Client { connection: daemon.connect_as(&ALICE).await };
    let bob = Client { connection: daemon.connect_as(&BOB).await };
    let folder = daemon.folder().join("images");
    let xml = format!("<pool type='dir'><name>images</name><target><path>{}</path></target></pool>", folder.display());
    let reply = root.call("/org/virt", &format!("{STORAGE}.DefineStoragePool"), &(xml, options([]))).await;
    let pool: OwnedObjectPath = reply.expect("defined").body().deserialize().expect("o");
    let start = (options([("build", true.into())]),);
    root.call(pool.as_str(), &format!("{POOL}.Start"), &start).await.expect("started");
    let add = async |client: &Client, name: &str, capacity: u64| {
        client.call(pool.as_str(), &format!("{POOL}.AddVolume"), &(name, capacity, options([]))).await.map(drop)
    };
    add(&alice, "a", 1 << 20).await.expect("made");
    add(&root, "r", 1 << 30).await.expect("made");
    assert_eq!(quota(&alice, ALICE.uid).await.expect("told"), (1, 3, 1 << 20, 4 << 20));
    assert_eq!(quota(&root, 0).await.expect("told"), (1, u32::MAX, 1 << 30, u64::MAX));
    let refused = add(&alice, "b", 4 << 20).await.expect_err("too large");
    assert!(refused.0.ends_with("LimitsExceeded") && refused.1.contains("no room for 4194304 more"), "{refused:?}");
    // Others see it if they may read, and everybody their own.
    assert_eq!(quota(&root, ALICE.uid).await.expect("told").0, 1);
    assert_eq!(quota(&alice, BOB.uid).await.expect("reading is free").0, 0);
    assert_eq!(quota(&bob, BOB.uid).await.expect("told"), (0, 3, 0, 4 << 20));
    let refused = quota(&bob, ALICE.uid).await.expect_err("bob may not read");
    assert!(refused.0.ends_with("AccessDenied"), "{refused:?}");
    // What somebody has is found again, with what is theirs and was not made here.
    daemon.kill_virtd().await;
    fs::write(folder.join("own"), [0; 4096]).expect("written");
    std::os::unix::fs::chown(folder.join("own"), Some(ALICE.uid), None).expect("given");
    daemon.start_virtd().await;
    let root = Client { connection: daemon.connect().await };
    let alice = Client { connection: daemon.connect_as(&ALICE).await };
    let mut watch = root.watch().await;
    while root.property::<String>(pool.as_str(), POOL, "State").await != "running" {
        watch.next().await;
    }
    assert_eq!(quota(&alice, ALICE.uid).await.expect("told"), (2, 3, (1 << 20) + 4096, 4 << 20));
    add(&alice, "b", 0).await.expect("made");
    let refused = add(&alice, "c", 0).await.expect_err("one too many");
    assert!(refused.0.ends_with("LimitsExceeded") && refused.1.contains("3 volumes, and may have 3"), "{refused:?}");
}
