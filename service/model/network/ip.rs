//! `<ip>` and `<route>`: the host's address in a network, what guests are given of it, and what lies behind them.

use super::address::{Net, bits, prefix_of};
use super::forward::Address;
use crate::device::interface::Family;
use crate::domain::part::element;
use crate::domain::value::{Mac, choices};
use std::net::IpAddr;

element! {
    /// `<ip>`
    pub struct NetworkIp {
        /// The host's address.
        attr "address" => address: Option<IpAddr>,
        /// Which kind.
        attr "family" => family: Option<Family>,
        /// Which bits are the network's.
        attr "netmask" => netmask: Option<IpAddr>,
        /// How many bits are.
        attr "prefix" => prefix: Option<u8>,
        /// Names of addresses are answered for here alone, and not asked for elsewhere.
        yes_no "localPtr" => local_ptr: Option<bool>,
        /// `<tftp>`
        child "tftp" => tftp: Option<Tftp>,
        /// `<dhcp>`
        child "dhcp" => dhcp: Option<Dhcp>,
    }
}

impl NetworkIp {
    /// The network that it is in; nothing if it is without an address.
    pub fn net(&self) -> Option<Net> {
        self.address.map(|address| Net::of(address, self.prefix_bits()))
    }

    /// How many bits are the network's. Where nothing is said it is as IPv4 once had it for such addresses, and 64 for IPv6.
    pub fn prefix_bits(&self) -> u8 {
        let said = self.prefix.or_else(|| self.netmask.and_then(prefix_of));
        let Some(address) = self.address else { return said.unwrap_or(0) };
        let usual = match address {
            IpAddr::V4(address) => match address.octets()[0] {
                0..=127 => 8,
                128..=191 => 16,
                _ => 24,
            },
            IpAddr::V6(_) => 64,
        };
        said.unwrap_or(usual).min(bits(address))
    }

    /// Whether it is of IPv6.
    pub fn is_v6(&self) -> bool {
        self.address.map_or(self.family == Some(Family::Ipv6), |address| address.is_ipv6())
    }

    /// What it says of addresses that guests are given, if it says anything.
    pub fn served(&self) -> Option<&Dhcp> {
        self.dhcp.as_ref().filter(|dhcp| !dhcp.ranges.is_empty() || !dhcp.hosts.is_empty())
    }
}

element! {
    /// `<tftp>`
    pub struct Tftp {
        /// The folder that guests may read files of.
        need "root" => root: String,
    }
}

element! {
    /// `<dhcp>`
    pub struct Dhcp {
        /// `<range>`
        children "range" => ranges: Vec<DhcpRange>,
        /// `<host>`
        children "host" => hosts: Vec<DhcpHost>,
        /// `<bootp>`
        child "bootp" => bootp: Option<Bootp>,
    }
}

element! {
    /// `<dhcp><range>`
    pub struct DhcpRange {
        /// The first address.
        need "start" => start: Address,
        /// The last.
        need "end" => end: Address,
        /// `<lease>`
        child "lease" => lease: Option<LeaseTime>,
    }
}

element! {
    /// `<dhcp><host>`
    pub struct DhcpHost {
        /// Its card.
        attr "mac" => mac: Option<Mac>,
        /// Of IPv6: what it calls itself.
        attr "id" => id: Option<String>,
        /// What it is called.
        attr "name" => name: Option<String>,
        /// What it is given.
        attr "ip" => ip: Option<IpAddr>,
        /// `<lease>`
        child "lease" => lease: Option<LeaseTime>,
    }
}

choices! {
    /// In what a time is counted.
    pub enum TimeUnit { Minutes = "minutes", Seconds = "seconds", Hours = "hours", }
}

element! {
    /// `<lease>`: for how long an address is given.
    pub struct LeaseTime {
        /// How many of the unit; 0 for ever.
        need "expiry" => expiry: u32,
        /// Minutes if absent.
        attr "unit" => unit: Option<TimeUnit>,
    }
}

impl LeaseTime {
    /// In seconds; 0: for ever.
    pub fn seconds(&self) -> u64 {
        let each = match self.unit.unwrap_or_default() {
            TimeUnit::Seconds => 1,
            TimeUnit::Minutes => 60,
            TimeUnit::Hours => 3600,
        };
        u64::from(self.expiry) * each
    }
}

element! {
    /// `<bootp>`
    pub struct Bootp {
        /// What a guest boots from.
        need "file" => file: String,
        /// Who has it; the host if absent.
        attr "server" => server: Option<String>,
    }
}

element! {
    /// `<route>`
    pub struct Route {
        /// Which kind.
        attr "family" => family: Option<Family>,
        /// An address of the net that lies behind.
        need "address" => address: Address,
        /// Which bits are the net's.
        attr "netmask" => netmask: Option<IpAddr>,
        /// How many bits are.
        attr "prefix" => prefix: Option<u8>,
        /// Through whom.
        need "gateway" => gateway: Address,
        /// The less it is, the sooner the route is taken.
        attr "metric" => metric: Option<u32>,
    }
}

impl Route {
    /// The net that lies behind.
    pub fn net(&self) -> Net {
        let whole = if self.address.0.is_unspecified() { 0 } else { bits(self.address.0) };
        let said = self.prefix.or_else(|| self.netmask.and_then(prefix_of));
        Net::of(self.address.0, said.unwrap_or(whole))
    }
}
