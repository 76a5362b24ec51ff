//! QEMU.
pub mod capabilities;
