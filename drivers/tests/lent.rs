//! System mode: QEMU runs as a user of its own, and has what the definition names for as long as the guest runs.

mod fixture;

use fixture::{House, POWER_OFF, exists};
use serde_json::json;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use virt_model::driver::*;

fn status_line(pid: i32, key: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_once(':').unwrap().1.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether the user of that number can read that file.
fn open_to(uid: u32, path: &Path) -> bool {
    let id = uid.to_string();
    let mut command = std::process::Command::new("setpriv");
    command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--", "test", "-r"]).arg(path);
    command.status().unwrap().success()
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_runs_fenced_in_as_its_user_with_the_disk_lent_to_it() {
    let Some(house) = House::system() else { return };
    let mut guest = house.tick(POWER_OFF).await;
    guest.serial.says("B00000001").await;
    let uid = house.uid_of(guest.live.uuid);
    assert_eq!(status_line(guest.pid(), "Uid"), format!("{uid} {uid} {uid} {uid}"));
    assert_eq!(status_line(guest.pid(), "Gid"), format!("{uid} {uid} {uid} {uid}"));
    assert_eq!(status_line(guest.pid(), "CapBnd"), "0000000000000000");
    assert_eq!(status_line(guest.pid(), "NoNewPrivs"), "1");
    assert_eq!(status_line(guest.pid(), "CapEff"), "0000000000000000");
    assert_eq!(status_line(guest.pid(), "Seccomp"), "2");
    let disk = house.path(&format!("{}.qcow2", guest.live.uuid));
    assert!(open_to(uid, &disk));
    assert_eq!(std::fs::metadata(&disk).unwrap().uid(), 0, "its owner keeps it");
    let monitor = std::fs::metadata(guest.seen.runtime_dir.join("monitor.sock")).unwrap();
    assert_eq!((monitor.uid(), monitor.mode() & 0o777), (0, 0o600), "our monitor is not QEMU's");
    guest.destroy().await;
    assert!(!open_to(uid, &disk));
    assert_eq!(std::fs::metadata(&disk).unwrap().mode() & 0o777, 0o600);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_lent_survives_virtd_and_is_given_back_by_the_next() {
    let Some(mut house) = House::system() else { return };
    let guest = house.tick(POWER_OFF).await;
    let disk = house.path(&format!("{}.qcow2", guest.live.uuid));
    let uid = house.uid_of(guest.live.uuid);
    let (guest, _) = house.find(guest, Condition::Running).await.unwrap();
    assert!(open_to(uid, &disk));
    guest.signal(libc::SIGKILL);
    assert!(house.find(guest, Condition::Running).await.is_none());
    assert!(!open_to(uid, &disk));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_cut_off_after_lending_gives_back() {
    let Some(mut house) = House::system() else { return };
    let guest = house.tick(POWER_OFF).await;
    let (pid, mut record) = (guest.pid(), guest.seen.record());
    let disk = house.path(&format!("{}.qcow2", guest.live.uuid));
    record["phase"] = json!("spawned");
    guest.seen.recorder().record(record).unwrap();
    let uid = house.uid_of(guest.live.uuid);
    assert!(house.find(guest, Condition::Running).await.is_none());
    assert!(!exists(pid) && !open_to(uid, &disk));
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_and_cancelled_starts_give_back() {
    let Some(house) = House::system() else { return };
    let nonsense = "<qemu:commandline><qemu:arg value='-nonsense'/></qemu:commandline>";
    for more in [nonsense, ""] {
        let def = house.def(POWER_OFF, more).await;
        let disk = house.path(&format!("{}.qcow2", def.uuid));
        let machine = def.uuid;
        let (launch, seen) = house.launch(def);
        if more.is_empty() {
            seen.recorder.cancel_at("spawned", &launch.cancel);
        }
        assert!(house.driver.start(launch).await.is_err());
        assert!(!seen.pid().is_some_and(exists) && !open_to(house.uid_of(machine), &disk));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_closed_to_the_guests_user_is_not_on_its_way() {
    let Some(house) = House::system() else { return };
    let def = house.def(POWER_OFF, "").await;
    let (image, home) = (house.path(&format!("{}.qcow2", def.uuid)), house.path("home"));
    std::fs::create_dir(&home).unwrap();
    std::fs::set_permissions(&home, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::rename(&image, home.join("disk.qcow2")).unwrap();
    let mut def = def;
    let moved = home.join("disk.qcow2").to_string_lossy().into_owned();
    def.devices.disks[0].source.as_mut().unwrap().file = Some(moved);
    let mut guest = house.start(def).await;
    guest.serial.says("B00000001").await;
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_take_the_guests_words_are_made() {
    let Some(house) = House::system() else { return };
    let mut def = house.def(POWER_OFF, "").await;
    let log = house.path("serial.log");
    let xml = def.write(virt_model::domain::Form::STORED);
    let with_log = format!("<serial type='pty'><log file='{}'/>", log.display());
    assert!(xml.contains("<serial type='pty'>"), "{xml}");
    def = house.complete(&xml.replacen("<serial type='pty'>", &with_log, 1)).await;
    let mut guest = house.start(def).await;
    guest.serial.says("C00000002").await;
    assert_eq!(std::fs::metadata(&log).unwrap().uid(), house.uid_of(guest.live.uuid));
    assert!(std::fs::read_to_string(&log).unwrap().contains("C00000001"));
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_user_is_refused_with_the_remedy() {
    let Some(house) = House::system() else { return };
    let house = house.with_user("no-such-user-here");
    let (launch, seen) = house.launch(house.def(POWER_OFF, "").await);
    let message = house.driver.start(launch).await.err().unwrap().to_string();
    assert!(message.contains("systemd-sysusers") && message.contains("virtd.toml"), "{message}");
    assert_eq!(seen.record(), json!(null), "nothing was begun");
}

#[tokio::test(flavor = "multi_thread")]
async fn firmware_variables_are_made_for_qemus_user() {
    let Some(house) = House::system() else { return };
    let (code, template) = (Path::new("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path::new("/usr/share/OVMF/OVMF_VARS_4M.fd"));
    if !code.exists() || !template.exists() {
        return eprintln!("SKIPPED: OVMF is not installed");
    }
    let vars = house.path("nvram").join("tick_VARS.fd");
    let mut def = house.def(POWER_OFF, "").await;
    let os = format!(
        "<loader readonly='yes' type='pflash'>{}</loader><nvram template='{}'>{}</nvram></os>",
        code.display(),
        template.display(),
        vars.display()
    );
    let xml = def.write(virt_model::domain::Form::STORED);
    def = house.complete(&xml.replacen("</os>", &os, 1)).await;
    for reset_nvram in [false, true] {
        let (launch, _seen) = house.launch(def.clone());
        let start = house.driver.start(Launch { paused: true, reset_nvram, ..launch });
        let Running { instance, .. } = start.await.unwrap();
        let meta = std::fs::metadata(&vars).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o777), (house.uid_of(def.uuid), 0o600));
        instance.destroy(false).await.unwrap();
        assert_eq!(std::fs::read(&vars).unwrap(), std::fs::read(template).unwrap(), "made anew: {reset_nvram}");
        std::fs::write(&vars, std::fs::read(template).unwrap().iter().map(|b| !b).collect::<Vec<u8>>()).unwrap();
        // As an earlier virtd would have left it.
        let common = nix::unistd::User::from_name(fixture::USER).unwrap().unwrap().uid.as_raw();
        std::os::unix::fs::chown(&vars, Some(common), None).unwrap();
        std::fs::remove_dir_all(house.path(&def.uuid.to_string())).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_keeps_its_user_until_nothing_of_it_is_left() {
    let Some(mut house) = House::system() else { return };
    let mut users = Vec::new();
    let (first, second) = (house.def(POWER_OFF, "").await, house.def(POWER_OFF, "").await);
    for def in [&first, &second, &first] {
        let guest = house.start(def.clone()).await;
        users.push(house.uid_of(def.uuid));
        assert_eq!(std::fs::metadata(format!("/proc/{}", guest.pid())).unwrap().uid(), house.uid_of(def.uuid));
        let room = std::fs::metadata(guest.seen.runtime_dir.join("qemu")).unwrap();
        assert_ne!(room.dev(), std::fs::metadata(&guest.seen.runtime_dir).unwrap().dev(), "a file system of its own");
        guest.destroy().await;
        assert!(!guest_folder(&house, def).join("qemu").exists());
        std::fs::remove_dir(guest_folder(&house, def)).unwrap();
        house.next_driver();
    }
    assert_eq!(users[0], users[2]);
    assert_ne!(users[0], users[1]);
    house.driver.remove_belongings(&first, DomainEnd::Undefined).await.unwrap();
    let books = std::fs::read_to_string(house.path("state/uids.json")).unwrap();
    assert!(!books.contains(&first.uuid.to_string()) && books.contains(&second.uuid.to_string()), "{books}");
}

fn guest_folder(house: &House, def: &virt_model::domain::DomainDef) -> std::path::PathBuf {
    house.path(&def.uuid.to_string())
}
