//! The parts of a machine tried together: for each combination of firmware variables, TPM, memory and disks the check says
//! what the deed then does.

use crate::common::client::Client;
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use crate::common::{Daemon, have, skip};
use std::collections::HashMap;
use std::path::Path;

const CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// How a snapshot is asked for.
struct Asked {
    memory: &'static str,
    disk: &'static str,
    options: &'static [(&'static str, bool)],
}

/// All ways in which memory and disks go together, or not.
fn ways() -> Vec<Asked> {
    let mut ways = Vec::new();
    let kinds: [(&str, &[(&str, bool)]); 4] =
        [("no", &[("disk-only", true)]), ("internal", &[]), ("external", &[]), ("external", &[("live", true)])];
    for (memory, options) in kinds {
        for disk in ["no", "internal", "external"] {
            ways.push(Asked { memory, disk, options });
        }
    }
    ways
}

/// A machine with these parts; its guest need not boot.
fn machine(daemon: &Daemon, name: &str, variables: Option<&str>, tpm: bool) -> Option<String> {
    let mut xml = Tick::new(daemon, name, "")?.xml;
    if let Some(format) = variables {
        let own = daemon.folder().join(format!("{name}.vars"));
        let template = format!("template='{VARIABLES}' templateFormat='raw' format='{format}'");
        let firmware = format!(
            "<loader readonly='yes' type='pflash'>{CODE}</loader><nvram {template}>{}</nvram></os>",
            own.display()
        );
        xml = xml.replace("</os>", &firmware);
    }
    if tpm {
        let device = "<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm></devices>";
        xml = xml.replace("</devices>", device);
    }
    Some(xml)
}

#[tokio::test]
async fn l8_for_every_combination_of_parts_the_check_says_what_the_deed_does() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    if !have(&["swtpm", "swtpm_setup"]) {
        return;
    }
    if !Path::new(CODE).exists() {
        return skip("there is no UEFI firmware (Debian has it in ovmf)");
    }
    let client = Client { connection: daemon.connect().await };
    let (mut done, mut differ) = (0, Vec::new());
    for (number, (variables, tpm)) in [
        (None, false),
        (None, true),
        (Some("raw"), false),
        (Some("raw"), true),
        (Some("qcow2"), false),
        (Some("qcow2"), true),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("parts{number}");
        let Some(xml) = machine(&daemon, &name, variables, tpm) else { return };
        let player = Player { domain: client.define(&xml).await.expect("defined") };
        // Every second stands: nothing of this needs a guest that has got anywhere.
        player.domain.call("Start", &(with([("paused", number % 2 == 0)]),)).await.expect("started");
        for (way, asked) in ways().iter().enumerate() {
            let file = daemon.folder().join(format!("{name}.{way}.memory"));
            let file = if asked.memory == "external" { format!(" file='{}'", file.display()) } else { String::new() };
            let doc = format!(
                "<domainsnapshot><name>way{way}</name><memory snapshot='{}'{file}/>\
                 <disks><disk name='vda' snapshot='{}'/></disks></domainsnapshot>",
                asked.memory, asked.disk
            );
            let options = || with(asked.options.iter().copied());
            let told = player.domain.call("CheckCreateSnapshot", &(&doc, options())).await.expect("told");
            let told: HashMap<String, zbus::OwnedVariant> = told.body().deserialize().expect("a{sv}");
            let possible = bool::try_from(told["possible"].clone()).expect("b");
            let before = player.domain.state().await.0;
            let deed = player.create(&doc, options()).await;
            let what =
                format!("{variables:?}, tpm {tpm}, memory {} {:?}, disk {}", asked.memory, asked.options, asked.disk);
            if possible != deed.is_ok() {
                differ.push(format!("{what}: possible is {possible}, and then: {deed:?}"));
            }
            assert_eq!(player.domain.state().await.0, before, "{what}");
            done += usize::from(deed.is_ok());
        }
        player.domain.run("Destroy").await.expect("destroyed");
    }
    assert!(differ.is_empty(), "{differ:#?}");
    assert!(done >= 18, "only {done} were taken");
}
