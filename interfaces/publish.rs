//! What the service tells, as rows and signals. The only writer of rows.
//!
//! ```text
//!  Event::Domain     new: InterfacesAdded ─▶ Lifecycle ─▶ DomainLifecycle      else: PropertiesChanged ─▶ the same
//!  Event::DomainGone PropertiesChanged ─▶ Lifecycle ─▶ DomainLifecycle ─▶ InterfacesRemoved
//!  Event::Job        the same with Finished
//!  Event::Flush      answered: all that came before is queued in front of whatever is sent from now on
//! ```
//!
//! A row is in place when its signals are queued, and both happen as one for readers (`bus/rows.rs`). Until a connection
//! is attached, rows change in silence: that is how the tree is true before anybody can look.

use crate::bus::call::signal;
use crate::bus::outbox::Outbox;
use crate::bus::rows::{Object, Objects, Rows};
use crate::bus::wire::Body;
use crate::error::Error;
use crate::{domain, job, manager};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc::UnboundedReceiver;
use uuid::Uuid;
use virt_model::state::{Lifecycle, Undefined};
use virt_service::events::{DomainFacts, Event};
use virt_service::job::JobFacts;
use zbus::{Connection, Message};

/// How many events are taken up at once.
const BATCH: usize = 256;

/// A connection that hears of changes.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Where signals go.
    pub outbox: Arc<Outbox>,
    /// One that can be given up if it does not read; a bus is waited for.
    pub peer: Option<Connection>,
}

/// Keeps the rows, and tells every attached connection.
#[derive(Debug, Default)]
pub struct Publisher {
    rows: Arc<Rows>,
    listeners: Mutex<Vec<Listener>>,
}

impl Publisher {
    /// A publisher whose tree has the manager in it.
    pub fn new(drivers: &[&str]) -> Arc<Publisher> {
        let publisher = Publisher::default();
        publisher.rows.write(|objects| objects.put(manager::object(drivers)));
        Arc::new(publisher)
    }

    /// The rows it keeps.
    pub fn rows(&self) -> &Arc<Rows> {
        &self.rows
    }

    /// Tells this connection too, from now on.
    pub fn attach(&self, listener: Listener) {
        self.listeners().push(listener);
    }

    /// Tells this connection no more.
    pub fn detach(&self, outbox: &Arc<Outbox>) {
        self.listeners().retain(|one| !Arc::ptr_eq(&one.outbox, outbox));
    }

    /// Publishes until the service is gone.
    pub async fn run(self: Arc<Self>, mut events: UnboundedReceiver<Event>) {
        let mut batch = Vec::with_capacity(BATCH);
        while events.recv_many(&mut batch, BATCH).await > 0 {
            self.room().await;
            for event in batch.drain(..) {
                self.publish(event);
            }
        }
    }

    fn publish(&self, event: Event) {
        match event {
            Event::Domain(facts, events) => self.change(|objects| domain_changed(objects, &facts, &events)),
            Event::DomainGone(facts, events) => self.change(|objects| domain_gone(objects, &facts, &events)),
            Event::Job(facts) => self.change(|objects| job_changed(objects, &facts)),
            Event::JobGone(id) => self.change(|objects| Ok(removed(objects, &job::path(id))?.into_iter().collect())),
            Event::Flush(done) => drop(done.send(())),
        }
    }

    /// Changes rows and queues the signals of the change, as one.
    fn change(&self, change: impl FnOnce(&mut Objects) -> Result<Vec<Message>, Error>) {
        self.rows.write(|objects| match change(objects) {
            Ok(signals) => self.tell(&signals),
            Err(error) => tracing::error!(%error, "a change could not be told"),
        });
    }

    fn tell(&self, signals: &[Message]) {
        for listener in self.listeners().iter() {
            signals.iter().for_each(|signal| listener.outbox.push(signal.clone()));
        }
    }

    /// Waits for the bus to take what it was sent, and gives up peers that do not.
    async fn room(&self) {
        let listeners = self.listeners().clone();
        for listener in listeners {
            match listener.peer {
                None => listener.outbox.room().await,
                Some(connection) if listener.outbox.is_lost() => {
                    tracing::warn!("a peer does not read its signals; its connection is closed");
                    listener.outbox.close();
                    self.detach(&listener.outbox);
                    tokio::spawn(connection.close());
                }
                Some(_) => {}
            }
        }
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<Listener>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The domain is as `facts` say, after `events`.
fn domain_changed(
    objects: &mut Objects,
    facts: &Arc<DomainFacts>,
    events: &[Lifecycle],
) -> Result<Vec<Message>, Error> {
    let old_name = name_of(objects, facts.uuid);
    let mut signals: Vec<_> = placed(objects, domain::object(facts))?.into_iter().collect();
    for event in events {
        signals.extend(lifecycle(facts, old_name.as_deref(), *event)?);
    }
    Ok(signals)
}

/// The same for one that has ceased to exist.
fn domain_gone(objects: &mut Objects, facts: &Arc<DomainFacts>, events: &[Lifecycle]) -> Result<Vec<Message>, Error> {
    let path = domain::path(facts.uuid);
    let mut signals = Vec::new();
    if objects.get(&path).is_some() {
        signals = domain_changed(objects, facts, events)?;
        signals.extend(removed(objects, &path)?);
    }
    Ok(signals)
}

fn job_changed(objects: &mut Objects, facts: &Arc<JobFacts>) -> Result<Vec<Message>, Error> {
    let object = job::object(facts);
    let ended_before = objects.get(&object.path).is_some_and(|old| job::has_ended(old));
    let mut signals: Vec<_> = placed(objects, object)?.into_iter().collect();
    if facts.state.is_final() && !ended_before {
        signals.push(job::finished(facts)?);
    }
    Ok(signals)
}

/// Puts an object in its place. What there is to tell: that it is new, or what is different.
fn placed(objects: &mut Objects, object: Object) -> Result<Option<Message>, Error> {
    let path = object.path.clone();
    let old = objects.put(object);
    let Some(new) = objects.get(&path) else { return Ok(None) };
    match old {
        None => added(new).map(Some),
        Some(old) => changed(&old, new),
    }
}

fn added(object: &Object) -> Result<Message, Error> {
    let mut body = Body::with_capacity(1024);
    body.text(&object.path);
    object.interfaces(&mut body);
    signal("/org/virt", "org.freedesktop.DBus.ObjectManager", "InterfacesAdded", "oa{sa{sv}}", &body)
}

fn removed(objects: &mut Objects, path: &str) -> Result<Option<Message>, Error> {
    let Some(old) = objects.remove(path) else { return Ok(None) };
    let mut body = Body::with_capacity(128);
    body.text(path);
    body.array(4, |body| body.text(old.interface));
    signal("/org/virt", "org.freedesktop.DBus.ObjectManager", "InterfacesRemoved", "oas", &body).map(Some)
}

fn changed(old: &Object, new: &Object) -> Result<Option<Message>, Error> {
    let changes = new.row.changes(&old.row);
    if changes.bytes().is_empty() {
        return Ok(None);
    }
    let mut body = Body::with_capacity(changes.bytes().len() + 64);
    body.text(new.interface);
    body.array(8, |body| body.aligned(changes.bytes()));
    body.array(4, |_| ());
    signal(&new.path, "org.freedesktop.DBus.Properties", "PropertiesChanged", "sa{sv}as", &body).map(Some)
}

/// What happened, on the domain and on the manager. A name that is given up is the old one.
fn lifecycle(facts: &DomainFacts, old_name: Option<&str>, event: Lifecycle) -> Result<[Message; 2], Error> {
    let path = domain::path(facts.uuid);
    let (word, detail) = event.words();
    let name = match event {
        Lifecycle::Undefined(Undefined::Renamed) => old_name.unwrap_or(&facts.name),
        _ => &facts.name,
    };
    let mut own = Body::with_capacity(64);
    own.text(word);
    own.text(detail);
    let mut all = Body::with_capacity(256);
    for text in [&path, &facts.uuid.to_string(), name, word, detail] {
        all.text(text);
    }
    Ok([
        signal(&path, domain::INTERFACE, "Lifecycle", "ss", &own)?,
        signal("/org/virt", manager::INTERFACE, "DomainLifecycle", "ossss", &all)?,
    ])
}

fn name_of(objects: &Objects, uuid: Uuid) -> Option<String> {
    let facts = objects.get(&domain::path(uuid))?.domain()?;
    Some(facts.name.clone())
}
