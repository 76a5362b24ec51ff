//! A domain's snapshots, as a client plays with them.

use super::client::{Domain, Options, Refusal, options};
use std::collections::HashMap;
use zbus::{Message, ObjectPath, OwnedVariant, Variant};

const SNAPSHOT: &str = "org.virt.Snapshot";

/// Options that are flags.
pub fn with<'a>(pairs: impl IntoIterator<Item = (&'a str, bool)>) -> Options<'a> {
    options(pairs.into_iter().map(|(key, value)| (key, Variant::from(value))))
}

/// A domain whose snapshots are played with.
#[derive(Clone)]
pub struct Player {
    /// Whose they are.
    pub domain: Domain,
}

impl Player {
    /// The path of a snapshot.
    pub fn path(&self, name: &str) -> String {
        let mut label = String::new();
        for (index, byte) in name.bytes().enumerate() {
            match byte {
                b'0'..=b'9' if index == 0 => label.push_str(&format!("_{byte:02x}")),
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => label.push(byte.into()),
                _ => label.push_str(&format!("_{byte:02x}")),
            }
        }
        format!("{}/snapshot/{label}", self.domain.path)
    }

    /// Takes one; its path.
    pub async fn create(&self, xml: &str, options: Options<'_>) -> Result<String, Refusal> {
        let reply = self.domain.call("CreateSnapshot", &(xml, options)).await?;
        let (snapshot, _): (zbus::OwnedObjectPath, zbus::OwnedObjectPath) = reply.body().deserialize().expect("oo");
        Ok(snapshot.to_string())
    }

    /// Takes one, or finds that virtd has gone or refuses.
    pub async fn try_create(&self, xml: &str, options: Options<'_>) -> bool {
        self.domain.client.ask(&self.domain.path, "org.virt.Domain.CreateSnapshot", &(xml, options)).await
    }

    /// Calls a method of one, or finds that virtd has gone or refuses.
    pub async fn try_call(&self, name: &str, method: &str, options: Options<'_>) -> bool {
        self.domain.client.ask(&self.path(name), &format!("{SNAPSHOT}.{method}"), &(options,)).await
    }

    /// Takes one with nothing but a name.
    pub async fn take(&self, name: &str) -> String {
        let xml = format!("<domainsnapshot><name>{name}</name></domainsnapshot>");
        self.create(&xml, options([])).await.expect("taken")
    }

    /// Calls a method of one that takes options.
    pub async fn call(&self, name: &str, method: &str, options: Options<'_>) -> Result<Message, Refusal> {
        self.domain.client.call(&self.path(name), &format!("{SNAPSHOT}.{method}"), &(options,)).await
    }

    /// The answer of a check.
    pub async fn check(&self, name: &str, method: &str, options: Options<'_>) -> HashMap<String, OwnedVariant> {
        self.call(name, method, options).await.expect("told").body().deserialize().expect("a{sv}")
    }

    /// A property.
    pub async fn get<T>(&self, name: &str, property: &str) -> T
    where
        T: TryFrom<OwnedVariant>,
        T::Error: std::fmt::Debug,
    {
        self.domain.client.property(&self.path(name), SNAPSHOT, property).await
    }

    /// The document.
    pub async fn xml(&self, name: &str) -> String {
        self.call(name, "GetXML", options([])).await.expect("told").body().deserialize().expect("s")
    }

    /// All of them.
    pub async fn list(&self, options: Options<'_>) -> Vec<String> {
        let reply = self.domain.call("ListSnapshots", &(options,)).await.expect("listed");
        let paths: Vec<zbus::OwnedObjectPath> = reply.body().deserialize().expect("ao");
        paths.iter().map(ToString::to_string).collect()
    }

    /// The current one.
    pub async fn current(&self) -> String {
        self.domain.property::<ObjectPath<'static>>("CurrentSnapshot").await.to_string()
    }

    /// Takes so many, going back now and then, and deletes them in any order; holds the tree to what it should be.
    pub async fn grows_and_shrinks(&self, count: usize) {
        let mut model = Model::default();
        // The same dice each time.
        let mut dice = 12_345_u64;
        let mut roll = |sides: usize| {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (dice >> 33) as usize % sides
        };
        for number in 0..count {
            let name = format!("s{number}");
            self.take(&name).await;
            model.parents.insert(name.clone(), model.current.replace(name.clone()));
            model.order.push(name);
            if roll(4) == 0 {
                let back = model.order[roll(model.order.len())].clone();
                self.call(&back, "Revert", options([])).await.expect("reverted");
                model.current = Some(back);
            }
        }
        let paths: Vec<String> = model.order.iter().map(|name| self.path(name)).collect();
        assert_eq!(self.list(options([])).await, paths);
        while !model.order.is_empty() {
            let name = model.order[roll(model.order.len())].clone();
            let (key, mut doomed) = match roll(6) {
                0 => ("children", [model.below(&name), vec![name.clone()]].concat()),
                1 => ("children-only", model.below(&name)),
                _ => ("no-wait", vec![name.clone()]),
            };
            self.call(&name, "Delete", with([(key, key != "no-wait")])).await.expect("deleted");
            doomed.drain(..).for_each(|one| model.remove(&one));
            let current = model.current.as_ref().map_or_else(|| "/".to_owned(), |name| self.path(name));
            assert_eq!(self.current().await, current);
            let paths: Vec<String> = model.order.iter().map(|name| self.path(name)).collect();
            assert_eq!(self.list(options([])).await, paths);
            if let Some(name) = model.order.get(roll(model.order.len().max(1))) {
                let parent = model.parents[name].as_ref().map_or_else(|| "/".to_owned(), |parent| self.path(parent));
                assert_eq!(self.get::<ObjectPath<'static>>(name, "Parent").await.as_str(), parent);
            }
        }
    }
}

/// A tree as it should be: names in order, each with its parent, and the current one.
#[derive(Default)]
struct Model {
    order: Vec<String>,
    parents: HashMap<String, Option<String>>,
    current: Option<String>,
}

impl Model {
    fn below(&self, name: &str) -> Vec<String> {
        let children = self.order.iter().filter(|one| self.parents[*one].as_deref() == Some(name));
        children.flat_map(|child| [self.below(child), vec![child.clone()]].concat()).collect()
    }

    fn remove(&mut self, name: &str) {
        let parent = self.parents.remove(name).flatten();
        self.order.retain(|one| one != name);
        self.parents.values_mut().filter(|p| p.as_deref() == Some(name)).for_each(|p| p.clone_from(&parent));
        if self.current.as_deref() == Some(name) {
            self.current = parent;
        }
    }
}
