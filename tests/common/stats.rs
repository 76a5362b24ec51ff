//! Statistics as a client reads them.

use super::client::{Domain, Refusal, options};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use zbus::{OwnedVariant, Variant};

type Dictionary = HashMap<String, OwnedVariant>;

/// The answer to `GetStats`.
#[derive(Debug)]
pub struct Told(Dictionary);

/// Asks for groups; for none in particular, if there are none.
pub async fn stats_of(domain: &Domain, groups: &[&str]) -> Result<Told, Refusal> {
    let groups = match groups {
        [] => options([]),
        some => options([("groups", Variant::from(some.to_vec()))]),
    };
    let reply = domain.call("GetStats", &(groups,)).await?;
    Ok(Told(reply.body().deserialize().expect("a{sv}")))
}

/// The same once all of these groups are in it: a busy host may leave one out.
pub async fn stats_with(domain: &Domain, groups: &[&str], wanted: &[&str]) -> Told {
    let begun = std::time::Instant::now();
    loop {
        let told = stats_of(domain, groups).await.expect("told");
        if wanted.iter().all(|group| told.groups().contains(group)) {
            return told;
        }
        assert!(begun.elapsed() < super::PATIENCE, "{wanted:?} are not all in {told:?}");
    }
}

fn dictionaries(value: &OwnedVariant) -> Vec<Dictionary> {
    let value = value.try_clone().expect("no descriptor");
    match value.value_signature().to_string().as_str() {
        "a{sv}" => vec![Dictionary::try_from(value).expect("a{sv}")],
        "aa{sv}" => Vec::<Dictionary>::try_from(value).expect("aa{sv}"),
        other => panic!("{other} is no group"),
    }
}

impl Told {
    /// Nothing in it is older.
    pub fn sampled_at(&self) -> u64 {
        u64::try_from(&*self.0["sampled-at"]).expect("t")
    }

    /// The groups there are.
    pub fn groups(&self) -> BTreeSet<&str> {
        self.0.keys().map(String::as_str).filter(|key| *key != "sampled-at").collect()
    }

    /// The keys of a group, or of the `at`th of it, each with its type.
    pub fn shape(&self, group: &str, at: usize) -> BTreeMap<String, String> {
        let one = dictionaries(&self.0[group]).remove(at);
        one.into_iter().map(|(key, value)| (key, value.value_signature().to_string())).collect()
    }

    /// How many there are in a group.
    pub fn count(&self, group: &str) -> usize {
        dictionaries(&self.0[group]).len()
    }

    /// A number of a group, or of the `at`th of it.
    pub fn number(&self, group: &str, at: usize, key: &str) -> u64 {
        let one = dictionaries(&self.0[group]).remove(at);
        u64::try_from(&*one[key]).unwrap_or_else(|_| panic!("{group}: {key} is no t"))
    }

    /// A word of a group, or of the `at`th of it.
    pub fn word(&self, group: &str, at: usize, key: &str) -> String {
        let one = dictionaries(&self.0[group]).remove(at);
        <&str>::try_from(&*one[key]).unwrap_or_else(|_| panic!("{group}: {key} is no s")).to_owned()
    }
}

/// A shape, of `key type` words.
pub fn shaped(words: &str) -> BTreeMap<String, String> {
    let mut words = words.split_whitespace();
    let mut shape = BTreeMap::new();
    while let (Some(key), Some(of)) = (words.next(), words.next()) {
        shape.insert(key.to_owned(), of.to_owned());
    }
    shape
}

/// What is told of a disk's traffic.
pub const TRAFFIC: &str = "read-requests t read-bytes t read-time-usec t write-requests t write-bytes t \
     write-time-usec t flush-requests t flush-time-usec t errors t threshold t";
/// What is told of its sizes.
pub const SIZES: &str = "target s allocation t capacity t physical t";
/// What is told of a vCPU that is there.
pub const VCPU: &str = "number u state s time-usec t wait-usec t halted b";
