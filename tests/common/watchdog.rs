//! No test waits for ever: one that takes far too long is ended with its whole program, and what everybody was doing is shown.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// How long one private bus may be there, in minutes, unless `TEST_MINUTES` says otherwise.
const MINUTES: u64 = 20;

/// Watches the test that made it, until it is dropped.
#[derive(Debug)]
pub struct Watchdog {
    _alive: Sender<()>,
}

impl Watchdog {
    /// Watches the test of this thread; `folder` is its daemon's, `keeper` the process in whose namespace all else is.
    pub fn new(folder: &Path, keeper: u32) -> Watchdog {
        let (alive, ended) = channel::<()>();
        let test = std::thread::current().name().unwrap_or("?").to_owned();
        let folder = folder.to_owned();
        let minutes = std::env::var("TEST_MINUTES").ok().and_then(|text| text.parse().ok()).unwrap_or(MINUTES);
        std::thread::spawn(move || {
            if ended.recv_timeout(Duration::from_secs(60 * minutes)) == Err(RecvTimeoutError::Timeout) {
                // Past the test runner's capture, in one piece.
                let report = report(&test, minutes, &folder, keeper);
                let _ = std::io::Write::write_all(&mut std::io::stderr(), report.as_bytes());
                std::process::abort();
            }
        });
        Watchdog { _alive: alive }
    }
}

/// What can be said of a test that does not end: the log of its virtd, and where each thread of its processes waits.
fn report(test: &str, minutes: u64, folder: &Path, keeper: u32) -> String {
    let mut text = format!("\nHANGS: {test} has not ended after {minutes} minutes\n");
    let log = std::fs::read_to_string(folder.join("virtd.log")).unwrap_or_default();
    let last: Vec<&str> = log.lines().rev().take(200).collect();
    let _ = writeln!(text, "---- virtd said last ----");
    for line in last.into_iter().rev() {
        let _ = writeln!(text, "{line}");
    }
    let ours = std::fs::read_link(format!("/proc/{keeper}/ns/uts")).ok();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let inhabits = ours.is_some() && std::fs::read_link(process.path().join("ns/uts")).ok() == ours;
        if inhabits || pid == std::process::id() {
            threads_of(&mut text, &process.path());
        }
    }
    text
}

/// A line a thread: name, state, and the kernel's function and call in which it waits.
fn threads_of(text: &mut String, process: &Path) {
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let _ = writeln!(text, "---- {} ({}) ----", process.display(), read(process.join("comm")));
    for thread in std::fs::read_dir(process.join("task")).into_iter().flatten().flatten() {
        let stat = read(thread.path().join("stat"));
        let state = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').next()).unwrap_or("?");
        let at = |name: &str| read(thread.path().join(name));
        let id = thread.file_name();
        let call = at("syscall");
        let call = call.split(' ').next().unwrap_or_default();
        let _ = writeln!(text, "{} {state} {} {} call {call}", id.display(), at("comm"), at("wchan"));
    }
}
