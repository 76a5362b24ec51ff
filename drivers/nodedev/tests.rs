//! Hosts that are folders: what is told of their devices, and what is done to them.

use super::follow::Touched;
use super::uevent::Uevent;
use super::*;
use crate::host::pci::tests::host as pci_host;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use virt_model::nodedev::{PortParent, WideNames};

/// A host in a folder.
struct Fake {
    folder: tempfile::TempDir,
    host: Host,
}

impl Fake {
    fn new() -> Fake {
        // In memory, where there is such a place: there are many files.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let at = |name: &str| folder.path().canonicalize().unwrap().join(name);
        for name in ["sys/devices", "proc/self/net", "udev/data", "lists"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        let (sys, proc, udev) = (at("sys"), at("proc"), at("udev"));
        let host = Host {
            sys,
            proc,
            udev,
            lists: vec![at("lists")],
            vfio: at("vfio"),
            is_open: |group| fs::metadata(group).is_ok(),
        };
        Fake { folder, host }
    }

    /// A device, listed in `list` below `sys`, with attributes.
    fn plug(&self, folder: &str, list: &str, subsystem: &str, attributes: &[(&str, &str)]) -> PathBuf {
        let device = self.host.sys.join("devices").join(folder);
        fs::create_dir_all(&device).unwrap();
        for (name, text) in attributes {
            fs::create_dir_all(device.join(name).parent().unwrap()).unwrap();
            fs::write(device.join(name), format!("{text}\n")).unwrap();
        }
        self.link(&device.join("subsystem"), &format!("{list}/{subsystem}"));
        let folders = self.host.sys.join(list).join(subsystem);
        let folders = if list == "bus" { folders.join("devices") } else { folders };
        fs::create_dir_all(&folders).unwrap();
        symlink(&device, folders.join(device.file_name().unwrap())).unwrap();
        device
    }

    /// A link to a folder below `sys`, which is made.
    fn link(&self, link: &Path, to: &str) {
        let to = self.host.sys.join(to);
        fs::create_dir_all(&to).unwrap();
        symlink(to, link).unwrap();
    }

    fn devices(&self) -> Arc<LinuxDevices> {
        let (host, pci) = (self.host.clone(), Pci::below(&self.host.sys));
        Arc::new(LinuxDevices {
            host,
            pci,
            claims: Claims::default(),
            takes: true,
            most: MOST,
            patience: PATIENCE,
            write: kernel,
            inventory: Mutex::default(),
        })
    }
}

/// What Linux does when these files are written, which are there: what makes a device makes its folder, and what ends it takes that away.
fn kernel(file: &Path, text: &str) -> io::Result<()> {
    fs::metadata(file)?;
    let above = |levels: usize| file.ancestors().nth(levels).unwrap();
    let sys = file.ancestors().find(|folder| folder.ends_with("sys")).unwrap();
    let made = |device: &Path, subsystem: &str, attributes: &[(&str, &str)]| {
        for (name, text) in attributes {
            fs::create_dir_all(device.join(name).parent().unwrap()).unwrap();
            fs::write(device.join(name), text).unwrap();
        }
        symlink(sys.join("bus").join(subsystem), device.join("subsystem"))
    };
    match file.file_name().unwrap().to_str().unwrap() {
        "create" => {
            let device = above(3).join(text);
            made(&device, "mdev", &[("remove", "")])?;
            symlink(above(1), device.join("mdev_type"))
        }
        "remove" if text == "1" => fs::remove_dir_all(above(1)),
        "vport_create" => {
            let (port, node) = text.split_once(':').unwrap();
            let names = [
                ("uevent", "DEVTYPE=scsi_host"),
                ("fc_host/host9/node_name", &*format!("0x{node}")),
                ("fc_host/host9/port_name", &*format!("0x{port}")),
            ];
            made(&above(3).join("vport-2:0-0/host9"), "scsi", &names)
        }
        "vport_delete" if text == "10000000c9831b4b:20000000c9831b4b" => {
            fs::remove_dir_all(above(3).join("vport-2:0-0"))
        }
        other => panic!("{other}: {text}"),
    }
}

const ALL: Touched = Touched { folders: BTreeSet::new(), all: true, awaited: BTreeMap::new() };

/// Each device's name, class and parent.
fn told(news: &[DeviceNews]) -> Vec<String> {
    let word = |news: &DeviceNews| match news {
        DeviceNews::Is(device) => {
            format!("{} {} < {}", device.class(), device.name, device.parent.as_deref().unwrap_or("-"))
        }
        DeviceNews::Gone(name) => format!("- {name}"),
        DeviceNews::AllTold => "all".to_owned(),
    };
    let mut told: Vec<String> = news.iter().map(word).collect();
    told.sort();
    told
}

fn find(news: &[DeviceNews], name: &str) -> NodeDevice {
    let found = news.iter().find_map(|news| match news {
        DeviceNews::Is(device) if &*device.name == name => Some(NodeDevice::clone(device)),
        _ => None,
    });
    found.unwrap_or_else(|| panic!("no {name} in {:?}", told(news)))
}

/// A network card with functions and virtual devices, and its network device.
fn plug_cards(fake: &Fake) {
    let card = fake.plug(
        "pci0000:00/0000:00:03.0",
        "bus",
        "pci",
        &[
            ("class", "0x020000"),
            ("vendor", "0x8086"),
            ("device", "0x10ca"),
            ("numa_node", "-1"),
            ("sriov_totalvfs", "7"),
            ("mdev_supported_types/t-1/name", "T"),
            ("mdev_supported_types/t-1/device_api", "vfio-pci"),
            ("mdev_supported_types/t-1/available_instances", "3"),
        ],
    );
    fake.link(&card.join("iommu_group"), "kernel/iommu_groups/7");
    fs::create_dir_all(fake.host.sys.join("kernel/iommu_groups/7/devices/0000:00:03.0")).unwrap();
    fake.link(&card.join("driver"), "bus/pci/drivers/igb");
    let function = fake.plug("pci0000:00/0000:00:03.1", "bus", "pci", &[("class", "0x020000")]);
    symlink(&card, function.join("physfn")).unwrap();
    symlink(&function, card.join("virtfn0")).unwrap();
    let net =
        [("address", "52:54:00:00:00:01"), ("operstate", "up"), ("speed", "1000"), ("type", "1"), ("ifindex", "2")];
    fake.plug("pci0000:00/0000:00:03.0/net/eth0", "class", "net", &net);
}

fn plug_disks(fake: &Fake) {
    let disk = [
        ("uevent", "DEVTYPE=disk\nDEVNAME=vda\nMAJOR=254\nMINOR=0"),
        ("dev", "254:0"),
        ("size", "2048"),
        ("serial", "s-1"),
    ];
    let disk = fake.plug("pci0000:00/0000:00:04.0/virtio1/block/vda", "class", "block", &disk);
    symlink("..", disk.join("device")).unwrap();
    let part = [("uevent", "DEVTYPE=partition\nDEVNAME=vda1"), ("dev", "254:1"), ("partition", "1")];
    fake.plug("pci0000:00/0000:00:04.0/virtio1/block/vda/vda1", "class", "block", &part);
    fake.plug("virtual/block/loop0", "class", "block", &[("uevent", "DEVTYPE=disk\nDEVNAME=loop0")]);
    fake.plug(
        "virtual/block/loop1",
        "class",
        "block",
        &[("uevent", "DEVTYPE=disk\nDEVNAME=loop1"), ("loop/backing_file", "/srv/a.img")],
    );
}

fn plug_usb(fake: &Fake) {
    fake.plug(
        "pci0000:00/0000:00:05.0/usb1",
        "bus",
        "usb",
        &[
            ("uevent", "DEVTYPE=usb_device\nDEVNAME=bus/usb/001/001\nMAJOR=189\nMINOR=0"),
            ("busnum", "1"),
            ("devnum", "1"),
            ("bDeviceClass", "09"),
        ],
    );
    fake.plug(
        "pci0000:00/0000:00:05.0/usb1/1-1",
        "bus",
        "usb",
        &[
            ("uevent", "DEVTYPE=usb_device\nDEVNAME=bus/usb/001/004\nMAJOR=189\nMINOR=3"),
            ("busnum", "1"),
            ("devnum", "4"),
            ("bDeviceClass", "00"),
            ("idVendor", "0951"),
            ("idProduct", "1666"),
            ("manufacturer", "King\u{202e}ston"),
        ],
    );
    fake.plug(
        "pci0000:00/0000:00:05.0/usb1/1-1/1-1:1.0",
        "bus",
        "usb",
        &[("uevent", "DEVTYPE=usb_interface"), ("bInterfaceNumber", "00"), ("bInterfaceClass", "08")],
    );
}

fn plug_scsi(fake: &Fake) {
    let host = "pci0000:00/0000:00:06.0/host2";
    fake.plug(
        host,
        "bus",
        "scsi",
        &[
            ("uevent", "DEVTYPE=scsi_host"),
            ("scsi_host/host2/unique_id", "1"),
            ("fc_host/host2/node_name", "0x2000001b32a9da4e"),
            ("fc_host/host2/port_name", "0x2100001b32a9da4e"),
        ],
    );
    fake.plug(&format!("{host}/target2:0:0"), "bus", "scsi", &[("uevent", "DEVTYPE=scsi_target")]);
    let unit = format!("{host}/target2:0:0/2:0:0:1");
    fake.plug(&unit, "bus", "scsi", &[("uevent", "DEVTYPE=scsi_device"), ("type", "5"), ("model", "DVD")]);
    fake.plug(&format!("{unit}/scsi_generic/sg0"), "class", "scsi_generic", &[("uevent", "DEVNAME=sg0")]);
}

/// A host with a device of each class.
fn with_all() -> Fake {
    let fake = Fake::new();
    plug_cards(&fake);
    plug_disks(&fake);
    plug_usb(&fake);
    plug_scsi(&fake);
    fake.plug("pci0000:00/0000:00:02.0/drm/card0", "class", "drm", &[("uevent", "DEVNAME=dri/card0")]);
    fake.plug("pci0000:00/0000:00:02.0/drm/card0/card0-HDMI-A-1", "class", "drm", &[]);
    let mdev = "pci0000:00/0000:00:03.0/c2177883-f1bb-47f0-914d-32a22e3a8804";
    let mdev = fake.plug(mdev, "bus", "mdev", &[]);
    fake.link(&mdev.join("mdev_type"), "devices/pci0000:00/0000:00:03.0/mdev_supported_types/t-1");
    fake
}

#[test]
fn a_device_of_each_class_is_found_with_its_name_and_parent() {
    let fake = with_all();
    let news = fake.devices().look_again(&ALL);
    assert_eq!(
        told(&news),
        [
            "drm drm_card0 < computer",
            "mdev mdev_c2177883_f1bb_47f0_914d_32a22e3a8804_0000_00_03_0 < pci_0000_00_03_0",
            "net net_eth0_52_54_00_00_00_01 < pci_0000_00_03_0",
            "pci pci_0000_00_03_0 < computer",
            "pci pci_0000_00_03_1 < computer",
            "scsi scsi_2_0_0_1 < scsi_target2_0_0",
            "scsi_generic scsi_generic_sg0 < scsi_2_0_0_1",
            "scsi_host scsi_host2 < computer",
            "scsi_target scsi_target2_0_0 < scsi_host2",
            "storage block_loop1 < computer",
            "storage block_vda_s_1 < computer",
            "system computer < -",
            "usb usb_1_1_1_0 < usb_1_1",
            "usb_device usb_1_1 < usb_usb1",
            "usb_device usb_usb1 < computer",
        ]
    );
    let card = find(&news, "pci_0000_00_03_0");
    assert_eq!(card.capabilities(), ["sriov", "mdev_types"]);
    assert_eq!((card.assignable(), card.group(), card.driver.as_deref()), ("no-vfio", Some(7), Some("igb")));
    assert_eq!(card.sys_path, "/sys/devices/pci0000:00/0000:00:03.0");
    let text = card.document();
    for part in [
        "<iommuGroup number='7'>\n      <address domain='0x0000' bus='0x00' slot='0x03' function='0x0'/>",
        "<capability type='virt_functions' maxCount='7'>\n      <address domain='0x0000' bus='0x00' slot='0x03' function='0x1'/>",
        "<availableInstances>3</availableInstances>",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains("<numa"), "{text}");
    assert_eq!(find(&news, "pci_0000_00_03_1").capabilities(), ["phys_function"]);
    let stick = find(&news, "usb_1_1");
    assert_eq!((stick.assignable(), find(&news, "usb_usb1").assignable()), ("yes", "bridge"));
    assert_eq!(stick.vendor.name, "King\\u{202e}ston", "what deceives is spelled out");
    assert_eq!(stick.nodes, ["/dev/bus/usb/001/004"]);
    assert_eq!(find(&news, "scsi_host2").fibre(), Some(("2000001b32a9da4e", "2100001b32a9da4e")));
    let About::Storage(disk) = find(&news, "block_vda_s_1").about else { panic!() };
    assert_eq!((&*disk.bus, disk.kind, disk.size, disk.sector), ("virtio", "disk", 1 << 20, 512));
}

#[tokio::test]
async fn a_mediated_device_and_a_virtual_port_are_made_and_ended() {
    let fake = with_all();
    let devices = fake.devices();
    let news = devices.look_again(&ALL);
    let (card, host) = (find(&news, "pci_0000_00_03_0"), find(&news, "scsi_host2"));
    let uuid = uuid::Uuid::from_u128(7);
    let mdev = NewDevice::Mdev { parent: card.name.to_string(), kind: "t-1".into(), uuid };
    let none = devices.make(&card, &mdev).await.unwrap_err();
    assert!(matches!(&none, DriverError::Unsupported(why) if why.contains("its driver makes none")), "{none}");
    let at = |file: &str| fs::write(fake.host.sys.join("devices/pci0000:00").join(file), "").unwrap();
    at("0000:00:03.0/mdev_supported_types/t-1/create");
    let (name, news) = devices.make(&card, &mdev).await.unwrap();
    assert_eq!(told(&news), [format!("mdev {name} < pci_0000_00_03_0")]);
    let made = devices.read(&name).await.unwrap().expect("it is known");
    assert!(made.is_made() && made.document().contains("<type id='t-1'/>"), "{}", made.document());
    assert_eq!(told(&devices.look_again(&ALL)), ["system computer < -"], "what the kernel tells of it is known");
    fake.link(
        &fake.host.sys.join("devices/pci0000:00/0000:00:03.0").join(uuid.to_string()).join("iommu_group"),
        "groups/12",
    );
    let made = devices.read(&name).await.unwrap().expect("it is in a group now");
    fs::create_dir(&fake.host.vfio).unwrap();
    fs::write(fake.host.vfio.join("12"), "").unwrap();
    let DriverError::Refused(why) = devices.end(&made).await.unwrap_err() else { panic!() };
    assert!(why.contains("a process has") && why.contains("vfio/12 open"), "{why}");
    fs::remove_file(fake.host.vfio.join("12")).unwrap();
    assert_eq!(told(&devices.end(&made).await.unwrap()), [format!("- {name}")]);
    assert!(devices.read(&name).await.unwrap().is_none());
    assert!(devices.end(&made).await.is_err(), "it has gone");

    let names = WideNames { node: "20000000c9831b4b".into(), port: "10000000c9831b4b".into() };
    let port = NewDevice::Port { parent: PortParent::Any, names };
    at("0000:00:06.0/host2/fc_host/host2/vport_create");
    at("0000:00:06.0/host2/fc_host/host2/vport_delete");
    let (name, news) = devices.make(&host, &port).await.unwrap();
    assert_eq!((&*name, told(&news)), ("scsi_host9", vec!["scsi_host scsi_host9 < scsi_host2".to_owned()]));
    let made = devices.read(&name).await.unwrap().expect("it is known");
    assert!(made.is_made() && !host.is_made());
    assert_eq!(told(&devices.end(&made).await.unwrap()), ["- scsi_host9"]);
    assert!(devices.read("scsi_host2").await.unwrap().is_some());
}

#[tokio::test]
async fn names_come_from_udev_and_else_from_lists() {
    let fake = with_all();
    fs::write(fake.host.lists[0].join("pci.ids"), "8086  Intel Corporation\n\t10ca  82576 Virtual Function\n").unwrap();
    fs::write(fake.host.udev.join("data/b254:0"), "S:disk/by-id/virtio-s-1\nE:ID_SERIAL=s-1\n").unwrap();
    fs::write(fake.host.udev.join("data/c189:3"), "E:ID_VENDOR_FROM_DATABASE=Kingston\n").unwrap();
    let devices = fake.devices();
    let news = devices.look_again(&ALL);
    let card = find(&news, "pci_0000_00_03_0");
    assert_eq!((&*card.vendor.name, &*card.product.name), ("Intel Corporation", "82576 Virtual Function"));
    assert_eq!(find(&news, "usb_1_1").vendor.name, "Kingston");
    fs::remove_file(fake.host.lists[0].join("pci.ids")).unwrap();
    assert_eq!(devices.read(&card.name).await.unwrap().as_ref(), Some(&card), "the list is not read again");
    assert_eq!(find(&news, "block_vda_s_1").nodes, ["/dev/vda", "/dev/disk/by-id/virtio-s-1"]);
}

fn event(action: &str, folder: &str, by_udev: bool) -> Uevent {
    let folder = PathBuf::from(folder);
    Uevent { action: action.into(), folder, before: None, subsystem: String::new(), by_udev }
}

#[test]
fn what_a_message_touches_is_looked_at_again_and_told_once() {
    let fake = with_all();
    let devices = fake.devices();
    devices.look_again(&ALL);
    assert_eq!(told(&devices.look_again(&ALL)), ["system computer < -"], "nothing has changed");
    let stick = "/devices/pci0000:00/0000:00:05.0/usb1/1-1";
    fs::remove_dir_all(fake.host.below_sys(Path::new(stick))).unwrap();
    let mut touched = Touched::default();
    touched.take(event("remove", &format!("{stick}/1-1:1.0"), false), true);
    touched.take(event("remove", stick, false), true);
    assert_eq!(told(&devices.look_again(&touched)), ["- usb_1_1", "- usb_1_1_1_0"]);
    let card = "/devices/pci0000:00/0000:00:03.0/net/eth1";
    fs::rename(fake.host.sys.join("devices/pci0000:00/0000:00:03.0/net/eth0"), fake.host.below_sys(Path::new(card)))
        .unwrap();
    let mut touched = Touched::default();
    let before = Some(PathBuf::from("/devices/pci0000:00/0000:00:03.0/net/eth0"));
    touched.take(Uevent { before, ..event("move", card, false) }, true);
    let moved = ["- net_eth0_52_54_00_00_00_01", "net net_eth1_52_54_00_00_00_01 < pci_0000_00_03_0"];
    assert_eq!(told(&devices.look_again(&touched)), moved);
}

#[tokio::test(start_paused = true)]
async fn where_udev_is_it_is_waited_for_and_not_for_ever() {
    let of = |by_udev, udev| {
        let mut touched = Touched::default();
        touched.take(event("add", "/devices/x", by_udev), udev);
        touched.folders.len()
    };
    assert_eq!([of(false, false), of(false, true), of(true, true)], [1, 0, 1]);
    let mut touched = Touched::default();
    for (folder, by_udev) in [("/devices/x", false), ("/devices/y", false), ("/devices/y", true)] {
        touched.take(event("add", folder, by_udev), true);
    }
    assert_eq!(touched.due().folders, [PathBuf::from("/devices/y")].into());
    tokio::time::advance(Duration::from_secs(60)).await;
    assert_eq!(touched.due().folders, [PathBuf::from("/devices/x")].into(), "udev said nothing");
    assert_eq!(touched, Touched::default());
    let mut touched = Touched::default();
    touched.take(event("add", "/module/vfio", false), false);
    assert_eq!(touched, Touched::default());
    touched.take(event("add", "/bus/pci/drivers/vfio-pci", false), true);
    assert!(touched.all, "every device may be assignable now");
}

#[test]
fn ten_thousand_devices_of_odd_names_are_listed_and_no_more_than_the_most() {
    let fake = Fake::new();
    let class = fake.host.sys.join("class/net");
    fs::create_dir_all(&class).unwrap();
    let plug = |number: usize| {
        let name = [&b"\xff'<>&"[..], number.to_string().as_bytes()].concat();
        let device = fake.host.sys.join("devices").join(std::ffi::OsStr::from_bytes(&name));
        fs::create_dir(&device).unwrap();
        symlink(&class, device.join("subsystem")).unwrap();
        symlink(&device, class.join(device.file_name().unwrap())).unwrap();
    };
    (0..10_000).for_each(plug);
    let devices = fake.devices();
    let news = devices.look_again(&ALL);
    assert_eq!(news.len(), 10_001, "and the host");
    for news in &news {
        let DeviceNews::Is(device) = news else { panic!() };
        assert!(device.name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'), "{}", device.name);
        assert!(device.document().contains(&format!("<name>{}</name>", device.name)));
    }
    let few = LinuxDevices { most: 5, ..Arc::into_inner(fake.devices()).unwrap() };
    few.look_again(&ALL);
    assert_eq!(few.inventory().len(), 5);
}

#[tokio::test]
async fn what_of_the_host_would_go_is_told() {
    let fake = with_all();
    let vda = "devices/pci0000:00/0000:00:04.0/virtio1/block/vda";
    let pv = [("dev", "253:0"), ("dm/name", "vg-root"), ("uevent", "DEVTYPE=disk\nDEVNAME=dm-0")];
    let mapped = fake.plug("virtual/block/dm-0", "class", "block", &pv);
    let path = [("uevent", "DEVTYPE=disk"), ("device/model", "Fast")];
    fake.plug("pci0000:00/0000:00:07.0/nvme/nvme0/nvme0c0n1", "class", "block", &path);
    fake.plug("virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "class", "block", &[("dev", "259:0")]);
    fs::create_dir_all(fake.host.sys.join(vda).join("vda1/holders")).unwrap();
    symlink(mapped, fake.host.sys.join(vda).join("vda1/holders/dm-0")).unwrap();
    let table = "22 1 254:1 / /boot\\040x rw - ext4 /dev/vda1 rw\n23 1 253:0 / / rw shared:1 - ext4 /dev/mapper/vg-root rw\n\
                 26 1 259:0 / /nvme rw - ext4 /dev/nvme0n1 rw\n24 1 0:40 / /data rw - btrfs /dev/vda rw\n25 1 0:5 / /proc rw - proc proc rw\n";
    fs::write(fake.host.proc.join("self/mountinfo"), table).unwrap();
    fs::write(fake.host.proc.join("swaps"), "Filename Type\n/dev/vda1 partition 1\n/dev/sdb partition 1\n").unwrap();
    let four = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\neth0\t00000000\t0101A8C0\t3\t0\t0\t0\t00000000\n\
                eth0\t0001A8C0\t00000000\t1\t0\t0\t0\t00FFFFFF\neth9\t0002A8C0\t00000000\t1\t0\t0\t0\t00FFFFFF\n\
                eth2\t0004A8C0\t00000000\t1\t0\t0\t0\t00FFFFFF\n\
                br0.5\t0003A8C0\t00000000\t1\t0\t0\t0\t00FFFFFF\n";
    fs::write(fake.host.proc.join("self/net/route"), four).unwrap();
    let zero = "0".repeat(32);
    let six = format!(
        "fe800000000000000000000000000000 40 {zero} 00 {zero} 00000100 1 0 00000001 eth0\n\
         fd000000000000000000000000000000 40 {zero} 00 {zero} 00000100 1 0 00000001 eth0\n"
    );
    fs::write(fake.host.proc.join("self/net/ipv6_route"), six).unwrap();
    fake.plug("pci0000:00/0000:00:03.1/net/eth2", "class", "net", &[]);
    let (bridge, vlan) =
        (fake.plug("virtual/net/br0", "class", "net", &[]), fake.plug("virtual/net/br0.5", "class", "net", &[]));
    symlink(&bridge, fake.host.sys.join("class/net/eth0/upper_br0")).unwrap();
    symlink(&vlan, bridge.join("upper_br0.5")).unwrap();
    symlink("/etc", bridge.join("upper_else")).unwrap();
    let devices = fake.devices();
    let news = devices.look_again(&ALL);
    let uses = devices.host_uses(&find(&news, "pci_0000_00_03_0")).await.unwrap();
    let words: Vec<String> = uses.iter().map(|(kind, what)| format!("{kind} {what}")).collect();
    let (routes, links) = words.split_at(5);
    let over = [
        "192.168.1.0/24 via eth0",
        "192.168.3.0/24 via br0.5",
        "192.168.4.0/24 via eth2",
        "default via eth0",
        "fd00::/64 via eth0",
    ];
    assert_eq!(routes, over.map(|route| format!("route {route}")));
    assert_eq!(links, ["link br0 on eth0", "link br0.5 on br0"]);
    let uses = devices.host_uses(&find(&news, "block_vda_s_1")).await.unwrap();
    let words: Vec<String> = uses.iter().map(|(kind, what)| format!("{kind} {what}")).collect();
    assert_eq!(words, ["mount /", "mount /boot x", "mount /data", "swap /dev/vda1"]);
    let disks = devices.disks(&find(&news, "block_vda_s_1")).await.unwrap();
    let nodes = ["/dev/dm-0", "/dev/mapper/vg-root", "/dev/vda", "/dev/vda1"];
    assert_eq!(disks.into_iter().collect::<BTreeSet<_>>(), nodes.map(PathBuf::from).into());
    assert!(devices.disks(&find(&news, "pci_0000_00_03_0")).await.unwrap().is_empty());
    let uses = devices.host_uses(&find(&news, "block_nvme0c0n1")).await.unwrap();
    assert_eq!(uses, [("mount", "/nvme".to_owned())]);
}

#[tokio::test]
async fn a_card_is_detached_reset_and_reattached_unless_a_guest_has_it() {
    const CARD: &str = "0000:06:00.0";
    const FUNCTION: &str = "0000:06:10.0";
    let (folder, pci) = pci_host(&[(CARD, "7", Some("e1000e")), (FUNCTION, "9", Some(VFIO))]);
    let sys = folder.path().canonicalize().unwrap();
    let device = sys.join("bus/pci/devices").join(CARD);
    symlink(sys.join("bus/pci"), device.join("subsystem")).unwrap();
    fs::write(device.join("class"), "0x020000\n").unwrap();
    fs::write(device.join("sriov_totalvfs"), "7\n").unwrap();
    symlink(sys.join("bus/pci/devices").join(FUNCTION), device.join("virtfn0")).unwrap();
    let fake = Fake::new();
    let (host, claims) = (Host { sys, ..fake.host.clone() }, Claims::default());
    let devices = Arc::new(LinuxDevices {
        host,
        pci,
        claims: claims.clone(),
        takes: true,
        most: MOST,
        patience: PATIENCE,
        write: kernel,
        inventory: Mutex::default(),
    });
    let card = find(&devices.look_again(&ALL), "pci_0000_06_00_0");
    assert_eq!((card.assignable(), card.detached()), ("yes", false));
    devices.detach(&card).await.unwrap();
    devices.detach(&card).await.expect("it is done already");
    let now = devices.read(&card.name).await.unwrap().unwrap();
    assert!(now.detached() && now.driver.as_deref() == Some(VFIO));
    devices.reset(&now).await.unwrap();
    assert_eq!(fs::read_to_string(device.join("reset")).unwrap(), "1");
    let guest = uuid::Uuid::from_u128(1);
    claims.take(guest, "web", &["IOMMU group 7".to_owned()]).unwrap();
    for refused in [devices.detach(&card).await, devices.reattach(&now, None).await, devices.reset(&now).await] {
        let DriverError::Refused(why) = refused.unwrap_err() else { panic!() };
        assert_eq!(why, "IOMMU group 7 is in use by domain 'web'");
    }
    claims.release(guest);
    claims.take(guest, "net", &["IOMMU group 9".to_owned()]).unwrap();
    let DriverError::Refused(why) = devices.detach(&card).await.unwrap_err() else { panic!() };
    assert_eq!(why, "IOMMU group 9 is in use by domain 'net'", "its virtual function is");
    claims.release(guest);
    devices.reattach(&now, Some(&DetachedDevice { driver: Some("e1000e".into()) })).await.unwrap();
    let now = devices.read(&card.name).await.unwrap().unwrap();
    assert_eq!((now.detached(), now.driver.as_deref()), (false, Some("e1000e")));
    assert_eq!(devices.read("pci_0000_07_00_0").await.unwrap(), None);
    drop(fake.folder);
}

#[test]
fn a_file_of_the_kernels_that_is_not_there_is_not_made() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("create");
    assert_eq!(made::write(&file, "7").unwrap_err().kind(), io::ErrorKind::NotFound);
    fs::write(&file, "").unwrap();
    made::write(&file, "7").unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "7");
}

#[tokio::test]
async fn of_what_the_kernel_has_not_made_in_time_nothing_else_is_made_before_that_ends() {
    let fake = with_all();
    let devices = fake.devices();
    let card = find(&devices.look_again(&ALL), "pci_0000_00_03_0");
    // Whoever writes it waits until it is read.
    let create = fake.host.sys.join("devices/pci0000:00/0000:00:03.0/mdev_supported_types/t-1/create");
    nix::unistd::mkfifo(&create, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut devices = Arc::into_inner(devices).unwrap();
    (devices.patience, devices.write) = (Duration::from_millis(10), made::write);
    let uuid = uuid::Uuid::from_u128(7);
    let mdev = NewDevice::Mdev { parent: card.name.to_string(), kind: "t-1".into(), uuid };
    assert!(matches!(devices.make(&card, &mdev).await.unwrap_err(), DriverError::TimedOut(_)));
    devices.patience = PATIENCE;
    for refused in [devices.make(&card, &mdev).await.map(drop), devices.detach(&card).await] {
        let DriverError::Refused(why) = refused.unwrap_err() else { panic!() };
        assert_eq!(why, "PCI device 0000:00:03.0 is in use by virtd, which makes a device of pci_0000_00_03_0");
    }
    assert_eq!(fs::read_to_string(&create).unwrap(), uuid.to_string());
}

#[tokio::test]
async fn what_the_kernel_does_not_let_go_of_is_not_waited_for() {
    const CARD: &str = "0000:06:00.0";
    let (folder, _) = pci_host(&[(CARD, "7", Some(VFIO))]);
    let sys = folder.path().canonicalize().unwrap();
    let device = sys.join("bus/pci/devices").join(CARD);
    symlink(sys.join("bus/pci"), device.join("subsystem")).unwrap();
    // Whoever writes it waits until it is read.
    let unbind = device.join("driver/unbind");
    nix::unistd::mkfifo(&unbind, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (fake, claims, patience) = (Fake::new(), Claims::default(), Duration::from_millis(10));
    let (host, pci) = (Host { sys: sys.clone(), ..fake.host.clone() }, Pci::below(&sys));
    let (claimed, most, inventory) = (claims.clone(), MOST, Mutex::default());
    let devices = LinuxDevices { host, pci, claims: claimed, takes: true, most, patience, write: kernel, inventory };
    let card = find(&devices.look_again(&ALL), "pci_0000_06_00_0");
    let late = devices.reattach(&card, None).await.unwrap_err();
    assert!(matches!(&late, DriverError::TimedOut(why) if why.contains("PCI device 0000:06:00.0")), "{late}");
    let devices = LinuxDevices { patience: PATIENCE, ..devices };
    for refused in [devices.reattach(&card, None).await, devices.reset(&card).await] {
        let DriverError::Refused(why) = refused.unwrap_err() else { panic!() };
        assert_eq!(why, "IOMMU group 7 is in use by virtd, which reattaches 0000:06:00.0");
    }
    assert_eq!(fs::read_to_string(&unbind).unwrap(), CARD);
    let guest = uuid::Uuid::from_u128(1);
    while claims.take(guest, "web", &["IOMMU group 7".to_owned()]).is_err() {
        tokio::task::yield_now().await;
    }
    assert_eq!(fs::read_to_string(sys.join("bus/pci/drivers_probe")).unwrap(), CARD, "it was done to its end");
}

/// This host, whatever it has, is only read.
#[tokio::test]
async fn the_devices_of_this_host_are_told_and_then_that_these_were_all() {
    let mut news = LinuxDevices::new(Claims::default(), false).follow();
    let mut names = Vec::new();
    loop {
        match news.recv().await.expect("they are followed") {
            DeviceNews::Is(device) => names.push(device.name.to_string()),
            DeviceNews::Gone(_) => {}
            DeviceNews::AllTold => break,
        }
    }
    assert!(names.contains(&COMPUTER.to_owned()) && names.len() > 1, "{names:?}");
}
