//! The service with the test driver and an authority that notes what it is asked: no bus, no QEMU. What all stories need.

use async_trait::async_trait;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_util::sync::CancellationToken;
use virt_drivers::host::lender::Lender;
use virt_drivers::network::HostNetworks;
use virt_drivers::secret::Vault;
use virt_drivers::storage::HostStorage;
use virt_drivers::test::TestDriver;
use virt_model::driver::Driver;
use virt_model::driver::network::NetworkDriver;
use virt_service::authz::{Action, Answer, Authority, Caller, Subject};
use virt_service::error::Error;
use virt_service::events::Event;
use virt_service::facts::DomainFacts;
use virt_service::{Callers, CreateOptions, Domain, Host, Limits, Paths, Service, Settings, StartOptions};

/// Says yes, unless told to say no; remembers the questions.
#[derive(Default)]
pub struct Notary {
    pub refuses: AtomicBool,
    /// Everybody may only look.
    pub only_reads: AtomicBool,
    /// The next question waits for this.
    pub thinks: Mutex<Option<Arc<tokio::sync::Notify>>>,
    pub asked: Mutex<Vec<(Action, Subject)>>,
}

#[async_trait]
impl Authority for Notary {
    async fn check(&self, _: &Caller, action: Action, subject: &Subject) -> Result<(), Error> {
        self.asked.lock().unwrap().push((action, subject.clone()));
        let thinks = self.thinks.lock().unwrap().take();
        if let Some(thinks) = thinks {
            thinks.notified().await;
        }
        if self.refuses.load(Ordering::Relaxed) { Err(Error::AccessDenied(action.id().to_owned())) } else { Ok(()) }
    }

    async fn can(&self, _: &Caller, action: Action, _: &Subject) -> Answer {
        let refuses = self.refuses.load(Ordering::Relaxed);
        let only_reads = self.only_reads.load(Ordering::Relaxed) && action != Action::Read;
        if refuses || only_reads { Answer::No } else { Answer::Yes }
    }
}

/// Everybody stays until `departed` fires.
pub struct Lobby(CancellationToken);

impl Callers for Lobby {
    fn watch(&self, _: &str) -> CancellationToken {
        self.0.clone()
    }
}

/// A service on a folder of its own.
pub struct World {
    pub service: Arc<Service>,
    pub driver: TestDriver,
    pub notary: Arc<Notary>,
    pub events: UnboundedReceiver<Event>,
    pub departed: CancellationToken,
}

/// The storage of this host, by our rights.
fn storage(folder: &Path) -> Arc<HostStorage> {
    let (rights, secrets) = (Arc::new(|| Ok(Lender::Ours)), Arc::new(|_: &str| Ok(Vec::new())));
    Arc::new(HostStorage::new(rights, secrets, &folder.join("run"), false))
}

impl World {
    pub async fn open(folder: &Path) -> World {
        World::open_with(folder, TestDriver::default()).await
    }

    pub async fn open_with(folder: &Path, driver: TestDriver) -> World {
        World::served_by(folder, Arc::new(driver.clone()), driver).await
    }

    /// On a driver that has `driver` for its guests.
    pub async fn served_by(folder: &Path, served: Arc<dyn Driver>, driver: TestDriver) -> World {
        let networks = Arc::new(HostNetworks::new(&folder.join("run"), &folder.join("state"), None));
        World::on(folder, (served, driver), networks).await
    }

    /// On networks that are made so.
    pub async fn with_networks(folder: &Path, networks: Arc<dyn NetworkDriver>) -> World {
        let driver = TestDriver::default();
        World::on(folder, (Arc::new(driver.clone()), driver), networks).await
    }

    async fn on(
        folder: &Path,
        (served, driver): (Arc<dyn Driver>, TestDriver),
        networks: Arc<dyn NetworkDriver>,
    ) -> World {
        let (notary, departed) = (Arc::new(Notary::default()), CancellationToken::new());
        let paths = Paths { state: folder.join("state"), runtime: folder.join("run"), log: folder.join("log") };
        let limits = Limits {
            domains_per_user: 3,
            jobs_per_user: 2,
            volumes_per_user: 3,
            storage_per_user: Some(4 << 20),
            ..Limits::default()
        };
        let settings = Settings { paths, limits };
        let secrets = Vault::new(folder.join("state/secrets"), folder.join("secrets"));
        let host = Host { secrets, storage: storage(folder), networks };
        let (service, events) =
            Service::open(settings, vec![served], host, notary.clone(), Arc::new(Lobby(departed.clone())))
                .await
                .expect("opened");
        World { service, driver, notary, events, departed }
    }

    pub fn alice(&self) -> Caller {
        Caller { bus_name: Some(":1.7".to_owned()), uid: 1000, interactive: false, departed: self.departed.clone() }
    }

    pub async fn define(&self, name: &str) -> Arc<Domain> {
        self.service.define(&self.alice(), &xml(name, ""), false).await.expect("defined")
    }

    /// Starts and waits for the end of the start.
    pub async fn start(&self, domain: &Arc<Domain>) -> Result<(), Error> {
        domain.start(&self.alice(), StartOptions::default()).await?.done().await
    }

    /// What has been told so far: per event of a domain its state and lifecycle words, per job its state.
    pub fn told(&mut self) -> Vec<String> {
        let mut told = Vec::new();
        while let Ok(event) = self.events.try_recv() {
            told.push(match event {
                Event::Domain(facts, events) => story(&facts, &events, ""),
                Event::DomainGone(facts, events) => story(&facts, &events, " gone"),
                Event::Job(facts) => format!("job {}", facts.state.as_str()),
                Event::Device(_, event) => format!("{event:?}"),
                _ => continue,
            });
        }
        told
    }

    /// Waits for an event that ends with `words`, for a minute at most.
    pub async fn until(&mut self, words: &str) {
        let comes = async {
            loop {
                match self.events.recv().await.expect("the service lives") {
                    Event::Domain(facts, events) if story(&facts, &events, "").ends_with(words) => return,
                    Event::DomainGone(facts, events) if story(&facts, &events, " gone").ends_with(words) => return,
                    _ => {}
                }
            }
        };
        let in_time = tokio::time::timeout(Duration::from_secs(60), comes).await;
        in_time.unwrap_or_else(|_| panic!("'{words}' was not told"));
    }
}

pub fn story(facts: &DomainFacts, events: &[virt_model::state::Lifecycle], end: &str) -> String {
    let events: Vec<String> = events.iter().map(ToString::to_string).collect();
    format!("{} {}: {}{end}", facts.name, facts.state, events.join(", "))
}

pub fn xml(name: &str, extra: &str) -> String {
    format!("<domain type='test'><name>{name}</name><memory>1024</memory><os><type>hvm</type></os>{extra}</domain>")
}

/// A running domain that has a snapshot of itself.
pub async fn with_snapshot(world: &World, name: &str) -> Arc<Domain> {
    let disk = "<devices><disk type='file'><driver name='qemu' type='qcow2'/><source file='/images/web.qcow2'/>\
                <target dev='vda' bus='virtio'/></disk></devices>";
    let domain = world.service.define(&world.alice(), &xml(name, disk), false).await.expect("defined");
    world.start(&domain).await.unwrap();
    take(world, &domain, "on").await;
    domain
}

pub async fn take(world: &World, domain: &Arc<Domain>, name: &str) {
    let document = format!("<domainsnapshot><name>{name}</name></domainsnapshot>");
    let (_, ticket) = domain.create_snapshot(&world.alice(), &document, CreateOptions::default()).await.unwrap();
    ticket.done().await.unwrap();
}
