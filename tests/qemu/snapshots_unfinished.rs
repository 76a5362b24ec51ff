//! What could not be written down half-way through an operation on snapshots: nothing else begins before it is whole.

use crate::common::Daemon;
use crate::common::client::{Client, options};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use std::path::PathBuf;

/// A machine whose stored configuration can be made impossible to write.
struct Trial {
    daemon: Daemon,
    player: Player,
    tick: Tick,
}

impl Trial {
    async fn begin(name: &str) -> Option<Trial> {
        let daemon = Daemon::on_session_bus().await?;
        let tick = Tick::new(&daemon, name, "<title>then</title>")?;
        let client = Client { connection: daemon.connect().await };
        let domain = client.define(&tick.xml).await.expect("defined");
        Some(Trial { daemon, player: Player { domain }, tick })
    }

    fn definitions(&self) -> PathBuf {
        let found = ["virt/domains", "var/lib/virt/domains"].map(|folder| self.daemon.root().join(folder));
        found.into_iter().find(|folder| folder.exists()).expect("definitions are kept somewhere")
    }

    /// From that step on no definition can be written.
    fn no_definitions_from(&self, step: u32) -> PathBuf {
        let folder = self.definitions();
        let away = folder.with_extension("away");
        self.daemon.at_step(step, &format!("mv {} {}", folder.display(), away.display()));
        away
    }

    async fn title(&self) -> String {
        self.player.domain.property("Title").await
    }

    async fn set_title(&self, title: &str) {
        self.player.domain.call("SetTitle", &(title, options([]))).await.expect("set");
    }
}

#[tokio::test]
async fn a_guest_that_was_loaded_goes_on_and_its_configuration_follows() {
    let Some(trial) = Trial::begin("loaded").await else { return };
    let (player, tick) = (&trial.player, &trial.tick);
    player.domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    player.take("one").await;
    trial.set_title("now").await;
    tick.counts_to(12).await;

    // The intent, the guest stopped, the note, the other note: then the guest has been loaded.
    let away = trial.no_definitions_from(4);
    let (name, why) = player.call("one", "Revert", options([])).await.expect_err("it cannot be written down");
    assert!(trial.daemon.step_came() && name.ends_with("StorageFailed"), "{name}: {why}");
    assert_eq!(player.domain.state().await, ("running".to_owned(), "from-snapshot".to_owned()));
    tick.goes_back_below(12).await;
    for verb in ["Suspend", "Resume"] {
        player.domain.bare(verb).await.expect("what runs is told as it is");
    }
    tick.goes_on().await;
    let (name, why) = player.create("<domainsnapshot/>", options([])).await.expect_err("first what was begun");
    assert!(name.ends_with("OperationInvalid") && why.contains("a revert was cut off half-way"), "{name}: {why}");

    std::fs::rename(&away, away.with_extension("")).expect("there again");
    player.take("two").await;
    assert_eq!(trial.title().await, "then");
    assert_eq!(player.get::<zbus::ObjectPath<'static>>("two", "Parent").await.as_str(), player.path("one"));
    tick.goes_on().await;
}

#[tokio::test]
async fn a_revert_that_cannot_be_written_down_is_finished_before_anything_else() {
    let Some(trial) = Trial::begin("back").await else { return };
    let (player, tick) = (&trial.player, &trial.tick);
    player.take("off").await;
    player.domain.run("Start").await.expect("started");
    tick.boots_to(1).await;
    tick.counts_to(2).await;
    trial.set_title("now").await;
    let mut watch = player.domain.client.watch().await;

    // The intent, the guest's end, the note, the image.
    let away = trial.no_definitions_from(4);
    let force = || with([("force", true), ("running", true)]);
    let (name, why) = player.call("off", "Revert", force()).await.expect_err("it cannot be written down");
    assert!(trial.daemon.step_came() && name.ends_with("StorageFailed"), "{name}: {why}");
    let told = watch.until(&player.domain.path, "stopped failed").await;
    assert_eq!(told, ["stopped from-snapshot", "stopped failed"]);
    assert_eq!(player.domain.state().await, ("shutoff".to_owned(), "failed".to_owned()));
    let (name, why) = player.domain.run("Start").await.expect_err("not on disks of another time");
    assert!(name.ends_with("OperationInvalid") && why.contains("cut off half-way"), "{name}: {why}");

    // Images have been brought there, so what was begun is finished.
    std::fs::rename(&away, away.with_extension("")).expect("there again");
    let (_, why) = player.domain.run("Start").await.expect_err("it runs by now");
    assert!(why.contains("active already"), "{why}");
    assert_eq!(trial.title().await, "then");
    tick.goes_on().await;
    let names: Vec<String> = player.list(options([])).await;
    assert_eq!((names, player.current().await), (vec![player.path("off")], player.path("off")));
}

#[tokio::test]
async fn a_revert_whose_guest_does_not_start_is_taken_back() {
    let Some(trial) = Trial::begin("back").await else { return };
    let (player, tick) = (&trial.player, &trial.tick);
    player.take("off").await;
    player.domain.run("Start").await.expect("started");
    tick.boots_to(1).await;
    player.domain.run("Destroy").await.expect("destroyed");
    trial.set_title("now").await;
    let before = (player.domain.xml().await, player.xml("off").await);

    // The intent, the note, the image, the configuration: then a console's file cannot be opened any more.
    let serial = tick.serial.display();
    trial.daemon.at_step(4, &format!("rm {serial} && mkdir {serial}"));
    let (name, why) = player.call("off", "Revert", with([("running", true)])).await.expect_err("it does not start");
    assert!(trial.daemon.step_came() && why.contains(&tick.serial.display().to_string()), "{name}: {why}");
    assert_eq!(player.domain.state().await.0, "shutoff");
    assert_eq!(before, (player.domain.xml().await, player.xml("off").await));

    std::fs::remove_dir(&tick.serial).expect("removed");
    std::fs::write(&tick.serial, "").expect("a file again");
    player.domain.run("Start").await.expect("started");
    tick.boots_to(2).await;
}

#[tokio::test]
async fn a_guest_stands_aside_and_goes_on_where_its_images_cannot_be_brought_back() {
    let Some(trial) = Trial::begin("aside").await else { return };
    let (player, tick) = (&trial.player, &trial.tick);
    player.domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    let memory = tick.disk.with_extension("memory");
    let with_file = format!(
        "<domainsnapshot><name>one</name><memory snapshot='external' file='{}'/></domainsnapshot>",
        memory.display()
    );
    player.create(&with_file, options([])).await.expect("taken");
    tick.counts_to(12).await;
    let before = (player.domain.xml().await, player.domain.property::<u32>("Id").await);
    let mut watch = player.domain.client.watch().await;

    // The intent, the note, the CPUs' stop, the images' release: then what is to be gone back to is not there any more.
    let (frozen, away) = (tick.disk.display(), tick.disk.with_extension("away"));
    trial.daemon.at_step(4, &format!("mv {frozen} {}", away.display()));
    let force = with([("force", true)]);
    let (name, why) = player.call("one", "Revert", force).await.expect_err("the frozen file is away");
    assert!(trial.daemon.step_came() && name.ends_with("StorageFailed"), "{name}: {why}");
    assert_eq!(before, (player.domain.xml().await, player.domain.property::<u32>("Id").await));
    assert_eq!(player.domain.state().await.0, "running");
    tick.goes_on().await;
    assert!(tick.counted().expect("it counts").0 > 12, "it is where it was");
    player.domain.bare("Suspend").await.expect("suspended");
    assert_eq!(watch.lifecycle(&player.domain.path).await, "suspended paused", "of the rest nothing is told");
    player.domain.bare("Resume").await.expect("resumed");

    std::fs::rename(&away, &tick.disk).expect("there again");
    player.call("one", "Revert", with([("force", true)])).await.expect("reverted");
    tick.goes_back_below(12).await;
}
