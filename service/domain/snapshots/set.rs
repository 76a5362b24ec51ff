//! Which snapshots a domain has, as values: the tree of their records, and what was last told of them. Nothing here waits.

use crate::error::{Error, Result};
use crate::events::Event;
use crate::facts::SnapshotFacts;
use crate::lock::lock;
use crate::store::{Deed, Intent, Loaded, Record};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use uuid::Uuid;
use virt_model::driver::snapshots::{DiskMode, DiskPart, MemoryMode};
use virt_model::snapshot::{Node, SnapshotDef, SnapshotTree};

/// An operation that has begun and not ended; whoever finds one with the turn in its hand finds it unfinished.
pub(super) type Open = Arc<Mutex<Option<Intent>>>;

/// The most snapshots of one domain.
const MOST: usize = 10_000;

/// The most that a property tells of: each change of it goes to everybody who listens.
const MOST_TOLD: usize = 1_000;

/// What a domain keeps of its snapshots.
#[derive(Debug, Default)]
pub(in crate::domain) struct SnapshotSet {
    pub(super) tree: SnapshotTree<Arc<Record>>,
    /// As last told.
    told: BTreeMap<String, Arc<SnapshotFacts>>,
    /// What is told is no longer true.
    stale: bool,
    /// What has begun and not ended.
    pub(super) open: Open,
    /// Why it is not known what there is, if so.
    broken: Option<String>,
}

impl SnapshotSet {
    /// From what was found on disk.
    pub(in crate::domain) fn new(loaded: Loaded) -> SnapshotSet {
        let node = |record: Record| Node {
            name: record.name.clone(),
            parent: record.def.as_ref().ok().and_then(|def| def.parent.clone()),
            content: Arc::new(record),
        };
        let records = loaded.records.into_iter().map(node).collect();
        let (tree, mended) = SnapshotTree::from_records(records, loaded.current);
        for name in mended {
            tracing::warn!(snapshot = name, "its parent is not there; it is a root now");
        }
        SnapshotSet {
            tree,
            stale: true,
            open: Arc::new(Mutex::new(loaded.intent)),
            broken: loaded.broken,
            ..SnapshotSet::default()
        }
    }

    pub(in crate::domain) fn current(&self) -> Option<&str> {
        self.tree.current()
    }

    pub(in crate::domain) fn count(&self) -> u32 {
        u32::try_from(self.tree.len()).unwrap_or(u32::MAX)
    }

    /// Whether there are others than when they were last told.
    pub(in crate::domain) fn is_stale(&self) -> bool {
        self.stale
    }

    /// The names of the newest, in the order in which they are listed.
    pub(in crate::domain) fn newest(&self) -> Arc<[String]> {
        self.tree.iter().skip(self.tree.len().saturating_sub(MOST_TOLD)).map(|node| node.name.clone()).collect()
    }

    /// Why it is not known what there is, if so.
    pub(in crate::domain) fn why_broken(&self) -> Option<String> {
        self.broken.clone()
    }

    /// Whether what has begun and not ended is a managed save.
    pub(in crate::domain) fn saves_for_next_start(&self) -> bool {
        matches!(&*lock(&self.open), Some(Intent { deed: Deed::Save { managed: true, .. }, .. }))
    }

    /// All records are gone; images keep what they hold.
    pub(in crate::domain) fn forget(&mut self) {
        self.broken = None;
        *self.change() = SnapshotTree::default();
        *lock(&self.open) = None;
    }

    /// What those say that can be read.
    pub(in crate::domain) fn defs(&self) -> impl Iterator<Item = &SnapshotDef> {
        self.tree.iter().filter_map(|node| node.content.def.as_ref().ok())
    }

    pub(super) fn change(&mut self) -> &mut SnapshotTree<Arc<Record>> {
        self.stale = true;
        &mut self.tree
    }

    pub(super) fn get(&self, name: &str) -> Option<Arc<Record>> {
        self.tree.get(name).map(|node| node.content.clone())
    }

    /// Refuses one more where there are too many for anybody to look through.
    pub(super) fn room_for_another(&self, domain: &str) -> Result<()> {
        if self.tree.len() < MOST {
            return Ok(());
        }
        Err(Error::LimitsExceeded(format!("domain '{domain}' has {MOST} snapshots; delete some first")))
    }

    pub(super) fn next_order(&self) -> u64 {
        self.tree.iter().map(|node| node.content.order).filter(|order| *order < u64::MAX).max().map_or(1, |n| n + 1)
    }

    /// What is new since it was last told: what is there, and which ones are not any more. Of a domain that has `gone`
    /// there is none. What others lead to is told before them, and goes after them.
    pub(in crate::domain) fn news(&mut self, domain: Uuid, gone: bool) -> (Vec<Event>, Vec<Event>) {
        if !std::mem::take(&mut self.stale) && !gone {
            return Default::default();
        }
        let now: Vec<SnapshotFacts> = if gone { Vec::new() } else { self.all_facts(domain) };
        let (mut new, mut changed) = (Vec::new(), Vec::new());
        let mut told = BTreeMap::new();
        for facts in now {
            let before = self.told.remove(&facts.name);
            let events = if before.is_none() { &mut new } else { &mut changed };
            let facts = match before {
                Some(before) if *before == facts => before,
                _ => {
                    let facts = Arc::new(facts);
                    events.push(Event::Snapshot(facts.clone()));
                    facts
                }
            };
            told.insert(facts.name.clone(), facts);
        }
        new.append(&mut changed);
        (new, std::mem::replace(&mut self.told, told).into_values().map(Event::SnapshotGone).collect())
    }

    fn all_facts(&self, domain: Uuid) -> Vec<SnapshotFacts> {
        // Once for all of them: to look for each one's children would be to compare all names with all.
        let mut children: HashMap<&str, Vec<String>> = HashMap::new();
        for node in self.tree.iter() {
            children.entry(node.parent.as_deref().unwrap_or_default()).or_default().push(node.name.clone());
        }
        // Of those, too, the newest are told: each of them tells its parent.
        children.values_mut().for_each(|all| drop(all.drain(..all.len().saturating_sub(MOST_TOLD))));
        let of = |node: &Node<Arc<Record>>| children.get(&*node.name).cloned().unwrap_or_default();
        self.tree.iter().map(|node| self.facts(domain, node, of(node))).collect()
    }

    fn facts(&self, domain: Uuid, node: &Node<Arc<Record>>, children: Vec<String>) -> SnapshotFacts {
        let def = node.content.def.as_ref();
        SnapshotFacts {
            domain,
            name: node.name.clone(),
            broken: def.err().cloned().unwrap_or_default(),
            description: def.ok().and_then(|def| def.description.clone()).unwrap_or_default(),
            created_usec: node.content.created_usec,
            state: def.map_or("", |def| def.state.as_str()),
            parent: node.parent.clone(),
            children,
            is_current: self.tree.current() == Some(&node.name),
            memory: def.map_or("no", |def| memory_word(&def.memory)),
            disks: def.map(|def| def.disks.iter().map(|disk| told_disk(disk, def)).collect()).unwrap_or_default(),
        }
    }
}

fn memory_word(memory: &MemoryMode) -> &'static str {
    match memory {
        MemoryMode::No => "no",
        MemoryMode::Internal => "internal",
        MemoryMode::External(_) => "external",
    }
}

/// Target, mode and file: of an external disk the overlay, of an internal one the image that holds it.
fn told_disk(disk: &DiskPart, def: &SnapshotDef) -> (String, &'static str, String) {
    let image = || {
        let disks = def.domain.iter().flat_map(|domain| &domain.devices.disks);
        let found = disks.filter(|other| other.target.dev == disk.target).find_map(|disk| disk.path());
        found.unwrap_or_default().to_owned()
    };
    let (mode, file) = match &disk.mode {
        DiskMode::No => ("no", String::new()),
        DiskMode::Internal => ("internal", image()),
        DiskMode::External { path, .. } => ("external", path.to_string_lossy().into_owned()),
        DiskMode::Remote { shown } => ("external", shown.clone()),
        DiskMode::Manual => ("manual", String::new()),
    };
    (disk.target.clone(), mode, file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use virt_model::snapshot::SnapshotState;

    fn of_name(name: &str) -> SnapshotDef {
        SnapshotDef {
            name: name.to_owned(),
            description: None,
            state: SnapshotState::DiskSnapshot,
            parent: None,
            created: 0,
            memory: MemoryMode::No,
            disks: Vec::new(),
            merging: Default::default(),
            kept: Vec::new(),
            of: None,
            domain: None,
            inactive: None,
            captured: Vec::new(),
            cpu: None,
            cookie: None,
        }
    }

    #[test]
    fn of_more_than_a_property_tells_the_newest_are_told() {
        let record = |order: u64| Record {
            name: format!("s{order}"),
            def: Err("not read".to_owned()),
            order,
            created_usec: order,
            record: serde_json::Value::Null,
        };
        let of =
            |many: u64| SnapshotSet::new(Loaded { records: (1..=many).map(record).collect(), ..Loaded::default() });
        assert_eq!(*of(2).newest(), ["s1", "s2"]);
        let (set, told) = (of(1_003), of(1_003).newest());
        assert_eq!((set.count(), told.len()), (1_003, MOST_TOLD));
        assert_eq!([&*told[0], &*told[999]], ["s4", "s1003"]);

        let child = |order: u64| {
            let def = SnapshotDef { parent: (order > 1).then(|| "s1".to_owned()), ..of_name(&format!("s{order}")) };
            Record { def: Ok(def), ..record(order) }
        };
        let broad = SnapshotSet::new(Loaded { records: (1..=1_003).map(child).collect(), ..Loaded::default() });
        let facts = broad.all_facts(Uuid::nil());
        let first = facts.iter().find(|facts| facts.name == "s1").expect("the first");
        assert_eq!((first.children.len(), &*first.children[0]), (MOST_TOLD, "s4"));
        assert!(facts.iter().all(|facts| facts.name == "s1" || facts.parent.as_deref() == Some("s1")));
    }
}
