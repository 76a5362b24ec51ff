//! Reading: one property, and an inventory of ten thousand.

use crate::bus::{Daemon, Result, no_options};
use crate::{line, percentile, row, text};
use std::time::{Duration, Instant};

/// A property read against `Peer.Ping` at the service.
pub async fn read_against_ping(daemon: &Daemon) -> Result<()> {
    let path = daemon.define(&test_xml("read", 0)).await?;
    let (mut reads, mut pings) = (Vec::new(), Vec::new());
    for _ in 0..3000 {
        let begun = Instant::now();
        daemon.call(&path, "org.freedesktop.DBus.Properties", "Get", &("org.virt.Domain", "State")).await?;
        reads.push(begun.elapsed());
        let begun = Instant::now();
        daemon.call(&path, "org.freedesktop.DBus.Peer", "Ping", &()).await?;
        pings.push(begun.elapsed());
    }
    row("Get of a property, against Peer.Ping", percentile(&mut reads, 50), percentile(&mut pings, 50), 1.5);
    daemon.domain(&path, "Undefine").await?;
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
    let daemon = Daemon::start(&folder.keep().to_string_lossy()).await?;
    line("10,000 domains: from exec to the name on the bus", text(begun.elapsed()));
    line("10,000 domains: resident memory of virtd", format!("{} MiB", daemon.resident_kib()? / 1024));
    let manager = "org.freedesktop.DBus.ObjectManager";
    measure(&daemon, "GetManagedObjects", || daemon.call("/org/virt", manager, "GetManagedObjects", &())).await?;
    let options = (no_options(),);
    measure(&daemon, "ListDomains", || daemon.call("/org/virt", "org.virt.Manager", "ListDomains", &options)).await?;
    let introspectable = "org.freedesktop.DBus.Introspectable";
    measure(&daemon, "Introspect /", || daemon.call("/", introspectable, "Introspect", &())).await?;
    let parent = "/org/virt/domain";
    measure(&daemon, "Introspect /org/virt/domain", || daemon.call(parent, introspectable, "Introspect", &())).await?;
    line("10,000 domains: resident memory afterwards", format!("{} MiB", daemon.resident_kib()? / 1024));
    Ok(())
}

async fn measure<F: Future<Output = Result<zbus::Message>>>(
    _: &Daemon,
    what: &str,
    call: impl Fn() -> F,
) -> Result<()> {
    let (mut times, mut size) = (Vec::new(), 0);
    for _ in 0..20 {
        let begun = Instant::now();
        let reply = call().await?;
        times.push(begun.elapsed());
        size = reply.body().len();
    }
    let median: Duration = percentile(&mut times, 50);
    line(&format!("10,000 domains: {what} ({size} bytes)"), text(median));
    Ok(())
}

fn test_xml(name: &str, number: u32) -> String {
    let uuid = if number == 0 { uuid::Uuid::new_v4() } else { uuid::Uuid::from_u128(u128::from(number)) };
    format!(
        "<domain type='test'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type>hvm</type></os></domain>"
    )
}
