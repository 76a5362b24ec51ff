//! The way in, over a socket pair, with handlers of our own.

use super::*;
use crate::bus::rows::{Facts, Object};
use crate::bus::wire::{Row, Value};
use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use tokio::sync::Notify;
use tokio::sync::Semaphore;
use zbus::connection::Builder;
use zbus::fdo::{ObjectManagerProxy, PropertiesProxy};
use zbus::names::InterfaceName;
use zbus::{Guid, ObjectPath, OwnedVariant, Variant};

const MANAGER: &str = "org.virt.Manager";
const DOMAIN: &str = "org.virt.Domain";

/// Both ends of a served connection.
struct Pair {
    client: Connection,
    rows: Arc<Rows>,
    bus: Arc<Bus>,
}

async fn pair<F>(limits: Limits, run: impl Fn(Call) -> F + Clone + Send + Sync + 'static) -> Pair
where
    F: Future<Output = Outcome> + Send + 'static,
{
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let guid = Guid::generate();
    let server = Builder::unix_stream(ours).server(guid).p2p().build_message_stream();
    let (stream, client) = tokio::join!(server, Builder::unix_stream(theirs).p2p().build());
    let rows = Arc::new(Rows::default());
    rows.write(|objects| objects.put(object("/org/virt", MANAGER, "0.1")));
    let table = Arc::new(Table::run_by(run));
    let bus = Bus::new(table, rows.clone(), Ways::default(), Who::Peer(1000), limits);
    tokio::spawn(bus.clone().run(stream.unwrap()));
    Pair { client: client.unwrap(), rows, bus }
}

fn object(path: &str, interface: &'static str, version: &str) -> Object {
    let values = [Value::Str(version), Value::Strs(&["test"])];
    let row = Row::new(&[("Version", "s"), ("Drivers", "as")], &values);
    Object::new(path, interface, row)
}

fn domains(rows: &Rows, count: usize) {
    rows.write(|objects| {
        for number in 0..count {
            objects.put(object(&format!("/org/virt/domain/_{number:032}"), DOMAIN, "x"));
        }
    });
}

async fn done(call: Call) -> Outcome {
    call.done()
}

impl Pair {
    async fn call<B>(&self, path: &str, interface: Option<&str>, member: &str, body: &B) -> zbus::Result<Message>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        self.client.call_method(None::<&str>, path, interface, member, body).await
    }

    async fn refusal<B>(&self, path: &str, interface: Option<&str>, member: &str, body: &B) -> String
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        refused(self.call(path, interface, member, body).await)
    }

    async fn introspect(&self, path: &str) -> String {
        let reply = self.call(path, Some("org.freedesktop.DBus.Introspectable"), "Introspect", &()).await.unwrap();
        reply.body().deserialize().unwrap()
    }
}

fn refused(result: zbus::Result<Message>) -> String {
    use zbus::DBusError;
    match result.unwrap_err() {
        zbus::Error::MethodError(name, ..) => name.to_string(),
        zbus::Error::FDO(error) => error.name().to_string(),
        other => panic!("not an answer: {other}"),
    }
}

#[tokio::test]
async fn what_does_not_exist_has_its_standard_error() {
    let pair = pair(Limits::default(), done).await;
    let none = HashMap::<&str, Variant<'_>>::new();
    let standard = |name: &str| format!("org.freedesktop.DBus.Error.{name}");
    let properties = Some("org.freedesktop.DBus.Properties");
    let listing = Some(MANAGER);
    assert_eq!(pair.refusal("/nowhere", listing, "ListDomains", &none).await, standard("UnknownObject"));
    assert_eq!(pair.refusal("/org/virt", Some("a.b"), "ListDomains", &none).await, standard("UnknownInterface"));
    assert_eq!(pair.refusal("/org/virt", Some(DOMAIN), "Suspend", &()).await, standard("UnknownInterface"));
    assert_eq!(pair.refusal("/org/virt", listing, "Nothing", &none).await, standard("UnknownMethod"));
    assert_eq!(pair.refusal("/org/virt", None, "ListDomains", &none).await, standard("UnknownMethod"));
    assert_eq!(pair.refusal("/org/virt", listing, "ListDomains", &7u32).await, standard("InvalidArgs"));
    assert_eq!(pair.refusal("/org/virt", listing, "ListDomains", &()).await, standard("InvalidArgs"));
    assert_eq!(pair.refusal("/org", properties, "GetAll", &MANAGER).await, standard("UnknownInterface"));
    assert_eq!(pair.refusal("/org/virt", properties, "GetAll", &DOMAIN).await, standard("UnknownInterface"));
    assert_eq!(pair.refusal("/org/virt", properties, "Get", &(MANAGER, "None")).await, standard("UnknownProperty"));
    let set = |name: &'static str, value: u32| (MANAGER, name, Variant::from(value));
    assert_eq!(pair.refusal("/org/virt", properties, "Set", &set("Version", 1)).await, standard("PropertyReadOnly"));
    assert_eq!(pair.refusal("/org/virt", properties, "Set", &set("None", 1)).await, standard("UnknownProperty"));
    pair.call("/org/virt", listing, "ListDomains", &none).await.unwrap();
    pair.call("/nowhere", Some("org.freedesktop.DBus.Peer"), "Ping", &()).await.unwrap();
}

#[tokio::test]
async fn properties_and_objects_are_read_from_rows() {
    let pair = pair(Limits::default(), done).await;
    domains(&pair.rows, 3);
    let properties = PropertiesProxy::new(&pair.client, "org.virt", "/org/virt").await.unwrap();
    let manager = InterfaceName::try_from(MANAGER).unwrap();
    assert_eq!(*properties.get(manager.clone(), "Version").await.unwrap(), Variant::from("0.1"));
    assert_eq!(properties.get_all(manager).await.unwrap().len(), 2);
    let objects = ObjectManagerProxy::new(&pair.client, "org.virt", "/org/virt").await.unwrap();
    let managed = objects.get_managed_objects().await.unwrap();
    assert_eq!(managed.len(), 3);
    let path = ObjectPath::try_from(format!("/org/virt/domain/_{:032}", 1)).unwrap();
    let one = &managed[&zbus::OwnedObjectPath::from(path)];
    assert_eq!(*one[DOMAIN]["Version"], Variant::from("x"));
}

#[tokio::test]
async fn introspection_is_the_file_and_one_level_deep() {
    let pair = pair(Limits::default(), done).await;
    domains(&pair.rows, 10_000);
    for path in ["/", "/org"] {
        let xml = pair.introspect(path).await;
        assert!(xml.len() < 4096 && xml.matches("<node name=").count() == 1, "{xml}");
    }
    let root = pair.introspect("/org/virt").await;
    assert!(root.contains(
        &table::FILES[0][table::FILES[0].find("  <interface").unwrap()..table::FILES[0].find("\n</node>").unwrap()]
    ));
    assert!(root.contains("ObjectManager") && root.contains("<node name=\"domain\"/>"));
    let folder = pair.introspect("/org/virt/domain").await;
    assert_eq!(folder.matches("<node name=").count(), 10_000);
    assert!(folder.len() < 700_000);
    let domain = pair.introspect(&format!("/org/virt/domain/_{:032}", 7)).await;
    assert!(domain.contains(DOMAIN) && !domain.contains("ObjectManager") && !domain.contains("<node name"));
    for xml in [root, folder, domain] {
        zbus_xml::Node::try_from(xml.as_str()).unwrap();
    }
}

#[tokio::test]
async fn a_callers_share_is_bounded_with_and_without_replies() {
    let (open, running, ran) =
        (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counted = (open.clone(), running.clone(), ran.clone());
    let pair = pair(Limits::default(), move |call: Call| {
        let (open, running, ran) = counted.clone();
        async move {
            running.fetch_add(1, SeqCst);
            open.acquire().await.unwrap().forget();
            running.fetch_sub(1, SeqCst);
            ran.fetch_add(1, SeqCst);
            call.done()
        }
    })
    .await;
    for _ in 0..300 {
        pair.client.send(&silent()).await.unwrap();
    }
    let (answers, mut answered) = tokio::sync::mpsc::unbounded_channel();
    for _ in 0..400 {
        let (client, answers) = (pair.client.clone(), answers.clone());
        tokio::spawn(async move {
            answers.send(client.call_method(None::<&str>, "/org/virt", Some(MANAGER), "GetJobs", &()).await)
        });
    }
    // 64 run and 512 wait; nobody gets through before the door opens.
    for _ in 0..700 - 64 - 512 {
        assert_eq!(refused(answered.recv().await.unwrap()), "org.freedesktop.DBus.Error.LimitsExceeded");
    }
    assert_eq!(running.load(SeqCst), 64);
    open.add_permits(1000);
    for _ in 0..64 + 512 - 300 {
        answered.recv().await.unwrap().unwrap();
    }
    assert_eq!(ran.load(SeqCst), 64 + 512);
}

/// A call that wants no reply.
fn silent() -> Message {
    let call = Message::method_call("/org/virt", "GetJobs").interface(MANAGER);
    call.with_flags(Flags::NO_REPLY_EXPECTED).build(&()).unwrap()
}

#[tokio::test]
async fn reads_go_on_while_a_caller_has_used_up_its_share() {
    let pair = pair(Limits { running: 1, waiting: 1, ..Limits::default() }, |_| std::future::pending()).await;
    for _ in 0..5 {
        pair.client.send(&silent()).await.unwrap();
    }
    let limits = pair.refusal("/org/virt", Some(MANAGER), "GetJobs", &()).await;
    assert_eq!(limits, "org.freedesktop.DBus.Error.LimitsExceeded");
    pair.call("/org/virt", Some("org.freedesktop.DBus.Properties"), "GetAll", &MANAGER).await.unwrap();
}

#[tokio::test]
async fn who_leaves_is_noticed_by_what_it_left_running() {
    let (begun, left) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let signs = (begun.clone(), left.clone());
    let pair = pair(Limits::default(), move |call: Call| {
        let (begun, left) = signs.clone();
        async move {
            begun.notify_one();
            call.caller().departed.cancelled().await;
            left.notify_one();
            call.done()
        }
    })
    .await;
    pair.client.send(&silent()).await.unwrap();
    begun.notified().await;
    pair.client.close().await.unwrap();
    left.notified().await;
}

#[tokio::test]
async fn a_bug_ends_one_call_and_no_more() {
    let pair = pair(Limits { running: 1, ..Limits::default() }, |call: Call| async move {
        assert!(call.path().is_empty(), "a bug");
        call.done()
    })
    .await;
    for _ in 0..3 {
        let internal = pair.refusal("/org/virt", Some(MANAGER), "GetJobs", &()).await;
        assert_eq!(internal, "org.virt.Error.Internal");
    }
}

#[tokio::test]
async fn an_answer_beyond_the_limit_is_refused() {
    let pair = pair(Limits::default(), |call: Call| async move { call.reply(&"x".repeat(answers::LARGEST)) }).await;
    let limits = pair.refusal("/org/virt", Some(MANAGER), "GetJobs", &()).await;
    assert_eq!(limits, "org.freedesktop.DBus.Error.LimitsExceeded");
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_not_read_from() {
    let pair = pair(Limits::default(), done).await;
    let big = object("/org/virt/domain/_big", DOMAIN, &"x".repeat(100_000));
    pair.rows.write(|objects| objects.put(big));
    // Bytes written to the socket by hand: zbus would read the answers.
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let ours = ours.into_std().unwrap();
    let server = Builder::unix_stream(ours).server(Guid::generate()).p2p().build_message_stream();
    let shaking = tokio::spawn(async move { shake_hands(theirs).await });
    let stream = server.await.unwrap();
    let mut theirs = shaking.await.unwrap();
    let outbox = Arc::new(Outbox::default());
    let ways = Ways { outbox: outbox.clone(), ..Ways::default() };
    let bus = Bus::new(pair.bus.table.clone(), pair.rows.clone(), ways, Who::Peer(1000), Limits::default());
    tokio::spawn(bus.run(stream));
    let call = Message::method_call("/org/virt/domain/_big", "GetAll")
        .interface("org.freedesktop.DBus.Properties")
        .build(&DOMAIN)
        .unwrap();
    let mut sent = 0;
    while write_or_full(&mut theirs, call.data()).await {
        sent += 1;
        assert!(sent < 100_000, "somebody reads all this");
    }
    assert!(outbox.bytes() < 12 << 20, "{} bytes are kept", outbox.bytes());
}

/// The client's half of the handshake, byte by byte.
pub async fn shake_hands(mut socket: tokio::net::UnixStream) -> tokio::net::UnixStream {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let uid: String = nix::unistd::geteuid().to_string().bytes().map(|digit| format!("{digit:02x}")).collect();
    socket.write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes()).await.unwrap();
    let mut answer = [0; 512];
    let _ = socket.read(&mut answer).await.unwrap();
    socket.write_all(b"BEGIN\r\n").await.unwrap();
    socket
}

/// Writes, unless the other end has not taken anything for a second.
async fn write_or_full(socket: &mut tokio::net::UnixStream, bytes: &[u8]) -> bool {
    use tokio::io::AsyncWriteExt;
    tokio::time::timeout(Duration::from_secs(1), socket.write_all(bytes)).await.is_ok()
}

#[tokio::test]
async fn a_property_is_set_by_its_setter_alone() {
    let pair = pair(Limits::default(), done).await;
    domains(&pair.rows, 1);
    let path = format!("/org/virt/domain/_{:032}", 0);
    let value: (&str, &str, OwnedVariant) = (DOMAIN, "Autostart", Variant::from(1u32).try_into_owned().unwrap());
    let wrong = pair.refusal(&path, Some("org.freedesktop.DBus.Properties"), "Set", &value).await;
    assert_eq!(wrong, "org.freedesktop.DBus.Error.PropertyReadOnly");
}

#[tokio::test]
async fn file_descriptors_are_not_kept() {
    let pair = pair(Limits::default(), done).await;
    domains(&pair.rows, 1);
    let mut replies = MessageStream::from(&pair.client);
    let path = format!("/org/virt/domain/_{:032}", 0);
    let call = Message::method_call(path, "Start").interface(DOMAIN).endian(zbus::wire::Endian::Little);
    let file = std::os::fd::OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    // SAFETY: eight zeroes are an empty dictionary, and nothing in it names the descriptor.
    let call = unsafe { call.build_raw_body(&[0; 8], "a{sv}", vec![file.into()]) }.unwrap();
    pair.client.send(&call).await.unwrap();
    let reply = replies.next().await.unwrap().unwrap();
    let name = reply.header().error_name().map(ToString::to_string);
    assert_eq!(name.as_deref(), Some("org.freedesktop.DBus.Error.InvalidArgs"));
}

/// Options that give a file, or several.
fn gives<T: Into<Variant<'static>>>(key: &str, file: T) -> HashMap<&str, Variant<'static>> {
    HashMap::from([(key, file.into())])
}

#[tokio::test]
async fn files_come_to_the_method_that_takes_them_and_are_closed_behind_it() {
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let ways = Ways::default();
    let socket = socket::Measured::new(ours, ways.intake.clone(), None);
    let server = Builder::socket(socket).server(Guid::generate()).p2p().build_message_stream();
    let client = Builder::unix_stream(theirs.into_std().unwrap()).p2p().build();
    let (stream, client) = tokio::join!(server, client);
    let write = |call: Call| async move {
        let mut options = call.options()?;
        let (one, more) = (call.file(&mut options, "fd")?, call.files(&mut options, "fds")?);
        options.end()?;
        for (number, file) in one.into_iter().chain(more).enumerate() {
            let mut file = std::fs::File::from(std::os::fd::AsFd::as_fd(&file).try_clone_to_owned().unwrap());
            std::io::Write::write_all(&mut file, &[b'0' + number as u8]).unwrap();
        }
        call.done()
    };
    let mut table = Table::run_by(write);
    table.let_take_files(DOMAIN, "Start");
    let rows = Arc::new(Rows::default());
    domains(&rows, 1);
    let bus = Bus::new(Arc::new(table), rows.clone(), ways, Who::Peer(1000), Limits::default());
    tokio::spawn(bus.clone().run(stream.unwrap()));
    let pair = Pair { client: client.unwrap(), rows, bus };
    let path = format!("/org/virt/domain/_{:032}", 0);
    let pipe =
        || std::io::pipe().map(|(ear, mouth)| (ear, zbus::wire::OwnedFd::from(std::os::fd::OwnedFd::from(mouth))));

    let (ear, mouth) = pipe().unwrap();
    pair.call(&path, Some(DOMAIN), "Start", &gives("fd", zbus::wire::Fd::from(mouth))).await.unwrap();
    assert_eq!(std::io::read_to_string(ear).unwrap(), "0");
    let (ears, mouths): (Vec<_>, Vec<_>) = (0..3).map(|_| pipe().unwrap()).unzip();
    let mouths: Vec<_> = mouths.into_iter().map(zbus::wire::Fd::from).collect();
    pair.call(&path, Some(DOMAIN), "Start", &gives("fds", mouths)).await.unwrap();
    let heard: Vec<_> = ears.into_iter().map(|ear| std::io::read_to_string(ear).unwrap()).collect();
    assert_eq!(heard, ["0", "1", "2"]);

    // Another type, an unknown key, and a method that takes none: each is closed all the same.
    for (member, options, refusal) in [
        ("Start", "fds", "org.virt.Error.InvalidArgument"),
        ("Start", "none", "org.virt.Error.InvalidArgument"),
        ("Shutdown", "fd", "org.freedesktop.DBus.Error.InvalidArgs"),
    ] {
        let (ear, mouth) = pipe().unwrap();
        let options = gives(options, zbus::wire::Fd::from(mouth));
        let why = pair.refusal(&path, Some(DOMAIN), member, &options).await;
        assert_eq!(why, refusal, "{member}");
        drop(options);
        assert_eq!(std::io::read_to_string(ear).unwrap(), "");
    }
}
