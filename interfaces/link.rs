//! How virtd gets on a bus: its socket, its name, and both anew when the bus takes nothing any more.
//!
//! A bus counts against us what its clients leave unread. When that is too much (a client listens to all signals and reads
//! none of them), dbus-daemon takes nothing from us any more, and nobody is served. The connection is given up then and
//! another made, against which nothing is counted: the name is requested again, and guests, jobs and all other state stay.
//! Who called meanwhile is told by the bus that nobody answers; who listens sees the name change hands, and reads what
//! there is now.

use crate::BUS_NAME;
use crate::bus::socket::{Intake, Measured, STALLED};
use crate::settings::Kind;
use std::num::NonZeroUsize;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::Arc;
use std::time::Duration;
use zbus::address::transport::{Transport, UnixSocket};
use zbus::connection::Builder;
use zbus::message::Flags;
use zbus::{Address, Connection, Message};

/// How many messages may lie between socket and dispatcher.
const QUEUED: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// How long the bus may take to let us in, or to give us the name that our last connection had.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often the name is requested anew.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// A connection to a bus, and its measured socket.
#[derive(Clone, Debug)]
pub struct Link {
    /// The connection.
    pub connection: Connection,
    /// What its socket knows.
    pub intake: Arc<Intake>,
}

impl Link {
    /// Connects to the system's or the user's bus. Error: a sentence.
    pub async fn connect(kind: Kind) -> Result<Link, String> {
        // A bus whose policy keeps us out may never answer.
        match tokio::time::timeout(PATIENCE, connect(kind)).await {
            Ok(Ok(link)) => Ok(link),
            Ok(Err(error)) => Err(format!("the bus cannot be reached: {error}")),
            Err(_) => Err("the bus does not answer; does its policy allow us?".to_owned()),
        }
    }

    /// Another virtd's guests are not to be touched, so this is asked before anything is.
    pub async fn refuse_if_taken(&self) -> Result<(), String> {
        let answer = self.ask_bus("NameHasOwner", &BUS_NAME).await;
        match answer.and_then(|reply| reply.body().deserialize()) {
            Ok(false) => Ok(()),
            Ok(true) => Err(taken()),
            Err(error) => Err(format!("the bus does not say who has the name {BUS_NAME}: {error}")),
        }
    }

    /// Requests the name. Whoever has it keeps it.
    pub async fn take_name(&self) -> Result<(), String> {
        if self.request_name().await? { Ok(()) } else { Err(taken()) }
    }

    /// Requests the name that another connection of ours had, which has ended: waits until the bus has seen that.
    pub async fn take_name_over(&self, former: &Link) -> Result<(), String> {
        let asking = async {
            while !self.request_name().await? {
                self.poke(former).await;
                tokio::time::sleep(ASK_AGAIN).await;
            }
            Ok(())
        };
        tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| Err(taken()))
    }

    /// Whether we have the name now.
    async fn request_name(&self) -> Result<bool, String> {
        const DO_NOT_QUEUE: u32 = 4;
        const PRIMARY_OWNER: u32 = 1;
        let answer = self.ask_bus("RequestName", &(BUS_NAME, DO_NOT_QUEUE)).await;
        match answer.and_then(|reply| reply.body().deserialize::<u32>()) {
            Ok(given) => Ok(given == PRIMARY_OWNER),
            Err(error) => Err(format!("the bus does not give us the name {BUS_NAME}: {error}")),
        }
    }

    /// Has the bus write to a connection that it does not read: that is how it sees that nobody is there any more.
    async fn poke(&self, former: &Link) {
        let Some(name) = former.connection.unique_name() else { return };
        let ping = Message::method_call("/", "Ping").interface("org.freedesktop.DBus.Peer").destination(name.as_str());
        let ping = ping.with_flags(Flags::NO_REPLY_EXPECTED | Flags::NO_AUTO_START).build(&());
        let sent = match ping {
            Ok(ping) => self.connection.send(&ping).await,
            Err(error) => Err(error),
        };
        if let Err(error) = sent {
            tracing::debug!(%error, "our former connection could not be called");
        }
    }

    async fn ask_bus<B>(&self, member: &str, body: &B) -> zbus::Result<Message>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        let (bus, path) = ("org.freedesktop.DBus", "/org/freedesktop/DBus");
        let asking = self.connection.call_method(Some(bus), path, Some(bus), member, body);
        let expired = || Err(zbus::Error::Failure("the bus did not answer".to_owned()));
        tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| expired())
    }
}

async fn connect(kind: Kind) -> Result<Link, String> {
    let address = match kind {
        Kind::System => Address::system(),
        Kind::Session => Address::session(),
    };
    let address = address.map_err(|error| error.to_string())?;
    let stream = open(&address)?;
    let intake = Arc::new(Intake::default());
    let socket = Measured::new(stream, intake.clone(), Some(STALLED));
    let connection = Builder::socket(socket).max_queued(QUEUED).build().await;
    Ok(Link { connection: connection.map_err(|error| error.to_string())?, intake })
}

/// Opens the socket that an address names. A Unix socket is connected to at once, or is not there.
fn open(address: &Address) -> Result<tokio::net::UnixStream, String> {
    let known = match address.transport() {
        Transport::Unix(unix) => match unix.path() {
            UnixSocket::File(path) => SocketAddr::from_pathname(path),
            UnixSocket::Abstract(name) => SocketAddr::from_abstract_name(name.as_bytes()),
            _ => Err(std::io::ErrorKind::Unsupported.into()),
        },
        _ => Err(std::io::ErrorKind::Unsupported.into()),
    };
    let opened = known.and_then(|known| UnixStream::connect_addr(&known)).and_then(|stream| {
        stream.set_nonblocking(true)?;
        tokio::net::UnixStream::from_std(stream)
    });
    opened.map_err(|error| match error.kind() {
        std::io::ErrorKind::Unsupported => format!("'{address}' is no Unix socket that could be connected to"),
        _ => format!("{address}: {error}"),
    })
}

fn taken() -> String {
    format!("the name {BUS_NAME} is taken; another virtd runs on this bus")
}
