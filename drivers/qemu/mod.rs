//! QEMU.
pub mod capabilities;
pub mod events;
mod log;
pub mod qmp;
mod record;
mod report;
