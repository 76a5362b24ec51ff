//! Backups of a running guest's disks, by jobs of QEMU that all begin in one transaction.
//!
//! ```text
//!  push   image ──copied──▶ file                        incremental: what a bitmap tells, merged of the layers'
//!  pull   image ──what the guest overwrites──▶ scratch   readers see the scratch, and the image below it, by NBD
//! ```
//!
//! QEMU serves NBD at a socket that only virtd can connect to; readers get connections of it. The jobs stay when they have ended,
//! so that whoever finds them can tell how.

use super::super::media;
use super::checkpoints::add_bitmap;
use super::files::stored;
use super::{Operation, cannot};
use crate::host::files::{What, open_plain};
use crate::host::image::Images;
use crate::host::listen::{connect, listen};
use crate::host::workers::{ClosedAside, blocking};
use crate::qemu::QemuDriver;
use crate::qemu::block::{Node, Nodes};
use crate::qemu::instance::Body;
use crate::qemu::make;
use crate::qemu::monitor::JobStatus;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use virt_model::checkpoint::of_machine;
use virt_model::device::Disk;
use virt_model::driver::DriverError;
use virt_model::driver::backup::{BackedUpDisk, BackupRequest, Backups};
use virt_model::driver::checkpoints::{BitmapState, TrackedDisk};
use virt_model::driver::snapshots::Machine;

/// How many readers there may be at once.
const READERS: u32 = 64;
/// What the socket is called while QEMU is given it.
const SOCKET: &str = "virtd-backup";

#[async_trait]
impl Backups for QemuDriver {
    async fn check_backup(&self, machine: &Machine, request: &BackupRequest) -> Result<(), DriverError> {
        self.operation(machine).await?.check_backup(request).await
    }

    async fn make_backup_files(&self, machine: &Machine, request: &BackupRequest) -> Result<(), DriverError> {
        self.operation(machine).await?.make_backup_files(request).await
    }

    async fn begin_backup(&self, machine: &Machine, request: &BackupRequest) -> Result<(), DriverError> {
        self.operation(machine).await?.begin_backup(request).await
    }

    async fn copy_backup(
        &self,
        machine: &Machine,
        request: &BackupRequest,
        progress: Arc<dyn Fn(u64, u64) + Send + Sync>,
        cancel: &CancellationToken,
    ) -> Result<(), DriverError> {
        let operation = self.operation(machine).await?;
        let jobs: Vec<String> = request.disks.iter().map(job).collect();
        operation.running()?.line()?.all_ended("blockdev-backup", &jobs, &*progress, cancel).await?;
        *super::lock(&operation.cancel) = cancel.clone();
        operation.close_copies(request).await
    }

    async fn is_backed_up(&self, machine: &Machine, request: &BackupRequest) -> Result<bool, DriverError> {
        let operation = self.operation(machine).await?;
        let line = operation.running()?.line()?;
        for disk in &request.disks {
            let standing = line.standing(&job(disk), None).await?;
            let goes_on = standing == JobStatus::Running || !request.pull && standing != JobStatus::Absent;
            if !goes_on {
                return Ok(false);
            }
        }
        if !request.pull {
            return Ok(true);
        }
        let told = line.patiently("query-block-exports", json!({})).await?;
        let is_there = |disk: &BackedUpDisk| told.as_array().into_iter().flatten().any(|one| one["id"] == export(disk));
        Ok(request.disks.iter().all(is_there))
    }

    async fn open_backup(&self, machine: &Machine, _disk: &BackedUpDisk) -> Result<OwnedFd, DriverError> {
        let operation = self.operation(machine).await?;
        let path = operation.running()?.backup_socket();
        let failed = |e: std::io::Error| DriverError::Refused(format!("QEMU takes no reader now: {e}"));
        blocking(move || connect(&path)).await?.map_err(failed)
    }

    async fn end_backup(&self, machine: &Machine, request: &BackupRequest, complete: bool) -> Result<(), DriverError> {
        self.operation(machine).await?.end_backup(request, complete).await
    }
}

impl Body {
    /// Where readers of a backup are connected, by virtd alone.
    fn backup_socket(&self) -> PathBuf {
        self.leavings.runtime_dir.join("backup.sock")
    }
}

impl Operation {
    fn running(&self) -> Result<&Arc<Body>, DriverError> {
        self.body.as_ref().ok_or(DriverError::Gone)
    }

    fn backed_up(&self, target: &str) -> Result<&Disk, DriverError> {
        let disk = of_machine(&self.machine.def, target);
        disk.ok_or_else(|| DriverError::Refused(format!("the machine has no disk '{target}' any more")))
    }

    async fn check_backup(&self, request: &BackupRequest) -> Result<(), DriverError> {
        let nodes = Nodes::of(self.running()?).await?;
        let files = request.disks.iter().map(|disk| disk.file.clone());
        let survey = self.survey(files).await?;
        for disk in &request.disks {
            let of = self.backed_up(&disk.target)?;
            let node = nodes.of_disk(of)?;
            let (target, file, there) = (&disk.target, disk.file.display(), survey.at(&disk.file));
            match there.what {
                What::Nothing if there.has_folder => {}
                What::Nothing => {
                    return Err(cannot(format!(
                        "the backup of disk '{target}': {file} is in a folder that is not there"
                    )));
                }
                _ => {
                    let text = format!("the backup of disk '{target}': {file} is there already; choose another file");
                    return Err(cannot(text));
                }
            }
            if disk.since.is_some() && node.bitmaps.contains_key(&disk.bitmap) {
                let bitmap = &disk.bitmap;
                return Err(DriverError::SnapshotExists(format!(
                    "disk '{target}' has a bitmap '{bitmap}' already: give another name for the time of the backup \
                     (exportbitmap)"
                )));
            }
            self.merged_of(of, disk, &nodes)?;
        }
        self.bitmaps_to_add(&request.checkpoint).await.map(drop)
    }

    async fn begin_backup(&self, request: &BackupRequest) -> Result<(), DriverError> {
        let body = self.running()?;
        let nodes = Nodes::of(body).await?;
        let files: Vec<(PathBuf, bool)> = request.disks.iter().map(|disk| (disk.file.clone(), true)).collect();
        if let Some((what, _)) = files.first().cloned() {
            self.with_images(&what, move |images| images.lend_to_guest(&files)).await?;
        }
        // The checkpoint tells what is written from before the moment of the backup on, and so does the bitmap that is merged:
        // what comes in between is in both.
        let mut actions = self.bitmaps_to_add(&request.checkpoint).await?;
        for disk in &request.disks {
            let of = self.backed_up(&disk.target)?;
            let node = nodes.of_disk(of)?;
            for new in new_nodes(disk, request.pull.then_some(node)) {
                body.patiently("blockdev-add", new).await?;
            }
            actions.extend(self.merged_of(of, disk, &nodes)?);
            actions.push(backup_of(disk, node, request));
        }
        for disk in &request.disks {
            body.line()?.dismiss(&job(disk)).await;
        }
        body.patiently("transaction", json!({ "actions": actions })).await?;
        if request.pull {
            self.serve(body, request, &nodes).await?;
        }
        Ok(())
    }

    async fn make_backup_files(&self, request: &BackupRequest) -> Result<(), DriverError> {
        let nodes = Nodes::of(self.running()?).await?;
        let mut ours = Vec::new();
        let made = async {
            for disk in &request.disks {
                let of = self.backed_up(&disk.target)?;
                let (size, base) = (nodes.of_disk(of)?.virtual_size, PathBuf::from(of.path().unwrap_or_default()));
                self.make_backup_file(disk, base, size, &mut ours).await?;
            }
            Ok(())
        };
        let made = made.await;
        if made.is_err() {
            self.remove_files(ours).await;
        }
        made
    }

    /// A new file of the size of the disk, whose owner is the image's; among `ours` as soon as it is.
    async fn make_backup_file(
        &self,
        disk: &BackedUpDisk,
        base: PathBuf,
        size: u64,
        ours: &mut Vec<PathBuf>,
    ) -> Result<(), DriverError> {
        let (file, format) = (disk.file.clone(), disk.format.clone());
        let empty = move |images: &Arc<Images>| {
            make::image_beside(&file, &base, images.lender.is_wary()).map(drop).map_err(|e| stored(&file, &e))
        };
        self.with_images(&disk.file, empty).await?;
        ours.push(disk.file.clone());
        let file = disk.file.clone();
        self.with_lent(vec![(file.clone(), true)], move |images| images.create(&file, &format, size)).await
    }

    /// QEMU keeps some of what it writes to an image for itself until it closes it, and the host some more: only then a copy
    /// outlives them.
    async fn close_copies(&self, request: &BackupRequest) -> Result<(), DriverError> {
        let body = self.running()?;
        media::close(body, our_nodes(request)).await;
        let nodes = Nodes::of(body).await?;
        for disk in &request.disks {
            if nodes.0.iter().any(|node| node.name == node_of(disk)) {
                let file = disk.file.display();
                return Err(DriverError::Hypervisor(format!("QEMU does not close the backup {file}")));
            }
            let (size, file) = (nodes.of_disk(self.backed_up(&disk.target)?)?.virtual_size, disk.file.clone());
            let sync = move |images: &Arc<Images>| {
                let opened = open_plain(&file, images.lender.is_wary());
                opened.and_then(|opened| opened.into_file().sync_all()).map_err(|e| stored(&file, &e))
            };
            self.with_images_of(&disk.file, size, sync).await?;
        }
        Ok(())
    }

    /// What makes one bitmap of those that the layers of a disk have kept since a checkpoint: parts of the transaction.
    fn merged_of(&self, of: &Disk, disk: &BackedUpDisk, nodes: &Nodes) -> Result<Vec<Value>, DriverError> {
        let Some(TrackedDisk { target, bitmap, began }) = &disk.since else { return Ok(Vec::new()) };
        let top = nodes.of_disk(of)?;
        let mut sources = Vec::new();
        for layer in of.files() {
            let node =
                nodes.image(&layer, "qcow2").filter(|node| node.bitmaps.get(bitmap) == Some(&BitmapState::Sound));
            let node = node.ok_or_else(|| {
                let layer = layer.display();
                DriverError::Refused(format!("disk '{target}': the bitmap '{bitmap}' in {layer} is not to be trusted"))
            })?;
            sources.push(json!({ "node": node.name, "name": bitmap }));
            if layer == *began {
                let mut add = add_bitmap(&top.name, &disk.bitmap);
                add["data"]["persistent"] = json!(false);
                let data = json!({ "node": top.name, "target": disk.bitmap, "bitmaps": sources });
                return Ok(vec![add, json!({ "type": "block-dirty-bitmap-merge", "data": data })]);
            }
        }
        Err(DriverError::Refused(format!("disk '{target}' does not stand on {} any more", began.display())))
    }

    /// Lets readers in.
    async fn serve(&self, body: &Arc<Body>, request: &BackupRequest, nodes: &Nodes) -> Result<(), DriverError> {
        for disk in request.disks.iter().filter(|disk| disk.since.is_some()) {
            let node = nodes.of_disk(self.backed_up(&disk.target)?)?;
            body.patiently("block-dirty-bitmap-disable", json!({ "node": node.name, "name": disk.bitmap })).await?;
        }
        let path = body.backup_socket();
        let listening = blocking(move || {
            // One that was left is of no use any more.
            let _ = rustix::fs::unlink(&path);
            listen(&path, None).map_err(|e| stored(&path, &e))
        });
        let listening = ClosedAside::of(listening.await??.into());
        let line = body.line()?;
        line.give("getfd", json!({ "fdname": SOCKET }), listening).await?;
        let at = json!({ "type": "fd", "data": { "str": SOCKET } });
        let server = json!({ "addr": at, "max-connections": READERS });
        if let Err(error) = body.patiently("nbd-server-start", server).await {
            let _ = body.patiently("closefd", json!({ "fdname": SOCKET })).await;
            return Err(error);
        }
        for disk in &request.disks {
            let mut how = json!({
                "type": "nbd", "id": export(disk), "node-name": node_of(disk), "name": disk.export, "writable": false,
            });
            if disk.since.is_some() {
                how["bitmaps"] = json!([disk.bitmap]);
            }
            body.patiently("block-export-add", how).await?;
        }
        Ok(())
    }

    async fn end_backup(&self, request: &BackupRequest, complete: bool) -> Result<(), DriverError> {
        if let Some(body) = &self.body {
            self.end_in_guest(body, request).await?;
        }
        let files: Vec<PathBuf> = request.disks.iter().map(|disk| disk.file.clone()).collect();
        let Some(what) = files.first().cloned() else { return Ok(()) };
        let (guest, lent) = (self.machine.def.uuid, files.clone());
        let given_back = self.with_images(&what, move |images| {
            images.lender.give_back_these(guest, &lent);
            Ok(())
        });
        if let Err(error) = given_back.await {
            tracing::warn!(uuid = %guest, %error, "what a backup was written to is given back when the guest ends");
        }
        if request.pull || !complete {
            self.remove_files(files).await;
        }
        Ok(())
    }

    /// Has QEMU let go of all. What is not there is fine. Error: `Gone`.
    async fn end_in_guest(&self, body: &Arc<Body>, request: &BackupRequest) -> Result<(), DriverError> {
        let line = body.line()?;
        if request.pull {
            for disk in &request.disks {
                let _ = body.patiently("block-export-del", json!({ "id": export(disk), "mode": "hard" })).await;
            }
            let _ = body.patiently("nbd-server-stop", json!({})).await;
            let path = body.backup_socket();
            blocking(move || _ = rustix::fs::unlink(&path)).await?;
        }
        for disk in &request.disks {
            line.give_up(&job(disk)).await;
        }
        media::close(body, our_nodes(request)).await;
        let nodes = Nodes::of(body).await?;
        for disk in request.disks.iter().filter(|disk| disk.since.is_some()) {
            let Ok(node) = self.backed_up(&disk.target).and_then(|of| nodes.of_disk(of)) else { continue };
            // It was made for this alone, and is in no image.
            if node.bitmaps.get(&disk.bitmap) == Some(&BitmapState::Idle) {
                let gone = json!({ "node": node.name, "name": disk.bitmap });
                body.patiently("block-dirty-bitmap-remove", gone).await?;
            }
        }
        Ok(())
    }
}

/// What the job of a disk is called.
fn job(disk: &BackedUpDisk) -> String {
    format!("virtd-backup-{}", disk.target)
}

/// What its export is called on the monitor.
fn export(disk: &BackedUpDisk) -> String {
    format!("virtd-export-{}", disk.target)
}

/// The node of what is written.
fn node_of(disk: &BackedUpDisk) -> String {
    format!("backup-{}", disk.target)
}

/// Those of all files that are written, each before the one that it stands on.
fn our_nodes(request: &BackupRequest) -> Vec<String> {
    request.disks.iter().flat_map(|disk| [node_of(disk), format!("{}-file", node_of(disk))]).collect()
}

/// The nodes of a file that is written: of a scratch with what it stands `on`.
fn new_nodes(disk: &BackedUpDisk, on: Option<&Node>) -> [Value; 2] {
    let name = node_of(disk);
    let file = format!("{name}-file");
    let mut format = json!({ "driver": disk.format, "node-name": name, "file": file });
    if disk.format == "qcow2" {
        format["backing"] = on.map_or(Value::Null, |node| json!(node.name));
    }
    [json!({ "driver": "file", "node-name": file, "filename": disk.file.to_string_lossy() }), format]
}

/// The job of one disk: a part of the transaction.
fn backup_of(disk: &BackedUpDisk, node: &Node, request: &BackupRequest) -> Value {
    let mut data = json!({
        "job-id": job(disk), "device": node.name, "target": node_of(disk), "auto-dismiss": false,
    });
    match (request.pull, &disk.since) {
        (true, _) => data["sync"] = json!("none"),
        (false, None) => data["sync"] = json!("full"),
        (false, Some(_)) => {
            data["sync"] = json!("bitmap");
            data["bitmap"] = json!(disk.bitmap);
            data["bitmap-mode"] = json!("never");
        }
    }
    if request.bandwidth > 0 {
        data["speed"] = json!(request.bandwidth);
    }
    json!({ "type": "blockdev-backup", "data": data })
}
