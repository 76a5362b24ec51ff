//! What is stored is applied to what runs, and what programs in the guest have open is told.

use crate::restart::Slow;
use crate::world::{World, xml};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use virt_drivers::test::TestDriver;
use virt_model::driver::DriverError;
use virt_model::state::{DomainState, StateReason};
use virt_service::error::Error;
use virt_service::{Affect, ApplyOptions, Domain};

const CONFIG: Affect = Affect { live: false, config: true };

fn within(milliseconds: u64) -> ApplyOptions {
    ApplyOptions { patience: Duration::from_millis(milliseconds), cancel_on_disconnect: false }
}

/// A guest with another title to come.
async fn pending(world: &World, extra: &str) -> Arc<Domain> {
    let domain = world.service.define(&world.alice(), &xml("web", extra), false).await.expect("defined");
    world.start(&domain).await.unwrap();
    domain.set_title(&world.alice(), "next", CONFIG).await.unwrap();
    assert!(domain.facts().config_changed());
    domain
}

async fn apply(world: &World, domain: &Arc<Domain>, options: ApplyOptions) -> Result<(), Error> {
    domain.apply_pending(&world.alice(), options).await?.done().await
}

#[tokio::test]
async fn a_guest_that_powers_off_is_started_anew_whatever_it_is_to_do_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let domain = pending(&world, "<on_poweroff>restart</on_poweroff>").await;
    let id = domain.id();
    world.told();
    apply(&world, &domain, within(60_000)).await.expect("applied");
    assert_eq!((&*domain.facts().config.title, domain.facts().pending.len()), ("next", 0));
    assert!(domain.id() > id, "another guest");
    let told = world.told().into_iter().filter(|told| told.starts_with("web ") && !told.ends_with(": "));
    let story = ["web shutdown: shutdown guest", "web shutoff: stopped shutdown", "web running: started booted"];
    assert_eq!(told.collect::<Vec<_>>(), story);
    assert!(
        matches!(apply(&world, &domain, within(1)).await, Err(Error::OperationInvalid(why)) if why.contains("nothing is pending"))
    );
}

#[tokio::test]
async fn a_guest_that_does_not_listen_runs_on_and_whoever_ends_it_gets_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = pending(&world, "<on_poweroff>preserve</on_poweroff>").await;
    let guest = world.driver.guest(domain.uuid()).expect("it runs");
    guest.ignore_shutdown(true);
    let late = apply(&world, &domain, within(20)).await;
    assert!(matches!(late, Err(Error::TimedOut(why)) if why.contains("runs on")));
    assert!(domain.facts().config_changed() && domain.facts().state == DomainState::Running);
    // Afterwards a power-off is again what the configuration says.
    guest.power_off();
    assert_eq!(domain.facts().state, DomainState::Running);
    let mut world = world;
    world.until("shutdown guest").await;
    assert_eq!(domain.facts().state, DomainState::Shutdown, "preserved");
    domain.reset(&world.alice()).await.expect("reset");

    let ticket = domain.apply_pending(&world.alice(), within(60_000)).await.expect("accepted");
    domain.destroy(&world.alice(), false).await.expect("destroyed");
    assert!(matches!(ticket.done().await, Err(Error::Cancelled(_))));
    assert_eq!((domain.facts().state, domain.facts().reason), (DomainState::Shutoff, StateReason::Destroyed));
    world.start(&domain).await.expect("it is as any other");
}

/// virtd was killed while a guest was to power off, so that it starts with another title: what another one makes of it. The host is
/// the same, unless it `booted` meanwhile.
async fn cut_off(folder: &Path, booted: bool) -> (World, Arc<Domain>) {
    let world = World::open(folder).await;
    let domain = pending(&world, "").await;
    let (uuid, id) = (domain.uuid(), domain.id());
    drop((domain, world));
    let snapshots = folder.join(format!("state/snapshots/{uuid}"));
    std::fs::create_dir_all(&snapshots).unwrap();
    let intent = format!(r#"{{ "deed": {{ "Apply": {{ "id": {id}, "until_usec": {} }} }}, "note": null }}"#, u64::MAX);
    std::fs::write(snapshots.join(".intent"), intent).unwrap();
    if booted {
        std::fs::remove_dir_all(folder.join("run")).unwrap();
    }
    let driver = TestDriver::default();
    let finds = Arc::new(Slow { inner: driver.clone(), goes_on: tokio::sync::Notify::new() });
    let world = match booted {
        true => World::open(folder).await,
        false => World::served_by(folder, finds.clone(), driver).await,
    };
    finds.goes_on.notify_one();
    let domain = world.service.get(uuid).unwrap();
    (world, domain)
}

#[tokio::test]
async fn another_virtd_goes_on_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let (mut world, domain) = cut_off(folder.path(), false).await;
    // It is found standing, and powers off when it goes on.
    world.until("web paused: suspended paused").await;
    tokio::time::pause();
    let busy = domain.set_title(&world.alice(), "other", CONFIG).await;
    assert!(matches!(busy, Err(Error::Busy { .. })), "{busy:?}");
    tokio::time::resume();
    world.driver.guest(domain.uuid()).expect("it is found").power_off();
    world.until("web running: started booted").await;
    assert_eq!(&*domain.facts().config.title, "next");
    domain.set_title(&world.alice(), "after", Affect::default()).await.expect("nothing is left to be done");
    let intent = folder.path().join(format!("state/snapshots/{}/.intent", domain.uuid()));
    assert!(!intent.exists());
}

#[tokio::test]
async fn another_virtd_starts_nothing_that_was_destroyed_or_ended_with_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let (mut world, domain) = cut_off(folder.path(), false).await;
    world.until("web paused: suspended paused").await;
    domain.destroy(&world.alice(), false).await.expect("destroyed");
    domain.set_title(&world.alice(), "after", CONFIG).await.expect("nothing is left to be done");
    assert_eq!((domain.facts().state, domain.facts().reason), (DomainState::Shutoff, StateReason::Destroyed));

    let folder = tempfile::tempdir().unwrap();
    let (world, domain) = cut_off(folder.path(), true).await;
    domain.set_title(&world.alice(), "after", CONFIG).await.expect("nothing is left to be done");
    assert_eq!(domain.facts().state, DomainState::Shutoff);
}

#[tokio::test]
async fn both_permissions_are_needed_and_a_start_that_fails_leaves_it_off() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = pending(&world, "").await;
    world.notary.asked.lock().unwrap().clear();
    world.notary.refuses.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(apply(&world, &domain, within(1)).await, Err(Error::AccessDenied(_))));
    world.notary.refuses.store(false, std::sync::atomic::Ordering::Relaxed);
    world.driver.fail_start(domain.uuid(), DriverError::Refused("no room".to_owned()));
    world.notary.asked.lock().unwrap().clear();
    assert!(apply(&world, &domain, within(60_000)).await.is_err());
    let asked: Vec<String> =
        world.notary.asked.lock().unwrap().iter().map(|(action, _)| format!("{action:?}")).collect();
    assert_eq!(asked, ["Stop", "Start"]);
    assert_eq!(domain.facts().state, DomainState::Shutoff);
}

#[tokio::test]
async fn a_channel_that_is_opened_and_closed_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let channels = "<devices><channel type='unix'><target type='virtio' name='org.example.0'/></channel>\
                    <channel type='unix'><target type='virtio' name='org.example.1'/></channel></devices>";
    let domain = world.service.define(&world.alice(), &xml("web", channels), false).await.expect("defined");
    world.start(&domain).await.unwrap();
    assert!(domain.facts().open_channels.is_empty());
    let guest = world.driver.guest(domain.uuid()).expect("it runs");
    world.told();
    guest.open_channel("org.example.1", true);
    world.until("web running: ").await;
    assert_eq!(*domain.facts().open_channels, [1]);
    guest.open_channel("org.example.1", false);
    world.until("web running: ").await;
    assert!(domain.facts().open_channels.is_empty());
}
