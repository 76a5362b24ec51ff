//! Where the guest gets randomness.

use super::args::Props;
use super::{Builder, generation, id, virtio};
use virt_model::device::Rng;
use virt_model::device::rng::RngKind;

/// Files that everybody may read.
const PUBLIC: [&str; 2] = ["/dev/urandom", "/dev/random"];

impl Builder<'_> {
    pub(super) fn random(&mut self) {
        let def = self.def;
        for rng in &def.devices.rngs {
            self.rng(rng);
        }
    }

    pub(super) fn rng(&mut self, rng: &Rng) {
        let name = id(&rng.info);
        let object = format!("obj{name}");
        match rng.backend.model {
            RngKind::Egd => {
                let chardev = self.back_end(&rng.backend.daemon(), name, None);
                self.args.object(Props::new("qom-type", "rng-egd").set("id", &*object).set("chardev", chardev));
            }
            RngKind::Builtin => self.args.object(Props::new("qom-type", "rng-builtin").set("id", &*object)),
            _ => {
                let path = rng.backend.path.as_deref().unwrap_or(PUBLIC[0]);
                let props = Props::new("qom-type", "rng-random").set("id", &*object).set("filename", path);
                self.args.object(props);
                if !PUBLIC.contains(&path) {
                    self.open(path, false);
                }
            }
        }
        let rate = rng.rate.as_ref();
        let props = Props::device(&format!("virtio-rng-pci{}", generation(rng.model)))
            .set("rng", object)
            .set("id", name)
            .maybe("max-bytes", rate.map(|r| r.bytes))
            .maybe("period", rate.map(|r| r.period_ms.unwrap_or(1000)))
            .extend(rng.driver.as_ref().map(|d| virtio(&d.virtio)).unwrap_or_default());
        self.args.device(props.extend(self.pci(&rng.info)));
    }
}
