//! What a machine needs of the host is looked at before it is started, and before anything is ended for it.

use crate::common::Daemon;
use crate::common::client::Client;
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};

/// A machine with a CD, a log and a ROM of its own.
struct Trial {
    daemon: Daemon,
    player: Player,
    tick: Tick,
}

impl Trial {
    async fn begin() -> Option<Trial> {
        let daemon = Daemon::on_session_bus().await?;
        let mut tick = Tick::new(&daemon, "web", "")?;
        for folder in ["cd", "log", "rom"] {
            std::fs::create_dir(daemon.folder().join(folder)).expect("made");
        }
        let at = |name: &str| daemon.folder().join(name).display().to_string();
        std::fs::write(at("cd/cd.iso"), vec![0; 4096]).expect("written");
        std::fs::write(at("rom/rom"), [0x55, 0xaa, 1]).expect("written");
        let more = format!(
            "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='sda' bus='sata'/><readonly/></disk>\
             <interface type='user'><model type='virtio'/><rom file='{}'/></interface>\
             <console type='file'><source path='{}'/><target type='virtio'/></console></devices>",
            at("cd/cd.iso"),
            at("rom/rom"),
            at("log/console")
        );
        tick.xml = tick.xml.replace("</devices>", &more);
        let client = Client { connection: daemon.connect().await };
        let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
        player.domain.run("Start").await.expect("started");
        tick.counts_to(2).await;
        Some(Trial { daemon, player, tick })
    }
}

#[tokio::test]
async fn a_revert_that_could_not_be_started_is_refused_before_anything_is_ended() {
    let Some(trial) = Trial::begin().await else { return };
    let (player, tick) = (&trial.player, &trial.tick);
    let memory = tick.disk.with_extension("memory");
    let xml = format!(
        "<domainsnapshot><name>one</name><memory snapshot='external' file='{}'/></domainsnapshot>",
        memory.display()
    );
    player.create(&xml, with([])).await.expect("taken");
    let id: u32 = player.domain.property("Id").await;
    for (what, named) in
        [("cd", "cd/cd.iso"), ("log", "log is not there"), ("rom", "rom/rom"), ("web.qcow2", "web.qcow2")]
    {
        let (there, away) = (trial.daemon.folder().join(what), trial.daemon.folder().join("away"));
        std::fs::rename(&there, &away).expect("gone");
        let plan = player.check("one", "CheckRevert", with([("force", true)])).await;
        let reason = String::try_from(plan["reason"].clone()).expect("s");
        assert!(!bool::try_from(plan["possible"].clone()).expect("b") && reason.contains(named), "{what}: {reason}");
        let (name, why) = player.call("one", "Revert", with([("force", true)])).await.expect_err("it could not start");
        assert!(name.ends_with("StorageFailed") && why.contains(named), "{what}: {name}: {why}");
        assert_eq!((player.domain.state().await.0, player.domain.property::<u32>("Id").await), ("running".into(), id));
        std::fs::rename(&away, &there).expect("there again");
    }
    tick.goes_on().await;
    player.call("one", "Revert", with([("force", true)])).await.expect("now it can be done");
    player.domain.run("Destroy").await.expect("destroyed");
}

#[tokio::test]
async fn a_start_without_one_of_its_files_is_refused_by_name_before_anything_begins() {
    let Some(trial) = Trial::begin().await else { return };
    let domain = &trial.player.domain;
    domain.run("Destroy").await.expect("destroyed");
    let mut watch = domain.client.watch().await;
    for (what, named) in
        [("cd", "cd/cd.iso"), ("log", "log is not there"), ("rom", "rom/rom"), ("web.qcow2", "web.qcow2")]
    {
        let (there, away) = (trial.daemon.folder().join(what), trial.daemon.folder().join("away"));
        std::fs::rename(&there, &away).expect("gone");
        let (name, why) = domain.run("Start").await.expect_err("it could not start");
        assert!(name.ends_with("StorageFailed") && why.contains(named), "{what}: {name}: {why}");
        std::fs::rename(&away, &there).expect("there again");
    }
    domain.run("Start").await.expect("now it can be done");
    let first = watch.next().await;
    let added: String = first.header().path().expect("an object").to_string();
    assert!(first.header().member().is_none_or(|m| m != "Finished"), "no job had been begun: {added}");
    domain.run("Destroy").await.expect("destroyed");
}
