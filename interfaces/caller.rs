//! Who is on the bus: the user behind a unique name, what it has not read yet, and whether it is still there.
//!
//! Unique names are never given twice while a bus lives. The dispatcher hears of every name that leaves, in order with
//! the calls, and says so here; nothing is kept of a name that has left.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use zbus::{Connection, Message};

/// How long the bus may take to answer.
const PATIENCE: Duration = Duration::from_secs(25);

type Tokens = HashMap<String, CancellationToken>;

/// The clients of one bus.
#[derive(Clone, Debug)]
pub struct Callers {
    connection: Connection,
    tokens: Arc<Mutex<Tokens>>,
}

impl Callers {
    /// The clients of the bus at the other end.
    pub fn new(connection: Connection) -> Callers {
        Callers { connection, tokens: Arc::default() }
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

    /// How many bytes the bus keeps for a client that has not read them. Error: this bus does not say.
    pub async fn unread(&self, name: &str) -> zbus::Result<usize> {
        let call = self.connection.call_method(
            Some("org.freedesktop.DBus"),
            "/org/freedesktop/DBus",
            Some("org.freedesktop.DBus.Debug.Stats"),
            "GetConnectionStats",
            &name,
        );
        let reply = within(call).await?;
        let body = reply.body();
        let stats: HashMap<&str, zbus::Variant<'_>> = body.deserialize()?;
        let bytes = stats.get("OutgoingBytes").and_then(|value| value.downcast_ref::<u32>().ok());
        bytes.map(|bytes| bytes as usize).ok_or(zbus::Error::MissingField)
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
        within(self.connection.call_method(Some(name), path, Some(name), member, argument)).await
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

async fn within(call: impl Future<Output = zbus::Result<Message>>) -> zbus::Result<Message> {
    let expired = || Err(zbus::Error::Failure("the bus did not answer".to_owned()));
    tokio::time::timeout(PATIENCE, call).await.unwrap_or_else(|_| expired())
}
