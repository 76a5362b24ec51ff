//! Devices plugged into and out of guests that run: what QEMU has is what the configuration says, whoever dies.

use crate::common::Daemon;
use crate::common::client::{Client, Domain, Refusal, Watch, descriptor, options};
use crate::common::guest::Tick;
use crate::common::snapshots::with;
use crate::common::users::ALICE;
use serde_json::Value;

use std::path::{Path, PathBuf};
use zbus::Variant;

struct Machine {
    daemon: Daemon,
    tick: Tick,
    domain: Domain,
}

impl Machine {
    async fn started(name: &str, board: &str) -> Option<Machine> {
        Machine::started_with(name, board, "").await
    }

    async fn started_with(name: &str, board: &str, more: &str) -> Option<Machine> {
        let daemon = Daemon::on_system_bus(crate::common::Setup::default()).await?;
        let mut tick = Tick::new(&daemon, name, more)?;
        tick.xml = tick.xml.replace("machine='q35'", &format!("machine='{board}'"));
        let client = Client { connection: daemon.connect().await };
        let domain = client.define(&tick.xml).await.expect("defined");
        domain.run("Start").await.expect("started");
        tick.counts_to(2).await;
        Some(Machine { daemon, tick, domain })
    }

    /// An image that only root may read.
    fn image(&self, name: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.daemon.folder().join(name);
        std::fs::File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("made");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("set");
        path
    }

    async fn attach(&self, xml: &str) -> Result<String, Refusal> {
        let reply = self.domain.call("AttachDevice", &(xml, with([("live", true)]))).await?;
        Ok(reply.body().deserialize().expect("s"))
    }

    async fn detach(&self, alias: &str, usec: u64) -> Result<(), Refusal> {
        let how = options([("timeout-usec", Variant::from(usec)), ("live", Variant::from(true))]);
        self.domain.call("DetachDeviceAlias", &(alias, how)).await.map(drop)
    }

    fn has_open(&self, file: &Path) -> bool {
        let pid = self.daemon.qemu_of(&self.tick.name).expect("it runs");
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its files");
        files.flatten().any(|open| std::fs::read_link(open.path()).is_ok_and(|link| link == file))
    }

    /// Whether a file is lent to somebody: it has an entry of its own in its access control list.
    fn is_lent(&self, file: &Path) -> bool {
        rustix::fs::getxattr(file, "system.posix_acl_access", &mut [0u8; 0][..]).is_ok()
    }

    /// What QEMU says while nobody else listens to it.
    fn asks_qemu(&self, questions: &[&str]) -> Vec<Value> {
        self.daemon.asks_qemu(questions)
    }
}

const LIST: &str = "{\"execute\":\"qom-list\",\"arguments\":{\"path\":\"/machine/peripheral\"}}";
const NODES: &str = "{\"execute\":\"query-named-block-nodes\",\"arguments\":{\"flat\":true}}";
const BACK_ENDS: &str = "{\"execute\":\"query-chardev\"}";
const OBJECTS: &str = "{\"execute\":\"qom-list\",\"arguments\":{\"path\":\"/objects\"}}";

/// Texts under that key, of the answer's list.
fn texts(told: &Value, key: &str) -> Vec<String> {
    let list = told["return"].as_array().into_iter().flatten();
    list.filter_map(|one| one[key].as_str().map(str::to_owned)).collect()
}

async fn next_device(watch: &mut Watch) -> (String, String) {
    loop {
        let message = watch.next().await;
        let member = message.header().member().expect("a signal").to_string();
        if member.starts_with("Device") {
            return (member, message.body().deserialize::<String>().expect("s"));
        }
    }
}

fn disk(image: &Path, target: &str, bus: &str) -> String {
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/><target dev='{target}' bus='{bus}'/></disk>",
        image.display()
    )
}

fn refused(answer: Result<impl std::fmt::Debug, Refusal>, error: &str, word: &str) {
    let (name, text) = answer.expect_err(error);
    assert!(name == format!("org.virt.Error.{error}") && text.contains(word), "{name}: {text}");
}

#[tokio::test]
async fn devices_come_and_go_and_what_they_stand_on_with_them() {
    let Some(mut machine) = Machine::started("plugs", "pc").await else { return };
    let [one, two, three] = ["one.img", "two.img", "three.img"].map(|name| machine.image(name));
    let mut watch = machine.domain.client.watch().await;

    // The first SCSI disk brings its controller along.
    let scsi = machine.attach(&disk(&one, "sda", "scsi")).await.expect("a SCSI disk");
    assert_eq!(next_device(&mut watch).await, ("DeviceAdded".to_owned(), scsi.clone()));
    assert!(machine.has_open(&one) && machine.is_lent(&one));
    let usb = machine.attach(&disk(&two, "sdb", "usb")).await.expect("a stick");
    let virtio = machine.attach(&disk(&three, "vdz", "virtio")).await.expect("a virtio disk");
    let rng = "<rng model='virtio'><backend model='builtin'/></rng>";
    let rng = machine.attach(rng).await.expect("an rng");
    let tablet = machine.attach("<input type='tablet' bus='usb'/>").await.expect("a tablet");
    let channel = "<channel type='unix'><target type='virtio' name='org.test.0'/></channel>";
    let channel = machine.attach(channel).await.expect("a channel");
    let serial = "<serial type='pty'><target type='usb-serial'/></serial>";
    let serial = machine.attach(serial).await.expect("a serial port");
    // A card whose cable virtd hands to QEMU; it can be pulled out.
    match Path::new("/dev/net/tun").exists() {
        true => {
            let card = "<interface type='ethernet'><model type='virtio'/></interface>";
            let card = machine.attach(card).await.expect("a card");
            machine.domain.call("SetLink", &(&*card, false, with([("live", true)]))).await.expect("pulled out");
            assert!(machine.domain.xml().await.contains("<link state='down'/>"));
            refused(machine.detach(&card, 1).await, "TimedOut", &card);
        }
        false => crate::common::skip("there is no /dev/net/tun"),
    }
    let xml = machine.domain.xml().await;
    assert!(xml.contains("/dev/pts/"), "its terminal is known: {xml}");
    let all = [&scsi, &usb, &virtio, &rng, &tablet, &channel, &serial];
    assert!(all.iter().all(|alias| xml.contains(&format!("<alias name='{alias}'/>"))), "{all:?}: {xml}");

    // A person talks to the channel as to one that was there at the start.
    machine.domain.call("OpenChannel", &("org.test.0", options([]))).await.expect("opened");

    // This guest is firmware and a boot sector: it answers no request to let go of a PCI device.
    refused(machine.detach(&virtio, 50_000).await, "TimedOut", &virtio);
    assert!(machine.has_open(&three) && machine.is_lent(&three) && machine.domain.xml().await.contains("vdz"));
    for alias in [&scsi, &usb, &tablet, &channel, &serial] {
        machine.detach(alias, 20_000_000).await.unwrap_or_else(|error| panic!("{alias}: {error:?}"));
        let told = loop {
            match next_device(&mut watch).await {
                (member, _) if member == "DeviceAdded" => {}
                told => break told,
            }
        };
        assert_eq!(told, ("DeviceRemoved".to_owned(), alias.clone()));
    }
    let xml = machine.domain.xml().await;
    assert!(!xml.contains("one.img") && !xml.contains("two.img") && !xml.contains("org.test.0"), "{xml}");
    assert!(!machine.has_open(&one) && !machine.has_open(&two) && machine.has_open(&three));
    assert!(!machine.is_lent(&one) && !machine.is_lent(&two), "what it has no more is given back");
    machine.tick.goes_on().await;

    machine.daemon.kill_virtd().await;
    let told = machine.asks_qemu(&[LIST, NODES, BACK_ENDS, OBJECTS]);
    let devices = texts(&told[0], "name");
    assert!(devices.contains(&virtio) && devices.contains(&rng), "{devices:?}");
    for gone in [&scsi, &usb, &tablet, &channel, &serial] {
        assert!(!devices.contains(gone), "{devices:?}");
        assert!(!texts(&told[2], "label").contains(&format!("char{gone}")), "{:?}", told[2]);
    }
    let nodes = texts(&told[1], "node-name");
    assert!(nodes.iter().any(|node| node.starts_with("vdz-")), "{nodes:?}");
    assert!(!nodes.iter().any(|node| node.starts_with("sda-") || node.starts_with("sdb-")), "{nodes:?}");
    assert!(texts(&told[3], "name").contains(&format!("obj{rng}")), "{:?}", told[3]);
    machine.daemon.start_virtd().await;
    machine.domain.is_looked_after().await;
    assert!(machine.domain.xml().await.contains("vdz"), "another virtd finds it there");
    what_lets_go_late_goes_from_what_is_stored(&mut machine).await;
    machine.domain.run("Destroy").await.expect("destroyed");
    assert!(!machine.is_lent(&three));
}

/// A device in both configurations that the guest was asked for in vain goes from both when it lets go, whichever virtd asked.
async fn what_lets_go_late_goes_from_what_is_stored(machine: &mut Machine) {
    let late = machine.image("late.img");
    let both = || with([("live", true), ("config", true)]);
    let reply = machine.domain.call("AttachDevice", &(disk(&late, "vdy", "virtio"), both())).await.expect("in both");
    let alias: String = reply.body().deserialize().expect("s");
    let stored = async |machine: &Machine| -> String {
        let reply = machine.domain.call("GetXML", &(with([("inactive", true)]),)).await.expect("told");
        reply.body().deserialize().expect("s")
    };
    let mut how = both();
    how.insert("timeout-usec", Variant::from(50_000_u64));
    refused(machine.domain.call("DetachDeviceAlias", &(&*alias, how)).await, "TimedOut", &alias);
    assert!(machine.domain.xml().await.contains("late.img") && stored(machine).await.contains("late.img"));
    machine.daemon.kill_virtd().await;
    machine.daemon.start_virtd().await;
    machine.domain.is_looked_after().await;
    assert!(machine.domain.xml().await.contains("late.img") && stored(machine).await.contains("late.img"));
    // A board takes what it was asked for when it is reset.
    let mut watch = machine.domain.client.watch().await;
    machine.domain.bare("Reset").await.expect("reset");
    while next_device(&mut watch).await != ("DeviceRemoved".to_owned(), alias.clone()) {}
    assert!(!machine.domain.xml().await.contains("late.img") && !stored(machine).await.contains("late.img"));
    assert!(!machine.has_open(&late) && !machine.is_lent(&late));
    machine.tick.goes_on().await;
}

#[tokio::test]
async fn what_cannot_be_plugged_is_named_and_changes_nothing() {
    let Some(machine) = Machine::started("unplugged", "q35").await else { return };
    let image = machine.image("some.img");
    let before = machine.domain.xml().await;
    refused(machine.attach(&disk(&image, "hda", "sata")).await, "OperationUnsupported", "use bus 'virtio'");
    refused(machine.attach("<sound model='ich9'/>").await, "OperationUnsupported", "part of the board");
    let rooted = "<rng model='virtio'><backend model='builtin'/><address type='pci' bus='0' slot='9'/></rng>";
    refused(machine.attach(rooted).await, "OperationUnsupported", "root of PCI Express");
    let missing = machine.daemon.folder().join("missing.img");
    refused(machine.attach(&disk(&missing, "vdb", "virtio")).await, "StorageFailed", "missing.img");
    refused(
        machine.attach("<interface type='user'><model type='virtio'/></interface>").await,
        "OperationUnsupported",
        "network of the host",
    );
    refused(machine.detach("virtio-disk7", 1).await, "NoSuchDevice", "virtio-disk7");
    assert_eq!(machine.domain.xml().await, before);
    assert!(!machine.is_lent(&image));

    // A board has so many ports and no more.
    let rng = "<rng model='virtio'><backend model='builtin'/></rng>";
    let mut plugged = 0;
    let full = loop {
        match machine.attach(rng).await {
            Ok(_) if plugged < 16 => plugged += 1,
            answer => break answer,
        }
    };
    refused(full, "OperationInvalid", "no free place");
    assert!(plugged >= 4, "{plugged} devices were plugged in");
    machine.domain.run("Destroy").await.expect("destroyed");
}

const DIMMS: &str = "{\"execute\":\"query-memory-devices\"}";

#[tokio::test]
async fn memory_a_watchdog_and_what_runs_beside_a_guest_come_while_it_runs() {
    let more = "<maxMemory slots='2' unit='MiB'>1024</maxMemory><memoryBacking><access mode='shared'/></memoryBacking>";
    let Some(mut machine) = Machine::started_with("grows", "pc", more).await else { return };
    let before: u64 = machine.domain.property("Memory").await;
    let dimm = |mib: u64| format!("<memory model='dimm'><target><size unit='MiB'>{mib}</size></target></memory>");
    refused(machine.attach(&dimm(4096)).await, "ConfigUnsupported", "<maxMemory>");
    let alias = machine.attach(&dimm(128)).await.expect("memory");
    assert_eq!(machine.domain.property::<u64>("Memory").await, before + (128 << 20));
    refused(machine.detach(&alias, 1).await, "OperationUnsupported", &alias);
    let virtio = "<memory model='virtio-mem'><target><size unit='MiB'>128</size><block unit='MiB'>2</block>\
                  <requested unit='MiB'>64</requested></target></memory>";
    let virtio = machine.attach(virtio).await.expect("memory");
    refused(machine.detach(&virtio, 1).await, "OperationUnsupported", &virtio);
    let dog = machine.attach("<watchdog model='i6300esb' action='pause'/>").await.expect("a watchdog");
    refused(machine.attach("<watchdog model='itco'/>").await, "OperationUnsupported", "board");

    // A folder, by a program that runs as long as the guest has it; it outlives virtd.
    let shared = machine.daemon.folder().join("shared");
    std::fs::create_dir(&shared).expect("made");
    let folder = |driver: &str| {
        let dir = shared.display();
        format!("<filesystem type='mount'>{driver}<source dir='{dir}'/><target dir='shared'/></filesystem>")
    };
    refused(machine.attach(&folder("")).await, "OperationUnsupported", "virtiofs");
    let has_folder = Path::new("/usr/lib/qemu/virtiofsd").exists();
    match has_folder {
        true => _ = machine.attach(&folder("<driver type='virtiofs'/>")).await.expect("a folder"),
        false => crate::common::skip("there is no virtiofsd"),
    }
    let image = machine.image("thrown.img");
    let thrown = disk(&image, "sdb", "usb").replace("</disk>", "<transient/></disk>");
    let thrown = machine.attach(&thrown).await.expect("a disk that is thrown away");
    machine.tick.goes_on().await;
    let shown = machine.domain.xml().await;
    machine.daemon.kill_virtd().await;
    let told = machine.asks_qemu(&[DIMMS, LIST, NODES, SETS]);
    let memory = told[0]["return"].as_array().expect("a list");
    let ids: Vec<&str> = memory.iter().filter_map(|one| one["data"]["id"].as_str()).collect();
    assert!(ids.contains(&&*alias) && ids.contains(&&*virtio), "{}", told[0]);
    assert!(texts(&told[1], "name").contains(&dog), "{}", told[1]);
    assert!(texts(&told[2], "node-name").contains(&"sdb-transient".to_owned()), "{}", told[2]);
    assert_eq!(told[3]["return"].as_array().map(Vec::len), Some(1), "{}", told[3]);
    machine.daemon.start_virtd().await;
    machine.domain.is_looked_after().await;
    assert_eq!(machine.domain.xml().await, shown);
    machine.detach(&thrown, 20_000_000).await.expect("unplugged");
    machine.daemon.kill_virtd().await;
    let told = machine.asks_qemu(&[NODES, SETS]);
    assert!(!texts(&told[0], "node-name").iter().any(|node| node.starts_with("sdb-")), "{}", told[0]);
    assert_eq!(told[1]["return"].as_array().map(Vec::len), Some(0), "{}", told[1]);
    machine.daemon.start_virtd().await;
    machine.domain.is_looked_after().await;
    machine.domain.run("Destroy").await.expect("destroyed");
}

/// Steps of plugging in: before and after the record names the device, when it is there, and what follows on disk.
const STEPS: u32 = 12;

#[tokio::test]
async fn whoever_dies_while_a_device_is_plugged_in_or_out_it_is_there_or_it_is_not() {
    let Some(mut machine) = Machine::started("killed-plug", "pc").await else { return };
    let image = machine.image("stick.img");
    let (mut attached, mut detached) = (false, false);
    for step in 1..STEPS {
        let kill = format!("kill -9 {}", machine.daemon.virtd_pid());
        machine.daemon.at_step(step, &kill);
        let plugged = machine.domain.xml().await.contains("stick.img");
        let done = match plugged {
            false => machine.domain.call("AttachDevice", &(disk(&image, "sdb", "usb"), options([]))).await.is_ok(),
            true => machine.domain.call("DetachDeviceAlias", &("usb-disk1", options([]))).await.is_ok(),
        };
        assert!(done != machine.daemon.step_came(), "step {step}: it is done, or virtd is dead");
        if done {
            *(if plugged { &mut detached } else { &mut attached }) = true;
            continue;
        }
        machine.daemon.virtd_died().await;
        let there = texts(&machine.asks_qemu(&[LIST])[0], "name").contains(&"usb-disk1".to_owned());
        machine.daemon.start_virtd().await;
        machine.domain = machine.domain.client.named("killed-plug").await.expect("found");
        machine.domain.is_looked_after().await;
        assert_eq!(machine.domain.xml().await.contains("stick.img"), there, "step {step}");
        // What is stored beside says the same.
        let stored = machine.domain.call("GetXML", &(with([("inactive", true)]),)).await.expect("told");
        assert_eq!(stored.body().deserialize::<String>().expect("s").contains("stick.img"), there, "step {step}");
        assert_eq!((machine.has_open(&image), machine.is_lent(&image)), (there, there), "step {step}");
    }
    assert!(attached && detached, "there are fewer steps than {STEPS}");
    machine.tick.goes_on().await;
    machine.domain.run("Destroy").await.expect("destroyed");
}

/// Shows the machine's virtd alone a host with a stick on USB. The file that stands for it is `/dev/null`'s device: libusb opens
/// it, and finds that it is none of its own.
fn has_a_stick(daemon: &Daemon) {
    let script = "set -e; mkdir -p /dev/bus/usb; mount -t tmpfs none /sys/bus; mount -t tmpfs none /dev/bus/usb
        device=/sys/bus/usb/devices/1-4; mkdir -p $device /dev/bus/usb/001; mknod /dev/bus/usb/001/004 c 1 3
        echo 1 > $device/busnum; echo 4 > $device/devnum; echo fffe > $device/idVendor; echo fffd > $device/idProduct";
    assert!(daemon.inside("sh").args(["-c", script]).status().expect("a shell").success());
}

/// What a guest can be given of a real USB device needs one: here QEMU gives up, after all else has been done.
#[tokio::test]
async fn a_device_of_the_hosts_that_qemu_does_not_take_is_nobodys_again_whoever_dies() {
    let Some(mut machine) = Machine::started("killed-stick", "pc").await else { return };
    has_a_stick(&machine.daemon);
    let stick = "<hostdev type='usb'><source><vendor id='0xfffe'/><product id='0xfffd'/></source></hostdev>";
    let before = machine.domain.xml().await;
    for step in 1..STEPS {
        let kill = format!("kill -9 {}", machine.daemon.virtd_pid());
        machine.daemon.at_step(step, &kill);
        let plugged = machine.attach(stick).await;
        let came = machine.daemon.step_came();
        if came {
            machine.daemon.virtd_died().await;
            machine.daemon.start_virtd().await;
            machine.domain = machine.domain.client.named("killed-stick").await.expect("found");
            machine.domain.is_looked_after().await;
        } else {
            refused(plugged, "HypervisorFailed", "failed to open host usb device");
        }
        assert_eq!(machine.domain.xml().await, before, "step {step}");
        let node = Path::new("/proc").join(machine.daemon.virtd_pid().to_string()).join("root/dev/bus/usb/001/004");
        assert!(node.exists() && !machine.is_lent(&node), "step {step}");
        if !came {
            assert!(step > 1);
            machine.tick.goes_on().await;
            machine.domain.run("Destroy").await.expect("destroyed");
            return;
        }
    }
    panic!("there are more steps than {STEPS}");
}

/// Somebody's image in a home of their own: QEMU's user cannot follow its path.
fn in_a_home(machine: &Machine, name: &str) -> PathBuf {
    use std::os::unix::fs::{PermissionsExt as _, chown};
    let home = machine.daemon.folder().join(format!("home-of-{name}"));
    std::fs::create_dir(&home).expect("made");
    let path = home.join(name);
    std::fs::File::create(&path).and_then(|file| file.set_len(3 << 20)).expect("made");
    for (path, mode) in [(&home, 0o700), (&path, 0o600)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("set");
        chown(path, Some(ALICE.uid), Some(ALICE.uid)).expect("given away");
    }
    path
}

/// Whose a file is, what others may do with it, and whether it is lent.
fn standing(machine: &Machine, file: &Path) -> (u32, u32, u32, bool) {
    use std::os::unix::fs::MetadataExt as _;
    let found = std::fs::metadata(file).expect("there");
    (found.uid(), found.gid(), found.mode(), machine.is_lent(file))
}

const SETS: &str = "{\"execute\":\"query-fdsets\"}";

#[tokio::test]
async fn an_image_that_is_given_by_descriptor_is_read_by_it_alone() {
    let Some(mut machine) = Machine::started("given", "pc").await else { return };
    let drive = "<disk type='file' device='cdrom'><target dev='sdc' bus='scsi'/><readonly/></disk>";
    machine.attach(drive).await.expect("an empty drive");
    let (stick, medium) = (in_a_home(&machine, "stick.img"), in_a_home(&machine, "medium.iso"));
    let before = (standing(&machine, &stick), standing(&machine, stick.parent().expect("a home")));
    let open = |path: &Path, write: bool| std::fs::OpenOptions::new().read(true).write(write).open(path).expect("open");
    let give = async |machine: &Machine, xml: &str, file: &std::fs::File| {
        let options = options([("fds", Variant::from(vec![descriptor(file)]))]);
        machine
            .domain
            .call("AttachDevice", &(xml, options))
            .await
            .map(|reply| reply.body().deserialize::<String>().expect("s"))
    };
    let file = open(&stick, true);
    let alias = give(&machine, &disk(&stick, "sdb", "usb"), &file).await.expect("a stick");
    // The guest that has it is the only one, even by the same descriptor.
    refused(give(&machine, &disk(&stick, "sdd", "usb"), &file).await, "OperationInvalid", "open elsewhere");
    drop(file);
    let iso = options([("fd", Variant::from(descriptor(&open(&medium, false))))]);
    machine.domain.call("ChangeMedium", &("sdc", medium.to_str().expect("a path"), iso)).await.expect("changed");
    assert!(machine.has_open(&stick) && machine.has_open(&medium));
    let after = (standing(&machine, &stick), standing(&machine, stick.parent().expect("a home")));
    assert_eq!(before, after, "nothing is lent, and nothing given away");
    // What virtd had of them is closed by threads that nobody waits for.
    let own = format!("/proc/{}/fd", machine.daemon.virtd_pid());
    let has = |link: PathBuf| link == stick || link == medium;
    while std::fs::read_dir(&own)
        .expect("its files")
        .flatten()
        .any(|open| std::fs::read_link(open.path()).is_ok_and(has))
    {
        tokio::task::yield_now().await;
    }
    let shown = machine.domain.xml().await;
    assert!(shown.contains("stick.img' fdgroup='") && shown.contains("medium.iso' fdgroup='"), "{shown}");

    // It can be neither saved nor captured; and it goes on with another virtd.
    let save = machine.daemon.folder().join("whole.save");
    let save = machine.domain.call("Save", &(save.to_str().expect("a path"), options([]))).await;
    refused(save, "OperationUnsupported", "'sdc'");
    refused(machine.domain.call("CreateSnapshot", &("", options([]))).await, "OperationUnsupported", "'sdc'");
    machine.daemon.kill_virtd().await;
    let told = machine.asks_qemu(&[NODES, SETS]);
    let node =
        |name: &str| told[0]["return"].as_array().into_iter().flatten().find(|node| node["node-name"] == name).cloned();
    let storage = node("sdb-storage").expect("its node");
    let file = storage["file"].as_str().expect("a name");
    assert!(file.starts_with("/dev/fdset/") && storage["ro"] == false, "{storage}");
    assert_eq!(storage["image"]["virtual-size"], 3 << 20, "QEMU reads it");
    assert_eq!(told[1]["return"].as_array().map(Vec::len), Some(2), "{}", told[1]);
    machine.daemon.start_virtd().await;
    machine.domain.is_looked_after().await;
    assert_eq!(machine.domain.xml().await, shown);
    assert!(machine.has_open(&stick) && machine.has_open(&medium));

    // Another device beside it, and then it goes.
    let rng = machine.attach("<rng model='virtio'><backend model='builtin'/></rng>").await.expect("an rng");
    assert!(machine.domain.xml().await.contains(&rng));
    machine.detach(&alias, 20_000_000).await.expect("unplugged");
    machine.domain.call("ChangeMedium", &("sdc", "", with([("live", true)]))).await.expect("taken out");
    assert!(!machine.has_open(&stick) && !machine.has_open(&medium));
    let after = (standing(&machine, &stick), standing(&machine, stick.parent().expect("a home")));
    assert_eq!(before, after);
    // What has been taken back can be given again.
    give(&machine, &disk(&stick, "sdb", "usb"), &open(&stick, true)).await.expect("the stick again");
    machine.tick.goes_on().await;
    machine.domain.run("Destroy").await.expect("destroyed");
    assert_eq!(before.0, standing(&machine, &stick));
}
