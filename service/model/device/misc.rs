//! Small devices: `<input>`, `<memballoon>`, `<rng>`, `<tpm>`, `<watchdog>`.

use super::chardev::{CharAddress, CharKind, CharSource, Log, Protocol, SocketMode};
use super::{DeviceInfo, VirtioDriver};
use crate::domain::part::element;
use crate::domain::value::choices;
use uuid::Uuid;

choices! {
    /// What it is.
    pub enum InputKind {
        Mouse = "mouse", Tablet = "tablet", Keyboard = "keyboard", Passthrough = "passthrough", Evdev = "evdev",
    }
}

choices! {
    /// What it is plugged into.
    pub enum InputBus {
        Ps2 = "ps2", Usb = "usb", Xen = "xen", Parallels = "parallels", Virtio = "virtio", None = "none",
    }
}

choices! {
    /// Which generation of virtio.
    pub enum VirtioModel {
        Virtio = "virtio", Transitional = "virtio-transitional", NonTransitional = "virtio-non-transitional",
    }
}

element! {
    /// `<input>`
    pub struct Input {
        /// What it is.
        need "type" => kind: InputKind,
        /// What it is plugged into.
        attr "bus" => bus: Option<InputBus>,
        /// Generation, of virtio.
        attr "model" => model: Option<VirtioModel>,
        /// `<driver>`
        child "driver" => driver: Option<PlainDriver>,
        /// `<source>`: the host's device.
        child "source" => source: Option<InputSource>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

choices! {
    /// What is grabbed.
    pub enum Grab { All = "all", }
}

choices! {
    /// The keys that take the device from the host to the guest and back.
    pub enum GrabToggle {
        CtrlCtrl = "ctrl-ctrl", AltAlt = "alt-alt", ShiftShift = "shift-shift", MetaMeta = "meta-meta",
        Scrolllock = "scrolllock", CtrlScrolllock = "ctrl-scrolllock",
    }
}

element! {
    /// `<input><source>`
    pub struct InputSource {
        /// Of `evdev`: the device.
        attr "dev" => dev: Option<String>,
        /// Of `passthrough`: the device.
        attr "evdev" => evdev: Option<String>,
        /// What is grabbed with it.
        attr "grab" => grab: Option<Grab>,
        /// The keys that take it to the guest and back.
        attr "grabToggle" => grab_toggle: Option<GrabToggle>,
        /// Keys repeat.
        on_off "repeat" => repeat: Option<bool>,
    }
}

impl InputSource {
    /// The device's path.
    pub fn path(&self) -> Option<&str> {
        self.dev.as_deref().or(self.evdev.as_deref())
    }
}

choices! {
    /// The device.
    pub enum BalloonModel {
        Virtio = "virtio", None = "none", Xen = "xen", VirtioTransitional = "virtio-transitional",
        VirtioNonTransitional = "virtio-non-transitional",
    }
}

element! {
    /// `<memballoon>`
    pub struct Memballoon {
        /// The device, or none.
        need "model" => model: BalloonModel,
        /// Give memory back before the guest runs out.
        on_off "autodeflate" => autodeflate: Option<bool>,
        /// The guest tells which pages it does not use.
        on_off "freePageReporting" => free_page_reporting: Option<bool>,
        /// `<stats>`
        child "stats" => stats: Option<BalloonStats>,
        /// `<driver>`
        child "driver" => driver: Option<PlainDriver>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

element! {
    /// `<stats>`
    pub struct BalloonStats {
        /// Seconds between two; 0: never.
        need "period" => period: u32,
    }
}

element! {
    /// A `<driver>` with nothing but what virtio devices share.
    pub struct PlainDriver {
        /// What virtio devices share.
        flat => virtio: VirtioDriver,
    }
}

element! {
    /// `<rng>`
    pub struct Rng {
        /// Generation.
        need "model" => model: VirtioModel,
        /// `<rate>`
        child "rate" => rate: Option<RngRate>,
        /// `<backend>`
        must "backend" => backend: RngBackend,
        /// `<driver>`
        child "driver" => driver: Option<PlainDriver>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

element! {
    /// `<rate>`
    pub struct RngRate {
        /// In each period.
        need "bytes" => bytes: u32,
        /// In milliseconds; 1000 if absent.
        attr "period" => period_ms: Option<u32>,
    }
}

choices! {
    /// Where randomness comes from.
    pub enum RngKind { Random = "random", Egd = "egd", Builtin = "builtin", }
}

element! {
    /// `<rng><backend>`
    pub struct RngBackend {
        /// Where from.
        need "model" => model: RngKind,
        /// Of `random`: the file.
        text => path: Option<String>,
        /// Of `egd`: what leads to the daemon.
        attr "type" => kind: Option<CharKind>,
        /// Of `egd`: where it is.
        children "source" => sources: Vec<CharAddress>,
        /// Of `egd`: what is spoken.
        child "protocol" => protocol: Option<Protocol>,
        /// Of `egd`: a file with all that passes.
        child "log" => log: Option<Log>,
    }
}

impl RngBackend {
    /// What leads to an entropy daemon.
    pub fn daemon(&self) -> CharSource {
        let (sources, protocol, log) = (self.sources.clone(), self.protocol.clone(), self.log.clone());
        CharSource { sources, protocol, log, ..CharSource::new(self.kind.unwrap_or_default()) }
    }
}

choices! {
    /// The guest's interface.
    pub enum TpmModel {
        Tis = "tpm-tis", Crb = "tpm-crb", Spapr = "tpm-spapr", SpaprProxy = "spapr-tpm-proxy",
    }
}

element! {
    /// `<tpm>`
    pub struct Tpm {
        /// The guest's interface.
        attr "model" => model: Option<TpmModel>,
        /// `<backend>`
        must "backend" => backend: TpmBackend,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

choices! {
    /// Who plays the chip.
    pub enum TpmKind { Passthrough = "passthrough", Emulator = "emulator", External = "external", }
}

choices! {
    /// Which specification.
    pub enum TpmVersion { V1_2 = "1.2", V2_0 = "2.0", }
}

element! {
    /// `<tpm><backend>`
    pub struct TpmBackend {
        /// Who plays the chip.
        need "type" => kind: TpmKind,
        /// Which specification.
        attr "version" => version: Option<TpmVersion>,
        /// Keep its state for a transient domain.
        yes_no "persistent_state" => persistent_state: Option<bool>,
        /// How much the emulator logs.
        attr "debug" => debug: Option<u32>,
        /// `<encryption>`: of the emulator's state.
        child "encryption" => encryption: Option<TpmEncryption>,
        /// `<device>`: of `passthrough`, the host's.
        child "device" => device: Option<TpmDevice>,
        /// `<active_pcr_banks>`
        child "active_pcr_banks" => banks: Option<PcrBanks>,
        /// `<source>`: where an emulator keeps its state, or an external one listens.
        child "source" => source: Option<TpmSource>,
    }
}

element! {
    /// `<tpm><backend><encryption>`
    pub struct TpmEncryption {
        /// The secret with the pass phrase.
        need "secret" => secret: Uuid,
    }
}

element! {
    /// `<tpm><backend><device>`
    pub struct TpmDevice {
        /// A device of the host's.
        need "path" => path: String,
    }
}

element! {
    /// `<active_pcr_banks>`: the algorithms in which the chip measures.
    pub struct PcrBanks {
        /// SHA-1
        flag "sha1" => sha1: bool,
        /// SHA-256
        flag "sha256" => sha256: bool,
        /// SHA-384
        flag "sha384" => sha384: bool,
        /// SHA-512
        flag "sha512" => sha512: bool,
    }
}

impl PcrBanks {
    /// Their names, in order.
    pub fn names(&self) -> Vec<&'static str> {
        let all = [("sha1", self.sha1), ("sha256", self.sha256), ("sha384", self.sha384), ("sha512", self.sha512)];
        all.into_iter().filter(|(_, active)| *active).map(|(name, _)| name).collect()
    }
}

choices! {
    /// What a TPM's source is.
    pub enum TpmSourceKind { Dir = "dir", File = "file", Unix = "unix", }
}

element! {
    /// `<tpm><backend><source>`
    pub struct TpmSource {
        /// What it is.
        attr "type" => kind: Option<TpmSourceKind>,
        /// Of a socket: who listens.
        attr "mode" => mode: Option<SocketMode>,
        /// Where it is.
        attr "path" => path: Option<String>,
    }
}

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
