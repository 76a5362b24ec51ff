//! How hypervisors are moved. One folder each.
pub mod qemu;
