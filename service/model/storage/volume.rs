//! `<volume>`: a volume that is to be made, or is there.

use super::{Bytes, FormatDoc, Permissions, check, read_root, unless_found, write_root};
use crate::device::source::Encryption;
use crate::domain::part::element;
use crate::domain::value::choices;
use crate::xml::{Finding, Limits};

element! {
    /// A volume.
    pub struct VolumeDef {
        /// `<volume type=…>`: what it is.
        attr "type" => kind: Option<VolumeKind>,
        /// `<name>`
        own "name" => name: String,
        /// `<key>`: shown, and forgotten when it is read.
        leaf "key" => key: Option<String>,
        /// `<capacity>`: what a guest sees.
        child "capacity" => capacity: Option<Bytes>,
        /// `<allocation>`: what it takes; shown, and forgotten when it is read.
        child "allocation" => allocation: Option<Bytes>,
        /// `<physical>`: its length; likewise.
        child "physical" => physical: Option<Bytes>,
        /// `<target>`
        child "target" => target: Option<VolumeTarget>,
        /// `<backingStore>`: what it stands on.
        child "backingStore" => backing: Option<VolumeBacking>,
    }
}

choices! {
    /// What a volume is.
    pub enum VolumeKind {
        File = "file",
        Block = "block",
        Dir = "dir",
        Network = "network",
        Netdir = "netdir",
        Ploop = "ploop",
    }
}

element! {
    /// `<target>`: how it is kept.
    pub struct VolumeTarget {
        /// Where; follows from the pool.
        leaf "path" => path: Option<String>,
        /// Its format.
        child "format" => format: Option<FormatDoc>,
        /// Whose it is made.
        child "permissions" => permissions: Option<Permissions>,
        /// How it is encrypted.
        child "encryption" => encryption: Option<Encryption>,
        /// The version of qcow2, `0.10` or `1.1`.
        leaf "compat" => compat: Option<String>,
        /// Its file system is not to lay what is overwritten elsewhere.
        flag "nocow" => nocow: bool,
        /// Of qcow2: the unit in which it grows.
        child "clusterSize" => cluster_size: Option<Bytes>,
        /// Of qcow2: what it can.
        child "features" => features: Option<VolumeFeatures>,
    }
}

element! {
    /// `<features>`
    pub struct VolumeFeatures {
        /// Counts of references may lag behind.
        flag "lazy_refcounts" => lazy_refcounts: bool,
        /// Parts of clusters are kept for themselves.
        flag "extended_l2" => extended_l2: bool,
    }
}

element! {
    /// `<backingStore>`
    pub struct VolumeBacking {
        /// Where it is.
        leaf "path" => path: Option<String>,
        /// Its format.
        child "format" => format: Option<FormatDoc>,
    }
}

impl VolumeDef {
    /// Reads the document of a volume that is to be made; everything wrong is reported at once.
    pub fn parse(text: &str) -> Result<VolumeDef, Vec<Finding>> {
        let mut log = Vec::new();
        let mut def: VolumeDef = read_root(text, "volume", Limits::ACCEPTED, &mut log)?;
        def.forget_facts();
        check::check_volume(&def, &mut log);
        unless_found(def, log)
    }

    /// Takes out what only tells of a volume that is there.
    fn forget_facts(&mut self) {
        (self.key, self.allocation, self.physical) = (None, None, None);
        if let Some(target) = &mut self.target {
            target.rest.elements.retain(|element| element.name != "timestamps");
            if let Some(permissions) = &mut target.permissions {
                permissions.rest.elements.retain(|element| element.name != "label");
            }
        }
        if let Some(backing) = &mut self.backing {
            backing.rest.elements.retain(|element| !matches!(&*element.name, "timestamps" | "permissions"));
        }
    }

    /// Writes it, in libvirt's order and layout.
    pub fn write(&self) -> String {
        write_root(self, "volume")
    }

    /// What a guest sees, in bytes; 0 if it says nothing.
    pub fn capacity(&self) -> u64 {
        self.capacity.map_or(0, |bytes| bytes.0)
    }

    /// Its format; `raw` if it says none.
    pub fn format(&self) -> &str {
        let said = self.target.as_ref().and_then(|target| target.format.as_ref());
        said.map_or("raw", |format| &format.kind)
    }

    /// What it stands on, if it says so: the path, and its format.
    pub fn backing(&self) -> Option<(&str, Option<&str>)> {
        let backing = self.backing.as_ref()?;
        let path = backing.path.as_deref().filter(|path| !path.is_empty())?;
        Some((path, backing.format.as_ref().map(|format| &*format.kind)))
    }
}
