//! Sockets on which a guest's process listens: who answers there is made sure before a word is said.
//!
//! Some are in a folder of that process, which may have been taken over and put something else in their place.

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::Path;
use tokio::net::UnixStream;
use virt_model::driver::DriverError;

/// Connects to the process of that number, at a path of virtd's own. Errors name the socket.
pub async fn connect(path: &Path, pid: i32) -> Result<UnixStream, DriverError> {
    is_of(path, pid, UnixStream::connect(path).await)
}

/// Connects, without waiting for whoever listens; following the path may block.
pub fn reach(path: &Path) -> io::Result<BlockingStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// What was reached there, if that process listens.
pub fn is_of(path: &Path, pid: i32, reached: io::Result<UnixStream>) -> Result<UnixStream, DriverError> {
    let failed = |why: String| DriverError::Hypervisor(format!("{}: {why}", path.display()));
    let stream = reached.map_err(|e| failed(e.to_string()))?;
    match stream.peer_cred().ok().and_then(|peer| peer.pid()) {
        Some(peer) if peer == pid => Ok(stream),
        _ => Err(failed(format!("another process than {pid} listens there"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn whoever_else_listens_is_told_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        connect(&path, own).await.unwrap();
        listener.accept().await.unwrap();
        is_of(&path, own, reach(&path).and_then(UnixStream::from_std)).unwrap();
        listener.accept().await.unwrap();
        let why = connect(&path, own + 1).await.unwrap_err().to_string();
        assert!(why.contains("socket: another process"), "{why}");
        let (mut other, _) = listener.accept().await.unwrap();
        assert_eq!(other.read(&mut [0]).await.unwrap(), 0, "it hangs up");
    }
}
