//! Which machine has which image, over all machines, by the image: each machine says it whenever it changes. Who keeps volumes asks
//! here who uses them, and is told of changes.

use crate::images::DiskImages;
use crate::lock::lock;
use crate::object::{ObjectRef, Usage, User};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use uuid::Uuid;

type Listener = Box<dyn Fn(&[PathBuf]) + Send + Sync>;

/// See the module.
#[derive(Default)]
pub(crate) struct ImageUsers {
    /// It is held for moments, and nothing else is locked meanwhile.
    books: Mutex<Books>,
    listeners: Mutex<Vec<Listener>>,
}

#[derive(Default)]
struct Books {
    machines: HashMap<Uuid, BTreeSet<(PathBuf, User)>>,
    files: BTreeMap<PathBuf, BTreeSet<User>>,
}

impl fmt::Debug for ImageUsers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ImageUsers")
    }
}

impl ImageUsers {
    /// From now on the images whose users have changed are told to `listener`, while the machine's state is locked.
    pub fn listen(&self, listener: impl Fn(&[PathBuf]) + Send + Sync + 'static) {
        lock(&self.listeners).push(Box::new(listener));
    }

    /// The images that a machine has from now on, by what runs and by what is stored.
    pub fn are(&self, machine: Uuid, live: &[DiskImages], stored: &[DiskImages]) {
        let by = |how: Usage, disks: &[DiskImages]| {
            let of_disk = |disk: &DiskImages| {
                let user = User { object: ObjectRef::Domain(machine), place: disk.target.to_string(), how };
                disk.files.iter().map(|file| (file.clone(), user.clone())).collect::<Vec<_>>()
            };
            disks.iter().flat_map(of_disk).collect::<Vec<_>>()
        };
        let now: BTreeSet<(PathBuf, User)> =
            by(Usage::Live, live).into_iter().chain(by(Usage::Config, stored)).collect();
        let changed: Vec<PathBuf> = {
            let mut books = lock(&self.books);
            let before = books.machines.remove(&machine).unwrap_or_default();
            let changed: BTreeSet<PathBuf> = now.symmetric_difference(&before).map(|(file, _)| file.clone()).collect();
            for (file, user) in before.difference(&now) {
                let is_empty = books.files.get_mut(file).is_some_and(|all| all.remove(user) && all.is_empty());
                if is_empty {
                    books.files.remove(file);
                }
            }
            for (file, user) in now.difference(&before) {
                books.files.entry(file.clone()).or_default().insert(user.clone());
            }
            if !now.is_empty() {
                books.machines.insert(machine, now);
            }
            changed.into_iter().collect()
        };
        if !changed.is_empty() {
            lock(&self.listeners).iter().for_each(|listener| listener(&changed));
        }
    }

    /// Who has that image.
    pub fn of(&self, file: &Path) -> Vec<User> {
        lock(&self.books).files.get(file).into_iter().flatten().cloned().collect()
    }

    /// Who has images below a folder.
    pub fn below(&self, folder: &Path) -> Vec<User> {
        let books = lock(&self.books);
        let below = books.files.range(folder.to_owned()..).take_while(|(file, _)| file.starts_with(folder));
        let users: BTreeSet<&User> = below.flat_map(|(_, users)| users).collect();
        users.into_iter().cloned().collect()
    }

    /// All images below a folder, each with those who have it.
    pub fn images_below(&self, folder: &Path) -> Vec<(PathBuf, Vec<User>)> {
        let books = lock(&self.books);
        let below = books.files.range(folder.to_owned()..).take_while(|(file, _)| file.starts_with(folder));
        below.map(|(file, users)| (file.clone(), users.iter().cloned().collect())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn what_changes_is_told_and_who_has_an_image_is_known() {
        let users = ImageUsers::default();
        let told = Arc::new(Mutex::new(Vec::new()));
        let heard = told.clone();
        users.listen(move |changed| lock(&heard).extend_from_slice(changed));
        let disk = |target: &str, files: &[&str]| DiskImages {
            target: target.into(),
            files: files.iter().map(PathBuf::from).collect(),
        };
        let machine = Uuid::from_u128(7);
        let one = [disk("vda", &["/i/top", "/i/base"])];
        users.are(machine, &[], &one);
        users.are(machine, &one, &one);
        users.are(machine, &one, &one);
        let user = |how| User { object: ObjectRef::Domain(machine), place: "vda".into(), how };
        assert_eq!(users.of(Path::new("/i/base")), [user(Usage::Live), user(Usage::Config)]);
        assert_eq!(users.below(Path::new("/i")), [user(Usage::Live), user(Usage::Config)]);
        assert!(users.below(Path::new("/i/t")).is_empty() && users.below(Path::new("/j")).is_empty());
        users.are(machine, &[], &[]);
        assert!(users.of(Path::new("/i/base")).is_empty());
        let files = ["/i/base", "/i/top"].map(PathBuf::from);
        assert_eq!(*lock(&told), [files.clone(), files.clone(), files].concat(), "what stays as it is is not told");
    }
}
