//! Sound: where the host plays it, and the card that the guest sees.

use super::args::Props;
use super::{Builder, id};
use virt_model::device::Sound;
use virt_model::device::display::AudioRef;
use virt_model::device::sound::{AudioEnd, AudioKind, CodecKind, SoundModel};

impl Builder<'_> {
    pub(super) fn audio(&mut self) {
        let def = self.def;
        for audio in &def.devices.audios {
            let driver = back_end(audio.kind);
            let mut props = Props::new("id", format!("audio{}", audio.id)).set("driver", driver);
            if let (AudioKind::File, Some(path)) = (audio.kind, audio.path.as_deref()) {
                props = props.set("path", path);
                self.output(path);
            }
            if let (AudioKind::Pulseaudio, Some(server)) = (audio.kind, audio.server_name.as_deref()) {
                props = props.set("server", server);
            }
            let props = props
                .maybe("try-mmap", audio.try_mmap)
                .maybe("exclusive", audio.exclusive)
                .maybe("dsp-policy", audio.dsp_policy)
                .maybe("timer-period", audio.timer_period_us)
                .maybe("in", audio.input.as_ref().map(end))
                .maybe("out", audio.output.as_ref().map(end));
            self.args.pair("-audiodev", props.to_string());
        }
    }

    /// The back end that a card or screen refers to; the first if it refers to none.
    pub(super) fn audiodev(&self, reference: Option<&AudioRef>) -> Option<String> {
        let first = self.def.devices.audios.first().map(|audio| audio.id);
        reference.map(|r| r.id).or(first).map(|id| format!("audio{id}"))
    }

    pub(super) fn sounds(&mut self) {
        let def = self.def;
        for sound in &def.devices.sounds {
            let Some(device) = card(sound.model) else { continue };
            let audiodev = self.audiodev(sound.audio.as_ref());
            let props = Props::device(device).set("id", id(&sound.info));
            let hda = matches!(sound.model, SoundModel::Ich6 | SoundModel::Ich9);
            let props = if hda { props } else { props.maybe("audiodev", audiodev.clone()) };
            let props = props.maybe("multi", sound.multichannel);
            let props = if sound.model == SoundModel::Usb {
                props.extend(self.usb(&sound.info))
            } else {
                props.extend(self.pci(&sound.info))
            };
            self.args.device(props);
            if hda {
                self.codecs(sound, audiodev);
            }
        }
    }

    fn codecs(&mut self, sound: &Sound, audiodev: Option<String>) {
        let said: Vec<CodecKind> = sound.codecs.iter().map(|codec| codec.kind).collect();
        let kinds = if said.is_empty() { vec![CodecKind::Duplex] } else { said };
        for (n, kind) in kinds.into_iter().enumerate() {
            let card = id(&sound.info);
            let props = Props::device(&format!("hda-{kind}")).set("id", format!("{card}-codec{n}"));
            let props = props.set("bus", format!("{card}.0")).set("cad", n);
            self.args.device(props.maybe("audiodev", audiodev.clone()));
        }
    }
}

/// What is said of one direction.
fn end(end: &AudioEnd) -> Props {
    let settings = end.settings.as_ref();
    Props::default()
        .maybe("mixing-engine", end.mixing)
        .maybe("fixed-settings", end.fixed)
        .maybe("voices", end.voices)
        .maybe("buffer-length", end.buffer_us)
        .maybe("dev", end.dev.as_deref())
        .maybe("buffer-count", end.buffer_count)
        .maybe("try-poll", end.try_poll)
        .maybe("server-name", end.server_name.as_deref())
        .maybe("client-name", end.client_name.as_deref())
        .maybe("connect-ports", end.connect_ports.as_deref())
        .maybe("exact-name", end.exact_name)
        .maybe("name", end.name.as_deref())
        .maybe("stream-name", end.stream.as_deref())
        .maybe("latency", end.latency_us)
        .maybe("frequency", settings.and_then(|s| s.frequency))
        .maybe("channels", settings.and_then(|s| s.channels))
        .maybe("format", settings.and_then(|s| s.format).map(|format| format.as_str()))
}

/// QEMU's name of an audio back end.
pub fn back_end(kind: AudioKind) -> &'static str {
    match kind {
        AudioKind::Pulseaudio => "pa",
        AudioKind::File => "wav",
        other => other.as_str(),
    }
}

/// QEMU's name of a sound card; `None` for the speaker, which is part of the board.
pub fn card(model: SoundModel) -> Option<&'static str> {
    Some(match model {
        SoundModel::Ich6 | SoundModel::Ich7 => "intel-hda",
        SoundModel::Ich9 => "ich9-intel-hda",
        SoundModel::Ac97 => "AC97",
        SoundModel::Es1370 => "ES1370",
        SoundModel::Sb16 => "sb16",
        SoundModel::Usb => "usb-audio",
        SoundModel::Virtio => "virtio-sound-pci",
        SoundModel::Pcspk => return None,
    })
}
