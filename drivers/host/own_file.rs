//! Files of virtd's own that hold what it knows: replaced in one step, so that whoever reads one reads all of it.

use serde::Serialize;
use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Replaces a file, in a folder of ours that is there, by `value` in JSON, mode 0600. `durably`: a host that loses power has
/// the new one once this has returned; else it may have the one before. On failure that is there as it was.
pub fn replace_json(file: &Path, value: &impl Serialize, durably: bool) -> io::Result<()> {
    replace(file, &serde_json::to_vec(value)?, 0o600, durably)
}

/// The same by any content, and with that mode.
pub fn replace(file: &Path, content: &[u8], mode: u32, durably: bool) -> io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    new.write_all(content)?;
    new.as_file().set_permissions(Permissions::from_mode(mode))?;
    if durably {
        new.as_file().sync_all()?;
    }
    new.persist(file)?;
    if durably {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// The content of such a file, of at most `most` bytes.
pub fn read(file: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::with_capacity(most as usize + 1);
    File::open(file)?.take(most + 1).read_to_end(&mut content)?;
    match content.len() as u64 <= most {
        true => Ok(content),
        false => Err(io::Error::other(format!("it has more than {most} bytes"))),
    }
}

/// Removes such a file, for good; it need not be there.
pub fn remove(file: &Path) -> io::Result<()> {
    match std::fs::remove_file(file) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        removed => removed?,
    }
    File::open(file.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("books.json");
        for durably in [true, false] {
            replace_json(&file, &[1, 2], durably).unwrap();
            // A key that is no text cannot be written.
            let unwritable = std::collections::BTreeMap::from([(vec![1], 1)]);
            replace_json(&file, &unwritable, durably).unwrap_err();
            assert_eq!(std::fs::read_to_string(&file).unwrap(), "[1,2]");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
        }
        replace_json(&dir.path().join("none/books.json"), &[1], true).unwrap_err();
    }
}
