//! What sits on the board beside the usual: `<hub>`, `<panic>`, `<shmem>`, `<crypto>`, `<iommu>`.

use super::{DeviceInfo, PlainDriver};
use crate::domain::part::element;
use crate::domain::size::scaled;
use crate::domain::value::choices;

element! {
    /// `<hub>`: more ports on a USB bus.
    pub struct Hub {
        /// `usb`.
        need "type" => kind: String,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

choices! {
    /// How a guest's kernel tells of its panic.
    pub enum PanicModel {
        Isa = "isa", Pseries = "pseries", Hyperv = "hyperv", S390 = "s390", Pvpanic = "pvpanic",
    }
}

element! {
    /// `<panic>`
    pub struct Panic {
        /// How; `isa` on a PC if absent.
        attr "model" => model: Option<PanicModel>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

element! {
    /// `<shmem>`: memory shared with other guests or programs of the host.
    pub struct Shmem {
        /// The memory's name on the host.
        need "name" => name: String,
        /// `master` or `peer`: whether it is saved with the guest.
        attr "role" => role: Option<ShmemRole>,
        /// `<model>`
        child "model" => model: Option<ShmemModel>,
        /// `<size>`
        child "size" => size: Option<ShmemSize>,
        /// `<server>`: who shares it out, and passes on interrupts.
        child "server" => server: Option<ShmemServer>,
        /// `<msi>`
        child "msi" => msi: Option<ShmemMsi>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

choices! {
    /// Whether the memory is saved with the guest.
    pub enum ShmemRole { Master = "master", Peer = "peer", }
}

choices! {
    /// The device.
    pub enum ShmemKind { Ivshmem = "ivshmem", Plain = "ivshmem-plain", Doorbell = "ivshmem-doorbell", }
}

element! {
    /// `<shmem><model>`
    pub struct ShmemModel {
        /// The device.
        need "type" => kind: ShmemKind,
    }
}

element! {
    /// `<shmem><size>`: in bytes, unless it says another unit.
    pub struct ShmemSize {
        /// The unit.
        attr "unit" => unit: Option<String>,
        /// The number.
        need_text => number: String,
    }
}

impl ShmemSize {
    /// In bytes; the error is a sentence.
    pub fn bytes(&self) -> Result<u64, String> {
        let bytes = scaled(&self.number, self.unit.as_deref().unwrap_or("bytes"))?;
        u64::try_from(bytes).map_err(|_| format!("{} is more than can be counted", self.number))
    }
}

element! {
    /// `<shmem><server>`
    pub struct ShmemServer {
        /// Its socket.
        attr "path" => path: Option<String>,
    }
}

element! {
    /// `<shmem><msi>`: interrupts.
    pub struct ShmemMsi {
        /// How many.
        attr "vectors" => vectors: Option<u32>,
        /// Passed on by the host's kernel.
        on_off "ioeventfd" => ioeventfd: Option<bool>,
        /// Whether they are used.
        yes_no "enabled" => enabled: Option<bool>,
    }
}

choices! {
    /// The device.
    pub enum CryptoModel { Virtio = "virtio", }
}

choices! {
    /// Who provides it.
    pub enum CryptoKind { Qemu = "qemu", }
}

choices! {
    /// Who computes.
    pub enum CryptoBackendModel { Builtin = "builtin", Lkcf = "lkcf", }
}

element! {
    /// `<crypto>`: a cryptographic accelerator.
    pub struct Crypto {
        /// The device.
        need "model" => model: CryptoModel,
        /// Who provides it.
        need "type" => kind: CryptoKind,
        /// `<backend>`
        must "backend" => backend: CryptoBackend,
        /// `<driver>`
        child "driver" => driver: Option<PlainDriver>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

element! {
    /// `<crypto><backend>`
    pub struct CryptoBackend {
        /// Who computes.
        need "model" => model: CryptoBackendModel,
        /// Number of queues.
        attr "queues" => queues: Option<u32>,
    }
}

choices! {
    /// The device.
    pub enum IommuModel { Intel = "intel", Smmuv3 = "smmuv3", Virtio = "virtio", Amd = "amd", }
}

element! {
    /// `<iommu>`
    pub struct Iommu {
        /// The device.
        need "model" => model: IommuModel,
        /// `<driver>`
        child "driver" => driver: Option<IommuDriver>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

element! {
    /// `<iommu><driver>`
    pub struct IommuDriver {
        /// Interrupt remapping.
        on_off "intremap" => intremap: Option<bool>,
        /// The guest tells of every change; needed to pass through host devices.
        on_off "caching_mode" => caching_mode: Option<bool>,
        /// Extended interrupt mode, for more than 255 CPUs.
        on_off "eim" => eim: Option<bool>,
        /// Devices keep translations.
        on_off "iotlb" => iotlb: Option<bool>,
        /// Width of addresses in bits.
        attr "aw_bits" => aw_bits: Option<u32>,
        /// DMA is translated, not only interrupts.
        on_off "dma_translation" => dma_translation: Option<bool>,
        /// Extended APIC ids (AMD).
        on_off "xtsup" => xtsup: Option<bool>,
        /// Untranslated passage (AMD).
        on_off "passthrough" => passthrough: Option<bool>,
    }
}
