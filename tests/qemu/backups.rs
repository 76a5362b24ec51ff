//! Backups of real guests that write all the time: what is read, or written, is what the disks held at one moment.

use crate::common::checkpoints::{breaks, create, get, list};
use crate::common::client::{Client, Domain, Options, Refusal, options};
use crate::common::cut_off::{Steps, Victims};
use crate::common::guest::Tick;
use crate::common::snapshots::Player;
use crate::common::users::ADMIN;
use crate::common::{Daemon, Setup};
use crate::saved::refused;
use crate::system::lent;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use zbus::{OwnedObjectPath, Variant};

/// More steps than a backup has.
const STEPS: u32 = 20;
const ONE: &str = "<domaincheckpoint><name>one</name></domaincheckpoint>";
const TWO: &str = "<domaincheckpoint><name>two</name></domaincheckpoint>";

pub fn run(program: &str, arguments: &[&str]) -> String {
    let done = Command::new(program).args(arguments).output().expect("it runs");
    assert!(done.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).expect("UTF-8")
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a text")
}

/// A tick with a second disk of some megabytes with something in them.
pub struct Backed {
    pub domain: Domain,
    pub tick: Tick,
    pub disks: [PathBuf; 2],
}

impl Backed {
    pub async fn start(daemon: &Daemon, name: &str) -> Option<Backed> {
        let mut tick = Tick::new(daemon, name, "")?;
        let other = daemon.folder().join(format!("{name}.b.qcow2"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", text(&other), "16M"]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1M 3M", "-c", "write -P 8 9M 64k", text(&other)]);
        let disk = format!(
            "<disk type='file'><driver type='qcow2'/><source file='{}'/><target dev='vdb' bus='virtio'/></disk><serial",
            other.display()
        );
        tick.xml = tick.xml.replace("<serial", &disk);
        let domain = Client { connection: daemon.connect().await }.define(&tick.xml).await.expect("defined");
        domain.run("Start").await.expect("started");
        tick.counts_to(3).await;
        let disks = [tick.disk.clone(), other];
        Some(Backed { domain, tick, disks })
    }

    /// What the disks hold while the guest stands, raw.
    fn held(&self) -> [Vec<u8>; 2] {
        self.disks.each_ref().map(|disk| {
            let raw = disk.with_extension("held");
            run("qemu-img", &["convert", "-U", "-f", "qcow2", "-O", "raw", text(disk), text(&raw)]);
            std::fs::read(&raw).expect("read")
        })
    }

    /// Begins a backup while the guest stands, which then writes on: what the disks held. `what`: mode and content.
    async fn begin(&self, what: (&str, &str), checkpoint: &str, how: Options<'_>) -> ([Vec<u8>; 2], String) {
        self.domain.bare("Suspend").await.expect("suspended");
        let held = self.held();
        let xml = format!("<domainbackup mode='{}'>{}</domainbackup>", what.0, what.1);
        let job = begin(&self.domain, &xml, checkpoint, how).await.expect("begun");
        self.domain.bare("Resume").await.expect("resumed");
        self.tick.goes_on().await;
        (held, job)
    }
}

pub async fn begin(domain: &Domain, xml: &str, checkpoint: &str, how: Options<'_>) -> Result<String, Refusal> {
    let reply = domain.call("BackupBegin", &(xml, checkpoint, how)).await?;
    Ok(reply.body().deserialize::<OwnedObjectPath>().expect("o").to_string())
}

async fn finish(domain: &Domain, job: &str) -> Result<(), Refusal> {
    domain.client.call(job, "org.virt.Job.Finish", &(options([]),)).await.map(drop)
}

pub async fn job_is<T: TryFrom<zbus::OwnedVariant, Error: std::fmt::Debug>>(
    domain: &Domain,
    job: &str,
    what: &str,
) -> T {
    domain.client.property(job, "org.virt.Job", what).await
}

/// Files that a backup may have left beside an image.
pub fn beside(backed: &Backed) -> Vec<PathBuf> {
    let folder = backed.disks[0].parent().expect("a folder");
    let all = std::fs::read_dir(folder).expect("there").flatten().map(|entry| entry.path());
    let mut left: Vec<PathBuf> =
        all.filter(|file| file.extension().is_some_and(|ending| ending == "scratch" || ending == "backup")).collect();
    left.retain(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&backed.tick.name)));
    left.sort();
    left
}

/// A socket at which tools read a backup: each that connects there has a connection of its own.
struct Bridge {
    path: PathBuf,
    served: tokio::task::JoinHandle<()>,
}

impl Bridge {
    fn to(domain: &Domain, target: &str, folder: &Path) -> Bridge {
        let path = folder.join(format!("{target}.nbd"));
        let _ = std::fs::remove_file(&path);
        let listener = tokio::net::UnixListener::bind(&path).expect("bound");
        let (domain, target) = (domain.clone(), target.to_owned());
        let served = tokio::spawn(async move {
            while let Ok((mut tool, _)) = listener.accept().await {
                let mut backup = open(&domain, &target).await.expect("opened");
                tokio::spawn(async move { tokio::io::copy_bidirectional(&mut tool, &mut backup).await });
            }
        });
        Bridge { path, served }
    }

    /// All of the disk as the export has it.
    async fn read(&self, export: &str) -> Vec<u8> {
        let (raw, from) =
            (self.path.with_extension("raw"), format!("nbd+unix:///{export}?socket={}", text(&self.path)));
        let to = raw.clone();
        let read = move || run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &from, text(&to)]);
        tokio::task::spawn_blocking(read).await.expect("read");
        std::fs::read(&raw).expect("read")
    }

    /// What the bitmap says that has been written: offset and length.
    async fn dirty(&self, export: &str, bitmap: &str) -> Vec<(usize, usize)> {
        let image = format!(
            "driver=nbd,export={export},server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
            text(&self.path)
        );
        let map = move || run("qemu-img", &["map", "--output=json", "--image-opts", &image]);
        let told: serde_json::Value =
            serde_json::from_str(&tokio::task::spawn_blocking(map).await.expect("read")).expect("JSON");
        let number =
            |one: &serde_json::Value, key: &str| usize::try_from(one[key].as_u64().expect("a number")).unwrap();
        let dirty = told.as_array().expect("a list").iter().filter(|one| one["data"] == false);
        dirty.map(|one| (number(one, "start"), number(one, "length"))).collect()
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.served.abort();
    }
}

async fn open(domain: &Domain, target: &str) -> Result<tokio::net::UnixStream, Refusal> {
    let reply = domain.call("OpenBackup", &(target, options([]))).await?;
    let fd: zbus::wire::OwnedFd = reply.body().deserialize().expect("h");
    let stream = std::os::unix::net::UnixStream::from(OwnedFd::from(fd));
    stream.set_nonblocking(true).expect("a socket");
    Ok(tokio::net::UnixStream::from_std(stream).expect("a socket"))
}

/// What was written since, laid over what there was.
fn laid_over(mut before: Vec<u8>, now: &[u8], dirty: &[(usize, usize)]) -> Vec<u8> {
    for (start, length) in dirty {
        before[*start..start + length].copy_from_slice(&now[*start..start + length]);
    }
    before
}

fn assert_same(one: &[u8], other: &[u8], what: &str) {
    assert_eq!(one.len(), other.len(), "{what}");
    assert_eq!(one.iter().zip(other).position(|(a, b)| a != b), None, "{what}: the first byte that differs");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pulled_is_what_the_disks_held() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let Some(mut backed) = Backed::start(&daemon, "pull").await else { return };
    let domain = backed.domain.clone();
    refused(domain.call("OpenBackup", &("vda", options([]))).await, "OperationInvalid", &["mode='pull'"]);
    let (full, job) = backed.begin(("pull", ""), ONE, options([])).await;
    assert!(job_is::<bool>(&domain, &job, "Ready").await);
    assert_eq!(job_is::<String>(&domain, &job, "Operation").await, "backup");
    assert_eq!((list(&domain).await, beside(&backed).len()), (vec!["one".to_owned()], 2));
    for (target, held) in ["vda", "vdb"].into_iter().zip(&full) {
        let bridge = Bridge::to(&domain, target, daemon.folder());
        assert_same(&bridge.read(target).await, held, target);
    }
    // One at a time; what would take the disks away from it waits.
    refused(begin(&domain, "", "", options([])).await, "Busy", &[&job[job.rfind('/').unwrap() + 1..]]);
    let player = Player { domain: domain.clone() };
    refused(player.create("<domainsnapshot/>", options([])).await, "Busy", &["backup"]);
    refused(domain.call("OpenBackup", &("vdz", options([]))).await, "NoSuchDevice", &["vdz"]);

    // Another virtd finds it, with a job of its own.
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    backed.domain = Domain { client: Client { connection: daemon.connect().await }, path: domain.path.clone() };
    let domain = backed.domain.clone();
    domain.is_looked_after().await;
    let job = ready_job(&domain).await.expect("it goes on");
    let bridge = Bridge::to(&domain, "vda", daemon.folder());
    assert_same(&bridge.read("vda").await, &full[0], "after another virtd");
    finish(&domain, &job).await.expect("finished");
    assert_eq!((job_is::<String>(&domain, &job, "State").await, beside(&backed).len()), ("succeeded".into(), 0));
    refused(finish(&domain, &job).await, "OperationInvalid", &["ended"]);

    // Since then, over a restart of the guest; vdb was not written.
    domain.run("Destroy").await.expect("destroyed");
    domain.run("Start").await.expect("started");
    backed.tick.goes_on().await;
    let since = "<incremental>one</incremental><disks><disk name='vda' exportname='a' exportbitmap='new'/><disk name='vdb'/></disks>";
    let (now, job) = backed.begin(("pull", since), TWO, options([])).await;
    let bridge = Bridge::to(&domain, "vda", daemon.folder());
    let (read, dirty) = (bridge.read("a").await, bridge.dirty("a", "new").await);
    assert!(!dirty.is_empty() && dirty.iter().map(|(_, length)| length).sum::<usize>() < read.len(), "{dirty:?}");
    assert_same(&laid_over(full[0].clone(), &read, &dirty), &now[0], "vda since one");
    assert_ne!(full[0], now[0], "the guest has written");
    let bridge = Bridge::to(&domain, "vdb", daemon.folder());
    assert_eq!(bridge.dirty("vdb", "backup-vdb").await, []);
    domain.client.call(&job, "org.virt.Job.Cancel", &()).await.expect("cancelled");
    ends(&domain, &job, "cancelled").await;
    assert_eq!(beside(&backed).len(), 0);

    // A checkpoint that is broken is named, and never used.
    let mut watch = domain.client.watch().await;
    let qemu = daemon.qemu_of(&backed.tick.name).expect("it runs");
    nix::sys::signal::kill(qemu, nix::sys::signal::Signal::SIGKILL).expect("killed");
    breaks(&mut watch, &domain, "two").await;
    domain.run("Start").await.expect("started");
    let since = "<domainbackup><incremental>one</incremental></domainbackup>";
    refused(begin(&domain, since, "", options([])).await, "OperationInvalid", &["'one'", "inconsistent"]);
    assert_eq!(beside(&backed).len(), 0);
}

/// The one job that is ready, once it is; `None` if none is at work.
async fn ready_job(domain: &Domain) -> Option<String> {
    let mut watch = domain.client.watch().await;
    loop {
        let jobs = jobs(domain).await;
        for job in &jobs {
            if job_is::<bool>(domain, job, "Ready").await {
                return Some(job.clone());
            }
        }
        if jobs.is_empty() {
            return None;
        }
        watch.next().await;
    }
}

/// Waits for the end of a job, which is to be that.
pub async fn ends(domain: &Domain, job: &str, state: &str) {
    let mut watch = domain.client.watch().await;
    loop {
        let now: String = job_is(domain, job, "State").await;
        if !matches!(&*now, "waiting" | "running") {
            return assert_eq!(now, state);
        }
        watch.next().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_is_what_the_disks_held() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(backed) = Backed::start(&daemon, "push").await else { return };
    let domain = &backed.domain;
    let raw = |file: &Path| {
        let to = file.with_extension("raw");
        run("qemu-img", &["convert", "-O", "raw", text(file), text(&to)]);
        std::fs::read(&to).expect("read")
    };
    let at = |name: &str| daemon.folder().join(name);
    let targets = |a: &Path, b: &Path| {
        format!(
            "<disks><disk name='vda'><target file='{}'/></disk><disk name='vdb'><target file='{}'/></disk></disks>",
            a.display(),
            b.display()
        )
    };
    let (a, b) = (at("full-a"), at("full-b"));
    // Slowly: the guest writes meanwhile to what is not copied yet.
    let slowly = options([("bandwidth", Variant::from(8u64 << 20)), ("no-wait", Variant::from(true))]);
    let (full, job) = backed.begin(("push", &targets(&a, &b)), ONE, slowly).await;
    ends(domain, &job, "succeeded").await;
    assert_eq!(job_is::<u64>(domain, &job, "BytesDone").await, job_is::<u64>(domain, &job, "BytesTotal").await);
    assert_same(&raw(&a), &full[0], "vda");
    assert_same(&raw(&b), &full[1], "vdb");
    backed.tick.goes_on().await;

    let (c, d) = (at("since-a"), at("since-b"));
    let since = format!("<incremental>one</incremental>{}", targets(&c, &d));
    let (now, _) = backed.begin(("push", &since), "", options([])).await;
    assert_ne!(full[0], now[0], "the guest has written");
    for (new, old) in [(&c, &a), (&d, &b)] {
        run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", text(old), text(new)]);
    }
    assert_same(&raw(&c), &now[0], "vda since one");
    assert_same(&raw(&d), &now[1], "vdb since one");
    assert!(std::fs::metadata(&d).expect("there").len() < 1 << 20, "it holds only what is new");

    // Neither cancelled, nor of a guest that ends, does it leave a file; what is there is not touched.
    let very = || options([("bandwidth", Variant::from(65536u64)), ("no-wait", Variant::from(true))]);
    let job = begin(domain, "", "", very()).await.expect("begun");
    ready_to_cancel(domain, &job).await;
    domain.client.call(&job, "org.virt.Job.Cancel", &()).await.expect("cancelled");
    ends(domain, &job, "cancelled").await;
    assert_eq!(beside(&backed), [] as [PathBuf; 0]);
    let again = format!("<domainbackup>{}</domainbackup>", targets(&a, &at("new")));
    refused(begin(domain, &again, "", options([])).await, "ConfigUnsupported", &["full-a is there already"]);
    let own = format!("<domainbackup>{}</domainbackup>", targets(&backed.disks[1], &at("new")));
    refused(begin(domain, &own, "", options([])).await, "InUse", &["push"]);
    create(domain, "backup-vda").await.expect("created");
    let named = "<domainbackup mode='pull'><incremental>one</incremental></domainbackup>";
    refused(begin(domain, named, "", options([])).await, "CheckpointExists", &["'backup-vda'", "exportbitmap"]);
    let job = begin(domain, "", "", very()).await.expect("begun");
    ready_to_cancel(domain, &job).await;
    domain.run("Destroy").await.expect("destroyed");
    ends(domain, &job, "failed").await;
    assert_eq!((beside(&backed), at("new").exists()), (Vec::new(), false));
    assert_same(&raw(&a), &full[0], "what was complete");
}

/// QEMU is behind its wall, and has the scratch for as long as there is one; who reads has a connection, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn on_the_system_bus_a_backup_is_read_from_behind_the_wall() {
    let Some(daemon) = Daemon::on_system_bus(Setup::with_example_rules()).await else { return };
    let Some(tick) = Tick::new(&daemon, "wall", "") else { return };
    let client = Client { connection: daemon.connect_as(&ADMIN).await };
    let domain = client.define(&tick.xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    domain.bare("Suspend").await.expect("suspended");
    let raw = tick.disk.with_extension("held");
    run("qemu-img", &["convert", "-U", "-f", "qcow2", "-O", "raw", text(&tick.disk), text(&raw)]);
    let job = begin(&domain, "<domainbackup mode='pull'/>", "", options([])).await.expect("ready");
    domain.bare("Resume").await.expect("resumed");
    tick.goes_on().await;
    let backed = Backed { domain: domain.clone(), disks: [tick.disk.clone(), tick.disk.clone()], tick };
    let scratch = beside(&backed);
    assert_eq!(scratch.len(), 1, "{scratch:?}");
    let (image, made) = (std::fs::metadata(&backed.tick.disk), std::fs::metadata(&scratch[0]));
    assert_eq!(made.expect("there").uid(), image.expect("there").uid());
    assert!(lent(&scratch[0]) && lent(&backed.tick.disk), "to QEMU's user");
    let bridge = Bridge::to(&domain, "vda", daemon.folder());
    assert_same(&bridge.read("vda").await, &std::fs::read(&raw).expect("read"), "vda");
    finish(&domain, &job).await.expect("finished");
    assert_eq!(beside(&backed).len(), 0);
    assert!(lent(&backed.tick.disk), "it runs on");
    backed.tick.goes_on().await;
    domain.run("Destroy").await.expect("destroyed");
}

/// Waits until a job is at work.
pub async fn ready_to_cancel(domain: &Domain, job: &str) {
    let mut watch = domain.client.watch().await;
    while job_is::<u64>(domain, job, "BytesTotal").await == 0 {
        assert_ne!(job_is::<String>(domain, job, "State").await, "failed");
        watch.next().await;
    }
}

/// A backup, with a checkpoint, in the midst of which virtd or QEMU is killed, at each step there is: it goes on or nothing of it
/// is left.
async fn killed_at_every_step(victims: Victims, mode: &str) {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let mut steps = Steps::of(mode, victims, 4..STEPS);
    loop {
        let step = steps.next();
        let Some(mut backed) = Backed::start(&daemon, &format!("cut{step}")).await else { return };
        let mut watch = backed.domain.client.watch().await;
        steps.kill(&daemon, &backed.tick.name);
        let (path, xml) = (backed.domain.path.clone(), format!("<domainbackup mode='{mode}'/>"));
        let begun = backed.domain.client.ask(&path, "org.virt.Domain.BackupBegin", &(&xml, ONE, options([]))).await;
        if begun
            && mode == "pull"
            && let Some(job) = ready_job(&backed.domain).await
        {
            backed.domain.client.ask(&job, "org.virt.Job.Finish", &(options([]),)).await;
        }
        if !steps.came(&mut daemon, &mut backed.domain, begun).await {
            return;
        }
        if victims == Victims::Virtd {
            let domain = &backed.domain;
            domain.is_looked_after().await;
            let is_there = !jobs(domain).await.is_empty();
            steps.is_done(is_there || !list(domain).await.is_empty());
            if mode == "pull" && is_there {
                finish(domain, &ready_job(domain).await.expect("it goes on")).await.expect("finished");
            }
            until_no_job(domain).await;
            let left = beside(&backed);
            assert!(left.is_empty() || mode == "push" && left.len() == 2, "{left:?} at {step}");
            if list(domain).await.is_empty() {
                assert!(left.is_empty(), "{left:?} at {step}");
            } else {
                assert_eq!(get::<String>(domain, "one", "Broken").await, "", "at {step}");
            }
            for file in left {
                run("qemu-img", &["check", "-q", text(&file)]);
                std::fs::remove_file(file).expect("removed");
            }
            // Nothing stands in the way of the next one.
            begin(domain, "", "", options([])).await.expect("another one");
        } else {
            while !watch.lifecycle(&backed.domain.path).await.starts_with("stopped") {}
            until_no_job(&backed.domain).await;
            let left = beside(&backed);
            assert!(left.is_empty() || mode == "push" && begun && left.len() == 2, "{left:?} at {step}");
        }
        let _ = backed.domain.run("Destroy").await;
    }
}

async fn jobs(domain: &Domain) -> Vec<String> {
    let jobs = domain.client.call("/org/virt", "org.virt.Manager.GetJobs", &()).await.expect("told");
    let jobs: Vec<OwnedObjectPath> = jobs.body().deserialize().expect("ao");
    let mut at_work = Vec::new();
    for job in jobs {
        if matches!(&*job_is::<String>(domain, job.as_str(), "State").await, "waiting" | "running") {
            at_work.push(job.to_string());
        }
    }
    at_work
}

async fn until_no_job(domain: &Domain) {
    let mut watch = domain.client.watch().await;
    while !jobs(domain).await.is_empty() {
        watch.next().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_in_the_midst_of_a_pull() {
    killed_at_every_step(Victims::Virtd, "pull").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_in_the_midst_of_a_push() {
    killed_at_every_step(Victims::Virtd, "push").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_killed_in_the_midst_of_a_pull() {
    killed_at_every_step(Victims::Qemu, "pull").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_killed_in_the_midst_of_a_push() {
    killed_at_every_step(Victims::Qemu, "push").await;
}
