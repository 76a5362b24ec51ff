//! Network cards and what their cables are plugged into.

use super::args::{List, Props};
use super::{Builder, id, list, turn, virtio};
use crate::host::filter::FilterPlan;
use crate::host::tap::{Direct, Rate, TapPlan, VlanPlan};
use crate::qemu::plan::{Companion, Link, Loss, Role, Tap};
use serde_json::json;
use virt_model::device::Interface;
use virt_model::device::interface::{
    BackendKind, Family, InterfaceDriver, InterfaceKind, NetDriver, PortForward, PortRange, SourceMode, Transport,
    TxMode,
};

/// The first file descriptor given to network devices; lower ones are the monitor's and room for more.
const FIRST_TAP_FD: i32 = 20;

/// Where passt finds its end of the cable.
const CABLE: i32 = 3;

impl Builder<'_> {
    pub(super) fn interfaces(&mut self) {
        let def = self.def;
        for interface in &def.devices.interfaces {
            self.interface(interface);
        }
    }

    pub(super) fn interface(&mut self, interface: &Interface) {
        if interface.kind == InterfaceKind::Hostdev {
            self.host_card(interface);
            return;
        }
        let netdev = format!("host{}", id(&interface.info));
        let plugged = self.netdev(interface, &netdev);
        let props = self.card(interface, plugged.then_some(netdev));
        self.args.device(props);
        if !interface.link_up() {
            self.setup.push(("set_link".to_owned(), json!({"name": id(&interface.info), "up": false})));
        }
    }

    /// What the cable is plugged into; `false`: into nothing.
    fn netdev(&mut self, interface: &Interface, netdev: &str) -> bool {
        match interface.kind {
            InterfaceKind::User if by_passt(interface) => self.passt(interface, netdev),
            InterfaceKind::User => self.slirp(interface, netdev),
            _ if interface.has_host_end() => self.tap(interface, netdev),
            InterfaceKind::Mcast | InterfaceKind::Server | InterfaceKind::Client | InterfaceKind::Udp => {
                self.args.pair("-netdev", socket(interface).set("id", netdev));
            }
            InterfaceKind::VhostUser => self.vhost_user(interface, netdev),
            _ => return false,
        }
        true
    }

    /// A switch in a process of its own, which sees the guest's memory.
    fn vhost_user(&mut self, interface: &Interface, netdev: &str) {
        let chardev = format!("char{}", id(&interface.info));
        let source = interface.source.clone().unwrap_or_default();
        let path = source.path.unwrap_or_default();
        let socket = list("socket").set("id", &chardev).set("path", &path);
        let socket = match interface.listens() {
            true => socket.set("server", "on"),
            false => {
                self.open(&path, true);
                let again = source.reconnect.filter(|again| again.enabled == Some(true));
                socket.maybe("reconnect", again.and_then(|again| again.timeout))
            }
        };
        self.args.pair("-chardev", socket);
        let queues = interface.driver.as_ref().and_then(|driver| driver.queues).filter(|count| *count > 1);
        self.args.pair("-netdev", list("vhost-user").set("chardev", chardev).maybe("queues", queues).set("id", netdev));
    }

    /// A card of the host's. Its hardware address and VLAN are the host's to set.
    fn host_card(&mut self, interface: &Interface) {
        let host = interface.host_card().map(|pci| pci.to_string()).unwrap_or_default();
        let props = Props::device("vfio-pci").set("host", host).set("id", id(&interface.info));
        self.args.device(turn(props, self.boot_index(&interface.info)).extend(self.pci(&interface.info)));
    }

    fn slirp(&mut self, interface: &Interface, netdev: &str) {
        let mut user = list("user").set("id", netdev);
        for ip in &interface.addresses {
            let six = ip.family == Some(Family::Ipv6);
            let prefix = ip.prefix.unwrap_or(if six { 64 } else { 24 });
            let key = if six { "ipv6-net" } else { "net" };
            user = user.set(key, format!("{}/{prefix}", ip.address));
        }
        self.args.pair("-netdev", user);
    }

    fn passt(&mut self, interface: &Interface, netdev: &str) {
        let fd = self.companion_fd();
        let stream = list("stream").set("id", netdev).set("server", "off");
        self.args.pair("-netdev", stream.set("addr.type", "fd").set("addr.str", fd));
        let Some(program) = self.caps.site.passt.clone() else { return };
        let link = Link::Pair { its: CABLE, qemus: fd };
        let log = interface.backend.as_ref().and_then(|backend| backend.log_file.as_deref());
        let files = log.map(|path| crate::qemu::plan::HostFile {
            path: path.into(),
            write: true,
            create: true,
            device: false,
            expected: crate::qemu::plan::Expected::Anything,
        });
        let name = format!("passt of {}", id(&interface.info));
        // A guest that has lost its network can still be shut down in order.
        let companion = Companion {
            program,
            args: passt_args(interface),
            links: vec![link],
            ..Companion::new(&name, Role::Beside(Loss::Bear))
        };
        self.files.extend(files.clone());
        self.companions.push(Companion { files: files.into_iter().collect(), needs_network: true, ..companion });
    }

    fn tap(&mut self, interface: &Interface, netdev: &str) {
        let queues = interface.driver.as_ref().and_then(|d| d.queues).map_or(1, |n| n.clamp(1, 16)) as usize;
        let fds = self.tap_fds(queues);
        let vhost = self.by_vhost(interface);
        let vhost_fds = if vhost { self.tap_fds(queues) } else { Vec::new() };
        let all = |fds: &[i32]| fds.iter().map(i32::to_string).collect::<Vec<_>>().join(":");
        let (fd, vhostfd) = if queues > 1 { ("fds", "vhostfds") } else { ("fd", "vhostfd") };
        let tap = list("tap").set(fd, all(&fds)).set("id", netdev).maybe("vhost", vhost.then_some("on"));
        let tap = tap.maybe(vhostfd, vhost.then(|| all(&vhost_fds)));
        let sndbuf = interface.tune.as_ref().and_then(|tune| tune.sndbuf);
        self.args.pair("-netdev", tap.maybe("sndbuf", sndbuf));
        self.taps.push(Tap { fds, vhost_fds, plan: tap_plan(interface, queues) });
    }

    fn tap_fds(&mut self, count: usize) -> Vec<i32> {
        let from = FIRST_TAP_FD + self.tap_fds_used;
        let fds: Vec<i32> = (from..).take(count).collect();
        self.tap_fds_used += i32::try_from(count).unwrap_or(0);
        fds
    }

    /// Whether the kernel moves the packets: where it can and is not told otherwise.
    fn by_vhost(&self, interface: &Interface) -> bool {
        let virtio = interface.model().is_some_and(|model| model.starts_with("virtio"));
        match interface.driver.as_ref().and_then(|driver| driver.name) {
            Some(NetDriver::Vhost) => virtio,
            Some(NetDriver::Qemu | NetDriver::Vfio) => false,
            None => virtio && self.kvm && self.caps.site.vhost_net,
        }
    }

    fn card(&self, interface: &Interface, netdev: Option<String>) -> Props {
        let driver = interface.driver.as_ref();
        let queues = driver.and_then(|d| d.queues).filter(|n| *n > 1);
        // The others have no such property: of them the device on the host alone has it.
        let is_virtio = interface.model().is_some_and(|model| model.starts_with("virtio"));
        let props = Props::device(card_type(interface.model().unwrap_or_default()).unwrap_or_default())
            .maybe("mq", queues.map(|_| true))
            .maybe("vectors", queues.map(|n| n.saturating_mul(2).saturating_add(2)))
            .maybe("tx", driver.and_then(|d| d.txmode).map(|mode| if mode == TxMode::Timer { "timer" } else { "bh" }))
            .maybe("ioeventfd", driver.and_then(|d| d.ioeventfd))
            .maybe("event_idx", driver.and_then(|d| d.event_idx))
            .maybe("rss", driver.and_then(|d| d.rss))
            .maybe("hash", driver.and_then(|d| d.rss_hash_report))
            .maybe("rx_queue_size", driver.and_then(|d| d.rx_queue_size))
            .maybe("tx_queue_size", driver.and_then(|d| d.tx_queue_size))
            .extend(offloads(driver))
            .maybe("host_mtu", interface.mtu.as_ref().filter(|_| is_virtio).map(|mtu| mtu.size))
            .extend(driver.map(|d| virtio(&d.virtio)).unwrap_or_default())
            .maybe("netdev", netdev)
            .set("id", id(&interface.info))
            .maybe("mac", interface.mac().map(|mac| mac.to_string()));
        turn(props, self.boot_index(&interface.info)).extend(self.pci(&interface.info))
    }
}

/// Whether passt is the network of a guest without one.
pub fn by_passt(interface: &Interface) -> bool {
    interface.backend.as_ref().and_then(|backend| backend.kind) == Some(BackendKind::Passt)
}

/// The network device that is a card's end on the host.
pub fn tap_plan(interface: &Interface, queues: usize) -> TapPlan {
    let target = interface.target.as_ref();
    TapPlan {
        name: target.and_then(|target| target.dev.clone()),
        bridge: interface.bridge().map(str::to_owned),
        queues,
        mtu: interface.mtu.as_ref().map(|mtu| mtu.size),
        direct: direct(interface),
        of_network: interface.kind == InterfaceKind::Network,
        existing: target.is_some_and(|target| target.managed == Some(false)),
        isolated: interface.is_isolated(),
        vlans: interface.vlan.as_ref().map(VlanPlan::all_of).unwrap_or_default(),
        filter: interface.filter.as_ref().map(|filter| FilterPlan::of(filter, interface.mac().unwrap_or_default())),
        coalesce: interface.coalesce.as_ref().and_then(|coalesce| coalesce.rx.as_ref()?.frames.as_ref()?.max),
        rates: Rate::both(interface.bandwidth.as_ref()),
    }
}

/// The host's device by which a card goes out without a bridge.
fn direct(interface: &Interface) -> Option<Direct> {
    let source = interface.source.as_ref().filter(|_| interface.kind == InterfaceKind::Direct)?;
    let mode = match source.mode.unwrap_or_default() {
        SourceMode::Passthrough => "passthru",
        mode => mode.as_str(),
    };
    let mac = interface.mac().map(|mac| mac.to_string()).unwrap_or_default();
    Some(Direct { below: source.dev.clone().unwrap_or_default(), mode, mac })
}

fn socket(interface: &Interface) -> List {
    let source = interface.source.clone().unwrap_or_default();
    let end = |address: &Option<String>, port: Option<u16>| {
        format!("{}:{}", address.as_deref().unwrap_or_default(), port.unwrap_or_default())
    };
    let there = end(&source.address, source.port);
    let here = source.local.as_ref().map(|local| end(&local.address, local.port));
    let socket = list("socket");
    match interface.kind {
        InterfaceKind::Mcast => {
            let local = source.local.and_then(|local| local.address);
            socket.set("mcast", there).maybe("localaddr", local)
        }
        InterfaceKind::Server => socket.set("listen", there),
        InterfaceKind::Client => socket.set("connect", there),
        _ => socket.set("udp", there).maybe("localaddr", here),
    }
}

fn passt_args(interface: &Interface) -> Vec<String> {
    let mut args: Vec<String> = ["--foreground", "--quiet", "--stderr", "--fd"].map(str::to_owned).into();
    args.push(CABLE.to_string());
    let mut add = |option: &str, value: String| args.extend([option.to_owned(), value]);
    if let Some(device) = interface.source.as_ref().and_then(|source| source.dev.as_ref()) {
        add("--interface", device.clone());
    }
    for ip in &interface.addresses {
        add("--address", ip.address.clone());
        if let (Some(prefix), true) = (ip.prefix, ip.family != Some(Family::Ipv6)) {
            add("--netmask", prefix.to_string());
        }
    }
    if let Some(mtu) = &interface.mtu {
        add("--mtu", mtu.size.to_string());
    }
    for forward in &interface.forwards {
        add(if forward.transport == Transport::Tcp { "--tcp-ports" } else { "--udp-ports" }, ports(forward));
    }
    args
}

/// `127.0.0.1%eth0/22-25:2022-2025,~23`
fn ports(forward: &PortForward) -> String {
    let range = |range: &PortRange| {
        let (first, last) = (range.start, range.end.unwrap_or(range.start));
        let span = |first: u16, last: u16| if first == last { first.to_string() } else { format!("{first}-{last}") };
        match (range.exclude, range.to) {
            (Some(true), _) => format!("~{}", span(first, last)),
            (_, Some(to)) => format!("{}:{}", span(first, last), span(to, to.saturating_add(last - first.min(last)))),
            _ => span(first, last),
        }
    };
    let ranges: Vec<String> = forward.ranges.iter().map(range).collect();
    let device = forward.dev.as_ref().map(|device| format!("%{device}")).unwrap_or_default();
    let place = match (&forward.address, &*device) {
        (None, "") => String::new(),
        (address, device) => format!("{}{device}/", address.as_deref().unwrap_or_default()),
    };
    if ranges.is_empty() { format!("{place}all") } else { format!("{place}{}", ranges.join(",")) }
}

fn offloads(driver: Option<&InterfaceDriver>) -> Props {
    let (host, guest) = (driver.and_then(|d| d.host.as_ref()), driver.and_then(|d| d.guest.as_ref()));
    Props::default()
        .maybe("csum", host.and_then(|h| h.csum))
        .maybe("gso", host.and_then(|h| h.gso))
        .maybe("host_tso4", host.and_then(|h| h.tso4))
        .maybe("host_tso6", host.and_then(|h| h.tso6))
        .maybe("host_ecn", host.and_then(|h| h.ecn))
        .maybe("host_ufo", host.and_then(|h| h.ufo))
        .maybe("mrg_rxbuf", host.and_then(|h| h.mrg_rxbuf))
        .maybe("guest_csum", guest.and_then(|g| g.csum))
        .maybe("guest_tso4", guest.and_then(|g| g.tso4))
        .maybe("guest_tso6", guest.and_then(|g| g.tso6))
        .maybe("guest_ecn", guest.and_then(|g| g.ecn))
        .maybe("guest_ufo", guest.and_then(|g| g.ufo))
}

/// QEMU's name of a network card; `None` for a card that we do not know.
pub fn card_type(model: &str) -> Option<&'static str> {
    Some(match model {
        "virtio" => "virtio-net-pci",
        "virtio-transitional" => "virtio-net-pci-transitional",
        "virtio-non-transitional" => "virtio-net-pci-non-transitional",
        "e1000" | "e1000-82540em" => "e1000",
        "e1000-82544gc" => "e1000-82544gc",
        "e1000-82545em" => "e1000-82545em",
        "e1000e" => "e1000e",
        "igb" => "igb",
        "rtl8139" => "rtl8139",
        "ne2k_pci" => "ne2k_pci",
        "pcnet" => "pcnet",
        "vmxnet3" => "vmxnet3",
        "i82550" => "i82550",
        "i82551" => "i82551",
        "i82557a" => "i82557a",
        "i82557b" => "i82557b",
        "i82557c" => "i82557c",
        "i82558a" => "i82558a",
        "i82558b" => "i82558b",
        "i82559a" => "i82559a",
        "i82559b" => "i82559b",
        "i82559c" => "i82559c",
        "i82559er" => "i82559er",
        "i82562" => "i82562",
        "i82801" => "i82801",
        _ => return None,
    })
}
