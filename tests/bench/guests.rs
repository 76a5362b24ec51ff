//! Starting and ending guests; answers beside guests that hang.

use crate::bus::{Daemon, Result, no_options};
use crate::raw::Raw;
use crate::{line, percentile, row, text};
use std::time::{Duration, Instant};

const ROUNDS: usize = 30;

/// A small guest without a disk: what is measured is virtd and QEMU, not storage.
fn xml(name: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory><vcpu>1</vcpu>\
         <os><type machine='q35'>hvm</type></os><devices><serial type='null'/></devices></domain>"
    )
}

/// `Start` from call to return against QEMU from exec to QMP ready; `Destroy` against SIGTERM to exit.
pub async fn start_and_destroy(daemon: &Daemon) -> Result<()> {
    let path = daemon.define(&xml("bench")).await?;
    let argv = native(daemon, &path).await?;
    let (mut start, mut ready, mut destroy, mut end) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        start.push(timed(daemon, &path, "Start").await?);
        destroy.push(timed(daemon, &path, "Destroy").await?);
        let mut raw = Raw::start(&argv, daemon.folder())?;
        ready.push(raw.ready);
        raw.cont()?;
        end.push(raw.end()?);
    }
    let median = |times: &mut Vec<Duration>| percentile(times, 50);
    row("Start, against QEMU from exec to QMP ready", median(&mut start), median(&mut ready), 1.3);
    row("Destroy, against SIGTERM to exit", median(&mut destroy), median(&mut end), 3.0);
    daemon.domain(&path, "Undefine").await?;
    Ok(())
}

async fn timed(daemon: &Daemon, path: &str, method: &str) -> Result<Duration> {
    let begun = Instant::now();
    daemon.domain(path, method).await?;
    Ok(begun.elapsed())
}

/// The command line virtd runs, with its private files in a folder of ours.
async fn native(daemon: &Daemon, path: &str) -> Result<Vec<String>> {
    let xml: String = daemon.domain(path, "GetXML").await?.body().deserialize()?;
    let reply = daemon.call("/org/virt", "org.virt.Manager", "DomainToNative", &(xml.as_str(), "qemu-argv")).await?;
    let argv: Vec<String> = reply.body().deserialize()?;
    let ours = daemon.folder().to_string_lossy().into_owned();
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
pub async fn beside_hung_ones(daemon: &Daemon) -> Result<()> {
    let well = daemon.define(&xml("well")).await?;
    daemon.domain(&well, "Start").await?;
    let mut hung = Vec::new();
    beside(daemon, &well, "no guest hung").await?;
    for (wanted, what) in [(1, "1 guest hung, a call waiting on it"), (10, "10 guests hung, a call waiting on each")] {
        while hung.len() < wanted {
            hung.push(Hung::make(daemon, hung.len()).await?);
        }
        beside(daemon, &well, what).await?;
    }
    for guest in hung {
        guest.end(daemon).await?;
    }
    daemon.domain(&well, "Destroy").await?;
    Ok(())
}

async fn beside(daemon: &Daemon, well: &str, what: &str) -> Result<()> {
    let (mut reads, mut changes) = (Vec::new(), Vec::new());
    for _ in 0..200 {
        reads.push(timed(daemon, well, "GetXML").await?);
        let begun = Instant::now();
        for method in ["Suspend", "Resume"] {
            daemon.call(well, "org.virt.Domain", method, &()).await?;
        }
        changes.push(begun.elapsed());
    }
    let figures =
        |times: &mut Vec<Duration>| format!("{} / {}", text(percentile(times, 50)), text(percentile(times, 99)));
    line(&format!("GetXML of another domain, {what} (p50 / p99)"), figures(&mut reads));
    line(&format!("Suspend + Resume of it, {what} (p50 / p99)"), figures(&mut changes));
    Ok(())
}

/// A guest whose QEMU is stopped, and a call that waits for it.
struct Hung {
    path: String,
    waiting: tokio::task::JoinHandle<()>,
}

impl Hung {
    async fn make(daemon: &Daemon, number: usize) -> Result<Hung> {
        let name = format!("hung-{number}");
        let path = daemon.define(&xml(&name)).await?;
        daemon.domain(&path, "Start").await?;
        let pid = qemu_named(&name).ok_or("QEMU not found")?;
        rustix::process::kill_process(pid, rustix::process::Signal::STOP)?;
        let (connection, target) = (daemon.connection.clone(), path.clone());
        let waiting = tokio::spawn(async move {
            // Fails when the guest is ended, as it should.
            let _ = connection
                .call_method(Some("org.virt"), target.as_str(), Some("org.virt.Domain"), "Suspend", &())
                .await;
        });
        Ok(Hung { path, waiting })
    }

    async fn end(self, daemon: &Daemon) -> Result<()> {
        daemon.call(&self.path, "org.virt.Domain", "Destroy", &(no_options(),)).await?;
        self.waiting.await?;
        Ok(())
    }
}

/// The QEMU whose guest has this name.
fn qemu_named(name: &str) -> Option<rustix::process::Pid> {
    let wanted = format!("guest={name},");
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let command = std::fs::read(entry.path().join("cmdline")).ok()?;
        let pid = entry.file_name().to_str()?.parse().ok()?;
        String::from_utf8_lossy(&command).contains(&wanted).then(|| rustix::process::Pid::from_raw(pid))?
    })
}
