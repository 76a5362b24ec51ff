//! The kernel's calls for mounts by descriptor, with errors that say what failed.

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_string,
    fsmount, fsopen, move_mount, open_tree,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// How a mount is held back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// Nothing is written.
    pub read_only: bool,
    /// Device nodes do nothing.
    pub no_devices: bool,
    /// Nothing is run.
    pub no_programs: bool,
}

/// A mount of the file or folder behind `fd` that is nowhere yet; with those below it if `deep`.
pub fn clone(fd: impl AsFd, deep: bool, hold: Hold) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, deep);
    let tree = open_tree(fd, "", flags)?;
    restrict(&tree, deep, hold)?;
    Ok(tree)
}

/// Holds a mount back; it shares nothing with others any more. Set-user-id programs are none in it.
fn restrict(tree: &OwnedFd, deep: bool, hold: Hold) -> io::Result<()> {
    let mut set = libc::MOUNT_ATTR_NOSUID;
    set |= if hold.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    set |= if hold.no_devices { libc::MOUNT_ATTR_NODEV } else { 0 };
    set |= if hold.no_programs { libc::MOUNT_ATTR_NOEXEC } else { 0 };
    let attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if deep { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the structure and the string live across the call, which is told the structure's size.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A new file system of that kind that is nowhere yet.
pub fn file_system(kind: &str, options: &[(&str, &str)], hold: Hold) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(&context, *key, *value)
            .map_err(|e| io::Error::new(io::Error::from(e).kind(), format!("{kind}: {key}={value}: {e}")))?;
    }
    fsconfig_create(&context)?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID;
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, hold.read_only);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, hold.no_devices);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, hold.no_programs);
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Puts a mount that is nowhere onto what is behind `at`.
pub fn put(tree: &OwnedFd, at: &impl AsFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, "", at, "", flags)?)
}
