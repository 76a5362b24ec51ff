//! Who is known on the host's networks: its table of IPv4 neighbours, as the kernel tells it, which answers at once.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use virt_model::domain::value::{Mac, Value as _};

/// The neighbours that have answered: hardware address and address.
pub fn known() -> io::Result<Vec<(Mac, Ipv4Addr)>> {
    Ok(read(&fs::read_to_string("/proc/net/arp")?))
}

/// A line each: address, kind of hardware, flags, hardware address, mask, device.
fn read(table: &str) -> Vec<(Mac, Ipv4Addr)> {
    const COMPLETE: u32 = 2;
    let neighbour = |line: &str| {
        let mut words = line.split_whitespace();
        let (address, flags, mac) = (words.next()?, words.nth(1)?, words.next()?);
        let flags = u32::from_str_radix(flags.strip_prefix("0x")?, 16).ok()?;
        (flags & COMPLETE != 0).then_some((Mac::from_text(mac).ok()?, address.parse().ok()?))
    };
    table.lines().filter_map(neighbour).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_that_never_answered_are_not_known() {
        let table = "IP address       HW type     Flags       HW address            Mask     Device\n\
                     192.0.2.7        0x1         0x2         52:54:00:00:00:07     *        br0\n\
                     192.0.2.8        0x1         0x0         00:00:00:00:00:00     *        br0\n\
                     192.0.2.9        0x1         0x6         52:54:00:00:00:09     *        br1\n";
        let mac = |last| Mac([0x52, 0x54, 0, 0, 0, last]);
        assert_eq!(read(table), [(mac(7), Ipv4Addr::new(192, 0, 2, 7)), (mac(9), Ipv4Addr::new(192, 0, 2, 9))]);
        assert_eq!(read("nonsense\n\n0x2 0x2 0x2 0x2"), []);
        known().expect("the host has such a table");
    }
}
