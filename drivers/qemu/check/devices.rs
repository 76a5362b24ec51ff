//! Screens, sound, and the small devices.

use super::Check;
use crate::qemu::capabilities::End;
use crate::qemu::command::{audio_back_end, input_device, sound_card, video_card};
use crate::qemu::complete::Board;
use std::collections::BTreeSet;
use virt_model::calendar;
use virt_model::device::balloon::BalloonModel;
use virt_model::device::chardev::CharKind;
use virt_model::device::display::{ChannelMode, Connected, GraphicsKind, ListenKind, VideoBackend, VideoKind};
use virt_model::device::input::{InputBus, InputKind};
use virt_model::device::rng::RngKind;
use virt_model::device::sound::{AudioKind, SoundModel};
use virt_model::device::watchdog::{WatchdogAction, WatchdogModel};
use virt_model::device::{Graphics, Video, VirtioModel};

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
            self.words_of_others(graphics);
            let bare = matches!(kind, GraphicsKind::Dbus | GraphicsKind::EglHeadless);
            let drawn =
                screens.iter().take(n).any(|g| matches!(g.kind, GraphicsKind::Dbus | GraphicsKind::EglHeadless));
            self.refuse_if(bare && drawn, &graphics.at, "egl-headless and dbus exclude each other");
            let until = graphics.passwd_valid_to.as_deref();
            let odd = until.is_some_and(|until| calendar::seconds(until).is_none());
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
            for listen in graphics.listens.iter().filter(|listen| listen.kind == ListenKind::Network) {
                let named = listen.network.is_some();
                self.refuse_if(!named, &listen.at, "<listen type='network'> needs network='…'");
                let how = "a network of a user's own has no address on the host: use <listen type='address'/>";
                self.refuse_if(!self.caps.site.makes_taps, &listen.at, how);
            }
        }
    }

    /// Words of one kind of screen that mean nothing to another.
    fn words_of_others(&mut self, graphics: &Graphics) {
        let place = &graphics.at;
        let spice = [
            ("image", graphics.image.is_some()),
            ("jpeg", graphics.jpeg.is_some()),
            ("zlib", graphics.zlib.is_some()),
            ("playback", graphics.playback.is_some()),
            ("streaming", graphics.streaming.is_some()),
            ("clipboard", graphics.clipboard.is_some()),
            ("mouse", graphics.mouse.is_some()),
            ("filetransfer", graphics.filetransfer.is_some()),
            ("channel", !graphics.channels.is_empty()),
        ];
        for (name, _) in spice.into_iter().filter(|(_, said)| *said && graphics.kind != GraphicsKind::Spice) {
            self.refuse(&place.child(name), format!("<{name}> is for graphics of type='spice'"));
        }
        let attributes = [
            (GraphicsKind::Spice, "defaultMode", graphics.default_mode.is_some()),
            (GraphicsKind::Spice, "tlsPort", graphics.tls_port.is_some_and(|port| port > 0)),
            (GraphicsKind::Vnc, "sharePolicy", graphics.share_policy.is_some()),
            (GraphicsKind::Vnc, "powerControl", graphics.power_control.is_some()),
            (GraphicsKind::Dbus, "p2p", graphics.p2p.is_some()),
        ];
        for (kind, name, _) in attributes.into_iter().filter(|(kind, _, said)| *said && graphics.kind != *kind) {
            self.refuse(&place.attribute(name), format!("'{name}' is for graphics of type='{kind}'"));
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
        self.encrypted_spice(graphics);
        self.refuse_if(graphics.websocket.is_some(), &graphics.at.attribute("websocket"), "only VNC speaks WebSocket");
    }

    fn encrypted_spice(&mut self, graphics: &Graphics) {
        let modes = graphics.channels.iter().map(|channel| (channel.mode, channel.at.attribute("mode")));
        let default = graphics.default_mode.map(|mode| (mode, graphics.at.attribute("defaultMode")));
        let secure = default.into_iter().chain(modes).find(|(mode, _)| *mode == ChannelMode::Secure);
        let asked = graphics.tls_port.filter(|port| *port > 0).map(|_| graphics.at.attribute("tlsPort"));
        if let Some(place) = asked.clone().or_else(|| secure.clone().map(|(_, place)| place)) {
            self.certified(End::Server, &place);
        }
        let listens = matches!(graphics.listen_kind(), ListenKind::Address | ListenKind::Network);
        if let Some((_, place)) = secure {
            let chosen = graphics.tls_port == Some(-1) || graphics.autoport == Some(true);
            let had = listens && (asked.is_some() || chosen);
            self.refuse_if(!had, &place, "what is encrypted goes by a tlsPort, or autoport='yes' chooses one");
        } else if let Some(place) = asked {
            self.refuse_if(!listens, &place, "a tlsPort is for <listen type='address'/>");
        }
        let mut seen = BTreeSet::new();
        for channel in &graphics.channels {
            self.refuse_if(!seen.insert(channel.name), &channel.at, "there are two <channel> of this name");
        }
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
            let oss = audio.try_mmap.or(audio.exclusive).is_some() || audio.dsp_policy.is_some();
            let how = "tryMMap, exclusive and dspPolicy are for type='oss'";
            self.refuse_if(oss && kind != AudioKind::Oss, &audio.at, how);
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
            let many = sound.multichannel.is_some() && sound.model != SoundModel::Usb;
            self.refuse_if(many, &sound.at.attribute("multichannel"), "multichannel is for model='usb'");
            self.seated(&sound.info, &sound.at);
        }
    }

    fn audio_ends(&mut self, audio: &virt_model::device::Audio) {
        for end in [&audio.input, &audio.output].into_iter().flatten() {
            let pulse = end.name.is_some() || end.stream.is_some() || end.latency_us.is_some();
            let other = pulse && audio.kind != AudioKind::Pulseaudio;
            self.refuse_if(other, &end.at, "name, streamName and latency are for type='pulseaudio'");
            let jack = end.server_name.is_some()
                || end.client_name.is_some()
                || end.connect_ports.is_some()
                || end.exact_name.is_some();
            let how = "serverName, clientName, connectPorts and exactName are for type='jack'";
            self.refuse_if(jack && audio.kind != AudioKind::Jack, &end.at, how);
            let buffers = end.buffer_count.is_some() && !matches!(audio.kind, AudioKind::Oss | AudioKind::Sdl);
            self.refuse_if(buffers, &end.at.attribute("bufferCount"), "bufferCount is for type='oss' and type='sdl'");
            let poll = end.try_poll.is_some() && !matches!(audio.kind, AudioKind::Alsa | AudioKind::Oss);
            self.refuse_if(poll, &end.at.attribute("tryPoll"), "tryPoll is for type='alsa' and type='oss'");
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
            let place = input.at.attribute("model");
            let virtio = input.bus == Some(InputBus::Virtio);
            self.refuse_if(input.model.is_some() && !virtio, &place, "only inputs on bus='virtio' have a model");
            let old = input.model.is_some_and(|model| model != VirtioModel::Virtio);
            self.refuse_if(old && virtio, &place, "QEMU has virtio inputs of model='virtio' only");
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
            if rng.backend.model == RngKind::Egd {
                let source = rng.backend.daemon();
                let known = matches!(source.kind, CharKind::Tcp | CharKind::Udp | CharKind::Unix | CharKind::Dev);
                let how = "an entropy daemon (egd) is reached by type='tcp', 'udp', 'unix' or 'dev'";
                self.refuse_if(!known || rng.backend.kind.is_none(), &rng.backend.at, how);
                self.back_end(&source, &rng.backend.at);
            } else {
                let idle = rng.backend.kind.is_some() || !rng.backend.sources.is_empty();
                self.refuse_if(idle, &rng.backend.at, "a type and a <source> are for an entropy daemon (model='egd')");
            }
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
