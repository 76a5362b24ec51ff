//! Merging an overlay into what it stands on: by the running guest's QEMU where that has both open, else by qemu-img.
//!
//! A running guest stands still for the moment in which it changes from the overlay to the base. Before that moment both
//! files hold the same, and that is written down; so whatever is killed then, the base is right.

use super::super::instance::Body;
use super::super::record::blocking;
use super::Operation;
use super::create::written;
use super::jobs::Standing;
use super::nodes::Nodes;
use super::note::{Delete, Merge, Note};
use serde_json::json;
use std::sync::Arc;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::Journal;

impl Operation {
    pub(super) async fn merge(
        &self,
        merge: &Merge,
        deed: &mut Delete,
        journal: Option<&Arc<dyn Journal>>,
    ) -> Result<(), DriverError> {
        if !merge.overlay.exists() {
            return Ok(());
        }
        match self.body.clone().filter(|_| merge.live) {
            Some(body) => self.merge_live(&body, merge, deed, journal).await,
            None => self.merge_files(merge, deed.synced.as_ref() == Some(&merge.target)).await,
        }
    }

    /// Nobody has them open.
    async fn merge_files(&self, merge: &Merge, same: bool) -> Result<(), DriverError> {
        let mut files = vec![(merge.overlay.clone(), true), (merge.base.clone(), true)];
        files.extend(merge.above.iter().map(|(file, _)| (file.clone(), true)));
        let merge = merge.clone();
        self.with_lent(files, move |images| {
            if !same {
                images.commit(&merge.overlay, &merge.format, &merge.base)?;
            }
            for (file, format) in merge.above.iter().filter(|(file, _)| file.exists()) {
                images.rebase(file, format, &merge.base, &merge.base_format)?;
            }
            Ok(())
        })
        .await
    }

    /// The running guest has them open.
    async fn merge_live(
        &self,
        body: &Arc<Body>,
        merge: &Merge,
        deed: &mut Delete,
        journal: Option<&Arc<dyn Journal>>,
    ) -> Result<(), DriverError> {
        let files = vec![(merge.base.clone(), true), (merge.overlay.clone(), true)];
        let images = self.images.clone();
        let _lent = blocking(move || images.lend(&files)).await??;
        let line = body.line()?;
        let id = format!("virtd-merge-{}", merge.target);
        let nodes = Nodes::ask(&line).await?;
        let Some(overlay) = nodes.image(&merge.overlay, &merge.format).map(|node| node.name.clone()) else {
            // It was merged, and nobody lived to say so.
            return Ok(());
        };
        let base = nodes.image(&merge.base, &merge.base_format).map(|node| node.name.clone());
        let Some(base) = base else {
            let (target, base) = (&merge.target, merge.base.display());
            return Err(DriverError::Storage(format!("disk '{target}': {base} is not in the guest's chain")));
        };
        let disk = self.machine.def.devices.disks.iter().find(|disk| disk.target.dev == merge.target);
        let disk = disk.ok_or_else(|| DriverError::Internal("a disk is lost".to_owned()))?;
        let is_top = disk.path().map(std::path::Path::new) == Some(&merge.overlay);
        let known = line.standing(&id, None).await?;
        if known == Standing::Absent && deed.synced.as_ref() != Some(&merge.target) {
            let mut arguments = json!({ "job-id": id, "base-node": base, "auto-dismiss": false });
            if is_top {
                arguments["device"] = json!(overlay);
            } else {
                arguments["device"] = json!(nodes.of_disk(disk)?.name);
                arguments["top-node"] = json!(overlay);
                arguments["backing-file"] = json!(merge.base);
            }
            line.patiently("block-commit", arguments).await?;
            journal.iter().for_each(|journal| journal.step("merging"));
        }
        match line.settled(&id, journal).await? {
            Standing::Ready => self.change_over(body, &id, merge, deed, journal).await?,
            Standing::Ended(Err(why)) => {
                line.dismiss(&id).await;
                return Err(DriverError::Storage(format!("disk '{}': {why}", merge.target)));
            }
            _ => {
                note_synced(merge, deed, journal).await?;
                line.dismiss(&id).await;
            }
        }
        // Nodes that nothing uses; their files can go now.
        let nodes = Nodes::ask(&line).await?;
        let left = nodes.0.iter().filter(|node| node.file == merge.overlay);
        let mut left: Vec<_> = left.map(|node| (node.driver == "file", node.name.clone())).collect();
        left.sort();
        for (_, node) in left {
            line.patiently("blockdev-del", json!({ "node-name": node })).await?;
        }
        Ok(())
    }

    /// From the overlay to the base, while the guest stands still.
    async fn change_over(
        &self,
        body: &Arc<Body>,
        id: &str,
        merge: &Merge,
        deed: &mut Delete,
        journal: Option<&Arc<dyn Journal>>,
    ) -> Result<(), DriverError> {
        let runs = body.reporter.guest(|guest| guest.is_running());
        body.reporter.be_quiet(true);
        let changed = async {
            if runs {
                deed.resume = true;
                if let Some(journal) = journal {
                    journal.note(written(&Note::Delete(deed.clone()))?).await?;
                }
                body.patiently("stop", json!({})).await?;
            }
            // What the guest wrote last goes over now.
            let line = body.line()?;
            loop {
                let jobs = line.patiently("query-block-jobs", json!({})).await?;
                let found = jobs.as_array().into_iter().flatten().find(|job| job["device"] == id);
                if found.is_none_or(|job| job["offset"] == job["len"]) {
                    break;
                }
                tokio::task::yield_now().await;
            }
            note_synced(merge, deed, journal).await?;
            line.patiently("block-job-complete", json!({ "device": id })).await?;
            let ended = line.ended(id).await?;
            line.dismiss(id).await;
            ended.map_err(|why| DriverError::Storage(format!("disk '{}': {why}", merge.target)))?;
            journal.iter().for_each(|journal| journal.step("changed over"));
            Ok(())
        };
        let changed = changed.await;
        let resumed = if runs { body.patiently("cont", json!({})).await.map(drop) } else { Ok(()) };
        body.reporter.be_quiet(false);
        deed.resume &= !runs;
        changed.and(resumed)
    }
}

/// From here on the base is right, whatever becomes of the overlay.
async fn note_synced(merge: &Merge, deed: &mut Delete, journal: Option<&Arc<dyn Journal>>) -> Result<(), DriverError> {
    deed.synced = Some(merge.target.clone());
    match journal {
        Some(journal) => journal.note(written(&Note::Delete(deed.clone()))?).await,
        None => Ok(()),
    }
}
