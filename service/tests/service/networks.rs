//! What befalls networks whose host is played.

use crate::world::World;
use async_trait::async_trait;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::mpsc;
use tracing::field::{Field, Visit};
use uuid::Uuid;
use virt_model::domain::Form;
use virt_model::driver::network::{
    Lease, NetworkDriver, NetworkError, NetworkReport, PartlySeen, PluggedCard, Problem, ProblemToken,
};
use virt_model::network::NetworkDef;
use virt_model::network::address::Net;
use virt_model::network::forward::ForwardDevice;
use virt_model::xml::Finding;
use virt_service::Affect;
use virt_service::error::Error;
use virt_service::events::Event;
use virt_service::facts::ObjectFacts;

type Looked = Result<Vec<Problem>, PartlySeen>;

/// A host on which everything is done at once.
#[derive(Default)]
struct Played {
    /// What the next looks for problems find; after them none is found.
    looks: Mutex<VecDeque<Looked>>,
    /// For who follows the network.
    reports: Mutex<Option<mpsc::Receiver<NetworkReport>>>,
    /// The devices that networks give to guests' cards.
    devices: Vec<ForwardDevice>,
}

#[async_trait]
impl NetworkDriver for Played {
    fn check(&self, _: &NetworkDef) -> Vec<Finding> {
        Vec::new()
    }

    async fn complete(&self, _: &mut NetworkDef, _: &[String]) {}

    async fn free_net(&self, _: &[Net]) -> Result<Net, NetworkError> {
        Err(NetworkError::Failed("there is none".to_owned()))
    }

    async fn can_start(&self, _: &NetworkDef) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn start(&self, _: &NetworkDef, _: u32) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn stop(&self, _: Uuid) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn find(&self) -> Vec<(NetworkDef, u32)> {
        Vec::new()
    }

    async fn change(&self, _: &NetworkDef) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn forward_devices(&self, _: Uuid) -> Vec<ForwardDevice> {
        self.devices.clone()
    }

    async fn plug(&self, _: &NetworkDef, _: Vec<PluggedCard>) {}

    async fn leases(&self, _: &NetworkDef) -> Result<Vec<Lease>, NetworkError> {
        Ok(Vec::new())
    }

    async fn problems(&self, _: &NetworkDef) -> Looked {
        self.looks.lock().unwrap().pop_front().unwrap_or(Ok(Vec::new()))
    }

    async fn watch(&self, _: Uuid) -> mpsc::Receiver<NetworkReport> {
        self.reports.lock().unwrap().take().expect("one follows it")
    }
}

/// Counts the warnings that say that a network could not be looked at.
struct Warnings(Arc<AtomicUsize>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, about: &tracing::Metadata<'_>) -> bool {
        *about.level() == tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        struct Said(bool);
        impl Visit for Said {
            fn record_debug(&mut self, _: &Field, value: &dyn std::fmt::Debug) {
                self.0 |= format!("{value:?}").contains("no rules today");
            }
        }
        let mut said = Said(false);
        event.record(&mut said);
        self.0.fetch_add(usize::from(said.0), Ordering::Relaxed);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// What cannot be looked at is as it was known; what was found beside that is told, and what was not is none.
#[tokio::test]
async fn a_problem_is_known_until_it_is_seen_to_be_none() {
    let warnings = Arc::new(AtomicUsize::new(0));
    let _heard = tracing::subscriber::set_default(Warnings(warnings.clone()));
    let problem = |token: ProblemToken| Problem { token, sentence: format!("it is {}", token.as_str()) };
    let unseen = |found: Vec<Problem>| Err(PartlySeen { found, ..PartlySeen::nothing("no rules today") });
    let folder = tempfile::tempdir().unwrap();
    let (reports, from) = mpsc::channel(4);
    let played = Arc::new(Played { reports: Mutex::new(Some(from)), ..Played::default() });
    let mut world = World::with_networks(folder.path(), played.clone()).await;
    let xml = "<network><name>home</name><bridge name='virbr7'/><ip address='10.7.0.1' prefix='24'/></network>";
    let network = world.service.define_network(&world.alice(), xml).await.expect("defined");
    played.looks.lock().unwrap().extend([
        Ok(vec![problem(ProblemToken::ForwardBlocked)]),
        unseen(Vec::new()),
        unseen(vec![problem(ProblemToken::DhcpDown)]),
        Ok(vec![problem(ProblemToken::DhcpDown)]),
        unseen(vec![problem(ProblemToken::DhcpDown), problem(ProblemToken::BridgeGone)]),
        Err(PartlySeen { seen: vec![ProblemToken::DhcpDown], ..PartlySeen::nothing("no rules today") }),
    ]);
    network.start(&world.alice()).await.expect("started");
    // The pauses between what is told of it are none to the test.
    tokio::time::pause();
    for _ in 0..6 {
        reports.send(NetworkReport::Changed).await.expect("it is followed");
    }
    let mut told = Vec::new();
    while told.last() != Some(&Vec::new()) {
        match world.events.recv().await.expect("the service lives") {
            Event::Object(ObjectFacts::Network(facts), _) if facts.active => {
                told.push(facts.problems.iter().map(|(token, _)| *token).collect::<Vec<_>>());
            }
            _ => {}
        }
    }
    assert_eq!(
        told,
        [
            vec!["forward-blocked"],
            vec!["forward-blocked", "dhcp-down"],
            vec!["dhcp-down"],
            vec!["dhcp-down", "bridge-gone"],
            vec!["bridge-gone"],
            vec![]
        ]
    );
    assert_eq!(warnings.load(Ordering::Relaxed), 2, "once until it was seen again");
}

fn machine(name: &str) -> String {
    format!(
        "<domain type='test'><name>{name}</name><memory>65536</memory><os><type>hvm</type></os><devices>\
         <interface type='network'><mac address='52:54:00:00:00:0{0}'/><source network='cards'/></interface></devices></domain>",
        name.len()
    )
}

/// Each guest has a device to itself from its start to its end; who comes when none is left is told who has them.
#[tokio::test]
async fn guests_are_given_devices_of_a_network_and_give_them_back() {
    let folder = tempfile::tempdir().unwrap();
    let (_reports, from) = mpsc::channel(1);
    let devices = vec![
        ForwardDevice { link: Some("vf0".to_owned()), pci: Some("0000:05:10.0".to_owned()) },
        ForwardDevice::pci("0000:05:10.2"),
    ];
    let played = Arc::new(Played { reports: Mutex::new(Some(from)), devices, ..Played::default() });
    let world = World::with_networks(folder.path(), played).await;
    let alice = world.alice();
    let xml = "<network><name>cards</name><forward mode='hostdev' managed='yes'><interface dev='vf0'/><pf dev='eth0'/></forward></network>";
    let network = world.service.define_network(&alice, xml).await.expect("defined");
    network.start(&alice).await.expect("started");
    let mut domains = Vec::new();
    for name in ["a", "db", "web"] {
        domains.push(world.service.define(&alice, &machine(name), false).await.expect("defined"));
    }
    world.start(&domains[0]).await.expect("has the first");
    world.start(&domains[1]).await.expect("has the second");
    let refused = world.start(&domains[2]).await.unwrap_err();
    assert!(
        matches!(&refused, Error::InUse(text) if text.contains("domain 'web' has a card in network 'cards'")
        && text.contains("'vf0' (0000:05:10.0) is used by domain 'a' (52:54:00:00:00:01)")
        && text.contains("0000:05:10.2 is used by domain 'db' (52:54:00:00:00:02)")),
        "{refused}"
    );
    let live = domains[1].xml(&alice, Form::default()).await.unwrap();
    let card =
        "<source network='cards'>\n        <address type='pci' domain='0x0000' bus='0x05' slot='0x10' function='0x2'/>";
    assert!(live.contains("<interface type='hostdev' managed='yes'>") && live.contains(card), "{live}");
    let stored = domains[1].xml(&alice, Form { inactive: true, ..Form::default() }).await.unwrap();
    assert!(stored.contains("<interface type='network'>") && !stored.contains("0x05"), "{stored}");
    let same = "<interface type='network'><mac address='52:54:00:00:00:02'/><source network='cards'/></interface>";
    domains[1].update_device(&alice, same, Affect::default()).await.expect("as it is stored");
    let other = domains[1].update_device(&alice, &same.replace("'cards'", "'others'"), Affect::default()).await;
    assert!(matches!(&other, Err(Error::OperationUnsupported(text)) if text.contains("network='others'")), "{other:?}");
    let shown = network.xml(&alice, false).await.unwrap();
    let lines = ["<network connections='2'>", "<interface dev='vf0' connections='1'/>", "slot='0x10' function='0x2'/>"];
    assert!(lines.iter().all(|line| shown.contains(line)) && !shown.contains("function='0x0'"), "{shown}");
    assert!(!network.xml(&alice, true).await.unwrap().contains("connections"));
    domains[0].destroy(&alice, false).await.expect("ended");
    world.start(&domains[2]).await.expect("has what was given back");
    let live = domains[2].xml(&alice, Form::default()).await.unwrap();
    assert!(live.contains("bus='0x05' slot='0x10' function='0x0'"), "{live}");
    let held = network.destroy(&alice, false).await.unwrap_err();
    assert!(matches!(&held, Error::InUse(text) if text.contains("'db'") && text.contains("'web'")), "{held}");
    assert!(network.xml(&alice, false).await.unwrap().contains("connections='2'"));
}
