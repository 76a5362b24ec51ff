//! `Graphics`, `Consoles` and `Channels`: what a person, or a program beside one, gets at a machine by.

use super::pack::{Entry, Key};
use virt_model::device::chardev::{AnyConsole, Channel, CharKind};
use virt_model::device::display::{Graphics, GraphicsKind, ListenKind};

/// `openable` says whether this kind can be opened at all; whether the driver can is the publisher's to know.
pub(super) fn display(index: u32, display: &Graphics) -> Entry {
    let first = display.listens.first();
    let is_socket = |kind: ListenKind| kind == ListenKind::Socket;
    let listen = first.and_then(|listen| listen.address.as_deref()).or(display.listen.as_deref());
    let listen = listen.filter(|_| first.is_none_or(|first| !is_socket(first.kind)));
    let sockets = display.listens.iter().filter(|listen| is_socket(listen.kind));
    let socket = sockets.flat_map(|listen| listen.socket.as_deref()).next().or(display.socket.as_deref());
    let port = |port: Option<i32>| port.and_then(|port| u32::try_from(port).ok()).filter(|port| *port > 0);
    let openable = matches!(display.kind, GraphicsKind::Vnc | GraphicsKind::Spice | GraphicsKind::Dbus);
    Entry::default()
        .text(Key::Type, Some(display.kind.as_str()))
        .number(Key::Index, Some(index))
        .text(Key::Listen, listen)
        .text(Key::Socket, socket)
        .number(Key::Port, port(display.port))
        .number(Key::TlsPort, port(display.tls_port))
        .flag(Key::Password, display.passwd.is_some())
        .flag(Key::Openable, openable)
}

pub(super) fn console(console: AnyConsole<'_>) -> Entry {
    Entry::default()
        .text(Key::Alias, console.info.alias())
        .text(Key::Type, Some(console.source.kind.as_str()))
        .text(Key::Path, console.source.path())
        .number(Key::Port, console.port)
        .flag(Key::Openable, console.source.kind == CharKind::Pty)
}

pub(super) fn channel(channel: &Channel) -> Entry {
    Entry::default()
        .text(Key::Name, channel.target.name.as_deref())
        .text(Key::Alias, channel.info.alias())
        .text(Key::Type, Some(channel.source.kind.as_str()))
}
