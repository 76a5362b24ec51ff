//! What the bus itself lets through, by the two shipped policies. The test stands in for virtd as owner of the name.

use crate::common::users::{ALICE, OPERATOR, ROOT, User};
use crate::common::{Daemon, Setup, project_file};
use futures_util::StreamExt as _;
use zbus::fdo::DBusProxy;
use zbus::{Connection, MatchRule, MessageStream};

const INTERFACES: &[&str] = &[
    "org.virt.Manager",
    "org.virt.Domain",
    "org.virt.Snapshot",
    "org.virt.Checkpoint",
    "org.virt.Job",
    "org.virt.Manager.NodeDevice",
    "org.virt.NodeDevice",
    "org.virt.Host",
    "org.virt.StatsSubscription",
    "org.freedesktop.DBus.Properties",
    "org.freedesktop.DBus.ObjectManager",
    "org.freedesktop.DBus.Introspectable",
    "org.freedesktop.DBus.Peer",
];

/// A bus with org.virt on it, owned by root, that answers every call with an error.
async fn bus(policy: &str) -> Option<(Daemon, Connection)> {
    let daemon = Daemon::system_bus(Setup { bus_policy: policy.to_owned(), ..Setup::default() })?;
    let owner = daemon.connect().await;
    owner.object_server(); // from now on it answers
    owner.request_name("org.virt").await.unwrap();
    Some((daemon, owner))
}

/// Both policies, as an administrator installs the second.
fn private_policy() -> String {
    let include = |file: &str| format!("<include>{}</include>", project_file(file).display());
    format!(
        "<busconfig>{}{}</busconfig>",
        include("dbus-policy/org.virt.conf"),
        include("dbus-policy/org.virt-private.conf")
    )
}

/// Whether the bus lets `user` call `interface`: it names itself as the one who says no.
async fn may_call(daemon: &Daemon, user: &User, interface: Option<&str>) -> bool {
    let connection = daemon.connect_as(user).await;
    let error = connection.call_method(Some("org.virt"), "/none", interface, "None", &()).await.unwrap_err();
    match error {
        zbus::Error::MethodError(..) | zbus::Error::FDO(_) => !error.to_string().contains("Rejected send message"),
        _ => panic!("{user:?} {interface:?}: {error:?}"),
    }
}

#[tokio::test]
async fn everybody_may_talk_to_virtd_by_its_interfaces_only() {
    let Some((daemon, _owner)) = bus("").await else { return };
    for interface in INTERFACES {
        assert!(may_call(&daemon, &ALICE, Some(interface)).await, "{interface}");
    }
    assert!(!may_call(&daemon, &ALICE, Some("org.example.Other")).await);
    assert!(!may_call(&daemon, &ALICE, None).await, "a call without an interface");
}

#[tokio::test]
async fn the_private_policy_lets_root_and_group_virt_in_and_nobody_else() {
    let Some((daemon, _owner)) = bus(&private_policy()).await else { return };
    for interface in INTERFACES {
        assert!(may_call(&daemon, &OPERATOR, Some(interface)).await, "{interface}");
        assert!(may_call(&daemon, &ROOT, Some(interface)).await, "{interface}");
        assert!(!may_call(&daemon, &ALICE, Some(interface)).await, "{interface}");
    }
}

/// Whether `user` receives a signal of virtd.
async fn hears(daemon: &Daemon, owner: &Connection, user: &User) -> bool {
    let connection = daemon.connect_as(user).await;
    let rule = MatchRule::builder().interface("org.virt.Domain").build().unwrap();
    let mut signals = MessageStream::for_match_rule(rule, &connection, None).await.unwrap();
    owner.emit_signal(None::<()>, "/none", "org.virt.Domain", "Lifecycle", &("started", "booted")).await.unwrap();
    // A round trip of each: whatever the bus was to deliver has been delivered then.
    DBusProxy::new(owner).await.unwrap().get_id().await.unwrap();
    DBusProxy::new(&connection).await.unwrap().get_id().await.unwrap();
    tokio::time::timeout(std::time::Duration::from_millis(200), signals.next()).await.is_ok()
}

#[tokio::test]
async fn signals_are_public_by_one_policy_and_not_by_the_other() {
    let Some((daemon, owner)) = bus("").await else { return };
    assert!(hears(&daemon, &owner, &ALICE).await);
    let Some((daemon, owner)) = bus(&private_policy()).await else { return };
    assert!(!hears(&daemon, &owner, &ALICE).await);
    assert!(hears(&daemon, &owner, &OPERATOR).await);
    assert!(hears(&daemon, &owner, &ROOT).await);
}

#[tokio::test]
async fn only_root_may_own_the_name() {
    let Some(daemon) = Daemon::system_bus(Setup::default()) else { return };
    for user in [ALICE, OPERATOR] {
        let error = daemon.connect_as(&user).await.request_name("org.virt").await.unwrap_err();
        assert!(error.to_string().contains("not allowed to own"), "{error}");
    }
    daemon.connect().await.request_name("org.virt").await.unwrap();
}
