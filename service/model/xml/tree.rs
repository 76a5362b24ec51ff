//! The tree: elements with their attributes and children in order, and where each stood.
//!
//! A typed view *consumes* it: it takes what it understands, and what is left is kept.

use super::Place;
use std::sync::Arc;

/// An element and all that is in it. Compared without places.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Element {
    /// As written, prefix included.
    pub name: String,
    /// The namespace the name is in, if any.
    pub namespace: Option<Arc<str>>,
    /// In document order.
    pub attributes: Vec<Attribute>,
    /// In document order.
    pub nodes: Vec<Node>,
    /// Where it began; unknown for an element that no document said.
    pub at: Place,
    /// Where that stood from which a typed view wrote this anew; unknown for all others.
    pub origin: Place,
}

/// One attribute. Namespace declarations are attributes too.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attribute {
    /// As written, prefix included.
    pub name: String,
    /// With entities resolved and white space normalised.
    pub value: String,
    /// Where its name began, with the path of its element; see [`Attribute::place`].
    pub at: Place,
}

impl Attribute {
    /// Where it stands. The path is made when it is asked for: there are many attributes and few complaints.
    pub fn place(&self) -> Place {
        self.at.attribute(&self.name)
    }
}

/// What stands in an element.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// A child.
    Element(Box<Element>),
    /// Text, entities and CDATA resolved, adjacent pieces joined.
    Text(String),
    /// A comment's inner text.
    Comment(String),
    /// Well-formed content exactly as its author wrote it.
    Verbatim(String),
}

impl Element {
    /// An empty element that no document said.
    pub fn new(name: impl Into<String>) -> Element {
        Element { name: name.into(), ..Element::default() }
    }

    /// The name without prefix.
    pub fn local_name(&self) -> &str {
        self.name.split_once(':').map_or(&*self.name, |(_, local)| local)
    }

    /// Where it stands below an element at `parent`: where it began, or what it was written from, or where such a child
    /// would be.
    pub fn place_below(&self, parent: &Place) -> Place {
        let known = [&self.at, &self.origin].into_iter().find(|at| at.is_known());
        known.cloned().unwrap_or_else(|| parent.child(&self.name))
    }

    /// An attribute's value.
    pub fn attr(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|a| a.name == name).map(|a| &*a.value)
    }

    /// Adds an attribute, or replaces its value.
    pub fn set_attr(&mut self, name: &str, value: impl Into<String>) {
        let value = value.into();
        match self.attributes.iter_mut().find(|a| a.name == name) {
            Some(attribute) => attribute.value = value,
            None => self.attributes.push(Attribute { name: name.to_owned(), value, at: Place::default() }),
        }
    }

    /// The same, for building in one expression.
    pub fn with_attr(mut self, name: &str, value: impl Into<String>) -> Element {
        self.set_attr(name, value);
        self
    }

    /// The same with a text put into it.
    pub fn with_text(mut self, text: impl Into<String>) -> Element {
        self.nodes.push(Node::Text(text.into()));
        self
    }

    /// Removes and gives an attribute.
    pub fn take_attr(&mut self, name: &str) -> Option<Attribute> {
        let index = self.attributes.iter().position(|a| a.name == name)?;
        Some(self.attributes.remove(index))
    }

    /// The child elements.
    pub fn elements(&self) -> impl Iterator<Item = &Element> {
        self.nodes.iter().filter_map(Node::as_element)
    }

    /// The child elements, to be changed.
    pub fn elements_mut(&mut self) -> impl Iterator<Item = &mut Element> {
        self.nodes.iter_mut().filter_map(|node| match node {
            Node::Element(element) => Some(element.as_mut()),
            _ => None,
        })
    }

    /// The first child of that name.
    pub fn child(&self, name: &str) -> Option<&Element> {
        self.elements().find(|e| e.name == name)
    }

    /// Removes and gives the first child of that name.
    pub fn take_child(&mut self, name: &str) -> Option<Element> {
        let index = self.nodes.iter().position(|n| n.is_named(name))?;
        self.nodes.remove(index).into_element()
    }

    /// Removes and gives all children of that name, in order.
    pub fn take_children(&mut self, name: &str) -> Vec<Element> {
        self.nodes.extract_if(.., |n| n.is_named(name)).filter_map(Node::into_element).collect()
    }

    /// Appends a child.
    pub fn push(&mut self, child: Element) {
        self.nodes.push(Node::Element(Box::new(child)));
    }

    /// Its own text, joined.
    pub fn text(&self) -> String {
        self.nodes.iter().filter_map(Node::as_text).collect()
    }

    /// Whether it has text that is more than white space.
    pub fn has_text(&self) -> bool {
        self.nodes.iter().filter_map(Node::as_text).any(|text| !text.trim().is_empty())
    }
}

impl Node {
    /// The element it is, if it is one.
    pub fn as_element(&self) -> Option<&Element> {
        match self {
            Node::Element(element) => Some(element),
            _ => None,
        }
    }

    /// The text it is, if it is one.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    /// What it is to the letter, if it is that.
    pub fn as_verbatim(&self) -> Option<&str> {
        match self {
            Node::Verbatim(text) => Some(text),
            _ => None,
        }
    }

    /// As [`Node::as_element`], by value.
    pub fn into_element(self) -> Option<Element> {
        match self {
            Node::Element(element) => Some(*element),
            _ => None,
        }
    }

    fn is_named(&self, name: &str) -> bool {
        self.as_element().is_some_and(|e| e.name == name)
    }
}
