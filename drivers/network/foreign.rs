//! What others' rules do to a network's packets. An `accept` of ours saves no packet that another chain drops, so what drops is
//! looked for, told, and left alone.

use super::{rules, zones};
use crate::host::net_tool::output_within;
use serde_json::Value;
use std::collections::HashMap;
use std::io;
use std::sync::OnceLock;
use virt_model::driver::network::{Problem, ProblemToken};

/// What a network needs of the host.
#[derive(Clone, Copy, Debug)]
pub struct Needs<'a> {
    /// Its bridge.
    pub bridge: &'a str,
    /// The zone of firewalld's that the bridge is to be in, if any.
    pub zone: Option<&'a str>,
    /// Packets of guests are passed on.
    pub passing: bool,
    /// Guests ask the host for addresses and names.
    pub serving: bool,
}

/// The host's rules, listed once for all who look at them: with the first of them.
#[derive(Debug, Default)]
pub struct Ruleset(OnceLock<Result<Value, String>>);

impl Ruleset {
    /// As `nft -j list ruleset` tells them. Blocks. Error: why they cannot be listed.
    pub fn listed(&self) -> Result<&Value, &str> {
        let list = || {
            let told = output_within("nft", &["-j", "list", "ruleset"], &[]);
            let read = told.and_then(|told| Ok(serde_json::from_slice(&told)?));
            read.map_err(|error: io::Error| error.to_string())
        };
        self.0.get_or_init(list).as_ref().map_err(String::as_str)
    }
}

/// A chain that packets come through, of whoever made it.
struct Chain<'a> {
    family: &'a str,
    table: &'a str,
    name: &'a str,
    /// What none of its rules decides on is dropped.
    drops_the_rest: bool,
}

/// What stands in the way, as `nft -j list ruleset` tells the rules.
pub fn problems(ruleset: &Value, needs: Needs<'_>) -> Vec<Problem> {
    let mut found = Vec::new();
    for chain in of_others(ruleset, "forward").filter(|_| needs.passing) {
        let any = |key| Packet { key, bridge: needs.bridge, port: None };
        let missing = ["iifname", "oifname"].into_iter().filter(|key| !lets_pass(ruleset, &chain, any(key)));
        let lines: Vec<String> = missing.map(|key| line(&chain, key, needs.bridge, "")).collect();
        if !lines.is_empty() {
            let remedy = chain.zone_for(needs).unwrap_or_else(|| lines.join("; "));
            let sentence = format!("{} drops guests' packets; let them pass: {remedy}", named(&chain));
            found.push(Problem { token: ProblemToken::ForwardBlocked, sentence });
        }
    }
    for chain in of_others(ruleset, "input").filter(|_| needs.serving) {
        let asked = |port| Packet { key: "iifname", bridge: needs.bridge, port: Some(port) };
        if !ASKED.into_iter().all(|port| lets_pass(ruleset, &chain, asked(port))) {
            let line = || line(&chain, "iifname", needs.bridge, "meta l4proto { tcp, udp } th dport { 53, 67, 547 } ");
            let remedy = chain.zone_for(needs).unwrap_or_else(line);
            let sentence =
                format!("{} drops guests' questions for addresses and names; let them in: {remedy}", named(&chain));
            found.push(Problem { token: ProblemToken::InputBlocked, sentence });
        }
    }
    found
}

impl Chain<'_> {
    /// What lets guests' packets pass a chain of firewalld's, which takes no rule of anybody else: the zone of the bridge decides.
    fn zone_for(&self, needs: Needs<'_>) -> Option<String> {
        (self.table == "firewalld").then(|| zones::let_pass(needs.bridge, needs.zone))
    }
}

fn named(chain: &Chain<'_>) -> String {
    format!("the chain '{}' of the table '{} {}', which is not virtd's,", chain.name, chain.family, chain.table)
}

fn line(chain: &Chain<'_>, key: &str, bridge: &str, what: &str) -> String {
    format!("nft insert rule {} {} {} {key} \"{bridge}\" {what}accept", chain.family, chain.table, chain.name)
}

fn objects<'a>(ruleset: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    ruleset["nftables"].as_array().into_iter().flatten().filter_map(move |object| object.get(kind))
}

/// Whether a table is others' and of a family whose chains networks' packets come through.
pub fn concerns(family: &str, table: &str) -> bool {
    matches!(family, "ip" | "ip6" | "inet") && !rules::is_ours(family, table)
}

/// The chains of others at a hook.
fn of_others<'a>(ruleset: &'a Value, hook: &'a str) -> impl Iterator<Item = Chain<'a>> {
    let chains = objects(ruleset, "chain").filter(move |chain| chain["hook"] == hook);
    chains.filter_map(|chain| {
        let (family, table, name) = (chain["family"].as_str()?, chain["table"].as_str()?, chain["name"].as_str()?);
        let found = Chain { family, table, name, drops_the_rest: chain["policy"] == "drop" };
        concerns(family, table).then_some(found)
    })
}

/// What a network's guests must be able to ask the host for, over UDP: names and addresses.
const ASKED: [u16; 2] = [53, 67];

/// Whether a packet passes the chain, and those that it goes through.
fn lets_pass(ruleset: &Value, chain: &Chain<'_>, packet: Packet<'_>) -> bool {
    let mut rules: HashMap<&str, Vec<&[Value]>> = HashMap::new();
    let of = |rule: &&Value| rule["family"] == chain.family && rule["table"] == chain.table;
    for rule in objects(ruleset, "rule").filter(of) {
        if let (Some(name), Some(words)) = (rule["chain"].as_str(), rule["expr"].as_array()) {
            rules.entry(name).or_default().push(words);
        }
    }
    let whole = Way { about: false, sure: true };
    match (Walk { rules, packet, known: HashMap::new() }).through(chain.name, whole, 0) {
        Fate::Passes => true,
        Fate::Ends => false,
        Fate::GoesOn => !chain.drops_the_rest,
    }
}

/// So many chains deep the kernel follows jumps.
const MOST_JUMPS: usize = 16;

/// A packet of guests.
#[derive(Clone, Copy)]
struct Packet<'a> {
    /// It comes from the bridge (`iifname`) and begins something, or goes there (`oifname`) and answers.
    key: &'static str,
    bridge: &'a str,
    /// Where it goes to by UDP; nothing where it is any packet.
    port: Option<u16>,
}

/// What becomes of the packet in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is accepted.
    Passes,
    /// It is dropped.
    Ends,
    /// That is decided where the chain was called.
    GoesOn,
}

/// How packets have come to a rule, or what the rule asks of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Way {
    /// By a rule that names the bridge.
    about: bool,
    /// All such packets have.
    sure: bool,
}

impl Way {
    fn and(self, next: Way) -> Way {
        Way { about: self.about || next.about, sure: self.sure && next.sure }
    }
}

/// A packet's walk through the chains of a table.
struct Walk<'a> {
    /// By their chains.
    rules: HashMap<&'a str, Vec<&'a [Value]>>,
    packet: Packet<'a>,
    /// Chains that it has come through.
    known: HashMap<(&'a str, Way), Fate>,
}

impl<'a> Walk<'a> {
    fn through(&mut self, chain: &'a str, way: Way, depth: usize) -> Fate {
        if depth > MOST_JUMPS {
            return Fate::GoesOn;
        }
        if let Some(known) = self.known.get(&(chain, way)) {
            return *known;
        }
        let mut fate = Fate::GoesOn;
        for words in self.rules.get(chain).cloned().unwrap_or_default() {
            let Some(asked) = self.packet.is_met_by(words, way) else { continue };
            let decided = words.iter().find_map(|word| self.decides(word, way, asked, depth));
            if let Some(decided) = decided {
                fate = decided;
                break;
            }
        }
        self.known.insert((chain, way), fate);
        fate
    }

    /// What that part of a rule decides on those who come to it that way and are `asked` that by the rest of it.
    fn decides(&mut self, word: &'a Value, way: Way, asked: Way, depth: usize) -> Option<Fate> {
        let (what, detail) = word.as_object()?.iter().next()?;
        let on = way.and(asked);
        match what.as_str() {
            // Whoever wrote a rule that names the bridge means guests, even where it asks for more that is not known here.
            "accept" => (on.sure || asked.about).then_some(Fate::Passes),
            "drop" | "reject" => on.sure.then_some(Fate::Ends),
            "return" => on.sure.then_some(Fate::GoesOn),
            "jump" => {
                Some(self.through(detail["target"].as_str()?, on, depth + 1)).filter(|fate| *fate != Fate::GoesOn)
            }
            // Nobody comes back from there: it is as if the chain ended with it.
            "goto" => Some(self.through(detail["target"].as_str()?, on, depth + 1))
                .filter(|fate| on.sure || *fate != Fate::GoesOn),
            "vmap" => {
                let entries = detail["data"]["set"].as_array()?;
                entries.iter().find_map(|entry| {
                    let further = self.packet.is_met(&detail["key"], &entry[0], on.about)?;
                    self.decides(&entry[1], way, asked.and(further), depth)
                })
            }
            _ => None,
        }
    }
}

impl Packet<'_> {
    /// What a rule asks of packets that come to it that way. Nothing: it is none for this one.
    fn is_met_by(&self, words: &[Value], way: Way) -> Option<Way> {
        let mut asked = Way { about: false, sure: true };
        // Whether it names the bridge is known first.
        for by_name in [true, false] {
            for word in words {
                let test = &word["match"];
                if self.is_of_bridge(&test["left"]) != by_name {
                    continue;
                }
                let met = self.is_met(&test["left"], &test["right"], way.about || asked.about);
                let further = match test["op"].as_str() {
                    None if word.as_object().is_some_and(|word| word.keys().all(|what| asks_nothing(what))) => continue,
                    Some("==" | "in") => met?,
                    Some("!=") => match met {
                        // It is met by all of them, or by none.
                        Some(met) if met.sure => return None,
                        Some(_) => Way { about: false, sure: false },
                        None => continue,
                    },
                    _ => Way { about: false, sure: false },
                };
                asked = asked.and(further);
            }
        }
        Some(asked)
    }

    /// What is asked of it by a test of `left` for `right`. Nothing: it does not meet that. `about`: it is known to be of the bridge.
    fn is_met(&self, left: &Value, right: &Value, about: bool) -> Option<Way> {
        let unknown = Way { about: false, sure: false };
        let met = |is: bool| is.then_some(Way { about: false, sure: true });
        if self.is_of_bridge(left) {
            return match names(right, self.bridge) {
                Some(is) => is.then_some(Way { about: true, sure: true }),
                None => Some(unknown),
            };
        }
        if left["ct"]["key"] == "state" {
            return match self.key {
                "iifname" => met(holds(right, &"new".into())),
                _ => Some(Way { about: false, sure: holds(right, &"established".into()) }),
            };
        }
        let field = left["payload"]["field"].as_str().unwrap_or_default();
        if matches!(field, "saddr" | "daddr") {
            // Of the bridge: its guests' addresses are meant.
            return Some(Way { about: false, sure: about });
        }
        let Some(port) = self.port else { return Some(unknown) };
        if left["meta"]["key"] == "l4proto" || matches!(field, "protocol" | "nexthdr") {
            return met(holds(right, &"udp".into()) || holds(right, &17.into()));
        }
        match (field, left["payload"]["protocol"].as_str()) {
            ("dport", Some("udp" | "th")) => met(holds(right, &port.into())),
            ("dport", Some(_)) => None,
            _ => Some(unknown),
        }
    }

    fn is_of_bridge(&self, left: &Value) -> bool {
        let key = &left["meta"]["key"];
        *key == self.key || *key == self.key.replace("name", "")
    }
}

/// Whether those names, or beginnings of names, are the bridge's. Nothing where they are not said there.
fn names(right: &Value, bridge: &str) -> Option<bool> {
    if let Some(several) = right["set"].as_array() {
        return Some(several.iter().any(|one| names(one, bridge) == Some(true)));
    }
    let name = right.as_str().filter(|name| !name.starts_with('@'))?;
    Some(name.strip_suffix('*').map_or(name == bridge, |begin| bridge.starts_with(begin)))
}

/// Whether a value is that, or one of those, or in that range.
fn holds(right: &Value, value: &Value) -> bool {
    let several = right.as_array().or_else(|| right["set"].as_array());
    let range = right["range"].as_array().and_then(|range| Some((range.first()?.as_u64()?, range.get(1)?.as_u64()?)));
    right == value
        || several.is_some_and(|several| several.iter().any(|one| holds(one, value)))
        || range.zip(value.as_u64()).is_some_and(|((first, last), value)| (first..=last).contains(&value))
}

/// Whether a part of a rule lets all packets on to its next one; a map asks where it decides.
fn asks_nothing(what: &str) -> bool {
    matches!(
        what,
        "accept" | "drop" | "reject" | "return" | "jump" | "goto" | "vmap" | "counter" | "log" | "mangle" | "notrack"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chain(family: &str, table: &str, name: &str, hook: &str, policy: &str) -> Value {
        json!({"chain": {"family": family, "table": table, "name": name, "hook": hook, "policy": policy, "type": "filter"}})
    }

    fn rule(name: &str, expr: Value) -> Value {
        json!({"rule": {"family": "ip", "table": "filter", "chain": name, "expr": expr}})
    }

    fn meta(key: &str, right: Value) -> Value {
        json!({"match": {"op": "==", "left": {"meta": {"key": key}}, "right": right}})
    }

    fn found(all: Vec<Value>) -> Vec<(&'static str, String)> {
        let needs = Needs { bridge: "virbr0", zone: None, passing: true, serving: true };
        problems(&json!({"nftables": all}), needs).into_iter().map(|one| (one.token.as_str(), one.sentence)).collect()
    }

    #[test]
    fn a_chain_that_drops_is_named_with_the_line_to_add() {
        let docker = || {
            vec![chain("ip", "filter", "FORWARD", "forward", "drop"), chain("ip", "filter", "INPUT", "input", "accept")]
        };
        let told = found(docker());
        assert_eq!(told.len(), 1, "{told:?}");
        let (token, sentence) = &told[0];
        assert_eq!(*token, "forward-blocked");
        assert!(sentence.contains("nft insert rule ip filter FORWARD iifname \"virbr0\" accept"), "{sentence}");
        assert!(sentence.contains("oifname \"virbr0\" accept"), "{sentence}");
        // Half of it is done, in a chain that the other goes through.
        let mut half = docker();
        half.push(rule("FORWARD", json!([{"jump": {"target": "DOCKER-USER"}}])));
        half.push(rule("DOCKER-USER", json!([meta("iifname", json!("virbr*")), {"accept": null}])));
        let told = found(half.clone());
        assert!(told.len() == 1 && !told[0].1.contains(" iifname ") && told[0].1.contains(" oifname "), "{told:?}");
        half.push(rule("FORWARD", json!([meta("oifname", json!({"set": ["eth9", "virbr0"]})), {"accept": null}])));
        assert_eq!(found(half), []);
    }

    #[test]
    fn who_drops_at_the_end_drops_too_and_ours_is_not_meant() {
        let mut all = vec![chain("ip", "filter", "IN", "input", "accept")];
        all.push(rule("IN", json!([meta("iifname", json!("eth0")), {"accept": null}])));
        assert_eq!(found(all.clone()), []);
        all.push(rule("IN", json!([{"counter": null}, {"reject": null}])));
        let told = found(all);
        assert_eq!(told[0].0, "input-blocked");
        assert!(told[0].1.contains("dport { 53, 67, 547 } accept"), "{told:?}");
        assert_eq!(found(vec![chain("inet", "virt_0123", "passing", "forward", "drop")]), []);
        assert_eq!(
            found(vec![chain("bridge", "x", "y", "forward", "drop")]),
            [],
            "bridges' own frames are others' matter"
        );
    }

    #[test]
    fn a_zone_of_firewalld_is_to_let_pass_whose_bridge_is_in_it() {
        let all = json!({"nftables": [chain("inet", "firewalld", "filter_FORWARD", "forward", "drop")]});
        let told = |zone: Option<&str>| {
            let needs = Needs { bridge: "virbr0", zone, passing: true, serving: true };
            problems(&all, needs).into_iter().map(|one| one.sentence).collect::<Vec<_>>().join("\n")
        };
        for ours in [None, Some("virt")] {
            assert!(told(ours).ends_with("firewall-cmd --zone=virt --change-interface=virbr0"), "{}", told(ours));
        }
        let other = told(Some("lab"));
        assert!(other.contains("--zone=lab --set-target=ACCEPT") && other.contains("name no zone"), "{other}");
        assert!(!other.contains("--change-interface"), "it would be told to be in the wrong zone then: {other}");
    }

    /// Whether packets from the bridge pass a chain whose policy is to drop, with those rules of it and of another.
    fn passes(own: &[Value], other: &[Value]) -> bool {
        let mut all = vec![chain("ip", "filter", "INPUT", "input", "drop")];
        all.extend(own.iter().map(|expr| rule("INPUT", expr.clone())));
        all.extend(other.iter().map(|expr| rule("OTHER", expr.clone())));
        found(all).is_empty()
    }

    #[test]
    fn what_is_accepted_further_on_passes() {
        let (home, lan) = (meta("iifname", json!("virbr0")), meta("iifname", json!("eth0")));
        let (accept, drop) = (json!({"accept": null}), json!({"drop": null}));
        let state = |states: Value| json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": states}});
        for word in ["jump", "goto"] {
            let on = json!({word: {"target": "OTHER"}});
            assert!(passes(&[json!([home, on])], &[json!([accept])]), "{word}: of the bridge, all of it");
            assert!(passes(&[json!([on])], &[json!([{"counter": null}, accept])]), "{word}: of everybody");
            assert!(passes(&[json!([on])], &[json!([home, accept])]), "{word}: named there");
            assert!(!passes(&[json!([lan, on])], &[json!([home, accept])]), "{word}: it never comes there");
            assert!(!passes(&[json!([home, on])], &[json!([lan, accept])]), "{word}: others only");
            assert!(!passes(&[json!([home, on])], &[json!([drop]), json!([accept])]), "{word}: dropped before");
            let known = state(json!(["established", "related"]));
            assert!(!passes(&[json!([home, on])], &[json!([known, accept])]), "{word}: nobody could begin");
            assert!(passes(&[json!([home, on])], &[json!([state(json!(["new", "related"])), accept])]), "{word}");
        }
        let (jump, goto) = (json!({"jump": {"target": "OTHER"}}), json!({"goto": {"target": "OTHER"}}));
        assert!(
            passes(&[json!([jump]), json!([accept])], &[json!([{"return": null}]), json!([drop])]),
            "it comes back"
        );
        assert!(!passes(&[json!([goto]), json!([accept])], &[]), "nobody comes back from there");
        assert!(!passes(&[json!([home, drop]), json!([accept])], &[]), "dropped by name");
        let some = |field: &str, protocol: &str, right: Value| json!({"match": {"op": "==", "left": {"payload": {"protocol": protocol, "field": field}}, "right": right}});
        let net = some("saddr", "ip", json!({"prefix": {"addr": "10.0.0.0", "len": 8}}));
        assert!(!passes(&[json!([net, accept])], &[]), "some of everybody's is not all of it");
        assert!(passes(&[json!([home, jump])], &[json!([net, accept])]), "those are the guests' addresses");
        // A zone, as firewalld makes them: services that are let in, and a drop of the rest.
        let service = |protocol: &str, right: Value| json!([some("dport", protocol, right), accept]);
        let zone = |services: &[Value]| [services, &[json!([drop])]].concat();
        let (names, addresses) =
            (service("udp", json!(53)), service("udp", json!({"set": [{"range": [67, 68]}, 547]})));
        assert!(passes(&[json!([home, goto])], &zone(&[names.clone(), addresses.clone()])), "both are let in");
        for one in [&names, &addresses, &service("tcp", json!({"set": [53, 67]}))] {
            assert!(!passes(&[json!([home, jump])], &zone(std::slice::from_ref(one))), "not both: {one}");
        }
        let map =
            json!({"vmap": {"key": {"meta": {"key": "iifname"}}, "data": {"set": [["eth0", drop], ["virbr0", jump]]}}});
        assert!(passes(&[json!([map])], &[json!([accept])]), "a map leads there");
        assert!(!passes(&[json!([map])], &[json!([drop])]), "a map leads to a drop");
        // Chains that call each other cannot be made; and however many ways there are, each chain is walked once.
        let ring = [json!([jump]), json!([{"jump": {"target": "INPUT"}}])];
        assert!(!passes(&ring, &ring));
    }

    #[test]
    fn a_drop_that_is_jumped_to_is_told() {
        let mut all = vec![chain("inet", "firewall", "IN", "input", "accept")];
        let rule = |name: &str, expr: Value| json!({"rule": {"family": "inet", "table": "firewall", "chain": name, "expr": expr}});
        all.push(rule("IN", json!([{"jump": {"target": "REST"}}])));
        assert_eq!(found(all.clone()), []);
        all.push(rule("REST", json!([{"log": null}, {"drop": null}])));
        assert_eq!(found(all).iter().map(|one| one.0).collect::<Vec<_>>(), ["input-blocked"]);
    }
}
