//! The agent in a guest as clients reach it: that of the test driver's machines, which speaks the protocol of real ones.

use crate::common::client::{Client, Domain, Refusal, options};
use crate::common::users::BOB;
use crate::common::{Daemon, PATIENCE, Setup};
use serde::Serialize;
use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::SystemTime;
use zbus::wire::DynamicType;
use zbus::{Message, OwnedVariant, Variant};

const MACHINE: &str = "<domain type='test'><name>web</name><memory>65536</memory><os><type>hvm</type></os><devices>\
     <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><target dev='card0'/></interface>\
     <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices></domain>";

type Addresses = Vec<(String, String, String, Vec<(String, u32)>)>;

fn refused<T>(answer: Result<T, Refusal>, error: &str, word: &str) {
    let Err((name, text)) = answer else { panic!("it is not refused for {word}") };
    assert!(name.ends_with(error) && text.contains(word), "{name}: {text}");
}

async fn told<T, B>(domain: &Domain, member: &str, asked: &B) -> Result<T, Refusal>
where
    T: serde::de::DeserializeOwned + zbus::Type,
    B: Serialize + DynamicType,
{
    Ok(domain.call(member, asked).await?.body().deserialize().expect(member))
}

async fn freeze(domain: &Domain, places: &[&str]) -> Result<u32, Refusal> {
    told(domain, "FreezeFilesystems", &(places, options([]))).await
}

async fn thaw(domain: &Domain) -> Result<u32, Refusal> {
    told(domain, "ThawFilesystems", &(options([]),)).await
}

async fn command(domain: &Domain, text: &str) -> Result<String, Refusal> {
    told(domain, "AgentCommand", &(text, options([]))).await
}

async fn info(domain: &Domain, groups: &[&str]) -> Result<HashMap<String, OwnedVariant>, Refusal> {
    told(domain, "GetGuestInfo", &(groups, options([]))).await
}

/// A machine of that document that runs.
async fn running(client: &Client, xml: &str) -> Domain {
    let domain = client.define(xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    domain
}

#[tokio::test]
async fn an_agent_tells_and_does_what_it_is_asked() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(MACHINE).await.expect("defined");
    assert!(!domain.property::<bool>("AgentConnected").await);
    refused(command(&domain, "{\"execute\":\"guest-ping\"}").await, "OperationInvalid", "start it first");
    domain.run("Start").await.expect("started");
    assert!(domain.property::<bool>("AgentConnected").await);

    assert_eq!(command(&domain, "{\"execute\":\"guest-ping\"}").await.expect("told"), "{\"return\":{}}");
    refused(command(&domain, "{\"execute\":\"guest-fly\"}").await, "Error.AgentFailed", "CommandNotFound");
    refused(command(&domain, "ping").await, "InvalidArgument", "JSON");
    let long = format!("{{\"execute\":\"{}\"}}", "x".repeat(1 << 20));
    refused(command(&domain, &long).await, "InvalidArgument", "1048576");
    for (key, value) in [("timeout-usec", Variant::from(0u64)), ("timeout-usec", Variant::from(u64::MAX))] {
        let wanted = ("{\"execute\":\"guest-ping\"}", options([(key, value)]));
        refused(domain.call("AgentCommand", &wanted).await, "InvalidArgument", "600000000");
    }

    let all = info(&domain, &[]).await.expect("told");
    let mut groups: Vec<_> = all.keys().map(String::as_str).collect();
    groups.sort_unstable();
    assert_eq!(groups, ["file-systems", "hostname", "interfaces", "os", "time-zone", "users"]);
    let types = |key: &str| all[key].value_signature().to_string();
    assert_eq!(["hostname", "os", "users", "interfaces"].map(types), ["s", "a{sv}", "aa{sv}", "aa{sv}"]);
    let some = info(&domain, &["hostname"]).await.expect("told");
    assert_eq!((some.len(), some["hostname"].downcast_ref::<&str>().expect("s")), (1, "web"));
    refused(info(&domain, &["load"]).await, "AgentFailed", "guest-get-load");
    refused(info(&domain, &["colour"]).await, "InvalidArgument", "file-systems");

    let addresses =
        async |source: &str| told::<Addresses, _>(&domain, "GetInterfaceAddresses", &(source, options([]))).await;
    let text = |text: &str| text.to_owned();
    let card = (text("eth0"), text("52:54:00:00:00:01"), text("card0"), vec![(text("192.0.2.1"), 24)]);
    assert_eq!(addresses("agent").await.expect("told"), [card]);
    assert_eq!((addresses("arp").await, addresses("lease").await), (Ok(Vec::new()), Ok(Vec::new())));
    refused(addresses("dns").await, "InvalidArgument", "agent, arp, lease");

    let time = async || told::<u64, _>(&domain, "GetTime", &()).await.expect("told");
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after it").as_micros() as u64;
    let (year, close) = (365 * 24 * 3600 * 1_000_000u64, 60_000_000);
    domain.call("SetTime", &(now() + year, options([]))).await.expect("set");
    assert!(time().await.abs_diff(now() + year) < close);
    domain.call("SetTime", &(7u64, options([("sync", Variant::from(true))]))).await.expect("set");
    assert!(time().await.abs_diff(now()) < close);
    refused(domain.call("SetTime", &(u64::MAX, options([]))).await, "InvalidArgument", "clock");

    domain.call("SetUserPassword", &("test", "new", options([("crypted", Variant::from(false))]))).await.expect("set");
    refused(domain.call("SetUserPassword", &("none", "new", options([]))).await, "AgentFailed", "only the user test");
    refused(domain.call("SetUserPassword", &("", "new", options([]))).await, "InvalidArgument", "name");
    assert_eq!(told(&domain, "TrimFilesystems", &(options([]),)).await, Ok(2u32));
    for member in ["TrimFilesystems", "ThawFilesystems"] {
        let unknown = domain.call(member, &(options([("fast", Variant::from(true))]),)).await;
        refused(unknown, "InvalidArgument", "'fast'");
    }

    refused(domain.call("SuspendGuest", &("bed", options([]))).await, "InvalidArgument", "hybrid");
    refused(domain.call("SuspendGuest", &("disk", options([]))).await, "AgentFailed", "guest-suspend-disk");
    domain.call("SuspendGuest", &("mem", options([]))).await.expect("asked");
    assert_eq!(domain.state().await.0, "pmsuspended");
    refused(command(&domain, "{\"execute\":\"guest-ping\"}").await, "OperationInvalid", "wake it first");
    domain.bare("Wakeup").await.expect("woken");
}

#[tokio::test]
async fn a_guest_ends_by_its_agent_and_its_property_with_it() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(MACHINE).await.expect("defined");
    let mode = |mode: &str| (options([("mode", Variant::from(mode.to_owned()))]),);
    for how in ["agent", "default", "acpi"] {
        domain.run("Start").await.expect("started");
        domain.call("Reboot", &mode(how)).await.expect("asked");
        domain.call("Shutdown", &mode(how)).await.expect("asked");
        let off = async { while domain.property::<bool>("Active").await {} };
        tokio::time::timeout(PATIENCE, off).await.expect(how);
        assert!(!domain.property::<bool>("AgentConnected").await);
    }
    refused(domain.call("Shutdown", &mode("axe")).await, "InvalidArgument", "'axe'");
    let bare = MACHINE.replace("<name>web<", "<name>bare<").replace("org.qemu.guest_agent.0", "org.test.0");
    let bare = running(&client, &bare.replace("52:54:00:00:00:01", "52:54:00:00:00:02")).await;
    assert!(!bare.property::<bool>("AgentConnected").await);
    refused(bare.call("Shutdown", &mode("agent")).await, "AgentUnavailable", "org.qemu.guest_agent.0");
    refused(command(&bare, "{\"execute\":\"guest-ping\"}").await, "AgentUnavailable", "org.qemu.guest_agent.0");
    bare.call("Shutdown", &mode("default")).await.expect("by its button");
}

#[tokio::test]
async fn a_freeze_ends_with_its_caller() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = running(&client, MACHINE).await;
    assert_eq!(freeze(&domain, &["/home", "/none"]).await, Ok(1));
    refused(freeze(&domain, &[]).await, "OperationInvalid", "thaw them first");
    refused(info(&domain, &["hostname"]).await, "AgentFailed", "frozen");
    assert_eq!((thaw(&domain).await, thaw(&domain).await), (Ok(1), Ok(0)));
    assert_eq!(freeze(&domain, &["/none"]).await, Ok(0), "what is not there is not frozen");
    assert_eq!(freeze(&domain, &[]).await, Ok(2));

    // Somebody else may thaw, too, and then it is not theirs any more.
    let other = Client { connection: daemon.connect().await };
    let theirs = other.named("web").await.expect("there");
    assert_eq!((thaw(&theirs).await, freeze(&theirs, &[]).await), (Ok(2), Ok(2)));
    refused(freeze(&domain, &[]).await, "OperationInvalid", "thaw them first");
    other.connection.close().await.expect("closed");
    daemon.has_logged("its file systems are thawed", 1).await;
    assert_eq!(freeze(&domain, &[]).await, Ok(2), "it is frozen by us now");
    // The end of the guest is the end of it, too.
    domain.run("Destroy").await.expect("destroyed");
    domain.run("Start").await.expect("started");
    assert_eq!(freeze(&domain, &[]).await, Ok(2));
}

#[tokio::test]
async fn a_snapshot_is_taken_of_file_systems_that_nobody_else_has_frozen() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let disk =
        "<devices><disk type='file'><driver type='qcow2'/><source file='/images/web.qcow2'/><target dev='vda'/></disk>";
    let domain = running(&client, &MACHINE.replace("<devices>", disk)).await;
    let take = async |name: &str| {
        let quiesce = options([("disk-only", Variant::from(true)), ("quiesce", Variant::from(true))]);
        let document = format!("<domainsnapshot><name>{name}</name></domainsnapshot>");
        domain.call("CreateSnapshot", &(document.as_str(), quiesce)).await
    };
    take("one").await.expect("taken");
    assert_eq!(freeze(&domain, &[]).await, Ok(2), "it was thawed");
    refused(take("two").await, "OperationInvalid", "thaw them first");
    let memory = domain.call("CreateSnapshot", &("<domainsnapshot/>", options([]))).await;
    refused(memory, "OperationInvalid", "thaw them first");
    assert_eq!(thaw(&domain).await, Ok(2), "that has thawed nothing");
    take("two").await.expect("taken");
}

#[tokio::test]
async fn a_program_in_the_guest_is_a_job() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = running(&client, MACHINE).await;
    let exec = async |argv: &[&str], wanted: &[(&str, Variant<'_>)]| {
        let wanted = options(wanted.iter().map(|(key, value)| (*key, value.try_clone().expect("no descriptor"))));
        told::<(i32, zbus::OwnedObjectPath), _>(&domain, "GuestExec", &(argv, wanted)).await
    };
    let state = async |job: &str| client.property::<String>(job, "org.virt.Job", "State").await;
    let env = ("env", Variant::from(vec!["A=b".to_owned()]));
    let (status, job) = exec(&["/bin/false", "x"], &[env]).await.expect("run");
    assert_eq!((status, state(job.as_str()).await.as_str()), (1, "succeeded"));
    assert_eq!(client.property::<String>(job.as_str(), "org.virt.Job", "Operation").await, "guest-exec");
    refused(exec(&["/bin/fly"], &[]).await, "AgentFailed", "no such program");
    refused(exec(&[], &[]).await, "InvalidArgument", "no program");
    refused(exec(&["/bin/true"], &[("env", Variant::from(vec!["A".to_owned()]))]).await, "InvalidArgument", "'A'");
    refused(exec(&["/bin/true"], &[("stdout", Variant::from(1u32))]).await, "InvalidArgument", "h, a descriptor");
    refused(exec(&["/bin/sleep"], &[("timeout-usec", Variant::from(1000u64))]).await, "TimedOut", "goes on");

    // What others read of a job is no word of the guest's.
    let jobs = client.call("/org/virt", "org.virt.Manager.GetJobs", &()).await.expect("told");
    let jobs: Vec<zbus::OwnedObjectPath> = jobs.body().deserialize().expect("ao");
    for job in &jobs {
        let text = client.property::<String>(job.as_str(), "org.virt.Job", "ErrorMessage").await;
        assert!(!text.contains("no such program"), "{text}");
    }

    let (status, job) = exec(&["/bin/sleep"], &[("no-wait", Variant::from(true))]).await.expect("accepted");
    assert_eq!(status, -1);
    // It keeps nobody from the machine.
    domain.bare("Suspend").await.expect("suspended");
    domain.bare("Resume").await.expect("resumed");
    assert_eq!(command(&domain, "{\"execute\":\"guest-ping\"}").await.expect("told"), "{\"return\":{}}");
    let mut watch = client.watch().await;
    client.call(job.as_str(), "org.virt.Job.Cancel", &()).await.expect("cancelled");
    loop {
        let message = watch.next().await;
        if message.header().member().is_some_and(|member| member == "Finished") {
            break;
        }
    }
    assert_eq!(state(job.as_str()).await, "cancelled");
}

/// A descriptor as an option.
fn file(of: impl Into<OwnedFd>) -> Variant<'static> {
    Variant::from(zbus::wire::Fd::from(zbus::wire::OwnedFd::from(of.into())))
}

/// A pipe that holds that and no more.
fn holds(bytes: &[u8]) -> std::io::PipeReader {
    let (ear, mut mouth) = std::io::pipe().expect("a pipe");
    mouth.write_all(bytes).expect("written");
    ear
}

/// What comes out of a pipe until its end.
async fn hears(ear: std::io::PipeReader) -> String {
    let heard = tokio::task::spawn_blocking(move || std::io::read_to_string(ear).expect("text"));
    tokio::time::timeout(PATIENCE, heard).await.expect("an end").expect("heard")
}

#[tokio::test]
async fn a_program_reads_and_prints_by_descriptors_of_its_caller() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = running(&client, MACHINE).await;
    let exec = async |argv: &[&str], wanted: Vec<(&'static str, Variant<'static>)>| {
        told::<(i32, zbus::OwnedObjectPath), _>(&domain, "GuestExec", &(argv, options(wanted))).await
    };
    let (ear, mouth) = std::io::pipe().expect("a pipe");
    let (complaints, complains) = std::io::pipe().expect("a pipe");
    let all = vec![("stdin", file(holds(b"through"))), ("stdout", file(mouth)), ("stderr", file(complains))];
    assert_eq!(exec(&["/bin/cat"], all).await.expect("run").0, 0);
    assert_eq!((hears(ear).await.as_str(), hears(complaints).await.as_str()), ("through", ""));
    let (ear, mouth) = std::io::pipe().expect("a pipe");
    let accepted = exec(&["echo", "a", "b"], vec![("stdout", file(mouth)), ("no-wait", Variant::from(true))]).await;
    assert_eq!((accepted.expect("accepted").0, hears(ear).await.as_str()), (-1, "a b\n"));
    let written = daemon.folder().join("printed");
    let printed = std::fs::File::create(&written).expect("made");
    assert_eq!(exec(&["echo", "kept"], vec![("stdout", file(printed))]).await.expect("run").0, 0);
    assert_eq!(std::fs::read_to_string(&written).expect("there"), "kept\n");

    // Who has closed its end wants nothing; that is no failure of the program's.
    let (ear, mouth) = std::io::pipe().expect("a pipe");
    drop(ear);
    assert_eq!(exec(&["echo"], vec![("stdout", file(mouth))]).await.expect("run").0, 0);

    let folder = || file(std::fs::File::open("/").expect("there"));
    refused(exec(&["cat"], vec![("stdin", folder())]).await, "InvalidArgument", "Is a directory");
    refused(exec(&["cat"], vec![("stdout", folder())]).await, "InvalidArgument", "reading alone");
    let (socket, _other) = std::os::unix::net::UnixStream::pair().expect("a pair");
    refused(
        exec(&["cat"], vec![("stderr", file(socket))]).await,
        "InvalidArgument",
        "stderr is of no use: it is a socket",
    );
    let zero = file(std::fs::File::open("/dev/zero").expect("there"));
    refused(exec(&["cat"], vec![("stdin", zero)]).await, "InvalidArgument", "1048576");
    let (_ear, mouth) = std::io::pipe().expect("a pipe");
    refused(exec(&["cat"], vec![("stdin", file(mouth))]).await, "InvalidArgument", "writing alone");
    let (ear, mouth) = std::io::pipe().expect("a pipe");
    refused(exec(&["fly"], vec![("stdout", file(mouth))]).await, "AgentFailed", "no such program");
    assert_eq!(hears(ear).await, "", "it is closed all the same");
}

/// What is said of a job that has ended.
const ENDED: [&str; 3] = ["succeeded", "failed", "cancelled"];

#[tokio::test]
async fn who_neither_writes_nor_reads_keeps_nobody_waiting_and_is_given_up() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = running(&client, MACHINE).await;
    let begin = async |wanted: Vec<(&'static str, Variant<'static>)>| {
        let wanted = options(wanted.into_iter().chain([("no-wait", Variant::from(true))]));
        let begun = told::<(i32, zbus::OwnedObjectPath), _>(&domain, "GuestExec", &(&["cat"][..], wanted)).await;
        begun.expect("accepted").1
    };
    let state = async |job: &str| client.property::<String>(job, "org.virt.Job", "State").await;
    let much = daemon.folder().join("much");
    std::fs::write(&much, vec![b'x'; 1 << 20]).expect("written");
    let (mut unread, mouth) = std::io::pipe().expect("a pipe");
    let much = file(std::fs::File::open(&much).expect("there"));
    let prints = begin(vec![("stdin", much), ("stdout", file(mouth))]).await;
    let (ear, mut unwritten) = std::io::pipe().expect("a pipe");
    let reads = begin(vec![("stdin", file(ear))]).await;

    // It is being written, so the agent is nobody's.
    let first = tokio::task::spawn_blocking(move || unread.read_exact(&mut [0]).map(|()| unread));
    let unread = tokio::time::timeout(PATIENCE, first).await.expect("in time").expect("read").expect("a byte");
    assert_eq!(command(&domain, "{\"execute\":\"guest-ping\"}").await.expect("told"), "{\"return\":{}}");
    for job in [&prints, &reads] {
        assert!(!ENDED.contains(&state(job.as_str()).await.as_str()));
        let mut watch = client.watch().await;
        client.call(job.as_str(), "org.virt.Job.Cancel", &()).await.expect("cancelled");
        while watch.next().await.header().member().is_none_or(|member| member != "Finished") {}
        assert_eq!(state(job.as_str()).await, "cancelled");
    }
    // What was not taken is no more, and nobody has the other end.
    assert!(hears(unread).await.len() < 1 << 20);
    let broken = tokio::task::spawn_blocking(move || while unwritten.write_all(b"x").is_ok() {});
    tokio::time::timeout(PATIENCE, broken).await.expect("closed").expect("written");

    // The end of the guest is the end of it, too.
    let (ear, _unwritten) = std::io::pipe().expect("a pipe");
    let reads = begin(vec![("stdin", file(ear))]).await;
    let mut watch = client.watch().await;
    domain.run("Destroy").await.expect("destroyed");
    while !ENDED.contains(&state(reads.as_str()).await.as_str()) {
        watch.next().await;
    }
    assert_eq!(state(reads.as_str()).await, "failed");
}

/// Each member, called in a way that would do.
async fn each(domain: &Domain) -> Vec<(&'static str, Result<Message, Refusal>)> {
    let none = || options([]);
    vec![
        ("GetInterfaceAddresses", domain.call("GetInterfaceAddresses", &("agent", none())).await),
        ("GetGuestInfo", domain.call("GetGuestInfo", &(&["os"][..], none())).await),
        ("GetTime", domain.bare("GetTime").await),
        ("SuspendGuest", domain.call("SuspendGuest", &("nowhere", none())).await),
        ("AgentCommand", domain.call("AgentCommand", &("{\"execute\":\"guest-ping\"}", none())).await),
        ("GuestExec", domain.call("GuestExec", &(&["true"][..], none())).await),
        ("SetTime", domain.call("SetTime", &(1u64, none())).await),
        ("SetUserPassword", domain.call("SetUserPassword", &("test", "secret", none())).await),
        ("FreezeFilesystems", domain.call("FreezeFilesystems", &(&["/none"][..], none())).await),
        ("ThawFilesystems", domain.run("ThawFilesystems").await),
        ("TrimFilesystems", domain.run("TrimFilesystems").await),
    ]
}

#[tokio::test]
async fn who_may_read_asks_and_who_may_act_inside_has_it_done() {
    let rules = "polkit.addRule(function(action, subject) { if (subject.user == 'virt-bob' && \
                 action.id == 'org.virt.domain.read') { return polkit.Result.NO; } });";
    let Some(daemon) = Daemon::on_system_bus(Setup { rules: rules.to_owned(), ..Setup::default() }).await else {
        return;
    };
    let domain = running(&Client { connection: daemon.connect().await }, MACHINE).await;
    let bob = Client { connection: daemon.connect_as(&BOB).await };
    for (member, answer) in each(&bob.named("web").await.expect("it is there for all")).await {
        let (error, action) = match member {
            "GetInterfaceAddresses" | "GetGuestInfo" | "GetTime" => ("AccessDenied", "org.virt.domain.read"),
            "SuspendGuest" => ("InteractiveAuthorizationRequired", "org.virt.domain.suspend"),
            _ => ("InteractiveAuthorizationRequired", "org.virt.domain.agent"),
        };
        refused(answer, error, action);
    }
    for (member, answer) in each(&domain).await {
        match member {
            "SuspendGuest" => refused(answer, "InvalidArgument", "nowhere"),
            _ => drop(answer.expect(member)),
        }
    }
    let log = daemon.log();
    assert!(!log.contains("secret") && !log.contains("guest-ping"), "{log}");
}
