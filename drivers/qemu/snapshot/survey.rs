//! What is there of the files that an operation is about: looked at in one go, where that may block, and then decided by.

use super::{Operation, parts};
use crate::host::files::Seen;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use virt_model::driver::DriverError;

/// What was found at some paths.
#[derive(Clone, Debug, Default)]
pub struct Survey(BTreeMap<PathBuf, Seen>);

impl Survey {
    /// Looks at the paths. Blocks.
    pub fn of(paths: impl IntoIterator<Item = PathBuf>) -> Survey {
        Survey(paths.into_iter().map(|path| (path.clone(), Seen::at(&path))).collect())
    }

    /// What was found there. Every path that is asked for is one that was looked at.
    pub fn at(&self, path: &Path) -> Seen {
        debug_assert!(self.0.contains_key(path), "{} was not looked at", path.display());
        self.0.get(path).cloned().unwrap_or_else(|| Seen::nothing(path))
    }

    /// Whether something was there.
    pub fn is_there(&self, path: &Path) -> bool {
        self.at(path).is_there()
    }

    /// Bytes on disk of what was there.
    pub fn size(&self, path: &Path) -> u64 {
        self.at(path).allocated
    }

    /// Whether two paths lead to one file.
    pub fn same(&self, one: &Path, other: &Path) -> bool {
        one == other || {
            let (one, other) = (self.at(one), self.at(other));
            one.is_there() && one.real == other.real
        }
    }
}

impl Operation {
    /// Looks at the paths, all in one errand.
    pub(super) async fn survey(&self, paths: impl IntoIterator<Item = PathBuf>) -> Result<Survey, DriverError> {
        let paths: Vec<PathBuf> = paths.into_iter().collect();
        let Some(first) = paths.first().cloned() else { return Ok(Survey::default()) };
        self.with_images(&first, move |_| Ok(Survey::of(paths))).await
    }

    /// Whether something is there.
    pub(super) async fn is_there(&self, path: &Path) -> Result<bool, DriverError> {
        Ok(self.survey([path.to_owned()]).await?.is_there(path))
    }

    /// Bytes on disk of what is there.
    pub(super) async fn size(&self, path: &Path) -> Result<u64, DriverError> {
        Ok(self.survey([path.to_owned()]).await?.size(path))
    }

    /// Where the machine keeps what is captured beside its disks.
    pub(super) fn own_parts(&self) -> Vec<PathBuf> {
        let def = &self.machine.def;
        parts::variables(def).map(|(path, _)| path).chain(parts::tpm(def, &self.state_dir)).collect()
    }
}
