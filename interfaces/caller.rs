//! Who is on the bus: the user behind a unique name, what it has not read yet, and whether it is still there.
//!
//! Unique names are never given twice while a bus lives. The dispatcher hears of every name that leaves, in order with
//! the calls, and says so here; nothing is kept of a name that has left.

use crate::bus::gate::Backlog;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use zbus::{Connection, Message};

/// How long the bus may take to answer.
const PATIENCE: Duration = Duration::from_secs(25);

/// What a client has not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// The bus keeps so much for it.
    Left(Backlog),
    /// The bus did not say, this time.
    NotNow,
    /// This bus does not say such things.
    Never,
}

type Tokens = HashMap<String, CancellationToken>;

/// The clients of one bus.
#[derive(Clone, Debug)]
pub struct Callers {
    connection: Arc<Mutex<Connection>>,
    tokens: Arc<Mutex<Tokens>>,
    /// It was said that the bus does not tell what is unread.
    warned: Arc<AtomicBool>,
}

impl Callers {
    /// The clients of the bus at the other end.
    pub fn new(connection: Connection) -> Callers {
        Callers { connection: Arc::new(Mutex::new(connection)), tokens: Arc::default(), warned: Arc::default() }
    }

    /// The same clients, by another connection to the same bus.
    pub fn go_on_by(&self, connection: Connection) {
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = connection;
    }

    /// Asks the bus to tell of every name that leaves. The dispatcher hears it, so it must be running.
    pub async fn listen(&self) -> zbus::Result<()> {
        const RULE: &str = "type='signal',sender='org.freedesktop.DBus',path='/org/freedesktop/DBus',\
                            interface='org.freedesktop.DBus',member='NameOwnerChanged',arg2=''";
        self.ask("AddMatch", &RULE).await?;
        let watched: Vec<_> = self.lock().keys().cloned().collect();
        for name in watched {
            tokio::spawn(self.clone().verify(name));
        }
        Ok(())
    }

    /// A client's user; `None` if it has left.
    pub async fn uid(&self, name: &str) -> Option<u32> {
        let reply = self.ask("GetConnectionUnixUser", &name).await;
        reply.and_then(|reply| reply.body().deserialize()).inspect_err(|error| tracing::debug!(name, %error)).ok()
    }

    /// How much the bus keeps for a client that has not read it.
    pub async fn reading(&self, name: &str) -> Reading {
        match self.unread(name).await {
            Ok(left) => Reading::Left(left),
            Err(error) => {
                let never = is_not_offered(&error);
                if never && !self.warned.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "the bus does not tell how much its clients have left unread");
                }
                tracing::debug!(name, %error, "it is not known what a client has left unread");
                if never { Reading::Never } else { Reading::NotNow }
            }
        }
    }

    async fn unread(&self, name: &str) -> zbus::Result<Backlog> {
        let connection = self.connection();
        let call = connection.call_method(
            Some("org.freedesktop.DBus"),
            "/org/freedesktop/DBus",
            Some("org.freedesktop.DBus.Debug.Stats"),
            "GetConnectionStats",
            &name,
        );
        let reply = within(call).await?;
        let body = reply.body();
        let stats: HashMap<&str, zbus::Variant<'_>> = body.deserialize()?;
        let count = |key: &str| {
            let count = stats.get(key).and_then(|value| value.downcast_ref::<u32>().ok());
            count.map(|count| count as usize).ok_or(zbus::Error::MissingField)
        };
        Ok(Backlog { bytes: count("OutgoingBytes")?, descriptors: count("OutgoingFDs")? })
    }

    /// Fires when a client has left, by whichever connection that is heard. `heard`: what the dispatcher of a call of it has heard.
    pub fn departure(&self, name: &str, heard: &CancellationToken) -> CancellationToken {
        let token = self.lock().entry(name.to_owned()).or_default().clone();
        // It had left before the token was there.
        if heard.is_cancelled() {
            self.left(name);
        }
        token
    }

    /// A client has left.
    pub fn left(&self, name: &str) {
        if let Some(token) = self.lock().remove(name) {
            token.cancel();
        }
    }

    /// The connection has ended, and with it all clients have left.
    pub fn all_left(&self) {
        for (_, token) in self.lock().drain() {
            token.cancel();
        }
    }

    /// Makes sure that a name whose leaving may have gone unheard is there.
    async fn verify(self, name: String) {
        let there = self.ask("NameHasOwner", &name.as_str()).await.and_then(|reply| reply.body().deserialize());
        if !matches!(there, Ok(true)) {
            self.left(&name);
        }
    }

    async fn ask(&self, member: &str, argument: &&str) -> zbus::Result<Message> {
        let (name, path) = ("org.freedesktop.DBus", "/org/freedesktop/DBus");
        within(self.connection().call_method(Some(name), path, Some(name), member, argument)).await
    }

    fn connection(&self) -> Connection {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lock(&self) -> MutexGuard<'_, Tokens> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl virt_service::Callers for Callers {
    fn watch(&self, bus_name: &str) -> CancellationToken {
        if let Some(token) = self.lock().get(bus_name) {
            return token.clone();
        }
        let token = self.lock().entry(bus_name.to_owned()).or_default().clone();
        tokio::spawn(self.clone().verify(bus_name.to_owned()));
        token
    }
}

/// Whether an error of the bus says that it never does what was asked, or not for us.
fn is_not_offered(error: &zbus::Error) -> bool {
    use zbus::DBusError as _;
    let name = match error {
        zbus::Error::MethodError(name, ..) => name.to_string(),
        zbus::Error::FDO(error) => error.name().to_string(),
        // An answer of another shape.
        zbus::Error::MissingField => return true,
        _ => return false,
    };
    let known = ["UnknownMethod", "UnknownInterface", "UnknownObject", "NotSupported", "AccessDenied"];
    name.strip_prefix("org.freedesktop.DBus.Error.").is_some_and(|name| known.contains(&name))
}

async fn within(call: impl Future<Output = zbus::Result<Message>>) -> zbus::Result<Message> {
    let expired = || Err(zbus::Error::Failure("the bus did not answer".to_owned()));
    tokio::time::timeout(PATIENCE, call).await.unwrap_or_else(|_| expired())
}
