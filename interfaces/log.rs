//! Where virtd's log goes: to the journal with its fields if systemd reads our standard error, else there as text.

use crate::settings::LogLevel;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};
use virt_model::xml::plainly;
use virt_service::log::{DONE, FAILED, GUEST};

/// Begins to log.
pub fn begin(level: LogLevel) {
    let layers = is_journal().then(|| journal().ok()).flatten().unwrap_or_else(|| vec![text().boxed()]);
    tracing_subscriber::registry().with(layers).with(EnvFilter::new(level.filter())).init();
}

/// The kinds of lines that can be looked for (`journalctl MESSAGE_ID=…`), by their targets. virtd(8) lists them.
pub const MESSAGE_IDS: [(&str, &str); 3] = [
    (DONE, "c7c41d3c24c0428f8deb164d3e2ac481"),
    (FAILED, "ddb5c1d2cb09479eb0d7cba66ce4ba5a"),
    (GUEST, "0ad9515bf5fc4431bf9982c2d5487ef2"),
];

/// The journal, with the fields of each line: those that tell which machine it is about are the same in all.
fn journal<S>() -> io::Result<Vec<Box<dyn Layer<S> + Send + Sync>>>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    let layer = || Ok::<_, io::Error>(tracing_journald::layer()?.with_field_prefix(Some("VIRT_DOMAIN".to_owned())));
    let others = filter_fn(|line| MESSAGE_IDS.iter().all(|(target, _)| *target != line.target()));
    let mut layers = vec![layer()?.with_filter(others).boxed()];
    for (target, id) in MESSAGE_IDS {
        let of_kind = filter_fn(move |line| line.target() == target);
        layers.push(layer()?.with_custom_fields([("MESSAGE_ID", id)]).with_filter(of_kind).boxed());
    }
    Ok(layers)
}

fn text<S>() -> impl Layer<S>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt::layer().with_writer(|| Plain(std::io::stderr())).with_ansi(ansi)
}

/// Writes each event as one line that looks like what it is, whatever names and words of others are in it: they forge no
/// lines and change no letters. Escapes are left where a terminal gets colours.
struct Plain<W>(W);

impl<W: Write> Write for Plain<W> {
    /// An event comes whole, with its line end.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let line = text.strip_suffix('\n').unwrap_or(&text);
        let mut plain = String::with_capacity(event.len() + 1);
        for piece in line.split_inclusive('\u{1b}') {
            match piece.strip_suffix('\u{1b}') {
                // The formatter's own; those in names and words it has written out itself.
                Some(before) => plain.extend([&*plainly(before), "\u{1b}"]),
                None => plain.push_str(&plainly(piece)),
            }
        }
        plain.push('\n');
        self.0.write_all(plain.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Whether standard error is the stream that `JOURNAL_STREAM` names, and not one that it was later exchanged for.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stderr) = std::fs::metadata("/proc/self/fd/2") else { return false };
    stream == format!("{}:{}", stderr.dev(), stderr.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s3_an_event_is_one_line_whatever_is_in_it() {
        let mut written = Vec::new();
        let event = "INFO the hypervisor died: no\n2026 INFO a forged line \u{202e}reversed\r\n";
        Plain(&mut written).write_all(event.as_bytes()).unwrap();
        let text = String::from_utf8(written).unwrap();
        assert_eq!(text, "INFO the hypervisor died: no\\u{a}2026 INFO a forged line \\u{202e}reversed\\u{d}\n");
    }
}
