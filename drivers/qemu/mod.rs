//! QEMU.
pub mod capabilities;
pub mod check;
pub mod command;
pub mod complete;
pub mod tap;
