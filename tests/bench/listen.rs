//! What listening to statistics costs virtd: processor time while nobody listens, and while somebody does.

use crate::bus::{Bench, Result, undefine};
use crate::common::client::{Domain, options};
use crate::line;
use std::time::Duration;

const GUESTS: usize = 20;
const MACHINES: usize = 200;
/// How long each is measured: what takes some milliseconds a second is told in ticks of ten.
const WATCHED: Duration = Duration::from_secs(30);

/// Twenty guests, and then two hundred machines of the test driver beside them, under one and two subscriptions at a second each.
pub async fn to_statistics(bench: &Bench) -> Result<()> {
    let mut all = Vec::new();
    for number in 0..GUESTS {
        all.push(started(bench, &crate::guests::xml(&format!("listened-{number}"))).await);
    }
    share(bench, "Processor of virtd, 20 guests, nobody listens").await;
    let one = subscribed(bench).await;
    share(bench, "the same under SubscribeStats at 1 s (wanted: at most 2 %)").await;
    for number in 0..MACHINES {
        let xml = format!(
            "<domain type='test'><name>played-{number}</name><memory>65536</memory><os><type>hvm</type></os></domain>"
        );
        all.push(started(bench, &xml).await);
    }
    share(bench, "with 200 machines of the test driver beside them").await;
    let two = subscribed(bench).await;
    share(bench, "with a second listener").await;
    for path in [one, two] {
        bench.client.call(&path, "org.virt.StatsSubscription.Close", &()).await.expect("closed");
    }
    for domain in all {
        domain.run("Destroy").await.expect("destroyed");
        undefine(&domain).await;
    }
    Ok(())
}

async fn started(bench: &Bench, xml: &str) -> Domain {
    let domain = bench.define(xml).await;
    domain.run("Start").await.expect("started");
    domain
}

async fn subscribed(bench: &Bench) -> String {
    let reply =
        bench.client.call("/org/virt", "org.virt.Manager.SubscribeStats", &(options([]),)).await.expect("begun");
    reply.body().deserialize::<zbus::ObjectPath<'_>>().expect("o").to_string()
}

/// Which part of one processor virtd takes.
async fn share(bench: &Bench, what: &str) {
    let before = bench.daemon.processor_time();
    tokio::time::sleep(WATCHED).await;
    let spent = bench.daemon.processor_time() - before;
    line(what, format!("{:.2} %", 100.0 * spent.as_secs_f64() / WATCHED.as_secs_f64()));
}
