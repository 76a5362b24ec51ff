//! What snapshots and reverts tell of the guest.

use crate::world::{World, take, with_snapshot, xml};
use virt_model::domain::Form;
use virt_model::state::DomainState;
use virt_service::error::Error;
use virt_service::events::Event;
use virt_service::{CreateOptions, DeleteOptions, Force, RevertOptions};

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

/// As libvirt may have written it: kept and shown, and nothing is done to what is on the server.
#[tokio::test]
async fn x10_a_record_of_overlays_on_a_server_can_be_forgotten_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let (domain, alice) = (with_snapshot(&world, "web").await, world.alice());
    domain.destroy(&alice, false).await.unwrap();
    let machine = domain.xml(&alice, Form::default()).await.unwrap();
    let document = format!(
        "<domainsnapshot><name>far</name><state>disk-snapshot</state><creationTime>1700000000</creationTime>\
         <disks><disk name='vda' snapshot='external' type='network'><driver type='qcow2'/>\
         <source protocol='gluster' name='v/one'><host name='h'/></source></disk></disks>{machine}</domainsnapshot>"
    );
    let redefine = CreateOptions { redefine: true, ..CreateOptions::default() };
    domain.create_snapshot(&alice, &document, redefine).await.unwrap().1.done().await.unwrap();
    let shown = domain.snapshot_xml(&alice, "far", false).await.unwrap();
    assert!(shown.contains("<source protocol='gluster' name='v/one'>"), "{shown}");
    let options = DeleteOptions::default();
    let deleted = domain.delete_snapshot(&alice, "far", options).await.err().map(|error| error.to_string());
    let reverted = domain.check_revert(&alice, "far", &RevertOptions::default()).await.unwrap();
    for why in [deleted, reverted.err().map(|error| error.to_string())].map(Option::unwrap_or_default) {
        let told = ["disk 'vda' is on a server (gluster:v/one)", "delete it with metadata-only"];
        assert!(told.iter().all(|part| why.contains(part)), "{why}");
    }
    let options = DeleteOptions { metadata_only: true, ..options };
    domain.delete_snapshot(&alice, "far", options).await.unwrap().done().await.unwrap();
}
