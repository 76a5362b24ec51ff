//! What several drivers need of the host: whom a hypervisor runs as, the files it may open, its process.

pub mod access;
pub(crate) mod acl;
pub mod cgroup;
mod chain;
pub mod files;
mod handle;
pub mod image;
pub mod macvtap;
pub mod pci;
pub mod process;
pub mod resolve;
pub mod secret;
pub mod spawn;
pub mod tap;
pub mod uids;
pub mod usb;
pub mod user;
pub mod vf;
pub mod vsock;
pub mod wall;
pub mod workers;
