//! Statistics of real guests, of those, too, whose QEMU does nothing any more.

use crate::common::client::{Client, Domain};
use crate::common::guest::Tick;
use crate::common::stats::{SIZES, TRAFFIC, Told, VCPU, shaped, stats_of, stats_with};
use crate::common::{Daemon, PATIENCE};
use nix::sys::signal::{Signal, kill};
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

/// How long an answer may take where QEMU gives none: less than a command of its monitor is waited for.
const SOON: Duration = Duration::from_secs(10);

/// Capacity, allocation and length of the first disk.
async fn block_info(domain: &Domain) -> (u64, u64, u64) {
    let told = domain.call("BlockInfo", &"vda").await.expect("told");
    told.body().deserialize::<((u64, u64, u64),)>().expect("(ttt)").0
}

async fn told(domain: &Domain) -> Told {
    let told = tokio::time::timeout(SOON, stats_of(domain, &[])).await;
    told.expect("an answer that waits for nobody").expect("told")
}

/// Waits until the numbers are as wanted: a busy host may give those of before.
async fn until(domain: &Domain, what: &str, wanted: impl Fn(&Told) -> bool) -> Told {
    let begun = Instant::now();
    loop {
        let now = told(domain).await;
        if wanted(&now) {
            return now;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: {now:?}");
        // The guest goes on by itself.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn numbers_of_a_guest_move_and_of_a_hung_one_the_last_are_told() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(mut tick) = Tick::new(&daemon, "counted", "<iothreads>1</iothreads>") else { return };
    tick.xml =
        tick.xml.replace("<devices>", "<devices><interface type='user'><mac address='52:54:00:00:00:01'/></interface>");
    // QEMU looks on at no less how memory is written.
    tick.xml = tick.xml.replace("<memory unit='MiB'>16<", "<memory unit='MiB'>192<");
    let domain = Client { connection: daemon.connect().await }.define(&tick.xml).await.expect("defined");

    let off = stats_with(&domain, &[], &["disks"]).await;
    assert_eq!(off.groups().into_iter().collect::<Vec<_>>(), ["disks", "state"]);
    assert_eq!(off.shape("disks", 0), shaped(SIZES));
    let image = std::fs::metadata(&tick.disk).expect("its image");
    let sizes = |told: &Told| ["capacity", "physical", "allocation"].map(|key| told.number("disks", 0, key));
    let [capacity, physical, allocation] = sizes(&off);
    assert_eq!((physical, allocation), (image.len(), image.blocks() * 512));
    assert_eq!(block_info(&domain).await, (capacity, allocation, physical));

    domain.run("Start").await.expect("started");
    tick.counts_to(2).await;
    let all = ["cpu", "disks", "interfaces", "memory", "state", "vcpus"];
    let first = until(&domain, "all groups", |now| now.groups().into_iter().eq(all)).await;
    assert_eq!(first.shape("disks", 0), shaped(&format!("{SIZES} {TRAFFIC}")));
    assert_eq!(first.shape("vcpus", 0), shaped(VCPU));
    assert_eq!(first.shape("interfaces", 0), shaped("mac s target s"), "nobody counts for type user");
    assert_eq!((sizes(&first)[0], first.number("memory", 0, "actual")), (capacity, 192 << 20));
    assert!(first.number("disks", 0, "read-bytes") >= 512, "it has booted from there: {first:?}");
    assert!(first.number("memory", 0, "rss") > 1 << 20, "{first:?}");
    let moving = [("cpu", "time-usec"), ("vcpus", "time-usec"), ("disks", "write-requests"), ("disks", "write-bytes")];
    let later = until(&domain, "what moves", |now| {
        moving.iter().all(|(group, key)| now.number(group, 0, key) > first.number(group, 0, key))
    });
    let later = later.await;
    assert!(later.sampled_at() > first.sampled_at());
    let io = stats_with(&domain, &["iothreads"], &["iothreads"]).await;
    assert_eq!(io.shape("iothreads", 0), shaped("number u time-usec t wait-usec t"));
    let rate = stats_with(&domain, &["dirty-rate"], &["dirty-rate"]).await;
    assert_eq!(rate.shape("dirty-rate", 0), shaped("bytes-per-second t period-usec t"));
    assert_eq!(rate.number("dirty-rate", 0, "period-usec"), 1_000_000);
    match stats_of(&domain, &["perf"]).await {
        Ok(_) => {
            let perf = stats_with(&domain, &["perf"], &["perf"]).await;
            assert!(perf.number("perf", 0, "period-usec") >= 1_000_000, "{perf:?}");
            assert!(perf.shape("perf", 0).contains_key("context-switches"), "{perf:?}");
        }
        Err((error, why)) => {
            let known = error.ends_with("OperationUnsupported") && why.contains("the host counts no events");
            assert!(known, "{error}: {why}");
        }
    }
    assert_eq!(block_info(&domain).await.0, capacity);
    let pending: Vec<(String, String, String)> = domain.property("PendingChanges").await;
    assert_eq!(pending, [], "what a start decides is no change");

    let qemu = daemon.qemu_of(&tick.name).expect("it runs");
    // All of it as it is now: an answer that came late would come between.
    let since = later.sampled_at();
    let last =
        until(&domain, "all groups anew", |now| now.groups().into_iter().eq(all) && now.sampled_at() > since).await;
    kill(qemu, Signal::SIGSTOP).expect("stopped");
    let many = futures_util::future::join_all((0..20).map(|_| told(&domain))).await;
    for hung in many {
        assert_eq!(hung.sampled_at(), last.sampled_at());
        assert!(hung.groups().into_iter().eq(all), "{hung:?}");
        assert_eq!(hung.number("disks", 0, "write-requests"), last.number("disks", 0, "write-requests"));
    }
    let host = stats_of(&domain, &["state", "cpu"]).await.expect("told");
    assert!(host.sampled_at() > last.sampled_at(), "what the kernel counts is told as it is now");
    kill(qemu, Signal::SIGCONT).expect("let go");
    until(&domain, "what QEMU tells again", |now| {
        now.number("disks", 0, "write-requests") > last.number("disks", 0, "write-requests")
    })
    .await;
    domain.run("Destroy").await.expect("destroyed");
    let off = stats_with(&domain, &[], &["disks"]).await;
    assert_eq!(off.groups().into_iter().collect::<Vec<_>>(), ["disks", "state"]);
}
