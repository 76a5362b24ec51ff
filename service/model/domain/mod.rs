//! `DomainDef`: what a domain's XML says.

use crate::xml::Finding;
use uuid::Uuid;

/// A domain's configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct DomainDef {
    /// `<domain type=…>`, e.g. `qemu`.
    pub kind: String,
    /// `<domain id=…>`: only in a live definition.
    pub id: Option<u32>,
    /// `<name>`
    pub name: String,
    /// `<uuid>`, made up when the document has none.
    pub uuid: Uuid,
    /// `<title>`
    pub title: Option<String>,
    /// `<description>`
    pub description: Option<String>,
    /// `<on_poweroff>`
    pub on_poweroff: LifecycleAction,
    /// `<on_reboot>`
    pub on_reboot: LifecycleAction,
    /// `<on_crash>`
    pub on_crash: LifecycleAction,
}

/// What happens to the domain when its guest powers off, reboots or crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LifecycleAction {
    /// The guest is ended.
    Destroy,
    /// The guest is started again.
    Restart,
    /// The guest is ended, the name is changed. (Kept, refused at start: no hypervisor of ours does it.)
    RenameRestart,
    /// The guest is left standing for inspection.
    Preserve,
    /// Dump memory, then destroy (crash only).
    CoredumpDestroy,
    /// Dump memory, then restart (crash only).
    CoredumpRestart,
}

/// Which form of a definition is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Form {
    /// Without runtime facts (id, aliases, terminals, ports).
    pub inactive: bool,
    /// With passwords.
    pub secure: bool,
    /// For another host: without what only this host adds.
    pub migratable: bool,
}

impl DomainDef {
    /// Reads a domain document. Everything wrong is reported at once, never an empty list; nothing read is dropped.
    pub fn parse(_xml: &str) -> Result<DomainDef, Vec<Finding>> {
        Err(Vec::new())
    }

    /// Writes it, in libvirt's order and layout (two spaces, one final newline).
    pub fn write(&self, _form: Form) -> String {
        String::new()
    }

    /// `os/type`: `hvm` and the like.
    pub fn os_type(&self) -> &str {
        "hvm"
    }

    /// vCPUs present at boot.
    pub fn vcpus(&self) -> u32 {
        1
    }

    /// vCPUs that can be plugged in.
    pub fn maximum_vcpus(&self) -> u32 {
        1
    }

    /// `<currentMemory>` in KiB.
    pub fn current_memory_kib(&self) -> u64 {
        0
    }

    /// `<memory>` in KiB.
    pub fn memory_kib(&self) -> u64 {
        0
    }

    /// Whether raw hypervisor arguments are in it (`qemu:commandline` and the like).
    pub fn has_native_arguments(&self) -> bool {
        false
    }

    /// The file of firmware variables.
    pub fn nvram_path(&self) -> Option<&std::path::Path> {
        None
    }

    /// Whether the two would start the same machine: equal in their inactive form.
    pub fn same_configuration(&self, other: &DomainDef) -> bool {
        self == other
    }

    /// The `<metadata>` child whose namespace is `uri`, as XML text.
    pub fn metadata(&self, _uri: &str) -> Option<String> {
        None
    }

    /// Replaces (or with `None` removes) the `<metadata>` child whose namespace is `uri`; `xml` is one element, which is
    /// put into that namespace with `prefix`. Errors: not well-formed, or not one element.
    pub fn set_metadata(&mut self, _uri: &str, _prefix: &str, _xml: Option<&str>) -> Result<(), Finding> {
        Ok(())
    }
}
