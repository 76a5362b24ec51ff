//! A machine that goes with all that is its own: its snapshots with their data, its images; whatever is killed meanwhile.

use crate::common::Daemon;
use crate::common::client::{Client, Domain, Options, options};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use zbus::{OwnedVariant, Variant};

/// More steps than there are.
const STEPS: u32 = 40;

/// A tick with a second disk, and of others what `more` says; the second disk.
fn machine(daemon: &Daemon, name: &str, more: &str) -> Option<(Tick, PathBuf)> {
    let mut tick = Tick::new(daemon, name, "")?;
    let second = tick.disk.with_extension("b.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&second).arg("1M").status();
    assert!(made.expect("qemu-img").success());
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
         <target dev='vdb' bus='virtio'/></disk>{more}<serial",
        second.display()
    );
    tick.xml = tick.xml.replacen("<serial", &disk, 1);
    Some((tick, second))
}

fn all<'a>(storage: &[&'a str]) -> Options<'a> {
    options([("snapshots", Variant::from(true)), ("storage", Variant::from(storage.to_vec()))])
}

/// What `CheckUndefine` says.
async fn check(domain: &Domain, options: Options<'_>) -> HashMap<String, OwnedVariant> {
    domain.call("CheckUndefine", &(options,)).await.expect("told").body().deserialize().expect("a{sv}")
}

/// The files that it would do something to, with what that is.
fn files(told: &HashMap<String, OwnedVariant>) -> Vec<(String, String)> {
    let files: Vec<(String, String, u64)> = told["files"].clone().try_into().expect("a(sst)");
    files.into_iter().map(|(path, fate, _)| (path, fate)).collect()
}

/// What is beside an image, but for what the guest prints.
fn beside(image: &Path) -> Vec<PathBuf> {
    let stem = image.file_stem().expect("a name").to_string_lossy().into_owned() + ".";
    let entries = std::fs::read_dir(image.parent().expect("a folder")).expect("a folder");
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    found.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&stem)));
    found.retain(|path| path.extension().is_none_or(|extension| extension != "serial"));
    found
}

#[tokio::test]
async fn a_machine_goes_with_its_snapshots_and_its_images() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some((tick, second)) = machine(&daemon, "whole", "") else { return };
    let client = Client { connection: daemon.connect().await };
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    player.take("inner").await;
    let overlays = "<domainsnapshot><name>outer</name></domainsnapshot>";
    player.create(overlays, with([("disk-only", true)])).await.expect("taken");
    let overlay = tick.disk.with_extension("outer");
    assert!(overlay.exists());

    // Snapshots alone: their data is merged and removed, and the images stay.
    let told = check(&player.domain, with([("snapshots", true)])).await;
    let shown = |path: &Path| path.display().to_string();
    assert!(files(&told).contains(&(shown(&overlay), "merged".to_owned())), "{told:?}");
    let told = check(&player.domain, all(&["vda", &shown(&second)])).await;
    assert!(bool::try_from(told["possible"].clone()).expect("b"), "{told:?}");
    assert!(files(&told).contains(&(shown(&tick.disk), "deleted".to_owned())), "{told:?}");
    let removed: Vec<String> = told["removed"].clone().try_into().expect("as");
    assert!([&overlay, &tick.disk, &second].iter().all(|file| removed.contains(&shown(file))), "{removed:?}");
    assert!(overlay.exists() && tick.disk.exists() && second.exists(), "nothing was changed");
    player.domain.call("Undefine", &(all(&["vda", &shown(&second)]),)).await.expect("undefined");
    assert!(client.named("whole").await.is_err());
    assert_eq!(beside(&tick.disk), Vec::<PathBuf>::new());

    // Without storage, the images hold what they held last, and nothing of the snapshots.
    let Some((tick, _)) = machine(&daemon, "kept", "") else { return };
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    player.take("inner").await;
    player.create(overlays, with([("disk-only", true)])).await.expect("taken");
    player.domain.call("Undefine", &(with([("snapshots", true)]),)).await.expect("undefined");
    assert_eq!(beside(&tick.disk).len(), 2, "{:?}", beside(&tick.disk));
    let told = Command::new("qemu-img").args(["info", "--output=json"]).arg(&tick.disk).output().expect("qemu-img");
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(!told.contains("inner") && !told.contains("backing"), "{told}");
}

#[tokio::test]
async fn what_is_not_the_machines_own_stays_and_all_of_it_is_said() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let at = |name: &str| daemon.folder().join(name);
    std::fs::write(at("iso"), "").expect("written");
    std::fs::write(at("raw"), "").expect("written");
    std::fs::write(at("shared"), "").expect("written");
    std::os::unix::fs::symlink(at("raw"), at("link")).expect("linked");
    let disk = |target: &str, file: &str, more: &str| {
        let file = at(file);
        let source = format!("<driver type='raw'/><source file='{}'/>", file.display());
        format!("<disk type='file' device='disk'>{source}<target dev='{target}' bus='virtio'/>{more}</disk>")
    };
    let more = disk("vdc", "iso", "<readonly/>") + &disk("vdd", "link", "") + &disk("vde", "shared", "<shareable/>");
    let Some((tick, second)) = machine(&daemon, "many", &more) else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&tick.xml).await.expect("defined");
    // Another machine stands on the second disk.
    let clone = at("clone.qcow2");
    let mut made = Command::new("qemu-img");
    made.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).args([&second, &clone]);
    assert!(made.status().expect("qemu-img").success());
    let other = format!(
        "<domain type='qemu'><name>other</name><memory>8192</memory><os><type>hvm</type></os><devices>\
         <disk type='file'><driver type='qcow2'/><source file='{}'/><backingStore type='file'><format type='qcow2'/>\
         <source file='{}'/><backingStore/></backingStore><target dev='vda' bus='virtio'/></disk></devices></domain>",
        clone.display(),
        second.display()
    );
    client.define(&other).await.expect("defined");
    let every = all(&["vda", "vdb", "vdc", "vdd", "vde"]);
    let (name, why) = domain.call("Undefine", &(every,)).await.expect_err("much is in the way");
    assert_eq!(name, "org.virt.Error.OperationInvalid", "{why}");
    for part in [
        "disk 'vdc' is read-only, or a medium",
        "disk 'vde' is shared",
        "link is a link: name the file",
        "b.qcow2 is what domain 'other' (disk 'vda') stands on",
    ] {
        assert!(why.contains(part), "{part}: {why}");
    }
    client.named("other").await.expect("there").run("Undefine").await.expect("undefined");
    domain.run("Start").await.expect("started");
    let (_, why) = domain.call("Undefine", &(all(&["vda"]),)).await.expect_err("it runs");
    assert!(why.contains("it runs and stands on its disks"), "{why}");
    domain.run("Destroy").await.expect("destroyed");
    assert!(tick.disk.exists() && second.exists() && at("raw").exists() && at("iso").exists());
}

/// Whatever step virtd is killed at, the machine is there with its images, or nothing of it is.
#[tokio::test(flavor = "multi_thread")]
async fn virtd_killed_while_a_machine_goes_with_its_storage() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let (mut there, mut gone) = (0, 0);
    for step in 1..STEPS {
        let name = format!("cut{step}");
        let Some((tick, second)) = machine(&daemon, &name, "") else { return };
        let client = Client { connection: daemon.connect().await };
        let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
        let uuid: String = player.domain.property("UUID").await;
        player.take("one").await;
        daemon.at_step(step, &format!("kill -9 {}", daemon.virtd_pid()));
        let member = "org.virt.Domain.Undefine";
        let _ = client.ask(&player.domain.path, member, &(all(&["vda", "vdb"]),)).await;
        let came = daemon.step_came();
        let client = if came {
            daemon.virtd_died().await;
            daemon.start_virtd().await;
            Client { connection: daemon.connect().await }
        } else {
            client
        };
        // Behind what is made whole.
        let domain = Domain { client: client.clone(), path: player.domain.path.clone() };
        if domain.call("SetTitle", &("there", options([]))).await.is_ok() {
            assert!(came, "it was undefined");
            assert!(tick.disk.exists() && second.exists(), "step {step}: it is there, and its images are not");
            domain.call("Undefine", &(all(&["vda", "vdb"]),)).await.expect("once more");
            there += 1;
        } else {
            gone += 1;
        }
        assert!(client.named(&name).await.is_err(), "step {step}: it is still there");
        assert_eq!(beside(&tick.disk), Vec::<PathBuf>::new(), "step {step}");
        let state = daemon.root().join("var/lib/virt");
        let left = [state.join(format!("snapshots/{uuid}")), state.join(format!("domains/{uuid}.xml"))];
        assert!(left.iter().all(|path| !path.exists()), "step {step}: {left:?}");
        if !came {
            assert!(there > 2 && gone > 3, "{there} there, {gone} gone");
            assert!(daemon.log().contains("its removal with its storage was cut off"), "it is said");
            return;
        }
    }
    panic!("there are more than {STEPS} steps");
}
