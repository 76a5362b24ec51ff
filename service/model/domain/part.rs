//! How an element becomes a struct: type, read and write from one declaration.
//!
//! [`element!`] lists an element's fields, each with the way it stands in XML. What the struct does not name stays in its
//! `rest` and is written again. Order of output is not decided here but by [`super::format`].
//!
//! | way | in XML | field |
//! |---|---|---|
//! | `attr "x"` | attribute | `Option<T: Value>` |
//! | `need "x"` | attribute that must be there | `T: Value` |
//! | `or_default "x"` | attribute, written always | `T: Value` |
//! | `yes_no "x"`, `on_off "x"` | attribute | `Option<bool>` |
//! | `text` | the element's text | `Option<T: Value>` |
//! | `need_text` | the same, must be there | `T: Value` |
//! | `leaf "x"` | child with text only | `Option<T: Value>` |
//! | `own "x"` | child with text only, written always | `T: Value` |
//! | `leaves "x"` | such children | `Vec<T: Value>` |
//! | `flag "x"` | empty child, there or not | `bool` |
//! | `child "x"` | child | `Option<T: Part>` |
//! | `inner "x"` | child, written always | `T: Part` |
//! | `must "x"` | child that must be there | `T: Part` |
//! | `children "x"` | children | `Vec<T: Part>` |
//! | `flat` | several of the above, in a struct of their own | `T: Flat` |

use super::value::{Bool, Value};
use crate::xml::{Attribute, Element, Finding, Node, Place, shorten};

/// Something that is one element.
pub trait Part: Sized {
    /// Reads the element; what is wrong goes to `log`, and the value is then whatever is left.
    fn read(at: Element, log: &mut Vec<Finding>) -> Self;
    /// Writes it as an element of that name.
    fn write(&self, name: &str) -> Element;
}

/// Something that is several attributes and children of an element it shares with others.
pub trait Flat: Sized {
    /// Takes what it understands.
    fn take(at: &mut Element, log: &mut Vec<Finding>) -> Self;
    /// Adds it again.
    fn put(&self, to: &mut Element);
}

/// What a document says that no typed field holds: kept, and written where it was.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rest {
    /// Attributes.
    pub attributes: Vec<Attribute>,
    /// Child elements.
    pub elements: Vec<Element>,
}

impl Rest {
    /// All that has not been taken. Comments and the white space between elements say nothing to a machine and end here.
    pub fn of(at: Element) -> Rest {
        Rest { attributes: at.attributes, elements: at.nodes.into_iter().filter_map(Node::into_element).collect() }
    }

    /// Whether nothing was left.
    pub fn is_empty(&self) -> bool {
        self.attributes.is_empty() && self.elements.is_empty()
    }

    /// A kept attribute's value.
    pub fn attr(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|a| a.name == name).map(|a| &*a.value)
    }

    /// A kept child.
    pub fn child(&self, name: &str) -> Option<&Element> {
        self.elements.iter().find(|e| e.name == name)
    }

    /// Adds it to an element.
    pub fn put(&self, to: &mut Element) {
        to.attributes.extend(self.attributes.iter().cloned());
        to.nodes.extend(self.elements.iter().map(|element| Node::Element(Box::new(element.clone()))));
    }
}

impl Part for Element {
    fn read(at: Element, _log: &mut Vec<Finding>) -> Element {
        at
    }

    fn write(&self, _name: &str) -> Element {
        self.clone()
    }
}

impl<T: Part> Part for Box<T> {
    fn read(at: Element, log: &mut Vec<Finding>) -> Self {
        Box::new(T::read(at, log))
    }

    fn write(&self, name: &str) -> Element {
        T::write(self, name)
    }
}

/// Reads `text`, which stands at `place`.
pub(crate) fn value<T: Value>(text: &str, place: &Place, log: &mut Vec<Finding>) -> Option<T> {
    match T::from_text(text) {
        Ok(value) => Some(value),
        Err(expected) => {
            log.push(Finding::invalid(place, format!("'{}' is not {expected}", shorten(text))));
            None
        }
    }
}

pub(crate) fn take_attr<T: Value>(at: &mut Element, name: &str, log: &mut Vec<Finding>) -> Option<T> {
    let attribute = at.take_attr(name)?;
    value(&attribute.value, &attribute.place(), log)
}

pub(crate) fn need_attr<T: Value + Default>(at: &mut Element, name: &str, log: &mut Vec<Finding>) -> T {
    if at.attr(name).is_none() {
        log.push(Finding::invalid(&at.at, format!("<{}> needs the attribute '{name}'", at.name)));
    }
    take_attr(at, name, log).unwrap_or_default()
}

pub(crate) fn take_bool(at: &mut Element, name: &str, words: Bool, log: &mut Vec<Finding>) -> Option<bool> {
    let attribute = at.take_attr(name)?;
    let read = words.read(&attribute.value);
    if read.is_none() {
        let (no, yes) = words.words();
        log.push(Finding::invalid(&attribute.place(), format!("'{}' is neither '{yes}' nor '{no}'", attribute.value)));
    }
    read
}

pub(crate) fn take_text<T: Value>(at: &mut Element, log: &mut Vec<Finding>) -> Option<T> {
    let text = at.text();
    at.nodes.retain(|node| node.as_text().is_none());
    let only_space = text.trim().is_empty() && at.elements().next().is_some();
    if text.is_empty() || only_space { None } else { value(&text, &at.at, log) }
}

pub(crate) fn need_text<T: Value + Default>(at: &mut Element, log: &mut Vec<Finding>) -> T {
    if at.text().trim().is_empty() {
        log.push(Finding::invalid(&at.at, format!("<{}> needs a text", at.name)));
        return T::default();
    }
    take_text(at, log).unwrap_or_default()
}

pub(crate) fn take_leaf<T: Value>(at: &mut Element, name: &str, log: &mut Vec<Finding>) -> Option<T> {
    let leaf = at.take_child(name)?;
    value(&leaf.text(), &leaf.at, log)
}

pub(crate) fn take_must<T: Part + Default>(at: &mut Element, name: &str, log: &mut Vec<Finding>) -> T {
    let Some(child) = at.take_child(name) else {
        log.push(Finding::invalid(&at.at, format!("<{}> needs a <{name}>", at.name)));
        return T::default();
    };
    T::read(child, log)
}

pub(crate) fn put_attr<T: Value>(to: &mut Element, name: &str, value: Option<&T>) {
    if let Some(value) = value {
        to.set_attr(name, value.to_text());
    }
}

pub(crate) fn put_text<T: Value>(to: &mut Element, value: Option<&T>) {
    if let Some(value) = value {
        to.nodes.push(Node::Text(value.to_text()));
    }
}

pub(crate) fn put_leaf<T: Value>(to: &mut Element, name: &str, value: &T) {
    let mut leaf = Element::new(name);
    let text = value.to_text();
    if !text.is_empty() {
        leaf.nodes.push(Node::Text(text));
    }
    to.push(leaf);
}

/// One field's way out of an element.
macro_rules! take_field {
    (attr $x:literal, $at:ident, $log:ident) => {
        $crate::domain::part::take_attr(&mut *$at, $x, $log)
    };
    (need $x:literal, $at:ident, $log:ident) => {
        $crate::domain::part::need_attr(&mut *$at, $x, $log)
    };
    (or_default $x:literal, $at:ident, $log:ident) => {
        $crate::domain::part::take_attr(&mut *$at, $x, $log).unwrap_or_default()
    };
    (yes_no $x:literal, $at:ident, $log:ident) => {
        $crate::domain::part::take_bool(&mut *$at, $x, $crate::domain::value::Bool::YesNo, $log)
    };
    (on_off $x:literal, $at:ident, $log:ident) => {
        $crate::domain::part::take_bool(&mut *$at, $x, $crate::domain::value::Bool::OnOff, $log)
    };
    (text, $at:ident, $log:ident) => {
        $crate::domain::part::take_text(&mut *$at, $log)
    };
    (need_text, $at:ident, $log:ident) => {
        $crate::domain::part::need_text(&mut *$at, $log)
    };
    (leaf $x:literal, $at:ident, $log:ident) => {
        $crate::domain::part::take_leaf(&mut *$at, $x, $log)
    };
    (own $x:literal, $at:ident, $log:ident) => {
        $crate::domain::part::take_leaf(&mut *$at, $x, $log).unwrap_or_default()
    };
    (leaves $x:literal, $at:ident, $log:ident) => {
        $at.take_children($x).iter().filter_map(|e| $crate::domain::part::value(&e.text(), &e.at, $log)).collect()
    };
    (flag $x:literal, $at:ident, $log:ident) => {
        $at.take_child($x).is_some()
    };
    (child $x:literal, $at:ident, $log:ident) => {
        $at.take_child($x).map(|e| $crate::domain::part::Part::read(e, $log))
    };
    (inner $x:literal, $at:ident, $log:ident) => {
        $at.take_child($x).map(|e| $crate::domain::part::Part::read(e, $log)).unwrap_or_default()
    };
    (must $x:literal, $at:ident, $log:ident) => {
        $crate::domain::part::take_must(&mut *$at, $x, $log)
    };
    (children $x:literal, $at:ident, $log:ident) => {
        $at.take_children($x).into_iter().map(|e| $crate::domain::part::Part::read(e, $log)).collect()
    };
    (flat, $at:ident, $log:ident) => {
        $crate::domain::part::Flat::take(&mut *$at, $log)
    };
}

/// One field's way into an element.
macro_rules! put_field {
    (attr $x:literal, $value:expr, $to:ident) => {
        $crate::domain::part::put_attr($to, $x, $value.as_ref())
    };
    (need $x:literal, $value:expr, $to:ident) => {
        $crate::domain::part::put_attr($to, $x, Some(&$value))
    };
    (or_default $x:literal, $value:expr, $to:ident) => {
        $crate::domain::part::put_attr($to, $x, Some(&$value))
    };
    (yes_no $x:literal, $value:expr, $to:ident) => {
        $crate::domain::value::Bool::YesNo.put($to, $x, $value)
    };
    (on_off $x:literal, $value:expr, $to:ident) => {
        $crate::domain::value::Bool::OnOff.put($to, $x, $value)
    };
    (text, $value:expr, $to:ident) => {
        $crate::domain::part::put_text($to, $value.as_ref())
    };
    (need_text, $value:expr, $to:ident) => {
        $crate::domain::part::put_text($to, Some(&$value))
    };
    (leaf $x:literal, $value:expr, $to:ident) => {
        $value.iter().for_each(|v| $crate::domain::part::put_leaf(&mut *$to, $x, v))
    };
    (own $x:literal, $value:expr, $to:ident) => {
        $crate::domain::part::put_leaf(&mut *$to, $x, &$value)
    };
    (leaves $x:literal, $value:expr, $to:ident) => {
        $value.iter().for_each(|v| $crate::domain::part::put_leaf(&mut *$to, $x, v))
    };
    (flag $x:literal, $value:expr, $to:ident) => {
        if $value {
            $to.push($crate::xml::Element::new($x))
        }
    };
    (child $x:literal, $value:expr, $to:ident) => {
        $value.iter().for_each(|v| $to.push($crate::domain::part::Part::write(v, $x)))
    };
    (inner $x:literal, $value:expr, $to:ident) => {
        $to.push($crate::domain::part::Part::write(&$value, $x))
    };
    (must $x:literal, $value:expr, $to:ident) => {
        $to.push($crate::domain::part::Part::write(&$value, $x))
    };
    (children $x:literal, $value:expr, $to:ident) => {
        $value.iter().for_each(|v| $to.push($crate::domain::part::Part::write(v, $x)))
    };
    (flat, $value:expr, $to:ident) => {
        $crate::domain::part::Flat::put(&$value, $to)
    };
}

/// Declares a struct that is one element: see the table above. Adds `rest` and `at`.
macro_rules! element {
    ($(#[$meta:meta])* pub struct $name:ident {
        $($(#[$fmeta:meta])* $way:ident $($x:literal)? => $field:ident: $ty:ty,)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct $name {
            $($(#[$fmeta])* pub $field: $ty,)*
            /// What the document says beyond this, kept.
            pub rest: $crate::domain::part::Rest,
            /// Where it stood; unknown if no document said it.
            pub at: $crate::xml::Place,
        }

        impl $crate::domain::part::Part for $name {
            fn read(element: $crate::xml::Element, log: &mut Vec<$crate::xml::Finding>) -> Self {
                let mut element = element;
                let element = &mut element;
                let _ = &log;
                let at = element.at.clone();
                $(let $field = $crate::domain::part::take_field!($way $($x)?, element, log);)*
                $name { $($field,)* at, rest: $crate::domain::part::Rest::of(std::mem::take(element)) }
            }

            fn write(&self, name: &str) -> $crate::xml::Element {
                let mut element = $crate::xml::Element::new(name);
                element.origin = self.at.clone();
                let to = &mut element;
                $($crate::domain::part::put_field!($way $($x)?, self.$field, to);)*
                self.rest.put(to);
                element
            }
        }
    };
}

/// Declares a struct that is several attributes and children of a shared element.
macro_rules! flat {
    ($(#[$meta:meta])* pub struct $name:ident {
        $($(#[$fmeta:meta])* $way:ident $($x:literal)? => $field:ident: $ty:ty,)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct $name {
            $($(#[$fmeta])* pub $field: $ty,)*
        }

        impl $crate::domain::part::Flat for $name {
            fn take(at: &mut $crate::xml::Element, log: &mut Vec<$crate::xml::Finding>) -> Self {
                $(let $field = $crate::domain::part::take_field!($way $($x)?, at, log);)*
                $name { $($field,)* }
            }

            fn put(&self, to: &mut $crate::xml::Element) {
                $($crate::domain::part::put_field!($way $($x)?, self.$field, to);)*
            }
        }
    };
}

pub(crate) use {element, flat, put_field, take_field};
