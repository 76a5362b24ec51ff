//! Networks as clients have them: made for real, in a network namespace of the daemon's own.

use crate::common::client::{Client, Options, Refusal, Watch, options};
use crate::common::users::BOB;
use crate::common::{Daemon, Setup, have};
use std::collections::HashMap;
use zbus::{OwnedObjectPath, OwnedVariant, Variant};

pub const HOME: &str = "<network><name>home</name><forward mode='nat'/><bridge name='vbr7' stp='off'/>\
     <ip address='10.77.0.1' prefix='24'><dhcp><range start='10.77.0.50' end='10.77.0.60'/></dhcp></ip></network>";

const MACHINE: &str = "<domain type='test'><name>web</name><memory>65536</memory><os><type>hvm</type></os><devices>\
     <interface type='network'><mac address='52:54:00:00:00:01'/><source network='home'/></interface>\
     </devices></domain>";

/// It is no network's guest; its display listens on the address of one.
const SEEN: &str = "<domain type='test'><name>seen</name><memory>65536</memory><os><type>hvm</type></os><devices>\
     <graphics type='vnc'><listen type='network' network='home'/></graphics></devices></domain>";

async fn daemon() -> Option<Daemon> {
    if !have(&["nft", "dnsmasq", "ip"]) {
        return None;
    }
    Daemon::on_system_bus(Setup { own_network: true, ..Setup::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn networks_in_memory_start_anywhere_and_end_with_virtd() {
    let Some(mut daemon) = Daemon::session_bus() else { return };
    let config = daemon.root().join("etc/virt");
    std::fs::create_dir_all(&config).expect("a folder");
    std::fs::write(config.join("virtd.toml"), "[networks]\ndriver = \"memory\"\n").expect("written");
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let home = Network::from(&client, "DefineNetwork", HOME).await.expect("defined");
    let machine = client.define(MACHINE).await.expect("defined");
    let (name, _) = machine.run("Start").await.expect_err("its network is inactive");
    assert_eq!(name, "org.virt.Error.OperationInvalid");
    home.does("Start", options([])).await.expect("started");
    machine.run("Start").await.expect("started");
    assert!(machine.xml().await.contains("network='home' bridge='vbr7'"));
    let (name, why) = home.does("Destroy", options([])).await.expect_err("a guest is in it");
    assert!(name == "org.virt.Error.InUse" && why.contains("'web'"), "{name}: {why}");
    // The same bridge twice, and one whose net and bridge are chosen.
    let other = HOME.replace("home", "other").replace("10.77.0", "10.78.0");
    let (_, why) = Network::from(&client, "CreateNetwork", &other).await.err().expect("taken");
    assert!(why.contains("'vbr7'"), "{why}");
    let own = "<network><name>own</name><forward mode='nat'/></network>";
    let own = Network::from(&client, "CreateNetwork", own).await.expect("created");
    assert!(own.xml(options([])).await.contains("<bridge name='virbr0'"));
    let given = "<network><name>given</name><forward mode='hostdev'><pf dev='eth0'/></forward></network>";
    let given = Network::from(&client, "DefineNetwork", given).await.expect("stored");
    let (name, why) = given.does("Start", options([])).await.expect_err("no devices");
    assert!(name == "org.virt.Error.ConfigUnsupported" && why.contains("networks in memory"), "{name}: {why}");
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let home = Network { client, path: home.path };
    assert!(!home.flag("Active").await);
    home.does("Start", options([])).await.expect("started anew");
}

/// A network on the bus.
pub struct Network {
    client: Client,
    pub path: String,
}

impl Network {
    /// What a method of the manager gives.
    pub async fn from(client: &Client, method: &str, xml: &str) -> Result<Network, Refusal> {
        let member = format!("org.virt.Manager.Network.{method}");
        let answer = client.call("/org/virt", &member, &(xml, options([]))).await?;
        let path: OwnedObjectPath = answer.body().deserialize().expect("a path");
        Ok(Network { client: Client { connection: client.connection.clone() }, path: path.to_string() })
    }

    pub async fn call<B>(&self, method: &str, body: &B) -> Result<zbus::Message, Refusal>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        self.client.call(&self.path, &format!("org.virt.Network.{method}"), body).await
    }

    pub async fn does(&self, method: &str, with: Options<'_>) -> Result<zbus::Message, Refusal> {
        self.call(method, &(with,)).await
    }

    pub async fn is(&self) -> HashMap<String, OwnedVariant> {
        let member = "org.freedesktop.DBus.Properties.GetAll";
        let answer = self.client.call(&self.path, member, &("org.virt.Network",)).await.expect("properties");
        answer.body().deserialize().expect("properties")
    }

    async fn flag(&self, name: &str) -> bool {
        bool::try_from(self.is().await[name].clone()).expect("a flag")
    }

    async fn list(&self, name: &str) -> usize {
        let value = self.is().await[name].clone();
        match &*value {
            Variant::Array(list) => list.len(),
            other => panic!("{other:?}"),
        }
    }

    async fn xml(&self, with: Options<'_>) -> String {
        self.does("GetXML", with).await.expect("a document").body().deserialize().expect("text")
    }

    async fn check(&self, method: &str) -> (bool, String) {
        let answer = self.does(method, options([])).await.expect("checked");
        let told: HashMap<String, OwnedVariant> = answer.body().deserialize().expect("a dictionary");
        let reason = String::try_from(told["reason"].clone()).expect("a text");
        (bool::try_from(told["possible"].clone()).expect("a flag"), reason)
    }
}

fn forced() -> Options<'static> {
    options([("force", Variant::from(true))])
}

fn refused(answer: Result<impl std::fmt::Debug, Refusal>, error: &str, word: &str) {
    let (name, text) = answer.expect_err(error);
    assert!(name == format!("org.virt.Error.{error}") && text.contains(word), "{name}: {text}");
}

pub fn shown(daemon: &Daemon, program: &str, arguments: &[&str]) -> String {
    let done = daemon.inside(program).args(arguments).output().expect(program);
    String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr)
}

/// Whether bridge, table and server are there.
fn there(daemon: &Daemon) -> (bool, bool) {
    let bridge = shown(daemon, "ip", &["-o", "link", "show", "type", "bridge"]).contains("vbr7");
    (bridge, shown(daemon, "nft", &["list", "tables"]).contains("virt_"))
}

/// With and without XML, in what there is and what is stored.
async fn its_hosts_are_reserved(network: &Network) {
    network.call("SetHost", &("52:54:00:00:00:01", "10.77.0.200", "web", options([]))).await.expect("reserved");
    assert_eq!(network.list("Hosts").await, 1);
    let host = "<host mac='52:54:00:00:00:02' ip='10.77.0.201'/>";
    network.call("Update", &("add-last", "ip-dhcp-host", host, options([]))).await.expect("added");
    let of = async |command: &str, number: i32| {
        let other = "<host mac='52:54:00:00:00:03' ip='10.77.0.202'/>";
        network.call("Update", &(command, "ip-dhcp-host", other, options([("parent-index", number.into())]))).await
    };
    of("add-last", 0).await.expect("in the first <ip>");
    refused(of("delete", 1).await, "ConfigInvalid", "number 1");
    refused(of("delete", -2).await, "InvalidArgument", "counts from 0");
    of("delete", -1).await.expect("in the first that fits");
    assert!(network.xml(options([("inactive", Variant::from(true))])).await.contains("10.77.0.201"));
    refused(
        network.call("Update", &("add-last", "ip-dhcp-host", host, options([]))).await,
        "ConfigInvalid",
        "there already",
    );
    refused(
        network.call("Update", &("grow", "ip-dhcp-host", host, options([]))).await,
        "InvalidArgument",
        "modify, delete",
    );
    refused(network.call("SetHost", &("web", "", "", options([]))).await, "InvalidArgument", "52:54:00:12:34:56");
    network.call("RemoveHost", &("52:54:00:00:00:02", options([]))).await.expect("removed");
    refused(
        network.call("RemoveHost", &("52:54:00:00:00:02", options([]))).await,
        "ConfigInvalid",
        "nothing is reserved",
    );
}

#[tokio::test]
async fn n5_a_network_from_its_definition_to_its_end() {
    let Some(mut daemon) = daemon().await else { return };
    let client = Client { connection: daemon.connect().await };
    let network = Network::from(&client, "DefineNetwork", HOME).await.expect("defined");
    assert_eq!((network.flag("Active").await, network.flag("Persistent").await), (false, true));
    refused(Network::from(&client, "DefineNetwork", HOME).await.map(|_| ()), "NetworkExists", "'home' exists already");
    refused(network.does("Destroy", options([])).await, "OperationInvalid", "not active");
    refused(network.does("Start", options([("fast", Variant::from(true))])).await, "InvalidArgument", "fast");
    assert_eq!(network.check("CheckStart").await, (true, String::new()));
    let seen = client.define(SEEN).await.expect("defined");
    refused(
        seen.run("Start").await,
        "OperationInvalid",
        "a display that listens on network 'home', which is not active",
    );
    network.does("Start", options([])).await.expect("started");
    seen.run("Start").await.expect("started");
    let (live, stored) = (seen.xml().await, options([("inactive", Variant::from(true))]));
    assert!(live.contains("network='home'") && live.contains("address='10.77.0.1'"), "{live}");
    let stored = seen.call("GetXML", &(stored,)).await.expect("XML").body().deserialize::<String>().expect("text");
    assert!(stored.contains("network='home'") && !stored.contains("10.77.0.1"), "{stored}");
    refused(network.does("Destroy", options([])).await, "InUse", "domain 'seen' (vnc, live)");
    seen.run("Destroy").await.expect("destroyed");
    seen.run("Undefine").await.expect("undefined");
    assert_eq!(there(&daemon), (true, true));
    let is = network.is().await;
    let text = |name: &str| String::try_from(is[name].clone()).expect(name);
    assert_eq!((text("Mode").as_str(), text("Bridge").as_str()), ("nat", "vbr7"));
    assert!(!network.check("CheckStart").await.0);
    assert!(!network.flag("ConfigChanged").await);
    refused(network.does("Start", options([])).await, "OperationInvalid", "active already");

    // A machine in it.
    let machine = client.define(MACHINE).await.expect("defined");
    machine.run("Start").await.expect("started");
    let live: String = machine.call("GetXML", &(options([]),)).await.expect("XML").body().deserialize().expect("text");
    assert!(live.contains("network='home'") && live.contains("bridge='vbr7'"), "{live}");
    assert_eq!(network.list("Users").await, 2, "by what runs, and what is stored");
    refused(network.does("Destroy", options([])).await, "InUse", "domain 'web' (52:54:00:00:00:01, live)");
    refused(network.does("Undefine", options([])).await, "InUse", "domain 'web' (52:54:00:00:00:01, config)");
    let (possible, why) = network.check("CheckDestroy").await;
    assert!(!possible && why.contains("'web'"), "{why}");

    // A card of a network is in that network's bridge, whatever a document leaves unsaid.
    let elsewhere = "<interface><mac address='52:54:00:00:00:01'/><source bridge='br-lan'/></interface>";
    refused(machine.call("UpdateDevice", &(elsewhere, options([]))).await, "OperationUnsupported", "type='network'");

    its_hosts_are_reserved(&network).await;

    // virtd is killed: bridge, rules and server go on, and the next one has it as it was.
    let before = network.xml(options([])).await;
    daemon.kill_virtd().await;
    assert_eq!(there(&daemon), (true, true));
    daemon.start_virtd().await;
    assert!(network.flag("Active").await);
    assert_eq!(network.xml(options([])).await, before);
    assert_eq!(network.list("Users").await, 1, "a machine of the test driver's ends with virtd");

    network.does("Destroy", forced()).await.expect("destroyed");
    assert_eq!(there(&daemon), (false, false));
    let shop = client.define(&MACHINE.replace("web", "shop").replace(":01", ":09")).await.expect("defined");
    refused(shop.run("Start").await, "OperationInvalid", "network 'home', which is not active");
    shop.call("Start", &(options([("start-dependencies", Variant::from(true))]),)).await.expect("both are started");
    assert!(network.flag("Active").await);
    shop.run("Destroy").await.expect("destroyed");
    network.does("Destroy", forced()).await.expect("destroyed");
    network.does("Undefine", forced()).await.expect("undefined");
    refused(shop.run("Start").await, "NoSuchNetwork", "'home'");
}

#[tokio::test]
async fn n5_what_cannot_be_is_refused_and_nothing_is_left() {
    let Some(daemon) = daemon().await else { return };
    let client = Client { connection: daemon.connect().await };
    refused(Network::from(&client, "DefineNetwork", "<network/>").await.map(|_| ()), "ConfigInvalid", "needs a name");
    let vepa = "<network><name>v</name><forward mode='vepa' dev='eth0'/><virtualport type='802.1Qbg'/></network>";
    let network = Network::from(&client, "DefineNetwork", vepa).await.expect("stored");
    refused(network.does("Start", options([])).await, "ConfigUnsupported", "virtualport");
    shown(&daemon, "ip", &["link", "add", "far", "type", "veth", "peer", "name", "near"]);
    shown(&daemon, "ip", &["address", "add", "10.77.0.129/25", "dev", "far"]);
    shown(&daemon, "ip", &["link", "set", "far", "up"]);
    refused(Network::from(&client, "CreateNetwork", HOME).await.map(|_| ()), "NetworkFailed", "device 'far'");
    assert_eq!(there(&daemon), (false, false));
    let member = "org.virt.Manager.Network.GetNetworkByName";
    refused(client.call("/org/virt", member, &("home",)).await, "NoSuchNetwork", "'home'");
    shown(&daemon, "ip", &["link", "del", "far"]);
    let network = Network::from(&client, "CreateNetwork", HOME).await.expect("created");
    assert_eq!((network.flag("Active").await, network.flag("Persistent").await), (true, false));
    refused(network.does("Undefine", options([])).await, "OperationInvalid", "transient");
    network.does("Destroy", options([])).await.expect("destroyed");
    refused(client.call("/org/virt", member, &("home",)).await, "NoSuchNetwork", "'home'");
    let listed =
        client.call("/org/virt", "org.virt.Manager.Network.ListNetworks", &(options([]),)).await.expect("listed");
    let listed: Vec<(OwnedObjectPath, String, String, String, bool)> = listed.body().deserialize().expect("a list");
    assert_eq!(
        listed.iter().map(|one| (one.1.as_str(), one.3.as_str(), one.4)).collect::<Vec<_>>(),
        [("v", "inactive", true)]
    );
    let other = vepa.replace("<name>v<", "<name>w<");
    let findings = client.call("/org/virt", "org.virt.Manager.Network.ValidateNetwork", &(other, options([]))).await;
    let findings: Vec<(String, u32, u32, String)> = findings.expect("validated").body().deserialize().expect("a list");
    assert!(findings.len() == 1 && findings[0].3.contains("virtualport"), "{findings:?}");
}

#[tokio::test]
async fn n5_who_may_not_is_refused_and_learns_nothing() {
    let Some(daemon) = daemon().await else { return };
    let root = Client { connection: daemon.connect().await };
    let network = Network::from(&root, "DefineNetwork", HOME).await.expect("defined");
    let call = |member: &str, signature: &[&str]| {
        let fixed = ["call", "org.virt", &network.path, "org.virt.Network", member];
        daemon.busctl(&BOB, &[&fixed[..], signature].concat())
    };
    for member in ["Start", "Destroy", "Undefine"] {
        let said = call(member, &["a{sv}", "0"]).expect_err(member);
        assert!(said.contains("polkit asks for a password (org.virt.network."), "{said}");
    }
    let said = call("SetHost", &["sssa{sv}", "52:54:00:00:00:01", "10.77.0.99", "", "0"]).expect_err("SetHost");
    assert!(!said.contains("10.77"), "{said}");
    assert_eq!((there(&daemon), network.list("Hosts").await), ((false, false), 0));
    assert!(call("GetXML", &["a{sv}", "0"]).expect("everybody may read").contains("10.77.0.50"));
    // Nothing is run for who may not start it: of the host he is told nothing.
    shown(&daemon, "ip", &["link", "add", "vbr7", "type", "bridge"]);
    assert!(!network.check("CheckStart").await.0);
    let said = call("CheckStart", &["a{sv}", "0"]).expect("everybody may ask");
    assert!(said.contains("\"possible\" b true"), "{said}");
}

#[tokio::test]
async fn n6_a_broken_document_says_so_and_a_default_one_chooses_its_net_once() {
    let Some(mut daemon) = daemon().await else { return };
    daemon.kill_virtd().await;
    let folder = daemon.root().join("var/lib/virt/networks");
    let (good, bad) = ("8f6e1a1e-2c4f-4b6b-9d5c-000000000001", "8f6e1a1e-2c4f-4b6b-9d5c-000000000002");
    let shipped = include_str!("../../data/networks/default.xml").replace("@UUID@", good);
    std::fs::write(folder.join(format!("{good}.xml")), shipped).expect("written");
    std::fs::write(folder.join(format!("{good}.json")), "{\"owner\":0,\"autostart\":true}").expect("written");
    std::fs::write(folder.join(format!("{bad}.xml")), "<network>").expect("written");
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let at = |uuid: &str| Network {
        client: Client { connection: client.connection.clone() },
        path: format!("/org/virt/network/_{}", uuid.replace('-', "_")),
    };
    let broken = at(bad);
    assert!(!String::try_from(broken.is().await["Broken"].clone()).expect("a text").is_empty());
    refused(broken.does("Start", options([])).await, "OperationInvalid", "broken");
    // What it was called cannot be read: a new document gives it its name.
    let mended = HOME.replace("<name>home</name>", &format!("<name>mended</name><uuid>{bad}</uuid>"));
    Network::from(&client, "DefineNetwork", &mended).await.expect("defined anew");
    let is = broken.is().await;
    let text = |name: &str| String::try_from(is[name].clone()).expect(name);
    assert_eq!((text("Name").as_str(), text("Broken").as_str()), ("mended", ""));
    broken.does("Undefine", options([])).await.expect("undefined");
    let network = at(good);
    // It starts with the host, if this is the first virtd since it booted.
    if let Err((name, text)) = network.does("Start", options([])).await {
        assert!(text.contains("active already"), "{name}: {text}");
    }
    let chosen = network.xml(options([("inactive", Variant::from(true))])).await;
    assert!(chosen.contains("<ip address='192.168.122.1' netmask='255.255.255.0'>"), "{chosen}");
    network.does("Destroy", options([])).await.expect("destroyed");
    shown(&daemon, "ip", &["link", "add", "far", "type", "veth", "peer", "name", "near"]);
    shown(&daemon, "ip", &["address", "add", "192.168.122.9/24", "dev", "far"]);
    shown(&daemon, "ip", &["link", "set", "far", "up"]);
    refused(network.does("Start", options([])).await, "NetworkFailed", "'far'");
}

/// The words of a network's problems when they have changed next.
async fn problems(watch: &mut Watch, network: &Network) -> Vec<String> {
    loop {
        let message = watch.next().await;
        let header = message.header();
        let is_it = header.member().is_some_and(|member| member == "PropertiesChanged")
            && header.path().is_some_and(|path| *path == network.path.as_str());
        if !is_it {
            continue;
        }
        let (_, mut values, _): (String, HashMap<String, OwnedVariant>, Vec<String>) =
            message.body().deserialize().expect("sa{sv}as");
        if let Some(problems) = values.remove("Problems") {
            let problems = Vec::<(String, String)>::try_from(problems).expect("a(ss)");
            return problems.into_iter().map(|(token, _)| token).collect();
        }
    }
}

#[tokio::test]
async fn problems_follow_what_others_do_with_rules() {
    let Some(mut daemon) = daemon().await else { return };
    let client = Client { connection: daemon.connect().await };
    let network = Network::from(&client, "CreateNetwork", HOME).await.expect("started");
    assert_eq!(network.list("Problems").await, 0);
    let drops =
        "add table ip docker; add chain ip docker FORWARD { type filter hook forward priority 0; policy drop; }";
    let lets_pass = "add rule ip docker FORWARD iifname vbr7 accept; add rule ip docker FORWARD oifname vbr7 accept";
    let nft = |line: &str| assert_eq!(shown(&daemon, "nft", &[line]), "", "{line}");
    let mut watch = client.watch().await;
    nft(drops);
    assert_eq!(problems(&mut watch, &network).await, ["forward-blocked"]);
    nft(lets_pass);
    assert_eq!(problems(&mut watch, &network).await, [""; 0]);
    nft("flush chain ip docker FORWARD");
    assert_eq!(problems(&mut watch, &network).await, ["forward-blocked"]);
    nft("delete table ip docker");
    assert_eq!(problems(&mut watch, &network).await, [""; 0]);

    // The next virtd hears of it as well.
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    assert_eq!(network.list("Problems").await, 0);
    let mut watch = client.watch().await;
    assert_eq!(shown(&daemon, "nft", &[drops]), "");
    assert_eq!(problems(&mut watch, &network).await, ["forward-blocked"]);
    network.does("Destroy", options([])).await.expect("destroyed");
}
