//! What several drivers need of the host: whom a hypervisor runs as, the files it may open, its process.

#[allow(clippy::disallowed_methods, reason = "its ledger is in a folder of ours")]
pub mod access;
pub(crate) mod acl;
pub mod apart;
mod behind;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys, /proc and /dev")]
pub mod cgroup;
#[allow(clippy::disallowed_methods, reason = "opens what has been found, by its descriptor")]
pub(crate) mod chain;
pub mod console;
pub mod files;
pub mod filter;
pub mod given;
mod handle;
pub mod image;
pub mod lender;
pub mod listen;
pub(crate) mod lock;
pub mod look;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys")]
pub mod lvm;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys, /proc and /dev")]
pub mod macvtap;
pub mod mkfs;
pub mod nbd;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /proc")]
pub mod neighbours;
#[allow(clippy::disallowed_methods, reason = "the system's own programs, which are given no file of a guest's")]
pub mod net_tool;
pub mod out;
#[allow(clippy::disallowed_methods, reason = "folders of ours")]
pub(crate) mod own_file;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys, /proc and /dev")]
pub mod pci;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys and /proc")]
pub mod perf;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys, /proc and /dev")]
pub mod process;
pub(crate) mod ready;
pub mod recognise;
pub mod resolve;
pub mod saved;
#[allow(clippy::disallowed_methods, reason = "the administrator's folder; links and pipes are refused there")]
pub mod secret;
pub mod shares;
#[allow(clippy::disallowed_methods, reason = "/dev/null, and the kernel's own below /proc")]
pub mod spawn;
pub mod storage;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys, /proc and /dev")]
pub mod tap;
#[cfg(test)]
pub(crate) mod test_program;
pub(crate) mod threads;
pub mod tool;
#[allow(clippy::disallowed_methods, reason = "its book is in a folder of ours")]
pub mod uids;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys and /proc")]
pub mod usage;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys, /proc and /dev")]
pub mod usb;
pub mod user;
pub mod vf;
mod vfork;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys, /proc and /dev")]
pub mod vsock;
#[allow(clippy::disallowed_methods, reason = "the folders of the host itself that every guest is shown, and /proc")]
pub mod wall;
pub mod workers;

/// Where the kernel shows the host's devices.
pub const SYSFS: &str = "/sys";
