//! Serial ports, consoles, channels, USB redirection: a back end at the host's side, a device at the guest's.

use super::args::{List, Props};
use super::{Builder, id, list, turn};
use virt_model::device::chardev::{ChannelKind, CharKind, CharProtocol, SerialKind, SocketMode};
use virt_model::device::{AddressKind, CharSource, ControllerKind, DeviceInfo, Serial};

impl Builder<'_> {
    pub(super) fn character_devices(&mut self) {
        let def = self.def;
        for serial in &def.devices.serials {
            let chardev = self.back_end(&serial.source, id(&serial.info), None);
            let props = self.serial(serial, chardev);
            self.args.device(props);
        }
        for channel in def.devices.channels.iter().filter(|c| c.target.kind == ChannelKind::Virtio) {
            let chardev = self.back_end(&channel.source, id(&channel.info), Some("vdagent"));
            let props = self.port("virtserialport", &channel.info, chardev);
            self.args.device(props.maybe("name", channel.target.name.as_deref()));
        }
        for console in def.devices.consoles.iter().filter(|c| !c.is_serial()) {
            let chardev = self.back_end(&console.source, id(&console.info), None);
            let props = self.port("virtconsole", &console.info, chardev);
            self.args.device(props);
        }
    }

    /// A reader at the screen of a person, over SPICE.
    pub(super) fn smartcards(&mut self) {
        let def = self.def;
        for (n, _) in def.devices.untyped().iter().filter(|d| d.name == "smartcard").enumerate() {
            let source = CharSource::new(CharKind::SpiceVmc);
            let chardev = self.back_end(&source, &format!("smartcard{n}"), Some("smartcard"));
            let reader = self.controller(ControllerKind::Ccid, 0).and_then(|c| c.info.alias()).unwrap_or("ccid0");
            let props = Props::device("ccid-card-passthru").set("chardev", chardev).set("id", format!("smartcard{n}"));
            self.args.device(props.set("bus", format!("{reader}.0")));
        }
    }

    pub(super) fn redirections(&mut self) {
        let def = self.def;
        for redirection in &def.devices.redirdevs {
            let chardev = self.back_end(&redirection.source, id(&redirection.info), Some("usbredir"));
            let props = Props::device("usb-redir").set("chardev", chardev).set("id", id(&redirection.info));
            let props = turn(props, self.boot_index(&redirection.info)).extend(self.usb(&redirection.info));
            self.args.device(props);
        }
    }

    fn serial(&self, serial: &Serial, chardev: String) -> Props {
        let target = serial.target.as_ref();
        let pci = target.and_then(|t| t.kind) == Some(SerialKind::Pci);
        let props = Props::device(if pci { "pci-serial" } else { "isa-serial" });
        let props = props.set("chardev", chardev).set("id", id(&serial.info));
        if pci {
            return props.extend(self.pci(&serial.info));
        }
        let props = props.maybe("index", target.and_then(|t| t.port));
        match serial.info.address.as_ref().map(|a| &a.kind) {
            Some(AddressKind::Isa(isa)) => props.maybe("iobase", isa.iobase).maybe("irq", isa.irq),
            _ => props,
        }
    }

    /// A device on virtio-serial.
    fn port(&self, device: &str, info: &DeviceInfo, chardev: String) -> Props {
        let props = Props::device(device);
        let props = match info.address.as_ref().map(|a| &a.kind) {
            Some(AddressKind::VirtioSerial(address)) => {
                let controller = self.controller(ControllerKind::VirtioSerial, address.controller);
                let bus = controller.and_then(|c| c.info.alias()).unwrap_or_default();
                props.set("bus", format!("{bus}.0")).maybe("nr", address.port)
            }
            _ => props,
        };
        props.set("chardev", chardev).set("id", id(info))
    }

    /// The host's side; gives its name. `spice_name`: what SPICE clients call such a device.
    fn back_end(&mut self, source: &CharSource, device: &str, spice_name: Option<&str>) -> String {
        let name = format!("char{device}");
        let start = |kind: &str| list(kind).set("id", &name);
        let path = source.path().unwrap_or_default();
        let channel = source.sources.iter().find_map(|s| s.channel.as_deref());
        let back_end = match source.kind {
            CharKind::Null => start("null"),
            CharKind::Dev => start("serial").set("path", path),
            CharKind::Pipe => start("pipe").set("path", path),
            CharKind::File => {
                let append = source.sources.iter().find_map(|s| s.append);
                start("file").set("path", path).maybe_on_off("append", append)
            }
            CharKind::Unix => socket_options(start("socket").set("path", path), source),
            CharKind::Tcp => tcp(start("socket"), source),
            CharKind::Udp => udp(start("udp"), source),
            CharKind::SpiceVmc => start("spicevmc").maybe("name", spice_name),
            CharKind::SpicePort => start("spiceport").maybe("name", channel),
            CharKind::Dbus => start("dbus").maybe("name", channel),
            _ => start("pty"),
        };
        match source.kind {
            CharKind::Dev | CharKind::Pipe => self.open(path, true, false),
            CharKind::File => self.output(path),
            _ => {}
        }
        let log = source.log.as_ref();
        if let Some(log) = log {
            self.output(&log.file);
        }
        let back_end = back_end.maybe("logfile", log.map(|log| &log.file));
        self.args.pair("-chardev", back_end.maybe_on_off("logappend", log.and_then(|log| log.append)));
        name
    }
}

fn is_server(source: &CharSource) -> bool {
    source.sources.iter().any(|s| s.mode == Some(SocketMode::Bind))
}

fn socket_options(list: List, source: &CharSource) -> List {
    if is_server(source) {
        return list.set("server", "on").set("wait", "off");
    }
    let reconnect = source.sources.iter().find_map(|s| s.reconnect.as_ref());
    list.maybe("reconnect", reconnect.filter(|r| r.enabled == Some(true)).and_then(|r| r.timeout))
}

fn tcp(list: List, source: &CharSource) -> List {
    let end = source.sources.first();
    let list = list
        .set("host", end.and_then(|s| s.host.as_deref()).unwrap_or("127.0.0.1"))
        .set("port", end.and_then(|s| s.service.as_deref()).unwrap_or_default());
    let telnet = source.protocol.as_ref().is_some_and(|p| p.kind == CharProtocol::Telnet);
    socket_options(list.maybe("telnet", telnet.then_some("on")), source)
}

fn udp(list: List, source: &CharSource) -> List {
    let end = |mode: SocketMode| source.sources.iter().find(move |s| s.mode == Some(mode));
    let to = end(SocketMode::Connect).or_else(|| source.sources.iter().find(|s| s.mode.is_none()));
    let list =
        list.maybe("host", to.and_then(|s| s.host.as_deref())).maybe("port", to.and_then(|s| s.service.as_deref()));
    let from = end(SocketMode::Bind);
    list.maybe("localaddr", from.and_then(|s| s.host.as_deref()))
        .maybe("localport", from.and_then(|s| s.service.as_deref()))
}
