//! QEMU without virtd: the same command line, the same monitor, nothing else.

use crate::bus::Result;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The descriptor on which the command line expects the monitor's socket.
const MONITOR: i32 = 3;

/// A running QEMU and how long it took from exec to the first answer of its monitor.
pub struct Raw {
    child: Child,
    monitor: BufReader<UnixStream>,
    /// From exec to a monitor that takes commands.
    pub ready: Duration,
}

impl Raw {
    /// Runs `argv`; its monitor's socket is made in `folder`.
    pub fn start(argv: &[String], folder: &Path) -> Result<Raw> {
        let socket = folder.join("raw.sock");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)?;
        let begun = Instant::now();
        let child = spawn(argv, listener)?;
        let mut raw = Raw { child, monitor: BufReader::new(UnixStream::connect(&socket)?), ready: Duration::ZERO };
        raw.read_line()?;
        raw.ask(r#"{"execute":"qmp_capabilities"}"#)?;
        raw.ready = begun.elapsed();
        Ok(raw)
    }

    /// Lets the CPUs run, as `Start` does.
    pub fn cont(&mut self) -> Result<()> {
        self.ask(r#"{"execute":"cont"}"#)
    }

    /// From SIGTERM to the end of the process.
    pub fn end(mut self) -> Result<Duration> {
        let pid = rustix::process::Pid::from_child(&self.child);
        let begun = Instant::now();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        self.child.wait()?;
        Ok(begun.elapsed())
    }

    fn ask(&mut self, command: &str) -> Result<()> {
        writeln!(self.monitor.get_mut(), "{command}")?;
        while !self.read_line()?.contains("\"return\"") {}
        Ok(())
    }

    fn read_line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.monitor.read_line(&mut line)? == 0 {
            return Err("QEMU ended".into());
        }
        Ok(line)
    }
}

fn spawn(argv: &[String], listener: UnixListener) -> Result<Child> {
    let mut command = Command::new(&argv[0]);
    command.args(&argv[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: only dup2 between fork and exec; `listener` lives in the closure, and `slot` is never dropped.
    unsafe {
        command.pre_exec(move || {
            let mut slot = std::mem::ManuallyDrop::new(std::os::fd::OwnedFd::from_raw_fd(MONITOR));
            if listener.as_raw_fd() == MONITOR {
                return Ok(rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty())?);
            }
            Ok(rustix::io::dup2(&listener, &mut slot)?)
        });
    }
    Ok(command.spawn()?)
}
