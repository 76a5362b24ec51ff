//! Files that are nobody else's to write for a while: of what is under way, and devices of pools.

use super::Images;
use super::seen::{FileNumber, Seen};
use crate::lock::lock;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file that is taken.
pub(super) struct TakenFile {
    file: PathBuf,
    /// Other files that have bytes of it.
    overlapping: Vec<PathBuf>,
    whose: String,
}

impl TakenFile {
    /// Whether who writes that file writes bytes of it.
    fn has(&self, file: &Path, seen: &Seen) -> bool {
        seen.same_place(&self.file, file) || self.overlapping.iter().any(|other| seen.same(other, file))
    }
}

/// A file that nobody else writes while this lives, and which it was.
pub(crate) struct Taken(Arc<Images>, PathBuf, Option<FileNumber>);

impl Drop for Taken {
    fn drop(&mut self) {
        // By now it may be another file, or none.
        self.0.seen.forget(&self.1, self.2);
        lock(&self.0.taken).retain(|taken| taken.file != self.1);
    }
}

impl Images {
    /// Takes a file, which need not be there, to write it: until the result is dropped `whose` is named to whoever else would take
    /// it, or start a machine on it. Error: whose it is already.
    pub async fn take(self: &Arc<Self>, file: &Path, whose: String) -> Result<Taken, String> {
        self.take_device(file, Vec::new(), whose).await
    }

    /// The same of a device that has bytes in common with others: they are nobody else's, too, but for what has no byte of it.
    pub async fn take_device(
        self: &Arc<Self>,
        file: &Path,
        overlapping: Vec<PathBuf>,
        whose: String,
    ) -> Result<Taken, String> {
        let folder = file.parent().unwrap_or(file);
        self.seen.look(&[&[file.to_owned(), folder.to_owned()], &*overlapping].concat()).await;
        let mut taken = lock(&self.taken);
        let is_in_the_way = |other: &&TakenFile| {
            other.has(file, &self.seen) || overlapping.iter().any(|one| self.seen.same(one, &other.file))
        };
        if let Some(other) = taken.iter().find(is_in_the_way) {
            return Err(other.whose.clone());
        }
        taken.push(TakenFile { file: file.to_owned(), overlapping, whose });
        let number = self.seen.number_of(file);
        Ok(Taken(self.clone(), file.to_owned(), number))
    }

    /// What to tell of a file that nobody needs but who has taken it.
    pub(super) fn taken_text(&self, file: &Path, users: &[String]) -> Option<String> {
        let passes = users == self.takers_of(file);
        passes.then(|| format!("{} has {}; try again when that has ended", users.join(", "), file.display()))
    }

    /// Who has [taken](Images::take) a file, for people.
    pub(super) fn takers_of(&self, file: &Path) -> Vec<String> {
        let taken = lock(&self.taken);
        let these = taken.iter().filter(|taken| taken.has(file, &self.seen));
        these.map(|taken| taken.whose.clone()).collect()
    }
}
