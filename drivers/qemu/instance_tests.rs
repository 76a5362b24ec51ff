//! Instances on a process that is not QEMU and a monitor whose other end is ours: what real ones do too seldom.

use super::*;
use crate::DriverConfig;
use crate::host::process::Identity;
use crate::qemu::companion::Recorded;
use crate::qemu::events::Guest;
use crate::qemu::record::{Phase, Record};
use rustix::process::set_parent_process_death_signal;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use virt_model::driver::{Condition, DriverEvent, EventStream, Recorder, reports};

struct Nowhere;

impl Recorder for Nowhere {
    fn record(&self, _record: Value) -> std::io::Result<()> {
        Ok(())
    }
}

/// The other end of the monitor, after the hello.
type Peer = BufReader<UnixStream>;

async fn answer(peer: &mut Peer, before: &str, reply: &str) {
    let mut line = String::new();
    peer.read_line(&mut line).await.unwrap();
    let id = &serde_json::from_str::<Value>(&line).unwrap()["id"];
    peer.get_mut().write_all(format!("{before}{{{reply}, \"id\": {id}}}\n").as_bytes()).await.unwrap();
}

/// A process in a group of its own that finds its standard input closed when all is ready. It ends with the test's thread at last.
fn process(program: &str) -> (Identity, Process) {
    process_saying(program, Stdio::null())
}

#[allow(clippy::zombie_processes, reason = "reaped by its pidfd")]
fn process_saying(program: &str, output: Stdio) -> (Identity, Process) {
    let mut command = std::process::Command::new("sh");
    command.args(["-c", program]).stdin(Stdio::piped()).stdout(output).process_group(0);
    // SAFETY: one system call.
    unsafe { command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?)) };
    let child = command.spawn().unwrap();
    let identity = Identity::of(child.id() as i32).unwrap();
    let process = Process::new(identity.open().unwrap().unwrap()).unwrap();
    (identity, process)
}

async fn guest(program: &str) -> (QemuInstance, Peer, EventStream, i32) {
    guest_with(program, Vec::new()).await
}

/// What such a guest has: a port for an agent, of which nobody listens.
fn machine() -> DomainDef {
    let channel = "<channel type='unix'><source mode='bind' path='/nowhere/agent.sock'/>\
                   <target type='virtio' name='org.qemu.guest_agent.0'/><alias name='channel0'/></channel>";
    let text = format!("<domain type='qemu'><name>d</name><memory>1</memory><devices>{channel}</devices></domain>");
    DomainDef::parse(&text).unwrap()
}

/// A guest on such a process, with companions.
async fn guest_with(program: &str, companions: Vec<Living>) -> (QemuInstance, Peer, EventStream, i32) {
    let (identity, process) = process(program);
    let (sink, reports) = reports();
    let reporter = Reporter::new(Guest::found(Condition::Running), sink, agent::device(&machine()));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = BufReader::new(theirs);
    peer.get_mut().write_all(b"{\"QMP\": {}}\n").await.unwrap();
    let hello = Qmp::negotiate(ours, reporter.ears(), Duration::from_secs(10));
    let (monitor, ()) = tokio::join!(hello, answer(&mut peer, "", "\"return\": {}"));
    let Ok(monitor) = monitor else { panic!("negotiated") };
    let uuid = Uuid::new_v4();
    let record = Record {
        phase: Phase::Running,
        uuid,
        exe: "/bin/sh".into(),
        monitor: "/nowhere".into(),
        log_start: 0,
        process: Some(identity.clone()),
        companions: Vec::new(),
        host_parts: Vec::new(),
        changes: Vec::new(),
        filtered: false,
        claims: Vec::new(),
        rebooting: false,
        frozen: false,
        cpu: None,
    };
    let instance = QemuInstance::new(Body {
        uuid,
        process,
        companions: Companions::of(companions),
        lost: Mutex::default(),
        monitor: Mutex::new(Some(Arc::new(monitor))),
        reporter,
        keeper: Arc::new(Keeper::new(Arc::new(Nowhere), record)),
        log: Log::found(Path::new("/nowhere"), 0),
        leavings: Leavings {
            uuid,
            runtime_dir: "/nowhere".into(),
            ledger: None,
            claims: Default::default(),
            own_network: None,
        },
        ends_on_reboot: false,
        requested: AtomicBool::new(false),
        gone: watch::Sender::new(false),
        turn: tokio::sync::Mutex::default(),
        agent: Port::of(&machine()),
        drawing: tokio::sync::Mutex::default(),
        pressing: tokio::sync::Mutex::default(),
        consoles: Consoles::default(),
        threads: Mutex::default(),
        settling: Mutex::default(),
        withheld: Mutex::default(),
    });
    (instance, peer, reports, identity.pid)
}

#[tokio::test]
async fn a_process_ends_with_the_test_that_has_it() {
    let runtime = tokio::runtime::Handle::current();
    let test = std::thread::spawn(move || {
        let _within = runtime.enter();
        process("exec sleep 1000").1
    });
    let ended = timeout(Duration::from_secs(20), test.join().unwrap().ended()).await;
    assert_eq!(ended.expect("it does not outlive its test"), End::Signal(9));
}

#[tokio::test]
async fn a_process_without_its_monitor_is_ended_and_told_as_dead() {
    let (_instance, peer, mut reports, pid) = guest("exec sleep 1000").await;
    drop(peer);
    let told = reports.recv().await.unwrap();
    let DriverEvent::Exited(Exit::Died(words)) = told else { panic!("{told:?}") };
    assert!(words.starts_with("QEMU closed its monitor"), "{words}");
    assert_eq!(reports.recv().await, None);
    assert!(!Path::new("/proc").join(pid.to_string()).exists());
}

#[tokio::test]
async fn a_guest_whose_companion_it_cannot_be_without_has_gone_is_ended() {
    let beside = |name: &str, loss, (identity, process)| Living {
        recorded: Recorded { name: name.into(), process: identity, loss },
        process,
    };
    let (mut output, input) = std::io::pipe().unwrap();
    let companions = vec![
        beside("one", Loss::Bear, process("read line; exit 1")),
        beside("two", Loss::Bear, process_saying("sleep 1000 & wait", input.into())),
        beside("three", Loss::Fatal, process("read line; exit 3")),
    ];
    let (_instance, _peer, mut reports, _) = guest_with("exec sleep 1000", companions).await;
    let told = reports.recv().await.unwrap();
    let why = "three ended with code 3 while the guest runs";
    assert_eq!(told, DriverEvent::Exited(Exit::Died(why.into())));
    // Comes to its end when nobody is left who could write: what the second has started has gone, too.
    assert_eq!(output.read_to_end(&mut Vec::new()).unwrap(), 0);
}

#[tokio::test]
async fn what_was_said_last_is_told_before_the_end() {
    let (instance, mut peer, mut reports, _) = guest("exec sleep 1000").await;
    let events = "{\"event\": \"STOP\"}\n{\"event\": \"RESUME\"}\n";
    peer.get_mut().write_all(events.as_bytes()).await.unwrap();
    instance.body.process.signal(Signal::KILL).unwrap();
    drop(peer);
    let mut told = Vec::new();
    while let Some(event) = reports.recv().await {
        told.push(event);
    }
    assert_eq!(told.len(), 3, "{told:?}");
    assert_eq!(told[2], DriverEvent::Exited(Exit::Died("QEMU was ended by signal 9".into())));
}

/// M1: a guest that stops and goes on without end is destroyed as any other, and of what it reported little is stored.
#[tokio::test]
async fn a_guest_that_reports_without_end_can_be_destroyed() {
    let (instance, mut peer, mut reports, pid) = guest("trap '' TERM; while :; do sleep 1; done").await;
    let flood = tokio::spawn(async move {
        let events = "{\"event\": \"STOP\"}\n{\"event\": \"RESUME\"}\n".repeat(1000);
        let mut sent = 0;
        while peer.get_mut().write_all(events.as_bytes()).await.is_ok() {
            sent += 2000;
        }
        sent
    });
    assert!(matches!(reports.recv().await, Some(DriverEvent::Suspended(_))));
    instance.destroy(false).await.unwrap();
    assert!(!Path::new("/proc").join(pid.to_string()).exists());
    let told: Vec<_> = std::iter::from_fn(|| reports.try_recv().ok()).collect();
    assert!(told.len() <= 64 && told.last() == Some(&DriverEvent::Exited(Exit::Requested)), "{}", told.len());
    drop(instance);
    flood.abort();
}

/// M2: a monitor that is given up for what came from it says so in the guest's last words.
#[tokio::test]
async fn a_monitor_that_talks_nonsense_is_given_up_and_the_guest_told_as_dead() {
    let (_instance, mut peer, mut reports, _) = guest("exec sleep 1000").await;
    let line = "x".repeat(1 << 20);
    while peer.get_mut().write_all(line.as_bytes()).await.is_ok() {}
    let told = reports.recv().await.unwrap();
    let DriverEvent::Exited(Exit::Died(words)) = told else { panic!("{told:?}") };
    assert!(words.contains("monitor was given up, as a line is longer than"), "{words}");
}

#[tokio::test]
async fn an_end_by_itself_is_in_order_only_with_code_0() {
    let (_zero, _peer, mut reports, _) = guest("read line; exit 0").await;
    assert_eq!(reports.recv().await, Some(DriverEvent::Exited(Exit::Orderly)));
    let (_one, _peer, mut reports, _) = guest("read line; exit 1").await;
    assert_eq!(reports.recv().await, Some(DriverEvent::Exited(Exit::Died("QEMU ended with code 1".into()))));
}

#[tokio::test]
async fn refusals_are_told_in_qemus_words() {
    let (instance, mut peer, _reports, _) = guest("exec sleep 1000").await;
    let refuse = answer(&mut peer, "", r#""error": {"class": "GenericError", "desc": "Resetting is required"}"#);
    let (resumed, ()) = tokio::join!(instance.resume(), refuse);
    let error = resumed.unwrap_err();
    assert_eq!(error.to_string(), "cont: Resetting is required");
    instance.destroy(false).await.unwrap();
    assert!(matches!(instance.resume().await, Err(DriverError::Gone)));
}

#[tokio::test]
async fn a_reboot_that_qemu_refuses_is_told_as_a_power_off() {
    let (instance, mut peer, mut reports, _) = guest("exec sleep 1000").await;
    let off = "{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-shutdown\"}}\n";
    let play = async {
        answer(&mut peer, off, "\"return\": {}").await;
        answer(&mut peer, "", r#""error": {"class": "GenericError", "desc": "no"}"#).await;
    };
    let (asked, ()) = tokio::join!(instance.reboot(ShutdownMode::Acpi), play);
    asked.unwrap();
    assert!(matches!(reports.recv().await, Some(DriverEvent::PoweredOff { rebooting: false, .. })));
    instance.destroy(true).await.unwrap();
}

#[tokio::test]
async fn a_guest_whose_agent_does_not_answer_is_asked_by_its_power_button() {
    let (instance, mut peer, mut reports, _) = guest("exec sleep 1000").await;
    let port = |id: &str, open: bool| {
        json!({ "event": "VSERPORT_CHANGE", "data": { "id": id, "open": open } }).to_string() + "\n"
    };
    let unavailable = |asked: Result<(), DriverError>| matches!(asked, Err(DriverError::AgentUnavailable(_)));
    assert!(!instance.agent_connected() && unavailable(instance.shutdown(ShutdownMode::Agent).await));
    // Another port is none of the agent's; what is so already is no news.
    let events = [port("channel1", true), port("channel0", true), port("channel0", true), port("channel0", false)];
    peer.get_mut().write_all(events[0].as_bytes()).await.unwrap();
    assert_eq!(reports.recv().await, Some(DriverEvent::PortsChanged));
    let open = |device: &str| instance.body.reporter.is_open(device);
    assert!(!instance.agent_connected() && open("channel1") && !open("channel0"));
    peer.get_mut().write_all(events[1..3].concat().as_bytes()).await.unwrap();
    assert_eq!(reports.recv().await, Some(DriverEvent::PortsChanged));
    assert!(instance.agent_connected() && unavailable(instance.shutdown(ShutdownMode::Agent).await));
    let pressed = async {
        let mut line = String::new();
        peer.read_line(&mut line).await.unwrap();
        let asked: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(asked["execute"], "system_powerdown");
        let reply = json!({ "return": {}, "id": asked["id"] });
        peer.get_mut().write_all(format!("{reply}\n{}", events[3]).as_bytes()).await.unwrap();
    };
    let (asked, ()) = tokio::join!(instance.shutdown(ShutdownMode::Default), pressed);
    asked.unwrap();
    assert_eq!(reports.recv().await, Some(DriverEvent::PortsChanged));
    assert!(!instance.agent_connected());
    // While QEMU is looked for anew nobody knows, until it is asked; what it tells by itself is newer than that.
    let reporter = instance.body.reporter.clone();
    reporter.hold();
    assert_eq!(reporter.agent_is_connected(), None);
    peer.get_mut().write_all(port("channel0", true).as_bytes()).await.unwrap();
    assert_eq!(reports.recv().await, Some(DriverEvent::PortsChanged));
    reporter.agent_found(|_| false);
    assert!(instance.agent_connected());
    // Of which nothing was heard since is as it was found.
    assert!(reporter.is_open("channel0") && reporter.is_open("channel1"));
    reporter.ports_found(["channel2".to_owned()]);
    assert!(reporter.is_open("channel0") && !reporter.is_open("channel1") && reporter.is_open("channel2"));
    assert_eq!(reports.recv().await, Some(DriverEvent::PortsChanged));
    instance.destroy(false).await.unwrap();
}

#[tokio::test]
async fn an_agents_port_is_known_while_it_is_plugged_in() {
    let (instance, mut peer, mut reports, _) = guest("exec sleep 1000").await;
    let opened = json!({ "event": "VSERPORT_CHANGE", "data": { "id": "channel0", "open": true } }).to_string() + "\n";
    let (with, without) = (machine(), DomainDef { devices: Default::default(), ..machine() });
    let asked = async || instance.shutdown(ShutdownMode::Agent).await.unwrap_err().to_string();
    let body = &instance.body;
    body.has_agent_of(&with);
    assert!(asked().await.contains("no guest agent is connected"));
    body.has_agent_of(&without);
    assert!(asked().await.contains("no channel"));
    body.has_agent_of(&with);
    peer.get_mut().write_all(opened.as_bytes()).await.unwrap();
    assert_eq!(reports.recv().await, Some(DriverEvent::PortsChanged));
    // Another device changes nothing about it.
    body.has_agent_of(&with);
    assert!(instance.agent_connected());
    body.has_agent_of(&without);
    assert_eq!(reports.recv().await, Some(DriverEvent::PortsChanged));
    assert!(!instance.agent_connected() && asked().await.contains("no channel"));
    instance.destroy(false).await.unwrap();
}

#[tokio::test]
async fn dropping_an_instance_leaves_the_guest_alone() {
    let (instance, _peer, mut reports, pid) = guest("exec sleep 1000").await;
    let (body, log) = (instance.body.clone(), instance.body.log.clone());
    drop(instance);
    assert!(Path::new("/proc").join(pid.to_string()).exists());
    assert_eq!(log.last_words(), "");
    body.process.signal(Signal::KILL).unwrap();
    body.process.ended().await;
    assert!(reports.try_recv().is_err(), "nobody watches any more");
}

#[tokio::test]
async fn x7_a_tray_that_the_guest_closes_meanwhile_is_opened_again() {
    use virt_model::device::{Alias, Disk};
    let (instance, mut peer, mut reports, _) = guest("exec sleep 1000").await;
    let mut drive = Disk::default();
    drive.info.alias = Some(Alias { name: "sata0-0-0".into(), ..Alias::default() });
    let done = "\"return\": {}";
    let closed = "\"error\": {\"class\": \"GenericError\", \"desc\": \"Tray of device 'sata0-0-0' is not open\"}";
    let there = "\"return\": [{\"qdev\": \"sata0-0-0\"}]";
    let steps = [
        ("query-named-block-nodes", "\"return\": []"),
        ("query-block", there),
        ("blockdev-open-tray", done),
        ("blockdev-remove-medium", closed),
        ("blockdev-open-tray", done),
        ("blockdev-remove-medium", done),
        ("blockdev-close-tray", done),
    ];
    let script = async {
        for (verb, reply) in steps {
            answers(&mut peer, verb, reply).await;
        }
    };
    let change = crate::qemu::media::change(&instance.body, &drive, Default::default(), |_| None, async |_| Ok(()));
    let (changed, ()) = tokio::join!(change, script);
    changed.unwrap();
    drop(peer);
    assert!(reports.recv().await.is_some(), "the process without its monitor ends");
}

/// QEMU is asked that, and answers so.
async fn answers(peer: &mut (impl AsyncBufReadExt + AsyncWriteExt + Unpin), verb: &str, reply: &str) {
    let mut line = String::new();
    peer.read_line(&mut line).await.unwrap();
    let asked: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(asked["execute"], verb);
    let id = &asked["id"];
    peer.write_all(format!("{{{reply}, \"id\": {id}}}\n").as_bytes()).await.unwrap();
}

#[tokio::test]
async fn a_tray_that_stays_locked_is_told_from_a_qemu_that_does_not_answer() {
    use virt_model::device::{Alias, Disk};
    use virt_model::driver::MediumExchange;
    let (instance, mut peer, _reports, _) = guest("exec sleep 1000").await;
    let mut drive = Disk::default();
    drive.info.alias = Some(Alias { name: "sata0-0-0".into(), ..Alias::default() });
    let locked = "\"error\": {\"class\": \"GenericError\", \"desc\": \"Device 'sata0-0-0' is locked and force was not specified\"}";
    let how = MediumExchange { force: false, patience: Some(Duration::from_millis(20)) };
    let change = crate::qemu::media::change(&instance.body, &drive, how, |_| None, async |_| Ok(()));
    let script = async {
        answers(&mut peer, "query-named-block-nodes", "\"return\": []").await;
        answers(&mut peer, "query-block", "\"return\": [{\"qdev\": \"sata0-0-0\"}]").await;
        answers(&mut peer, "blockdev-open-tray", locked).await;
    };
    let (changed, ()) = tokio::join!(change, script);
    assert!(matches!(&changed, Err(DriverError::TrayLocked(why)) if why.contains("'force'")), "{changed:?}");
}

#[path = "plugging_tests.rs"]
mod plugging;
