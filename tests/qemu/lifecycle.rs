//! Real guests through the bus: every verb, what it signals, what it refuses.

use crate::common::client::{Client, Domain, Refusal, Watch, lifecycle_of, options};
use crate::common::guest::Tick;
use crate::common::{Daemon, PATIENCE};
use futures_util::StreamExt as _;
use zbus::Variant;
use zbus::message::Type;

/// A daemon, a client of it and a defined tick guest.
async fn tick(name: &str, extra: &str) -> Option<(Daemon, Client, Domain, Tick)> {
    let daemon = Daemon::on_session_bus().await?;
    let tick = Tick::new(&daemon, name, extra)?;
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&tick.xml).await.expect("defined");
    Some((daemon, client, domain, tick))
}

/// Events of the domain until it has stopped.
async fn to_the_end(watch: &mut Watch, domain: &Domain) -> Vec<String> {
    let mut seen = Vec::new();
    while seen.last().is_none_or(|event: &String| !event.starts_with("stopped")) {
        seen.push(watch.lifecycle(&domain.path).await);
    }
    seen
}

#[tokio::test]
async fn each_verb_signals_once_in_order_and_before_its_reply() {
    let Some((_daemon, client, domain, tick)) = tick("order", "").await else { return };
    let rule = zbus::MatchRule::builder().sender("org.virt").build().expect("a rule");
    let mut all = zbus::MessageStream::for_match_rule(rule, &client.connection, std::num::NonZeroUsize::new(1000))
        .await
        .expect("a match");

    domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    domain.bare("Suspend").await.expect("suspended");
    domain.bare("Resume").await.expect("resumed");
    domain.run("Shutdown").await.expect("asked");

    let mut story = Vec::new();
    while story.last().is_none_or(|last| last != "stopped shutdown") {
        let message = tokio::time::timeout(PATIENCE, all.next()).await.expect("in time").expect("open").expect("sound");
        match message.message_type() {
            Type::MethodReturn => story.push("reply".to_owned()),
            Type::Signal => story.extend(told(&message, &domain.path)),
            _ => {}
        }
    }
    // Shutdown returns when the guest has been asked, so its reply may come before or after what the guest does.
    let asked = story.iter().rposition(|one| one == "reply").expect("a reply to Shutdown");
    assert!(asked >= story.len() - 5, "{story:?}");
    story.remove(asked);
    assert_eq!(
        story,
        [
            "State running",
            "started booted",
            "reply",
            "State paused",
            "suspended paused",
            "reply",
            "State running",
            "resumed unpaused",
            "reply",
            "State shutdown",
            "shutdown guest",
            "State shutoff",
            "stopped shutdown",
        ]
    );
}

/// A lifecycle event, or a change of `State` with its new value.
fn told(message: &zbus::Message, path: &str) -> Option<String> {
    if let Some(event) = lifecycle_of(message, path) {
        return Some(event);
    }
    let header = message.header();
    if header.member()?.as_str() != "PropertiesChanged" || header.path()?.as_str() != path {
        return None;
    }
    let (_, changed, invalidated): (String, std::collections::HashMap<String, zbus::OwnedVariant>, Vec<String>) =
        message.body().deserialize().expect("sa{sv}as");
    assert!(invalidated.is_empty(), "values are sent with the signal");
    let state = changed.get("State")?;
    Some(format!("State {}", String::try_from(state.clone()).expect("a string")))
}

#[tokio::test]
async fn a_guest_is_started_paused_and_goes_on_when_resumed() {
    let Some((_daemon, client, domain, tick)) = tick("paused", "").await else { return };
    let mut watch = client.watch().await;
    domain.call("Start", &(options([("paused", Variant::from(true))]),)).await.expect("started");
    assert_eq!(domain.state().await, ("paused".into(), "user".into()));
    assert_eq!(watch.lifecycle(&domain.path).await, "started booted");
    assert_eq!(watch.lifecycle(&domain.path).await, "suspended paused");
    assert_eq!(tick.counted(), None, "no instruction has run");
    domain.bare("Resume").await.expect("resumed");
    tick.counts_to(1).await;

    let (name, text) = domain.bare("Resume").await.expect_err("it runs");
    assert_eq!(name, "org.virt.Error.OperationInvalid");
    assert!(text.contains("'paused'") && text.contains("running"), "{text}");
    let (name, text) = domain.run("Start").await.expect_err("it runs");
    assert_eq!(name, "org.virt.Error.OperationInvalid");
    assert!(text.contains("active already"), "{text}");
    domain.run("Destroy").await.expect("destroyed");
    assert_eq!(domain.state().await, ("shutoff".into(), "destroyed".into()));
    let (name, _) = domain.run("Destroy").await.expect_err("it is off");
    assert_eq!(name, "org.virt.Error.OperationInvalid");
}

#[tokio::test]
async fn reset_boots_again_in_the_same_process() {
    let Some((_daemon, client, domain, tick)) = tick("reset", "").await else { return };
    domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    let id: u32 = domain.property("Id").await;
    let mut watch = client.watch().await;
    domain.bare("Reset").await.expect("reset");
    tick.boots_to(2).await;
    assert_eq!(domain.property::<u32>("Id").await, id);
    assert_eq!(domain.state().await.0, "running");
    domain.run("Destroy").await.expect("destroyed");
    assert_eq!(watch.lifecycle(&domain.path).await, "stopped destroyed", "a reset is no lifecycle event");
}

#[tokio::test]
async fn on_poweroff_restart_brings_the_guest_back_and_preserve_leaves_it_standing() {
    let Some((mut daemon, client, domain, tick)) = tick("back", "<on_poweroff>restart</on_poweroff>").await else {
        return;
    };
    let mut watch = client.watch().await;
    domain.run("Start").await.expect("started");
    tick.counts_to(1).await;
    domain.run("Shutdown").await.expect("asked");
    tick.boots_to(2).await;
    assert_eq!(
        watch.until(&domain.path, "resumed unpaused").await,
        ["started booted", "shutdown guest", "resumed unpaused"]
    );
    domain.run("Destroy").await.expect("destroyed");

    let preserving = tick.xml.replace("restart</on_poweroff>", "preserve</on_poweroff>");
    let uuid: String = domain.property("UUID").await;
    let preserving = preserving.replace("</name>", &format!("</name><uuid>{uuid}</uuid>"));
    client.define(&preserving).await.expect("redefined");
    domain.run("Start").await.expect("started");
    tick.boots_to(3).await;
    domain.run("Shutdown").await.expect("asked");
    watch.until(&domain.path, "shutdown guest").await;
    assert_eq!(domain.state().await.0, "shutdown");
    domain.bare("Reset").await.expect("it stands and can be reset");
    tick.boots_to(4).await;
    assert_eq!(domain.state().await.0, "running");

    // Whatever it is to do by itself, it goes where what is pending is to be applied.
    let config = options([("config", Variant::from(true))]);
    domain.call("SetTitle", &("next", config)).await.expect("set");
    let pending: Vec<(String, String, String)> = domain.property("PendingChanges").await;
    let title = ("/title".to_owned(), String::new(), "next".to_owned());
    assert_eq!(pending, [title], "and nothing that a start decides");
    domain.run("ApplyPending").await.expect("applied");
    tick.boots_to(5).await;
    let events = watch.until(&domain.path, "started booted").await;
    let last = events.iter().rev().take(3).rev().map(String::as_str).collect::<Vec<_>>();
    assert_eq!(last, ["shutdown guest", "stopped shutdown", "started booted"]);
    assert!(!domain.property::<bool>("ConfigChanged").await);
    drop(watch);

    // Whoever is killed before the guest is asked, or when it has powered off, the machine comes with what is stored.
    for (step, title) in [(ASKING, "third"), (POWERED_OFF, "fourth")] {
        domain.call("SetTitle", &(title, options([("config", Variant::from(true))]))).await.expect("set");
        daemon.at_step(step, &format!("kill -9 {}", daemon.virtd_pid()));
        domain.run("ApplyPending").await.expect_err("virtd is killed");
        daemon.virtd_died().await;
        assert!(daemon.step_came() && (daemon.qemu_of("back").is_some() == (step == ASKING)), "step {step}");
        daemon.start_virtd().await;
        domain.is_looked_after().await;
        assert_eq!(
            (domain.state().await.0, domain.property::<String>("Title").await),
            ("running".into(), title.into())
        );
        assert!(!domain.property::<bool>("ConfigChanged").await);
        tick.boots_to(step + 5).await;
    }
    domain.run("Destroy").await.expect("destroyed");
}

/// Steps of `ApplyPending`: its intent is on disk and nobody has asked the guest, which has then powered off.
const ASKING: u32 = 1;
const POWERED_OFF: u32 = 2;

#[tokio::test]
async fn a_hypervisor_that_dies_at_start_has_the_last_word() {
    let Some((_daemon, client, domain, tick)) = tick("dies", "").await else { return };
    std::fs::write(&tick.disk, [&b"QFI\xfb\0\0\0\x03"[..], &[0; 1024]].concat())
        .expect("spoiled behind its first bytes");
    let (name, text) = domain.run("Start").await.expect_err("QEMU cannot open that");
    assert_eq!(name, "org.virt.Error.HypervisorFailed");
    assert!(text.contains("'dies'") && text.contains("qcow2"), "{text}");
    assert_eq!(domain.state().await.0, "shutoff");

    let jobs: Vec<zbus::OwnedObjectPath> = client
        .call("/org/virt", "org.virt.Manager.GetJobs", &())
        .await
        .expect("jobs")
        .body()
        .deserialize()
        .expect("ao");
    // Everybody may read that: the hypervisor's words are for who asked.
    let public =
        "cannot start domain 'dies': its hypervisor failed; its own words are told to who asked, and stand in its log";
    let job = jobs.last().expect("the job stays readable");
    assert_eq!(client.property::<String>(job.as_str(), "org.virt.Job", "State").await, "failed");
    assert_eq!(client.property::<String>(job.as_str(), "org.virt.Job", "ErrorMessage").await, public);
}

#[tokio::test]
async fn a_hung_guest_keeps_nobody_else_waiting_and_can_be_destroyed() {
    let Some((daemon, client, hung, tick)) = tick("hung", "").await else { return };
    let other = Tick::new(&daemon, "other", "").expect("tools are here");
    let other = client.define(&other.xml).await.expect("defined");
    hung.run("Start").await.expect("started");
    other.run("Start").await.expect("started");
    tick.counts_to(1).await;
    let qemu = daemon.qemu_of("hung").expect("its process");
    nix::sys::signal::kill(qemu, nix::sys::signal::Signal::SIGSTOP).expect("stopped");

    let waiting = tokio::spawn({
        let hung = hung.clone();
        async move { hung.bare("Suspend").await.map(|_| ()) }
    });
    for _ in 0..20 {
        other.bare("Suspend").await.expect("the other answers");
        other.bare("Resume").await.expect("the other answers");
        hung.xml().await;
        assert_eq!(hung.state().await.0, "running");
    }
    assert!(!waiting.is_finished(), "the hung one keeps its caller waiting");
    hung.run("Destroy").await.expect("a hung guest can be ended");
    let (name, text) = waiting.await.expect("no panic").expect_err("it could not be suspended");
    assert_eq!(name, "org.virt.Error.OperationInvalid", "{text}");
    assert_eq!(hung.state().await, ("shutoff".into(), "destroyed".into()));
    assert_eq!(daemon.qemu_of("hung"), None);
}

#[tokio::test]
async fn a_transient_domain_lives_as_long_as_its_guest_and_autodestroy_as_long_as_its_caller() {
    let Some((daemon, client, _domain, tick)) = tick("keep", "").await else { return };
    let xml = tick.xml.replace("<name>keep", "<name>passing");
    let mut watch = client.watch().await;
    let caller = Client { connection: daemon.connect().await };
    let body = (xml.as_str(), options([("autodestroy", Variant::from(true))]));
    let reply = caller.call("/org/virt", "org.virt.Manager.CreateDomain", &body).await.expect("created");
    let (path, _job): (zbus::OwnedObjectPath, zbus::OwnedObjectPath) = reply.body().deserialize().expect("oo");
    let domain = Domain { client: client.clone(), path: path.to_string() };
    assert!(!domain.property::<bool>("Persistent").await);
    drop(caller);
    assert_eq!(to_the_end(&mut watch, &domain).await, ["started booted", "stopped destroyed"]);
    let (name, _) = client.named("passing").await.map(|_| ()).expect_err("it has gone with its guest");
    assert_eq!(name, "org.virt.Error.NoSuchDomain");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_cpus_run_can_be_sent_an_nmi() {
    let Some((_daemon, _, domain, tick)) = tick("nmi", "").await else { return };
    let can = async || domain.call("Can", &"InjectNMI").await.expect("told").body().deserialize::<String>().expect("s");
    assert_eq!(can().await, "na");
    domain.run("Start").await.expect("started");
    tick.counts_to(1).await;
    assert_eq!(can().await, "yes");
    domain.bare("InjectNMI").await.expect("sent");
    domain.bare("Suspend").await.expect("suspended");
    let (name, why) = domain.bare("InjectNMI").await.expect_err("its CPUs are stopped");
    assert!(name.ends_with("OperationInvalid") && why.contains("resume it first"), "{name}: {why}");
    domain.run("Destroy").await.expect("destroyed");
}

/// The answer of GetDomainCapabilities.
async fn offered(client: &Client, wanted: &[(&str, &str)]) -> Result<String, Refusal> {
    let wanted = options(wanted.iter().map(|(key, value)| (*key, Variant::from(*value))));
    let told = client.call("/org/virt", "org.virt.Manager.GetDomainCapabilities", &(wanted,)).await;
    told.map(|reply| reply.body().deserialize::<String>().expect("s"))
}

#[tokio::test]
async fn x8_what_a_machine_can_have_is_told_and_agrees_with_validate() {
    let Some((_daemon, client, domain, tick)) = tick("offer", "").await else { return };
    let document =
        offered(&client, &[("virttype", "qemu"), ("machine", "q35"), ("arch", "x86_64")]).await.expect("told");
    assert!(document.starts_with("<domainCapabilities>") && document.contains("<domain>qemu</domain>"), "{document}");
    let machine = document.split_once("<machine>").and_then(|(_, rest)| rest.split_once('<')).expect("a machine").0;
    assert!(
        domain.xml().await.contains(&format!("machine='{machine}'")),
        "as a definition with q35 gets it: {machine}"
    );
    assert_eq!(
        offered(&client, &[("virttype", "qemu"), ("machine", machine), ("driver", "qemu")]).await.expect("told"),
        document
    );
    assert!(offered(&client, &[]).await.expect("of what is chosen").contains("<arch>x86_64</arch>"));
    // A model is usable where ValidateDomain has nothing to say about it.
    for (usable, model) in [("yes", "qemu64"), ("no", "Skylake-Server")] {
        assert!(document.contains(&format!("<model usable='{usable}' deprecated='no' vendor='unknown'>{model}<")));
        let cpu = format!("<cpu mode='custom' match='exact'><model>{model}</model></cpu><devices>");
        let xml = tick.xml.replace("<devices>", &cpu).replace("<name>offer", "<name>other");
        let told = client.call("/org/virt", "org.virt.Manager.ValidateDomain", &(&*xml, options([]))).await;
        let told: Vec<(String, u32, u32, String)> = told.expect("told").body().deserialize().expect("a(suus)");
        assert_eq!(told.iter().any(|one| one.3.contains(model)), usable == "no", "{model}: {told:?}");
    }
    for (wanted, error, why) in [
        (("virttype", "xen"), "ConfigUnsupported", "not 'xen'"),
        (("machine", "c64"), "ConfigUnsupported", "no machine 'c64'"),
        (("arch", "../../bin/sh"), "ConfigUnsupported", "x86_64"),
        (("driver", "test"), "OperationUnsupported", "test"),
        (("driver", "xen"), "InvalidArgument", "no driver 'xen'"),
        (("emulator", "/bin/sh"), "InvalidArgument", "emulator"),
    ] {
        let (name, text) = offered(&client, &[wanted]).await.expect_err("not here");
        assert!(name.ends_with(error) && text.contains(why), "{wanted:?}: {name}: {text}");
    }
    let can = client.call("/org/virt", "org.virt.Manager.Can", &"GetDomainCapabilities").await.expect("told");
    assert_eq!(can.body().deserialize::<String>().expect("s"), "yes");
}

/// QEMU behind a wall calls its threads by numbers of its own.
#[tokio::test]
async fn a_vcpu_is_bound_to_its_cpu_of_the_host_and_everything_else_to_another() {
    let last = std::thread::available_parallelism().map_or(0, |all| all.get() - 1).to_string();
    let bound = format!("<cputune><vcpupin vcpu='0' cpuset='{last}'/><emulatorpin cpuset='0'/></cputune>");
    let Some((daemon, _, domain, tick)) = tick("bound", &bound).await else { return };
    domain.run("Start").await.expect("started");
    let qemu = daemon.qemu_of(&tick.name).expect("it runs");
    let mut cpus = std::collections::BTreeMap::new();
    for thread in std::fs::read_dir(format!("/proc/{qemu}/task")).expect("its threads").flatten() {
        // Some of its threads live for moments.
        let Ok(status) = std::fs::read_to_string(thread.path().join("status")) else { continue };
        let word = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).expect(key).trim().to_owned();
        cpus.entry(word("Name:").starts_with("CPU 0/")).or_insert_with(Vec::new).push(word("Cpus_allowed_list:"));
    }
    assert_eq!(cpus[&true], [last]);
    assert!(cpus[&false].iter().all(|allowed| allowed == "0"), "{cpus:?}");
    domain.run("Destroy").await.expect("destroyed");
}
