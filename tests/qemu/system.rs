//! Guests on the system bus: whom QEMU runs as, and what that user can reach.

use crate::common::client::Client;
use crate::common::guest::Tick;
use crate::common::users::ADMIN;
use crate::common::{Daemon, Setup, have};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

/// Whether anybody has an entry in its access control list.
pub fn lent(file: &Path) -> bool {
    rustix::fs::getxattr(file, "system.posix_acl_access", &mut [0u8; 0][..]).is_ok()
}

/// The value of a line of `/proc/PID/status`.
fn status(pid: nix::unistd::Pid, key: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key}:")));
    line.expect(key).trim().to_owned()
}

#[tokio::test]
async fn qemu_runs_as_a_user_of_its_own_and_has_the_files_while_it_runs() {
    let Some(daemon) = Daemon::on_system_bus(Setup::with_example_rules()).await else { return };
    let Some(tick) = Tick::new(&daemon, "own", "") else { return };
    for file in [&tick.disk, &tick.serial] {
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600)).expect("set");
    }
    let client = Client { connection: daemon.connect_as(&ADMIN).await };
    let domain = client.define(&tick.xml).await.expect("defined");
    assert!(!lent(&tick.disk));
    domain.run("Start").await.expect("started");
    tick.counts_to(2).await;

    let qemu = daemon.qemu_of("own").expect("a process");
    let books = std::fs::read_to_string(daemon.root().join("var/lib/virt/uids.json")).expect("there");
    let ids: Vec<String> = ["Uid", "Gid"].iter().map(|key| status(qemu, key)).collect();
    let uid = ids[0].split_whitespace().next().expect("an id");
    assert!(books.contains(&format!(":{uid}}}")) && uid.parse::<u32>().expect("a number") > 1 << 30, "{books} {ids:?}");
    assert!(ids.iter().all(|ids| ids.split_whitespace().all(|id| id == uid)), "{ids:?}");
    assert_eq!(status(qemu, "CapEff"), "0000000000000000");
    assert_eq!(status(qemu, "Seccomp"), "2", "QEMU's sandbox is on");
    assert!(lent(&tick.disk));

    let mut watch = client.watch().await;
    domain.run("Shutdown").await.expect("asked");
    watch.until(&domain.path, "stopped shutdown").await;
    daemon.qemu_gone("own").await;
    for file in [&tick.disk, &tick.serial] {
        assert!(!lent(file), "{}", file.display());
        let after = std::fs::metadata(file).expect("there");
        assert_eq!((after.uid(), after.mode() & 0o777), (0, 0o600), "{}", file.display());
    }
}

/// A companion of the guest works behind a wall of its own, and has what it keeps, wherever that is: here it is below /tmp.
#[tokio::test]
async fn a_machine_with_a_tpm_starts_and_starts_again() {
    if !have(&["swtpm", "swtpm_setup"]) {
        return;
    }
    let Some(daemon) = Daemon::on_system_bus(Setup::with_example_rules()).await else { return };
    let Some(tick) = Tick::new(&daemon, "tpm", "") else { return };
    let tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices>";
    let client = Client { connection: daemon.connect_as(&ADMIN).await };
    let domain = client.define(&tick.xml.replace("</devices>", tpm)).await.expect("defined");
    for boots in [1, 2] {
        domain.run("Start").await.expect("started");
        tick.boots_to(boots).await;
        domain.run("Destroy").await.expect("destroyed");
    }
    let uuid: String = domain.property("UUID").await;
    let state = daemon.root().join("var/lib/virt/tpm").join(uuid);
    assert!(std::fs::read_dir(&state).expect("its state").count() > 0, "{}", state.display());
}

#[tokio::test]
async fn where_that_user_is_missing_start_says_what_to_do() {
    let Some(mut daemon) = Daemon::system_bus(Setup::with_example_rules()) else { return };
    let folder = daemon.root().join("etc/virt");
    std::fs::create_dir_all(&folder).expect("made");
    std::fs::write(folder.join("virtd.toml"), "[qemu]\nuser = \"virt-nobody\"\n").expect("written");
    daemon.start_virtd().await;
    let Some(tick) = Tick::new(&daemon, "nobody", "") else { return };
    let client = Client { connection: daemon.connect_as(&ADMIN).await };
    let domain = client.define(&tick.xml).await.expect("what cannot run is stored all the same");
    let (name, text) = domain.run("Start").await.expect_err("there is nobody to run it");
    assert!(text.contains("virt-nobody") && text.contains("virtd.toml"), "{name}: {text}");
    assert_eq!(domain.state().await.0, "shutoff");
}
