//! Volumes that are served by NBD: read and written by QEMU's own tools, by who may, by so many at a time, and by nobody when the
//! client or virtd has gone.

use crate::common::client::{Client, Options, Refusal, options};
use crate::common::users::{ALICE, BOB};
use crate::common::{Daemon, Setup, have};
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use zbus::{ObjectPath, OwnedObjectPath};

const POOL: &str = "org.virt.StoragePool";
const VOLUME: &str = "org.virt.StorageVolume";
const IMAGE: &str = "driver=nbd,server.type=fd,server.str=0";

/// A pool that is started, and its folder.
async fn pool(client: &Client, daemon: &Daemon) -> (String, PathBuf) {
    let folder = daemon.folder().join("images");
    let xml = format!("<pool type='dir'><name>images</name><target><path>{}</path></target></pool>", folder.display());
    let member = "org.virt.Manager.Storage.DefineStoragePool";
    let reply = client.call("/org/virt", member, &(xml, options([]))).await.expect("defined");
    let path: OwnedObjectPath = reply.body().deserialize().expect("o");
    let start = (options([("build", true.into())]),);
    client.call(path.as_str(), &format!("{POOL}.Start"), &start).await.expect("started");
    (path.to_string(), folder)
}

async fn add(client: &Client, pool: &str, name: &str, options: Options<'_>) -> String {
    let reply = client.call(pool, &format!("{POOL}.AddVolume"), &(name, 1u64 << 20, options)).await.expect("made");
    let (path, _job): (OwnedObjectPath, OwnedObjectPath) = reply.body().deserialize().expect("oo");
    path.to_string()
}

async fn open(client: &Client, volume: &str, writable: bool) -> Result<OwnedFd, Refusal> {
    let how = if writable { options([("read-only", false.into())]) } else { options([]) };
    let reply = client.call(volume, &format!("{VOLUME}.OpenNBD"), &(how,)).await?;
    Ok(reply.body().deserialize::<zbus::wire::OwnedFd>().expect("h").into())
}

async fn deletes(client: &Client, volume: &str) -> Result<(), Refusal> {
    client.call(volume, &format!("{VOLUME}.Delete"), &(options([]),)).await.map(drop)
}

/// A tool whose standard input is the connection, which is closed when it ends.
async fn tool(connection: OwnedFd, program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::from(connection));
    tokio::task::spawn_blocking(move || command.output()).await.expect("run").expect("a tool")
}

async fn does(connection: OwnedFd, read_only: bool, deed: &str) -> String {
    let mut arguments = vec!["--image-opts", IMAGE, "-c", deed];
    arguments.extend(read_only.then_some("-r"));
    let done = tool(connection, "qemu-io", &arguments).await;
    String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned()
}

async fn state(client: &Client, volume: &str) -> (String, Vec<String>) {
    let users: Vec<(ObjectPath<'static>, String, String)> = client.property(volume, VOLUME, "Users").await;
    (client.property(volume, VOLUME, "State").await, users.into_iter().map(|(_, _, how)| how).collect())
}

/// Waits until nobody is served any more.
async fn is_free(client: &Client, volume: &str) {
    let mut watch = client.watch().await;
    while state(client, volume).await.0 != "ready" {
        watch.next().await;
    }
}

fn refused<T>(done: Result<T, Refusal>, name: &str, words: &str) {
    let (error, why) = done.err().expect("refused");
    assert!(error.ends_with(name) && why.contains(words), "{error}: {why}");
}

/// A machine in memory with that disk, which runs.
fn machine(volume: &str) -> String {
    format!(
        "<domain type='test'><name>web</name><memory>65536</memory><os><type>hvm</type></os><devices><disk type='volume'>\
         <source pool='images' volume='{volume}'/><target dev='vda' bus='virtio'/></disk></devices></domain>"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_read_and_written_by_nbd() {
    if !have(&["qemu-storage-daemon", "qemu-img", "qemu-io"]) {
        return;
    }
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let client = Client { connection: daemon.connect().await };
    let (pool, folder) = pool(&client, &daemon).await;
    let base = add(&client, &pool, "base", options([])).await;
    let file = std::fs::File::options().write(true).open(folder.join("base")).expect("there");
    file.write_all_at(&[7; 1 << 20], 0).expect("written");
    client.call(&base, &format!("{VOLUME}.Clone"), &("thin", options([("thin", true.into())]))).await.expect("cloned");
    let thin = base.replace("/base", "/thin");

    // What a guest would see of it, at once by many; nothing is written.
    let copy = daemon.folder().join("copy");
    let (one, other) = (open(&client, &thin, false).await.expect("served"), open(&client, &thin, false).await);
    let arguments = ["convert", "-O", "raw", "--image-opts", IMAGE, copy.to_str().expect("text")];
    let done = tool(one, "qemu-img", &arguments).await;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(std::fs::read(&copy).expect("read").iter().all(|byte| *byte == 7));
    assert_eq!(state(&client, &thin).await, ("busy".to_owned(), vec![]), "the other one reads still");
    refused(open(&client, &thin, true).await, "InUse", "what reads volume 'thin' (OpenNBD");
    let web = client.define(&machine("thin")).await.expect("defined");
    refused(web.run("Start").await, "InUse", "what reads volume 'thin' (OpenNBD");
    refused(client.call(&pool, &format!("{POOL}.Destroy"), &(options([]),)).await, "OperationInvalid", "'thin'");
    let written = does(other.expect("served"), false, "write 0 4k").await;
    assert!(written.contains("denied"), "{written}");
    is_free(&client, &thin).await;

    // Who may write it has it alone.
    let connection = open(&client, &thin, true).await.expect("served");
    assert_eq!(state(&client, &thin).await, ("busy".to_owned(), vec!["config".to_owned(), "foreign".to_owned()]));
    refused(deletes(&client, &thin).await, "InUse", "'thin'");
    refused(open(&client, &thin, false).await, "InUse", "'thin'");
    refused(web.run("Start").await, "InUse", "the client that writes volume 'thin' (OpenNBD) has");
    let written = does(connection, false, "write -P 9 4k 4k").await;
    assert!(written.contains("wrote 4096/4096"), "{written}");
    is_free(&client, &thin).await;
    assert_eq!(state(&client, &thin).await.1, ["config"]);
    let read = does(open(&client, &thin, false).await.expect("served"), true, "read -P 9 4k 4k").await;
    assert!(read.contains("read 4096/4096") && !read.contains("verification failed"), "{read}");
    assert!(std::fs::read(folder.join("base")).expect("read").iter().all(|byte| *byte == 7), "that was another file");
    is_free(&client, &thin).await;

    // A guest that uses it is in the way of both, and only what it reads is read beside it.
    web.run("Start").await.expect("started");
    for writable in [false, true] {
        refused(open(&client, &thin, writable).await, "InUse", "domain 'web'");
    }
    refused(open(&client, &base, true).await, "InUse", "'base'");
    drop(open(&client, &base, false).await.expect("served"));
    is_free(&client, &base).await;
    // It comes whole, so that nobody takes it for another format.
    let bad = daemon.folder().join("bad");
    std::fs::write(&bad, b"QFI\xfb\0\0\0\x03 and no more").expect("written");
    std::fs::rename(&bad, folder.join("bad")).expect("renamed");
    let mut watch = client.watch().await;
    let bad = base.replace("/base", "/bad");
    while !client.ask(&bad, "org.freedesktop.DBus.Properties.Get", &(VOLUME, "Format")).await {
        watch.next().await;
    }
    refused(open(&client, &bad, false).await, "StorageFailed", "'bad'");
}

#[tokio::test(flavor = "multi_thread")]
async fn so_many_are_served_as_may_be_and_none_when_virtd_is_killed() {
    if !have(&["qemu-storage-daemon", "qemu-io"]) {
        return;
    }
    let rules = r#"polkit.addRule(function (action, subject) {
        var may = { "virt-alice": ["content", "create"], "virt-bob": ["create", "write"] }[subject.user] || [];
        if (may.some(function (what) { return action.id == "org.virt.volume." + what; })) { return polkit.Result.YES; }
    });"#;
    let setup = Setup { rules: rules.to_owned(), ..Setup::default() };
    let Some(mut daemon) = Daemon::on_system_bus(setup).await else { return };
    let root = Client { connection: daemon.connect().await };
    let alice = Client { connection: daemon.connect_as(&ALICE).await };
    let bob = Client { connection: daemon.connect_as(&BOB).await };
    let (pool, _) = pool(&root, &daemon).await;
    let volume = add(&alice, &pool, "a", options([])).await;
    refused(open(&bob, &volume, false).await, "InteractiveAuthorizationRequired", "");
    refused(open(&bob, &volume, true).await, "InteractiveAuthorizationRequired", "");
    refused(open(&alice, &volume, true).await, "InteractiveAuthorizationRequired", "");
    let wrong = (options([("read-only", "no".into())]),);
    refused(alice.call(&volume, &format!("{VOLUME}.OpenNBD"), &wrong).await, "InvalidArgument", "read-only");

    // Clients that say nothing, and leave without a word.
    let mut open_ones = Vec::new();
    for _ in 0..8 {
        open_ones.push(open(&alice, &volume, false).await.expect("served"));
    }
    refused(open(&alice, &volume, false).await, "LimitsExceeded", "8 connections");
    let one = open(&root, &volume, false).await.expect("that is another user");
    drop(open_ones);
    drop(one);
    is_free(&root, &volume).await;
    let connection = open(&alice, &volume, false).await.expect("served");
    let mut greeted = UnixStream::from(connection);
    let mut magic = [0; 8];
    greeted.read_exact(&mut magic).expect("it speaks");
    assert_eq!(&magic, b"NBDMAGIC");

    // virtd's end is that of whoever serves for it, and nothing of it keeps anybody from the volume.
    daemon.kill_virtd().await;
    let rest = tokio::task::spawn_blocking(move || greeted.read_to_end(&mut Vec::new()));
    rest.await.expect("read").expect("the end");
    daemon.start_virtd().await;
    let root = Client { connection: daemon.connect().await };
    let mut watch = root.watch().await;
    while root.property::<String>(&pool, POOL, "State").await != "running" {
        watch.next().await;
    }
    let written = does(open(&root, &volume, true).await.expect("served"), false, "write -P 9 0 4k").await;
    assert!(written.contains("wrote 4096/4096"), "{written}");
    is_free(&root, &volume).await;
    deletes(&root, &volume).await.expect("nobody has it any more");
}
