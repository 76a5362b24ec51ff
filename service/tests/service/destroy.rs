//! `Destroy` waits for nobody.

use crate::world::{World, with_snapshot};
use virt_model::state::DomainState;
use virt_service::error::Error;
use virt_service::{CreateOptions, DeleteOptions, Force, RevertOptions, StartOptions};

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
