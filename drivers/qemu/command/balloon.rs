//! The balloon: memory that the guest gives back.

use super::args::Props;
use super::{Builder, id, virtio};
use serde_json::json;
use virt_model::device::balloon::BalloonModel;

impl Builder<'_> {
    pub(super) fn balloon(&mut self) {
        let def = self.def;
        let Some(balloon) = &def.devices.memballoon else { return };
        let device = match balloon.model {
            BalloonModel::Virtio => "virtio-balloon-pci",
            BalloonModel::VirtioTransitional => "virtio-balloon-pci-transitional",
            BalloonModel::VirtioNonTransitional => "virtio-balloon-pci-non-transitional",
            BalloonModel::None | BalloonModel::Xen => return,
        };
        let name = id(&balloon.info);
        let props = Props::device(device)
            .set("id", name)
            .maybe("deflate-on-oom", balloon.autodeflate)
            .maybe("free-page-reporting", balloon.free_page_reporting)
            .extend(balloon.driver.as_ref().map(|d| virtio(&d.virtio)).unwrap_or_default());
        self.args.device(props.extend(self.pci(&balloon.info)));
        if let Some(stats) = &balloon.stats {
            let path = format!("/machine/peripheral/{name}");
            let arguments = json!({"path": path, "property": "guest-stats-polling-interval", "value": stats.period});
            self.setup.push(("qom-set".to_owned(), arguments));
        }
        let (now, all) = (def.current_memory_kib(), def.memory_kib());
        if now < all {
            self.setup.push(("balloon".to_owned(), json!({"value": now.saturating_mul(1024)})));
        }
    }
}
