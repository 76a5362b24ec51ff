//! Real guests under the QEMU driver: what the service sees of their life.

mod fixture;

use fixture::{House, IGNORE, PANIC, POWER_OFF, REBOOT, exists};
use std::time::{Duration, Instant};
use virt_model::driver::*;
use virt_model::state::{ShutdownBy, Suspended};

const OFF: DriverEvent = DriverEvent::PoweredOff { by: ShutdownBy::Guest, rebooting: false };
const PAUSED: DriverEvent = DriverEvent::Suspended(Suspended::Paused);

#[tokio::test(flavor = "multi_thread")]
async fn boots_and_powers_off_when_asked() {
    let Some(house) = House::session() else { return };
    let mut guest = house.tick(POWER_OFF).await;
    assert_eq!(guest.seen.record()["phase"], "running");
    let said = guest.seen.recorder.said().expect("as what it will run was said");
    assert_eq!(said.devices.disks, guest.live.devices.disks);
    assert!(said.devices.disks.iter().all(|disk| disk.info.alias.is_some()));
    guest.serial.says("B00000001").await;
    assert_eq!(guest.seen.reported(), None, "a start reports nothing");
    guest.instance.shutdown(ShutdownMode::Default).await.unwrap();
    assert_eq!(guest.seen.report().await, OFF);
    assert!(exists(guest.pid()), "the instance still stands");
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn is_suspended_and_resumed() {
    let Some(house) = House::session() else { return };
    let mut guest = house.tick(POWER_OFF).await;
    guest.serial.says("C00000001").await;
    guest.instance.suspend().await.unwrap();
    assert_eq!(guest.seen.reported(), Some(PAUSED));
    guest.instance.suspend().await.unwrap();
    assert_eq!(guest.seen.reported(), None);
    guest.instance.resume().await.unwrap();
    assert_eq!(guest.seen.reported(), Some(DriverEvent::Resumed));
    guest.serial.says("C00000003").await;
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_standing() {
    let Some(house) = House::session() else { return };
    let (launch, mut seen) = house.launch(house.def(POWER_OFF, "").await);
    let Running { instance, .. } = house.driver.start(Launch { paused: true, ..launch }).await.unwrap();
    assert_eq!(seen.reported(), None);
    instance.resume().await.unwrap();
    assert_eq!(seen.reported(), Some(DriverEvent::Resumed));
    instance.destroy(true).await.unwrap();
    assert_eq!(seen.reported(), Some(DriverEvent::Exited(Exit::Requested)));
}

/// The file that was judged when a start was accepted is the one that runs, whatever its path has come to mean.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_start_was_accepted_by_is_what_runs() {
    let Some(house) = House::session() else { return };
    let emulator = house.path("qemu-of-this-test");
    let becomes = |target: &str| {
        let new = house.path("new");
        std::os::unix::fs::symlink(target, &new).unwrap();
        std::fs::rename(&new, &emulator).unwrap();
    };
    becomes("/usr/bin/qemu-system-x86_64");
    let mut def = house.def(POWER_OFF, "").await;
    def.devices.emulator = Some(emulator.to_string_lossy().into_owned());
    let accepted = house.driver.can_start(&def).await.unwrap();
    becomes("/bin/false");
    let (launch, mut seen) = house.launch(def.clone());
    let Running { instance, .. } = house.driver.start(Launch { accepted, ..launch }).await.unwrap();
    instance.destroy(true).await.unwrap();
    assert_eq!(seen.reported(), Some(DriverEvent::Exited(Exit::Requested)));
    let refused = house.driver.can_start(&def).await.map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("qemu-of-this-test"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn comes_back_from_power_off_by_reset() {
    let Some(house) = House::session() else { return };
    let mut guest = house.tick(POWER_OFF).await;
    guest.serial.says("B00000001").await;
    guest.instance.shutdown(ShutdownMode::Acpi).await.unwrap();
    assert_eq!(guest.seen.report().await, OFF);
    guest.instance.reset().await.unwrap();
    assert_eq!(guest.seen.reported(), None);
    guest.instance.resume().await.unwrap();
    assert_eq!(guest.seen.reported(), Some(DriverEvent::Resumed));
    guest.serial.says("B00000002").await;
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reboots_without_a_word_when_asked() {
    let Some(house) = House::session() else { return };
    let mut guest = house.tick(POWER_OFF).await;
    guest.serial.says("B00000001").await;
    guest.instance.reboot(ShutdownMode::Default).await.unwrap();
    guest.serial.says("B00000002").await;
    assert_eq!(guest.seen.reported(), None);
    guest.instance.shutdown(ShutdownMode::Default).await.unwrap();
    assert_eq!(guest.seen.report().await, OFF, "the next power-off is one");
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_is_no_reboot_even_where_reboots_end_the_guest() {
    let Some(house) = House::session() else { return };
    let mut guest = house.start(house.def(REBOOT, "<on_reboot>destroy</on_reboot>").await).await;
    // Its second line: by then the number of this boot is on the disk, and the next boot counts on.
    guest.serial.says("C00000002 B00000001").await;
    guest.instance.reset().await.unwrap();
    guest.serial.says("B00000002").await;
    assert_eq!(guest.seen.reported(), None);
    // By then firmware is done with the reset, and a reboot is the guest's own again: 0x18 lines take 5 s and more.
    guest.serial.says("C00000018 B00000002").await;
    guest.instance.shutdown(ShutdownMode::Default).await.unwrap();
    let rebooting = DriverEvent::PoweredOff { by: ShutdownBy::Guest, rebooting: true };
    assert_eq!(guest.seen.report().await, rebooting);
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reboot_of_its_own_is_nobodys_affair() {
    let Some(house) = House::session() else { return };
    let mut guest = house.tick(REBOOT).await;
    guest.serial.says("B00000001").await;
    guest.instance.shutdown(ShutdownMode::Default).await.unwrap();
    guest.serial.says("B00000002").await;
    assert_eq!(guest.seen.reported(), None);
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_is_told_and_reset_brings_it_back() {
    let Some(house) = House::session() else { return };
    let device = "<qemu:commandline><qemu:arg value='-device'/><qemu:arg value='pvpanic'/></qemu:commandline>";
    let mut guest = house.start(house.def(PANIC, device).await).await;
    guest.serial.says("B00000001").await;
    guest.instance.shutdown(ShutdownMode::Default).await.unwrap();
    assert_eq!(guest.seen.report().await, DriverEvent::Panicked);
    guest.instance.reset().await.unwrap();
    guest.instance.resume().await.unwrap();
    assert_eq!(guest.seen.reported(), Some(DriverEvent::Resumed));
    guest.serial.says("B00000002").await;
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_ignores_its_button_runs_on_and_is_destroyed() {
    let Some(house) = House::session() else { return };
    let mut guest = house.tick(IGNORE).await;
    guest.serial.says("C00000001").await;
    guest.instance.shutdown(ShutdownMode::Default).await.unwrap();
    guest.serial.says("C00000003").await;
    assert_eq!(guest.seen.reported(), None);
    assert!(matches!(guest.instance.shutdown(ShutdownMode::Agent).await, Err(DriverError::AgentUnavailable(_))));
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_is_a_death_and_a_terminated_one_is_not() {
    let Some(house) = House::session() else { return };
    let mut killed = house.tick(POWER_OFF).await;
    killed.signal(libc::SIGKILL);
    assert_eq!(killed.seen.report().await, DriverEvent::Exited(Exit::Died("QEMU was ended by signal 9".into())));
    killed.nothing_is_left().await;
    let mut told = house.tick(POWER_OFF).await;
    told.signal(libc::SIGTERM);
    assert_eq!(told.seen.report().await, DriverEvent::Exited(Exit::Orderly));
    told.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_refuses_its_arguments_has_the_last_word() {
    let Some(house) = House::session() else { return };
    let nonsense = "<qemu:commandline><qemu:arg value='-nonsense'/></qemu:commandline>";
    let (launch, mut seen) = house.launch(house.def(POWER_OFF, nonsense).await);
    let error = house.driver.start(launch).await.err().unwrap();
    assert!(matches!(error, DriverError::Hypervisor(_)), "{error:?}");
    assert!(error.to_string().ends_with("-nonsense: invalid option"), "{error}");
    assert!(!error.to_string().contains('Z'), "no time stamps: {error}");
    assert!(!exists(seen.pid().unwrap()));
    seen.nothing_more().await;
    assert!(std::fs::read_dir(&seen.runtime_dir).unwrap().next().is_none(), "no runtime file");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_disk_is_named() {
    let Some(house) = House::session() else { return };
    let def = house.def(POWER_OFF, "").await;
    std::fs::remove_file(house.path(&format!("{}.qcow2", def.uuid))).unwrap();
    let (launch, _seen) = house.launch(def.clone());
    let error = house.driver.start(launch).await.err().unwrap().to_string();
    assert!(error.contains(&format!("{}.qcow2", def.uuid)) && error.contains("No such file"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kvm_is_refused_where_it_is_turned_off() {
    let Some(house) = House::session().map(House::without_kvm) else { return };
    let mut def = house.def(POWER_OFF, "").await;
    def.kind = "kvm".into();
    let (launch, _seen) = house.launch(def);
    let refused = house.driver.start(launch).await.err();
    let Some(DriverError::Config(findings)) = refused else { panic!("{refused:?}") };
    assert!(findings[0].message.contains("kvm = \"off\""), "{findings:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_start_leaves_nothing() {
    let Some(house) = House::session() else { return };
    for phase in ["none", "spawned"] {
        let (launch, seen) = house.launch(house.def(POWER_OFF, "").await);
        match phase {
            "none" => launch.cancel.cancel(),
            phase => seen.recorder.cancel_at(phase, &launch.cancel),
        }
        let error = house.driver.start(launch).await.err();
        assert!(matches!(error, Some(DriverError::Cancelled)), "{phase}: {error:?}");
        assert!(!seen.pid().is_some_and(exists), "{phase}");
        assert!(std::fs::read_dir(&seen.runtime_dir).unwrap().next().is_none(), "{phase}: no runtime file");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_nobody_waits_for_leaves_nothing() {
    let Some(house) = House::session() else { return };
    for phase in ["spawned", "running"] {
        let (launch, mut seen) = house.launch(house.def(POWER_OFF, "").await);
        let moment = seen.recorder.moment(phase);
        tokio::select! {
            biased;
            () = moment.cancelled() => {}
            // It may be done in the moment its last phase is recorded.
            started = house.driver.start(launch) => drop(started.map(|running| {
                tokio::spawn(async move { running.instance.destroy(false).await });
            })),
        }
        // All senders of reports are gone with the guest.
        seen.until_the_end().await;
        assert!(!exists(seen.pid().unwrap()), "{phase}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_qemu_is_left_when_asked_nicely_and_killed_when_not() {
    let Some(house) = House::session() else { return };
    let mut guest = house.tick(POWER_OFF).await;
    guest.serial.says("C00000001").await;
    guest.signal(libc::SIGSTOP);
    assert!(matches!(guest.instance.destroy(true).await, Err(DriverError::TimedOut(_))));
    assert!(exists(guest.pid()));
    let begun = Instant::now();
    guest.instance.destroy(false).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(guest.seen.reported(), Some(DriverEvent::Exited(Exit::Requested)));
    guest.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_start_and_end_at_once() {
    let Some(house) = House::session() else { return };
    let life = async || {
        let mut guest = house.tick(POWER_OFF).await;
        guest.serial.says("B00000001").await;
        guest.destroy().await;
    };
    tokio::join!(life(), life(), life(), life());
}
