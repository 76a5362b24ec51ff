//! Statistics at an interval, of the test driver's machines.

use crate::common::client::{Client, Refusal, Watch, options};
use crate::common::users::{ALICE, BOB};
use crate::common::{Daemon, Setup};
use std::collections::HashMap;
use zbus::{Message, ObjectPath, OwnedObjectPath, OwnedVariant, Variant};

const SUBSCRIPTION: &str = "org.virt.StatsSubscription";
const SHORTEST: u64 = 200_000;

fn machine(name: &str) -> String {
    format!("<domain type='test'><name>{name}</name><memory>65536</memory><os><type>hvm</type></os></domain>")
}

pub async fn subscribe(client: &Client, pairs: &[(&str, Variant<'_>)]) -> Result<String, Refusal> {
    let pairs = pairs.iter().map(|(key, value)| (*key, value.try_clone().expect("no descriptor")));
    let reply = client.call("/org/virt", "org.virt.Manager.SubscribeStats", &(options(pairs),)).await?;
    Ok(reply.body().deserialize::<ObjectPath<'_>>().expect("o").to_string())
}

async fn close(client: &Client, path: &str) -> Result<Message, Refusal> {
    client.call(path, &format!("{SUBSCRIPTION}.Close"), &()).await
}

pub type Numbers = HashMap<String, OwnedVariant>;
pub type Values = HashMap<String, Numbers>;

/// The next moment that somebody is told, with the path of whom.
pub async fn moment(watch: &mut Watch) -> (String, u64, Values) {
    loop {
        let message = watch.next().await;
        let header = message.header();
        if header.member().is_some_and(|member| member == "Stats") {
            let path = header.path().expect("a path").to_string();
            let (when, values): (u64, Vec<(OwnedObjectPath, Numbers)>) =
                message.body().deserialize().expect("ta(oa{sv})");
            return (path, when, values.into_iter().map(|(path, numbers)| (path.to_string(), numbers)).collect());
        }
    }
}

/// Waits until an object is no more.
pub async fn until_gone(watch: &mut Watch, path: &str) {
    loop {
        let message = watch.next().await;
        if message.header().member().is_some_and(|member| member == "InterfacesRemoved") {
            let (gone, interfaces): (OwnedObjectPath, Vec<String>) = message.body().deserialize().expect("oas");
            if gone.as_str() == path {
                assert_eq!(interfaces, [SUBSCRIPTION]);
                return;
            }
        }
    }
}

#[tokio::test]
async fn each_listener_is_told_its_own_machines_and_nobody_elses() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = Client { connection: daemon.connect().await };
    let web = root.define(&machine("web")).await.expect("defined");
    let mail = root.define(&machine("mail")).await.expect("defined");
    web.run("Start").await.expect("started");

    let alice = Client { connection: daemon.connect_as(&ALICE).await };
    let bob = Client { connection: daemon.connect_as(&BOB).await };
    let (mut of_alice, mut of_bob) = (alice.watch().await, bob.watch().await);
    let interval = ("interval-usec", Variant::from(SHORTEST));
    let all = subscribe(&alice, std::slice::from_ref(&interval)).await.expect("begun");
    // Named twice, it is told once.
    let named = Variant::from(vec![ObjectPath::try_from(web.path.clone()).expect("a path"); 2]);
    let groups = Variant::from(vec!["cpu"]);
    let one = subscribe(&bob, &[interval, ("domains", named), ("groups", groups)]).await.expect("begun");
    assert_ne!(all, one);

    let (path, first, told) = moment(&mut of_alice).await;
    assert_eq!((path.as_str(), told.len()), (all.as_str(), 2));
    assert!(told[&web.path].contains_key("cpu") && told[&web.path].contains_key("disks"), "{told:?}");
    let mut off: Vec<_> = told[&mail.path].keys().map(String::as_str).collect();
    off.sort_unstable();
    assert_eq!(off, ["sampled-at", "state"]);
    let (path, second, _) = moment(&mut of_alice).await;
    assert!(path == all && second > first);
    for _ in 0..3 {
        let (path, _, told) = moment(&mut of_bob).await;
        assert_eq!((path.as_str(), told.len()), (one.as_str(), 1));
        let mut groups: Vec<_> = told[&web.path].keys().map(String::as_str).collect();
        groups.sort_unstable();
        assert_eq!(groups, ["cpu", "sampled-at"]);
    }

    // Machines come and go.
    let more = root.define(&machine("more")).await.expect("defined");
    while !moment(&mut of_alice).await.2.contains_key(&more.path) {}
    mail.run("Undefine").await.expect("undefined");
    while moment(&mut of_alice).await.2.contains_key(&mail.path) {}

    let (name, _) = close(&bob, &all).await.expect_err("it is another's");
    assert_eq!(name, "org.freedesktop.DBus.Error.AccessDenied");
    close(&alice, &all).await.expect("closed");
    until_gone(&mut of_bob, &all).await;
    close(&alice, &all).await.expect_err("it has gone");
    let mut of_root = root.watch().await;
    bob.connection.close().await.expect("left");
    until_gone(&mut of_root, &one).await;
}

#[tokio::test]
async fn what_cannot_be_listened_to_is_refused_and_nobody_has_too_many() {
    let rules = "polkit.addRule(function(action, subject) { if (action.id == 'org.virt.domain.read' && \
                 action.lookup('domain_name') == 'web' && subject.user == 'virt-bob') { return polkit.Result.NO; } });";
    let Some(daemon) = Daemon::on_system_bus(Setup { rules: rules.to_owned(), ..Setup::default() }).await else {
        return;
    };
    let root = Client { connection: daemon.connect().await };
    let web = root.define(&machine("web")).await.expect("defined");
    let mail = root.define(&machine("mail")).await.expect("defined");
    let bob = Client { connection: daemon.connect_as(&BOB).await };
    let paths = |path: &str| Variant::from(vec![ObjectPath::try_from(path.to_owned()).expect("a path")]);
    let argument = "org.virt.Error.InvalidArgument";
    for (key, value, refusal) in [
        ("interval-usec", Variant::from(SHORTEST - 1), argument),
        ("interval-usec", Variant::from(u64::MAX), argument),
        ("interval-usec", Variant::from(1u32), argument),
        ("groups", Variant::from(vec!["gpu"]), argument),
        ("fresh", Variant::from(true), argument),
        ("domains", paths("/org/virt"), "org.virt.Error.NoSuchDomain"),
        ("domains", paths(&web.path.replace("domain/_", "domain/_f")), "org.virt.Error.NoSuchDomain"),
        ("domains", paths(&web.path), "org.freedesktop.DBus.Error.AccessDenied"),
    ] {
        let (name, why) = subscribe(&bob, &[(key, value)]).await.expect_err(key);
        assert_eq!(name, refusal, "{key}: {why}");
    }

    let mut of_bob = bob.watch().await;
    let quick = subscribe(&bob, &[("interval-usec", Variant::from(SHORTEST))]).await.expect("begun");
    let (_, _, told) = moment(&mut of_bob).await;
    assert!(told.len() == 1 && told.contains_key(&mail.path), "the rule hides the other: {told:?}");
    close(&bob, &quick).await.expect("closed");
    until_gone(&mut of_bob, &quick).await;

    let mut last = String::new();
    for _ in 0..16 {
        last = subscribe(&bob, &[]).await.expect("begun");
    }
    let (name, why) = subscribe(&bob, &[]).await.expect_err("one too many");
    assert_eq!(name, "org.freedesktop.DBus.Error.LimitsExceeded", "{why}");
    subscribe(&root, &[]).await.expect("others have their own");
    close(&bob, &last).await.expect("closed");
    until_gone(&mut of_bob, &last).await;
    subscribe(&bob, &[]).await.expect("there is room again");
}
