//! `<watchdog>`: what is done about a guest that has not moved.

use super::DeviceInfo;
use crate::domain::part::element;
use crate::domain::value::choices;

choices! {
    /// The device.
    pub enum WatchdogModel { I6300esb = "i6300esb", Ib700 = "ib700", Diag288 = "diag288", Itco = "itco", }
}

choices! {
    /// What happens when the guest has not moved.
    pub enum WatchdogAction {
        Reset = "reset", Shutdown = "shutdown", Poweroff = "poweroff", Pause = "pause", Dump = "dump", None = "none",
        InjectNmi = "inject-nmi",
    }
}

element! {
    /// `<watchdog>`
    pub struct Watchdog {
        /// The device.
        need "model" => model: WatchdogModel,
        /// What happens; `reset` if absent.
        attr "action" => action: Option<WatchdogAction>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}
