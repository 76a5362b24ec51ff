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

/// C1: a link in a folder where everybody may write leads to a real QEMU, then to a program of theirs, and so on.
#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_a_stranger_names_is_never_run() {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    let Some(daemon) = Daemon::on_system_bus(Setup::with_example_rules()).await else { return };
    let room = daemon.folder().join("open");
    std::fs::create_dir(&room).unwrap();
    std::fs::set_permissions(&room, std::fs::Permissions::from_mode(0o1777)).unwrap();
    let (ran, theirs, link) = (room.join("ran"), room.join("qemu-theirs"), room.join("qemu"));
    std::fs::write(&theirs, format!("#!/bin/sh\ntouch {}\n", ran.display())).unwrap();
    std::fs::set_permissions(&theirs, std::fs::Permissions::from_mode(0o755)).unwrap();
    let ended = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let racing = std::thread::spawn({
        let (ended, next, link) = (ended.clone(), room.join("next"), link.clone());
        move || {
            while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                for target in [std::path::Path::new("/usr/bin/qemu-system-x86_64"), &theirs] {
                    symlink(target, &next).unwrap();
                    std::fs::rename(&next, &link).unwrap();
                }
            }
        }
    });
    let document = with(&format!("<emulator>{}</emulator>", link.display()));
    for who in [&BOB, &crate::common::users::ADMIN] {
        let client = Client { connection: daemon.connect_as(who).await };
        for _ in 0..100 {
            let body = (document.as_str(), options([]));
            client.call("/org/virt", "org.virt.Manager.ValidateDomain", &body).await.expect("findings");
            let body = (document.as_str(), "qemu-argv");
            client.call("/org/virt", "org.virt.Manager.DomainToNative", &body).await.expect_err("it cannot be asked");
        }
    }
    ended.store(true, std::sync::atomic::Ordering::Relaxed);
    racing.join().unwrap();
    assert!(!ran.exists(), "it was run");
}
