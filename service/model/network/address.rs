//! Addresses, and the nets that they are in.

use crate::domain::value::Value;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

impl Value for IpAddr {
    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| "an IP address such as 192.168.122.1 or fd00::1".to_owned())
    }

    fn to_text(&self) -> String {
        self.to_string()
    }
}

/// A net: the addresses that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Net {
    /// Its first address.
    pub first: IpAddr,
    /// How many bits are the net's.
    pub prefix: u8,
}

/// How many bits an address of that kind has.
pub fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// An address as a number, in the lowest bits.
pub fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

impl Net {
    /// The net that an address is in.
    pub fn of(address: IpAddr, prefix: u8) -> Net {
        let prefix = prefix.min(bits(address));
        let mask = mask(bits(address), prefix);
        Net { first: with_number(address, number(address) & mask), prefix }
    }

    /// Its last address: IPv4's broadcast.
    pub fn last(&self) -> IpAddr {
        let width = bits(self.first);
        with_number(self.first, number(self.first) | !mask(width, self.prefix) & mask(width, width))
    }

    /// Whether an address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.first.is_ipv4() && Net::of(address, self.prefix).first == self.first
    }

    /// The first /24 from 192.168.122.0 that is not taken.
    pub fn first_free(is_taken: impl Fn(&Net) -> bool) -> Option<Net> {
        let nets = (122..=255).map(|third| Net { first: IpAddr::from([192, 168, third, 0]), prefix: 24 });
        nets.into_iter().find(|net| !is_taken(net))
    }

    /// Whether they have addresses in common.
    pub fn overlaps(&self, other: &Net) -> bool {
        if self.prefix <= other.prefix { self.contains(other.first) } else { other.contains(self.first) }
    }

    /// Whether an address is one that a host in it can have: IPv4 keeps the first and the last for itself.
    pub fn can_be_a_hosts(&self, address: IpAddr) -> bool {
        let kept = address.is_ipv4() && self.prefix < 31 && (address == self.first || address == self.last());
        self.contains(address) && !kept
    }

    /// IPv4's mask of it; of IPv6 all bits are said to be the host's.
    pub fn netmask(&self) -> Ipv4Addr {
        if self.first.is_ipv6() { Ipv4Addr::UNSPECIFIED } else { Ipv4Addr::from(mask(32, self.prefix) as u32) }
    }
}

impl std::fmt::Display for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.first, self.prefix)
    }
}

impl std::str::FromStr for Net {
    type Err = String;

    /// Reads `192.168.122.0/24`, or a single address.
    fn from_str(text: &str) -> Result<Net, String> {
        let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let address = IpAddr::from_text(address)?;
        let prefix = prefix.map_or(Ok(bits(address)), str::parse).map_err(|_| format!("'{text}' is no net"))?;
        if prefix > bits(address) { Err(format!("'{text}' is no net")) } else { Ok(Net::of(address, prefix)) }
    }
}

/// How many bits are the net's by IPv4's mask; nothing if it is none.
pub fn prefix_of(netmask: IpAddr) -> Option<u8> {
    let IpAddr::V4(netmask) = netmask else { return None };
    let ones = u32::from(netmask).leading_ones();
    (u32::from(netmask).count_ones() == ones).then(|| u8::try_from(ones).unwrap_or(32))
}

fn mask(width: u8, prefix: u8) -> u128 {
    let whole = if width == 128 { u128::MAX } else { (1 << width) - 1 };
    let below = u32::from(width - prefix.min(width));
    if below >= 128 { 0 } else { whole >> below << below & whole }
}

fn with_number(like: IpAddr, number: u128) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX))),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(number)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Net {
        text.parse().unwrap()
    }

    #[test]
    fn nets_and_what_is_in_them() {
        let home: Net = Net::of("192.168.122.1".parse().unwrap(), 24);
        assert_eq!(home.to_string(), "192.168.122.0/24");
        assert_eq!(
            (home.last().to_string(), home.netmask().to_string()),
            ("192.168.122.255".into(), "255.255.255.0".into())
        );
        assert!(home.can_be_a_hosts("192.168.122.254".parse().unwrap()));
        for no in ["192.168.122.0", "192.168.122.255", "192.168.123.1", "::1"] {
            assert!(!home.can_be_a_hosts(no.parse().unwrap()), "{no}");
        }
        assert!(home.overlaps(&net("192.168.0.0/16")) && net("192.168.0.0/16").overlaps(&home));
        assert!(!home.overlaps(&net("192.168.123.0/24")) && !home.overlaps(&net("::/0")));
        assert!(
            net("0.0.0.0/0").contains("8.8.8.8".parse().unwrap()) && net("::/0").contains("fd00::1".parse().unwrap())
        );
        assert_eq!(net("fd00:1::17/64").to_string(), "fd00:1::/64");
        assert_eq!(net("fd00:1::/64").last().to_string(), "fd00:1::ffff:ffff:ffff:ffff");
        assert!("10.0.0.0/33".parse::<Net>().is_err() && "10.0.0/8".parse::<Net>().is_err());
    }

    #[test]
    fn masks() {
        let prefix = |text: &str| prefix_of(text.parse().unwrap());
        assert_eq!(
            (prefix("255.255.255.0"), prefix("0.0.0.0"), prefix("255.255.255.255")),
            (Some(24), Some(0), Some(32))
        );
        assert_eq!((prefix("255.0.255.0"), prefix("ffff::")), (None, None));
    }
}
