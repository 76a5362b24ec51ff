//! What an agent tells, taken for what somebody in the guest may have made up: of each list the first [`MOST`], of each text the first
//! [`LONGEST`] characters without what deceives, and of what is not as it should be nothing.

use serde_json::Value;
use std::net::IpAddr;
use virt_model::domain::value::{Mac, Value as _};
use virt_model::driver::agent::{CardAddresses, GuestFact, GuestFacts, InfoGroup};
use virt_model::xml::plainly;

/// So many of each are told.
const MOST: usize = 1024;
/// So many of each are told of one of those.
const MOST_EACH: usize = 64;
/// The longest text, in characters.
const LONGEST: usize = 256;

/// What an agent is asked for a group.
pub fn command(group: InfoGroup) -> &'static str {
    match group {
        InfoGroup::Os => "guest-get-osinfo",
        InfoGroup::Hostname => "guest-get-host-name",
        InfoGroup::Users => "guest-get-users",
        InfoGroup::TimeZone => "guest-get-timezone",
        InfoGroup::FileSystems => "guest-get-fsinfo",
        InfoGroup::Disks => "guest-get-disks",
        InfoGroup::Interfaces => "guest-network-get-interfaces",
        InfoGroup::Load => "guest-get-load",
    }
}

/// What its answer tells; nothing if it makes no sense.
pub fn group(group: InfoGroup, told: &Value) -> Option<GuestFact> {
    match group {
        InfoGroup::Os => Some(GuestFact::Facts(os(told))),
        InfoGroup::Hostname => text(&told["host-name"]),
        InfoGroup::Users => Some(each(told, user)),
        InfoGroup::TimeZone => Some(GuestFact::Facts(time_zone(told))),
        InfoGroup::FileSystems => Some(each(told, file_system)),
        InfoGroup::Disks => Some(each(told, disk)),
        InfoGroup::Interfaces => Some(GuestFact::Each(cards(told).into_iter().map(interface).collect())),
        InfoGroup::Load => Some(GuestFact::Facts(load(told))),
    }
}

/// A text as it can be shown.
pub fn plain(text: &str) -> String {
    let short: String = text.chars().take(LONGEST).collect();
    plainly(&short).into_owned()
}

/// A number of file systems.
pub fn count(told: &Value) -> u32 {
    told.as_u64().and_then(|count| u32::try_from(count).ok()).unwrap_or_default()
}

/// Microseconds of an answer in nanoseconds.
pub fn microseconds(told: &Value) -> u64 {
    told.as_u64().unwrap_or_default() / 1000
}

/// How many file systems were trimmed.
pub fn trimmed(told: &Value) -> u32 {
    let all = list(&told["paths"]).iter().filter(|path| path["error"].is_null());
    u32::try_from(all.count()).unwrap_or(u32::MAX)
}

/// How a program that has ended did so.
pub fn exit_status(code: Option<i64>, signal: Option<i64>) -> i32 {
    let signal = signal.map(|signal| signal.saturating_add(128));
    code.or(signal).and_then(|status| i32::try_from(status).ok()).unwrap_or(i32::MAX)
}

/// The cards that have a name.
pub fn cards(told: &Value) -> Vec<CardAddresses> {
    let cards = list(told).iter().take(MOST);
    cards.filter_map(card).collect()
}

fn card(told: &Value) -> Option<CardAddresses> {
    let mac = told["hardware-address"].as_str().and_then(|mac| Mac::from_text(mac).ok());
    Some(CardAddresses {
        name: plain(told["name"].as_str()?),
        mac: mac.map(|mac| mac.to_string()).unwrap_or_default(),
        addresses: list(&told["ip-addresses"]).iter().take(MOST_EACH).filter_map(address).collect(),
    })
}

fn address(told: &Value) -> Option<(String, u32)> {
    let address: IpAddr = told["ip-address"].as_str()?.parse().ok()?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let prefix = told["prefix"].as_u64().filter(|prefix| *prefix <= longest).unwrap_or_default();
    Some((address.to_string(), u32::try_from(prefix).unwrap_or_default()))
}

fn interface(card: CardAddresses) -> GuestFacts {
    GuestFacts::from([
        ("name", GuestFact::Text(card.name)),
        ("mac", GuestFact::Text(card.mac)),
        ("addresses", GuestFact::Addresses(card.addresses)),
    ])
}

fn list(told: &Value) -> &[Value] {
    told.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn each(told: &Value, one: fn(&Value) -> GuestFacts) -> GuestFact {
    GuestFact::Each(list(told).iter().take(MOST).map(one).collect())
}

fn text(told: &Value) -> Option<GuestFact> {
    told.as_str().map(|text| GuestFact::Text(plain(text)))
}

/// Those that there are, under our name for each of the agent's.
fn texts<const N: usize>(told: &Value, keys: [(&'static str, &str); N]) -> GuestFacts {
    keys.into_iter().filter_map(|(ours, theirs)| Some((ours, text(&told[theirs])?))).collect()
}

fn numbers<const N: usize>(
    told: &Value,
    keys: [(&'static str, &'static str); N],
) -> impl Iterator<Item = (&'static str, GuestFact)> {
    keys.into_iter().filter_map(|(ours, theirs)| Some((ours, GuestFact::Number(told[theirs].as_u64()?))))
}

fn os(told: &Value) -> GuestFacts {
    texts(
        told,
        [
            ("id", "id"),
            ("name", "name"),
            ("pretty-name", "pretty-name"),
            ("version", "version"),
            ("version-id", "version-id"),
            ("variant", "variant"),
            ("variant-id", "variant-id"),
            ("machine", "machine"),
            ("kernel-release", "kernel-release"),
            ("kernel-version", "kernel-version"),
        ],
    )
}

fn user(told: &Value) -> GuestFacts {
    let mut user = texts(told, [("name", "user"), ("domain", "domain")]);
    // In seconds, with a fraction.
    if let Some(seconds) = told["login-time"].as_f64().filter(|seconds| *seconds >= 0.0) {
        user.insert("login-usec", GuestFact::Number((seconds * 1e6) as u64));
    }
    user
}

fn time_zone(told: &Value) -> GuestFacts {
    let mut zone = texts(told, [("name", "zone")]);
    let offset = told["offset"].as_i64().and_then(|offset| i32::try_from(offset).ok());
    zone.extend(offset.map(|offset| ("offset-seconds", GuestFact::Offset(offset))));
    zone
}

fn file_system(told: &Value) -> GuestFacts {
    let mut system = texts(told, [("name", "name"), ("mountpoint", "mountpoint"), ("type", "type")]);
    system.extend(numbers(told, [("total-bytes", "total-bytes"), ("used-bytes", "used-bytes")]));
    let devices = list(&told["disk"]).iter().filter_map(|disk| disk["dev"].as_str());
    system.insert("devices", GuestFact::Texts(devices.take(MOST_EACH).map(plain).collect()));
    system
}

fn disk(told: &Value) -> GuestFacts {
    let mut disk = texts(told, [("name", "name"), ("alias", "alias")]);
    disk.extend(text(&told["address"]["serial"]).map(|serial| ("serial", serial)));
    disk.extend(told["partition"].as_bool().map(|partition| ("partition", GuestFact::Flag(partition))));
    let below = list(&told["dependencies"]).iter().filter_map(Value::as_str);
    disk.insert("dependencies", GuestFact::Texts(below.take(MOST_EACH).map(plain).collect()));
    disk
}

fn load(told: &Value) -> GuestFacts {
    let keys = [("1-minute", "load1m"), ("5-minutes", "load5m"), ("15-minutes", "load15m")];
    let one = |(ours, theirs): (&'static str, &str)| Some((ours, GuestFact::Load(told[theirs].as_f64()?)));
    keys.into_iter().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fact(of: InfoGroup, told: Value) -> GuestFact {
        group(of, &told).expect("told")
    }

    #[test]
    fn each_group_has_the_keys_that_are_documented() {
        let os =
            fact(InfoGroup::Os, json!({ "id": "debian", "pretty-name": "Debian", "kernel-release": "6.1", "x": 1 }));
        let text = |text: &str| GuestFact::Text(text.to_owned());
        let known = [("id", text("debian")), ("pretty-name", text("Debian")), ("kernel-release", text("6.1"))];
        assert_eq!(os, GuestFact::Facts(GuestFacts::from(known)));
        assert_eq!(fact(InfoGroup::Hostname, json!({ "host-name": "lin" })), text("lin"));
        let users = fact(InfoGroup::Users, json!([{ "user": "root", "login-time": 1.5 }]));
        let root = GuestFacts::from([("name", text("root")), ("login-usec", GuestFact::Number(1_500_000))]);
        assert_eq!(users, GuestFact::Each(vec![root]));
        let zone = fact(InfoGroup::TimeZone, json!({ "zone": "CET", "offset": -3600 }));
        let known = [("name", text("CET")), ("offset-seconds", GuestFact::Offset(-3600))];
        assert_eq!(zone, GuestFact::Facts(GuestFacts::from(known)));
        let systems = json!([{ "name": "vda1", "mountpoint": "/", "type": "ext4", "total-bytes": 9, "used-bytes": 8,
                               "disk": [{ "dev": "/dev/vda1" }, {}] }]);
        let root = GuestFacts::from([
            ("name", text("vda1")),
            ("mountpoint", text("/")),
            ("type", text("ext4")),
            ("total-bytes", GuestFact::Number(9)),
            ("used-bytes", GuestFact::Number(8)),
            ("devices", GuestFact::Texts(vec!["/dev/vda1".to_owned()])),
        ]);
        assert_eq!(fact(InfoGroup::FileSystems, systems), GuestFact::Each(vec![root]));
        let load = fact(InfoGroup::Load, json!({ "load1m": 0.5 }));
        assert_eq!(load, GuestFact::Facts(GuestFacts::from([("1-minute", GuestFact::Load(0.5))])));
    }

    #[test]
    fn what_makes_no_sense_is_not_told_and_nothing_is_longer_than_it_may_be() {
        let cards = cards(&json!([
            { "name": "eth0\u{202e}\u{0}", "hardware-address": "52:54:00:AB:00:01", "ip-addresses": [
                { "ip-address": "192.0.2.7", "prefix": 24 }, { "ip-address": "fe80::1", "prefix": 999 },
                { "ip-address": "; reboot" }, 7] },
            { "hardware-address": "52:54:00:ab:00:02" },
            { "name": "lo", "hardware-address": "none" },
        ]));
        let addresses = vec![("192.0.2.7".to_owned(), 24), ("fe80::1".to_owned(), 0)];
        let name = "eth0\\u{202e}\\u{0}".to_owned();
        assert_eq!(cards[0], CardAddresses { name, mac: "52:54:00:ab:00:01".to_owned(), addresses });
        let lo = CardAddresses { name: "lo".to_owned(), ..CardAddresses::default() };
        assert_eq!(cards[1..], [lo]);

        for group in InfoGroup::ALL {
            for nonsense in [json!(null), json!(7), json!("x"), json!([[], null, 7, {}]), json!({ "a": [] })] {
                // It need only come to an end.
                let _ = super::group(*group, &nonsense);
            }
        }
        let many = Value::Array(vec![json!({ "user": "x".repeat(10_000), "login-time": -1e300 }); 2 * MOST]);
        let GuestFact::Each(users) = fact(InfoGroup::Users, many) else { panic!("a list") };
        assert_eq!((users.len(), users[0].len()), (MOST, 1));
        assert_eq!(users[0]["name"], GuestFact::Text("x".repeat(LONGEST)));
        assert_eq!((count(&json!(u64::MAX)), count(&json!(-1)), microseconds(&json!(-1))), (0, 0, 0));
        assert_eq!((exit_status(Some(3), None), exit_status(None, Some(9))), (3, 137));
        assert_eq!((exit_status(None, None), exit_status(Some(1 << 40), None)), (i32::MAX, i32::MAX));
        assert_eq!(trimmed(&json!({ "paths": [{ "path": "/" }, { "path": "/b", "error": "no" }] })), 1);
    }
}
