//! `<graphics>`: how a person sees the screen. `<video>`: what the guest draws on.

use super::{DeviceInfo, VirtioDriver};
use crate::domain::part::element;
use crate::domain::value::choices;
use crate::xml::shorten;

choices! {
    /// Protocol.
    pub enum GraphicsKind {
        Sdl = "sdl", Vnc = "vnc", Rdp = "rdp", Desktop = "desktop", Spice = "spice", EglHeadless = "egl-headless",
        Dbus = "dbus",
    }
}

choices! {
    /// Where it listens.
    pub enum ListenKind { None = "none", Address = "address", Network = "network", Socket = "socket", }
}

choices! {
    /// Who may share a VNC screen.
    pub enum SharePolicy { AllowExclusive = "allow-exclusive", ForceShared = "force-shared", Ignore = "ignore", }
}

choices! {
    /// What happens to whoever is connected when the password changes.
    pub enum Connected { Keep = "keep", Disconnect = "disconnect", Fail = "fail", }
}

choices! {
    /// Whether SPICE is encrypted.
    pub enum ChannelMode { Any = "any", Secure = "secure", Insecure = "insecure", }
}

choices! {
    /// What SPICE carries.
    pub enum SpiceChannelName {
        Main = "main", Display = "display", Inputs = "inputs", Cursor = "cursor", Playback = "playback",
        Record = "record", Smartcard = "smartcard", Usbredir = "usbredir",
    }
}

element! {
    /// `<graphics>`
    pub struct Graphics {
        /// Protocol.
        need "type" => kind: GraphicsKind,
        /// TCP port; -1: to be chosen.
        attr "port" => port: Option<i32>,
        /// SPICE: the encrypted port; -1: to be chosen.
        attr "tlsPort" => tls_port: Option<i32>,
        /// Ports are chosen at start.
        yes_no "autoport" => autoport: Option<bool>,
        /// VNC over WebSocket; -1: to be chosen.
        attr "websocket" => websocket: Option<i32>,
        /// Legacy form of the first `<listen>`'s address.
        attr "listen" => listen: Option<String>,
        /// Legacy form of the first `<listen>`'s socket.
        attr "socket" => socket: Option<String>,
        /// VNC key map.
        attr "keymap" => keymap: Option<String>,
        /// A secret.
        attr "passwd" => passwd: Option<String>,
        /// Until when the password holds, `YYYY-MM-DDTHH:MM:SS`.
        attr "passwdValidTo" => passwd_valid_to: Option<String>,
        /// What a change of password does.
        attr "connected" => connected: Option<Connected>,
        /// Who may share the screen.
        attr "sharePolicy" => share_policy: Option<SharePolicy>,
        /// VNC: the client may turn the machine off.
        yes_no "powerControl" => power_control: Option<bool>,
        /// D-Bus: clients come by file descriptor only.
        yes_no "p2p" => p2p: Option<bool>,
        /// SPICE: whether what no `<channel>` names is encrypted.
        attr "defaultMode" => default_mode: Option<ChannelMode>,
        /// Each `<listen>`.
        children "listen" => listens: Vec<Listen>,
        /// `<channel>`: SPICE: what is encrypted.
        children "channel" => channels: Vec<SpiceChannel>,
        /// `<image>`: SPICE image compression.
        child "image" => image: Option<SpiceImage>,
        /// `<jpeg>`: over slow connections.
        child "jpeg" => jpeg: Option<WanCompression>,
        /// `<zlib>`: over slow connections.
        child "zlib" => zlib: Option<WanCompression>,
        /// `<playback>`: sound from the guest.
        child "playback" => playback: Option<Playback>,
        /// `<gl>`
        child "gl" => gl: Option<Gl>,
        /// `<audio>`: VNC: which audio back end.
        child "audio" => audio: Option<AudioRef>,
        /// `<streaming>`
        child "streaming" => streaming: Option<Streaming>,
        /// `<clipboard>`
        child "clipboard" => clipboard: Option<Clipboard>,
        /// `<mouse>`
        child "mouse" => mouse: Option<Mouse>,
        /// `<filetransfer>`
        child "filetransfer" => filetransfer: Option<FileTransfer>,
    }
}

impl Graphics {
    /// What it listens on: of an address, also where none is said.
    pub fn listen_kind(&self) -> ListenKind {
        let unsaid = if self.socket.is_some() { ListenKind::Socket } else { ListenKind::Address };
        self.listens.first().map_or(unsaid, |listen| listen.kind)
    }

    /// The address that it is said to listen on.
    pub fn listen_address(&self) -> Option<&str> {
        self.listens.first().and_then(|listen| listen.address.as_deref()).or(self.listen.as_deref())
    }

    /// That it says two addresses in the place of one, if so.
    pub fn says_two_addresses(&self) -> Option<String> {
        let first = self.listens.first().filter(|listen| listen.kind == ListenKind::Address);
        let said = self.listen.as_ref().zip(first.and_then(|listen| listen.address.as_ref()));
        let (legacy, address) = said.filter(|(legacy, address)| legacy != address)?;
        Some(format!("listens on '{}', but its first <listen> on '{}'", shorten(legacy), shorten(address)))
    }

    /// Has it listen on another address.
    pub fn set_listen_address(&mut self, address: &str) {
        self.listen = Some(address.to_owned());
        self.listens.iter_mut().take(1).for_each(|listen| listen.address = Some(address.to_owned()));
    }
}

element! {
    /// `<listen>`
    pub struct Listen {
        /// Where.
        need "type" => kind: ListenKind,
        /// Of `address`; of `network`, runtime.
        attr "address" => address: Option<String>,
        /// Of `network`.
        attr "network" => network: Option<String>,
        /// Of `socket`; to be chosen if absent.
        attr "socket" => socket: Option<String>,
    }
}

choices! {
    /// SPICE image compression.
    pub enum ImageCompression {
        AutoGlz = "auto_glz", AutoLz = "auto_lz", Quic = "quic", Glz = "glz", Lz = "lz", Off = "off",
    }
}

element! {
    /// `<image>`
    pub struct SpiceImage {
        /// Which compression.
        need "compression" => compression: ImageCompression,
    }
}

element! {
    /// `<graphics><channel>`
    pub struct SpiceChannel {
        /// What it carries.
        need "name" => name: SpiceChannelName,
        /// Whether it is encrypted.
        need "mode" => mode: ChannelMode,
    }
}

choices! {
    /// When there is compression.
    pub enum CompressionTime { Auto = "auto", Never = "never", Always = "always", }
}

element! {
    /// `<jpeg>` and `<zlib>`
    pub struct WanCompression {
        /// When.
        need "compression" => compression: CompressionTime,
    }
}

element! {
    /// `<playback>`
    pub struct Playback {
        /// Whether sound is compressed.
        on_off "compression" => compression: Option<bool>,
    }
}

element! {
    /// `<gl>`
    pub struct Gl {
        /// On or off.
        yes_no "enable" => enable: Option<bool>,
        /// The host's render node.
        attr "rendernode" => rendernode: Option<String>,
    }
}

element! {
    /// A reference to an `<audio>`.
    pub struct AudioRef {
        /// Its number.
        need "id" => id: u32,
    }
}

choices! {
    /// SPICE video detection.
    pub enum StreamingMode { Filter = "filter", All = "all", Off = "off", }
}

element! {
    /// `<streaming>`
    pub struct Streaming {
        /// Which.
        need "mode" => mode: StreamingMode,
    }
}

element! {
    /// `<clipboard>`
    pub struct Clipboard {
        /// Whether copy and paste reach the guest.
        yes_no "copypaste" => copypaste: Option<bool>,
    }
}

choices! {
    /// Whose pointer counts.
    pub enum MouseMode { Server = "server", Client = "client", }
}

element! {
    /// `<mouse>`
    pub struct Mouse {
        /// Which.
        need "mode" => mode: MouseMode,
    }
}

element! {
    /// `<filetransfer>`
    pub struct FileTransfer {
        /// Allowed or not.
        yes_no "enable" => enable: Option<bool>,
    }
}

choices! {
    /// The card.
    pub enum VideoKind {
        Vga = "vga", Cirrus = "cirrus", Vmvga = "vmvga", Xen = "xen", Vbox = "vbox", Qxl = "qxl", Parallels = "parallels",
        Virtio = "virtio", Gop = "gop", None = "none", Bochs = "bochs", Ramfb = "ramfb",
    }
}

element! {
    /// `<video>`
    pub struct Video {
        /// `<driver>`
        child "driver" => driver: Option<VideoDriver>,
        /// `<model>`
        must "model" => model: VideoModel,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

choices! {
    /// VGA register file of qxl and the like.
    pub enum VgaConf { Io = "io", On = "on", Off = "off", }
}

choices! {
    /// Who draws.
    pub enum VideoBackend { Qemu = "qemu", VhostUser = "vhostuser", }
}

element! {
    /// `<video><driver>`
    pub struct VideoDriver {
        /// Who draws.
        attr "name" => name: Option<VideoBackend>,
        /// VGA registers.
        attr "vgaconf" => vgaconf: Option<VgaConf>,
        /// What virtio devices share.
        flat => virtio: VirtioDriver,
    }
}

element! {
    /// `<video><model>`
    pub struct VideoModel {
        /// The card.
        need "type" => kind: VideoKind,
        /// qxl: KiB.
        attr "ram" => ram_kib: Option<u32>,
        /// KiB.
        attr "vram" => vram_kib: Option<u32>,
        /// qxl: KiB.
        attr "vram64" => vram64_kib: Option<u32>,
        /// qxl: KiB.
        attr "vgamem" => vgamem_kib: Option<u32>,
        /// Screens.
        attr "heads" => heads: Option<u32>,
        /// The one the firmware shows.
        yes_no "primary" => primary: Option<bool>,
        /// virtio: blob resources.
        on_off "blob" => blob: Option<bool>,
        /// virtio, vga, bochs: EDID shown to the guest.
        on_off "edid" => edid: Option<bool>,
        /// `<acceleration>`
        child "acceleration" => acceleration: Option<Acceleration>,
        /// `<resolution>`
        child "resolution" => resolution: Option<Resolution>,
    }
}

element! {
    /// `<acceleration>`
    pub struct Acceleration {
        /// 2D.
        yes_no "accel2d" => accel2d: Option<bool>,
        /// 3D.
        yes_no "accel3d" => accel3d: Option<bool>,
        /// The host's render node.
        attr "rendernode" => rendernode: Option<String>,
    }
}

element! {
    /// `<resolution>`
    pub struct Resolution {
        /// Pixels.
        need "x" => x: u32,
        /// Pixels.
        need "y" => y: u32,
    }
}
