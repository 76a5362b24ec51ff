//! What changes on a guest that runs without anything being plugged: QEMU and the kernel say the same as the configuration.

use crate::common::Daemon;
use crate::common::client::{Client, Domain, Refusal, options};
use crate::common::guest::Tick;
use crate::common::snapshots::with;
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

struct Machine {
    daemon: Daemon,
    tick: Tick,
    domain: Domain,
}

impl Machine {
    async fn started(daemon: Daemon, tick: Tick) -> Machine {
        let client = Client { connection: daemon.connect().await };
        let domain = client.define(&tick.xml).await.expect("defined");
        domain.run("Start").await.expect("started");
        tick.counts_to(2).await;
        Machine { daemon, tick, domain }
    }

    /// What QEMU answers at its spare monitor.
    fn asks_qemu(&self, command: &str, arguments: Value) -> Value {
        let guests = std::fs::read_dir(self.daemon.root().join("run/virt/guests")).expect("its folder");
        let folder = guests.flatten().map(|guest| guest.path().join("qemu")).next().expect("a guest");
        // It lies in a file system that QEMU alone sees, on a path too long for a socket.
        let pid = self.daemon.qemu_of(&self.tick.name).expect("it runs");
        let folder = format!("/proc/{pid}/root{}", folder.display());
        let folder = std::fs::File::open(folder).expect("its own folder");
        let socket = format!("/proc/self/fd/{}/monitor2.sock", folder.as_raw_fd());
        let mut line = UnixStream::connect(socket).expect("its monitor");
        line.set_read_timeout(Some(crate::common::PATIENCE)).expect("a limit");
        let mut lines = BufReader::new(line.try_clone().expect("a copy")).lines();
        let mut ask = |question: Value| {
            line.write_all(format!("{question}\n").as_bytes()).expect("asked");
            loop {
                let told: Value = serde_json::from_str(&lines.next().expect("a line").expect("read")).expect("JSON");
                assert!(told.get("error").is_none(), "{told}");
                if let Some(answer) = told.get("return") {
                    return answer.clone();
                }
            }
        };
        ask(serde_json::json!({ "execute": "qmp_capabilities" }));
        ask(serde_json::json!({ "execute": command, "arguments": arguments }))
    }

    /// What the kernel says of the guest's group, in a file of either version's name; nothing where there are no groups.
    fn group_says(&self, files: [&str; 2]) -> Option<String> {
        let uuid = self.domain.path.rsplit_once('_').map(|_| self.domain.path.clone()).expect("a path");
        let uuid = uuid.rsplit_once("/_").expect("a domain").1.replace('_', "-");
        let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
        while let Some(folder) = folders.pop() {
            let inner = std::fs::read_dir(&folder).into_iter().flatten().flatten();
            for path in inner.map(|entry| entry.path()).filter(|path| path.is_dir() && !path.is_symlink()) {
                let said = || files.iter().find_map(|file| std::fs::read_to_string(path.join(file)).ok());
                match path.ends_with(format!("virt-{uuid}")) {
                    true if said().is_some() => return said().map(|text| text.trim().to_owned()),
                    true => {}
                    false => folders.push(path),
                }
            }
        }
        None
    }
}

/// Whether virtd can make control groups here.
fn has_groups() -> bool {
    let places = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup"].map(|place| Path::new(place).join("virt-adjusted-probe"));
    let place = if Path::new("/sys/fs/cgroup/cpu").exists() { &places[0] } else { &places[1] };
    std::fs::create_dir(place).and_then(|()| std::fs::remove_dir(place)).is_ok()
}

fn refused(answer: Result<impl std::fmt::Debug, Refusal>, error: &str, word: &str) {
    let (name, text) = answer.expect_err(error);
    assert!(name == format!("org.virt.Error.{error}") && text.contains(word), "{name}: {text}");
}

fn names(told: &Value) -> Vec<&str> {
    told.as_array().into_iter().flatten().filter_map(|one| one["name"].as_str()).collect()
}

#[tokio::test]
async fn qemu_and_the_kernel_say_what_the_configuration_says() {
    let Some(daemon) = Daemon::on_system_bus(crate::common::Setup::default()).await else { return };
    let quota = if has_groups() { "<period>100000</period><quota>50000</quota>" } else { "" };
    let tune = format!("<vcpu current='1'>3</vcpu><cputune>{quota}<vcpupin vcpu='1' cpuset='0'/></cputune>");
    let Some(tick) = Tick::new(&daemon, "adjusts", &tune) else { return };
    let mut machine = Machine::started(daemon, tick).await;
    vcpus_are_plugged(&mut machine).await;
    the_balloon_is_asked(&machine).await;
    machine.tick.goes_on().await;
    machine.domain.run("Destroy").await.expect("destroyed");
}

async fn vcpus_are_plugged(machine: &mut Machine) {
    let live = || with([("live", true)]);
    machine.domain.call("SetVCPUs", &(2_u32, live())).await.expect("one more");
    let cpus = machine.asks_qemu("query-cpus-fast", serde_json::json!({}));
    assert_eq!(cpus.as_array().map(Vec::len), Some(2), "{cpus}");
    assert_eq!(machine.domain.property::<u32>("VCPUs").await, 2);
    assert!(machine.domain.xml().await.contains("<vcpu id='1' enabled='yes' hotpluggable='yes'/>"));
    // The new one runs where it is to, and no more than it may.
    let pid = machine.daemon.qemu_of(&machine.tick.name).expect("it runs");
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads").flatten();
    let name = |path: &Path| std::fs::read_to_string(path.join("comm")).unwrap_or_default();
    let thread = tasks.map(|task| task.path()).find(|path| name(path).starts_with("CPU 1/"));
    let thread = thread.expect("a thread of its own");
    let status = std::fs::read_to_string(thread.join("status")).expect("read");
    assert!(status.lines().any(|line| line.split_whitespace().eq(["Cpus_allowed_list:", "0"])), "{status}");
    if has_groups() {
        let id = thread.file_name().and_then(|id| id.to_str()).expect("a number").to_owned();
        let members = machine.group_says(["vcpu1/tasks", "vcpu1/cgroup.threads"]).expect("a group of its own");
        assert!(members.lines().any(|member| member == id), "{members}");
        let quota = machine.group_says(["vcpu1/cpu.cfs_quota_us", "vcpu1/cpu.max"]).expect("its limit");
        assert!(quota.starts_with("50000"), "{quota}");
    }
    // This guest is firmware and a boot sector: it does not know how to let go of one.
    refused(machine.domain.call("SetVCPUs", &(1_u32, live())).await, "OperationInvalid", "not yet");
    assert_eq!(machine.domain.property::<u32>("VCPUs").await, 2);
    machine.domain.call("SetVCPUs", &(2_u32, live())).await.expect("it is there");

    // What was done and not written down, when virtd was killed, is found.
    machine.daemon.kill_virtd().await;
    let slots = machine.asks_qemu("query-hotpluggable-cpus", serde_json::json!({}));
    let free = slots.as_array().into_iter().flatten().find(|slot| slot["qom-path"].is_null()).expect("a place");
    let mut arguments = free["props"].clone();
    (arguments["driver"], arguments["id"]) = (free["type"].clone(), Value::from("vcpu2"));
    machine.asks_qemu("device_add", arguments);
    let before = std::time::Instant::now();
    machine.daemon.start_virtd().await;
    machine.domain.is_looked_after().await;
    let mut watch = machine.domain.client.watch().await;
    while machine.domain.property::<u32>("VCPUs").await != 3 {
        watch.next().await;
        assert!(before.elapsed() < crate::common::PATIENCE, "the third is not found");
    }
    assert!(machine.domain.xml().await.contains("<vcpu id='2' enabled='yes' hotpluggable='yes'/>"));
    machine.tick.goes_on().await;
}

async fn the_balloon_is_asked(machine: &Machine) {
    machine.domain.call("SetMemory", &(12 * MIB, options([]))).await.expect("asked");
    assert_eq!(machine.domain.property::<u64>("Memory").await, 12 * MIB);
    assert!(machine.domain.xml().await.contains("<currentMemory unit='KiB'>12288</currentMemory>"));
    let devices = machine.asks_qemu("qom-list", serde_json::json!({ "path": "/machine/peripheral" }));
    let balloon = names(&devices).into_iter().find(|name| name.starts_with("balloon")).expect("a balloon").to_owned();
    machine.domain.call("SetMemoryStatsPeriod", &(7_u32, options([]))).await.expect("set");
    let period = serde_json::json!({
        "path": format!("/machine/peripheral/{balloon}"), "property": "guest-stats-polling-interval"
    });
    assert_eq!(machine.asks_qemu("qom-get", period), 7);
    refused(machine.domain.call("SetMemory", &(17 * MIB, options([]))).await, "InvalidArgument", "16777216");
}
