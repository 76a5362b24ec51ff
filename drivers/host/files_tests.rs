use super::*;
use crate::host::test_program::script;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::process::Stdio;

fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").unwrap()
}

fn needs_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root");
    }
    !root
}

#[test]
fn a_pipe_in_place_of_a_file_keeps_nobody_waiting() {
    let dir = dir();
    let pipe = dir.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, 0o600.into(), 0).unwrap();
    let refused = open_plain(&pipe, false).unwrap_err();
    assert_eq!(refused.to_string(), "it is no plain file");
    assert!(open_plain(dir.path(), false).is_err());
    assert!(open_plain(Path::new("/dev/zero"), false).is_err());
    std::fs::write(dir.path().join("plain"), "text").unwrap();
    let plain = || open_plain(&dir.path().join("plain"), false).unwrap();
    assert_eq!((plain().length(), plain().read_all(4).unwrap()), (4, b"text".to_vec()));
    assert!(plain().read_all(3).is_err());
}

#[test]
fn what_was_judged_is_what_runs() {
    let dir = dir();
    let path = dir.path().join("program");
    script(&path, "echo judged $0");
    let program = Program::at(&path, false).unwrap();
    std::fs::remove_file(&path).unwrap();
    script(&path, "echo another");
    let said = program.command().stdin(Stdio::null()).output().unwrap();
    assert!(String::from_utf8_lossy(&said.stdout).starts_with("judged"), "{said:?}");
    let binary = Program::at(Path::new("/bin/echo"), false).unwrap();
    assert!(!binary.is_script() && binary.command().arg("x").output().unwrap().stdout == b"x\n");
}

#[test]
fn a_program_that_others_could_have_put_there_is_refused() {
    if needs_root() {
        return;
    }
    Program::at(Path::new("/bin/sh"), true).unwrap();
    let dir = dir();
    let at = |name: &str| dir.path().join(name);
    // The way there leads through /var/tmp, which is sticky: not good enough.
    script(&at("program"), "true");
    let refused = Program::at(&at("program"), true).unwrap_err().to_string();
    assert!(refused.contains("/var/tmp can be changed by others than root"), "{refused}");
    symlink("/bin/sh", at("link")).unwrap();
    assert!(Program::at(&at("link"), true).is_err(), "a root's link in a sticky folder");
    let home = Path::new("/root");
    let safe = tempfile::tempdir_in(home).unwrap();
    let at = |name: &str| safe.path().join(name);
    script(&at("program"), "true");
    symlink(at("program"), at("link")).unwrap();
    for name in ["program", "link"] {
        Program::at(&at(name), true).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    lchown(at("link"), Some(1000), None).unwrap();
    let refused = Program::at(&at("link"), true).unwrap_err().to_string();
    assert!(refused.contains("a link of user 1000's"), "{refused}");
    let mode = |mode| std::fs::set_permissions(at("program"), std::fs::Permissions::from_mode(mode)).unwrap();
    for wrong in [0o775, 0o757, 0o644] {
        mode(wrong);
        assert!(Program::at(&at("program"), true).is_err(), "{wrong:o}");
    }
    mode(0o755);
    chown(at("program"), Some(1000), None).unwrap();
    assert!(Program::at(&at("program"), true).is_err(), "another's");
    assert!(Program::at(&at("program"), false).is_ok(), "an ordinary user's own affair");
}

#[test]
fn a_look_tells_what_is_there_and_opens_nothing() {
    let dir = dir();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("plain"), vec![1; 10_000]).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), FileType::Fifo, 0o600.into(), 0).unwrap();
    symlink("plain", at("link")).unwrap();
    symlink("nowhere", at("broken")).unwrap();
    let look = |name: &str| Seen::at(&at(name));
    assert_eq!((look("plain").what, look("plain").length), (What::Plain, 10_000));
    assert!(look("plain").allocated >= 10_000 && look("plain").free.is_some());
    assert_eq!(look("link").real, look("plain").real);
    assert_eq!((look("pipe").what, look(".").what), (What::Other, What::Folder));
    assert!(look("none").has_folder && !look("none").is_there() && !look("none").named);
    assert!(look("broken").named && !look("broken").is_there());
    assert!(!look("none/inner").has_folder && !Seen::at(Path::new("relative")).is_there());
}

#[test]
fn a_folder_of_any_depth_is_emptied_with_few_descriptors() {
    // As /run is: some disks take milliseconds for each folder.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let top = dir.path().join("top");
    std::fs::create_dir(&top).unwrap();
    let precious = dir.path().join("precious");
    std::fs::write(&precious, "").unwrap();
    let mut at = openat(rustix::fs::CWD, &top, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    for n in 0..12_000 {
        mkdirat(&at, "deep", 0o700.into()).unwrap();
        if n % 1000 == 0 {
            rustix::fs::symlinkat(&precious, &at, "link").unwrap();
        }
        at = open_folder(&at, OsStr::new("deep")).unwrap();
    }
    drop(at);
    for n in 0..3000 {
        std::fs::write(top.join(format!("wide-{n}")), "").unwrap();
    }
    // With a table of descriptors of its own, which is looked at meanwhile.
    let (tell, told) = std::sync::mpsc::channel();
    let emptying = std::thread::spawn({
        let top = top.clone();
        move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES).unwrap();
            tell.send(nix::unistd::gettid()).unwrap();
            Place::resolve(&top, false).and_then(|place| place.remove_all())
        }
    });
    let table = format!("/proc/self/task/{}/fd", told.recv().unwrap());
    let open = || std::fs::read_dir(&table).map_or(0, Iterator::count);
    let (before, mut most) = (open(), 0);
    while !emptying.is_finished() {
        most = most.max(open());
    }
    emptying.join().unwrap().unwrap();
    assert!(most < before + 100, "{most} descriptors");
    assert!(!top.exists() && precious.exists());
}

#[test]
fn emptying_ends_in_time() {
    let dir = dir();
    std::fs::create_dir(dir.path().join("inner")).unwrap();
    std::fs::write(dir.path().join("inner/file"), "").unwrap();
    let folder = Found::resolve(dir.path()).unwrap().folder().unwrap();
    let late = folder.empty_until(Instant::now() - Duration::from_secs(1)).unwrap_err();
    assert_eq!(late.kind(), io::ErrorKind::TimedOut);
    folder.empty().unwrap();
    assert!(folder.names(1).unwrap().is_empty());
}

/// C1: a program changes places with another one, again and again.
#[test]
fn a_program_that_is_renamed_away_is_never_another_one() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let dir = dir();
    let at = |name: &str| dir.path().join(name);
    for name in ["one", "other"] {
        script(&at(name), &format!("echo {name}"));
    }
    std::fs::hard_link(at("one"), at("program")).unwrap();
    let inode = |name: &str| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(at(name)).unwrap());
    let (one, other) = (inode("one"), inode("other"));
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                for name in ["other", "one"] {
                    std::fs::hard_link(at(name), at("next")).unwrap();
                    std::fs::rename(at("next"), at("program")).unwrap();
                    let _ = std::fs::remove_file(at("next"));
                }
            }
        });
        let wrong = (0..200).find(|_| {
            let program = Program::at(&at("program"), false).unwrap();
            let said = program.command().output().unwrap().stdout;
            let judged = program.stat().st_ino;
            assert!([one, other].contains(&judged));
            said != if judged == one { &b"one\n"[..] } else { b"other\n" }
        });
        ended.store(true, Ordering::Relaxed);
        assert_eq!(wrong, None);
    });
}
