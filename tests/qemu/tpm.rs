//! A TPM whose state is encrypted with a secret, by a swtpm that is real.

use crate::common::client::{Client, options};
use crate::common::guest::Tick;
use crate::common::{Daemon, Setup, have};
use std::path::Path;
use zbus::OwnedObjectPath;

const VTPM: &str = "0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f";
const VOLUME: &str = "0a81f5b2-8403-7b23-c8d6-21ccc2f80d70";
const VALUE: &[u8] = b"open sesame, chip";

async fn secret(client: &Client, uuid: &str, usage: &str) -> String {
    let xml = format!("<secret><uuid>{uuid}</uuid>{usage}</secret>");
    let reply = client.call("/org/virt", "org.virt.Manager.Secret.DefineSecret", &(xml, options([]))).await;
    reply.expect("defined").body().deserialize::<OwnedObjectPath>().expect("o").to_string()
}

async fn set(client: &Client, secret: &str, value: &[u8]) {
    client.call(secret, "org.virt.Secret.SetValue", &(value, options([]))).await.expect("set");
}

fn has(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|one| one == part)
}

/// What everybody sees of the processes of that guest beside QEMU, and how many there are.
fn seen_of_swtpm(guest: &str) -> (Vec<u8>, usize) {
    let processes = std::fs::read_dir("/proc").expect("proc").flatten().map(|entry| entry.path());
    let read = |process: &Path, name: &str| std::fs::read(process.join(name)).unwrap_or_default();
    let (mut seen, mut count) = (Vec::new(), 0);
    for process in processes {
        let line = read(&process, "cmdline");
        if read(&process, "comm") == b"swtpm\n" && has(&line, guest.as_bytes()) {
            count += 1;
            seen.extend(line);
            seen.extend(read(&process, "environ"));
        }
    }
    (seen, count)
}

/// The mark in the head of its file by which swtpm knows that the state in it is encrypted.
fn is_encrypted(state: &Path) -> bool {
    std::fs::read(state).expect("a state")[5] & 1 != 0
}

#[tokio::test]
async fn the_state_of_a_tpm_is_encrypted_with_the_value_of_a_secret_that_nobody_sees() {
    if !have(&["swtpm", "swtpm_setup"]) {
        return;
    }
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let Some(tick) = Tick::new(&daemon, "sealed", "") else { return };
    let client = Client { connection: daemon.connect().await };
    let tpm = format!(
        "<tpm model='tpm-crb'><backend type='emulator' version='2.0'><encryption secret='{VTPM}'/>\
         <active_pcr_banks><sha256/></active_pcr_banks></backend></tpm></devices>"
    );
    let xml = tick.xml.replace("</devices>", &tpm);
    let domain = client.define(&xml).await.expect("what cannot run is stored all the same");
    let refused = async |name: &str, words: &str| {
        let (error, why) = domain.run("Start").await.expect_err(name);
        assert!(error.ends_with(name) && why.contains(words), "{error}: {why}");
        let asked = (domain.xml().await, options([]));
        let reply = client.call("/org/virt", "org.virt.Manager.ValidateDomain", &asked).await;
        let found: Vec<(String, u32, u32, String)> = reply.expect("looked at").body().deserialize().expect("all");
        assert!(found.iter().any(|one| one.3.contains("the TPM: ") && one.3.contains(words)), "{found:?}");
    };
    refused("NoSuchSecret", VTPM).await;
    secret(&client, VOLUME, "<usage type='volume'><volume>/a.img</volume></usage>").await;
    let document = domain.xml().await;
    client.define(&document.replace(VTPM, VOLUME)).await.expect("another");
    refused("ConfigUnsupported", "is of type 'volume', and one of type 'vtpm'").await;
    client.define(&document).await.expect("and back");
    let vtpm = secret(&client, VTPM, "<usage type='vtpm'><name>sealed</name></usage>").await;
    refused("SecretMissing", "has no value").await;

    set(&client, &vtpm, VALUE).await;
    domain.run("Start").await.expect("started");
    tick.boots_to(1).await;
    let uuid: String = domain.property("UUID").await;
    let state = daemon.root().join("var/lib/virt/tpm").join(&uuid).join("tpm2-00.permall");
    assert!(is_encrypted(&state));
    let (seen, count) = seen_of_swtpm(&uuid);
    assert_eq!(count, 1);
    let log = std::fs::read(daemon.root().join("var/log/virt").join(format!("{uuid}.log"))).expect("its log");
    assert!(has(&log, b"pwdfd=") && !has(&log, VALUE) && !has(&seen, VALUE), "{}", String::from_utf8_lossy(&log));
    let users: Vec<(OwnedObjectPath, String, String)> = client.property(&vtpm, "org.virt.Secret", "Users").await;
    let own = |how: &str| {
        users.iter().any(|(user, place, as_)| (user.as_str(), &**place, &**as_) == (&*domain.path, "tpm", how))
    };
    assert!(own("live") && own("config"), "{users:?}");
    let undefined = client.call(&vtpm, "org.virt.Secret.Undefine", &(options([]),)).await;
    assert!(undefined.expect_err("it is used").0.ends_with("InUse"));

    // Its state goes with the machine's memory, which is kept, and comes back with it.
    domain.run("ManagedSave").await.expect("saved");
    domain.run("Start").await.expect("it goes on");
    tick.goes_on().await;
    domain.run("Destroy").await.expect("destroyed");
    domain.run("Start").await.expect("started anew");
    tick.boots_to(2).await;
    assert!(is_encrypted(&state));
    domain.run("Destroy").await.expect("destroyed");
}
