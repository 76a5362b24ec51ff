//! The kernel's messages on its devices, and those that udev sends on when it has done its part.
//!
//! Only the kernel and root can send such messages to all who listen. They say no more than what is to be looked at again.

use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, setsockopt, socket, sockopt,
};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// The groups of the kernel and of udev.
const GROUPS: u32 = 1 | 2;

/// What the kernel keeps for us until we read it, in bytes; more than that, and all is looked at again.
const BUFFER: usize = 1 << 20;

/// The longest message, in bytes; the kernel's have 2 KiB.
const LONGEST: usize = 16 << 10;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uevent {
    /// `add`, `remove`, `change`, `bind`, `unbind`, `move` and the like.
    pub action: String,
    /// The folder below sysfs.
    pub folder: PathBuf,
    /// What it was before, of one that has moved.
    pub before: Option<PathBuf>,
    /// What kind of thing it is.
    pub subsystem: String,
    /// udev sends it.
    pub by_udev: bool,
}

/// A socket on which they come; reading does not wait.
pub fn listen() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)?;
    setsockopt(&listener, sockopt::PassCred, &true)?;
    // What a user may have is less, and does.
    let _ = setsockopt(&listener, sockopt::RcvBuf, &BUFFER);
    bind(listener.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
    Ok(listener)
}

/// What has come in.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A message.
    Message(Uevent),
    /// One that says nothing to us, or that nobody may send.
    Other,
    /// Messages were lost.
    Overrun,
}

/// The next message. Error: `WouldBlock` when there is none.
pub fn receive(listener: &OwnedFd) -> io::Result<Received> {
    let mut bytes = [0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(listener, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::DONTWAIT);
    let message = match received {
        Err(rustix::io::Errno::NOBUFS) => return Ok(Received::Overrun),
        received => received?,
    };
    let root =
        ancillary.drain().any(|part| matches!(part, RecvAncillaryMessage::ScmCredentials(who) if who.uid.is_root()));
    let sender = message.address.and_then(|address| SocketAddrNetlink::try_from(address).ok());
    let by_kernel = sender.is_some_and(|sender| sender.pid() == 0);
    let sound = !message.flags.contains(ReturnFlags::TRUNC) && (by_kernel || root);
    let text = bytes.get(..message.bytes).filter(|_| sound);
    Ok(text.and_then(|text| understand(text, by_kernel)).map_or(Received::Other, Received::Message))
}

/// Reads a message.
fn understand(message: &[u8], by_kernel: bool) -> Option<Uevent> {
    let texts = if by_kernel { message } else { udev_properties(message)? };
    let mut event = Uevent {
        action: String::new(),
        folder: PathBuf::new(),
        before: None,
        subsystem: String::new(),
        by_udev: !by_kernel,
    };
    for text in texts.split(|byte| *byte == 0) {
        let Some(at) = text.iter().position(|byte| *byte == b'=') else { continue };
        let value = &text[at + 1..];
        match &text[..at] {
            b"ACTION" => event.action = String::from_utf8_lossy(value).into_owned(),
            b"SUBSYSTEM" => event.subsystem = String::from_utf8_lossy(value).into_owned(),
            b"DEVPATH" => event.folder = folder(value)?,
            b"DEVPATH_OLD" => event.before = Some(folder(value)?),
            _ => {}
        }
    }
    (!event.action.is_empty() && event.folder.has_root()).then_some(event)
}

/// A folder that leads nowhere else.
fn folder(bytes: &[u8]) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = Path::new(std::ffi::OsStr::from_bytes(bytes));
    let mut parts = path.components();
    let sound = parts.next() == Some(Component::RootDir) && parts.all(|part| matches!(part, Component::Normal(_)));
    sound.then(|| path.components().collect())
}

/// udev's messages begin with `libudev`, its magic number, the length of all that, and where the properties are.
fn udev_properties(message: &[u8]) -> Option<&[u8]> {
    let rest = message.strip_prefix(b"libudev\0\xfe\xed\xca\xfe")?;
    let number = |at: usize| Some(u32::from_ne_bytes(rest.get(at..at + 4)?.try_into().ok()?) as usize);
    let (from, length) = (number(4)?, number(8)?);
    message.get(from..from.checked_add(length)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_messages_are_understood() {
        let texts = b"ACTION=add\0DEVPATH=/devices/virtual/net/veth0\0SUBSYSTEM=net\0SEQNUM=7\0";
        let kernel = [&b"add@/devices/virtual/net/veth0\0"[..], texts].concat();
        let event = understand(&kernel, true).unwrap();
        assert_eq!((&*event.action, &*event.subsystem, event.by_udev), ("add", "net", false));
        assert_eq!(event.folder, Path::new("/devices/virtual/net/veth0"));
        let mut udev = b"libudev\0\xfe\xed\xca\xfe".to_vec();
        for number in [40_u32, 40, texts.len() as u32, 0, 0, 0, 0] {
            udev.extend(number.to_ne_bytes());
        }
        udev.extend(texts);
        let told = understand(&udev, false).unwrap();
        assert_eq!(told, Uevent { by_udev: true, ..event });
        udev.truncate(60);
        assert_eq!(understand(&udev, false), None, "cut off");
        assert_eq!(understand(&kernel, false), None, "root sends none as the kernel does");
    }

    #[test]
    fn what_leads_elsewhere_is_nothing() {
        for path in ["/devices/../../etc", "devices/x", "", "/devices/./x/.."] {
            let message = format!("ACTION=add\0DEVPATH={path}\0");
            assert_eq!(understand(message.as_bytes(), true), None, "{path}");
        }
        let odd = understand(b"ACTION=move\0DEVPATH=/devices/a\xff\0DEVPATH_OLD=/devices/b\0", true).unwrap();
        assert_eq!(odd.before.as_deref(), Some(Path::new("/devices/b")));
        assert!(odd.folder.to_str().is_none());
    }

    #[test]
    fn nothing_has_come_yet() {
        let listener = listen().expect("a socket");
        match receive(&listener) {
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            // Something has happened to a device of this host meanwhile.
            Ok(Received::Message(_) | Received::Other) => {}
            Ok(Received::Overrun) => panic!("nothing can be lost yet"),
        }
    }
}
