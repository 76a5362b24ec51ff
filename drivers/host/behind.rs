//! How a tool comes behind a wall (`wall`): with root's rights by the thread that starts it, else by itself, between fork and exec.

use super::tool::{Bounds, tame};
use super::user::RunAs;
use super::wall::{self, Maker, Wall};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// How a tool comes behind its wall.
pub(super) enum Behind {
    /// By the thread that starts it.
    ByThread(Wall),
    /// By itself, which says here why it could not.
    ByItself(Words),
    /// Nobody here can make one.
    Nothing,
}

impl Behind {
    /// For the thread that starts the tool, one of [`super::apart::leave`], before it does.
    pub(super) fn enter(&self) -> io::Result<()> {
        match self {
            Behind::ByThread(wall) => wall.enter(None),
            _ => Ok(()),
        }
    }

    /// Why the tool was not started.
    pub(super) fn why(&self, error: io::Error) -> io::Error {
        match self {
            Behind::ByItself(words) => words.told().unwrap_or(error),
            _ => error,
        }
    }
}

/// Has a tool that is about to be started run with that user's rights (ours, if `None`), within these bounds, behind that wall.
pub(super) fn confine(command: &mut Command, user: Option<&RunAs>, wall: Wall, bounds: Bounds) -> io::Result<Behind> {
    tame(command, user.map(Into::into), bounds);
    Ok(match user {
        Some(_) => Behind::ByThread(wall),
        None if wall::obstacle().is_some() => Behind::Nothing,
        None => Behind::ByItself(wall_in(command, Wall { maker: Maker::Own, no_processes: true, ..wall })?),
    })
}

/// What a child says in our memory before it runs its program.
pub(super) struct Words(File);

impl Words {
    /// What it said, if it failed.
    fn told(&self) -> Option<io::Error> {
        let (mut text, mut from) = (String::new(), &self.0);
        let read = from.rewind().and_then(|()| from.read_to_string(&mut text));
        (read.is_ok() && !text.is_empty()).then(|| io::Error::other(text))
    }
}

/// The program will run behind that wall, of our own making; what of it could not be made is told in what is returned.
fn wall_in(command: &mut Command, wall: Wall) -> io::Result<Words> {
    let words = File::from(rustix::fs::memfd_create("wall", rustix::fs::MemfdFlags::CLOEXEC)?);
    let theirs = words.try_clone()?;
    // SAFETY: what is done between fork and exec is what `wall::fork` says.
    unsafe {
        command.pre_exec(move || {
            wall.enter_process().inspect_err(|why| {
                let _ = (&theirs).write_all(why.to_string().as_bytes());
            })
        });
    }
    Ok(Words(words))
}
