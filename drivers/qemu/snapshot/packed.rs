//! A machine's memory packed by zstd on its way into a file, and unpacked on its way out: by the program, which has two pipes and
//! nothing else, so that what a file holds is read by no part of virtd.

use super::super::capabilities::program;
use super::super::launch::Start;
use super::super::monitor::Monitor;
use super::reading::{Interrupted, interrupted};
use crate::host::files::Program;
use crate::host::lender::Lender;
use crate::host::saved::Saved;
use crate::host::tool::{Bounds, Rights, Tool, tame};
use crate::host::workers::{ClosedAside, Errand, blocking};
use rustix::pipe::{PipeFlags, pipe_with};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use virt_model::driver::DriverError;

/// What it may write to of memory, in bytes, and open at most.
const BOUNDS: Bounds = Bounds { data: Some(256 << 20), cpu: None, files: Some(16) };
/// As how much memory a file may need to be unpacked.
const WINDOW: &str = "--memory=64MB";

/// The program.
pub(super) struct Zstd {
    program: Program,
    rights: Option<Rights>,
}

impl Zstd {
    /// Finds it. Error: it is not there.
    pub async fn find(lender: &Lender) -> Result<Zstd, DriverError> {
        let (wary, rights) = (lender.is_wary(), lender.user().map(Rights::from));
        let found = blocking(move || Program::at(&program("zstd", wary)?, wary).ok()).await?;
        let missing = || {
            DriverError::Unsupported(
                "memory is packed and unpacked by the program zstd, which is not installed (Debian has it in the package zstd)"
                    .to_owned(),
            )
        };
        Ok(Zstd { program: found.ok_or_else(missing)?, rights })
    }

    /// Has it pack, or `unpack`, what comes in.
    pub fn start(self, unpack: bool, from: OwnedFd, to: OwnedFd) -> Result<Tool, DriverError> {
        let mut command = self.program.command();
        match unpack {
            true => command.args(["-q", "-d", "-c", WINDOW]),
            false => command.args(["-q", "-c", "-3", "--single-thread"]),
        };
        command.env_clear().env("LC_ALL", "C");
        command.stdin(Stdio::from(from)).stdout(Stdio::from(to)).stderr(Stdio::null());
        tame(&mut command, self.rights, BOUNDS);
        Tool::start(command).map_err(|e| DriverError::Hypervisor(format!("zstd cannot be started: {e}")))
    }
}

/// Two ends of a pipe: to read, and to write.
pub(super) fn ends() -> Result<(OwnedFd, OwnedFd), DriverError> {
    pipe_with(PipeFlags::CLOEXEC).map_err(|e| DriverError::Internal(format!("no pipe for QEMU's memory: {e}")))
}

impl Start {
    /// Has QEMU load what is in a file that it is not to read itself: because it is packed, or a client's.
    pub(in crate::qemu) async fn pour(&self, saved: &Arc<Saved>, line: &Monitor) -> Result<(), DriverError> {
        let (read, write) = ends()?;
        let (read, _zstd) = match saved.is_packed() {
            false => (read, None),
            true => {
                let (unpacked, to) = ends()?;
                (unpacked, Some(Zstd::find(&self.lender).await?.start(true, read, to)?))
            }
        };
        let errand = Errand::new(self.uuid, "what was saved of the machine");
        let errand = Errand { limit: Duration::MAX, ..errand.until(&self.cancel) };
        let one = saved.clone();
        let poured = self.workers.run(errand, move |stop| {
            let poured = one.pour(&mut File::from(write), |_| stop.check().map_err(Interrupted::Stopped));
            poured.map_err(|why| interrupted(why, &PathBuf::from("what was saved of the machine")))
        });
        let loaded = line.read_memory(ClosedAside::of(read.into()));
        let (poured, loaded) = tokio::join!(poured, loaded);
        match (loaded, poured) {
            // It is not what was verified.
            (Ok(()) | Err(DriverError::Hypervisor(_)), Err(why @ DriverError::Argument(_))) => Err(why),
            // QEMU reads no further than it needs.
            (Ok(()), _) => Ok(()),
            (Err(DriverError::Hypervisor(_)), Err(why @ DriverError::TimedOut(_))) => Err(why),
            (Err(why), _) => Err(why),
        }
    }
}
