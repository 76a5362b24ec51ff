//! QEMU.
pub mod capabilities;
pub mod events;
pub mod qmp;
