//! Guests that boot from disks that are more than a file: encrypted, limited, on a server.

mod fixture;

use fixture::{House, POWER_OFF};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use virt_model::domain::DomainDef;
use virt_model::driver::secrets::SecretKeeper as _;
use virt_model::driver::*;
use virt_model::secret::UsageKind;

const SECRET: &str = "0c5a7c58-7df2-4a2e-9b0b-5a6c3f0e9d11";
const PASSPHRASE: &str = "open sesame";

/// A definition of a guest that boots from this disk.
async fn booting_from(house: &House, disk: &str) -> DomainDef {
    house
        .complete(&format!(
            "<domain type='qemu'><name>disks</name><uuid>{}</uuid><memory unit='MiB'>16</memory>\
             <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>\
             <devices>{disk}<serial type='pty'/></devices></domain>",
            uuid::Uuid::new_v4()
        ))
        .await
}

fn run(program: &str, args: &[&str]) {
    let done = Command::new(program).args(args).output().unwrap();
    assert!(done.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// What the service does when the secret is defined, and given its value.
async fn keep_secret(house: &House) {
    std::fs::create_dir_all(house.path("state/secrets")).unwrap();
    let value = PASSPHRASE.as_bytes().to_vec().into();
    house.secrets().keep(uuid::Uuid::try_parse(SECRET).unwrap(), value, false, 1).await.unwrap();
}

/// Whether a file in the folder holds these bytes.
fn holds(folder: &Path, bytes: &[u8]) -> bool {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter_map(|file| std::fs::read(file).ok()).any(|text| text.windows(bytes.len()).any(|part| part == bytes))
}

/// Asks over the monitor for people.
fn ask(socket: &Path, command: &str, arguments: &Value) -> Value {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    for (verb, arguments) in [("qmp_capabilities", &json!({})), (command, arguments)] {
        writeln!(stream, "{}", json!({"execute": verb, "arguments": arguments})).unwrap();
        loop {
            line.clear();
            lines.read_line(&mut line).unwrap();
            let answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer.get("error").is_none(), "{answer}");
            if let Some(value) = answer.get("return") {
                if verb == command {
                    return value.clone();
                }
                break;
            }
        }
    }
    unreachable!("the loop returns")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_disk_with_limits_boots_and_no_secret_is_seen() {
    let Some(house) = House::system() else { return };
    let (plain, locked) = (house.image("plain.qcow2", POWER_OFF), house.path("locked.luks"));
    let object = format!("secret,id=key,data={PASSPHRASE}");
    let [from, to] = [&plain, &locked].map(|path| path.to_str().unwrap());
    // A slow hash: qemu-img counts its CPU time in ticks of the kernel, and gives up where a fast one takes none.
    let quick = "key-secret=key,iter-time=10,hash-alg=sha512";
    run("qemu-img", &["convert", "--object", &object, "-O", "luks", "-o", quick, from, to]);
    std::fs::set_permissions(&locked, std::fs::Permissions::from_mode(0o600)).unwrap();
    let disk = format!(
        "<disk type='file'><driver type='raw'/><source file='{to}'><encryption format='luks'>\
         <secret type='passphrase' uuid='{SECRET}'/></encryption></source><target dev='vda'/>\
         <iotune><total_bytes_sec>104857600</total_bytes_sec><read_iops_sec>1000</read_iops_sec></iotune></disk>"
    );
    let def = booting_from(&house, &disk).await;

    let (launch, seen) = house.launch(def.clone());
    let runtime = launch.runtime_dir.clone();
    let error = house.driver.start(launch).await.err().unwrap().to_string();
    assert!(error.contains(SECRET) && error.contains("there is no secret"), "{error}");
    assert!(std::fs::read_dir(&seen.runtime_dir).unwrap().next().is_none());
    std::fs::remove_dir(&runtime).unwrap();
    house.secrets().is_defined(uuid::Uuid::try_parse(SECRET).unwrap(), UsageKind::Volume, "");
    let missing = house.driver.can_start(&def).await.err().unwrap();
    assert!(matches!(missing, DriverError::SecretMissing(_)), "{missing}");
    let found = house.driver.unmet(&def).await.unwrap();
    assert!(found.iter().any(|finding| finding.message.contains("disk 'vda'")), "{found:?}");

    keep_secret(&house).await;
    let mut guest = house.start(def).await;
    guest.serial.says("C00000002").await;
    let throttle = json!({"path": "/objects/throttle-vda", "property": "limits"});
    let socket = guest.seen.runtime_dir.join("qemu/monitor2.sock");
    let limits = ask(&socket, "qom-get", &throttle);
    assert_eq!((&limits["bps-total"], &limits["iops-read"]), (&json!(104_857_600), &json!(1000)), "{limits}");
    let line = std::fs::read_to_string(format!("/proc/{}/cmdline", guest.pid())).unwrap();
    let record = guest.seen.record().to_string();
    let log = std::fs::read_to_string(house.path(&format!("{}.log", guest.live.uuid))).unwrap();
    let environment = std::fs::read(format!("/proc/{}/environ", guest.pid())).unwrap();
    for place in [line, record, log, String::from_utf8_lossy(&environment).into_owned()] {
        assert!(!place.contains(PASSPHRASE), "{place}");
    }
    assert!(!holds(&house.path("state/secrets"), PASSPHRASE.as_bytes()), "at rest it is sealed, or in base64");
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_on_a_server_boots_and_takes_what_is_written() {
    let Some(house) = House::system() else { return };
    let (image, socket) = (house.image("served.qcow2", POWER_OFF), house.path("nbd.sock"));
    let [image, path] = [&image, &socket].map(|path| path.to_str().unwrap().to_owned());
    // It tells when it listens by closing what it was started with.
    run(
        "qemu-nbd",
        &[
            "--fork",
            "--persistent",
            "-f",
            "qcow2",
            "-x",
            "tick",
            "-k",
            &path,
            "--pid-file",
            &format!("{path}.pid"),
            &image,
        ],
    );
    let pid: i32 = std::fs::read_to_string(format!("{path}.pid")).unwrap().trim().parse().unwrap();
    let _server = Killed(pid);
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666)).unwrap();
    let disk = format!(
        "<disk type='network'><driver type='raw'/><source protocol='nbd' name='tick'>\
         <host transport='unix' socket='{path}'/></source><target dev='vda'/></disk>"
    );
    let mut guest = house.start(booting_from(&house, &disk).await).await;
    guest.serial.says("B00000001").await;
    guest.serial.says("C00000003").await;
    guest.destroy().await;
    let mut guest = house.start(booting_from(&house, &disk).await).await;
    guest.serial.says("B00000002").await;
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transient_disk_forgets() {
    let Some(house) = House::system() else { return };
    let image = house.image("fresh.qcow2", POWER_OFF);
    let before = std::fs::read(&image).unwrap();
    let disk = format!(
        "<disk type='file'><driver type='qcow2'/><source file='{}'/><target dev='vda'/><transient/></disk>",
        image.display()
    );
    for _ in 0..2 {
        let mut guest = house.start(booting_from(&house, &disk).await).await;
        guest.serial.says("B00000001").await;
        guest.serial.says("C00000003").await;
        let left = std::fs::read_dir(house.path("state")).unwrap().flatten();
        let left: Vec<_> =
            left.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().contains("scratch")).collect();
        assert!(left.is_empty(), "{left:?}");
        guest.destroy().await;
        assert!(std::fs::read(&image).unwrap() == before, "nothing of it was written");
    }
}

/// A process that goes with the test.
struct Killed(i32);

impl Drop for Killed {
    fn drop(&mut self) {
        // SAFETY: sends a signal.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}
