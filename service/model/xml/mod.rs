//! XML without loss: a small tree that keeps everything, its reader, its writer, and findings with a place.
//!
//! [`read`] refuses what is not well-formed, also where the library below it would not; [`Element`] is what it gives;
//! [`Element::write`] lays it out as libvirt does.

mod tree;
mod write;

pub use tree::{Attribute, Element, Node};
pub use write::{escape_attribute, escape_text};

/// Where something stands in the document it was read from. Never part of a comparison: two definitions that say the
/// same are equal wherever they say it.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// From 1; 0 for what no document said.
    pub line: u32,
    /// From 1, in characters; 0 as for `line`.
    pub column: u32,
    /// E.g. `/devices/disk[2]/target/@dev`; empty for the root element.
    pub path: String,
}

impl PartialEq for Place {
    fn eq(&self, _: &Place) -> bool {
        true
    }
}

impl Eq for Place {}

impl Place {
    /// Whether a document said it.
    pub fn is_known(&self) -> bool {
        self.line > 0
    }

    /// This element's attribute; its line and column are the element's.
    pub fn attribute(&self, name: &str) -> Place {
        Place { path: format!("{}/@{name}", self.path), ..self.clone() }
    }

    /// A child that is missing, or whose own place is not known.
    pub fn child(&self, name: &str) -> Place {
        Place { path: format!("{}/{name}", self.path), ..self.clone() }
    }
}

/// One thing wrong with a document, or with what it asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether it stops a definition (`Invalid`), a start (`Unsupported`), or nothing (`Warning`).
    pub kind: FindingKind,
    /// From 1; 0 where the document has no such place (something is missing altogether).
    pub line: u32,
    /// From 1, in characters; 0 as for `line`.
    pub column: u32,
    /// The element's path, e.g. `/devices/disk[2]/target/@dev`.
    pub path: String,
    /// What is wrong and what was expected, without the place.
    pub message: String,
}

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FindingKind {
    /// Not a domain document that can be stored.
    Invalid,
    /// Stored and shown, but cannot run here.
    Unsupported,
    /// Runs, perhaps not as expected.
    Warning,
}

impl Finding {
    /// A finding about `place`.
    pub fn new(kind: FindingKind, place: &Place, message: impl Into<String>) -> Finding {
        let path = if place.path.is_empty() { "/".to_owned() } else { place.path.clone() };
        Finding { kind, line: place.line, column: place.column, path, message: message.into() }
    }

    /// The document cannot be stored.
    pub fn invalid(place: &Place, message: impl Into<String>) -> Finding {
        Finding::new(FindingKind::Invalid, place, message)
    }

    /// It can be stored and not be run.
    pub fn unsupported(place: &Place, message: impl Into<String>) -> Finding {
        Finding::new(FindingKind::Unsupported, place, message)
    }

    /// It runs, perhaps not as expected.
    pub fn warning(place: &Place, message: impl Into<String>) -> Finding {
        Finding::new(FindingKind::Warning, place, message)
    }
}

impl std::fmt::Display for Finding {
    /// `line L, column C: path: what is wrong`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {}, column {}: {}: {}", self.line, self.column, self.path, self.message)
    }
}
