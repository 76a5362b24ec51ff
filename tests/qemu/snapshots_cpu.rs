//! A CPU that a definition leaves to the host: what QEMU made of it is kept with the memory, compared, and made again.

use crate::common::Daemon;
use crate::common::client::{Client, options};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use zbus::OwnedVariant;

/// What the running QEMU of that guest was told of its CPU.
fn told(daemon: &Daemon, name: &str) -> String {
    let process = daemon.qemu_of(name).expect("it runs");
    let words = std::fs::read_to_string(format!("/proc/{process}/cmdline")).expect("its arguments");
    let mut words = words.split('\0').skip_while(|word| *word != "-cpu");
    words.nth(1).expect("a CPU").to_owned()
}

/// The paths of the differences that a check tells.
fn differences(plan: &std::collections::HashMap<String, OwnedVariant>) -> Vec<String> {
    let all: Vec<(String, String, String)> = plan["abi-differences"].clone().try_into().expect("a(sss)");
    all.into_iter().map(|(path, ..)| path).collect()
}

#[tokio::test]
async fn x11_memory_goes_back_into_the_cpu_that_it_was_captured_with() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "cpu", "<cpu mode='host-model'/>") else { return };
    let client = Client { connection: daemon.connect().await };
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    player.domain.run("Start").await.expect("started");
    assert_eq!(told(&daemon, "cpu"), "max,migratable=on");
    tick.counts_to(2).await;
    player.take("one").await;
    let xml = player.xml("one").await;
    let cpu = "<cpu mode='custom' match='exact' check='full'>";
    assert!(xml.contains(cpu) && xml.contains("<feature policy='require' name='rdrand'/>"), "{xml}");
    assert!(xml.contains("<cpu mode='host-model'"), "the definition stays as it is: {xml}");

    // As it was: nothing differs, and it goes back in place.
    let plan = player.check("one", "CheckRevert", options([])).await;
    assert_eq!(plan["starts-new-process"], OwnedVariant::from(false));
    player.call("one", "Revert", options([])).await.expect("in place");

    // A new process is told of each feature, and that it must have them.
    player.call("one", "Revert", with([("respawn", true)])).await.expect("a new process");
    let now = told(&daemon, "cpu");
    assert!(now.starts_with("max,") && now.contains(",rdrand=on") && now.contains(",enforce=on"), "{now}");
    assert!(now.contains(",rdseed=off"), "what it had not is left out: {now}");
    tick.goes_on().await;

    // One that was captured with less is another machine.
    let (less, whole) = (xml.replace("<feature policy='require' name='rdrand'/>", ""), xml);
    let (name, why) = player.create(&less, with([("redefine", true)])).await.expect_err("another CPU");
    assert!(name.ends_with("AbiIncompatible") && why.contains("rdrand"), "{name}: {why}");
    player.call("one", "Delete", with([("metadata-only", true)])).await.expect("forgotten");
    let less = less.replace("</cookie>", "<slirpHelper/></cookie>");
    player.create(&less, with([("redefine", true), ("current", true)])).await.expect("restored");
    let kept = player.xml("one").await;
    assert!(kept.contains("<slirpHelper/>"), "what another program wrote is kept: {kept}");
    let plan = player.check("one", "CheckRevert", options([])).await;
    assert_eq!(differences(&plan), ["/cpu/feature[name=rdrand]"], "{plan:?}");
    player.call("one", "Revert", with([("force", true)])).await.expect("forced");
    assert!(told(&daemon, "cpu").contains(",rdrand=off"), "{}", told(&daemon, "cpu"));

    // That is what it has now, and what the next one says; the first document is the other one.
    let plan = player.check("one", "CheckRevert", options([])).await;
    assert_eq!(differences(&plan), [""; 0]);
    player.take("two").await;
    assert!(!player.xml("two").await.contains("rdrand"), "{}", player.xml("two").await);
    assert!(whole.contains("rdrand"));
    player.domain.run("Destroy").await.expect("destroyed");
}
