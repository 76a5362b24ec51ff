//! What the host has beside QEMU, and where this virtd keeps what belongs to guests.

use super::MODULE_DIRS;
use crate::host::files::Program;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// Where programs are looked for.
const PROGRAM_DIRS: [&str; 6] =
    ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/usr/libexec", "/usr/lib/qemu"];

/// Where the kernel's half of a vsock is opened.
pub const VHOST_VSOCK: &str = "/dev/vhost-vsock";

/// Where distributions put QEMU's helper for bridges.
const BRIDGE_HELPERS: [&str; 4] = [
    "/usr/lib/qemu/qemu-bridge-helper",
    "/usr/libexec/qemu-bridge-helper",
    "/usr/local/libexec/qemu-bridge-helper",
    "/usr/lib64/qemu/qemu-bridge-helper",
];

/// What is beside QEMU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Site {
    /// As in `DriverConfig`: for what must outlive a reboot of the host.
    pub state_dir: PathBuf,
    /// The TPM emulator, if it is installed.
    pub swtpm: Option<PathBuf>,
    /// What makes the first state of a TPM, if it is installed.
    pub swtpm_setup: Option<PathBuf>,
    /// What shares out folders by virtiofs, if it is installed.
    pub virtiofsd: Option<PathBuf>,
    /// What is the network of guests without one, if it is installed.
    pub passt: Option<PathBuf>,
    /// We may make network devices.
    pub makes_taps: bool,
    /// The kernel can move packets between a network device and a guest.
    pub vhost_net: bool,
    /// The kernel can be one end of a socket to a guest.
    pub vhost_vsock: bool,
    /// QEMU's modules, e.g. `block-curl`.
    pub modules: BTreeSet<String>,
    /// As in `DriverConfig`: where the host's certificates are.
    pub tls_dir: PathBuf,
    /// Which there are, e.g. `server-cert.pem`.
    pub certificates: BTreeSet<String>,
}

/// Which end of a connection we are: each has certificates of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Others come to us.
    Server,
    /// We go to others, and prove who we are where we can.
    Client,
}

impl End {
    /// QEMU's word.
    pub fn as_str(self) -> &'static str {
        match self {
            End::Server => "server",
            End::Client => "client",
        }
    }
}

/// A folder's file system tells two changes apart that are this far from each other.
const TELLS_APART: Duration = Duration::from_secs(2);

/// When a folder was changed last, or that there is none: device, number, and seconds and nanoseconds of the change.
type Change = Option<(u64, u64, i64, i64)>;

/// Reads what is beside QEMU: again only when one of the folders in which it lies has changed.
pub struct Reader {
    state_dir: PathBuf,
    tls_dir: PathBuf,
    wary: bool,
    last: Mutex<Option<(Vec<Change>, Site)>>,
}

impl Reader {
    /// For a virtd without folders; `wary` as in [`program`].
    pub fn new(wary: bool) -> Reader {
        Reader { state_dir: PathBuf::new(), tls_dir: PathBuf::new(), wary, last: Mutex::default() }
    }

    /// For one that has that [`Site::state_dir`].
    pub fn keeping_in(self, state_dir: &Path) -> Reader {
        Reader { state_dir: state_dir.to_owned(), last: Mutex::default(), ..self }
    }

    /// For one that has that [`Site::tls_dir`].
    pub fn certified_in(self, tls_dir: &Path) -> Reader {
        Reader { tls_dir: tls_dir.to_owned(), last: Mutex::default(), ..self }
    }

    /// What there is now. A program whose mode has changed in its place may be named as before; whoever runs it judges it
    /// again. Blocks.
    pub fn read(&self) -> Site {
        let folders = || PROGRAM_DIRS.iter().chain(&MODULE_DIRS).map(Path::new).chain([self.tls_dir.as_path()]);
        let before: Vec<Change> = folders().map(change).collect();
        let last = || self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, site)) = last().as_ref().filter(|(changes, _)| *changes == before) {
            return site.clone().with_kernel();
        }
        let site = Site::read(&self.state_dir, &self.tls_dir, self.wary);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let settled = |change: &Change| {
            change.is_none_or(|(_, _, seconds, _)| seconds.unsigned_abs() + TELLS_APART.as_secs() < now.as_secs())
        };
        // One more change just then would look like this one.
        *last() = before.iter().all(settled).then(|| (before, site.clone()));
        site
    }
}

fn change(folder: &Path) -> Change {
    let stat = std::fs::metadata(folder).ok()?;
    Some((stat.dev(), stat.ino(), stat.ctime(), stat.ctime_nsec()))
}

impl Site {
    /// Looks at this host; `wary` as in [`program`].
    fn read(state_dir: &Path, tls_dir: &Path, wary: bool) -> Site {
        let certificates = std::fs::read_dir(tls_dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
        Site {
            state_dir: state_dir.to_owned(),
            swtpm: program("swtpm", wary),
            swtpm_setup: program("swtpm_setup", wary),
            virtiofsd: program("virtiofsd", wary),
            passt: program("passt", wary),
            makes_taps: nix::unistd::geteuid().is_root(),
            vhost_net: false,
            vhost_vsock: false,
            modules: MODULE_DIRS.iter().flat_map(|dir| modules(Path::new(dir))).collect(),
            tls_dir: tls_dir.to_owned(),
            certificates: certificates.filter_map(|name| name.into_string().ok()).collect(),
        }
        .with_kernel()
    }

    /// The same, with what the kernel has now.
    fn with_kernel(self) -> Site {
        let (vhost_net, vhost_vsock) = (Path::new("/dev/vhost-net").exists(), Path::new(VHOST_VSOCK).exists());
        Site { vhost_net, vhost_vsock, ..self }
    }

    /// The files with which that end of an encrypted connection shows who it is. The error names the first that is missing.
    pub fn certificates(&self, end: End) -> Result<Vec<PathBuf>, PathBuf> {
        let own = [format!("{}-cert.pem", end.as_str()), format!("{}-key.pem", end.as_str())];
        let all: Vec<String> = std::iter::once("ca-cert.pem".to_owned()).chain(own).collect();
        let missing = all.iter().find(|name| !self.certificates.contains(*name));
        match (missing, end) {
            (None, _) => Ok(all.iter().map(|name| self.tls_dir.join(name)).collect()),
            // A client without a certificate of its own can still know its server.
            (Some(name), End::Client) if *name != all[0] => Ok(vec![self.tls_dir.join(&all[0])]),
            (Some(name), _) => Err(self.tls_dir.join(name)),
        }
    }

    /// Whether a part of QEMU that distributions make a module of is missing. A QEMU without modules has all built in.
    pub fn lacks_module(&self, name: &str) -> bool {
        !self.modules.is_empty() && !self.modules.contains(name)
    }
}

fn modules(dir: &Path) -> Vec<String> {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    files.filter_map(|name| Some(name.to_str()?.strip_suffix(".so")?.to_owned())).collect()
}

/// Where a helper program of this name is, if it is installed. `wary`: as root among others, we run only what nobody else
/// could have put there. One that others could have is still told where there is no better: whoever runs it judges it again
/// ([`Program::at`]), and says what is wrong with it.
pub fn program(name: &str, wary: bool) -> Option<PathBuf> {
    program_in(&PROGRAM_DIRS.map(Path::new), name, wary)
}

fn program_in(dirs: &[&Path], name: &str, wary: bool) -> Option<PathBuf> {
    let there: Vec<PathBuf> = dirs.iter().map(|dir| dir.join(name)).filter(|path| path.exists()).collect();
    let fit = there.iter().find(|path| Program::at(path, wary).is_ok());
    fit.or(there.first()).cloned()
}

/// QEMU's helper for bridges, if it is installed.
pub fn bridge_helper() -> Option<PathBuf> {
    BRIDGE_HELPERS.iter().map(PathBuf::from).find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_is_beside_qemu_is_read_again_when_it_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let tls = dir.path().join("tls");
        let reader = Reader::new(false).keeping_in(dir.path()).certified_in(&tls);
        let has = |name: &str| reader.read().certificates.contains(name);
        assert!(!has("ca-cert.pem"));
        std::fs::create_dir(&tls).unwrap();
        for name in ["ca-cert.pem", "server-cert.pem", "server-key.pem"] {
            assert!(!has(name));
            std::fs::write(tls.join(name), "").unwrap();
            assert!(has(name), "{name}, however soon after the one before");
        }
        assert_eq!(reader.read(), Site::read(dir.path(), &tls, false));
        std::fs::remove_file(tls.join("ca-cert.pem")).unwrap();
        assert!(!has("ca-cert.pem"));
    }

    #[test]
    fn a_program_that_others_could_have_put_there_is_passed_over() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("SKIPPED: needs root");
        }
        // Nobody else writes on the way to it.
        let dir = tempfile::tempdir_in("/root").unwrap();
        let dirs = ["first", "second"].map(|name| dir.path().join(name));
        for dir in &dirs {
            std::fs::create_dir(dir).unwrap();
            std::fs::write(dir.join("swtpm"), "").unwrap();
            std::fs::set_permissions(dir.join("swtpm"), std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let found = |wary| program_in(&dirs.each_ref().map(PathBuf::as_path), "swtpm", wary);
        assert_eq!(found(true), Some(dirs[0].join("swtpm")));
        std::fs::set_permissions(dirs[0].join("swtpm"), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!((found(true), found(false)), (Some(dirs[1].join("swtpm")), Some(dirs[0].join("swtpm"))));
        std::fs::remove_file(dirs[1].join("swtpm")).unwrap();
        assert_eq!(found(true), Some(dirs[0].join("swtpm")), "whoever runs it says what is wrong with it");
    }
}
