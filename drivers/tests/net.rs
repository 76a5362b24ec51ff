//! A guest's cable plugged into a bridge of the host: the device is made, shaped, and gone with the guest.

mod fixture;

use fixture::{House, POWER_OFF};
use std::path::{Path, PathBuf};
use std::process::Command;
use virt_model::domain::Form;
use virt_model::driver::Driver;

/// A bridge that goes with the test.
struct Bridge(String);

impl Bridge {
    fn make(prefix: &str) -> Bridge {
        let name = format!("{prefix}{}", std::process::id() % 1_000_000);
        ip(&["link", "add", &name, "type", "bridge"]);
        ip(&["link", "set", &name, "up"]);
        Bridge(name)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        Command::new("ip").args(["link", "del", &self.0]).status().ok();
    }
}

fn ip(args: &[&str]) {
    let done = Command::new("ip").args(args).output().unwrap();
    assert!(done.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

fn shown(program: &str, args: &[&str]) -> String {
    let done = Command::new(program).args(args).output().unwrap();
    String::from_utf8_lossy(&done.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_in_vlans_of_its_bridge() {
    let Some(house) = House::system() else { return };
    if !Path::new("/dev/net/tun").exists() {
        eprintln!("SKIPPED: there is no /dev/net/tun");
        return;
    }
    let bridge = Bridge::make("vv");
    let name = format!("vw{}", std::process::id() % 1_000_000);
    let cable = format!(
        "<interface type='bridge'><source bridge='{}'/><vlan trunk='yes'><tag id='42'/>\
         <tag id='123' nativeMode='untagged'/></vlan><target dev='{name}'/><model type='virtio'/></interface></devices>",
        bridge.0
    );
    let def = house.def(POWER_OFF, "").await;
    let xml = def.write(Form { inactive: true, secure: true, migratable: false });
    let def = house.complete(&xml.replacen("</devices>", &cable, 1)).await;
    let (launch, seen) = house.launch(def.clone());
    let filters = PathBuf::from(format!("/sys/class/net/{}/bridge/vlan_filtering", bridge.0)).exists();
    let refused = house.driver.start(launch).await.err().unwrap().to_string();
    std::fs::remove_dir_all(&seen.runtime_dir).unwrap();
    if !filters {
        assert!(refused.contains("bridges of this host's kernel know no VLANs"), "{refused}");
        eprintln!("SKIPPED: bridges of this host's kernel know no VLANs");
        return;
    }
    assert!(refused.contains(&format!("ip link set {} type bridge vlan_filtering 1", bridge.0)), "{refused}");

    ip(&["link", "set", &bridge.0, "type", "bridge", "vlan_filtering", "1"]);
    let mut guest = house.start(def).await;
    guest.serial.says("C00000001").await;
    let vlans = shown("bridge", &["vlan", "show", "dev", &name]);
    let words: Vec<&str> = vlans.split_whitespace().skip_while(|word| *word != name).skip(1).collect();
    assert_eq!(words, ["42", "123", "PVID", "Egress", "Untagged"], "{vlans}");
    guest.destroy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_of_ones_own_on_a_bridge() {
    let Some(house) = House::system() else { return };
    if !Path::new("/dev/net/tun").exists() {
        eprintln!("SKIPPED: there is no /dev/net/tun");
        return;
    }
    let bridge = Bridge::make("vb");
    let name = format!("vt{}", std::process::id() % 1_000_000);
    let cable = format!(
        "<interface type='bridge'><source bridge='{}'/><bandwidth><inbound average='1000' peak='2000' burst='64'/>\
         </bandwidth><target dev='{name}'/><model type='virtio'/><driver queues='2'/>\
         <mtu size='1400'/><port isolated='yes'/>\
         <coalesce><rx><frames max='7'/></rx></coalesce></interface></devices>",
        bridge.0
    );
    let def = house.def(POWER_OFF, "").await;
    let xml = def.write(Form { inactive: true, secure: true, migratable: false });
    let def = house.complete(&xml.replacen("</devices>", &cable, 1)).await;
    let mut guest = house.start(def).await;
    guest.serial.says("C00000001").await;

    let device = PathBuf::from("/sys/class/net").join(&name);
    let said = |file: &str| std::fs::read_to_string(device.join(file)).unwrap().trim().to_owned();
    assert_eq!(said("mtu"), "1400");
    assert_eq!(device.join("master").canonicalize().unwrap().file_name().unwrap().to_str(), Some(&*bridge.0));
    assert_eq!(said("brport/isolated"), "1");
    let flags = u32::from_str_radix(said("tun_flags").trim_start_matches("0x"), 16).unwrap();
    assert!(flags & libc::IFF_MULTI_QUEUE as u32 != 0, "{flags:#x}");
    let shaped = Command::new("tc").args(["class", "show", "dev", &name]).output().unwrap();
    let shaped = String::from_utf8_lossy(&shaped.stdout).into_owned();
    assert!(shaped.contains("rate 8Mbit ceil 16Mbit"), "{shaped}");

    guest.destroy().await;
    assert!(!device.exists(), "it goes with the guest");
}
