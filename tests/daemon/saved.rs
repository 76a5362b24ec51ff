//! Machines of the test driver that are saved and come back: what clients see of it, without QEMU.

use crate::common::Daemon;
use crate::common::client::{Client, descriptor, options};
use crate::common::snapshots::with;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use zbus::Variant;

const XML: &str = "<domain type='test'><name>played</name><memory>65536</memory></domain>";

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_played_is_saved_and_comes_back() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(XML).await.expect("defined");
    domain.run("Start").await.expect("started");
    let mut watch = client.watch().await;
    let path = daemon.folder().join("played.save");
    let name = path.to_str().expect("a text");

    let (error, why) = domain.call("Save", &("/no/folder/x", options([]))).await.expect_err("no folder");
    assert!(error.ends_with("StorageFailed"), "{error}: {why}");
    domain.call("CoreDump", &(name, options([]))).await.expect("dumped");
    assert_eq!(domain.state().await.0, "running");
    domain.call("Save", &(name, with([("paused", true)]))).await.expect("saved");
    assert_eq!(watch.lifecycle(&domain.path).await, "stopped saved");
    client.call("/org/virt", "org.virt.Manager.RestoreDomain", &(name, options([]))).await.expect("restored");
    assert_eq!(watch.lifecycle(&domain.path).await, "started restored");
    assert_eq!(domain.state().await, ("paused".into(), "restored".into()));
    domain.bare("Resume").await.expect("resumed");

    // By descriptor: a file, and a pipe.
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("open");
    let to = |file: &File| options([("fd", Variant::from(descriptor(file)))]);
    domain.call("Save", &("", to(&file))).await.expect("saved");
    file.seek(SeekFrom::Start(0)).expect("sought");
    client.call("/org/virt", "org.virt.Manager.RestoreDomain", &("", to(&file))).await.expect("restored");
    let (mut ear, mouth) = std::io::pipe().expect("a pipe");
    domain.call("Save", &("", to(&File::from(std::os::fd::OwnedFd::from(mouth))))).await.expect("saved");
    let mut saved = Vec::new();
    ear.read_to_end(&mut saved).expect("read");
    std::fs::write(&path, &saved[..saved.len() - 1]).expect("written");
    let restore = async || client.call("/org/virt", "org.virt.Manager.RestoreDomain", &(name, options([]))).await;
    let (error, why) = restore().await.expect_err("it is cut off");
    assert!(error.ends_with("InvalidArgument") && why.contains("cut off"), "{error}: {why}");
    std::fs::write(&path, &saved).expect("written");
    restore().await.expect("restored");

    // For its next start.
    domain.call("ManagedSave", &(options([]),)).await.expect("saved");
    assert!(domain.property::<bool>("HasManagedSave").await);
    domain.run("Start").await.expect("started");
    assert_eq!(domain.state().await, ("running".into(), "restored".into()));
    assert!(!domain.property::<bool>("HasManagedSave").await);
    let (error, why) = domain.call("CoreDump", &(name, with([("memory-only", true)]))).await.expect_err("no memory");
    assert!(error.ends_with("OperationUnsupported"), "{error}: {why}");
    domain.run("Destroy").await.expect("destroyed");
}
