//! What a guest's driver reports, on its way to the service.
//!
//! A guest can stop and start as often as it likes, and one that has taken over its hypervisor can report what it likes. So
//! what waits here is bounded: beyond [`MOST`] the last of it gives way to what comes, and what then is said twice is said
//! once; of devices nothing more is told then. What the guest does now is always the last thing told of it, and its end overtakes
//! all that came before.

use super::DriverEvent;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use tokio::sync::mpsc::error::TryRecvError;

/// Reports that may wait.
const MOST: usize = 64;

/// Where an instance reports to. Never blocks the driver. When the last one is dropped, the reports end.
#[derive(Clone, Debug)]
pub struct EventSink(Arc<End>);

/// Ends the reports when it is dropped.
#[derive(Debug)]
struct End(Arc<Line>);

/// What has been reported, in order.
#[derive(Debug)]
pub struct EventStream(Arc<Line>);

#[derive(Debug, Default)]
struct Line {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<DriverEvent>,
    /// Nothing more will come.
    ended: bool,
    /// Nobody takes anything.
    abandoned: bool,
}

/// A way for the reports of one guest.
pub fn reports() -> (EventSink, EventStream) {
    let line = Arc::<Line>::default();
    (EventSink(Arc::new(End(line.clone()))), EventStream(line))
}

impl EventSink {
    /// Reports. `false`: nobody listens, as when virtd is being closed.
    pub fn send(&self, event: DriverEvent) -> bool {
        let line = &self.0.0;
        let mut state = line.lock();
        if state.abandoned {
            return false;
        }
        state.take(event);
        drop(state);
        line.changed.notify_waiters();
        true
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_waiters();
    }
}

impl EventStream {
    /// The next report; `None` when none will come any more.
    pub async fn recv(&mut self) -> Option<DriverEvent> {
        self.filled().await;
        self.try_recv().ok()
    }

    /// The next report, if there is one.
    pub fn try_recv(&mut self) -> Result<DriverEvent, TryRecvError> {
        let mut state = self.0.lock();
        let none = if state.ended { TryRecvError::Disconnected } else { TryRecvError::Empty };
        state.waiting.pop_front().ok_or(none)
    }

    /// How many reports wait.
    pub fn len(&self) -> usize {
        self.0.lock().waiting.len()
    }

    /// Whether no report waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits until there is a report, or none will come any more.
    pub async fn filled(&self) {
        self.until(|state| state.ended || !state.waiting.is_empty()).await;
    }

    /// Waits until the guest's end has been reported, or nothing will come any more.
    pub async fn ending(&self) {
        self.until(|state| state.ended || matches!(state.waiting.back(), Some(DriverEvent::Exited(_)))).await;
    }

    async fn until(&self, so: impl Fn(&State) -> bool) {
        loop {
            let changed = self.0.changed.notified();
            if so(&self.0.lock()) {
                return;
            }
            changed.await;
        }
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.0.lock().abandoned = true;
    }
}

impl Line {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take(&mut self, event: DriverEvent) {
        if event == DriverEvent::PortsChanged {
            // Of ports what is so when it is told is told: once is enough, and takes no other's place.
            if !self.waiting.contains(&event) {
                self.waiting.push_back(event);
            }
            return;
        }
        if matches!(event, DriverEvent::Exited(_)) && self.waiting.len() >= MOST / 2 {
            self.waiting.clear();
        } else if self.waiting.len() >= MOST {
            if event.is_of_a_device() {
                return;
            }
            let last = |waiting: &VecDeque<_>| waiting.iter().rposition(|one| *one != DriverEvent::PortsChanged);
            last(&self.waiting).and_then(|last| self.waiting.remove(last));
            if last(&self.waiting).is_some_and(|last| self.waiting[last] == event) {
                return;
            }
        }
        self.waiting.push_back(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::Exit;
    use crate::state::Suspended;

    const STOP: DriverEvent = DriverEvent::Suspended(Suspended::Paused);
    const GO: DriverEvent = DriverEvent::Resumed;

    /// M1: a guest's own stops and starts are not stored one by one.
    #[test]
    fn what_waits_is_bounded_and_the_last_of_it_is_what_the_guest_does() {
        for last in [STOP, GO] {
            let (sink, mut stream) = reports();
            for _ in 0..150_000 {
                assert!(sink.send(STOP) && sink.send(GO));
            }
            if last == STOP {
                sink.send(STOP);
            }
            let told: Vec<_> = std::iter::from_fn(|| stream.try_recv().ok()).collect();
            assert!(told.len() <= MOST && told.last() == Some(&last), "{}", told.len());
            assert!(told.windows(2).all(|two| two[0] != two[1]), "{told:?}");
        }
    }

    #[test]
    fn few_reports_come_as_they_were_and_the_end_after_them() {
        let (sink, mut stream) = reports();
        let all = [STOP, GO, DriverEvent::Panicked, DriverEvent::Exited(Exit::Requested)];
        all.iter().for_each(|event| assert!(sink.send(event.clone())));
        drop(sink);
        let told: Vec<_> = std::iter::from_fn(|| stream.try_recv().ok()).collect();
        assert_eq!(told, all);
        assert_eq!(stream.try_recv(), Err(TryRecvError::Disconnected));
    }

    #[test]
    fn the_agent_takes_no_other_reports_place() {
        let (sink, mut stream) = reports();
        for _ in 0..1000 {
            assert!(sink.send(STOP) && sink.send(DriverEvent::PortsChanged) && sink.send(GO));
        }
        (0..1000).for_each(|_| assert!(sink.send(DriverEvent::PortsChanged)));
        let told: Vec<_> = std::iter::from_fn(|| stream.try_recv().ok()).collect();
        assert_eq!(told.iter().filter(|event| **event == DriverEvent::PortsChanged).count(), 1);
        assert!(told.len() <= MOST + 1 && told.last() == Some(&GO), "{told:?}");
    }

    /// M1: nobody waits for a flood of reports to see that the guest has ended.
    #[test]
    fn the_end_overtakes_a_flood() {
        let (sink, mut stream) = reports();
        for _ in 0..1000 {
            sink.send(STOP);
            sink.send(GO);
        }
        sink.send(DriverEvent::Exited(Exit::Requested));
        assert_eq!(stream.try_recv(), Ok(DriverEvent::Exited(Exit::Requested)));
        assert_eq!(stream.try_recv(), Err(TryRecvError::Empty));
    }

    #[test]
    fn who_does_not_listen_is_told_nothing() {
        let (sink, stream) = reports();
        drop(stream);
        assert!(!sink.send(GO));
    }

    /// What befalls devices takes the place of nothing that the guest does.
    #[test]
    fn a_flood_of_device_reports_hides_no_state() {
        let (sink, mut stream) = reports();
        let ejected = || DriverEvent::TrayOpened("sata0-0-0".to_owned());
        for _ in 0..MOST - 1 {
            sink.send(ejected());
        }
        sink.send(STOP);
        for _ in 0..1000 {
            sink.send(ejected());
        }
        assert_eq!(stream.len(), MOST);
        let mut last = None;
        while let Ok(event) = stream.try_recv() {
            last = Some(event);
        }
        assert_eq!(last, Some(STOP));
    }
}
