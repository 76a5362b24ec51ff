//! Disks made larger or smaller.

use super::Operation;
use super::block_job::top_of;
use crate::qemu::block::Nodes;
use serde_json::json;
use std::path::PathBuf;
use virt_model::device::Disk;
use virt_model::driver::DriverError;

impl Operation {
    pub(super) async fn resize_disk(&self, target: &str, size: u64, shrink: bool) -> Result<(), DriverError> {
        let disk = self.disk(target)?;
        let format = disk.meant_format();
        if !matches!(format, "raw" | "qcow2" | "qed") {
            return Err(DriverError::Unsupported(format!("disk '{target}': an image in {format} has one size")));
        }
        if matches!(disk.kind(), virt_model::device::disk::DiskKind::Block) && format == "raw" {
            let path = disk.path().unwrap_or_default();
            return Err(DriverError::Unsupported(format!(
                "disk '{target}': {path} is a device of the host's, of one size"
            )));
        }
        let smaller = |now: u64| {
            DriverError::Argument(format!(
                "disk '{target}' has {now} bytes, and would lose what is at its end: give 'shrink' if that is meant"
            ))
        };
        let Some(body) = &self.body else { return self.resize_image(disk, size, shrink, smaller).await };
        let now = Nodes::of(body).await?.of_disk(disk)?.virtual_size;
        if size < now && !shrink {
            return Err(smaller(now));
        }
        // What stands above the image learns of it so, too.
        let top = top_of(&body.line()?, disk).await?;
        body.patiently("block_resize", json!({ "node-name": top, "size": size })).await.map(drop)
    }

    async fn resize_image(
        &self,
        disk: &Disk,
        size: u64,
        shrink: bool,
        smaller: impl Fn(u64) -> DriverError,
    ) -> Result<(), DriverError> {
        let chain: Vec<(PathBuf, String)> = disk
            .chain()
            .filter_map(|layer| Some((PathBuf::from(layer.path?), layer.format.unwrap_or("raw").to_owned())))
            .collect();
        let files = chain.iter().enumerate().map(|(place, (path, _))| (path.clone(), place == 0)).collect();
        let (path, format) = chain[0].clone();
        let now = self.with_lent(vec![(path.clone(), false)], move |images| images.info(&path, &format)).await?;
        if size < now.virtual_size && !shrink {
            return Err(smaller(now.virtual_size));
        }
        self.with_lent(files, move |images| images.resize(&chain, size, shrink)).await
    }
}
