//! What is plugged in beside the board: vCPUs one by one, and a card into a switch in a process of its own.

use crate::common::Daemon;
use crate::common::client::{Client, options};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use std::collections::{BTreeSet, HashMap};
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;
use zbus::OwnedVariant;

/// The vCPUs that a guest's QEMU has, by the names of its threads.
fn vcpus(process: nix::unistd::Pid) -> BTreeSet<String> {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).expect("its threads");
    let name = |path: &Path| std::fs::read_to_string(path.join("comm")).unwrap_or_default();
    let names = threads.map(|thread| name(&thread.expect("a thread").path()));
    names.filter_map(|name| Some(name.trim().strip_prefix("CPU ")?.split('/').next()?.to_owned())).collect()
}

#[tokio::test]
async fn x5_vcpus_that_are_plugged_in_at_boot_have_the_numbers_that_they_are_given() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let each = "<vcpu current='2'>4</vcpu><vcpus><vcpu id='0' enabled='yes' hotpluggable='no'/>\
                <vcpu id='1' enabled='no' hotpluggable='yes'/><vcpu id='2' enabled='no' hotpluggable='yes'/>\
                <vcpu id='3' enabled='yes' hotpluggable='yes' order='2'/></vcpus>";
    let Some(tick) = Tick::new(&daemon, "vcpus", each) else { return };
    let client = Client { connection: daemon.connect().await };
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    player.domain.run("Start").await.expect("started");
    let numbers = || vcpus(daemon.qemu_of("vcpus").expect("it runs"));
    assert_eq!(numbers(), ["0", "3"].map(str::to_owned).into());
    assert_eq!(player.domain.property::<u32>("VCPUs").await, 2);
    // Its memory goes back into a machine that has the same.
    tick.counts_to(2).await;
    player.take("one").await;
    player.call("one", "Revert", with([("respawn", true)])).await.expect("reverted");
    tick.goes_on().await;
    assert_eq!(numbers(), ["0", "3"].map(str::to_owned).into());
    player.domain.run("Destroy").await.expect("destroyed");
}

/// The requests that need an answer, with what is answered: features (of virtio 1, and that there are features of the
/// protocol), features of the protocol (none), where a queue stands.
const ANSWERS: [(u32, u64); 3] = [(1, 1 << 32 | 1 << 30), (15, 0), (11, 0)];
/// "You belong to me."
const SET_OWNER: u32 = 3;

/// A switch that lets itself be set up, and moves no packets; tells each request.
fn switch(mut card: UnixStream, told: &mpsc::Sender<u32>) {
    let mut head = [0; 12];
    while card.read_exact(&mut head).is_ok() {
        let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let (request, length) = (word(0), word(8));
        let mut body = vec![0; length as usize];
        card.read_exact(&mut body).expect("a whole request");
        if told.send(request).is_err() {
            return;
        }
        let Some((_, answer)) = ANSWERS.iter().find(|(asked, _)| *asked == request) else { continue };
        // Version 1, and that it is an answer.
        let head = [request, 1 | 1 << 2, 8].map(u32::to_ne_bytes).concat();
        card.write_all(&[head, answer.to_ne_bytes().to_vec()].concat()).expect("answered");
    }
}

#[tokio::test]
async fn x5_a_card_is_plugged_into_a_switch_in_a_process_of_its_own() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(mut tick) = Tick::new(&daemon, "switched", "<memoryBacking><access mode='shared'/></memoryBacking>")
    else {
        return;
    };
    let socket = daemon.folder().join("switch.sock");
    let card = format!(
        "<interface type='vhostuser'><source type='unix' path='{}' mode='client'/><model type='virtio'/></interface>",
        socket.display()
    );
    tick.xml = tick.xml.replacen("<serial", &format!("{card}<serial"), 1);
    let client = Client { connection: daemon.connect().await };
    let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
    let (_, why) = player.domain.run("Start").await.expect_err("nobody listens there");
    assert!(why.contains("switch.sock"), "{why}");

    let listener = UnixListener::bind(&socket).expect("a socket");
    let (tell, told) = mpsc::channel();
    let plays = std::thread::spawn(move || switch(listener.accept().expect("a card").0, &tell));
    player.domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    let asked: Vec<u32> = told.try_iter().collect();
    assert!(asked.contains(&SET_OWNER), "{asked:?}");
    // Such a switch does not say which memory it writes.
    let reply = player.domain.call("CheckCreateSnapshot", &("", options([]))).await.expect("told");
    let plan: HashMap<String, OwnedVariant> = reply.body().deserialize().expect("a{sv}");
    assert_eq!(plan["possible"], OwnedVariant::from(false), "{plan:?}");
    player.domain.run("Destroy").await.expect("destroyed");
    let gone = tokio::task::spawn_blocking(move || {
        loop {
            match told.recv_timeout(Duration::from_secs(60)) {
                Err(mpsc::RecvTimeoutError::Disconnected) => return true,
                Err(mpsc::RecvTimeoutError::Timeout) => return false,
                Ok(_) => {}
            }
        }
    });
    assert!(gone.await.expect("told"), "the cable is pulled out at the end");
    plays.join().expect("it played");
    std::fs::remove_file(&socket).expect("removed");
    comes_while_a_guest_runs(&daemon, &client, &card, &socket).await;
}

/// The same card, plugged into a guest that runs.
async fn comes_while_a_guest_runs(daemon: &Daemon, client: &Client, card: &str, socket: &Path) {
    let shared = "<memoryBacking><access mode='shared'/></memoryBacking>";
    let Some(tick) = Tick::new(daemon, "switched-later", shared) else { return };
    let domain = client.define(&tick.xml).await.expect("defined");
    domain.run("Start").await.expect("started");
    let attach = async |xml: &str| domain.call("AttachDevice", &(xml, with([("live", true)]))).await;
    let (_, why) = attach(card).await.expect_err("nobody listens there");
    assert!(why.contains("switch.sock"), "{why}");
    let (error, why) = attach(&card.replace("client", "server")).await.expect_err("it would be waited for");
    assert!(error.ends_with("OperationUnsupported") && why.contains("mode='client'"), "{error}: {why}");
    let listener = UnixListener::bind(socket).expect("a socket");
    let (tell, told) = mpsc::channel();
    let plays = std::thread::spawn(move || switch(listener.accept().expect("a card").0, &tell));
    attach(card).await.expect("plugged in");
    assert!(told.try_iter().any(|asked| asked == SET_OWNER));
    tick.goes_on().await;
    domain.run("Destroy").await.expect("destroyed");
    tokio::task::spawn_blocking(|| plays.join().expect("it played")).await.expect("joined");
}
