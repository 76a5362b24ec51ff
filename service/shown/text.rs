//! How much of a text that people gave a machine is published.

/// How much of a title or description is published, in bytes: a few long ones must not make every listing too large.
pub(crate) const PUBLISHED: usize = 4096;

/// As much of a text as is published; `GetXML` has all of it.
pub(crate) fn published(text: &str) -> &str {
    &text[..text.floor_char_boundary(PUBLISHED)]
}
