//! Times as they are published, stored and logged.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Now, in microseconds since the epoch.
pub(crate) fn now_usec() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}

/// How long it has been, for the log.
pub(crate) fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
