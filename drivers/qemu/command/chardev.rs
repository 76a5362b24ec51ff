//! Serial ports, consoles, channels, USB redirection: a back end at the host's side, a device at the guest's.

use super::args::{List, Props};
use super::{Builder, id, list, turn};
use crate::qemu::capabilities::End;
use crate::qemu::consoles::transcript;
use std::path::PathBuf;
use virt_model::device::chardev::{ChannelKind, CharKind, CharProtocol, RedirRule, SerialKind, SocketMode};
use virt_model::device::display::MouseMode;
use virt_model::device::{AddressKind, Channel, CharSource, ControllerKind, DeviceInfo, Redirdev, Redirfilter, Serial};
use virt_model::domain::listening::LOCALHOST;

impl Builder<'_> {
    pub(super) fn character_devices(&mut self) {
        let def = self.def;
        for serial in &def.devices.serials {
            let chardev = self.console_end(&serial.source, id(&serial.info));
            self.serial_port(serial, chardev);
        }
        for parallel in &def.devices.parallels {
            let chardev = self.back_end_as(&parallel.source, id(&parallel.info), None, "parallel", None);
            let port = parallel.target.as_ref().and_then(|target| target.port);
            let props = Props::device("isa-parallel").set("chardev", chardev).set("id", id(&parallel.info));
            self.args.device(props.maybe("index", port));
        }
        for channel in def.devices.channels.iter().filter(|c| c.target.kind == ChannelKind::Virtio) {
            self.channel(channel);
        }
        for console in def.devices.consoles.iter().filter(|c| !c.is_serial()) {
            let chardev = self.console_end(&console.source, id(&console.info));
            let props = self.port("virtconsole", &console.info, chardev);
            self.args.device(props);
        }
    }

    /// A port whose other end is `chardev`.
    pub(super) fn serial_port(&mut self, serial: &Serial, chardev: String) {
        let props = self.serial(serial, chardev);
        self.args.device(props);
    }

    pub(super) fn channel(&mut self, channel: &Channel) {
        let chardev = self.back_end(&channel.source, id(&channel.info), Some("vdagent"));
        let props = self.port("virtserialport", &channel.info, chardev);
        self.args.device(props.maybe("name", channel.target.name.as_deref()));
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
            self.redirection(redirection);
        }
    }

    pub(super) fn redirection(&mut self, redirection: &Redirdev) {
        let chardev = self.back_end(&redirection.source, id(&redirection.info), Some("usbredir"));
        let props = Props::device("usb-redir").set("chardev", chardev).set("id", id(&redirection.info));
        let rules = self.def.devices.redirfilter.as_ref().filter(|filter| !filter.rules.is_empty());
        let props = props.maybe("filter", rules.map(filter));
        let props = turn(props, self.boot_index(&redirection.info)).extend(self.usb(&redirection.info));
        self.args.device(props);
    }

    fn serial(&self, serial: &Serial, chardev: String) -> Props {
        let target = serial.target.as_ref();
        let kind = target.and_then(|t| t.kind).unwrap_or_default();
        let props = Props::device(serial_device(kind)).set("chardev", chardev).set("id", id(&serial.info));
        let props = match kind {
            SerialKind::Pci => return props.extend(self.pci(&serial.info)),
            SerialKind::Usb => return props.extend(self.usb(&serial.info)),
            SerialKind::IsaDebug => props,
            _ => props.maybe("index", target.and_then(|t| t.port)),
        };
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
    pub(super) fn back_end(&mut self, source: &CharSource, device: &str, spice_name: Option<&str>) -> String {
        self.back_end_as(source, device, spice_name, "serial", None)
    }

    /// The same for what says something to people, which is kept.
    fn console_end(&mut self, source: &CharSource, device: &str) -> String {
        let kept = transcript(self.place.runtime_dir, device, source);
        self.back_end_as(source, device, None, "serial", kept)
    }

    /// The same; a device of the host's is opened as one of that kind, and what comes is kept there.
    fn back_end_as(
        &mut self,
        source: &CharSource,
        device: &str,
        spice_name: Option<&str>,
        port: &str,
        kept: Option<PathBuf>,
    ) -> String {
        let name = format!("char{device}");
        let start = |kind: &str| list(kind).set("id", &name);
        let path = source.path().unwrap_or_default();
        let channel = source.sources.iter().find_map(|s| s.channel.as_deref());
        let back_end = match source.kind {
            CharKind::Null => start("null"),
            CharKind::Dev => start(port).set("path", path),
            CharKind::Pipe => start("pipe").set("path", path),
            CharKind::File => {
                let append = source.sources.iter().find_map(|s| s.append);
                start("file").set("path", path).maybe_on_off("append", append)
            }
            CharKind::Unix => socket_options(start("socket").set("path", path), source),
            CharKind::Tcp if is_encrypted(source) => {
                let credentials = format!("{name}-tls");
                self.credentials(&credentials, if is_server(source) { End::Server } else { End::Client });
                tcp(start("socket"), source).set("tls-creds", credentials)
            }
            CharKind::Tcp => tcp(start("socket"), source),
            CharKind::Udp => udp(start("udp"), source),
            CharKind::SpiceVmc => start("spicevmc").maybe("name", spice_name),
            CharKind::SpicePort => start("spiceport").maybe("name", channel),
            CharKind::QemuVdagent => vdagent(start("qemu-vdagent").maybe("name", spice_name), source),
            CharKind::Dbus => start("dbus").maybe("name", channel),
            _ => start("pty"),
        };
        match source.kind {
            CharKind::Dev | CharKind::Pipe => self.open(path, true),
            CharKind::File => self.output(path),
            _ => {}
        }
        let log = source.log.as_ref();
        if let Some(log) = log {
            self.output(&log.file);
        }
        let back_end = match &kept {
            // QEMU makes it, in the guest's own folder.
            Some(kept) => back_end.set("logfile", kept.display()).set("logappend", "on"),
            None => back_end
                .maybe("logfile", log.map(|log| &log.file))
                .maybe_on_off("logappend", log.and_then(|log| log.append)),
        };
        self.args.pair("-chardev", back_end);
        name
    }
}

/// QEMU's name of a serial port.
pub fn serial_device(kind: SerialKind) -> &'static str {
    match kind {
        SerialKind::Pci => "pci-serial",
        SerialKind::Usb => "usb-serial",
        SerialKind::IsaDebug => "isa-debugcon",
        _ => "isa-serial",
    }
}

/// Rules in USB redirection's own words; whatever no rule fits may be redirected, as libvirt has it.
fn filter(filter: &Redirfilter) -> String {
    let number = |text: &Option<String>| usb_number(text.as_deref()).unwrap_or(-1);
    let hex = |n: i64, digits: usize| if n < 0 { "-1".to_owned() } else { format!("0x{n:0digits$X}") };
    let rule = |rule: &RedirRule| {
        let version = rule.version.as_deref().and_then(usb_version).map_or(-1, i64::from);
        let numbers = [hex(number(&rule.class), 2), hex(number(&rule.vendor), 4), hex(number(&rule.product), 4)];
        format!("{}:{}:{}", numbers.join(":"), hex(version, 4), u8::from(rule.allow != Some(false)))
    };
    filter.rules.iter().map(rule).collect::<Vec<_>>().join("|")
}

/// A number of a device, hexadecimal as such numbers are; -1 is any.
pub fn usb_number(text: Option<&str>) -> Option<i64> {
    let Some(text) = text.filter(|text| *text != "-1") else { return Some(-1) };
    i64::from_str_radix(text.trim_start_matches("0x"), 16).ok().filter(|n| (0..=0xffff).contains(n))
}

/// A version such as 1.10, in decimal digits of four bits each.
pub fn usb_version(text: &str) -> Option<u16> {
    let (major, minor) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| text.parse::<u16>().ok().filter(|n| *n < 100).map(|n| ((n / 10) << 4) | (n % 10));
    Some((digits(major)? << 8) | digits(minor)?)
}

fn vdagent(list: List, source: &CharSource) -> List {
    let clipboard = source.sources.iter().find_map(|s| s.clipboard.as_ref()?.copypaste);
    let mouse = source.sources.iter().find_map(|s| s.mouse.as_ref()).map(|mouse| mouse.mode == MouseMode::Client);
    list.maybe_on_off("clipboard", clipboard).maybe_on_off("mouse", mouse)
}

fn is_encrypted(source: &CharSource) -> bool {
    source.sources.iter().any(|s| s.tls == Some(true))
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
        .set("host", end.and_then(|s| s.host.as_deref()).unwrap_or(LOCALHOST))
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
