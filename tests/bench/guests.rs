//! Starting and ending guests; answers beside guests that hang.

use crate::bus::{Bench, Result, undefine};
use crate::common::client::Domain;
use crate::raw::Raw;
use crate::{line, percentile, row, text};
use std::time::{Duration, Instant};

const ROUNDS: usize = 30;

/// A small guest without a disk: what is measured is virtd and QEMU, not storage.
pub fn xml(name: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory><vcpu>1</vcpu>\
         <os><type machine='q35'>hvm</type></os><devices><serial type='null'/></devices></domain>"
    )
}

/// `Start` from call to return against QEMU from exec to QMP ready; `Destroy` against SIGTERM to exit. `place` is said of each.
pub async fn start_and_destroy(bench: &Bench, place: &str) -> Result<()> {
    let domain = bench.define(&xml("bench")).await;
    let argv = native(bench, &domain).await?;
    let (mut start, mut ready, mut destroy, mut end) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        start.push(timed(&domain, "Start").await);
        destroy.push(timed(&domain, "Destroy").await);
        let mut raw = Raw::start(&argv, bench.daemon.folder())?;
        ready.push(raw.ready);
        raw.cont()?;
        end.push(raw.end()?);
    }
    let median = |times: &mut Vec<Duration>| percentile(times, 50);
    let what = |what: &str| format!("{what}{place}");
    row(&what("Start, against QEMU from exec to QMP ready"), median(&mut start), median(&mut ready), 1.2);
    row(&what("Destroy, against SIGTERM to exit"), median(&mut destroy), median(&mut end), 3.0);
    undefine(&domain).await;
    Ok(())
}

async fn timed(domain: &Domain, method: &str) -> Duration {
    let begun = Instant::now();
    domain.run(method).await.expect(method);
    begun.elapsed()
}

/// The command line virtd runs, with its private files in a folder of ours.
async fn native(bench: &Bench, domain: &Domain) -> Result<Vec<String>> {
    let translated = (domain.xml().await, "qemu-argv");
    let reply =
        bench.client.call("/org/virt", "org.virt.Manager.DomainToNative", &translated).await.expect("translated");
    let argv: Vec<String> = reply.body().deserialize()?;
    let ours = bench.daemon.folder().to_string_lossy().into_owned();
    Ok(argv.into_iter().map(|word| redirect(&word, &ours)).collect())
}

/// Puts pid file and spare monitor into `folder`.
fn redirect(word: &str, folder: &str) -> String {
    for file in ["qemu.pid", "monitor2.sock"] {
        if let Some(end) = word.find(file) {
            let begin = word[..end].find('/').unwrap_or(end);
            return format!("{}{folder}/{}", &word[..begin], &word[end..]);
        }
    }
    word.to_owned()
}

/// How quickly others are answered while one guest hangs with a call waiting on it, and then ten.
pub async fn beside_hung_ones(bench: &Bench) -> Result<()> {
    let well = bench.define(&xml("well")).await;
    well.run("Start").await.expect("started");
    let mut hung = Vec::new();
    beside(&well, "no guest hung").await;
    for (wanted, what) in [(1, "1 guest hung, a call waiting on it"), (10, "10 guests hung, a call waiting on each")] {
        while hung.len() < wanted {
            hung.push(Hung::make(bench, hung.len()).await?);
        }
        beside(&well, what).await;
    }
    for guest in hung {
        guest.end().await?;
    }
    well.run("Destroy").await.expect("destroyed");
    Ok(())
}

async fn beside(well: &Domain, what: &str) {
    let (mut reads, mut changes) = (Vec::new(), Vec::new());
    for _ in 0..200 {
        reads.push(timed(well, "GetXML").await);
        let begun = Instant::now();
        for method in ["Suspend", "Resume"] {
            well.bare(method).await.expect(method);
        }
        changes.push(begun.elapsed());
    }
    let figures =
        |times: &mut Vec<Duration>| format!("{} / {}", text(percentile(times, 50)), text(percentile(times, 99)));
    line(&format!("GetXML of another domain, {what} (p50 / p99)"), figures(&mut reads));
    line(&format!("Suspend + Resume of it, {what} (p50 / p99)"), figures(&mut changes));
}

/// A guest whose QEMU is stopped, and a call that waits for it.
struct Hung {
    domain: Domain,
    waiting: tokio::task::JoinHandle<()>,
}

impl Hung {
    async fn make(bench: &Bench, number: usize) -> Result<Hung> {
        let name = format!("hung-{number}");
        let domain = bench.define(&xml(&name)).await;
        domain.run("Start").await.expect("started");
        let qemu = bench.daemon.qemu_of(&name).ok_or("QEMU not found")?;
        nix::sys::signal::kill(qemu, nix::sys::signal::Signal::SIGSTOP)?;
        let asked = domain.clone();
        let waiting = tokio::spawn(async move {
            // Fails when the guest is ended, as it should.
            let _ = asked.bare("Suspend").await;
        });
        Ok(Hung { domain, waiting })
    }

    async fn end(self) -> Result<()> {
        self.domain.run("Destroy").await.expect("a hung guest can be ended");
        self.waiting.await?;
        Ok(())
    }
}
