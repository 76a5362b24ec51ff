//! virtd is killed; guests are not. After each restart the tree tells the truth.

use crate::common::Daemon;
use crate::common::client::{Client, Domain};
use crate::common::guest::Tick;
use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

#[tokio::test]
async fn a_running_guest_is_found_again_and_a_dead_one_is_told() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let (Some(lives), Some(dies)) = (Tick::new(&daemon, "lives", ""), Tick::new(&daemon, "dies", "")) else { return };
    let client = Client { connection: daemon.connect().await };
    let (living, dying) =
        (client.define(&lives.xml).await.expect("defined"), client.define(&dies.xml).await.expect("defined"));
    for domain in [&living, &dying] {
        domain.run("Start").await.expect("started");
    }
    living.bare("Suspend").await.expect("suspended");
    let (id, since): (u32, u64) = (living.property("Id").await, living.property("StateSince").await);
    let counted = lives.counted();

    daemon.kill_virtd().await;
    let dead = daemon.qemu_of("dies").expect("guests outlive virtd");
    nix::sys::signal::kill(dead, nix::sys::signal::Signal::SIGKILL).expect("killed");
    daemon.qemu_gone("dies").await;
    daemon.start_virtd().await;

    assert_eq!(living.state().await, ("paused".into(), "user".into()));
    assert_eq!((living.property::<u32>("Id").await, living.property::<u64>("StateSince").await), (id, since));
    assert_eq!(lives.counted(), counted, "it stood still all the while");
    assert_eq!(dying.state().await, ("shutoff".into(), "daemon".into()));
    living.bare("Resume").await.expect("it listens to the new virtd");
    lives.counts_to(counted.map_or(0, |(count, _)| count) + 2).await;
    dying.run("Start").await.expect("the dead one starts again");
    let mut watch = client.watch().await;
    living.run("Shutdown").await.expect("asked");
    assert_eq!(watch.until(&living.path, "stopped shutdown").await, ["shutdown guest", "stopped shutdown"]);
}

/// How often virtd is killed; `VIRT_KILLS=200` for the long run.
fn rounds() -> u32 {
    std::env::var("VIRT_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(12)
}

#[tokio::test]
async fn killed_at_any_moment_virtd_loses_no_guest_and_leaves_none_behind() {
    let Some(mut daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let mut domains = HashMap::new();
    for name in ["one", "two", "three"] {
        let Some(tick) = Tick::new(&daemon, name, "") else { return };
        domains.insert(name, client.define(&tick.xml).await.expect("defined"));
    }
    let mut dice = Dice::new();
    for round in 0..rounds() {
        let name = ["one", "two", "three"][dice.below(3)];
        let before: HashMap<&str, _> = domains.keys().map(|name| (*name, daemon.qemu_of(name))).collect();
        toggle_and_kill(&mut daemon, &domains[name], Duration::from_millis(dice.below(160) as u64)).await;
        daemon.start_virtd().await;
        for (other, domain) in &domains {
            let guest = daemon.qemu_of(other);
            let active: bool = domain.property("Active").await;
            assert_eq!(active, guest.is_some(), "round {round}, seed {}: {other}\n{}", dice.seed, daemon.log());
            if *other != name {
                assert_eq!(guest, before[other], "round {round}, seed {}: {other} was not touched", dice.seed);
            }
        }
    }
    for domain in domains.values() {
        if domain.property("Active").await {
            domain.run("Destroy").await.expect("destroyed");
        }
    }
    assert!(domains.keys().all(|name| daemon.qemu_of(name).is_none()), "no QEMU is left behind");
}

/// Starts or destroys the domain, and kills virtd that long after the call was sent.
async fn toggle_and_kill(daemon: &mut Daemon, domain: &Domain, moment: Duration) {
    let verb = if domain.property("Active").await { "Destroy" } else { "Start" };
    let asked = domain.clone();
    // The call may be answered before the moment, or fail with the connection: either is fine.
    let call = tokio::spawn(async move { asked.run(verb).await.is_ok() });
    // The moment is the point of this test: it waits for nothing.
    tokio::time::sleep(moment).await;
    daemon.kill_virtd().await;
    call.await.expect("no panic");
}

/// Random enough, and repeatable from its seed.
struct Dice {
    seed: u64,
    state: u64,
}

impl Dice {
    fn new() -> Dice {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| u64::from(time.subsec_nanos()) | 1);
        let seed = std::env::var("VIRT_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(now);
        Dice { seed, state: seed }
    }

    fn below(&mut self, limit: u64) -> usize {
        for shift in [13, -7, 17] {
            self.state ^= if shift > 0 { self.state << shift } else { self.state >> -shift };
        }
        (self.state % limit) as usize
    }
}
