//! What somebody else does to the machines of a host.

use crate::beds::{Act, Bed};
use crate::house::{House, none};
use uuid::Uuid;

pub async fn definitions(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut house = House::on(&*bed, folder.path()).await;
    let client = &mut house.client;
    let web = bed.make(Uuid::from_u128(7), "web");
    assert_eq!(client.until("web: defined added").await, ["web: defined added"]);
    let path = client.named("web").await;
    bed.act(&web, Act::Retitle("another"));
    assert_eq!(client.until("web: defined updated").await, ["web: defined updated"]);
    assert_eq!(client.property::<String>(&path, "org.virt.Domain", "Title").await, "another");
    bed.act(&web, Act::Rename("www"));
    assert_eq!(client.until("www: defined renamed").await, ["web: undefined renamed", "www: defined renamed"]);
    assert_eq!(client.named("www").await, path);
    bed.act(&web, Act::Start);
    client.until("www: started booted").await;
    bed.act(&web, Act::Rename("web"));
    assert_eq!(client.until("web: defined renamed").await, ["www: undefined renamed", "web: defined renamed"]);
    assert_eq!(client.state(&path).await.0, "running");
    bed.act(&web, Act::Delete);
    assert_eq!(client.until("web: undefined removed").await, ["web: stopped shutdown", "web: undefined removed"]);
    assert!(client.names(none()).await.is_empty());
    // The name is free for the next one.
    bed.make(Uuid::from_u128(9), "web");
    client.until("web: defined added").await;
}

pub async fn guests(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    let web = bed.make(Uuid::from_u128(7), "web");
    let mut house = House::on(&*bed, folder.path()).await;
    let client = &mut house.client;
    let path = client.named("web").await;
    let story: [(Act<'_>, &[&str], (&str, &str)); 9] = [
        (Act::Start, &["started booted"], ("running", "external")),
        (Act::Pause, &["suspended paused"], ("paused", "external")),
        (Act::Unpause, &["resumed unpaused"], ("running", "external")),
        // Nobody sees it off in between.
        (Act::Start, &["stopped shutdown", "started booted"], ("running", "external")),
        (Act::Stop { forced: false }, &["stopped shutdown"], ("shutoff", "shutdown")),
        (Act::Start, &["started booted"], ("running", "external")),
        (Act::Stop { forced: true }, &["stopped destroyed"], ("shutoff", "destroyed")),
        (Act::Start, &["started booted"], ("running", "external")),
        (Act::Pause, &["suspended paused"], ("paused", "external")),
    ];
    for (act, told, (state, reason)) in story {
        bed.act(&web, act);
        let told: Vec<String> = told.iter().map(|event| format!("web: {event}")).collect();
        assert_eq!(client.until(told.last().expect("an event")).await, told, "{act:?}");
        assert_eq!(client.state(&path).await, (state.to_owned(), reason.to_owned()), "{act:?}");
    }
    // What is only on its way is told when it has come there.
    bed.act(&web, Act::Between);
    bed.act(&web, Act::Retitle("on its way"));
    assert_eq!(client.until("web: defined updated").await, ["web: defined updated"]);
    assert_eq!(client.state(&path).await.0, "paused");
    bed.act(&web, Act::Pause);
    // What others have left so is gone on with by us.
    client.run(&path, "Resume").await.expect("resumed");
    assert_eq!(client.events(), ["web: resumed unpaused"]);
}

pub async fn during_a_verb(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    let web = bed.make(Uuid::from_u128(7), "web");
    let mut house = House::on(&*bed, folder.path()).await;
    let client = &mut house.client;
    let path = client.named("web").await;
    for round in 0..20 {
        let title = format!("title {round}");
        let (started, ()) = tokio::join!(client.run(&path, "Start"), async { bed.act(&web, Act::Retitle(&title)) });
        started.expect("started");
        let mut told = client.events();
        if told.len() < 2 {
            told.extend(client.until("web: defined updated").await);
        }
        told.sort();
        assert_eq!(told, ["web: defined updated", "web: started booted"], "{round}");
        client.run(&path, "Destroy").await.expect("destroyed");
        assert_eq!(client.until("web: stopped destroyed").await, ["web: stopped destroyed"], "{round}");
    }
}
