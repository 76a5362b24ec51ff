//! XML without loss: a small tree that keeps everything, its reader, its writer, and findings with a place.

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

impl std::fmt::Display for Finding {
    /// `line L, column C: path: what is wrong`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {}, column {}: {}: {}", self.line, self.column, self.path, self.message)
    }
}
