//! Undefining with what belongs to a machine: who may, and what stands in the way.

use crate::world::{World, take, with_snapshot};
use std::fs;
use virt_model::domain::Form;
use virt_service::authz::Action;
use virt_service::error::Error;
use virt_service::{DeleteOptions, UndefineOptions};

fn with_all() -> UndefineOptions {
    UndefineOptions { snapshots: true, storage: vec!["vda".to_owned()], ..UndefineOptions::default() }
}

#[tokio::test]
async fn who_removes_snapshots_and_images_with_a_machine_is_asked_for_each() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let (domain, alice) = (with_snapshot(&world, "web").await, world.alice());
    take(&world, &domain, "below").await;
    let told = domain.check_undefine(&alice, &with_all()).await.unwrap();
    let why = told.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(why.contains("it runs and stands on its disks; shut it down before"), "{why}");
    domain.destroy(&alice, false).await.unwrap();
    for wrong in [
        UndefineOptions { snapshots_metadata: true, ..with_all() },
        UndefineOptions { storage: vec!["vdz".to_owned()], ..with_all() },
    ] {
        let told = domain.check_undefine(&alice, &wrong).await.unwrap();
        assert!(matches!(told, Err(Error::InvalidArgument(_))), "{told:?}");
    }
    let told = domain.check_undefine(&alice, &with_all()).await.unwrap().expect("possible");
    assert!(told.files.contains(&("/images/web.qcow2".to_owned(), "deleted", 0)), "{told:?}");
    assert!(domain.xml(&alice, Form::default()).await.is_ok(), "nothing was changed");

    world.notary.asked.lock().unwrap().clear();
    let ticket = domain.undefine(&alice, with_all()).await.unwrap().expect("a job");
    ticket.done().await.unwrap();
    let asked: Vec<Action> = world.notary.asked.lock().unwrap().iter().map(|(action, _)| *action).collect();
    assert_eq!(asked, [Action::Delete, Action::Snapshot, Action::Define]);
    assert!(world.service.get(domain.uuid()).is_none(), "nothing is left of it");
    let left: Vec<_> = fs::read_dir(folder.path().join("state/snapshots")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_snapshot_of_a_machine_that_cannot_be_read_can_be_forgotten_and_can_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let (uuid, alice) = {
        let world = World::open(folder.path()).await;
        (with_snapshot(&world, "web").await.uuid(), world.alice())
    };
    fs::write(folder.path().join(format!("state/domains/{uuid}.xml")), "<domain").unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.service.get(uuid).expect("it is there, and says why it is broken");
    for (member, can) in [("Delete", "yes"), ("Revert", "na"), ("GetXML", "yes")] {
        assert_eq!(domain.can_with_snapshot(&alice, "on", member).await.unwrap(), can, "{member}");
    }
    let with_data = domain.delete_snapshot(&alice, "on", DeleteOptions::default()).await;
    assert!(matches!(with_data, Err(Error::OperationInvalid(_))), "its images are not touched");
    let options = DeleteOptions { metadata_only: true, ..DeleteOptions::default() };
    domain.delete_snapshot(&alice, "on", options).await.unwrap().done().await.unwrap();
}
