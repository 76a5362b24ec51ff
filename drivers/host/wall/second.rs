//! A second lock behind the wall, where the kernel has one: Landlock. What is run, made and removed is held to folders, and
//! signals and abstract sockets reach nobody outside.

use super::build::{PROGRAMS, STORES, home_of};
use super::{Maker, Wall};
use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    Scope,
};
use std::path::{Path, PathBuf};

/// What is held to folders: running, and changes of what there is. Which files are opened is the wall's and the files' own.
fn changes() -> landlock::BitFlags<AccessFs> {
    AccessFs::MakeChar
        | AccessFs::MakeBlock
        | AccessFs::MakeDir
        | AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::MakeFifo
        | AccessFs::MakeSym
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::Refer
}

/// Locks the calling thread, and what it makes, in; as far as this kernel can. Who shuts themselves in mounts, which nobody
/// may who is locked so.
pub fn lock(wall: &Wall) -> Result<(), landlock::RulesetError> {
    if wall.shuts_itself_in || wall.maker == Maker::Nobody {
        return Ok(());
    }
    let run = AccessFs::Execute;
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(changes() | run)?
        .scope(Scope::from_all(ABI::V6))?
        .create()?;
    for path in programs(wall) {
        if let Ok(folder) = PathFd::new(path) {
            ruleset = ruleset.add_rule(PathBeneath::new(folder, run))?;
        }
    }
    let write = changes() & !(AccessFs::MakeChar | AccessFs::MakeBlock);
    let mut written: Vec<PathBuf> = wall.folders.iter().filter(|folder| folder.write).map(|f| f.path.clone()).collect();
    written.extend(wall.files.iter().filter(|file| file.write && file.kind().is_dir()).map(|file| file.path.clone()));
    written.extend(wall.scratch.then(|| "/tmp".into()));
    for path in written {
        if let Ok(folder) = PathFd::new(path) {
            ruleset = ruleset.add_rule(PathBeneath::new(folder, write))?;
        }
    }
    ruleset.restrict_self().map(drop)
}

fn programs(wall: &Wall) -> Vec<PathBuf> {
    let common = PROGRAMS.iter().chain(&STORES).map(|path| Path::new(path).to_owned());
    common.chain(wall.programs.iter().map(|program| home_of(program))).collect()
}
