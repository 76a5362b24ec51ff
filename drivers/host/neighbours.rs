//! Who is known on the host's networks: the kernel's own tables of neighbours, which it tells at once. No program is run for them.

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rustix::fd::OwnedFd;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};
use std::io;
use std::net::IpAddr;
use std::time::Duration;
use virt_model::domain::value::Mac;

/// How long the kernel may take, which does not have to ask anybody.
const PATIENCE: Duration = Duration::from_secs(2);
/// The most neighbours that are listened to: more than its tables hold unless somebody has made them larger.
const MOST: usize = 65_536;
/// The most that the kernel tells at once.
const AT_ONCE: usize = 64 << 10;

/// The neighbours that have answered, of IPv4 and of IPv6: hardware address and address.
pub fn known() -> io::Result<Vec<(Mac, IpAddr)>> {
    // Netlink's protocol 0 is that of routes and neighbours.
    let line = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&line, Timeout::Recv, Some(PATIENCE))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    send(&line, &in_bytes(header, RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default())), SendFlags::empty())?;
    hear_all(&line)
}

fn in_bytes(header: NetlinkHeader, message: RouteNetlinkMessage) -> Vec<u8> {
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn hear_all(line: &OwnedFd) -> io::Result<Vec<(Mac, IpAddr)>> {
    let (mut known, mut told) = (Vec::new(), vec![0; AT_ONCE]);
    while known.len() < MOST {
        let (length, _) = recv(line, told.as_mut_slice(), RecvFlags::empty())?;
        if length == 0 || !read(told.get(..length).unwrap_or_default(), &mut known)? {
            break;
        }
    }
    Ok(known)
}

/// Reads what was told at once. Whether more is to come.
fn read(mut told: &[u8], known: &mut Vec<(Mac, IpAddr)>) -> io::Result<bool> {
    while !told.is_empty() {
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(told).map_err(io::Error::other)?;
        match message.payload {
            NetlinkPayload::Done(_) => return Ok(false),
            NetlinkPayload::Error(error) => return Err(error.to_io()),
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(entry)) => known.extend(neighbour(&entry)),
            _ => {}
        }
        // Each begins at a multiple of four.
        told = told.get((message.header.length as usize).next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

/// One of them, if it has answered.
fn neighbour(entry: &NeighbourMessage) -> Option<(Mac, IpAddr)> {
    use NeighbourState::{Delay, Permanent, Probe, Reachable, Stale};
    if !matches!(entry.header.state, Reachable | Stale | Delay | Probe | Permanent) {
        return None;
    }
    let (mut mac, mut address) = (None, None);
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => address = Some(IpAddr::V4(*found)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => address = Some(IpAddr::V6(*found)),
            NeighbourAttribute::LinkLayerAddress(found) => mac = <[u8; 6]>::try_from(found.as_slice()).ok(),
            _ => {}
        }
    }
    Some((Mac(mac?), address?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(last: u8) -> Mac {
        Mac([0x52, 0x54, 0, 0, 0, last])
    }

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// As the kernel tells a neighbour; without a hardware address it has not answered yet.
    fn told(at: &str, state: NeighbourState, hardware: Option<u8>) -> Vec<u8> {
        let mut entry = NeighbourMessage::default();
        entry.header.state = state;
        let (family, at) = match address(at) {
            IpAddr::V4(at) => (netlink_packet_route::AddressFamily::Inet, NeighbourAddress::Inet(at)),
            IpAddr::V6(at) => (netlink_packet_route::AddressFamily::Inet6, NeighbourAddress::Inet6(at)),
        };
        entry.header.family = family;
        entry.attributes.push(NeighbourAttribute::Destination(at));
        entry.attributes.extend(hardware.map(|last| NeighbourAttribute::LinkLayerAddress(mac(last).0.to_vec())));
        in_bytes(NetlinkHeader::default(), RouteNetlinkMessage::NewNeighbour(entry))
    }

    #[test]
    fn neighbours_that_never_answered_are_not_known() {
        let all = [
            told("192.0.2.7", NeighbourState::Stale, Some(7)),
            told("192.0.2.8", NeighbourState::Incomplete, None),
            told("192.0.2.9", NeighbourState::Failed, Some(9)),
            told("fe80::7", NeighbourState::Reachable, Some(7)),
            told("fe80::a", NeighbourState::Permanent, Some(10)),
        ]
        .concat();
        let mut known = Vec::new();
        assert!(read(&all, &mut known).expect("it can be read"), "more may come");
        let all_known = [(mac(7), address("192.0.2.7")), (mac(7), address("fe80::7")), (mac(10), address("fe80::a"))];
        assert_eq!(known, all_known);
        let mut done = 20_u32.to_ne_bytes().to_vec();
        done.extend([3_u16, 2].into_iter().flat_map(u16::to_ne_bytes));
        done.resize(20, 0);
        assert!(!read(&done, &mut known).expect("it can be read"));
        // What is cut off is not read beyond its end.
        for end in 0..all.len() {
            let _ = read(&all[..end], &mut Vec::new());
        }
    }

    #[test]
    fn neighbours_are_told_by_the_kernel() {
        super::known().expect("the kernel answers");
    }
}
