//! Serial and parallel ports, consoles, channels, USB redirection, smartcards: what is at the host's end, and the guest's.

use super::Check;
use crate::qemu::capabilities::End;
use crate::qemu::command::{serial_device, usb_number, usb_version};
use virt_model::device::chardev::{ChannelKind, CharKind, CharProtocol, ConsoleKind, SerialKind, SocketMode};
use virt_model::device::display::GraphicsKind;
use virt_model::device::{Channel, CharSource, Serial};
use virt_model::xml::Place;

impl Check<'_> {
    pub(super) fn character_devices(&mut self) {
        let devices = &self.def.devices;
        devices.serials.iter().for_each(|serial| self.serial(serial));
        for parallel in &devices.parallels {
            self.back_end(&parallel.source, &parallel.at);
            self.need_device(&parallel.at, "isa-parallel");
        }
        self.refuse_if(devices.parallels.len() > 3, &devices.at, "a PC has at most three parallel ports");
        for (n, console) in devices.consoles.iter().enumerate() {
            if console.is_serial() {
                self.refuse_if(n > 0, &console.at, "only the first console can be a serial port: add a <serial>");
                continue;
            }
            self.back_end(&console.source, &console.at);
            let kind = console.target.as_ref().and_then(|t| t.kind).unwrap_or(ConsoleKind::Serial);
            let virtio = kind == ConsoleKind::Virtio;
            self.refuse_if(
                !virtio,
                &console.at.child("target"),
                &format!("consoles of type='{kind}' are not supported"),
            );
        }
        for channel in &devices.channels {
            let kind = channel.target.kind;
            if kind != ChannelKind::Virtio {
                let how = "a service of the host's is reached over the network, or over a channel of type='virtio'";
                self.refuse(&channel.target.at, format!("channels of type='{kind}' are not supported: {how}"));
            }
            self.vdagent(channel);
            let chosen_for = channel.source.kind == CharKind::Unix;
            if !(chosen_for && channel.source.path().is_none()) {
                self.back_end(&channel.source, &channel.at);
            }
        }
        for redirection in &devices.redirdevs {
            self.back_end(&redirection.source, &redirection.at);
            self.need_device(&redirection.at, "usb-redir");
        }
        self.redirection_filter();
    }

    fn serial(&mut self, serial: &Serial) {
        self.back_end(&serial.source, &serial.at);
        let target = serial.target.as_ref();
        let kind = target.and_then(|t| t.kind).unwrap_or_default();
        if matches!(kind, SerialKind::Isa | SerialKind::Pci | SerialKind::Usb | SerialKind::IsaDebug) {
            self.need_device(&serial.at, serial_device(kind));
        } else {
            self.refuse(&serial.at.child("target"), format!("serial ports of type='{kind}' are not supported yet"));
        }
        let model = target.and_then(|t| t.model.as_ref()).map(|m| &*m.name);
        let odd = model.is_some_and(|model| {
            let debug = kind == SerialKind::IsaDebug && model == "isa-debugcon";
            model != kind.as_str() && !debug
        });
        self.refuse_if(odd, &serial.at.child("target"), "this model is not one of that type");
    }

    /// Copy and paste without SPICE.
    fn vdagent(&mut self, channel: &Channel) {
        let agent = channel.source.kind == CharKind::QemuVdagent;
        let said = channel.source.sources.iter().any(|s| s.clipboard.is_some() || s.mouse.is_some());
        let how = "<clipboard> and <mouse> are for type='qemu-vdagent'";
        self.refuse_if(said && !agent, &channel.at, how);
        let named = channel.target.name.as_deref() == Some("com.redhat.spice.0");
        let how = "type='qemu-vdagent' is for <target type='virtio' name='com.redhat.spice.0'/>";
        self.refuse_if(agent && !named, &channel.target.at, how);
    }

    fn redirection_filter(&mut self) {
        let Some(filter) = &self.def.devices.redirfilter else { return };
        let none = self.def.devices.redirdevs.is_empty();
        self.refuse_if(none, &filter.at, "there is no <redirdev> that this could be for");
        for rule in &filter.rules {
            self.refuse_if(rule.allow.is_none(), &rule.at, "a rule says allow='yes' or allow='no'");
            for (name, value, most) in
                [("class", &rule.class, 0xff), ("vendor", &rule.vendor, 0xffff), ("product", &rule.product, 0xffff)]
            {
                let fits = usb_number(value.as_deref()).is_some_and(|n| n <= most);
                self.refuse_if(
                    !fits,
                    &rule.at.attribute(name),
                    "this is a hexadecimal number such as 0x08, or -1 for any",
                );
            }
            let version = rule.version.as_deref().filter(|version| *version != "-1");
            let odd = version.is_some_and(|version| usb_version(version).is_none());
            self.refuse_if(odd, &rule.at.attribute("version"), "a version is like 1.10, or -1 for any");
        }
    }

    /// The only reader there is: that of the person at the SPICE screen.
    pub(super) fn smartcards(&mut self) {
        let cards = self.def.devices.untyped().iter().filter(|device| device.name == "smartcard");
        for (n, card) in cards.enumerate() {
            let spice = self.def.devices.graphics.iter().any(|g| g.kind == GraphicsKind::Spice);
            let passed = (card.attr("mode"), card.attr("type")) == (Some("passthrough"), Some("spicevmc"));
            let message = "a smartcard is supported with mode='passthrough' type='spicevmc' and spice graphics";
            self.refuse_if(!passed || !spice, &card.at, message);
            self.refuse_if(n > 0, &card.at, "a guest has at most one smartcard");
            self.need_device(&card.at, "ccid-card-passthru");
        }
    }

    pub(super) fn back_end(&mut self, source: &CharSource, place: &Place) {
        let kind = source.kind;
        let at = place.attribute("type");
        let spice = matches!(kind, CharKind::SpiceVmc | CharKind::SpicePort);
        let has_spice = self.def.devices.graphics.iter().any(|g| g.kind == GraphicsKind::Spice);
        self.refuse_if(spice && !has_spice, &at, &format!("type='{kind}' needs <graphics type='spice'>"));
        let path = source.path().is_some_and(|path| path.starts_with('/'));
        match kind {
            CharKind::Pty | CharKind::Null | CharKind::SpiceVmc | CharKind::SpicePort => {}
            CharKind::Dev | CharKind::File | CharKind::Pipe | CharKind::Unix => {
                self.refuse_if(!path, place, &format!("type='{kind}' needs <source path='…'/> with an absolute path"));
            }
            CharKind::Tcp | CharKind::Udp => {
                let service = source.sources.iter().any(|s| s.service.is_some());
                self.refuse_if(!service, place, &format!("type='{kind}' needs <source> with host and service"));
            }
            CharKind::QemuVdagent | CharKind::Dbus => self.screen_back_end(source, place),
            CharKind::Vc | CharKind::Stdio => {
                self.refuse(
                    &at,
                    format!("type='{kind}' needs a window or terminal beside the guest: use 'pty' or 'unix'"),
                );
            }
            CharKind::Nmdm => self.refuse(&at, "type='nmdm' is for bhyve: use 'pty'"),
        }
        for end in &source.sources {
            let socket = matches!(kind, CharKind::Tcp | CharKind::Unix) && end.mode != Some(SocketMode::Bind);
            let again = end.reconnect.as_ref().filter(|again| again.enabled == Some(true) && !socket);
            if let Some(again) = again {
                self.refuse(&again.at, "only who connects, by type='tcp' or 'unix', can try again");
            }
            let append = end.append.is_some() && kind != CharKind::File;
            self.refuse_if(append, &end.at.attribute("append"), "only type='file' keeps what is there");
        }
        if let Some(protocol) = source.protocol.as_ref().filter(|p| p.kind == CharProtocol::Telnet) {
            self.refuse_if(kind != CharKind::Tcp, &protocol.at, "telnet is for type='tcp'");
            // Seen with QEMU 7.2: the client finds bytes in the stream that are not encrypted, or waits for ever.
            let tls = source.sources.iter().any(|s| s.tls == Some(true));
            self.refuse_if(tls, &protocol.at, "telnet cannot be encrypted: leave out <protocol> or tls='yes'");
        }
        let tls = source.sources.iter().find(|s| s.tls == Some(true));
        if let Some(end) = tls {
            let tcp = kind == CharKind::Tcp;
            self.refuse_if(!tcp, &end.at.attribute("tls"), "only type='tcp' can be encrypted");
            let role = if end.mode == Some(SocketMode::Bind) { End::Server } else { End::Client };
            self.certified(role, &end.at.attribute("tls"));
        }
        let protocol = source.protocol.as_ref().filter(|p| !matches!(p.kind, CharProtocol::Raw | CharProtocol::Telnet));
        if let Some(protocol) = protocol {
            self.refuse(&protocol.at, format!("protocol '{}' is not supported yet", protocol.kind));
        }
        if let Some(log) = source.log.as_ref().filter(|log| !log.file.starts_with('/')) {
            self.refuse(&log.at, "the path must be absolute");
        }
    }

    /// What is carried by a screen other than SPICE.
    fn screen_back_end(&mut self, source: &CharSource, place: &Place) {
        let kind = source.kind;
        let has = |wanted: GraphicsKind| self.def.devices.graphics.iter().any(|g| g.kind == wanted);
        let (vnc, dbus) = (has(GraphicsKind::Vnc), has(GraphicsKind::Dbus));
        let at = place.attribute("type");
        if kind == CharKind::Dbus {
            self.refuse_if(!dbus, &at, "type='dbus' needs <graphics type='dbus'>");
            let named = source.sources.iter().any(|s| s.channel.is_some());
            self.refuse_if(!named, place, "type='dbus' needs <source channel='…'/>");
        } else {
            self.refuse_if(!vnc && !dbus, &at, "type='qemu-vdagent' needs graphics of type='vnc' or 'dbus'");
        }
        let there = self.caps.chardevs.contains(kind.as_str());
        self.refuse_if(!there, &at, &format!("this QEMU has no type='{kind}'"));
    }
}
