//! What virtd costs, beside what the same work costs without it, in one run: `./bench`.
//!
//! Every figure is a median of interleaved rounds on a private bus, so that a busy machine slows both sides alike. Nothing
//! here passes or fails: figures are read by people, and noted with the issue they belong to. `./bench dead` measures beside
//! dead storage alone, `./bench start` starts alone, `./bench libvirt` beside libvirt, `./bench running` the part of it
//! that is done with guests that run, `./bench resources` networks, pools and volumes beside
//! libvirt's, `./bench inventory` ten thousand domains, `./bench listen` what listening to statistics costs.

mod bus;
#[path = "../common/mod.rs"]
mod common;
mod dead;
mod guests;
mod inventory;
mod libvirt;
mod listen;
mod raw;
mod resources;
mod running;
mod snapshots;

use std::time::Duration;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == dead::CLIENT) {
        return dead::measure_here(&arguments[at + 1..]).await;
    }
    println!("{:<58} {:>12} {:>12} {:>7}  wanted", "what (median)", "virtd", "bare", "ratio");
    let only = |part: &str| arguments.iter().any(|argument| argument == part);
    if only("dead") {
        return dead::beside_dead_storage().await;
    }
    if only("inventory") {
        return inventory::ten_thousand().await;
    }
    if only("resources") {
        return resources().await;
    }
    let bench = bus::Bench::start(None).await?;
    if only("libvirt") {
        return libvirt::compare(&bench).await;
    }
    if only("running") {
        return libvirt::compare_running(&bench).await;
    }
    if only("listen") {
        return listen::to_statistics(&bench).await;
    }
    guests::start_and_destroy(&bench, "").await?;
    if let Some(walled) = bus::Bench::start_system().await? {
        guests::start_and_destroy(&walled, ", as a user of its own").await?;
    }
    if only("start") {
        return Ok(());
    }
    inventory::read_against_ping(&bench).await?;
    guests::beside_hung_ones(&bench).await?;
    listen::to_statistics(&bench).await?;
    libvirt::compare(&bench).await?;
    drop(bench);
    resources().await?;
    dead::beside_dead_storage().await?;
    println!();
    inventory::ten_thousand().await
}

/// Networks, pools and volumes.
async fn resources() -> Result<(), Box<dyn std::error::Error>> {
    match bus::Bench::start_network().await? {
        Some(bench) => libvirt::compare_resources(&bench).await,
        None => Ok(()),
    }
}

/// One line of the table.
fn row(what: &str, ours: Duration, bare: Duration, wanted: f64) {
    let ratio = ours.as_secs_f64() / bare.as_secs_f64();
    println!("{what:<58} {:>12} {:>12} {ratio:>6.2}x  at most {wanted}x", text(ours), text(bare));
}

/// Two sides of the same work.
fn beside(what: &str, ours: Duration, theirs: Duration) {
    let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
    println!("{what:<58} {:>12} {:>12} {ratio:>6.2}x", text(ours), text(theirs));
}

/// One figure that stands alone.
fn line(what: &str, value: impl std::fmt::Display) {
    println!("{what:<58} {value:>12}");
}

/// A duration as people write it.
fn text(time: Duration) -> String {
    if time < Duration::from_millis(1) {
        format!("{} µs", time.as_micros())
    } else {
        format!("{:.1} ms", time.as_secs_f64() * 1e3)
    }
}

/// The value below which `percent` of them lie; sorts.
fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort();
    times[(times.len() - 1) * percent / 100]
}
