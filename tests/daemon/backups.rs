//! Backups through the bus, of guests in memory: jobs, refusals, and what they create beside.

use crate::common::Daemon;
use crate::common::checkpoints::{call, create, get, list};
use crate::common::client::{Client, Domain, Options, Refusal, options};
use crate::common::guest::until;
use crate::common::snapshots::with;
use std::io::Read as _;
use zbus::{OwnedObjectPath, Variant};

const WEB: &str = "<domain type='test'><name>web</name><memory>65536</memory><vcpu>1</vcpu><os><type>hvm</type></os><devices>\
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/web.qcow2'/>\
    <target dev='vda' bus='virtio'/></disk></devices></domain>";
const ONE: &str = "<domaincheckpoint><name>one</name></domaincheckpoint>";
const PULL: &str = "<domainbackup mode='pull'/>";

async fn begin(domain: &Domain, xml: &str, checkpoint: &str, how: Options<'_>) -> Result<String, Refusal> {
    let reply = domain.call("BackupBegin", &(xml, checkpoint, how)).await?;
    Ok(reply.body().deserialize::<OwnedObjectPath>().expect("o").to_string())
}

async fn job<T: TryFrom<zbus::OwnedVariant, Error: std::fmt::Debug>>(domain: &Domain, job: &str, what: &str) -> T {
    domain.client.property(job, "org.virt.Job", what).await
}

async fn started(daemon: &Daemon) -> Domain {
    let domain = Client { connection: daemon.connect().await }.define(WEB).await.expect("defined");
    domain.run("Start").await.expect("started");
    domain
}

fn refused<T>(done: Result<T, Refusal>, name: &str, words: &str) {
    let (error, why) = done.err().expect("refused");
    assert!(error.ends_with(name) && why.contains(words), "{error}: {why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_ends_by_itself_and_a_pull_is_finished() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = started(&daemon).await;
    let pushed = begin(&domain, "", ONE, options([])).await.expect("complete");
    assert_eq!(job::<String>(&domain, &pushed, "State").await, "succeeded");
    assert_eq!(job::<String>(&domain, &pushed, "Operation").await, "backup");
    assert!(job::<u64>(&domain, &pushed, "BytesDone").await > 0);
    assert_eq!(list(&domain).await, ["one"]);

    let pulled = begin(&domain, PULL, "", options([])).await.expect("ready");
    assert_eq!((job::<bool>(&domain, &pulled, "Ready").await, list(&domain).await.len()), (true, 1));
    let number = pulled.rsplit('/').next().expect("a number");
    let busy = format!("backup (job {number})");
    refused(begin(&domain, "", "", options([])).await, "Busy", &busy);
    refused(domain.call("CreateSnapshot", &("", options([]))).await, "Busy", &busy);
    refused(domain.call("BlockPull", &("vda", "", options([]))).await, "Busy", &busy);
    refused(domain.call("BlockResize", &("vda", 1u64 << 31, options([]))).await, "Busy", &busy);
    let alias = "<disk type='file'><target dev='vda' bus='virtio'/></disk>";
    refused(domain.call("DetachDevice", &(alias, with([("live", true)]))).await, "Busy", "'vda'");
    refused(domain.call("OpenBackup", &("vdb", options([]))).await, "NoSuchDevice", "vdb");
    let reply = domain.call("OpenBackup", &("vda", options([]))).await.expect("opened");
    let fd: zbus::wire::OwnedFd = reply.body().deserialize().expect("h");
    let mut line = std::os::unix::net::UnixStream::from(std::os::fd::OwnedFd::from(fd));
    let mut hello = [0; 8];
    line.read_exact(&mut hello).expect("it speaks first");
    assert_eq!(&hello, b"NBDMAGIC");
    // What else is done to the machine is done meanwhile.
    domain.bare("Suspend").await.expect("suspended");
    domain.bare("Resume").await.expect("resumed");
    domain.client.call(&pulled, "org.virt.Job.Finish", &(options([]),)).await.expect("finished");
    assert_eq!(job::<String>(&domain, &pulled, "State").await, "succeeded");
    let mut rest = Vec::new();
    line.read_to_end(&mut rest).expect("it is closed with the backup");

    // A guest that ends takes its backup with it; a push waits for one that stands, and can be cancelled.
    let pulled = begin(&domain, PULL, "", options([])).await.expect("ready");
    let mut watch = domain.client.watch().await;
    domain.run("Destroy").await.expect("destroyed");
    while job::<String>(&domain, &pulled, "State").await != "failed" {
        watch.next().await;
    }
    domain.run("Start").await.expect("started");
    domain.bare("Suspend").await.expect("suspended");
    let pushed = begin(&domain, "", "", with([("no-wait", true)])).await.expect("begun");
    while job::<u64>(&domain, &pushed, "BytesTotal").await == 0 {
        watch.next().await;
    }
    refused(domain.client.call(&pushed, "org.virt.Job.Finish", &(options([]),)).await, "OperationInvalid", "not ready");
    domain.client.call(&pushed, "org.virt.Job.Cancel", &()).await.expect("cancelled");
    while job::<String>(&domain, &pushed, "State").await != "cancelled" {
        watch.next().await;
    }
}

/// What cannot be ended at once is tried again, and keeps others from beginning: its record would be lost.
#[tokio::test]
async fn an_end_that_fails_is_tried_again() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = started(&daemon).await;
    let pulled = begin(&domain, PULL, "", options([])).await.expect("ready");
    let uuid: String = domain.property("UUID").await;
    let record = daemon.root().join("var/lib/virt/snapshots").join(uuid).join(".backup");
    let aside = daemon.root().join("record");
    std::fs::rename(&record, &aside).expect("it is there");
    std::fs::create_dir(&record).expect("in its place");
    let finished = domain.client.call(&pulled, "org.virt.Job.Finish", &(options([]),)).await;
    refused(finished, "StorageFailed", ".backup");
    refused(begin(&domain, PULL, "", options([])).await, "Busy", "tried again");
    refused(domain.call("OpenBackup", &("vda", options([]))).await, "OperationInvalid", "not ready");
    refused(create(&domain, "one").await, "Busy", "tried again");
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, &aside, CWD, &record, RenameFlags::EXCHANGE).expect("they change places");
    until(record.parent().expect("a folder"), || !record.exists()).await;
    // Whoever has taken it away has the turn until that is known.
    domain.is_looked_after().await;
    create(&domain, "one").await.expect("nothing is left that would take it away");
    call(&domain, "one", "Delete", options([])).await.expect("deleted");
    let again = begin(&domain, PULL, "", options([])).await.expect("ready");
    domain.client.call(&again, "org.virt.Job.Finish", &(options([]),)).await.expect("finished");

    // One that may never come to its end does not keep a machine that is off from being undefined.
    let last = begin(&domain, PULL, "", options([])).await.expect("ready");
    std::fs::remove_file(&record).expect("it is there");
    std::fs::create_dir(&record).expect("in its place");
    let finished = domain.client.call(&last, "org.virt.Job.Finish", &(options([]),)).await;
    refused(finished, "StorageFailed", ".backup");
    refused(domain.run("Undefine").await, "OperationInvalid", "tried again");
    domain.run("Destroy").await.expect("destroyed");
    domain.run("Undefine").await.expect("undefined");
    let anew = started(&daemon).await;
    begin(&anew, "", "", options([])).await.expect("complete");
}

#[tokio::test]
async fn what_cannot_be_backed_up_is_refused_by_name() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = started(&daemon).await;
    let backup = |inner: &str| format!("<domainbackup mode='pull'>{inner}</domainbackup>");
    let cases = [
        (backup("<server transport='tcp' name='::' port='1'/>"), "ConfigInvalid", "OpenBackup"),
        (backup("<incremental>none</incremental>"), "NoSuchCheckpoint", "'none'"),
        (backup("<disks><disk name='vdz'/></disks>"), "ConfigInvalid", "vdz"),
        (backup("<disks><disk name='vda'><scratch file='/images/web.qcow2'/></disk></disks>"), "InUse", "web"),
        ("<domainsnapshot/>".to_owned(), "ConfigInvalid", "domainbackup"),
    ];
    for (xml, error, words) in cases {
        refused(begin(&domain, &xml, "", options([])).await, error, words);
    }
    let slow = || options([("bandwidth", Variant::from(1u64))]);
    refused(begin(&domain, PULL, "", slow()).await, "InvalidArgument", "bandwidth");
    refused(begin(&domain, "", "", with([("quiesce", true)])).await, "InvalidArgument", "quiesce");
    // A checkpoint that cannot be created keeps the backup from being begun.
    begin(&domain, "", ONE, options([])).await.expect("complete");
    refused(begin(&domain, "", ONE, options([])).await, "CheckpointExists", "'one'");
    assert_eq!(get::<String>(&domain, "one", "Broken").await, "");
    domain.run("Destroy").await.expect("destroyed");
    refused(begin(&domain, "", "", options([])).await, "OperationInvalid", "start it first");
}
