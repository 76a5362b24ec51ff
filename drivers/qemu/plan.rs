//! What is to be run for a guest, and what must be so before: plain data. The command line is built of a definition
//! ([`super::command`]), and made true by a start ([`super::launch`]).

use crate::host::saved::Saved;
use crate::host::tap::TapPlan;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use virt_model::secret::SecretName;

/// Where QEMU finds the kernel's half of its vsock open.
pub const VSOCK_FD: i32 = 10;

/// The argument that lets QEMU wait, before it makes the machine's devices, until it is told to.
pub const BEFORE_DEVICES: &str = "-preconfig";

/// The first of QEMU's descriptors for companions; the command line's builder counts up from it.
pub const FIRST_COMPANION_FD: RawFd = 150;

/// What is to be run, and what must be so before and after.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Command {
    /// The binary.
    pub program: PathBuf,
    /// Its arguments, without the program's name.
    pub args: Vec<String>,
    /// Block nodes, lowest first, of which an argument would tell the host's users what may be a token. They are given over
    /// the monitor before its devices are made; [`BEFORE_DEVICES`] is among the arguments then.
    pub nodes: Vec<Value>,
    /// Its environment, beyond what every guest gets.
    pub env: Vec<(String, String)>,
    /// What it must be able to open.
    pub files: Vec<HostFile>,
    /// The firmware's variables, to be made from their template when they are not there.
    pub nvram: Option<Nvram>,
    /// Network devices that must be open at given file descriptors.
    pub taps: Vec<Tap>,
    /// Secrets that must be open at given file descriptors.
    pub secrets: Vec<Secret>,
    /// File descriptors of files for what is thrown away at the end: nameless, empty, and its own.
    pub scratch: Vec<i32>,
    /// How many bytes of its memory it must be able to keep from being swapped; no more than others if `None`.
    pub lock_limit: Option<u64>,
    /// What runs beside it, in this order.
    pub companions: Vec<Companion>,
    /// Monitor commands with their arguments, to be given once, in order, before the CPUs first run. May hold passwords.
    pub setup: Vec<(String, Value)>,
}

impl Command {
    /// Arguments that make the same machine, those that are not given as such among them. For virtd and whoever asks for them:
    /// the host's users must not see them.
    pub fn all_args(&self) -> Vec<String> {
        let nodes = self.nodes.iter().flat_map(|node| ["-blockdev".to_owned(), node.to_string()]);
        let given = self.args.iter().filter(|argument| *argument != BEFORE_DEVICES).cloned();
        nodes.chain(given).collect()
    }
}

/// A file or device of the host that the guest's process opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFile {
    /// Absolute.
    pub path: PathBuf,
    /// Whether it is written.
    pub write: bool,
    /// Whether it is made where it is missing: the guest only writes to it.
    pub create: bool,
    /// Whether it is a device of the host's that the guest has to itself.
    pub device: bool,
    /// What it must be: QEMU would wait for the other end of a pipe.
    pub expected: Expected,
}

/// What must be where a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Whatever has that path.
    Anything,
    /// What an image can be in: a plain file or a block device.
    Image,
    /// A plain file, which is read whole.
    PlainFile,
}

/// A firmware's variable store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nvram {
    /// The guest's own.
    pub path: PathBuf,
    /// Its format, `raw` or `qcow2`.
    pub format: String,
    /// What it is made from, and the format of that.
    pub template: Option<(PathBuf, String)>,
}

/// A network device that QEMU finds open. QEMU may not start helpers behind its seccomp fence, nor change the host's network,
/// so whoever starts it opens the device first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// At which file descriptors, one for each queue.
    pub fds: Vec<i32>,
    /// The same for the kernel's half, if it moves the packets.
    pub vhost_fds: Vec<i32>,
    /// What is opened.
    pub plan: TapPlan,
}

/// A secret that QEMU, or what runs beside it, finds in an open file: never in an argument, which everybody on the host can read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secret {
    /// At which file descriptor.
    pub fd: i32,
    /// What it is.
    pub content: SecretContent,
}

/// Where a secret comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretContent {
    /// One that is kept, as the definition names it.
    Kept(SecretName),
    /// The definition itself says it.
    Said(String),
}

/// A program beside QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Companion {
    /// What people call it, e.g. `swtpm`; different for each of a guest's.
    pub name: String,
    /// The program, an absolute path.
    pub program: PathBuf,
    /// Its arguments, without its name.
    pub args: Vec<String>,
    /// Its environment, beyond what every guest's processes get.
    pub env: Vec<(String, String)>,
    /// How it is reached.
    pub links: Vec<Link>,
    /// Secrets that it finds open, at descriptors as those of [`Link`]. They are handed over at a machine's start alone.
    pub secrets: Vec<Secret>,
    /// What it must be able to open.
    pub files: Vec<HostFile>,
    /// Folders made where they are missing, for whom it runs as and nobody else.
    pub folders: Vec<PathBuf>,
    /// What it is there for.
    pub role: Role,
    /// It runs as virtd does, even where QEMU has a user of its own.
    pub privileged: bool,
    /// It talks to the host's network.
    pub needs_network: bool,
}

/// A socket between a companion and QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// Two connected ends; each process finds its own open. Nobody else can connect.
    Pair {
        /// The companion's descriptor: not 0, 1, 2, 4 or 5, and below 200.
        its: RawFd,
        /// QEMU's; see [`FIRST_COMPANION_FD`].
        qemus: RawFd,
    },
    /// A listening socket that the companion finds open, and QEMU connects to. It belongs to QEMU's user.
    Listening {
        /// The companion's descriptor, as above.
        its: RawFd,
        /// Where QEMU finds it, in the guest's own folder.
        path: PathBuf,
    },
}

/// What a companion does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs as long as the guest.
    Beside(Loss),
    /// Does something at each start and ends; what comes after it in the list starts then.
    Step {
        /// How long that may take.
        within: Duration,
    },
    /// Makes a folder, once, and ends, as above. Not run where the folder is.
    Maker {
        /// Where it works: an empty folder of its own.
        work: PathBuf,
        /// What that becomes when it has succeeded.
        made: PathBuf,
        /// How long that may take.
        within: Duration,
    },
}

/// What becomes of a guest whose companion has ended too early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// It goes on without what the companion gave it; that is logged.
    Bear,
    /// It is ended, as if it had died.
    Fatal,
}

/// Where a guest's memory and devices come from.
pub enum MemorySource {
    /// From a snapshot in these images, the memory from the first.
    Images {
        /// The snapshot's.
        name: String,
        /// All that hold it.
        images: Vec<PathBuf>,
    },
    /// From a file, of so many bytes where that is known.
    File {
        /// Absolute.
        path: PathBuf,
        /// Its length.
        bytes: Option<u64>,
    },
    /// From a saved machine, whose file is open.
    Stream(Arc<Saved>),
}
