//! What machines are called here, and that many are no matter.

use crate::beds::{Act, Bed, Line};
use crate::house::{House, none, profile};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use uuid::Uuid;
use zbus::OwnedObjectPath;

const HOST: &str = "/org/virt/host/lab";

pub async fn twins(bed: Box<dyn Bed>) {
    let (folder, other) = (tempfile::tempdir().expect("a folder"), bed.another());
    let uuid = Uuid::from_u128(7);
    bed.make(uuid, "web");
    let twin = bed.make(uuid, "web");
    let far = other.make(uuid, "web");
    let odd = other.make(Uuid::from_u128(8), "Größe & <Art> \"1\"");
    let hosts = || vec![bed.driver(profile("lab")), other.driver(profile("yard"))];
    let mut house = House::with(hosts(), folder.path()).await;
    let client = &mut house.client;
    let all = client.names(none()).await;
    let key = &*twin.0;
    let expected = ["Größe & <Art> \"1\"".to_owned(), "web".into(), "web@lab".into(), "web@yard".into()];
    assert_eq!(all, expected.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>(), "{key}");
    let mut uuids = BTreeSet::new();
    for name in &all {
        let path = client.named(name).await;
        uuids.insert(client.property::<String>(&path, "org.virt.Domain", "UUID").await);
        let xml: String = client.run(&path, "GetXML").await.expect("a document").body().deserialize().expect("s");
        let document = virt_model::domain::DomainDef::parse(&xml).expect("one that can be read");
        assert_eq!(&document.name, name);
    }
    assert_eq!(uuids.len(), 4);
    let path = client.named("web@lab").await;
    // A third one, and a machine of our own, get what is free.
    let third = bed.make(uuid, "web");
    client.until(&format!("web@lab ({}): defined added", &third.0)).await;
    let own = "<domain type='test'><name>web</name><memory>1024</memory><os><type>hvm</type></os></domain>";
    let taken = client.call("/org/virt", "org.virt.Manager.DefineDomain", &(own, none())).await;
    assert_eq!(taken.expect_err("taken").0, "org.virt.Error.DomainExists");
    // They keep what they are called, whoever comes first the next time.
    let before = client.names(none()).await;
    house.close().await;
    let mut house = House::with(hosts().into_iter().rev().collect(), folder.path()).await;
    assert_eq!(house.client.names(none()).await, before);
    assert_eq!(house.client.named("web@lab").await, path);
    // One that has its name to itself has it plain.
    other.act(&far, Act::Rename("far"));
    house.client.until("far: defined renamed").await;
    other.act(&odd, Act::Delete);
    house.client.until("Größe & <Art> \"1\": undefined removed").await;
}

pub async fn many(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    for number in 0..1000 {
        bed.make(Uuid::from_u128(1000 + number), &format!("m{number}"));
    }
    let mut profile = profile("lab");
    profile.connect_wait = Duration::from_secs(60);
    let begun = Instant::now();
    let mut house = House::with(vec![bed.driver(profile)], folder.path()).await;
    assert_eq!(house.client.names(none()).await.len(), 1000);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

pub async fn refused_then_shown(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut house = House::on(&*bed, folder.path()).await;
    let client = &mut house.client;
    bed.line(Line::Cut);
    client.until_is(HOST, "org.virt.Host", "State", "unreachable").await;
    let key = bed.make(Uuid::from_u128(7), "web");
    bed.act(&key, Act::Start);
    let mut own = Vec::new();
    for name in ["web".to_owned(), "web@lab".into(), format!("web@lab ({})", key.0)] {
        let document =
            format!("<domain type='test'><name>{name}</name><memory>1024</memory><os><type>hvm</type></os></domain>");
        let defined = client.call("/org/virt", "org.virt.Manager.DefineDomain", &(document, none())).await;
        own.push(defined.expect("defined").body().deserialize::<OwnedObjectPath>().expect("a path").to_string());
    }
    bed.line(Line::Back);
    client.call(HOST, "org.virt.Host.Reconnect", &()).await.expect("asked");
    client.until_is(HOST, "org.virt.Host", "State", "connected").await;
    client.call(HOST, "org.virt.Host.Refresh", &()).await.expect("looked");
    let problems: Vec<String> = client.property(HOST, "org.virt.Host", "Problems").await;
    assert!(problems.len() == 1 && problems[0].contains("'web'"), "{problems:?}");
    client.run(&own[0], "Undefine").await.expect("undefined");
    client.events();
    client.call(HOST, "org.virt.Host.Refresh", &()).await.expect("looked");
    assert_eq!(client.events(), ["web: defined added", "web: started booted"]);
    let path = client.named("web").await;
    assert_eq!(client.state(&path).await, ("running".to_owned(), "external".to_owned()));
    assert_eq!(client.property::<Vec<String>>(HOST, "org.virt.Host", "Problems").await, Vec::<String>::new());
    client.run(&path, "Destroy").await.expect("it is followed");
    assert_eq!(client.events(), ["web: stopped destroyed"]);
}

pub async fn deceptive(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    bed.make(Uuid::from_u128(7), "we\u{200b}b");
    let mut house = House::on(&*bed, folder.path()).await;
    assert_eq!(house.client.names(none()).await, ["we\\u{200b}b@lab"]);
}
