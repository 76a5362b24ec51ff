//! A QEMU that does nothing any more, in the midst of whatever is done to its machine: `Destroy` gets through, the machine is
//! off then and whole, and others do not notice.

use crate::common::client::{Client, Refusal, options};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use crate::common::{Daemon, PATIENCE};
use std::collections::HashMap;
use std::time::{Duration, Instant};
use zbus::Message;

/// How long `Destroy` may take, on a machine that is busy with other things.
const SOON: Duration = Duration::from_secs(40);

/// What is done to a machine when its QEMU stops.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Take,
    TakeDisksOnly,
    TakeWithFile,
    Revert,
    RevertToFile,
    Delete,
    DeleteOverlay,
}

const DEEDS: [Deed; 7] = [
    Deed::Take,
    Deed::TakeDisksOnly,
    Deed::TakeWithFile,
    Deed::Revert,
    Deed::RevertToFile,
    Deed::Delete,
    Deed::DeleteOverlay,
];

/// A running machine with what the deeds need.
struct Trial {
    player: Player,
    tick: Tick,
}

impl Trial {
    async fn begin(daemon: &Daemon, deed: Deed) -> Option<Trial> {
        let tick = Tick::new(daemon, &format!("{deed:?}").to_lowercase(), "")?;
        let client = Client { connection: daemon.connect().await };
        let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
        player.domain.run("Start").await.expect("started");
        let trial = Trial { player, tick };
        trial.tick.counts_to(2).await;
        match deed {
            Deed::Take | Deed::TakeDisksOnly | Deed::TakeWithFile => {}
            Deed::Revert | Deed::Delete => drop(trial.player.take("old").await),
            Deed::RevertToFile => trial.take_with_file("old").await.map(drop).expect("taken"),
            Deed::DeleteOverlay => trial.take_disks_only("old").await.map(drop).expect("taken"),
        }
        Some(trial)
    }

    async fn take_with_file(&self, name: &str) -> Result<String, Refusal> {
        let file = self.tick.disk.with_extension(format!("{name}-memory"));
        let memory = format!("<memory snapshot='external' file='{}'/>", file.display());
        let xml = format!("<domainsnapshot><name>{name}</name>{memory}</domainsnapshot>");
        self.player.create(&xml, options([])).await
    }

    async fn take_disks_only(&self, name: &str) -> Result<String, Refusal> {
        let xml = format!("<domainsnapshot><name>{name}</name></domainsnapshot>");
        self.player.create(&xml, with([("disk-only", true)])).await
    }

    /// Does it, to whatever end.
    async fn perform(&self, deed: Deed) -> Result<(), Refusal> {
        let force = || with([("force", true)]);
        match deed {
            Deed::Take => {
                let xml = "<domainsnapshot><name>new</name></domainsnapshot>";
                self.player.create(xml, options([])).await.map(drop)
            }
            Deed::TakeDisksOnly => self.take_disks_only("new").await.map(drop),
            Deed::TakeWithFile => self.take_with_file("new").await.map(drop),
            Deed::Revert | Deed::RevertToFile => self.player.call("old", "Revert", force()).await.map(drop),
            Deed::Delete | Deed::DeleteOverlay => self.player.call("old", "Delete", options([])).await.map(drop),
        }
    }

    /// Destroys it, soon.
    async fn destroy(&self, what: &str) {
        let begun = Instant::now();
        self.player.domain.run("Destroy").await.unwrap_or_else(|(name, why)| panic!("{what}: {name}: {why}"));
        assert!(begun.elapsed() < SOON, "{what}: Destroy took {:?}", begun.elapsed());
        assert_eq!(self.player.domain.state().await.0, "shutoff", "{what}");
    }

    /// What there is of it can be used: it starts, all its snapshots can be gone back to, and be deleted.
    async fn is_whole(&self, daemon: &Daemon, what: &str) {
        let player = &self.player;
        player.domain.is_looked_after().await;
        assert!(daemon.qemu_of(&self.tick.name).is_none(), "{what}: it came back by itself");
        player.domain.run("Start").await.unwrap_or_else(|(name, why)| panic!("{what}: {name}: {why}"));
        self.tick.goes_on().await;
        for path in player.list(options([])).await {
            let name = path.rsplit('/').next().expect("a name").to_owned();
            for (method, options) in [("Revert", with([("force", true), ("running", true)])), ("Delete", options([]))] {
                let done = player.call(&name, method, options).await;
                done.unwrap_or_else(|(error, why)| panic!("{what}: {method} of {name}: {error}: {why}"));
            }
        }
        self.tick.goes_on().await;
        player.domain.run("Destroy").await.expect("destroyed");
    }
}

fn signal(pid: nix::unistd::Pid, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(pid, signal).expect("signalled");
}

/// Waits until QEMU runs for that machine.
async fn qemu_comes(daemon: &Daemon, name: &str) -> nix::unistd::Pid {
    let begun = Instant::now();
    loop {
        if let Some(pid) = daemon.qemu_of(name) {
            return pid;
        }
        assert!(begun.elapsed() < PATIENCE, "no QEMU for {name}\n{}", daemon.log());
        // A process that somebody else makes tells nobody.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Stops QEMU at the first, second, ... step of each deed.
#[tokio::test]
async fn destroy_gets_through_every_deed_whose_qemu_has_stopped() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    for deed in DEEDS {
        for step in 1..=3 {
            let Some(trial) = Trial::begin(&daemon, deed).await else { return };
            let what = format!("{deed:?} at step {step}");
            let qemu = daemon.qemu_of(&trial.tick.name).expect("it runs");
            daemon.at_step(step, &format!("kill -STOP {qemu}; touch {}", daemon.folder().join("stopped").display()));
            let (done, ()) = tokio::join!(trial.perform(deed), async {
                let begun = Instant::now();
                while !daemon.folder().join("stopped").exists() && begun.elapsed() < PATIENCE {
                    // The step is virtd's, which tells nobody of it.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                assert!(daemon.step_came(), "{what}: it has fewer steps");
                trial.destroy(&what).await;
            });
            std::fs::remove_file(daemon.folder().join("stopped")).expect("it was stopped");
            if let Err((name, why)) = &done {
                assert!(!why.is_empty() && !name.ends_with("Internal"), "{what}: {name}: {why}");
            }
            trial.is_whole(&daemon, &what).await;
            trial.player.domain.call("Undefine", &(with([("snapshots-metadata", true)]),)).await.expect("undefined");
        }
    }
}

/// The path of the job that runs; `None` if it has needed no more of QEMU.
async fn running_job(client: &Client) -> Option<String> {
    let jobs = client.call("/org/virt", "org.virt.Manager.GetJobs", &()).await.expect("told");
    let jobs: Vec<zbus::OwnedObjectPath> = jobs.body().deserialize().expect("ao");
    // The youngest is last.
    let last = jobs.last().expect("a job").to_string();
    (client.property::<String>(&last, "org.virt.Job", "State").await == "running").then_some(last)
}

/// QEMU stops at the first, second, ... step of each deed, and its job is cancelled: that does not wait for QEMU. When QEMU goes
/// on all is as it was.
#[tokio::test]
async fn a_job_is_cancelled_while_its_qemu_has_stopped() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let stopped = daemon.folder().join("stopped");
    let mut cancelled = 0;
    for deed in DEEDS {
        for step in 1..=3 {
            let Some(trial) = Trial::begin(&daemon, deed).await else { return };
            let (what, domain) = (format!("{deed:?} at step {step}"), &trial.player.domain);
            let before = trial.player.list(options([])).await;
            let qemu = daemon.qemu_of(&trial.tick.name).expect("it runs");
            daemon.at_step(step, &format!("kill -STOP {qemu}; touch {}", stopped.display()));
            let (done, was_cancelled) = tokio::join!(tokio::time::timeout(SOON, trial.perform(deed)), async {
                let begun = Instant::now();
                while !stopped.exists() && begun.elapsed() < PATIENCE {
                    // The step is virtd's, which tells nobody of it.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                assert!(daemon.step_came(), "{what}: it has fewer steps");
                let job = running_job(&domain.client).await;
                let told = match &job {
                    Some(job) => domain.client.call(job, "org.virt.Job.Cancel", &()).await,
                    None => Err(("OperationInvalid".to_owned(), "it has ended".to_owned())),
                };
                if let Err((name, why)) = &told {
                    let late = why.contains("past the point") || why.contains("has ended");
                    assert!(name.ends_with("OperationInvalid") && late, "{what}: {name}: {why}");
                    signal(qemu, nix::sys::signal::Signal::SIGCONT);
                }
                job.filter(|_| told.is_ok())
            });
            std::fs::remove_file(&stopped).expect("it was stopped");
            let done = done.unwrap_or_else(|_| panic!("{what}: its caller has no answer"));
            if let Some(job) = was_cancelled {
                let (name, why) = done.expect_err("it was cancelled");
                assert!(name.ends_with("Cancelled"), "{what}: {name}: {why}");
                assert_eq!(
                    domain.client.property::<String>(&job, "org.virt.Job", "State").await,
                    "cancelled",
                    "{what}"
                );
                signal(qemu, nix::sys::signal::Signal::SIGCONT);
                domain.is_looked_after().await;
                assert_eq!(trial.player.list(options([])).await, before, "{what}");
                let now = (domain.state().await.0, daemon.qemu_of(&trial.tick.name));
                assert_eq!(now, ("running".to_owned(), Some(qemu)), "{what}");
                trial.tick.goes_on().await;
                cancelled += 1;
            }
            trial.destroy(&what).await;
            trial.is_whole(&daemon, &what).await;
            domain.call("Undefine", &(with([("snapshots-metadata", true)]),)).await.expect("undefined");
        }
    }
    assert!(cancelled > DEEDS.len(), "only {cancelled} could be cancelled");
}

/// A new process, stopped as soon as it is there, and later and later.
#[tokio::test]
async fn destroy_gets_through_starts_and_reverts_whose_new_qemu_stops_before_and_after_its_hello() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    for (deed, moments) in
        [(None, [0, 60, 200]), (Some(Deed::Revert), [0, 60, 300]), (Some(Deed::RevertToFile), [0, 60, 300])]
    {
        let Some(trial) = Trial::begin(&daemon, deed.unwrap_or(Deed::Take)).await else { return };
        let domain = &trial.player.domain;
        domain.run("Destroy").await.expect("destroyed");
        for moment in moments {
            let what = format!("{deed:?}, stopped after {moment} ms");
            let attempt = async {
                match deed {
                    None => domain.run("Start").await.map(drop),
                    Some(_) => trial.player.call("old", "Revert", with([("running", true)])).await.map(drop),
                }
            };
            let (done, ()) = tokio::join!(attempt, async {
                let qemu = qemu_comes(&daemon, &trial.tick.name).await;
                // The moment is the point of this test: it waits for nothing.
                tokio::time::sleep(Duration::from_millis(moment)).await;
                signal(qemu, nix::sys::signal::Signal::SIGSTOP);
                trial.destroy(&what).await;
            });
            if moment == 0 {
                let (name, why): Refusal = done.expect_err("it could not be done");
                assert!(name.ends_with("Cancelled"), "{what}: {name}: {why}");
            }
            assert!(daemon.qemu_of(&trial.tick.name).is_none(), "{what}");
        }
        trial.is_whole(&daemon, &format!("{deed:?}")).await;
        domain.call("Undefine", &(with([("snapshots-metadata", true)]),)).await.expect("undefined");
    }
}

/// virtd is killed in the midst of a deed whose QEMU has stopped: the next one is there at once, with all other machines, and
/// the one that cannot be recovered can be destroyed.
#[tokio::test]
async fn a_machine_whose_recovery_hangs_costs_nobody_else_anything() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let Some(other) = Tick::new(&daemon, "other", "") else { return };
    let client = Client { connection: daemon.connect().await };
    let other_domain = client.define(&other.xml).await.expect("defined");
    for deed in [Deed::Take, Deed::RevertToFile, Deed::DeleteOverlay] {
        let Some(trial) = Trial::begin(&daemon, deed).await else { return };
        let qemu = daemon.qemu_of(&trial.tick.name).expect("it runs");
        daemon.at_step(2, &format!("kill -STOP {qemu}; kill -KILL {}", daemon.virtd_pid()));
        trial.perform(deed).await.expect_err("virtd has gone");
        daemon.virtd_died().await;

        let begun = Instant::now();
        daemon.start_virtd_with(&[]).await;
        eprintln!("{deed:?}: virtd was there after {:?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(15), "it waited: {:?}", begun.elapsed());
        assert!(trial.player.domain.property::<bool>("Active").await, "what is known of it is told");
        trial.player.domain.xml().await;
        other_domain.run("Start").await.expect("another machine is there for everybody");
        other_domain.run("Destroy").await.expect("and ends");
        trial.destroy(&format!("{deed:?} that is being recovered")).await;
        trial.is_whole(&daemon, &format!("{deed:?}")).await;
        trial.player.domain.call("Undefine", &(with([("snapshots-metadata", true)]),)).await.expect("undefined");
    }
}

/// Signals come in the order in which things happened: what a snapshot did to the guest before the snapshot.
#[tokio::test]
async fn a_snapshot_is_never_told_before_what_it_did_to_the_guest() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(trial) = Trial::begin(&daemon, Deed::Take).await else { return };
    let player = &trial.player;
    let mut watch = player.domain.client.watch().await;
    for number in 0..60 {
        let (name, mut seen) = (format!("s{number}"), Vec::new());
        let path = player.take(&name).await;
        loop {
            let message: Message = watch.next().await;
            if let Some(event) = crate::common::client::lifecycle_of(&message, &player.domain.path) {
                seen.push(event);
            }
            if message.header().member().is_some_and(|member| member == "InterfacesAdded") {
                type Interfaces = HashMap<String, HashMap<String, zbus::OwnedVariant>>;
                let (added, _): (zbus::OwnedObjectPath, Interfaces) = message.body().deserialize().expect("oa{sa{sv}}");
                if added.as_str() == path {
                    break;
                }
            }
        }
        assert_eq!(seen, ["suspended paused", "resumed unpaused"], "before {name} was told");
        player.call(&name, "Delete", options([])).await.expect("deleted");
    }
    player.domain.run("Destroy").await.expect("destroyed");
}
