//! The kernel's files below /sys: an attribute of a device each.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// The longest attribute that is read, in bytes: one of sysfs has a page at most.
pub const LONGEST: u64 = 4096;

/// The beginning of a file, if it can be read.
pub fn bounded(file: &Path, most: u64) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(file).ok()?.take(most).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// An attribute, without the white space around it.
pub fn attribute(device: &Path, name: &str) -> Option<String> {
    bounded(&device.join(name), LONGEST).map(|text| text.trim().to_owned())
}
