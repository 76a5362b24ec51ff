//! Sockets at which others are waited for.

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
