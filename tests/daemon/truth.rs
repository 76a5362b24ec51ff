//! A client that reads once and listens is never wrong: many callers do odd things to a few names at once, and whoever
//! only applies signals holds the same tree as the service at every moment at which it asks.

use crate::common::Daemon;
use crate::common::client::{Client, Domain, Refusal, options};
use futures_util::StreamExt as _;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use zbus::message::Type;
use zbus::{Connection, Message, MessageStream, OwnedObjectPath, OwnedVariant, Variant};

type Properties = HashMap<String, OwnedVariant>;
type Interfaces = HashMap<String, Properties>;
type Tree = HashMap<OwnedObjectPath, Interfaces>;
type Shown = BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>;

/// Numbers without rhyme, the same in each run of a test.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }

    fn coin(&mut self) -> bool {
        self.roll(2) == 0
    }
}

/// What a client that applies signals believes.
#[derive(Default)]
struct Belief {
    objects: Shown,
    /// Domains with a guest, by what `Lifecycle` told.
    lives: BTreeSet<String>,
}

impl Belief {
    fn apply(&mut self, signal: &Message) {
        let header = signal.header();
        let (Some(member), Some(path)) = (header.member(), header.path()) else { return };
        if path.as_str().starts_with("/org/virt/nodedev") {
            // They have an ObjectManager of their own, and are the host's: other tests make network devices.
            return;
        }
        match member.as_str() {
            "InterfacesAdded" => {
                let (path, interfaces): (OwnedObjectPath, Interfaces) =
                    signal.body().deserialize().expect("oa{sa{sv}}");
                let before = self.objects.insert(path.to_string(), shown(interfaces));
                assert!(before.is_none(), "{path} was added twice");
            }
            "InterfacesRemoved" => {
                let (path, _): (OwnedObjectPath, Vec<String>) = signal.body().deserialize().expect("oas");
                assert!(self.objects.remove(path.as_str()).is_some(), "{path} was removed and not there");
            }
            "PropertiesChanged" => {
                let (interface, changed, invalidated): (String, Properties, Vec<String>) =
                    signal.body().deserialize().expect("sa{sv}as");
                assert!(invalidated.is_empty(), "values are sent along");
                let object = self.objects.get_mut(path.as_str());
                let known = object.and_then(|object| object.get_mut(&interface));
                let known = known.unwrap_or_else(|| panic!("{path} changed and is not there"));
                for (name, value) in changed {
                    let before = known.insert(name.clone(), format!("{value:?}"));
                    assert_ne!(before.as_ref(), known.get(&name), "{name} of {path} did not change");
                }
            }
            "Lifecycle" => {
                let (event, detail): (String, String) = signal.body().deserialize().expect("ss");
                self.lifecycle(path.as_str(), &event, &detail);
            }
            _ => {}
        }
    }

    /// Events come in an order that makes sense, and agree with what was shown before them.
    fn lifecycle(&mut self, path: &str, event: &str, detail: &str) {
        let sound = match (event, detail) {
            ("started", "booted") => self.lives.insert(path.to_owned()),
            ("stopped", _) => self.lives.remove(path),
            ("suspended" | "resumed" | "shutdown", _) => self.lives.contains(path),
            ("defined", "added") => self.shows(path, "Persistent", "true"),
            _ => true,
        };
        assert!(sound, "{path}: {event} {detail} at the wrong time");
    }

    fn shows(&self, path: &str, property: &str, value: &str) -> bool {
        let domain = self.objects.get(path).and_then(|object| object.get("org.virt.Domain"));
        domain.and_then(|domain| domain.get(property)).is_some_and(|shown| shown.contains(value))
    }
}

fn shown(interfaces: Interfaces) -> BTreeMap<String, BTreeMap<String, String>> {
    let text = |properties: Properties| properties.into_iter().map(|(k, v)| (k, format!("{v:?}"))).collect();
    interfaces.into_iter().map(|(name, properties)| (name, text(properties))).collect()
}

/// The listener: everything virtd sends to one connection, in order.
struct Listener {
    connection: Connection,
    stream: MessageStream,
    belief: Belief,
}

impl Listener {
    async fn new(daemon: &Daemon) -> Listener {
        let connection = daemon.connect().await;
        let rule = zbus::MatchRule::builder().sender("org.virt").build().expect("a rule");
        let most = std::num::NonZeroUsize::new(100_000).expect("not 0");
        let stream = MessageStream::for_match_rule(rule, &connection, Some(most)).await.expect("a match");
        let mut listener = Listener { connection, stream, belief: Belief::default() };
        let tree = listener.ask().await;
        listener.belief.objects = tree;
        listener
    }

    /// Asks for the tree; applies what came before the answer.
    async fn ask(&mut self) -> Shown {
        let call = Message::method_call("/org/virt", "GetManagedObjects").destination("org.virt");
        let call = call.interface("org.freedesktop.DBus.ObjectManager").build(&()).expect("a call");
        self.connection.send(&call).await.expect("sent");
        let serial = call.primary_header().serial_num();
        loop {
            let next = tokio::time::timeout(crate::common::PATIENCE, self.stream.next()).await;
            let message = next.expect("in time").expect("open").expect("sound");
            match message.message_type() {
                Type::Signal => self.belief.apply(&message),
                Type::MethodReturn if message.header().reply_serial() == Some(serial) => {
                    let tree: Tree = message.body().deserialize().expect("a tree");
                    return tree.into_iter().map(|(path, object)| (path.to_string(), shown(object))).collect();
                }
                _ => {}
            }
        }
    }

    async fn compare(&mut self) {
        let truth = self.ask().await;
        let belief = &self.belief.objects;
        for path in truth.keys().chain(belief.keys()) {
            assert_eq!(belief.get(path), truth.get(path), "{path}: left what signals told, right what is");
        }
        for path in &self.belief.lives {
            assert!(self.belief.shows(path, "Active", "true"), "{path} was started and is not active");
        }
    }
}

/// A document; sometimes with a name and a uuid that do not belong together.
fn document(dice: &mut Dice, names: u64) -> String {
    let name = dice.roll(names);
    let uuid = if dice.roll(8) == 0 { dice.roll(names + 1) } else { name };
    let title = dice.roll(3);
    format!(
        "<domain type='test'><name>n{name}</name><uuid>00000000-0000-4000-8000-00000000000{uuid}</uuid>\
         <title>t{title}</title><memory>65536</memory><os><type>hvm</type></os></domain>"
    )
}

/// One deed of one caller; what came of it matters only where it could not have been.
async fn deed(client: &Client, dice: &mut Dice, names: u64) -> Result<(), Refusal> {
    let domain = Domain {
        client: client.clone(),
        path: format!("/org/virt/domain/_00000000_0000_4000_8000_00000000000{}", dice.roll(names)),
    };
    let start = [("paused", dice.coin()), ("no-wait", dice.coin()), ("autodestroy", dice.roll(4) == 0)];
    let start = || options(start.map(|(key, value)| (key, Variant::from(value))));
    let for_which = ["live", "config"].get(dice.roll(3) as usize).map(|key| (*key, Variant::from(true)));
    match dice.roll(17) {
        0..=2 => client.define(&document(dice, names)).await.map(drop)?,
        3 | 4 => {
            let body = (document(dice, names), start());
            client.call("/org/virt", "org.virt.Manager.CreateDomain", &body).await.map(drop)?;
        }
        5 | 6 => domain.call("Start", &(start(),)).await.map(drop)?,
        7 | 8 => domain.run("Destroy").await.map(drop)?,
        9 => domain.run("Shutdown").await.map(drop)?,
        10 => domain.bare("Suspend").await.map(drop)?,
        11 => domain.bare("Resume").await.map(drop)?,
        12 => domain.run("Undefine").await.map(drop)?,
        13 => domain.call("Rename", &(format!("n{}", dice.roll(names + 1)), options([]))).await.map(drop)?,
        14 => domain.call("SetTitle", &(format!("T{}", dice.roll(9)), options(for_which))).await.map(drop)?,
        15 => {
            let body = ("org.virt.Domain", "Autostart", Variant::from(dice.coin()));
            client.call(&domain.path, "org.freedesktop.DBus.Properties.Set", &body).await.map(drop)?;
        }
        _ => {
            let jobs = client.call("/org/virt", "org.virt.Manager.GetJobs", &()).await?;
            let jobs: Vec<OwnedObjectPath> = jobs.body().deserialize().expect("ao");
            let Some(last) = jobs.last() else { return Ok(()) };
            client.call(last.as_str(), "org.virt.Job.Cancel", &()).await.map(drop)?;
        }
    }
    Ok(())
}

/// Does odd things; now and then leaves the bus, and comes back as somebody else.
async fn caller(address: String, seed: u64, Crowd { deeds, names, .. }: Crowd) {
    let connect = || async {
        let builder = zbus::connection::Builder::address(address.as_str());
        Client { connection: builder.build().await.expect("a connection") }
    };
    let (mut client, mut dice) = (connect().await, Dice(0x9e37_79b9_7f4a_7c15 ^ (seed + 1)));
    for _ in 0..deeds {
        if let Err((name, text)) = deed(&client, &mut dice, names).await {
            let plain = ["NoSuchDomain", "DomainExists", "OperationInvalid", "Busy", "Cancelled", "InvalidArgument"];
            let known = plain.iter().any(|plain| name == format!("org.virt.Error.{plain}"));
            assert!(known || name == "org.freedesktop.DBus.Error.UnknownObject", "{name}: {text}");
        }
        if dice.roll(20) == 0 {
            client = connect().await;
        }
    }
}

/// The domains of the tree, by path: name, and whether it is stored.
fn inventory(tree: &Shown) -> BTreeMap<String, (String, bool)> {
    let domains = tree.iter().filter_map(|(path, object)| Some((path, object.get("org.virt.Domain")?)));
    domains.map(|(path, d)| (path.clone(), (d["Name"].clone(), d["Persistent"].contains("true")))).collect()
}

/// How many callers do how many things each, to how many domains.
#[derive(Clone, Copy)]
struct Crowd {
    callers: u64,
    deeds: usize,
    names: u64,
}

#[tokio::test(flavor = "multi_thread")]
async fn who_only_listens_is_never_wrong() {
    among(Crowd { callers: 5, deeds: 200, names: 4 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn not_even_where_all_push_for_one_name() {
    among(Crowd { callers: 10, deeds: 300, names: 1 }).await;
}

async fn among(crowd: Crowd) {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let mut listener = Listener::new(&daemon).await;
    let callers: Vec<_> = (0..crowd.callers).map(|seed| tokio::spawn(caller(daemon.address(), seed, crowd))).collect();
    while callers.iter().any(|caller| !caller.is_finished()) {
        listener.compare().await;
    }
    for caller in callers {
        caller.await.expect("every answer made sense");
    }
    listener.compare().await;

    // What is in the tree is what can be found, and what is stored is what comes back.
    let client = Client { connection: daemon.connect().await };
    let before = inventory(&listener.ask().await);
    let listed = client.call("/org/virt", "org.virt.Manager.ListDomains", &(options([]),)).await.expect("a list");
    let listed: Vec<(OwnedObjectPath, String, String, String, bool)> = listed.body().deserialize().expect("a(osssb)");
    assert_eq!(listed.len(), before.len());
    for (path, name, uuid, _, stored) in listed {
        assert_eq!(before.get(path.as_str()).map(|(_, stored)| *stored), Some(stored), "{name}");
        assert_eq!(client.named(&name).await.expect("by name").path, path.as_str());
        assert_eq!(client.path_from("GetDomain", &(uuid,)).await.expect("by uuid").path, path.as_str());
    }
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    let after = inventory(&Listener::new(&daemon).await.belief.objects);
    let stored: BTreeMap<_, _> = before.into_iter().filter(|(_, (_, stored))| *stored).collect();
    assert_eq!(after, stored, "left what came back, right what was stored");
}
