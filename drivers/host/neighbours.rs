//! Who is known on the host's networks: the kernel's own tables of neighbours, which it tells at once. No program is run for them.

use rustix::fd::OwnedFd;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;
use virt_model::domain::value::{Mac, Value as _};

/// The neighbours that have answered: hardware address and address.
pub fn known() -> io::Result<Vec<(Mac, IpAddr)>> {
    let mut known = of_ipv4(&fs::read_to_string("/proc/net/arp")?);
    // Of these there is no file. A host without IPv6 knows none.
    match ask_ipv6() {
        Ok(more) => known.extend(more),
        Err(error) => tracing::debug!(%error, "neighbours by IPv6 are not known"),
    }
    Ok(known)
}

/// A line each: address, kind of hardware, flags, hardware address, mask, device.
fn of_ipv4(table: &str) -> Vec<(Mac, IpAddr)> {
    const COMPLETE: u32 = 2;
    let neighbour = |line: &str| {
        let mut words = line.split_whitespace();
        let (address, flags, mac) = (words.next()?, words.nth(1)?, words.next()?);
        let flags = u32::from_str_radix(flags.strip_prefix("0x")?, 16).ok()?;
        (flags & COMPLETE != 0).then_some((Mac::from_text(mac).ok()?, address.parse().ok()?))
    };
    table.lines().filter_map(neighbour).collect()
}

/// How long the kernel may take, which does not have to ask anybody.
const PATIENCE: Duration = Duration::from_secs(2);
/// The most neighbours that are listened to: more than its table holds unless somebody has made that larger.
const MOST: usize = 65_536;

/// The words of rtnetlink(7) for that.
const GET_NEIGHBOURS: u16 = 30;
const NEIGHBOUR: u16 = 28;
const DONE: u16 = 3;
const ERROR: u16 = 2;
const REQUEST_ALL: u16 = 0x301;
const INET6: u8 = 10;
/// Reachable, or was: stale, delayed, probed, permanent.
const ANSWERED: u16 = 0x02 | 0x04 | 0x08 | 0x10 | 0x80;
const ADDRESS: u16 = 1;
const HARDWARE: u16 = 2;
const MESSAGE: usize = 16;
const ENTRY: usize = 12;

/// A table of IPv6, as the kernel tells it over netlink.
fn ask_ipv6() -> io::Result<Vec<(Mac, IpAddr)>> {
    // Netlink's protocol 0 is that of routes and neighbours.
    let line = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&line, Timeout::Recv, Some(PATIENCE))?;
    let mut asked = Vec::with_capacity(MESSAGE + ENTRY);
    asked.extend(28_u32.to_ne_bytes());
    asked.extend([GET_NEIGHBOURS, REQUEST_ALL].into_iter().flat_map(u16::to_ne_bytes));
    asked.extend([0; 8]);
    asked.push(INET6);
    asked.resize(MESSAGE + ENTRY, 0);
    send(&line, &asked, SendFlags::empty())?;
    hear_all(&line)
}

fn hear_all(line: &OwnedFd) -> io::Result<Vec<(Mac, IpAddr)>> {
    let (mut known, mut told) = (Vec::new(), vec![0; 64 << 10]);
    while known.len() < MOST {
        let (length, _) = recv(line, told.as_mut_slice(), RecvFlags::empty())?;
        if length == 0 || !of_ipv6(told.get(..length).unwrap_or_default(), &mut known) {
            break;
        }
    }
    Ok(known)
}

/// Reads what was told at once. Whether more is to come.
fn of_ipv6(mut told: &[u8], known: &mut Vec<(Mac, IpAddr)>) -> bool {
    while let Some((message, rest)) = part(told, 4, |head| u32_at(head, 0)) {
        match u16_at(message, 4) {
            Some(DONE | ERROR) | None => return false,
            Some(NEIGHBOUR) => known.extend(neighbour(message)),
            Some(_) => {}
        }
        told = rest;
    }
    true
}

/// One of them, if it has answered.
fn neighbour(message: &[u8]) -> Option<(Mac, IpAddr)> {
    let entry = message.get(MESSAGE..)?;
    if *entry.first()? != INET6 || u16_at(entry, 8)? & ANSWERED == 0 {
        return None;
    }
    let (mut mac, mut address) = (None, None);
    let mut attributes = entry.get(ENTRY..)?;
    while let Some((attribute, rest)) = part(attributes, 4, |head| u16_at(head, 0).map(u32::from)) {
        let value = attribute.get(4..)?;
        match u16_at(attribute, 2)? {
            ADDRESS => address = <[u8; 16]>::try_from(value).ok(),
            HARDWARE => mac = <[u8; 6]>::try_from(value).ok(),
            _ => {}
        }
        attributes = rest;
    }
    Some((Mac(mac?), IpAddr::V6(Ipv6Addr::from(address?))))
}

/// The first part of what is told, which begins with its length, and what is behind it: each begins at a multiple of four.
fn part(told: &[u8], least: usize, length: impl Fn(&[u8]) -> Option<u32>) -> Option<(&[u8], &[u8])> {
    let length = usize::try_from(length(told)?).ok().filter(|length| *length >= least)?;
    Some((told.get(..length)?, told.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
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

    #[test]
    fn neighbours_that_never_answered_are_not_known() {
        let table = "IP address       HW type     Flags       HW address            Mask     Device\n\
                     192.0.2.7        0x1         0x2         52:54:00:00:00:07     *        br0\n\
                     192.0.2.8        0x1         0x0         00:00:00:00:00:00     *        br0\n\
                     192.0.2.9        0x1         0x6         52:54:00:00:00:09     *        br1\n";
        assert_eq!(of_ipv4(table), [(mac(7), address("192.0.2.7")), (mac(9), address("192.0.2.9"))]);
        assert_eq!(of_ipv4("nonsense\n\n0x2 0x2 0x2 0x2"), []);
        known().expect("the host has such tables");
        ask_ipv6().expect("the kernel answers");
    }

    /// As the kernel tells a neighbour; without a hardware address it has not answered yet.
    fn told(last: u8, state: u16, hardware: bool) -> Vec<u8> {
        let mut entry = vec![INET6, 0, 0, 0, 7, 0, 0, 0];
        entry.extend(state.to_ne_bytes());
        entry.extend([0, 1]);
        entry.extend([20_u16, ADDRESS].into_iter().flat_map(u16::to_ne_bytes));
        entry.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        if hardware {
            entry.extend([10_u16, HARDWARE].into_iter().flat_map(u16::to_ne_bytes));
            entry.extend([0x52, 0x54, 0, 0, 0, last, 0, 0]);
        }
        let mut message = u32::try_from(MESSAGE + entry.len()).expect("few").to_ne_bytes().to_vec();
        message.extend([NEIGHBOUR, 2].into_iter().flat_map(u16::to_ne_bytes));
        message.extend([0; 8]);
        message.extend(entry);
        message
    }

    #[test]
    fn of_ipv6_the_kernel_tells_them_in_messages() {
        let mut known = Vec::new();
        let all = [told(7, 0x04, true), told(8, 0x01, false), told(9, 0x20, true), told(10, 0x02, true)].concat();
        assert!(of_ipv6(&all, &mut known), "more may come");
        assert_eq!(known, [(mac(7), address("fe80::7")), (mac(10), address("fe80::a"))]);
        let mut done = 20_u32.to_ne_bytes().to_vec();
        done.extend([DONE, 2].into_iter().flat_map(u16::to_ne_bytes));
        done.resize(20, 0);
        assert!(!of_ipv6(&done, &mut known));
        // What is cut off, or says a length of its own, is not read beyond its end.
        for end in 0..all.len() {
            of_ipv6(&all[..end], &mut Vec::new());
        }
        let mut odd = told(7, 0x02, true);
        odd[..4].copy_from_slice(&3_u32.to_ne_bytes());
        known.clear();
        of_ipv6(&odd, &mut known);
        assert_eq!(known, []);
    }
}
