//! `<forward>`: how packets leave a network.

use super::NetworkDef;
use crate::device::hostdev::HostAddress;
use crate::domain::part::element;
use crate::domain::value::{Value, choices};
use std::net::IpAddr;

choices! {
    /// How packets leave.
    pub enum ForwardMode {
        Nat = "nat", None = "none", Route = "route", Open = "open", Bridge = "bridge", Private = "private", Vepa = "vepa",
        Passthrough = "passthrough", Hostdev = "hostdev",
    }
}

element! {
    /// `<forward>`
    pub struct Forward {
        /// Only by this device of the host's.
        attr "dev" => dev: Option<String>,
        /// How; `nat` if it is not said.
        attr "mode" => mode: Option<ForwardMode>,
        /// Of `hostdev`: the host's cards are taken from their drivers and given back.
        yes_no "managed" => managed: Option<bool>,
        /// `<nat>`
        child "nat" => nat: Option<Nat>,
        /// `<interface>`: devices of the host's to choose from.
        children "interface" => interfaces: Vec<ForwardInterface>,
        /// `<address>`: cards of the host's to choose from.
        children "address" => addresses: Vec<HostAddress>,
    }
}

element! {
    /// `<forward><nat>`
    pub struct Nat {
        /// IPv6, too.
        yes_no "ipv6" => ipv6: Option<bool>,
        /// `<address>`: what guests' packets come from, as others see them.
        children "address" => addresses: Vec<NatAddress>,
        /// `<port>`
        children "port" => ports: Vec<NatPort>,
    }
}

element! {
    /// `<nat><address>`
    pub struct NatAddress {
        /// The first.
        need "start" => start: Address,
        /// The last; the first if absent.
        attr "end" => end: Option<IpAddr>,
    }
}

/// An address that has to be there; of a document without one it is unspecified, which is then complained about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub IpAddr);

impl Default for Address {
    fn default() -> Address {
        Address(IpAddr::from([0, 0, 0, 0]))
    }
}

impl Value for Address {
    fn from_text(text: &str) -> Result<Self, String> {
        IpAddr::from_text(text).map(Address)
    }

    fn to_text(&self) -> String {
        self.0.to_string()
    }
}

element! {
    /// `<nat><port>`
    pub struct NatPort {
        /// The first.
        need "start" => start: u16,
        /// The last.
        need "end" => end: u16,
    }
}

element! {
    /// `<forward><interface>`
    pub struct ForwardInterface {
        /// The host's device.
        need "dev" => dev: String,
        /// Runtime: how many guests have it.
        attr "connections" => connections: Option<u32>,
    }
}

/// What a network is, in one word of the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Guests reach others, who see the host's address.
    Nat,
    /// Guests reach others, and are reached, by the host's routes.
    Route,
    /// The same, and no packet is looked at.
    Open,
    /// Guests reach each other and the host.
    Isolated,
    /// A bridge that is there, and somebody else's.
    Bridge,
    /// Each guest has a card on a device of the host's.
    Macvtap,
    /// Each guest has a card of the host's.
    Hostdev,
}

impl Mode {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Nat => "nat",
            Mode::Route => "route",
            Mode::Open => "open",
            Mode::Isolated => "isolated",
            Mode::Bridge => "bridge",
            Mode::Macvtap => "macvtap",
            Mode::Hostdev => "hostdev",
        }
    }

    /// Whether virtd makes the bridge and serves addresses and names there.
    pub fn is_ours(self) -> bool {
        matches!(self, Mode::Nat | Mode::Route | Mode::Open | Mode::Isolated)
    }
}

impl NetworkDef {
    /// What it is.
    pub fn mode(&self) -> Mode {
        let Some(forward) = &self.forward else { return Mode::Isolated };
        match forward.mode.unwrap_or_default() {
            ForwardMode::Nat => Mode::Nat,
            ForwardMode::None => Mode::Isolated,
            ForwardMode::Route => Mode::Route,
            ForwardMode::Open => Mode::Open,
            // A bridge by name is one; devices to choose from are macvtap's.
            ForwardMode::Bridge if self.bridge_name().is_some() => Mode::Bridge,
            ForwardMode::Bridge | ForwardMode::Private | ForwardMode::Vepa | ForwardMode::Passthrough => Mode::Macvtap,
            ForwardMode::Hostdev => Mode::Hostdev,
        }
    }

    /// The devices of the host's by which packets leave; any, if there are none.
    pub fn forward_devices(&self) -> Vec<&str> {
        let Some(forward) = &self.forward else { return Vec::new() };
        let mut devices: Vec<&str> = forward.dev.iter().map(String::as_str).collect();
        for interface in &forward.interfaces {
            if !devices.contains(&interface.dev.as_str()) {
                devices.push(&interface.dev);
            }
        }
        devices
    }
}
