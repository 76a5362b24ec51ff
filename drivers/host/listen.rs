//! Sockets at which others are waited for, and connections to who waits.

use super::apart;
use super::user::RunAs;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// A listening socket that only `user` (we, if `None`) can connect to, from its first moment: it is made with their rights
/// and belongs to them, wherever its path leads by then.
pub fn listen(path: &Path, user: Option<&RunAs>) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The name gets the permissions that the socket has.
    rustix::fs::fchmod(&socket, rustix::fs::Mode::from_raw_mode(0o600))?;
    let address = SocketAddrUnix::new(path)?;
    match user {
        None => bind(&socket, &address)?,
        Some(user) => user.reach(|| bind(socket.as_fd(), &address))??,
    }
    rustix::net::listen(&socket, 1)?;
    Ok(socket)
}

/// A connection to who listens there, which is to be handed to a client: no process that is made meanwhile has a copy of it. It waits
/// for nobody. Error: `WouldBlock` where as many wait as may.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let connects = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &address)?;
        rustix::io::ioctl_fionbio(&socket, false)?;
        Ok(((), vec![socket]))
    };
    let ((), connected) = apart::arrive(connects, |_| ())?;
    connected?.pop().ok_or_else(|| io::ErrorKind::NotConnected.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{OFlags, fcntl_getfl};
    use std::os::fd::AsRawFd;

    #[test]
    fn a_connection_is_among_those_that_no_process_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _listens = listen(&path, None).unwrap();
        let connected = [connect(&path).unwrap(), connect(&path).unwrap()];
        for one in &connected {
            assert!(one.as_raw_fd() >= apart::first());
            assert!(!fcntl_getfl(one).unwrap().contains(OFlags::NONBLOCK));
        }
        assert_eq!(connect(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock, "nobody is waited for");
    }
}
