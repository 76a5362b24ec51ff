//! Guests with KVM, for real: `tests/guests/kvmtick.S`, which is small enough for a KVM that interprets it. On the system bus
//! they are behind their walls, as users of their own.

use crate::common::client::{Client, Domain, options};
use crate::common::guest::Tick;
use crate::common::snapshots::Player;
use crate::common::users::ADMIN;
use crate::common::{Daemon, Setup};

/// A system bus, a client of it and a defined kvmtick.
async fn kvmtick(name: &str) -> Option<(Daemon, Client, Domain, Tick)> {
    let daemon = Daemon::on_system_bus(Setup::with_example_rules()).await?;
    let tick = Tick::with_kvm(&daemon, name)?;
    let client = Client { connection: daemon.connect_as(&ADMIN).await };
    let domain = client.define(&tick.xml).await.expect("defined");
    Some((daemon, client, domain, tick))
}

/// What ValidateDomain says of a document.
async fn findings(client: &Client, xml: &str) -> Vec<(String, u32, u32, String)> {
    let reply = client.call("/org/virt", "org.virt.Manager.ValidateDomain", &(xml, options([]))).await;
    reply.expect("told").body().deserialize().expect("a(suus)")
}

/// Whether a process of the guest's executes on CPUs of KVM's.
fn has_cpus_of_kvm(daemon: &Daemon, name: &str) -> bool {
    let process = daemon.qemu_of(name).expect("it runs");
    let opened = std::fs::read_dir(format!("/proc/{process}/fd")).expect("its descriptors").flatten();
    let names = opened.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    names.into_iter().any(|name| name.to_string_lossy().starts_with("anon_inode:kvm-vcpu"))
}

#[tokio::test]
async fn x2_a_guest_with_kvm_obeys_every_verb() {
    let Some((daemon, client, domain, tick)) = kvmtick("verbs").await else { return };
    let said = findings(&client, &domain.xml().await).await;
    assert!(said.iter().all(|(severity, ..)| severity != "error"), "{said:?}");
    let mut watch = client.watch().await;
    domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    assert!(has_cpus_of_kvm(&daemon, "verbs"));

    domain.bare("Suspend").await.expect("suspended");
    assert_eq!(domain.state().await, ("paused".into(), "user".into()));
    let stood = tick.counted().expect("it has counted").0;
    domain.bare("Resume").await.expect("resumed");
    tick.counts_to(stood + 3).await;
    domain.bare("Reset").await.expect("reset");
    tick.boots_to(2).await;
    domain.run("Shutdown").await.expect("asked");
    let story = ["started booted", "suspended paused", "resumed unpaused", "shutdown guest", "stopped shutdown"]
        .map(String::from);
    assert_eq!(watch.until(&domain.path, "stopped shutdown").await, story);
}

#[tokio::test]
async fn x2_a_guest_with_kvm_goes_back_to_its_memory() {
    let Some((daemon, _client, domain, tick)) = kvmtick("memory").await else { return };
    let player = Player { domain: domain.clone() };
    domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    domain.bare("Suspend").await.expect("suspended");
    let taken = tick.counted().expect("it has counted").0;
    player.take("then").await;
    assert_eq!(player.get::<String>("then", "Memory").await, "internal");
    domain.bare("Resume").await.expect("resumed");
    tick.counts_to(taken + 20).await;

    player.call("then", "Revert", options([])).await.expect("reverted");
    assert_eq!(domain.state().await.0, "paused", "as it was taken");
    domain.bare("Resume").await.expect("resumed");
    tick.goes_back_below(taken + 20).await;
    tick.goes_on().await;

    // And from nothing: a new process is brought to that memory.
    domain.run("Destroy").await.expect("destroyed");
    player.call("then", "Revert", options([("running", zbus::Variant::from(true))])).await.expect("reverted");
    tick.goes_on().await;
    let (counted, boots) = tick.counted().expect("it counts");
    assert!(counted > taken && boots == 1, "{counted} {boots}, taken at {taken}");
    assert!(has_cpus_of_kvm(&daemon, "memory"));
    player.call("then", "Delete", options([])).await.expect("deleted");
    domain.run("Destroy").await.expect("destroyed");
}

#[tokio::test]
async fn x2_a_guest_with_kvm_outlives_virtd() {
    let Some((mut daemon, client, domain, tick)) = kvmtick("outlives").await else { return };
    domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    let (id, process) = (domain.property::<u32>("Id").await, daemon.qemu_of("outlives"));
    daemon.kill_virtd().await;
    tick.goes_on().await;
    daemon.start_virtd().await;

    assert_eq!((domain.state().await.0.as_str(), domain.property::<u32>("Id").await), ("running", id));
    assert_eq!(daemon.qemu_of("outlives"), process, "the same process");
    domain.bare("Suspend").await.expect("it listens to the new virtd");
    domain.bare("Resume").await.expect("resumed");
    tick.goes_on().await;
    let mut watch = client.watch().await;
    domain.run("Shutdown").await.expect("asked");
    watch.until(&domain.path, "stopped shutdown").await;
    daemon.qemu_gone("outlives").await;
}

/// Whether or not there is KVM, what asks for it is stored, and refused with the reason.
#[tokio::test]
async fn x2_kvm_that_is_turned_off_is_refused_with_the_reason() {
    let Some(mut daemon) = Daemon::session_bus() else { return };
    let folder = daemon.root().join("etc/virt");
    std::fs::create_dir_all(&folder).expect("made");
    std::fs::write(folder.join("virtd.toml"), "[qemu]\nkvm = \"off\"\n").expect("written");
    daemon.start_virtd().await;
    let Some(tick) = Tick::new(&daemon, "off", "") else { return };
    let client = Client { connection: daemon.connect().await };
    let xml = tick.xml.replace("type='qemu'", "type='kvm'");
    let domain = client.define(&xml).await.expect("stored all the same");
    let said = findings(&client, &domain.xml().await).await;
    assert!(said.iter().any(|(severity, .., text)| severity == "error" && text.contains("kvm = \"off\"")), "{said:?}");
    let (name, text) = domain.run("Start").await.expect_err("it is turned off");
    assert_eq!(name, "org.virt.Error.ConfigUnsupported");
    assert!(text.contains("virtd.toml") && text.contains("type='qemu'"), "{text}");
    let reply = client.call("/org/virt", "org.virt.Manager.GetCapabilities", &"qemu").await.expect("told");
    let document: String = reply.body().deserialize().expect("s");
    assert!(document.contains("<domain type='qemu'/>") && !document.contains("type='kvm'"), "{document}");
}
