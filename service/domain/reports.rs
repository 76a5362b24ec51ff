//! What `follow` reads: a guest's reports, at a pace.
//!
//! Each report is kept on disk, told to every client and written to the log. A guest decides how many there are, so no more
//! than [`BURST`] are taken at once and [`A_SECOND`] a second after that; meanwhile they become few where they wait
//! (`virt_model::driver::reports`). A guest's end waits for nothing.

use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use virt_model::driver::{DriverEvent, EventStream};

/// Reports that are taken as they come.
const BURST: u32 = 256;
/// Reports a second when those are used up.
const A_SECOND: u32 = 20;

/// Reports, and those who ask to be told when those that are there have been dealt with.
pub(super) struct Reports {
    reports: EventStream,
    asks: mpsc::UnboundedReceiver<oneshot::Sender<()>>,
    /// Who has asked, and at most how many reports were there before that.
    waiting: Vec<(usize, oneshot::Sender<()>)>,
    pace: Pace,
}

impl Reports {
    pub fn new(reports: EventStream, asks: mpsc::UnboundedReceiver<oneshot::Sender<()>>) -> Reports {
        Reports { reports, asks, waiting: Vec::new(), pace: Pace::new() }
    }

    /// The next report; all before it have been told. Who asks is answered when what had been reported by then is told,
    /// however much is reported after it.
    pub async fn next(&mut self) -> Option<DriverEvent> {
        loop {
            let none_left = self.reports.is_empty();
            for (_, asked) in self.waiting.extract_if(.., |(before, _)| none_left || *before == 0) {
                // Whoever asked may have left.
                let _ = asked.send(());
            }
            tokio::select! {
                biased;
                Some(asked) = self.asks.recv() => self.waiting.push((self.reports.len(), asked)),
                () = self.reports.filled() => return self.take().await,
            }
        }
    }

    /// Takes the report that is there: at its pace, unless somebody waits for it to be dealt with. Who asks is a caller, not
    /// the guest.
    async fn take(&mut self) -> Option<DriverEvent> {
        while self.waiting.is_empty() {
            tokio::select! {
                biased;
                () = self.reports.ending() => break,
                Some(asked) = self.asks.recv() => self.waiting.push((self.reports.len(), asked)),
                () = self.pace.turn() => break,
            }
        }
        self.waiting.iter_mut().for_each(|(before, _)| *before = before.saturating_sub(1));
        self.reports.recv().await
    }
}

/// So many at once, and so many a second.
struct Pace {
    left: u32,
    since: Instant,
}

impl Pace {
    fn new() -> Pace {
        Pace { left: BURST, since: Instant::now() }
    }

    /// Waits for a turn, and takes it.
    async fn turn(&mut self) {
        while !self.takes(Instant::now()) {
            tokio::time::sleep(Duration::from_secs(1) / A_SECOND).await;
        }
    }

    /// Whether there is a turn now, which then is taken.
    fn takes(&mut self, now: Instant) -> bool {
        let come = now.saturating_duration_since(self.since).as_millis() * u128::from(A_SECOND) / 1000;
        if let Some(come) = u32::try_from(come).ok().filter(|come| *come > 0) {
            self.left = self.left.saturating_add(come).min(BURST);
            self.since = now;
        }
        let takes = self.left > 0;
        self.left -= u32::from(takes);
        takes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virt_model::driver::{Exit, reports};

    #[test]
    fn a_burst_is_taken_at_once_and_then_so_many_a_second() {
        let begun = Instant::now();
        let mut pace = Pace { left: BURST, since: begun };
        let taken = |pace: &mut Pace, after: u64| {
            (0..10_000).filter(|_| pace.takes(begun + Duration::from_millis(after))).count()
        };
        assert_eq!(taken(&mut pace, 0), BURST as usize);
        assert_eq!(taken(&mut pace, 0), 0);
        let a_minute: usize = (1..=600).map(|tenth| taken(&mut pace, tenth * 100)).sum();
        assert_eq!(a_minute, 60 * A_SECOND as usize);
        assert_eq!(taken(&mut pace, 24 * 3_600_000), BURST as usize, "what was not used does not add up");
    }

    /// M1: the guest's end is told at once, however much it has reported before.
    #[tokio::test]
    async fn the_end_waits_for_no_turn() {
        let (sink, stream) = reports();
        let (_asks, asked) = mpsc::unbounded_channel();
        let mut reports = Reports::new(stream, asked);
        for _ in 0..100_000 {
            sink.send(DriverEvent::Panicked);
            sink.send(DriverEvent::Resumed);
        }
        sink.send(DriverEvent::Exited(Exit::Requested));
        reports.pace.left = 0;
        assert_eq!(reports.next().await, Some(DriverEvent::Exited(Exit::Requested)));
        drop(sink);
        assert_eq!(reports.next().await, None);
    }

    /// The pace is for what a guest does by itself: a verb that waits for what it caused is not slowed down.
    #[tokio::test]
    async fn what_somebody_waits_for_waits_for_no_turn() {
        let (sink, stream) = reports();
        let (asks, asked) = mpsc::unbounded_channel();
        let mut reports = Reports::new(stream, asked);
        // No turn for an hour.
        reports.pace = Pace { left: 0, since: Instant::now() + Duration::from_secs(3600) };
        sink.send(DriverEvent::Panicked);
        let (ask, told) = oneshot::channel();
        asks.send(ask).unwrap();
        assert_eq!(reports.next().await, Some(DriverEvent::Panicked));
        let next = tokio::spawn(async move { reports.next().await });
        told.await.unwrap();
        sink.send(DriverEvent::Resumed);
        let (ask, told) = oneshot::channel();
        asks.send(ask).unwrap();
        assert_eq!(next.await.unwrap(), Some(DriverEvent::Resumed));
        drop(told);
    }

    #[tokio::test]
    async fn who_asks_is_answered_behind_the_reports() {
        let (sink, stream) = reports();
        let (asks, asked) = mpsc::unbounded_channel();
        let mut reports = Reports::new(stream, asked);
        let (ask, mut told) = oneshot::channel();
        sink.send(DriverEvent::Panicked);
        asks.send(ask).unwrap();
        assert_eq!(reports.next().await, Some(DriverEvent::Panicked));
        assert!(told.try_recv().is_err());
        drop(tokio::time::timeout(Duration::from_millis(10), reports.next()).await);
        assert!(told.try_recv().is_ok());
    }
}
