//! Storage pools and their volumes: libvirt's documents of both, read without loss or refused by name.
//!
//! ```text
//!  text ──xml::read──▶ tree ──format.txt──▶ tree ──Part::read──▶ PoolDef, VolumeDef ──check──▶ findings, or the definition
//! ```

mod capabilities;
mod check;
pub mod pool;
pub mod volume;

pub use capabilities::{capabilities, sources};
pub use check::{UNFINISHED, check_volume_name, is_left_by_nfs, source_formats};

use crate::domain::format::Format;
use crate::domain::native::{Namespaces, canonical_prefixes, declare_prefixes};
use crate::domain::part::{Part, element};
use crate::domain::size::scaled;
use crate::domain::value::Value;
use crate::xml::{self, Element, Finding, Limits, Node};
use std::sync::LazyLock;

static FORMAT: LazyLock<Format> = LazyLock::new(|| Format::read(include_str!("format.txt")));

/// The namespaces whose elements are part of the format of pools.
const NAMESPACES: Namespaces = &[
    ("fs", "http://libvirt.org/schemas/storagepool/fs/1.0"),
    ("rbd", "http://libvirt.org/schemas/storagepool/rbd/1.0"),
];

/// The kinds of document there are.
pub const DOCUMENTS: [&str; 2] = ["pool", "volume"];

/// Every element of documents of that kind, which is one of [`DOCUMENTS`], with its attributes; the root's path is empty.
pub fn vocabulary(kind: &str) -> Vec<(String, Vec<String>)> {
    FORMAT.vocabulary(kind)
}

/// Reads a document of that kind as far as the table goes; what is wrong goes to `log`.
fn read_root<T: Part>(text: &str, kind: &str, limits: Limits, log: &mut Vec<Finding>) -> Result<T, Vec<Finding>> {
    let mut root = xml::read_within(text, &[], limits).map_err(|finding| vec![finding])?;
    if root.name != kind {
        let message = format!("the root is <{}>, and a {kind}'s is <{kind}>", xml::shorten(&root.name));
        return Err(vec![Finding::invalid(&root.at, message)]);
    }
    canonical_prefixes(&mut root, NAMESPACES, log);
    FORMAT.check_root(&mut root, kind, log);
    declare_prefixes(&mut root, NAMESPACES);
    FORMAT.arrange_root(&mut root);
    Ok(T::read(root, log))
}

/// Reads a part of a document that stands alone, as if it stood in its root.
fn read_part<T: Part>(text: &str, name: &str, kind: &str, log: &mut Vec<Finding>) -> Result<T, Vec<Finding>> {
    let part = xml::read_within(text, &[], Limits::ACCEPTED).map_err(|finding| vec![finding])?;
    if part.name != name {
        let message = format!("the root is <{}>, and <{name}> was expected", xml::shorten(&part.name));
        return Err(vec![Finding::invalid(&part.at, message)]);
    }
    let mut root = Element::new(kind);
    root.push(part);
    FORMAT.check_root(&mut root, kind, log);
    FORMAT.arrange_root(&mut root);
    Ok(T::read(root.take_child(name).unwrap_or_default(), log))
}

/// Writes one, in libvirt's order and layout.
fn write_root(of: &impl Part, kind: &str) -> String {
    let mut root = of.write(kind);
    declare_prefixes(&mut root, NAMESPACES);
    FORMAT.arrange_root(&mut root);
    root.write()
}

/// What was found, in the order of the document; no document if there is anything.
fn unless_found<T>(def: T, mut log: Vec<Finding>) -> Result<T, Vec<Finding>> {
    log.sort_by_key(|finding| (finding.line, finding.column));
    if log.is_empty() { Ok(def) } else { Err(log) }
}

/// An amount of storage: an element with a number and a `unit`, bytes if it says none. Written in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl Part for Bytes {
    fn read(mut at: Element, log: &mut Vec<Finding>) -> Bytes {
        let unit = at.take_attr("unit");
        let read = scaled(&at.text(), unit.as_ref().map_or("bytes", |unit| &unit.value)).and_then(|bytes| {
            u64::try_from(bytes).map_err(|_| format!("{} is more than can be counted", at.text().trim()))
        });
        // The units are those of memory.
        let read = read.map_err(|expected| expected.replace("memory", "storage"));
        Bytes(read.map_err(|expected| log.push(Finding::invalid(&at.at, expected))).unwrap_or_default())
    }

    fn write(&self, name: &str) -> Element {
        let mut element = Element::new(name).with_attr("unit", "bytes");
        element.nodes.push(Node::Text(self.0.to_string()));
        element
    }
}

element! {
    /// `<permissions>`: whose a file or folder is made.
    pub struct Permissions {
        /// Its mode.
        leaf "mode" => mode: Option<FileMode>,
        /// Its owner; -1: whoever makes it.
        leaf "owner" => owner: Option<i64>,
        /// Its group, likewise.
        leaf "group" => group: Option<i64>,
    }
}

/// The mode of a file, in octal digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileMode(pub u32);

impl Value for FileMode {
    fn from_text(text: &str) -> Result<Self, String> {
        let digits = text.trim();
        let plain = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
        let mode = u32::from_str_radix(digits, 8).ok().filter(|mode| plain && *mode <= 0o7777);
        mode.map(FileMode).ok_or_else(|| "a mode in octal digits, such as 0644".to_owned())
    }

    fn to_text(&self) -> String {
        format!("0{:o}", self.0)
    }
}

impl Permissions {
    /// The owner, if it says one.
    pub fn owner(&self) -> Option<u32> {
        self.owner.and_then(|owner| u32::try_from(owner).ok())
    }

    /// The group, if it says one.
    pub fn group(&self) -> Option<u32> {
        self.group.and_then(|group| u32::try_from(group).ok())
    }
}

element! {
    /// `<format>`
    pub struct FormatDoc {
        /// Its name.
        need "type" => kind: String,
    }
}

element! {
    /// `<dir>`
    pub struct PathDoc {
        /// The path.
        need "path" => path: String,
    }
}
