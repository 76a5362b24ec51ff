//! Secrets that the administrator keeps, a file each: what they are called is their name, and nobody else can read them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use virt_model::driver::DriverError;

/// Larger than any key.
const MAX_SECRET: u64 = 64 << 10;

/// Reads the secret `name` from `folder`. One line end at the end is not part of it. Errors say where it would have to be.
pub fn read(folder: &Path, name: &str) -> Result<Vec<u8>, DriverError> {
    let path = folder.join(name);
    if name.is_empty() || name.starts_with('.') || name.contains('/') {
        return Err(DriverError::Storage(format!("'{name}' is not the name of a secret: it would be a file's name")));
    }
    open(&path).map_err(|e| {
        let how = match e.kind() {
            io::ErrorKind::NotFound => "; put the secret into that file, mode 0600",
            _ => "",
        };
        DriverError::Storage(format!("the secret {}: {e}{how}", path.display()))
    })
}

fn open(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let meta = file.metadata()?;
    let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    if !meta.is_file() || meta.len() > MAX_SECRET {
        return refuse("a secret is a plain file of at most 64 KiB");
    }
    if meta.mode() & 0o077 != 0 {
        return refuse("others can read it; make it mode 0600");
    }
    let mut content = Vec::new();
    file.take(MAX_SECRET).read_to_end(&mut content)?;
    if content.last() == Some(&b'\n') {
        content.pop();
    }
    Ok(content)
}

/// An open file in memory with that content, for a process that is to read it.
pub fn handed(content: &[u8]) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("secret", rustix::fs::MemfdFlags::CLOEXEC)?;
    File::from(fd.try_clone()?).write_all(content)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_secret_is_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, content: &str, mode: u32| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        put("good", "secret\n", 0o600);
        put("open", "secret", 0o644);
        std::os::unix::fs::symlink("good", dir.path().join("link")).unwrap();
        let message = |name: &str| read(dir.path(), name).unwrap_err().to_string();
        assert_eq!(read(dir.path(), "good").unwrap(), b"secret");
        assert!(message("open").contains("make it mode 0600"), "{}", message("open"));
        assert!(message("none").contains("none: No such file"), "{}", message("none"));
        assert!(message("none").ends_with("put the secret into that file, mode 0600"), "{}", message("none"));
        for odd in ["", ".hidden", "../good", "a/b", "link"] {
            assert!(read(dir.path(), odd).is_err(), "{odd}");
        }
    }
}
