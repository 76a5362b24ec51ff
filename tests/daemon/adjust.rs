//! What changes on a machine without plugging, as clients see it, of the test driver's machines.

use crate::common::Daemon;
use crate::common::client::{Client, Domain, Options, Refusal, Watch, options};
use crate::common::snapshots::with;
use std::collections::HashMap;
use zbus::{OwnedVariant, Variant};

const MACHINE: &str = "<domain type='test'><name>web</name><memory>65536</memory><vcpu current='2'>4</vcpu>\
     <os><type>hvm</type></os><devices><memballoon model='virtio'/></devices></domain>";
const MIB: u64 = 1 << 20;

async fn stored(domain: &Domain) -> String {
    domain.call("GetXML", &(with([("inactive", true)]),)).await.expect("told").body().deserialize().expect("s")
}

fn refused(answer: Result<impl std::fmt::Debug, Refusal>, error: &str, word: &str) {
    let (name, text) = answer.expect_err(error);
    assert!(name == format!("org.virt.Error.{error}") && text.contains(word), "{name}: {text}");
}

fn live<'a>() -> Options<'a> {
    with([("live", true)])
}

fn config<'a>() -> Options<'a> {
    with([("config", true)])
}

fn maximum<'a>() -> Options<'a> {
    with([("maximum", true)])
}

/// The next change of that property, with all that changed with it.
async fn changed(watch: &mut Watch, property: &str) -> HashMap<String, OwnedVariant> {
    loop {
        let message = watch.next().await;
        if message.header().member().is_some_and(|member| member == "PropertiesChanged") {
            let (_, values, _): (String, HashMap<String, OwnedVariant>, Vec<String>) =
                message.body().deserialize().expect("sa{sv}as");
            if values.contains_key(property) {
                return values;
            }
        }
    }
}

#[tokio::test]
async fn memory_is_given_and_taken_in_what_runs_in_what_is_stored_or_both() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(MACHINE).await.expect("defined");
    let set = async |bytes: u64, options: Options<'_>| domain.call("SetMemory", &(bytes, options)).await;
    set(32 * MIB, options([])).await.expect("of what is stored");
    assert!(stored(&domain).await.contains("<currentMemory unit='KiB'>32768</currentMemory>"));
    set(128 * MIB, maximum()).await.expect("a larger machine");
    assert_eq!(domain.property::<u64>("MaximumMemory").await, 128 * MIB);
    assert_eq!(domain.property::<u64>("Memory").await, 32 * MIB, "what it has is no more than before");
    refused(set(0, options([])).await, "InvalidArgument", "134217728");
    refused(set(129 * MIB, options([])).await, "InvalidArgument", "134217728");
    refused(set(0, maximum()).await, "InvalidArgument", "memory");
    refused(set(MIB, live()).await, "OperationInvalid", "start it first");
    refused(set(MIB, with([("fast", true)])).await, "InvalidArgument", "'fast'");

    domain.run("Start").await.expect("started");
    let mut watch = domain.client.watch().await;
    set(16 * MIB, live()).await.expect("the balloon is asked");
    let told = changed(&mut watch, "Memory").await;
    assert_eq!(u64::try_from(told["Memory"].try_clone().expect("a copy")), Ok(16 * MIB));
    assert!(told.contains_key("ConfigChanged"), "told together: {told:?}");
    assert!(domain.xml().await.contains("<currentMemory unit='KiB'>16384</currentMemory>"));
    assert!(stored(&domain).await.contains("<currentMemory unit='KiB'>32768</currentMemory>"));
    set(64 * MIB, options([])).await.expect("in both");
    assert!(!domain.property::<bool>("ConfigChanged").await);
    let mut watch = domain.client.watch().await;
    set(48 * MIB, live()).await.expect("asked again");
    loop {
        let message = watch.next().await;
        if message.header().member().is_some_and(|member| member == "BalloonChanged") {
            assert_eq!(message.body().deserialize::<u64>().expect("t"), 48 * MIB);
            break;
        }
    }
    refused(set(256 * MIB, with([("maximum", true), ("live", true)])).await, "InvalidArgument", "stays");
    set(96 * MIB, maximum()).await.expect("for the next start");
    assert_eq!(domain.property::<u64>("MaximumMemory").await, 128 * MIB, "what runs keeps its own");
    assert!(stored(&domain).await.contains("<memory unit='KiB'>98304</memory>"));
}

#[tokio::test]
async fn a_guest_tells_of_its_memory_as_often_as_it_is_asked_to() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(MACHINE).await.expect("defined");
    domain.run("Start").await.expect("started");
    let set = async |seconds: u32, options: Options<'_>| domain.call("SetMemoryStatsPeriod", &(seconds, options)).await;
    set(5, live()).await.expect("every five seconds");
    assert!(domain.xml().await.contains("<stats period='5'/>") && !stored(&domain).await.contains("<stats"));
    set(2, options([])).await.expect("in both");
    assert!(
        domain.xml().await.contains("<stats period='2'/>") && stored(&domain).await.contains("<stats period='2'/>")
    );
    set(0, options([])).await.expect("no longer");
    assert!(!domain.xml().await.contains("<stats") && !stored(&domain).await.contains("<stats"));
    let bare = MACHINE.replace("web", "bare").replace("model='virtio'", "model='none'");
    let bare = client.define(&bare).await.expect("defined");
    refused(bare.call("SetMemoryStatsPeriod", &(1_u32, options([]))).await, "OperationUnsupported", "<memballoon>");
    bare.run("Start").await.expect("started");
    refused(bare.call("SetMemory", &(MIB, live())).await, "OperationUnsupported", "<memballoon>");
}

#[tokio::test]
async fn vcpus_come_and_go_and_both_configurations_follow() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(MACHINE).await.expect("defined");
    let set = async |count: u32, options: Options<'_>| domain.call("SetVCPUs", &(count, options)).await;
    set(3, options([])).await.expect("of what is stored");
    assert!(stored(&domain).await.contains("<vcpu current='3'>4</vcpu>"));
    set(2, config()).await.expect("as before");
    refused(set(0, options([])).await, "InvalidArgument", "1 to 4");
    refused(set(5, options([])).await, "InvalidArgument", "1 to 4");
    for count in [0, u32::MAX] {
        refused(set(count, maximum()).await, "InvalidArgument", "1 to 16384");
    }
    set(8, maximum()).await.expect("more of them");
    assert_eq!(domain.property::<u32>("MaximumVCPUs").await, 8);
    assert_eq!(domain.property::<u32>("VCPUs").await, 2);

    domain.run("Start").await.expect("started");
    let mut watch = domain.client.watch().await;
    set(4, live()).await.expect("two more");
    changed(&mut watch, "VCPUs").await;
    assert_eq!(domain.property::<u32>("VCPUs").await, 4);
    let plugged = "<vcpu id='3' enabled='yes' hotpluggable='yes'/>";
    assert!(domain.xml().await.contains(plugged) && stored(&domain).await.contains("<vcpu current='2'>8</vcpu>"));
    assert!(domain.property::<bool>("ConfigChanged").await);
    set(2, live()).await.expect("as it was");
    assert!(!domain.property::<bool>("ConfigChanged").await && !domain.xml().await.contains("<vcpus>"));
    refused(set(1, live()).await, "OperationUnsupported", "2 of its vCPUs");
    set(3, options([])).await.expect("in both");
    assert!(!domain.property::<bool>("ConfigChanged").await, "what can go again can after the next start, too");
    assert!(stored(&domain).await.contains("<vcpu id='2' enabled='yes' hotpluggable='yes'/>"));

    // A guest that stands lets go of nothing until it runs again; then all follows.
    domain.bare("Suspend").await.expect("paused");
    let soon = || options([("timeout-usec", Variant::from(1000_u64))]);
    refused(set(2, soon()).await, "TimedOut", "'vcpu2'");
    assert_eq!(domain.property::<u32>("VCPUs").await, 3);
    assert!(stored(&domain).await.contains("<vcpu current='3'>8</vcpu>"), "nothing has changed");
    let mut watch = domain.client.watch().await;
    domain.bare("Resume").await.expect("it goes on");
    changed(&mut watch, "VCPUs").await;
    assert_eq!(domain.property::<u32>("VCPUs").await, 2);
    assert!(stored(&domain).await.contains("<vcpu current='2'>8</vcpu>"), "both follow");
    refused(set(2, with([("maximum", true), ("live", true)])).await, "InvalidArgument", "stays");
    set(2, maximum()).await.expect("for the next start");
    assert_eq!(domain.property::<u32>("MaximumVCPUs").await, 8, "what runs keeps its own");
}

const LIMITED: &str = "<domain type='test'><name>limited</name><memory>65536</memory><os><type>hvm</type></os><devices>\
     <disk type='file'><source file='/a.img'/><target dev='vda' bus='virtio'/></disk>\
     <disk type='file'><source file='/b.img'/><target dev='vdb' bus='virtio'/></disk>\
     <interface type='bridge'><mac address='52:54:00:00:00:0a'/><source bridge='br0'/></interface></devices></domain>";

/// Values as numbers, whatever their type.
fn numbers(reply: &zbus::Message) -> Vec<(String, i128)> {
    let values: HashMap<String, OwnedVariant> = reply.body().deserialize().expect("a{sv}");
    let number = |value: &OwnedVariant| match value.downcast_ref::<u64>() {
        Ok(number) => i128::from(number),
        Err(_) => i128::from(value.downcast_ref::<i64>().expect("x")),
    };
    let mut all: Vec<(String, i128)> = values.iter().map(|(key, value)| (key.clone(), number(value))).collect();
    all.sort();
    all
}

fn number<'a>(number: u64) -> Variant<'a> {
    Variant::from(number)
}

#[tokio::test]
async fn disks_are_limited_by_typed_keys() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(LIMITED).await.expect("defined");
    let set = async |values: &[(&'static str, u64)], how: Options<'_>| {
        let values = options(values.iter().map(|(key, value)| (*key, number(*value))));
        domain.call("SetBlockThrottle", &("vda", values, how)).await
    };
    let get = async |how: Options<'_>| numbers(&domain.call("GetBlockThrottle", &("vda", how)).await.expect("told"));
    assert_eq!(get(options([])).await, []);
    set(&[("read-bytes-per-second", 4096)], options([])).await.expect("of what is stored");
    assert!(stored(&domain).await.contains("<read_bytes_sec>4096</read_bytes_sec>"));
    domain.run("Start").await.expect("started");
    let more = [("read-bytes-per-second-maximum", 8192), ("read-bytes-per-second-maximum-usec", 2_000_000)];
    set(&more, live()).await.expect("a burst");
    let told = get(options([])).await;
    let burst = [("read-bytes-per-second", 4096), more[0], more[1]].map(|(key, n)| (key.to_owned(), i128::from(n)));
    assert_eq!(told, burst, "what runs");
    assert_eq!(get(config()).await, burst[..1], "what is stored");
    assert!(domain.property::<bool>("ConfigChanged").await);
    refused(set(&[("total-bytes-per-second", 1)], live()).await, "InvalidArgument", "not for both");
    refused(set(&[("read-bytes-per-second", 9000)], live()).await, "InvalidArgument", "at least 9000");
    refused(set(&[("read-bytes", 1)], live()).await, "InvalidArgument", "'read-bytes'");
    refused(set(&[("group", 1)], live()).await, "InvalidArgument", "type s");
    let half = ("read-bytes-per-second-maximum-usec", 1_500_000);
    refused(set(&[half], live()).await, "InvalidArgument", "whole seconds");
    assert_eq!(get(options([])).await, burst, "what is refused changes nothing");
    let all = burst.map(|(key, _)| key);
    let lift: Vec<(&str, Variant<'_>)> = all.iter().map(|key| (key.as_str(), number(0))).collect();
    domain.call("SetBlockThrottle", &("vda", options(lift), options([]))).await.expect("lifted in both");
    assert_eq!((get(live()).await, get(config()).await), (Vec::new(), Vec::new()));

    // A group has the same limits for all of its disks.
    let group = || ("group", Variant::from("slow"));
    let both = options([group(), ("total-requests-per-second", number(9))]);
    domain.call("SetBlockThrottle", &("vda", both, live())).await.expect("a group");
    domain.call("SetBlockThrottle", &("vdb", options([group()]), live())).await.expect("it joins");
    let seven = options([("total-requests-per-second", number(7))]);
    domain.call("SetBlockThrottle", &("vdb", seven, live())).await.expect("of both");
    let told = domain.call("GetBlockThrottle", &("vda", live())).await.expect("told");
    let told: HashMap<String, OwnedVariant> = told.body().deserialize().expect("a{sv}");
    assert_eq!(told["total-requests-per-second"].downcast_ref::<u64>(), Ok(7));
    assert_eq!(told["group"].downcast_ref::<&str>(), Ok("slow"));
    refused(domain.call("GetBlockThrottle", &("vdz", options([]))).await, "NoSuchDevice", "'vdz'");
    refused(domain.call("SetBlockThrottle", &("vdz", options([]), options([]))).await, "NoSuchDevice", "'vdz'");
    let both = with([("live", true), ("config", true)]);
    refused(domain.call("GetBlockThrottle", &("vda", both)).await, "InvalidArgument", "'live' or 'config'");
}

#[tokio::test]
async fn time_memory_and_cards_are_limited_by_typed_keys() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(LIMITED).await.expect("defined");
    domain.run("Start").await.expect("started");
    let pairs = |all: &[(&str, i128)]| all.iter().map(|(key, n)| ((*key).to_owned(), *n)).collect::<Vec<_>>();
    let get = async |member: &str, how: Options<'_>| numbers(&domain.call(member, &(how,)).await.expect("told"));
    let time = options([("cpu-shares", number(512)), ("vcpu-quota-usec", Variant::from(-1_i64))]);
    domain.call("SetSchedulerParameters", &(time, options([]))).await.expect("in both");
    let told = pairs(&[("cpu-shares", 512), ("vcpu-quota-usec", -1)]);
    assert_eq!(
        (get("GetSchedulerParameters", live()).await, get("GetSchedulerParameters", config()).await),
        (told.clone(), told)
    );
    assert!(stored(&domain).await.contains("<shares>512</shares>") && !domain.property::<bool>("ConfigChanged").await);
    let lifted = options([("cpu-shares", number(0)), ("vcpu-quota-usec", Variant::from(0_i64))]);
    domain.call("SetSchedulerParameters", &(lifted, live())).await.expect("lifted");
    assert!(!domain.xml().await.contains("<cputune>") && stored(&domain).await.contains("<cputune>"));
    let wrong = options([("vcpu-quota-usec", number(1))]);
    refused(domain.call("SetSchedulerParameters", &(wrong, live())).await, "InvalidArgument", "type x");

    let memory = options([("hard-limit", number(256 * MIB)), ("soft-limit", number(128 * MIB))]);
    domain.call("SetMemoryParameters", &(memory, live())).await.expect("limited");
    let told = pairs(&[("hard-limit", 256 << 20), ("soft-limit", 128 << 20)]);
    assert_eq!(get("GetMemoryParameters", options([])).await, told);
    assert_eq!(get("GetMemoryParameters", config()).await, []);

    let known = "52:54:00:00:00:0a";
    let card =
        async |how: Options<'_>| numbers(&domain.call("GetInterfaceBandwidth", &("net0", how)).await.expect("told"));
    let rates =
        options([("inbound-average", number(1000)), ("outbound-average", number(9)), ("outbound-burst", number(64))]);
    domain.call("SetInterfaceBandwidth", &("net0", rates, options([]))).await.expect("in both, by what runs calls it");
    let told = pairs(&[("inbound-average", 1000), ("outbound-average", 9), ("outbound-burst", 64)]);
    assert_eq!((card(live()).await, card(config()).await), (told.clone(), told));
    assert!(stored(&domain).await.contains("<inbound average='1000'/>"));
    let lifted = options([("outbound-average", number(0))]);
    domain.call("SetInterfaceBandwidth", &(known, lifted, options([]))).await.expect("that direction is lifted");
    assert!(!stored(&domain).await.contains("<outbound"));
    let floor = options([("inbound-floor", number(1))]);
    refused(domain.call("SetInterfaceBandwidth", &(known, floor, live())).await, "InvalidArgument", "virtual network");
    refused(domain.call("GetInterfaceBandwidth", &("net7", options([]))).await, "NoSuchDevice", "'net7'");
}

const SHOWN: &str = "<domain type='test'><name>shown</name><memory>65536</memory><os><type>hvm</type></os><devices>\
     <disk type='file'><source file='/a.img'/><target dev='vda' bus='virtio'/></disk>\
     <interface type='bridge'><mac address='52:54:00:00:00:0a'/><source bridge='br0'/></interface>\
     <graphics type='vnc' port='-1' autoport='yes' passwd='first'/><graphics type='dbus' p2p='yes'/>\
     <memballoon model='virtio'/></devices></domain>";

async fn with_secrets(domain: &Domain, inactive: bool) -> String {
    let form = with([("secure", true), ("inactive", inactive)]);
    domain.call("GetXML", &(form,)).await.expect("told").body().deserialize().expect("s")
}

#[tokio::test]
async fn a_display_gets_another_password_which_nobody_is_shown() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(SHOWN).await.expect("defined");
    let set =
        async |index: u32, word: &str, how: Options<'_>| domain.call("SetGraphicsPassword", &(index, word, how)).await;
    let keep = || options([("connected", Variant::from("keep"))]);
    refused(set(0, "s3cret", keep()).await, "InvalidArgument", "nobody");
    domain.run("Start").await.expect("started");
    let until = ("valid-until-usec", Variant::from(1_795_403_655_500_000_u64));
    set(0, "s3cret", options([until, ("live", Variant::from(true))])).await.expect("set");
    let said = "passwd='s3cret' passwdValidTo='2026-11-23T03:14:15'";
    assert!(with_secrets(&domain, false).await.contains(said) && with_secrets(&domain, true).await.contains("'first'"));
    assert!(!domain.xml().await.contains("s3cret"));
    set(0, "0ther", keep()).await.expect("in both");
    for inactive in [false, true] {
        let xml = with_secrets(&domain, inactive).await;
        assert!(xml.contains("passwd='0ther'") && !xml.contains("passwdValidTo"), "{xml}");
    }
    refused(set(0, "", options([])).await, "InvalidArgument", "empty");
    refused(set(1, "s3cret", options([])).await, "OperationUnsupported", "VNC and SPICE");
    let error = set(7, "s3cret", options([])).await.expect_err("no such display");
    assert!(error.0 == "org.virt.Error.NoSuchDevice" && !error.1.contains("s3cret"), "{error:?}");
    let wrong = options([("connected", Variant::from("perhaps"))]);
    refused(set(0, "s3cret", wrong).await, "InvalidArgument", "'perhaps'");
}

#[tokio::test]
async fn a_document_changes_of_a_device_what_can_change() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(SHOWN).await.expect("defined");
    domain.run("Start").await.expect("started");
    let update = async |xml: &str, how: Options<'_>| domain.call("UpdateDevice", &(xml, how)).await;
    let disk = |more: &str| format!("<disk type='file'>{more}<target dev='vda'/></disk>");
    let slow = "<iotune><total_iops_sec>7</total_iops_sec></iotune>";
    update(&disk(slow), live()).await.expect("limited");
    let words = "<total_iops_sec>7</total_iops_sec>";
    assert!(domain.xml().await.contains(words) && !stored(&domain).await.contains("<iotune>"));
    update(&disk("<source file='/a.img' startupPolicy='optional'/>"), options([])).await.expect("in both");
    assert!(domain.xml().await.contains(words), "what is not said stays");
    assert!(stored(&domain).await.contains("startupPolicy='optional'"));
    refused(update(&disk("<source file='/b.img'/>"), options([])).await, "OperationUnsupported", "/b.img");
    let both = "<iotune><total_iops_sec>7</total_iops_sec><read_iops_sec>7</read_iops_sec></iotune>";
    refused(update(&disk(both), options([])).await, "InvalidArgument", "not for both");

    let card = |more: &str| format!("<interface type='bridge'><mac address='52:54:00:00:00:0A'/>{more}</interface>");
    let all = "<source bridge='br7'/><link state='down'/><bandwidth><inbound average='9'/></bandwidth>";
    update(&card(all), options([])).await.expect("all of them");
    for xml in [domain.xml().await, stored(&domain).await] {
        let has = ["bridge='br7'", "state='down'", "<inbound average='9'/>"].map(|word| xml.contains(word));
        assert_eq!(has, [true; 3], "{xml}");
    }
    update(&card("<bandwidth/>"), options([])).await.expect("lifted, and the link is up");
    assert!(!stored(&domain).await.contains("<bandwidth>") && !stored(&domain).await.contains("'down'"));
    update(&card("<filterref filter='allow-arp'/>"), live()).await.expect("in what runs");
    assert!(domain.xml().await.contains("filter='allow-arp'") && !stored(&domain).await.contains("<filterref"));
    update(&card(""), options([])).await.expect("what is not said stays");
    assert!(domain.xml().await.contains("filter='allow-arp'") && !stored(&domain).await.contains("<filterref"));
    update(&card("<filterref/>"), options([])).await.expect("lifted");
    assert!(!domain.xml().await.contains("<filterref"));
    refused(update(&card("<filterref filter='mine'/>"), options([])).await, "ConfigInvalid", "mine");

    update("<graphics type='vnc' passwd='n3w'/>", options([])).await.expect("another password");
    assert!(
        with_secrets(&domain, true).await.contains("'n3w'") && with_secrets(&domain, false).await.contains("'n3w'")
    );
    // The time alone is of the password that it has.
    update("<graphics type='vnc' passwdValidTo='2031-01-02T03:04:05'/>", live()).await.expect("for a time");
    let (runs, kept) = (with_secrets(&domain, false).await, with_secrets(&domain, true).await);
    assert!(runs.contains("passwd='n3w' passwdValidTo='2031-01-02T03:04:05'"), "{runs}");
    assert!(!kept.contains("passwdValidTo"), "{kept}");
    let timed = "<graphics type='dbus' p2p='yes' passwdValidTo='2031-01-02T03:04:05'/>";
    refused(update(timed, options([])).await, "OperationUnsupported", "no password");
    update("<graphics type='vnc' listen='0.0.0.0'/>", live()).await.expect("elsewhere");
    assert!(domain.xml().await.contains("listen='0.0.0.0'") && !stored(&domain).await.contains("0.0.0.0"));
    let named = "<graphics type='vnc'><listen type='address' address='example.org'/></graphics>";
    refused(update(named, live()).await, "InvalidArgument", "example.org");
    let two = "<graphics type='vnc' listen='::1'><listen type='address' address='127.0.0.2'/></graphics>";
    refused(update(two, live()).await, "InvalidArgument", "first <listen>");
    let besides = "<graphics type='vnc'><listen type='address'/><listen type='address' address='::1'/></graphics>";
    refused(update(besides, live()).await, "OperationUnsupported", "listen");
    refused(
        update("<graphics type='vnc' connected='disconnect'/>", options([])).await,
        "OperationUnsupported",
        "passwd",
    );
    assert!(!domain.xml().await.contains("connected="), "what does nothing is not kept");
    let socket = "<graphics type='vnc' socket='/tmp/vnc'/>";
    refused(update(socket, live()).await, "OperationUnsupported", "socket='/tmp/vnc'");
    refused(update("<graphics type='spice'/>", options([])).await, "NoSuchDevice", "<graphics>");
    update("<memballoon model='virtio'><stats period='3'/></memballoon>", options([])).await.expect("a period");
    assert!(domain.xml().await.contains("period='3'") && stored(&domain).await.contains("period='3'"));
    refused(update("<memballoon model='xen'/>", options([])).await, "OperationUnsupported", "model='xen'");
    refused(update("<sound model='ich9'/>", options([])).await, "OperationUnsupported", "<sound>");
}
