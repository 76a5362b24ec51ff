//! Devices of the host's that are not there, that another guest has, and starts that fail after they were taken: what is said,
//! and that nothing is left.

mod fixture;

use fixture::{House, POWER_OFF, exists};
use serde_json::json;
use std::path::Path;
use std::process::Command;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::{Condition, Driver};

const STORED: Form = Form::STORED;

/// Tick with more devices.
async fn tick_with(house: &House, devices: &str, more: &str) -> DomainDef {
    let def = house.def(POWER_OFF, more).await;
    house.complete(&def.write(STORED).replacen("</devices>", &format!("{devices}</devices>"), 1)).await
}

fn stick(policy: &str) -> String {
    let ids = "<vendor id='0xfffe'/><product id='0xfffd'/>";
    format!("<hostdev type='usb'><source startupPolicy='{policy}'>{ids}</source></hostdev>")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said_by_check_and_by_start() {
    let Some(house) = House::system() else { return };
    let card = "<source><address domain='0xfffe' bus='6'/></source>";
    let mut cases = vec![
        (
            format!("<hostdev type='pci' managed='yes'>{card}</hostdev>"),
            "there is no PCI device fffe:06:00.0 on this host",
        ),
        (
            "<interface type='hostdev'><source><address type='pci' domain='0xfffe' bus='6'/></source></interface>"
                .into(),
            "there is no PCI device fffe:06:00.0 on this host",
        ),
        (stick("mandatory"), "the USB device fffe:fffd is not plugged in"),
        (stick("requisite"), "the USB device fffe:fffd is not plugged in"),
    ];
    if !Path::new("/dev/vhost-vsock").exists() {
        cases.push(("<vsock/>".into(), "load the module (modprobe vhost_vsock)"));
    }
    for (device, expected) in cases {
        let def = tick_with(&house, &device, "").await;
        let found = house.driver.check(&def).await;
        assert!(found.iter().any(|finding| finding.message.contains(expected)), "{device}: {found:?}");
        let (launch, seen) = house.launch(def);
        let folder = launch.runtime_dir.clone();
        let error = house.driver.start(launch).await.err().unwrap().to_string();
        assert!(error.contains(expected), "{device}: {error}");
        assert_eq!(seen.pid(), None);
        assert!(std::fs::read_dir(folder).unwrap().next().is_none(), "{device}: nothing is left");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_starts_without_what_is_optional() {
    let Some(house) = House::system() else { return };
    let def = tick_with(&house, &stick("optional"), "").await;
    let mut guest = house.start(def).await;
    guest.serial.says("C00000001").await;
    assert!(guest.live.devices.hostdevs.is_empty(), "what runs has it not");
    guest.destroy().await;
}

/// A bridge that goes with the test, for want of a card; `None` where the kernel has no macvtap.
struct Below(String);

impl Below {
    fn make(letter: char) -> Option<Below> {
        let below = Below(format!("vh{letter}{}", std::process::id() % 1_000_000));
        assert!(ip(&["link", "add", &below.0, "type", "bridge"]));
        let tried = ip(&["link", "add", "link", &below.0, "name", &below.guests_end(), "type", "macvtap"]);
        if !tried {
            eprintln!("SKIPPED: no macvtap");
            return None;
        }
        assert!(ip(&["link", "del", &below.guests_end()]));
        Some(below)
    }

    fn guests_end(&self) -> String {
        format!("{}g", self.0)
    }

    fn card(&self) -> String {
        let target = format!("<target dev='{}'/>", self.guests_end());
        format!(
            "<interface type='direct'><source dev='{}' mode='bridge'/>{target}<model type='virtio'/></interface>",
            self.0
        )
    }

    fn is_shown(&self) -> bool {
        Path::new("/sys/class/net").join(self.guests_end()).exists()
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        ip(&["link", "del", &self.0]);
    }
}

fn ip(args: &[&str]) -> bool {
    Command::new("ip").args(args).output().unwrap().status.success()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_guest_has_a_name_and_the_other_is_told_so() {
    let Some(house) = House::system() else { return };
    let Some(below) = Below::make('a') else { return };
    let guest = house.start(tick_with(&house, &below.card(), "").await).await;
    let (launch, _) = house.launch(tick_with(&house, &below.card(), "").await);
    let error = house.driver.start(launch).await.err().unwrap().to_string();
    assert_eq!(error, format!("the network device '{}' is in use by domain '{}'", below.guests_end(), guest.live.name));
    assert!(below.is_shown(), "the first one keeps it");
    guest.destroy().await;
    assert!(!below.is_shown());
    house.start(tick_with(&house, &below.card(), "").await).await.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_made_is_neither_used_nor_removed() {
    let Some(house) = House::system() else { return };
    let Some(below) = Below::make('b') else { return };
    assert!(ip(&["link", "add", "link", &below.0, "name", &below.guests_end(), "type", "macvtap", "mode", "bridge"]));
    let (launch, _) = house.launch(tick_with(&house, &below.card(), "").await);
    let error = house.driver.start(launch).await.err().unwrap().to_string();
    assert!(error.contains(&format!("no network device '{}' on '{}'", below.guests_end(), below.0)), "{error}");
    assert!(error.contains("File exists"), "{error}");
    assert!(below.is_shown());
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_and_cancelled_starts_leave_no_device() {
    let Some(house) = House::system() else { return };
    let Some(below) = Below::make('c') else { return };
    let nonsense = "<qemu:commandline><qemu:arg value='-nonsense'/></qemu:commandline>";
    for more in [nonsense, ""] {
        let (launch, seen) = house.launch(tick_with(&house, &below.card(), more).await);
        if more.is_empty() {
            seen.recorder.cancel_at("spawned", &launch.cancel);
        }
        assert!(house.driver.start(launch).await.is_err());
        assert!(!seen.pid().is_some_and(exists) && !below.is_shown());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_down_and_half_made_is_undone_by_the_next_virtd() {
    let Some(house) = House::system() else { return };
    let Some(below) = Below::make('d') else { return };
    let (name, mac) = (below.guests_end(), "52:54:00:00:00:93");
    let made = json!({"made": {"name": name, "below": below.0, "mode": "bridge", "mac": mac, "mtu": null}});
    let card = json!({"detached": {"pci": "fffe:06:00.0", "driven": true}});
    // Killed before it was made, after it was made, and after somebody else has made another.
    for address in [None, Some(mac), Some("52:54:00:00:00:94")] {
        let def = tick_with(&house, "", "").await;
        let (_, seen) = house.launch(def.clone());
        if let Some(address) = address {
            let add = ["link", "add", "link", &below.0, "name", &name, "address", address, "type", "macvtap"];
            assert!(ip(&[&add[..], &["mode", "bridge"]].concat()));
        }
        let record = json!({
            "phase": "starting", "uuid": def.uuid, "exe": "/", "monitor": "/", "log_start": 0, "process": null,
            "changes": [card, made],
        });
        let (found, _seen) = house.reconnect(&def, record, seen, Condition::Running);
        assert!(house.driver.reconnect(found).await.unwrap().is_none());
        assert_eq!(below.is_shown(), address.is_some_and(|address| address != mac), "{address:?}");
    }
}
