//! What firmware tables say (`-smbios`), blobs for the firmware (`-fw_cfg`), the generation id.

use super::Builder;
use super::args::{List, Props};
use crate::qemu::plan::SecretContent;
use virt_model::domain::sysinfo::{Entries, SmbiosMode, Sysinfo, SysinfoKind};

/// The fields of SMBIOS tables, which libvirt and QEMU call the same, by the table's number.
const FIELDS: [&[&str]; 4] = [
    &["vendor", "version", "date", "release"],
    &["manufacturer", "product", "version", "serial", "uuid", "sku", "family"],
    &["manufacturer", "product", "version", "serial", "asset", "location"],
    &["manufacturer", "version", "serial", "asset", "sku"],
];

impl Builder<'_> {
    pub(super) fn firmware_tables(&mut self) {
        let def = self.def;
        let shown = def.os.smbios.as_ref().is_some_and(|smbios| smbios.mode == SmbiosMode::Sysinfo);
        for sysinfo in &def.sysinfos {
            match sysinfo.kind.unwrap_or_default() {
                SysinfoKind::Smbios if shown => self.smbios(sysinfo),
                SysinfoKind::Smbios => {}
                SysinfoKind::FwCfg => self.blobs(sysinfo),
            }
        }
        if let Some(id) = def.genid.as_ref().and_then(|genid| genid.id) {
            self.args.device(Props::device("vmgenid").set("guid", id.to_string()).set("id", "vmgenid0"));
        }
    }

    fn smbios(&mut self, sysinfo: &Sysinfo) {
        for (number, entries) in tables(sysinfo) {
            let mut table = List::default().set("type", number);
            for entry in &entries.entries {
                if let (Some(name), Some(value)) = (&entry.name, &entry.value) {
                    table = table.set(name, value);
                }
            }
            self.args.pair("-smbios", table);
        }
        let strings = sysinfo.oem_strings.iter().flat_map(|strings| &strings.entries);
        let table = strings.fold(List::default().set("type", 11), |table, entry| {
            let said = entry.value.as_ref().filter(|value| !value.is_empty());
            let said = said.map(|value| self.handed(SecretContent::Said(value.clone())));
            table.maybe("path", said).maybe("path", entry.file.as_deref())
        });
        if sysinfo.oem_strings.is_some() {
            self.args.pair("-smbios", table);
        }
        let files = sysinfo.oem_strings.iter().flat_map(|strings| &strings.entries).filter_map(|e| e.file.as_deref());
        files.for_each(|file| self.read_whole(file));
    }

    fn blobs(&mut self, sysinfo: &Sysinfo) {
        for entry in &sysinfo.entries {
            let blob = List::default().set("name", entry.name.as_deref().unwrap_or_default());
            match &entry.file {
                Some(file) => {
                    self.args.pair("-fw_cfg", blob.set("file", file));
                    self.read_whole(file);
                }
                None => {
                    let file = self.handed(SecretContent::Said(entry.value.clone().unwrap_or_default()));
                    self.args.pair("-fw_cfg", blob.set("file", file));
                }
            }
        }
    }
}

/// The tables given, by number, in ascending order.
pub fn tables(sysinfo: &Sysinfo) -> Vec<(u8, &Entries)> {
    let mut all: Vec<(u8, &Entries)> = Vec::new();
    all.extend(sysinfo.bios.iter().map(|table| (0, table)));
    all.extend(sysinfo.system.iter().map(|table| (1, table)));
    all.extend(sysinfo.base_boards.iter().map(|table| (2, table)));
    all.extend(sysinfo.chassis.iter().map(|table| (3, table)));
    all
}

/// Whether a table has a field of that name.
pub fn has_field(table: u8, name: &str) -> bool {
    FIELDS.get(usize::from(table)).is_some_and(|fields| fields.contains(&name))
}
