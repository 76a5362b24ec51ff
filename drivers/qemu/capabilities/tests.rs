use super::*;
use std::os::unix::fs::PermissionsExt;

const GUEST: Uuid = Uuid::from_u128(1);

fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    crate::host::test_program::script(&path, text);
    path
}

fn prober(cache: Option<&Path>, user: Option<(u32, u32)>) -> Arc<Prober> {
    Arc::new(Prober::new(cache.map(Path::to_owned), user))
}

async fn probed(prober: &Arc<Prober>, binary: &Path) -> Result<Arc<Capabilities>, String> {
    prober.probe(GUEST, binary).await.map(|asked| asked.capabilities).map_err(|e| e.to_string())
}

fn kept(prober: &Prober, binary: &Path) -> CacheFile {
    let judged = prober.judge(binary).unwrap();
    CacheFile { stamp: judged.stamp, capabilities: Capabilities::absent(binary, "kept".into()) }
}

#[tokio::test]
async fn says_why_a_binary_cannot_be_asked() {
    let dir = tempfile::tempdir().unwrap();
    let prober = prober(None, None);
    let missing = probed(&prober, &dir.path().join("none")).await.unwrap_err();
    assert!(missing.contains("none: No such file"), "{missing}");
    let relative = probed(&prober, Path::new("qemu")).await.unwrap_err();
    assert!(relative.contains("not absolute"), "{relative}");
    let words = script(dir.path(), "words", "echo 'no such machine' >&2; exit 1");
    let words = probed(&prober, &words).await.unwrap_err();
    assert!(words.ends_with("no such machine"), "{words}");
    let again = prober.known(&dir.path().join("none")).await;
    assert_eq!(again.absent.as_ref(), Some(&missing), "what a definer was told");
}

#[tokio::test]
async fn runs_nothing_that_others_could_have_put_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = script(dir.path(), "qemu", "");
    let prober = prober(None, Some((65534, 65534)));
    let error = probed(&prober, &path).await.unwrap_err();
    assert!(error.contains("others than root"), "a sticky folder is on the way: {error}");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
    let error = probed(&prober, &path).await.unwrap_err();
    assert!(error.contains("others than root"), "{error}");
    let error = probed(&prober, Path::new("/bin/true")).await.unwrap_err();
    assert!(error.contains("its name"), "{error}");
}

/// C1 and S4: what somebody who may only read names is neither run nor looked at nor remembered.
#[tokio::test]
async fn a_reader_makes_nothing_run_and_fills_no_cache() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let prober = prober(Some(&cache), None);
    let ran = dir.path().join("ran");
    let path = script(dir.path(), "qemu", &format!("touch {}\nexit 1", ran.display()));
    let own = prober.known(Path::new("/usr/bin/qemu-system-noarch")).await;
    assert!(own.absent.as_ref().is_some_and(|why| why.contains("No such file")), "{:?}", own.absent);
    for named in [&path, Path::new("/nowhere/qemu"), &dir.path().join("sub/../qemu")] {
        let known = prober.known(named).await;
        let why = known.absent.clone().unwrap();
        assert!(why.contains("nothing is known of it yet"), "the same whether it is there or not: {why}");
    }
    assert!(!ran.exists() && !cache.exists() && lock(&prober.known).is_empty());
    probed(&prober, &path).await.unwrap_err();
    assert!(ran.exists(), "whoever may define has it run");
}

/// An earlier virtd may have learnt it.
#[tokio::test]
async fn what_was_learnt_before_is_told_to_readers() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let path = script(dir.path(), "qemu", "exit 1");
    let before = prober(Some(&cache), None);
    let mut file = kept(&before, &path);
    file.capabilities.absent = None;
    file.capabilities.version = (9, 1, 2);
    before.save(&path, &file).unwrap();
    let known = prober(Some(&cache), None).known(&path).await;
    assert_eq!((known.absent.clone(), known.version), (None, (9, 1, 2)));
    // Files of virtd's that let strangers fill them are not read any more.
    file.stamp.format = 1;
    before.save(&path, &file).unwrap();
    assert!(prober(Some(&cache), None).known(&path).await.absent.is_some());
}

#[tokio::test]
async fn other_spellings_of_a_path_are_not_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let prober = prober(Some(&dir.path().join("cache")), None);
    let asked = dir.path().join("asked");
    let path = script(dir.path(), "qemu", &format!("echo >> {}\nexit 1", asked.display()));
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    prober.save(&path, &kept(&prober, &path)).unwrap();
    for odd in ["sub/../qemu", "sub/../sub/../qemu", ".//qemu"] {
        assert_eq!(probed(&prober, &dir.path().join(odd)).await.unwrap().binary, path);
        assert_eq!(prober.known(&dir.path().join(odd)).await.binary, path);
    }
    assert_eq!(lock(&prober.known).len(), 1);
    assert!(!asked.exists());
}

#[tokio::test]
async fn asks_once_and_remembers() {
    let binary = default_emulator("x86_64");
    if !binary.exists() {
        eprintln!("SKIPPED: {} is not installed", binary.display());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let first = prober(Some(&cache), None);
    let (first, second) = tokio::join!(probed(&first, &binary), probed(&first, &binary));
    let first = first.unwrap();
    assert!(Arc::ptr_eq(&first, &second.unwrap()), "concurrent probes share one answer");
    assert!(first.at_least(5, 2) && first.arch == "x86_64" && first.commands.contains("query-status"));
    assert!(first.machine("q35").is_some_and(|m| m.name.starts_with("pc-q35-") && m.max_cpus > 1));
    assert!(first.has_device("virtio-blk-pci") && first.objects.contains("rng-random"));
    assert!(first.chardevs.contains("pty") && first.cpus.iter().any(|c| c == "qemu64"));
    let again = probed(&prober(Some(&cache), None), &binary).await.unwrap();
    assert_eq!(*first, *again, "read from the cache file");
    let known = prober(None, None).known(&binary).await;
    assert_eq!(known.machines, first.machines, "the system's own is everybody's to know");
}

#[test]
fn a_changed_binary_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let prober = prober(Some(dir.path()), None);
    let path = script(dir.path(), "qemu", "");
    let before = kept(&prober, &path);
    prober.save(&path, &before).unwrap();
    assert_eq!(prober.load(&path).unwrap().stamp, prober.judge(&path).unwrap().stamp);
    script(dir.path(), "qemu", "# longer");
    assert_ne!(prober.load(&path).unwrap().stamp, prober.judge(&path).unwrap().stamp);
}

#[test]
fn the_systems_own_is_where_no_caller_can_choose() {
    for own in ["/usr/bin/qemu-system-x86_64", "/usr/local/bin/qemu-system-aarch64", "/usr/bin/kvm"] {
        assert!(is_systems_own(Path::new(own)), "{own}");
    }
    for other in [
        "/usr/bin/qemu-system-../../tmp/qemu",
        "/usr/bin/../bin/qemu-system-x86_64",
        "/usr/bin//qemu-system-x86_64",
        "/usr/bin/qemu-img",
        "/tmp/qemu-system-x86_64",
        "/usr/bin/sub/qemu-system-x86_64",
    ] {
        assert!(!is_systems_own(Path::new(other)), "{other}");
    }
}
