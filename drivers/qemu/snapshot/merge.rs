//! Merging an overlay into what it stands on: by the running guest's QEMU where that has both open, else by qemu-img.
//!
//! A running guest stands still for the moment in which it changes from the overlay to the base. Before that moment both
//! files hold the same, and that is written down; so whatever is killed then, the base is right.

use super::super::instance::Body;
use super::Operation;
use super::block_job::top_of;
use super::chain::{Chains, OWN_JOB, not_in_chain};
use super::note::written;
use super::note::{Delete, Merge, Note};
use crate::host::image::LentFromAfar;
use crate::qemu::block::Nodes;
use crate::qemu::monitor::{JobStatus, Monitor, is_full};
use serde_json::json;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{ExistingSnapshot, Journal};

impl Operation {
    /// Merges one overlay, and brings what stands on it to what is below. `journal`: absent when this is done once more,
    /// for whoever was killed; what is found merged then is.
    pub(super) async fn merge(
        &self,
        merge: &Merge,
        snapshot: &ExistingSnapshot,
        deed: &mut Delete,
        journal: Option<&Arc<dyn Journal>>,
    ) -> Result<(), DriverError> {
        if deed.merged.contains(&merge.target) || journal.is_none() && !self.is_there(&merge.overlay).await? {
            return note_merged(merge, deed, journal).await;
        }
        if let Some(body) = self.body.clone().filter(|_| merge.live) {
            match self.merge_live(&body, merge, deed, journal).await {
                Ok(chains) => {
                    // What the guest has open, its QEMU has told of the change.
                    let above: Vec<PathBuf> = merge.above.iter().map(|(file, _)| file.clone()).collect();
                    let left = self.in_chains(&chains, &above).await?;
                    self.merge_files(merge, snapshot, true, &left).await?;
                    return note_merged(merge, deed, journal).await;
                }
                // It may end at any time: the rest is done without it.
                Err(DriverError::Gone) if body.is_gone_soon().await => {}
                Err(DriverError::Gone) => {
                    let target = &merge.target;
                    return Err(DriverError::Storage(format!(
                        "disk '{target}': somebody else has cancelled the merge"
                    )));
                }
                // One about to end has let go of its disks, and finds none of them.
                Err(_) if body.is_asked_to_end() && body.is_gone_soon().await => {}
                Err(error) => return Err(error),
            }
        }
        let same = deed.synced.as_ref() == Some(&merge.target);
        self.merge_files(merge, snapshot, same, &BTreeSet::new()).await?;
        note_merged(merge, deed, journal).await
    }

    /// Nobody has them open. `same`: both files hold the same already. What is to be `left` alone is not touched.
    async fn merge_files(
        &self,
        merge: &Merge,
        snapshot: &ExistingSnapshot,
        same: bool,
        left: &BTreeSet<PathBuf>,
    ) -> Result<(), DriverError> {
        let files = merge.above.iter().map(|(file, _)| file.clone());
        let survey = self.survey(files.chain([merge.overlay.clone()])).await?;
        let above = merge.above.iter().filter(|(file, _)| survey.is_there(file) && !left.contains(file));
        let above: Vec<_> = above.cloned().collect();
        if same && above.is_empty() {
            return Ok(());
        }
        let mut files: Vec<_> = above.iter().map(|(file, _)| (file.clone(), true)).collect();
        let mut chain =
            vec![(merge.overlay.clone(), merge.format.clone()), (merge.base.clone(), merge.base_format.clone())];
        if !same {
            files.extend(chain.iter().map(|(file, _)| (file.clone(), true)));
            // Of a cluster that is written in part the rest comes from further below.
            let below = below(snapshot, merge)?;
            files.extend(below.iter().map(|(file, _)| (file.clone(), false)));
            chain.extend(below);
        }
        let merge = merge.clone();
        let bytes = if same { 0 } else { survey.size(&merge.overlay) };
        self.with_lent_of(files, bytes, move |images| {
            if !same {
                images.commit(&chain)?;
            }
            for (file, format) in &above {
                images.rebase(file, format, &merge.base, &merge.base_format)?;
            }
            Ok(())
        })
        .await
    }

    /// The running guest has them open. What its drives stand on afterwards.
    async fn merge_live(
        &self,
        body: &Arc<Body>,
        merge: &Merge,
        deed: &mut Delete,
        journal: Option<&Arc<dyn Journal>>,
    ) -> Result<Chains, DriverError> {
        let files = vec![(merge.base.clone(), true), (merge.overlay.clone(), true)];
        let lent = self.with_images(&merge.base, move |images| images.lend_with_guest(&files)).await?;
        let _lent = LentFromAfar::from(lent);
        let line = body.line()?;
        let id = format!("{OWN_JOB}{}", merge.target);
        line.dismiss(&id).await;
        if line.standing(&id, None).await? == JobStatus::Absent {
            let chains = Chains::ask(&line).await?;
            if !self.in_chains(&chains, std::slice::from_ref(&merge.overlay)).await?.is_empty() {
                // Had it been the same once, the guest has gone on writing since.
                deed.synced = None;
                self.begin_merge(&line, &id, merge).await?;
                journal.iter().for_each(|journal| journal.step("merging"));
            } else if journal.is_some() && deed.synced.as_ref() != Some(&merge.target) {
                return Err(not_in_chain(&merge.target, &merge.overlay));
            }
        }
        let merged = match line.to_its_end(&id, journal).await? {
            JobStatus::Ready => self.change_over(body, &id, merge, deed, journal).await,
            JobStatus::Ended(Err(why)) => Err(not_merged(merge, &why)),
            // Below the top there is nothing to change over to.
            _ => {
                let noted = note_synced(merge, deed, journal).await;
                // Written down only when what the guest does not have open has followed, too.
                deed.merged.push(merge.target.clone());
                noted
            }
        };
        if let Err(error) = merged {
            line.give_up(&id).await;
            return Err(error);
        }
        line.dismiss(&id).await;
        let_go(&line, &merge.overlay).await?;
        Chains::ask(&line).await
    }

    async fn begin_merge(&self, line: &Monitor, id: &str, merge: &Merge) -> Result<(), DriverError> {
        let nodes = Nodes::ask(line).await?;
        let open = |file: &Path, format: &str| {
            let node = nodes.image(file, format).map(|node| node.name.clone());
            node.ok_or_else(|| not_in_chain(&merge.target, file))
        };
        let (overlay, base) = (open(&merge.overlay, &merge.format)?, open(&merge.base, &merge.base_format)?);
        let disk = self.machine.def.devices.disks.iter().find(|disk| disk.target.dev == merge.target);
        let disk = disk.ok_or_else(|| DriverError::Internal("a disk is lost".to_owned()))?;
        let mut arguments = json!({ "job-id": id, "base-node": base, "auto-dismiss": false });
        // What limits the disk stands above its image, and stays there.
        arguments["device"] = json!(top_of(line, disk).await?);
        arguments["top-node"] = json!(overlay);
        if disk.path().map(Path::new) != Some(&merge.overlay) {
            arguments["backing-file"] = json!(merge.base);
        }
        line.patiently("block-commit", arguments).await.map(drop)
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
                noted(deed, journal).await?;
                body.patiently("stop", json!({})).await?;
            }
            let line = body.line()?;
            let ended = line.change_over(id, async || note_synced(merge, deed, journal).await).await?;
            line.dismiss(id).await;
            ended.map_err(|why| not_merged(merge, &why))?;
            // The guest stands on the base, whatever else may fail.
            deed.merged.push(merge.target.clone());
            journal.iter().for_each(|journal| journal.step("changed over"));
            Ok(())
        };
        let changed = changed.await;
        if !matches!(changed, Ok(()) | Err(DriverError::Gone)) {
            // It goes on with the overlay, and that is what counts again.
            deed.synced = None;
            let _ = noted(deed, journal).await;
        }
        let resumed = if runs { body.patiently("cont", json!({})).await.map(drop) } else { Ok(()) };
        body.reporter.be_quiet(false);
        deed.resume &= !runs;
        changed.and(resumed)
    }
}

/// What is below the base, as it is recorded.
fn below(snapshot: &ExistingSnapshot, merge: &Merge) -> Result<Vec<(PathBuf, String)>, DriverError> {
    let disks = snapshot.def.devices.disks.iter();
    let disk = disks
        .into_iter()
        .find(|disk| disk.target.dev == merge.target && disk.path().map(Path::new) == Some(&merge.base));
    let mut layers = Vec::new();
    let mut layer = disk.and_then(|disk| disk.backing.as_deref());
    while let Some(store) = layer.filter(|store| !store.is_end()) {
        let path = store.path().ok_or_else(|| {
            let (target, base) = (&merge.target, merge.base.display());
            let how = "start the machine, and delete the snapshot while it runs";
            DriverError::Unsupported(format!("disk '{target}': {base} stands on something on a server; {how}"))
        })?;
        layers.push((PathBuf::from(path), store.format.as_ref().map_or("raw", |format| &*format.name).to_owned()));
        layer = store.backing.as_deref();
    }
    Ok(layers)
}

/// From here on the base is right, whatever becomes of the overlay.
async fn note_synced(merge: &Merge, deed: &mut Delete, journal: Option<&Arc<dyn Journal>>) -> Result<(), DriverError> {
    deed.synced = Some(merge.target.clone());
    noted(deed, journal).await
}

/// Nothing needs the overlay any more.
async fn note_merged(merge: &Merge, deed: &mut Delete, journal: Option<&Arc<dyn Journal>>) -> Result<(), DriverError> {
    if !deed.merged.contains(&merge.target) {
        deed.merged.push(merge.target.clone());
    }
    noted(deed, journal).await
}

async fn noted(deed: &Delete, journal: Option<&Arc<dyn Journal>>) -> Result<(), DriverError> {
    match journal {
        Some(journal) => journal.note(written(&Note::Delete(deed.clone()))?).await,
        None => Ok(()),
    }
}

/// QEMU closes an image that no drive uses any more; its file can go then.
async fn let_go(line: &Monitor, overlay: &Path) -> Result<(), DriverError> {
    let nodes = Nodes::ask(line).await?;
    let mut left: Vec<_> = nodes.0.iter().filter(|node| node.file == overlay).collect();
    left.sort_by_key(|node| node.driver == "file");
    for node in left {
        line.patiently("blockdev-del", json!({ "node-name": node.name })).await?;
    }
    Ok(())
}

/// Why a merge came to nothing. A job that is cancelled by nobody here is that of a QEMU about to end.
fn not_merged(merge: &Merge, why: &str) -> DriverError {
    let text = format!("disk '{}': {why}", merge.target);
    match why {
        "Operation canceled" => DriverError::Gone,
        why if is_full(why) => DriverError::NoSpace(text),
        _ => DriverError::Storage(text),
    }
}
