//! The service with the test driver and an authority that notes what it is asked: no bus, no QEMU.

use async_trait::async_trait;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_util::sync::CancellationToken;
use virt_drivers::test::{Asked, TestDriver};
use virt_model::domain::DomainDef;
use virt_model::domain::Form;
use virt_model::driver::{Condition, Driver, DriverError, Launch, Reconnect, Reconnected, Running, ShutdownMode};
use virt_model::state::{DomainState, Suspended};
use virt_model::xml::Finding;
use virt_service::authz::{Action, Answer, Authority, Caller, Subject};
use virt_service::error::Error;
use virt_service::events::Event;
use virt_service::facts::{DomainFacts, JobState};
use virt_service::verb;
use virt_service::{Affect, Callers, Domain, Limits, Paths, Service, Settings, StartOptions, UndefineOptions};
use virt_service::{CreateOptions, DeleteOptions, Force, RevertOptions};

/// Says yes, unless told to say no; remembers the questions.
#[derive(Default)]
struct Notary {
    refuses: AtomicBool,
    /// Everybody may only look.
    only_reads: AtomicBool,
    /// The next question waits for this.
    thinks: Mutex<Option<Arc<tokio::sync::Notify>>>,
    asked: Mutex<Vec<(Action, Subject)>>,
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
struct Lobby(CancellationToken);

impl Callers for Lobby {
    fn watch(&self, _: &str) -> CancellationToken {
        self.0.clone()
    }
}

/// A service on a folder of its own.
struct World {
    service: Arc<Service>,
    driver: TestDriver,
    notary: Arc<Notary>,
    events: UnboundedReceiver<Event>,
    departed: CancellationToken,
}

impl World {
    async fn open(folder: &Path) -> World {
        World::open_with(folder, TestDriver::default()).await
    }

    async fn open_with(folder: &Path, driver: TestDriver) -> World {
        World::served_by(folder, Arc::new(driver.clone()), driver).await
    }

    /// On a driver that has `driver` for its guests.
    async fn served_by(folder: &Path, served: Arc<dyn Driver>, driver: TestDriver) -> World {
        let (notary, departed) = (Arc::new(Notary::default()), CancellationToken::new());
        let paths = Paths { state: folder.join("state"), runtime: folder.join("run"), log: folder.join("log") };
        let settings =
            Settings { paths, limits: Limits { domains_per_user: 3, jobs_per_user: 2, ..Limits::default() } };
        let (service, events) =
            Service::open(settings, vec![served], notary.clone(), Arc::new(Lobby(departed.clone())))
                .await
                .expect("opened");
        World { service, driver, notary, events, departed }
    }

    fn alice(&self) -> Caller {
        Caller { bus_name: Some(":1.7".to_owned()), uid: 1000, interactive: false, departed: self.departed.clone() }
    }

    async fn define(&self, name: &str) -> Arc<Domain> {
        self.service.define(&self.alice(), &xml(name, ""), false).await.expect("defined")
    }

    /// Starts and waits for the end of the start.
    async fn start(&self, domain: &Arc<Domain>) -> Result<(), Error> {
        domain.start(&self.alice(), StartOptions::default()).await?.done().await
    }

    /// What has been told so far: per event of a domain its state and lifecycle words, per job its state.
    fn told(&mut self) -> Vec<String> {
        let mut told = Vec::new();
        while let Ok(event) = self.events.try_recv() {
            told.push(match event {
                Event::Domain(facts, events) => story(&facts, &events, ""),
                Event::DomainGone(facts, events) => story(&facts, &events, " gone"),
                Event::Job(facts) => format!("job {}", facts.state.as_str()),
                Event::Snapshot(_) | Event::SnapshotGone(_) | Event::JobGone(_) | Event::Flush(_) => continue,
            });
        }
        told
    }

    /// Waits for an event that ends with `words`.
    async fn until(&mut self, words: &str) {
        loop {
            match self.events.recv().await.expect("the service lives") {
                Event::Domain(facts, events) if story(&facts, &events, "").ends_with(words) => return,
                Event::DomainGone(facts, events) if story(&facts, &events, " gone").ends_with(words) => return,
                _ => {}
            }
        }
    }
}

fn story(facts: &DomainFacts, events: &[virt_model::state::Lifecycle], end: &str) -> String {
    let events: Vec<String> = events.iter().map(ToString::to_string).collect();
    format!("{} {}: {}{end}", facts.name, facts.state, events.join(", "))
}

fn xml(name: &str, extra: &str) -> String {
    format!("<domain type='test'><name>{name}</name><memory>1024</memory><os><type>hvm</type></os>{extra}</domain>")
}

/// A guest that has panicked has nothing to lose; one that sleeps is never loaded in place.
#[tokio::test]
async fn reverts_of_guests_that_sleep_or_have_panicked() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let disk = "<on_crash>preserve</on_crash><devices><disk type='file'><driver name='qemu' type='qcow2'/>\
                <source file='/images/web.qcow2'/><target dev='vda' bus='virtio'/></disk></devices>";
    let domain = world.service.define(&world.alice(), &xml("web", disk), false).await.expect("defined");
    world.start(&domain).await.unwrap();
    let (alice, document) = (world.alice(), "<domainsnapshot><name>on</name></domainsnapshot>");
    let (name, ticket) = domain.create_snapshot(&alice, document, CreateOptions::default()).await.unwrap();
    ticket.done().await.unwrap();
    let name = name.unwrap();
    let force = |force| RevertOptions { force, ..RevertOptions::default() };
    let story = ["stopped from-snapshot", "started from-snapshot", "resumed from-snapshot", "defined from-snapshot"];

    world.driver.guest(domain.uuid()).unwrap().panic();
    world.until("crashed panicked").await;
    let plan = domain.check_revert(&alice, &name, &force(Force::No)).await.unwrap().unwrap();
    assert!(plan.risks.is_empty());
    assert_eq!(plan.events.iter().map(ToString::to_string).collect::<Vec<_>>(), story);
    domain.revert(&alice, &name, force(Force::No)).await.unwrap().done().await.unwrap();
    assert_eq!(domain.facts().state, DomainState::Running);

    world.driver.guest(domain.uuid()).unwrap().fall_asleep();
    world.until("pmsuspended memory").await;
    let refused = domain.create_snapshot(&alice, "<domainsnapshot/>", CreateOptions::default()).await;
    assert!(matches!(refused, Err(Error::OperationUnsupported(_))));
    let refused = domain.revert(&alice, &name, force(Force::No)).await;
    assert!(matches!(refused, Err(Error::RevertRisky(why)) if why.contains("new-process")));
    world.told();
    domain.revert(&alice, &name, force(Force::All)).await.unwrap().done().await.unwrap();
    let told = world.told().join("; ");
    let mut rest = told.as_str();
    for event in story {
        rest = rest.split_once(event).unwrap_or_else(|| panic!("no '{event}' in order: {told}")).1;
    }
}

/// A driver whose guests have stopped when they are found again, which takes until it is let go on.
struct Slow {
    inner: TestDriver,
    goes_on: tokio::sync::Notify,
}

#[async_trait]
impl Driver for Slow {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn types(&self) -> &'static [&'static str] {
        self.inner.types()
    }

    async fn complete(&self, def: &mut DomainDef) -> Result<(), DriverError> {
        self.inner.complete(def).await
    }

    async fn check(&self, def: &DomainDef) -> Vec<Finding> {
        self.inner.check(def).await
    }

    async fn native(&self, def: &DomainDef, format: &str) -> Result<Vec<String>, DriverError> {
        self.inner.native(def, format).await
    }

    async fn capabilities(&self) -> Result<String, DriverError> {
        self.inner.capabilities().await
    }

    async fn belongings(&self, def: &DomainDef) -> Vec<std::path::PathBuf> {
        self.inner.belongings(def).await
    }

    async fn start(&self, launch: Launch) -> Result<Running, DriverError> {
        self.inner.start(launch).await
    }

    async fn reconnect(&self, found: Reconnect) -> Result<Option<Reconnected>, DriverError> {
        self.goes_on.notified().await;
        let Reconnect { live, runtime_dir, log_file, recorder, events, .. } = found;
        let launch = Launch {
            def: live,
            paused: true,
            reset_nvram: false,
            from: None,
            runtime_dir,
            log_file,
            recorder,
            events,
            cancel: CancellationToken::new(),
        };
        let Running { instance, .. } = self.inner.start(launch).await?;
        Ok(Some(Reconnected { instance, condition: Condition::Suspended(Suspended::Paused) }))
    }
}

/// Its state is told before it is found, and changes by an event.
#[tokio::test]
async fn a_guest_that_is_found_late_and_otherwise_than_it_was_is_told_to_have_changed() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.start(&domain).await.unwrap();
    let uuid = domain.uuid();
    drop((domain, world));
    let driver = TestDriver::default();
    let slow = Arc::new(Slow { inner: driver.clone(), goes_on: tokio::sync::Notify::new() });
    let mut world = World::served_by(folder.path(), slow.clone(), driver).await;
    assert_eq!(world.told(), ["web running: "], "as it was last known");
    slow.goes_on.notify_one();
    world.until("web paused: suspended paused").await;
    assert_eq!(world.service.get(uuid).unwrap().facts().state, DomainState::Paused);
}

#[tokio::test]
async fn x12_a_machine_that_is_off_is_halted_already() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let disk = "<devices><disk type='file'><driver name='qemu' type='qcow2'/>\
                <source file='/images/web.qcow2'/><target dev='vda' bus='virtio'/></disk></devices>";
    let domain = world.service.define(&world.alice(), &xml("web", disk), false).await.expect("defined");
    let options = CreateOptions { halt: true, ..CreateOptions::default() };
    let (name, ticket) = domain.create_snapshot(&world.alice(), "<domainsnapshot/>", options).await.unwrap();
    ticket.done().await.unwrap();
    assert!(name.is_some());
    assert_eq!(domain.facts().state, DomainState::Shutoff);
}

#[tokio::test]
async fn a_life_is_told_in_order_each_thing_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.start(&domain).await.unwrap();
    domain.suspend(&world.alice()).await.unwrap();
    domain.resume(&world.alice()).await.unwrap();
    domain.shutdown(&world.alice(), ShutdownMode::Default).await.unwrap();
    world.until("stopped shutdown").await;
    domain.undefine(&world.alice(), UndefineOptions::default()).await.unwrap();
    assert_eq!(world.told(), ["web shutoff: undefined removed gone"]);
    assert!(world.service.by_name("web").is_err());
}

#[tokio::test]
async fn a_start_is_a_job_that_ends_before_its_ticket_answers() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.start(&domain).await.unwrap();
    let expected =
        ["web shutoff: defined added", "job waiting", "job running", "web running: started booted", "job succeeded"];
    assert_eq!(world.told(), expected);
}

#[tokio::test]
async fn no_number_of_a_job_is_used_again_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut last = 0;
    for round in 0..5 {
        if round == 3 {
            std::fs::write(folder.path().join("state/runs"), "spoilt").unwrap();
        }
        let world = World::open(folder.path()).await;
        let domain = world.define(&format!("web{round}")).await;
        for _ in 0..2 {
            let ticket = domain.start(&world.alice(), StartOptions::default()).await.unwrap();
            assert!(ticket.id > last, "round {round}: {} after {last}", ticket.id);
            last = ticket.id;
            ticket.done().await.unwrap();
            domain.destroy(&world.alice(), false).await.unwrap();
        }
        domain.undefine(&world.alice(), UndefineOptions::default()).await.unwrap();
    }
}

#[tokio::test]
async fn destroy_gets_through_a_start_that_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.driver.hang_start(domain.uuid());
    let ticket = domain.start(&world.alice(), StartOptions::default()).await.unwrap();
    world.driver.follows_plan(domain.uuid()).await;
    domain.destroy(&world.alice(), false).await.unwrap();
    assert!(matches!(ticket.done().await, Err(Error::Cancelled(_))));
    assert_eq!(domain.facts().state, DomainState::Shutoff);
    assert_eq!(world.told().last().unwrap(), "job cancelled");
    world.start(&domain).await.expect("as if nothing had been");
}

#[tokio::test]
async fn a_start_in_the_queue_hides_no_start_under_way() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.driver.hang_start(domain.uuid());
    let first = domain.start(&world.alice(), StartOptions::default()).await.unwrap();
    let second = domain.start(&world.alice(), StartOptions::default()).await.unwrap();
    world.service.cancel_job(&world.alice(), second.id).await.unwrap();
    assert!(matches!(second.done().await, Err(Error::Cancelled(_))));
    domain.destroy(&world.alice(), false).await.expect("the first start is still there to be ended");
    assert!(matches!(first.done().await, Err(Error::Cancelled(_))));
}

#[tokio::test]
async fn a_cancelled_start_leaves_the_domain_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.driver.hang_start(domain.uuid());
    let ticket = domain.start(&world.alice(), StartOptions::default()).await.unwrap();
    world.service.cancel_job(&world.alice(), ticket.id).await.unwrap();
    let id = ticket.id;
    assert!(matches!(ticket.done().await, Err(Error::Cancelled(_))));
    assert_eq!(world.service.jobs().facts(id).unwrap().state, JobState::Cancelled);
    assert!(matches!(world.service.cancel_job(&world.alice(), id).await, Err(Error::OperationInvalid(_))));
    assert_eq!(std::fs::read_dir(folder.path().join("run/status")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_job_of_another_user_is_cancelled_with_permission_only() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.driver.hang_start(domain.uuid());
    let ticket = domain.start(&world.alice(), StartOptions::default()).await.unwrap();
    let bob = Caller { uid: 1001, ..world.alice() };
    world.notary.refuses.store(true, Ordering::Relaxed);
    assert!(matches!(world.service.cancel_job(&bob, ticket.id).await, Err(Error::AccessDenied(_))));
    assert_eq!(world.notary.asked.lock().unwrap().last().unwrap().0, Action::Job);
    world.service.cancel_job(&world.alice(), ticket.id).await.expect("one's own needs none");
}

#[tokio::test]
async fn nothing_changes_without_permission_and_the_subject_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.told();
    world.notary.refuses.store(true, Ordering::Relaxed);
    let alice = world.alice();
    assert!(matches!(world.start(&domain).await, Err(Error::AccessDenied(_))));
    assert!(matches!(domain.destroy(&alice, false).await, Err(Error::AccessDenied(_))));
    assert!(matches!(domain.rename(&alice, "x").await, Err(Error::AccessDenied(_))));
    assert!(matches!(domain.set_autostart(&alice, true).await, Err(Error::AccessDenied(_))));
    assert!(matches!(domain.xml(&alice, Form::default()).await, Err(Error::AccessDenied(_))));
    assert!(matches!(domain.undefine(&alice, UndefineOptions::default()).await, Err(Error::AccessDenied(_))));
    assert_eq!(world.told(), Vec::<String>::new());
    let asked = world.notary.asked.lock().unwrap();
    let (_, first) = asked.first().unwrap();
    assert_eq!((first.owner, first.domain_name.as_str()), (None, "web"), "to define what is nobody's yet");
    assert!(asked[1..].iter().all(|(_, subject)| subject.owner == Some(1000) && subject.driver == "test"));
}

#[tokio::test]
async fn names_and_uuids_belong_together() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    let again = world.service.define(&world.alice(), &xml("web", ""), false).await;
    assert!(matches!(again, Err(Error::DomainExists(_))), "the same name with another uuid");
    let uuid = format!("<uuid>{}</uuid>", domain.uuid());
    let other = world.service.define(&world.alice(), &xml("db", &uuid), false).await;
    assert!(matches!(other, Err(Error::DomainExists(_))), "the same uuid with another name");
    let update = world.service.define(&world.alice(), &xml("web", &format!("{uuid}<title>T</title>")), false).await;
    assert_eq!(update.expect("an update").facts().title, "T");
}

#[tokio::test]
async fn what_a_user_may_have_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    for name in ["a", "b", "c"] {
        world.define(name).await;
    }
    let fourth = world.service.define(&world.alice(), &xml("d", ""), false).await;
    assert!(matches!(fourth, Err(Error::LimitsExceeded(_))));
    let first = world.service.by_name("a").unwrap();
    first.undefine(&world.alice(), UndefineOptions::default()).await.unwrap();
    world.define("d").await;
}

#[tokio::test]
async fn a_rename_is_told_under_both_names_and_survives() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let (web, _db) = (world.define("web").await, world.define("db").await);
    world.told();
    assert!(matches!(web.rename(&world.alice(), "db").await, Err(Error::DomainExists(_))));
    for bad in ["", "a/b", "line\nbreak"] {
        assert!(matches!(web.rename(&world.alice(), bad).await, Err(Error::InvalidArgument(_))), "{bad:?}");
    }
    web.rename(&world.alice(), "shop").await.unwrap();
    assert_eq!(world.told(), ["web shutoff: undefined renamed", "shop shutoff: defined renamed"]);
    assert!(world.service.by_name("web").is_err());
    drop(world);
    let world = World::open(folder.path()).await;
    assert_eq!(world.service.by_name("shop").unwrap().uuid(), web.uuid());
    assert!(world.service.by_name("web").is_err());
}

#[tokio::test]
async fn what_is_stored_is_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    let alice = world.alice();
    domain.set_autostart(&alice, true).await.unwrap();
    domain.set_title(&alice, "The shop", Affect::default()).await.unwrap();
    domain.set_metadata(&alice, "<v>1</v>", "m", "http://m/", Affect::default()).await.unwrap();
    world.start(&domain).await.unwrap();
    domain.destroy(&alice, false).await.unwrap();
    let before = domain.facts();
    drop(world);

    let world = World::open(folder.path()).await;
    let domain = world.service.by_uuid(&before.uuid.simple().to_string()).unwrap();
    assert_eq!(*domain.facts(), *before);
    let metadata = domain.metadata(&world.alice(), "http://m/", Affect::default()).await.unwrap();
    assert!(metadata.contains(">1<"), "{metadata}");
    world.service.begin_work().await.unwrap();
    let mut world = world;
    world.until("started booted").await;
    assert_eq!(domain.facts().state, DomainState::Running, "autostart, once since the host booted");
}

#[tokio::test]
async fn live_and_stored_configuration_are_changed_apart_and_compared() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    let alice = world.alice();
    let (live, config) = (Affect { live: true, config: false }, Affect { live: false, config: true });
    assert!(matches!(domain.set_title(&alice, "x", live).await, Err(Error::OperationInvalid(_))), "it is off");
    world.start(&domain).await.unwrap();
    assert!(!domain.facts().config_changed);
    domain.set_title(&alice, "next time", config).await.unwrap();
    assert_eq!((domain.facts().title.as_str(), domain.facts().config_changed), ("", true));
    domain.set_title(&alice, "now", live).await.unwrap();
    assert_eq!(domain.facts().title, "now");
    domain.destroy(&alice, false).await.unwrap();
    assert_eq!((domain.facts().title.as_str(), domain.facts().config_changed), ("next time", false));
    assert!(matches!(domain.set_title(&alice, "two\nlines", config).await, Err(Error::InvalidArgument(_))));
    let long = "é".repeat(4000);
    assert!(matches!(domain.set_description(&alice, &long, config).await, Err(Error::InvalidArgument(_))));
    let document = xml("long", &format!("<description>{long}</description>"));
    let domain = world.service.define(&alice, &document, false).await.expect("a document may have it");
    assert_eq!(domain.facts().description.len(), 4096);
    assert!(domain.xml(&alice, Form::default()).await.unwrap().contains(&long));
}

#[tokio::test]
async fn every_way_a_guest_ends_has_its_words() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.start(&domain).await.unwrap();
    world.driver.guest(domain.uuid()).unwrap().power_off();
    world.until("stopped shutdown").await;
    world.start(&domain).await.unwrap();
    world.driver.guest(domain.uuid()).unwrap().panic();
    world.until("crashed panicked").await;
    world.until("stopped crashed").await;
    world.start(&domain).await.unwrap();
    world.driver.guest(domain.uuid()).unwrap().die("out of luck");
    world.until("stopped failed").await;
    assert_eq!(domain.facts().reason.as_str(), "crashed");
    world.start(&domain).await.unwrap();
    world.driver.guest(domain.uuid()).unwrap().io_error();
    world.until("suspended io-error").await;
    domain.resume(&world.alice()).await.expect("the disk is well again");
    world.driver.guest(domain.uuid()).unwrap().fall_asleep();
    world.until("pmsuspended memory").await;
    world.driver.guest(domain.uuid()).unwrap().wake();
    world.until("started wakeup").await;
    assert_eq!(domain.facts().state, DomainState::Running);
}

#[tokio::test]
async fn a_transient_domain_that_does_not_start_was_never_there() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let uuid = uuid::Uuid::new_v4();
    world.driver.fail_start(uuid, DriverError::Hypervisor("no more memory".to_owned()));
    let document = xml("brief", &format!("<uuid>{uuid}</uuid>"));
    let (_, ticket) = world.service.create(&world.alice(), &document, StartOptions::default()).await.unwrap();
    let error = ticket.done().await.expect_err("it fails");
    assert!(error.to_string().ends_with("no more memory"), "{error}");
    let told = world.told();
    assert_eq!(told, ["job waiting", "brief shutoff: ", "job running", "brief shutoff:  gone", "job failed"]);
    assert!(world.service.by_name("brief").is_err());
}

#[tokio::test]
async fn autodestroy_and_cancel_on_disconnect_follow_the_caller() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let (kept, stuck) = (world.define("kept").await, world.define("stuck").await);
    let autodestroy = StartOptions { autodestroy: true, ..StartOptions::default() };
    kept.start(&world.alice(), autodestroy).await.unwrap().done().await.unwrap();
    world.driver.hang_start(stuck.uuid());
    let bound = StartOptions { cancel_on_disconnect: true, ..StartOptions::default() };
    let ticket = stuck.start(&world.alice(), bound).await.unwrap();
    world.departed.cancel();
    assert!(matches!(ticket.done().await, Err(Error::Cancelled(_))));
    world.until("kept shutoff: stopped destroyed").await;
}

#[tokio::test]
async fn can_tells_without_asking_a_person() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    let caller = Caller { interactive: true, ..world.alice() };
    let can = |method: &'static str| domain.can(&caller, method);
    assert_eq!(can("Start").await.unwrap(), "yes");
    assert_eq!(can("Destroy").await.unwrap(), "na");
    world.notary.refuses.store(true, Ordering::Relaxed);
    assert_eq!(can("Start").await.unwrap(), "no");
    assert!(matches!(can("Fly").await, Err(Error::InvalidArgument(_))));
}

#[tokio::test]
async fn can_knows_methods_of_snapshots_and_of_the_service() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = with_snapshot(&world, "web").await;
    assert_eq!(domain.can_with_snapshot(&world.alice(), "on", "Revert").await.unwrap(), "yes");
    assert!(matches!(
        domain.can_with_snapshot(&world.alice(), "other", "Revert").await,
        Err(Error::NoSuchSnapshot { .. })
    ));
    assert_eq!(world.service.can(&world.alice(), "DefineDomain").await.unwrap(), "yes");
    world.notary.only_reads.store(true, Ordering::Relaxed);
    assert_eq!(domain.can_with_snapshot(&world.alice(), "on", "Delete").await.unwrap(), "no");
    assert_eq!(domain.can_with_snapshot(&world.alice(), "on", "CheckDelete").await.unwrap(), "yes");
    assert_eq!(world.service.can(&world.alice(), "CreateDomain").await.unwrap(), "no");
    assert_eq!(world.service.can(&world.alice(), "ListDomains").await.unwrap(), "yes");
    assert!(matches!(world.service.can(&world.alice(), "Revert").await, Err(Error::InvalidArgument(_))));
}

#[tokio::test]
async fn a_question_to_the_hypervisor_runs_in_the_frame_of_all_verbs() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    let (verb, ask) = verb::ASKS.iter().find(|(verb, _)| **verb == verb::INJECT_NMI).unwrap();
    assert_eq!(domain.can(&world.alice(), verb.member).await.unwrap(), "na");
    let refused = domain.ask(&world.alice(), verb, *ask).await.unwrap_err();
    assert!(matches!(refused, Error::OperationInvalid(_)), "{refused}");
    domain.start(&world.alice(), StartOptions::default()).await.unwrap().done().await.unwrap();
    domain.ask(&world.alice(), verb, *ask).await.unwrap();
    assert_eq!(world.driver.guest(domain.uuid()).unwrap().asked(), Some(Asked::Interrupted));
    world.notary.refuses.store(true, Ordering::Relaxed);
    assert!(matches!(domain.ask(&world.alice(), verb, *ask).await, Err(Error::AccessDenied(_))));
}

#[tokio::test]
async fn documents_are_compared_completed_and_not_held_against_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let compare = async |source: &str, target: &str| {
        let found = world.service.compare(&world.alice(), source, target).await?;
        Ok::<_, Error>(found.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    // Neither says its uuid or its MAC address, and no driver serves the type.
    let vax = "<domain type='vax'><name>v</name><memory>1024</memory><currentMemory>512</currentMemory>\
               <devices><interface type='user'/></devices></domain>";
    assert_eq!(compare(vax, vax).await.unwrap(), Vec::<String>::new());
    let other = vax.replace("'user'/>", "'user'><mtu size='9000'/></interface>").replace("512", "1024");
    let found = compare(vax, &other).await.unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].ends_with("]/mtu/size: nothing → '9000'"), "{found:?}");
    let said = xml("web", "<vcpu>1</vcpu>");
    assert_eq!(compare(&said, &xml("web", "")).await.unwrap(), Vec::<String>::new(), "the default spelled out");
    let wrong = compare("<domain/>", vax).await.unwrap_err();
    assert!(
        matches!(wrong, Error::ConfigInvalid(_)) && wrong.to_string().contains("in the source document"),
        "{wrong}"
    );
    assert!(world.notary.asked.lock().unwrap().iter().all(|(action, subject)| {
        *action == Action::Read && subject.domain_uuid.is_none() && subject.domain_name.is_empty()
    }));
    world.notary.refuses.store(true, Ordering::Relaxed);
    assert!(matches!(compare(vax, vax).await, Err(Error::AccessDenied(_))));
}

#[tokio::test]
async fn what_a_document_would_meet_is_told_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    world.define("web").await;
    let findings = world.service.validate(&world.alice(), &xml("web", "<nonsense/><vcpu>0</vcpu>")).await.unwrap();
    assert!(findings.len() >= 2, "{findings:?}");
    let findings = world.service.validate(&world.alice(), &xml("web", "")).await.unwrap();
    assert_eq!(findings.iter().map(|f| f.path.as_str()).collect::<Vec<_>>(), ["/name"], "the name is taken");
    let findings = world.service.validate(&world.alice(), "<domain type='vax'><name>v</name></domain>").await.unwrap();
    assert!(!findings.is_empty());
    assert_eq!(world.service.validate(&world.alice(), &xml("new", "")).await.unwrap(), []);
}

#[tokio::test]
async fn l1_files_that_are_not_ours_or_broken_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    drop(world);
    let domains = folder.path().join("state/domains");
    std::fs::write(domains.join("README.xml"), "hello").unwrap();
    let nobody = uuid::Uuid::new_v4();
    let broken = domains.join(format!("{nobody}.xml"));
    std::fs::write(&broken, "<domain").unwrap();
    std::fs::write(domains.join(".new-abc"), "half").unwrap();
    std::fs::write(domains.join(format!("{}.json", uuid::Uuid::new_v4())), "{}").unwrap();
    let world = World::open(folder.path()).await;
    assert!(world.service.get(domain.uuid()).is_some());
    let found = world.service.get(nobody).expect("it is there, and says why");
    assert_eq!((found.name(), found.facts().persistent), (nobody.to_string(), true));
    assert!(found.facts().broken.contains("cannot be read"), "{}", found.facts().broken);
    assert!(broken.exists() && domains.join("README.xml").exists());
    assert!(!domains.join(".new-abc").exists(), "a write that was cut off is tidied up");
    assert_eq!(std::fs::read_dir(&domains).unwrap().count(), 4, "a lonely note is removed");
}

/// The map of names and the state of a domain are both locked here, by two callers at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_document_that_does_not_fit_and_an_end_do_not_lock_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let uuid = uuid::Uuid::new_v4();
    let (own, other) = (xml("brief", &format!("<uuid>{uuid}</uuid>")), xml("other", &format!("<uuid>{uuid}</uuid>")));
    let stop = Arc::new(AtomicBool::new(false));
    for _ in 0..2 {
        let (service, alice, other, stop) = (world.service.clone(), world.alice(), other.clone(), stop.clone());
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let _ = service.validate(&alice, &other).await;
            }
        });
    }
    let lives = async {
        for _ in 0..50 {
            let (domain, ticket) = world.service.create(&world.alice(), &own, StartOptions::default()).await.unwrap();
            ticket.done().await.unwrap();
            domain.destroy(&world.alice(), false).await.unwrap();
        }
    };
    let done = tokio::time::timeout(std::time::Duration::from_secs(60), lives).await;
    stop.store(true, Ordering::Relaxed);
    done.expect("nobody waits for ever");
}

#[tokio::test]
async fn a_start_that_waits_and_gives_up_leaves_the_one_before_it_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let uuid = uuid::Uuid::new_v4();
    let document = xml("brief", &format!("<uuid>{uuid}</uuid>"));
    let go = world.driver.hang_start(uuid);
    let (domain, first) =
        world.service.create(&world.alice(), &document, StartOptions::default()).await.expect("the first");
    let (_, second) = world.service.create(&world.alice(), &document, StartOptions::default()).await.expect("it waits");
    world.service.cancel_job(&world.alice(), second.id).await.unwrap();
    assert!(matches!(second.done().await, Err(Error::Cancelled(_))));
    assert!(world.service.get(uuid).is_some(), "the first start is still under way");
    go.notify_one();
    first.done().await.unwrap();
    assert_eq!(domain.facts().state, DomainState::Running);
    assert!(world.service.by_name("brief").is_ok());
    domain.destroy(&world.alice(), false).await.unwrap();
    world.until("stopped destroyed gone").await;
}

#[tokio::test]
async fn destroy_sees_a_start_though_another_gave_up_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.driver.hang_start(domain.uuid());
    let first = domain.start(&world.alice(), StartOptions::default()).await.unwrap();
    let second = domain.start(&world.alice(), StartOptions::default()).await.unwrap();
    world.service.cancel_job(&world.alice(), second.id).await.unwrap();
    assert!(second.done().await.is_err());
    domain.destroy(&world.alice(), false).await.expect("it ends the start under way");
    assert!(matches!(first.done().await, Err(Error::Cancelled(_))));
}

#[tokio::test]
async fn a_change_of_both_configurations_is_made_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.start(&domain).await.unwrap();
    std::fs::rename(folder.path().join("run/status"), folder.path().join("run/elsewhere")).unwrap();
    assert!(domain.set_title(&world.alice(), "new", Affect::default()).await.is_err(), "the live one cannot be kept");
    assert_eq!(domain.facts().title, "");
    let stored = std::fs::read_to_string(folder.path().join(format!("state/domains/{}.xml", domain.uuid()))).unwrap();
    assert!(!stored.contains("new"), "{stored}");
}

#[tokio::test]
async fn an_undefine_that_is_refused_leaves_the_domain_on_disk_too() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let variables = folder.path().join("vars.fd");
    std::fs::create_dir(&variables).unwrap();
    let document = format!(
        "<domain type='test'><name>efi</name><memory>1024</memory><os><type>hvm</type>\
         <loader readonly='yes' type='pflash'>/code.fd</loader><nvram>{}</nvram></os><features><acpi/></features></domain>",
        variables.display()
    );
    let domain = world.service.define(&world.alice(), &document, false).await.unwrap();
    let without = domain.undefine(&world.alice(), UndefineOptions::default()).await;
    assert!(matches!(without, Err(Error::OperationInvalid(_))), "{without:?}");
    drop(world);
    let world = World::open(folder.path()).await;
    assert!(world.service.by_name("efi").is_ok());
}

#[tokio::test]
async fn permission_to_define_what_is_nobodys_is_none_to_change_what_is_somebodys() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let document = xml("web", &format!("<uuid>{}</uuid>", uuid::Uuid::new_v4()));
    let answer = Arc::new(tokio::sync::Notify::new());
    *world.notary.thinks.lock().unwrap() = Some(answer.clone());
    let alice = world.alice();
    let bob = Caller { uid: 1001, ..world.alice() };
    let slow = world.service.define(&alice, &document, false);
    let quick = async {
        // Not before alice's question is being thought about: documents are read on other threads, in any order.
        while world.notary.thinks.lock().unwrap().is_some() {
            tokio::task::yield_now().await;
        }
        world.service.define(&bob, &document, false).await.expect("bob is first");
        answer.notify_one();
    };
    let error = tokio::join!(slow, quick).0.map(|_| ()).expect_err("what was allowed was another domain");
    assert!(matches!(&error, Error::DomainExists(text) if text.contains("meanwhile; try again")), "{error}");
    let owners: Vec<_> = world.notary.asked.lock().unwrap().iter().map(|(_, subject)| subject.owner).collect();
    assert_eq!(owners, [None, None]);
}

#[tokio::test]
async fn a_guest_that_cannot_be_looked_at_gets_no_second_one_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.start(&domain).await.unwrap();
    let status = folder.path().join(format!("run/status/{}.json", domain.uuid()));
    let text = std::fs::read_to_string(&status).unwrap();
    std::fs::write(&status, text.replace("\"driver\": \"test\"", "\"driver\": \"vax\"")).unwrap();
    drop(world);
    let world = World::open(folder.path()).await;
    let domain = world.service.by_name("web").unwrap();
    let refused = world.start(&domain).await.expect_err("it may run");
    assert!(matches!(&refused, Error::OperationInvalid(text) if text.contains("vax")), "{refused}");
    assert!(status.exists());
}

/// An agent that is asked is busy: that is for those who may take the snapshot. The test driver has none, so it tells who asks.
#[tokio::test]
async fn a_check_asks_the_agent_only_for_those_who_may_freeze_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = with_snapshot(&world, "web").await;
    let options = || CreateOptions { disk_only: true, quiesce: true, ..CreateOptions::default() };
    let check = async || domain.check_create_snapshot(&world.alice(), "<domainsnapshot/>", options()).await.unwrap();
    assert!(matches!(check().await, Err(Error::AgentUnavailable(_))), "who may, has it asked");
    world.notary.only_reads.store(true, Ordering::Relaxed);
    check().await.expect("a stranger learns what would be done, as far as the agent need not be asked");
    domain.suspend(&world.alice()).await.unwrap();
    assert!(matches!(check().await, Err(Error::AgentUnavailable(_))), "that it stands can be told without asking");
}

/// A running domain that has a snapshot of itself.
async fn with_snapshot(world: &World, name: &str) -> Arc<Domain> {
    let disk = "<devices><disk type='file'><driver name='qemu' type='qcow2'/><source file='/images/web.qcow2'/>\
                <target dev='vda' bus='virtio'/></disk></devices>";
    let domain = world.service.define(&world.alice(), &xml(name, disk), false).await.expect("defined");
    world.start(&domain).await.unwrap();
    take(world, &domain, "on").await;
    domain
}

async fn take(world: &World, domain: &Arc<Domain>, name: &str) {
    let document = format!("<domainsnapshot><name>{name}</name></domainsnapshot>");
    let (_, ticket) = domain.create_snapshot(&world.alice(), &document, CreateOptions::default()).await.unwrap();
    ticket.done().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_told_after_what_it_did_to_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let domain = with_snapshot(&world, "web").await;
    for number in 0..100 {
        while world.events.try_recv().is_ok() {}
        let name = format!("s{number}");
        take(&world, &domain, &name).await;
        let mut seen = Vec::new();
        loop {
            match world.events.recv().await.unwrap() {
                Event::Domain(_, events) => seen.extend(events.iter().map(ToString::to_string)),
                Event::Snapshot(facts) if facts.name == name => break,
                _ => {}
            }
        }
        assert_eq!(seen, ["suspended paused", "resumed unpaused"], "before {name}");
    }
}

#[tokio::test]
async fn destroy_gets_through_a_revert_whose_new_guest_does_not_come() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = with_snapshot(&world, "web").await;
    for runs in [true, false] {
        if !runs {
            domain.destroy(&world.alice(), false).await.unwrap();
        }
        world.driver.hang_start(domain.uuid());
        let options = RevertOptions { running: true, respawn: true, force: Force::All, ..RevertOptions::default() };
        let ticket = domain.revert(&world.alice(), "on", options).await.unwrap();
        world.driver.follows_plan(domain.uuid()).await;
        domain.destroy(&world.alice(), false).await.unwrap();
        let ended = ticket.done().await;
        assert!(matches!(ended, Err(Error::Cancelled(_))), "{ended:?}");
        assert_eq!(domain.facts().state, DomainState::Shutoff);
        assert_eq!(world.driver.running(), 0);
        assert!(!folder.path().join(format!("state/snapshots/{}/.intent", domain.uuid())).exists(), "it is whole");
        world.start(&domain).await.expect("as if nothing had been");
    }
}

#[tokio::test]
async fn destroy_gets_through_whatever_is_done_to_a_hypervisor_that_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = with_snapshot(&world, "web").await;
    for deed in ["create", "revert", "delete"] {
        let guest = world.driver.guest(domain.uuid()).unwrap();
        guest.hang(true);
        let alice = world.alice();
        let ticket = match deed {
            "create" => domain.create_snapshot(&alice, "<domainsnapshot/>", CreateOptions::default()).await.unwrap().1,
            "revert" => {
                let options = RevertOptions { force: Force::All, ..RevertOptions::default() };
                domain.revert(&alice, "on", options).await.unwrap()
            }
            _ => domain.delete_snapshot(&alice, "on", DeleteOptions::default()).await.unwrap(),
        };
        domain.destroy(&alice, false).await.unwrap();
        assert_eq!(domain.facts().state, DomainState::Shutoff, "{deed}");
        let _ = ticket.done().await;
        assert_eq!(
            (domain.facts().state, world.driver.running()),
            (DomainState::Shutoff, 0),
            "{deed}: it does not come back"
        );
        world.start(&domain).await.unwrap();
    }
}

#[tokio::test]
async fn a_machine_whose_recovery_hangs_costs_nobody_else_anything() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let (hung, other) = (world.define("hung").await, world.define("other").await);
    let uuid = hung.uuid();
    drop((hung, other, world));
    let snapshots = folder.path().join(format!("state/snapshots/{uuid}"));
    std::fs::create_dir_all(&snapshots).unwrap();
    let intent =
        r#"{ "deed": { "Revert": { "name": "on", "active": false, "in_place": false, "ran": true } }, "note": {} }"#;
    std::fs::write(snapshots.join(".intent"), intent).unwrap();

    let driver = TestDriver::default();
    let go_on = driver.hang_recovery(uuid);
    let world = World::open_with(folder.path(), driver).await;
    world.start(&world.service.by_name("other").unwrap()).await.expect("others do not notice");
    let hung = world.service.by_name("hung").unwrap();
    hung.xml(&world.alice(), Form { inactive: true, secure: false, migratable: false }).await.expect("reads answer");
    // Nothing else is going on: the clock moves on as soon as everybody waits.
    tokio::time::pause();
    let refused = hung.set_title(&world.alice(), "now", Affect::default()).await;
    assert!(matches!(&refused, Err(Error::Busy { job, .. }) if job.contains("recovery")), "{refused:?}");
    // A guest was to come of it: not any more.
    hung.destroy(&world.alice(), false).await.expect("it gets through");
    let refused = world.start(&hung).await;
    assert!(
        matches!(&refused, Err(Error::Busy { job, .. }) if job.contains("a revert that was cut off")),
        "{refused:?}"
    );
    go_on.notify_one();
    tokio::time::resume();
    world.start(&hung).await.expect("its turn again");
}
/// In a shared folder a snapshot's files could take the names that another machine's images are to have.
#[tokio::test]
async fn m8_files_that_are_not_called_after_ones_own_images_need_permission_to_define() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let with_disk = |name: &str, image: &str| {
        let disk = format!(
            "<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/pool/{image}'/>\
             <target dev='vda' bus='virtio'/></disk></devices>"
        );
        xml(name, &disk)
    };
    let web = world.service.define(&world.alice(), &with_disk("web", "web.qcow2"), false).await.expect("defined");
    world.service.define(&world.alice(), &with_disk("shop", "web.golden"), false).await.expect("defined");
    for (name, file, needs) in [
        ("one", "", false),
        ("two", "/pool/web.two", false),
        // By its default name, which is another's.
        ("golden", "", true),
        ("three", "/pool/web.three.overlay", false),
        ("four", "/pool/shop.qcow2", true),
        ("five", "/pool/web.other", true),
        ("six", "/elsewhere/web.six", true),
        ("seven", "/pool/web.seven/../web.seven", true),
    ] {
        let source = if file.is_empty() { String::new() } else { format!("<source file='{file}'/>") };
        let doc = format!(
            "<domainsnapshot><name>{name}</name><disks><disk name='vda' snapshot='external'>{source}</disk></disks>\
             </domainsnapshot>"
        );
        world.notary.asked.lock().unwrap().clear();
        let options = CreateOptions { disk_only: true, ..CreateOptions::default() };
        if let Ok((_, ticket)) = web.create_snapshot(&world.alice(), &doc, options).await {
            let _ = ticket.done().await;
        }
        let asked: Vec<Action> = world.notary.asked.lock().unwrap().iter().map(|(action, _)| *action).collect();
        assert_eq!(asked.contains(&Action::Define), needs, "{name}: {asked:?}");
    }
}
