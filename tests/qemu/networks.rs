//! Two Linux guests in a network of virtd's own, in a network namespace of the daemon's: addresses, names, and a server outside,
//! with virtd there or not.

use crate::common::client::{Client, Domain, Refusal, options};
use crate::common::guest::{lin_files, written};
use crate::common::{Daemon, Setup, have};
use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;
use zbus::{OwnedObjectPath, OwnedVariant, Variant};

/// They boot slowly without KVM, and ask a server of names that is away for long. One that is there knows what it is asked for
/// (`localOnly`): nobody waits for servers outside, of which there are none.
const PATIENCE: Duration = Duration::from_secs(120);

const HOME: &str = "<network><name>home</name><forward mode='nat'/><bridge name='vbr7' stp='off'/>\
     <domain name='lab' localOnly='yes'/><port isolated='yes'/><mtu size='1400'/>\
     <ip address='10.77.0.1' prefix='24'><dhcp><range start='10.77.0.50' end='10.77.0.60'/>\
     <host mac='52:54:00:00:00:12' name='beta' ip='10.77.0.200'/></dhcp></ip></network>";

pub fn xml(name: &str, mac: &str, peer: &str, serial: &Path, (kernel, initrd): &(PathBuf, PathBuf)) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>192</memory><os>\
         <type arch='x86_64' machine='q35'>hvm</type><kernel>{}</kernel><initrd>{}</initrd>\
         <cmdline>console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off nokaslr \
         guest.name={name} guest.peer={peer} guest.web=198.51.100.7</cmdline></os>\
         <features><acpi/></features><devices><serial type='file'><source path='{}'/><target port='0'/></serial>\
         <interface type='network'><mac address='{mac}'/><source network='home'/><model type='virtio'/>\
         <port isolated='no'/></interface></devices></domain>",
        kernel.display(),
        initrd.display(),
        serial.display()
    )
}

/// A host that knows nothing of guests, with a server on it.
pub struct World(Child);

impl World {
    /// It is at 198.51.100.7, and the daemon at 198.51.100.1.
    pub fn new(daemon: &Daemon) -> World {
        let pages = daemon.folder().join("pages");
        std::fs::create_dir(&pages).expect("made");
        std::fs::write(pages.join("index.html"), "outside").expect("written");
        let script = "echo ready; read -r go; ip address add 198.51.100.7/24 dev there; ip link set there up; \
            exec python3 -m http.server --directory \"$0\" 80 > /dev/null 2>&1";
        let mut command = daemon.inside("unshare");
        command.args(["--net", "sh", "-c", script]).arg(&pages);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("unshare");
        let mut ready = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut ready).expect("ready");
        let pid = child.id().to_string();
        ip(daemon, &["link", "add", "here", "type", "veth", "peer", "name", "there", "netns", &pid]);
        ip(daemon, &["address", "add", "198.51.100.1/24", "dev", "here"]);
        ip(daemon, &["link", "set", "here", "up"]);
        child.stdin.take().expect("a pipe").write_all(b"go\n").expect("told");
        World(child)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}

pub fn ip(daemon: &Daemon, arguments: &[&str]) -> String {
    let done = daemon.inside("ip").args(arguments).output().expect("ip");
    assert!(done.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// How many cards are looked at.
fn filters(daemon: &Daemon) -> usize {
    let tables = daemon.inside("nft").args(["list", "tables", "bridge"]).output().expect("nft");
    String::from_utf8_lossy(&tables.stdout).matches("virt_tap_").count()
}

/// A machine's card is in the network's bridge, up, and held to what the network says, whatever the machine's document says. The
/// name of its end.
async fn is_plugged_in(daemon: &Daemon, domain: &Domain) -> String {
    let live: String = domain.call("GetXML", &(options([]),)).await.expect("XML").body().deserialize().expect("text");
    assert!(live.contains("network='home' bridge='vbr7'") && live.contains("<port isolated='yes'/>"), "{live}");
    let end = live.split("<target dev='").nth(1).and_then(|rest| rest.split('\'').next()).expect(&live);
    let shown = ip(daemon, &["-d", "-o", "link", "show", end]);
    let words = ["vnet", ",UP", "master vbr7", "mtu 1400", "isolated on"];
    assert!(words.iter().all(|word| shown.contains(word)), "{shown}");
    end.to_owned()
}

/// The last line in which a guest said what is wanted, of those from `from` on; where it ends.
pub async fn says(serial: &Path, from: usize, wanted: impl Fn(&str) -> bool) -> usize {
    let text = || std::fs::read_to_string(serial).unwrap_or_default();
    let waited = tokio::time::timeout(PATIENCE, async {
        loop {
            let all = text();
            let whole = all.rfind('\n').map_or(0, |end| end + 1);
            if all[from.min(whole)..whole].lines().any(&wanted) {
                return whole;
            }
            written(serial).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("it said only: {}", text()))
}

/// It has that address, finds the other one by name, and reaches the server.
pub fn all_well(address: &'static str, peer: &'static str) -> impl Fn(&str) -> bool {
    move |line| {
        let after =
            |key: &str| line.split_once(key).map_or("", |(_, rest)| rest.split_whitespace().next().unwrap_or(""));
        after(" IP ").starts_with(address) && after(" PEER ").starts_with(peer) && after(" WEB ") == "outside"
    }
}

pub async fn call(client: &Client, path: &str, method: &str, force: bool) -> Result<zbus::Message, Refusal> {
    let with = if force { options([("force", Variant::from(true))]) } else { options([]) };
    client.call(path, &format!("org.virt.Network.{method}"), &(with,)).await
}

pub async fn leased(domain: &Domain) -> Vec<String> {
    addresses(domain, "lease").await
}

pub async fn addresses(domain: &Domain, source: &str) -> Vec<String> {
    let answer = domain.call("GetInterfaceAddresses", &(source, options([]))).await.expect("told");
    type Card = (String, String, String, Vec<(String, u32)>);
    let cards: Vec<Card> = answer.body().deserialize().expect("a list");
    cards.into_iter().flat_map(|card| card.3).map(|(address, prefix)| format!("{address}/{prefix}")).collect()
}

/// A card that comes is looked at from its first frame on, until it goes.
async fn a_card_that_comes_is_filtered(daemon: &Daemon, guest: &Domain) {
    assert_eq!(filters(daemon), 1);
    let another = "<interface type='network'><mac address='52:54:00:00:00:13'/><source network='home'/><model type='virtio'/>\
        <filterref filter='no-mac-spoofing'/></interface>";
    let live = || options([("live", Variant::from(true))]);
    let alias = guest.call("AttachDevice", &(another, live())).await.expect("plugged in");
    let alias: String = alias.body().deserialize().expect("s");
    assert_eq!(filters(daemon), 2);
    let with = |filter: &str| another.replace("<filterref filter='no-mac-spoofing'/>", filter);
    let rules = || {
        let listed = daemon.inside("nft").args(["list", "ruleset", "bridge"]).output().expect("nft");
        String::from_utf8_lossy(&listed.stdout).into_owned()
    };
    assert!(!rules().contains("224.0.0.0/4"), "{}", rules());
    guest.call("UpdateDevice", &(with("<filterref filter='no-ip-multicast'/>"), live())).await.expect("another");
    assert!(rules().contains("224.0.0.0/4") && filters(daemon) == 2, "{}", rules());
    let needs = guest.call("UpdateDevice", &(with("<filterref filter='no-ip-spoofing'/>"), live())).await;
    assert!(needs.expect_err("no address is said").1.contains("<parameter name='IP'"));
    assert!(rules().contains("224.0.0.0/4"), "{}", rules());
    guest.call("UpdateDevice", &(with("<filterref/>"), live())).await.expect("none");
    assert_eq!(filters(daemon), 1);
    guest.call("UpdateDevice", &(with("<filterref filter='allow-arp'/>"), live())).await.expect("one again");
    assert_eq!(filters(daemon), 2);
    guest.call("DetachDeviceAlias", &(&*alias, live())).await.expect("unplugged");
    assert_eq!(filters(daemon), 1);
}

/// The network of these tests, which is active.
async fn home_network(client: &Client) -> OwnedObjectPath {
    let defined = client.call("/org/virt", "org.virt.Manager.Network.DefineNetwork", &(HOME, options([]))).await;
    let path: OwnedObjectPath = defined.expect("defined").body().deserialize().expect("a path");
    call(client, path.as_str(), "Start", false).await.expect("started");
    path
}

/// The guest alpha is given no more than so much, at the host's end of its card.
async fn is_limited(daemon: &Daemon, alpha: &Domain, end: &str) {
    let slower = "<interface type='network'><mac address='52:54:00:00:00:11'/><bandwidth><inbound average='1001'/>\
        </bandwidth></interface>";
    alpha.call("UpdateDevice", &(slower, options([("live", Variant::from(true))]))).await.expect("limited");
    let class = daemon.inside("tc").args(["class", "show", "dev", end]).output().expect("tc");
    assert!(String::from_utf8_lossy(&class.stdout).contains("rate 8008Kbit"), "{class:?}");
}

/// A screen is seen at the network's address.
fn shows_its_screen(daemon: &Daemon) {
    let says = "exec 3<>/dev/tcp/10.77.0.1/5900; head -c 3 <&3";
    let screen = daemon.inside("timeout").args(["60", "bash", "-c", says]).output().expect("bash");
    assert_eq!(String::from_utf8_lossy(&screen.stdout), "RFB", "{screen:?}");
}

#[tokio::test]
async fn n7_guests_have_addresses_names_and_the_world_whoever_is_killed() {
    if !have(&["nft", "dnsmasq", "ip", "python3"]) {
        return;
    }
    let setup = Setup { own_network: true, ..Setup::default() };
    let Some(mut daemon) = Daemon::on_system_bus(setup).await else { return };
    let Some(files) = lin_files() else { return };
    let _world = World::new(&daemon);
    let client = Client { connection: daemon.connect().await };
    let path = home_network(&client).await;
    let (network, mut watch) = (path.as_str(), client.watch().await);
    let mut guests = Vec::new();
    for (name, mac, peer) in [("alpha", "52:54:00:00:00:11", "beta.lab"), ("beta", "52:54:00:00:00:12", "alpha.lab")] {
        let serial = daemon.folder().join(format!("{name}.serial"));
        std::fs::write(&serial, "").expect("written");
        // What one of them sends is looked at, and its screen is seen at the network's address.
        let clean = "<filterref filter='clean-traffic'><parameter name='IP' value='10.77.0.200'/></filterref></interface>\
            <graphics type='vnc'><listen type='network' network='home'/></graphics>";
        let xml = xml(name, mac, peer, &serial, &files);
        let xml = if name == "beta" { xml.replace("</interface>", clean) } else { xml };
        let domain = client.define(&xml).await.expect("defined");
        domain.run("Start").await.expect("started");
        guests.push((domain, serial));
    }
    let [(alpha, first), (beta, second)] = &guests[..] else { panic!("two guests") };
    let (alpha_well, beta_well) = (all_well("10.77.0.5", "10.77.0.200"), all_well("10.77.0.200", "10.77.0.5"));
    says(first, 0, &alpha_well).await;
    says(second, 0, &beta_well).await;
    // That is told soon after the guests have them.
    while leased(alpha).await.is_empty() || leased(beta).await.is_empty() {
        watch.next().await;
    }
    assert_eq!(leased(beta).await, ["10.77.0.200/24"]);
    assert!(leased(alpha).await[0].starts_with("10.77.0.5"));
    let end = is_plugged_in(&daemon, alpha).await;
    is_plugged_in(&daemon, beta).await;
    is_limited(&daemon, alpha, &end).await;
    let told = client.call(network, "org.freedesktop.DBus.Properties.Get", &("org.virt.Network", "Leases")).await;
    let told: OwnedVariant = told.expect("leases").body().deserialize().expect("a value");
    let leases = format!("{told:?}");
    assert!(leases.contains(&beta.path) && leases.contains("alpha"), "{leases}");

    a_card_that_comes_is_filtered(&daemon, alpha).await;

    // virtd is killed: all goes on, and the next one finds it.
    daemon.kill_virtd().await;
    let seen = [std::fs::read(first).expect("read").len(), std::fs::read(second).expect("read").len()];
    says(first, seen[0], &alpha_well).await;
    says(second, seen[1], &beta_well).await;
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let (name, text) = call(&client, network, "Destroy", false).await.expect_err("guests are in it");
    assert!(name == "org.virt.Error.InUse" && text.contains("'alpha'") && text.contains("'beta'"), "{name}: {text}");

    // Taken from under them, and given back: they are plugged in again.
    call(&client, network, "Destroy", true).await.expect("destroyed");
    let seen = std::fs::read(first).expect("read").len();
    let from = says(first, seen, |line| line.starts_with("COUNT") && line.trim_end().ends_with("WEB")).await;
    call(&client, network, "Start", false).await.expect("started");
    for domain in [alpha, beta] {
        is_plugged_in(&daemon, domain).await;
    }
    says(first, from, &alpha_well).await;
    let properties: HashMap<String, OwnedVariant> = client
        .call(network, "org.freedesktop.DBus.Properties.GetAll", &("org.virt.Network",))
        .await
        .expect("properties")
        .body()
        .deserialize()
        .expect("properties");
    assert_eq!(*properties["Active"], Variant::from(true));
    assert_eq!(filters(&daemon), 1);
    shows_its_screen(&daemon);
    let beta = client.named("beta").await.expect("it runs");
    beta.run("Destroy").await.expect("destroyed");
    beta.is_off().await;
    assert_eq!(filters(&daemon), 0);
}
