//! The reader: quick-xml cuts the text into pieces; here they are held to XML 1.0 and put into a tree.
//!
//! quick-xml does not validate: it lets pass what libvirt and other parsers refuse, so every piece is checked again. Time
//! and memory are linear in the text, and the text is bounded. So is the tree, which may take a hundred times the room of
//! what is written: it has so many pieces. What is kept as it was written is no part of it.

use super::chars::{is_legal, is_name, is_plain_name, is_space, normalise_lines, resolve};
use super::namespaces::{Prefixes, Scope};
use super::{Attribute, Element, Finding, Node, Path, Place, shorten};
use quick_xml::Reader;
use quick_xml::events::Event;
use std::collections::HashMap;
use std::ops::Range;

/// How much of a document is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest text, in bytes.
    pub size: usize,
    /// The deepest nesting.
    pub depth: usize,
    /// The most elements.
    pub elements: usize,
    /// The most pieces of the tree: elements, attributes, texts and comments outside what is kept as it was written.
    pub pieces: usize,
}

impl Limits {
    /// For what anybody sends, and so for all that is accepted: it can be sent again as it is shown.
    pub const ACCEPTED: Limits = Limits { size: 8 << 20, depth: 64, elements: 50_000, pieces: 200_000 };
    /// For what was accepted once and stored: there is room for what is added to it while it is used.
    pub const STORED: Limits = Limits { size: 32 << 20, depth: 96, elements: 200_000, pieces: 800_000 };
}
/// The most attributes an element can have.
const MAX_ATTRIBUTES: usize = 256;
/// The longest name, in bytes.
const MAX_NAME: usize = 256;

/// Reads a document. The content of elements named in `verbatim` as (parent, child) is checked and then kept as it was
/// written. The first thing that is not well-formed ends it.
pub fn read(text: &str, verbatim: &[(&str, &str)]) -> Result<Element, Finding> {
    read_within(text, verbatim, Limits::ACCEPTED)
}

/// The same with other limits.
pub fn read_within(text: &str, verbatim: &[(&str, &str)], limits: Limits) -> Result<Element, Finding> {
    run(text, verbatim, None, limits).map(|(root, _)| root)
}

/// The same, with the bytes that each element of one level (0: the root) takes up, in order.
pub fn read_spans(text: &str, level: usize) -> Result<(Element, Vec<Range<usize>>), Finding> {
    run(text, &[], Some(level), Limits::ACCEPTED)
}

fn run(
    text: &str,
    verbatim: &[(&str, &str)],
    level: Option<usize>,
    limits: Limits,
) -> Step<(Element, Vec<Range<usize>>)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.len() > limits.size {
        let message = format!("the document has {} bytes, more than the {} that are read", text.len(), limits.size);
        return Err(Finding::invalid(&Place::default(), message));
    }
    let mut builder = Builder::new(text, verbatim, level, limits);
    let mut reader = Reader::from_str(text);
    reader.config_mut().enable_all_checks(true);
    loop {
        let start = reader.buffer_position() as usize;
        builder.cursor.advance(text, start);
        let event = reader.read_event().map_err(|e| builder.broken(e.to_string()))?;
        let raw = text.get(start..reader.buffer_position() as usize).unwrap_or_default();
        match event {
            Event::Eof => return builder.finish(),
            event => builder.take(&event, raw, start)?,
        }
    }
}

/// Where we are in the text; only ever moves forward, so counting is linear.
#[derive(Clone, Copy)]
struct Cursor {
    offset: usize,
    line: u32,
    column: u32,
}

impl Default for Cursor {
    fn default() -> Self {
        Cursor { offset: 0, line: 1, column: 1 }
    }
}

impl Cursor {
    fn advance(&mut self, text: &str, to: usize) {
        for c in text.get(self.offset..to).unwrap_or_default().chars() {
            (self.line, self.column) = if c == '\n' { (self.line + 1, 1) } else { (self.line, self.column + 1) };
        }
        self.offset = to;
    }
}

/// An element whose end has not come yet.
struct Frame {
    element: Element,
    /// How many children of each name there were, and the first of them.
    seen: HashMap<String, (u32, Path)>,
    prefixes: Prefixes,
    /// Where it begins.
    start: usize,
    /// Where its content begins.
    content: usize,
}

struct Builder<'a> {
    limits: Limits,
    /// Whose spans are noted.
    level: Option<usize>,
    spans: Vec<Range<usize>>,
    text: &'a str,
    verbatim: &'a [(&'a str, &'a str)],
    cursor: Cursor,
    open: Vec<Frame>,
    root: Option<Element>,
    scope: Scope,
    count: usize,
    /// Of the tree, so far.
    pieces: usize,
    /// How many elements are open around the content that is kept as it was written, while that is read.
    kept_from: Option<usize>,
}

type Step<T = ()> = Result<T, Finding>;

impl<'a> Builder<'a> {
    fn new(text: &'a str, verbatim: &'a [(&'a str, &'a str)], level: Option<usize>, limits: Limits) -> Builder<'a> {
        Builder {
            limits,
            level,
            spans: Vec::new(),
            text,
            verbatim,
            cursor: Cursor::default(),
            open: Vec::new(),
            root: None,
            scope: Scope::default(),
            count: 0,
            pieces: 0,
            kept_from: None,
        }
    }
}

impl Builder<'_> {
    fn take(&mut self, event: &Event<'_>, raw: &str, start: usize) -> Step {
        if let Some(bad) = raw.chars().find(|c| !is_legal(*c)) {
            return Err(self.broken(format!("the character U+{:04X} cannot stand in XML", u32::from(bad))));
        }
        match event {
            Event::Start(_) => self.start(raw, start + raw.len()),
            Event::Empty(_) => {
                self.start(raw, start + raw.len())?;
                self.end(start + raw.len(), start + raw.len())
            }
            Event::End(_) => self.end_tag(raw, start),
            Event::Text(_) if raw.contains("]]>") => Err(self.broken("']]>' cannot stand in text")),
            Event::Text(_) => self.text(&normalise_lines(raw)),
            Event::CData(data) if self.open.is_empty() => {
                Err(self.broken(format!("text outside the root element: {}", shorten(data))))
            }
            Event::CData(data) => self.text(&normalise_lines(data)),
            Event::GeneralRef(name) => {
                let character = resolve(name).map_err(|message| self.broken(message))?;
                if self.open.is_empty() {
                    Err(self.broken("text outside the root element"))
                } else {
                    self.text(character.encode_utf8(&mut [0; 4]))
                }
            }
            Event::Comment(_) => self.comment(raw),
            Event::PI(_) => self.instruction(raw),
            Event::Decl(_) if start > 0 => Err(self.broken("the XML declaration must be the very first thing")),
            Event::Decl(_) => self.declaration(raw),
            Event::DocType(_) => Err(self.broken("a document type definition is not accepted")),
            Event::Eof => Ok(()),
        }
    }

    /// A finding at the piece being read.
    fn broken(&self, message: impl Into<String>) -> Finding {
        let path = self.open.last().map(|frame| frame.element.at.path.clone()).unwrap_or_default();
        Finding::invalid(&Place { line: self.cursor.line, column: self.cursor.column, path }, message)
    }

    fn start(&mut self, raw: &str, content: usize) -> Step {
        let inner = raw.strip_prefix('<').and_then(|r| r.strip_suffix("/>").or_else(|| r.strip_suffix('>')));
        let inner = inner.unwrap_or_default();
        let name = inner.split(is_space).next().unwrap_or_default();
        self.check_name(name)?;
        self.count += 1;
        if self.root.is_some() && self.open.is_empty() {
            return Err(self.broken(format!("a second root element <{name}>")));
        }
        if self.open.len() >= self.limits.depth {
            return Err(self.broken(format!("elements are nested more than {} deep", self.limits.depth)));
        }
        if self.count > self.limits.elements {
            return Err(self.broken(format!("more than {} elements", self.limits.elements)));
        }
        let at = Place { line: self.cursor.line, column: self.cursor.column, path: self.path(name) };
        let mut cursor = self.cursor;
        cursor.advance(self.text, self.cursor.offset + 1 + name.len());
        let attributes = self.attributes(&inner[name.len()..], cursor, &at)?;
        let (prefixes, namespace) =
            self.scope.enter(name, &attributes).map_err(|message| Finding::invalid(&at, message))?;
        self.grow(1 + attributes.len())?;
        let element = Element { name: name.to_owned(), namespace, attributes, at, ..Element::default() };
        if self.kept_from.is_none() && self.is_verbatim(name) {
            self.kept_from = Some(self.open.len() + 1);
        }
        self.open.push(Frame { element, seen: HashMap::new(), prefixes, start: self.cursor.offset, content });
        Ok(())
    }

    /// Whether the content of this child of the open element is kept as it was written.
    fn is_verbatim(&self, name: &str) -> bool {
        let parent = self.open.last().map_or("", |frame| &*frame.element.name);
        self.verbatim.contains(&(parent, name))
    }

    /// The tree becomes larger by so many pieces, unless all this is kept as it was written.
    fn grow(&mut self, pieces: usize) -> Step {
        if self.kept_from.is_none() {
            self.pieces += pieces;
        }
        if self.pieces <= self.limits.pieces {
            return Ok(());
        }
        let message = format!("more than {} elements, attributes and texts outside <metadata>", self.limits.pieces);
        Err(self.broken(message))
    }

    /// Puts a text or a comment into the open element.
    fn put(&mut self, node: Node) -> Step {
        if self.kept_from.is_some() {
            return Ok(());
        }
        self.grow(1)?;
        if let Some(frame) = self.open.last_mut() {
            frame.element.nodes.push(node);
        }
        Ok(())
    }

    /// The path of a child of the open element.
    fn path(&mut self, name: &str) -> Path {
        let Some(parent) = self.open.last_mut() else { return Path::default() };
        match parent.seen.get_mut(name) {
            None => {
                let path = parent.element.at.path.child(name, 1);
                parent.seen.insert(name.to_owned(), (1, path.clone()));
                path
            }
            Some((count, first)) => {
                *count += 1;
                let path = parent.element.at.path.child(name, *count);
                first.is_one_of_several();
                path.is_one_of_several();
                path
            }
        }
    }

    fn check_name(&self, name: &str) -> Step {
        if name.len() > MAX_NAME {
            return Err(self.broken(format!("a name is longer than {MAX_NAME} bytes")));
        }
        if is_name(name) { Ok(()) } else { Err(self.broken(format!("'{name}' is not a name"))) }
    }

    /// The attributes of a tag; `raw` is what follows its name.
    fn attributes(&self, raw: &str, mut cursor: Cursor, element: &Place) -> Step<Vec<Attribute>> {
        let base = cursor.offset;
        let mut attributes: Vec<Attribute> = Vec::new();
        let mut rest = raw;
        loop {
            let trimmed = rest.trim_start_matches(is_space);
            if trimmed.is_empty() {
                attributes.shrink_to_fit();
                return Ok(attributes);
            }
            cursor.advance(self.text, base + raw.len() - trimmed.len());
            let here = |path| Place { line: cursor.line, column: cursor.column, path };
            let broken = |message: String| Finding::invalid(&here(element.path.clone()), message);
            if trimmed.len() == rest.len() {
                return Err(broken("there must be a blank before an attribute".to_owned()));
            }
            let (name, value, after) = attribute(trimmed).map_err(broken)?;
            if name.len() > MAX_NAME || !is_name(name) {
                return Err(broken(format!("'{}' is not a name", shorten(name))));
            }
            if attributes.iter().any(|a| a.name == name) {
                return Err(broken(format!("the attribute '{name}' is there twice")));
            }
            if attributes.len() >= MAX_ATTRIBUTES {
                return Err(broken(format!("more than {MAX_ATTRIBUTES} attributes")));
            }
            attributes.push(Attribute { name: name.to_owned(), value, at: here(element.path.clone()) });
            rest = after;
        }
    }

    fn end_tag(&mut self, raw: &str, start: usize) -> Step {
        let name = raw.strip_prefix("</").and_then(|r| r.strip_suffix('>')).unwrap_or_default();
        let name = name.trim_end_matches(is_space);
        match self.open.last() {
            Some(frame) if frame.element.name == name => self.end(start, start + raw.len()),
            Some(frame) => {
                Err(self.broken(format!("</{}> where </{}> was expected", shorten(name), frame.element.name)))
            }
            None => Err(self.broken(format!("</{}> without a beginning", shorten(name)))),
        }
    }

    /// The open element is complete; its content ends at `end`, itself at `after`.
    fn end(&mut self, end: usize, after: usize) -> Step {
        let Some(Frame { mut element, prefixes, start, content, .. }) = self.open.pop() else { return Ok(()) };
        if self.level == Some(self.open.len()) {
            self.spans.push(start..after);
        }
        self.scope.leave(prefixes);
        if self.kept_from == Some(self.open.len() + 1) {
            self.kept_from = None;
            let raw = self.text.get(content..end).unwrap_or_default();
            element.nodes = if raw.is_empty() { Vec::new() } else { vec![Node::Verbatim(raw.to_owned())] };
        } else if self.kept_from.is_some() {
            return Ok(());
        }
        self.pieces -= leave_out_layout(&mut element.nodes);
        element.nodes.shrink_to_fit();
        match self.open.last_mut() {
            Some(frame) => frame.element.push(element),
            None => self.root = Some(element),
        }
        Ok(())
    }

    fn text(&mut self, text: &str) -> Step {
        let Some(frame) = self.open.last_mut() else {
            let blank = text.chars().all(is_space);
            return if blank {
                Ok(())
            } else {
                Err(self.broken(format!("text outside the root element: {}", shorten(text.trim()))))
            };
        };
        match frame.element.nodes.last_mut() {
            Some(Node::Text(before)) => before.push_str(text),
            _ => return self.put(Node::Text(text.to_owned())),
        }
        Ok(())
    }

    fn comment(&mut self, raw: &str) -> Step {
        let inner = raw.strip_prefix("<!--").and_then(|r| r.strip_suffix("-->")).unwrap_or_default();
        if inner.contains("--") || inner.ends_with('-') {
            return Err(self.broken("'--' cannot stand in a comment"));
        }
        if self.open.is_empty() { Ok(()) } else { self.put(Node::Comment(normalise_lines(inner))) }
    }

    /// Checked and passed over: it speaks to programs other than us.
    fn instruction(&self, raw: &str) -> Step {
        let inner = raw.strip_prefix("<?").and_then(|r| r.strip_suffix("?>")).unwrap_or_default();
        let target = inner.split(is_space).next().unwrap_or_default();
        if !is_plain_name(target) || target.eq_ignore_ascii_case("xml") {
            return Err(self.broken(format!("'{}' cannot name a processing instruction", shorten(target))));
        }
        Ok(())
    }

    /// `<?xml version='1.0' encoding='UTF-8' standalone='yes'?>`
    fn declaration(&self, raw: &str) -> Step {
        let inner = raw.strip_prefix("<?xml").and_then(|r| r.strip_suffix("?>")).unwrap_or_default();
        let attributes = self.attributes(inner, self.cursor, &Place::default())?;
        let mut said = attributes.iter().map(|a| (&*a.name, &*a.value)).peekable();
        if said.next_if_eq(&("version", "1.0")).is_none() {
            return Err(self.broken("the XML declaration must begin with version='1.0'"));
        }
        let utf8 = |(name, value): &(&str, &str)| {
            *name == "encoding" && ["utf-8", "utf8", "us-ascii", "ascii"].contains(&&*value.to_ascii_lowercase())
        };
        said.next_if(utf8);
        said.next_if(|said| matches!(said, ("standalone", "yes" | "no")));
        match said.next() {
            None => Ok(()),
            Some((name, value)) => {
                Err(self.broken(format!("{name}='{}' in the XML declaration; the text must be UTF-8", shorten(value))))
            }
        }
    }

    fn finish(self) -> Step<(Element, Vec<Range<usize>>)> {
        match (self.open.last(), &self.root) {
            (Some(frame), _) => Err(self.broken(format!("the text ends before </{}>", frame.element.name))),
            (None, None) => Err(self.broken("there is no element")),
            (None, Some(_)) => Ok((self.root.unwrap_or_default(), self.spans)),
        }
    }
}

/// Takes white space from between elements and comments, where it is layout; says how many texts that were.
fn leave_out_layout(nodes: &mut Vec<Node>) -> usize {
    let layout = |node: &Node| matches!(node, Node::Text(text) if text.chars().all(is_space));
    let structured = |node: &Node| matches!(node, Node::Element(_) | Node::Comment(_));
    if !nodes.iter().any(structured) || !nodes.iter().all(|node| structured(node) || layout(node)) {
        return 0;
    }
    let before = nodes.len();
    nodes.retain(|node| !layout(node));
    before - nodes.len()
}

/// Splits `name = 'value' rest`; the error says what is wrong.
fn attribute(raw: &str) -> Result<(&str, String, &str), String> {
    let end = raw.find(|c| c == '=' || is_space(c)).ok_or_else(|| format!("'{}' has no value", shorten(raw)))?;
    let (name, rest) = raw.split_at(end);
    let rest = rest.trim_start_matches(is_space).strip_prefix('=');
    let rest = rest.ok_or_else(|| format!("'{}' has no value", shorten(name)))?.trim_start_matches(is_space);
    let quote = rest.chars().next().filter(|c| matches!(c, '\'' | '"'));
    let quote = quote.ok_or_else(|| format!("the value of '{}' is not in quotes", shorten(name)))?;
    let (value, rest) =
        rest[1..].split_once(quote).ok_or_else(|| format!("the value of '{}' has no end", shorten(name)))?;
    Ok((name, attribute_value(value)?, rest))
}

/// Resolves references and makes white space blanks.
fn attribute_value(raw: &str) -> Result<String, String> {
    if raw.contains('<') {
        return Err("'<' cannot stand in an attribute".to_owned());
    }
    let mut out = String::with_capacity(raw.len());
    let raw = normalise_lines(raw);
    let mut pieces = raw.split('&');
    let blanks = |piece: &str| piece.replace(['\n', '\t'], " ");
    out.push_str(&blanks(pieces.next().unwrap_or_default()));
    for piece in pieces {
        let (reference, text) = piece.split_once(';').ok_or("'&' must be written '&amp;'")?;
        out.push(resolve(reference)?);
        out.push_str(&blanks(text));
    }
    Ok(out)
}
