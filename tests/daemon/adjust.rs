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
    refused(set(0, maximum()).await, "InvalidArgument", "at least 1");
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
