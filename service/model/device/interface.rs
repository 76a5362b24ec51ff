//! `<interface>`: a network card and what its cable is plugged into.

use super::chardev::Reconnect;
use super::filter::FilterRef;
use super::hostdev::HostAddress;
use super::{DeviceInfo, PciAddress, VirtioDriver};
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
    pub enum NetDriver { Qemu = "qemu", Vhost = "vhost", Vfio = "vfio", }
}

element! {
    /// `<interface>`
    pub struct Interface {
        /// What the cable is plugged into.
        need "type" => kind: InterfaceKind,
        /// Of `type='hostdev'`: it is taken from the host's driver at start, and given back at the end.
        yes_no "managed" => managed: Option<bool>,
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
        /// `<bandwidth>`
        child "bandwidth" => bandwidth: Option<Bandwidth>,
        /// `<ip>`: what a guest of `type='user'` gets.
        children "ip" => addresses: Vec<InterfaceIp>,
        /// `<backend>`
        child "backend" => backend: Option<InterfaceBackend>,
        /// `<tune>`
        child "tune" => tune: Option<InterfaceTune>,
        /// `<port>`
        child "port" => port: Option<BridgePort>,
        /// `<portForward>`
        children "portForward" => forwards: Vec<PortForward>,
        /// `<link>`
        child "link" => link: Option<Link>,
        /// `<mtu>`
        child "mtu" => mtu: Option<Mtu>,
        /// `<vlan>`
        child "vlan" => vlan: Option<Vlan>,
        /// `<filterref>`
        child "filterref" => filter: Option<FilterRef>,
        /// `<coalesce>`
        child "coalesce" => coalesce: Option<Coalesce>,
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

    /// Whether its end on the host is a network device of the host's, which QEMU has open.
    pub fn has_host_end(&self) -> bool {
        self.is_in_bridge() || matches!(self.kind, InterfaceKind::Direct | InterfaceKind::Ethernet)
    }

    /// Whether that is plugged into a bridge: one that it names, or its network's.
    pub fn is_in_bridge(&self) -> bool {
        matches!(self.kind, InterfaceKind::Bridge | InterfaceKind::Network)
    }

    /// Whether it sees no other port of its bridge that is isolated, too.
    pub fn is_isolated(&self) -> bool {
        self.port.as_ref().is_some_and(|port| port.isolated == Some(true))
    }

    /// The network that it is in. While it runs there, it may be of the type of what its network has given it.
    pub fn network(&self) -> Option<&str> {
        let of_one = matches!(self.kind, InterfaceKind::Network | InterfaceKind::Direct | InterfaceKind::Hostdev);
        self.source.as_ref().filter(|_| of_one)?.network.as_deref()
    }

    /// Says nothing of what its network has given it: another start gives it again.
    pub fn leave_forward_device(&mut self) {
        if self.network().is_none() {
            return;
        }
        let source = self.source.get_or_insert_default();
        source.bridge = None;
        if self.kind != InterfaceKind::Network {
            (source.dev, source.mode, source.place, self.managed) = (None, None, None, None);
            self.kind = InterfaceKind::Network;
        }
    }

    /// The bridge of `type='bridge'`.
    pub fn bridge(&self) -> Option<&str> {
        self.source.as_ref()?.bridge.as_deref()
    }

    /// Where the host's card is that is handed over, if one is.
    pub fn host_card(&self) -> Option<PciAddress> {
        let address = self.source.as_ref()?.place.as_ref()?;
        address.pci().filter(|_| self.kind == InterfaceKind::Hostdev)
    }

    /// Whether QEMU listens at the socket of `type='vhostuser'`.
    pub fn listens(&self) -> bool {
        self.source.as_ref().is_some_and(|source| source.mode == Some(SourceMode::Server))
    }

    /// Whether that is its hardware address, its name on the host, or its alias.
    pub fn is_known_as(&self, known: &str) -> bool {
        let target = self.target.as_ref().and_then(|target| target.dev.as_deref());
        self.mac().is_some_and(|mac| mac.to_string().eq_ignore_ascii_case(known))
            || [self.info.alias(), target].contains(&Some(known))
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

choices! {
    /// How cards that share a device of the host's see each other; of `type='vhostuser'`, which end of the socket is QEMU's.
    pub enum SourceMode {
        Vepa = "vepa", Bridge = "bridge", Private = "private", Passthrough = "passthrough", Server = "server",
        Client = "client",
    }
}

choices! {
    /// What the other end of `type='vhostuser'` is reached by.
    pub enum SwitchLink { Unix = "unix", }
}

element! {
    /// `<interface><source>`
    pub struct InterfaceSource {
        /// Of `type='vhostuser'`: what the switch is reached by.
        attr "type" => link: Option<SwitchLink>,
        /// For `type='network'`: the network's name.
        attr "network" => network: Option<String>,
        /// Runtime: port of the network.
        attr "portid" => portid: Option<String>,
        /// For `type='bridge'`; for `type='network'`, runtime.
        attr "bridge" => bridge: Option<String>,
        /// The host's device: by passt, whose addresses the guest gets; of `type='direct'`, through which its packets go.
        attr "dev" => dev: Option<String>,
        /// Of `type='direct'`: which packets the host's device passes on; of `type='vhostuser'`, who listens.
        attr "mode" => mode: Option<SourceMode>,
        /// Of `type='vhostuser'`: the socket.
        attr "path" => path: Option<String>,
        /// Of sockets: where they are.
        attr "address" => address: Option<String>,
        /// Of sockets: their port.
        attr "port" => port: Option<u16>,
        /// `<address>`: of `type='hostdev'`, where the host's card is.
        child "address" => place: Option<HostAddress>,
        /// `<local>`: our own end.
        child "local" => local: Option<LocalEnd>,
        /// `<reconnect>`: of `type='vhostuser'`, whether the switch may come back.
        child "reconnect" => reconnect: Option<Reconnect>,
    }
}

element! {
    /// `<source><local>`
    pub struct LocalEnd {
        /// Our address.
        attr "address" => address: Option<String>,
        /// Our port.
        attr "port" => port: Option<u16>,
    }
}

element! {
    /// `<bandwidth>`
    pub struct Bandwidth {
        /// To the guest.
        child "inbound" => inbound: Option<Rate>,
        /// From the guest.
        child "outbound" => outbound: Option<Rate>,
    }
}

element! {
    /// `<inbound>` and `<outbound>`: in units of 1000 bytes.
    pub struct Rate {
        /// A second.
        attr "average" => average: Option<u64>,
        /// A second, for a while.
        attr "peak" => peak: Option<u64>,
        /// At peak speed at once, in units of 1024 bytes.
        attr "burst" => burst: Option<u64>,
    }
}

choices! {
    /// Addresses of which kind.
    pub enum Family { Ipv4 = "ipv4", Ipv6 = "ipv6", }
}

element! {
    /// `<interface><ip>`
    pub struct InterfaceIp {
        /// Which kind.
        attr "family" => family: Option<Family>,
        /// The address.
        need "address" => address: String,
        /// Bits of it that are the network's.
        attr "prefix" => prefix: Option<u8>,
    }
}

choices! {
    /// Who is the network of `type='user'`.
    pub enum BackendKind { Default = "default", Passt = "passt", }
}

element! {
    /// `<interface><backend>`
    pub struct InterfaceBackend {
        /// Who is the network of `type='user'`.
        attr "type" => kind: Option<BackendKind>,
        /// Where passt says what it does.
        attr "logFile" => log_file: Option<String>,
    }
}

element! {
    /// `<interface><tune>`
    pub struct InterfaceTune {
        /// Bytes that the host keeps of what the guest sends; 0: no limit.
        leaf "sndbuf" => sndbuf: Option<u64>,
    }
}

element! {
    /// `<interface><port>`
    pub struct BridgePort {
        /// Isolated ports of a bridge do not see each other.
        yes_no "isolated" => isolated: Option<bool>,
    }
}

choices! {
    /// What is forwarded.
    pub enum Transport { Tcp = "tcp", Udp = "udp", }
}

element! {
    /// `<portForward>`: the host's ports that lead to the guest's (passt).
    pub struct PortForward {
        /// What is forwarded.
        need "proto" => transport: Transport,
        /// On this address of the host only.
        attr "address" => address: Option<String>,
        /// On this device of the host only.
        attr "dev" => dev: Option<String>,
        /// Which ports; all if none is given.
        children "range" => ranges: Vec<PortRange>,
    }
}

element! {
    /// `<portForward><range>`
    pub struct PortRange {
        /// The host's first port.
        need "start" => start: u16,
        /// The host's last port; the first if absent.
        attr "end" => end: Option<u16>,
        /// The guest's first port; the same if absent.
        attr "to" => to: Option<u16>,
        /// Not these.
        yes_no "exclude" => exclude: Option<bool>,
    }
}

element! {
    /// `<interface><target>`
    pub struct InterfaceTarget {
        /// Name of the host's device; `vnetN` and the like are runtime.
        attr "dev" => dev: Option<String>,
        /// We make it; else it is there.
        yes_no "managed" => managed: Option<bool>,
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
        /// When packets are sent.
        attr "txmode" => txmode: Option<TxMode>,
        /// The host's kernel takes notice of packets.
        on_off "ioeventfd" => ioeventfd: Option<bool>,
        /// Notices only when needed.
        on_off "event_idx" => event_idx: Option<bool>,
        /// Packets of one connection go to one queue.
        on_off "rss" => rss: Option<bool>,
        /// The guest is told how.
        on_off "rss_hash_report" => rss_hash_report: Option<bool>,
        /// Number of queue pairs.
        attr "queues" => queues: Option<u32>,
        /// Entries of the receive queue.
        attr "rx_queue_size" => rx_queue_size: Option<u32>,
        /// Entries of the transmit queue.
        attr "tx_queue_size" => tx_queue_size: Option<u32>,
        /// `<host>`: work that the host's half does.
        child "host" => host: Option<Offloads>,
        /// `<guest>`: work that the guest's half does.
        child "guest" => guest: Option<Offloads>,
        /// What virtio devices share.
        flat => virtio: VirtioDriver,
    }
}

choices! {
    /// When packets are sent.
    pub enum TxMode { Iothread = "iothread", Timer = "timer", }
}

element! {
    /// Work on packets that can be left to the other half.
    pub struct Offloads {
        /// Checksums.
        on_off "csum" => csum: Option<bool>,
        /// Segmentation of any kind.
        on_off "gso" => gso: Option<bool>,
        /// Segmentation of TCP on IPv4.
        on_off "tso4" => tso4: Option<bool>,
        /// Segmentation of TCP on IPv6.
        on_off "tso6" => tso6: Option<bool>,
        /// With notice of congestion.
        on_off "ecn" => ecn: Option<bool>,
        /// Fragmentation of UDP.
        on_off "ufo" => ufo: Option<bool>,
        /// Receive buffers are joined.
        on_off "mrg_rxbuf" => mrg_rxbuf: Option<bool>,
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

choices! {
    /// What becomes of packets without a tag on a port that carries tags.
    pub enum NativeMode { Tagged = "tagged", Untagged = "untagged", }
}

/// Numbers that VLANs have.
pub const VLANS: std::ops::RangeInclusive<u16> = 1..=4094;

element! {
    /// `<vlan>`: which of a bridge's VLANs the card is in, or that of a card of the host's.
    pub struct Vlan {
        /// The guest sees tags, even if there is one only.
        yes_no "trunk" => trunk: Option<bool>,
        /// Each `<tag>`.
        children "tag" => tags: Vec<VlanTag>,
    }
}

impl Vlan {
    /// Whether the guest sees tags.
    pub fn is_trunk(&self) -> bool {
        self.trunk.unwrap_or(self.tags.len() > 1)
    }
}

element! {
    /// `<vlan><tag>`
    pub struct VlanTag {
        /// The VLAN's number.
        need "id" => id: u16,
        /// Of a trunk: packets without a tag are in this VLAN.
        attr "nativeMode" => native: Option<NativeMode>,
    }
}

element! {
    /// `<coalesce>`: how many packets the host waits for.
    pub struct Coalesce {
        /// `<rx>`
        child "rx" => rx: Option<CoalesceRx>,
    }
}

element! {
    /// `<coalesce><rx>`: to the guest.
    pub struct CoalesceRx {
        /// `<frames>`
        child "frames" => frames: Option<CoalesceFrames>,
    }
}

element! {
    /// `<coalesce><rx><frames>`
    pub struct CoalesceFrames {
        /// At most so many.
        attr "max" => max: Option<u32>,
    }
}
