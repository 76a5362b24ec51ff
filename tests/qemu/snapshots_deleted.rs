//! Deleting snapshots whose overlays are merged: begun is begun, what is left is done by the next deletion, and nothing is
//! merged that is not where it was recorded.

use crate::common::client::{Client, Domain, options};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use crate::common::{Daemon, PATIENCE};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// What the frozen file holds, and what has been written since.
const BEFORE: u8 = 0x11;
const SINCE: u8 = 0x22;

/// A tick with a second disk, of which a snapshot has been taken and to whose overlay much has been written.
struct Trial {
    daemon: Daemon,
    name: String,
    player: Player,
    tick: Tick,
    base: PathBuf,
    overlay: PathBuf,
    mib: u32,
}

impl Trial {
    /// `room`: what the file system of the frozen file has, in MiB; all there is if `None`.
    async fn begin(name: &str, mib: u32, room: Option<u32>) -> Option<Trial> {
        let daemon = Daemon::on_session_bus().await?;
        let mut tick = Tick::new(&daemon, name, "")?;
        let place = daemon.folder().join("room");
        std::fs::create_dir(&place).expect("a folder");
        if let Some(room) = room {
            let size = format!("size={room}m");
            run(&daemon, "mount", &["-t", "tmpfs", "-o", &size, "none", &place.to_string_lossy()]);
        }
        let (base, overlay) =
            (place.join(format!("{name}-b.qcow2")), tick.disk.with_file_name(format!("{name}-b.one")));
        run(&daemon, "qemu-img", &["create", "-q", "-f", "qcow2", &base.to_string_lossy(), "1G"]);
        let second = format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
             <target dev='vdb' bus='virtio'/></disk><serial",
            base.display()
        );
        tick.xml = tick.xml.replacen("<serial", &second, 1);
        let client = Client { connection: daemon.connect().await };
        let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
        let trial = Trial { daemon, name: name.to_owned(), player, tick, base, overlay, mib };
        trial.write(&trial.base, BEFORE, 4);
        let xml = format!(
            "<domainsnapshot><name>one</name><disks><disk name='vdb'><source file='{}'/></disk></disks></domainsnapshot>",
            trial.overlay.display()
        );
        trial.player.create(&xml, with([("disk-only", true)])).await.expect("taken");
        trial.write(&trial.overlay, SINCE, mib);
        Some(trial)
    }

    fn write(&self, image: &Path, byte: u8, mib: u32) {
        let command = format!("write -P {byte} 0 {mib}M");
        run(&self.daemon, "qemu-io", &["-f", "qcow2", "-c", &command, &image.to_string_lossy()]);
    }

    /// Holds an image to what has been written since.
    fn holds_all(&self, image: &Path) {
        let command = format!("read -P {SINCE} 0 {}M", self.mib);
        let told = self.daemon.inside("qemu-io").args(["-r", "-U", "-f", "qcow2", "-c", &command]).arg(image).output();
        let words = String::from_utf8_lossy(&told.expect("qemu-io").stdout).into_owned();
        assert!(!words.contains("Pattern verification failed") && words.contains("read "), "{words}");
    }

    async fn start(&self) {
        self.player.domain.run("Start").await.expect("started");
        self.tick.counts_to(2).await;
    }

    /// Begins a deletion; its job, once nothing can be taken back any more.
    async fn begun(&self) -> Job {
        let mut watch = self.player.domain.client.watch().await;
        let reply = self.player.call("one", "Delete", with([("no-wait", true)])).await.expect("accepted");
        let job: zbus::OwnedObjectPath = reply.body().deserialize().expect("o");
        let job = Job { client: self.player.domain.client.clone(), path: job.to_string() };
        while job.get::<bool>("Cancellable").await {
            watch.next().await;
        }
        assert_eq!(job.get::<String>("State").await, "running", "in time");
        job
    }

    /// Both configurations name these files, and no others of these.
    async fn stands_on(&self, files: &[&Path]) {
        let stored: String = {
            let reply = self.player.domain.call("GetXML", &(with([("inactive", true)]),)).await.expect("told");
            reply.body().deserialize().expect("s")
        };
        for xml in [self.player.domain.xml().await, stored] {
            let tops = xml.split("<disk ").skip(1).map(|disk| disk.split("<backingStore").next().unwrap_or_default());
            let tops: Vec<&str> = tops.filter_map(|disk| disk.split("file='").nth(1)?.split('\'').next()).collect();
            assert_eq!(tops, files.iter().map(|file| file.to_str().expect("a path")).collect::<Vec<_>>());
        }
    }

    /// A check's verdict, and its files.
    async fn verdict(&self, method: &str) -> (bool, String, Vec<(String, String, u64)>) {
        let mut told = self.player.check("one", method, options([])).await;
        let keys = [
            "needs-force",
            "risks",
            "abi-differences",
            "starts-new-process",
            "events",
            "possible",
            "error",
            "reason",
            "files",
        ];
        assert!(keys.iter().all(|key| told.contains_key(*key)), "{:?}", told.keys());
        let mut take = |key: &str| told.remove(key).expect("there");
        let possible = take("possible").try_into().expect("b");
        (possible, take("reason").try_into().expect("s"), take("files").try_into().expect("a(sst)"))
    }

    /// It cannot be gone back to, and that is said.
    async fn is_only_to_be_deleted(&self) {
        let (possible, reason, _) = self.verdict("CheckRevert").await;
        assert!(!possible && reason.contains("delete it again"), "{reason}");
        let (name, why) = self.player.call("one", "Revert", options([])).await.expect_err("refused");
        assert!(name.ends_with("OperationInvalid") && why.contains("delete it again"), "{name}: {why}");
        assert!(self.player.xml("one").await.contains("<snapshotDeleteInProgress/>"));
    }

    /// The client of a virtd that has been started again.
    async fn again(&mut self) {
        self.daemon.start_virtd().await;
        let client = Client { connection: self.daemon.connect().await };
        self.player.domain = Domain { client, path: self.player.domain.path.clone() };
    }

    /// QEMU may write the base from now on, which it was shown to be read; virtd does so when it merges.
    fn base_is_written(&self) {
        let qemu = self.daemon.qemu_of(&self.name).expect("it runs").to_string();
        let into = ["--target", &qemu, "--user", "--preserve-credentials", "--mount", "--pid", "--"];
        let base = self.base.to_string_lossy();
        run(&self.daemon, "nsenter", &[&into[..], &["mount", "-o", "remount,bind,rw", &base]].concat());
    }

    /// Somebody talks to the guest's QEMU while no virtd does.
    async fn by_hand(&mut self, deeds: impl FnOnce(&mut Monitor)) {
        self.daemon.kill_virtd().await;
        self.base_is_written();
        let sockets = found(&self.daemon.root(), &|path| path.file_name().is_some_and(|name| name == "monitor.sock"));
        let monitor = UnixStream::connect(&sockets[0]).expect("QEMU listens");
        monitor.set_read_timeout(Some(PATIENCE)).expect("a limit");
        let mut monitor = Monitor { lines: BufReader::new(monitor), events: 0 };
        monitor.read();
        monitor.ask("qmp_capabilities", json!({}));
        deeds(&mut monitor);
        drop(monitor);
        self.again().await;
    }

    fn grow_room(&self, mib: u32) {
        let size = format!("remount,size={mib}m");
        run(&self.daemon, "mount", &["-o", &size, &self.base.parent().expect("a folder").to_string_lossy()]);
    }
}

struct Job {
    client: Client,
    path: String,
}

impl Job {
    async fn get<T>(&self, property: &str) -> T
    where
        T: TryFrom<zbus::OwnedVariant>,
        T::Error: std::fmt::Debug,
    {
        self.client.property(&self.path, "org.virt.Job", property).await
    }

    /// How it ended.
    async fn end(&self) -> String {
        let mut watch = self.client.watch().await;
        while self.get::<String>("State").await == "running" {
            watch.next().await;
        }
        self.get::<String>("State").await
    }
}

/// A hand on QEMU.
struct Monitor {
    lines: BufReader<UnixStream>,
    /// Events that have come so far.
    events: usize,
}

impl Monitor {
    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("QEMU answers");
        let told: Value = serde_json::from_str(&line).expect("JSON");
        self.events += usize::from(told.get("event").is_some());
        told
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let text = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.lines.get_mut().write_all(text.as_bytes()).expect("QEMU hears");
        loop {
            let mut told = self.read();
            assert!(told.get("error").is_none(), "{command}: {told}");
            if let Some(answer) = told.get_mut("return") {
                return answer.take();
            }
        }
    }

    /// The name of the node that reads a file in qcow2.
    fn node(&mut self, file: &Path) -> String {
        let nodes = self.ask("query-named-block-nodes", json!({ "flat": true }));
        let ours = nodes.as_array().into_iter().flatten().find(|node| {
            let told = node["file"].as_str().unwrap_or_default();
            node["drv"] == "qcow2"
                && (told == file.to_string_lossy() || told.ends_with(&format!("{}\"}}}}", file.display())))
        });
        ours.expect("it is open")["node-name"].as_str().expect("a name").to_owned()
    }

    /// Waits until a job is as far as that. An event that comes before an answer may tell of what is not yet in it.
    fn job_comes_to(&mut self, id: &str, wanted: &str) {
        let is_there =
            |told: &Value| told.as_array().into_iter().flatten().any(|job| job["id"] == id && job["status"] == wanted);
        loop {
            let before = self.events;
            if is_there(&self.ask("query-jobs", json!({}))) {
                break;
            }
            while self.events == before {
                self.read();
            }
        }
    }
}

fn run(daemon: &Daemon, program: &str, arguments: &[&str]) {
    let done = daemon.inside(program).args(arguments).output().expect(program);
    assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
}

/// All that is below a folder and is wanted.
fn found(folder: &Path, wanted: &dyn Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if wanted(&path) {
            all.push(path.clone());
        }
        if path.is_dir() && !path.is_symlink() {
            all.extend(found(&path, wanted));
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_has_begun_is_not_cancelled() {
    let Some(trial) = Trial::begin("begun", 192, None).await else { return };
    trial.start().await;
    let job = trial.begun().await;
    let (name, why) = job.client.call(&job.path, "org.virt.Job.Cancel", &()).await.expect_err("too late");
    assert!(name.ends_with("OperationInvalid"), "{name}: {why}");
    assert_eq!(job.end().await, "succeeded");
    trial.holds_all(&trial.base);
    trial.stands_on(&[&trial.tick.disk, &trial.base]).await;
    assert!(!trial.overlay.exists());
    trial.tick.goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_destroyed_in_the_middle_of_a_merge_leaves_it_whole() {
    let Some(trial) = Trial::begin("destroyed", 192, None).await else { return };
    trial.start().await;
    let job = trial.begun().await;
    trial.player.domain.run("Destroy").await.expect("at once");
    assert_eq!(trial.daemon.qemu_of(&trial.tick.name), None);
    assert_eq!(job.end().await, "succeeded");
    trial.holds_all(&trial.base);
    trial.stands_on(&[&trial.tick.disk, &trial.base]).await;
    assert!(!trial.overlay.exists());
    assert_eq!(trial.player.domain.property::<u32>("SnapshotCount").await, 0);
    std::fs::write(&trial.tick.serial, "").expect("emptied");
    trial.start().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_without_room_is_finished_by_the_next_deletion() {
    let Some(mut trial) = Trial::begin("room", 48, Some(16)).await else { return };
    let (name, why) = trial.player.call("one", "Delete", options([])).await.expect_err("no room");
    assert!(name.ends_with("NoSpace") && why.contains("delete it again"), "{name}: {why}");
    trial.is_only_to_be_deleted().await;
    trial.stands_on(&[&trial.tick.disk, &trial.overlay]).await;
    trial.holds_all(&trial.overlay);
    // That is known to the next virtd, too.
    trial.daemon.stop_virtd().await;
    trial.again().await;
    trial.is_only_to_be_deleted().await;
    trial.grow_room(128);
    trial.player.call("one", "Delete", options([])).await.expect("merged");
    trial.holds_all(&trial.base);
    trial.stands_on(&[&trial.tick.disk, &trial.base]).await;
    assert!(!trial.overlay.exists());
    trial.start().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_virtd_and_room_left_alone_is_finished_by_the_next_deletion() {
    let Some(mut trial) = Trial::begin("alone", 48, Some(16)).await else { return };
    // When it is written down what is to be done.
    trial.daemon.at_step(3, &format!("kill -9 {}", trial.daemon.virtd_pid()));
    assert!(!trial.player.try_call("one", "Delete", options([])).await);
    trial.daemon.virtd_died().await;
    trial.again().await;
    assert!(trial.daemon.log().contains("delete it again"), "{}", trial.daemon.log());
    trial.is_only_to_be_deleted().await;
    trial.stands_on(&[&trial.tick.disk, &trial.overlay]).await;
    trial.start().await;
    trial.grow_room(128);
    trial.player.call("one", "Delete", options([])).await.expect("merged");
    trial.holds_all(&trial.base);
    trial.stands_on(&[&trial.tick.disk, &trial.base]).await;
    trial.tick.goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_merged_stays_so_when_the_next_disk_has_no_room() {
    let Some(trial) = Trial::begin("half", 48, Some(16)).await else { return };
    trial.start().await;
    let first = trial.tick.disk.with_extension("one");
    trial.stands_on(&[&first, &trial.overlay]).await;
    let (name, why) = trial.player.call("one", "Delete", options([])).await.expect_err("no room");
    assert!(name.ends_with("NoSpace") && why.contains("'vdb'") && why.contains("delete it again"), "{name}: {why}");
    trial.stands_on(&[&trial.tick.disk, &trial.overlay]).await;
    assert!(!first.exists() && trial.overlay.exists());
    trial.is_only_to_be_deleted().await;
    trial.tick.goes_on().await;
    // The next cold start is from what the guest wrote last.
    let (_, boots) = trial.tick.counted().expect("it counts");
    trial.player.domain.run("Destroy").await.expect("destroyed");
    trial.player.domain.run("Start").await.expect("started");
    trial.tick.boots_to(boots + 1).await;
    trial.grow_room(128);
    trial.player.call("one", "Delete", options([])).await.expect("merged");
    trial.holds_all(&trial.base);
    trial.stands_on(&[&trial.tick.disk, &trial.base]).await;
    assert!(!trial.overlay.exists());
    trial.tick.goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_merged_that_is_not_where_it_was_recorded() {
    let Some(mut trial) = Trial::begin("places", 4, None).await else { return };
    // Off: somebody has put the overlay on something else.
    let other = trial.base.with_extension("other");
    std::fs::copy(&trial.base, &other).expect("copied");
    let rebased = |on: &Path| {
        let (on, overlay) = (on.to_string_lossy(), trial.overlay.to_string_lossy());
        run(&trial.daemon, "qemu-img", &["rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &on, &overlay]);
    };
    rebased(&other);
    let expected = format!("'vdb': the recorded overlay {} is not in the current chain", trial.overlay.display());
    let (possible, reason, files) = trial.verdict("CheckDelete").await;
    assert!(!possible && reason.contains(&expected) && reason.contains("nothing was changed"), "{reason}");
    assert_eq!(files.iter().filter(|(_, what, _)| what == "merged").count(), 2, "{files:?}");
    let (name, why) = trial.player.call("one", "Delete", options([])).await.expect_err("refused");
    assert!(name.ends_with("StorageFailed") && why.contains(&expected), "{name}: {why}");
    assert!(trial.verdict("CheckRevert").await.0, "nothing was changed");
    rebased(&trial.base);
    assert!(trial.verdict("CheckDelete").await.0);
    // Running: somebody has merged it by hand, and the guest has gone on.
    trial.start().await;
    let (overlay, base) = (trial.overlay.clone(), trial.base.clone());
    let hand = |monitor: &mut Monitor| {
        let (device, on) = (monitor.node(&overlay), monitor.node(&base));
        monitor
            .ask("block-commit", json!({ "job-id": "hand", "device": device, "base-node": on, "auto-dismiss": false }));
        monitor.job_comes_to("hand", "ready");
        monitor.ask("job-complete", json!({ "id": "hand" }));
        monitor.job_comes_to("hand", "concluded");
        monitor.ask("job-dismiss", json!({ "id": "hand" }));
    };
    trial.by_hand(hand).await;
    let (possible, reason, _) = trial.verdict("CheckDelete").await;
    assert!(!possible && reason.contains(&expected), "{reason}");
    let (name, why) = trial.player.call("one", "Delete", options([])).await.expect_err("refused");
    assert!(name.ends_with("StorageFailed") && why.contains(&expected), "{name}: {why}");
    let first = trial.tick.disk.with_extension("one");
    trial.stands_on(&[&first, &trial.overlay]).await;
    assert!(trial.overlay.exists() && first.exists());
    trial.tick.goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_jobs_of_others_are_waited_for_and_what_is_left_of_ours_is_not() {
    let Some(mut trial) = Trial::begin("jobs", 4, None).await else { return };
    trial.start().await;
    let (overlay, base) = (trial.overlay.clone(), trial.base.clone());
    let mirror = |monitor: &mut Monitor| {
        let device = monitor.node(&overlay);
        monitor.ask("blockdev-add", json!({ "driver": "null-co", "node-name": "void", "size": 1u64 << 30 }));
        monitor.ask(
            "blockdev-mirror",
            json!({ "job-id": "backup", "device": device, "target": "void", "sync": "none", "auto-dismiss": false }),
        );
    };
    trial.by_hand(mirror).await;
    let (possible, reason, files) = trial.verdict("CheckDelete").await;
    assert!(!possible && reason.contains("'backup'"), "{reason}");
    assert_eq!(files.len(), 2, "{files:?}");
    let (name, why) = trial.player.call("one", "Delete", options([])).await.expect_err("refused");
    assert!(name.ends_with("OperationInvalid") && why.contains("'backup'"), "{name}: {why}");
    assert!(trial.verdict("CheckRevert").await.1.contains("'backup'"), "a revert waits for it, too");
    // It ends; and one of ours has been cancelled, and is still there to tell of it.
    let overlay = trial.overlay.clone();
    let cancelled = |monitor: &mut Monitor| {
        monitor.ask("job-cancel", json!({ "id": "backup" }));
        monitor.job_comes_to("backup", "concluded");
        monitor.ask("job-dismiss", json!({ "id": "backup" }));
        let (device, on) = (monitor.node(&overlay), monitor.node(&base));
        let id = "virtd-merge-vdb";
        let arguments = json!({ "job-id": id, "device": device, "base-node": on, "auto-dismiss": false, "speed": 1 });
        monitor.ask("block-commit", arguments);
        monitor.ask("job-cancel", json!({ "id": id }));
        monitor.job_comes_to(id, "concluded");
    };
    trial.by_hand(cancelled).await;
    trial.player.call("one", "Delete", options([])).await.expect("deleted");
    trial.holds_all(&trial.base);
    trial.stands_on(&[&trial.tick.disk, &trial.base]).await;
    trial.tick.goes_on().await;
}

/// What is removed is the overlay that was merged, and nothing that somebody has put into its place meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_has_an_overlays_name_by_then_stays() {
    let Some(trial) = Trial::begin("renamed", 4, None).await else { return };
    let (script, moved) = (trial.daemon.folder().join("swap"), trial.overlay.with_extension("moved"));
    // At the first step at which the base holds all.
    let swap = format!(
        "if qemu-io -r -U -f qcow2 -c 'read -P {SINCE} 0 {}M' {base} | grep -q failed; \
         then echo '1 sh {script}' > \"$VIRTD_AT_STEP\"; else mv {overlay} {moved}; echo precious > {overlay}; fi\n",
        trial.mib,
        base = trial.base.display(),
        script = script.display(),
        overlay = trial.overlay.display(),
        moved = moved.display()
    );
    std::fs::write(&script, swap).expect("written");
    trial.daemon.at_step(1, &format!("sh {}", script.display()));
    trial.player.call("one", "Delete", options([])).await.expect("merged");
    assert!(moved.exists() && trial.daemon.step_came(), "the overlay was moved away");
    assert_eq!(std::fs::read_to_string(&trial.overlay).expect("it is there"), "precious\n");
    assert!(!trial.tick.disk.with_extension("one").exists(), "what nobody has moved is gone");
    trial.holds_all(&trial.base);
    trial.stands_on(&[&trial.tick.disk, &trial.base]).await;
}
