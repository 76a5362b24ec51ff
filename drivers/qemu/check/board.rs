//! What sits on the board beside the usual, and what the firmware's tables say.

use super::Check;
use crate::qemu::command::{has_field, iommu_device, shmem_kind, tables};
use crate::qemu::complete::Board;
use virt_model::device::Iommu;
use virt_model::device::board::{CryptoBackendModel, IommuModel, PanicModel, Shmem, ShmemKind};
use virt_model::domain::features::IoapicDriver;
use virt_model::domain::os::{AcpiTableKind, LoaderKind};
use virt_model::domain::sysinfo::{Entry, SmbiosMode, Sysinfo, SysinfoKind};

impl Check<'_> {
    pub(super) fn board(&mut self) {
        let devices = &self.def.devices;
        for hub in &devices.hubs {
            self.refuse_if(hub.kind != "usb", &hub.at.attribute("type"), "there are USB hubs only");
        }
        self.panics();
        devices.shmems.iter().for_each(|shmem| self.shared_memory(shmem));
        for crypto in &devices.cryptos {
            let kernel = crypto.backend.model == CryptoBackendModel::Lkcf;
            let place = crypto.backend.at.attribute("model");
            self.refuse_if(kernel && !self.caps.at_least(8, 0), &place, "the host kernel as back end needs QEMU 8.0");
            self.need_device(&crypto.at, "virtio-crypto-pci");
            self.seated(&crypto.info, &crypto.at);
        }
        for (n, iommu) in devices.iommus.iter().enumerate() {
            self.refuse_if(n > 0, &iommu.at, "a machine has one IOMMU");
            self.iommu(iommu);
        }
        self.firmware_tables();
        self.tables_of_files();
        self.firmware_by_serial();
    }

    fn tables_of_files(&mut self) {
        let def = self.def;
        let acpi = def.features.as_ref().is_some_and(|features| features.acpi);
        for table in def.os.acpi.iter().flat_map(|acpi| &acpi.tables) {
            self.refuse_if(!acpi, &table.at, "tables need <acpi/> in <features>");
            let xen = table.kind == AcpiTableKind::Rawset;
            self.refuse_if(xen, &table.at.attribute("type"), "several tables in one file are for Xen");
            self.refuse_if(!table.path.starts_with('/'), &table.at, "the path must be absolute");
        }
    }

    /// What a BIOS says to people; other firmware finds its serial port by itself.
    fn firmware_by_serial(&mut self) {
        let def = self.def;
        let Some(bios) = def.os.bios.as_ref().filter(|bios| bios.useserial == Some(true)) else { return };
        let place = bios.at.attribute("useserial");
        self.refuse_if(def.devices.serials.is_empty(), &place, "useserial='yes' needs a <serial>");
        let flash = def.os.loader.as_ref().is_some_and(|loader| loader.kind == Some(LoaderKind::Pflash));
        self.refuse_if(flash, &place, "UEFI firmware speaks on the serial port anyway");
    }

    fn panics(&mut self) {
        for panic in &self.def.devices.panics {
            let place = &panic.at;
            match panic.model.unwrap_or_default() {
                PanicModel::Isa => self.need_device(place, "pvpanic"),
                PanicModel::Pvpanic => {
                    self.need_device(place, "pvpanic-pci");
                    self.seated(&panic.info, place);
                }
                PanicModel::Hyperv => {
                    let hyperv = "model='hyperv' has no effect without KVM (type='qemu')";
                    self.warn_if(!self.kvm, &place.attribute("model"), hyperv);
                }
                model => self.refuse(&place.attribute("model"), format!("PC machines have no panic device '{model}'")),
            }
        }
    }

    fn shared_memory(&mut self, shmem: &Shmem) {
        let kind = shmem_kind(shmem);
        let place = &shmem.at;
        self.need_device(place, kind.as_str());
        let plain_name = !shmem.name.is_empty() && !shmem.name.contains('/') && !shmem.name.starts_with('.');
        self.refuse_if(
            !plain_name,
            &place.attribute("name"),
            "this is not a name of shared memory: it may hold no '/'",
        );
        if let Some(size) = &shmem.size {
            match size.bytes() {
                Ok(bytes) if bytes.is_power_of_two() && bytes >= 1 << 20 => {}
                Ok(_) => self.refuse(&size.at, "the size of shared memory is a power of two, at least 1 MiB"),
                Err(why) => self.refuse(&size.at, why),
            }
        }
        let served = shmem.server.is_some();
        self.refuse_if(kind == ShmemKind::Doorbell && !served, place, "ivshmem-doorbell needs a <server>");
        self.refuse_if(
            kind == ShmemKind::Plain && served,
            place,
            "ivshmem-plain has no <server>; ivshmem-doorbell has",
        );
        let msi = shmem.msi.as_ref().filter(|_| kind == ShmemKind::Plain);
        self.refuse_if(msi.is_some(), place, "ivshmem-plain has no interrupts (<msi>)");
        self.seated(&shmem.info, place);
    }

    fn iommu(&mut self, iommu: &Iommu) {
        let place = &iommu.at;
        let known = match iommu.model {
            IommuModel::Intel => self.board == Board::Q35,
            IommuModel::Virtio => self.board == Board::Q35 && self.def.features.as_ref().is_some_and(|f| f.acpi),
            IommuModel::Amd | IommuModel::Smmuv3 => false,
        };
        let model = iommu.model;
        if !known {
            let how = "the QEMU driver has model='intel' and model='virtio', on q35 (the latter with <acpi/>)";
            self.refuse(&place.attribute("model"), format!("no IOMMU of model '{model}' here: {how}"));
            return;
        }
        self.need_device(place, iommu_device(model));
        let Some(driver) = &iommu.driver else { return };
        let bare = model == IommuModel::Virtio;
        self.refuse_if(bare, &driver.at, "model='virtio' has no settings");
        let split = self.def.features.as_ref().and_then(|f| f.ioapic.as_ref()?.driver) == Some(IoapicDriver::Qemu);
        let remaps = driver.intremap == Some(true) && self.kvm && !split;
        let place = driver.at.attribute("intremap");
        self.refuse_if(remaps, &place, "intremap='on' needs <ioapic driver='qemu'/> in <features>");
        let eim = driver.eim == Some(true) && driver.intremap != Some(true);
        self.refuse_if(eim, &driver.at.attribute("eim"), "eim='on' needs intremap='on'");
        let emulated = driver.eim == Some(true) && !self.kvm;
        self.refuse_if(emulated, &driver.at.attribute("eim"), "eim='on' needs KVM (type='kvm')");
        let width = driver.aw_bits.is_some_and(|bits| !matches!(bits, 39 | 48));
        self.refuse_if(width, &driver.at.attribute("aw_bits"), "addresses have 39 or 48 bits");
    }

    fn firmware_tables(&mut self) {
        let def = self.def;
        let mode = def.os.smbios.as_ref().map(|smbios| smbios.mode);
        if let Some(smbios) = def.os.smbios.as_ref().filter(|_| mode == Some(SmbiosMode::Host)) {
            let how = "the host's own tables are not copied: give their values in <sysinfo>";
            self.refuse(&smbios.at.attribute("mode"), how);
        }
        let is_smbios = |sysinfo: &&Sysinfo| sysinfo.kind.unwrap_or_default() == SysinfoKind::Smbios;
        if mode == Some(SmbiosMode::Sysinfo) && !def.sysinfos.iter().any(|s| is_smbios(&s)) {
            self.refuse(&def.os.at.child("smbios"), "mode='sysinfo' needs a <sysinfo type='smbios'>");
        }
        for sysinfo in &def.sysinfos {
            if is_smbios(&sysinfo) {
                let unused = "it has no effect without <smbios mode='sysinfo'/> in <os>";
                self.warn_if(mode != Some(SmbiosMode::Sysinfo), &sysinfo.at, unused);
                self.tables(sysinfo);
            } else {
                sysinfo.entries.iter().for_each(|entry| self.blob(entry));
            }
        }
    }

    fn tables(&mut self, sysinfo: &Sysinfo) {
        for (number, table) in tables(sysinfo) {
            for entry in &table.entries {
                let name = entry.name.as_deref().unwrap_or_default();
                let known = has_field(number, name);
                self.refuse_if(!known, &entry.at.attribute("name"), "QEMU has no such field in this table");
                let other = (number, name) == (1, "uuid")
                    && entry.value.as_deref().and_then(|v| uuid::Uuid::try_parse(v.trim()).ok()) != Some(self.def.uuid);
                self.refuse_if(other, &entry.at, "the system's uuid is the domain's");
            }
        }
        if let Some(first) = sysinfo.entries.first() {
            self.refuse(&first.at, "an <entry> of its own belongs into <sysinfo type='fwcfg'>");
        }
    }

    fn blob(&mut self, entry: &Entry) {
        let name = entry.name.as_deref().unwrap_or_default();
        let free = name.starts_with("opt/") && !name.starts_with("opt/ovmf/") && !name.starts_with("opt/org.qemu/");
        let place = entry.at.attribute("name");
        self.refuse_if(!free || name.len() > 55, &place, "names of blobs begin with 'opt/' and have at most 55 bytes");
        let both = entry.file.is_some() && entry.value.is_some();
        let none = entry.file.is_none() && entry.value.is_none();
        self.refuse_if(both || none, &entry.at, "a blob has either a text or a file");
    }
}
