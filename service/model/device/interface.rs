//! `<interface>`: a network card and what its cable is plugged into.

use super::{DeviceInfo, VirtioDriver};
use crate::domain::part::element;
use crate::domain::value::{Mac, choices};

choices! {
    /// What the cable is plugged into.
    pub enum InterfaceKind {
        User = "user", Ethernet = "ethernet", VhostUser = "vhostuser", Server = "server", Client = "client",
        Mcast = "mcast", Network = "network", Bridge = "bridge", Internal = "internal", Direct = "direct",
        Hostdev = "hostdev", Udp = "udp", Vdpa = "vdpa", Null = "null", Vds = "vds",
    }
}

choices! {
    /// Whether the cable is plugged in.
    pub enum LinkState { Up = "up", Down = "down", }
}

choices! {
    /// Who moves the packets.
    pub enum NetDriver { Qemu = "qemu", Vhost = "vhost", }
}

element! {
    /// `<interface>`
    pub struct Interface {
        /// What the cable is plugged into.
        need "type" => kind: InterfaceKind,
        /// `<mac>`
        child "mac" => mac: Option<InterfaceMac>,
        /// `<source>`
        child "source" => source: Option<InterfaceSource>,
        /// `<target>`: the host's end.
        child "target" => target: Option<InterfaceTarget>,
        /// `<model>`
        child "model" => model: Option<InterfaceModel>,
        /// `<driver>`
        child "driver" => driver: Option<InterfaceDriver>,
        /// `<link>`
        child "link" => link: Option<Link>,
        /// `<mtu>`
        child "mtu" => mtu: Option<Mtu>,
        /// Name, place, boot order.
        flat => info: DeviceInfo,
    }
}

impl Interface {
    /// The card the guest sees.
    pub fn model(&self) -> Option<&str> {
        self.model.as_ref().map(|model| &*model.name)
    }

    /// Whether the cable is plugged in.
    pub fn link_up(&self) -> bool {
        self.link.as_ref().is_none_or(|link| link.state == LinkState::Up)
    }

    /// The bridge of `type='bridge'`.
    pub fn bridge(&self) -> Option<&str> {
        self.source.as_ref()?.bridge.as_deref()
    }

    /// The hardware address.
    pub fn mac(&self) -> Option<Mac> {
        self.mac.as_ref().map(|mac| mac.address)
    }
}

choices! {
    /// Where an address came from.
    pub enum MacKind { Generated = "generated", Static = "static", }
}

element! {
    /// `<interface><mac>`
    pub struct InterfaceMac {
        /// The hardware address.
        need "address" => address: Mac,
        /// Where it came from. Advisory.
        attr "type" => kind: Option<MacKind>,
    }
}

element! {
    /// `<interface><source>`
    pub struct InterfaceSource {
        /// For `type='network'`: the network's name.
        attr "network" => network: Option<String>,
        /// Runtime: port of the network.
        attr "portid" => portid: Option<String>,
        /// For `type='bridge'`; for `type='network'`, runtime.
        attr "bridge" => bridge: Option<String>,
    }
}

element! {
    /// `<interface><target>`
    pub struct InterfaceTarget {
        /// Name of the host's device; `vnetN` and the like are runtime.
        attr "dev" => dev: Option<String>,
    }
}

element! {
    /// `<interface><model>`
    pub struct InterfaceModel {
        /// `virtio`, `e1000e`, …
        need "type" => name: String,
    }
}

element! {
    /// `<interface><driver>`
    pub struct InterfaceDriver {
        /// Who moves the packets.
        attr "name" => name: Option<NetDriver>,
        /// Number of queue pairs.
        attr "queues" => queues: Option<u32>,
        /// Entries of the receive queue.
        attr "rx_queue_size" => rx_queue_size: Option<u32>,
        /// Entries of the transmit queue.
        attr "tx_queue_size" => tx_queue_size: Option<u32>,
        /// What virtio devices share.
        flat => virtio: VirtioDriver,
    }
}

element! {
    /// `<interface><link>`
    pub struct Link {
        /// Plugged or not.
        need "state" => state: LinkState,
    }
}

element! {
    /// `<interface><mtu>`
    pub struct Mtu {
        /// In bytes.
        need "size" => size: u32,
    }
}
