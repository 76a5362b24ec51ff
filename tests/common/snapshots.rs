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
}
