//! Whatever is killed at whatever step of an operation on snapshots: afterwards there is the old state or the new one,
//! nothing in between, nothing lost, nothing left lying about.

use crate::common::Daemon;
use crate::common::client::{Client, options};
use crate::common::cut_off::{Steps, Victims};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// More steps than any operation has.
const STEPS: u32 = 60;

/// An operation, and what comes before it.
#[derive(Clone, Copy, Debug)]
struct Operation {
    name: &'static str,
    /// Snapshots that are taken before, and how the machine is brought where the operation begins.
    before: &'static [Deed],
    deed: Deed,
}

/// Something a client does.
#[derive(Clone, Copy, Debug)]
enum Deed {
    AddDisk,
    Start,
    Stop,
    Take(&'static str),
    TakeDiskOnly(&'static str),
    TakeWithFile(&'static str),
    Revert(&'static str),
    Force(&'static str),
    Delete(&'static str),
}

const INTERNAL: &[Operation] = &[
    Operation { name: "create-live", before: &[Deed::Start], deed: Deed::Take("new") },
    Operation { name: "create-off", before: &[], deed: Deed::Take("new") },
    Operation {
        name: "revert-live",
        before: &[Deed::Start, Deed::Take("one"), Deed::Take("two")],
        deed: Deed::Revert("one"),
    },
    Operation { name: "revert-off", before: &[Deed::Start, Deed::Take("one"), Deed::Stop], deed: Deed::Revert("one") },
    Operation {
        name: "delete-live",
        before: &[Deed::Start, Deed::Take("one"), Deed::Take("two")],
        deed: Deed::Delete("one"),
    },
    Operation { name: "delete-off", before: &[Deed::Take("one"), Deed::Take("two")], deed: Deed::Delete("one") },
];

const EXTERNAL: &[Operation] = &[
    Operation { name: "create-full", before: &[Deed::Start], deed: Deed::TakeWithFile("new") },
    Operation { name: "create-disks", before: &[Deed::Start], deed: Deed::TakeDiskOnly("new") },
    Operation { name: "create-out-off", before: &[], deed: Deed::TakeDiskOnly("new") },
    Operation { name: "revert-full", before: &[Deed::Start, Deed::TakeWithFile("one")], deed: Deed::Force("one") },
    Operation { name: "revert-out-off", before: &[Deed::TakeDiskOnly("one")], deed: Deed::Revert("one") },
    Operation { name: "delete-top", before: &[Deed::Start, Deed::TakeDiskOnly("one")], deed: Deed::Delete("one") },
    Operation {
        name: "delete-middle",
        before: &[Deed::Start, Deed::TakeDiskOnly("one"), Deed::TakeDiskOnly("two")],
        deed: Deed::Delete("one"),
    },
    Operation {
        name: "delete-both",
        before: &[Deed::AddDisk, Deed::Start, Deed::TakeDiskOnly("one")],
        deed: Deed::Delete("one"),
    },
    Operation {
        name: "delete-forked",
        before: &[
            Deed::Start,
            Deed::TakeDiskOnly("one"),
            Deed::TakeDiskOnly("two"),
            Deed::TakeDiskOnly("three"),
            Deed::Force("two"),
            Deed::Start,
        ],
        deed: Deed::Delete("one"),
    },
    Operation { name: "delete-out-off", before: &[Deed::TakeDiskOnly("one")], deed: Deed::Delete("one") },
];

/// One machine with which it is tried.
struct Trial {
    player: Player,
    tick: Tick,
}

impl Trial {
    async fn begin(daemon: &Daemon, name: &str) -> Option<Trial> {
        let tick = Tick::new(daemon, name, "")?;
        let client = Client { connection: daemon.connect().await };
        let domain = client.define(&tick.xml).await.expect("defined");
        Some(Trial { player: Player { domain }, tick })
    }

    /// Does it; an error may be what is wanted.
    async fn perform(&self, deed: Deed) -> bool {
        let document = |name: &str| format!("<domainsnapshot><name>{name}</name></domainsnapshot>");
        let player = &self.player;
        match deed {
            Deed::AddDisk => {
                let (uuid, second) =
                    (player.domain.property::<String>("UUID").await, self.tick.disk.with_extension("b.qcow2"));
                let made =
                    Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&second).arg("1M").status();
                let disk = format!(
                    "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
                     <target dev='vdb' bus='virtio'/></disk><serial",
                    second.display()
                );
                let xml = self.tick.xml.replacen("<serial", &disk, 1);
                let xml = xml.replace("<name>", &format!("<uuid>{uuid}</uuid><name>"));
                made.expect("qemu-img").success() && player.domain.client.define(&xml).await.is_ok()
            }
            Deed::Start => {
                let done = player.domain.run("Start").await.is_ok();
                self.tick.counts_to(2).await;
                done
            }
            Deed::Stop => player.domain.run("Destroy").await.is_ok(),
            Deed::Take(name) => player.try_create(&document(name), options([])).await,
            Deed::TakeDiskOnly(name) => player.try_create(&document(name), with([("disk-only", true)])).await,
            Deed::TakeWithFile(name) => {
                let file = self.tick.disk.with_extension(format!("{name}-memory"));
                let xml = format!(
                    "<domainsnapshot><name>{name}</name><memory snapshot='external' file='{}'/></domainsnapshot>",
                    file.display()
                );
                player.try_create(&xml, options([])).await
            }
            Deed::Revert(name) => player.try_call(name, "Revert", options([])).await,
            Deed::Force(name) => player.try_call(name, "Revert", with([("force", true)])).await,
            Deed::Delete(name) => player.try_call(name, "Delete", options([])).await,
        }
    }

    /// The names of its snapshots, as the bus has them.
    async fn names(&self) -> BTreeSet<String> {
        let paths = self.player.list(options([])).await;
        paths.iter().map(|path| path.rsplit('/').next().unwrap_or_default().to_owned()).collect()
    }

    /// Holds what is there to be one state.
    async fn is_whole(&self, daemon: &Daemon, old: &BTreeSet<String>, new: &BTreeSet<String>) {
        let names = self.names().await;
        assert!(names == *old || names == *new, "neither {old:?} nor {new:?}: {names:?}");
        let uuid: String = self.player.domain.property("UUID").await;
        let folder = daemon.root().join("virt/snapshots").join(&uuid);
        let found = [folder.clone(), daemon.root().join("var/lib/virt/snapshots").join(&uuid)];
        assert!(!found.iter().any(|folder| folder.join(".intent").exists()), "something is still under way");
        for name in &names {
            let plan = self.player.check(name, "CheckRevert", options([])).await;
            let reason = String::try_from(plan["reason"].clone()).expect("s");
            assert_eq!(*plan["possible"], zbus::Variant::from(true), "{name}: {reason}");
        }
        // The guest goes on, or boots.
        if !self.player.domain.property::<bool>("Active").await {
            std::fs::write(&self.tick.serial, "").expect("emptied");
            self.player.domain.run("Start").await.expect("it can be started");
        }
        self.tick.goes_on().await;
        let mut known = files_in(&self.player.domain.xml().await);
        for name in &names {
            known.extend(files_in(&self.player.xml(name).await));
        }
        let there: BTreeSet<PathBuf> = beside(&self.tick.disk).into_iter().collect();
        let stray: Vec<_> = there.difference(&known).collect();
        assert!(stray.is_empty(), "stray files: {stray:?}");
        self.player.domain.run("Destroy").await.expect("destroyed");
        for image in there.iter().filter(|path| !path.to_string_lossy().ends_with("-memory")) {
            is_sound(image);
            for inner in inside(image) {
                assert!(names.contains(&inner), "{} holds '{inner}', of which nobody knows", image.display());
            }
        }
    }
}

/// Absolute paths in a document.
fn files_in(xml: &str) -> BTreeSet<PathBuf> {
    xml.split(['\'', '"']).filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

fn beside(image: &Path) -> Vec<PathBuf> {
    let stem = image.file_stem().expect("a name").to_string_lossy().into_owned();
    let entries = std::fs::read_dir(image.parent().expect("a folder")).expect("a folder");
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    found.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&format!("{stem}."))));
    found.retain(|path| path.extension().is_none_or(|extension| extension != "serial"));
    found
}

fn inside(image: &Path) -> Vec<String> {
    let told = Command::new("qemu-img").args(["info", "-U", "--output=json"]).arg(image).output().expect("qemu-img");
    let told: serde_json::Value = serde_json::from_slice(&told.stdout).expect("JSON");
    let inner = told["snapshots"].as_array().into_iter().flatten();
    inner.filter_map(|one| one["name"].as_str().map(str::to_owned)).collect()
}

/// No error in it; clusters that nobody uses any more are no loss.
fn is_sound(image: &Path) {
    let checked = Command::new("qemu-img").arg("check").arg(image).output().expect("qemu-img");
    let words = String::from_utf8_lossy(&checked.stdout).into_owned() + &String::from_utf8_lossy(&checked.stderr);
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{}: {words}", image.display());
}

/// Tries it at every step there is; gives how many there were.
async fn killed_at_every_step(daemon: &mut Daemon, operation: &Operation, victims: Victims) -> Option<u32> {
    let mut steps = Steps::of(operation.name, victims, 0..STEPS);
    loop {
        let step = steps.next();
        let name = format!("{}-{}{step}", operation.name, if victims == Victims::Virtd { "v" } else { "q" });
        let mut trial = Trial::begin(daemon, &name).await?;
        for deed in operation.before {
            assert!(trial.perform(*deed).await, "{deed:?} before {operation:?}");
        }
        let old = trial.names().await;
        let mut new = old.clone();
        match operation.deed {
            Deed::Take(one) | Deed::TakeDiskOnly(one) | Deed::TakeWithFile(one) => _ = new.insert(one.to_owned()),
            Deed::Delete(one) => _ = new.remove(one),
            _ => {}
        }
        if victims == Victims::Qemu && daemon.qemu_of(&trial.tick.name).is_none() {
            return Some(0);
        }
        let (ran, id) =
            (trial.player.domain.state().await.0 == "running", trial.player.domain.property::<u32>("Id").await);
        let mut watch = trial.player.domain.client.watch().await;
        steps.kill(daemon, &trial.tick.name);
        let done = trial.perform(operation.deed).await;
        let came = steps.came(daemon, &mut trial.player.domain, done).await;
        while came && victims == Victims::Qemu && trial.player.domain.property::<u32>("Id").await == id {
            // Until its end is told.
            watch.next().await;
        }
        if came && victims == Victims::Virtd {
            let state = trial.player.domain.state().await.0;
            assert!(!ran || state == "running", "{operation:?} at {step}: it ran, and is {state}");
        }
        trial.is_whole(daemon, &old, &new).await;
        if !came {
            return Some(step - 1);
        }
    }
}

async fn all(operations: &[Operation], victims: Victims) {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let mut kills = 0;
    for operation in operations {
        let Some(steps) = killed_at_every_step(&mut daemon, operation, victims).await else { return };
        kills += steps;
    }
    println!("{kills} kills");
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_with_snapshots_inside_images() {
    all(INTERNAL, Victims::Virtd).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_with_overlays() {
    all(EXTERNAL, Victims::Virtd).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_killed_with_snapshots_inside_images() {
    all(INTERNAL, Victims::Qemu).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_killed_with_overlays() {
    all(EXTERNAL, Victims::Qemu).await;
}
