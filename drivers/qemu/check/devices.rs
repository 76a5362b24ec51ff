//! Network, character devices, screens, sound, and the small ones.

use super::Check;
use crate::qemu::command::{audio_back_end, date_seconds, input_device, sound_card, video_card};
use crate::qemu::complete::Board;
use std::collections::BTreeSet;
use virt_model::device::chardev::{ChannelKind, CharKind, CharProtocol, SerialKind};
use virt_model::device::display::{Connected, GraphicsKind, ListenKind, VideoBackend, VideoKind};
use virt_model::device::misc::{BalloonModel, InputBus, InputKind, RngKind, WatchdogAction, WatchdogModel};
use virt_model::device::sound::AudioKind;
use virt_model::device::{CharSource, Graphics, Video};
use virt_model::xml::Place;

const SPICE_REMEDY: &str = "install the package with QEMU's SPICE modules (Debian 12: qemu-system-common, later: qemu-system-modules-spice) or use vnc";

impl Check<'_> {
    pub(super) fn devices(&mut self) {
        let def = self.def;
        self.interfaces();
        self.character_devices();
        self.smartcards();
        self.screens();
        def.devices.videos.iter().enumerate().for_each(|(n, video)| self.video(video, n == 0));
        self.sound();
        self.inputs();
        self.small_devices();
        self.names();
    }

    fn character_devices(&mut self) {
        let devices = &self.def.devices;
        for serial in &devices.serials {
            self.back_end(&serial.source, &serial.at);
            let target = serial.target.as_ref();
            let kind = target.and_then(|t| t.kind).unwrap_or_default();
            if !matches!(kind, SerialKind::Isa | SerialKind::Pci) {
                self.refuse(&serial.at.child("target"), format!("serial ports of type='{kind}' are not supported yet"));
            }
            let model = target.and_then(|t| t.model.as_ref()).map(|m| &*m.name);
            let odd = model.is_some_and(|model| model != kind.as_str());
            self.refuse_if(odd, &serial.at.child("target"), "this model is not one of that type");
        }
        for (n, console) in devices.consoles.iter().enumerate() {
            if console.is_serial() {
                self.refuse_if(n > 0, &console.at, "only the first console can be a serial port: add a <serial>");
                continue;
            }
            self.back_end(&console.source, &console.at);
            let kind = console
                .target
                .as_ref()
                .and_then(|t| t.kind)
                .unwrap_or(virt_model::device::chardev::ConsoleKind::Serial);
            let virtio = kind == virt_model::device::chardev::ConsoleKind::Virtio;
            self.refuse_if(
                !virtio,
                &console.at.child("target"),
                &format!("consoles of type='{kind}' are not supported"),
            );
        }
        for channel in &devices.channels {
            let kind = channel.target.kind;
            if kind != ChannelKind::Virtio {
                self.refuse(
                    &channel.target.at,
                    format!("channels of type='{kind}' are not supported yet, 'virtio' is"),
                );
            }
            let chosen_for = channel.source.kind == CharKind::Unix;
            if !(chosen_for && channel.source.path().is_none()) {
                self.back_end(&channel.source, &channel.at);
            }
        }
        for redirection in &devices.redirdevs {
            self.back_end(&redirection.source, &redirection.at);
            self.need_device(&redirection.at, "usb-redir");
        }
    }

    /// The only reader there is: that of the person at the SPICE screen.
    fn smartcards(&mut self) {
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

    fn back_end(&mut self, source: &CharSource, place: &Place) {
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
            _ => self.refuse(&at, format!("type='{kind}' is not supported by the QEMU driver yet")),
        }
        let protocol = source.protocol.as_ref().filter(|p| !matches!(p.kind, CharProtocol::Raw | CharProtocol::Telnet));
        if let Some(protocol) = protocol {
            self.refuse(&protocol.at, format!("protocol '{}' is not supported yet", protocol.kind));
        }
        if let Some(log) = source.log.as_ref().filter(|log| !log.file.starts_with('/')) {
            self.refuse(&log.at, "the path must be absolute");
        }
    }

    fn screens(&mut self) {
        let screens = &self.def.devices.graphics;
        for (n, graphics) in screens.iter().enumerate() {
            let kind = graphics.kind;
            match kind {
                GraphicsKind::Vnc => self.vnc(graphics),
                GraphicsKind::Spice => self.spice(graphics),
                GraphicsKind::Dbus => self.dbus(graphics),
                GraphicsKind::EglHeadless => {}
                _ => {
                    let why = "they need a desktop session beside the guest: use vnc, spice or dbus";
                    self.refuse(&graphics.at, format!("graphics of type='{kind}' are not supported: {why}"));
                }
            }
            let bare = matches!(kind, GraphicsKind::Dbus | GraphicsKind::EglHeadless);
            let drawn =
                screens.iter().take(n).any(|g| matches!(g.kind, GraphicsKind::Dbus | GraphicsKind::EglHeadless));
            self.refuse_if(bare && drawn, &graphics.at, "egl-headless and dbus exclude each other");
            let until = graphics.passwd_valid_to.as_deref();
            let odd = until.is_some_and(|until| date_seconds(until).is_none());
            let how = "this is a time in UTC such as 2026-12-31T23:59:59";
            self.refuse_if(odd, &graphics.at.attribute("passwdValidTo"), how);
            let idle = until.is_some() && graphics.passwd.is_none();
            self.refuse_if(idle, &graphics.at.attribute("passwdValidTo"), "there is no passwd that could expire");
            let word = |name: &String| name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
            let odd = graphics.keymap.as_ref().is_some_and(|name| !word(name));
            self.refuse_if(odd, &graphics.at.attribute("keymap"), "a keymap is a word such as de or en-us");
            let again = screens.iter().take(n).any(|other| other.kind == kind);
            self.refuse_if(again, &graphics.at, &format!("one guest has at most one screen of type='{kind}'"));
            self.refuse_if(graphics.listens.len() > 1, &graphics.at, "more than one <listen> is not supported yet");
            let network = graphics.listens.iter().any(|l| l.kind == ListenKind::Network);
            self.refuse_if(network, &graphics.at, "there are no virtual networks yet: use <listen type='address'/>");
        }
    }

    fn dbus(&mut self, graphics: &Graphics) {
        self.refuse_if(!self.caps.at_least(7, 0), &graphics.at, "graphics of type='dbus' need QEMU 7.0");
        let how = "graphics of type='dbus' need p2p='yes': clients come by file descriptor";
        self.refuse_if(graphics.p2p != Some(true), &graphics.at.attribute("p2p"), how);
    }

    fn vnc(&mut self, graphics: &Graphics) {
        let low = graphics.port.is_some_and(|port| port != -1 && port < 5900);
        self.refuse_if(low, &graphics.at.attribute("port"), "VNC ports begin at 5900");
        let disconnects = graphics.connected.is_some_and(|c| c != Connected::Keep);
        self.refuse_if(disconnects, &graphics.at.attribute("connected"), "with VNC only connected='keep' is supported");
        let gl = graphics.gl.as_ref().is_some_and(|gl| gl.enable == Some(true));
        self.refuse_if(
            gl,
            &graphics.at.child("gl"),
            "VNC does not draw with OpenGL itself: put graphics of type='egl-headless' beside it",
        );
        let long = graphics.passwd.as_ref().is_some_and(|p| p.len() > 8);
        self.refuse_if(long, &graphics.at.attribute("passwd"), "a VNC password has at most 8 characters");
    }

    fn spice(&mut self, graphics: &Graphics) {
        self.refuse_if(!self.caps.spice, &graphics.at, &format!("this QEMU has no SPICE: {SPICE_REMEDY}"));
        let tls = graphics.tls_port.is_some_and(|port| port > 0);
        self.refuse_if(tls, &graphics.at.attribute("tlsPort"), "encrypted SPICE is not supported yet");
        self.refuse_if(graphics.websocket.is_some(), &graphics.at.attribute("websocket"), "only VNC speaks WebSocket");
    }

    fn video(&mut self, video: &Video, first: bool) {
        let kind = video.model.kind;
        let vhost = video.driver.as_ref().is_some_and(|d| d.name == Some(VideoBackend::VhostUser));
        self.refuse_if(vhost, &video.at.child("driver"), "vhostuser video is not supported yet");
        match video_card(video, first) {
            _ if kind == VideoKind::None => {}
            Some(device) => self.need_device(&video.at, device),
            None => {
                self.refuse(&video.model.at, format!("video of type='{kind}' is not supported by the QEMU driver yet"))
            }
        }
        let second = !first && kind == VideoKind::Cirrus;
        self.refuse_if(second, &video.at, "a cirrus card can only be the first one");
        let accelerated = video.model.acceleration.as_ref().is_some_and(|a| a.accel3d == Some(true));
        let draws = |g: &Graphics| {
            g.kind == GraphicsKind::EglHeadless || g.gl.as_ref().is_some_and(|gl| gl.enable == Some(true))
        };
        let gl = self.def.devices.graphics.iter().any(draws);
        self.refuse_if(
            accelerated && !gl,
            &video.model.at,
            "accel3d needs graphics of type='egl-headless', or spice with <gl enable='yes'/>",
        );
        self.refuse_if(accelerated && kind != VideoKind::Virtio, &video.model.at, "accel3d needs a virtio card");
        self.seated(&video.info, &video.at);
    }

    fn sound(&mut self) {
        let devices = &self.def.devices;
        let mut ids = BTreeSet::new();
        for audio in &devices.audios {
            let kind = audio.kind;
            self.refuse_if(!ids.insert(audio.id), &audio.at, "there are two <audio> with this id");
            let name = audio_back_end(kind);
            if !self.caps.audio.is_empty() && !self.caps.audio.contains(name) {
                self.refuse(&audio.at, format!("this QEMU cannot play sound by '{kind}'; type='none' always works"));
            }
            let spice = devices.graphics.iter().any(|g| g.kind == GraphicsKind::Spice);
            self.refuse_if(kind == AudioKind::Spice && !spice, &audio.at, "type='spice' needs <graphics type='spice'>");
            let file = kind == AudioKind::File && !audio.path.as_deref().is_some_and(|p| p.starts_with('/'));
            self.refuse_if(file, &audio.at, "type='file' needs an absolute path");
            let path = audio.path.is_some() && kind != AudioKind::File;
            self.refuse_if(path, &audio.at.attribute("path"), "a path is for type='file'");
            let server = audio.server_name.is_some() && kind != AudioKind::Pulseaudio;
            self.refuse_if(server, &audio.at.attribute("serverName"), "a server is for type='pulseaudio'");
            self.audio_ends(audio);
        }
        let references =
            devices.sounds.iter().map(|s| s.audio.as_ref()).chain(devices.graphics.iter().map(|g| g.audio.as_ref()));
        for reference in references.flatten() {
            self.refuse_if(!ids.contains(&reference.id), &reference.at, "there is no <audio> with this id");
        }
        for sound in &devices.sounds {
            if let Some(device) = sound_card(sound.model) {
                self.need_device(&sound.at, device);
            }
            self.seated(&sound.info, &sound.at);
        }
    }

    fn audio_ends(&mut self, audio: &virt_model::device::Audio) {
        for end in [&audio.input, &audio.output].into_iter().flatten() {
            let pulse = end.name.is_some() || end.stream.is_some() || end.latency_us.is_some();
            let other = pulse && audio.kind != AudioKind::Pulseaudio;
            self.refuse_if(other, &end.at, "name, streamName and latency are for type='pulseaudio'");
            let device = end.dev.is_some() && !matches!(audio.kind, AudioKind::Alsa | AudioKind::Oss);
            self.refuse_if(device, &end.at.attribute("dev"), "a device is for type='alsa' and type='oss'");
        }
    }

    fn inputs(&mut self) {
        for input in &self.def.devices.inputs {
            let source = input.source.as_ref().and_then(|source| source.path());
            let host = matches!(input.kind, InputKind::Evdev | InputKind::Passthrough);
            let absolute = source.is_some_and(|path| path.starts_with('/'));
            self.refuse_if(host && !absolute, &input.at, "<source> with the path of the host's device is needed");
            self.refuse_if(!host && input.source.is_some(), &input.at, "only evdev and passthrough have a <source>");
            if input.kind == InputKind::Evdev {
                continue;
            }
            match (input_device(input), input.bus) {
                (Some(device), _) => self.need_device(&input.at, device),
                (None, Some(InputBus::Ps2)) if input.kind.as_str() != "tablet" => {}
                (None, bus) => {
                    let bus = bus.map_or("none", |bus| bus.as_str());
                    self.refuse(
                        &input.at,
                        format!("a {} on bus '{bus}' is not supported by the QEMU driver", input.kind),
                    );
                }
            }
        }
    }

    fn small_devices(&mut self) {
        let devices = &self.def.devices;
        for watchdog in &devices.watchdogs {
            let known = match watchdog.model {
                WatchdogModel::I6300esb | WatchdogModel::Ib700 => true,
                WatchdogModel::Itco => self.board == Board::Q35,
                WatchdogModel::Diag288 => false,
            };
            self.refuse_if(!known, &watchdog.at, "this machine has no such watchdog");
            let dump = watchdog.action == Some(WatchdogAction::Dump);
            self.refuse_if(dump, &watchdog.at.attribute("action"), "dumping a guest's memory is not supported yet");
            let differs = devices.watchdogs.first().is_some_and(|first| first.action != watchdog.action);
            self.refuse_if(differs, &watchdog.at.attribute("action"), "all watchdogs of a guest have the same action");
        }
        if let Some(balloon) = devices.memballoon.as_ref() {
            let place = &balloon.at;
            self.refuse_if(balloon.model == BalloonModel::Xen, place, "a Xen balloon needs Xen");
            let shrinks = self.def.current_memory_kib() < self.def.memory_kib();
            let none = balloon.model == BalloonModel::None;
            self.warn_if(
                none && shrinks,
                place,
                "without a balloon the guest has all of <memory>, whatever <currentMemory> says",
            );
            self.seated(&balloon.info, place);
        }
        for rng in &devices.rngs {
            let egd = rng.backend.model == RngKind::Egd;
            self.refuse_if(egd, &rng.backend.at, "an entropy daemon (egd) is not supported yet");
            let relative = rng.backend.path.as_ref().is_some_and(|p| !p.starts_with('/'));
            self.refuse_if(relative, &rng.backend.at, "the path must be absolute");
            self.seated(&rng.info, &rng.at);
        }
    }

    /// Names that people chose become QEMU's: they must be words, each used once.
    fn names(&mut self) {
        let mut seen = BTreeSet::new();
        for (info, place) in self.def.devices.infos() {
            let Some(alias) = info.alias.as_ref().filter(|alias| alias.is_user()) else { continue };
            let word = alias.name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
            let place = place.child("alias");
            self.refuse_if(!word, &place, "an alias is made of letters, digits, '-', '_' and '.'");
            self.refuse_if(!seen.insert(&alias.name), &place, "there are two devices with this alias");
        }
    }
}
