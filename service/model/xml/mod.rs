//! XML without loss: a small tree that keeps everything, its reader, its writer, and findings with a place.
//!
//! [`read`] refuses what is not well-formed, also where the library below it would not; [`Element`] is what it gives;
//! [`Element::write`] lays it out as libvirt does.

mod chars;
mod namespaces;
mod place;
mod read;
mod tree;
mod write;

pub use place::{Path, Place};
pub use read::{Limits, read, read_spans, read_within};
pub use tree::{Attribute, Element, Node};
pub use write::{escape_attribute, escape_text};

use std::borrow::Cow;
use std::collections::HashSet;

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
        Finding { kind, line: place.line, column: place.column, path: place.path.to_string(), message: message.into() }
    }

    /// A finding for which the document has no line: about all of it, or about what it leaves out.
    pub fn anywhere(kind: FindingKind, path: &str, message: impl Into<String>) -> Finding {
        Finding { kind, line: 0, column: 0, path: path.to_owned(), message: message.into() }
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

/// The most that is said to be wrong with one document.
pub(crate) const MAX_FINDINGS: usize = 1000;

/// Adds what was found later to what was found first, in document order; what was complained about needs no second
/// complaint.
pub fn add_findings(log: &mut Vec<Finding>, mut later: Vec<Finding>) {
    let first: HashSet<String> = log.iter().map(|finding| finding.path.clone()).collect();
    later.retain(|finding| !first.contains(&finding.path));
    log.append(&mut later);
    log.sort_by_key(|finding| (finding.line, finding.column));
    log.truncate(MAX_FINDINGS);
}

/// Refuses what a check found, warnings apart: the error is what is left without them.
pub fn refusals(mut findings: Vec<Finding>) -> Result<(), Vec<Finding>> {
    findings.retain(|finding| finding.kind != FindingKind::Warning);
    if findings.is_empty() { Ok(()) } else { Err(findings) }
}

impl std::fmt::Display for Finding {
    /// `line L, column C: path: what is wrong`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {}, column {}: {}: {}", self.line, self.column, self.path, self.message)
    }
}

/// Why a text that is about to be kept could not be read again, and what to do about it.
pub fn unreadable(findings: &[Finding]) -> String {
    let first = findings.first().map_or("it is not a document", |finding| &finding.message);
    format!(
        "as it would be kept it could not be read again ({first}); shorten its texts and metadata, and delete snapshots, \
         of which each external one makes the chain of a disk longer"
    )
}

/// Whether a text can stand in XML at all: most control characters cannot.
pub fn is_text(text: &str) -> bool {
    text.chars().all(chars::is_legal)
}

/// Whether it is a name without a colon, as a prefix must be.
pub(crate) fn is_prefix(text: &str) -> bool {
    chars::is_plain_name(text) && !text.to_ascii_lowercase().starts_with("xml")
}

/// A text that somebody gave, fit for a message: not too long, on one line, and what it looks like.
pub fn shorten(text: &str) -> String {
    const LONGEST: usize = 80;
    let shown: String = text.chars().take(LONGEST).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    let shown = plainly(&shown).into_owned();
    if text.chars().nth(LONGEST).is_some() { shown + "…" } else { shown }
}

/// Whether a character is not seen, or makes others look like what they are not: controls, what changes the direction of
/// writing, what has no width, what ends a line.
pub fn is_deceptive(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff9}'..='\u{fffb}'
            | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

/// A text in which what is deceptive is written out, e.g. `\u{202e}`: for prompts, messages and logs.
pub fn plainly(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_deceptive) {
        return Cow::Borrowed(text);
    }
    text.chars()
        .fold(String::with_capacity(text.len() + 16), |mut plain, c| {
            if is_deceptive(c) {
                plain.extend(c.escape_unicode())
            } else {
                plain.push(c)
            }
            plain
        })
        .into()
}

/// Refuses what nobody can tell apart from another name by looking at it. The error completes "the name 'x' …".
pub fn check_new_name(name: &str) -> Result<(), String> {
    if let Some(c) = name.chars().find(|c| is_deceptive(*c)) {
        return Err(format!("has the character U+{:04X}, which is not seen or changes how others look", u32::from(c)));
    }
    if name.trim() != name {
        return Err("begins or ends with a blank".to_owned());
    }
    Ok(())
}
