//! Screens for people, and cards for the guest to draw on.

use super::args::{List, Props, on_off};
use super::{Builder, id, list, virtio};
use crate::qemu::capabilities::End;
use serde_json::{Value, json};
use virt_model::calendar;
use virt_model::device::display::{ChannelMode, Connected, GraphicsKind, ListenKind, MouseMode, VideoKind};
use virt_model::device::{Graphics, Video};
use virt_model::domain::listening::LOCALHOST;

impl Builder<'_> {
    pub(super) fn graphics(&mut self) {
        let def = self.def;
        for graphics in &def.devices.graphics {
            match graphics.kind {
                GraphicsKind::Vnc => self.vnc(graphics),
                GraphicsKind::Spice => self.spice(graphics),
                _ => {}
            }
            if let (Some(_), Some(keymap)) = (Some(graphics.kind), graphics.keymap.as_deref()) {
                self.args.pair("-k", keymap);
            }
        }
    }

    /// What draws without a protocol of its own, or nothing.
    pub(super) fn display(&mut self) -> List {
        let def = self.def;
        let drawn =
            def.devices.graphics.iter().find(|g| matches!(g.kind, GraphicsKind::Dbus | GraphicsKind::EglHeadless));
        let Some(graphics) = drawn else { return list("none") };
        let gl = graphics.gl.as_ref();
        let node = gl.and_then(|gl| gl.rendernode.as_deref());
        node.iter().for_each(|node| self.open(node, true));
        if graphics.kind == GraphicsKind::EglHeadless {
            return list("egl-headless").maybe("rendernode", node);
        }
        let on = gl.is_some_and(|gl| gl.enable == Some(true)).then_some("on");
        let audio = graphics.audio.as_ref().and_then(|_| self.audiodev(graphics.audio.as_ref()));
        list("dbus").set("p2p", "on").maybe("gl", on).maybe("rendernode", node).maybe("audiodev", audio)
    }

    fn vnc(&mut self, graphics: &Graphics) {
        let address = match listen_kind(graphics) {
            ListenKind::Socket => format!("unix:{}", graphics.socket.as_deref().unwrap_or_default()),
            ListenKind::None => "none".to_owned(),
            _ => format!("{}:{}", host(graphics), graphics.port.unwrap_or(5900).saturating_sub(5900)),
        };
        let password = graphics.passwd.is_some().then_some("on");
        // A bare word with a '=' in it would be a setting.
        let vnc = if address.contains('=') { List::default().set("vnc", &address) } else { list(&address) };
        let vnc = vnc
            .maybe("websocket", graphics.websocket)
            .maybe("password", password)
            .maybe("power-control", graphics.power_control.map(on_off))
            .maybe("share", graphics.share_policy.map(|policy| policy.as_str()))
            .maybe("audiodev", self.audiodev(graphics.audio.as_ref()));
        self.args.pair("-vnc", vnc);
        self.setup.extend(password_commands(graphics, graphics.connected));
    }

    fn spice(&mut self, graphics: &Graphics) {
        let open = graphics.passwd.is_none().then_some("on");
        let denied = |value: Option<bool>| value.filter(|allowed| !allowed).map(|_| "on");
        let mouse = graphics.mouse.as_ref().map(|m| if m.mode == MouseMode::Client { "on" } else { "off" });
        let gl = graphics.gl.as_ref().filter(|gl| gl.enable == Some(true));
        let mut address = spice_address(graphics);
        if graphics.tls_port.is_some_and(|port| port > 0) {
            address = address.set("x509-dir", self.certificates(End::Server));
        }
        let spice = encryption(address, graphics)
            .maybe("disable-ticketing", open)
            .maybe("image-compression", graphics.image.as_ref().map(|image| image.compression.as_str()))
            .maybe("jpeg-wan-compression", graphics.jpeg.as_ref().map(|jpeg| jpeg.compression.as_str()))
            .maybe("zlib-glz-wan-compression", graphics.zlib.as_ref().map(|zlib| zlib.compression.as_str()))
            .maybe_on_off("playback-compression", graphics.playback.as_ref().and_then(|p| p.compression))
            .maybe("streaming-video", graphics.streaming.as_ref().map(|s| s.mode.as_str()))
            .maybe("agent-mouse", mouse)
            .maybe("disable-copy-paste", denied(graphics.clipboard.as_ref().and_then(|c| c.copypaste)))
            .maybe("disable-agent-file-xfer", denied(graphics.filetransfer.as_ref().and_then(|f| f.enable)))
            .maybe("gl", gl.map(|_| "on"))
            .maybe("rendernode", gl.and_then(|gl| gl.rendernode.as_deref()))
            .set("seamless-migration", "on");
        self.args.pair("-spice", spice);
        if let Some(node) = gl.and_then(|gl| gl.rendernode.as_deref()) {
            self.open(node, true);
        }
        self.setup.extend(password_commands(graphics, graphics.connected));
    }

    pub(super) fn videos(&mut self) {
        let def = self.def;
        for (n, video) in def.devices.videos.iter().enumerate() {
            let Some(device) = card(video, n == 0) else { continue };
            let props = Props::device(device).set("id", id(&video.info)).extend(screen(video));
            let driver = video.driver.as_ref().map(|d| virtio(&d.virtio)).unwrap_or_default();
            self.args.device(props.extend(driver).extend(self.pci(&video.info)));
        }
    }
}

/// What QEMU is told of the password of a display, and of who is there. Passwords go over the monitor: arguments can be read by
/// everybody on the host.
pub fn password_commands(graphics: &Graphics, connected: Option<Connected>) -> Vec<(String, Value)> {
    let Some(password) = &graphics.passwd else { return Vec::new() };
    let protocol = graphics.kind.as_str();
    let mut arguments = json!({"protocol": protocol, "password": password});
    if let Some(connected) = connected.filter(|c| *c != Connected::Keep) {
        arguments["connected"] = json!(connected.as_str());
    }
    let mut commands = vec![("set_password".to_owned(), arguments)];
    if let Some(until) = graphics.passwd_valid_to.as_deref().and_then(calendar::seconds) {
        let arguments = json!({"protocol": protocol, "time": until.to_string()});
        commands.push(("expire_password".to_owned(), arguments));
    }
    commands
}

fn listen_kind(graphics: &Graphics) -> ListenKind {
    graphics.listens.first().map_or(ListenKind::Address, |listen| listen.kind)
}

/// The address in the form that may be followed by a port.
fn host(graphics: &Graphics) -> String {
    let listen = graphics.listens.first().and_then(|l| l.address.as_deref());
    let address = listen.or(graphics.listen.as_deref()).unwrap_or(LOCALHOST);
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

fn spice_address(graphics: &Graphics) -> List {
    let list = List::default();
    match listen_kind(graphics) {
        ListenKind::Socket => list.set("unix", "on").set("addr", graphics.socket.as_deref().unwrap_or_default()),
        // QEMU wants a port even where clients come only by file descriptor.
        ListenKind::None => list.set("port", 0),
        _ => {
            let address = graphics.listens.first().and_then(|l| l.address.as_deref());
            let address = address.or(graphics.listen.as_deref()).unwrap_or(LOCALHOST);
            let encrypted = graphics.tls_port.filter(|port| *port > 0);
            let open = graphics.port.filter(|port| *port > 0).or(encrypted.is_none().then_some(0));
            list.maybe("port", open).maybe("tls-port", encrypted).set("addr", address)
        }
    }
}

/// What goes by the one port and what by the other.
fn encryption(list: List, graphics: &Graphics) -> List {
    let default = graphics.default_mode.map(|mode| ("default", mode));
    let named = graphics.channels.iter().map(|channel| (channel.name.as_str(), channel.mode));
    default.into_iter().chain(named).fold(list, |list, (name, mode)| match mode {
        ChannelMode::Secure => list.set("tls-channel", name),
        ChannelMode::Insecure => list.set("plaintext-channel", name),
        ChannelMode::Any => list,
    })
}

/// QEMU's name of a card; the first one is what firmware draws on. `None`: there is nothing to add.
pub fn card(video: &Video, first: bool) -> Option<&'static str> {
    let gl = video.model.acceleration.as_ref().is_some_and(|a| a.accel3d == Some(true));
    Some(match (video.model.kind, first, gl) {
        (VideoKind::Virtio, true, false) => "virtio-vga",
        (VideoKind::Virtio, true, true) => "virtio-vga-gl",
        (VideoKind::Virtio, false, false) => "virtio-gpu-pci",
        (VideoKind::Virtio, false, true) => "virtio-gpu-gl-pci",
        (VideoKind::Qxl, true, _) => "qxl-vga",
        (VideoKind::Qxl, false, _) => "qxl",
        (VideoKind::Vga, true, _) => "VGA",
        (VideoKind::Vga, false, _) => "secondary-vga",
        (VideoKind::Cirrus, ..) => "cirrus-vga",
        (VideoKind::Bochs, ..) => "bochs-display",
        (VideoKind::Ramfb, ..) => "ramfb",
        (VideoKind::Vmvga, ..) => "vmware-svga",
        _ => return None,
    })
}

/// Memory, heads and size of the screen, in the card's own words.
fn screen(video: &Video) -> Props {
    let model = &video.model;
    let bytes = |kib: Option<u32>| kib.map(|kib| u64::from(kib) * 1024);
    let mib = |kib: Option<u32>| kib.map(|kib| (kib / 1024).max(1));
    let resolution = model.resolution.as_ref();
    let size = || Props::default().maybe("xres", resolution.map(|r| r.x)).maybe("yres", resolution.map(|r| r.y));
    match model.kind {
        VideoKind::Virtio => Props::default()
            .maybe("max_outputs", model.heads)
            .maybe("blob", model.blob)
            .maybe("edid", model.edid)
            .extend(size()),
        VideoKind::Qxl => Props::default()
            .maybe("max_outputs", model.heads)
            .maybe("ram_size", bytes(model.ram_kib))
            .maybe("vram_size", bytes(model.vram_kib))
            .maybe("vram64_size_mb", mib(model.vram64_kib))
            .maybe("vgamem_mb", mib(model.vgamem_kib))
            .extend(size()),
        VideoKind::Vga => {
            Props::default().maybe("vgamem_mb", mib(model.vram_kib)).maybe("edid", model.edid).extend(size())
        }
        VideoKind::Vmvga => Props::default().maybe("vgamem_mb", mib(model.vram_kib)),
        VideoKind::Bochs => {
            Props::default().maybe("vgamem", bytes(model.vram_kib)).maybe("edid", model.edid).extend(size())
        }
        _ => Props::default(),
    }
}
