//! Whether an image is in use, by the locks that QEMU and its tools take on what they open.

use super::apart::apart;
use super::resolve::Found;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

/// The bytes on which QEMU locks what it does, and what it lets others do: a hundred for each.
const FIRST: i64 = 100;
const BYTES: i64 = 200;
/// Of them the one that says that it writes.
const WRITES: i64 = 1;

/// Whether anybody has the image at `path` open, or what they read through it. Takes no lock. Blocks.
pub fn is_open(path: &Path) -> io::Result<bool> {
    let Some(file) = Found::resolve(path)?.image()? else { return Ok(false) };
    is_locked(&file, FIRST, BYTES)
}

/// Whether anybody has an image open that a client has open, too, and gives: somebody who writes it, and where it is to be
/// `written`, anybody at all. Locks belong to what descriptors are copies of, so that it is opened anew to see them; where that
/// cannot be done, what the descriptor itself sees has to do. Takes no lock. Blocks.
pub fn is_held(file: &File, written: bool) -> io::Result<bool> {
    #[allow(clippy::disallowed_methods, reason = "in a worker, and no path is followed: it is what is open already")]
    let anew = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let (first, bytes) = if written { (FIRST, BYTES) } else { (FIRST + WRITES, 1) };
    match anew {
        Ok(anew) => is_locked(&File::from(apart(anew.into())?), first, bytes),
        Err(_) => is_locked(file, first, bytes),
    }
}

fn is_locked(file: &File, first: i64, bytes: i64) -> io::Result<bool> {
    // SAFETY: all zeroes are a value of this plain struct.
    let mut asked: libc::flock = unsafe { std::mem::zeroed() };
    (asked.l_type, asked.l_whence) = (libc::F_WRLCK as i16, libc::SEEK_SET as i16);
    (asked.l_start, asked.l_len) = (first, bytes);
    // SAFETY: the descriptor is open, and the struct lives as long as the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut asked) } {
        0 => Ok(asked.l_type != libc::F_UNLCK as i16),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::process::{Command, Stdio};

    #[test]
    fn an_image_is_open_while_a_tool_has_it_or_what_stands_on_it() {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (dir.path().join("base"), dir.path().join("top"));
        let make = |arguments: &[&str]| Command::new("qemu-img").args(arguments).current_dir(dir.path()).status();
        if !make(&["create", "-q", "-f", "qcow2", "base", "1M"]).is_ok_and(|status| status.success()) {
            return eprintln!("SKIPPED: qemu-img is not installed");
        }
        assert!(make(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"]).unwrap().success());
        assert!(!is_open(&base).unwrap());
        let mut shell = Command::new("qemu-io");
        shell.args(["-f", "qcow2"]).arg(&top).stdin(Stdio::piped()).stdout(Stdio::piped());
        let Ok(mut shell) = shell.spawn() else { return eprintln!("SKIPPED: qemu-io is not installed") };
        writeln!(shell.stdin.as_ref().unwrap(), "length").unwrap();
        let mut told = String::new();
        BufReader::new(shell.stdout.as_mut().unwrap()).read_line(&mut told).unwrap();
        assert!(is_open(&base).unwrap() && is_open(&top).unwrap(), "{told}");
        drop(shell.stdin.take());
        shell.wait().unwrap();
        assert!(!is_open(&base).unwrap() && !is_open(&top).unwrap());
    }
}
