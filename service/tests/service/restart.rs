//! What is on disk, and what another virtd makes of it.

use crate::world::World;
use async_trait::async_trait;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use virt_drivers::test::TestDriver;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::{Condition, Driver, DriverError, Launch, Reconnect, Reconnected, Running};
use virt_model::state::{DomainState, Suspended};
use virt_model::xml::Finding;
use virt_service::error::Error;
use virt_service::{Affect, StartOptions, UndefineOptions};

/// A driver whose guests have stopped when they are found again, which takes until it is let go on.
pub struct Slow {
    pub inner: TestDriver,
    pub goes_on: tokio::sync::Notify,
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
            accepted: Default::default(),
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
        Ok(Some(Reconnected { instance, condition: Condition::Suspended(Suspended::Paused), unmarked: false }))
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
