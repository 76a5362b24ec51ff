//! The host's own programs that change its network (`ip`, `tc`, `nft`, `dnsmasq`), each with its time, and devices by their number.

use super::apart;
use std::io;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, Output, Stdio};

/// How many seconds a program has that looks at the host's network or changes it: some milliseconds are usual.
const LIMIT: u32 = 20;

/// Runs a program that changes the host's network.
pub(super) fn run(program: &str, args: &[&str]) -> io::Result<()> {
    output(program, args).map(drop)
}

/// The same, for what it prints.
pub(super) fn output(program: &str, args: &[&str]) -> io::Result<Vec<u8>> {
    output_within(program, args, &[])
}

/// The same with more in its environment.
pub(crate) fn output_within(program: &str, args: &[&str], env: &[(&str, &std::ffi::OsStr)]) -> io::Result<Vec<u8>> {
    let mut command = Command::new(program);
    command.args(args).envs(env.iter().copied());
    let done = finished(&mut command).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            let package = match program {
                "nft" => "nftables",
                "dnsmasq" => "dnsmasq-base",
                _ => "iproute2",
            };
            io::Error::other(format!("this needs the program {program} (Debian has it in {package})"))
        }
        _ => e,
    })?;
    if done.status.success() {
        return Ok(done.stdout);
    }
    if done.status.signal() == Some(libc::SIGALRM) {
        return Err(io::Error::other(format!("{program} {}: it takes more than {LIMIT} s", args.join(" "))));
    }
    let words = String::from_utf8_lossy(&done.stderr);
    Err(io::Error::other(format!("{program} {}: {}", args.join(" "), words.trim())))
}

/// Runs a program to its end, which comes in time.
pub(crate) fn finished(command: &mut Command) -> io::Result<Output> {
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: a system call only. The alarm goes on in the program, and ends it.
    unsafe {
        command.pre_exec(|| {
            libc::alarm(LIMIT);
            Ok(())
        });
    }
    apart::without(|| command.output())
}

/// The kernel's number of a device.
pub(super) fn number_of(name: &str) -> io::Result<u32> {
    let name = std::ffi::CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the name ends with a zero.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        number => Ok(number),
    }
}
