//! Where a machine listens on TCP ports of the host: displays, and character devices that others come to.

use super::DomainDef;
use crate::device::chardev::{CharKind, CharSource, SocketMode};
use crate::device::display::{Graphics, ListenKind};
use crate::xml::Place;
use std::net::IpAddr;

/// Where it listens if the definition names no address.
pub const LOCALHOST: &str = "127.0.0.1";

/// A port that is fixed by the definition.
pub struct FixedPort {
    /// Whose it is, e.g. `graphics 'vnc'`.
    pub whose: String,
    /// As the definition says it, or as it is taken where that says nothing; empty where a network says it.
    pub address: String,
    /// Never 0.
    pub port: u16,
    /// Where the definition says so.
    pub place: Place,
    /// It is a display's, for which `-1` has one chosen.
    pub of_display: bool,
}

/// All of them, in the order of their devices. Ports that are chosen at the start are not among them.
pub fn fixed_ports(def: &DomainDef) -> Vec<FixedPort> {
    let devices = &def.devices;
    let mut all: Vec<FixedPort> = devices.graphics.iter().flat_map(of_display).collect();
    devices.serials.iter().for_each(|device| all.extend(of_end("serial", &device.source)));
    devices.parallels.iter().for_each(|device| all.extend(of_end("parallel", &device.source)));
    let consoles = devices.consoles.iter().filter(|console| !console.is_serial());
    consoles.for_each(|device| all.extend(of_end("console", &device.source)));
    devices.channels.iter().for_each(|device| all.extend(of_end("channel", &device.source)));
    devices.redirdevs.iter().for_each(|device| all.extend(of_end("redirdev", &device.source)));
    all
}

/// Those of a display, if it listens on the network.
fn of_display(display: &Graphics) -> Vec<FixedPort> {
    let first = display.listens.first();
    let own = first.and_then(|listen| listen.address.clone()).or_else(|| display.listen.clone());
    let unsaid = if display.socket.is_some() { ListenKind::Socket } else { ListenKind::Address };
    let address = match first.map_or(unsaid, |listen| listen.kind) {
        ListenKind::Address => own.unwrap_or_else(|| LOCALHOST.to_owned()),
        ListenKind::Network => own.unwrap_or_default(),
        ListenKind::None | ListenKind::Socket => return Vec::new(),
    };
    if display.autoport == Some(true) {
        return Vec::new();
    }
    let ports = [("port", display.port), ("tlsPort", display.tls_port), ("websocket", display.websocket)];
    let fixed = ports.into_iter().filter_map(|(attribute, port)| {
        let port = u16::try_from(port?).ok().filter(|port| *port > 0)?;
        let (whose, address) = (format!("graphics '{}'", display.kind), address.clone());
        Some(FixedPort { whose, address, port, place: display.at.attribute(attribute), of_display: true })
    });
    fixed.collect()
}

/// That of a character device, if others come to it.
fn of_end(device: &str, source: &CharSource) -> Option<FixedPort> {
    let bound = |mode: Option<SocketMode>| source.kind == CharKind::Tcp && mode == Some(SocketMode::Bind);
    let end = source.sources.iter().find(|end| bound(end.mode))?;
    let port = end.service.as_deref()?.parse().ok().filter(|port| *port > 0)?;
    let address = end.host.as_deref().unwrap_or(LOCALHOST).to_owned();
    let place = end.at.attribute("service");
    Some(FixedPort { whose: device.to_owned(), address, port, place, of_display: false })
}

impl FixedPort {
    /// Whether one of them keeps the other from listening.
    pub fn collides(&self, other: &FixedPort) -> bool {
        let everywhere = |fixed: &FixedPort| {
            fixed.address.is_empty() || fixed.address.parse().is_ok_and(|address: IpAddr| address.is_unspecified())
        };
        let same = self.address == other.address || everywhere(self) || everywhere(other);
        self.port == other.port && same
    }
}
