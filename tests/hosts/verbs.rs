//! What the host has, and what is done to it by us.

use crate::beds::{Act, Bed, Line};
use crate::house::{Client, House, none};
use std::collections::HashMap;
use uuid::Uuid;
use virt_service::authz::Action;
use virt_service::verb;
use zbus::{OwnedObjectPath, Variant};

const UNSUPPORTED: &str = "org.virt.Error.OperationUnsupported";

pub async fn inventory(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    let (web, uuid) = (bed.make(Uuid::from_u128(7), "web"), Uuid::from_u128(7).to_string());
    bed.make(Uuid::from_u128(8), "shop");
    bed.act(&web, Act::Start);
    bed.act(&web, Act::Retitle("a shop window"));
    let mut house = House::on(&*bed, folder.path()).await;
    let client = &mut house.client;
    assert_eq!(client.names(none()).await, ["shop", "web"]);
    let by = |key: &'static str, value: &'static str| HashMap::from([(key, Variant::from(value))]);
    assert_eq!(client.names(by("host", "lab")).await, ["shop", "web"]);
    assert_eq!(client.names(by("host", "")).await, Vec::<String>::new());
    assert_eq!(client.names(by("state", "running")).await, ["web"]);
    let unknown = client.call("/org/virt", "org.virt.Manager.ListDomains", &(by("host", "none"),)).await;
    assert_eq!(unknown.expect_err("no such host").0, "org.virt.Error.InvalidArgument");
    let path = client.named("web").await;
    let texts = [("UUID", &*uuid), ("Host", "lab"), ("Title", "a shop window"), ("State", "running")];
    for (name, value) in texts {
        assert_eq!(client.property::<String>(&path, "org.virt.Domain", name).await, value, "{name}");
    }
    for name in ["Persistent", "Active", "Reachable"] {
        assert!(client.property::<bool>(&path, "org.virt.Domain", name).await, "{name}");
    }
    let xml: String = client.run(&path, "GetXML").await.expect("a document").body().deserialize().expect("s");
    assert!(xml.contains(&format!("<uuid>{uuid}</uuid>")) && xml.contains("<title>a shop window</title>"), "{xml}");
    let hosts: Vec<OwnedObjectPath> = client.property("/org/virt", "org.virt.Manager", "Hosts").await;
    assert_eq!(hosts.iter().map(|path| path.as_str()).collect::<Vec<_>>(), ["/org/virt/host/lab"]);
    let words: Vec<String> = client.property("/org/virt/host/lab", "org.virt.Host", "Abilities").await;
    assert_eq!(words, bed.words());
    let proof: String = client.property("/org/virt/host/lab", "org.virt.Host", "Proof").await;
    assert!(!proof.is_empty());
}

pub async fn each_verb(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    let web = bed.make(Uuid::from_u128(7), "web");
    let mut house = House::on(&*bed, folder.path()).await;
    let client = &mut house.client;
    let path = client.named("web").await;
    let story: [(&str, &[&str], &str); 11] = [
        ("Start", &["started booted"], "running"),
        ("Suspend", &["suspended paused"], "paused"),
        ("Resume", &["resumed unpaused"], "running"),
        ("Reset", &[], "running"),
        ("Reboot", &[], "running"),
        ("Destroy", &["stopped destroyed"], "shutoff"),
        ("Start", &["started booted"], "running"),
        ("Suspend", &["suspended paused"], "paused"),
        ("Destroy", &["stopped destroyed"], "shutoff"),
        ("Start", &["started booted"], "running"),
        ("Suspend", &["suspended paused"], "paused"),
    ];
    for (method, told, state) in story {
        client.run(&path, method).await.expect(method);
        let told: Vec<String> = told.iter().map(|event| format!("web: {event}")).collect();
        assert_eq!(client.events(), told, "{method}");
        assert_eq!(client.state(&path).await.0, state, "{method}");
    }
    assert_eq!(bed.resets(&web), 2);
    client.run(&path, "Resume").await.expect("Resume");
    client.run(&path, "Shutdown").await.expect("Shutdown");
    assert_eq!(client.until("web: stopped shutdown").await, ["web: resumed unpaused", "web: stopped shutdown"]);
}

pub async fn rename(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    bed.make(Uuid::from_u128(7), "web");
    let shop = bed.make(Uuid::from_u128(8), "shop");
    let mut house = House::on(&*bed, folder.path()).await;
    // The second of a name is known by another one.
    bed.make(Uuid::from_u128(9), "shop");
    house.client.call("/org/virt/host/lab", "org.virt.Host.Refresh", &()).await.expect("refreshed");
    let (web, till) = (house.client.named("web").await, house.client.named("shop@lab").await);
    house.client.events();
    let refused = async |client: &mut Client, path: &str, name: &str, why: &str| {
        let result = client.call(path, "org.virt.Domain.Rename", &(name, none())).await;
        let (error, text) = result.expect_err(name);
        assert_eq!((error, client.events()), (format!("org.virt.Error.{why}"), Vec::new()), "{name}: {text}");
    };
    for (name, why) in [("shop", "DomainExists"), ("shop@lab", "DomainExists"), ("web", "InvalidArgument")] {
        refused(&mut house.client, &web, name, why).await;
    }
    house.client.run(&web, "Start").await.expect("started");
    house.client.events();
    refused(&mut house.client, &web, "www", "OperationInvalid").await;
    house.client.run(&web, "Destroy").await.expect("destroyed");
    house.client.events();
    house.client.call(&web, "org.virt.Domain.Rename", &("www", none())).await.expect("renamed");
    assert_eq!(house.client.events(), ["web: undefined renamed", "www: defined renamed"]);
    let (action, subject) = house.asked();
    assert_eq!((action, subject.detail("host"), subject.detail("domain_name")), (Action::Define, "lab", "web"));
    assert_eq!(house.client.named("www").await, web);
    // The host has it already.
    bed.act(&shop, Act::Delete);
    house.client.call("/org/virt/host/lab", "org.virt.Host.Refresh", &()).await.expect("refreshed");
    house.client.events();
    refused(&mut house.client, &till, "shop", "OperationInvalid").await;
    house.client.call(&till, "org.virt.Domain.Rename", &("till", none())).await.expect("renamed");
    assert_eq!(house.client.events(), ["shop@lab: undefined renamed", "till: defined renamed"]);
    // A name that was given up is free.
    house.client.call(&till, "org.virt.Domain.Rename", &("web", none())).await.expect("renamed");
    assert_eq!(house.client.events(), ["till: undefined renamed", "web: defined renamed"]);
    let other = tempfile::tempdir().expect("a folder");
    let mut looks_on = House::on(&*bed, other.path()).await;
    assert_eq!(looks_on.client.names(none()).await, ["web", "www"]);
    looks_on.close().await;
    bed.line(Line::Cut);
    house.client.until_is("/org/virt/host/lab", "org.virt.Host", "State", "unreachable").await;
    refused(&mut house.client, &till, "shop", "HostUnreachable").await;
}

pub async fn missing_words(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    let web = bed.make(Uuid::from_u128(7), "web");
    bed.act(&web, Act::Start);
    let mut house = House::on(&*bed, folder.path()).await;
    let client = &mut house.client;
    let path = client.named("web").await;
    for row in verb::DOMAIN {
        let has = match row.hosted() {
            verb::Hosted::Always | verb::Hosted::Destroy => true,
            verb::Hosted::If(ability) => bed.words().contains(&ability.as_str()),
            verb::Hosted::Never => false,
        };
        if !has {
            assert_eq!(client.can(&path, row.member).await, "na", "{}", row.member);
        }
    }
    for method in ["ManagedSave", "GetStats", "ApplyPending"] {
        assert_eq!(client.run(&path, method).await.expect_err(method).0, UNSUPPORTED, "{method}");
    }
    let redefine =
        ("<domainsnapshot><name>a</name></domainsnapshot>", HashMap::from([("redefine", Variant::from(true))]));
    let refused = client.call(&path, "org.virt.Domain.CreateSnapshot", &redefine).await;
    assert_eq!(refused.expect_err("redefined").0, UNSUPPORTED);
    let refused = client.call(&path, "org.virt.Domain.BlockResize", &("vda", 1u64 << 20, none())).await;
    assert_eq!(refused.expect_err("resized").0, UNSUPPORTED);
    for (option, value) in [("paused", true), ("reset-nvram", true), ("autodestroy", true)] {
        let options = HashMap::from([(option, Variant::from(value))]);
        let refused = client.call(&path, "org.virt.Domain.Start", &(options,)).await;
        assert_eq!(refused.expect_err(option).0, UNSUPPORTED, "{option}");
    }
    // Nothing at all is done where nothing is to be done.
    let mut profile = crate::house::profile("lab");
    profile.read_only = true;
    let other = tempfile::tempdir().expect("a folder");
    let mut looks_on = House::with(vec![bed.driver(profile)], other.path()).await;
    let reader = &mut looks_on.client;
    assert_eq!(reader.can(&path, "Rename").await, "na");
    for method in ["Shutdown", "Destroy", "Suspend"] {
        assert_eq!(reader.can(&path, method).await, "na", "{method}");
        assert_eq!(reader.run(&path, method).await.expect_err(method).0, UNSUPPORTED, "{method}");
    }
    assert_eq!(reader.state(&path).await.0, "running");
}

pub async fn wrong_states(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    bed.make(Uuid::from_u128(7), "web");
    let mut house = House::on(&*bed, folder.path()).await;
    let client = &mut house.client;
    let path = client.named("web").await;
    let refused = |method: &'static str, state: &'static str| (method, state);
    for (method, after) in [
        refused("Suspend", "shutoff"),
        refused("Destroy", "shutoff"),
        refused("Start", "running"),
        refused("Resume", "running"),
        refused("Suspend", "paused"),
        refused("Shutdown", "paused"),
    ] {
        match after {
            "running" if client.state(&path).await.0 == "shutoff" => {
                drop(client.run(&path, "Start").await.expect("started"))
            }
            "paused" if client.state(&path).await.0 == "running" => {
                drop(client.run(&path, "Suspend").await.expect("suspended"));
            }
            _ => {}
        }
        client.events();
        let (name, text) = client.run(&path, method).await.expect_err(method);
        assert_eq!(name, "org.virt.Error.OperationInvalid", "{method}: {text}");
        assert_eq!((client.events(), client.state(&path).await.0.as_str()), (Vec::new(), after), "{method}");
    }
}

pub async fn no_documents(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    bed.make(Uuid::from_u128(7), "web");
    let mut house = House::on(&*bed, folder.path()).await;
    let client = &mut house.client;
    let path = client.named("web").await;
    let before: String = client.run(&path, "GetXML").await.expect("a document").body().deserialize().expect("s");
    for method in ["DefineDomain", "CreateDomain"] {
        let refused = client.call("/org/virt", &format!("org.virt.Manager.{method}"), &(&*before, none())).await;
        assert_eq!(refused.expect_err(method).0, UNSUPPORTED, "{method}");
    }
    for (method, text) in [("SetTitle", "x"), ("AttachDevice", "<watchdog model='i6300esb'/>")] {
        let refused = client.call(&path, &format!("org.virt.Domain.{method}"), &(text, none())).await;
        assert_eq!(refused.expect_err(method).0, UNSUPPORTED, "{method}");
    }
    assert_eq!(client.run(&path, "Undefine").await.expect_err("Undefine").0, UNSUPPORTED);
    let after: String = client.run(&path, "GetXML").await.expect("a document").body().deserialize().expect("s");
    assert_eq!((after, client.events()), (before, Vec::new()));
}

pub async fn permission(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    let web = bed.make(Uuid::from_u128(7), "web");
    bed.act(&web, Act::Start);
    let mut house = House::on(&*bed, folder.path()).await;
    let path = house.client.named("web").await;
    house.client.run(&path, "Destroy").await.expect("destroyed");
    let (action, subject) = house.asked();
    assert_eq!(action, Action::Stop);
    let details = ["driver", "host", "domain_name", "domain_uuid"].map(|key| subject.detail(key).to_owned());
    let driver: String = house.client.property(&path, "org.virt.Domain", "Driver").await;
    assert_eq!(details, [driver, "lab".to_owned(), "web".to_owned(), Uuid::from_u128(7).to_string()]);
    // What is allowed there is no permission to have files of this host looked at.
    let xml: String = house.client.run(&path, "GetXML").await.expect("a document").body().deserialize().expect("s");
    house.client.call("/org/virt", "org.virt.Manager.ValidateDomain", &(xml, none())).await.expect("findings");
    let (action, subject) = house.considered();
    assert_eq!((action, subject.detail("domain_name"), subject.detail("host")), (Action::Define, "web", ""));
    for method in ["Reconnect", "Refresh"] {
        house.client.call("/org/virt/host/lab", &format!("org.virt.Host.{method}"), &()).await.expect(method);
        let (action, subject) = house.asked();
        assert_eq!((action, subject.detail("host")), (Action::HostManage, "lab"), "{method}");
    }
}
