//! The process that serves a network's addresses and names. It outlives virtd; the file in which it wrote its number, and its
//! own command line, say which one it is.

use super::leases::TOLD;
use super::serve::USER;
use crate::host::process::kill;
use crate::host::tap::output_within;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Starts it with the configuration in its folder. It has come up when this returns; the error is its own words.
pub fn start(folder: &Path) -> io::Result<()> {
    let told = folder.join("told");
    fs::write(&told, "")?;
    give(&told)?;
    let config = argument(folder);
    output_within("dnsmasq", &[&config], &[(TOLD, told.as_os_str())]).map(drop)
}

/// The one argument by which it is known.
fn argument(folder: &Path) -> String {
    format!("--conf-file={}", folder.join("dnsmasq.conf").display())
}

/// Gives it a file that it, or what it runs, writes to.
fn give(file: &Path) -> io::Result<()> {
    match nix::unistd::User::from_name(USER) {
        Ok(Some(user)) => nix::unistd::chown(file, Some(user.uid), Some(user.gid)).map_err(io::Error::from),
        _ => Err(io::Error::other(format!("there is no user '{USER}' (Debian makes it with dnsmasq-base)"))),
    }
}

/// Writes a file that it reads.
pub fn write(file: &Path, text: &str) -> io::Result<()> {
    let mut new = tempfile::NamedTempFile::new_in(file.parent().unwrap_or(Path::new("/")))?;
    io::Write::write_all(&mut new, text.as_bytes())?;
    new.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    new.persist(file)?;
    Ok(())
}

/// The process, if it is there.
pub fn find(folder: &Path) -> Option<OwnedFd> {
    let number = fs::read_to_string(folder.join("pid")).ok()?.trim().parse().ok()?;
    let held = pidfd_open(Pid::from_raw(number)?, PidfdFlags::empty()).ok()?;
    // Asked after it was opened: whoever has the number now is whom the descriptor names.
    let command = fs::read(format!("/proc/{number}/cmdline")).ok()?;
    let wanted = argument(folder);
    command.split(|byte| *byte == 0).any(|word| word == wanted.as_bytes()).then_some(held)
}

/// Has it read reservations and names again; whether it is there.
pub fn reload(folder: &Path) -> bool {
    find(folder).is_some_and(|server| pidfd_send_signal(server, Signal::HUP).is_ok())
}

/// Ends it. What it has given is in its file.
pub fn stop(folder: &Path) {
    if let Some(server) = find(folder) {
        kill(&server);
    }
    let _ = fs::remove_file(folder.join("pid"));
}
