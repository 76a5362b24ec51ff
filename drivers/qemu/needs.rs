//! What a start needs of the host's files, looked at before anything is begun, or ended to make room for it.

use super::format::known_format;
use super::live;
use super::plan::{Command, Expected, HostFile};
use crate::host::chain::bears_sign_of;
use crate::host::files::{Seen, What, may_open};
use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use virt_model::domain::DomainDef;
use virt_model::domain::listening::fixed_ports;
use virt_model::driver::DriverError;
use virt_model::xml::{Element, Finding, FindingKind, Place};

/// The paths of a start that must lead somewhere, and what must be there.
pub struct Needs {
    there: BTreeMap<PathBuf, Need>,
}

/// What must be at one path.
struct Need {
    expected: Expected,
    write: bool,
    /// What the definition names: the path itself, or what is made in that folder.
    named: PathBuf,
}

/// What is not as a start needs it.
#[derive(Debug, PartialEq, Eq)]
pub struct Unmet {
    named: PathBuf,
    why: String,
}

impl Needs {
    /// Of the command that would be run. What is made at the start is not among it, but the folder where it is made is;
    /// `own`: the folder of the guest's sockets. `restored`: a snapshot brings the firmware's variables along.
    pub fn of(command: &Command, own: &Path, restored: bool) -> Needs {
        let beside = command.companions.iter().flat_map(|companion| &companion.files);
        let variables = command.nvram.as_ref().map(|nvram| &nvram.path);
        let files = command.files.iter().chain(beside);
        let files = files.filter(|file| !file.path.starts_with(own) && Some(&file.path) != variables);
        let there = files.filter_map(|file| {
            let need = |expected| Need { expected, write: file.write, named: file.path.clone() };
            match file.create {
                true => Some((file.path.parent()?.to_owned(), need(Expected::Anything))),
                false => Some((file.path.clone(), need(file.expected))),
            }
        });
        let mut there: BTreeMap<PathBuf, Need> = there.collect();
        if let Some(nvram) = command.nvram.as_ref().filter(|_| !restored) {
            // Without a template they are there, or cannot be made; with one, that is there if they are not.
            let template = nvram.template.as_ref().map(|(template, _)| template);
            let own = Seen::at(&nvram.path).is_there();
            let source = if own { &nvram.path } else { template.unwrap_or(&nvram.path) };
            let need = Need { expected: Expected::Image, write: own, named: source.clone() };
            there.entry(source.clone()).or_insert(need);
        }
        Needs { there }
    }

    /// All but these.
    pub fn without<'a>(mut self, these: impl Iterator<Item = &'a Path>) -> Needs {
        let these: BTreeSet<&Path> = these.collect();
        self.there.retain(|path, _| !these.contains(&**path));
        self
    }

    /// All but what has been looked at in the same way.
    fn beside(mut self, looked_at: &Needs) -> Needs {
        self.there.retain(|path, need| {
            let other = |one: &Need| (one.expected, one.write) != (need.expected, need.write);
            looked_at.there.get(path).is_none_or(other)
        });
        self
    }

    /// What leads nowhere, or to what cannot be it. `as_us`: whoever runs the guest has our rights, and is lent nothing.
    /// Blocks.
    pub fn unmet(&self, as_us: bool) -> Vec<Unmet> {
        let unmet = |(path, need): (&PathBuf, &Need)| {
            let why = need.objection(path, as_us)?;
            Some(Unmet { named: need.named.clone(), why })
        };
        self.there.iter().filter_map(unmet).collect()
    }
}

impl Need {
    fn objection(&self, path: &Path, as_us: bool) -> Option<String> {
        let seen = Seen::at(path);
        if !seen.is_there() && !is_pipe(path) {
            return Some(format!(
                "{} is not there, and the machine needs it; put it back, or take it out of the configuration",
                path.display()
            ));
        }
        if let Err(error) = self.expected.judge(path, seen.what) {
            return Some(error.to_string());
        }
        let opened = as_us && matches!(seen.what, What::Plain | What::Block);
        let refused = may_open(path, self.write).err().filter(|_| opened)?;
        let deed = if self.write { "read and written" } else { "read" };
        Some(format!("{} cannot be {deed} by the user whom the guest runs as: {refused}", path.display()))
    }
}

/// What a start of `def` needs of the host's files and does not find: images of its disks, and what else `command` opens.
/// `own`, `restored`, `as_us`: as above. Blocks.
pub fn unmet(def: &DomainDef, command: Option<&Command>, own: &Path, restored: bool, as_us: bool) -> Vec<Unmet> {
    let lenient: BTreeSet<&Path> = live::media_that_may_be_missing(def, restored).collect();
    let (images, mut unmet) = of_images(def, &lenient, as_us);
    if let Some(command) = command {
        let others = Needs::of(command, own, restored).without(lenient.into_iter()).beside(&images).unmet(as_us);
        let told: BTreeSet<PathBuf> = unmet.iter().map(|one| one.named.clone()).collect();
        unmet.extend(others.into_iter().filter(|one| !told.contains(&one.named)));
    }
    unmet
}

/// The same of the images of disks, and of what lies in drives, whatever else is to be said of the machine; with what was
/// looked at, and how.
fn of_images(def: &DomainDef, lenient: &BTreeSet<&Path>, as_us: bool) -> (Needs, Vec<Unmet>) {
    let (mut there, mut unmet) = (BTreeMap::new(), Vec::new());
    for disk in &def.devices.disks {
        for (depth, layer) in disk.chain().enumerate() {
            let Some(path) = layer.path.map(Path::new) else { continue };
            let write = depth == 0 && !disk.readonly;
            let need = Need { expected: Expected::Image, write, named: path.to_owned() };
            let left_out = lenient.contains(path) && !Seen::at(path).is_there();
            let why = match need.objection(path, as_us) {
                _ if left_out => None,
                Some(why) => Some(why),
                None => other_format(path, layer.format.unwrap_or("raw")),
            };
            unmet.extend(
                why.map(|why| Unmet { named: path.to_owned(), why: format!("disk '{}': {why}", disk.target.dev) }),
            );
            there.insert(path.to_owned(), need);
        }
    }
    (Needs { there }, unmet)
}

/// Why an image that is there is not of that format. What cannot be read is told by who reads it.
fn other_format(path: &Path, format: &str) -> Option<String> {
    let format = known_format(format)?;
    let image = path.display();
    (bears_sign_of(path, format).ok() == Some(false)).then(|| {
        format!("{image} is no {format} image ('qemu-img info {image}' says what it is); correct the <driver type='…'>, or the file")
    })
}

/// The TCP ports of this host that the machine is to listen on and cannot have now. Blocks.
pub fn taken_ports(def: &DomainDef) -> Vec<Finding> {
    let taken = fixed_ports(def).into_iter().filter_map(|fixed| {
        let address: IpAddr = fixed.address.parse().ok()?;
        let error = TcpListener::bind((address, fixed.port)).err()?;
        let (port, whose) = (fixed.port, &fixed.whose);
        let why = match error.kind() {
            ErrorKind::AddrInUse => format!(
                "{whose}: TCP port {port} of {address} is in use now; end what listens there, or name another port"
            ),
            ErrorKind::AddrNotAvailable => format!("{whose}: {address} is no address of this host"),
            _ => return None,
        };
        Some(Finding::warning(&fixed.place, why))
    });
    taken.collect()
}

impl Unmet {
    /// As what keeps a definition from running, where it names the file.
    pub fn finding(self, tree: &Element) -> Finding {
        match place_of(tree, &tree.origin, &self.named.to_string_lossy()) {
            Some(place) => Finding::unsupported(&place, self.why),
            None => Finding::anywhere(FindingKind::Unsupported, "/", self.why),
        }
    }

    /// As what a start fails for.
    pub fn error(self) -> DriverError {
        DriverError::Storage(self.why)
    }
}

/// Where a definition first says that value, of what a machine is made of.
fn place_of(element: &Element, at: &Place, value: &str) -> Option<Place> {
    if let Some(attribute) = element.attributes.iter().find(|attribute| attribute.value == value) {
        return Some(at.attribute(&attribute.name));
    }
    if element.text().trim() == value {
        return Some(at.clone());
    }
    let parts = element.elements().filter(|child| !matches!(&*child.name, "metadata" | "title" | "description"));
    parts.into_iter().find_map(|child| place_of(child, &child.place_below(at), value))
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
            let unmet = Needs::of(&command, Path::new("/own"), false).unmet(true).into_iter().next();
            let met = unmet.map_or(Ok(()), |one| Err(one.error().to_string()));
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
        let why = |restored| {
            let unmet = Needs::of(&command, &own, restored).unmet(true).into_iter().next();
            unmet.map_or(Ok(()), |one| Err(one.error().to_string()))
        };
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
