//! What sits on the board beside the usual: IOMMU, watchdogs, USB hubs, panic devices, shared memory, cryptographic accelerators.

use super::args::Props;
use super::{Builder, id, list, virtio};
use virt_model::device::board::{CryptoBackendModel, IommuModel, PanicModel, Shmem, ShmemKind, ShmemRole};
use virt_model::device::watchdog::WatchdogModel;
use virt_model::device::{AddressKind, Iommu, Watchdog};

/// Where shared memory has its names.
const SHARED: &str = "/dev/shm";

impl Builder<'_> {
    /// Comes before every device that it translates for.
    pub(super) fn iommus(&mut self) {
        let def = self.def;
        for iommu in &def.devices.iommus {
            let props =
                Props::device(iommu_device(iommu.model)).set("id", id(&iommu.info)).extend(iommu_options(iommu));
            self.args.device(props.extend(self.pci(&iommu.info)));
        }
    }

    pub(super) fn watchdogs(&mut self) {
        let def = self.def;
        for watchdog in &def.devices.watchdogs {
            self.watchdog(watchdog);
        }
    }

    pub(super) fn watchdog(&mut self, watchdog: &Watchdog) {
        let device = match watchdog.model {
            WatchdogModel::I6300esb => "i6300esb",
            WatchdogModel::Ib700 => "ib700",
            // The chipset's own: switched on in `machine`.
            _ => return,
        };
        let props = Props::device(device).set("id", id(&watchdog.info)).extend(self.pci(&watchdog.info));
        self.args.device(props);
    }

    pub(super) fn hubs(&mut self) {
        let def = self.def;
        for hub in &def.devices.hubs {
            let props = Props::device("usb-hub").set("id", id(&hub.info)).extend(self.usb(&hub.info));
            self.args.device(props);
        }
    }

    pub(super) fn panics(&mut self) {
        let def = self.def;
        for panic in &def.devices.panics {
            let props = match panic.model.unwrap_or_default() {
                PanicModel::Isa => {
                    let port = match panic.info.address.as_ref().map(|a| &a.kind) {
                        Some(AddressKind::Isa(isa)) => isa.iobase,
                        _ => None,
                    };
                    Props::device("pvpanic").maybe("ioport", port)
                }
                PanicModel::Pvpanic => {
                    Props::device("pvpanic-pci").set("id", id(&panic.info)).extend(self.pci(&panic.info))
                }
                // A property of the CPU.
                _ => continue,
            };
            self.args.device(props);
        }
    }

    pub(super) fn shared_memory(&mut self) {
        let def = self.def;
        for shmem in &def.devices.shmems {
            let name = id(&shmem.info);
            let kind = shmem_kind(shmem);
            let props = Props::device(kind.as_str()).set("id", name);
            let props = match kind {
                ShmemKind::Doorbell => self.doorbell(shmem, props),
                _ => self.plain_memory(shmem, props),
            };
            let master = shmem.role.map(|role| role == ShmemRole::Master);
            let props = props.maybe_on_off("master", master).extend(self.pci(&shmem.info));
            self.args.device(props);
        }
    }

    fn plain_memory(&mut self, shmem: &Shmem, props: Props) -> Props {
        let object = format!("shmmem-{}", id(&shmem.info));
        let path = format!("{SHARED}/{}", shmem.name);
        let size = shmem.size.as_ref().and_then(|size| size.bytes().ok()).unwrap_or(4 << 20);
        let backend = Props::new("qom-type", "memory-backend-file").set("id", &*object).set("mem-path", &*path);
        self.args.object(backend.set("size", size).set("share", true));
        self.output(&path);
        props.set("memdev", object)
    }

    fn doorbell(&mut self, shmem: &Shmem, props: Props) -> Props {
        let back_end = format!("char{}", id(&shmem.info));
        let given = shmem.server.as_ref().and_then(|server| server.path.clone());
        let path = given.unwrap_or_else(|| format!("/var/lib/libvirt/shmem-{}-sock", shmem.name));
        self.args.pair("-chardev", list("socket").set("id", &back_end).set("path", &path));
        self.open(&path, true);
        let msi = shmem.msi.as_ref();
        props
            .set("chardev", back_end)
            .maybe("vectors", msi.and_then(|msi| msi.vectors))
            .maybe_on_off("ioeventfd", msi.and_then(|msi| msi.ioeventfd))
    }

    pub(super) fn accelerators(&mut self) {
        let def = self.def;
        for crypto in &def.devices.cryptos {
            let name = id(&crypto.info);
            let object = format!("obj{name}");
            let kind = match crypto.backend.model {
                CryptoBackendModel::Builtin => "cryptodev-backend-builtin",
                CryptoBackendModel::Lkcf => "cryptodev-backend-lkcf",
            };
            self.args.object(Props::new("qom-type", kind).set("id", &*object).maybe("queues", crypto.backend.queues));
            let shared = crypto.driver.as_ref().map(|d| virtio(&d.virtio)).unwrap_or_default();
            let props = Props::device("virtio-crypto-pci").set("cryptodev", object).set("id", name).extend(shared);
            self.args.device(props.extend(self.pci(&crypto.info)));
        }
    }
}

/// The device of a model that we know.
pub fn iommu_device(model: IommuModel) -> &'static str {
    match model {
        IommuModel::Intel => "intel-iommu",
        IommuModel::Virtio => "virtio-iommu-pci",
        IommuModel::Amd => "amd-iommu",
        IommuModel::Smmuv3 => "arm-smmuv3",
    }
}

fn iommu_options(iommu: &Iommu) -> Props {
    let Some(driver) = &iommu.driver else { return Props::default() };
    Props::default()
        .maybe_on_off("intremap", driver.intremap)
        .maybe("caching-mode", driver.caching_mode)
        .maybe_on_off("eim", driver.eim)
        .maybe("device-iotlb", driver.iotlb)
        .maybe("aw-bits", driver.aw_bits)
        .maybe("dma-translation", driver.dma_translation)
        .maybe("xtsup", driver.xtsup)
        .maybe("pt", driver.passthrough)
}

/// The device; the older one is called by its newer names.
pub fn shmem_kind(shmem: &Shmem) -> ShmemKind {
    match shmem.model.as_ref().map(|model| model.kind) {
        Some(ShmemKind::Ivshmem) | None if shmem.server.is_some() => ShmemKind::Doorbell,
        Some(ShmemKind::Ivshmem) | None => ShmemKind::Plain,
        Some(kind) => kind,
    }
}
