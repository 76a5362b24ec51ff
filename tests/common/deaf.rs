//! Clients by hand, that read nothing after they have said hello, and send what no library would.

use super::Daemon;
use super::users::User;
use std::io::{IoSlice, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use zbus::Message;

/// A client of the bus that is not read from.
pub struct Deaf(UnixStream);

impl Deaf {
    /// Connects as `user`, who is there from then on.
    pub fn connect(daemon: &Daemon, user: &User) -> Deaf {
        Deaf::try_connect(daemon, user).expect("a bus that lets us in")
    }

    /// The same; `None` if the bus has no room for another.
    pub fn try_connect(daemon: &Daemon, user: &User) -> Option<Deaf> {
        Deaf::say_hello(daemon, user).ok()
    }

    fn say_hello(daemon: &Daemon, user: &User) -> std::io::Result<Deaf> {
        let mut socket = super::users::connect_as(user, daemon.folder())?;
        socket.set_read_timeout(Some(super::PATIENCE))?;
        let uid: String = user.uid.to_string().bytes().map(|digit| format!("{digit:02x}")).collect();
        let mut answer = [0; 512];
        for line in [format!("\0AUTH EXTERNAL {uid}\r\n"), "NEGOTIATE_UNIX_FD\r\n".to_owned()] {
            socket.write_all(line.as_bytes())?;
            read_some(&mut socket, &mut answer)?;
        }
        socket.write_all(b"BEGIN\r\n")?;
        let hello = Message::method_call("/org/freedesktop/DBus", "Hello").destination("org.freedesktop.DBus");
        socket.write_all(hello.interface("org.freedesktop.DBus").build(&()).unwrap().data())?;
        read_some(&mut socket, &mut answer)?;
        socket.set_write_timeout(Some(Duration::from_secs(2)))?;
        Ok(Deaf(socket))
    }

    /// Has the bus send it everything that virtd tells.
    pub fn listen(&mut self) {
        let call = Message::method_call("/org/freedesktop/DBus", "AddMatch").destination("org.freedesktop.DBus");
        let call = call.interface("org.freedesktop.DBus").build(&"type='signal',sender='org.virt'").unwrap();
        self.send(&call);
    }

    /// Sends a message; whether somebody takes it, within some seconds.
    pub fn send(&mut self, message: &Message) -> bool {
        self.0.write_all(message.data()).is_ok()
    }

    /// Sends the same call again and again, as long as anybody takes it.
    pub fn flood(&mut self, calls: usize, make: impl Fn() -> Message) -> usize {
        (0..calls).find(|_| !self.send(&make())).unwrap_or(calls)
    }

    /// Sends a call with so many descriptors.
    pub fn send_descriptors(&mut self, count: u8) -> bool {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let file = std::fs::File::open("/dev/null").unwrap();
        let fds = vec![file.as_fd(); count.into()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let message = with_descriptors(count);
        // A call is small: it goes as a whole, or somebody has ended the connection.
        sendmsg(&self.0, &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL)
            .is_ok_and(|n| n == message.len())
    }
}

/// Reads an answer, whatever it is.
fn read_some(socket: &mut UnixStream, answer: &mut [u8]) -> std::io::Result<()> {
    if socket.read(answer)? > 0 { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}

/// Whatever a call needs to say that descriptors go with it, in bytes.
fn with_descriptors(count: u8) -> Vec<u8> {
    let call = super::deaf::call("/org/virt", "org.virt.Manager", "GetJobs").build(&()).unwrap().data().to_vec();
    // The number of descriptors is a field of the header like others: code 9, an `u`, aligned.
    let length = u32::from_le_bytes([call[12], call[13], call[14], call[15]]) as usize;
    let mut bytes = call[..16 + length].to_vec();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes.extend([9, 1, b'u', 0, count, 0, 0, 0]);
    let fields = u32::try_from(bytes.len() - 16).unwrap();
    bytes[12..16].copy_from_slice(&fields.to_le_bytes());
    bytes
}

/// A call of virtd.
pub fn call(path: &'static str, interface: &'static str, member: &'static str) -> zbus::message::Builder<'static> {
    Message::method_call(path, member).destination("org.virt").interface(interface)
}
