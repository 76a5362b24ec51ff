//! What QEMU's user had made before every machine had a user of its own, given to the machine that it belongs to.

use crate::host::acl::through;
use crate::host::resolve::Found;
use crate::host::user::RunAs;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, chownat, fstat, openat};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use uuid::Uuid;

/// Gives a file, or a folder with the files in it, to `user`, if it is there and belonged to the user of all guests; whoever
/// it belonged to, if it is below `state_dir`, where only virtd puts anything, under the name of that machine.
pub fn take_over(path: &Path, user: &RunAs, state_dir: &Path, machine: Uuid) -> io::Result<()> {
    let found = match Found::resolve(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    let inside = state_dir.canonicalize().is_ok_and(|dir| found.real.starts_with(dir));
    let ours = inside && found.real.to_string_lossy().contains(&machine.to_string());
    let may = |stat: &rustix::fs::Stat| ours || stat.st_uid == user.common;
    if !may(&found.stat) || (found.stat.st_uid, found.stat.st_gid) == (user.uid, user.gid) {
        return Ok(());
    }
    match found.kind() {
        FileType::RegularFile if found.stat.st_nlink == 1 => give(&found.fd, user),
        FileType::Directory => {
            for entry in std::fs::read_dir(through(&found.fd))? {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = openat(&found.fd, entry?.file_name(), flags, Mode::empty())?;
                let stat = fstat(&file)?;
                let plain = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_nlink == 1;
                if plain && may(&stat) {
                    give(&file, user)?;
                }
            }
            // Last: whoever is cut off before finds the folder as it was, and begins anew.
            give(&found.fd, user)
        }
        _ => Ok(()),
    }
}

fn give(fd: &OwnedFd, user: &RunAs) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    Ok(chownat(fd, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, chown, symlink};

    #[test]
    fn a_folder_is_taken_over_with_its_files_and_nothing_that_they_lead_to() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("SKIPPED: needs root");
        }
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (machine, state) = (Uuid::new_v4(), dir.path().join("state"));
        std::fs::create_dir(&state).unwrap();
        let at = |name: &str| dir.path().join(name);
        let user = RunAs { name: "guest".into(), uid: 7001, gid: 7001, groups: vec![7001], common: 7000 };
        std::fs::create_dir(at("tpm")).unwrap();
        for name in ["tpm/state", "precious", "tpm/second", "stranger"] {
            std::fs::write(at(name), "").unwrap();
            chown(at(name), Some(7000), Some(7000)).unwrap();
        }
        symlink(at("precious"), at("tpm/link")).unwrap();
        std::fs::hard_link(at("tpm/second"), at("other-name")).unwrap();
        chown(at("tpm"), Some(7000), Some(7000)).unwrap();
        chown(at("stranger"), Some(7002), None).unwrap();
        let take = |path: &str| take_over(&at(path), &user, &state, machine).unwrap();
        ["tpm", "stranger", "none"].iter().for_each(|path| take(path));
        let owner = |name: &str| std::fs::metadata(at(name)).unwrap().uid();
        assert_eq!((owner("tpm"), owner("tpm/state")), (7001, 7001));
        assert_eq!((owner("precious"), owner("tpm/second"), owner("stranger")), (7000, 7000, 7002));
        let (own, books) = (format!("state/{machine}.fd"), "state/uids.json");
        for name in [&*own, books] {
            std::fs::write(at(name), "").unwrap();
            take(name);
        }
        take(&format!("state/{machine}/../../stranger"));
        assert_eq!((owner(&own), owner(books), owner("stranger")), (7001, 0, 7002));
    }
}
