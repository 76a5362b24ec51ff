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
        /// Of `usb`: more than two channels.
        yes_no "multichannel" => multichannel: Option<bool>,
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
        /// Of `oss`: memory is shared with the device.
        yes_no "tryMMap" => try_mmap: Option<bool>,
        /// Of `oss`: nobody else uses the device.
        yes_no "exclusive" => exclusive: Option<bool>,
        /// Of `oss`: how it trades time for delay.
        attr "dspPolicy" => dsp_policy: Option<u32>,
        /// How often sound is looked after, in microseconds.
        attr "timerPeriod" => timer_period_us: Option<u32>,
        /// `<input>`
        child "input" => input: Option<AudioEnd>,
        /// `<output>`
        child "output" => output: Option<AudioEnd>,
    }
}

element! {
    /// `<audio><input>` and `<output>`
    pub struct AudioEnd {
        /// QEMU mixes and converts.
        yes_no "mixingEngine" => mixing: Option<bool>,
        /// It is as `settings` say, whatever the guest plays.
        yes_no "fixedSettings" => fixed: Option<bool>,
        /// How many sounds at once.
        attr "voices" => voices: Option<u32>,
        /// In microseconds.
        attr "bufferLength" => buffer_us: Option<u32>,
        /// Of `alsa` and `oss`: the device.
        attr "dev" => dev: Option<String>,
        /// Of `oss` and `sdl`: how many buffers.
        attr "bufferCount" => buffer_count: Option<u32>,
        /// Of `alsa` and `oss`: the host says when there is something to do.
        yes_no "tryPoll" => try_poll: Option<bool>,
        /// Of `pulseaudio`: the sink or source.
        attr "name" => name: Option<String>,
        /// Of `pulseaudio`: what the stream is called.
        attr "streamName" => stream: Option<String>,
        /// Of `pulseaudio`: in microseconds.
        attr "latency" => latency_us: Option<u32>,
        /// Of `jack`: its server.
        attr "serverName" => server_name: Option<String>,
        /// Of `jack`: what we are called.
        attr "clientName" => client_name: Option<String>,
        /// Of `jack`: the ports that are connected to, as a regular expression.
        attr "connectPorts" => connect_ports: Option<String>,
        /// Of `jack`: that name and no other.
        yes_no "exactName" => exact_name: Option<bool>,
        /// `<settings>`
        child "settings" => settings: Option<AudioSettings>,
    }
}

choices! {
    /// How a sample is written.
    pub enum SampleFormat {
        S8 = "s8", U8 = "u8", S16 = "s16", U16 = "u16", S32 = "s32", U32 = "u32", F32 = "f32",
    }
}

element! {
    /// `<settings>`
    pub struct AudioSettings {
        /// In Hz.
        attr "frequency" => frequency: Option<u32>,
        /// How many.
        attr "channels" => channels: Option<u32>,
        /// How a sample is written.
        attr "format" => format: Option<SampleFormat>,
    }
}
