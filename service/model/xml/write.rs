//! The writer: libvirt's layout, two spaces a level, single quotes, one final newline.

use super::chars::is_legal;
use super::{Element, Node};
use std::fmt::Write;

impl Element {
    /// The element as a document of its own.
    pub fn write(&self) -> String {
        let mut out = String::new();
        put_element(&mut out, self, 0);
        out
    }
}

fn put_element(out: &mut String, element: &Element, depth: usize) {
    indent(out, depth);
    out.push('<');
    out.push_str(&element.name);
    for attribute in &element.attributes {
        // Writing to a String cannot fail.
        let _ = write!(out, " {}='{}'", attribute.name, escape_attribute(&attribute.value));
    }
    match layout(element) {
        Layout::Empty => out.push_str("/>\n"),
        Layout::Inline => {
            out.push('>');
            element.nodes.iter().for_each(|node| put_inline(out, node));
            close(out, element);
        }
        Layout::Block => {
            out.push_str(">\n");
            element.nodes.iter().for_each(|node| put_line(out, node, depth + 1));
            indent(out, depth);
            close(out, element);
        }
    }
}

enum Layout {
    Empty,
    Inline,
    Block,
}

/// Text is white-space sensitive and stands in one piece; elements and comments alone each get a line.
fn layout(element: &Element) -> Layout {
    let blank = |node: &Node| node.as_text().is_some_and(|text| text.trim().is_empty());
    let structured = element.nodes.iter().any(|n| matches!(n, Node::Element(_) | Node::Comment(_)));
    let verbatim = element.nodes.iter().any(|n| matches!(n, Node::Verbatim(_)));
    if element.nodes.is_empty() {
        Layout::Empty
    } else if structured && !verbatim && element.nodes.iter().all(|n| n.as_text().is_none() || blank(n)) {
        Layout::Block
    } else {
        Layout::Inline
    }
}

fn close(out: &mut String, element: &Element) {
    let _ = writeln!(out, "</{}>", element.name);
}

fn put_line(out: &mut String, node: &Node, depth: usize) {
    match node {
        Node::Element(element) => put_element(out, element, depth),
        Node::Comment(text) => {
            indent(out, depth);
            let _ = writeln!(out, "<!--{text}-->");
        }
        Node::Text(_) | Node::Verbatim(_) => {}
    }
}

fn put_inline(out: &mut String, node: &Node) {
    match node {
        Node::Element(element) => {
            put_element(out, element, 0);
            out.pop();
        }
        Node::Comment(text) => {
            let _ = write!(out, "<!--{text}-->");
        }
        Node::Text(text) => out.push_str(&escape_text(text)),
        Node::Verbatim(text) => out.push_str(text),
    }
}

fn indent(out: &mut String, depth: usize) {
    (0..depth).for_each(|_| out.push_str("  "));
}

/// For between two tags. A carriage return would be read back as a line feed, so it is spelled out.
pub fn escape_text(text: &str) -> String {
    escape(text, |c| matches!(c, '&' | '<' | '>' | '\r' | '\'' | '"'))
}

/// For between single quotes. White space other than a blank would be read back as a blank, so it is spelled out.
pub fn escape_attribute(text: &str) -> String {
    escape(text, |c| matches!(c, '&' | '<' | '>' | '\r' | '\n' | '\t' | '\'' | '"'))
}

fn escape(text: &str, special: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            // The reader would refuse it, and the whole document with it.
            c if !is_legal(c) => out.push('\u{fffd}'),
            c if !special(c) => out.push(c),
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            c => {
                let _ = write!(out, "&#{};", u32::from(c));
            }
        }
    }
    out
}
