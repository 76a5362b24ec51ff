//! The faces of virtd: D-Bus objects, signals, polkit.
//!
//! [`Server`] joins a service with any number of connections; `main.rs` gives it the bus, tests a socket pair.

#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod bus;
pub mod caller;
pub mod error;
pub mod firewalld;
pub mod link;
#[allow(clippy::disallowed_methods, reason = "its own standard error")]
pub mod log;
mod metrics;
mod objects;
pub mod polkit;
mod publish;
pub mod session;
#[allow(clippy::disallowed_methods, reason = "the configuration file, and folders of virtd itself")]
pub mod settings;

use bus::gate::{Limits, Unread};
use bus::outbox::Outbox;
use bus::socket::Intake;
use bus::table::Table;
use bus::{Bus, Current, Ways, Who};
use caller::Callers;
use objects::{
    checkpoint, domain, host, job, manager, network, nodedev, pool, secret, snapshot, storage, subscription, volume,
};
use publish::{Listener, Publisher};
use std::fmt;
use std::sync::Arc;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use virt_service::Service;
use virt_service::events::Event;
use zbus::{Connection, MessageStream};

/// What virtd is called on a bus.
pub const BUS_NAME: &str = "org.virt";

/// A service with its objects published, ready for connections.
#[derive(Clone, Debug)]
pub struct Server {
    table: Arc<Table>,
    publisher: Arc<Publisher>,
    /// Fires when nothing is published any more.
    mute: CancellationToken,
    /// Who serves the bus.
    current: Current,
}

impl Server {
    /// Publishes what there is. When it returns, the tree is true, and nothing has been sent to anybody.
    /// Error: the code does not offer what the introspection files say, which a test would have told.
    pub async fn new(service: &Arc<Service>, events: UnboundedReceiver<Event>) -> Result<Server, String> {
        let table = Table::new(vec![
            manager::offer(service),
            domain::offer(service),
            snapshot::offer(service),
            checkpoint::offer(service),
            network::offer_of_manager(service),
            network::offer(service),
            secret::offer_of_manager(service),
            secret::offer(service),
            job::offer(service),
            nodedev::offer_manager(service),
            nodedev::offer(service),
            host::offer(service),
            subscription::offer(service),
            storage::offer(service),
            pool::offer(service),
            volume::offer(service),
        ])?;
        let publisher = Publisher::new(&service.drivers(), &service.other_hosts(), &service.pool_abilities());
        let (publishing, mute) = (publisher.clone(), CancellationToken::new());
        let ends = mute.clone().drop_guard();
        tokio::spawn(async move {
            let _ends = ends;
            publishing.run(events).await;
        });
        service.events().flush().await;
        Ok(Server { table: Arc::new(table), publisher, mute, current: Current::default() })
    }

    /// Serves the clients of a bus; ends with the connection, whose socket is measured by `intake`. The name is the
    /// caller's to request, once this runs.
    pub fn serve_bus(&self, connection: &Connection, intake: Arc<Intake>, callers: Callers) -> Serving {
        let limits = Limits { unread: Some(Unread::default()), ..Limits::default() };
        let ways = Ways { intake, current: self.current.clone(), ..Ways::default() };
        self.serve(MessageStream::from(connection), None, ways, Who::Bus(callers), limits)
    }

    /// Serves one peer, whose user is `uid`; ends with the connection. The stream must be the one that the connection
    /// was built with, or the first call may be lost.
    pub fn serve_peer(&self, stream: MessageStream, uid: u32) -> Serving {
        let connection = Connection::from(&stream);
        self.serve(stream, Some(connection), Ways::default(), Who::Peer(uid), Limits::default())
    }

    fn serve(&self, stream: MessageStream, peer: Option<Connection>, ways: Ways, who: Who, limits: Limits) -> Serving {
        let (intake, outbox) = (ways.intake.clone(), ways.outbox.clone());
        self.publisher.attach(Listener { outbox: outbox.clone(), peer });
        let bus = Bus::new(self.table.clone(), self.publisher.rows().clone(), ways, who, limits);
        let (server, ours) = (self.clone(), outbox.clone());
        let task = tokio::spawn(async move {
            let why = tokio::select! {
                () = bus.run(stream) => if intake.stalled() { End::Stalled } else { End::Closed },
                () = server.mute.cancelled() => End::Mute,
            };
            server.publisher.detach(&ours);
            why
        });
        Serving { task, outbox }
    }
}

/// Why a connection is not served any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It has ended.
    Closed,
    /// The other end took nothing any more, so it was ended. Another may be made.
    Stalled,
    /// Changes are not published any more.
    Mute,
    /// A bug.
    Bug,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            End::Closed => "the connection has ended",
            End::Stalled => "the other end of the connection takes nothing",
            End::Mute => "changes are not published any more",
            End::Bug => "a bug in virtd ended its service; the log has more",
        })
    }
}

/// A connection being served.
#[derive(Debug)]
pub struct Serving {
    task: JoinHandle<End>,
    outbox: Arc<Outbox>,
}

impl Serving {
    /// Waits until the connection is not served any more, and says why.
    pub async fn ended(&mut self) -> End {
        (&mut self.task).await.unwrap_or(End::Bug)
    }

    /// Waits until everything is sent.
    pub async fn sent(&self) {
        self.outbox.sent().await;
    }
}

#[cfg(test)]
mod tests;
