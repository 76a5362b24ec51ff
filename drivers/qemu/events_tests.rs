//! Recorded transcripts and what is made of them. Lines are as QEMU 7.2 wrote them, without their timestamps.

use super::*;
use serde_json::json;

/// Feeds lines to a running guest; returns what came of it.
fn play(guest: &mut Guest, transcript: &str) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for line in transcript.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let message: Value = serde_json::from_str(line).expect(line);
        let name = message["event"].as_str().expect(line).to_owned();
        outcomes.extend(guest.take(&Event { name, data: message["data"].clone() }));
    }
    outcomes
}

fn running() -> Guest {
    Guest::found(Condition::Running)
}

fn reports(transcript: &str) -> Vec<DriverEvent> {
    let outcomes = play(&mut running(), transcript);
    outcomes
        .into_iter()
        .map(|outcome| match outcome {
            Outcome::Report(event) => event,
            Outcome::Reboot => panic!("no reboot was asked for"),
        })
        .collect()
}

const PAUSED: DriverEvent = DriverEvent::Suspended(Suspended::Paused);

#[test]
fn a_start_reports_nothing() {
    let mut guest = Guest::starting();
    let start = r#"{"event": "NIC_RX_FILTER_CHANGED", "data": {"path": "/machine"}}
        {"event": "RESUME"}"#;
    assert_eq!(play(&mut guest, start), []);
    assert_eq!(play(&mut guest, r#"{"event": "STOP"}"#), [Outcome::Report(PAUSED)]);
}

#[test]
fn a_guest_started_standing_is_resumed_aloud() {
    let mut guest = Guest::starting();
    guest.stands();
    assert_eq!(play(&mut guest, r#"{"event": "RESUME"}"#), [Outcome::Report(DriverEvent::Resumed)]);
}

#[test]
fn stop_and_resume_are_told_once_each() {
    let transcript = r#"{"event": "STOP"}
        {"event": "STOP"}
        {"event": "RESUME"}
        {"event": "RESUME"}"#;
    assert_eq!(reports(transcript), [PAUSED, DriverEvent::Resumed]);
}

#[test]
fn a_power_off_is_no_pause() {
    let transcript = r#"{"event": "POWERDOWN"}
        {"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}
        {"event": "STOP"}"#;
    assert_eq!(reports(transcript), [DriverEvent::PoweredOff { by: ShutdownBy::Guest, rebooting: false }]);
}

#[test]
fn a_reboot_that_ends_the_guest_is_told_as_one() {
    let transcript = r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}
        {"event": "STOP"}"#;
    assert_eq!(reports(transcript), [DriverEvent::PoweredOff { by: ShutdownBy::Guest, rebooting: true }]);
}

#[test]
fn the_host_can_power_off_and_old_qemu_does_not_say_who() {
    let host = r#"{"event": "SHUTDOWN", "data": {"guest": false, "reason": "host-ui"}}"#;
    assert_eq!(reports(host), [DriverEvent::PoweredOff { by: ShutdownBy::Host, rebooting: false }]);
    let old = r#"{"event": "SHUTDOWN"}"#;
    assert_eq!(reports(old), [DriverEvent::PoweredOff { by: ShutdownBy::Finished, rebooting: false }]);
}

#[test]
fn an_ending_process_is_no_power_off() {
    for reason in ["host-signal", "host-qmp-quit"] {
        let mut guest = running();
        let line = json!({ "event": "SHUTDOWN", "data": { "guest": false, "reason": reason } }).to_string();
        assert_eq!(play(&mut guest, &line), []);
        assert!(guest.is_ending());
    }
}

#[test]
fn a_guest_that_powered_off_can_be_reset_and_resumed() {
    let transcript = r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}
        {"event": "STOP"}
        {"event": "RESET", "data": {"guest": false, "reason": "host-qmp-system-reset"}}
        {"event": "RESUME"}
        {"event": "STOP"}"#;
    let off = DriverEvent::PoweredOff { by: ShutdownBy::Guest, rebooting: false };
    assert_eq!(reports(transcript), [off, DriverEvent::Resumed, PAUSED]);
}

#[test]
fn guest_resets_are_its_own_affair() {
    assert_eq!(reports(r#"{"event": "RESET", "data": {"guest": true, "reason": "guest-reset"}}"#), []);
}

#[test]
fn an_asked_for_reboot_is_silent() {
    let mut guest = running();
    guest.expect_reboot(true);
    let off = r#"{"event": "POWERDOWN"}
        {"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}
        {"event": "STOP"}"#;
    assert_eq!(play(&mut guest, off), [Outcome::Reboot]);
    let on = r#"{"event": "RESET", "data": {"guest": false, "reason": "host-qmp-system-reset"}}
        {"event": "RESUME"}"#;
    assert_eq!(play(&mut guest, on), []);
    let off = r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}"#;
    assert_eq!(play(&mut guest, off).len(), 1, "only one power-off was to be a reboot");
}

#[test]
fn a_reboot_that_fails_is_a_power_off() {
    let mut guest = running();
    guest.expect_reboot(true);
    play(&mut guest, r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}"#);
    let off = DriverEvent::PoweredOff { by: ShutdownBy::Guest, rebooting: false };
    assert_eq!(guest.reboot_failed(), Some(off));
    assert_eq!(guest.reboot_failed(), None);
}

#[test]
fn a_panic_is_no_pause() {
    let transcript = r#"{"event": "GUEST_PANICKED", "data": {"action": "pause"}}
        {"event": "GUEST_PANICKED", "data": {"action": "pause", "info": {"type": "hyper-v"}}}
        {"event": "STOP"}"#;
    assert_eq!(reports(transcript), [DriverEvent::Panicked]);
    assert_eq!(reports(r#"{"event": "GUEST_PANICKED", "data": {"action": "run"}}"#), []);
}

#[test]
fn a_failing_disk_is_the_cause_of_the_stop_that_follows() {
    let transcript = r#"{"event": "BLOCK_IO_ERROR", "data": {"device": "", "nospace": false, "node-name": "n", "reason": "Input/output error", "operation": "write", "action": "stop"}}
        {"event": "BLOCK_IO_ERROR", "data": {"device": "", "node-name": "n", "operation": "read", "action": "stop"}}
        {"event": "STOP"}
        {"event": "BLOCK_IO_ERROR", "data": {"device": "", "node-name": "n", "operation": "read", "action": "stop"}}
        {"event": "RESUME"}
        {"event": "STOP"}"#;
    assert_eq!(reports(transcript), [DriverEvent::Suspended(Suspended::IoError), DriverEvent::Resumed, PAUSED]);
    let reported = r#"{"event": "BLOCK_IO_ERROR", "data": {"device": "d", "operation": "read", "action": "report"}}
        {"event": "STOP"}"#;
    assert_eq!(reports(reported), [PAUSED]);
}

#[test]
fn a_watchdog_that_pauses_is_named() {
    let transcript = r#"{"event": "WATCHDOG", "data": {"action": "pause"}}
        {"event": "STOP"}"#;
    assert_eq!(reports(transcript), [DriverEvent::Suspended(Suspended::Watchdog)]);
    assert_eq!(reports(r#"{"event": "WATCHDOG", "data": {"action": "none"}}"#), []);
}

#[test]
fn sleep_and_wakeup() {
    let transcript = r#"{"event": "SUSPEND"}
        {"event": "RESET", "data": {"guest": true, "reason": "guest-reset"}}
        {"event": "WAKEUP"}
        {"event": "WAKEUP"}"#;
    assert_eq!(reports(transcript), [DriverEvent::PmSuspended(PmSuspended::Memory), DriverEvent::Woken]);
    let disk = r#"{"event": "SUSPEND_DISK"}
        {"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}
        {"event": "STOP"}"#;
    let off = DriverEvent::PoweredOff { by: ShutdownBy::Guest, rebooting: false };
    assert_eq!(reports(disk), [DriverEvent::PmSuspended(PmSuspended::Disk), off]);
}

#[test]
fn the_unknown_means_nothing() {
    let transcript = r#"{"event": "RTC_CHANGE", "data": {"offset": 3}}
        {"event": "SHUTDOWN_TOMORROW", "data": []}
        {"event": "WATCHDOG"}
        {"event": "BLOCK_IO_ERROR", "data": {"action": "levitate"}}"#;
    assert_eq!(reports(transcript), []);
}

#[test]
fn what_changed_in_a_silence_is_news() {
    let mut guest = running();
    assert_eq!(guest.found_again(Condition::Running), None);
    assert_eq!(
        guest.found_again(Condition::Suspended(Suspended::IoError)).unwrap(),
        DriverEvent::Suspended(Suspended::IoError)
    );
    assert_eq!(guest.found_again(Condition::Running), Some(DriverEvent::Resumed));
    assert_eq!(guest.found_again(Condition::Panicked), Some(DriverEvent::Panicked));
}

#[test]
fn every_status_is_a_condition() {
    assert_eq!(condition("running"), Condition::Running);
    assert_eq!(condition("prelaunch"), Condition::Suspended(Suspended::Paused));
    assert_eq!(condition("shutdown"), Condition::PoweredOff);
    assert_eq!(condition("of-tomorrow"), Condition::Suspended(Suspended::Paused));
}
