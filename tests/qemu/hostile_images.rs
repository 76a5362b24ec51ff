//! Images whose headers name files of the host: refused wherever they are met, and what they name is neither lent nor opened.

use crate::common::client::{Client, Domain, Refusal, options};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use crate::common::users::{ADMIN, ALICE};
use crate::common::{Daemon, Setup};
use rustix::fs::inotify;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is root's alone.
const SECRET: &[u8; 512] = &[0x5a; 512];

/// A file of root's, and whoever opens, reads or lends it.
struct Secret {
    path: PathBuf,
    watch: OwnedFd,
}

impl Secret {
    fn new(folder: &Path) -> Secret {
        let path = folder.join("secret");
        std::fs::write(&path, SECRET).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("set");
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).expect("inotify");
        let events = inotify::WatchFlags::OPEN | inotify::WatchFlags::ATTRIB | inotify::WatchFlags::MODIFY;
        inotify::add_watch(&watch, &path, events).expect("watched");
        Secret { path, watch }
    }

    /// Nobody has opened it, and nobody has been given rights over it.
    fn is_untouched(&self, case: &str) {
        let heard = rustix::io::read(&self.watch, &mut [0; 4096]);
        assert_eq!(heard, Err(rustix::io::Errno::AGAIN), "{case}: somebody has touched the secret");
    }
}

/// Makes an image that says that it stands on `backing`, without a look at that.
fn overlay(image: &Path, backing: &str, format: &str) {
    std::fs::remove_file(image).expect("removed");
    let image_path = image.to_string_lossy().into_owned();
    let arguments = ["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", backing, &image_path, "1M"];
    let done = Command::new("qemu-img").args(arguments).output().expect("qemu-img");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Makes an image on another in qcow2, and as large.
fn whole_overlay(image: &Path, base: &Path) {
    let told = Command::new("qemu-img").args(["info", "-U", "--output=json"]).arg(base).output().expect("qemu-img");
    let told: serde_json::Value = serde_json::from_slice(&told.stdout).expect("JSON");
    let (on, size) = (base.to_string_lossy().into_owned(), told["virtual-size"].to_string());
    let made = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &on];
    let made = Command::new("qemu-img").args(made).arg(image).arg(size).status();
    assert!(made.expect("qemu-img").success());
}

/// Replaces bytes of a header by others.
fn patch(image: &Path, from: &[u8], to: &[u8]) {
    let mut bytes = std::fs::read(image).expect("read");
    let at = bytes.windows(from.len()).position(|window| window == from).expect("they are there");
    bytes[at..at + to.len()].copy_from_slice(to);
    std::fs::write(image, bytes).expect("written");
}

/// What an image does, how it is made, and a word of the refusal.
type Hostile<'a> = (&'static str, Box<dyn Fn(&Path) + 'a>, &'static str);

fn hostile(secret: &Path) -> Vec<Hostile<'_>> {
    let name = secret.to_string_lossy().into_owned();
    let data = name.clone();
    let json = format!(
        "json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{name}\",\"locking\":\"off\"}}}}"
    );
    vec![
        ("a raw backing file", Box::new(move |image| overlay(image, &name, "raw")), "does not say so: declare it"),
        (
            "an external data file",
            Box::new(move |image| {
                std::fs::remove_file(image).expect("removed");
                let elsewhere = image.with_file_name("a-data-file-of-a-long-name-that-is-replaced-by-the-other-one");
                let option = format!("data_file={}", elsewhere.display());
                let made =
                    ["create", "-q", "-f", "qcow2", "-o", &option, &image.to_string_lossy(), "1M"].map(str::to_owned);
                assert!(Command::new("qemu-img").args(made).status().expect("qemu-img").success());
                let before = elsewhere.to_string_lossy().into_owned();
                let mut after = data.clone();
                while after.len() < before.len() {
                    after.insert(0, '/');
                }
                patch(image, before.as_bytes(), after.as_bytes());
            }),
            "keeps its data in",
        ),
        ("a backing file by JSON", Box::new(move |image| overlay(image, &json, "raw")), "only files that are named"),
        ("a server", Box::new(|image| overlay(image, "nbd://127.0.0.1:1/x", "raw")), "only files that are named"),
    ]
}

fn refused<T>(case: &str, answer: Result<T, Refusal>, words: &[&str]) {
    let (name, why) = answer.err().unwrap_or_else(|| panic!("{case}: it was taken"));
    assert_eq!(name, "org.virt.Error.ConfigInvalid", "{case}: {why}");
    words.iter().for_each(|word| assert!(why.contains(word), "{case}: '{word}' is not in: {why}"));
}

/// What `ValidateDomain` says of a document.
async fn validated(client: &Client, xml: &str) -> String {
    let told = client.call("/org/virt", "org.virt.Manager.ValidateDomain", &(xml, options([]))).await.expect("told");
    let told: Vec<(String, u32, u32, String)> = told.body().deserialize().expect("findings");
    told.into_iter().map(|(severity, _, _, text)| format!("{severity}: {text}\n")).collect()
}

async fn system(name: &str) -> Option<(Daemon, Client, Tick)> {
    let daemon = Daemon::on_system_bus(Setup::with_example_rules()).await?;
    let tick = Tick::new(&daemon, name, "")?;
    let client = Client { connection: daemon.connect_as(&ADMIN).await };
    Some((daemon, client, tick))
}

/// Neither starts nor is captured.
async fn is_stopped_at_the_door(case: &str, domain: &Domain, words: &[&str]) {
    refused(case, domain.run("Start").await, words);
    let player = Player { domain: domain.clone() };
    let xml = "<domainsnapshot><name>s</name></domainsnapshot>";
    for flags in [vec![], vec![("disk-only", true)]] {
        refused(case, player.create(xml, with(flags)).await, words);
    }
    assert!(player.list(options([])).await.is_empty(), "{case}");
}

#[tokio::test]
async fn an_image_whose_header_names_files_is_refused_and_they_are_neither_lent_nor_opened() {
    let Some((daemon, client, tick)) = system("hostile").await else { return };
    let good = std::fs::read(&tick.disk).expect("read");
    let secret = Secret::new(daemon.folder());
    let shown = tick.disk.to_string_lossy().into_owned();
    for (case, make, words) in hostile(&secret.path) {
        make(&tick.disk);
        refused(case, client.define(&tick.xml).await, &[&shown, words]);
        let told = validated(&client, &tick.xml).await;
        assert!(told.contains(words), "{case}: {told}");
        let told = validated(&Client { connection: daemon.connect_as(&ALICE).await }, &tick.xml).await;
        assert!(!told.contains(words), "{case}: for a stranger no file is looked at: {told}");
        assert!(client.named("hostile").await.is_err(), "{case}: it is not stored");
        // One that its guest, having taken over QEMU, has written into its own image.
        std::fs::write(&tick.disk, &good).expect("written");
        let domain = client.define(&tick.xml).await.expect("defined");
        make(&tick.disk);
        is_stopped_at_the_door(case, &domain, &[&shown, words]).await;
        std::fs::write(&tick.disk, &good).expect("written");
        domain.call("Undefine", &(options([]),)).await.expect("undefined");
        secret.is_untouched(case);
    }
}

#[tokio::test]
async fn an_overlay_that_does_not_say_its_bases_format_is_refused_though_it_is_declared() {
    let Some((daemon, client, tick)) = system("guessed").await else { return };
    let secret = Secret::new(daemon.folder());
    // A guest has written an image's header into its raw disk, which a template was made of.
    let base = daemon.folder().join("base.raw");
    std::fs::write(&base, "").expect("made");
    overlay(&base, &secret.path.to_string_lossy(), "raw");
    let on = base.to_string_lossy().into_owned();
    overlay(&tick.disk, &on, "raw");
    let below =
        format!("<backingStore type='file'><format type='raw'/><source file='{on}'/><backingStore/></backingStore>");
    let named = "<name>guessed</name><uuid>0d9a5c1e-43a1-4e58-8a0f-6f0f5b1d7a11</uuid>";
    let xml = tick.xml.replace("<target dev='vda'", &format!("{below}<target dev='vda'"));
    let xml = xml.replace("<name>guessed</name>", named);
    let domain = client.define(&xml).await.expect("a chain that is declared is taken");
    domain.run("Start").await.expect("and what is raw is raw, whatever is in it");
    domain.run("Destroy").await.expect("ended");
    secret.is_untouched("a raw base with a header");

    // The extension that says the format becomes one that nobody knows.
    patch(&tick.disk, &[0xe2, 0x79, 0x2a, 0xca], &[0xfe, 0xed, 0xbe, 0xef]);
    let words = ["does not say of which format", "qemu-img rebase -u -f qcow2 -F raw"];
    refused("define", client.define(&xml).await, &words);
    is_stopped_at_the_door("guessed", &domain, &words).await;
    secret.is_untouched("an overlay without a format");
}

#[tokio::test]
async fn the_header_of_a_raw_disk_is_the_guests_own_business() {
    let Some((daemon, client, tick)) = system("raw").await else { return };
    let secret = Secret::new(daemon.folder());
    overlay(&tick.disk, &secret.path.to_string_lossy(), "raw");
    for xml in [tick.xml.replace("type='qcow2'", "type='raw'"), tick.xml.replace(" type='qcow2'", "")] {
        let domain = client.define(&xml).await.expect("defined");
        assert!(domain.xml().await.contains("type='raw'"), "no format is raw, and says so");
        let player = Player { domain };
        let snapshot = "<domainsnapshot><name>s</name></domainsnapshot>";
        player.create(snapshot, with([("disk-only", true)])).await.expect("taken");
        player.domain.run("Start").await.expect("started");
        player.domain.run("Destroy").await.expect("ended");
        player.call("s", "Delete", options([])).await.expect("merged");
        secret.is_untouched(&xml);
        player.domain.run("Undefine").await.expect("undefined");
    }
}

#[tokio::test]
async fn an_overlay_that_the_caller_made_is_what_it_is_said_to_be() {
    let Some((daemon, client, tick)) = system("reused").await else { return };
    let secret = Secret::new(daemon.folder());
    let made = daemon.folder().join("made");
    std::fs::write(&made, "").expect("made");
    let xml = format!(
        "<domainsnapshot><name>s</name><disks><disk name='vda'><source file='{}'/></disk></disks></domainsnapshot>",
        made.display()
    );
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    let reuse = || with([("disk-only", true), ("reuse-external", true)]);
    for started in [false, true] {
        if started {
            player.domain.run("Start").await.expect("started");
        }
        overlay(&made, &secret.path.to_string_lossy(), "raw");
        refused("reused", player.create(&xml, reuse()).await, &[&made.to_string_lossy(), "correct the"]);
    }
    whole_overlay(&made, &tick.disk);
    player.create(&xml, reuse()).await.expect("taken");
    secret.is_untouched("reused");
}

#[tokio::test]
async fn a_chain_that_is_declared_down_to_its_base_is_opened_as_it_is_declared() {
    let Some((daemon, client, tick)) = system("chain").await else { return };
    let (base, middle) = (daemon.folder().join("base"), daemon.folder().join("middle"));
    std::fs::rename(&tick.disk, &base).expect("moved");
    whole_overlay(&middle, &base);
    whole_overlay(&tick.disk, &middle);
    for image in [&base, &middle, &tick.disk] {
        std::fs::set_permissions(image, std::fs::Permissions::from_mode(0o600)).expect("set");
    }
    let layer = |path: &Path, below: &str| {
        let path = path.display();
        format!("<backingStore type='file'><format type='qcow2'/><source file='{path}'/>{below}</backingStore>")
    };
    let short = layer(&middle, "<backingStore/>");
    let whole = layer(&middle, &layer(&base, "<backingStore/>"));
    let with = |chain: &str| tick.xml.replace("<target dev='vda'", &format!("{chain}<target dev='vda'"));
    // The refusal says what is missing, element by element.
    let (_, why) = client.define(&tick.xml).await.err().expect("nothing is declared");
    assert!(why.contains(&short), "{why}");
    let (_, why) = client.define(&with(&short)).await.err().expect("one layer is declared");
    assert!(why.contains(&layer(&base, "<backingStore/>")), "{why}");
    let domain = client.define(&with(&whole)).await.expect("defined");
    domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    // And of what virtd makes of it the whole chain is written down.
    let player = Player { domain };
    let snapshot = "<domainsnapshot><name>s</name></domainsnapshot>";
    player.create(snapshot, crate::common::snapshots::with([("disk-only", true)])).await.expect("taken");
    let xml = player.domain.xml().await;
    assert_eq!(xml.matches("<source file=").count(), 4, "{xml}");
    assert_eq!(xml.matches("<backingStore/>").count(), 1, "{xml}");
    player.domain.run("Destroy").await.expect("ended");
    player.domain.run("Start").await.expect("started on four layers");
    player.call("s", "Delete", options([])).await.expect("merged");
    player.domain.run("Destroy").await.expect("ended");
    player.domain.run("Start").await.expect("started on three");
}
