//! Network documents: nothing is lost of what is read, and what contradicts itself is refused by name, where it stands.

use std::path::{Path, PathBuf};
use virt_model::network::standing::{Standing, check, standing};
use virt_model::network::{NetworkDef, vocabulary};
use virt_model::xml::{Element, Limits, Node, read};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/network")
}

fn documents() -> Vec<(String, String)> {
    let files = std::fs::read_dir(folder()).unwrap().map(|file| file.unwrap().path());
    let files = files.filter(|file| file.extension().is_some_and(|extension| extension == "xml"));
    let read = |file: PathBuf| {
        (file.file_stem().unwrap().to_str().unwrap().to_owned(), std::fs::read_to_string(&file).unwrap())
    };
    let mut documents: Vec<_> = files.map(read).collect();
    documents.sort();
    documents
}

/// What a document says, without its layout, and in no order.
fn said(element: &Element, path: &str, into: &mut Vec<String>) {
    let path = format!("{path}/{}", element.name);
    let attributes =
        element.attributes.iter().map(|attribute| format!("{path}/@{}={}", attribute.name, attribute.value));
    into.extend(attributes);
    let verbatim = element.nodes.iter().filter_map(Node::as_verbatim).map(str::trim);
    into.extend(verbatim.map(|text| format!("{path}: {text}")));
    match element.text().trim() {
        "" => into.push(path.clone()),
        text => into.push(format!("{path}: {text}")),
    }
    element.elements().for_each(|child| said(child, &path, into));
}

fn all_said(text: &str) -> Vec<String> {
    let root = read(text, &[("network", "metadata")]).unwrap();
    let mut all = Vec::new();
    said(&root, "", &mut all);
    all.sort();
    all
}

#[test]
fn n1_nothing_is_lost() {
    let documents = documents();
    assert!(documents.len() >= 30, "{}", documents.len());
    for (name, text) in documents {
        let def = NetworkDef::parse(&text).unwrap_or_else(|findings| panic!("{name}: {findings:#?}"));
        let written = def.write();
        let (mut before, mut after) = (all_said(&text), all_said(&written));
        // A document without a uuid gets one.
        if !text.contains("<uuid>") {
            after.retain(|line| !line.starts_with("/network/uuid"));
        }
        before.dedup();
        after.dedup();
        assert_eq!(before, after, "{name}");
        let again = NetworkDef::parse_within(&written, Limits::STORED).unwrap();
        assert_eq!((&again, again.write()), (&def, written), "{name}: what is written is read as what it was");
    }
}

#[test]
fn n1_a_document_of_one_net_many_times_is_a_few_findings() {
    let document = |times: usize| {
        let ips = "<ip address='10.0.0.1'/>".repeat(times);
        NetworkDef::parse(&format!("<network><name>n</name>{ips}</network>")).unwrap_err()
    };
    assert_eq!(document(64).len(), 63, "each but the first is complained about once");
    let many = document(8000);
    assert!(many.len() == 1 && many[0].message.contains("more than 64 <ip>"), "{many:?}");
}

#[test]
fn n1_runtime_facts_are_read_and_dropped() {
    let text = "<network connections='3'><name>n</name><forward mode='nat' dev='eth0'><interface dev='eth0' connections='2'/>\
        </forward><ip address='10.0.0.1' prefix='24'/></network>";
    assert!(!NetworkDef::parse(text).unwrap().write().contains("connections"));
}

#[test]
fn n1_every_name_of_the_format_is_in_a_document() {
    let mut seen = std::collections::HashSet::new();
    for (_, text) in documents() {
        seen.extend(all_said(&text).into_iter().map(|line| line.split(['=', ':']).next().unwrap().to_owned()));
    }
    // These stand in documents of elements that are there, with other words.
    let like = [
        "/network/portgroup/vlan",
        "/network/portgroup/virtualport",
        "/network/portgroup/bandwidth",
        "/network/virtualport",
    ];
    let known_missing = [
        "/network/@connections",
        "/network/@trustGuestRxFilters",
        "/network/forward/driver/@model",
        "/network/forward/interface/@connections",
    ];
    for (path, attributes) in vocabulary() {
        let path = if path.is_empty() { "/network".to_owned() } else { format!("/network/{path}") };
        if path.contains(":") || like.iter().any(|like| path.starts_with(like)) {
            continue;
        }
        assert!(seen.contains(&path), "no document has {path}");
        for attribute in attributes.iter().map(|name| format!("{path}/@{name}")) {
            assert!(seen.contains(&attribute) || known_missing.contains(&&*attribute), "no document has {attribute}");
        }
    }
}

#[test]
fn n2_what_contradicts_itself_is_refused_by_name() {
    let file = folder().join("refused.txt");
    let text = std::fs::read_to_string(&file).unwrap();
    let (head, cases) = text.split_once("\n\n").unwrap();
    let mut written = head.to_owned();
    for case in cases.trim().split("\n\n") {
        let lines: Vec<&str> = case.lines().filter(|line| !line.starts_with("->")).collect();
        let document = format!("<network>\n<name>x</name>\n{}\n</network>", lines[1..].join("\n"));
        let findings = NetworkDef::parse(&document).err().unwrap_or_default();
        written += &format!("\n\n{}", lines.join("\n"));
        for finding in &findings {
            assert!(finding.line > 0, "{finding}");
            written += &format!("\n-> {finding}");
        }
        assert!(!findings.is_empty(), "{document}");
    }
    written.push('\n');
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&file, &written).unwrap();
    }
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(written == text, "what is found is not what {} says: UPDATE=1 writes it anew", file.display());
}

#[test]
fn n2_other_documents_and_broken_ones_are_refused() {
    for (text, why) in [
        ("", "no element"),
        ("<network>", "network"),
        ("<domain/>", "<network> was expected"),
        ("<network xmlns='urn:x'><name>n</name></network>", "must be in none"),
        ("<network xmlns:dnsmasq='urn:x'><name>n</name></network>", "can only stand for"),
        ("<network/>", "needs a name"),
        ("<network><name>a/b</name></network>", "cannot be a name"),
        ("<network><name>n</name><uuid>7</uuid></network>", "a UUID"),
    ] {
        let findings = NetworkDef::parse(text).unwrap_err();
        assert!(findings.iter().any(|finding| finding.to_string().contains(why)), "{text}: {findings:?}");
    }
    let many = format!("<network><name>n</name>{}</network>", "<portgroup name='x'/>".repeat(9000));
    assert!(NetworkDef::parse(&many).unwrap_err()[0].message.contains("more than"));
}

#[test]
fn n3_what_does_not_act_is_refused_by_a_start_where_it_stands() {
    for (name, text) in documents() {
        let def = NetworkDef::parse(&text).unwrap();
        let found: Vec<String> = check(&def).iter().map(|finding| finding.path.clone()).collect();
        let expected: &[&str] = match &*name {
            "macvtap-vepa" => &["/virtualport"],
            "openvswitch" => &["/portgroup/virtualport", "/virtualport"],
            "bandwidth" => &["/bandwidth/inbound/@floor"],
            "portgroups" => &["/portgroup[2]/@trustGuestRxFilters"],
            "mtu-and-zone" => &["/bridge/@macTableManager"],
            "for-people" => &["/dnsmasq:options", "/domain/@register"],
            _ => &[],
        };
        let mut found = found;
        found.sort();
        assert_eq!(found, expected, "{name}");
    }
}

/// What a start is refused for of a network that says that on its second line and that on its third.
fn found(forward: &str, more: &str) -> Vec<String> {
    let text = format!("<network><name>n</name>\n{forward}\n{more}</network>");
    let found = check(&NetworkDef::parse(&text).unwrap());
    found.iter().map(|one| format!("{}:{} {}", one.line, one.column, one.path)).collect()
}

#[test]
fn n3_all_guests_together_are_limited_and_in_a_vlan_where_that_can_be() {
    let (limits, vlan) = ("<bandwidth><inbound average='9'/></bandwidth>", "<vlan><tag id='7'/></vlan>");
    let (nat, bridge) = ("<forward mode='nat'/>", "<forward mode='bridge'/><bridge name='br0'/>");
    let (cards, direct) = (
        "<forward mode='hostdev'><pf dev='eth0'/></forward>",
        "<forward mode='vepa'><interface dev='eth0'/></forward>",
    );
    for (forward, refuses_limits, refuses_vlan) in
        [(nat, false, true), (bridge, true, false), (cards, true, false), (direct, true, true), ("", false, true)]
    {
        let refused = |path: &str, is: bool| if is { vec![format!("3:1 {path}")] } else { Vec::new() };
        assert_eq!(found(forward, limits), refused("/bandwidth", refuses_limits), "{forward}");
        assert_eq!(found(forward, vlan), refused("/vlan", refuses_vlan), "{forward}");
    }
    assert_eq!(found(nat, "<bandwidth><inbound average='0'/></bandwidth>"), ["3:12 /bandwidth/inbound"]);
    assert_eq!(found(bridge, "<vlan><tag id='0'/></vlan>"), ["3:7 /vlan/tag/@id"]);
    assert_eq!(found(cards, "<vlan><tag id='7'/><tag id='8'/></vlan>"), ["3:1 /vlan"]);
}

#[test]
fn n3_without_a_bridge_nothing_is_said_of_ports() {
    let more = "<port isolated='yes'/>\n<portgroup name='a'><vlan><tag id='7'/></vlan><bandwidth><inbound average='9'/></bandwidth></portgroup>";
    let direct = "<forward mode='private'><interface dev='eth0'/></forward>";
    assert_eq!(found(direct, more), ["3:1 /port/@isolated", "4:21 /portgroup/vlan"]);
    let cards = "<forward mode='hostdev'><driver name='kvm'/><pf dev='eth0'/></forward>";
    assert_eq!(found(cards, more), ["2:25 /forward/driver/@name", "3:1 /port/@isolated", "4:47 /portgroup/bandwidth"]);
    assert_eq!(found(direct, "<portgroup name='a'><bandwidth><inbound average='9'/></bandwidth></portgroup>"), [""; 0]);
}

/// `docs/NETWORK-XML.md`: what becomes of every element and attribute of the format, written from the lists that decide it.
/// With `UPDATE=1` in the environment the page is written anew, to be reviewed.
#[test]
fn n3_the_page_says_what_is_done() {
    let mut page = HEAD.to_owned();
    let mut whole: Vec<String> = Vec::new();
    for (path, attributes) in vocabulary() {
        if whole.iter().any(|parent| path.strip_prefix(&**parent).is_some_and(|rest| rest.starts_with('/'))) {
            continue;
        }
        let name = if path.is_empty() { "network" } else { &path };
        let (mut acts, mut kept, mut refused) = (Vec::new(), Vec::new(), Vec::new());
        match if path.is_empty() { Standing::Acts } else { standing(&path) } {
            Standing::Kept(why) => page += &format!("| [`{name}`] | | {why} | |\n"),
            Standing::Refused(why) => page += &format!("| [`{name}`] | | | {} |\n", why.trim_start_matches("is ")),
            Standing::Acts => {
                for attribute in attributes {
                    let place = if path.is_empty() { format!("@{attribute}") } else { format!("{path}/@{attribute}") };
                    match standing(&place) {
                        Standing::Acts => acts.push(format!("`{attribute}`")),
                        Standing::Kept(why) => kept.push(format!("`{attribute}`: {why}")),
                        Standing::Refused(why) => {
                            refused.push(format!("`{attribute}`: {}", why.trim_start_matches("is ")));
                        }
                    }
                }
                let acts = if acts.is_empty() { "yes".to_owned() } else { acts.join(" ") };
                page += &format!("| `{name}` | {acts} | {} | {} |\n", kept.join("; "), refused.join("; "));
                continue;
            }
        }
        whole.push(path);
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/NETWORK-XML.md");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(written == page, "docs/NETWORK-XML.md is not what the lists say: UPDATE=1 writes it anew");
}

const HEAD: &str = "# What becomes of network XML

Every element and attribute of libvirt's network format is known, stored and shown again. This page says what virtd does with
each: it *acts*; or it is *kept*, and asks for nothing at start; or it is *refused* by `Start` and reported by
`ValidateNetwork`, by name and with the reason. `DefineNetwork` stores all of it. What is not in the format is refused by
`DefineNetwork`, with line and column; so is what contradicts itself on any host (`tests/data/network/refused.txt` shows what is
said of each kind).

All modes act. A network of mode `nat` without `<ip>` gets one at its first start: the first free /24 from 192.168.122.0, which is
stored.

A network of mode `private`, `vepa`, `passthrough`, or `bridge` without a `<bridge name=>`, gives each card in it a device on one of the
host's (macvtap), and one of mode `hostdev` one of the host's cards itself: a virtual function of a network card, whose address
and VLAN the host sets. Which there are to choose from is said by `dev=` or `<interface dev=>`, for `hostdev` by `<address>` as well, and by
`<pf dev=>`, which stands for all virtual functions that this card has; it is looked up by `Start` and by `Update`, and
refused where one is not there, is in a bridge, or cannot be handed over; so is macvtap where the host's kernel has none.
Devices of `passthrough` and `hostdev` are one card's alone; others are shared, and the one that fewest cards have is chosen. What is
chosen is in the live document of the machine, whose card is of type `direct` or `hostdev` there and names its network still;
its stored one stays of type `network`. It is free again when the machine ends or the card is detached. A start that finds none free is refused
(`InUse`) and names who has each. Devices count that machines name themselves, too. What of a card the host cannot do with such a device, as
filters, or limits of a card of the host's, is refused by `Start` of the machine; a `<model>` is not, and is what the card is in a network of
another mode. `connections` of the live document counts all cards, and those on each `<interface>`; what was found for a `<pf>` is there as well.

On a session bus, without root, `nat` and none (isolated) act: bridge, rules and dnsmasq are in a user namespace and a network namespace
of the user's own, one of each for all of their networks, which the host does not see. What leaves a `nat` network goes out by pasta
(package `passt`), with the user's rights and the host's address; the host itself is not reached by the gateway's address, and nothing comes in from outside. pasta
takes addresses and routes of the host's device that has the default route, so that `<forward dev=>` can name that one alone; without such a route a
`nat` network does not start. Names are asked of the host's resolver. Every other mode, and all of them where there are no user namespaces for users, or no
`/dev/net/tun` that they may open, is refused by `Start`, which points to `<interface type='user'>`.

Why a network that is active cannot do its work is in `Problems`: `forward-blocked`, `input-blocked` where a chain that is not virtd's
drops its packets, with the line to add to that chain; `zone-lost`, `dhcp-down`, `bridge-gone`, `uplink-down`. It follows what others do with rules of
nftables, of which the kernel tells: Docker, ufw or firewalld may start later. Looked at is what there is when no change has come for a fifth of
a second, or two seconds after the first. Rules of the old iptables (`iptables-legacy`) are not seen, nor what is in a named set. In a
user's own namespaces, nobody else's rules are.

Where firewalld is on the system bus, or comes there, the bridge is put into a zone of its: the one of `<bridge zone=>`; without, into
`virt`, but not those of mode `open`, whose rules are all somebody else's. `virt` is shipped with virtd: it lets what guests send pass, and
lets them reach the host by DHCP, DNS, ping, ssh and tftp, and nothing else of it. The bridge is put there again when firewalld has read its
configuration anew, or answers after a silence; virtd does not wait for that to come up. Where it is in another zone, as one that somebody has
moved it to, or in none, where there is no such zone, or firewalld does not answer, `zone-lost` says what to do. virtd never starts firewalld; where it is not
there, a zone asks for nothing. Just installed, virtd's zone is known to a firewalld that runs after `firewall-cmd --reload`.

`<bandwidth>` of a network limits all its guests together, at the bridge that virtd makes: what passes between them and the host, or by the
host to others, but not what they send each other; that of a port group or card limits that card alone. Networks whose bridge is
another's, or that have none, are refused with it. `<vlan>` of a network is that of all cards whose port group has none: on a bridge of somebody else's
that looks at VLAN tags, which is refused by `Start` where it does not, and of virtual functions (`hostdev`).

What a network says of isolated ports and of VLANs, itself or in its port group, holds for every machine in it, whatever the machine's own
document says. Of bandwidth and MTU the machine's own count more; an MTU is the bridge's and the host's end's, and virtio cards alone are
told it.

The page is generated from the list in `service/model/network/standing.rs` (`UPDATE=1 cargo test -p virt-model --test
network`), and a test holds it to that. An element in brackets stands for itself and all below it.

| element | acts | kept | refused |
|---|---|---|---|
";
