//! What is behind a wall. Need root.

use super::*;
use std::process::Command;

fn needs_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root");
    }
    !root
}

/// What a shell behind the wall says.
fn sh(wall: &Wall, script: &str) -> String {
    let output = wall.within(|| Command::new("/bin/sh").args(["-c", script]).output()).unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned()
}

fn file(path: &Path, write: bool) -> LentFile {
    LentFile::unlent(path, write).unwrap().unwrap()
}

#[test]
fn nothing_is_there_but_what_was_given() {
    if needs_root() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (given, other) = (dir.path().join("given"), dir.path().join("other"));
    std::fs::write(&given, "given").unwrap();
    std::fs::write(&other, "other").unwrap();
    let wall = Wall { files: vec![file(&given, false)], ..Wall::default() };
    assert_eq!(sh(&wall, &format!("cat {}", given.display())), "given");
    assert!(sh(&wall, &format!("echo more > {}", given.display())).contains("Read-only"));
    assert!(sh(&wall, &format!("cat {}", other.display())).contains("No such file"));
    for absent in ["/etc/shadow", "/root", "/home", "/run/dbus", "/sys/fs", "/var/lib", "/tmp", "/dev/kvm", "/proc/sys"]
    {
        assert!(sh(&wall, &format!("ls -d {absent}")).contains("No such file"), "{absent}");
    }
    assert!(sh(&wall, "ls /proc/self/root/; cat /proc/net/dev 2>/dev/null; ls /usr/bin/env").contains("/usr/bin/env"));
    assert_eq!(sh(&wall, "echo x > /dev/null; head -c 1 /dev/zero | wc -c"), "1");
}

#[test]
fn what_was_judged_is_there_whatever_its_name_means_now() {
    if needs_root() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (path, secret) = (dir.path().join("log"), dir.path().join("secret"));
    std::fs::write(&path, "judged").unwrap();
    std::fs::write(&secret, "secret").unwrap();
    let wall = Wall { files: vec![file(&path, true)], ..Wall::default() };
    std::fs::rename(&path, dir.path().join("away")).unwrap();
    std::os::unix::fs::symlink(&secret, &path).unwrap();
    assert_eq!(sh(&wall, &format!("cat {0}; echo -n changed > {0}", path.display())), "judged");
    assert_eq!(std::fs::read_to_string(&secret).unwrap(), "secret");
    assert_eq!(std::fs::read_to_string(dir.path().join("away")).unwrap(), "changed");
}

#[test]
fn a_running_process_is_shown_more_and_what_was_replaced() {
    if needs_root() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("deep/second"));
    std::fs::create_dir(dir.path().join("deep")).unwrap();
    std::fs::write(&first, "old").unwrap();
    std::fs::write(&second, "second").unwrap();
    let wall = Wall { files: vec![file(&first, false)], ..Wall::default() };
    let script = format!("read line; cat {}; cat {}; echo -n more >> {0}", first.display(), second.display());
    let ((its_input, input), (mut output, its_output)) = (io::pipe().unwrap(), io::pipe().unwrap());
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &script]).stdin(its_input).stdout(its_output);
    let mut child = wall.within(|| command.spawn()).unwrap();
    drop(command);
    std::fs::remove_file(&first).unwrap();
    std::fs::write(&first, "new").unwrap();
    show(child.id() as i32, &[file(&first, true), file(&second, false)]).unwrap();
    show(child.id() as i32, &[file(&first, true)]).unwrap();
    drop(input);
    assert_eq!(io::read_to_string(&mut output).unwrap(), "newsecond");
    child.wait().unwrap();
    assert_eq!(std::fs::read_to_string(&first).unwrap(), "newmore");
}

#[test]
fn who_has_no_wall_is_shown_nothing() {
    if needs_root() {
        return;
    }
    let file = file(Path::new("/etc/hostname"), true);
    show(std::process::id() as i32, &[file]).unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("/etc/hostname "));
}

/// Somebody who may change what a name means does so all the time.
#[test]
fn a_name_that_is_bent_while_it_is_lent_leads_nowhere_else_in_200_tries() {
    if needs_root() {
        return;
    }
    use crate::host::access::{Ledger, Want};
    use std::os::unix::fs::{chown, lchown, symlink};
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (theirs, target) = (dir.path().join("theirs"), dir.path().join("disk-of-another"));
    std::fs::write(&target, "untouched").unwrap();
    std::fs::create_dir(&theirs).unwrap();
    let (name, aside, link) = (theirs.join("serial.log"), theirs.join("aside"), theirs.join("link"));
    std::fs::write(&name, "").unwrap();
    symlink(&target, &link).unwrap();
    for path in [&theirs, &name] {
        chown(path, Some(1000), Some(1000)).unwrap();
    }
    lchown(&link, Some(1000), Some(1000)).unwrap();
    let ledger = Ledger::open(&dir.path().join("state")).unwrap();
    let Ok(user) = crate::host::user::RunAs::look_up("nobody", None, &[]) else {
        return eprintln!("SKIPPED: no user nobody");
    };
    let over = std::sync::atomic::AtomicBool::new(false);
    let wants = [Want { path: name.clone(), write: true, device: false }];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                for (from, to) in [(&name, &aside), (&link, &name), (&name, &link), (&aside, &name)] {
                    std::fs::rename(from, to).unwrap();
                }
            }
        });
        let guest = uuid::Uuid::new_v4();
        for _ in 0..200 {
            if let Ok(files) = ledger.lend(&user, guest, &wants) {
                sh(&Wall { files, ..Wall::default() }, &format!("echo x >> {}", name.display()));
                ledger.give_back(guest);
            }
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(std::fs::read_to_string(&target).unwrap(), "untouched");
}

#[test]
fn one_filter_holds_all_that_is_refused_each_with_its_error() {
    if needs_root() {
        return;
    }
    let wall = Wall::default();
    assert_eq!(sh(&wall, "grep Seccomp_filters: /proc/self/status").split_whitespace().last(), Some("1"));
    let error = |call: fn() -> libc::c_long| {
        let made = wall.within(|| Ok((call(), io::Error::last_os_error().raw_os_error()))).unwrap();
        if made.0 == -1 { made.1 } else { None }
    };
    // SAFETY: none of these calls takes memory, but for null.
    unsafe {
        assert_eq!(error(|| libc::syscall(libc::SYS_io_uring_setup, 1, 0)), Some(libc::ENOSYS));
        assert_eq!(error(|| libc::syscall(libc::SYS_clone3, 0, 0)), Some(libc::ENOSYS));
        assert_eq!(error(|| libc::syscall(libc::SYS_bpf, 0, 0, 0)), Some(libc::EPERM));
        assert_eq!(
            error(|| libc::syscall(libc::SYS_socket, libc::AF_ALG, libc::SOCK_SEQPACKET, 0)),
            Some(libc::EAFNOSUPPORT)
        );
        assert_eq!(error(|| libc::syscall(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0)), None);
        assert_eq!(error(|| libc::syscall(libc::SYS_getpid)), None);
    }
}

#[test]
fn a_wall_on_a_ground_that_was_made_before_is_as_any_other() {
    if needs_root() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let to_come = Ground::begin().unwrap();
    let given = dir.path().join("given");
    std::fs::write(&given, "given").unwrap();
    let wall = Wall { files: vec![file(&given, false)], scratch: true, ..Wall::default() };
    let ground = to_come.wait().unwrap();
    let script = format!(
        "cat {}; find / -maxdepth 3 -path /proc -prune -o -print | sort; sort /proc/self/mounts",
        given.display()
    );
    let run = || Command::new("/bin/sh").args(["-c", &script]).output();
    let output = apart::without(|| wall.enter(Some(&ground)).and_then(|()| run())).unwrap();
    let on_it = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(on_it.starts_with("given") && on_it.contains("/usr/bin"), "{on_it}");
    assert_eq!(on_it, sh(&wall, &script));
}

/// libusb insists on the kernel's news of devices, whatever it is to open.
#[test]
fn of_what_the_kernel_tells_by_netlink_only_news_of_devices_are_heard() {
    if needs_root() {
        return;
    }
    let makes = |news_of_devices, of: i32| {
        let wall = Wall { news_of_devices, ..Wall::default() };
        // SAFETY: it takes no memory.
        let made = wall.within(|| unsafe {
            Ok((libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, of), io::Error::last_os_error().raw_os_error()))
        });
        made.map(|(socket, error)| if socket == -1 { error } else { None }).unwrap()
    };
    assert_eq!(makes(true, libc::NETLINK_KOBJECT_UEVENT), None);
    assert_eq!(makes(true, libc::NETLINK_ROUTE), Some(libc::EAFNOSUPPORT));
    assert_eq!(makes(false, libc::NETLINK_KOBJECT_UEVENT), Some(libc::EAFNOSUPPORT));
    let wall = Wall { news_of_devices: true, ..Wall::default() };
    // SAFETY: it takes no memory.
    let made = wall.within(|| unsafe { Ok(libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)) }).unwrap();
    assert_eq!(made, -1);
}
