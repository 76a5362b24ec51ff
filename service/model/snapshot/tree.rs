//! Which snapshots a domain has, who is whose child, and which is current: a plain value. No loop, no parent that is not
//! there, at most one current one, whatever is done to it.

use std::collections::{HashMap, HashSet};

/// Snapshots in the order of their creation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotTree<T> {
    nodes: Vec<Node<T>>,
    current: Option<String>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node<T> {
    /// Unique.
    pub name: String,
    /// `None` for a root.
    pub parent: Option<String>,
    /// What it is.
    pub content: T,
}

impl<T> Default for SnapshotTree<T> {
    fn default() -> Self {
        SnapshotTree { nodes: Vec::new(), current: None }
    }
}

impl<T> SnapshotTree<T> {
    /// From records that may contradict each other: a parent that is missing, or a loop, makes a root. Gives the names of
    /// those.
    pub fn from_records(records: Vec<Node<T>>, current: Option<String>) -> (SnapshotTree<T>, Vec<String>) {
        let mut tree = SnapshotTree { nodes: records, current: None };
        let mut mended = Vec::new();
        let places: HashMap<String, usize> =
            tree.nodes.iter().enumerate().map(|(index, node)| (node.name.clone(), index)).collect();
        let mut above: Vec<Option<usize>> =
            tree.nodes.iter().map(|node| places.get(node.parent.as_ref()?).copied()).collect();
        // Those from which a root is reached.
        let mut sound = vec![false; above.len()];
        for start in 0..above.len() {
            let mut way = Vec::new();
            let mut on_it = HashSet::new();
            let mut at = start;
            while !sound[at] && on_it.insert(at) {
                way.push(at);
                match above[at] {
                    // A loop: it is opened where it was entered.
                    Some(parent) if on_it.contains(&parent) => above[parent] = None,
                    Some(parent) => at = parent,
                    None => {}
                }
            }
            way.into_iter().for_each(|index| sound[index] = true);
        }
        for (node, above) in tree.nodes.iter_mut().zip(above) {
            if node.parent.is_some() && above.is_none() {
                node.parent = None;
                mended.push(node.name.clone());
            }
        }
        tree.current = current.filter(|name| tree.get(name).is_some());
        (tree, mended)
    }

    /// All, in the order of their creation.
    pub fn iter(&self) -> impl Iterator<Item = &Node<T>> {
        self.nodes.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// One of them.
    pub fn get(&self, name: &str) -> Option<&Node<T>> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The same, to be changed; its place is not.
    pub fn content_mut(&mut self, name: &str) -> Option<&mut T> {
        self.nodes.iter_mut().find(|node| node.name == name).map(|node| &mut node.content)
    }

    /// The current one.
    pub fn current(&self) -> Option<&str> {
        self.current.as_deref()
    }

    /// Makes one current, or none. One that is not there changes nothing.
    pub fn set_current(&mut self, name: Option<&str>) {
        if name.is_none_or(|name| self.get(name).is_some()) {
            self.current = name.map(str::to_owned);
        }
    }

    /// All below one, each before its parent.
    pub fn descendants(&self, name: &str) -> Vec<String> {
        let mut below: HashMap<&str, Vec<&str>> = HashMap::new();
        for node in &self.nodes {
            below.entry(node.parent.as_deref().unwrap_or_default()).or_default().push(&node.name);
        }
        // Parents first, and of children the last first; then the other way round.
        let mut found = Vec::new();
        let mut open = vec![name];
        while let Some(at) = open.pop() {
            found.push(at.to_owned());
            open.extend(below.get(at).into_iter().flatten());
        }
        found.remove(0);
        found.reverse();
        found
    }

    /// Whether `name` is `above` or below it. Ends in a loop, too.
    pub fn is_below(&self, name: &str, above: &str) -> bool {
        let mut at = Some(name);
        for _ in 0..=self.nodes.len() {
            match at {
                None => return false,
                Some(name) if name == above => return true,
                Some(name) => at = self.get(name).and_then(|node| node.parent.as_deref()),
            }
        }
        true
    }

    /// Adds one, or replaces what is there under that name, its place in the order kept. A parent that is not there, or is
    /// below it, makes it a root.
    pub fn put(&mut self, name: &str, parent: Option<&str>, content: T) {
        let fits = |parent: &&str| self.get(parent).is_some() && !self.is_below(parent, name);
        let parent = parent.filter(fits).map(str::to_owned);
        let node = Node { name: name.to_owned(), parent, content };
        match self.nodes.iter_mut().find(|node| node.name == name) {
            Some(there) => *there = node,
            None => self.nodes.push(node),
        }
    }

    /// Takes one out: its children become its parent's, and so does being current.
    pub fn remove(&mut self, name: &str) -> Option<Node<T>> {
        let index = self.nodes.iter().position(|node| node.name == name)?;
        let gone = self.nodes.remove(index);
        for node in self.nodes.iter_mut().filter(|node| node.parent.as_deref() == Some(name)) {
            node.parent.clone_from(&gone.parent);
        }
        if self.current.as_deref() == Some(name) {
            self.current.clone_from(&gone.parent);
        }
        Some(gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// What a tree must be: name to parent, and the current one.
    #[derive(Default)]
    struct Plain {
        parents: BTreeMap<String, Option<String>>,
        order: Vec<String>,
        current: Option<String>,
    }

    #[derive(Clone, Debug)]
    enum Deed {
        Create,
        Delete(usize),
        DeleteBelow(usize),
        MakeCurrent(usize),
        Forget,
    }

    fn deed() -> impl Strategy<Value = Deed> {
        let some = 0..1000usize;
        prop_oneof![
            5 => Just(Deed::Create),
            3 => some.clone().prop_map(Deed::Delete),
            1 => some.clone().prop_map(Deed::DeleteBelow),
            2 => some.prop_map(Deed::MakeCurrent),
            1 => Just(Deed::Forget),
        ]
    }

    impl Plain {
        fn remove(&mut self, name: &str) {
            let parent = self.parents.remove(name).flatten();
            self.order.retain(|other| other != name);
            for other in self.parents.values_mut().filter(|p| p.as_deref() == Some(name)) {
                other.clone_from(&parent);
            }
            if self.current.as_deref() == Some(name) {
                self.current = parent;
            }
        }
    }

    proptest! {
        #[test]
        fn it_is_what_was_done_to_it(deeds in prop::collection::vec(deed(), 1..200)) {
            let (mut tree, mut plain) = (SnapshotTree::default(), Plain::default());
            for (number, deed) in deeds.into_iter().enumerate() {
                let pick = |n: usize| (!plain.order.is_empty()).then(|| plain.order[n % plain.order.len()].clone());
                match deed {
                    Deed::Create => {
                        let name = format!("s{number}");
                        let parent = tree.current().map(str::to_owned);
                        tree.put(&name, parent.as_deref(), number);
                        tree.set_current(Some(&name));
                        plain.parents.insert(name.clone(), plain.current.clone());
                        plain.order.push(name.clone());
                        plain.current = Some(name);
                    }
                    Deed::Delete(n) => {
                        if let Some(name) = pick(n) {
                            prop_assert!(tree.remove(&name).is_some());
                            plain.remove(&name);
                        }
                    }
                    Deed::DeleteBelow(n) => {
                        if let Some(name) = pick(n) {
                            for below in tree.descendants(&name) {
                                prop_assert!(!tree.iter().any(|node| node.parent.as_deref() == Some(&*below)), "deepest first");
                                tree.remove(&below);
                                plain.remove(&below);
                            }
                        }
                    }
                    Deed::MakeCurrent(n) => {
                        if let Some(name) = pick(n) {
                            tree.set_current(Some(&name));
                            plain.current = Some(name);
                        }
                    }
                    Deed::Forget => {
                        tree.set_current(None);
                        plain.current = None;
                    }
                }
                let now: Vec<_> = tree.iter().map(|node| node.name.clone()).collect();
                prop_assert_eq!(&now, &plain.order);
                prop_assert_eq!(tree.current(), plain.current.as_deref());
                for node in tree.iter() {
                    prop_assert_eq!(&node.parent, &plain.parents[&node.name]);
                }
            }
        }
    }

    #[test]
    fn records_that_contradict_each_other_make_roots() {
        let node = |name: &str, parent: Option<&str>| Node {
            name: name.to_owned(),
            parent: parent.map(str::to_owned),
            content: (),
        };
        let records = vec![node("a", Some("b")), node("b", Some("a")), node("c", Some("gone")), node("d", Some("c"))];
        let (tree, mended) = SnapshotTree::from_records(records, Some("gone".to_owned()));
        assert_eq!(mended, ["a", "c"]);
        assert_eq!(tree.get("b").and_then(|node| node.parent.as_deref()), Some("a"));
        assert_eq!(tree.descendants("c"), ["d"]);
        assert_eq!(tree.current(), None);
    }
}
