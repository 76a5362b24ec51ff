//! Programs that tests make and then run.
//!
//! A process that another test forks just then has the files that are open here, and a file which somebody has open for
//! writing does not run ("Text file busy"). So a child writes them, which is gone when they run.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// A script of the shell's at `path`, for everybody to run; another file of that name is replaced.
pub fn script(path: &Path, text: &str) {
    let mut child = install(Path::new("/dev/stdin"), path).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(format!("#!/bin/sh\n{text}\n").as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

/// This program of tests once more, at `path`.
pub fn copy_of_ours(path: &Path) {
    assert!(install(&std::env::current_exe().unwrap(), path).status().unwrap().success());
}

fn install(from: &Path, to: &Path) -> Command {
    let mut command = Command::new("install");
    command.args(["-m", "755"]).arg(from).arg(to);
    command
}
