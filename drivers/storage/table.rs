//! What becomes of each element and attribute of the documents of pools and volumes. `docs/STORAGE-XML.md` is written from it.

use virt_model::domain::part::Part;
use virt_model::storage::pool::PoolDef;
use virt_model::storage::volume::VolumeDef;
use virt_model::xml::{Element, Finding};

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It does what it says.
    Acts,
    /// It is shown of what is there, and forgotten when it is read.
    Told,
    /// It is kept and shown, and asks for nothing; so is all below it. With the reason.
    Kept(&'static str),
    /// Who asks for it is refused. With the reason.
    Refused(&'static str),
}

use Standing::{Acts, Kept, Refused, Told};

const OTHER_TYPES: &str = "of other types of pool";
const OF_THE_TOOL: &str = "as qemu-img chooses it";

/// Of pools; the place of an attribute is `element/@attribute`. What is not here stands as what it is in.
const POOL: &[(&str, Standing)] = &[
    ("", Acts),
    ("capacity", Told),
    ("allocation", Told),
    ("available", Told),
    ("source/device/@part_separator", Kept("partitions are called as the kernel calls them")),
    ("source/device/freeExtent", Kept("what is free the partition table says")),
    ("source/adapter", Kept(OTHER_TYPES)),
    ("source/initiator", Kept(OTHER_TYPES)),
    ("source/auth/secret/@type", Kept(OTHER_TYPES)),
    ("source/auth/secret/@usage", Kept("a secret is named by its uuid")),
    ("source/vendor", Kept("it says who made what the pool is on, for people")),
    ("source/product", Kept("it says what the pool is on, for people")),
    ("target/permissions/label", Kept("files are told apart by their owners, and get no labels")),
    ("target/encryption", Refused("say it of each volume")),
    ("refresh", Refused("what volumes take is always asked of their file system")),
    ("fs:mount_opts", Refused("a file system is mounted with nosuid, nodev and noexec, and with no other options")),
    ("rbd:config_opts", Kept(OTHER_TYPES)),
];

/// Of volumes.
const VOLUME: &[(&str, Standing)] = &[
    ("", Acts),
    ("key", Told),
    ("source", Refused("of what a volume is made its pool says")),
    ("allocation", Told),
    ("physical", Told),
    ("target/permissions/label", Told),
    ("target/timestamps", Told),
    ("target/encryption/@engine", Kept("it is QEMU that encrypts")),
    ("target/encryption/cipher", Refused(OF_THE_TOOL)),
    ("target/encryption/ivgen", Refused(OF_THE_TOOL)),
    ("backingStore/permissions", Told),
    ("backingStore/timestamps", Told),
];

/// What becomes of a place in documents of that kind.
pub fn standing(kind: &str, place: &str) -> Standing {
    let table = if kind == "pool" { POOL } else { VOLUME };
    let mut place = place;
    loop {
        if let Some((_, standing)) = table.iter().find(|(known, _)| *known == place) {
            return *standing;
        }
        place = place.rsplit_once('/').map_or("", |(above, _)| above);
    }
}

/// What of a pool is refused when it is started, here.
pub fn refused_of_pool(def: &PoolDef) -> Vec<Finding> {
    refused("pool", &Part::write(def, "pool"))
}

/// What of a volume is refused when it is made, here.
pub fn refused_of_volume(def: &VolumeDef) -> Vec<Finding> {
    refused("volume", &Part::write(def, "volume"))
}

fn refused(kind: &str, root: &Element) -> Vec<Finding> {
    let mut found = Vec::new();
    walk(kind, root, "", &mut found);
    found
}

fn walk(kind: &str, element: &Element, path: &str, found: &mut Vec<Finding>) {
    for child in element.elements() {
        let place = if path.is_empty() { child.name.clone() } else { format!("{path}/{}", child.name) };
        match standing(kind, &place) {
            Refused(why) => {
                let at = if child.at.is_known() { &child.at } else { &child.origin };
                found.push(Finding::unsupported(at, format!("<{}> is not supported here: {why}", child.name)));
            }
            Acts => walk(kind, child, &place, found),
            Told | Kept(_) => {}
        }
    }
}
