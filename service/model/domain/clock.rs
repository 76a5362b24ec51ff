//! `<clock>`: the guest's real-time clock and its timers. `<pm>`: its sleep states.

use super::part::element;
use super::value::choices;

choices! {
    /// What the real-time clock starts from.
    pub enum ClockOffset {
        Utc = "utc", Localtime = "localtime", Timezone = "timezone", Variable = "variable", Absolute = "absolute",
    }
}

choices! {
    /// What a variable clock is ahead of.
    pub enum ClockBasis { Utc = "utc", Localtime = "localtime", }
}

impl Clock {
    /// Seconds by which a `variable` clock is ahead of its basis; `None` if it does not say a number.
    pub fn ahead(&self) -> Option<i64> {
        match self.adjustment.as_deref() {
            None | Some("reset") => Some(0),
            Some(seconds) => seconds.trim().parse().ok(),
        }
    }
}

choices! {
    /// How the time stamp counter is had.
    pub enum TscMode {
        Auto = "auto", Native = "native", Emulate = "emulate", Paravirt = "paravirt", Smpsafe = "smpsafe",
    }
}

choices! {
    /// A timer.
    pub enum TimerName {
        Platform = "platform", Pit = "pit", Rtc = "rtc", Hpet = "hpet", Tsc = "tsc", Kvmclock = "kvmclock",
        Hypervclock = "hypervclock", Armvtimer = "armvtimer",
    }
}

choices! {
    /// What becomes of ticks that came while the guest did not run.
    pub enum TickPolicy { Delay = "delay", Catchup = "catchup", Merge = "merge", Discard = "discard", }
}

choices! {
    /// What a timer follows.
    pub enum TimerTrack { Boot = "boot", Guest = "guest", Wall = "wall", Realtime = "realtime", }
}

element! {
    /// `<clock>`
    pub struct Clock {
        /// What it starts from.
        or_default "offset" => offset: ClockOffset,
        /// Of `variable`: seconds by which it is ahead of its basis; of `utc` and `localtime`, `reset`.
        attr "adjustment" => adjustment: Option<String>,
        /// Of `variable`: what it is ahead of.
        attr "basis" => basis: Option<ClockBasis>,
        /// Of `timezone`: whose time it shows.
        attr "timezone" => timezone: Option<String>,
        /// Of `absolute`: what it shows at start, in seconds since the epoch.
        attr "start" => start: Option<i64>,
        /// Each `<timer>`.
        children "timer" => timers: Vec<Timer>,
    }
}

element! {
    /// `<timer>`
    pub struct Timer {
        /// Which.
        need "name" => name: TimerName,
        /// What becomes of missed ticks.
        attr "tickpolicy" => tickpolicy: Option<TickPolicy>,
        /// What it follows.
        attr "track" => track: Option<TimerTrack>,
        /// Whether the guest has it.
        yes_no "present" => present: Option<bool>,
        /// Of the time stamp counter, in Hz.
        attr "frequency" => frequency: Option<u64>,
        /// How the time stamp counter is had.
        attr "mode" => mode: Option<TscMode>,
    }
}

element! {
    /// `<pm>`
    pub struct Pm {
        /// Sleep to memory.
        child "suspend-to-mem" => suspend_to_mem: Option<Enabled>,
        /// Sleep to disk.
        child "suspend-to-disk" => suspend_to_disk: Option<Enabled>,
    }
}

element! {
    /// An element that only says yes or no.
    pub struct Enabled {
        /// As said.
        yes_no "enabled" => enabled: Option<bool>,
    }
}
