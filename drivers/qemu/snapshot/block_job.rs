//! Block jobs: QEMU copies, merges or fills up the images of one disk while the guest runs. What all of them end with is the same:
//! the guest stands for a moment, until both what the disk stood on and what it is to stand on hold the same, that is written down, and
//! QEMU changes over. So whatever is killed, one of the two is right, and the record says which.
//!
//! ```text
//!  pull    block-stream        pending ─▶ job-finalize
//!  commit  block-commit        pending ─▶ job-finalize, or, of what the guest writes, ready ─▶ block-job-complete
//!  copy    blockdev-mirror     ready ─▶ block-job-complete
//! ```
//!
//! QEMU keeps a job until it is finalized or completed, so that another virtd finds it; which images the disk stands on tells how it
//! ended.

use super::super::instance::Body;
use super::super::{QemuDriver, command, make, our_body};
use super::chain::paths;
use super::files::stored;
use super::{Operation, cannot};
use crate::host::files::What;
use crate::host::image::LentFromAfar;
use crate::host::storage;
use crate::qemu::block::Nodes;
use crate::qemu::monitor::{JobStatus, Monitor};
use crate::qemu::report::BLOCK_JOB;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use virt_model::device::Disk;
use virt_model::driver::block_jobs::{
    BlockJob, BlockJobs, BlockNotes, BlockStage, BlockStanding, BlockWork, Held, ImageLayer,
};
use virt_model::driver::snapshots::Machine;
use virt_model::driver::{DriverError, Instance, StoredFile};

/// So many bytes are not copied in a moment.
const MUCH: u64 = 16 << 20;

pub(super) fn id_of(job: &BlockJob) -> String {
    format!("{BLOCK_JOB}{}", job.target)
}

#[async_trait]
impl BlockJobs for QemuDriver {
    async fn check_block_job(&self, machine: &Machine, job: &BlockJob) -> Result<Vec<StoredFile>, DriverError> {
        self.operation(machine).await?.check_block_job(job).await
    }

    async fn begin_block_job(
        &self,
        machine: &Machine,
        job: &BlockJob,
        notes: &dyn BlockNotes,
    ) -> Result<Held, DriverError> {
        let operation = self.operation(machine).await?;
        let held = operation.lend_for(job).await?;
        let nodes = match &job.work {
            BlockWork::Copy { to, makes, .. } => {
                if *makes {
                    operation.make_copy(job, to, notes).await?;
                }
                let disk = operation.disk_after(job)?;
                let caps = self.learnt_for(&machine.def).await;
                let name = Nodes::of(operation.body()?).await?.free_name(&job.target);
                let medium = command::medium(&machine.def, &caps, &disk, &name);
                medium.map(|medium| medium.nodes).unwrap_or_default().into_iter().filter(is_image).collect()
            }
            _ => Vec::new(),
        };
        operation.begin_block_job(job, nodes, notes).await?;
        Ok(held)
    }

    async fn take_up_block_job(&self, machine: &Machine, job: &BlockJob) -> Result<Held, DriverError> {
        self.operation(machine).await?.lend_for(job).await
    }

    async fn follow_block_job(
        &self,
        guest: &dyn Instance,
        job: &BlockJob,
        ready: bool,
        progress: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> Result<BlockStanding, DriverError> {
        our_body(guest)?.line()?.follow(&id_of(job), ready, progress).await
    }

    async fn conclude_block_job(
        &self,
        machine: &Machine,
        job: &BlockJob,
        notes: &dyn BlockNotes,
    ) -> Result<bool, DriverError> {
        self.operation(machine).await?.conclude_block_job(job, notes).await
    }

    async fn cancel_block_job(&self, guest: &dyn Instance, job: &BlockJob) -> Result<(), DriverError> {
        our_body(guest)?.line()?.give_up(&id_of(job)).await;
        Ok(())
    }

    async fn settle_block_job(&self, machine: &Machine, job: &BlockJob, same: bool) -> Result<bool, DriverError> {
        self.operation(machine).await?.settle_block_job(job, same).await
    }

    async fn clean_up_block_job(
        &self,
        machine: &Machine,
        job: &BlockJob,
        done: bool,
        stage: BlockStage,
        remove: Vec<StoredFile>,
    ) -> Result<(), DriverError> {
        let operation = self.operation(machine).await?;
        let closed = operation.close_unused(job, done).await;
        if let (Some(body), Ok(unused)) = (&operation.body, &closed) {
            self.give_back(body, &machine.def, unused.clone()).await;
        }
        // Whoever still has one of them open is not harmed.
        operation.remove_unused(job, done, stage, remove).await?;
        match closed {
            Err(DriverError::Gone) => Ok(()),
            closed => closed.map(drop),
        }
    }

    async fn set_write_threshold(&self, guest: &dyn Instance, disk: &Disk, threshold: u64) -> Result<(), DriverError> {
        let body = our_body(guest)?;
        let nodes = Nodes::of(body).await?;
        let image = nodes.of_disk(disk)?;
        let set = json!({ "node-name": storage_of(&image.name), "write-threshold": threshold });
        body.patiently("block-set-write-threshold", set).await.map(drop)
    }

    async fn resize_disk(&self, machine: &Machine, target: &str, size: u64, shrink: bool) -> Result<(), DriverError> {
        self.operation(machine).await?.resize_disk(target, size, shrink).await
    }
}

/// What no checkpoint needs is left in the layers: whether another program needs it, nobody can tell.
fn tell_of_bitmaps(nodes: &Nodes, job: &BlockJob) {
    for layer in job.left() {
        let Some(node) = nodes.image(&layer.path, &layer.format) else { continue };
        if let Some(first) = node.bitmaps.keys().next() {
            let (target, file, count) = (&job.target, layer.path.display(), node.bitmaps.len());
            tracing::warn!(target, %file, count, first, "dirty bitmaps that are no checkpoint's stay behind in a layer");
        }
    }
}

/// Whether a node reads an image, and is none of those that stand above it: they stay.
fn is_image(node: &Value) -> bool {
    let name = node["node-name"].as_str().unwrap_or_default();
    name.ends_with("-storage") || name.ends_with("-format")
}

impl Operation {
    fn body(&self) -> Result<&Arc<Body>, DriverError> {
        self.body.as_ref().ok_or(DriverError::Gone)
    }

    pub(super) fn disk(&self, target: &str) -> Result<&Disk, DriverError> {
        let found = self.machine.def.devices.disks.iter().find(|disk| disk.target.dev == target);
        found.ok_or_else(|| DriverError::Internal("a disk is lost".to_owned()))
    }

    /// The disk as it is to be, for the node that its copy is written by.
    fn disk_after(&self, job: &BlockJob) -> Result<Disk, DriverError> {
        let mut disk = self.disk(&job.target)?.clone();
        job.apply_to(&mut disk);
        Ok(disk)
    }

    /// Refuses what would lose something, or what QEMU has not open as it is recorded.
    async fn check_block_job(&self, job: &BlockJob) -> Result<Vec<StoredFile>, DriverError> {
        let body = self.body()?;
        self.nobody_else_works().await?;
        let nodes = Nodes::of(body).await?;
        for layer in &job.chain {
            self.node_of(&nodes, job, layer)?;
        }
        let target = &job.target;
        let touched: Vec<&ImageLayer> = match &job.work {
            BlockWork::Pull { .. } => job.chain.iter().take(1).collect(),
            BlockWork::Commit { .. } => job.left().iter().collect(),
            BlockWork::Copy { .. } => Vec::new(),
        };
        for layer in touched {
            let node = nodes.image(&layer.path, &layer.format);
            if let Some(inner) = node.and_then(|node| node.snapshots.first()) {
                return Err(DriverError::Refused(format!(
                    "disk '{target}': {} holds the snapshot '{}', which would be lost; delete it first",
                    layer.path.display(),
                    inner.name
                )));
            }
        }
        match &job.work {
            BlockWork::Pull { .. } if job.chain[0].format != "qcow2" && job.chain[0].format != "qed" => {
                Err(cannot(format!("disk '{target}': an image in {} stands on nothing", job.chain[0].format)))
            }
            BlockWork::Copy { to, block, makes } => {
                self.check_copy(job, to, *block, *makes, &nodes).await.map(|()| Vec::new())
            }
            BlockWork::Commit { delete: true, .. } => self.to_be_removed(job).await,
            _ => Ok(Vec::new()),
        }
    }

    /// The layers that a commit leaves, as they are now. Refuses what could not be removed.
    async fn to_be_removed(&self, job: &BlockJob) -> Result<Vec<StoredFile>, DriverError> {
        let (target, files) = (job.target.clone(), paths(job.left()));
        let Some(what) = files.first().cloned() else { return Ok(Vec::new()) };
        self.with_images(&what, move |images| {
            let judged = |file: &PathBuf| match storage::judge_open(file, images.lender.is_wary()) {
                Ok(Some(judged)) => Ok(judged),
                Ok(None) => Err(cannot(format!("disk '{target}': {} has no name any more", file.display()))),
                Err(why) => Err(cannot(format!("disk '{target}': {why}; or leave out 'delete', and it stays"))),
            };
            files.iter().map(judged).collect()
        })
        .await
    }

    async fn check_copy(
        &self,
        job: &BlockJob,
        to: &ImageLayer,
        block: bool,
        makes: bool,
        nodes: &Nodes,
    ) -> Result<(), DriverError> {
        let (target, shown) = (&job.target, to.path.display());
        let there = self.survey([to.path.clone()]).await?.at(&to.path);
        let is_one = match there.what {
            What::Block => block,
            What::Plain => !block,
            _ => false,
        };
        if makes {
            return match there.named {
                true => Err(DriverError::Refused(format!(
                    "disk '{target}': {shown} is there already; choose another file, or reuse-external"
                ))),
                false if block => Err(cannot(format!("disk '{target}': there is no block device {shown}"))),
                false if !there.has_folder => {
                    Err(cannot(format!("disk '{target}': {shown} would be in a folder that is not there")))
                }
                false => Ok(()),
            };
        }
        if !is_one {
            let what = if block { "block device" } else { "file" };
            return Err(cannot(format!("disk '{target}': {shown} is no {what} to be copied into")));
        }
        let (image, format) = (to.path.clone(), to.format.clone());
        let told = self.with_lent(vec![(image.clone(), false)], move |images| images.info(&image, &format)).await?;
        let size = self.node_of(nodes, job, &job.chain[0])?.virtual_size;
        if told.full_backing_filename.is_some() {
            return Err(DriverError::Refused(format!(
                "disk '{target}': {shown} stands on another image, and a copy stands on none"
            )));
        }
        match told.virtual_size == size {
            true => Ok(()),
            false => Err(DriverError::Refused(format!(
                "disk '{target}': {shown} has {} bytes, and the disk has {size}; a copy has the same size",
                told.virtual_size
            ))),
        }
    }

    /// The node that reads a layer; of what several disks stand on, this one's.
    fn node_of<'a>(
        &self,
        nodes: &'a Nodes,
        job: &BlockJob,
        layer: &ImageLayer,
    ) -> Result<&'a crate::qemu::block::Node, DriverError> {
        let prefix = format!("{}-", job.target);
        let reads = |node: &&crate::qemu::block::Node| node.driver == layer.format && node.file == layer.path;
        let own = nodes.0.iter().filter(reads).find(|node| node.name.starts_with(&prefix));
        own.or_else(|| nodes.image(&layer.path, &layer.format)).ok_or_else(|| {
            let (target, path, format) = (&job.target, layer.path.display(), &layer.format);
            DriverError::Refused(format!("disk '{target}': the running guest does not have {path} open as {format}"))
        })
    }

    /// What the guest may write for a while, or from now on.
    async fn lend_for(&self, job: &BlockJob) -> Result<Held, DriverError> {
        let mut files: Vec<PathBuf> = Vec::new();
        if let BlockWork::Commit { top, base, .. } = &job.work {
            files.push(job.chain[*base].path.clone());
            // The header of what stands on them says on what it stands then.
            files.extend(top.checked_sub(1).map(|above| job.chain[above].path.clone()));
        }
        let Some(what) = files.first().cloned() else { return Ok(Held::default()) };
        let files: Vec<(PathBuf, bool)> = files.into_iter().map(|file| (file, true)).collect();
        let lent = self.with_images(&what, move |images| images.lend_with_guest(&files)).await?;
        Ok(Held(Some(Box::new(LentFromAfar::from(lent)))))
    }

    /// An image of the disk's size, in a file that nothing was before.
    async fn make_copy(&self, job: &BlockJob, to: &ImageLayer, notes: &dyn BlockNotes) -> Result<(), DriverError> {
        let nodes = Nodes::of(self.body()?).await?;
        let size = self.node_of(&nodes, job, &job.chain[0])?.virtual_size;
        let (path, owned_as) = (to.path.clone(), job.chain[0].path.clone());
        notes.keep(BlockStage { making: true, ..notes.stage() }).await?;
        let made = self.with_images(&to.path, move |images| {
            match make::image_beside(&path, &owned_as, images.lender.is_wary()) {
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(None),
                made => made.map(Some).map_err(|e| stored(&path, &e)),
            }
        });
        let image = made.await?;
        if image.is_none() {
            notes.keep(BlockStage { making: false, ..notes.stage() }).await?;
            let (target, shown) = (&job.target, to.path.display());
            return Err(DriverError::Refused(format!("disk '{target}': {shown} has just been made by somebody else")));
        }
        notes.step("empty");
        notes.keep(BlockStage { made: true, image, ..notes.stage() }).await?;
        let to = to.clone();
        self.with_lent(vec![(to.path.clone(), true)], move |images| images.create(&to.path, &to.format, size)).await?;
        notes.step("made");
        Ok(())
    }

    async fn begin_block_job(
        &self,
        job: &BlockJob,
        added: Vec<Value>,
        notes: &dyn BlockNotes,
    ) -> Result<(), DriverError> {
        let body = self.body()?;
        let (line, nodes, id) = (body.line()?, Nodes::of(body).await?, id_of(job));
        let node = |place: usize| Ok::<_, DriverError>(self.node_of(&nodes, job, &job.chain[place])?.name.clone());
        tell_of_bitmaps(&nodes, job);
        // What limits the disk stands above its image, and stays there.
        let top = top_of(&line, self.disk(&job.target)?).await?;
        let mut arguments = json!({ "auto-dismiss": false, "device": top });
        if job.bandwidth > 0 {
            arguments["speed"] = json!(job.bandwidth);
        }
        let command = match &job.work {
            BlockWork::Pull { base } => {
                arguments["device"] = json!(node(0)?);
                arguments["auto-finalize"] = json!(false);
                // QEMU 7.2 ends over a question after its nodes while one that has concluded is not dismissed.
                arguments["auto-dismiss"] = json!(true);
                if let Some(base) = base {
                    arguments["base-node"] = json!(node(*base)?);
                    arguments["backing-file"] = json!(job.chain[*base].path);
                }
                "block-stream"
            }
            BlockWork::Commit { top, base, .. } => {
                arguments["base-node"] = json!(node(*base)?);
                arguments["top-node"] = json!(node(*top)?);
                if *top > 0 {
                    arguments["auto-finalize"] = json!(false);
                    arguments["backing-file"] = json!(job.chain[*base].path);
                }
                "block-commit"
            }
            BlockWork::Copy { to, .. } => {
                let files = vec![(to.path.clone(), true)];
                self.with_images(&to.path, move |images| images.lend_to_guest(&files)).await?;
                for node in &added {
                    body.patiently("blockdev-add", node.clone()).await?;
                }
                notes.step("open");
                let format = added.iter().filter_map(|node| node["node-name"].as_str());
                arguments["target"] = json!(format.into_iter().find(|name| name.ends_with("-format")));
                arguments["sync"] = json!("full");
                arguments["replaces"] = json!(node(0)?);
                "blockdev-mirror"
            }
        };
        line.begin(command, &id, arguments).await?;
        notes.step("begun");
        Ok(())
    }

    /// Changes over while the guest stands.
    async fn conclude_block_job(&self, job: &BlockJob, notes: &dyn BlockNotes) -> Result<bool, DriverError> {
        let body = self.body()?;
        let (runs, line, id) = (self.machine.running, body.line()?, id_of(job));
        if job.waits_to_be_finished() && line.behind(&id).await? > MUCH {
            return Ok(false);
        }
        let mut late = false;
        // Of a guest that another virtd has had stand for it, it is told that it goes on.
        let resume = runs || notes.stage().resume;
        body.reporter.be_quiet(runs);
        let changed = async {
            notes.keep(BlockStage { resume, ..notes.stage() }).await?;
            // What was written is in the images then, also of a guest that stands already.
            body.patiently("stop", json!({})).await?;
            notes.step("stopped");
            let same = async || notes.keep(BlockStage { same: true, ..notes.stage() }).await;
            let ended = match job.waits_to_be_finished() {
                true if !line.has_gone_over(&id).await? => {
                    late = true;
                    return Ok(Ok(()));
                }
                true => {
                    self.takes_threshold_along(job).await;
                    line.change_over(&id, same).await?
                }
                false => {
                    same().await?;
                    match line.patiently("job-finalize", json!({ "id": id })).await {
                        Ok(_) => line.ended(&id).await?,
                        Err(DriverError::Hypervisor(why)) => Err(why),
                        Err(error) => return Err(error),
                    }
                }
            };
            notes.step("changed over");
            Ok(ended.map_err(|why| DriverError::Storage(format!("disk '{}': {why}", job.target))))
        };
        let changed: Result<Result<(), DriverError>, DriverError> = changed.await;
        let goes_on_as_before = match &changed {
            Ok(Ok(())) => late,
            Ok(Err(_)) => true,
            // What QEMU has been told then it may still do: which images count is seen later, and until then it stands.
            Err(_) if notes.stage().same => {
                body.reporter.be_quiet(false);
                return changed.and_then(|ended| ended).map(|()| false);
            }
            Err(_) => true,
        };
        let changed = changed.and_then(|ended| ended);
        if goes_on_as_before && !matches!(changed, Err(DriverError::Gone)) {
            // What it has counts again: that is written down before anything new is written there.
            if let Err(error) = notes.keep(BlockStage { same: false, ..notes.stage() }).await {
                tracing::warn!(target = job.target, %error, "the guest stands until that can be written down");
                body.reporter.be_quiet(false);
                return changed.and(Err(error));
            }
        }
        let resumed = if resume { body.patiently("cont", json!({})).await.map(drop) } else { Ok(()) };
        body.reporter.be_quiet(false);
        let noted = match resumed {
            Ok(()) => notes.keep(BlockStage { resume: false, ..notes.stage() }).await,
            Err(_) => Ok(()),
        };
        changed.and(resumed).and(noted).map(|()| !late)
    }

    /// Writing beyond an offset is told of the image that the guest writes from now on.
    async fn takes_threshold_along(&self, job: &BlockJob) {
        let moved = async {
            let (body, after) = (self.body()?, job.chain_after());
            let nodes = Nodes::of(body).await?;
            let storage = storage_of(&self.node_of(&nodes, job, &job.chain[0])?.name);
            let threshold = nodes.0.iter().find(|node| node.name == storage).map_or(0, |node| node.write_threshold);
            let Some(after) = after.first().filter(|_| threshold > 0) else { return Ok(()) };
            let storage = storage_of(&self.node_of(&nodes, job, after)?.name);
            let set = json!({ "node-name": storage, "write-threshold": threshold });
            body.patiently("block-set-write-threshold", set).await.map(drop)
        };
        let moved: Result<(), DriverError> = moved.await;
        if let Err(error) = moved {
            tracing::warn!(target = job.target, %error, "the threshold of the disk is lost with its image: set it again");
        }
    }
}

/// The node below that of an image's format, which is written at offsets of the file.
fn storage_of(image: &str) -> String {
    format!("{}-storage", image.strip_suffix("-format").unwrap_or(image))
}

/// The node that the drive of a disk reads: that of its image, or of what stands above it.
pub(super) async fn top_of(line: &Monitor, disk: &Disk) -> Result<String, DriverError> {
    let told = line.patiently("query-block", json!({})).await?;
    let drive = told.as_array().into_iter().flatten().find(|drive| is_drive_of(drive, disk));
    let top = drive.and_then(|drive| drive["inserted"]["node-name"].as_str());
    let target = &disk.target.dev;
    top.map(str::to_owned).ok_or_else(|| DriverError::Refused(format!("the running guest has no drive '{target}'")))
}

/// Whether what QEMU tells of a drive is of that disk.
pub(super) fn is_drive_of(drive: &Value, disk: &Disk) -> bool {
    let alias = disk.info.alias().unwrap_or_default();
    let device = drive["qdev"].as_str().unwrap_or_default();
    let inside = device.strip_prefix("/machine/peripheral/").and_then(|rest| rest.split('/').next());
    !alias.is_empty() && (device == alias || inside == Some(alias))
}

impl Monitor {
    /// Waits until a job is ready to be concluded, or, if it has been `ready`, until it is so no more.
    async fn follow(
        &self,
        id: &str,
        ready: bool,
        progress: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> Result<BlockStanding, DriverError> {
        loop {
            let before = self.jobs_heard();
            let (standing, done, total) = self.progress_of(id).await?;
            progress(done, total);
            match standing {
                JobStatus::Running if !ready => self.news_of_jobs(before, true).await,
                // Nothing moves but what the guest writes: that is told by events alone.
                JobStatus::Running | JobStatus::Ready if ready => self.news_of_jobs(before, false).await,
                JobStatus::Running => {}
                JobStatus::Ready => return Ok(BlockStanding::Ready),
                JobStatus::Ended(ended) => return Ok(BlockStanding::Ended(ended.err())),
                JobStatus::Absent => return Ok(BlockStanding::Ended(self.why_block_job_failed(id))),
            }
        }
    }
}
