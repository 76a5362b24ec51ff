//! virtd on some hosts, and a client of it.

use crate::beds::Bed;
use async_trait::async_trait;
use futures_util::StreamExt as _;
use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use virt_drivers::DriverConfig;
use virt_drivers::network::HostNetworks;
use virt_model::driver::Driver;
use virt_model::driver::inventory::HostProfile;
use virt_service::authz::{Action, Answer, Authority, Caller, Subject};
use virt_service::error::Error;
use virt_service::{Callers, Host, Limits, Paths, Service, Settings};
use virtd::{Server, Serving};
use zbus::connection::Builder;
use zbus::message::Type;
use zbus::{Connection, Guid, Message, MessageStream, OwnedObjectPath, OwnedVariant, Variant};

/// How long anything may take; generous, for a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A host of this name that is known to be lost after two seconds.
pub fn profile(name: &str) -> HostProfile {
    let second = Duration::from_secs(1);
    HostProfile { poll: second, timeout: second, ..HostProfile::named(name) }
}

/// Says yes, and notes what it was asked.
#[derive(Default)]
struct Notary {
    asked: Mutex<Vec<(Action, Subject)>>,
    /// What it was asked about without anybody being asked.
    considered: Mutex<Vec<(Action, Subject)>>,
}

#[async_trait]
impl Authority for Notary {
    async fn check(&self, _: &Caller, action: Action, subject: &Subject) -> Result<(), Error> {
        self.asked.lock().unwrap().push((action, subject.clone()));
        Ok(())
    }

    async fn can(&self, _: &Caller, action: Action, subject: &Subject) -> Answer {
        self.considered.lock().unwrap().push((action, subject.clone()));
        Answer::Yes
    }
}

struct Nobody;

impl Callers for Nobody {
    fn watch(&self, _: &str) -> CancellationToken {
        CancellationToken::new()
    }
}

/// virtd and its client.
pub struct House {
    pub client: Client,
    notary: Arc<Notary>,
    _serving: Serving,
    _server: Server,
    service: Arc<Service>,
}

impl House {
    /// On this host, which is called `lab`.
    pub async fn on(bed: &dyn Bed, folder: &Path) -> House {
        House::with(vec![bed.driver(profile("lab"))], folder).await
    }

    /// On these hosts.
    pub async fn with(hosts: Vec<Arc<dyn Driver>>, folder: &Path) -> House {
        let below = |name: &str| folder.join(name);
        let paths = Paths { state: below("state"), runtime: below("runtime"), log: below("log") };
        let config = DriverConfig::below(folder, false);
        let secrets = config.secrets.clone();
        let networks = Arc::new(HostNetworks::new(folder, folder, None));
        let (drivers, storage) = virt_drivers::with_storage(config);
        let (host, notary) = (Host { secrets, storage, networks }, Arc::new(Notary::default()));
        let settings = Settings { paths, limits: Limits::default() };
        let opened = Service::open(settings, drivers, host, notary.clone(), Arc::new(Nobody)).await;
        let (service, events) = opened.expect("opened");
        service.follow_other_hosts(hosts).await.expect("followed");
        let server = Server::new(&service, events).await.expect("a server");
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let server_end = Builder::unix_stream(ours).server(Guid::generate()).p2p().build_message_stream();
        let client_end = Builder::unix_stream(theirs).p2p().build_message_stream();
        let (server_end, client_end) = tokio::join!(server_end, client_end);
        let serving = server.serve_peer(server_end.expect("served"), 1000);
        let client = Client { stream: client_end.expect("connected"), signals: VecDeque::new() };
        House { client, notary, _serving: serving, _server: server, service }
    }

    /// virtd ends in order; the hosts go on.
    pub async fn close(self) {
        self.service.close().await;
    }

    /// What the authority was last asked.
    pub fn asked(&self) -> (Action, Subject) {
        self.notary.asked.lock().unwrap().last().cloned().expect("a question")
    }

    /// What the authority was last asked about without anybody being asked.
    pub fn considered(&self) -> (Action, Subject) {
        self.notary.considered.lock().unwrap().last().cloned().expect("a question")
    }
}

/// A call's error: name and message.
pub type Refusal = (String, String);

/// A client, and what it was told.
pub struct Client {
    stream: MessageStream,
    signals: VecDeque<Message>,
}

/// No options.
pub fn none() -> HashMap<&'static str, Variant<'static>> {
    HashMap::new()
}

impl Client {
    async fn next(&mut self) -> Message {
        let next = tokio::time::timeout(PATIENCE, self.stream.next()).await;
        next.expect("in time").expect("the connection stands").expect("a message")
    }

    /// Calls a member.
    pub async fn call<B>(&mut self, path: &str, member: &str, body: &B) -> Result<Message, Refusal>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        let (interface, method) = member.rsplit_once('.').expect("interface.method");
        let call = Message::method_call(path, method).interface(interface).build(body).expect("a message");
        Connection::from(&self.stream).send(&call).await.expect("sent");
        loop {
            let message = self.next().await;
            match message.message_type() {
                Type::Signal => self.signals.push_back(message),
                Type::Error => {
                    let name = message.header().error_name().map(ToString::to_string).unwrap_or_default();
                    return Err((name, message.body().deserialize::<String>().unwrap_or_default()));
                }
                _ => return Ok(message),
            }
        }
    }

    /// Calls a method of a domain without options.
    pub async fn run(&mut self, domain: &str, method: &str) -> Result<Message, Refusal> {
        let member = format!("org.virt.Domain.{method}");
        match method {
            "Suspend" | "Resume" | "Reset" => self.call(domain, &member, &()).await,
            _ => self.call(domain, &member, &(none(),)).await,
        }
    }

    /// The domain of that name.
    pub async fn named(&mut self, name: &str) -> String {
        let found = self.call("/org/virt", "org.virt.Manager.GetDomainByName", &(name,)).await.expect(name);
        found.body().deserialize::<OwnedObjectPath>().expect("a path").to_string()
    }

    /// A property.
    pub async fn property<T>(&mut self, path: &str, interface: &str, name: &str) -> T
    where
        T: TryFrom<OwnedVariant>,
        T::Error: std::fmt::Debug,
    {
        let reply = self.call(path, "org.freedesktop.DBus.Properties.Get", &(interface, name)).await.expect(name);
        reply.body().deserialize::<OwnedVariant>().expect("a variant").try_into().expect("the type")
    }

    /// `State` and `StateReason` of a domain.
    pub async fn state(&mut self, domain: &str) -> (String, String) {
        let state = self.property(domain, "org.virt.Domain", "State").await;
        (state, self.property(domain, "org.virt.Domain", "StateReason").await)
    }

    /// What `Can` says.
    pub async fn can(&mut self, domain: &str, method: &str) -> String {
        let told = self.call(domain, "org.virt.Domain.Can", &(method,)).await.expect(method);
        told.body().deserialize().expect("a word")
    }

    /// The names of the domains that fit.
    pub async fn names(&mut self, filter: HashMap<&'static str, Variant<'static>>) -> Vec<String> {
        let listed = self.call("/org/virt", "org.virt.Manager.ListDomains", &(filter,)).await.expect("a list");
        let listed: Vec<(OwnedObjectPath, String, String, String, bool)> =
            listed.body().deserialize().expect("a(osssb)");
        let mut names: Vec<String> = listed.into_iter().map(|(_, name, ..)| name).collect();
        names.sort();
        names
    }

    /// The lifecycle events told until now and not asked for yet, as `name: event detail`.
    pub fn events(&mut self) -> Vec<String> {
        self.signals.drain(..).filter_map(|signal| event(&signal)).collect()
    }

    /// All lifecycle events up to this one.
    pub async fn until(&mut self, last: &str) -> Vec<String> {
        let mut told = Vec::new();
        loop {
            while let Some(signal) = self.signals.pop_front() {
                told.extend(event(&signal));
                if told.last().is_some_and(|event| event == last) {
                    return told;
                }
            }
            let message = self.next().await;
            self.signals.push_back(message);
        }
    }

    /// Waits until a property has this value, which is told.
    pub async fn until_is(&mut self, path: &str, interface: &str, name: &str, value: &str) {
        while self.property::<String>(path, interface, name).await != value {
            let message = self.next().await;
            self.signals.push_back(message);
        }
    }
}

fn event(signal: &Message) -> Option<String> {
    if signal.header().member().is_none_or(|member| member != "DomainLifecycle") {
        return None;
    }
    let (_, _, name, event, detail): (OwnedObjectPath, String, String, String, String) =
        signal.body().deserialize().expect("ossss");
    Some(format!("{name}: {event} {detail}"))
}
