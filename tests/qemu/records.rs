//! What virtd keeps of real guests can be read again, and no guest is lost where it cannot.

use crate::common::Daemon;
use crate::common::client::{Client, options};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};

/// More disk-only snapshots than a record can be deep: they are there after a restart, or were refused with the remedy.
#[tokio::test]
async fn l1_a_long_chain_is_refused_before_it_cannot_be_read_again() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "chain", "") else { return };
    let client = Client { connection: daemon.connect().await };
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    let mut taken = 0;
    let refused = loop {
        let xml = format!("<domainsnapshot><name>s{taken}</name></domainsnapshot>");
        match player.create(&xml, with([("disk-only", true)])).await {
            Ok(_) => taken += 1,
            Err(why) => break Some(why),
        }
        if taken == 64 {
            break None;
        }
    };
    if let Some((name, why)) = refused {
        assert_eq!(name, "org.virt.Error.OperationUnsupported", "{why}");
        assert!(why.contains("deep") && why.contains("delete snapshots"), "{why}");
        let doc = "<domainsnapshot><name>more</name></domainsnapshot>";
        let check = player.domain.call("CheckCreateSnapshot", &(doc, with([("disk-only", true)]))).await.expect("told");
        let check: std::collections::HashMap<String, zbus::OwnedVariant> = check.body().deserialize().expect("a{sv}");
        assert!(!bool::try_from(check["possible"].clone()).expect("b"), "the check says what the deed says");
    }
    assert!(taken >= 50, "{taken} snapshots");
    player.domain.run("Start").await.expect("the chain starts");
    let shown = player.domain.call("GetXML", &(with([("inactive", true), ("secure", true)]),)).await.expect("shown");
    client.define(&shown.body().deserialize::<String>().expect("s")).await.expect("and can be given back");
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    assert_eq!(player.domain.property::<String>("Broken").await, "");
    assert_eq!(player.domain.state().await.0, "running");
    assert_eq!(player.domain.property::<u32>("SnapshotCount").await, taken);
    for number in 0..taken {
        assert_eq!(player.get::<String>(&format!("s{number}"), "Broken").await, "", "s{number}");
    }
    // The remedy is one.
    player.call(&format!("s{}", taken - 1), "Delete", options([])).await.expect("deleted");
    player
        .create("<domainsnapshot><name>more</name></domainsnapshot>", with([("disk-only", true)]))
        .await
        .expect("taken");
}

/// virt-install's USB of a q35: a master and three companions of one index.
#[tokio::test]
async fn l2_a_guest_with_usb_companions_is_found_again() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "usb", "") else { return };
    let usb = "<devices><controller type='usb' index='0' model='ich9-ehci1'/>\
        <controller type='usb' index='0' model='ich9-uhci1'><master startport='0'/></controller>\
        <controller type='usb' index='0' model='ich9-uhci2'><master startport='2'/></controller>\
        <controller type='usb' index='0' model='ich9-uhci3'><master startport='4'/></controller>\
        <input type='tablet' bus='usb'/>";
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&tick.xml.replace("<devices>", usb)).await.expect("defined");
    domain.run("Start").await.expect("started");
    let live = domain.xml().await;
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    assert_eq!(domain.state().await.0, "running");
    assert_eq!(domain.property::<String>("Broken").await, "");
    assert_eq!(domain.xml().await, live, "all is known of it that was known before");
    client.define(&live).await.expect("what is shown of it can be given back");
    domain.run("Destroy").await.expect("destroyed");
    assert!(daemon.qemu_of("usb").is_none());
}

/// Whatever is kept of a running guest that is no longer taken: the guest is not lost by that.
#[tokio::test]
async fn l2_a_record_that_is_refused_loses_no_guest() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "kept", "") else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&tick.xml).await.expect("defined");
    let uuid: String = domain.property("UUID").await;
    domain.run("Start").await.expect("started");
    daemon.kill_virtd().await;
    let find = |what: &str| {
        let walk = std::process::Command::new("find").arg(daemon.root()).args(["-name", what]).output().expect("find");
        std::path::PathBuf::from(String::from_utf8_lossy(&walk.stdout).trim().to_owned())
    };
    let (stored, status) = (find(&format!("{uuid}.xml")), find(&format!("{uuid}.json.none")));
    assert!(status.as_os_str().is_empty());
    std::fs::write(&stored, "<domain").expect("written");
    let statuses = std::process::Command::new("find").arg(daemon.root()).args(["-path", "*/status/*.json"]).output();
    let status = String::from_utf8_lossy(&statuses.expect("find").stdout).trim().to_owned();
    let text = std::fs::read_to_string(&status).expect("a status");
    // An attribute of another age, and a second device of the same name.
    let text = text
        .replace("<memory unit", "<memory colour='red' unit")
        .replace("<alias name='serial0'/>", "<alias name='virtio-disk0'/>");
    assert!(text.contains("colour"));
    std::fs::write(&status, text).expect("written");
    daemon.start_virtd().await;
    assert_eq!(domain.state().await.0, "running", "{}", daemon.log());
    let broken: String = domain.property("Broken").await;
    assert!(broken.contains("cannot be read"), "{broken}");
    assert!(domain.xml().await.contains("virtio-disk0"), "what runs is shown");
    domain.call("GetXML", &(with([("inactive", true)]),)).await.expect_err("what is stored is not");
    domain.bare("Suspend").await.expect("it listens");
    domain.bare("Resume").await.expect("it listens");
    client.define(&tick.xml.replace("<name>", &format!("<uuid>{uuid}</uuid><name>"))).await.expect("defined anew");
    assert_eq!(domain.property::<String>("Broken").await, "");
    domain.run("Destroy").await.expect("destroyed");
    domain.run("Start").await.expect("it starts again");
}

/// The last virtd was killed when it had kept that a guest is up, and before its QEMU had been told to run it.
#[tokio::test]
async fn a_guest_that_was_just_to_run_runs() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "last-step", "") else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&tick.xml).await.expect("defined");
    let uuid: String = domain.property("UUID").await;
    let status = daemon.root().join(format!("run/virt/status/{uuid}.json"));
    domain.call("Start", &(with([("paused", true)]),)).await.expect("started");
    daemon.kill_virtd().await;
    let kept = std::fs::read(&status).expect("a status");
    let mut to_run: serde_json::Value = serde_json::from_slice(&kept).expect("JSON");
    assert_eq!(to_run["state"], "paused");
    // One that was to stand stands.
    daemon.start_virtd().await;
    assert_eq!(domain.state().await.0, "paused");
    daemon.kill_virtd().await;
    (to_run["state"], to_run["reason"]) = ("running".into(), "booted".into());
    std::fs::write(&status, to_run.to_string()).expect("written");
    daemon.start_virtd().await;
    assert_eq!(domain.state().await.0, "running");
    tick.counts_to(1).await;
    domain.run("Destroy").await.expect("destroyed");
}

/// What a definition hides is in no argument that anybody on the host reads, and in nothing that is published.
#[tokio::test]
async fn m6_secrets_are_told_to_nobody_who_did_not_ask_for_them() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let extra = "<sysinfo type='fwcfg'><entry name='opt/org.test/a'>s3cret-blob</entry></sysinfo>\
        <sysinfo type='smbios'><oemStrings><entry>s3cret-oem</entry></oemStrings></sysinfo>";
    let Some(tick) = Tick::new(&daemon, "tells", extra) else { return };
    let client = Client { connection: daemon.connect().await };
    let xml = tick.xml.replace("</os>", "<smbios mode='sysinfo'/></os>");
    let domain = client.define(&xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    tick.counts_to(1).await;
    let pid = daemon.qemu_of("tells").expect("it runs");
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).expect("its arguments");
    assert!(!String::from_utf8_lossy(&arguments).contains("s3cret"), "everybody on the host reads them");
    domain.run("Destroy").await.expect("destroyed");

    let native = "<qemu:commandline><qemu:arg value='-object'/>\
        <qemu:arg value='no-such-object,token=s3cret-arg'/><qemu:env name='TOKEN' value='s3cret-env'/></qemu:commandline></domain>";
    let xml = xml
        .replace("<domain ", "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' ")
        .replace("<name>tells", "<name>fails")
        .replace("</domain>", native);
    let domain = client.define(&xml).await.expect("defined");
    assert!(!domain.xml().await.contains("s3cret"));
    let mut watch = client.watch().await;
    let (_, why) = domain.run("Start").await.expect_err("there is no such object");
    assert!(why.contains("no-such-object"), "who asked is told: {why}");
    loop {
        let message = watch.next().await;
        let text = format!("{:?}", message.data());
        assert!(!text.contains("s3cret"), "{message:?}");
        if message.header().member().is_some_and(|member| member == "Finished") {
            break;
        }
    }
    assert!(!daemon.log().contains("s3cret") && !daemon.log().contains("no-such-object"), "{}", daemon.log());
    let log = std::process::Command::new("grep").args(["-rl", "s3cret-env"]).arg(daemon.root().join("log")).output();
    assert_eq!(String::from_utf8_lossy(&log.expect("grep").stdout), "");
}
