//! Checkpoints whose bitmaps come into doubt.

use crate::world::{World, xml};
use virt_service::error::Error;
use virt_service::events::Event;

/// The bitmaps of a hypervisor that was killed are named by the checkpoint, and stay so.
#[tokio::test]
async fn a_hypervisor_that_dies_breaks_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let disk = "<devices><disk type='file'><driver name='qemu' type='qcow2'/><source file='/images/web.qcow2'/>\
                <target dev='vda' bus='virtio'/></disk></devices>";
    let domain = world.service.define(&world.alice(), &xml("web", disk), false).await.expect("defined");
    world.start(&domain).await.unwrap();
    let name = domain.create_checkpoint(&world.alice(), "").await.unwrap();
    world.driver.guest(domain.uuid()).unwrap().quit();
    world.until("stopped shutdown").await;
    world.start(&domain).await.unwrap();
    // Creating another one waits for the look at what is there.
    domain.create_checkpoint(&world.alice(), "<domaincheckpoint><name>b</name></domaincheckpoint>").await.unwrap();
    while let Ok(event) = world.events.try_recv() {
        assert!(!matches!(&event, Event::Checkpoint(facts) if !facts.broken.is_empty()), "{event:?}");
    }
    world.driver.guest(domain.uuid()).unwrap().die("killed");
    let mut broken = Vec::new();
    while broken.len() < 2 {
        if let Event::Checkpoint(facts) = world.events.recv().await.unwrap()
            && !facts.broken.is_empty()
        {
            assert!(facts.broken.contains("'vda'") && facts.broken.contains("inconsistent"), "{}", facts.broken);
            broken.push(facts.name.clone());
        }
    }
    assert_eq!(broken, [name, "b".to_owned()]);
    world.notary.refuses.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(domain.checkpoints(&world.alice()).await, Err(Error::AccessDenied(_))));
}
