//! Which checkpoints a domain has, as values, and what was last told of them. Nothing here waits.

use crate::error::{Error, Result};
use crate::events::Event;
use crate::facts::CheckpointFacts;
use crate::shown::text::published;
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;
use virt_model::checkpoint::CheckpointDef;
use virt_model::xml::shorten;

/// The most checkpoints of one domain: each one's bitmaps lie in the memory of its hypervisor, and are kept at each write.
const MOST: usize = 256;

/// What a domain keeps of its checkpoints: each stands on the one before it.
#[derive(Debug, Default)]
pub(in crate::domain) struct CheckpointSet {
    /// In the order of their creation.
    all: Vec<Arc<CheckpointDef>>,
    /// As last told.
    told: BTreeMap<String, Arc<CheckpointFacts>>,
    /// What is told is no longer true.
    stale: bool,
}

impl CheckpointSet {
    /// From what was found on disk.
    pub(in crate::domain) fn new(found: Vec<CheckpointDef>) -> CheckpointSet {
        CheckpointSet { all: found.into_iter().map(Arc::new).collect(), stale: true, ..CheckpointSet::default() }
    }

    /// In the order of their creation.
    pub(in crate::domain) fn all(&self) -> &[Arc<CheckpointDef>] {
        &self.all
    }

    pub(super) fn get(&self, name: &str) -> Option<&Arc<CheckpointDef>> {
        self.all.iter().find(|def| def.name == name)
    }

    /// The one before it.
    pub(super) fn parent(&self, name: &str) -> Option<&str> {
        let at = self.all.iter().position(|def| def.name == name)?;
        Some(&self.all.get(at.checked_sub(1)?)?.name)
    }

    /// The number of the next one.
    pub(super) fn next_order(&self) -> u64 {
        self.all.iter().map(|def| def.order).max().map_or(1, |order| order.saturating_add(1))
    }

    /// Refuses one more where there are too many to be kept at each write of the guest.
    pub(super) fn room_for_another(&self, domain: &str) -> Result<()> {
        if self.all.len() < MOST {
            return Ok(());
        }
        Err(Error::LimitsExceeded(format!("domain '{domain}' has {MOST} checkpoints; delete some first")))
    }

    /// A new one, or one that is otherwise from now on.
    pub(super) fn put(&mut self, def: CheckpointDef) {
        self.stale = true;
        let def = Arc::new(def);
        match self.all.iter_mut().find(|other| other.name == def.name) {
            Some(other) => *other = def,
            None => self.all.push(def),
        }
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.stale = true;
        self.all.retain(|def| def.name != name);
    }

    /// All records are gone; images keep what they hold.
    pub(in crate::domain) fn forget(&mut self) {
        self.stale = true;
        self.all.clear();
    }

    /// What is new since it was last told goes to `there`, which ones are no more to `lost`. Of a domain that has `gone` there
    /// is none.
    pub(in crate::domain) fn news(&mut self, domain: Uuid, gone: bool, there: &mut Vec<Event>, lost: &mut Vec<Event>) {
        if !std::mem::take(&mut self.stale) && !gone {
            return;
        }
        let mut told = BTreeMap::new();
        let kept: &[Arc<CheckpointDef>] = if gone { &[] } else { &self.all };
        for (at, def) in kept.iter().enumerate() {
            let name = |at: Option<usize>| Some(kept.get(at?)?.name.clone());
            let facts = CheckpointFacts {
                domain,
                name: def.name.clone(),
                created_usec: def.created_usec,
                parent: name(at.checked_sub(1)),
                children: name(at.checked_add(1)).into_iter().collect(),
                broken: published(def.broken.as_deref().unwrap_or_default()).to_owned(),
            };
            let facts = match self.told.remove(&def.name) {
                Some(before) if *before == facts => before,
                _ => {
                    let facts = Arc::new(facts);
                    there.push(Event::Checkpoint(facts.clone()));
                    facts
                }
            };
            told.insert(def.name.clone(), facts);
        }
        lost.extend(std::mem::replace(&mut self.told, told).into_values().map(Event::CheckpointGone));
    }

    /// The refusal of who asks for one that is not there.
    pub(super) fn none_of(domain: &str, name: &str) -> Error {
        Error::NoSuchCheckpoint { domain: domain.to_owned(), checkpoint: shorten(name) }
    }
}
