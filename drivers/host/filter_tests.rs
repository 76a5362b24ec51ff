//! Filters of guests' cards by frames that go through, in a network namespace of the test's own: one card is filtered, one beside it
//! in the bridge is not.

use super::{FilterPlan, change, sweep};
use crate::host::tap::{TapPlan, open};
use crate::network::tests::{is_inside, run};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::OwnedFd;
use std::path::Path;
use virt_model::device::filter::{FilterName, FilterParameter, FilterRef, FilterVariable};
use virt_model::domain::value::Mac;

const OURS: Mac = Mac([0x52, 0x54, 0, 0, 0, 0x05]);
const OTHER: Mac = Mac([0x52, 0x54, 0, 0, 0, 0x06]);
const ALL: Mac = Mac([0xff; 6]);
const IP: u16 = 0x0800;
const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;
const IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const UDP: u8 = 17;

fn filter(name: FilterName) -> FilterRef {
    let parameter = |name, value: &str| FilterParameter { name, value: value.to_owned(), ..FilterParameter::default() };
    let parameters = vec![
        parameter(FilterVariable::Ip, "10.0.0.5"),
        parameter(FilterVariable::Ip, "10.0.0.55"),
        parameter(FilterVariable::Ipv6, "fd00::5"),
        parameter(
            FilterVariable::DhcpServer,
            if name == FilterName::AllowDhcpv6Server { "fd00::1" } else { "10.0.0.1" },
        ),
        parameter(FilterVariable::GatewayMac, &OTHER.to_string()),
    ];
    FilterRef { name, parameters, ..FilterRef::default() }
}

/// A guest's end of a card in the bridge.
struct Card(OwnedFd);

impl Card {
    fn new(name: &str, filter: Option<FilterName>) -> Card {
        let filter = filter.map(|name| FilterPlan::of(&self::filter(name), OURS));
        let plan = TapPlan {
            name: Some(name.to_owned()),
            bridge: Some("br0".to_owned()),
            queues: 1,
            filter,
            ..TapPlan::default()
        };
        Card(open(&plan).unwrap().remove(0))
    }

    fn send(&self, frame: &[u8]) {
        // Before each frame stands virtio's header, which asks for nothing.
        let sent = rustix::io::write(&self.0, &[&[0; 10], frame].concat()).unwrap();
        assert_eq!(sent, frame.len() + 10);
    }

    /// The frames that come up to and including `last`. What the kernel itself sends is among them.
    fn until(&self, last: &[u8]) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while all.last().is_none_or(|frame| frame != last) {
            let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
            let ready = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&patience)).unwrap();
            assert_eq!(ready, 1, "what is awaited does not come: {all:x?}");
            let mut room = [0; 2048];
            let length = rustix::io::read(&self.0, &mut room).unwrap();
            all.push(room[10..length].to_vec());
        }
        all
    }
}

fn frame(to: Mac, from: Mac, protocol: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = [&to.0[..], &from.0, &protocol.to_be_bytes(), body].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// A packet of IPv4, from port 68 to 67, of such a length that its frame needs no filling: a bridge may cut that off.
fn packet(to: Mac, from: Mac, source: [u8; 4], target: [u8; 4], protocol: u8) -> Vec<u8> {
    let mut head = [&[0x45, 0, 0, 46, 0, 0, 0, 0, 64, protocol, 0, 0][..], &source, &target].concat();
    let sum: u32 = head.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    head[10..12].copy_from_slice(&sum.to_be_bytes());
    frame(to, from, IP, &[&head[..], &[0, 68, 0, 67, 0, 26], &[0; 20]].concat())
}

/// A packet of IPv6 with nothing in it, of such a length, too: the bridge lets none pass that is malformed.
fn packet6(to: Mac, from: Mac) -> Vec<u8> {
    packet6_from(to, from, LINK6, 59)
}

/// The same from the address that begins and ends so, with such a protocol.
fn packet6_from(to: Mac, from: Mac, (net, last): ([u8; 2], u8), protocol: u8) -> Vec<u8> {
    let address = |net: [u8; 2], last: u8| [&net[..], &[0; 13], &[last]].concat();
    let head = [0x60, 0, 0, 0, 0, 6, protocol, 64];
    frame(to, from, IPV6, &[&head[..], &address(net, last), &address(LINK6.0, 6), &[0; 6]].concat())
}

/// fe80::5
const LINK6: ([u8; 2], u8) = ([0xfe, 0x80], 5);

/// A word of ARP, or of RARP.
fn arp(from: Mac, protocol: u16, word: u8, sender: (Mac, [u8; 4]), target: (Mac, [u8; 4])) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, word];
    frame(ALL, from, protocol, &[&head[..], &sender.0.0, &sender.1, &target.0.0, &target.1].concat())
}

const HERE: [u8; 4] = [10, 0, 0, 5];
const THERE: [u8; 4] = [10, 0, 0, 6];
const NOBODY: [u8; 4] = [0; 4];

/// Which of the frames go through, from one card to the other; the last one must.
fn passed(from: &Card, to: &Card, frames: &[Vec<u8>]) -> Vec<bool> {
    frames.iter().for_each(|frame| from.send(frame));
    let came = to.until(frames.last().unwrap());
    frames.iter().map(|frame| came.contains(frame)).collect()
}

/// Another filter in the place of the first one, which a failure leaves; then none, and then the first one again.
fn another_filter_takes_its_place(clean: &Card, beside: &Card) {
    let plan = |name| FilterPlan::of(&filter(name), OURS);
    let somebody = Mac([0x52, 0x54, 0, 0, 0, 8]);
    let any_address = [packet(OTHER, somebody, HERE, THERE, TCP), packet(OTHER, OURS, THERE, HERE, TCP)];
    change("clean", Some(&plan(FilterName::NoMacSpoofing))).unwrap();
    assert_eq!(passed(clean, beside, &any_address), [false, true]);
    let broken = FilterPlan { from_guest: vec!["drop".to_owned(), "no rule".to_owned()], ..FilterPlan::default() };
    assert!(change("clean", Some(&broken)).unwrap_err().to_string().contains("nft does not take its filter"));
    assert_eq!(passed(clean, beside, &any_address), [false, true]);
    for _ in 0..2 {
        change("clean", None).unwrap();
        assert_eq!(passed(clean, beside, &any_address), [true, true]);
    }
    change("clean", Some(&plan(FilterName::CleanTraffic))).unwrap();
}

/// Waits until a card that is dropped has gone.
fn is_gone(card: &str) {
    // A thread that makes a process has copies of what is open, until it ends; nothing tells of that.
    while Path::new("/sys/class/net").join(card).exists() {
        std::thread::yield_now();
    }
}

#[test]
fn what_is_false_stays_out_and_what_is_right_passes() {
    if !is_inside("host::filter::tests::what_is_false_stays_out_and_what_is_right_passes") {
        return;
    }
    run("ip link add br0 type bridge forward_delay 0 stp_state 0 mcast_snooping 0");
    run("ip link set br0 up");
    let beside = Card::new("beside", None);
    let clean = Card::new("clean", Some(FilterName::CleanTraffic));
    let right = packet(OTHER, OURS, HERE, THERE, TCP);
    let from_guest = [
        (packet(OTHER, OTHER, HERE, THERE, TCP), false),
        (packet(OTHER, OURS, THERE, HERE, TCP), false),
        (packet(ALL, OURS, NOBODY, [255; 4], TCP), false),
        (packet(ALL, OURS, NOBODY, [255; 4], UDP), true),
        (packet(OTHER, OURS, [10, 0, 0, 55], THERE, UDP), true),
        (arp(OURS, ARP, 1, (OURS, HERE), (Mac::default(), THERE)), true),
        (arp(OURS, ARP, 1, (OURS, THERE), (Mac::default(), HERE)), false),
        (arp(OURS, ARP, 1, (OTHER, HERE), (Mac::default(), THERE)), false),
        (arp(OURS, RARP, 3, (OURS, NOBODY), (OURS, NOBODY)), true),
        (arp(OURS, RARP, 3, (OTHER, NOBODY), (OTHER, NOBODY)), false),
        (packet6(OTHER, OURS), false),
        (right.clone(), true),
    ];
    let (frames, expected): (Vec<_>, Vec<_>) = from_guest.into_iter().unzip();
    assert_eq!(passed(&clean, &beside, &frames), expected, "from the guest");
    let to_guest = [packet6(OURS, OTHER), packet(OURS, OTHER, THERE, HERE, TCP)];
    assert_eq!(passed(&beside, &clean, &to_guest), [false, true], "to the guest");

    // Another card with another filter; the first one's goes with it, and filters nobody of the same name.
    let only = Card::new("only", Some(FilterName::NoMacSpoofing));
    let own = [packet(OTHER, OTHER, THERE, HERE, TCP), packet6(OTHER, OURS)];
    assert_eq!(passed(&only, &beside, &own), [false, true]);
    another_filter_takes_its_place(&clean, &beside);
    assert_eq!(passed(&only, &beside, &own), [false, true], "that of the other card stays");
    drop(clean);
    is_gone("clean");
    let anew = Card::new("clean", None);
    let false_now = [packet(OTHER, OURS, THERE, HERE, TCP), right.clone()];
    assert_eq!(passed(&anew, &beside, &false_now), [true, true]);
    assert_eq!(run("nft list tables").matches("virt_tap_").count(), 2, "one is left of what has gone");
    sweep().unwrap();
    assert_eq!(run("nft list tables").matches("virt_tap_").count(), 1);
    assert_eq!(passed(&only, &beside, &own), [false, true], "who is there is held to it still");
    drop((only, anew));

    let quiet = Card::new("quiet", Some(FilterName::NoMacBroadcast));
    let called = [packet(ALL, OURS, HERE, [255; 4], UDP), right.clone()];
    assert_eq!(passed(&quiet, &beside, &called), [false, true]);
    let gateway = Card::new("gateway", Some(FilterName::CleanTrafficGateway));
    let elsewhere = [packet(Mac([0x52, 0x54, 0, 0, 0, 7]), OURS, HERE, THERE, UDP), right];
    assert_eq!(passed(&gateway, &beside, &elsewhere), [false, true]);
    let six = Card::new("six", Some(FilterName::NoIpv6Spoofing));
    let (own, link, false_one) = (([0xfd, 0], 5), LINK6, ([0xfd, 0], 6));
    let from6 = |address, protocol| packet6_from(OTHER, OURS, address, protocol);
    let frames = [
        (from6(false_one, UDP), false),
        (from6(link, TCP), false),
        (from6(link, UDP), true),
        (packet(OTHER, OURS, THERE, HERE, TCP), true),
        (from6(own, TCP), true),
    ];
    let (frames, expected): (Vec<_>, Vec<_>) = frames.into_iter().unzip();
    assert_eq!(passed(&six, &beside, &frames), expected);
    let none = Card::new("none", Some(FilterName::NoIpv6Multicast));
    let mut to_all = from6(own, UDP);
    to_all[38] = 0xff;
    assert_eq!(passed(&none, &beside, &[to_all, from6(own, UDP)]), [false, true]);
    drop((quiet, gateway, six, none));
    // nft takes all of them.
    FilterName::ALL.iter().enumerate().for_each(|(n, name)| drop(Card::new(&format!("each{n}"), Some(*name))));
    sweep().unwrap();
    assert_eq!(run("nft list tables").matches("virt_tap_").count(), 0);
}

#[test]
fn a_table_replaces_itself_and_is_of_one_device() {
    let script = FilterPlan::of(&filter(FilterName::NoMacSpoofing), OURS).script(17);
    assert_eq!(script.matches("add table bridge virt_tap_17").count(), 2, "{script}");
    assert!(script.contains("from_guest iif != 17 accept ; "), "{script}");
    assert!(script.contains("from_guest ether saddr != { 52:54:00:00:00:05 } drop"), "{script}");
    assert!(script.ends_with("to_guest oif != 17 accept"), "all goes to the guest: {script}");
}
