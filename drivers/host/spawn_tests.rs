//! Processes made by hand: what they inherit, and that none is lost.

use super::*;
use crate::host::access::LentFile;
use crate::host::process::{End, Process, reap};
use crate::host::test_program::script;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::task::Poll;

fn plan<'a>(args: &'a [String], env: &'a [(String, String)], output: &'a File) -> Plan<'a> {
    let gift = || UnixListener::bind_addr(&abstract_address()).unwrap().into();
    let gifts = vec![(3, gift()), (20, gift())];
    Plan { env, gifts, ..Plan::new(Path::new("/bin/sh"), args, output) }
}

fn abstract_address() -> std::os::unix::net::SocketAddr {
    use std::os::linux::net::SocketAddrExt;
    std::os::unix::net::SocketAddr::from_abstract_name(uuid::Uuid::new_v4().as_bytes()).unwrap()
}

fn shell(script: &str) -> Vec<String> {
    vec!["-c".to_owned(), script.to_owned()]
}

fn text(file: &File) -> String {
    let mut text = String::new();
    let mut file = file.try_clone().unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

async fn end(spawned: Spawned) -> End {
    Process::new(spawned.fd).unwrap().ended().await
}

#[tokio::test]
async fn inherits_only_what_it_is_given() {
    let _other = File::open("/dev/zero").unwrap();
    let output = tempfile::tempfile().unwrap();
    let script = "echo $GREETING; ls /proc/self/fd; readlink /proc/self/fd/0; env; ulimit -c; pwd; exec >&-; exit 7";
    let args = shell(script);
    let env = [("GREETING".to_owned(), "hello".to_owned())];
    let spawned = spawn(plan(&args, &env, &output), |_| Ok(())).unwrap();
    assert_eq!(end(spawned).await, End::Code(7));
    let said = text(&output);
    // `ls` has the directory it reads open as 4.
    assert!(said.starts_with("hello\n0\n1\n2\n20\n3\n4\n/dev/null\n"), "{said}");
    assert!(said.ends_with("\n0\n/\n"), "{said}");
    assert!(!said.contains("HOME="), "{said}");
}

#[tokio::test]
async fn descriptors_and_the_length_of_files_are_held_to_what_the_plan_says() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    let output = tempfile::tempfile().unwrap();
    let script = "ulimit -Sn; ulimit -Hn; ulimit -f; head -c 8192 /dev/zero > \"$FILE\" || echo refused";
    let env = [("PATH", "/usr/bin:/bin"), ("FILE", file.to_str().unwrap())].map(|(k, v)| (k.to_owned(), v.to_owned()));
    let args = shell(script);
    let plan = Plan { descriptors: Some(99), file_limit: Some(4096), ..plan(&args, &env, &output) };
    assert_eq!(end(spawn(plan, |_| Ok(())).unwrap()).await, End::Code(0));
    let said = text(&output);
    // The shell counts files in blocks of 512 bytes. Who writes too much hears of it, and is not killed.
    assert!(said.starts_with("99\n99\n8\n"), "{said}");
    assert!(said.ends_with("refused\n") && said.contains("File too large"), "{said}");
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 4096);
}

#[test]
fn nothing_runs_before_it_is_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("ran");
    let output = tempfile::tempfile().unwrap();
    let args = shell(&format!("echo x > {}", mark.display()));
    let mut pid = 0;
    let refused = spawn(plan(&args, &[], &output), |identity| {
        pid = identity.pid;
        let exe = std::fs::read_link(format!("/proc/{pid}/exe"))?;
        assert_eq!(exe, std::env::current_exe()?, "still our own program");
        Err(io::Error::other("disk full"))
    });
    assert_eq!(refused.err().unwrap().to_string(), "disk full");
    assert!(!mark.exists());
    assert!(!Path::new("/proc").join(pid.to_string()).exists(), "neither process nor zombie");
}

#[test]
fn a_program_that_cannot_run_is_an_error_that_names_it() {
    let output = tempfile::tempfile().unwrap();
    let plan = Plan { program: Path::new("/nowhere/qemu"), ..plan(&[], &[], &output) };
    let error = spawn(plan, |_| Ok(())).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(error.to_string().starts_with("/nowhere/qemu cannot run: No such file"), "{error}");
}

/// C1: what was judged runs, whatever its name means by then; a text for an interpreter, too.
#[tokio::test]
async fn runs_the_file_that_was_judged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qemu");
    script(&path, "echo judged");
    let judged_text = Program::at(&path, false).unwrap();
    std::fs::rename(&path, dir.path().join("away")).unwrap();
    script(&path, "echo another");
    let binary = Program::at(Path::new("/bin/echo"), false).unwrap();
    for (judged, args) in [(&judged_text, vec![]), (&binary, vec!["judged".to_owned()])] {
        let output = tempfile::tempfile().unwrap();
        let plan = Plan { program: &path, judged: Some(judged), ..plan(&args, &[], &output) };
        let spawned = spawn(plan, |_| Ok(())).unwrap();
        assert_eq!(end(spawned).await, End::Code(0));
        assert_eq!(text(&output), "judged\n");
    }
}

#[tokio::test]
async fn runs_as_the_user() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("SKIPPED: needs root");
    }
    let Ok(nobody) = RunAs::look_up("nobody", None, &[]) else { return eprintln!("SKIPPED: no user nobody") };
    let output = tempfile::tempfile().unwrap();
    let args = shell("id -u; id -G; grep -E 'Cap(Prm|Eff)' /proc/self/status");
    let env = [("PATH".to_owned(), "/usr/bin:/bin".to_owned())];
    let plan = Plan { user: Some(&nobody), ..plan(&args, &env, &output) };
    assert_eq!(end(spawn(plan, |_| Ok(())).unwrap()).await, End::Code(0));
    let said = text(&output);
    assert!(said.starts_with(&format!("{}\n{}\n", nobody.uid, nobody.gid)), "{said}");
    assert_eq!(said.matches("0000000000000000").count(), 2, "{said}");
    let others = std::thread::spawn(nix::unistd::geteuid).join().unwrap();
    assert!(others.is_root() && nix::unistd::geteuid().is_root(), "it had our memory, and we have our rights");
}

/// While it waits it has that user's number, and our memory.
#[tokio::test]
async fn others_of_its_user_cannot_look_into_the_waiting_child() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("SKIPPED: needs root");
    }
    let Ok(nobody) = RunAs::look_up("nobody", None, &[]) else { return eprintln!("SKIPPED: no user nobody") };
    let (output, args) = (tempfile::tempfile().unwrap(), shell("exit 0"));
    let plan = Plan { user: Some(&nobody), ..plan(&args, &[], &output) };
    let spawned = spawn(plan, |identity| {
        let at = |file: &str| format!("/proc/{}/{file}", identity.pid);
        while !std::fs::read_to_string(at("status"))?.contains(&format!("Uid:\t{0}\t{0}\t{0}\t{0}", nobody.uid)) {
            std::thread::yield_now();
        }
        for file in ["mem", "maps", "environ", "fd/0", "exe"] {
            let mut look = Command::new("head");
            look.args(["-c1", &at(file)]).uid(nobody.uid).gid(nobody.gid);
            let said = String::from_utf8_lossy(&apart::without(|| look.output())?.stderr).into_owned();
            assert!(said.contains("Permission denied"), "{file}: {said}");
        }
        Ok(())
    });
    assert_eq!(end(spawned.unwrap()).await, End::Code(0));
}

/// Its memory is ours until it runs its program, and what we do on a signal is not what it does.
#[tokio::test]
async fn a_signal_to_the_waiting_child_is_not_taken_for_ours() {
    let mut ours = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::user_defined2()).unwrap();
    let (output, args) = (tempfile::tempfile().unwrap(), shell("exit 0"));
    let spawned = spawn(plan(&args, &[], &output), |identity| {
        // Before that it is held back.
        let status = format!("/proc/{}/status", identity.pid);
        while !std::fs::read_to_string(&status)?.contains("SigBlk:\t0000000000000000") {
            std::thread::yield_now();
        }
        let pid = Pid::from_raw(identity.pid).unwrap();
        Ok(rustix::process::kill_process(pid, rustix::process::Signal::USR2)?)
    });
    assert_eq!(end(spawned.unwrap()).await, End::Signal(libc::SIGUSR2));
    assert!(std::future::poll_fn(|context| Poll::Ready(ours.poll_recv(context))).await.is_pending(), "not to us");
}

/// A program that dies with SIGKILL while its child waits for "go" leaves no process. Acted out with a child of ours in
/// the part of virtd.
#[test]
fn the_waiting_child_dies_with_us() {
    dies_with_us(None);
    if !no_own_walls() {
        dies_with_us(Some(&Wall { maker: Maker::Own, ..Wall::default() }));
    }
}

fn dies_with_us(wall: Option<&Wall>) {
    let output = tempfile::tempfile().unwrap();
    let (read, write) = rustix::pipe::pipe().unwrap();
    let args = shell("echo never");
    let made = Plan { wall, ..plan(&args, &[], &output) };
    // SAFETY: the child does what a single-threaded program may; the test process does not wait for locks it might hold.
    let virtd = unsafe { libc::fork() };
    if virtd == 0 {
        let _ = spawn(made, |identity| {
            let _ = rustix::io::write(&write, &identity.pid.to_ne_bytes());
            // SAFETY: ends this process at once.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            Ok(())
        });
        // SAFETY: not reached.
        unsafe { libc::_exit(1) };
    }
    drop(write);
    let mut pid = [0u8; 4];
    File::from(read).read_exact(&mut pid).unwrap();
    let grandchild = i32::from_ne_bytes(pid);
    if let Ok(fd) = pidfd_open(Pid::from_raw(grandchild).unwrap(), PidfdFlags::empty()) {
        use rustix::event::{PollFd, PollFlags, poll};
        assert!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).unwrap() > 0, "it ends");
        reap(&fd);
    }
    // SAFETY: our own child, not yet reaped.
    unsafe { libc::waitpid(virtd, ptr::null_mut(), 0) };
    assert_eq!(text(&output), "");
}

/// What a shell says behind a wall that needs no root.
async fn behind_own(wall: Wall, script: &str) -> String {
    let wall = Wall { maker: Maker::Own, ..wall };
    let (args, env) = (shell(script), [("PATH".to_owned(), "/usr/bin:/bin".to_owned())]);
    let output = tempfile::tempfile().unwrap();
    let spawned = spawn(Plan { wall: Some(&wall), ..plan(&args, &env, &output) }, |_| Ok(())).unwrap();
    end(spawned).await;
    text(&output).trim().to_owned()
}

fn no_own_walls() -> bool {
    let obstacle = wall::obstacle();
    if let Some(why) = obstacle {
        eprintln!("SKIPPED: needs user namespaces: {why}");
    }
    obstacle.is_some()
}

#[tokio::test]
async fn a_wall_that_needs_no_root_shows_what_was_given() {
    if no_own_walls() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (given, other) = (dir.path().join("given"), dir.path().join("other"));
    std::fs::write(&given, "given").unwrap();
    std::fs::write(&other, "other").unwrap();
    let files = vec![LentFile::ours(&given, false).unwrap().unwrap()];
    let script = format!(
        "echo $$; id -u; cat {given}; echo; echo more 2>&1 > {given} | grep -o Read-only; cat {other} 2>&1 | grep -o 'No such'
         ls -d /etc/shadow /root /run /tmp /home /proc/sys /dev/kvm 2> /dev/null; ls /proc | grep -c '^[0-9]'
         ls -l /proc/self/fd/0 | grep -o /dev/null; grep NoNewPrivs /proc/self/status; grep CapBnd /proc/self/status",
        given = given.display(),
        other = other.display()
    );
    let said = behind_own(Wall { files, ..Wall::default() }, &script).await;
    let us = nix::unistd::geteuid();
    let wanted =
        format!("1\n{us}\ngiven\nRead-only\nNo such\n/run\n3\n/dev/null\nNoNewPrivs:\t1\nCapBnd:\t0000000000000000");
    assert_eq!(said, wanted);
    assert_eq!(std::fs::read_to_string(&given).unwrap(), "given");
}

#[tokio::test]
async fn a_terminal_made_behind_a_wall_that_needs_no_root_is_the_hosts() {
    if no_own_walls() {
        return;
    }
    let said = behind_own(Wall::default(), "script -qc 'tty; echo written > $(tty)' /dev/null < /dev/null").await;
    assert!(said.starts_with("/dev/pts/") && said.ends_with("written"), "{said}");
}

#[tokio::test]
async fn a_wall_that_cannot_be_made_is_told_and_leaves_no_process() {
    if no_own_walls() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "judged").unwrap();
    let file = LentFile::ours(&path, false).unwrap().unwrap();
    std::fs::rename(&path, dir.path().join("aside")).unwrap();
    std::fs::write(&path, "another").unwrap();
    let wall = Wall { files: vec![file], maker: Maker::Own, ..Wall::default() };
    let (args, output) = (shell("echo ran"), tempfile::tempfile().unwrap());
    let mut pid = 0;
    let recorded = |identity: &Identity| {
        pid = identity.pid;
        Ok(())
    };
    let error = spawn(Plan { wall: Some(&wall), ..plan(&args, &[], &output) }, recorded).err().unwrap().to_string();
    let why =
        format!("/bin/sh cannot be walled in: {}: it was replaced while it was looked at; try again", path.display());
    assert_eq!(error, why);
    assert_eq!(text(&output), "");
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[tokio::test]
async fn a_process_behind_a_wall_that_needs_no_root_is_shown_more() {
    if no_own_walls() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (first, second, go) = (dir.path().join("first"), dir.path().join("deep/second"), dir.path().join("go"));
    std::fs::create_dir(dir.path().join("deep")).unwrap();
    std::fs::write(&first, "old").unwrap();
    std::fs::write(&second, "second").unwrap();
    nix::unistd::mkfifo(&go, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let files = [&first, &go].map(|path| LentFile::ours(path, false).unwrap().unwrap()).to_vec();
    let wall = Wall { files, maker: Maker::Own, ..Wall::default() };
    let (first_name, second_name, go_name) = (first.display(), second.display(), go.display());
    let args = shell(&format!("cat {go_name}; cat {first_name}; cat {second_name}; echo -n more >> {first_name}"));
    let env = [("PATH".to_owned(), "/usr/bin:/bin".to_owned())];
    let output = tempfile::tempfile().unwrap();
    let spawned = spawn(Plan { wall: Some(&wall), ..plan(&args, &env, &output) }, |_| Ok(())).unwrap();
    std::fs::remove_file(&first).unwrap();
    std::fs::write(&first, "new").unwrap();
    let shown = |path: &Path, write| LentFile::ours(path, write).unwrap().unwrap();
    wall::show(spawned.identity.pid, &[shown(&first, true), shown(&second, false)]).unwrap();
    wall::show(spawned.identity.pid, &[shown(&first, true)]).unwrap();
    std::fs::write(&go, "gone on, ").unwrap();
    end(spawned).await;
    assert_eq!(text(&output), "gone on, newsecond");
    assert_eq!(std::fs::read_to_string(&first).unwrap(), "newmore");
}
