//! How virtd comes up and goes, on both buses.

use crate::common::client::Client;
use crate::common::users::{ALICE, BOB};
use crate::common::{Daemon, Setup, read_project_file};
use std::process::Output;

/// Runs another virtd to its end.
fn another(daemon: &Daemon, kind: &str) -> Output {
    let mut command = daemon.inside(env!("CARGO_BIN_EXE_virtd"));
    command.args([kind, "--root"]).arg(daemon.folder().join("other")).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn a_session_has_one_virtd_that_ends_in_order() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let second = another(&daemon, "--session");
    assert_eq!(second.status.code(), Some(1));
    assert!(said(&second).contains("org.virt is taken"), "{}", said(&second));
    assert!(daemon.stop_virtd().await.success());
    daemon.start_virtd().await;
}

#[tokio::test]
async fn anybody_on_the_system_bus_can_see_what_there_is() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let members = daemon.busctl(&ALICE, &["introspect", "org.virt", "/org/virt"]).unwrap();
    for member in ["DefineDomain", "ListDomains", "DomainLifecycle", "GetManagedObjects"] {
        assert!(members.contains(member), "{members}");
    }
    let call = ["call", "org.virt", "/org/virt", "org.virt.Manager", "ListDomains", "a{sv}", "0"];
    assert_eq!(daemon.busctl(&BOB, &call).unwrap(), "a(osssb) 0");
}

#[tokio::test]
async fn a_killed_virtd_leaves_the_way_free_for_the_next() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    for _ in 0..3 {
        daemon.kill_virtd().await;
        daemon.start_virtd().await;
    }
}

#[tokio::test]
async fn a_wrong_configuration_is_named_and_nothing_served() {
    let Some(daemon) = Daemon::session_bus() else { return };
    let folder = daemon.folder().join("other/etc/virt");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("virtd.toml"), "[qemu]\nusr = \"me\"\n").unwrap();
    let output = another(&daemon, "--session");
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("etc/virt/virtd.toml") && said(&output).contains("usr"), "{}", said(&output));
}

/// What README.md says to try by hand, pasted at once.
#[tokio::test]
async fn the_readme_can_be_pasted() {
    let Some(daemon) = Daemon::session_bus() else { return };
    let readme = read_project_file("README.md");
    let (_, rest) = readme.split_once("## Try it by hand").expect("the section");
    let (section, _) = rest.split_once("\n## ").expect("the next one");
    let blocks: Vec<_> = section.split("```sh\n").skip(1).filter_map(|text| text.split_once("```")).collect();
    let lines: String = blocks.iter().map(|(block, _)| *block).collect();
    let root = daemon.folder().join("tried");
    let script = lines
        .replace("cargo build\n", "set -eo pipefail\n")
        .replace("target/debug/virtd", env!("CARGO_BIN_EXE_virtd"))
        .replace("/tmp/virt", root.to_str().expect("a path"));
    let output = daemon.inside("bash").args(["-c", &script]).output().unwrap();
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{shown}{}", said(&output));
    for part in ["org.virt.Manager", "('resumed', 'from-snapshot')", "\"running\"", ".Broken"] {
        assert!(shown.contains(part), "no {part} in {shown}");
    }
    assert!(!root.exists());
}

/// S6: too few descriptors are told at once, in a sentence, and not when the first guest is to be started.
#[tokio::test]
async fn too_few_descriptors_are_an_error() {
    let Some(daemon) = Daemon::session_bus() else { return };
    let mut command = daemon.inside("prlimit");
    command.args(["--nofile=64:64", env!("CARGO_BIN_EXE_virtd"), "--session", "--root"]);
    let output = command.arg(daemon.folder().join("other")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("virtd may have 64 descriptors and needs 512"), "{}", said(&output));
}

#[tokio::test]
async fn a_bus_that_is_not_there_is_an_error() {
    let Some(daemon) = Daemon::session_bus() else { return };
    let mut command = daemon.inside(env!("CARGO_BIN_EXE_virtd"));
    command.env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nowhere").args(["--session", "--root"]);
    let output = command.arg(daemon.folder().join("other")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("the bus cannot be reached"), "{}", said(&output));
}

/// The shipped activation file, with this virtd instead of the installed one.
#[tokio::test]
async fn a_first_call_starts_virtd() {
    let Some(daemon) = Daemon::session_bus() else { return };
    let ours = format!("{} --session --root {}", env!("CARGO_BIN_EXE_virtd"), daemon.root().display());
    let file = read_project_file("data/dbus/org.virt.session.service").replace("/usr/sbin/virtd --session", &ours);
    std::fs::write(daemon.folder().join("services/org.virt.service"), file).unwrap();
    let connection = daemon.connect().await;
    zbus::fdo::DBusProxy::new(&connection).await.unwrap().reload_config().await.unwrap();
    let version = Client { connection }.property::<String>("/org/virt", "org.virt.Manager", "Version").await;
    assert_eq!(version, env!("CARGO_PKG_VERSION"));
}
