//! How hypervisors are moved. One folder each.

mod host;
pub mod qemu;
