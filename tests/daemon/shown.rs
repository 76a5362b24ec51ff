//! A client shows a machine without reading XML: what `GetAll` gives of its devices, and which signals keep that true.

use crate::common::Daemon;
use crate::common::client::{Client, Domain, Watch, options};
use crate::common::snapshots::with;
use std::collections::BTreeMap;
use zbus::{OwnedVariant, Variant};

/// What is said of a device, by key.
type Said = BTreeMap<String, String>;

const MACHINE: &str = "<domain type='test'><name>web</name><memory>65536</memory>\
     <metadata><libosinfo:libosinfo xmlns:libosinfo='http://libosinfo.org/xmlns/libvirt/domain/1.0'>\
       <libosinfo:os id='http://example.org/os/1'/></libosinfo:libosinfo></metadata>\
     <os firmware='efi'><type>hvm</type></os><features><acpi/></features><devices>\
     <disk type='file'><source file='/web.qcow2'/><driver name='qemu' type='qcow2'/><target dev='vda' bus='virtio'/>\
       <boot order='2'/></disk>\
     <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>\
     <interface type='bridge'><mac address='52:54:00:00:00:0a'/><source bridge='br0'/><model type='virtio'/>\
       <boot order='1'/></interface>\
     <serial type='pty'><target port='0'/></serial>\
     <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
     <channel type='unix'><target type='virtio' name='org.example.0'/></channel>\
     <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>\
     <graphics type='vnc' port='5901' passwd='s3cret'><listen type='address' address='127.0.0.1'/></graphics>\
     <hostdev mode='subsystem' type='usb'><source><vendor id='0x046d'/><product id='0xc52b'/></source></hostdev>\
     </devices></domain>";

/// Plain words for a value.
fn word(value: &OwnedVariant) -> String {
    let text = format!("{value:?}");
    String::try_from(value.clone()).unwrap_or(text)
}

fn said(device: BTreeMap<String, OwnedVariant>) -> Said {
    device
        .into_iter()
        .map(|(key, value)| {
            let number = u32::try_from(value.clone()).map(|number| number.to_string());
            let flag = bool::try_from(value.clone()).map(|flag| flag.to_string());
            (key, number.or(flag).unwrap_or_else(|_| word(&value)))
        })
        .collect()
}

fn devices(value: OwnedVariant) -> Vec<Said> {
    let all = Vec::<BTreeMap<String, OwnedVariant>>::try_from(value).expect("aa{sv}");
    all.into_iter().map(said).collect()
}

async fn all(domain: &Domain) -> BTreeMap<String, OwnedVariant> {
    let answer =
        domain.client.call(&domain.path, "org.freedesktop.DBus.Properties.GetAll", &("org.virt.Domain",)).await;
    answer.expect("GetAll").body().deserialize().expect("a{sv}")
}

/// The devices of a property, as an answer to `Get` has them.
async fn shown(domain: &Domain, property: &str) -> Vec<Said> {
    devices(domain.property(property).await)
}

/// Whether the device says all that.
fn says(device: &Said, pairs: &[(&str, &str)]) -> bool {
    pairs.iter().all(|(key, value)| device.get(*key).is_some_and(|said| said == value))
}

/// Path, what runs, what is stored.
fn pending(value: OwnedVariant) -> Vec<(String, String, String)> {
    value.try_into().expect("a(sss)")
}

/// The properties of which the next signal tells that they are others now.
async fn changed(watch: &mut Watch) -> BTreeMap<String, OwnedVariant> {
    loop {
        let message = watch.next().await;
        if message.header().member().is_some_and(|member| member == "PropertiesChanged") {
            let (interface, changed, _): (String, BTreeMap<String, OwnedVariant>, Vec<String>) =
                message.body().deserialize().expect("sa{sv}as");
            if interface == "org.virt.Domain" {
                return changed;
            }
        }
    }
}

fn names(changed: &BTreeMap<String, OwnedVariant>) -> Vec<&str> {
    changed.keys().map(String::as_str).collect()
}

#[tokio::test]
async fn get_all_shows_a_machine_that_is_off() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(MACHINE).await.expect("defined");
    let all = all(&domain).await;
    assert!(!format!("{all:?}").contains("s3cret"));
    let of = |property: &str| devices(all[property].clone());
    let disks = of("Disks");
    let first = [("target", "vda"), ("device", "disk"), ("bus", "virtio"), ("type", "file"), ("source", "/web.qcow2")];
    assert!(
        says(&disks[0], &first) && says(&disks[0], &[("format", "qcow2"), ("boot-order", "2"), ("stored", "true")])
    );
    assert!(says(&disks[0], &[("readonly", "false"), ("shareable", "false")]));
    assert!(says(&disks[1], &[("device", "cdrom"), ("source", ""), ("readonly", "true")]), "{disks:?}");
    assert_eq!(disks.len(), 2);
    let card =
        [("mac", "52:54:00:00:00:0a"), ("type", "bridge"), ("source", "br0"), ("model", "virtio"), ("link", "true")];
    assert!(says(&of("Interfaces")[0], &card));
    let display = [("type", "vnc"), ("index", "0"), ("listen", "127.0.0.1"), ("port", "5901"), ("password", "true")];
    assert!(says(&of("Graphics")[0], &display));
    assert!(says(&of("Graphics")[0], &[("openable", "false")]), "the test driver has no displays");
    assert!(says(&of("Consoles")[0], &[("type", "pty"), ("port", "0"), ("openable", "true"), ("stored", "true")]));
    let channels = of("Channels");
    assert!(
        says(&channels[1], &[("name", "org.example.0"), ("type", "unix")]) && !channels[1].contains_key("connected")
    );
    assert!(says(&of("HostDevices")[0], &[("type", "usb"), ("vendor", "0x046d"), ("product", "0xc52b")]));
    let one = |property: &str| said(BTreeMap::try_from(all[property].clone()).expect("a{sv}"));
    assert!(says(&one("Firmware"), &[("type", "efi"), ("secure-boot", "false")]));
    assert_eq!(one("TPM"), Said::from([("model", "tpm-crb"), ("version", "2.0")].map(|(k, v)| (k.into(), v.into()))));
    assert_eq!(*all["OperatingSystem"], Variant::from("http://example.org/os/1"));
    assert_eq!(*all["BootOrder"], Variant::from(vec!["52:54:00:00:00:0a", "vda"]));
    // What is asked for alone is the same.
    for property in ["Disks", "Interfaces", "Graphics", "Consoles", "Channels", "HostDevices"] {
        assert_eq!(shown(&domain, property).await, of(property), "{property}");
    }
}

#[tokio::test]
async fn what_runs_and_what_is_stored_stand_beside_each_other() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(MACHINE).await.expect("defined");
    let uuid: String = domain.property("UUID").await;
    domain.run("Start").await.expect("started");
    let stored = |all: &[Said]| all.iter().map(|one| one["stored"].clone()).collect::<Vec<_>>();
    assert_eq!(stored(&shown(&domain, "Interfaces").await), ["false", "true"]);
    let channels = shown(&domain, "Channels").await;
    let connected: Vec<_> = channels.iter().map(|channel| channel.get("connected").map(String::as_str)).collect();
    assert_eq!(connected, [Some("true"), Some("false"), None, None], "the agent is there");

    // Redefined while it runs: what runs is as before.
    let mut watch = client.watch().await;
    let other = MACHINE.replace("'br0'", "'br1'").replace("<name>", &format!("<uuid>{uuid}</uuid><name>"));
    client.define(&other).await.expect("redefined");
    let told = changed(&mut watch).await;
    assert_eq!(names(&told), ["ConfigChanged", "Interfaces", "PendingChanges"]);
    let change =
        ("/devices/interface[mac=52:54:00:00:00:0a]/source/bridge".to_owned(), "br0".to_owned(), "br1".to_owned());
    assert_eq!(pending(told["PendingChanges"].clone()), [change]);
    let cards = devices(told["Interfaces"].clone());
    let sources: Vec<_> = cards.iter().map(|card| (&*card["source"], &*card["stored"])).collect();
    assert_eq!(sources, [("br0", "false"), ("br1", "true")]);
    assert_eq!(shown(&domain, "Interfaces").await, cards);

    // A change that has nothing to do with devices tells of none.
    domain.call("SetTitle", &("A title", with([("config", true), ("live", true)]))).await.expect("set");
    assert_eq!(names(&changed(&mut watch).await), ["Title"]);
    domain.bare("Suspend").await.expect("paused");
    assert_eq!(names(&changed(&mut watch).await), ["State", "StateReason", "StateSince"]);

    domain.run("Destroy").await.expect("destroyed");
    let told = changed(&mut watch).await;
    assert!(names(&told).starts_with(&["Active", "AgentConnected", "Channels", "ConfigChanged"]), "{:?}", names(&told));
    assert_eq!(stored(&devices(told["Interfaces"].clone())), ["true"]);
    assert_eq!(pending(told["PendingChanges"].clone()), []);
    assert_eq!(shown(&domain, "Interfaces").await[0]["source"], "br1");
}

#[tokio::test]
async fn devices_are_shown_as_they_come_and_go() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(MACHINE).await.expect("defined");
    domain.run("Start").await.expect("started");
    let mut watch = client.watch().await;
    let disk = "<disk type='file'><source file='/more.img'/><target dev='vdb' bus='virtio'/></disk>";
    domain.call("AttachDevice", &(disk, with([("live", true)]))).await.expect("plugged in");
    let told = changed(&mut watch).await;
    assert_eq!(names(&told), ["ConfigChanged", "Disks", "PendingChanges"]);
    // The test driver says at once what it would say of a whole machine: that is different, too.
    let pending_now = pending(told["PendingChanges"].clone());
    let of_disk = pending_now.iter().find(|(path, ..)| path == "/devices/disk[target=vdb]").expect("the disk");
    assert!(
        of_disk.1.starts_with("<disk type='file'") && of_disk.1.ends_with("</disk>") && of_disk.2.is_empty(),
        "{of_disk:?}"
    );
    let disks = devices(told["Disks"].clone());
    let targets: Vec<_> = disks.iter().map(|disk| (&*disk["target"], &*disk["stored"])).collect();
    let both = [("vda", "false"), ("sda", "false"), ("vdb", "false"), ("vda", "true"), ("sda", "true")];
    assert_eq!(targets, both);
    assert_eq!(disks[2]["alias"], "virtio-disk1");
    domain.call("ChangeMedium", &("sda", "/one.iso", options([]))).await.expect("changed in both");
    let media = shown(&domain, "Disks").await;
    assert_eq!(media.iter().filter(|disk| says(disk, &[("target", "sda"), ("source", "/one.iso")])).count(), 2);
    domain.call("SetLink", &("52:54:00:00:00:0a", false, with([("live", true)]))).await.expect("pulled out");
    let links: Vec<_> = shown(&domain, "Interfaces").await.into_iter().map(|card| card["link"].clone()).collect();
    assert_eq!(links, ["false", "true"]);
    domain.call("DetachDeviceAlias", &("virtio-disk1", options([]))).await.expect("gone");
    assert_eq!(shown(&domain, "Disks").await.len(), 4);
    domain.call("SetLink", &("52:54:00:00:00:0a", true, with([("live", true)]))).await.expect("plugged in");
    let left = pending(domain.property("PendingChanges").await);
    assert!(left.iter().all(|(path, running, _)| !path.contains("vdb") && running != "down"), "{left:?}");
    assert_eq!(domain.property::<bool>("ConfigChanged").await, !left.is_empty());
}

#[tokio::test]
async fn a_transient_machine_has_only_what_runs() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let made = client.call("/org/virt", "org.virt.Manager.CreateDomain", &(MACHINE, options([]))).await.expect("made");
    let (path, _): (zbus::OwnedObjectPath, zbus::OwnedObjectPath) = made.body().deserialize().expect("oo");
    let domain = Domain { client, path: path.to_string() };
    let disks = shown(&domain, "Disks").await;
    assert_eq!(disks.iter().map(|disk| &*disk["stored"]).collect::<Vec<_>>(), ["false", "false"]);
}

#[tokio::test]
async fn what_is_pending_is_applied_by_a_new_start() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(MACHINE).await.expect("defined");
    let can =
        async || domain.call("Can", &"ApplyPending").await.expect("Can").body().deserialize::<String>().expect("s");
    assert_eq!(can().await, "na");
    domain.run("Start").await.expect("started");
    let (name, why) = domain.run("ApplyPending").await.expect_err("nothing to do");
    assert!(name == "org.virt.Error.OperationInvalid" && why.contains("nothing is pending"), "{name}: {why}");
    domain.call("SetLink", &("52:54:00:00:00:0a", false, with([("config", true)]))).await.expect("pulled out");
    assert_eq!(can().await, "yes");
    let (name, why) = domain.call("ApplyPending", &(with([("force", true)]),)).await.expect_err("no such option");
    assert!(name == "org.virt.Error.InvalidArgument" && why.contains("force"), "{name}: {why}");

    let mut watch = client.watch().await;
    let job = domain.call("ApplyPending", &(options([("timeout-usec", Variant::from(30_000_000_u64))]),)).await;
    let job: zbus::OwnedObjectPath = job.expect("applied").body().deserialize().expect("o");
    let operation: String = client.property(job.as_str(), "org.virt.Job", "Operation").await;
    assert_eq!(operation, "apply-pending");
    let events = watch.until(&domain.path, "started booted").await;
    assert_eq!(events, ["shutdown guest", "stopped shutdown", "started booted"]);
    assert!(!domain.property::<bool>("ConfigChanged").await);
    let links: Vec<_> = shown(&domain, "Interfaces").await.into_iter().map(|card| card["link"].clone()).collect();
    assert_eq!(links, ["false", "false"]);
    // Where it powers off by itself, it stays off.
    domain.run("Shutdown").await.expect("asked");
    assert_eq!(watch.until(&domain.path, "stopped shutdown").await.len(), 2);
}

#[tokio::test]
async fn the_size_of_one_disk_is_told_and_how_quickly_memory_is_written() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(MACHINE).await.expect("defined");
    let size = async |target: &str| {
        let told = domain.call("BlockInfo", &target).await;
        told.map(|told| told.body().deserialize::<((u64, u64, u64),)>().expect("(ttt)").0)
    };
    let off = size("vda").await.expect("told");
    assert!(off.0 > 0 && off.1 > 0 && off.2 > 0, "{off:?}");
    assert_eq!(size("vdx").await.expect_err("no such disk").0, "org.virt.Error.NoSuchDevice");
    domain.run("Start").await.expect("started");
    assert_eq!(size("vda").await.expect("told"), off);
    let groups = options([("groups", Variant::from(vec!["dirty-rate"]))]);
    let told = domain.call("GetStats", &(groups,)).await.expect("told");
    let told: BTreeMap<String, OwnedVariant> = told.body().deserialize().expect("a{sv}");
    let rate = BTreeMap::<String, OwnedVariant>::try_from(told["dirty-rate"].clone()).expect("a{sv}");
    assert_eq!(*rate["bytes-per-second"], Variant::from(1_u64 << 20));
    assert_eq!(*rate["period-usec"], Variant::from(1_000_000_u64));
}
