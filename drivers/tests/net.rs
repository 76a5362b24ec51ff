//! A guest's cable plugged into a bridge of the host, or into a device without one: the host's end is made, shaped, and gone
//! with the guest.

mod fixture;

use fixture::{House, POWER_OFF};
use std::path::{Path, PathBuf};
use std::process::Command;
use virt_model::domain::Form;
use virt_model::driver::stats::{GroupStats, StatGroup, StatQuestion};
use virt_model::driver::{Condition, Driver};

/// A bridge that goes with the test.
struct Bridge(String);

impl Bridge {
    fn make(letter: char) -> Bridge {
        let name = format!("v{letter}{}", std::process::id() % 1_000_000);
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
    let bridge = Bridge::make('v');
    let name = format!("vw{}", std::process::id() % 1_000_000);
    let cable = format!(
        "<interface type='bridge'><source bridge='{}'/><vlan trunk='yes'><tag id='42'/>\
         <tag id='123' nativeMode='untagged'/></vlan><target dev='{name}'/><model type='virtio'/></interface></devices>",
        bridge.0
    );
    let def = house.def(POWER_OFF, "").await;
    let xml = def.write(Form::STORED);
    let def = house.complete(&xml.replacen("</devices>", &cable, 1)).await;
    let (launch, seen) = house.launch(def.clone());
    let filters = PathBuf::from(format!("/sys/class/net/{}/bridge/vlan_filtering", bridge.0)).exists();
    let refused = house.driver.start(launch).await.err().unwrap().to_string();
    std::fs::remove_dir_all(&seen.runtime_dir).unwrap();
    // A kernel without them is told of by name; what follows needs one with them.
    if !filters {
        assert!(refused.contains("bridges of this host's kernel know no VLANs"), "{refused}");
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
    let bridge = Bridge::make('b');
    let name = format!("vt{}", std::process::id() % 1_000_000);
    let cable = format!(
        "<interface type='bridge'><source bridge='{}'/><bandwidth><inbound average='1000' peak='2000' burst='64'/>\
         </bandwidth><target dev='{name}'/><model type='virtio'/><driver queues='2'/>\
         <mtu size='1400'/><port isolated='yes'/>\
         <coalesce><rx><frames max='7'/></rx></coalesce></interface></devices>",
        bridge.0
    );
    let def = house.def(POWER_OFF, "").await;
    let xml = def.write(Form::STORED);
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

    // The host announces itself at the bridge, to a guest that takes nothing.
    let asked = StatQuestion { group: StatGroup::Interfaces, may_open: false };
    let counted = |file: &str| said(&format!("statistics/{file}")).parse::<u64>().unwrap();
    let sent_before = counted("tx_packets") + counted("tx_dropped");
    let told = house.driver.stats(&guest.live, Some(&*guest.instance), asked).await.unwrap();
    let GroupStats::Interfaces(cards) = told else { panic!("{told:?}") };
    assert_eq!((cards.len(), cards[0].target.as_deref()), (1, Some(&*name)));
    let (received, sent) = cards[0].traffic.unwrap();
    let sent_after = counted("tx_packets") + counted("tx_dropped");
    assert!((sent_before..=sent_after).contains(&(received.packets + received.drops)), "{received:?}");
    assert_eq!(sent.packets, 0, "it has no system that could send");

    guest.destroy().await;
    assert!(!device.exists(), "it goes with the guest");
}

/// A device on another, as the kernel shows it.
fn said(device: &Path, file: &str) -> String {
    std::fs::read_to_string(device.join(file)).unwrap_or_default().trim().to_owned()
}

/// Whether this kernel has macvtap; on `below`, which is there.
fn has_macvtap(below: &str) -> bool {
    let name = format!("vm{}", std::process::id() % 1_000_000);
    let made =
        Command::new("ip").args(["link", "add", "link", below, "name", &name, "type", "macvtap"]).output().unwrap();
    if made.status.success() {
        ip(&["link", "del", &name]);
    } else {
        eprintln!("SKIPPED: no macvtap: {}", String::from_utf8_lossy(&made.stderr));
    }
    made.status.success()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_on_one_of_the_hosts_goes_with_the_guest_whoever_was_killed() {
    let Some(mut house) = House::system() else { return };
    let below = Bridge::make('d');
    if !has_macvtap(&below.0) {
        return;
    }
    let name = format!("vd{}a", std::process::id() % 100_000);
    let card = |mode: &str, more: &str| {
        format!(
            "<interface type='direct'><source dev='{}' mode='{mode}'/><model type='virtio'/>{more}</interface>",
            below.0
        )
    };
    let more = format!(
        "<mac address='52:54:00:00:00:91'/><target dev='{name}'/><driver queues='2'/><mtu size='1400'/>\
         <bandwidth><outbound average='1000' peak='2000' burst='64'/></bandwidth>"
    );
    let def = house.def(POWER_OFF, "").await;
    let xml = def.write(Form::STORED);
    let cards = card("bridge", &more) + &card("bridge", "<mac address='52:54:00:00:00:92'/>") + "</devices>";
    let def = house.complete(&xml.replacen("</devices>", &cards, 1)).await;
    let mut guest = house.start(def).await;
    guest.serial.says("C00000001").await;

    let device = PathBuf::from("/sys/class/net").join(&name);
    assert_eq!((said(&device, "address"), said(&device, "mtu")), ("52:54:00:00:00:91".to_owned(), "1400".to_owned()));
    assert_eq!(said(&device, "iflink"), said(&Path::new("/sys/class/net").join(&below.0), "ifindex"));
    let flags = u32::from_str_radix(said(&device, "flags").trim_start_matches("0x"), 16).unwrap();
    assert!(flags & libc::IFF_UP as u32 != 0, "{flags:#x}");
    let shaped = Command::new("tc").args(["class", "show", "dev", &name]).output().unwrap();
    let shaped = String::from_utf8_lossy(&shaped.stdout).into_owned();
    assert!(shaped.contains("rate 8Mbit ceil 16Mbit"), "what the guest sends leaves by it: {shaped}");
    let shown = || String::from_utf8(Command::new("ip").args(["-o", "link"]).output().unwrap().stdout).unwrap();
    let own = format!("@{}", below.0);
    assert_eq!(shown().matches(&own).count(), 2, "{}", shown());
    assert!(shown().contains("52:54:00:00:00:92"));
    let named =
        |n: usize| guest.live.devices.interfaces[n].target.as_ref().and_then(|target| target.dev.clone()).unwrap();
    assert_eq!(named(0), name);
    assert!(named(1).starts_with("macvtap") && shown().contains(&format!("{}@", named(1))), "{}", named(1));
    let stored = guest.live.write(Form::STORED);
    assert!(stored.contains(&name) && !stored.contains(&named(1)), "a name that was chosen is not kept");

    let (guest, _) = house.find(guest, Condition::Running).await.unwrap();
    assert!(device.exists(), "it is the guest's, not virtd's");
    guest.signal(libc::SIGKILL);
    assert!(house.find(guest, Condition::Running).await.is_none());
    assert_eq!(shown().matches(&own).count(), 0, "{}", shown());
}
