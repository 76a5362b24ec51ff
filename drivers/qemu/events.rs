//! What QEMU's events mean: QMP event → [`DriverEvent`], without I/O.
//!
//! QEMU tells causes and stops apart: an I/O error, a watchdog, a panic or a power-off each come as an event of their own
//! and then stop the CPUs. This keeps what the guest was last doing, so that each is reported once and by its cause.
//!
//! ```text
//!             STOP (by its cause)               SHUTDOWN                 RESET            RESUME
//!   Running ──────────────────────▶ Standing    ────────▶ PoweredOff ──────────▶ Standing ──────▶ Running
//!      ▲  ◀────────────────────────    ▲        GUEST_PANICKED             ▲
//!      │             RESUME            │        ────────▶ Panicked  ───────┘
//!      └───────── WAKEUP ◀── Asleep ◀──┘ SUSPEND
//! ```

use super::qmp::Event;
use serde_json::Value;
use virt_model::driver::{Condition, DriverEvent};
use virt_model::state::{PmSuspended, ShutdownBy, Suspended};

/// What a QEMU guest is doing, as its events tell.
#[derive(Clone, Debug)]
pub struct Guest {
    mode: Mode,
    /// Why the stop that is about to come will come.
    cause: Option<Suspended>,
    /// The next power-off is half of a reboot.
    rebooting: bool,
    /// QEMU said that it ends in order.
    ending: bool,
}

/// One of the boxes in the drawing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Not let go yet: the first RESUME belongs to the start.
    Starting,
    Running,
    Standing(Suspended),
    PoweredOff,
    Panicked,
    Asleep(PmSuspended),
    /// Powered off, and on its way through reset to running; nobody is told.
    Rebooting,
}

/// What is to be done about an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Tell the service.
    Report(DriverEvent),
    /// The guest has powered off because a reboot was asked for: reset it and let it go.
    Reboot,
}

impl Guest {
    /// A guest that has just been made, CPUs standing: the RESUME that ends its start is not reported.
    pub fn starting() -> Self {
        Guest { mode: Mode::Starting, cause: None, rebooting: false, ending: false }
    }

    /// A guest that is found.
    pub fn found(condition: Condition) -> Self {
        Guest { mode: Mode::of(condition), ..Guest::starting() }
    }

    /// Its start is over with CPUs standing, as asked.
    pub fn stands(&mut self) {
        if self.mode == Mode::Starting {
            self.mode = Mode::Standing(Suspended::Paused);
        }
    }

    /// The next power-off is to be a reboot (or is not, any more).
    pub fn expect_reboot(&mut self, expected: bool) {
        self.rebooting = expected;
    }

    /// Whether the next power-off is to be a reboot.
    pub fn reboot_expected(&self) -> bool {
        self.rebooting
    }

    /// It was found powered off, and that was the first half of a reboot.
    pub fn reboots_now(&mut self) {
        self.rebooting = false;
        self.mode = Mode::Rebooting;
    }

    /// Whether QEMU said that it ends in order.
    pub fn is_ending(&self) -> bool {
        self.ending
    }

    /// Whether the CPUs run.
    pub fn is_running(&self) -> bool {
        self.mode == Mode::Running
    }

    /// Whether the guest sleeps.
    pub fn is_asleep(&self) -> bool {
        matches!(self.mode, Mode::Asleep(_))
    }

    /// The reboot that [`Outcome::Reboot`] asked for did not come about: the guest has simply powered off.
    pub fn reboot_failed(&mut self) -> Option<DriverEvent> {
        (self.mode == Mode::Rebooting).then(|| {
            self.mode = Mode::PoweredOff;
            DriverEvent::PoweredOff { by: ShutdownBy::Guest, rebooting: false }
        })
    }

    /// What the guest was found doing after a silence; `Some` if that is news.
    pub fn found_again(&mut self, condition: Condition) -> Option<DriverEvent> {
        let (before, now) = (self.mode, Mode::of(condition));
        self.mode = now;
        if before == now {
            return None;
        }
        Some(match (condition, before) {
            (Condition::Running, Mode::Asleep(_)) => DriverEvent::Woken,
            (Condition::Running, _) => DriverEvent::Resumed,
            (Condition::Suspended(why), _) => DriverEvent::Suspended(why),
            (Condition::PoweredOff, _) => DriverEvent::PoweredOff { by: ShutdownBy::Finished, rebooting: false },
            (Condition::Panicked, _) => DriverEvent::Panicked,
            (Condition::PmSuspended(how), _) => DriverEvent::PmSuspended(how),
        })
    }

    /// Takes one event. Events it does not know, and repetitions, mean nothing.
    pub fn take(&mut self, event: &Event) -> Option<Outcome> {
        let data = &event.data;
        let word = |key: &str| data.get(key).and_then(Value::as_str).unwrap_or_default();
        match event.name.as_str() {
            "STOP" => self.stopped(),
            "RESUME" => self.resumed(),
            "RESET" => self.reset(),
            "SHUTDOWN" => self.powered_off(data.get("guest").and_then(Value::as_bool), word("reason")),
            "GUEST_PANICKED" if word("action") != "run" => self.panicked(),
            "SUSPEND" => self.fell_asleep(PmSuspended::Memory),
            "SUSPEND_DISK" => self.fell_asleep(PmSuspended::Disk),
            "WAKEUP" => self.woke(),
            "BLOCK_IO_ERROR" if word("action") == "stop" => self.will_stop(Suspended::IoError),
            "WATCHDOG" if word("action") == "pause" => self.will_stop(Suspended::Watchdog),
            _ => None,
        }
    }

    fn will_stop(&mut self, why: Suspended) -> Option<Outcome> {
        self.cause = Some(why);
        None
    }

    fn stopped(&mut self) -> Option<Outcome> {
        let why = self.cause.take().unwrap_or(Suspended::Paused);
        match self.mode {
            // A guest that sleeps can be stopped on top of it, from QEMU 9 on.
            Mode::Running | Mode::Asleep(_) => {
                self.mode = Mode::Standing(why);
                report(DriverEvent::Suspended(why))
            }
            _ => None,
        }
    }

    fn resumed(&mut self) -> Option<Outcome> {
        self.cause = None;
        match std::mem::replace(&mut self.mode, Mode::Running) {
            Mode::Starting | Mode::Running | Mode::Rebooting => None,
            Mode::Asleep(_) => report(DriverEvent::Woken),
            Mode::Standing(_) | Mode::PoweredOff | Mode::Panicked => report(DriverEvent::Resumed),
        }
    }

    fn reset(&mut self) -> Option<Outcome> {
        if matches!(self.mode, Mode::PoweredOff | Mode::Panicked) {
            self.mode = Mode::Standing(Suspended::Paused);
        }
        None
    }

    fn powered_off(&mut self, by_guest: Option<bool>, reason: &str) -> Option<Outcome> {
        if matches!(reason, "host-signal" | "host-qmp-quit") {
            self.ending = true;
            return None;
        }
        if matches!(self.mode, Mode::PoweredOff | Mode::Panicked | Mode::Rebooting) {
            return None;
        }
        let rebooting = matches!(reason, "guest-reset" | "host-qmp-system-reset");
        if std::mem::take(&mut self.rebooting) && !rebooting {
            self.mode = Mode::Rebooting;
            return Some(Outcome::Reboot);
        }
        self.mode = Mode::PoweredOff;
        let by = match by_guest {
            Some(true) => ShutdownBy::Guest,
            Some(false) => ShutdownBy::Host,
            None => ShutdownBy::Finished,
        };
        report(DriverEvent::PoweredOff { by, rebooting })
    }

    fn panicked(&mut self) -> Option<Outcome> {
        if self.mode == Mode::Panicked {
            return None;
        }
        self.mode = Mode::Panicked;
        report(DriverEvent::Panicked)
    }

    fn fell_asleep(&mut self, how: PmSuspended) -> Option<Outcome> {
        if self.mode != Mode::Running {
            return None;
        }
        self.mode = Mode::Asleep(how);
        report(DriverEvent::PmSuspended(how))
    }

    fn woke(&mut self) -> Option<Outcome> {
        if !self.is_asleep() {
            return None;
        }
        self.mode = Mode::Running;
        report(DriverEvent::Woken)
    }
}

impl Mode {
    fn of(condition: Condition) -> Mode {
        match condition {
            Condition::Running => Mode::Running,
            Condition::Suspended(why) => Mode::Standing(why),
            Condition::PoweredOff => Mode::PoweredOff,
            Condition::Panicked => Mode::Panicked,
            Condition::PmSuspended(how) => Mode::Asleep(how),
        }
    }
}

fn report(event: DriverEvent) -> Option<Outcome> {
    Some(Outcome::Report(event))
}

/// What `query-status` says the guest does.
pub fn condition(status: &str) -> Condition {
    match status {
        "running" => Condition::Running,
        "suspended" => Condition::PmSuspended(PmSuspended::Memory),
        "shutdown" => Condition::PoweredOff,
        "guest-panicked" => Condition::Panicked,
        "io-error" => Condition::Suspended(Suspended::IoError),
        "watchdog" => Condition::Suspended(Suspended::Watchdog),
        _ => Condition::Suspended(Suspended::Paused),
    }
}

#[cfg(test)]
#[path = "events_tests.rs"]
mod tests;
