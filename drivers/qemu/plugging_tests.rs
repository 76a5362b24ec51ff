//! Devices that are plugged in and unplugged, of such instances: what a real QEMU, or a real host, does too seldom.

use super::*;
use crate::host::pci::VFIO;
use crate::host::pci::tests::host as pci_host;
use crate::network::tests::{is_inside, run};
use crate::qemu::changes::{Change, HostPart, Undoing};
use crate::qemu::{QemuDriver, plug};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use virt_model::driver::{Attachment, Detachment};

fn with_devices(devices: &str) -> DomainDef {
    let text = format!("<domain type='qemu'><name>d</name><memory>1</memory><devices>{devices}</devices></domain>");
    DomainDef::parse(&text).unwrap()
}

const RNG: &str = "<rng model='virtio'><backend model='random'>/dev/urandom</backend><alias name='rng0'/></rng>";

#[tokio::test]
async fn whoever_unplugs_waits_for_a_deaf_qemu_no_longer_than_said() {
    let (instance, _peer, _reports, _) = guest("exec sleep 1000").await;
    let dir = tempfile::tempdir().unwrap();
    let driver = QemuDriver::new(&DriverConfig::below(dir.path(), false));
    let device = Detachment { def: &with_devices(RNG), alias: "rng0", patience: Duration::from_millis(1) };
    let done = driver.unplug(instance.body(), device).await;
    assert!(matches!(&done, Err(DriverError::TimedOut(why)) if why.contains("QEMU did not answer")), "{done:?}");
}

#[tokio::test]
async fn what_a_deaf_qemu_was_told_is_taken_back_when_it_hears_again() {
    let (instance, mut peer, _reports, _) = guest("exec sleep 1000").await;
    let done = vec![("object-del", json!({ "id": "rng" })), ("device_del", json!({ "id": "rng0" }))];
    plug::take_back(instance.body(), done, &DriverError::TimedOut(String::new())).await;
    for command in ["device_del", "object-del"] {
        let mut line = String::new();
        peer.read_line(&mut line).await.unwrap();
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["execute"], command);
    }
}

#[tokio::test]
async fn a_controller_that_cannot_be_taken_back_stays_in_what_runs() {
    let (instance, mut peer, _reports, _) = guest("exec sleep 1000").await;
    let controller = "<controller type='scsi' index='0' model='virtio-scsi'><alias name='scsi0'/></controller>";
    let (before, mut def) = (with_devices(""), with_devices(&format!("{controller}{RNG}")));
    let there = "\"return\": [{ \"name\": \"scsi0\", \"type\": \"child<virtio-scsi-pci>\" }]";
    tokio::join!(plug::leave_what_stays(instance.body(), &before, &mut def), answer(&mut peer, "", there));
    let aliases: Vec<_> = def.devices.infos().into_iter().filter_map(|(info, _)| info.alias()).collect();
    assert_eq!(aliases, ["scsi0"]);
}

/// All that a device stands on is told at once; of the device itself QEMU hears when that is there.
#[tokio::test]
async fn a_device_is_not_told_of_where_what_it_stands_on_was_refused() {
    let (instance, mut peer, _reports, _) = guest("exec sleep 1000").await;
    let dir = tempfile::tempdir().unwrap();
    let driver = QemuDriver::new(&DriverConfig::below(dir.path(), false));
    let image = dir.path().join("image");
    std::fs::write(&image, vec![0; 1 << 16]).unwrap();
    let disk = format!(
        "<disk type='file' device='disk'><driver type='raw'/><source file='{}'/><target dev='vdb' bus='virtio'/>
         <alias name='virtio-disk1'/></disk>",
        image.display()
    );
    let (before, mut def) = (with_devices(""), with_devices(&disk));
    let attachment = Attachment { before: &before, alias: "virtio-disk1", image: None };
    let qemu = async {
        let mut told = Vec::new();
        for _ in 0..2 {
            let mut line = String::new();
            peer.read_line(&mut line).await.unwrap();
            told.push(serde_json::from_str::<Value>(&line).unwrap());
        }
        assert_eq!([&told[0]["execute"], &told[1]["execute"]], ["blockdev-add", "blockdev-add"]);
        for (told, answer) in
            told.iter().zip(["\"return\": {}", "\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}"])
        {
            let answer = format!("{{{answer}, \"id\": {}}}\n", told["id"]);
            peer.get_mut().write_all(answer.as_bytes()).await.unwrap();
        }
        let undone = asked(&mut peer, "blockdev-del", "").await;
        assert_eq!(undone["node-name"], told[0]["arguments"]["node-name"]);
        answer(&mut peer, "", "\"return\": []").await;
    };
    let (plugged, ()) = tokio::join!(driver.plug(instance.body(), &mut def, attachment, dir.path()), qemu);
    let refused = plugged.unwrap_err();
    assert!(matches!(&refused, DriverError::Hypervisor(why) if why.contains("blockdev-add: no")), "{refused}");
    assert!(def.devices.disks.is_empty());
}

const STICK: &str = "<hostdev type='usb'><source><vendor id='0x0951'/><product id='0x1666'/></source>\
                     <alias name='hostdev0'/></hostdev>";
/// What the other end of a monitor is asked, and answers with nothing; events that follow.
async fn asked(peer: &mut Peer, verb: &str, told: &str) -> Value {
    let mut line = String::new();
    peer.read_line(&mut line).await.unwrap();
    let asked: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(asked["execute"], verb, "{asked}");
    let id = &asked["id"];
    peer.get_mut().write_all(format!("{{\"return\": {{}}, \"id\": {id}}}\n{told}").as_bytes()).await.unwrap();
    asked["arguments"].clone()
}

/// A host with two sticks on USB.
fn host() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (number, product) in [("4", "1666"), ("5", "1667")] {
        let stick = dir.path().join("bus/usb/devices").join(format!("1-{number}"));
        std::fs::create_dir_all(&stick).unwrap();
        for (file, text) in [("busnum", "1"), ("devnum", number), ("idVendor", "0951"), ("idProduct", product)] {
            std::fs::write(stick.join(file), text).unwrap();
        }
    }
    dir
}

/// The kernel of few hosts that run tests has USB: here is what virtd itself does, and what it tells QEMU.
#[tokio::test]
async fn a_device_of_the_hosts_that_is_plugged_in_is_the_guests_until_it_is_unplugged() {
    let (instance, mut peer, _reports, _) = guest("exec sleep 1000").await;
    let (dir, host) = (tempfile::tempdir().unwrap(), host());
    let driver = QemuDriver::new(&DriverConfig::below(dir.path(), false));
    let (body, other) = (instance.body(), Uuid::new_v4());
    let claims = &body.leavings.claims;
    let [stick, second] = [4, 5].map(|number| [format!("the USB device at bus 1, device {number}")]);
    let mut before = with_devices("");
    for (product, alias) in [("0x1666", "hostdev0"), ("0x1667", "hostdev1")] {
        let device = STICK.replace("0x1666", product).replace("hostdev0", alias);
        let mut def = before.with_device(virt_model::xml::read(&device, &[]).unwrap()).unwrap();
        let attachment = Attachment { before: &before, alias, image: None };
        let plugged = driver.plug(body, &mut def, attachment, host.path());
        let (plugged, told) = tokio::join!(plugged, asked(&mut peer, "device_add", ""));
        plugged.unwrap();
        let node = if alias == "hostdev0" { "/dev/bus/usb/001/004" } else { "/dev/bus/usb/001/005" };
        assert_eq!(told["hostdevice"], node);
        assert_eq!(body.keeper.without(alias).unwrap().0.unwrap().files, [Path::new(node)]);
        before = def;
    }
    assert_eq!(before.devices.hostdevs[0].usb(), None, "its place is nobody's to keep");
    let taken = claims.take(other, "other", &stick).unwrap_err().to_string();
    assert_eq!(taken, "the USB device at bus 1, device 4 is in use by domain 'd'");

    let gone = "{\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"hostdev0\", \"path\": \"/\"}}\n";
    let device = Detachment { def: &before, alias: "hostdev0", patience: Duration::from_secs(60) };
    let (done, told) = tokio::join!(driver.unplug(body, device), asked(&mut peer, "device_del", gone));
    done.unwrap();
    assert_eq!(told["id"], "hostdev0");
    assert!(body.keeper.without("hostdev0").unwrap().0.is_none());
    claims.take(other, "other", &stick).unwrap();
    claims.take(other, "other", &second).unwrap_err();
    assert!(body.keeper.without("hostdev1").unwrap().0.is_some(), "the other one stays its");
}

#[tokio::test]
async fn what_qemu_does_not_take_of_the_hosts_is_nobodys_again() {
    let (instance, mut peer, _reports, _) = guest("exec sleep 1000").await;
    let (dir, host) = (tempfile::tempdir().unwrap(), host());
    let driver = QemuDriver::new(&DriverConfig::below(dir.path(), false));
    let (body, other, before) = (instance.body(), Uuid::new_v4(), with_devices(""));
    let stick = ["the USB device at bus 1, device 4".to_owned()];
    let attach = async |def: &mut DomainDef| {
        let attachment = Attachment { before: &before, alias: "hostdev0", image: None };
        driver.plug(body, def, attachment, host.path()).await
    };
    let mut def = with_devices(STICK);
    let error = "\"error\": {\"class\": \"GenericError\", \"desc\": \"failed to open host usb device\"}";
    let refuses = async {
        answer(&mut peer, "", error).await;
        answer(&mut peer, "", "\"return\": []").await;
    };
    let (plugged, ()) = tokio::join!(attach(&mut def), refuses);
    assert!(plugged.unwrap_err().to_string().contains("failed to open host usb device"));
    assert!(def.devices.hostdevs.is_empty());
    assert!(body.keeper.without("hostdev0").unwrap().0.is_none());
    body.leavings.claims.take(other, "other", &stick).unwrap();

    let refused = attach(&mut with_devices(STICK)).await.unwrap_err().to_string();
    assert_eq!(refused, "the USB device at bus 1, device 4 is in use by domain 'other'");
    let absent = attach(&mut with_devices(&STICK.replace("0x1666", "0x1668"))).await.unwrap_err().to_string();
    assert!(absent.contains("the USB device 0951:1668 is not plugged in"), "{absent}");
    let optional = STICK.replace("<source>", "<source startupPolicy='optional'>").replace("0x1666", "0x1668");
    let absent = attach(&mut with_devices(&optional)).await.unwrap_err().to_string();
    assert!(absent.contains("not plugged into the host"), "{absent}");
}

const FUNCTIONS: [&str; 2] = ["0000:06:00.0", "0000:06:00.1"];

/// A guest that has these parts of a host.
async fn guest_of(parts: Vec<HostPart>) -> (QemuInstance, Peer) {
    let (instance, peer, _, _) = guest("exec sleep 1000").await;
    let body = instance.body();
    body.leavings.claims.take(body.uuid, "d", &HostPart::claims_of(&parts)).unwrap();
    body.keeper.change(move |record| record.host_parts = parts).await.unwrap();
    (instance, peer)
}

/// One function of a card on PCI, which is in the group 7.
fn function(alias: &str, pci: &str) -> HostPart {
    HostPart {
        alias: alias.to_owned(),
        claims: vec![Claims::group("7")],
        changes: vec![Change::Detached { pci: pci.to_owned(), driven: true }],
        files: vec!["/dev/vfio/7".into(), "/dev/vfio/vfio".into()],
    }
}

#[tokio::test]
async fn a_card_is_the_hosts_again_with_the_last_of_its_functions() {
    let (host, _) = pci_host(&FUNCTIONS.map(|pci| (pci, "7", Some(VFIO))));
    let choices = FUNCTIONS.map(|pci| host.path().join("bus/pci/devices").join(pci).join("driver_override"));
    choices.iter().for_each(|choice| std::fs::write(choice, VFIO).unwrap());
    let chosen = || choices.each_ref().map(|choice| std::fs::read_to_string(choice).unwrap());
    let (instance, _peer) =
        guest_of(vec![function("hostdev0", FUNCTIONS[0]), function("hostdev1", FUNCTIONS[1])]).await;
    let (body, other, group) = (instance.body(), Uuid::new_v4(), [Claims::group("7")]);
    let gives_up = async |alias: &str| body.gives_up_within(Duration::from_secs(60), alias, host.path()).await;
    assert!(gives_up("hostdev1").await.is_empty());
    assert_eq!(chosen(), [VFIO, VFIO], "the guest has the rest of the group");
    body.leavings.claims.take(other, "other", &group).unwrap_err();
    assert_eq!(gives_up("hostdev0").await, [Path::new("/dev/vfio/7"), Path::new("/dev/vfio/vfio")]);
    assert_eq!(chosen(), ["\n", "\n"]);
    body.leavings.claims.take(other, "other", &group).unwrap();
    assert_eq!(body.keeper.close(), Undoing::default());
}

#[tokio::test]
async fn what_the_host_does_not_have_back_in_time_is_undone_when_the_guest_ends() {
    let (host, _) = pci_host(&[(FUNCTIONS[0], "7", Some(VFIO))]);
    // Whoever reads it waits until it is written.
    let choice = host.path().join("bus/pci/devices").join(FUNCTIONS[0]).join("driver_override");
    nix::unistd::mkfifo(&choice, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let part = function("hostdev0", FUNCTIONS[0]);
    let (instance, _peer) = guest_of(vec![part.clone()]).await;
    let body = instance.body();
    assert!(body.gives_up_within(Duration::from_millis(10), "hostdev0", host.path()).await.is_empty());
    assert_eq!(body.keeper.without("hostdev0").unwrap().0, Some(part.clone()));
    body.leavings.claims.take(Uuid::new_v4(), "other", &part.claims).unwrap_err();
    // Another device of that name is given up with it.
    let second = function("hostdev0", FUNCTIONS[1]);
    let changes = [part.changes, second.changes.clone()].concat();
    body.keeper.change(move |record| record.host_parts.push(second)).await.unwrap();
    let (both, rest) = body.keeper.without("hostdev0").unwrap();
    assert_eq!((both.unwrap().changes, rest.host_parts), (changes.clone(), Vec::new()));
    assert_eq!(body.keeper.close(), Undoing { changes, filtered: false });
    std::fs::write(&choice, "").unwrap();
}

#[tokio::test]
async fn a_card_that_qemu_does_not_take_leaves_no_filter() {
    if !is_inside("qemu::instance::tests::plugging::a_card_that_qemu_does_not_take_leaves_no_filter") {
        return;
    }
    run("ip link add br0 type bridge");
    let filters = || run("nft list tables").matches("virt_tap_").count();
    let (instance, mut peer, _reports, _) = guest("exec sleep 1000").await;
    let dir = tempfile::tempdir().unwrap();
    let driver = QemuDriver::new(&DriverConfig::below(dir.path(), false));
    let card = "<interface type='bridge'><mac address='52:54:00:00:00:05'/><source bridge='br0'/><model type='virtio'/>\
                <driver name='qemu'/><filterref filter='no-mac-spoofing'/><alias name='net0'/></interface>";
    let (before, mut def) = (with_devices(""), with_devices(card));
    let attachment = Attachment { before: &before, alias: "net0", image: None };
    let plugged = driver.plug(instance.body(), &mut def, attachment, Path::new("/sys"));
    let refuses = async {
        let mut line = String::new();
        while peer.read_line(&mut line).await.unwrap() > 0 {
            let asked: Value = serde_json::from_str(&line).unwrap();
            let mut reply = match asked["execute"].as_str().unwrap() {
                "netdev_add" => {
                    assert_eq!(filters(), 1, "it is there before the card");
                    json!({ "error": { "class": "GenericError", "desc": "no card today" } })
                }
                "qom-list" => json!({ "return": [] }),
                _ => json!({ "return": {} }),
            };
            reply["id"] = asked["id"].clone();
            peer.get_mut().write_all(format!("{reply}\n").as_bytes()).await.unwrap();
            line.clear();
        }
    };
    let plugged = tokio::select! {
        plugged = plugged => plugged,
        () = refuses => panic!("the monitor ends"),
    };
    let why = plugged.unwrap_err().to_string();
    assert!(why.contains("no card today"), "{why}");
    assert_eq!(filters(), 0);
    assert!(instance.body().keeper.close().filtered, "it is on record before there is one");
}

/// A card on the host's PCI.
const CARD: &str = "<hostdev mode='subsystem' type='pci' managed='yes'><source><address bus='6' slot='0' function='0'/></source>\
                    <alias name='hostdev0'/><address type='pci' domain='0' bus='0' slot='5' function='0'/></hostdev>";

#[tokio::test]
async fn what_qemu_kept_in_place_for_a_card_it_need_not_keep_when_that_has_gone() {
    let ours = std::fs::read_to_string("/proc/self/limits").unwrap();
    let limit = |told: &str| told.lines().find(|line| line.starts_with("Max locked memory")).unwrap().to_owned();
    let (instance, mut peer, _reports, pid) = guest("exec sleep 1000").await;
    let (dir, def) = (tempfile::tempdir().unwrap(), with_devices(CARD));
    let driver = QemuDriver::new(&DriverConfig::below(dir.path(), false));
    // Any other than ours: to let it keep more than we may takes a right that not every root has.
    let ours_at_most = getrlimit(Resource::Memlock);
    let other = Rlimit { current: Some(4096), ..ours_at_most };
    prlimit(Pid::from_raw(pid), Resource::Memlock, other).unwrap();
    let now = || limit(&std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap());
    assert_ne!(now(), limit(&ours));
    let (gone, ()) =
        tokio::join!(driver.has_gone(instance.body(), &def, "hostdev0"), answer(&mut peer, "", "\"return\": []"));
    assert!(gone.unwrap());
    assert_eq!(now(), limit(&ours));
}

#[tokio::test]
async fn what_a_deaf_qemu_has_not_got_is_told_when_it_hears_again() {
    let (instance, mut peer, mut reports, _) = guest("exec sleep 1000").await;
    let (dir, host) = (tempfile::tempdir().unwrap(), host());
    let driver = QemuDriver::new(&DriverConfig::below(dir.path(), false));
    let (body, before, mut def) = (instance.body(), with_devices(""), with_devices(STICK));
    let (stick, other) = (["the USB device at bus 1, device 4".to_owned()], Uuid::new_v4());
    let attachment = Attachment { before: &before, alias: "hostdev0", image: None };
    let hears_nothing = async {
        let mut line = String::new();
        peer.read_line(&mut line).await.unwrap();
        assert!(line.contains("device_add"), "{line}");
        // From here on nobody does anything but wait.
        tokio::time::pause();
    };
    let (plugged, ()) = tokio::join!(driver.plug(body, &mut def, attachment, host.path()), hears_nothing);
    tokio::time::resume();
    assert!(matches!(plugged, Err(DriverError::TimedOut(_))), "{plugged:?}");
    assert_eq!(def.devices.hostdevs.len(), 1, "it may have it");
    body.leavings.claims.take(other, "other", &stick).unwrap_err();

    let mut line = String::new();
    peer.read_line(&mut line).await.unwrap();
    assert!(line.contains("device_del"), "{line}");
    answer(&mut peer, "", "\"return\": []").await;
    assert_eq!(reports.recv().await, Some(DriverEvent::DeviceGone("hostdev0".to_owned())));
    let (gone, ()) = tokio::join!(driver.has_gone(body, &def, "hostdev0"), answer(&mut peer, "", "\"return\": []"));
    assert!(gone.unwrap());
    body.leavings.claims.take(other, "other", &stick).unwrap();
}
