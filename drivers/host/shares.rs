//! Folders that other hosts share: each is mounted by the tool of its protocol, which has our rights; and which ones a host offers.

use super::apart;
use super::image::{failure, not_run};
use super::secret;
use super::tool::{Bounds, ends_with_its_maker, finish, tame};
use super::workers::Stop;
use rustix::fs::Access;
use rustix::process::Signal;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use virt_model::driver::DriverError;
use zeroize::Zeroizing;

const BOUNDS: Bounds = Bounds { data: Some(256 << 20), cpu: None, files: Some(64) };
/// More folders than these of one host are not told, and no longer names: NFS itself has none.
const MOST_OFFERED: usize = 4096;
const LONGEST: usize = 1024;
/// What lists the folders that a host offers.
const LISTER: &str = "showmount";

/// How a share is spoken with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// NFS.
    Nfs,
    /// CIFS, which is SMB.
    Cifs,
}

/// Who comes to a share, and how that is proved.
pub struct Login {
    /// The name of the user.
    pub user: String,
    /// The password.
    pub password: Zeroizing<Vec<u8>>,
}

impl Protocol {
    /// The tool that mounts it, and Debian's package that has it.
    fn tool(self) -> (&'static str, &'static str) {
        match self {
            Protocol::Nfs => ("mount.nfs", "nfs-common"),
            Protocol::Cifs => ("mount.cifs", "cifs-utils"),
        }
    }

    /// What the kernel calls its file systems.
    pub fn file_systems(self) -> &'static [&'static str] {
        match self {
            Protocol::Nfs => &["nfs", "nfs4"],
            Protocol::Cifs => &["cifs", "smb3"],
        }
    }

    /// Why its shares are not mounted here, if so.
    pub fn lacks(self) -> Option<String> {
        let (tool, package) = self.tool();
        (!is_there(tool)).then(|| missing(tool, package))
    }
}

/// Mounts a share on a folder that nobody but root can lead elsewhere. `source`: as the kernel's table of mounts has it. Killed when it
/// is told to stop, and with virtd; it may have mounted the share by then. Blocks.
pub fn mount(
    protocol: Protocol,
    (source, at): (&str, &Path),
    version: Option<&str>,
    login: Option<&Login>,
    stop: &Stop,
) -> Result<(), DriverError> {
    let (tool, package) = protocol.tool();
    let credentials = login.map(credentials).transpose()?;
    let mut command = Command::new(tool);
    command.arg(source).arg(at).arg("-o").arg(options(protocol, version, credentials.as_ref()));
    if let Some(credentials) = credentials {
        hand(&mut command, credentials);
    }
    let done = run(command, (tool, package), stop)?;
    let words = String::from_utf8_lossy(&done.stderr);
    match done.status.success() {
        true => Ok(()),
        false => Err(failure(format!("cannot mount {source}: {tool}: {}", said(&words)))),
    }
}

/// The folders that a host offers by NFS, without those who may have them: the first few thousand. A host of version 4 alone offers none
/// so. Blocks.
pub fn offered(host: &str, stop: &Stop) -> Result<Vec<String>, DriverError> {
    let mut command = Command::new(LISTER);
    command.args(["--no-headers", "--exports", host]);
    let done = run(command, (LISTER, Protocol::Nfs.tool().1), stop)?;
    match done.status.success() {
        true => Ok(folders(&String::from_utf8_lossy(&done.stdout))),
        false => {
            let words = String::from_utf8_lossy(&done.stderr);
            Err(failure(format!("{host} does not say what it offers: {LISTER}: {}", said(&words))))
        }
    }
}

/// What the tool is to do. A server that is away is waited for ('hard', as both protocols have it unasked): a write that a guest was told
/// to have been done is done.
fn options(protocol: Protocol, version: Option<&str>, credentials: Option<&OwnedFd>) -> String {
    let mut options = "nosuid,nodev,noexec".to_owned();
    match (protocol, credentials) {
        // It is tried once, and who waits decides for how long.
        (Protocol::Nfs, _) => options += ",retry=0",
        // Locks of QEMU's would be the server's, which lets nobody write what is locked, QEMU included: they are this host's alone.
        (Protocol::Cifs, Some(file)) => options += &format!(",nobrl,credentials=/proc/self/fd/{}", file.as_raw_fd()),
        (Protocol::Cifs, None) => options += ",nobrl,guest",
    }
    if let Some(version) = version {
        options += &format!(",vers={version}");
    }
    options
}

/// An open file in memory with the name and the password, for the tool to read.
fn credentials(login: &Login) -> Result<OwnedFd, DriverError> {
    if login.password.iter().any(|byte| matches!(byte, b'\n' | b'\r' | 0)) {
        let text = "the password of a share is one line: the value of its secret has more, or a byte 0".to_owned();
        return Err(DriverError::Storage(text));
    }
    let mut content = Zeroizing::new(format!("username={}\npassword=", login.user).into_bytes());
    // Of its full size at once: a buffer that grows leaves copies behind.
    content.reserve_exact(login.password.len() + 1);
    content.extend_from_slice(&login.password);
    content.push(b'\n');
    secret::handed(&content).map_err(|e| DriverError::Internal(format!("no memory for a password: {e}")))
}

/// The program has that file under the same number.
fn hand(command: &mut Command, file: OwnedFd) {
    // SAFETY: between fork and exec only a system call is made.
    unsafe {
        command.pre_exec(move || match libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

fn run(mut command: Command, (tool, package): (&str, &str), stop: &Stop) -> Result<Output, DriverError> {
    stop.check()?;
    command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    tame(&mut command, None, BOUNDS);
    // Nobody would wait for it any more.
    ends_with_its_maker(&mut command, Signal::KILL);
    let done = apart::without(|| finish(&mut command, stop, false));
    stop.check()?;
    done.map_err(|e| not_run(tool, &missing(tool, package), e))
}

fn missing(tool: &str, package: &str) -> String {
    format!("{tool} is not installed (Debian has it in {package}; virtd looks for it when it starts)")
}

/// Whether there is a program of that name.
fn is_there(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| rustix::fs::access(folder.join(tool), Access::EXEC_OK).is_ok())
}

/// Its words in one line.
fn said(words: &str) -> String {
    let lines: Vec<&str> = words.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("; ")
}

/// `/export/images 192.0.2.0/24,host`: those who may have it come last, and have no blanks.
fn folders(listed: &str) -> Vec<String> {
    let folder = |line: &str| Some(line.trim_end().rsplit_once(char::is_whitespace)?.0.trim_end().to_owned());
    let fits = |folder: &String| folder.starts_with('/') && folder.len() <= LONGEST;
    listed.lines().filter_map(folder).filter(fits).take(MOST_OFFERED).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Seek as _};

    #[test]
    fn a_tool_is_told_how_a_share_is_mounted_and_reads_the_password_in_a_file() {
        let login = Login { user: "virt".to_owned(), password: Zeroizing::new(b"a,b =c".to_vec()) };
        let file = credentials(&login).unwrap();
        let number = file.as_raw_fd();
        for (protocol, version, credentials, wanted) in [
            (Protocol::Nfs, None, None, "nosuid,nodev,noexec,retry=0".to_owned()),
            (Protocol::Nfs, Some("4.1"), None, "nosuid,nodev,noexec,retry=0,vers=4.1".to_owned()),
            (Protocol::Cifs, None, None, "nosuid,nodev,noexec,nobrl,guest".to_owned()),
            (
                Protocol::Cifs,
                Some("3.1.1"),
                Some(&file),
                format!("nosuid,nodev,noexec,nobrl,credentials=/proc/self/fd/{number},vers=3.1.1"),
            ),
        ] {
            assert_eq!(options(protocol, version, credentials), wanted);
        }
        let (mut file, mut content) = (std::fs::File::from(file), String::new());
        file.rewind().unwrap();
        file.read_to_string(&mut content).unwrap();
        assert_eq!(content, "username=virt\npassword=a,b =c\n");
        let two = Login { password: Zeroizing::new(b"a\nuid=0".to_vec()), ..login };
        assert!(credentials(&two).unwrap_err().to_string().contains("is one line"));
    }

    #[test]
    fn what_a_host_offers_is_read() {
        let listed = "/export/images 192.0.2.0/24,nas.example.com\n/export/a b   *\n/srv      (everyone)\nodd\n";
        assert_eq!(folders(listed), ["/export/images", "/export/a b", "/srv"]);
        assert_eq!(folders(&"/a *\n".repeat(MOST_OFFERED + 1)).len(), MOST_OFFERED);
        assert_eq!(folders(&format!("/{} *\n/a *\n", "x".repeat(LONGEST))), ["/a"]);
    }
}
