//! `<sound>`: the guest's sound card. `<audio>`: where the host plays it.

use super::DeviceInfo;
use super::display::AudioRef;
use crate::domain::part::element;
use crate::domain::value::choices;

choices! {
    /// The card.
    pub enum SoundModel {
        Sb16 = "sb16", Es1370 = "es1370", Pcspk = "pcspk", Ac97 = "ac97", Ich6 = "ich6", Ich9 = "ich9", Usb = "usb",
        Ich7 = "ich7", Virtio = "virtio",
    }
}

element! {
    /// `<sound>`
    pub struct Sound {
        /// The card.
        need "model" => model: SoundModel,
        /// Each `<codec>` of an HDA card; one `duplex` if there is none.
        children "codec" => codecs: Vec<Codec>,
        /// Which back end; the first if absent.
        child "audio" => audio: Option<AudioRef>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

choices! {
    /// What a codec can do.
    pub enum CodecKind { Duplex = "duplex", Micro = "micro", Output = "output", }
}

element! {
    /// `<codec>`
    pub struct Codec {
        /// What it can do.
        need "type" => kind: CodecKind,
    }
}

choices! {
    /// Where the host plays it.
    pub enum AudioKind {
        None = "none", Alsa = "alsa", Coreaudio = "coreaudio", Jack = "jack", Oss = "oss", Pulseaudio = "pulseaudio",
        Sdl = "sdl", Spice = "spice", File = "file", Dbus = "dbus", Pipewire = "pipewire",
    }
}

element! {
    /// `<audio>`
    pub struct Audio {
        /// From 1; sound cards refer to it.
        need "id" => id: u32,
        /// Where it is played.
        need "type" => kind: AudioKind,
        /// PulseAudio: its server.
        attr "serverName" => server_name: Option<String>,
        /// Of `file`: its path.
        attr "path" => path: Option<String>,
    }
}
