//! What a block job leaves: on what the disk stands by then, and the files of no use.

use super::super::instance::Body;
use super::super::media;
use super::Operation;
use super::block_job::{id_of, is_drive_of};
use super::chain::{chain, paths};
use crate::host::storage;
use crate::qemu::block::Nodes;
use crate::qemu::monitor::JobStatus;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::device::Disk;
use virt_model::driver::block_jobs::{BlockJob, BlockStage, BlockWork};
use virt_model::driver::{DriverError, StoredFile};

impl Operation {
    /// Whether the disk stands on what it was to stand on.
    pub(super) async fn settle_block_job(&self, job: &BlockJob, same: bool) -> Result<bool, DriverError> {
        if let Some(body) = &self.body {
            match self.settle_live(body, job).await {
                Err(DriverError::Gone) if body.is_gone_soon().await => {}
                Ok(Some(done)) => return Ok(done),
                // The guest has let go of the disk: what is recorded tells, as where there is no guest.
                Ok(None) => {}
                Err(error) => return Err(error),
            }
        }
        if !same {
            return Ok(false);
        }
        let (overlay, base) = match &job.work {
            BlockWork::Pull { base } => (&job.chain[0], base.map(|base| &job.chain[base])),
            BlockWork::Commit { top, base, .. } if *top > 0 => (&job.chain[top - 1], Some(&job.chain[*base])),
            _ => return Ok(true),
        };
        let (overlay, base) = (overlay.clone(), base.cloned());
        self.with_lent(vec![(overlay.path.clone(), true)], move |images| match base {
            Some(base) => images.rebase(&overlay.path, &overlay.format, &base.path, &base.format),
            None => images.stand_alone(&overlay.path, &overlay.format),
        })
        .await?;
        Ok(true)
    }

    /// Ends the job if it has not ended, and sees on what the disk stands. `None`: the guest has no such disk any more.
    async fn settle_live(&self, body: &Arc<Body>, job: &BlockJob) -> Result<Option<bool>, DriverError> {
        let (line, id, target) = (body.line()?, id_of(job), &job.target);
        let at_work = |status| matches!(status, JobStatus::Running | JobStatus::Ready);
        if at_work(line.standing(&id, None).await?) {
            line.give_up(&id).await;
            if at_work(line.standing(&id, None).await?) {
                return Err(DriverError::Storage(format!("disk '{target}': QEMU does not end the job '{id}'")));
            }
        }
        let (before, after) = (paths(&job.chain), paths(job.chain_after()));
        let is_its = |disk: &&Disk| disk.target.dev == *target && [&before, &after].contains(&&disk.files());
        let Some(disk) = self.machine.def.devices.disks.iter().find(is_its) else { return Ok(None) };
        let told = line.patiently("query-block", json!({})).await?;
        let drive = told.as_array().into_iter().flatten().find(|drive| is_drive_of(drive, disk));
        let Some(drive) = drive else { return Ok(None) };
        let seen = chain(&drive["inserted"]["image"]);
        if let Some(done) = stands(&seen, &before, &after, |one, other| one == other) {
            return Ok(Some(done));
        }
        let survey = self.survey(seen.iter().chain(&before).chain(&after).cloned()).await?;
        let done = stands(&seen, &before, &after, |one, other| survey.same(one, other));
        done.map(Some).ok_or_else(|| {
            let seen = seen.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ");
            DriverError::Storage(format!("disk '{target}' stands on {seen}, which is nothing that is recorded of it"))
        })
    }

    /// Has the guest's QEMU close what it does not need any more; these files.
    pub(super) async fn close_unused(&self, job: &BlockJob, done: bool) -> Result<Vec<PathBuf>, DriverError> {
        let unused: Vec<PathBuf> = match &job.work {
            _ if done => job.left().iter().map(|layer| layer.path.clone()).collect(),
            BlockWork::Copy { to, .. } => vec![to.path.clone()],
            _ => Vec::new(),
        };
        let Some(body) = &self.body else { return Ok(unused) };
        let prefix = format!("{}-", job.target);
        let nodes = Nodes::of(body).await?.0.into_iter();
        let ours = nodes.filter(|node| node.name.starts_with(&prefix) && unused.contains(&node.file));
        media::close(body, ours.map(|node| node.name).collect()).await;
        if let (true, BlockWork::Commit { top: 0, base, .. }) = (done, &job.work) {
            // It is what the guest writes from now on.
            let files = vec![(job.chain[*base].path.clone(), true)];
            let what = job.chain[*base].path.clone();
            self.with_images(&what, move |images| images.lend_to_guest(&files)).await?;
        }
        body.line()?.dismiss(&id_of(job)).await;
        Ok(unused)
    }

    /// What cannot be removed stays, and that is in the log; error: the host's storage does not answer.
    pub(super) async fn remove_unused(
        &self,
        job: &BlockJob,
        done: bool,
        stage: BlockStage,
        remove: Vec<StoredFile>,
    ) -> Result<(), DriverError> {
        let copy = match &job.work {
            BlockWork::Copy { to, makes: true, .. } if !done => Some(to.path.clone()),
            _ => None,
        };
        let Some(what) = copy.clone().or_else(|| Some(remove.first()?.path.clone())) else { return Ok(()) };
        self.with_images(&what, move |images| {
            let wary = images.lender.is_wary();
            let copies = copy.iter().map(|file| remove_copy(file, stage, wary));
            for error in
                copies.chain(remove.iter().map(|file| storage::remove_open(file, wary))).filter_map(Result::err)
            {
                tracing::warn!(%error, "a file of no use is still there");
            }
            Ok(())
        })
        .await
    }
}

/// Removes the image that was made for a copy, if the file there is that one. Blocks.
fn remove_copy(path: &Path, stage: BlockStage, wary: bool) -> Result<(), DriverError> {
    let Some(there) = storage::judge_open(path, wary).map_err(DriverError::Storage)? else { return Ok(()) };
    let is_ours = match stage.image {
        Some(image) if stage.made => image == there.identity,
        // One that was cut off before it could be said that it is made is empty.
        _ => stage.made || stage.making && there.bytes == 0,
    };
    if is_ours {
        return storage::remove_open(&there, wary);
    }
    if stage.made {
        tracing::warn!("{} is another file by now, and is not removed", path.display());
    }
    Ok(())
}

/// Whether what is seen is `after`; `None`: nor is it `before`.
fn stands(
    seen: &[PathBuf],
    before: &[PathBuf],
    after: &[PathBuf],
    same: impl Fn(&Path, &Path) -> bool,
) -> Option<bool> {
    let is =
        |chain: &[PathBuf]| seen.len() == chain.len() && seen.iter().zip(chain).all(|(one, other)| same(one, other));
    match is(after) {
        true => Some(true),
        false => is(before).then_some(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::make;

    #[test]
    fn of_a_copy_that_came_to_nothing_no_more_goes_than_was_made() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("like"), "").unwrap();
        let image = Some(make::image_beside(&at("copy"), &at("like"), false).unwrap());
        let stage = BlockStage { making: true, made: true, image, ..BlockStage::default() };
        // Somebody has put another file into its place.
        std::fs::write(at("precious"), "").unwrap();
        std::fs::rename(at("copy"), at("moved")).unwrap();
        std::fs::rename(at("precious"), at("copy")).unwrap();
        remove_copy(&at("copy"), stage, false).unwrap();
        assert!(at("copy").exists(), "that was made by somebody else");
        std::fs::rename(at("moved"), at("copy")).unwrap();
        remove_copy(&at("copy"), stage, false).unwrap();
        assert!(!at("copy").exists());
        remove_copy(&at("copy"), stage, false).unwrap();

        // What was being made is empty, and what an earlier virtd has made is known by its name alone.
        let making = BlockStage { making: true, ..BlockStage::default() };
        for (stage, content, is_left) in
            [(making, "", false), (making, "full", true), (BlockStage { made: true, ..making }, "full", false)]
        {
            std::fs::write(at("copy"), content).unwrap();
            remove_copy(&at("copy"), stage, false).unwrap();
            assert_eq!(at("copy").exists(), is_left, "{stage:?}");
        }
    }
}
