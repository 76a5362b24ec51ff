//! Media of drives, changed while the guest runs and while it does not. What lies in a drive is what QEMU has open.

use crate::common::client::{Client, Domain, Refusal, options};
use crate::common::cut_off::{Steps, Victims};
use crate::common::guest::Tick;
use crate::common::snapshots::with;
use crate::common::users::ADMIN;
use crate::common::{Daemon, Setup};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

const DRIVES: &str = "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><target dev='sda' bus='sata'/></disk>\
     <disk type='file' device='floppy'><driver name='qemu' type='raw'/><target dev='fda' bus='fdc'/></disk>";

struct Machine {
    daemon: Daemon,
    tick: Tick,
    domain: Domain,
}

impl Machine {
    async fn with_drives() -> Option<Machine> {
        let daemon = Daemon::on_system_bus(Setup::default()).await?;
        let mut tick = Tick::new(&daemon, "drives", "")?;
        tick.xml = tick.xml.replace("<devices>", &format!("<devices>{DRIVES}"));
        let client = Client { connection: daemon.connect().await };
        let domain = client.define(&tick.xml).await.expect("defined");
        Some(Machine { daemon, tick, domain })
    }

    /// A file that only root may read.
    fn medium(&self, name: &str, bytes: usize) -> PathBuf {
        let path = self.daemon.folder().join(name);
        std::fs::write(&path, vec![0; bytes]).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("set");
        path
    }

    async fn put(&self, target: &str, medium: Option<&Path>, flags: &[(&str, bool)]) -> Result<(), Refusal> {
        let device = if target == "fda" { "floppy" } else { "cdrom" };
        let source = medium.map(|path| format!("<source file='{}'/>", path.display())).unwrap_or_default();
        let xml = format!(
            "<disk type='file' device='{device}'><driver name='qemu' type='raw'/>{source}<target dev='{target}'/></disk>"
        );
        self.domain.call("UpdateDevice", &(xml, with(flags.iter().copied()))).await.map(drop)
    }

    fn has_open(&self, medium: &Path) -> bool {
        let pid = self.daemon.qemu_of("drives").expect("it runs");
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its files");
        files.flatten().any(|file| std::fs::read_link(file.path()).is_ok_and(|link| link == medium))
    }

    /// The files that QEMU says that the drives hold, while no virtd has its monitor.
    fn held(&self) -> Vec<String> {
        let told = self.daemon.asks_qemu(&["{\"execute\":\"query-block\"}"]);
        let drives = told[0]["return"].as_array().into_iter().flatten();
        drives.filter_map(|drive| drive["inserted"]["file"].as_str().map(str::to_owned)).collect()
    }

    /// virtd is killed, and another one has had its look at the guest.
    async fn is_found_again(&mut self) {
        self.daemon.start_virtd().await;
        self.domain = self.domain.client.named("drives").await.expect("found");
        self.domain.is_looked_after().await;
    }

    async fn xml(&self, inactive: bool) -> String {
        let asked = (with([("inactive", inactive)]),);
        self.domain.call("GetXML", &asked).await.expect("told").body().deserialize().expect("s")
    }
}

fn names(xml: &str, medium: &Path) -> bool {
    xml.contains(&format!("file='{}'", medium.display()))
}

#[tokio::test]
async fn a_medium_is_changed_in_what_runs_in_what_is_stored_or_both() {
    let Some(mut machine) = Machine::with_drives().await else { return };
    let [one, two] = ["one.iso", "two.iso"].map(|name| machine.medium(name, 1 << 20));
    let floppy = machine.medium("floppy.img", 1440 << 10);
    machine.put("sda", Some(&one), &[]).await.expect("changed while it is off");
    assert!(names(&machine.xml(true).await, &one));
    machine.domain.run("Start").await.expect("started");
    machine.tick.counts_to(2).await;
    assert!(machine.has_open(&one));

    let mut watch = machine.domain.client.watch().await;
    machine.put("sda", Some(&two), &[("live", true)]).await.expect("changed in what runs");
    assert!(machine.has_open(&two) && !machine.has_open(&one));
    assert!(names(&machine.xml(false).await, &two) && names(&machine.xml(true).await, &one));
    assert!(machine.domain.property::<bool>("ConfigChanged").await);

    machine.put("fda", Some(&floppy), &[]).await.expect("changed in both");
    assert_eq!(watch.lifecycle(&machine.domain.path).await, "defined updated", "once: the first one was live only");
    assert!(machine.has_open(&floppy));

    // The same without a document.
    let put = machine.domain.call("ChangeMedium", &("sda", one.to_string_lossy(), with([("live", true)]))).await;
    put.expect("changed by its path");
    assert!(machine.has_open(&one) && !machine.has_open(&two));
    let put = machine.domain.call("ChangeMedium", &("sda", two.to_string_lossy(), with([("force", true)]))).await;
    put.expect("and back, in both");
    assert!(machine.has_open(&two) && !machine.has_open(&one));

    // Another virtd finds the drives as they are.
    machine.daemon.kill_virtd().await;
    machine.daemon.start_virtd().await;
    machine.put("sda", None, &[]).await.expect("taken out");
    machine.put("fda", Some(&one), &[("live", true)]).await.expect("a floppy, too");
    assert!(!machine.has_open(&two) && !machine.has_open(&floppy) && machine.has_open(&one));
    assert!(!names(&machine.xml(false).await, &two) && names(&machine.xml(true).await, &floppy));
    machine.tick.goes_on().await;
    machine.domain.run("Destroy").await.expect("destroyed");
}

#[tokio::test]
async fn what_is_refused_changes_nothing() {
    let Some(machine) = Machine::with_drives().await else { return };
    let one = machine.medium("one.iso", 1 << 20);
    let refused = |answer: Result<(), Refusal>, error: &str, word: &str| {
        let (name, text) = answer.expect_err(error);
        assert!(name == format!("org.virt.Error.{error}") && text.contains(word), "{name}: {text}");
    };
    refused(machine.put("sda", Some(&one), &[("live", true)]).await, "OperationInvalid", "start it first");
    machine.put("sda", Some(&one), &[]).await.expect("changed");
    machine.domain.run("Start").await.expect("started");
    machine.tick.counts_to(2).await;
    let before = (machine.xml(false).await, machine.xml(true).await);

    let missing = machine.daemon.folder().join("missing.iso");
    refused(machine.put("sda", Some(&missing), &[]).await, "StorageFailed", "missing.iso");
    refused(machine.put("sdb", Some(&one), &[]).await, "NoSuchDevice", "sdb");
    refused(machine.put("vda", Some(&one), &[]).await, "OperationUnsupported", "vda");
    refused(machine.put("sda", None, &[("slow", true)]).await, "InvalidArgument", "slow");
    let cached =
        "<disk type='file' device='cdrom'><driver name='qemu' cache='none'/><target dev='sda' bus='sata'/></disk>";
    let (name, text) = machine.domain.call("UpdateDevice", &(cached, options([]))).await.expect_err("not its medium");
    assert!(name.ends_with("OperationUnsupported") && text.contains("cache='none' of <driver>"), "{name}: {text}");
    let noise = ("<sound model='ich9'/>", options([]));
    let (name, _) = machine.domain.call("UpdateDevice", &noise).await.expect_err("a sound card is no medium");
    assert_eq!(name, "org.virt.Error.OperationUnsupported");
    let (name, _) = machine.domain.call("UpdateDevice", &("<disk", options([]))).await.expect_err("no document");
    assert_eq!(name, "org.virt.Error.ConfigInvalid");
    assert!(machine.has_open(&one));
    assert_eq!(before, (machine.xml(false).await, machine.xml(true).await));

    let stranger = Client { connection: machine.daemon.connect_as(&ADMIN).await };
    let theirs = Domain { client: stranger, path: machine.domain.path.clone() };
    let empty = "<disk type='file' device='cdrom'><target dev='sda'/></disk>";
    let (name, _) = theirs.call("UpdateDevice", &(empty, options([]))).await.expect_err("nobody has allowed it");
    assert!(name.starts_with("org.freedesktop.DBus.Error."), "{name}");
    machine.domain.run("Destroy").await.expect("destroyed");
}

#[tokio::test]
async fn whoever_is_killed_while_a_medium_is_changed_what_is_told_lies_in_the_drive() {
    let Some(mut machine) = Machine::with_drives().await else { return };
    let [one, two] = ["one.iso", "two.iso"].map(|name| machine.medium(name, 1 << 20));
    machine.put("sda", Some(&one), &[]).await.expect("changed while it is off");
    machine.domain.run("Start").await.expect("started");
    machine.tick.counts_to(2).await;
    for config in [true, false] {
        let mut steps = Steps::of(format!("ChangeMedium, config: {config}"), Victims::Virtd, 4..8);
        loop {
            let stored_before = machine.xml(true).await;
            let (now, next) = if machine.has_open(&one) { (&one, &two) } else { (&two, &one) };
            steps.next();
            steps.kill(&machine.daemon, "drives");
            let flags = with([("live", true), ("config", config)]);
            let changed = machine.domain.call("ChangeMedium", &("sda", next.to_string_lossy(), flags)).await;
            if !steps.struck(&mut machine.daemon, changed.is_ok()).await {
                break;
            }
            machine.is_found_again().await;
            let (live, stored) = (machine.xml(false).await, machine.xml(true).await);
            // The next virtd is no more, and QEMU alone tells.
            machine.daemon.kill_virtd().await;
            let held = machine.held();
            let (is_new, when) = (held.contains(&next.display().to_string()), steps.when());
            steps.is_done(is_new);
            let (there, gone) = if is_new { (next, now) } else { (now, next) };
            assert!(held.contains(&there.display().to_string()), "{when}: {held:?}");
            assert!(names(&live, there) && !names(&live, gone), "{when}: {held:?}, {live}");
            assert!(machine.has_open(there) && !machine.has_open(gone), "{when}: what was begun is left");
            match config {
                true => assert!(names(&stored, there) && !names(&stored, gone), "{when}: {stored}"),
                false => assert_eq!(stored, stored_before, "{when}"),
            }
            machine.is_found_again().await;
        }
    }
    machine.tick.goes_on().await;
    machine.domain.run("Destroy").await.expect("destroyed");
}
