//! Character devices: `<serial>`, `<console>`, `<channel>`, `<redirdev>`. They share what is at the host's end.

use super::display::{Clipboard, Mouse};
use super::{DeviceInfo, Devices};
use crate::domain::part::{element, flat};
use crate::domain::value::choices;

choices! {
    /// What is at the host's end.
    pub enum CharKind {
        Pty = "pty", Null = "null", Vc = "vc", Dev = "dev", File = "file", Pipe = "pipe", Stdio = "stdio", Udp = "udp",
        Tcp = "tcp", Unix = "unix", SpiceVmc = "spicevmc", SpicePort = "spiceport", Nmdm = "nmdm",
        QemuVdagent = "qemu-vdagent", Dbus = "dbus",
    }
}

choices! {
    /// Who listens.
    pub enum SocketMode { Connect = "connect", Bind = "bind", }
}

choices! {
    /// What is spoken on a TCP connection.
    pub enum CharProtocol { Raw = "raw", Telnet = "telnet", Telnets = "telnets", Tls = "tls", }
}

flat! {
    /// The host's end.
    pub struct CharSource {
        /// What it is; `pty` if absent.
        or_default "type" => kind: CharKind,
        /// Runtime: the terminal, where libvirt repeats it on `<console>`.
        attr "tty" => tty: Option<String>,
        /// `<source>`; UDP has two, `bind` and `connect`.
        children "source" => sources: Vec<CharAddress>,
        /// `<protocol>`
        child "protocol" => protocol: Option<Protocol>,
        /// `<log>`
        child "log" => log: Option<Log>,
    }
}

impl CharSource {
    /// An end of that kind with nothing said of it.
    pub fn new(kind: CharKind) -> CharSource {
        CharSource { kind, ..CharSource::default() }
    }

    /// The path of file, device, pipe, socket or (runtime) terminal.
    pub fn path(&self) -> Option<&str> {
        self.sources.iter().find_map(|source| source.path.as_deref())
    }

    /// Sets the path.
    pub fn set_path(&mut self, path: Option<String>) {
        if self.sources.is_empty() && path.is_some() {
            self.sources.push(CharAddress::default());
        }
        self.sources.iter_mut().for_each(|source| source.path.clone_from(&path));
    }
}

element! {
    /// `<source>` of a character device.
    pub struct CharAddress {
        /// tcp, udp, unix: who listens.
        attr "mode" => mode: Option<SocketMode>,
        /// tcp, udp.
        attr "host" => host: Option<String>,
        /// tcp, udp: port number or service name.
        attr "service" => service: Option<String>,
        /// tcp: encrypted.
        yes_no "tls" => tls: Option<bool>,
        /// file, dev, pipe, unix; pty: runtime.
        attr "path" => path: Option<String>,
        /// file: keep what is there.
        on_off "append" => append: Option<bool>,
        /// spiceport, dbus: its name.
        attr "channel" => channel: Option<String>,
        /// tcp, unix as client: try again.
        child "reconnect" => reconnect: Option<Reconnect>,
        /// qemu-vdagent: copy and paste.
        child "clipboard" => clipboard: Option<Clipboard>,
        /// qemu-vdagent: whose pointer counts.
        child "mouse" => mouse: Option<Mouse>,
    }
}

element! {
    /// `<reconnect>`
    pub struct Reconnect {
        /// Whether to try again.
        yes_no "enabled" => enabled: Option<bool>,
        /// After how many seconds.
        attr "timeout" => timeout: Option<u32>,
    }
}

element! {
    /// `<protocol>`
    pub struct Protocol {
        /// What is spoken.
        need "type" => kind: CharProtocol,
    }
}

element! {
    /// `<log>`: a file with everything the guest wrote.
    pub struct Log {
        /// Its path.
        need "file" => file: String,
        /// Keep what is there.
        on_off "append" => append: Option<bool>,
    }
}

element! {
    /// `<serial>`
    pub struct Serial {
        /// The host's end.
        flat => source: CharSource,
        /// The guest's end.
        child "target" => target: Option<SerialTarget>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

choices! {
    /// What a serial port is plugged into.
    pub enum SerialKind {
        Isa = "isa-serial", Usb = "usb-serial", Pci = "pci-serial", SpaprVio = "spapr-vio-serial",
        System = "system-serial", Sclp = "sclp-serial", IsaDebug = "isa-debug",
    }
}

element! {
    /// `<serial><target>`
    pub struct SerialTarget {
        /// What it is plugged into.
        attr "type" => kind: Option<SerialKind>,
        /// Which, from 0.
        attr "port" => port: Option<u32>,
        /// `<model>`
        child "model" => model: Option<SerialModel>,
    }
}

element! {
    /// `<serial><target><model>`
    pub struct SerialModel {
        /// `isa-serial`, `pci-serial`, `isa-debugcon`, …
        need "name" => name: String,
    }
}

element! {
    /// `<parallel>`
    pub struct Parallel {
        /// The host's end.
        flat => source: CharSource,
        /// The guest's end.
        child "target" => target: Option<ParallelTarget>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

element! {
    /// `<parallel><target>`
    pub struct ParallelTarget {
        /// Which, from 0.
        attr "port" => port: Option<u32>,
    }
}

element! {
    /// `<console>`
    pub struct Console {
        /// The host's end.
        flat => source: CharSource,
        /// The guest's end.
        child "target" => target: Option<ConsoleTarget>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

choices! {
    /// What a console is.
    pub enum ConsoleKind {
        Serial = "serial", Virtio = "virtio", Xen = "xen", Uml = "uml", Lxc = "lxc", Openvz = "openvz", Sclp = "sclp",
        Sclplm = "sclplm",
    }
}

element! {
    /// `<console><target>`
    pub struct ConsoleTarget {
        /// What it is; `serial`: the same device as the first serial port.
        attr "type" => kind: Option<ConsoleKind>,
        /// Which, from 0.
        attr "port" => port: Option<u32>,
    }
}

impl Console {
    /// Whether it is only another name for a serial port.
    pub fn is_serial(&self) -> bool {
        let kind = self.target.as_ref().and_then(|target| target.kind);
        matches!(kind, None | Some(ConsoleKind::Serial))
    }
}

/// What a person can type at.
#[derive(Clone, Copy, Debug)]
pub struct AnyConsole<'a> {
    /// Name and place.
    pub info: &'a DeviceInfo,
    /// The host's end.
    pub source: &'a CharSource,
    /// Which of its kind, from 0, if that is said.
    pub port: Option<u32>,
}

impl Devices {
    /// Every serial port and every console, but for consoles that are serial ports under another name.
    pub fn all_consoles(&self) -> impl Iterator<Item = AnyConsole<'_>> {
        let serials = self.serials.iter().map(|serial| AnyConsole {
            info: &serial.info,
            source: &serial.source,
            port: serial.target.as_ref().and_then(|target| target.port),
        });
        let consoles = self.consoles.iter().filter(|console| !console.is_serial()).map(|console| AnyConsole {
            info: &console.info,
            source: &console.source,
            port: console.target.as_ref().and_then(|target| target.port),
        });
        serials.chain(consoles)
    }
}

element! {
    /// `<channel>`
    pub struct Channel {
        /// The host's end.
        flat => source: CharSource,
        /// The guest's end.
        must "target" => target: ChannelTarget,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

choices! {
    /// What a channel is to the guest.
    pub enum ChannelKind { Virtio = "virtio", Guestfwd = "guestfwd", Xen = "xen", }
}

choices! {
    /// Whether something in the guest has opened it.
    pub enum ChannelState { Connected = "connected", Disconnected = "disconnected", }
}

element! {
    /// `<channel><target>`
    pub struct ChannelTarget {
        /// What it is to the guest.
        need "type" => kind: ChannelKind,
        /// Name of a virtio port, e.g. `org.qemu.guest_agent.0`.
        attr "name" => name: Option<String>,
        /// Guest forward: where the guest connects to.
        attr "address" => address: Option<String>,
        /// Guest forward: its port.
        attr "port" => port: Option<u32>,
        /// Runtime: whether the guest has opened it.
        attr "state" => state: Option<ChannelState>,
    }
}

choices! {
    /// The bus of a redirected device.
    pub enum RedirBus { Usb = "usb", }
}

element! {
    /// `<redirdev>`: a USB device of the person at the screen.
    pub struct Redirdev {
        /// Always USB.
        need "bus" => bus: RedirBus,
        /// The host's end.
        flat => source: CharSource,
        /// Name, place, boot order.
        flat => info: DeviceInfo,
    }
}

element! {
    /// `<redirfilter>`: which devices may be redirected; the first rule that fits counts.
    pub struct Redirfilter {
        /// Each rule.
        children "usbdev" => rules: Vec<RedirRule>,
    }
}

element! {
    /// `<usbdev>`: numbers are hexadecimal, and absent or -1 is any.
    pub struct RedirRule {
        /// Class of the device.
        attr "class" => class: Option<String>,
        /// Its maker.
        attr "vendor" => vendor: Option<String>,
        /// The product.
        attr "product" => product: Option<String>,
        /// As `1.10`.
        attr "version" => version: Option<String>,
        /// Whether it may be.
        yes_no "allow" => allow: Option<bool>,
    }
}
