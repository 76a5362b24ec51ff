//! Machines saved in what a client has open: a file from where it stands on, or a pipe; packed, and restored from there.

use crate::common::client::{Client, Domain, Refusal, descriptor, options};
use crate::common::guest::Tick;
use crate::common::snapshots::with;
use crate::common::{Daemon, Setup, have};
use crate::saved::{refused, restore, saved_xml};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use zbus::Variant;

type Options<'a> = Vec<(&'static str, Variant<'a>)>;

async fn write(domain: &Domain, method: &str, path: &str, how: Options<'_>) -> Result<(), Refusal> {
    domain.call(method, &(path, options(how))).await.map(drop)
}

async fn save(domain: &Domain, to: &File, mut how: Options<'_>) -> Result<(), Refusal> {
    how.push(("fd", Variant::from(descriptor(to))));
    write(domain, "Save", "", how).await
}

async fn restore_given(client: &Client, from: &File) -> Result<(), Refusal> {
    let how = options([("fd", Variant::from(descriptor(from)))]);
    client.call("/org/virt", "org.virt.Manager.RestoreDomain", &("", how)).await.map(drop)
}

/// A pipe, and what will have come through it.
fn pipe() -> (File, tokio::task::JoinHandle<Vec<u8>>) {
    let (mut ear, mouth) = std::io::pipe().expect("a pipe");
    let all = tokio::task::spawn_blocking(move || {
        let mut all = Vec::new();
        ear.read_to_end(&mut all).expect("read");
        all
    });
    (File::from(std::os::fd::OwnedFd::from(mouth)), all)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_saved_in_what_its_client_has_open_and_comes_from_there() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let grows = "<maxMemory slots='2' unit='MiB'>512</maxMemory>";
    let Some(tick) = Tick::new(&daemon, "given-save", grows) else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&tick.xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    tick.counts_to(3).await;
    // What came while it runs is saved with it.
    let dimm = "<memory model='dimm'><target><size unit='MiB'>64</size></target></memory>";
    domain.call("AttachDevice", &(dimm, with([("live", true)]))).await.expect("memory");
    let memory: u64 = domain.property("Memory").await;
    let path = daemon.folder().join("mine");
    let open = || File::options().read(true).write(true).create(true).truncate(false).open(&path).expect("open");

    let named = |path: &str, file: &File| (path.to_owned(), vec![("fd", Variant::from(descriptor(file)))]);
    let (named, both) = named(path.to_str().expect("a text"), &open());
    refused(write(&domain, "Save", &named, both).await, "InvalidArgument", &["exclude"]);
    refused(write(&domain, "Save", "", Vec::new()).await, "InvalidArgument", &["missing"]);
    refused(save(&domain, &File::open(&path).expect("open"), Vec::new()).await, "InvalidArgument", &["written"]);
    let appends = File::options().append(true).open(&path).expect("open");
    refused(save(&domain, &appends, Vec::new()).await, "InvalidArgument", &["O_APPEND"]);
    let odd = vec![("compression", Variant::from("lzo"))];
    refused(save(&domain, &open(), odd).await, "InvalidArgument", &["lzo"]);
    tick.goes_on().await;

    // From where the descriptor stands on, past the page cache, packed where there is zstd.
    let mut file = open();
    file.write_all(b"what the client has before").expect("written");
    let base = file.stream_position().expect("told");
    let mut how = vec![("bypass-cache", Variant::from(true))];
    if have(&["zstd"]) {
        how.push(("compression", Variant::from("zstd")));
    }
    save(&domain, &file, how).await.expect("saved");
    assert_eq!(domain.state().await, ("shutoff".into(), "saved".into()));
    let length = file.metadata().expect("there").len();
    assert_eq!(file.stream_position().expect("told"), length, "it stands at the end");
    refused(restore_given(&client, &file).await, "InvalidArgument", &["given by descriptor"]);
    file.seek(SeekFrom::Start(base)).expect("sought");
    let (before, boots) = tick.counted().expect("it counted");
    restore_given(&client, &file).await.expect("restored");
    tick.counts_to(before + 2).await;
    assert_eq!(tick.counted().expect("it counts").1, boots, "it has not booted");
    assert_eq!(domain.property::<u64>("Memory").await, memory);
    let mut begun = String::new();
    open().take(base).read_to_string(&mut begun).expect("read");
    assert_eq!(begun, "what the client has before");

    through_pipes(&daemon, &client, &domain, &tick).await;
    domain.run("Destroy").await.expect("destroyed");
}

async fn through_pipes(daemon: &Daemon, client: &Client, domain: &Domain, tick: &Tick) {
    // Whoever reads no further has the guest go on.
    let (ear, mouth) = std::io::pipe().expect("a pipe");
    drop(ear);
    let mouth = File::from(std::os::fd::OwnedFd::from(mouth));
    save(domain, &mouth, Vec::new()).await.expect_err("nobody reads");
    tick.goes_on().await;

    let (mouth, all) = pipe();
    let elf = vec![("memory-only", Variant::from(true)), ("fd", Variant::from(descriptor(&mouth)))];
    write(domain, "CoreDump", "", elf).await.expect("dumped");
    drop(mouth);
    let dump = all.await.expect("read");
    assert!(dump.starts_with(b"\x7fELF") && dump.len() > 16 << 20, "{} bytes", dump.len());
    tick.goes_on().await;

    let (mouth, all) = pipe();
    save(domain, &mouth, Vec::new()).await.expect("saved");
    drop(mouth);
    let saved = all.await.expect("read");
    assert_eq!(domain.state().await, ("shutoff".into(), "saved".into()));
    let file = daemon.folder().join("piped.save");
    std::fs::write(&file, &saved[..saved.len() - 1]).expect("written");
    refused(restore(client, &file, &[]).await, "InvalidArgument", &["cut off", file_name(&file)]);
    std::fs::write(&file, &saved).expect("written");
    assert!(saved_xml(client, &file, false).await.expect("read").contains("given-save"));
    let (ear, _mouth) = std::io::pipe().expect("a pipe");
    let ear = File::from(std::os::fd::OwnedFd::from(ear));
    refused(restore_given(client, &ear).await, "InvalidArgument", &["regular file"]);
    let (before, boots) = tick.counted().expect("it counted");
    restore(client, &file, &[]).await.expect("restored");
    tick.counts_to(before + 2).await;
    assert_eq!(tick.counted().expect("it counts").1, boots, "it has not booted");
}

fn file_name(file: &Path) -> &str {
    file.file_name().and_then(|name| name.to_str()).expect("a text")
}
