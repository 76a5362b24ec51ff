//! `<forward>`: how packets leave a network.

use super::NetworkDef;
use crate::device::PciAddress;
use crate::device::hostdev::{HostAddress, HostdevDriver};
use crate::device::interface::SourceMode;
use crate::domain::part::element;
use crate::domain::value::{Value, choices};
use serde::{Deserialize, Serialize};
use std::fmt;
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
        /// `<driver>`: of `hostdev`, who hands cards over.
        child "driver" => driver: Option<HostdevDriver>,
        /// `<pf>`: cards of the host's whose virtual functions are to choose from.
        children "pf" => functions: Vec<CardWithFunctions>,
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

element! {
    /// `<forward><pf>`
    pub struct CardWithFunctions {
        /// The card's own network device.
        need "dev" => dev: String,
    }
}

/// A device of the host's that a network gives to guests' cards, as it was found on the host: a network device, a PCI device, or what is
/// both. One of these is said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardDevice {
    /// The name of the network device.
    pub link: Option<String>,
    /// Where the PCI device is, as in `0000:06:10.0`, if that is handed over.
    pub pci: Option<String>,
}

impl ForwardDevice {
    /// A network device.
    pub fn link(name: &str) -> ForwardDevice {
        ForwardDevice { link: Some(name.to_owned()), pci: None }
    }

    /// A PCI device of which no network device is said.
    pub fn pci(address: impl fmt::Display) -> ForwardDevice {
        ForwardDevice { link: None, pci: Some(address.to_string()) }
    }

    /// The PCI device, as a document says it.
    pub fn address(&self) -> Option<HostAddress> {
        Some(HostAddress::of_pci(PciAddress::read(self.pci.as_deref()?)?))
    }

    /// Whether both are the same one.
    pub fn is(&self, other: &ForwardDevice) -> bool {
        match (&self.pci, &other.pci) {
            (None, None) => self.link == other.link,
            (one, two) => one == two,
        }
    }
}

impl fmt::Display for ForwardDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.link, &self.pci) {
            (Some(link), Some(pci)) => write!(f, "'{link}' ({pci})"),
            (Some(link), None) => write!(f, "'{link}'"),
            (None, pci) => f.write_str(pci.as_deref().unwrap_or_default()),
        }
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

    /// Whether each guest's card goes out by a device of the host's, or is one, without a bridge.
    pub fn has_no_bridge(self) -> bool {
        matches!(self, Mode::Macvtap | Mode::Hostdev)
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

    /// How cards on devices of the host's see each other, where that is what it is.
    pub fn source_mode(&self) -> SourceMode {
        match self.forward.as_ref().and_then(|forward| forward.mode) {
            Some(ForwardMode::Private) => SourceMode::Private,
            Some(ForwardMode::Vepa) => SourceMode::Vepa,
            Some(ForwardMode::Passthrough) => SourceMode::Passthrough,
            _ => SourceMode::Bridge,
        }
    }

    /// Whether a device of the host's is one guest's alone.
    pub fn gives_devices_alone(&self) -> bool {
        self.mode() == Mode::Hostdev || self.mode() == Mode::Macvtap && self.source_mode() == SourceMode::Passthrough
    }

    /// Says which devices there are to choose from, where it names cards with functions alone.
    pub fn show_devices(&mut self, devices: &[ForwardDevice]) {
        let Some(forward) = self.forward.as_mut().filter(|forward| !forward.functions.is_empty()) else { return };
        for device in devices {
            match (&device.link, device.address()) {
                (Some(dev), None) if !forward.interfaces.iter().any(|other| other.dev == *dev) => {
                    forward.interfaces.push(ForwardInterface { dev: dev.clone(), ..ForwardInterface::default() });
                }
                (None, Some(address)) if !forward.addresses.iter().any(|other| other.pci() == address.pci()) => {
                    forward.addresses.push(address);
                }
                _ => {}
            }
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
