//! Block jobs as clients see them, of the test driver's machines.

use crate::common::Daemon;
use crate::common::client::{Client, Domain, Options, Refusal, options};
use crate::common::snapshots::with;
use zbus::{OwnedObjectPath, Variant};

const JOB: &str = "org.virt.Job";

/// A disk of three layers, and another.
const MACHINE: &str = "<domain type='test'><name>web</name><memory>65536</memory><os><type>hvm</type></os><devices>\
     <disk type='file'><driver type='qcow2'/><source file='/top'/><backingStore type='file'><format type='qcow2'/>\
     <source file='/mid'/><backingStore type='file'><format type='raw'/><source file='/base'/><backingStore/>\
     </backingStore></backingStore><target dev='vda' bus='virtio'/></disk>\
     <disk type='file'><source file='/more.img'/><target dev='vdb' bus='virtio'/></disk>\
     <disk type='file' device='cdrom'><source file='/a.iso'/><target dev='sda' bus='sata'/><readonly/></disk></devices></domain>";

const COPY: &str = "<disk type='file'><driver type='raw'/><source file='/copy'/></disk>";

fn refused(answer: Result<impl std::fmt::Debug, Refusal>, error: &str, word: &str) {
    let (name, text) = answer.expect_err(error);
    assert!(name == format!("org.virt.Error.{error}") && text.contains(word), "{name}: {text}");
}

async fn stored(domain: &Domain) -> String {
    domain.call("GetXML", &(with([("inactive", true)]),)).await.expect("told").body().deserialize().expect("s")
}

/// The files that a configuration names, of that disk first its own.
fn files(xml: &str, target: &str) -> Vec<String> {
    let disk = xml.split("<disk ").find(|disk| disk.contains(&format!("dev='{target}'"))).expect("a disk");
    let disk = disk.split("<mirror").next().expect("a part");
    disk.split("<source file='").skip(1).map(|rest| rest.split('\'').next().expect("a path").to_owned()).collect()
}

struct Job {
    client: Client,
    path: String,
}

impl Job {
    async fn of(
        domain: &Domain,
        method: &str,
        body: &(impl serde::Serialize + zbus::wire::DynamicType),
    ) -> Result<Job, Refusal> {
        let path: OwnedObjectPath = domain.call(method, body).await?.body().deserialize().expect("o");
        Ok(Job { client: domain.client.clone(), path: path.to_string() })
    }

    async fn get<T>(&self, property: &str) -> T
    where
        T: TryFrom<zbus::OwnedVariant>,
        T::Error: std::fmt::Debug,
    {
        self.client.property(&self.path, JOB, property).await
    }

    async fn call(&self, method: &str) -> Result<(), Refusal> {
        let member = format!("{JOB}.{method}");
        match method {
            "Cancel" => self.client.call(&self.path, &member, &()).await.map(drop),
            _ => self.client.call(&self.path, &member, &(options([]),)).await.map(drop),
        }
    }

    /// Waits until a property is so.
    async fn comes_to(&self, property: &str, wanted: &str) {
        let mut watch = self.client.watch().await;
        while self.get::<String>(property).await != wanted {
            watch.next().await;
        }
    }
}

/// So slow that it does not come to its end.
fn slowly<'a>() -> Options<'a> {
    options([("bandwidth", Variant::from(1u64)), ("no-wait", Variant::from(true))])
}

async fn machine(daemon: &Daemon) -> Domain {
    let domain = Client { connection: daemon.connect().await }.define(MACHINE).await.expect("defined");
    domain.run("Start").await.expect("started");
    domain
}

#[tokio::test]
async fn configurations_follow_what_is_pulled_committed_and_copied() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = machine(&daemon).await;
    let both = async || [files(&domain.xml().await, "vda"), files(&stored(&domain).await, "vda")];
    let pulled = Job::of(&domain, "BlockPull", &("vda", "/base", options([]))).await.expect("pulled");
    let state = (pulled.get::<String>("Operation").await, pulled.get::<String>("State").await);
    assert_eq!(state, ("block-pull".to_owned(), "succeeded".to_owned()));
    assert_eq!(pulled.get::<u64>("BytesTotal").await, 64 << 20);
    assert_eq!(both().await, [["/top", "/base"], ["/top", "/base"]]);
    refused(pulled.call("Finish").await, "OperationInvalid", "ended");

    // What the guest writes goes into what it stands on: when that is finished.
    let commit = Job::of(&domain, "BlockCommit", &("vda", "", "vda[0]", options([]))).await.expect("ready");
    assert!(commit.get::<bool>("Ready").await);
    assert!(domain.xml().await.contains("<mirror type='file' job='active-commit' ready='yes'>"));
    assert_eq!(both().await, [["/top", "/base"], ["/top", "/base"]]);
    commit.call("Finish").await.expect("finished");
    assert_eq!(commit.get::<String>("State").await, "succeeded");
    assert!(!commit.get::<bool>("Ready").await);
    assert_eq!(both().await, [["/base"], ["/base"]]);

    let copy = Job::of(&domain, "BlockCopy", &("vda", COPY, options([]))).await.expect("ready");
    let shown = domain.xml().await;
    assert!(shown.contains("<mirror type='file' file='/copy' format='raw' job='copy' ready='yes'>"), "{shown}");
    assert!(!stored(&domain).await.contains("mirror"));
    copy.call("Cancel").await.expect("cancelled");
    copy.comes_to("State", "cancelled").await;
    assert!(!domain.xml().await.contains("mirror"));
    assert_eq!(both().await, [["/base"], ["/base"]]);
    let copy = Job::of(&domain, "BlockCopy", &("vda", COPY, options([]))).await.expect("ready");
    copy.call("Finish").await.expect("finished");
    assert_eq!(both().await, [["/copy"], ["/copy"]]);
    assert!(!domain.property::<bool>("ConfigChanged").await);
}

#[tokio::test]
async fn a_layer_in_the_middle_is_committed_and_what_runs_alone_follows_where_it_is_another() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = machine(&daemon).await;
    Job::of(&domain, "BlockCommit", &("vda", "vda[2]", "/mid", options([]))).await.expect("committed");
    assert_eq!(files(&domain.xml().await, "vda"), ["/top", "/base"]);
    assert_eq!(files(&stored(&domain).await, "vda"), ["/top", "/base"]);
    let other = MACHINE.replace("/more.img", "/other.img");
    let uuid = format!("<uuid>{}</uuid><memory>", domain.property::<String>("UUID").await);
    domain.client.define(&other.replacen("<memory>", &uuid, 1)).await.expect("defined anew");
    let copy = Job::of(&domain, "BlockCopy", &("vdb", COPY, options([]))).await.expect("ready");
    copy.call("Finish").await.expect("finished");
    assert_eq!(files(&domain.xml().await, "vdb"), ["/copy"]);
    assert_eq!(files(&stored(&domain).await, "vdb"), ["/other.img"], "that is another disk");
}

#[tokio::test]
async fn while_it_runs_what_would_get_in_its_way_is_refused_and_all_else_goes_on() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = machine(&daemon).await;
    let job = Job::of(&domain, "BlockCopy", &("vda", COPY, slowly())).await.expect("begun");
    job.comes_to("State", "running").await;
    assert!(!job.get::<bool>("Ready").await && job.get::<bool>("Cancellable").await);
    refused(job.call("Finish").await, "OperationInvalid", "not ready");
    let named = format!("block-copy (job {})", job.path.rsplit('/').next().expect("a number"));
    let snapshot = ("<domainsnapshot/>", with([("disk-only", true)]));
    refused(domain.call("CreateSnapshot", &snapshot).await, "Busy", &named);
    refused(domain.call("BlockPull", &("vda", "", options([]))).await, "Busy", &named);
    refused(domain.call("BlockResize", &("vda", 1u64 << 31, options([]))).await, "Busy", &named);
    let limit = options([("read-bytes-per-second", Variant::from(4096_u64))]);
    refused(domain.call("SetBlockThrottle", &("vda", limit, with([("live", true)]))).await, "Busy", &named);
    let disk = "<disk type='file'><target dev='vda' bus='virtio'/></disk>";
    refused(domain.call("DetachDevice", &(disk, with([("live", true)]))).await, "Busy", &named);
    let one = "<domaincheckpoint><disks><disk name='vda'/></disks></domaincheckpoint>";
    refused(domain.call("CreateCheckpoint", &(one, options([]))).await, "Busy", &named);
    refused(domain.call("BackupBegin", &("", "", options([]))).await, "Busy", &named);
    let again = Job::of(&domain, "BlockCopy", &("vdb", COPY, options([]))).await;
    refused(again.map(|job| job.path), "InUse", "the copy of disk 'vda' of domain 'web'");
    for method in ["Suspend", "Resume"] {
        domain.bare(method).await.expect(method);
    }
    let more = "<disk type='file'><source file='/b.img'/><target dev='vdc' bus='virtio'/></disk>";
    domain.call("AttachDevice", &(more, with([("live", true)]))).await.expect("plugged in");
    domain.call("DetachDevice", &(more, with([("live", true)]))).await.expect("unplugged");
    Job::of(&domain, "BlockResize", &("vdb", 2u64 << 30, options([]))).await.expect("resized");
    refused(domain.call("Undefine", &(options([]),)).await, "OperationInvalid", &named);
    domain.run("Destroy").await.expect("destroyed");
    job.comes_to("State", "failed").await;
    assert_eq!(job.get::<String>("ErrorName").await, "org.virt.Error.OperationInvalid");
    assert_eq!(files(&stored(&domain).await, "vda"), ["/top", "/mid", "/base"]);
    domain.run("Start").await.expect("started again");
    domain.call("CreateSnapshot", &snapshot).await.expect("taken");
}

#[tokio::test]
async fn what_cannot_be_moved_or_resized_is_refused_by_name() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(MACHINE).await.expect("defined");
    let call = async |method: &str, target: &str, text: &str| domain.call(method, &(target, text, options([]))).await;
    let resize =
        async |target: &str, size: u64, flags: Options<'_>| domain.call("BlockResize", &(target, size, flags)).await;
    refused(call("BlockPull", "vda", "").await, "OperationInvalid", "web");
    resize("vda", 2 << 30, options([])).await.expect("it is off");
    refused(resize("vda", 1 << 30, options([])).await, "InvalidArgument", "'shrink'");
    resize("vda", 1 << 30, with([("shrink", true)])).await.expect("that was meant");
    refused(resize("vda", 1000, options([])).await, "InvalidArgument", "512");
    refused(resize("vda", 0, options([])).await, "InvalidArgument", "512");
    refused(resize("vda", 1 << 63, options([])).await, "InvalidArgument", "no more than");
    refused(resize("sda", 1 << 30, options([])).await, "OperationUnsupported", "'sda' is no hard disk");
    refused(resize("vdz", 1 << 30, options([])).await, "NoSuchDevice", "vdz");
    refused(resize("vda", 1 << 30, with([("smaller", true)])).await, "InvalidArgument", "smaller");

    domain.run("Start").await.expect("started");
    refused(call("BlockPull", "vda", "/top").await, "InvalidArgument", "between");
    refused(call("BlockPull", "vda", "vda[1]").await, "InvalidArgument", "between");
    refused(call("BlockPull", "vda", "vda[3]").await, "InvalidArgument", "vda[2]");
    refused(call("BlockPull", "vda", "/other").await, "InvalidArgument", "/other");
    refused(call("BlockPull", "vdb", "").await, "OperationInvalid", "nothing");
    refused(call("BlockPull", "sda", "").await, "OperationUnsupported", "hard disk");
    let commit = async |base: &str, top: &str| domain.call("BlockCommit", &("vda", base, top, options([]))).await;
    refused(commit("vda[1]", "vda[1]").await, "InvalidArgument", "below");
    refused(commit("/top", "/base").await, "InvalidArgument", "below");
    let wrong = with([("delete", true)]);
    refused(domain.call("BlockPull", &("vda", "", wrong)).await, "InvalidArgument", "delete");
    for (xml, error, word) in [
        ("<disk/>", "InvalidArgument", "absolute"),
        ("<disk><source file='copy'/></disk>", "InvalidArgument", "absolute"),
        ("<disk type='network'/>", "OperationUnsupported", "network"),
        ("<disk><source file='/c'/><driver type='vmdk'/></disk>", "OperationUnsupported", "vmdk"),
        ("<disk><source file='/c'/><encryption/></disk>", "OperationUnsupported", "<encryption>"),
        ("<interface/>", "InvalidArgument", "<interface>"),
        ("<disk><source file='/more.img'/></disk>", "InUse", "vdb"),
        ("<disk><source file='/base'/></disk>", "InUse", "vda"),
        ("<disk", "ConfigInvalid", ""),
    ] {
        refused(call("BlockCopy", "vda", xml).await, error, word);
    }
    let fast = options([("bandwidth", Variant::from(u64::MAX))]);
    refused(domain.call("BlockPull", &("vda", "", fast)).await, "InvalidArgument", "'bandwidth'");
    let snapshot =
        "<domainsnapshot><name>frozen</name><disks><disk name='vdb' snapshot='no'/></disks></domainsnapshot>";
    domain.call("CreateSnapshot", &(snapshot, with([("disk-only", true)]))).await.expect("taken");
    refused(commit("", "").await, "InUse", "snapshot 'frozen'");
    refused(call("BlockPull", "vda", "").await, "InUse", "snapshot 'frozen'");
}

/// What statistics tell of the first disk.
async fn threshold(domain: &Domain) -> u64 {
    let told = domain.call("GetStats", &(options([("groups", Variant::from(vec!["disks"]))]),)).await.expect("told");
    let mut told: std::collections::HashMap<String, zbus::OwnedVariant> = told.body().deserialize().expect("a{sv}");
    let disks: Vec<std::collections::HashMap<String, zbus::OwnedVariant>> =
        told.remove("disks").expect("disks").try_into().expect("aa{sv}");
    u64::try_from(disks[0]["threshold"].try_clone().expect("a number")).expect("t")
}

#[tokio::test]
async fn writing_beyond_a_threshold_is_told_once() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = machine(&daemon).await;
    let set =
        async |target: &str, threshold: u64| domain.call("SetBlockThreshold", &(target, threshold, options([]))).await;
    set("vda", 1 << 30).await.expect("set");
    assert_eq!(threshold(&domain).await, 1 << 30);
    let mut watch = domain.client.watch().await;
    set("vda", 1 << 19).await.expect("set");
    let told = loop {
        let signal = watch.next().await;
        if signal.header().member().is_some_and(|member| member == "BlockThreshold") {
            break signal.body().deserialize::<(String, u64, u64)>().expect("stt");
        }
    };
    assert_eq!(told, ("vda".to_owned(), 1 << 19, 1 << 19));
    assert_eq!(threshold(&domain).await, 0);
    refused(set("vdz", 1).await, "NoSuchDevice", "vdz");
    domain.run("Destroy").await.expect("destroyed");
    refused(set("vda", 1).await, "OperationInvalid", "start it first");
}
