//! Guests bound to CPUs and held to limits, seen from the host.

mod fixture;

use fixture::{Guest, House, POWER_OFF};
use nix::sched::sched_getaffinity;
use nix::unistd::Pid;
use std::path::{Path, PathBuf};
use virt_model::driver::*;

/// Each thread's name, number, and the CPUs it is bound to.
fn threads(guest: &Guest) -> Vec<(String, i32, Vec<usize>)> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap();
    tasks
        .map(|task| {
            let path = task.unwrap().path();
            let id: i32 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            let name = std::fs::read_to_string(path.join("comm")).unwrap().trim().to_owned();
            let mask = sched_getaffinity(Pid::from_raw(id)).unwrap();
            let cpus = (0..1024).filter(|cpu| mask.is_set(*cpu).unwrap_or(false)).collect();
            (name, id, cpus)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn threads_run_where_the_definition_says() {
    let Some(house) = House::system() else { return };
    let more = "<vcpu cpuset='0'>1</vcpu><iothreads>1</iothreads><cputune><iothreadpin iothread='1' cpuset='1'/>\
                <vcpusched vcpus='0' scheduler='batch'/></cputune>";
    let mut guest = house.start(house.def(POWER_OFF, more).await).await;
    guest.serial.says("C00000001").await;
    let threads = threads(&guest);
    let io: Vec<_> = threads.iter().filter(|(name, ..)| name.contains("IO iothread1")).collect();
    assert_eq!((io.len(), &io[0].2), (1, &vec![1]), "{threads:?}");
    let main = threads.iter().find(|(_, id, _)| *id == guest.pid()).unwrap();
    assert_eq!(main.2, [0], "{threads:?}");
    // SAFETY: asks for a number.
    let policy = |id: i32| unsafe { libc::sched_getscheduler(id) };
    let batch: Vec<_> = threads.iter().filter(|(_, id, _)| policy(*id) == libc::SCHED_BATCH).collect();
    assert_eq!((batch.len(), &batch[0].2), (1, &vec![0]), "the one vCPU: {threads:?}");
    guest.destroy().await;
}

/// Where the groups of one guest are; empty where this host has none that we could make.
fn groups(uuid: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = folders.pop() {
        let inner = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        for path in inner.map(|entry| entry.path()).filter(|path| path.is_dir() && !path.is_symlink()) {
            if path.ends_with(format!("virt-{uuid}")) {
                found.push(path.clone());
            }
            folders.push(path);
        }
    }
    found.sort();
    found
}

fn can_be_made() -> bool {
    let places = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup"].map(|place| Path::new(place).join("virt-probe"));
    let place = if places[0].parent().unwrap().exists() { &places[0] } else { &places[1] };
    std::fs::create_dir(place).and_then(|()| std::fs::remove_dir(place)).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_held_and_go_with_the_guest() {
    let Some(mut house) = House::system() else { return };
    let more = "<cputune><shares>512</shares><global_quota>50000</global_quota><quota>20000</quota></cputune>\
                <memtune><hard_limit unit='GiB'>2</hard_limit></memtune>";
    let def = house.def(POWER_OFF, more).await;
    let uuid = def.uuid.to_string();
    if !can_be_made() {
        let (launch, _seen) = house.launch(def);
        let error = house.driver.start(launch).await.err().unwrap().to_string();
        assert!(error.contains("Delegate=yes"), "where there are no groups a start says so: {error}");
        return;
    }
    let mut guest = house.start(def).await;
    guest.serial.says("C00000001").await;
    let groups_made = groups(&uuid);
    let said = |file: &str| groups_made.iter().find_map(|group| std::fs::read_to_string(group.join(file)).ok());
    let members = said("cgroup.procs").unwrap();
    assert!(members.lines().any(|pid| pid == guest.pid().to_string()), "{members}");
    let limit = said("memory.limit_in_bytes").or_else(|| said("memory.max")).unwrap();
    assert_eq!(limit.trim(), (2_u64 << 30).to_string());
    let quota = said("vcpu0/cpu.cfs_quota_us").or_else(|| said("vcpu0/cpu.max")).unwrap();
    assert!(quota.starts_with("20000"), "{quota}");
    // A virtd that is killed leaves them to the next one.
    let (mut guest, _) = house.find(guest, Condition::Running).await.unwrap();
    guest.serial.says("C0000000").await;
    assert!(!groups(&uuid).is_empty());
    guest.destroy().await;
    assert_eq!(groups(&uuid), [] as [PathBuf; 0]);
}
