//! What a client sees of virtd's objects: introspection, refusals, and the order of signals and replies.

use crate::common::{Daemon, read_project_file};
use futures_util::StreamExt as _;
use std::collections::HashMap;
use zbus::message::Type;
use zbus::{Connection, Message, MessageStream, OwnedObjectPath, OwnedVariant, Variant};

const MANAGER: &str = "org.virt.Manager";
const DOMAIN: &str = "org.virt.Domain";
const WEB: &str = "<domain type='test'><name>web</name><memory unit='MiB'>64</memory>\
                   <os><type arch='x86_64'>hvm</type></os></domain>";

type Options<'a> = HashMap<&'a str, Variant<'a>>;

fn none() -> Options<'static> {
    Options::new()
}

async fn call<B>(client: &Connection, path: &str, interface: &str, member: &str, body: &B) -> zbus::Result<Message>
where
    B: serde::Serialize + zbus::DynamicType,
{
    client.call_method(Some("org.virt"), path, Some(interface), member, body).await
}

async fn define(client: &Connection) -> String {
    let reply = call(client, "/org/virt", MANAGER, "DefineDomain", &(WEB, none())).await.unwrap();
    reply.body().deserialize::<OwnedObjectPath>().unwrap().to_string()
}

/// Name and text of what was refused.
fn refusal(result: zbus::Result<Message>) -> (String, String) {
    use zbus::DBusError as _;
    match result.unwrap_err() {
        zbus::Error::MethodError(name, text, _) => (name.to_string(), text.unwrap_or_default()),
        zbus::Error::FDO(error) => (error.name().to_string(), error.description().unwrap_or_default().to_owned()),
        other => panic!("not an answer: {other}"),
    }
}

#[tokio::test]
async fn introspection_on_the_bus_is_what_is_installed() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = daemon.connect().await;
    let domain = define(&client).await;
    let started = call(&client, &domain, DOMAIN, "Start", &none()).await.unwrap();
    let job = started.body().deserialize::<OwnedObjectPath>().unwrap().to_string();
    for (path, interface) in [
        ("/org/virt", MANAGER),
        ("/org/virt", "org.virt.Manager.Secret"),
        (domain.as_str(), DOMAIN),
        (job.as_str(), "org.virt.Job"),
    ] {
        let reply = call(&client, path, "org.freedesktop.DBus.Introspectable", "Introspect", &()).await.unwrap();
        let answer: String = reply.body().deserialize().unwrap();
        let installed = read_project_file(&format!("data/interfaces/{interface}.xml"));
        let element = &installed[installed.find("  <interface").unwrap()..installed.find("</node>").unwrap()];
        assert!(answer.contains(element), "{path} does not say what {interface}.xml says");
    }
}

#[tokio::test]
async fn what_is_not_understood_is_named() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = daemon.connect().await;
    let domain = define(&client).await;
    let option = |key: &'static str, value: Variant<'static>| Options::from([(key, value)]);
    let wrong = [
        ("Start", option("pasued", Variant::from(true)), "pasued"),
        ("Start", option("paused", Variant::from("yes")), "paused"),
        ("Destroy", option("force", Variant::from(true)), "force"),
        ("Shutdown", option("mode", Variant::from("kindly")), "mode"),
        ("Shutdown", option("mode", Variant::from(1u32)), "mode"),
        ("Undefine", option("nvram", Variant::from(1u32)), "nvram"),
        ("GetXML", option("live", Variant::from(true)), "live"),
    ];
    for (member, options, key) in wrong {
        let (name, text) = refusal(call(&client, &domain, DOMAIN, member, &options).await);
        assert_eq!(name, "org.virt.Error.InvalidArgument", "{member}: {text}");
        assert!(text.contains(&format!("'{key}'")), "{text}");
    }
    for options in [option("state", Variant::from("asleep")), option("colour", Variant::from("red"))] {
        let (name, _) = refusal(call(&client, "/org/virt", MANAGER, "ListDomains", &options).await);
        assert_eq!(name, "org.virt.Error.InvalidArgument");
    }
}

#[tokio::test]
async fn lists_keep_what_matches() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = daemon.connect().await;
    let domain = define(&client).await;
    let list = async |options: Options<'static>| {
        let reply = call(&client, "/org/virt", MANAGER, "ListDomains", &options).await.unwrap();
        reply.body().deserialize::<Vec<(OwnedObjectPath, String, String, String, bool)>>().unwrap()
    };
    let all = list(none()).await;
    assert_eq!(all.len(), 1);
    assert_eq!((all[0].0.as_str(), all[0].1.as_str(), all[0].3.as_str(), all[0].4), (&*domain, "web", "shutoff", true));
    for (key, value, matches) in [
        ("active", Variant::from(false), true),
        ("active", Variant::from(true), false),
        ("persistent", Variant::from(true), true),
        ("state", Variant::from("shutoff"), true),
        ("state", Variant::from("running"), false),
        ("driver", Variant::from("test"), true),
        ("driver", Variant::from("qemu"), false),
    ] {
        assert_eq!(list(Options::from([(key, value)])).await.len(), usize::from(matches), "{key}");
    }
}

#[tokio::test]
async fn what_a_guest_would_notice_is_listed() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = daemon.connect().await;
    let card = |mac: &str, mtu: u32| {
        format!("<interface type='user'><mac address='{mac}'/><model type='virtio'/><mtu size='{mtu}'/></interface>")
    };
    let with = |devices: String| WEB.replace("</domain>", &format!("<devices>{devices}</devices></domain>"));
    let (one, two) = ("52:54:00:ab:1a:01", "52:54:00:AB:1A:02");
    let source = with(card(one, 1500) + &card(two, 1500));
    let compare = async |target: &str, options| {
        call(&client, "/org/virt", MANAGER, "CompareDomains", &(&*source, target, options)).await
    };
    type Answer = (bool, Vec<(String, String, String)>);

    let reply = compare(&with(card(two, 1500) + &card(one, 1500)), none()).await.unwrap();
    assert_eq!(reply.body().deserialize::<Answer>().unwrap(), (true, vec![]));

    let target = with(card(two, 1500) + &card(one, 9000)).replace("64<", "128<").replace("web", "www");
    let (same, differences) = compare(&target, none()).await.unwrap().body().deserialize::<Answer>().unwrap();
    let expected = [
        ("/name", "web", "www"),
        ("/memory", "65536 KiB", "131072 KiB"),
        ("/devices/interface[mac=52:54:00:ab:1a:01]/mtu/size", "1500", "9000"),
    ];
    assert!(!same);
    assert_eq!(differences.iter().map(|(p, s, t)| (&**p, &**s, &**t)).collect::<Vec<_>>(), expected);

    let (name, text) = refusal(compare("<domain type='test'><nonsense/></domain>", none()).await);
    assert_eq!(name, "org.virt.Error.ConfigInvalid");
    assert!(text.contains("in the target document: "), "{text}");
    let options = Options::from([("strict", Variant::from(true))]);
    let (name, text) = refusal(compare(&source, options).await);
    assert!(name == "org.virt.Error.InvalidArgument" && text.contains("'strict'"), "{name}: {text}");
}

/// Everything that comes in on a connection, in order.
struct Tape {
    client: Connection,
    stream: MessageStream,
}

impl Tape {
    async fn of(daemon: &Daemon) -> Tape {
        let client = daemon.connect().await;
        let stream = MessageStream::from(&client);
        let rule = "type='signal',sender='org.virt'";
        let bus = "org.freedesktop.DBus";
        client.call_method(Some(bus), "/org/freedesktop/DBus", Some(bus), "AddMatch", &rule).await.unwrap();
        Tape { client, stream }
    }

    /// Calls, and gives the signals that came before the reply, in short, and the reply.
    async fn signals_before_reply<B>(&mut self, path: &str, member: &str, body: &B) -> (Vec<String>, Message)
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        let interface = if path == "/org/virt" { MANAGER } else { DOMAIN };
        let call = Message::method_call(path, member).destination("org.virt").interface(interface).build(body).unwrap();
        let serial = call.primary_header().serial_num();
        self.client.send(&call).await.unwrap();
        let mut signals = Vec::new();
        loop {
            let message = self.stream.next().await.unwrap().unwrap();
            match message.message_type() {
                Type::Signal => signals.extend(short(&message)),
                _ if message.header().reply_serial() == Some(serial) => return (signals, message),
                _ => {}
            }
        }
    }
}

/// A signal of virtd in a few words.
fn short(signal: &Message) -> Option<String> {
    let header = signal.header();
    let member = header.member()?.to_string();
    let path = header.path()?.to_string();
    let whose = if path.starts_with("/org/virt/job") { "job" } else { "domain" };
    let body = signal.body();
    Some(match member.as_str() {
        "InterfacesAdded" | "InterfacesRemoved" => {
            type Added = HashMap<String, HashMap<String, OwnedVariant>>;
            let added = body.deserialize::<(OwnedObjectPath, Added)>().map(|(path, _)| path);
            let removed = body.deserialize::<(OwnedObjectPath, Vec<String>)>().map(|(path, _)| path);
            let job = added.or(removed).ok()?.as_str().starts_with("/org/virt/job");
            let what = if job { "job" } else { "domain" };
            format!("{what} {}", if member == "InterfacesAdded" { "comes" } else { "goes" })
        }
        "PropertiesChanged" => {
            let (_, values, _): (String, HashMap<String, OwnedVariant>, Vec<String>) = body.deserialize().ok()?;
            let state = values.get("State").and_then(|state| state.downcast_ref::<&str>().ok()).unwrap_or("");
            format!("{whose} changes {state}").trim().to_owned()
        }
        "Lifecycle" => {
            let (event, detail): (String, String) = body.deserialize().ok()?;
            format!("{event} {detail}")
        }
        "DomainLifecycle" => {
            let (_, _, _, event, detail): (OwnedObjectPath, String, String, String, String) =
                body.deserialize().ok()?;
            format!("all: {event} {detail}")
        }
        "Finished" => "job ends".to_owned(),
        _ => return None,
    })
}

fn of_domain(signals: &[String]) -> Vec<&str> {
    signals.iter().map(String::as_str).filter(|signal| !signal.starts_with("job")).collect()
}

#[tokio::test]
async fn signals_come_in_order_and_before_the_reply_that_they_belong_to() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let mut tape = Tape::of(&daemon).await;
    let (signals, reply) = tape.signals_before_reply("/org/virt", "DefineDomain", &(WEB, none())).await;
    assert_eq!(signals, ["domain comes", "defined added", "all: defined added"]);
    let web = reply.body().deserialize::<OwnedObjectPath>().unwrap().to_string();

    let paused = Options::from([("paused", Variant::from(true))]);
    let (signals, _) = tape.signals_before_reply(&web, "Start", &paused).await;
    let started =
        ["domain changes paused", "started booted", "all: started booted", "suspended paused", "all: suspended paused"];
    assert_eq!(of_domain(&signals), started);
    assert_eq!(signals.first().unwrap(), "job comes");
    assert_eq!(signals[signals.len() - 2..], ["job changes succeeded", "job ends"]);

    let (signals, _) = tape.signals_before_reply(&web, "Resume", &()).await;
    assert_eq!(signals, ["domain changes running", "resumed unpaused", "all: resumed unpaused"]);
    let (signals, _) = tape.signals_before_reply(&web, "Suspend", &()).await;
    assert_eq!(signals, ["domain changes paused", "suspended paused", "all: suspended paused"]);
    let (signals, reply) = tape.signals_before_reply(&web, "Suspend", &()).await;
    assert_eq!((signals.len(), reply.message_type()), (0, Type::Error));
    let (signals, _) = tape.signals_before_reply(&web, "Destroy", &none()).await;
    assert_eq!(signals, ["domain changes shutoff", "stopped destroyed", "all: stopped destroyed"]);
    let (signals, _) = tape.signals_before_reply(&web, "Undefine", &none()).await;
    assert_eq!(signals.last().unwrap(), "domain goes");
    assert!(
        of_domain(&signals).ends_with(&["undefined removed", "all: undefined removed", "domain goes"]),
        "{signals:?}"
    );
}

#[tokio::test]
async fn a_property_is_set_and_told_with_its_value() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let mut tape = Tape::of(&daemon).await;
    let client = daemon.connect().await;
    let web = define(&client).await;
    let value = (DOMAIN, "Autostart", Variant::from(true));
    call(&client, &web, "org.freedesktop.DBus.Properties", "Set", &value).await.unwrap();
    let reply = call(&client, &web, "org.freedesktop.DBus.Properties", "Get", &(DOMAIN, "Autostart")).await.unwrap();
    assert_eq!(*reply.body().deserialize::<OwnedVariant>().unwrap(), Variant::from(true));
    loop {
        let message = tape.stream.next().await.unwrap().unwrap();
        let body = message.body();
        if let Ok((_, values, _)) = body.deserialize::<(String, HashMap<String, OwnedVariant>, Vec<String>)>() {
            assert_eq!(values.len(), 1);
            assert_eq!(*values["Autostart"], Variant::from(true));
            break;
        }
    }
    let wrong = (DOMAIN, "Autostart", Variant::from("yes"));
    let (name, _) = refusal(call(&client, &web, "org.freedesktop.DBus.Properties", "Set", &wrong).await);
    assert_eq!(name, "org.freedesktop.DBus.Error.InvalidArgs");
}
