//! What virtd does: domains, jobs, permissions, events and what is kept on disk. Knows no bus and no hypervisor.

pub mod authz;
pub mod error;
pub mod events;
pub mod job;
