//! What the service tells, as rows and signals. The only writer of rows.
//!
//! ```text
//!  Event::Domain     new: InterfacesAdded ─▶ Lifecycle ─▶ DomainLifecycle      else: PropertiesChanged ─▶ the same
//!  Event::DomainGone PropertiesChanged ─▶ Lifecycle ─▶ DomainLifecycle ─▶ InterfacesRemoved
//!  Event::Object, ObjectGone   the same for all other kinds, with the signals that the kind has
//!  Event::Snapshot   new: InterfacesAdded      else: PropertiesChanged      Event::SnapshotGone  InterfacesRemoved
//!  Event::Checkpoint, CheckpointGone   as those of snapshots
//!  Event::Device     DeviceAdded and the like      Event::Job  the same with Finished
//!  Event::Subscription, SubscriptionGone   added and removed
//!  Event::Flush      answered: all that came before is queued in front of whatever is sent from now on
//! ```
//!
//! A row is in place when its signals are queued, and both happen as one for readers (`bus/rows.rs`). Until a connection
//! is attached, rows change in silence: that is how the tree is true before anybody can look.

use crate::bus::answers::manager_of;
use crate::bus::call::signal;
use crate::bus::outbox::Outbox;
use crate::bus::rows::{Object, Objects, Rows};
use crate::bus::wire::{Body, Extent};
use crate::error::Error;
use crate::objects::{self, Published, checkpoint, domain, job, manager, paths, snapshot, subscription};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc::UnboundedReceiver;
use uuid::Uuid;
use virt_model::driver::DeviceEvent;
use virt_model::driver::storage::PoolAbility;
use virt_model::state::{Lifecycle, Undefined};
use virt_service::events::{Event, Happened};
use virt_service::facts::{DomainFacts, JobFacts, ObjectFacts};
use zbus::{Connection, Message, Variant};

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
    pub fn new(drivers: &[&str], hosts: &[String], pools: &[PoolAbility]) -> Arc<Publisher> {
        let publisher = Publisher::default();
        publisher.rows.write(|objects| objects.put(manager::object(drivers, hosts, pools)));
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
            Event::Snapshot(facts) => {
                self.change(|objects| placed(objects, snapshot::object(&facts)));
            }
            Event::SnapshotGone(facts) => {
                let path = paths::snapshot(facts.domain, &facts.name);
                self.change(|objects| Ok(removed(objects, &path)?.into_iter().collect()));
            }
            Event::Checkpoint(facts) => {
                self.change(|objects| placed(objects, checkpoint::object(&facts)));
            }
            Event::CheckpointGone(facts) => {
                let path = paths::checkpoint(facts.domain, &facts.name);
                self.change(|objects| Ok(removed(objects, &path)?.into_iter().collect()));
            }
            Event::Object(facts, events) => self.change(|objects| object_changed(objects, &facts, &events)),
            Event::ObjectGone(facts, events) => self.change(|objects| object_gone(objects, &facts, &events)),
            Event::Device(domain, event) => self.change(|objects| device(objects, domain, &event)),
            Event::Job(facts) => self.change(|objects| job_changed(objects, &facts)),
            Event::JobGone(id) => self.change(|objects| Ok(removed(objects, &paths::job(id))?.into_iter().collect())),
            // To everybody, as all objects: `GetManagedObjects` answers all alike, and whoever keeps what it answered would be left with
            // what is not true. What is told is a number; the statistics go to their owner alone.
            Event::Subscription(number) => {
                self.change(|objects| placed(objects, subscription::object(number)));
            }
            Event::SubscriptionGone(number) => {
                let path = paths::subscription(number);
                self.change(|objects| Ok(removed(objects, &path)?.into_iter().collect()));
            }
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
    let mut signals = placed(objects, domain::object(facts))?;
    for event in events {
        signals.extend(lifecycle(facts, old_name.as_deref(), *event)?);
    }
    Ok(signals)
}

/// The same for one that has ceased to exist.
fn domain_gone(objects: &mut Objects, facts: &Arc<DomainFacts>, events: &[Lifecycle]) -> Result<Vec<Message>, Error> {
    let path = paths::domain(facts.uuid);
    let mut signals = Vec::new();
    if objects.get(&path).is_some() {
        signals = domain_changed(objects, facts, events)?;
        signals.extend(removed(objects, &path)?);
    }
    Ok(signals)
}

/// An object of another kind is as `facts` say, after `events`.
fn object_changed(objects: &mut Objects, facts: &ObjectFacts, events: &[Happened]) -> Result<Vec<Message>, Error> {
    let Published { object, lifecycle } = objects::published(facts);
    let (path, interface) = (object.path.clone(), object.interface);
    let mut signals = placed(objects, object)?;
    for (word, detail) in events {
        let mut own = Body::with_capacity(64);
        own.text(word);
        own.text(detail);
        signals.push(signal(&path, interface, "Lifecycle", "ss", &own)?);
        let Some(told) = &lifecycle else { continue };
        let mut all = Body::with_capacity(256);
        let detail = told.detailed.then_some(*detail);
        let texts = [&*path].into_iter().chain(told.names.iter().map(String::as_str)).chain([*word]).chain(detail);
        texts.for_each(|text| all.text(text));
        let signature = if told.detailed { "ossss" } else { "oss" };
        signals.push(signal("/org/virt", told.manager, told.member, signature, &all)?);
    }
    Ok(signals)
}

/// The same for one that has ceased to exist.
fn object_gone(objects: &mut Objects, facts: &ObjectFacts, events: &[Happened]) -> Result<Vec<Message>, Error> {
    let path = objects::published(facts).object.path;
    let mut signals = Vec::new();
    if objects.get(&path).is_some() {
        signals = object_changed(objects, facts, events)?;
        signals.extend(removed(objects, &path)?);
    }
    Ok(signals)
}

fn job_changed(objects: &mut Objects, facts: &Arc<JobFacts>) -> Result<Vec<Message>, Error> {
    let object = job::object(facts);
    let ended_before = objects.get(&object.path).is_some_and(|old| job::has_ended(old));
    let mut signals = placed(objects, object)?;
    if facts.state.is_final() && !ended_before {
        signals.push(job::finished(facts)?);
    }
    Ok(signals)
}

/// Puts an object in its place. What there is to tell: that it is new, or what is different.
fn placed(objects: &mut Objects, object: Object) -> Result<Vec<Message>, Error> {
    let path = object.path.clone();
    let old = objects.put(object);
    let Some(new) = objects.get(&path) else { return Ok(Vec::new()) };
    match old {
        None => Ok(vec![added(new)?]),
        Some(old) => changed(&old, new),
    }
}

fn added(object: &Object) -> Result<Message, Error> {
    let mut body = Body::with_capacity(1024);
    body.text(&object.path);
    object.interfaces(Extent::Whole, &mut body);
    signal(manager_of(&object.path), "org.freedesktop.DBus.ObjectManager", "InterfacesAdded", "oa{sa{sv}}", &body)
}

fn removed(objects: &mut Objects, path: &str) -> Result<Option<Message>, Error> {
    let Some(old) = objects.remove(path) else { return Ok(None) };
    let mut body = Body::with_capacity(128);
    body.text(path);
    body.array(4, |body| old.parts().for_each(|(interface, _)| body.text(interface)));
    signal(manager_of(path), "org.freedesktop.DBus.ObjectManager", "InterfacesRemoved", "oas", &body).map(Some)
}

fn changed(old: &Object, new: &Object) -> Result<Vec<Message>, Error> {
    let changed = new.parts().filter_map(|(interface, row)| {
        let changes = row.changes(old.row_of(interface)?);
        if changes.bytes().is_empty() {
            return None;
        }
        let mut body = Body::with_capacity(changes.bytes().len() + 64);
        body.text(interface);
        body.array(8, |body| body.aligned(changes.bytes()));
        body.array(4, |_| ());
        Some(signal(&new.path, "org.freedesktop.DBus.Properties", "PropertiesChanged", "sa{sv}as", &body))
    });
    changed.collect()
}

/// What happened, on the domain and on the manager. A name that is given up is the old one.
fn lifecycle(facts: &DomainFacts, old_name: Option<&str>, event: Lifecycle) -> Result<[Message; 2], Error> {
    let path = paths::domain(facts.uuid);
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

/// What happened to a device, on the domain.
fn device(objects: &Objects, domain: Uuid, event: &DeviceEvent) -> Result<Vec<Message>, Error> {
    let path = paths::domain(domain);
    if objects.get(&path).is_none() {
        return Ok(Vec::new());
    }
    let (member, texts) = match event {
        DeviceEvent::BalloonChanged { bytes } => {
            let mut body = Body::with_capacity(16);
            body.aligned(&bytes.to_le_bytes());
            return Ok(vec![signal(&path, domain::INTERFACE, "BalloonChanged", "t", &body)?]);
        }
        DeviceEvent::MemoryFailure { recipient, action, action_required, recursive } => {
            let flags = HashMap::from([
                ("action-required", Variant::from(*action_required)),
                ("recursive", Variant::from(*recursive)),
            ]);
            let told = Message::signal(&*path, domain::INTERFACE, "MemoryFailure").build(&(recipient, action, flags));
            let told = told.map_err(|error| Error::internal(format!("a signal could not be made: {error}")))?;
            return Ok(vec![told]);
        }
        DeviceEvent::WrittenBeyond { target, threshold, excess } => {
            let mut body = Body::with_capacity(64);
            body.text(target);
            body.aligned(&threshold.to_le_bytes());
            body.aligned(&excess.to_le_bytes());
            return Ok(vec![signal(&path, domain::INTERFACE, "BlockThreshold", "stt", &body)?]);
        }
        DeviceEvent::IoError { target, action, reason } => {
            ("DiskIoError", vec![&**target, action.as_str(), reason.as_str()])
        }
        DeviceEvent::WatchdogFired { action } => ("WatchdogFired", vec![&**action]),
        DeviceEvent::Added { alias } => ("DeviceAdded", vec![&**alias]),
        DeviceEvent::Removed { alias } => ("DeviceRemoved", vec![&**alias]),
        DeviceEvent::RemovalFailed { alias } => ("DeviceRemovalFailed", vec![&**alias]),
        DeviceEvent::MediumChanged { target, reason } => ("MediumChanged", vec![&**target, reason.as_str()]),
    };
    let mut body = Body::with_capacity(128);
    texts.iter().for_each(|text| body.text(text));
    let signature = ["", "s", "ss", "sss"].get(texts.len()).copied().unwrap_or_default();
    Ok(vec![signal(&path, domain::INTERFACE, member, signature, &body)?])
}

fn name_of(objects: &Objects, uuid: Uuid) -> Option<String> {
    let facts = objects.get(&paths::domain(uuid))?.domain()?;
    Some(facts.name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::wire::Row;
    use virt_model::state::{Defined, DomainState, Started, StateReason, Suspended};
    use virt_service::error::Error as ServiceError;
    use virt_service::facts::{ConfigFacts, JobState, SecretFacts};
    use virt_service::object::{ObjectRef, Usage, User};
    use zbus::{OwnedObjectPath, OwnedVariant, Variant};

    fn facts(state: DomainState) -> DomainFacts {
        DomainFacts {
            name: "web".into(),
            uuid: Uuid::from_u128(7),
            id: u32::from(state.is_active()),
            driver: "test",
            host: "".into(),
            reachable: true,
            active: state.is_active(),
            state,
            reason: StateReason::Unknown,
            since_usec: 1,
            persistent: true,
            autostart: false,
            config: Arc::new(ConfigFacts {
                title: "a title".into(),
                os_type: "hvm".into(),
                vcpus: 1,
                maximum_vcpus: 2,
                memory: 1 << 30,
                maximum_memory: 1 << 31,
                ..ConfigFacts::default()
            }),
            has_managed_save: false,
            agent_connected: false,
            open_channels: Box::default(),
            lacks: &[],
            stored: None,
            pending: Arc::default(),
            current_snapshot: Some("before upgrade".into()),
            snapshot_count: 1,
            snapshots: Arc::new(["before upgrade".to_owned()]),
            owner: 1000,
            broken: String::new(),
        }
    }

    fn job(state: JobState) -> Arc<JobFacts> {
        let failed = state == JobState::Failed;
        Arc::new(JobFacts {
            id: 3,
            object: ObjectRef::Domain(Uuid::from_u128(7)),
            state,
            operation: "start",
            started_usec: 1,
            progress: -1.0,
            bytes_done: 0,
            bytes_total: 0,
            cancellable: true,
            ready: false,
            requester_uid: 1000,
            error: failed.then(|| ServiceError::Internal("it broke".into())),
        })
    }

    /// The members of signals, in order. Each body is what its signature says.
    fn members(signals: &[Message]) -> Vec<String> {
        signals.iter().map(member).collect()
    }

    fn member(signal: &Message) -> String {
        signal.body().validate().unwrap();
        signal.header().member().unwrap().to_string()
    }

    #[test]
    fn a_domain_is_added_changed_and_removed_in_the_order_of_the_contract() {
        let mut objects = Objects::default();
        let stopped = Arc::new(facts(DomainState::Shutoff));
        let added = domain_changed(&mut objects, &stopped, &[Lifecycle::Defined(Defined::Added)]).unwrap();
        assert_eq!(members(&added), ["InterfacesAdded", "Lifecycle", "DomainLifecycle"]);
        let paused = Arc::new(facts(DomainState::Paused));
        let events = [Lifecycle::Started(Started::Booted), Lifecycle::Suspended(Suspended::Paused)];
        let changed = domain_changed(&mut objects, &paused, &events).unwrap();
        let both = ["Lifecycle", "DomainLifecycle", "Lifecycle", "DomainLifecycle"];
        assert_eq!(members(&changed), [&["PropertiesChanged"], &both[..]].concat());
        assert!(domain_changed(&mut objects, &paused, &[]).unwrap().is_empty());
        let gone = domain_gone(&mut objects, &stopped, &[Lifecycle::Undefined(Undefined::Removed)]).unwrap();
        assert_eq!(members(&gone), ["PropertiesChanged", "Lifecycle", "DomainLifecycle", "InterfacesRemoved"]);
        assert!(domain_gone(&mut objects, &stopped, &[]).unwrap().is_empty());
    }

    #[test]
    fn a_change_carries_the_new_values_and_nothing_else() {
        let mut objects = Objects::default();
        domain_changed(&mut objects, &Arc::new(facts(DomainState::Shutoff)), &[]).unwrap();
        let signals = domain_changed(&mut objects, &Arc::new(facts(DomainState::Running)), &[]).unwrap();
        let body = signals[0].body();
        let (interface, values, invalid): (String, HashMap<String, OwnedVariant>, Vec<String>) =
            body.deserialize().unwrap();
        assert_eq!((interface.as_str(), invalid.len(), values.len()), (domain::INTERFACE, 0, 3));
        assert_eq!(*values["State"], Variant::from("running"));
        assert_eq!(*values["Active"], Variant::from(true));
        assert_eq!(*values["Id"], Variant::from(1u32));
    }

    #[test]
    fn what_is_added_is_all_there_is() {
        let mut objects = Objects::default();
        let signals = domain_changed(&mut objects, &Arc::new(facts(DomainState::Shutoff)), &[]).unwrap();
        let body = signals[0].body();
        type Interfaces = HashMap<String, HashMap<String, OwnedVariant>>;
        let (path, interfaces): (OwnedObjectPath, Interfaces) = body.deserialize().unwrap();
        assert_eq!(path.as_str(), paths::domain(Uuid::from_u128(7)));
        let all = &interfaces[domain::INTERFACE];
        assert_eq!(all.len(), 38);
        let snapshot = format!("{}/snapshot/before_20upgrade", path.as_str());
        assert_eq!(*all["CurrentSnapshot"], Variant::from(zbus::ObjectPath::try_from(snapshot).unwrap()));
    }

    #[test]
    fn a_name_that_is_given_up_is_the_old_one() {
        let mut objects = Objects::default();
        domain_changed(&mut objects, &Arc::new(facts(DomainState::Shutoff)), &[]).unwrap();
        let renamed = Arc::new(DomainFacts { name: "www".into(), ..facts(DomainState::Shutoff) });
        let events = [Lifecycle::Undefined(Undefined::Renamed), Lifecycle::Defined(Defined::Renamed)];
        let signals = domain_changed(&mut objects, &renamed, &events).unwrap();
        let all = signals.iter().filter(|signal| member(signal) == "DomainLifecycle");
        let names = all.map(|signal| {
            let (_, _, name, event, _): (OwnedObjectPath, String, String, String, String) =
                signal.body().deserialize().unwrap();
            (name, event)
        });
        let told = [("web".to_owned(), "undefined".to_owned()), ("www".to_owned(), "defined".to_owned())];
        assert_eq!(names.collect::<Vec<_>>(), told);
    }

    #[test]
    fn a_jobs_end_is_told_once_after_its_properties() {
        let mut objects = Objects::default();
        assert_eq!(members(&job_changed(&mut objects, &job(JobState::Running)).unwrap()), ["InterfacesAdded"]);
        let failed = job_changed(&mut objects, &job(JobState::Failed)).unwrap();
        assert_eq!(members(&failed), ["PropertiesChanged", "Finished"]);
        let told: (bool, String, String) = failed[1].body().deserialize().unwrap();
        assert_eq!(told, (false, "org.virt.Error.Internal".into(), "it broke".into()));
        assert!(job_changed(&mut objects, &job(JobState::Failed)).unwrap().is_empty());
        let gone = removed(&mut objects, "/org/virt/job/3").unwrap().unwrap();
        assert_eq!(member(&gone), "InterfacesRemoved");
    }

    fn secret(has_value: bool) -> ObjectFacts {
        let user = User { object: ObjectRef::Domain(Uuid::from_u128(7)), place: "vda".into(), how: Usage::Config };
        ObjectFacts::Secret(Arc::new(SecretFacts {
            uuid: Uuid::from_u128(9),
            usage_type: "volume",
            usage_id: "/srv/a.img".into(),
            description: String::new(),
            ephemeral: false,
            private: true,
            has_value,
            value_changed_usec: 0,
            protection: "file",
            owner: 1000,
            users: Arc::new([user]),
            broken: String::new(),
        }))
    }

    #[test]
    fn objects_of_other_kinds_are_told_as_domains_are() {
        let mut objects = Objects::default();
        let added = object_changed(&mut objects, &secret(false), &[("defined", "")]).unwrap();
        assert_eq!(members(&added), ["InterfacesAdded", "Lifecycle", "SecretLifecycle"]);
        let changed = object_changed(&mut objects, &secret(true), &[("value-changed", "")]).unwrap();
        assert_eq!(members(&changed), ["PropertiesChanged", "Lifecycle", "SecretLifecycle"]);
        let (path, uuid, event): (OwnedObjectPath, String, String) = changed[2].body().deserialize().unwrap();
        assert_eq!(path.as_str(), paths::of(&ObjectRef::Secret(Uuid::from_u128(9))));
        assert_eq!((uuid, event), (Uuid::from_u128(9).to_string(), "value-changed".to_owned()));
        assert!(object_changed(&mut objects, &secret(true), &[]).unwrap().is_empty());
        let gone = object_gone(&mut objects, &secret(true), &[("undefined", "")]).unwrap();
        assert_eq!(members(&gone), ["Lifecycle", "SecretLifecycle", "InterfacesRemoved"]);
        assert!(object_gone(&mut objects, &secret(true), &[]).unwrap().is_empty());
    }

    #[test]
    fn several_interfaces_of_an_object_are_told_together_and_change_apart() {
        const FIELDS: &[crate::bus::wire::Field] = &[("Count", "u")];
        let row = |count| Row::new(FIELDS, &[crate::bus::wire::Value::U32(count)]);
        let object = |count| Object { others: Box::new([("a.c", row(count))]), ..Object::new("/a", "a.b", row(1)) };
        let mut objects = Objects::default();
        let added = placed(&mut objects, object(1)).unwrap();
        type Interfaces = HashMap<String, HashMap<String, OwnedVariant>>;
        let (_, interfaces): (OwnedObjectPath, Interfaces) = added[0].body().deserialize().unwrap();
        assert_eq!((interfaces["a.b"].len(), interfaces["a.c"].len()), (1, 1));
        let changed = placed(&mut objects, object(2)).unwrap();
        let body = changed[0].body();
        let (interface, _, _): (String, HashMap<String, OwnedVariant>, Vec<String>) = body.deserialize().unwrap();
        assert_eq!((changed.len(), interface.as_str()), (1, "a.c"));
        let gone = removed(&mut objects, "/a").unwrap().unwrap();
        let (_, interfaces): (OwnedObjectPath, Vec<String>) = gone.body().deserialize().unwrap();
        assert_eq!(interfaces, ["a.b", "a.c"]);
    }

    /// M4: what is kept for a peer that does not read is bounded, and others go on hearing.
    #[tokio::test]
    async fn a_peer_that_does_not_read_is_given_up() {
        let (ours, _theirs) = zbus::connection::socket::Channel::pair();
        let guid = zbus::Guid::generate();
        let builder = zbus::connection::Builder::authenticated_socket(ours, guid).p2p();
        let peer = builder.build().await.unwrap();
        let publisher = Publisher::new(&["test"], &[], &[]);
        let (slow, quick) = (Arc::new(Outbox::default()), Arc::new(Outbox::default()));
        publisher.attach(Listener { outbox: slow.clone(), peer: Some(peer.clone()) });
        publisher.attach(Listener { outbox: quick.clone(), peer: None });
        let large = Message::signal("/", "a.b", "C").build(&"x".repeat(1 << 20)).unwrap();
        for _ in 0..65 {
            slow.push(large.clone());
        }
        publisher.room().await;
        assert!(slow.is_closed() && slow.bytes() == 0);
        peer.closed().await;
        publisher.publish(Event::Domain(Arc::new(facts(DomainState::Shutoff)), Vec::new()));
        assert_eq!((members(&quick.waiting()).len(), slow.bytes()), (1, 0));
    }

    #[tokio::test]
    async fn a_flush_is_answered_behind_what_came_before() {
        let publisher = Publisher::new(&["test"], &[], &[]);
        let (events, receiver) = virt_service::events::Events::channel();
        let outbox = Arc::new(Outbox::default());
        publisher.attach(Listener { outbox: outbox.clone(), peer: None });
        tokio::spawn(publisher.clone().run(receiver));
        events.send(Event::Domain(Arc::new(facts(DomainState::Shutoff)), vec![Lifecycle::Defined(Defined::Added)]));
        events.flush().await;
        assert_eq!(members(&outbox.waiting()), ["InterfacesAdded", "Lifecycle", "DomainLifecycle"]);
        assert!(publisher.rows().read(|objects| objects.get(&paths::domain(Uuid::from_u128(7))).is_some()));
    }
}
