//! Networks beside firewalld, which runs in the daemon's network namespace and on its bus.

use super::networks::{HOME, Network, shown};
use crate::common::client::{Client, Watch, options};
use crate::common::{Daemon, PATIENCE, Setup, have, project_file};
use futures_util::StreamExt as _;
use std::io::Read as _;
use std::path::PathBuf;
use std::process::Stdio;
use zbus::MessageStream;

/// The private bus ends it, if nobody has.
struct Firewalld {
    folder: PathBuf,
    process: std::process::Child,
    signals: MessageStream,
}

impl Firewalld {
    /// Starts it, with virtd's zone, and returns when it has put the bridge there.
    async fn start(daemon: &Daemon, bridge: &str) -> Firewalld {
        let folder = daemon.folder().join("firewalld");
        for kind in ["zones", "policies"] {
            std::fs::create_dir_all(folder.join(kind)).expect("a folder");
            for file in std::fs::read_dir(project_file("data/firewalld").join(kind)).expect("files").flatten() {
                std::fs::copy(file.path(), folder.join(kind).join(file.file_name())).expect("copied");
            }
        }
        let settings = "DefaultZone=public\nFirewallBackend=nftables\nCleanupModulesOnExit=no\nIPv6_rpfilter=no\n";
        std::fs::write(folder.join("firewalld.conf"), settings).expect("written");
        let rule = zbus::MatchRule::builder().msg_type(zbus::message::Type::Signal);
        let rule = rule.path("/org/fedoraproject/FirewallD1").build().expect("a rule");
        let signals = MessageStream::for_match_rule(rule, &daemon.connect().await, None).await.expect("a match");
        let log = std::fs::File::create(folder.join("log")).expect("a log");
        let mut command = daemon.inside("firewalld");
        command.args(["--nofork", "--nopid", "--system-config"]).arg(&folder);
        let process = command
            .arg("--log-file")
            .arg(folder.join("told"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a copy"))
            .stderr(log)
            .spawn();
        let mut started = Firewalld { folder, process: process.expect("firewalld"), signals };
        started.has_put(bridge, "virt").await;
        started
    }

    /// Waits until a bridge has been put into a zone.
    async fn has_put(&mut self, bridge: &str, zone: &str) {
        let put = async {
            loop {
                let signal = self.signals.next().await.expect("the bus").expect("a message");
                let is_it = signal.header().member().is_some_and(|member| member == "ZoneOfInterfaceChanged");
                if is_it && signal.body().deserialize::<(String, String)>().expect("ss") == (zone.into(), bridge.into())
                {
                    return;
                }
            }
        };
        if tokio::time::timeout(PATIENCE, put).await.is_err() {
            let log = std::fs::read_to_string(self.folder.join("log"));
            panic!("'{bridge}' is not put into '{zone}': {log:?}");
        }
    }
}

fn cmd(daemon: &Daemon, arguments: &[&str]) -> String {
    shown(daemon, "firewall-cmd", arguments).trim().to_owned()
}

/// Somebody on the other end of a device of the host's, in a network namespace of their own.
struct Neighbour<'a> {
    daemon: &'a Daemon,
    holder: std::process::Child,
}

impl<'a> Neighbour<'a> {
    fn new(daemon: &'a Daemon, device: &str, address: &str, gateway: &str) -> Neighbour<'a> {
        let mut command = daemon.inside("unshare");
        command.args(["--net", "sh", "-c", "echo; exec sleep infinity"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut holder = command.spawn().expect("unshare");
        let is_there = holder.stdout.take().expect("its output").read(&mut [0]).expect("read");
        assert_eq!(is_there, 1, "no network namespace");
        let neighbour = Neighbour { daemon, holder };
        let pid = neighbour.holder.id().to_string();
        let words = ["link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", &pid];
        assert_eq!(shown(daemon, "ip", &words), "");
        assert_eq!(shown(daemon, "ip", &["link", "set", device, "up"]), "");
        neighbour.does("ip", &["address", "add", address, "dev", "eth0"]);
        neighbour.does("ip", &["link", "set", "eth0", "up"]);
        neighbour.does("ip", &["route", "add", "default", "via", gateway]);
        neighbour
    }

    fn does(&self, program: &str, arguments: &[&str]) -> String {
        let pid = self.holder.id().to_string();
        shown(self.daemon, "nsenter", &[&["--net", "--target", &pid, "--", program][..], arguments].concat())
    }

    /// What comes of a connection over TCP.
    fn connects(&self, address: &str, port: u16) -> String {
        self.does("timeout", &["20", "bash", "-c", &format!("exec 3<>/dev/tcp/{address}/{port} && echo connected")])
    }
}

impl Drop for Neighbour<'_> {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

async fn problems(network: &Network) -> Vec<(String, String)> {
    Vec::try_from(network.is().await["Problems"].clone()).expect("problems")
}

/// Waits until the network's problems are these.
async fn are(network: &Network, watch: &mut Watch, tokens: &[&str]) -> Vec<(String, String)> {
    become_so(network, watch, |found| found.iter().map(|one| one.0.as_str()).eq(tokens.iter().copied())).await
}

/// Waits until the network's problems are so.
async fn become_so(
    network: &Network,
    watch: &mut Watch,
    is: impl Fn(&[(String, String)]) -> bool,
) -> Vec<(String, String)> {
    loop {
        let found = problems(network).await;
        if is(&found) {
            return found;
        }
        watch.next().await;
    }
}

#[tokio::test]
async fn n7_a_bridge_is_in_a_zone_of_firewalld_whatever_comes_and_goes() {
    if !have(&["nft", "dnsmasq", "ip", "firewalld", "firewall-cmd"]) {
        return;
    }
    let setup = Setup { own_network: true, ..Setup::default() };
    let Some(mut daemon) = Daemon::on_system_bus(setup).await else { return };
    let client = Client { connection: daemon.connect().await };
    let network = Network::from(&client, "DefineNetwork", &HOME.replace("'nat'", "'route'")).await.expect("defined");
    network.does("Start", options([])).await.expect("started");
    assert_eq!(problems(&network).await, []);
    let mut watch = client.watch().await;
    // firewalld comes later, and the bridge is put into virtd's zone.
    let mut firewalld = Firewalld::start(&daemon, "vbr7").await;
    {
        are(&network, &mut watch, &[]).await;
        let guest = Neighbour::new(&daemon, "g1", "10.77.0.9/24", "10.77.0.1");
        assert_eq!(shown(&daemon, "ip", &["link", "set", "g1", "master", "vbr7"]), "");
        let world = Neighbour::new(&daemon, "up0", "198.51.100.7/24", "198.51.100.1");
        assert_eq!(shown(&daemon, "ip", &["address", "add", "198.51.100.1/24", "dev", "up0"]), "");
        // The host answers names; what is passed on arrives where nobody listens, which says so itself.
        assert_eq!(guest.connects("10.77.0.1", 53), "connected\n");
        assert!(guest.connects("198.51.100.7", 80).contains("Connection refused"), "out");
        assert!(world.connects("10.77.0.9", 80).contains("Connection refused"), "in, to a routed network");
        let refused = guest.connects("10.77.0.1", 54);
        assert!(refused.contains("Connection refused") || refused.contains("No route to host"), "{refused}");

        // A reload loses it, and it is put there again.
        assert_eq!(cmd(&daemon, &["--reload"]), "success");
        firewalld.has_put("vbr7", "virt").await;
        are(&network, &mut watch, &[]).await;
        assert_eq!(guest.connects("10.77.0.1", 53), "connected\n");

        // Somebody moves it: that is told, and left alone. What is told to be done helps.
        assert_eq!(cmd(&daemon, &["--zone=public", "--change-interface=vbr7"]), "success");
        // On its way it is in no zone for a moment, and rules and zone are not looked at in one.
        let is_there = |one: &(String, String)| one.1.contains("in the zone 'public', and not in 'virt'");
        let found = become_so(&network, &mut watch, |found| found.len() == 3 && found.iter().any(is_there)).await;
        let tokens: Vec<&str> = found.iter().map(|one| one.0.as_str()).collect();
        assert_eq!(tokens, ["forward-blocked", "input-blocked", "zone-lost"]);
        let remedy = "firewall-cmd --zone=virt --change-interface=vbr7";
        assert!(found.iter().all(|(_, sentence)| sentence.ends_with(remedy)), "{found:?}");
        assert!(guest.connects("10.77.0.1", 53).contains("No route to host"), "it is rejected by firewalld");
        assert_eq!(cmd(&daemon, &["--zone=virt", "--change-interface=vbr7"]), "success");
        are(&network, &mut watch, &[]).await;

        // A zone that is not there, until it is.
        let lab = HOME.replace("home", "lab").replace("'vbr7'", "'vbr8' zone='lab'").replace("10.77.0.", "10.78.0.");
        let lab = Network::from(&client, "CreateNetwork", &lab).await.expect("created");
        let found = problems(&lab).await;
        let lost = found.iter().find(|(token, _)| token == "zone-lost").expect("its zone");
        assert!(lost.1.contains("knows no zone 'lab'") && lost.1.contains("--new-zone"), "{lost:?}");
        assert_eq!(cmd(&daemon, &["--permanent", "--new-zone=lab"]), "success");
        assert_eq!(cmd(&daemon, &["--permanent", "--zone=lab", "--set-target=ACCEPT"]), "success");
        assert_eq!(cmd(&daemon, &["--reload"]), "success");
        firewalld.has_put("vbr8", "lab").await;
        are(&lab, &mut watch, &[]).await;
        lab.does("Destroy", options([])).await.expect("destroyed");
        assert_eq!(cmd(&daemon, &["--get-zone-of-interface=vbr8"]), "no zone", "it does not stay behind");
    }

    // What is lost while no virtd is there is put right by the next one.
    daemon.kill_virtd().await;
    assert_eq!(shown(&daemon, "firewall-cmd", &["--zone=virt", "--remove-interface=vbr7"]), "success\n");
    daemon.start_virtd().await;
    let mut watch = client.watch().await;
    are(&network, &mut watch, &[]).await;
    assert_eq!(shown(&daemon, "firewall-cmd", &["--get-zone-of-interface=vbr7"]), "virt\n");

    // One that ends leaves its rules, and no zones.
    assert_eq!(cmd(&daemon, &["--zone=public", "--change-interface=vbr7"]), "success");
    are(&network, &mut watch, &["forward-blocked", "input-blocked", "zone-lost"]).await;
    firewalld.process.kill().expect("killed");
    firewalld.process.wait().expect("ended");
    are(&network, &mut watch, &["forward-blocked", "input-blocked"]).await;
}

#[tokio::test]
async fn n7_virtd_comes_up_beside_a_firewalld_that_answers_nobody() {
    if !have(&["nft", "dnsmasq", "ip"]) {
        return;
    }
    let setup = Setup { own_network: true, ..Setup::default() };
    let Some(mut daemon) = Daemon::on_system_bus(setup).await else { return };
    let client = Client { connection: daemon.connect().await };
    let second = HOME.replace("home", "lab").replace("vbr7", "vbr8").replace("10.77.0.", "10.78.0.");
    for network in [HOME, second.as_str()] {
        Network::from(&client, "CreateNetwork", network).await.expect("created");
    }
    daemon.kill_virtd().await;
    // Whoever has the name and serves no object reads what comes, and says nothing.
    let silent = daemon.connect().await;
    let bus = zbus::fdo::DBusProxy::new(&silent).await.expect("the bus");
    let name = "org.fedoraproject.FirewallD1".try_into().expect("a name");
    bus.request_name(name, zbus::fdo::RequestNameFlags::DO_NOT_QUEUE).await.expect("the name");
    let begun = std::time::Instant::now();
    daemon.start_virtd().await;
    let took = begun.elapsed();
    assert!(took < std::time::Duration::from_secs(10), "it waits for firewalld: {took:?}");
}
