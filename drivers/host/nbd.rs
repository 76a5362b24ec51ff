//! An image that is served to one client by NBD: by `qemu-storage-daemon`, which runs as `qemu-img` does (`image.rs`), for as long as
//! that client stays.
//!
//! ```text
//!   listen ─▶ the client is connected, then a watch ─▶ the name is removed ─▶ the server takes one at a time
//!   the client leaves ─▶ the server takes the watch, and greets it ─▶ the server is told to end
//! ```
//!
//! The server ends with the thread that made it, and so with virtd: nobody need find it again.

use super::apart;
use super::image::{BOUNDS, Images, failure, node, not_run};
use super::listen::listen;
use super::process;
use super::ready::ready_by;
use super::tool::{Bounds, ends_with_its_maker};
use super::workers::PATIENCE;
use rustix::net::{RecvFlags, recv};
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::json;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use virt_model::driver::DriverError;

const TOOL: &str = "qemu-storage-daemon";
const NOT_INSTALLED: &str = "qemu-storage-daemon is not installed (Debian has it in qemu-system-common)";
/// Its client has it hold the data of many requests at a time.
const SERVER: Bounds = Bounds { data: Some(1 << 30), ..BOUNDS };
/// Of what it says, this many bytes are kept.
const MOST_SAID: u64 = 64 << 10;

/// The socket has its name for moments, and one at a time.
static NAMED: Mutex<()> = Mutex::new(());

/// An image that is to be served.
pub struct Export {
    /// Its tool, to which the files are lent.
    pub images: Images,
    /// Each file with its format, from the topmost down.
    pub chain: Vec<(PathBuf, String)>,
    /// The client may write it.
    pub writable: bool,
}

/// Who is connected to the server. No process that is made meanwhile has a copy, which would keep the client there.
struct Connected {
    client: OwnedFd,
    watch: OwnedFd,
}

impl Export {
    /// Serves it. `ready` is given the client's end as soon as the server speaks. Returns when the client has left or `stop` is closed,
    /// and there is no server any more. `place` is where the server's socket has its name for a moment, in a folder that only we
    /// write. Errors: it cannot be served. Blocks.
    pub fn serve(&self, place: &Path, stop: &OwnedFd, ready: impl FnOnce(OwnedFd)) -> Result<(), DriverError> {
        let failed = |e: io::Error| not_run(TOOL, NOT_INSTALLED, e);
        let not_made = |e: io::Error| DriverError::Internal(format!("{}: {e}", place.display()));
        let (listener, connected) = connect(place).map_err(not_made)?;
        let (said, says) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| not_made(e.into()))?;
        let mut command = Command::new(TOOL);
        command.args(self.arguments()).env("LC_ALL", "C");
        command.stdin(Stdio::from(listener)).stdout(Stdio::null()).stderr(Stdio::from(says));
        let behind = self.images.confine(&mut command, SERVER).map_err(failed)?;
        ends_with_its_maker(&mut command, Signal::TERM);
        let start = |command: &mut Command| behind.enter().and_then(|()| start(command));
        // What it was given is closed here when it runs: nobody else is to have the server's ends.
        let served = apart::made(command, start, |pid| {
            let server = Server(process::adopt(pid)?);
            Ok(follow(server, connected, said, stop, ready))
        });
        served.map_err(|e| failed(behind.why(e)))?.map_err(|words| {
            let path = self.chain.first().map_or(Path::new("/"), |(path, _)| path);
            let words = words.trim().trim_start_matches("qemu-storage-daemon: ");
            failure(format!("cannot serve {}: {words}", path.display()))
        })
    }

    /// Its standard input is the socket at which it listens.
    fn arguments(&self) -> [String; 6] {
        let mut top = node(&self.chain);
        top["node-name"] = json!("volume");
        top["read-only"] = json!(!self.writable);
        if self.writable {
            top["discard"] = json!("unmap");
        }
        let writable = if self.writable { "on" } else { "off" };
        [
            "--nbd-server".to_owned(),
            "addr.type=fd,addr.str=0,max-connections=1".to_owned(),
            "--blockdev".to_owned(),
            top.to_string(),
            "--export".to_owned(),
            format!("type=nbd,id=volume,node-name=volume,name=,writable={writable}"),
        ]
    }
}

/// A socket without a name at which the client waits to be served, and then the watch.
fn connect(place: &Path) -> io::Result<(OwnedFd, Connected)> {
    let _named = NAMED.lock().unwrap_or_else(PoisonError::into_inner);
    let remove = || match rustix::fs::unlink(place) {
        Err(rustix::io::Errno::NOENT) => Ok(()),
        removed => removed,
    };
    // Somebody may have been killed in between.
    remove()?;
    let (listener, connected) = apart::arrive(
        || {
            let listener = listen(place, None)?;
            let connected = [UnixStream::connect(place)?, UnixStream::connect(place)?];
            Ok((listener, connected.map(OwnedFd::from).into()))
        },
        |_| (),
    )?;
    remove()?;
    let [client, watch] = <[OwnedFd; 2]>::try_from(connected?).map_err(|_| io::ErrorKind::NotConnected)?;
    Ok((listener, Connected { client, watch }))
}

#[allow(clippy::disallowed_methods, reason = "without guests' files")]
fn start(command: &mut Command) -> io::Result<i32> {
    // It is reaped by who follows it.
    #[allow(clippy::zombie_processes)]
    command.spawn().map(|child| child.id().cast_signed())
}

/// Follows the server to its end. Inner error: its last words, if it does not serve.
fn follow(
    server: Server,
    connected: Connected,
    said: OwnedFd,
    stop: &OwnedFd,
    ready: impl FnOnce(OwnedFd),
) -> Result<(), String> {
    let Connected { client, watch } = connected;
    match first_of([client.as_fd(), server.0.as_fd(), stop.as_fd()], Some(PATIENCE)).map_err(|e| e.to_string())? {
        Some(0) if is_greeted(&client) => {}
        // It has let go of its socket, and says why.
        Some(0 | 1) => {
            drop((client, watch));
            return Err(last_words(server, said));
        }
        Some(_) => return Err("nobody waits for it any more".to_owned()),
        None => return Err(format!("it does not open the image within {} s", PATIENCE.as_secs())),
    }
    ready(client);
    drop(said);
    first_of([watch.as_fd(), server.0.as_fd(), stop.as_fd()], None).map(drop).map_err(|e| e.to_string())
}

/// The server, which is ended when this is dropped: in order, if it can.
struct Server(OwnedFd);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.0, Signal::TERM);
        let _ = first_of([self.0.as_fd()], Some(PATIENCE));
        process::kill(&self.0);
    }
}

fn is_greeted(client: &OwnedFd) -> bool {
    recv(client, &mut [0u8; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT).is_ok_and(|(_, count)| count > 0)
}

/// Of a server that has let go of its client: it is ended before all that it has said is read.
fn last_words(server: Server, said: OwnedFd) -> String {
    let _ = first_of([server.0.as_fd()], Some(PATIENCE));
    drop(server);
    let mut words = Vec::new();
    let read = File::from(said).take(MOST_SAID).read_to_end(&mut words);
    match read {
        Ok(_) if !words.is_empty() => String::from_utf8_lossy(&words).into_owned(),
        _ => "it ended without a word".to_owned(),
    }
}

/// Waits until something is to be read of one of these, or its other end has gone: which. `None`: not in that time.
fn first_of<const N: usize>(those: [BorrowedFd<'_>; N], limit: Option<Duration>) -> io::Result<Option<usize>> {
    let ready = ready_by(those, limit.map(|limit| Instant::now() + limit))?;
    Ok(ready.into_iter().position(|is_ready| is_ready))
}
