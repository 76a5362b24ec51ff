//! Numbers of machines: who shares them, and who waits for them.

use crate::world::{World, xml};
use std::sync::Arc;
use std::time::Duration;
use virt_model::driver::stats::GroupStats;
use virt_service::{Domain, MachineStats, Stats, StatsOptions, SubscribeOptions};

async fn told(world: &World, domain: &Arc<Domain>, groups: &[&str]) -> Stats {
    let groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
    domain.stats(&world.alice(), &StatsOptions::named(&groups).unwrap()).await.expect("told")
}

/// What is told of the disks, if anything is.
fn disks(stats: &Stats) -> Option<&GroupStats> {
    stats.groups.iter().map(|group| &**group).find(|group| matches!(group, GroupStats::Disks(_)))
}

#[tokio::test]
async fn a_hung_hypervisor_is_asked_once_and_what_was_known_is_told_with_its_time() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let disk = "<devices><disk type='file'><source file='/a'/><target dev='vda'/></disk></devices>";
    let domain = world.service.define(&world.alice(), &xml("web", disk), false).await.expect("defined");
    world.start(&domain).await.expect("started");
    let guest = world.driver.guest(domain.uuid()).expect("it runs");
    assert_eq!(guest.samples(), 0, "nobody has asked");
    guest.hang(true);
    let unknown = told(&world, &domain, &["disks"]).await;
    assert!(disks(&unknown).is_none(), "nothing is known yet: {unknown:?}");
    guest.hang(false);

    let known = async {
        loop {
            let known = told(&world, &domain, &["disks"]).await;
            if disks(&known).is_some() {
                return known;
            }
        }
    };
    let known = tokio::time::timeout(Duration::from_secs(60), known).await.expect("it answers again");
    guest.hang(true);
    let asked = guest.samples();
    for _ in 0..3 {
        let hung = told(&world, &domain, &["disks"]).await;
        assert_eq!((hung.sampled_at_usec, disks(&hung)), (known.sampled_at_usec, disks(&known)));
    }
    assert_eq!(guest.samples(), asked + 1, "one attempt stands for all");
    let host = async {
        loop {
            let host = told(&world, &domain, &["cpu"]).await;
            if host.groups.len() == 1 {
                return host;
            }
        }
    };
    let host = tokio::time::timeout(Duration::from_secs(60), host).await.expect("it is told");
    assert!(host.sampled_at_usec > known.sampled_at_usec, "{host:?}");
    guest.hang(false);
}

#[tokio::test]
async fn who_listens_at_one_interval_shares_what_is_sampled() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.service.define(&world.alice(), &xml("web", ""), false).await.expect("defined");
    world.start(&domain).await.expect("started");
    let guest = world.driver.guest(domain.uuid()).expect("it runs");
    let groups = StatsOptions::named(&["cpu".to_owned()]).unwrap();
    let wanted = SubscribeOptions { interval: Duration::from_secs(2), groups, ..SubscribeOptions::default() };
    let mut one = world.service.subscribe(&world.alice(), wanted.clone()).await.expect("begun");
    let mut two = world.service.subscribe(&world.alice(), wanted).await.expect("begun");
    assert_eq!(guest.samples(), 0, "no moment has come");
    let (first, second) = tokio::join!(one.next(), two.next());
    let told = |moment: Option<(u64, Vec<MachineStats>)>| {
        let (_, machines) = moment.expect("it is open");
        assert_eq!(machines.len(), 1);
        (machines[0].stats.sampled_at_usec, machines[0].stats.groups.clone())
    };
    assert_eq!(told(first).1, told(second).1);
    assert_eq!(guest.samples(), 1, "one for both");
    world.service.unsubscribe(&world.alice(), one.number()).expect("closed");
    assert!(one.next().await.is_none());
    drop(one);
    assert!(world.service.unsubscribe(&world.alice(), two.number() + 1).is_err());
}
