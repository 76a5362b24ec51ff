//! A client at a console.

use super::PATIENCE;
use super::client::{Domain, Refusal, options};
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use zbus::Variant;

/// The client.
pub struct Console(UnixStream);

impl Console {
    /// At that device of a domain, with these of the options.
    pub async fn open(domain: &Domain, device: &str, wanted: &[&str]) -> Result<Console, Refusal> {
        let wanted = options(wanted.iter().map(|key| (*key, Variant::from(true))));
        let reply = domain.call("OpenConsole", &(device, wanted)).await?;
        let socket = UnixStream::from(OwnedFd::from(reply.body().deserialize::<zbus::wire::OwnedFd>().expect("h")));
        socket.set_nonblocking(false).expect("set");
        socket.set_read_timeout(Some(PATIENCE)).expect("set");
        socket.set_write_timeout(Some(PATIENCE)).expect("set");
        Ok(Console(socket))
    }

    /// Types.
    pub fn types(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).expect("typed");
    }

    /// Types no more, and listens on.
    pub fn is_done_typing(&self) {
        self.0.shutdown(Shutdown::Write).expect("shut");
    }

    /// The next that it hears, so many bytes.
    #[track_caller]
    pub fn hears(&mut self, count: usize) -> String {
        let mut heard = vec![0; count];
        let read = self.0.read_exact(&mut heard);
        assert!(read.is_ok(), "{read:?} after {:?}", String::from_utf8_lossy(&heard[..heard.len().min(40)]));
        String::from_utf8(heard).expect("text")
    }

    /// All that it hears until the stream ends.
    pub fn hears_to_the_end(mut self) -> String {
        let mut heard = Vec::new();
        self.0.read_to_end(&mut heard).expect("the end");
        String::from_utf8(heard).expect("text")
    }

    /// Nothing is to be heard just now.
    pub fn is_silent(&mut self) {
        self.0.set_nonblocking(true).expect("set");
        let silence = self.0.read(&mut [0]).expect_err("somebody says something, or it has ended");
        assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock);
        self.0.set_nonblocking(false).expect("set");
    }
}
