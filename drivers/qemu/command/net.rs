//! Network cards and what their cables are plugged into.

use super::args::Props;
use super::{Builder, id, list, turn, virtio};
use serde_json::json;
use virt_model::device::Interface;
use virt_model::device::interface::InterfaceKind;

/// The first file descriptor given to network devices; lower ones are the monitor's and room for more.
const FIRST_TAP_FD: i32 = 20;

/// A network device that QEMU finds open. QEMU may not start helpers behind its seccomp fence, so whoever starts it opens
/// the device first (see `tap`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// At which file descriptor.
    pub fd: i32,
    /// The host's bridge it is plugged into.
    pub bridge: String,
}

impl Builder<'_> {
    pub(super) fn interfaces(&mut self) {
        let def = self.def;
        for (n, interface) in def.devices.interfaces.iter().enumerate() {
            let netdev = format!("hostnet{n}");
            self.netdev(interface, &netdev);
            let props = self.card(interface, &netdev);
            self.args.device(props);
            if !interface.link_up() {
                self.setup.push(("set_link".to_owned(), json!({"name": id(&interface.info), "up": false})));
            }
        }
    }

    fn netdev(&mut self, interface: &Interface, netdev: &str) {
        if interface.kind == InterfaceKind::User {
            self.args.pair("-netdev", list("user").set("id", netdev));
        } else if let Some(bridge) = interface.bridge() {
            let fd = self.taps.len().try_into().map_or(FIRST_TAP_FD, |n: i32| FIRST_TAP_FD + n);
            self.args.pair("-netdev", list("tap").set("fd", fd).set("id", netdev));
            self.taps.push(Tap { fd, bridge: bridge.to_owned() });
        }
    }

    fn card(&self, interface: &Interface, netdev: &str) -> Props {
        let driver = interface.driver.as_ref();
        let queues = driver.and_then(|d| d.queues).filter(|n| *n > 1);
        let props = Props::device(card_type(interface.model().unwrap_or_default()).unwrap_or_default())
            .maybe("mq", queues.map(|_| true))
            .maybe("vectors", queues.map(|n| n.saturating_mul(2).saturating_add(2)))
            .maybe("rx_queue_size", driver.and_then(|d| d.rx_queue_size))
            .maybe("tx_queue_size", driver.and_then(|d| d.tx_queue_size))
            .maybe("host_mtu", interface.mtu.as_ref().map(|mtu| mtu.size))
            .extend(driver.map(|d| virtio(&d.virtio)).unwrap_or_default())
            .set("netdev", netdev)
            .set("id", id(&interface.info))
            .maybe("mac", interface.mac().map(|mac| mac.to_string()));
        turn(props, self.boot_index(&interface.info)).extend(self.pci(&interface.info))
    }
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
