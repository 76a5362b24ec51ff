//! What the files that snapshots froze looked like, so that one that has been written since is recognised.
//!
//! A file is told by its length and the time of its last write, to the nanosecond. Both survive copies that keep times (`cp -a`,
//! `rsync -a`, a file system's own snapshots) and any change of owner, mode or name; a copy that does not keep them looks as if
//! it had been written, and somebody who sets the time back goes unnoticed. What virtd itself writes to a frozen file (it removes
//! a snapshot that was inside) is noted anew. A device has no such time, and is not told.

use super::{Image, Operation};
use crate::host::files::open_plain;
use crate::host::image::Images;
use crate::host::own_file::replace_json;
use crate::host::resolve::Found;
use rustix::fs::FileType;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::driver::DriverError;

/// Where it is noted, in the folder of the machine's snapshots.
const FILE: &str = ".frozen.json";

/// The largest such note that is read, in bytes.
const LARGEST: u64 = 32 << 20;

/// How a file looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Look {
    bytes: u64,
    /// Seconds since the epoch, and nanoseconds.
    written: (i64, i64),
}

type Looks = BTreeMap<PathBuf, Look>;

impl Look {
    /// Of a plain file.
    fn at(path: &Path) -> Option<Look> {
        let found = Found::resolve(path).ok().filter(|found| found.kind() == FileType::RegularFile)?;
        let (stat, bytes) = (found.stat, u64::try_from(found.stat.st_size).ok()?);
        Some(Look { bytes, written: (stat.st_mtime, stat.st_mtime_nsec.try_into().ok()?) })
    }
}

impl Operation {
    /// Notes how files look that are frozen from now on. Without the note nobody will be warned, and nothing else is lost.
    pub(super) async fn note_frozen(&self, files: Vec<PathBuf>) {
        let folder = self.machine.folder.clone();
        let noted = self.with_images(&self.machine.folder, move |_: &Arc<Images>| {
            let mut looks = read(&folder);
            looks.extend(files.into_iter().filter_map(|file| Look::at(&file).map(|look| (file, look))));
            replace_json(&folder.join(FILE), &looks, true)
                .map_err(|e| DriverError::Storage(format!("{}: {e}", folder.join(FILE).display())))
        });
        if let Err(error) = noted.await {
            tracing::warn!(uuid = %self.machine.def.uuid, %error, "a change of frozen files will go unnoticed");
        }
    }

    /// Those of the files that have been written since they were frozen, as far as that was noted.
    pub(super) async fn changed_since_frozen(&self, files: Vec<PathBuf>) -> Result<Vec<PathBuf>, DriverError> {
        let folder = self.machine.folder.clone();
        self.with_images(&self.machine.folder, move |_| {
            let looks = read(&folder);
            let changed =
                |file: &PathBuf| looks.get(file).is_some_and(|look| Look::at(file).is_some_and(|now| now != *look));
            Ok(files.into_iter().filter(changed).collect())
        })
        .await
    }

    /// Those of the images that are noted as frozen, and look as they did then.
    pub(super) async fn still_frozen(&self, images: &[Image]) -> Vec<PathBuf> {
        let (folder, images) = (self.machine.folder.clone(), images.to_vec());
        let told = self.with_images(&self.machine.folder, move |_| {
            let looks = read(&folder);
            Ok(images.into_iter().filter(|image| looks.get(image).copied() == Look::at(image)).collect())
        });
        told.await.unwrap_or_default()
    }
}

fn read(folder: &Path) -> Looks {
    let text = open_plain(&folder.join(FILE), false).and_then(|file| file.read_all(LARGEST)).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}
