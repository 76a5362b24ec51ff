//! Which prefix stands for which namespace where.

use super::{Attribute, shorten};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

const XML: &str = "http://www.w3.org/XML/1998/namespace";
const XMLNS: &str = "http://www.w3.org/2000/xmlns/";

/// The prefixes an element declares.
pub(super) type Prefixes = Vec<String>;

/// Everything declared by the open elements. The empty prefix is the default namespace.
#[derive(Default)]
pub(super) struct Scope {
    bound: HashMap<String, Vec<Arc<str>>>,
}

impl Scope {
    /// An element begins: takes in its declarations, and gives them and the namespace of its own name.
    pub fn enter(&mut self, name: &str, attributes: &[Attribute]) -> Result<(Prefixes, Option<Arc<str>>), String> {
        let mut prefixes = Prefixes::new();
        for attribute in attributes {
            let Some(prefix) = declared(&attribute.name) else { continue };
            check(prefix, &attribute.value)?;
            self.bound.entry(prefix.to_owned()).or_default().push(attribute.value.as_str().into());
            prefixes.push(prefix.to_owned());
        }
        self.check_attributes(attributes)?;
        Ok((prefixes, self.resolve(name)?))
    }

    /// It has ended.
    pub fn leave(&mut self, prefixes: Prefixes) {
        for prefix in prefixes {
            self.bound.get_mut(&prefix).map(Vec::pop);
        }
    }

    fn lookup(&self, prefix: &str) -> Option<Arc<str>> {
        match prefix {
            "xml" => Some(XML.into()),
            _ => self.bound.get(prefix)?.last().cloned(),
        }
    }

    /// The namespace of an element's name.
    fn resolve(&self, name: &str) -> Result<Option<Arc<str>>, String> {
        let Some((prefix, _)) = name.split_once(':') else {
            return Ok(self.lookup("").filter(|uri| !uri.is_empty()));
        };
        self.lookup(prefix).map(Some).ok_or_else(|| format!("the prefix '{prefix}' is not declared"))
    }

    /// Prefixes must be declared, and two attributes must differ also in (namespace, local name).
    fn check_attributes(&self, attributes: &[Attribute]) -> Result<(), String> {
        let mut seen = HashSet::new();
        for attribute in attributes.iter().filter(|a| declared(&a.name).is_none()) {
            let Some((_, local)) = attribute.name.split_once(':') else { continue };
            if !seen.insert((self.resolve(&attribute.name)?, local)) {
                return Err(format!("the attribute '{}' is there twice, under two prefixes", attribute.name));
            }
        }
        Ok(())
    }
}

/// The prefix an attribute declares.
pub(super) fn declared(attribute: &str) -> Option<&str> {
    if attribute == "xmlns" { Some("") } else { attribute.strip_prefix("xmlns:") }
}

/// What the specification of namespaces forbids.
fn check(prefix: &str, uri: &str) -> Result<(), String> {
    match prefix {
        "xmlns" => Err("the prefix 'xmlns' cannot be declared".to_owned()),
        "xml" if uri == XML => Ok(()),
        _ if prefix == "xml" || uri == XML || uri == XMLNS => {
            Err(format!("the prefix '{prefix}' cannot stand for '{}'", shorten(uri)))
        }
        "" => Ok(()),
        _ if uri.is_empty() => Err(format!("the prefix '{prefix}' cannot stand for nothing")),
        _ => Ok(()),
    }
}
