//! What a start needs of the host's files, looked at before anything is begun, or ended to make room for it.

use super::command::Command;
use crate::host::files::Seen;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use virt_model::driver::DriverError;

/// The paths of a start that must lead somewhere.
pub struct Needs {
    there: Vec<PathBuf>,
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
            true => file.path.parent().map(Path::to_owned),
            false => Some(file.path.clone()),
        });
        let mut there: Vec<PathBuf> = there.collect();
        if let Some(nvram) = command.nvram.as_ref().filter(|_| !restored) {
            // Without a template they are there, or cannot be made; with one, that is there if they are not.
            let template = nvram.template.as_ref().map(|(template, _)| template);
            let source = if Seen::at(&nvram.path).is_there() { &nvram.path } else { template.unwrap_or(&nvram.path) };
            there.push(source.clone());
        }
        there.sort();
        there.dedup();
        Needs { there }
    }

    /// All but these.
    pub fn without<'a>(mut self, these: impl Iterator<Item = &'a Path>) -> Needs {
        let these: BTreeSet<&Path> = these.collect();
        self.there.retain(|path| !these.contains(&**path));
        self
    }

    /// Looks at all of them; the error names the first that leads nowhere. Blocks.
    pub fn are_met(&self) -> Result<(), DriverError> {
        let missing = |path: &&PathBuf| !Seen::at(path).is_there() && !is_pipe(path);
        match self.there.iter().find(missing) {
            None => Ok(()),
            Some(path) => Err(DriverError::Storage(format!(
                "{} is not there, and the machine needs it; put it back, or take it out of the configuration",
                path.display()
            ))),
        }
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
    use super::super::command::{HostFile, Nvram};
    use super::*;

    fn file(path: PathBuf, create: bool) -> HostFile {
        HostFile { path, write: create, backing: false, create, device: false }
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
