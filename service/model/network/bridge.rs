//! `<bridge>` and what else is said of the host's device and of guests' ports.

use crate::device::interface::{Bandwidth, Vlan};
use crate::domain::part::element;
use crate::domain::value::{Mac, choices};

choices! {
    /// Who keeps the table of hardware addresses.
    pub enum MacTable { Kernel = "kernel", Libvirt = "libvirt", }
}

element! {
    /// `<bridge>`
    pub struct NetworkBridge {
        /// The host's device.
        attr "name" => name: Option<String>,
        /// Loops are looked for; so it is if absent.
        on_off "stp" => stp: Option<bool>,
        /// For how many seconds a new port is only listened to.
        attr "delay" => delay: Option<u32>,
        /// The zone of firewalld's that it is put into.
        attr "zone" => zone: Option<String>,
        /// Who keeps the table of hardware addresses.
        attr "macTableManager" => mac_table: Option<MacTable>,
    }
}

element! {
    /// `<mac>`
    pub struct NetworkMac {
        /// The bridge's hardware address.
        need "address" => address: Mac,
    }
}

element! {
    /// `<mtu>`
    pub struct NetworkMtu {
        /// In bytes.
        need "size" => size: u32,
    }
}

element! {
    /// `<port>`
    pub struct NetworkPort {
        /// Guests do not see each other.
        yes_no "isolated" => isolated: Option<bool>,
    }
}

element! {
    /// `<portgroup>`: what some of the guests have in common.
    pub struct PortGroup {
        /// What cards name it by.
        need "name" => name: String,
        /// Cards that name none are in it.
        yes_no "default" => default: Option<bool>,
        /// Guests may change their hardware addresses.
        yes_no "trustGuestRxFilters" => trust_filters: Option<bool>,
        /// `<vlan>`
        child "vlan" => vlan: Option<Vlan>,
        /// `<bandwidth>`
        child "bandwidth" => bandwidth: Option<Bandwidth>,
    }
}
