//! What others' rules do to a network's packets. An `accept` of ours saves no packet that another chain drops, so what drops is
//! looked for, told, and left alone.

use serde_json::Value;
use virt_model::driver::network::Problem;

/// What a network needs of the host.
#[derive(Clone, Copy, Debug)]
pub struct Needs<'a> {
    /// Its bridge.
    pub bridge: &'a str,
    /// Packets of guests are passed on.
    pub passing: bool,
    /// Guests ask the host for addresses and names.
    pub serving: bool,
}

/// A chain that packets come through, of whoever made it.
struct Chain<'a> {
    family: &'a str,
    table: &'a str,
    name: &'a str,
}

/// What stands in the way, as `nft -j list ruleset` tells the rules.
pub fn problems(ruleset: &Value, needs: Needs<'_>) -> Vec<Problem> {
    let mut found = Vec::new();
    for chain in dropping(ruleset, "forward").filter(|_| needs.passing) {
        let ways = ["iifname", "oifname"].map(|key| !lets_pass(ruleset, &chain, key, needs.bridge));
        let missing = ["iifname", "oifname"].into_iter().zip(ways).filter(|(_, missing)| *missing).map(|(key, _)| key);
        let lines: Vec<String> = missing.map(|key| line(&chain, key, needs.bridge, "")).collect();
        if !lines.is_empty() {
            let sentence = format!("{} drops guests' packets; let them pass: {}", named(&chain), lines.join("; "));
            found.push(Problem { token: "forward-blocked", sentence });
        }
    }
    for chain in dropping(ruleset, "input").filter(|_| needs.serving) {
        if !lets_pass(ruleset, &chain, "iifname", needs.bridge) {
            let line = line(&chain, "iifname", needs.bridge, "meta l4proto { tcp, udp } th dport { 53, 67, 547 } ");
            let sentence =
                format!("{} drops guests' questions for addresses and names; let them in: {line}", named(&chain));
            found.push(Problem { token: "input-blocked", sentence });
        }
    }
    found
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

/// The chains of others at a hook that end in a drop.
fn dropping<'a>(ruleset: &'a Value, hook: &'a str) -> impl Iterator<Item = Chain<'a>> {
    let chains = objects(ruleset, "chain").filter(move |chain| chain["hook"] == hook);
    chains.filter_map(move |chain| {
        let (family, table, name) = (chain["family"].as_str()?, chain["table"].as_str()?, chain["name"].as_str()?);
        let ours = family == "inet" && table.starts_with("virt_");
        let found = Chain { family, table, name };
        let last = rules(ruleset, &found, name).last().is_some_and(drops_all);
        (!ours && matches!(family, "ip" | "ip6" | "inet") && (chain["policy"] == "drop" || last)).then_some(found)
    })
}

fn rules<'a>(ruleset: &'a Value, chain: &Chain<'a>, name: &'a str) -> Vec<&'a Value> {
    let of = |rule: &&Value| rule["family"] == chain.family && rule["table"] == chain.table && rule["chain"] == name;
    objects(ruleset, "rule").filter(of).collect()
}

/// Whether a rule drops whatever comes to it.
fn drops_all(rule: &&Value) -> bool {
    let words = rule["expr"].as_array().map_or(&[][..], Vec::as_slice);
    let decides = |word: &Value| word.get("drop").is_some() || word.get("reject").is_some();
    words.iter().any(decides) && !words.iter().any(|word| word.get("match").is_some() || word.get("xt").is_some())
}

/// Whether the chain, or one that it goes through, accepts what comes from or goes to the bridge.
fn lets_pass(ruleset: &Value, chain: &Chain<'_>, key: &str, bridge: &str) -> bool {
    let (mut waiting, mut seen) = (vec![chain.name.to_owned()], std::collections::HashSet::new());
    while let Some(name) = waiting.pop() {
        if !seen.insert(name.clone()) {
            continue;
        }
        for rule in objects(ruleset, "rule") {
            if rule["family"] != chain.family || rule["table"] != chain.table || rule["chain"] != name.as_str() {
                continue;
            }
            let words = rule["expr"].as_array().map_or(&[][..], Vec::as_slice);
            let about = words.iter().any(|word| is_about(word, key, bridge));
            if about && words.iter().any(|word| word.get("accept").is_some()) {
                return true;
            }
            let onward =
                words.iter().filter_map(|word| word["jump"]["target"].as_str().or(word["goto"]["target"].as_str()));
            waiting.extend(onward.map(str::to_owned));
        }
    }
    false
}

/// Whether that part of a rule is met by the bridge: by its name, or one that begins like it.
fn is_about(word: &Value, key: &str, bridge: &str) -> bool {
    let test = &word["match"];
    let of_key = test["left"]["meta"]["key"] == key || test["left"]["meta"]["key"] == key.replace("name", "");
    let is = |name: &Value| {
        let name = name.as_str().unwrap_or_default();
        name.strip_suffix('*').map_or(name == bridge, |begin| bridge.starts_with(begin))
    };
    let several = test["right"]["set"].as_array().is_some_and(|names| names.iter().any(is));
    of_key && test["op"] == "==" && (is(&test["right"]) || several)
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
        let needs = Needs { bridge: "virbr0", passing: true, serving: true };
        problems(&json!({"nftables": all}), needs).into_iter().map(|one| (one.token, one.sentence)).collect()
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
}
