//! What may pass the host's end of a guest's card: the filters that libvirt ships, each as two chains of nftables at the bridge, of
//! what comes from the guest and of what goes to it, in a table of the device's own.
//!
//! The table is made before the device is in a bridge. The kernel knows the device by its number, which no other one gets: what
//! is left of a device that has gone filters nobody, and [`sweep`] takes it away.

use super::net_tool::{number_of, output_within};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use virt_model::device::filter::{FilterName, FilterRef, FilterVariable};
use virt_model::domain::value::Mac;

/// What tables of devices are called, before the device's number.
const PREFIX: &str = "virt_tap_";

/// What passes a device: rules as nft reads them, in their order. What none decides on passes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterPlan {
    from_guest: Vec<String>,
    to_guest: Vec<String>,
}

impl FilterPlan {
    /// The rules of a filter, for a card with that hardware address.
    pub fn of(filter: &FilterRef, mac: Mac) -> FilterPlan {
        let mut plan = FilterPlan::default();
        let said = filter.macs(FilterVariable::Mac);
        let macs = if said.is_empty() { vec![mac] } else { said };
        let of = Operands {
            mac: macs.first().copied().unwrap_or(mac),
            macs: set(&macs),
            ips: set(&filter.addresses::<Ipv4Addr>(FilterVariable::Ip)),
            ip6s: set(&filter.addresses::<Ipv6Addr>(FilterVariable::Ipv6)),
            dhcp_servers: set(&filter.addresses::<IpAddr>(FilterVariable::DhcpServer)),
            gateways: set(&filter.macs(FilterVariable::GatewayMac)),
        };
        plan.add(filter.name, &of);
        plan
    }

    fn from(&mut self, rule: impl Into<String>) {
        self.from_guest.push(rule.into());
    }

    fn to(&mut self, rule: impl Into<String>) {
        self.to_guest.push(rule.into());
    }

    fn both(&mut self, rule: &str) {
        self.from(rule);
        self.to(rule);
    }

    fn all(&mut self, filters: &[FilterName], of: &Operands) {
        filters.iter().for_each(|filter| self.add(*filter, of));
    }

    /// Adds what a filter says, in the order in which libvirt has it looked at.
    fn add(&mut self, filter: FilterName, of: &Operands) {
        use FilterName as F;
        let Operands { mac, macs, ips, ip6s, dhcp_servers, gateways } = of;
        match filter {
            F::CleanTraffic => {
                self.all(&[F::NoMacSpoofing, F::NoIpSpoofing], of);
                self.from("ether type ip accept");
                self.all(&[F::AllowIncomingIpv4, F::NoArpSpoofing, F::AllowArp, F::QemuAnnounceSelf], of);
                self.add(F::NoOtherL2Traffic, of);
            }
            F::CleanTrafficGateway => {
                self.all(&[F::NoMacSpoofing, F::NoIpSpoofing, F::NoArpSpoofing, F::AllowArp], of);
                self.add(F::QemuAnnounceSelfRarp, of);
                self.to(format!("ether saddr {gateways} accept"));
                self.from(format!("ether daddr {gateways} accept"));
                self.add(F::NoOtherL2Traffic, of);
            }
            F::NoMacSpoofing => self.from(format!("ether saddr != {macs} drop")),
            F::NoIpSpoofing => {
                // Who has no address yet asks for one.
                self.from("ether type ip ip saddr 0.0.0.0 ip protocol != udp drop");
                self.from(format!("ether type ip ip saddr != 0.0.0.0 ip saddr != {ips} drop"));
            }
            F::NoArpSpoofing => self.all(&[F::NoArpMacSpoofing, F::NoArpIpSpoofing], of),
            F::NoArpMacSpoofing => self.from(format!("ether type arp arp saddr ether != {macs} drop")),
            F::NoArpIpSpoofing => self.from(format!("ether type arp arp saddr ip != {ips} drop")),
            F::NoMacBroadcast => self.from("ether type ip ether daddr ff:ff:ff:ff:ff:ff drop"),
            F::NoIpMulticast => self.from("ether type ip ip daddr 224.0.0.0/4 drop"),
            F::NoOtherL2Traffic => self.both("drop"),
            F::NoOtherRarpTraffic => self.both(&format!("ether type {RARP} drop")),
            F::AllowArp => self.both("ether type arp accept"),
            F::AllowIpv4 => self.both("ether type ip accept"),
            F::AllowIncomingIpv4 => self.to("ether type ip accept"),
            F::AllowDhcp | F::AllowDhcpServer => {
                let asked = "ether type ip ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept";
                self.from(asked);
                let server = if filter == F::AllowDhcp { String::new() } else { format!("ip saddr {dhcp_servers} ") };
                self.to(format!("ether type ip {server}udp sport 67 udp dport 68 accept"));
            }
            F::NoIpv6Spoofing => {
                // Who has no address of the network's yet asks for one by that of the link.
                self.from(format!("ether type ip6 ip6 saddr != fe80::/10 ip6 saddr != {ip6s} drop"));
                let asks = "ether type ip6 ip6 saddr fe80::/10 meta l4proto != udp";
                self.from(format!("{asks} ip6 saddr != {ip6s} drop"));
            }
            F::NoIpv6Multicast => self.from("ether type ip6 ip6 daddr ff00::/8 drop"),
            F::AllowIpv6 => self.both("ether type ip6 accept"),
            F::AllowIncomingIpv6 => self.to("ether type ip6 accept"),
            F::AllowDhcpv6 | F::AllowDhcpv6Server => {
                let asked = "ip6 saddr fe80::/10 ip6 daddr ff02::1:2 udp sport 546 udp dport 547";
                self.from(format!("ether type ip6 {asked} accept"));
                let server =
                    if filter == F::AllowDhcpv6 { String::new() } else { format!("ip6 saddr {dhcp_servers} ") };
                self.to(format!("ether type ip6 {server}udp sport 547 udp dport 546 accept"));
            }
            F::QemuAnnounceSelf => {
                // What an old QEMU sends in place of RARP.
                self.from("ether type 0x0835 accept");
                self.all(&[F::QemuAnnounceSelfRarp, F::NoOtherRarpTraffic], of);
            }
            F::QemuAnnounceSelfRarp => {
                let announced = announcement(*mac);
                self.from(format!("ether saddr {macs} {announced} accept"));
                self.to(format!("{announced} accept"));
            }
        }
    }

    /// What nft is told, all or nothing, to have exactly this for the device of that number.
    fn script(&self, number: u32) -> String {
        let table = format!("bridge {PREFIX}{number}");
        // To remove what may not be there is an error, so it is made first.
        let mut lines =
            vec![format!("add table {table}"), format!("delete table {table}"), format!("add table {table}")];
        // Before anybody else's look, and after.
        let hooks = [("from_guest", "iif", "prerouting", -350), ("to_guest", "oif", "postrouting", 350)];
        for ((chain, key, hook, priority), rules) in hooks.into_iter().zip([&self.from_guest, &self.to_guest]) {
            let at = format!("type filter hook {hook} priority {priority} ; policy accept ;");
            lines.push(format!("add chain {table} {chain} {{ {at} }}"));
            lines.push(format!("add rule {table} {chain} {key} != {number} accept"));
            lines.extend(rules.iter().map(|rule| format!("add rule {table} {chain} {rule}")));
        }
        lines.join(" ; ")
    }

    /// Has the kernel hold the device of that number to it. Blocks.
    pub fn put(&self, number: u32) -> io::Result<()> {
        let script = self.script(number);
        output_within("nft", &[&script], &[]).map(drop).map_err(|error| {
            // Its own words begin behind what it was told, and the first line of them is what people need.
            let text = error.to_string();
            let words = text.rsplit_once(&*script).map_or(&*text, |(_, words)| words.trim_start_matches(": "));
            let why = words.lines().next().unwrap_or_default();
            io::Error::other(format!("nft does not take its filter, which needs chains at bridges: {why}"))
        })
    }
}

/// The protocol by which a card tells where it is now.
const RARP: &str = "0x8035";

/// What a filter's rules speak of, as nft reads it.
struct Operands {
    mac: Mac,
    macs: String,
    ips: String,
    ip6s: String,
    dhcp_servers: String,
    gateways: String,
}

fn set(values: &[impl ToString]) -> String {
    format!("{{ {} }}", values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
}

/// To all, by RARP: a question for the address of who asks, who has none. nft has no words for RARP: where its parts are is said in bits.
fn announcement(mac: Mac) -> String {
    let number = mac.0.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    let (question, nobody) = ("@nh,48,16 3", "@nh,112,32 0 @nh,192,32 0");
    format!(
        "ether type {RARP} ether daddr ff:ff:ff:ff:ff:ff {question} {nobody} @nh,64,48 {number:#x} @nh,144,48 {number:#x}"
    )
}

/// Has the kernel hold a device that is there to that filter in the place of the one that it may have, or to none: in one step, before
/// and after which one of the two counts for each frame. On error it is as it was. Blocks.
pub fn change(device: &str, plan: Option<&FilterPlan>) -> io::Result<()> {
    let number = number_of(device)?;
    match plan {
        Some(plan) => plan.put(number),
        None => remove(number),
    }
}

/// Takes away what the device of that number is held to, if it is; another may do the same meanwhile.
fn remove(number: impl std::fmt::Display) -> io::Result<()> {
    let table = format!("bridge {PREFIX}{number}");
    output_within("nft", &[&format!("add table {table} ; delete table {table}")], &[]).map(drop)
}

/// Takes away what is left of devices that have gone. Blocks.
pub fn sweep() -> io::Result<()> {
    // Before the devices: a table that comes after this is left alone, and the device of any other was there before it.
    let tables: serde_json::Value =
        serde_json::from_slice(&output_within("nft", &["-j", "list", "tables", "bridge"], &[])?)?;
    let links: serde_json::Value = serde_json::from_slice(&output_within("ip", &["-json", "link", "show"], &[])?)?;
    let there: BTreeSet<u64> =
        links.as_array().into_iter().flatten().filter_map(|link| link["ifindex"].as_u64()).collect();
    let all = tables["nftables"].as_array().into_iter().flatten();
    let ours = all.filter_map(|object| object["table"]["name"].as_str()?.strip_prefix(PREFIX)?.parse::<u64>().ok());
    ours.filter(|number| !there.contains(number)).try_for_each(remove)
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
