//! A user without root has networks on the session bus: a real guest with an address, names and a server outside, with virtd there
//! or not; and nothing is left of them.

use crate::common::client::{Client, Watch, lifecycle_of, options};
use crate::common::guest::lin_files;
use crate::common::users::{ADMIN, ALICE, BOB, OPERATOR, User};
use crate::common::{Daemon, PATIENCE, have};
use crate::networks::{World, addresses, all_well, call, ip, leased, says, xml};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use zbus::{OwnedObjectPath, OwnedVariant, Variant};

const HOME: &str = "<network><name>home</name><forward mode='nat'/><bridge name='vbr7' stp='off'/>\
     <domain name='lab' localOnly='yes'/><dns><host ip='10.77.0.9'><hostname>printer</hostname></host></dns>\
     <ip address='10.77.0.1' prefix='24'><dhcp><range start='10.77.0.50' end='10.77.0.59'/></dhcp></ip></network>";

/// A session bus of a user without rights. Nothing where it cannot be had.
async fn daemon(user: User) -> Option<Daemon> {
    if !have(&["nft", "dnsmasq", "ip", "pasta", "python3"]) {
        return None;
    }
    let mut daemon = Daemon::session_bus_of(user)?;
    daemon.start_virtd().await;
    Some(daemon)
}

async fn define(client: &Client, text: &str) -> String {
    let defined = client.call("/org/virt", "org.virt.Manager.Network.DefineNetwork", &(text, options([]))).await;
    let path: OwnedObjectPath = defined.expect("defined").body().deserialize().expect("a path");
    path.to_string()
}

async fn property(client: &Client, network: &str, name: &str) -> OwnedVariant {
    client.property(network, "org.virt.Network", name).await
}

/// Those of the user's processes that networks need; each test has a user of its own.
fn helpers(user: User) -> Vec<(u32, String)> {
    let all = std::fs::read_dir("/proc").expect("processes").flatten();
    let found = all.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        if entry.metadata().ok()?.uid() != user.uid {
            return None;
        }
        let words = std::fs::read(entry.path().join("cmdline")).ok()?;
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        let is =
            ["network-holder", "network-helper", "pasta", "dnsmasq"].into_iter().find(|word| words.contains(word))?;
        Some((pid, is.to_owned()))
    });
    let mut found: Vec<(u32, String)> = found.collect();
    found.sort_by(|a, b| a.1.cmp(&b.1));
    found
}

fn names(helpers: &[(u32, String)]) -> Vec<&str> {
    helpers.iter().map(|(_, name)| name.as_str()).collect()
}

async fn told(watch: &mut Watch, network: &str, wanted: &str) {
    while lifecycle_of(&watch.next().await, network).as_deref() != Some(wanted) {}
}

/// A guest's own files where everybody may read them.
fn shown(daemon: &Daemon, file: &Path) -> std::path::PathBuf {
    let copy = daemon.folder().join(file.file_name().expect("a name"));
    std::fs::copy(file, &copy).expect("copied");
    copy
}

#[tokio::test]
async fn n8_a_user_without_root_has_a_network_and_a_guest_in_it() {
    let Some(files) = lin_files() else { return };
    let Some(mut daemon) = daemon(ALICE).await else { return };
    let _world = World::new(&daemon);
    ip(&daemon, &["route", "add", "default", "via", "198.51.100.7"]);
    let client = Client { connection: daemon.connect().await };
    let network = define(&client, HOME).await;
    call(&client, &network, "Start", false).await.expect("started");
    let there = helpers(ALICE);
    assert_eq!(names(&there), ["dnsmasq", "dnsmasq", "network-holder", "pasta"], "dnsmasq runs what tells of leases");
    assert!(!ip(&daemon, &["link", "show"]).contains("vbr7"), "the host has nothing of it");

    let mut watch = client.watch().await;
    let serial = daemon.folder().join("alpha.serial");
    std::fs::write(&serial, "").expect("written");
    std::os::unix::fs::chown(&serial, Some(ALICE.uid), None).expect("given");
    let files = (shown(&daemon, &files.0), shown(&daemon, &files.1));
    let text = xml("alpha", "52:54:00:00:00:11", "printer.lab", &serial, &files);
    let guest = client.define(&text).await.expect("defined");
    guest.run("Start").await.expect("started");
    let well = all_well("10.77.0.5", "10.77.0.9");
    says(&serial, 0, &well).await;
    while leased(&guest).await.is_empty() {
        watch.next().await;
    }
    let lease = leased(&guest).await.remove(0);
    assert!(lease.starts_with("10.77.0.5"), "{lease}");
    // It is no neighbour of the host's, but one in there, whose prefix is not known.
    let (neighbour, known) = (lease.replace("/24", "/0"), addresses(&guest, "arp").await);
    assert!(known.contains(&neighbour), "{neighbour}: {known:?}");
    let limits = options([("inbound-average", Variant::from(1001_u64))]);
    guest.call("SetInterfaceBandwidth", &("52:54:00:00:00:11", limits, options([]))).await.expect("limited");
    let stats: HashMap<String, OwnedVariant> =
        guest.run("GetStats").await.expect("told").body().deserialize().expect("a dictionary");
    let stats = format!("{:?}", stats["interfaces"]);
    assert!(stats.contains("rx-bytes"), "its end is counted: {stats}");

    // virtd is killed: all goes on, and the next one finds it.
    daemon.kill_virtd().await;
    let seen = std::fs::read(&serial).expect("read").len();
    says(&serial, seen, &well).await;
    assert_eq!(helpers(ALICE), there);
    daemon.start_virtd().await;
    assert_eq!(helpers(ALICE), there, "the same processes");
    let client = Client { connection: daemon.connect().await };
    let guest = client.named("alpha").await.expect("found");
    assert_eq!(*property(&client, &network, "Active").await, Variant::from(true));
    assert_eq!(leased(&guest).await.len(), 1);
    let (name, text) = call(&client, &network, "Destroy", false).await.expect_err("a guest is in it");
    assert!(name == "org.virt.Error.InUse" && text.contains("'alpha'"), "{name}: {text}");

    // Taken from under it, and given back: it is plugged in again.
    call(&client, &network, "Destroy", true).await.expect("destroyed");
    assert_eq!(names(&helpers(ALICE)), ["network-holder"], "the guest's end is held there");
    let seen = std::fs::read(&serial).expect("read").len();
    let from = says(&serial, seen, |line| line.starts_with("COUNT") && line.trim_end().ends_with("WEB")).await;
    call(&client, &network, "Start", false).await.expect("started");
    says(&serial, from, &well).await;

    // The guest is the last that is there.
    call(&client, &network, "Destroy", true).await.expect("destroyed");
    assert_eq!(names(&helpers(ALICE)), ["network-holder"]);
    guest.run("Destroy").await.expect("destroyed");
    assert_eq!(helpers(ALICE), []);
    assert!(!daemon.root().join("run/virt/own-network").exists(), "nothing is known of it");
}

#[tokio::test]
async fn n8_what_holds_a_network_ends_and_that_is_told() {
    let Some(mut daemon) = daemon(BOB).await else { return };
    let client = Client { connection: daemon.connect().await };
    let isolated = HOME.replace("<forward mode='nat'/>", "");
    let network = define(&client, &isolated).await;
    let mut watch = client.watch().await;
    let end_holder = || {
        let (pid, _) = helpers(BOB).into_iter().find(|(_, name)| name == "network-holder").expect("a holder");
        let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it was there");
    };
    call(&client, &network, "Start", false).await.expect("started, without an uplink");
    assert_eq!(names(&helpers(BOB)), ["dnsmasq", "dnsmasq", "network-holder"]);
    end_holder();
    told(&mut watch, &network, "stopped failed").await;
    assert_eq!(*property(&client, &network, "Active").await, Variant::from(false));
    assert_eq!(helpers(BOB), []);

    // The same while no virtd is there.
    call(&client, &network, "Start", false).await.expect("started again");
    daemon.kill_virtd().await;
    end_holder();
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    assert_eq!(*property(&client, &network, "Active").await, Variant::from(false));
    assert_eq!(helpers(BOB), []);
}

#[tokio::test]
async fn n8_what_cannot_be_without_root_is_stored_and_not_started() {
    let Some(mut daemon) = daemon(OPERATOR).await else { return };
    let client = Client { connection: daemon.connect().await };
    let refused = async |network: &str, word: &str| {
        let (name, text) = call(&client, network, "Start", false).await.expect_err("refused");
        assert_eq!(name, "org.virt.Error.ConfigUnsupported", "{text}");
        assert!(text.contains(word) && text.contains("<interface type='user'>"), "{text}");
    };
    let routed = HOME.replace("mode='nat'", "mode='route'").replace("home", "routed").replace("vbr7", "vbr8");
    let routed = define(&client, &routed).await;
    refused(&routed, "'nat'").await;
    // Without a way out it does not start, in pasta's own words, and nothing is left of it.
    let nat = define(&client, HOME).await;
    let (name, text) = call(&client, &nat, "Start", false).await.expect_err("there is no way out");
    assert!(name == "org.virt.Error.NetworkFailed" && text.contains("pasta"), "{name}: {text}");
    assert_eq!(helpers(OPERATOR), []);
    let none = |at: &str| {
        let done = daemon.inside("mount").args(["--bind", "/dev/null", at]).status().expect("mount");
        assert!(done.success(), "{done}");
    };
    none("/usr/bin/pasta");
    refused(&nat, "Debian has it in passt").await;
    let closed = daemon.folder().join("closed");
    std::fs::write(&closed, "").expect("written");
    std::fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("closed");
    let done = daemon.inside("mount").arg("--bind").arg(&closed).arg("/dev/net/tun").status().expect("mount");
    assert!(done.success(), "{done}");
    refused(&nat, "/dev/net/tun").await;
    daemon.kill_virtd().await;
    daemon.take_user_namespaces();
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let (name, text) = call(&client, &nat, "Start", false).await.expect_err("refused");
    assert!(name == "org.virt.Error.ConfigUnsupported" && text.contains("user namespaces"), "{name}: {text}");
    for network in [&routed, &nat] {
        assert_eq!(*property(&client, network, "Persistent").await, Variant::from(true));
    }
}

/// virtd is killed when each of the processes has begun that make a network: afterwards it is there whole, or nothing is.
#[tokio::test]
async fn n8_a_start_that_is_cut_off_leaves_all_or_nothing() {
    let Some(mut daemon) = daemon(ADMIN).await else { return };
    let _world = World::new(&daemon);
    ip(&daemon, &["route", "add", "default", "via", "198.51.100.7"]);
    let client = Client { connection: daemon.connect().await };
    let network = define(&client, HOME).await;
    for cut in ["network-holder", "pasta", "network-helper", "dnsmasq"] {
        let client = Client { connection: daemon.connect().await };
        let (start, path) = (client.clone(), network.clone());
        let started = tokio::spawn(async move {
            start.ask(&path, "org.virt.Network.Start", &(options([]),)).await;
        });
        let begun = tokio::time::timeout(PATIENCE, async {
            // Nobody is told of a process that begins.
            while !started.is_finished() && !names(&helpers(ADMIN)).contains(&cut) {
                tokio::task::yield_now().await;
            }
        });
        begun.await.unwrap_or_else(|_| panic!("{cut} does not begin"));
        daemon.kill_virtd().await;
        started.await.expect("it was answered, or cut off");
        daemon.start_virtd().await;
        let client = Client { connection: daemon.connect().await };
        let there = helpers(ADMIN);
        if *property(&client, &network, "Active").await == Variant::from(true) {
            assert_eq!(names(&there), ["dnsmasq", "dnsmasq", "network-holder", "pasta"], "{cut}");
            call(&client, &network, "Destroy", false).await.expect("destroyed");
        } else {
            assert_eq!(there, [], "{cut}");
        }
        assert_eq!(helpers(ADMIN), [], "{cut}");
    }
}
