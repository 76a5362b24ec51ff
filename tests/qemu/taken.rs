//! What a host needs a kernel of its own for: devices that are taken from its drivers and given back, volume groups (`volume_group.rs`),
//! and a folder of another host's that is mounted (`shares.rs`). The host is the Linux guest with an IOMMU, in which this program runs
//! once more.

use crate::common::guest::lin_files;
use crate::common::have;
use crate::{shares, volume_group};
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use virt_drivers::host::macvtap::Macvtap;
use virt_drivers::nodedev::LinuxDevices;
use virt_drivers::qemu::Claims;
use virt_model::driver::DriverError;
use virt_model::driver::host_devices::{DetachedDevice, DeviceNews, HostDevices as _};
use virt_model::nodedev::NodeDevice;

/// On the kernel's command line of the guest.
const INSIDE: &str = "guest.takes";
/// What this program says there when all has been done.
const DONE: &str = "all has been done by a real kernel";
const CARD: &str = "pci_0000_00_05_0";
const DRIVER: &str = "e1000e";

/// What the guest begins with, over what it has of its own: the modules are there.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t devtmpfs d /dev; mount -t proc p /proc; mount -t sysfs s /sys
mkdir -p /run/lock
for m in loop $(cat /lib/mod/carried); do insmod /lib/mod/$m.ko; done
/sbin/test --exact taken::what_few_kernels_can_is_done_by_a_real_one --nocapture
poweroff -f
";

#[tokio::test]
async fn what_few_kernels_can_is_done_by_a_real_one() {
    if fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains(INSIDE)) {
        let devices = LinuxDevices::new(Claims::default(), true);
        let card = is_there(&devices).await;
        a_card_goes_to_vfio_and_comes_back(&devices, &card).await;
        a_macvtap_is_made_and_goes();
        volume_group::is_a_pool().await;
        shares::a_folder_of_another_host_is_a_pool().await;
        return println!("{DONE}");
    }
    if !have(&["ip", "lvm", "strip", "timeout"]) {
        return;
    }
    let Some((kernel, initrd)) = lin_files() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let all = folder.path().join("initrd");
    let mut archives = fs::read(initrd).expect("its initrd");
    // The kernel looks for the next one where four bytes begin.
    archives.resize(archives.len().next_multiple_of(4), 0);
    archives.extend(more_of_it(folder.path()));
    fs::write(&all, archives).expect("written");
    let machine = "300 qemu-system-x86_64 -M q35 -nodefaults -m 512 -accel tcg -no-reboot -display none -serial stdio \
                   -device intel-iommu -device e1000e,addr=5";
    let mut qemu = Command::new("timeout");
    qemu.args(machine.split_whitespace());
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(all).arg("-append");
    qemu.arg(format!(
        "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off nokaslr intel_iommu=on {INSIDE}"
    ));
    let said = qemu.stdin(Stdio::null()).stderr(Stdio::inherit()).output().expect("QEMU");
    let said = String::from_utf8_lossy(&said.stdout);
    assert!(said.contains(DONE), "{said}");
}

/// What is put over the guest's own files, as the kernel unpacks it: this program, `ip`, `lvm`, and the libraries of each.
fn more_of_it(folder: &Path) -> Vec<u8> {
    let test = folder.join("test");
    let own = std::env::current_exe().expect("this program");
    assert!(Command::new("strip").arg("-o").arg(&test).arg(own).status().expect("strip").success());
    let mut files = vec![("init".to_owned(), INIT.as_bytes().to_vec())];
    for (name, program) in [("sbin/test", test), ("usr/sbin/ip", found("ip")), ("sbin/lvm", found("lvm"))] {
        files.push((name.to_owned(), fs::read(&program).expect("a program")));
        let told = Command::new("ldd").arg(program).output().expect("ldd").stdout;
        let told = String::from_utf8_lossy(&told).into_owned();
        let libraries = told.split_whitespace().filter(|word| word.starts_with('/'));
        files.extend(libraries.map(|path| (path[1..].to_owned(), fs::read(path).expect("a library"))));
    }
    let mut archive = Vec::new();
    for (name, content) in files {
        let folders: Vec<&Path> = Path::new(&name).ancestors().skip(1).collect();
        for folder in folders.into_iter().rev().filter(|folder| !folder.as_os_str().is_empty()) {
            entry(&mut archive, 0o040_755, &folder.to_string_lossy(), &[]);
        }
        entry(&mut archive, 0o100_755, &name, &content);
    }
    entry(&mut archive, 0, "TRAILER!!!", &[]);
    archive
}

/// Where a program of this host is.
fn found(program: &str) -> PathBuf {
    let look = format!("PATH=$PATH:/usr/sbin:/sbin; command -v {program}");
    let found = Command::new("sh").args(["-c", &look]).output().expect("a shell").stdout;
    PathBuf::from(String::from_utf8_lossy(&found).trim())
}

/// One entry of a cpio archive in the format "newc".
fn entry(archive: &mut Vec<u8>, mode: u32, name: &str, content: &[u8]) {
    let mut numbers = [0; 13];
    (numbers[1], numbers[4], numbers[6], numbers[11]) = (mode, 1, content.len() as u32, name.len() as u32 + 1);
    let header: String = numbers.iter().map(|number| format!("{number:08x}")).collect();
    write!(archive, "070701{header}{name}\0").expect("in memory");
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// The guest's card, which is told with all others.
async fn is_there(devices: &Arc<LinuxDevices>) -> NodeDevice {
    let mut news = devices.clone().follow();
    loop {
        match news.recv().await.expect("all are told") {
            DeviceNews::Is(device) if *device.name == *CARD => return NodeDevice::clone(&device),
            DeviceNews::AllTold => panic!("there is no {CARD}"),
            _ => {}
        }
    }
}

async fn a_card_goes_to_vfio_and_comes_back(devices: &LinuxDevices, card: &NodeDevice) {
    let now = async || devices.read(CARD).await.expect("read").expect("it is there");
    assert_eq!((card.driver.as_deref(), card.assignable(), card.detached()), (Some(DRIVER), "yes", false));
    assert!(Path::new("/sys/class/net/eth0").exists());
    devices.detach(card).await.expect("detached");
    let taken = now().await;
    assert!(taken.detached() && taken.driver.as_deref() == Some("vfio-pci"), "{taken:?}");
    assert!(!Path::new("/sys/class/net/eth0").exists(), "the host has it no more");
    let group = fs::read_link("/sys/bus/pci/devices/0000:00:05.0/iommu_group").expect("its group");
    let group = Path::new("/dev/vfio").join(group.file_name().expect("its number"));
    let open = openat(CWD, &group, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).expect("the guest's QEMU opens it");
    let before = DetachedDevice { driver: Some(DRIVER.to_owned()) };
    let refused = devices.reattach(&taken, Some(&before)).await.expect_err("a process has it");
    assert!(matches!(&refused, DriverError::Refused(why) if why.contains("has /dev/vfio/")), "{refused}");
    drop(open);
    devices.reattach(&taken, Some(&before)).await.expect("given back");
    let back = now().await;
    assert_eq!((back.driver.as_deref(), back.detached()), (Some(DRIVER), false));
    assert!(!group.exists() && Path::new("/sys/class/net/eth0").exists(), "the host has it again");
}

fn a_macvtap_is_made_and_goes() {
    let link = Macvtap {
        name: "macvtap0".to_owned(),
        below: "eth0".to_owned(),
        mode: "bridge".to_owned(),
        mac: "52:54:00:00:00:09".to_owned(),
        mtu: Some(1400),
    };
    let there = Path::new("/sys/class/net/macvtap0");
    link.make().expect("made");
    let says = |file: &str| fs::read_to_string(there.join(file)).expect("it is there").trim().to_owned();
    assert_eq!((says("address"), says("mtu")), (link.mac.clone(), "1400".to_owned()));
    assert_eq!(link.open(2).expect("opened").len(), 2);
    let another = Macvtap { mac: "52:54:00:00:00:0a".to_owned(), ..link.clone() };
    another.remove().expect("that one is not there");
    assert!(there.exists(), "nor is this one that one");
    link.remove().expect("removed");
    assert!(!there.exists());
}
