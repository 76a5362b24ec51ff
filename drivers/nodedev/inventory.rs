//! Which devices there are, by their folders in sysfs, and what is told when one of them changes.
//!
//! Two folders may give one name, as `eth0.5` and `eth0_5` do: the first in the order of folders has it, and the other when
//! that has gone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::driver::host_devices::DeviceNews;
use virt_model::nodedev::NodeDevice;

/// See the module.
#[derive(Debug, Default)]
pub struct Inventory {
    devices: BTreeMap<PathBuf, Arc<NodeDevice>>,
    names: HashMap<Arc<str>, BTreeSet<PathBuf>>,
}

impl Inventory {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.devices.len()
    }

    /// Whether one is in this folder.
    pub fn has(&self, folder: &Path) -> bool {
        self.devices.contains_key(folder)
    }

    /// The folder of the device of that name.
    pub fn folder(&self, name: &str) -> Option<&Path> {
        self.names.get(name)?.first().map(PathBuf::as_path)
    }

    /// The folders of all.
    pub fn folders(&self) -> impl Iterator<Item = &PathBuf> {
        self.devices.keys()
    }

    /// The devices below that folder, itself included.
    pub fn below(&self, folder: &Path) -> impl Iterator<Item = (&PathBuf, &Arc<NodeDevice>)> {
        self.devices.range(folder.to_owned()..).take_while(move |(path, _)| path.starts_with(folder))
    }

    /// What is in this folder now; what there is to tell of that.
    pub fn put(&mut self, folder: &Path, now: Option<NodeDevice>) -> Vec<DeviceNews> {
        let known = self.devices.get(folder);
        if known.map(|known| &**known) == now.as_ref() {
            return Vec::new();
        }
        let names: BTreeSet<Arc<str>> =
            known.map(|known| known.name.clone()).into_iter().chain(now.as_ref().map(|now| now.name.clone())).collect();
        let before: Vec<_> = names.iter().map(|name| self.shown(name)).collect();
        if let Some(old) = self.devices.remove(folder)
            && let Some(folders) = self.names.get_mut(&old.name)
        {
            folders.remove(folder);
            if folders.is_empty() {
                self.names.remove(&old.name);
            }
        }
        if let Some(now) = now {
            self.names.entry(now.name.clone()).or_default().insert(folder.to_owned());
            self.devices.insert(folder.to_owned(), Arc::new(now));
        }
        let (mut gone, mut is) = (Vec::new(), Vec::new());
        for (name, before) in names.into_iter().zip(before) {
            match (before, self.shown(&name)) {
                (Some(_), None) => gone.push(DeviceNews::Gone(name)),
                (before, Some(now)) if before.as_ref() != Some(&now) => is.push(DeviceNews::Is(now)),
                _ => {}
            }
        }
        gone.into_iter().chain(is).collect()
    }

    /// The device of that name.
    pub fn shown(&self, name: &str) -> Option<Arc<NodeDevice>> {
        self.devices.get(self.folder(name)?).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virt_model::nodedev::{About, Maker};

    fn device(name: &str, kind: &str) -> NodeDevice {
        NodeDevice {
            name: name.into(),
            parent: None,
            sys_path: String::new(),
            nodes: Vec::new(),
            driver: None,
            vendor: Maker::default(),
            product: Maker::default(),
            about: About::ScsiTarget(kind.to_owned()),
        }
    }

    fn told(news: &[DeviceNews]) -> Vec<String> {
        let word = |news: &DeviceNews| match news {
            DeviceNews::Is(device) => match &device.about {
                About::ScsiTarget(kind) => format!("{} is {kind}", device.name),
                _ => String::new(),
            },
            DeviceNews::Gone(name) => format!("{name} gone"),
            DeviceNews::AllTold => "all".to_owned(),
        };
        news.iter().map(word).collect()
    }

    #[test]
    fn what_changes_is_told_once_and_of_two_of_one_name_the_first() {
        let (mut all, one, two) = (Inventory::default(), Path::new("/devices/1"), Path::new("/devices/2"));
        assert_eq!(told(&all.put(two, Some(device("a", "two")))), ["a is two"]);
        assert_eq!(told(&all.put(two, Some(device("a", "two")))), [""; 0]);
        assert_eq!(told(&all.put(one, Some(device("a", "one")))), ["a is one"]);
        assert_eq!(told(&all.put(two, Some(device("a", "new")))), [""; 0], "nobody sees it");
        assert_eq!(told(&all.put(one, Some(device("b", "one")))), ["a is new", "b is one"]);
        assert_eq!(all.folder("b"), Some(one));
        assert_eq!(told(&all.put(one, None)), ["b gone"]);
        assert_eq!(told(&all.put(two, Some(device("c", "two")))), ["a gone", "c is two"]);
        assert_eq!(told(&all.put(one, None)), [""; 0]);
        assert_eq!((all.len(), all.folder("a")), (1, None));
    }
}
