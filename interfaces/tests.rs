//! The whole of it over socket pairs, without a bus: a real service, the test driver, two peers.

use super::*;
use futures_util::StreamExt;
use std::collections::HashMap;
use virt_service::{Paths, Settings};
use zbus::connection::Builder;
use zbus::message::Type;
use zbus::{Guid, Message, OwnedObjectPath, Variant};

const WEB: &str = "<domain type='test'><name>web</name><memory unit='MiB'>64</memory>\
                   <os><type arch='x86_64'>hvm</type></os></domain>";

struct Nobody;

impl virt_service::Callers for Nobody {
    fn watch(&self, _: &str) -> CancellationToken {
        CancellationToken::new()
    }
}

struct House {
    server: Server,
    _service: Arc<Service>,
    _folder: tempfile::TempDir,
}

async fn house() -> House {
    let folder = tempfile::tempdir().unwrap();
    let below = |name: &str| folder.path().join(name);
    let paths = Paths { state: below("state"), runtime: below("runtime"), log: below("log") };
    let settings = Settings { paths, limits: virt_service::Limits::default() };
    let config = virt_drivers::DriverConfig::below(folder.path(), false);
    let secrets = config.secrets.clone();
    let networks = Arc::new(virt_drivers::network::HostNetworks::new(folder.path(), folder.path(), None));
    let (drivers, storage) = virt_drivers::with_storage(config);
    let host = virt_service::Host { secrets, storage, networks };
    let authority = Arc::new(session::OwnerOnly { uid: 1000 });
    let (service, events) = Service::open(settings, drivers, host, authority, Arc::new(Nobody)).await.unwrap();
    House { server: Server::new(&service, events).await.unwrap(), _service: service, _folder: folder }
}

/// A peer's end, with everything that comes in.
async fn peer(house: &House, uid: u32) -> (MessageStream, Serving) {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let server = Builder::unix_stream(ours).server(Guid::generate()).p2p().build_message_stream();
    let client = Builder::unix_stream(theirs).p2p().build_message_stream();
    let (server, client) = tokio::join!(server, client);
    (client.unwrap(), house.server.serve_peer(server.unwrap(), uid))
}

fn call<B: serde::Serialize + zbus::DynamicType>(path: &str, member: &str, body: &B) -> Message {
    let (interface, method) = member.rsplit_once('.').unwrap();
    Message::method_call(path, method).interface(interface).build(body).unwrap()
}

fn none() -> HashMap<&'static str, Variant<'static>> {
    HashMap::new()
}

/// Sends a call; the members of the signals before its answer, and the answer.
async fn ask(peer: &mut MessageStream, message: Message) -> (Vec<String>, Message) {
    Connection::from(&*peer).send(&message).await.unwrap();
    let mut signals = Vec::new();
    loop {
        let next = peer.next().await.unwrap().unwrap();
        match next.message_type() {
            Type::Signal => signals.push(next.header().member().unwrap().to_string()),
            _ => return (signals, next),
        }
    }
}

#[tokio::test]
async fn a_peer_is_served_as_a_bus_is() {
    let house = house().await;
    let (mut alice, _serving) = peer(&house, 1000).await;
    let (signals, reply) = ask(&mut alice, call("/org/virt", "org.virt.Manager.DefineDomain", &(WEB, none()))).await;
    assert_eq!(signals, ["InterfacesAdded", "Lifecycle", "DomainLifecycle"]);
    let web: OwnedObjectPath = reply.body().deserialize().unwrap();
    let (signals, _) = ask(&mut alice, call(web.as_str(), "org.virt.Domain.Start", &none())).await;
    assert!(signals.iter().any(|signal| signal == "Finished"), "{signals:?}");
    let get = call(web.as_str(), "org.freedesktop.DBus.Properties.Get", &("org.virt.Domain", "State"));
    let (_, reply) = ask(&mut alice, get).await;
    assert_eq!(reply.body().deserialize::<Variant<'_>>().unwrap(), Variant::from("running"));
}

#[tokio::test]
async fn every_peer_hears_and_each_has_its_own_rights() {
    let house = house().await;
    let (mut alice, _alices) = peer(&house, 1000).await;
    let (mut bob, mut bobs) = peer(&house, 1001).await;
    // An answer says that bob is being served, and so hears what comes.
    ask(&mut bob, call("/", "org.freedesktop.DBus.Peer.Ping", &())).await;
    let (_, reply) = ask(&mut alice, call("/org/virt", "org.virt.Manager.DefineDomain", &(WEB, none()))).await;
    let web: OwnedObjectPath = reply.body().deserialize().unwrap();
    let (signals, reply) = ask(&mut bob, call(web.as_str(), "org.virt.Domain.Start", &none())).await;
    assert_eq!(signals, ["InterfacesAdded", "Lifecycle", "DomainLifecycle"]);
    let name = reply.header().error_name().map(ToString::to_string);
    assert_eq!(name.as_deref(), Some("org.freedesktop.DBus.Error.AccessDenied"));
    let (_, reply) = ask(&mut bob, call("/org/virt", "org.virt.Manager.ListDomains", &none())).await;
    assert_eq!(reply.message_type(), Type::MethodReturn);
    drop(bob);
    assert_eq!(bobs.ended().await, End::Closed);
    let (signals, _) = ask(&mut alice, call(web.as_str(), "org.virt.Domain.Undefine", &none())).await;
    assert_eq!(signals.last().map(String::as_str), Some("InterfacesRemoved"));
}
