//! `<metadata>`: what others have written on the domain. Kept to the letter.

use super::DomainDef;
use super::part::Part;
use crate::xml::{Attribute, Element, Finding, Node, Place, escape_attribute, is_prefix, is_text, read_spans, shorten};
use std::ops::Range;

/// `<metadata>`
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    /// Everything between the tags, as written.
    pub text: String,
}

impl Part for Metadata {
    fn read(at: Element, _log: &mut Vec<Finding>) -> Metadata {
        let verbatim = |node: &Node| match node {
            Node::Verbatim(text) => Some(text.clone()),
            _ => None,
        };
        Metadata { text: at.nodes.iter().filter_map(verbatim).collect() }
    }

    fn write(&self, name: &str) -> Element {
        let mut element = Element::new(name);
        if !self.text.is_empty() {
            element.nodes.push(Node::Verbatim(self.text.clone()));
        }
        element
    }
}

impl DomainDef {
    /// The `<metadata>` child whose namespace is `uri`, as XML text that stands alone.
    pub fn metadata(&self, uri: &str) -> Option<String> {
        let children = self.children(self.metadata.as_ref()?).ok()?;
        let child = children.iter().find(|child| child.is_in(uri))?;
        Some(child.alone(&self.rest.attributes))
    }

    /// Replaces (or with `None` removes) the `<metadata>` child whose namespace is `uri`; `xml` is one element, which is
    /// put into that namespace with `prefix`. Errors, with the place in `xml`: not well-formed, not one element, or more
    /// than a domain document may hold. Nothing has then been changed.
    pub fn set_metadata(&mut self, uri: &str, prefix: &str, xml: Option<&str>) -> Result<(), Finding> {
        let new = xml.map(|xml| in_namespace(xml, prefix, uri)).transpose()?;
        let mut text = self.metadata.take().map(|metadata| metadata.text).unwrap_or_default();
        let before = Metadata { text: text.clone() };
        let children = self.children(&before)?;
        let mut there =
            children.iter().filter(|child| child.is_in(uri)).map(|child| child.span.clone()).collect::<Vec<_>>();
        let first = if new.is_some() && !there.is_empty() { Some(there.remove(0)) } else { None };
        for span in there.into_iter().rev() {
            let start = text[..span.start].trim_end().len();
            text.replace_range(start..span.end, "");
        }
        match (new, first) {
            (Some(new), Some(span)) => text.replace_range(span, &new),
            (Some(new), None) => text = format!("{}\n    {new}\n  ", text.trim_end()),
            (None, _) => {}
        }
        let after = (!text.trim().is_empty()).then_some(Metadata { text });
        let checked = after.as_ref().map_or(Ok(Vec::new()), |metadata| self.children(metadata));
        self.metadata = if checked.is_ok() { after } else { Some(before) };
        checked.map(drop)
    }

    /// The children of `<metadata>`, with their bytes in its text.
    fn children(&self, metadata: &Metadata) -> Result<Vec<Child>, Finding> {
        let mut open = "<domain".to_owned();
        for attribute in self.rest.attributes.iter().filter(|a| a.name.starts_with("xmlns:")) {
            open += &format!(" {}='{}'", attribute.name, escape_attribute(&attribute.value));
        }
        open += "><metadata>";
        let (root, spans) = read_spans(&format!("{open}{}</metadata></domain>", metadata.text), 2)?;
        let elements = root.child("metadata").map(|metadata| metadata.elements().cloned().collect::<Vec<_>>());
        let child = |(element, span): (Element, Range<usize>)| {
            let span = span.start - open.len()..span.end - open.len();
            Child { text: metadata.text[span.clone()].to_owned(), element, span }
        };
        Ok(elements.unwrap_or_default().into_iter().zip(spans).map(child).collect())
    }
}

struct Child {
    element: Element,
    span: Range<usize>,
    text: String,
}

impl Child {
    fn is_in(&self, uri: &str) -> bool {
        self.element.namespace.as_deref() == Some(uri)
    }

    /// Its text, with the prefixes it uses and the domain element declares.
    fn alone(&self, outer: &[Attribute]) -> String {
        let mut text = self.text.clone();
        for declaration in outer.iter().filter(|a| a.name.starts_with("xmlns:") && self.element.attr(&a.name).is_none())
        {
            let used = format!("{}:", declaration.name.trim_start_matches("xmlns:"));
            if text.contains(&used) {
                let said = format!(" {}='{}'", declaration.name, escape_attribute(&declaration.value));
                text.insert_str(1 + self.element.name.len(), &said);
            }
        }
        text
    }
}

/// The one element of `xml`, in the namespace `uri`.
fn in_namespace(xml: &str, prefix: &str, uri: &str) -> Result<String, Finding> {
    let nowhere = Place::default();
    let (root, spans) = read_spans(xml, 0)?;
    let xml = xml.strip_prefix('\u{feff}').unwrap_or(xml);
    let text = spans.into_iter().next().map(|span| &xml[span]).unwrap_or_default();
    if uri.is_empty() || !is_text(uri) {
        return Err(Finding::invalid(&nowhere, "metadata needs the URI of a namespace"));
    }
    if root.namespace.as_deref() == Some(uri) {
        return Ok(text.to_owned());
    }
    if !is_prefix(prefix) {
        return Err(Finding::invalid(&nowhere, format!("'{}' cannot be a prefix", shorten(prefix))));
    }
    let declaration = format!("xmlns:{prefix}");
    if root.attr(&declaration).is_some_and(|declared| declared != uri) {
        return Err(Finding::invalid(&root.at, format!("the prefix '{prefix}' already stands for another namespace")));
    }
    let said = if root.attr(&declaration).is_some() {
        String::new()
    } else {
        format!(" {declaration}='{}'", escape_attribute(uri))
    };
    let name = format!("{prefix}:{}", root.local_name());
    let rest = &text[1 + root.name.len()..];
    Ok(match rest.rfind("</").filter(|_| !rest.ends_with("/>")) {
        Some(end) => format!("<{name}{said}{}</{name}>", &rest[..end]),
        None => format!("<{name}{said}{rest}"),
    })
}
