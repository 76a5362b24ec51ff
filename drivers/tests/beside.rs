//! A guest with a companion: swtpm, which plays its TPM.

mod fixture;

use fixture::{Guest, House, POWER_OFF, exists};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::*;

const TPM: &str = "<tpm model='tpm-crb'><backend type='emulator'/></tpm></devices>";

/// A definition of tick with a TPM; `None` where nobody can play one.
async fn with_tpm(house: &House, more: &str) -> Option<DomainDef> {
    if !Path::new("/usr/bin/swtpm").exists() {
        eprintln!("SKIPPED: swtpm is not installed");
        return None;
    }
    let def = house.def(POWER_OFF, more).await;
    let xml = def.write(Form::STORED);
    Some(house.complete(&xml.replacen("</devices>", TPM, 1)).await)
}

/// The processes beside QEMU.
fn beside(seen: &fixture::Seen) -> Vec<i32> {
    let record = seen.record();
    let companions = record["companions"].as_array().cloned().unwrap_or_default();
    companions.iter().map(|companion| companion["process"]["pid"].as_i64().unwrap() as i32).collect()
}

/// That of the guest.
fn swtpm(guest: &Guest) -> i32 {
    let pids = beside(&guest.seen);
    assert_eq!(pids.len(), 1, "those that only make something are no longer recorded");
    let name = std::fs::read_to_string(format!("/proc/{}/comm", pids[0])).unwrap();
    assert_eq!(name.trim(), "swtpm");
    pids[0]
}

/// The pid of a process that can be signalled: it was made here and is not yet reaped.
fn kill(pid: i32) {
    // SAFETY: as said.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_runs_as_qemus_user_and_ends_with_the_guest() {
    let Some(house) = House::system() else { return };
    let Some(def) = with_tpm(&house, "").await else { return };
    let state = house.path("state/tpm").join(def.uuid.to_string());
    let mut made = None;
    for _ in 0..2 {
        let mut guest = house.start(def.clone()).await;
        guest.serial.says("C00000001").await;
        let (pid, uid) = (swtpm(&guest), house.uid_of(guest.live.uuid));
        assert_eq!(std::fs::metadata(format!("/proc/{pid}")).unwrap().uid(), uid);
        let folder = std::fs::metadata(&state).unwrap();
        assert_eq!((folder.uid(), folder.mode() & 0o777), (uid, 0o700));
        let inode = folder.ino();
        assert_eq!(*made.get_or_insert(inode), inode, "the state is kept");
        assert!(state.join("tpm2-00.permall").exists());
        guest.destroy().await;
        assert!(!exists(pid), "neither process nor zombie");
        std::fs::remove_dir(house.path(&def.uuid.to_string())).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_virtd_finds_it() {
    let Some(mut house) = House::session() else { return };
    let Some(def) = with_tpm(&house, "").await else { return };
    let guest = house.start(def).await;
    let pid = swtpm(&guest);
    let (guest, _) = house.find(guest, Condition::Running).await.unwrap();
    assert!(exists(pid));
    guest.destroy().await;
    assert!(!exists(pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn it_goes_with_a_guest_that_is_found_dead() {
    let Some(mut house) = House::session() else { return };
    let Some(def) = with_tpm(&house, "").await else { return };
    let guest = house.start(def).await;
    let pid = swtpm(&guest);
    guest.signal(libc::SIGKILL);
    assert!(house.find(guest, Condition::Running).await.is_none());
    assert!(!exists(pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_outlives_its_tpm() {
    let Some(mut house) = House::session() else { return };
    let Some(def) = with_tpm(&house, "").await else { return };
    let mut guest = house.start(def).await;
    guest.serial.says("C00000001").await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", swtpm(&guest))).unwrap();
    let files = limits.lines().find_map(|line| line.strip_prefix("Max file size")).unwrap();
    assert!(files.trim_start().starts_with("67108864 "), "{files}");
    kill(swtpm(&guest));
    guest.serial.says("C00000003").await;
    let (mut guest, condition) = house.find(guest, Condition::Running).await.unwrap();
    assert_eq!(condition, Condition::Running);
    guest.serial.says("C00000005").await;
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_goes_with_a_start_that_fails_or_is_cancelled() {
    let Some(house) = House::system() else { return };
    let nonsense = "<qemu:commandline><qemu:arg value='-nonsense'/></qemu:commandline>";
    for (more, moment) in [(nonsense, "never"), ("", "starting"), ("", "spawned")] {
        let Some(def) = with_tpm(&house, more).await else { return };
        let (launch, seen) = house.launch(def);
        seen.recorder.cancel_at(moment, &launch.cancel);
        let error = house.driver.start(launch).await.err().unwrap();
        assert_eq!(more.is_empty(), matches!(error, DriverError::Cancelled), "{error}");
        assert!(more.is_empty() || error.to_string().contains("nonsense"), "QEMU's own words: {error}");
        assert!(beside(&seen).into_iter().all(|pid| !exists(pid)), "{moment}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn its_own_words_tell_why_it_does_not_start() {
    let Some(house) = House::system() else { return };
    let Some(def) = with_tpm(&house, "").await else { return };
    let state = house.path("state/tpm").join(def.uuid.to_string());
    // A folder that is not QEMU's user's.
    std::fs::create_dir_all(&state).unwrap();
    std::fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let (launch, seen) = house.launch(def);
    let error = house.driver.start(launch).await.err().unwrap().to_string();
    assert!(error.contains("swtpm") && error.contains("ermission denied"), "{error}");
    assert!(std::fs::read_dir(&seen.runtime_dir).unwrap().next().is_none(), "no runtime file");
}

/// Both shut themselves in, behind the wall that is around them.
#[tokio::test(flavor = "multi_thread")]
async fn folders_and_a_network_come_through_the_wall() {
    let Some(house) = House::system() else { return };
    for program in ["/usr/lib/qemu/virtiofsd", "/usr/bin/passt"] {
        if !Path::new(program).exists() {
            return eprintln!("SKIPPED: {program} is not installed");
        }
    }
    let shared = house.path("shared");
    std::fs::create_dir(&shared).unwrap();
    let devices = format!(
        "<filesystem><driver type='virtiofs'/><source dir='{0}'/><target dir='one'/></filesystem>
         <filesystem accessmode='mapped'><source dir='{0}'/><target dir='other'/></filesystem>
         <interface type='user'><backend type='passt'/><model type='virtio'/></interface></devices>",
        shared.display()
    );
    let memory = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";
    let xml = house.def(POWER_OFF, memory).await.write(Form::STORED);
    let mut guest = house.start(house.complete(&xml.replacen("</devices>", &devices, 1)).await).await;
    guest.serial.says("C00000001").await;
    let beside = beside(&guest.seen);
    assert_eq!(beside.len(), 2);
    let qemus = std::fs::read_link(format!("/proc/{}/ns/net", guest.pid())).unwrap();
    assert_ne!(qemus, std::fs::read_link("/proc/self/ns/net").unwrap(), "passt is its network");
    for pid in &beside {
        assert!(exists(*pid));
        let mounts = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
        assert_ne!(mounts(&pid.to_string()), mounts("self"));
    }
    guest.destroy().await;
    assert!(beside.iter().all(|pid| !exists(*pid)));
}
