//! QEMU.

pub mod capabilities;
pub mod check;
pub mod command;
pub mod complete;
pub mod events;
pub mod qmp;
pub mod tap;
