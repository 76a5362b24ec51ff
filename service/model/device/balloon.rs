//! `<memballoon>`: memory that a guest gives back.

use super::{DeviceInfo, PlainDriver};
use crate::domain::part::element;
use crate::domain::value::choices;

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
