//! The host's device of a network, its addresses and routes; and what the host has of these that is not ours. All by iproute2.

use super::inside::Card;
use crate::host::net_tool::output_within;
use crate::host::tap::{Rate, TapPlan, change_limit, plug_again};
use serde_json::Value;
use std::fs;
use std::io;
use std::net::IpAddr;
use virt_model::network::NetworkDef;
use virt_model::network::address::Net;
use virt_model::network::forward::Mode;

/// A route of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRoute {
    /// What it leads to.
    pub net: Net,
    /// By which device.
    pub dev: String,
    /// It was learnt of a router, who may stop to be heard.
    pub learnt: bool,
}

/// Runs ip.
pub fn ip(args: &[&str]) -> io::Result<Vec<u8>> {
    output_within("ip", args, &[])
}

fn json(args: &[&str]) -> io::Result<Vec<Value>> {
    let said = ip(&[&["-json"], args].concat())?;
    if said.iter().all(u8::is_ascii_whitespace) { Ok(Vec::new()) } else { Ok(serde_json::from_slice(&said)?) }
}

/// The hardware address of the device of that name, if there is one.
pub fn card(name: &str) -> io::Result<Option<String>> {
    let all = json(&["link", "show"])?;
    let found = all.iter().find(|link| link["ifname"] == name);
    Ok(found.map(|link| link["address"].as_str().unwrap_or_default().to_owned()))
}

/// The names of all devices.
pub fn names() -> io::Result<Vec<String>> {
    let all = json(&["link", "show"])?;
    Ok(all.iter().filter_map(|link| Some(link["ifname"].as_str()?.to_owned())).collect())
}

/// Whether the device of that name is a bridge.
pub fn is_bridge(name: &str) -> io::Result<bool> {
    Ok(json(&["link", "show", "type", "bridge"])?.iter().any(|link| link["ifname"] == name))
}

/// Whether there are ends of guests' cards.
pub fn has_taps() -> io::Result<bool> {
    Ok(!json(&["link", "show", "type", "tun"])?.is_empty())
}

/// All routes of the host's but the one to everywhere.
pub fn routes() -> io::Result<Vec<HostRoute>> {
    let (four, six) = (json(&["-4", "route", "show"])?, json(&["-6", "route", "show"])?);
    Ok(four.iter().chain(&six).filter_map(read_route).collect())
}

fn read_route(told: &Value) -> Option<HostRoute> {
    let net = match told["dst"].as_str()? {
        "default" => "0.0.0.0/0",
        net => net,
    };
    let net: Net = net.parse().ok()?;
    let dev = told["dev"].as_str().unwrap_or("several devices").to_owned();
    let link_local = net.overlaps(&Net { first: IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 0]), prefix: 10 });
    (!link_local).then(|| HostRoute { net, dev, learnt: told["protocol"] == "ra" })
}

/// Makes the bridge and all that belongs to it. On failure something may be left: it is to be removed.
pub fn make(def: &NetworkDef, name: &str) -> io::Result<()> {
    let mac = def.mac.as_ref().map(|mac| mac.address.to_string());
    let mut add = vec!["link", "add", "name", name];
    // By this it is known again: it is there from the first moment.
    mac.iter().for_each(|mac| add.extend(["address", mac]));
    let mtu = def.mtu.as_ref().map(|mtu| mtu.size.to_string());
    mtu.iter().for_each(|mtu| add.extend(["mtu", mtu]));
    let bridge = def.bridge.clone().unwrap_or_default();
    let stp = if bridge.stp == Some(false) { "0" } else { "1" };
    // The kernel wants two seconds at least where it looks for loops; without a delay it looks for them all the same.
    let delay = (u64::from(bridge.delay.unwrap_or(0)) * 100).to_string();
    add.extend(["type", "bridge", "forward_delay", &delay, "stp_state", "0"]);
    ip(&add).map_err(explain)?;
    if stp == "1" {
        ip(&["link", "set", "dev", name, "type", "bridge", "stp_state", stp])?;
    }
    settle(def, name)?;
    for (rate, to_guests) in Rate::both(def.bandwidth.as_ref()).into_iter().zip([true, false]) {
        // What is on its way to guests leaves the host by the bridge.
        change_limit(name, rate, to_guests)?;
    }
    for (address, net) in def.addresses() {
        let text = format!("{address}/{}", net.prefix);
        // Nobody else is in it yet: there is nothing to be waited for.
        let six: &[&str] = if address.is_ipv6() { &["nodad"] } else { &["broadcast", "+"] };
        ip(&[&["address", "add", &text, "dev", name], six].concat())?;
    }
    ip(&["link", "set", "dev", name, "up"])?;
    for route in &def.routes {
        let (net, gateway, metric) =
            (route.net().to_string(), route.gateway.0.to_string(), route.metric.unwrap_or(1).to_string());
        ip(&["route", "add", &net, "via", &gateway, "dev", name, "proto", "static", "metric", &metric])?;
    }
    Ok(())
}

/// The host listens to no router in a network of its own, and has no address of IPv6 there but those that are said.
fn settle(def: &NetworkDef, name: &str) -> io::Result<()> {
    let folder = format!("/proc/sys/net/ipv6/conf/{name}");
    let six = def.ips.iter().any(|ip| ip.is_v6() && ip.address.is_some());
    let all = [("accept_ra", "0"), ("autoconf", "0"), ("disable_ipv6", if six { "0" } else { "1" })];
    for (file, value) in all {
        match fs::write(format!("{folder}/{file}"), value) {
            // A host without IPv6 has nothing to be switched off.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !six => {}
            done => done.map_err(|error| io::Error::new(error.kind(), format!("{folder}/{file}: {error}")))?,
        }
    }
    Ok(())
}

/// Removes the bridge, if it is the one that was made, and not another of that name. Ports go out of it and stay.
pub fn remove(def: &NetworkDef, name: &str) -> io::Result<()> {
    let own = def.mac.as_ref().map(|mac| mac.address.to_string());
    match card(name)? {
        Some(there) if Some(&there) == own.as_ref() && is_bridge(name)? => ip(&["link", "del", "dev", name]).map(drop),
        _ => Ok(()),
    }
}

/// Plugs cards of guests that are in no bridge into this one, or in this one and down.
pub fn plug(def: &NetworkDef, cards: &[Card]) {
    let Some(bridge) = def.bridge_name() else { return };
    let all = match json(&["link", "show"]) {
        Ok(all) => all,
        Err(why) => return tracing::warn!(network = %def.name, %why, "guests are not plugged in again"),
    };
    // One that is in it and down was being plugged in when virtd was killed, and is not held to all it is to be held to.
    let is_up = |link: &Value| link["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "UP"));
    let is_out = |card: &&Card| {
        let link = all.iter().find(|link| link["ifname"] == *card.end);
        link.is_some_and(|link| link["master"].is_null() || link["master"] == bridge && !is_up(link))
    };
    for card in cards.iter().filter(is_out) {
        let plan = TapPlan {
            bridge: Some(bridge.to_owned()),
            isolated: card.isolated,
            vlans: card.vlans.clone(),
            ..TapPlan::default()
        };
        if let Err(why) = plug_again(&card.end, &plan) {
            tracing::warn!(network = %def.name, card = card.end, %why, "a guest is not plugged in again");
        }
    }
}

/// Has the host pass packets on. That is left as it is afterwards: others may have come to need it.
pub fn forward(def: &NetworkDef) -> io::Result<()> {
    if !matches!(def.mode(), Mode::Nat | Mode::Route | Mode::Open) {
        return Ok(());
    }
    let on = |file: &str| {
        if fs::read_to_string(file).is_ok_and(|said| said.trim() == "1") {
            return Ok(());
        }
        fs::write(file, "1").map_err(|error| io::Error::new(error.kind(), format!("{file}: {error}")))
    };
    let has = |six: bool| def.addresses().iter().any(|(address, _)| address.is_ipv6() == six);
    if has(false) {
        on("/proc/sys/net/ipv4/ip_forward")?;
    }
    if has(true) { on("/proc/sys/net/ipv6/conf/all/forwarding") } else { Ok(()) }
}

/// A device by which the host would lose its way out if it passed packets of IPv6 on: whoever does that listens to no router.
pub fn would_lose_router(routes: &[HostRoute]) -> Option<&str> {
    let said = |file: &str| fs::read_to_string(file).unwrap_or_default().trim().to_owned();
    let deaf = |dev: &str| said(&format!("/proc/sys/net/ipv6/conf/{dev}/accept_ra")) != "2";
    let on = said("/proc/sys/net/ipv6/conf/all/forwarding") == "1";
    routes.iter().find(|route| !on && route.learnt && deaf(&route.dev)).map(|route| route.dev.as_str())
}

fn explain(error: io::Error) -> io::Error {
    let text = error.to_string();
    let unknown = ["Operation not supported", "Unknown device type"].iter().any(|words| text.contains(words));
    if unknown { io::Error::other("this host's kernel has no bridges (modprobe bridge)") } else { error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_as_ip_tells_them() {
        let told = serde_json::json!([
            {"dst": "default", "gateway": "10.0.0.1", "dev": "eth0"},
            {"dst": "192.168.122.0/24", "dev": "virbr9", "protocol": "kernel"},
            {"dst": "10.9.9.9", "dev": "tun0"},
            {"dst": "fe80::/64", "dev": "eth0"},
            {"dst": "2001:db8::/64", "dev": "eth0", "protocol": "ra"},
            {"dst": "nonsense"}
        ]);
        let read: Vec<_> = told.as_array().unwrap().iter().filter_map(read_route).collect();
        let shown: Vec<_> = read.iter().map(|route| format!("{} {} {}", route.net, route.dev, route.learnt)).collect();
        assert_eq!(
            shown,
            [
                "0.0.0.0/0 eth0 false",
                "192.168.122.0/24 virbr9 false",
                "10.9.9.9/32 tun0 false",
                "2001:db8::/64 eth0 true"
            ]
        );
    }
}
