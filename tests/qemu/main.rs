//! The whole daemon with real QEMU guests, without KVM.

#[path = "../common/mod.rs"]
mod common;

mod lifecycle;
mod survival;
mod system;
