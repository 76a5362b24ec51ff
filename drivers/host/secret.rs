//! Secrets that the administrator keeps, a file each: what they are called is their name, and nobody else can read them.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::secret::{SecretName, UsageKind};

/// Larger than any key.
const MAX_SECRET: u64 = 64 << 10;

/// The file of a secret: its uuid, or its usage, in which stands as `%` and two hexadecimal digits what no file's name can hold.
pub fn file_of(name: &SecretName) -> String {
    let usage = match name {
        SecretName::Uuid(uuid) => return uuid.to_string(),
        SecretName::Usage(_, usage) => usage,
    };
    let plain = |(n, c): (usize, char)| !(c.is_control() || matches!(c, '/' | '%') || n == 0 && c == '.');
    let spell = |(n, c): (usize, char)| match plain((n, c)) {
        true => c.to_string(),
        false => c.to_string().bytes().map(|byte| format!("%{byte:02X}")).collect(),
    };
    usage.chars().enumerate().map(spell).collect()
}

/// Whose file that is. `None`: nobody's; no usage has such a file.
pub fn name_of(file: &str) -> Option<SecretName> {
    if let Ok(uuid) = Uuid::try_parse(file) {
        return Some(SecretName::Uuid(uuid));
    }
    let mut bytes = Vec::with_capacity(file.len());
    let mut rest = file.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = after;
    }
    let name = SecretName::Usage(UsageKind::Volume, String::from_utf8(bytes).ok()?.into());
    (file_of(&name) == file).then_some(name)
}

/// The names of all files in `folder` that could be secrets.
pub fn all(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    names
}

/// Whether there is a file of that name, or nobody can tell.
pub fn is_there(folder: &Path, name: &str) -> bool {
    let found = std::fs::symlink_metadata(folder.join(name));
    !found.is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
}

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
    // Of its full size at once: a buffer that grows leaves copies behind.
    let mut content = Vec::with_capacity(MAX_SECRET as usize + 1);
    file.take(MAX_SECRET).read_to_end(&mut content)?;
    if content.last() == Some(&b'\n') {
        content.pop();
    }
    Ok(content)
}

/// An open file in memory with that content, which a process is to read from its beginning, where the descriptor stands.
pub fn handed(content: &[u8]) -> io::Result<OwnedFd> {
    let file = File::from(rustix::fs::memfd_create("secret", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all_at(content, 0)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_named_as_its_secret_and_back() {
        let usage = |text: &str| SecretName::Usage(UsageKind::Volume, text.into());
        for (name, file) in [
            (SecretName::Uuid(Uuid::nil()), "00000000-0000-0000-0000-000000000000"),
            (usage("/srv/a.img"), "%2Fsrv%2Fa.img"),
            (usage(".hidden 100%"), "%2Ehidden 100%25"),
            (usage("libvirt iscsi"), "libvirt iscsi"),
        ] {
            assert_eq!((file_of(&name).as_str(), name_of(file)), (file, Some(name)));
        }
        for odd in ["a%", "a%2", "a%zz", "%61", "%ff"] {
            assert_eq!(name_of(odd), None, "{odd}");
        }
    }

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
