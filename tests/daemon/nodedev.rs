//! The devices of the host through the bus. The machine's own devices are only read, and none is taken from its driver.

use crate::common::client::{Client, options};
use crate::common::users::BOB;
use crate::common::{Daemon, Setup, have};
use std::collections::{BTreeSet, HashMap};
use std::process::Command;
use zbus::{ObjectPath, OwnedObjectPath, OwnedVariant, Variant};

const MANAGER: &str = "org.virt.Manager.NodeDevice";
const DEVICE: &str = "org.virt.NodeDevice";
const COMPUTER: &str = "/org/virt/nodedev/computer";

/// Path, name, class, parent.
type Listed = (OwnedObjectPath, String, String, String);

type Objects = HashMap<OwnedObjectPath, HashMap<String, HashMap<String, OwnedVariant>>>;

async fn list(client: &Client, pairs: &[(&'static str, &'static str)]) -> Vec<Listed> {
    let filter = options(pairs.iter().map(|(key, value)| (*key, Variant::from(*value))));
    let reply = client.call("/org/virt", &format!("{MANAGER}.ListNodeDevices"), &(filter,)).await.expect("a list");
    reply.body().deserialize().expect("a(osss)")
}

async fn managed(client: &Client, path: &str) -> Objects {
    let reply = client.call(path, "org.freedesktop.DBus.ObjectManager.GetManagedObjects", &()).await.expect(path);
    reply.body().deserialize().expect("a{oa{sa{sv}}}")
}

/// What a method of a device that takes options says.
async fn refusal(client: &Client, path: &str, member: &str) -> (String, String) {
    client.call(path, &format!("{DEVICE}.{member}"), &(options([]),)).await.expect_err(member)
}

async fn xml(client: &Client, path: &str) -> String {
    let reply = client.call(path, &format!("{DEVICE}.GetXML"), &(options([]),)).await.expect("GetXML");
    reply.body().deserialize().expect("s")
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_are_listed_read_and_not_touched_by_strangers() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = Client { connection: daemon.connect().await };
    let bob = Client { connection: daemon.connect_as(&BOB).await };
    let all = list(&bob, &[]).await;
    let computer = all.iter().find(|(_, name, ..)| name == "computer").expect("the host itself");
    assert_eq!((computer.0.as_str(), &*computer.2, &*computer.3), (COMPUTER, "system", ""));
    assert_eq!(list(&bob, &[("class", "system")]).await.len(), 1);
    assert!(list(&bob, &[("capability", "no such")]).await.is_empty());
    let odd =
        bob.call("/org/virt", &format!("{MANAGER}.ListNodeDevices"), &(options([("x", Variant::from(true))]),)).await;
    assert_eq!(odd.expect_err("unknown").0, "org.virt.Error.InvalidArgument");

    let own = managed(&bob, "/org/virt/nodedev").await;
    // Other tests make network devices and bind loop devices meanwhile.
    let stay = |path: &&str| *path == COMPUTER || path.starts_with("/org/virt/nodedev/pci");
    let listed: BTreeSet<&str> = all.iter().map(|(path, ..)| path.as_str()).filter(stay).collect();
    assert_eq!(own.keys().map(|path| path.as_str()).filter(stay).collect::<BTreeSet<_>>(), listed);
    assert!(own.values().all(|interfaces| interfaces.contains_key(DEVICE)));
    assert!(managed(&bob, "/org/virt").await.keys().all(|path| !path.as_str().contains("nodedev")));
    let tree: String = bob
        .call("/org/virt/nodedev", "org.freedesktop.DBus.Introspectable.Introspect", &())
        .await
        .expect("introspected")
        .body()
        .deserialize()
        .expect("s");
    assert!(tree.contains("ObjectManager") && tree.contains("<node name=\"computer\"/>"), "{tree}");

    // A function of a PCI device where the machine has one.
    let (path, name, class, _) = all.iter().find(|(_, _, class, _)| class == "pci").unwrap_or(computer);
    let path = path.as_str();
    let get = format!("{MANAGER}.GetNodeDevice");
    let found = bob.call("/org/virt", &get, &(name,)).await.expect("it is there");
    assert_eq!(found.body().deserialize::<ObjectPath<'_>>().expect("o").as_str(), path);
    let none = bob.call("/org/virt", &get, &("pci_none",)).await.expect_err("there is none");
    assert_eq!(none.0, "org.virt.Error.NoSuchNodeDevice");
    let none = bob.call("/org/virt", &format!("{MANAGER}.GetNodeDeviceByWWN"), &("2000", "2100")).await;
    assert_eq!(none.expect_err("there is none").0, "org.virt.Error.NoSuchNodeDevice");
    assert_eq!(&bob.property::<String>(path, DEVICE, "Class").await, class);
    let text = xml(&bob, path).await;
    assert!(text.contains(&format!("<name>{name}</name>")) && text.contains(&format!("type='{class}'")), "{text}");

    for (member, action) in [("Detach", "detach"), ("Reattach", "detach"), ("Reset", "detach"), ("Destroy", "create")] {
        let (error, text) = refusal(&bob, path, member).await;
        assert_eq!(error, "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", "{member}: {text}");
        assert!(text.contains(&format!("org.virt.nodedev.{action}")) && text.contains(name), "{member}: {text}");
    }
    let check = bob.call(path, &format!("{DEVICE}.CheckDetach"), &(options([]),)).await.expect("reading is free");
    let check: HashMap<String, OwnedVariant> = check.body().deserialize().expect("a{sv}");
    for key in ["possible", "error", "reason", "users", "siblings", "host-uses"] {
        assert!(check.contains_key(key), "{key}");
    }
    what_cannot_be_made_is_refused(&root, &bob).await;
    let (error, _) = refusal(&root, COMPUTER, "Detach").await;
    assert_eq!(error, "org.virt.Error.OperationUnsupported");
    wanted_by_a_machine(&root, path).await;
}

/// This machine has no device that others are made of.
async fn what_cannot_be_made_is_refused(root: &Client, bob: &Client) {
    let mdev = "<device><parent>computer</parent><capability type='mdev'><type id='t'/></capability></device>";
    for (member, xml, name, words) in [
        (
            "CreateNodeDevice",
            "<device><parent>computer</parent><odd/><capability type='mdev'><type id='t'/></capability></device>",
            "ConfigInvalid",
            "unknown element <odd>",
        ),
        ("CreateNodeDevice", mdev, "OperationUnsupported", "it has types: none"),
        ("DefineNodeDevice", mdev, "OperationUnsupported", "mdevctl"),
    ] {
        let member = format!("{MANAGER}.{member}");
        let (error, text) = root.call("/org/virt", &member, &(xml, options([]))).await.expect_err("refused");
        assert!(error == format!("org.virt.Error.{name}") && text.contains(words), "{error}: {text}");
        let (error, _) = bob.call("/org/virt", &member, &(xml, options([]))).await.expect_err("not allowed");
        assert!(error.ends_with("AccessDenied") || error.ends_with("AuthorizationRequired"), "{error}");
    }
    let (error, text) = refusal(root, COMPUTER, "Destroy").await;
    assert!(error == "org.virt.Error.OperationUnsupported" && text.contains("virtual ports"), "{error}: {text}");
}

/// A machine that wants a device is among its users, as long as it is defined.
async fn wanted_by_a_machine(root: &Client, path: &str) {
    let address: String = root.property(path, DEVICE, "Address").await;
    let [domain, bus, slot, function] = address.split([':', '.']).collect::<Vec<_>>()[..] else { return };
    let xml = format!(
        "<domain type='test'><name>web</name><memory>65536</memory><os><type>hvm</type></os><devices><hostdev type='pci'>\
         <source><address domain='0x{domain}' bus='0x{bus}' slot='0x{slot}' function='0x{function}'/></source></hostdev>\
         </devices></domain>"
    );
    let mut watch = root.watch().await;
    let machine = root.define(&xml).await.expect("defined");
    let mut users = async |member: &str| loop {
        let message = watch.next().await;
        let header = message.header();
        let is_it = header.path().is_some_and(|of| of == path) && header.member().is_some_and(|of| of == member);
        if is_it {
            let users = root.property::<OwnedVariant>(path, DEVICE, "Users").await;
            break Vec::<(OwnedObjectPath, String, String)>::try_from(users).expect("a(oss)");
        }
    };
    let told = users("PropertiesChanged").await;
    assert_eq!((told[0].0.as_str(), &*told[0].2, told.len()), (&*machine.path, "config", 1));
    machine.run("Undefine").await.expect("gone");
    assert!(users("PropertiesChanged").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_plugged_in_and_out_is_told() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    if !have(&["ip"]) {
        return;
    }
    let client = Client { connection: daemon.connect().await };
    let mut watch = client.watch().await;
    let name = format!("vt{}", std::process::id());
    let link = |arguments: &[&str]| Command::new("ip").arg("link").args(arguments).status().expect("ip runs").success();
    if !link(&["add", &name, "type", "ifb"]) && !link(&["add", &name, "type", "dummy"]) {
        return crate::common::skip("this kernel makes no network devices of type ifb or dummy");
    }
    let mut next = async |event: &str| loop {
        let message = watch.next().await;
        let header = message.header();
        if header.member().is_some_and(|member| member == "NodeDeviceLifecycle") {
            let (path, device, word): (OwnedObjectPath, String, String) = message.body().deserialize().expect("oss");
            if device.starts_with(&format!("net_{name}_")) && word == event {
                break (path, device);
            }
        }
    };
    let (path, device) = next("created").await;
    assert!(xml(&client, path.as_str()).await.contains(&format!("<interface>{name}</interface>")));
    assert!(list(&client, &[("class", "net")]).await.iter().any(|(_, listed, ..)| *listed == device));
    assert!(link(&["del", &name]));
    assert_eq!(next("deleted").await, (path, device.clone()));
    assert!(list(&client, &[]).await.iter().all(|(_, listed, ..)| *listed != device));
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_session_bus_devices_are_only_read() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let all = list(&client, &[]).await;
    let get = format!("{MANAGER}.GetNodeDevice");
    let mut read = 0;
    for (path, name, class, _) in &all {
        let reply = client.call(path.as_str(), &format!("{DEVICE}.GetXML"), &(options([]),)).await;
        let (error, text) = refusal(&client, path.as_str(), "Detach").await;
        // Other tests make network devices and bind loop devices meanwhile: one that has gone may be told of later.
        let comes_and_goes = class == "net" || class == "storage";
        let has_gone = |error: &str| comes_and_goes && error == "org.virt.Error.NoSuchNodeDevice";
        let reply = match reply {
            Err((error, _)) if has_gone(&error) => continue,
            reply => reply.expect(name),
        };
        if has_gone(&error) || client.call("/org/virt", &get, &(name,)).await.is_err() {
            continue;
        }
        let document: String = reply.body().deserialize().expect("s");
        assert!(document.contains(&format!("<name>{name}</name>")), "{document}");
        assert_eq!(error, "org.virt.Error.OperationUnsupported", "{name}: {text}");
        read += 1;
    }
    assert!(read > 0, "the host itself is always there");
}
