//! A person at a machine: pictures of its screen, connections to its displays, keys.

use crate::common::client::{Client, Domain, Refusal, options};
use crate::common::guest::Tick;
use crate::common::users::{ADMIN, BOB, OPERATOR};
use crate::common::{Daemon, PATIENCE, Setup};
use rustix::fs::{SealFlags, fcntl_get_seals};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use zbus::{OwnedVariant, Variant};

/// How long what needs no guest may take on a machine that is busy with other things.
const SOON: Duration = Duration::from_secs(10);

const DISPLAYS: &str = "<graphics type='vnc' passwd='secret'><listen type='none'/></graphics>\
                        <graphics type='dbus' p2p='yes'/><graphics type='spice'><listen type='none'/></graphics>\
                        <video><model type='vga'/></video><video><model type='virtio' heads='2'/></video>\
                        <channel type='unix'><target type='virtio' name='org.test.0'/></channel>\
                        <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
                        <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>";

/// A machine with these devices that runs and prints what its keyboard sends.
async fn with_devices(daemon: &Daemon, name: &str, devices: &str) -> Option<(Domain, Tick)> {
    let guest = Tick::keys(daemon, name, devices)?;
    let client = Client { connection: daemon.connect_as(&ADMIN).await };
    let domain = client.define(&guest.xml).await.expect("defined");
    for (member, answer) in each(&domain).await {
        refused(answer, "OperationInvalid", "start it first");
        assert_eq!(can(&domain, member).await, "na");
    }
    domain.run("Start").await.expect("started");
    guest.prints(|printed| printed.starts_with("ready\n")).await;
    Some((domain, guest))
}

/// What each member says when it is called as anybody would.
async fn each(domain: &Domain) -> [(&'static str, Result<(), Refusal>); 3] {
    tokio::join!(
        async { ("Screenshot", screenshot(domain, &[]).await.map(drop)) },
        async { ("OpenGraphics", open(domain, 0, false).await.map(drop)) },
        async { ("SendKey", press(domain, "linux", &[30]).await) },
    )
    .into()
}

async fn can(domain: &Domain, member: &str) -> String {
    domain.call("Can", &member).await.expect("told").body().deserialize().expect("s")
}

/// The picture of a screen as a file.
async fn screenshot(domain: &Domain, wanted: &[(&str, Variant<'_>)]) -> Result<File, Refusal> {
    let wanted = options(wanted.iter().map(|(key, value)| (*key, value.try_clone().expect("no descriptor"))));
    let reply = domain.call("Screenshot", &(wanted,)).await?;
    let (file, mime): (zbus::wire::OwnedFd, String) = reply.body().deserialize().expect("hs");
    assert_eq!(mime, "image/png");
    Ok(File::from(OwnedFd::from(file)))
}

async fn open(domain: &Domain, index: u32, skip_auth: bool) -> Result<UnixStream, Refusal> {
    let wanted = options(skip_auth.then_some(("skip-auth", Variant::from(true))));
    let reply = domain.call("OpenGraphics", &(index, wanted)).await?;
    let socket = UnixStream::from(OwnedFd::from(reply.body().deserialize::<zbus::wire::OwnedFd>().expect("h")));
    socket.set_read_timeout(Some(PATIENCE)).expect("set");
    Ok(socket)
}

async fn press(domain: &Domain, codeset: &str, keys: &[u32]) -> Result<(), Refusal> {
    domain.call("SendKey", &(codeset, 0u64, keys)).await.map(drop)
}

fn refused<T>(answer: Result<T, Refusal>, error: &str, word: &str) {
    let Err((name, text)) = answer else { panic!("it is not refused for {word}") };
    assert!(name.ends_with(error) && text.contains(word), "{name}: {text}");
}

/// Width and height of the picture in a file, which is read from where it stands.
fn size_of(picture: &mut File) -> (u32, u32) {
    let mut bytes = Vec::new();
    picture.read_to_end(&mut bytes).expect("read");
    assert!(bytes.starts_with(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "{:?}", &bytes[..bytes.len().min(16)]);
    assert!(bytes.ends_with(b"\0\0\0\0IEND\xaeB`\x82"), "there is no end, or more follows");
    let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    (number(16), number(20))
}

/// The kinds of authentication that a VNC server offers.
fn vnc_offers(mut socket: UnixStream) -> Vec<u8> {
    let mut greeting = [0; 12];
    socket.read_exact(&mut greeting).expect("a greeting");
    assert_eq!(&greeting, b"RFB 003.008\n");
    socket.write_all(&greeting).expect("answered");
    let mut count = [0];
    socket.read_exact(&mut count).expect("a number");
    let mut kinds = vec![0; count[0].into()];
    socket.read_exact(&mut kinds).expect("kinds");
    kinds
}

/// Says hello to a SPICE server as a client of its main channel would.
fn spice_answers(mut socket: UnixStream) {
    let numbers = |numbers: &[u32]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>();
    // Version 2.2, 18 bytes: no session yet, the main channel, no capabilities.
    let hello = [&b"REDQ"[..], &numbers(&[2, 2, 18, 0]), &[1, 0], &numbers(&[0, 0, 18])].concat();
    socket.write_all(&hello).expect("written");
    let mut answer = [0; 20];
    socket.read_exact(&mut answer).expect("a link reply");
    assert_eq!(&answer[..8], b"REDQ\x02\0\0\0", "magic and version");
    assert_eq!(answer[16..], [0; 4], "no error");
}

/// What a machine is called by the D-Bus display.
async fn dbus_name(socket: UnixStream) -> String {
    socket.set_nonblocking(true).expect("set");
    let peer = zbus::connection::Builder::unix_stream(socket).p2p().build();
    let peer = tokio::time::timeout(PATIENCE, peer).await.expect("in time").expect("a peer");
    let (path, get) = ("/org/qemu/Display1/VM", ("org.qemu.Display1.VM", "Name"));
    let asked = peer.call_method(None::<&str>, path, Some("org.freedesktop.DBus.Properties"), "Get", &get);
    let told = tokio::time::timeout(PATIENCE, asked).await.expect("in time").expect("told");
    told.body().deserialize::<OwnedVariant>().expect("v").try_into().expect("s")
}

/// Pictures: of each screen, whether the guest runs or stands, whole and for good.
async fn pictures_are_taken(domain: &Domain) {
    for screen in 0..3u32 {
        let mut picture = screenshot(domain, &[("screen", screen.into())]).await.expect("a picture");
        let (width, height) = size_of(&mut picture);
        assert!(width >= 320 && height >= 200, "{width} x {height}");
        let seals = fcntl_get_seals(&picture).expect("a file in memory");
        assert!(seals.contains(SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL), "{seals:?}");
        picture.write_all_at(b"x", 0).expect_err("nobody changes it");
    }
    domain.bare("Suspend").await.expect("suspended");
    let text_mode = size_of(&mut screenshot(domain, &[]).await.expect("of one that stands"));
    assert_eq!(text_mode, (720, 400), "what the firmware left");
    refused(press(domain, "linux", &[30]).await, "OperationInvalid", "resume it first");
    domain.bare("Resume").await.expect("resumed");
    refused(screenshot(domain, &[("screen", 3u32.into())]).await, "NoSuchDevice", "it has 3");
    refused(screenshot(domain, &[("screen", "one".into())]).await, "InvalidArgument", "screen");
    refused(screenshot(domain, &[("head", 0u32.into())]).await, "InvalidArgument", "head");
}

async fn displays_are_opened(domain: &Domain, name: &str) {
    assert_eq!(vnc_offers(open(domain, 0, false).await.expect("opened")), [2], "a password");
    assert_eq!(vnc_offers(open(domain, 0, true).await.expect("opened")), [1], "nothing");
    assert_eq!(dbus_name(open(domain, 1, false).await.expect("opened")).await, name);
    spice_answers(open(domain, 2, false).await.expect("opened"));
    refused(open(domain, 3, false).await, "NoSuchDevice", "it has 3");
    let unknown = options([("tls", Variant::from(true))]);
    refused(domain.call("OpenGraphics", &(0u32, unknown)).await, "InvalidArgument", "tls");
}

/// A channel has one client at a time, and is free as soon as that has gone.
async fn a_channel_is_opened(domain: &Domain) {
    let open = async |name: &str| {
        let reply = domain.call("OpenChannel", &(name, options([]))).await?;
        let fd = reply.body().deserialize::<zbus::wire::OwnedFd>().expect("h");
        Ok::<_, Refusal>(UnixStream::from(OwnedFd::from(fd)))
    };
    for _ in 0..20 {
        let mut first = open("org.test.0").await.expect("opened");
        refused(
            open("org.test.0").await,
            "Busy",
            "channel 'org.test.0' of domain 'sits' is busy with 'another client'",
        );
        first.set_nonblocking(true).expect("set");
        let nothing =
            first.read(&mut [0]).expect_err("QEMU has its other end, and nobody in the guest has said anything");
        assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
    }
    refused(open("org.test.1").await, "NoSuchDevice", "'org.test.1'");
    refused(open("org.qemu.guest_agent.0").await, "OperationUnsupported", "guest agent");
    refused(open("com.redhat.spice.0").await, "OperationUnsupported", "spicevmc");
}

/// The key A by its code in each codeset, and two keys at once, one of which has a prefix.
async fn keys_are_pressed(domain: &Domain, guest: &Tick) {
    let mut expected = "ready\n".to_owned();
    for (codeset, a) in [
        ("linux", 30),
        ("xt", 0x1e),
        ("qnum", 0x1e),
        ("usb", 4),
        ("atset1", 0x1e),
        ("atset2", 0x1c),
        ("atset3", 0x1c),
        ("win32", 0x41),
        ("os-x", 0),
    ] {
        press(domain, codeset, &[a]).await.expect(codeset);
        expected += "1e\n9e\n";
        guest.prints(|printed| printed == expected).await;
    }
    domain.call("SendKey", &("linux", 1000u64, &[29u32, 106][..])).await.expect("Ctrl and the right arrow");
    expected += "1d\ne0\n4d\ne0\ncd\n9d\n";
    guest.prints(|printed| printed == expected).await;
    refused(press(domain, "linux", &[30, 9999]).await, "InvalidArgument", "9999");
    refused(press(domain, "qwerty", &[30]).await, "InvalidArgument", "'qwerty'");
    refused(press(domain, "linux", &[]).await, "InvalidArgument", "1 to 16 keys");
    refused(domain.call("SendKey", &("linux", u64::MAX, &[30u32][..])).await, "InvalidArgument", "5000000");
    press(domain, "usb", &[4]).await.expect("pressed");
    expected += "1e\n9e\n";
    guest.prints(|printed| printed == expected).await;
}

#[tokio::test]
async fn a_person_looks_at_a_machine_opens_its_displays_and_presses_its_keys() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::with_example_rules()).await else { return };
    let Some((domain, guest)) = with_devices(&daemon, "sits", DISPLAYS).await else { return };
    pictures_are_taken(&domain).await;
    displays_are_opened(&domain, &guest.name).await;
    keys_are_pressed(&domain, &guest).await;
    a_channel_is_opened(&domain).await;
    refused(domain.bare("Wakeup").await, "OperationInvalid", "does not sleep");

    let seen_by =
        async |user| Domain { client: Client { connection: daemon.connect_as(user).await }, ..domain.clone() };
    let theirs = seen_by(&BOB).await;
    for (member, answer) in each(&theirs).await {
        refused(answer, "InteractiveAuthorizationRequired", "org.virt.domain.console");
        assert_eq!(can(&theirs, member).await, "challenge");
    }
    let theirs_open = theirs.call("OpenChannel", &("org.test.0", options([]))).await;
    refused(theirs_open, "InteractiveAuthorizationRequired", "org.virt.domain.console");
    refused(theirs.bare("Wakeup").await, "InteractiveAuthorizationRequired", "org.virt.domain.suspend");
    // Who may sit at the console is asked for the password by the display, as everybody is.
    let operated = seen_by(&OPERATOR).await;
    assert_eq!(vnc_offers(open(&operated, 0, false).await.expect("opened")), [2]);
    refused(open(&operated, 0, true).await, "InteractiveAuthorizationRequired", "org.virt.domain.skip-auth");

    // Nothing of all that is kept.
    let before = daemon.descriptors();
    for _ in 0..8 {
        screenshot(&domain, &[]).await.expect("a picture");
        open(&domain, 0, false).await.expect("opened");
    }
    // What went to QEMU is closed by threads of their own.
    let begun = Instant::now();
    loop {
        let after = daemon.descriptors();
        if after < before + 8 {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{before} descriptors have become {after}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }

    // Another virtd finds the machine as it is.
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    size_of(&mut screenshot(&domain, &[]).await.expect("a picture"));
    assert_eq!(vnc_offers(open(&domain, 0, false).await.expect("opened")), [2]);
    press(&domain, "linux", &[48]).await.expect("pressed");
    guest.prints(|printed| printed.ends_with("30\nb0\n")).await;
    domain.run("Destroy").await.expect("destroyed");
}

fn signal(pid: nix::unistd::Pid, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(pid, signal).expect("signalled");
}

#[tokio::test]
async fn a_machine_without_a_screen_or_with_a_qemu_that_hangs_says_so_and_keeps_nobody_waiting() {
    let Some(daemon) = Daemon::on_system_bus(Setup::with_example_rules()).await else { return };
    let display = "<graphics type='vnc'><listen type='none'/></graphics><video><model type='vga'/></video>";
    let Some((hung, guest)) = with_devices(&daemon, "hung", display).await else { return };
    let blind = "<video><model type='none'/></video>";
    let Some((other, _other_guest)) = with_devices(&daemon, "blind", blind).await else { return };
    refused(screenshot(&other, &[]).await, "NoSuchDevice", "domain 'blind' has no screen 0: it has none");
    refused(open(&other, 0, false).await, "NoSuchDevice", "domain 'blind' has no graphics 0: it has none");

    let qemu = daemon.qemu_of("hung").expect("it runs");
    signal(qemu, nix::sys::signal::Signal::SIGSTOP);
    let begun = Instant::now();
    let (answers, second, ()) = tokio::join!(each(&hung), press(&hung, "linux", &[31]), async {
        for _ in 0..3 {
            tokio::time::timeout(SOON, hung.xml()).await.expect("a read of the same machine does not wait");
            let pressed = tokio::time::timeout(SOON, press(&other, "linux", &[30])).await;
            pressed.expect("another machine does not wait").expect("pressed");
        }
    });
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    for ((_, answer), word) in answers.into_iter().zip(["screen", "display", "send-key"]) {
        refused(answer, "TimedOut", word);
    }
    refused(second, "TimedOut", "send-key");
    signal(qemu, nix::sys::signal::Signal::SIGCONT);
    size_of(&mut screenshot(&hung, &[]).await.expect("a picture"));
    assert_eq!(vnc_offers(open(&hung, 0, false).await.expect("opened")), [1]);
    press(&hung, "linux", &[48]).await.expect("pressed");
    guest.prints(|printed| printed.ends_with("30\nb0\n")).await;

    // Whoever calls while it hangs is answered when it has gone.
    signal(qemu, nix::sys::signal::Signal::SIGSTOP);
    let (answers, destroyed) = tokio::join!(each(&hung), hung.run("Destroy"));
    destroyed.expect("it gets through");
    for (member, answer) in answers {
        assert!(answer.is_err(), "{member} of what has gone");
    }
    assert_eq!(hung.state().await.0, "shutoff");
    other.run("Destroy").await.expect("destroyed");
}
