//! Whatever is killed at whatever step of a block job: afterwards the disk stands on what it stood on or on what it was to stand on, in
//! every configuration and in truth, and nothing is left lying about. A job that QEMU is still at is a job again.

use crate::common::Daemon;
use crate::common::client::{Client, Domain, options};
use crate::common::cut_off::{Steps, Victims};
use crate::common::snapshots::with;
use crate::disks_moved::{Layered, copy_to, files_of_disk, run, text};
use std::path::{Path, PathBuf};
use zbus::OwnedObjectPath;

/// More steps than any block job has.
const STEPS: u32 = 40;
const JOB: &str = "org.virt.Job";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Deed {
    Copy,
    Pull,
    CommitTop,
    CommitMiddle,
}

/// One machine with which it is tried.
struct Trial {
    layered: Layered,
    domain: Domain,
    copy: PathBuf,
    deed: Deed,
}

impl Trial {
    async fn begin(daemon: &Daemon, name: &str, deed: Deed) -> Option<Trial> {
        let layered = Layered::make(daemon, name)?;
        let domain = Client { connection: daemon.connect().await }.define(&layered.tick.xml).await.expect("defined");
        domain.run("Start").await.expect("started");
        layered.tick.boots_to(1).await;
        let copy = layered.tick.disk.with_extension("copy");
        Some(Trial { layered, domain, copy, deed })
    }

    /// What the disk stood on, and what it is to stand on.
    fn chains(&self) -> [Vec<PathBuf>; 2] {
        let (top, mid, base) = (self.layered.top.clone(), self.layered.mid.clone(), self.layered.tick.disk.clone());
        let after = match self.deed {
            Deed::Copy => vec![self.copy.clone()],
            Deed::Pull => vec![top.clone()],
            Deed::CommitTop => vec![base.clone()],
            Deed::CommitMiddle => vec![top.clone(), base.clone()],
        };
        [vec![top, mid, base], after]
    }

    /// Whether the whole of it was done.
    async fn perform(&self) -> bool {
        let domain = &self.domain;
        let called = match self.deed {
            Deed::Copy => {
                let xml = copy_to(&self.copy, "qcow2");
                self.job("BlockCopy", &("vda", xml, options([]))).await
            }
            Deed::Pull => self.job("BlockPull", &("vda", "", options([]))).await,
            Deed::CommitTop => self.job("BlockCommit", &("vda", "", "", options([]))).await,
            Deed::CommitMiddle => self.job("BlockCommit", &("vda", "", "vda[1]", options([]))).await,
        };
        match called {
            Some(job) if matches!(self.deed, Deed::Copy | Deed::CommitTop) => {
                domain.client.ask(&job, &format!("{JOB}.Finish"), &(options([]),)).await
            }
            called => called.is_some(),
        }
    }

    async fn job(&self, method: &str, body: &(impl serde::Serialize + zbus::wire::DynamicType)) -> Option<String> {
        let (connection, path) = (&self.domain.client.connection, self.domain.path.as_str());
        let called = connection.call_method(Some("org.virt"), path, Some("org.virt.Domain"), method, body).await;
        Some(called.ok()?.body().deserialize::<OwnedObjectPath>().expect("o").to_string())
    }

    /// Has a job that was found again end well.
    async fn ends_what_goes_on(&self) -> bool {
        let client = &self.domain.client;
        let mut watch = client.watch().await;
        let jobs = client.call("/org/virt", "org.virt.Manager.GetJobs", &()).await.expect("told");
        let jobs: Vec<OwnedObjectPath> = jobs.body().deserialize().expect("ao");
        let mut found = false;
        for job in jobs.iter().map(|job| job.as_str()) {
            assert!(client.property::<String>(job, JOB, "Operation").await.starts_with("block-"));
            assert_eq!(client.property::<OwnedObjectPath>(job, JOB, "Domain").await.as_str(), self.domain.path);
            while ["waiting", "running"].contains(&&*client.property::<String>(job, JOB, "State").await) {
                match client.property::<bool>(job, JOB, "Ready").await {
                    true => {
                        client.call(job, &format!("{JOB}.Finish"), &(options([]),)).await.map(drop).expect("finished")
                    }
                    false => _ = watch.next().await,
                }
            }
            found |= client.property::<String>(job, JOB, "State").await == "succeeded";
        }
        found
    }

    async fn stored(&self) -> Vec<PathBuf> {
        let told = self.domain.call("GetXML", &(with([("inactive", true)]),)).await.expect("told");
        files_of_disk(&told.body().deserialize::<String>().expect("s"))
    }

    /// Whether it stands on what it was to stand on, all of it.
    async fn is_whole(&self, daemon: &Daemon, when: &str) -> bool {
        let (stored, chains) = (self.stored().await, self.chains());
        assert!(chains.contains(&stored), "{when}: {stored:?}");
        if self.domain.state().await.0 != "shutoff" {
            assert_eq!(files_of_disk(&self.domain.xml().await), stored, "{when}");
        }
        let told = run(daemon, &["info", "-U", "--backing-chain", "--output=json", text(&stored[0])]);
        let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        let real = told.as_array().into_iter().flatten().filter_map(|image| image["filename"].as_str());
        assert_eq!(real.map(Path::new).collect::<Vec<_>>(), stored, "{when}: what the headers say");
        let done = stored == chains[1];
        assert_eq!(self.copy.exists(), done && self.deed == Deed::Copy, "{when}: a stray copy");
        done
    }
}

async fn killed_at_every_step(deed: Deed, victims: Victims) {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let mut steps = Steps::of(format!("{deed:?}"), victims, 6..STEPS);
    loop {
        let name = format!("cut{}", steps.next());
        let when = steps.when();
        let Some(mut trial) = Trial::begin(&daemon, &name, deed).await else { return };
        let (_, boots) = trial.layered.tick.counted().expect("it counts");
        steps.kill(&daemon, &name);
        let performed = trial.perform().await;
        if !steps.came(&mut daemon, &mut trial.domain, performed).await {
            assert!(trial.is_whole(&daemon, &when).await);
            return;
        }
        trial.domain.is_looked_after().await;
        let goes_on = match victims {
            Victims::Virtd => trial.ends_what_goes_on().await,
            _ => false,
        };
        steps.is_as_it_was(&trial.domain, &trial.layered.tick).await;
        trial.domain.is_looked_after().await;
        let done = trial.is_whole(&daemon, &when).await;
        assert!(done || !goes_on, "{when}: its job has succeeded");
        steps.is_done(done);
        if !victims.have_qemu() {
            trial.layered.tick.goes_on().await;
            trial.domain.run("Destroy").await.expect("destroyed");
        }
        trial.domain.run("Start").await.expect("it starts with what it stands on");
        trial.layered.tick.boots_to(boots + 1).await;
        trial.domain.run("Destroy").await.expect("destroyed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_while_a_disk_is_copied() {
    killed_at_every_step(Deed::Copy, Victims::Virtd).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_killed_while_its_disk_is_copied() {
    killed_at_every_step(Deed::Copy, Victims::Qemu).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_killed_while_a_disk_is_pulled() {
    killed_at_every_step(Deed::Pull, Victims::Both).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_while_a_disk_is_pulled() {
    killed_at_every_step(Deed::Pull, Victims::Virtd).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_killed_while_what_a_guest_writes_is_committed() {
    killed_at_every_step(Deed::CommitTop, Victims::Both).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_killed_while_a_layer_is_committed() {
    killed_at_every_step(Deed::CommitMiddle, Victims::Both).await;
}
