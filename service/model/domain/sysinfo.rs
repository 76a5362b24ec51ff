//! `<sysinfo>`: what firmware tables say of the machine, and blobs for the firmware.

use super::part::element;
use super::value::choices;

choices! {
    /// Which interface shows it.
    pub enum SysinfoKind { Smbios = "smbios", FwCfg = "fwcfg", }
}

element! {
    /// `<sysinfo>`
    pub struct Sysinfo {
        /// Which interface shows it; `smbios` if absent.
        attr "type" => kind: Option<SysinfoKind>,
        /// `<bios>`: SMBIOS type 0.
        child "bios" => bios: Option<Entries>,
        /// `<system>`: type 1.
        child "system" => system: Option<Entries>,
        /// `<baseBoard>`: type 2.
        children "baseBoard" => base_boards: Vec<Entries>,
        /// `<chassis>`: type 3.
        child "chassis" => chassis: Option<Entries>,
        /// `<oemStrings>`: type 11.
        child "oemStrings" => oem_strings: Option<Entries>,
        /// Blobs, of `fwcfg`.
        children "entry" => entries: Vec<Entry>,
    }
}

element! {
    /// The fields of one table.
    pub struct Entries {
        /// In the document's order.
        children "entry" => entries: Vec<Entry>,
    }
}

element! {
    /// `<entry>`
    pub struct Entry {
        /// Which field; OEM strings have no names.
        attr "name" => name: Option<String>,
        /// The file that holds the value.
        attr "file" => file: Option<String>,
        /// The value.
        text => value: Option<String>,
    }
}

choices! {
    /// Where the firmware tables come from.
    pub enum SmbiosMode { Emulate = "emulate", Host = "host", Sysinfo = "sysinfo", }
}

element! {
    /// `<os><smbios>`
    pub struct Smbios {
        /// Where the tables come from.
        need "mode" => mode: SmbiosMode,
    }
}

element! {
    /// `<genid>`: changes whenever the guest is brought back to an earlier state, or copied.
    pub struct Genid {
        /// The id; chosen if absent.
        text => id: Option<uuid::Uuid>,
    }
}
