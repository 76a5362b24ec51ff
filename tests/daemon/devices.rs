//! Devices plugged in and out, as clients see it, of the test driver's machines.

use crate::common::client::{Client, Domain, Options, Refusal, Watch, descriptor, options};
use crate::common::snapshots::with;
use crate::common::users::ADMIN;
use crate::common::{Daemon, Setup};
use zbus::Variant;

const MACHINE: &str = "<domain type='test'><name>web</name><memory>65536</memory><os><type>hvm</type></os><devices>\
     <disk type='file'><source file='/web.img'/><target dev='vda' bus='virtio'/></disk></devices></domain>";
const DISK: &str = "<disk type='file'><source file='/more.img'/><target dev='vdb' bus='virtio'/></disk>";
const CARD: &str = "<interface type='bridge'><source bridge='br0'/><model type='virtio'/></interface>";

async fn attach(domain: &Domain, xml: &str, flags: &[(&str, bool)]) -> Result<String, Refusal> {
    let reply = domain.call("AttachDevice", &(xml, with(flags.iter().copied()))).await?;
    Ok(reply.body().deserialize().expect("s"))
}

async fn detach(domain: &Domain, xml: &str, flags: &[(&str, bool)]) -> Result<(), Refusal> {
    domain.call("DetachDevice", &(xml, with(flags.iter().copied()))).await.map(drop)
}

async fn stored(domain: &Domain) -> String {
    domain.call("GetXML", &(with([("inactive", true)]),)).await.expect("told").body().deserialize().expect("s")
}

/// The next signal of a device, with its arguments; what else is told of the domain comes before it, as `seen`.
async fn told(watch: &mut Watch, seen: &mut Vec<String>) -> (String, String) {
    loop {
        let message = watch.next().await;
        let member = message.header().member().expect("a signal").to_string();
        if member.starts_with("Device") {
            return (member, message.body().deserialize::<String>().expect("s"));
        }
        seen.push(member);
    }
}

fn refused(answer: Result<impl std::fmt::Debug, Refusal>, error: &str, word: &str) {
    let (name, text) = answer.expect_err(error);
    assert!(name == format!("org.virt.Error.{error}") && text.contains(word), "{name}: {text}");
}

#[tokio::test]
async fn a_device_comes_and_goes_in_what_runs_in_what_is_stored_or_both() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(MACHINE).await.expect("defined");
    // What is off has only what is stored.
    assert_eq!(attach(&domain, DISK, &[]).await.expect("stored"), "");
    assert!(stored(&domain).await.contains("vdb"));
    detach(&domain, "<disk><target dev='vdb'/></disk>", &[("config", true)]).await.expect("taken out");
    assert!(!stored(&domain).await.contains("vdb"));
    refused(attach(&domain, DISK, &[("live", true)]).await, "OperationInvalid", "start it first");

    domain.run("Start").await.expect("started");
    let (mut watch, mut seen) = (domain.client.watch().await, Vec::new());
    assert_eq!(attach(&domain, DISK, &[("live", true)]).await.expect("plugged in"), "virtio-disk1");
    assert_eq!(told(&mut watch, &mut seen).await, ("DeviceAdded".to_owned(), "virtio-disk1".to_owned()));
    assert_eq!(seen, ["PropertiesChanged"], "ConfigChanged is told before");
    assert!(domain.xml().await.contains("vdb") && !stored(&domain).await.contains("vdb"));
    assert!(domain.property::<bool>("ConfigChanged").await);

    // In both it is the same card.
    let card = attach(&domain, CARD, &[("live", true), ("config", true)]).await.expect("in both");
    assert_eq!(told(&mut watch, &mut seen).await, ("DeviceAdded".to_owned(), card.clone()));
    let mac = |xml: &str| xml.split("<mac address='").nth(1).map(|rest| rest[..17].to_owned()).expect("an address");
    assert_eq!(mac(&domain.xml().await), mac(&stored(&domain).await));

    // Where it is left open, it goes from where it is.
    domain.call("DetachDeviceAlias", &("virtio-disk1", options([]))).await.expect("gone");
    assert_eq!(told(&mut watch, &mut seen).await, ("DeviceRemoved".to_owned(), "virtio-disk1".to_owned()));
    domain.call("DetachDeviceAlias", &(&*card, options([]))).await.expect("gone from both");
    assert_eq!(told(&mut watch, &mut seen).await, ("DeviceRemoved".to_owned(), card));
    assert!(!domain.xml().await.contains("<interface") && !stored(&domain).await.contains("<interface"));
    assert!(!domain.property::<bool>("ConfigChanged").await);
}

#[tokio::test]
async fn a_guest_that_lets_go_later_is_followed() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(MACHINE).await.expect("defined");
    domain.run("Start").await.expect("started");
    attach(&domain, DISK, &[]).await.expect("in both");
    domain.bare("Suspend").await.expect("paused");
    let (mut watch, mut seen) = (domain.client.watch().await, Vec::new());
    let soon = options([("timeout-usec", Variant::from(1000_u64))]);
    let target = "<disk><target dev='vdb'/></disk>";
    refused(domain.call("DetachDevice", &(target, soon)).await, "TimedOut", "'virtio-disk1'");
    assert!(domain.xml().await.contains("vdb") && stored(&domain).await.contains("vdb"), "nothing has changed");
    domain.bare("Resume").await.expect("it goes on");
    assert_eq!(told(&mut watch, &mut seen).await, ("DeviceRemoved".to_owned(), "virtio-disk1".to_owned()));
    assert!(!domain.xml().await.contains("vdb") && !stored(&domain).await.contains("vdb"), "both follow");
}

#[tokio::test]
async fn media_and_cables_are_changed_without_a_document() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let devices = "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>\
         <interface type='bridge'><mac address='52:54:00:00:00:0A'/><source bridge='br0'/></interface></devices>";
    let machine = MACHINE.replace("</devices>", devices);
    let domain = Client { connection: daemon.connect().await }.define(&machine).await.expect("defined");
    domain.call("ChangeMedium", &("sda", "/one.iso", options([]))).await.expect("changed while it is off");
    assert!(stored(&domain).await.contains("/one.iso"));
    domain.run("Start").await.expect("started");
    let mut watch = domain.client.watch().await;
    let mut medium = async || loop {
        let message = watch.next().await;
        if message.header().member().is_some_and(|member| member == "MediumChanged") {
            return message.body().deserialize::<(String, String)>().expect("ss");
        }
    };
    domain.call("ChangeMedium", &("sda", "/two.iso", with([("live", true)]))).await.expect("changed in what runs");
    assert_eq!(medium().await, ("sda".to_owned(), "changed".to_owned()));
    assert!(domain.xml().await.contains("/two.iso") && stored(&domain).await.contains("/one.iso"));
    domain.call("ChangeMedium", &("sda", "", with([("force", true)]))).await.expect("taken out of both");
    assert_eq!(medium().await, ("sda".to_owned(), "ejected".to_owned()));
    assert!(!domain.xml().await.contains(".iso") && !stored(&domain).await.contains(".iso"));
    refused(domain.call("ChangeMedium", &("sdz", "/a", options([]))).await, "NoSuchDevice", "sdz");
    refused(domain.call("ChangeMedium", &("vda", "/a", options([]))).await, "OperationUnsupported", "vda");
    refused(domain.call("ChangeMedium", &("sda", "a.iso", options([]))).await, "InvalidArgument", "'a.iso'");
    refused(domain.call("ChangeMedium", &("sda", "", with([("hard", true)]))).await, "InvalidArgument", "hard");

    let down = "<link state='down'/>";
    domain.call("SetLink", &("52:54:00:00:00:0a", false, with([("live", true)]))).await.expect("by its address");
    assert!(domain.xml().await.contains(down) && !stored(&domain).await.contains(down));
    domain.call("SetLink", &("net0", false, options([]))).await.expect("by its alias, in both");
    assert!(domain.xml().await.contains(down) && stored(&domain).await.contains(down));
    let up = "<interface type='bridge'><mac address='52:54:00:00:00:0a'/><link state='up'/></interface>";
    domain.call("UpdateDevice", &(up, options([]))).await.expect("by a document");
    assert!(!domain.xml().await.contains(down) && !stored(&domain).await.contains(down));
    refused(domain.call("SetLink", &("net9", true, options([]))).await, "NoSuchDevice", "'net9'");
    let other = "<interface type='bridge'><mac address='52:54:00:00:00:0a'/><source bridge='br1'/></interface>";
    domain.call("UpdateDevice", &(other, with([("live", true)]))).await.expect("plugged into another bridge");
    assert!(domain.xml().await.contains("bridge='br1'") && stored(&domain).await.contains("bridge='br0'"));
    let other = other.replace("<source", "<model type='e1000'/><source");
    refused(domain.call("UpdateDevice", &(other, options([]))).await, "OperationUnsupported", "<model>");
}

#[tokio::test]
async fn what_is_refused_changes_nothing() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let domain = Client { connection: daemon.connect().await }.define(MACHINE).await.expect("defined");
    domain.run("Start").await.expect("started");
    let before = (domain.xml().await, stored(&domain).await);
    refused(attach(&domain, "<disk", &[]).await, "ConfigInvalid", "");
    refused(attach(&domain, "<graphics type='vnc'/>", &[]).await, "OperationUnsupported", "<graphics>");
    let twice = "<disk type='file'><source file='/b'/><target dev='vda' bus='virtio'/></disk>";
    refused(attach(&domain, twice, &[]).await, "ConfigInvalid", "vda");
    refused(attach(&domain, DISK, &[("slow", true)]).await, "InvalidArgument", "slow");
    refused(detach(&domain, "<disk><target dev='vdz'/></disk>", &[]).await, "NoSuchDevice", "<disk>");
    refused(domain.call("DetachDeviceAlias", &("net7", options([]))).await, "NoSuchDevice", "'net7'");
    let long = options([("timeout-usec", Variant::from(u64::MAX))]);
    refused(domain.call("DetachDeviceAlias", &("virtio-disk0", long)).await, "InvalidArgument", "timeout-usec");
    assert_eq!(before, (domain.xml().await, stored(&domain).await));

    let stranger = Domain { client: Client { connection: daemon.connect_as(&ADMIN).await }, path: domain.path.clone() };
    for (name, _) in [
        attach(&stranger, DISK, &[]).await.expect_err("nobody has allowed it"),
        detach(&stranger, "<disk><target dev='vda'/></disk>", &[]).await.expect_err("nor this"),
    ] {
        assert!(name.starts_with("org.freedesktop.DBus.Error."), "{name}");
    }
    assert_eq!(before, (domain.xml().await, stored(&domain).await));
}

/// Images that are given by descriptor.
fn given<'a>(files: &[&std::fs::File], flags: &[(&'a str, bool)]) -> Options<'a> {
    let files: Vec<_> = files.iter().map(|file| descriptor(file)).collect();
    let flags = flags.iter().map(|(key, value)| (*key, Variant::from(*value)));
    options(flags.chain([("fds", Variant::from(files))]))
}

#[tokio::test]
async fn an_image_is_given_by_descriptor_to_what_runs_and_to_nothing_else() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let drive = "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk></devices>";
    let machine = MACHINE.replace("</devices>", drive);
    let domain = Client { connection: daemon.connect().await }.define(&machine).await.expect("defined");
    let image = daemon.folder().join("image");
    std::fs::write(&image, [0; 4096]).expect("written");
    let open = |write: bool| std::fs::OpenOptions::new().read(true).write(write).open(&image).expect("opened");
    let (read, write) = (open(false), open(true));
    let attach = async |xml: &str, options: Options<'_>| domain.call("AttachDevice", &(xml, options)).await;
    refused(attach(DISK, given(&[&write], &[])).await, "OperationInvalid", "start it first");
    domain.run("Start").await.expect("started");
    let before = (domain.xml().await, stored(&domain).await);

    refused(attach(DISK, given(&[&write], &[("config", true)])).await, "InvalidArgument", "'config'");
    refused(attach(DISK, given(&[&write, &read], &[])).await, "InvalidArgument", "2 descriptors");
    refused(attach(CARD, given(&[&write], &[])).await, "InvalidArgument", "<interface>");
    refused(attach(DISK, given(&[&read], &[])).await, "InvalidArgument", "<readonly/>");
    let pipe =
        std::io::pipe().map(|(_, mouth)| std::fs::File::from(std::os::fd::OwnedFd::from(mouth))).expect("a pipe");
    refused(attach(DISK, given(&[&pipe], &[])).await, "InvalidArgument", "cannot be read");
    let folder = std::fs::File::open(daemon.folder()).expect("opened");
    let shown = DISK.replace("</disk>", "<readonly/></disk>");
    refused(attach(&shown, given(&[&folder], &[])).await, "InvalidArgument", "no regular file");
    let other = DISK.replace("<target", "<driver type='qcow2'/><target");
    refused(attach(&other, given(&[&write], &[])).await, "InvalidArgument", "no qcow2 image");
    let chain = DISK.replace(
        "</disk>",
        "<backingStore type='file'><format type='raw'/><source file='/base'/></backingStore></disk>",
    );
    refused(attach(&chain, given(&[&write], &[])).await, "InvalidArgument", "one image");
    let named = DISK.replace("/more.img'", "/more.img' fdgroup='1-rw'");
    refused(attach(&named, given(&[&write], &[])).await, "InvalidArgument", "'fdgroup'");
    refused(attach(&named, options([])).await, "InvalidArgument", "'fdgroup'");
    assert_eq!(before, (domain.xml().await, stored(&domain).await));

    attach(DISK, given(&[&write], &[])).await.expect("plugged in");
    let live = domain.xml().await;
    assert!(live.contains("/more.img' fdgroup='") && stored(&domain).await == before.1, "{live}");
    let snapshot = domain.call("CreateSnapshot", &("", options([]))).await;
    refused(snapshot, "OperationUnsupported", "'vdb' was given by descriptor");
    // What is shown of it is no configuration.
    let other = live.replace("<name>web<", "<name>other<");
    let other = other
        .split("<uuid>")
        .zip([0, 1])
        .map(|(part, n)| if n == 0 { part } else { &part[part.find("</uuid>").expect("its end") + 7..] });
    let other = domain.client.define(&other.collect::<String>()).await.expect("stored");
    let (name, text) = other.run("Start").await.expect_err("nothing to start it with");
    assert!(text.contains("by descriptor"), "{name}: {text}");

    let fd = |file: &std::fs::File, more: &[(&'static str, bool)]| {
        let more: Vec<_> = more.iter().map(|(key, value)| (*key, Variant::from(*value))).collect();
        options(more.into_iter().chain([("fd", Variant::from(descriptor(file)))]))
    };
    let change = async |file: &str, options: Options<'_>| domain.call("ChangeMedium", &("sda", file, options)).await;
    refused(change("", fd(&read, &[])).await, "InvalidArgument", "the path that is shown");
    refused(change("/a.iso", fd(&read, &[("config", true)])).await, "InvalidArgument", "'config'");
    refused(change("/a.iso", fd(&folder, &[])).await, "InvalidArgument", "no regular file");
    change("/a.iso", fd(&read, &[])).await.expect("changed");
    assert!(domain.xml().await.contains("/a.iso' fdgroup='") && stored(&domain).await == before.1);
    change("", with([("live", true)])).await.expect("taken out");
    detach(&domain, "<disk><target dev='vdb'/></disk>", &[("live", true)]).await.expect("unplugged");
    let live = domain.xml().await;
    assert!(!live.contains("fdgroup") && !live.contains("vdb") && stored(&domain).await == before.1, "{live}");
}
