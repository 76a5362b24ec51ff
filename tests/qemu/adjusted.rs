//! What changes on a guest that runs without anything being plugged: QEMU and the kernel say the same as the configuration.

use crate::common::client::{Client, Domain, Options, Refusal, options};
use crate::common::guest::Tick;
use crate::common::snapshots::with;
use crate::common::{Daemon, have};
use serde_json::Value;
use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use zbus::{Message, OwnedVariant, Variant};

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

/// A bridge of the host's that goes with the test.
struct Bridge(String);

impl Bridge {
    fn make(letter: &str) -> Bridge {
        let name = format!("va{letter}{}", std::process::id() % 1_000_000);
        let made = std::process::Command::new("ip").args(["link", "add", &name, "type", "bridge"]).status();
        assert!(made.expect("ip").success());
        Bridge(name)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        std::process::Command::new("ip").args(["link", "del", &self.0]).status().ok();
    }
}

fn has_taps() -> bool {
    let there = Path::new("/dev/net/tun").exists();
    if !there {
        crate::common::skip("there is no /dev/net/tun");
    }
    there
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
    let Some(mut tick) = Tick::new(&daemon, "adjusts", &tune) else { return };
    let image = daemon.folder().join("second.img");
    std::fs::File::create(&image).and_then(|file| file.set_len(1 << 20)).expect("made");
    let slow = "<iotune><read_iops_sec>50</read_iops_sec><group_name>slow</group_name></iotune>";
    let disk = format!(
        "<disk type='file'><driver name='qemu' type='raw'/><source file='{}'/><target dev='vdb' bus='virtio'/>{slow}</disk>",
        image.display()
    );
    let bridges = has_taps().then(|| ["a", "b"].map(Bridge::make));
    let card = bridges.as_ref().map(|[one, _]| {
        format!("<interface type='bridge'><source bridge='{}'/><model type='virtio'/></interface>", one.0)
    });
    let screen = "<graphics type='vnc' port='-1' autoport='yes' passwd='first'/>";
    let more = format!("{disk}{}{screen}</devices>", card.unwrap_or_default());
    tick.xml = tick.xml.replace("</devices>", &more);
    let mut machine = Machine::started(daemon, tick).await;
    vcpus_are_plugged(&mut machine).await;
    the_balloon_is_asked(&machine).await;
    disks_are_limited(&machine).await;
    time_and_memory_are_limited(&machine).await;
    if let Some([_, other]) = &bridges {
        a_card_is_limited_and_plugged_elsewhere(&machine, other).await;
    }
    a_display_has_another_password(&machine).await;
    a_display_listens_elsewhere(&machine).await;
    what_was_cut_off_is_undone(&mut machine, bridges.as_ref()).await;
    memory_that_fails_is_told(&machine).await;
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
    // QEMU would lose the guest.
    refused(machine.domain.call("SetVCPUs", &(1_u32, live())).await, "OperationUnsupported", "emulated");
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
    machine.domain.call("SetMemoryStatsPeriod", &(7_u32, options([]))).await.expect("set");
    assert_eq!(stats_period(machine), 7);
    refused(machine.domain.call("SetMemory", &(17 * MIB, options([]))).await, "InvalidArgument", "16777216");
}

/// The numbers of an answer.
fn numbers(reply: &Message) -> HashMap<String, u64> {
    let values: HashMap<String, OwnedVariant> = reply.body().deserialize().expect("a{sv}");
    values.into_iter().filter_map(|(key, value)| Some((key, value.downcast_ref::<u64>().ok()?))).collect()
}

fn values<'a>(pairs: &[(&'a str, u64)]) -> Options<'a> {
    options(pairs.iter().map(|(key, value)| (*key, Variant::from(*value))))
}

async fn disks_are_limited(machine: &Machine) {
    let live = || with([("live", true)]);
    let set = async |target: &str, values: Options<'_>| {
        machine.domain.call("SetBlockThrottle", &(target, values, live())).await
    };
    let get =
        async |target: &str| numbers(&machine.domain.call("GetBlockThrottle", &(target, live())).await.expect("told"));
    let limits = |group: &str| {
        let path = format!("/objects/throttle-{group}");
        machine.asks_qemu("qom-get", serde_json::json!({ "path": path, "property": "limits" }))
    };
    // One that was started without limits.
    assert_eq!(get("vda").await, HashMap::new());
    let burst = [("read-bytes-per-second", 1 << 20), ("read-bytes-per-second-maximum", 1 << 21)];
    set("vda", values(&burst)).await.expect("limited");
    assert_eq!(get("vda").await.len(), 3, "a burst has a length, too");
    assert_eq!(
        (&limits("vda")["bps-read"], &limits("vda")["bps-read-max"]),
        (&Value::from(1 << 20), &Value::from(1 << 21))
    );
    let drives = machine.asks_qemu("query-block", serde_json::json!({}));
    let tops: Vec<&str> =
        drives.as_array().into_iter().flatten().filter_map(|one| one["inserted"]["node-name"].as_str()).collect();
    assert!(tops.contains(&"vda-throttle") && tops.contains(&"vdb-throttle"), "{tops:?}");
    machine.tick.goes_on().await;
    refused(set("vda", values(&[("total-bytes-per-second", 1)])).await, "InvalidArgument", "not for both");
    // One that was started with limits, which it shares from now on.
    set("vdb", values(&[("write-requests-per-second", 60)])).await.expect("one more");
    assert_eq!((&limits("slow")["iops-read"], &limits("slow")["iops-write"]), (&Value::from(50), &Value::from(60)));
    set("vda", options([("group", Variant::from("slow"))])).await.expect("it joins");
    let shared = HashMap::from(
        [("read-requests-per-second", 50), ("write-requests-per-second", 60)].map(|(key, n)| (key.to_owned(), n)),
    );
    assert_eq!((get("vda").await, get("vdb").await), (shared.clone(), shared));
    let objects = machine.asks_qemu("qom-list", serde_json::json!({ "path": "/objects" }));
    assert!(!names(&objects).contains(&"throttle-vda"), "{objects}");
    let alone = options([("group", Variant::from("")), ("read-requests-per-second", Variant::from(0_u64))]);
    set("vda", alone).await.expect("it leaves");
    assert_eq!((get("vda").await.len(), get("vdb").await.len()), (1, 2));
    assert_eq!((&limits("vda")["iops-read"], &limits("vda")["iops-write"]), (&Value::from(0), &Value::from(60)));
    machine.tick.goes_on().await;
}

async fn time_and_memory_are_limited(machine: &Machine) {
    let both = || with([("live", true), ("config", true)]);
    let live = || with([("live", true)]);
    let time = options([("cpu-shares", Variant::from(512_u64)), ("vcpu-quota-usec", Variant::from(30_000_i64))]);
    if !has_groups() {
        let refusal = machine.domain.call("SetSchedulerParameters", &(time, live())).await;
        return refused(refusal, "OperationUnsupported", "Delegate=yes");
    }
    machine.domain.call("SetSchedulerParameters", &(time, both())).await.expect("limited");
    let says = |files: [&str; 2]| machine.group_says(files).expect("a group");
    assert_eq!(says(["cpu.shares", "cpu.weight"]), "512");
    for vcpu in ["vcpu0", "vcpu1"] {
        let files = ["cpu.cfs_quota_us", "cpu.max"].map(|file| format!("{vcpu}/{file}"));
        assert!(says([&files[0], &files[1]]).starts_with("30000"), "{vcpu}");
    }
    let get = async |member: &str| machine.domain.call(member, &(live(),)).await.expect("told");
    let told: HashMap<String, OwnedVariant> = get("GetSchedulerParameters").await.body().deserialize().expect("a{sv}");
    assert_eq!(told["cpu-shares"].downcast_ref::<u64>(), Ok(512));
    assert_eq!(told["vcpu-quota-usec"].downcast_ref::<i64>(), Ok(30_000));
    assert_eq!(told["vcpu-period-usec"].downcast_ref::<u64>(), Ok(100_000));
    assert!(machine.domain.xml().await.contains("<shares>512</shares>"));
    refused(
        machine.domain.call("SetSchedulerParameters", &(values(&[("cpu-shares", 1)]), live())).await,
        "InvalidArgument",
        "2 to 10000",
    );
    let lifted = options([("cpu-shares", Variant::from(0_u64)), ("vcpu-quota-usec", Variant::from(0_i64))]);
    machine.domain.call("SetSchedulerParameters", &(lifted, both())).await.expect("lifted");
    assert!(["1024", "100"].contains(&&*says(["cpu.shares", "cpu.weight"])));
    let quota = says(["vcpu0/cpu.cfs_quota_us", "vcpu0/cpu.max"]);
    assert!(quota == "-1" || quota.starts_with("max"), "{quota}");

    let memory = ["memory.limit_in_bytes", "memory.max"];
    let bound = says(memory);
    machine.domain.call("SetMemoryParameters", &(values(&[("hard-limit", 2 << 30)]), both())).await.expect("limited");
    assert_eq!(says(memory), (2_u64 << 30).to_string());
    assert_eq!(numbers(&get("GetMemoryParameters").await), HashMap::from([("hard-limit".to_owned(), 2 << 30)]));
    let small = values(&[("hard-limit", MIB)]);
    refused(machine.domain.call("SetMemoryParameters", &(small, live())).await, "InvalidArgument", "would be killed");
    machine.domain.call("SetMemoryParameters", &(values(&[("hard-limit", 0)]), both())).await.expect("lifted");
    assert_eq!(says(memory), bound, "to what it is held anyway");
    machine.tick.goes_on().await;
}

async fn a_display_listens_elsewhere(machine: &Machine) {
    let live = || with([("live", true)]);
    let listens = || machine.asks_qemu("query-vnc", serde_json::json!({}))["host"].as_str().map(str::to_owned);
    assert_eq!(listens().as_deref(), Some("127.0.0.1"));
    let at = |address: &str| format!("<graphics type='vnc' listen='{address}'/>");
    machine.domain.call("UpdateDevice", &(at("127.0.0.2"), live())).await.expect("elsewhere");
    assert_eq!(listens().as_deref(), Some("127.0.0.2"));
    assert!(machine.domain.xml().await.contains("<listen type='address' address='127.0.0.2'/>"));
    // That is an address of no host's here.
    refused(machine.domain.call("UpdateDevice", &(at("203.0.113.7"), live())).await, "OperationUnsupported", "bind");
    assert_eq!(listens().as_deref(), Some("127.0.0.2"), "it is where it was");
    let timed = "<graphics type='vnc' passwdValidTo='2031-01-02T03:04:05'/>";
    machine.domain.call("UpdateDevice", &(timed, live())).await.expect("the password that it has, for a time");
}

/// A machine check that says that memory has failed: a guest that knows of none is reset.
async fn memory_that_fails_is_told(machine: &Machine) {
    let mut watch = machine.domain.client.watch().await;
    let (_, booted) = machine.tick.counted().expect("it counts");
    // Bank 1, an error that is valid and not corrected.
    let check = serde_json::json!({ "command-line": "mce 0 1 0xa000000000000000 0x5 0x1000 0x0" });
    machine.asks_qemu("human-monitor-command", check);
    let told = loop {
        let message = watch.next().await;
        if message.header().member().is_some_and(|member| member == "MemoryFailure") {
            break message.body().deserialize::<(String, String, HashMap<String, OwnedVariant>)>().expect("ssa{sv}");
        }
    };
    let (recipient, action, flags) = told;
    assert_eq!((&*recipient, &*action), ("guest", "reset"));
    let flag = |name: &str| flags[name].downcast_ref::<bool>().expect("b");
    assert_eq!((flag("action-required"), flag("recursive")), (false, false));
    machine.tick.boots_to(booted + 1).await;
}

/// In `put_checked`: the guest has followed, and no configuration says so yet.
const FOLLOWED: u32 = 3;

/// virtd is killed in the midst of each kind of change: the next one has the guest be as its configuration says, which is as before.
async fn what_was_cut_off_is_undone(machine: &mut Machine, bridges: Option<&[Bridge; 2]>) {
    let live = || with([("live", true)]);
    let group = |machine: &Machine| {
        let path = "/objects/throttle-slow";
        machine.asks_qemu("qom-get", serde_json::json!({ "path": path, "property": "limits" }))["iops-read"].clone()
    };
    let secret = async |machine: &Machine| -> String {
        let secure = with([("secure", true)]);
        machine.domain.call("GetXML", &(secure,)).await.expect("told").body().deserialize().expect("s")
    };
    let before = secret(machine).await;

    cut_off(machine, "SetBlockThrottle", &("vdb", values(&[("read-requests-per-second", 77)]), live())).await;
    assert_eq!(group(machine), 77, "QEMU had followed");
    is_found_again(machine).await;
    assert_eq!(group(machine), 50);

    cut_off(machine, "SetMemoryStatsPeriod", &(9_u32, live())).await;
    assert_eq!(stats_period(machine), 9);
    is_found_again(machine).await;
    assert_eq!(stats_period(machine), 7);

    // What QEMU tells nobody again is at least told it again.
    cut_off(machine, "SetMemory", &(10 * MIB, live())).await;
    is_found_again(machine).await;
    cut_off(machine, "SetGraphicsPassword", &(0_u32, "cut0ff", live())).await;
    is_found_again(machine).await;

    let listens = |machine: &Machine| machine.asks_qemu("query-vnc", serde_json::json!({}))["host"].clone();
    cut_off(machine, "UpdateDevice", &("<graphics type='vnc' listen='127.0.0.3'/>", live())).await;
    assert_eq!(listens(machine), "127.0.0.3");
    is_found_again(machine).await;
    assert_eq!(listens(machine), "127.0.0.2");

    if has_groups() {
        let shares = ["cpu.shares", "cpu.weight"];
        let held = machine.group_says(shares);
        cut_off(machine, "SetSchedulerParameters", &(values(&[("cpu-shares", 300)]), live())).await;
        assert_eq!(machine.group_says(shares).as_deref(), Some("300"));
        is_found_again(machine).await;
        assert_eq!(machine.group_says(shares), held);
    }
    if let Some([one, other]) = bridges {
        let device = host_end(&before);
        cut_off(machine, "SetInterfaceBandwidth", &("net0", values(&[("inbound-average", 900)]), live())).await;
        assert!(class_of(&device).contains("rate 7200Kbit"), "{}", class_of(&device));
        is_found_again(machine).await;
        assert_eq!(class_of(&device), "");
        a_filter_that_was_cut_off_is_undone(machine, &device).await;
        let address = before.split("<mac address='").nth(1).and_then(|rest| rest.get(..17)).expect("its address");
        let back = format!(
            "<interface type='bridge'><mac address='{address}'/><source bridge='{}'/><link state='down'/></interface>",
            one.0
        );
        cut_off(machine, "UpdateDevice", &(back, live())).await;
        let master = || std::fs::read_link(format!("/sys/class/net/{device}/master")).expect("a bridge");
        assert!(master().ends_with(&one.0), "{:?}", master());
        is_found_again(machine).await;
        assert!(master().ends_with(&other.0), "{:?}", master());
    }
    assert_eq!(secret(machine).await, before);
    // What is done then stays done.
    machine.domain.call("SetMemoryStatsPeriod", &(8_u32, live())).await.expect("set");
    machine.daemon.kill_virtd().await;
    is_found_again(machine).await;
    assert_eq!(stats_period(machine), 8);
    what_is_stored_beside_is_not_lost(machine).await;
}

/// What the card on a bridge may send: none of the machine's cards has a filter before.
async fn a_filter_that_was_cut_off_is_undone(machine: &mut Machine, device: &str) {
    if !have(&["nft"]) {
        return;
    }
    let number = std::fs::read_to_string(format!("/sys/class/net/{device}/ifindex")).expect("its number");
    let rules = || {
        let table = format!("virt_tap_{}", number.trim());
        let told = std::process::Command::new("nft").args(["list", "table", "bridge", &table]).output().expect("nft");
        String::from_utf8_lossy(&told.stdout).into_owned()
    };
    let link = if machine.domain.xml().await.contains("<link state='down'/>") { "down" } else { "up" };
    let card = |filter: &str| {
        format!("<interface type='bridge'><alias name='net0'/><link state='{link}'/>{filter}</interface>")
    };
    let live = || with([("live", true)]);
    let multicast = card("<filterref filter='no-ip-multicast'/>");
    cut_off(machine, "UpdateDevice", &(&multicast, live())).await;
    assert!(rules().contains("224.0.0.0/4"), "{}", rules());
    is_found_again(machine).await;
    assert_eq!(rules(), "");
    machine.domain.call("UpdateDevice", &(&multicast, live())).await.expect("filtered");
    cut_off(machine, "UpdateDevice", &(card("<filterref filter='no-mac-broadcast'/>"), live())).await;
    is_found_again(machine).await;
    assert!(rules().contains("224.0.0.0/4") && !rules().contains("ff:ff"), "{}", rules());
    cut_off(machine, "UpdateDevice", &(card("<filterref/>"), live())).await;
    assert_eq!(rules(), "");
    is_found_again(machine).await;
    assert!(rules().contains("224.0.0.0/4"), "{}", rules());
    machine.domain.call("UpdateDevice", &(card("<filterref/>"), live())).await.expect("none again");
    assert_eq!(rules(), "");
}

/// Of a change of both, virtd is killed between any two of what is written: both say what was, or both what was to be.
async fn what_is_stored_beside_is_not_lost(machine: &mut Machine) {
    machine.domain.call("SetMemoryStatsPeriod", &(8_u32, options([]))).await.expect("the same in both");
    let mut said = 8;
    for (step, period, is_new) in [(FOLLOWED, 21_u32, false), (FOLLOWED + 1, 22, true), (FOLLOWED + 2, 23, true)] {
        cut_off_at(machine, step, "SetMemoryStatsPeriod", &(period, options([]))).await;
        is_found_again(machine).await;
        said = if is_new { period } else { said };
        assert_eq!(stats_period(machine), said, "step {step}");
        both_say(machine, &format!("<stats period='{said}'/>")).await;
    }
    machine.domain.call("SetTitle", &("none", options([]))).await.expect("the same in both");
    for (step, title, said) in
        [(FOLLOWED, "one", "none"), (FOLLOWED + 1, "two", "two"), (FOLLOWED + 2, "three", "three")]
    {
        cut_off_at(machine, step, "SetTitle", &(title, options([]))).await;
        is_found_again(machine).await;
        both_say(machine, &format!("<title>{said}</title>")).await;
    }
}

/// What runs says so, and what is stored.
async fn both_say(machine: &Machine, said: &str) {
    let stored = with([("inactive", true)]);
    let stored = machine.domain.call("GetXML", &(stored,)).await.expect("told");
    for xml in [machine.domain.xml().await, stored.body().deserialize().expect("s")] {
        assert!(xml.contains(said), "{said}: {xml}");
    }
}

/// Has virtd be killed when the guest has followed, and nobody has written that down.
async fn cut_off<B>(machine: &mut Machine, member: &str, body: &B)
where
    B: serde::Serialize + zbus::DynamicType + std::fmt::Debug,
{
    cut_off_at(machine, FOLLOWED, member, body).await;
}

/// The same at that step.
async fn cut_off_at<B>(machine: &mut Machine, step: u32, member: &str, body: &B)
where
    B: serde::Serialize + zbus::DynamicType + std::fmt::Debug,
{
    machine.daemon.at_step(step, &format!("kill -9 {}", machine.daemon.virtd_pid()));
    let answer = machine.domain.call(member, body).await;
    assert!(answer.is_err() && machine.daemon.step_came(), "{member} {body:?}: {answer:?}");
    machine.daemon.virtd_died().await;
}

async fn is_found_again(machine: &mut Machine) {
    machine.daemon.start_virtd().await;
    machine.domain = machine.domain.client.named(&machine.tick.name).await.expect("found");
    machine.domain.is_looked_after().await;
}

fn stats_period(machine: &Machine) -> Value {
    let devices = machine.asks_qemu("qom-list", serde_json::json!({ "path": "/machine/peripheral" }));
    let balloon = names(&devices).into_iter().find(|name| name.starts_with("balloon")).expect("a balloon").to_owned();
    let path = format!("/machine/peripheral/{balloon}");
    machine.asks_qemu("qom-get", serde_json::json!({ "path": path, "property": "guest-stats-polling-interval" }))
}

/// The network device of the host's that its card is plugged into.
fn host_end(xml: &str) -> String {
    let number = xml.split("<target dev='v").find_map(|rest| rest.strip_prefix("net")).expect("a name");
    format!("vnet{}", number.split('\'').next().expect("a number"))
}

/// What tc says of it.
fn class_of(device: &str) -> String {
    let told = std::process::Command::new("tc").args(["class", "show", "dev", device]).output().expect("tc");
    String::from_utf8_lossy(&told.stdout).into_owned()
}

async fn a_display_has_another_password(machine: &Machine) {
    let until = options([("valid-until-usec", Variant::from(1_795_403_655_000_000_u64))]);
    machine.domain.call("SetGraphicsPassword", &(0_u32, "s3cret", until)).await.expect("set");
    machine.domain.call("SetGraphicsPassword", &(0_u32, "0ther", options([]))).await.expect("good for ever again");
    let put_out = options([("connected", Variant::from("disconnect")), ("live", Variant::from(true))]);
    let put_out = machine.domain.call("SetGraphicsPassword", &(0_u32, "third", put_out)).await;
    refused(put_out, "OperationUnsupported", "connected");
    let long = machine.domain.call("SetGraphicsPassword", &(0_u32, "nine chars", options([]))).await;
    refused(long, "InvalidArgument", "at most 8");
    let secure = with([("secure", true)]);
    let xml: String = machine.domain.call("GetXML", &(secure,)).await.expect("told").body().deserialize().expect("s");
    assert!(xml.contains("passwd='0ther'"), "what is refused changes nothing: {xml}");
}

async fn a_card_is_limited_and_plugged_elsewhere(machine: &Machine, other: &Bridge) {
    let live = || with([("live", true)]);
    let set = async |pairs: &[(&str, u64)]| {
        machine.domain.call("SetInterfaceBandwidth", &("net0", values(pairs), live())).await
    };
    let get = async || numbers(&machine.domain.call("GetInterfaceBandwidth", &("net0", live())).await.expect("told"));
    let xml = machine.domain.xml().await;
    let device = host_end(&xml);
    let class = || class_of(&device);
    assert_eq!(get().await, HashMap::new());
    let pairs = [("inbound-average", 1001), ("inbound-peak", 2003), ("inbound-burst", 65)];
    set(&pairs).await.expect("limited");
    assert!(class().contains("rate 8008Kbit ceil 16024Kbit burst 65Kb"), "{}", class());
    assert_eq!(get().await, pairs.iter().map(|(key, n)| ((*key).to_owned(), *n)).collect());
    set(&[("inbound-average", 500), ("inbound-peak", 0)]).await.expect("changed");
    assert!(class().contains("rate 4Mbit ceil 4Mbit burst 65Kb"), "{}", class());
    assert_eq!(get().await.len(), 2);
    assert!(machine.domain.xml().await.contains("<inbound average='500' burst='65'/>"));
    // What somebody else has made of it is what is told.
    let words = [
        "class", "replace", "dev", &device, "parent", "1:", "classid", "1:1", "htb", "rate", "80kbps", "burst", "65kb",
    ];
    assert!(std::process::Command::new("tc").args(words).status().expect("tc").success());
    assert_eq!(get().await["inbound-average"], 80);
    set(&[("inbound-average", 0)]).await.expect("lifted");
    assert_eq!((class(), get().await), (String::new(), HashMap::new()));
    let address = xml.split("<mac address='").nth(1).and_then(|rest| rest.get(..17)).expect("its address");
    let update = |what: &str| format!("<interface type='bridge'><mac address='{address}'/>{what}</interface>");
    let elsewhere = update(&format!("<source bridge='{}'/><link state='down'/>", other.0));
    machine.domain.call("UpdateDevice", &(elsewhere, live())).await.expect("plugged elsewhere, and pulled out");
    let master = std::fs::read_link(format!("/sys/class/net/{device}/master")).expect("a bridge");
    assert_eq!(master.file_name().and_then(|name| name.to_str()), Some(&*other.0));
    assert!(machine.domain.xml().await.contains("<link state='down'/>"));
    let nowhere = update("<source bridge='no-such-bridge'/>");
    refused(machine.domain.call("UpdateDevice", &(nowhere, live())).await, "InvalidArgument", "no-such-bridge");
    assert!(machine.domain.xml().await.contains(&other.0));
    // Packets of the guest are counted by an action that not every kernel has.
    match set(&[("outbound-average", 700), ("outbound-burst", 64)]).await {
        Ok(_) => assert_eq!(get().await["outbound-average"], 700),
        Err((name, text)) => {
            assert!(name.ends_with("HypervisorFailed") && text.contains(&device), "{name}: {text}");
            assert!(!machine.domain.xml().await.contains("<bandwidth>"), "what fails changes nothing");
        }
    }
}
