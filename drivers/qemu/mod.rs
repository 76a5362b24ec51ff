//! QEMU.
pub mod capabilities;
pub mod complete;
pub mod check;
pub mod command;
pub mod tap;
