//! `<interface><filterref>`: what may pass a card, by the name of one of the filters that libvirt ships.

use crate::domain::part::element;
use crate::domain::value::{Mac, Value as _, choices};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

choices! {
    /// A filter that libvirt ships.
    pub enum FilterName {
        CleanTraffic = "clean-traffic", CleanTrafficGateway = "clean-traffic-gateway",
        NoMacSpoofing = "no-mac-spoofing", NoIpSpoofing = "no-ip-spoofing", NoArpSpoofing = "no-arp-spoofing",
        NoArpMacSpoofing = "no-arp-mac-spoofing", NoArpIpSpoofing = "no-arp-ip-spoofing",
        NoMacBroadcast = "no-mac-broadcast", NoIpMulticast = "no-ip-multicast",
        NoOtherL2Traffic = "no-other-l2-traffic", NoOtherRarpTraffic = "no-other-rarp-traffic",
        AllowArp = "allow-arp", AllowIpv4 = "allow-ipv4", AllowIncomingIpv4 = "allow-incoming-ipv4",
        AllowDhcp = "allow-dhcp", AllowDhcpServer = "allow-dhcp-server",
        NoIpv6Spoofing = "no-ipv6-spoofing", NoIpv6Multicast = "no-ipv6-multicast", AllowIpv6 = "allow-ipv6",
        AllowIncomingIpv6 = "allow-incoming-ipv6", AllowDhcpv6 = "allow-dhcpv6",
        AllowDhcpv6Server = "allow-dhcpv6-server",
        QemuAnnounceSelf = "qemu-announce-self", QemuAnnounceSelfRarp = "qemu-announce-self-rarp",
    }
}

choices! {
    /// What a filter may be told.
    pub enum FilterVariable {
        Ip = "IP", Ipv6 = "IPV6", Mac = "MAC", DhcpServer = "DHCPSERVER", GatewayMac = "GATEWAY_MAC",
    }
}

impl FilterName {
    /// What it must be told; the card's own hardware address it knows.
    pub fn needs(self) -> &'static [FilterVariable] {
        match self {
            FilterName::CleanTrafficGateway => &[FilterVariable::Ip, FilterVariable::GatewayMac],
            FilterName::CleanTraffic
            | FilterName::NoIpSpoofing
            | FilterName::NoArpSpoofing
            | FilterName::NoArpIpSpoofing => &[FilterVariable::Ip],
            FilterName::NoIpv6Spoofing => &[FilterVariable::Ipv6],
            FilterName::AllowDhcpServer | FilterName::AllowDhcpv6Server => &[FilterVariable::DhcpServer],
            _ => &[],
        }
    }
}

element! {
    /// `<filterref>`
    pub struct FilterRef {
        /// Which filter.
        need "filter" => name: FilterName,
        /// What it is told; several of a name are all meant.
        children "parameter" => parameters: Vec<FilterParameter>,
    }
}

element! {
    /// `<filterref><parameter>`
    pub struct FilterParameter {
        /// What it says.
        need "name" => name: FilterVariable,
        /// An address.
        need "value" => value: String,
    }
}

impl FilterRef {
    /// The first thing that it must be told and is not.
    pub fn missing(&self) -> Option<FilterVariable> {
        let says = |variable: FilterVariable| self.parameters.iter().any(|one| one.name == variable);
        self.name.needs().iter().copied().find(|variable| !says(*variable))
    }

    fn values(&self, variable: FilterVariable) -> impl Iterator<Item = &str> {
        self.parameters.iter().filter(move |one| one.name == variable).map(|one| one.value.as_str())
    }

    /// A server of the other family than the filter's.
    pub fn odd_server(&self) -> Option<&FilterParameter> {
        let is_odd = match self.name {
            FilterName::AllowDhcpServer => is_ipv6_address,
            FilterName::AllowDhcpv6Server => is_address,
            _ => return None,
        };
        self.parameters.iter().find(|one| one.name == FilterVariable::DhcpServer && is_odd(&one.value))
    }

    /// The addresses of a family that it is told so.
    pub fn addresses<A: FromStr>(&self, variable: FilterVariable) -> Vec<A> {
        self.values(variable).filter_map(|value| value.parse().ok()).collect()
    }

    /// The hardware addresses that it is told so.
    pub fn macs(&self, variable: FilterVariable) -> Vec<Mac> {
        self.values(variable).filter_map(|value| Mac::from_text(value).ok()).collect()
    }
}

/// Whether that is an IPv4 address, as parameters say it.
pub fn is_address(text: &str) -> bool {
    text.parse::<Ipv4Addr>().is_ok()
}

/// The same of IPv6.
pub fn is_ipv6_address(text: &str) -> bool {
    text.parse::<Ipv6Addr>().is_ok()
}

/// Whether that is an address of either.
pub fn is_address_of_any_family(text: &str) -> bool {
    is_address(text) || is_ipv6_address(text)
}

/// Whether that is a hardware address.
pub fn is_mac(text: &str) -> bool {
    Mac::from_text(text).is_ok()
}
