//! A stranger who tries odd things: every answer is an error of ours, no secret is told, and nothing changes.

use crate::common::client::{Client, options};
use crate::common::users::BOB;
use crate::common::{Daemon, Setup};
use zbus::Variant;

const WEB: &str = "<domain type='test'><name>web</name><memory>65536</memory><os><type>hvm</type></os>\
                   <devices><graphics type='vnc' passwd='hunter2x'/></devices></domain>";

/// A document with something in its devices.
fn with(devices: &str) -> String {
    format!(
        "<domain type='qemu'><name>q</name><memory>65536</memory><os><type>hvm</type></os>\
         <devices>{devices}</devices></domain>"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_things_are_refused_and_tell_nothing() {
    let Some(daemon) = Daemon::on_system_bus(Setup::with_example_rules()).await else { return };
    let root = Client { connection: daemon.connect().await };
    let bob = Client { connection: daemon.connect_as(&BOB).await };
    let domain = root.define(WEB).await.expect("defined");
    let before: String = domain.xml().await;
    assert!(!before.contains("hunter2x"), "{before}");

    let findings = async |xml: &str| {
        let reply = bob.call("/org/virt", "org.virt.Manager.ValidateDomain", &(xml, options([]))).await.expect("read");
        reply.body().deserialize::<Vec<(String, u32, u32, String)>>().expect("a(suus)")
    };
    let crowd = findings(&with(&"<controller type='usb'/>".repeat(20_000))).await;
    assert!(crowd.len() == 1 && crowd[0].3.contains("devices"), "{:?}", crowd.first());
    let program = findings(&with("<emulator>/bin/true</emulator>")).await;
    assert!(program.iter().any(|finding| finding.3.contains("nothing is known of it yet")), "{program:?}");

    // What XML cannot hold would be another text after a restart.
    for text in ["a\u{1}b", "a\u{ffff}"] {
        let body = (text, options([]));
        let (name, why) = root.call(&domain.path, "org.virt.Domain.SetTitle", &body).await.expect_err("no title");
        assert_eq!(name, "org.virt.Error.InvalidArgument", "{text:?}: {why}");
    }
    for (key, value) in
        [("secure", Variant::from(true)), ("secure", Variant::from(1u32)), ("nope", Variant::from(true))]
    {
        let refused = bob.call(&domain.path, "org.virt.Domain.GetXML", &(options([(key, value)]),)).await;
        refused.expect_err("not for him");
    }
    assert_eq!(domain.xml().await, before);
    assert!(!daemon.log().contains("hunter2x"), "{}", daemon.log());
}
