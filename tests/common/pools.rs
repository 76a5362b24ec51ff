//! Storage pools and their volumes, as a client has them.

use super::Daemon;
use super::client::{Client, Options, Refusal, options};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use zbus::{Message, ObjectPath, OwnedObjectPath, OwnedVariant};

/// The manager's interface of them.
pub const STORAGE: &str = "org.virt.Manager.Storage";
/// A pool's interface.
pub const POOL: &str = "org.virt.StoragePool";
/// A volume's interface.
pub const VOLUME: &str = "org.virt.StorageVolume";

/// A pool in a folder of the test's.
pub struct Pool {
    /// Whose calls they are.
    pub client: Client,
    /// Its path on the bus.
    pub path: String,
    /// Where the test finds its files.
    pub folder: PathBuf,
}

/// The document of a pool in a folder.
pub fn document(name: &str, folder: &Path) -> String {
    format!("<pool type='dir'><name>{name}</name><target><path>{}</path></target></pool>", folder.display())
}

/// A machine with one disk.
pub fn machine(name: &str, disk: &Path, format: &str) -> String {
    format!(
        "<domain type='test'><name>{name}</name><memory>65536</memory><vcpu>1</vcpu><os><type>hvm</type></os><devices>\
         <disk type='file'><driver name='qemu' type='{format}'/><source file='{}'/><target dev='vda' bus='virtio'/></disk>\
         </devices></domain>",
        disk.display()
    )
}

impl Pool {
    pub async fn define(client: &Client, name: &str, folder: &Path) -> Pool {
        Pool::of(client, &document(name, folder), folder).await
    }

    /// One with that document, whose files the test finds there.
    pub async fn of(client: &Client, xml: &str, folder: &Path) -> Pool {
        let reply = client.call("/org/virt", &format!("{STORAGE}.DefineStoragePool"), &(xml, options([]))).await;
        let path: OwnedObjectPath = reply.expect("defined").body().deserialize().expect("o");
        Pool { client: client.clone(), path: path.to_string(), folder: folder.to_owned() }
    }

    /// One that is built and started.
    pub async fn started(daemon: &Daemon, client: &Client, name: &str) -> Pool {
        let pool = Pool::define(client, name, &daemon.folder().join(name)).await;
        pool.run("Start", options([("build", true.into())])).await.expect("started");
        pool
    }

    pub async fn run(&self, method: &str, options: Options<'_>) -> Result<Message, Refusal> {
        self.client.call(&self.path, &format!("{POOL}.{method}"), &(options,)).await
    }

    pub async fn get<T>(&self, name: &str) -> T
    where
        T: TryFrom<OwnedVariant>,
        T::Error: std::fmt::Debug,
    {
        self.client.property(&self.path, POOL, name).await
    }

    pub async fn add(&self, name: &str, capacity: u64, options: Options<'_>) -> Result<Volume, Refusal> {
        let reply = self.client.call(&self.path, &format!("{POOL}.AddVolume"), &(name, capacity, options)).await?;
        Ok(self.made(&reply))
    }

    pub async fn create(&self, xml: &str, options: Options<'_>) -> Result<Volume, Refusal> {
        let reply = self.client.call(&self.path, &format!("{POOL}.CreateVolume"), &(xml, options)).await?;
        Ok(self.made(&reply))
    }

    pub fn made(&self, reply: &Message) -> Volume {
        let (path, _job): (OwnedObjectPath, OwnedObjectPath) = reply.body().deserialize().expect("oo");
        Volume { client: self.client.clone(), path: path.to_string() }
    }

    pub async fn volume(&self, name: &str) -> Result<Volume, Refusal> {
        let reply = self.client.call(&self.path, &format!("{POOL}.GetVolume"), &(name,)).await?;
        let path: OwnedObjectPath = reply.body().deserialize().expect("o");
        Ok(Volume { client: self.client.clone(), path: path.to_string() })
    }

    /// Name, format and capacity of each volume.
    pub async fn list(&self) -> Vec<(String, String, u64)> {
        let reply = self.run("ListVolumes", options([])).await.expect("listed");
        let all: Vec<(OwnedObjectPath, String, String, u64, u64)> = reply.body().deserialize().expect("a(osstt)");
        all.into_iter().map(|(_, name, format, capacity, _)| (name, format, capacity)).collect()
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// All names in the folder.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.folder).expect("a folder");
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// A volume.
pub struct Volume {
    /// Whose calls they are.
    pub client: Client,
    /// Its path on the bus.
    pub path: String,
}

impl Volume {
    pub async fn run(&self, method: &str, options: Options<'_>) -> Result<Message, Refusal> {
        self.client.call(&self.path, &format!("{VOLUME}.{method}"), &(options,)).await
    }

    pub async fn with<B>(&self, method: &str, body: &B) -> Result<Message, Refusal>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        self.client.call(&self.path, &format!("{VOLUME}.{method}"), body).await
    }

    pub async fn get<T>(&self, name: &str) -> T
    where
        T: TryFrom<OwnedVariant>,
        T::Error: std::fmt::Debug,
    {
        self.client.property(&self.path, VOLUME, name).await
    }

    pub async fn users(&self) -> Vec<(String, String, String)> {
        let users: Vec<(ObjectPath<'static>, String, String)> = self.get("Users").await;
        users.into_iter().map(|(object, place, how)| (object.to_string(), place, how)).collect()
    }

    pub async fn check(&self, method: &str, options: Options<'_>) -> HashMap<String, OwnedVariant> {
        self.run(method, options).await.expect("told").body().deserialize().expect("a{sv}")
    }
}
