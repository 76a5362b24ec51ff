//! Stored configurations as they are kept in memory: each as its text, beside the little that is asked of all machines at
//! once. A machine at rest costs less than what it says (`lines.rs`), and not the hundredfold which the typed view of it takes.
//!
//! Whoever wants the whole of one reads it when that is wanted ([`Readings`]); those who want the same one at a time share it.

use crate::error::{Error, Result};
use crate::facts::ConfigFacts;
use crate::images::{DiskImages, images_of};
use crate::lines::Text;
use crate::lock::lock;
use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use virt_model::domain::abi::AbiDifference;
use virt_model::domain::{DomainDef, Form};
use virt_model::xml::{Limits, unreadable};

/// How many that were read last stay read: a verb looks at a configuration more than once.
const RECENT: usize = 8;

/// The longest text of which that holds, in bytes.
const SMALL: usize = 32 << 10;

/// A stored configuration.
#[derive(Debug)]
pub(crate) struct StoredDef {
    /// No other of this virtd has it.
    number: u64,
    /// As it stands on disk: with all that is secret, and read once without a refusal.
    text: Text,
    /// The length of that, in bytes.
    bytes: usize,
    /// Whether there is nothing secret in the text, and nothing that is shown in another way; once that was looked at.
    plain: OnceLock<bool>,
    /// What is published of it.
    pub config: Arc<ConfigFacts>,
    /// The images of each disk.
    pub disks: Box<[DiskImages]>,
    /// The file of its firmware variables, if it names one.
    pub nvram: Option<Box<str>>,
}

impl StoredDef {
    /// Of a definition and its text, which has been read as that.
    pub fn new(def: &DomainDef, text: &str) -> StoredDef {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let nvram = def.os.nvram.as_ref().and_then(|nvram| nvram.path.as_deref());
        StoredDef {
            number: LAST.fetch_add(1, Ordering::Relaxed),
            text: Text::new(text),
            bytes: text.len(),
            plain: OnceLock::new(),
            config: Arc::new(ConfigFacts::of(def)),
            disks: images_of(def).collect(),
            nvram: nvram.map(Into::into),
        }
    }

    /// Writes a definition down; with what is read when it is read again. Error: why it could not be, within `limits`.
    pub fn write(def: &DomainDef, limits: Limits) -> Result<(StoredDef, DomainDef), String> {
        StoredDef::read_back(&StoredDef::text_of(def), limits)
    }

    /// The text as which a definition is stored.
    pub fn text_of(def: &DomainDef) -> String {
        let mut without = None;
        if def.places_volumes() {
            without.insert(def.clone()).forget_places_of_volumes();
        }
        without.as_ref().unwrap_or(def).write(Form::STORED)
    }

    /// What is read of such a text; error: why it cannot be, within `limits`.
    pub fn read_back(text: &str, limits: Limits) -> Result<(StoredDef, DomainDef), String> {
        let read = DomainDef::read_back(text, limits)?;
        Ok((StoredDef::new(&read, text), read))
    }

    /// Of a machine of another host, which needs nothing of this one: neither images nor networks nor devices.
    pub fn at_another_host(self) -> StoredDef {
        let config = Arc::new(ConfigFacts::clone(&self.config).at_another_host());
        StoredDef { config, disks: Box::default(), nvram: None, ..self }
    }

    /// What stands for a configuration that cannot be used.
    pub fn stand_in(def: &DomainDef) -> StoredDef {
        StoredDef::new(def, &def.write(Form::STORED))
    }

    /// Its text.
    pub fn text(&self) -> String {
        self.text.whole()
    }

    /// Its document in this form, if it is known to be the text.
    pub fn shown(&self, form: Form) -> Option<String> {
        (!form.migratable && self.plain.get() == Some(&true)).then(|| self.text())
    }

    /// The same where it has been read as `def`.
    pub fn shown_of(&self, form: Form, def: &DomainDef) -> String {
        self.plain.get_or_init(|| def.write(Form { inactive: true, ..Form::default() }) == self.text());
        self.shown(form).unwrap_or_else(|| def.write(form))
    }

    /// What it says otherwise than `running`, runtime facts aside.
    pub fn pending(&self, running: &DomainDef) -> Vec<AbiDifference> {
        if self.text() == running.write(Form::STORED) {
            return Vec::new();
        }
        // A file that an earlier virtd has written may say the same in another way.
        self.read().map(|own| running.pending_changes(&own)).unwrap_or_default()
    }

    /// The images that it names, those of disks with what they stand on, and its firmware variables.
    pub fn images(&self) -> impl Iterator<Item = &std::path::Path> {
        let disks = self.disks.iter().flat_map(|disk| disk.files.iter().map(PathBuf::as_path));
        disks.chain(self.nvram.as_deref().map(std::path::Path::new))
    }

    /// Reads the text: what nothing is said against, and of what stands for another what can be read.
    fn read(&self) -> Result<DomainDef> {
        let (def, findings) = DomainDef::parse_leniently_within(&self.text(), Limits::STORED);
        // It was read when it came here.
        def.ok_or_else(|| {
            Error::Internal(format!("a stored configuration is not read again: {}", unreadable(&findings)))
        })
    }
}

/// The stored configurations that somebody looks at, each read once.
#[derive(Debug, Default)]
pub(crate) struct Readings(Mutex<Shelf>);

#[derive(Debug, Default)]
struct Shelf {
    /// By their numbers. Of those that nobody has any more only the place is left, until another is read.
    read: HashMap<u64, Weak<DomainDef>>,
    /// The last that were read, if they are small.
    recent: VecDeque<Arc<DomainDef>>,
}

impl Readings {
    /// The definition that a stored configuration is. Takes some 100 µs, and more for long texts, if nobody has it now.
    pub fn of(&self, stored: &StoredDef) -> Result<Arc<DomainDef>> {
        if let Some(known) = lock(&self.0).read.get(&stored.number).and_then(Weak::upgrade) {
            return Ok(known);
        }
        Ok(self.keep(stored, Arc::new(stored.read()?)))
    }

    /// Somebody has read it, who may be the second; gives what all have.
    pub fn keep(&self, stored: &StoredDef, def: Arc<DomainDef>) -> Arc<DomainDef> {
        let mut shelf = lock(&self.0);
        shelf.read.retain(|_, def| def.strong_count() > 0);
        if let Some(known) = shelf.read.get(&stored.number).and_then(Weak::upgrade) {
            return known;
        }
        shelf.read.insert(stored.number, Arc::downgrade(&def));
        if stored.bytes <= SMALL {
            shelf.recent.truncate(RECENT - 1);
            shelf.recent.push_front(def.clone());
        }
        def
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(name: &str) -> StoredDef {
        let text = format!(
            "<domain type='test'><name>{name}</name><uuid>6f1c0d5e-6b1f-4c57-9c0e-0d0c3e6f9c01</uuid><memory>1</memory>\
             <description>{}</description></domain>",
            "x".repeat(if name == "long" { SMALL } else { 1 })
        );
        let def = DomainDef::parse(&text).expect("a definition");
        StoredDef::write(&def, Limits::ACCEPTED).expect("one that can be read").0
    }

    #[test]
    fn who_looks_at_the_same_one_shares_it_and_only_few_small_ones_stay() {
        let (readings, long) = (Readings::default(), stored("long"));
        let first = readings.of(&long).expect("read");
        assert!(Arc::ptr_eq(&first, &readings.of(&long).expect("read")));
        let gone = Arc::downgrade(&first);
        drop(first);
        assert!(gone.upgrade().is_none(), "nobody has it any more");
        let small: Vec<StoredDef> = (0..2 * RECENT).map(|number| stored(&number.to_string())).collect();
        let read: Vec<_> = small.iter().map(|one| Arc::downgrade(&readings.of(one).expect("read"))).collect();
        let kept: Vec<bool> = read.iter().map(|one| one.upgrade().is_some()).collect();
        assert_eq!(kept, [[false; RECENT], [true; RECENT]].concat());
        assert_eq!(lock(&readings.0).read.len(), RECENT + 1, "and the places of the others are free");
    }

    #[test]
    fn the_text_is_shown_as_it_is_unless_that_tells_or_hides_something() {
        let (inactive, secure) = (Form { inactive: true, ..Form::default() }, Form { secure: true, ..Form::default() });
        let machine = |passwd: &str| {
            let text = format!(
                "<domain type='qemu' id='7'><name>a</name><memory>1</memory>\
                 <devices><graphics type='vnc'{passwd}/></devices></domain>"
            );
            let def = DomainDef::parse(&text).expect("a definition");
            StoredDef::write(&def, Limits::ACCEPTED).expect("one that can be read")
        };
        let (stored, def) = machine("");
        assert_eq!(def.id, None, "nobody reads what is not kept");
        for form in [Form::default(), inactive, secure, Form::STORED] {
            assert_eq!(stored.shown_of(form, &def), def.write(form));
            assert_eq!(stored.shown(form), Some(stored.text()));
        }
        assert_eq!(stored.shown(Form { migratable: true, ..Form::default() }), None);
        let (stored, def) = machine(" passwd='s3cret'");
        for form in [Form::default(), inactive, secure, Form::STORED] {
            assert_eq!(stored.shown_of(form, &def), def.write(form));
            assert_eq!(stored.shown(form), None);
        }
        assert!(!stored.shown_of(inactive, &def).contains("s3cret"));
    }

    #[test]
    fn what_is_written_in_another_way_says_the_same() {
        let text = "<domain type='test'><uuid>6f1c0d5e-6b1f-4c57-9c0e-0d0c3e6f9c01</uuid><name>a</name><memory>1</memory></domain>";
        let def = DomainDef::parse(text).expect("a definition");
        assert_eq!(StoredDef::new(&def, text).pending(&def), []);
        assert!(!stored("b").pending(&def).is_empty());
    }
}
