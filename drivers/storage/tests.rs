//! Pools in folders, with the real tool: what is made holds what it is to hold, and nothing is left of what fails.

use super::*;
use crate::network::tests::is_inside;
use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio_util::sync::CancellationToken;
use virt_model::driver::GivenFile;
use virt_model::driver::storage::{
    Content, FileId, KnownFormats, NewSize, NewVolume, Part, PoolChange, Preallocation, Qcow2Options, Reflink, Served,
    VolumeAt, VolumeLook, Wiping,
};

/// Work that counts its steps, and is cancelled at one of them.
#[derive(Default)]
struct Steps {
    taken: AtomicUsize,
    cancel_at: Option<usize>,
    cancel: CancellationToken,
}

impl Work for Steps {
    fn progress(&self, done: u64, total: u64) {
        assert!(total == 0 || done <= total, "{done} of {total}");
    }

    fn step(&self) {
        if Some(self.taken.fetch_add(1, Ordering::SeqCst) + 1) == self.cancel_at {
            self.cancel.cancel();
        }
    }

    fn grows(&self, _: u64) -> Result<(), DriverError> {
        Ok(())
    }

    fn names(&self, id: FileId, name: &str, format: &str, _: Option<&str>) -> Result<(), DriverError> {
        assert!(id.number > 0 && !name.is_empty() && !format.is_empty());
        Ok(())
    }

    fn cancelled(&self) -> &CancellationToken {
        &self.cancel
    }
}

fn work() -> Arc<dyn Work> {
    Arc::new(Steps::default())
}

/// A pool in a folder of the test's.
struct Room {
    dir: tempfile::TempDir,
    pool: Arc<dyn OpenPool>,
}

fn definition(path: &Path) -> PoolDef {
    PoolDef::parse(&format!("<pool type='dir'><name>p</name><target><path>{}</path></target></pool>", path.display()))
        .unwrap()
}

fn storage() -> HostStorage {
    storage_in(Path::new("/nowhere"))
}

/// The same with a folder for what ends with us.
fn storage_in(runtime: &Path) -> HostStorage {
    HostStorage::new(Arc::new(|| Ok(Lender::Ours)), passphrases(), runtime, false)
}

fn passphrases() -> Secrets {
    Arc::new(|name| Ok(if name == "disk" { b"a passphrase".to_vec() } else { Vec::new() }))
}

impl Room {
    async fn new() -> Room {
        let dir = tempfile::tempdir().unwrap();
        let pool = storage().open(&definition(dir.path()), &Steps::default()).await.unwrap();
        Room { dir, pool }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn all(&self) -> HashMap<String, VolumeLook> {
        let survey = self.pool.survey(&KnownFormats::default()).await.unwrap();
        survey.volumes.into_iter().map(|look| (look.name.clone(), look)).collect()
    }

    async fn look(&self, name: &str) -> VolumeLook {
        self.pool.look(vec![name.to_owned()], &KnownFormats::default()).await.unwrap().pop().unwrap()
    }

    async fn volume(&self, name: &str, format: &str) -> VolumeAt {
        let look = self.look(name).await;
        VolumeAt {
            name: name.to_owned(),
            id: look.id,
            format: format.to_owned(),
            capacity: look.capacity,
            below: Vec::new(),
        }
    }

    /// Nothing is in the folder but that.
    fn holds(&self, names: &[&str]) {
        let mut there: Vec<_> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        there.sort();
        assert_eq!(there, names);
    }
}

fn new(name: &str, format: &str, capacity: u64, content: Content) -> NewVolume {
    NewVolume {
        name: name.to_owned(),
        format: format.to_owned(),
        capacity,
        allocation: 0,
        preallocation: Preallocation::Off,
        qcow2: Qcow2Options::default(),
        nocow: false,
        owner: (None, None),
        mode: 0o600,
        secret: None,
        content,
    }
}

fn given(file: impl Into<OwnedFd>) -> GivenFile {
    GivenFile::new(file.into(), drop)
}

/// Something that compresses to nothing, with holes.
fn pattern(path: &Path, bytes: u64) {
    let file = fs::File::create(path).unwrap();
    file.set_len(bytes).unwrap();
    for at in (0..bytes.saturating_sub(4096)).step_by(1 << 20) {
        let block: Vec<u8> = (0..4096u64).map(|i| ((i * 31 + at) % 251) as u8).collect();
        file.write_all_at(&block, at).unwrap();
    }
}

fn has_tool() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: qemu-img is not installed");
    }
    found
}

fn is_same(one: (&str, &Path), other: (&str, &Path)) {
    let (formats, paths) = ([one.0, other.0], [one.1, other.1]);
    let compared =
        Command::new("qemu-img").args(["compare", "-f", formats[0], "-F", formats[1]]).args(paths).output().unwrap();
    assert!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stdout));
}

#[tokio::test]
async fn raw_volumes_are_made_as_they_are_asked_for() {
    let room = Room::new().await;
    let look = room.pool.create(new("a", "raw", 3 << 20, Content::Empty), work()).await.unwrap();
    assert_eq!((look.capacity, look.allocation, &*look.format), (3 << 20, 0, "raw"));
    let mode = fs::metadata(room.at("a")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    for (name, how) in [("f", Preallocation::Falloc), ("w", Preallocation::Full)] {
        let wanted = NewVolume { preallocation: how, mode: 0o640, ..new(name, "raw", 3 << 20, Content::Empty) };
        let look = room.pool.create(wanted, work()).await.unwrap();
        assert!(look.allocation >= 3 << 20, "{name}: {}", look.allocation);
        assert_eq!(look.permissions.2, 0o640);
        assert!(fs::read(room.at(name)).unwrap().iter().all(|byte| *byte == 0));
    }
    let part = NewVolume { allocation: 1 << 20, ..new("p", "raw", 3 << 20, Content::Empty) };
    let look = room.pool.create(part, work()).await.unwrap();
    assert!((1 << 20..3 << 20).contains(&look.allocation), "{}", look.allocation);
    // What was written by a client is never run with its owner's rights.
    let set_uid = NewVolume { mode: 0o4755, ..new("s", "raw", 1, Content::Empty) };
    assert_eq!(room.pool.create(set_uid, work()).await.unwrap().permissions.2, 0o755);
    fs::remove_file(room.at("s")).unwrap();
    // A name that is taken stays what it is.
    let again = room.pool.create(new("a", "raw", 1, Content::Empty), work()).await.unwrap_err();
    assert!(matches!(again, DriverError::Exists(_)), "{again}");
    assert_eq!(room.look("a").await.capacity, 3 << 20);
    room.holds(&["a", "f", "p", "w"]);
    for bad in [
        NewVolume { preallocation: Preallocation::Metadata, ..new("x", "raw", 1, Content::Empty) },
        new("x", "vmdk", 1, Content::Empty),
        new("x", "luks", 1, Content::Empty),
        new("x", "raw", 1, Content::Overlay { base: room.at("a"), format: "raw".to_owned() }),
        NewVolume { secret: Some("disk".to_owned()), ..new("x", "raw", 1, Content::Empty) },
        NewVolume { allocation: 1, preallocation: Preallocation::Full, ..new("x", "raw", 1, Content::Empty) },
    ] {
        assert!(room.pool.create(bad, work()).await.is_err());
    }
    room.holds(&["a", "f", "p", "w"]);
}

#[tokio::test]
async fn images_are_made_by_the_tool_and_understood() {
    if !has_tool() {
        return;
    }
    let room = Room::new().await;
    let qcow2 = Qcow2Options {
        compat: Some("1.1".to_owned()),
        cluster_size: Some(128 << 10),
        lazy_refcounts: true,
        extended_l2: true,
    };
    let wanted = NewVolume { qcow2, ..new("q", "qcow2", 64 << 20, Content::Empty) };
    let look = room.pool.create(wanted, work()).await.unwrap();
    assert_eq!((look.capacity, &*look.format, look.encrypted), (64 << 20, "qcow2", false));
    assert!(look.physical < 1 << 20 && look.backing.is_none() && look.broken.is_none(), "{look:?}");
    let told = Command::new("qemu-img").args(["info", "--output=json"]).arg(room.at("q")).output().unwrap();
    let told = String::from_utf8(told.stdout).unwrap();
    for part in ["\"cluster-size\": 131072", "\"lazy-refcounts\": true", "\"extended-l2\": true", "\"compat\": \"1.1\""]
    {
        assert!(told.contains(part), "{part}: {told}");
    }
    let base = room.at("q");
    let overlay = new("top", "qcow2", 64 << 20, Content::Overlay { base: base.clone(), format: "qcow2".to_owned() });
    let backing = room.pool.create(overlay, work()).await.unwrap().backing.unwrap();
    assert_eq!((backing.place.as_deref(), backing.format.as_deref()), (Some(&*base), Some("qcow2")));
    let state = tempfile::NamedTempFile::new().unwrap();
    for (name, format) in [("l", "luks"), ("e", "qcow2")] {
        let secret = Some("disk".to_owned());
        let look =
            room.pool.create(NewVolume { secret, ..new(name, format, 1 << 20, Content::Empty) }, work()).await.unwrap();
        assert_eq!((look.capacity, look.encrypted, &*look.format), (1 << 20, true, format));
        // What opens it is what was given.
        let opens = |passphrase: &str| {
            let object = format!("secret,id=k,data={passphrase}");
            let option = if format == "luks" { "key-secret" } else { "encrypt.key-secret" };
            let image = format!("driver={format},file.filename={},{option}=k", room.at(name).display());
            Command::new("qemu-img")
                .args(["convert", "-O", "raw", "--object", &object, "--image-opts", &image])
                .arg(state.path())
                .output()
                .unwrap()
                .status
                .success()
        };
        assert!(opens("a passphrase") && !opens("another"), "{format}");
    }
    let seen = room.all().await;
    let formats: Vec<_> = ["e", "l", "q", "top"].map(|name| &*seen[name].format).to_vec();
    assert_eq!(formats, ["qcow2", "luks", "qcow2", "qcow2"]);
    // What the tool writes to is a name of the host's, too.
    assert!(fs::symlink_metadata("/dev/stdout").unwrap().is_symlink());
}

#[tokio::test]
async fn copies_and_conversions_hold_the_same() {
    if !has_tool() {
        return;
    }
    let room = Room::new().await;
    pattern(&room.at("a"), 9 << 20);
    for (name, reflink) in [("auto", Reflink::Auto), ("never", Reflink::Never)] {
        let from = given(fs::File::open(room.at("a")).unwrap());
        room.pool.create(new(name, "raw", 0, Content::Copy { from, reflink }), work()).await.unwrap();
        assert!(fs::read(room.at(name)).unwrap() == fs::read(room.at("a")).unwrap(), "{name}");
        assert!(fs::metadata(room.at(name)).unwrap().blocks() * 512 < 2 << 20, "its holes are holes");
    }
    let from = given(fs::File::open(room.at("a")).unwrap());
    let always = new("always", "raw", 0, Content::Copy { from, reflink: Reflink::Always });
    match room.pool.create(always, work()).await {
        Ok(_) => assert!(fs::read(room.at("always")).unwrap() == fs::read(room.at("a")).unwrap()),
        Err(e) => assert!(matches!(&e, DriverError::Unsupported(text) if text.contains("reflink 'auto'")), "{e}"),
    }
    let chain = vec![(room.at("a"), "raw".to_owned())];
    room.pool.create(new("q", "qcow2", 9 << 20, Content::Converted { chain }), work()).await.unwrap();
    is_same(("raw", &room.at("a")), ("qcow2", &room.at("q")));
    // An overlay, flattened.
    let overlay = Content::Overlay { base: room.at("q"), format: "qcow2".to_owned() };
    room.pool.create(new("top", "qcow2", 9 << 20, overlay), work()).await.unwrap();
    let chain = vec![(room.at("top"), "qcow2".to_owned()), (room.at("q"), "qcow2".to_owned())];
    let flat = room.pool.create(new("flat", "raw", 9 << 20, Content::Converted { chain }), work()).await.unwrap();
    assert!(flat.backing.is_none());
    is_same(("raw", &room.at("a")), ("raw", &room.at("flat")));
}

/// What a guest has written into a raw disk is no header: neither where it is known to be raw, nor is what it names opened.
#[tokio::test]
async fn a_header_that_a_guest_forged_leads_nowhere() {
    if !has_tool() {
        return;
    }
    let room = Room::new().await;
    let secret = tempfile::NamedTempFile::new().unwrap();
    fs::write(secret.path(), "not for guests").unwrap();
    let mut forges = Command::new("qemu-img");
    forges.args(["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b"]).arg(secret.path());
    assert!(forges.arg(room.at("disk")).arg("1M").status().unwrap().success());
    let look = room.look("disk").await;
    assert_eq!((&*look.format, look.backing.unwrap().place.as_deref()), ("qcow2", Some(secret.path())));
    let known: KnownFormats = Arc::new([(look.id, "raw".to_owned())].into());
    let look = room.pool.look(vec!["disk".to_owned()], &known).await.unwrap().pop().unwrap();
    assert_eq!((&*look.format, look.backing, look.capacity), ("raw", None, look.physical));
    // Of what it stands on nothing is said, so nothing of it is in what is made.
    let chain = vec![(room.at("disk"), "qcow2".to_owned())];
    room.pool.create(new("out", "raw", 1 << 20, Content::Converted { chain }), work()).await.unwrap();
    assert!(fs::read(room.at("out")).unwrap().iter().all(|byte| *byte == 0));
    // What is known to be qcow2 and is none is broken, not something else.
    pattern(&room.at("none"), 1 << 20);
    let known: KnownFormats = Arc::new([(room.look("none").await.id, "qcow2".to_owned())].into());
    let look = room.pool.look(vec!["none".to_owned()], &known).await.unwrap().pop().unwrap();
    assert!(look.broken.is_some_and(|why| why.contains("does not begin as qcow2 does")));
}

#[tokio::test]
async fn what_is_no_plain_file_in_the_folder_is_no_volume() {
    let room = Room::new().await;
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    symlink(elsewhere.path(), room.at("link")).unwrap();
    fs::create_dir(room.at("folder")).unwrap();
    fs::write(room.at("folder").join("inner"), "").unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, room.at("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    fs::write(room.at(".virt-new-1"), "").unwrap();
    fs::write(room.at("odd\u{7}name"), "").unwrap();
    fs::write(room.at("plain"), "x").unwrap();
    let survey = room.pool.survey(&KnownFormats::default()).await.unwrap();
    let names: Vec<_> = survey.volumes.iter().map(|look| &*look.name).collect();
    assert_eq!((names, survey.unnameable), (vec!["plain"], 1));
    for odd in ["link", "folder", "pipe", "folder/inner", "../x", ".", ""] {
        assert_eq!(room.pool.look(vec![odd.to_owned()], &KnownFormats::default()).await.unwrap(), [], "{odd}");
    }
    // A file that has taken its name is another one.
    let volume = room.volume("plain", "raw").await;
    fs::write(room.at("other"), "y").unwrap();
    fs::rename(room.at("other"), room.at("plain")).unwrap();
    let size = NewSize { capacity: 10, shrink: false, allocate: false };
    for refused in [room.pool.resize(&volume, size, work()).await, room.pool.delete(&volume, work()).await] {
        assert!(matches!(refused.unwrap_err(), DriverError::Refused(_)));
    }
    assert_eq!(fs::read(room.at("plain")).unwrap(), b"y");
    let volume = VolumeAt { id: FileId { ..room.look("plain").await.id }, ..volume };
    room.pool.delete(&volume, work()).await.unwrap();
    room.pool.delete(&volume, work()).await.unwrap();
    // What was being made when somebody was killed goes when the pool is started.
    storage().open(&definition(room.dir.path()), &Steps::default()).await.unwrap();
    room.holds(&["folder", "link", "odd\u{7}name", "pipe"]);
}

#[tokio::test]
async fn sizes_change_and_content_is_overwritten() {
    let room = Room::new().await;
    pattern(&room.at("a"), 2 << 20);
    let size = |capacity, shrink, allocate| NewSize { capacity, shrink, allocate };
    let volume = room.volume("a", "raw").await;
    let refused = room.pool.resize(&volume, size(1 << 20, false, false), work()).await.unwrap_err();
    assert!(matches!(&refused, DriverError::Argument(text) if text.contains("say shrink")), "{refused}");
    room.pool.resize(&volume, size(4 << 20, false, true), work()).await.unwrap();
    let look = room.look("a").await;
    assert!(look.capacity == 4 << 20 && look.allocation >= 2 << 20, "{look:?}");
    room.pool.resize(&room.volume("a", "raw").await, size(1 << 20, true, false), work()).await.unwrap();
    assert_eq!(room.look("a").await.capacity, 1 << 20);
    // What somebody has written to it since it was looked at is not lost either.
    let volume = room.volume("a", "raw").await;
    pattern(&room.at("a"), 3 << 20);
    let refused = room.pool.resize(&volume, size(2 << 20, false, false), work()).await.unwrap_err();
    assert!(refused.to_string().contains("say shrink") && room.look("a").await.capacity == 3 << 20, "{refused}");
    for (how, is_zero) in [(Wiping::Random, false), (Wiping::Zero, true), (Wiping::Discard, true)] {
        pattern(&room.at("w"), 1 << 20);
        room.pool.wipe(&room.volume("w", "raw").await, how, work()).await.unwrap();
        let bytes = fs::read(room.at("w")).unwrap();
        assert_eq!((bytes.len(), bytes.iter().all(|byte| *byte == 0)), (1 << 20, is_zero), "{how}");
    }
    if !has_tool() {
        return;
    }
    pattern(&room.at("c"), 3 << 20);
    let chain = vec![(room.at("c"), "raw".to_owned())];
    room.pool.create(new("q", "qcow2", 3 << 20, Content::Converted { chain }), work()).await.unwrap();
    room.pool.resize(&room.volume("q", "qcow2").await, size(5 << 20, false, false), work()).await.unwrap();
    assert_eq!(room.look("q").await.capacity, 5 << 20);
    room.pool.wipe(&room.volume("q", "qcow2").await, Wiping::Zero, work()).await.unwrap();
    let look = room.look("q").await;
    assert_eq!((look.capacity, &*look.format, look.broken), (5 << 20, "qcow2", None));
    room.pool.create(new("empty", "raw", 5 << 20, Content::Empty), work()).await.unwrap();
    is_same(("raw", &room.at("empty")), ("qcow2", &room.at("q")));
}

/// There and back: holes stay holes.
async fn goes_sparsely(room: &Room, source: &Path) {
    let volume = room.volume("b", "raw").await;
    room.pool.upload(&volume, given(fs::File::open(source).unwrap()), None, true, work()).await.unwrap();
    assert!(room.look("b").await.allocation < 1 << 20);
    let fetched = source.with_file_name("fetched");
    let file = fs::File::create(&fetched).unwrap();
    file.write_all_at(&[7; 9000], 0).unwrap();
    let volume = room.volume("b", "raw").await;
    room.pool.download(&volume, given(file), None, true, work()).await.unwrap();
    assert!(fs::read(&fetched).unwrap() == fs::read(source).unwrap());
    assert!(fs::metadata(&fetched).unwrap().blocks() * 512 < 1 << 20, "holes stay holes");
}

/// A part of a volume is written in its place, and read from it.
async fn goes_in_part(room: &Room, volume: &VolumeAt, words: &Path, source: &Path) {
    let part = Some(Part { offset: 4096, length: Some(3) });
    room.pool.upload(volume, given(fs::File::open(words).unwrap()), part, false, work()).await.unwrap();
    let (mut ear, mouth) = std::io::pipe().unwrap();
    room.pool
        .download(volume, given(mouth), Some(Part { offset: 4095, length: Some(5) }), false, work())
        .await
        .unwrap();
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut ear, &mut bytes).unwrap();
    let mut wanted = fs::read(source).unwrap()[4095..4100].to_vec();
    wanted[1..4].copy_from_slice(b"abc");
    assert_eq!(bytes, wanted);
}

async fn what_cannot_be_is_not_sent(room: &Room, volume: &VolumeAt, words: &Path) {
    let beyond = Some(Part { offset: 5 << 20, length: Some(1 << 20) });
    let refused = room.pool.upload(volume, given(fs::File::open(words).unwrap()), beyond, false, work()).await;
    assert!(matches!(refused.unwrap_err(), DriverError::Argument(_)));
    let (_ear, mouth) = std::io::pipe().unwrap();
    let refused = room.pool.download(volume, given(mouth), beyond, false, work()).await;
    assert!(matches!(refused.unwrap_err(), DriverError::Argument(_)), "nor is less of it sent in silence");
    let end = (5 << 20) + 17;
    for (offset, length, sparse, why) in [
        (end - 3, None, false, "more bytes than"),
        (end - 3, None, true, "more bytes than"),
        (end - 6, None, false, ""),
        (end - 6, None, true, ""),
        (0, Some(7), false, "it has 6 bytes"),
        (0, Some(7), true, "it has 6 bytes"),
    ] {
        let given = given(fs::File::open(words).unwrap());
        let done = room.pool.upload(volume, given, Some(Part { offset, length }), sparse, work()).await;
        let told = done.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(told.contains(why) && told.is_empty() == why.is_empty(), "{offset}: {told}");
    }
    assert_eq!(room.look("b").await.capacity, end, "it is as long as it was");
}

#[tokio::test]
async fn what_is_sent_and_fetched_is_the_same() {
    let room = Room::new().await;
    let outside = tempfile::tempdir().unwrap();
    let source = outside.path().join("source");
    pattern(&source, (5 << 20) + 17);
    // From a file, its holes too; and by a pipe.
    let content = Content::Given(given(fs::File::open(&source).unwrap()));
    let look = room.pool.create(new("a", "raw", 6 << 20, content), work()).await.unwrap();
    assert_eq!(look.capacity, 6 << 20, "it is as large as it was to be");
    fs::write(room.at("b"), "old").unwrap();
    let before = room.look("b").await;
    let (ear, mouth) = std::io::pipe().unwrap();
    let writer = std::thread::spawn({
        let source = source.clone();
        move || std::io::copy(&mut fs::File::open(source).unwrap(), &mut { mouth }).unwrap()
    });
    room.pool.upload(&room.volume("b", "raw").await, given(ear), None, false, work()).await.unwrap();
    writer.join().unwrap();
    assert!(fs::read(room.at("b")).unwrap() == fs::read(&source).unwrap());
    let after = room.look("b").await;
    assert_eq!((after.capacity, after.permissions), ((5 << 20) + 17, before.permissions));
    goes_sparsely(&room, &source).await;
    let volume = room.volume("b", "raw").await;
    let words = outside.path().join("words");
    fs::write(&words, "abcdef").unwrap();
    goes_in_part(&room, &volume, &words, &source).await;
    what_cannot_be_is_not_sent(&room, &volume, &words).await;
    // Who waits for a client for ever keeps nothing.
    let (ear, mouth) = std::io::pipe().unwrap();
    let cancelled = Arc::new(Steps { cancel_at: Some(1), ..Steps::default() });
    let part = Some(Part { offset: 0, length: None });
    let refused = room.pool.upload(&volume, given(ear), part, false, cancelled.clone()).await.unwrap_err();
    assert!(matches!(refused, DriverError::Cancelled), "{refused}");
    assert_eq!(Arc::strong_count(&cancelled), 1);
    drop(mouth);
    let (ear, _mouth) = std::io::pipe().unwrap();
    let refused = room.pool.upload(&volume, given(ear), None, true, work()).await.unwrap_err();
    assert!(matches!(&refused, DriverError::Argument(text) if text.contains("sparse")), "{refused}");
    let no_image = Content::Given(given(fs::File::open(&words).unwrap()));
    let refused = room.pool.create(new("q", "qcow2", 0, no_image), work()).await.unwrap_err();
    assert!(matches!(&refused, DriverError::Argument(text) if text.contains("does not begin")), "{refused}");
    room.holds(&["a", "b"]);
}

/// Whatever step it is cancelled at, all of it is there, or nothing.
#[tokio::test]
async fn a_cancelled_work_leaves_nothing() {
    let room = Room::new().await;
    pattern(&room.at("old"), 1 << 20);
    let old = fs::read(room.at("old")).unwrap();
    for step in 1.. {
        let steps = Arc::new(Steps { cancel_at: Some(step), ..Steps::default() });
        let made = room.pool.create(new("new", "raw", 2 << 20, Content::Empty), steps.clone()).await;
        match made {
            Ok(look) => {
                assert_eq!(look.capacity, 2 << 20);
                fs::remove_file(room.at("new")).unwrap();
            }
            Err(e) => assert!(matches!(e, DriverError::Cancelled), "{e}"),
        }
        room.holds(&["old"]);
        if steps.taken.load(Ordering::SeqCst) < step {
            break;
        }
    }
    // A client that gives nothing more.
    let (ear, _mouth) = std::io::pipe().unwrap();
    let steps = Arc::new(Steps::default());
    let volume = room.volume("old", "raw").await;
    let upload = room.pool.upload(&volume, given(ear), None, false, steps.clone());
    let cancelled = tokio::join!(upload, async { steps.cancel.cancel() }).0.unwrap_err();
    assert!(matches!(cancelled, DriverError::Cancelled), "{cancelled}");
    assert!(fs::read(room.at("old")).unwrap() == old);
    room.holds(&["old"]);
}

/// A full file system takes nothing of what does not fit.
#[tokio::test]
async fn what_does_not_fit_leaves_nothing() {
    if !is_inside("storage::tests::what_does_not_fit_leaves_nothing") {
        return;
    }
    use rustix::mount::{MountFlags, mount};
    let dir = tempfile::tempdir().unwrap();
    mount("none", dir.path(), "tmpfs", MountFlags::empty(), Some(c"size=1m")).unwrap();
    let pool = storage().open(&definition(dir.path()), &Steps::default()).await.unwrap();
    let room = Room { dir, pool };
    let outside = tempfile::NamedTempFile::new().unwrap();
    pattern(outside.path(), 4 << 20);
    fs::write(room.at("old"), "old").unwrap();
    let full = NewVolume { preallocation: Preallocation::Full, ..new("a", "raw", 4 << 20, Content::Empty) };
    let falloc = NewVolume { preallocation: Preallocation::Falloc, ..new("a", "raw", 4 << 20, Content::Empty) };
    fs::write(outside.path(), vec![1; 4 << 20]).unwrap();
    let open = || given(fs::File::open(outside.path()).unwrap());
    let copy = new("a", "raw", 0, Content::Copy { from: open(), reflink: Reflink::Auto });
    let content = new("a", "raw", 0, Content::Given(open()));
    for wanted in [full, falloc, copy, content] {
        let refused = room.pool.create(wanted, work()).await.unwrap_err();
        assert!(matches!(refused, DriverError::NoSpace(_)), "{refused}");
        room.holds(&["old"]);
    }
    let refused = room.pool.upload(&room.volume("old", "raw").await, open(), None, false, work()).await.unwrap_err();
    assert!(matches!(refused, DriverError::NoSpace(_)), "{refused}");
    assert_eq!(fs::read(room.at("old")).unwrap(), b"old");
    room.holds(&["old"]);
    let told = room.pool.room().await.unwrap();
    assert!(told.capacity == 1 << 20 && told.available < told.capacity, "{told:?}");
}

#[tokio::test]
async fn what_others_do_is_told_by_itself() {
    let room = Room::new().await;
    let mut told = room.pool.follow().await.unwrap().unwrap();
    fs::write(room.at("a"), "x").unwrap();
    let mut names = std::collections::BTreeSet::new();
    let mut sizes = std::collections::BTreeSet::new();
    while names.is_empty() || sizes.is_empty() {
        match told.recv().await.unwrap() {
            PoolChange::Names(more) => names.extend(more),
            PoolChange::Sizes(more) => sizes.extend(more),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        (names.into_iter().collect::<Vec<_>>(), sizes.into_iter().collect::<Vec<_>>()),
        (vec!["a".to_owned()], vec!["a".to_owned()])
    );
    fs::rename(room.at("a"), room.at("b")).unwrap();
    let mut names = std::collections::BTreeSet::new();
    while names.len() < 2 {
        match told.recv().await.unwrap() {
            PoolChange::Names(more) => names.extend(more),
            PoolChange::Sizes(_) => {}
            other => panic!("{other:?}"),
        }
    }
    fs::remove_file(room.at("b")).unwrap();
    fs::remove_dir(room.dir.path()).unwrap();
    // It is held, and so is gone for good only now.
    drop(room.pool);
    while let Some(change) = told.recv().await {
        if change == PoolChange::Lost {
            return;
        }
    }
    panic!("nobody told that it is gone");
}

#[tokio::test]
async fn a_folder_is_built_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/er");
    let def = PoolDef::parse(&format!(
        "<pool type='dir'><name>p</name><target><path>{}</path><permissions><mode>0750</mode></permissions></target></pool>",
        path.display()
    ))
    .unwrap();
    let (storage, steps) = (storage(), Steps::default());
    let missing = storage.open(&def, &steps).await.map(drop).unwrap_err();
    assert!(missing.to_string().contains("build the pool first"), "{missing}");
    storage.build(&def, false, &steps).await.unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o750);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    storage.build(&def, false, &steps).await.unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o700, "what is there stays");
    assert!(storage.build(&def, true, &steps).await.is_err());
    fs::write(path.join("a"), "").unwrap();
    let full = storage.delete(&def, &steps).await.unwrap_err();
    assert!(full.to_string().contains("there are files in it"), "{full}");
    fs::remove_file(path.join("a")).unwrap();
    storage.delete(&def, &steps).await.unwrap();
    storage.delete(&def, &steps).await.unwrap();
    assert!(!path.exists());
    let other = PoolDef::parse("<pool type='mpath'><name>m</name></pool>").unwrap();
    assert!(matches!(storage.open(&other, &steps).await.map(drop), Err(DriverError::Config(_))));
}

/// Two pools in one folder would each take what the other makes for a rest, and a disk's format from its guest.
#[tokio::test]
async fn a_folder_is_one_pool_only() {
    let dir = tempfile::tempdir().unwrap();
    let (storage, steps) = (storage(), Steps::default());
    let (one, other) = (definition(dir.path()), definition(&dir.path().join("link")));
    symlink(".", dir.path().join("link")).unwrap();
    let pool = storage.open(&one, &steps).await.unwrap();
    let refused = storage.open(&other, &steps).await.map(drop).unwrap_err();
    assert!(refused.to_string().contains("is pool 'p' already"), "{refused}");
    // The pool itself may look again, and takes nothing away that it makes meanwhile.
    fs::write(dir.path().join(".virt-new-1"), "").unwrap();
    let again = storage.open(&one, &steps).await.unwrap();
    assert!(dir.path().join(".virt-new-1").exists());
    drop((pool, again));
    storage.open(&other, &steps).await.unwrap();
    assert!(!dir.path().join(".virt-new-1").exists());
}

/// Whom the tool runs as may write what is made while it makes it, and nothing else of the pool.
#[tokio::test]
async fn the_tool_has_no_rights_of_ours() {
    let (true, true, Ok(nobody)) =
        (nix::unistd::geteuid().is_root(), has_tool(), crate::host::user::RunAs::look_up("nobody", None, &[]))
    else {
        return eprintln!("SKIPPED: needs root, qemu-img and a user nobody");
    };
    let state = tempfile::tempdir().unwrap();
    let ledger = Arc::new(crate::host::access::Ledger::open(state.path()).unwrap());
    let rights: ToolRights = Arc::new(move || Ok(Lender::To(nobody.clone(), ledger.clone())));
    let dir = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o711)).tempdir().unwrap();
    let storage = HostStorage::new(rights, passphrases(), state.path(), true);
    let pool = storage.open(&definition(dir.path()), &Steps::default()).await.unwrap();
    let room = Room { dir, pool };
    let look = room.pool.create(new("q", "qcow2", 1 << 20, Content::Empty), work()).await.unwrap();
    assert_eq!(look.permissions, (0, 0, 0o600), "it is ours when it is made");
    pattern(&room.at("a"), 3 << 20);
    fs::set_permissions(room.at("a"), fs::Permissions::from_mode(0o600)).unwrap();
    let chain = vec![(room.at("a"), "raw".to_owned())];
    room.pool.create(new("c", "qcow2", 3 << 20, Content::Converted { chain }), work()).await.unwrap();
    is_same(("raw", &room.at("a")), ("qcow2", &room.at("c")));
    let secret = Some("disk".to_owned());
    room.pool.create(NewVolume { secret, ..new("l", "luks", 1 << 20, Content::Empty) }, work()).await.unwrap();
    room.pool
        .resize(&room.volume("c", "qcow2").await, NewSize { capacity: 4 << 20, shrink: false, allocate: false }, work())
        .await
        .unwrap();
    assert_eq!(room.look("c").await.capacity, 4 << 20);
    let entries = crate::host::acl::Acl::of(fs::File::open(room.at("a")).unwrap().as_fd()).unwrap();
    assert!(entries.users().is_empty(), "what was lent is given back");
}

#[tokio::test]
async fn an_image_that_somebody_has_open_is_told() {
    if !has_tool() {
        return;
    }
    let room = Room::new().await;
    room.pool.create(new("a", "raw", 1 << 20, Content::Empty), work()).await.unwrap();
    assert!(!room.pool.is_open_elsewhere("a", true).await.unwrap());
    assert!(!room.pool.is_open_elsewhere("none", true).await.unwrap());
    // Who only reads it keeps it from being written, and not from being read.
    for (how, writes) in [("-f", true), ("-rf", false)] {
        let mut io = Command::new("qemu-io")
            .args([how, "raw"])
            .arg(room.at("a"))
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = [0; 1];
        io::Read::read_exact(&mut io.stdout.take().unwrap(), &mut said).unwrap();
        assert!(room.pool.is_open_elsewhere("a", true).await.unwrap(), "{how}");
        assert_eq!(room.pool.is_open_elsewhere("a", false).await.unwrap(), writes, "{how}");
        drop(io.stdin.take());
        io.wait().unwrap();
    }
}

#[tokio::test]
async fn two_thousand_volumes_are_read_at_once() {
    let room = Room::new().await;
    for number in 0..2000 {
        fs::write(room.at(&format!("v{number}")), format!("{number}")).unwrap();
    }
    let survey = room.pool.survey(&KnownFormats::default()).await.unwrap();
    assert_eq!(survey.volumes.len(), 2000);
    assert!(survey.volumes.iter().all(|look| look.broken.is_none() && look.format == "raw"));
}

/// Whoever is connected and leaves, whether they have said a word or not, has ended it.
#[tokio::test]
async fn a_volume_is_served_until_its_client_leaves() {
    use std::io::Read as _;
    if !has_tool() {
        return;
    }
    let (dir, run) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let pool = storage_in(run.path()).open(&definition(dir.path()), &Steps::default()).await.unwrap();
    let room = Room { dir, pool };
    room.pool.create(new("q", "qcow2", 1 << 20, Content::Empty), work()).await.unwrap();
    let volume = room.volume("q", "qcow2").await;
    let served = room.pool.serve(&volume, true).await.unwrap();
    let mut magic = [0; 8];
    let mut client = std::os::unix::net::UnixStream::from(served.connection);
    client.read_exact(&mut magic).unwrap();
    assert_eq!(&magic, b"NBDMAGIC");
    assert!(room.pool.is_open_elsewhere("q", false).await.unwrap(), "it may be written");
    drop(client);
    served.ended.await;
    assert!(!room.pool.is_open_elsewhere("q", true).await.unwrap());
    // Nobody waits for its end any more.
    let Served { connection, ended } = room.pool.serve(&volume, false).await.unwrap();
    drop(ended);
    let mut rest = Vec::new();
    let read = tokio::task::spawn_blocking(move || fs::File::from(connection).read_to_end(&mut rest).map(|_| rest));
    assert!(read.await.unwrap().unwrap().starts_with(b"NBDMAGIC"));
    // What is no such image is told in the server's words, and leaves nothing.
    fs::write(room.at("bad"), b"QFI\xfb and no more").unwrap();
    let error = room.pool.serve(&room.volume("bad", "qcow2").await, false).await.map(drop).unwrap_err();
    assert!(matches!(&error, DriverError::Storage(text) if text.contains("/bad: ")), "{error:?}");
    room.holds(&["bad", "q"]);
    assert_eq!(fs::read_dir(run.path()).unwrap().count(), 0);
}
