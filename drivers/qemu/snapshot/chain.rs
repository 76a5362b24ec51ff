//! What stands on what: as QEMU and the images say it, held to what is recorded before anything is merged.

use super::Operation;
use super::delete::{JobStatus, Leaf, Plan};
use super::note::Merge;
use super::survey::Survey;
use crate::qemu::block::file_of;
use crate::qemu::monitor::Monitor;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use virt_model::device::Disk;
use virt_model::driver::DriverError;
use virt_model::driver::block_jobs::ImageLayer;
use virt_model::driver::snapshots::ExistingSnapshot;

/// The chains of a running guest's drives: each file, then what it stands on. Filters are not in them.
#[derive(Debug, Default)]
pub struct Chains(Vec<Vec<PathBuf>>);

impl Chains {
    /// Asks QEMU.
    pub async fn ask(line: &Monitor) -> Result<Chains, DriverError> {
        let told = line.patiently("query-block", json!({})).await?;
        let images = told.as_array().into_iter().flatten().map(|drive| &drive["inserted"]["image"]);
        Ok(Chains(images.map(chain).collect()))
    }

    /// All files in them.
    fn files(&self) -> impl Iterator<Item = PathBuf> {
        self.0.iter().flatten().cloned()
    }

    /// What the file stands on in a drive's chain; `survey` has seen both.
    fn below(&self, file: &Path, survey: &Survey) -> Option<&Path> {
        let mut links = self.0.iter().flat_map(|chain| chain.windows(2));
        links.find(|link| survey.same(&link[0], file)).map(|link| &*link[1])
    }
}

/// The files that a drive's image stands on, its own first.
pub fn chain(mut image: &Value) -> Vec<PathBuf> {
    let mut files = Vec::new();
    while let Some(file) = image["filename"].as_str() {
        files.push(file_of(file));
        image = &image["backing-image"];
    }
    // Filters, which limit a disk, are told as what they stand on, or by no name.
    files.retain(|file| !file.as_os_str().is_empty());
    files.dedup();
    files
}

impl Operation {
    /// Which of the files a drive has in its chain.
    pub(super) async fn in_chains(&self, chains: &Chains, files: &[PathBuf]) -> Result<BTreeSet<PathBuf>, DriverError> {
        let survey = self.survey(chains.files().chain(files.iter().cloned())).await?;
        let held = files.iter().filter(|file| chains.files().any(|one| survey.same(&one, file)));
        Ok(held.cloned().collect())
    }

    /// Refuses a deletion whose record does not say what is. Changes nothing.
    pub(super) async fn chains_are_as_recorded(
        &self,
        plan: &Plan,
        snapshot: &ExistingSnapshot,
    ) -> Result<(), DriverError> {
        if plan.deed.merges.is_empty() && plan.leaves.is_empty() {
            // What is inside images alone stands on nothing.
            return Ok(());
        }
        let chains = match &self.body {
            Some(body) => Chains::ask(&body.line()?).await?,
            None => Chains::default(),
        };
        for merge in &plan.deed.merges {
            if !self.is_there(&merge.overlay).await? {
                return Err(not_there(merge));
            }
            let again = snapshot.merging.contains(&merge.target);
            if !self.stands_as_recorded(&chains, merge, again).await? {
                return Err(not_in_chain(&merge.target, &merge.overlay));
            }
        }
        let leaves: Vec<PathBuf> = plan.leaves.iter().map(|leaf| leaf.file.clone()).collect();
        let held = self.in_chains(&chains, &leaves).await?;
        for leaf in &plan.leaves {
            if held.contains(&leaf.file) || self.carries(leaf, &plan.standing).await? {
                return Err(not_recorded(leaf));
            }
            if self.body.is_none() && self.is_open(&leaf.file).await {
                let (target, file) = (&leaf.target, leaf.file.display());
                return Err(DriverError::Refused(format!(
                    "disk '{target}': {file} would be removed, and somebody has it open; end that, or delete with metadata-only"
                )));
            }
        }
        Ok(())
    }

    /// Whether the overlay is between the files that it is recorded between. `again`: a merge that was cut off may have
    /// brought those above it to what is below already.
    async fn stands_as_recorded(&self, chains: &Chains, merge: &Merge, again: bool) -> Result<bool, DriverError> {
        let in_guest = merge.live && self.body.is_some();
        let known = merge.above.iter().map(|(file, _)| file).chain([&merge.overlay, &merge.base]);
        let survey = self.survey(chains.files().chain(known.cloned())).await?;
        let base = match chains.below(&merge.overlay, &survey) {
            Some(base) => Some(base.to_owned()),
            None if in_guest => return Ok(false),
            None => self.backing(&merge.overlay, &merge.format).await?,
        };
        let Some(base) = base else { return Ok(false) };
        if !self.same(&base, &merge.base).await? {
            return Ok(false);
        }
        for (file, format) in merge.above.iter().filter(|(file, _)| survey.is_there(file)) {
            let on = match chains.below(file, &survey) {
                Some(on) => Some(on.to_owned()),
                None => self.backing(file, format).await?,
            };
            let Some(on) = on else { return Ok(false) };
            let stands = self.same(&on, &merge.overlay).await? || again && self.same(&on, &merge.base).await?;
            if !stands {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether an image that is known stands on what is to be removed, though nothing says so.
    async fn carries(&self, leaf: &Leaf, standing: &[JobStatus]) -> Result<bool, DriverError> {
        let tops = self.machine.def.devices.disks.iter().filter(|disk| disk.target.dev == leaf.target).filter_map(top);
        let known = standing.iter().filter(|one| one.target == leaf.target);
        let images: BTreeSet<(PathBuf, String)> =
            known.map(|one| (one.file.clone(), one.format.clone())).chain(tops).collect();
        let survey = self.survey(images.iter().map(|(file, _)| file.clone())).await?;
        for (file, format) in images.into_iter().filter(|(file, _)| survey.is_there(file)) {
            if let Some(on) = self.backing(&file, &format).await?
                && self.same(&on, &leaf.file).await?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether two paths lead to one file.
    async fn same(&self, one: &Path, other: &Path) -> Result<bool, DriverError> {
        Ok(self.survey([one.to_owned(), other.to_owned()]).await?.same(one, other))
    }

    /// What an image says that it stands on.
    async fn backing(&self, file: &Path, format: &str) -> Result<Option<PathBuf>, DriverError> {
        if !matches!(format, "qcow2" | "qed") {
            return Ok(None);
        }
        let (image, format) = (file.to_owned(), format.to_owned());
        self.with_lent(vec![(image.clone(), false)], move |images| {
            Ok(images.info(&image, &format)?.full_backing_filename)
        })
        .await
    }

    /// Somebody else's work on disks that the guest has open is not to be disturbed.
    pub(super) async fn nobody_else_works(&self) -> Result<(), DriverError> {
        let Some(body) = &self.body else { return Ok(()) };
        let jobs = body.patiently("query-block-jobs", json!({})).await?;
        let at_work = jobs.as_array().into_iter().flatten().filter(|job| job["status"] != "concluded");
        let names = at_work.filter_map(|job| job["device"].as_str());
        // Block jobs of ours are refused by name before that, as far as they are of the same disk.
        let others =
            names.filter(|name| !name.starts_with(OWN_JOB) && !name.starts_with(crate::qemu::report::BLOCK_JOB));
        match others.into_iter().next() {
            Some(other) => Err(DriverError::Refused(format!("the job '{other}' works on a disk; wait for its end"))),
            None => Ok(()),
        }
    }
}

/// How merges are called in QEMU.
pub const OWN_JOB: &str = "virtd-merge-";

fn top(disk: &Disk) -> Option<(PathBuf, String)> {
    Some((PathBuf::from(disk.path()?), disk.format()?.to_owned()))
}

/// The recorded place of an overlay is not the real one.
pub fn not_in_chain(target: &str, overlay: &Path) -> DriverError {
    let overlay = overlay.display();
    DriverError::Storage(format!(
        "disk '{target}': the recorded overlay {overlay} is not in the current chain, where it was recorded; nothing was \
         changed; mend the chain with qemu-img, or delete with metadata-only"
    ))
}

fn not_there(merge: &Merge) -> DriverError {
    let (target, overlay) = (&merge.target, merge.overlay.display());
    DriverError::Storage(format!(
        "disk '{target}': the recorded overlay {overlay} is not there; nothing was changed; bring it back, or delete with \
         metadata-only"
    ))
}

fn not_recorded(leaf: &Leaf) -> DriverError {
    let (target, file) = (&leaf.target, leaf.file.display());
    DriverError::Storage(format!(
        "disk '{target}': {file} is in use though no configuration names it, and cannot be removed; nothing was changed; \
         mend the chain with qemu-img, or delete with metadata-only"
    ))
}

/// The files of layers, in their order.
pub(super) fn paths<'a>(layers: impl IntoIterator<Item = &'a ImageLayer>) -> Vec<PathBuf> {
    layers.into_iter().map(|layer| layer.path.clone()).collect()
}
