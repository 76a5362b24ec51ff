//! The kernel's half of a guest's vsock: opened by us, with a number that no other guest has.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// The first number of a guest; those below are the host's.
const FIRST: u32 = 3;
/// How many are tried.
const TRIES: u32 = 10_000;

/// `VHOST_VSOCK_SET_GUEST_CID`, which takes a pointer to a `u64`; not among libc's constants.
const SET_GUEST_CID: libc::c_ulong = 0x4008_af60;

/// Opens `device`, which is `/dev/vhost-vsock`, and takes the number `cid`, or the next that is free. The number is taken for
/// as long as a copy of the descriptor is open. Blocks.
pub fn open(device: &Path, cid: Option<u32>) -> io::Result<(OwnedFd, u32)> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", device.display()));
    let file = File::options().read(true).write(true).open(device).map_err(named)?;
    let set = |cid: u32| {
        let number = u64::from(cid);
        // SAFETY: the call reads one u64, which lives across it.
        match unsafe { libc::ioctl(file.as_raw_fd(), SET_GUEST_CID, std::ptr::from_ref(&number)) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let taken = take(cid, set)?;
    Ok((file.into(), taken))
}

fn take(cid: Option<u32>, set: impl Fn(u32) -> io::Result<()>) -> io::Result<u32> {
    let is_taken = |e: &io::Error| e.kind() == io::ErrorKind::AddrInUse;
    if let Some(cid) = cid {
        return match set(cid) {
            Err(e) if is_taken(&e) => Err(io::Error::new(e.kind(), format!("another guest has the number {cid}"))),
            done => done.map(|()| cid),
        };
    }
    for cid in FIRST..FIRST + TRIES {
        match set(cid) {
            Err(e) if is_taken(&e) => {}
            done => return done.map(|()| cid),
        }
    }
    Err(io::Error::other("no number is free"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_free_number_is_taken() {
        let set = |cid: u32| if cid < 7 { Err(io::Error::from_raw_os_error(libc::EADDRINUSE)) } else { Ok(()) };
        assert_eq!(take(None, set).unwrap(), 7);
        assert_eq!(take(Some(9), set).unwrap(), 9);
        assert_eq!(take(Some(4), set).unwrap_err().to_string(), "another guest has the number 4");
        let broken = |_| Err(io::Error::from_raw_os_error(libc::ENODEV));
        assert_eq!(take(None, broken).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn what_is_not_there_or_no_vsock_is_said() {
        let missing = open(Path::new("/nowhere/vhost-vsock"), None).unwrap_err().to_string();
        assert!(missing.starts_with("/nowhere/vhost-vsock: No such file"), "{missing}");
        assert_eq!(open(Path::new("/dev/null"), None).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
