//! The file of a save between its beginning and its name: known by its number in its file system, in a folder that is held.
//!
//! What a path is called proves nothing: what is renamed or removed is what we wrote, or nothing.

use super::files::stored;
use super::note::Save;
use crate::host::files::What;
use crate::host::resolve::Place;
use rustix::fs::{FileType, Stat, fstat};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use virt_model::driver::DriverError;

/// The two names that it can have, in one folder that is held, and which file it is.
#[derive(Debug)]
pub struct Written {
    part: Place,
    file: Place,
    shown: PathBuf,
    /// Its number; `None`: it may not have been made.
    number: Option<u64>,
}

/// Where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Beside its name.
    Beside,
    /// Under its name.
    Named,
    /// Under neither, in a folder that is there.
    Nowhere,
}

/// What came of giving it its name. An error beside these says nothing of where it is now.
#[derive(Debug)]
pub enum Naming {
    /// It has its name, and that is on disk.
    Named,
    /// It is beside its name still, and why.
    Beside(DriverError),
    /// It is nowhere.
    Lost,
}

impl Written {
    /// Holds the folder that a note means now. Blocks.
    pub fn find(note: &Save, wary: bool) -> Result<Written, DriverError> {
        let find = || {
            let part = Place::resolve(&note.part, wary)?;
            let name = note.file.file_name().ok_or(io::ErrorKind::InvalidInput)?;
            let file = Place::in_folder(part.folder_fd().try_clone()?, name);
            Ok(Written { part, file, shown: note.file.clone(), number: note.number })
        };
        find().map_err(|e: io::Error| stored(&note.part, &e))
    }

    /// Makes it, beside its name, where nothing is; only we may open it. Blocks.
    pub fn create(&mut self) -> Result<File, DriverError> {
        let mut make = || {
            let file = self.part.create(0o600)?;
            self.number = Some(fstat(&file)?.st_ino);
            Ok(file)
        };
        make().map_err(|e: io::Error| stored(&self.shown, &e))
    }

    /// Its number, once it has been made.
    pub fn number(&self) -> Option<u64> {
        self.number
    }

    /// Where it is; an error if that cannot be told. Blocks.
    pub fn standing(&self) -> Result<Standing, DriverError> {
        for (place, standing) in [(&self.file, Standing::Named), (&self.part, Standing::Beside)] {
            if there(place).map_err(|e| stored(&self.shown, &e))?.is_some_and(|stat| Some(stat.st_ino) == self.number) {
                return Ok(standing);
            }
        }
        Ok(Standing::Nowhere)
    }

    /// Gives it its name, if it has it not yet, over a plain file of that name; and has that on disk. Blocks.
    pub fn name(&self) -> Result<Naming, DriverError> {
        match self.standing()? {
            Standing::Nowhere => return Ok(Naming::Lost),
            Standing::Beside => {
                if let Err(why) = self.check_replaced().and_then(|()| self.part.rename_to(&self.file)) {
                    let error = stored(&self.shown, &why);
                    // Some file systems have done what they say has failed.
                    return match self.standing()? {
                        Standing::Beside => Ok(Naming::Beside(error)),
                        _ => Err(error),
                    };
                }
            }
            Standing::Named => {}
        }
        self.file.sync_folder().map_err(|e| stored(&self.shown, &e))?;
        Ok(Naming::Named)
    }

    /// Nothing or a plain file has its name.
    fn check_replaced(&self) -> io::Result<()> {
        let kind = there(&self.file)?.map(|stat| What::from(FileType::from_raw_mode(stat.st_mode)));
        match kind {
            None | Some(What::Plain) => Ok(()),
            Some(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "what is there now is no plain file")),
        }
    }

    /// Removes it, whichever name it has; what is not there is fine, and what is not it stays. Blocks.
    pub fn remove(&self) -> Result<(), DriverError> {
        let remove = || {
            // Before its number was noted nobody but us can have had that name.
            let unknown = self.number.is_none();
            for place in [&self.part, &self.file] {
                let ours = there(place)?.is_some_and(|stat| Some(stat.st_ino) == self.number);
                if ours || unknown && std::ptr::eq(place, &self.part) {
                    place.remove_file_if_there()?;
                }
            }
            Ok(())
        };
        remove().map_err(|e: io::Error| stored(&self.shown, &e))
    }
}

/// What has that name; an error if that cannot be told.
fn there(place: &Place) -> io::Result<Option<Stat>> {
    match place.stat() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        stat => stat.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn note(folder: &Path) -> Save {
        let (part, file) = (folder.join("web.save.virtd-1"), folder.join("web.save"));
        Save {
            part,
            file,
            number: None,
            resume: true,
            complete: false,
            goes_on: false,
            given: false,
            memory_only: false,
        }
    }

    /// One that is made, as its note says it afterwards.
    fn made(folder: &Path) -> (Written, Save) {
        let mut note = note(folder);
        let mut written = Written::find(&note, false).unwrap();
        written.create().unwrap();
        note.number = written.number();
        (written, note)
    }

    #[test]
    fn it_is_named_once_and_known_by_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let (_, note) = made(dir.path());
        std::fs::write(&note.file, "before").unwrap();
        for _ in 0..2 {
            let found = Written::find(&note, false).unwrap();
            assert!(matches!(found.name().unwrap(), Naming::Named));
            assert_eq!(found.standing().unwrap(), Standing::Named);
        }
        assert_eq!(std::fs::read(&note.file).unwrap(), b"", "what was there is replaced");
    }

    #[test]
    fn the_absence_of_what_was_written_is_no_success() {
        let dir = tempfile::tempdir().unwrap();
        let (written, note) = made(dir.path());
        // The old file has the name, and ours is gone.
        std::fs::write(&note.file, "before").unwrap();
        std::fs::remove_file(&note.part).unwrap();
        assert!(matches!(written.name().unwrap(), Naming::Lost));
        assert_eq!(std::fs::read(&note.file).unwrap(), b"before");
        let away = note_in_a_folder_that_is_gone(&note);
        assert!(Written::find(&away, false).is_err(), "a folder that is not there tells nothing");
    }

    fn note_in_a_folder_that_is_gone(note: &Save) -> Save {
        let inner = |path: &Path| path.with_file_name("gone").join(path.file_name().unwrap());
        Save { part: inner(&note.part), file: inner(&note.file), ..note.clone() }
    }

    #[test]
    fn what_another_has_put_there_is_neither_named_nor_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (written, note) = made(dir.path());
        std::fs::rename(&note.part, dir.path().join("kept")).unwrap();
        std::fs::write(&note.part, "another's").unwrap();
        assert!(matches!(written.name().unwrap(), Naming::Lost));
        written.remove().unwrap();
        assert_eq!(std::fs::read(&note.part).unwrap(), b"another's");
        assert!(!note.file.exists());
    }

    #[test]
    fn a_folder_in_its_way_leaves_it_beside() {
        let dir = tempfile::tempdir().unwrap();
        let (written, note) = made(dir.path());
        std::fs::create_dir(&note.file).unwrap();
        assert!(matches!(written.name().unwrap(), Naming::Beside(_)));
        written.remove().unwrap();
        assert!(!note.part.exists() && note.file.is_dir());
    }

    /// The folder's path comes to mean another one while it is written.
    #[test]
    fn the_folder_is_the_one_in_which_it_was_begun() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, moved) = (dir.path().join("folder"), dir.path().join("moved"));
        std::fs::create_dir(&folder).unwrap();
        let (written, note) = made(&folder);
        std::fs::rename(&folder, &moved).unwrap();
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(&note.part, "another's").unwrap();
        assert!(matches!(written.name().unwrap(), Naming::Named));
        assert!(moved.join("web.save").exists() && !note.file.exists());
    }
}
