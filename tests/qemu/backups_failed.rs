//! Backups, and copies of disks, that come to nothing: with their machine, or because there is no room. What they wrote is removed, and
//! the guest, if there is one, goes on.

use crate::backups::{Backed, begin, beside, ends, job_is, ready_to_cancel};
use crate::common::Daemon;
use crate::common::client::{Client, Domain, options};
use crate::disks_moved::copy_to;
use crate::saved::refused;
use std::path::Path;
use zbus::Variant;

/// A transient machine that ends while virtd is away, with a copy and a backup under way: what they wrote is removed before anything new
/// has its uuid, also where the host has been booted meanwhile, and nothing is known of the machine but their records.
#[tokio::test(flavor = "multi_thread")]
async fn a_transient_machine_that_ends_unseen_leaves_no_file_of_its_backup_or_copy() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let Some(mut backed) = Backed::start(&daemon, "passing").await else { return };
    let uuid: String = backed.domain.property("UUID").await;
    let xml = backed.tick.xml.replacen("<memory", &format!("<uuid>{uuid}</uuid><memory"), 1);
    let copy = backed.disks[0].with_extension("copy");
    for (mode, booted) in [("pull", false), ("push", true)] {
        let domain = &backed.domain;
        domain.run("Undefine").await.expect("transient");
        let asked = ("vda", copy_to(&copy, "qcow2"), options([]));
        domain.call("BlockCopy", &asked).await.expect("ready");
        let vdb = format!("<domainbackup mode='{mode}'><disks><disk name='vdb'/></disks></domainbackup>");
        let mut how = options([("no-wait", Variant::from(true))]);
        if mode == "push" {
            how.insert("bandwidth", Variant::from(65536u64));
        }
        let job = begin(domain, &vdb, "", how).await.expect("begun");
        match mode {
            "push" => ready_to_cancel(domain, &job).await,
            _ => becomes_ready(domain, &job).await,
        }
        assert!(copy.exists() && beside(&backed).len() == 1, "{mode}");

        let qemu = daemon.qemu_of(&backed.tick.name).expect("it runs");
        daemon.kill_virtd().await;
        nix::sys::signal::kill(qemu, nix::sys::signal::Signal::SIGKILL).expect("killed");
        let records = daemon.root().join("var/lib/virt/snapshots").join(&uuid);
        let recorded = || [".backup", ".jobs"].map(|record| records.join(record).exists());
        assert_eq!(recorded(), [true, true], "{mode}");
        if booted {
            std::fs::remove_dir_all(daemon.root().join("run/virt")).expect("gone with the host");
        }
        daemon.start_virtd().await;
        let client = Client { connection: daemon.connect().await };
        backed.domain = client.define(&xml).await.expect("its uuid is free when all is seen to");
        assert!(!copy.exists() && beside(&backed).is_empty(), "{mode}");
        assert_eq!(recorded(), [false, false], "{mode}");
        std::fs::write(&backed.tick.serial, "").expect("emptied");
        backed.domain.run("Start").await.expect("it starts from what it stood on");
        backed.tick.counts_to(2).await;
    }
}

async fn becomes_ready(domain: &Domain, job: &str) {
    let mut watch = domain.client.watch().await;
    while !job_is::<bool>(domain, job, "Ready").await {
        assert_ne!(job_is::<String>(domain, job, "State").await, "failed");
        watch.next().await;
    }
}

/// What is in a folder that only virtd's namespace sees.
fn listed(daemon: &Daemon, folder: &Path) -> String {
    let listed = daemon.inside("ls").arg(folder).output().expect("ls");
    String::from_utf8_lossy(&listed.stdout).trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn where_there_is_no_room_nothing_is_left_and_the_guest_goes_on() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(backed) = Backed::start(&daemon, "room").await else { return };
    let (domain, tick) = (&backed.domain, &backed.tick);
    let room = |name: &str| {
        let room = daemon.folder().join(name);
        std::fs::create_dir(&room).expect("a folder");
        let mounted = daemon.inside("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(&room).status();
        assert!(mounted.expect("mount").success());
        room
    };

    // Three megabytes do not go into one.
    let copied = room("copied");
    let copy = copy_to(&copied.join("copy"), "qcow2");
    refused(domain.call("BlockCopy", &("vdb", copy, options([]))).await, "NoSpace", &["'vdb'"]);
    assert_eq!(listed(&daemon, &copied), "");
    assert!(!domain.xml().await.contains("<mirror"));
    tick.goes_on().await;
    let pushed = room("pushed");
    let push = format!(
        "<domainbackup><disks><disk name='vdb'><target file='{}'/></disk></disks></domainbackup>",
        pushed.join("file").display()
    );
    refused(begin(domain, &push, "", options([])).await, "NoSpace", &["vdb'"]);
    assert_eq!(listed(&daemon, &pushed), "");
    tick.goes_on().await;

    // What the guest overwrites cannot be kept: it stands, as with any disk that has no room, until the backup is given up.
    domain.bare("Suspend").await.expect("suspended");
    let kept = room("kept");
    let pull = format!(
        "<domainbackup mode='pull'><disks><disk name='vda'><scratch file='{}'/></disk></disks></domainbackup>",
        kept.join("file").display()
    );
    let job = begin(domain, &pull, "", options([])).await.expect("ready");
    let fill = format!("dd if=/dev/zero of={} bs=4k 2>/dev/null", kept.join("filler").display());
    assert!(!daemon.inside("sh").args(["-c", &fill]).status().expect("sh").success(), "it is full");
    let mut watch = domain.client.watch().await;
    domain.bare("Resume").await.expect("resumed");
    watch.until(&domain.path, "suspended io-error").await;
    assert_eq!(domain.state().await, ("paused".into(), "io-error".into()));
    domain.client.call(&job, "org.virt.Job.Cancel", &()).await.expect("cancelled");
    ends(domain, &job, "cancelled").await;
    assert_eq!(listed(&daemon, &kept), "filler");
    domain.bare("Resume").await.expect("resumed");
    tick.goes_on().await;

    // Nothing of all that stands in the way of another.
    let job = begin(domain, "", "", options([])).await.expect("complete");
    assert_eq!((job_is::<String>(domain, &job, "State").await, beside(&backed).len()), ("succeeded".into(), 2));
    domain.run("Destroy").await.expect("destroyed");
}
