//! Which devices of the host are detached, a file each, until the host boots: what they were before.

use super::{Store, read_json, remove, replace_json};
use crate::error::Result;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use virt_model::driver::host_devices::DetachedDevice;

impl Store {
    pub(super) fn detached_folder(&self) -> PathBuf {
        self.paths.runtime.join("detached")
    }

    /// The file of a device, whose name has letters, digits and `_` only.
    fn detached_file(&self, name: &str) -> PathBuf {
        self.detached_folder().join(format!("{name}.json"))
    }

    /// Notes what a device is before it is detached.
    pub fn note_detached(&self, name: &str, before: &DetachedDevice) -> Result<()> {
        replace_json(&self.detached_file(name), before)
    }

    /// The host has it again.
    pub fn forget_detached(&self, name: &str) -> Result<()> {
        remove(&self.detached_file(name))
    }

    /// What a device was before it was detached, if that is known.
    pub fn detached_device(&self, name: &str) -> Option<DetachedDevice> {
        let file = self.detached_file(name);
        file.exists().then(|| read_json(&file).inspect_err(|e| tracing::warn!("{e}")).ok()).flatten()
    }

    /// All that are, or were being, detached. Of one whose note cannot be read, a driver of the host's is taken to have had it.
    pub fn detached_devices(&self) -> Vec<(Arc<str>, DetachedDevice)> {
        let entries = fs::read_dir(self.detached_folder()).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".json")?.into()));
        let noted = names.map(|name: Arc<str>| {
            let before = self.detached_device(&name);
            (name, before.unwrap_or(DetachedDevice { driver: Some(String::new()) }))
        });
        noted.collect()
    }
}
