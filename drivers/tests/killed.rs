//! virtd killed at the worst moments of a start: never a QEMU or companion that the next one does not know, nor a file
//! left open to it.
//!
//! The part of virtd is played by this program itself, run again; it kills itself when a certain record is (about to be)
//! written.

mod fixture;

use fixture::{House, POWER_OFF};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use virt_drivers::DriverConfig;
use virt_drivers::qemu::QemuDriver;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::*;

/// A status file that is deadly to write.
struct Deadly {
    file: PathBuf,
    moment: String,
    before: bool,
}

/// What a record tells of: its phase, or the companion that is about to run.
fn moment(record: &Value) -> &str {
    let phase = record["phase"].as_str().unwrap();
    let newest = record["companions"].as_array().and_then(|all| all.last()?["name"].as_str());
    newest.filter(|_| phase == "starting").unwrap_or(phase)
}

impl Recorder for Deadly {
    fn record(&self, record: Value) -> std::io::Result<()> {
        let now = moment(&record) == self.moment;
        if now && self.before {
            die();
        }
        std::fs::write(&self.file, record.to_string())?;
        if now {
            die();
        }
        Ok(())
    }
}

fn die() -> ! {
    // SAFETY: ends this process; nothing after it is run.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    unreachable!("killed")
}

/// The part of virtd.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by no_moment_is_too_bad"]
async fn virtd() {
    let dir = PathBuf::from(std::env::var_os("ROLE_DIR").unwrap());
    let mut def = DomainDef::parse(&std::fs::read_to_string(dir.join("def.xml")).unwrap()).unwrap();
    let driver = QemuDriver::new(&DriverConfig::below(&dir, true));
    driver.complete(&mut def).await.unwrap();
    let moment = std::env::var("ROLE_MOMENT").unwrap();
    let (when, moment) = moment.split_once(' ').unwrap();
    let recorder = Deadly { file: dir.join("record"), moment: moment.into(), before: when == "before" };
    let (events, _reports) = reports();
    let launch = Launch {
        accepted: Default::default(),
        def: std::sync::Arc::new(def),
        paused: false,
        reset_nvram: false,
        from: None,
        runtime_dir: dir.join("runtime"),
        log_file: dir.join("log"),
        recorder: Arc::new(recorder),
        events,
        cancel: CancellationToken::new(),
    };
    panic!("outlived its own death: {:?}", driver.start(launch).await.err());
}

/// QEMUs and companions that know this uuid.
fn processes(uuid: &str) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let line = |path: PathBuf| Some(String::from_utf8_lossy(&std::fs::read(path.join("cmdline")).ok()?).into_owned());
    let knows = |line: &String| line.contains(uuid) && (line.contains("qemu-system") || line.contains("swtpm"));
    processes.filter_map(line).filter(knows).collect()
}

/// The moments of a guest's start; with a TPM there are more.
fn moments() -> Vec<(&'static str, &'static str)> {
    let tpm = ["swtpm", "swtpm_setup"].iter().all(|name| Path::new("/usr/bin").join(name).exists());
    let beside = ["swtpm_setup", "swtpm"].into_iter().filter(|_| tpm);
    let device = if tpm { "<tpm model='tpm-crb'><backend type='emulator'/></tpm>" } else { "" };
    ["starting"].into_iter().chain(beside).chain(["spawned", "running"]).map(|moment| (moment, device)).collect()
}

/// Whether anybody has an entry in its access control list.
fn lent(path: &Path) -> bool {
    rustix::fs::getxattr(path, "system.posix_acl_access", &mut [0u8; 0][..]).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_moment_is_too_bad() {
    for (phase, device) in moments() {
        for when in ["before", "after"] {
            let Some(mut house) = House::system() else { return };
            let moment = format!("{when} {phase}");
            let form = Form::STORED;
            let xml = house.def(POWER_OFF, "").await.write(form);
            let def = house.complete(&xml.replacen("</devices>", &format!("{device}</devices>"), 1)).await;
            let (uuid, disk) = (def.uuid.to_string(), house.path(&format!("{}.qcow2", def.uuid)));
            std::fs::write(house.path("def.xml"), def.write(form)).unwrap();
            std::fs::create_dir(house.path("runtime")).unwrap();
            let virtd = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "virtd", "--ignored", "--nocapture"])
                .envs([("ROLE_DIR", house.path("").as_os_str()), ("ROLE_MOMENT", moment.as_ref())])
                .output()
                .unwrap();
            assert!(!virtd.status.success() && virtd.status.code().is_none(), "{moment}: {virtd:?}");

            let Ok(record) = std::fs::read(house.path("record")) else {
                assert!(processes(&uuid).is_empty() && !lent(&disk), "{moment}");
                continue;
            };
            house.next_driver();
            let (launch, seen) = house.launch(def.clone());
            drop(launch);
            let seen = fixture::Seen { runtime_dir: house.path("runtime"), ..seen };
            let (found, mut seen) =
                house.reconnect(&def, serde_json::from_slice(&record).unwrap(), seen, Condition::Running);
            match (house.driver.reconnect(found).await.unwrap(), moment.as_str()) {
                (Some(found), "after running") => {
                    assert_eq!(found.condition, Condition::Running);
                    found.instance.destroy(false).await.unwrap();
                    assert_eq!(seen.report().await, DriverEvent::Exited(Exit::Requested));
                }
                (found, _) => assert!(found.is_none(), "{moment}"),
            }
            assert_eq!(processes(&uuid), [""; 0], "{moment}: neither QEMU nor companion is left");
            assert!(!lent(&disk), "{moment}: the disk is given back");
            assert!(std::fs::read_dir(house.path("runtime")).unwrap().next().is_none(), "{moment}: no runtime file");
        }
    }
}
