//! What a start needs of the host's files, looked at before anything is begun, or ended to make room for it.

use super::plan::{Command, Expected, HostFile};
use crate::host::files::{Seen, What};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use virt_model::driver::DriverError;

/// The paths of a start that must lead somewhere, and what must be there.
pub struct Needs {
    there: BTreeMap<PathBuf, Expected>,
}

impl Needs {
    /// Of the command that would be run. What is made at the start is not among it, but the folder where it is made is;
    /// `own`: the folder of the guest's sockets. `restored`: a snapshot brings the firmware's variables along.
    pub fn of(command: &Command, own: &Path, restored: bool) -> Needs {
        let beside = command.companions.iter().flat_map(|companion| &companion.files);
        let variables = command.nvram.as_ref().map(|nvram| &nvram.path);
        let files = command.files.iter().chain(beside);
        let files = files.filter(|file| !file.path.starts_with(own) && Some(&file.path) != variables);
        let there = files.filter_map(|file| match file.create {
            true => Some((file.path.parent()?.to_owned(), Expected::Anything)),
            false => Some((file.path.clone(), file.expected)),
        });
        let mut there: BTreeMap<PathBuf, Expected> = there.collect();
        if let Some(nvram) = command.nvram.as_ref().filter(|_| !restored) {
            // Without a template they are there, or cannot be made; with one, that is there if they are not.
            let template = nvram.template.as_ref().map(|(template, _)| template);
            let source = if Seen::at(&nvram.path).is_there() { &nvram.path } else { template.unwrap_or(&nvram.path) };
            there.entry(source.clone()).or_insert(Expected::Image);
        }
        Needs { there }
    }

    /// All but these.
    pub fn without<'a>(mut self, these: impl Iterator<Item = &'a Path>) -> Needs {
        let these: BTreeSet<&Path> = these.collect();
        self.there.retain(|path, _| !these.contains(&**path));
        self
    }

    /// Looks at all of them; the error names the first that leads nowhere, or to what cannot be it. Blocks.
    pub fn are_met(&self) -> Result<(), DriverError> {
        for (path, expected) in &self.there {
            let seen = Seen::at(path);
            if !seen.is_there() && !is_pipe(path) {
                return Err(DriverError::Storage(format!(
                    "{} is not there, and the machine needs it; put it back, or take it out of the configuration",
                    path.display()
                )));
            }
            expected.judge(path, seen.what)?;
        }
        Ok(())
    }
}

/// Refuses files that are there and are not what they must be. Blocks.
pub fn are_as_expected(files: &[HostFile]) -> Result<(), DriverError> {
    files.iter().try_for_each(|file| file.expected.judge(&file.path, Seen::at(&file.path).what))
}

impl Expected {
    /// Refuses what has been found at a path, if it is not that; nothing is fine.
    pub fn judge(self, path: &Path, found: What) -> Result<(), DriverError> {
        let wanted = match (self, found) {
            (_, What::Nothing) | (Expected::Anything, _) => return Ok(()),
            (Expected::Image, What::Plain | What::Block) | (Expected::PlainFile, What::Plain) => return Ok(()),
            (Expected::Image, _) => "neither a plain file nor a block device",
            (Expected::PlainFile, _) => "no plain file",
        };
        let (path, other) = (path.display(), if self == Expected::Image { " or device" } else { "" });
        Err(DriverError::Storage(format!(
            "{path} is {wanted}, and QEMU cannot read it; name a file{other} that it can"
        )))
    }
}

/// A pipe's path stands for two files.
fn is_pipe(path: &Path) -> bool {
    let mut one = path.as_os_str().to_owned();
    one.push(".in");
    Seen::at(Path::new(&one)).is_there()
}

#[cfg(test)]
mod tests {
    use super::super::plan::{HostFile, Nvram};
    use super::*;

    fn file(path: PathBuf, create: bool) -> HostFile {
        HostFile { path, write: create, create, device: false, expected: Expected::Anything }
    }

    /// QEMU would wait for their other end.
    #[test]
    fn a_pipe_is_no_kernel_and_no_disk() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let why = |path: &Path, expected| {
            let file = HostFile { expected, ..file(path.to_owned(), false) };
            let command = Command { files: vec![file.clone()], ..Command::default() };
            let met = Needs::of(&command, Path::new("/own"), false).are_met().map_err(|e| e.to_string());
            assert_eq!(are_as_expected(&[file]).map_err(|e| e.to_string()), met);
            met
        };
        for (expected, said) in [(Expected::PlainFile, "no plain file"), (Expected::Image, "nor a block device")] {
            let refused = why(&pipe, expected).unwrap_err();
            assert!(refused.starts_with(&format!("{} is n", pipe.display())) && refused.contains(said), "{refused}");
        }
        why(&pipe, Expected::Anything).expect("a serial port may be one");
        let plain = folder.path().join("plain");
        std::fs::write(&plain, "").unwrap();
        why(&plain, Expected::PlainFile).expect("a plain file");
        why(&plain, Expected::Image).expect("a plain file");
    }

    #[test]
    fn what_is_opened_is_there_and_what_is_made_has_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let (own, disk, log) = (at("own"), at("disk"), at("log/serial"));
        let command = Command {
            files: vec![file(disk.clone(), false), file(log.clone(), true), file(own.join("socket"), false)],
            nvram: Some(Nvram {
                path: at("vars"),
                format: "raw".into(),
                template: Some((at("template"), "raw".into())),
            }),
            ..Command::default()
        };
        let why = |restored| Needs::of(&command, &own, restored).are_met().map_err(|e| e.to_string());
        assert!(why(false).unwrap_err().starts_with(&format!("{} is not there", disk.display())));
        std::fs::write(&disk, "").unwrap();
        assert!(why(false).unwrap_err().starts_with(&format!("{} is not there", at("log").display())));
        std::fs::create_dir(at("log")).unwrap();
        assert!(why(false).unwrap_err().starts_with(&format!("{} is not there", at("template").display())));
        why(true).expect("a snapshot brings its variables");
        std::fs::write(at("vars"), "").unwrap();
        why(false).expect("all is there");
    }
}
