//! Guests that outlive the driver that started them, and those that do not.

mod fixture;

use fixture::{Guest, House, POWER_OFF, exists};
use serde_json::json;
use std::time::{Duration, Instant};
use virt_model::driver::*;
use virt_model::state::{ShutdownBy, Suspended};

const PAUSED: Condition = Condition::Suspended(Suspended::Paused);

#[tokio::test(flavor = "multi_thread")]
async fn a_running_guest_is_found_and_goes_on() {
    let Some(mut house) = House::session() else { return };
    let mut guest = house.tick(POWER_OFF).await;
    guest.serial.says("C00000001").await;
    let (mut guest, condition) = house.find(guest, Condition::Running).await.unwrap();
    assert_eq!(condition, Condition::Running);
    guest.serial.says("C00000003").await;
    guest.instance.suspend().await.unwrap();
    assert_eq!(guest.seen.reported(), Some(DriverEvent::Suspended(Suspended::Paused)));
    let (mut guest, condition) = house.find(guest, Condition::Running).await.unwrap();
    assert_eq!(condition, PAUSED, "state from QEMU, not from what was last known");
    guest.instance.resume().await.unwrap();
    assert_eq!(guest.seen.reported(), Some(DriverEvent::Resumed));
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_befell_it_meanwhile_is_seen() {
    let Some(mut house) = House::session() else { return };
    let mut guest = house.tick(POWER_OFF).await;
    guest.serial.says("B00000001").await;
    guest.instance.shutdown(ShutdownMode::Default).await.unwrap();
    guest.seen.report().await;
    let (guest, condition) = house.find(guest, Condition::Running).await.unwrap();
    assert_eq!(condition, Condition::PoweredOff);
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reboot_asked_of_the_last_virtd_is_finished_by_the_next() {
    let Some(mut house) = House::session() else { return };
    let mut guest = house.tick(POWER_OFF).await;
    guest.serial.says("B00000001").await;
    // As if virtd had died between the question and the guest's power-off.
    guest.instance.shutdown(ShutdownMode::Default).await.unwrap();
    guest.seen.report().await;
    let mut record = guest.seen.record();
    record["rebooting"] = json!(true);
    guest.seen.recorder().record(record).unwrap();
    let (mut guest, condition) = house.find(guest, Condition::Running).await.unwrap();
    assert_eq!(condition, Condition::Running);
    guest.serial.says("B00000002").await;
    assert_eq!(guest.seen.record()["rebooting"], false);
    guest.instance.shutdown(ShutdownMode::Default).await.unwrap();
    assert_eq!(guest.seen.report().await, DriverEvent::PoweredOff { by: ShutdownBy::Guest, rebooting: false });
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_died_meanwhile_is_gone() {
    let Some(mut house) = House::session() else { return };
    let guest = house.tick(POWER_OFF).await;
    let (pid, dir) = (guest.pid(), guest.seen.runtime_dir.clone());
    guest.signal(libc::SIGKILL);
    assert!(house.find(guest, Condition::Running).await.is_none());
    assert!(!exists(pid) && std::fs::read_dir(dir).unwrap().next().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_was_cut_off_is_ended() {
    let Some(mut house) = House::session() else { return };
    let guest = house.tick(POWER_OFF).await;
    let (pid, mut record) = (guest.pid(), guest.seen.record());
    record["phase"] = json!("spawned");
    guest.seen.recorder().record(record).unwrap();
    assert!(house.find(guest, Condition::Running).await.is_none());
    assert!(!exists(pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_with_the_same_number_is_left_alone() {
    let Some(mut house) = House::session() else { return };
    for (field, value) in [("start_time", json!(1)), ("boot_id", json!("another"))] {
        for phase in ["spawned", "running"] {
            let mut stranger = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
            let def = house.def(POWER_OFF, "").await;
            let (launch, seen) = house.launch(def.clone());
            let mut process = json!({
                "pid": stranger.id(),
                "start_time": start_time(stranger.id()),
                "boot_id": std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim(),
            });
            process[field] = value.clone();
            let record = json!({
                "phase": phase, "uuid": def.uuid, "exe": "/usr/bin/sleep", "log_start": 0,
                "monitor": launch.runtime_dir.join("monitor.sock"), "process": process,
            });
            house.next_driver();
            let (found, _seen) = house.reconnect(&def, record, seen, Condition::Running);
            assert!(house.driver.reconnect(found).await.unwrap().is_none());
            assert!(stranger.try_wait().unwrap().is_none(), "it lives");
            stranger.kill().unwrap();
            stranger.wait().unwrap();
        }
    }
}

fn start_time(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_guest_is_held_and_heard_when_it_answers() {
    let Some(mut house) = House::session() else { return };
    let mut guest = house.tick(POWER_OFF).await;
    guest.serial.says("C00000001").await;
    guest.signal(libc::SIGSTOP);
    let begun = Instant::now();
    // It is thought to stand; QEMU will say that it runs.
    let (mut guest, condition) = house.find(guest, PAUSED).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(condition, PAUSED);
    assert!(matches!(guest.instance.suspend().await, Err(DriverError::TimedOut(_))));
    guest.signal(libc::SIGCONT);
    assert_eq!(guest.seen.report().await, DriverEvent::Resumed);
    guest.instance.suspend().await.unwrap();
    assert_eq!(guest.seen.reported(), Some(DriverEvent::Suspended(Suspended::Paused)));
    guest.destroy().await;
}

/// As a virtd leaves a guest that is killed once what was saved of it has been loaded.
async fn loaded(guest: &mut Guest) {
    guest.serial.says("C00000001").await;
    guest.instance.suspend().await.unwrap();
    let mut record = guest.seen.record();
    record["phase"] = json!("loaded");
    guest.seen.recorder().record(record).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loaded_guest_runs_once_that_is_kept_and_not_before() {
    let Some(mut house) = House::session() else { return };
    let mut guest = house.tick(POWER_OFF).await;
    loaded(&mut guest).await;
    guest.seen.recorder().is_full(true);
    let (mut guest, condition) = house.find(guest, Condition::Running).await.unwrap();
    assert_eq!(condition, PAUSED);
    let refused = guest.instance.resume().await.unwrap_err().to_string();
    assert!(refused.contains("stands: that the guest goes on cannot be kept"), "{refused}");
    assert_eq!((guest.seen.reported(), guest.seen.recorder().marked()), (None, false));
    guest.seen.recorder().is_full(false);
    assert_eq!(guest.seen.report().await, DriverEvent::Resumed);
    assert!(guest.seen.recorder().marked());
    assert_eq!(guest.seen.record()["phase"], "running");
    guest.serial.says("C00000003").await;
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loaded_guest_that_is_hung_goes_on_when_it_answers() {
    let Some(mut house) = House::session() else { return };
    let mut guest = house.tick(POWER_OFF).await;
    loaded(&mut guest).await;
    guest.signal(libc::SIGSTOP);
    let (mut guest, condition) = house.find(guest, Condition::Running).await.unwrap();
    assert_eq!((condition, guest.seen.recorder().marked()), (Condition::Running, false));
    guest.signal(libc::SIGCONT);
    guest.serial.says("C00000003").await;
    assert!(guest.seen.recorder().marked());
    assert_eq!(guest.seen.reported(), None, "it was taken to run");
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_guest_that_is_found_can_be_destroyed() {
    let Some(mut house) = House::session() else { return };
    let guest = house.tick(POWER_OFF).await;
    guest.signal(libc::SIGSTOP);
    let (guest, condition) = house.find(guest, Condition::Running).await.unwrap();
    assert_eq!(condition, Condition::Running);
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_record_is_an_error_and_touches_nothing() {
    let Some(mut house) = House::session() else { return };
    let guest = house.tick(POWER_OFF).await;
    let (_, elsewhere) = house.launch(house.def(POWER_OFF, "").await);
    let (found, _) = house.reconnect(&guest.live, json!({ "phase": "of tomorrow" }), elsewhere, Condition::Running);
    assert!(matches!(house.driver.reconnect(found).await, Err(DriverError::Internal(_))));
    let (guest, _) = house.find(guest, Condition::Running).await.unwrap();
    guest.destroy().await;
}
