//! Networks made for real, each test in network, mount and process namespaces of its own: the machine's are never touched.

use super::HostNetworks;
use super::make::{Maker, Namespace};
use super::rule_changes::RuleChanges;
use crate::host::tap::{Rate, limit_of};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use virt_model::driver::network::{Lease, NetworkDriver, NetworkError, NetworkReport, PluggedCard, ProblemToken};
use virt_model::network::NetworkDef;
use virt_model::network::update::{Change, Command as Verb, Section};

const INSIDE: &str = "VIRT_TEST_IN_NAMESPACES";

/// Runs the test of that path again in namespaces of its own; whether this is that run. Nothing where it cannot be had.
pub(crate) fn is_inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let missing = ["nft", "dnsmasq"].into_iter().find(|program| {
        !["/usr/sbin", "/usr/bin", "/sbin"].iter().any(|folder| Path::new(folder).join(program).exists())
    });
    if let Some(missing) = missing.filter(|_| std::env::var_os("VIRT_NO_SKIP").is_none()) {
        eprintln!("SKIPPED: there is no {missing}");
        return false;
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: this needs root");
        return false;
    }
    let before = format!(
        "mount -t sysfs sysfs /sys && mount -t tmpfs -o mode=755 tmpfs /run && ip link set lo up && \
        exec \"$0\" --exact {test} --nocapture"
    );
    let own = std::env::current_exe().unwrap();
    let done = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", &before])
        .arg(own)
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && said.contains("1 passed"), "{said}");
    false
}

pub(crate) fn run(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let done = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(done.status.success(), "{line}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// A folder that dnsmasq's user can go through, with a program that tells of leases.
pub(super) struct House {
    dir: tempfile::TempDir,
}

impl House {
    pub(super) fn new() -> House {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::Builder::new().prefix("net").tempdir_in("/run").unwrap();
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open.clone()).unwrap();
        let teller = dir.path().join("teller");
        std::fs::write(&teller, "#!/bin/sh\n: > \"$VIRT_LEASES_TOLD\"\n").unwrap();
        std::fs::set_permissions(&teller, open).unwrap();
        House { dir }
    }

    pub(super) fn networks(&self) -> HostNetworks {
        HostNetworks::new(self.dir.path(), self.dir.path(), Some(self.dir.path().join("teller")))
    }

    fn maker(&self, steps: usize) -> Maker {
        let at = |name: &str| -> PathBuf { self.dir.path().join(name) };
        let steps_left = Some(AtomicUsize::new(steps));
        Maker {
            runtime: at("networks"),
            leases: at("leases"),
            teller: Some(at("teller")),
            namespace: Namespace::Host,
            steps_left,
        }
    }
}

pub(super) async fn complete(text: &str, networks: &HostNetworks) -> NetworkDef {
    let mut def = NetworkDef::parse(text).unwrap_or_else(|findings| panic!("{findings:#?}"));
    networks.complete(&mut def, &[]).await;
    def
}

pub(super) fn home() -> String {
    "<network><name>home</name><forward/><bridge stp='off'/><domain name='lab' localOnly='yes'/>\
     <dns><host ip='10.77.0.9'><hostname>printer</hostname></host></dns>\
     <ip address='10.77.0.1' prefix='24'><dhcp><range start='10.77.0.50' end='10.77.0.60'/></dhcp></ip></network>"
        .to_owned()
}

/// Why it is not started.
pub(super) async fn refused(house: &House, def: NetworkDef) -> String {
    match house.networks().start(&def, 7).await {
        Err(NetworkError::Failed(why)) => why,
        other => panic!("{other:?}"),
    }
}

/// What is there of networks.
fn there() -> (bool, bool, bool) {
    let bridge = run("ip -o link show type bridge").contains("virbr");
    let table = run("nft list tables").contains("virt_");
    let server = std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        command.starts_with(b"dnsmasq\0")
    });
    (bridge, table, server)
}

/// A guest of the bridge, played by a network namespace.
struct Guest {
    name: &'static str,
}

impl Guest {
    fn new(name: &'static str, bridge: &str, mac: &str) -> Guest {
        run(&format!("ip netns add {name}"));
        run(&format!("ip link add {name} type veth peer name eth0 netns {name} address {mac}"));
        run(&format!("ip link set {name} master {bridge} up"));
        run(&format!("ip -n {name} link set eth0 up"));
        Guest { name }
    }

    /// Runs something where the guest is.
    fn does<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = || {
                let space = std::fs::File::open(format!("/run/netns/{}", self.name)).unwrap();
                nix::sched::setns(space, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                work()
            };
            scope.spawn(inside).join().unwrap()
        })
    }

    /// Asks for an address and takes it.
    fn lease(&self, mac: [u8; 6], name: &str) -> Ipv4Addr {
        self.does(|| {
            let offer = exchange(mac, name, 1, None);
            exchange(mac, name, 3, Some(offer));
            offer
        })
    }
}

/// One question of DHCP and its answer. What answers another question, or one that was asked before, is none.
fn exchange(mac: [u8; 6], name: &str, kind: u8, wanted: Option<Ipv4Addr>) -> Ipv4Addr {
    static ASKED: AtomicU32 = AtomicU32::new(1);
    let number = ASKED.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let answers = if kind == 1 { 2 } else { 5 };
    let socket = UdpSocket::bind("0.0.0.0:68").unwrap();
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::BindToDevice, &"eth0".into()).unwrap();
    socket.set_broadcast(true).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(4))).unwrap();
    let mut packet = vec![0_u8; 236];
    packet[..3].copy_from_slice(&[1, 1, 6]);
    packet[4..8].copy_from_slice(&number);
    packet[10] = 0x80;
    packet[28..34].copy_from_slice(&mac);
    packet.extend([99, 130, 83, 99, 53, 1, kind, 12, name.len() as u8]);
    packet.extend(name.as_bytes());
    wanted.iter().for_each(|address| packet.extend([&[50, 4][..], &address.octets()].concat()));
    packet.push(255);
    packet.resize(300, 0);
    let mut answer = [0; 1500];
    // The bridge may not pass on what comes while it takes notice of a new port: a client asks again.
    for _ in 0..10 {
        socket.send_to(&packet, "255.255.255.255:67").unwrap();
        while let Ok((length, _)) = socket.recv_from(&mut answer) {
            if length > 240 && answer[4..8] == number && answer[240..length].starts_with(&[53, 1, answers]) {
                return Ipv4Addr::new(answer[16], answer[17], answer[18], answer[19]);
            }
        }
    }
    panic!("no answer of DHCP");
}

/// The address of a name, as a server of names says it.
fn resolve(server: &str, name: &str) -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    let mut packet = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        packet.push(label.len() as u8);
        packet.extend(label.as_bytes());
    }
    packet.extend([0, 0, 1, 0, 1]);
    socket.send_to(&packet, (server, 53)).unwrap();
    let mut answer = [0; 512];
    let (length, _) = socket.recv_from(&mut answer).expect("an answer of DNS");
    let found = answer[7] > 0 && length >= 16;
    found.then(|| Ipv4Addr::new(answer[length - 4], answer[length - 3], answer[length - 2], answer[length - 1]))
}

type Reports = tokio::sync::mpsc::Receiver<NetworkReport>;

/// The next report but of leases.
async fn told(reports: &mut Reports) -> Option<NetworkReport> {
    loop {
        match reports.recv().await {
            Some(NetworkReport::Leases) => {}
            other => return other,
        }
    }
}

/// Makes, as one change, what drops packets that are passed on.
const DOCKER: &str = "nft add table ip docker ; \
    add chain ip docker FORWARD { type filter hook forward priority 0 ; policy drop ; }";

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x11];

/// Somebody behind the host, who knows nothing of guests.
fn world_behind_the_host() -> Guest {
    run("ip netns add world");
    run("ip link add up0 type veth peer name eth0 netns world");
    run("ip address add 198.51.100.1/24 dev up0");
    run("ip link set up0 up");
    run("ip -n world address add 198.51.100.7/24 dev eth0");
    run("ip -n world link set eth0 up");

    Guest { name: "world" }
}

/// A guest finds names, and who is behind the host; nobody finds the way in.
fn reaches_others(guest: &Guest, address: Ipv4Addr, world: &Guest) {
    run(&format!("ip -n g1 address add {address}/24 dev eth0"));
    run("ip -n g1 route add default via 10.77.0.1");
    guest.does(|| {
        assert_eq!(resolve("10.77.0.1", "alpha.lab"), Some(address));
        assert_eq!(resolve("10.77.0.1", "printer"), Some("10.77.0.9".parse().unwrap()));
        assert_eq!(resolve("10.77.0.1", "nobody.lab"), None);
    });
    // Translated on the way out.
    let server = world.does(|| std::net::TcpListener::bind("198.51.100.7:80").unwrap());
    let seen = std::thread::spawn(move || server.accept().unwrap().1.ip());
    guest.does(|| std::net::TcpStream::connect("198.51.100.7:80").unwrap());
    assert_eq!(seen.join().unwrap(), Ipv4Addr::new(198, 51, 100, 1));
    run("ip -n world route add 10.77.0.0/24 via 198.51.100.1");
    let inner = guest.does(|| std::net::TcpListener::bind((address, 80)).unwrap());
    let refused = world.does(|| std::net::TcpStream::connect((address, 80))).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{refused}");
    drop(inner);
}

/// No guest is dropped, and the server is the same.
async fn is_changed_while_it_runs(networks: &HostNetworks, def: &NetworkDef, guest: &Guest) -> NetworkDef {
    let host = "<host mac='52:54:00:00:00:12' name='beta' ip='10.77.0.200'/>";
    let change = Change::read(Verb::AddLast, Section::DhcpHost, None, host).unwrap();
    let more = def.changed(&change).unwrap();
    networks.change(&more).await.unwrap();
    let second = Guest::new("g2", def.bridge_name().unwrap(), "52:54:00:00:00:12");
    assert_eq!(second.lease([0x52, 0x54, 0, 0, 0, 0x12], "whatever"), Ipv4Addr::new(10, 77, 0, 200));
    let txt =
        Change::read(Verb::AddLast, Section::DnsHost, None, "<host ip='10.77.0.8'><hostname>scanner</hostname></host>");
    let more = more.changed(&txt.unwrap()).unwrap();
    networks.change(&more).await.unwrap();
    let known = guest.does(|| resolve("10.77.0.1", "scanner.lab"));
    assert_eq!(known, Some(Ipv4Addr::new(10, 77, 0, 8)), "a name is known when the change has been made");
    more
}

/// What drops is told and left alone; so is a server that has ended.
async fn what_stands_in_its_way_is_told(
    networks: &HostNetworks,
    more: &NetworkDef,
    reports: &mut Reports,
    server: &str,
) {
    run(DOCKER);
    assert_eq!(told(reports).await, Some(NetworkReport::Changed));
    let problems = networks.problems(more).await.unwrap();
    assert_eq!(
        problems.iter().map(|problem| problem.token.as_str()).collect::<Vec<_>>(),
        ["forward-blocked"],
        "{problems:?}"
    );
    assert!(
        problems[0].sentence.contains("nft insert rule ip docker FORWARD iifname \"virbr0\" accept"),
        "{problems:?}"
    );
    let number = nix::unistd::Pid::from_raw(server.parse().unwrap());
    nix::sys::signal::kill(number, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(told(reports).await, Some(NetworkReport::ServerEnded));
    assert_eq!(networks.problems(more).await.unwrap()[0].token, ProblemToken::DhcpDown);
    // Where nobody can list the rules, that is said, with what is known without them.
    let nft = nft();
    run(&format!("mount --bind /bin/false {nft}"));
    let seen = networks.problems(more).await.unwrap_err();
    assert_eq!(seen.found.iter().map(|problem| problem.token.as_str()).collect::<Vec<_>>(), ["dhcp-down"], "{seen:?}");
    assert!(seen.why.contains("nft"), "{seen:?}");
    run(&format!("umount {nft}"));
}

/// A guest's card as it was, where it is in no bridge.
async fn is_plugged_in_again(networks: &HostNetworks, def: &NetworkDef) {
    let card = PluggedCard { end: "g1".to_owned(), isolated: true, vlan: None };
    let gone = PluggedCard { end: "g9".to_owned(), ..card.clone() };
    networks.plug(def, vec![gone, card.clone()]).await;
    let port = run("ip -d -o link show g1");
    assert!([",UP", "master virbr0", "isolated on"].iter().all(|word| port.contains(word)), "{port}");
    networks.plug(def, vec![PluggedCard { isolated: false, ..card.clone() }]).await;
    assert!(run("ip -d -o link show g1").contains("isolated on"), "one that is in a bridge stays as it is");
    // As it is where virtd is killed between the bridge and the rest.
    run("ip link set g1 down nomaster");
    run("ip link set g1 master virbr0");
    networks.plug(def, vec![card]).await;
    let port = run("ip -d -o link show g1");
    assert!([",UP", "master virbr0", "isolated on"].iter().all(|word| port.contains(word)), "{port}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_gets_an_address_and_names_and_reaches_others() {
    if !is_inside("network::tests::a_guest_gets_an_address_and_names_and_reaches_others") {
        return;
    }
    let world = world_behind_the_host();
    let house = House::new();
    let networks = house.networks();
    let def = complete(&home(), &networks).await;
    networks.start(&def, 7).await.unwrap();
    let mut reports = networks.watch(def.uuid).await;
    // Its user may write into this: which process it is is known without.
    let file = house.dir.path().join(format!("networks/{}/pid", def.uuid));
    let pid = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, "1\n").unwrap();
    let guest = Guest::new("g1", def.bridge_name().unwrap(), "52:54:00:00:00:11");
    let address = guest.lease(MAC, "alpha");
    assert_eq!(reports.recv().await, Some(NetworkReport::Leases), "told without being asked");
    let leases = networks.leases(&def).await.unwrap();
    let Lease { mac, host_name, prefix, .. } = &leases[0];
    assert_eq!((mac.unwrap().0, host_name.as_str(), *prefix, leases.len()), (MAC, "alpha", 24, 1));
    assert_eq!(leases[0].address, address);

    reaches_others(&guest, address, &world);

    // Another virtd finds it all and has nothing to do; the lease is there.
    let before = run("nft list tables") + &run("ip -o link");
    drop((networks, reports));
    let networks = house.networks();
    assert_eq!(networks.find().await, [(def.clone(), 7)]);
    assert_eq!(networks.leases(&def).await.unwrap(), leases);
    assert_eq!(run("nft list tables") + &run("ip -o link"), before);

    let mut more = is_changed_while_it_runs(&networks, &def, &guest).await;

    assert_eq!(networks.problems(&more).await, Ok(Vec::new()));
    let mut reports = networks.watch(def.uuid).await;
    what_stands_in_its_way_is_told(&networks, &more, &mut reports, pid.trim()).await;
    // A change makes another one; that the one before ends in it is nothing to be told.
    for word in ["one", "two"] {
        let txt = format!("<txt name='{word}' value='x'/>");
        more = more.changed(&Change::read(Verb::AddLast, Section::DnsTxt, None, &txt).unwrap()).unwrap();
        networks.change(&more).await.unwrap();
        assert_eq!(told(&mut reports).await, Some(NetworkReport::Changed), "{word}");
        assert!(
            networks.problems(&more).await.unwrap().iter().all(|problem| problem.token != ProblemToken::DhcpDown),
            "{word}"
        );
    }
    // One that cannot be destroyed is watched as before.
    let rules = house.dir.path().join(format!("networks/{}/rules.json", def.uuid));
    std::fs::remove_file(&rules).unwrap();
    std::fs::create_dir(&rules).unwrap();
    networks.stop(def.uuid).await.unwrap_err();
    assert_eq!(told(&mut reports).await, Some(NetworkReport::ServerEnded));
    std::fs::remove_dir(&rules).unwrap();
    networks.stop(def.uuid).await.unwrap();
    assert_eq!(there(), (false, false, false));
    assert!(run("nft list tables").contains("docker"), "others' tables stay");
    assert!(run("ip -o link show g1").contains("g1"), "a guest's device stays");
    assert_eq!(told(&mut reports).await, None);

    networks.start(&def, 7).await.unwrap();
    is_plugged_in_again(&networks, &def).await;
    networks.stop(def.uuid).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_off_anywhere_it_is_whole_or_not_there() {
    if !is_inside("network::tests::cut_off_anywhere_it_is_whole_or_not_there") {
        return;
    }
    let house = House::new();
    let def = complete(&home(), &house.networks()).await;
    let mut whole = 0;
    for steps in 0..12 {
        let cut = house.maker(steps).start(&def, 7);
        let found = house.networks().find().await;
        match found.as_slice() {
            [] => assert_eq!(there(), (false, false, false), "after {steps} steps"),
            [(one, 7)] => {
                assert_eq!((one, there()), (&def, (true, true, true)), "after {steps} steps");
                whole += 1;
                house.networks().stop(def.uuid).await.unwrap();
                assert_eq!(there(), (false, false, false));
            }
            _ => panic!("{found:?}"),
        }
        assert_eq!(std::fs::read_dir(house.dir.path().join("networks")).unwrap().count(), 0, "after {steps} steps");
        assert!(cut.is_ok() || steps < 6, "after {steps} steps");
    }
    assert!(whole >= 5, "{whole}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_way_is_named_and_nothing_is_left() {
    if !is_inside("network::tests::what_is_in_the_way_is_named_and_nothing_is_left") {
        return;
    }
    let house = House::new();
    let networks = house.networks();
    let def = complete(&home(), &networks).await;
    run("ip link add far type veth peer name near");
    run("ip address add 10.77.0.200/25 dev far");
    run("ip link set far up");
    run("ip link set near up");
    let why = refused(&house, def.clone()).await;
    assert!(why.contains("'home'") && why.contains("by the device 'far' overlaps with 10.77.0.0/24"), "{why}");
    run("ip link del far");
    run("ip link add virbr0 type bridge");
    let why = refused(&house, def.clone()).await;
    assert!(why.contains("has a device 'virbr0' already"), "{why}");
    assert_eq!(complete(&home(), &networks).await.bridge_name(), Some("virbr1"), "another name is chosen");
    networks.stop(def.uuid).await.unwrap();
    assert!(run("ip -o link show virbr0").contains("virbr0"), "it is not ours");
    run("ip link del virbr0");
    let text = home().replace("<forward/>", "<forward dev='nowhere0'/>");
    let why = refused(&house, complete(&text, &networks).await).await;
    assert!(why.contains("no device 'nowhere0'"), "{why}");
    // dnsmasq's own words, after bridge and rules were made.
    let squatter = UdpSocket::bind("0.0.0.0:67").unwrap();
    let why = refused(&house, def.clone()).await;
    assert!(why.contains("dnsmasq") && why.contains("use"), "{why}");
    assert_eq!(there(), (false, false, false));
    drop(squatter);
    networks.start(&def, 7).await.unwrap();
    // A bridge of the same name that somebody else has made since is left alone.
    run("ip link del virbr0");
    run("ip link add virbr0 type bridge");
    networks.stop(def.uuid).await.unwrap();
    assert_eq!(there(), (true, false, false));
    run("ip link del virbr0");

    assert_eq!(networks.free_net(&[]).await.unwrap().to_string(), "192.168.122.0/24");
    run("ip link add far type veth peer name near");
    run("ip address add 192.168.122.9/24 dev far");
    run("ip link set far up");
    run("ip link set near up");
    let taken = ["192.168.123.0/24".parse().unwrap()];
    assert_eq!(networks.free_net(&taken).await.unwrap().to_string(), "192.168.124.0/24");
    let bridged = "<network><name>b</name><forward mode='bridge'/><bridge name='br7'/></network>";
    let bridged = complete(bridged, &networks).await;
    assert!(refused(&house, bridged.clone()).await.contains("no bridge 'br7'"));
    run("ip link add br7 type bridge");
    let tagged = bridged.write().replace("</network>", "<vlan><tag id='42'/></vlan></network>");
    let why = refused(&house, complete(&tagged, &networks).await).await;
    // A kernel without VLANs of bridges says that it has none.
    assert!(why.contains("VLAN") && why.contains("bridge"), "{why}");
    networks.start(&bridged, 7).await.unwrap();
    networks.stop(bridged.uuid).await.unwrap();
    assert!(run("ip -o link show br7").contains("br7"), "it was there before");
}

/// virtd in a home that is closed: dnsmasq would give addresses, and nobody would be told.
#[tokio::test(flavor = "multi_thread")]
async fn a_network_whose_leases_could_not_be_told_is_not_started() {
    if !is_inside("network::tests::a_network_whose_leases_could_not_be_told_is_not_started") {
        return;
    }
    let (house, mode) = (House::new(), std::os::unix::fs::PermissionsExt::from_mode);
    let closed = house.dir.path().join("closed");
    std::fs::create_dir(&closed).unwrap();
    let teller = closed.join("teller");
    std::fs::copy(house.dir.path().join("teller"), &teller).unwrap();
    std::fs::set_permissions(&closed, mode(0o700)).unwrap();
    let networks = HostNetworks::new(house.dir.path(), house.dir.path(), Some(teller.clone()));
    let def = complete(&home(), &networks).await;
    for start in [networks.can_start(&def).await, networks.start(&def, 7).await] {
        let why = start.unwrap_err().to_string();
        let words = ["'home'", "'dnsmasq'", teller.to_str().unwrap(), "Permission denied", "pass through the folders"];
        assert!(words.iter().all(|word| why.contains(word)), "{why}");
    }
    assert_eq!(there(), (false, false, false));

    // Without addresses to give there is nothing to be told; nor are any given later.
    let silent = format!("{}</ip></network>", home().split("<dhcp>").next().unwrap());
    let silent = complete(&silent, &networks).await;
    networks.start(&silent, 7).await.unwrap();
    let range = Change::read(Verb::AddLast, Section::DhcpRange, None, "<range start='10.77.0.50' end='10.77.0.60'/>");
    let more = silent.changed(&range.unwrap()).unwrap();
    let why = networks.change(&more).await.unwrap_err().to_string();
    assert!(why.contains("Permission denied"), "{why}");
    assert_eq!(networks.problems(&silent).await, Ok(Vec::new()), "it is as it was");
    std::fs::set_permissions(&closed, mode(0o711)).unwrap();
    networks.change(&more).await.unwrap();
    networks.stop(silent.uuid).await.unwrap();
    assert_eq!(there(), (false, false, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn all_modes_and_both_families_are_made_and_taken_away() {
    if !is_inside("network::tests::all_modes_and_both_families_are_made_and_taken_away") {
        return;
    }
    let house = House::new();
    let networks = house.networks();
    run("ip link add eth0 type veth peer name eth1");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/network");
    let (mut made, mut limited) = (0, 0);
    for file in std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()) {
        let text = std::fs::read_to_string(&file).unwrap();
        let Ok(mut def) = NetworkDef::parse(&text) else { continue };
        networks.complete(&mut def, &[]).await;
        if def.awaits_a_net() {
            def.take_net(networks.free_net(&[]).await.unwrap());
        }
        if !networks.check(&def).is_empty() || !def.mode().is_ours() {
            assert!(networks.start(&def, 7).await.is_err(), "{}", file.display());
            continue;
        }
        if text.contains("/srv/tftp") {
            std::fs::create_dir_all("/run/tftp").unwrap();
            def = NetworkDef::parse(&def.write().replace("/srv/tftp with blanks", "/run/tftp")).unwrap();
        }
        networks.start(&def, 7).await.unwrap_or_else(|why| panic!("{}: {why}", file.display()));
        made += 1;
        if let Some(limits) = &def.bandwidth {
            let held = [true, false].map(|to_guests| limit_of(def.bridge_name().unwrap(), to_guests).unwrap());
            let [said, held] =
                [Rate::both(Some(limits)), held].map(|rates| rates.map(|rate| rate.map(|rate| rate.average)));
            assert_eq!((held, said), (said, [Some(1000), None]), "{}", file.display());
            limited += 1;
        }
        networks.stop(def.uuid).await.unwrap();
        assert_eq!(there(), (false, false, false), "{}", file.display());
    }
    assert!(made > 15 && limited == 1, "{made}, {limited}");
    let outbound = "<network><name>out</name><bandwidth><outbound average='128'/></bandwidth><ip address='10.9.0.1' prefix='24'/></network>";
    let def = complete(outbound, &networks).await;
    match networks.start(&def, 7).await {
        Ok(()) => {
            let held = limit_of(def.bridge_name().unwrap(), false).unwrap();
            assert_eq!(held.map(|held| held.average), Some(128));
            networks.stop(def.uuid).await.unwrap();
        }
        // A kernel that cannot do it is told of, and nothing is left.
        Err(why) => assert!(why.to_string().contains("police rate 128kbps"), "{why}"),
    }
    assert_eq!(there(), (false, false, false));
}

/// Where that program is.
fn nft() -> &'static str {
    ["/usr/sbin/nft", "/usr/bin/nft", "/sbin/nft"].into_iter().find(|nft| Path::new(nft).exists()).unwrap()
}

/// Whether a process in here is told of all changes of nftables.
fn is_listened() -> bool {
    let sockets = std::fs::read_to_string("/proc/net/netlink").unwrap();
    sockets.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.get(1) == Some(&"12") && words.get(3) == Some(&"00000040")
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn problems_are_looked_for_when_others_change_rules_while_there_are_networks() {
    if !is_inside("network::tests::problems_are_looked_for_when_others_change_rules_while_there_are_networks") {
        return;
    }
    let house = House::new();
    let networks = house.networks();
    assert!(!is_listened());
    let first = complete(&home(), &networks).await;
    networks.start(&first, 7).await.unwrap();
    let second = complete(&home().replace(">home<", ">lab<").replace("10.77.0.", "10.78.0."), &networks).await;
    networks.start(&second, 7).await.unwrap();
    assert!(is_listened());
    let nft = nft();
    let tokens = async |networks: &HostNetworks, def: &NetworkDef| {
        let found = networks.problems(def).await.unwrap();
        found.iter().map(|problem| problem.token.as_str()).collect::<Vec<_>>()
    };
    let mut watched = Vec::new();
    for def in [&first, &second] {
        assert_eq!(tokens(&networks, def).await, [""; 0]);
        watched.push((def, networks.watch(def.uuid).await));
    }
    for (change, found) in [(DOCKER, vec!["forward-blocked"]), ("nft delete table ip docker", vec![])] {
        run(change);
        for (def, reports) in &mut watched {
            assert_eq!(told(reports).await, Some(NetworkReport::Changed), "{change}");
            assert_eq!(tokens(&networks, def).await, found, "{change}");
            // Who looks first lists them for all.
            run(&format!("mount --bind /bin/false {nft}"));
        }
        watched.iter().for_each(|_| _ = run(&format!("umount {nft}")));
    }
    assert_eq!(tokens(&networks, &first).await, [""; 0], "who is told nothing lists them");
    drop(watched);

    // Another virtd: what is changed after it has looked, and before anybody watches, is told.
    drop(networks);
    let networks = house.networks();
    assert_eq!(networks.find().await.len(), 2);
    assert_eq!(tokens(&networks, &first).await, [""; 0]);
    run(DOCKER);
    let mut reports = networks.watch(first.uuid).await;
    assert_eq!(told(&mut reports).await, Some(NetworkReport::Changed));
    assert_eq!(tokens(&networks, &first).await, ["forward-blocked"]);
    networks.stop(first.uuid).await.unwrap();
    assert_eq!(told(&mut reports).await, None);
    assert_eq!(told(&mut networks.watch(first.uuid).await).await, None, "it is not there");
    assert!(is_listened(), "there is one still");
    networks.stop(second.uuid).await.unwrap();
    // The kernel tells nobody that a socket is closed, which is soon.
    let closed = async {
        while is_listened() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), closed).await.expect("nobody listens for nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_rules_only_others_are_heard_and_what_is_lost_may_be_theirs() {
    if !is_inside("network::tests::of_rules_only_others_are_heard_and_what_is_lost_may_be_theirs") {
        return;
    }
    let (house, changes) = (House::new(), RuleChanges::listen().unwrap());
    // The kernel has told of a change before who made it goes on.
    let heard = || {
        let (mut room, mut others) = (vec![0; 64 << 10], false);
        loop {
            match changes.receive(&mut room) {
                Ok(theirs) => others |= theirs,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return others,
                Err(error) => panic!("{error}"),
            }
        }
    };
    let networks = house.networks();
    let def = complete(&home(), &networks).await;
    networks.start(&def, 7).await.unwrap();
    assert_eq!(networks.problems(&def).await, Ok(Vec::new()));
    networks.stop(def.uuid).await.unwrap();
    assert!(!heard(), "our own");
    for (line, theirs) in [
        ("nft add table ip ban", true),
        ("nft add set ip ban bad { type ipv4_addr ; }", false),
        ("nft add element ip ban bad { 192.0.2.1 }", false),
        ("nft add chain ip ban IN { type filter hook input priority 0 ; }", true),
        ("nft add rule ip ban IN ip saddr @bad drop", true),
        ("nft delete element ip ban bad { 192.0.2.1 }", false),
        ("nft flush chain ip ban IN", true),
        ("nft add table bridge ban", false),
        ("nft delete table ip ban", true),
    ] {
        run(line);
        assert_eq!(heard(), theirs, "{line}");
    }
    // More of our own than the kernel keeps for us: theirs may be among what is lost.
    let rules = "ip saddr 192.0.2.1 counter accept\n".repeat(5000);
    let file = house.dir.path().join("many.nft");
    std::fs::write(&file, format!("table inet virt_00 {{\nchain many {{\n{rules}}}\n}}\n")).unwrap();
    run(&format!("nft -f {}", file.display()));
    assert!(heard());

    // Whoever never comes to an end is not waited for.
    run("nft add table ip ban ; add chain ip ban IN");
    let goes_on = Arc::new(AtomicBool::new(true));
    let on = goes_on.clone();
    let other = std::thread::spawn(move || {
        while on.load(Ordering::Relaxed) {
            run("nft add rule ip ban IN accept");
        }
    });
    let settled = tokio::time::timeout(std::time::Duration::from_secs(60), changes.settled()).await;
    goes_on.store(false, Ordering::Relaxed);
    other.join().unwrap();
    settled.expect("in time").unwrap();
}
