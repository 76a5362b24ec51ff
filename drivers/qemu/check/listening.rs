//! Where a machine listens on TCP ports of the host: displays, and character devices that others come to.

use super::Check;
use crate::qemu::complete::LOCALHOST;
use std::net::IpAddr;
use virt_model::device::chardev::{CharKind, CharSource, SocketMode};
use virt_model::device::display::ListenKind;
use virt_model::domain::DomainDef;
use virt_model::xml::Place;

/// A port that is fixed by the definition.
pub struct FixedPort {
    /// Whose it is, e.g. `graphics 'vnc'`.
    pub whose: String,
    /// As the definition says it, or as it is taken where that says nothing.
    pub address: String,
    /// Never 0.
    pub port: u16,
    /// Where the definition says so.
    pub place: Place,
}

/// All of them, in the order of their devices. Ports that are chosen at the start are not among them.
pub fn fixed_ports(def: &DomainDef) -> Vec<FixedPort> {
    let mut all = Vec::new();
    for graphics in def.devices.graphics.iter().filter(|graphics| graphics.autoport != Some(true)) {
        let Some(listen) = graphics.listens.first().filter(|listen| listen.kind == ListenKind::Address) else {
            continue;
        };
        let address = listen.address.as_deref().or(graphics.listen.as_deref()).unwrap_or(LOCALHOST);
        let ports = [("port", graphics.port), ("tlsPort", graphics.tls_port), ("websocket", graphics.websocket)];
        for (attribute, port) in ports {
            let Some(port) = port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0) else { continue };
            let (whose, address) = (format!("graphics '{}'", graphics.kind), address.to_owned());
            all.push(FixedPort { whose, address, port, place: graphics.at.attribute(attribute) });
        }
    }
    let devices = &def.devices;
    devices.serials.iter().for_each(|device| all.extend(of_end("serial", &device.source)));
    devices.parallels.iter().for_each(|device| all.extend(of_end("parallel", &device.source)));
    let consoles = devices.consoles.iter().filter(|console| !console.is_serial());
    consoles.for_each(|device| all.extend(of_end("console", &device.source)));
    devices.channels.iter().for_each(|device| all.extend(of_end("channel", &device.source)));
    devices.redirdevs.iter().for_each(|device| all.extend(of_end("redirdev", &device.source)));
    all
}

/// That of a character device, if others come to it.
fn of_end(device: &str, source: &CharSource) -> Option<FixedPort> {
    let bound = |mode: Option<SocketMode>| source.kind == CharKind::Tcp && mode == Some(SocketMode::Bind);
    let end = source.sources.iter().find(|end| bound(end.mode))?;
    let port = end.service.as_deref()?.parse().ok().filter(|port| *port > 0)?;
    let address = end.host.as_deref().unwrap_or(LOCALHOST).to_owned();
    Some(FixedPort { whose: device.to_owned(), address, port, place: end.at.attribute("service") })
}

impl FixedPort {
    /// Whether one of them keeps the other from listening.
    fn collides(&self, other: &FixedPort) -> bool {
        let everywhere = |fixed: &FixedPort| {
            fixed.address.is_empty() || fixed.address.parse().is_ok_and(|address: IpAddr| address.is_unspecified())
        };
        let same = self.address == other.address || everywhere(self) || everywhere(other);
        self.port == other.port && same
    }
}

impl Check<'_> {
    /// Refuses that two of a machine listen at one place. (Of its displays alone the model says so, too.)
    pub(super) fn listening(&mut self) {
        let all = fixed_ports(self.def);
        for (n, one) in all.iter().enumerate() {
            if let Some(first) = all[..n].iter().find(|first| first.collides(one)) {
                let (port, whose) = (one.port, &first.whose);
                self.refuse(
                    &one.place,
                    format!("TCP port {port} is what {whose} of this machine listens on: name another"),
                );
            }
        }
    }
}
