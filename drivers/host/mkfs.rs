//! Makes file systems on devices, with the tool of each, which has our rights: it sets the size of the device's blocks.

use super::apart;
use super::image::{failure, not_run};
use super::tool::{Bounds, ends_with_its_maker, finish, tame};
use super::workers::Stop;
use rustix::process::Signal;
use std::path::Path;
use std::process::{Command, Stdio};
use virt_model::driver::DriverError;

/// What makes which type: the tool, what has it overwrite, and the package that has it.
const MAKERS: &[(&str, &str, &str, &str)] = &[
    ("ext2", "mkfs.ext2", "-F", "e2fsprogs"),
    ("ext3", "mkfs.ext3", "-F", "e2fsprogs"),
    ("ext4", "mkfs.ext4", "-F", "e2fsprogs"),
    ("xfs", "mkfs.xfs", "-f", "xfsprogs"),
    ("btrfs", "mkfs.btrfs", "-f", "btrfs-progs"),
];

const BOUNDS: Bounds = Bounds { data: Some(2 << 30), cpu: None, files: Some(64) };

/// Makes a file system of that type on a device, over what is there. `device`: a path that nobody but root can lead elsewhere. Blocks.
/// Error: what was on the device may be lost.
pub fn make_file_system(kind: &str, device: &Path, stop: &Stop) -> Result<(), DriverError> {
    let Some((_, tool, over, package)) = MAKERS.iter().find(|(known, ..)| *known == kind) else {
        return Err(DriverError::Unsupported(format!("file systems of type '{kind}' are not made here")));
    };
    stop.check()?;
    let mut command = Command::new(tool);
    command.args(["-q", over]).arg(device).env("LC_ALL", "C");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    tame(&mut command, None, BOUNDS);
    // Nobody would know that the device is written still.
    ends_with_its_maker(&mut command, Signal::KILL);
    let missing = format!("{tool} is not installed (Debian has it in {package})");
    let done = apart::without(|| finish(&mut command, stop, true)).map_err(|e| not_run(tool, &missing, e))?;
    let words = String::from_utf8_lossy(&done.stderr);
    match done.status.success() {
        true => Ok(()),
        false => Err(failure(format!("cannot make a file system on {}: {tool}: {}", device.display(), words.trim()))),
    }
}
