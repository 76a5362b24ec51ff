//! The folder where QEMU makes its sockets: in system mode a file system of its own, so that a guest cannot fill the host's
//! `/run`.

use crate::host::user::RunAs;
use crate::host::wall::{Hold, file_system, put};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{UnmountFlags, unmount};
use std::io;
use std::path::Path;
use virt_model::domain::DomainDef;
use virt_model::domain::memory::MemorySourceKind;

/// Bytes and names in it.
const BYTES: u64 = 16 << 20;
const NAMES: &str = "1024";

/// Makes the folder at `path` a room that only `user` may enter. A machine whose memory is in files has it there, too.
pub fn make(path: &Path, user: &RunAs, def: &DomainDef) -> io::Result<()> {
    let source = def.memory_backing.as_ref().and_then(|backing| backing.source.as_ref());
    let in_files = source.is_some_and(|source| source.kind == MemorySourceKind::File);
    let memory = if in_files { def.memory_kib().saturating_mul(1024).saturating_add(BYTES) } else { 0 };
    let (size, id) = (BYTES.saturating_add(memory).to_string(), user.uid.to_string());
    let group = user.gid.to_string();
    let options = [("mode", "0700"), ("uid", &*id), ("gid", &*group), ("size", &*size), ("nr_inodes", NAMES)];
    let room = file_system("tmpfs", &options, Hold { no_devices: true, no_programs: true, read_only: false })?;
    put(&room, &openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Removes the file system from the folder, and with it all that was in it, unlooked at.
pub fn clear(path: &Path) {
    while unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
}
