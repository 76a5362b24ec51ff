//! The device of a volume in a volume group: found at its path, and judged by the kernel's word of which volume that is.

use super::fill::length_of;
use super::mounts::Device;
use crate::host::SYSFS;
use crate::host::lock;
use crate::host::lvm::LogicalVolume;
use rustix::fs::{major, minor};
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// The device of a volume, which is not opened.
pub struct VolumeDevice(Device);

impl VolumeDevice {
    /// Error: there is none, or it is another volume's.
    pub fn of(volume: &LogicalVolume, path: &Path) -> io::Result<VolumeDevice> {
        let device = Device::at(path)?;
        let number = device.number();
        let told = Path::new(SYSFS).join(format!("dev/block/{}:{}/dm/uuid", major(number), minor(number)));
        let told = fs::read_to_string(told).map_err(|e| io::Error::new(e.kind(), format!("it is no volume's: {e}")))?;
        // LVM-, the group's, and the volume's own.
        match told.trim_end().ends_with(&volume.key.replace('-', "")) {
            true => Ok(VolumeDevice(device)),
            false => Err(io::Error::other("that device is another volume's by now")),
        }
    }

    /// Its owner, group and mode.
    pub fn permissions(&self) -> (u32, u32, u32) {
        self.0.permissions()
    }

    /// Opens it to be read, and how long it is.
    pub fn to_read(&self) -> io::Result<(File, u64)> {
        with_length(self.0.shared()?)
    }

    /// Opens it to be read and written, and how long it is.
    pub fn to_write(&self) -> io::Result<(File, u64)> {
        with_length(self.0.to_write()?)
    }

    /// Whether the host uses it, or QEMU or one of its tools has it open: to write it, or, where it is to be `written`, at all.
    pub fn is_open_elsewhere(&self, written: bool) -> io::Result<bool> {
        match self.0.alone() {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(true),
            file => lock::is_held(&file?, written),
        }
    }
}

fn with_length(file: File) -> io::Result<(File, u64)> {
    let length = length_of(&file)?;
    Ok((file, length))
}
