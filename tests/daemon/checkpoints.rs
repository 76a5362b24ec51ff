//! Checkpoints through the bus, of guests in memory: the objects and their signals, records, refusals.

use crate::common::checkpoints::{call, create, create_as, get, list, path};
use crate::common::client::{Client, Domain, Watch, options};
use crate::common::snapshots::{Player, with};
use crate::common::{Daemon, Setup};
use std::collections::HashMap;
use zbus::{ObjectPath, OwnedVariant};

/// A machine with a disk that keeps bitmaps, and one that cannot.
const WEB: &str = "<domain type='test'><name>web</name><memory>65536</memory><vcpu>1</vcpu><os><type>hvm</type></os><devices>\
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/web.qcow2'/>\
    <target dev='vda' bus='virtio'/></disk><disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk></devices>\
    </domain>";

/// What is told of checkpoints up to and with `last`: the member, and the object's name or its properties.
async fn told(watch: &mut Watch, last: &str) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    while seen.last().is_none_or(|seen| seen != last) {
        let message = watch.next().await;
        let (header, body) = (message.header(), message.body());
        let member = header.member().expect("a member").to_string();
        let of = header.path().expect("a path").to_string();
        let (path, what) = match &*member {
            "InterfacesAdded" => {
                let (path, all): (ObjectPath<'_>, HashMap<String, HashMap<String, OwnedVariant>>) =
                    body.deserialize().expect("oa{sa{sv}}");
                (path.to_string(), all.into_keys().collect::<Vec<_>>().join(" "))
            }
            "InterfacesRemoved" => {
                let (path, all): (ObjectPath<'_>, Vec<String>) = body.deserialize().expect("oas");
                (path.to_string(), all.join(" "))
            }
            "PropertiesChanged" => {
                let (_, values, _): (String, HashMap<String, OwnedVariant>, Vec<String>) =
                    body.deserialize().expect("sa{sv}as");
                let mut names: Vec<String> = values.into_keys().collect();
                names.sort();
                (of, names.join(" "))
            }
            _ => continue,
        };
        if let Some((_, name)) = path.split_once("/checkpoint/") {
            seen.push(format!("{member} {name} {what}"));
        }
    }
    seen
}

async fn parent(domain: &Domain, name: &str) -> String {
    get::<ObjectPath<'static>>(domain, name, "Parent").await.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_are_created_listed_and_deleted() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let domain = Client { connection: daemon.connect().await }.define(WEB).await.expect("defined");
    let (error, why) = create(&domain, "early").await.expect_err("it is off");
    assert!(error.ends_with("OperationInvalid") && why.contains("start it first"), "{why}");
    domain.run("Start").await.expect("started");
    let mut watch = domain.client.watch().await;
    assert_eq!(create(&domain, "one").await.expect("created"), path(&domain, "one"));
    create(&domain, "two").await.expect("created");
    create_as(
        &domain,
        "<domaincheckpoint><name>three</name><disks><disk name='vda' bitmap='b3'/></disks></domaincheckpoint>",
    )
    .await
    .expect("created");
    assert_eq!(list(&domain).await, ["one", "two", "three"]);
    assert_eq!((parent(&domain, "one").await, parent(&domain, "three").await), ("/".into(), path(&domain, "two")));
    let children: Vec<ObjectPath<'static>> = get(&domain, "one", "Children").await;
    assert_eq!(children.iter().map(ToString::to_string).collect::<Vec<_>>(), [path(&domain, "two")]);
    assert_eq!(get::<ObjectPath<'static>>(&domain, "one", "Domain").await.as_str(), domain.path);
    assert!(get::<u64>(&domain, "one", "CreationTime").await > 1_600_000_000_000_000);
    assert_eq!(get::<String>(&domain, "one", "Broken").await, "");
    let xml: String =
        call(&domain, "three", "GetXML", options([])).await.expect("told").body().deserialize().expect("s");
    assert!(xml.contains("bitmap='b3'") || xml.contains("bitmap=\"b3\""), "{xml}");
    assert!(xml.contains("sda") && xml.contains("<name>two</name>"), "{xml}");

    call(&domain, "two", "Delete", options([])).await.expect("deleted");
    assert_eq!(parent(&domain, "three").await, path(&domain, "one"));
    let gone = "InterfacesRemoved two org.virt.Checkpoint";
    let signals = told(&mut watch, gone).await;
    let new = |name: &str| format!("InterfacesAdded {name} org.virt.Checkpoint");
    assert_eq!(signals[0], new("one"));
    assert!(
        signals.contains(&new("two")) && signals.contains(&"PropertiesChanged one Children".to_owned()),
        "{signals:?}"
    );
    assert!(signals.contains(&"PropertiesChanged three Parent".to_owned()), "{signals:?}");
    let (error, _) = domain.call("GetCheckpoint", &"two").await.expect_err("gone");
    assert_eq!(error, "org.virt.Error.NoSuchCheckpoint");
    domain.call("GetCheckpoint", &"one").await.expect("there");

    let (error, why) = domain.run("Undefine").await.expect_err("it has some");
    assert!(error.ends_with("OperationInvalid") && why.contains("2 checkpoints; pass checkpoints-metadata"), "{why}");
    // They are found again; guests in memory have ended with what they kept.
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    let domain = Client { connection: daemon.connect().await }.named("web").await.expect("there");
    assert_eq!(list(&domain).await, ["one", "three"]);
    call(&domain, "one", "Delete", with([("metadata-only", true)])).await.expect("forgotten");
    domain.call("Undefine", &(with([("checkpoints-metadata", true)]),)).await.expect("undefined");
}

#[tokio::test]
async fn what_cannot_be_a_checkpoint_is_refused_by_name() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(WEB).await.expect("defined");
    domain.run("Start").await.expect("started");
    create(&domain, "there").await.expect("created");
    let named = |rest: &str| format!("<domaincheckpoint><name>new</name>{rest}</domaincheckpoint>");
    let disk = |of: &str| named(&format!("<disks><disk {of}/></disks>"));
    let cases = [
        ("<domaincheckpoint><name>there</name></domaincheckpoint>".to_owned(), "CheckpointExists", "'there'"),
        (disk("name='vda' bitmap='there'"), "CheckpointExists", "of checkpoint 'there'"),
        (disk("name='vda' bitmap='a&#x200b;'"), "ConfigInvalid", "U+200B"),
        (disk("name='sda'"), "ConfigInvalid", "checkpoint='no'"),
        (disk("name='vdz'"), "ConfigInvalid", "vdz"),
        (disk("name='vda' bitmap='a/b'"), "ConfigInvalid", "'/'"),
        (named("<memory/>"), "ConfigInvalid", "memory"),
        ("<domaincheckpoint><name>../x</name></domaincheckpoint>".to_owned(), "InvalidArgument", "'/'"),
        ("<domainsnapshot/>".to_owned(), "ConfigInvalid", "domaincheckpoint"),
    ];
    for (xml, error, words) in cases {
        let (name, why) = create_as(&domain, &xml).await.expect_err(&xml);
        assert!(name.ends_with(error) && why.contains(words), "{xml}: {name}: {why}");
    }
    let (name, why) = domain.call("CreateCheckpoint", &("", with([("quiesce", true)]))).await.expect_err("no option");
    assert!(name.ends_with("InvalidArgument") && why.contains("quiesce"), "{why}");
    assert_eq!(list(&domain).await, ["there"]);
    // Without a name it is the time.
    let path = create_as(&domain, "").await.expect("created");
    assert!(path.rsplit('/').next().is_some_and(|name| name.starts_with("_31")), "{path}");
}

#[tokio::test]
async fn a_revert_breaks_them_and_an_overlay_does_not() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(WEB).await.expect("defined");
    let player = Player { domain: domain.clone() };
    domain.run("Start").await.expect("started");
    create(&domain, "one").await.expect("created");
    let overlay = "<domainsnapshot><name>s</name><disks><disk name='vda' snapshot='external'>\
                   <source file='/images/over.qcow2'/></disk></disks></domainsnapshot>";
    let unkept = overlay.replace("over", "unkept").replace("<name>s<", "<name>unkept<");
    let how = with([("disk-only", true), ("no-metadata", true)]);
    domain.call("CreateSnapshot", &(unkept, how)).await.expect("taken");
    let pull = domain.call("BlockPull", &("vda", "", options([]))).await;
    let (error, why) = pull.expect_err("a bitmap would go");
    assert!(error.ends_with("OperationInvalid") && why.contains("'one'"), "{error}: {why}");
    player.create(overlay, with([("disk-only", true)])).await.expect("taken");
    create(&domain, "two").await.expect("created, which has all looked at");
    assert_eq!(get::<String>(&domain, "one", "Broken").await, "");
    let mut watch = domain.client.watch().await;
    player.call("s", "Revert", with([("force", true)])).await.expect("reverted");
    for name in ["one", "two"] {
        let broken = get::<String>(&domain, name, "Broken").await;
        assert!(broken.contains("snapshot 's'"), "{broken}");
    }
    let signals = told(&mut watch, "PropertiesChanged two Broken").await;
    assert!(signals.contains(&"PropertiesChanged one Broken".to_owned()), "{signals:?}");
}
