//! Reading: one property, and an inventory of ten thousand.

use crate::bus::{Bench, Result, undefine};
use crate::common::client::options;
use crate::{line, percentile, row, text};
use std::time::Instant;

/// A property read against `Peer.Ping` at the service.
pub async fn read_against_ping(bench: &Bench) -> Result<()> {
    let domain = bench.define(&test_xml("read", 0)).await;
    let (mut reads, mut pings) = (Vec::new(), Vec::new());
    for _ in 0..3000 {
        let begun = Instant::now();
        let property = ("org.virt.Domain", "State");
        bench.client.call(&domain.path, "org.freedesktop.DBus.Properties.Get", &property).await.expect("State");
        reads.push(begun.elapsed());
        let begun = Instant::now();
        bench.client.call(&domain.path, "org.freedesktop.DBus.Peer.Ping", &()).await.expect("an answer");
        pings.push(begun.elapsed());
    }
    row("Get of a property, against Peer.Ping", percentile(&mut reads, 50), percentile(&mut pings, 50), 1.5);
    undefine(&domain).await;
    Ok(())
}

/// Ten thousand stored domains of the test driver.
pub async fn ten_thousand() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for number in 0..10_000_u32 {
        let uuid = uuid::Uuid::from_u128(u128::from(number) + 1);
        let base = folder.path().join(uuid.to_string());
        std::fs::write(base.with_extension("xml"), test_xml(&format!("domain-{number}"), number + 1))?;
        let note = r#"{"owner":0,"autostart":false}"#;
        std::fs::write(base.with_extension("json"), note)?;
    }
    let begun = Instant::now();
    let bench = Bench::start(Some(&folder.keep())).await?;
    line("10,000 domains: from exec to the name on the bus", text(begun.elapsed()));
    line("10,000 domains: resident memory of virtd", format!("{} MiB", bench.daemon.memory_kib() / 1024));
    measure(&bench, "/org/virt", "org.freedesktop.DBus.ObjectManager.GetManagedObjects", &()).await;
    measure(&bench, "/org/virt", "org.virt.Manager.ListDomains", &(options([]),)).await;
    for parent in ["/", "/org/virt/domain"] {
        measure(&bench, parent, "org.freedesktop.DBus.Introspectable.Introspect", &()).await;
    }
    line("10,000 domains: resident memory afterwards", format!("{} MiB", bench.daemon.memory_kib() / 1024));
    Ok(())
}

async fn measure<B>(bench: &Bench, path: &str, member: &str, body: &B)
where
    B: serde::Serialize + zbus::wire::DynamicType,
{
    let (mut times, mut size) = (Vec::new(), 0);
    for _ in 0..20 {
        let begun = Instant::now();
        let reply = bench.client.call(path, member, body).await.expect(member);
        times.push(begun.elapsed());
        size = reply.body().len();
    }
    let (_, method) = member.rsplit_once('.').unwrap_or_default();
    line(&format!("10,000 domains: {method} of {path} ({size} bytes)"), text(percentile(&mut times, 50)));
}

fn test_xml(name: &str, number: u32) -> String {
    let uuid = if number == 0 { uuid::Uuid::new_v4() } else { uuid::Uuid::from_u128(u128::from(number)) };
    format!(
        "<domain type='test'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type>hvm</type></os></domain>"
    )
}
