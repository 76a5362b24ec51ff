//! A prompt for a password, seen from the authentication agent: what it says, and that it ends with its caller.

use crate::common::users::{ALICE, BOB};
use crate::common::{Daemon, PATIENCE, Setup};
use futures_util::StreamExt as _;
use std::collections::HashMap;
use zbus::message::Flags;
use zbus::{Connection, Message, MessageStream, OwnedObjectPath, Variant};

const MACHINE: &str = "<domain type='test'><name>web</name><memory unit='MiB'>64</memory>\
                       <os><type arch='x86_64'>hvm</type></os></domain>";

/// An agent for everybody in this process, and with it for every connection that the test makes.
struct Agent {
    stream: MessageStream,
}

impl Agent {
    async fn register(daemon: &Daemon) -> Agent {
        let connection = daemon.connect().await;
        let stream = MessageStream::from(&connection);
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let after_name = &stat[stat.rfind(')').unwrap()..];
        let start: u64 = after_name.split(' ').nth(20).unwrap().parse().unwrap();
        let process = HashMap::from([
            ("pid", Variant::from(std::process::id())),
            ("start-time", Variant::from(start)),
            ("uid", Variant::from(BOB.uid.cast_signed())),
        ]);
        let arguments = (("unix-process", process), "C", "/agent");
        let (polkit, interface) = ("org.freedesktop.PolicyKit1", "org.freedesktop.PolicyKit1.Authority");
        let path = "/org/freedesktop/PolicyKit1/Authority";
        let method = "RegisterAuthenticationAgent";
        connection.call_method(Some(polkit), path, Some(interface), method, &arguments).await.unwrap();
        Agent { stream }
    }

    /// The next thing that polkit asks of the agent.
    async fn asked(&mut self, member: &str) -> Message {
        let next = async {
            loop {
                let message = self.stream.next().await.unwrap().unwrap();
                if message.header().member().is_some_and(|name| name.as_str() == member) {
                    return message;
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect(member)
    }
}

async fn start(client: &Connection, domain: &OwnedObjectPath) {
    let call = Message::method_call(domain.as_str(), "Start").destination("org.virt").interface("org.virt.Domain");
    let call = call.with_flags(Flags::ALLOW_INTERACTIVE_AUTH).build(&HashMap::<&str, Variant<'_>>::new()).unwrap();
    client.send(&call).await.unwrap();
}

#[tokio::test]
async fn a_prompt_names_the_machine_and_ends_with_its_caller() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = daemon.connect().await;
    let arguments = (MACHINE, HashMap::<&str, Variant<'_>>::new());
    let manager = Some("org.virt.Manager");
    let defined = root.call_method(Some("org.virt"), "/org/virt", manager, "DefineDomain", &arguments).await.unwrap();
    let domain: OwnedObjectPath = defined.body().deserialize().unwrap();
    let mut agent = Agent::register(&daemon).await;

    let bob = daemon.connect_as(&BOB).await;
    start(&bob, &domain).await;
    let begun = agent.asked("BeginAuthentication").await;
    let body = begun.body();
    type Identities<'a> = Vec<(&'a str, HashMap<&'a str, Variant<'a>>)>;
    let (action, text, _, _, cookie, _): (&str, &str, &str, HashMap<&str, &str>, &str, Identities<'_>) =
        body.deserialize().unwrap();
    assert_eq!(action, "org.virt.domain.start");
    assert_eq!(text, "Authentication is required to start the virtual machine \"web\"");

    // Somebody else is answered while the prompt is open.
    let alice = daemon.connect_as(&ALICE).await;
    let get = ("org.virt.Domain", "State");
    let properties = Some("org.freedesktop.DBus.Properties");
    alice.call_method(Some("org.virt"), domain.as_str(), properties, "Get", &get).await.unwrap();

    bob.close().await.unwrap();
    let cancelled = agent.asked("CancelAuthentication").await;
    assert_eq!(cancelled.body().deserialize::<&str>().unwrap(), cookie);
}
