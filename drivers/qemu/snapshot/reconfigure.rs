//! A saved machine gets another configuration: a copy of its file, whole and on disk, takes the file's place.
//!
//! The copy has no name until it is whole, where its file system knows such files: so a virtd that is killed leaves nothing of it.

use super::files::{RESERVE, beside, check_space, stored};
use super::reading::{Interrupted, held, interrupted};
use crate::host::files::Seen;
use crate::host::resolve::Place;
use crate::host::saved::Saved;
use crate::host::workers::{Errand, Stop, Workers};
use rustix::fs::{Mode, Stat, fchmod, fchown, fstat};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::driver::saved::SavedState;

/// Puts `configuration` in the place of the one in that file. `wary`: as root among others.
pub async fn reconfigure(
    workers: &Workers,
    state: &SavedState,
    configuration: String,
    wary: bool,
) -> Result<(), DriverError> {
    let (saved, path) = (held(state)?, state.file.clone());
    // It is nobody's work but the caller's; it reads and writes all of it.
    let errand = Errand::new(Uuid::new_v4(), path.display().to_string()).of(saved.bytes().saturating_mul(2));
    let work = move |stop: &Arc<Stop>| {
        check_space(&path, &Seen::at(&path), saved.bytes() + RESERVE)?;
        let failed = |e: io::Error| stored(&path, &e);
        let place = Place::resolve(&path, wary).map_err(failed)?;
        let there = is_still(&place, &saved, &path)?;
        let copy = Copy::begin(&place, &path).map_err(failed)?;
        let made = write(&copy.file, &saved, &configuration, &there, stop).and_then(|()| {
            is_still(&place, &saved, &path).map_err(Interrupted::Stopped)?;
            copy.replace(&place).map_err(|e| Interrupted::Stopped(failed(e)))
        });
        if made.is_err() {
            copy.discard();
        }
        made.map_err(|why| interrupted(why, &path))
    };
    workers.run(errand, work).await
}

/// What the kernel says of the file that is there; an error if it is not the one that was read.
fn is_still(place: &Place, saved: &Saved, path: &Path) -> Result<Stat, DriverError> {
    let (there, read) = place.stat().and_then(|there| Ok((there, saved.stat()?))).map_err(|e| stored(path, &e))?;
    match (there.st_dev, there.st_ino) == (read.st_dev, read.st_ino) {
        true => Ok(there),
        false => Err(DriverError::Refused(format!(
            "{}: another file has come to be there, or it is a link; name the file itself, and try again",
            path.display()
        ))),
    }
}

/// Writes all of it, and has that on disk. It belongs to whom the file belongs.
fn write(file: &File, saved: &Saved, configuration: &str, like: &Stat, stop: &Stop) -> Result<(), Interrupted> {
    saved.copy_with(file, configuration, |_| stop.check().map_err(Interrupted::Stopped))?;
    let owned =
        fchown(file, Some(rustix::fs::Uid::from_raw(like.st_uid)), Some(rustix::fs::Gid::from_raw(like.st_gid)));
    owned.and_then(|()| fchmod(file, Mode::from_raw_mode(like.st_mode & 0o7777))).map_err(io::Error::from)?;
    Ok(file.sync_all()?)
}

/// The copy, and where it has a name of its own before it is whole.
struct Copy {
    file: File,
    part: Place,
    named: bool,
}

impl Copy {
    fn begin(place: &Place, path: &Path) -> io::Result<Copy> {
        let part = Place::in_folder(place.folder_fd().try_clone()?, beside(path).file_name().unwrap_or_default());
        let (file, named) = match place.create_unnamed(0o600)? {
            Some(file) => (file, false),
            None => (part.create(0o600)?, true),
        };
        Ok(Copy { file, part, named })
    }

    fn replace(&self, place: &Place) -> io::Result<()> {
        if !self.named {
            self.part.name_file(&self.file)?;
        }
        if let Err(error) = self.part.rename_to(place) {
            let _ = self.part.remove_file_if_there();
            return Err(error);
        }
        place.sync_folder()
    }

    /// Removes what has a name; after [`Copy::replace`] that is nothing.
    fn discard(&self) {
        let ours = || Ok::<_, io::Error>(fstat(&self.file)?.st_ino == self.part.stat()?.st_ino);
        if ours().unwrap_or(false) {
            let _ = self.part.remove_file_if_there();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::saved::{Draft, Telling, pump};
    use std::os::unix::fs::PermissionsExt;

    fn telling() -> Telling {
        Telling {
            driver: "qemu".into(),
            version: (7, 2, 0),
            saved_usec: 1,
            paused: false,
            cpu: Some("<cpu mode='custom'/>".into()),
            disks: Vec::new(),
        }
    }

    fn made(path: &Path, configuration: &str, stream: &[u8]) {
        let mut file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        let draft = Draft::begin(&mut file, &telling(), configuration).unwrap();
        let written = pump::<io::Error>(&mut &*stream, &mut file, |_| Ok(())).unwrap();
        draft.finish(&file, &telling(), configuration, written).unwrap();
    }

    fn opened(path: &Path) -> SavedState {
        let saved = Saved::read(File::open(path).unwrap()).unwrap();
        SavedState { file: path.to_owned(), paused: false, cpu: None, held: Arc::new(saved) }
    }

    #[tokio::test]
    async fn another_configuration_takes_the_place_of_the_old_one_and_nothing_else_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.save");
        let stream: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
        made(&path, "<domain/>", &stream);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let long = format!("<domain>{}</domain>", "x".repeat(10_000));
        reconfigure(&Workers::default(), &opened(&path), long.clone(), false).await.unwrap();
        let saved = Saved::read(File::open(&path).unwrap()).unwrap();
        assert_eq!((saved.configuration.as_str(), &saved.telling), (long.as_str(), &telling()));
        saved.verify::<crate::host::saved::Unusable>(|_| Ok(())).unwrap();
        assert_eq!(saved.length(), 3_000_000);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[tokio::test]
    async fn what_is_damaged_or_another_by_now_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.save");
        made(&path, "<domain/>", b"memory");
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let set =
            async |state: &SavedState| reconfigure(&Workers::default(), state, "<domain x='1'/>".into(), false).await;
        let error = set(&opened(&path)).await.unwrap_err();
        assert!(
            matches!(&error, DriverError::Argument(why) if why.contains("memory in it has been changed")),
            "{error}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        let state = opened(&path);
        std::fs::rename(&path, dir.path().join("moved")).unwrap();
        std::fs::write(&path, "another").unwrap();
        assert!(matches!(set(&state).await, Err(DriverError::Refused(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"another");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside it");
    }
}
