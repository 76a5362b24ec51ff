//! The images of a real guest's disk, resized, committed, copied and pulled while it runs.

use crate::common::client::{Client, Domain, Options, Refusal, options};
use crate::common::guest::{LoopDevice, Tick};
use crate::common::snapshots::with;
use crate::common::stats::stats_with;
use crate::common::{Daemon, PATIENCE};
use std::path::{Path, PathBuf};
use std::time::Instant;
use zbus::{OwnedObjectPath, Variant};

const JOB: &str = "org.virt.Job";

/// A tick whose disk has layers: `top` on `mid` on what it boots from.
struct Moved {
    daemon: Daemon,
    domain: Domain,
    tick: Tick,
    mid: PathBuf,
    top: PathBuf,
}

/// Runs qemu-img.
pub fn run(daemon: &Daemon, arguments: &[&str]) -> String {
    let done = daemon.inside("qemu-img").args(arguments).output().expect("qemu-img");
    assert!(done.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a text")
}

fn refused(answer: Result<impl std::fmt::Debug, Refusal>, error: &str, word: &str) {
    let (name, text) = answer.expect_err(error);
    assert!(name.ends_with(error) && text.contains(word), "{name}: {text}");
}

/// A tick whose disk has layers, not defined yet.
pub struct Layered {
    pub tick: Tick,
    pub mid: PathBuf,
    pub top: PathBuf,
}

impl Layered {
    pub fn make(daemon: &Daemon, name: &str) -> Option<Layered> {
        let mut tick = Tick::new(daemon, name, "")?;
        let (mid, top) = (tick.disk.with_extension("mid"), tick.disk.with_extension("top"));
        let base = text(&tick.disk).to_owned();
        run(daemon, &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &base, text(&mid)]);
        run(daemon, &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(&mid), text(&top)]);
        let layer = |path: &str, below: &str| {
            format!("<backingStore type='file'><format type='qcow2'/><source file='{path}'/>{below}</backingStore>")
        };
        let source = format!("<source file='{base}'/>");
        assert!(tick.xml.contains(&source), "{}", tick.xml);
        let chain = layer(text(&mid), &layer(&base, "<backingStore/>"));
        tick.xml = tick.xml.replacen(&source, &format!("<source file='{}'/>{chain}", top.display()), 1);
        Some(Layered { tick, mid, top })
    }
}

/// The files that a document names of its first disk, from the topmost down.
pub fn files_of_disk(xml: &str) -> Vec<PathBuf> {
    let disk = xml.split("<disk ").nth(1).expect("a disk").split("</disk>").next().expect("a disk");
    assert!(!disk.contains("mirror"), "{disk}");
    let named = disk.split("file='").skip(1).filter_map(|rest| rest.split('\'').next());
    named.filter(|path| path.starts_with('/')).map(PathBuf::from).collect()
}

impl Moved {
    async fn begin(name: &str) -> Option<Moved> {
        let daemon = Daemon::on_session_bus().await?;
        let Layered { tick, mid, top } = Layered::make(&daemon, name)?;
        let domain = Client { connection: daemon.connect().await }.define(&tick.xml).await.expect("defined");
        domain.run("Start").await.expect("started");
        tick.counts_to(2).await;
        Some(Moved { daemon, domain, tick, mid, top })
    }

    async fn job(
        &self,
        method: &str,
        body: &(impl serde::Serialize + zbus::wire::DynamicType),
    ) -> Result<String, Refusal> {
        let path: OwnedObjectPath = self.domain.call(method, body).await?.body().deserialize().expect("o");
        Ok(path.to_string())
    }

    async fn finish(&self, job: &str) {
        assert!(self.domain.client.property::<bool>(job, JOB, "Ready").await);
        self.domain.client.call(job, &format!("{JOB}.Finish"), &(options([]),)).await.expect("finished");
    }

    /// Both configurations name these files, from the topmost down.
    async fn stands_on(&self, files: &[&Path]) {
        let inactive = self.domain.call("GetXML", &(with([("inactive", true)]),)).await.expect("told");
        for xml in [self.domain.xml().await, inactive.body().deserialize::<String>().expect("s")] {
            assert_eq!(files_of_disk(&xml), files);
        }
    }

    /// The threshold of its disk, as it is told.
    async fn threshold(&self) -> u64 {
        stats_with(&self.domain, &["disks"], &["disks"]).await.number("disks", 0, "threshold")
    }

    fn same(&self, one: (&Path, &str), other: (&Path, &str)) {
        let told = run(&self.daemon, &["compare", "-U", "-f", one.1, "-F", other.1, text(one.0), text(other.0)]);
        assert!(told.contains("identical"), "{told}");
    }
}

/// What a copy is told as.
pub fn copy_to(path: &Path, format: &str) -> String {
    format!("<disk type='file'><driver type='{format}'/><source file='{}'/></disk>", path.display())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_images_of_a_running_guest_are_resized_committed_copied_and_pulled() {
    let Some(moved) = Moved::begin("moved").await else { return };
    let (domain, tick, base) = (&moved.domain, &moved.tick, moved.tick.disk.clone());
    let flags = || options([]);
    it_is_resized(&moved).await;

    // In the middle, by itself.
    moved.job("BlockCommit", &("vda", "vda[2]", "vda[1]", with([("delete", true)]))).await.expect("committed");
    moved.stands_on(&[&moved.top, &base]).await;
    assert!(!moved.mid.exists(), "that was wanted");
    tick.goes_on().await;

    let copy = it_is_copied(&moved).await;

    // An overlay takes the writes, and what it stands on is pulled into it.
    let snapshot = "<domainsnapshot><name>under</name></domainsnapshot>";
    domain.call("CreateSnapshot", &(snapshot, with([("disk-only", true)]))).await.expect("taken");
    refused(moved.job("BlockPull", &("vda", "", flags())).await, "InUse", "snapshot 'under'");
    refused(moved.job("BlockCommit", &("vda", "", "", flags())).await, "InUse", "snapshot 'under'");
    let path = format!("{}/snapshot/under", domain.path);
    let alone = with([("metadata-only", true)]);
    domain.client.call(&path, "org.virt.Snapshot.Delete", &(alone,)).await.expect("forgotten");
    let overlay = copy.with_extension("under");
    moved.stands_on(&[&overlay, &copy]).await;
    tick.goes_on().await;
    domain.bare("Suspend").await.expect("suspended");
    let before = tick.disk.with_extension("before");
    run(&moved.daemon, &["convert", "-U", "-f", "qcow2", "-O", "raw", text(&overlay), text(&before)]);
    moved.job("BlockPull", &("vda", "", flags())).await.expect("pulled");
    moved.stands_on(&[&overlay]).await;
    moved.same((&overlay, "qcow2"), (&before, "raw"));
    assert!(!run(&moved.daemon, &["info", "-U", text(&overlay)]).contains("backing file"));
    assert_eq!(domain.state().await.0, "paused", "it stood, and stands");
    domain.bare("Resume").await.expect("resumed");
    tick.goes_on().await;

    what_it_writes_is_committed(&moved, &overlay).await;
    what_it_writes_is_told(&moved).await;
    let (count, boots) = tick.counted().expect("it counts");
    domain.run("Destroy").await.expect("destroyed");
    domain.run("Start").await.expect("it starts from what is stored");
    tick.boots_to(boots + 1).await;
    assert!(count > 2);
}

async fn it_is_resized(moved: &Moved) {
    let size = |image: &Path| {
        let told = run(&moved.daemon, &["info", "-U", "--output=json", text(image)]);
        let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        told["virtual-size"].as_u64().expect("a size")
    };
    let before = size(&moved.top);
    moved.job("BlockResize", &("vda", before + 4096, options([]))).await.expect("resized");
    assert_eq!(size(&moved.top), before + 4096);
    let less = moved.job("BlockResize", &("vda", before, options([]))).await;
    refused(less, "InvalidArgument", "shrink");
    moved.tick.goes_on().await;
}

/// Into a file, which is given up once, and then for good. That file.
async fn it_is_copied(moved: &Moved) -> PathBuf {
    let (domain, base) = (&moved.domain, &moved.tick.disk);
    let copy = moved.tick.disk.with_extension("copy");
    std::fs::write(&copy, "somebody's").expect("written");
    refused(
        moved.job("BlockCopy", &("vda", copy_to(&copy, "raw"), options([]))).await,
        "OperationInvalid",
        "reuse-external",
    );
    std::fs::remove_file(&copy).expect("it was there");
    let job = moved.job("BlockCopy", &("vda", copy_to(&copy, "qcow2"), options([]))).await.expect("ready");
    assert!(domain.xml().await.contains("job='copy' ready='yes'"));
    refused(
        domain.call("CreateSnapshot", &("<domainsnapshot/>", with([("disk-only", true)]))).await,
        "Busy",
        "block-copy",
    );
    moved.tick.goes_on().await;
    domain.client.call(&job, &format!("{JOB}.Cancel"), &()).await.expect("cancelled");
    let mut watch = domain.client.watch().await;
    while domain.client.property::<String>(&job, JOB, "State").await == "running" {
        watch.next().await;
    }
    assert_eq!(domain.client.property::<String>(&job, JOB, "State").await, "cancelled");
    // On a slow host the job is given up before all of it is cleaned up.
    let begun = Instant::now();
    while domain.xml().await.contains("<mirror") {
        assert!(begun.elapsed() < PATIENCE, "it was cancelled");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert!(!copy.exists(), "virtd has made it");
    moved.stands_on(&[&moved.top, base]).await;

    let far = 1u64 << 40;
    domain.call("SetBlockThreshold", &("vda", far, options([]))).await.expect("set");
    let speed: Options<'_> = options([("bandwidth", Variant::from(1u64 << 30))]);
    let job = moved.job("BlockCopy", &("vda", copy_to(&copy, "raw"), speed)).await.expect("ready");
    domain.bare("Suspend").await.expect("suspended");
    let before = moved.tick.counted();
    moved.finish(&job).await;
    moved.same((&copy, "raw"), (&moved.top, "qcow2"));
    moved.stands_on(&[&copy]).await;
    assert_eq!(moved.threshold().await, far, "it goes along");
    domain.bare("Resume").await.expect("resumed");
    moved.tick.goes_on().await;
    assert_eq!(before.map(|(_, boots)| boots), moved.tick.counted().map(|(_, boots)| boots));
    assert!(moved.top.exists() && base.exists());
    copy
}

/// The guest writes on and on, and beyond what it had written before.
async fn what_it_writes_is_told(moved: &Moved) {
    let mut watch = moved.domain.client.watch().await;
    moved.domain.call("SetBlockThreshold", &("vda", 512u64, options([]))).await.expect("set");
    loop {
        let signal = watch.next().await;
        if signal.header().member().is_some_and(|member| member == "BlockThreshold") {
            let (target, threshold, excess): (String, u64, u64) = signal.body().deserialize().expect("stt");
            assert!((target.as_str(), threshold) == ("vda", 512) && excess > 0);
            return;
        }
    }
}

async fn what_it_writes_is_committed(moved: &Moved, below: &Path) {
    let (domain, tick) = (&moved.domain, &moved.tick);
    let snapshot = "<domainsnapshot><name>over</name></domainsnapshot>";
    let overlay = below.with_extension("over");
    for another in [true, false] {
        domain
            .call("CreateSnapshot", &(snapshot, with([("disk-only", true), ("no-metadata", true)])))
            .await
            .expect("taken");
        moved.stands_on(&[&overlay, below]).await;
        tick.goes_on().await;
        let far = 1u64 << 41;
        domain.call("SetBlockThreshold", &("vda", far, options([]))).await.expect("set");
        let job = moved.job("BlockCommit", &("vda", "", "", with([("delete", true)]))).await.expect("ready");
        assert!(domain.xml().await.contains("job='active-commit' ready='yes'"));
        tick.goes_on().await;
        if another {
            std::fs::rename(&overlay, below.with_extension("away")).expect("it was there");
            std::fs::write(&overlay, "somebody's").expect("written");
        }
        moved.finish(&job).await;
        moved.stands_on(&[below]).await;
        assert_eq!(moved.threshold().await, far, "it goes along");
        match another {
            true => {
                assert_eq!(std::fs::read_to_string(&overlay).expect("it is another file"), "somebody's");
                std::fs::remove_file(&overlay).expect("removed");
            }
            false => assert!(!overlay.exists(), "that was wanted"),
        }
    }
    assert_eq!(domain.state().await.0, "running");
    tick.goes_on().await;
}

/// The jobs that are at work.
async fn at_work(domain: &Domain) -> Vec<OwnedObjectPath> {
    let jobs = domain.client.call("/org/virt", "org.virt.Manager.GetJobs", &()).await.expect("told");
    jobs.body().deserialize().expect("ao")
}

/// Finishes a job that is ready.
pub async fn finish(domain: &Domain, job: Result<zbus::Message, Refusal>) {
    let job: OwnedObjectPath = job.expect("ready").body().deserialize().expect("o");
    domain.client.call(job.as_str(), &format!("{JOB}.Finish"), &(options([]),)).await.expect("finished");
}

/// The pace is QEMU's, also after another virtd: the machine as that one has it.
async fn is_copied_at_a_pace(daemon: &mut Daemon, domain: Domain, tick: &Tick) -> Domain {
    const PACE: u64 = 65536;
    let copy = tick.disk.with_extension("copy");
    let slowly = options([("bandwidth", Variant::from(PACE)), ("no-wait", Variant::from(true))]);
    let mut watch = domain.client.watch().await;
    let job: OwnedObjectPath = domain
        .call("BlockCopy", &("vda", copy_to(&copy, "raw"), slowly))
        .await
        .expect("begun")
        .body()
        .deserialize()
        .expect("o");
    while domain.client.property::<u64>(job.as_str(), JOB, "BytesTotal").await == 0 {
        assert_ne!(domain.client.property::<String>(job.as_str(), JOB, "State").await, "failed");
        watch.next().await;
    }
    daemon.kill_virtd().await;
    let told = daemon.asks_qemu(&["{\"execute\":\"query-block-jobs\"}"]).remove(0);
    let speeds: Vec<Option<u64>> =
        told["return"].as_array().into_iter().flatten().map(|job| job["speed"].as_u64()).collect();
    assert_eq!(speeds, [Some(PACE)], "{told}");
    daemon.start_virtd().await;
    let domain = Domain { client: Client { connection: daemon.connect().await }, path: domain.path };
    domain.is_looked_after().await;
    let job = at_work(&domain).await.pop().expect("it goes on");
    let mut watch = domain.client.watch().await;
    domain.client.call(job.as_str(), &format!("{JOB}.Cancel"), &()).await.expect("cancelled");
    while domain.client.property::<String>(job.as_str(), JOB, "State").await == "running" {
        watch.next().await;
    }
    domain
}

/// What limits the disk limits what it stands on then, a block device here.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_with_limits_is_copied_at_a_pace_and_onto_a_block_device() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let Some(mut tick) = Tick::new(&daemon, "paced", "") else { return };
    let limits = "<iotune><write_iops_sec>4000</write_iops_sec></iotune><target dev='vda'";
    tick.xml = tick.xml.replacen("<target dev='vda'", limits, 1);
    let domain = Client { connection: daemon.connect().await }.define(&tick.xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    let domain = is_copied_at_a_pace(&mut daemon, domain, &tick).await;

    // An overlay is committed, and another merged with its snapshot.
    let alone = || with([("disk-only", true), ("no-metadata", true)]);
    domain
        .call("CreateSnapshot", &("<domainsnapshot><name>one</name></domainsnapshot>", alone()))
        .await
        .expect("taken");
    finish(&domain, domain.call("BlockCommit", &("vda", "", "", options([]))).await).await;
    let (two, only) = ("<domainsnapshot><name>two</name></domainsnapshot>", with([("disk-only", true)]));
    domain.call("CreateSnapshot", &(two, only)).await.expect("taken");
    let two = format!("{}/snapshot/two", domain.path);
    domain.client.call(&two, "org.virt.Snapshot.Delete", &(options([]),)).await.expect("merged");
    assert_eq!(files_of_disk(&domain.xml().await), [tick.disk.clone()]);
    tick.goes_on().await;

    let file = daemon.folder().join("device");
    let told = run(&daemon, &["info", "-U", "--output=json", text(&tick.disk)]);
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    let size = told["virtual-size"].as_u64().expect("a size");
    std::fs::File::create(&file).expect("made").set_len(size).expect("grown");
    let Some(device) = LoopDevice::of(&file) else { return };
    let onto = format!("<disk type='block'><driver type='raw'/><source dev='{}'/></disk>", device.0.display());
    refused(domain.call("BlockCopy", &("vda", &onto, options([]))).await, "OperationInvalid", "reuse-external");
    let there = with([("reuse-external", true)]);
    finish(&domain, domain.call("BlockCopy", &("vda", &onto, there)).await).await;
    let xml = domain.xml().await;
    assert!(xml.contains("type='block'") && xml.contains(&format!("<source dev='{}'", device.0.display())), "{xml}");
    tick.goes_on().await;
    let limits = domain.call("GetBlockThrottle", &("vda", with([("live", true)]))).await.expect("told");
    let limits: std::collections::HashMap<String, zbus::OwnedVariant> = limits.body().deserialize().expect("a{sv}");
    assert_eq!(*limits["write-requests-per-second"], Variant::from(4000u64));
    daemon.kill_virtd().await;
    let told = daemon.asks_qemu(&["{\"execute\":\"query-block\"}"]).remove(0);
    let top = told["return"][0]["inserted"]["node-name"].as_str().expect("a node");
    assert!(top.ends_with("-throttle"), "it goes through what limits it: {top}");
    daemon.start_virtd().await;
    let domain = Domain { client: Client { connection: daemon.connect().await }, path: domain.path.clone() };
    let (_, boots) = tick.counted().expect("it counts");
    domain.run("Destroy").await.expect("destroyed");
    domain.run("Start").await.expect("it starts from the device");
    tick.boots_to(boots + 1).await;
    domain.run("Destroy").await.expect("destroyed");
}
