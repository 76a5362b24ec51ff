//! Network cards and what their cables are plugged into.

use super::Check;
use crate::qemu::command::{by_passt, card_type};
use std::net::IpAddr;
use virt_model::device::Interface;
use virt_model::device::interface::{Family, InterfaceDriver, InterfaceKind, NetDriver, SourceMode, VLANS, Vlan};

/// Queues of one card, and of all cards together: each needs two descriptors of those that QEMU is given.
const MOST_QUEUES: u32 = 16;
const ALL_QUEUES: u32 = 38;

impl Check<'_> {
    pub(super) fn interfaces(&mut self) {
        let def = self.def;
        let mut queues = 0;
        for interface in &def.devices.interfaces {
            self.interface(interface);
            if interface.has_host_end() {
                queues += interface.driver.as_ref().and_then(|d| d.queues).unwrap_or(1).min(MOST_QUEUES);
                let many = queues > ALL_QUEUES;
                self.refuse_if(many, &interface.at, "all cards of a guest together have at most 38 queues");
            }
        }
    }

    fn interface(&mut self, interface: &Interface) {
        let place = &interface.at;
        let kind = interface.kind;
        let host_device = interface.has_host_end();
        self.for_other_kinds(interface);
        match kind {
            InterfaceKind::User => self.user_network(interface),
            InterfaceKind::Network => {
                let named = interface.source.as_ref().is_some_and(|source| source.network.is_some());
                self.refuse_if(!named, place, "type='network' needs <source network='…'/>");
            }
            InterfaceKind::Bridge => {
                self.refuse_if(interface.bridge().is_none(), place, "type='bridge' needs <source bridge='…'/>");
                let none = self.caps.bridge_helper.is_none() && !self.caps.site.makes_taps;
                self.refuse_if(none, place, "type='bridge' needs qemu-bridge-helper, which is not installed");
            }
            InterfaceKind::Ethernet => {
                let ours = self.caps.site.makes_taps;
                self.refuse_if(!ours, place, "type='ethernet' needs root: use the system bus, or type='bridge'");
            }
            InterfaceKind::Direct => self.direct(interface),
            InterfaceKind::Hostdev => return self.host_card(interface),
            InterfaceKind::Mcast | InterfaceKind::Server | InterfaceKind::Client | InterfaceKind::Udp => {
                self.socket(interface);
            }
            InterfaceKind::VhostUser => self.switch(interface),
            InterfaceKind::Null => {}
            _ => {
                let known =
                    "user, bridge, direct, ethernet, hostdev, null, mcast, server, client, udp and vhostuser are";
                self.refuse(
                    &place.attribute("type"),
                    format!("interfaces of type='{kind}' are not supported: {known}"),
                );
            }
        }
        self.card(interface);
        self.host_side(interface, host_device);
        self.seated(&interface.info, place);
    }

    /// A switch in a process of its own.
    fn switch(&mut self, interface: &Interface) {
        let place = &interface.at;
        let source = interface.source.as_ref();
        let absolute = source.and_then(|source| source.path.as_deref()).is_some_and(|path| path.starts_with('/'));
        let how = "type='vhostuser' needs <source type='unix' path='/…' mode='client'/>, the socket of the switch";
        self.refuse_if(!absolute, place, how);
        let known = source.is_some_and(|source| matches!(source.mode, Some(SourceMode::Client | SourceMode::Server)));
        let how = "mode='client' if the switch listens, mode='server' if QEMU does";
        self.refuse_if(absolute && !known, &place.child("source").attribute("mode"), how);
        if let Some(again) = source.and_then(|source| source.reconnect.as_ref()) {
            let never = again.enabled == Some(true) && (interface.listens() || again.timeout.is_none_or(|n| n == 0));
            self.refuse_if(
                never,
                &again.at,
                "<reconnect enabled='yes'> has a timeout in seconds, and is for mode='client'",
            );
        }
        let virtio = interface.model().is_some_and(|model| model.starts_with("virtio"));
        self.refuse_if(
            !virtio,
            &place.child("model"),
            "only virtio cards are plugged into a switch of type='vhostuser'",
        );
        let how = "the switch must see the guest's memory: <memoryBacking> with <access mode='shared'/>";
        self.refuse_if(!self.memory_is_shared(), place, how);
    }

    fn direct(&mut self, interface: &Interface) {
        let place = &interface.at;
        let device = interface.source.as_ref().and_then(|source| source.dev.as_deref());
        self.refuse_if(
            device.is_none(),
            place,
            "type='direct' needs <source dev='…'/>, a network device of the host's",
        );
        let long = device.is_some_and(|name| name.len() > 15 || name.contains('/'));
        self.refuse_if(long, &place.child("source"), "this is no name of a network device");
        let ours = self.caps.site.makes_taps;
        self.refuse_if(!ours, place, "type='direct' needs root: use the system bus, or type='bridge'");
    }

    /// What is said for cards of other kinds than this one.
    fn for_other_kinds(&mut self, interface: &Interface) {
        let place = &interface.at;
        if interface.kind != InterfaceKind::Hostdev {
            let managed = interface.managed == Some(true);
            self.refuse_if(managed, &place.attribute("managed"), "managed='yes' is for type='hostdev'");
            let vfio = interface.driver.as_ref().filter(|driver| driver.name == Some(NetDriver::Vfio));
            if let Some(driver) = vfio {
                self.refuse(&driver.at.attribute("name"), "vfio is for type='hostdev'");
            }
            let address = interface.source.as_ref().and_then(|source| source.place.as_ref());
            if let Some(address) = address {
                self.refuse(&address.at, "<source> with an <address> is for type='hostdev'");
            }
        }
        let Some(source) = &interface.source else { return };
        let fits = match source.mode {
            None => true,
            Some(SourceMode::Client | SourceMode::Server) => interface.kind == InterfaceKind::VhostUser,
            Some(_) => interface.kind == InterfaceKind::Direct,
        };
        let how = "a mode is for type='direct', and 'client' and 'server' for type='vhostuser'";
        self.refuse_if(!fits, &source.at.attribute("mode"), how);
        let link = source.link.is_some() || source.path.is_some() || source.reconnect.is_some();
        let how = "a socket's path is for type='vhostuser'";
        self.refuse_if(link && interface.kind != InterfaceKind::VhostUser, &source.at, how);
    }

    /// A card of the host's. That it is a virtual function is looked at when the guest starts.
    fn host_card(&mut self, interface: &Interface) {
        let place = &interface.at;
        self.need_device(place, "vfio-pci");
        let how = "type='hostdev' needs <source> with the <address> of a PCI device";
        self.refuse_if(interface.host_card().is_none(), place, how);
        let address = interface.source.as_ref().and_then(|source| source.place.as_ref());
        let odd = address.and_then(|address| address.word.as_ref()).is_some_and(|word| word != "pci");
        self.refuse_if(odd, &place.child("source"), "the address is not one of type='pci'");
        let plain = interface.driver.as_ref().is_none_or(|said| {
            let bare = InterfaceDriver { name: said.name, at: said.at.clone(), ..InterfaceDriver::default() };
            *said == bare && said.name.is_none_or(|name| name == NetDriver::Vfio)
        });
        self.refuse_if(
            !plain,
            &place.child("driver"),
            "a card of the host's has <driver name='vfio'/> and no settings",
        );
        if let Some(vlan) = &interface.vlan {
            let bad = vlan.tags.len() != 1 || !VLANS.contains(&vlan.tags[0].id);
            self.refuse_if(bad, &vlan.at, "a card of the host's has one VLAN tag, from 1 to 4094");
            let trunk = vlan.trunk == Some(true);
            self.refuse_if(trunk, &vlan.at.attribute("trunk"), "a trunk is for type='bridge'");
            for tag in vlan.tags.iter().filter(|tag| tag.native.is_some()) {
                self.refuse(&tag.at.attribute("nativeMode"), "a nativeMode is for type='bridge'");
            }
        }
        let emulated = [
            // One that a network gives stands for the card that it is in a network of another mode.
            (interface.model.is_some() && interface.network().is_none(), "model"),
            (interface.mtu.is_some(), "mtu"),
            (interface.bandwidth.is_some(), "bandwidth"),
            (interface.link.is_some(), "link"),
            (interface.tune.is_some(), "tune"),
            (interface.target.is_some(), "target"),
            (interface.port.is_some(), "port"),
            (interface.coalesce.is_some(), "coalesce"),
            (interface.filter.is_some(), "filterref"),
            (interface.backend.is_some(), "backend"),
            (!interface.addresses.is_empty(), "ip"),
            (!interface.forwards.is_empty(), "portForward"),
        ];
        for (_, name) in emulated.into_iter().filter(|(said, _)| *said) {
            self.refuse(&place.child(name), format!("a card of the host's has no <{name}>: it is not QEMU's"));
        }
        self.taken_from_the_host(interface.managed == Some(true), place);
        self.seated(&interface.info, place);
    }

    fn user_network(&mut self, interface: &Interface) {
        let passt = by_passt(interface);
        let place = &interface.at;
        let backend = interface.backend.as_ref();
        if passt {
            let missing = self.caps.site.passt.is_none();
            self.refuse_if(missing, place, "passt is not installed (Debian has it in the package passt)");
            self.refuse_if(!self.caps.at_least(7, 2), place, "passt needs QEMU 7.2");
        }
        let only = "<source dev>, logFile and <portForward> are for <backend type='passt'/>";
        let log = backend.is_some_and(|backend| backend.log_file.is_some());
        let device = interface.source.as_ref().is_some_and(|source| source.dev.is_some());
        self.refuse_if(!passt && (log || device || !interface.forwards.is_empty()), place, only);
        for ip in &interface.addresses {
            let six = ip.family == Some(Family::Ipv6);
            let fits = ip.address.parse::<IpAddr>().is_ok_and(|address| address.is_ipv6() == six);
            self.refuse_if(!fits, &ip.at.attribute("address"), "this is no address of the family");
            let bits = if six { 128 } else { 32 };
            let long = ip.prefix.is_some_and(|prefix| prefix > bits);
            self.refuse_if(long, &ip.at.attribute("prefix"), "the prefix is longer than the address");
        }
        for forward in &interface.forwards {
            let address = forward.address.as_ref().is_some_and(|address| address.parse::<IpAddr>().is_err());
            self.refuse_if(address, &forward.at.attribute("address"), "this is no address");
            let word =
                |name: &String| name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '@'));
            let odd = forward.dev.as_ref().is_some_and(|name| !word(name));
            self.refuse_if(odd, &forward.at.attribute("dev"), "this is no name of a network device");
            for range in &forward.ranges {
                let back = range.end.is_some_and(|end| end < range.start);
                self.refuse_if(back, &range.at, "a range ends where it starts, or later");
            }
        }
    }

    fn socket(&mut self, interface: &Interface) {
        let Some(source) = &interface.source else {
            return self.refuse(&interface.at, "<source> with a port is needed");
        };
        self.refuse_if(source.port.is_none(), &source.at, "<source> with a port is needed");
        let address = source.address.is_some() || interface.kind == InterfaceKind::Server;
        self.refuse_if(!address, &source.at, "<source> needs an address");
        let here = source.local.is_some();
        let kinds = matches!(interface.kind, InterfaceKind::Mcast | InterfaceKind::Udp);
        self.refuse_if(here && !kinds, &source.at, "<local> is for type='mcast' and type='udp'");
        let missing = interface.kind == InterfaceKind::Udp && source.local.as_ref().is_none_or(|l| l.port.is_none());
        self.refuse_if(missing, &source.at, "type='udp' needs <local> with a port");
    }

    fn card(&mut self, interface: &Interface) {
        let place = &interface.at;
        let model = interface.model().unwrap_or_default();
        match card_type(model) {
            Some(device) => self.need_device(place, device),
            None => self.refuse(&place.child("model"), format!("network card '{model}' is not known")),
        }
        let virtio = model.starts_with("virtio");
        let queues = interface.driver.as_ref().and_then(|d| d.queues).is_some_and(|n| n > 1);
        let taps = interface.has_host_end();
        if let Some(driver) = &interface.driver {
            let plain = driver.txmode.is_none()
                && driver.ioeventfd.or(driver.event_idx).or(driver.rss).or(driver.rss_hash_report).is_none()
                && driver.host.is_none()
                && driver.guest.is_none()
                && driver.rx_queue_size.or(driver.tx_queue_size).is_none()
                && driver.virtio == Default::default();
            self.refuse_if(!plain && !virtio, &driver.at, "only virtio cards have these settings");
            let vhost = driver.name == Some(NetDriver::Vhost);
            self.refuse_if(
                vhost && !(virtio && taps),
                &driver.at.attribute("name"),
                "vhost is for virtio cards on a bridge, of type='direct' or 'ethernet'",
            );
            let none = vhost && !self.caps.site.vhost_net;
            self.refuse_if(
                none,
                &driver.at.attribute("name"),
                "there is no /dev/vhost-net (load the module vhost_net), or use name='qemu'",
            );
            let by_switch = interface.kind == InterfaceKind::VhostUser;
            let many = queues && !(virtio && (by_switch || taps && self.is_ours(interface)));
            let how = "several queues are for virtio cards of type='vhostuser' or 'network', and on the system bus on a \
                       bridge, of type='direct' or 'ethernet'";
            self.refuse_if(many, &driver.at.attribute("queues"), how);
            let few = driver.queues.is_some_and(|n| n == 0 || n > MOST_QUEUES);
            self.refuse_if(few, &driver.at.attribute("queues"), "there are 1 to 16 queues");
        }
        // That of a network is its bridge's, whatever is plugged in.
        let told = interface.mtu.is_some() && interface.kind != InterfaceKind::Network;
        self.refuse_if(told && !virtio, &place.child("mtu"), "only virtio cards are told their MTU");
    }

    /// Whether virtd makes the host's end itself: in a network of its own it does, whoever it is.
    fn is_ours(&self, interface: &Interface) -> bool {
        self.caps.site.makes_taps || interface.kind == InterfaceKind::Network
    }

    /// What is said of the host's end.
    fn host_side(&mut self, interface: &Interface, host_device: bool) {
        let place = &interface.at;
        let ours = host_device && self.is_ours(interface);
        if let Some(target) = interface.target.as_ref() {
            let name = target.dev.as_deref().unwrap_or_default();
            let chosen = !name.is_empty() && !name.starts_with("vnet") && !name.starts_with("tap");
            self.refuse_if(
                chosen && !ours,
                &place.child("target"),
                "the host's device has a name of its own only on the system bus",
            );
            self.refuse_if(name.len() > 15, &place.child("target"), "a network device's name has at most 15 bytes");
            let left = target.managed == Some(false);
            let fits = interface.kind == InterfaceKind::Ethernet && !name.is_empty();
            self.refuse_if(
                left && !fits,
                &target.at.attribute("managed"),
                "managed='no' needs type='ethernet' and the name of a device",
            );
        }
        if let Some(limits) = &interface.bandwidth {
            let how =
                "bandwidth is limited of type='network', and on the system bus of 'bridge', 'direct' and 'ethernet'";
            self.refuse_if(!ours, &limits.at, how);
            for rate in [&limits.inbound, &limits.outbound].into_iter().flatten() {
                self.refuse_if(rate.average.is_none_or(|n| n == 0), &rate.at, "a limit needs an average above 0");
            }
        }
        let fits = ours && interface.is_in_bridge();
        self.refuse_if(
            interface.is_isolated() && !fits,
            &place.child("port"),
            "isolated ports are for type='network', and for 'bridge' on the system bus",
        );
        let fits = ours && interface.target.as_ref().is_none_or(|target| target.managed != Some(false));
        if let Some(vlan) = &interface.vlan {
            self.vlan(vlan, fits && interface.is_in_bridge());
        }
        if let Some(filter) = &interface.filter {
            let how = "filters are for type='network', and for 'bridge' on the system bus";
            self.refuse_if(!(fits && interface.is_in_bridge()), &filter.at, how);
            if let Some(odd) = filter.odd_server() {
                let why = format!("the filter '{}' is of the other family than {}", filter.name, odd.value);
                self.refuse(&odd.at.attribute("value"), why);
            }
            if let Some(missing) = filter.missing() {
                let why = format!(
                    "the filter '{}' needs <parameter name='{missing}' value='…'/>: what a guest has is not learnt",
                    filter.name
                );
                self.refuse(&filter.at, why);
            }
        }
        if let Some(coalesce) = &interface.coalesce {
            self.refuse_if(
                !fits || interface.kind == InterfaceKind::Direct,
                &coalesce.at,
                "<coalesce> is for type='network', and for 'bridge' and 'ethernet' on the system bus",
            );
        }
        let buffer = interface.tune.is_some() && !host_device;
        self.refuse_if(buffer, &place.child("tune"), "a send buffer is for type='bridge', 'direct' and 'ethernet'");
        let addresses = !interface.addresses.is_empty() && interface.kind != InterfaceKind::User;
        self.refuse_if(addresses, &place.child("ip"), "<ip> is for type='user': QEMU does not configure the host");
    }

    fn vlan(&mut self, vlan: &Vlan, fits: bool) {
        self.refuse_if(
            !fits,
            &vlan.at,
            "VLANs are for type='network' and 'hostdev', and for 'bridge' on the system bus: plug the host's device into one",
        );
        self.refuse_if(vlan.tags.is_empty(), &vlan.at, "<vlan> needs a <tag>");
        let several = vlan.trunk == Some(false) && vlan.tags.len() > 1;
        self.refuse_if(several, &vlan.at.attribute("trunk"), "a card in several VLANs is a trunk");
        let natives = vlan.tags.iter().filter(|tag| tag.native.is_some()).count();
        self.refuse_if(natives > 1, &vlan.at, "packets without a tag are in one VLAN: one <tag> has a nativeMode");
        let alone = natives > 0 && !vlan.is_trunk();
        self.refuse_if(alone, &vlan.at, "a nativeMode is for trunk='yes'");
        for tag in &vlan.tags {
            self.refuse_if(!VLANS.contains(&tag.id), &tag.at.attribute("id"), "VLANs are 1 to 4094");
        }
    }
}
