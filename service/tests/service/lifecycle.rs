//! How domains start and end, and in which order that is told.

use crate::world::{World, xml};
use virt_model::driver::{DriverError, ShutdownMode};
use virt_model::state::DomainState;
use virt_service::error::Error;
use virt_service::facts::JobState;
use virt_service::{StartOptions, UndefineOptions, verb};

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
async fn only_a_guest_that_sleeps_is_woken() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    let (verb, ask) = verb::ASKS.iter().find(|(verb, _)| **verb == verb::WAKEUP).unwrap();
    let alice = world.alice();
    let wake = async || domain.ask(&alice, verb, *ask).await;
    assert!(matches!(wake().await, Err(Error::OperationInvalid(text)) if text.contains("start it first")));
    world.start(&domain).await.unwrap();
    assert!(matches!(wake().await, Err(Error::OperationInvalid(text)) if text.contains("does not sleep")));
    domain.suspend(&alice).await.unwrap();
    assert!(matches!(wake().await, Err(Error::OperationInvalid(text)) if text.contains("does not sleep")));
    domain.resume(&alice).await.unwrap();
    world.driver.guest(domain.uuid()).unwrap().fall_asleep();
    world.until("pmsuspended memory").await;
    assert_eq!(domain.can(&alice, "Wakeup").await.unwrap(), "yes");
    wake().await.expect("it sleeps");
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
