//! `<os>`: the board, its firmware, and what it boots.

use super::part::element;
use super::sysinfo::Smbios;
use super::value::choices;
use crate::device::source::DiskSource;

choices! {
    /// A class of devices to boot from.
    pub enum BootDevice { Hd = "hd", Fd = "fd", Cdrom = "cdrom", Network = "network", }
}

choices! {
    /// How firmware is picked by itself.
    pub enum FirmwareKind { Efi = "efi", Bios = "bios", }
}

choices! {
    /// How the loader is presented.
    pub enum LoaderKind { Rom = "rom", Pflash = "pflash", }
}

element! {
    /// `<os>`
    pub struct Os {
        /// Firmware to be picked from the host's descriptors.
        attr "firmware" => firmware: Option<FirmwareKind>,
        /// `<type>`
        inner "type" => kind: OsType,
        /// `<firmware>`: what the picked firmware must be able to do.
        child "firmware" => features: Option<FirmwareFeatures>,
        /// `<loader>`
        child "loader" => loader: Option<Loader>,
        /// `<nvram>`
        child "nvram" => nvram: Option<Nvram>,
        /// Direct kernel boot: the kernel's path.
        leaf "kernel" => kernel: Option<String>,
        /// Direct kernel boot: the initial ramdisk's path.
        leaf "initrd" => initrd: Option<String>,
        /// Direct kernel boot: the kernel's command line.
        leaf "cmdline" => cmdline: Option<String>,
        /// `<acpi>`
        child "acpi" => acpi: Option<AcpiTables>,
        /// Classes of devices in the order to try. Empty where devices have their own order.
        children "boot" => boot: Vec<Boot>,
        /// `<bootmenu>`
        child "bootmenu" => bootmenu: Option<BootMenu>,
        /// `<bios>`
        child "bios" => bios: Option<Bios>,
        /// `<smbios>`
        child "smbios" => smbios: Option<Smbios>,
    }
}

element! {
    /// `<os><type>`
    pub struct OsType {
        /// CPU architecture; the host's if absent.
        attr "arch" => arch: Option<String>,
        /// Board; the hypervisor's usual one if absent.
        attr "machine" => machine: Option<String>,
        /// `hvm` and the like.
        need_text => name: String,
    }
}

element! {
    /// `<os><firmware>`
    pub struct FirmwareFeatures {
        /// Each `<feature>`.
        children "feature" => features: Vec<FirmwareFeature>,
    }
}

element! {
    /// `<os><firmware><feature>`
    pub struct FirmwareFeature {
        /// Wanted or unwanted.
        yes_no "enabled" => enabled: Option<bool>,
        /// `secure-boot` or `enrolled-keys`.
        need "name" => name: String,
    }
}

element! {
    /// `<os><loader>`: the firmware's code.
    pub struct Loader {
        /// Not written by the guest.
        yes_no "readonly" => readonly: Option<bool>,
        /// Only system management mode writes variables.
        yes_no "secure" => secure: Option<bool>,
        /// As ROM or as flash.
        attr "type" => kind: Option<LoaderKind>,
        /// The code never changes: no variable store goes with it.
        yes_no "stateless" => stateless: Option<bool>,
        /// Format of the image.
        attr "format" => format: Option<String>,
        /// Path of the image.
        text => path: Option<String>,
    }
}

element! {
    /// `<os><nvram>`: the firmware's variables.
    pub struct Nvram {
        /// Copied to `path` when that does not exist.
        attr "template" => template: Option<String>,
        /// Format of the template.
        attr "templateFormat" => template_format: Option<String>,
        /// Format of the store.
        attr "format" => format: Option<String>,
        /// Where `source` is; absent where the path is the text.
        attr "type" => kind: Option<String>,
        /// The store, said as a disk's image is.
        child "source" => source: Option<DiskSource>,
        /// Path of the store.
        text => path: Option<String>,
    }
}

choices! {
    /// What a table is to be.
    pub enum AcpiTableKind { Slic = "slic", Raw = "raw", Rawset = "rawset", Msdm = "msdm", }
}

element! {
    /// `<os><acpi>`: tables that the guest finds beside its board's own.
    pub struct AcpiTables {
        /// Each `<table>`.
        children "table" => tables: Vec<AcpiTable>,
    }
}

element! {
    /// `<os><acpi><table>`
    pub struct AcpiTable {
        /// What it is.
        need "type" => kind: AcpiTableKind,
        /// The file with it.
        need_text => path: String,
    }
}

element! {
    /// `<os><boot>`
    pub struct Boot {
        /// The class.
        need "dev" => dev: BootDevice,
    }
}

element! {
    /// `<os><bootmenu>`
    pub struct BootMenu {
        /// Shown or not.
        yes_no "enable" => enable: Option<bool>,
        /// For how long, in milliseconds.
        attr "timeout" => timeout_ms: Option<u32>,
    }
}

element! {
    /// `<os><bios>`
    pub struct Bios {
        /// Firmware messages on the serial line.
        yes_no "useserial" => useserial: Option<bool>,
        /// Wait this long before trying again when nothing boots; -1: never.
        attr "rebootTimeout" => reboot_timeout_ms: Option<i32>,
    }
}

impl Nvram {
    /// Says a file's path as the text, however it was said; anything else stays as it is.
    pub fn say_path_as_text(&mut self) {
        let Some(file) = self.source.as_ref().and_then(|source| source.file.clone()) else { return };
        let plain = DiskSource { file: Some(file.clone()), ..DiskSource::default() };
        if self.path.is_none() && self.kind.as_deref() == Some("file") && self.source.as_ref() == Some(&plain) {
            (self.path, self.kind, self.source) = (Some(file), None, None);
        }
    }
}
