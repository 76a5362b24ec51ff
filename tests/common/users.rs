//! People of the private system bus. They exist in its namespace only; their password is `secret`.

use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A user.
#[derive(Clone, Copy, Debug)]
pub struct User {
    /// Name, and name of the group of the same number.
    pub name: &'static str,
    /// Number.
    pub uid: u32,
    /// Further groups, with commas.
    pub groups: &'static str,
}

/// Nobody special.
pub const ALICE: User = User { name: "virt-alice", uid: 60_001, groups: "" };
/// Nobody special either.
pub const BOB: User = User { name: "virt-bob", uid: 60_002, groups: "" };
/// In group virt: starts and stops.
pub const OPERATOR: User = User { name: "virt-operator", uid: 60_003, groups: "virt" };
/// In group virt-admin: defines.
pub const ADMIN: User = User { name: "virt-definer", uid: 60_004, groups: "virt-admin" };
/// Whom QEMU runs as.
pub const QEMU: User = User { name: "virt-qemu", uid: 60_005, groups: "" };
/// Root.
pub const ROOT: User = User { name: "root", uid: 0, groups: "" };

/// All that are to be added, for tests/private-bus.
pub fn list() -> String {
    let line = |user: &User| format!("{} {} {}\n", user.name, user.uid, user.groups);
    [ALICE, BOB, OPERATOR, ADMIN, QEMU].iter().map(line).collect()
}

/// A socket to the bus of `folder` that the bus takes for `user`'s: credentials are those of the thread that connects.
pub fn connect_as(user: &User, folder: &Path) -> io::Result<UnixStream> {
    let groups = group_ids(user, folder)?;
    let (user, socket) = (*user, folder.join("run/bus"));
    let thread = std::thread::spawn(move || {
        let id = rustix::fs::Gid::from_raw(user.uid);
        set_thread_groups(&groups)?;
        set_thread_res_gid(id, id, id)?;
        let id = rustix::fs::Uid::from_raw(user.uid);
        set_thread_res_uid(id, id, id)?;
        UnixStream::connect(socket)
    });
    thread.join().expect("connecting does not panic")
}

/// The groups of `user` in the namespace's own database.
fn group_ids(user: &User, folder: &Path) -> io::Result<Vec<rustix::fs::Gid>> {
    let database = std::fs::read_to_string(folder.join("etc/group"))?;
    let member = |line: &&str| line.split(':').nth(3).is_some_and(|names| names.split(',').any(|n| n == user.name));
    let number = |line: &str| line.split(':').nth(2).and_then(|id| id.parse().ok());
    Ok(database.lines().filter(member).filter_map(number).map(rustix::fs::Gid::from_raw).collect())
}
