//! What dnsmasq is told: the addresses and names of one network, served on its bridge alone. Every text of a definition that
//! stands here was held to plain characters when it was read (`model/network/checks.rs`).

use super::own::RESOLVER;
use std::fmt::Write as _;
use std::io;
use std::path::Path;
use virt_model::network::NetworkDef;
use virt_model::network::address::{Net, number};
use virt_model::network::forward::Mode;
use virt_model::network::ip::{Dhcp, DhcpHost, DhcpRange, LeaseTime, NetworkIp};

/// The files of one network's server, all in one folder but the leases, which outlive the host's boot.
pub struct Files<'a> {
    /// The folder.
    pub folder: &'a Path,
    /// Who has which address.
    pub leases: &'a Path,
    /// What is run when an address is given.
    pub teller: Option<&'a Path>,
}

/// Its configuration, the reservations, and the names of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// For a start.
    pub config: String,
    /// Read again when it is told to.
    pub reservations: String,
    /// The same.
    pub names: String,
}

/// By whose rights it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Root's at first, and then those of a user of its own.
    Host,
    /// Those of the user whose network it is.
    Own,
}

/// The user that it runs as once it listens, where it is root's.
pub const USER: &str = "dnsmasq";
/// dnsmasq's own bound where no range says how many.
const USUAL_LEASES: u128 = 1000;
/// Of IPv6, a range may have more addresses than there are numbers for them.
const MOST_LEASES: u128 = 1 << 16;

/// dnsmasq takes what follows 1024 bytes of a line for a line of its own.
const LONGEST_LINE: usize = 1000;

impl Served {
    /// Nothing is written that dnsmasq would read as other lines than these: each was held to its length when it was read, and
    /// this holds of whatever comes to stand there later.
    pub fn is_read_as_written(&self) -> io::Result<()> {
        let lines = self.config.lines().chain(self.reservations.lines());
        match lines.map(str::len).max() {
            Some(longest) if longest > LONGEST_LINE => Err(io::Error::other(format!(
                "dnsmasq would be told a line of {longest} bytes, more than {LONGEST_LINE}"
            ))),
            _ => Ok(()),
        }
    }
}

/// What a network's server is told; nothing if it has nothing to serve.
pub fn served(def: &NetworkDef, bridge: &str, files: &Files<'_>, rights: Rights) -> Option<Served> {
    let advertises = def.ips.iter().any(|ip| ip.is_v6() && ip.address.is_some());
    let boots = def.ips.iter().any(|ip| ip.tftp.is_some());
    if !def.mode().is_ours() || !(def.has_dns() || def.has_dhcp() || advertises || boots) {
        return None;
    }
    let at = |name: &str| files.folder.join(name).display().to_string();
    let mut config = format!("# Made by virtd for the network '{}'.\n", plain(&def.name));
    let _ = writeln!(
        config,
        "pid-file={}\n{}except-interface=lo\nbind-dynamic\ninterface={bridge}\nstrict-order\n\
         dhcp-leasefile={}\ndhcp-hostsfile={}\naddn-hosts={}",
        at("pid"),
        if rights == Rights::Host { format!("user={USER}\n") } else { String::new() },
        files.leases.display(),
        at("reservations"),
        at("names"),
    );
    names(def, rights, &mut config);
    addresses(def, files, rights, &mut config);
    let hosts = def.ips.iter().filter_map(|ip| Some((ip, ip.dhcp.as_ref()?)));
    let reservations = hosts.flat_map(|(ip, dhcp)| dhcp.hosts.iter().map(move |host| reservation(host, ip.is_v6())));
    let named = def.dns.iter().flat_map(|dns| &dns.hosts);
    let named = named.filter_map(|host| Some(format!("{} {}\n", host.ip?, host.names.join(" "))));
    Some(Served { config, reservations: reservations.collect(), names: named.collect() })
}

/// So many addresses are given at most.
pub fn most_leases(def: &NetworkDef) -> usize {
    let of_range = |range: &DhcpRange| number(range.end.0).saturating_sub(number(range.start.0)).saturating_add(1);
    let of = |dhcp: &Dhcp| dhcp.ranges.iter().map(of_range).fold(dhcp.hosts.len() as u128, u128::saturating_add);
    let served = def.ips.iter().filter(|ip| ip.address.is_some()).filter_map(NetworkIp::served);
    let most = served.map(of).fold(0, u128::saturating_add);
    most.clamp(USUAL_LEASES, MOST_LEASES) as usize
}

/// A text on a line of its own, for people.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).collect()
}

/// A text in quotation marks, as dnsmasq reads them.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn names(def: &NetworkDef, rights: Rights, config: &mut String) {
    let mut line = |text: String| config.push_str(&(text + "\n"));
    if !def.has_dns() {
        line("port=0".to_owned());
    }
    if let Some(domain) = &def.domain {
        line(format!("domain={}\nexpand-hosts", domain.name));
        if domain.local_only == Some(true) {
            line(format!("local=/{}/", domain.name));
        }
    }
    let dns = def.dns.clone().unwrap_or_default();
    line("domain-needed".to_owned());
    if dns.forward_plain_names == Some(false) {
        line("local=//".to_owned());
    }
    // Who is isolated asks nobody outside, and who names its own servers no others.
    if def.mode() == Mode::Isolated || dns.forwarders.iter().any(|forwarder| forwarder.domain.is_none()) {
        line("no-resolv".to_owned());
    } else if rights == Rights::Own {
        // The host's resolver may listen to the host alone, which is elsewhere.
        line(format!("no-resolv\nserver={RESOLVER}"));
    }
    for forwarder in &dns.forwarders {
        let domain = forwarder.domain.as_ref().map_or(String::new(), |domain| format!("/{domain}/"));
        let address = forwarder.addr.map_or("#".to_owned(), |addr| addr.to_string());
        let port = forwarder.port.map_or(String::new(), |port| format!("#{port}"));
        line(format!("server={domain}{address}{port}"));
    }
    for txt in &dns.txts {
        let value = txt.value.as_ref().map_or(String::new(), |value| format!(",{}", quoted(value)));
        line(format!("txt-record={}{value}", txt.name));
    }
    for srv in &dns.srvs {
        let domain = srv.domain.as_ref().map_or(String::new(), |domain| format!(".{domain}"));
        let target = srv.target.as_ref().filter(|target| *target != ".").map_or(String::new(), |target| {
            let (port, priority, weight) = (srv.port.unwrap_or(1), srv.priority, srv.weight);
            format!(",{target},{port},{},{}", priority.unwrap_or(0), weight.unwrap_or(0))
        });
        line(format!("srv-host=_{}._{}{domain}{target}", srv.service, srv.protocol));
    }
    for ip in def.ips.iter().filter(|ip| ip.local_ptr == Some(true)) {
        ip.net().iter().for_each(|net| line(format!("local=/{}/", backwards(net))));
    }
}

/// The domain in which names of a net's addresses are looked up.
fn backwards(net: &Net) -> String {
    let (width, digit, end) = if net.first.is_ipv4() { (32, 8, "in-addr.arpa") } else { (128, 4, "ip6.arpa") };
    let number = number(net.first);
    let digits = (0..net.prefix / digit).rev().map(|n| {
        let value = number >> (width - digit * (n + 1)) & ((1 << digit) - 1);
        if digit == 8 { value.to_string() } else { format!("{value:x}") }
    });
    digits.chain([end.to_owned()]).collect::<Vec<_>>().join(".")
}

fn addresses(def: &NetworkDef, files: &Files<'_>, rights: Rights, config: &mut String) {
    let mut line = |text: String| config.push_str(&(text + "\n"));
    for ip in &def.ips {
        let (Some(address), Some(net)) = (ip.address, ip.net()) else { continue };
        let mask = if ip.is_v6() { net.prefix.to_string() } else { net.netmask().to_string() };
        match ip.served() {
            Some(dhcp) => {
                for range in &dhcp.ranges {
                    line(format!(
                        "dhcp-range={},{},{mask}{}",
                        range.start.0,
                        range.end.0,
                        lasting(range.lease.as_ref())
                    ));
                }
                if dhcp.ranges.is_empty() {
                    line(format!("dhcp-range={},static{}", net.first, if ip.is_v6() { ",64" } else { "" }));
                }
            }
            None if ip.is_v6() => line(format!("dhcp-range={address},ra-only")),
            None => {}
        }
        boot(ip, &mut line);
    }
    if def.ips.iter().any(NetworkIp::is_v6) {
        line("enable-ra".to_owned());
    }
    if def.has_dhcp() {
        line(format!("dhcp-no-override\ndhcp-authoritative\ndhcp-lease-max={}", most_leases(def)));
        if let Some(teller) = files.teller {
            line(format!("dhcp-script={}", teller.display()));
            if rights == Rights::Host {
                line(format!("dhcp-scriptuser={USER}"));
            }
        }
        // Nothing is to be reached through the host.
        if def.mode() == Mode::Isolated {
            line("dhcp-option=3".to_owned());
        }
        def.mtu.iter().for_each(|mtu| line(format!("dhcp-option=option:mtu,{}", mtu.size)));
    }
}

fn boot(ip: &NetworkIp, line: &mut impl FnMut(String)) {
    if let Some(tftp) = &ip.tftp {
        line(format!("enable-tftp\ntftp-root={}", quoted(&tftp.root)));
    }
    if let Some(bootp) = ip.dhcp.as_ref().and_then(|dhcp| dhcp.bootp.as_ref()) {
        let server = bootp.server.as_ref().map_or(String::new(), |server| format!(",,{server}"));
        line(format!("dhcp-boot={}{server}", bootp.file));
    }
}

fn lasting(lease: Option<&LeaseTime>) -> String {
    lease.map_or(String::new(), |lease| match lease.seconds() {
        0 => ",infinite".to_owned(),
        seconds => format!(",{seconds}"),
    })
}

/// One line of the file of reservations.
fn reservation(host: &DhcpHost, six: bool) -> String {
    let mac = host.mac.map(|mac| mac.to_string());
    let id = host.id.as_ref().map(|id| format!("id:{id}"));
    let address = host.ip.map(|ip| if six { format!("[{ip}]") } else { ip.to_string() });
    let lease = lasting(host.lease.as_ref());
    let words: Vec<String> = [mac, id, host.name.clone(), address].into_iter().flatten().collect();
    format!("{}{lease}\n", words.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> Option<Served> {
        let def = NetworkDef::parse(&format!("<network><name>n</name>{text}</network>")).unwrap();
        let (folder, leases) = (Path::new("/run/x"), Path::new("/var/x.leases"));
        served(&def, "virbr7", &Files { folder, leases, teller: Some(Path::new("/usr/sbin/virtd")) }, Rights::Host)
    }

    #[test]
    fn who_serves_as_the_user_changes_to_nobody_and_asks_the_uplink() {
        let told = |text: &str| {
            let def = NetworkDef::parse(&format!("<network><name>n</name>{text}</network>")).unwrap();
            let (folder, leases) = (Path::new("/run/x"), Path::new("/var/x.leases"));
            let files = Files { folder, leases, teller: Some(Path::new("/usr/bin/virtd")) };
            served(&def, "virbr7", &files, Rights::Own).unwrap().config
        };
        let dhcp = "<ip address='10.0.0.1' prefix='24'><dhcp><range start='10.0.0.9' end='10.0.0.9'/></dhcp></ip>";
        let nat = told(&format!("<forward/>{dhcp}"));
        assert!(!nat.contains("user=") && nat.contains("\ndhcp-script=/usr/bin/virtd\n"), "{nat}");
        assert!(nat.contains("\nno-resolv\nserver=169.254.1.53\n"), "{nat}");
        let isolated = told(dhcp);
        assert!(isolated.contains("\nno-resolv\n") && !isolated.contains("server="), "{isolated}");
        let own = told(&format!("<forward/><dns><forwarder addr='10.9.9.9'/></dns>{dhcp}"));
        assert!(own.contains("\nserver=10.9.9.9\n") && !own.contains("169.254"), "{own}");
    }

    #[test]
    fn who_has_nothing_to_serve_has_no_server() {
        for nothing in [
            "",
            "<forward mode='bridge'/><bridge name='br0'/>",
            "<dns enable='no'/><ip address='10.0.0.1' prefix='24'/>",
        ] {
            assert_eq!(told(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn what_would_be_read_as_another_line_is_not_written() {
        let boot = |file: &str| {
            let text = format!(
                "<ip address='10.0.0.1' prefix='24'><dhcp><range start='10.0.0.9' end='10.0.0.9'/><bootp file='{file}'/>\
                 </dhcp></ip>"
            );
            NetworkDef::parse(&format!("<network><name>n</name>{text}</network>")).map(|_| told(&text).unwrap())
        };
        let longest = boot(&"A".repeat(127)).unwrap();
        longest.is_read_as_written().unwrap();
        assert!(longest.config.contains(&format!("\ndhcp-boot={}\n", "A".repeat(127))));
        boot(&"A".repeat(128)).unwrap_err();
        boot(&format!("{}conf-script=/home/eve/x", "A".repeat(1014))).unwrap_err();
        for line in ["x".repeat(1000), "x".repeat(1001)] {
            let is_short = line.len() == 1000;
            let config = Served { config: line.clone(), ..longest.clone() };
            let reservations = Served { reservations: line, ..longest.clone() };
            assert!(
                [config, reservations].iter().all(|one| one.is_read_as_written().is_ok() == is_short),
                "{is_short}"
            );
        }
    }

    #[test]
    fn everything_that_is_said_is_told() {
        let text = include_str!("../../tests/data/network/names.xml");
        let body = &text[text.find("<forward").unwrap()..text.rfind("</network>").unwrap()];
        let config = told(body).unwrap();
        for line in [
            "interface=virbr7",
            "domain=example.com",
            "local=/example.com/",
            "local=//",
            "no-resolv",
            "server=8.8.8.8",
            "server=/corp.example.com/10.9.0.53#5353",
            "server=/nowhere.example.com/#",
            r#"txt-record=example,"it says \"this\", and \\that""#,
            "srv-host=_ldap._tcp.example.com,ldap.example.com,389,10,20",
            "srv-host=_none._udp",
            "local=/126.168.192.in-addr.arpa/",
        ] {
            assert!(config.config.lines().any(|one| one == line), "{line}: {}", config.config);
        }
        assert_eq!(config.names, "192.168.126.2 myhost myhostalias\n2001:db8::7 six\n");
    }

    #[test]
    fn addresses_are_given_as_is_said() {
        let hosts = include_str!("../../tests/data/network/dhcp-reservations.xml");
        let served = told(&hosts[hosts.find("<forward").unwrap()..hosts.rfind("</network>").unwrap()]).unwrap();
        assert!(
            served.config.contains("dhcp-range=192.168.124.128,192.168.124.254,255.255.255.0,3600\n"),
            "{}",
            served.config
        );
        assert!(served.config.contains("dhcp-script=/usr/sbin/virtd\ndhcp-scriptuser=dnsmasq\n"));
        assert_eq!(
            served.reservations,
            "00:16:3e:77:e2:ed,foo.example.com,192.168.124.10,1800\n00:16:3e:3e:a9:1a,bar.example.com,192.168.124.11\n\
             later,192.168.124.12\n"
        );
        let six = "<ip family='ipv6' address='fd00:1::1' prefix='64' localPtr='yes'><dhcp>\
            <host id='0:1' name='a' ip='fd00:1::5'/></dhcp></ip>";
        let served = told(six).unwrap();
        assert_eq!(served.reservations, "id:0:1,a,[fd00:1::5]\n");
        for line in [
            "dhcp-range=fd00:1::,static,64",
            "enable-ra",
            "no-resolv",
            "dhcp-option=3",
            "local=/0.0.0.0.0.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa/",
        ] {
            assert!(served.config.lines().any(|one| one == line), "{line}: {}", served.config);
        }
        let all = "<ip family='ipv6' address='fd00::1' prefix='0'><dhcp>\
            <range start='::' end='ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff'/><host id='0:1' name='a'/></dhcp></ip>";
        assert!(told(all).unwrap().config.contains("\ndhcp-lease-max=65536\n"), "there is no number for so many");
        let ra = told("<forward mode='open'/><ip family='ipv6' address='fd00:1::1' prefix='64'/>").unwrap().config;
        assert!(ra.contains("dhcp-range=fd00:1::1,ra-only\n") && !ra.contains("no-resolv"), "{ra}");
    }
}
