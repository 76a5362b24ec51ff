//! What virtd noted of a guest cannot be read any more, or cannot be written: the guest is there all the same, and never twice.

use crate::common::Daemon;
use crate::common::client::{Client, options};
use crate::common::guest::Tick;
use std::path::PathBuf;

/// Where it is noted what runs.
fn status(daemon: &Daemon, uuid: &str) -> PathBuf {
    daemon.root().join("run/virt/status").join(format!("{uuid}.json"))
}

#[tokio::test]
async fn a_guest_whose_status_cannot_be_read_is_found_and_never_started_twice() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    for spoil in ["", "{\"driver\": 7}", "gone"] {
        let (Some(kept), Some(passing)) = (Tick::new(&daemon, "kept", ""), Tick::new(&daemon, "passing", "")) else {
            return;
        };
        let persistent = client.define(&kept.xml).await.expect("defined");
        persistent.run("Start").await.expect("started");
        client.call("/org/virt", "org.virt.Manager.CreateDomain", &(&passing.xml, options([]))).await.expect("created");
        let transient = client.named("passing").await.expect("there");
        let uuids = [persistent.property::<String>("UUID").await, transient.property::<String>("UUID").await];
        let before = ["kept", "passing"].map(|name| daemon.qemu_of(name).expect("it runs"));

        daemon.kill_virtd().await;
        for uuid in &uuids {
            let file = status(&daemon, uuid);
            if spoil == "gone" { std::fs::remove_file(file) } else { std::fs::write(file, spoil) }.expect("spoilt");
        }
        // Once found it is found again as any other.
        for round in 0..2 {
            daemon.start_virtd().await;
            for domain in [&persistent, &transient] {
                assert_eq!(domain.state().await.0, "running", "{spoil:?}, round {round}\n{}", daemon.log());
                assert!(!domain.property::<String>("Broken").await.is_empty(), "it says so");
                let (name, why) = domain.run("Start").await.expect_err("not a second time");
                assert!(name.ends_with("OperationInvalid"), "{name}: {why}");
            }
            assert_eq!(["kept", "passing"].map(|name| daemon.qemu_of(name).expect("it runs")), before);
            if round == 0 {
                daemon.kill_virtd().await;
            }
        }
        persistent.bare("Suspend").await.expect("it listens");
        persistent.bare("Resume").await.expect("it listens");
        for domain in [&persistent, &transient] {
            domain.run("Destroy").await.expect("it can be ended");
        }
        assert!(["kept", "passing"].iter().all(|name| daemon.qemu_of(name).is_none()));
        persistent.run("Start").await.expect("and starts again");
        assert!(persistent.property::<String>("Broken").await.is_empty());
        persistent.run("Destroy").await.expect("destroyed");
        persistent.run("Undefine").await.expect("undefined");
    }
}

#[tokio::test]
async fn a_guest_whose_status_cannot_be_read_and_that_hangs_can_be_ended() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "hangs", "") else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&tick.xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    let qemu = daemon.qemu_of("hangs").expect("it runs");
    daemon.kill_virtd().await;
    std::fs::write(status(&daemon, &domain.path.rsplit('/').next().unwrap()[1..].replace('_', "-")), "?")
        .expect("spoilt");
    nix::sys::signal::kill(qemu, nix::sys::signal::Signal::SIGSTOP).expect("stopped");
    daemon.start_virtd().await;
    assert!(domain.property::<bool>("Active").await);
    domain.run("Start").await.expect_err("not a second time");
    domain.run("Destroy").await.expect("it can be ended");
    assert!(daemon.qemu_of("hangs").is_none());
}

/// Nothing can be written where virtd keeps what outlives the host's reboots.
#[tokio::test]
async fn on_a_read_only_state_folder_what_runs_is_served_and_can_be_stopped() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "web", "<title>then</title>") else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&tick.xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    daemon.kill_virtd().await;
    let state = daemon.root().join("var/lib/virt");
    let mount =
        |arguments: &[&str]| daemon.inside("mount").args(arguments).arg(&state).status().expect("mount").success();
    assert!(mount(&["--bind", state.to_str().expect("text")]) && mount(&["-o", "remount,bind,ro"]), "mounted");

    daemon.start_virtd().await;
    assert_eq!(domain.state().await.0, "running");
    assert!(domain.xml().await.contains("<title>then</title>"));
    tick.goes_on().await;
    let refusals = [
        domain.call("SetTitle", &("now", options([]))).await.map(drop),
        client.define(&tick.xml.replace(">web<", ">shop<")).await.map(drop),
        domain.run("Undefine").await.map(drop),
    ];
    for refusal in refusals {
        let (name, why) = refusal.expect_err("it cannot be kept");
        assert!(name.ends_with("StorageFailed") && why.contains("Read-only"), "{name}: {why}");
    }
    assert_eq!(domain.property::<String>("Title").await, "then");
    domain.bare("Suspend").await.expect("suspended");
    domain.run("Destroy").await.expect("a guest can be stopped");
    assert_eq!(domain.state().await.0, "shutoff");
}
