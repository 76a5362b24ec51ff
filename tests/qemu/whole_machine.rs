//! A Linux guest with UEFI variables, a TPM and an agent: a snapshot holds all of it, and a revert brings all of it back
//! together. The guest itself says what it finds: the variable that it wrote last, and what its PCR has become.

use crate::common::client::{Client, Domain, Refusal, options};
use crate::common::guest::lin_files;
use crate::common::snapshots::{Player, with};
use crate::common::{Daemon, have, skip};
use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};
use zbus::{OwnedVariant, Variant};

/// It boots slowly without KVM.
const PATIENCE: Duration = Duration::from_secs(120);

const DAY_USEC: u64 = 24 * 3600 * 1_000_000;

struct Lin {
    serial: PathBuf,
    /// What the PCR is after so many steps.
    pcrs: HashMap<u32, String>,
    /// How much of what it said has been looked at.
    seen: usize,
}

/// One line of it.
#[derive(Debug)]
struct Line {
    count: u32,
    variable: u32,
    pcr: String,
}

fn line(text: &str) -> Option<Line> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let after = |key: &str| words.iter().position(|word| *word == key).and_then(|at| words.get(at + 1)).copied();
    let pcr = after("PCR").filter(|pcr| pcr.len() == 16)?;
    Some(Line {
        count: after("COUNT")?.parse().ok()?,
        variable: after("VAR")?.parse().unwrap_or_default(),
        pcr: pcr.to_owned(),
    })
}

impl Lin {
    /// Reads what it has said since, and holds each line to what came before: a variable that is not the last one written,
    /// or a PCR that is another than it was at that count, is of another time.
    fn listen(&mut self, begun: &mut bool) -> Option<u32> {
        let text = std::fs::read_to_string(&self.serial).unwrap_or_default();
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let new = &text[self.seen.min(whole)..whole];
        self.seen = whole;
        let mut last = None;
        for found in new.lines().filter_map(line) {
            assert!(!*begun || found.variable + 1 == found.count, "the variable is of another time: {found:?}");
            let known = self.pcrs.entry(found.count).or_insert_with(|| found.pcr.clone());
            assert_eq!(*known, found.pcr, "the PCR is of another time at {}", found.count);
            *begun = true;
            last = Some(found.count);
        }
        last
    }

    /// Waits until it has counted as wanted.
    async fn counts(&mut self, wanted: impl Fn(u32) -> bool) -> u32 {
        let mut begun = true;
        let waited = tokio::time::timeout(PATIENCE, async {
            loop {
                if let Some(count) = self.listen(&mut begun).filter(|count| wanted(*count)) {
                    return count;
                }
                crate::common::guest::written(&self.serial).await;
            }
        });
        waited
            .await
            .unwrap_or_else(|_| panic!("it said only: {}", std::fs::read_to_string(&self.serial).unwrap_or_default()))
    }
}

fn xml(name: &str, folder: &Path, (kernel, initrd): &(PathBuf, PathBuf)) -> String {
    let (disk, serial) = (folder.join(format!("{name}.qcow2")), folder.join(format!("{name}.serial")));
    format!(
        "<domain type='qemu'><name>{name}</name><maxMemory slots='2' unit='MiB'>1024</maxMemory>\
         <memory unit='MiB'>256</memory><vcpu current='1'>2</vcpu><memoryBacking><access mode='shared'/></memoryBacking><os firmware='efi'>\
         <firmware><feature enabled='no' name='secure-boot'/></firmware>\
         <type arch='x86_64' machine='q35'>hvm</type><kernel>{}</kernel><initrd>{}</initrd>\
         <cmdline>console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off nokaslr</cmdline></os>\
         <features><acpi/></features><devices>\
         <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
         <target dev='vda' bus='virtio'/></disk>\
         <serial type='file'><source path='{}'/><target port='0'/></serial>\
         <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
         <channel type='unix'><target type='virtio' name='org.test.talk'/></channel>\
         <tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm></devices></domain>",
        kernel.display(),
        initrd.display(),
        disk.display(),
        serial.display()
    )
}

/// Whether its channel is shown as one that a program in the guest has open.
async fn channel_is_open(domain: &Domain) -> bool {
    let channels = domain.property::<Vec<HashMap<String, OwnedVariant>>>("Channels").await;
    let is_it = |channel: &&HashMap<String, OwnedVariant>| {
        *channel["stored"] == Variant::from(false) && *channel["name"] == Variant::from("org.qemu.guest_agent.0")
    };
    let running = channels.iter().find(is_it).expect("it runs");
    assert!(*running["alias"] == Variant::from("channel0"));
    *running["connected"] == Variant::from(true)
}

/// The agent is there, and says what is so.
async fn agent_answers(domain: &Domain) {
    let connected = async { while !domain.property::<bool>("AgentConnected").await {} };
    tokio::time::timeout(PATIENCE, connected).await.expect("an agent");
    assert!(channel_is_open(domain).await);
    let groups: &[&str] = &["os", "hostname"];
    let info = domain.call("GetGuestInfo", &(groups, options([]))).await.expect("told");
    let info: HashMap<String, OwnedVariant> = info.body().deserialize().expect("a{sv}");
    let os = HashMap::<String, OwnedVariant>::try_from(info["os"].try_clone().expect("no descriptor")).expect("a{sv}");
    let text = |value: &OwnedVariant| value.downcast_ref::<&str>().expect("s").to_owned();
    assert_eq!([text(&os["machine"]), text(&os["id"]), text(&info["hostname"])], ["x86_64", "lin", "lin"]);
    let all: &[&str] = &[];
    let all = domain.call("GetGuestInfo", &(all, options([]))).await.expect("told");
    let all: HashMap<String, OwnedVariant> = all.body().deserialize().expect("a{sv}");
    assert!(all.contains_key("os") && all.contains_key("interfaces") && all.contains_key("file-systems"), "{all:?}");

    let ping = domain.call("AgentCommand", &("{\"execute\": \"guest-ping\"}", options([]))).await.expect("answered");
    assert_eq!(ping.body().deserialize::<&str>().expect("s"), "{\"return\": {}}");
    let (name, why) =
        domain.call("AgentCommand", &("{\"execute\": \"guest-fly\"}", options([]))).await.expect_err("no such command");
    assert!(name.ends_with("AgentFailed") && why.contains("CommandNotFound"), "{name}: {why}");

    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after it").as_micros() as u64;
    for wanted in [now + 400 * DAY_USEC, now] {
        domain.call("SetTime", &(wanted, options([]))).await.expect("set");
        let time = domain.bare("GetTime").await.expect("told").body().deserialize::<u64>().expect("t");
        assert!(time.abs_diff(wanted) < DAY_USEC, "{time} is not {wanted}");
    }
    for (argv, status) in [(&["/bin/busybox", "true"][..], 0), (&["/bin/busybox", "sh", "-c", "exit $A"][..], 7)] {
        let env = options([("env", Variant::from(vec!["A=7".to_owned()]))]);
        let ended = domain.call("GuestExec", &(argv, env)).await.expect("run");
        assert_eq!(ended.body().deserialize::<(i32, zbus::ObjectPath<'_>)>().expect("io").0, status);
    }
    let (read, mut write) = std::io::pipe().expect("a pipe");
    write.write_all(b"through the guest\n").expect("written");
    drop(write);
    let (printed, prints) = std::io::pipe().expect("a pipe");
    let file = |of: OwnedFd| Variant::from(zbus::wire::Fd::from(zbus::wire::OwnedFd::from(of)));
    let files = options([("stdin", file(read.into())), ("stdout", file(prints.into()))]);
    let ended = domain.call("GuestExec", &(&["/bin/busybox", "cat"][..], files)).await.expect("run");
    assert_eq!(ended.body().deserialize::<(i32, zbus::ObjectPath<'_>)>().expect("io").0, 0);
    let printed = tokio::task::spawn_blocking(move || std::io::read_to_string(printed).expect("text"));
    assert_eq!(printed.await.expect("read"), "through the guest\n");
    // A freeze of nothing is none.
    assert_eq!(freeze(domain, &["/none"]).await, Ok(0));
    assert_eq!(freeze(domain, &[]).await, Ok(1));
    let (name, why) = freeze(domain, &[]).await.expect_err("it is frozen");
    assert!(name.ends_with("OperationInvalid") && why.contains("thaw them first"), "{name}: {why}");
    let thawed = domain.run("ThawFilesystems").await.expect("thawed");
    assert_eq!(thawed.body().deserialize::<u32>().expect("u"), 1);
}

/// What a shell in the guest prints.
async fn inside(domain: &Domain, script: &str) -> String {
    let (printed, prints) = std::io::pipe().expect("a pipe");
    let prints = Variant::from(zbus::wire::Fd::from(zbus::wire::OwnedFd::from(OwnedFd::from(prints))));
    let argv: &[&str] = &["/bin/busybox", "sh", "-c", script];
    let ended = domain.call("GuestExec", &(argv, options([("stdout", prints)]))).await.expect("run");
    assert_eq!(ended.body().deserialize::<(i32, zbus::ObjectPath<'_>)>().expect("io").0, 0, "{script}");
    let text = tokio::task::spawn_blocking(move || std::io::read_to_string(printed).expect("text"));
    text.await.expect("read").trim().to_owned()
}

/// Waits inside for a command to succeed, for as long as the guest may take for anything, and does `between` meanwhile.
fn waits_for(command: &str, between: &str) -> String {
    let looks = PATIENCE.as_millis() / 50;
    format!("i=0; while ! {command} && [ $i -lt {looks} ]; do {between}usleep 50000; i=$((i+1)); done;")
}

/// A disk, memory, a shared folder and a card come while it runs, it has them, and all but the memory go again.
async fn devices_come_and_go(daemon: &Daemon, domain: &Domain) {
    let attach = async |xml: &str| {
        let reply = domain.call("AttachDevice", &(xml, with([("live", true)]))).await;
        let reply = reply.unwrap_or_else(|error| panic!("{xml}: {error:?}"));
        reply.body().deserialize::<String>().expect("s")
    };
    let detach = async |alias: &str| {
        let gone = domain.call("DetachDeviceAlias", &(alias, with([("live", true)]))).await;
        gone.unwrap_or_else(|error| panic!("{alias}: {error:?}"));
    };
    let image = daemon.folder().join("plugged.img");
    let mut sectors = b"plugged in".to_vec();
    sectors.resize(1 << 20, 0);
    std::fs::write(&image, sectors).expect("written");
    let disk = |rest: &str, target: &str| {
        let image = image.display();
        format!(
            "<disk type='file'><driver name='qemu' type='raw'/><source file='{image}'/><target dev='{target}' bus='virtio'/>{rest}</disk>"
        )
    };
    // The guest finds a device when it has looked, and can read it a moment after it has a name.
    let comes = waits_for("head -c 1 /dev/vdb > /dev/null 2>&1", "");
    let first = format!("{comes} head -c 10 /dev/vdb");
    let alias = attach(&disk("", "vdb")).await;
    assert_eq!(inside(domain, &first).await, "plugged in");
    detach(&alias).await;
    assert_eq!(inside(domain, "ls /dev/vdb 2>/dev/null || echo none").await, "none");
    // What is written to this one is thrown away.
    let alias = attach(&disk("<transient/>", "vdb")).await;
    let over = format!("{comes} echo written-over > /dev/vdb; sync; head -c 12 /dev/vdb");
    assert_eq!(inside(domain, &over).await, "written-over");
    detach(&alias).await;
    assert!(std::fs::read(&image).expect("read").starts_with(b"plugged in"));

    let memory: u64 = domain.property("Memory").await;
    let total = "grep MemTotal /proc/meminfo | tr -dc 0-9";
    let before: u64 = inside(domain, total).await.parse().expect("a number");
    let alias = attach("<memory model='dimm'><target><size unit='MiB'>256</size></target></memory>").await;
    assert_eq!(domain.property::<u64>("Memory").await, memory * 2);
    let bring = "for m in /sys/devices/system/memory/memory*/state; do echo online > $m 2>/dev/null; done; ";
    let online = format!("{} {total}", waits_for(&format!("[ $({total}) -gt {before} ]"), bring));
    let after: u64 = inside(domain, &online).await.parse().expect("a number");
    assert!(after >= before + 200 * 1024, "{before} KiB have become {after}");
    let (name, why) =
        domain.call("DetachDeviceAlias", &(&*alias, with([("live", true)]))).await.expect_err("memory stays");
    assert!(name.ends_with("OperationUnsupported") && why.contains(&alias), "{name}: {why}");

    let shared = daemon.folder().join("shared");
    std::fs::create_dir(&shared).expect("made");
    std::fs::write(shared.join("note"), "of the host\n").expect("written");
    if Path::new("/usr/lib/qemu/virtiofsd").exists() {
        let folder = format!(
            "<filesystem type='mount'><driver type='virtiofs'/><source dir='{}'/><target dir='shared'/></filesystem>",
            shared.display()
        );
        // Twice: what the first one had is free again.
        for _ in 0..2 {
            let alias = attach(&folder).await;
            let mounted = waits_for("mount -t virtiofs shared /run/shared 2>/dev/null", "");
            let mount = format!("mkdir -p /run/shared; {mounted} cat /run/shared/note; umount /run/shared");
            assert_eq!(inside(domain, &mount).await, "of the host");
            detach(&alias).await;
        }
    } else {
        skip("there is no virtiofsd");
    }
    if have(&["passt"]) {
        let alias = attach("<interface type='user'><backend type='passt'/><model type='virtio'/></interface>").await;
        a_cable_is_pulled(domain, &alias).await;
        detach(&alias).await;
        assert_eq!(inside(domain, "ls /sys/class/net").await, "lo");
    }
}

/// A card that was plugged in is seen inside, and so is whether its cable is.
async fn a_cable_is_pulled(domain: &Domain, card: &str) {
    let up = format!("{} ip link set eth0 up && ", waits_for("[ -e /sys/class/net/eth0 ]", ""));
    // The kernel follows the link after virtd has set it.
    let carrier = |wanted: u8| {
        let is = format!("[ \"$(cat /sys/class/net/eth0/carrier)\" = {wanted} ]");
        format!("{} cat /sys/class/net/eth0/carrier; ip link show eth0 | grep -c LOWER_UP || true", waits_for(&is, ""))
    };
    let mut seen = vec![inside(domain, &format!("{up}{}", carrier(1))).await];
    for plugged in [false, true] {
        domain.call("SetLink", &(card, plugged, with([("live", true)]))).await.expect("set");
        seen.push(inside(domain, &carrier(plugged.into())).await);
    }
    assert_eq!(seen, ["1\n1", "0\n0", "1\n1"]);
}

/// A program in the guest and somebody here talk by a channel.
async fn bytes_go_both_ways(domain: &Domain) {
    let reply = domain.call("OpenChannel", &("org.test.talk", options([]))).await.expect("opened");
    let mut here = UnixStream::from(OwnedFd::from(reply.body().deserialize::<zbus::wire::OwnedFd>().expect("h")));
    here.set_nonblocking(false).expect("set");
    here.set_read_timeout(Some(PATIENCE)).expect("a limit");
    here.write_all(b"from outside\n").expect("said");
    let answers = "exec 3<> /dev/virtio-ports/org.test.talk; read -r line <&3; echo \"heard $line\" >&3; echo $line";
    assert_eq!(inside(domain, answers).await, "from outside");
    let mut heard = [0; 19];
    here.read_exact(&mut heard).expect("an answer");
    assert_eq!(&heard[..], b"heard from outside\n");
}

/// The guest's own count of its memory follows its balloon, both ways.
async fn memory_is_given_back(domain: &Domain) {
    let total = "grep MemTotal /proc/meminfo | tr -dc 0-9";
    let set = async |bytes: u64| {
        domain.call("SetMemory", &(bytes, with([("live", true)]))).await.expect("asked");
    };
    let until = async |bound: String| -> u64 {
        let script = format!("{} {total}", waits_for(&format!("[ $({total}) {bound} ]"), ""));
        inside(domain, &script).await.parse().expect("a number")
    };
    let before: u64 = inside(domain, total).await.parse().expect("a number");
    let whole: u64 = domain.property("Memory").await;
    let given_back = 32 << 10;
    set(whole - (given_back << 10)).await;
    // It takes time, page by page.
    let less = until(format!("-le {}", before - given_back)).await;
    assert!(less.abs_diff(before - given_back) <= 64, "{before} KiB have become {less}");
    set(whole).await;
    assert!(until(format!("-ge {before}")).await >= before);
}

/// A processor is plugged into a system that knows it, and runs there. It stays: QEMU 7.2 loses its process to a corrupted heap when
/// this system has let go of one.
async fn a_vcpu_comes(domain: &Domain) {
    let online = "cat /sys/devices/system/cpu/online";
    assert_eq!(inside(domain, online).await, "0");
    domain.call("SetVCPUs", &(2_u32, with([("live", true)]))).await.expect("one more");
    let begin = "for c in /sys/devices/system/cpu/cpu[0-9]*/online; do echo 1 > $c 2>/dev/null; done; ";
    let both = format!("{} {online}", waits_for(&format!("[ \"$({online})\" = 0-1 ]"), begin));
    assert_eq!(inside(domain, &both).await, "0-1");
    assert_eq!(domain.property::<u32>("VCPUs").await, 2);
}

async fn freeze(domain: &Domain, places: &[&str]) -> Result<u32, Refusal> {
    let frozen = domain.call("FreezeFilesystems", &(places, options([]))).await?;
    Ok(frozen.body().deserialize().expect("u"))
}

/// While it runs, and from power off.
async fn goes_back(player: &Player, lin: &mut Lin) {
    // All inside: memory with the TPM in it, the disk, the variables' own image.
    player.take("whole").await;
    let document = player.xml("whole").await;
    assert!(
        document.contains("<nvram snapshot='internal'/>") && document.contains("<tpm snapshot='memory'/>"),
        "{document}"
    );
    let taken = lin.counts(|_| true).await;
    lin.counts(|count| count >= taken + 6).await;
    player.call("whole", "Revert", options([])).await.expect("reverted");
    lin.counts(|count| count < taken + 5).await;
    lin.counts(|count| count >= taken + 8).await;

    // Its file systems are frozen for that, and thawed.
    let quiesce = with([("disk-only", true), ("quiesce", true)]);
    player.create("<domainsnapshot><name>quiet</name></domainsnapshot>", quiesce).await.expect("taken");
    let now = lin.counts(|_| true).await;
    lin.counts(|count| count >= now + 3).await;
    player.call("quiet", "Delete", options([])).await.expect("deleted");

    // From power off, in a new process.
    player.domain.run("Destroy").await.expect("destroyed");
    lin.listen(&mut true);
    player.call("whole", "Revert", options([])).await.expect("reverted");
    lin.counts(|count| count < taken + 5).await;
    lin.counts(|count| count >= taken + 6).await;
}

/// A guest that wakes opens its agent's port anew.
async fn sleeps_wakes_and_ends(client: &Client, domain: &Domain, lin: &mut Lin) {
    let mut watch = client.watch().await;
    domain.call("SuspendGuest", &("mem", options([]))).await.expect("asked");
    assert_eq!(watch.lifecycle(&domain.path).await, "pmsuspended memory");
    domain.bare("Wakeup").await.expect("woken");
    assert_eq!(watch.lifecycle(&domain.path).await, "started wakeup");
    let now = lin.counts(|_| true).await;
    lin.counts(|count| count >= now + 3).await;
    agent_answers(domain).await;
    domain.call("Shutdown", &(options([("mode", Variant::from("agent"))]),)).await.expect("asked");
    let ended = watch.until(&domain.path, "stopped shutdown").await;
    assert_eq!(ended, ["shutdown guest", "stopped shutdown"]);
    assert!(!domain.property::<bool>("AgentConnected").await);
}

#[tokio::test]
async fn variables_tpm_memory_and_disk_go_back_together() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    if !have(&["swtpm", "swtpm_setup", "qemu-img"]) {
        return;
    }
    if !Path::new("/usr/share/qemu/firmware").exists() {
        return skip("there is no UEFI firmware (Debian has it in ovmf)");
    }
    let Some(files) = lin_files() else { return };
    let disk = daemon.folder().join("whole.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("64M").status();
    assert!(made.expect("qemu-img").success());
    let serial = daemon.folder().join("whole.serial");
    std::fs::write(&serial, "").expect("written");
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&xml("whole", daemon.folder(), &files)).await.expect("defined");
    let player = Player { domain };
    player.domain.run("Start").await.expect("started");
    let mut lin = Lin { serial, pcrs: HashMap::new(), seen: 0 };
    lin.counts(|count| count >= 4).await;
    agent_answers(&player.domain).await;

    goes_back(&player, &mut lin).await;

    // Its agent is there as it was, for the next virtd, too; and ends it.
    agent_answers(&player.domain).await;
    assert_eq!(freeze(&player.domain, &[]).await, Ok(1));
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    player.domain.is_looked_after().await;
    assert!(player.domain.property::<bool>("AgentConnected").await, "it is known at once");
    assert!(channel_is_open(&player.domain).await);
    let firmware: HashMap<String, OwnedVariant> = player.domain.property("Firmware").await;
    let tpm: HashMap<String, OwnedVariant> = player.domain.property("TPM").await;
    assert_eq!((&*firmware["type"], &*firmware["secure-boot"]), (&Variant::from("efi"), &Variant::from(false)));
    assert_eq!((&*tpm["model"], &*tpm["version"]), (&Variant::from("tpm-tis"), &Variant::from("2.0")));
    // What was frozen for somebody who is not there any more, virtd thaws, and then it can be frozen again.
    daemon.has_logged("its file systems are thawed", 1).await;
    assert_eq!(freeze(&player.domain, &[]).await, Ok(1));
    player.domain.run("ThawFilesystems").await.expect("thawed");
    agent_answers(&player.domain).await;
    bytes_go_both_ways(&player.domain).await;
    memory_is_given_back(&player.domain).await;
    a_vcpu_comes(&player.domain).await;
    devices_come_and_go(&daemon, &player.domain).await;
    sleeps_wakes_and_ends(&client, &player.domain, &mut lin).await;
    let nvram = options([("nvram", Variant::from(true)), ("snapshots-metadata", Variant::from(true))]);
    player.domain.call("Undefine", &(nvram,)).await.expect("undefined");
}
