//! Hosts that hang, are lost, and come back.

use crate::beds::{Act, Bed, Line};
use crate::house::{House, none, profile};
use std::path::Path;
use std::time::{Duration, Instant};
use uuid::Uuid;

const HOST: &str = "/org/virt/host/lab";
const UNREACHABLE: &str = "org.virt.Error.HostUnreachable";

/// A host with a machine that runs and one that is off.
async fn lab(bed: &dyn Bed, folder: &Path) -> (House, virt_model::driver::inventory::Key) {
    let web = bed.make(Uuid::from_u128(7), "web");
    bed.make(Uuid::from_u128(8), "shop");
    bed.act(&web, Act::Start);
    (House::on(bed, folder).await, web)
}

async fn is_lost(house: &mut House) {
    house.client.until_is(HOST, "org.virt.Host", "State", "unreachable").await;
    let path = house.client.named("web").await;
    house.client.until_is(&path, "org.virt.Domain", "State", "unknown").await;
}

pub async fn hangs(bed: Box<dyn Bed>) {
    let (folder, other) = (tempfile::tempdir().expect("a folder"), bed.another());
    bed.make(Uuid::from_u128(7), "web");
    other.make(Uuid::from_u128(8), "shop");
    let mut slow = profile("lab");
    slow.timeout = Duration::from_secs(600);
    let hosts = vec![bed.driver(slow), other.driver(profile("yard"))];
    let mut house = House::with(hosts, folder.path()).await;
    let client = &mut house.client;
    let (web, shop) = (client.named("web").await, client.named("shop").await);
    bed.line(Line::Hangs);
    let options = std::collections::HashMap::from([("no-wait", zbus::Variant::from(true))]);
    client.call(&web, "org.virt.Domain.Start", &(options,)).await.expect("accepted");
    for _ in 0..5 {
        let begun = Instant::now();
        client.run(&web, "GetXML").await.expect("what was last seen");
        assert_eq!(client.state(&web).await.0, "shutoff");
        client.run(&shop, "Start").await.expect("started");
        client.run(&shop, "Destroy").await.expect("destroyed");
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    }
    bed.line(Line::Back);
    client.until("web: started booted").await;
}

pub async fn lost(bed: Box<dyn Bed>) {
    for line in [Line::Cut, Line::Hangs] {
        let (folder, bed) = (tempfile::tempdir().expect("a folder"), bed.another());
        let (mut house, _) = lab(&*bed, folder.path()).await;
        house.client.events();
        bed.line(line);
        is_lost(&mut house).await;
        let client = &mut house.client;
        let (web, shop) = (client.named("web").await, client.named("shop").await);
        client.until_is(&shop, "org.virt.Domain", "State", "unknown").await;
        assert_eq!(client.events(), Vec::<String>::new(), "{line:?}");
        for (path, active) in [(&web, true), (&shop, false)] {
            assert_eq!(client.state(path).await, ("unknown".to_owned(), "unreachable".to_owned()));
            assert_eq!(client.property::<bool>(path, "org.virt.Domain", "Active").await, active);
            assert!(!client.property::<bool>(path, "org.virt.Domain", "Reachable").await);
            client.run(path, "GetXML").await.expect("what was last seen");
        }
        for (path, method) in [(&web, "Suspend"), (&web, "Destroy"), (&web, "Shutdown"), (&shop, "Start")] {
            let begun = Instant::now();
            let (name, text) = client.run(path, method).await.expect_err(method);
            assert!(name == UNREACHABLE && text.contains("'lab'"), "{method}: {name}: {text}");
            assert!(begun.elapsed() < Duration::from_secs(10), "{method}: {:?}", begun.elapsed());
            assert_eq!(client.can(path, method).await, "na", "{method}");
        }
        let why: String = client.property(HOST, "org.virt.Host", "Error").await;
        assert!(!why.is_empty());
        assert_eq!(client.call(HOST, "org.virt.Host.Refresh", &()).await.expect_err("lost").0, UNREACHABLE);
    }
}

pub async fn back(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut house, web) = lab(&*bed, folder.path()).await;
    let gone = bed.make(Uuid::from_u128(9), "gone");
    house.client.until("gone: defined added").await;
    let moved = bed.make(Uuid::from_u128(11), "moved");
    house.client.until("moved: defined added").await;
    bed.line(Line::Cut);
    is_lost(&mut house).await;
    bed.act(&web, Act::Pause);
    bed.act(&gone, Act::Delete);
    bed.make(Uuid::from_u128(10), "new");
    // The same machine, by another key.
    bed.act(&moved, Act::Delete);
    bed.make(Uuid::from_u128(11), "moved");
    bed.line(Line::Back);
    let client = &mut house.client;
    client.call(HOST, "org.virt.Host.Reconnect", &()).await.expect("asked");
    let told = client.until("web: suspended paused").await;
    client.until_is(HOST, "org.virt.Host", "State", "connected").await;
    client.call(HOST, "org.virt.Host.Refresh", &()).await.expect("looked");
    let mut told = [told, client.events()].concat();
    told.sort();
    let of_moved = ["moved: defined added", "moved: undefined removed"];
    assert_eq!(
        told,
        [&["gone: undefined removed"][..], &of_moved, &["new: defined added", "web: suspended paused"]].concat()
    );
    let path = client.named("moved").await;
    assert_eq!(client.property::<String>(&path, "org.virt.Domain", "UUID").await, Uuid::from_u128(11).to_string());
    let path = client.named("web").await;
    assert_eq!(client.state(&path).await, ("paused".to_owned(), "external".to_owned()));
    assert!(client.property::<bool>(&path, "org.virt.Domain", "Reachable").await);
    client.run(&path, "Resume").await.expect("it is followed as before");
    assert_eq!(client.events(), ["web: resumed unpaused"]);
}

pub async fn at_start(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut house, web) = lab(&*bed, folder.path()).await;
    let before = house.client.names(none()).await;
    house.close().await;
    for (line, then) in [(Line::Hangs, Act::Stop { forced: false }), (Line::Cut, Act::Start)] {
        bed.line(line);
        let begun = Instant::now();
        let mut house = House::on(&*bed, folder.path()).await;
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
        let client = &mut house.client;
        assert_eq!(client.names(none()).await, before);
        let path = client.named("web").await;
        assert_eq!(client.state(&path).await, ("unknown".to_owned(), "unreachable".to_owned()));
        let was_active = matches!(line, Line::Hangs);
        assert_eq!(client.property::<bool>(&path, "org.virt.Domain", "Active").await, was_active);
        assert_eq!(client.run(&path, "Destroy").await.expect_err("away").0, UNREACHABLE);
        bed.act(&web, then);
        bed.line(Line::Back);
        client.call(HOST, "org.virt.Host.Reconnect", &()).await.expect("asked");
        let event = if was_active { "web: stopped shutdown" } else { "web: started booted" };
        assert_eq!(client.until(event).await, [event]);
        client.until_is(&path, "org.virt.Domain", "State", if was_active { "shutoff" } else { "running" }).await;
        house.close().await;
    }
}

pub async fn virtd_ends_in_a_verb(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    bed.make(Uuid::from_u128(7), "web");
    let cut_off = || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let mut house = House::on(&*bed, folder.path()).await;
            let path = house.client.named("web").await;
            bed.line(Line::Hangs);
            let options = std::collections::HashMap::from([("no-wait", zbus::Variant::from(true))]);
            house.client.call(&path, "org.virt.Domain.Start", &(options,)).await.expect("accepted");
        });
        // Nothing of it goes on.
        runtime.shutdown_background();
    };
    std::thread::scope(|scope| scope.spawn(cut_off).join()).expect("it has ended");
    bed.line(Line::Back);
    let mut house = House::on(&*bed, folder.path()).await;
    let client = &mut house.client;
    let path = client.named("web").await;
    assert_eq!(client.state(&path).await.0, "shutoff");
    client.run(&path, "Start").await.expect("started");
    assert_eq!(client.state(&path).await.0, "running");
    client.run(&path, "Destroy").await.expect("destroyed");
}

pub async fn nowhere_to_keep(bed: Box<dyn Bed>) {
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().join("state");
    std::fs::create_dir(&state).expect("a folder");
    std::fs::write(state.join("hosts"), "").expect("a file where the folder should be");
    bed.make(Uuid::from_u128(7), "web");
    let mut house = House::on(&*bed, folder.path()).await;
    assert_eq!(house.client.names(none()).await, ["web"]);
    let problems: Vec<String> = house.client.property(HOST, "org.virt.Host", "Problems").await;
    assert!(problems.len() == 1 && problems[0].contains("is not kept"), "{problems:?}");
    house.close().await;
}
