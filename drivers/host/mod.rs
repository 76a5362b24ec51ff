//! What several drivers need of the host: whom a hypervisor runs as, the files it may open, its process.

pub mod process;
pub mod spawn;
pub mod user;
