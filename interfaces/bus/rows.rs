//! The tree of objects as it is published: one row each, replaced by the publisher alone.
//!
//! Readers hold the lock for a look-up and a copy of some hundred bytes, the writer to put a row in its place; nobody
//! holds it across an await. The lock is also what keeps answers and signals in step: an answer is handed to the outbox
//! while it is held for reading, a change and its signals while it is held for writing. So whoever reads a value and
//! then hears of changes never ends up with the older one. Answers that take milliseconds are made beside the lock
//! from a copy, and made again should something have changed meanwhile.

use super::wire::{Body, Extent, Row};
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock};
use virt_service::facts::DomainFacts;
use virt_service::facts::{JobFacts, ObjectFacts};

/// How often a listing is made beside the lock before it is made under it.
const TRIES: usize = 3;

/// One published object.
#[derive(Debug)]
pub struct Object {
    /// Where it is.
    pub path: Arc<str>,
    /// Its interface; the standard ones are not among those told here.
    pub interface: &'static str,
    /// Its properties.
    pub row: Row,
    /// Other interfaces that it has beside that one, with their properties.
    pub others: Box<[(&'static str, Row)]>,
    /// What the row was made of.
    pub facts: Facts,
}

/// What a row was made of.
#[derive(Clone, Debug)]
pub enum Facts {
    /// Nothing that changes.
    Fixed,
    /// A domain's.
    Domain(Arc<DomainFacts>),
    /// A job's.
    Job(Arc<JobFacts>),
    /// An object's of another kind.
    Other(ObjectFacts),
}

impl Object {
    /// An object with one interface, made of nothing that changes.
    pub fn new(path: impl Into<Arc<str>>, interface: &'static str, row: Row) -> Object {
        Object { path: path.into(), interface, row, others: Box::default(), facts: Facts::Fixed }
    }

    /// The same made of `facts`.
    pub fn of(self, facts: Facts) -> Object {
        Object { facts, ..self }
    }

    /// All its own interfaces with their properties.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &Row)> {
        let others = self.others.iter().map(|(interface, row)| (*interface, row));
        std::iter::once((self.interface, &self.row)).chain(others)
    }

    /// The properties of one of its own interfaces, if it has that.
    pub fn row_of(&self, interface: &str) -> Option<&Row> {
        self.parts().find(|(own, _)| *own == interface).map(|(_, row)| row)
    }

    /// What a domain's row was made of.
    pub fn domain(&self) -> Option<&Arc<DomainFacts>> {
        if let Facts::Domain(facts) = &self.facts { Some(facts) } else { None }
    }

    /// Its interfaces with their properties, `a{sa{sv}}`.
    pub fn interfaces(&self, extent: Extent, body: &mut Body) {
        body.array(8, |body| {
            for (interface, row) in self.parts() {
                body.align(8);
                body.text(interface);
                body.array(8, |body| row.entries(extent, body));
            }
        });
    }
}

/// All objects by path.
#[derive(Debug, Default)]
pub struct Objects {
    all: BTreeMap<Arc<str>, Arc<Object>>,
    version: u64,
}

impl Objects {
    /// The object at `path`.
    pub fn get(&self, path: &str) -> Option<&Arc<Object>> {
        self.all.get(path)
    }

    /// Puts an object in its place; returns what was there.
    pub fn put(&mut self, object: Object) -> Option<Arc<Object>> {
        self.version += 1;
        self.all.insert(object.path.clone(), Arc::new(object))
    }

    /// Takes an object away.
    pub fn remove(&mut self, path: &str) -> Option<Arc<Object>> {
        self.version += 1;
        self.all.remove(path)
    }

    /// The objects below `parent`, in the order of their paths.
    pub fn below<'a>(&'a self, parent: &str) -> impl Iterator<Item = &'a Arc<Object>> + use<'a> {
        let prefix = format!("{}/", parent.trim_end_matches('/'));
        let from = (Bound::Included(prefix.as_str()), Bound::Unbounded);
        let range = self.all.range::<str, _>(from);
        range.take_while(move |(path, _)| path.starts_with(&prefix)).map(|(_, object)| object)
    }

    /// The names one level below `parent`, objects or not.
    pub fn children(&self, parent: &str) -> Vec<String> {
        let prefix = format!("{}/", parent.trim_end_matches('/'));
        let mut children = Vec::new();
        let mut from = prefix.clone();
        while let Some((path, _)) = self.all.range::<str, _>((Bound::Included(from.as_str()), Bound::Unbounded)).next()
        {
            let Some(rest) = path.strip_prefix(&prefix) else { break };
            let child = rest.split('/').next().unwrap_or(rest);
            from = format!("{prefix}{child}0"); // '0' follows '/', so this skips all that is below the child
            if path.len() == prefix.len() + child.len() && self.has_below(path) {
                from = format!("{prefix}{child}/");
            }
            if children.last().is_none_or(|last| last != child) {
                children.push(child.to_owned());
            }
        }
        children
    }

    /// Whether there is an object at `path` or below it.
    pub fn is_node(&self, path: &str) -> bool {
        self.all.contains_key(path) || self.has_below(path)
    }

    fn has_below(&self, path: &str) -> bool {
        self.below(path).next().is_some()
    }
}

/// The objects, shared.
#[derive(Debug, Default)]
pub struct Rows(RwLock<Objects>);

impl Rows {
    /// Looks at the objects; nothing changes until `look` returns.
    pub fn read<T>(&self, look: impl FnOnce(&Objects) -> T) -> T {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the objects; nobody looks until `change` returns.
    pub fn write<T>(&self, change: impl FnOnce(&mut Objects) -> T) -> T {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes something of many objects, and hands it to `send` while it is true.
    pub fn listing<T>(&self, make: impl Fn(&Objects) -> T, send: impl FnOnce(T)) {
        for _ in 0..TRIES {
            let copy = self.read(|objects| Objects { all: objects.all.clone(), version: objects.version });
            let made = make(&copy);
            let now = self.0.read().unwrap_or_else(PoisonError::into_inner);
            if now.version == copy.version {
                return send(made);
            }
        }
        self.read(|objects| send(make(objects)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(paths: &[&str]) -> Objects {
        let mut objects = Objects::default();
        for path in paths {
            objects.put(Object::new(*path, "a.b", Row::new(&[], &[])));
        }
        objects
    }

    #[test]
    fn children_are_one_level_and_named_once() {
        let objects =
            tree(&["/org/virt", "/org/virt/domain/_a", "/org/virt/domain/_a/snapshot/s", "/org/virt/domain/_ab"]);
        assert_eq!(objects.children("/"), ["org"]);
        assert_eq!(objects.children("/org"), ["virt"]);
        assert_eq!(objects.children("/org/virt"), ["domain"]);
        assert_eq!(objects.children("/org/virt/domain"), ["_a", "_ab"]);
        assert_eq!(objects.children("/org/virt/domain/_a"), ["snapshot"]);
        assert!(objects.children("/org/virt/domain/_ab").is_empty());
        assert!(objects.is_node("/") && objects.is_node("/org/virt/domain/_a/snapshot"));
        assert!(!objects.is_node("/org/vir") && !objects.is_node("/org/virt/domain/_a/snap"));
    }

    #[test]
    fn below_leaves_out_the_parent_and_namesakes() {
        let objects = tree(&["/org/virt", "/org/virt/job/1", "/org/virt2"]);
        let paths: Vec<_> = objects.below("/org/virt").map(|object| object.path.as_ref()).collect();
        assert_eq!(paths, ["/org/virt/job/1"]);
    }

    #[test]
    fn a_listing_is_true_when_it_is_sent() {
        let rows = Rows::default();
        let tries = std::cell::Cell::new(0);
        let make = |objects: &Objects| {
            tries.set(tries.get() + 1);
            if tries.get() <= TRIES {
                rows.write(|objects| objects.put(tree_object(tries.get())));
            }
            objects.all.len()
        };
        rows.listing(make, |count| assert_eq!(count, TRIES));
        assert_eq!(tries.get(), TRIES + 1);
    }

    fn tree_object(number: usize) -> Object {
        Object::new(format!("/o/{number}"), "a.b", Row::new(&[], &[]))
    }
}
