//! What the kernel does with a network's packets: one table of nftables for each, replaced in one step. No other table is read or
//! written.

use serde_json::{Value, json};
use virt_model::network::NetworkDef;
use virt_model::network::address::Net;
use virt_model::network::forward::{Forward, Mode};

/// What the tables of all networks are called.
const PREFIX: &str = "virt_";

/// The table of that network.
pub fn table_name(uuid: uuid::Uuid) -> String {
    format!("{PREFIX}{}", uuid.simple())
}

/// Whether that table is a network's.
pub fn is_ours(family: &str, table: &str) -> bool {
    family == "inet" && table.starts_with(PREFIX)
}

/// What replaces the table, whether it is there or not, as `nft -j -f` reads it. Nothing where the kernel has nothing to do.
pub fn replacing(def: &NetworkDef, bridge: &str) -> Option<Value> {
    let table = table_name(def.uuid);
    let mut all = removing_words(&table);
    let rules = rules(def, bridge);
    if rules.is_empty() {
        return None;
    }
    all.push(json!({"add": {"table": {"family": "inet", "name": table}}}));
    let chain = |name: &str, kind: &str, hook: &str, priority: i32| {
        json!({"add": {"chain": {"family": "inet", "table": table, "name": name, "type": kind, "hook": hook, "prio": priority,
            "policy": "accept"}}})
    };
    all.push(chain("passing", "filter", "forward", 0));
    if rules.iter().any(|(chain, _)| *chain == "leaving") {
        all.push(chain("leaving", "nat", "postrouting", 100));
    }
    for (chain, expr) in rules {
        all.push(json!({"add": {"rule": {"family": "inet", "table": table, "chain": chain, "expr": expr}}}));
    }
    Some(json!({"nftables": all}))
}

/// What removes the table, whether it is there or not.
pub fn removing(uuid: uuid::Uuid) -> Value {
    json!({"nftables": removing_words(&table_name(uuid))})
}

/// To remove what may not be there is an error, so it is made first; both happen in one step.
fn removing_words(table: &str) -> Vec<Value> {
    let table = json!({"table": {"family": "inet", "name": table}});
    vec![json!({"add": table}), json!({"delete": table})]
}

/// A chain, and what a rule in it says.
type Rule = (&'static str, Vec<Value>);

fn rules(def: &NetworkDef, bridge: &str) -> Vec<Rule> {
    let (mode, dev) = (def.mode(), def.forward_devices().first().map(|dev| (*dev).to_owned()));
    if matches!(mode, Mode::Open | Mode::Bridge | Mode::Macvtap | Mode::Hostdev) {
        return Vec::new();
    }
    let (from, to) = (is("iifname", bridge), is("oifname", bridge));
    let mut rules: Vec<Rule> = vec![("passing", vec![from.clone(), to.clone(), json!({"accept": null})])];
    let out = |mut words: Vec<Value>| {
        words.extend(dev.as_deref().map(|dev| is("oifname", dev)));
        words
    };
    let back = |mut words: Vec<Value>| {
        words.extend(dev.as_deref().map(|dev| is("iifname", dev)));
        words
    };
    for net in nets(def).into_iter().filter(|_| mode != Mode::Isolated) {
        let (source, destination) = (address(&net, "saddr", "=="), address(&net, "daddr", "=="));
        let mut outward = out(vec![from.clone(), source]);
        outward.push(json!({"accept": null}));
        let mut inward = back(vec![to.clone(), destination]);
        // Who is translated is found by nobody from outside: only answers come in.
        if is_translated(def, &net) {
            inward.push(
                json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}}),
            );
        }
        inward.push(json!({"accept": null}));
        rules.extend([("passing", outward), ("passing", inward)]);
    }
    let reject = json!({"reject": {"type": "icmpx", "expr": "port-unreachable"}});
    rules.extend([("passing", vec![from, reject.clone()]), ("passing", vec![to, reject])]);
    for net in nets(def).into_iter().filter(|net| is_translated(def, net)) {
        rules
            .extend(translations(&net, dev.as_deref(), def.forward.as_ref()).into_iter().map(|rule| ("leaving", rule)));
    }
    rules
}

/// The nets of guests: those of the host's addresses, and those that lie behind guests.
fn nets(def: &NetworkDef) -> Vec<Net> {
    let own = def.addresses().into_iter().map(|(_, net)| net);
    own.chain(def.routes.iter().map(virt_model::network::ip::Route::net)).collect()
}

/// Whether the net's packets leave with an address of the host's.
fn is_translated(def: &NetworkDef, net: &Net) -> bool {
    let six = def.forward.as_ref().and_then(|forward| forward.nat.as_ref()).and_then(|nat| nat.ipv6);
    def.mode() == Mode::Nat && (net.first.is_ipv4() || six == Some(true))
}

fn is(key: &str, device: &str) -> Value {
    json!({"match": {"op": "==", "left": {"meta": {"key": key}}, "right": device}})
}

fn address(net: &Net, which: &str, op: &str) -> Value {
    let protocol = if net.first.is_ipv4() { "ip" } else { "ip6" };
    json!({"match": {"op": op, "left": {"payload": {"protocol": protocol, "field": which}},
        "right": {"prefix": {"addr": net.first.to_string(), "len": net.prefix}}}})
}

/// What leaves the net gets another sender; what goes to several at once does not.
fn translations(net: &Net, dev: Option<&str>, forward: Option<&Forward>) -> Vec<Vec<Value>> {
    let source = address(net, "saddr", "==");
    let several: &[&str] = if net.first.is_ipv4() { &["224.0.0.0/24", "255.255.255.255/32"] } else { &["ff00::/8"] };
    let mut rules: Vec<Vec<Value>> = several
        .iter()
        .filter_map(|net| net.parse::<Net>().ok())
        .map(|several| vec![source.clone(), address(&several, "daddr", "=="), json!({"return": null})])
        .collect();
    let nat = forward.and_then(|forward| forward.nat.as_ref());
    let ports = nat.and_then(|nat| nat.ports.first()).map_or((1024, 65535), |port| (port.start, port.end));
    let chosen = nat.and_then(|nat| nat.addresses.first()).filter(|_| net.first.is_ipv4());
    let mut to = json!({});
    if let Some(chosen) = chosen {
        let (start, end) = (chosen.start.0.to_string(), chosen.end.map(|end| end.to_string()));
        to["addr"] = end.map_or(json!(start), |end| json!({"range": [start, end]}));
        to["family"] = json!("ip");
    }
    let verb = if chosen.is_some() { "snat" } else { "masquerade" };
    for protocol in [Some(["tcp", "udp"]), None] {
        let mut rule = vec![source.clone(), address(net, "daddr", "!=")];
        rule.extend(dev.map(|dev| is("oifname", dev)));
        let mut to = to.clone();
        if let Some(both) = protocol {
            rule.push(json!({"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": {"set": both}}}));
            to["port"] = json!({"range": [ports.0, ports.1]});
        }
        rule.push(if to == json!({}) { json!({verb: null}) } else { json!({verb: to}) });
        rules.push(rule);
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Option<String> {
        let def = NetworkDef::parse(&format!("<network><name>n</name>{text}</network>")).unwrap();
        replacing(&def, "virbr7").map(|all| all.to_string())
    }

    #[test]
    fn a_table_replaces_itself() {
        let all = said("<ip address='10.0.0.1' prefix='24'/>").unwrap();
        let (add, delete) = (all.find(r#"{"add":{"table""#).unwrap(), all.find(r#"{"delete":{"table""#).unwrap());
        assert!(add < delete && all.matches(r#"{"add":{"table""#).count() == 2, "{all}");
        assert!(all.contains("port-unreachable") && !all.contains("leaving"), "nobody leaves: {all}");
    }

    #[test]
    fn modes_differ_in_who_may_pass() {
        for none in ["<forward mode='open'/>", "<forward mode='bridge'/><bridge name='br0'/>"] {
            assert_eq!(said(none), None);
        }
        let nat = said("<forward/><ip address='10.0.0.1' prefix='24'/>").unwrap();
        assert!(nat.contains("masquerade") && nat.contains("established") && nat.contains("[1024,65535]"), "{nat}");
        let nat = said("<forward dev='eth7'/><ip address='10.0.0.1' prefix='24'/>").unwrap();
        assert_eq!(nat.matches("eth7").count(), 4, "{nat}");
        let snat = "<forward><nat><address start='192.0.2.1' end='192.0.2.9'/><port start='2000' end='3000'/></nat></forward>\
            <ip address='10.0.0.1' prefix='24'/><ip family='ipv6' address='fd00::1' prefix='64'/>";
        let snat = said(snat).unwrap();
        assert!(snat.contains(r#""range":["192.0.2.1","192.0.2.9"]"#) && snat.contains("[2000,3000]"), "{snat}");
        assert!(!snat.contains("masquerade") && snat.contains("fd00::"), "IPv6 is routed: {snat}");
        let route = said("<forward mode='route'/><ip address='10.0.0.1' prefix='24'/>").unwrap();
        assert!(!route.contains("established") && !route.contains("leaving"), "{route}");
    }
}
