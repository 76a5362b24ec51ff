//! Whom a hypervisor runs as, and what that user can reach.

use nix::unistd::{Group, User, getgrouplist};
use std::ffi::CString;
use std::io;
use virt_model::driver::DriverError;

/// An unprivileged user with all their groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunAs {
    /// Their name.
    pub name: String,
    /// Their user id, never 0.
    pub uid: u32,
    /// Their group id.
    pub gid: u32,
    /// All groups, the first included.
    pub groups: Vec<u32>,
    /// The user whose name it is. All guests were this user once.
    pub common: u32,
}

impl RunAs {
    /// Looks up `user`, with `group` instead of their own if given, and puts them into the groups `also` that exist.
    pub fn look_up(user: &str, group: Option<&str>, also: &[&str]) -> Result<RunAs, DriverError> {
        let failed = |e: nix::Error| DriverError::Internal(format!("cannot look up user '{user}': {e}"));
        let found = User::from_name(user).map_err(failed)?.ok_or_else(|| missing("user", user))?;
        if found.uid.is_root() {
            return Err(DriverError::Unsupported(
                "QEMU does not run as root here: name an unprivileged user as qemu-user in virtd.toml".into(),
            ));
        }
        let gid = match group {
            Some(name) => Group::from_name(name).map_err(failed)?.ok_or_else(|| missing("group", name))?.gid,
            None => found.gid,
        };
        let name = CString::new(user).map_err(|_| missing("user", user))?;
        let mut groups: Vec<u32> =
            getgrouplist(&name, gid).map_err(failed)?.iter().map(|g| g.as_raw()).filter(|g| *g != 0).collect();
        groups.extend(also.iter().filter_map(|name| Some(Group::from_name(name).ok()??.gid.as_raw())));
        groups.sort_unstable();
        groups.dedup();
        let uid = found.uid.as_raw();
        Ok(RunAs { name: user.to_owned(), uid, gid: gid.as_raw(), groups, common: uid })
    }

    /// One with rights of its own, in the same further groups. What belongs to the user's own group is for no guest.
    /// `without` are further groups that it does not need.
    pub fn with_number(&self, number: u32, without: &[&str]) -> RunAs {
        let without = |gid: &u32| {
            let named =
                |name: &&str| Group::from_name(name).ok().flatten().is_some_and(|group| group.gid.as_raw() == *gid);
            *gid == self.gid || without.iter().any(named)
        };
        let groups = self.groups.iter().copied().filter(|gid| !without(gid)).chain([number]).collect();
        RunAs { name: self.name.clone(), uid: number, gid: number, groups, common: self.common }
    }

    /// Runs `work` with this user's rights over files, in a thread of its own. Needs root. Blocks.
    pub fn reach<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("as-user".into());
            let thread = thread.spawn_scoped(scope, || self.become_for_files().map(|()| work()))?;
            thread.join().map_err(|_| io::Error::other("the thread with the user's rights failed"))?
        })
    }

    /// Changes whom this thread is to the file system. The kernel takes root's powers over files from such a thread.
    fn become_for_files(&self) -> io::Result<()> {
        // SAFETY: plain system calls; raw, because libc's wrappers would change every thread of the process. The slice
        // lives across the call.
        unsafe {
            if libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::syscall(libc::SYS_setfsgid, self.gid);
            libc::syscall(libc::SYS_setfsuid, self.uid);
            // These calls tell the previous value and never fail aloud: ask again with an impossible one.
            let none = libc::c_long::from(u32::MAX);
            let (gid, uid) = (libc::syscall(libc::SYS_setfsgid, none), libc::syscall(libc::SYS_setfsuid, none));
            match gid as u32 == self.gid && uid as u32 == self.uid {
                true => Ok(()),
                false => Err(io::Error::from(io::ErrorKind::PermissionDenied)),
            }
        }
    }
}

fn missing(what: &str, name: &str) -> DriverError {
    DriverError::Unsupported(format!(
        "there is no {what} '{name}' to run QEMU as: create it with systemd-sysusers, \
         or name another as qemu-{what} in virtd.toml"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_user_is_refused_with_the_remedy() {
        let error = RunAs::look_up("no-such-user-here", None, &[]).unwrap_err().to_string();
        assert!(error.contains("no-such-user-here") && error.contains("systemd-sysusers"), "{error}");
        assert!(error.contains("virtd.toml"), "{error}");
    }

    #[test]
    fn root_is_refused() {
        assert!(matches!(RunAs::look_up("root", None, &[]), Err(DriverError::Unsupported(_))));
    }

    #[test]
    fn groups_that_do_not_exist_are_passed_over() {
        let Ok(nobody) = RunAs::look_up("nobody", None, &["no-such-group-here"]) else {
            return eprintln!("SKIPPED: no user nobody");
        };
        assert_eq!(nobody.groups, [nobody.gid]);
    }

    #[test]
    fn files_are_reached_with_the_users_rights_only() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("SKIPPED: needs root");
        }
        let Ok(nobody) = RunAs::look_up("nobody", None, &[]) else {
            return eprintln!("SKIPPED: no user nobody");
        };
        let secret = tempfile::NamedTempFile::new().unwrap();
        let open = || std::fs::File::open(secret.path()).map(drop);
        let refused = nobody.reach(open).unwrap().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        assert!(open().is_ok(), "this thread is as it was");
    }
}
