//! Devices of guests that say more of them than is so, and of machines that cannot be stored.

use crate::world::World;
use std::sync::Arc;
use std::time::Duration;
use virt_model::domain::Form;
use virt_model::driver::{DeviceEvent, DriverEvent, MediumExchange};
use virt_service::error::Error;
use virt_service::{Affect, Domain, LETTING_GO, Wanted, verb};

const MACHINE: &str = "<domain type='test'><name>web</name><memory>65536</memory><os><type>hvm</type></os><devices>\
    <disk type='file' device='cdrom'><source file='/a.iso'/><target dev='sda' bus='sata'/><readonly/><alias name='ua-cd'/></disk>\
    <disk type='file'><source file='/a.img'/><target dev='vdb' bus='virtio'/><alias name='ua-b'/></disk></devices></domain>";

async fn started(world: &mut World) -> Arc<Domain> {
    let domain = world.service.define(&world.alice(), MACHINE, false).await.expect("defined");
    world.start(&domain).await.unwrap();
    world.told();
    domain
}

/// What was told of devices, once all that was reported is.
async fn told_of_devices(world: &mut World, domain: &Arc<Domain>) -> Vec<String> {
    domain.suspend(&world.alice()).await.unwrap();
    domain.resume(&world.alice()).await.unwrap();
    let mut told = world.told();
    told.retain(|event| !event.starts_with("web ") && !event.starts_with("job "));
    told
}

#[tokio::test]
async fn a_guest_that_opens_its_tray_again_and_again_is_told_of_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let domain = started(&mut world).await;
    let guest = world.driver.guest(domain.uuid()).unwrap();
    let opens = || (0..3).for_each(|_| guest.report(DriverEvent::TrayOpened("ua-cd".to_owned())));
    opens();
    let told = told_of_devices(&mut world, &domain).await;
    assert!(told.len() == 1 && told[0].contains("GuestEjected"), "{told:?}");
    opens();
    assert_eq!(told_of_devices(&mut world, &domain).await, [""; 0]);
    let (affect, how) = (Affect::default(), MediumExchange::default());
    domain.change_file(&world.alice(), "sda", "/b.iso", affect, how, None).await.unwrap();
    opens();
    let told = told_of_devices(&mut world, &domain).await;
    assert!(told.len() == 2 && told[1].contains("GuestEjected"), "another medium: {told:?}");
}

#[tokio::test]
async fn a_guest_that_was_not_asked_for_a_device_refuses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let domain = started(&mut world).await;
    let guest = world.driver.guest(domain.uuid()).unwrap();
    let refuse = || {
        let refused = DeviceEvent::RemovalFailed { alias: "ua-b".to_owned() };
        (0..3).for_each(|_| guest.report(DriverEvent::Device(refused.clone())));
    };
    refuse();
    assert_eq!(told_of_devices(&mut world, &domain).await, [""; 0]);
    domain.suspend(&world.alice()).await.unwrap();
    let (wanted, soon) = (Wanted::Named("ua-b"), Duration::from_millis(1));
    let asked = domain.detach_device(&world.alice(), &verb::DETACH_DEVICE_ALIAS, wanted, Affect::default(), soon).await;
    assert!(matches!(asked, Err(Error::TimedOut(_))), "{asked:?}");
    refuse();
    domain.resume(&world.alice()).await.unwrap();
    let told = told_of_devices(&mut world, &domain).await;
    assert_eq!(told.iter().filter(|event| event.contains("RemovalFailed")).count(), 1, "{told:?}");
}

#[tokio::test]
async fn what_runs_follows_a_device_that_has_gone_though_nothing_can_be_stored() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::open(folder.path()).await;
    let domain = started(&mut world).await;
    // No file can take the place of a folder.
    let stored = folder.path().join(format!("state/domains/{}.xml", domain.uuid()));
    std::fs::remove_file(&stored).unwrap();
    std::fs::create_dir_all(stored.join("full")).unwrap();
    let wanted = Wanted::Named("ua-b");
    let gone =
        domain.detach_device(&world.alice(), &verb::DETACH_DEVICE_ALIAS, wanted, Affect::default(), LETTING_GO).await;
    gone.expect_err("it could not be stored");
    let told = told_of_devices(&mut world, &domain).await;
    assert!(told.len() == 1 && told[0].contains("Removed"), "{told:?}");
    assert!(!domain.xml(&world.alice(), Form::default()).await.unwrap().contains("vdb"));
}
