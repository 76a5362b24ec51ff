//! What several drivers need of the host: whom a hypervisor runs as, the files it may open, its process.

pub mod access;
mod acl;
mod chain;
pub mod process;
mod resolve;
pub mod spawn;
pub mod user;
