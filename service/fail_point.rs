//! For tests: something happens at a certain step. Not in release builds.
//!
//! `VIRTD_AT_STEP` in the environment names a file: a number, a blank, and a shell command. Each step counts the number
//! down; at the last one the file is removed and the command is run.

use std::fs;

/// A step has been reached: before the next one virtd, or what else the command ends, may be no more. Blocks while it runs.
pub(crate) fn reached() {
    if !cfg!(debug_assertions) {
        return;
    }
    let Some(file) = std::env::var_os("VIRTD_AT_STEP") else { return };
    let Ok(plan) = fs::read_to_string(&file) else { return };
    let Some((number, command)) = plan.split_once(' ') else { return };
    let left = number.parse::<u32>().unwrap_or(0).saturating_sub(1);
    if left > 0 {
        let _ = fs::write(&file, format!("{left} {command}"));
        return;
    }
    let _ = fs::remove_file(&file);
    // It may wait for something: what else is to be done by this thread goes on.
    let run = || std::process::Command::new("/bin/sh").args(["-c", command]).status();
    let _ = tokio::task::block_in_place(run);
}
