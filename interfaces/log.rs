//! Where virtd's log goes: to the journal with its fields if systemd reads our standard error, else there as text.

use crate::settings::LogLevel;
use std::io::IsTerminal;
use std::os::unix::fs::MetadataExt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// Begins to log.
pub fn begin(level: LogLevel) {
    let journal = is_journal().then(|| tracing_journald::layer().ok()).flatten();
    let layer = match journal {
        Some(journal) => journal.boxed(),
        None => text().boxed(),
    };
    tracing_subscriber::registry().with(layer).with(EnvFilter::new(level.filter())).init();
}

fn text<S>() -> impl Layer<S>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(ansi)
}

/// Whether standard error is the stream that `JOURNAL_STREAM` names, and not one that it was later exchanged for.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stderr) = std::fs::metadata("/proc/self/fd/2") else { return false };
    stream == format!("{}:{}", stderr.dev(), stderr.ino())
}
